"""Environments behind one batched interface: B episodes side by side, on one device.

    env = envs.make("checkers", n_envs=32, device="cpu", seed=0)
    step = env.reset()                  # Step: obs, state, avail, reward, terminated, truncated, info
    step = env.step(actions)            # actions (B, N) int64
    env.close()

An environment has n_envs, n_agents, n_actions, obs_dim, state_dim, episode_limit, device, and generator: the random
state that outlives an episode, which a checkpoint keeps. Where it makes sense it also has best_return (the best
undiscounted return that is known), heuristic() -> actions, and draw(axes, b), a picture of episode b as it stands.

Episodes run in lockstep: what an environment returns after its own episode has ended is padding until the next reset().
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class UsageError(ValueError):
    """What was asked for cannot be done. The message is one line: what was expected, what came."""


class EnvFailure(RuntimeError):
    """An environment keeps failing, so that the run cannot go on."""


class Step(NamedTuple):
    """What reset() and step() return, for all B episodes."""

    obs: Tensor  # (B, N, O) float32
    state: Tensor  # (B, S) float32
    avail: Tensor  # (B, N, A) bool
    reward: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool: the task itself ended, no bootstrap
    truncated: Tensor  # (B,) bool: a time limit cut it off, bootstrap
    info: dict[str, Tensor]  # (B,) each: battle_won where there is a battle; void: throw this episode away


class TwoStep:
    """The paper's two-step game (section 5): in state 1 agent 1's action alone picks 2A or 2B, which then pays.

    Both agents see the whole state, one-hot in the order 1, 2A, 2B: obs (B, 2, 3), state (B, 3).
    """
    n_agents, n_actions, obs_dim, state_dim, episode_limit, best_return = 2, 2, 3, 3, 2, 8.0

    def __init__(self, n_envs=32, device="cpu", seed=0):
        self.n_envs, self.device = n_envs, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)  # never drawn from: nothing here is random
        payoff = [[[0, 0], [0, 0]], [[7, 7], [7, 7]], [[0, 1], [1, 8]]]  # [state][agent 1's action][agent 2's action]
        self.payoff = torch.tensor(payoff, dtype=torch.float32, device=self.device)
        self.one_hot = torch.eye(3, device=self.device)

    def reset(self):
        self.steps = 0
        self.where = torch.zeros(self.n_envs, dtype=torch.int64, device=self.device)  # (B,) 0 is state 1, then 2A, 2B
        return self._step(torch.zeros(self.n_envs, device=self.device))

    def step(self, actions):
        reward = self.payoff[self.where, actions[:, 0], actions[:, 1]]
        self.where = torch.where(self.where == 0, 1 + actions[:, 0], self.where)
        self.steps += 1
        return self._step(reward)

    def _step(self, reward):
        state = self.one_hot[self.where]
        avail = torch.ones(self.n_envs, 2, 2, dtype=torch.bool, device=self.device)
        terminated = torch.full((self.n_envs,), self.steps >= 2, device=self.device)
        return Step(state[:, None].repeat(1, 2, 1), state, avail, reward, terminated, torch.zeros_like(terminated), {})

    def close(self):
        pass


class Checkers:
    """ma-gym's Checkers-v0 .. v3 (VDN paper, section 4.2), equal to the original step for step.

    A 3x8 board of cells (row, column): nine apples and nine lemons alternate on columns 0-5, the agents start at (0, 6)
    and (2, 6). Actions: 0 down, 1 left, 2 up, 3 right, 4 stay; agent 0 moves first, and the edge or the other agent
    blocks. Entering a cell eats what lies there: an apple brings the team +10 if agent 0 eats it, +1 if agent 1 does,
    a lemon -10 and -1; every step costs 0.02. `terminated`: the last apple is eaten; `truncated`: step 100.

    An agent observes its coordinates and, of the 3x3 cells around it, (lemon, apple, agent 0, agent 1, wall) each;
    no wall exists. Variants 1 and 3: both agents get both observations; 2 and 3: each observation ends with the clock.
    obs (B, 2, O), O = 47, 94, 48, 96 for variant 0 .. 3. state (B, 67), the whole truth in any variant: nine apples and
    nine lemons (1 = still there), the clock (fraction of the limit), the cells of agent 0 and of agent 1, one-hot.
    """
    n_agents, n_actions, state_dim, episode_limit, best_return = 2, 5, 67, 100, 86.26
    cells = tuple(product(range(3), range(8)))
    moves = ((1, 0), (0, -1), (-1, 0), (0, 1), (0, 0))
    apples = tuple((row, column) for row, column in cells if column < 6 and (row + column) % 2 == 0)
    lemons = tuple((row, column) for row, column in cells if column < 6 and (row + column) % 2 == 1)
    clock, nothing = 18, 19  # columns of self.board after those of apples and lemons: the clock, and one that stays 0

    def __init__(self, variant=0, n_envs=32, device="cpu", seed=0):
        if variant not in (0, 1, 2, 3):
            raise UsageError(f"Checkers has the variants 0, 1, 2 and 3, got {variant!r}")
        self.variant, self.n_envs, self.device = variant, n_envs, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)  # never drawn from: nothing here is random
        self.slot = {cell: column for column, cell in enumerate(self.apples + self.lemons)}  # where the board keeps it

        # Food stops nobody: where the agents go, and all they see but food, follows from where both are. Hence tables,
        # filled once, here, by the rules. Their index is one number: `pair` = cell of agent 0 * 24 + cell of agent 1.
        next_pair, one_hot, entered, value, fixed, source = [], [], [], [], [], []
        for pair in product(self.cells, self.cells):
            for move_0, move_1 in product(self.moves, self.moves):
                cell_0 = self._target(pair[0], move_0, pair[1])
                cell_1 = self._target(pair[1], move_1, cell_0)  # agent 0 has moved already
                next_pair.append(self.cells.index(cell_0) * 24 + self.cells.index(cell_1))
            one_hot.append([float(here == cell) for here in pair for cell in self.cells])
            entered.append([self.slot.get(here, self.nothing) for here in pair])
            value.append([worth if here in self.apples else -worth for here, worth in zip(pair, (10.0, 1.0))])
            views = [self._view(here, pair) for here in pair]
            if variant in (1, 3):
                views = [views[0] + views[1]] * 2
            fixed.append([[number for number, _ in view] for view in views])
            source.append([column for view in views for _, column in view])
        self.next_pair = torch.tensor(next_pair, device=self.device)  # (24 * 24 * A * A,)
        self.one_hot = torch.tensor(one_hot, device=self.device)      # (24 * 24, 2 * 24)
        self.entered = torch.tensor(entered, device=self.device)      # (24 * 24, N) board's column under each agent
        self.value = torch.tensor(value, device=self.device)          # (24 * 24, N) what the food of that column brings
        self.fixed = torch.tensor(fixed, device=self.device)          # (24 * 24, N, O)
        self.source = torch.tensor(source, device=self.device)        # (24 * 24, N * O)
        self.obs_dim = self.fixed.shape[-1]

    def _target(self, cell, move, other):
        target = (cell[0] + move[0], cell[1] + move[1])
        return target if target in self.cells and target != other else cell

    def _view(self, here, pair):
        """What an agent on `here` observes: pairs (a fixed number, the column of the board to add to it)."""
        view = [(round(here[0] / 3, 2), self.nothing), (round(here[1] / 7, 2), self.nothing)]  # ma-gym rounds too
        for cell in product(range(here[0] - 1, here[0] + 2), range(here[1] - 1, here[1] + 2)):
            view.append((0.0, self.slot[cell] if cell in self.lemons else self.nothing))
            view.append((0.0, self.slot[cell] if cell in self.apples else self.nothing))
            view += [(float(cell == pair[0]), self.nothing), (float(cell == pair[1]), self.nothing)]
            view.append((0.0, self.nothing))  # ma-gym's place for a wall
        return view + [(0.0, self.clock)] * (self.variant in (2, 3))

    def reset(self):
        self.steps = 0                                                                # shared: all run in lockstep
        start = self.cells.index((0, 6)) * 24 + self.cells.index((2, 6))
        self.pair = torch.full((self.n_envs,), start, device=self.device)             # (B,)
        self.board = torch.ones(self.n_envs, 20, device=self.device)                  # (B, 18 food + clock + nothing)
        self.board[:, self.clock:] = 0
        return self._step(torch.zeros(self.n_envs, device=self.device))

    def step(self, actions):
        self.pair = self.next_pair[(self.pair * 5 + actions[:, 0]) * 5 + actions[:, 1]]
        entered = self.entered[self.pair]                                             # (B, 2) columns of the board
        reward = (self.board.gather(1, entered) * self.value[self.pair]).sum(1) - 0.02
        self.board.scatter_(1, entered, 0)
        self.steps += 1
        self.board[:, self.clock].fill_(self.steps / self.episode_limit)
        return self._step(reward)

    def _step(self, reward):
        seen = self.board.gather(1, self.source[self.pair])                           # (B, 2 * O)
        obs = self.fixed[self.pair] + seen.view(self.n_envs, 2, self.obs_dim)
        state = torch.cat([self.board[:, :self.nothing], self.one_hot[self.pair]], 1)
        avail = torch.ones(self.n_envs, 2, 5, dtype=torch.bool, device=self.device)   # bumping is allowed
        terminated = ~self.board[:, :9].any(1)                                        # no apple is left
        truncated = ~terminated & (self.steps >= self.episode_limit)
        return Step(obs, state, avail, reward, terminated, truncated, {})

    def draw(self, ax, b=0):
        """Draw environment b as it is now: red apples, yellow lemons, agent 0 a circle, agent 1 a square."""
        from matplotlib.patches import Circle, Ellipse, Rectangle
        board, pair = self.board[b].tolist(), divmod(self.pair[b].item(), 24)
        for row, column in self.cells:
            shade = "#f4efe3" if (row + column) % 2 else "#e6ddc6"
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=shade))
            if (row, column) in self.slot and board[self.slot[row, column]]:
                if (row, column) in self.apples:
                    ax.add_patch(Circle((column, row + 0.04), 0.24, color="#d62728"))
                    ax.add_patch(Ellipse((column + 0.1, row - 0.24), 0.24, 0.11, angle=-30, color="#2ca02c"))
                else:
                    ax.add_patch(Ellipse((column, row), 0.56, 0.36, angle=-25, color="#f2c200"))
        (row_0, column_0), (row_1, column_1) = self.cells[pair[0]], self.cells[pair[1]]
        ax.add_patch(Circle((column_0, row_0), 0.36, color="#1f4fa3"))
        ax.add_patch(Rectangle((column_1 - 0.33, row_1 - 0.33), 0.66, 0.66, color="#6b2fa0"))
        ax.text(column_0, row_0, "0", color="white", ha="center", va="center", weight="bold")
        ax.text(column_1, row_1, "1", color="white", ha="center", va="center", weight="bold")
        ax.set(xlim=(-0.5, 7.5), ylim=(2.5, -0.5), aspect="equal", xticks=[], yticks=[])  # row 0 is at the top
        ax.set_xlabel("\u25cf agent 0: apple +10, lemon \u221210      \u25a0 agent 1: apple +1, lemon \u22121")

    def close(self):
        pass


def make(name: str, n_envs: int = 32, device: str | torch.device = "cpu", seed: int = 0):
    """The environment called `name`, or UsageError with the names there are."""
    if name == "two-step":
        return TwoStep(n_envs, device, seed)
    if name in ("checkers", "checkers-v0", "checkers-v1", "checkers-v2", "checkers-v3"):
        return Checkers(int(name[-1]) if name[-1].isdigit() else 0, n_envs, device, seed)
    raise UsageError(f"unknown environment {name!r}; there are two-step, checkers, checkers-v1, -v2 and -v3")
