"""Tests of envs.py. Each names the mistake it would catch. They need neither smac, ma-gym, PettingZoo nor StarCraft II."""

import importlib.util
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
import torch

import envs

torch.set_num_threads(1)
TESTDATA = Path(__file__).parent / "testdata"
BEST = "00 10 30 22 01 01 03 03 02 20 10 10 12 31 01 01 01 23 23 00 00 10 12 11 31 01 01 01 23 23 00 00 10 10 00 20 20"
BEST_DISCOUNTED = "01 13 02 11 31 20 10 21 03 12 01 11 03 20 21 01 13 02 11 01 03 20 20"


# ---- two-step, Checkers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", range(4))
def test_checkers_equals_recorded_ma_gym(variant):
    """Catches: a rule misread from ma-gym, the agents' order, variants mixed up, unrounded coordinates, half of the step
    cost, a stale clock, an end learned as a time-out, a board or clock that a reset leaves as it was."""
    data = np.load(TESTDATA / "ma_gym_checkers.npz")
    assert set(data["events"]) == {
        "both want one cell", "agent 0 bumps into the edge", "agent 1 bumps into the edge", "time-out",
        "agent 0 bumps into the other", "agent 1 bumps into the other", "agent 1 enters the cell agent 0 just left",
        "agent 0 eats the last apple", "agent 1 eats the last apple", "last apple eaten while the other moves",
        "last apple exactly at step 100"}  # else the comparison would prove less than it says
    E = len(data["length"])
    env, cells = envs.Checkers(variant, n_envs=E), np.arange(24)
    order = [[8 * r + c for r in range(3) for c in range(6) if (r + c) % 2 == odd] for odd in (0, 1)]
    for _ in range(2):
        step = env.reset()
        for t in range(101):
            if t > 0:  # what follows after the end of an episode is padding
                step = env.step(torch.from_numpy(data["actions"][:, t - 1]).long())
                now = data["length"] >= t
                np.testing.assert_allclose(step.reward[now], data["reward"][now, t - 1], atol=2e-6)
            now, apples = data["length"] >= t, data["food"][:, t, 0]
            np.testing.assert_array_equal(step.obs[now], data[f"obs_v{variant}"][now, t] / np.float32(100))
            state = [*(data["food"][:, t, kind, order[kind]] for kind in (0, 1)), np.full((E, 1), t / np.float32(100)),
                     *(data["cells"][:, t, agent, None] == cells for agent in (0, 1))]
            np.testing.assert_array_equal(step.state[now], np.concatenate(state, 1)[now])
            np.testing.assert_array_equal(step.terminated[now], ~apples.any(1)[now])
            np.testing.assert_array_equal(step.truncated[now], (apples.any(1) & (t == 100))[now])
            assert (step.terminated | step.truncated)[data["length"] == t].all() and step.avail.all()


@pytest.mark.parametrize("variant", range(4))
def test_checkers_equals_ma_gym(variant):
    """Catches: a recording that is not ma-gym's, or no longer."""
    gym = pytest.importorskip("gym")
    pytest.importorskip("ma_gym")
    original = gym.make(f"ma_gym:Checkers-v{variant}").unwrapped
    original._Checkers__draw_base_img = lambda: None  # a picture at every reset, which takes most of its time
    env, draw, over = envs.Checkers(variant, n_envs=1), torch.Generator().manual_seed(variant), False
    step, theirs = env.reset(), original.reset()
    while not over:
        np.testing.assert_array_equal(step.obs[0], np.array(theirs, np.float32))
        actions = torch.tensor([[0, 1, 1, 2, 3, 4]])[:, torch.randint(6, (2,), generator=draw)]
        theirs, rewards, dones, _ = original.step(actions[0].tolist())
        step, over = env.step(actions), all(dones)
        assert step.reward.item() == pytest.approx(sum(rewards), abs=2e-6)
        assert bool(step.terminated | step.truncated) == over


@pytest.mark.parametrize("text,length,total,discounted", [
    (BEST, 37, 86.26, None), (BEST_DISCOUNTED, 23, 83.54, 74.688680), ("44 " * 100, 100, -2.0, None)])
def test_checkers_known_returns(text, length, total, discounted):
    """Catches: another game than the one whose exact optimum PAPER.md gives. The last line: nobody moves."""
    env, rewards = envs.Checkers(n_envs=2), []
    env.reset()
    for pair in text.split():
        step = env.step(torch.tensor([[int(action) for action in pair]] * 2))
        rewards.append(step.reward[1].double().item())
        assert (step.terminated | step.truncated).all() == (len(rewards) == length)
    assert sum(rewards) == pytest.approx(total, abs=1e-4)
    assert step.truncated.all() == (total < 0) and total <= env.best_return
    if discounted is not None:
        assert sum(0.99 ** t * reward for t, reward in enumerate(rewards)) == pytest.approx(discounted, abs=2e-5)


def test_two_step_is_the_papers_table():
    """Catches: agent 2 choosing the state, a swapped payoff, too long an episode, a stale reset."""
    choices = torch.cartesian_prod(*[torch.arange(2)] * 4)  # (16, 4): first u1 u2, second u1 u2
    env = envs.TwoStep(n_envs=16)
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


@pytest.mark.parametrize("name", ["two-step", "checkers", "checkers-v3", "skirmish:1c3s5z", "skirmish:5m_vs_6m"])
def test_sizes_dtypes_and_no_wait_for_the_device(name):
    """Catches: sizes that are not those of the tensors; returned tensors that later steps change (a replay of live
    views); .item(), a tensor in an `if` or a shape that depends on data within a step: fake tensors have no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    env = envs.make(name, 4)
    steps, copies = [env.reset()], []
    for _ in range(6):
        copies.append([field.clone() for field in steps[-1][:-1]])
        steps.append(env.step(torch.rand(steps[-1].avail.shape).masked_fill(~steps[-1].avail, -1).argmax(-1)))
    steps.append(env.reset())
    for step, copy in zip(steps, copies):
        assert all(torch.equal(field, kept) for field, kept in zip(step[:-1], copy))
    B, N, A = 4, env.n_agents, env.n_actions
    expected = [((B, N, env.obs_dim), torch.float32), ((B, env.state_dim), torch.float32), ((B, N, A), torch.bool),
                ((B,), torch.float32), ((B,), torch.bool), ((B,), torch.bool)]
    assert all([(field.shape, field.dtype) for field in step[:-1]] == expected for step in steps)
    assert hasattr(env, "generator") == name.startswith("skirmish")
    with FakeTensorMode():
        env = envs.make(name, 4)
        env.noise = lambda: torch.rand(4, len(env.names))
        env.reset()
        env.step(env.heuristic() if hasattr(env, "heuristic") else torch.zeros(4, N, dtype=torch.int64))


@pytest.mark.parametrize("name, words", [
    ("checkers-v7", "unknown environment 'checkers-v7'; there are two-step, checkers"), ("3m", "unknown environment '3m'"),
    ("skirmish:4m", "3m, 5m, 8m, 5m_vs_6m, 2s3z, 3s5z, 1c3s5z; got '4m'"), ("checkers", "takes no --env-args, got a"),
    ("mygame.py:Meet", "mygame:Meet"), ("./mygame:Meet", "mygame:Meet"), ("games/mygame.py:Meet", "games.mygame:Meet")])
def test_names_that_make_refuses(name, words):
    """Catches: checkers-v7 trained as something else; a KeyError, or an ImportError for a file that exists."""
    with pytest.raises(envs.UsageError, match=re.escape(words)):
        envs.make(name, arguments={"a": "1"} if name == "checkers" else None)


def test_envs_needs_no_unix_to_be_imported():
    """Catches: `import qmix` failing on Windows, and a traceback where workers are asked for there."""
    code = ("import sys, torch; sys.modules.update(dict.fromkeys(('fcntl', 'mmap', 'resource', 'termios', 'pwd')))\n"
            f"sys.path.insert(0, {str(Path(envs.__file__).parent)!r}); import envs\n"
            "envs.make('checkers').reset(); sys.platform = 'win32'\n"
            "try: envs.make('own:Own')\nexcept envs.UsageError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "own:Own: worker processes need Linux or macOS" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["checkers", "skirmish:3m"])
def test_record_draws_an_episode_whole_or_not_at_all(name, tmp_path):
    """Catches: a drawing that raises or never changes, an episode cut short, half a file after a failure."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    env, path = envs.make(name, 2), tmp_path / "demo.gif"
    env.episode_limit, asked = 8, []

    def choose(step, memory):
        asked.append(memory)
        if len(asked) > 8:
            raise ZeroDivisionError
        return step.avail.float().argmax(-1), len(asked)
    envs.record(env, choose, path, fps=2)
    assert asked == [None, 1, 2, 3, 4, 5, 6, 7] and image.open(path).n_frames >= 9
    kept = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        envs.record(env, choose, path)
    assert path.read_bytes() == kept and [file.name for file in tmp_path.iterdir()] == ["demo.gif"]
    with pytest.raises(envs.UsageError, match="this environment cannot be drawn"):
        envs.record(envs.TwoStep(2), choose, path)


