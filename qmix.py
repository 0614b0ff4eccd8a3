"""QMIX in one file (Rashid et al., ICML 2018, arXiv 1803.11485), with VDN, IQL and the paper's ablations.

Agents that act apart learn from one team reward. Each agent a has its own value Q_a(history, action). A mixing network
joins the values of the chosen actions into Q_tot, never decreasing in any Q_a, so that each agent's own argmax is also
the team's (Eq. 4, 5). Training may look at the true state; acting needs each agent's observation alone.

    python qmix.py --env checkers          # ends at a greedy return of about 83.5; README.md has the figures

Down to the line of = signs stands all that QMIX is; below it what surrounds a run, from ranks to the command line.

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
  4. PRESETS, further down: what the small environments need instead of the authors' numbers for StarCraft
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

spec = importlib.util.spec_from_file_location("qmix_envs", Path(__file__).with_name("envs.py"))
envs = sys.modules["qmix_envs"] = importlib.util.module_from_spec(spec)  # the envs.py beside this file, whatever else
spec.loader.exec_module(envs)                                            # bears that name in the reader's project
UsageError = envs.UsageError

# ----------------------------------------------------------------------------------------------------------- settings
Algo = Literal["iql", "vdn", "qmix", "vdn-s", "qmix-lin", "qmix-ns", "random", "heuristic"]
Count = Annotated[int, (1, 10**12)]  # a type, its lowest and its highest value
Size = Annotated[int, (1, 10**5)]
Share = Annotated[float, (0.0, 1.0)]
Positive = Annotated[float, (1e-9, 1e9)]

@dataclasses.dataclass(init=False)
class Config:
    """Every number of a run: what is given, as in `Config(env="checkers", lr=0.1)`, else the environment's preset, else
    the default below; "(authors)": the paper's and PyMARL's. Raises UsageError for what does not fit."""

    env: str = "checkers"  # two-step, checkers, checkers-v1 .. -v3, skirmish:MAP, smac:MAP, ma_gym:ID, or module:Class
    env_args: tuple[str, ...] = ()  # key=value ...: arguments of a smac, ma_gym or own environment, as in difficulty=7
    env_timeout: Positive = 120.0  # seconds a smac, ma_gym or own environment may take for a step or reset; then: hung
    algo: Algo = "qmix"  # iql (Tan 1993), vdn (Sunehag 2017), qmix, its ablations; random and heuristic learn nothing
    seed: Annotated[int, (0, 2**63 - 1)] = 1  # seeds the weights, the environments, exploration and sampling
    total_steps: Count = 2_000_000  # length of the run, environment steps summed over the environments (SMAC)
    num_envs: Size = 8  # environments that play side by side (authors: 1, or 8 processes)
    device: str = "auto"  # auto, cpu or cuda: where networks, replay and batched environments live
    threads: Annotated[int, (0, 4096)] = 0  # CPU threads; 0: leave torch's number as it is
    compile: bool = False  # torch.compile the step of a built-in environment: half a minute first, then it is faster
    out: str = ""  # run directory; empty: a new one under runs/
    gamma: Share = 0.99  # discount per step (authors)
    lr: Positive = 5e-4  # learning rate, per update (authors)
    lr_anneal: bool = False  # let the learning rate fall linearly to a tenth over the run's second half (authors: no)
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # alpha 0.99, eps 1e-5 (authors); torch's defaults (PyMARL2)
    batch_size: Size = 32  # whole episodes per update (authors)
    buffer_size: Count = 5000  # episodes kept for replay (authors)
    save_replay: bool = True  # keep the replay in the checkpoint (copied in memory then); else a resumed run has none
    checkpoint_seconds: Annotated[float, (0.0, 1e9)] = 5.0  # least seconds between checkpoints; costly ones: more
    episodes_per_update: Positive = 1.0  # new episodes per gradient step, however many environments play (authors)
    target_update_episodes: Count = 200  # new episodes between copies of the networks into their targets (authors)
    target_tau: Share = 0.0  # above 0: no copies; the target moves by this share after each update (DDPG)
    epsilon_start: Share = 1.0  # share of random actions at the start (authors)
    epsilon_finish: Share = 0.05  # share of random actions after epsilon_anneal_steps (authors)
    epsilon_anneal_steps: Count = 50_000  # environment steps over which epsilon falls linearly (authors)
    epsilon_spread: Share = 0.0  # above 0: an agent's share is at least its episode's draw, log-uniform, finish to this
    double_q: bool = True  # live network chooses the next action, target values it (authors); off: plain max, Eq. 6
    td_lambda: Share = 0.0  # 0: one-step targets (Eq. 6); above: Peng's Q(lambda) (PyMARL2: 0.6)
    reward_scale: Positive = 1.0  # the learner sees the reward times this; all returns shown are the environment's own
    grad_clip: Positive = 10.0  # largest norm of the gradient, agent and mixer together (authors)
    hidden_dim: Size = 64  # GRU units of an agent (authors)
    mixing_dim: Size = 32  # units of the mixing network (authors)
    hypernet_dim: Annotated[int, (0, 10**5)] = 64  # hidden units of weight hyper-networks (JMLR); 0: one layer (ICML)
    test_interval_steps: Count = 10_000  # environment steps between greedy evaluations (SMAC)
    test_episodes: Size = 32  # episodes per evaluation (SMAC; the paper: 20)

    def __init__(self, **given):
        vars(self).update(settle(given))  # below, beside PRESETS

# --------------------------------------------------------------------------------------------------------- the networks
class Agent(nn.Module):
    """DRQN agent, fc - GRU - fc (section 4). All agents share its weights and are told apart by a one-hot id."""

    def __init__(self, obs_dim: int, n_actions: int, n_agents: int, hidden_dim: int):
        super().__init__()
        self.obs_dim, self.n_actions, self.n_agents = obs_dim, n_actions, n_agents
        self.fc1 = nn.Linear(obs_dim + n_actions + n_agents, hidden_dim)
        self.gru = nn.GRU(hidden_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, n_actions)

    def forward(self, obs: Tensor, last_actions: Tensor, hidden: Tensor | None = None, agents=slice(None),
                running: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Q-values of T steps: a whole episode in the loss, T = 1 when acting. Returns q (B, T, N, A) and new hidden.

        obs (B, T, N, O) float32; last_actions (B, T, N) int64, -1 where there is none yet; hidden (1, B*N, H) is what
        an earlier call returned, None (zeros) at the start of an episode. agents: whose rows these are, unless all N
        are there. running: how many episodes, longest first, are not over at step t; the others' q may be zeros.
        """
        B, T, N, _ = obs.shape
        last = F.one_hot(last_actions + 1, self.n_actions + 1)[..., 1:]  # (B, T, N, A), zeros for -1
        ids = torch.eye(self.n_agents, device=obs.device)[agents].expand(B, T, N, -1)
        parts, q = [part.transpose(0, 1) for part in (obs, last, ids)], []  # (T, B, N, .), time first as in nn.GRU
        for t in range(0, T, 16):  # a few steps at a time stay in the processor's cache
            rows = running[t] if running else B
            x = torch.cat([part[t:t + 16, :rows] for part in parts], dim=-1).flatten(1, 2)  # (16, B*N, O+A+N)
            x, hidden = self.gru(F.relu(self.fc1(x)), None if hidden is None else hidden[:, :rows * N])
            q.append(F.pad(self.fc2(x), (0, 0, 0, (B - rows) * N)))  # (16, B*N, A)
        return torch.cat(q).view(T, B, N, self.n_actions).transpose(0, 1), hidden  # (B, T, N, A)

