"""COMA, counterfactual multi-agent policy gradients (Foerster et al., AAAI 2018, arXiv 1705.08926).

Each agent draws its actions from a policy, which sees the agent's own history alone. A critic sees
the true state and what all agents do. It tells each agent how much better its action was than what
the agent does on average, while the others do what they did (Eq. 4).

    python -m extras.coma --env skirmish:3m --seed 1 --out runs/coma    # wins 97 % at the end
    python -m extras.coma --resume runs/coma

It also shows how to build an algorithm of your own on qmix.py. From there come the agents' network
(its q are logits here), rollout, td_targets, greedy evaluation, checkpoints and the run directory.
Here are the policy, the critic, their two losses and a round.

Axes      as in qmix.py: B episodes, T steps, N agents, A actions, in the order (B, T, N, feature).
Names     `actions` is the paper's u, `others` its u^-a. In metrics.csv updates, loss, grad_norm,
          q_taken and target are the critic's; test_return is that of each agent's likeliest action.

Departures from the paper. The authors' code (PyMARL) has 1 and 2 as well:
  1. 8 episodes a round (paper: 30), 64 GRU units (128), a target critic copied every 200 steps of
     the critic (150), epsilon from 0.5 to 0.01 over 100,000 environment steps (0.02 after 750
     episodes), gradients clipped at a norm of 10
  2. the softmax is over all actions; then those that are not available get 0, the rest sums to 1
  3. after a time limit the target goes on with the critic's value of one more action, which is
     drawn from the policy but never played
"""

import contextlib
import copy
import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import envs
import qmix

qmix.MIXERS["coma"] = qmix.IQL  # nothing is mixed: the critic takes the mixer's place


@dataclasses.dataclass
class Config(qmix.Config):
    """Every number of a run. "(authors)": PyMARL's. Below are COMA's own defaults and fields.

    COMA does not use lr_anneal, reward_scale, batch_size, buffer_size, episodes_per_update,
    target_update_episodes, target_tau, epsilon_spread, double_q, mixing_dim and hypernet_dim.
    """

    env: str = "skirmish:3m"  # as in qmix.py
    algo: str = "coma"
    total_steps: int = 300_000  # environment steps, summed over the environments
    threads: int = 1  # CPU threads; 0 leaves torch's number as it is
    td_lambda: float = 0.8  # of the critic's targets (authors)
    epsilon_start: float = 0.5  # share of the uniform distribution in the policy (authors)
    epsilon_finish: float = 0.01  # the same after epsilon_anneal_steps (authors); above 0
    epsilon_anneal_steps: int = 100_000  # steps over which epsilon falls linearly (authors)
    test_interval_steps: int = 20_000  # steps between greedy evaluations
    test_episodes: int = 64  # episodes per evaluation
    critic_dim: int = 128  # units of each of the critic's two hidden layers (authors)
    target_update_steps: int = 200  # steps of the critic between copies to its target (authors)

    def __post_init__(self):
        """Checks everything. Raises UsageError: the flag, what was expected and what came."""
        self.batch_size = 1
        self.buffer_size = 10**12
        self.epsilon_spread = 0.0
        super().__post_init__()
        self.buffer_size = self.num_envs  # the replay stays empty, so it may be small
        self.check_choice("algo", ["coma"])
        self.check("epsilon_finish", 1e-9, 1.0)
        self.check("critic_dim", 1, 10**12)
        self.check("target_update_steps", 1, 10**12)


# ------------------------------------------------------------------------ the policy, the critic
def policy(logits: Tensor, avail: Tensor, epsilon: float) -> Tensor:
    """pi(u | history), (..., A): a softmax, mixed with the uniform distribution (section 5)."""
    pi = (1 - epsilon) * logits.softmax(-1) + epsilon / logits.shape[-1]
    pi = pi * avail  # departure 2
    return pi / pi.sum(-1, keepdim=True)


def draw(pi: Tensor, generator: torch.Generator) -> Tensor:
    """An action from each distribution: pi (..., A) -> (...) int64."""
    actions = torch.multinomial(pi.flatten(0, -2), 1, generator=generator)
    return actions.view(pi.shape[:-1])


def make_critic(env, critic_dim: int) -> nn.Module:
    """From `critic_inputs` to Q(s, (u^-a, .)), one value for each action of agent a (section 4)."""
    n_inputs = env.state_dim + env.obs_dim + 2 * env.n_agents * env.n_actions + env.n_agents
    return nn.Sequential(
        nn.Linear(n_inputs, critic_dim),
        nn.ReLU(),
        nn.Linear(critic_dim, critic_dim),
        nn.ReLU(),
        nn.Linear(critic_dim, env.n_actions),
    )