# ---- skirmish --------------------------------------------------------------------------------------------------------

FAR = 1e9  # a cooldown that disarms


def arena(map_name, places, n_envs=1, **kwargs):
    """A battle with only the units in `places` {index: (x, y)} alive; the weapons' cooldowns do not vary."""
    env = envs.Skirmish(map_name, n_envs, **kwargs)
    env.noise = lambda: torch.full((n_envs, len(env.names)), 1 / 3)  # -1 + 3/3 loops
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
    actions = [envs.STOP] * env.n_agents
    actions[ally] = envs.ATTACK + enemy - env.n_agents
    return actions


# The interface against the real smac ------------------------------------------------------------------------------

@pytest.mark.parametrize("map_name", ["3m", "8m", "2s3z", "3s5z", "1c3s5z"])
def test_golden_rows_of_smac(map_name):
    """Catches any feature, divisor, order, mask border, type bit or reward term that is not smac's."""
    data = np.load(TESTDATA / "smac_golden" / f"{map_name}.npz")
    K, N = data["last_action"].shape
    cells = [np.flatnonzero(data["pathing_grid"].any(axis)) for axis in (1, 0)]
    env = envs.Skirmish(map_name, n_envs=K)
    env.center, env.extent = (tuple(map(float, (data[f"{key}_x"], data[f"{key}_y"]))) for key in ("center", "max_distance"))
    env.walk_x, env.walk_y = ((float(axis.min()), float(axis.max() + 1)) for axis in cells)
    env.reset()
    sizes = [env.n_agents, env.n_enemies, env.n_actions, env.episode_limit, env.obs_dim, env.state_dim, env.max_reward]
    assert sizes == [*(int(data[key]) for key in ("n_agents", "n_enemies", "n_actions", "episode_limit")),
                     data["obs"].shape[2], data["state"].shape[1], float(data["max_reward"])]

    def plant(prefix):
        for name in ("x", "y", "health", "shield", "cooldown"):
            facts = np.concatenate([data[f"{prefix}{team}_{name}"] for team in ("ally", "enemy")], 1)
            setattr(env, name, torch.tensor(facts))

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
    env.last_actions = torch.tensor(data["last_action"])
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
    """Catches N and M swapped, which maps with N = M cannot show, and limits. Sizes by the formulas of the golden README."""
    for name, N, M in (("5m", 5, 5), ("5m_vs_6m", 5, 6)):
        env = envs.Skirmish(name, n_envs=2)
        step = env.reset()
        assert step.obs.shape == (2, N, 4 + 5 * M + 5 * (N - 1) + 1) and step.avail.shape == (2, N, 6 + M)
        assert step.state.shape == (2, 4 * N + 3 * M + N * (6 + M))
        assert (env.obs_dim, env.state_dim, env.max_reward) == (step.obs.shape[2], step.state.shape[1], 55 * M + 200)
        assert env.episode_limit == 70


def test_the_state_ends_with_the_actions_just_taken():
    """Catches last actions that are not kept, or kept only after the look, or not forgotten at a reset."""
    env = envs.Skirmish("2s3z", 8)
    for _ in range(2):
        step = env.reset()
        assert not step.state[:, -5 * 11:].any()
        for _ in range(4):
            actions = torch.rand(step.avail.shape).masked_fill(~step.avail, -1).argmax(-1)
            step = env.step(actions)
            assert torch.equal(step.state[:, -5 * 11:].view(8, 5, 11), torch.nn.functional.one_hot(actions, 11).float())


def test_starts_differ_within_a_batch_and_sorting_keeps_places_together():
    """Catches one battle drawn for the whole batch, a y that is not scattered, x sorted without y, a scatter of another
    width, and enemies that are sorted too."""
    env = envs.Skirmish("2s3z", 64)
    noise = [torch.rand(64, 10), torch.rand(64, 10)]
    env.noise = iter(noise).__next__
    env.reset()
    x, y = env.start_x + noise[0] - 0.5, env.start_y + noise[1] - 0.5
    for first, last in ((0, 2), (2, 5)):  # allies of a kind by x
        order = x[:, first:last].argsort(1)
        torch.testing.assert_close(env.x[:, first:last], x[:, first:last].gather(1, order))
        torch.testing.assert_close(env.y[:, first:last], y[:, first:last].gather(1, order))
    torch.testing.assert_close((env.x[:, 5:], env.y[:, 5:]), (x[:, 5:], y[:, 5:]))
    env = envs.Skirmish("2s3z", 64)
    env.reset()
    assert (env.x[1:] != env.x[:-1]).all() and (env.y[1:] != env.y[:-1]).all() and env.y.std(0).min() > 0.2


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
        env = envs.Skirmish(map_name, 1)
        N = env.n_agents
        first, second = (first, second) if first == shooter else (shooter + N, victim - N)
        gap = float(env.reach[first] + env.radius[second]) - 0.05
        env = arena(map_name, {first: (15, 16), second: (15 + gap, 16)})
        env.cooldown[:, second] = FAR
        env.speed[second] = 0
        actions = attack(env, first, second) if first < N else [envs.STOP] * N
        fired = 0
        for loop in loops(env, actions, 1 + shots * reload):
            fired += int(env.shots[0, first] == second)
            env.shots.fill_(-1)
            if env.health[0, second] <= 0:
                break
        assert (fired, loop) == (shots, 1 + (shots - 1) * reload)


def test_wounds_equal_a_loop_over_hits():
    """Catches armour or shields mistaken where several attackers of several kinds hit in one loop."""
    env = envs.Skirmish("1c3s5z", n_envs=64)
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


@pytest.mark.parametrize("ours, theirs", [(0, 5), (5, 0)])
def test_shields_regenerate_after_160_loops_up_to_their_maximum(ours, theirs):
    """Catches a delay off by one, another rate, a delay that damage does not restart, shields that outgrow, and a side
    without any of it."""
    env = arena("2s3z", {0: (5, 10), 5: (25, 20)})
    env.shield[0, ours] = 70.0
    shot = torch.zeros(1, 10, 10)
    shot[0, theirs, ours] = 18.0
    env.wound(shot)
    for loop in range(1, 401):
        env.wound(torch.zeros(1, 10, 10))
        assert env.shield[0, ours] == min(52 + 0.125 * max(loop - 160, 0), 80)


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


@pytest.mark.parametrize("action, axis, sign", [(envs.NORTH, "y", 1), (envs.SOUTH, "y", -1), (envs.EAST, "x", 1), (envs.WEST, "x", -1)])
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
    for _ in loops(env, [envs.EAST, 0, 0, 0, 0], 30):
        pass
    assert float(env.x[0, 0]) == pytest.approx(18, abs=2e-3)


def test_units_do_not_overlap_but_the_dead_make_way():
    """Catches missing pushes, pushes by corpses, and the wrong zealot radius (0.375 for pushing, 0.5 for the rest)."""
    env = envs.Skirmish("1c3s5z", n_envs=8)
    env.reset()
    env.x = (16 + torch.rand(env.x.shape, generator=env.generator))
    env.y = (16 + torch.rand(env.x.shape, generator=env.generator))
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
    env.step(torch.tensor([[envs.STOP, 0, 0]]))
    assert (env.x[0, 0], env.y[0, 0]) == (16, 16)
    env = arena("2s3z", {2: (16, 16), 3: (16.8, 16), 4: (16, 16.7)})  # zealots: only the last two are too close
    fell = env.x[0, 5:].clone()
    env.step(torch.tensor([[0, 0, envs.STOP, envs.STOP, envs.STOP]]))
    assert env.x[0, 3] == torch.tensor(16.8) and env.y[0, 4] - env.y[0, 2] == pytest.approx(0.75, abs=1e-2)
    assert torch.equal(env.x[0, 5:], fell)  # the dead stay where they fell
    env = arena("3m", {0: (29.999, 24.999), 1: (29.999, 24.999), 3: (4, 8)})  # two on one spot in a corner
    for _ in range(5):
        env.step(torch.tensor([[envs.STOP, envs.STOP, 0]]))
    assert math.hypot(*(env.x[0, 0] - env.x[0, 1], env.y[0, 0] - env.y[0, 1])) > 0.74


