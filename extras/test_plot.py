"""Gathered runs, statistics, tables, figures. Each test names the mistake it would catch."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

import qmix
from extras import plot

ROOT = plot.DOCS.parent
LOSSES = [5.0, 6.0, 7.0]  # of a run that `make_run` makes


def as_saved(cfg: qmix.Config) -> dict:
    """What config.json holds."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def make_run(path, run: qmix.Run, wishes=(0.0,)):
    """A run directory with three evaluations, whose best policy likes actions as `wishes` says."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(as_saved(run.cfg)))
    with open(path / "metrics.csv", "w") as file:
        table = csv.DictWriter(file, qmix.COLUMNS)
        table.writeheader()
        for i, loss in enumerate(LOSSES):
            table.writerow({"env_steps": 100 * i, "loss": loss, "test_return": 1 / 3})
    with torch.no_grad():
        run.team.agent.fc2.bias.copy_(1000 * torch.tensor(wishes))
    qmix.write_checkpoint(path / "best.pt", qmix.policy_state(run))
    return path


def make_qmix_run(path, wishes=(0.0,), **given):
    return make_run(path, qmix.Run(qmix.configure("two-step", **given)), wishes)


# ---------------------------------------------------------------------------- gathering runs
@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, ""),
        ({"seed": 7, "algo": "vdn", "out": "x", "device": "cpu", "threads": 3}, ""),
        ({"double_q": False, "lr": 0.5}, "--lr 0.5 --no-double-q"),
        ({"lr_anneal": True}, "--lr-anneal"),
        ({"env_args": ("a=1", "b=2")}, "--env-args a=1 b=2"),
        ({"total_steps": 600_000}, "--total-steps 600000"),
    ],
)
def test_flags_are_what_the_preset_has_not(given, expected):
    """Catches: a run with other settings drawn among those of the preset, and the other way."""
    config = as_saved(qmix.configure("two-step", **given))
    assert plot.flags(config) == expected


def test_flags_of_coma_are_against_its_own_defaults():
    """Catches: COMA's settings compared with QMIX's preset, its buffer size taken for a choice."""
    coma = pytest.importorskip("extras.coma")
    config = as_saved(coma.Config("skirmish:3m", num_envs=16, critic_dim=32))
    assert plot.flags(config) == "--critic-dim 32 --num-envs 16"


def test_gathered_runs_are_sorted_and_whole(tmp_path):
    """Catches: a run's rows under another run's key, evaluations lost, seed 10 before seed 9."""
    runs = [make_qmix_run(tmp_path / str(seed), seed=seed) for seed in (10, 9)]
    plot.gather(tmp_path / "all.csv", runs)
    with open(tmp_path / "all.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["9"] * 3 + ["10"] * 3
    assert [float(row["loss"]) for row in rows] == 2 * LOSSES
    assert [row["test_return"] for row in rows] == 6 * ["0.333333"]
    assert [row["absolute"] != "" for row in rows] == 2 * [False, False, True]


def test_gathered_runs_name_the_machine(tmp_path):
    """Catches: a column that stays empty, so that seconds of two machines are compared."""
    first = plot.read_run(make_qmix_run(tmp_path / "run"))[0]
    assert first["machine"] == plot.processor()
    assert first["machine"]


def test_gathering_leaves_what_is_there(tmp_path):
    """Catches: rows of earlier runs lost or rewritten, an unknown column dropped."""
    target = tmp_path / "all.csv"
    text = "env,algo,seed,flags,machine,env_steps,loss\ncheckers,vdn,1,,EPYC,0,0.10\n"
    target.write_text(text)
    plot.gather(target, [make_qmix_run(tmp_path / "run")])
    lines = target.read_text().splitlines()
    assert lines[0].startswith("env,algo,seed,flags,machine,env_steps,loss,")
    assert lines[1].rstrip(",") == text.splitlines()[1]
    assert len(lines) == 5


def test_second_run_with_the_same_key_is_refused(tmp_path, capsys):
    """Catches: one run gathered twice, a CSV that is damaged by what was refused."""
    run = make_qmix_run(tmp_path / "run", lr=0.5)
    target = tmp_path / "all.csv"
    assert plot.main(["--gather", str(target), str(run)]) == 0
    before = target.read_text()
    assert plot.main(["--gather", str(target), str(run)]) == 2
    assert "is a second run of two-step qmix 1 --lr 0.5" in capsys.readouterr().err
    assert target.read_text() == before


def test_absolute_metric_is_that_of_best_pt(tmp_path):
    """Catches: the last weights taken for the best, or untrained ones; a random policy."""
    for name, wishes, expected in (("a", (1.0, 0.0), 7), ("b", (0.0, 1.0), 8)):
        run = make_qmix_run(tmp_path / name, wishes)
        config = json.loads((run / "config.json").read_text())
        assert plot.absolute_metric(run, config) == expected


def test_absolute_metric_is_the_win_rate_where_there_are_battles(tmp_path, monkeypatch):
    """Catches: the return of a battle in place of the share that was won."""
    monkeypatch.setattr(plot, "ABSOLUTE_EPISODES", 16)
    run = qmix.Run(qmix.configure("skirmish:3m", num_envs=16))
    # It stands and shoots, all at the first enemy in reach
    path = make_run(tmp_path / "run", run, [0.0, 4, 0, 0, 0, 0, 7, 6, 5])
    config = json.loads((path / "config.json").read_text())
    assert 0 < plot.absolute_metric(path, config) < 1


def test_runs_of_coma_can_be_gathered(tmp_path):
    """Catches: COMA's best policy read with QMIX's settings."""
    coma = pytest.importorskip("extras.coma")
    run = coma.COMA(coma.Config("two-step", hidden_dim=16))
    path = make_run(tmp_path / "run", run, (0.0, 1.0))
    row = plot.read_run(path)[-1]
    assert row["flags"] == "--hidden-dim 16"
    assert float(row["absolute"]) == 8


# ------------------------------------------------------------------------ reading, statistics
def test_reading_skips_unknown_columns_and_marks_empty_cells(tmp_path, monkeypatch):
    """Catches: a text read as a number, an empty cell read as 0, two groups of runs mixed."""
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    text = "env,algo,seed,flags,machine,loss\na,vdn,2,,EPYC,\na,vdn,2,,EPYC,1\na,vdn,2,-x,EPYC,3\n"
    (tmp_path / "x.csv").write_text(text)
    groups = plot.read("x.csv")
    assert list(groups) == [("a", "vdn", ""), ("a", "vdn", "-x")]
    run = groups["a", "vdn", ""][2]
    assert list(run) == ["loss"]
    np.testing.assert_equal(run["loss"], [np.nan, 1])


def test_interval_is_the_bootstraps_of_the_interquartile_mean():
    """Catches: an interval of the mean, of other quantiles, or over another axis."""
    values = np.array([90.0, 10, 20, 30, 40])
    draws = np.random.default_rng(7).choice(values, (20_000, 5))
    means = np.sort(draws, axis=1)[:, 1:-1].mean(1)  # without a quarter at each end, rounded down
    low, high = plot.interval(values)
    assert plot.iqm(values) == 30
    assert [low, high] == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=2)
    low, _ = plot.interval(np.stack([values, values + 1], axis=1))  # seeds first
    assert low.shape == (2,)


def test_length_of_a_run_without_a_preset():
    """Catches: a run of the default length that breaks the table."""
    assert plot.length("--lr 1 --total-steps 75000") == 75_000
    assert plot.length("--lr 1") == 2_000_000


def test_few_seeds_are_told_one_by_one():
    """Catches: an interval of two or four seeds, which says nothing."""
    assert plot.summary([1.0, 2.5, 30.0, 4.0], 1) == "1.0, 2.5, 30.0, 4.0"
    assert plot.summary([90.0, 10, 20, 30, 40], 0).startswith("30 [")
    assert plot.span([99.6, 1200.0], 0) == "100 to 1,200"
    assert plot.span([99.6, 100.0], 0) == "100"


def a_run(**columns) -> dict:
    run = {"seconds": [0, 9], "absolute": [np.nan, 0.5], "test_win_rate": [np.nan, np.nan]}
    run.update(columns)
    return {name: np.array(values) for name, values in run.items()}


def test_end_of_a_run():
    """Catches: the last evaluation for the mean of three, wins told as returns."""
    returns = a_run(test_return=[0, 1.0, 2, 6])
    assert plot.describe("checkers", {1: returns})["end"] == "6.00"
    assert plot.describe("smac:3m", {1: returns})["end"] == "3.00"
    wins = a_run(test_return=[20, 20, 20, 20], test_win_rate=[0, 0.25, 0.5, 0.75])
    line = plot.describe("smac:3m", {1: wins, 3: wins})
    assert line["end"] == "50, 50"
    assert line["absolute metric"] == "50, 50"
    assert line["seeds"] == "1 to 3"


def test_best_is_that_of_the_mean_over_seeds():
    """Catches: the mean of each run's own best evaluation, which is higher."""
    first = a_run(test_return=[0, 4.0, 1, 0, 9])
    second = a_run(test_return=[0, 1.0, 5, 0])
    assert plot.describe("smac:3m", {1: first, 2: second})["best"] == "3.00"


