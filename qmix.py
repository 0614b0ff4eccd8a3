"""QMIX in one file (Rashid et al., ICML 2018, arXiv 1803.11485), with VDN, IQL and the paper's ablations.

Agents that act apart learn from one team reward. Each agent a has its own value Q_a(history, action). A mixing network
joins the values of the chosen actions into Q_tot, never decreasing in any Q_a, so that each agent's own argmax is also
the team's (Eq. 4, 5). Training may look at the true state; acting needs each agent's observation alone.

    python qmix.py --env checkers          # ends at a greedy return of about 83.5; README.md has the figures

Read from top to bottom: Config, agent, mixers, replay, rollout, loss, then the run around them.

Axes      B episodes, T steps, N agents, A actions, O observation, S state, H hidden units, E mixing units; always in
          the order (B, T, N, last). obs, state and avail have T+1 rows, one more than actions and reward: what follows
          the last action is there too.
Letters   the paper's action u is `actions`, its history tau what `hidden` remembers; hyper-networks are w1, b1, w2, v.
Episodes  `filled` marks the steps that happened; the rest of a row is padding. `terminated` cuts the bootstrap, being
          `truncated` by a time limit does not.

Departures from the paper, each marked where it stands:
  1. hyper-networks have one hidden layer, as in JMLR (arXiv 2003.08839) and the authors' code (--hypernet-dim 0: ICML)
  2. double Q-learning in the target, as in the authors' code (--no-double-q: the plain maximum of Eq. 6)
  3. several environments play at once; the number of updates per episode stays what it is for one
  4. PRESETS: what the small environments need instead of the authors' numbers for StarCraft
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import fcntl
import io
import json
import math
import os
import platform
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import envs
from envs import UsageError

# Departure 4: what an environment needs instead of the defaults below; flags override both.
PRESETS = {
    # The paper's appendix: uniform exploration, last 500 episodes, target every 100, 8 mixing units. Adam with a larger
    # step and half the updates, because a reader waits; one thread, because the tensors are tiny.
    "two-step": dict(total_steps=10_000, num_envs=25, buffer_size=500, epsilon_finish=1.0, target_update_episodes=100,
                     mixing_dim=8, hypernet_dim=0, episodes_per_update=2.0, optimizer="adam", lr=3e-3, test_episodes=1,
                     test_interval_steps=1000, threads=1),
    # Checkers has traps at 48, 59.64 and 72. The way out is what the values of many half-random episodes add up to:
    # many episodes (64 environments play in a tenth of the time, so an update per 10), precise updates (Adam, a
    # learning rate that falls, rewards of about 1), targets that carry rewards back fast (they follow at once, and look
    # a little further than one step), and agents that explore differently: one tries much while the other does what it
    # knows. Measured effects are in docs/results.md. All greedy episodes are the same here, so one tells.
    "checkers": dict(total_steps=1_250_000, num_envs=64, episodes_per_update=10.0, buffer_size=4000, optimizer="adam",
                     lr=1e-3, lr_anneal=True, td_lambda=0.2, reward_scale=0.1, target_tau=0.1,
                     epsilon_anneal_steps=200_000, epsilon_spread=0.5, test_episodes=1, test_interval_steps=20_000,
                     threads=1),
    # Minutes instead of hours: Adam and Q(lambda) for the authors' RMSprop and one-step targets, an update per 4
    # episodes; a target that follows sooner and a replay that forgets the first, random battles sooner make up for the
    # updates that are missing; the falling learning rate steadies the end; a second thread gains a fifth at most, and
    # on a busy machine costs far more. Measured effects are in docs/results.md.
    "skirmish": dict(total_steps=300_000, num_envs=64, episodes_per_update=4.0, optimizer="adam", lr=1e-3,
                     lr_anneal=True, td_lambda=0.6, target_tau=0.05, buffer_size=1000, test_episodes=64,
                     test_interval_steps=20_000, threads=1),
}


@dataclasses.dataclass(init=False)
class Config:
    """Every number of a run. "(authors)": the default is the paper's and PyMARL's for StarCraft; see also PRESETS.

    `Config(env="checkers", lr=1e-3)`: what is given, else the environment's preset, else the default below.
    """

    env: str = "checkers"
    """two-step, checkers, checkers-v1 .. -v3, skirmish:MAP, smac:MAP, ma_gym:ID, or module:Class (your own)"""
    env_args: tuple[str, ...] = ()
    """key=value ...: arguments of a smac, ma_gym or own environment, such as difficulty=7"""
    algo: str = "qmix"
    """iql (Tan 1993), vdn (Sunehag 2017), qmix; ablations vdn-s, qmix-lin, qmix-ns; not learned: random, heuristic"""
    seed: int = 1
    """seeds the weights, the environments, exploration and sampling"""
    total_steps: int = 2_000_000
    """length of the run, environment steps summed over the environments (SMAC: 2 million)"""
    num_envs: int = 8
    """environments that play side by side (authors: 1, or 8 processes)"""
    device: str = "auto"
    """auto, cpu or cuda: where networks, replay and batched environments live"""
    out: str = ""
    """run directory; empty: a new one under runs/"""
    gamma: float = 0.99
    """discount per step (authors)"""
    lr: float = 5e-4
    """learning rate, per update (authors)"""
    lr_anneal: bool = False
    """let the learning rate fall linearly to a tenth over the second half of the run (authors: no)"""
    compile: bool = False
    """on a GPU: record acting, the environment's step and the update as CUDA graphs; elsewhere a line says it cannot"""
    threads: int = 0
    """CPU threads; 0: as many as torch takes by itself"""
    optimizer: str = "rmsprop"
    """rmsprop (alpha 0.99, eps 1e-5: authors) or adam (torch's defaults: PyMARL2)"""
    batch_size: int = 32
    """whole episodes per update (authors)"""
    buffer_size: int = 5000
    """episodes kept for replay (authors)"""
    save_replay: bool = True
    """keep the replay in the checkpoint; without it a resumed run starts with an empty one and is not exact"""
    checkpoint_seconds: float = 5.0
    """least seconds between checkpoints; a costly one (a huge replay) is written less often"""
    episodes_per_update: float = 1.0
    """new episodes per gradient step, however many environments play (authors)"""
    target_update_episodes: int = 200
    """new episodes between copies of the networks into their targets (authors)"""
    target_tau: float = 0.0
    """above 0: no copies; the target moves by this share to the live networks after each update (DDPG)"""
    epsilon_start: float = 1.0
    """share of random actions at the start (authors)"""
    epsilon_finish: float = 0.05
    """share of random actions after epsilon_anneal_steps (authors)"""
    epsilon_anneal_steps: int = 50_000
    """environment steps over which epsilon falls linearly (authors)"""
    epsilon_spread: float = 0.0
    """above 0: each agent draws its own epsilon per episode, log-uniform from epsilon_finish to this (after Ape-X)"""
    double_q: bool = True
    """the live network chooses the next action, the target network values it (authors); off: plain maximum, Eq. 6"""
    td_lambda: float = 0.0
    """0: one-step targets (Eq. 6); above: Peng's Q(lambda) (PyMARL2: 0.6)"""
    reward_scale: float = 1.0
    """the learner sees the reward times this (authors: 1); all returns shown are the environment's own"""
    grad_clip: float = 10.0
    """largest norm of the gradient, agent and mixer together (authors)"""
    hidden_dim: int = 64
    """GRU units of an agent (authors)"""
    mixing_dim: int = 32
    """units of the mixing network (authors)"""
    hypernet_dim: int = 64
    """hidden units of the weight hyper-networks (JMLR, PyMARL); 0: a single linear layer (ICML)"""
    test_interval_steps: int = 10_000
    """environment steps between greedy evaluations (SMAC)"""
    test_episodes: int = 32
    """episodes per evaluation (SMAC; the paper: 20)"""

    def __init__(self, **given):
        known = {field.name: field.default for field in dataclasses.fields(Config)}
        if unknown := given.keys() - known.keys():
            raise UsageError(f"unknown setting {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        kind = str(given.get("env", known["env"])).split(":")[0]
        preset = next((p for name, p in PRESETS.items() if kind == name or kind.startswith(f"{name}-v")), {})
        for name, value in (known | preset | given).items():
            setattr(self, name, tuple(value) if name == "env_args" else value)

    def check(self) -> Config:
        """Return self, or raise UsageError with what was expected and what came."""
        choices = dict(algo=(*MIXERS, "random", "heuristic"), optimizer=("rmsprop", "adam"))
        ranges = dict(  # name: lowest, highest
            seed=(0, 2**63 - 1), threads=(0, 4096), total_steps=(1, 10**12), num_envs=(1, 10**6), gamma=(0, 1),
            lr=(1e-12, 10), checkpoint_seconds=(0, 1e6),
            batch_size=(1, 10**6), buffer_size=(1, 10**8), episodes_per_update=(1e-3, 1e6),
            target_update_episodes=(1, 10**9), target_tau=(0, 1), epsilon_start=(0, 1), epsilon_finish=(0, 1),
            epsilon_anneal_steps=(1, 10**12), epsilon_spread=(0, 1), td_lambda=(0, 1), reward_scale=(1e-9, 1e9),
            grad_clip=(1e-9, 1e9), hidden_dim=(1, 10**5), mixing_dim=(1, 10**5), hypernet_dim=(0, 10**5),
            test_interval_steps=(1, 10**12), test_episodes=(1, 10**6))
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            flag = "--" + name.replace("_", "-")
            kinds = {"int": int, "float": (int, float), "bool": bool, "str": str,
                     "tuple[str, ...]": tuple}[field.type]  # annotations are strings here
            if not isinstance(value, kinds) or (isinstance(value, bool) and field.type != "bool"):
                raise UsageError(f"{flag} must be of type {field.type}, not {value!r}")
            if name in choices and value not in choices[name]:
                raise UsageError(f"{flag} must be one of {', '.join(choices[name])}, not {value!r}")
            if name in ranges and not ranges[name][0] <= value <= ranges[name][1]:  # also refuses NaN
                raise UsageError(f"{flag} must lie between {ranges[name][0]} and {ranges[name][1]}, not {value}")
        for name in ("batch_size", "num_envs"):
            if getattr(self, name) > self.buffer_size:
                raise UsageError(f"--{name.replace('_', '-')} ({getattr(self, name)}) must not be larger than "
                                 f"--buffer-size ({self.buffer_size})")
        if self.epsilon_spread > 0 and not 0 < self.epsilon_finish <= self.epsilon_spread:
            raise UsageError(f"--epsilon-finish ({self.epsilon_finish}) must lie above 0, and not above "
                             f"--epsilon-spread ({self.epsilon_spread})")
        return self

    def epsilon(self, env_steps: int, draws: Tensor) -> Tensor:
        """Share of random actions: linear from start to finish, or, with epsilon_spread, log-uniform from finish to
        spread where that is more. draws: uniform in [0, 1), one per agent and episode; returns their shape."""
        done, start, finish = min(1.0, env_steps / self.epsilon_anneal_steps), self.epsilon_start, self.epsilon_finish
        shares = torch.full_like(draws, start + done * (finish - start))
        return shares.maximum(finish * (self.epsilon_spread / finish) ** draws) if self.epsilon_spread else shares


# ------------------------------------------------------------------------------------------------------- the networks


class Agent(nn.Module):
    """DRQN agent, fc - GRU - fc (section 4). All agents share its weights and are told apart by a one-hot id."""

    def __init__(self, obs_dim: int, n_actions: int, n_agents: int, hidden_dim: int):
        super().__init__()
        self.obs_dim, self.n_actions, self.n_agents = obs_dim, n_actions, n_agents
        self.fc1 = nn.Linear(obs_dim + n_actions + n_agents, hidden_dim)
        self.gru = nn.GRU(hidden_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, n_actions)

    def inputs(self, obs: Tensor, last_actions: Tensor) -> Tensor:
        """What the network reads at each step: observation, one-hot last action, one-hot id.

        obs (B, T, N, O) float32; last_actions (B, T, N) int64, -1 where there is none yet. Returns (T, B*N, O+A+N),
        time first, as the GRU wants it.
        """
        B, T, N, _ = obs.shape
        last = F.one_hot(last_actions + 1, self.n_actions + 1)[..., 1:]  # (B, T, N, A), zeros for -1
        ids = torch.eye(N, device=obs.device).expand(T, B, N, N)
        return torch.cat([obs.transpose(0, 1), last.transpose(0, 1), ids], dim=-1).view(T, B * N, -1)

    def forward(self, inputs: Tensor, hidden: Tensor | None = None,
                lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Q-values of T steps: a whole episode in the loss, T = 1 when acting.

        hidden (1, B*N, H) is what an earlier call returned, None (zeros) at the start of an episode. lengths (B,), on
        the host and longest first: what lies behind the end of an episode may be left out, its q is zero then. Returns
        q (B, T, N, A) and the new hidden.
        """
        (T, R, _), N, q = inputs.shape, self.n_agents, []  # R = B*N
        stretch = 16 if inputs.device.type == "cpu" else T  # steps at a time: few enough for the processor's cache
        for t in range(0, T, stretch):
            rows = R if lengths is None else N * int((lengths >= t).sum())  # row `length` follows the last action
            x = F.relu(self.fc1(inputs[t:t + stretch, :rows]))
            x, hidden = self.gru(x, hidden if hidden is None else hidden[:, :rows])
            q.append(F.pad(self.fc2(x), (0, 0, 0, R - rows)))  # (stretch, B*N, A)
        return torch.cat(q).view(T, R // N, N, -1).transpose(0, 1), hidden  # (B, T, N, A)


# A mixer maps q (B, T, N), the agents' values of their chosen actions, and state (B, T, S) to Q_tot (B, T, 1).


def state_value(state_dim: int, mixing_dim: int) -> nn.Module:
    """V(s), the final bias of the mixer: two layers, unrestricted in sign."""
    return nn.Sequential(nn.Linear(state_dim, mixing_dim), nn.ReLU(), nn.Linear(mixing_dim, 1))


def hypernet(state_dim: int, hypernet_dim: int, n_weights: int) -> nn.Module:
    """A network that writes weights of another from the state (Ha et al. 2017); the mixer takes their absolute value.

    Departure 1: ICML has a single linear layer (hypernet_dim 0), JMLR and the authors' code one hidden layer.
    """
    if hypernet_dim == 0:
        return nn.Linear(state_dim, n_weights)
    return nn.Sequential(nn.Linear(state_dim, hypernet_dim), nn.ReLU(), nn.Linear(hypernet_dim, n_weights))


class QMIX(nn.Module):
    """Mixing network of one hidden layer; its weights are non-negative functions of the state (Figure 2a, Eq. 5)."""

    def __init__(self, n_agents: int, state_dim: int, cfg: Config):
        super().__init__()
        self.w1 = hypernet(state_dim, cfg.hypernet_dim, n_agents * cfg.mixing_dim)
        self.b1 = nn.Linear(state_dim, cfg.mixing_dim)
        self.w2 = hypernet(state_dim, cfg.hypernet_dim, cfg.mixing_dim)
        self.v = state_value(state_dim, cfg.mixing_dim)

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        w1 = self.w1(state).abs().view(*q.shape, -1)  # (B, T, N, E); |.| makes dQ_tot/dQ_a >= 0, Eq. 5
        hidden = F.elu((q.unsqueeze(-1) * w1).sum(-2) + self.b1(state))  # (B, T, E)
        w2 = self.w2(state).abs()  # (B, T, E)
        return (hidden * w2).sum(-1, keepdim=True) + self.v(state)  # (B, T, 1)


class QMIXNS(nn.Module):
    """Ablation QMIX-NS: the same mixing network with weights that do not see the state."""

    def __init__(self, n_agents: int, state_dim: int, cfg: Config):
        super().__init__()
        self.hidden = nn.Linear(n_agents, cfg.mixing_dim)  # nn.Linear also initialises the weights and biases
        self.final = nn.Linear(cfg.mixing_dim, 1)

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        hidden = F.elu(F.linear(q, self.hidden.weight.abs(), self.hidden.bias))  # (B, T, E)
        return F.linear(hidden, self.final.weight.abs(), self.final.bias)  # (B, T, 1)


class QMIXLin(nn.Module):
    """Ablation QMIX-Lin: no hidden layer, a non-negative weighted sum whose weights and bias see the state."""

    def __init__(self, n_agents: int, state_dim: int, cfg: Config):
        super().__init__()
        self.w = hypernet(state_dim, cfg.hypernet_dim, n_agents)
        self.v = state_value(state_dim, cfg.mixing_dim)

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        return (q * self.w(state).abs()).sum(-1, keepdim=True) + self.v(state)


class VDN(nn.Module):
    """Value decomposition (Sunehag et al. 2017): the plain sum."""

    def __init__(self, n_agents: int, state_dim: int, cfg: Config):
        super().__init__()

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        return q.sum(-1, keepdim=True)


class VDNS(nn.Module):
    """Ablation VDN-S: the sum plus V(s)."""

    def __init__(self, n_agents: int, state_dim: int, cfg: Config):
        super().__init__()
        self.v = state_value(state_dim, cfg.mixing_dim)

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        return q.sum(-1, keepdim=True) + self.v(state)


class IQL(nn.Module):
    """Independent Q-learning (Tan 1993): nothing is mixed. Returns (B, T, N): each learns from the team reward."""

    def __init__(self, n_agents: int, state_dim: int, cfg: Config):
        super().__init__()

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        return q


MIXERS = {"iql": IQL, "vdn": VDN, "vdn-s": VDNS, "qmix": QMIX, "qmix-lin": QMIXLin, "qmix-ns": QMIXNS}


class Team(nn.Module):
    """What is trained together, and copied together into the target: the agents' network and the mixer."""

    def __init__(self, env, cfg: Config):
        super().__init__()
        self.agent = Agent(env.obs_dim, env.n_actions, env.n_agents, cfg.hidden_dim)
        self.mixer = MIXERS.get(cfg.algo, VDN)(env.n_agents, env.state_dim, cfg)  # random, heuristic: never asked


# ------------------------------------------------------------------------------------------------------------- replay


class Replay:
    """The last `capacity` whole episodes, in tensors allocated once on the training device.

    Raises UsageError if they cannot fit into memory.
    """

    def __init__(self, env, capacity: int, device: torch.device):
        T, N = env.episode_limit, env.n_agents
        layout = dict(  # T+1 rows hold each observation once: row t+1 is what follows row t
            obs=((T + 1, N, env.obs_dim), torch.float32),
            state=((T + 1, env.state_dim), torch.float32),
            avail=((T + 1, N, env.n_actions), torch.bool),
            actions=((T, N), torch.uint8 if env.n_actions <= 256 else torch.int16),
            reward=((T,), torch.float32),
            terminated=((T,), torch.bool),
        )
        self.capacity, self.device, self.added = capacity, device, 0
        self.bytes = capacity * sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        memory = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda"
                  else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        if self.bytes > memory:
            raise UsageError(f"--buffer-size {capacity} needs {self.bytes / 2**30:,.1f} GiB for replay, but "
                             f"{device} has {memory / 2**30:,.1f} GiB")
        print(f"replay: {capacity} episodes, {self.bytes / 2**20:,.1f} MiB on {device}")
        self.data = {name: torch.zeros(capacity, *shape, dtype=dtype, device=device)
                     for name, (shape, dtype) in layout.items()}
        self.lengths = torch.zeros(capacity, dtype=torch.int64)  # steps per episode, on the host: it decides shapes

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, episodes: dict[str, Tensor], lengths: Tensor) -> None:
        """Store episodes as `rollout` returns them; the oldest make room."""
        slots = torch.arange(self.added, self.added + len(lengths))[-self.capacity:] % self.capacity
        for name, data in self.data.items():
            new = episodes[name][-self.capacity:]
            data[slots.to(self.device), :new.shape[1]] = new.to(data.dtype)
        self.lengths[slots] = lengths[-self.capacity:]
        self.added += len(lengths)

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Slots and lengths of `batch_size` different episodes, the longest first, (B,) each. They and the generator
        are on the host, so that nothing waits for the device."""
        slots = torch.randperm(len(self), generator=generator)[:batch_size]
        lengths, order = self.lengths[slots].sort(descending=True, stable=True)
        return slots[order], lengths

    def episodes(self, slots: Tensor, lengths: Tensor, T: int) -> dict[str, Tensor]:
        """The first T steps of the episodes in these slots; slots and lengths on the device. `filled` (B, T) bool marks
        the steps that happened."""
        batch = {name: data[:, : T + 1 if name in ("obs", "state", "avail") else T][slots]
                 for name, data in self.data.items()}
        return batch | {"filled": torch.arange(T, device=self.device) < lengths[:, None]}

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`batch_size` different episodes, the longest first and all cut to its length."""
        slots, lengths = self.draw(batch_size, generator)
        batch = self.episodes(slots.to(self.device), lengths.to(self.device), int(lengths[0]))
        return batch | {"lengths": lengths}  # on the host

    def state_dict(self) -> dict:
        """The slots in use, without their padding."""
        n, T = len(self), self.data["reward"].shape[1]
        keep = (torch.arange(T + 1) <= self.lengths[:n, None]).to(self.device)  # (n, T+1)
        packed = {name: data[:n][keep[:, :data.shape[1]]] for name, data in self.data.items()}
        return packed | {"lengths": self.lengths[:n].clone(), "added": self.added}

    def load_state_dict(self, saved: dict) -> None:
        n = len(saved["lengths"])
        self.lengths[:n], self.added = saved["lengths"], saved["added"]
        keep = torch.arange(self.data["reward"].shape[1] + 1) <= self.lengths[:n, None]
        for name, data in self.data.items():
            data[:n][keep[:, :data.shape[1]].to(self.device)] = saved[name].to(self.device)


# ------------------------------------------------------------------------------------------------- acting and rollout


def select_actions(q: Tensor, avail: Tensor, epsilon: Tensor | None = None, generator=None) -> Tensor:
    """Epsilon-greedy over available actions; each agent draws for itself. q (B, N, A), avail (B, N, A), epsilon (B, N),
    (1, 1), or None: greedy. Returns (B, N) int64."""
    greedy = q.masked_fill(~avail, -math.inf).argmax(-1)
    if epsilon is None:
        return greedy
    noise = torch.rand(q.shape, generator=generator, device=q.device)
    random = noise.masked_fill(~avail, -1.0).argmax(-1)  # uniform over what is available
    explore = torch.rand(greedy.shape, generator=generator, device=q.device) < epsilon  # (B, N): one draw per agent
    return torch.where(explore, random, greedy)


@torch.no_grad()
def act(agent: Agent, obs: Tensor, avail: Tensor, memory=None, epsilon: Tensor | None = None, generator=None):
    """One step of B teams: obs (B, N, O), avail (B, N, A) -> actions (B, N) int64, and the memory for the next step.

    `memory` is (hidden, last actions); None starts an episode. Uses nothing but each agent's own history.
    """
    hidden, last_actions = memory or (None, torch.full(avail.shape[:2], -1, device=obs.device))
    q, hidden = agent(agent.inputs(obs.unsqueeze(1), last_actions.unsqueeze(1)), hidden)  # T = 1
    actions = select_actions(q.squeeze(1), avail, epsilon, generator)
    return actions, (hidden, actions)


class Clock:
    """Adds up where the time goes: `with clock("env"): ...`. On a GPU env and act are launches; learn waits."""

    def __init__(self):
        self.seconds = dict.fromkeys(("env", "act", "learn"), 0.0)

    def __call__(self, part: str) -> Clock:
        self.part = part
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.seconds[self.part] += time.perf_counter() - self.start


@torch.no_grad()
def rollout(env, choose, clock: Clock | None = None) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Play one episode in each of the B environments. `choose(step, memory) -> actions (B, N), memory` is the policy.

    Returns episodes {obs, state, avail (B, T+1, ...), actions, reward, terminated (B, T, ...)}, their lengths (B,) on
    the host, and facts {"return": (B,), and what the environment's info said at each episode's last step}, on the host.
    Where an environment reports `void` (its game crashed), that episode is left out.
    """
    clock = clock or Clock()
    with clock("env"):
        steps = [env.reset()]
    played, filled, last_info, memory = [], [], {}, None
    running = torch.ones(env.n_envs, dtype=torch.bool, device=env.device)
    for _ in range(env.episode_limit):
        with clock("act"):
            actions, memory = choose(steps[-1], memory)
        with clock("env"):
            steps.append(step := env.step(actions))
        played.append(actions)
        filled.append(running)
        for name, value in step.info.items():
            last_info[name] = torch.where(running, value, last_info[name]) if name in last_info else value
        running = running & ~(step.terminated | step.truncated)
        if (env.device.type == "cpu" or isinstance(env, envs.Workers)) and not running.any():  # else asking would stall
            break
    stack = lambda name, steps: torch.stack([getattr(step, name) for step in steps], dim=1)  # noqa: E731
    episodes = {name: stack(name, steps) for name in ("obs", "state", "avail")}  # (B, T+1, ...)
    episodes |= {name: stack(name, steps[1:]) for name in ("reward", "terminated")}  # (B, T)
    episodes["actions"] = torch.stack(played, dim=1)  # (B, T, N)
    filled = torch.stack(filled, dim=1)  # (B, T)
    facts = {"return": (episodes["reward"] * filled).sum(1).cpu()} | {k: v.cpu() for k, v in last_info.items()}
    lengths = filled.sum(1).cpu()
    if "void" in facts:
        keep = ~facts.pop("void")
        episodes, facts = ({k: v[keep.to(v.device)] for k, v in d.items()} for d in (episodes, facts))
        lengths = lengths[keep]
    return episodes, lengths, facts


# ----------------------------------------------------------------------------------------------------------- the loss


def td_targets(reward: Tensor, terminated: Tensor, filled: Tensor, v_next: Tensor, gamma: float, lam: float) -> Tensor:
    """y_t = r_t + gamma * ((1 - lam) * v_{t+1} + lam * y_{t+1}), cut where the episode ends; all (B, T, .) float.

    v_next[:, t] values what follows step t. lam = 0 is Eq. 6's one-step target, lam > 0 Peng's Q(lambda).
    """
    if lam == 0:
        return reward + gamma * (1 - terminated) * v_next
    target, y_next = torch.empty_like(v_next), v_next[:, -1]
    for t in reversed(range(v_next.shape[1])):
        if t + 1 < v_next.shape[1]:  # subtle: a truncated episode's last step has no y_{t+1}, only v_{t+1}
            y_next = torch.where(filled[:, t + 1] > 0, (1 - lam) * v_next[:, t] + lam * target[:, t + 1], v_next[:, t])
        target[:, t] = reward[:, t] + gamma * (1 - terminated[:, t]) * y_next
    return target


def td_loss(team: Team, target_team: Team, batch: dict[str, Tensor], gamma: float, double_q: bool = True,
            td_lambda: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 6: the mean squared TD error of Q_tot over the steps that happened (for IQL over the agents too).

    batch: obs (B, T+1, N, O), state (B, T+1, S), avail (B, T+1, N, A), actions (B, T, N), reward, terminated and filled
    (B, T); lengths (B,) on the host, if the longest come first. Returns the loss and the means of q_taken (Q_tot of the
    actions taken) and target, all scalars.
    """
    obs, state, avail, actions = batch["obs"], batch["state"], batch["avail"], batch["actions"].long()
    reward, terminated, filled = (batch[k].to(obs.dtype).unsqueeze(-1) for k in ("reward", "terminated", "filled"))
    last_actions = F.pad(actions, (0, 0, 1, 0), value=-1)  # (B, T+1, N): none before the first step

    inputs, lengths = team.agent.inputs(obs, last_actions), batch.get("lengths")
    q, _ = team.agent(inputs, lengths=lengths)  # (B, T+1, N, A)
    q_taken = q[:, :-1].gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (B, T, N)
    q_tot = team.mixer(q_taken, state[:, :-1])  # (B, T, 1); IQL (B, T, N)

    with torch.no_grad():
        # subtle: the target network too runs through the episode from its start; at t+1 alone its memory would be empty
        q_target, _ = target_team.agent(inputs, lengths=lengths)
        chooser = q if double_q else q_target  # departure 2
        best = chooser[:, 1:].masked_fill(~avail[:, 1:], -math.inf).argmax(-1, keepdim=True)  # (B, T, N, 1)
        v_next = target_team.mixer(q_target[:, 1:].gather(-1, best).squeeze(-1), state[:, 1:])  # (B, T, 1); Eq. 4
        target = td_targets(reward, terminated, filled, v_next, gamma, td_lambda)

    steps = filled.expand_as(q_tot)
    mean = lambda x: (x * steps).sum() / steps.sum()  # noqa: E731  over the steps that happened
    return mean((q_tot - target) ** 2), {"q_taken": mean(q_tot.detach()), "target": mean(target)}


def make_optimizer(team: Team, cfg: Config) -> torch.optim.Optimizer:
    """For the agent's parameters and the mixer's."""
    device = next(team.parameters()).device
    recorded = cfg.compile and device.type == "cuda"  # then the learning rate too has its place on the device
    lr = torch.tensor(cfg.lr, device=device) if recorded else cfg.lr
    if cfg.optimizer == "adam":
        return torch.optim.Adam(team.parameters(), lr=lr, fused=True, capturable=recorded)
    return torch.optim.RMSprop(team.parameters(), lr=lr, alpha=0.99, eps=1e-5, capturable=recorded)  # the authors'


# ---------------------------------------------------------------------------------------------------- several processes

# `torchrun --nproc-per-node=K qmix.py ...`: each process ("rank") plays its own environments and keeps its own replay;
# gradients and counts are joined, so that all ranks do the same at the same time. Rank 0 alone speaks and writes.
# Without torchrun there is one rank, and nothing is joined.


class TrainingFailed(RuntimeError):
    """The run cannot go on; its last checkpoint is as it was."""


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum, in place. Raises TrainingFailed if another rank has ended."""
    try:
        if dist.is_initialized():
            dist.all_reduce(tensor)
        return tensor
    except RuntimeError as error:
        raise TrainingFailed(f"rank {rank()}: another process of this run has ended, so this one ends too; the last "
                             f"checkpoint is kept ({first_line(error)})") from None


def average_over_ranks(tensors: list[Tensor], steps: Tensor) -> None:
    """Each rank's means over its `steps` become, in place, the means over the steps of all ranks."""
    if dist.is_initialized():
        flat = torch.cat([*(tensor.flatten() * steps for tensor in tensors), steps.view(1).to(tensors[0].dtype)])
        sum_over_ranks(flat)
        for tensor, mean in zip(tensors, (flat[:-1] / flat[-1]).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def random_seeds(*key: int) -> list[int]:
    """Three independent seeds: for the environments, exploration, sampling."""
    return [int(seed) for seed in np.random.SeedSequence(key).generate_state(3, np.uint64)]


@contextlib.contextmanager
def process_group():
    """Join the other ranks, if torchrun has started any."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
        try:
            yield
        finally:
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------- the update


def gradient_step(team: Team, target_team: Team, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
                  cfg: Config) -> Tensor:
    """One update of agent and mixer. Returns loss, norm of the gradient before clipping, q_taken, target: (4,)."""
    batch = batch | {"reward": batch["reward"] * cfg.reward_scale}
    loss, means = td_loss(team, target_team, batch, cfg.gamma, cfg.double_q, cfg.td_lambda)
    optimizer.zero_grad()
    loss.backward()
    loss = loss.detach()
    average_over_ranks([parameter.grad for parameter in team.parameters()] + [loss, *means.values()],
                       batch["filled"].sum())
    grad_norm = nn.utils.clip_grad_norm_(team.parameters(), cfg.grad_clip)
    optimizer.step()
    return torch.stack([loss, grad_norm, means["q_taken"], means["target"]])


# ---------------------------------------------------------------------------------------------- CUDA graphs (--compile)


def cloned(value):
    """Tensors, alone or in tuples, dicts and Steps, as copies of their own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: cloned(part) for name, part in value.items()}
    return type(value)(*map(cloned, value)) if isinstance(value, envs.Step) else tuple(map(cloned, value))


class Recorded:
    """A function of tensors as a CUDA graph: one launch instead of one per operation.

    Shapes must stay the same, and what the function changes it must change in place; `generator` is what it draws from.
    Two calls run as they are, on a stream aside as torch's notes on CUDA graphs ask; the third records. On the CPU
    nothing is recorded, but inputs have their fixed places too.
    """

    def __init__(self, function, generator: torch.Generator | None = None):
        self.function, self.generator, self.calls, self.graph = function, generator, 0, None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls == 1:
            self.inputs = cloned(inputs)
        for place, value in zip(self.inputs, inputs):
            place.copy_(value)
        if self.inputs[0].is_cuda and self.calls < 3:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                outputs = self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(aside)
            return outputs
        if self.inputs[0].is_cuda and self.calls == 3:
            self.record()
        if self.graph is None:
            return self.function(*self.inputs)
        self.graph.replay()
        return cloned(self.outputs)

    def record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            if self.generator is not None:
                graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph):  # this runs nothing yet
                self.outputs = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            print(f"--compile: {getattr(self.function, '__name__', 'function')} cannot be recorded, going on without: "
                  f"{first_line(error)}")


