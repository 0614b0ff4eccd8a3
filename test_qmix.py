"""Each test names the mistake it would catch and compares with something independent."""

import contextlib
import copy
import csv
import importlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch.testing import assert_close

import envs
import qmix

parametrize = pytest.mark.parametrize
torch.set_num_threads(1)
HERE = Path(__file__).parent
TESTDATA = HERE / "testdata"
LEARNERS = ["iql", "qmix", "qmix-lin", "qmix-ns", "vdn", "vdn-s"]
every_algorithm = parametrize("algo", LEARNERS)
SIZES = SimpleNamespace(obs_dim=5, state_dim=6, n_actions=4, n_agents=3, episode_limit=7)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test starts in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(**given):
    """A run of about a second, in the folder "run"."""
    settings = {
        "env": "checkers",
        "total_steps": 4000,
        "num_envs": 4,
        "batch_size": 4,
        "buffer_size": 12,
        "hidden_dim": 8,
        "mixing_dim": 4,
        "hypernet_dim": 8,
        "episodes_per_update": 2.0,
        "target_update_episodes": 6,
        "test_interval_steps": 1000,
        "test_episodes": 4,
        "threads": 1,
        "device": "cpu",
        "out": "run",
    }
    settings.update(given)
    return qmix.Config(**settings)


def make_run(**given):
    return qmix.Run(tiny(**given))


def weights(team):
    return torch.nn.utils.parameters_to_vector(team.parameters()).detach().clone()


def scatter(team, std):
    """Weights far from the gentle initial ones, so that mistakes show."""
    for parameter in team.parameters():
        torch.nn.init.normal_(parameter, std=std)


def make_team(cfg, sizes=SIZES, seed=0, std=0.7):
    torch.manual_seed(seed)
    team = qmix.Team(sizes, cfg).double()
    scatter(team, std)
    return team


def equal(here, there):
    """Fails unless all numbers are equal to the last bit."""
    assert_close(here, there, rtol=0, atol=0)


# --------------------------------------------------------------------------------- the mixers
every_mixer = parametrize(
    "algo, hypernet_dim", [*itertools.product(LEARNERS, [8]), ("qmix", 0), ("qmix-lin", 0)]
)


def make_mixer(algo, hypernet_dim):
    return make_team(tiny(algo=algo, hypernet_dim=hypernet_dim), std=2.0).mixer


@every_mixer
def test_q_tot_never_falls_when_an_agents_value_rises(algo, hypernet_dim):
    """Catches: a forgotten absolute value, an activation that is not monotone (Eq. 5)."""
    mixer = make_mixer(algo, hypernet_dim)
    q = torch.randn(50, 4, 3).double().requires_grad_()
    q_tot = mixer(q, torch.randn(50, 4, 6).double())
    (slope,) = torch.autograd.grad(q_tot.sum(), q)
    assert (slope >= 0).all()
    assert (slope > 0).any()


@every_mixer
def test_the_best_joint_action_is_each_agents_own_best(algo, hypernet_dim):
    """Catches: a mixer for which Eq. 4 (Theorem 1) is false, by all 64 joint actions."""
    mixer = make_mixer(algo, hypernet_dim)
    q = torch.randn(50, 3, 4).double()  # (states, N, A)
    state = torch.randn(50, 1, 6).double()
    joint = itertools.product(range(4), repeat=3)
    chosen = torch.stack([q[:, range(3), u] for u in joint], dim=1)  # (states, 64, N)
    q_tot = mixer(chosen, state.expand(-1, 64, -1)).sum(-1)  # sum: IQL has N values
    own = mixer(q.max(-1).values.unsqueeze(1), state).sum(-1)
    assert_close(own.squeeze(1), q_tot.max(1).values)


# ----------------------------------------------------------------------------------- the loss
def random_batch(lengths, sizes=SIZES):
    """Episodes of these lengths, every third cut off; behind the end is garbage."""
    rng = np.random.default_rng(0)
    B = len(lengths)
    T = max(lengths)
    N = sizes.n_agents
    filled = np.arange(T) < np.array(lengths)[:, None]
    terminated = rng.random((B, T)) < 0.5
    terminated[filled] = False
    terminated[np.arange(B), np.array(lengths) - 1] = np.arange(B) % 3 > 0
    avail = rng.random((B, T + 1, N, sizes.n_actions)) < 0.6
    actions = rng.integers(sizes.n_actions, size=(B, T, N))
    np.put_along_axis(avail[:, :-1], actions[..., None], True, -1)  # what was done was available
    avail[..., 0] |= ~avail.any(-1)
    batch = {
        "obs": rng.normal(size=(B, T + 1, N, sizes.obs_dim)),
        "state": rng.normal(size=(B, T + 1, sizes.state_dim)),
        "avail": avail,
        "actions": actions,
        "reward": rng.normal(size=(B, T)),
        "terminated": terminated,
        "filled": filled,
    }
    return {name: torch.from_numpy(value) for name, value in batch.items()}


def elu(x):
    return np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class SlowTeam:
    """Agents and mixer again, one agent and one step at a time, in NumPy, from the weights."""

    def __init__(self, team, algo):
        self.algo = algo
        self.w = {name: value.numpy() for name, value in team.state_dict().items()}

    def linear(self, name, x):
        return self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"]

    def hypernet(self, name, state):
        if f"{name}.weight" in self.w:
            return self.linear(name, state)
        return self.linear(f"{name}.2", np.maximum(self.linear(f"{name}.0", state), 0))

    def agents(self, episode):
        """Q (N, T+1, A): Cho et al.'s GRU in PyTorch's convention."""
        A, H = self.w["agent.fc2.weight"].shape
        N = episode["actions"].shape[1]
        q = np.zeros((N, len(episode["obs"]), A))
        for a in range(N):
            h = np.zeros(H)
            last = np.zeros(A)
            for t, obs in enumerate(episode["obs"][:, a]):
                if t > 0:
                    last = np.eye(A)[episode["actions"][t - 1, a]]
                x = self.linear("agent.fc1", np.concatenate([obs, last, np.eye(N)[a]]))
                x = self.w["agent.gru.weight_ih_l0"] @ np.maximum(x, 0)
                x_reset, x_keep, x_new = np.split(x + self.w["agent.gru.bias_ih_l0"], 3)
                y = self.w["agent.gru.weight_hh_l0"] @ h + self.w["agent.gru.bias_hh_l0"]
                y_reset, y_keep, y_new = np.split(y, 3)
                keep = sigmoid(x_keep + y_keep)
                new = np.tanh(x_new + sigmoid(x_reset + y_reset) * y_new)
                h = (1 - keep) * new + keep * h
                q[a, t] = self.linear("agent.fc2", h)
        return q

    def mix(self, q, state):
        if self.algo == "iql":
            return q
        if self.algo == "vdn":
            return q.sum(keepdims=True)
        if self.algo == "qmix-ns":
            hidden = elu(abs(self.w["mixer.hidden.weight"]) @ q + self.w["mixer.hidden.bias"])
            return abs(self.w["mixer.final.weight"]) @ hidden + self.w["mixer.final.bias"]
        v = self.hypernet("mixer.v", state)
        if self.algo == "vdn-s":
            return q.sum() + v
        if self.algo == "qmix-lin":
            return abs(self.hypernet("mixer.w", state)) @ q + v
        w1 = abs(self.hypernet("mixer.w1", state)).reshape(len(q), -1)
        hidden = elu(q @ w1 + self.linear("mixer.b1", state))
        return abs(self.hypernet("mixer.w2", state)) @ hidden + v


def slow_episode(live, old, episode, gamma, double_q, lam):
    """Q_tot and its targets. The episode is cut at its end, so padding cannot matter."""
    T = int(episode["filled"].sum())
    agents = np.arange(episode["actions"].shape[1])
    state = episode["state"]
    q = live.agents(episode)
    q_old = old.agents(episode)
    chooser = q if double_q else q_old
    avail = episode["avail"].swapaxes(0, 1)  # (N, T+1, A)
    best = np.where(avail, chooser, -np.inf).argmax(-1)  # (N, T+1)
    values = [old.mix(q_old[agents, t, best[:, t]], state[t]) for t in range(T + 1)]
    y = values[T]  # a time limit bootstraps
    if episode["terminated"][T - 1]:
        y = 0 * y
    rows = []
    for t in reversed(range(T)):
        if t < T - 1:
            y = (1 - lam) * values[t + 1] + lam * y
        y = episode["reward"][t] + gamma * y
        q_tot = live.mix(q[agents, t, episode["actions"][t]], state[t])
        rows.append((q_tot, y))
    return rows


def slow_loss(live, old, batch, *how):
    """Eq. 6 with plain loops: the loss, the mean of Q_tot and of its target."""
    rows = []
    for b in range(len(batch["filled"])):
        episode = {name: value[b].numpy() for name, value in batch.items()}
        rows += slow_episode(live, old, episode, *how)
    q_tot, target = np.array(rows).swapaxes(0, 1)
    return [np.mean((q_tot - target) ** 2), q_tot.mean(), target.mean()]


def compare_with_slow_loop(cfg, sizes, lengths):
    team = make_team(cfg, sizes)
    target_team = make_team(cfg, sizes, seed=1)
    batch = random_batch(lengths, sizes)
    how = (0.9, cfg.double_q, cfg.td_lambda)
    found = torch.stack(qmix.td_loss(team, target_team, batch, *how)).tolist()
    slow = slow_loss(SlowTeam(team, cfg.algo), SlowTeam(target_team, cfg.algo), batch, *how)
    assert found == approx(slow, rel=1e-10)


LENGTHS = [7, 3, 19, 16, 1, 2]  # not sorted
TARGETS = [{}, {"double_q": False}, {"td_lambda": 0.6}, {"td_lambda": 1.0}, {"hypernet_dim": 0}]


@parametrize("given", TARGETS, ids=str)
@every_algorithm
def test_td_loss_equals_slow_loop(algo, given):
    """Catches: a target started at s' with an empty memory, mixed axes, a mask on the wrong axis,
    a bootstrap over the end or none over a time limit, unavailable actions, padding that leaks."""
    compare_with_slow_loop(tiny(algo=algo, **given), SIZES, LENGTHS)


@parametrize("one", ["n_agents", "n_actions", "episode_limit"])
@every_algorithm
def test_td_loss_of_one_agent_one_action_one_step_equals_slow_loop(algo, one):
    """Catches: an axis of length 1 that is squeezed away or broadcast."""
    sizes = SimpleNamespace(**{**vars(SIZES), one: 1})
    lengths = np.minimum(LENGTHS, 1) if one == "episode_limit" else LENGTHS
    compare_with_slow_loop(tiny(algo=algo, td_lambda=0.3), sizes, lengths)


def authors_weights(data, which, mixer):
    starts = (f"{which}/all/", f"{which}/{mixer}/")
    names = [name for name in data if name.startswith(starts)]
    return {name.split("/")[-1]: data[name] for name in names}


@parametrize("maximum", ["double", "plain"])
@parametrize("mixer", ["qmix-2", "qmix-1", "vdn", "iql"])  # -2, -1: hypernet's layers
def test_one_update_equals_the_authors_code(mixer, maximum):
    """Catches: an unintended departure from the authors' PyMARL, at commit c971afd."""
    data = np.load(HERE / "testdata" / "pymarl.npz")
    data = {name: torch.from_numpy(data[name]) for name in data.files}
    batch = {name[6:]: value for name, value in data.items() if name.startswith("batch/")}
    batch["actions"] = batch["actions"].long()
    live = authors_weights(data, "live", mixer)
    algo, _, layers = mixer.partition("-")
    cfg = tiny(algo=algo, double_q=maximum == "double", hypernet_dim=8 * (layers == "2"))
    team = qmix.Team(SIZES, cfg)
    team.load_state_dict(live)
    target_team = qmix.Team(SIZES, cfg)
    target_team.load_state_dict(authors_weights(data, "target", mixer))
    stats = qmix.gradient_step(team, target_team, qmix.make_optimizer(team, cfg), batch, cfg)
    after = torch.cat([team.state_dict()[name].flatten() for name in live])
    expected = [data[f"{mixer}/{maximum}/{name}"] for name in ("numbers", "after")]
    assert_close([stats, after], expected, rtol=1e-5, atol=1e-6)


def before(actions):
    """What was done a step ago, -1 before the first."""
    return F.pad(actions, (0, 0, 1, 0), value=-1)


