"""Environments behind one batched interface: B episodes side by side, on one device.

    env = envs.make("checkers", n_envs=32, device="cpu", seed=0)
    step = env.reset()                  # Step: obs, state, avail, reward, terminated, truncated, info
    step = env.step(actions)            # actions (B, N) int64
    env.close()

An environment has n_envs, n_agents, n_actions, obs_dim, state_dim, episode_limit and device. Where it makes sense it
also has generator (the random state that outlives an episode, which a checkpoint keeps), best_return (the best
undiscounted return that is known), heuristic() -> actions, and draw(axes, b), a picture of episode b as it stands.

Episodes run in lockstep: what an environment returns after its own episode has ended is padding until the next reset().
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
import os
import pickle
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
import typing
import weakref
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class UsageError(ValueError):
    """What was asked for cannot be done. The message is one line: what was expected, what came."""

class EnvFailure(RuntimeError):
    """An environment failed, so that the run cannot go on."""

class Step(typing.NamedTuple):
    """What reset() and step() return, for all B episodes."""
    obs: Tensor  # (B, N, O) float32
    state: Tensor  # (B, S) float32
    avail: Tensor  # (B, N, A) bool
    reward: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool: the task itself ended, no bootstrap
    truncated: Tensor  # (B,) bool: a time limit cut it off, bootstrap
    info: dict[str, Tensor]  # (B,) each: battle_won where there is a battle; void: throw this episode away

class Batched:
    def close(self):
        """There is nothing to end."""

# --------------------------------------------------------------------------------------------------- two-step, Checkers
class TwoStep(Batched):
    """The paper's two-step game (section 5): in state 1 agent 1's action alone picks 2A or 2B, which then pays.
    Both agents see the whole state, one-hot in the order 1, 2A, 2B: obs (B, 2, 3), state (B, 3)."""
    n_agents, n_actions, obs_dim, state_dim, episode_limit, best_return = 2, 2, 3, 3, 2, 8.0

    def __init__(self, n_envs=32, device="cpu"):
        self.n_envs, self.device = n_envs, torch.device(device)
        payoff = [[[0, 0], [0, 0]], [[7, 7], [7, 7]], [[0, 1], [1, 8]]]  # [state][agent 1's action][agent 2's action]
        self.payoff, self.one_hot = torch.tensor(payoff, device=self.device).float(), torch.eye(3, device=self.device)

    def reset(self):
        self.steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self.where = torch.zeros(self.n_envs, dtype=torch.int64, device=self.device)  # (B,) 0 is state 1, then 2A, 2B
        return self._step(torch.zeros(self.n_envs, device=self.device))

    def step(self, actions):
        reward = self.payoff[self.where, actions[:, 0], actions[:, 1]]
        self.where = torch.where(self.where == 0, 1 + actions[:, 0], self.where)
        self.steps = self.steps + 1
        return self._step(reward)

    def _step(self, reward):
        state = self.one_hot[self.where]
        avail = torch.ones(self.n_envs, 2, 2, dtype=torch.bool, device=self.device)
        terminated = (self.steps >= 2).repeat(self.n_envs)
        return Step(state[:, None].repeat(1, 2, 1), state, avail, reward, terminated, torch.zeros_like(terminated), {})

class Checkers(Batched):
    """ma-gym's Checkers-v0 .. v3 (VDN paper, section 4.2), equal to the original step for step.
    A 3x8 board of cells (row, column): nine apples and nine lemons alternate on columns 0-5, the agents start at (0, 6)
    and (2, 6). Actions: 0 down, 1 left, 2 up, 3 right, 4 stay; agent 0 moves first, and the edge or the other agent
    blocks. Entering a cell eats what lies there: an apple brings the team +10 if agent 0 eats it, +1 if agent 1 does,
    a lemon -10 and -1; every step costs 0.02. `terminated`: the last apple is eaten; `truncated`: step 100.
    An agent observes its coordinates and, of the 3x3 cells around it, (lemon, apple, agent 0, agent 1, wall) each;
    no wall exists. Variants 1 and 3: both agents get both observations; 2 and 3: each observation ends with the clock.
    obs (B, 2, O), O = 47, 94, 48, 96 for variant 0 .. 3. state (B, 67), the whole truth in any variant: nine apples and
    nine lemons (1 = still there), the clock (fraction of the limit), the cells of agent 0 and of agent 1, one-hot."""
    n_agents, n_actions, state_dim, episode_limit, best_return = 2, 5, 67, 100, 86.26

    def __init__(self, variant=0, n_envs=32, device="cpu"):
        self.variant, self.n_envs, self.device = variant, n_envs, torch.device(device)
        self.obs_dim = {0: 47, 1: 94, 2: 48, 3: 96}[variant]  # KeyError: there is no such variant
        tensor = lambda values: torch.tensor(values, device=self.device)  # noqa: E731
        cells = [(row, column) for row in range(3) for column in range(8)]  # the tables below have a row for each
        moves = (1, 0), (0, -1), (-1, 0), (0, 1), (0, 0)
        to = [[(row + down, column + right) for down, right in moves] for row, column in cells]
        self.target = tensor([[cells.index(cell if cell in cells else cells[i]) for cell in to[i]] for i in range(24)])
        self.place = tensor([[round(row / 3, 2), round(column / 7, 2)] for row, column in cells])  # ma-gym rounds too
        # The board is one row of numbers: 5 x 10 cells, with a margin, of lemon, apple, agent 0, agent 1 and wall each
        spot = lambda row, column: ((row + 1) * 10 + column + 1) * 5  # noqa: E731
        self.spot = tensor([spot(row, column) for row, column in cells])
        self.around = tensor([[spot(row + down, column + right) + layer for down in (-1, 0, 1) for right in (-1, 0, 1)
                               for layer in range(5)] for row, column in cells])  # (24, 45)
        apples, lemons = ([cell for cell in cells if cell[1] < 6 and sum(cell) % 2 == odd] for odd in (0, 1))
        self.food = tensor([spot(*cell) + 1 for cell in apples] + [spot(*cell) for cell in lemons])  # (18,)
        self.value = tensor([-10.0, -1.0, 10.0, 1.0])  # a lemon to agent 0, to agent 1, an apple to agent 0, to agent 1
        self.layers, self.one_hot = tensor([2, 3]), torch.eye(24, device=self.device)

    def reset(self):
        self.cell = torch.tensor([6, 22], device=self.device).repeat(self.n_envs, 1)  # (B, 2) where the agents are
        self.board = torch.zeros(self.n_envs, 250, device=self.device)               # (B, 250) without the agents
        self.board[:, self.food] = 1
        self.steps = torch.zeros((), dtype=torch.int64, device=self.device)          # shared: all run in lockstep
        return self._step(torch.zeros(self.n_envs, device=self.device))

    def step(self, actions):
        old, new = self.cell.unbind(1), self.target[self.cell, actions].unbind(1)
        first = torch.where(new[0] == old[1], old[0], new[0])                        # agent 0 moves first
        self.cell = torch.stack([first, torch.where(new[1] == first, old[1], new[1])], 1)
        entered = torch.cat([self.spot[self.cell], self.spot[self.cell] + 1], 1)     # (B, 4) lemons, apples
        reward = (self.board.gather(1, entered) * self.value).sum(1) - 0.02
        self.board = self.board.scatter(1, entered, 0)
        self.steps = self.steps + 1
        return self._step(reward)

    def _step(self, reward):
        B, food, clock = self.n_envs, self.board[:, self.food], self.steps / self.episode_limit
        board = self.board.scatter(1, self.spot[self.cell] + self.layers, 1)
        seen = board.gather(1, self.around[self.cell].view(B, 90)).view(B, 2, 45)
        obs = torch.cat([self.place[self.cell], seen] + [clock.expand(B, 2, 1)] * (self.variant in (2, 3)), 2)
        if self.variant in (1, 3):
            obs = obs.view(B, 1, self.obs_dim).repeat(1, 2, 1)
        state = torch.cat([food, clock.expand(B, 1), self.one_hot[self.cell].view(B, 48)], 1)
        avail = torch.ones(B, 2, 5, dtype=torch.bool, device=self.device)            # bumping is allowed
        terminated = ~food[:, :9].any(1)                                             # no apple is left
        truncated = ~terminated & (self.steps >= self.episode_limit)
        return Step(obs, state, avail, reward, terminated, truncated, {})

    def draw(self, axes, b=0):
        """Draws environment b as it is now: apples red, lemons yellow, agent 0 a circle, agent 1 a square."""
        looks = dict(marker="D", color="gold", ms=12), dict(marker="o", color="tab:red", ms=16)  # a lemon, an apple
        for spot in self.food[self.board[b, self.food] > 0].tolist():
            axes.plot(spot // 5 % 10 - 1, spot // 50 - 1, **looks[spot % 5])
        for agent, cell in enumerate(self.cell[b].tolist()):
            axes.plot(cell % 8, cell // 8, marker="os"[agent], color=("tab:blue", "tab:purple")[agent], ms=24)
        axes.set(xlim=(-0.5, 7.5), ylim=(2.5, -0.5), aspect="equal", xticks=[], yticks=[])  # row 0 is at the top

# ------------------------------------------------------------------------------------------------------------ skirmish
# The game's public unit data, in map cells and seconds ("faster" speed). armour: off every hit, but not off what the
# shield takes; damage: of one of the `hits` in a shot, with a bonus against armoured or else light units; beam: hits
# every enemy on a rectangle around the target, across the line of fire; cooldown: from shot to shot; range: of the
# weapon, from edge to edge; push_radius: at which units push each other apart; norm: smac's divisor of the cooldown.
Kind = namedtuple("Kind", "armoured health shield armour damage hits bonus_armoured bonus_light beam cooldown speed "
                          "range radius push_radius norm")
KINDS = {
    "colossus": Kind(True, 200, 150, 1, 10, 2, 0, 5, True, 1.07, 3.15, 7, 1.0, 1.0, 24),
    "stalker": Kind(True, 80, 80, 1, 13, 1, 5, 0, False, 1.34, 4.13, 6, 0.625, 0.625, 35),
    "zealot": Kind(False, 100, 50, 1, 8, 2, 0, 0, False, 0.86, 3.15, 0.1, 0.5, 0.375, 22),
    "marine": Kind(False, 45, 0, 0, 6, 1, 0, 0, False, 0.61, 3.15, 5, 0.375, 0.375, 15),
}
LETTERS = {name[0]: name for name in KINDS}  # a map's name says who fights: 1c = a colossus
# Step limits of the maps; smac never released the paper's 5m: 5m_vs_6m's limit
SKIRMISHES = {"3m": 60, "5m": 70, "8m": 120, "5m_vs_6m": 70, "2s3z": 120, "3s5z": 150, "1c3s5z": 180}
LOOPS_PER_SECOND, LOOPS_PER_STEP = 22.4, 8
STOP, NORTH, SOUTH, EAST, WEST, ATTACK = 1, 2, 3, 4, 5, 6  # actions: 0 is the dead's no-op, ATTACK + j attacks enemy j
SIGHT, SHOOT, MOVE = 9.0, 6.0, 2.0  # smac's for every kind: an ally sees, may attack, and is sent that far
BEAM_WIDTH, BEAM_DEPTH = 2.8, 0.3
REGENERATION, REGENERATION_DELAY = 0.125, 160  # shield points per game loop, after so many loops without damage
# One set for all maps, chosen by calibration. Edge to edge, an enemy takes the closest target within NOTICE, or within
# SIGHT if it was hurt in the last step, and keeps it within LEASH. It decides once per step, as the allies do.
NOTICE, LEASH = 4.75, 5.0
SPACING, SCATTER = 1.25, 1.0  # a team starts as a square block, long ranges behind; each unit up to SCATTER / 2 off

class Skirmish(Batched):
    """Two teams fight: ours is learned, theirs attack-moves to where ours started. smac's interface (observation,
    state, actions, mask, reward: the defaults of oxwhirl/smac, element for element) over a re-creation of the game.
    Its balance is its own: no win rate from here is one of SMAC's. A time-out is `truncated`; smac calls it an end.
    Left out: acceleration, turning, the delay between aiming and damage, path finding (units slide around each
    other), and whatever else the computer player does.
    Every fact is one (B, U) tensor of the U = N + M units, allies first. `step` never waits for the device."""
    # Where a battle takes place, in map cells: that of the released SMAC maps
    center, extent = (16.0, 16.0), (32.0, 32.0)  # of the playable area; they scale the positions in the state
    walk_x, walk_y = (2.0, 30.0), (7.0, 25.0)  # walkable: low <= x < high
    ally_start, enemy_start = (9.0, 16.0), (23.0, 16.0)  # the first is the enemies' goal too

    def __init__(self, map_name: str, n_envs: int = 32, device: str = "cpu", seed: int = 0):
        if map_name not in SKIRMISHES:
            raise UsageError(f"expected a skirmish map out of {', '.join(SKIRMISHES)}; got {map_name!r}")
        units = [[name for count, letter in zip(team[::2], team[1::2]) for name in int(count) * [LETTERS[letter]]]
                 for team in map_name.split("_vs_")]
        allies, enemies = units[0], units[-1]
        self.episode_limit = SKIRMISHES[map_name]
        self.n_envs, self.device = n_envs, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.n_agents, self.n_enemies, self.n_actions = N, M, A = len(allies), len(enemies), ATTACK + len(enemies)
        self.names = allies + enemies
        kinds = Kind(*torch.tensor([KINDS[name] for name in self.names], dtype=torch.float32, device=self.device).T)
        self.health_max, self.shield_max, self.armour = kinds.health, kinds.shield, kinds.armour
        self.radius, self.reach = kinds.radius, kinds.range + kinds.radius
        self.speed, self.reload = kinds.speed / LOOPS_PER_SECOND, kinds.cooldown * LOOPS_PER_SECOND  # in game loops
        self.cooldown_norm, self.beam = kinds.norm, kinds.beam > 0
        self.any_beam, self.any_shield = "colossus" in allies, "marine" not in allies
        self.contact = (kinds.push_radius[:, None] + kinds.push_radius).fill_diagonal_(0)  # (U, U) where two touch
        self.index = torch.arange(N + M, device=self.device)
        foes = (self.index[:, None] < N) != (self.index < N)
        bonus = torch.where(kinds.armoured > 0, kinds.bonus_armoured[:, None], kinds.bonus_light[:, None])
        self.damage = kinds.damage[:, None] + bonus  # (U attacker, U victim) of one hit
        self.shot = self.damage * kinds.hits[:, None] * foes  # of a whole shot
        types = list(dict.fromkeys(allies)) if len(set(allies)) > 1 else []  # smac tells apart only where there are two
        self.type_bits = torch.tensor([[float(name == type) for type in types] for name in self.names]).to(self.device)
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
        for n, (x, y), forward in ((N, self.ally_start, SPACING), (M, self.enemy_start, -SPACING)):
            rows = round(n ** 0.5)
            places += [(x + (i // rows - (n - 1) // rows / 2) * forward, y + (i % rows - (rows - 1) / 2) * SPACING)
                       for i in range(n)]
        self.start_x, self.start_y = torch.tensor(places, device=self.device).T

    def noise(self) -> Tensor:
        """All the randomness there is: (B, U) numbers in [0, 1), twice for a reset, once for a step."""
        return torch.rand(self.n_envs, len(self.names), generator=self.generator, device=self.device)

    def reset(self) -> Step:
        """Starts a new battle everywhere. smac sorts the allies of a kind by x, once an episode."""
        N, B, U = self.n_agents, self.n_envs, len(self.names)
        x, y = (start + SCATTER * (self.noise() - 0.5) for start in (self.start_x, self.start_y))
        order = (x + 1000 * self.type_bits.argmax(1) if self.type_bits.numel() else x)[:, :N].argsort(1)
        self.x, self.y = (torch.cat([place[:, :N].gather(1, order), place[:, N:]], 1) for place in (x, y))
        self.health, self.shield = self.health_max.repeat(B, 1), self.shield_max.repeat(B, 1)
        self.cooldown = torch.zeros_like(x)  # game loops to the next shot
        self.calm = torch.full_like(x, REGENERATION_DELAY)  # game loops since the last damage
        # Indices among all units, -1 for none: whom a unit attacks; whom it shot in this step (for `draw`)
        self.target, self.shots = torch.full((2, B, U), -1, device=self.device)
        self.last_actions = torch.full((B, N), -1, device=self.device)
        self.steps = torch.zeros((), dtype=torch.long, device=self.device)
        return self.look(torch.zeros_like(x[:, 0]))

    def step(self, actions: Tensor) -> Step:
        """actions (B, N) int64: 0 no-op (the dead), 1 stop, 2-5 move to y+2, y-2, x+2, x-2, 6 + j attack enemy j."""
        points, alive = self.health + self.shield, self.health > 0
        orders = self.order(actions)
        # Each shot's cooldown varies by -1 to +2 loops. No weapon shoots twice in 8 loops: one draw per unit will do.
        reload = self.reload + 3 * self.noise() - 1
        self.shots = torch.full_like(self.shots, -1)
        for _ in range(LOOPS_PER_STEP):
            self.game_loop(*orders, reload)
        self.last_actions, self.steps = actions.clone(), self.steps + 1
        return self.look(self.reward(points, alive))

    def order(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sets every unit's target; returns its goal x, y and whether it walks there without a target, (B, U) each."""
        N, goal_x, goal_y = self.n_agents, self.x.clone(), self.y.clone()
        gap = self.offsets()[2][:, :, N:] - self.radius[:N, None] - self.radius[N:]  # (B, N, M)
        closest, candidate = gap.masked_fill_(self.health[:, :N, None] <= 0, torch.inf).min(1)
        notice = torch.where(self.calm[:, N:] < LOOPS_PER_STEP, SIGHT, NOTICE)
        held = self.target[:, N:]
        keep = (held >= 0) & (gap.gather(1, held.clamp(min=0)[:, None])[:, 0] <= LEASH)
        theirs = torch.where(keep, held, torch.where(closest <= notice, candidate, -1))
        goal_x[:, N:], goal_y[:, N:] = self.ally_start  # enemies attack-move; allies do what they are told:
        self.target = torch.cat([torch.where(actions >= ATTACK, actions - ATTACK + N, -1), theirs], 1)
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
        self.cooldown = (torch.where(fires, reload, self.cooldown) - 1).clamp(min=0)
        self.shots = torch.where(fires, aim, self.shots)
        # Who has not, walks until it has; the others walk to their goal, or stand
        walk = torch.minimum(missing.clamp_(min=0), self.speed) / distance * (alive & (attacks | walks))
        x, y = torch.addcmul(x, to_x, walk), torch.addcmul(y, to_y, walk)
        # Two living units that overlap are pushed apart, each by half
        tie = x + 1e-4 * self.index  # two on one spot part too
        gap_x, gap_y = tie[:, :, None] - tie[:, None], y[:, :, None] - y[:, None]  # (B, U, U)
        gap = (gap_x.square() + gap_y.square()).sqrt_().clamp_(min=1e-6)
        push = (self.contact / gap).sub_(1).clamp_(min=0).mul_(0.5 * alive[:, None])
        self.x = (x + (gap_x * push).sum(2)).clamp(self.walk_x[0], self.walk_x[1] - 1e-3)
        self.y = (y + (gap_y * push).sum(2)).clamp(self.walk_y[0], self.walk_y[1] - 1e-3)

    def swept(self, to_x: Tensor, to_y: Tensor, distance: Tensor) -> Tensor:
        """(B, U attacker, U victim): would a beam across the line to the attacker's target touch the victim's body?"""
        along_x, along_y = (to_x / distance)[:, :, None], (to_y / distance)[:, :, None]
        off_x, off_y = (at[:, None] - (at + to)[:, :, None] for at, to in ((self.x, to_x), (self.y, to_y)))
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
        self.health = (self.health - lost.sum(1)).clamp(min=0)
        self.calm = (self.calm + 1) * (total[:, -1] == 0)
        shield = (self.shield - total[:, -1]).clamp(min=0) + REGENERATION * (self.calm > REGENERATION_DELAY)
        self.shield = torch.minimum(shield, self.shield_max)

    def look(self, reward: Tensor) -> Step:
        """What the battle is now, and `reward` (B,) for what led there."""
        ours, theirs = (self.health > 0).split([self.n_agents, self.n_enemies], 1)
        terminated = ~(ours.any(1) & theirs.any(1))
        info = dict(zip(FACTS, (ours.any(1) & ~theirs.any(1), (~ours).sum(1), (~theirs).sum(1))))
        avail = self.available()
        return Step(self.observation(avail), self.state(), avail, reward, terminated,
                    ~terminated & (self.steps >= self.episode_limit), info)

    def offsets(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and distance from each ally to each unit, (B, N, U) each."""
        dx, dy = (place[:, None] - place[:, :self.n_agents, None] for place in (self.x, self.y))
        return dx, dy, (dx.square() + dy.square()).sqrt()

    def available(self) -> Tensor:
        """(B, N, A) bool. A move goes two cells, but only the first one is looked at."""
        N, ahead, (left, right), (bottom, top) = self.n_agents, MOVE / 2, self.walk_x, self.walk_y
        x, y, ours, theirs = self.x[:, :N], self.y[:, :N], self.health[:, :N] > 0, self.health[:, N:] > 0
        moves = [y + ahead < top, y - ahead >= bottom, x + ahead < right, x - ahead >= left]
        shoot = (self.offsets()[2][:, :, N:] <= SHOOT) & theirs[:, None] & ours[:, :, None]
        return torch.cat([torch.stack([~ours, ours, *(move & ours for move in moves)], 2), shoot], 2)

    def bodies(self) -> Tensor:
        """(B, U, 1 + s + u): health, [shield], [type bits] of every unit, in parts of the whole."""
        health, shield = (self.health / self.health_max)[..., None], (self.shield / self.shield_max)[..., None]
        return torch.cat([health] + [shield] * self.any_shield + [self.type_bits.expand(self.n_envs, -1, -1)], 2)

    def observation(self, avail: Tensor) -> Tensor:
        """(B, N, O): open directions, every enemy, every other ally, itself; zeros for the dead and the unseen."""
        N, alive, bodies = self.n_agents, self.health > 0, self.bodies()
        dx, dy, distance = self.offsets()
        first = torch.ones_like(distance)  # an ally: seen; an enemy: may be attacked
        first[:, :, N:] = avail[:, :, ATTACK:]
        units = torch.cat([torch.stack([first, distance / SIGHT, dx / SIGHT, dy / SIGHT], 3),
                           bodies[:, None].expand(-1, N, -1, -1)], 3)
        units *= (alive[:, None] & (distance < SIGHT))[..., None]
        others = units.gather(2, self.others[None, :, :, None].expand(self.n_envs, -1, -1, units.shape[3]))
        return torch.cat([avail[:, :, NORTH:ATTACK], units[:, :, N:].flatten(2), others.flatten(2), bodies[:, :N]],
                         2) * alive[:, :N, None]

    def state(self) -> Tensor:
        """(B, S): allies, enemies, the allies' last actions one-hot; zeros for the dead, and before the first step."""
        N, alive, bodies = self.n_agents, (self.health > 0)[..., None], self.bodies()
        (center_x, center_y), (extent_x, extent_y) = self.center, self.extent
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

    def heuristic(self) -> Tensor:
        """(B, N) actions: attack the closest enemy until it dies, then the next; walk to it where it is too far."""
        N, avail = self.n_agents, self.available()
        dx, dy, distance = (offset[:, :, self.n_agents:] for offset in self.offsets())
        closest = distance.masked_fill(self.health[:, None, N:] <= 0, torch.inf).argmin(2) + ATTACK
        last = self.last_actions.clamp(min=0)
        attack = torch.where((last >= ATTACK) & avail.gather(2, last[..., None])[..., 0], last, closest)
        dx, dy = (d.gather(2, attack[..., None] - ATTACK)[..., 0] for d in (dx, dy))
        walk = torch.where(dx.abs() > dy.abs(), torch.where(dx > 0, EAST, WEST), torch.where(dy > 0, NORTH, SOUTH))
        wish = torch.stack([attack, walk, torch.full_like(walk, STOP), torch.zeros_like(walk)], 2)  # the first possible
        return wish.gather(2, avail.gather(2, wish).float().argmax(2, keepdim=True))[..., 0]

    def draw(self, axes, b: int = 0):
        """Draws environment b as it is now: shots, units by their side's colour, the paler the more they are hurt."""
        from matplotlib.patches import Circle
        axes.set(xlim=self.walk_x, ylim=self.walk_y, aspect="equal", xticks=[], yticks=[])
        x, y, left, shots = (fact[b].tolist() for fact in (self.x, self.y, self.health / self.health_max, self.shots))
        for i, name in enumerate(self.names):
            color = "tab:blue" if i < self.n_agents else "tab:red"
            if shots[i] >= 0:
                axes.plot([x[i], x[shots[i]]], [y[i], y[shots[i]]], color=color, linewidth=1, zorder=1)
            if left[i] > 0:
                axes.add_patch(Circle((x[i], y[i]), KINDS[name].radius, color=color, alpha=0.2 + 0.8 * left[i]))
                axes.text(x[i], y[i], name[0].upper(), color="white", size=6, ha="center", va="center")

# ---------------------------------------------------------------------------------------------------- worker processes
# A single environment has PyMARL's interface: get_env_info() -> dict of SIZES, reset(), step(list of N ints) -> (team
# reward, terminated, info), get_obs() (N, O), get_state() (S,), get_avail_actions() (N, A), close(), and render() ->
# (H, W, 3) if it can be drawn. info["episode_limit"] = True tells of a time limit; an end without it is an end.
PROTOCOL = ("get_env_info", "reset", "step", "get_obs", "get_state", "get_avail_actions", "close")
SIZES = ("n_agents", "n_actions", "obs_shape", "state_shape", "episode_limit")
FACTS = ("battle_won", "dead_allies", "dead_enemies")  # what info may say of an episode, and the metrics show
GRACE = 10.0  # seconds for a worker to close its environment before it is killed with all it started
# What a worker runs. subtle: plain child processes, since `multiprocessing` either copies torch's locks in whatever
# state they are (fork) or imports the user's script again, which trains again where `if __name__` is missing. Messages
# are pickles of (word, bytes) through stdin and stdout; a game that prints does so to stderr. This file is loaded by
# its path, under a name that no reader's module has, and the current directory waits: it may hold a pickle.py.
LAUNCH = """
import os, sys
sys.path[:] = [path for path in sys.path if path]
import pickle, runpy
asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
sys.path[:], file, job = pickle.load(asked)
runpy.run_path(file, run_name="qmix_envs")["work"](asked, answers, *job)"""

class GameFailure(Exception):
    """Raised by a single environment: the game misbehaved, so the episode is void, but a new game may well work."""

class Workers:
    """B single environments, one process each, behind the batched interface; Linux and macOS.
    name, arguments, seed, render: as `single` takes them; each worker, and each that replaces one, gets its own seed.
    timeout: seconds that one start, reset or step may take before the game counts as hung and is killed.
    max_failures: void episodes in a row of one environment after which EnvFailure is raised.
    voided: void episodes so far. info: "void", and those of FACTS that the environment tells of."""
    def __init__(self, name, n_envs=32, device="cpu", seed=0, arguments=None, timeout=120.0, render=False,
                 max_failures=10):
        if sys.platform == "win32":
            raise UsageError(f"{name}: worker processes need Linux or macOS; the built-in environments need none")
        if os.environ.get("QMIX_WORKER") == str(os.getpid()):
            raise UsageError(f"{name}: its module makes environments when it is imported: put that under "
                             "`if __name__ == '__main__':`")
        self.name, self.n_envs, self.device, self.arguments = name, n_envs, torch.device(device), arguments or {}
        self.timeout, self.render, self.max_failures, self.voided = timeout, render, max_failures, 0
        self.unused_seeds = random.Random(seed).sample(range(2**31 - 1), 10_000)  # never the same again
        self.seeds, self.failures = [0] * n_envs, [0] * n_envs
        self.running, self.void, self.told = np.zeros(n_envs, bool), np.zeros(n_envs, bool), np.zeros(len(FACTS), bool)
        self.workers, self.info, self.fresh = {}, None, False  # {b: process}; fresh: all reset, nothing played since
        self.close = weakref.finalize(self, end_workers, self.workers)  # may be called twice; also runs at exit
        self.reset()  # what cannot work is told now; the first reset() of the user gets this same start
        self.n_agents, self.n_actions, self.obs_dim, self.state_dim, self.episode_limit = (self.info[k] for k in SIZES)
        if self.info["note"]:
            print(f"{name}: {self.info['note']}", file=sys.stderr)
        if name.startswith("smac:") and str(self.arguments.get("heuristic_ai")).lower() == "true":  # smac plays its own
            self.heuristic = torch.zeros(n_envs, self.n_agents, dtype=torch.int64, device=self.device).clone

    def reset(self):
        """Start all episodes -> Step. What does not start is replaced and tried again."""
        waiting = [] if self.fresh else range(self.n_envs)  # smac's first episode must not be reset: use it
        while waiting:
            for b in sorted(set(waiting) - set(self.workers)):
                self._start(b)
            for b, (info, row) in self._ask("reset", dict.fromkeys(waiting)).items():
                if self.info is None:
                    self.info, self.rows = info, np.zeros(self.n_envs, row_type(info))
                if info != self.info:
                    raise UsageError(f"{self.name}: all must have the same sizes, got {self.info} and {info}")
                self.rows[b] = np.frombuffer(row, self.rows.dtype)[0]
            waiting = [b for b in waiting if b not in self.workers]
        self.fresh = True
        self.running[:], self.void[:] = True, False
        return self._now()

    def step(self, actions):
        """Play actions (B, N) in the episodes still running -> Step."""
        self.fresh, actions = False, actions.cpu().numpy().astype(np.int64).reshape(self.n_envs, self.n_agents)
        self.rows["reward"][~self.running] = 0
        for b, row in self._ask("step", {b: actions[b].tobytes() for b in np.flatnonzero(self.running)}).items():
            self.rows[b] = np.frombuffer(row, self.rows.dtype)[0]
            self.running[b] = not (self.rows["terminated"][b] or self.rows["truncated"][b])
            self.failures[b] *= self.running[b]  # only failures in a row count
        return self._now()

    def _now(self):
        self.told |= np.isfinite(self.rows["facts"]).any(0)
        rows = self.rows.copy()
        rows[self.void] = 0  # padding: there is no environment behind this row now
        rows["avail"][self.void] = rows["terminated"][self.void] = True
        step = {key: torch.from_numpy(rows[key].copy()).to(self.device) for key in rows.dtype.names}
        facts = step.pop("facts").nan_to_num()
        info = {key: facts[:, k] == 1 if key == "battle_won" else facts[:, k]
                for k, key in enumerate(FACTS) if self.told[k]}
        return Step(**step, info=dict(info, void=torch.tensor(self.void, device=self.device)))

    def draw(self, axes, b=0):
        """Shows what environment b itself renders."""
        for shape, pixels in self._ask("render", {} if self.void[b] else {b: None}).values():
            axes.imshow(np.frombuffer(pixels, np.uint8).reshape(shape))
        axes.axis("off")

    def _start(self, b):
        self.seeds[b] = self.unused_seeds.pop()
        # A session of its own: Ctrl-C reaches the trainer alone, and the worker can be ended with all it started.
        self.workers[b] = subprocess.Popen([sys.executable, "-uc", LAUNCH], env=dict(os.environ, OMP_NUM_THREADS="1"),
                                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._send(b, (sys.path, os.path.abspath(__file__), (self.name, self.seeds[b], self.arguments, self.render)))

    def _send(self, b, message):
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `_ask` finds
            pickle.dump(message, self.workers[b].stdin)
            self.workers[b].stdin.flush()

    def _ask(self, command, bodies):
        """One message to each worker b in bodies {b: bytes}, all at work at the same time -> {b: answer}. Where there
        is none, the game has failed: the episode is void, its worker is ended, and the next reset starts another."""
        deadline, answers = time.monotonic() + self.timeout, {}
        try:
            for b, body in bodies.items():
                self._send(b, (command, body))
            for b in bodies:
                which, pipe = f"{self.name}: environment {b} (seed {self.seeds[b]})", self.workers[b].stdout
                kind, answer = "void", f"no answer to {command} within {self.timeout:g} seconds (--env-timeout)"
                try:
                    if select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                        kind, answer = pickle.load(pipe)
                except (EOFError, OSError, pickle.UnpicklingError):
                    answer = f"its process ended in {command}"
                if kind == "ok":
                    answers[b] = answer
                    continue
                if kind in ("usage", "error"):
                    raise UsageError(answer) if kind == "usage" else EnvFailure(f"{which} failed in {answer}")
                self.voided, self.failures[b] = self.voided + 1, self.failures[b] + 1
                if self.failures[b] >= (self.max_failures if self.info else 2):  # what never started is told soon
                    raise EnvFailure(f"{which} failed {self.failures[b]} time(s) in a row, the last time: {answer}")
                print(f"{which}: episode void, starting it again: {answer}", file=sys.stderr)
        finally:
            self.running[lost := [*bodies.keys() - answers.keys()]], self.void[lost] = False, True
            end_workers(self.workers, lost)
        return answers

def end_workers(workers, which=None):
    """Let each worker (all, or which) close its environment; then end what is left of it and of what it started."""
    ending = [workers.pop(b) for b in list(workers if which is None else which)]
    for process in ending:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in ending:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(OSError), process:  # nobody is left; `process` closes its pipes
            os.killpg(process.pid, signal.SIGKILL)

def row_type(info):
    """What a worker answers to reset and step: one NumPy record, sent as its bytes."""
    N, A, O, S, _ = (info[key] for key in SIZES)
    return np.dtype([("obs", "f4", (N, O)), ("state", "f4", (S,)), ("avail", "?", (N, A)), ("reward", "f4"),
                     ("terminated", "?"), ("truncated", "?"), ("facts", "f4", (len(FACTS),))])

def work(inbox, outbox, name, seed, arguments, render):
    """The life of a worker: answers "reset", "step" and "render" until the trainer ends it or is gone. An answer is
    (what became of it: ok, void (the game failed), usage or error (both end the run); the bytes asked for, or why)."""
    os.environ["QMIX_WORKER"] = str(os.getpid())
    def leave_when_alone():
        poll = select.poll()
        poll.register(inbox, 0)
        poll.poll()  # until the other end is closed, whatever became of the trainer, kill -9 too
        time.sleep(0.2)  # a worker that waits for a message has noticed by then
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)  # interrupts what the environment waits for
        time.sleep(GRACE)
        os.killpg(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    threading.Thread(target=leave_when_alone, daemon=True).start()
    torch.set_num_threads(1)
    for seed_it in (random.seed, np.random.seed, torch.manual_seed):  # for environments that draw from these
        seed_it(seed)
    env = None
    try:
        with contextlib.suppress(EOFError, OSError):  # the trainer is gone
            while True:
                command, body = pickle.load(inbox)
                try:
                    env = env or Checked(name, single(name, seed, arguments, render))
                    if command == "step":
                        answer = "ok", env.step(np.frombuffer(body, np.int64).tolist()).tobytes()
                    else:
                        answer = "ok", (env.info, env.reset().tobytes()) if command == "reset" else env.picture()
                except Exception as error:  # by name: a reader's module may have loaded this file once more
                    kind = {"UsageError": "usage", "GameFailure": "void"}.get(type(error).__name__, "error")
                    file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
                    why = f"{type(error).__name__}: {one_line(error)} ({Path(file).name}, line {line})"
                    answer = kind, f"{command if env else 'start'}: {why}" if kind == "error" else one_line(error)
                pickle.dump(answer, outbox)
                outbox.flush()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing interrupts the closing any more
        try:
            if env:
                env.env.close()
        except Exception as error:  # it must not keep this process from ending
            print(f"{name}: close() failed: {one_line(error)}", file=sys.stderr)
        finally:
            os.killpg(os.getpid(), signal.SIGKILL)  # all that the environment started and left, and this process too

# What comes from outside is checked here, at the door, so that nothing wrong is learned further in.
def one_line(error):
    return " ".join(str(error).split())

def first_line(error):
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]

def as_array(what, given, shape, means="", mask=False):
    """`given` (an array, nested lists, a tensor) as a new float32 array; mask=True: what is available, as bool.
    shape: its axes; `...` in front stands for any number of further ones; (): one number, or with mask one flag.
    means: the axes in words. Raises UsageError, in one line: `what`, what was expected, what came."""
    sizes = tuple(size for size in shape if size is not ...)
    expected = "True or False (1 or 0)" if mask else f"{'finite numbers' if sizes else 'one finite number'} (float32)"
    if sizes:
        expected += f" of shape {str(shape).replace('Ellipsis', '...')}" + f" = ({means})" * bool(means)
    try:
        array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    except (TypeError, ValueError) as error:
        got = f"{one_line(error)}: pad unlike rows to the longest, and give who is gone a row of zeros"
        raise UsageError(f"{what} must be {expected}; got {got}") from None
    with np.errstate(all="ignore"):  # what float32 cannot hold becomes inf
        if array.dtype.kind not in "biuf":
            got = f"{one_line(given)[:80]}, a {type(given).__name__}" + ": flatten it into numbers" * bool(sizes)
        elif array.shape != (array.shape[:array.ndim - len(sizes)] if shape[:1] == (...,) else ()) + sizes:
            got = f"shape {array.shape}" + ": flatten what each agent sees into one row" * (array.ndim > len(sizes) > 0)
        elif (wrong := (array != 0) & (array != 1) if mask else ~np.isfinite(array.astype(np.float32))).any():
            got = array[wrong].flat[0]
        elif mask and sizes and not array.any(-1).all():
            got = f"none for agent {np.argwhere(~array.any(-1))[0, -1]}: each needs one; leave the dead a no-op"
        else:
            return np.array(array, bool if mask else np.float32, order="C")
    raise UsageError(f"{what} must be {expected}; got {got}")

class Checked:
    """A single environment whose every answer is checked. info: SIZES, and a note for the user. reset() and
    step(actions) return `row`, of row_type(info)."""
    def __init__(self, name, env):
        self.name, self.env = name, env
        missing = [method for method in PROTOCOL if not callable(getattr(env, method, None))]
        if missing:
            raise UsageError(f"{name}: expected a PettingZoo parallel environment or the methods "
                             f"{', '.join(PROTOCOL)}; {type(env).__name__} has no {', '.join(missing)}")
        info = env.get_env_info()
        for key in SIZES:
            size = info.get(key) if isinstance(info, dict) else None
            if not isinstance(size, (int, np.integer)) or size is True or size < 1:
                raise UsageError(f"{name}: get_env_info() must give a dict with {', '.join(SIZES)}, whole numbers "
                                 f"above 0; got {key}: {size!r}")
        self.info = dict({key: int(info[key]) for key in SIZES}, note=str(info.get("note", "")))
        self.row, self.steps = np.zeros((), row_type(self.info)), 0

    def reset(self):
        self.env.reset()
        self.row["reward"] = self.row["terminated"] = self.row["truncated"] = self.steps = 0
        self.row["facts"] = np.nan
        return self.look()

    def step(self, actions):
        result = self.env.step(actions)  # a list: smac writes its heuristic's actions into it
        if not isinstance(result, tuple) or len(result) != 3 or not isinstance(result[2], dict):
            raise UsageError(f"{self.name}: step() must give (reward, terminated, info), info a dict; "
                             f"got {one_line(result)[:200]}")
        reward, over, info = result
        one = lambda key, given, flag=False: as_array(f"{self.name}: step()'s {key}", given, (), "", flag)  # noqa: E731
        over, limit = one("terminated", over, True), one("info['episode_limit']", info.get("episode_limit", 0), True)
        self.steps += 1
        limit = limit or not over and self.steps >= self.info["episode_limit"]
        self.row["reward"] = one("reward", reward)
        self.row["terminated"], self.row["truncated"] = over and not limit, limit
        self.row["facts"] = [one(f"info[{key!r}]", info[key]) if key in info else np.nan for key in FACTS]
        return self.look()

    def look(self):
        N, A, O, S, _ = (self.info[key] for key in SIZES)
        for key, method, shape, means in (("obs", "get_obs", (N, O), "n_agents, obs_shape"),
                                          ("state", "get_state", (S,), "state_shape"),
                                          ("avail", "get_avail_actions", (N, A), "n_agents, n_actions")):
            given = getattr(self.env, method)()
            self.row[key] = as_array(f"{self.name}: {method}()", given, shape, means, mask=key == "avail")
        return self.row

    def picture(self):
        picture = np.asarray(self.env.render() if hasattr(self.env, "render") else None)
        if picture.dtype.kind not in "iu" or picture.shape[2:] != (3,):
            raise UsageError(f"{self.name}: to be drawn it needs a render() that gives an array (H, W, 3) of whole "
                             f"numbers, 0 to 255; got {one_line(picture)[:80]} of shape {picture.shape}")
        return picture.shape, picture.astype(np.uint8).tobytes()

# ------------------------------------------------------------------------------------------------- single environments
LIMITS = ("episode_limit", "max_cycles", "max_steps", "max_episode_steps", "_max_episode_steps")
PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}

