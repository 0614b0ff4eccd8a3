"""Each test names the mistake it would catch. The game's numbers are written out, not read."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import envs
from extras import skirmish
from extras.skirmish import MAPS, Skirmish

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "testdata" / "smac_golden"
STOP, NORTH, SOUTH, EAST, WEST, ATTACK = range(1, 7)
FAR = 1e9  # a cooldown that disarms
# Units of 1c3s5z: 0 colossus, 1-3 stalkers, 4-8 zealots; the enemies' indices are 9 more


@pytest.fixture(autouse=True)
def same_random_actions_every_time():
    torch.manual_seed(0)


def arena(map_name, places, n_envs=1):
    """A battle with only the units in `places`, {index: (x, y)}, alive. Cooldowns do not vary.

    Enemies notice whatever is in sight, as if they had just been hurt.
    """
    env = Skirmish(map_name, n_envs)
    fix_noise(env, 1 / 3)
    env.reset()
    env.unhurt.zero_()
    alive = torch.zeros(len(env.names))
    for unit, (x, y) in places.items():
        alive[unit] = 1
        move(env, unit, x, y)
    env.health *= alive
    return env


def fix_noise(env, value):
    """All random numbers from now on; 1 / 3 is a cooldown as it is, 1 / 2 a start in place."""

    def noise():
        return torch.full((env.n_envs, len(env.names)), value)

    env.noise = noise


def move(env, unit, x, y):
    env.place[0, :, unit] = x
    env.place[1, :, unit] = y


def where(env, unit):
    return env.place[:, 0, unit].tolist()


def disarm(env, *units):
    """These units neither shoot nor walk."""
    env.cooldown[:, units] = FAR
    env.speed[list(units)] = 0


def play_loops(env, actions, count):
    """Play `count` game loops on one order. Yield 1, 2, ... after each."""
    goal, moves = env.order(torch.tensor([actions]))
    for loop in range(1, count + 1):
        env.game_loop(goal, moves, env.reload.expand_as(env.health))
        yield loop


def fire(env, shooter, victim):
    """The allies' actions: the shooter attacks, if it is an ally, and all others stop."""
    actions = [STOP] * env.n_agents
    if shooter < env.n_agents:
        actions[shooter] = ATTACK + victim - env.n_agents
    return actions


def distance(a, b):
    return math.hypot(a[0] - b[0], a[1] - b[1])


def random_actions(step):
    return torch.rand(step.avail.shape).masked_fill(~step.avail, -1).argmax(-1)


# --------------------------------------------------------------------- what smac itself answers
@pytest.fixture(scope="module", params=["3m", "8m", "2s3z", "3s5z", "1c3s5z"])
def golden(request):
    """Rows of smac: facts about the units, and what smac made of them. Here: the same from ours.

    data: smac's arrays; goal, moves, target: of our orders; step: our Step after them.
    """
    data = np.load(GOLDEN / f"{request.param}.npz")
    K, N = data["last_action"].shape
    env = Skirmish(request.param, n_envs=K)
    env.center = (float(data["center_x"]), float(data["center_y"]))
    env.extent = (float(data["max_distance_x"]), float(data["max_distance_y"]))
    columns = np.flatnonzero(data["pathing_grid"].any(1))
    rows = np.flatnonzero(data["pathing_grid"].any(0))
    env.walk_x = (float(columns[0]), float(columns[-1] + 1))
    env.walk_y = (float(rows[0]), float(rows[-1] + 1))
    env.reset()

    plant(env, data, "prev_")
    points = env.health + env.shield
    alive = env.health > 0
    goal, moves = env.order(torch.tensor(data["actions"]).long())
    target = env.target[:, :N] - N
    before = alive[:, :N].numpy()

    plant(env, data, "")
    env.last_actions = torch.tensor(data["last_action"])
    env.steps = torch.tensor(data["step"])  # (K,): here every row has its own clock
    step = env.look(env.reward(points, alive))
    return SimpleNamespace(
        data=data,
        env=env,
        step=step,
        before=before,  # (K, N) who lived before the orders
        goal=goal[:, :, :N].numpy(),
        moves=moves[:, :N].numpy(),
        target=target.numpy(),
    )


def plant(env, data, when):
    """Write smac's facts into the environment."""
    for name in ("health", "shield", "cooldown"):
        setattr(env, name, planted(data, when, name))
    env.place = torch.stack([planted(data, when, "x"), planted(data, when, "y")])


def planted(data, when, name):
    both = [data[f"{when}ally_{name}"], data[f"{when}enemy_{name}"]]
    return torch.tensor(np.concatenate(both, 1))


def test_sizes_are_smacs(golden):
    """Catches: a feature too much or too few; a step limit or max_reward that is not smac's."""
    data = golden.data
    env = golden.env
    for name in ("n_agents", "n_enemies", "n_actions", "episode_limit", "max_reward"):
        assert getattr(env, name) == data[name], name
    assert env.obs_dim == data["obs"].shape[2]
    assert env.state_dim == data["state"].shape[1]


def test_orders_are_smacs(golden):
    """Catches: an action that stops, moves or attacks where smac does something else."""
    attacks = golden.target >= 0
    kind = np.where(attacks, 3, 1)
    kind[golden.moves] = 2
    kind = kind * golden.before  # no order for the dead
    moved = golden.data["has_transition"]
    np.testing.assert_array_equal(kind[moved], golden.data["order_kind"][moved])


def test_targets_of_attacks_are_smacs(golden):
    """Catches: an attack on another enemy than the one that the action names."""
    moved = golden.data["has_transition"]
    attacks = golden.data["order_kind"][moved] == 3
    ours = golden.target[moved][attacks]
    assert len(ours) > 0
    np.testing.assert_array_equal(ours, golden.data["order_target"][moved][attacks])


def test_goals_of_moves_are_smacs(golden):
    """Catches: directions swapped, or a move of another length."""
    moves = golden.data["order_kind"] == 2
    assert moves.sum() > 0
    for axis, name in enumerate(("order_x", "order_y")):
        theirs = golden.data[name][moves]
        np.testing.assert_allclose(golden.goal[axis][moves], theirs, rtol=0, atol=1e-6)