# --------------------------------------------------------------------------- texts, figures
def test_texts_have_the_tables_of_the_csvs():
    """Catches: CSVs with new runs, and a table of README.md or docs/ left as it was."""
    results = (plot.DOCS / "results.md").read_text()
    readme = (ROOT / "README.md").read_text() + results  # Checkers is in results.md
    others = (plot.DOCS / "others.md").read_text()
    runs = (plot.DOCS / "runs.md").read_text()
    for lines, text in (
        (plot.readme(), readme),
        (plot.results(), results),
        (plot.elsewhere(), others),
        (plot.runs(), runs),
    ):
        assert [line for line in lines if f"\n{line}\n" not in text] == []


def test_tables_leave_out_no_algorithm_and_no_map():
    """Catches: an algorithm or a map that is forgotten in a table, or told twice."""
    lines = plot.readme()
    first = [line.split(" | ")[0].strip("| ") for line in lines]
    assert first == sorted(set(qmix.MIXERS) - {"coma"}) + list(plot.MAPS)
    groups = [key for name in plot.CSVS for key in plot.read(name)]
    assert len(set(plot.runs())) == len(groups)


def saved_figures(monkeypatch) -> dict:
    """{file name: figure} of all that is drawn from now on; nothing is written."""
    figures = {}

    def savefig(figure, path, dpi):
        figures[path.name] = figure

    monkeypatch.setattr(plot.Figure, "savefig", savefig)
    # The bootstrap takes its time
    monkeypatch.setattr(plot, "interval", lambda values: (values.min(0), values.max(0)))
    return figures


