"""Draws the figures in docs/ from the CSVs in docs/, prints README.md's and results.md's tables of them, and gathers
those CSVs from run directories.

    python docs/plot.py                                            # make plot
    python docs/plot.py --gather docs/checkers.csv runs/a runs/b   # adds metrics.csv of each run, and how it was made

Statistics are those of Gorsane et al. 2022 (arXiv 2209.10485): the interquartile mean over independent seeds with a
95 % bootstrap interval, and the absolute metric: what each run's best policy, by its evaluations, comes to when it is
evaluated again over more episodes.
"""

import contextlib
import csv
import json
import sys
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy import stats

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import coma  # noqa: E402

import qmix  # noqa: E402

COLORS = {"iql": "#7f7f7f", "vdn": "#1f77b4", "qmix": "#d62728", "vdn-s": "#17becf", "qmix-lin": "#ff7f0e",
          "qmix-ns": "#9467bd", "coma": "#2ca02c"}  # the same in every figure
KEYS = ("env", "algo", "seed", "flags")
KEEP = ("env_steps", "episodes", "updates", "seconds", "train_return", "test_return", "test_win_rate", "loss",
        "absolute")
MAPS = ("3m", "5m", "8m", "2s3z", "3s5z", "1c3s5z")  # the paper's figure 3
COMPARED = ("coma", "iql", "vdn", "qmix")
ABLATIONS = ("qmix", "vdn-s", "qmix-lin", "qmix-ns")  # its figure 4, on three of the maps
# Where the paper's curves end on MAPS: greedy win rate in per cent, read off the authors' plots (+-1)
PAPER = {"iql": (58, 76, 65, 29, 4, 1), "vdn": (64, 84, 90, 76, 23, 27), "qmix": (92, 97, 92, 95, 76, 69),
         "vdn-s": (95, 94, 95, 87, 54, 60), "qmix-lin": (89, 93, 95, 81, 54, 57), "qmix-ns": (82, 82, 80, 70, 30, 32)}
AGAIN = 320  # episodes of the absolute metric: ten times SMAC's evaluation of 32


def flags(config: dict) -> str:
    """What a run's config changes of its environment's preset, as flags; what cannot matter is left out."""
    kind = coma.Config if config["algo"] == "coma" else qmix.Config
    config = vars(kind(**config | {"env_args": tuple(config["env_args"])}))  # JSON has lists alone
    plain, text = vars(kind(env=config["env"])), []
    for name in plain.keys() - {"algo", "seed", "out", "device", "threads", "env_timeout", "checkpoint_seconds",
                                "save_replay"}:
        flag, value = name.replace("_", "-"), config[name]
        if value != plain[name]:
            value = " ".join(value) if name == "env_args" else value
            text.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    return " ".join(sorted(text))


def absolute(run: Path, config: dict) -> float:
    """The absolute metric: win rate, or mean return where there is no battle, of AGAIN greedy episodes of best.pt."""
    saved = torch.load(run / "best.pt", weights_only=True)
    cfg = qmix.Config(env=config["env"], env_args=config["env_args"], hidden_dim=config["hidden_dim"], algo="iql")
    policy = qmix.Policy(saved | {"config": vars(cfg)})  # the agents' network alone; COMA's is the same
    with contextlib.closing(qmix.make_env(cfg, 64, "cpu", seed=config["seed"])) as env:
        found = qmix.greedy_episodes(env, lambda step, hidden: policy.act(step.obs, step.avail, hidden), AGAIN)
    return found["test_return"] if found["test_win_rate"] is None else found["test_win_rate"]


