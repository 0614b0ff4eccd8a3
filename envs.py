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

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
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


# --------------------------------------------------------------------------------------------------- two-step, Checkers


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
        self.where = torch.zeros(n_envs, dtype=torch.int64, device=self.device)  # (B,) 0 is state 1, then 2A, 2B
        self.steps = torch.zeros((), dtype=torch.int64, device=self.device)

    def reset(self):
        self.steps.zero_()
        self.where.zero_()
        return self._step(torch.zeros(self.n_envs, device=self.device))

    def step(self, actions):
        reward = self.payoff[self.where, actions[:, 0], actions[:, 1]]
        self.where.copy_(torch.where(self.where == 0, 1 + actions[:, 0], self.where))
        self.steps += 1
        return self._step(reward)

    def _step(self, reward):
        state = self.one_hot[self.where]
        avail = torch.ones(self.n_envs, 2, 2, dtype=torch.bool, device=self.device)
        terminated = (self.steps >= 2).repeat(self.n_envs)
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
    landmarks = "83.54 is what gamma 0.99 asks for, 59.64 the trap where agent 1 never helps"  # exact: see README.md
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
        self.pair = torch.zeros(n_envs, dtype=torch.int64, device=self.device)        # (B,)
        self.board = torch.ones(n_envs, 20, device=self.device)                       # (B, 18 food + clock + nothing)
        self.steps = torch.zeros((), dtype=torch.int64, device=self.device)           # shared: all run in lockstep

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
        self.steps.zero_()
        self.pair.fill_(self.cells.index((0, 6)) * 24 + self.cells.index((2, 6)))
        self.board.fill_(1)
        self.board[:, self.clock:] = 0
        return self._step(torch.zeros(self.n_envs, device=self.device))

    def step(self, actions):
        self.pair.copy_(self.next_pair[(self.pair * 5 + actions[:, 0]) * 5 + actions[:, 1]])
        entered = self.entered[self.pair]                                             # (B, 2) columns of the board
        reward = (self.board.gather(1, entered) * self.value[self.pair]).sum(1) - 0.02
        self.board.scatter_(1, entered, 0)
        self.steps += 1
        self.board[:, self.clock] = self.steps / self.episode_limit
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


# ------------------------------------------------------------------------------------------------------------ skirmish


class Kind(NamedTuple):
    """One kind of unit, from the game's public unit data; map cells and seconds ("faster" speed)."""
    armoured: bool  # else light
    health: float
    shield: float
    armour: float  # off every hit, but not off what the shield takes
    damage: float  # of one hit
    hits: int  # in one shot
    bonus_armoured: float  # what each hit does more to an armoured unit
    bonus_light: float
    beam: bool  # hits every enemy on a rectangle around the target, across the line of fire
    cooldown: float  # from shot to shot
    speed: float
    range: float  # of the weapon, from edge to edge
    radius: float
    push_radius: float  # the radius at which units push each other apart
    cooldown_norm: float  # smac's divisor of the cooldown, game loops


KINDS = {
    "colossus": Kind(True, 200, 150, 1, 10, 2, 0, 5, True, 1.07, 3.15, 7, 1.0, 1.0, 24),
    "stalker": Kind(True, 80, 80, 1, 13, 1, 5, 0, False, 1.34, 4.13, 6, 0.625, 0.625, 35),
    "zealot": Kind(False, 100, 50, 1, 8, 2, 0, 0, False, 0.86, 3.15, 0.1, 0.5, 0.375, 22),
    "marine": Kind(False, 45, 0, 0, 6, 1, 0, 0, False, 0.61, 3.15, 5, 0.375, 0.375, 15),
}
SKIRMISHES = {  # map: allies, enemies, step limit. 5m is the paper's; smac never released it: 5m_vs_6m's limit
    "3m": (3 * ["marine"], 3 * ["marine"], 60),
    "5m": (5 * ["marine"], 5 * ["marine"], 70),
    "8m": (8 * ["marine"], 8 * ["marine"], 120),
    "5m_vs_6m": (5 * ["marine"], 6 * ["marine"], 70),
    "2s3z": (2 * ["stalker"] + 3 * ["zealot"], 2 * ["stalker"] + 3 * ["zealot"], 120),
    "3s5z": (3 * ["stalker"] + 5 * ["zealot"], 3 * ["stalker"] + 5 * ["zealot"], 150),
    "1c3s5z": (["colossus"] + 3 * ["stalker"] + 5 * ["zealot"],
               ["colossus"] + 3 * ["stalker"] + 5 * ["zealot"], 180),
}
LOOPS_PER_SECOND, LOOPS_PER_STEP = 22.4, 8
STOP, NORTH, SOUTH, EAST, WEST, ATTACK = 1, 2, 3, 4, 5, 6  # actions: 0 is the dead's no-op, ATTACK + j attacks enemy j
SIGHT, SHOOT, MOVE = 9.0, 6.0, 2.0  # smac's for every kind: an ally sees, may attack, and is sent that far
BEAM_WIDTH, BEAM_DEPTH = 2.8, 0.3
REGENERATION, REGENERATION_DELAY = 0.125, 160  # shield points per game loop, after so many loops without damage
# One set for all maps, chosen by calibration. Edge to edge, an enemy takes the closest target within NOTICE, or within
# SIGHT if it was hurt in the last step, and keeps it within LEASH. It decides once per step, as the allies do.
NOTICE, LEASH = 4.75, 5.0
SPACING, SCATTER = 1.25, 1.0  # a team starts as a square block, long ranges behind; each unit up to SCATTER / 2 off


class Geometry(NamedTuple):
    """Where a battle takes place, in map cells; by default that of the released SMAC maps."""
    center: tuple = (16.0, 16.0)
    extent: tuple = (32.0, 32.0)  # of the playable area: divides the positions in the state
    walk_x: tuple = (2.0, 30.0)  # walkable: low <= x < high
    walk_y: tuple = (7.0, 25.0)
    ally_start: tuple = (9.0, 16.0)  # the enemies' goal
    enemy_start: tuple = (23.0, 16.0)


RELEASED_MAPS = Geometry()


