"""Draws the figures in docs/ from the CSVs in docs/, and gathers those CSVs from run directories.

    python docs/plot.py                                            # make plot
    python docs/plot.py --gather docs/checkers.csv runs/a runs/b   # env, algo, seed and metrics.csv of each run
"""

import csv
import json
import sys
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
    with open(target, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["env", "algo", "seed", *KEEP])
        for run in runs:
            config = json.loads((Path(run) / "config.json").read_text())["config"]
            with open(Path(run) / "metrics.csv") as rows:
                table.writerows([config["env"], config["algo"], config["seed"],
                                 *(f"{float(row[name]):.6g}" if row[name] else "" for name in KEEP)]
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


def checkers() -> None:
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    levels = {86.26: "86.26 best there is", 83.54: "83.54 best for gamma 0.99", 59.64: "59.64 agent 1 never helps"}
    for level, text in levels.items():
        axes.axhline(level, color="black", linewidth=0.6, linestyle=":")
        axes.text(1, level + (1 if level != 83.54 else -4.2), text, fontsize=8)
    for (_, algo, seed), run in read("checkers.csv").items():
        axes.plot(run["seconds"], run["test_return"], color=COLORS[algo], linewidth=1, alpha=0.6,
                  label=algo if seed == "1" else None)
    axes.set(xlabel="seconds, two CPU cores", ylabel="greedy return", ylim=(-5, 92),
             title="Checkers, one line per seed")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(HERE / "checkers.png", dpi=110)


def skirmish() -> None:
    runs = read("skirmish.csv")
    with open(HERE / "skirmish_heuristic.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["policy"] == "heuristic"]
    heuristic = {row["map"]: float(row["won"]) / 100 for row in rows}
    maps = list(dict.fromkeys(env for env, _, _ in runs))
    figure, panels = pyplot.subplots(1, len(maps), figsize=(4 * len(maps), 3.2), layout="constrained", squeeze=False)
    for axes, env in zip(panels[0], maps):
        axes.axhline(heuristic[env.split(":")[1]], color="black", linestyle="--", linewidth=1, label="heuristic")
        for algo in dict.fromkeys(algo for e, algo, _ in runs if e == env):
            seeds = [run for (e, a, _), run in runs.items() if (e, a) == (env, algo)]
            steps = np.linspace(0, min(run["env_steps"][-1] for run in seeds), 60)
            wins = np.array([np.interp(steps, run["env_steps"], run["test_win_rate"]) for run in seeds])
            low, median, high = np.quantile(wins, (0.25, 0.5, 0.75), axis=0)
            axes.plot(steps / 1000, median, color=COLORS[algo], label=f"{algo} ({len(seeds)} seeds)")
            axes.fill_between(steps / 1000, low, high, color=COLORS[algo], alpha=0.2, linewidth=0)
        axes.set(xlabel="thousand environment steps", ylabel="greedy win rate", ylim=(-0.02, 1.02), title=env)
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(HERE / "skirmish.png", dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--gather"]:
        gather(sys.argv[2], sys.argv[3:])
    else:
        for draw in (two_step, checkers, skirmish):
            if (HERE / f"{draw.__name__}.csv").exists():
                draw()
