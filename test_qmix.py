"""Each test names the mistake it would catch and compares with something independent of the code it tests."""

import contextlib
import copy
import gc
import importlib.util
import itertools
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import qmix
from qmix import UsageError, envs

torch.set_num_threads(1)
HERE = Path(__file__).parent
LEARNERS = sorted(qmix.MIXERS)
SIZES = SimpleNamespace(obs_dim=5, state_dim=6, n_actions=4, n_agents=3, episode_limit=7)

def small(algo="qmix", **given):
    return qmix.Config(env="two-step", algo=algo, **dict(hidden_dim=8, mixing_dim=4, hypernet_dim=8) | given)

def scatter(team, std):
    """Weights far from the gentle initial ones, so that mistakes show in what is chosen."""
    for parameter in team.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return team

def make_team(cfg, sizes=SIZES, seed=0, std=0.7):
    torch.manual_seed(seed)
    return scatter(qmix.Team(sizes, cfg).double(), std)

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

def same(here, there):
    """Equal to the last bit: tensors, numbers, texts, and what is made of them."""
    if isinstance(here, dict):
        return here.keys() == there.keys() and all(same(value, there[name]) for name, value in here.items())
    if isinstance(here, (list, tuple)):
        return len(here) == len(there) and all(map(same, here, there))
    return torch.equal(here, there) if isinstance(here, torch.Tensor) else here == there

# ------------------------------------------------------------------------------------------------------- mathematics
@pytest.mark.parametrize("algo, hypernet_dim", [*itertools.product(LEARNERS, [8]), ("qmix", 0), ("qmix-lin", 0)])
def test_mixers_are_monotone_and_joint_argmax_is_the_agents_own(algo, hypernet_dim):
    """Catches: a forgotten |.|, a non-monotone activation: Eq. 5 by autograd, Eq. 4 (Theorem 1) by brute force."""
    mixer = make_team(small(algo, hypernet_dim=hypernet_dim), std=2.0).float().mixer
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

    def layers(self, name, x):
        """One linear layer, or two with a ReLU between them."""
        if f"{name}.0.weight" in self.w:
            return self.layers(f"{name}.2", np.maximum(self.layers(f"{name}.0", x), 0))
        return self.w[name + ".weight"] @ x + self.w[name + ".bias"]

    def agent(self, obs, actions, agent):
        """Q (T+1, A) of one agent over one episode: Cho et al.'s GRU in PyTorch's convention."""
        A, H = self.w["agent.fc2.weight"].shape
        N = self.w["agent.fc1.weight"].shape[1] - obs.shape[1] - A
        h, rows = np.zeros(H), []
        for t in range(len(obs)):
            last = np.eye(A)[actions[t - 1]] if t else np.zeros(A)
            x = np.maximum(self.layers("agent.fc1", np.concatenate([obs[t], last, np.eye(N)[agent]])), 0)
            x_r, x_z, x_n = np.split(self.w["agent.gru.weight_ih_l0"] @ x + self.w["agent.gru.bias_ih_l0"], 3)
            h_r, h_z, h_n = np.split(self.w["agent.gru.weight_hh_l0"] @ h + self.w["agent.gru.bias_hh_l0"], 3)
            z, n = 1 / (1 + np.exp(-x_z - h_z)), np.tanh(x_n + h_n / (1 + np.exp(-x_r - h_r)))
            h = (1 - z) * n + z * h
            rows.append(self.layers("agent.fc2", h))
        return np.array(rows)

    def mix(self, q, s):
        elu = lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)  # noqa: E731
        v = self.layers("mixer.v", s) if self.algo in ("vdn-s", "qmix-lin", "qmix") else [0.0]
        if self.algo == "iql":
            return q
        if self.algo in ("vdn", "vdn-s"):
            return [sum(q) + v[0]]
        if self.algo == "qmix-lin":
            return [abs(self.layers("mixer.w", s)) @ q + v[0]]
        if self.algo == "qmix-ns":
            hidden = elu(abs(self.w["mixer.hidden.weight"]) @ q + self.w["mixer.hidden.bias"])
            return [abs(self.w["mixer.final.weight"][0]) @ hidden + self.w["mixer.final.bias"][0]]
        hidden = elu(q @ abs(self.layers("mixer.w1", s)).reshape(len(q), -1) + self.layers("mixer.b1", s))
        return [abs(self.layers("mixer.w2", s)) @ hidden + v[0]]

def slow_loss(team, target, batch, algo, gamma, double_q, lam):
    """Eq. 6 with plain loops over episodes and steps; an episode is cut at its end, so padding cannot matter. Returns
    the loss, and the means of Q_tot and of the targets."""
    live, old, q_tot, targets = SlowTeam(team, algo), SlowTeam(target, algo), [], []
    for b in range(len(batch["filled"])):
        x = {name: value[b].numpy() for name, value in batch.items()}
        T, N = int(x["filled"].sum()), x["actions"].shape[1]
        q, q_old = ([net.agent(x["obs"][:T + 1, a], x["actions"][:, a], a) for a in range(N)] for net in (live, old))
        values, y = [None], None  # values[t]: what the target network thinks of step t
        for t in range(1, T + 1):
            best = [max(np.flatnonzero(x["avail"][t, a]), key=(q if double_q else q_old)[a][t].__getitem__)
                    for a in range(N)]
            values.append(np.array(old.mix(np.array([q_old[a][t][best[a]] for a in range(N)]), x["state"][t])))
        for t in reversed(range(T)):
            if x["terminated"][t]:
                y = x["reward"][t] + 0 * values[T]
            elif t == T - 1:  # truncated
                y = x["reward"][t] + gamma * values[T]
            else:
                y = x["reward"][t] + gamma * ((1 - lam) * values[t + 1] + lam * y)
            q_tot += list(live.mix(np.array([q[a][t][x["actions"][t, a]] for a in range(N)]), x["state"][t]))
            targets += list(y)
    return np.mean(np.square(np.subtract(q_tot, targets))), np.mean(q_tot), np.mean(targets)

@pytest.mark.parametrize("algo, double_q, lam, hypernet_dim, sizes", [
    *((algo, True, 0.0, 8, {}) for algo in LEARNERS), ("qmix", False, 0.0, 8, {}), ("qmix", True, 0.6, 8, {}),
    ("iql", True, 1.0, 8, {}), ("qmix", True, 0.0, 0, {}),
    *itertools.product(LEARNERS, [True], [0.3], [8], [dict(n_agents=1), dict(n_actions=1), dict(episode_limit=1)])])
def test_td_loss_equals_slow_loop(algo, double_q, lam, hypernet_dim, sizes):
    """Catches: a target started at s' with an empty memory, axes mixed up or squeezed away, a mask on the wrong axis, a
    bootstrap over the end or none over a time limit, unavailable actions in the maximum, padding that leaks in."""
    cfg, plain, sizes = small(algo, hypernet_dim=hypernet_dim), not sizes, SimpleNamespace(**vars(SIZES) | sizes)
    team, target = make_team(cfg, sizes), make_team(cfg, sizes, seed=1)
    lengths = [7, 3, 1, 19, 16, 2] if sizes.episode_limit > 1 else [1] * 6  # not sorted
    batch = random_batch(lengths, ["truncated", "terminated", "terminated"] * 2, sizes)
    loss, means = qmix.td_loss(team, target, batch, 0.9, double_q, lam)
    slow = slow_loss(team, target, batch, algo, 0.9, double_q, lam)
    assert [loss.item(), means["q_taken"].item(), means["target"].item()] == [pytest.approx(x, rel=1e-10) for x in slow]
    other = slow_loss(team, target, batch, algo, 0.9, not double_q, lam)
    assert not plain or abs(other[0] - slow[0]) > 1e-3 * slow[0]  # these weights tell double Q from the plain maximum