# ---------------------------------------------------------------------------------------------------------- evaluation


def greedy_episodes(env, choose, n: int) -> dict[str, Tensor]:
    """Facts (see `rollout`) and lengths of n episodes, each (n,) float32."""
    rounds, found = [], 0
    while found < n:
        _, lengths, facts = rollout(env, choose)
        rounds.append(facts | {"length": lengths})
        found += len(lengths)
    names = set.intersection(*map(set, rounds))  # a game may tell more as time goes on
    return {name: torch.cat([facts[name].float() for facts in rounds])[:n] for name in names}


# --------------------------------------------------------------------------------------------------------------- a run

COLUMNS = ("env_steps", "episodes", "updates", "seconds", "epsilon", "train_return", "test_return", "test_return_std",
           "test_win_rate", "loss", "grad_norm", "q_taken", "target", "env_steps_per_second", "share_env", "share_act",
           "share_learn", "dead_allies", "dead_enemies", "voided")


def write_whole(path: Path, write) -> None:
    """Have `write(file)` fill a file, whole or not at all: a kill at any moment leaves the old one or the new one.
    Rank 0 alone writes."""
    if rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_checkpoint(path: Path, content) -> None:
    """Save what `content()` returns; it is asked only where something is written."""
    write_whole(path, lambda file: torch.save(content(), file))