def hypernet(state_dim: int, hypernet_dim: int, n_weights: int) -> nn.Module:
    """A network that writes weights of another from the state (Ha et al. 2017). Departure 1: ICML has a single linear
    layer (hypernet_dim 0), JMLR and the authors' code one hidden layer."""
    if hypernet_dim == 0:
        return nn.Linear(state_dim, n_weights)
    return nn.Sequential(nn.Linear(state_dim, hypernet_dim), nn.ReLU(), nn.Linear(hypernet_dim, n_weights))

class QMIX(nn.Module):
    """Mixing network of one hidden layer; its weights are non-negative functions of the state (Figure 2a, Eq. 5).

    Every mixer maps q (B, T, N), the agents' values of their chosen actions, and state (B, T, S) to Q_tot (B, T, 1)."""

    def __init__(self, n_agents: int, state_dim: int, cfg: Config):
        super().__init__()
        self.w1 = hypernet(state_dim, cfg.hypernet_dim, n_agents * cfg.mixing_dim)
        self.b1 = nn.Linear(state_dim, cfg.mixing_dim)
        self.w2 = hypernet(state_dim, cfg.hypernet_dim, cfg.mixing_dim)
        self.v = hypernet(state_dim, cfg.mixing_dim, 1)  # V(s), the final bias: two layers, unrestricted in sign

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        w1 = self.w1(state).abs().view(*q.shape, -1)  # (B, T, N, E); |.| makes dQ_tot/dQ_a >= 0, Eq. 5
        hidden = F.elu((q.unsqueeze(-1) * w1).sum(-2) + self.b1(state))  # (B, T, E)
        w2 = self.w2(state).abs()  # (B, T, E)
        return (hidden * w2).sum(-1, keepdim=True) + self.v(state)  # (B, T, 1)

class QMIXNS(nn.Module):
    """Ablation QMIX-NS: the same network without hyper-networks; its weights and biases do not see the state."""

    def __init__(self, n_agents: int, state_dim: int, cfg: Config):
        super().__init__()
        self.hidden = nn.Linear(n_agents, cfg.mixing_dim)  # nn.Linear also initialises the weights and biases
        self.final = nn.Linear(cfg.mixing_dim, 1)

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        hidden = F.elu(F.linear(q, self.hidden.weight.abs(), self.hidden.bias))  # (B, T, E)
        return F.linear(hidden, self.final.weight.abs(), self.final.bias)  # (B, T, 1)

class Simpler(nn.Module):
    """What QMIX is compared with. QMIX-Lin has no hidden layer: non-negative weights that see the state, plus V(s).
    VDN-S: all weights 1, plus V(s). VDN (Sunehag et al. 2017): the plain sum. IQL (Tan 1993): nothing is mixed, each
    agent learns from the team reward; returns (B, T, N)."""

    def __init__(self, n_agents: int, state_dim: int, cfg: Config):
        super().__init__()
        self.sums = cfg.algo != "iql"
        self.w = hypernet(state_dim, cfg.hypernet_dim, n_agents) if cfg.algo == "qmix-lin" else None
        self.v = hypernet(state_dim, cfg.mixing_dim, 1) if cfg.algo in ("qmix-lin", "vdn-s") else None

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        weighted = q * self.w(state).abs() if self.w else q
        q_tot = weighted.sum(-1, keepdim=True) if self.sums else q  # (B, T, 1)
        return q_tot + self.v(state) if self.v else q_tot

MIXERS = {"iql": Simpler, "vdn": Simpler, "vdn-s": Simpler, "qmix": QMIX, "qmix-lin": Simpler, "qmix-ns": QMIXNS}

class Team(nn.Module):
    """What is trained together, and copied together into the target: the agents' network and the mixer."""

    def __init__(self, env, cfg: Config):
        super().__init__()
        self.agent = Agent(env.obs_dim, env.n_actions, env.n_agents, cfg.hidden_dim)
        self.mixer = MIXERS.get(cfg.algo, Simpler)(env.n_agents, env.state_dim, cfg)  # random, heuristic: never asked

