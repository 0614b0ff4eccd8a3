"""Each test names the mistake it would catch and compares with something independent of the code it tests."""

import copy
import importlib.util
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import envs
import qmix
from envs import Step, UsageError

torch.set_num_threads(1)
HERE = Path(__file__).parent
LEARNERS = sorted(qmix.MIXERS)
SIZES = SimpleNamespace(obs_dim=5, state_dim=6, n_actions=4, n_agents=3, episode_limit=7)


def small(algo="qmix", **given):
    return qmix.Config(env="two-step", algo=algo, **dict(hidden_dim=8, mixing_dim=4, hypernet_dim=8) | given)


def make_team(cfg, sizes=SIZES, seed=0):
    torch.manual_seed(seed)
    return qmix.Team(sizes, cfg)


def random_batch(lengths, ends, sizes=SIZES, seed=0):
    """Episodes of the given lengths, ended by "terminated" or "truncated"; everything behind the end is garbage."""
    rng, B, T, N, A = np.random.default_rng(seed), len(lengths), max(lengths), sizes.n_agents, sizes.n_actions
    avail = rng.random((B, T + 1, N, A)) < 0.6
    actions = rng.integers(A, size=(B, T, N))
    np.put_along_axis(avail[:, :-1], actions[..., None], True, -1)  # what was done was available
    avail[..., 0] |= ~avail.any(-1)
    filled = np.arange(T) < np.array(lengths)[:, None]
    terminated = rng.random((B, T)) < 0.5  # garbage, put right where the episode is
    terminated[filled] = False
    terminated[np.arange(B), np.array(lengths) - 1] = [end == "terminated" for end in ends]
    arrays = dict(obs=rng.normal(size=(B, T + 1, N, sizes.obs_dim)), state=rng.normal(size=(B, T + 1, sizes.state_dim)),
                  avail=avail, actions=actions, reward=rng.normal(size=(B, T)), terminated=terminated, filled=filled)
    return {k: torch.tensor(v, dtype=torch.float64 if v.dtype == float else None) for k, v in arrays.items()}


# ------------------------------------------------------------------------------------------------------ mathematics


@pytest.mark.parametrize("algo, hypernet_dim", [*itertools.product(LEARNERS, [8]), ("qmix", 0), ("qmix-lin", 0)])
def test_mixers_are_monotone_and_joint_argmax_is_the_agents_own(algo, hypernet_dim):
    """Catches: a forgotten |.|, a non-monotone activation: Eq. 5 by autograd, Eq. 4 (Theorem 1) by brute force."""
    mixer = make_team(small(algo, hypernet_dim=hypernet_dim)).mixer
    for parameter in mixer.parameters():  # far from the gentle initial weights
        torch.nn.init.normal_(parameter, std=2.0)
    q, state = torch.randn(50, 4, 3, requires_grad=True), torch.randn(50, 4, 6)
    (slope,) = torch.autograd.grad(mixer(q, state).sum(), q)
    assert (slope >= 0).all() and (slope > 0).any()
    table = torch.randn(50, 3, 4)  # (states, N, A): every joint action of three agents with four actions
    joint = list(itertools.product(range(4), repeat=3))
    chosen = torch.stack([table[:, range(3), list(u)] for u in joint], dim=1)  # (states, 64, N)
    q_tot = mixer(chosen, state[:, :1].expand(-1, 64, -1)).sum(-1)  # sum: IQL's values are per agent
    own = q_tot[:, [joint.index(tuple(u)) for u in table.argmax(-1).tolist()]].diagonal()
    torch.testing.assert_close(own, q_tot.max(1).values)


class SlowTeam:
    """Agent and mixers again, one agent and one step at a time, in NumPy, from the weights alone."""

    def __init__(self, team, algo):
        self.w, self.algo = {name: value.detach().numpy() for name, value in team.state_dict().items()}, algo

    def linear(self, name, x):
        return self.w[name + ".weight"] @ x + self.w[name + ".bias"]

    def two_layers(self, name, x):
        if f"{name}.weight" in self.w:
            return self.linear(name, x)
        return self.linear(f"{name}.2", np.maximum(self.linear(f"{name}.0", x), 0))

    def agent(self, obs, actions, agent):
        """Q (T+1, A) of one agent over one episode: Cho et al.'s GRU in PyTorch's convention."""
        A, H = self.w["agent.fc2.weight"].shape
        h, rows = np.zeros(H), []
        for t in range(len(obs)):
            last = np.eye(A)[actions[t - 1]] if t else np.zeros(A)
            x = np.maximum(self.linear("agent.fc1", np.concatenate([obs[t], last, np.eye(SIZES.n_agents)[agent]])), 0)
            gates_x = self.w["agent.gru.weight_ih_l0"] @ x + self.w["agent.gru.bias_ih_l0"]
            gates_h = self.w["agent.gru.weight_hh_l0"] @ h + self.w["agent.gru.bias_hh_l0"]
            r, z = (1 / (1 + np.exp(-gates_x[i * H:i * H + H] - gates_h[i * H:i * H + H])) for i in (0, 1))
            n = np.tanh(gates_x[2 * H:] + r * gates_h[2 * H:])
            h = (1 - z) * n + z * h
            rows.append(self.linear("agent.fc2", h))
        return np.array(rows)

    def mix(self, q, s):
        elu = lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)  # noqa: E731
        if self.algo == "iql":
            return q
        if self.algo in ("vdn", "vdn-s"):
            return [sum(q) + (self.two_layers("mixer.v", s)[0] if self.algo == "vdn-s" else 0)]
        if self.algo == "qmix-lin":
            return [abs(self.two_layers("mixer.w", s)) @ q + self.two_layers("mixer.v", s)[0]]
        if self.algo == "qmix-ns":
            hidden = elu(abs(self.w["mixer.hidden.weight"]) @ q + self.w["mixer.hidden.bias"])
            return [abs(self.w["mixer.final.weight"][0]) @ hidden + self.w["mixer.final.bias"][0]]
        w1 = abs(self.two_layers("mixer.w1", s)).reshape(len(q), -1)
        hidden = elu(q @ w1 + self.linear("mixer.b1", s))
        return [abs(self.two_layers("mixer.w2", s)) @ hidden + self.two_layers("mixer.v", s)[0]]


def slow_loss(team, target, batch, algo, gamma, double_q, lam):
    """Eq. 6 with plain loops over episodes and steps; an episode is cut at its end, so padding cannot matter."""
    live, old, errors = SlowTeam(team, algo), SlowTeam(target, algo), []
    for b in range(len(batch["filled"])):
        x = {name: value[b].numpy() for name, value in batch.items()}
        T, N = int(x["filled"].sum()), SIZES.n_agents
        q, q_old = ([net.agent(x["obs"][:T + 1, a], x["actions"][:, a], a) for a in range(N)] for net in (live, old))
        values = [None]  # values[t]: what the target network thinks of step t
        for t in range(1, T + 1):
            best = []
            for a in range(N):
                chooser = q[a][t] if double_q else q_old[a][t]
                best.append(max(np.flatnonzero(x["avail"][t, a]), key=lambda u: chooser[u]))
            values.append(np.array(old.mix(np.array([q_old[a][t][best[a]] for a in range(N)]), x["state"][t])))
        y = None
        for t in reversed(range(T)):
            if x["terminated"][t]:
                y = x["reward"][t] + 0 * values[T]
            elif t == T - 1:  # truncated
                y = x["reward"][t] + gamma * values[T]
            else:
                y = x["reward"][t] + gamma * ((1 - lam) * values[t + 1] + lam * y)
            taken = np.array([q[a][t][x["actions"][t, a]] for a in range(N)])
            errors += list(np.array(live.mix(taken, x["state"][t])) - y)
    return np.mean(np.square(errors))