@pytest.mark.parametrize("double_q", [True, False], ids=["double", "plain"])
@pytest.mark.parametrize("mixer", ["qmix-2", "qmix-1", "vdn", "iql"])  # -2, -1: layers of the hyper-networks
def test_one_update_equals_the_authors_code(mixer, double_q):
    """Catches what departs unintended from the authors' PyMARL: order of inputs, last action shifted, a mask misread,
    bootstrap off by one, a gradient through the target, another mean, clip or step."""
    data = np.load(HERE / "testdata" / "pymarl.npz")  # from github.com/oxwhirl/pymarl at c971afd
    batch = {name[6:]: torch.from_numpy(data[name]) for name in data.files if name.startswith("batch/")}
    cfg = qmix.Config(algo=mixer.split("-")[0], hidden_dim=8, mixing_dim=4, hypernet_dim=8 if mixer == "qmix-2" else 0,
                      env="smac:3m", double_q=double_q)  # everything else as the authors have it
    team, target_team = qmix.Team(SIZES, cfg), qmix.Team(SIZES, cfg)
    for which, net in [("live", team), ("target", target_team)]:
        keys = [key for key in data.files if key.startswith((f"{which}/all/", f"{which}/{mixer}/"))]
        weights = {key.split("/")[-1]: torch.from_numpy(data[key]) for key in keys}
        net.load_state_dict(weights, strict=True)
    optimizer, case = qmix.make_optimizer(team, cfg), f"{mixer}/{'double' if double_q else 'plain'}"
    numbers = qmix.gradient_step(team, target_team, optimizer, batch, cfg)  # loss, grad_norm, q_taken, target
    after = torch.cat([team.state_dict()[name].flatten() for name in weights])
    for ours, name in ((numbers, "numbers"), (after, "after")):
        torch.testing.assert_close(ours, torch.from_numpy(data[f"{case}/{name}"]), rtol=1e-5, atol=1e-6)

def test_a_long_unroll_is_its_single_steps_and_what_is_over_is_left_out():
    """Catches: memory dropped between pieces of an unroll, (B, N) laid out as (N, B), an agent alone with another's id;
    of `running`: a row too few, rows of another episode, or no work saved at all."""
    lengths, found = [16, 40, 1, 33, 17, 32, 15], []  # not sorted; 41 rows
    batch, team = random_batch(lengths, ["terminated"] * 7), make_team(small())
    obs, last = batch["obs"], F.pad(batch["actions"], (0, 0, 1, 0), value=-1)
    whole, memory = team.agent(obs, last)
    hidden, alone = None, [None] * 3
    for t in range(41):
        q, hidden = team.agent(obs[:, t:t + 1], last[:, t:t + 1], hidden)
        torch.testing.assert_close(q, whole[:, t:t + 1])
        for a in range(3):
            own, alone[a] = team.agent(obs[:, t:t + 1, [a]], last[:, t:t + 1, [a]], alone[a], agents=[a])
            torch.testing.assert_close(own, q[:, :, [a]])
    torch.testing.assert_close(hidden, memory)
    team.agent.register_forward_hook(lambda *call: found.append(call[-1][0]))
    qmix.td_loss(team, team, batch, 0.9)
    for q, (b, length) in itertools.product(found, enumerate(lengths)):
        torch.testing.assert_close(q[b, :length + 1], whole[b, :length + 1])
    assert len(found) == 2 and all((q[6, 16:] == 0).all() for q in found)

def test_epsilon_greedy_draws_per_agent_over_available_actions():
    """Catches: one epsilon draw for the whole team, exploration over unavailable actions, a biased choice, a greedy
    choice that takes what is not available for 0."""
    B, draw = 40_000, torch.Generator().manual_seed(0)
    values = torch.tensor([9.0, -1.0, -5.0, -7.0])  # action 0 looks best but is not available; all others are below 0
    agent = lambda obs, last, hidden, agents: (values.expand(*obs.shape[:3], -1), 1)  # noqa: E731
    obs, avail = torch.zeros(B, 2, 1), torch.tensor([False, True, True, True]).expand(B, 2, 4)
    actions, (hidden, last) = qmix.act(agent, obs, avail, None, torch.tensor([[0.5]]), draw)
    assert (actions > 0).all() and hidden == 1 and last is actions
    share = torch.stack([(actions == u).float().mean(0) for u in (1, 2, 3)])  # (3, N)
    torch.testing.assert_close(share, torch.tensor([[2 / 3], [1 / 6], [1 / 6]]).expand(3, 2), atol=0.01, rtol=0)
    both = ((actions == 1).all(-1)).float().mean().item()
    assert both == pytest.approx(4 / 9, abs=0.01)  # independent; one draw for the team would give (1 + 1/9) / 2 = 0.56
    each, _ = qmix.act(agent, obs, avail, None, torch.tensor([[0.0], [0.6]]).repeat(B // 2, 1), draw)
    assert (qmix.act(agent, obs, avail)[0] == 1).all()  # greedy
    assert (each[0::2] == 1).all() and (each[1::2] > 1).float().mean().item() == pytest.approx(0.4, abs=0.01)

def test_epsilon_falls_by_steps_and_is_drawn_per_agent_and_episode(tmp_path, monkeypatch):
    """Catches: a schedule counted in episodes, that overshoots or starts anywhere but at the start; with a spread, one
    epsilon for a whole team or a whole run."""
    draws, seen = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]), []  # equal steps in the exponent
    for steps, start, finish, spread, shares in (
            (0, 0.9, 0.1, 0, [0.9] * 4), (500, 0.9, 0.1, 0, [0.5] * 4), (1000, 0.9, 0.1, 0, [0.1] * 4),
            (10**9, 0.9, 0.1, 0, [0.1] * 4), (500, 0.1, 0.5, 0, [0.3] * 4),
            (10**6, 1, 0.01, 0.27, [0.01, 0.03, 0.09, 0.27]), (900, 1, 0.01, 0.27, [0.109, 0.109, 0.109, 0.27])):
        cfg = qmix.Config(epsilon_start=start, epsilon_finish=finish, epsilon_spread=spread, epsilon_anneal_steps=1000)
        run = SimpleNamespace(cfg=cfg, counts=dict(env_steps=steps, episodes=7, updates=7))
        torch.testing.assert_close(qmix.Run.epsilon(run, draws), torch.tensor(shares))
    run = qmix.Run(tiny(tmp_path, num_envs=64, buffer_size=64, epsilon_start=0, epsilon_finish=1e-2, epsilon_spread=1))
    monkeypatch.setattr(run, "choose", lambda epsilon, choose=run.choose: seen.append(epsilon) or choose(epsilon))
    run.play()
    run.play()
    assert seen[0].shape == (64, 2) and len(seen[0].unique()) == 128 and not torch.equal(seen[0], seen[1])
    assert abs(torch.corrcoef(torch.cat(seen[:2]).log().T)[0, 1]) < 0.3  # of one team

def test_gradient_step_does_what_the_settings_say():
    """Catches: an option that nothing reads: gamma, td_lambda, double_q, reward_scale, grad_clip, optimizer, lr."""
    batch, seen = random_batch([7, 3, 5], ["truncated", "truncated", "terminated"]), []
    for given in (dict(), dict(gamma=0.5), dict(td_lambda=0.6), dict(double_q=False), dict(reward_scale=2.0),
                  dict(grad_clip=1e-3), dict(optimizer="adam"), dict(optimizer="adam", lr=0.1)):
        cfg = small(**dict(gamma=0.9, grad_clip=1e3, optimizer="rmsprop", lr=0.01) | given)
        team, target, fresh = (make_team(cfg, seed=seed) for seed in (0, 1, 0))
        scaled = batch | {"reward": batch["reward"] * given.get("reward_scale", 1)}
        how = given.get("gamma", 0.9), given.get("double_q", True), given.get("td_lambda", 0.0)
        loss, means = qmix.td_loss(fresh, target, scaled, *how)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in fresh.parameters()])
        numbers = qmix.gradient_step(team, target, qmix.make_optimizer(team, cfg), batch, cfg)
        torch.testing.assert_close(numbers, torch.stack([loss.detach(), gradient.norm(), *means.values()]))
        gradient *= min(1.0, given.get("grad_clip", 1e3) / gradient.norm().item())
        below = 0.1 * gradient.abs() + 1e-5 if "optimizer" not in given else gradient.abs() + 1e-8
        before, after = (torch.nn.utils.parameters_to_vector(net.parameters()) for net in (fresh, team))
        step = given.get("lr", 0.01) * gradient / below  # the first of RMSprop, alpha 0.99, and of Adam in closed form
        torch.testing.assert_close(after, before - step, rtol=1e-5, atol=1e-7)
        seen.append(after)
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(seen, 2))