# -------------------------------------------------------------------------------------------------- replay and acting
class Replay:
    """The last `capacity` whole episodes, in tensors allocated once on the training device (UsageError if they do not
    fit there). T+1 rows hold each observation once: row t+1 is what follows row t."""

    def __init__(self, env, capacity: int, device: torch.device):
        T, N = env.episode_limit, env.n_agents
        self.capacity, self.added = capacity, 0
        self.data = allocate(capacity, device, dict(
            obs=((T + 1, N, env.obs_dim), torch.float32),
            state=((T + 1, env.state_dim), torch.float32),
            avail=((T + 1, N, env.n_actions), torch.bool),
            actions=((T, N), torch.uint8 if env.n_actions <= 256 else torch.int32),
            reward=((T,), torch.float32),
            terminated=((T,), torch.bool),
            filled=((T,), torch.bool)))

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, episodes: dict[str, Tensor]) -> None:
        """Store episodes as `rollout` returns them, `capacity` at most; the oldest make room."""
        B, T = episodes["filled"].shape
        slots = torch.arange(self.added, self.added + B) % self.capacity
        self.data["filled"][slots] = False
        for name, data in self.data.items():
            data[slots, :episodes[name].shape[1]] = episodes[name].to(data.dtype)
        self.added += B

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`batch_size` different episodes, the longest first and all cut to its length."""
        slots = torch.randperm(len(self), generator=generator)[:batch_size].to(self.data["filled"].device)
        lengths, order = self.data["filled"][slots].sum(1).sort(descending=True, stable=True)
        return {name: data[:, :lengths[0] + (name in ("obs", "state", "avail"))][slots[order]]
                for name, data in self.data.items()}

@torch.no_grad()
def act(agent: Agent, obs: Tensor, avail: Tensor, memory=None, epsilon: Tensor | None = None, generator=None,
        agents=slice(None)):
    """One step of B teams: obs (B, N, O), avail (B, N, A) bool -> actions (B, N) int64, and `memory` for the next step
    (hidden, last actions; None starts an episode). epsilon (B, N): each agent's share of random actions, for which it
    draws by itself; None: greedy. Uses nothing but each agent's own history."""
    hidden, last_actions = memory or (None, torch.full(avail.shape[:2], -1, device=obs.device))
    q, hidden = agent(obs.unsqueeze(1), last_actions.unsqueeze(1), hidden, agents)  # T = 1
    actions = q.squeeze(1).masked_fill(~avail, -math.inf).argmax(-1)
    if epsilon is not None:
        noise = torch.rand(avail.shape, generator=generator, device=obs.device)
        random = noise.masked_fill(~avail, -1.0).argmax(-1)  # uniform over what is available
        explore = torch.rand(actions.shape, generator=generator, device=obs.device) < epsilon  # (B, N)
        actions = torch.where(explore, random, actions)
    return actions, (hidden, actions)