def single(name, seed, arguments, render=False):
    """One environment with PyMARL's interface, made in the worker.
    name: "smac:MAP", "ma_gym:ID" or "module:Class", the reader's own or a PettingZoo parallel environment, made by a
    class or function; arguments: its keyword arguments, {name: value or its text}; render: it will be drawn."""
    kind, _, which = name.partition(":")
    if "seed" in arguments:
        raise UsageError(f"{name}: seed is not an argument of the environment here: each gets its own, from --seed")
    if kind == "smac":
        return Smac(name, which, seed, arguments)
    if kind == "ma_gym":
        return Parallel(name, MaGym(name, which, arguments), seed, arguments)
    sys.path.insert(0, os.getcwd())
    package = kind.partition(".")[0]
    if package != kind and os.path.isdir(package) and not os.path.exists(f"{package}/__init__.py"):
        sys.modules[package] = types.ModuleType(package)  # else a package.py anywhere on the path would come first
        sys.modules[package].__path__ = [os.path.abspath(package)]
    try:
        module = importlib.import_module(kind)
    except ModuleNotFoundError as error:
        if error.name not in (kind, package):
            raise
        raise UsageError(f"{name}: there is no module {kind} in {os.getcwd()} or on Python's path") from None
    made = getattr(module, which, None)
    if not callable(made):
        classes = ", ".join(key for key, value in vars(module).items() if inspect.isclass(value))
        raise UsageError(f"{name}: the module {kind} must have a class {which}; it has {classes or 'none'}")
    parameters = inspect.signature(made).parameters
    limit = {key: arguments[key] for key in {"episode_limit"} & set(arguments) - set(parameters)}
    arguments = read_arguments(name, made, {key: value for key, value in arguments.items() if key not in limit})
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    offered = {"seed": seed, "render_mode": "rgb_array"} if render else {"seed": seed}
    more = {key: value for key, value in offered.items() if key in parameters or anything}
    while True:  # with those of `more` that it takes, which with **kwargs only a try tells
        try:
            env = made(**(more | arguments))
            break
        except TypeError as error:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if not refused or refused[1] in parameters or more.pop(refused[1], None) is None:
                raise UsageError(f"{name}: {error}") if refused and refused[1] in arguments else error from None
    if hasattr(env, "possible_agents") and not hasattr(env, "get_env_info"):
        return Parallel(name, env, seed, arguments | limit)
    if limit:
        raise UsageError(f"{name}: it has no argument episode_limit: its get_env_info() tells it")
    return env

