"""What the scripts share: start and errors, resuming, result lines."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import config as configuration
from config import UserError, as_dict, data_root, parse
from utils.checkpoint import file_hash, load_checkpoint, save_checkpoint, stored_config, versions
from utils.devices import choose_device, hardware
from utils.engine import TerminalProgress
from utils.files import OWN_CODE, append_line, listing_hash, read_lines

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR)


def run_script(main, cls, argv=None):
    """Parse the command line as ``cls`` and call ``main(config)``; returns the exit code.

    A user's mistake becomes one line on stderr and exit code 2; Ctrl-C one line that says how to go on, and 130.
    """
    name = Path(sys.argv[0]).name
    config = None

    def complain(text):
        print(f"{name}: error: {' '.join(str(text).split())}", file=sys.stderr)
        return 2

    try:
        config = parse(cls, argv, read_checkpoint=load_checkpoint)
        if getattr(config, "threads", 0):
            torch.set_num_threads(config.threads)
        main(config)
        return 0
    except UserError as e:
        return complain(e)
    except KeyboardInterrupt:
        goes_on = hasattr(config, "checkpoint_root") and config.save
        how = f"; to go on: {configuration.command(config)} --resume" if goes_on else ""
        print(f"\n{name}: interrupted{how}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:
        if e.errno not in DISK:
            raise
        return complain(f"{e.filename or 'writing'}: {e.strerror}")
    except (RuntimeError, MemoryError) as e:
        words = str(e).lower()
        if not isinstance(e, MemoryError) and "out of memory" not in words and "allocate memory" not in words:
            raise
        return complain("out of memory; try a smaller --batch_size, --image_size, --train_size or network")


def say(text=""):
    """Print a line without tearing a progress bar apart."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def identity(config):
    """The configuration as far as it decides what a run computes, a dict."""
    return {k: v for k, v in as_dict(config).items() if k != "resume"}


def decisive(config):
    """What is left of ``config``, a dict from ``identity``, without what may change when a run goes on."""
    return {k: v for k, v in config.items() if k != "threads"}


def start_of(config):
    """The hashes of the files that a run starts from, a dict: another file under the same name is another run.

    Images are not read for it: of a folder of one's own, names, sizes and times count. A defense or trigger of one's
    own counts with its file; those of this project change without changing results (see ``benchmark.VERSION``).
    """
    files = {name: getattr(config, name, "") for name in ("s_model", "t_model")}
    if getattr(config, "trigger_type", "") in ("trojanTrigger", "clTrigger"):
        files["clean_model"] = config.clean_model
    files.update((f"{name}_file", OWN_CODE[what]) for name in ("defense", "first", "trigger_type")
                 if (what := ("defense" if name == "first" else name, getattr(config, name, ""))) in OWN_CODE)
    files.update((name, path) for name in ("blend_image", "reversed_file", "reference")
                 if (path := getattr(config, name, "")))
    found = {name: file_hash(path) if Path(path).is_file() else "" for name, path in files.items()}
    folders = {"data_root": data_root(config) if getattr(config, "dataset", "") == "folder" else "",
               "reflection_root": getattr(config, "reflection_root", "")}
    return {**found, **{name: listing_hash(path) for name, path in folders.items() if path}}