@pytest.mark.parametrize("algo, double_q, lam, hypernet_dim", [
    *((algo, True, 0.0, 8) for algo in LEARNERS), ("qmix", False, 0.0, 8), ("qmix", True, 0.6, 8),
    ("iql", True, 1.0, 8), ("qmix", True, 0.0, 0)])
def test_td_loss_equals_slow_loop(algo, double_q, lam, hypernet_dim):
    """Catches: a target started at s' with an empty memory, time or agent axes mixed up, a mask on the wrong axis, a
    bootstrap over the end or none over a time limit, unavailable actions in the maximum, padding that leaks in."""
    cfg = small(algo, hypernet_dim=hypernet_dim)
    team, target = make_team(cfg).double(), make_team(cfg, seed=1).double()
    batch = random_batch([7, 3, 1, 5, 7, 2], ["truncated", "terminated", "terminated"] * 2)
    loss, means = qmix.td_loss(team, target, batch, 0.9, double_q, lam)
    assert loss.item() == pytest.approx(slow_loss(team, target, batch, algo, 0.9, double_q, lam), rel=1e-10)
    assert all(math.isfinite(value) for value in means.values())


@pytest.mark.parametrize("double_q", [True, False], ids=["double", "plain"])
@pytest.mark.parametrize("mixer", ["qmix-2", "qmix-1", "vdn", "iql"])  # -2, -1: layers of the hyper-networks
def test_one_update_equals_the_authors_code(mixer, double_q):
    """Catches whatever departs unintended from the authors' PyMARL: order of the agent's inputs, last action shifted
    wrongly, another mixer, availability, terminated or filled misread, bootstrap off by one, wrong mean, clip or step.
    """
    data = np.load(HERE / "testdata" / "pymarl.npz")  # from github.com/oxwhirl/pymarl at c971afd
    batch = {name[6:]: torch.from_numpy(data[name]) for name in data.files if name.startswith("batch/")}
    sizes = dict(obs_dim=5, state_dim=6, n_agents=3, n_actions=4)
    cfg = qmix.Config(algo=mixer.split("-")[0], hidden_dim=8, mixing_dim=4, hypernet_dim=8 if mixer == "qmix-2" else 0,
                      env="smac:3m", double_q=double_q)  # everything else as the authors have it
    team = qmix.Team(SimpleNamespace(**sizes), cfg)
    target_team = copy.deepcopy(team)
    for which, net in [("live", team), ("target", target_team)]:
        keys = [key for key in data.files if key.startswith((f"{which}/all/", f"{which}/{mixer}/"))]
        weights = {key.split("/")[-1]: torch.from_numpy(data[key]) for key in keys}
        net.load_state_dict(weights, strict=True)
    found = {}
    team.agent.register_forward_hook(lambda *call: found.update(q=call[-1][0]))
    team.mixer.register_forward_hook(lambda *call: found.update(q_tot=call[-1]))

    optimizer = qmix.make_optimizer(team, cfg)
    numbers = qmix.gradient_step(team, target_team, optimizer, batch, cfg)  # loss, grad_norm, q_taken, target

    def same(ours, name, rows=...):
        torch.testing.assert_close(ours.detach()[rows], torch.from_numpy(data[name])[rows], rtol=1e-5, atol=1e-6)

    case, steps = f"{mixer}/{'double' if double_q else 'plain'}", batch["filled"]
    same(found["q"], "q", torch.nn.functional.pad(steps, (1, 0), value=True))  # what follows the last step counts too
    same(found["q_tot"], f"{mixer}/q_tot", steps)
    same(numbers, f"{case}/numbers")
    same(torch.cat([team.state_dict()[name].flatten() for name in weights]), f"{case}/after")


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_padding_changes_nothing(lam):
    """Catches: loss, gradient or target that read behind an episode's end (other than the step that follows it)."""
    team, target = make_team(small()).double(), make_team(small(), seed=1).double()
    gradients = []
    for fill in (0.0, 1e3):
        batch = random_batch([7, 3, 5], ["truncated", "truncated", "terminated"])
        behind = ~batch["filled"]
        for name in ("reward", "terminated", "actions"):
            batch[name][behind] = 1 if fill else 0
        for name in ("obs", "state"):
            batch[name][:, 2:][behind[:, 1:]] = fill  # row t+1 after the last step is still read
        batch["avail"][:, 2:][behind[:, 1:]] = bool(fill)
        loss, means = qmix.td_loss(team, target, batch, 0.99, td_lambda=lam)
        loss.backward()
        gradients.append([loss.detach(), *means.values(), *(p.grad.clone() for p in team.parameters())])
        team.zero_grad()
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_unavailable_actions_never_move_a_target():
    """Catches: a target maximum over all actions. The unavailable ones get the largest values by far."""
    team, target = make_team(small()).double(), make_team(small(), seed=1).double()
    batch = random_batch([4, 4], ["truncated", "truncated"])
    batch["avail"][..., 2] = False
    batch["actions"][batch["actions"] == 2] = 0
    before = qmix.td_loss(team, target, batch, 0.99)[1]["target"]
    for net in (team, target):
        net.agent.fc2.bias.data[2] += 1e4
    assert qmix.td_loss(team, target, batch, 0.99)[1]["target"] == before


def test_sequence_unroll_equals_acting_step_by_step():
    """Catches: last actions shifted by one, a memory reset or kept wrongly, a layout error between (B, N) and (B*N)."""
    agent, batch = make_team(small()).agent.double(), random_batch([6, 6, 6, 6], ["truncated"] * 4)
    obs, avail = batch["obs"], torch.ones_like(batch["avail"])
    memory, actions, hidden = None, [], []
    for t in range(7):
        chosen, memory = qmix.act(agent, obs[:, t], avail[:, t], memory)
        actions.append(chosen)
        hidden.append(memory[0])
    last = torch.stack([torch.full((4, 3), -1), *actions[:-1]], dim=1)
    q, final = agent(agent.inputs(obs, last))
    assert torch.equal(q.argmax(-1), torch.stack(actions, dim=1))
    torch.testing.assert_close(final, hidden[-1])