def test_available_actions_are_smacs(golden):
    """Catches: another border, range, look-ahead, or anything for the dead but a no-op."""
    np.testing.assert_array_equal(golden.step.avail.numpy(), golden.data["avail"])


def test_observations_are_smacs(golden):
    """Catches: a feature, divisor, order, type bit, or limit of sight that is not smac's."""
    np.testing.assert_allclose(golden.step.obs, golden.data["obs"], rtol=0, atol=1e-6)


def test_states_are_smacs(golden):
    """Catches: a feature, divisor, order or type bit of the state that is not smac's."""
    np.testing.assert_allclose(golden.step.state, golden.data["state"], rtol=0, atol=1e-6)


def test_rewards_are_smacs(golden):
    """Catches: a term, sign, or scale of the reward that is not smac's."""
    moved = golden.data["has_transition"]
    ours = golden.step.reward[moved]
    np.testing.assert_allclose(ours, golden.data["reward"][moved], rtol=0, atol=1e-6)


def test_ends_are_smacs(golden):
    """Catches: a time limit that is taken for an end, or the reverse, or comes a step too late."""
    moved = golden.data["has_transition"]
    timed_out = golden.data["timed_out"][moved]
    ended = golden.data["terminated"][moved] & ~timed_out
    np.testing.assert_array_equal(golden.step.terminated.numpy()[moved], ended)
    np.testing.assert_array_equal(golden.step.truncated.numpy()[moved], timed_out)


@pytest.mark.parametrize("fact", ["battle_won", "dead_allies", "dead_enemies"])
def test_facts_about_the_end_are_smacs(golden, fact):
    """Catches: a battle won by nobody, the dead of the other side."""
    moved = golden.data["has_transition"]
    ours = golden.step.info[fact].numpy()
    np.testing.assert_array_equal(ours[moved], golden.data[f"info_{fact}"][moved])


# ---------------------------------------------------------------------------- names, sizes, maps
def test_maps_and_their_step_limits():
    """Catches: a map that is missing, or another time limit than smac's (5m: 5m_vs_6m's)."""
    limits = {
        "3m": 60,
        "5m": 70,
        "8m": 120,
        "5m_vs_6m": 70,
        "2s3z": 120,
        "3s5z": 150,
        "1c3s5z": 180,
    }
    assert MAPS == limits
    for name, limit in limits.items():
        assert Skirmish(name, 1).episode_limit == limit


def test_teams_are_read_from_the_name():
    """Catches: other units, another order of theirs, one team for both sides of 5m_vs_6m."""
    assert Skirmish("5m_vs_6m", 1).names == 11 * ["marine"]
    protoss = ["colossus"] + 3 * ["stalker"] + 5 * ["zealot"]
    assert Skirmish("1c3s5z", 1).names == protoss + protoss


@pytest.mark.parametrize("name", ["4m", "", "3M", "3m_vs_3m"])
def test_other_maps_are_refused(name):
    """Catches: a KeyError, a battle without units, a message that does not say what there is."""
    words = f"expected a skirmish map out of 3m, 5m, 8m, 5m_vs_6m, 2s3z, 3s5z, 1c3s5z; got '{name}'"
    with pytest.raises(envs.UsageError) as error:
        Skirmish(name, 1)
    assert str(error.value) == words


def test_envs_make_finds_the_maps():
    """Catches: arguments of make that get lost or change places."""
    env = envs.make("skirmish:2s3z", 3, "cpu", 17)
    assert type(env) is Skirmish
    assert (env.n_envs, env.n_agents, env.device.type) == (3, 5, "cpu")
    assert env.generator.initial_seed() == 17


@pytest.mark.parametrize("name, M", [("5m", 5), ("5m_vs_6m", 6)])
def test_allies_and_enemies_are_not_swapped_in_the_sizes(name, M):
    """Catches: N for M, which the maps of smac's rows cannot show: there N = M."""
    env = Skirmish(name, 1)
    assert (env.n_agents, env.n_enemies, env.n_actions) == (5, M, 6 + M)
    assert env.obs_dim == 4 + 5 * M + 5 * 4 + 1
    assert env.state_dim == 4 * 5 + 3 * M + 5 * (6 + M)
    assert env.max_reward == 55 * M + 200


def test_best_return_is_known_for_marines_alone():
    """Catches: 20 as the best return where shields grow back and pay again."""
    assert Skirmish("5m_vs_6m", 1).best_return == 20
    assert not hasattr(Skirmish("2s3z", 1), "best_return")


@pytest.mark.parametrize("name", ["5m_vs_6m", "1c3s5z"])
def test_shapes_and_dtypes(name):
    """Catches: a Step with another layout than the interface has, at a reset or later."""
    env = Skirmish(name, 4)
    N = env.n_agents
    A = env.n_actions
    first = env.reset()
    expected = [
        ((4, N, env.obs_dim), torch.float32),
        ((4, env.state_dim), torch.float32),
        ((4, N, A), torch.bool),
        ((4,), torch.float32),
        ((4,), torch.bool),
        ((4,), torch.bool),
    ]
    for step in (first, env.step(random_actions(first))):
        assert [(field.shape, field.dtype) for field in step[:-1]] == expected


def test_facts_come_as_one_number_for_each_battle():
    """Catches: facts with other names, shapes or dtypes than the trainer reads."""
    facts = Skirmish("3m", 4).reset().info
    assert list(facts) == ["battle_won", "dead_allies", "dead_enemies"]
    assert facts["battle_won"].dtype == torch.bool
    for fact in facts.values():
        assert fact.shape == (4,)


def test_steps_are_no_views_of_what_goes_on():
    """Catches: an array of an earlier step that changes while the battle goes on."""
    env = Skirmish("2s3z", 4)
    steps = [env.reset()]
    copies = []
    for _ in range(6):
        copies.append([field.clone() for field in steps[-1][:-1]])
        steps.append(env.step(random_actions(steps[-1])))
    env.reset()
    for step, copy in zip(steps, copies):
        for field, kept in zip(step[:-1], copy):
            assert torch.equal(field, kept)


