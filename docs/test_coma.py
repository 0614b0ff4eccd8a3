"""docs/coma.py: each test names the mistake it would catch and compares with something independent of the code."""

import csv
import functools
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

spec = importlib.util.spec_from_file_location("coma", Path(__file__).with_name("coma.py"))
coma = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coma)

def critic_values(actions, n_agents):
    """q (B, N, 3) of a critic for given actions (B, N) in one random situation, and what it was given for the first."""
    torch.manual_seed(0)
    critic = coma.make_critic(SimpleNamespace(n_agents=n_agents, n_actions=3, obs_dim=4, state_dim=5), units=16)
    state, obs, none = torch.randn(1, 1, 5), torch.randn(1, 1, n_agents, 4), torch.full((1, 1, n_agents), -1)
    inputs = torch.cat([coma.critic_inputs(state, obs, u[None, None], none, 3) for u in actions]).squeeze(1)
    return critic(inputs), inputs[0]

def test_coma_baseline_is_zero_in_expectation():
    """Catches: a baseline that is not pi's mean, an own action in the critic's input: over all joint actions, weighted
    by pi, no agent has an advantage on average (Lemma 1)."""
    joint = torch.tensor(list(itertools.product(range(3), (0, 2))))  # (6, N): agent 1 cannot do 1
    avail = torch.tensor([[True, True, True], [True, False, True]])
    pi, q = coma.policy(torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]]), avail, 0.2), critic_values(joint, 2)[0]
    advantage = torch.tensor([[coma.actor_loss(pi[None, None, [a]], q[i, None, None, [a]], u[None, None, [a]],
                                               torch.tensor([[True]])) / -pi[a, u[a]].log() for a in (0, 1)]
                              for i, u in enumerate(joint)])  # (6, N)
    assert advantage.abs().min() > 1e-4 and (pi[[0, 1], joint].prod(1) @ advantage).abs().max() < 1e-6

def test_coma_policy_gradient_equals_finite_differences():
    """Catches: a wrong sign, an advantage that is not detached, epsilon left out: two actions worth 1 and 3."""
    epsilon, z, worth = 0.3, np.array([0.4, -0.2]), np.array([1.0, 3.0])
    value = lambda z: ((1 - epsilon) * np.exp(z) / np.exp(z).sum() + epsilon / 2) @ worth  # noqa: E731
    slopes = [(value(z + d) - value(z - d)) / 2e-5 for d in 1e-5 * np.eye(2)]
    logits, yes = torch.tensor(z, requires_grad=True), torch.tensor([[True]])
    pi, q = coma.policy(logits, yes, epsilon).view(1, 1, 1, 2), torch.tensor(worth)[None, None, None]  # (1, 1, 1, A)
    loss = sum(pi[..., u].detach() * coma.actor_loss(pi, q, torch.tensor([[[u]]]), yes) for u in (0, 1)).sum()
    np.testing.assert_allclose(-torch.autograd.grad(loss, logits)[0].numpy(), slopes, rtol=1e-6)

@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_coma_critic_targets_equal_a_slow_loop(lam):
    """Catches: a bootstrap past the end or none at a time limit, padding that leaks in, Q of another action or step."""
    lengths, terminated, gamma = [1, 5, 3, 5, 4], [True, True, False, False, True], 0.9
    rng, B, T, N, A = np.random.default_rng(0), 5, 5, 2, 3
    q, actions, reward = rng.normal(size=(B, T + 1, N, A)), rng.integers(A, size=(B, T + 1, N)), rng.normal(size=(B, T))
    filled, beyond = (np.arange(T + k) < np.array(lengths)[:, None] + k for k in (0, 1))
    q[~beyond], reward[~filled], ends = 1e6, 1e6, ~filled  # padding is garbage, and says that it is terminated
    ends[range(B), np.array(lengths) - 1] = terminated
    batch = {k: torch.tensor(v) for k, v in dict(reward=reward, terminated=ends, filled=filled).items()}
    found = coma.critic_targets(torch.tensor(q), torch.tensor(actions), batch, gamma, lam)
    for b, t, a in (place for place in np.ndindex(B, T, N) if filled[place[:2]]):
        left, returns = lengths[b] - t, []
        for n in range(1, left + 1):  # G^(n): n rewards, then the target critic's value, unless that is the end
            after = 0.0 if n == left and terminated[b] else q[b, t + n, a, actions[b, t + n, a]]
            returns.append(sum(gamma**k * reward[b, t + k] for k in range(n)) + gamma**n * after)
        weights = [(1 - lam) * lam**n for n in range(left - 1)] + [lam ** (left - 1)]
        assert found[b, t, a].item() == pytest.approx(np.dot(weights, returns))

def test_coma_critic_does_not_see_the_own_action():
    """Catches: an own action in the input, the others' actions missing, agents that are not told apart."""
    actions = torch.tensor([[0, 1, 2]] * 4)
    actions[range(1, 4), range(3)] = torch.tensor([2, 2, 0])  # in row 1 + a another action of agent a
    q, inputs = critic_values(actions, 3)
    assert torch.equal((q[1:] != q[0]).any(-1), ~torch.eye(3, dtype=torch.bool))
    assert torch.equal(inputs[:, -3:], torch.eye(3))

