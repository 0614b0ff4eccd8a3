"""Draws the figures in docs/ from the CSVs in docs/, and prints the tables of README.md and docs/.

    python -m extras.plot
    python -m extras.plot --gather docs/checkers.csv runs/a runs/b   # adds these runs to a CSV

Statistics as in Gorsane et al. 2022 (arXiv 2209.10485): the interquartile mean over independent
seeds, with its 95 % bootstrap interval; and the absolute metric: what a run's best policy, by its
evaluations, comes to when it is evaluated again, over more episodes.

A CSV has a row for each evaluation of each run. KEYS say which run it is; `flags` is what its
settings change of the preset; `machine` is the processor on which the run was gathered, because
seconds compare within one machine only. Nothing is drawn of columns that this file does not know.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import platform
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

import envs
import qmix

DOCS = Path(__file__).resolve().parent.parent / "docs"
KEYS = ["env", "algo", "seed", "flags"]
NUMBERS = (
    "env_steps episodes updates seconds train_return test_return test_win_rate loss absolute"
).split()
ABSOLUTE_EPISODES = 320  # of the absolute metric: ten times SMAC's evaluation
CSVS = ("checkers.csv", "skirmish.csv", "others.csv")
WITHOUT_EFFECT = set(  # settings that are no part of `flags`
    "env algo seed out device threads env_timeout checkpoint_seconds".split()
)

LINES = {  # the same in every figure; the colours of Okabe and Ito, safe for the colour-blind
    "iql": ("#000000", "-"),
    "vdn": ("#0072B2", "-"),
    "qmix": ("#D55E00", "-"),
    "vdn-s": ("#56B4E9", "--"),
    "qmix-lin": ("#E69F00", ":"),
    "qmix-ns": ("#CC79A7", "-."),
    "coma": ("#009E73", "-"),
}
WHITE = {"facecolor": "white", "linewidth": 0, "pad": 1}  # behind a text
BAND = "interquartile mean over seeds (line), its 95 % bootstrap interval (band)"
MAPS = ("3m", "5m", "8m", "2s3z", "3s5z", "1c3s5z")  # the paper's figure 3 ...
COMPARED = ("coma", "iql", "vdn", "qmix")
ABLATION_MAPS = ("3m", "2s3z", "3s5z")  # ... and its figure 4
ABLATIONS = ("qmix", "vdn-s", "qmix-lin", "qmix-ns")
PAPER = {  # where the paper's curves end on MAPS: wins in %, read off the authors' plots (+-1)
    "iql": (58, 76, 65, 29, 4, 1),
    "vdn": (64, 84, 90, 76, 23, 27),
    "qmix": (92, 97, 92, 95, 76, 69),
    "vdn-s": (95, 94, 95, 87, 54, 60),
    "qmix-lin": (89, 93, 95, 81, 54, 57),
    "qmix-ns": (82, 82, 80, 70, 30, 32),
}
PUBLISHED = {  # "best" below, of 2 million steps (RWARE: 4): arXiv 2006.07869v4, table 3
    ("lbforaging:Foraging-8x8-2p-2f-coop-v3", "iql"): "1.00 ± 0.00",
    ("lbforaging:Foraging-8x8-2p-2f-coop-v3", "vdn"): "1.00 ± 0.00",
    ("lbforaging:Foraging-8x8-2p-2f-coop-v3", "qmix"): "0.96 ± 0.07",
    ("lbforaging:Foraging-10x10-3p-3f-v3", "iql"): "0.93 ± 0.02",
    ("lbforaging:Foraging-10x10-3p-3f-v3", "vdn"): "0.84 ± 0.08",
    ("lbforaging:Foraging-10x10-3p-3f-v3", "qmix"): "0.84 ± 0.08",
    ("mpe2.simple_speaker_listener_v4", "iql"): "-18.36 ± 4.67",
    ("mpe2.simple_speaker_listener_v4", "vdn"): "-15.95 ± 2.48",
    ("mpe2.simple_speaker_listener_v4", "qmix"): "-11.56 ± 0.53",
    ("rware:rware-tiny-2ag-v2", "qmix"): "0.14 ± 0.19",
}


# ---------------------------------------------------------------------------- gathering runs
def flags(config: dict) -> str:
    """What a run's config.json changes of the preset, as flags. What has no effect is left out."""
    if config["algo"] == "coma":
        from extras import coma

        preset = coma.Config(config["env"])
        preset.buffer_size = config["buffer_size"]  # it follows from num_envs
    else:
        preset = qmix.configure(config["env"])
    # As in config.json, where tuples are lists
    usual = json.loads(json.dumps(dataclasses.asdict(preset)))
    found = []
    for name in usual.keys() - WITHOUT_EFFECT:
        value = config[name]
        flag = name.replace("_", "-")
        if value == usual[name]:
            continue
        if value is True:
            found.append(f"--{flag}")
        elif value is False:
            found.append(f"--no-{flag}")
        elif isinstance(value, list):
            found.append(f"--{flag} {' '.join(value)}")
        else:
            found.append(f"--{flag} {value}")
    return " ".join(sorted(found))