class Skirmish:
    """Two teams fight: ours is learned, theirs attack-moves to where ours started. smac's interface (observation,
    state, actions, mask, reward: the defaults of oxwhirl/smac, element for element) over a re-creation of the game.
    Its balance is its own: no win rate from here is one of SMAC's. A time-out is `truncated`; smac calls it an end.

    Left out: acceleration, turning, the delay between aiming and damage, path finding (units slide around each
    other), and whatever else the computer player does.

    Every fact is one (B, U) tensor of the U = N + M units, allies first. `step` never waits for the device, and what
    outlives it is updated in place: it can be captured in a CUDA graph.
    """

    def __init__(self, map_name: str, n_envs: int = 32, device: str = "cpu", seed: int = 0,
                 geometry: Geometry = RELEASED_MAPS):
        if map_name not in SKIRMISHES:
            raise UsageError(f"expected a skirmish map out of {', '.join(SKIRMISHES)}; got {map_name!r}")
        allies, enemies, self.episode_limit = SKIRMISHES[map_name]
        self.n_envs, self.device, self.geometry = n_envs, torch.device(device), geometry
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.n_agents, self.n_enemies, self.n_actions = N, M, A = len(allies), len(enemies), ATTACK + len(enemies)
        self.names = allies + enemies

        def column(values):  # (U,)
            return torch.tensor(list(values), dtype=torch.float32, device=self.device)

        kinds = Kind(*(column(values) for values in zip(*(KINDS[name] for name in self.names))))
        self.health_max, self.shield_max, self.armour = kinds.health, kinds.shield, kinds.armour
        self.radius, self.reach = kinds.radius, kinds.range + kinds.radius
        self.speed, self.reload = kinds.speed / LOOPS_PER_SECOND, kinds.cooldown * LOOPS_PER_SECOND  # in game loops
        self.cooldown_norm, self.beam = kinds.cooldown_norm, kinds.beam > 0
        self.any_beam, self.any_shield = "colossus" in allies, "marine" not in allies
        self.contact = kinds.push_radius[:, None] + kinds.push_radius  # (U, U) the distance at which two touch
        self.contact.fill_diagonal_(0)
        self.index = torch.arange(N + M, device=self.device)
        foes = (self.index[:, None] < N) != (self.index < N)
        bonus = torch.where(kinds.armoured > 0, kinds.bonus_armoured[:, None], kinds.bonus_light[:, None])
        self.damage = kinds.damage[:, None] + bonus  # (U attacker, U victim) of one hit
        self.shot = self.damage * kinds.hits[:, None] * foes  # of a whole shot

        types = list(dict.fromkeys(allies))
        self.type_bits = column(name == kind for name in self.names for kind in types).view(N + M, -1)
        if len(types) == 1:
            self.type_bits = self.type_bits[:, :0]
        if len(types) == 2:  # subtle: smac has the enemies' bits the other way round on these maps
            self.type_bits[N:] = self.type_bits[N:].flip(1)
        facts = self.any_shield + self.type_bits.shape[1]
        self.obs_dim = 4 + (M + N - 1) * (5 + facts) + 1 + facts
        self.state_dim = N * (4 + facts) + M * (3 + facts) + N * A
        self.max_reward = 10 * M + 200 + sum(KINDS[name].health + KINDS[name].shield for name in enemies)
        if not self.any_shield:
            self.best_return = 20.0  # any win; shields that grow back make more to shoot down
        self.others = torch.tensor([[j for j in range(N) if j != i] for i in range(N)], device=self.device)

        places = []  # before the scatter: columns of `rows` units, the first kinds hindmost
        for n, start, forward in ((N, geometry.ally_start, SPACING), (M, geometry.enemy_start, -SPACING)):
            rows = round(n ** 0.5)
            columns = -(-n // rows)
            places += [(start[0] + (i // rows - (columns - 1) / 2) * forward,
                        start[1] + (i % rows - (rows - 1) / 2) * SPACING) for i in range(n)]
        self.start_x, self.start_y = torch.tensor(places, device=self.device).T
        # In game loops: cooldown to the next shot, calm since the last damage. Indices among all units, -1 for none:
        # target, whom a unit attacks; shots, whom it shot in this step (for `draw`)
        self.x, self.y, self.health, self.shield, self.cooldown, self.calm = torch.zeros(
            6, n_envs, N + M, device=self.device)
        self.target, self.shots = torch.full((2, n_envs, N + M), -1, device=self.device)
        self.last_actions = torch.full((n_envs, N), -1, device=self.device)
        self.steps = torch.zeros((), dtype=torch.long, device=self.device)

    def noise(self) -> Tensor:
        """All the randomness there is: (B, U) numbers in [0, 1), twice for a reset, once for a step."""
        return torch.rand(self.x.shape, generator=self.generator, device=self.device)

    def reset(self) -> Step:
        """Starts a new battle everywhere. smac sorts the allies of a kind by x, once an episode."""
        N = self.n_agents
        self.x.copy_(self.start_x + SCATTER * (self.noise() - 0.5))
        self.y.copy_(self.start_y + SCATTER * (self.noise() - 0.5))
        order = (self.x + 1000 * self.type_bits.argmax(1) if self.type_bits.numel() else self.x)[:, :N].argsort(1)
        self.x[:, :N], self.y[:, :N] = self.x[:, :N].gather(1, order), self.y[:, :N].gather(1, order)
        self.health[:], self.shield[:] = self.health_max, self.shield_max
        self.cooldown.zero_()
        self.calm.fill_(REGENERATION_DELAY)
        for memory in (self.target, self.shots, self.last_actions):
            memory.fill_(-1)
        self.steps.zero_()
        return self.look(torch.zeros_like(self.x[:, 0]))

    def close(self):
        """Nothing to close."""

    # The rules, in the order the game applies them ------------------------------------------------------------------

    def step(self, actions: Tensor) -> Step:
        """actions (B, N) int64: 0 no-op (the dead), 1 stop, 2-5 move to y+2, y-2, x+2, x-2, 6 + j attack enemy j."""
        points, alive = self.health + self.shield, self.health > 0
        orders = self.order(actions)
        # Each shot's cooldown varies by -1 to +2 loops. No weapon shoots twice in 8 loops: one draw per unit will do.
        reload = self.reload + 3 * self.noise() - 1
        self.shots.fill_(-1)
        for _ in range(LOOPS_PER_STEP):
            self.game_loop(*orders, reload)
        self.last_actions.copy_(actions)
        self.steps += 1
        return self.look(self.reward(points, alive))

    def order(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sets every unit's target; returns its goal x, y and whether it walks there without a target, (B, U) each."""
        N, goal_x, goal_y = self.n_agents, self.x.clone(), self.y.clone()
        # Enemies attack-move
        gap = self.offsets()[2] - self.radius[:N, None] - self.radius[N:]  # (B, N, M)
        closest, candidate = gap.masked_fill_(self.health[:, :N, None] <= 0, torch.inf).min(1)
        notice = torch.where(self.calm[:, N:] < LOOPS_PER_STEP, SIGHT, NOTICE)
        held = self.target[:, N:]
        keep = (held >= 0) & (gap.gather(1, held.clamp(min=0)[:, None])[:, 0] <= LEASH)
        self.target[:, N:] = torch.where(keep, held, torch.where(closest <= notice, candidate, -1))
        goal_x[:, N:], goal_y[:, N:] = self.geometry.ally_start
        # Allies do what they are told
        self.target[:, :N] = torch.where(actions >= ATTACK, actions - ATTACK + N, -1)
        goal_x[:, :N] += MOVE * ((actions == EAST).float() - (actions == WEST).float())
        goal_y[:, :N] += MOVE * ((actions == NORTH).float() - (actions == SOUTH).float())
        moves = (actions >= NORTH) & (actions < ATTACK)
        return goal_x, goal_y, torch.cat([moves, torch.ones_like(keep)], 1)

    def game_loop(self, goal_x: Tensor, goal_y: Tensor, walks: Tensor, reload: Tensor):
        """One game loop of all units at once; arguments (B, U) each."""
        x, y, alive, aim = self.x, self.y, self.health > 0, self.target.clamp(min=0)
        attacks = alive & (self.target >= 0) & alive.gather(1, aim)
        to_x = torch.where(attacks, x.gather(1, aim), goal_x) - x
        to_y = torch.where(attacks, y.gather(1, aim), goal_y) - y
        distance = (to_x.square() + to_y.square()).sqrt().clamp_(min=1e-6)
        missing = distance - torch.where(attacks, self.reach + self.radius[aim], 0)

        # Who has its target in reach shoots as soon as its weapon is ready, all at once
        fires = attacks & (missing <= 1e-3) & (self.cooldown <= 0)  # 1e-3: float32 may walk a hair too short
        hit = fires[:, :, None] & (aim[:, :, None] == self.index)  # (B, U attacker, U victim)
        if self.any_beam:
            hit |= (fires & self.beam)[:, :, None] & self.swept(to_x, to_y, distance)
        self.wound(hit * self.shot)
        self.cooldown.copy_(torch.where(fires, reload, self.cooldown).sub_(1).clamp_(min=0))
        self.shots.copy_(torch.where(fires, aim, self.shots))

        # Who has not, walks until it has; the others walk to their goal, or stand
        walk = torch.minimum(missing.clamp_(min=0), self.speed) / distance * (alive & (attacks | walks))
        x.addcmul_(to_x, walk)
        y.addcmul_(to_y, walk)

        # Two living units that overlap are pushed apart, each by half
        tie = x + 1e-4 * self.index  # two on one spot part too
        gap_x, gap_y = tie[:, :, None] - tie[:, None], y[:, :, None] - y[:, None]  # (B, U, U)
        gap = (gap_x.square() + gap_y.square()).sqrt_().clamp_(min=1e-6)
        push = (self.contact / gap).sub_(1).clamp_(min=0).mul_(0.5 * alive[:, None])
        x.add_((gap_x * push).sum(2)).clamp_(self.geometry.walk_x[0], self.geometry.walk_x[1] - 1e-3)
        y.add_((gap_y * push).sum(2)).clamp_(self.geometry.walk_y[0], self.geometry.walk_y[1] - 1e-3)

    def swept(self, to_x: Tensor, to_y: Tensor, distance: Tensor) -> Tensor:
        """(B, U attacker, U victim): would a beam across the line to the attacker's target touch the victim's body?"""
        along_x, along_y = (to_x / distance)[:, :, None], (to_y / distance)[:, :, None]
        off_x = self.x[:, None] - (self.x + to_x)[:, :, None]  # from the target
        off_y = self.y[:, None] - (self.y + to_y)[:, :, None]
        return (((off_x * along_x + off_y * along_y).abs() <= BEAM_DEPTH / 2 + self.radius)
                & ((off_x * along_y - off_y * along_x).abs() <= BEAM_WIDTH / 2 + self.radius))

    def wound(self, attack: Tensor):
        """Takes whole shots, `attack` (B, U attacker, U victim) in points, off shields, then off health."""
        total = attack.cumsum(1)
        # In the attackers' order: the part of each shot that the shield lets through, as hits that met none of it ...
        through = torch.minimum((total - self.shield[:, None]).clamp_(min=0), attack)
        whole = (through / self.damage).floor_()
        rest = through - whole * self.damage  # ... and what is left of the one that broke it
        lost = whole * (self.damage - self.armour) + rest.sub_(self.armour).clamp_(min=0)
        self.health.sub_(lost.sum(1)).clamp_(min=0)
        self.calm.add_(1).mul_(total[:, -1] == 0)
        self.shield.sub_(total[:, -1]).clamp_(min=0).add_(REGENERATION * (self.calm > REGENERATION_DELAY))
        self.shield.copy_(torch.minimum(self.shield, self.shield_max))

    # smac's interface -----------------------------------------------------------------------------------------------

    def look(self, reward: Tensor) -> Step:
        """What the battle is now, and `reward` (B,) for what led there."""
        ours, theirs = (self.health > 0).split([self.n_agents, self.n_enemies], 1)
        terminated = ~(ours.any(1) & theirs.any(1))
        info = {"battle_won": ours.any(1) & ~theirs.any(1), "dead_allies": (~ours).sum(1),
                "dead_enemies": (~theirs).sum(1)}
        avail = self.available()
        return Step(self.observation(avail), self.state(), avail, reward, terminated,
                    ~terminated & (self.steps >= self.episode_limit), info)

    def offsets(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and distance from each ally to each enemy, (B, N, M) each."""
        N = self.n_agents
        dx, dy = self.x[:, None, N:] - self.x[:, :N, None], self.y[:, None, N:] - self.y[:, :N, None]
        return dx, dy, (dx.square() + dy.square()).sqrt()

    def available(self) -> Tensor:
        """(B, N, A) bool. A move goes two cells, but only the first one is looked at."""
        N, (left, right), (bottom, top) = self.n_agents, self.geometry.walk_x, self.geometry.walk_y
        x, y, alive = self.x[:, :N], self.y[:, :N], self.health > 0
        ahead = MOVE / 2
        moves = [y + ahead < top, y - ahead >= bottom, x + ahead < right, x - ahead >= left]
        shoot = (self.offsets()[2] <= SHOOT) & alive[:, None, N:]
        alive = alive[:, :N]
        return torch.cat([torch.stack([~alive, alive, *(move & alive for move in moves)], 2),
                          shoot & alive[:, :, None]], 2)

    def bodies(self) -> Tensor:
        """(B, U, 1 + s + u): health, [shield], [type bits] of every unit, in parts of the whole."""
        columns = [(self.health / self.health_max)[..., None], self.type_bits.expand(self.n_envs, -1, -1)]
        if self.any_shield:
            columns.insert(1, (self.shield / self.shield_max)[..., None])
        return torch.cat(columns, 2)

    def observation(self, avail: Tensor) -> Tensor:
        """(B, N, O): open directions, every enemy, every other ally, itself; zeros for the dead and the unseen."""
        N, alive, bodies = self.n_agents, self.health > 0, self.bodies()
        dx, dy = self.x[:, None] - self.x[:, :N, None], self.y[:, None] - self.y[:, :N, None]  # (B, N, U)
        distance = (dx.square() + dy.square()).sqrt()
        first = torch.ones_like(distance)  # an ally: seen; an enemy: may be attacked
        first[:, :, N:] = avail[:, :, ATTACK:]
        units = torch.cat([torch.stack([first, distance / SIGHT, dx / SIGHT, dy / SIGHT], 3),
                           bodies[:, None].expand(-1, N, -1, -1)], 3)
        units *= (alive[:, None] & (distance < SIGHT))[..., None]
        others = units.gather(2, self.others[None, :, :, None].expand(self.n_envs, -1, -1, units.shape[3]))
        return torch.cat([avail[:, :, NORTH:ATTACK], units[:, :, N:].flatten(2), others.flatten(2), bodies[:, :N]],
                         2) * alive[:, :N, None]

    def state(self) -> Tensor:
        """(B, S): every ally, every enemy, the allies' last actions one-hot; zeros for the dead, and before the first
        step."""
        N, alive, bodies = self.n_agents, (self.health > 0)[..., None], self.bodies()
        (center_x, center_y), (extent_x, extent_y) = self.geometry.center, self.geometry.extent
        columns = [self.cooldown / self.cooldown_norm, (self.x - center_x) / extent_x, (self.y - center_y) / extent_y]
        units = torch.cat([bodies[..., :1], torch.stack(columns, 2), bodies[..., 1:]], 2) * alive  # (B, U, 4 + s + u)
        enemies = torch.cat([units[:, N:, :1], units[:, N:, 2:]], 2)  # without the cooldown
        last = self.last_actions[..., None] == torch.arange(self.n_actions, device=self.device)
        return torch.cat([units[:, :N].flatten(1), enemies.flatten(1), last.flatten(1)], 1)

    def reward(self, points: Tensor, alive: Tensor) -> Tensor:
        """(B,): damage to enemies + 10 per kill + 200 for the win, scaled to make 20 in all. `points`, `alive` (B, U):
        health + shield, and who lived, before the step. subtle: smac takes the absolute value of the sum, so it pays
        for enemy shields where they grow back faster than they are shot down."""
        N, lives = self.n_agents, self.health > 0
        change = (points - (self.health + self.shield) * lives + 10 * ~lives) * alive
        won = lives[:, :N].any(1) & ~lives[:, N:].any(1)
        return (change[:, N:].sum(1).abs() + 200 * won) * (20 / self.max_reward)

    # Beyond smac ----------------------------------------------------------------------------------------------------

    def heuristic(self) -> Tensor:
        """(B, N) actions: attack the closest enemy until it dies, then the next; walk to it where it is too far."""
        N, avail, (dx, dy, distance) = self.n_agents, self.available(), self.offsets()
        closest = distance.masked_fill_(self.health[:, None, N:] <= 0, torch.inf).argmin(2) + ATTACK
        last = self.last_actions.clamp(min=0)
        attack = torch.where((last >= ATTACK) & avail.gather(2, last[..., None])[..., 0], last, closest)
        dx, dy = (d.gather(2, attack[..., None] - ATTACK)[..., 0] for d in (dx, dy))
        walk = torch.where(dx.abs() > dy.abs(), torch.where(dx > 0, EAST, WEST), torch.where(dy > 0, NORTH, SOUTH))
        wish = torch.stack([attack, walk, torch.full_like(walk, STOP), torch.zeros_like(walk)], 2)  # the first possible
        return wish.gather(2, avail.gather(2, wish).float().argmax(2, keepdim=True))[..., 0]

    def draw(self, ax, b: int = 0):
        """Draws environment b as it is now onto a matplotlib Axes: units, health (green), shields (blue), shots."""
        from matplotlib.patches import Circle
        ax.set(xlim=self.geometry.walk_x, ylim=self.geometry.walk_y, aspect="equal", xticks=[], yticks=[])
        facts = self.x, self.y, self.health, self.shield, self.shots
        x, y, health, shield, shots = (fact[b].tolist() for fact in facts)
        for i, name in enumerate(self.names):
            kind, color = KINDS[name], "tab:blue" if i < self.n_agents else "tab:red"
            if shots[i] >= 0:
                ax.plot([x[i], x[shots[i]]], [y[i], y[shots[i]]], color=color, linewidth=1, zorder=1)
            if health[i] <= 0:
                ax.plot(x[i], y[i], "x", color=color, alpha=0.3, zorder=0)
                continue
            ax.add_patch(Circle((x[i], y[i]), kind.radius, color=color, zorder=2))
            ax.text(x[i], y[i], name[0].upper(), color="white", size=6, ha="center", va="center", zorder=3)
            for height, part, color in ((0.2, health[i] / kind.health, "tab:green"),
                                        (0.5, shield[i] / max(kind.shield, 1), "deepskyblue")):
                ax.plot([x[i] - 0.5, x[i] - 0.5 + part], 2 * [y[i] + kind.radius + height], color=color,
                        linewidth=2 if part > 0 else 0, solid_capstyle="butt", zorder=3)


# ---------------------------------------------------------------------------------------------------- worker processes
#
# A single environment has PyMARL's interface: get_env_info() -> dict(n_agents, n_actions, obs_shape, state_shape,
# episode_limit), reset(), step(list of N ints) -> (team reward, terminated, info), get_obs() (N, O), get_state() (S),
# get_avail_actions() (N, A), close(). info["episode_limit"] = True tells of a time limit; an end without it is an end.
#
# subtle: plain child processes rather than `multiprocessing`. fork copies torch's threads' locks in whatever state
# they are; spawn and forkserver import the user's script again, which trains again where `if __name__` is missing.

PROTOCOL = ("get_env_info", "reset", "step", "get_obs", "get_state", "get_avail_actions", "close")
SIZES = ("n_agents", "n_actions", "obs_shape", "state_shape", "episode_limit")
FACTS = ("battle_won", "dead_allies", "dead_enemies")  # what info may say of an episode, and the metrics show
PADDING = {"obs": 0, "state": 0, "avail": True, "reward": 0, "terminated": True, "truncated": False}
GRACE = 10.0  # seconds for a worker to close its environment before it is killed with all it started
_inside_worker = False


class GameFailure(Exception):
    """Raised by a single environment: the game misbehaved, so the episode is void, but a new game may well work."""


class Workers:
    """B single environments, one process each, behind the batched interface; Linux and macOS.

    name: "smac:MAP", "ma_gym:ID" or "module:Class"; arguments: keyword arguments for that environment.
    seed: seeds the generator, from which each worker, and each that replaces one, draws its own seed.
    timeout: seconds that one reset or step may take before the game counts as hung and is killed.
    max_failures: void episodes in a row of one environment after which EnvFailure is raised.
    voided: void episodes so far. info: "void", and those of FACTS that the environment tells of.
    """

    def __init__(self, name, n_envs=32, device="cpu", seed=0, arguments=None, timeout=120.0, max_failures=10):
        if _inside_worker:
            raise UsageError(f"{name}: its module makes environments when it is imported: put that under "
                             "`if __name__ == '__main__':`")
        if "seed" in (arguments or {}):
            raise UsageError(f"{name}: seed is not an argument of the environment here: each gets its own, from --seed")
        self.name, self.n_envs, self.device, self.arguments = name, n_envs, torch.device(device), arguments or {}
        self.timeout, self.max_failures, self.voided = timeout, max_failures, 0
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.seeds, self.failures, self.told = [0] * n_envs, [0] * n_envs, set()
        self.running, self.void = np.zeros(n_envs, bool), np.zeros(n_envs, bool)
        self.asked, self.fresh = set(), set()  # a reset was sent, not answered; was answered, nothing played since
        self.memory = tempfile.TemporaryFile()  # shared; without a name, so nothing can leave it behind
        self.workers = [None] * n_envs  # (process, pipe)
        self.close = weakref.finalize(self, end_workers, self.workers)  # may be called twice; also runs at exit

        self.start_by = time.monotonic() + timeout / 2  # no further try after that, if it never started
        for b in range(n_envs):
            self._start(b)
        everyone = range(n_envs)
        self._send("info", everyone)
        lost, infos = self._collect("info", everyone)
        for b, why in lost.items():
            self._give_up(EnvFailure(f"{name}: environment {b} (seed {self.seeds[b]}) did not start: {why}"))
        info = infos[0]
        if any(other != info for other in infos.values()):
            self._give_up(UsageError(f"{name}: all environments must have the same sizes, got {infos}"))
        self.n_agents, self.n_actions, self.obs_dim, self.state_dim, self.episode_limit = (info[k] for k in SIZES)
        if info.get("note"):
            print(f"{name}: {info['note']}", file=sys.stderr)
        if name.startswith("smac:") and str(self.arguments.get("heuristic_ai")).lower() == "true":
            # smac finds its heuristic's actions itself, within step, whatever it is sent
            self.heuristic = lambda: torch.zeros(self.n_envs, self.n_agents, dtype=torch.int64, device=self.device)
        self.rows = shared_rows(self.memory.fileno(), n_envs, info, create=True)
        self.reset()  # a reset that cannot work is told now; the first reset() of the user gets this same start
        self.start_by = math.inf

    def reset(self):
        """Start all episodes -> Step. What does not start is replaced and tried again."""
        # smac must not be reset twice before its first episode has ended, so an unused start is used
        waiting = [b for b in range(self.n_envs) if b not in self.fresh]
        while waiting:
            new = [b for b in waiting if b not in self.asked]
            self._send("reset", new)
            lost, _ = self._collect("reset", waiting)
            self.asked -= set(waiting)
            self._replace(lost)
            waiting = list(lost)
        self.fresh = set(range(self.n_envs))
        self.running[:], self.void[:] = True, False
        return self._now()

    def step(self, actions):
        """Play actions (B, N) in the episodes still running -> Step."""
        self.rows["actions"][:] = actions.cpu().numpy()
        self.rows["reward"][~self.running] = 0
        playing = np.flatnonzero(self.running).tolist()
        self.fresh = set()
        self._send("step", playing)
        lost, _ = self._collect("step", playing)
        self.void[list(lost)] = True
        self._replace(lost)
        for b in playing:
            self.running[b] = not (self.void[b] or self.rows["terminated"][b] or self.rows["truncated"][b])
            if not self.running[b] and not self.void[b]:
                self.failures[b] = 0
        return self._now()

    def _now(self):
        rows = {key: torch.tensor(self.rows[key], device=self.device) for key in (*PADDING, "facts")}  # copies
        void, facts = torch.tensor(self.void, device=self.device), rows["facts"]
        if self.void.any():  # padding: the row belongs to the environment that is being made in its place
            for key, padding in PADDING.items():
                rows[key][void] = padding
            facts[void] = 0
        self.told |= set(np.flatnonzero(~np.isnan(self.rows["facts"][~self.void]).all(0)).tolist())
        info = {FACTS[k]: facts[:, k] == 1 if FACTS[k] == "battle_won" else facts[:, k].nan_to_num()
                for k in sorted(self.told)}
        return Step(*(rows[key] for key in Step._fields[:-1]), info=dict(info, void=void))

    def _start(self, b):
        self.seeds[b] = int(torch.randint(2**31 - 1, (), generator=self.generator, device=self.device))
        ours, theirs = multiprocessing.Pipe()
        fds = (theirs.fileno(), self.memory.fileno())
        spec = {"path": sys.path, "module": __name__, "name": self.name, "arguments": self.arguments,
                "seed": self.seeds[b], "b": b, "n_envs": self.n_envs, "pipe": fds[0], "memory": fds[1]}
        code = ("import importlib, json, sys; spec = json.loads(sys.argv.pop()); sys.path[:] = spec['path']; "
                "importlib.import_module(spec['module']).work(spec)")
        # A session of its own: Ctrl-C reaches the trainer alone, and the worker can be ended with all it started.
        # What the game prints goes to stderr (2): the trainer's stdout ends with its result.
        process = subprocess.Popen([sys.executable, "-c", code, json.dumps(spec)], stdin=subprocess.DEVNULL, stdout=2,
                                   pass_fds=fds, start_new_session=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        theirs.close()
        self.workers[b] = process, ours

    def _send(self, command, who):
        for b in who:
            try:
                self.workers[b][1].send_bytes(command.encode())
            except OSError:
                pass  # it has ended, which _collect finds

    def _collect(self, command, who):
        """Wait for answers -> ({b: why} of those whose game failed, {b: what} of the others)."""
        deadline, lost, answers = time.monotonic() + self.timeout, {}, {}
        for b in who:
            pipe = self.workers[b][1]
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    lost[b] = f"no answer to {command}() within {self.timeout:g} seconds"
                    continue
                kind, _, text = pipe.recv_bytes().decode().partition(" ")
            except (EOFError, OSError):
                kind, text = "void", f"its process ended in {command}()"
            if kind == "usage":
                self._give_up(UsageError(text))
            if kind == "error":
                self._give_up(EnvFailure(f"{self.name}: environment {b} (seed {self.seeds[b]}) failed in {text}"))
            if kind == "void":
                lost[b] = text
            else:
                answers[b] = json.loads(text or "null")
        return lost, answers

    def _replace(self, lost):
        """End the workers {b: why} whose games failed and ask new ones for a start; the next reset waits for them."""
        for b, why in lost.items():
            self.voided += 1
            self.failures[b] += 1
            tries = self.max_failures if self.start_by == math.inf else 3  # what never started is told soon
            if self.failures[b] >= tries or time.monotonic() > self.start_by:
                self._give_up(EnvFailure(f"{self.name}: environment {b} (seed {self.seeds[b]}) failed "
                                         f"{self.failures[b]} time(s) in a row, the last time: {why}"))
            print(f"{self.name}: environment {b}: episode void, starting it again: {why}", file=sys.stderr)
        end_workers([self.workers[b] for b in lost])
        for b in lost:
            self._start(b)
        self._send("reset", lost)
        self.asked |= set(lost)

    def _give_up(self, error):
        self.close()
        raise error


def end_workers(workers):
    """Let each worker close its environment; then end what is left of it and of what it started."""
    alive = [worker for worker in workers if worker is not None]
    for process, _ in alive:
        os.kill(process.pid, signal.SIGTERM)  # not reaped yet, so the number is still this process's
    deadline = time.monotonic() + GRACE
    for process, pipe in alive:
        try:
            while pipe.poll(max(0.0, deadline - time.monotonic())):
                pipe.recv_bytes()  # an answer nobody waits for
        except (EOFError, OSError):
            pass  # it has ended
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nobody left; macOS says PermissionError where all are zombies
            pass
        process.wait()
        pipe.close()
    workers[:] = [None] * len(workers)


def shared_rows(memory, n_envs, info, create=False):
    """The arrays that trainer and workers share, as views of the file `memory`: {name: (B, ...)}."""
    B, (N, A, O, S, _) = n_envs, (info[key] for key in SIZES)
    layout = {"actions": ((B, N), np.int64), "obs": ((B, N, O), np.float32), "state": ((B, S), np.float32),
              "reward": ((B,), np.float32), "facts": ((B, len(FACTS)), np.float32), "avail": ((B, N, A), np.bool_),
              "terminated": ((B,), np.bool_), "truncated": ((B,), np.bool_)}  # by falling item size: all aligned
    nbytes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in layout.values()]
    if create:
        os.ftruncate(memory, sum(nbytes))
    buffer = mmap.mmap(memory, sum(nbytes))
    return {key: np.ndarray(shape, dtype, buffer, sum(nbytes[:i]))
            for i, (key, (shape, dtype)) in enumerate(layout.items())}


def work(spec):
    """The life of a worker: answer "info", "reset" and "step" until the trainer ends it or is gone."""
    global _inside_worker
    _inside_worker = True
    pipe = multiprocessing.connection.Connection(spec["pipe"])

    def leave(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the environment is being closed
        raise SystemExit

    def leave_when_alone():  # whatever became of the trainer, kill -9 too, its end of the pipe is closed
        poll = select.poll()
        poll.register(pipe.fileno(), 0)
        poll.poll()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)  # interrupts what the environment waits for
        time.sleep(GRACE)
        os.killpg(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=leave_when_alone, daemon=True).start()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setscheduler"):  # Linux: a worker that wakes leaves the trainer to wake the rest
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # for environments that draw from these
        seed(spec["seed"])
    env = None
    try:
        while True:
            command = pipe.recv_bytes().decode()
            try:
                answer = "ok"
                if env is None:
                    env = single(spec["name"], spec["seed"], spec["arguments"])
                    info = check(spec["name"], env)
                    rows, steps = None, 0
                if rows is None and command != "info":
                    shared = shared_rows(spec["memory"], spec["n_envs"], info)
                    rows = {key: row[spec["b"], ...] for key, row in shared.items()}  # ...: a view where row is (B,)
                if command == "info":
                    answer = "ok " + json.dumps(info)
                elif command == "reset":
                    env.reset()
                    steps = 0
                    rows["reward"][...], rows["terminated"][...], rows["truncated"][...] = 0, False, False
                    rows["facts"][:] = np.nan
                    look(spec["name"], env, info, rows)
                else:
                    steps += 1
                    play(spec["name"], env, info, rows, steps)
            except UsageError as error:
                answer = "usage " + one_line(error)
            except GameFailure as error:
                answer = "void " + one_line(error)
            except Exception as error:  # whatever it is, the user is to read it
                at = traceback.extract_tb(error.__traceback__)[-1]
                answer = (f"error {'start' if env is None else command}: {type(error).__name__}: {one_line(error)} "
                          f"({os.path.basename(at.filename)}, line {at.lineno})")
            pipe.send_bytes(answer.encode())
    except (EOFError, OSError):
        pass  # the trainer is gone
    finally:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing interrupts the closing any more
            if env is not None:
                env.close()
            sys.stdout.flush()
            sys.stderr.flush()
        except Exception as error:  # it must not keep this process from ending
            print(f"{spec['name']}: environment {spec['b']} failed in close: {one_line(error)}", file=sys.stderr)
        finally:
            os.killpg(os.getpid(), signal.SIGKILL)  # all that the environment started and left, and this process too


def one_line(error):
    return " ".join(str(error).split())


# What a single environment says is checked here, at the door, so that nothing wrong is learned further in.

def check(name, env):
    """Its methods and sizes -> info: SIZES, and perhaps a note for the user."""
    for method in PROTOCOL:
        if not callable(getattr(env, method, None)):
            raise UsageError(f"{name}: the environment must have the methods {', '.join(PROTOCOL)}; "
                             f"{type(env).__name__} has no {method}()")
    info = env.get_env_info()
    if not isinstance(info, dict):
        raise UsageError(f"{name}: get_env_info() must give a dict with {', '.join(SIZES)}; got {info!r}")
    for key in SIZES:
        if key not in info:
            raise UsageError(f"{name}: get_env_info() must give {', '.join(SIZES)}; {key} is missing")
        if not isinstance(info[key], (int, np.integer)) or info[key] < 1:
            raise UsageError(f"{name}: get_env_info()[{key!r}] must be a whole number above 0; got {info[key]!r}")
    return dict({key: int(info[key]) for key in SIZES}, note=str(info.get("note", "")))


def look(name, env, info, rows):
    """Copy what the environment shows into its rows of the shared memory."""
    N, A, O, S, _ = (info[key] for key in SIZES)
    for key, method, shape, means in (("obs", "get_obs", (N, O), "n_agents, obs_shape"),
                                      ("state", "get_state", (S,), "state_shape"),
                                      ("avail", "get_avail_actions", (N, A), "n_agents, n_actions")):
        given = getattr(env, method)()
        try:
            array = np.asarray(given, rows[key].dtype)
        except (TypeError, ValueError):
            raise UsageError(f"{name}: {method}() must give numbers of shape {shape} = ({means}); "
                             f"got a {type(given).__name__} that is no such array") from None
        if array.shape != shape:
            raise UsageError(f"{name}: {method}() must have shape {shape} = ({means}), got {array.shape}")
        if not np.isfinite(array).all():
            raise UsageError(f"{name}: {method}() must be finite, got nan or inf")
        rows[key][:] = array
    if not rows["avail"].any(1).all():
        raise UsageError(f"{name}: get_avail_actions() must leave each agent one action at least, also when it is dead "
                         f"or the episode over; agent {int(rows['avail'].any(1).argmin())} has none")


def play(name, env, info, rows, steps):
    """One step with the actions in the rows; the result goes into the rows."""
    result = env.step(rows["actions"].tolist())  # a list: smac writes its heuristic's actions into it
    if not isinstance(result, tuple) or len(result) != 3:
        raise UsageError(f"{name}: step() must give (reward, terminated, info); got a {type(result).__name__}"
                         + (f" of {len(result)}" if isinstance(result, (tuple, list)) else ""))
    reward, terminated, said = result
    if np.ndim(reward) != 0 or not math.isfinite(reward):
        raise UsageError(f"{name}: step() must give one finite reward for the team; got {one_line(reward)}")
    if not isinstance(terminated, (bool, np.bool_, int)):  # a list of dones would be true even if all were False
        raise UsageError(f"{name}: step() must give one terminated, True or False; got {one_line(terminated)}")
    if not isinstance(said, dict):
        raise UsageError(f"{name}: step() must give a dict as info; got {one_line(said)}")
    limit = bool(said.get("episode_limit")) or not terminated and steps >= info["episode_limit"]
    rows["reward"][...] = reward
    rows["terminated"][...], rows["truncated"][...] = bool(terminated) and not limit, limit
    rows["facts"][:] = [said.get(key, math.nan) for key in FACTS]
    look(name, env, info, rows)


# ------------------------------------------------------------------------------------------------- single environments

def single(name, seed, arguments):
    """One environment with PyMARL's interface, made in the worker, by its name."""
    kind, _, which = name.partition(":")
    if kind == "smac":
        return Smac(which, seed, arguments)
    if kind == "ma_gym":
        return MaGym(which, seed, arguments)
    sys.path.insert(0, os.getcwd())  # only now: there may be another file of this one's name
    try:
        module = importlib.import_module(kind)
    except ModuleNotFoundError as error:
        if error.name != kind:
            raise
        raise UsageError(f"{name}: there is no module {kind} in {os.getcwd()} or on Python's path") from None
    made = getattr(module, which, None)
    if not callable(made):
        raise UsageError(f"{name}: the module {kind} must have a class {which}; it has "
                         f"{', '.join(key for key, value in vars(module).items() if inspect.isclass(value)) or 'none'}")
    arguments = fit_arguments(name, made, arguments)
    accepts = inspect.signature(made).parameters
    if "seed" in accepts or any(p.kind == p.VAR_KEYWORD for p in accepts.values()):
        arguments["seed"] = seed
    return made(**arguments)


def fit_arguments(name, function, arguments):
    """Arguments as typed, {key: text}, as `function` takes them: text where its default is text, else as it reads."""
    parameters, fitted = dict(inspect.signature(function).parameters), {}
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    names = sorted(key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    for key, value in arguments.items():
        if key not in names and not anything:
            raise UsageError(f"{name}: it has no argument {key}; it has {', '.join(names) or 'none'}")
        default = parameters[key].default if key in names else None
        if isinstance(value, str) and not isinstance(default, str):
            try:
                value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
            except (ValueError, SyntaxError):
                pass  # it is text
        fitted[key] = str(value) if isinstance(default, str) else value
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UsageError(f"{name}: {key} must be true or false; got {value}")
        if type(default) in (int, float) and type(value) not in (int, float):
            raise UsageError(f"{name}: {key} must be a number; got {value}")
    return fitted


class Smac:
    """smac's StarCraft2Env; whatever the game does wrong is raised as GameFailure, which ends this object's life."""

    def __init__(self, map_name, seed, arguments):
        name, arguments = f"smac:{map_name}", dict(arguments)
        install = "make install-smac, or: pip install git+https://github.com/oxwhirl/smac.git@d6aab33"
        found = importlib.util.find_spec("smac")
        if found is None:
            raise UsageError(f"{name}: smac is not installed: {install}")
        if not any((Path(p) / "env" / "starcraft2").is_dir() for p in found.submodule_search_locations or []):
            raise UsageError(f"{name}: the smac installed here is not StarCraft's (PyPI's is AutoML's optimiser): "
                             f"pip uninstall smac, then {install}")
        try:
            from absl import flags
            from smac.env import StarCraft2Env
            from smac.env.starcraft2.maps import smac_maps
        except Exception as error:  # what protobuf raises has changed with its versions
            version = importlib.metadata.version("protobuf")
            if int(version.split(".")[0]) < 4:
                raise
            raise UsageError(f"{name}: smac needs protobuf 3.20.3, got {version}: pip install protobuf==3.20.3 "
                             f"({type(error).__name__}: {one_line(error)[:60]})") from None
        maps = smac_maps.get_smac_map_registry()
        if map_name not in maps:
            why = "5m is not in smac's release, but skirmish:5m has it" if map_name == "5m" else "no such map"
            raise UsageError(f"{name}: {why}; smac has {', '.join(sorted(maps))}")
        where = os.environ.get("SC2PATH", "~/StarCraftII")
        game = Path(where).expanduser()
        if not where or not game.is_dir():
            raise UsageError(f"{name}: SC2PATH must be the folder of StarCraft II, "
                             f"{'is ' + repr(where) if 'SC2PATH' in os.environ else 'is not set'}: no such folder")
        if not any(game.glob("Versions/Base*")):
            raise UsageError(f"{name}: SC2PATH={where} holds no game: expected Versions/Base*/ in it")
        if not (game / "Maps" / "SMAC_Maps" / f"{map_name}.SC2Map").is_file():
            raise UsageError(f"{name}: the map file is missing: expected {map_name}.SC2Map in {where}/Maps/SMAC_Maps "
                             "(from smac's SMAC_Maps.zip)")
        # pysc2 waits 360 seconds for a game that hangs or does not start; ours to set
        flags.FLAGS.sc2_timeout = int(arguments.pop("sc2_timeout", 60))
        version = arguments.pop("game_version", None)  # 4.10 is text, not 4.1
        arguments = fit_arguments(name, StarCraft2Env, arguments)
        if version is not None:
            arguments["game_version"] = str(version)
        if arguments.get("replay_dir"):  # pysc2 would look for it in $SC2PATH/Replays, and make it in a race
            arguments["replay_dir"] = os.path.abspath(arguments["replay_dir"])
            os.makedirs(arguments["replay_dir"], exist_ok=True)
            arguments.setdefault("replay_prefix", f"{map_name}_{seed}_")  # pysc2 adds the second: workers would collide
        self.env = StarCraft2Env(map_name=map_name, seed=seed, **arguments)
        self.help = f"check the game and the maps under SC2PATH={where}, and the game's version"
        self.replay, self.episodes, self.began = bool(arguments.get("replay_dir")), 0, False
        self.get_obs, self.get_state, self.get_env_info = self.env.get_obs, self.env.get_state, self.env.get_env_info
        self.get_avail_actions = self.env.get_avail_actions

    def reset(self):
        if self.began and self.episodes == 0:  # subtle: smac would add to max_reward and so shrink all later rewards
            raise GameFailure("reset before the first episode had ended, which smac cannot do")
        before = self.env.force_restarts
        try:
            self.env.reset()
        except Exception as error:  # a game that dies shows in many ways; their number in a row is bounded
            raise GameFailure(f"reset: {type(error).__name__}: {one_line(error)}; {self.help}") from None
        self.began = True
        if self.env.force_restarts != before or not all(unit.health > 0 for unit in self.env.agents.values()):
            raise GameFailure("reset: the game crashed and was started again, without units")

    def step(self, actions):
        try:
            reward, terminated, info = self.env.step(actions)
        except AssertionError:
            raise  # an unavailable action: our mistake, not the game's
        except Exception as error:
            raise GameFailure(f"step: {type(error).__name__}: {one_line(error)}") from None
        if terminated and not info:  # smac's (0, True, {}), with stale observations
            raise GameFailure("step: the game crashed and smac started it again")
        self.episodes += bool(terminated)
        return reward, terminated, info

    def close(self):
        try:
            if self.replay and self.episodes:
                self.env.save_replay()  # one file holds all episodes of this game
        finally:
            self.env.close()


class MaGym:
    """Any registered ma-gym environment; team reward = sum, the episode ends when all agents are done."""

    def __init__(self, which, seed, arguments):
        name, arguments = f"ma_gym:{which}", dict(arguments)
        try:
            import gym
            import ma_gym  # noqa: F401  (importing it registers its environments)
        except ModuleNotFoundError as error:
            raise UsageError(f"{name}: {error.name} is not installed: `make install` adds ma-gym, "
                             f"on Python 3.10 and 3.11 alone; this is {sys.version.split()[0]}") from None
        specs = {spec.id: spec for spec in gym.envs.registry.all() if "ma_gym" in str(spec.entry_point)}
        if which not in specs:
            raise UsageError(f"{name}: no such environment; ma-gym has {', '.join(sorted(specs))}")
        gym.logger.set_level(gym.logger.ERROR)  # it warns of its own spaces at each start
        limit = arguments.pop("episode_limit", None)
        entry = specs[which].entry_point
        entry = gym.envs.registration.load(entry) if isinstance(entry, str) else entry
        self.env = gym.make(which, **fit_arguments(name, entry, arguments))
        self.env.seed(seed)
        # Who cuts the episode: the environment itself (_max_steps) or gym's TimeLimit around it (_max_episode_steps)
        self.owner, self.steps = self.env, 0
        while not {"_max_steps", "_max_episode_steps"} & vars(self.owner).keys() and "env" in vars(self.owner):
            self.owner = self.owner.env
        own = vars(self.owner).get("_max_steps") or vars(self.owner).get("_max_episode_steps")
        if not (limit or own):
            raise UsageError(f"{name}: it has no time limit of its own: give one with --env-args episode_limit=300")
        self.limit = min(int(limit or own), own or math.inf)
        if "_max_episode_steps" in vars(self.owner):
            self.owner._max_episode_steps = math.inf  # step() below cuts instead
        if hasattr(self.env, "get_state") and not hasattr(np, "float"):
            np.float = float  # Combat's get_state() was written for NumPy before 1.24; this process alone sees it
        self.actions = [space.n for space in self.env.action_space]
        self.obs = self.env.reset()

    def get_env_info(self):
        own = hasattr(self.env, "get_state")
        note = ("the state is what the environment gives as its state" if own else
                "the environment offers no state: the state is the agents' observations, joined")
        return {"n_agents": self.env.n_agents, "n_actions": max(self.actions), "obs_shape": self.get_obs().shape[1],
                "state_shape": len(self.get_state()), "episode_limit": self.limit, "note": note}

    def reset(self):
        self.obs, self.steps = self.env.reset(), 0

    def step(self, actions):
        self.steps += 1
        last = self.steps >= self.limit
        if last and "_max_steps" in vars(self.owner):
            # subtle: at its limit ma-gym marks everybody done, a real end in that very step too; without the limit
            # only a real end does. The clock in the observation needs the limit, so they are made again with it.
            kept, self.owner._max_steps = self.owner._max_steps, math.inf
            self.obs, rewards, dones, _ = self.env.step(actions)
            self.owner._max_steps = kept
            self.obs = self.env.get_agent_obs()
        else:
            self.obs, rewards, dones, _ = self.env.step(actions)
        done = all(list(dones))
        return float(sum(rewards)), done or last, {"episode_limit": True} if last and not done else {}

    def get_obs(self):
        return np.asarray([np.ravel(obs) for obs in self.obs], np.float32)  # (N, O)

    def get_state(self):
        return np.ravel(self.env.get_state()) if hasattr(self.env, "get_state") else self.get_obs().ravel()  # (S)

    def get_avail_actions(self):
        return [[a < n for a in range(max(self.actions))] for n in self.actions]

    def close(self):
        self.env.close()


def make(name: str, n_envs: int = 32, device: str | torch.device = "cpu", seed: int = 0, arguments: dict | None = None):
    """The environment called `name`, or UsageError with the names there are.

    arguments: what a smac, ma_gym or own environment takes, {key: value or its text}; the batched ones take none.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind != "skirmish":
        return Workers(name, n_envs, device, seed, arguments)
    if arguments:
        raise UsageError(f"{name} takes no --env-args, got {', '.join(arguments)}")
    if kind == "skirmish":
        return Skirmish(rest, n_envs, device, seed)
    if name == "two-step":
        return TwoStep(n_envs, device, seed)
    if name in ("checkers", "checkers-v0", "checkers-v1", "checkers-v2", "checkers-v3"):
        return Checkers(int(name[-1]) if name[-1].isdigit() else 0, n_envs, device, seed)
    raise UsageError(f"unknown environment {name!r}; there are two-step, checkers, checkers-v1 .. -v3, skirmish:MAP, "
                     "smac:MAP, ma_gym:ID and module:Class")
