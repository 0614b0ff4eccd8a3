"""Tests of extras/coma.py.

An oracle is a slow loop, a closed form, or the same computed by hand from the recorded episodes.
"""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import envs
import qmix
from extras import coma

YES = torch.tensor([[True]])  # one episode of one step


def make_run(**given) -> coma.COMA:
    """A small run on the two-step game, where every episode has two steps."""
    small = {"env": "two-step", "device": "cpu", "hidden_dim": 8, "critic_dim": 8}
    return coma.COMA(coma.Config(**{**small, **given}))


def spy(monkeypatch, name: str) -> list:
    """The arguments of every later call of coma's function of this name."""
    calls = []
    function = getattr(coma, name)

    def noted(*given):
        calls.append(given)
        return function(*given)

    monkeypatch.setattr(coma, name, noted)
    return calls


def weights(network) -> dict:
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def before(actions: torch.Tensor) -> torch.Tensor:
    """The last actions (B, T+1, N) of actions (B, T, N): -1, then each action a step later."""
    none = torch.full_like(actions[:, :1], -1)
    return torch.cat([none, actions], dim=1)


# -------------------------------------------------------------------------------- the settings
def test_defaults_are_the_published_ones():
    """Catches: a default that is not the one behind the published results, most from PyMARL."""
    expected = {
        "env": "skirmish:3m",
        "algo": "coma",
        "total_steps": 300_000,
        "num_envs": 8,
        "threads": 1,
        "gamma": 0.99,
        "td_lambda": 0.8,
        "optimizer": "rmsprop",
        "lr": 5e-4,
        "grad_clip": 10.0,
        "target_update_steps": 200,
        "epsilon_start": 0.5,
        "epsilon_finish": 0.01,
        "epsilon_anneal_steps": 100_000,
        "hidden_dim": 64,
        "critic_dim": 128,
        "test_interval_steps": 20_000,
        "test_episodes": 64,
    }
    config = vars(coma.Config())
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("seed", -1),
        ("num_envs", 0),
        ("gamma", 1.5),
        ("critic_dim", 0),
        ("target_update_steps", 0),
        ("epsilon_finish", 0.0),
        ("algo", "qmix"),
    ],
)
def test_wrong_settings_are_refused(name, wrong):
    """Catches: a number out of range that is taken in silence; a message without the flag."""
    with pytest.raises(envs.UsageError, match=f"--{name.replace('_', '-')} must be .*, not"):
        coma.Config(**{name: wrong})


def test_settings_of_the_replay_do_not_matter():
    """Catches: a limit on num_envs or epsilon by a setting that COMA does not use; a big replay."""
    config = coma.Config(num_envs=6000, batch_size=0, buffer_size=1, epsilon_spread=0.001)
    assert config.num_envs == 6000
    run = make_run(num_envs=3)
    assert run.replay.capacity == 3
    run.play()
    assert len(run.replay) == 0


# ---------------------------------------------------------------------------------- the policy
def test_policy_of_three_actions():
    """Catches: a mask before the softmax, epsilon shared by the available actions alone, no
    renormalisation. By hand: .7 * softmax + .1 = .5657, .1630, .2713; then the third is masked."""
    avail = torch.tensor([True, True, False])
    pi = coma.policy(torch.tensor([2.0, 0.0, 1.0]), avail, 0.3)
    torch.testing.assert_close(pi, torch.tensor([0.7763, 0.2237, 0.0]), atol=5e-5, rtol=0)


def test_draws_follow_the_distribution():
    """Catches: an argmax in place of a draw, draws that land at another agent or episode."""
    pi = torch.tensor([[[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]], [[0.1, 0.1, 0.8], [1.0, 0.0, 0.0]]])
    many = pi.repeat(10_000, 1, 1)  # (20000, 2, 3)
    actions = coma.draw(many, torch.Generator().manual_seed(0))
    shares = F.one_hot(actions, 3).double().view(10_000, 2, 2, 3).mean(0)
    assert actions.shape == (20_000, 2)
    torch.testing.assert_close(shares, pi.double(), atol=0.02, rtol=0)