def pairs(given):
    """--env-args as [(key, text)]: `given` is a dict or an iterable of "key=value"; no key twice."""
    if isinstance(given, dict):
        given = [f"{k}={json.dumps(v) if type(v) in (dict, list, bool, type(None)) else v}" for k, v in given.items()]
    found = [text.partition("=") for text in given if isinstance(text, str)] if not isinstance(given, str) else []
    if len({key for key, equals, _ in found if key and equals}) < len(given):
        raise UsageError(f"--env-args takes key=value, each key once; got {given!r}")
    return [(key, value) for key, _, value in found]

def read_arguments(name, made, arguments):
    """Arguments {name: value or its text} as `made` takes them: by the parameter's annotation, else by its default."""
    parameters = inspect.signature(made).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters)
    read = {}
    for key, given in arguments.items():
        if key not in named and not anything:
            raise UsageError(f"{name}: it has no argument {key}; it has {', '.join(sorted(named)) or 'none'}")
        note, default = (named[key].annotation, named[key].default) if key in named else (typing.Any, ...)
        with contextlib.suppress(Exception):  # from __future__ import annotations
            note = eval(note, {"typing": typing, **vars(typing)}) if isinstance(note, str) else note
        if note is inspect.Parameter.empty:  # a default is an example
            note = {bool: bool | None, int: int | float | None, float: float | None, str: str}.get(type(default))
        union = typing.get_origin(note) in (typing.Union, types.UnionType)
        kinds = {*(typing.get_args(note) if union else [note]), *([type(None)] if default is None else [])}
        read[key] = read_argument(f"{name}: {key}", given, kinds if kinds <= set(PLAIN) else set())
    return read

