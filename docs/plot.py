"""Draws the figures in docs/ from the CSVs in docs/, prints the tables of README.md from them, and gathers those CSVs
from run directories.

    python docs/plot.py                                            # make plot
    python docs/plot.py --gather docs/checkers.csv runs/a runs/b   # metrics.csv of each run, and how it was made
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
sys.path.insert(0, str(HERE.parent))

import qmix  # noqa: E402

COLORS = {"iql": "#7f7f7f", "vdn": "#1f77b4", "qmix": "#d62728", "vdn-s": "#17becf", "qmix-lin": "#ff7f0e",
          "qmix-ns": "#9467bd"}  # the same in every figure
KEYS = ("env", "algo", "seed", "flags")
KEEP = ("env_steps", "episodes", "updates", "seconds", "train_return", "test_return", "test_win_rate", "loss")


def flags(config: dict) -> str:
    """What a run's config changes of its environment's preset, as flags; what cannot matter is left out."""
    config, plain, text = vars(qmix.Config(**config)), vars(qmix.Config(env=config["env"])), []
    for name in plain.keys() - {"algo", "seed", "out", "threads", "env_timeout", "checkpoint_seconds", "save_replay"}:
        flag, value = name.replace("_", "-"), config[name]
        if value != plain[name]:
            value = " ".join(value) if name == "env_args" else value
            text.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    return " ".join(sorted(text))


def gather(target: str, runs: list[str]) -> None:
    gathered: dict = {}
    for run in runs:
        config = json.loads((Path(run) / "config.json").read_text())["config"]
        key = config["env"], config["algo"], config["seed"], flags(config)
        if key in gathered:
            sys.exit(f"error: {run} is a second run of {' '.join(map(str, key))}")
        with open(Path(run) / "metrics.csv") as rows:
            gathered[key] = [[f"{float(row[name]):.6g}" if row[name] else "" for name in KEEP]
                             for row in csv.DictReader(rows)]
    with open(target, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*KEYS, *KEEP])
        table.writerows([*key, *row] for key, rows in gathered.items() for row in rows)


def read(name: str) -> dict[tuple, dict[str, np.ndarray]]:
    """{(env, algo, seed, flags): {column: values}}; NaN where a cell is empty."""
    runs: dict = {}
    with open(HERE / name) as file:
        for row in csv.DictReader(file):
            key = tuple(row.pop(column, "") for column in KEYS)
            for column, cell in row.items():
                runs.setdefault(key, {}).setdefault(column, []).append(float(cell or "nan"))
    return {key: {column: np.array(values) for column, values in run.items()} for key, run in runs.items()}


def table(name: str) -> list[list[str]]:
    """env, algo, flags, seeds, results, updates to 82, updates, seconds of each group of runs, as README.md has them. A
    seed's result is the final return on Checkers, the mean of the last three win rates in per cent on skirmish."""
    groups: dict = {}
    for (env, algo, seed, changed), run in read(name).items():
        groups.setdefault((env, algo, changed), {})[int(seed)] = run
    lines = []
    for key, seeds in groups.items():
        runs, first = [seeds[seed] for seed in sorted(seeds)], []
        if key[0] == "checkers":
            results = [f"{run['test_return'][-1]:.2f}" for run in runs]
            first = [f"{run['updates'][run['test_return'] > 82][0]:,.0f}" if max(run["test_return"]) > 82 else "never"
                     for run in runs]
        else:
            results = [f"{100 * run['test_win_rate'][-3:].mean():.0f}" for run in runs]
        updates, seconds = (f"{min(values):,.0f} to {max(values):,.0f}" for values in
                            ([run[column][-1] for run in runs] for column in ("updates", "seconds")))
        lines.append([*key, ", ".join(map(str, sorted(seeds))), ", ".join(results), ", ".join(first), updates, seconds])
    return lines


