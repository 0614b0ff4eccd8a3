"""Tests of extras/adapters.py: on small games written here, and on the real packages if installed.

An oracle is a vector written out by hand, or the bare environment played with the same actions.
"""

import os
import sys
import types

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")

from gymnasium import spaces  # noqa: E402

import envs  # noqa: E402
from extras import adapters  # noqa: E402

FLOAT32_MAX = np.finfo(np.float32).max
ONE = spaces.Box(-np.inf, np.inf, (1,))  # a number without bounds


def message(make, *given, **arguments) -> str:
    """The one line of the UsageError that make() raises."""
    with pytest.raises(envs.UsageError) as caught:
        make(*given, **arguments)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


# ------------------------------------------------------------------------ PettingZoo, small games
class Game:
    """A parallel environment of agents a and b. `script`: who is terminated, truncated at a step.

    An agent observes its number (a 1, b 2) and the steps so far; it is rewarded with its number.
    """

    possible_agents = ["a", "b"]
    observation = {"a": spaces.Box(-np.inf, np.inf, (2,)), "b": spaces.Box(-np.inf, np.inf, (2,))}
    action = {"a": spaces.Discrete(2), "b": spaces.Discrete(2)}
    max_cycles = 100
    keeps_agents = False  # agents that have ended stay in `agents`

    def __init__(self, script=()):
        self.script = script
        self.seeds = []
        self.played = []

    def observation_space(self, agent):
        return self.observation[agent]

    def action_space(self, agent):
        return self.action[agent]

    def look(self, agent):
        return np.array([self.possible_agents.index(agent) + 1, self.steps], np.float32)

    def info(self, agent):
        return {}

    def reset(self, seed=None):
        self.seeds.append(seed)
        self.steps = 0
        self.agents = list(self.possible_agents)
        return self.looks(), {agent: self.info(agent) for agent in self.agents}

    def looks(self):
        return {agent: self.look(agent) for agent in self.agents}

    def step(self, actions):
        self.played.append(actions)
        terminated = ""
        truncated = ""
        if self.steps < len(self.script):
            terminated, truncated = self.script[self.steps]
        self.steps += 1
        obs = self.looks()
        rewards = {agent: float(self.possible_agents.index(agent) + 1) for agent in self.agents}
        infos = {agent: self.info(agent) for agent in self.agents}
        ended = {agent: agent in terminated for agent in self.agents}
        cut = {agent: agent in truncated for agent in self.agents}
        if not self.keeps_agents:
            self.agents = [a for a in self.agents if not ended[a] and not cut[a]]
        return obs, rewards, ended, cut, infos

    def render(self):
        return None

    def close(self):
        pass


@pytest.fixture
def play(monkeypatch):
    """play(Game, ...) -> the adapter of this game."""

    def make(game, **arguments):
        module = types.ModuleType("small_game")
        module.parallel_env = game
        monkeypatch.setitem(sys.modules, "small_game", module)
        return adapters.PettingZoo(env="small_game", seed=7, **arguments)

    return make


def watching(space, value):
    """A game whose agent a observes this value."""

    class Watching(Game):
        observation = {"a": space, "b": ONE}

        def look(self, agent):
            return value if agent == "a" else np.zeros(1)

    return Watching


VALUES = {
    "Discrete": (spaces.Discrete(3), 1, [0, 1, 0]),
    "Discrete from 5": (spaces.Discrete(3, start=5), 7, [0, 0, 1]),
    "MultiBinary": (spaces.MultiBinary(3), np.array([1, 0, 1]), [1, 0, 1]),
    "MultiDiscrete": (spaces.MultiDiscrete([2, 3]), np.array([1, 0]), [0, 1, 1, 0, 0]),
    "a picture": (spaces.Box(0, 255, (1, 2, 1), np.uint8), np.array([[[0], [51]]]), [0, 0.2]),
    "Tuple": (
        spaces.Tuple((spaces.Discrete(2), spaces.Box(-4, 4, (2,)))),
        (1, np.array([-4.0, 2.0])),
        [0, 1, 0, 0.75],
    ),
    "Dict": (
        spaces.Dict({"x": spaces.Box(0, 10, (1,)), "a": spaces.MultiBinary(2)}),
        {"x": np.array([5.0]), "a": np.array([0, 1])},
        [0, 1, 0.5],
    ),
    "Tuple in Dict": (
        spaces.Dict({"x": spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 4, (1,))))}),
        {"x": (0, np.array([1.0]))},
        [1, 0, 0.25],
    ),
}


@pytest.mark.parametrize("kind", VALUES)
def test_pettingzoo_an_observation_is_encoded_as_its_space_says(play, kind):
    """Catches: numbers of categories taken as sizes, a Tuple or Dict that is not joined."""
    space, value, expected = VALUES[kind]
    env = play(watching(space, value))
    assert env.get_env_info()["obs_shape"] == len(expected)
    env.reset()
    assert np.allclose(env.get_obs()[0], expected)
    assert env.get_obs().dtype == np.float32