def test_leaving_out_what_is_over_changes_no_number():
    """`lengths` saves work alone. Catches: a row too few (the value behind the last step), rows of another episode."""
    batch = random_batch([40, 33, 32, 17, 16, 15, 1], ["terminated", "truncated"] * 3 + ["truncated"])
    found = []
    for lengths in (None, batch["filled"].sum(1)):
        team, target = make_team(small()).double(), make_team(small(), seed=5).double()
        loss, means = qmix.td_loss(team, target, batch | ({} if lengths is None else {"lengths": lengths}), 0.9)
        loss.backward()
        found.append([loss, *means.values(), *(p.grad for p in team.parameters())])
        q, _ = team.agent(team.agent.inputs(batch["obs"], torch.full_like(batch["actions"], -1)[:, [0] * 41]),
                          lengths=lengths)
    torch.testing.assert_close(*found)
    assert (q[4, 16] != 0).all() and (q[5, 16:] == 0).all() and (q[3, 32:] == 0).all()  # in stretches of 16 steps


def test_epsilon_greedy_draws_per_agent_over_available_actions():
    """Catches: one epsilon draw for the whole team, exploration over unavailable actions, a biased choice."""
    q = torch.tensor([[9.0, 5.0, 1.0, 0.0]]).expand(40_000, 2, 4)  # action 0 looks best but is not available
    avail = torch.tensor([False, True, True, True]).expand(40_000, 2, 4)
    actions = qmix.select_actions(q, avail, torch.tensor([[0.5]]), torch.Generator().manual_seed(0))
    assert (actions > 0).all()
    share = torch.stack([(actions == u).float().mean(0) for u in (1, 2, 3)])  # (3, N)
    torch.testing.assert_close(share, torch.tensor([[2 / 3], [1 / 6], [1 / 6]]).expand(3, 2), atol=0.01, rtol=0)
    both = ((actions == 1).all(-1)).float().mean().item()
    assert both == pytest.approx(4 / 9, abs=0.01)  # independent; one draw for the team would give (1 + 1/9) / 2 = 0.56
    assert (qmix.select_actions(q, avail) == 1).all()
    each = qmix.select_actions(q[:20_000], avail[:20_000], torch.tensor([[0.0], [0.6]]).repeat(10_000, 1))
    assert (each[0::2] == 1).all() and (each[1::2] > 1).float().mean().item() == pytest.approx(0.4, abs=0.01)


def test_epsilon_schedule():
    """Catches: a schedule counted in episodes, that overshoots, or that starts anywhere but at the start."""
    draws = torch.rand(4, 3)
    cfg = qmix.Config(env="smac:3m", epsilon_start=0.9, epsilon_finish=0.1, epsilon_anneal_steps=1000)
    for steps, share in ((0, 0.9), (500, 0.5), (1000, 0.1), (10**9, 0.1)):
        torch.testing.assert_close(cfg.epsilon(steps, draws), torch.full((4, 3), share))
    rising = qmix.Config(env="smac:3m", epsilon_start=0.1, epsilon_finish=0.5, epsilon_anneal_steps=1000)
    torch.testing.assert_close(rising.epsilon(500, draws), torch.full((4, 3), 0.3))
    cfg = qmix.Config(env="smac:3m", epsilon_finish=0.01, epsilon_spread=0.27, epsilon_anneal_steps=1000)
    draws = torch.tensor([[0.0, 1 / 3], [2 / 3, 1.0]])  # equal steps in the exponent
    torch.testing.assert_close(cfg.epsilon(10**6, draws), torch.tensor([[0.01, 0.03], [0.09, 0.27]]))
    torch.testing.assert_close(cfg.epsilon(900, draws), torch.tensor([[0.109, 0.109], [0.109, 0.27]]))


def test_epsilon_spread_is_drawn_per_agent_and_episode(tmp_path, monkeypatch):
    """Catches: one epsilon for a whole team or for a whole run, or a draw that the checkpoint does not know of."""
    run, seen = qmix.Run(tiny(tmp_path, epsilon_start=0.0, epsilon_finish=0.01, epsilon_spread=0.9, num_envs=64)), []
    monkeypatch.setattr(run, "policy", lambda epsilon, policy=run.policy: seen.append(epsilon) or policy(epsilon))
    state = run.state_dict()
    run.play()
    run.play()
    run.load_state_dict(state)
    run.play()
    assert seen[0].shape == (64, run.env.n_agents) and torch.equal(seen[0], seen[2])
    assert len(seen[0].unique()) == seen[0].numel() and not torch.equal(seen[0], seen[1])
    ranks = torch.corrcoef(torch.cat(seen[:2]).log().T)
    assert abs(ranks[0, 1]) < 0.3  # of one team


# ---------------------------------------------------------------------------------------------------- replay, rollout


class Script:
    """A probe environment: environment b's episode lasts lengths[b] steps; what it shows tells where it comes from."""

    n_agents, n_actions, obs_dim, state_dim = 2, 3, 3, 2

    def __init__(self, lengths, limit=6, void=()):
        self.lengths, self.n_envs, self.episode_limit = torch.tensor(lengths), len(lengths), limit
        self.device, self.generator, self.resets, self.void = torch.device("cpu"), torch.Generator(), 0, void

    def reset(self):
        self.t, self.resets = 0, self.resets + 1
        return self.look()

    def step(self, actions):
        assert self.t < self.episode_limit
        self.t += 1
        return self.look()

    def look(self):
        ids = torch.arange(self.n_envs) + 100 * self.resets
        obs = torch.stack([ids, torch.full_like(ids, self.t), ids * 0], -1).float()[:, None].repeat(1, 2, 1)
        avail = torch.ones(self.n_envs, 2, 3, dtype=torch.bool)
        avail[:, 0, self.t % 3] = False
        over = self.t >= self.lengths
        info = dict(battle_won=over & (ids % 2 == 0))
        if self.void:
            info["void"] = torch.tensor([b in self.void for b in range(self.n_envs)])
        return Step(obs, obs[:, 0, :2].clone(), avail, ids + self.t / 10, over & (self.lengths < self.episode_limit),
                    over & (self.lengths == self.episode_limit), info)

    def close(self):
        pass


def play_random(env, seed=0):
    agent = qmix.Agent(env.obs_dim, env.n_actions, env.n_agents, 8)
    generator = torch.Generator().manual_seed(seed)
    return qmix.rollout(env, lambda step, memory: qmix.act(agent, step.obs, step.avail, memory, torch.ones(1, 1),
                                                              generator))


def test_rollout_stores_what_happened_and_masks_the_rest():
    """Catches: an end off by one, padding counted in returns or lengths, an action or reward stored a step away."""
    episodes, lengths, facts = play_random(Script([2, 6, 1, 4]))
    assert lengths.tolist() == [2, 6, 1, 4]
    for b, length in enumerate([2, 6, 1, 4]):
        assert episodes["obs"][b, :length + 1, 0, 1].tolist() == list(range(length + 1))
        assert facts["return"][b].item() == pytest.approx(sum(100 + b + t / 10 for t in range(1, length + 1)))
        assert episodes["terminated"][b, :length].tolist() == [False] * (length - 1) + [length < 6]
        assert facts["battle_won"][b] == (b % 2 == 0)
    assert episodes["avail"].gather(-1, torch.nn.functional.pad(episodes["actions"], (0, 0, 0, 1)).unsqueeze(-1))[
        :, :-1].all()  # no unavailable action was taken
    episodes, lengths, facts = play_random(Script([2, 6, 1, 4], void=(1, 2)))
    assert lengths.tolist() == [2, 4] and facts["return"].shape == (2,)
    assert episodes["obs"][:, 0, 0, 0].tolist() == [100, 103]