def test_own_units_never_fire_unordered_and_enemies_do():
    """Catches own units that acquire targets, and an attack order on a dead enemy that hits something."""
    for action in (envs.STOP, envs.ATTACK + 1):  # enemy 1 is dead
        env = arena("3m", {0: (14, 16), 3: (16, 16)})
        step = env.step(torch.tensor([[action, 0, 0]]))
        assert env.health[0, 3] == 45 and env.health[0, 0] == 39 and step.reward == 0
        assert env.x[0, 0] == 14


@pytest.mark.parametrize("shooter, victim", [(0, 3), (3, 0)])
@pytest.mark.parametrize("noise, reload", [(0.0, 13), (1 / 3, 14), (0.9999, 16)])
def test_the_cooldown_varies_by_minus_one_to_two_loops(noise, reload, shooter, victim):
    """Catches a variation with another range or sign, or for one side alone: 13.664 loops become 12.664 to 15.664."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.noise = lambda: torch.full_like(env.x, noise)
    env.cooldown[:, victim] = FAR
    orders = [envs.ATTACK if shooter == 0 else envs.STOP, 0, 0]
    env.step(torch.tensor([orders]))  # fires in loop 1 of 8
    assert float(env.cooldown[0, shooter]) == pytest.approx(13.664 + 3 * noise - 1 - 8, abs=1e-3)
    for loop in range(9, 20):
        env.shots.fill_(-1)
        next(loops(env, orders, 1))
        if env.shots[0, shooter] >= 0:
            break
    assert loop == reload + 1


def test_both_sides_wiped_out_in_one_loop():
    """Catches damage dealt in turn rather than at once, and a draw counted as a win."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.health[0, [0, 3]] = 5.0
    step = env.step(torch.tensor([[envs.ATTACK, 0, 0]]))
    assert env.health.max() == 0 and step.terminated and not step.truncated and not step.info["battle_won"]
    assert float(step.reward) == pytest.approx((5 + 10) / (365 / 20))
    assert step.avail[0].tolist() == [[True] + [False] * 8] * 3 and step.obs.abs().max() == 0


def test_a_time_limit_truncates():
    """Catches a clock off by one and a time-out that is reported as an end."""
    env = arena("3m", {0: (4, 8), 3: (28, 24)})
    env.speed.zero_()
    for count in range(1, 61):
        step = env.step(torch.tensor([[envs.STOP, 0, 0]]))
        assert bool(step.truncated) == (count == 60) and not step.terminated
    assert not env.reset().truncated


def test_battles_repeat_with_the_seed_and_only_with_it():
    """Catches a seed that is not used, randomness from elsewhere, and state that survives a reset."""
    def battle(env):
        env.reset()
        for _ in range(25):
            step = env.step(env.heuristic())
        return step.state
    first, second, other = envs.Skirmish("2s3z", 4, seed=1), envs.Skirmish("2s3z", 4, seed=1), envs.Skirmish("2s3z", 4, seed=2)
    one = battle(first)
    assert torch.equal(one, battle(second)) and not torch.equal(one, battle(other))
    assert not torch.equal(one, battle(first))
    first.generator.manual_seed(1)
    first.reset()
    fresh = envs.Skirmish("2s3z", 4, seed=1)
    fresh.reset()
    facts = [name for name, fact in vars(fresh).items() if isinstance(fact, torch.Tensor)]
    assert {"x", "calm", "target", "last_actions"} < set(facts)
    assert all(torch.equal(getattr(first, name), getattr(fresh, name)) for name in facts)
    assert (first.x[:, 0] < first.x[:, 1]).all() and (first.x[:, 2:5].diff(dim=1) > 0).all()
    env = envs.Skirmish("1c3s5z", 1)  # its colossus starts beside two stalkers, here in front of them, and stays agent 0
    env.noise = lambda: torch.tensor([[0.9] + 17 * [0.5]])
    env.reset()
    assert env.x[0, 0] == env.start_x[0] + 0.4


@pytest.mark.parametrize("map_name", ["5m_vs_6m", "1c3s5z"])
def test_a_batch_equals_single_battles(map_name):
    """Catches any leak between environments of a batch, and returned tensors that later steps change."""
    B, T = 4, 40
    env = envs.Skirmish(map_name, B)
    draws = torch.rand(T + 2, B, len(env.names))

    def battles(rows):
        env = envs.Skirmish(map_name, rows.stop - rows.start)
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
    body, loop = 0.75, [envs.STOP] * 3  # two marines' radii
    env = arena("3m", {0: (10, 10), 1: (10, 22), 3: (10 + body + envs.NOTICE + 0.05, 10)})

    def target(**places):
        for unit, place in places.items():
            env.x[0, int(unit[1])], env.y[0, int(unit[1])] = place
        env.calm.fill_(8)
        env.order(torch.tensor([loop]))
        return int(env.target[0, 3])
    near = 10 + body + envs.NOTICE - 0.05
    assert target() == -1
    env.calm.fill_(7)  # it was hurt in the last step
    env.order(torch.tensor([loop]))
    assert int(env.target[0, 3]) == 0
    env.target.fill_(-1)
    assert target(u3=(near, 10)) == 0
    assert target(u1=(near, 11)) == 0  # closer, but it has one
    assert target(u0=(near - body - envs.LEASH - 0.05, 10)) == 1  # out of the leash
    env.health[0, 1] = 0
    assert target() == -1
    env.x[0, 0] = near - body - envs.SIGHT - 0.05
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
    assert actions.tolist() == [[envs.ATTACK, envs.ATTACK, 0]]
    env.last_actions = torch.tensor([[envs.ATTACK + 1, envs.ATTACK + 2, 0]])
    assert env.heuristic().tolist() == [[envs.ATTACK + 1, envs.ATTACK, 0]]
    env.health[0, 4], env.x[0, 4], env.x[0, 0], env.y[0, 1], env.x[0, 1] = 0, 7, 7.5, 24.5, 14
    assert env.heuristic().tolist() == [[envs.EAST, envs.SOUTH, 0]]
    env = envs.Skirmish("2s3z", 16)
    step = env.reset()
    for _ in range(80):
        actions = env.heuristic()
        assert step.avail.gather(2, actions[..., None]).all()
        step = env.step(actions)


def test_draw_shows_the_living_their_shots_and_their_side():
    """Catches a drawing of the wrong environment, of the dead as alive, and lost shots."""
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    env = arena("3m", {0: (14, 16), 3: (16, 16), 4: (28, 24)}, n_envs=2)
    env.step(torch.tensor([[envs.ATTACK, 0, 0]] * 2))
    env.health[0] = 0
    env.draw(axes, 1)
    centers = [circle.center for circle in axes.patches]
    assert centers == [(float(env.x[1, i]), float(env.y[1, i])) for i in (0, 3, 4)]
    shots = [line for line in axes.lines if line.get_zorder() == 1]
    assert len(shots) == 2 and {line.get_color() for line in shots} == {"tab:blue", "tab:red"}


# ---- worker processes -----------------------------------------------------------------------------------------------