# --------------------------------------------------------------------------------------------- replay, rollout, acting
class Script:
    """A probe: environment b's episode lasts lengths[b] steps; those of environments 1 and 3 are cut off there. What it
    shows tells where it comes from. Rewards: pay[n] * (b + 1) in the n-th episode, else they name b and t. In the n-th
    episode, n in `broken`, the game fails."""
    n_envs, n_agents, n_actions, obs_dim, state_dim, episode_limit, voided = 4, 2, 3, 3, 2, 6, 7
    device, lengths, void = torch.device("cpu"), torch.tensor([2, 6, 1, 4]), torch.zeros(4, dtype=torch.bool)
    pay, broken, resets, closed = None, (), 0, 0

    def __init__(self, **given):
        vars(self).update(given)

    def reset(self):
        self.t, self.resets = 0, self.resets + 1
        return self.look()

    def step(self, actions):
        assert self.t < max(self.lengths)
        self.t += 1
        if self.resets in self.broken:
            raise envs.EnvFailure("the game failed 10 times in a row")
        return self.look()

    def look(self):
        b, t, cut = torch.arange(4), torch.full((4,), self.t), torch.tensor([False, True, False, True])
        ids, ending = b + 100 * self.resets, t == self.lengths
        obs = torch.stack([ids, t, ids * 0], -1).float()[:, None].repeat(1, 2, 1)
        avail = (torch.arange(3) != t[:, None, None] % 3) | torch.tensor([[False], [True]])  # (B, N, A)
        reward = ids + t / 10 if self.pay is None else self.pay[self.resets] * (b + 1.0)
        info = dict(battle_won=(t >= self.lengths) & (b != 1), dead_allies=t, dead_enemies=10 - t, void=self.void)
        return envs.Step(obs, obs[:, 0, :2].clone(), avail, torch.where(t > self.lengths, 1e6, reward), ending & ~cut,
                         ending & cut, info)

    def close(self):
        self.closed += 1

def play_random(env):
    agent, draw = qmix.Agent(env.obs_dim, env.n_actions, env.n_agents, 8), torch.Generator().manual_seed(0)
    return qmix.rollout(env, lambda step, memory: qmix.act(agent, step.obs, step.avail, memory, torch.ones(1, 1), draw))

def test_rollout_stores_what_happened_and_masks_the_rest():
    """Catches: an end off by one, padding counted in returns or lengths, an action or reward stored a step away, a
    truncation before the limit that is ignored or stored as an end, steps played on after everyone's end."""
    for limit in (6, 9):  # 9: everything is over earlier, and the probe refuses further steps
        episodes, facts = play_random(Script(episode_limit=limit))
        assert facts["length"].tolist() == [2, 6, 1, 4]
        for b, length in enumerate([2, 6, 1, 4]):
            assert episodes["filled"][b].tolist() == [True] * length + [False] * (6 - length)
            assert episodes["obs"][b, :length + 1, 0, 1].tolist() == list(range(length + 1))
            assert episodes["state"][b, :length + 1, 1].tolist() == list(range(length + 1))
            assert facts["return"][b].item() == pytest.approx(sum(100 + b + t / 10 for t in range(1, length + 1)))
            assert episodes["terminated"][b, :length].tolist() == [False] * (length - 1) + [b in (0, 2)]
            assert facts["battle_won"][b] == (b != 1) and facts["dead_allies"][b] == length
    assert episodes["avail"][:, :-1].gather(-1, episodes["actions"].unsqueeze(-1)).all()  # nothing unavailable was done
    episodes, facts = play_random(Script(void=torch.tensor([False, True, True, False])))
    assert facts["length"].tolist() == [2, 4] and facts["return"].shape == (2,) and "void" not in facts
    assert episodes["obs"][:, 0, 0, 0].tolist() == [100, 103] and all(len(value) == 2 for value in episodes.values())

def test_replay_rows_carry_their_id_through_wrap_around():
    """Catches: rows torn apart between tensors, sampling with replacement or what was never filled, a wrong oldest."""
    env, generator = Script(), torch.Generator().manual_seed(0)
    replay = qmix.Replay(env, 6, torch.device("cpu"))
    for count in range(1, 5):
        env.lengths = torch.tensor([2, 6, 1, 4] if count < 4 else [1, 1, 3, 1])
        replay.add(play_random(env)[0])
        newest = [100 * r + b for r in range(1, count + 1) for b in range(4)][-6:]
        batch = replay.sample(6, generator)
        assert len(replay) == min(6, 4 * count) and sorted(batch["obs"][:, 0, 0, 0].tolist()) == newest
        longest, found = 6 if count < 4 else 4, batch["filled"].sum(1).tolist()
        assert found == sorted(found, reverse=True)
        assert batch["filled"].shape == (len(replay), longest) and batch["obs"].shape[1] == longest + 1  # cut
        for i, name in enumerate(batch["obs"][:, 0, 0, 0].tolist()):
            length = ([1, 1, 3, 1] if name >= 400 else [2, 6, 1, 4])[int(name) % 4]
            assert batch["filled"][i].tolist() == [True] * length + [False] * (longest - length)
            assert (batch["obs"][i, :length + 1, :, 0] == name).all()
            assert (batch["state"][i, :length + 1, 0] == name).all()
            assert batch["reward"][i, :length].tolist() == pytest.approx([name + t / 10 for t in range(1, length + 1)])
            assert batch["terminated"][i, length - 1] == (name % 2 == 0)
            assert batch["avail"][i, :length].gather(-1, batch["actions"][i, :length].long().unsqueeze(-1)).all()
    seen = [replay.sample(1, generator)["obs"][:, 0, 0, 0].tolist() for _ in range(50)]
    assert len({name for name, in seen}) == 6  # each has its turn
    wide = qmix.Replay(SimpleNamespace(**vars(SIZES) | dict(n_actions=40_000)), 1, torch.device("cpu"))
    assert wide.data["actions"].fill_(39_999).long().max() == 39_999

@pytest.mark.parametrize("lack", ["machine", "container", "allocation"])
def test_replay_that_cannot_fit_is_refused(monkeypatch, capsys, lack):
    """Catches: the out-of-memory kill an hour into the run; a container's limit, or a failed allocation, not seen."""
    if lack == "container":
        monkeypatch.setattr(Path, "read_text", lambda path: {"/sys/fs/cgroup/memory.max": "1000"}[str(path)])
    if lack == "allocation":
        monkeypatch.setattr(torch, "zeros", Mock(side_effect=RuntimeError("can't allocate memory\nException from ...")))
    with pytest.raises(UsageError, match="--buffer-size .* [0-9,.]+ GiB") as caught:
        qmix.Replay(Script(), 10**10 if lack == "machine" else 1000, torch.device("cpu"))
    told = 10**10 if lack == "machine" else 1000  # times 7 rows of 8 floats and 6 bools, 6 of 2 + 4 + 1 + 1 bytes
    assert f"{told * (7 * 38 + 6 * 8) / 2**20:,.1f} MiB" in capsys.readouterr().out and "\n" not in str(caught.value)

def test_actions_are_what_the_network_says_of_each_agents_history(tmp_path):
    """Catches: memory reset at each step or kept over episodes, in training or in evaluation; a last action that is
    never told, or is 0 instead of none at the first step; one agent's history shown to another."""
    run = qmix.Run(tiny(tmp_path, env="skirmish:3m", num_envs=8, epsilon_start=0.0, epsilon_finish=0.0))
    scatter(run.team, 0.5)
    run.play()
    run.play()
    for episodes in (run.replay.sample(8, run.generators["sample"]), qmix.rollout(run.env, run.choose())[0]):
        obs, actions, filled = episodes["obs"], episodes["actions"].long(), episodes["filled"]
        last = F.pad(actions, (0, 0, 1, 0), value=-1)
        none, zero = torch.full_like(last, -1), last.clamp(min=0)
        empty = torch.cat([run.team.agent(obs[:, [t]], last[:, [t]])[0] for t in range(obs.shape[1])], 1)
        said = [q.masked_fill(~episodes["avail"], -math.inf).argmax(-1)[:, :-1][filled] for q in (
            run.team.agent(obs, last)[0], empty, run.team.agent(obs, none)[0], run.team.agent(obs, zero)[0])]
        assert torch.equal(said[0], actions[filled])
        assert not any(torch.equal(other, said[0]) for other in said[1:])  # these weights tell the mistakes apart

