"""The tables of the README files from the result lines in results/published.

    python report.py                # print them
    python report.py --write        # put them into the files, between the markers
    python report.py results        # the same tables of your own runs

Runs are put together if their configurations agree in all but the seed; of runs with the same configuration and seed
the newest counts. A table names the number of seeds, the command, the hardware and the time.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

import attacks
import defenses
import leaderboard
from config import AttackConfig, EraseConfig, TrainConfig, UserError, command, weight_root
from defenses.neural_cleanse import SMALL
from leaderboard import NOT_IN_KEY, score, spread, write_into
from strip import ranks
from utils.files import read_lines

ROOT = Path(__file__).resolve().parent
PUBLISHED = ROOT / "results" / "published"
ALIKE = {*NOT_IN_KEY} - {"reference"}  # options that runs in one table may differ in; a reference has a row there
COLUMNS = ("clean_acc", "clean_acc_non_target", "asr", "ra")


def settled(record):
    """``record`` with every option of today in its configuration, options that it is older than at their defaults."""
    config = leaderboard.options_today(record["config"])
    attack = record.get("attack", {name: config[name] for name in AttackConfig.__dataclass_fields__})
    if config["script"] == "EraseConfig" and "attack" not in record and config["trigger_type"] == "gridTrigger":
        config["trigger_type"] = "auto"  # which names the same attack
    return {**record, "config": config, "attack": attack}


def groups(records):
    """Lists of records with the same rows that differ in their seed only, in the order of their first appearance."""
    found = {}
    for r in map(settled, records):
        key = repr([sorted((k, v) for k, v in r["config"].items() if k not in ALIKE), r["inputs"], r["data"],
                    list(r["metrics"])])
        found.setdefault(key, {})[r["config"]["seed"]] = r
    return [[runs[seed] for seed in sorted(runs)] for runs in found.values()]


def shown(config):
    """``--s_model`` as the command needs it: '' for the file that is taken by default."""
    default = weight_root(EraseConfig(dataset=config["dataset"]), "", "s_net")
    return "" if Path(config["s_model"]).parent == default else config["s_model"]


def title(config):
    """What distinguishes a table: the folder of the network, unless it is the default one."""
    return f"{Path(config['s_model']).parent.name}: " if config["s_model"] else ""


def repeat(runs):
    """The command that repeats ``runs``, but for its seed and the folders that it writes to."""
    config = {k: v for k, v in runs[0]["config"].items()
              if k in EraseConfig.__dataclass_fields__ and k not in ALIKE}
    return " ".join(["python main.py", *command(EraseConfig(**{**config, "s_model": shown(config)})).split()[2:]])


def table(runs):
    """The Markdown table of one group, with a line about how it was made."""
    config = {k: v for k, v in runs[0]["config"].items() if k in EraseConfig.__dataclass_fields__}
    config.update({"seed": EraseConfig().seed, "s_model": shown(config)})
    seeds = ", ".join(str(r["config"]["seed"]) for r in runs)
    attack = runs[0]["attack"]
    attack = "no trigger" if attack["trigger_type"] == "none" else f"{attack['trigger_type']}, {attack['target_type']}"
    minutes = statistics.mean(r["train_seconds"] for r in runs) / 60
    data = leaderboard.data_name(config)
    out = [f"**{title(config)}{config['s_name']}, {data} ({runs[0]['data']}), {attack}, {100 * config['ratio']:g}% "
           f"clean images; seeds {seeds}.**", "",
           "| | ACC | ACC (non-target) | ASR | RA |", "|---|---|---|---|---|"]
    for name in runs[0]["metrics"]:
        cells = [spread([r["metrics"][name][k] for r in runs]) for k in COLUMNS]
        out.append(f"| {name} | {' | '.join(cells)} |")
    made = f"{leaderboard.machines(runs)}, {minutes:.1f} minutes of training a run"
    return "\n".join([*out, "", f"`{repeat(runs)} --seed N`, {made}."])


def tables(records):
    """The tables of main.py's runs, the defaults first, those of fewer than three seeds left out."""
    found = [runs for runs in groups(records) if len(runs) >= 3]
    return [table(runs) for runs in sorted(found, key=lambda runs: len(repeat(runs).split()))]