def policy_by_hand(run, batch: dict, epsilon: float) -> np.ndarray:
    """pi (B, T+1, N, A) of the present agents on recorded episodes, in plain loops."""
    last_actions = before(batch["actions"])
    with torch.no_grad():
        logits, _ = run.team.agent(batch["obs"], last_actions)
    avail = batch["avail"].numpy()
    logits = logits.double().numpy()
    pi = np.zeros(avail.shape)
    for place in np.ndindex(avail.shape[:3]):
        n_actions = len(avail[place])
        shares = np.exp(logits[place]) / np.exp(logits[place]).sum()
        for action in range(n_actions):
            if avail[place][action]:
                pi[place][action] = (1 - epsilon) * shares[action] + epsilon / n_actions
        pi[place] /= pi[place].sum()
    return pi


@pytest.fixture(scope="module")
def battle() -> SimpleNamespace:
    """Two rounds of skirmish:3m: the second one as played, and what `play` and `learn` called.

    pi_played: the T distributions (B, N, A) that actions were drawn from. pi: what was computed in
    `learn`. actor: the arguments of `actor_loss`. expected: policy_by_hand, before learning.
    """
    run = coma.COMA(coma.Config(env="skirmish:3m", device="cpu", epsilon_anneal_steps=1000))
    run.play()
    run.learn()
    steps = run.counts["env_steps"]
    epsilon = 0.5 + min(steps / 1000, 1) * (0.01 - 0.5)
    with pytest.MonkeyPatch.context() as monkeypatch:
        draws = spy(monkeypatch, "draw")
        run.play()
        batch = run.batch
        expected = policy_by_hand(run, batch, epsilon)
        pi_played = [pi for pi, _ in draws]
        draws.clear()
        inputs = spy(monkeypatch, "critic_inputs")
        actor = spy(monkeypatch, "actor_loss")
        targets = spy(monkeypatch, "critic_targets")
        run.learn()
    return SimpleNamespace(**locals())


def test_actions_are_drawn_from_the_policy(battle):
    """Catches: when playing, a greedy actor, another epsilon, a history or last action that is
    lost, a mask left out."""
    T = len(battle.pi_played)
    found = torch.stack(battle.pi_played, dim=1).numpy()
    np.testing.assert_allclose(found, battle.expected[:, :T], atol=1e-5)
    assert T == battle.batch["actions"].shape[1]


def test_actor_learns_the_policy_that_played(battle):
    """Catches: in the loss another epsilon than when playing, a history or last action that is
    lost, a mask left out, a step too early or too late."""
    pi, _, actions, filled = battle.actor[0]
    np.testing.assert_allclose(pi.detach().numpy(), battle.expected[:, :-1], atol=1e-5)
    assert torch.equal(actions, battle.batch["actions"])
    assert torch.equal(filled, battle.batch["filled"])


def test_action_after_the_last_is_drawn_from_the_policy(battle):
    """Catches: the never-played action is drawn from another step's policy, or unavailable."""
    ((pi, _),) = battle.draws
    np.testing.assert_allclose(pi.numpy(), battle.expected[:, -1:], atol=1e-5)
    _, _, actions, _, _ = battle.inputs[0]
    _, actions_of_targets, _, _, _ = battle.targets[0]
    assert torch.equal(actions[:, :-1], battle.batch["actions"])
    assert torch.equal(actions, actions_of_targets)
    assert battle.batch["avail"][:, -1].gather(-1, actions[:, -1].unsqueeze(-1)).all()


def test_actions_are_not_the_argmax(monkeypatch):
    """Catches: the likeliest action in place of a draw, when playing or after the last step.

    Here both actions are equally likely, so each is taken about half of the time."""
    run = make_run(num_envs=200, epsilon_start=1.0)
    inputs = spy(monkeypatch, "critic_inputs")
    run.play()
    run.learn()
    _, _, actions, _, _ = inputs[0]  # (200, 3, 2): two steps, and one that was never played
    shares = actions.double().mean(dim=(0, 2))
    np.testing.assert_allclose(shares, 0.5, atol=0.1)


def test_critic_sees_last_actions_not_present_ones(battle):
    """Catches: the own action leaks into the critic as its `last` action."""
    _, _, _, last_actions, _ = battle.inputs[0]
    assert torch.equal(last_actions, before(battle.batch["actions"]))