def read_checkpoint(path: Path) -> dict:
    """Load tensors and plain values only (weights_only): a file from a stranger cannot run code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != "qmix.py 1":
            raise ValueError("it was not written by qmix.py")
        return content
    except Exception as error:  # torch and pickle raise nearly anything on a damaged file
        raise UsageError(f"{path} is not a usable checkpoint: {first_line(error)}") from None


def pick_device(name: str) -> torch.device:
    """auto: the GPU if there is one."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, not {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {name} was asked for, but torch {torch.__version__} finds no GPU here")
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:
        raise UsageError(f"--device {name} cannot be used: {first_line(error)}") from None


def make_env(cfg: Config, n_envs: int, device: torch.device, seed: int, **more):
    """The environment of cfg; `more`: further arguments for it."""
    pairs = [text.partition("=") for text in cfg.env_args]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise UsageError(f"--env-args takes key=value, not {key!r}")
    arguments = {key: value for key, _, value in pairs} | more
    if cfg.algo == "heuristic" and cfg.env.startswith("smac:"):
        arguments["heuristic_ai"] = "true"
    return envs.make(cfg.env, n_envs, device, seed, arguments)


class Run:
    """All that a run consists of; `state_dict` is what outlives a stop. Each part moves on by counters alone, so a run
    that is stopped anywhere between two of them and resumed does the same as one that never stopped."""

    def __init__(self, cfg: Config):
        self.cfg, self.device = cfg, pick_device(cfg.device)
        self.learns = cfg.algo in MIXERS
        env_seed, explore, sample = random_seeds(cfg.seed, rank())  # one seed for all would give all the same numbers
        self.env = make_env(cfg, cfg.num_envs, self.device, env_seed)
        if cfg.algo == "heuristic" and not hasattr(self.env, "heuristic"):
            raise UsageError(f"--algo heuristic: {cfg.env} has none")
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        torch.manual_seed(cfg.seed)  # the same weights on every rank
        self.team = Team(self.env, cfg).to(self.device)
        self.target_team = copy.deepcopy(self.team).requires_grad_(False)
        self.optimizer = make_optimizer(self.team, cfg)
        self.replay = Replay(self.env, cfg.buffer_size, self.device) if self.learns else None
        self.generators = {"env": self.env.generator, "explore": torch.Generator(self.device).manual_seed(explore),
                           "sample": torch.Generator().manual_seed(sample)}
        self.explore, self.exploit, self.update = self.decide, self.decide, None  # with --compile: three CUDA graphs
        if cfg.compile:
            if self.device.type == "cuda" and not dist.is_initialized():
                self.record()
            else:
                print("--compile: CUDA graphs are for one process on a GPU; going on without")
        self.counts = dict(env_steps=0, episodes=0, updates=0)  # steps and episodes of all ranks
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rows: list[dict] = []  # metrics.csv
        self.returns: list[float] = []  # of the training episodes since the last row
        self.stats: list[list[float]] = []  # of the updates since the last row: loss, grad_norm, q_taken, target
        self.clock, self.seconds, self.started = Clock(), 0.0, time.perf_counter()

    def decide(self, obs: Tensor, avail: Tensor, hidden: Tensor, last_actions: Tensor, epsilon: Tensor | None = None):
        return act(self.team.agent, obs, avail, (hidden, last_actions), epsilon, self.generators["explore"])

    def policy(self, epsilon: Tensor | None = None):
        """What `rollout` asks for actions; epsilon (B, N), None: greedy."""
        if self.cfg.algo == "heuristic":
            return lambda step, memory: (self.env.heuristic(), None)
        if self.cfg.algo == "random":
            epsilon = torch.ones(1, 1, device=self.device)
        B, N = self.env.n_envs, self.env.n_agents
        start = (torch.zeros(1, B * N, self.cfg.hidden_dim, device=self.device),
                 torch.full((B, N), -1, device=self.device))
        if epsilon is None:
            return lambda step, memory: self.exploit(step.obs, step.avail, *(memory or start))
        return lambda step, memory: self.explore(step.obs, step.avail, *(memory or start), epsilon)

    def update_from(self, rows: Tensor, lengths: Tensor) -> Tensor:
        batch = self.replay.episodes(rows, lengths, self.env.episode_limit)  # uncut: shapes must not change
        return gradient_step(self.team, self.target_team, self.optimizer, batch, self.cfg)

    def record(self) -> None:
        """Have the CUDA graphs made (--compile)."""
        self.explore, self.exploit = Recorded(self.decide, self.generators["explore"]), Recorded(self.decide)
        self.update = Recorded(self.update_from)
        if not isinstance(self.env, envs.Workers):
            self.env.step = Recorded(self.env.step, self.env.generator)

    # What there is to do, in this order: the updates that are due, the evaluation that is due, more episodes.

    def updates_due(self) -> int:
        """One update once each replay holds a batch, then one per `episodes_per_update` episodes of a rank."""
        if not self.learns or sum_over_ranks(torch.tensor(int(len(self.replay) < self.cfg.batch_size))) > 0:
            return 0
        new = self.counts["episodes"] / self.ranks - self.cfg.batch_size
        return int(new / self.cfg.episodes_per_update) + 1 - self.counts["updates"]

    def test_due(self) -> bool:
        """At the start, whenever another test_interval_steps have passed, and at the end."""
        if not self.rows:
            return True
        last, steps, interval = self.rows[-1]["env_steps"], self.counts["env_steps"], self.cfg.test_interval_steps
        return last // interval < steps // interval or (self.finished() and last < steps)

    def finished(self) -> bool:
        return self.counts["env_steps"] >= self.cfg.total_steps

    def play(self) -> None:
        """One round: each environment plays an episode, which goes into the replay (departure 3)."""
        draws = torch.rand(self.env.n_envs, self.env.n_agents, generator=self.generators["explore"], device=self.device)
        policy = self.policy(self.cfg.epsilon(self.counts["env_steps"], draws))
        episodes, lengths, facts = rollout(self.env, policy, self.clock)
        if self.learns:
            self.replay.add(episodes, lengths)
        steps, played = sum_over_ranks(torch.tensor([lengths.sum(), len(lengths)])).tolist()
        self.counts["env_steps"] += steps
        self.counts["episodes"] += played
        self.returns += facts["return"].tolist()

    def learn(self, updates: int) -> None:
        """Gradient steps on Eq. 6, and the target's copies between them."""
        cfg, stats = self.cfg, []
        done = 2 * self.counts["env_steps"] / cfg.total_steps - 1  # 0 .. 1 over the second half
        lr = cfg.lr * (1 - 0.9 * min(max(done, 0.0), 1.0)) if cfg.lr_anneal else cfg.lr
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
        for _ in range(updates):
            if self.update:
                drawn = self.replay.draw(cfg.batch_size, self.generators["sample"])
                stats.append(self.update(*(tensor.to(self.device) for tensor in drawn)))
            else:
                batch = self.replay.sample(cfg.batch_size, self.generators["sample"])
                stats.append(gradient_step(self.team, self.target_team, self.optimizer, batch, cfg))
            self.counts["updates"] += 1
            self.update_target()
        stats = torch.stack(stats).tolist()  # the round's one wait for the device
        for i, row in enumerate(stats):
            if not all(map(math.isfinite, row)):
                number = self.counts["updates"] - len(stats) + i + 1
                raise TrainingFailed(f"update {number}: the loss or its gradient is not finite (loss {row[0]}, norm "
                                     f"{row[1]}); the last checkpoint is kept")
        self.stats += stats

    @torch.no_grad()
    def update_target(self) -> None:
        """After each update: a copy if another target_update_episodes have been learned from, or a small step."""
        cfg, updates = self.cfg, self.counts["updates"]
        if cfg.target_tau > 0:
            for target, live in zip(self.target_team.parameters(), self.team.parameters()):
                target.lerp_(live, cfg.target_tau)
        else:
            copies = [int(n * cfg.episodes_per_update / cfg.target_update_episodes) for n in (updates - 1, updates)]
            if copies[1] > copies[0]:
                self.target_team.load_state_dict(self.team.state_dict())

    def test(self) -> dict:
        """Greedy episodes; returns a row of metrics.csv."""
        facts = greedy_episodes(self.env, self.policy(), self.cfg.test_episodes)
        mean = {name: values.mean().item() for name, values in facts.items()}
        now, last = self.seconds_now(), self.rows[-1] if self.rows else dict(env_steps=0, seconds=0.0)
        steps, seconds = self.counts["env_steps"], max(now - last["seconds"], 1e-9)
        means = np.mean(self.stats, axis=0).tolist() if self.stats else [None] * 4
        row = dict(zip(COLUMNS, (
            steps, self.counts["episodes"], self.counts["updates"], now,
            self.cfg.epsilon(steps, torch.linspace(0, 1, 101)).mean().item(),  # what the agents draw, on average
            np.mean(self.returns).item() if self.returns else None, mean["return"],
            facts["return"].std(correction=0).item(), mean.get("battle_won"), *means,
            (steps - last["env_steps"]) / seconds, *(part / seconds for part in self.clock.seconds.values()),
            mean.get("dead_allies"), mean.get("dead_enemies"), getattr(self.env, "voided", 0))))
        self.rows.append(row)
        self.returns, self.stats, self.clock = [], [], Clock()
        return row

    def seconds_now(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def weights(self) -> dict:
        """What a trained policy needs: enough for `load`."""
        sizes = {name: getattr(self.env, name) for name in ("obs_dim", "n_actions", "n_agents")}
        return dict(format="qmix.py 1", config=dataclasses.asdict(self.cfg), sizes=sizes, team=self.team.state_dict())

    def state_dict(self) -> dict:
        return self.weights() | dict(
            target_team=self.target_team.state_dict(), optimizer=self.optimizer.state_dict(), counts=self.counts,
            generators={name: generator.get_state() for name, generator in self.generators.items()},
            replay=self.replay.state_dict() if self.learns and self.cfg.save_replay else None, rows=self.rows,
            returns=self.returns, stats=self.stats, clock=self.clock.seconds, seconds=self.seconds_now())

    def load_state_dict(self, saved: dict) -> None:
        self.team.load_state_dict(saved["team"])
        self.target_team.load_state_dict(saved["target_team"])
        for group, own in zip(saved["optimizer"]["param_groups"], self.optimizer.param_groups):
            group["lr"], group["capturable"] = own["lr"], own["capturable"]  # these go with the device
        self.optimizer.load_state_dict(saved["optimizer"])
        # The checkpoint is rank 0's: the others go on with new random numbers and an empty replay. So does a generator
        # that was saved on another kind of device, where its state has another size.
        seeds = random_seeds(self.cfg.seed, rank(), saved["counts"]["env_steps"])
        for (name, generator), seed in zip(self.generators.items(), seeds):
            if rank() == 0 and len(saved["generators"][name]) == len(generator.get_state()):
                generator.set_state(saved["generators"][name])
            else:
                generator.manual_seed(seed)
        if rank() == 0 and saved["replay"]:
            self.replay.load_state_dict(saved["replay"])
        for name in ("counts", "rows", "returns", "stats", "seconds"):
            setattr(self, name, saved[name])
        self.clock.seconds = saved["clock"]


class StopRequest:
    """Ctrl-C and SIGTERM ask the run to stop where it can be resumed; a second one stops it at once."""

    signal = None

    def __enter__(self) -> StopRequest:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number: int, frame) -> None:
        if self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def peak_memory(device: torch.device) -> str:
    """The most that this process has held; its environments' own processes come on top."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes
    text = f"{peak / 2**20:,.0f} MiB"
    return text + (f", {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB on {device}"
                   if device.type == "cuda" else "")


def against_known(value: float, env, more: bool = False) -> str:
    """A return beside the best that is known; with `more`, beside what else is known of the environment."""
    known = [f"best known {env.best_return:g}"] if hasattr(env, "best_return") else []
    known += [env.landmarks] if more and hasattr(env, "landmarks") else []
    return f"return {value:.2f}" + (f" ({'; '.join(known)})" if known else "")


class Report:
    """What a person sees while it runs: a bar (a line per evaluation where there is no terminal), and TensorBoard."""

    def __init__(self, run: Run, out: Path):
        self.run, self.bar, self.board = run, None, None
        if rank():
            return
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
                start, total = run.counts["env_steps"], run.cfg.total_steps
                self.bar = tqdm(initial=start, total=total, dynamic_ncols=True,
                                bar_format="{l_bar}{bar}| {remaining} left{postfix}")
            except ImportError:
                print("no progress bar: tqdm is not installed (pip install tqdm)")
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(out, purge_step=run.counts["env_steps"])
        except ImportError:
            print("no TensorBoard events: it is not installed (pip install tensorboard)")

    def update(self) -> None:
        if self.bar is not None:
            self.bar.update(min(self.run.counts["env_steps"], self.run.cfg.total_steps) - self.bar.n)

    def row(self, row: dict) -> None:
        text = against_known(row["test_return"], self.run.env)
        if row["test_win_rate"] is not None:
            text += f", wins {row['test_win_rate']:.0%}"
        text += "".join(f", {part} {row[f'share_{part}']:.0%}" for part in ("env", "act", "learn"))  # of the time
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            print(f"{row['env_steps']:>9} steps, {row['seconds']:.0f} s: {text}", flush=True)
        if self.board is not None:
            for name, value in row.items():
                if value is not None:
                    self.board.add_scalar(name, value, row["env_steps"])

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()


def write_metrics(path: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


@contextlib.contextmanager
def run_directory(cfg: Config, resume: bool):
    """The directory of the run, made or found, and locked for as long as the `with` lasts (by rank 0)."""
    name = cfg.out or f"runs/{cfg.env.replace(':', '-')}-{cfg.algo}-{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    out, lock = Path(name), None
    if rank():
        yield out
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not resume and any((out / file).exists() for file in ("config.json", "checkpoint.pt", "metrics.csv")):
            raise UsageError(f"{out} already holds a run: go on with --resume {out}, or choose another --out")
        lock = os.open(out, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
        content = dict(config=dataclasses.asdict(cfg) | {"out": str(out)}, versions=versions)
        write_whole(out / "config.json", lambda file: file.write(json.dumps(content, indent=2).encode()))
    except BlockingIOError:
        os.close(lock)
        raise UsageError(f"{out} is in use by another process") from None
    except OSError as error:
        raise UsageError(f"run directory {out} cannot be written: {error.strerror}") from None
    try:
        yield out
    finally:
        os.close(lock)


def read_config(out: str) -> Config:
    """The config of a run directory."""
    try:
        content = json.loads((Path(out) / "config.json").read_text())
        return Config(**content["config"] | {"out": str(out)}).check()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{out} does not hold a run: {first_line(error)}") from None


def go_on(run: Run, out: Path, stop: StopRequest, report: Report) -> None:
    """Do what is due until nothing is, with a checkpoint now and then: often enough to lose little by a kill, seldom
    enough not to be felt (3 % of the time at most)."""
    saved_at, save_cost = time.perf_counter(), 0.0
    while True:
        if (due := run.updates_due()) > 0:
            with run.clock("learn"):
                run.learn(min(due, 100))  # no more at a time, so that a stop or a checkpoint need not wait long
        elif run.test_due():
            best = max((row["test_return"] for row in run.rows), default=-math.inf)
            row = run.test()
            if row["test_return"] > best:
                write_checkpoint(out / "best.pt", run.weights)
            write_metrics(out / "metrics.csv", run.rows)
            report.row(row)
        elif run.finished():
            break
        else:
            try:
                run.play()
            except envs.EnvFailure:
                write_checkpoint(out / "checkpoint.pt", run.state_dict)
                raise
            report.update()
        stopping = sum_over_ranks(torch.tensor(bool(stop.signal), dtype=torch.int64)) > 0
        if stopping or time.perf_counter() - saved_at > max(run.cfg.checkpoint_seconds, 30 * save_cost):
            saved_at = time.perf_counter()
            write_checkpoint(out / "checkpoint.pt", run.state_dict)
            save_cost = time.perf_counter() - saved_at
        if stopping:
            print(f"stopped at {run.counts['env_steps']} environment steps; go on with --resume {out}")
            raise KeyboardInterrupt if stop.signal == signal.SIGINT else SystemExit(128 + signal.SIGTERM)
    write_checkpoint(out / "checkpoint.pt", run.state_dict)


def train(cfg: Config, resume: bool = False) -> dict:
    """Train as `cfg` says, in the run directory cfg.out, and return the facts that the result line prints.

    resume: go on with the run in cfg.out, exactly where it stopped. Raises UsageError for what cannot be done and
    TrainingFailed if the loss is no longer finite; Ctrl-C and SIGTERM write a checkpoint and raise KeyboardInterrupt
    and SystemExit.
    """
    run = Run(cfg.check())
    try:
        with run_directory(cfg, resume) as out:
            if resume and (out / "checkpoint.pt").exists():  # killed before the first checkpoint: it starts anew
                saved = read_checkpoint(out / "checkpoint.pt")
                try:
                    run.load_state_dict(saved)
                except Exception as error:
                    raise UsageError(f"{out}/checkpoint.pt does not fit this run: {first_line(error)}") from None
            with StopRequest() as stop, Report(run, out) as report:
                go_on(run, out, stop, report)
    finally:
        run.env.close()
    last = run.rows[-1]
    print(f"after {last['env_steps']} steps: greedy " + against_known(last["test_return"], run.env, more=True))
    print(f"peak memory: {peak_memory(run.device)}")
    facts = dict(env=cfg.env, algo=cfg.algo, seed=cfg.seed, env_steps=last["env_steps"], episodes=last["episodes"],
                 updates=last["updates"], seconds=round(last["seconds"], 2), test_return=last["test_return"],
                 test_win_rate=last["test_win_rate"],
                 best_test_return=max(row["test_return"] for row in run.rows), out=str(out))
    return facts | ({"q_tot": two_step_tables(run.team)} if cfg.env == "two-step" else {})


# ----------------------------------------------------------------------------------------- using what has been learned


class Policy:
    """The trained decentralised policy: the agents' network alone, on the CPU; no mixer, no state, no replay."""

    def __init__(self, agent: Agent, config: Config):
        self.agent, self.config = agent, config

    def act(self, obs, avail, hidden=None) -> tuple[Tensor, tuple]:
        """Greedy actions of one team, obs (N, O) and avail (N, A), or of B teams, (B, N, O) and (B, N, A); arrays or
        tensors. Returns actions (N,) or (B, N) int64, and `hidden` for the next call (`act`'s memory); None starts an
        episode."""
        obs, avail = torch.as_tensor(obs, dtype=torch.float32), torch.as_tensor(avail, dtype=torch.bool)
        N, O, A = self.agent.n_agents, self.agent.obs_dim, self.agent.n_actions
        if obs.shape[-2:] != (N, O) or avail.shape != (*obs.shape[:-1], A):
            raise UsageError(f"expected obs (..., {N}, {O}) and avail (..., {N}, {A}), got {tuple(obs.shape)} and "
                             f"{tuple(avail.shape)}")
        actions, hidden = act(self.agent, obs.view(-1, N, O), avail.view(-1, N, A), hidden)
        return actions.view(avail.shape[:-1]), hidden