def is_default(text):
    """Whether ``text`` is the table of the default command."""
    return "`python main.py --seed N`" in text


def render_headline(records):
    """The table of the default command."""
    return "\n".join(filter(is_default, tables(records))) or "not measured with today's defaults"


def render_runs(records):
    """All other tables."""
    return "\n\n".join(text for text in tables(records) if not is_default(text))


def render_trained(records):
    """The table of the networks that train_badnet.py made."""
    out = ["| command | data | ACC | ACC (non-target) | ASR | minutes |", "|---|---|---|---|---|---|"]
    for r in records:
        config = {k: v for k, v in r["config"].items() if k in TrainConfig.__dataclass_fields__}
        words = command(TrainConfig(**config)).split()
        cells = [spread([r["metrics"][k]]) for k in COLUMNS[:3]]
        out.append(f"| `{' '.join(['python train_badnet.py', *words[2:]])}` | {config['dataset']}, {r['data']} | "
                   f"{' | '.join(cells)} | {r['train_seconds'] / 60:.1f} |")
    return "\n".join([*out, "", f"One run each. Measured on: {leaderboard.machines(records)}."])


SAGE = {"BadNets": 81.52, "Trojan": 99.64, "WaNet": 97.25}  # ASR before erasing in that paper, ResNet-18
REPORTED = {  # ACC / ASR of the backdoored network that others report
    name: f"{'85.65 / 100 [demo]; ' if name == 'BadNets' else ''}{acc:.2f} / {asr:g} [bench]"
          + (f"; ASR {SAGE[name]} [SAGE]" if name in SAGE else "")
    for name, (acc, asr) in leaderboard.REPORTED[""].items()}


RECIPE = ("epochs", "optimizer", "lr", "augment")  # what a table names
NO_RECIPE = {*AttackConfig.__dataclass_fields__, *NOT_IN_KEY, "stamp", "resume"}


def by_recipe(records):
    """Lists of records of networks of the same recipe of training; first those with a clean one to compare with."""
    recipes, trained = {}, [r for r in records if r["config"]["script"] == "TrainConfig"]
    for r in sorted(trained, key=lambda r: r["config"]["trigger_type"] != "none"):
        options = leaderboard.options_today(r["config"])
        key = repr([r["data"], *(v for k, v in sorted(options.items()) if k not in NO_RECIPE)])
        recipes.setdefault(key, []).append(r)
    return list(recipes.values())


def render_attack_runs(records):
    """The tables of all runs of train_badnet.py with an attack, one for each recipe of training."""
    return "\n\n".join(map(attack_table, by_recipe(records)))


def render_attacks(records):
    """The table of the attacks as they are meant, with recipes that a clean network was trained with too."""
    out = ["| attack | epochs | seeds | ACC | lost | ASR | apart | reported |", "|---|---|---|---|---|---|---|---|"]
    found, used = [], []
    for runs in by_recipe(records):
        if runs[0]["config"]["trigger_type"] != "none":
            continue
        for name, options, cells in attack_rows(runs):
            if name and "--stamp" not in options:
                found.append((name, runs[0]["config"]["epochs"], cells))
        used += runs
    order = ["none", *attacks.PRESETS]
    for name, epochs, cells in sorted(found, key=lambda row: (order.index(row[0]), row[1])):
        out.append(f"| {name} | {epochs} | {' | '.join(cells)} |")
    if not used:
        return "no attack was measured yet"
    config = used[0]["config"]
    return "\n".join([*out, "", f"{config['s_name']}, {leaderboard.data_name(config)} ({used[0]['data']}), on: "
                      f"{leaderboard.machines(used)}."])


