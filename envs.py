"""Environments behind one batched interface: B episodes side by side, on one device.

    env = envs.make("checkers", n_envs=32, device="cpu", seed=0)
    step = env.reset()                  # a Step
    step = env.step(actions)            # actions (B, N) int64
    env.close()

An environment has n_envs, n_agents, n_actions, obs_dim, state_dim, episode_limit and device. It may
have: generator, its random numbers; best_return, the best return that is known; heuristic(), whose
actions (B, N) extras/heuristic.py plays; draw(axes, b), a picture of episode b as it stands.

All episodes start together. What an episode returns after its own end is padding until reset():
any finite numbers, and at least one available action for each agent.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class UsageError(ValueError):
    """What was asked for cannot be done. The message is one line: what was expected, what came."""


class EnvFailure(RuntimeError):
    """An environment failed, and the run cannot go on."""


class Step(NamedTuple):
    """What reset() and step() return, for all B episodes."""

    obs: Tensor  # (B, N, O) float32
    state: Tensor  # (B, S) float32
    avail: Tensor  # (B, N, A) bool
    reward: Tensor  # (B,) float32
    terminated: Tensor  # (B,) bool: the task itself ended, no bootstrap
    truncated: Tensor  # (B,) bool: a time limit cut it off, bootstrap
    info: dict[str, Tensor]  # (B,) each: battle_won ...; void: throw this episode away


class Batched:
    """Base of environments that compute all B episodes at once, in torch.

    `make` calls a class of yours as Class(n_envs=, device=, seed=, **env_args).
    """

    def close(self):
        pass


# ------------------------------------------------------------------------- two-step, Checkers
class TwoStep(Batched):
    """The paper's two-step game (section 5). In state 1 agent 1's action leads to 2A or 2B.

    The second step pays. Both agents see the whole state, one-hot in the order 1, 2A, 2B: obs
    (B, 2, 3), state (B, 3).
    """

    n_agents = 2
    n_actions = 2
    obs_dim = 3
    state_dim = 3
    episode_limit = 2
    best_return = 8.0

    def __init__(self, n_envs: int = 32, device="cpu"):
        self.n_envs = n_envs
        self.device = torch.device(device)
        payoff = [[[0, 0], [0, 0]], [[7, 7], [7, 7]], [[0, 1], [1, 8]]]  # [state][agent 1][agent 2]
        self.payoff = torch.tensor(payoff, device=self.device).float()
        self.one_hot = torch.eye(3, device=self.device)

    def reset(self) -> Step:
        self.steps = torch.tensor(0, device=self.device)
        self.place = torch.zeros(self.n_envs, dtype=torch.int64, device=self.device)  # 0: state 1
        return self.make_step(torch.zeros(self.n_envs, device=self.device))

    def step(self, actions: Tensor) -> Step:
        reward = self.payoff[self.place, actions[:, 0], actions[:, 1]]
        self.place = torch.where(self.place == 0, 1 + actions[:, 0], self.place)  # 1: 2A, 2: 2B
        self.steps = self.steps + 1
        return self.make_step(reward)

    def make_step(self, reward: Tensor) -> Step:
        state = self.one_hot[self.place]  # (B, 3)
        obs = state.unsqueeze(1).repeat(1, 2, 1)  # (B, 2, 3)
        avail = torch.ones(self.n_envs, 2, 2, dtype=torch.bool, device=self.device)
        terminated = (self.steps >= 2).repeat(self.n_envs)
        truncated = torch.zeros_like(terminated)
        return Step(obs, state, avail, reward, terminated, truncated, {})


class Checkers(Batched):
    """ma-gym's Checkers-v0 .. v3 (VDN paper, section 4.2), equal to the original step for step.

    A 3x8 board: nine apples and nine lemons alternate on columns 0-5; the agents start at (0, 6)
    and (2, 6). Actions: 0 down, 1 left, 2 up, 3 right, 4 stay. Agent 0 moves first; the edge and
    the other agent block. Who enters a cell eats what lies there: an apple brings the team +10 if
    agent 0 eats it and +1 if agent 1 does, a lemon -10 and -1. Every step costs 0.02.
    `terminated`: no apple is left. `truncated`: step 100.

    obs (B, 2, O): the agent's coordinates, then (lemon, apple, agent 0, agent 1, wall) of each of
    the 3x3 cells around it (no wall exists). Variants 1 and 3: both agents get both observations.
    Variants 2 and 3: each observation ends with the clock. O = 47, 94, 48, 96 for variant 0 .. 3.
    state (B, 67), everything in any variant: apples and lemons (1: still there), the clock, the
    cell of agent 0 and of agent 1, one-hot.
    """

    n_agents = 2
    n_actions = 5
    state_dim = 67
    episode_limit = 100
    best_return = 86.26

    def __init__(self, variant: int = 0, n_envs: int = 32, device="cpu"):
        self.shared = variant in (1, 3)
        self.clocked = variant in (2, 3)
        self.obs_dim = {0: 47, 1: 94, 2: 48, 3: 96}[variant]
        self.n_envs = n_envs
        self.device = torch.device(device)

        # The board of an episode is a row of 250 numbers: 5 x 10 cells (3 x 8 and a margin) of
        # (lemon, apple, agent 0, agent 1, wall). These are indices into it.
        index = torch.arange(250, device=self.device).view(5, 10, 5)
        cells = [(row, column) for row in range(3) for column in range(8)]
        around = [index[row : row + 3, column : column + 3].flatten() for row, column in cells]
        self.around = torch.stack(around)  # (24, 45) the 3x3 cells around each of the 24
        self.positions = index[1:4, 1:9, 0].flatten()  # (24,) where each cell starts
        odd = self.table([(row + column) % 2 == 1 for row in range(3) for column in range(6)])
        lemons = index[1:4, 1:7, 0].flatten()[odd]
        apples = index[1:4, 1:7, 1].flatten()[~odd]
        self.food_at = torch.cat([apples, lemons])  # (18,)

        self.targets = self.table([self.reached(*cell) for cell in cells])  # (24, 5) cells
        places = [(round(row / 3, 2), round(column / 7, 2)) for row, column in cells]
        self.places = self.table(places)  # (24, 2) coordinates, rounded as in ma-gym
        self.one_hot = torch.eye(24, device=self.device)
        # A lemon eaten by agent 0, by agent 1, an apple eaten by agent 0, by agent 1
        self.value = self.table([-10.0, -1.0, 10.0, 1.0])
        self.layers = self.table([2, 3])  # of agent 0 and agent 1

    def table(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.device)

    def reached(self, row: int, column: int) -> list[int]:
        """The cell that each action leads to."""
        cells = []
        for down, right in ((1, 0), (0, -1), (-1, 0), (0, 1), (0, 0)):
            new_row = min(max(row + down, 0), 2)
            new_column = min(max(column + right, 0), 7)
            cells.append(new_row * 8 + new_column)
        return cells

    def reset(self) -> Step:
        start = torch.tensor([6, 22], device=self.device)  # cells (0, 6) and (2, 6)
        self.cell = start.repeat(self.n_envs, 1)  # (B, 2)
        self.board = torch.zeros(self.n_envs, 250, device=self.device)  # without the agents
        self.board[:, self.food_at] = 1
        self.steps = torch.tensor(0, device=self.device)
        return self.make_step(torch.zeros(self.n_envs, device=self.device))

    def step(self, actions: Tensor) -> Step:
        old0, old1 = self.cell.unbind(1)
        new0, new1 = self.targets[self.cell, actions].unbind(1)
        new0 = torch.where(new0 == old1, old0, new0)  # agent 0 moves first
        new1 = torch.where(new1 == new0, old1, new1)
        self.cell = torch.stack([new0, new1], 1)
        lemons = self.positions[self.cell]  # where a lemon may be in the cells entered
        entered = torch.cat([lemons, lemons + 1], 1)  # (B, 4): lemons, then apples
        reward = (self.board.gather(1, entered) * self.value).sum(1) - 0.02
        self.board = self.board.scatter(1, entered, 0)
        self.steps = self.steps + 1
        return self.make_step(reward)

    def make_step(self, reward: Tensor) -> Step:
        B = self.n_envs
        food = self.board[:, self.food_at]  # (B, 18)
        clock = self.steps / self.episode_limit
        board = self.board.scatter(1, self.positions[self.cell] + self.layers, 1)
        seen = board.gather(1, self.around[self.cell].view(B, 90)).view(B, 2, 45)
        parts = [self.places[self.cell], seen]
        if self.clocked:
            parts.append(clock.expand(B, 2, 1))
        obs = torch.cat(parts, 2)
        if self.shared:
            obs = obs.view(B, 1, self.obs_dim).repeat(1, 2, 1)
        state = torch.cat([food, clock.expand(B, 1), self.one_hot[self.cell].view(B, 48)], 1)
        avail = torch.ones(B, 2, 5, dtype=torch.bool, device=self.device)
        terminated = ~food[:, :9].any(1)
        truncated = ~terminated & (self.steps >= self.episode_limit)
        return Step(obs, state, avail, reward, terminated, truncated, {})

    def draw(self, axes, b: int = 0) -> None:
        """Lemons yellow, apples red, agent 0 a blue circle, agent 1 a purple square."""
        cells = self.board[b].view(5, 10, 5)[1:4, 1:9].cpu()  # (3, 8, 5), without the margin
        rows, columns = cells[..., 0].nonzero(as_tuple=True)
        axes.plot(columns, rows, "D", color="gold", markersize=12)
        rows, columns = cells[..., 1].nonzero(as_tuple=True)
        axes.plot(columns, rows, "o", color="tab:red", markersize=16)
        cell0, cell1 = self.cell[b].tolist()
        axes.plot(cell0 % 8, cell0 // 8, "o", color="tab:blue", markersize=24)
        axes.plot(cell1 % 8, cell1 // 8, "s", color="tab:purple", markersize=24)
        axes.set(xlim=(-0.5, 7.5), ylim=(2.5, -0.5), aspect="equal", xticks=[], yticks=[])


# -------------------------------------------------------------------------- single environments
# Any other environment has PyMARL's interface: get_env_info() -> dict of SIZES,
# reset(), step(list of N ints) -> (reward, terminated, info), get_obs() (N, O), get_state() (S,),
# get_avail_actions() (N, A), close(), and render() -> (H, W, 3) if it can be drawn.
# info["episode_limit"] True: time ran out (truncated). info may also hold FACTS, for metrics.csv.
SIZES = ("n_agents", "n_actions", "obs_shape", "state_shape", "episode_limit")
FACTS = ("battle_won", "dead_allies", "dead_enemies")


class GameFailure(Exception):
    """The game misbehaved: the episode is void, but a new game may well work."""


class Smac:
    """smac's StarCraft2Env. What the game does wrong becomes a GameFailure, which ends this object.

    replay_dir: the folder where close() saves a StarCraft replay with all episodes of this game.
    """

    texts = ("difficulty", "game_version", "replay_dir")  # never numbers: 4.10 is not 4.1
    needs = (
        "smac:MAP needs StarCraft's smac (make install-smac; PyPI's is another package) and the "
        "game in the folder SC2PATH, with smac's maps in Maps/SMAC_Maps"
    )

    def __init__(self, map_name: str, seed: int, replay_dir: str = "", **arguments):
        game = Path(os.environ.get("SC2PATH", "~/StarCraftII")).expanduser()
        for path in (game / "Versions", game / f"Maps/SMAC_Maps/{map_name}.SC2Map"):
            if not path.exists():
                raise UsageError(f"{path} does not exist; {self.needs}")
        self.replay_dir = replay_dir
        if replay_dir:
            os.makedirs(replay_dir, exist_ok=True)
        try:
            from absl import flags
            from smac.env import StarCraft2Env

            flags.FLAGS.sc2_timeout = 60  # seconds that a game may hang; pysc2 waits 360
            self.env = StarCraft2Env(  # starts no game yet
                map_name=map_name,
                seed=seed,
                replay_dir=os.path.abspath(replay_dir),  # a relative one would be in SC2PATH
                replay_prefix=f"{map_name}_{seed}",  # otherwise workers write the same file
                **arguments,
            )
        except Exception as error:  # no smac, PyPI's, not with this protobuf, a wrong argument
            raise UsageError(f"{type(error).__name__}: {error}; {self.needs}") from None
        self.get_env_info = self.env.get_env_info
        self.get_obs = self.env.get_obs
        self.get_state = self.env.get_state
        self.get_avail_actions = self.env.get_avail_actions
        self.began = False
        self.ended = False  # an episode has ended

    def play(self, method, *arguments):
        try:
            return method(*arguments)
        except AssertionError:
            raise  # an action that is not available: our mistake, not the game's
        except Exception as error:  # a game that dies shows in many ways
            raise GameFailure(f"{type(error).__name__}: {error}") from None

    def reset(self):
        if self.began and not self.ended:  # subtle: smac would add to its max_reward again
            raise GameFailure("reset before the first episode had ended, which smac cannot do")
        self.began = True
        restarts = self.env.force_restarts
        self.play(self.env.reset)
        living = all(unit.health > 0 for unit in self.env.agents.values())
        if self.env.force_restarts != restarts or not living:
            raise GameFailure("the game crashed in reset, and smac started it without units")

    def step(self, actions: list[int]):  # with heuristic_ai smac writes what it plays into them
        reward, terminated, info = self.play(self.env.step, actions)
        if terminated and not info:  # smac's answer to a crash, with stale observations
            raise GameFailure("the game crashed in step")
        self.ended = self.ended or terminated
        return reward, terminated, info

    def close(self):
        with contextlib.closing(self.env):
            if self.replay_dir and self.ended:
                self.env.save_replay()


def find(name: str):
    """The class or function that module:Class names; the current directory counts as well."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from None