@parametrize("lengths", [[17, 41, 2, 34, 18, 33, 16], [3, 1, 9]], ids=str)
def test_unroll_equals_single_steps(lengths):
    """Catches: memory lost between the pieces of an unroll, or taken from another episode; a batch
    that must be sorted, or cut to its longest episode. The tensors have 41 rows."""
    batch = random_batch([40] * len(lengths))
    agent = make_team(tiny()).agent
    last = before(batch["actions"])
    q = qmix.unroll(agent, batch["obs"], last, lengths)
    hidden = None
    for t in range(41):
        one, hidden = agent(batch["obs"][:, [t]], last[:, [t]], hidden)
        running = torch.tensor(lengths) > t
        assert_close(q[running, t], one[running, 0])


SETTINGS = [
    {},
    {"gamma": 0.5},
    {"td_lambda": 0.6},
    {"double_q": False},
    {"reward_scale": 2.0},
    {"grad_clip": 1e-3},
    {"lr": 0.1},
    {"optimizer": "adam"},
]


@parametrize("given", SETTINGS, ids=str)
def test_gradient_step_does_what_the_setting_says(given):
    """Catches: a setting that nothing reads, a step that is not RMSprop's or Adam's first."""
    cfg = tiny(**{"gamma": 0.9, "grad_clip": 1e3, "lr": 0.01, **given})
    batch = random_batch([7, 3, 5])
    fresh = make_team(cfg)
    target_team = make_team(cfg, seed=1)
    scaled = {**batch, "reward": batch["reward"] * cfg.reward_scale}
    how = (cfg.gamma, cfg.double_q, cfg.td_lambda)
    loss, q_taken, target = qmix.td_loss(fresh, target_team, scaled, *how)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in fresh.parameters()])
    norm = gradient.norm()

    team = make_team(cfg)
    stats = qmix.gradient_step(team, target_team, qmix.make_optimizer(team, cfg), batch, cfg)
    assert_close(stats, torch.stack([loss.detach(), norm, q_taken, target]))
    gradient *= min(1.0, cfg.grad_clip / norm.item())
    size = gradient.abs() + 1e-8
    if cfg.optimizer == "rmsprop":
        size = 0.1 * gradient.abs() + 1e-5  # alpha is 0.99
    expected = weights(fresh) - cfg.lr * gradient / size
    assert_close(weights(team), expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------- acting
def act_often(epsilon=None):
    """20,000 teams of two. Action 1 is best of what is available; 0 looks better but is not."""

    def agent(obs, last_actions, hidden, agents):
        return torch.tensor([9.0, -1.0, -5.0, -7.0]).expand(20_000, 1, 2, 4), hidden

    obs = torch.zeros(20_000, 2, 1)
    avail = torch.tensor([False, True, True, True]).expand(20_000, 2, 4)
    generator = torch.Generator().manual_seed(0)
    return qmix.act(agent, obs, avail, None, epsilon, generator)[0]


HALF = torch.full((20_000, 2), 0.5)


def test_random_actions_are_even_among_what_is_available():
    """Catches: exploration over unavailable actions, a biased choice."""
    share = act_often(HALF).flatten().bincount(minlength=4) / 40_000
    assert share.tolist() == approx([0, 2 / 3, 1 / 6, 1 / 6], abs=0.02)
    assert share[0] == 0


def test_each_agent_explores_by_a_draw_of_its_own():
    """Catches: one draw for the whole team, with which both would be greedy in 56 % of cases."""
    both = (act_often(HALF) == 1).all(-1).float().mean().item()
    assert both == approx(4 / 9, abs=0.02)


def test_each_agent_explores_by_its_own_epsilon():
    """Catches: the epsilon of one agent or episode used for another."""
    epsilon = torch.tensor([[0.0, 0.6], [0.3, 0.0]])
    actions = act_often(epsilon.repeat(10_000, 1)).view(10_000, 2, 2)
    explored = (actions > 1).float().mean(0)  # a third of random actions are the best one
    assert_close(explored, epsilon * 2 / 3, atol=0.02, rtol=0)


def test_greedy_action_is_the_best_available():
    """Catches: a mask that gives unavailable actions a value, such as 0."""
    assert (act_often() == 1).all()


SCHEDULE = [  # steps, start, finish, spread -> epsilon of agents that draw 0, 1/3, 2/3, 1
    (0, 0.9, 0.1, 0.0, [0.9] * 4),
    (500, 0.9, 0.1, 0.0, [0.5] * 4),
    (10**9, 0.9, 0.1, 0.0, [0.1] * 4),
    (900, 1.0, 0.01, 0.27, [0.109, 0.109, 0.109, 0.27]),
    (1000, 1.0, 0.01, 0.27, [0.01, 0.03, 0.09, 0.27]),
]


@parametrize("steps, start, finish, spread, expected", SCHEDULE)
def test_epsilon_schedule(steps, start, finish, spread, expected):
    """Catches: a schedule that overshoots, counts episodes or forgets the spread."""
    cfg = tiny(epsilon_start=start, epsilon_finish=finish, epsilon_spread=spread)
    cfg.epsilon_anneal_steps = 1000
    run = SimpleNamespace(cfg=cfg, counts={"env_steps": steps, "episodes": 7, "updates": 7})
    draws = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0])
    assert_close(qmix.Run.epsilon(run, draws), torch.tensor(expected))


def test_actions_are_what_the_network_says_of_each_agents_history():
    """Catches: memory reset at each step or kept over episodes, a last action that is wrong."""
    run = make_run(env="skirmish:3m", epsilon_start=0.0, epsilon_finish=0.0)
    scatter(run.team, 0.5)
    run.play()
    run.play()
    episodes = run.replay.sample(8, run.generators["sample"])
    q, _ = run.team.agent(episodes["obs"], before(episodes["actions"]))
    best = q.masked_fill(~episodes["avail"], -math.inf).argmax(-1)[:, :-1]
    filled = episodes["filled"]
    equal(best[filled], episodes["actions"][filled])


# ------------------------------------------------------------------------- rollout and replay
class Script:
    """A probe: episode b lasts lengths[b] steps; a time limit cuts off 1 and 3 there.

    state shows the episode's id, 100 * round + b, and the step t; obs too, with `own` added. A step
    pays id + t / 10, or pay[round - 1] * (b + 1); padding pays a million. Agent 0 must not choose
    t % 3.
    """

    n_envs = 4
    n_agents = 2
    n_actions = 3
    obs_dim = 2
    state_dim = 2
    episode_limit = 6
    device = torch.device("cpu")
    voided = 7
    own = torch.tensor([[0.25], [0.5]])  # what tells the agents' observations apart

    lengths = (2, 6, 1, 4)
    pay = None
    void = (False, False, False, False)  # episodes that crash
    told_in = range(100)  # the rounds that tell dead_allies
    fails_in = 0  # the round in which the game fails
    round = 0
    closed = 0

    def reset(self):
        self.round += 1
        self.t = 0
        return self.look()

    def step(self, actions):
        if self.round == self.fails_in:
            raise envs.EnvFailure("the game failed")
        self.t += 1
        return self.look()

    def look(self):
        b = torch.arange(4)
        t = torch.full((4,), self.t)
        lengths = torch.tensor(self.lengths)
        state = torch.stack([100 * self.round + b, t], dim=1).float()
        avail = torch.ones(4, 2, 3, dtype=torch.bool)
        avail[:, 0, self.t % 3] = False
        reward = state[:, 0] + t / 10
        if self.pay:
            reward = self.pay[self.round - 1] * (b + 1.0)
        reward[t > lengths] = 1e6
        over = t == lengths
        cut = b % 2 == 1
        info = {
            "battle_won": (t >= lengths) & (b != 1),
            "dead_enemies": 10 - t,
            "void": torch.tensor(self.void),
        }
        if self.round in self.told_in:
            info["dead_allies"] = t
        obs = state.unsqueeze(1) + self.own  # (B, N, 2)
        return envs.Step(obs, state, avail, reward, over & ~cut, over & cut, info)

    def close(self):
        self.closed += 1


@pytest.fixture
def probe(monkeypatch):
    """Every environment is this one; probe.asked: what envs.make was given."""
    env = Script()
    env.asked = []

    def make(*arguments):
        env.asked.append(arguments)
        return env

    monkeypatch.setattr(envs, "make", make)
    return env


def play_random(env):
    agent = qmix.Agent(env.obs_dim, env.n_actions, env.n_agents, 8)
    generator = torch.Generator().manual_seed(env.round)

    def choose(step, memory):
        return qmix.act(agent, step.obs, step.avail, memory, torch.ones(4, 2), generator)

    return qmix.rollout(env, choose)


def check_rows(episodes):
    """Each row is of its episode and its step."""
    filled = episodes["filled"]
    happened = F.pad(filled, (1, 0), value=True)  # (B, T+1)
    state = episodes["state"]
    avail = episodes["avail"]
    name = state[:, :1, 0]  # (B, 1)
    t = torch.arange(state.shape[1])
    assert (state[:, :, 0] == name)[happened].all()
    assert (state[:, :, 1] == t)[happened].all()
    assert (episodes["obs"] == state.unsqueeze(2) + Script.own)[happened].all()
    assert (avail[:, :, 0].int().argmin(-1) == t % 3)[happened].all()
    assert avail[:, :-1].gather(-1, episodes["actions"].unsqueeze(-1))[filled].all()
    assert_close(episodes["reward"][filled], (name + t[1:] / 10)[filled])
    ends = filled & ~F.pad(filled[:, 1:], (0, 1)) & (name % 2 == 0)  # the others were cut off
    equal(episodes["terminated"][filled], ends[filled])


def test_rollout_stores_each_row_at_its_step():
    """Catches: a row a step or episode away, a time limit learned as an end, an end off by one."""
    check_rows(play_random(Script())[0])


def test_rollout_ends_where_episodes_end():
    """Catches: padding counted in returns or lengths, or marked as filled."""
    episodes, facts = play_random(Script())
    assert facts["length"].tolist() == [2, 6, 1, 4]
    assert facts["return"].tolist() == approx([200.3, 608.1, 102.1, 413.0])
    equal(episodes["filled"], torch.arange(6) < torch.tensor([[2], [6], [1], [4]]))


def test_facts_are_those_of_an_episodes_last_step():
    """Catches: facts of the first step, of padding, of another episode."""
    _, facts = play_random(Script())
    assert facts["battle_won"].tolist() == [True, False, True, True]
    assert facts["dead_allies"].tolist() == [2, 6, 1, 4]


def test_void_episodes_are_left_out():
    """Catches: a crashed game learned from or counted, another episode left out for it."""
    env = Script()
    env.void = (False, True, True, False)
    episodes, facts = play_random(env)
    assert facts["length"].tolist() == [2, 4]
    assert ids(episodes) == [100, 103]
    assert {len(value) for value in episodes.values()} == {2}


def fill_replay(rounds):
    """Rounds of four episodes; in the fourth they are shorter than those they replace."""
    env = Script()
    replay = qmix.Replay(env, 6, torch.device("cpu"))
    for count in range(1, rounds + 1):
        if count == 4:
            env.lengths = (1, 1, 3, 1)
        replay.add(play_random(env)[0])
    return replay


def sample(replay, n, seed=0):
    return replay.sample(n, torch.Generator().manual_seed(seed))


def ids(episodes):
    return episodes["state"][:, 0, 0].tolist()


@parametrize("rounds", [1, 2, 3, 4])
def test_replay_keeps_the_newest_episodes_and_samples_each_once(rounds):
    """Catches: sampling with replacement or of what was never filled, a wrong oldest one."""
    played = [100 * count + b for count in range(1, rounds + 1) for b in range(4)]
    assert sorted(ids(sample(fill_replay(rounds), 6))) == played[-6:]


@parametrize("rounds", [1, 3, 4])
def test_replay_rows_belong_to_one_episode(rounds):
    """Catches: rows torn apart between tensors."""
    check_rows(sample(fill_replay(rounds), 6))


def test_a_sample_is_sorted_and_cut_to_its_longest_episode():
    """Catches: padding computed for nothing, what is left of a longer episode taken for new."""
    batch = sample(fill_replay(4), 6)
    assert batch["filled"].sum(1).tolist() == [4, 3, 1, 1, 1, 1]
    assert batch["reward"].shape[1] == 4
    assert batch["obs"].shape[1] == 5


def test_every_episode_has_its_turn_in_samples():
    """Catches: an episode that is never learned from."""
    replay = fill_replay(3)
    assert len({ids(sample(replay, 1, seed))[0] for seed in range(60)}) == 6


# ----------------------------------------------------------------------------------- training
@every_algorithm
def test_every_weight_is_trained(algo):
    """Catches: parameters of the mixer that are missing from the optimiser."""
    run = make_run(algo=algo, env="skirmish:3m")
    scatter(run.team, 0.3)
    old = copy.deepcopy(run.team)
    run.play()
    run.learn()
    for now, then in zip(run.team.parameters(), old.parameters()):
        assert not torch.equal(now, then)