def test_replay_rows_carry_their_id_through_wrap_around_and_overfill(capsys):
    """Catches: rows torn apart between tensors, sampling with replacement or beyond what is filled, a wrong oldest."""
    env, generator = Script([2, 6, 1, 4]), torch.Generator().manual_seed(0)
    replay = qmix.Replay(env, 6, torch.device("cpu"))
    assert replay.bytes == sum(value.nbytes for value in replay.data.values()) and "MiB" in capsys.readouterr().out
    for rounds in range(1, 4):
        episodes, lengths, _ = play_random(env)
        replay.add(episodes, lengths)
        newest = [100 * r + b for r in range(1, rounds + 1) for b in range(4)][-6:]
        batch = replay.sample(6, generator)
        assert len(replay) == min(6, 4 * rounds) and sorted(batch["obs"][:, 0, 0, 0].tolist()) == newest
        assert batch["lengths"].tolist() == sorted(batch["lengths"].tolist(), reverse=True)
        for i, name in enumerate(batch["obs"][:, 0, 0, 0].tolist()):
            length = [2, 6, 1, 4][int(name) % 4]
            assert batch["filled"][i].sum() == length == batch["lengths"][i] and batch["filled"][i, :length].all()
            assert (batch["obs"][i, :length + 1, :, 0] == name).all()
            assert (batch["state"][i, :length + 1, 0] == name).all()
            assert batch["reward"][i, :length].tolist() == pytest.approx([name + t / 10 for t in range(1, length + 1)])
            assert batch["terminated"][i, length - 1] == (length < 6)
    tiny = qmix.Replay(env, 3, torch.device("cpu"))  # one round is more than it holds
    tiny.add(*play_random(env)[:2])
    assert sorted(tiny.sample(3, generator)["obs"][:, 0, 0, 0].tolist()) == [401, 402, 403]
    short = qmix.Replay(Script([2, 1]), 2, torch.device("cpu"))
    short.add(*play_random(Script([2, 1]))[:2])
    assert short.sample(2, generator)["filled"].shape == (2, 2)  # cut to the longest
    again = qmix.Replay(env, 6, torch.device("cpu"))
    again.load_state_dict(replay.state_dict())
    one, other = (r.sample(6, torch.Generator().manual_seed(1)) for r in (replay, again))
    assert torch.equal(one.pop("lengths"), other.pop("lengths"))
    filled = one["filled"]
    assert all(torch.equal(one[k][:, :6][filled], other[k][:, :6][filled]) for k in one) and again.added == replay.added


def test_replay_that_cannot_fit_is_refused():
    """Catches: the out-of-memory kill an hour into the run."""
    with pytest.raises(UsageError, match="needs .* GiB"):
        qmix.Replay(envs.make("checkers"), 10**8, torch.device("cpu"))


@pytest.mark.parametrize("sizes", [dict(n_agents=1), dict(n_actions=1), dict(episode_limit=1)])
@pytest.mark.parametrize("algo", LEARNERS)
def test_one_agent_one_action_one_step(algo, sizes):
    """Catches: a squeeze() too many."""
    sizes = SimpleNamespace(**vars(SIZES) | sizes)
    team, T = make_team(small(algo), sizes).double(), sizes.episode_limit
    batch = random_batch([T, 1], ["truncated", "terminated"], sizes)
    loss, _ = qmix.td_loss(team, team, batch, 0.99)
    loss.backward()
    assert loss.isfinite() and loss.shape == ()


# ----------------------------------------------------------------------------------------------------------- whole runs


def tiny(tmp_path, name="run", **given):
    """A run of about a second."""
    return qmix.Config(**dict(env="checkers", total_steps=4000, num_envs=4, batch_size=4, buffer_size=12, hidden_dim=8,
                              mixing_dim=4, hypernet_dim=4, test_interval_steps=1000, threads=1, checkpoint_seconds=0.0,
                              device="cpu", epsilon_finish=0.5, episodes_per_update=2.0, target_update_episodes=40,
                              target_tau=0.0, lr_anneal=False, out=str(tmp_path / name)) | given)


TIMES = ("seconds", "env_steps_per_second", "share_env", "share_act", "share_learn")


def metrics(out):
    """metrics.csv without the columns that depend on the clock, as text: equal means bit for bit."""
    lines = [line.split(",") for line in (Path(out) / "metrics.csv").read_text().splitlines()]
    assert tuple(lines[0]) == qmix.COLUMNS
    return [[cell for name, cell in zip(lines[0], line) if name not in TIMES] for line in lines]