def attack_rows(records):
    """(attack, its options, cells) of one recipe's records: seeds, ACC, points lost against the clean network's, ASR,
    what was measured apart, what others report."""
    clean = [r["metrics"]["clean_acc"] for runs in groups([r for r in records if r["config"]["trigger_type"] == "none"])
             for r in runs]
    if clean:
        yield "none", "--trigger_type none", [str(len(clean)), spread(clean), "", "", "", ""]
    order = [*attacks.PRESETS, ""]
    found = [(attacks.preset_name(runs[0]["config"]), runs) for runs in groups(records)
             if runs[0]["config"]["trigger_type"] != "none"]
    for name, runs in sorted(found, key=lambda pair: order.index(pair[0])):
        config = runs[0]["config"]
        named = [f for f in (*AttackConfig.__dataclass_fields__.values(), TrainConfig.__dataclass_fields__["stamp"])
                 if config[f.name] != f.default]
        options = " ".join(f"--{f.name} {config[f.name]}" for f in named)
        acc = [r["metrics"]["clean_acc"] for r in runs]
        apart = {}
        for r in runs:
            for part, asr in r["metrics"].get("parts", {}).items():
                apart.setdefault(part, []).append(asr)
        lost = f"{statistics.mean(clean) - statistics.mean(acc):.2f}" if clean else ""
        apart = "; ".join(f"{part} {spread(values)}" for part, values in apart.items())
        yield name, options, [str(len(runs)), spread(acc), lost, spread([r["metrics"]["asr"] for r in runs]), apart,
                              REPORTED.get(name, "")]


def attack_table(records):
    """One recipe's table with the options of every attack."""
    out = ["| attack | options of `train_badnet.py` | seeds | ACC | lost | ASR | apart | reported |",
           "|---|---|---|---|---|---|---|---|"]
    for name, options, cells in attack_rows(records):
        out.append(f"| {name or 'variant'} | {f'`{options}`' if options else ''} | {' | '.join(cells)} |")
    config = records[0]["config"]
    recipe = "".join(f" --{k} {config[k]}" for k in RECIPE if config[k] != getattr(TrainConfig(), k))
    minutes = statistics.median(r["train_seconds"] for r in records) / 60
    return "\n".join([*out, "", f"`python train_badnet.py{recipe} OPTIONS --seed N --checkpoint_root DIR`, "
                      f"{config['s_name']}, {config['dataset']} ({records[0]['data']}), median {minutes:.1f} minutes "
                      f"of training, on: {leaderboard.machines(records)}."])


BOUND = 1.5  # points of accuracy that a recipe may lose on a surrogate network


def render_search(records, best=3):
    """Of each defense on each surrogate network the best recipes by score, the one with the lowest ASR within the
    bound, and today's default."""
    out = ["| surrogate network | | score | ACC lost | mean ASR | values that were searched | |",
           "|---|---|---|---|---|---|---|"]

    def lost(r):
        return r["before"]["acc"] - r["metrics"]["acc"]

    def mean_asr(r):
        return statistics.mean(r["metrics"]["asr"])

    def is_today(r):
        now = leaderboard.options_today({"script": "EraseConfig", "defense": r["config"]["defense"], "beside": False})
        own = leaderboard.options_today({"script": "EraseConfig", **r["config"], "beside": False})
        return all(own[k] == v for k, v in now.items() if k not in NOT_IN_KEY)

    places = {}  # {surrogate network: {its hash: 0, 1, ...}}: trained on another machine it is another one
    for r in records:
        known = places.setdefault(r["surrogate"], {})
        known.setdefault(r["hash"], len(known))

    def network(r):
        k = places[r["surrogate"]][r["hash"]]
        return r["surrogate"] + ("", ", trained again", f", trained again ({k})")[min(k, 2)]

    for surrogate, defense in sorted({(network(r), r["config"]["defense"]) for r in records}):
        found = sorted((r for r in records if (network(r), r["config"]["defense"]) == (surrogate, defense)), key=score)
        within = min((r for r in found if lost(r) <= BOUND), key=mean_asr, default=None)
        for k, r in enumerate(found):
            notes = [note for note, holds in (("lowest ASR within the bound", r is within),
                                              ("default", is_today(r))) if holds]
            if k < best or notes:
                recipe = ", ".join(f"{name} {value}" for name, value in r["recipe"].items())
                out.append(f"| {surrogate} | {defense} | {score(r):.2f} | {lost(r):.2f} | {mean_asr(r):.2f} | {recipe} "
                           f"| {', '.join(notes)} |")
    before = {network(r): r["before"]["acc"] for r in records}
    before = "; ".join(f"{name}: {acc:.2f}" for name, acc in sorted(before.items()))
    return "\n".join([*out, "", f"{len(records)} recipes were measured. Held-out accuracy before: {before}."])