def read_argument(what, given, kinds):
    """`given`, a value or its text, as one of `kinds` (out of PLAIN; none: anything a Python or JSON literal is)."""
    value = given
    if isinstance(given, str) and kinds != {str}:
        value = {"true": True, "false": False, "none": None, "null": None}.get(given.lower(), given)
        for literal in (ast.literal_eval, json.loads):
            with contextlib.suppress(ValueError, SyntaxError, TypeError):  # not a literal of this kind
                value = literal(given) if value is given else value
        if str in kinds and type(value) not in kinds:
            value = given  # Optional[str]: 12 is text
        if value is given and given[:1] in ("{", "["):
            raise UsageError(f"{what} begins like a Python or JSON literal, and is none: {given}")
    if int in kinds and isinstance(value, (float, np.integer)) and value % 1 == 0:
        value = int(value)  # 1e3
    if kinds and type(value) not in kinds and not (float in kinds and type(value) is int):
        raise UsageError(f"{what} must be {' or '.join(PLAIN[kind] for kind in PLAIN if kind in kinds)}; got {given!r}")
    return value

class Parallel:
    """A PettingZoo parallel environment behind PyMARL's interface: observations flattened and padded with zeros, unlike
    numbers of actions padded and masked, reward = sum over agents. An agent that is gone is dead: it sees zeros and has
    the no-op 0, which nobody plays."""
    def __init__(self, name, env, seed, arguments):
        if hasattr(env, "agent_iter"):
            raise UsageError(f"{name}: this PettingZoo environment takes turns: name its parallel_env instead")
        self.name, self.env, self.agents, self.width = name, env, list(env.possible_agents), 0
        self.close, self.render = env.close, getattr(env, "render", lambda: None)
        spaces = [env.action_space(agent) for agent in self.agents]
        self.counts = [0 if getattr(s, "shape", ()) or getattr(s, "start", 0) else getattr(s, "n", 0) for s in spaces]
        if not all(self.counts):
            raise UsageError(f"{name}: expected Discrete actions, counted from 0; got {spaces}")
        known = (types.SimpleNamespace(**arguments), env, getattr(env, "unwrapped", env))
        limits = [read_argument(f"{name}: {key}", getattr(owner, key), {int})
                  for owner in known for key in LIMITS if getattr(owner, key, None)]
        if not limits:
            raise UsageError(f"{name}: it tells no time limit of its own: give one with --env-args episode_limit=300")
        self.n_actions, self.limit = int(max(self.counts)), min(limits)
        self.reset(seed)
        self.note = "it offers no state: the state is the agents' observations, joined"
        with contextlib.suppress(AttributeError, NotImplementedError):
            self.note = "" if env.state() is not None else self.note
        self.get_state = lambda: np.ravel(self.obs if self.note else env.state())
        self.get_obs, self.get_avail_actions = lambda: self.obs, lambda: self.avail

    def get_env_info(self):
        return {"n_agents": len(self.agents), "n_actions": self.n_actions, "obs_shape": self.width, "note": self.note,
                "state_shape": len(self.get_state()), "episode_limit": self.limit}

    def reset(self, seed=None):
        obs, infos = self.env.reset(seed=seed)
        self.alive = list(self.env.agents)
        self.look(obs, infos)

    def step(self, actions):
        plays = {agent: action for agent, action in zip(self.agents, actions) if agent in self.alive}
        obs, rewards, terminations, truncations, infos = self.env.step(plays)
        over, cut = ({agent for agent, given in flags.items() if as_array(f"{self.name}: {what}", given, (), "", True)}
                     for what, flags in (("terminations", terminations), ("truncations", truncations)))
        going = [agent for agent in self.env.agents if agent not in over | cut]
        self.alive = going or cut - over  # subtle: whom a time limit cuts off is still there, with a value of its own
        self.look(obs, infos)
        return sum(rewards.values()), not going, {"episode_limit": not going and bool(self.alive)}

    def look(self, obs, infos):
        rows, self.avail = [], np.zeros((len(self.agents), self.n_actions))
        for i, (agent, n) in enumerate(zip(self.agents, self.counts)):
            seen = obs[agent] if agent in self.alive else {"observation": [], "action_mask": np.arange(n) == 0}
            seen = seen if isinstance(seen, dict) else {"observation": seen}
            rows.append(np.ravel(seen.get("observation", seen)))
            self.avail[i, :n] = seen.get("action_mask", infos.get(agent, {}).get("action_mask", 1))
        self.width = self.width or max(map(len, rows))
        self.obs = [np.pad(row, (0, max(0, self.width - len(row)))) for row in rows]

