"""Environments of other libraries behind PyMARL's interface; each is a class to copy and change.

    python qmix.py --env extras.adapters:PettingZoo --env-args env=mpe2.simple_spread_v3 N=3
    python qmix.py --env extras.adapters:Gymnasium --env-args env=lbforaging:Foraging-8x8-2p-3f-v3

The same in both:

- The reward is the sum over the agents.
- An observation becomes a vector as its space says, by gymnasium.spaces.flatten: Discrete and
  MultiDiscrete one-hot, Tuple and Dict joined. A number with bounds, both within a million, is
  mapped from [low, high] to [0, 1]; any other stays as it is. Zeros fill rows up to the widest.
- Actions are Discrete. An agent that has fewer of them than another has a mask over the rest.
- `--env-args episode_limit=50` sets the time limit. Without it the environment's own one counts.
"""

import importlib
import inspect
import os
import sys

import gymnasium
import numpy as np
from gymnasium import spaces

from envs import UsageError

FLAT = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)
LARGEST = 1e6  # a larger bound counts as none
# Errors from a wrong name or a wrong argument
WRONG = (ImportError, AttributeError, TypeError, ValueError, AssertionError)


def require(space, kinds, name: str) -> None:
    """UsageError if the space is none of these kinds."""
    if not isinstance(space, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        text = " ".join(str(space).split())  # in one line
        raise UsageError(f"env={name}: expected {expected}, not {text}")


def require_flat(space, name: str) -> None:
    """UsageError if what the space describes is no vector of a fixed size."""
    require(space, (*FLAT, spaces.Tuple, spaces.Dict), name)
    parts = ()
    if isinstance(space, spaces.Tuple):
        parts = space.spaces
    if isinstance(space, spaces.Dict):
        parts = space.spaces.values()
    for part in parts:
        require_flat(part, name)


class Vectors:
    """Turns what a space describes into vectors (size,) float32, scaled by the space's bounds."""

    def __init__(self, space, name: str):
        require_flat(space, name)
        box = spaces.flatten_space(space)
        low = box.low.astype(np.float64)
        high = box.high.astype(np.float64)
        bounded = (low >= -LARGEST) & (high <= LARGEST)
        self.space = space
        self.size = len(low)
        self.low = np.where(bounded, low, 0.0)
        self.range = np.where(bounded & (low < high), high - self.low, 1.0)

    def vector(self, value) -> np.ndarray:
        flat = spaces.flatten(self.space, value)
        if flat.shape != self.low.shape:
            raise UsageError(f"expected {self.size} numbers of {self.space}, not {flat.shape}")
        return ((flat - self.low) / self.range).astype(np.float32)


def is_limit(value) -> bool:
    return type(value) is int and value > 0  # neither True nor infinity nor a method


def time_limit(given, own: list, name: str) -> int:
    """The limit that is given, or else the smallest one of the environment's own."""
    candidates = own if given is None else [given]
    limits = [value for value in candidates if is_limit(value)]
    if not limits:
        text = f"expected a time limit, a whole number above 0, not {candidates}"
        raise UsageError(f"env={name}: {text}: give --env-args episode_limit=...")
    return min(limits)


def require_picture(picture):
    if np.ndim(picture) != 3:
        raise UsageError(f"cannot draw {picture}: give --env-args render_mode=rgb_array")
    return picture


class PettingZoo:
    """A PettingZoo parallel environment: env names its module, further arguments are its own.

    Environments in which the agents take turns (AEC) have no parallel_env, and are refused.
    All of possible_agents have a row. An agent that is not there, or no longer, sees zeros and has
    action 0 alone, which is not played. An "action_mask" beside an observation, or in an agent's
    info, is the mask, and not observed. The state is state() if there is a state_space, or else
    all observations. The time limit is max_cycles, if none is given. `--record` needs
    `--env-args render_mode=rgb_array`.
    """

    def __init__(self, env: str, seed: int, episode_limit: int | None = None, **arguments):
        self.env = self.make(env, arguments)
        self.seed = seed
        game = getattr(self.env, "unwrapped", self.env)
        own = [arguments.get("max_cycles"), getattr(game, "max_cycles", None)]
        self.limit = time_limit(episode_limit, own, env)
        self.agents = list(self.env.possible_agents)
        self.actions = {agent: self.env.action_space(agent) for agent in self.agents}
        self.vectors = {}
        for agent in self.agents:
            require(self.actions[agent], (spaces.Discrete,), env)
            space = self.env.observation_space(agent)
            if isinstance(space, spaces.Dict):
                parts = dict(space.spaces)
                parts.pop("action_mask", None)
                space = spaces.Dict(parts)
            self.vectors[agent] = Vectors(space, env)
        self.n_actions = int(max(space.n for space in self.actions.values()))
        self.width = max(vectors.size for vectors in self.vectors.values())
        self.state_vectors = None
        self.state_size = len(self.agents) * self.width
        if getattr(self.env, "state_space", None) is not None:
            self.state_vectors = Vectors(self.env.state_space, env)
            self.state_size = self.state_vectors.size

    def make(self, name: str, arguments: dict):
        try:
            return importlib.import_module(name).parallel_env(**arguments)
        except WRONG as error:
            raise UsageError(f"env={name}: {error!r}") from None

    def get_env_info(self):
        return {
            "n_agents": len(self.agents),
            "n_actions": self.n_actions,
            "obs_shape": self.width,
            "state_shape": self.state_size,
            "episode_limit": self.limit,
        }

    def reset(self):
        self.obs, self.infos = self.env.reset(seed=self.seed)
        self.seed = None  # later episodes go on with the same random numbers
        self.steps = 0
        self.gone = set()
        self.alive = list(self.env.agents)

    def step(self, actions):
        plays = {}
        for agent, action in zip(self.agents, actions):
            if agent in self.alive:
                plays[agent] = action + int(self.actions[agent].start)
        self.obs, rewards, terminated, truncated, self.infos = self.env.step(plays)
        self.steps += 1
        over = self.ends(terminated, truncated) or self.steps >= self.limit
        cut = over and len(self.alive) > 0  # some agent was not at its end
        return sum(rewards.values()), over, {"episode_limit": cut}

    def ends(self, terminated: dict, truncated: dict) -> bool:
        """Note who is still alive. True if nobody goes on."""
        self.gone.update(agent for agent in terminated if terminated[agent])
        cut = [agent for agent in truncated if truncated[agent] and agent not in self.gone]
        self.gone.update(cut)
        going = [agent for agent in self.env.agents if agent not in self.gone]
        # subtle: agents that the time limit cuts off in the last step count as alive, not as ended
        self.alive = going or cut
        return not going

    def get_obs(self):
        obs = np.zeros((len(self.agents), self.width), np.float32)
        for row, agent in zip(obs, self.agents):
            if agent in self.alive:
                vectors = self.vectors[agent]
                row[: vectors.size] = vectors.vector(self.obs[agent])
        return obs

    def get_state(self):
        if self.state_vectors is not None:
            return self.state_vectors.vector(self.env.state())
        return np.ravel(self.get_obs())

    def get_avail_actions(self):
        avail = np.zeros((len(self.agents), self.n_actions))
        for row, agent in zip(avail, self.agents):
            if agent in self.alive:
                row[: self.actions[agent].n] = self.mask(agent)
            else:
                row[0] = 1
        return avail

    def mask(self, agent):
        seen = self.obs[agent]
        if isinstance(seen, dict) and "action_mask" in seen:
            return seen["action_mask"]
        return self.infos.get(agent, {}).get("action_mask", 1)

    def render(self):
        return require_picture(self.env.render())

    def close(self):
        self.env.close()


class Gymnasium:
    """A Gymnasium environment of several agents, such as Level-Based Foraging and RWARE.

    Its spaces are Tuples with a space for each agent; env is its ID, or module:ID; further
    arguments are its own. All agents play until all have ended. The state is all observations.
    The time limit is the registered one, or that of the environment (LBF: 50 steps, RWARE: 500),
    if none is given. `--record` draws these two as they are; other environments need
    `--env-args render_mode=rgb_array`.
    """

    def __init__(self, env: str, seed: int, episode_limit: int | None = None, **arguments):
        if episode_limit is not None:
            arguments["max_episode_steps"] = episode_limit  # instead of the registered one
        try:
            self.env = gymnasium.make(env, disable_env_checker=True, **arguments)
        except (gymnasium.error.Error, *WRONG) as error:
            raise UsageError(f"env={env}: {error!r}") from None
        self.seed = seed
        # subtle: at their own limit LBF and RWARE say `terminated`, as at a real end. We raise that
        # limit to 10**9, and gymnasium's TimeLimit says `truncated` instead.
        game = self.env.unwrapped
        own = [self.env.spec.max_episode_steps]
        for attribute in ("_max_episode_steps", "max_steps"):
            own.append(getattr(game, attribute, None))
            if is_limit(own[-1]):
                setattr(game, attribute, 10**9)
        self.limit = time_limit(episode_limit, own, env)
        self.env = gymnasium.wrappers.TimeLimit(self.env, self.limit)

        require(self.env.action_space, (spaces.Tuple,), env)
        require(self.env.observation_space, (spaces.Tuple,), env)
        self.actions = self.env.action_space.spaces
        for space in self.actions:
            require(space, (spaces.Discrete,), env)
        self.vectors = [Vectors(space, env) for space in self.env.observation_space]
        self.n_actions = int(max(space.n for space in self.actions))
        self.width = max(vectors.size for vectors in self.vectors)
        self.avail = np.zeros((len(self.actions), self.n_actions))
        for row, space in zip(self.avail, self.actions):
            row[: space.n] = 1

    def get_env_info(self):
        return {
            "n_agents": len(self.actions),
            "n_actions": self.n_actions,
            "obs_shape": self.width,
            "state_shape": len(self.actions) * self.width,
            "episode_limit": self.limit,
        }

    def reset(self):
        seen, _ = self.env.reset(seed=self.seed)
        self.obs = self.rows(seen)
        self.seed = None  # later episodes go on with the same random numbers

    def step(self, actions):
        plays = tuple(action + int(space.start) for action, space in zip(actions, self.actions))
        seen, rewards, terminated, truncated, _ = self.env.step(plays)
        self.obs = self.rows(seen)
        over = bool(np.all(np.logical_or(terminated, truncated)))
        return float(np.sum(rewards)), over, {"episode_limit": over and not np.all(terminated)}

    def rows(self, seen):
        obs = np.zeros((len(self.vectors), self.width), np.float32)
        for row, vectors, value in zip(obs, self.vectors, seen):
            row[: vectors.size] = vectors.vector(value)
        return obs

    def get_obs(self):
        return self.obs

    def get_state(self):
        return np.ravel(self.obs)

    def get_avail_actions(self):
        return self.avail

    def render(self):
        if sys.platform == "linux":
            os.environ.setdefault("PYGLET_HEADLESS", "true")  # LBF and RWARE: without a display
        draw = self.env.unwrapped.render
        if "mode" in inspect.signature(draw).parameters:  # gym's older way, as in these two
            return draw(mode="rgb_array")
        return require_picture(self.env.render())

    def close(self):
        self.env.close()