# ----------------------------------------------------------------------------------------------------------- whole runs
def tiny(tmp_path, name="run", **given):
    """A run of about a second."""
    return qmix.Config(**dict(env="checkers", total_steps=4000, num_envs=4, batch_size=4, buffer_size=12, hidden_dim=8,
                              mixing_dim=4, hypernet_dim=4, test_interval_steps=1000, threads=1, checkpoint_seconds=0,
                              device="cpu", epsilon_finish=0.5, episodes_per_update=2, target_update_episodes=40,
                              target_tau=0, epsilon_spread=0, lr_anneal=False, test_episodes=4,
                              out=tmp_path / name) | given)

def flags(cfg):
    for name, value in vars(cfg).items():
        if value != ():  # env_args
            yield f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            yield from () if isinstance(value, bool) else [str(value)]

def main(*arguments):
    """qmix.main's exit code, whichever way it leaves; the handlers of signals are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return qmix.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return leaving.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def start(*arguments, script=HERE / "qmix.py", **more):
    more = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE) | more
    return subprocess.Popen([sys.executable, *map(str, (script, *arguments))], **more)

def saved(out, name="checkpoint.pt"):
    return torch.load(Path(out) / name, weights_only=True)

def metrics(out):
    """metrics.csv as text without the column that depends on the clock: equal means bit for bit."""
    lines = [line.split(",") for line in (Path(out) / "metrics.csv").read_text().splitlines()]
    return [[cell for name, cell in zip(lines[0], line) if name != "seconds"] for line in lines]

def result(text):
    return json.loads(text.splitlines()[-1].removeprefix("result: "))

def test_same_seed_same_numbers_other_seed_other_numbers(tmp_path):
    """Catches: --seed parsed and never used, anything random that it does not reach, a missing last evaluation."""
    runs = [qmix.train(tiny(tmp_path, name, seed=1 + (name == "c"), test_interval_steps=1500)) for name in "abc"]
    a, b, c = (metrics(tmp_path / name) for name in "abc")
    assert a == b and a != c and runs[0]["updates"] > 15
    assert runs[0] | dict(seconds=0, out="") == runs[1] | dict(seconds=0, out="") and " ".join(runs[0]) == (
        "env algo seed env_steps episodes updates seconds test_return test_win_rate best_test_return best_known out")
    assert float(a[-1][a[0].index("test_return")]) == runs[0]["test_return"] and runs[0]["best_known"] == 86.26
    steps = [int(line[0]) for line in a[1:]]
    assert steps[0] == 0 and steps[-1] == runs[0]["env_steps"] >= 4000 and len(steps) == 4
    one, other = (qmix.Run(tiny(tmp_path, env="skirmish:3m", seed=seed)) for seed in (1, 2))
    assert not any(torch.equal(p, q) for p, q in zip(one.team.parameters(), other.team.parameters()))
    assert set(one.generators) == {"explore", "sample", "env"} and not any(
        torch.equal(one.generators[k].get_state(), other.generators[k].get_state()) for k in one.generators)

@pytest.mark.parametrize("given", [dict(total_steps=2400, target_update_episodes=6), dict(
    total_steps=700, env="skirmish:3m", algo="iql", optimizer="adam", target_tau=0.1, epsilon_spread=0.9)])
def test_a_run_that_stops_after_every_round_equals_one_that_never_stops(tmp_path, given):
    """Catches: anything that a checkpoint forgets: a generator, a counter, the ring's place, the optimiser, a mean."""
    whole = qmix.train(tiny(tmp_path, "whole", test_interval_steps=500, **given))
    cfg = tiny(tmp_path, test_interval_steps=500, **given)
    for count in range(40):  # bounded: a run whose counters are lost never ends
        if facts := qmix.train(cfg, resume=count > 0, stop=iter([False, True]).__next__):
            break
    assert count > 3 and facts["updates"] == whole["updates"] > 5
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    once, often = saved(tmp_path / "whole"), saved(tmp_path / "run")
    assert all(same(once[k], often[k]) for k in set(once) - {"config", "seconds", "rows"})

def test_killed_runs_resume_exactly(tmp_path):
    """Catches: a half-written checkpoint, rows written twice or lost, a signal that loses what was played."""
    cfg, checkpoint = tiny(tmp_path, total_steps=8000), tmp_path / "run" / "checkpoint.pt"
    whole = qmix.train(tiny(tmp_path, "whole", total_steps=8000))
    process = start(*flags(cfg))
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        for _ in range(2):  # the first one, then one more
            written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == written):
                time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in err, err
        process = start("--resume", tmp_path / "run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole") and result(out)["updates"] == whole["updates"]
    assert {file.name for file in (tmp_path / "run").iterdir() if "tfevents" not in file.name} == {
        "config.json", "metrics.csv", "checkpoint.pt", "best.pt"}

@pytest.mark.parametrize("signals, env_steps, code", [
    ({"SIGTERM": 0.0, "SIGINT": 0.05}, 13, 143), ({"SIGHUP": 0.0}, 13, 129), ({"SIGINT": 0.0, "SIGTERM": 1.9}, 13, 130),
    ({"SIGINT": 0.0, "SIGHUP": 0.05, "SIGTERM": 2.1}, 0, 143)])
def test_a_signal_asks_for_a_checkpoint_and_repeats_belong_to_it(tmp_path, monkeypatch, signals, env_steps, code):
    """Catches: a second SIGTERM of `timeout` or `uv run`, or a SIGHUP, that loses the run; a later one not obeyed."""
    now, real = [0.0], time.monotonic

    class Signalled(Script):
        def step(self, actions):
            for name, now[0] in signals.items() if self.resets == 2 and self.t == 0 else ():
                signal.raise_signal(getattr(signal, name))
            return super().step(actions)
    monkeypatch.setattr(time, "monotonic", lambda: real() + now[0])
    monkeypatch.setattr(qmix, "make_env", lambda *_: Signalled())
    cfg = tiny(tmp_path, total_steps=1000, checkpoint_seconds=1e6)
    assert main(*flags(cfg)) == code and saved(cfg.out)["counts"]["env_steps"] == env_steps

@pytest.mark.parametrize("algo", LEARNERS)
def test_everything_moves_and_targets_follow_on_the_count(tmp_path, algo):
    """Catches: mixer parameters missing from the optimiser, a target copied always, never or on the wrong episodes, a
    soft step done twice or to the live networks, updates due too early or too often, lr_anneal that nothing reads."""
    run = qmix.Run(tiny(tmp_path, algo=algo, target_update_episodes=6, buffer_size=64, lr=1e-3, lr_anneal=True))
    copies, due, real = [], [], run.update_target
    vector = lambda net: torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()  # noqa: E731
    before = [parameter.detach().clone() for parameter in run.team.parameters()]

    def update_target():
        old = vector(run.target_team)
        real()
        new = vector(run.target_team)
        copies.append((torch.equal(new, old), torch.equal(new, vector(run.team))))
    run.update_target = update_target
    for env_steps, rate in ((1000, 1e-3), (3200, 0.46e-3), (9000, 0.1e-3)):  # of 4000
        run.play()
        run.counts["env_steps"] = env_steps
        due.append(run.updates_due())
        run.learn()
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-6)
    assert due == [1, 2, 2] and run.updates_due() == 0 and run.counts["updates"] == len(run.stats) == 5
    assert copies == [(n != 3, n == 3) for n in (1, 2, 3, 4, 5)]  # 3 updates are 6 episodes
    assert not any(map(torch.equal, run.team.parameters(), before))
    run.cfg.target_tau = 0.25  # from now on soft
    for _ in range(2):
        live, old = vector(run.team), vector(run.target_team)
        real()
        torch.testing.assert_close(vector(run.target_team), 0.75 * old + 0.25 * live)
        assert torch.equal(vector(run.team), live) and not torch.allclose(old, live)