def test_the_caller_may_use_its_actions_again():
    """Catches: last actions that are the caller's own tensor."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    actions = torch.tensor([[STOP, 0, 0]])
    env.step(actions)
    actions.fill_(EAST)
    assert env.last_actions.tolist() == [[STOP, 0, 0]]


def test_last_actions_in_the_state():
    """Catches: actions of the step before, or of the battle before, or of another agent."""
    env = Skirmish("5m_vs_6m", 4)
    step = env.reset()
    for _ in range(3):
        actions = random_actions(step)
        step = env.step(actions)
        one_hot = torch.nn.functional.one_hot(actions, 12).float()
        assert torch.equal(step.state[:, -60:], one_hot.flatten(1))
    assert not env.reset().state[:, -60:].any()


@pytest.mark.parametrize("name", ["5m_vs_6m", "1c3s5z"])
def test_step_never_waits_for_the_device(name):
    """Catches: .item(), an `if` on a tensor's values, a shape that depends on them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        env = Skirmish(name, 4)
        fix_noise(env, 0.5)  # fake tensors have no generator
        env.reset()
        env.step(env.heuristic())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_step_is_the_plain_one(monkeypatch):
    """Catches: a graph that keeps the state or the random numbers of its first call."""
    monkeypatch.setattr(skirmish, "LOOPS_PER_STEP", 1)  # compiles in an eighth of the time
    plain = Skirmish("2s3z", 4, seed=1)
    compiled = Skirmish("2s3z", 4, seed=1)
    compiled.step = torch.compile(compiled.step)
    plain.reset()
    compiled.reset()
    for _ in range(90):
        actions = plain.heuristic()
        step = plain.step(actions)
        other = compiled.step(actions)
        for ours, theirs in zip(step[:-1], other[:-1]):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert plain.cooldown.any() and plain.steps == compiled.steps == 90


# ------------------------------------------------------------------------------------- the start
def reset_without_scatter(name):
    env = Skirmish(name, 1)
    fix_noise(env, 0.5)
    env.reset()
    return env


def test_teams_start_as_blocks_at_their_places():
    """Catches: another place or spacing of a team, or one that faces the wrong way."""
    places = reset_without_scatter("3m").place[:, 0].T.tolist()
    ours = [[8.375, 15.375], [8.375, 16.625], [9.625, 15.375]]
    theirs = [[23.625, 15.375], [23.625, 16.625], [22.375, 15.375]]
    assert sorted(places[:3]) == ours
    assert places[3:] == theirs


def test_units_of_long_range_start_behind():
    """Catches: enemies with their zealots hindmost, or allies."""
    x = reset_without_scatter("1c3s5z").place[0, 0].tolist()
    assert x[:3] == [7.75] * 3  # the colossus, two stalkers
    assert x[3:9] == [9, 9, 9, 10.25, 10.25, 10.25]
    assert x[9:12] == [24.25] * 3
    assert x[12:] == [23, 23, 23, 21.75, 21.75, 21.75]


def test_a_map_is_that_of_smac():
    """Catches: another centre or extent behind the positions in the state."""
    env = arena("3m", {0: (9, 16), 3: (30, 8)})
    state = env.look(torch.zeros(1)).state[0]
    assert state[2:4].tolist() == [(9 - 16) / 32, 0]  # after health and cooldown
    assert state[13:15].tolist() == [(30 - 16) / 32, (8 - 16) / 32]  # after 3 x 4, and health


@pytest.mark.parametrize("axis", [0, 1])
def test_every_unit_starts_up_to_half_a_cell_from_its_place(axis):
    """Catches: another scatter, none, or one for a whole team, batch or axis."""
    env = Skirmish("2s3z", 64)
    middle = reset_without_scatter("2s3z").place[axis, 0]
    env.reset()
    off = env.place[axis, :, 5:] - middle[5:]  # the enemies, which are not sorted
    assert -0.5 <= off.min() < -0.45
    assert 0.45 < off.max() <= 0.5
    assert off.unique().numel() > 300
    assert off.std(0).min() > 0.2 and off.std(1).min() > 0.03


def test_x_and_y_are_scattered_apart():
    """Catches: one random number for both axes."""
    env = Skirmish("8m", 64)
    env.reset()
    off = env.place[:, :, 8:] - reset_without_scatter("8m").place[:, :, 8:]
    assert abs(np.corrcoef(off.flatten(1).numpy())[0, 1]) < 0.2


def test_allies_of_a_kind_are_sorted_by_x():
    """Catches: allies that are not sorted, or across kinds, or without their y; sorted enemies."""
    env = Skirmish("2s3z", 64)
    noise = torch.rand(2, 64, 10)
    env.noise = iter(noise).__next__
    env.reset()
    x = [7.75, 7.75, 9, 9, 10.25, 24.25, 24.25, 23, 23, 21.75]
    y = [15.375, 16.625, 15.375, 16.625, 15.375] * 2
    drawn = torch.tensor([x, y])[:, None] + noise - 0.5  # before the sort (2, B, U)
    for first, last in ((0, 2), (2, 5)):  # the stalkers, the zealots
        order = drawn[0, :, first:last].argsort(1)
        expected = drawn[:, :, first:last].gather(2, order.expand(2, -1, -1))
        torch.testing.assert_close(env.place[:, :, first:last], expected)
    torch.testing.assert_close(env.place[:, :, 5:], drawn[:, :, 5:])


def test_kinds_are_not_mixed_by_the_sort():
    """Catches: a colossus that changes places with a stalker behind it."""
    env = Skirmish("1c3s5z", 1)
    env.noise = iter([torch.tensor([[0.9] + 17 * [0.5]])] * 2).__next__
    env.reset()
    assert where(env, 0) == pytest.approx([7.75 + 0.4, 14.75 + 0.4])
    assert env.place[0, 0, 1:4].tolist() == [7.75, 7.75, 9]


def test_marines_are_sorted_by_x():
    """Catches: no order where there is one kind alone."""
    env = Skirmish("8m", 64)
    env.reset()
    x = env.place[0]
    assert (x[:, 1:8] >= x[:, :7]).all()
    assert not (x[:, 9:] <= x[:, 8:15]).all()