@pytest.mark.parametrize("kind", VALUES)
def test_gymnasium_an_observation_is_encoded_as_its_space_says(make, kind):
    """Catches: the same in the other adapter."""
    space, value, expected = VALUES[kind]
    env = make(observation_space=spaces.Tuple((space, ONE)), looks=(value, np.zeros(1)))
    assert env.get_env_info()["obs_shape"] == len(expected)
    env.reset()
    assert np.allclose(env.get_obs()[0], expected)
    assert env.get_obs().dtype == np.float32


BOUNDS = {
    "from 0": ([0], [8], [2], [0.25]),
    "from below 0": ([-8], [8], [-8], [0]),
    "far from 0": ([1000], [1010], [1010], [1]),
    "to a million": ([0], [1e6], [1e6], [1]),
    "without": ([-np.inf], [np.inf], [-30], [-30]),
    "above alone": ([-np.inf], [8], [-30], [-30]),
    "below alone": ([-8], [np.inf], [30], [30]),
    "all of float32": ([-FLOAT32_MAX], [FLOAT32_MAX], [30], [30]),
    "huge above": ([0], [1e9], [30], [30]),
    "huge below": ([-1e9], [0], [-30], [-30]),
    "equal": ([3], [3], [3], [0]),
    "equal, and huge": ([1e9], [1e9], [1e9], [1e9]),
    "each its own": ([0, -np.inf], [10, 0], [5, -7], [0.5, -7]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", BOUNDS)
def test_pettingzoo_numbers_with_bounds_are_scaled_to_0_to_1(play, kind):
    """Catches: pictures of 0 to 255, a division by zero or by infinity, bounds that are none."""
    low, high, value, expected = BOUNDS[kind]
    space = spaces.Box(np.array(low, np.float32), np.array(high, np.float32))
    env = play(watching(space, np.array(value, np.float32)))
    env.reset()
    assert np.allclose(env.get_obs()[0, : len(expected)], expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint8, np.int64])
def test_pettingzoo_the_range_of_a_small_number_type_does_not_overflow(play, dtype):
    """Catches: 100 - (-100) in int8, 60000 - (-60000) in float16."""
    least = -100
    most = 100
    if dtype == np.float16:
        least = -60000
        most = 60000
    if dtype == np.uint8:
        least = 0
        most = 255
    space = spaces.Box(least, most, (2,), dtype)
    env = play(watching(space, np.array([least, most], dtype)))
    env.reset()
    assert env.get_obs()[0].tolist() == [0, 1]


def test_pettingzoo_a_small_number_type_without_bounds_is_not_scaled(play):
    """Catches: a million that becomes infinity in float16, and infinity a bound."""
    space = spaces.Box(0, np.inf, (2,), np.float16)
    env = play(watching(space, np.array([0, 30], np.float16)))
    env.reset()
    assert env.get_obs()[0].tolist() == [0, 30]


REFUSED = {
    "Text": spaces.Text(5),
    "Graph": spaces.Graph(ONE, None),
    "Sequence": spaces.Sequence(ONE),
    "OneOf": spaces.OneOf((spaces.Discrete(2), spaces.Discrete(3))),
    "Text in a Dict": spaces.Dict({"x": ONE, "y": spaces.Text(5)}),
    "Sequence in a Tuple": spaces.Tuple((ONE, spaces.Sequence(ONE))),
    "none of gymnasium's": types.SimpleNamespace(shape=(3,), low=0, high=1),
    "None": None,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_pettingzoo_a_space_without_a_fixed_vector_is_refused(play, kind):
    """Catches: text taken for numbers, a traceback from the middle of a run."""
    text = message(play, watching(REFUSED[kind], None))
    named = kind.split()[0].replace("none", "namespace")
    assert "small_game" in text and named in text.split("not")[-1]


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind[0] in "TGSO"])
def test_gymnasium_a_space_without_a_fixed_vector_is_refused(make, kind):
    """Catches: the same in the other adapter."""
    text = message(make, observation_space=spaces.Tuple((ONE, REFUSED[kind])))
    assert "Small-v0" in text and kind.split()[0] in text.split("not")[-1]


def test_a_refused_space_of_many_lines_is_told_in_one(play):
    """Catches: an error that is cut off after its first line."""

    class Long(Game):
        action = {"a": spaces.Box(np.arange(50.0), np.arange(50.0) + 0.5, dtype=float), "b": ONE}

    assert "49.5" in message(play, Long)


@pytest.mark.parametrize("size", [1, 3])
def test_pettingzoo_an_observation_that_does_not_fit_its_space_is_refused(play, size):
    """Catches: one number copied into the whole row."""
    env = play(watching(spaces.Box(0, 1, (2,)), np.ones(size)))
    env.reset()
    assert str(size) in message(env.get_obs)