def detected_group(record):
    """(a name for the network that ``record`` of detect.py is about, its place in the table)."""
    attack = record["attack"]
    if attack["trigger_type"] == "none":
        return "clean network", (2, 0)
    name = attacks.preset_name(attack)
    place = leaderboard.MAIN.index(name) if name in leaderboard.MAIN else len(leaderboard.MAIN)
    after = f", after {defenses.title(record['erased'])}" if record["erased"] else ""
    return f"{name}{after}", (1 if after else 0, place)


def render_detect(records):
    """What detect.py found, a row a kind of network: Neural Cleanse's target label, then STRIP."""
    groups, places = {}, {}
    for r in records:
        name, places[name] = detected_group(r)
        found = groups.setdefault(name, {})
        found[r["config"]["seed"]] = {**found.get(r["config"]["seed"], {}), **r}
    out = ["| network | seeds | mask of the target, % of the median | its index | target found | other labels | "
           "doubtful | STRIP: AUROC | accepted / rejected, % | accepted at 1% |", "|---" * 10 + "|"]
    for name in sorted(groups, key=places.get):
        runs = [groups[name][seed] for seed in sorted(groups[name])]
        searched = [r for r in runs if r.get("neural_cleanse")]
        target = None if name == "clean network" else runs[0]["attack"]["target_label"]
        cells = [""] * 5
        if searched:
            small, doubtful = [], 0
            for r in (r["neural_cleanse"] for r in searched):
                small.append([k for k in r["suspects"] if r["of_the_median"][k] < SMALL])
                doubtful += len(r["suspects"]) - len(small[-1])
            cells = ["", "", "", str(sum(len({*labels} - {target}) for labels in small)), str(doubtful)]
            if target is not None:
                own = [(r["neural_cleanse"]["of_the_median"][target], r["neural_cleanse"]["anomaly_indices"][target])
                       for r in searched]
                cells[:3] = [spread([100 * size for size, _ in own], 0), spread([index for _, index in own], 1),
                             f"{sum(target in labels for labels in small)} of {len(searched)}"]
        looked = [r["strip"] for r in runs if "far" in r.get("strip", {})]
        cells += [spread([s["auroc"] for s in looked], 3),
                  f"{spread([s['far'] for s in looked], 1)} / {spread([s['frr'] for s in looked], 1)}",
                  spread([s["far_at_frr"] for s in looked], 1)] if looked else [""] * 3
        out.append(f"| {name} | {', '.join(str(r['config']['seed']) for r in runs)} | {' | '.join(cells)} |")
    if not groups:
        return "nothing was measured yet"
    return "\n".join([*out, "", f"`python detect.py --s_model FILE --seed N`, on: {leaderboard.machines(records)}."])


APART = 5  # points of ASR between teacher and fine-tuning from which on a student can be said to be nearer to one


def render_teacher(records):
    """What NAD as it stands makes of its teacher, beside fine-tuning on the same batches: means by attack, and how far
    the student's ASR is from either. The setting with most lines."""
    blocks = leaderboard.by_setting(records)
    if not blocks:
        return "nothing was measured yet"
    rows, columns, *_ = leaderboard.arranged(max(blocks.values(), key=len))
    found = {}
    for column in columns:
        tuned, erased = rows.get("fine-tuning", {}).get(column, {}), rows.get("NAD", {}).get(column, {})
        runs = [(leaderboard.outcome(tuned[seed]), r["metrics"]["teacher"], leaderboard.outcome(r))
                for seed, r in erased.items() if seed in tuned and "teacher" in r["metrics"]]
        if runs:
            found[column] = runs
    if len(found) < 2:
        return "nothing was measured yet"
    out = ["| | runs | ACC: fine-tuning | teacher | student | ASR: fine-tuning | teacher | student |",
           "|---|---|---|---|---|---|---|---|", *(teacher_row(name, {name: runs}) for name, runs in found.items())]
    if {*leaderboard.SIX} < found.keys():
        out.append(teacher_row("mean of the paper's six", {name: found[name] for name in leaderboard.SIX}))
    return "\n".join([*out, teacher_row(f"mean of {len(found)} attacks", found), "", nearness(found)])


