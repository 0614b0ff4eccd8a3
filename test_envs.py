"""Tests of envs.py. Each names the mistake it would catch."""

import random
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from envs import Checkers, TwoStep, UsageError

torch.set_num_threads(1)
BEST = "00 10 30 22 01 01 03 03 02 20 10 10 12 31 01 01 01 23 23 00 00 10 12 11 31 01 01 01 23 23 00 00 10 10 00 20 20"
BEST_DISCOUNTED = "01 13 02 11 31 20 10 21 03 12 01 11 03 20 21 01 13 02 11 01 03 20 20"


class SlowCheckers:
    """The rules once more, in plain Python, one game at a time, with nothing taken from checkers.py."""

    def __init__(self):
        self.food = {}
        for row, letters in enumerate(("ALALAL", "LALALA", "ALALAL")):
            for column, letter in enumerate(letters):
                self.food[row, column] = letter
        self.at = [(0, 6), (2, 6)]
        self.steps = 0
        self.events = set()

    def apples(self):
        return [cell for cell, letter in self.food.items() if letter == "A"]

    def wanted(self, agent, action):
        row, column = self.at[agent]
        return {0: (row + 1, column), 1: (row, column - 1), 2: (row - 1, column), 3: (row, column + 1)}.get(action)

    def step(self, actions):
        reward, before, ate_last = -0.02, list(self.at), None
        if actions[0] != 4 and self.wanted(0, actions[0]) == self.wanted(1, actions[1]):
            self.events.add("both want one cell")
        for agent in (0, 1):
            target, other = self.wanted(agent, actions[agent]), self.at[1 - agent]
            if target is None:
                continue
            if target[0] not in range(3) or target[1] not in range(8):
                self.events.add(f"agent {agent} bumps into the edge")
            elif target == other:
                self.events.add(f"agent {agent} bumps into the other")
            else:
                self.at[agent] = target
                letter = self.food.pop(target, None)
                if letter is not None:
                    reward += (10 if agent == 0 else 1) * (1 if letter == "A" else -1)
                if letter == "A" and not self.apples():
                    ate_last = agent
        if self.at[1] == before[0] and before[1] != before[0]:
            self.events.add("agent 1 enters the cell agent 0 just left")
        self.steps += 1
        terminated = not self.apples()
        truncated = self.steps == 100 and not terminated
        if truncated:
            self.events.add("time-out")
        if ate_last is not None:
            self.events.add(f"agent {ate_last} eats the last apple")
            if self.at[1 - ate_last] != before[1 - ate_last]:
                self.events.add("last apple eaten while the other moves")
            if self.steps == 100:
                self.events.add("last apple exactly at step 100")
        return reward, terminated, truncated

    def observe(self, variant):
        views = []
        for row, column in self.at:
            view = [[0.0, 0.33, 0.67][row], [0.0, 0.14, 0.29, 0.43, 0.57, 0.71, 0.86, 1.0][column]]
            for r in (row - 1, row, row + 1):
                for c in (column - 1, column, column + 1):
                    letter = self.food.get((r, c))
                    view += [letter == "L", letter == "A", (r, c) == self.at[0], (r, c) == self.at[1], 0]
            if variant >= 2:
                view.append(self.steps / 100)
            views.append(view)
        return [views[0] + views[1]] * 2 if variant % 2 else views

    def state(self):
        order = [(r, c) for kind in (0, 1) for r in range(3) for c in range(6) if (r + c) % 2 == kind]
        places = [[(r, c) == at for r in range(3) for c in range(8)] for at in self.at]
        return [cell in self.food for cell in order] + [self.steps / 100] + places[0] + places[1]


def toward(rng, here, cell):
    down, right = cell[0] - here[0], cell[1] - here[1]
    return rng.choice([0] * max(down, 0) + [2] * max(-down, 0) + [3] * max(right, 0) + [1] * max(-right, 0) or [4])


def choose(rng, habit, game, last, wait):
    """Actions biased toward the corners of the rules; `wait`: leave the last apple until so many steps are over."""
    actions = [rng.randrange(5), rng.randrange(5)]
    nearest = [min(game.apples(), key=lambda cell: abs(cell[0] - r) + abs(cell[1] - c)) for r, c in game.at]
    if habit == "eat" and rng.random() < 0.9:
        actions = [toward(rng, game.at[0], nearest[0]), toward(rng, game.at[1], rng.choice(list(game.food)))]
    elif habit == "race" and rng.random() < 0.9:
        actions = [toward(rng, game.at[agent], nearest[0]) for agent in (0, 1)]
    elif habit == "walls" and rng.random() < 0.7:
        actions = last
    elif habit == "chase" and rng.random() < 0.8:
        actions[1] = toward(rng, game.at[1], game.at[0])
    elif habit == "crash" and rng.random() < 0.6:
        actions = [toward(rng, game.at[0], game.at[1]), toward(rng, game.at[1], game.at[0])]
    for agent in (0, 1):
        if len(game.apples()) == 1 and game.steps < wait and game.wanted(agent, actions[agent]) == game.apples()[0]:
            actions[agent] = 4
    return actions