def construct(made, **arguments):
    """made(**arguments). Raises UsageError for arguments that it does not take."""
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError as error:
        raise UsageError(f"--env-args: {error}") from None
    return made(**arguments)


def make_single(name: str, seed: int, arguments: dict):
    """One environment with PyMARL's interface. It gets a seed if it takes one."""
    kind, _, which = name.partition(":")
    if kind == "smac":
        return Smac(which, seed, **arguments)
    if kind == "ma_gym":
        from extras.magym import MaGym

        return MaGym(which, seed, **arguments)
    made = find(name)
    if "seed" in inspect.signature(made).parameters:
        arguments = {"seed": seed, **arguments}
    return construct(made, **arguments)


def check(what: str, given, shape: tuple) -> np.ndarray:
    """`given` as float32 numbers. Raises UsageError if they are not finite or of another shape."""
    try:
        array = np.asarray(given)
    except ValueError:  # rows of unlike lengths
        array = np.asarray(None)  # no number, so refused below
    if array.dtype.kind in "biuf" and array.shape == shape:
        array = array.astype(np.float32)
        if np.isfinite(array).all():
            return array
    text = " ".join(repr(given).split())[:80]
    raise UsageError(f"{what} must be finite numbers of shape {shape}, not {array.shape}: {text}")


