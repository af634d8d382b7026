"""The grid attack x defense x seed; every cell is a run of train_badnet.py or main.py.

    python benchmark.py --preset smoke              # generated data, two minutes on two cores
    python benchmark.py --preset defenses           # eight attacks, all defenses, three seeds, the shipped networks
    python benchmark.py --attacks BadNets 'Blend:blend_alpha=0.1' --defenses finetune 'nad:beta1=0,beta2=0' --seeds 1 2
    python benchmark.py --table                     # the leaderboard, printed and put into the READMEs
    python benchmark.py --figures                   # the same as pictures, in <out>/figures

An attack is a name of attacks.PRESETS, a defense the name of its file; either may be followed by a colon and options
of its script. Results go to <out>/benchmark.jsonl, one line a cell. Cells that are there with the same configuration
and the same network are not run again; a killed one goes on where it was. A cell that fails is recorded in
<out>/errors.jsonl, and the others go on. Several of these processes may work on the same grid in the same folder.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

import attacks
import defenses
import leaderboard
import main as erasing
import report
import train_badnet as training
from config import (
    BenchmarkConfig,
    EraseConfig,
    TrainConfig,
    UserError,
    as_dict,
    convert,
    kept,
    not_default,
    student_file,
)
from data_loader import source_of
from leaderboard import MAIN, SIX, VERSION, is_cell
from models import check_name
from subject import stored_options
from utils.checkpoint import file_hash, load_checkpoint
from utils.files import append_line, locked, read_lines, write_atomically
from utils.plot import pyplot, save_figure
from utils.processes import run_script_apart, unfinished_run
from utils.run import check_writable, run_script, say, start_of

ROOT = Path(__file__).resolve().parent
PUBLISHED = report.PUBLISHED / "benchmark.jsonl"
SHIPPED = {"BadNets": "", **{name: name.lower().replace("-", "_") for name in MAIN[1:]}}
SAME = ("device", "threads", "amp", "test_size")  # options with which the shipped networks are still the same
FIXED = ("seed", "save", "resume", "log_root", "checkpoint_root", "teacher_root", "s_model", "beside")  # not the user's
SEEDS = ["1", "2", "3"]
SHARPNESS = "student_rho=2,teacher_rho=2,teacher_lr=0.02,beta1=150,beta2=300,beta3=300"  # sharpness-aware NAD
BUSY = "another process runs it"
AXES = {"models": "s_name", "datasets": "dataset", "ratios": "ratio"}  # {list of the grid: the option that it gives}
PRESETS = {  # each a list of grids: the fields of BenchmarkConfig that differ
    "smoke": [{"attacks": ["BadNets", "Blend"], "defenses": ["finetune", "nad", "pruning"], "seeds": ["1"],
               "options": ["dataset=shapes10", "train_size=15000", "test_size=2000", "s_name=WRN-10-1"],
               "train_options": ["epochs=5"]}],
    "six": [{"attacks": [*SIX], "defenses": ["finetune", "nad"], "seeds": SEEDS}],
    "nad-table1": [{"attacks": [*SIX], "defenses": ["finetune", "fine_pruning", "mcr", "nad"], "seeds": SEEDS}],
    "recipes": [{"attacks": [*SIX], "seeds": SEEDS, "defenses": [
        "finetune", "nad", "clp", "ftsam:ftsam_lr=0.02", "ftsam:first=clp", "finetune:first=clp,ft_lr=0.01",
        "nad:first=clp,teacher_lr=0.02,lr=0.01",
        f"nad:{SHARPNESS}", f"nad:first=clp,lr=0.01,{SHARPNESS}", f"nad:first=anp,anp_steps=500,lr=0.01,{SHARPNESS}",
        "sage:sage_rate=step,sage_lr=0.02", "sage:sage_rate=step,sage_lr=0.02,sage_beta=0"]}],
    "defenses": [{"attacks": [*SHIPPED], "defenses": [*defenses.NAMES], "seeds": SEEDS}],
    "sage": [{"attacks": ["BadNets", "Trojan", "WaNet"], "defenses": ["finetune", "nad", "sage"], "seeds": SEEDS,
              "ratios": ["0.05", "0.01"]},
             {"attacks": [name for name in attacks.PRESETS
                          if name.startswith(("1 ", "3 ", "5 ", "Large", "Transparency", "Shape", "Class"))],
              "defenses": ["finetune", "nad", "sage"], "seeds": SEEDS, "train_options": ["epochs=10"]},
             {"attacks": ["BadNets", "Blend", "SIG"], "seeds": SEEDS,
              "defenses": ["sage:sage_rate=fixed", "sage:sage_paths=1-3", "sage:attention=max"]}],
    "linf": [{"attacks": attack, "defenses": ["linf_pruning", "linf_pruning:linf_norm=l1", "linf_pruning:linf_norm=l2"],
              "seeds": SEEDS, **more}
             for attack, more in (([*SHIPPED], {}), (["BadNets"], {"models": ["AlexNet"]}))],
    "ablations": [{"attacks": ["BadNets", "Blend", "SIG"], "seeds": SEEDS, "defenses": [
        "finetune", "nad", *(f"{d}:ratio={r}" for d in ("finetune", "nad") for r in (0.01, 0.1, 0.2)),
        *(f"nad:beta1={500 * s:g},beta2={1000 * s:g},beta3={1000 * s:g}" for s in (0.1, 0.3, 3.0, 10.0)),
        "nad:beta1=0,beta2=0", "nad:beta1=0,beta3=0", "nad:beta2=0,beta3=0",
        "nad:p=1", "nad:p=4", "nad:attention=mean", "nad:attention=max",
        "nad:teacher_epochs=1", "nad:teacher_epochs=5", "nad:teacher_epochs=20",
        "nad:at_loss=paper,beta1=0.5,beta2=4,beta3=16"]}],  # as heavy as the default at d = 1, see at.py
}


@dataclass
class Cell:
    """One run: ``config`` is a ``TrainConfig`` or an ``EraseConfig``."""

    attack: str
    defense: str  # '' for one that trains a network
    config: object
    shipped: bool = False  # of one that trains a network: it is there

    def files(self):
        """The hashes of the files that the run starts from, by option; a network that is not there yet by its name.
        And what its data is read from."""
        found = {**start_of(self.config), "data": source_of(self.config)}
        if self.defense and not found["s_model"]:
            found["s_model"] = self.config.s_model
        return found

    def key(self):
        """What decides the result of the cell, as text."""
        return what_counts(as_dict(self.config), self.files())

    def folder(self):
        """Where the cell's log, its state and its result are until that is in the results."""
        return Path(self.config.log_root)

    def settle(self, out):
        """Give the cell its folder."""
        self.config.log_root = str(out / "cells" / hashlib.sha256(self.key().encode()).hexdigest()[:12])
        if self.defense:
            self.config.checkpoint_root = self.config.teacher_root = self.config.log_root
        self.folder().mkdir(parents=True, exist_ok=True)

    def __str__(self):
        return f"{self.attack} / {self.defense or 'training'} / seed {self.config.seed}"