def test_coma_learns_from_the_policy_that_played(monkeypatch):
    """Catches: unavailable actions that are masked before epsilon is mixed in or not renormalised, also for the action
    drawn after the last step; a greedy actor; epsilon, history or last actions other in the loss than when playing."""
    run = coma.COMA(coma.Config(env="skirmish:3m", device="cpu", epsilon_anneal_steps=1000))
    pis, taken, policy, inputs = [], [], coma.policy, coma.critic_inputs
    monkeypatch.setattr(coma, "policy", lambda *given: pis.append(policy(*given)) or pis[-1])
    monkeypatch.setattr(coma, "critic_inputs", lambda *given: taken.append(given[2]) or inputs(*given))
    for _ in range(3):
        pis.clear(), run.play(), run.learn()
        pi, avail = pis.pop().detach(), run.played[0]["avail"]  # (B, T+1, N, A) of the loss; in pis T times (B, N, A)
        torch.testing.assert_close(torch.stack(pis, dim=1), pi[:, :-1])
        torch.testing.assert_close(pi.sum(-1), torch.ones(pi.shape[:-1]))
        assert torch.equal(pi > 0, avail) and avail.gather(-1, taken[-1].unsqueeze(-1)).all()
        assert (taken[-1] != pi.argmax(-1))[:, :-1].any()

def test_coma_padding_teaches_nothing():
    """Catches: a loss or a mean over steps that did not happen; a last step without episodes (the longest was void)."""
    runs = [coma.COMA(coma.Config(env="skirmish:3m", device="cpu")) for _ in range(2)]
    for run, more in zip(runs, (0, 1)):
        run.play()
        batch, epsilon = run.played
        batch["terminated"][range(8), batch["filled"].sum(1) - 1] = True  # nothing is asked for after the end
        batch = {name: torch.cat([value, value[:, -more:]][:1 + more], dim=1) for name, value in batch.items()}
        batch["filled"][:, -more:] &= more == 0
        ends = torch.nn.functional.pad(batch["filled"], (1, 0), value=True)  # (B, T+1)
        batch["obs"][~ends], batch["state"][~ends], batch["avail"][~ends] = 7 * more, 7 * more, True
        batch["reward"][~batch["filled"]] = 7 * more
        run.played = batch, epsilon
        run.learn()
    torch.testing.assert_close(*((run.team.state_dict(), torch.tensor(run.stats)) for run in runs))

def test_coma_run_updates_both_networks_copies_the_target_and_resumes(tmp_path):
    """Catches: a network left out, a target copied at another time or not asked, the critic's steps in another order, a
    column missing in metrics.csv, a resumed run that is another one."""
    config = functools.partial(coma.Config, env="two-step", device="cpu", hidden_dim=8, critic_dim=8, test_episodes=1,
                               test_interval_steps=32, target_update_steps=4)
    run = coma.COMA(config(td_lambda=0.0))
    first, target = ({k: v.clone() for k, v in run.team.state_dict().items()} for _ in range(2))
    for update in (2, 4):
        run.play(), run.learn()
        target = run.team.state_dict() if update == 4 else target
        copied = run.target_team.state_dict()
        assert all(torch.equal(copied[k], target[k]) for k in first if k.startswith("critic"))
    assert not any(torch.equal(first[k], value) for k, value in run.team.state_dict().items())
    run.target_team.critic[-1].weight.zero_(), run.target_team.critic[-1].bias.fill_(3.0)
    run.play(), run.learn()
    assert run.stats[-1][3] == pytest.approx(0.99 * 3)  # the critic's last step is that of the first time step
    teams = []
    for name, stops in (("whole", [96]), ("parts", [48, 96])):
        for stop in stops:
            facts = coma.train(config(out=str(tmp_path / name), total_steps=stop), resume=stop != stops[0])
        teams.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["team"])
    assert all(torch.equal(*values) for values in zip(*(team.values() for team in teams)))
    rows = list(csv.DictReader(open(tmp_path / "whole" / "metrics.csv")))
    assert tuple(rows[0]) == coma.qmix.COLUMNS and [row["updates"] for row in rows] == ["0", "4", "8", "12"]
    assert facts["algo"] == "coma" and all(float(row["grad_norm"]) > 0 for row in rows[1:])

def test_coma_says_what_is_wrong(tmp_path, monkeypatch):
    """Catches: numbers out of range, gradients that are not finite or another run's flags that are taken in silence; a
    round without an episode (the game crashed in all) that ends the run; an error that is not one line."""
    monkeypatch.chdir(tmp_path)
    for wrong in (dict(seed=-1), dict(num_envs=0), dict(gamma=1.5), dict(critic_dim=0), dict(env="nowhere")):
        with pytest.raises(coma.qmix.UsageError, match="must be" if "env" not in wrong else "nowhere"):
            coma.train(coma.Config(**dict(env="two-step") | wrong))
    config = functools.partial(coma.Config, env="two-step", device="cpu", hidden_dim=8, critic_dim=8, test_episodes=1)
    with pytest.raises(coma.qmix.TrainingFailed, match="not finite"):
        coma.train(config(out="run", lr=1e9, total_steps=200))
    before = Path("run/config.json").read_text()
    with pytest.raises(coma.qmix.UsageError, match="another gamma, lr"):
        coma.train(config(out="run", gamma=0.5, total_steps=300), resume=True)
    assert Path("run/config.json").read_text() == before
    run = coma.COMA(config())
    run.play()
    run.played = {name: value[:0] for name, value in run.played[0].items()}, run.played[1]
    run.learn()
    assert run.counts["updates"] == 0
    told = subprocess.run([sys.executable, coma.__file__, "--num-envs", "0"], capture_output=True, text=True)
    assert told.returncode == 2 and "--num-envs must be int between 1 and" in told.stderr and "Trace" not in told.stderr