def test_pettingzoo_an_agent_that_comes_later_has_its_row(play):
    """Catches: widths measured at the first reset, when the agent with the widest was not there."""

    class Late(Game):
        observation = {"a": ONE, "b": spaces.Box(-np.inf, np.inf, (3,))}

        def look(self, agent):
            return np.ones(len(self.observation[agent].low))

        def reset(self, seed=None):
            super().reset(seed)
            self.agents = ["a"]
            return self.looks(), {"a": {}}

        def step(self, actions):
            if self.steps == 1:
                self.agents = ["a", "b"]
            return super().step(actions)

    env = play(Late)
    assert (env.get_env_info()["n_agents"], env.get_env_info()["obs_shape"]) == (2, 3)
    env.reset()
    assert env.get_obs().tolist() == [[1, 0, 0], [0, 0, 0]]
    assert env.get_avail_actions().tolist() == [[1, 1], [1, 0]]
    env.step([0, 0])
    assert env.get_obs().tolist() == [[1, 0, 0], [0, 0, 0]]
    env.step([0, 0])
    assert env.get_obs().tolist() == [[1, 0, 0], [1, 1, 1]]
    assert env.get_avail_actions().tolist() == [[1, 1], [1, 1]]
    env.step([1, 1])
    assert env.env.played == [{"a": 0}, {"a": 0}, {"a": 1, "b": 1}]


class Masked(Game):
    """The mask is part of the observation."""

    observed = spaces.Dict({"observation": ONE, "action_mask": spaces.Box(0, 1, (2,), np.int8)})
    observation = {"a": observed, "b": observed}

    def look(self, agent):
        return {"observation": np.full(1, 5.0), "action_mask": np.array([0, 1], np.int8)}


def test_pettingzoo_a_mask_is_not_part_of_the_observation(play):
    """Catches: the network sees the mask, the width counts it."""
    env = play(Masked)
    env.reset()
    assert env.get_env_info()["obs_shape"] == 1
    assert env.get_obs().tolist() == [[5], [5]]


def test_pettingzoo_a_mask_beside_the_observation_is_used(play):
    """Catches: an action that is not allowed counts as allowed."""
    env = play(Masked)
    env.reset()
    assert env.get_avail_actions().tolist() == [[0, 1], [0, 1]]


def test_pettingzoo_a_mask_in_the_info_is_used(play):
    """Catches: the same where the info has it, also after a step."""

    class InInfo(Game):
        def info(self, agent):
            return {"action_mask": np.array([self.steps == 0, 1])} if agent == "b" else {}

    env = play(InInfo)
    env.reset()
    assert env.get_avail_actions().tolist() == [[1, 1], [1, 1]]
    env.step([0, 0])
    assert env.get_avail_actions().tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("kind", ["Discrete", "Dict", "a picture"])
def test_pettingzoo_without_a_mask_every_action_is_allowed(play, kind):
    """Catches: a mask looked for in a number, in a Dict that has none, in an info that is not."""

    class NoInfo(watching(*VALUES[kind][:2])):
        def reset(self, seed=None):
            return super().reset(seed)[0], {}

    env = play(NoInfo)
    env.reset()
    assert env.get_avail_actions().tolist() == [[1, 1], [1, 1]]


def test_pettingzoo_unlike_numbers_of_actions_are_masked(play):
    """Catches: an agent that plays an action which only another one has."""

    class Unlike(Game):
        action = {"a": spaces.Discrete(3), "b": spaces.Discrete(1)}

    env = play(Unlike)
    env.reset()
    assert env.get_env_info()["n_actions"] == 3
    assert env.get_avail_actions().tolist() == [[1, 1, 1], [1, 0, 0]]


def test_pettingzoo_actions_are_counted_from_the_start_of_their_space(play):
    """Catches: Discrete(2, start=1) played with 0 and 1."""

    class Started(Game):
        action = {"a": spaces.Discrete(2, start=1), "b": spaces.Discrete(2, start=-1)}

    env = play(Started)
    env.reset()
    env.step([0, 1])
    assert env.env.played == [{"a": 1, "b": 0}]
    assert all(type(action) is int for action in env.env.played[0].values())


@pytest.mark.parametrize("space", [spaces.Box(0, 1, (2,)), spaces.MultiDiscrete([2, 2]), None])
def test_actions_that_are_not_discrete_are_refused(play, make, space):
    """Catches: a traceback about a missing `n`."""

    class Continuous(Game):
        action = {"a": spaces.Discrete(2), "b": space}

    assert "small_game" in message(play, Continuous)
    if space is not None:
        assert "Discrete" in message(make, action_space=spaces.Tuple((space, space)))


class Stateful(Game):
    state_space = spaces.Box(0, 4, (1, 3))

    def state(self):
        return np.array([[1, 2, 4]])


def test_pettingzoo_the_state_is_the_environments_own_and_scaled(play):
    """Catches: observations passed off as the state; a state that is not scaled, or not flat."""
    env = play(Stateful)
    assert env.get_env_info()["state_shape"] == 3
    env.reset()
    assert env.get_state().tolist() == [0.25, 0.5, 1]
    assert env.get_state().dtype == np.float32


def test_pettingzoo_without_a_state_the_observations_stand_in(play):
    """Catches: a crash where state() raises NotImplementedError; a size that does not fit."""

    class Stateless(Game):
        state_space = None

        def state(self):
            raise NotImplementedError

    env = play(Stateless)
    env.reset()
    assert env.get_state().tolist() == [1, 0, 2, 0]
    assert env.get_env_info()["state_shape"] == 4