def check_flags(what: str, given, shape: tuple) -> np.ndarray:
    """`given` as bools. Raises UsageError if they are not 0 and 1, or of another shape."""
    array = check(what, given, shape)
    if ((array != 0) & (array != 1)).any():
        raise UsageError(f"{what} must be True or False (1 or 0), not {array.tolist()}")
    return array > 0


class Group:
    """The environments of one worker process, in lockstep. Answers NumPy arrays, a row for each."""

    def __init__(self, name: str, seeds: list[int], arguments: dict):
        self.envs = [make_single(name, seed, arguments) for seed in seeds]
        info = self.envs[0].get_env_info()
        self.sizes = []  # in the order of SIZES
        for key in SIZES:
            size = info.get(key)
            if not isinstance(size, (int, np.integer)) or size < 1:
                raise UsageError(f"get_env_info()[{key!r}] must be a whole number above 0: {size}")
            self.sizes.append(int(size))

    def get_sizes(self) -> list[int]:
        return self.sizes

    def reset(self) -> Step:
        self.steps = 0
        self.rows = []
        for env in self.envs:
            env.reset()
            self.rows.append(self.look(env, 0.0, False, {}))
        return self.join()

    def step(self, actions: list[list[int]]) -> Step:
        self.steps += 1
        for b, env in enumerate(self.envs):
            if not self.over[b]:  # what follows an episode's end is padding
                reward, terminated, info = env.step(actions[b])
                self.rows[b] = self.look(env, reward, terminated, info)
        return self.join()

    def look(self, env, reward, terminated, info: dict) -> tuple:
        """What one environment shows now."""
        late = info.get("episode_limit", False)
        facts = {key: check(f"info[{key!r}]", info[key], ()) for key in FACTS if key in info}
        shown = (env.get_obs(), env.get_state(), env.get_avail_actions())
        return (*shown, reward, terminated, late, facts)

    def join(self) -> Step:
        """The rows of all n environments, checked."""
        n = len(self.rows)
        N, A, O, S, T = self.sizes
        obs, state, avail, reward, terminated, late, facts = zip(*self.rows)
        obs = check("get_obs()", obs, (n, N, O))
        state = check("get_state()", state, (n, S))
        avail = check_flags("get_avail_actions()", avail, (n, N, A))
        if not avail.any(-1).all():
            raise UsageError(f"get_avail_actions() leaves an agent no action: {avail.tolist()}")
        reward = check("reward", reward, (n,))
        terminated = check_flags("terminated", terminated, (n,))
        late = check_flags("info['episode_limit']", late, (n,))
        truncated = late | (~terminated & (self.steps >= T))
        terminated = terminated & ~truncated  # PyMARL says both at a time limit
        self.over = terminated | truncated
        info = {"void": np.zeros(n, bool)}
        for key in FACTS:  # NaN where it is not told
            info[key] = np.array([each.get(key, np.nan) for each in facts], np.float32)
        return Step(obs, state, avail, reward, terminated, truncated, info)

    def picture(self, b: int) -> np.ndarray:
        return np.asarray(self.envs[b].render(), np.uint8)  # (H, W, 3)

    def close(self):
        for env in self.envs:
            env.close()