@torch.no_grad()
def rollout(env, choose) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Play one episode in each of the B environments. `choose(step, memory) -> actions (B, N), memory` is the policy.
    Returns episodes {obs, state, avail (B, T+1, ...), actions, reward, terminated, filled (B, T, ...)} and facts (B,)
    {return, length, what info said at an episode's last step}. Episodes that are `void` (a crash) are left out."""
    steps, played, filled, facts, memory = [env.reset()], [], [], {}, None
    running = torch.ones(env.n_envs, dtype=torch.bool, device=env.device)
    while len(played) < env.episode_limit and running.any():
        actions, memory = choose(steps[-1], memory)
        steps.append(step := env.step(actions))
        played.append(actions)
        filled.append(running)
        facts |= {name: torch.where(running, value, facts.get(name, value)) for name, value in step.info.items()}
        running = running & ~(step.terminated | step.truncated)
    episodes = {name: torch.stack([getattr(step, name) for step in steps], dim=1) for name in ("obs", "state", "avail")}
    episodes |= {name: torch.stack([getattr(step, name) for step in steps[1:]], dim=1)
                 for name in ("reward", "terminated")}
    episodes |= dict(actions=torch.stack(played, dim=1), filled=torch.stack(filled, dim=1))
    facts |= {"return": (episodes["reward"] * episodes["filled"]).sum(1), "length": episodes["filled"].sum(1)}
    if "void" in facts:
        keep = ~facts.pop("void")
        episodes, facts = ({name: value[keep] for name, value in d.items()} for d in (episodes, facts))
    return episodes, facts

# ------------------------------------------------------------------------------------------------------------ the loss
def td_targets(reward: Tensor, terminated: Tensor, filled: Tensor, v_next: Tensor, gamma: float, lam: float) -> Tensor:
    """y_t = r_t + gamma * ((1 - lam) * v_{t+1} + lam * y_{t+1}), y_t = r_t where terminated; all (B, T, .) float.

    v_next[:, t] values what follows step t. lam = 0 is Eq. 6's one-step target, lam > 0 Peng's Q(lambda)."""
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
    (B, T). Returns the loss and the means of q_taken (Q_tot of the actions taken) and target, all scalars."""
    obs, state, avail, actions = batch["obs"], batch["state"], batch["avail"], batch["actions"].long()
    reward, terminated, filled = (batch[k].to(obs.dtype).unsqueeze(-1) for k in ("reward", "terminated", "filled"))
    last_actions = F.pad(actions, (0, 0, 1, 0), value=-1)  # (B, T+1, N): none before the first step
    numbers = torch.arange(1, len(filled) + 1, device=filled.device)[:, None]  # (B, 1)
    running = (F.pad(batch["filled"], (1, 0), value=True) * numbers).amax(0).tolist()  # at t: rows to the last running

    q, _ = team.agent(obs, last_actions, running=running)  # (B, T+1, N, A)
    q_taken = q[:, :-1].gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (B, T, N)
    q_tot = team.mixer(q_taken, state[:, :-1])  # (B, T, 1); IQL (B, T, N)

    with torch.no_grad():
        # subtle: the target network too runs through the episode from its start; at t+1 alone its memory would be empty
        q_target, _ = target_team.agent(obs, last_actions, running=running)
        chooser = q if double_q else q_target  # departure 2
        best = chooser[:, 1:].masked_fill(~avail[:, 1:], -math.inf).argmax(-1, keepdim=True)  # (B, T, N, 1)
        v_next = target_team.mixer(q_target[:, 1:].gather(-1, best).squeeze(-1), state[:, 1:])  # (B, T, 1); Eq. 4
        target = td_targets(reward, terminated, filled, v_next, gamma, td_lambda)

    steps = filled.expand_as(q_tot)
    mean = lambda x: (x * steps).sum() / steps.sum()  # noqa: E731  over the steps that happened
    return mean((q_tot - target) ** 2), {"q_taken": mean(q_tot.detach()), "target": mean(target)}

def make_optimizer(team: Team, cfg: Config) -> torch.optim.Optimizer:
    """For the agent's parameters and the mixer's."""
    if cfg.optimizer == "adam":
        return torch.optim.Adam(team.parameters(), lr=cfg.lr, fused=True)
    return torch.optim.RMSprop(team.parameters(), lr=cfg.lr, alpha=0.99, eps=1e-5)  # the authors'

def gradient_step(team: Team, target_team: Team, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
                  cfg: Config) -> Tensor:
    """One update of agent and mixer. Returns loss, norm of the gradient before clipping, q_taken, target: (4,)."""
    batch = batch | {"reward": batch["reward"] * cfg.reward_scale}
    loss, means = td_loss(team, target_team, batch, cfg.gamma, cfg.double_q, cfg.td_lambda)
    optimizer.zero_grad()
    loss.backward()
    loss = loss.detach()
    average_over_ranks([p.grad for p in team.parameters()] + [loss, *means.values()], batch["filled"].sum())
    grad_norm = nn.utils.clip_grad_norm_(team.parameters(), cfg.grad_clip)
    optimizer.step()
    return torch.stack([loss, grad_norm, means["q_taken"], means["target"]])

# -------------------------------------------------------------------------------------------------------- the training
class Run:
    """What plays and learns. What is due follows from the counters alone, so a run that is stopped after any round and
    resumed does the same as one that never stopped."""

    def __init__(self, cfg: Config):
        self.cfg, self.learns = cfg, cfg.algo in MIXERS
        seeds = np.random.SeedSequence((cfg.seed, RANK)).generate_state(3, np.uint64)  # one seed would tie them
        env_seed, explore, sample = map(int, seeds)
        self.env = make_env(cfg, cfg.num_envs, cfg.device, env_seed)
        self.device = self.env.device
        torch.manual_seed(cfg.seed)  # the same weights on every rank
        self.team = Team(self.env, cfg).to(self.device)
        self.target_team = copy.deepcopy(self.team).requires_grad_(False)
        self.optimizer = make_optimizer(self.team, cfg)
        self.replay = Replay(self.env, cfg.buffer_size, self.device) if self.learns else None
        self.generators = {"explore": torch.Generator(self.device).manual_seed(explore),
                           "sample": torch.Generator().manual_seed(sample)}
        if hasattr(self.env, "generator"):
            self.generators["env"] = self.env.generator
        self.counts = dict(env_steps=0, episodes=0, updates=0)  # of all ranks
        self.unlearned = 0.0  # episodes that no update is due for: they are not in the replay of a resumed run
        self.began = time.perf_counter()
        self.rows, self.returns, self.stats = [], [], []  # metrics.csv; since its last row: returns, updates' stats

    def epsilon(self, draws: Tensor) -> Tensor:
        """Share of random actions: linear from start to finish, or, with epsilon_spread, log-uniform from finish to
        spread where that is more. draws: uniform in [0, 1), one per agent and episode; returns their shape."""
        start, finish, spread = self.cfg.epsilon_start, self.cfg.epsilon_finish, self.cfg.epsilon_spread
        done = min(1.0, self.counts["env_steps"] / self.cfg.epsilon_anneal_steps)
        shares = torch.full_like(draws, start + done * (finish - start))
        return shares.maximum(finish * (spread / finish) ** draws) if spread else shares

    def choose(self, epsilon: Tensor | None = None):
        """What `rollout` asks for actions; epsilon (B, N), None: greedy."""
        if self.cfg.algo == "heuristic":
            return lambda step, memory: (self.env.heuristic(), None)
        epsilon = torch.ones(1, 1, device=self.device) if self.cfg.algo == "random" else epsilon
        agent, generator = self.team.agent, self.generators["explore"]
        return lambda step, memory: act(agent, step.obs, step.avail, memory, epsilon, generator)

    def play(self) -> None:
        """One round: each environment plays an episode, which goes into the replay (departure 3)."""
        draws = torch.rand(self.env.n_envs, self.env.n_agents, generator=self.generators["explore"], device=self.device)
        episodes, facts = rollout(self.env, self.choose(self.epsilon(draws)))
        if self.learns:
            self.replay.add(episodes)
        steps, played = sum_over_ranks(torch.tensor([facts["length"].sum(), len(facts["length"])])).tolist()
        self.counts["env_steps"] += steps
        self.counts["episodes"] += played
        self.returns += facts["return"].tolist()

    def updates_due(self) -> int:
        """One update once each replay holds a batch, then one per `episodes_per_update` episodes of a rank."""
        if not self.learns or sum_over_ranks(torch.tensor(int(len(self.replay) < self.cfg.batch_size))) > 0:
            return 0
        episodes = self.counts["episodes"] / RANKS - self.unlearned - self.cfg.batch_size
        return int(episodes / self.cfg.episodes_per_update) + 1 - self.counts["updates"]

    def learn(self) -> None:
        """The gradient steps that are due. Raises TrainingFailed where a loss or its gradient is not finite."""
        cfg, stats = self.cfg, []
        late = max(2 * self.counts["env_steps"] / cfg.total_steps - 1, 0.0)  # 0 .. 1 over the second half
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * (1 - 0.9 * min(late, 1.0)) if cfg.lr_anneal else cfg.lr
        for _ in range(self.updates_due()):
            batch = self.replay.sample(cfg.batch_size, self.generators["sample"])
            stats.append(gradient_step(self.team, self.target_team, self.optimizer, batch, cfg))
            self.counts["updates"] += 1
            self.update_target()
        self.stats += torch.stack(stats).tolist() if stats else []  # read once a round
        if not np.isfinite(self.stats).all():
            raise TrainingFailed(f"the loss or its gradient is not finite before update {self.counts['updates']}; the "
                                 "last checkpoint is kept")

    def update_target(self) -> None:
        """After each update: a small step, or a copy if another target_update_episodes have been learned from."""
        each, n, updates = self.cfg.episodes_per_update, self.cfg.target_update_episodes, self.counts["updates"]
        copy_due = updates * each // n > (updates - 1) * each // n  # another n episodes are full
        if tau := self.cfg.target_tau or float(copy_due):  # a step of 1 is a copy
            for target, live in zip(self.target_team.parameters(), self.team.parameters()):
                target.lerp_(live.detach(), tau)

    def finished(self) -> bool:
        return self.counts["env_steps"] >= self.cfg.total_steps

    def test_due(self) -> bool:
        """At the start, whenever another test_interval_steps have passed, and at the end."""
        last, steps = self.rows[-1]["env_steps"] if self.rows else -1, self.counts["env_steps"]
        interval = self.cfg.test_interval_steps
        return last < steps and (last // interval < steps // interval or self.finished())

def train(cfg: Config, resume: bool = False, stop=lambda: False) -> dict | None:
    """Train as `cfg` says, in the run directory cfg.out, and return the facts of the result line. resume: go on with
    the run there, exactly where it stopped. stop: asked once a round; where it says so, a checkpoint is written and
    None returned. Raises UsageError for what cannot be done, TrainingFailed, and EnvFailure: an environment failed."""
    run = Run(cfg)
    with contextlib.ExitStack() as opened:
        opened.callback(run.env.close)
        folder = Folder(run, resume, opened)
        while True:
            if run.test_due():
                measure(run)
                folder.report()
            stopping = sum_over_ranks(torch.tensor(int(bool(stop())))) > 0  # one for all
            if stopping or run.finished() or time.perf_counter() > folder.due:
                folder.checkpoint()
            if stopping or run.finished():
                return folder.result()
            run.play()
            run.learn()

# ====================================================================================================================
# ---------------------------------------------------------------------------------------------------- several processes
# `torchrun --nproc-per-node=K qmix.py ...`: each process ("rank") plays its own environments and keeps its own replay;
# gradients and counts are joined, so that all ranks do the same at the same time. Rank 0 alone speaks and writes.
dist, RANK, RANKS = torch.distributed, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

class TrainingFailed(RuntimeError):
    """The run cannot go on; its last checkpoint is as it was."""

def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum, in place. Raises TrainingFailed if another rank has ended."""
    try:
        if RANKS > 1:
            dist.all_reduce(tensor)
        return tensor
    except RuntimeError as error:
        raise TrainingFailed(f"rank {RANK}: another process of this run has ended ({envs.first_line(error)})") from None

def average_over_ranks(tensors: list[Tensor], steps: Tensor) -> None:
    """Each rank's means over its `steps` become, in place, the means over the steps of all ranks."""
    if RANKS > 1:
        means = nn.utils.parameters_to_vector(tensors)
        sums = sum_over_ranks(torch.cat([means * steps, steps.view(1).to(means.dtype)]))
        nn.utils.vector_to_parameters(sums[:-1] / sums[-1], tensors)

@contextlib.contextmanager
def process_group():
    """Join the other ranks, if torchrun has started any. After a failure NCCL would wait for them: it is left alone."""
    with contextlib.ExitStack() as at_end:
        if RANKS > 1:
            importlib.import_module("torch.distributed.nn")  # subtle: imported later, by the optimizer, it keeps the
            if torch.cuda.is_available():                    # group for ever, whose threads then abort Python's exit
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            at_end.push(lambda error, *_: None if error and torch.cuda.is_available() else dist.destroy_process_group())
        at_end.enter_context(contextlib.redirect_stdout(None if RANK else sys.stdout))  # None: print does nothing
        yield

# ------------------------------------------------------------------------------------- memory, environment, evaluation
def allocate(capacity: int, device: torch.device, layout: dict) -> dict[str, Tensor]:
    """Zeros (capacity, ...) for each name's (shape, dtype). Raises UsageError where memory does not suffice."""
    needed = capacity * sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
    print(f"replay: {capacity} episodes, {needed / 2**20:,.1f} MiB on {device}")
    there = math.inf
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows; no cgroup; a cgroup without a limit
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))  # a container's
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else there
    try:
        if needed > there:
            raise MemoryError(f"there are {there / 2**30:,.1f}")
        return {name: torch.zeros(capacity, *shape, dtype=dtype, device=device)
                for name, (shape, dtype) in layout.items()}
    except (MemoryError, RuntimeError) as error:
        raise UsageError(f"--buffer-size {capacity}: {needed / 2**30:,.1f} GiB: {envs.first_line(error)}") from None

