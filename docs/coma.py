"""COMA (Foerster et al., AAAI 2018, arXiv 1705.08926), and how to build an algorithm of one's own on qmix.py's pieces.

Each agent acts by a policy of its own history. A critic that sees the whole state values what the team did, and tells
each agent how much better its action was than what it does on average while the others do what they did (Eq. 4).

    python docs/coma.py --env skirmish:3m --seed 1 --out runs/coma               # wins 97 % in the end
    python docs/coma.py --env skirmish:3m --seed 1 --out runs/coma --resume      # goes on, exactly where it stopped

From qmix.py: the agent's network (its q are logits here), environments, rollout, the recursion of the targets, greedy
evaluation, counters, checkpoints, run directory. Here: policy, critic, the two losses, the loop. One process.

Axes: B episodes, T steps, N agents, A actions, in this order. The paper's action u is `actions`, its u^-a `others`. In
metrics.csv updates, loss, grad_norm, q_taken and target are the critic's; test_* come from the argmax of pi.

Departures from the paper; 1 and 2 are the authors' code (PyMARL):
  1. 8 episodes a round (paper: 30), 64 GRU units (128), target critic every 200 of the critic's steps (150), epsilon
     from 0.5 to 0.01 over 100,000 steps (0.02, 750 episodes), gradients clipped at a norm of 10
  2. the softmax is over all logits; then unavailable actions are zeroed and the rest is renormalised
  3. after a time limit the target goes on with the value of one more action, drawn from the policy but never played
"""

import contextlib
import copy
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qmix  # noqa: E402


@dataclasses.dataclass
class Config:
    """Every number of a run; "(authors)": PyMARL's."""

    env: str = "skirmish:3m"  # as in qmix.py
    env_args: tuple[str, ...] = ()  # key=value ...: arguments of a smac, ma_gym or own environment
    algo: Literal["coma"] = "coma"
    seed: int = 1
    total_steps: int = 300_000  # environment steps, summed over the environments
    num_envs: int = 8  # environments that play side by side: the episodes of a round (authors)
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads; 0: as many as torch takes by itself
    compile: bool = False  # torch.compile the step of a built-in environment
    out: str = ""  # run directory; empty: a new one under runs/
    gamma: float = 0.99  # discount per step (authors)
    td_lambda: float = 0.8  # of the critic's targets (authors)
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # alpha 0.99, eps 1e-5 (authors)
    lr: float = 5e-4  # learning rate of actor and critic (authors)
    grad_clip: float = 10.0  # largest norm of the gradient of each (authors)
    target_update_steps: int = 200  # steps of the critic between copies into its target (authors)
    epsilon_start: float = 0.5  # share of the uniform distribution in the policy (authors)
    epsilon_finish: float = 0.01  # the same after epsilon_anneal_steps environment steps; above 0 (authors)
    epsilon_anneal_steps: int = 100_000  # (authors)
    hidden_dim: int = 64  # GRU units of the actor (authors)
    critic_dim: int = 128  # units of each of the critic's two hidden layers (authors)
    test_interval_steps: int = 20_000  # environment steps between greedy evaluations
    test_episodes: int = 64  # episodes per evaluation
    env_timeout, checkpoint_seconds, epsilon_spread, episodes_per_update = 120.0, 5.0, 0.0, 1.0  # qmix.py's, not ours

    def __post_init__(self):
        """Raises UsageError: qmix.Config checks all that it has too, and makes NumPy's numbers plain ones."""
        shared = vars(self).keys() & vars(qmix.Config()).keys() - {"algo"}
        more = dict(epsilon_spread=1.0, buffer_size=10**12)  # epsilon_finish above 0; any number of environments
        checked = qmix.Config(**{name: getattr(self, name) for name in shared}, **more)
        vars(self).update({name: getattr(checked, name) for name in shared})
        if min(self.target_update_steps, self.critic_dim) < 1:
            raise qmix.UsageError("--target-update-steps and --critic-dim must be at least 1")

