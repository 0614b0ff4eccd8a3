"""Skirmish: two small teams fight, as on the StarCraft maps of the paper, without StarCraft.

    python qmix.py --env skirmish:2s3z

Our units are the agents. Their units walk to where ours started, and attack whom they meet.

Observations, state, actions, mask and reward are those of smac (github.com/oxwhirl/smac, with its
defaults), element for element. The game behind them is a re-creation with a balance of its own: no
win rate from here is one of SMAC's. At the time limit a battle is `truncated`; smac ends it.
Left out: acceleration, turning, the delay between aiming and damage, path finding (units slide
around each other), and whatever else the computer player does.

Axes: B battles, N allies, M enemies, U = N + M units with the allies first, A actions.
Lengths are in map cells, times in game loops, where no other unit is named.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from envs import FACTS, Batched, Step, UsageError

LOOPS_PER_SECOND = 22.4  # of the game, at its speed "faster"
LOOPS_PER_STEP = 8  # smac's step_mul


# ------------------------------------------------------------------------------ units and maps
class Kind(NamedTuple):
    """A kind of unit: the game's public data."""

    health: float  # points at the start
    shield: float  # points at the start; damage meets the shield first
    armour: float  # points off every hit, but not off what the shield takes
    damage: float  # points of one hit
    hits: int  # hits in a shot
    cooldown: float  # seconds from shot to shot
    range: float  # of the weapon, from edge to edge
    speed: float  # cells in a second
    radius: float  # of the body, for ranges and beams
    push_radius: float  # of the body, where units push each other apart
    cooldown_norm: float  # smac divides the cooldown by it
    armoured: bool = False  # or else light
    bonus_armoured: float = 0  # points that a hit does more to armoured units
    bonus_light: float = 0  # points that a hit does more to light units
    beam: bool = False  # the shot hits every enemy on a rectangle across the line of fire


# fmt: off
KINDS = {
    #         health, shield, armour | damage, hits, cooldown, range | speed, two radii | norm
    "colossus": Kind(200, 150, 1,      10, 2, 1.07, 7,        3.15, 1.0, 1.0,       24,
                     armoured=True, bonus_light=5, beam=True),
    "stalker":  Kind( 80,  80, 1,      13, 1, 1.34, 6,        4.13, 0.625, 0.625,   35,
                     armoured=True, bonus_armoured=5),
    "zealot":   Kind(100,  50, 1,       8, 2, 0.86, 0.1,      3.15, 0.5, 0.375,     22),
    "marine":   Kind( 45,   0, 0,       6, 1, 0.61, 5,        3.15, 0.375, 0.375,   15),
}
# fmt: on
BEAM_WIDTH = 2.8  # across the line of fire
BEAM_DEPTH = 0.3  # along it
REGENERATION = 0.125  # points that a shield grows in a game loop ...
REGENERATION_DELAY = 160  # ... after so many game loops without damage

# Step limits. A map's name says who fights: 2s3z has two stalkers and three zealots on each side.
# smac never released the paper's 5m; its limit is that of 5m_vs_6m.
MAPS = {
    "3m": 60,
    "5m": 70,
    "8m": 120,
    "5m_vs_6m": 70,
    "2s3z": 120,
    "3s5z": 150,
    "1c3s5z": 180,
}
LETTERS = {name[0]: name for name in KINDS}

# A team starts as a square block; then each unit is moved at random
SPACING = 1.25  # between neighbours in the block
SCATTER = 1.0  # a unit starts up to half of it away from its place, in x and in y

# The enemies' rules, chosen by calibration and the same on all maps. Both are from edge to edge.
NOTICE = 4.75  # an enemy attacks the closest ally within it (within SIGHT after being hurt) ...
LEASH = 5.0  # ... and keeps it as its target within this distance

# smac's actions and ranges
STOP = 1  # action 0 is the no-op of the dead
NORTH = 2  # y grows
SOUTH = 3
EAST = 4  # x grows
WEST = 5
ATTACK = 6  # ATTACK + j attacks enemy j
SIGHT = 9.0  # an ally sees others closer than this, between centres
SHOOT = 6.0  # an ally may attack within this distance, between centres, whatever its weapon
MOVE = 2.0  # a move leads so far

# smac's reward: a point for a point of damage, and
KILL_REWARD = 10
WIN_REWARD = 200
REWARD_SCALE = 20  # what all damage, all kills and the win are worth together, after scaling