def make_env(cfg: Config, n_envs: int, device: str, seed: int, render: bool = False, **more):
    """The environment of cfg. render: it must show pictures; `more`: further arguments for it."""
    more |= {"heuristic_ai": "true"} if cfg.algo == "heuristic" and cfg.env.startswith("smac:") else {}
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    env = envs.make(cfg.env, n_envs, device, seed, dict(envs.pairs(cfg.env_args)) | more, cfg.env_timeout, render)
    if cfg.algo == "heuristic" and not hasattr(env, "heuristic"):
        raise UsageError(f"--algo heuristic: {cfg.env} has none")
    if cfg.compile and not isinstance(env, envs.Workers):
        env.step = torch.compile(env.step)
    return env

COLUMNS = ("env_steps", "episodes", "updates", "seconds", "epsilon", "train_return", "test_return", "test_return_std",
           "test_win_rate", "loss", "grad_norm", "q_taken", "target", "dead_allies", "dead_enemies", "voided")
def greedy_episodes(env, choose, n: int) -> dict:
    """What n greedy episodes came to: their mean return, its standard deviation, and what the environment tells."""
    rounds = []
    while sum(len(each["length"]) for each in rounds) < n:
        rounds.append(rollout(env, choose)[1])
    facts = {name: torch.cat([each[name].float() for each in rounds])[:n] for name in rounds[0]
             if all(name in each for each in rounds)}  # a game may tell more as time goes on
    mean = {name: values.mean().item() for name, values in facts.items()}
    return dict(test_return=mean["return"], test_return_std=facts["return"].std(correction=0).item(),
                test_win_rate=mean.get("battle_won"), dead_allies=mean.get("dead_allies"),
                dead_enemies=mean.get("dead_enemies"), mean_length=mean["length"])

def measure(run: Run) -> None:
    """Greedy episodes -> a new row for metrics.csv. The generators stand afterwards where they stood before, so that
    training goes on as if there had been no evaluation."""
    before = [generator.get_state() for generator in run.generators.values()]
    try:
        found = greedy_episodes(run.env, run.choose(), run.cfg.test_episodes)
    finally:
        for generator, state in zip(run.generators.values(), before):
            generator.set_state(state)
    learned = zip(("loss", "grad_norm", "q_taken", "target"), np.mean(run.stats, axis=0).tolist() if run.stats else ())
    row = run.counts | found | dict(learned) | dict(
        seconds=time.perf_counter() - run.began, voided=getattr(run.env, "voided", 0),
        epsilon=run.epsilon(torch.linspace(0, 1, 101)).mean().item(),  # what the agents draw, on average
        train_return=np.mean(run.returns).item() if run.returns else None)
    run.rows.append({name: row.get(name) for name in COLUMNS})
    run.returns, run.stats = [], []