def load(path: str) -> Policy:
    """The policy of a run directory (its last checkpoint) or of a file such as runs/demo/best.pt."""
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise UsageError(f"{file} does not exist: expected a run directory with a checkpoint, or a checkpoint file")
    saved = read_checkpoint(file)
    try:
        cfg, sizes = Config(**saved["config"]), saved["sizes"]
        if cfg.algo not in MIXERS:
            raise ValueError(f"--algo {cfg.algo} learns nothing")
        agent = Agent(sizes["obs_dim"], sizes["n_actions"], sizes["n_agents"], cfg.hidden_dim)
        weights = saved["team"].items()
        agent.load_state_dict({name[len("agent."):]: w for name, w in weights if name.startswith("agent.")})
    except Exception as error:
        raise UsageError(f"{file} is not a usable checkpoint: {first_line(error)}") from None
    return Policy(agent, cfg)


def evaluate(path: str, episodes: int = 32, record_to: str = "", cfg: Config | None = None) -> dict:
    """Greedy episodes of the decentralised policy alone. cfg: where to play, unless as in training (same sizes)."""
    policy = load(path)
    cfg = cfg or policy.config
    if episodes < 1:
        raise UsageError(f"--episodes must be at least 1, not {episodes}")
    replays = {"replay_dir": record_to} if record_to and cfg.env.startswith("smac:") else {}
    if record_to and not replays and not (record_to.endswith(".gif") and Path(record_to).absolute().parent.is_dir()):
        raise UsageError(f"--record must name a .gif file in a folder that exists (for smac: a folder for replays), "
                         f"not {record_to!r}")
    env = make_env(cfg, min(episodes, cfg.num_envs), torch.device("cpu"), cfg.seed, **replays)
    try:
        for size in ("obs_dim", "n_actions", "n_agents"):
            if getattr(env, size) != getattr(policy.agent, size):
                raise UsageError(f"{cfg.env} has {size} {getattr(env, size)}, but the policy was trained with "
                                 f"{getattr(policy.agent, size)}")
        if record_to and not replays and not hasattr(env, "draw"):
            raise UsageError("--record: this environment cannot be drawn")
        facts = greedy_episodes(env, lambda step, hidden: policy.act(step.obs, step.avail, hidden), episodes)
        if record_to and not replays:
            record(env, policy, Path(record_to))
    finally:
        env.close()
    mean = {name: values.mean().item() for name, values in facts.items()}
    return dict(env=cfg.env, algo=cfg.algo, episodes=episodes, test_return=mean["return"],
                test_return_std=facts["return"].std(correction=0).item(), test_win_rate=mean.get("battle_won"),
                mean_length=mean["length"], best_known=getattr(env, "best_return", None), out=str(path))


