"""What heuristics and random teams are said to get. Each test names the mistake it would catch."""

import csv
import json

import pytest
import torch

import envs
from extras import heuristic
from extras.heuristic import Settings


class Numbered(envs.Batched):
    """Episode k, counted from 0, is worth k; those of odd k end by a time limit.

    Agent 0 may only take action 2; agent 1 may take 0 and 3.
    """

    n_agents = 2
    n_actions = 4
    obs_dim = 1
    state_dim = 1
    episode_limit = 5

    def __init__(self, n_envs, device, seed):
        self.n_envs = n_envs
        self.device = torch.device(device)
        self.numbers = torch.arange(n_envs) - n_envs
        self.played = []

    def reset(self):
        self.numbers = self.numbers + self.n_envs
        self.steps = 0
        return self.look()

    def step(self, actions):
        self.played.append(actions)
        self.steps += 1
        return self.look()

    def look(self):
        B = self.n_envs
        avail = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1]]).bool().expand(B, -1, -1)
        odd = self.numbers % 2 == 1
        ends = torch.tensor(self.steps == 3).expand(B)
        reward = self.numbers.float() * (self.steps == 1)
        obs = torch.zeros(B, 2, 1)
        return envs.Step(obs, torch.zeros(B, 1), avail, reward, ends & ~odd, ends & odd, {})


def make_numbered(monkeypatch) -> list[Numbered]:
    """envs.make makes these from now on -> all that it has made."""
    made = []

    def make(name, n_envs, device, seed, arguments):
        made.append(Numbered(n_envs, device, seed))
        made[-1].arguments = arguments
        return made[-1]

    monkeypatch.setattr(envs, "make", make)
    return made


def test_means_are_those_of_the_first_episodes(monkeypatch):
    """Catches: all episodes of the last round counted, rounds weighted alike, a sum for a mean."""
    make_numbered(monkeypatch)
    found = heuristic.play(Settings(random=True, episodes=4, num_envs=3))  # of six
    assert found == {"return": 1.5, "length": 3.0, "truncated": 0.5}


def test_time_limit_is_told_from_an_end(monkeypatch):
    """Catches: terminated taken for truncated."""
    make_numbered(monkeypatch)
    found = heuristic.play(Settings(random=True, episodes=3, num_envs=3))  # odd is one alone
    assert found["truncated"] == pytest.approx(1 / 3)


def test_random_team_draws_among_all_available_actions(monkeypatch):
    """Catches: an action that the mask forbids, one that is never drawn, one draw for the team."""
    made = make_numbered(monkeypatch)
    heuristic.play(Settings(random=True, episodes=400, num_envs=100))
    actions = torch.cat(made[0].played)  # (1200, 2)
    assert (actions[:, 0] == 2).all()
    assert set(actions[:, 1].tolist()) == {0, 3}
    assert (actions[:, 1] == 3).float().mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("random", [False, True])
def test_row_of_3m_is_that_of_the_csv(random):
    """Catches: another seed or number of episodes than the CSV's, the two policies exchanged."""
    row = heuristic.table_row("3m", random)
    with open(heuristic.DOCS / "skirmish_heuristic.csv") as file:
        rows = list(csv.DictReader(file))
    assert {key: str(value) for key, value in row.items()} in rows


@pytest.mark.parametrize("random", [False, True])
def test_smac_is_told_who_plays(monkeypatch, random):
    """Catches: smac without heuristic_ai, smac's heuristic where random play was asked for."""
    made = make_numbered(monkeypatch)
    given = ("difficulty=7",)
    heuristic.play(Settings(env="smac:3m", env_args=given, random=random, episodes=1))
    expected = given if random else ("difficulty=7", "heuristic_ai=True")
    assert made[0].arguments == expected


def test_smac_gets_available_actions_beside_its_heuristic(monkeypatch):
    """Catches: actions that smac refuses before it puts its own in their place."""
    made = make_numbered(monkeypatch)
    heuristic.play(Settings(env="smac:3m", episodes=40, num_envs=40))
    actions = torch.cat(made[0].played)
    assert set(actions[:, 0].tolist()) == {2}
    assert set(actions[:, 1].tolist()) <= {0, 3}


def test_result_line_can_be_read(capsys):
    """Catches: a last line that is no JSON, --random that does not arrive."""
    assert heuristic.main("--env two-step --random --episodes 8".split()) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    facts = json.loads(line.removeprefix("result: "))
    assert facts["policy"] == "random"
    assert facts["length"] == 2


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--env two-step", "has no heuristic"),
        ("--env two-step --random --episodes 0", "--episodes"),
        ("--env nothing", "unknown environment"),
    ],
)
def test_bad_input_is_one_line(flags, expected, capsys):
    """Catches: a traceback, another exit code than 2."""
    assert heuristic.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