# --------------------------------------------------------------------------------------------------------- checkpoints
def write_whole(path: Path, write) -> None:
    """Have `write(file)` fill a file, whole or not at all: a kill at any moment leaves the old one or the new one.
    Rank 0 alone writes. Raises TrainingFailed where it cannot, as on a full disk."""
    if RANK:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        temporary.unlink(missing_ok=True)
        raise TrainingFailed(f"{path} cannot be written, and is as it was before ({envs.first_line(error)})") from None

def in_use(replay: Replay) -> dict[str, tuple[Tensor, Tensor]]:
    """The part of each tensor that holds episodes, and which rows (n, T or T+1) of it are no padding: the steps that
    happened, and, of obs, state and avail, what follows the last one."""
    filled = replay.data["filled"][:len(replay)]
    rows = {filled.shape[1]: filled, filled.shape[1] + 1: F.pad(filled, (1, 0), value=True)}
    return {name: (data[:len(replay)], rows[data.shape[1]]) for name, data in replay.data.items() if name != "filled"}

PLAIN = ("counts", "unlearned", "rows", "returns", "stats")  # attributes of Run that are saved as they are
def checkpoint(run: Run, whole: bool = True) -> dict:
    """All that a run consists of; not whole: what `load` needs of it."""
    sizes = {name: int(getattr(run.env, name)) for name in ("obs_dim", "n_actions", "n_agents")}
    saved, replay = dict(format="qmix.py 1", config=vars(run.cfg), sizes=sizes, team=run.team.state_dict()), None
    if not whole:
        return saved
    if run.learns and run.cfg.save_replay:
        replay = {name: data[rows] for name, (data, rows) in in_use(run.replay).items()}
        replay |= dict(added=run.replay.added, filled=run.replay.data["filled"][:len(run.replay)].clone())
    return saved | {name: getattr(run, name) for name in PLAIN} | dict(
        target_team=run.target_team.state_dict(), optimizer=run.optimizer.state_dict(), replay=replay,
        seconds=time.perf_counter() - run.began, ranks=RANKS,
        generators={name: generator.get_state() for name, generator in run.generators.items()})

def restore(run: Run, saved: dict) -> None:
    """Make a new run what the saved one was. What the checkpoint, rank 0's, does not hold starts anew: replay and
    random numbers of other ranks, and a generator from another kind of device, where its state has another size."""
    if other := {k for k, v in saved["config"].items() if v != vars(run.cfg)[k]} - {"total_steps", "device", "out"}:
        raise ValueError(f"its run has another {', '.join(sorted(other))}")
    vars(run).update({name: saved[name] for name in PLAIN})
    for name in ("team", "target_team", "optimizer"):
        getattr(run, name).load_state_dict(saved[name])
    run.began -= saved["seconds"]
    seeds = np.random.SeedSequence((run.cfg.seed, RANK, run.counts["env_steps"])).generate_state(3, np.uint64)
    for (name, generator), seed in zip(run.generators.items(), seeds):
        same = RANK == 0 and len(saved["generators"][name]) == len(generator.get_state())
        generator.set_state(saved["generators"][name]) if same else generator.manual_seed(int(seed))
    if saved["replay"] and RANK == 0:
        run.replay.added = saved["replay"]["added"]
        run.replay.data["filled"][:len(run.replay)] = saved["replay"]["filled"].to(run.device)
        for name, (data, rows) in in_use(run.replay).items():
            data[rows] = saved["replay"][name].to(run.device)
    if RANKS * saved["ranks"] > 1 or not saved["replay"]:  # an empty replay: updates are due for new episodes alone
        run.unlearned = run.counts["episodes"] / RANKS - run.counts["updates"] * run.cfg.episodes_per_update

def read_checkpoint(path: Path, use):
    """`use(content)` of a checkpoint, of a run directory's or of a file. Tensors and plain values alone are loaded
    (weights_only), so that a file from a stranger cannot run code. Whatever is wrong is one UsageError."""
    file = path / "checkpoint.pt" if path.is_dir() else path
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != "qmix.py 1":
            raise ValueError("it was not written by qmix.py")
        return use(content)
    except Exception as error:  # torch and pickle raise nearly anything on a damaged file
        why = "it holds more than tensors and plain values" if "weights_only" in str(error) else envs.first_line(error)
        raise UsageError(f"{file} is not a usable checkpoint: {why}") from None