def policy(logits: Tensor, avail: Tensor, epsilon: float) -> Tensor:
    """pi(u | history), (..., A): softmax, mixed with epsilon / |U| (section 5) and masked (departure 2)."""
    pi = ((1 - epsilon) * logits.softmax(-1) + epsilon / logits.shape[-1]) * avail
    return pi / pi.sum(-1, keepdim=True)

def draw(pi: Tensor, generator: torch.Generator) -> Tensor:
    """One action from each distribution: pi (..., A) -> (...) int64."""
    return torch.multinomial(pi.flatten(0, -2), 1, generator=generator).view(pi.shape[:-1])

def make_critic(env, units: int) -> nn.Module:
    """From critic_inputs to Q(s, (u^-a, .)), all actions of agent a in one pass (section 4); shared by all agents."""
    N, A = env.n_agents, env.n_actions
    return nn.Sequential(nn.Linear(env.state_dim + N * A + env.obs_dim + N * A + N, units), nn.ReLU(),
                         nn.Linear(units, units), nn.ReLU(), nn.Linear(units, A))

def critic_inputs(state: Tensor, obs: Tensor, actions: Tensor, last_actions: Tensor, n_actions: int) -> Tensor:
    """state (B, T, S), obs (B, T, N, O), actions (B, T, N), last_actions (B, T, N), -1: none -> (B, T, N, inputs)."""
    B, T, N, _ = obs.shape
    now, last = (F.one_hot(u + 1, n_actions + 1)[..., 1:] for u in (actions, last_actions))  # (B, T, N, A) each
    ids = torch.eye(N, device=obs.device)
    others = now.unsqueeze(2) * (1 - ids).unsqueeze(-1)  # (B, T, N, N, A): agent a's row has zeros for a's own action
    team = torch.cat([state, last.flatten(2)], dim=-1).unsqueeze(2).expand(-1, -1, N, -1)  # the same for every agent
    return torch.cat([team, obs, others.flatten(3), ids.expand(B, T, N, N)], dim=-1)

def take(values: Tensor, actions: Tensor) -> Tensor:
    return values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (..., A) at the actions (...) -> (...)

def critic_targets(q: Tensor, actions: Tensor, batch: dict[str, Tensor], gamma: float, td_lambda: float) -> Tensor:
    """y^(lambda), (B, T, N): the paper's mean of n-step returns as r + gamma * ((1 - lambda) Q_{t+1} + lambda y_{t+1}).
    q (B, T+1, N, A) is the target critic's, actions (B, T+1, N) are those taken."""
    reward, terminated, filled = (batch[k].to(q.dtype).unsqueeze(-1) for k in ("reward", "terminated", "filled"))
    return qmix.td_targets(reward, terminated, filled, take(q, actions)[:, 1:], gamma, td_lambda)

def actor_loss(pi: Tensor, q: Tensor, actions: Tensor, filled: Tensor) -> Tensor:
    """-mean(A * log pi) over steps that happened and agents. pi, q (B, T, N, A), actions (B, T, N), filled (B, T)."""
    pi, q, actions = pi[filled], q[filled], actions[filled]  # (steps, N, .)
    advantage = take(q, actions) - (pi * q).sum(-1)  # Eq. 4: the baseline is what the agent does on average
    return -(advantage.detach() * take(pi, actions).log()).mean()  # Eq. 5 is its gradient, times -1