class MaGym:
    """A registered ma-gym environment behind PettingZoo's parallel interface; it ends when all agents are done."""
    def __init__(self, name, which, arguments):
        try:
            import gym
            import ma_gym  # noqa: F401  (importing it registers its environments)
        except ModuleNotFoundError as error:
            raise UsageError(f"{name}: {error.name} is not installed: `make install` adds ma-gym on Python 3.10 and "
                             f"3.11; this is {sys.version.split()[0]}") from None
        found = {spec.id: str(spec.entry_point) for spec in gym.envs.registry.all()}
        known = sorted(id for id, entry in found.items() if "ma_gym" in entry and "openai" not in entry)
        if which not in known:
            raise UsageError(f"{name}: no such environment; ma-gym has {', '.join(known)}")
        gym.logger.set_level(gym.logger.ERROR)  # it warns of its own spaces at each start
        own = {key: value for key, value in arguments.items() if key != "episode_limit"}
        self.env = gym.make(which, **read_arguments(name, gym.envs.registration.load(found[which]), own))
        self.episode_limit = getattr(self.env, "_max_steps", None)
        np.float = float  # Combat's get_state() was written for NumPy before 1.24; this process alone sees it
        self.possible_agents = self.agents = list(range(self.env.n_agents))
        self.action_space, self.close = self.env.action_space.__getitem__, self.env.close
        self.state, self.render = lambda: self.env.get_state(), lambda: self.env.render(mode="rgb_array")

    def reset(self, seed=None):
        if seed is not None:
            self.env.seed(seed)
        return dict(enumerate(self.env.reset())), {}

    def step(self, actions):
        # subtle: at its limit ma-gym marks everybody done, a real end in that very step too; without the limit only a
        # real end does. The clock in the observation needs the limit, so they are made again with it.
        self.env._max_steps = np.inf
        _, rewards, dones, _ = self.env.step(list(actions.values()))
        self.env._max_steps = self.episode_limit
        obs = self.env.get_agent_obs()
        return dict(enumerate(obs)), dict(enumerate(rewards)), dict.fromkeys(self.agents, all(list(dones))), {}, {}