# ------------------------------------------------------------------------------------------------------- run directory
class Folder:
    """The directory of a run, locked until `opened` is closed, and what rank 0 writes there: config.json, metrics.csv,
    checkpoint.pt, best.pt, TensorBoard's events. Also what a person sees: a progress bar, or lines."""

    def __init__(self, run: Run, resume: bool, opened: contextlib.ExitStack):
        name = "".join(letter if letter.isalnum() else "-" for letter in run.cfg.env)
        name += f"-{run.cfg.algo}-{run.cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09}"
        self.path = Path(run.cfg.out or f"runs/{name}")
        self.run, self.bar, self.board = run, None, None
        if resume:
            read_checkpoint(self.path, lambda saved: restore(run, saved))
        if RANK == 0:
            self.claim(resume, opened)
        self.checkpoint()  # there is one from the start, so that a run can be resumed whenever it is killed
        opened.push(lambda kind, error, _: isinstance(error, (envs.EnvFailure, OSError)) and self.checkpoint())
        if RANK:
            return
        start, total = run.counts["env_steps"], run.cfg.total_steps
        try:  # a run goes on without what is missing or broken
            from tqdm import tqdm
            self.bar = opened.enter_context(tqdm(initial=start, total=total, dynamic_ncols=True, disable=None))
            from torch.utils.tensorboard import SummaryWriter
            self.board = opened.enter_context(SummaryWriter(self.path, purge_step=start))
        except Exception as error:
            print(f"going on without {'a bar and ' * (self.bar is None)}TensorBoard: {envs.first_line(error)}")

    def claim(self, resume: bool, opened: contextlib.ExitStack) -> None:
        """Make and lock the directory, or raise UsageError."""
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
        content = json.dumps(dict(config=vars(self.run.cfg) | {"out": str(self.path)}, versions=versions), indent=2)
        try:
            self.path.mkdir(parents=True, exist_ok=bool(self.run.cfg.out))
            if not resume and (self.path / "checkpoint.pt").exists():
                raise UsageError(f"{self.path} already holds a run: go on with --resume, or choose another --out")
            with contextlib.suppress(ImportError):  # Windows has no locks of this kind
                import fcntl
                opened.callback(os.close, lock := os.open(self.path, os.O_RDONLY))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_whole(self.path / "config.json", lambda file: file.write(content.encode()))
        except (OSError, TrainingFailed) as error:
            why = "it is in use by another process" if isinstance(error, BlockingIOError) else envs.first_line(error)
            raise UsageError(f"run directory {self.path} cannot be used: {why}") from None

    def report(self) -> None:
        """Write and show the newest row; keep the weights if it is the best so far."""
        *earlier, row = self.run.rows
        if row["test_return"] > max((each["test_return"] for each in earlier), default=-math.inf):
            write_whole(self.path / "best.pt", lambda file: torch.save(checkpoint(self.run, whole=False), file))
        lines = [COLUMNS, *(["" if value is None else str(value) for value in each.values()] for each in self.run.rows)]
        write_whole(self.path / "metrics.csv", lambda file: file.writelines(f"{','.join(x)}\n".encode() for x in lines))
        for name, value in row.items():
            if self.board is not None and value is not None:
                self.board.add_scalar(name, value, row["env_steps"])
        known, won = getattr(self.run.env, "best_return", None), row["test_win_rate"]
        text = f"return {row['test_return']:.2f}" + (f" (best known {known:g})" if known else "")
        text += f", wins {won:.0%}" if won is not None else ""
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(text)
        else:
            print(f"{row['env_steps']:>9} steps, {row['seconds']:.0f} s: {text}", flush=True)

    def checkpoint(self) -> None:
        """Write one. The next is due soon enough to lose little by a kill, and after 30 times what this one cost."""
        start, steps = time.perf_counter(), self.run.counts["env_steps"]
        if self.bar is not None:
            self.bar.update(min(steps, self.run.cfg.total_steps) - self.bar.n)
        write_whole(self.path / "checkpoint.pt", lambda file: torch.save(checkpoint(self.run), file))
        self.due = time.perf_counter() + max(self.run.cfg.checkpoint_seconds, 30 * (time.perf_counter() - start))

    def result(self) -> dict | None:
        """The facts of the result line; None where the run was stopped before its end."""
        run, best = self.run, max(row["test_return"] for row in self.run.rows)
        if not run.finished():
            return print(f"stopped at {run.counts['env_steps']} environment steps; go on with --resume {self.path}")
        last = {name: run.rows[-1][name] for name in ("seconds", "test_return", "test_win_rate")}
        return dict(env=run.cfg.env, algo=run.cfg.algo, seed=run.cfg.seed) | run.counts | last | dict(
            best_test_return=best, best_known=getattr(run.env, "best_return", None), out=str(self.path))

# ------------------------------------------------------------------------------------------ using what has been learned
class Policy:
    """The trained decentralised policy: the agents' network alone, on the CPU; no mixer, no state, no replay."""

    def __init__(self, saved: dict):
        self.config = Config(**saved["config"])
        if self.config.algo not in MIXERS:
            raise ValueError(f"--algo {self.config.algo} learns nothing")
        self.agent = Agent(**saved["sizes"], hidden_dim=self.config.hidden_dim)
        self.agent.load_state_dict({name.removeprefix("agent."): value for name, value in saved["team"].items()
                                    if name.startswith("agent.")})

    def act(self, obs, avail, hidden=None, agents=None) -> tuple[Tensor, tuple]:
        """Greedy actions of one team, obs (N, O) and avail (N, A), or of B teams, (B, N, O) and (B, N, A); arrays or
        tensors. agents: whose rows these are, such as [2] for agent 2 alone; None: all N are there.

        Returns actions (N,) or (B, N) int64, and `hidden` for the next call (`act`'s memory); None starts an episode.
        Raises UsageError for other shapes, for numbers that are not finite, and for an agent without an action."""
        agents = list(range(self.agent.n_agents) if agents is None else agents)
        obs = envs.as_array("Policy.act: obs", obs, (..., len(agents), self.agent.obs_dim))
        avail = envs.as_array("Policy.act: avail", avail, (*obs.shape[:-1], self.agent.n_actions), mask=True)
        teams = obs.reshape(-1, *obs.shape[-2:]), avail.reshape(-1, *avail.shape[-2:])  # (B, N, .)
        B, N = teams[0].shape[:2]
        if hidden is not None and [(1, B * N, self.config.hidden_dim), (B, N)] != [tuple(x.shape) for x in hidden]:
            raise UsageError(f"Policy.act: hidden must be what the last step of these {B} x {N} agents gave, or None")
        actions, hidden = act(self.agent, *map(torch.from_numpy, teams), hidden, agents=agents)
        return actions.view(avail.shape[:-1]), hidden

def load(path: str) -> Policy:
    """The policy of a run directory (its last checkpoint) or of a file such as runs/demo/best.pt."""
    return read_checkpoint(Path(path), Policy)

def evaluate(path: str, episodes: int = 32, record_to: str = "", cfg: Config | None = None) -> dict:
    """Greedy episodes of the decentralised policy alone. cfg: where to play, if elsewhere than in training."""
    if episodes < 1:
        raise UsageError(f"--episodes must be at least 1, not {episodes}")
    policy = load(path)
    cfg = cfg or policy.config
    choose = lambda step, hidden: policy.act(step.obs, step.avail, hidden)  # noqa: E731
    replays = {"replay_dir": record_to} if record_to and cfg.env.startswith("smac:") else {}
    env = make_env(cfg, min(episodes, cfg.num_envs), "cpu", cfg.seed, bool(record_to and not replays), **replays)
    with contextlib.closing(env):
        if record_to and not replays:
            envs.record(env, choose, Path(record_to))
        return dict(env=cfg.env, algo=cfg.algo, episodes=episodes) | greedy_episodes(env, choose, episodes) | dict(
            best_known=getattr(env, "best_return", None), out=str(path))