def gather(target: str, runs: list[str]) -> None:
    """Add runs to a CSV; those that it has already stay."""
    gathered: dict = {}
    if Path(target).exists():
        with open(target) as file:
            for row in csv.DictReader(file):
                key = row["env"], row["algo"], int(row["seed"]), row["flags"]
                gathered.setdefault(key, []).append([row[name] for name in KEEP])
    for run in map(Path, runs):
        config = json.loads((run / "config.json").read_text())["config"]
        key = config["env"], config["algo"], config["seed"], flags(config)
        if key in gathered:
            sys.exit(f"error: {run} is a second run of {' '.join(map(str, key))}")
        with open(run / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        rows[-1]["absolute"] = absolute(run, config)
        rows = [[row.get(name, "") for name in KEEP] for row in rows]
        gathered[key] = [["" if cell == "" else f"{float(cell):.6g}" for cell in row] for row in rows]
    with open(target, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*KEYS, *KEEP])
        table.writerows([*key, *row] for key, rows in sorted(gathered.items()) for row in rows)


def read(name: str) -> dict[tuple, dict[str, np.ndarray]]:
    """{(env, algo, seed, flags): {column: values}}; NaN where a cell is empty."""
    runs: dict = {}
    with open(HERE / name) as file:
        for row in csv.DictReader(file):
            key = tuple(row.pop(column, "") for column in KEYS)
            for column, cell in row.items():
                runs.setdefault(key, {}).setdefault(column, []).append(float(cell or "nan"))
    return {key: {column: np.array(values) for column, values in run.items()} for key, run in runs.items()}


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bootstrap interval of the interquartile mean over the first axis, the seeds."""
    if len(values) < 2:
        return values[0], values[0]
    found = stats.bootstrap((values,), iqm, n_resamples=5000, method="percentile", rng=np.random.default_rng(1))
    return found.confidence_interval


def summary(values: list[float], digits: int) -> str:
    """As in 97 [95, 98]; of fewer than five seeds each value: no interval would mean much."""
    if len(values) < 5:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    low, high = interval(np.array(values))
    return f"{iqm(np.array(values)):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(name: str) -> dict[tuple, dict[str, str]]:
    """{(env, algo, flags): {column: text}}, one for each group of runs. Returns on Checkers, greedy wins in per cent on
    skirmish; `end` is the last evaluation there, the mean of the last three here."""
    groups: dict = {}
    for (env, algo, seed, changed), run in read(name).items():
        groups.setdefault((env, algo, changed), {})[int(seed)] = run
    lines = {}
    for (env, *key), seeds in groups.items():
        runs = [seeds[seed] for seed in sorted(seeds)]
        if env == "checkers":
            digits, end = 2, [run["test_return"][-1] for run in runs]
        else:
            digits, end = 0, [100 * run["test_win_rate"][-3:].mean() for run in runs]
        again = [run["absolute"][-1] * (1 if env == "checkers" else 100) for run in runs]
        seconds = [run["seconds"][-1] for run in runs]
        lines[(env, *key)] = {"seeds": f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{min(seeds)}",
                            "number": str(len(seeds)), "end": summary(end, digits),
                            "from ... to": f"{min(end):.{digits}f} to {max(end):.{digits}f}",
                            "absolute metric": summary(again, digits),
                            "seconds": f"{min(seconds):,.0f} to {max(seconds):,.0f}"}
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
    """Interquartile mean over the seeds of each algorithm, with its interval, against environment steps."""
    for algo, color in COLORS.items():
        if seeds := [run for (_, a, *_), run in runs.items() if a == algo]:
            steps = np.linspace(0, min(run["env_steps"][-1] for run in seeds), 60)
            curves = np.array([np.interp(steps, run["env_steps"], run[column]) for run in seeds])
            low, high = interval(curves)
            axes.plot(steps / 1000, iqm(curves), color=color, label=f"{algo} ({len(seeds)})")
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
    right.set(title="interquartile mean and its 95 % interval (number of seeds)")
    right.legend(loc="lower right", fontsize=8, ncol=2)
    figure.savefig(HERE / "checkers.png", dpi=110)


def heuristic() -> dict[str, float]:
    """Its win rate on each map, in per cent (docs/calibrate.py)."""
    with open(HERE / "skirmish_heuristic.csv") as file:
        return {row["map"]: float(row["won"]) for row in csv.DictReader(file) if row["policy"] == "heuristic"}


def skirmish(name: str, algos: tuple[str, ...], maps: tuple[str, ...]) -> None:
    """The paper's figures 3 and 4."""
    runs, rows = read("skirmish.csv"), len(maps) // 3
    figure, panels = pyplot.subplots(rows, 3, figsize=(13.5, 3.3 * rows), layout="constrained", squeeze=False,
                                     sharey=True)
    for axes, map_name in zip(panels.flat, maps):
        env = f"skirmish:{map_name}"
        drawn = {key: run for key, run in runs.items() if key[0] == env and key[1] in algos and not key[3]}
        bands(axes, drawn, "test_win_rate")
        axes.axhline(heuristic()[map_name] / 100, color="black", linestyle="--", linewidth=1, label="heuristic")
        axes.set(ylim=(-0.02, 1.02), title=env)
        axes.legend(fontsize=8, loc="best")
    for axes in panels[:, 0]:
        axes.set(ylabel="greedy win rate")
    figure.savefig(HERE / f"{name}.png", dpi=110)