# who is terminated, truncated at each step -> is it over, is it a time limit, who has a row then
ENDS = {
    "all terminated": ([("ab", "")], True, False, ""),
    "all truncated": ([("", "ab")], True, True, "ab"),
    "one terminated, the other truncated": ([("a", "b")], True, True, "b"),
    "both at once for everybody": ([("ab", "ab")], True, False, ""),
    "one terminated": ([("a", "")], False, False, "b"),
    "one truncated": ([("", "a")], False, False, "b"),
    "one terminated, later the other": ([("a", ""), ("b", "")], True, False, ""),
    "one terminated, later the other truncated": ([("a", ""), ("", "b")], True, True, "b"),
    "one truncated, later the other": ([("", "a"), ("", "b")], True, True, "b"),
    "one truncated, later the other terminated": ([("", "a"), ("b", "a")], True, False, ""),
    "nobody": ([("", "")], False, False, "ab"),
}


@pytest.mark.parametrize("keeps_agents", [False, True])
@pytest.mark.parametrize("kind", ENDS)
def test_pettingzoo_an_end_is_told_from_a_time_limit(play, monkeypatch, kind, keeps_agents):
    """Catches: a time limit learned as an end, an end taken for a time limit, an end too early."""
    monkeypatch.setattr(Game, "keeps_agents", keeps_agents)
    script, over, late, rows = ENDS[kind]
    env = play(Game, script=script)
    env.reset()
    for _ in script[:-1]:
        assert env.step([0, 0])[1:] == (False, {"episode_limit": False})
    assert env.step([0, 0])[1:] == (over, {"episode_limit": late})
    present = env.get_obs().any(1).tolist()
    assert present == ["a" in rows, "b" in rows]


def test_pettingzoo_who_has_ended_does_not_come_back(play, monkeypatch):
    """Catches: an agent that is still listed, and not flagged again, plays on."""
    monkeypatch.setattr(Game, "keeps_agents", True)
    env = play(Game, script=[("a", ""), ("", "")])
    env.reset()
    env.step([0, 0])
    env.step([0, 0])
    assert env.get_obs().any(1).tolist() == [False, True]


def test_pettingzoo_a_new_episode_begins_with_everybody(play):
    """Catches: who died in one episode is dead in the next."""
    env = play(Game, script=[("", ""), ("a", ""), ("b", "")])
    for _ in range(2):
        env.reset()
        assert env.get_obs().any(1).tolist() == [True, True]
        assert not env.step([0, 0])[1]
        assert env.get_obs().any(1).tolist() == [True, True]
        assert not env.step([0, 0])[1]
        assert env.step([0, 0])[1]


def test_pettingzoo_the_dead_see_zeros_and_do_not_play(play):
    """Catches: an observation of the dead, a free choice of action, an action that is played."""
    env = play(Game, script=[("a", "")])
    env.reset()
    env.step([1, 1])
    assert env.get_obs().tolist() == [[0, 0], [2, 1]]
    assert env.get_state().tolist() == [0, 0, 2, 1]
    assert env.get_avail_actions().tolist() == [[1, 0], [1, 1]]
    reward, over, _ = env.step([0, 1])
    assert env.env.played == [{"a": 1, "b": 1}, {"b": 1}]
    assert (reward, over) == (2, False)


def test_pettingzoo_the_reward_is_the_sum_over_agents(play):
    """Catches: a mean, the first agent's alone, that of the one who dies in this step left out."""
    env = play(Game, script=[("a", "")])
    env.reset()
    assert env.step([0, 0])[0] == 3


def test_pettingzoo_the_last_step_of_a_time_limit_keeps_observations_and_masks(play):
    """Catches: zeros where the target looks for the value behind a time limit."""
    env = play(Game, script=[("", "ab")])
    env.reset()
    env.step([0, 0])
    assert env.get_obs().tolist() == [[1, 1], [2, 1]]
    assert env.get_avail_actions().tolist() == [[1, 1], [1, 1]]


def test_pettingzoo_only_the_first_reset_gets_the_seed(play):
    """Catches: a seed that is never used; the same episode again and again."""
    env = play(Game)
    env.reset()
    env.reset()
    assert env.env.seeds == [7, None]


def test_pettingzoo_the_limit_that_is_given_decides_and_is_a_time_limit(play):
    """Catches: max_cycles before the user's limit, an end that comes a step late or early."""
    env = play(Game, episode_limit=3)
    assert env.get_env_info()["episode_limit"] == 3
    for _ in range(2):  # the second episode counts from 0 again
        env.reset()
        ends = [env.step([0, 0])[1:] for _ in range(3)]
        assert ends == [
            (False, {"episode_limit": False}),
            (False, {"episode_limit": False}),
            (True, {"episode_limit": True}),
        ]
        assert env.get_obs().any(1).all()