class COMA(qmix.Run):
    """Run's environment, generators, counters, greedy policy and exact resume; the team is an actor and a critic."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.team.critic = make_critic(self.env, cfg.critic_dim).to(self.device)
        self.target_team = copy.deepcopy(self.team).requires_grad_(False)  # only its critic is ever asked
        self.optimizer = qmix.make_optimizer(self.team, cfg)  # subtle: a network without gradient stays as it is

    def play(self) -> None:
        """One round: each environment plays an episode by the present policy."""
        epsilon, generator = self.epsilon(torch.zeros(())).item(), self.generators["explore"]

        def choose(step, memory):  # as qmix.act, with a draw from pi in place of the argmax
            hidden, last_actions = memory or (None, torch.full(step.avail.shape[:2], -1, device=self.device))
            logits, hidden = self.team.agent(step.obs.unsqueeze(1), last_actions.unsqueeze(1), hidden)  # T = 1
            actions = draw(policy(logits.squeeze(1), step.avail, epsilon), generator)  # (B, N)
            return actions, (hidden, actions)

        episodes, facts = qmix.rollout(self.env, choose)
        self.played = episodes, epsilon  # subtle: epsilon as it was for this pi, before the steps are counted
        self.counts["env_steps"] += int(facts["length"].sum())
        self.counts["episodes"] += len(facts["length"])
        self.returns += facts["return"].tolist()

    def learn(self) -> None:
        """Algorithm 1, on the round's episodes, once: the critic steps through time from the end, then the actor."""
        cfg, critic, (batch, epsilon) = self.cfg, self.team.critic, self.played
        filled, stats = batch["filled"], []  # (B, T)
        last_actions = F.pad(batch["actions"], (0, 0, 1, 0), value=-1)  # (B, T+1, N): none before the first step
        logits, _ = self.team.agent(batch["obs"], last_actions)  # (B, T+1, N, A)
        pi = policy(logits, batch["avail"], epsilon)
        never_played = draw(pi[:, -1:].detach(), self.generators["explore"])  # (B, 1, N); departure 3
        actions = torch.cat([batch["actions"], never_played], dim=1)  # (B, T+1, N)
        inputs = critic_inputs(batch["state"], batch["obs"], actions, last_actions, self.env.n_actions)
        target = critic_targets(self.target_team.critic(inputs), actions, batch, cfg.gamma, cfg.td_lambda)
        for t in reversed(range(int(filled.any(0).sum()))):  # subtle: the longest episode may have been a void one
            now = filled[:, t]  # (B,) the episodes that are not over
            q_taken, y = take(critic(inputs[now, t]), actions[now, t]), target[now, t]  # (episodes, N) each
            loss = (q_taken - y).square().mean()  # Eq. 2
            stats.append(torch.stack([loss, self.descend(loss, critic), q_taken.mean(), y.mean()]).detach())
            self.counts["updates"] += 1
            if self.counts["updates"] % cfg.target_update_steps == 0:
                self.target_team.load_state_dict(self.team.state_dict())
        if stats:  # else all episodes were void
            self.descend(actor_loss(pi[:, :-1], critic(inputs[:, :-1]), batch["actions"], filled), self.team.agent)
            self.stats += torch.stack(stats).tolist()

    def descend(self, loss: Tensor, network: nn.Module) -> Tensor:
        """One step of the actor or the critic, whose losses do not reach the other. Returns the gradient's norm."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.cfg.grad_clip)
        if not norm.isfinite():
            raise qmix.TrainingFailed("the gradient is not finite; the last checkpoint is kept")
        self.optimizer.step()
        return norm

def train(cfg: Config, resume: bool = False) -> dict:
    """COMA: train in the run directory cfg.out and return the facts of the result line. resume: go on with the run
    there, exactly where it stopped; its flags have to be given again (others: UsageError)."""
    run = COMA(cfg)
    with contextlib.ExitStack() as opened:
        opened.callback(run.env.close)
        folder = qmix.Folder(run, resume, opened)
        while True:
            if run.test_due():
                qmix.measure(run)
                folder.report()
            if run.finished() or time.perf_counter() > folder.due:
                folder.checkpoint()
            if run.finished():
                return folder.result()
            run.play()
            run.learn()

if __name__ == "__main__":
    try:
        print("result: " + json.dumps(tyro.cli(train, config=(tyro.conf.OmitArgPrefixes,))))
    except (qmix.UsageError, qmix.TrainingFailed, qmix.envs.EnvFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, qmix.UsageError) else 1)
