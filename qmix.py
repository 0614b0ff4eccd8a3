"""QMIX in one file (Rashid et al., ICML 2018, arXiv 1803.11485), with VDN, IQL and the ablations.

Several agents act separately and learn from one team reward. Each agent a has its own value
Q_a(history, action). A mixing network joins the values of the chosen actions into Q_tot, which
never falls when a Q_a rises, so each agent's own best action is also the team's (Eq. 4, 5).
Training may look at the true state. Acting needs each agent's observation alone.

    python qmix.py --env checkers     # about two minutes; ends at a greedy return of about 83.5

Everything down to the line of = signs is QMIX. Below it: evaluation, metrics, checkpoints and
the command line. envs.py has the environments: each plays B episodes side by side, and its
reset() and step(actions) return a Step of obs, state, avail, reward, terminated, truncated, info.

Axes      B episodes, T steps, N agents, A actions, O observation, S state, H hidden units,
          E mixing units; in the order (B, T, N, feature). obs, state and avail have T+1 rows,
          one more than actions and reward: they include what follows the last action.
Names     `actions` is the paper's u. `avail` is True at the actions that an agent may choose.
          `memory` is what an agent remembers of its history: (GRU state, last actions).
Episodes  `filled` marks the steps that happened; the rest is padding. A `terminated` episode has
          no future value; a `truncated` one (by a time limit) still has.

Departures from the paper, each marked in the code:
  1. hyper-networks have a hidden layer, as in JMLR (arXiv 2003.08839) and the authors' code
  2. double Q-learning in the target, as in the authors' code
  3. a round is an episode in each of several environments; then the updates for them follow
  4. PRESETS: the small environments have other numbers than the authors' for StarCraft, and
     switch on what Config's defaults leave out, such as Q(lambda) and a target that moves slowly
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import envs


# ------------------------------------------------------------------------------ the networks
class Agent(nn.Module):
    """DRQN agent, fc - GRU - fc (section 4). All agents share it, told apart by a one-hot id."""

    def __init__(self, obs_dim: int, n_actions: int, n_agents: int, hidden_dim: int):
        super().__init__()
        self.obs_dim = obs_dim
        self.n_actions = n_actions
        self.n_agents = n_agents
        self.fc1 = nn.Linear(obs_dim + n_actions + n_agents, hidden_dim)
        self.gru = nn.GRU(hidden_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, n_actions)

    def forward(self, obs: Tensor, last_actions: Tensor, hidden: Tensor | None = None, agents=None):
        """Q-values of T steps in a row; T = 1 when acting.

        obs: (B, T, N, O) float32.
        last_actions: (B, T, N) int64, -1 where there is none yet.
        hidden: (1, B*N, H) of the step before, None (zeros) at the start of an episode.
        agents: the ids of the agents in obs, [2] if agent 2 acts alone, None for all.
        Returns q (B, T, N, A) and the new hidden.
        """
        B, T, N, _ = obs.shape
        last = F.one_hot(last_actions + 1, self.n_actions + 1)  # (B, T, N, 1+A), 0: none yet
        last = last[..., 1:]  # (B, T, N, A), zeros where there is none yet
        ids = torch.eye(self.n_agents, device=obs.device)
        if agents is not None:
            ids = ids[list(agents)]
        x = torch.cat([obs, last, ids.expand(B, T, N, -1)], dim=-1)  # (B, T, N, O+A+N)
        x = x.transpose(0, 1).flatten(1, 2)  # (T, B*N, O+A+N): nn.GRU's order, time first
        x = F.relu(self.fc1(x))  # (T, B*N, H)
        x, hidden = self.gru(x, hidden)  # (T, B*N, H); each agent of each episode is a sequence
        q = self.fc2(x).view(T, B, N, self.n_actions)
        return q.transpose(0, 1), hidden


def hypernet(state_dim: int, hidden_dim: int, n_outputs: int) -> nn.Module:
    """A network that maps the state to weights of another network (Ha et al. 2017).

    It has one hidden layer, or none if hidden_dim = 0. Departure 1: in ICML only V(s) has one; in
    JMLR and the authors' code the weights have one too.
    """
    if hidden_dim == 0:
        return nn.Linear(state_dim, n_outputs)
    first = nn.Linear(state_dim, hidden_dim)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(hidden_dim, n_outputs))


# A mixer maps q (B, T, N), the values of the chosen actions, and state (B, T, S) to Q_tot
# (B, T, 1); only IQL returns (B, T, N). All are made and called alike, so some ignore arguments.


class QMIX(nn.Module):
    """One hidden layer; its weights are non-negative functions of the state (Figure 2a, Eq. 5)."""

    def __init__(self, n_agents: int, state_dim: int, mixing_dim: int, hypernet_dim: int):
        super().__init__()
        self.w1 = hypernet(state_dim, hypernet_dim, n_agents * mixing_dim)
        self.b1 = nn.Linear(state_dim, mixing_dim)  # a bias, of any sign: linear in both papers
        self.w2 = hypernet(state_dim, hypernet_dim, mixing_dim)
        # V(s), the final bias, of any sign; its hidden layer has E units in ICML and JMLR
        self.v = hypernet(state_dim, mixing_dim, 1)

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        B, T, N = q.shape
        w1 = self.w1(state).abs().view(B, T, N, -1)  # (B, T, N, E); abs: dQ_tot/dQ_a >= 0, Eq. 5
        hidden = F.elu((q.unsqueeze(-1) * w1).sum(-2) + self.b1(state))  # (B, T, E)
        w2 = self.w2(state).abs()  # (B, T, E)
        return (hidden * w2).sum(-1, keepdim=True) + self.v(state)  # (B, T, 1)


class VDN(nn.Module):
    """Value decomposition (Sunehag et al. 2017): the plain sum, blind to the state."""

    def __init__(self, n_agents: int, state_dim: int, mixing_dim: int, hypernet_dim: int):
        super().__init__()

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        return q.sum(-1, keepdim=True)  # (B, T, 1)


class IQL(nn.Module):
    """Independent Q-learning (Tan 1993): nothing is mixed; each agent learns from the reward."""

    def __init__(self, n_agents: int, state_dim: int, mixing_dim: int, hypernet_dim: int):
        super().__init__()

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        return q  # (B, T, N): not one Q_tot but N


class VDNS(nn.Module):
    """Ablation VDN-S: the sum plus V(s)."""

    def __init__(self, n_agents: int, state_dim: int, mixing_dim: int, hypernet_dim: int):
        super().__init__()
        self.v = hypernet(state_dim, mixing_dim, 1)

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        return q.sum(-1, keepdim=True) + self.v(state)  # (B, T, 1)


class QMIXLin(nn.Module):
    """Ablation QMIX-Lin: no hidden layer. Weights >= 0 that depend on the state, plus V(s)."""

    def __init__(self, n_agents: int, state_dim: int, mixing_dim: int, hypernet_dim: int):
        super().__init__()
        self.w = hypernet(state_dim, hypernet_dim, n_agents)
        self.v = hypernet(state_dim, mixing_dim, 1)

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        w = self.w(state).abs()  # (B, T, N)
        return (q * w).sum(-1, keepdim=True) + self.v(state)  # (B, T, 1)


class QMIXNS(nn.Module):
    """Ablation QMIX-NS: QMIX's network without hyper-networks; it does not see the state."""

    def __init__(self, n_agents: int, state_dim: int, mixing_dim: int, hypernet_dim: int):
        super().__init__()
        self.hidden = nn.Linear(n_agents, mixing_dim)
        self.final = nn.Linear(mixing_dim, 1)

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        hidden = F.elu(F.linear(q, self.hidden.weight.abs(), self.hidden.bias))  # (B, T, E)
        return F.linear(hidden, self.final.weight.abs(), self.final.bias)  # (B, T, 1)