def test_an_update_is_due_for_each_two_episodes(probe):
    """Catches: updates before the replay holds a batch, too many, too few."""
    run = make_run(batch_size=5)
    due = []
    for _ in range(4):
        run.play()
        due.append(run.updates_due())
        run.learn()
    assert due == [0, 2, 2, 2]  # after 4, 8, 12 and 16 episodes
    assert run.counts == {"env_steps": 52, "episodes": 16, "updates": 6}


def updated_target(updates, **given):
    """Where this update leaves a target that is 4, if the live network is 8."""
    run = SimpleNamespace(cfg=tiny(**given), counts={"updates": updates})
    run.team = torch.nn.Linear(1, 1)
    run.target_team = torch.nn.Linear(1, 1).requires_grad_(False)
    run.team.weight.data.fill_(8.0)
    run.target_team.weight.fill_(4.0)
    qmix.Run.update_target(run)
    assert run.team.weight == 8
    return run.target_team.weight.item()


def test_target_is_copied_when_enough_episodes_are_learned():
    """Catches: a target copied always, never, or at each update but those where it should be."""
    assert [updated_target(n) for n in range(1, 8)] == [4, 4, 8, 4, 4, 8, 4]


def test_copies_keep_their_distance():
    """Catches: a fraction of an episode per update whose rounding copies twice, or not at all."""
    given = {"episodes_per_update": 0.3, "target_update_episodes": 20}
    copied = [n for n in range(1, 2001) if updated_target(n, **given) == 8]
    assert len(copied) == 30
    assert set(np.diff(copied)) <= {66, 67}


def test_soft_target_moves_by_its_share_at_each_update():
    """Catches: a share of the wrong side, a copy besides: at update 3 one would be due."""
    moved = [updated_target(n, target_tau=0.25) for n in range(1, 5)]
    assert moved == [0.75 * 4 + 0.25 * 8] * 4


def test_target_starts_as_a_copy_and_follows_the_updates(probe):
    """Catches: a target that nothing updates, or that shares its weights with the live networks."""
    run = make_run()
    start = weights(run.team)
    run.play()
    run.learn()  # update 1
    assert not torch.equal(weights(run.team), start)
    equal(weights(run.target_team), start)
    run.play()
    run.learn()  # updates 2 and 3, which makes six episodes
    equal(weights(run.target_team), weights(run.team))


RATES = [(False, 3200, 1e-3), (True, 1000, 1e-3), (True, 3200, 0.46e-3), (True, 9000, 0.1e-3)]


@parametrize("lr_anneal, env_steps, expected", RATES)
def test_learning_rate(probe, lr_anneal, env_steps, expected):
    """Catches: lr_anneal that nothing reads or that is always on, a fall that goes on too long."""
    run = make_run(lr=1e-3, lr_anneal=lr_anneal)
    run.counts["env_steps"] = env_steps  # of 4000
    run.learn()
    assert run.optimizer.param_groups[0]["lr"] == approx(expected)


def states(run):
    return {name: generator.get_state() for name, generator in run.generators.items()}


def test_learning_moves_the_numbers_of_sampling_alone(probe):
    """Catches: batches drawn from the numbers of exploration."""
    run = make_run()
    run.play()
    old = states(run)
    run.learn()
    equal(states(run)["explore"], old["explore"])
    assert not torch.equal(states(run)["sample"], old["sample"])


def no_action(step, memory):
    return torch.zeros(4, 2, dtype=torch.int64), None


def test_epsilons_differ_between_agents_and_rounds(probe, monkeypatch):
    """Catches: with a spread, one epsilon for a whole team or for a whole run."""
    run = make_run(epsilon_start=0.0, epsilon_finish=0.01, epsilon_spread=1.0)
    seen = []

    def policy(epsilon):
        seen.append(epsilon)
        return no_action

    monkeypatch.setattr(run, "policy", policy)
    run.play()
    run.play()
    assert seen[0].shape == (4, 2)
    assert len(torch.stack(seen).unique()) == 16


# --------------------------------------------------------------------------------- evaluation
def test_evaluation_is_as_long_as_asked(probe):
    """Catches: another number of episodes, variance for the deviation, a mean over padding."""
    probe.pay = (1.0, 10.0)
    row = qmix.measure(make_run(test_episodes=6))
    returns = [2, 12, 3, 16, 20, 120]
    assert probe.round == 2
    assert row["test_return"] == approx(np.mean(returns))
    assert row["test_return_std"] == approx(np.std(returns))


def test_evaluation_plays_more_where_episodes_are_void(probe):
    """Catches: a mean over fewer episodes than asked."""
    probe.pay = (1.0, 10.0)
    probe.void = (False, True, False, False)
    found = qmix.greedy_episodes(probe, no_action, 4)
    assert found["test_return"] == approx(np.mean([2, 3, 16, 20]))


@parametrize("told_in", [[1], [2]])
def test_a_fact_that_is_not_always_told_is_none(probe, told_in):
    """Catches: a KeyError, or a mean over some of the episodes."""
    probe.told_in = told_in
    found = qmix.greedy_episodes(probe, no_action, 8)
    assert found["dead_allies"] is None
    assert found["dead_enemies"] == 10 - 13 / 4


def test_evaluation_is_greedy():
    """Catches: test episodes that explore: on Checkers greedy ones are all the same."""
    run = make_run(epsilon_finish=1.0)
    run.play()
    assert np.std(run.returns) > 0.1
    assert qmix.measure(run)["test_return_std"] < 1e-4


KEPT = "team target_team optimizer replay replay_added generators counts".split()


def kept(run_state):
    return {name: run_state[name] for name in KEPT}


def test_evaluation_leaves_the_training_as_it_was():
    """Catches: test episodes in the replay or the counts, random numbers that move on."""
    run = make_run(env="skirmish:3m")
    run.play()
    run.learn()
    old = copy.deepcopy(kept(qmix.run_state(run)))
    qmix.measure(run)
    equal(kept(qmix.run_state(run)), old)


def test_epsilon_column_is_that_of_an_average_agent(probe):
    """Catches: a spread that metrics.csv does not show: (1 - 0.01) / log(100) is 0.215."""
    run = make_run(epsilon_finish=0.01, epsilon_spread=1.0, epsilon_anneal_steps=1)
    run.counts["env_steps"] = 1
    assert qmix.measure(run)["epsilon"] == approx(0.215, abs=0.005)


# --------------------------------------------------------------------------------- whole runs
def main(*arguments):
    """The exit code, whichever way it leaves."""
    try:
        return qmix.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return leaving.code


def saved(out="run", name="checkpoint.pt"):
    return torch.load(Path(out, name), weights_only=True)