def critic_inputs(
    state: Tensor, obs: Tensor, actions: Tensor, last_actions: Tensor, n_actions: int
) -> Tensor:
    """What the critic sees when it values agent a's actions: all but the action that a takes.

    state (B, T, S), obs (B, T, N, O), actions (B, T, N), last_actions (B, T, N), -1 where there is
    none yet. Returns (B, T, N, inputs).
    """
    B, T, N, _ = obs.shape
    last = F.one_hot(last_actions + 1, n_actions + 1)[..., 1:]  # (B, T, N, A), zeros for -1
    team = torch.cat([state, last.flatten(2)], dim=-1)  # (B, T, S+N*A), the same for every agent
    ids = torch.eye(N, device=obs.device)
    not_own = (1 - ids).unsqueeze(-1)  # (N, N, 1)
    others = F.one_hot(actions, n_actions).unsqueeze(2) * not_own  # (B, T, N, N, A): u^-a
    return torch.cat(
        [team.unsqueeze(2).expand(B, T, N, -1), obs, others.flatten(3), ids.expand(B, T, N, N)],
        dim=-1,
    )


# ------------------------------------------------------------------------------ the two losses
def take(values: Tensor, actions: Tensor) -> Tensor:
    """The values (..., A) of the actions (...)."""
    return values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def critic_targets(
    q: Tensor, actions: Tensor, batch: dict[str, Tensor], gamma: float, td_lambda: float
) -> Tensor:
    """y^(lambda), (B, T, N): the paper's mean of n-step returns, as td_targets' recursion.

    q (B, T+1, N, A) is the target critic's; actions (B, T+1, N) end with one that was never played.
    """
    reward = batch["reward"].unsqueeze(-1)  # (B, T, 1)
    terminated = batch["terminated"].to(q.dtype).unsqueeze(-1)  # (B, T, 1)
    filled = batch["filled"].to(q.dtype).unsqueeze(-1)  # (B, T, 1)
    q_next = take(q, actions)[:, 1:]  # (B, T, N)
    return qmix.td_targets(reward, terminated, filled, q_next, gamma, td_lambda)


def actor_loss(pi: Tensor, q: Tensor, actions: Tensor, filled: Tensor) -> Tensor:
    """-mean(A * log pi) over agents and the steps that happened; its gradient is Eq. 5, times -1.

    pi and q (B, T, N, A), actions (B, T, N), filled (B, T) bool.
    """
    pi = pi[filled]  # (steps, N, A)
    q = q[filled]
    actions = actions[filled]  # (steps, N)
    baseline = (pi * q).sum(-1)  # what the agent does on average
    advantage = take(q, actions) - baseline  # Eq. 4
    return -(advantage.detach() * take(pi, actions).log()).mean()