MIXERS = {  # by --algo
    "qmix": QMIX,
    "vdn": VDN,
    "iql": IQL,
    "vdn-s": VDNS,
    "qmix-lin": QMIXLin,
    "qmix-ns": QMIXNS,
}


class Team(nn.Module):
    """What is trained together, and copied together into the target: agents and mixer."""

    def __init__(self, env, cfg: Config):
        super().__init__()
        self.agent = Agent(env.obs_dim, env.n_actions, env.n_agents, cfg.hidden_dim)
        self.mixer = MIXERS[cfg.algo](env.n_agents, env.state_dim, cfg.mixing_dim, cfg.hypernet_dim)


# ------------------------------------------------------------------------- replay and acting
class Replay:
    """The last `capacity` whole episodes, in tensors that are allocated once."""

    def __init__(self, env, capacity: int, device: torch.device):
        T = env.episode_limit
        N = env.n_agents
        layout = {
            "obs": ((T + 1, N, env.obs_dim), torch.float32),
            "state": ((T + 1, env.state_dim), torch.float32),
            "avail": ((T + 1, N, env.n_actions), torch.bool),
            "actions": ((T, N), torch.int64),
            "reward": ((T,), torch.float32),
            "terminated": ((T,), torch.bool),
            "filled": ((T,), torch.bool),
        }
        self.capacity = capacity
        self.added = 0  # episodes, ever
        self.data = {}
        try:
            for name, (shape, dtype) in layout.items():
                tensor = torch.empty(capacity, *shape, dtype=dtype, device=device)
                self.data[name] = tensor.zero_()  # takes the memory now, so a lack of it shows now
        except RuntimeError as error:
            raise envs.UsageError(f"--buffer-size {capacity} is too large: {error}") from None

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, episodes: dict[str, Tensor]) -> None:
        """Store episodes as `rollout` returns them. The oldest make room."""
        B = len(episodes["filled"])
        slots = torch.arange(self.added, self.added + B) % self.capacity
        self.data["filled"][slots] = False  # else the end of a longer, older episode would count
        for name, data in self.data.items():
            length = episodes[name].shape[1]
            data[slots, :length] = episodes[name]
        self.added += B

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Different episodes, the longest first (`unroll` is faster then), cut to its length."""
        filled = self.data["filled"]
        slots = torch.randperm(len(self), generator=generator)[:batch_size].to(filled.device)
        lengths, order = filled[slots].sum(1).sort(descending=True, stable=True)
        slots = slots[order]
        T = int(lengths[0])  # waits for the device
        batch = {}
        for name, data in self.data.items():
            length = T
            if name in ("obs", "state", "avail"):
                length += 1  # with what follows the last action
            batch[name] = data[:, :length][slots]
        return batch


@torch.no_grad()
def act(
    agent: Agent, obs: Tensor, avail: Tensor, memory=None, epsilon=None, generator=None, agents=None
):
    """One step of B teams: obs (B, N, O), avail (B, N, A) bool -> actions (B, N), new memory.

    memory: what this function returned a step ago, None at the start of an episode.
    epsilon: (B, N), each agent's own chance of a random action, None: greedy.
    generator: where the random numbers come from.
    agents: the ids of the agents in obs, None for all.
    """
    if memory is None:
        hidden = None
        last_actions = torch.full(avail.shape[:2], -1, device=obs.device)
    else:
        hidden, last_actions = memory
    q, hidden = agent(obs.unsqueeze(1), last_actions.unsqueeze(1), hidden, agents)  # T = 1
    actions = q.squeeze(1).masked_fill(~avail, -math.inf).argmax(-1)  # (B, N)
    if epsilon is not None:
        noise = torch.rand(avail.shape, generator=generator, device=obs.device)
        random = noise.masked_fill(~avail, -1.0).argmax(-1)  # uniform over what is available
        explore = torch.rand(actions.shape, generator=generator, device=obs.device) < epsilon
        actions = torch.where(explore, random, actions)
    return actions, (hidden, actions)


def stack(steps: list[envs.Step], field: str) -> Tensor:
    return torch.stack([getattr(step, field) for step in steps], dim=1)


@torch.no_grad()
def rollout(env, choose) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Play one episode in each of the B environments.

    `choose(step, memory) -> actions (B, N), memory` is the policy. Returns the episodes, and facts
    (B,) about each: return, length, and each entry of `info` as it was at the episode's last step.
    Episodes whose info["void"] is True are left out: there the game crashed.
    """
    step = env.reset()
    steps = [step]
    actions = []
    filled = []
    facts = {}
    memory = None
    running = torch.ones(env.n_envs, dtype=torch.bool, device=env.device)
    # An episode that still runs at episode_limit is cut off, as by a time limit
    while len(actions) < env.episode_limit and running.any():
        chosen, memory = choose(step, memory)
        step = env.step(chosen)  # where an episode is over, the environment returns padding
        steps.append(step)
        actions.append(chosen)
        filled.append(running)
        for name, value in step.info.items():
            before = facts.get(name, value)  # at first there is none
            facts[name] = torch.where(running, value, before)  # an ended episode keeps its last
        running = running & ~(step.terminated | step.truncated)  # a new tensor: filled has the old

    episodes = {
        "obs": stack(steps, "obs"),  # (B, T+1, N, O)
        "state": stack(steps, "state"),  # (B, T+1, S)
        "avail": stack(steps, "avail"),  # (B, T+1, N, A)
        "actions": torch.stack(actions, dim=1),  # (B, T, N)
        "reward": stack(steps[1:], "reward"),  # (B, T): the first step is reset's
        # subtle: `truncated` is not stored. After a time limit the target bootstraps as usual.
        "terminated": stack(steps[1:], "terminated"),  # (B, T)
        "filled": torch.stack(filled, dim=1),  # (B, T)
    }
    facts["return"] = (episodes["reward"] * episodes["filled"]).sum(1)
    facts["length"] = episodes["filled"].sum(1)
    if "void" in facts:
        keep = ~facts.pop("void")
        episodes = {name: value[keep] for name, value in episodes.items()}
        facts = {name: value[keep] for name, value in facts.items()}
    return episodes, facts