def test_evaluation_is_greedy_as_long_as_asked_and_leaves_the_training_as_it_was(tmp_path):
    """Catches: an evaluation that explores, test episodes in the replay or among the counters, generators moved on,
    another number of episodes; training that explores by episodes or updates."""
    run = qmix.Run(tiny(tmp_path, epsilon_finish=0.0, epsilon_anneal_steps=1000, num_envs=8))
    run.play()
    assert len(set(run.returns)) > 4  # at step 0 all is random
    run.returns, run.counts["env_steps"], run.cfg.test_episodes = [], 1000, 8
    run.play()
    returns, run.cfg.epsilon_finish = run.returns, 0.9
    qmix.measure(run)
    assert returns == [pytest.approx(run.rows[0]["test_return"])] * 8 and run.rows[0]["test_return_std"] < 1e-4
    env = Script(pay=[0, 1.0, 10.0])
    found = qmix.greedy_episodes(env, lambda step, memory: (torch.zeros(4, 2, dtype=torch.int64), None), 6)
    returns = [2.0, 12.0, 3.0, 16.0, 20.0, 120.0]
    assert env.resets == 2 and found["test_return"] == pytest.approx(np.mean(returns))
    assert found["test_return_std"] == pytest.approx(np.std(returns)) and found["mean_length"] == 21 / 6
    for name, given in (("a", {}), ("b", dict(test_episodes=8)), ("c", dict(test_interval_steps=200))):
        qmix.train(tiny(tmp_path, name, env="skirmish:3m", total_steps=500, **given))
    a, b, c = (saved(tmp_path / name) for name in "abc")
    kept = set(a) - {"config", "seconds", "rows", "returns", "stats"}
    assert all(same(a[name], b[name]) and same(a[name], c[name]) for name in kept) and len(c["rows"]) > len(a["rows"])