def test_epsilon_falls_from_start_to_finish(monkeypatch):
    """Catches: epsilon at its floor from the start, or never there; another one in `learn`."""
    run = make_run(epsilon_anneal_steps=64)  # a round has 16 steps
    calls = spy(monkeypatch, "policy")
    found = []
    for _ in range(6):
        calls.clear()
        run.play()
        run.learn()
        found.append([epsilon for _, _, epsilon in calls])
    expected = [0.5, 0.3775, 0.255, 0.1325, 0.01, 0.01]
    np.testing.assert_allclose(found, np.repeat(expected, 3).reshape(6, 3), atol=1e-6)


# ---------------------------------------------------------------------------------- the critic
def test_critic_inputs_equal_a_slow_loop():
    """Catches: the own action in the input, the others' actions or ids missing or mixed up."""
    N = 3
    A = 4
    rng = np.random.default_rng(0)
    state = rng.normal(size=(2, 3, 5)).astype(np.float32)
    obs = rng.normal(size=(2, 3, N, 2)).astype(np.float32)
    actions = rng.integers(A, size=(2, 3, N))
    last_actions = rng.integers(-1, A, size=(2, 3, N))
    given = [torch.tensor(array) for array in (state, obs, actions, last_actions)]
    found = coma.critic_inputs(*given, A)

    def one_hot(number, size):
        return [float(number == i) for i in range(size)]

    for b, t, a in np.ndindex(actions.shape):
        expected = list(state[b, t])
        for agent in range(N):
            expected += one_hot(last_actions[b, t, agent], A)
        expected += list(obs[b, t, a])
        for agent in range(N):
            if agent == a:
                expected += [0.0] * A
            else:
                expected += one_hot(actions[b, t, agent], A)
        expected += one_hot(a, N)
        assert found[b, t, a].tolist() == expected


def test_critic_has_two_hidden_layers():
    """Catches: another size or depth, a layer without its ReLU (then half of it is below 0)."""
    env = SimpleNamespace(n_agents=2, n_actions=3, obs_dim=4, state_dim=5)
    critic = coma.make_critic(env, 16)
    shapes = [tuple(value.shape) for value in critic.parameters()]
    assert shapes == [(16, 23), (16,), (16, 16), (16,), (3, 16), (3,)]
    x = torch.randn(7, 23)
    for n_layers in (2, 4):
        assert critic[:n_layers](x).min() == 0


def returns_by_hand(reward, q_next, terminated, gamma, lam) -> float:
    """The paper's y^(lambda) at the first step of one episode, as a mean of n-step returns.

    reward[n] of step n, q_next[n] the target critic's value of the action taken after it.
    """
    T = len(reward)
    y = 0.0
    for n in range(1, T + 1):
        value = sum(gamma**k * reward[k] for k in range(n))
        if n < T or not terminated:
            value += gamma**n * q_next[n - 1]
        if n < T:
            y += (1 - lam) * lam ** (n - 1) * value
        else:
            y += lam ** (n - 1) * value
    return y


@pytest.mark.parametrize("lam", [0.0, 0.8, 1.0])
def test_critic_targets_equal_a_mean_of_n_step_returns(lam):
    """Catches: a bootstrap past the end or none at a time limit, padding that leaks in, the value
    of another action or step."""
    lengths = [1, 5, 3, 5, 4]
    terminated = [True, True, False, False, True]
    gamma = 0.9
    T = 5
    rng = np.random.default_rng(0)
    q = rng.normal(size=(5, T + 1, 2, 3))  # (B, T+1, N, A)
    actions = rng.integers(3, size=(5, T + 1, 2))
    reward = rng.normal(size=(5, T))
    ends = np.ones((5, T), bool)  # padding is garbage, and says that it is terminated
    for b, length in enumerate(lengths):
        q[b, length + 1 :] = 1e6
        reward[b, length:] = 1e6
        ends[b, : length - 1] = False
        ends[b, length - 1] = terminated[b]
    filled = np.arange(T) < np.array(lengths)[:, None]
    batch = {"reward": reward, "terminated": ends, "filled": filled}
    batch = {name: torch.tensor(value) for name, value in batch.items()}
    found = coma.critic_targets(torch.tensor(q), torch.tensor(actions), batch, gamma, lam)
    for b, t, a in np.ndindex(5, T, 2):
        if filled[b, t]:
            after = range(t + 1, lengths[b] + 1)
            q_next = [q[b, step, a, actions[b, step, a]] for step in after]
            rest = reward[b, t : lengths[b]]
            expected = returns_by_hand(rest, q_next, terminated[b], gamma, lam)
            assert found[b, t, a].item() == pytest.approx(expected)