def absolute_metric(run: Path, config: dict) -> float:
    """The win rate of best.pt, or its mean return where there is no battle."""
    saved = torch.load(run / "best.pt", weights_only=True)
    # COMA's settings are others. All that a Policy needs of them is this one:
    saved["config"] = qmix.configure(config["env"], hidden_dim=config["hidden_dim"])
    policy = qmix.Policy(saved)

    def choose(step, memory):
        return policy.act(step.obs, step.avail, memory)

    n_envs = config["num_envs"]
    timeout = config["env_timeout"]
    env = envs.make(config["env"], n_envs, "cpu", config["seed"], config["env_args"], timeout)
    with contextlib.closing(env):
        found = qmix.greedy_episodes(env, choose, ABSOLUTE_EPISODES)
    if found["test_win_rate"] is None:
        return found["test_return"]
    return found["test_win_rate"]


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def read_run(run: Path) -> list[dict]:
    """The rows of a run's metrics.csv, as a CSV in docs/ has them."""
    config = json.loads((run / "config.json").read_text())
    key = {"env": config["env"], "algo": config["algo"], "seed": str(config["seed"])}
    key["flags"] = flags(config)
    key["machine"] = processor()
    rows = []
    with open(run / "metrics.csv") as file:
        for measured in csv.DictReader(file):
            row = dict(key)
            for name in NUMBERS:
                cell = measured.get(name)
                if cell:
                    row[name] = f"{float(cell):.6g}"
            rows.append(row)
    rows[-1]["absolute"] = f"{absolute_metric(run, config):.6g}"
    return rows


def key_of(row: dict) -> tuple:
    return row["env"], row["algo"], int(row["seed"]), row["flags"]


