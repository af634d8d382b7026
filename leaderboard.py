"""The leaderboard of benchmark.py's result lines as Markdown, and what it shares with report.py's tables.

Lines are put together if they differ in the seed only; of lines with the same configuration and seed the newest counts.
"""

import re
import statistics
import string
from collections import Counter

import attacks
import defenses
from config import DataConfig, EraseConfig, TrainConfig, UserError, as_dict, default_of
from utils.files import write_atomically

VERSION = 1  # of the defenses' algorithms: results of another one do not count as finished
# options that do not decide a result, or are what runs are put together over
NOT_IN_KEY = ("script", "seed", "device", "threads", "log_root", "save", "checkpoint_root", "teacher_root",
              "eval_every", "beside", "reference")
SIX = ("BadNets", "Trojan", "Blend", "CL", "SIG", "Refool")  # the attacks of the NAD paper
MAIN = (*SIX, "WaNet", "Input-aware")  # those with a shipped network; the others get tables of their own
REFERENCE = "clean network"  # what main.py calls the network of --reference
WIDE = 8  # columns of a table; with more attacks than that, and than defenses, each attack has a line
METRICS = {"clean_acc": "ACC", "asr": "ASR", "ra": "RA"}
MARKS = "os^Dv<>P*Xph"  # of the rows in a figure
PAPER = {"nad": (2.6, 7.2)}  # its paper's means over the six: points of ACC lost, ASR
REPORTED = {  # BackdoorBench's leaderboard: PreActResNet-18, lossless images, 10% poisoned, 5% clean; ACC, ASR
    "sage": {"BadNets": (None, 10.11), "Trojan": (None, 19.42), "WaNet": (None, 6.79)},  # its paper's, with 1% clean
    "": {"BadNets": (91.32, 95.03), "Blend": (93.47, 99.92), "CL": (84.59, 99.92), "SIG": (84.48, 98.27),
         "WaNet": (91.25, 89.73), "Input-aware": (90.67, 98.26), "Trojan": (93.42, 100)},
    "finetune": {"BadNets": (89.96, 1.48), "Blend": (92.78, 96.11), "CL": (90.6, 11.53), "SIG": (90.8, 2.37),
                 "WaNet": (93.48, 17.1), "Input-aware": (93.12, 1.72), "Trojan": (92.42, 5.99)},
    "fine_pruning": {"BadNets": (91.31, 57.13), "Blend": (93.17, 99.26), "CL": (89.53, 0.46), "SIG": (89.1, 26.2),
                     "WaNet": (91.46, 1.09), "Input-aware": (91.74, 0.04), "Trojan": (92.47, 71.07)},
    "nad": {"BadNets": (89.87, 2.14), "Blend": (92.17, 97.69), "CL": (90.42, 10.5), "SIG": (90.02, 10.66),
            "WaNet": (93.17, 22.98), "Input-aware": (93.18, 1.68), "Trojan": (91.88, 3.73)},
    "neural_cleanse": {"BadNets": (89.05, 1.27), "Blend": (93.47, 99.92), "CL": (90.28, 6.87), "SIG": (84.48, 98.27),
                       "WaNet": (91.8, 7.53), "Input-aware": (92.61, 0.76), "Trojan": (91.76, 8.22)},
    "anp": {"BadNets": (84.17, 0.73), "Blend": (86.58, 2.19), "CL": (83.98, 4.12), "SIG": (77.97, 0.01),
            "WaNet": (85.73, 0.43), "Input-aware": (90.36, 1.64), "Trojan": (86.87, 0.2)},
    "ibau": {"BadNets": (89.16, 1.29), "Blend": (87.0, 50.53), "WaNet": (89.49, 5.21), "Input-aware": (89.17, 27.08),
             "Trojan": (90.37, 2.91)}}

BRACKETS = ("In brackets: BackdoorBench's leaderboard (PreActResNet-18, lossless images, 10% poisoned, 5% clean), "
            "another network and other implementations; for NAD's means its paper (WRN-16-1, 5% clean), for SAGE its "
            "paper (ResNet-18, 1% clean).")