def check_writable(folder, flag):
    """Make ``folder`` and see that files can be written there, before hours are spent. Raises ``UserError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except FileExistsError:
        raise UserError(f"--{flag} {folder}: is a file, a folder is needed") from None
    except OSError as e:
        raise UserError(f"--{flag} {folder}: cannot be written to: {e.strerror}") from None


class Journal(TerminalProgress):
    """The state of an unfinished run, one file a stage, in a folder beside the checkpoint that the run will write.

    The folder's name carries a hash of the configuration, so that different runs never meet. ``self.run_id`` names the
    run in its result line, which is therefore written once even if the run was killed while finishing.
    """

    def __init__(self, config, target, on_epoch=None):
        self.config, self.target, self.on_epoch = config, Path(target), on_epoch
        self.inputs = start_of(config)
        what = json.dumps([decisive(identity(config)), self.inputs], sort_keys=True)
        key = hashlib.sha256(what.encode()).hexdigest()[:10]
        self.folder = self.target.parent / f"{self.target.name.partition('.')[0]}-resume-{key}"
        self.before = self.folder.with_name(self.folder.name.replace("-resume-", "-interrupted-"))
        self.history, self.run_id, self.other = [], secrets.token_hex(8), 0.0
        self.optimizers = {}  # the last state of each stage's
        self.resumed = False
        if not config.save:
            if config.resume:
                say("note: --resume: with --save 0 no state is kept, so that nothing can be gone on with")
            return
        note = self.folder / "run.tar"
        if config.resume and note.exists():
            try:
                stored = load_checkpoint(note)
            except UserError as e:
                raise UserError(f"--resume: {e}; without --resume the run starts over") from None
            self.run_id, self.resumed = stored["run_id"], True
        else:
            if config.resume:
                say("nothing to resume for this configuration: starting from the beginning")
            elif note.exists():
                shutil.rmtree(self.before, ignore_errors=True)
                self.folder.rename(self.before)
                say(f"note: starting over; the same run was interrupted before. To go on with that one: stop this one, "
                    f"rename {self.before} to {self.folder.name}, and --resume")
            shutil.rmtree(self.folder, ignore_errors=True)
            save_checkpoint(note, {"run_id": self.run_id, "config": identity(config)})

    def path(self, stage):
        return self.folder / f"{stage}.tar"

    def load(self, stage):
        if not (self.resumed and self.path(stage).exists()):
            return None
        try:
            state = load_checkpoint(self.path(stage))
        except UserError as e:
            say(f"note: {e}; {stage} starts anew")
            return None
        say(f"{stage}: going on after epoch {state['epoch']}")
        self.history += state["history"]
        self.optimizers[stage] = state["optimizer"]
        return state

    def save(self, stage, state):
        self.optimizers[stage] = state["optimizer"]
        if self.config.save:
            save_checkpoint(self.path(stage), state)

    def optimizer(self, name):
        """The state of the optimiser in the last stage of ``name``, such as "nad 2" of nad; empty if none trained."""
        return ([{}] + [state for stage, state in self.optimizers.items() if stage.partition(" ")[0] == name])[-1]

    def epoch_done(self, stage, model, record):
        if self.on_epoch:
            self.on_epoch(stage, model, record)
        self.history.append(record)

    def saved_time(self, seconds):
        self.other += seconds

    @contextlib.contextmanager
    def aside(self):
        """What is done in it is not the run's work: its time is taken from ``other``, the seconds to be added."""
        start = time.perf_counter()
        yield
        self.other -= time.perf_counter() - start

    def finish(self, content, metrics, file, data, **more):
        """Write the checkpoint ``content`` to the target and the result line to ``log_root/file``; drop the state.

        ``data`` says what the images were read from; ``more`` goes into the line as it is, such as ``attack``, the
        options of what was measured with.
        """
        config = self.config
        if not config.save:
            return
        result = {"run_id": self.run_id, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "config": identity(config),
                  "inputs": self.inputs, "data": data, **more, "metrics": metrics, "history": self.history,
                  "train_seconds": round(sum(r["seconds"] for r in self.history), 1),
                  "machine": hardware(choose_device(config.device), config.amp), "versions": versions(),
                  **({"resumed": True} if self.resumed else {})}
        path = Path(config.log_root) / file
        if all(r.get("run_id") != self.run_id for r in read_lines(path)):  # it is there if the run was killed just here
            append_line(path, result)
        save_checkpoint(self.target, {**content, "config": identity(config), "inputs": self.inputs,
                                      "versions": versions()})
        say(f"saved: {self.target}, and a line in {path}")
        for folder in (self.folder, self.before):
            shutil.rmtree(folder, ignore_errors=True)


def finished(config, target):
    """Whether ``--resume`` was asked for a run that is complete: ``target`` was written by the same configuration."""
    if not (config.resume and config.save and Path(target).exists()):
        return False
    try:
        stored = load_checkpoint(target)
        return (decisive(stored_config(stored)) == decisive(identity(config))
                and stored.get("inputs") == start_of(config))
    except UserError:
        return False


FORMATS = {"clean_acc": "ACC", "clean_acc_non_target": "ACC (non-target)", "asr": "ASR", "ra": "RA"}


def table(rows):
    """The metrics of ``rows`` ({name: metrics in percent}) as an aligned text table, without what was not measured."""
    columns = [k for k in FORMATS if any(m.get(k) is not None for m in rows.values())]
    first = max(len(name) for name in rows) + 2
    lines = [" " * first + "".join(f"{FORMATS[c]:>{max(len(FORMATS[c]), 6) + 3}}" for c in columns)]
    for name, metrics in rows.items():
        cells = "".join(f"{metrics[c]:>{max(len(FORMATS[c]), 6) + 3}.2f}" if metrics[c] is not None else
                        f"{'-':>{max(len(FORMATS[c]), 6) + 3}}" for c in columns)
        lines.append(f"{name:<{first}}{cells}")
    for name, metrics in rows.items():
        lines += [f"{name}, ASR of {part}: {asr:.2f}" for part, asr in metrics.get("parts", {}).items()]
    return "\n".join(lines)