OWN = '''
import os, subprocess, sys, time
from pathlib import Path
from typing import Optional
import numpy as np

class Own:
    """Counts its steps; its seed, process and the step count can be read from what it returns."""
    N, A, O, S = 2, 3, 4, 5
    def __init__(self, seed, fault="", when=2, once="", limit=5, ends=0, child=False, meet="", text="", A=3):
        self.seed, self.fault, self.when, self.once, self.limit, self.ends = seed, fault, when, once, limit, ends
        self.meet, self.text, self.A, self.t, self.resets = meet, text, A, 0, 0
        if child:   # as a game would be; it outlives whoever does not end it
            self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", os.environ["MARK"]])
        if fault == "init":
            raise KeyError("no such unit")
    def fires(self, fault):
        if self.fault != fault:
            return False
        try:
            if self.once:
                os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True
    def get_env_info(self):
        return dict(n_agents=self.N, n_actions=self.A, obs_shape=self.O, state_shape=self.S, episode_limit=self.limit)
    def reset(self):
        self.t, self.resets = 0, self.resets + 1
        if self.fault == "threads":
            import torch
            assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
            print("what a game prints"), sys.stdin.read()
        if self.resets == self.when and self.fires("reset hang"):
            time.sleep(300)
    def step(self, actions):
        self.t += 1
        if self.meet:   # waits until all others are in the same step
            Path(self.meet, f"{os.getpid()} {self.t}").touch()
            while len(list(Path(self.meet).glob(f"* {self.t}"))) < 3:
                time.sleep(0.001)
        if self.t == self.when and self.fires("raise"):
            raise ZeroDivisionError("the marine divided by zero")
        if self.t == self.when and self.fires("hang"):
            time.sleep(300)
        if self.t == self.when and self.fires("die"):
            os._exit(17)
        done = self.t == self.ends
        return float(sum(actions)), done, {"battle_won": True} if done else {}
    def get_obs(self):
        return [np.full(self.O, self.t)] * self.N
    def get_state(self):
        return np.array([self.seed // 1000, self.seed % 1000, os.getpid() // 1000, os.getpid() % 1000,
                         np.random.randint(10**6)])
    def get_avail_actions(self):
        return [[1, 1] + [0] * (self.A - 2)] * self.N
    def render(self):
        return np.full((4, 6, 3), 40 * self.t, np.uint8)
    def close(self):
        if self.fault == "slow close":
            time.sleep(1)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory of its own with the module `own`, as a reader has it, and a file named like ours."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "envs.py").write_text("raise ImportError('the file of that name in the wrong folder')")
    (tmp_path / "pickle.py").write_text("raise ImportError('not the standard library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(envs, "GRACE", 3.0)
    made = []
    yield lambda *a, **k: made.append(envs.Workers(*a, **k)) or made[-1]
    for w in made:
        w.close()


def ones(w):
    return torch.ones(w.n_envs, w.n_agents, dtype=torch.int64)


def seeds_and_pids(step):
    s = step.state.long().tolist()
    return [row[0] * 1000 + row[1] for row in s], [row[2] * 1000 + row[3] for row in s]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def marked(mark):
    """Numbers of living processes that have `mark` in their environment or arguments."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if (mark.encode() in (p / "environ").read_bytes() + (p / "cmdline").read_bytes()) and alive(p.name):
                found.append(int(p.name))
        except OSError:
            pass
    return [pid for pid in found if pid != os.getpid()]


def wait_until(true, seconds=15):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_episodes_in_lockstep_seeds_and_messages(here, tmp_path, monkeypatch, capfd):
    """Catches: live views in a Step; one seed for all workers, or one that is not used; actions of the wrong environment;
    a time limit learned as an end; a step counter that goes on in the next episode; a step played after the end; threads
    that fight for the cores; a worker at a time; more than one message per step and worker; pickled arrays."""
    (tmp_path / "meet").mkdir()
    w = here("own:Own", 3, seed=3, arguments={"limit": "3", "fault": "threads", "meet": str(tmp_path / "meet")})
    assert (w.n_agents, w.n_actions, w.obs_dim, w.state_dim, w.episode_limit) == (2, 3, 4, 5, 3)
    first, sent, got, dump, load = w.reset(), [], [], pickle.dump, pickle.load
    monkeypatch.setattr(envs.pickle, "dump", lambda message, file: sent.append(message) or dump(message, file))
    monkeypatch.setattr(envs.pickle, "load", lambda file: got.append(load(file)) or got[-1])
    seeds, pids = seeds_and_pids(first)
    assert seeds == w.seeds and len(set(seeds)) == 3 and len(set(pids)) == 3 and os.getpid() not in pids
    assert first.avail.tolist() == [[[True, True, False]] * 2] * 3 and first.obs.dtype == torch.float32
    for b, seed in enumerate(seeds):  # numpy's global generator is seeded too
        assert first.state[b, 4] == np.random.RandomState(seed).randint(10**6)
    kept = first.obs.clone()
    for _ in range(2):
        for t in (1, 2, 3):
            step = w.step(torch.tensor([[0, 1], [1, 1], [2, 1]]))
            assert step.reward.tolist() == [1, 2, 3] and (step.obs == t).all() and "battle_won" not in step.info
            assert not step.terminated.any() and step.truncated.tolist() == [t == 3] * 3  # cut by the limit, unasked
        assert [command for command, _ in sent] == ["step"] * 9 and len(got) == 9
        assert all(type(body) is bytes for _, body in sent + got) and len(got[0][1]) == w.rows.itemsize
        padding = w.step(torch.full((3, 2), 2))
        assert (padding.obs == 3).all() and not padding.reward.any() and len(sent) == 9  # idle: not stepped
        for marker in (tmp_path / "meet").iterdir():
            marker.unlink()
        assert (w.reset().obs == 0).all() and not w.reset().info["void"].any()
        sent.clear(), got.clear()
    assert (first.obs == kept).all() and capfd.readouterr().out == ""
    w.close()
    assert not any(alive(pid) for pid in pids)
    again = here("own:Own", 1, seed=3)
    assert again.seeds[0] == seeds[0]  # the same seed on another run
    assert len({*again.unused_seeds, *again.seeds}) == 10_000  # never one that was used


def test_real_end_at_the_limit_stays_an_end_and_is_drawn(here):
    """Catches: comparing the step count with episode_limit, which turns smac's default semantics into truncation; a
    picture of another environment or before the step."""
    w = here("own:Own", 1, arguments={"limit": 3, "ends": 3})
    for _ in range(3):
        step = w.step(ones(w))
    assert step.terminated.all() and not step.truncated.any() and step.info["battle_won"].tolist() == [True]
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    w.draw(axes)
    assert (axes.images[0].get_array() == 120).all() and axes.images[0].get_array().shape == (4, 6, 3)


@pytest.mark.parametrize("fault, words", [("raise", "step: ZeroDivisionError: the marine divided by zero (own.py"),
                                          ("init", "start: KeyError: 'no such unit' (own.py")])
def test_own_exception_reaches_the_user(here, fault, words):
    """Catches: a dead worker and a bare EOFError; a message without environment, seed or place."""
    with pytest.raises(envs.EnvFailure) as caught:
        w = here("own:Own", 1, arguments={"fault": fault})
        for _ in range(3):
            w.step(ones(w))
    assert re.search(r"environment 0 \(seed \d+\)", str(caught.value)) and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["hang", "die", "reset hang"])
def test_hang_and_death_are_void_and_training_goes_on(here, tmp_path, fault, capfd, monkeypatch):
    """Catches: waiting for ever; a void episode that looks like a real one; the other environments disturbed; padding
    with nan; a replacement with the old process or seed; a count that misses it; a time-out without its flag."""
    w = here("own:Own", 2, arguments={"fault": fault, "once": str(tmp_path / "once"), "limit": 4})
    before = seeds_and_pids(w.reset())
    voids = []
    for t in range(4):
        w.timeout = 1.0 if fault == "hang" and t == 1 else 60.0
        step = w.step(ones(w))
        voids.append(step.info["void"].tolist())
        assert torch.isfinite(step.obs).all() and torch.isfinite(step.state).all() and step.avail.any(-1).all()
        assert (step.terminated | ~step.info["void"]).all() and not step.reward[step.info["void"]].any()
    if fault == "reset hang":
        assert w.voided == 0
        start = w._start
        monkeypatch.setattr(w, "_start", lambda b: (setattr(w, "timeout", 60.0), start(b)))
        w.timeout = 1.0
        w.reset()
    else:
        [b] = np.flatnonzero(voids[-1])
        assert voids == [[False, False]] + [[b == 0, b == 1]] * 3  # for the rest of that episode, of that one alone
        assert step.truncated[1 - b] and (step.obs[1 - b] == 4).all()
        after = seeds_and_pids(w.reset())
        for i in (0, 1):
            assert after[i][b] != before[i][b] and after[i][1 - b] == before[i][1 - b]
        assert not alive(before[1][b])
    told = capfd.readouterr().err
    assert w.voided == 1 and "episode void" in told and ("within 1 seconds (--env-timeout)" in told) == ("hang" in fault)
    for _ in range(4):
        step = w.step(ones(w))
    assert step.truncated.all() and not step.info["void"].any()


def test_failures_in_a_row_are_bounded_and_starts_sooner(here):
    """Catches: replacing a game that always dies, for ever; ten time-outs before a wrong path is told."""
    w = here("own:Own", 1, arguments={"fault": "die", "when": 1}, max_failures=2)
    w.step(ones(w))
    w.reset()
    with pytest.raises(envs.EnvFailure, match=r"failed 2 time\(s\) in a row, the last time: its process ended in step"):
        w.step(ones(w))
    began = time.monotonic()
    with pytest.raises(envs.EnvFailure, match="no answer to reset"):
        here("own:Own", 1, arguments={"fault": "reset hang", "when": 1}, timeout=2)
    assert time.monotonic() - began < 12 + 2 * envs.GRACE


def test_a_script_without_main_guard_is_told(here, tmp_path):
    """Catches: a script without `if __name__` that is imported as a module and starts workers within workers."""
    load = f"import sys\nsys.path.insert(0, {str(Path(envs.__file__).parent)!r})\nimport envs as w\n"
    (tmp_path / "script.py").write_text(OWN + load + "w.Workers('script:Own', 1)\n")
    with pytest.raises(envs.UsageError, match="if __name__"):
        here("script:Own", 1)


@pytest.mark.parametrize("init, closed", [(True, ""), (False, "<&- >&- 2>&-")])
def test_start_up_in_odd_surroundings(here, tmp_path, init, closed):
    """Catches: a reader's package `envs` hidden by this envs.py; arguments or actions too many for a command line, a pipe
    or an int16; a Path in sys.path; standard streams that are closed."""
    (tmp_path / "envs.py").unlink()
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/meet.py").write_text(OWN)
    if init:
        (tmp_path / "envs/__init__.py").write_text("")
    (tmp_path / "script.py").write_text(f"""
import importlib.util, sys
from pathlib import Path
sys.path[:0] = [{str(Path(envs.__file__).parent)!r}, Path.cwd() / "lib"]
spec = importlib.util.spec_from_file_location("qmix_envs", {envs.__file__!r})
module = sys.modules["qmix_envs"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
w = module.Workers("envs.meet:Own", 1, arguments=dict(text="x" * 200_000, A="40000"))
w.reset()
step = w.step(torch.tensor([[39_999, 1]]))
Path("result").write_text(f"{{step.reward.item()}} {{tuple(step.avail.shape)}}")
""")
    (tmp_path / "pickle.py").unlink()  # a script's own folder comes first
    done = subprocess.run(f"{sys.executable} script.py {closed}", shell=True, capture_output=True, text=True)
    assert (tmp_path / "result").exists(), done.stderr
    assert (tmp_path / "result").read_text() == "40000.0 (1, 2, 40000)"


TRAINER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C
sys.path[:0] = [{path!r}]
import torch, envs
w = envs.Workers("own:Own", 1, arguments={{"child": True, "fault": "{fault}"}})
w.reset()
print("ready", flush=True)
if "{end}" == "return": sys.exit()
while True:
    w.reset()
    for _ in range(5): w.step(torch.zeros(1, 2, dtype=torch.int64))
"""


@pytest.mark.parametrize("end, fault", [("return", ""), ("INT", ""), ("TERM", "slow close"), ("KILL", "hang")])
def test_nothing_is_left_behind(here, tmp_path, end, fault):
    """Catches: workers or games that outlive the trainer, however it ends, also while an environment hangs or is being
    closed already; a start method that imports the user's script again, which has no `if __name__`."""
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    (tmp_path / "train.py").write_text(TRAINER.format(path=str(Path(envs.__file__).parent), fault=fault, end=end))
    (tmp_path / "pickle.py").unlink()
    trainer = subprocess.Popen([sys.executable, "train.py"], env=dict(os.environ, MARK=mark), stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    try:
        assert trainer.stdout.readline() == "ready\n"
        if end != "return":
            wait_until(lambda: len(marked(mark)) == 3)  # the trainer, the worker, its game, whose name comes with exec
            time.sleep(0.3)
            trainer.send_signal(getattr(signal, "SIG" + end))
        trainer.wait(timeout=15)
    finally:
        trainer.kill()
    wait_until(lambda: not marked(mark))


def test_a_game_of_a_killed_worker_is_ended(here, monkeypatch):
    """Catches: a game orphaned when its worker is killed for memory."""
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("MARK", mark)
    w = here("own:Own", 1, arguments={"child": True})
    [pid] = seeds_and_pids(w.reset())[1]
    os.kill(pid, signal.SIGKILL)
    step = w.step(ones(w))
    assert step.info["void"].all() and w.voided == 1
    assert not w.reset().info["void"].any()
    wait_until(lambda: len(marked(mark)) == 2)  # the new worker and its game
    w.close()
    wait_until(lambda: not marked(mark), 5)


# ---- what comes from outside ----------------------------------------------------------------------------------------

@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(body, ...): what a worker makes of the class Own with `body` in it, without the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(body="pass", name="own:Broken", render=False, **arguments):
        (tmp_path / "own.py").write_text(OWN + f"\nclass Broken(Own):\n    {body}\n")
        sys.modules.pop("own", None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        return envs.Checked(name, envs.single(name, 1, arguments, render))
    return make


@pytest.mark.parametrize("body, words", [
    ("get_state = None", "has no get_state()"),
    ("def get_env_info(self): return dict(n_agents='2', n_actions=3)", "whole numbers above 0; got n_agents: '2'"),
    ("def get_env_info(self): return dict(n_agents=2, n_actions=3)", "above 0; got obs_shape: None"),
    ("def get_obs(self): return [np.zeros(7)] * 2",
     "get_obs() must be finite numbers (float32) of shape (2, 4) = (n_agents, obs_shape); got shape (2, 7)"),
    ("def get_obs(self): return [np.zeros(4), np.zeros(3)]", "pad unlike rows to the longest"),
    ("def get_obs(self): return [np.zeros(4)]", "got shape (1, 4)"),
    ("def get_obs(self): return {0: np.zeros(4)}", "a dict: flatten it"),
    ("def get_obs(self): return [{'seen': np.zeros(4)}] * 2", "a list: flatten it"),
    ("def get_obs(self): return np.zeros((2, 8, 8, 3))", "got shape (2, 8, 8, 3): flatten what each agent sees"),
    ("def get_state(self): return np.full(5, np.nan)", "get_state() must be finite numbers (float32) of shape (5,)"),
    ("def get_state(self): return None", "got None, a NoneType"),
    ("def get_avail_actions(self): return [[1, 1, 1], [0, 0, 0]]", "none for agent 1: each needs one; leave the dead a no"),
    ("def get_avail_actions(self): return [[-1e9, -1e9, 0.0]] * 2", "True or False (1 or 0) of shape (2, 3)"),
    ("def get_avail_actions(self): return [[1, 1, -np.inf]] * 2", "got -inf"),
    ("def get_avail_actions(self): return [[1, 1, np.nan]] * 2", "got nan"),
    ("def get_avail_actions(self): return [[1, 2, 0]] * 2", "got 2"),
    ("def step(self, actions): return 1.0, False, False, {}", "must give (reward, terminated, info), info a dict; got (1.0,"),
    ("def step(self, actions): return [1.0, 2.0], False, {}", "step()'s reward must be one finite number (float32); got shape"),
    ("def step(self, actions): return float('nan'), False, {}", "step()'s reward must be one finite number (float32); got nan"),
    ("def step(self, actions): return 1e39, False, {}", "step()'s reward must be one finite number (float32); got 1e+39"),
    ("def step(self, actions): return 1.0, [False, False], {}", "step()'s terminated must be True or False (1 or 0); got sh"),
    ("def step(self, actions): return 1.0, 2, {}", "step()'s terminated must be True or False (1 or 0); got 2"),
    ("def step(self, actions): return 1.0, None, {}", "got None, a NoneType"),
    ("def step(self, actions): return 1.0, False, {'episode_limit': 10}", "info['episode_limit'] must be True or False"),
    ("def step(self, actions): return 1.0, False, {'battle_won': [True, False]}", "info['battle_won'] must be one finite"),
    ("def render(self): return None", "to be drawn it needs a render() that gives an array (H, W, 3)"),
    ("def render(self): return np.zeros((3, 4, 6))", "whole numbers, 0 to 255; got [[[0")])
def test_a_broken_class_is_told_in_plain_words(own, body, words):
    """Catches: True taken for whatever is true: a limit as a flag, a list of dones, an additive mask inside out; a reward
    that float32 cannot hold; a traceback out of numpy for a wrong shape; a message that does not say what to do."""
    with pytest.raises(envs.UsageError) as caught:
        env = own(body)
        env.reset()
        env.step([1, 1])
        env.picture()
    assert words in str(caught.value) and str(caught.value).startswith("own:Broken: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("over, limit", [(True, False), (False, True), (1, 0), (0.0, 1.0), (np.array(True), np.bool_(False)),
                                         (np.array(0), np.array(1))])
def test_flags_of_every_kind(own, over, limit):
    """Catches: np.array(False) refused, or taken as True."""
    env = own()
    env.reset()
    env.env.step = lambda actions: (np.array(1.5), over, {"episode_limit": limit, "dead_allies": np.int64(1)})
    row = env.step([1, 1])
    assert (row["reward"], row["terminated"], row["truncated"]) == (1.5, bool(over), bool(limit))
    assert np.array_equal(row["facts"], [np.nan, 1, np.nan], equal_nan=True)


@pytest.mark.parametrize("given", [
    [[1, 0], [0, 1]], np.eye(2), np.eye(4)[::-2, ::-2], np.eye(2, dtype=bool), torch.eye(2, requires_grad=True),
    [torch.tensor([1, 0]), torch.tensor([0, 1])], torch.eye(2, dtype=torch.bool)])
def test_arrays_of_every_kind(given):
    """Catches: reversed views, tensors with gradients and lists of tensors refused; an array that shares its memory."""
    for mask, dtype in ((False, np.float32), (True, bool)):
        for shape in ((2, 2), (..., 2, 2), (..., 2)):
            array = envs.as_array("act: obs", given, shape, mask=mask)
            assert array.dtype == dtype and array.flags.c_contiguous and sorted(array.sum(1).tolist()) == [1, 1]
            torch.from_numpy(array)[:] = 7
        with pytest.raises(envs.UsageError, match=r"^act: obs must be .* of shape \(..., 3, 2\); got shape \(2, 2\)"):
            envs.as_array("act: obs", given, (..., 3, 2), mask=mask)
        with pytest.raises(envs.UsageError, match="^act: obs must be .*, a ndarray: flatten it into numbers$"):
            envs.as_array("act: obs", np.array([[1, 0], [0, 1]], object), (2, 2), mask=mask)


def takes(a: int = 1, b=2, c=0.5, d=True, e="text", f: Optional[str] = None, g: "int | None" = 3, h: float = 1,
          i: dict = None, j: "Missing" = 0, k: bool = False, **more):  # noqa: F821
    pass


@pytest.mark.parametrize("key, given, read", [
    ("a", "7", 7), ("a", "1e3", 1000), ("a", "1.5", None), ("a", "true", None), ("a", "None", None), ("a", "many", None),
    ("b", "1e3", 1000), ("b", "2.5", 2.5), ("b", "None", "none"), ("b", "false", None), ("b", 4, 4), ("b", [1], None),
    ("c", "3", 3), ("c", "x", None), ("d", "false", False), ("d", "TRUE", True), ("d", "1", None), ("d", 0, None),
    ("e", "12", "12"), ("e", "None", "None"), ("e", "[1,2", "[1,2"), ("e", 12, None), ("f", "12", "12"), ("f", "none", "none"),
    ("f", "true", "true"), ("g", "null", "none"), ("g", "5", 5), ("g", "5.5", None), ("h", "2", 2), ("h", "2.5", 2.5),
    ("i", '{"start": true}', {"start": True}), ("i", "{'a': 1}", {"a": 1}), ("i", "[1,2", None), ("i", "{a: 1}", None),
    ("j", "4", 4), ("k", "1", None), ("k", "true", True), ("z", "1e3", 1000.0), ("z", "word", "word"), ("z", "[1, 2]", [1, 2]),
    ("z", (1, 2), (1, 2)), ("z", "[", None)])
def test_arguments_are_read_as_the_parameter_says(key, given, read):
    """Catches: `child=false` meaning True; 1000.0 for a whole number; Optional[str] read as a number; JSON left as text;
    half a list taken as text. read None: refused; "none": None."""
    if read is None:
        with pytest.raises(envs.UsageError, match=rf"^own:Own: {key} .*{re.escape(str(given))}"):
            envs.read_arguments("own:Own", takes, {key: given})
    else:
        value = envs.read_arguments("own:Own", takes, {key: given})[key]
        if read == "none" and key != "e":
            read = None if value is None else read
            assert value is None
        assert value == read and type(value) is type(read)


def test_modules_classes_and_their_seeds(own, tmp_path):
    """Catches: a misspelt argument, class or module that is ignored; the reader's own missing import told as his module
    missing; a seed lost, or pushed where it is refused; a TypeError of his own swallowed."""
    with pytest.raises(envs.UsageError, match="no argument limits; it has A, child, ends"):
        own(limits="5")
    with pytest.raises(envs.UsageError, match="no argument episode_limit"):
        own(episode_limit="5")
    with pytest.raises(envs.UsageError, match="seed is not an argument"):
        own(seed="5")
    with pytest.raises(envs.UsageError, match="there is no module nowhere in .* or on Python's path"):
        own(name="nowhere:Own")
    with pytest.raises(envs.UsageError, match="the module own must have a class Mine; it has Path, Own, Broken"):
        own(name="own:Mine")
    (tmp_path / "half.py").write_text("import not_there_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        own(name="half:Own")
    assert own(limit="7", fault="3").env.seed == 1
    for body in ("def __init__(self, **more): Own.__init__(self, **more)",
                 "def __init__(self, size=1): Own.__init__(self, seed=1)",
                 "def __init__(self, **more): inner(**more); Own.__init__(self, 1)\ndef inner(size=1): pass"):
        assert own(body, size="3").env.seed == 1 if "size" in body else own(body).env.seed == 1
    with pytest.raises(TypeError, match="sede"):
        own("def __init__(self, **more): Own.__init__(self, sede=1)")


# ---- PettingZoo -----------------------------------------------------------------------------------------------------

class Zoo:
    """As PettingZoo's parallel environments: two unlike agents; `script` gives (terminations, truncations) of each step."""
    possible_agents, max_cycles, counts = ["cat", "dog"], 9, {"cat": np.int64(3), "dog": 2}

    def __init__(self, script=(), **more):
        self.script, self.more, self.seeds, self.played = script, more, [], []

    def action_space(self, agent):
        return types.SimpleNamespace(n=self.counts[agent])

    def look(self):
        everyone = {"cat": {"observation": np.full((2, 2), self.t + 1), "action_mask": np.array([0, 1, 1], np.int8)},
                    "dog": np.array([self.t + 0.5])}
        return {agent: everyone[agent] for agent in self.shown}, {"dog": {"action_mask": [True, self.t == 0]}}

    def reset(self, seed=None, options=None):
        self.t, self.agents, self.shown = 0, list(self.possible_agents), list(self.possible_agents)
        self.seeds.append(seed)
        return self.look()

    def step(self, actions):
        self.played.append(actions)
        over, cut = self.script[self.t] if self.t < len(self.script) else ("", "")
        self.t, self.shown = self.t + 1, self.agents
        self.agents = [agent for agent in self.agents if agent not in over + cut]
        ends = [{agent: np.bool_(agent in which) for agent in self.shown} for which in (over, cut)]
        obs, infos = self.look()
        return obs, {agent: 1.5 for agent in self.shown}, *ends, infos

    def render(self):
        return self.more.get("render_mode")

    def close(self):
        pass


def test_pettingzoo_observations_actions_and_state():
    """Catches: observations not flattened or padded, masks lost, actions of another agent or twice,
    one agent's reward as the team's, a seed at every reset or at none, joined observations where there is a state."""
    env = envs.Parallel("zoo:Zoo", Zoo([("", ""), ("dog", ""), ("", "")]), 4, {})
    checked = envs.Checked("zoo:Zoo", env)
    assert [checked.info[key] for key in envs.SIZES] == [2, 3, 4, 8, 9] and "joined" in checked.info["note"]
    row = checked.reset()
    assert row["obs"].tolist() == [[1, 1, 1, 1], [0.5, 0, 0, 0]] and row["state"].tolist() == row["obs"].ravel().tolist()
    assert row["avail"].tolist() == [[False, True, True], [True, True, False]] and env.env.seeds == [4, None]
    row = checked.step([2, 1])
    assert env.env.played[-1] == {"cat": 2, "dog": 1} and row["reward"] == 3 and not row["terminated"] | row["truncated"]
    assert row["avail"].tolist() == [[False, True, True], [True, False, False]]
    row = checked.step([1, 0])
    assert row["reward"] == 3 and not row["terminated"]  # the dog is dead, the cat goes on
    assert row["obs"].tolist() == [[3, 3, 3, 3], [0, 0, 0, 0]] and row["avail"][1].tolist() == [True, False, False]
    row = checked.step([1, 0])
    assert env.env.played[-1] == {"cat": 1} and row["reward"] == 1.5
    state = type("Stateful", (Zoo,), {"state": lambda self: np.full((1, 3), self.t)})()
    checked = envs.Checked("zoo:Zoo", envs.Parallel("zoo:Zoo", state, 4, {"episode_limit": "2"}))
    assert checked.info["note"] == "" and checked.info["episode_limit"] == 2
    assert checked.reset()["state"].tolist() == [0, 0, 0] and checked.step([1, 0])["state"].tolist() == [1, 1, 1]
    assert checked.step([1, 0])["truncated"]


@pytest.mark.parametrize("script, terminated, alive", [
    (("cat dog", ""), True, ""), (("", "cat dog"), False, "cat dog"), (("cat dog", "cat dog"), True, ""),
    (("cat", "dog"), False, "dog"), (("cat", "cat dog"), False, "dog")])
def test_pettingzoo_ends_and_time_limits(script, terminated, alive):
    """Catches: a time limit learned as an end; a real end in the last step taken for the limit; agents that the limit cuts
    off shown as dead, so that nothing is left to bootstrap from."""
    checked = envs.Checked("zoo:Zoo", envs.Parallel("zoo:Zoo", Zoo([("", ""), script]), 4, {}))
    for _ in range(2):
        checked.reset()
        row = checked.step([1, 0])
        assert not row["terminated"] | row["truncated"]
        row = checked.step([1, 0])
        assert (bool(row["terminated"]), bool(row["truncated"])) == (terminated, not terminated)
        assert [agent for agent, obs in zip(("cat", "dog"), row["obs"]) if obs.any()] == alive.split()


@pytest.mark.parametrize("change, words", [
    ({"agent_iter": None}, "takes turns: name its parallel_env"), ({"max_cycles": None}, "give one with --env-args episode"),
    ({"action_space": lambda self, agent: "Box(2)"}, "expected Discrete actions, got .*Box"),
    ({"max_cycles": 2.5}, "max_cycles must be a whole number; got 2.5"),
    ({"look": lambda self: ({"cat": {"a": 1}, "dog": [1]}, {})}, "get_obs.* must be finite .*flatten it"),
    ({"look": lambda self: ({"cat": [0], "dog": [1]}, {"cat": {"action_mask": [-1e9, 0, 0]}})}, "get_avail_actions.* must be True or False .*got -1000000000.0")])
def test_pettingzoo_that_does_not_fit_is_told(change, words):
    """Catches: a traceback, or nothing at all, for continuous actions, turns, additive masks, dicts, no limit."""
    with pytest.raises(envs.UsageError, match=f"^zoo:Zoo: .*{words}"):
        envs.Checked("zoo:Zoo", envs.Parallel("zoo:Zoo", type("Odd", (Zoo,), change)(), 4, {})).reset()


def test_pettingzoo_is_told_by_what_it_has_and_rendered(monkeypatch):
    """Catches: a factory's environment taken for PyMARL's, or its seed refused; render_mode lost, or pushed where it is
    not asked for or not taken."""
    module = types.ModuleType("zoo_module")
    module.parallel_env = lambda **more: Zoo(**more) if "seed" not in more else Zoo(seed=1, seeds=Zoo.refuse(**more))
    monkeypatch.setitem(sys.modules, "zoo_module", module)
    monkeypatch.setattr(Zoo, "refuse", staticmethod(lambda render_mode=None, N=1: None), raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for render, mode in ((True, "rgb_array"), (False, None)):
        env = envs.single("zoo_module:parallel_env", 5, {"N": "3", "episode_limit": "4"}, render)
        assert type(env) is envs.Parallel and env.env.more == {"N": 3} | ({"render_mode": mode} if mode else {})
        assert env.render() == mode and env.limit == 4 and env.env.seeds == [5]
    module.parallel_env = lambda N: Zoo()
    assert envs.single("zoo_module:parallel_env", 5, {"N": "3"}, True).render() is None


# ---- smac -----------------------------------------------------------------------------------------------------------

SMAC = '''
class Unit:
    health = 45