# ------------------------------------------------------------------------------ chance and batches
def battle(env):
    """The last state of a battle by the heuristic."""
    env.reset()
    for _ in range(40):
        step = env.step(env.heuristic())
    return step.state


def test_battles_repeat_with_the_seed():
    """Catches: a seed that is not used, and random numbers from elsewhere."""
    one = battle(Skirmish("2s3z", 8, seed=1))
    torch.manual_seed(5)
    assert torch.equal(one, battle(Skirmish("2s3z", 8, seed=1)))
    assert not torch.equal(one, battle(Skirmish("2s3z", 8, seed=2)))


def test_a_second_battle_is_another_one():
    """Catches: a generator that starts afresh at every reset."""
    env = Skirmish("2s3z", 8, seed=1)
    assert not torch.equal(battle(env), battle(env))


def test_a_reset_leaves_nothing_of_the_battle_before():
    """Catches: a fact about the units, or the clock, that survives a reset."""
    used = Skirmish("2s3z", 8, seed=1)
    battle(used)
    fresh = Skirmish("2s3z", 8, seed=1)
    used.generator.set_state(fresh.generator.get_state())
    used.reset()
    fresh.reset()
    facts = [name for name, fact in vars(fresh).items() if isinstance(fact, torch.Tensor)]
    assert {"place", "health", "unhurt", "target", "last_actions", "steps"} < set(facts)
    for name in facts:
        assert torch.equal(getattr(used, name), getattr(fresh, name)), name


@pytest.mark.parametrize("name", ["5m_vs_6m", "1c3s5z"])
def test_a_batch_equals_single_battles(name):
    """Catches: any leak between the battles of a batch."""
    units = len(Skirmish(name, 1).names)
    draws = torch.rand(42, 4, units)
    batch = battles(name, draws)
    for b in range(4):
        for many, one in zip(batch, battles(name, draws[:, b : b + 1])):
            for name_, field in zip(many._fields[:-1], many[:-1]):
                assert torch.equal(field[b], getattr(one, name_)[0]), name_


def battles(name, draws):
    """The steps of battles with given random numbers (42, B, U)."""
    env = Skirmish(name, draws.shape[1])
    env.noise = iter(draws).__next__
    steps = [env.reset()]
    for t in range(40):
        actions = env.heuristic()
        if t % 5 == 0:
            actions = steps[-1].avail.float().argmax(2)
        steps.append(env.step(actions))
    return steps


# ----------------------------------------------------------------------------------------- damage
# By hand: shots until the shield is gone and the health is, too, with armour off every hit that
# meets health. The first shot falls in loop 1, the next ones ceil(cooldown x 22.4) loops apart.
SHOTS = [
    ("3m", 0, 3, 8, 14),  # 45 / 6
    ("1c3s5z", 4, 13, 11, 20),  # 16: 48 off 50; of 8 with 2 left: 5, and 7; then 14
    ("1c3s5z", 1, 10, 10, 31),  # 18: 72 off 80; 9; then 17
    ("1c3s5z", 1, 13, 13, 31),  # 13: 39 off 50; 1; then 12
    ("1c3s5z", 4, 10, 11, 20),  # 16: 80 off 80; then 14
    ("1c3s5z", 0, 13, 6, 24),  # 30: 30 off 50; 15, 9; then 28
    ("1c3s5z", 0, 10, 9, 24),  # 20: 80 off 80; then 18
    ("1c3s5z", 0, 9, 19, 24),  # 20: 140 off 150; of 10 with 10 left: 0, and 9; then 18
]


@pytest.mark.parametrize("side", ["ally", "enemy"])
@pytest.mark.parametrize("map_name, shooter, victim, shots, reload", SHOTS)
def test_shots_to_kill_and_the_loop_of_death(map_name, shooter, victim, shots, reload, side):
    """Catches: wrong health, shield, damage, bonus, armour (also off shields), hits or cooldown."""
    if side == "enemy":
        N = Skirmish(map_name, 1).n_agents
        shooter += N
        victim -= N
    env = arena(map_name, {shooter: (15, 16), victim: (15, 16)})
    move(env, victim, 15 + float(env.reach[shooter] + env.radius[victim]) - 0.05, 16)
    disarm(env, victim)
    fired = 0
    for loop in play_loops(env, fire(env, shooter, victim), shots * reload):
        fired += int(env.shot_at[0, shooter] == victim)
        env.shot_at = torch.full_like(env.shot_at, -1)
        if env.health[0, victim] <= 0:
            break
    assert fired == shots
    assert loop == 1 + (shots - 1) * reload


@pytest.mark.parametrize(
    "map_name, shooter, victim, points",
    [
        ("3m", 0, 3, 6),
        ("1c3s5z", 0, 9, 20),
        ("1c3s5z", 0, 10, 20),
        ("1c3s5z", 0, 13, 30),  # 5 more for each of two hits: zealots are light
        ("1c3s5z", 1, 9, 18),  # 5 more for one hit: armoured
        ("1c3s5z", 1, 10, 18),
        ("1c3s5z", 1, 13, 13),
        ("1c3s5z", 4, 9, 16),
        ("1c3s5z", 4, 10, 16),
        ("1c3s5z", 4, 13, 16),
    ],
)
def test_points_of_one_shot(map_name, shooter, victim, points):
    """Catches: damage that is off by so little that it takes as many shots to kill."""
    env = arena(map_name, {shooter: (15, 16), victim: (15.8, 16)})
    disarm(env, victim)
    before = float(env.health[0, victim] + env.shield[0, victim])
    next(play_loops(env, fire(env, shooter, victim), 1))
    assert before - float(env.health[0, victim] + env.shield[0, victim]) == points