class Smac:
    """smac's StarCraft2Env; whatever the game does wrong is raised as GameFailure, which ends this object's life."""
    needs = ("smac:MAP needs StarCraft's smac (make install-smac; PyPI's is another package) with protobuf 3.20.3, "
             "and the game in the folder SC2PATH, with smac's maps in Maps/SMAC_Maps")

    def __init__(self, name, map_name, seed, arguments):
        try:
            from absl import flags
            from smac.env import StarCraft2Env
        except Exception as error:  # there is none, PyPI's, or what protobuf raises, which changed with its versions
            raise UsageError(f"{name}: {type(error).__name__}: {one_line(error)[:120]}; {self.needs}") from None
        game = Path(os.environ.get("SC2PATH", "~/StarCraftII")).expanduser()
        for path in (game / "Versions", game / "Maps" / "SMAC_Maps" / f"{map_name}.SC2Map"):
            if not path.exists():
                raise UsageError(f"{name}: {path} does not exist; {self.needs}")
        flags.FLAGS.sc2_timeout = 60  # pysc2 waits 360 seconds for a game that hangs
        text = {key: str(arguments[key]) for key in {"game_version"} & set(arguments)}  # 4.10 is not 4.1
        arguments = read_arguments(name, StarCraft2Env, arguments) | text
        self.replay, self.episodes, self.began = bool(arguments.get("replay_dir")), 0, False
        if self.replay:  # pysc2 would look for it in $SC2PATH/Replays, and make it in a race
            arguments["replay_dir"] = os.path.abspath(arguments["replay_dir"])
            os.makedirs(arguments["replay_dir"], exist_ok=True)
            arguments.setdefault("replay_prefix", f"{map_name}_{seed}_")  # pysc2 adds the second: workers would collide
        self.env = StarCraft2Env(map_name=map_name, seed=seed, **arguments)
        self.get_obs, self.get_state, self.get_env_info = self.env.get_obs, self.env.get_state, self.env.get_env_info
        self.get_avail_actions = self.env.get_avail_actions

    def game(self, what, *arguments):
        try:
            return getattr(self.env, what)(*arguments)
        except AssertionError:
            raise  # an unavailable action: our mistake, not the game's
        except Exception as error:  # a game that dies shows in many ways; their number in a row is bounded
            raise GameFailure(f"{what}: {type(error).__name__}: {one_line(error)}; {self.needs}") from None

    def reset(self):
        if self.began and self.episodes == 0:  # subtle: smac would add to max_reward and so shrink all later rewards
            raise GameFailure("reset before the first episode had ended, which smac cannot do")
        before, self.began = self.env.force_restarts, True
        self.game("reset")
        if self.env.force_restarts != before or not all(unit.health > 0 for unit in self.env.agents.values()):
            raise GameFailure("reset: the game crashed and was started again, without units")

    def step(self, actions):
        reward, terminated, info = self.game("step", actions)
        if terminated and not info:  # smac's (0, True, {}), with stale observations
            raise GameFailure("step: the game crashed and smac started it again")
        self.episodes += bool(terminated)
        return reward, terminated, info

    def close(self):
        with contextlib.closing(self.env):
            if self.replay and self.episodes:
                self.env.save_replay()  # one file holds all episodes of this game