# ---------------------------------------------------------------------------------- the loss
def unroll(agent: Agent, obs: Tensor, last_actions: Tensor, lengths: list[int]) -> Tensor:
    """Returns q as agent(obs, last_actions) does, (B, T, N, A), but is faster on a CPU.

    It goes 16 steps at a time, which stay in the processor's cache, and leaves out episodes that
    are over. lengths: the steps of each episode; after them q is not right. Any order will do, but
    it is fast if the longest episodes come first.
    """
    B, T, N, _ = obs.shape
    pieces = []
    hidden = None
    for t in range(0, T, 16):
        # n - 1 is the last episode that still runs (if none does: 0); n never grows
        n = max((b + 1 for b in range(B) if lengths[b] > t), default=1)
        if hidden is not None:
            hidden = hidden[:, : n * N]  # b*N .. b*N + N-1 are the agents of episode b
        q, hidden = agent(obs[:n, t : t + 16], last_actions[:n, t : t + 16], hidden)
        pieces.append(F.pad(q, (0, 0) * 3 + (0, B - n)))  # zeros for the others: B again
    return torch.cat(pieces, dim=1)


def td_targets(
    reward: Tensor, terminated: Tensor, filled: Tensor, q_next: Tensor, gamma: float, lam: float
) -> Tensor:
    """What Q_tot should be, (B, T, 1). q_next[:, t] is the value of what follows step t.

    lam = 0: y_t = r_t + gamma * q_next_t, the target of Eq. 6.
    lam > 0: y_t = r_t + gamma * ((1 - lam) * q_next_t + lam * y_{t+1}), Peng's Q(lambda).
    In both, y_t = r_t where the episode terminated; the last step of a truncated episode has the
    target of Eq. 6.
    All tensors are float (B, T, 1), but for IQL q_next and the result are (B, T, N).
    """
    if lam == 0:
        return reward + gamma * (1 - terminated) * q_next
    goes_on = F.pad(filled[:, 1:], (0, 0, 0, 1)) > 0  # (B, T, 1): is there a step t+1?
    target = torch.zeros_like(q_next)
    y = 0.0
    for t in reversed(range(q_next.shape[1])):
        later = (1 - lam) * q_next[:, t] + lam * y
        later = torch.where(goes_on[:, t], later, q_next[:, t])  # the last step has no y_{t+1}
        y = reward[:, t] + gamma * (1 - terminated[:, t]) * later
        target[:, t] = y
    return target


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def td_loss(
    team: Team,
    target_team: Team,
    batch: dict[str, Tensor],
    gamma: float,
    double_q: bool = True,
    td_lambda: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 6: the squared TD error of Q_tot, averaged over the steps that happened.

    IQL has N values per step, so it averages over agents too. batch: obs (B, T+1, N, O), state
    (B, T+1, S), avail (B, T+1, N, A), actions (B, T, N), reward, terminated and filled (B, T).
    Returns the loss, the mean of Q_tot and the mean of its target, all scalars.
    """
    obs = batch["obs"]
    state = batch["state"]
    avail = batch["avail"]
    actions = batch["actions"]
    reward = batch["reward"].unsqueeze(-1)  # (B, T, 1)
    terminated = batch["terminated"].to(obs.dtype).unsqueeze(-1)  # (B, T, 1)
    filled = batch["filled"].to(obs.dtype).unsqueeze(-1)  # (B, T, 1)
    last_actions = F.pad(actions, (0, 0, 1, 0), value=-1)  # (B, T+1, N): none before the first
    lengths = (batch["filled"].sum(1) + 1).tolist()  # with the observation after the last action

    # (B, T+1, N, A): the last row, after the last action, is only for `chooser` below
    q = unroll(team.agent, obs, last_actions, lengths)
    q_chosen = q[:, :-1].gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (B, T, N)
    q_tot = team.mixer(q_chosen, state[:, :-1])  # (B, T, 1); IQL (B, T, N)

    with torch.no_grad():
        # subtle: the target network too goes through the episode from its start, for its memory
        q_target = unroll(target_team.agent, obs, last_actions, lengths)
        chooser = q if double_q else q_target  # departure 2
        best = chooser[:, 1:].masked_fill(~avail[:, 1:], -math.inf).argmax(-1, keepdim=True)
        q_next = q_target[:, 1:].gather(-1, best).squeeze(-1)  # (B, T, N)
        q_tot_next = target_team.mixer(q_next, state[:, 1:])  # each agent's best: Eq. 4
        target = td_targets(reward, terminated, filled, q_tot_next, gamma, td_lambda)

    mask = filled.expand_as(q_tot)
    loss = masked_mean((q_tot - target) ** 2, mask)
    return loss, masked_mean(q_tot.detach(), mask), masked_mean(target, mask)


def make_optimizer(team: Team, cfg: Config) -> torch.optim.Optimizer:
    if cfg.optimizer == "adam":
        return torch.optim.Adam(team.parameters(), lr=cfg.lr, fused=True)
    return torch.optim.RMSprop(team.parameters(), lr=cfg.lr, alpha=0.99, eps=1e-5)  # the authors'


STATS = ("loss", "grad_norm", "q_taken", "target")  # q_taken: Q_tot of the actions taken


def gradient_step(
    team: Team,
    target_team: Team,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    cfg: Config,
) -> Tensor:
    """One update of agents and mixer, with the reward scaled. Returns the four STATS, (4,)."""
    batch = dict(batch, reward=batch["reward"] * cfg.reward_scale)
    loss, q_tot, target = td_loss(team, target_team, batch, cfg.gamma, cfg.double_q, cfg.td_lambda)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(team.parameters(), cfg.grad_clip)
    optimizer.step()
    return torch.stack([loss.detach(), grad_norm, q_tot, target])


# ------------------------------------------------------------------------------ the settings
# What Config below accepts: {names of fields: (smallest, largest value)}. A field must have the
# type of its bounds.
BOUNDS = {
    "total_steps buffer_size target_update_episodes epsilon_anneal_steps hidden_dim "
    "mixing_dim test_interval_steps test_episodes": (1, 10**12),
    "seed threads hypernet_dim": (0, 2**63 - 1),
    "gamma td_lambda target_tau epsilon_start epsilon_finish epsilon_spread": (0.0, 1.0),
    "lr reward_scale grad_clip episodes_per_update env_timeout": (1e-9, 1e9),
    "checkpoint_seconds": (0.0, 1e9),
    "compile lr_anneal double_q": (False, True),
}


@dataclasses.dataclass
class Config:
    """Every number of a run. "(authors)": the paper's and PyMARL's, "(SMAC)": the benchmark's.

    `configure("checkers")` makes one with the environment's preset; `Config("checkers")` has the
    defaults below, whatever the environment needs.
    """

    env: str  # two-step, checkers, checkers-v0..3, skirmish:MAP, smac:MAP, ma_gym:ID, module:Class
    env_args: tuple[str, ...] = ()  # key=value ...: arguments of smac:MAP, ma_gym:ID, module:Class
    env_timeout: float = 120.0  # seconds for a step of such an environment; a reset: 60 more
    algo: str = "qmix"  # iql, vdn, qmix, vdn-s, qmix-lin, qmix-ns
    seed: int = 1  # seeds the weights, the environments, exploration and sampling
    total_steps: int = 2_000_000  # length of the run: steps, summed over the environments (SMAC)
    num_envs: int = 8  # environments that play side by side (PyMARL: 1 or 8)
    device: str = "auto"  # auto, cpu or cuda: where networks, replay and torch environments are
    threads: int = 0  # CPU threads; 0 leaves torch's number as it is
    compile: bool = False  # torch.compile the step of a torch environment
    out: str = ""  # run directory; empty: a new one under runs/
    checkpoint_seconds: float = 5.0  # least time between checkpoints; more if they are slow
    gamma: float = 0.99  # discount per step (authors)
    lr: float = 5e-4  # learning rate (authors)
    lr_anneal: bool = False  # learning rate falls to a tenth over the second half of the run
    optimizer: str = "rmsprop"  # rmsprop: alpha 0.99, eps 1e-5 (authors); adam as in PyMARL2
    batch_size: int = 32  # whole episodes per update (authors)
    buffer_size: int = 5000  # episodes kept for replay (authors)
    episodes_per_update: float = 1.0  # new episodes per gradient step (authors)
    target_update_episodes: int = 200  # episodes between copies to the target (authors)
    target_tau: float = 0.0  # above 0: no copies; the target moves by this share at each update
    epsilon_start: float = 1.0  # chance of a random action at the start (authors)
    epsilon_finish: float = 0.05  # the same after epsilon_anneal_steps (authors)
    epsilon_anneal_steps: int = 50_000  # steps over which epsilon falls linearly (authors)
    epsilon_spread: float = 0.0  # above 0: in each episode an agent draws its own floor, up to this
    double_q: bool = True  # the live network chooses the next action; off: plain maximum, Eq. 6
    td_lambda: float = 0.0  # 0: one-step targets (Eq. 6); above: Peng's Q(lambda) (PyMARL2: 0.6)
    reward_scale: float = 1.0  # the loss sees the reward times this
    grad_clip: float = 10.0  # largest norm of the gradient (authors)
    hidden_dim: int = 64  # GRU units of an agent (authors)
    mixing_dim: int = 32  # units of the mixing network (authors)
    hypernet_dim: int = 64  # hidden units of the weight hyper-networks (JMLR); 0: none (ICML)
    test_interval_steps: int = 10_000  # steps between greedy evaluations (SMAC)
    test_episodes: int = 32  # episodes per evaluation (SMAC; the paper: 20)

    def __post_init__(self):
        """Checks numbers and choices. Raises UsageError: the flag, what was expected, what came."""
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                setattr(self, name, value.item())  # seed=np.int64(3) is a seed too
        self.out = str(self.out)  # a Path will do
        for names, (smallest, largest) in BOUNDS.items():
            for name in names.split():
                self.check(name, smallest, largest)
        self.check("batch_size", 1, self.buffer_size)
        self.check("num_envs", 1, self.buffer_size)  # a round must fit into the replay
        if self.epsilon_spread > 0:
            self.check("epsilon_finish", 1e-9, self.epsilon_spread)
        self.check_choice("algo", list(MIXERS))
        self.check_choice("optimizer", ["rmsprop", "adam"])

    def check(self, name: str, smallest: float, largest: float) -> None:
        value = getattr(self, name)
        kind = type(smallest)  # the field's type is that of its bounds; an int will do for a float
        if not isinstance(value, int | kind) or not smallest <= value <= largest:
            expected = f"{kind.__name__} from {smallest} to {largest}"
            raise envs.UsageError(f"--{name.replace('_', '-')} must be {expected}, not {value!r}")

    def check_choice(self, name: str, choices: list[str]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise envs.UsageError(f"--{name} must be one of {', '.join(choices)}, not {value!r}")


# Departure 4: what an environment needs instead of Config's defaults (measured: docs/tuning.md).
PRESETS = {
    # The paper's appendix, but Adam with a larger step and half the updates, to be quick.
    "two-step": {
        "total_steps": 10_000,
        "num_envs": 25,
        "buffer_size": 500,
        "epsilon_finish": 1.0,
        "target_update_episodes": 100,
        "mixing_dim": 8,
        "hypernet_dim": 0,
        "episodes_per_update": 2.0,
        "optimizer": "adam",
        "lr": 3e-3,
        "test_episodes": 1,
        "test_interval_steps": 1000,
        "threads": 1,
    },
    # Local optima at returns 48, 59.64 and 72. Long exploration, which differs between agents,
    # and a target that moves at each update get out of them.
    "checkers": {
        "total_steps": 950_000,
        "num_envs": 64,
        "episodes_per_update": 10.0,
        "buffer_size": 4000,
        "optimizer": "adam",
        "lr": 2e-3,
        "lr_anneal": True,
        "td_lambda": 0.5,
        "reward_scale": 0.1,
        "target_tau": 0.1,
        "epsilon_anneal_steps": 600_000,
        "epsilon_spread": 0.5,
        "test_episodes": 1,
        "test_interval_steps": 20_000,
        "threads": 1,
    },
    # Minutes instead of hours: Adam, Q(lambda), a small replay that soon forgets the first battles.
    "skirmish": {
        "total_steps": 300_000,
        "num_envs": 64,
        "episodes_per_update": 4.0,
        "optimizer": "adam",
        "lr": 1e-3,
        "lr_anneal": True,
        "td_lambda": 0.6,
        "target_tau": 0.05,
        "buffer_size": 1000,
        "test_episodes": 64,
        "test_interval_steps": 20_000,
        "threads": 1,
    },
    # This map needs longer runs; all else as above
    "skirmish:3s5z": {"total_steps": 600_000},
}


def configure(env: str, **given) -> Config:
    """The defaults, then the environment's preset, then what is given."""
    name = env
    if env.startswith("checkers-v"):
        name = "checkers"  # one preset for all variants
    if env.startswith("skirmish:"):
        name = "skirmish"  # and for all maps
    settings = {**PRESETS.get(name, {}), **PRESETS.get(env, {}), **given}
    return Config(env=env, **settings)


# ------------------------------------------------------------------------------ the training
class TrainingFailed(RuntimeError):
    """The run cannot go on. Its last checkpoint is kept."""


class Run:
    """Plays and learns. Epsilon, learning rate and the updates that are due follow from `counts`.

    resumed_at: the env_steps of the checkpoint that `restore` will load into this run. It varies
    the seeds: environments in worker processes must not repeat their first episodes.
    """

    def __init__(self, cfg: Config, resumed_at: int = 0):
        self.cfg = cfg
        seeds = np.random.SeedSequence((cfg.seed, resumed_at)).generate_state(3, np.uint64)
        env_seed, explore_seed, sample_seed = seeds.tolist()  # three independent streams
        self.env = envs.make(
            cfg.env, cfg.num_envs, cfg.device, env_seed, cfg.env_args, cfg.env_timeout
        )
        if cfg.compile and isinstance(self.env, envs.Batched):
            self.env.step = torch.compile(self.env.step)
        self.device = self.env.device
        torch.manual_seed(cfg.seed)
        self.team = Team(self.env, cfg).to(self.device)
        # .to: cuDNN wants a GRU's weights in one piece of memory, and a copy has them in several
        self.target_team = copy.deepcopy(self.team).to(self.device).requires_grad_(False)
        self.optimizer = make_optimizer(self.team, cfg)
        self.replay = Replay(self.env, cfg.buffer_size, self.device)
        self.generators = {
            "explore": torch.Generator(self.device).manual_seed(explore_seed),
            "sample": torch.Generator().manual_seed(sample_seed),
        }
        if hasattr(self.env, "generator"):  # kept here to be saved with the others
            self.generators["env"] = self.env.generator
        self.counts = {"env_steps": 0, "episodes": 0, "updates": 0}
        self.returns = []  # of the episodes since the last evaluation
        self.stats = []  # STATS of the updates since the last evaluation
        self.began = time.perf_counter()

    def epsilon(self, draws: Tensor) -> Tensor:
        """The chance of a random action: linear from epsilon_start to epsilon_finish.

        With epsilon_spread each agent's epsilon stops falling at a floor, drawn for each episode,
        log-uniform from finish to spread: finish * (spread / finish) ** draw.
        draws: uniform in [0, 1), of any shape; the result has this shape.
        """
        start = self.cfg.epsilon_start
        finish = self.cfg.epsilon_finish
        progress = min(1.0, self.counts["env_steps"] / self.cfg.epsilon_anneal_steps)
        epsilon = torch.full_like(draws, start + progress * (finish - start))
        if self.cfg.epsilon_spread > 0:
            epsilon = epsilon.maximum(finish * (self.cfg.epsilon_spread / finish) ** draws)
        return epsilon

    def policy(self, epsilon: Tensor | None = None):
        """A `choose` for `rollout`: the agents that learn. epsilon (B, N), None: greedy."""

        def choose(step, memory):
            generator = self.generators["explore"]
            return act(self.team.agent, step.obs, step.avail, memory, epsilon, generator)

        return choose

    def play(self) -> None:
        """One round: each environment plays an episode into the replay (departure 3).

        Epsilon stays the same during a round.
        """
        shape = (self.env.n_envs, self.env.n_agents)
        draws = torch.rand(shape, generator=self.generators["explore"], device=self.device)
        episodes, facts = rollout(self.env, self.policy(self.epsilon(draws)))
        self.replay.add(episodes)
        self.counts["env_steps"] += int(facts["length"].sum())
        self.counts["episodes"] += len(facts["length"])
        self.returns += facts["return"].tolist()

    def updates_due(self) -> int:
        """The first is due when the replay holds a batch, then one per `episodes_per_update`."""
        if len(self.replay) < self.cfg.batch_size:
            return 0
        episodes = self.counts["episodes"] - self.cfg.batch_size  # since the first was due
        due_in_all = 1 + int(episodes / self.cfg.episodes_per_update)  # since the run began
        return due_in_all - self.counts["updates"]

    def learning_rate(self) -> float:
        """Constant, or, with lr_anneal, falling to a tenth over the second half of the run."""
        if not self.cfg.lr_anneal:
            return self.cfg.lr
        late = 2 * self.counts["env_steps"] / self.cfg.total_steps - 1  # 0 .. 1 in the second half
        return self.cfg.lr * (1 - 0.9 * min(max(late, 0.0), 1.0))

    def update_target(self) -> None:
        """With target_tau a small step per update, else a copy per target_update_episodes.

        Episodes are counted here as updates * episodes_per_update.
        """
        tau = self.cfg.target_tau
        if tau == 0:
            every = self.cfg.target_update_episodes
            now = self.counts["updates"] * self.cfg.episodes_per_update
            before = (self.counts["updates"] - 1) * self.cfg.episodes_per_update
            if now // every == before // every:
                return  # this update has passed no multiple of `every`
            tau = 1.0  # a copy
        for target, live in zip(self.target_team.parameters(), self.team.parameters()):
            target.lerp_(live.detach(), tau)

    def learn(self) -> None:
        """The updates that are due. Raises TrainingFailed if one of the STATS is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        stats = []
        for _ in range(self.updates_due()):
            batch = self.replay.sample(self.cfg.batch_size, self.generators["sample"])
            numbers = gradient_step(self.team, self.target_team, self.optimizer, batch, self.cfg)
            stats.append(numbers)
            self.counts["updates"] += 1
            self.update_target()
        if stats:
            self.stats += torch.stack(stats).tolist()  # waits for the device
        if not np.isfinite(self.stats).all():
            raise TrainingFailed(f"loss or gradient not finite at update {self.counts['updates']}")

    def finished(self) -> bool:
        return self.counts["env_steps"] >= self.cfg.total_steps


def loop(run: Run, between_rounds) -> None:
    """The training. `between_rounds()` may evaluate, log and save; learning does not need it."""
    between_rounds()
    while not run.finished():
        run.play()
        run.learn()
        between_rounds()


# ===========================================================================================
# That was QMIX. From here on: evaluation, metrics, checkpoints, the command line.
COLUMNS = (  # of metrics.csv
    "env_steps episodes updates seconds epsilon train_return test_return test_return_std "
    "test_win_rate loss grad_norm q_taken target dead_allies dead_enemies voided"
).split()


def greedy_episodes(env, choose, n: int) -> dict:
    """Play at least n episodes by the policy `choose`; the means over the first n of them."""
    rounds = []
    played = 0
    while played < n:
        _, facts = rollout(env, choose)
        rounds.append(facts)
        played += len(facts["length"])
    facts = {}
    for name in rounds[0]:
        if all(name in each for each in rounds):  # a fact that some round lacks is left out
            facts[name] = torch.cat([each[name].float() for each in rounds])[:n]
    means = {name: values.mean().item() for name, values in facts.items()}
    return {
        "test_return": means["return"],
        "test_return_std": facts["return"].std(correction=0).item(),
        "test_win_rate": means.get("battle_won"),
        "dead_allies": means.get("dead_allies"),
        "dead_enemies": means.get("dead_enemies"),
        "mean_length": means["length"],  # no column of metrics.csv; --evaluate prints it
    }


def measure(run: Run) -> dict:
    """A row for metrics.csv. `returns` and `stats`, collected since the row before, are emptied.

    Training goes on as if there had been no evaluation: the generators are put back. Only those
    inside worker processes cannot be.
    """
    before = {name: generator.get_state() for name, generator in run.generators.items()}
    row = {
        **greedy_episodes(run.env, run.policy(), run.cfg.test_episodes),
        **run.counts,
        "seconds": time.perf_counter() - run.began,
        "voided": getattr(run.env, "voided", 0),
        "epsilon": run.epsilon(torch.linspace(0, 1, 101)).mean().item(),  # mean over all draws
    }
    for name, generator in run.generators.items():
        generator.set_state(before[name])
    if run.returns:
        row["train_return"] = float(np.mean(run.returns))
    if run.stats:
        row.update(zip(STATS, np.mean(run.stats, axis=0).tolist()))
    run.returns = []
    run.stats = []
    return {name: row.get(name) for name in COLUMNS}


# ------------------------------------------------------------------------------- checkpoints
@contextlib.contextmanager
def checkpoint_errors(path: str | Path):
    """Whatever goes wrong inside with a damaged or foreign file becomes a UsageError."""
    try:
        yield
    except Exception as error:  # torch and pickle raise nearly anything
        message = f"{path} is not a checkpoint that can be used here: {error}"
        raise envs.UsageError(message) from None


def policy_state(run: Run) -> dict:
    """What acting needs, and the mixer. Written to a file, `load` makes a Policy of it."""
    names = "obs_dim n_actions n_agents".split()
    return {
        "config": dataclasses.asdict(run.cfg),
        "sizes": {name: getattr(run.env, name) for name in names},
        "team": run.team.state_dict(),
    }


def run_state(run: Run) -> dict:
    """All that a run needs to go on as if it had never stopped."""
    n = len(run.replay)
    T = int(run.replay.data["filled"][:n].any(0).sum())  # steps of the longest episode
    # A copy, because saving a part of a tensor would save the whole of it
    replay = {k: v[:n, : T + 1].to("cpu", copy=True) for k, v in run.replay.data.items()}
    return {
        **policy_state(run),
        "target_team": run.target_team.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "replay": replay,
        "replay_added": run.replay.added,
        "generators": {name: g.get_state() for name, g in run.generators.items()},
        "counts": run.counts,
        "returns": run.returns,
        "stats": run.stats,
        "seconds": time.perf_counter() - run.began,
    }


def restore(run: Run, state: dict) -> None:
    """Load into a new run what `read_checkpoint` has read. Raises ValueError, KeyError ... if it
    does not fit.
    """
    for name in ("env", "algo", "optimizer", "buffer_size", "episodes_per_update"):
        if getattr(run.cfg, name) != getattr(state["config"], name):
            raise ValueError(f"the saved run has another {name}")
    run.team.load_state_dict(state["team"])
    run.target_team.load_state_dict(state["target_team"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.replay.added = state["replay_added"]
    for name, saved in state["replay"].items():
        run.replay.data[name][: len(run.replay), : saved.shape[1]] = saved
    for name, generator in run.generators.items():
        saved = state["generators"][name]
        if len(saved) == len(generator.get_state()):  # a GPU's state does not fit a CPU
            generator.set_state(saved)
    for name in ("counts", "returns", "stats"):
        setattr(run, name, state[name])
    run.began -= state["seconds"]


def write_checkpoint(path: Path, state: dict) -> None:
    """Write it whole or not at all: a kill leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def read_checkpoint(path: str | Path) -> dict:
    """Reads a file, or a run directory's last checkpoint; its config becomes a Config.

    weights_only: a file cannot run code.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    with checkpoint_errors(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"] = Config(**state["config"])
        return state


class RunFolder:
    """A run directory: config.json, metrics.csv, TensorBoard's events, checkpoint.pt, best.pt."""

    def __init__(self, path: Path, run: Run, rows: list[dict]):
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.path = path
        self.run = run
        self.rows = rows  # of metrics.csv
        try:
            path.mkdir(parents=True, exist_ok=True)
            config = json.dumps(dataclasses.asdict(run.cfg), indent=2)
            (path / "config.json").write_text(config)
        except OSError as error:
            raise envs.UsageError(f"--out cannot be used: {error}") from None
        start = run.counts["env_steps"]
        self.board = SummaryWriter(path, purge_step=start)
        # None: no bar where there is no terminal
        self.bar = tqdm(initial=start, total=run.cfg.total_steps, disable=None)
        self.checkpoint()  # now, to see that it can be written

    def close(self):
        self.board.close()
        self.bar.close()

    def between_rounds(self):
        if self.test_due():
            self.report(measure(self.run))
        if self.run.finished() or time.perf_counter() > self.checkpoint_due:
            self.checkpoint()
        self.bar.update(self.run.counts["env_steps"] - self.bar.n)

    def test_due(self) -> bool:
        """At the start, when a multiple of test_interval_steps is passed, and at the end."""
        if not self.rows:
            return True
        now = self.run.counts["env_steps"]
        last = self.rows[-1]["env_steps"]
        interval = self.run.cfg.test_interval_steps
        return now // interval > last // interval or (self.run.finished() and now > last)

    def report(self, row: dict):
        """Write and show a row; keep the weights if they are the best so far."""
        best = max((each["test_return"] for each in self.rows), default=-math.inf)
        if row["test_return"] > best:
            write_checkpoint(self.path / "best.pt", policy_state(self.run))
        self.rows.append(row)
        temporary = self.path / "metrics.tmp"  # whole or not at all
        with open(temporary, "w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)
        os.replace(temporary, self.path / "metrics.csv")
        for name, value in row.items():
            if value is not None:
                self.board.add_scalar(name, value, row["env_steps"])
        text = f"return {row['test_return']:.2f}"
        if row["test_win_rate"] is not None:
            text += f", wins {row['test_win_rate']:.0%}"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"{row['env_steps']:>9} steps, {row['seconds']:.0f} s: {text}", flush=True)

    def checkpoint(self):
        """Write it. The next is due in checkpoint_seconds, or in 30 times what this one takes if
        that is longer: saving takes a thirtieth of the time at most.
        """
        start = time.perf_counter()
        state = run_state(self.run)
        state["rows"] = self.rows
        write_checkpoint(self.path / "checkpoint.pt", state)
        now = time.perf_counter()
        self.checkpoint_due = now + max(self.run.cfg.checkpoint_seconds, 30 * (now - start))


def train(cfg: Config, resume: bool = False, run_class=Run) -> dict:
    """Train in the directory cfg.out; resume: go on with the run that is there.

    On the same kind of device a resumed run writes the same numbers as one that never stopped, but
    not with environments in worker processes: these play other episodes. run_class: a subclass of
    Run. Returns the facts of the result line. Raises UsageError, TrainingFailed or
    envs.EnvFailure.
    """
    name = f"{cfg.env}-{cfg.algo}-{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    path = Path(cfg.out or "runs/" + name.replace(":", "-"))
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)
    rows = []
    env_steps = 0
    if resume:
        state = read_checkpoint(path)
        with checkpoint_errors(path):
            rows = state["rows"]
            env_steps = state["counts"]["env_steps"]
    elif (path / "checkpoint.pt").exists():
        raise envs.UsageError(f"{path} holds a run: continue it with --resume, or choose another")
    run = run_class(cfg, env_steps)
    with contextlib.closing(run.env):
        if resume:
            with checkpoint_errors(path):
                restore(run, state)
                del state  # its replay takes as much memory as the run's
        with contextlib.closing(RunFolder(path, run, rows)) as folder:
            loop(run, folder.between_rounds)
    last = folder.rows[-1]
    return {
        "env": cfg.env,
        "algo": cfg.algo,
        "seed": cfg.seed,
        **run.counts,
        "seconds": last["seconds"],
        "test_return": last["test_return"],
        "test_win_rate": last["test_win_rate"],
        "best_test_return": max(row["test_return"] for row in folder.rows),
        "best_known": getattr(run.env, "best_return", None),
        "out": str(path),
    }