def record(env, policy: Policy, path: Path, fps: int = 6) -> None:
    """Draw one greedy episode of environment 0 into a GIF."""
    try:
        from matplotlib import animation, pyplot
    except ImportError:
        raise UsageError("--record needs matplotlib: pip install matplotlib") from None
    figure, axes = pyplot.subplots(figsize=(6, 4))
    writer, temporary = animation.PillowWriter(fps=fps), path.with_name(path.stem + ".tmp.gif")
    step, hidden, score, over = env.reset(), None, 0.0, False
    with writer.saving(figure, temporary, dpi=90):
        for t in range(env.episode_limit + 1):
            axes.clear()
            env.draw(axes, 0)
            axes.set_title(f"step {t}    return {score:.2f}")
            for _ in range(2 * fps if over else 1):  # rest on the last picture
                writer.grab_frame()
            if over:
                break
            actions, hidden = policy.act(step.obs, step.avail, hidden)
            step = env.step(actions)
            score += float(step.reward[0])
            over = bool(step.terminated[0] | step.truncated[0])
    pyplot.close(figure)
    os.replace(temporary, path)


@torch.no_grad()
def two_step_tables(team: Team) -> dict:
    """Q_tot of the two-step game's three states; row: agent 1's action, column: agent 2's. IQL has no Q_tot: the mean
    of the two agents' values stands in its place."""
    device = next(team.parameters()).device
    env = envs.make("two-step", n_envs=2, device=device)
    start = env.reset()
    second = env.step(torch.tensor([[0, 0], [1, 0]], device=device))  # environment 0 goes to 2A, 1 to 2B
    last = torch.tensor([[[-1, -1], [0, 0]], [[-1, -1], [1, 0]]], device=device)  # (B, T, N)
    q, _ = team.agent(team.agent.inputs(torch.stack([start.obs, second.obs], 1), last))  # (B, T, N, A)
    state = torch.stack([start.state, second.state], 1)  # (B, T, S)
    cell = lambda i, j: team.mixer(torch.stack([q[..., 0, i], q[..., 1, j]], -1), state).mean(-1)  # noqa: E731  (B, T)
    table = torch.stack([torch.stack([cell(i, j) for j in range(2)], -1) for i in range(2)], -2)  # (B, T, A, A)
    return {"1": table[0, 0].tolist(), "2A": table[0, 1].tolist(), "2B": table[1, 1].tolist()}