# ----------------------------------------------------------------------------- worker processes
START = 60.0  # seconds that a starting worker has beyond the timeout
MAX_FAILURES = 10  # in a row, of one worker
GRACE = 10.0  # seconds that a worker may take to close its environments before it is killed


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def end_with_the_trainer() -> None:
    """Kills a worker that still hangs GRACE seconds after the trainer is gone."""
    multiprocessing.parent_process().join()
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def worker(pipe, name: str, seeds: list[int], arguments: dict) -> None:
    """The life of a worker process: it plays as told until the trainer closes the pipe."""
    os.setsid()  # Ctrl-C reaches the trainer alone; killpg ends this process and all it started
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an exception, so `finally` runs
    threading.Thread(target=end_with_the_trainer, daemon=True).start()
    torch.set_num_threads(1)
    random.seed(seeds[0])
    np.random.seed(seeds[0])
    torch.manual_seed(seeds[0])
    group = None
    try:
        while True:
            method, given = pipe.recv()
            try:
                if group is None:  # made here, so that its errors are answered
                    group = Group(name, seeds, arguments)
                answer = ("ok", getattr(group, method)(*given))
            except GameFailure as error:
                answer = ("void", one_line(error))
            except UsageError as error:
                answer = ("usage", f"{name}: {one_line(error)}")
            except Exception as error:
                traceback.print_exc()
                answer = ("error", f"{name}: {type(error).__name__}: {one_line(error)}")
            pipe.send(answer)
    except (EOFError, OSError):
        pass  # the trainer has closed the pipe, or is gone
    finally:
        threading.Timer(GRACE, os.killpg, (0, signal.SIGKILL)).start()  # if close() hangs
        try:
            if group is not None:
                group.close()
        finally:
            os.killpg(0, signal.SIGKILL)  # this process and whatever it has started and left