# ---------------------------------------------------------------- using what has been learned
class Policy:
    """The trained decentralised policy: the agents' network alone, on the CPU."""

    def __init__(self, state: dict):
        self.config = state["config"]
        self.agent = Agent(**state["sizes"], hidden_dim=self.config.hidden_dim)
        names = self.agent.state_dict()
        self.agent.load_state_dict({name: state["team"][f"agent.{name}"] for name in names})

    def act(self, obs, avail, memory=None, agents=None):
        """Greedy actions of one team, obs (N, O) and avail (N, A), or of B teams (B, N, .).

        memory: what the step before returned, None at the start of an episode. agents: their ids,
        such as [2] for agent 2 alone, None: all. Returns actions (N,) or (B, N), memory.
        Raises UsageError for other shapes, for NaN, and for an agent without an action.
        """
        obs = torch.as_tensor(np.asarray(obs, np.float32))
        avail = torch.as_tensor(np.asarray(avail, bool))
        ids = range(self.agent.n_agents) if agents is None else agents
        expected = (len(ids), self.agent.obs_dim)
        if obs.shape[-2:] != expected:
            text = f"obs must be (.., {len(ids)}, {self.agent.obs_dim}), not {tuple(obs.shape)}"
            raise envs.UsageError(text)
        teams = obs.reshape(-1, *expected)  # (B, N, O)
        expected = (*obs.shape[:-1], self.agent.n_actions)
        if avail.shape != expected:
            raise envs.UsageError(f"avail must be {expected}, not {tuple(avail.shape)}")
        if not (obs.isfinite().all() and avail.any(-1).all()):
            raise envs.UsageError("obs must be finite, and avail must leave each agent an action")
        masks = avail.reshape(-1, *avail.shape[-2:])  # (B, N, A)
        actions, memory = act(self.agent, teams, masks, memory, agents=agents)
        return actions.view(avail.shape[:-1]), memory


