"""The two-step game's tables, losses and CSV. Each test names the mistake it would catch."""

import csv

import numpy as np
import pytest
import torch

import envs
import qmix
from extras import two_step


def losses_q_tot(team, first: list[int], second: list[int], t: int) -> float:
    """Q_tot that the loss sees in step t when the team plays `first`, then `second`."""
    script = iter((first, second))

    def choose(step, memory):
        return torch.tensor([next(script)]), None

    batch, _ = qmix.rollout(envs.make("two-step", n_envs=1), choose)
    batch["filled"] = torch.tensor([[t == 0, t == 1]])
    _, q_taken, _ = qmix.td_loss(team, team, batch, gamma=0.99)
    return q_taken.item()


@pytest.mark.parametrize("algo", ["qmix", "vdn-s", "iql"])
def test_tables_are_what_the_loss_sees(algo, tmp_path):
    """Catches: rows and columns exchanged, another state's table, weights that were not loaded."""
    run = qmix.Run(qmix.configure("two-step", algo=algo, device="cpu"))
    qmix.write_checkpoint(tmp_path / "checkpoint.pt", qmix.policy_state(run))
    tables = two_step.q_tot_tables(tmp_path)
    for i in (0, 1):
        for j in (0, 1):
            found = [tables[state][i][j] for state in ("1", "2A", "2B")]
            expected = [
                losses_q_tot(run.team, [i, j], [0, 0], t=0),
                losses_q_tot(run.team, [0, 0], [i, j], t=1),
                losses_q_tot(run.team, [1, 0], [i, j], t=1),
            ]
            assert found == pytest.approx(expected, abs=1e-5)


def least_squares(inputs: list[list[int]], targets: list[float]) -> tuple[np.ndarray, float]:
    """The best fit by a weighted sum of the inputs, and its mean squared error."""
    inputs = np.array(inputs)
    weights = np.linalg.lstsq(inputs, np.array(targets), rcond=None)[0]
    fit = inputs @ weights
    return fit, ((fit - targets) ** 2).mean()


JOINT = [(0, 0), (0, 1), (1, 0), (1, 1)]  # the actions of agent 1 and 2


def test_exact_loss_of_the_sums():
    """Catches: a number that is not the best that VDN, VDN-S and QMIX-Lin can do."""
    payoff = envs.TwoStep().payoff.tolist()
    sums = [[1, i, j] for i, j in JOINT]
    left = 0.0
    for table in (payoff[1], payoff[2]):  # half of all steps: a quarter in 2A, a quarter in 2B
        left += least_squares(sums, [table[i][j] for i, j in JOINT])[1] / 4
    for algo in ("vdn", "vdn-s", "qmix-lin"):
        assert two_step.EXPECTED[algo][1] == pytest.approx(left)


def test_exact_loss_of_independent_learners():
    """Catches: a number that is not the best that IQL can do, at gamma 0.99."""
    payoff = envs.TwoStep().payoff.tolist()
    left = 0.0
    for agent in (0, 1):
        own = [[1, joint[agent]] for joint in JOINT]
        best = []
        for table in (payoff[1], payoff[2]):
            fit, error = least_squares(own, [table[i][j] for i, j in JOINT])
            best.append(fit.max())
            left += error / 4 / 2  # a quarter of all steps, two agents
        first = least_squares(own, [0.99 * best[i] for i, _ in JOINT])[1]
        left += first / 2 / 2  # half of all steps
    assert two_step.EXPECTED["iql"][1] == pytest.approx(left, abs=5e-4)


@pytest.mark.parametrize("algo", ["qmix", "vdn"])
def test_tables_of_the_paper_lead_to_its_return(algo):
    """Catches: a table of the paper with rows or states exchanged."""
    tables = {state: np.array(table) for state, table in two_step.PAPER[algo].items()}
    first = tables["1"].argmax() // 2
    state = ("2A", "2B")[first]
    i, j = divmod(int(tables[state].argmax()), 2)
    assert envs.TwoStep().payoff[1 + first, i, j] == two_step.EXPECTED[algo][0]


def test_csv_ends_where_it_is_expected_to():
    """Catches: an algorithm left out of the CSV, or a CSV of other code than today's."""
    ends = {}
    with open(two_step.DOCS / "two_step.csv") as file:
        for row in csv.DictReader(file):
            ends.setdefault(row["algo"], []).append(row)
    assert ends.keys() == set(qmix.MIXERS) - {"coma"}
    for algo, rows in ends.items():
        greedy, left = two_step.EXPECTED[algo]
        assert float(rows[-1]["test_return"]) == greedy
        losses = [float(row["loss"]) for row in rows[-3:]]
        assert np.mean(losses) == pytest.approx(left, abs=0.1)


def test_training_is_silent_and_of_the_algorithm(monkeypatch, capfd):
    """Catches: output of the runs between the tables; every run of the same algorithm."""
    monkeypatch.setitem(qmix.PRESETS["two-step"], "total_steps", 50)
    facts, tables, rows = two_step.train("vdn")
    assert facts["algo"] == "vdn"
    assert facts["seed"] == 1
    assert [float(row["env_steps"]) for row in rows] == [0, 50]
    (a, b), (c, d) = tables["2B"]
    assert a + d == pytest.approx(b + c, abs=1e-5)  # as in any sum
    assert capfd.readouterr() == ("", "")


def test_report_shows_the_learned_and_the_papers_table(capsys):
    """Catches: the paper's table under another algorithm's name, rows and columns exchanged."""
    tables = {"1": [[1, 2], [3, 4]], "2A": [[5, 6], [7, 8]], "2B": [[9, 10], [11, 12]]}
    rows = [{"loss": text} for text in ("9", "0.5", "0.6", "0.7")]
    two_step.report("vdn", {"test_return": 7.0, "seconds": 12.3}, tables, rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("2A:")[0].split() == "Q_tot vdn 1: 1.00 2.00 / 3.00 4.00".split()
    assert lines[1].endswith("2B: -1.87  2.31 /  2.33  6.51")
    assert "loss 0.600 (exact 0.5625), 12 s" in lines[2]


def test_help_does_not_train(monkeypatch, capsys):
    """Catches: a minute of training, and docs/two_step.csv rewritten, by one who asks for help."""
    monkeypatch.setattr(two_step, "ProcessPoolExecutor", None)
    monkeypatch.setattr("sys.argv", ["two_step", "--help"])
    with pytest.raises(SystemExit, match="0"):
        two_step.main()
    assert "docs/two_step.csv" in capsys.readouterr().out