def what_counts(stored, files):
    """The options of a run's configuration ``stored``, a dict, that decide its result, and its files, as text.

    Options that are newer than ``stored`` have their default there.
    """
    decisive = {k: v for k, v in files.items() if v and k not in leaderboard.NOT_IN_KEY}
    return json.dumps([VERSION, deciding(stored), stored["seed"], decisive], sort_keys=True)


def deciding(stored):
    """The options of the configuration ``stored``, a dict, that decide the result of its run, beside seed and files."""
    left_out = (*leaderboard.NOT_IN_KEY, "s_model", "resume")
    return {k: v for k, v in leaderboard.options_today(stored).items() if k not in left_out}


def key_of(record):
    """The key of the cell that left the result line ``record``."""
    return what_counts(record["config"], {**record["inputs"], "data": record["data"].partition(" (")[0]})


def results(path):
    """The lines of the results file ``path`` that are cells of today's version and defenses."""
    return list(filter(is_cell, read_lines(path)))


def keys_in(path):
    """The keys of the ``results`` in the file ``path``, a set; worked out anew when the file has changed."""
    try:
        with open(path, "rb") as f:  # opened, a file of a network's disk is as it is now
            info = os.fstat(f.fileno())
    except FileNotFoundError:
        return set()
    return keys_at(path.resolve(), info.st_ino, info.st_size, info.st_mtime_ns)


@lru_cache(maxsize=1)
def keys_at(path, *_state):
    return set(map(key_of, results(path)))