class Workers:
    """B single environments in worker processes, behind the batched interface (Linux and macOS).

    There are at most as many workers as cores, each with its share of the environments; smac's
    games get one each. A worker that dies, hangs (`timeout` seconds for each environment of its
    share, START more for a reset) or raises GameFailure is ended: its running episodes are void,
    and the next reset starts another. MAX_FAILURES in a row raise EnvFailure; so does any other
    exception of an environment. UsageError tells what is wrong with its answers. A script that
    uses this needs `if __name__ == "__main__":`.
    """

    def __init__(self, name, n_envs, device, seed, arguments, timeout=120.0):
        self.name = name
        self.n_envs = n_envs
        self.device = device
        self.arguments = arguments
        self.voided = 0  # episodes
        self.resets = 0
        self.warned = set()
        self.seeds = random.Random(seed)  # every environment that is ever started gets its own
        self.share = math.ceil(n_envs / os.cpu_count())  # environments of a worker
        if name.startswith("smac:"):
            self.share = 1
        self.timeout = timeout * self.share
        self.groups = range(math.ceil(n_envs / self.share))  # one worker each
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch"])  # once, not by each worker
        self.workers = {}  # {g: (process, pipe)}
        self.failures = [0] * len(self.groups)  # in a row
        for g in self.groups:
            self.start(g)
        try:
            sizes = self.ask("get_sizes", {g: () for g in self.groups})[0]
        except BaseException:
            self.close()
            raise
        self.n_agents, self.n_actions, self.obs_dim, self.state_dim, self.episode_limit = sizes

    def start(self, g: int):
        pipe, theirs = self.context.Pipe()
        count = min(self.share, self.n_envs - g * self.share)
        seeds = [self.seeds.randrange(2**31) for _ in range(count)]
        given = (theirs, self.name, seeds, self.arguments)
        process = self.context.Process(target=worker, args=given, daemon=True)
        process.start()
        theirs.close()
        if self.share > 1:  # otherwise two of them may run on one core while another is idle
            with contextlib.suppress(AttributeError, OSError):  # macOS; a core that is not ours
                os.sched_setaffinity(process.pid, {g})
        self.workers[g] = (process, pipe)

    def reset(self) -> Step:
        self.resets += 1
        self.rows = {}  # {g: the last Step of a worker}
        while len(self.rows) < len(self.groups):  # what fails is started anew
            missing = {g: () for g in self.groups if g not in self.rows}
            for g in missing:
                if g not in self.workers:
                    self.start(g)
            self.rows.update(self.ask("reset", missing))
        return self.join()

    def step(self, actions: Tensor) -> Step:
        parts = actions.cpu().split(self.share)
        running = {}
        for g in self.groups:
            on = ~(self.rows[g].terminated | self.rows[g].truncated)
            if on.any():
                running[g] = on
        answers = self.ask("step", {g: (parts[g].tolist(),) for g in running})
        for g, on in running.items():
            answer = answers.get(g)
            if answer is None:  # what was running has ended, and counts for nothing
                self.voided += int(on.sum())
                last = self.rows[g]
                info = {**last.info, "void": on}
                answer = last._replace(terminated=last.terminated | on, info=info)
            elif (answer.terminated | answer.truncated).any():
                self.failures[g] = 0
            self.rows[g] = answer
        return self.join()

    def join(self) -> Step:
        """The rows of all workers, as tensors."""
        *columns, infos = zip(*(self.rows[g] for g in self.groups))
        fields = [torch.from_numpy(np.concatenate(column)).to(self.device) for column in columns]
        info = {}
        for key in infos[0]:
            values = np.concatenate([each[key] for each in infos])
            if np.isfinite(values).any():  # some environment tells it; 0 for the others
                info[key] = torch.from_numpy(np.nan_to_num(values)).to(self.device)
        if self.resets <= 3:  # in the first episodes
            self.warn("get_obs()", fields[0])
            self.warn("get_state()", fields[1])
        return Step(*fields, info)

    def warn(self, what: str, numbers: Tensor):
        largest = numbers.abs().max().item()
        if largest > 5 and what not in self.warned:
            self.warned.add(what)
            text = f"{self.name}: {what} has numbers up to {largest:g}; networks learn little from"
            print(text, "numbers far above 1: divide them", file=sys.stderr)

    def ask(self, method: str, given: dict) -> dict:
        """Worker g does method(*given[g]), all at the same time -> {g: answer}.

        Those that failed are missing in it, and have been ended.
        """
        deadline = time.monotonic() + self.timeout
        if method != "step":
            deadline += START
        answers = {}
        try:
            for g, arguments in given.items():
                with contextlib.suppress(OSError, KeyError):  # it has ended, as `receive` finds
                    self.workers[g][1].send((method, arguments))
            for g in given:
                kind, answer = self.receive(g, deadline)
                if kind == "ok":
                    answers[g] = answer
                elif kind == "void":
                    self.count_failure(g, method, answer)
                elif kind == "usage":
                    raise UsageError(answer)
                else:
                    raise EnvFailure(answer)
        finally:  # also after Ctrl-C: a late answer would be taken for the next one
            self.end([g for g in given if g not in answers], grace=0.0)
        return answers

    def receive(self, g: int, deadline: float) -> tuple[str, object]:
        try:
            pipe = self.workers[g][1]
            if pipe.poll(max(0.0, deadline - time.monotonic())):
                return pipe.recv()
            return "void", f"no answer within {self.timeout:g} seconds (--env-timeout)"
        except (EOFError, OSError, KeyError):
            return "void", "its process died"

    def count_failure(self, g: int, method: str, why: str):
        self.failures[g] += 1
        if method == "reset":
            self.voided += 1  # an episode that could not begin
        text = f"{self.name}: worker {g} failed in {method}: {why} ({self.failures[g]} in a row)"
        if self.failures[g] >= MAX_FAILURES or method == "get_sizes":
            raise EnvFailure(text)
        print(text, file=sys.stderr)

    def end(self, which: list[int], grace: float):
        """Let workers close their environments; then kill what is left of them and their games."""
        ending = [self.workers.pop(g) for g in which if g in self.workers]
        for _, pipe in ending:
            pipe.close()
        deadline = time.monotonic() + grace
        for process, _ in ending:
            process.join(max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(OSError):  # they have all ended
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()

    def close(self):
        self.end(list(self.workers), GRACE)

    def draw(self, axes, b: int = 0):
        g, row = divmod(b, self.share)
        for picture in self.ask("picture", {g: (row,)}).values():
            axes.imshow(picture)
        axes.axis("off")


# ------------------------------------------------------------------------ by name, as a picture
CHECKERS = {"checkers": 0, "checkers-v0": 0, "checkers-v1": 1, "checkers-v2": 2, "checkers-v3": 3}


def read_arguments(name: str, pairs) -> dict:
    """("size=7", "map=3m") -> {"size": 7, "map": "3m"}: a Python literal, or else text."""
    texts = Smac.texts if name.startswith("smac:") else ()
    arguments = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key in arguments:
            raise UsageError(f"--env-args takes key=value, each key once, not {pair!r}")
        arguments[key] = text
        if text in ("true", "false", "none"):
            text = text.title()
        if key not in texts:
            with contextlib.suppress(ValueError, SyntaxError):
                arguments[key] = ast.literal_eval(text)
    return arguments


def find_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # subtle: a Generator, because "meta" makes tensors without numbers, but no Generator
        return torch.zeros(1, device=torch.Generator(device).device).device
    except RuntimeError:
        raise UsageError(f"--device must be auto, cpu or cuda, not {device!r}") from None


def make(name, n_envs=32, device="cpu", seed=0, arguments=(), timeout=120.0):
    """The environment called `name`. arguments: key=value ..., for those that take any.

    timeout: seconds that one reset or step of a single environment may take.
    """
    device = find_device(device)
    kind, colon, which = name.partition(":")
    arguments = read_arguments(name, arguments)
    if kind in ("smac", "ma_gym"):
        return Workers(name, n_envs, device, seed, arguments, timeout)
    if colon and kind != "skirmish":
        made = find(name)
        if inspect.isclass(made) and issubclass(made, Batched):
            return construct(made, n_envs=n_envs, device=device, seed=seed, **arguments)
        return Workers(name, n_envs, device, seed, arguments, timeout)
    if arguments:
        raise UsageError(f"{name} takes no --env-args, got {', '.join(arguments)}")
    if kind == "skirmish":
        from extras.skirmish import Skirmish

        return Skirmish(which, n_envs, device, seed)
    if name == "two-step":
        return TwoStep(n_envs, device)
    if name in CHECKERS:
        return Checkers(CHECKERS[name], n_envs, device)
    raise UsageError(
        f"unknown environment {name!r}; there are two-step, {', '.join(CHECKERS)}, "
        "skirmish:MAP, smac:MAP, ma_gym:ID and module:Class"
    )


def record(env, choose, path) -> None:
    """Draw one episode of environment 0 into a GIF.

    choose(step, memory) -> actions (B, N), memory is the policy; its memory is None at the start.
    """
    path = Path(path)
    if path.suffix != ".gif" or not path.absolute().parent.is_dir():
        raise UsageError(f"--record must be a .gif in a folder that exists, not {str(path)!r}")
    if not hasattr(env, "draw"):
        raise UsageError("--record: this environment cannot be drawn")
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6, 4)).subplots()
    writer = PillowWriter(fps=6)
    writer.setup(axes.figure, path, dpi=90)
    step = env.reset()
    memory = None
    score = 0.0
    for t in range(env.episode_limit + 1):
        axes.clear()
        env.draw(axes)
        axes.set_title(f"step {t}    return {score:.2f}")
        writer.grab_frame()
        if step.terminated[0] or step.truncated[0]:
            break
        actions, memory = choose(step, memory)
        step = env.step(actions)
        score += step.reward[0]
    writer.finish()  # only now an older file is replaced