def test_pettingzoo_a_real_end_in_the_last_step_stays_one(play):
    """Catches: a real end that is learned as a time limit."""
    env = play(Game, script=[("", ""), ("ab", "")], episode_limit=2)
    env.reset()
    env.step([0, 0])
    assert env.step([0, 0])[1:] == (True, {"episode_limit": False})


def test_pettingzoo_the_environments_end_comes_before_a_longer_limit(play):
    """Catches: an episode that goes on behind its end."""
    env = play(Game, script=[("", "ab")], episode_limit=1000)
    env.reset()
    assert env.step([0, 0])[1:] == (True, {"episode_limit": True})


def test_pettingzoo_max_cycles_is_the_limit(play):
    """Catches: the attribute, or the argument of an environment that keeps it elsewhere, unread."""

    class Elsewhere(Game):
        max_cycles = None

        def __init__(self, max_cycles):
            super().__init__()

    assert play(Game).get_env_info()["episode_limit"] == 100
    assert play(Elsewhere, max_cycles=9).get_env_info()["episode_limit"] == 9


def test_pettingzoo_max_cycles_of_the_inner_environment_is_the_limit(play):
    """Catches: a wrapper that hides the attribute."""

    class Wrapper(Game):
        max_cycles = None
        unwrapped = types.SimpleNamespace(max_cycles=8)

    assert play(Wrapper).get_env_info()["episode_limit"] == 8


@pytest.mark.parametrize("value", [None, np.inf, -1, 0, True, 2.5, "many", Game.reset])
def test_pettingzoo_without_a_limit_it_is_asked_for(play, monkeypatch, value):
    """Catches: an endless episode, True as one step, other attributes taken for the limit."""
    monkeypatch.setattr(Game, "max_cycles", value)
    monkeypatch.setattr(Game, "max_steps", 4, raising=False)
    monkeypatch.setattr(Game, "_max_episode_steps", 4, raising=False)
    text = message(play, Game)
    assert "small_game" in text and "--env-args episode_limit=" in text
    assert play(Game, episode_limit=6).get_env_info()["episode_limit"] == 6


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many"])
def test_a_limit_that_is_none_is_refused(play, make, value):
    """Catches: the environment's own limit in place of a wrong one, in silence; a crash later."""
    assert str(value) in message(play, Game, episode_limit=value)
    message(make, episode_limit=value)


def test_pettingzoo_turn_based_modules_are_refused(monkeypatch):
    """Catches: a traceback about a missing attribute."""
    module = types.ModuleType("turns")
    module.env = Game
    monkeypatch.setitem(sys.modules, "turns", module)
    text = message(adapters.PettingZoo, env="turns", seed=0)
    assert "turns" in text and "parallel_env" in text


def test_a_module_that_is_not_there_is_told():
    """Catches: a traceback of the import."""
    assert "no_such_module" in message(adapters.PettingZoo, env="no_such_module", seed=0)
    assert "no_such_module" in message(adapters.Gymnasium, env="no_such_module:X-v0", seed=0)
    assert "NoSuchGame" in message(adapters.Gymnasium, env="NoSuchGame-v0", seed=0)


def test_a_misspelt_argument_is_named(play, make):
    """Catches: an argument that is ignored, or a traceback."""
    assert "scirpt" in message(play, Game, scirpt=())
    assert "loks" in message(make, loks=())


@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_a_wrong_value_of_an_argument_is_told(play, make, error):
    """Catches: a traceback of the environment's own check."""

    def checked(**arguments):
        raise error("local_ratio is a proportion\nof one")

    assert "local_ratio" in message(play, checked)
    assert "local_ratio" in message(make, entry_point=checked)


def test_pettingzoo_a_picture_is_handed_on_or_asked_for(play):
    """Catches: an error from the drawing that does not say what to do."""

    class Drawn(Game):
        def render(self):
            return np.zeros((4, 5, 3), np.uint8)

    assert play(Drawn).render().shape == (4, 5, 3)
    assert "render_mode=rgb_array" in message(play(Game).render)