def metrics(out="run"):
    """The rows of metrics.csv without the seconds, as text: equal means to the last bit."""
    with open(Path(out, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows


def column(name):
    return [float(row[name] or "nan") for row in metrics()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The settings of a run that was never stopped."""
    cfg = tiny(out=tmp_path_factory.mktemp("whole"), lr_anneal=True)
    qmix.train(cfg)
    return cfg


def like(cfg, **given):
    return qmix.Config(**{**vars(cfg), **given})


def test_same_seed_gives_same_numbers(whole):
    """Catches: anything random that --seed does not reach."""
    qmix.train(like(whole, out="run"))
    assert metrics() == metrics(whole.out)
    assert len(set(column("loss"))) == 5


def test_other_seed_gives_other_numbers(probe):
    """Catches: --seed parsed and never used, for weights, environments or random numbers."""
    one = make_run(seed=1)
    other = make_run(seed=2)
    seeds = [asked[3] for asked in probe.asked]
    assert seeds[0] != seeds[1]
    assert not torch.isclose(weights(one.team), weights(other.team)).any()
    for name, state in states(one).items():
        assert not torch.equal(state, states(other)[name])


def test_tests_come_at_the_start_after_each_interval_and_at_the_end(probe):
    """Catches: a test too early, twice or never: a round has 12 steps, the interval 30."""
    probe.lengths = (2, 5, 1, 4)
    qmix.train(tiny(total_steps=100, test_interval_steps=30))
    assert column("env_steps") == [0, 36, 60, 96, 108]


def train_stopping_after_each_round(cfg, monkeypatch):
    """Train in pieces of one round, each from the checkpoint of the one before."""
    save = qmix.RunFolder.checkpoint

    def checkpoint(folder):
        save(folder)
        folder.checkpoint_due = 0.0  # in each round

    def one_round(run, between_rounds):
        between_rounds()
        run.play()
        run.learn()
        between_rounds()

    monkeypatch.setattr(qmix.RunFolder, "checkpoint", checkpoint)
    monkeypatch.setattr(qmix, "loop", one_round)
    steps = qmix.train(cfg)["env_steps"]
    while steps < cfg.total_steps:
        old = steps
        steps = qmix.train(cfg, resume=True)["env_steps"]
        assert steps > old


RESUMED = {
    "authors": {"total_steps": 2400, "lr_anneal": True, "test_interval_steps": 500},
    "skirmish": {
        "env": "skirmish:3m",
        "total_steps": 700,
        "test_interval_steps": 200,
        "algo": "iql",
        "optimizer": "adam",
        "target_tau": 0.1,
        "epsilon_spread": 0.9,
    },
}


@parametrize("name", RESUMED)
def test_a_run_that_stops_after_each_round_equals_one_that_never_stops(name, monkeypatch):
    """Catches: what a checkpoint forgets: a generator, a count, a mean, the place in the replay."""
    never = tiny(out="never", **RESUMED[name])
    often = like(never, out="often")
    qmix.train(never)
    train_stopping_after_each_round(often, monkeypatch)
    assert metrics(often.out) == metrics(never.out)
    equal(kept(saved(often.out)), kept(saved(never.out)))


def die_at_rename(moment, cfg, resume):
    """A run that kills itself with -9 before it renames a file for the moment-th time."""
    rename = os.replace
    renames = itertools.count(1)

    def replace(source, target):
        if next(renames) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace
    qmix.train(cfg, resume)


def test_a_run_that_is_killed_resumes_exactly(folder, whole):
    """Catches: a checkpoint half written, rows lost or written twice, a start without a checkpoint,
    a command line that does not run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qmix"])  # torch is imported once
    cfg = like(whole, out=folder / "run", checkpoint_seconds=0.0)
    resume = False
    for moment in (2, 3, 6, 2):  # 1: the first checkpoint, 2: best.pt, 3: the first row
        process = context.Process(target=die_at_rename, args=(moment, cfg, resume))
        process.start()
        process.join()
        assert process.exitcode == -9
        resume = True
    command = [sys.executable, "qmix.py", "--resume", cfg.out]
    ended = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("result: {")
    assert metrics() == metrics(whole.out)


@parametrize("cost, gap", [(2.0, 63), (0.0, 6)])
def test_checkpoints_cost_at_most_a_thirtieth_of_the_time(probe, monkeypatch, cost, gap):
    """Catches: a run that mostly saves, or that saves more often than checkpoint_seconds."""
    clock = [0.0]
    times = []

    def play(run):
        run.counts["env_steps"] += 10
        clock[0] += 1.0

    def write(path, state):
        if path.name == "checkpoint.pt":
            times.append(clock[0])
            clock[0] += cost

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(qmix.Run, "play", play)
    monkeypatch.setattr(qmix, "write_checkpoint", write)
    qmix.train(tiny(total_steps=2000, checkpoint_seconds=5.0))
    assert np.diff(times)[:3].tolist() == [gap] * 3


MEAN = np.mean([2, 12, 3, 16])  # the probe's returns where a step pays 1 * (b + 1)
STD = np.std([2, 12, 3, 16])
NAN = math.nan


def scripted_run(probe, monkeypatch, tests=(3.0, 1.0, 2.0)):
    """Two rounds of 13 steps and three tests, of which nothing is left to chance."""
    probe.pay = (tests[0], 0.0, tests[1], 9.0, tests[2])
    updates = itertools.count(1.0)

    def gradient_step(team, *_):
        number = next(updates)
        team.agent.fc2.bias.data.fill_(number)
        return torch.tensor([1.0, 2.0, 3.0, 4.0]) * number

    monkeypatch.setattr(qmix, "gradient_step", gradient_step)
    cfg = tiny(
        total_steps=26,
        test_interval_steps=13,
        epsilon_anneal_steps=26,
        epsilon_finish=0.5,
        checkpoint_seconds=1e6,
    )
    return qmix.train(cfg)


# One update after the first four episodes, two after the next four
TABLE = {
    "env_steps": [0, 13, 26],
    "episodes": [0, 4, 8],
    "updates": [0, 1, 3],
    "epsilon": [1.0, 0.75, 0.5],
    "train_return": [NAN, 0.0, 9 * MEAN],
    "test_return": [3 * MEAN, MEAN, 2 * MEAN],
    "test_return_std": [3 * STD, STD, 2 * STD],
    "test_win_rate": [0.75] * 3,
    "loss": [NAN, 1.0, 2.5],
    "grad_norm": [NAN, 2.0, 5.0],
    "q_taken": [NAN, 3.0, 7.5],
    "target": [NAN, 4.0, 10.0],
    "dead_allies": [13 / 4] * 3,
    "dead_enemies": [27 / 4] * 3,
    "voided": [7] * 3,
}


def test_a_scripted_run_gives_a_table_known_in_advance(probe, monkeypatch):
    """Catches: a column that is missing, constant, swapped, not reset or taken from padding."""
    scripted_run(probe, monkeypatch)
    assert list(metrics()[0]) == list(TABLE)
    for name, expected in TABLE.items():
        assert column(name) == approx(expected, nan_ok=True), name


@parametrize("tests, update", [((3.0, 1.0, 2.0), 0), ((1.0, 3.0, 2.0), 1)])
def test_best_pt_holds_the_weights_of_the_best_test(probe, monkeypatch, tests, update):
    """Catches: the worst, the last, or one that is judged by training."""
    scripted_run(probe, monkeypatch, tests)
    found = saved(name="best.pt")["team"]["agent.fc2.bias"]
    assert found.int().tolist() == [update] * 3  # at the start they are fractions


def test_result_says_what_the_run_came_to(probe, monkeypatch):
    """Catches: the best return passed off as the last, a count that is not the run's."""
    facts = scripted_run(probe, monkeypatch)
    expected = {
        "env_steps": 26,
        "updates": 3,
        "test_return": 2 * MEAN,
        "best_test_return": 3 * MEAN,
    }
    assert {name: facts[name] for name in expected} == approx(expected)


def test_a_run_leaves_four_files(probe, monkeypatch):
    """Catches: an environment left open, a last checkpoint or config.json of something else."""
    scripted_run(probe, monkeypatch)
    assert probe.closed == 1
    assert saved()["counts"] == {"env_steps": 26, "episodes": 8, "updates": 3}
    settings = json.loads(Path("run", "config.json").read_text())
    assert {**settings, "env_args": ()} == vars(qmix.load("run").config)
    names = {path.name for path in Path("run").iterdir() if "tfevents" not in path.name}
    assert names == {"config.json", "metrics.csv", "checkpoint.pt", "best.pt"}


def error_line(capsys, code, *arguments):
    """The one line that this command line ends with."""
    assert main(*arguments) == code
    text = capsys.readouterr().err
    assert text.startswith("error: "), text
    assert text.count("\n") == 1, text
    return text


@parametrize("fails_in", [3, 4])  # the second test, the second round
def test_a_game_that_fails_ends_the_run_with_a_good_checkpoint(probe, capsys, fails_in):
    """Catches: a traceback, an environment left open, a checkpoint that is gone."""
    probe.fails_in = fails_in
    text = error_line(capsys, 1, "--out=run", "--total-steps=500", "--test-interval-steps=13")
    assert text == "error: the game failed\n"
    assert probe.closed == 1
    assert saved()["counts"]["env_steps"] == 0


def nan_loss(loss):
    return loss * math.nan


def nan_gradient(loss):
    return loss + (loss * 0).sqrt()  # the slope of a root at 0 is infinite


@parametrize("spoil", [nan_loss, nan_gradient])
def test_nan_ends_the_run_with_a_good_checkpoint(probe, monkeypatch, capsys, spoil):
    """Catches: a run that goes on with NaN weights and saves them."""
    real = qmix.td_loss

    def td_loss(*arguments):
        loss, *means = real(*arguments)
        return spoil(loss), *means

    monkeypatch.setattr(qmix, "td_loss", td_loss)
    text = error_line(capsys, 1, "--out=run", "--total-steps=500", "--batch-size=4")
    assert text.endswith("not finite at update 1\n")
    for weight in saved()["team"].values():
        assert weight.isfinite().all()


def test_ctrl_c_gives_exit_code_130(monkeypatch):
    """Catches: a traceback, an end that looks like success."""

    def train(cfg, resume):
        raise KeyboardInterrupt

    monkeypatch.setattr(qmix, "train", train)
    assert main("--env", "two-step") == 130


PLATEAUS = {  # greedy return, and the loss of what a mixer cannot represent
    "qmix": (8, 0.0),
    "qmix-ns": (8, 0.0),
    "qmix-lin": (7, 0.5625),
    "vdn": (7, 0.5625),
    "vdn-s": (7, 0.5625),
    "iql": (7, 1.945),
}


@every_algorithm
def test_two_step_game_comes_out_as_in_the_paper(algo):
    """Catches: a mixer that can represent too little or too much."""
    cfg = qmix.configure(
        "two-step",
        algo=algo,
        seed=7,
        lr=0.01,
        total_steps=4000,
        hidden_dim=32,
        target_update_episodes=50,
        test_interval_steps=500,
        device="cpu",
        out="run",
    )
    best, plateau = PLATEAUS[algo]
    assert qmix.train(cfg)["test_return"] == best
    loss = np.mean(column("loss")[-3:])
    assert loss == approx(plateau, rel=0.1, abs=0.01)


def smoke(**given):
    facts = qmix.train(tiny(total_steps=250, test_interval_steps=250, **given))
    assert facts["env_steps"] >= 250
    assert facts["updates"] >= 1
    assert math.isfinite(facts["test_return"])


@every_algorithm
def test_smoke_of_algorithm(algo):
    """Catches: an algorithm that does not run, or never updates."""
    smoke(algo=algo, env="two-step")


MAPS = "3m 5m 8m 5m_vs_6m 2s3z 3s5z 1c3s5z".split()
CHECKERS = "checkers checkers-v0 checkers-v1 checkers-v2 checkers-v3".split()


@parametrize("env", [*CHECKERS, *(f"skirmish:{name}" for name in MAPS)])
def test_smoke_of_environment(env):
    """Catches: an environment that does not run."""
    smoke(env=env)


def test_compile_is_for_the_step_of_an_environment(monkeypatch):
    """Catches: --compile that nothing reads."""
    compiled = []
    monkeypatch.setattr(torch, "compile", compiled.append)
    make_run(compile=True)
    assert compiled[0].__name__ == "step"


def test_threads_reach_torch(probe, monkeypatch):
    """Catches: --threads that nothing reads."""
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    qmix.train(tiny(threads=2, total_steps=1))
    assert given == [2]


# -------------------------------------------------------------------------------- checkpoints
def as_read(run):
    """The state of a run as read_checkpoint returns it."""
    return {**qmix.run_state(run), "config": run.cfg}


def test_a_checkpoint_is_cut_to_the_longest_episode(probe):
    """Catches: checkpoints full of padding, rows that are lost."""
    probe.lengths = (2, 3, 1, 4)
    run = make_run()
    run.play()
    state = as_read(run)
    assert state["replay"]["obs"].shape[:2] == (4, 5)  # the last step has an observation after it
    again = make_run()
    qmix.restore(again, state)
    equal(sample(again.replay, 4), sample(run.replay, 4))


def test_a_checkpoint_of_another_kind_of_device_can_be_resumed(probe):
    """Catches: a run from a GPU, whose generators' states have 16 bytes, that a CPU refuses."""
    run = make_run()
    run.play()
    run.learn()
    state = as_read(run)
    state["generators"]["explore"] = torch.zeros(16, dtype=torch.uint8)
    again = make_run()
    fresh = states(again)["explore"]
    qmix.restore(again, state)
    equal(states(again), {**states(run), "explore": fresh})


def test_a_resumed_run_gives_worker_environments_other_seeds(probe):
    """Catches: the episodes from the start played once more after each resume."""
    cfg = tiny(total_steps=26)
    qmix.train(cfg)
    qmix.train(cfg, resume=True)
    qmix.train(cfg, resume=True)
    seeds = [asked[3] for asked in probe.asked]
    assert seeds[0] != seeds[1]
    assert seeds[1] == seeds[2]  # both go on at the same step


def test_a_resumed_run_counts_its_seconds_on(probe):
    """Catches: seconds that start at 0 again."""
    run = make_run()
    qmix.restore(run, {**as_read(run), "seconds": 10_000.0})
    assert qmix.measure(run)["seconds"] > 10_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory, in best.pt a team whose weights show mistakes."""
    cfg = tiny(out=tmp_path_factory.mktemp("trained"), env="skirmish:3m", total_steps=200)
    qmix.train(cfg)
    team = make_team(cfg, envs.make(cfg.env, 1), std=1.0).float()
    best = Path(cfg.out, "best.pt")
    torch.save({**saved(cfg.out), "team": team.state_dict()}, best)
    return SimpleNamespace(out=cfg.out, best=str(best), agent=team.agent)


def damage(trained, change):
    """A checkpoint that `change` has changed, in the file "bad"."""
    state = saved(trained.out)
    change(state)
    torch.save(state, "bad")


def check_refusals(capsys):
    """--resume and --evaluate say that it is a bad checkpoint."""
    for flag in ("--resume", "--evaluate"):
        assert "is not a checkpoint" in error_line(capsys, 2, flag, "bad")


def test_a_missing_checkpoint_is_refused(capsys):
    """Catches: a traceback, a resume that starts anew without a word."""
    check_refusals(capsys)


@parametrize("size", [0, 1000])
def test_a_file_that_is_empty_or_cut_short_is_refused(trained, capsys, size):
    """Catches: a traceback, a resume that starts anew without a word."""
    whole = Path(trained.out, "checkpoint.pt").read_bytes()
    Path("bad").write_bytes(whole[:size])
    check_refusals(capsys)


def add_a_setting(state):
    state["config"]["learning"] = 3


def forget_a_weight(state):
    del state["team"]["agent.fc2.bias"]


@parametrize("change", [dict.clear, add_a_setting, forget_a_weight])
def test_a_checkpoint_with_other_content_is_refused(trained, capsys, change):
    """Catches: a traceback, a setting dropped in silence, weights that stay as they were drawn."""
    damage(trained, change)
    check_refusals(capsys)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_checkpoint_cannot_run_code(trained, capsys, monkeypatch):
    """Catches: a pickle that is loaded with all its powers."""
    damage(trained, lambda state: state.update(team=Bomb()))
    check_refusals(capsys)
    assert not Path("exploded").exists()


def contents(out):
    return {path: path.read_bytes() for path in Path(out).iterdir()}


@parametrize(
    "flag, value, words",
    [
        ("--hidden-dim", 16, "size mismatch"),
        ("--buffer-size", 6, "another buffer_size"),
        ("--buffer-size", 60, "another buffer_size"),
        ("--optimizer", "adam", "another optimizer"),
        ("--algo", "qmix-ns", "another algo"),
        ("--env", "checkers-v2", "another env"),
        ("--episodes-per-update", 90, "another episodes_per_update"),
    ],
)
def test_resuming_with_what_does_not_fit_is_refused(whole, capsys, flag, value, words):
    """Catches: a traceback, a run that waits for updates in silence, a folder overwritten."""
    old = contents(whole.out)
    assert words in error_line(capsys, 2, "--resume", whole.out, flag, value)
    assert contents(whole.out) == old


# ------------------------------------------------------------------------- settings and flags
BAD = [
    ("--env nowhere", "two-step"),
    ("--algo ppo", "qmix-lin"),
    ("--optimizer sgd", "rmsprop"),
    ("--nope 3", "nope"),
    ("--lr nan", "--lr"),
    ("--lr fast", "lr"),
    ("--lr", "lr"),
    ("--gamma 1.5", "--gamma"),
    ("--double-q False", "False"),
    ("--epsilon-spread 0.001", "--epsilon-finish"),
    ("--epsilon-spread 0.5 --epsilon-finish 0", "--epsilon-finish"),
    ("--batch-size 9999", "--batch-size"),
    ("--num-envs 9999", "--num-envs"),
    ("--buffer-size 1000000000000", "too large"),
    ("--device tpu", "tpu"),
    ("--device cuda:77", "cuda:77"),
    ("--env-args a=1", "--env-args"),
    ("--out /dev/null/x", "null"),
    ("--out {run}", "--resume"),
    ("--record x.gif", "--evaluate"),
    ("--evaluate {run} --episodes 0", "--episodes"),
    ("--evaluate {run} --record x.mp4", ".gif"),
    ("--evaluate {run} --env two-step", "obs must be (.., 3, 30), not (4, 2, 3)"),
]


@parametrize("arguments, word", BAD)
def test_bad_input_is_said_with_code_2(trained, capsys, monkeypatch, arguments, word):
    """Catches: a traceback, a silent default, a run directory overwritten."""
    monkeypatch.setattr(qmix, "loop", None)  # what is not refused fails
    old = contents(trained.out)
    assert main(*arguments.format(run=trained.out).split()) == 2
    text = capsys.readouterr().err
    assert word in text
    assert "Traceback" not in text
    assert contents(trained.out) == old


ABOVE_0 = (
    "total_steps num_envs lr batch_size buffer_size episodes_per_update target_update_episodes "
    "epsilon_anneal_steps reward_scale grad_clip hidden_dim mixing_dim test_interval_steps "
    "test_episodes env_timeout"
).split()
AT_LEAST_0 = (
    "seed threads gamma checkpoint_seconds target_tau epsilon_start epsilon_finish "
    "epsilon_spread td_lambda hypernet_dim"
).split()
REFUSED = [
    *itertools.product(ABOVE_0, [0, -1]),
    *itertools.product(AT_LEAST_0, [-1, math.nan]),
    ("seed", 1.5),
    ("lr", "1"),
    ("lr", None),
    ("double_q", "False"),
]


@parametrize("name, value", REFUSED)
def test_a_setting_out_of_its_bounds_is_refused(name, value):
    """Catches: a run that never ends, never learns or divides by zero, "False" that is true."""
    with pytest.raises(envs.UsageError, match=f"^--{name.replace('_', '-')} must be .*$"):
        qmix.Config("two-step", **{name: value})


def test_numbers_of_numpy_and_paths_are_settings(probe):
    """Catches: a run that trains to its end and cannot be read back."""
    numbers = {"seed": np.int64(3), "gamma": np.float32(0.5), "double_q": np.bool_(True)}
    cfg = tiny(total_steps=20, out=Path("run"), **numbers)
    qmix.train(cfg)
    assert qmix.load(Path("run")).config == cfg


AUTHORS = {
    "batch_size": 32,
    "buffer_size": 5000,
    "target_update_episodes": 200,
    "episodes_per_update": 1.0,
    "epsilon_start": 1.0,
    "epsilon_finish": 0.05,
    "epsilon_anneal_steps": 50_000,
    "epsilon_spread": 0.0,
    "hidden_dim": 64,
    "mixing_dim": 32,
    "hypernet_dim": 64,
    "optimizer": "rmsprop",
    "lr": 5e-4,
    "lr_anneal": False,
    "gamma": 0.99,
    "grad_clip": 10.0,
    "double_q": True,
    "td_lambda": 0.0,
    "target_tau": 0.0,
    "reward_scale": 1.0,
}


def test_defaults_for_starcraft_are_the_authors():
    """Catches: a preset, or a default that was tuned for something else."""
    settings = vars(qmix.configure("smac:3m"))
    assert {name: settings[name] for name in AUTHORS} == AUTHORS


FAMILIES = [("two-step",) * 2, ("checkers-v3", "checkers"), ("skirmish:3m", "skirmish")]


@parametrize("env, preset", FAMILIES)
def test_presets_are_for_their_environments(env, preset):
    """Catches: a preset that is never found."""
    assert qmix.configure(env) == qmix.Config(env, **qmix.PRESETS[preset])


def test_3s5z_has_the_preset_of_all_maps_but_longer_runs():
    """Catches: a map's own preset that is never found, or that drops the family's."""
    expected = qmix.Config("skirmish:3s5z", **qmix.PRESETS["skirmish"])
    expected.total_steps = 600_000
    assert qmix.configure("skirmish:3s5z") == expected


@parametrize("env", ["checkers:Game", "checkers_mine:Game", "skirmisher:Game"])
def test_presets_are_for_no_other_environment(env):
    """Catches: a preset that reaches a reader's own module."""
    assert qmix.configure(env) == qmix.Config(env)


def test_what_is_given_beats_the_preset():
    """Catches: a preset that beats what was said, in Python or as a flag."""
    assert qmix.configure("checkers", lr=5e-4).lr == 5e-4
    command = qmix.parse(["--env=two-step", "--mixing-dim", "9"])
    assert command.config == qmix.configure("two-step", mixing_dim=9)


ENV_ARGS = [
    ([], ("a=1",)),
    (["--env", "o:C"], ()),
    (["--env-args", "b=x=y", "c=-2"], ("b=x=y", "c=-2")),
]


@parametrize("given, expected", ENV_ARGS)
def test_env_args_of_a_checkpoint_are_for_its_environment(trained, given, expected):
    """Catches: --env-args that are lost, or given to another environment."""
    own = {"env": "m:C", "env_args": ("a=1",)}
    damage(trained, lambda state: state["config"].update(own))
    assert qmix.parse(["--evaluate", "bad", *given]).config.env_args == expected


def test_what_an_environment_is_told(probe):
    """Catches: --env-args, --num-envs or --env-timeout that do not arrive."""
    make_run(env="m:C", env_args=("a=1",), env_timeout=5.0)
    assert probe.asked[0][:3] == ("m:C", 4, "cpu")
    assert probe.asked[0][4:] == (("a=1",), 5.0)


def test_record_of_starcraft_keeps_its_replays(probe, monkeypatch):
    """Catches: StarCraft drawn into a .gif, more games than episodes."""
    scripted_run(probe, monkeypatch)
    probe.pay = None
    qmix.evaluate("run", tiny(env="smac:3m", seed=5), 2, record="folder")
    asked = ("smac:3m", 2, "cpu", 5, ("replay_dir=folder",), 120.0)
    assert probe.asked[-1] == asked


# ------------------------------------------------------------------------- the trained policy
def greedy(agent):
    def choose(step, memory):
        return qmix.act(agent, step.obs, step.avail, memory)

    return choose


def test_evaluate_plays_and_records_the_trained_policy(trained, capsys, monkeypatch):
    """Catches: another policy, another number of episodes, no picture."""
    drawn = []
    monkeypatch.setattr(envs, "record", lambda env, choose, path: drawn.append(path))
    flags = ["--algo", "vdn", "--episodes", 6, "--record", "demo.gif"]
    assert main("--evaluate", trained.best, *flags) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    env = envs.make("skirmish:3m", 4, "cpu", 1)
    facts = qmix.greedy_episodes(env, greedy(trained.agent), 6)
    facts.update(env="skirmish:3m", algo="qmix", episodes=6, out=trained.best)
    assert json.loads(line.removeprefix("result: ")) == facts
    assert drawn == ["demo.gif"]


@pytest.fixture(scope="module")
def steps(trained):
    """12 steps of 4 teams, as they are trained: obs, avail, actions."""
    env = envs.make("skirmish:3m", 4)
    choose = greedy(trained.agent)
    step = env.reset()
    memory = None
    found = []
    for _ in range(12):
        actions, memory = choose(step, memory)
        found.append((step.obs, step.avail, actions))
        step = env.step(actions)
    return found


@parametrize("rows", [[0], [1], [2], [2, 0]])
def test_agents_alone_do_what_the_team_does(trained, steps, rows):
    """Catches: a choice that needs another agent's observation, id or memory."""
    policy = qmix.load(trained.best)
    memory = None
    for obs, avail, actions in steps:
        found, memory = policy.act(obs[:, rows].numpy(), avail[:, rows].numpy(), memory, rows)
        assert torch.equal(found, actions[:, rows])


def test_agents_may_be_a_tuple(trained, steps):
    """Catches: ids that index rows and columns."""
    obs, avail, actions = steps[0]
    policy = qmix.load(trained.best)
    pair, _ = policy.act(obs[:, :2], avail[:, :2], agents=(0, 1))
    equal(pair, actions[:, :2])


def test_one_team_does_what_it_does_among_others(trained, steps):
    """Catches: (N, O) observations laid out wrong, one team's memory taken for another's."""
    policy = qmix.load(trained.best)
    memory = None
    for obs, avail, actions in steps:
        found, memory = policy.act(obs[3].numpy(), avail[3].tolist(), memory)
        assert torch.equal(found, actions[3])


OBS = np.zeros((2, 3, 30))  # two teams of skirmish:3m
AVAIL = np.ones((2, 3, 9), bool)
NONE = AVAIL & (np.arange(3) != 1)[:, None]  # agent 1 has no action
UNUSABLE = {
    "NaN": (OBS * math.nan, AVAIL, None),
    "an agent without an action": (OBS, NONE, None),
    "other observations": (OBS[..., 1:], AVAIL, None),
    "other actions": (OBS, AVAIL[..., 1:], None),
    "fewer teams": (OBS[:1], AVAIL, None),
    "more agents than named": (OBS, AVAIL, [0]),
    "no agents": (OBS[0, 0], AVAIL[0, 0], None),
}


@parametrize("obs, avail, agents", UNUSABLE.values(), ids=UNUSABLE)
def test_policy_refuses_what_it_cannot_use(trained, obs, avail, agents):
    """Catches: action 0 for NaN, or where there is no action; torch's own errors."""
    with pytest.raises(envs.UsageError, match="must .*$"):
        qmix.load(trained.best).act(obs, avail, agents=agents)


# ------------------------------------------------------------------------------- the one file
def test_import_needs_torch_numpy_and_envs_alone(monkeypatch):
    """Catches: an import that a copier of the file must install, or that makes the start slow."""
    for name in ("tyro", "tqdm", "tensorboard", "torch.utils.tensorboard", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)  # cannot be imported
    assert runpy.run_path(str(HERE / "qmix.py"))["Policy"]


LINES = """
run = Run(configure("two-step", total_steps=5000, device="cpu"))
loop(run, lambda: None)
_, facts = rollout(run.env, run.policy())
greedy_return = facts["return"].mean().item()
"""


def test_the_first_part_and_four_lines_train():
    """Catches: a first part that needs something from behind the divider."""
    first_part = (HERE / "qmix.py").read_text().split("\n# ====")[0]
    Path("first_part.py").write_text(first_part + LINES)
    assert runpy.run_path("first_part.py")["greedy_return"] == 8


# ------------------------------------------------------------------------- two-step, Checkers
BUILT_IN = ["two-step", "checkers", "checkers-v1", "checkers-v2", "checkers-v3"]
MA_GYM = dict(np.load(TESTDATA / "ma_gym_checkers.npz"))
BEST = (  # the exact optimum, found by search
    "00 10 30 22 01 01 03 03 02 20 10 10 12 31 01 01 01 23 23 00 00 10 12 11 31 01 01 01 23 23 "
    "00 00 10 10 00 20 20"
)
BEST_DISCOUNTED = "01 13 02 11 31 20 10 21 03 12 01 11 03 20 21 01 13 02 11 01 03 20 20"
NOBODY_MOVES = "44 " * 100


def like_the_recording(variant=0):
    """Plays the actions of the recording: (t, which episodes still run, the Step)."""
    env = envs.Checkers(variant, n_envs=len(MA_GYM["length"]))
    step = env.reset()
    yield 0, MA_GYM["length"] >= 0, step
    for t in range(1, 101):
        step = env.step(torch.from_numpy(MA_GYM["actions"][:, t - 1]).long())
        yield t, MA_GYM["length"] >= t, step


@pytest.mark.parametrize("variant", range(4))
def test_checkers_observations_are_not_ma_gyms(variant):
    """Catches: variants mixed up, a stale board or clock, a misread rule, the agents' order."""
    hundredths = MA_GYM[f"obs_v{variant}"]
    for t, now, step in like_the_recording(variant):
        np.testing.assert_array_equal(step.obs[now], hundredths[now, t] / np.float32(100))


def test_checkers_rewards_are_not_ma_gyms():
    """Catches: apples and lemons or the agents swapped, the cost of a step, food eaten twice."""
    for t, now, step in like_the_recording():
        if t > 0:
            np.testing.assert_allclose(step.reward[now], MA_GYM["reward"][now, t - 1], atol=2e-6)


def test_checkers_ends_are_not_ma_gyms():
    """Catches: a time limit as an end or the reverse, also where both come in one step."""
    for t, now, step in like_the_recording():
        apples_left = MA_GYM["food"][now, t, 0].any(1)
        assert step.terminated[now].tolist() == (~apples_left).tolist()
        assert step.truncated[now].tolist() == (apples_left & (t == 100)).tolist()


def test_checkers_state_is_not_what_lies_on_the_board():
    """Catches: a state that lacks something, or concatenated observations in its place."""
    cells = [(row, column) for row in range(3) for column in range(6)]
    apples = [8 * row + column for row, column in cells if (row + column) % 2 == 0]
    lemons = [8 * row + column for row, column in cells if (row + column) % 2 == 1]
    for t, now, step in like_the_recording():
        food = MA_GYM["food"][now, t]
        where = MA_GYM["cells"][now, t]
        clock = np.full((now.sum(), 1), t / np.float32(100))
        agents = np.eye(24)[where].reshape(-1, 48)
        state = np.concatenate([food[:, 0, apples], food[:, 1, lemons], clock, agents], 1)
        np.testing.assert_array_equal(step.state[now], state)


@pytest.mark.parametrize(
    "text, length, gamma, expected",
    [
        (BEST, 37, 1, 86.26),
        (BEST_DISCOUNTED, 23, 1, 83.54),
        (BEST_DISCOUNTED, 23, 0.99, 74.688680),
        (NOBODY_MOVES, 100, 1, -2.0),
    ],
)
def test_checkers_known_returns_are_missed(text, length, gamma, expected):
    """Catches: another game than the one whose exact optimum is known."""
    env = envs.Checkers(n_envs=2)
    env.reset()
    total = 0.0
    for t, pair in enumerate(text.split()):
        step = env.step(torch.tensor([[int(action) for action in pair]] * 2))
        total += gamma**t * step.reward[1].double().item()
        ended = step.terminated | step.truncated
        assert ended.all() == (t == length - 1)
    assert total == pytest.approx(expected, abs=1e-4)
    assert total <= env.best_return + 1e-4


@pytest.mark.filterwarnings("ignore")
def test_checkers_is_not_the_ma_gym_that_is_installed():
    """Catches: what the recording does not show, or a recording of another ma-gym."""
    pytest.importorskip("ma_gym")
    original = pytest.importorskip("gym").make("ma_gym:Checkers-v3").unwrapped
    ours = envs.Checkers(3, n_envs=1)
    rng = random.Random(0)
    obs = original.reset()
    step = ours.reset()
    done = [False]
    while not all(done):
        np.testing.assert_allclose(step.obs[0], obs, atol=1e-6)
        actions = [rng.randrange(5), rng.randrange(5)]
        obs, rewards, done, _ = original.step(actions)
        step = ours.step(torch.tensor([actions]))
        assert step.reward.item() == pytest.approx(sum(rewards), abs=2e-6)
        assert bool(step.terminated | step.truncated) == all(done)


def test_two_step_is_not_the_papers_table():
    """Catches: agent 2 choosing the state, a swapped payoff, too long an episode."""
    choices = torch.cartesian_prod(*[torch.arange(2)] * 4)  # (16, 4): first u1 u2, second u1 u2
    env = envs.TwoStep(n_envs=16)
    first = env.reset()
    middle = env.step(choices[:, :2])
    last = env.step(choices[:, 2:])
    assert first.state.tolist() == [[1, 0, 0]] * 16
    assert not middle.reward.any()
    for b, (u1, _, v1, v2) in enumerate(choices.tolist()):
        assert middle.state[b].tolist() == [[0, 1, 0], [0, 0, 1]][u1]
        assert last.reward[b] == [[[7, 7], [7, 7]], [[0, 1], [1, 8]]][u1][v1][v2]
    assert last.terminated.all()
    assert not (middle.terminated | middle.truncated | last.truncated).any()
    assert torch.equal(middle.obs[:, 1], middle.state)


@pytest.mark.parametrize("name", BUILT_IN)
def test_sizes_or_dtypes_are_not_as_promised(name):
    """Catches: shapes that differ from the sizes, float64, masks that are no bools."""
    env = envs.make(name, 4)
    N = env.n_agents
    expected = [
        ((4, N, env.obs_dim), torch.float32),
        ((4, env.state_dim), torch.float32),
        ((4, N, env.n_actions), torch.bool),
        ((4,), torch.float32),
        ((4,), torch.bool),
        ((4,), torch.bool),
    ]
    for step in (env.reset(), env.step(torch.zeros(4, N, dtype=torch.int64))):
        assert [(field.shape, field.dtype) for field in step[:6]] == expected


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_old_step_changes_or_survives_a_reset(name):
    """Catches: live views of the environment; food, places or a clock that reset() forgets."""
    env = envs.make(name, 4)
    step = env.reset()
    steps = []
    copies = []
    for actions in torch.randint(env.n_actions, (5, 4, env.n_agents)):
        steps.append(step)
        copies.append([field.clone() for field in step[:6]])
        step = env.step(actions)
    steps.append(env.reset())
    copies.append(copies[0])
    for step, copied in zip(steps, copies):
        for field, before in zip(step[:6], copied):
            assert torch.equal(field, before)


# ------------------------------------------------------------------------ by name, as a picture
@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("checkers-v7", (), "unknown environment 'checkers-v7'; there are two-step, checkers"),
        ("3m", (), "unknown environment '3m'"),
        ("checkers", ["a=1"], "checkers takes no --env-args, got a"),
        ("nowhere:Game", (), "nowhere:Game: No module named 'nowhere'"),
        ("game:Nobody", (), "game:Nobody: module 'game' has no attribute 'Nobody'"),
        (":Game", (), ":Game: "),
        ("./game:Game", (), "./game:Game: "),
    ],
)
def test_a_name_that_make_should_refuse(name, arguments, words):
    """Catches: checkers-v7 trained as something else, a traceback for a name with a mistake."""
    with pytest.raises(envs.UsageError, match=f"^{re.escape(words)}.*$"):
        envs.make(name, arguments=arguments)


def test_a_batched_class_of_the_current_directory_is_not_found(tmp_path, monkeypatch):
    """Catches: the directory not searched, a Batched class put into workers, lost arguments."""
    text = (
        "import envs\nclass Mine(envs.TwoStep):\n  def __init__(self, **given): self.given = given"
    )
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    env = envs.make("mine:Mine", 7, seed=5, arguments=["size=9"])
    assert env.given == {"n_envs": 7, "device": torch.device("cpu"), "seed": 5, "size": 9}


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_a_device_that_should_be_refused(device):
    """Catches: a traceback of torch, or another device in silence."""
    with pytest.raises(envs.UsageError, match=f"^--device must be .*, not '{device}'$"):
        envs.make("two-step", device=device)


@pytest.fixture
def passed_on(monkeypatch):
    """passed_on(name, pairs): the arguments that the environment gets."""

    def make(name, pairs):
        made = Mock()
        monkeypatch.setattr(envs, "Workers", made)
        envs.make(name, arguments=pairs)
        return made.call_args.args[4]

    return make


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("0.5", 0.5),
        ("[1, 2]", [1, 2]),
        ("3m", "3m"),
        ("x=y", "x=y"),
        ("", ""),
        ("true", True),
        ("False", False),
        ("none", None),
    ],
)
def test_an_argument_is_misread(passed_on, text, value):
    """Catches: `false` as a text, which is true; a text with an equals sign cut in two."""
    assert passed_on("game:Game", [f"a={text}", "b=1"]) == {"a": value, "b": 1}