def teacher_row(name, found):
    """One row of that table: the mean over the attacks in ``found`` of the mean over their runs, triples of metrics."""
    cells = [f"{statistics.mean(statistics.mean(run[k][key] for run in runs) for runs in found.values()):.1f}"
             for key in ("clean_acc", "asr") for k in range(3)]
    return f"| {name} | {sum(map(len, found.values()))} | {' | '.join(cells)} |"


def nearness(found):
    """How far the student's ASR is from its teacher's and from fine-tuning's, in the runs of ``found``, as text."""
    asr = {name: torch.tensor([[m["asr"] for m in run] for run in runs]) for name, runs in found.items()}
    tuned, teacher, student = torch.cat([*asr.values()]).T
    apart = (tuned - teacher).abs() > APART
    nearer = (student - teacher).abs() < (student - tuned).abs()
    far = [f"{(student - other).abs().mean():.1f}" for other in (teacher, tuned)]
    order = [[ranks(column) for column in runs.T] for runs in asr.values() if len(runs) > 2]
    order = [row for row in (torch.corrcoef(torch.stack(each))[2] for each in order) if row.isfinite().all()]
    text = (f"The student's ASR is {far[0]} points from its teacher's in the mean of the {len(student)} runs, {far[1]} "
            f"from fine-tuning's. In {int(apart.sum())} of them these two are more than {APART} points apart; in "
            f"{int((apart & nearer).sum())} of those the student is nearer to its teacher.")
    if order:
        tuned, teacher, _ = torch.stack(order).mean(0).tolist()
        text += (f" Rank correlation (Spearman) over the runs of an attack, mean over {len(order)} attacks: "
                 f"{teacher:.2f} with the teacher, {tuned:.2f} with fine-tuning.")
    return text


FILES = {  # {file: {section: (how it is rendered, from which lines)}}
    ROOT / "README.md": {
        "headline": (render_headline, "main.jsonl"), "benchmark": (leaderboard.render_short, "benchmark.jsonl")},
    ROOT / "attacks" / "README.md": {"attacks": (render_attacks, "attacks.jsonl", "benchmark.jsonl")},
    ROOT / "weight" / "README.md": {"trained": (render_trained, "train_badnet.jsonl")},
    PUBLISHED / "README.md": {
        "benchmark": (leaderboard.render, "benchmark.jsonl"),
        "teacher": (render_teacher, "benchmark.jsonl"),
        "results": (render_runs, "main.jsonl"),
        "detection": (render_detect, "detect.jsonl"),
        "attack runs": (render_attack_runs, "attacks.jsonl", "benchmark.jsonl"),
        "search": (render_search, "search.jsonl")}}


def rendered(file, folder=PUBLISHED):
    """The texts of the sections of ``file``, by name, from the result files in ``folder``."""
    return {name: render([r for lines in files for r in usable(Path(folder) / lines)])
            for name, (render, *files) in FILES[file].items()}


def usable(path):
    """The records in the result file ``path`` that have a configuration; of benchmark.jsonl the cells."""
    records = [r for r in read_lines(path, needs="config") if isinstance(r["config"], dict)]
    return [*filter(leaderboard.is_cell, records)] if path.name == "benchmark.jsonl" else records


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=PUBLISHED, help="where the result files lie")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    if not Path(args.folder).is_dir():
        raise UserError(f"no such folder: {args.folder}")
    if args.write and Path(args.folder).resolve() != PUBLISHED.resolve():
        raise UserError(f"--write {args.folder}: the tables in the READMEs are those of {PUBLISHED}; copy result files "
                        f"there first")
    for file in FILES:
        texts = rendered(file, args.folder)
        print("\n\n".join(texts.values()), end="\n\n")
        if args.write:
            write_into(file, texts)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"report.py: error: {e}", file=sys.stderr)
        sys.exit(2)