# ------------------------------------------------------------------------- Gymnasium, small games
class Small(gymnasium.Env):
    """Two agents. At `own_limit` it says `terminated`, as LBF and RWARE do."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        observation_space=None,
        action_space=None,
        looks=None,
        end=(),
        own_limit=None,
        attribute="max_steps",
        render_mode=None,
    ):
        self.observation_space = observation_space or spaces.Tuple((ONE, ONE))
        self.action_space = action_space or spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2)))
        self.looks = looks
        self.end = end  # of each step: (terminated, truncated)
        self.attribute = attribute
        setattr(self, attribute, own_limit)
        self.render_mode = render_mode
        self.seeds = []
        self.played = []

    def look(self):
        return self.looks or (np.full(1, self.steps), np.full(1, -self.steps))

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.steps = 0
        return self.look(), {}

    def step(self, actions):
        self.played.append(actions)
        terminated = False
        truncated = False
        if self.steps < len(self.end):
            terminated, truncated = self.end[self.steps]
        self.steps += 1
        limit = getattr(self, self.attribute)
        if isinstance(limit, int) and limit > 0 and self.steps >= limit:
            terminated = True
        return self.look(), [1.0, 2.0], terminated, truncated, {}

    def render(self):
        if self.render_mode == "rgb_array":
            return np.zeros((4, 5, 3), np.uint8)


@pytest.fixture
def make():
    """make(...) -> the adapter of Small, registered with a limit of 100 steps, or as told."""

    def made(registered=100, entry_point=Small, **arguments):
        gymnasium.registry.pop("Small-v0", None)
        gymnasium.register("Small-v0", entry_point, max_episode_steps=registered)
        return adapters.Gymnasium(env="Small-v0", seed=7, **arguments)

    yield made
    gymnasium.registry.pop("Small-v0", None)


def ends(env, steps) -> list:
    """What an episode says at each step: over, time limit."""
    env.reset()
    said = [env.step([0, 0])[1:] for _ in range(steps)]
    return [(over, info["episode_limit"]) for over, info in said]


GOES_ON = (False, False)
TASK_ENDS = (True, False)
TIME_IS_UP = (True, True)


@pytest.mark.parametrize("attribute", ["max_steps", "_max_episode_steps"])
def test_gymnasium_an_end_at_the_environments_own_limit_is_a_time_limit(make, attribute):
    """Catches: a time limit learned as an end, where an environment says so (LBF, RWARE)."""
    env = make(registered=None, own_limit=3, attribute=attribute)
    assert env.get_env_info()["episode_limit"] == 3
    for _ in range(2):
        assert ends(env, 3) == [GOES_ON, GOES_ON, TIME_IS_UP]


def test_gymnasium_a_real_end_in_the_last_step_stays_one(make):
    """Catches: a real end that is learned as a time limit."""
    env = make(registered=None, own_limit=2, end=[(False, False), (True, False)])
    assert ends(env, 2) == [GOES_ON, TASK_ENDS]


def test_gymnasium_a_real_end_before_the_limit_ends(make):
    """Catches: an end lifted together with the limit."""
    assert ends(make(own_limit=5, end=[(True, False)]), 1) == [TASK_ENDS]


def test_gymnasium_the_registered_limit_is_a_time_limit(make):
    """Catches: gymnasium's TimeLimit lost together with its wrapper."""
    env = make(registered=2)
    assert env.get_env_info()["episode_limit"] == 2
    assert ends(env, 2) == [GOES_ON, TIME_IS_UP]


def test_gymnasium_the_smaller_of_two_limits_counts(make):
    """Catches: episodes longer than the environment itself plays them."""
    assert make(registered=9, own_limit=4).get_env_info()["episode_limit"] == 4
    assert make(registered=4, own_limit=9).get_env_info()["episode_limit"] == 4


@pytest.mark.parametrize("limits", [{"registered": 2}, {"own_limit": 2}, {"registered": 9}])
def test_gymnasium_the_limit_that_is_given_decides(make, limits):
    """Catches: a limit that can be shortened but not lengthened, or the other way round."""
    env = make(episode_limit=4, **limits)
    assert env.get_env_info()["episode_limit"] == 4
    assert ends(env, 4) == [GOES_ON, GOES_ON, GOES_ON, TIME_IS_UP]


@pytest.mark.parametrize("value", [None, 0, -1, True, np.inf, 2.5])
def test_gymnasium_without_a_limit_it_is_asked_for(make, value):
    """Catches: an endless episode."""
    text = message(make, registered=None, own_limit=value)
    assert "Small-v0" in text and "--env-args episode_limit=" in text
    assert make(registered=None, own_limit=value, episode_limit=3) is not None


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (([True, False], [False, False]), GOES_ON),
        (([True, True], [False, False]), TASK_ENDS),
        (([False, False], [True, True]), TIME_IS_UP),
        (([True, False], [False, True]), TIME_IS_UP),
        (([False, False], [True, False]), GOES_ON),
        ((True, True), TASK_ENDS),
        ((False, True), TIME_IS_UP),
    ],
)
def test_gymnasium_an_end_is_told_from_a_time_limit(make, end, expected):
    """Catches: the end of one agent taken for the end of all; `truncated` taken for an end."""
    assert ends(make(end=[end]), 1) == [expected]


def test_gymnasium_the_answers_are_plain_numbers(make):
    """Catches: NumPy's bools, which are not `True`, in what a step returns."""
    env = make(end=[([True, True], [False, False])])
    env.reset()
    reward, over, info = env.step([0, 0])
    assert (reward, over, info["episode_limit"]) == (3.0, True, False)
    assert [type(each) for each in (reward, over, info["episode_limit"])] == [float, bool, bool]


def test_gymnasium_actions_are_masked_and_counted_from_the_start_of_their_space(make):
    """Catches: Discrete(2, start=1) played with 0 and 1, an action that only another agent has."""
    space = spaces.Tuple((spaces.Discrete(2, start=1), spaces.Discrete(3)))
    env = make(action_space=space)
    env.reset()
    assert env.get_env_info()["n_actions"] == 3
    assert env.get_avail_actions().tolist() == [[1, 1, 0], [1, 1, 1]]
    env.step([1, 2])
    assert env.env.unwrapped.played == [(2, 2)]


