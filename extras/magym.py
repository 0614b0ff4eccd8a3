"""A registered ma-gym environment behind PyMARL's interface (Python 3.10 and 3.11).

    python qmix.py --env ma_gym:Switch2-v0

ma-gym's Checkers is built in: --env checkers is the same game, many episodes at once.
"""

import numpy as np

from envs import UsageError


class MaGym:
    """The reward is the sum over the agents, the state all observations joined."""

    def __init__(self, name: str, seed: int, episode_limit: int = 0, **arguments):
        try:
            import gym
            import ma_gym  # noqa: F401  importing it registers its environments
        except ModuleNotFoundError as error:
            needs = "make install adds ma-gym on Python 3.10 and 3.11"
            raise UsageError(f"{error.name} is not installed; {needs}") from None
        gym.logger.set_level(gym.logger.ERROR)  # it warns of its own spaces
        try:
            self.env = gym.make(name, **arguments).unwrapped
        except (gym.error.Error, TypeError) as error:  # no such name, no such argument
            raise UsageError(str(error)) from None
        self.env.seed(seed)
        self.limit = episode_limit or getattr(self.env, "_max_steps", 0)
        if self.limit < 1:
            raise UsageError("it has no time limit: give --env-args episode_limit=300")
        self.counts = [space.n for space in self.env.action_space]
        self.reset()

    def get_env_info(self):
        return {
            "n_agents": self.env.n_agents,
            "n_actions": max(self.counts),
            "obs_shape": len(self.obs[0]),
            "state_shape": len(self.get_state()),
            "episode_limit": self.limit,
        }

    def reset(self):
        self.obs = self.env.reset()

    def step(self, actions):
        # subtle: at its limit ma-gym marks everybody done, even in a step with a real end. Without
        # the limit only a real end does. The observed clock needs the limit, so observe again.
        self.env._max_steps = np.inf
        _, rewards, done, _ = self.env.step(actions)
        self.env._max_steps = self.limit
        self.obs = self.env.get_agent_obs()
        return sum(rewards), all(done), {}

    def get_obs(self):
        return self.obs

    def get_state(self):
        return np.concatenate(self.obs)

    def get_avail_actions(self):
        avail = np.zeros((self.env.n_agents, max(self.counts)))
        for row, count in zip(avail, self.counts):
            row[:count] = 1
        return avail

    def render(self):
        return self.env.render(mode="rgb_array")

    def close(self):
        self.env.close()