class StarCraft2Env:
    """Misbehaves as smac does."""
    def __init__(self, map_name="8m", seed=None, difficulty="7", heuristic_ai=False, continuing_episode=False,
                 replay_dir="", replay_prefix="", game_version=None, fault=""):
        self.kwargs = dict(locals())
        self.fault, self.continuing_episode, self.max_reward, self.episodes, self.t = fault, continuing_episode, 0, 0, 0
        self.force_restarts, self.agents, self.log = 0, {}, []
    def get_env_info(self):
        return dict(n_agents=2, n_actions=3, obs_shape=4, state_shape=5, episode_limit=3)
    def reset(self):
        self.t = 0
        if self.fault == "no start":
            raise ConnectionError("Failed to connect to the SC2 websocket. Is it up?")
        if self.episodes == 0:
            self.max_reward += 10
        self.agents = {0: Unit(), 1: Unit()}
        if self.fault == "first look":   # the units seen are those of the episode before, or dead
            self.force_restarts += 1
        if self.fault == "dead":
            self.agents[0].health = self.agents[1].health = 0
    def step(self, actions):
        self.t += 1
        if self.fault == "crash" and self.t == 2:
            self.force_restarts += 1
            return 0, True, {}
        if self.fault == "malformed" and self.t == 2:
            raise type("DecodeError", (Exception,), {})("Error parsing message")
        assert actions != [9, 9], "Agent 0 cannot perform action 9"
        info = {"battle_won": self.t == 3, "dead_allies": 1, "dead_enemies": 2}
        if self.t == 3:
            self.episodes += 1
            if self.continuing_episode:
                info["episode_limit"] = True
        return 1.0, self.t == 3, info
    def get_obs(self): return [[self.t] * 4] * 2
    def get_state(self): return [self.t] * 5
    def get_avail_actions(self): return [[0, 1, 1]] * 2
    def save_replay(self): self.log.append("replay")
    def close(self): self.log.append("close")