def test_a_scripted_run_gives_a_table_known_in_advance(tmp_path, monkeypatch):
    """Catches: a column that is constant, swapped, not reset or taken from padding, variance for the deviation, a
    best.pt that holds the worst or the last or is judged by training, a config.json that does not say what ran."""
    env, numbers, shown = Script(pay=[0, 1.0, 0.0, 3.0, 9.0, 2.0]), itertools.count(1), set()  # tests: 1, 3, 5

    def gradient_step(team, *_):
        team.agent.fc2.bias.data.fill_(number := next(numbers))
        return torch.tensor([1.0, 2.0, 3.0, 4.0]) * number
    board = contextlib.nullcontext(SimpleNamespace(add_scalar=lambda *entry: shown.add(entry)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock(SummaryWriter=Mock(return_value=board)))
    monkeypatch.setattr(qmix, "make_env", lambda *_: env)
    monkeypatch.setattr(qmix, "gradient_step", gradient_step)
    qmix.train(tiny(tmp_path, total_steps=26, test_interval_steps=13, epsilon_anneal_steps=26))
    mean, std = np.mean([2, 12, 3, 16]), np.std([2, 12, 3, 16])  # 13 steps a round; updates: 1 after 4 episodes, then 2
    rows = [[0, 0, 0, 1.0, None, mean, std, 0.75, None, None, None, None, 13 / 4, 27 / 4, 7],
            [13, 4, 1, 0.75, 0.0, 3 * mean, 3 * std, 0.75, 1.0, 2.0, 3.0, 4.0, 13 / 4, 27 / 4, 7],
            [26, 8, 3, 0.5, 9 * mean, 2 * mean, 2 * std, 0.75, 2.5, 5.0, 7.5, 10.0, 13 / 4, 27 / 4, 7]]
    names = ("env_steps episodes updates seconds epsilon train_return test_return test_return_std test_win_rate loss "
             "grad_norm q_taken target dead_allies dead_enemies voided").split()
    table = metrics(tmp_path / "run")
    assert list(qmix.COLUMNS) == names and table[0] == names[:3] + names[4:]
    assert {entry for entry in shown if entry[0] != "seconds"} == {
        (name, float(cell), int(line[0])) for line in table[1:] for name, cell in zip(table[0], line) if cell}
    assert [[None if cell == "" else pytest.approx(float(cell)) for cell in line] for line in table[1:]] == rows
    assert (saved(tmp_path / "run", "best.pt")["team"]["agent.fc2.bias"] == 1).all() and env.closed == 1
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert told["config"]["out"] == str(tmp_path / "run") and set(told["versions"]) == {"python", "torch", "numpy"}

def test_what_a_checkpoint_does_not_hold_starts_anew(tmp_path, monkeypatch):
    """Catches: save_replay ignored, all missed updates due at once or none ever again; a run from a GPU that a CPU
    cannot resume (a CUDA generator's state has 16 bytes); all ranks with rank 0's episodes; the run's seconds lost."""
    run = qmix.Run(tiny(tmp_path, env="skirmish:3m", save_replay=False, batch_size=8))
    for _ in range(5):
        run.play()
        run.learn()
    content, again = copy.deepcopy(qmix.checkpoint(run)), qmix.Run(run.cfg)
    assert content["replay"] is None
    qmix.restore(again, content)
    assert len(again.replay) == 0 and again.counts == run.counts and run.counts["updates"] == 7
    for updates in (0, 1, 2, 2):  # as in a run that begins: one for the first 8 episodes, then one for every 2
        again.play()
        assert again.updates_due() == updates
        again.learn()
    states, run.cfg.save_replay = lambda run: {k: each.get_state() for k, each in run.generators.items()}, True
    content, again = qmix.checkpoint(run), qmix.Run(run.cfg)
    content["generators"]["explore"] = torch.zeros(16, dtype=torch.uint8)
    qmix.restore(again, content | {"seconds": 100.0})
    assert {name for name, state in states(run).items() if torch.equal(state, states(again)[name])} == {"sample", "env"}
    assert not torch.equal(states(again)["explore"], states(qmix.Run(run.cfg))["explore"])  # nor from its start
    assert 100 <= time.perf_counter() - again.began < 160 and len(again.replay) == len(run.replay) == 12
    monkeypatch.setattr(qmix, "RANK", 1)
    monkeypatch.setattr(qmix, "RANKS", 2)
    content, other = qmix.checkpoint(run), qmix.Run(run.cfg)
    known = states(run), states(other)
    qmix.restore(other, content)
    assert len(other.replay) == 0 and other.unlearned == 20 / 2 - 2.0 * run.counts["updates"]
    assert not any(torch.equal(states(other)[name], state) for each in known for name, state in each.items())

@pytest.mark.parametrize("broken, env_steps, said", [
    ([3], 13, "the game failed 10 times in a row"), ([4], 13, "the game failed 10 times in a row"),
    ([], 0, "the loss or its gradient is not finite before update 1; the last checkpoint is kept")],
    ids=["evaluation", "play", "nan"])
def test_what_fails_ends_the_run_with_a_good_checkpoint(tmp_path, monkeypatch, capsys, broken, env_steps, said):
    """Catches: a run lost with its game, or that goes on with NaN weights and saves them, an environment left open."""
    env, real = Script(pay=[1.0] * 9, broken=broken), qmix.td_loss  # episodes: test, play, test, play
    monkeypatch.setattr(qmix, "make_env", lambda *_: env)
    if not broken:
        monkeypatch.setattr(qmix, "td_loss", lambda *a: (real(*a)[0] * math.nan, real(*a)[1]))
    cfg = tiny(tmp_path, test_interval_steps=13, checkpoint_seconds=1e6 if broken else 0.0)
    assert main(*flags(cfg)) == 1 and capsys.readouterr().err == f"error: {said}\n" and env.closed == 1
    content = saved(cfg.out)
    assert content["counts"]["env_steps"] == env_steps and all(w.isfinite().all() for w in content["team"].values())

def test_nothing_of_a_run_outlives_it(tmp_path, monkeypatch):
    """Catches: a cycle that keeps the replays of a sweep alive, or an exception that does."""
    alive, init = [], qmix.Run.__init__
    monkeypatch.setattr(qmix.Run, "__init__", lambda run, cfg: (init(run, cfg), alive.extend(
        weakref.ref(part) for part in (run, run.replay, run.team)))[0])
    gc.collect()
    gc.disable()
    try:
        for count, name in enumerate(("run", "run", "other")):  # well, then a run that is there already, then NaN
            with contextlib.suppress(UsageError, qmix.TrainingFailed):
                assert not count == bool(qmix.train(tiny(tmp_path, name, total_steps=500)))
            assert len(alive) == 3 * count + 3 and not any(ref() for ref in alive)
            monkeypatch.setattr(qmix, "gradient_step", lambda *_: torch.full((4,), math.nan))
    finally:
        gc.enable()

@pytest.mark.parametrize("algo", LEARNERS)
def test_two_step_game_comes_out_as_in_the_paper(tmp_path, algo):
    """Catches: wrong representational power: the paper's returns, and the loss plateaus that theory gives exactly."""
    facts = qmix.train(qmix.Config(env="two-step", algo=algo, seed=7, out=str(tmp_path / "run"), device="cpu", lr=0.01,
                                   total_steps=4000, hidden_dim=32, target_update_episodes=50, test_interval_steps=500))
    assert facts["test_return"] == (8 if algo in ("qmix", "qmix-ns") else 7)
    table = metrics(tmp_path / "run")
    loss = np.mean([float(line[table[0].index("loss")]) for line in table[-3:]])  # 0: all of Table 2 is right
    assert loss == pytest.approx({"qmix": 0, "qmix-ns": 0, "iql": 1.945}.get(algo, 0.5625), rel=0.1, abs=0.01)

@pytest.mark.parametrize("algo, env", [
    *zip([*LEARNERS, "random", "heuristic"], itertools.cycle(["two-step", "checkers", "skirmish:2s3z"])),
    ("heuristic", "skirmish:2s3z"), *(("qmix", f"checkers-v{v}") for v in (1, 2, 3)),
    *(("qmix", f"skirmish:{name}") for name in ("5m", "8m", "5m_vs_6m", "3s5z", "1c3s5z"))])
def test_smoke(tmp_path, monkeypatch, algo, env):
    """Catches: a smoke run that never updates or is not compiled; every algorithm, every built-in environment."""
    monkeypatch.setattr(torch, "compile", compiled := Mock(side_effect=lambda step: step))
    cfg = tiny(tmp_path, env=env, algo=algo, total_steps=300, test_interval_steps=300, episodes_per_update=4.0,
               compile=algo == "iql")
    if algo == "heuristic" and not env.startswith("skirmish"):
        with pytest.raises(UsageError, match="heuristic"):
            qmix.train(cfg)
        return
    facts = qmix.train(cfg)
    assert facts["env_steps"] >= 300 and math.isfinite(facts["test_return"])
    assert facts["updates"] == 0 if algo in ("random", "heuristic") else facts["updates"] >= 1
    assert compiled.call_count == (algo == "iql")
    if algo == "random":  # and is evaluated as what it is
        assert metrics(cfg.out)[-1][6] not in ("", "0.0") and main("--evaluate", cfg.out) == 2

# ------------------------------------------------------------------------------------------- bad input, evaluation, use
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return qmix.train(tiny(tmp_path_factory.mktemp("trained"), env="skirmish:3m", total_steps=400))["out"]

@pytest.mark.parametrize("arguments, word", [
    ("--env nowhere", "two-step"), ("--algo ppo", "qmix-lin"), ("--env checkers-v9", "checkers"), ("--nope 3", "nope"),
    ("--lr nan", "lr"), ("--lr fast", "lr"), ("--lr", "lr"), ("--gamma 1.5", "gamma"), ("--num-envs 0", "num-envs"),
    ("--total-steps 1.5", "total-steps"), ("--seed -1", "seed"), ("--epsilon-spread 0.001", "epsilon-finish"),
    ("--epsilon-spread 0.5 --epsilon-finish 0", "epsilon-finish"), ("--batch-size 9999", "buffer-size"),
    ("--num-envs 5000", "buffer-size"), ("--buffer-size 100000000", "GiB"), ("--device cuda:77", "cuda"),
    ("--device tpu", "tpu"), ("--algo heuristic", "heuristic"), ("--cuda False", "cuda"), ("--double-q False", "False"),
    ("stray", "stray"), ("--resume /nowhere", "/nowhere"), ("--evaluate /nowhere", "/nowhere"),
    ("--record x.gif", "--evaluate"), ("--resume {run} --evaluate {run}", "exclude"), ("--out /dev/null/x", "null"),
    ("--evaluate {run} --episodes 0", "episodes"), ("--evaluate {run} --record x.mp4", ".gif"),
    ("--evaluate {run} --env two-step", "shape"), ("--evaluate {run} --lr 1", "lr"), ("--resume {run} --lr 1", "lr"),
    ("--out {run}", "already holds a run"), ("--env-args a=1 --env-args a=2", "a is given more than once")])
def test_bad_input_is_said_with_code_2(trained, capsys, arguments, word, tmp_path, monkeypatch):
    """Catches: a traceback, a silent default, a run directory overwritten."""
    monkeypatch.chdir(tmp_path)
    files = lambda: {file: file.read_bytes() for file in (*Path(trained).iterdir(), *tmp_path.iterdir())}  # noqa: E731
    before, code = files(), main(*arguments.format(run=trained).split())
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert code == 2 and word in err and "Traceback" not in err and files() == before

def test_numpys_numbers_and_paths_are_settings_like_others(tmp_path, monkeypatch, capsys):
    """Catches: a run that trains to its end and cannot be read back, True taken for 1, 1 for True, a name not known."""
    Own = type("Own", (Script,), dict(n_actions=np.int64(3), obs_dim=np.int32(3), n_agents=np.int64(2)))
    monkeypatch.setattr(qmix, "make_env", lambda *_: Own(pay=[1.0] * 99))
    cfg = tiny(tmp_path, lr=np.float64(1e-3), seed=np.int64(3), double_q=np.bool_(True), gamma=np.float32(0.5),
               algo=np.str_("vdn"), out=tmp_path / "run", total_steps=np.array(20), batch_size=torch.tensor(4))
    assert [type(vars(cfg)[name]) for name in "lr seed double_q gamma algo out total_steps batch_size".split()] == [
        float, int, bool, float, str, str, int, int]
    qmix.train(cfg)
    assert qmix.load(tmp_path / "run").config == qmix.load(str(tmp_path / "run" / "best.pt")).config == cfg
    assert main("--resume", cfg.out, "--total-steps", 60) == 0 and main("--evaluate", cfg.out, "--episodes", 2) == 0
    assert result(capsys.readouterr().out)["test_return"] == pytest.approx(7.0)
    for wrong in (dict(lr=True), dict(seed=1.0), dict(double_q=1), dict(env=3), dict(lr="1"), dict(lr=None),
                  dict(gamma=math.nan), dict(seed=2**63), dict(batchsize=3), dict(algo=["qmix"]),
                  *(dict(env_args=given) for given in (["a=1", "a=2"], ["a"], ["=1"], "a=1"))):
        with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", ".")):
            qmix.Config(**wrong)
    assert type(qmix.Config(lr=1).lr) is float

def test_what_is_given_beats_presets_and_arguments_add_up(capsys):
    """Catches: a preset that beats what the user said or reaches another's module, Checkers' preset in --help; all but
    the last --env-args lost, a key twice, a dict that is refused."""
    assert qmix.Config(env="checkers").lr == qmix.PRESETS["checkers"]["lr"] == qmix.Config(env="checkers-v3").lr == 2e-3
    assert qmix.Config(env="checkers", lr=5e-4).lr == qmix.Config(env="smac:3m").lr == 5e-4
    assert qmix.Config(env="skirmish:3m").td_lambda == qmix.PRESETS["skirmish"]["td_lambda"]
    given = qmix.parse(["--env=two-step", "--mixing-dim", "9"]).config
    assert given.mixing_dim == 9 and given.buffer_size == 500
    assert qmix.Config(env="checkers_mine:Game").lr == qmix.Config(env="skirmisher:Game").lr == 5e-4
    for env, steps in (("two-step", 10_000), ("smac:3m", 2_000_000)):
        assert not main("--env", env, "--help")
        assert f"(default: {steps})" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert qmix.parse("--env m:C --env-args a=1 b=x=y --lr 0.1 --env-args c=-2".split()).config == qmix.Config(
        env="m:C", lr=0.1, env_args=("a=1", "b=x=y", "c=-2"))
    for good in (dict(size=7, name="x"), ["size=7", "name=x"], ("size=7", "name=x")):
        assert qmix.Config(env="m:C", env_args=good).env_args == ("size=7", "name=x")

@pytest.mark.parametrize("damage", "missing truncated empty foreign malicious sizes config".split())
def test_bad_checkpoints(trained, tmp_path, capsys, monkeypatch, damage):
    """Catches: a pickle that runs code, a traceback from a damaged file, a resume that starts anew without a word,
    torch's colours and its advice to load without care."""
    monkeypatch.chdir(tmp_path)
    content, file = saved(trained), tmp_path / "run" / "checkpoint.pt"
    file.parent.mkdir()
    if damage == "sizes":
        content["team"]["agent.fc1.weight"] = torch.zeros(3, 3)
    content["config"] |= {"learning": 3} if damage == "config" else {}
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.system, ("touch exploded",))})()
    torch.save({"foreign": [torch.zeros(3)], "malicious": content | {"team": bomb}}.get(damage, content), file)
    kept = file.read_bytes()[:{"truncated": 1000, "empty": 0}.get(damage)]
    file.unlink() if damage == "missing" else file.write_bytes(kept)
    assert main("--resume", "run") == main("--evaluate", "run") == main("--evaluate", file) == 2
    assert not (tmp_path / "exploded").exists() and (damage == "missing" or kept == file.read_bytes())
    err = capsys.readouterr().err
    assert err.count("\n") == err.count("is not a usable checkpoint: ") == 3
    assert "\x1b" not in err and "weights_only" not in err

