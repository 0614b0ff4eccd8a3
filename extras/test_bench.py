"""What is measured is what the tables say. Each test names the mistake it would catch."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from extras import bench

SIZES = {"n_agents": 2, "n_actions": 3, "obs_dim": 4, "state_dim": 5, "episode_limit": 20}
CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Time goes on by a second whenever somebody looks at the clock."""
    ticks = itertools.count()
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def test_both_learners_make_the_same_update():
    """Catches: a learner that is fast because it computes something else (asserted inside)."""
    found = bench.compare_learners(SIZES, CPU, share=0.4)
    assert list(found) == ["usual", "qmix.py", "matrix products alone"]


def test_comparison_notices_another_update(monkeypatch):
    """Catches: an assertion that passes whatever the losses are."""
    usual = bench.usual_loss

    def other(team, target_team, batch, gamma):
        return usual(team, target_team, batch, 0.9 * gamma)

    monkeypatch.setattr(bench, "usual_loss", other)
    with pytest.raises(AssertionError, match="another update"):
        bench.compare_learners(SIZES, CPU, share=0.4)


def test_milliseconds_are_the_median_of_each(monkeypatch):
    """Catches: seconds, a mean, the slow first turns counted, one way's time under another."""
    now = [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    costs = iter([100.0, 100.0, 1.0, 2.0, 9.0])

    def slow():
        now[0] += next(costs)

    def slower():
        now[0] += 5.0

    found = bench.timed({"slow": slow, "slower": slower}, CPU, rounds=3)
    assert found == {"slow": 2000, "slower": 5000}


def test_step_speed_counts_every_environment(clock):
    """Catches: rounds counted for steps, time of the actions' choice counted."""
    assert bench.steps_per_second("two-step", 8, CPU, seconds=3) == 8


def test_bare_speed_is_that_of_its_steps(clock):
    """Catches: episodes or resets counted for steps."""
    # The clock is read at the start, before the first episode, before the second one, for which no
    # time is left, and at the end
    assert bench.bare_speed(bench.Tiny(), seconds=1.5) == 50 / 3


def test_workers_speed_is_that_of_all_of_them(monkeypatch):
    """Catches: steps of one environment told as those of all, the workers' start in the time."""
    now = [0.0]
    costs = iter([100.0, 1.0, 1.0])  # seconds that each round takes

    def rollout(env, choose):
        now[0] += next(costs)
        return {}, {"length": torch.tensor([5, 10, 15])}

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(bench.qmix, "rollout", rollout)
    assert bench.workers_speed("two-step", (), 3, seconds=2) == 30


def test_workers_table_has_a_row_for_each_number(monkeypatch):
    """Catches: a number of environments left out, the bare environment's speed in their place."""
    monkeypatch.setattr(bench, "bare_speed", lambda env, seconds: 1000)
    monkeypatch.setattr(bench, "workers_speed", lambda name, arguments, n_envs, seconds: n_envs)
    rows = [line.split(" | ")[1:] for line in bench.workers(CPU)][2:]
    expected = [["1, in this process", "1,000 |"]]
    expected += [[f"{number}, in workers", f"{number} |"] for number in (2, 8, 16)]
    assert rows == expected


def test_tiny_environment_plays_in_workers():
    """Catches: a stand-in that envs.py refuses, so that nothing is measured without lbforaging."""
    assert bench.workers_speed("extras.bench:Tiny", (), 2, seconds=0.01) > 0


@pytest.mark.parametrize(
    "values, held, expected",
    [
        ([1, 0, 1, 1], True, 2),
        ([1, 0, 1, 1], False, 0),
        ([1, 1], True, 0),
        ([1, 0], True, None),
        ([0], False, None),
        ([0, 1, 0], False, 1),
    ],
)
def test_goal_is_reached_where_it_is_said_to_be(values, held, expected):
    """Catches: a goal that was lost again, off by one."""
    assert bench.first_reached(values, 1, held) == expected


def test_run_tells_the_seconds_of_each_evaluation():
    """Catches: lines of qmix.py that are no longer found, so that no time is told."""
    flags = "--env two-step --total-steps 100 --test-interval-steps 50 --device cpu".split()
    used, rows = bench.train(flags)
    assert [float(row["env_steps"]) for row in rows] == [0, 50, 100]
    assert len(used) == 3
    assert 0 < used[0] <= used[1] <= used[2]


def test_failed_run_shows_why(monkeypatch, tmp_path):
    """Catches: a run that failed and is told as one that never reached the goal."""
    (tmp_path / "qmix.py").write_text("raise SystemExit('error: something')")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="error: something"):
        bench.train([])


def test_median_of_the_runs_counts_those_that_never_arrive(monkeypatch):
    """Catches: seeds left out, the end's seconds for those to the goal, infinity printed."""
    curves = {"1": [0, 90, 90], "2": [0, 0, 90], "3": [0, 90, 0]}

    def train(flags):
        values = curves[flags[flags.index("--seed") + 1]]
        rows = [{"env_steps": 1000 * i, "test_return": value} for i, value in enumerate(values)]
        return [10.0, 20.0, 30.0], rows

    monkeypatch.setattr(bench, "train", train)
    lines = list(bench.result(CPU, "checkers", ["1", "2", "3"], []))
    assert lines[2:] == [
        "| 1 | 20 | 1,000 | 30 | 90 |",
        "| 2 | 30 | 2,000 | 30 | 90 |",
        "| 3 | never | never | 30 | 0 |",
        "| median of 3 | 30 | 2,000 | | |",
    ]


def test_flags_behind_the_seeds_reach_the_run(monkeypatch, tmp_path):
    """Catches: seeds taken for flags, flags that are lost, a section without them in its title."""
    given = []

    def train(flags):
        given.append(flags)
        return [1.0], [{"env_steps": 0, "test_return": 0}]

    monkeypatch.setattr(bench, "train", train)
    monkeypatch.setattr(bench, "BENCH", tmp_path / "bench.md")
    assert bench.main("result checkers 4 5 --algo vdn".split()) == 0
    assert [flags[flags.index("--seed") + 1] for flags in given] == ["4", "5"]
    assert all(flags[-2:] == ["--algo", "vdn"] for flags in given)
    assert "\n## Time to result: checkers --algo vdn\n" in bench.BENCH.read_text()


def test_part_takes_the_place_of_its_former_one(monkeypatch, tmp_path):
    """Catches: a part that is there twice, other parts lost, written by hand or not."""
    file = tmp_path / "bench.md"
    file.write_text("# Speed\n\n## By hand\n\na\n\n## Runs\n\nold\n\n## Learner\n\nb\n")
    monkeypatch.setattr(bench, "BENCH", file)
    bench.keep("Runs", "new")
    text = "# Speed\n\n## By hand\n\na\n\n## Runs\n\nnew\n\n## Learner\n\nb\n"
    assert file.read_text() == text
    bench.keep("Workers", "c")
    assert file.read_text() == text + "\n## Workers\n\nc\n"


@pytest.mark.parametrize(
    "arguments", ["nothing", "runs nothing", "result nowhere 1", "result checkers"]
)
def test_bad_input_is_one_line(arguments, capsys, monkeypatch, tmp_path):
    """Catches: a traceback, minutes of measuring before the mistake is told."""
    monkeypatch.setattr(bench, "BENCH", tmp_path / "bench.md")
    assert bench.main(arguments.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not bench.BENCH.exists()