# --------------------------------------------------------------------------------- the training
class COMA(qmix.Run):
    """Run's environment, random numbers, counts and greedy policy; the team is actor and critic."""

    def __init__(self, cfg: Config, resumed_at: int = 0):
        super().__init__(cfg, resumed_at)
        self.team.critic = make_critic(self.env, cfg.critic_dim).to(self.device)
        self.target_team = copy.deepcopy(self.team).requires_grad_(False)  # of it: the critic alone
        self.optimizer = qmix.make_optimizer(self.team, cfg)

    def play(self) -> None:
        """One round: each environment plays an episode by the present policy."""
        epsilon = self.epsilon(torch.zeros(())).item()

        def choose(step, memory):  # as qmix.act, but the action is drawn
            if memory is None:
                hidden = None
                last_actions = torch.full(step.avail.shape[:2], -1, device=self.device)
            else:
                hidden, last_actions = memory
            obs = step.obs.unsqueeze(1)  # T = 1
            logits, hidden = self.team.agent(obs, last_actions.unsqueeze(1), hidden)
            pi = policy(logits.squeeze(1), step.avail, epsilon)  # (B, N, A)
            actions = draw(pi, self.generators["explore"])
            return actions, (hidden, actions)

        self.batch, facts = qmix.rollout(self.env, choose)
        self.epsilon_played = epsilon  # `learn` needs the same pi; the steps below change epsilon
        self.counts["env_steps"] += int(facts["length"].sum())
        self.counts["episodes"] += len(facts["length"])
        self.returns += facts["return"].tolist()

    def learn(self) -> None:
        """Algorithm 1, on the round's episodes, once: first the critic, then the actor."""
        batch = self.batch
        if not batch["filled"].any():
            return  # all episodes were void
        last_actions = F.pad(batch["actions"], (0, 0, 1, 0), value=-1)  # (B, T+1, N)
        lengths = [last_actions.shape[1]] * len(last_actions)  # all T+1 rows, also the padding
        logits = qmix.unroll(self.team.agent, batch["obs"], last_actions, lengths)
        pi = policy(logits, batch["avail"], self.epsilon_played)
        never_played = draw(pi[:, -1:].detach(), self.generators["explore"])  # departure 3
        actions = torch.cat([batch["actions"], never_played], dim=1)  # (B, T+1, N)
        n_actions = self.env.n_actions
        inputs = critic_inputs(batch["state"], batch["obs"], actions, last_actions, n_actions)
        self.learn_critic(inputs, actions)
        q = self.team.critic(inputs[:, :-1])  # (B, T, N, A)
        loss = actor_loss(pi[:, :-1], q, batch["actions"], batch["filled"])
        self.descend(loss, self.team.agent)

    def learn_critic(self, inputs: Tensor, actions: Tensor) -> None:
        """Eq. 2: a gradient step for each time step, from the last to the first."""
        cfg = self.cfg
        critic = self.team.critic
        q_target = self.target_team.critic(inputs)  # (B, T+1, N, A)
        targets = critic_targets(q_target, actions, self.batch, cfg.gamma, cfg.td_lambda)
        for t in reversed(range(targets.shape[1])):
            running = self.batch["filled"][:, t]  # (B,): the episodes that are not over
            if not running.any():
                continue  # the longest episode was a void one
            q_taken = take(critic(inputs[running, t]), actions[running, t])  # (running, N)
            target = targets[running, t]
            loss = (q_taken - target).square().mean()
            grad_norm = self.descend(loss, critic)
            numbers = [loss, grad_norm, q_taken.mean(), target.mean()]  # qmix.STATS
            self.stats.append(torch.stack(numbers).tolist())
            self.counts["updates"] += 1
            if self.counts["updates"] % cfg.target_update_steps == 0:
                self.target_team.load_state_dict(self.team.state_dict())

    def descend(self, loss: Tensor, network: nn.Module) -> Tensor:
        """A step of the actor or of the critic. Returns the norm of its gradient."""
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(network.parameters(), self.cfg.grad_clip)
        if not grad_norm.isfinite():
            raise qmix.TrainingFailed("the gradient is not finite; the last checkpoint is kept")
        self.optimizer.step()  # subtle: the other network has no gradient, so it stays as it is
        return grad_norm


# --------------------------------------------------------------------------------- command line
def read_checkpoint(folder: str) -> dict:
    path = Path(folder) / "checkpoint.pt"
    with qmix.checkpoint_errors(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"] = Config(**state["config"])
        return state


def train(cfg: Config, resume: bool = False) -> dict:
    """As qmix.train."""
    if not resume:
        return qmix.train(cfg, run_class=COMA)
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)
    state = read_checkpoint(cfg.out)
    run = COMA(cfg, state["counts"]["env_steps"])
    with contextlib.closing(run.env):
        with qmix.checkpoint_errors(cfg.out):
            qmix.restore(run, state)
        with contextlib.closing(qmix.RunFolder(Path(cfg.out), run, state["rows"])) as folder:
            qmix.loop(run, folder.between_rounds)
    best = max(row["test_return"] for row in folder.rows)
    return {"env": cfg.env, "algo": "coma", **folder.rows[-1], "best_test_return": best}


@dataclasses.dataclass
class Command:
    """COMA on the environments of qmix.py."""

    config: Config
    resume: str = ""  # run directory to go on with


def parse(arguments: list[str]) -> Command:
    """COMA's defaults, or the settings of the saved run, changed by the flags."""
    import tyro

    how = (tyro.conf.OmitArgPrefixes,)  # --lr, not --config.lr
    command = tyro.cli(Command, args=arguments, default=Command(Config()), config=how)
    if command.resume:
        saved = read_checkpoint(command.resume)["config"]
        saved.out = command.resume
        command = tyro.cli(Command, args=arguments, default=Command(saved), config=how)
    return command


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, 2 for bad input, 1 where a run failed, 130 for Ctrl-C."""
    try:
        command = parse(arguments)
        result = train(command.config, resume=bool(command.resume))
        print("result: " + json.dumps(result), flush=True)
        return 0
    except (envs.UsageError, qmix.TrainingFailed, envs.EnvFailure) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)  # one line
        return 2 if isinstance(error, envs.UsageError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