def gather(target: Path, runs: list[Path]) -> None:
    """Add runs to a CSV. What it already holds stays. Raises UsageError for a run it holds."""
    rows = []
    columns = []
    if target.exists():
        with open(target, newline="") as file:
            table = csv.DictReader(file)
            rows = list(table)
            columns = list(table.fieldnames)
    columns += [name for name in [*KEYS, "machine", *NUMBERS] if name not in columns]
    held = {key_of(row) for row in rows}
    for run in runs:
        added = read_run(run)
        key = key_of(added[0])
        if key in held:
            raise envs.UsageError(f"{run} is a second run of {' '.join(map(str, key))}")
        held.add(key)
        rows += added
    rows.sort(key=key_of)
    with open(target, "w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


# -------------------------------------------------------------------------------- statistics
def read(name: str) -> dict[tuple, dict]:
    """A CSV in docs/ -> {(env, algo, flags): {seed: {column: values}}}; NaN for an empty cell."""
    groups = {}
    with open(DOCS / name, newline="") as file:
        for row in csv.DictReader(file):
            key = (row.get("env", ""), row["algo"], row.get("flags", ""))
            seeds = groups.setdefault(key, {})
            run = seeds.setdefault(int(row["seed"]), {})
            for column in NUMBERS:
                if column in row:
                    run.setdefault(column, []).append(float(row[column] or "nan"))
    for seeds in groups.values():
        for run in seeds.values():
            for column in run:
                run[column] = np.array(run[column])
    return groups


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """The interquartile mean: without the lowest and the highest quarter."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bootstrap interval of the interquartile mean over the first axis, the seeds."""
    if len(values) < 2:
        return values[0], values[0]
    rng = np.random.default_rng(1)
    found = stats.bootstrap((values,), iqm, n_resamples=5000, method="percentile", rng=rng)
    return found.confidence_interval


def summary(values: list[float], digits: int) -> str:
    """As in 97 [95, 98]. Each value if there are fewer than five: an interval would say little."""
    if len(values) < 5:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    low, high = interval(np.array(values))
    return f"{iqm(np.array(values)):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def span(values: list[float], digits: int) -> str:
    """As in 95 to 98, or 97 if all are alike."""
    low = f"{min(values):,.{digits}f}"
    high = f"{max(values):,.{digits}f}"
    return low if low == high else f"{low} to {high}"


def best(curves: list[np.ndarray]) -> float:
    """The mean over the runs at the evaluation at which it is highest."""
    shortest = min(len(curve) for curve in curves)
    return np.mean([curve[:shortest] for curve in curves], axis=0).max()


def describe(env: str, seeds: dict[int, dict]) -> dict[str, str]:
    """What the tables tell of runs that differ in their seeds alone: {column: text}.

    Wins in %, or returns where there is no battle. `end` is the mean of a run's last three
    evaluations. On Checkers, where all episodes of an evaluation are the same, it is the last one.
    """
    runs = [seeds[seed] for seed in sorted(seeds)]
    measure = "test_win_rate"
    scale = 100
    digits = 0
    if np.isnan(runs[0][measure][-1]):
        measure = "test_return"
        scale = 1
        digits = 2
    last = 1 if env.startswith("checkers") else 3
    ends = [scale * run[measure][-last:].mean() for run in runs]
    absolute = [scale * run["absolute"][-1] for run in runs]
    seconds = [run["seconds"][-1] for run in runs]
    seconds = [value for value in seconds if not np.isnan(value)]  # a run that was suspended
    return {
        "seeds": span(list(seeds), 0),
        "number": str(len(seeds)),
        "end": summary(ends, digits),
        "from ... to": span(ends, digits),
        "absolute metric": summary(absolute, digits),
        "best": f"{scale * best([run[measure] for run in runs]):.{digits}f}",
        "seconds": span(seconds, 0),
    }


def table(name: str) -> dict[tuple, dict[str, str]]:
    """A CSV in docs/ -> {(env, algo, flags): {column: text}}."""
    groups = read(name)
    return {key: describe(key[0], seeds) for key, seeds in groups.items()}


# ----------------------------------------------------------------------------------- figures
def select(groups: dict, env: str, changed: str, algos=tuple(LINES)) -> dict[str, list]:
    """{algo: its runs} of one environment, with these flags."""
    found = {}
    for algo in algos:
        seeds = groups.get((env, algo, changed))
        if seeds:
            found[algo] = list(seeds.values())
    return found


def level(axes, height: float) -> None:
    axes.axhline(height, color="black", linewidth=0.6, linestyle=":")


def bands(axes, runs: dict[str, list], column: str) -> None:
    """BAND for each algorithm. runs: {algo: its runs}."""
    for algo, (color, style) in LINES.items():
        if algo not in runs:
            continue
        shortest = min(run["env_steps"][-1] for run in runs[algo])
        steps = np.linspace(0, shortest, 60)
        curves = [np.interp(steps, run["env_steps"], run[column]) for run in runs[algo]]
        curves = np.array(curves)  # (seeds, 60)
        low, high = interval(curves)
        thousands = steps / 1000
        label = f"{algo} (seeds: {len(curves)})"
        look = {"color": color, "linestyle": style, "linewidth": 1.8}
        axes.plot(thousands, iqm(curves), label=label, **look)
        axes.fill_between(thousands, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="thousand environment steps")
    axes.legend(loc="best", fontsize=8)


def two_step() -> None:
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for loss in (1.945, 0.5625, 0):
        level(axes, loss)
        axes.text(10_100, loss, f"{loss:g}", va="center", fontsize=8, bbox=WHITE)
    groups = read("two_step.csv")
    for algo, (color, style) in LINES.items():
        for run in groups.get(("", algo, ""), {}).values():
            axes.plot(run["env_steps"], run["loss"], color=color, linestyle=style, label=algo)
    axes.set(xlabel="environment steps", xlim=(500, 11_200))
    axes.set(ylabel="mean squared TD error", ylim=(-0.1, 3.2))
    axes.set(title="Two-step game, seed 1: loss (thin dotted lines: the lowest possible)")
    axes.legend(ncol=3, fontsize=8)
    figure.savefig(DOCS / "two_step.png", dpi=110)


def checkers() -> None:
    runs = select(read("checkers.csv"), "checkers", "")
    figure = Figure(figsize=(11.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        for height in (86.26, 83.54, 59.64):
            level(axes, height)
    texts = {87.26: "86.26 best there is", 79.34: "83.54 best for gamma 0.99"}
    texts[60.64] = "59.64 one agent never helps"
    for height, text in texts.items():
        left.text(955, height, text, fontsize=8, ha="right", bbox=WHITE)
    color, _ = LINES["qmix"]
    for run in runs["qmix"]:
        thousands = run["env_steps"] / 1000
        left.plot(thousands, run["test_return"], color=color, linewidth=1, alpha=0.6)
    left.set(xlabel="thousand environment steps", ylabel="greedy return", ylim=(-5, 92))
    left.set_title(f"Checkers, QMIX: a line for each of {len(runs['qmix'])} seeds", fontsize=10)
    bands(right, runs, "test_return")
    right.set_title(BAND, fontsize=10)
    figure.savefig(DOCS / "checkers.png", dpi=110)


def heuristic() -> dict[str, float]:
    """{map: wins of the heuristic in %}, as extras/heuristic.py has written them."""
    with open(DOCS / "skirmish_heuristic.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["policy"] == "heuristic"]
    return {row["map"]: float(row["won"]) for row in rows}


def panels(title: str, measure: str, number: int):
    """A figure with a title and panels in rows of three -> the figure, its axes in a list."""
    rows = -(-number // 3)
    figure = Figure(figsize=(13.5, 0.4 + 3.3 * rows), layout="constrained")
    figure.suptitle(f"{title}, {measure}: {BAND}")
    grid = figure.subplots(rows, 3, squeeze=False)
    for axes in grid.flat[number:]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set(ylabel=measure)
    return figure, grid.flat[:number]


def skirmish(name: str, title: str, algos: tuple[str, ...], maps: tuple[str, ...]) -> None:
    """The paper's figures 3 and 4."""
    groups = read("skirmish.csv")
    figure, grid = panels(title, "greedy win rate", len(maps))
    for axes, map_name in zip(grid, maps):
        env = f"skirmish:{map_name}"
        wins = heuristic()[map_name] / 100
        axes.axhline(wins, color="grey", linestyle="--", linewidth=1, label="heuristic")
        bands(axes, select(groups, env, "", algos), "test_win_rate")
        axes.set(title=env, ylim=(-0.02, 1.02))
    figure.savefig(DOCS / f"{name}.png", dpi=110)


def task(env: str, changed: str) -> str:
    """The environment that an adapter plays, or else the name and the flags."""
    played = re.search(r"\benv=(\S+)", changed)
    if played:
        return played[1]
    return f"{env} {changed}".strip()


def length(changed: str) -> int:
    """The environment steps of a run without a preset."""
    given = re.search(r"--total-steps (\d+)", changed)
    return int(given[1]) if given else qmix.Config.total_steps


def by_task(key: tuple[str, str, str]):
    env, algo, changed = key
    return task(env, changed), list(LINES).index(algo)


def others() -> None:
    """A panel for each environment of docs/others.csv."""
    groups = read("others.csv")
    shown = sorted({(env, changed) for env, _, changed in groups})
    figure, grid = panels("Environments of others", "greedy return", len(shown))
    for axes, (env, changed) in zip(grid, shown):
        bands(axes, select(groups, env, changed), "test_return")
        axes.set_title(textwrap.fill(task(env, changed), 70), fontsize=9)
    figure.savefig(DOCS / "others.png", dpi=110)


# ------------------------------------------------------------------------------------ tables
def row(*cells) -> str:
    return f"| {' | '.join(cells)} |"


COLUMNS = ("seeds", "end", "from ... to", "absolute metric", "seconds")


def runs() -> list[str]:
    """The rows of docs/runs.md: every group of runs in the CSVs."""
    lines = []
    for name in CSVS:
        for (env, algo, changed), line in table(name).items():
            cells = [line[column] for column in COLUMNS]
            lines.append(row(env, algo, changed, *cells))
    return lines


def results() -> list[str]:
    """The rows of docs/results.md's two tables of skirmish, with the paper's win rates."""
    wins = table("skirmish.csv")
    lines = []
    for algos, maps in ((COMPARED[1:], MAPS), (ABLATIONS, ABLATION_MAPS)):
        for map_name in maps:
            cells = []
            for algo in algos:
                paper = PAPER[algo][MAPS.index(map_name)]
                cells.append(f"{wins[f'skirmish:{map_name}', algo, '']['end']} ({paper})")
            lines.append(row(map_name, *cells))
    return lines


def elsewhere() -> list[str]:
    """The rows of docs/others.md's table."""
    found = table("others.csv")
    lines = []
    for env, algo, changed in sorted(found, key=by_task):
        line = found[env, algo, changed]
        name = task(env, changed)
        cells = [line["seeds"], f"{length(changed):,}", line["end"], line["best"]]
        published = PUBLISHED.get((name, algo), "")
        lines.append(row(name, algo, *cells, published, line["seconds"]))
    return lines


def readme() -> list[str]:
    """The rows of README.md's tables, by the preset alone."""
    lines = []
    for (_, algo, changed), line in table("checkers.csv").items():
        if not changed:
            lines.append(row(algo, line["end"], line["from ... to"], line["seeds"]))
    wins = table("skirmish.csv")
    for map_name in MAPS:
        cells = []
        numbers = []
        for algo in COMPARED:
            line = wins.get((f"skirmish:{map_name}", algo, ""))
            if line is None:
                cells.append("not run")
            else:
                cells.append(line["absolute metric"])
                numbers.append(line["number"])
        lines.append(row(map_name, *cells, f"{heuristic()[map_name]:.0f}", ", ".join(numbers)))
    return lines


def print_tables() -> None:
    print("README.md:", *readme(), "", "docs/results.md:", *results(), sep="\n")
    print("", "docs/others.md:", *elsewhere(), sep="\n")
    print("", f"docs/runs.md: env, algo, flags, {', '.join(COLUMNS)}", *runs(), sep="\n")


def draw_figures() -> None:
    two_step()
    checkers()
    skirmish("skirmish", "The algorithms", COMPARED, MAPS)
    skirmish("ablations", "QMIX and its ablations", ABLATIONS, ABLATION_MAPS)
    others()


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m extras.plot")
    text = "add runs to a CSV; without it: draw the figures and print the tables"
    parser.add_argument("--gather", nargs="+", type=Path, metavar=("CSV", "RUN"), help=text)
    given = parser.parse_args(arguments).gather
    if given:
        target, *runs = given
        if not runs:
            parser.error("--gather takes a CSV and the runs to add")
        try:
            gather(target, runs)
            return 0
        except (envs.UsageError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    draw_figures()
    print_tables()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