def test_critic_starts_at_the_last_step():
    """Catches: the critic's steps in another order; a loss other than mean((q - y)^2) over both
    agents. The last step of the two-step game is terminal: y is its reward."""
    run = make_run()
    run.play()
    batch = run.batch
    last_actions = before(batch["actions"])[:, :2]
    with torch.no_grad():
        given = (batch["state"][:, :2], batch["obs"][:, :2], batch["actions"], last_actions, 2)
        q = run.team.critic(coma.critic_inputs(*given)).double().numpy()  # (8, 2, 2, 2)
    errors = []
    for b, a in np.ndindex(8, 2):
        q_taken = q[b, 1, a, batch["actions"][b, 1, a]]
        errors.append((q_taken - batch["reward"][b, 1].item()) ** 2)
    run.learn()
    first = dict(zip(qmix.STATS, run.stats[0]))
    assert first["loss"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert first["target"] == pytest.approx(batch["reward"][:, 1].mean().item(), rel=1e-5)
    assert len(run.stats) == 2


def test_critic_learns_from_what_it_was_given(monkeypatch):
    """Catches: q_taken of another step, agent or action; statistics in another order.

    A critic that never moves, in a battle: each step's loss is that of the values at the start."""
    run = coma.COMA(coma.Config(env="skirmish:3m", device="cpu", lr=1e-9, optimizer="adam"))
    inputs = spy(monkeypatch, "critic_inputs")
    targets = spy(monkeypatch, "critic_targets")
    run.play()
    run.learn()
    with torch.no_grad():
        q = run.team.critic(coma.critic_inputs(*inputs[0])).double()
    _, actions, batch, _, _ = targets[0]
    y = coma.critic_targets(*targets[0]).double()
    expected = []
    for t in reversed(range(batch["filled"].shape[1])):
        q_taken = []
        target = []
        for b, a in np.ndindex(8, 3):
            if batch["filled"][b, t]:
                q_taken.append(q[b, t, a, actions[b, t, a]])
                target.append(y[b, t, a])
        errors = np.subtract(q_taken, target)
        expected.append([np.mean(errors**2), np.mean(q_taken), np.mean(target)])
    found = np.array(run.stats)[:, [0, 2, 3]]  # without grad_norm
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_target_critic_gives_the_targets():
    """Catches: the live critic is asked for the targets. Here the target critic says 3."""
    run = make_run(td_lambda=0.0)
    run.target_team.critic[-1].weight.zero_()
    run.target_team.critic[-1].bias.fill_(3.0)
    run.play()
    run.learn()
    first_step = dict(zip(qmix.STATS, run.stats[-1]))  # its reward is 0, and it comes last
    assert first_step["target"] == pytest.approx(0.99 * 3)


def test_target_critic_is_copied_every_so_many_steps():
    """Catches: a copy at another time, of another moment, or of nothing."""
    run = make_run(target_update_steps=4)  # a round has 2 steps of the critic
    first = weights(run.target_team.critic)
    copies = []
    for _ in range(4):
        run.play()
        run.learn()
        copies.append((weights(run.target_team.critic), weights(run.team.critic)))
    assert equal(copies[0][0], first)
    assert equal(*copies[1])
    assert equal(copies[2][0], copies[1][0])
    assert equal(*copies[3])
    assert not equal(copies[3][0], copies[1][0])


# ----------------------------------------------------------------------------------- the actor
def test_advantage_is_zero_on_average():
    """Catches: a baseline that is not the policy's mean, a value that depends on the own action.

    Over all joint actions, weighted by the policy, no agent has an advantage (Lemma 1)."""
    torch.manual_seed(0)
    critic = coma.make_critic(SimpleNamespace(n_agents=2, n_actions=3, obs_dim=4, state_dim=5), 16)
    state = torch.randn(1, 1, 5)
    obs = torch.randn(1, 1, 2, 4)
    none = torch.full((1, 1, 2), -1)
    avail = torch.tensor([[True, True, True], [True, False, True]])
    pi = coma.policy(torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]]), avail, 0.2)  # (N, A)
    advantages = []
    means = torch.zeros(2)
    for joint in itertools.product(range(3), (0, 2)):
        actions = torch.tensor(joint).view(1, 1, 2)
        q = critic(coma.critic_inputs(state, obs, actions, none, 3))
        for a in range(2):
            loss = coma.actor_loss(pi[None, None, [a]], q[:, :, [a]], actions[..., [a]], YES)
            advantage = loss / -pi[a, joint[a]].log()
            means[a] += pi[0, joint[0]] * pi[1, joint[1]] * advantage
            advantages.append(advantage.abs().item())
    assert min(advantages) > 1e-4
    assert means.abs().max() < 1e-6


