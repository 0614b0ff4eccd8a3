"""Draws the figures in docs/ from the CSVs in docs/, and gathers those CSVs from run directories.

    python docs/plot.py                                            # make plot
    python docs/plot.py --gather docs/checkers.csv runs/a runs/b   # env, algo, seed and metrics.csv of each run
"""

import csv
import json
import sys
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

HERE = Path(__file__).resolve().parent
COLORS = {"iql": "#7f7f7f", "vdn": "#1f77b4", "qmix": "#d62728", "vdn-s": "#17becf", "qmix-lin": "#ff7f0e",
          "qmix-ns": "#9467bd"}  # the same in every figure
KEEP = ("env_steps", "episodes", "updates", "seconds", "epsilon", "train_return", "test_return", "test_win_rate",
        "loss")


def gather(target: str, runs: list[str]) -> None:
    gathered = set()
    with open(target, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["env", "algo", "seed", *KEEP])
        for run in runs:
            config = json.loads((Path(run) / "config.json").read_text())["config"]
            key = config["env"], config["algo"], config["seed"]
            if key in gathered:
                sys.exit(f"error: {run} is a second run of {' '.join(map(str, key))}")
            gathered.add(key)
            with open(Path(run) / "metrics.csv") as rows:
                table.writerows([*key, *(f"{float(row[name]):.6g}" if row[name] else "" for name in KEEP)]
                                for row in csv.DictReader(rows))


def read(name: str) -> dict[tuple, dict[str, np.ndarray]]:
    """{(env, algo, seed): {column: values}}; NaN where a cell is empty."""
    runs: dict = {}
    with open(HERE / name) as file:
        for row in csv.DictReader(file):
            key = tuple(row.pop(column, "two-step") for column in ("env", "algo", "seed"))
            for column, cell in row.items():
                runs.setdefault(key, {}).setdefault(column, []).append(float(cell or "nan"))
    return {key: {column: np.array(values) for column, values in run.items()} for key, run in runs.items()}


def two_step() -> None:
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for level, text in ((1.945, "1.945"), (0.5625, "0.5625"), (0, "0")):
        axes.axhline(level, color="black", linewidth=0.6, linestyle=":")
        axes.text(10_100, level, text, va="center", fontsize=8)
    for (_, algo, _), run in read("two_step.csv").items():
        axes.plot(run["env_steps"], run["loss"], color=COLORS[algo], label=algo)
    axes.set(xlabel="environment steps", ylabel="mean squared TD error", ylim=(-0.1, 3.2), xlim=(500, 11_200),
             title="Two-step game: what each algorithm cannot represent (dotted: exact)")
    axes.legend(ncol=3, fontsize=8)
    figure.savefig(HERE / "two_step.png", dpi=110)


def bands(axes, runs: dict, column: str) -> None:
    """Median and quartiles over the seeds of each algorithm, against environment steps."""
    for algo in sorted({algo for _, algo, _ in runs}, key=list(COLORS).index):
        seeds = [run for (_, a, _), run in runs.items() if a == algo]
        steps = np.linspace(0, min(run["env_steps"][-1] for run in seeds), 60)
        curves = np.array([np.interp(steps, run["env_steps"], run[column]) for run in seeds])
        low, median, high = np.quantile(curves, (0.25, 0.5, 0.75), axis=0)
        axes.plot(steps / 1000, median, color=COLORS[algo], label=f"{algo} ({len(seeds)} seeds)")
        axes.fill_between(steps / 1000, low, high, color=COLORS[algo], alpha=0.2, linewidth=0)
    axes.set(xlabel="thousand environment steps")


def checkers() -> None:
    runs = read("checkers.csv")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    levels = {86.26: "86.26 best there is", 83.54: "83.54 best for gamma 0.99", 59.64: "59.64 agent 1 never helps"}
    for axes, (level, text) in product((left, right), levels.items()):
        axes.axhline(level, color="black", linewidth=0.6, linestyle=":")
        if axes is left:
            axes.text(0.99, level + (1 if level != 83.54 else -4.2), text, fontsize=8, ha="right",
                      transform=axes.get_yaxis_transform())
    for (_, algo, _), run in runs.items():
        if algo == "qmix":
            left.plot(run["seconds"], run["test_return"], color=COLORS[algo], linewidth=1, alpha=0.6)
    left.set(xlabel="seconds, one CPU core", ylabel="greedy return", ylim=(-5, 92), title="Checkers: QMIX, each seed")
    bands(right, runs, "test_return")
    right.set(title="Checkers: median and quartiles")
    right.legend(loc="lower right", fontsize=8, ncol=2)
    figure.savefig(HERE / "checkers.png", dpi=110)


def skirmish() -> None:
    """Figure 3 with the preset and with an update per episode, and figure 4."""
    with open(HERE / "skirmish_heuristic.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["policy"] == "heuristic"]
    heuristic = {row["map"]: float(row["won"]) / 100 for row in rows}
    for source, name, algos in (("skirmish", "skirmish", ("iql", "vdn", "qmix")),
                                ("skirmish_ratio", "skirmish_ratio", ("iql", "vdn", "qmix")),
                                ("skirmish", "ablations", ("qmix", "vdn-s", "qmix-lin", "qmix-ns"))):
        runs = {key: run for key, run in read(f"{source}.csv").items() if key[1] in algos}
        maps = [env for env in ("3m", "2s3z", "3s5z", "1c3s5z")
                if {algo for e, algo, _ in runs if e == f"skirmish:{env}"} == set(algos)]
        lines, across = (len(maps) + 1) // 2, min(len(maps), 2)
        figure, panels = pyplot.subplots(lines, across, figsize=(5 * across, 3 * lines), layout="constrained",
                                         squeeze=False, sharey=True)
        for axes, env in zip(panels.flat, maps):
            axes.axhline(heuristic[env], color="black", linestyle="--", linewidth=1, label="heuristic")
            bands(axes, {key: run for key, run in runs.items() if key[0] == f"skirmish:{env}"}, "test_win_rate")
            axes.set(ylim=(-0.02, 1.02), title=f"skirmish:{env}")
            axes.legend(fontsize=8, loc="best")
        for axes in panels[:, 0]:
            axes.set(ylabel="greedy win rate")
        figure.savefig(HERE / f"{name}.png", dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--gather"]:
        gather(sys.argv[2], sys.argv[3:])
    else:
        for draw in (two_step, checkers, skirmish):
            if (HERE / f"{draw.__name__}.csv").exists():
                draw()