def test_wounds_equal_a_loop_over_hits():
    """Catches: armour or shields mistaken where several attackers hit in one game loop."""
    env = Skirmish("1c3s5z", n_envs=64)
    env.reset()
    draw = torch.Generator().manual_seed(1)
    env.shield *= torch.rand(env.shield.shape, generator=draw)
    attacks = env.shot_damage * (torch.rand(64, 18, 18, generator=draw) < 0.4)
    env.unhurt.zero_()
    health = env.health.tolist()
    shield = env.shield.tolist()
    for b, attacker, victim in attacks.nonzero().tolist():  # in the attackers' order
        hits = 1 if env.names[attacker] == "stalker" else 2
        for _ in range(hits):
            hit = float(attacks[b, attacker, victim]) / hits
            absorbed = min(hit, shield[b][victim])
            shield[b][victim] -= absorbed
            health[b][victim] -= max(hit - absorbed - 1, 0)
    env.wound(attacks)
    torch.testing.assert_close(env.shield, torch.tensor(shield), rtol=0, atol=1e-3)
    torch.testing.assert_close(env.health, torch.tensor(health).clamp(min=0), rtol=0, atol=1e-3)


def test_nobody_hurts_its_own_side():
    """Catches: damage among friends."""
    env = Skirmish("1c3s5z", 1)
    assert not env.shot_damage[:9, :9].any() and not env.shot_damage[9:, 9:].any()
    assert env.shot_damage[:9, 9:].all() and env.shot_damage[9:, :9].all()


@pytest.mark.parametrize("unit", [0, 5])
def test_shields_grow_after_160_loops_up_to_their_maximum(unit):
    """Catches: another delay or rate, a delay that damage does not restart, a shield too large."""
    env = arena("2s3z", {0: (5, 10), 5: (25, 20)})
    env.unhurt.fill_(1000)
    shot = torch.zeros(1, 10, 10)
    shot[0, 5 - unit, unit] = 18
    env.shield[0, unit] = 70
    env.wound(shot)
    for loop in range(1, 401):
        env.wound(torch.zeros(1, 10, 10))
        assert env.shield[0, unit] == min(52 + 0.125 * max(loop - 160, 0), 80)


def test_a_battle_starts_with_shields_that_grow():
    """Catches: a wait of 160 loops before the first damage."""
    env = Skirmish("2s3z", 1)
    env.reset()
    env.shield.zero_()
    env.wound(torch.zeros(1, 10, 10))
    assert (env.shield == 0.125).all()


@pytest.mark.parametrize("angle", [0.0, 0.7, 2.5])
def test_the_beam_hits_what_it_touches_across_the_line_of_fire(angle):
    """Catches: a beam along the line of fire, or along an axis; centres for bodies; other sizes."""
    along = 0.15 + 0.5  # half the beam and a zealot's radius
    across = 1.4 + 0.5
    places = {  # from the target: in the direction of fire, and across
        0: (-5, 0),
        4: (0.1, 1.2),
        10: (0, 0),
        13: (0, across - 0.01),
        14: (0, -across - 0.01),
        15: (along - 0.01, -1),
        16: (-along - 0.01, 1),
    }
    env = arena("1c3s5z", {})
    for unit, (f, a) in places.items():
        x = 16 + f * math.cos(angle) - a * math.sin(angle)
        move(env, unit, x, 16 + f * math.sin(angle) + a * math.cos(angle))
        env.health[0, unit] = env.health_max[unit]
    env.cooldown[:, 1:] = FAR
    next(play_loops(env, fire(env, 0, 10), 1))
    lost = (env.shield_max - env.shield)[0, [10, 13, 14, 15, 16, 4]]
    assert lost.tolist() == [20, 30, 0, 30, 0, 0]


def test_the_beam_is_the_colossus_own():
    """Catches: stalkers or zealots whose shot hits the target's neighbours."""
    env = arena("1c3s5z", {1: (12, 16), 10: (16, 16), 11: (16, 17.3)})
    disarm(env, 10, 11)
    next(play_loops(env, fire(env, 1, 10), 1))
    assert env.shield[0, 10:12].tolist() == [62, 80]


# ------------------------------------------------------------------------------- range and cooldown
@pytest.mark.parametrize("off", [-0.01, 0.01, 0.5])
@pytest.mark.parametrize(
    "map_name, shooter, victim, reach, speed",
    [
        ("3m", 0, 3, 5.75, 3.15),
        ("1c3s5z", 1, 13, 7.125, 4.13),
        ("1c3s5z", 4, 13, 1.1, 3.15),
        ("1c3s5z", 0, 10, 8.625, 3.15),
    ],
)
def test_units_walk_into_their_range_and_shoot(map_name, shooter, victim, reach, speed, off):
    """Catches: ranges between centres, shots on the way, overshooting, another speed."""
    gap = reach + off
    env = arena(map_name, {shooter: (12, 16), victim: (12 + 0.6 * gap, 16 + 0.8 * gap)})
    disarm(env, victim)
    walk = max(off, 0)
    last = math.ceil(walk * 22.4 / speed) + 1
    for loop in play_loops(env, fire(env, shooter, victim), last):
        walked = distance(where(env, shooter), (12, 16))
        assert walked == pytest.approx(min(loop * speed / 22.4, walk), abs=2e-3)
        assert (env.shot_at[0, shooter] == victim) == (loop == last)


@pytest.mark.parametrize("shooter, victim", [(0, 3), (3, 0)])
@pytest.mark.parametrize("noise, reload", [(0.0, 13), (1 / 3, 14), (0.9999, 16)])
def test_the_cooldown_varies_by_minus_one_to_two_loops(noise, reload, shooter, victim):
    """Catches: another variation, or for one side alone. 13.664 loops become 12.664 to 15.664."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    fix_noise(env, noise)
    disarm(env, victim)
    actions = fire(env, shooter, victim)
    env.step(torch.tensor([actions]))  # it fires in loop 1 of 8
    left = float(env.cooldown[0, shooter])
    assert left == pytest.approx(13.664 + 3 * noise - 1 - 8, abs=1e-3)
    env.shot_at = torch.full_like(env.shot_at, -1)
    for loop in play_loops(env, actions, 11):
        if env.shot_at[0, shooter] >= 0:
            break
    assert 8 + loop == reload + 1


@pytest.mark.parametrize("action", [STOP, EAST, ATTACK + 1])
def test_an_ally_shoots_only_when_told_to(action):
    """Catches: allies that fire unordered, or at the dead (enemy 1 is)."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    step = env.step(torch.tensor([[action, 0, 0]]))
    assert env.health[0, [0, 3]].tolist() == [39, 45]
    assert step.reward == 0