def check_once(lists, grid):
    """Raise ``UserError`` if a list of ``AXES`` in ``lists`` gives what is also an option elsewhere in ``grid``."""
    for flag in AXES.keys() & lists.keys():
        for other in ("options", "train_options", "erase_options", "attacks", "defenses"):
            for text in grid.get(other) or []:
                words = text.partition(":")[2].split(",") if other in ("attacks", "defenses") else [text]
                if any(word.partition("=")[0] == AXES[flag] for word in words):
                    where = f"--{other}" if other in lists or "options" in other else f"the preset's {other}"
                    raise UserError(f"--{flag} and {where} {text}: only one of them can give {AXES[flag]}")


def settings(cls, items, flag):
    """{option: value} of ``cls`` from texts such as "lr=0.02"; a list's members are joined by +. ``UserError``."""
    known, values = {f.name: f for f in fields(cls) if f.name not in FIXED}, {}
    for item in items:
        name, equals, value = item.partition("=")
        if name not in known or not equals:
            raise UserError(f"--{flag} {item}: an option of {cls.__name__} and its value are needed, such as "
                            f"batch_size=32; the benchmark itself sets {', '.join(FIXED)}")
        values[name] = convert(known[name], value.split("+") if known[name].type is list else value, f"--{flag} ")
    return values


def spec(text, names, cls, flag):
    """(name, options) of "name:option=value,option=value". Raises ``UserError``."""
    name, _, rest = text.partition(":")
    if name not in names:
        raise UserError(f"--{flag} {name}: one of {'; '.join(names)} is allowed")
    return name, settings(cls, [item for item in rest.split(",") if item], flag)


def cells_of(grid, out):
    """The cells of one grid, a dict of fields of ``BenchmarkConfig``: those that train, then those that erase."""
    for name in ("attacks", "defenses", "seeds"):
        if not grid.get(name):
            raise UserError(f"--{name}: at least one is needed (or a --preset)")
    trained, erased = [], []
    seeds = [convert(EraseConfig.__dataclass_fields__["seed"], seed, "--seeds: ") for seed in grid["seeds"]]
    for ratio in grid.get("ratios") or []:
        convert(EraseConfig.__dataclass_fields__["ratio"], ratio, "--ratios: ")
    axes = [[(name, value) for value in grid.get(flag) or [None]] for flag, name in AXES.items()]
    for place in itertools.product(*axes):
        model, data, ratio = ([f"{name}={value}"] if value else [] for name, value in place)
        shared = [*grid.get("options", []), *model, *data]
        own_train = {**settings(TrainConfig, shared, "options"),
                     **settings(TrainConfig, grid.get("train_options", []), "train_options")}
        own_erase = {**settings(EraseConfig, [*shared, *ratio], "options"),
                     **settings(EraseConfig, grid.get("erase_options", []), "erase_options")}
        for attack in grid["attacks"]:
            network = network_of(attack, own_train, out)
            path = student_file(network.config, network.config.checkpoint_root)
            if not network.shipped:
                trained.append(network)
            for defense in grid["defenses"]:
                chosen, options = spec(defense, defenses.NAMES, EraseConfig, "defenses")
                options = {**own_erase, **options}
                if "none" in (network.config.trigger_type, options.get("trigger_type")):
                    raise UserError(f"--attacks {attack} --defenses {defense}: trigger_type none leaves no ASR to "
                                    f"measure")
                options = {**kept(options, options), "defense": chosen, "s_model": str(path), "beside": False,
                           **{name: getattr(network.config, name) for name in ("reflection_root", "blend_image")}}
                erased += [Cell(attack, defense, EraseConfig(**options, seed=seed)) for seed in seeds]
    return trained + erased


def network_of(attack, options, out):
    """The cell that trains a network for ``attack`` with ``options``, in a folder of ``out``; or that of the shipped
    network, if the options leave everything as it is. Raises ``UserError``."""
    name, changes = spec(attack, attacks.PRESETS, TrainConfig, "attacks")
    config = TrainConfig(**{**attacks.PRESETS[name], **options, **changes})
    check_name(config.s_name)
    usual = as_dict(TrainConfig())
    ours = all(getattr(config, k) == usual[k] for k in ("dataset", "s_name"))  # those of the shipped ones
    if name in SHIPPED and ours and not changes:
        root = f"weight/s_net/{SHIPPED[name]}".rstrip("/")
        path = student_file(config, root)
        stored = stored_options(load_checkpoint(path)) if path.exists() else {}
        if all(v == stored.get(k, usual[k]) for k, v in options.items() if k not in SAME):
            found = attacks.preset_name(stored)
            if not stored or found != name:
                wrong = f"was trained with another attack ({found or 'a variant'})" if stored else "is missing"
                raise UserError(f"--attacks {attack}: {path} {wrong}; git checkout weight brings the shipped one back")
            config.checkpoint_root = root
            return Cell(attack, "", config, shipped=True)
    own = {k: v for k, v in deciding(as_dict(config)).items() if v != usual[k]}  # a later option changes no name
    digest = hashlib.sha256(json.dumps([own, source_of(config)], sort_keys=True).encode()).hexdigest()[:8]
    slug = "".join(c if c.isalnum() else "_" for c in f"{config.dataset} {name}".lower())
    config.checkpoint_root = str(out / "networks" / f"{slug}-{digest}")
    return Cell(attack, "", config)


