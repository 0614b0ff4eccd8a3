"""Tests of envs.py. Each names the mistake it would catch."""

import math
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from envs import (
    ATTACK,
    EAST,
    LEASH,
    NORTH,
    NOTICE,
    SIGHT,
    SOUTH,
    STOP,
    WEST,
    Checkers,
    Geometry,
    Skirmish,
    TwoStep,
    UsageError,
    make,
)

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


# ------------------------------------------------------------------------------------------------------------ skirmish

FAR = 1e9  # a cooldown that disarms


def arena(map_name, places, n_envs=1, **kwargs):
    """A battle with only the units in `places` {index: (x, y)} alive; the weapons' cooldowns do not vary."""
    env = Skirmish(map_name, n_envs, **kwargs)
    env.noise = lambda: torch.full_like(env.x, 1 / 3)  # -1 + 3/3 loops
    env.reset()
    env.calm.zero_()  # enemies notice whatever is in sight
    env.health[:, [unit for unit in range(env.x.shape[1]) if unit not in places]] = 0
    for unit, (x, y) in places.items():
        env.x[:, unit], env.y[:, unit] = x, y
    return env


def loops(env, actions, count):
    """Plays `count` game loops on one order and yields after each."""
    orders = env.order(torch.tensor([actions]))
    for loop in range(1, count + 1):
        env.game_loop(*orders, env.reload.expand_as(env.x))
        yield loop


def attack(env, ally, enemy):
    """Actions (N) by which `ally` attacks `enemy`, both indices among all units, and the others stop."""
    actions = [STOP] * env.n_agents
    actions[ally] = ATTACK + enemy - env.n_agents
    return actions


# The interface against the real smac ------------------------------------------------------------------------------