# --------------------------------------------------------------------------------------------------------- command line

@dataclasses.dataclass
class Command:
    """QMIX, VDN, IQL and the paper's ablations. Without --resume or --evaluate: train."""

    config: Config
    resume: str = ""
    """run directory to go on with, exactly where it stopped (beside it: --total-steps, --device)"""
    evaluate: str = ""
    """run directory or checkpoint file: play greedy, decentralised episodes (beside it: --env, --env-args,
    --num-envs, --seed)"""
    episodes: int = 32
    """episodes of --evaluate"""
    record: str = ""
    """with --evaluate: draw one episode into this .gif; for smac: keep replays in this folder"""


def parse(arguments: list[str]) -> Command:
    """Flags over the saved config (--resume, --evaluate) or over the environment's preset."""
    try:
        import tyro
    except ImportError:
        raise UsageError("the command line needs tyro: pip install tyro") from None

    def cli(config: Config, arguments: list[str]) -> Command:
        errors, stderr = io.StringIO(), sys.stderr
        sys.stderr = errors
        try:
            return tyro.cli(Command, args=arguments, default=Command(config), config=(tyro.conf.OmitArgPrefixes,))
        except SystemExit as leaving:
            if not leaving.code:
                raise
            text = errors.getvalue().split("───")  # one line out of tyro's box
            lines = [line.strip("│╭╮╰╯─ ") for line in "".join(text).splitlines()]
            raise UsageError(next((line for line in lines if ":" in line), " ".join(lines))) from None
        finally:
            sys.stderr = stderr

    first = cli(Config(), [argument for argument in arguments if argument not in ("-h", "--help")])
    if first.resume and first.evaluate:
        raise UsageError("--resume and --evaluate exclude each other")
    if first.record and not first.evaluate:
        raise UsageError("--record goes with --evaluate")
    if not (first.resume or first.evaluate):
        return cli(Config(env=first.config.env), arguments)
    saved = read_config(first.resume) if first.resume else load(first.evaluate).config
    command = cli(saved, arguments)
    if command.config.env != saved.env and command.config.env_args == saved.env_args:
        command.config.env_args = ()  # they were the other environment's
    mode, allowed = (("--resume", ("total_steps", "device")) if first.resume else
                     ("--evaluate", ("env", "env_args", "num_envs", "seed")))
    for name, value in dataclasses.asdict(saved).items():
        if getattr(command.config, name) != value and name not in allowed:
            refused, *can = ("--" + field.replace("_", "-") for field in (name, *allowed))
            raise UsageError(f"{refused} cannot be changed by {mode}; what can: {', '.join(can)}")
    return command


def main(arguments: list[str]) -> int:
    """Exit code 0; 2 for bad input; 1 where training failed; 130 and 143 after Ctrl-C and SIGTERM."""
    try:
        command = parse(arguments)
        if command.evaluate:
            facts = evaluate(command.evaluate, command.episodes, command.record, command.config)
            print("result: " + json.dumps(facts))
            return 0
        with process_group():
            print("config: " + json.dumps(dataclasses.asdict(command.config)))
            facts = train(command.config, resume=bool(command.resume))
            print("result: " + json.dumps(facts))
        return 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, envs.EnvFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