def test_policy_gradient_equals_finite_differences():
    """Catches: a wrong sign, an advantage that is not detached, epsilon left out.

    Two actions are worth 1 and 3; the gradient of what the policy earns is known numerically."""
    epsilon = 0.3
    worth = np.array([1.0, 3.0])
    z = np.array([0.4, -0.2])

    def earned(logits):
        softmax = np.exp(logits) / np.exp(logits).sum()
        return ((1 - epsilon) * softmax + epsilon / 2) @ worth

    slopes = [(earned(z + d) - earned(z - d)) / 2e-5 for d in 1e-5 * np.eye(2)]
    logits = torch.tensor(z, requires_grad=True)
    pi = coma.policy(logits, torch.tensor([True, True]), epsilon).view(1, 1, 1, 2)
    q = torch.tensor(worth).view(1, 1, 1, 2)
    loss = 0.0
    for action in range(2):
        chance = pi[0, 0, 0, action].detach()
        loss = loss + chance * coma.actor_loss(pi, q, torch.tensor([[[action]]]), YES)
    (gradient,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(-gradient.numpy(), slopes, rtol=1e-6)


def test_actor_loss_is_a_mean_over_steps_and_agents():
    """Catches: a sum, a mean that counts padding, an infinite log in the padding that spreads."""
    rng = np.random.default_rng(0)
    pi = rng.dirichlet(np.ones(4), size=(2, 3, 2))  # (B, T, N, A)
    q = rng.normal(size=(2, 3, 2, 4))
    actions = rng.integers(4, size=(2, 3, 2))
    filled = np.array([[True, True, True], [True, False, False]])
    pi[1, 1:] = np.nan
    losses = []
    for b, t, a in np.ndindex(actions.shape):
        if filled[b, t]:
            action = actions[b, t, a]
            advantage = q[b, t, a, action] - pi[b, t, a] @ q[b, t, a]
            losses.append(-advantage * np.log(pi[b, t, a, action]))
    given = [torch.tensor(array) for array in (pi, q, actions, filled)]
    assert len(losses) == 8
    assert coma.actor_loss(*given).item() == pytest.approx(np.mean(losses))


def test_actor_is_judged_by_the_critic_after_its_steps(battle):
    """Catches: the actor's q come from the critic before its steps, or from the target critic."""
    with torch.no_grad():
        inputs = coma.critic_inputs(*battle.inputs[0])
        q = battle.run.team.critic(inputs)  # the actor's step has left the critic as it was
    torch.testing.assert_close(battle.actor[0][1], q[:, :-1])


# ------------------------------------------------------------------------------------- learning
def test_every_network_learns():
    """Catches: actor or critic missing in the optimizer; a mixer that nobody asks."""
    run = make_run()
    first = weights(run.team)
    run.play()
    run.learn()
    same = [
        name for name, value in run.team.state_dict().items() if torch.equal(value, first[name])
    ]
    assert same == []


def test_actor_takes_one_step_a_round(monkeypatch):
    """Catches: a loss that reaches the other network too, a second step of the actor."""
    run = make_run()
    run.play()
    moved = []
    step = run.optimizer.step

    def noted():
        old = weights(run.team)
        step()
        new = run.team.state_dict()
        names = {name.split(".")[0] for name in new if not torch.equal(new[name], old[name])}
        moved.append(names)

    monkeypatch.setattr(run.optimizer, "step", noted)
    run.learn()
    assert moved == [{"critic"}, {"critic"}, {"agent"}]


def test_padding_teaches_nothing():
    """Catches: a loss or a mean over steps that did not happen; a last step that no episode has,
    because the longest was void."""
    learned = []
    for more in (0, 1):  # one more step of padding, and garbage in all of it
        run = coma.COMA(coma.Config(env="skirmish:3m", device="cpu"))
        run.play()
        batch = run.batch
        lengths = batch["filled"].sum(1)
        batch["terminated"][range(8), lengths - 1] = True  # nothing is asked for after the end
        if more:
            batch = {name: F.pad(value, pad_of(value)) for name, value in batch.items()}
            beyond = torch.arange(batch["obs"].shape[1]) > lengths[:, None]  # (B, T+1)
            batch["obs"][beyond] = 7.0
            batch["state"][beyond] = 7.0
            batch["avail"][beyond] = True
            batch["reward"][beyond[:, 1:]] = 7.0
        run.batch = batch
        run.learn()
        learned.append((run.team.state_dict(), torch.tensor(run.stats)))
    torch.testing.assert_close(*learned)


def pad_of(value: torch.Tensor) -> list[int]:
    """For F.pad: one more row at the end of axis 1."""
    return [0, 0] * (value.dim() - 2) + [0, 1]


def test_round_without_an_episode_is_skipped():
    """Catches: a round in which every game crashed ends the run, or teaches something."""
    run = make_run()
    run.play()
    first = weights(run.team)
    run.batch = {name: value[:0] for name, value in run.batch.items()}
    run.learn()
    assert equal(first, run.team.state_dict())
    assert run.counts["updates"] == 0


def test_gradient_is_clipped(monkeypatch):
    """Catches: no clipping, of the actor or the critic, or the norm after it in the statistics."""
    run = make_run(grad_clip=1e-3)
    run.play()
    norms = []
    step = run.optimizer.step

    def noted():
        squares = [p.grad.square().sum() for p in run.team.parameters() if p.grad is not None]
        norms.append(sum(squares).sqrt().item())
        step()

    monkeypatch.setattr(run.optimizer, "step", noted)
    run.learn()
    assert len(norms) == 3
    assert max(norms) < 1.001e-3
    assert min(row[1] for row in run.stats) > 1e-2


def test_gradient_that_is_not_finite_ends_the_run():
    """Catches: a NaN in the gradient of a finite loss gets into the weights."""
    run = make_run()
    first = weights(run.team)
    loss = (run.team.critic[0].weight * 0).sqrt().sum()  # 0, but the slope is 0 * infinity
    with pytest.raises(qmix.TrainingFailed, match="not finite"):
        run.descend(loss, run.team.critic)
    assert loss == 0
    assert equal(first, run.team.state_dict())


def test_rounds_are_counted():
    """Catches: steps, episodes, updates or returns that are counted wrongly, padding included."""
    run = coma.COMA(coma.Config(env="skirmish:3m", device="cpu"))
    steps = 0
    returns = []
    updates = 0
    for _ in range(2):
        run.play()
        filled = run.batch["filled"]
        steps += int(filled.sum())
        returns += (run.batch["reward"] * filled).sum(1).tolist()
        updates += int(filled.any(0).sum())
        run.learn()
    assert run.counts == {"env_steps": steps, "episodes": 16, "updates": updates}
    assert run.returns == pytest.approx(returns)
    assert len(run.stats) == updates


def test_resumed_run_gives_workers_other_seeds():
    """Catches: a resumed run whose worker processes repeat the episodes of the start."""
    cfg = make_run().cfg
    seeds = [coma.COMA(cfg, steps).generators["explore"].initial_seed() for steps in (0, 0, 100)]
    assert seeds[0] == seeds[1] != seeds[2]


# --------------------------------------------------------------------------------- command line
SMALL = "--env two-step --device cpu --hidden-dim 8 --critic-dim 8 --test-episodes 1".split()


def start(folder, *flags) -> int:
    return coma.main([*SMALL, "--test-interval-steps", "16", "--out", str(folder), *flags])


def rows_of(folder) -> list[dict]:
    with open(Path(folder) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("seconds")
    return rows


def saved(folder) -> dict:
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def test_metrics_are_complete(tmp_path):
    """Catches: a column that stays empty, such as train_return, or counts something else."""
    assert start(tmp_path / "run", "--total-steps", "48") == 0
    first, *rows = rows_of(tmp_path / "run")
    counts = [(row["env_steps"], row["updates"]) for row in rows]
    assert counts == [("16", "2"), ("32", "4"), ("48", "6")]  # a row for each round
    assert float(first["epsilon"]) == pytest.approx(0.5)
    for row in rows:
        for name in qmix.STATS:
            assert row[name] != ""
        assert 0 < float(row["train_return"]) <= 8


def test_resumed_run_equals_an_unbroken_one(tmp_path):
    """Catches: something that a checkpoint does not hold: target critic, optimizer, generators."""
    flags = ["--target-update-steps", "5", "--epsilon-anneal-steps", "100"]
    assert start(tmp_path / "whole", *flags, "--total-steps", "96") == 0
    assert start(tmp_path / "parts", *flags, "--total-steps", "48") == 0
    resume = ["--resume", str(tmp_path / "parts"), "--total-steps", "96"]
    assert coma.main(resume) == 0
    whole = saved(tmp_path / "whole")
    parts = saved(tmp_path / "parts")
    assert parts["config"]["target_update_steps"] == 5
    for name in ("team", "target_team", "generators"):
        assert equal(whole[name], parts[name])
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


def test_command_prints_a_result(tmp_path):
    """Catches: `python -m extras.coma` does nothing, or its last line is not the result."""
    flags = [*SMALL, "--total-steps", "16", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "extras.coma", *flags]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind, _, text = done.stdout.splitlines()[-1].partition(" ")
    result = json.loads(text)
    assert kind == "result:"
    assert result["algo"] == "coma"
    assert result["env_steps"] == 16


def test_bad_input_ends_with_code_2(tmp_path, capsys):
    """Catches: a traceback, another code, or a run that is overwritten."""
    assert start(tmp_path / "run", "--total-steps", "16") == 0
    content = (tmp_path / "run" / "metrics.csv").read_text()
    capsys.readouterr()
    for flags, what in [
        (["--out", str(tmp_path / "run")], "holds a run"),
        (["--resume", str(tmp_path / "nothing")], "not a checkpoint"),
        (["--resume", str(tmp_path / "run"), "--critic-dim", "16"], "size mismatch"),
        (["--env", "nowhere", "--out", str(tmp_path / "other")], "unknown environment"),
    ]:
        assert coma.main([*flags, "--total-steps", "32"]) == 2
        told = capsys.readouterr().err
        assert what in told
        assert len(told.splitlines()) == 1
    assert (tmp_path / "run" / "metrics.csv").read_text() == content


def test_wrong_flag_ends_with_code_2(capsys):
    """Catches: a wrong number that is not named with its flag."""
    with pytest.raises(SystemExit) as ended:
        coma.main(["--num-envs", "0"])
    assert ended.value.code == 2
    assert "--num-envs must be int" in capsys.readouterr().err


def test_failed_run_ends_with_code_1(tmp_path, capsys):
    """Catches: a run that diverges and goes on, or ends with a traceback."""
    assert start(tmp_path / "run", "--lr", "1e9", "--total-steps", "400") == 1
    told = capsys.readouterr().err
    assert "not finite" in told
    assert len(told.splitlines()) == 1


def test_interrupt_ends_with_code_130(tmp_path, monkeypatch):
    """Catches: a traceback after Ctrl-C."""

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(qmix, "loop", interrupted)
    assert start(tmp_path / "run") == 130