def read_teams(map_name: str) -> tuple[list, list]:
    """The kinds of the allies and of the enemies: "1s1z" -> twice ["stalker", "zealot"]."""
    teams = []
    for text in map_name.split("_vs_"):
        team = []
        for count, letter in re.findall(r"(\d)(\w)", text):
            team += int(count) * [LETTERS[letter]]
        teams.append(team)
    return teams[0], teams[-1]


def square_block(n: int, center: tuple, forward: float) -> list[tuple]:
    """n places (x, y) around `center`, column by column, each column `forward` of the last."""
    rows = round(n**0.5)
    last_column = (n - 1) // rows
    places = []
    for i in range(n):
        x = center[0] + (i // rows - last_column / 2) * forward
        y = center[1] + (i % rows - (rows - 1) / 2) * SPACING
        places.append((x, y))
    return places


def length(vector: Tensor) -> Tensor:
    """(2, ...) x and y -> (...)"""
    x, y = vector
    return (x.square() + y.square()).sqrt_()


class Skirmish(Batched):
    """B battles on one map. Most facts about the units are tensors (B, U), as their health.

    Their places are one tensor (2, B, U): x and y. `step` never waits for the device, because
    nothing in Python depends on what a tensor holds.
    """

    # Where a battle takes place: as on the released maps of SMAC
    center = (16.0, 16.0)  # of the playable area: the state's positions are relative to it ...
    extent = (32.0, 32.0)  # ... and divided by this
    walk_x = (2.0, 30.0)  # walkable: 2 <= x < 30
    walk_y = (7.0, 25.0)
    ally_start = (9.0, 16.0)  # also where the enemies walk to
    enemy_start = (23.0, 16.0)

    def __init__(self, map_name: str, n_envs: int = 32, device: str = "cpu", seed: int = 0):
        if map_name not in MAPS:
            raise UsageError(f"expected a skirmish map out of {', '.join(MAPS)}; got {map_name!r}")
        ours, theirs = read_teams(map_name)
        self.names = ours + theirs  # the kind of each unit
        self.n_envs = n_envs
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.episode_limit = MAPS[map_name]
        self.n_agents = len(ours)
        self.n_enemies = len(theirs)
        self.n_actions = ATTACK + self.n_enemies
        self.index = torch.arange(len(self.names), device=self.device)  # (U,)
        allies = self.index[: self.n_agents, None]
        others = self.index[: self.n_agents - 1]
        self.others = others + (others >= allies)  # (N, N - 1) the allies but oneself
        self.any_beam = "colossus" in ours
        self.any_shield = "marine" not in ours
        self.set_kinds()
        self.set_types()
        self.set_starts()

        body = 1 + int(self.any_shield) + self.type_bits.shape[1]  # health, shield, type
        seen = self.n_enemies + self.n_agents - 1
        self.obs_dim = 4 + seen * (4 + body) + body
        ally_numbers = self.n_agents * (3 + body + self.n_actions)
        self.state_dim = ally_numbers + self.n_enemies * (2 + body)

        points = sum(KINDS[name].health + KINDS[name].shield for name in theirs)
        self.max_reward = points + KILL_REWARD * self.n_enemies + WIN_REWARD
        if not self.any_shield:
            self.best_return = 20.0  # of any win; a shield that grows back is paid for again

    def fact(self, field: str) -> Tensor:
        """(U,) float32: one field of the kind of each unit."""
        values = [float(getattr(KINDS[name], field)) for name in self.names]
        return torch.tensor(values, device=self.device)

    def set_kinds(self) -> None:
        """What each unit can do, (U,), or to each other unit, (U attacker, U victim)."""
        self.health_max = self.fact("health")
        self.shield_max = self.fact("shield")
        self.armour = self.fact("armour")
        self.radius = self.fact("radius")
        self.speed = self.fact("speed") / LOOPS_PER_SECOND  # cells in a game loop
        self.reload = self.fact("cooldown") * LOOPS_PER_SECOND  # game loops
        self.reach = self.fact("range") + self.radius  # from its centre to its target's edge
        self.cooldown_norm = self.fact("cooldown_norm")
        self.beam = self.fact("beam") > 0
        push_radius = self.fact("push_radius")
        self.contact = push_radius[:, None] + push_radius  # the distance at which two touch
        self.contact.fill_diagonal_(0)

        bonus_armoured = self.fact("bonus_armoured")[:, None]
        bonus_light = self.fact("bonus_light")[:, None]
        bonus = torch.where(self.fact("armoured") > 0, bonus_armoured, bonus_light)
        self.hit_damage = self.fact("damage")[:, None] + bonus
        ours = self.index < self.n_agents
        foes = ours[:, None] != ours
        self.shot_damage = self.hit_damage * self.fact("hits")[:, None] * foes

    def set_types(self) -> None:
        """The one-hot types of smac's features, (U, number of types), and the allies' order."""
        N = self.n_agents
        allies = self.names[:N]
        types = list(dict.fromkeys(allies))
        ranks = [types.index(name) for name in allies]
        self.rank = torch.tensor(ranks, device=self.device)  # (N,)
        if len(types) == 1:  # then smac has no types
            types = []
        rows = []
        for name in self.names:
            rows.append([float(name == type) for type in types])
        self.type_bits = torch.tensor(rows, device=self.device)
        if len(types) == 2:  # subtle: on these maps smac numbers the enemies' types in reverse
            self.type_bits[N:] = self.type_bits[N:].flip(1)

    def set_starts(self) -> None:
        """The place of each unit before the scatter. The first ones, of long range, are behind."""
        ours = square_block(self.n_agents, self.ally_start, SPACING)
        theirs = square_block(self.n_enemies, self.enemy_start, -SPACING)
        places = torch.tensor(ours + theirs, device=self.device)  # (U, 2)
        self.start = places.T.contiguous()[:, None]  # (2, 1, U)
        self.spread = torch.zeros_like(self.start)  # see push_apart
        self.spread[0] = 1e-4 * self.index

    # ------------------------------------------------------------------------- start and step
    def noise(self) -> Tensor:
        """(B, U) numbers in [0, 1), all the randomness there is: two for a reset, one a step."""
        shape = (self.n_envs, len(self.names))
        return torch.rand(shape, generator=self.generator, device=self.device)

    def reset(self) -> Step:
        N = self.n_agents
        noise = torch.stack([self.noise(), self.noise()])
        self.place = self.start + SCATTER * (noise - 0.5)  # (2, B, U)
        # smac sorts the allies by type, then by x, once an episode (1000: more than any x)
        allies = self.place[:, :, :N]
        order = (allies[0] + 1000 * self.rank).argsort(1)  # (B, N)
        self.place[:, :, :N] = allies.gather(2, order.expand(2, -1, -1))
        self.health = self.health_max.repeat(self.n_envs, 1)
        self.shield = self.shield_max.repeat(self.n_envs, 1)
        self.cooldown = torch.zeros_like(self.health)  # game loops until the weapon is ready
        self.unhurt = torch.full_like(self.health, REGENERATION_DELAY)  # loops since damage
        nobody = torch.full_like(self.health, -1, dtype=torch.int64)
        self.target = nobody  # whom a unit attacks, an index among all units; -1: nobody
        self.shot_at = nobody.clone()  # whom it shot at in the last step, for `draw`
        self.last_actions = nobody[:, :N].clone()
        self.steps = torch.zeros((), dtype=torch.int64, device=self.device)
        return self.look(torch.zeros(self.n_envs, device=self.device))

    def step(self, actions: Tensor) -> Step:
        """actions (B, N) int64: 0 no-op (the dead), then STOP, NORTH ... ATTACK + j."""
        points = self.health + self.shield
        alive = self.health > 0
        goal, moves = self.order(actions)
        # A cooldown varies by -1 to +2 game loops. No weapon shoots twice in a step: one draw does
        reload = self.reload + 3 * self.noise() - 1
        self.shot_at = torch.full_like(self.shot_at, -1)
        for _ in range(LOOPS_PER_STEP):
            self.game_loop(goal, moves, reload)
        self.last_actions = actions.clone()
        self.steps = self.steps + 1
        return self.look(self.reward(points, alive))

    # --------------------------------------------------------------------------------- orders
    def order(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Set everyone's target for this step. Return what units without a target do.

        -> goal (2, B, U), where they walk to; moves (B, U) bool, False for those that stand.
        """
        N = self.n_agents
        ally_targets = torch.where(actions >= ATTACK, actions - ATTACK + N, -1)
        self.target = torch.cat([ally_targets, self.enemy_targets()], 1)
        goal = self.place.clone()
        goal[0, :, :N] += MOVE * ((actions == EAST).float() - (actions == WEST).float())
        goal[1, :, :N] += MOVE * ((actions == NORTH).float() - (actions == SOUTH).float())
        goal[0, :, N:] = self.ally_start[0]
        goal[1, :, N:] = self.ally_start[1]
        moves = torch.ones_like(self.target, dtype=torch.bool)
        moves[:, :N] = (actions >= NORTH) & (actions < ATTACK)
        return goal, moves

    def enemy_targets(self) -> Tensor:
        """(B, M) the ally that each enemy attacks in this step, -1 for nobody."""
        N = self.n_agents
        _, distance = self.offsets()
        gap = distance[:, :, N:] - self.radius[:N, None] - self.radius[N:]  # (B, N, M)
        gap = gap.masked_fill_(self.health[:, :N, None] <= 0, torch.inf)
        closest_gap, closest = gap.min(1)  # (B, M)
        hurt = self.unhurt[:, N:] < LOOPS_PER_STEP  # in the last step
        notice = torch.where(hurt, SIGHT, NOTICE)
        noticed = torch.where(closest_gap <= notice, closest, -1)
        held = self.target[:, N:]
        held_gap = gap.gather(1, held.clamp(min=0)[:, None])[:, 0]
        keeps = (held >= 0) & (held_gap <= LEASH)
        return torch.where(keeps, held, noticed)

    # ------------------------------------------------------------------------------ game loop
    def game_loop(self, goal: Tensor, moves: Tensor, reload: Tensor) -> None:
        """One game loop of all units at once. goal (2, B, U), moves and reload (B, U)."""
        alive = self.health > 0
        aim = self.target.clamp(min=0)  # an index for `gather`, also where there is no target
        attacks = alive & (self.target >= 0) & alive.gather(1, aim)
        target_place = self.place.gather(2, aim.expand(2, -1, -1))
        way = torch.where(attacks, target_place, goal) - self.place  # (2, B, U)
        distance = length(way).clamp_(min=1e-6)
        missing = distance - torch.where(attacks, self.reach + self.radius[aim], 0)

        # Who has its target in reach shoots as soon as its weapon is ready, all at once
        in_reach = missing <= 1e-3  # in float32 a unit may stop a hair too far away
        fires = attacks & in_reach & (self.cooldown <= 0)
        hit = fires[:, :, None] & (aim[:, :, None] == self.index)  # (B, U attacker, U victim)
        if self.any_beam:
            beams = (fires & self.beam)[:, :, None]
            hit |= beams & self.swept(way, distance)
        self.wound(hit * self.shot_damage)
        self.cooldown = (torch.where(fires, reload, self.cooldown) - 1).clamp_(min=0)
        self.shot_at = torch.where(fires, aim, self.shot_at)

        # Who has not walks until it has. Who has no target walks to its goal, or stands
        walks = alive & (attacks | moves)
        part = torch.minimum(missing.clamp_(min=0), self.speed) / distance * walks  # of the way
        self.push_apart(torch.addcmul(self.place, way, part), alive)

    def swept(self, way: Tensor, distance: Tensor) -> Tensor:
        """(B, U attacker, U victim) bool: would a beam at the attacker's target touch the victim?

        way (2, B, U) and distance (B, U): from the attacker to its target.
        """
        line_x, line_y = (way / distance)[..., None]  # the line of fire, of length 1
        off_x, off_y = self.place[:, :, None] - (self.place + way)[..., None]  # target to victim
        along = (off_x * line_x + off_y * line_y).abs()
        across = (off_x * line_y - off_y * line_x).abs()
        near = along <= BEAM_DEPTH / 2 + self.radius
        return near & (across <= BEAM_WIDTH / 2 + self.radius)

    def push_apart(self, place: Tensor, alive: Tensor) -> None:
        """Move all units to `place` (2, B, U), but push apart those that overlap, each by half."""
        spread = place + self.spread  # so that two on one spot part, too
        gap = spread[..., None] - spread[:, :, None]  # (2, B, U pushed, U pushing)
        overlap = (self.contact / length(gap).clamp_(min=1e-6)).sub_(1).clamp_(min=0)
        push = overlap.mul_(0.5 * alive[:, None])  # in parts of the gap; the dead push nobody
        self.place = place + (gap * push).sum(3)
        self.place[0].clamp_(self.walk_x[0], self.walk_x[1] - 1e-3)
        self.place[1].clamp_(self.walk_y[0], self.walk_y[1] - 1e-3)

    def wound(self, attack: Tensor) -> None:
        """Take shots off shields, then off health. attack (B, U attacker, U victim): points."""
        total = attack.cumsum(1)  # the attackers' shots arrive one after another
        through = (total - self.shield[:, None]).clamp_(min=0)
        through = torch.minimum(through, attack)  # the part of each shot that the shield lets by
        # The shield may break in the middle of a hit. Armour is taken off what is left of that
        # hit, and off each whole one after it.
        whole = (through / self.hit_damage).floor_()
        rest = through - whole * self.hit_damage
        lost = whole * (self.hit_damage - self.armour) + rest.sub_(self.armour).clamp_(min=0)
        self.health = (self.health - lost.sum(1)).clamp_(min=0)

        taken = total[:, -1]  # (B, U) points
        self.unhurt = (self.unhurt + 1) * (taken == 0)
        grown = REGENERATION * (self.unhurt > REGENERATION_DELAY)
        shield = (self.shield - taken).clamp_(min=0) + grown
        self.shield = torch.minimum(shield, self.shield_max)

    # ------------------------------------------------------------------------ what smac shows
    def look(self, reward: Tensor) -> Step:
        """The battles as they are now, with the `reward` (B,) of the step that led there."""
        ours, theirs = (self.health > 0).split([self.n_agents, self.n_enemies], 1)
        won = ours.any(1) & ~theirs.any(1)
        terminated = ~(ours.any(1) & theirs.any(1))
        truncated = ~terminated & (self.steps >= self.episode_limit)
        info = dict(zip(FACTS, (won, (~ours).sum(1), (~theirs).sum(1))))
        avail = self.available()
        obs = self.observation(avail)
        return Step(obs, self.state(), avail, reward, terminated, truncated, info)

    def offsets(self) -> tuple[Tensor, Tensor]:
        """From each ally to each unit: dx and dy (2, B, N, U), distance (B, N, U)."""
        offset = self.place[:, :, None] - self.place[:, :, : self.n_agents, None]
        return offset, length(offset)

    def available(self) -> Tensor:
        """(B, N, A) bool. subtle: a move goes two cells, but smac looks only one cell ahead."""
        N = self.n_agents
        x, y = self.place[:, :, :N]
        ours = self.health[:, :N] > 0
        theirs = self.health[:, N:] > 0
        columns = [
            ~ours,  # no-op
            ours,  # stop
            ours & (y + MOVE / 2 < self.walk_y[1]),  # north
            ours & (y - MOVE / 2 >= self.walk_y[0]),  # south
            ours & (x + MOVE / 2 < self.walk_x[1]),  # east
            ours & (x - MOVE / 2 >= self.walk_x[0]),  # west
        ]
        _, distance = self.offsets()
        near = distance[:, :, N:] <= SHOOT  # (B, N, M)
        attacks = near & theirs[:, None] & ours[:, :, None]
        return torch.cat([torch.stack(columns, 2), attacks], 2)

    def bodies(self) -> Tensor:
        """(B, U, F): health and shield as parts of the whole, and the type, where there are any."""
        parts = [(self.health / self.health_max)[..., None]]
        if self.any_shield:
            parts.append((self.shield / self.shield_max)[..., None])
        parts.append(self.type_bits.expand(self.n_envs, -1, -1))
        return torch.cat(parts, 2)

    def observation(self, avail: Tensor) -> Tensor:
        """(B, N, O): open directions, every enemy, every other ally, oneself.

        Zeros for units that are dead or out of sight. The dead see only zeros.
        """
        N = self.n_agents
        alive = self.health > 0
        bodies = self.bodies()
        offset, distance = self.offsets()
        first = torch.ones_like(distance)  # of an ally: it is seen
        first[:, :, N:] = avail[:, :, ATTACK:]  # of an enemy: it may be attacked
        places = torch.stack([first, distance / SIGHT, *(offset / SIGHT)], 3)  # (B, N, U, 4)
        units = torch.cat([places, bodies[:, None].expand(-1, N, -1, -1)], 3)  # (B, N, U, 4 + F)
        units *= (alive[:, None] & (distance < SIGHT))[..., None]
        enemies = units[:, :, N:]
        others = units[:, self.index[:N, None], self.others]  # (B, N, N - 1, 4 + F)
        directions = avail[:, :, NORTH:ATTACK]
        parts = [directions, enemies.flatten(2), others.flatten(2), bodies[:, :N]]
        return torch.cat(parts, 2) * alive[:, :N, None]

    def state(self) -> Tensor:
        """(B, S): allies, enemies, the allies' last actions one-hot. Zeros for the dead."""
        N = self.n_agents
        alive = self.health > 0
        bodies = self.bodies()
        cooldown = self.cooldown / self.cooldown_norm
        x = (self.place[0] - self.center[0]) / self.extent[0]
        y = (self.place[1] - self.center[1]) / self.extent[1]
        places = torch.stack([cooldown, x, y], 2)
        units = torch.cat([bodies[..., :1], places, bodies[..., 1:]], 2)  # (B, U, 3 + F)
        units *= alive[..., None]
        allies = units[:, :N]
        enemies = torch.cat([units[:, N:, :1], units[:, N:, 2:]], 2)  # without the cooldown
        actions = torch.arange(self.n_actions, device=self.device)
        last = self.last_actions[..., None] == actions  # (B, N, A) all False before the first step
        return torch.cat([allies.flatten(1), enemies.flatten(1), last.flatten(1)], 1)

    def reward(self, points: Tensor, alive: Tensor) -> Tensor:
        """(B,): for damage to enemies, kills and the win.

        points: health + shield (B, U), alive: who lived (B, U), both before the step.
        subtle: smac takes the absolute value of the sum. So it also pays for enemies' shields
        that grow back faster than they are shot down.
        """
        N = self.n_agents
        lives = self.health > 0
        left = (self.health + self.shield) * lives
        earned = (points - left + KILL_REWARD * ~lives) * alive
        won = lives[:, :N].any(1) & ~lives[:, N:].any(1)
        total = earned[:, N:].sum(1).abs() + WIN_REWARD * won
        return total * (REWARD_SCALE / self.max_reward)

    # --------------------------------------------------------------------- heuristic, drawing
    def heuristic(self) -> Tensor:
        """(B, N) actions: attack the closest enemy until it dies; walk to it where it is far."""
        N = self.n_agents
        avail = self.available()
        offset, distance = self.offsets()
        dead = self.health[:, None, N:] <= 0
        closest = distance[:, :, N:].masked_fill(dead, torch.inf).argmin(2)
        last = self.last_actions.clamp(min=0)
        again = (last >= ATTACK) & avail.gather(2, last[..., None])[..., 0]
        attack = torch.where(again, last, ATTACK + closest)

        enemy = N + attack[..., None] - ATTACK  # its index among all units
        dx, dy = offset.gather(3, enemy.expand(2, -1, -1, -1))[..., 0]
        along_x = torch.where(dx > 0, EAST, WEST)
        along_y = torch.where(dy > 0, NORTH, SOUTH)
        walk = torch.where(dx.abs() > dy.abs(), along_x, along_y)
        stop = torch.full_like(walk, STOP)
        no_op = torch.zeros_like(walk)
        wishes = torch.stack([attack, walk, stop, no_op], 2)  # (B, N, 4)
        first = avail.gather(2, wishes).float().argmax(2, keepdim=True)  # the first possible one
        return wishes.gather(2, first)[..., 0]

    def draw(self, axes, b: int = 0) -> None:
        """Draw battle b: the last step's shots, and the living, paler where they are hurt."""
        from matplotlib.patches import Circle

        axes.set(xlim=self.walk_x, ylim=self.walk_y, aspect="equal", xticks=[], yticks=[])
        places = self.place[:, b].T.tolist()
        health = (self.health[b] / self.health_max).tolist()
        for i, name in enumerate(self.names):
            x, y = places[i]
            color = "tab:blue" if i < self.n_agents else "tab:red"
            shot_at = int(self.shot_at[b, i])
            if shot_at >= 0:
                to_x, to_y = places[shot_at]
                axes.plot([x, to_x], [y, to_y], color=color, linewidth=1, zorder=1)
            if health[i] > 0:
                alpha = 0.2 + 0.8 * health[i]
                axes.add_patch(Circle((x, y), KINDS[name].radius, color=color, alpha=alpha))
                axes.text(x, y, name[0].upper(), color="white", size=6, ha="center", va="center")