def test_gymnasium_rows_are_filled_up_and_joined_as_the_state(make):
    """Catches: rows of unlike widths; a state whose size is not the one that is told."""
    wide = spaces.Box(-np.inf, np.inf, (3,))
    env = make(observation_space=spaces.Tuple((ONE, wide)), looks=(np.ones(1), np.full(3, 2.0)))
    env.reset()
    assert env.get_obs().tolist() == [[1, 0, 0], [2, 2, 2]]
    assert env.get_state().tolist() == [1, 0, 0, 2, 2, 2]
    assert env.get_env_info()["state_shape"] == 6
    assert env.get_env_info()["n_agents"] == 2


@pytest.mark.parametrize("which", ["observation_space", "action_space"])
def test_gymnasium_an_environment_of_one_agent_is_refused(make, which):
    """Catches: a traceback that speaks of iteration."""
    text = message(make, **{which: spaces.Discrete(2)})
    assert "Tuple" in text and "Discrete(2)" in text


def test_gymnasium_only_the_first_reset_gets_the_seed(make):
    """Catches: a seed that is never used; the same episode again and again."""
    env = make()
    env.reset()
    env.reset()
    assert env.env.unwrapped.seeds == [7, None]


def test_gymnasium_wrappers_of_the_registration_stay(make):
    """Catches: unwrapping, which drops what the environment was registered with."""

    class Tripled(gymnasium.Wrapper):
        def step(self, actions):
            obs, rewards, *rest = self.env.step(actions)
            return obs, [3 * reward for reward in rewards], *rest

    def entry_point(**arguments):
        return Tripled(Small(**arguments))

    env = make(entry_point=entry_point)
    env.reset()
    assert env.step([0, 0])[0] == 9


def test_gymnasium_a_picture_is_handed_on_or_asked_for(make):
    """Catches: an error from the drawing that does not say what to do."""
    env = make(render_mode="rgb_array")
    env.reset()
    assert env.render().shape == (4, 5, 3)
    env = make()
    env.reset()
    assert "render_mode=rgb_array" in message(env.render)


def test_gymnasium_the_older_way_to_draw_is_used(make, monkeypatch):
    """Catches: LBF and RWARE, whose render() takes a mode, opening a window; needing a display."""

    class Older(Small):
        def render(self, mode="human"):
            if mode == "rgb_array" and os.environ["PYGLET_HEADLESS"] == "true":
                return np.zeros((4, 5, 3), np.uint8)

    monkeypatch.setenv("PYGLET_HEADLESS", "")  # so that it is as before after the test
    monkeypatch.delenv("PYGLET_HEADLESS")
    monkeypatch.setattr(sys, "platform", "linux")
    env = make(entry_point=Older)
    env.reset()
    assert env.render().shape == (4, 5, 3)


def test_close_closes_the_environment(play, make, monkeypatch):
    """Catches: windows and processes of the environment that are left behind."""
    closed = []
    monkeypatch.setattr(Game, "close", lambda game: closed.append("PettingZoo"))
    monkeypatch.setattr(Small, "close", lambda game: closed.append("Gymnasium"))
    play(Game).close()
    make().close()
    assert closed == ["PettingZoo", "Gymnasium"]


# -------------------------------------------------------------------------------- the real packages
@pytest.mark.parametrize("name", ["mpe2.simple_spread_v3", "mpe2.simple_speaker_listener_v4"])
def test_mpe2_plays_as_the_bare_environment(name):
    """Catches: another reward, observation, state, end or order of agents than the bare one's."""
    module = pytest.importorskip(name)
    env = adapters.PettingZoo(env=name, seed=3)
    bare = module.parallel_env()
    env.reset()
    seen, _ = bare.reset(seed=3)
    rng = np.random.default_rng(0)
    for t in range(1, 26):
        rows = env.get_obs()
        for row, agent in zip(rows, bare.possible_agents):
            assert np.array_equal(row[: len(seen[agent])], seen[agent])
            assert not row[len(seen[agent]) :].any()
        assert np.array_equal(env.get_state(), bare.state())
        actions = [rng.choice(np.flatnonzero(mask)).item() for mask in env.get_avail_actions()]
        seen, rewards, _, cut, _ = bare.step(dict(zip(bare.possible_agents, actions)))
        reward, over, info = env.step(actions)
        assert reward == pytest.approx(sum(rewards.values()))
        assert over == info["episode_limit"] == all(cut.values()) == (t == 25)


def test_mpe2_draws():
    """Catches: --record without a picture."""
    pytest.importorskip("mpe2")
    env = adapters.PettingZoo(env="mpe2.simple_spread_v3", seed=0, render_mode="rgb_array")
    env.reset()
    picture = env.render()
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8


def test_pettingzoo_rock_paper_scissors_is_one_hot():
    """Catches: a real environment with Discrete observations, and without a state."""
    pytest.importorskip("pettingzoo.classic.rps_v2")
    env = adapters.PettingZoo(env="pettingzoo.classic.rps_v2", seed=0)
    env.reset()
    assert env.get_obs().tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]  # nobody has chosen yet
    env.step([0, 2])
    assert env.get_obs().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]  # what the other one chose