# ----------------------------------------------------------------------------------------------- presets, command line
# Departure 4: what an environment needs instead of Config's defaults; flags override both. Measured: docs/results.md.
PRESETS = {
    # The paper's appendix; Adam with a larger step and half the updates, because a reader waits
    "two-step": dict(total_steps=10_000, num_envs=25, buffer_size=500, epsilon_finish=1.0, target_update_episodes=100,
                     mixing_dim=8, hypernet_dim=0, episodes_per_update=2.0, optimizer="adam", lr=3e-3, test_episodes=1,
                     test_interval_steps=1000, threads=1),
    # Its traps (48, 59.64, 72) are left by many half-random episodes, precise updates and targets that follow at once
    "checkers": dict(total_steps=950_000, num_envs=64, episodes_per_update=10.0, buffer_size=4000, optimizer="adam",
                     lr=2e-3, lr_anneal=True, td_lambda=0.5, reward_scale=0.1, target_tau=0.1,
                     epsilon_anneal_steps=600_000, epsilon_spread=0.5, test_episodes=1, test_interval_steps=20_000,
                     threads=1),
    # Minutes instead of hours: Adam, Q(lambda), a target that follows soon, a replay that drops the first battles
    "skirmish": dict(total_steps=300_000, num_envs=64, episodes_per_update=4.0, optimizer="adam", lr=1e-3,
                     lr_anneal=True, td_lambda=0.6, target_tau=0.05, buffer_size=1000, test_episodes=64,
                     test_interval_steps=20_000, threads=1)}

def settle(given: dict) -> dict:
    """All settings of a Config: the defaults, then the environment's preset, then what is given; checked, with NumPy's
    numbers as plain ones, paths as text. Raises UsageError with what was expected and what came."""
    values = {field.name: field.default for field in dataclasses.fields(Config)}
    if unknown := given.keys() - values.keys():
        raise UsageError(f"unknown setting {', '.join(sorted(unknown))}; known: {', '.join(values)}")
    kind = str(given.get("env", values["env"])).replace("skirmish:", "skirmish-v")  # a map is a variant, as -v1 is
    values |= next((p for name, p in PRESETS.items() if kind == name or kind.startswith(f"{name}-v")), {}) | given
    values["env_args"] = tuple(f"{key}={value}" for key, value in envs.pairs(values["env_args"]))
    for name, hint in get_type_hints(Config, include_extras=True).items():
        kind, value = getattr(hint, "__origin__", hint), values[name]
        value = value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if kind is Literal:
            fits, expected = value in get_args(hint), f"one of {', '.join(get_args(hint))}"
        else:
            low, high = getattr(hint, "__metadata__", [(None, None)])[0]
            value = float(value) if kind is float and type(value) is int and abs(value) < 2**99 else value
            fits = type(value) is kind and (low is None or low <= value <= high)  # subtle: True is an int too
            expected = kind.__name__ + (f" between {low} and {high}" if low is not None else "")
        if not fits:
            raise UsageError(f"--{name.replace('_', '-')} must be {expected}, not {value!r}")
        values[name] = value
    for low, high in (("batch_size", "buffer_size"), ("num_envs", "buffer_size"), ("epsilon_finish", "epsilon_spread")):
        if not 0 < values[low] <= values[high] and values["epsilon_spread" if "epsilon" in low else low] > 0:
            raise UsageError(f"--{low} must lie above 0 and not above --{high}, not {values[low]}".replace("_", "-"))
    return values

@dataclasses.dataclass
class Command:
    """QMIX, VDN, IQL and the paper's ablations. Without --resume or --evaluate: train."""

    config: Config
    resume: str = ""  # run directory to go on with, exactly where it stopped (beside it: --total-steps, --device)
    evaluate: str = ""  # run directory or checkpoint: play greedily (beside it: --env, --env-args, --num-envs, --seed)
    episodes: int = 32  # episodes of --evaluate
    record: str = ""  # with --evaluate: draw one episode into this .gif; for smac: keep replays in this folder

def parse(arguments: list[str]) -> Command:
    """Flags over the saved config (--resume, --evaluate) or over the environment's preset."""
    import tyro
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--resume", "--evaluate", "--env"):
        first.add_argument(flag, default="")
    first.add_argument("--env-args", nargs="*", action="extend", default=[])  # what is repeated adds up
    first, rest = first.parse_known_args(arguments)
    given = {name: value for name, value in dict(env=first.env, env_args=first.env_args).items() if value}
    saved = vars(Config(**given))
    if path := first.resume or first.evaluate:
        saved = read_checkpoint(Path(path), lambda content: vars(Config(**content["config"] | {"out": first.resume})))
        other = {"env_args": ()} if given.get("env", saved["env"]) != saved["env"] else {}  # they were for that one
    config = Config(**(saved | other | given if path else saved))
    command = tyro.cli(Command, args=rest, default=Command(config, first.resume, first.evaluate),
                       config=(tyro.conf.OmitArgPrefixes,))
    can = ("total_steps", "device") if first.resume else ("env", "env_args", "num_envs", "seed") if path else saved
    changed = [name for name, value in vars(command.config).items() if value != saved[name] and name not in can]
    if changed:
        raise UsageError(f"--{changed[0]} cannot be changed here; what can: {', '.join(can)}".replace("_", "-"))
    if command.evaluate and command.resume or (command.record or command.episodes != 32) and not command.evaluate:
        raise UsageError("--evaluate and --resume exclude each other, and --record and --episodes go with --evaluate")
    return command

def main(arguments: list[str]) -> int:
    """Exit code 0; 2 for bad input; 1 where training failed; 128 + its number where a signal stopped it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed, as for a service: os.open takes the lowest number that is free
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))
    asked = []  # (signal, when): Ctrl-C, SIGTERM and SIGHUP ask the run to stop where it can be resumed
    def ask(number: int, frame) -> None:
        asked.append((number, time.monotonic()))
        if asked[-1][1] - asked[0][1] > 2:  # sooner, it belongs to the first: `timeout` and `uv run` send two
            raise SystemExit(128 + number)
    try:
        command = parse(arguments)
        if command.evaluate:
            print("result: " + json.dumps(evaluate(command.evaluate, command.episodes, command.record, command.config)))
            return 0
        for number in {getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)}:
            signal.signal(number, ask if signal.getsignal(number) != signal.SIG_IGN else signal.SIG_IGN)  # nohup's
        with process_group():
            if facts := train(command.config, bool(command.resume), lambda: asked):
                print("result: " + json.dumps(facts), flush=True)
        return 0 if facts else 128 + (asked[0][0] if asked else signal.SIGTERM)  # another rank was asked
    except (UsageError, ImportError, TrainingFailed, envs.EnvFailure, torch.OutOfMemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, BrokenPipeError):  # nobody reads on; Python would fail on that once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 2 if isinstance(error, (UsageError, ImportError)) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
