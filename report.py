"""Tables of the README from results/published: runs of main.py over seeds, trained networks, the recipe search.

    python report.py                # print them
    python report.py --write        # put them into README.md, between the markers
    python report.py results        # the same tables of your own runs

Runs are put together if their configurations agree in all but the seed; of runs with the same configuration and seed
the newest counts. A table names the number of seeds, the command, the hardware and the time.
"""

import argparse
import statistics
import sys
from pathlib import Path

import attacks
import leaderboard
from config import AttackConfig, EraseConfig, TrainConfig, UserError, command, weight_root
from leaderboard import NOT_IN_KEY, score, spread, write_into
from utils.files import read_lines

ROOT = Path(__file__).parent
PUBLISHED = ROOT / "results" / "published"
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
        key = repr([sorted((k, v) for k, v in r["config"].items() if k not in NOT_IN_KEY), r["inputs"], r["data"],
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
              if k in EraseConfig.__dataclass_fields__ and k not in NOT_IN_KEY}
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
    made = f"{runs[0]['machine']}, torch {runs[0]['versions']['torch']}, {minutes:.1f} minutes of training a run"
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
    machines = sorted({f"{r['machine']}, torch {r['versions']['torch']}" for r in records})
    return "\n".join([*out, "", f"One run each. Measured on: {'; '.join(machines)}."])


REPORTED = {  # ACC / ASR of the backdoored network that others report
    name: f"{'85.65 / 100 [demo]; ' if name == 'BadNets' else ''}{acc:.2f} / {asr:g} [bench]"
    for name, (acc, asr) in leaderboard.REPORTED[""].items()}


RECIPE = ("epochs", "optimizer", "lr", "augment")


def render_attacks(records):
    """The tables of all attacks, one for each recipe of training; first those with a clean network to compare with."""
    def recipe(r):
        return [r["data"], *(r["config"][k] for k in ("dataset", "s_name", *RECIPE))]

    recipes = []
    for r in sorted(records, key=lambda r: r["config"]["trigger_type"] != "none"):
        if recipe(r) not in recipes:
            recipes.append(recipe(r))
    return "\n\n".join(attack_table([r for r in records if recipe(r) == found]) for found in recipes)


def attack_table(records):
    """One recipe's table: accuracy against the clean networks', success rate, and what others report."""
    clean = [r["metrics"]["clean_acc"] for r in records if r["config"]["trigger_type"] == "none"]
    out = ["| attack | options of `train_badnet.py` | seeds | ACC | lost | ASR | measured apart | reported |",
           "|---|---|---|---|---|---|---|---|"]
    if clean:
        out.append(f"| none | `--trigger_type none` | {len(clean)} | {spread(clean)} | | | | |")
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
        out.append(f"| {name or 'variant'} | {f'`{options}`' if options else ''} | {len(runs)} | {spread(acc)} | "
                   f"{lost} | {spread([r['metrics']['asr'] for r in runs])} | {apart} | {REPORTED.get(name, '')} |")
    config = records[0]["config"]
    recipe = "".join(f" --{k} {config[k]}" for k in RECIPE if config[k] != getattr(TrainConfig(), k))
    minutes = statistics.median(r["train_seconds"] for r in records) / 60
    machines = sorted({f"{r['machine']}, torch {r['versions']['torch']}" for r in records})
    return "\n".join([*out, "", f"`python train_badnet.py{recipe} OPTIONS --seed N`, "
                      f"{config['s_name']}, {config['dataset']} ({records[0]['data']}), median {minutes:.1f} minutes "
                      f"of training, on: {'; '.join(machines)}."])


def render_search(records, best=5):
    """The best recipes of each defense that search.py measured."""
    out = [f"{len(records)} recipes; the {best} best of each kind:", "",
           "| network trained with | | score | held-out ACC | mean surrogate ASR | values that were searched |",
           "|---|---|---|---|---|---|"]
    kinds = sorted({(r["surrogate"], r["config"]["defense"]) for r in records})
    for surrogate, defense in kinds:
        found = sorted((r for r in records if (r["surrogate"], r["config"]["defense"]) == (surrogate, defense)),
                       key=score)
        for r in found[:best]:
            recipe = ", ".join(f"{k} {v}" for k, v in r["recipe"].items())
            out.append(f"| {surrogate} | {defense} | {score(r):.2f} | {r['metrics']['acc']:.2f} | "
                       f"{statistics.mean(r['metrics']['asr']):.2f} | {recipe} |")
    return "\n".join(out)


SECTIONS = {"headline": (render_headline, "main.jsonl"), "results": (render_runs, "main.jsonl"),
            "trained": (render_trained, "train_badnet.jsonl"), "attacks": (render_attacks, "attacks.jsonl"),
            "search": (render_search, "search.jsonl"), "benchmark": (leaderboard.render, "benchmark.jsonl")}


def rendered(folder=PUBLISHED):
    """The text of every section, by name, from the result files in ``folder``."""
    return {name: render(read_lines(Path(folder) / file)) for name, (render, file) in SECTIONS.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=PUBLISHED, help="where the result files lie")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    texts = rendered(args.folder)
    print("\n\n".join(texts.values()))
    if args.write:
        write_into(ROOT / "README.md", texts)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"report.py: error: {e}", file=sys.stderr)
        sys.exit(2)