@lru_cache
def slow_episodes(number, seed=0):
    """Play the slow game; the joint actions of every episode (each as long as it lasted), and what it met."""
    rng, episodes, events = random.Random(seed), [], set()
    for k in range(number):
        game, actions, ended = SlowCheckers(), [], False
        habit = ("random", "eat", "eat", "race", "race", "walls", "chase", "crash")[k % 8]
        wait = rng.choice((0, 98, 99)) if habit in ("eat", "race") else 0
        while not ended:
            actions.append(choose(rng, habit, game, actions[-1] if actions else [1, 1], wait))
            ended = any(game.step(actions[-1])[1:])
        episodes.append(actions)
        events |= game.events
    return episodes, events


def play_batched(variant, episodes):
    """All episodes side by side; (T + 1, B, ...) arrays. After its end an episode gets random actions: padding."""
    env = Checkers(variant, n_envs=len(episodes))
    actions = torch.randint(5, (100, len(episodes), 2))
    for b, episode in enumerate(episodes):
        actions[:len(episode), b] = torch.tensor(episode)
    steps = [env.reset()] + [env.step(a) for a in actions]
    assert all(step.obs.shape[1:] == (2, env.obs_dim) and step.state.shape[1:] == (67,) for step in steps)
    assert all(step.avail.all() and step.obs.isfinite().all() and step.info == {} for step in steps)
    return [torch.stack([getattr(step, name) for step in steps]).numpy()
            for name in ("obs", "state", "reward", "terminated", "truncated")]


@pytest.mark.parametrize("variant", range(4))
def test_checkers_equals_the_rules_played_slowly(variant):
    """Catches: any wrong table entry, wrong order of the agents, a stale clock, food, an end learned as the other."""
    episodes, events = slow_episodes(600)
    assert events == {"both want one cell", "agent 0 bumps into the edge", "agent 1 bumps into the edge",
                      "agent 0 bumps into the other", "agent 1 bumps into the other", "time-out",
                      "agent 1 enters the cell agent 0 just left", "agent 0 eats the last apple",
                      "agent 1 eats the last apple", "last apple eaten while the other moves",
                      "last apple exactly at step 100"}  # else the comparison below would prove less than it says
    obs, state, reward, terminated, truncated = play_batched(variant, episodes[:300])
    for b, episode in enumerate(episodes[:300]):
        game, t = SlowCheckers(), len(episode)
        slow_obs, slow_state, ends = [game.observe(variant)], [game.state()], [(0.0, False, False)]
        for actions in episode:
            ends.append(game.step(actions))
            slow_obs.append(game.observe(variant))
            slow_state.append(game.state())
        np.testing.assert_array_equal(obs[:t + 1, b], np.array(slow_obs, np.float32))
        np.testing.assert_array_equal(state[:t + 1, b], np.array(slow_state, np.float32))
        np.testing.assert_allclose(reward[:t + 1, b], [end[0] for end in ends], atol=2e-6)
        np.testing.assert_array_equal(terminated[:t + 1, b], [end[1] for end in ends])
        np.testing.assert_array_equal(truncated[:t + 1, b], [end[2] for end in ends])


@pytest.mark.parametrize("variant,number", [(0, 1000), (1, 400), (2, 400), (3, 1000)])
def test_checkers_equals_ma_gym(variant, number):
    """Catches: rules misread from ma-gym, variants mixed up, unrounded coordinates, half of the step cost."""
    gym = pytest.importorskip("gym")
    pytest.importorskip("ma_gym")
    original = gym.make(f"ma_gym:Checkers-v{variant}").unwrapped
    original._Checkers__draw_base_img = lambda: None  # a picture at every reset, which takes most of its time
    assert [space.n for space in original.action_space] == [5, 5]  # and ma-gym has no mask: all actions are available
    episodes, _ = slow_episodes(1000)
    obs, _, reward, terminated, truncated = play_batched(variant, episodes[:number])
    for b, episode in enumerate(episodes[:number]):
        their_obs, their_reward, their_ends = [original.reset()], [0.0], [False]
        for actions in episode:
            seen, rewards, dones, info = original.step(actions)
            their_obs.append(seen)
            their_reward.append(sum(rewards))
            their_ends.append(all(dones))
        t = len(episode)
        np.testing.assert_array_equal(obs[:t + 1, b], np.array(their_obs, np.float32))
        np.testing.assert_allclose(reward[:t + 1, b], their_reward, atol=2e-6)
        np.testing.assert_array_equal((terminated | truncated)[:t + 1, b], their_ends)
        assert their_ends[-1] and terminated[t, b] == (info["food_count"]["apple"] == 0)


@pytest.mark.parametrize("text,length,total,discounted", [
    (BEST, 37, 86.26, None), (BEST_DISCOUNTED, 23, 83.54, 74.688680), ("44 " * 100, 100, -2.0, None)])