# ------------------------------------------------------------------------------------------------ by name, as a picture
def make(name, n_envs=32, device="cpu", seed=0, arguments=None, timeout=120.0, render=False):
    """The environment called `name`, or UsageError with the names there are.
    arguments: what a smac, ma_gym or own environment takes, {key: value or its text}; the batched ones take none.
    timeout: seconds that one start, reset or step of a single environment may take."""
    auto = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=auto if device == "auto" else device).device
    except (RuntimeError, AssertionError) as error:  # the latter: torch without CUDA
        raise UsageError(f"--device must be auto, cpu or cuda, not {device!r} ({first_line(error)})") from None
    kind, colon, rest = name.partition(":")
    if colon and kind != "skirmish":
        dotted = re.sub(r"\.py$|^[./\\]+", "", kind).replace("/", ".").replace("\\", ".")
        if dotted != kind:
            raise UsageError(f"{name}: expected a module as Python imports it, {dotted}:{rest}")
        return Workers(name, n_envs, device, seed, arguments, timeout, render)
    if arguments:
        raise UsageError(f"{name} takes no --env-args, got {', '.join(arguments)}")
    if kind == "skirmish":
        return Skirmish(rest, n_envs, device, seed)
    if name == "two-step":
        return TwoStep(n_envs, device)
    if name in ("checkers", "checkers-v0", "checkers-v1", "checkers-v2", "checkers-v3"):
        return Checkers(int(name[-1]) if name[-1].isdigit() else 0, n_envs, device)
    raise UsageError(f"unknown environment {name!r}; there are two-step, checkers, checkers-v1 .. -v3, skirmish:MAP, "
                     "smac:MAP, ma_gym:ID and module:Class")

def record(env, choose, path, fps=6):
    """Draws one episode of environment 0 into a GIF, written whole or not at all.
    choose(step, memory) -> actions (B, N), memory: the policy; its memory is None at the start."""
    path = Path(path)
    if path.suffix != ".gif" or not path.absolute().parent.is_dir():
        raise UsageError(f"--record must name a .gif file in a folder that exists, not {str(path)!r}")
    if not hasattr(env, "draw"):
        raise UsageError("--record: this environment cannot be drawn")
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    axes, writer, temporary = Figure(figsize=(6, 4)).subplots(), PillowWriter(fps=fps), path.with_suffix(".tmp.gif")
    writer.setup(axes.figure, temporary, dpi=90)
    step, memory, score = env.reset(), None, 0.0
    for t in range(env.episode_limit + 1):
        axes.clear()
        env.draw(axes, 0)
        axes.set_title(f"step {t}    return {score:.2f}")
        writer.grab_frame()
        if step.terminated[0] | step.truncated[0]:
            break
        actions, memory = choose(step, memory)
        step = env.step(actions)
        score += float(step.reward[0])
    writer.finish()  # nothing is written before
    os.replace(temporary, path)