def test_same_seed_same_numbers_other_seed_other_numbers(tmp_path):
    """Catches: --seed parsed and never used, or anything random that it does not reach."""
    runs = [qmix.train(tiny(tmp_path, name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    a, b, c = (metrics(tmp_path / name) for name in "abc")
    assert a == b and a != c and runs[0]["updates"] > 20
    facts = {k: v for k, v in runs[0].items() if k not in ("seconds", "out")}
    assert facts == {k: v for k, v in runs[1].items() if k not in ("seconds", "out")}
    assert set(runs[0]) == {"env", "algo", "seed", "env_steps", "episodes", "updates", "seconds", "test_return",
                            "test_win_rate", "best_test_return", "out"}
    assert float(a[-1][a[0].index("test_return")]) == runs[0]["test_return"] and int(a[-1][0]) == runs[0]["env_steps"]
    one, other = (qmix.Run(tiny(tmp_path, env="skirmish:3m", seed=seed)) for seed in (1, 2))
    assert not any(torch.equal(p, q) for p, q in zip(one.team.parameters(), other.team.parameters()))
    assert not any(torch.equal(one.generators[k].get_state(), other.generators[k].get_state()) for k in one.generators)


def test_a_run_that_stops_after_every_move_equals_one_that_never_stops(tmp_path):
    """Catches: anything that a checkpoint forgets: a generator, a counter, the ring's place, the optimiser, a mean."""

    def moves(run, again):
        while True:
            if run.updates_due() > 0:
                run.learn(1)
            elif run.test_due():
                run.test()
            elif run.finished():
                return run
            else:
                run.play()
            if again:
                qmix.write_checkpoint(tmp_path / "c.pt", run.state_dict)
                run = qmix.Run(run.cfg)
                run.load_state_dict(qmix.read_checkpoint(tmp_path / "c.pt"))

    for algo in ("qmix", "iql"):
        cfg = tiny(tmp_path, algo=algo, optimizer="adam" if algo == "iql" else "rmsprop", total_steps=1500,
                   target_update_episodes=6)
        one, other = moves(qmix.Run(cfg), False), moves(qmix.Run(cfg), True)
        for here, there in zip(one.rows, other.rows):
            assert {k: v for k, v in here.items() if k not in TIMES} == {k: there[k] for k in here if k not in TIMES}
        assert one.counts == other.counts and one.counts["updates"] > 5
        for here, there in ((one.team, other.team), (one.target_team, other.target_team)):
            assert all(torch.equal(value, there.state_dict()[name]) for name, value in here.state_dict().items())


def start(*arguments):
    command = [sys.executable, str(HERE / "qmix.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)


def flags(cfg):
    for name, value in vars(cfg).items():
        if value == ():  # env_args
            continue
        yield f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        if not isinstance(value, bool):
            yield str(value)


def test_killed_runs_resume_exactly(tmp_path):
    """Catches: a half-written checkpoint, rows written twice or lost, SIGTERM or Ctrl-C that lose the run."""
    cfg = tiny(tmp_path, total_steps=20_000)
    whole = qmix.train(tiny(tmp_path, "whole", total_steps=20_000))
    process = start(*flags(cfg))
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        while process.poll() is None and not (tmp_path / "run" / "checkpoint.pt").exists():
            time.sleep(0.01)
        written = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
        while process.poll() is None and (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns == written:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], err
        assert "Traceback" not in err
        process = start("--resume", tmp_path / "run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    facts = json.loads(out.splitlines()[-1].removeprefix("result: "))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole") and facts["updates"] == whole["updates"]
    assert {file.name for file in (tmp_path / "run").iterdir() if "tfevents" not in file.name} == {
        "config.json", "metrics.csv", "checkpoint.pt", "best.pt"}


@pytest.mark.parametrize("algo", LEARNERS)
def test_everything_moves_and_targets_are_copied_on_the_count(tmp_path, algo):
    """Catches: mixer parameters missing from the optimiser, a target copied always, never or on the wrong episodes."""
    run = qmix.Run(tiny(tmp_path, algo=algo, episodes_per_update=2.0, target_update_episodes=6, buffer_size=64))
    before = {name: value.clone() for name, value in run.team.named_parameters()}
    for _ in range(6):
        run.play()
    assert run.updates_due() == (24 - 4) // 2 + 1
    copies = []
    for _ in range(run.updates_due()):
        run.learn(1)
        same = all(torch.equal(a, b) for a, b in zip(run.team.parameters(), run.target_team.parameters()))
        copies.append(same)
    assert copies == [n % 3 == 0 for n in range(1, 12)]  # 3 updates are 6 episodes
    assert run.updates_due() == 0
    still = [name for name, value in run.team.named_parameters() if torch.equal(value, before[name])]
    assert not still


def test_a_run_explores_by_its_environment_steps(tmp_path):
    """Catches: epsilon counted in episodes or updates, or evaluation that explores."""
    run = qmix.Run(tiny(tmp_path, epsilon_finish=0.0, epsilon_spread=0.0, epsilon_anneal_steps=1000, num_envs=8))
    greedy = run.test()["test_return"]
    run.play()
    assert len(set(run.returns)) > 4  # at step 0 all is random
    run.returns, run.counts["env_steps"], run.counts["episodes"] = [], 1000, 0
    run.play()
    assert run.returns == [pytest.approx(greedy)] * 8


def test_soft_target_moves_by_its_share(tmp_path):
    """Catches: --target-tau that nothing reads, or that moves the live networks instead."""
    run = qmix.Run(tiny(tmp_path, target_tau=0.25, target_update_episodes=1))
    run.play()
    run.learn(1)
    start, moved = qmix.Run(run.cfg).team.state_dict(), 0
    for name, live in run.team.state_dict().items():
        torch.testing.assert_close(run.target_team.state_dict()[name], 0.75 * start[name] + 0.25 * live)
        moved += not torch.equal(live, start[name])
    assert moved > 5


def test_lr_anneal_and_reward_scale_reach_the_learner(tmp_path):
    """Catches: an option that nothing reads."""
    run = qmix.Run(tiny(tmp_path, lr=1e-3, lr_anneal=True, reward_scale=0.0 + 1e-3))
    run.play()
    for env_steps, lr in ((3000, 0.55e-3), (2000, 1e-3)):
        run.counts["env_steps"] = env_steps
        run.learn(1)
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-3)
    big = qmix.Run(tiny(tmp_path, lr=1e-3, reward_scale=1.0))
    big.play()
    big.learn(1)
    assert big.stats[0][0] > 5 * run.stats[0][0]


def test_nan_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    """Catches: a run that goes on with NaN weights and saves them over the good ones."""
    cfg = tiny(tmp_path, total_steps=1000)
    qmix.train(cfg)
    number = qmix.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["counts"]["updates"] + 1
    real = qmix.td_loss
    monkeypatch.setattr(qmix, "td_loss", lambda *a: (real(*a)[0] * math.nan, real(*a)[1]))
    code = qmix.main(["--resume", cfg.out, "--total-steps", "3000", "--device", "cpu"])
    assert code == 1 and f"update {number}:" in capsys.readouterr().err
    kept = qmix.read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert kept["counts"]["updates"] == number - 1 and all(w.isfinite().all() for w in kept["team"].values())


@pytest.mark.parametrize("algo", LEARNERS)
def test_two_step_game_comes_out_as_in_the_paper(tmp_path, algo, capsys):
    """Catches: wrong representational power: Table 2, Table 6 and the loss plateaus that theory gives exactly."""
    facts = qmix.train(qmix.Config(env="two-step", algo=algo, seed=7, out=str(tmp_path / "run"), device="cpu"))
    assert facts["test_return"] == (8 if algo in ("qmix", "qmix-ns") else 7)
    table = metrics(tmp_path / "run")
    loss = np.mean([float(line[table[0].index("loss")]) for line in table[-3:]])
    plateau = {"qmix": 0, "qmix-ns": 0, "iql": 1.945}.get(algo, 0.5625)
    assert loss == pytest.approx(plateau, rel=0.1, abs=0.01)
    if algo == "qmix":
        paper = {"1": [[6.93, 6.93], [7.92, 7.92]], "2A": [[7, 7], [7, 7]], "2B": [[0, 1], [1, 8]]}  # Table 2
        for state, rows in paper.items():
            np.testing.assert_allclose(facts["q_tot"][state], rows, atol=0.1)


BUILT_IN = ["two-step", "checkers", "checkers-v1", "checkers-v2", "checkers-v3",
            *(f"skirmish:{name}" for name in envs.SKIRMISHES)]


@pytest.mark.parametrize("algo, env", [
    *itertools.product([*LEARNERS, "random", "heuristic"], ["two-step", "checkers", "skirmish:2s3z"]),
    *(("qmix", env) for env in BUILT_IN if env not in ("two-step", "checkers", "skirmish:2s3z"))])
def test_smoke(tmp_path, algo, env):
    """Catches: a smoke run that never updates; every algorithm on every built-in environment."""
    cfg = tiny(tmp_path, env=env, algo=algo, total_steps=300, test_interval_steps=300, test_episodes=1,
               episodes_per_update=4.0)
    if algo == "heuristic" and not env.startswith("skirmish"):
        with pytest.raises(UsageError, match="heuristic"):
            qmix.train(cfg)
        return
    facts = qmix.train(cfg)
    assert facts["env_steps"] >= 300 and math.isfinite(facts["test_return"])
    assert facts["updates"] == 0 if algo in ("random", "heuristic") else facts["updates"] >= 1


# ------------------------------------------------------------------------------------------- bad input, evaluation, use


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cfg = tiny(tmp_path_factory.mktemp("trained"), total_steps=1000)
    qmix.train(cfg)
    return cfg.out


@pytest.mark.parametrize("arguments, word", [
    ("--env nowhere", "two-step"), ("--algo ppo", "qmix-lin"), ("--env checkers-v9", "checkers"), ("--nope 3", "nope"),
    ("--lr nan", "lr"), ("--lr -1", "lr"), ("--lr fast", "lr"), ("--gamma 1.5", "gamma"), ("--num-envs 0", "num-envs"),
    ("--total-steps 1.5", "total-steps"), ("--seed -1", "seed"), ("--epsilon-start 2", "epsilon-start"),
    ("--epsilon-spread 0.001", "epsilon-finish"),
    ("--batch-size 9999", "buffer-size"), ("--buffer-size 100000000", "GiB"), ("--device cuda:77", "cuda"),
    ("--device tpu", "tpu"), ("--algo heuristic", "heuristic"), ("--optimizer sgd", "adam"), ("--lr", "lr"),
    ("--resume /nowhere", "/nowhere"), ("--evaluate /nowhere", "/nowhere"), ("--record x.gif", "--evaluate"),
    ("--resume a --evaluate b", "exclude"), ("--cuda False", "cuda"), ("stray", "stray"), ("--out /dev/null/x", "null"),
    ("--evaluate {run} --episodes 0", "episodes"), ("--evaluate {run} --record x.mp4", ".gif"),
    ("--evaluate {run} --record nowhere/x.gif", "folder that exists"),
    ("--evaluate {run} --env two-step", "trained with"), ("--evaluate {run} --lr 1", "lr"),
    ("--resume {run} --lr 1", "lr"), ("--out {run}", "already holds a run")])
def test_bad_input_is_one_line_and_code_2(trained, capsys, arguments, word, tmp_path, monkeypatch):
    """Catches: a traceback, a silent default, a run directory overwritten."""
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in Path(trained).iterdir()}
    assert qmix.main(arguments.format(run=trained).split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and word in err
    assert {file: file.read_bytes() for file in Path(trained).iterdir()} == before and not list(tmp_path.iterdir())


def test_what_learns_nothing_cannot_be_evaluated_as_if_it_did(tmp_path, capsys):
    """Catches: greedy episodes of untrained weights under the name of the random policy or the heuristic."""
    cfg = tiny(tmp_path, algo="random", total_steps=200)
    qmix.train(cfg)
    assert qmix.main(["--evaluate", cfg.out]) == 2 and "learns nothing" in capsys.readouterr().err


def test_help_shows_the_defaults_of_the_environment(capsys):
    """Catches: Checkers' preset shown as everyone's."""
    for env, steps in (("two-step", 10_000), ("smac:3m", 2_000_000)):
        with pytest.raises(SystemExit) as leaving:
            qmix.main(["--env", env, "--help"])
        assert not leaving.value.code
        assert f"(default: {steps})" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_run_goes_on_where_the_generators_are_of_another_kind(tmp_path):
    """Catches: a run from a GPU that a CPU cannot resume (a CUDA generator's state has 16 bytes)."""
    run = qmix.Run(tiny(tmp_path))
    run.play()
    saved, again = run.state_dict(), qmix.Run(run.cfg)
    saved["generators"]["explore"] = torch.zeros(16, dtype=torch.uint8)
    again.load_state_dict(saved)
    same = [torch.equal(again.generators[k].get_state(), run.generators[k].get_state()) for k in run.generators]
    assert same == [True, False, True]  # env, explore, sample
    again.play()
    assert len(again.replay) == 2 * len(run.replay)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("damage", "missing truncated empty foreign malicious sizes config".split())
def test_bad_checkpoints(trained, tmp_path, capsys, monkeypatch, damage):
    """Catches: a pickle that runs code, a traceback from a damaged file, a resume that starts anew without a word."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "checkpoint.pt"):
        (run / name).write_bytes((Path(trained) / name).read_bytes())
    file = run / "checkpoint.pt"
    if damage == "missing":
        file.unlink()
    elif damage in ("truncated", "empty"):
        file.write_bytes(file.read_bytes()[:1000 if damage == "truncated" else 0])
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, file)
    elif damage == "malicious":
        torch.save({"format": "qmix.py 1", "team": Bomb()}, file)
    elif damage == "sizes":
        content = qmix.read_checkpoint(file)
        content["team"]["agent.fc1.weight"] = torch.zeros(3, 3)
        torch.save(content, file)
    else:
        (run / "config.json").write_text("[]")
    codes = [] if damage == "missing" else [qmix.main(["--resume", str(run)])]
    codes += [] if damage == "config" else [qmix.main(["--evaluate", str(run)])]
    assert set(codes) == {2} and not (tmp_path / "exploded").exists()
    err = capsys.readouterr().err
    assert err.count("\n") == len(codes) and "Traceback" not in err


def test_a_run_directory_in_use_is_refused(trained, capsys):
    """Catches: two processes that write one checkpoint."""
    import fcntl
    lock = os.open(trained, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert qmix.main(["--resume", trained]) == 2 and "in use" in capsys.readouterr().err
    os.close(lock)


def test_evaluate_record_and_act_need_the_agents_alone(trained, tmp_path, capsys):
    """Catches: a policy that peeks at the state or the mixer, acts otherwise than training's evaluation did, or draws
    nothing."""
    assert qmix.main(["--evaluate", trained, "--episodes", "3", "--record", str(tmp_path / "demo.gif")]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("result: "))
    table = metrics(trained)
    assert facts["test_return"] == pytest.approx(float(table[-1][table[0].index("test_return")]))
    assert (tmp_path / "demo.gif").read_bytes()[:6] == b"GIF89a"
    assert qmix.main(["--evaluate", trained, "--episodes", "3", "--num-envs", "1"]) == 0  # such as games of StarCraft
    assert json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("result: ")) == facts
    policy, env = qmix.load(trained), envs.make("checkers", n_envs=2)
    assert not any(isinstance(value, (qmix.QMIX, qmix.Replay, qmix.Team)) for value in vars(policy).values())
    step, hidden, total = env.reset(), None, 0.0
    for _ in range(100):
        actions, hidden = policy.act(step.obs[0].numpy(), step.avail[0].numpy(), hidden)  # one team, (N, O)
        assert actions.shape == (2,)
        step = env.step(actions.expand(2, 2))
        total += step.reward[0].item()
        if step.terminated[0] or step.truncated[0]:
            break
    assert total == pytest.approx(facts["test_return"], abs=1e-3)
    with pytest.raises(UsageError, match="expected obs"):
        policy.act(torch.zeros(3, 47), torch.ones(3, 5))


def test_import_needs_torch_and_numpy_only():
    """Catches: an import at the top that those who copy the file would have to install."""
    names = ["tyro", "tqdm", "tensorboard", "matplotlib", "smac", "gym", "ma_gym"]
    code = f"import sys; sys.modules.update(dict.fromkeys({names})); import qmix; sys.exit(qmix.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 2 and "pip install tyro" in done.stderr and done.stderr.count("\n") == 1


def test_presets_and_explicit_values():
    """Catches: a preset that beats what the user said, or a typo in a setting that is silently ignored."""
    assert qmix.Config(env="checkers").lr == qmix.PRESETS["checkers"]["lr"]
    assert qmix.Config(env="checkers", lr=5e-4).lr == 5e-4 and qmix.Config(env="smac:3m").lr == 5e-4
    assert qmix.parse(["--env", "two-step", "--mixing-dim", "9"]).config.mixing_dim == 9
    assert qmix.parse(["--env", "two-step"]).config.buffer_size == 500
    assert qmix.Config(env="checkers-v3").lr == qmix.PRESETS["checkers"]["lr"]
    assert qmix.Config(env="checkers_mine:Game").lr == qmix.Config(env="skirmisher:Game").lr == 5e-4
    with pytest.raises(UsageError, match="unknown setting"):
        qmix.Config(batchsize=3)


# -------------------------------------------------------------------------------------------------- speed and memory


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, HERE / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bench_compares_equal_updates():
    """Catches: a learner that is fast because it computes something else (the losses are compared inside)."""
    bench = load_script("bench")
    sizes = dict(n_agents=2, n_actions=3, obs_dim=4, state_dim=5, T=20)
    found = bench.compare_learners(sizes, torch.device("cpu"), share=0.4)
    assert len(found) == 4 and min(found.values()) > 0


@pytest.mark.parametrize("env, algo", [("skirmish:3m", "qmix"), ("checkers-v2", "iql"), ("two-step", "vdn")])
def test_what_a_cuda_graph_records_gives_the_same_numbers(env, algo):
    """Catches: a constant that changes later (epsilon, the batch, the learning rate), a state outside of the graph's
    fixed places, an uncut batch that is not masked. Nothing is recorded here, but the places are the graph's."""
    runs = [qmix.Run(qmix.Config(env=env, algo=algo, num_envs=4, batch_size=6, buffer_size=20, episodes_per_update=2,
                                 device="cpu", total_steps=1500, lr_anneal=True)) for _ in range(2)]
    runs[1].record()
    while not runs[0].finished():
        for run in runs:
            run.learn(run.updates_due()) if run.updates_due() > 0 else run.play()
    one, other = ({k: v for k, v in run.test().items() if k not in TIMES and v is not None} for run in runs)
    assert one["updates"] == other["updates"] > 3 and runs[1].update.calls == one["updates"]
    assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_compile_says_on_a_cpu_that_it_cannot(capsys):
    """Catches: a flag that fails, or that does nothing and says nothing."""
    run = qmix.Run(small(compile=True, device="cpu"))
    assert "--compile" in capsys.readouterr().out and run.update is None


def test_replay_says_how_many_bytes_it_holds(capsys):
    """Catches: a figure that forgets a tensor, a row or a dtype (at most 5 % off)."""
    replay = qmix.Replay(envs.make("skirmish:3m", 1), 50, torch.device("cpu"))
    told = float(capsys.readouterr().out.split(", ")[1].split(" MiB")[0]) * 2**20
    held = sum(data.untyped_storage().nbytes() for data in (*replay.data.values(), replay.lengths))
    assert told == pytest.approx(held, rel=0.05) and replay.bytes == pytest.approx(held, rel=0.05)


# ------------------------------------------------------------------------------------------------- several processes


def start_ranks(arguments, tmp_path):
    """Two processes as torchrun starts them; `arguments` follow `python`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(2):
        more = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with open(tmp_path / f"out{rank}", "w") as out, open(tmp_path / f"err{rank}", "w") as err:
            yield subprocess.Popen([sys.executable, *map(str, arguments)], stdout=out, stderr=err, cwd=HERE,
                                   env=os.environ | {name: str(value) for name, value in more.items()})


def halves():
    """The episodes of rank 0 and of rank 1, with a different number of steps."""
    return (random_batch([7, 2, 5], ["truncated", "terminated", "terminated"], seed=1),
            random_batch([7, 1], ["terminated", "truncated"], seed=2))


def be_a_rank(folder):
    """What each of two processes does in the test below."""
    with qmix.process_group():
        team, target, cfg = make_team(small()).double(), make_team(small(), seed=5).double(), small(grad_clip=1.0)
        stats = qmix.gradient_step(team, target, qmix.make_optimizer(team, cfg), halves()[qmix.rank()], cfg)
        run = qmix.Run(qmix.Config(env="skirmish:3m", num_envs=2, batch_size=3, buffer_size=8, device="cpu", threads=1))
        while run.counts["updates"] < 4:
            run.learn(run.updates_due()) if run.updates_due() > 0 else run.play()
        torch.save(dict(team=team.state_dict(), stats=stats, run=run.team.state_dict(), counts=run.counts,
                        replay=run.replay.data["obs"]), Path(folder) / f"{qmix.rank()}.pt")


def test_two_ranks_do_what_one_process_does_with_both_batches(tmp_path):
    """Catches: gradients that are summed or not weighted by steps, clipping before averaging, ranks that drift apart
    or that play the same episodes."""
    for process in [*start_ranks(["-c", f"import test_qmix; test_qmix.be_a_rank({str(tmp_path)!r})"], tmp_path)]:
        assert process.wait(120) == 0, (tmp_path / "err0").read_text() + (tmp_path / "err1").read_text()
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    team, target, cfg = make_team(small()).double(), make_team(small(), seed=5).double(), small(grad_clip=1.0)
    both = {name: torch.cat(parts) for name, *parts in zip(halves()[0], *(half.values() for half in halves()))}
    stats = qmix.gradient_step(team, target, qmix.make_optimizer(team, cfg), both, cfg)
    assert stats[1] > 1.0  # or clipping would not show
    torch.testing.assert_close([one["stats"], *one["team"].values()], [stats, *team.state_dict().values()])
    assert one["counts"] == other["counts"] and one["counts"]["episodes"] == 4 * (one["counts"]["episodes"] // 4)
    assert all(torch.equal(one["run"][name], other["run"][name]) for name in one["run"])
    assert not torch.equal(one["replay"], other["replay"])


def test_rank_0_alone_writes_and_a_dead_rank_ends_the_run(tmp_path):
    """Catches: two writers of one file, results printed twice, a rank that waits forever for one that is gone."""
    flags = "qmix.py --env two-step --device cpu --checkpoint-seconds 0 --out".split()
    for process in [*start_ranks([*flags, tmp_path / "run", "--total-steps", 2000], tmp_path)]:
        assert process.wait(120) == 0, (tmp_path / "err0").read_text() + (tmp_path / "err1").read_text()
    facts = json.loads((tmp_path / "out0").read_text().splitlines()[-1].removeprefix("result: "))
    assert facts["env_steps"] == 2000 and facts["episodes"] == 1000 and facts["updates"] == (500 - 32) / 2 + 1
    assert (tmp_path / "out1").read_text() == (tmp_path / "err1").read_text() == ""
    for victim in (1, 0):
        out = tmp_path / f"dies{victim}"
        processes = [*start_ranks([*flags, out, "--total-steps", 10**9], tmp_path)]
        while not (out / "checkpoint.pt").exists():
            assert processes[0].poll() is None
            time.sleep(0.1)
        processes[victim].kill()
        assert processes[1 - victim].wait(60) == 1
        lines = (tmp_path / f"err{1 - victim}").read_text().strip().splitlines()
        assert "another process of this run has ended" in lines[-1] and not any("Traceback" in line for line in lines)
        assert processes[victim].wait(60) == -signal.SIGKILL
        qmix.read_checkpoint(out / "checkpoint.pt")


# ------------------------------------------------------------------------------------------------- the reader's own


def readme_block(word):
    """The first Python block of README.md that contains `word`."""
    blocks = (HERE / "README.md").read_text().split("```python\n")[1:]
    return next(block.split("```")[0] for block in blocks if word in block)


def test_readme_own_environment_runs_as_printed(tmp_path, monkeypatch, capfd):
    """Catches: an example that does not run, --env-args that do not arrive, voided or lost columns."""
    (tmp_path / "mygame.py").write_text(readme_block("class Meet"))
    monkeypatch.chdir(tmp_path)
    code = qmix.main("--env mygame:Meet --env-args size=3 --num-envs 2 --total-steps 60 --batch-size 4 --buffer-size 8 "
                     "--test-episodes 2 --test-interval-steps 60 --out run --device cpu".split())
    out, err = capfd.readouterr()
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1].removeprefix("result: "))
    assert facts["updates"] > 0 and metrics("run")[-1][-1] == "0"
    assert qmix.main(["--evaluate", "run", "--episodes", "2", "--env-args", "size=2"]) == 0
    assert qmix.main(["--env", "mygame:Meet", "--env-args", "size", "--out", "other"]) == 2
    assert "key=value" in capfd.readouterr().err


def test_readme_python_lines_run(tmp_path, monkeypatch):
    """Catches: README lines for other projects that have drifted from the code."""
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(readme_block("qmix.load").replace("total_steps=50_000", "total_steps=200"), scope)
    assert scope["actions"].shape == (1, 2) and scope["facts"]["env_steps"] >= 200
    assert scope["step"].terminated.item() or scope["env"].steps.item() == 100


def test_readme_names_every_flag_with_its_default():
    """Catches: a flag that was added, renamed, explained or given another default without its line in README.md."""
    text = (HERE / "README.md").read_text()
    source = (HERE / "qmix.py").read_text()
    for field in qmix.dataclasses.fields(qmix.Config):
        default = '""' if field.default == "" else field.default
        line = next(line for line in text.splitlines() if line.startswith(f"| `--{field.name.replace('_', '-')}` |"))
        assert line.split(" | ")[1] == f"`{default}`", field.name
        assert f'    {field.name}: {field.type} = ' in source and f'"""{line.split(" | ")[2][:-2]}"""' in source


def test_gathered_runs_are_kept_apart(tmp_path):
    """Catches: one run gathered twice, or a run with other flags drawn among those of the preset."""
    pytest.importorskip("matplotlib")
    plot, folders = load_script("plot"), []
    for i, given in enumerate((dict(seed=1), dict(seed=2, out="x", threads=3), dict(seed=1, lr=0.5, double_q=False))):
        folders.append(tmp_path / str(i))
        folders[i].mkdir()
        config = qmix.dataclasses.asdict(qmix.Config(env="checkers", **given))
        (folders[i] / "config.json").write_text(json.dumps(dict(config=config)))
        qmix.write_metrics(folders[i] / "metrics.csv", [dict.fromkeys(qmix.COLUMNS, 10 * i + j) for j in range(3)])
    plot.gather(tmp_path / "all.csv", folders)
    runs = plot.read(tmp_path / "all.csv")
    assert list(runs) == [("checkers", "qmix", seed, flags) for seed, flags in
                          (("1", ""), ("2", ""), ("1", "--lr 0.5 --no-double-q"))]
    assert [list(run["loss"]) for run in runs.values()] == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    with pytest.raises(SystemExit, match="second run of checkers qmix 1"):
        plot.gather(tmp_path / "twice.csv", [folders[0], folders[0]])
    assert not (tmp_path / "twice.csv").exists()


def test_readme_has_the_results_of_the_csvs():
    """Catches: figures drawn again from new runs, and README's tables left as they were."""
    pytest.importorskip("matplotlib")
    plot, text = load_script("plot"), (HERE / "README.md").read_text()
    found = {(env.removeprefix("skirmish:"), algo): results for name in ("checkers.csv", "skirmish.csv")
             for env, algo, flags, _, results, *_ in plot.table(name) if not flags}
    for algo in LEARNERS:
        assert f"\n| {algo} | {found['checkers', algo]} |" in text
    rows = [(env, "iql vdn qmix") for env in ("3m", "2s3z", "3s5z", "1c3s5z")]
    for env, algos in [*rows, ("3s5z", "qmix vdn-s qmix-lin qmix-ns")]:
        assert f"\n| {env} | {' | '.join(found[env, algo] for algo in algos.split())} |" in text
    assert len(found) == len(LEARNERS) + 4 * 3 + 3  # and in the CSVs nothing else, nor with other flags
    assert not any(flags for name in ("checkers.csv", "skirmish.csv") for _, _, flags, *_ in plot.table(name))


def test_a_game_that_keeps_failing_ends_the_run_with_a_checkpoint(tmp_path, monkeypatch, capfd):
    """Catches: an endless loop over a broken game, a traceback, or a run that is lost with it."""
    (tmp_path / "broken.py").write_text(readme_block("class Meet").replace(
        "self.steps += 1", "import os; self.steps += 1 if not os.path.exists('broken') else os._exit(1)"))
    monkeypatch.chdir(tmp_path)
    flags = "--num-envs 1 --total-steps 90 --batch-size 4 --buffer-size 8 --test-interval-steps 60 --test-episodes 1"
    monkeypatch.setattr(qmix.Run, "test", lambda run, test=qmix.Run.test: (test(run), Path("broken").touch())[0])
    assert qmix.main(["--env", "broken:Meet", "--out", "run", "--device", "cpu", *flags.split()]) == 1
    err = capfd.readouterr().err
    assert "in a row" in err and "Traceback" not in err and (tmp_path / "run" / "checkpoint.pt").exists()