def test_pettingzoo_tic_tac_toe_takes_turns():
    """Catches: a real turn-based environment."""
    pytest.importorskip("pettingzoo.classic.tictactoe_v3")
    text = message(adapters.PettingZoo, env="pettingzoo.classic.tictactoe_v3", seed=0)
    assert "parallel_env" in text


FORAGING = "lbforaging:Foraging-5x5-2p-1f-v3"


def forage(seed: int, **arguments):
    """An episode of random actions, beside the bare environment.

    Returns its length, whether it ended by a time limit, and whether all food was eaten.
    """
    env = adapters.Gymnasium(env=FORAGING, seed=seed, **arguments)
    bare = gymnasium.make(FORAGING, disable_env_checker=True).unwrapped
    bare._max_episode_steps = arguments.get("episode_limit", 50)
    env.reset()
    seen, _ = bare.reset(seed=seed)
    rng = np.random.default_rng(seed)
    low = bare.observation_space[0].low
    high = bare.observation_space[0].high
    over = False
    while not over:
        assert np.allclose(env.get_obs(), (np.stack(seen) - low) / (high - low))
        actions = rng.integers(6, size=2).tolist()
        seen, rewards, ended, _, _ = bare.step(actions)
        reward, over, info = env.step(actions)
        assert reward == pytest.approx(sum(rewards))
        assert over == ended
    return bare.current_step, info["episode_limit"], not bare.field.any()


@pytest.fixture(scope="module")
def foraged():
    pytest.importorskip("lbforaging")
    return [forage(seed) for seed in range(60)]


def test_lbforaging_plays_as_the_bare_environment_and_tells_ends_from_limits(foraged):
    """Catches: LBF's `terminated` at its own limit learned as an end, and the other way round."""
    late = [(length, eaten) for length, limit, eaten in foraged if limit]
    ended = [(length, eaten) for length, limit, eaten in foraged if not limit]
    assert len(late) >= 5 and set(late) == {(50, False)}
    assert len(ended) >= 5 and all(eaten for _, eaten in ended)


def test_lbforaging_an_end_in_the_very_last_step_is_an_end(foraged):
    """Catches: food that is eaten in the last step, learned as a time limit."""
    seeds = [seed for seed in range(60) if foraged[seed][2] and foraged[seed][0] < 50]
    for seed in seeds[:5]:
        length = foraged[seed][0]
        assert forage(seed, episode_limit=length) == (length, False, True)
        if length > 1:
            assert forage(seed, episode_limit=length - 1) == (length - 1, True, False)


def test_lbforaging_plays_longer_than_its_own_limit_if_told(foraged):
    """Catches: an episode that ends at LBF's 50 steps though more are allowed."""
    seed = [limit for _, limit, _ in foraged].index(True)
    length, _, _ = forage(seed, episode_limit=120)
    assert length > 50


@pytest.mark.parametrize(
    ("given", "length", "late"),
    [
        ({"max_steps": 20}, 20, True),
        ({"max_inactivity_steps": 10}, 10, False),
        ({"max_steps": 20, "max_inactivity_steps": 20}, 20, False),
        ({"episode_limit": 15}, 15, True),
        ({}, 500, True),
    ],
)
def test_rware_plays_as_the_bare_environment_and_tells_ends_from_limits(given, length, late):
    """Catches: RWARE's `terminated` at its own limit learned as an end, and the other way round."""
    pytest.importorskip("rware")
    name = "rware:rware-tiny-2ag-v2"
    env = adapters.Gymnasium(env=name, seed=3, **given)
    bare = gymnasium.make(name, disable_env_checker=True).unwrapped
    env.reset()
    seen, _ = bare.reset(seed=3)
    rng = np.random.default_rng(0)
    for t in range(1, length + 1):
        assert np.array_equal(env.get_obs(), np.stack(seen))
        actions = [0, 0] if "max_inactivity_steps" in given else rng.integers(5, size=2).tolist()
        seen, rewards, _, _, _ = bare.step(actions)
        reward, over, info = env.step(actions)
        assert reward == sum(rewards)
        assert over == (t == length)
    assert info == {"episode_limit": late}


def test_rware_observations_of_many_parts_are_joined():
    """Catches: real Dicts of Tuples and Dicts, whose size is not the one that is told."""
    warehouse = pytest.importorskip("rware.warehouse")
    kind = warehouse.ObservationType.DICT
    name = "rware:rware-tiny-2ag-v2"
    env = adapters.Gymnasium(env=name, seed=3, observation_type=kind)
    flat = adapters.Gymnasium(env=name, seed=3)
    env.reset()
    flat.reset()
    obs = env.get_obs()
    assert obs.shape == (2, env.get_env_info()["obs_shape"]) == (2, 71)
    assert 0 <= obs.min() and obs.max() <= 1
    assert flat.get_obs().max() > 1  # RWARE's own vector has no bounds