def test_starcrafts_version_is_read_as_a_number(passed_on):
    """Catches: 4.10 as 4.1, which is another game."""
    assert passed_on("smac:3m", ["game_version=4.10"]) == {"game_version": "4.10"}


@pytest.mark.parametrize("pairs", [["size"], ["size=1", "size=2"]])
def test_an_argument_without_a_value_or_given_twice_is_taken(passed_on, pairs):
    """Catches: an argument that is forgotten in silence."""
    with pytest.raises(envs.UsageError, match="^--env-args takes key=value.*, not 'size"):
        passed_on("game:Game", pairs)


def new_axes():
    return pytest.importorskip("matplotlib.figure").Figure().subplots()


def test_a_drawing_of_checkers_shows_something_else():
    """Catches: another episode, eaten food, rows and columns or the agents mixed up."""
    axes = new_axes()
    env = envs.Checkers(n_envs=2)
    env.reset()
    env.step(torch.tensor([[4, 4], [1, 4]]))  # in episode 1 agent 0 eats the lemon in row 0
    env.draw(axes, 1)
    drawn = {}
    for line in axes.lines:
        points = [tuple(point) for point in line.get_xydata()]
        drawn[line.get_color()] = (line.get_marker(), set(points))
    cells = {(column, row) for row in range(3) for column in range(6)}
    apples = {cell for cell in cells if sum(cell) % 2 == 0}
    assert drawn == {
        "tab:red": ("o", apples),
        "gold": ("D", cells - apples - {(5, 0)}),
        "tab:blue": ("o", {(5, 0)}),
        "tab:purple": ("s", {(6, 2)}),
    }