def run_here(cell):
    """Run the cell in this process, its output to log.txt in its folder. Returns its error or None."""
    threads = torch.get_num_threads()
    cell.config.resume = unfinished_run(cell.config.checkpoint_root)
    with open(cell.folder() / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            torch.set_num_threads(cell.config.threads or threads)
            (erasing if cell.defense else training).main(cell.config)
        except UserError as e:
            return e
        except (Exception, SystemExit) as e:  # whatever it is, the other cells go on
            traceback.print_exc(file=log)
            return e
        finally:
            torch.set_num_threads(threads)
    return None


def run_apart(cell, threads, retries, run, device="auto"):
    """Run the cell in a process of its own; one that is killed is started again, and goes on. Its error or None.

    ``device`` takes the place of auto."""
    path = cell.folder().resolve() / "config.json"
    write_atomically(path, lambda f: f.write(json.dumps(as_dict(cell.config)).encode()))
    command = [sys.executable, str(ROOT / ("main.py" if cell.defense else "train_badnet.py")), "--config", str(path),
               "--threads", str(cell.config.threads or max(1, int(threads)))]
    command += ["--device", device] if cell.config.device == "auto" else []
    code, last = run(command, path.parent, Path.cwd(), Path(cell.config.checkpoint_root).resolve(), retries)
    if code is None:
        return BUSY
    if code == 130:
        raise KeyboardInterrupt
    if code < 0:
        return UserError(f"its process was killed by signal {-code}")
    return UserError(last if code < 3 and last else f"its process ended with exit code {code}") if code else None


def ray_runner(opt):
    """(run, stop): ``run`` is what ``run_apart`` needs to run a process as a task of a Ray cluster whose machines share
    this folder; ``stop`` ends those tasks that are not done."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray: Ray is not installed: pip install ray") from None
    if not ray.is_initialized():
        try:
            ray.init(address=opt.ray_address or None, log_to_driver=False, logging_level="error",
                     runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
        except (ConnectionError, ValueError) as e:
            raise UserError(f"--ray_address {opt.ray_address}: no cluster answers: {str(e).splitlines()[0]}") from None
        take_sigterm()  # Ray has a handler of its own
    task = ray.remote(run_script_apart).options(num_cpus=opt.cpus_per_cell, num_gpus=opt.gpus_per_cell,
                                                max_retries=opt.retries)

    tasks, stopped = [], threading.Event()

    def run(*args):
        own = task.remote(*args)
        tasks.append(own)
        if stopped.is_set():  # while it was made
            ray.cancel(own)
        try:
            return ray.get(own)
        except ray.exceptions.RayError as e:
            return 1, f"Ray: {str(e).splitlines()[0]}"

    def stop():
        stopped.set()
        for found in tasks:
            ray.cancel(found)
    return run, stop


def collect(cell):
    """The result line of the cell, from what its script left in the cell's folder; None if it is not finished."""
    if not cell.defense and not student_file(cell.config, cell.config.checkpoint_root).exists():
        return None
    for r in read_lines(cell.folder() / ("main.jsonl" if cell.defense else "train_badnet.jsonl")):
        if key_of(r) == cell.key():
            kept = {k: v for k, v in r.items() if k != "history"}
            return {**kept, "version": VERSION, "cell": {"attack": cell.attack, "defense": cell.defense}}
    return None


def finish(cell, opt, out):
    """Write the cell's result line, unless another process did, and clean up its folder. Returns its error or None."""
    record = collect(cell)
    if record is None:
        return RuntimeError(f"left no result in {cell.folder()}")
    if cell.key() not in keys_in(out / "benchmark.jsonl"):
        append_line(out / "benchmark.jsonl", record)
    for path in cell.folder().glob("*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock" and not (opt.keep and path.suffix in (".tar", ".txt")):
            path.unlink(missing_ok=True)
    return None


def failed(cell, error, out):
    """Record what went wrong in the cell."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    append_line(out / "errors.jsonl", {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "cell": str(cell), "error": text,
        "config": as_dict(cell.config), "log": str(cell.folder() / "log.txt")})
    say(f"failed: {cell}: {text}")


def attempt(cell, run, opt, out):
    """Run the cell unless it is finished, in whatever process. Returns its error, None, or ``BUSY``."""
    try:
        cell.settle(out)
        if cell.defense and not Path(cell.config.s_model).exists():
            return UserError(f"{cell.config.s_model}: its network could not be trained")
        if not unfinished([cell], out):
            return None  # by another process, meanwhile
        try:
            error = run(cell) if collect(cell) is None else None
        except Exception as e:
            error = e
        if error is BUSY:
            return BUSY
        with locked(cell.folder() / "finish"):
            if not unfinished([cell], out):
                return None  # another process came to its end between two steps of this one, and cleaned up
            return error or finish(cell, opt, out)
    except Exception as e:
        return e


def run_all(cells, opt, out, progress):
    """Run ``cells``; writes a line for each. Returns those that failed. Those that other processes run come last."""
    def here(cell):
        with locked(cell.folder() / "lock", wait=False) as lock:
            if lock is None:
                return BUSY
            return run_here(cell) if collect(cell) is None and unfinished([cell], out) else None

    stopping = threading.Event()
    workers, run, stop = opt.jobs, here, lambda: None
    if opt.engine == "ray":
        (on_ray, stop), workers = ray_runner(opt), 1000
        run = partial(run_apart, threads=opt.cpus_per_cell, retries=opt.retries, run=on_ray,
                      device="auto" if opt.gpus_per_cell else "cpu")
    elif opt.jobs > 1:
        run = partial(run_apart, threads=torch.get_num_threads() // opt.jobs, retries=opt.retries,
                      run=partial(run_script_apart, stopped=stopping.is_set))
    wrong, left = [], deque((cell, False) for cell in cells)

    def run_next():
        while True:
            cell, again = left.popleft()
            if again and stopping.wait(1):
                raise KeyboardInterrupt
            error = attempt(cell, run, opt, out)
            if error is not BUSY:
                return cell, error
            left.append((cell, True))  # all others first

    def done(cell, error):
        if error is not None:
            failed(cell, error, out)
            wrong.append(cell)
        progress.step(cell)

    if workers == 1:
        for _ in cells:
            done(*run_next())
        return wrong
    pool = ThreadPoolExecutor(min(workers, max(1, len(cells))))
    try:
        for future in as_completed([pool.submit(run_next) for _ in cells]):
            done(*future.result())
    finally:
        stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)
        stop()
    return wrong


class CellProgress:
    """How many of ``total`` cells are done and the time left: a bar, or without a terminal a line for each cell."""

    def __init__(self, total):
        self.total, self.done, self.start = total, 0, time.perf_counter()
        self.bar = tqdm(total=total, unit="cell", disable=None, smoothing=0.1)

    def step(self, cell):
        self.done += 1
        self.bar.set_postfix_str(str(cell))
        self.bar.update()
        if self.bar.disable:
            left = (time.perf_counter() - self.start) / self.done * (self.total - self.done)
            say(f"{self.done} of {self.total} cells, {tqdm.format_interval(left)} left: {cell}")


def take_sigterm():
    """Let SIGTERM, which a cluster sends when the time is over, do what Ctrl-C does; in the main thread only."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def sigterm_taken():
    """``take_sigterm`` until the end."""
    before = signal.getsignal(signal.SIGTERM)
    take_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def check_goes_together(opt):
    """Raise ``UserError`` if ``opt`` holds options that another one leaves without effect."""
    given = {name: f"--{name}" for name in not_default(opt)}
    shows = [name for name in ("table", "figures") if name in given]
    others = [flag for name, flag in given.items() if name not in (*shows[:1], "out")]
    if shows and others:
        raise UserError(f"{given[shows[0]]} runs nothing and shows all results: not with {', '.join(others)}")
    if opt.engine == "ray" and "jobs" in given:
        raise UserError("--jobs does not go with --engine ray: --cpus_per_cell says how many cells a machine takes")
    stray = [given[name] for name in ("ray_address", "cpus_per_cell", "gpus_per_cell") if name in given]
    if stray and opt.engine != "ray":
        raise UserError(f"{', '.join(stray)}: of --engine ray only")


def main(opt):
    """Run the grid that ``opt`` (``BenchmarkConfig``) names, or print its table."""
    check_goes_together(opt)
    out = Path(opt.out)
    if opt.table:
        return publish(out)
    if opt.figures:
        return draw(out)
    given = {"attacks": opt.attacks, "defenses": opt.defenses, "seeds": opt.seeds, "models": opt.models,
             "datasets": opt.datasets, "ratios": opt.ratios}
    given = {name: value for name, value in given.items() if value}
    cells = {False: [], True: []}  # those that train, and those that erase
    own = {"options": opt.options, "train_options": opt.train_options, "erase_options": opt.erase_options}
    for grid in PRESETS.get(opt.preset, [{}]):
        check_once(given, {**grid, **given, **own})
        more = {name: [*grid.get(name, []), *(opt.options if name != "options" else []), *found]  # the user's win
                for name, found in own.items()}
        for cell in cells_of({**grid, **given, **more}, out):
            cells[bool(cell.defense)].append(cell)
    check_writable(out, "out")
    wrong, total = [], 0
    progress = CellProgress(len(unfinished(cells[False], out)) + len(unfinished(cells[True], out)))
    with sigterm_taken(), progress.bar:
        for erases in (False, True):
            missing = unfinished(cells[erases], out)
            total += len({cell.key() for cell in cells[erases]})
            say(f"{'erasing' if erases else 'training'}: {len(missing)} cells to run")
            try:
                wrong += run_all(missing, opt, out, progress)
            except KeyboardInterrupt:
                say("finished cells are kept; the same command goes on")
                raise
    wanted = {cell.key() for cell in cells[True]}
    say("\n" + leaderboard.render([r for r in results(out / "benchmark.jsonl") if key_of(r) in wanted]))
    say(f"\n{total - len(wrong)} of {total} cells are in {out / 'benchmark.jsonl'}")
    if wrong:
        raise UserError(f"{len(wrong)} cells failed, see {out / 'errors.jsonl'}; the same command tries them again")
    return None


def publish(out):
    """Add the lines of ``out`` to the published ones, print the leaderboard of all, and put it, its short form and what
    else is rendered from them into the READMEs.

    Of lines with the same key the newest stays. Those about a shipped network whose file holds another one by now are
    left out.
    """
    published = read_lines(PUBLISHED)
    kept, new = ([r for r in lines if is_cell(r) and not replaced(r)]
                 for lines in (published, read_lines(out / "benchmark.jsonl")))
    if len(kept) < len(published):
        say(f"note: {len(published) - len(kept)} published lines go: they are incomplete, of another version or of a "
            f"replaced network")
    records = {}
    for r in [*kept, *new]:
        key = key_of(r)
        if key not in records or r.get("time", "") >= records[key].get("time", ""):
            records[key] = r
    say(leaderboard.render(records.values()))
    PUBLISHED.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(r) + "\n" for r in records.values())
    write_atomically(PUBLISHED, lambda f: f.write(lines.encode()))
    for file in report.FILES:
        leaderboard.write_into(file, report.rendered(file, PUBLISHED.parent))


def replaced(record):
    """Whether the file of the shipped network that ``record`` is about holds another one today."""
    path = Path(record["config"].get("s_model", ""))
    return path.parts[:1] == ("weight",) and path.is_file() and file_hash(path) != record["inputs"]["s_model"]


def draw(out):
    """A PNG of each setting in the results of ``out``."""
    plt, folder = pyplot(), out / "figures"
    found = leaderboard.by_setting(r for r in results(out / "benchmark.jsonl") if not replaced(r))
    if not found:
        raise UserError(f"--figures: {out / 'benchmark.jsonl'} holds no results")
    check_writable(folder, "out")
    for name, records in found.items():
        path = folder / f"{''.join(c if c.isalnum() else '-' for c in name).strip('-')}.png"
        save_figure(leaderboard.draw(plt, name, records), path)
        say(f"saved: {path}")


def unfinished(cells, out):
    """Those of ``cells`` that are not in the results, equal ones once; a network that was deleted is made again."""
    done, missing = keys_in(out / "benchmark.jsonl"), {}
    for cell in cells:
        gone = not cell.defense and not student_file(cell.config, cell.config.checkpoint_root).exists()
        if gone or cell.key() not in done:
            missing.setdefault(cell.key(), cell)
    return list(missing.values())


if __name__ == "__main__":
    sys.exit(run_script(main, BenchmarkConfig))