def test_a_run_directory_is_one_runs(trained, tmp_path, monkeypatch, capsys):
    """Catches: two processes that write one checkpoint, two runs of one second that share an automatic directory."""
    import fcntl
    lock = os.open(trained, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert main("--resume", trained) == 2 and "in use" in capsys.readouterr().err
    os.close(lock)
    monkeypatch.chdir(tmp_path)
    run = qmix.Run(tiny(tmp_path, out=""))
    with contextlib.ExitStack() as opened:
        one, other = (qmix.Folder(run, False, opened).path for _ in range(2))
    assert one != other and one.parent == other.parent == Path("runs") and (one / "checkpoint.pt").exists()

def test_evaluate_record_and_act_need_the_agents_alone(tmp_path, capsys, monkeypatch):
    """Catches: a policy that peeks at state or mixer or acts otherwise than training's evaluation did; no picture."""
    cfg, drawn = tiny(tmp_path, total_steps=1000), []
    monkeypatch.setattr(envs, "record", lambda env, choose, path: drawn.append(
        (qmix.rollout(env, choose)[1]["return"][0].item(), path)))
    qmix.train(cfg)
    assert main("--evaluate", cfg.out, "--episodes", 3, "--record", tmp_path / "demo.gif") == 0
    facts, table = result(capsys.readouterr().out), metrics(cfg.out)
    assert facts["test_return"] == pytest.approx(float(table[-1][table[0].index("test_return")]))
    assert facts["episodes"] == 3 and {"env", "algo", "test_return_std", "test_win_rate", "best_known"} < set(facts)
    assert drawn == [(pytest.approx(facts["test_return"]), tmp_path / "demo.gif")]
    assert main("--evaluate", cfg.out, "--episodes", 3, "--num-envs", 1) == 0  # such as games of StarCraft
    assert result(capsys.readouterr().out) == facts
    assert set(vars(qmix.load(cfg.out))) == {"agent", "config"}

def test_agents_each_alone_do_what_the_team_does(trained, tmp_path):
    """Catches: a policy that is not decentralised: an agent's choice that needs another's row, id or memory."""
    content = saved(trained)
    weights = scatter(qmix.Team(envs.make("skirmish:3m", 1), qmix.Config(**content["config"])), 1.0).state_dict()
    torch.save(content | {"team": weights}, tmp_path / "any.pt")
    policy, env, memory, alone, seen = qmix.load(tmp_path / "any.pt"), envs.make("skirmish:3m", 4, seed=3), None, {}, []
    step = env.reset()
    for _ in range(12):
        actions, memory = policy.act(step.obs, step.avail, memory)
        for b, a in itertools.product(range(4), range(3)):
            own, alone[b, a] = policy.act(step.obs[b, [a]].numpy(), step.avail[b, [a]].numpy(), alone.get((b, a)), [a])
            assert own.tolist() == [actions[b, a].item()]
        pair, alone["pair"] = policy.act(step.obs[:, [2, 0]], step.avail[:, [2, 0]], alone.get("pair"), [2, 0])
        team, alone["team"] = policy.act(step.obs[3].numpy(), step.avail[3].numpy(), alone.get("team"))  # (N, O)
        assert torch.equal(pair, actions[:, [2, 0]]) and torch.equal(team, actions[3])
        step, seen = env.step(actions), [*seen, actions]
    assert (torch.stack(seen).unique(dim=0).diff(dim=-1) != 0).any()

def test_act_refuses_what_it_cannot_use(trained):
    """Catches: action 0 for NaN or where there is no action, torch's errors for a memory of another size."""
    policy = qmix.load(trained)
    obs, avail = np.zeros((2, 3, policy.agent.obs_dim)), np.ones((2, 3, policy.agent.n_actions), bool)
    _, memory = policy.act(obs, avail)
    reverse, _ = policy.act(obs[::-1, :, ::-1], avail[::-1].astype(int).tolist(), memory)
    assert reverse.shape == (2, 3) and reverse.dtype == torch.int64
    none, nan = avail.copy(), obs.copy()
    none[1, 1], nan[1, 0, 3] = False, math.nan
    for bad in (dict(obs=nan), dict(obs=nan + math.inf), dict(avail=none), dict(avail=avail * math.nan),
                dict(avail=avail * -1e9), dict(obs=obs[0], avail=avail[0]), dict(obs=obs[..., 1:]), dict(obs=obs[:1]),
                dict(obs=obs[:, :1], avail=avail[:, :1]), dict(agents=[0]), dict(obs=np.array([[{}] * 3] * 2)),
                dict(obs=obs[:, :1], avail=avail[:, :1], agents=[0])):
        with pytest.raises(UsageError, match="Policy.act") as caught:
            policy.act(**dict(obs=obs, avail=avail, hidden=memory) | bad)
        assert "\n" not in str(caught.value)

# ------------------------------------------------------------------------------------------------------ surroundings
def test_import_needs_torch_and_numpy_and_the_file_beside_it_only(tmp_path, monkeypatch, capsys):
    """Catches: an import that a reader must install, a lock that only Unix has, another's `envs` taken for ours."""
    (tmp_path / "envs").mkdir()
    for file in ("qmix.py", "envs.py"):
        shutil.copy(HERE / file, tmp_path)
    (tmp_path / "envs" / "__init__.py").write_text("mine = True")
    for name in "tyro tqdm tensorboard torch.utils.tensorboard matplotlib smac gym fcntl qmix_envs".split():
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "envs", theirs := SimpleNamespace(mine=True))
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("qmix_copied", tmp_path / "qmix.py")
    monkeypatch.setitem(sys.modules, "qmix_copied", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    assert module.envs.__file__ == str(tmp_path / "envs.py") and sys.modules["envs"] is theirs
    facts = module.train(module.Config(**vars(tiny(tmp_path, total_steps=400))))
    assert facts["updates"] > 0 and module.load(facts["out"]).config.env == "checkers"
    assert "going on without a bar" in capsys.readouterr().out
    assert module.main([]) == 2 and "tyro" in (err := capsys.readouterr().err) and err.count("\n") == 1
    code = "import envs, qmix; from qmix import envs as ours; assert envs.mine and ours.make is qmix.envs.make"
    assert start(code, script="-c", cwd=tmp_path).wait(120) == 0

def test_a_full_disk_keeps_the_old_checkpoint_and_a_broken_tensorboard_is_gone_without(tmp_path, monkeypatch, capsys):
    """Catches: a traceback, a half-written file left behind, a good checkpoint lost; a run that fails with its log."""
    cfg, real, limit = tiny(tmp_path, total_steps=800), qmix.Run.play, resource.getrlimit(resource.RLIMIT_FSIZE)
    broken = Mock(SummaryWriter=Mock(side_effect=TypeError("Descriptors cannot be created.\nIf this call ...")))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", broken)
    qmix.train(cfg)
    assert "going on without TensorBoard: TypeError: Descriptors cannot be created.\n" in capsys.readouterr().out
    counts, size = saved(cfg.out)["counts"], Path(cfg.out, "checkpoint.pt").stat().st_size
    monkeypatch.setattr(qmix.Run, "play", lambda run: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1])), real(run)))
    try:
        code = main("--resume", cfg.out, "--total-steps", 4000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1 and "checkpoint.pt cannot be written, and is as it was" in err
    assert saved(cfg.out)["counts"] == counts and not list((tmp_path / "run").glob("*.tmp"))

def test_standard_streams_that_are_closed(tmp_path):
    """Catches: a silent end or odd errors where a service starts us, `| head` that costs the run."""
    ways, processes = {"in, err": (0, 2), "in, out": (0, 1), "err": (2,), "head": ()}, {}
    for way, closed in ways.items():
        cfg = tiny(tmp_path, way, total_steps=10**9 if way == "head" else 800, checkpoint_seconds=1e6)
        arguments = ["--resume", "/nowhere"] if way == "err" else flags(cfg)
        processes[way] = start(*arguments, preexec_fn=lambda closed=closed: [os.close(number) for number in closed])
    assert any(" 0 steps" in line for line in iter(processes["head"].stdout.readline, ""))
    processes["head"].stdout.close()
    processes["head"].stdout = None
    for (way, process), code in zip(processes.items(), (0, 0, 2, 1)):
        out, err = process.communicate(timeout=120)
        assert process.returncode == code and "Traceback" not in err, err
        assert code == 2 or saved(tmp_path / way)["counts"]["env_steps"] >= 800 * (1 - code) + code
        assert way != "in, err" or result(out)["env_steps"] >= 800
    assert err.count("\n") == 1 and "pipe" in err.lower()

def start_ranks(script, arguments, tmp_path):
    """Two processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in map(str, range(2)):
        more = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with open(tmp_path / f"out{rank}", "w") as out, open(tmp_path / f"err{rank}", "w") as err:
            yield start(*arguments, script=script, stdout=out, stderr=err, env=os.environ | more)

def one_step(ranks):
    halves = [random_batch([7, 2, 5], ["truncated", "terminated", "terminated"], seed=1),
              random_batch([7, 1], ["terminated", "truncated"], seed=2)]  # with different numbers of steps
    team, target, cfg = make_team(small()), make_team(small(), seed=5), small(grad_clip=1.0)
    batch = {name: torch.cat([halves[rank][name] for rank in ranks]) for name in halves[0]}
    return team, qmix.gradient_step(team, target, qmix.make_optimizer(team, cfg), batch, cfg)

def be_a_rank(folder):
    """What each of two processes does in the test below."""
    with qmix.process_group():
        team, stats = one_step([qmix.RANK])
        cfg, due = qmix.Config(env="skirmish:3m", num_envs=2, batch_size=3, buffer_size=8, device="cpu", threads=1), []
        run = qmix.Run(cfg)
        while run.counts["updates"] < 4:
            run.play()
            due.append(run.updates_due())
            run.learn()
        torch.save(dict(team=team.state_dict(), stats=stats, run=run.team.state_dict(), counts=run.counts, due=due,
                        replay=run.replay.data["obs"]), Path(folder) / f"{qmix.RANK}.pt")

def test_two_ranks_do_what_one_process_does_with_both_batches(tmp_path):
    """Catches: gradients that are summed or not weighted by steps, clipping before averaging, ranks that drift apart
    or that play the same episodes, updates due by the episodes of both."""
    code = f"import test_qmix; test_qmix.be_a_rank({str(tmp_path)!r})"
    for process in [*start_ranks("-c", [code], tmp_path)]:
        assert process.wait(120) == 0, (tmp_path / "err0").read_text() + (tmp_path / "err1").read_text()
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    team, stats = one_step([0, 1])
    assert stats[1] > 1.0  # or clipping would not show
    torch.testing.assert_close([one["stats"], *one["team"].values()], [stats, *team.state_dict().values()])
    assert one["due"] == other["due"] == [0, 1, 0, 1, 0, 1, 0, 1][:len(one["due"])]  # 2 a round and 4 an update
    assert one["counts"] == other["counts"] and one["counts"]["episodes"] == 4 * len(one["due"])
    assert same(one["run"], other["run"]) and not torch.equal(one["replay"], other["replay"])

def test_rank_0_alone_writes_and_a_dead_rank_ends_the_run(tmp_path):
    """Catches: two writers of one file, results printed twice, a rank that waits forever for one that is gone."""
    command = "--env two-step --device cpu --checkpoint-seconds 0 --out".split()
    for process in [*start_ranks("qmix.py", [*command, tmp_path / "run", "--total-steps", 2000], tmp_path)]:
        assert process.wait(120) == 0, (tmp_path / "err0").read_text() + (tmp_path / "err1").read_text()
    facts = result((tmp_path / "out0").read_text())
    assert facts["env_steps"] == 2000 and facts["episodes"] == 1000 and facts["updates"] == (500 - 32) / 2 + 1
    assert (tmp_path / "out1").read_text() == (tmp_path / "err1").read_text() == ""
    for victim in (1, 0):
        out = tmp_path / f"dies{victim}"
        processes = [*start_ranks("qmix.py", [*command, out, "--total-steps", 10**9], tmp_path)]
        while not (out / "checkpoint.pt").exists():
            assert processes[0].poll() is None
            time.sleep(0.1)
        processes[victim].kill()
        assert processes[1 - victim].wait(60) == 1 and processes[victim].wait(60) == -signal.SIGKILL and saved(out)
        err = (tmp_path / f"err{1 - victim}").read_text()
        assert "another process of this run has ended" in err.splitlines()[-1] and "Traceback" not in err

def test_readme_code_runs_as_printed(tmp_path, monkeypatch, capfd):
    """Catches: examples that do not run or have drifted from the code, --env-args that do not arrive."""
    monkeypatch.chdir(tmp_path)
    blocks, scope = [text.split("```")[0] for text in (HERE / "README.md").read_text().split("```python\n")[1:]], {}
    load, meet = (next(block for block in blocks if word in block) for word in ("qmix.load", "class Meet"))
    exec(load.replace("total_steps=50_000", "total_steps=200"), scope)
    assert (scope["step"].terminated | scope["step"].truncated).item() and scope["facts"]["env_steps"] >= 200
    Path("mygame.py").write_text(meet)
    code = main(*"--env mygame:Meet --env-args size=3 --num-envs 2 --total-steps 60 --batch-size 4 --buffer-size 8 "
                "--test-episodes 2 --test-interval-steps 60 --out run --device cpu".split())
    out, err = capfd.readouterr()
    assert code == 0 and result(out)["updates"] > 0 and metrics("run")[-1][-1] == "0", err
    assert main("--evaluate", "run", "--episodes", "2", "--env-args", "size=1") == 0
    assert result(capfd.readouterr().out)["mean_length"] == 1  # they met before they moved

def test_readme_has_the_results_of_the_csvs():
    """Catches: figures drawn again from new runs, and README's tables left as they were."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("plot", HERE / "docs" / "plot.py")
    spec.loader.exec_module(plot := importlib.util.module_from_spec(spec))
    text = (HERE / "README.md").read_text()
    found = {(env.removeprefix("skirmish:"), algo): results for name in ("checkers.csv", "skirmish.csv")
             for env, algo, flags, _, results, *_ in plot.table(name) if not flags}
    for algo in LEARNERS:
        assert f"\n| {algo} | {found['checkers', algo]} |" in text
    for env, algos in [*((env, "iql vdn qmix") for env in ("3m", "2s3z", "3s5z", "1c3s5z")),
                       ("3s5z", "qmix vdn-s qmix-lin qmix-ns")]:
        assert f"\n| {env} | {' | '.join(found[env, algo] for algo in algos.split())} |" in text
    assert len(found) == len(LEARNERS) + 4 * 3 + 3  # and in the CSVs nothing else