def test_the_dead_do_not_shoot():
    """Catches: shots of units that have died, of either side."""
    env = arena("3m", {0: (14, 16), 3: (28, 24)})
    disarm(env, 3)
    move(env, 1, 27, 24)  # both dead, with a living foe in range
    move(env, 4, 15, 16)
    env.step(torch.tensor([[STOP, ATTACK, 0]]))
    assert env.health[0, [0, 3]].tolist() == [45, 45]


@pytest.mark.parametrize("action", [STOP, ATTACK + 1])
def test_who_stops_or_attacks_the_dead_stands(action):
    """Catches: units that walk to the dead, or to a goal of an earlier step."""
    env = arena("3m", {0: (14, 16), 3: (28, 8), 4: (24, 16)})
    env.health[0, 4] = 0
    env.step(torch.tensor([[EAST, 0, 0]]))
    before = where(env, 0)
    env.step(torch.tensor([[action, 0, 0]]))
    assert where(env, 0) == before


def test_damage_is_dealt_at_once():
    """Catches: one side that shoots first."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.health[0, [0, 3]] = 5
    env.step(torch.tensor([[ATTACK, 0, 0]]))
    assert env.health.max() == 0


# ------------------------------------------------------------------------------- moves and borders
DIRECTIONS = pytest.mark.parametrize(
    "action, axis, sign", [(NORTH, 1, 1), (SOUTH, 1, -1), (EAST, 0, 1), (WEST, 0, -1)]
)


def lonely_marine(sign):
    """An ally at (16, 16), and an enemy far behind it that does nothing."""
    env = arena("3m", {0: (16, 16), 3: (3, 8) if sign > 0 else (29, 24)})
    disarm(env, 3)
    return env


@pytest.mark.parametrize("action", [STOP, ATTACK + 1])
def test_a_weapon_that_does_not_shoot_stays_ready(action):
    """Catches: shots at the dead, and cooldowns below 0."""
    env = arena("3m", {0: (14, 16), 3: (28, 8), 4: (16, 16)})
    env.health[0, 4] = 0
    step = env.step(torch.tensor([[action, 0, 0]]))
    assert env.cooldown[0, 0] == 0
    assert env.shot_at[0, 0] == -1
    assert step.state[0, 1] == 0


@DIRECTIONS
def test_a_move_goes_its_way_at_its_speed(action, axis, sign):
    """Catches: swapped directions, another speed, a step of other than 8 game loops."""
    env = lonely_marine(sign)
    env.step(torch.tensor([[action, 0, 0]]))
    place = where(env, 0)
    assert place[axis] == pytest.approx(16 + sign * 8 * 3.15 / 22.4, abs=2e-3)
    assert place[1 - axis] == 16


@DIRECTIONS
def test_one_order_leads_two_cells(action, axis, sign):
    """Catches: an order without an end, or of another length."""
    env = lonely_marine(sign)
    for _ in play_loops(env, [action, 0, 0], 30):
        pass
    assert where(env, 0)[axis] == pytest.approx(16 + 2 * sign, abs=2e-3)


@DIRECTIONS
def test_nobody_leaves_the_map(action, axis, sign):
    """Catches: borders off by one: 2 <= x < 30, 7 <= y < 25."""
    env = lonely_marine(sign)
    for _ in range(19):
        env.step(torch.tensor([[action, 0, 0]]))
        x, y = where(env, 0)
        assert 2 <= x < 30 and 7 <= y < 25
    border = [(2, 30), (7, 25)][axis][sign > 0]
    assert where(env, 0)[axis] == pytest.approx(border, abs=2e-3)


@DIRECTIONS
def test_a_move_over_the_border_is_not_available(action, axis, sign):
    """Catches: a mask that looks two cells ahead, or not at all."""
    border = [(2, 30), (7, 25)][axis][sign > 0]
    env = lonely_marine(sign)
    for inside, free in ((1.01, True), (0.99, False)):
        place = [16, 16]
        place[axis] = border - sign * inside
        move(env, 0, *place)
        assert bool(env.available()[0, 0, action]) == free


# --------------------------------------------------------------------------- bodies push each other
def test_nobody_overlaps_after_a_while():
    """Catches: missing or too strong pushes, and other radii: zealots push at 0.375, not 0.5."""
    env = Skirmish("1c3s5z", n_envs=8)
    env.reset()
    env.place = 16 + torch.rand(env.place.shape, generator=env.generator)
    disarm(env, *range(18))
    for _ in range(40):
        env.step(torch.ones(8, 9, dtype=torch.int64))
    offset = env.place[..., None] - env.place[:, :, None]
    gap = offset.square().sum(0).sqrt()
    radius = torch.tensor([1.0] + [0.625] * 3 + [0.375] * 5).repeat(2)
    apart = gap - radius - radius[:, None] + 9 * torch.eye(18)
    assert -0.02 < apart.min() < 0.02


def test_a_push_moves_each_by_half():
    """Catches: a push of the whole overlap, or of one side alone."""
    env = arena("2s3z", {2: (16, 16), 3: (16, 16.65)})
    disarm(env, 2, 3)
    next(play_loops(env, [STOP] * 5, 1))
    assert where(env, 2) == pytest.approx([16, 15.95], abs=1e-3)
    assert where(env, 3) == pytest.approx([16, 16.7], abs=1e-3)


def test_who_only_comes_close_is_not_pushed():
    """Catches: zealots that push at their radius of 0.5."""
    env = arena("2s3z", {2: (16, 16), 3: (16.76, 16)})
    env.step(torch.tensor([[0, 0, STOP, STOP, 0]]))
    assert where(env, 2) == [16, 16]


def test_the_dead_push_nobody():
    """Catches: corpses in the way."""
    env = arena("2s3z", {2: (16, 16)})
    move(env, 5, 16.2, 16.1)
    env.step(torch.tensor([[0, 0, STOP, 0, 0]]))
    assert where(env, 2) == [16, 16]


def test_the_dead_stay_where_they_fell():
    """Catches: the dead that go on walking to their goals."""
    env = arena("3m", {0: (16, 16), 3: (28, 24)})
    before = env.place[:, 0, [1, 2, 4, 5]]
    env.step(torch.tensor([[EAST, EAST, EAST]]))
    assert torch.equal(env.place[:, 0, [1, 2, 4, 5]], before)


def test_two_on_one_spot_in_a_corner_part():
    """Catches: a division by zero, or two units that stay one."""
    env = arena("3m", {0: (29.999, 24.999), 1: (29.999, 24.999), 3: (4, 8)})
    for _ in range(5):
        env.step(torch.tensor([[STOP, STOP, 0]]))
    assert distance(where(env, 0), where(env, 1)) > 0.74


# --------------------------------------------------------------------------------- end and reward
def test_a_draw_ends_and_is_not_won():
    """Catches: a draw that is won, or goes on; a reward for a win that was none."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.health[0, [0, 3]] = 5
    step = env.step(torch.tensor([[ATTACK, 0, 0]]))
    assert step.terminated and not step.truncated
    assert not step.info["battle_won"]
    assert float(step.reward) == pytest.approx((5 + 10) * 20 / 365)