'''


@pytest.fixture
def smac(tmp_path, monkeypatch):
    """A fake smac and a fake game folder."""
    files = {"smac/__init__.py": "", "smac/env/__init__.py": SMAC, "absl/__init__.py": "from . import flags",
             "absl/flags.py": "class FLAGS: sc2_timeout = 360", "game/Versions/Base75689/a": "",
             "game/Maps/SMAC_Maps/3m.SC2Map": ""}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setenv("SC2PATH", str(tmp_path / "game"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    saved = {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] in ("smac", "absl")}
    yield tmp_path
    for k in [k for k in sys.modules if k.split(".")[0] in ("smac", "absl")]:
        del sys.modules[k]
    sys.modules.update(saved)


def fake_smac(**arguments):
    return envs.single("smac:3m", 11, arguments)


def test_smac_passes_flags_through(smac):
    """Catches: difficulty=7 as a number (smac's table has text), game_version 4.10 as 4.1, pysc2's 360 s time-out,
    replays under $SC2PATH/Replays, or of several workers in one file, or not saved; a game not closed."""
    env = fake_smac(difficulty="7", game_version="4.10", continuing_episode="true", replay_dir="replays")
    k = env.env.kwargs
    assert (k["seed"], k["difficulty"], k["game_version"], k["continuing_episode"]) == (11, "7", "4.10", True)
    assert k["replay_prefix"] == "3m_11_" and k["replay_dir"] == str(smac / "replays") and (smac / "replays").is_dir()
    assert sys.modules["absl.flags"].FLAGS.sc2_timeout == 60
    checked = envs.Checked("smac:3m", env)
    checked.reset()
    row = [checked.step([1, 1]) for _ in range(3)][-1]
    assert row["truncated"] and not row["terminated"] and row["facts"].tolist() == [1, 1, 2]
    env.close()
    assert env.env.log == ["replay", "close"]
    with pytest.raises(envs.UsageError, match="no argument dificulty; it has continuing_episode, difficulty"):
        fake_smac(dificulty="7")


def test_smac_end_by_default_is_terminal(smac):
    """Catches: storing smac's unmarked time-out as a truncation, which is not what the paper's code did."""
    checked = envs.Checked("smac:3m", fake_smac())
    checked.reset()
    row = [checked.step([1, 1]) for _ in range(3)][-1]
    assert row["terminated"] and not row["truncated"]


@pytest.mark.parametrize("fault, words", [
    ("crash", "the game crashed and smac started it again"), ("malformed", "DecodeError: Error parsing message"),
    ("no start", "ConnectionError: Failed to connect .* SC2PATH"), ("first look", "without units"),
    ("dead", "without units"), ("", "reset before the first episode had ended")])
def test_smac_misbehaving_is_a_game_failure(smac, fault, words):
    """Catches: learning from (0, True, {}), from a dead start, from rewards scaled by a max_reward that has grown."""
    env = fake_smac(fault=fault)
    with pytest.raises(envs.GameFailure, match=words):
        env.reset()
        env.step([1, 1])
        env.step([1, 1])
        env.reset()
    if not fault:
        with pytest.raises(AssertionError, match="cannot perform"):  # our mistake, not ten void episodes
            env.step([9, 9])


def test_smac_crash_through_the_workers(smac):
    """Catches: the old environment used again after a crash in its first episode; void lost between the processes;
    a heuristic offered where smac would play the actions it is sent."""
    w = envs.Workers("smac:3m", 2, arguments={"fault": "crash", "heuristic_ai": "true"}, max_failures=2)
    try:
        assert w.heuristic().shape == (2, 2) and not hasattr(envs.Workers, "heuristic")
        old = [p.pid for p in w.workers]
        assert w.step(ones(w)).info["void"].tolist() == [False, False]
        step = w.step(ones(w))
        assert step.info["void"].tolist() == [True, True] == step.terminated.tolist() and not step.obs.any()
        assert not step.info["battle_won"].any() and w.voided == 2
        w.reset()
        assert not {p.pid for p in w.workers} & set(old)
        w.step(ones(w))
        with pytest.raises(envs.EnvFailure, match="smac:3m: environment 0 .* failed 2 time"):
            w.step(ones(w))
    finally:
        w.close()


def test_smac_says_what_it_needs(smac, monkeypatch):
    """Catches: a traceback where smac, the game, the map, or the right protobuf is missing."""
    def told(words, name="smac:3m"):
        with pytest.raises(envs.UsageError, match=f"^{name}: .*{words}.* needs StarCraft's smac .make install-smac; PyPI's"):
            envs.single(name, 1, {})
    told("Maps/SMAC_Maps/8m.SC2Map does not exist", "smac:8m")
    monkeypatch.setenv("SC2PATH", str(smac / "game/Maps"))
    told("game/Maps/Versions does not exist")
    for text, words in (("raise TypeError('Descriptors cannot be created directly.')", "TypeError: Descriptors cannot"),
                        ("", "ImportError: cannot import name 'StarCraft2Env'")):
        sys.modules.pop("smac.env", None)
        (smac / "smac/env/__init__.py").write_text(text)
        importlib.invalidate_caches()
        told(words)


@pytest.mark.skipif(importlib.util.find_spec("smac") is None or "SC2PATH" not in os.environ,
                    reason="smac and StarCraft II are not installed")
def test_smac_itself(here):
    """Catches: what the fake does not show, on the game: sizes, a battle's facts, returns on smac's scale of 20."""
    w = here("smac:3m", 1)
    assert (w.n_agents, w.n_actions, w.obs_dim, w.state_dim, w.episode_limit) == (3, 9, 30, 48, 60)
    for _ in range(2):
        step, total, length = w.reset(), 0.0, 0
        assert not step.avail[..., 0].any() and step.avail[..., 1].all()  # the living never have no-op, always stop
        while not (step.terminated | step.truncated).all():
            step = w.step(torch.multinomial(step.avail[0].float(), 1).T)
            total, length = total + step.reward.item(), length + 1
        assert 0 <= total <= 20 and length <= 60 and not step.info["void"].any()
        assert step.info["battle_won"].dtype == torch.bool and 0 <= step.info["dead_allies"].item() <= 3


# ---- ma-gym ---------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(importlib.util.find_spec("ma_gym") is not None, reason="ma-gym is installed")
def test_ma_gym_missing_is_told():
    """Catches: a ModuleNotFoundError for those on Python 3.12."""
    with pytest.raises(envs.UsageError, match="not installed: `make install` adds ma-gym, on Python 3.10 and 3.11"):
        envs.single("ma_gym:Switch2-v0", 1, {})


@pytest.mark.skipif(importlib.util.find_spec("ma_gym") is None, reason="ma-gym is not installed")
def test_ma_gym_ends_and_errors():
    """Catches: a time limit learned as an end; an end in the very last step taken for the limit; a clock that stops where
    the limit is lifted; one agent's reward as the team's; an endless game without a limit."""
    data = np.load(TESTDATA / "ma_gym_checkers.npz")
    env = envs.single("ma_gym:Checkers-v3", 5, {})
    checked = envs.Checked("ma_gym:Checkers-v3", env)
    assert "joined" in checked.info["note"] and checked.info["episode_limit"] == 100
    for e, length in enumerate(data["length"]):
        checked.reset()
        for t in range(length):
            row = checked.step(data["actions"][e, t].tolist())
            assert row["reward"] == data["reward"][e, t]
        apples = data["food"][e, length, 0].any()
        assert row["terminated"] == (not apples) and row["truncated"] == apples
        if apples:
            np.testing.assert_array_equal(row["obs"], data["obs_v3"][e, length] / np.float32(100))
    for which, arguments, words in (("Swich2-v0", {}, "no such environment; ma-gym has Checkers-v0"),
                                    ("PongDuel-v0", {}, "no time limit of its own: give one with --env-args"),
                                    ("Switch2-v0", {"end": "1"}, "no argument end; it has")):
        with pytest.raises(envs.UsageError, match=words):
            envs.single(f"ma_gym:{which}", 1, arguments)


@pytest.mark.skipif(importlib.util.find_spec("ma_gym") is None, reason="ma-gym is not installed")
@pytest.mark.parametrize("which, arguments", [
    ("Switch2-v0", {}), ("Combat-v0", {"episode_limit": "30"}), ("TrafficJunction4-v0", {}), ("PongDuel-v0", {"episode_limit": "9"})])
def test_ma_gym_itself(which, arguments):
    """Catches: what the fake does not show; against ma-gym stepped by hand with the same seed and actions."""
    import gym
    checked, by_hand = envs.Checked(which, envs.single(f"ma_gym:{which}", 3, arguments)), gym.make(which)
    draw, random, done, t = np.random.default_rng(0), envs.random, False, 0
    by_hand.seed(3)
    by_hand.reset()  # the shim's, to learn the sizes
    random.seed(1), checked.reset()
    random.seed(1), by_hand.reset()  # TrafficJunction draws from `random`
    while not done:
        t += 1
        actions = draw.integers(0, checked.info["n_actions"], checked.info["n_agents"]).tolist()
        state = random.getstate()
        row = checked.step(actions)
        random.setstate(state)
        obs, rewards, dones, _ = by_hand.step(actions)
        done = bool(row["terminated"] or row["truncated"])
        assert done == (all(dones) or t == checked.info["episode_limit"]) and row["reward"] == np.float32(sum(rewards))
        if not row["terminated"]:
            np.testing.assert_allclose(row["obs"], np.asarray([np.ravel(o) for o in obs], np.float32))
    assert t <= checked.info["episode_limit"] and (t == checked.info["episode_limit"] or row["terminated"])