def test_checkers_known_returns(text, length, total, discounted):
    """Catches: another game than the one whose exact optimum PAPER.md gives. The last line: nobody moves."""
    env, rewards = Checkers(n_envs=2), []
    env.reset()
    for pair in text.split():
        step = env.step(torch.tensor([[int(action) for action in pair]] * 2))
        rewards.append(step.reward[1].double().item())
        assert (step.terminated | step.truncated).all() == (len(rewards) == length)
    assert sum(rewards) == pytest.approx(total, abs=1e-4)
    assert step.truncated.all() == (total < 0)
    if total > 0:
        assert total <= env.best_return
    if discounted is not None:
        assert sum(0.99 ** t * reward for t, reward in enumerate(rewards)) == pytest.approx(discounted, abs=2e-5)


def test_last_apple_at_step_100_terminates():
    """Catches: the time limit winning over the end of the task (a bootstrap from a finished game)."""
    pairs = BEST.split()
    pairs = pairs[:-1] + ["44"] * (100 - len(pairs)) + pairs[-1:]
    env = Checkers(n_envs=1)
    env.reset()
    steps = [env.step(torch.tensor([[int(action) for action in pair]])) for pair in pairs]
    assert len(steps) == 100 and not any(step.terminated or step.truncated for step in steps[:-1])
    assert steps[-1].terminated and not steps[-1].truncated and steps[-1].reward.item() == pytest.approx(9.98)


def test_two_step_is_the_papers_table():
    """Catches: agent 2 choosing the state, a swapped payoff, too long an episode, a stale reset."""
    choices = torch.cartesian_prod(*[torch.arange(2)] * 4)  # (16, 4): first u1 u2, second u1 u2
    env = TwoStep(n_envs=16)
    for _ in range(2):
        first, middle, last = env.reset(), env.step(choices[:, :2]), env.step(choices[:, 2:])
        assert not (first.terminated | middle.terminated).any() and last.terminated.all()
        assert not torch.stack([step.truncated for step in (first, middle, last)]).any()
        assert not middle.reward.any() and not first.reward.any()
        for b, (u1, _, v1, v2) in enumerate(choices.tolist()):
            assert last.reward[b] == (7 if u1 == 0 else {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 8}[v1, v2])
            assert middle.state[b].tolist() == ([0, 1, 0] if u1 == 0 else [0, 0, 1])
        assert (first.state == torch.tensor([1.0, 0, 0])).all()
        for step in (first, middle, last):
            assert step.avail.shape == (16, 2, 2) and step.avail.all() and step.obs.dtype == torch.float32
            assert (step.obs == step.state[:, None]).all() and step.obs.shape == (16, 2, 3)
    assert last.reward.max() == env.best_return


class NoHostSync(TorchDispatchMode):
    """Refuses every operation whose result the host has to wait for on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "_to_copy")), name
        if "index" in name:
            assert all(i is None or i.dtype != torch.bool for i in args[1] or []), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("env", [TwoStep(4), Checkers(3, 4)], ids=["two-step", "checkers"])
def test_step_needs_no_host_sync_and_leaves_earlier_tensors_alone(env):
    """Catches: .item() or a boolean mask inside a step; a replay filled with live views of the board."""
    actions = torch.randint(2, (5, 4, 2))
    steps, copies = [], []
    for t in range(6):
        if t == 0:
            step = env.reset()
        else:
            with NoHostSync():
                step = env.step(actions[t - 1])
        steps.append(step)
        copies.append([field.clone() for field in step[:-1]])
    env.reset()
    for step, copy in zip(steps, copies):
        assert all(torch.equal(field, kept) for field, kept in zip(step[:-1], copy))
    dtypes = [torch.float32, torch.float32, torch.bool, torch.float32, torch.bool, torch.bool]
    assert [field.dtype for field in steps[-1][:-1]] == dtypes


def test_checkers_refuses_an_unknown_variant():
    """Catches: checkers-v7 quietly trained as something else."""
    for variant in (4, -1, "1", None):
        with pytest.raises(UsageError, match="variants 0, 1, 2 and 3"):
            Checkers(variant)


def test_checkers_draws_a_gif(tmp_path):
    """Catches: a drawing that raises, or that never changes."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.animation import PillowWriter
    env = Checkers(n_envs=2)
    env.reset()
    figure, ax = pyplot.subplots(figsize=(4, 2))
    writer, pictures = PillowWriter(fps=4), []
    with writer.saving(figure, tmp_path / "demo.gif", dpi=50):
        for pair in BEST.split()[:5]:
            ax.clear()
            env.draw(ax, 1)
            writer.grab_frame()
            pictures.append(np.asarray(figure.canvas.buffer_rgba()).copy())
            env.step(torch.tensor([[4, 4], [int(action) for action in pair]]))
    pyplot.close(figure)
    assert (tmp_path / "demo.gif").stat().st_size > 1000
    assert all((before != after).any() for before, after in zip(pictures, pictures[1:]))