def spread(values, digits=2):
    """Percentages as "85.1 ± 0.2"; the value alone if there is one, or all are the same; "-" for None."""
    if values[0] is None:
        return "-"
    if len(set(values)) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def is_cell(record):
    """Whether ``record``, a line of a results file of benchmark.py, is a cell of today's version and defenses."""
    needed = {"cell", "config", "data", "inputs", "machine", "metrics", "versions"}
    return (record.get("version") == VERSION and needed <= set(record) and isinstance(record["config"], dict)
            and {"script", "seed"} <= set(record["config"])
            and record["config"].get("defense", defenses.NAMES[0]) in defenses.NAMES)


def options_today(stored):
    """The options of a run, from its stored configuration, a dict: those that it is older than, and those of other
    triggers or defenses than it trains with, have today's defaults."""
    cls = TrainConfig if stored["script"] == "TrainConfig" else EraseConfig
    options = {**as_dict(cls()), **stored}
    return {**options, **attacks.without_unused(options)} if cls is TrainConfig else defenses.without_unused(options)


def score(record):
    """Of a line of search.py: points of accuracy lost + mean attack success rate."""
    return record["before"]["acc"] - record["metrics"]["acc"] + statistics.mean(record["metrics"]["asr"])


def one_thread(text):
    """``text`` about machines with "1 thread" for "1 threads"."""
    return text.replace(" 1 threads", " 1 thread")


def machines(records):
    """What ``records`` were measured on."""
    return one_thread("; ".join(sorted({f"{r['machine']}, torch {r['versions']['torch']}" for r in records})))


def changed(config):
    """The options of a run with ``config``, a dict, that are not default and decide its result: [(name, value)]."""
    config = options_today(config)
    left_out = {*NOT_IN_KEY, *DataConfig.__dataclass_fields__, "defense", "s_name", "s_model", "resume"}
    return [(name, config[name]) for name, f in EraseConfig.__dataclass_fields__.items()
            if name not in left_out and config[name] != default_of(f)]


def as_text(name, value):
    """The option as tables show it."""
    return f"`{name} {' '.join(value) if isinstance(value, list) else value}`"


def changes(config):
    """``changed`` as a list of texts."""
    return [as_text(*pair) for pair in changed(config)]


def plain_rows():
    """What the rows of the defenses as they stand, and of a network without a backdoor, are called, a set."""
    return {REFERENCE, *(defenses.title(name) for name in defenses.NAMES)}


def data_name(config):
    """The data set of a run with ``config``, as tables call it."""
    return {"CIFAR10": "CIFAR-10", "folder": config["data_root"]}.get(config["dataset"], config["dataset"])


def setting(record):
    """What the table that ``record`` belongs to is about: architecture, data and which attacks."""
    c = record["config"]
    others = "".join(f", {name} {c[name]}" for name, f in DataConfig.__dataclass_fields__.items()
                     if name not in ("dataset", "data_root") and c.get(name, f.default) != f.default)
    rest = "" if record["cell"]["attack"] in MAIN else ", other attacks"
    return f"{c['s_name']}, {data_name(c)} ({record['data']}{others}){rest}"


def by_setting(records):
    """{setting: its records of erased networks}."""
    blocks = {}
    for r in records:
        if r["config"]["script"] == "EraseConfig" and r["config"]["defense"] in defenses.NAMES:
            blocks.setdefault(setting(r), []).append(r)
    return blocks


def render(records):
    """Everything that ``benchmark.py`` measured, one block for each architecture and data set."""
    return "\n\n".join(block(*pair) for pair in by_setting(records).items()) or "nothing was measured yet"


def render_short(records):
    """What was measured on all six attacks of the paper, in short."""
    blocks = [short_block(*pair) for pair in by_setting(records).items() if {*SIX} <= {*columns_of(pair[1]).values()}]
    return "\n\n".join(blocks) or "nothing was measured on all six attacks yet"