def test_a_record_is_not_one_whole_episode(tmp_path):
    """Catches: the last frame or step missing, steps after the end, a policy without memory."""
    image = pytest.importorskip("PIL.Image")
    asked = []

    def choose(step, memory):
        asked.append(memory)
        return torch.zeros(2, 2, dtype=torch.int64), len(asked)

    env = envs.Checkers(n_envs=2)
    env.episode_limit = 4
    envs.record(env, choose, tmp_path / "demo.gif")
    assert asked == [None, 1, 2, 3]
    assert image.open(tmp_path / "demo.gif").n_frames == 5


def test_a_failing_policy_destroys_the_old_record(tmp_path):
    """Catches: half a GIF written over a whole one."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "demo.gif"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        envs.record(envs.Checkers(n_envs=1), Mock(side_effect=ZeroDivisionError), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "env, path, words",
    [
        (envs.TwoStep, "demo.gif", "this environment cannot be drawn"),
        (envs.Checkers, "demo.png", "must be a .gif in a folder that exists, not '.*demo.png'"),
        (envs.Checkers, "nowhere/demo.gif", "must be a .gif in a folder that exists, not"),
    ],
)
def test_a_record_that_should_be_refused(tmp_path, env, path, words):
    """Catches: a whole episode played before the mistake shows, or a traceback."""
    with pytest.raises(envs.UsageError, match=f"^--record.* {words}"):
        envs.record(env(n_envs=1), Mock(), tmp_path / path)


# ----------------------------------------------------------------------------- worker processes
STAY, END, LATE, BOTH, LOUD, FAIL, CRASH, DIE, HANG = range(9)
CHILD = "self.child = subprocess.Popen(['sleep', '300']).pid"
GAME = '''
import os, random, subprocess, time
from pathlib import Path

import numpy as np
import torch

import envs

STAY, END, LATE, BOTH, LOUD, FAIL, CRASH, DIE, HANG = range(9)


class Game:
    """The action of agent 0 says what happens; agent 1 may tell a fact. `code` changes the game."""

    def __init__(self, seed, code="", limit=4):
        self.seed = seed
        self.dice = random.Random(seed)
        self.loud = 1
        self.child = 0
        self.sizes = dict(n_agents=2, n_actions=9, obs_shape=3, state_shape=8, episode_limit=limit)
        exec(code, {**globals(), "self": self})

    def get_env_info(self):
        return self.sizes

    def reset(self):
        self.t = 0
        self.number = self.dice.randrange(64) / 64

    def step(self, actions):
        self.t += 1
        self.number = self.dice.randrange(64) / 64
        what = actions[0]
        if what == LOUD:
            self.loud = 8
        if what == FAIL:
            raise RuntimeError("two\\nlines")
        if what == CRASH:
            raise envs.GameFailure("the game is gone")
        if what == DIE:
            os._exit(17)
        if what == HANG:
            print("hangs", flush=True)
            time.sleep(300)
        info = {}
        if what in (LATE, BOTH):
            info["episode_limit"] = True
        if actions[1] == 1:
            info["dead_allies"] = self.t
        return self.number, what in (END, BOTH), info

    def get_obs(self):
        return [[self.t / 8, self.number, agent] for agent in (0, 1)]

    def get_state(self):  # whole numbers that float32 keeps, and what was drawn
        numbers = [self.seed // 2**16 / 2**16, self.seed % 2**16 / 2**16]
        numbers += [os.getpid() / 2**22, self.child / 2**22, self.loud]
        return [*numbers, random.random(), np.random.rand(), torch.rand(1).item()]

    def get_avail_actions(self):
        return [[(action + agent + self.t) % 3 > 0 for action in range(9)] for agent in (0, 1)]

    def render(self):
        return np.full((4, 6, 3), self.seed % 251)

    def close(self):
        pass
'''


@pytest.fixture(scope="module", autouse=True)
def game_module(tmp_path_factory):
    """Makes `import game` possible, here and in the workers."""
    folder = tmp_path_factory.mktemp("game")
    (folder / "game.py").write_text(GAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def workers(n_envs=1, cores=1, seed=3, name="game:Game", **arguments):
    """Workers, as on a machine with so many cores."""
    cpu = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: cores)
        return envs.Workers(name, n_envs, cpu, seed, arguments)


def do(*whats):
    """Actions (B, N)."""
    return torch.tensor([[what, 0] for what in whats])


def seeds(step):
    high, low = (step.state[:, :2] * 2**16).long().unbind(1)
    return (high * 2**16 + low).tolist()


def pids(step):
    """Of the workers and of the processes that their games have started."""
    return (step.state[:, 2:4] * 2**22).long().tolist()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty: it has ended
    except OSError:
        return False


def assert_all_end(rows):
    deadline = time.monotonic() + 30
    for pid in sum(rows, []):
        while is_running(pid):
            assert time.monotonic() < deadline, f"{pid} still runs"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def played():
    """Two episodes of five environments, which end in five ways; three of them share a worker."""
    actions = torch.zeros(4, 5, 2, dtype=torch.int64)  # (T, B, N)
    actions[0, [0, 2, 3], 0] = torch.tensor([END, LATE, BOTH])
    actions[3, 1, 0] = END
    actions[0, [0, 2], 1] = 1  # they tell a fact
    actions[3, :4, 1] = 1
    with contextlib.closing(workers(5, cores=2)) as env:
        episodes = []
        for _ in range(2):
            steps = [env.reset()]
            for chosen in actions:
                steps.append(env.step(chosen))
            episodes.append(steps)
        yield SimpleNamespace(env=env, actions=actions, episodes=episodes, steps=steps)


@pytest.mark.parametrize("b, length", [(0, 1), (1, 4), (2, 1), (3, 1), (4, 4)])
def test_an_episode_among_others_differs_from_one_alone(played, b, length):
    """Catches: rows or actions swapped, steps after the end, something kept over a reset."""
    alone = importlib.import_module("game").Game(seeds(played.steps[0])[b])
    for steps in played.episodes:
        alone.reset()
        for t, step in enumerate(steps[: length + 1]):
            if t > 0:
                reward, _, _ = alone.step(played.actions[t - 1, b].tolist())
                assert step.reward[b] == reward
            assert step.obs[b].tolist() == alone.get_obs()
            assert step.avail[b].tolist() == alone.get_avail_actions()
            assert step.state[b, 4] == alone.loud


def test_an_end_is_taken_for_a_time_limit_or_the_reverse(played):
    """Catches: a real end in the last step as a time limit, info["episode_limit"] overlooked."""
    last = played.steps[-1]
    assert last.terminated.tolist() == [True, True, False, False, False]
    assert last.truncated.tolist() == [False, False, True, True, True]


def test_an_episode_ends_at_another_time(played):
    """Catches: a time limit that is one step off or counts on over a reset, an end forgotten."""
    for step in played.steps[1:4]:
        assert (step.terminated | step.truncated).tolist() == [True, False, True, True, False]


def test_padding_changes_what_an_episode_said_last(played):
    """Catches: facts of some environments lost or given to all, or overwritten by padding."""
    assert "dead_allies" not in played.steps[0].info
    assert played.steps[1].info["dead_allies"].tolist() == [1, 0, 1, 0, 0]
    assert played.steps[4].info["dead_allies"].tolist() == [1, 4, 1, 0, 0]
    assert "battle_won" not in played.steps[4].info


def test_environments_share_a_seed_or_workers_a_process(played):
    """Catches: the same episodes in all environments; a process for each, or one for all."""
    start = played.steps[0]
    assert len(set(seeds(start))) == 5
    worker = [row[0] for row in pids(start)]
    assert worker[0] == worker[1] == worker[2] != worker[3] == worker[4]


def test_a_drawing_shows_another_environment(played):
    """Catches: the wrong worker, or the wrong environment in it."""
    axes = new_axes()
    played.env.draw(axes, 4)
    assert (axes.images[0].get_array() == seeds(played.steps[0])[4] % 251).all()


@pytest.fixture(scope="module")
def drawn():
    """The first states of runs with the seeds 3, 3 and 4."""
    states = []
    for seed in (3, 3, 4):
        with contextlib.closing(workers(2, seed=seed)) as env:
            states.append(env.reset().state)
    return states


@pytest.mark.parametrize("what, column", [("seed", 1), ("random", 5), ("NumPy", 6), ("torch", 7)])
def test_random_numbers_in_a_worker_do_not_follow_the_seed(drawn, what, column):
    """Catches: a seed that is not used, or the same one in all runs."""
    first, again, other = [state[:, column] for state in drawn]
    assert torch.equal(first, again)
    assert (first != other).all()


@pytest.fixture(scope="module", params=[CRASH, DIE, HANG], ids=["crash", "die", "hang"])
def failure(request):
    """Of a worker's three episodes one ends and another one fails; a second worker plays on."""
    with contextlib.closing(workers(6, cores=2, code=CHILD)) as env:
        start = env.reset()
        env.step(do(END, STAY, STAY, STAY, STAY, STAY))
        env.timeout = 10.0
        failed = env.step(do(STAY, request.param, STAY, STAY, STAY, STAY))
        env.timeout = 120.0
        env.step(do(*[STAY] * 6))
        last = env.step(do(*[STAY] * 6))
        voided = env.voided
        again = env.reset()
        yield SimpleNamespace(start=start, failed=failed, last=last, voided=voided, again=again)