def test_a_win_pays_200_points_more():
    """Catches: a win that pays nothing, or another scale."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.health[0, 3] = 5
    step = env.step(torch.tensor([[ATTACK, 0, 0]]))
    assert step.terminated and step.info["battle_won"]
    assert float(step.reward) == pytest.approx((5 + 10 + 200) * 20 / 365)


def test_a_defeat_ends_and_pays_nothing():
    """Catches: a battle that goes on without allies, and a price for their deaths."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.health[0, 0] = 5
    step = env.step(torch.tensor([[STOP, 0, 0]]))
    assert step.terminated and not step.info["battle_won"]
    assert step.reward == 0
    assert [int(step.info["dead_allies"]), int(step.info["dead_enemies"])] == [3, 2]


def test_the_dead_see_and_do_nothing():
    """Catches: actions or observations for the dead."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    step = env.look(torch.zeros(1))
    assert step.avail[0, 1].tolist() == [True] + [False] * 8
    assert not step.obs[0, 1:].any()
    assert step.obs[0, 0].any()


def test_a_time_limit_truncates():
    """Catches: another limit, a time limit as an end, a clock that a reset does not stop."""
    env = arena("3m", {0: (4, 8), 3: (28, 24)})
    disarm(env, 0, 3)
    for count in range(1, 61):
        step = env.step(torch.tensor([[STOP, 0, 0]]))
        assert bool(step.truncated) == (count == 60)
        assert not step.terminated
    assert not env.reset().truncated


def test_an_end_in_the_last_step_is_no_time_limit():
    """Catches: terminated and truncated in one step."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.health[0, 3] = 5
    env.steps = torch.tensor(59)
    step = env.step(torch.tensor([[ATTACK, 0, 0]]))
    assert step.terminated and not step.truncated


def standing_protoss():
    """2s3z: a stalker on either side, far apart, with shields that grow. Nobody does anything."""
    env = arena("2s3z", {0: (4, 8), 5: (28, 24)})
    disarm(env, *range(10))
    env.unhurt.fill_(1000)
    return env


def test_the_dead_enemies_shields_pay_nothing():
    """Catches: a reward for the shields of the dead, which grow again."""
    env = standing_protoss()
    env.shield[0, 6:] = 10
    for _ in range(25):
        assert env.step(torch.tensor([[STOP, 0, 0, 0, 0]])).reward == 0


def test_a_living_enemys_shield_pays_for_growing():
    """Catches: a reward that loses smac's absolute value, or that pays for an ally's shield."""
    env = standing_protoss()
    env.shield[0, :] = 10
    step = env.step(torch.tensor([[STOP, 0, 0, 0, 0]]))
    assert float(step.reward) == pytest.approx(8 * 0.125 * 20 / 1020)


# ------------------------------------------------------------------------------------ the enemies
def choice(map_name, places, held=-1, hurt=False, dead=None):
    """The ally that the first enemy in `places` decides to attack.

    held: its target until now; dead: an ally that has died in its place.
    """
    env = arena(map_name, places)
    if dead is not None:
        env.health[0, dead] = 0
    enemy = min(unit for unit in places if unit >= env.n_agents)
    env.target = torch.full_like(env.target, held)
    env.unhurt[:] = 8 if hurt else 7  # game loops; whether allies are hurt plays no part
    env.unhurt[:, env.n_agents :] = 7 if hurt else 8
    env.order(torch.full((1, env.n_agents), STOP))
    return int(env.target[0, enemy])


# Two marines: their bodies take 0.75 of the way between their centres
def test_an_enemy_notices_within_4_75():
    """Catches: another distance, or one between centres."""
    assert choice("3m", {0: (10, 10), 3: (10 + 0.75 + 4.7, 10)}) == 0
    assert choice("3m", {0: (10, 10), 3: (10 + 0.75 + 4.8, 10)}) == -1


def test_a_hurt_enemy_notices_within_9():
    """Catches: enemies that ignore who shoots them, or know where everybody is."""
    assert choice("3m", {0: (10, 10), 3: (10 + 0.75 + 8.95, 10)}, hurt=True) == 0
    assert choice("3m", {0: (10, 10), 3: (10 + 0.75 + 9.05, 10)}, hurt=True) == -1


def test_an_enemy_takes_the_closest():
    """Catches: the first, or the last, instead of the closest."""
    assert choice("3m", {0: (10, 10), 1: (11, 10), 2: (9, 10), 3: (13, 10)}) == 1


def test_an_enemy_does_not_notice_the_dead():
    """Catches: enemies that attack corpses, which keeps them from all others."""
    assert choice("3m", {0: (10, 10), 1: (11, 10), 3: (13, 10)}, dead=1) == 0


def test_an_enemy_keeps_its_target_within_5():
    """Catches: enemies that switch to a closer one, or that never let go."""
    places = {0: (10, 10), 1: (13, 10), 3: (10 + 0.75 + 4.95, 10)}
    assert choice("3m", places, held=0) == 0
    places[3] = (10 + 0.75 + 5.05, 10)
    assert choice("3m", places, held=0) == 1
    assert choice("3m", {0: (10, 10), 3: places[3]}, held=0) == -1