def test_axes_have_names(monkeypatch):
    """Catches: an axis without a name, a figure that is not drawn."""
    figures = saved_figures(monkeypatch)
    plot.draw_figures()
    assert figures.keys() >= {"two_step.png", "checkers.png", "skirmish.png", "ablations.png"}
    for figure in figures.values():
        assert figure.axes[0].get_ylabel()
        for axes in figure.axes:
            assert axes.get_xlabel() or not axes.axison


def test_legends_name_every_curve_and_its_seeds(monkeypatch):
    """Catches: a curve without an entry, a figure that does not tell seeds or what a band is."""
    figures = saved_figures(monkeypatch)
    plot.skirmish("skirmish", "a title", plot.COMPARED, plot.MAPS)
    assert figures["skirmish.png"].get_suptitle() == f"a title, greedy win rate: {plot.BAND}"
    for axes in figures["skirmish.png"].axes:
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        assert len(texts) == len(axes.get_lines())
        texts.remove("heuristic")
        assert all("(seeds: " in text for text in texts)


def test_curves_are_those_of_their_algorithm_and_map(monkeypatch):
    """Catches: algorithms or maps exchanged in a figure, runs with other flags among them."""
    figures = saved_figures(monkeypatch)
    plot.skirmish("skirmish", "a title", plot.COMPARED, plot.MAPS)
    plot.skirmish("ablations", "a title", plot.ABLATIONS, plot.ABLATION_MAPS)
    groups = plot.read("skirmish.csv")
    for axes in [*figures["skirmish.png"].axes, *figures["ablations.png"].axes]:
        env = axes.get_title()
        ends = {line.get_label().split(" ")[0]: line.get_ydata()[-1] for line in axes.get_lines()}
        for algo in ends.keys() - {"heuristic"}:
            seeds = groups[env, algo, ""].values()
            last = [run["test_win_rate"][-1] for run in seeds]
            assert min(last) - 0.05 <= ends[algo] <= max(last) + 0.05


def test_other_environments_get_a_panel_each(tmp_path, monkeypatch):
    """Catches: two environments in one panel, an unknown column that stops the drawing."""
    text = "env,algo,seed,flags,machine,env_steps,test_return\n"
    for env, algo, flags in (
        ("a", "qmix", "-x"),
        ("a", "vdn", "-x"),
        ("a", "qmix", ""),
        ("b", "vdn", ""),
    ):
        for seed in (1, 2):
            text += f"{env},{algo},{seed},{flags},EPYC,0,{seed}\n"
            text += f"{env},{algo},{seed},{flags},EPYC,1000,{seed + 1}\n"
    (tmp_path / "others.csv").write_text(text)
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    figures = saved_figures(monkeypatch)
    plot.others()
    lines = {axes.get_title(): axes.get_lines() for axes in figures["others.png"].axes}
    assert {title.strip(): len(found) for title, found in lines.items()} == {
        "a": 1,
        "a -x": 2,
        "b": 1,
    }
    assert lines["a -x"][0].get_ydata()[-1] == 2.5


def test_colours_differ():
    """Catches: two algorithms that look the same."""
    assert len({color for color, _ in plot.LINES.values()}) == len(plot.LINES)
    assert plot.LINES.keys() >= qmix.MIXERS.keys()


def test_missing_run_is_one_line(tmp_path, capsys):
    """Catches: a traceback for a folder that holds no run."""
    assert plot.main(["--gather", str(tmp_path / "x.csv"), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.csv").exists()


def test_seconds_that_are_missing_are_left_out():
    """Catches: nan in a table for a run whose time by the clock means nothing."""
    columns = ("test_win_rate", "test_return", "absolute")
    seeds = {}
    for seed, seconds in ((1, 30.0), (2, np.nan), (3, 50.0)):
        run = {name: np.ones(3) for name in columns}
        run["seconds"] = np.array([1.0, seconds])
        seeds[seed] = run
    assert plot.describe("skirmish:3m", seeds)["seconds"] == "30 to 50"