@pytest.mark.parametrize("map_name", ["3m", "8m", "2s3z", "3s5z", "1c3s5z"])
def test_golden_rows_of_smac(map_name):
    """Catches any feature, divisor, order, mask border, type bit or reward term that is not smac's."""
    data = np.load(Path(__file__).parent / "testdata" / "smac_golden" / f"{map_name}.npz")
    K, N = data["last_action"].shape
    cells = [np.flatnonzero(data["pathing_grid"].any(axis)) for axis in (1, 0)]
    geometry = Geometry((float(data["center_x"]), float(data["center_y"])),
                        (float(data["max_distance_x"]), float(data["max_distance_y"])),
                        *((float(axis.min()), float(axis.max() + 1)) for axis in cells))
    env = Skirmish(map_name, n_envs=K, geometry=geometry)
    sizes = [env.n_agents, env.n_enemies, env.n_actions, env.episode_limit, env.obs_dim, env.state_dim, env.max_reward]
    assert sizes == [*(int(data[key]) for key in ("n_agents", "n_enemies", "n_actions", "episode_limit")),
                     data["obs"].shape[2], data["state"].shape[1], float(data["max_reward"])]

    def plant(prefix):
        for name in ("x", "y", "health", "shield", "cooldown"):
            facts = np.concatenate([data[f"{prefix}{team}_{name}"] for team in ("ally", "enemy")], 1)
            getattr(env, name).copy_(torch.tensor(facts))

    moved = data["has_transition"]
    plant("prev_")
    points, alive = env.health + env.shield, env.health > 0
    goal_x, goal_y, walks = (order[:, :N].numpy() for order in env.order(torch.tensor(data["actions"]).long()))
    kind = np.where(walks, 2, np.where(env.target[:, :N] >= 0, 3, 1)) * alive[:, :N].numpy()
    assert (kind == data["order_kind"])[moved].all()
    assert (np.where(kind == 3, env.target[:, :N] - N, -1) == data["order_target"])[moved].all()
    walking = moved[:, None] & walks
    np.testing.assert_allclose(goal_x[walking], data["order_x"][walking], atol=1e-6)
    np.testing.assert_allclose(goal_y[walking], data["order_y"][walking], atol=1e-6)

    plant("")
    env.last_actions.copy_(torch.tensor(data["last_action"]))
    env.steps = torch.tensor(data["step"])  # (K,): here every row has its own clock
    step = env.look(env.reward(points, alive))
    assert (step.avail.numpy() == data["avail"]).all()
    np.testing.assert_allclose(step.obs, data["obs"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(step.state, data["state"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(step.reward[moved], data["reward"][moved], rtol=0, atol=1e-6)
    assert ((step.terminated | step.truncated).numpy() == data["terminated"])[moved].all()
    assert (step.truncated.numpy() == data["timed_out"])[moved].all()
    for key in ("battle_won", "dead_allies", "dead_enemies"):
        assert (step.info[key].numpy() == data[f"info_{key}"])[moved].all(), key


def test_golden_sizes_of_5m_and_5m_vs_6m():
    """Catches N and M swapped, which maps with N = M cannot show. Sizes by the formulas of the golden README."""
    for name, N, M in (("5m", 5, 5), ("5m_vs_6m", 5, 6)):
        env = Skirmish(name, n_envs=2)
        step = env.reset()
        assert step.obs.shape == (2, N, 4 + 5 * M + 5 * (N - 1) + 1) and step.avail.shape == (2, N, 6 + M)
        assert step.state.shape == (2, 4 * N + 3 * M + N * (6 + M))
        assert (env.obs_dim, env.state_dim, env.max_reward) == (step.obs.shape[2], step.state.shape[1], 55 * M + 200)


# The rules --------------------------------------------------------------------------------------------------------

# By hand: shots until the shield is gone and the health is too, armour off every hit that meets health; the first
# shot falls in loop 1, the next ones ceil(reload) loops apart. 1c3s5z: 0 colossus, 1 stalker, 4 zealot; enemies + 9.
@pytest.mark.parametrize("map_name, shooter, victim, shots, reload", [
    ("3m", 0, 3, 8, 14),  # 45 / 6
    ("1c3s5z", 4, 13, 11, 20),  # 16: 48 off the shield of 50; 8 with 2 left: 5 + 7; then 14
    ("1c3s5z", 1, 10, 10, 31),  # 18: 72 off 80; 8 left: 9; then 17
    ("1c3s5z", 1, 13, 13, 31),  # 13: 39 off 50; 11 left: 1; then 12
    ("1c3s5z", 4, 10, 11, 20),  # 16: 80 off 80; then 14
    ("1c3s5z", 0, 13, 6, 24),  # 30: 30 off 50; 15, then 5 left: 9; then 28
    ("1c3s5z", 0, 10, 9, 24),  # 20: 80 off 80; then 18
    ("1c3s5z", 0, 9, 19, 24),  # 20: 140 off 150; 10 left: 9; then 18
])
def test_shots_to_kill_and_the_loop_of_death(map_name, shooter, victim, shots, reload):
    """Catches wrong damage, bonus, armour (also off shields), shield order or reload; both directions of fire."""
    for first, second in ((shooter, victim), (victim, shooter)):
        env = Skirmish(map_name, 1)
        N = env.n_agents
        first, second = (first, second) if first == shooter else (shooter + N, victim - N)
        gap = float(env.reach[first] + env.radius[second]) - 0.05
        env = arena(map_name, {first: (15, 16), second: (15 + gap, 16)})
        env.cooldown[:, second] = FAR
        env.speed[second] = 0
        actions = attack(env, first, second) if first < N else [STOP] * N
        fired = 0
        for loop in loops(env, actions, 1 + shots * reload):
            fired += int(env.shots[0, first] == second)
            env.shots.fill_(-1)
            if env.health[0, second] <= 0:
                break
        assert (fired, loop) == (shots, 1 + (shots - 1) * reload)


def test_wounds_equal_a_loop_over_hits():
    """Catches armour or shields mistaken where several attackers of several kinds hit in one loop."""
    env = Skirmish("1c3s5z", n_envs=64)
    env.reset()
    draw = torch.Generator().manual_seed(1)
    env.shield.mul_(torch.rand(env.shield.shape, generator=draw))
    env.calm.zero_()
    attacks = env.shot * (torch.rand(64, 18, 18, generator=draw) < 0.4)
    health, shield = env.health.tolist(), env.shield.tolist()
    for b in range(64):
        for victim in range(18):
            for attacker in range(18):
                hits = 1 if env.names[attacker] == "stalker" else 2
                for _ in range(hits if attacks[b, attacker, victim] > 0 else 0):
                    hit = float(attacks[b, attacker, victim]) / hits
                    absorbed = min(hit, shield[b][victim])
                    shield[b][victim] -= absorbed
                    health[b][victim] -= max(hit - absorbed - 1, 0)
    env.wound(attacks)
    torch.testing.assert_close(env.shield, torch.tensor(shield), rtol=0, atol=1e-3)
    torch.testing.assert_close(env.health, torch.tensor(health).clamp(min=0), rtol=0, atol=1e-3)


def test_shields_regenerate_after_160_loops_up_to_their_maximum():
    """Catches a delay off by one, another rate, a delay that damage does not restart, and shields that outgrow."""
    env = arena("2s3z", {0: (5, 10), 5: (25, 20)})
    env.shield[0, 0] = 70.0
    env.wound(torch.zeros(1, 10, 10).index_put_((torch.tensor(0), torch.tensor(5), torch.tensor(0)), torch.tensor(18.)))
    for loop in range(1, 401):
        env.wound(torch.zeros(1, 10, 10))
        assert env.shield[0, 0] == min(52 + 0.125 * max(loop - 160, 0), 80)


@pytest.mark.parametrize("angle", [0.0, 0.7, 2.5])
def test_the_beam_hits_what_it_touches_across_the_line_of_fire(angle):
    """Catches a beam along the line of fire, one fixed to the axes, centres taken for bodies, and friendly fire."""
    along, across = 0.15 + 0.5, 1.4 + 0.5  # half the beam and a zealot's radius

    def place(forward, aside):  # from the target, in the direction of fire
        return (16 + forward * math.cos(angle) - aside * math.sin(angle),
                16 + forward * math.sin(angle) + aside * math.cos(angle))

    places = {0: place(-5, 0), 10: place(0, 0), 13: place(0, across - 0.01), 14: place(0, -across - 0.01),
              15: place(along - 0.01, -1), 16: place(-along - 0.01, 1), 4: place(0.1, 1.2)}
    env = arena("1c3s5z", places)
    env.cooldown[:, 1:] = FAR
    next(loops(env, attack(env, 0, 10), 1))
    assert (env.shield_max - env.shield)[0, [10, 13, 14, 15, 16, 4]].tolist() == [20, 30, 0, 30, 0, 0]


@pytest.mark.parametrize("map_name, shooter, victim, reach, speed", [
    ("3m", 0, 3, 5.75, 3.15), ("1c3s5z", 1, 13, 7.125, 4.13), ("1c3s5z", 4, 13, 1.1, 3.15),
    ("1c3s5z", 0, 10, 8.625, 3.15)])
def test_ranges_count_from_edge_to_edge_and_units_walk_into_them(map_name, shooter, victim, reach, speed):
    """Catches ranges between centres, shots on the way, overshooting, and a wrong speed."""
    for gap in (reach - 0.01, reach + 0.01, reach + 0.5):
        env = arena(map_name, {shooter: (12, 16), victim: (12 + 0.6 * gap, 16 + 0.8 * gap)})
        env.cooldown[:, victim] = FAR
        env.speed[victim] = 0
        walk = max(gap - reach, 0)
        for loop in loops(env, attack(env, shooter, victim), math.ceil(walk * 22.4 / speed) + 1):
            walked = math.hypot(float(env.x[0, shooter]) - 12, float(env.y[0, shooter]) - 16)
            assert walked == pytest.approx(min(loop * speed / 22.4, walk), abs=2e-3)
            assert (env.shots[0, shooter] == victim) == (loop == math.ceil(walk * 22.4 / speed) + 1)


@pytest.mark.parametrize("action, axis, sign", [(NORTH, "y", 1), (SOUTH, "y", -1), (EAST, "x", 1), (WEST, "x", -1)])
def test_moves_and_the_borders_of_the_map(action, axis, sign):
    """Catches swapped directions, wrong speed, a way off the map, and borders off by one: walkable x 2-30, y 7-25."""
    env = arena("3m", {0: (16, 16), 3: (3, 8) if sign > 0 else (29, 24)})
    env.cooldown[:, 3], env.speed[3] = FAR, 0
    border = {"x": (2, 30), "y": (7, 25)}[axis][sign > 0]
    for step in range(1, 20):
        place = float(getattr(env, axis)[0, 0])
        assert place == pytest.approx(16 + sign * min((step - 1) * 8 * 3.15 / 22.4, abs(border - 16)), abs=2e-3)
        assert 2 <= env.x[0, 0] < 30 and 7 <= env.y[0, 0] < 25
        free = place + 1 < border if sign > 0 else place - 1 >= border
        assert bool(env.available()[0, 0, action]) == free
        env.step(torch.tensor([[action, 0, 0]]))
    assert not free


def test_a_move_order_is_two_cells():
    """Catches units that walk on, or stop short, when an order's way is done."""
    env = arena("2s3z", {0: (16, 16)})
    for _ in loops(env, [EAST, 0, 0, 0, 0], 30):
        pass
    assert float(env.x[0, 0]) == pytest.approx(18, abs=2e-3)


def test_units_do_not_overlap_but_the_dead_make_way():
    """Catches missing pushes, pushes by corpses, and the wrong zealot radius (0.375 for pushing, 0.5 for the rest)."""
    env = Skirmish("1c3s5z", n_envs=8)
    env.reset()
    env.x.copy_(16 + torch.rand(env.x.shape, generator=env.generator))
    env.y.copy_(16 + torch.rand(env.x.shape, generator=env.generator))
    env.cooldown.fill_(FAR)
    env.speed.zero_()
    env.health[:, 8] = 0
    for _ in range(40):
        env.step(torch.ones(8, 9, dtype=torch.long))
    gap = ((env.x[:, None] - env.x[..., None]) ** 2 + (env.y[:, None] - env.y[..., None]) ** 2).sqrt()
    radius = torch.tensor([1.0] + [0.625] * 3 + [0.375] * 5).repeat(2)
    alive = env.health[0] > 0
    apart = gap + torch.eye(18) * 9 - radius - radius[:, None]
    assert -0.02 < apart[:, alive][:, :, alive].min() < 0.02
    env = arena("3m", {0: (16, 16), 3: (28, 24)})
    env.x[:, 1:3], env.y[:, 1:3] = 16.1, 16.1  # two corpses
    env.step(torch.tensor([[STOP, 0, 0]]))
    assert (env.x[0, 0], env.y[0, 0]) == (16, 16)
    env = arena("2s3z", {2: (16, 16), 3: (16.8, 16), 4: (16, 16.7)})  # zealots: only the last two are too close
    fell = env.x[0, 5:].clone()
    env.step(torch.tensor([[0, 0, STOP, STOP, STOP]]))
    assert env.x[0, 3] == torch.tensor(16.8) and env.y[0, 4] - env.y[0, 2] == pytest.approx(0.75, abs=1e-2)
    assert torch.equal(env.x[0, 5:], fell)  # the dead stay where they fell
    env = arena("3m", {0: (29.999, 24.999), 1: (29.999, 24.999), 3: (4, 8)})  # two on one spot in a corner
    for _ in range(5):
        env.step(torch.tensor([[STOP, STOP, 0]]))
    assert math.hypot(*(env.x[0, 0] - env.x[0, 1], env.y[0, 0] - env.y[0, 1])) > 0.74


def test_own_units_never_fire_unordered_and_enemies_do():
    """Catches own units that acquire targets, and an attack order on a dead enemy that hits something."""
    for action in (STOP, ATTACK + 1):  # enemy 1 is dead
        env = arena("3m", {0: (14, 16), 3: (16, 16)})
        step = env.step(torch.tensor([[action, 0, 0]]))
        assert env.health[0, 3] == 45 and env.health[0, 0] == 39 and step.reward == 0
        assert env.x[0, 0] == 14


@pytest.mark.parametrize("noise, reload", [(0.0, 13), (1 / 3, 14), (0.9999, 16)])
def test_the_cooldown_varies_by_minus_one_to_two_loops(noise, reload):
    """Catches a variation with another range or sign: a marine's 13.664 loops become 12.664 to 15.664."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.noise = lambda: torch.full_like(env.x, noise)
    env.cooldown[:, 3] = FAR
    env.step(torch.tensor([[ATTACK, 0, 0]]))  # fires in loop 1 of 8
    assert float(env.cooldown[0, 0]) == pytest.approx(13.664 + 3 * noise - 1 - 8, abs=1e-3)
    for loop in range(9, 20):
        env.shots.fill_(-1)
        next(loops(env, [ATTACK, 0, 0], 1))
        if env.shots[0, 0] >= 0:
            break
    assert loop == reload + 1


def test_both_sides_wiped_out_in_one_loop():
    """Catches damage dealt in turn rather than at once, and a draw counted as a win."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.health[0, [0, 3]] = 5.0
    step = env.step(torch.tensor([[ATTACK, 0, 0]]))
    assert env.health.max() == 0 and step.terminated and not step.truncated and not step.info["battle_won"]
    assert float(step.reward) == pytest.approx((5 + 10) / (365 / 20))
    assert step.avail[0].tolist() == [[True] + [False] * 8] * 3 and step.obs.abs().max() == 0


def test_a_time_limit_truncates():
    """Catches a clock off by one and a time-out that is reported as an end."""
    env = arena("3m", {0: (4, 8), 3: (28, 24)})
    env.speed.zero_()
    for count in range(1, 61):
        step = env.step(torch.tensor([[STOP, 0, 0]]))
        assert bool(step.truncated) == (count == 60) and not step.terminated
    assert not env.reset().truncated


def test_battles_repeat_with_the_seed_and_only_with_it():
    """Catches a seed that is not used, randomness from elsewhere, and state that survives a reset."""
    def battle(env):
        env.reset()
        for _ in range(25):
            step = env.step(env.heuristic())
        return step.state
    first, second, other = Skirmish("2s3z", 4, seed=1), Skirmish("2s3z", 4, seed=1), Skirmish("2s3z", 4, seed=2)
    one = battle(first)
    assert torch.equal(one, battle(second)) and not torch.equal(one, battle(other))
    assert not torch.equal(one, battle(first))
    first.generator.manual_seed(1)
    first.reset()
    fresh = Skirmish("2s3z", 4, seed=1)
    fresh.reset()
    facts = [name for name, fact in vars(fresh).items() if isinstance(fact, torch.Tensor)]
    assert {"x", "calm", "target", "last_actions"} < set(facts)
    assert all(torch.equal(getattr(first, name), getattr(fresh, name)) for name in facts)
    assert (first.x[:, 0] < first.x[:, 1]).all() and (first.x[:, 2:5].diff(dim=1) > 0).all()
    env = Skirmish("1c3s5z", 1)  # its colossus starts beside two stalkers, here in front of them, and stays agent 0
    env.noise = lambda: torch.tensor([[0.9] + 17 * [0.5]])
    env.reset()
    assert env.x[0, 0] == env.start_x[0] + 0.4


@pytest.mark.parametrize("map_name", ["5m_vs_6m", "1c3s5z"])
def test_a_batch_equals_single_battles(map_name):
    """Catches any leak between environments of a batch, and returned tensors that later steps change."""
    B, T = 4, 40
    env = Skirmish(map_name, B)
    draws = torch.rand(T + 2, B, *env.x.shape[1:])

    def battles(rows):
        env = Skirmish(map_name, rows.stop - rows.start)
        feed = iter(draws[:, rows])
        env.noise = lambda: next(feed)
        steps = [env.reset()]
        copies = [steps[0].state.clone()]
        for t in range(T):
            steps.append(env.step(env.heuristic() if t % 5 else env.available().float().argmax(2)))
            copies.append(steps[-1].state.clone())
        assert all(torch.equal(step.state, copy) for step, copy in zip(steps, copies))
        return steps
    batch = battles(slice(0, B))
    for b in range(B):
        for whole, single in zip(batch, battles(slice(b, b + 1))):
            for name in ("obs", "state", "avail", "reward", "terminated"):
                assert torch.equal(getattr(whole, name)[b], getattr(single, name)[0]), name


def test_enemies_notice_keep_and_let_go():
    """Catches enemies that see too far or switch while they can keep, ignore who shoots them, or forget the way."""
    body, loop = 0.75, [STOP] * 3  # two marines' radii
    env = arena("3m", {0: (10, 10), 1: (10, 22), 3: (10 + body + NOTICE + 0.05, 10)})

    def target(**places):
        for unit, place in places.items():
            env.x[0, int(unit[1])], env.y[0, int(unit[1])] = place
        env.calm.fill_(8)
        env.order(torch.tensor([loop]))
        return int(env.target[0, 3])
    near = 10 + body + NOTICE - 0.05
    assert target() == -1
    env.calm.fill_(7)  # it was hurt in the last step
    env.order(torch.tensor([loop]))
    assert int(env.target[0, 3]) == 0
    env.target.fill_(-1)
    assert target(u3=(near, 10)) == 0
    assert target(u1=(near, 11)) == 0  # closer, but it has one
    assert target(u0=(near - body - LEASH - 0.05, 10)) == 1  # out of the leash
    env.health[0, 1] = 0
    assert target() == -1
    env.x[0, 0] = near - body - SIGHT - 0.05
    env.calm.fill_(7)
    goal_x, goal_y, walks = env.order(torch.tensor([loop]))
    assert int(env.target[0, 3]) == -1 and (goal_x[0, 3], goal_y[0, 3]) == (9, 16) and walks[0, 3]
    before = math.hypot(near - 9, 10 - 16)
    env.step(torch.tensor([loop]))
    assert before - math.hypot(env.x[0, 3] - 9, env.y[0, 3] - 16) == pytest.approx(8 * 3.15 / 22.4, abs=1e-3)


def test_the_heuristic_attacks_the_closest_until_it_dies():
    """Catches a heuristic that switches, attacks the dead, walks the wrong way, or plays what is not available."""
    env = arena("3m", {0: (10, 16), 1: (10, 20), 3: (14, 16), 4: (15, 16)})
    actions = env.heuristic()
    assert actions.tolist() == [[ATTACK, ATTACK, 0]]
    env.last_actions.copy_(torch.tensor([[ATTACK + 1, ATTACK + 2, 0]]))
    assert env.heuristic().tolist() == [[ATTACK + 1, ATTACK, 0]]
    env.health[0, 4], env.x[0, 4], env.x[0, 0], env.y[0, 1], env.x[0, 1] = 0, 7, 7.5, 24.5, 14
    assert env.heuristic().tolist() == [[EAST, SOUTH, 0]]
    env = Skirmish("2s3z", 16)
    step = env.reset()
    for _ in range(80):
        actions = env.heuristic()
        assert step.avail.gather(2, actions[..., None]).all()
        step = env.step(actions)


def test_a_step_never_waits_for_the_device():
    """Catches .item(), a tensor in an `if`, and data-dependent shapes: fake tensors have no values to look at."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(allow_non_fake_inputs=True):
        env = Skirmish("1c3s5z", 4)
        env.noise = lambda: torch.rand(4, 18)
        env.reset()
        step = env.step(env.heuristic())
        assert step.obs.shape == (4, 9, env.obs_dim)


@pytest.mark.parametrize("name", ["two-step", "checkers-v3", "skirmish:2s3z"])
def test_facts_stay_where_they_are(name):
    """Catches a fact that a step replaces rather than updates: a CUDA graph would go on reading the old one. And one
    that is no tensor: a graph would never see it change."""
    env = make(name, 4)
    facts = {name: fact.data_ptr() for name, fact in vars(env).items() if isinstance(fact, torch.Tensor)}
    others = {name: fact for name, fact in vars(env).items() if name not in facts and name != "generator"}
    step = env.reset()
    env.step(torch.rand(step.avail.shape).masked_fill(~step.avail, -1).argmax(-1))
    assert all(getattr(env, name) is fact for name, fact in others.items())
    assert facts == {name: fact.data_ptr() for name, fact in vars(env).items() if isinstance(fact, torch.Tensor)}


def test_an_unknown_map_is_refused_with_the_list():
    """Catches a KeyError in the reader's face."""
    with pytest.raises(UsageError, match="3m, 5m, 8m, 5m_vs_6m, 2s3z, 3s5z, 1c3s5z; got '4m'"):
        Skirmish("4m")


def test_draw_shows_the_living_their_shots_and_their_side():
    """Catches a drawing of the wrong environment, of the dead as alive, and lost shots."""
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    env = arena("3m", {0: (14, 16), 3: (16, 16), 4: (28, 24)}, n_envs=2)
    env.step(torch.tensor([[ATTACK, 0, 0]] * 2))
    env.health[0] = 0
    env.draw(axes, 1)
    centers = [circle.center for circle in axes.patches]
    assert centers == [(float(env.x[1, i]), float(env.y[1, i])) for i in (0, 3, 4)]
    shots = [line for line in axes.lines if line.get_zorder() == 1]
    assert len(shots) == 2 and {line.get_color() for line in shots} == {"tab:blue", "tab:red"}