def test_a_failure_voids_too_much_or_too_little(failure):
    """Catches: broken episodes learned from; episodes lost that had ended or play elsewhere."""
    for step in (failure.failed, failure.last):
        assert step.info["void"].tolist() == [False, True, True, False, False, False]
        assert step.terminated.tolist() == [True, True, True, False, False, False]
    assert failure.voided == 2
    assert not failure.again.info["void"].any()


def test_a_failure_disturbs_the_other_worker(failure):
    """Catches: a worker that is ended or loses a step because another one failed."""
    assert failure.failed.obs[3:, 0, 0].tolist() == [2 / 8] * 3
    assert failure.last.truncated.tolist() == [False] * 3 + [True] * 3
    assert pids(failure.again)[3:] == pids(failure.start)[3:]


def test_a_failed_worker_plays_on(failure):
    """Catches: an environment used again after a failure, the same seeds again."""
    assert len(set(seeds(failure.start) + seeds(failure.again))) == 9
    assert failure.again.obs[:, 0, 0].tolist() == [0] * 6


def test_a_failed_worker_is_left_behind(failure):
    """Catches: processes and games that pile up with each failure."""
    assert all(is_running(pid) for pid in pids(failure.again)[0])
    assert_all_end(pids(failure.start)[:3])


def test_a_failing_reset_is_not_tried_again(tmp_path):
    """Catches: an episode that starts without some of its environments, or a run that ends."""
    code = f"""
try:
    Path({str(tmp_path / "mark")!r}).touch(exist_ok=False)  # one worker alone can
    self.reset = lambda: os._exit(17)
except FileExistsError:
    pass
"""
    with contextlib.closing(workers(2, cores=2, code=code)) as env:
        assert len(set(seeds(env.reset()))) == 2
        assert env.voided == 1


@pytest.mark.skipif(
    sys.platform != "linux" or not {0, 1} <= os.sched_getaffinity(0), reason="needs cores 0 and 1"
)
def test_workers_of_several_environments_share_a_core():
    """Catches: two of them on one core while another is idle, which takes 1.3 times as long."""
    with contextlib.closing(workers(n_envs=4, cores=2)) as env:
        cores = [os.sched_getaffinity(process.pid) for process, _ in env.workers.values()]
    assert cores == [{0}, {1}]


def test_failures_in_a_row_go_on_for_ever(monkeypatch):
    """Catches: a run that waits for a broken game until somebody looks."""
    monkeypatch.setattr(envs, "MAX_FAILURES", 2)
    with contextlib.closing(workers()) as env:
        env.reset()
        env.step(do(CRASH))
        env.reset()
        env.step(do(STAY))
        with pytest.raises(envs.EnvFailure, match="^game:Game: .*the game is gone .2 in a row.$"):
            env.step(do(CRASH))


def test_failures_that_are_not_in_a_row_end_the_run(monkeypatch):
    """Catches: a long run that ends because of a crash now and then."""
    monkeypatch.setattr(envs, "MAX_FAILURES", 2)
    with contextlib.closing(workers()) as env:
        for what in (CRASH, END, CRASH, END):
            env.reset()
            env.step(do(what))


@pytest.mark.parametrize(
    "code, error, words",
    [
        ("raise envs.GameFailure('no game')", envs.EnvFailure, ".*no game .*"),
        ("os._exit(3)", envs.EnvFailure, ".*its process died .*"),
        ("1 / 0", envs.EnvFailure, "ZeroDivisionError: division by zero"),
        ("self.sizes['n_agents'] = 0", envs.UsageError, ".*'n_agents'.* above 0: 0"),
    ],
)
def test_a_game_that_cannot_start_is_not_told_in_a_line(code, error, words):
    """Catches: a game started again and again that never worked; a line that does not name it."""
    with pytest.raises(error, match=f"^game:Game: {words}$"):
        workers(code=code)


def test_a_misspelt_argument_is_taken():
    """Catches: --env-args limits=9 that changes nothing, or a traceback."""
    with pytest.raises(envs.UsageError, match="^game:Game: --env-args: .*'limits'$"):
        workers(limits=9)


def test_an_exception_of_the_environment_is_not_told_in_a_line():
    """Catches: an episode that is void for a mistake in the class; a message that is cut off."""
    with contextlib.closing(workers()) as env:
        env.reset()
        with pytest.raises(envs.EnvFailure, match="^game:Game: RuntimeError: two lines$"):
            env.step(do(FAIL))


BROKEN = [
    ("self.get_obs = lambda: np.full((2, 3), np.nan)", "get_obs() must be finite numbers of"),
    ("self.get_obs = lambda: np.full((2, 3), -np.inf)", "get_obs() must be finite numbers of"),
    ("self.get_obs = lambda: np.full((2, 3), 1e39)", "get_obs() must be finite numbers of"),
    (
        "self.get_obs = lambda: np.zeros((3, 2))",
        "get_obs() must be finite numbers of shape (1, 2, 3)",
    ),
    ("self.get_obs = lambda: [[0, 0, 0], [0]]", "get_obs() must be finite numbers of"),
    ("self.get_obs = lambda: [['0', '0', '0']] * 2", "get_obs() must be finite numbers of"),
    ("self.get_state = lambda: None", "get_state() must be finite numbers of shape (1, 8), not"),
    ("self.get_state = lambda: np.zeros(9)", "get_state() must be finite numbers of shape (1, 8)"),
    ("self.get_avail_actions = lambda: np.full((2, 9), 2)", "get_avail_actions() must be True or"),
    ("self.get_avail_actions = lambda: np.full((2, 9), 0.5)", "get_avail_actions() must be True"),
    ("self.get_avail_actions = lambda: np.full((2, 9), -1)", "get_avail_actions() must be True or"),
    ("self.get_avail_actions = lambda: np.ones(9)", "get_avail_actions() must be finite numbers"),
    ("self.get_avail_actions = lambda: np.eye(2, 9, -1)", "get_avail_actions() leaves an agent"),
    ("self.step = lambda actions: (np.zeros(2), False, {})", "reward must be finite numbers of"),
    (
        "self.step = lambda actions: (None, False, {})",
        "reward must be finite numbers of shape (1,)",
    ),
    ("self.step = lambda actions: (np.nan, False, {})", "reward must be finite numbers of"),
    ("self.step = lambda actions: (0.0, [False], {})", "terminated must be finite numbers of"),
    ("self.step = lambda actions: (0.0, 'no', {})", "terminated must be finite numbers of"),
    ("self.step = lambda actions: (0.0, np.zeros(2), {})", "terminated must be finite numbers of"),
    (
        "self.step = lambda actions: (0.0, 2, {})",
        "terminated must be True or False (1 or 0), not [2.0]",
    ),
    ("self.step = lambda _: (0.0, False, {'episode_limit': []})", "info['episode_limit'] must be"),
    (
        "self.step = lambda _: (0.0, False, {'episode_limit': 'no'})",
        "info['episode_limit'] must be",
    ),
    ("self.step = lambda _: (0.0, False, {'episode_limit': 10})", "info['episode_limit'] must be"),
    ("self.step = lambda _: (0.0, True, {'battle_won': [True]})", "info['battle_won'] must be"),
    ("self.step = lambda _: (0.0, True, {'battle_won': 'yes'})", "info['battle_won'] must be"),
    ("del self.sizes['obs_shape']", "get_env_info()['obs_shape'] must be a whole number above 0"),
    ("self.sizes['episode_limit'] = 0", "get_env_info()['episode_limit'] must be a whole number"),
    ("self.sizes['n_actions'] = 9.0", "get_env_info()['n_actions'] must be a whole number above 0"),
    ("self.sizes['state_shape'] = (8,)", "get_env_info()['state_shape'] must be a whole number"),
]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("code, words", BROKEN)
def test_a_broken_answer_is_taken(code, words):
    """Catches: NaN in a network, an array broadcast, a list that counts as True; two lines."""
    with pytest.raises(envs.UsageError, match=f"^{re.escape(words)}.*$"):
        group = envs.Group("game:Game", [1], {"code": code})
        group.reset()
        group.step([[STAY, STAY]])