def two_step() -> None:
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    for level, text in ((1.945, "1.945"), (0.5625, "0.5625"), (0, "0")):
        axes.axhline(level, color="black", linewidth=0.6, linestyle=":")
        axes.text(10_100, level, text, va="center", fontsize=8, bbox=dict(facecolor="white", linewidth=0, pad=1))
    for (_, algo, *_), run in read("two_step.csv").items():
        axes.plot(run["env_steps"], run["loss"], color=COLORS[algo], label=algo)
    axes.set(xlabel="environment steps", ylabel="mean squared TD error", ylim=(-0.1, 3.2), xlim=(500, 11_200),
             title="Two-step game: what each algorithm cannot represent (dotted: exact)")
    axes.legend(ncol=3, fontsize=8)
    figure.savefig(HERE / "two_step.png", dpi=110)


def bands(axes, runs: dict, column: str) -> None:
    """Median and quartiles over the seeds of each algorithm, against environment steps."""
    for algo, color in COLORS.items():
        if seeds := [run for (_, a, *_), run in runs.items() if a == algo]:
            steps = np.linspace(0, min(run["env_steps"][-1] for run in seeds), 60)
            curves = np.array([np.interp(steps, run["env_steps"], run[column]) for run in seeds])
            low, median, high = np.quantile(curves, (0.25, 0.5, 0.75), axis=0)
            axes.plot(steps / 1000, median, color=color, label=f"{algo} ({len(seeds)} seeds)")
            axes.fill_between(steps / 1000, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="thousand environment steps")


def checkers() -> None:
    runs = read("checkers.csv")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    levels = {86.26: "86.26 best there is", 83.54: "83.54 best for gamma 0.99", 59.64: "59.64 agent 1 never helps"}
    for axes, (level, text) in product((left, right), levels.items()):
        axes.axhline(level, color="black", linewidth=0.6, linestyle=":")
        if axes is left:
            axes.text(0.99, level + (1 if level != 83.54 else -4.2), text, fontsize=8, ha="right",
                      transform=axes.get_yaxis_transform(), bbox=dict(facecolor="white", linewidth=0, pad=1))
    for (_, algo, *_), run in runs.items():
        if algo == "qmix":
            left.plot(run["env_steps"] / 1000, run["test_return"], color=COLORS[algo], linewidth=1, alpha=0.6)
    left.set(xlabel="thousand environment steps", ylabel="greedy return", ylim=(-5, 92), title="QMIX, each seed")
    bands(right, runs, "test_return")
    right.set(title="Checkers: median and quartiles")
    right.legend(loc="lower right", fontsize=8, ncol=2)
    figure.savefig(HERE / "checkers.png", dpi=110)


def skirmish() -> None:
    """The paper's figures 3 and 4."""
    with open(HERE / "skirmish_heuristic.csv") as file:
        heuristic = {f"skirmish:{row['map']}": float(row["won"]) / 100 for row in csv.DictReader(file)
                     if row["policy"] == "heuristic"}
    for name, algos, maps, across in (("skirmish", ("iql", "vdn", "qmix"), ("3m", "2s3z", "3s5z", "1c3s5z"), 2),
                                      ("ablations", ("qmix", "vdn-s", "qmix-lin", "qmix-ns"), ("3s5z",), 1)):
        figure, panels = pyplot.subplots(len(maps) // across, across, figsize=(5 * across, 3 * len(maps) // across),
                                         layout="constrained", squeeze=False, sharey=True)
        for axes, env in zip(panels.flat, (f"skirmish:{map_name}" for map_name in maps)):
            runs = {key: run for key, run in read("skirmish.csv").items() if key[0] == env and key[1] in algos}
            bands(axes, runs, "test_win_rate")
            axes.axhline(heuristic[env], color="black", linestyle="--", linewidth=1, label="heuristic")
            axes.set(ylim=(-0.02, 1.02), title=env)
            axes.legend(fontsize=8, loc="best")
        for axes in panels[:, 0]:
            axes.set(ylabel="greedy win rate")
        figure.savefig(HERE / f"{name}.png", dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--gather"]:
        gather(sys.argv[2], sys.argv[3:])
    else:
        two_step()
        checkers()
        skirmish()
        for name in ("checkers.csv", "checkers_flags.csv", "skirmish.csv", "skirmish_flags.csv"):
            print(f"\n{name}: env, algo, flags, seeds, results, updates to 82, updates, seconds")
            for line in table(name):
                print(f"| {' | '.join(line)} |")