def test_an_enemy_keeps_its_own_target():
    """Catches: a leash to another ally (0, who is dead) than the target."""
    assert choice("3m", {1: (10, 10), 2: (13, 10), 3: (10 + 0.75 + 4.95, 10)}, held=1) == 1


def test_an_enemy_lets_go_of_the_dead():
    """Catches: enemies that stay with a target that has died."""
    assert choice("3m", {0: (12.5, 10), 1: (11, 10), 3: (13, 10)}, held=0, dead=0) == 1


def test_enemies_measure_from_edge_to_edge():
    """Catches: a choice between centres. A colossus is wider by 0.5 than a zealot."""
    places = {0: (10, 16), 4: (17.8, 16), 13: (14, 16)}
    assert choice("1c3s5z", places) == 0
    places[4] = (17.4, 16)  # now also closer from edge to edge
    assert choice("1c3s5z", places) == 4


def test_enemies_attack_whom_they_have_noticed():
    """Catches: enemies that walk on to their goal with a target in range."""
    env = arena("3m", {0: (14, 24), 3: (18, 24)})
    env.step(torch.tensor([[STOP, 0, 0]]))
    assert env.health[0, 0] == 39
    assert where(env, 3) == [18, 24]


def test_enemies_walk_to_where_the_allies_started():
    """Catches: enemies that wait, or that walk elsewhere."""
    env = arena("3m", {0: (28, 24), 3: (15, 8)})
    goal, moves = env.order(torch.tensor([[STOP, 0, 0]]))
    assert goal[:, 0, 3].tolist() == [9, 16]
    env.step(torch.tensor([[STOP, 0, 0]]))
    walked = distance((15, 8), (9, 16)) - distance(where(env, 3), (9, 16))
    assert walked == pytest.approx(8 * 3.15 / 22.4, abs=1e-3)


# --------------------------------------------------------------------------- heuristic and drawing
def test_the_heuristic_attacks_the_closest():
    """Catches: another choice, a dead enemy, an action for a dead ally."""
    env = arena("3m", {0: (10, 16), 1: (14.4, 20), 3: (14, 16), 4: (15, 16)})
    move(env, 5, 12, 17)  # dead
    assert env.heuristic().tolist() == [[ATTACK, ATTACK, 0]]


def test_the_heuristic_stays_with_its_enemy_until_it_dies():
    """Catches: a heuristic that switches to a closer one, or attacks the dead."""
    env = arena("3m", {0: (10, 16), 1: (10, 20), 3: (14, 16), 4: (15, 16)})
    env.last_actions = torch.tensor([[ATTACK + 1, ATTACK + 2, 0]])
    assert env.heuristic().tolist() == [[ATTACK + 1, ATTACK, 0]]


@pytest.mark.parametrize(
    "place, action",
    [((6, 17), EAST), ((26, 15), WEST), ((17, 8), NORTH), ((15, 24), SOUTH)],
)
def test_the_heuristic_walks_to_what_is_too_far(place, action):
    """Catches: a way in the wrong direction, or along the shorter side."""
    env = arena("3m", {0: place, 3: (16, 16)})
    assert env.heuristic()[0, 0] == action


def test_the_heuristic_stops_where_its_way_is_blocked():
    """Catches: a move over the border, which is not available."""
    env = arena("3m", {0: (16, 24.5), 3: (22, 30.9)})
    assert env.heuristic()[0, 0] == STOP


@pytest.mark.parametrize("name", MAPS)
def test_the_heuristic_does_only_what_is_available(name):
    """Catches: an action that smac would refuse, in a whole battle."""
    env = Skirmish(name, 8)
    step = env.reset()
    for _ in range(60):
        actions = env.heuristic()
        assert actions.shape == (8, env.n_agents) and actions.dtype == torch.int64
        assert step.avail.gather(2, actions[..., None]).all()
        step = env.step(actions)


def drawn():
    """A picture of battle 1 of two: 3m, an ally and an enemy have shot at each other."""
    figure = pytest.importorskip("matplotlib.figure")
    env = arena("3m", {0: (14, 16), 3: (16, 16), 4: (28, 24)}, n_envs=2)
    env.step(torch.tensor([[ATTACK, 0, 0]] * 2))
    env.health[0] = 0  # in the other battle everybody is dead, and elsewhere
    env.place[:, 0] += 1
    axes = figure.Figure().subplots()
    env.draw(axes, 1)
    return env, axes


def test_a_drawing_shows_the_living_of_its_battle():
    """Catches: a drawing of another battle, or of the dead; x and y swapped."""
    env, axes = drawn()
    places = env.place[:, 1, [0, 3, 4]].T.tolist()
    assert [list(patch.center) for patch in axes.patches] == places
    assert [text.get_text() for text in axes.texts] == ["M", "M", "M"]


def test_a_drawing_tells_sides_and_wounds():
    """Catches: one colour for all, and wounds that do not show."""
    env, axes = drawn()
    blue = "#1f77b4"
    red = "#d62728"
    to_hex = pytest.importorskip("matplotlib.colors").to_hex
    assert [to_hex(patch.get_facecolor()[:3]) for patch in axes.patches] == [blue, red, red]
    hurt, _, whole = [patch.get_alpha() for patch in axes.patches]
    assert whole == 1
    assert hurt == pytest.approx(0.2 + 0.8 * 39 / 45)


def test_a_drawing_shows_the_shots_of_the_last_step():
    """Catches: shots that are missing, old, or drawn from or to another unit."""
    env, axes = drawn()
    assert [line.get_color() for line in axes.lines] == ["tab:blue", "tab:red"]
    there = env.place[:, 1, [0, 3]].T.tolist()
    assert axes.lines[0].get_xydata().tolist() == there
    assert axes.lines[1].get_xydata().tolist() == there[::-1]
    env.step(torch.tensor([[STOP, 0, 0]] * 2))  # now the enemy alone shoots
    axes.clear()
    env.draw(axes, 1)
    assert [line.get_color() for line in axes.lines] == ["tab:red"]