def results() -> list[str]:
    """The rows of docs/results.md's tables of skirmish; but for one, told by its flag, by the preset alone."""
    wins, columns = table("skirmish.csv"), ("seeds", "end", "from ... to", "absolute metric", "seconds")
    kinds = product(MAPS, dict.fromkeys(COMPARED + ABLATIONS), ("", "--total-steps 600000"))
    lines = [f"| {map_name} | {f'{algo} {changed}'.strip()} | {' | '.join(line[column] for column in columns)} |"
             for map_name, algo, changed in kinds if (line := wins.get((f"skirmish:{map_name}", algo, changed)))]
    for algos, maps in ((COMPARED[1:], MAPS), (ABLATIONS, ("3m", "2s3z", "3s5z"))):
        for map_name in maps:
            cells = [f"{wins[f'skirmish:{map_name}', algo, '']['end']} ({PAPER[algo][MAPS.index(map_name)]})"
                     for algo in algos]
            lines.append(f"| {map_name} | {' | '.join(cells)} |")
    return lines


def readme() -> list[str]:
    """The rows of README.md's tables, by the preset alone."""
    returns, wins = table("checkers.csv"), table("skirmish.csv")
    lines = [f"| {algo} | {line['end']} | {line['from ... to']} | {line['seeds']} |"
             for (_, algo, changed), line in returns.items() if not changed]
    for map_name in MAPS:
        cells = [wins.get((f"skirmish:{map_name}", algo, ""), {}) for algo in COMPARED]
        numbers = " | ".join(cell.get("absolute metric", "not run") for cell in cells)
        counts = ", ".join(cell["number"] for cell in cells if cell)
        lines.append(f"| {map_name} | {numbers} | {heuristic()[map_name]:.0f} | {counts} |")
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["--gather"] and len(sys.argv) > 3:
        try:
            gather(sys.argv[2], sys.argv[3:])
        except OSError as error:
            sys.exit(f"error: {error}")
    elif len(sys.argv) > 1:
        sys.exit("expected: --gather CSV RUN ..., or nothing")
    else:
        two_step()
        checkers()
        skirmish("skirmish", COMPARED, MAPS)
        skirmish("ablations", ABLATIONS, ("3m", "2s3z", "3s5z"))
        print("README.md:", *readme(), "", "docs/results.md:", *results(), sep="\n")
        for name in ("checkers.csv", "skirmish.csv"):
            for i, (key, line) in enumerate(table(name).items()):
                if i == 0:
                    print(f"\n{name}: env, algo, flags, {', '.join(line)}")
                print(f"| {' | '.join((*key, *line.values()))} |")