def test_a_late_answer_is_taken_for_the_next_one(monkeypatch):
    """Catches: after Ctrl-C in a step, that step's answer as reset()'s, and so on for ever."""
    with contextlib.closing(workers()) as env:
        env.reset()
        with monkeypatch.context() as patch:
            patch.setattr(env, "receive", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                env.step(do(STAY))
        assert env.reset().obs[0, 0, 0] == 0
        assert env.step(do(STAY)).obs[0, 0, 0] == 1 / 8


@pytest.mark.parametrize("what, words", [(CRASH, "the game is gone"), (DIE, "its process died")])
def test_a_failure_is_not_told(capfd, what, words):
    """Catches: failures that nobody hears of; a death that is noticed by its silence alone."""
    with contextlib.closing(workers()) as env:
        env.reset()
        env.step(do(what))
    assert f"game:Game: worker 0 failed in step: {words}" in capfd.readouterr().err


# ------------------------------------------------------------- what workers say and leave behind
@pytest.mark.parametrize("resets, warnings", [(1, 1), (3, 1), (4, 0)])
def test_the_warning_of_large_numbers(capsys, resets, warnings):
    """Catches: no warning, one in each step, one for what a team meets late in its training."""
    with contextlib.closing(workers()) as env:
        for _ in range(resets):
            env.reset()
        for _ in range(2):
            env.step(do(LOUD))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warnings
    for line in lines:
        assert re.fullmatch("game:Game: get_state.. .* up to 8.*divide them.*", line)


def test_the_warning_comes_for_numbers_like_smacs(capsys):
    """Catches: a warning that StarCraft's users learn to overlook."""
    code = f"""
files = [np.load(path) for path in Path({str(TESTDATA)!r}).glob("smac_golden/*.npz")]
obs = np.concatenate([file["obs"].ravel() for file in files])
state = np.concatenate([file["state"].ravel() for file in files])
self.sizes.update(obs_shape=len(obs), state_shape=len(state))
self.get_obs = lambda: [obs, obs]
self.get_state = lambda: state
"""
    with contextlib.closing(workers(code=code)) as env:
        step = env.reset()
    assert step.state.abs().max() > 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", [STAY, FAIL])
def test_something_is_left_after_close(what):
    """Catches: workers or their games that go on, also where one of them has failed."""
    env = workers(2, cores=2, code=CHILD)
    with contextlib.closing(env):
        step = env.reset()
        assert all(is_running(pid) for pid in sum(pids(step), []))
        with contextlib.suppress(envs.EnvFailure):
            env.step(do(what, STAY))
    assert_all_end(pids(step))


def test_environments_are_not_closed(tmp_path):
    """Catches: games that are killed and leave files behind, where they could close in peace."""
    mark = tmp_path / "closed"
    workers(code=f"self.close = Path({str(mark)!r}).touch").close()
    assert mark.exists()


def test_an_environment_that_never_closes_is_waited_for(monkeypatch):
    """Catches: a run that hangs at its end."""
    monkeypatch.setattr(envs, "GRACE", 1.0)
    env = workers(code="self.close = lambda: time.sleep(300)")
    step = env.reset()
    began = time.monotonic()
    env.close()
    assert time.monotonic() - began < 60
    assert_all_end([pids(step)[0][:1]])


TRAINER = """
import sys, torch, envs

if __name__ == "__main__":
    env = envs.make("game:Game", 1, arguments=["code=" + sys.argv[1]])
    step = env.reset()
    print(*(step.state[0, 2:4] * 2**22).long().tolist(), flush=True)
    env.step(torch.tensor([[int(sys.argv[2]), 0]]))
    sys.stdin.read()
"""


@pytest.fixture
def start_trainer(tmp_path):
    """start_trainer(what, code): a process that trains, and the pids of its worker and game."""

    def start(what, code=""):
        (tmp_path / "scripts").mkdir()
        (tmp_path / "scripts/trainer.py").write_text(TRAINER)
        folders = [str(HERE), str(Path(importlib.import_module("game").__file__).parent)]
        trainer = subprocess.Popen(
            [sys.executable, "scripts/trainer.py", f"{CHILD}; envs.GRACE = 1.0; {code}", str(what)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(trainer)
        left = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(left) == 2
        assert all(is_running(pid) for pid in left)
        return trainer, left

    started = []
    yield start
    for trainer in started:
        trainer.kill()
        trainer.wait()


def test_a_worker_or_its_game_outlives_a_trainer_that_is_killed(start_trainer):
    """Catches: StarCraft that goes on without the run."""
    trainer, left = start_trainer(STAY)
    trainer.terminate()
    assert_all_end([left])


def test_a_worker_that_hangs_outlives_a_trainer_that_is_killed(start_trainer):
    """Catches: a worker that looks for its trainer only between two steps."""
    trainer, left = start_trainer(HANG)
    assert trainer.stdout.readline() == "hangs\n"
    trainer.kill()
    assert_all_end([left])


@pytest.mark.parametrize("code", ["", "self.close = lambda: time.sleep(300)"])
def test_a_script_that_forgets_to_close_never_ends(start_trainer, code):
    """Catches: a script that waits for its workers, or leaves them behind."""
    trainer, left = start_trainer(STAY, code)
    trainer.stdin.close()
    assert trainer.wait(timeout=60) == 0
    assert_all_end([left])


def test_a_file_of_the_users_hides_envs_from_the_workers(start_trainer, tmp_path):
    """Catches: workers that cannot start in a directory that has an envs.py or envs/."""
    (tmp_path / "envs.py").write_text("raise ImportError('not this one')")
    start_trainer(STAY)


# ---------------------------------------------------------------------------------------- smac
class Calm:
    """As smac's StarCraft2Env, with episodes of one step."""

    force_restarts = 0
    health = 45
    get_env_info = get_obs = get_state = get_avail_actions = None

    def __init__(self, map_name, seed, replay_dir, replay_prefix, difficulty="7"):
        self.given = (map_name, seed, replay_dir, replay_prefix)
        self.calls = []

    def reset(self):
        self.agents = {0: SimpleNamespace(health=self.health)}

    def step(self, actions):
        return 1.0, True, {"battle_won": True}

    def save_replay(self):
        self.calls.append("save")

    def close(self):
        self.calls.append("close")


class Unreachable(Calm):
    def reset(self):
        raise ConnectionError("no websocket")


class RestartedInReset(Calm):
    def reset(self):
        Calm.reset(self)
        self.force_restarts += 1


class DeadAtTheStart(Calm):
    health = 0


class Malformed(Calm):
    def step(self, actions):
        raise RuntimeError("cannot parse")


class CrashedInStep(Calm):
    def step(self, actions):
        return 0, True, {}


class Strict(Calm):
    def step(self, actions):
        raise AssertionError("an action that is not available")


@pytest.fixture
def smac(tmp_path, monkeypatch):
    """smac(class): envs.Smac around it. The game is there, with the map 3m."""
    for folder in ("Versions", "Maps/SMAC_Maps/3m.SC2Map"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    flags = SimpleNamespace(FLAGS=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "absl", SimpleNamespace(flags=flags))

    def make(made=Calm, map_name="3m", **arguments):
        monkeypatch.setitem(sys.modules, "smac.env", SimpleNamespace(StarCraft2Env=made))
        return envs.Smac(map_name, 5, **arguments)

    return make


@pytest.mark.parametrize(
    "made, words",
    [
        (Unreachable, "ConnectionError: no websocket"),
        (RestartedInReset, "crashed in reset"),
        (DeadAtTheStart, "crashed in reset"),
        (Malformed, "RuntimeError: cannot parse"),
        (CrashedInStep, "crashed in step"),
    ],
)
def test_a_crash_of_starcraft_is_taken_for_an_episode(smac, made, words):
    """Catches: learning from (0, True, {}) or from a start without units; a run that ends by it."""
    env = smac(made)
    with pytest.raises(envs.GameFailure, match=words):
        env.reset()
        env.step([0])


def test_smac_is_reset_before_its_first_episode_has_ended(smac):
    """Catches: rewards that smac scales by a max_reward that has grown."""
    env = smac()
    env.reset()
    with pytest.raises(envs.GameFailure, match="reset before"):
        env.reset()


def test_a_healthy_smac_is_disturbed(smac):
    """Catches: a second episode refused, or an answer changed."""
    env = smac()
    for _ in range(2):
        env.reset()
        assert env.step([0]) == (1.0, True, {"battle_won": True})


def test_a_forbidden_action_is_taken_for_a_crash_of_starcraft(smac):
    """Catches: our own mistake hidden behind ten void episodes."""
    env = smac(Strict)
    env.reset()
    with pytest.raises(AssertionError):
        env.step([9])


def test_starcrafts_replay_is_lost(smac, tmp_path, monkeypatch):
    """Catches: replays in the game's own folder, under one name for all seeds, or not saved."""
    monkeypatch.chdir(tmp_path)
    env = smac(replay_dir="replays")
    assert env.env.given == ("3m", 5, str(tmp_path / "replays"), "3m_5")
    env.reset()
    env.step([0])
    env.close()
    assert env.env.calls == ["save", "close"]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"map_name": "8m"}, "8m.SC2Map does not exist"),
        ({"dificulty": 7}, "TypeError: .*'dificulty'"),
        ({"made": Mock(side_effect=ImportError("no pysc2"))}, "ImportError: no pysc2"),
    ],
)
def test_smac_does_not_say_what_it_needs(smac, given, words):
    """Catches: a traceback where smac, the map or the right argument is missing."""
    with pytest.raises(envs.UsageError, match=f"^.*{words}; smac:MAP needs .*SC2PATH.*$"):
        smac(**given)


def test_two_games_of_starcraft_share_a_worker(monkeypatch):
    """Catches: games that wait for each other, and a crash that takes two episodes along."""
    ask = Mock(return_value={0: dict.fromkeys(envs.SIZES, 3)})
    monkeypatch.setattr(envs.Workers, "ask", ask)
    workers(3, cores=1, name="smac:3m")
    asked = ask.call_args.args[1]
    assert len(asked) == 3


# -------------------------------------------------------------------------- texts, the format
def code_block(file, word):
    """The first Python block of a text that contains `word`."""
    blocks = (HERE / file).read_text().split("```python\n")[1:]
    return next(block.split("```")[0] for block in blocks if word in block)


def test_readmes_python_does_not_run_as_printed():
    """Catches: an example in README.md that the code has left behind."""
    code = code_block("README.md", "qmix.configure")
    short = "total_steps=500, num_envs=4, batch_size=4, buffer_size=8"
    code = code.replace("total_steps=50_000", short)
    assert short in code
    names = {}
    exec(code, names)
    assert names["facts"]["env_steps"] >= 500
    assert names["actions"].shape == (1, 2)
    assert names["action"].shape == (1,)


def test_the_own_environment_of_the_docs_does_not_run_as_printed(folder, monkeypatch):
    """Catches: an example that does not run, --env-args that do not arrive."""
    (folder / "mygame.py").write_text(code_block("docs/environments.md", "class Meet"))
    monkeypatch.syspath_prepend(folder)
    flags = "--env mygame:Meet --env-args size=3 --num-envs 2 --total-steps 60 --batch-size 4"
    more = "--buffer-size 8 --threads 1 --device cpu --out run"
    assert qmix.main(f"{flags} {more}".split()) == 0
    policy = qmix.load("run")
    assert policy.config.env_args == ("size=3",)
    assert policy.agent.obs_dim == 2


def test_the_docs_table_of_columns_is_another():
    """Catches: a column of metrics.csv that the docs do not explain."""
    text = (HERE / "docs" / "environments.md").read_text()
    assert re.findall(r"(?m)^\| `(\w+)` \|", text) == qmix.COLUMNS


@parametrize("command", [["check"], ["format", "--check"]])
def test_a_file_is_not_as_ruff_wants_it(command):
    """Catches: code that make lint refuses."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