def load(path: str | Path) -> Policy:
    """The policy of a run directory (its last checkpoint) or of a file such as best.pt."""
    state = read_checkpoint(path)
    with checkpoint_errors(path):
        return Policy(state)


def evaluate(path: str, cfg: Config, episodes: int = 32, record: str = "") -> dict:
    """Greedy episodes of the decentralised policy in `path`, on the environment of cfg.

    record: draw an episode into this .gif; for smac: keep StarCraft's replays in this folder.
    """
    if episodes < 1:
        raise envs.UsageError(f"--episodes must be at least 1, not {episodes}")
    policy = load(path)

    def choose(step, memory):
        return policy.act(step.obs, step.avail, memory)

    arguments = cfg.env_args
    if record and cfg.env.startswith("smac:"):
        arguments += (f"replay_dir={record}",)
        record = ""
    n = min(episodes, cfg.num_envs)
    env = envs.make(cfg.env, n, "cpu", cfg.seed, arguments, cfg.env_timeout)
    with contextlib.closing(env):
        if record:
            envs.record(env, choose, record)
        found = greedy_episodes(env, choose, episodes)
    return {
        "env": cfg.env,
        "algo": policy.config.algo,
        "episodes": episodes,
        **found,
        "out": str(path),
    }


# ------------------------------------------------------------------------------ command line
@dataclasses.dataclass
class Command:
    """QMIX, VDN, IQL and the paper's ablations. Trains, unless --evaluate is given."""

    config: Config
    resume: str = ""  # run directory to go on with
    evaluate: str = ""  # run directory or checkpoint to play greedily
    episodes: int = 32  # of --evaluate
    record: str = ""  # with --evaluate: draw one episode into this .gif (smac: replays, a folder)


def parse(arguments: list[str]) -> Command:
    """The settings of the saved run, or the environment's preset, changed by the flags."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--env", "--resume", "--evaluate"):
        first.add_argument(flag)
    known, _ = first.parse_known_args(arguments)  # these decide the defaults of all others
    saved = known.resume or known.evaluate
    if saved:
        config = read_checkpoint(saved)["config"]
        config.out = saved
        if known.env and known.env != config.env:
            config.env_args = ()  # they were for the other one
    else:
        config = configure(known.env or "checkers")
    how = (tyro.conf.OmitArgPrefixes,)  # --lr, not --config.lr
    return tyro.cli(Command, args=arguments, default=Command(config), config=how)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, 2 for bad input, 1 where a run failed, 130 for Ctrl-C."""
    try:
        command = parse(arguments)
        if command.evaluate:
            result = evaluate(command.evaluate, command.config, command.episodes, command.record)
        elif command.record:
            raise envs.UsageError("--record goes with --evaluate")
        else:
            result = train(command.config, resume=bool(command.resume))
        print("result: " + json.dumps(result))
        return 0
    except (envs.UsageError, TrainingFailed, envs.EnvFailure) as error:
        print(f"error: {envs.one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, envs.UsageError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