def draw(plt, name, records):
    """A figure of one setting: what each defense leaves of the trigger and takes of the accuracy, a panel an attack.

    Of more rows than there are marks those of ``ranked``.
    """
    rows, columns, before, _, long = arranged(records)
    rows, _ = parted(rows, columns)
    rows = (len(rows) > len(MARKS) and ranked(rows)) or rows
    long = {row: options for row, options in long.items() if row in rows}
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    figure, panels = plt.subplots(down, across, squeeze=False, sharex=True, sharey=True, layout="constrained",
                                  figsize=(1.5 + 3 * across, 1 + 2.8 * down))
    colours = plt.get_cmap("tab20")
    for panel in panels.flat[len(columns):]:
        panel.set_axis_off()
    for panel, column in zip(panels.flat, columns, strict=False):
        for k, (row, found) in enumerate(rows.items()):
            runs = list(found.get(column, {}).values())
            if not runs or outcome(runs[0])["asr"] is None:
                continue
            x = [outcome(r)["asr"] for r in runs]
            y = [lost(before[column], r) for r in runs]
            bars = [statistics.stdev(v) if len(v) > 1 else 0 for v in (y, x)]
            panel.errorbar(statistics.mean(x), statistics.mean(y), *bars,
                           fmt=MARKS[k % len(MARKS)], label=row.replace("`", ""), capsize=2,
                           color="black" if row == REFERENCE else colours(k % 20))
        panel.set(title=column, xlim=(-3, 103))
        panel.axhline(0, color="grey", linewidth=0.5)
    figure.supxlabel("\n".join(["ASR, percent", *(f"{row}: {options.strip('`')}" for row, options in long.items())]),
                     fontsize=8)
    figure.supylabel("points of ACC lost", fontsize=8)
    figure.suptitle(f"{name}: the best is at the lower left", fontsize=10)
    found = {}
    for panel in panels.flat:
        marks, labels = panel.get_legend_handles_labels()
        found.update(zip(labels, marks, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside right upper", fontsize=8)
    return figure


def columns_of(records):
    """{hash of a network: the name of its column}: its attack; of several networks of one those after the one with
    most lines have numbers. In the order of ``MAIN``, then of ``attacks.PRESETS``."""
    names, found, order = {}, {}, [*MAIN, *attacks.PRESETS]
    for r in records:
        names.setdefault(r["cell"]["attack"], Counter())[r["inputs"]["s_model"]] += 1
    for attack, networks in sorted(names.items(), key=lambda p: order.index(p[0]) if p[0] in order else len(order)):
        for k, (network, _) in enumerate(networks.most_common()):
            found[network] = f"{attack} ({k + 1})" if k else attack
    return found


def arranged(records):
    """(rows {row: {column: {seed: record}}}, columns, {column: metrics before}, options that all rows share, {row: its
    options} of rows with too many options for their name; they have letters, the first are those with all of
    the paper's six attacks and most runs). What lines hold of a network without a backdoor is the first row."""
    rows, columns, before = {(REFERENCE, ()): {}}, columns_of(records), {}
    shared = [c for c in changes(records[0]["config"]) if all(c in changes(r["config"]) for r in records)]
    for r in sorted(records, key=lambda r: defenses.NAMES.index(r["config"]["defense"])):
        column = columns[r["inputs"]["s_model"]]
        own = {name: value for name, value in changed(r["config"]) if as_text(name, value) not in shared}
        first, plain = own.pop("first", ""), defenses.title(r["config"]["defense"])
        title = f"{defenses.title(first)}, then {plain}" if first else plain
        own = tuple(as_text(*pair) for pair in own.items())
        rows.setdefault((title, own), {}).setdefault(column, {})[r["config"]["seed"]] = r
        before[column] = r["metrics"].get("backdoored") or r["metrics"]["before"]
        if REFERENCE in r["metrics"]:
            rows[REFERENCE, ()][column] = {0: {**r, "metrics": {plain: r["metrics"][REFERENCE]}, "defense_seconds": {}}}
    rows = {row: found for row, found in rows.items() if found}
    long = [row for row in rows if len(row[1]) > 2]
    long.sort(key=lambda row: (not {*SIX} <= rows[row].keys(), -sum(map(len, rows[row].values()))))
    letters = {row: f"{row[0]} [{string.ascii_lowercase[k % 26]}{k // 26 or ''}]" for k, row in enumerate(long)}
    named = {letters.get(row) or ", ".join([row[0], *row[1]]): found for row, found in rows.items()}
    options = {letters[row]: f"`{' '.join('--' + c.strip('`') for c in row[1])}`" for row in long}
    return named, list(columns.values()), before, shared, options


def parted(rows, columns):
    """(rows of the main tables, recipes that were measured on a part of the paper's six attacks)."""
    plain = plain_rows()
    few = {row: found for row, found in rows.items()
           if {*SIX} <= {*columns} and row not in plain and not {*SIX} <= found.keys()}
    return {row: found for row, found in rows.items() if row not in few}, few


def has_reports(records, columns, shared):
    """Whether others report something for ``records``, which all have the options ``shared``."""
    known = any(column in found for found in REPORTED.values() for column in columns)
    return known and records[0]["config"]["dataset"] == "CIFAR10" and not shared


def bracket(defense, column, key, config=None):
    """What others report for the attack ``column`` and ``defense`` ('' for none), as " (97.25)"; '' if nobody does, or
    if ``config`` of a run has options that they had not."""
    theirs = [("ratio", 0.01)] if defense == "sage" else []
    acc, asr = REPORTED.get(defense, {}).get(column, (None, None))
    value = {"clean_acc": acc, "asr": asr, "ra": None}[key]
    return "" if value is None or (config and changed(config) != theirs) else f" ({value:g})"


def block(name, records):
    """Tables of one setting: means over the attacks (of several networks of one over the first; of many over those that
    all defenses as they stand were measured on), then ACC, ASR and RA of each; those of ``on_fewer``."""
    rows, columns, before, shared, long = arranged(records)
    rows, few = parted(rows, columns)
    tall = len(columns) > max(WIDE, len(rows))
    reported = not tall and has_reports(records, columns, shared)
    plain, first = plain_rows() - {REFERENCE}, {r["cell"]["attack"] for r in records}
    chosen = [c for c in columns if c in first]
    if tall:
        chosen = [c for c in chosen if all(c in found for row, found in rows.items() if row in plain)] or chosen
    out = [heading(name, rows, shared), "", *summary(rows, chosen, before, usual_machine(records), reported), ""]
    if tall:
        out += [*an_attack_a_line(rows, columns, before), ""]
    else:
        for k, title in METRICS.items():
            out += [*by_attack(rows, columns, before, k, title, reported), ""]
    out += options_of(rows, long)
    out += [BRACKETS, ""] if reported else []
    out += on_fewer(few, rows, columns, before, long, reported)
    return "\n".join([*out, measured_on(records)])


def on_fewer(few, rows, columns, before, long, reported):
    """A table for each set of seeds of ``few``, the recipes that were measured on fewer attacks: accuracy lost and ASR,
    under the defenses as they stand, of ``rows``, with the same seeds."""
    by_seeds, everything, out = {}, {**rows, **few}, []
    for row, found in few.items():
        by_seeds.setdefault(tuple(sorted({s for runs in found.values() for s in runs})), {})[row] = found
    for seeds, chosen in sorted(by_seeds.items()):
        here = [c for c in columns if any(c in found for found in chosen.values())]
        out += [f"| ACC lost / ASR, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} | {' | '.join(here)} |",
                "|---" * (len(here) + 1) + "|"]
        configs = {row: next(r["config"] for runs in found.values() for r in runs.values())
                   for row, found in chosen.items()}
        plain = {defenses.title(c["defense"]) for c in configs.values()}
        for row in [row for row in rows if row in plain] + sorted(chosen, key=lambda row: by_option(configs[row])):
            cells = []
            for a in here:
                runs = [r for s, r in everything[row].get(a, {}).items() if s in seeds]
                points = [lost(before[a], r) for r in runs]
                beside = bracket(configs[row]["defense"], a, "asr", configs[row]) if reported and row in chosen else ""
                cells.append(f"{spread(points, 1)} / {spread([outcome(r)['asr'] for r in runs], 1)}{beside}" if runs
                             else "")
            label = f"{row.rpartition(' [')[0]}, {long[row]}" if row in long else row
            out.append(f"| {label} | {' | '.join(cells)} |")
        out.append("")
    return out


def by_option(config):
    """A key that puts recipes in the order of their defense, the one before it and what they change."""
    return config["defense"], config.get("first", ""), changed(config)


def on_the_six(rows):
    """{row: {attack of ``SIX``: {seed: record}}} of those of ``rows`` that have all of these attacks."""
    return {row: {a: found[a] for a in SIX} for row, found in rows.items() if {*SIX} <= found.keys()}


def common_seeds(rows):
    """The seeds, sorted, that the defenses as they stand in ``on_the_six(rows)`` with three or more for each attack
    have in common; none if these are fewer than three."""
    plain = plain_rows()
    several = [set.intersection(*map(set, found.values())) for row, found in on_the_six(rows).items()
               if row in plain and min(map(len, found.values())) >= 3]
    common = sorted(set.intersection(*several)) if several else []
    return common if len(common) >= 3 else []


def mean_asr(found, seeds):
    """Over the attacks of ``found``, of ``on_the_six``, the mean of the means over ``seeds``, or over all if one of
    these is missing."""
    found = [[runs[s] for s in seeds] if seeds and {*seeds} <= runs.keys() else runs.values()
             for runs in found.values()]
    return statistics.mean(statistics.mean(outcome(r)["asr"] for r in runs) for runs in found)


def ranked(rows):
    """Those of ``rows`` with all six attacks of the paper and three seeds, or one if it is a defense as it stands:
    those with three seeds first, of them those with the lowest mean ASR over ``common_seeds``. A network without a
    backdoor comes before all.
    """
    plain, seeds = plain_rows(), common_seeds(rows)
    places = {row: (row != REFERENCE, min(map(len, found.values())) < 3, mean_asr(found, seeds))
              for row, found in on_the_six(rows).items()}
    return {row: rows[row] for row, (_, few, _) in sorted(places.items(), key=lambda pair: pair[1])
            if row in plain or not few}


def about_order(rows):
    """A paragraph on the order of ``rows``, of ``ranked``, if some of them have more seeds than the others."""
    seeds = common_seeds(rows)
    more = {row: mean_asr(found, seeds) for row, found in on_the_six(rows).items()
            if seeds and {*seeds} < set.intersection(*map(set, found.values()))}
    values = "; ".join(f"{row} {value:.2f}" for row, value in more.items())
    return [f"Rows are in the order of the mean ASR over the six with the seeds {', '.join(map(str, seeds))}. With "
            f"these, rows of more seeds have: {values}.", ""] if more else []


def short_block(name, records):
    """Means over the paper's six attacks and the ASR of each attack, for the rows of ``ranked``."""
    rows, columns, before, shared, long = arranged(records)
    rows, reported = ranked(rows), has_reports(records, columns, shared)
    return "\n".join([heading(name, rows, shared), "", *options_of(rows, long),
                      *summary(rows, list(SIX), before, usual_machine(records), reported), "", *about_order(rows),
                      *by_attack(rows, columns, before, "asr", "ASR", reported), "",
                      *([BRACKETS, ""] if reported else []), measured_on(records)])


def heading(name, rows, shared):
    """The first line of the tables of one setting."""
    count = seeds_of(found for row in rows.values() for found in row.values())
    return f"**{', '.join([name, *shared])}; seeds in a cell: {count}.**"


def by_attack(rows, columns, before, key, title, reported):
    """The table of one metric, a column an attack; in brackets what others ``reported``, if that is true."""
    def beside(*args):
        return bracket(*args) if reported else ""

    out = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|",
           f"| backdoored | {' | '.join(spread([before[a][key]], 1) + beside('', a, key) for a in columns)} |"]
    for row, found in rows.items():
        if found.keys().isdisjoint(columns):
            continue
        cells = []
        for a in columns:
            runs = list(found.get(a, {}).values())
            cells.append((spread([outcome(r)[key] for r in runs], 1) if runs else "")
                         + (beside(runs[0]["config"]["defense"], a, key, runs[0]["config"])
                            if runs and row != REFERENCE else ""))
        out.append(f"| {row} | {' | '.join(cells)} |")
    return out


def an_attack_a_line(rows, columns, before):
    """The table of all ``METRICS``, a line an attack."""
    def cell(values):
        return " / ".join(spread([v[key] for v in values], 1) for key in METRICS) if values else ""

    out = [f"| {' / '.join(METRICS.values())} | backdoored | {' | '.join(rows)} |", "|---" * (len(rows) + 2) + "|"]
    for a in columns:
        cells = [cell([before[a]]), *(cell([*map(outcome, found.get(a, {}).values())]) for found in rows.values())]
        out.append(f"| {a} | {' | '.join(cells)} |")
    return out


def options_of(rows, long):
    """What the letters of ``rows`` stand for, a paragraph each."""
    return [text for row, options in long.items() if row in rows for text in (f"{row}: {options}", "")]


def usual_machine(records):
    """That of most of ``records``."""
    return statistics.mode(r["machine"] for r in records)


def measured_on(records):
    """The last line of the tables of one setting."""
    several = len({r["machine"] for r in records}) > 1
    return f"Measured on: {machines(records)}." + (
        f" Seconds: on {one_thread(usual_machine(records))} only." if several else "")


def seeds_of(cells):
    """The number of seeds in each of ``cells``, as text: one number or a range."""
    counts = {len(found) for found in cells}
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def outcome(record):
    """The metrics of the defense in ``record``."""
    return record["metrics"][defenses.title(record["config"]["defense"])]


def lost(before, record):
    """Points of accuracy that the defense in ``record`` cost, against the metrics ``before`` it."""
    return before["clean_acc"] - outcome(record)["clean_acc"]


def summary(rows, columns, before, machine, reported):
    """Means over the attacks, those of the paper if all six are there and all of them, for rows that have the same
    seeds for each attack; deviations are over the seeds. Seconds are those on ``machine``. In brackets what papers
    report, if ``reported``."""
    sets = [("the paper's six", list(SIX))] if {*SIX} <= {*columns} else []
    if {*SIX} != {*columns}:
        sets.append((f"{len(columns)} attack{'s' * (len(columns) > 1)}", columns))
    head = " | ".join(f"ACC lost, {name} | ASR, {name}" for name, _ in sets)
    out = [f"| | {head} | seeds | seconds |", "|---" * (2 * len(sets) + 3) + "|"]
    for row, found in rows.items():
        cells = []
        for _, chosen in sets:
            if any(a not in found for a in chosen):
                cells += ["", ""]
                continue
            seeds = set.intersection(*(set(found[a]) for a in chosen))
            if all(set(found[a]) == seeds for a in chosen):
                cells += [spread([statistics.mean(measure(a, found[a][s]) for a in chosen) for s in sorted(seeds)])
                          for measure in (lambda a, r: lost(before[a], r), lambda _, r: outcome(r)["asr"])]
                config = found[chosen[0]][min(seeds)]["config"]
                if (reported and row != REFERENCE and {*chosen} == {*SIX} and config["defense"] in PAPER
                        and not changed(config)):
                    theirs = PAPER[config["defense"]]
                    cells[-2:] = [f"{own} ({value:g})" for own, value in zip(cells[-2:], theirs, strict=True)]
            else:
                cells += ["", ""]
        seconds = [s for runs in found.values() for r in runs.values()
                   if not r.get("resumed") and r["machine"] == machine
                   for s in r["defense_seconds"].values()]
        typical = f"{statistics.median(seconds):.0f}" if seconds else ""
        here = [runs for column, runs in found.items() if column in columns]
        seeds = seeds_of(here or found.values())
        out.append(f"| {row} | {' | '.join([*cells, seeds, typical])} |")
    return out


def rewritten(readme, texts):
    """``readme`` with each text between its section's markers. Raises ``UserError`` if they are not there."""
    for name, text in texts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        if not re.search(pattern, readme, re.S):
            raise UserError(f"README.md has no <!-- {name} --> markers")
        readme = re.sub(pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", readme, flags=re.S)
    return readme


def write_into(path, texts):
    """Put ``texts`` ({section: text}) into the README at ``path``."""
    new = rewritten(path.read_text(encoding="utf-8"), texts)
    write_atomically(path, lambda f: f.write(new.encode()))
