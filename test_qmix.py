"""Each test names the mistake it would catch and compares with something independent of the code it tests."""

import contextlib
import copy
import gc
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Optional
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
TESTDATA = HERE / "testdata"
BEST = "00 10 30 22 01 01 03 03 02 20 10 10 12 31 01 01 01 23 23 00 00 10 12 11 31 01 01 01 23 23 00 00 10 10 00 20 20"
BEST_DISCOUNTED = "01 13 02 11 31 20 10 21 03 12 01 11 03 20 21 01 13 02 11 01 03 20 20"
SIZES = SimpleNamespace(obs_dim=5, state_dim=6, n_actions=4, n_agents=3, episode_limit=7)

def small(algo="qmix", **given):
    return qmix.Config(env="two-step", algo=algo, **dict(hidden_dim=8, mixing_dim=4, hypernet_dim=8) | given)

def scatter(team, std):
    for parameter in team.parameters():  # far from the gentle initial weights, so that mistakes show in what is chosen
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

@pytest.mark.parametrize("maximum", ["double", "plain"])
@pytest.mark.parametrize("mixer", ["qmix-2", "qmix-1", "vdn", "iql"])  # -2, -1: layers of the hyper-networks
def test_one_update_equals_the_authors_code(mixer, maximum):
    """Catches: what departs unintended from the authors' PyMARL: inputs, masks, bootstrap, gradient, clip, step."""
    data = np.load(HERE / "testdata" / "pymarl.npz")  # from github.com/oxwhirl/pymarl at c971afd
    batch = {name[6:]: torch.from_numpy(data[name]) for name in data.files if name.startswith("batch/")}
    cfg = qmix.Config(algo=mixer.split("-")[0], hidden_dim=8, mixing_dim=4, hypernet_dim=8 if mixer == "qmix-2" else 0,
                      env="smac:3m", double_q=maximum == "double")  # everything else as the authors have it
    team, target_team = qmix.Team(SIZES, cfg), qmix.Team(SIZES, cfg)
    for which, net in [("live", team), ("target", target_team)]:
        keys = [key for key in data.files if key.startswith((f"{which}/all/", f"{which}/{mixer}/"))]
        weights = {key.split("/")[-1]: torch.from_numpy(data[key]) for key in keys}
        net.load_state_dict(weights, strict=True)
    numbers = qmix.gradient_step(team, target_team, qmix.make_optimizer(team, cfg), batch, cfg)
    after = torch.cat([team.state_dict()[name].flatten() for name in weights])
    for ours, name in ((numbers, "numbers"), (after, "after")):
        torch.testing.assert_close(ours, torch.from_numpy(data[f"{mixer}/{maximum}/{name}"]), rtol=1e-5, atol=1e-6)

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
    both = (actions == 1).all(-1).float().mean().item()  # one draw for the team would give (1 + 1/9) / 2 = 0.56
    assert both == pytest.approx(4 / 9, abs=0.01)
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
    run.play(), run.play()
    assert seen[0].shape == (64, 2) and len(seen[0].unique()) == 128 and not torch.equal(seen[0], seen[1])

def test_gradient_step_does_what_the_settings_say():
    """Catches: an option that nothing reads: gamma, td_lambda, double_q, reward_scale, grad_clip, optimizer, lr."""
    batch = random_batch([7, 3, 5], ["truncated", "truncated", "terminated"])
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
        assert all(parameter.grad is None for parameter in target.parameters())

# --------------------------------------------------------------------------------------------- replay, rollout, acting
class Script:
    """A probe: environment b's episode lasts lengths[b] steps; 1 and 3 are cut off there. What it shows tells where it
    comes from; so do the rewards, or they are pay[n] * (b + 1) in the n-th episode. n in `broken`: there it fails."""
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

@pytest.mark.parametrize("lack, capacity", [("machine", 10**10), ("container", 1000), ("allocation", 1000)])
def test_replay_that_cannot_fit_is_refused(monkeypatch, capsys, lack, capacity):
    """Catches: the out-of-memory kill an hour into the run; a container's limit, or a failed allocation, not seen."""
    if lack == "container":
        monkeypatch.setattr(Path, "read_text", lambda path: {"/sys/fs/cgroup/memory.max": "1000"}[str(path)])
    if lack == "allocation":
        monkeypatch.setattr(torch, "zeros", Mock(side_effect=RuntimeError("can't allocate memory\nException from ...")))
    with pytest.raises(UsageError, match="--buffer-size .* [0-9,.]+ GiB") as caught:
        qmix.Replay(Script(), capacity, torch.device("cpu"))
    size = capacity * (7 * (8 * 4 + 6) + 6 * (2 + 4 + 1 + 1)) / 2**20  # 7 rows of 8 floats and 6 bools, 6 of the rest
    assert f" {size:,.1f} MiB" in capsys.readouterr().out and "\n" not in str(caught.value)

def test_replay_on_a_gpu_may_be_larger_than_the_machine(monkeypatch):
    """Catches: the host's limit taken for the GPU's."""
    monkeypatch.setattr(Path, "read_text", lambda path: "1000")
    monkeypatch.setattr(torch, "zeros", Mock(return_value="there"))
    allocate = lambda: qmix.allocate(100, torch.device("cuda"), {"obs": ((25,), torch.float32)})  # noqa: E731
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 0))
    assert allocate() == {"obs": "there"}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9_999, 0))
    with pytest.raises(UsageError, match="--buffer-size"):
        allocate()

def test_actions_are_what_the_network_says_of_each_agents_history(tmp_path):
    """Catches: memory reset at each step or kept over episodes, in training or in evaluation; a last action that is
    never told, or is 0 instead of none at the first step; one agent's history shown to another."""
    run = qmix.Run(tiny(tmp_path, env="skirmish:3m", num_envs=8, epsilon_start=0.0, epsilon_finish=0.0))
    scatter(run.team, 0.5)
    run.play(), run.play()
    for episodes in (run.replay.sample(8, run.generators["sample"]), qmix.rollout(run.env, run.choose())[0]):
        obs, actions, filled = episodes["obs"], episodes["actions"].long(), episodes["filled"]
        last = F.pad(actions, (0, 0, 1, 0), value=-1)
        empty = torch.cat([run.team.agent(obs[:, [t]], last[:, [t]])[0] for t in range(obs.shape[1])], 1)
        said = [q.masked_fill(~episodes["avail"], -math.inf).argmax(-1)[:, :-1][filled] for q in (
            *(run.team.agent(obs, told)[0] for told in (last, last.clamp(min=0), last.clamp(max=-1))), empty)]
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
    return [part for name, value in vars(cfg).items() if value != () for part in (
        f"--{'no-' if value is False else ''}{name.replace('_', '-')}", *[str(value)] * (not isinstance(value, bool)))]

def main(*arguments, ignored=()):
    """qmix.main's exit code, whichever way it leaves; the handlers of signals are put back. ignored: as by nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        return qmix.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return leaving.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def start(*arguments, script=HERE / "qmix.py", **more):
    usual = lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)]  # noqa: E731
    more = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE, preexec_fn=usual) | more
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
    """Catches: what a checkpoint forgets: a generator, counter, mean, the ring's place; settings of another run."""
    whole = qmix.train(tiny(tmp_path, "whole", test_interval_steps=500, **given))
    cfg = tiny(tmp_path, test_interval_steps=500, **given)
    for count in range(40):  # bounded: a run whose counters are lost never ends
        if facts := qmix.train(cfg, resume=count > 0, stop=iter([False, True]).__next__):
            break
    assert count > 3 and facts["updates"] == whole["updates"] > 5
    assert qmix.train(cfg, resume=True) == facts  # nothing is left to do
    with pytest.raises(qmix.UsageError, match="its run has another algo"):
        qmix.train(tiny(tmp_path, test_interval_steps=500, **given | dict(algo="vdn")), resume=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["algo"] == cfg.algo
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    once, often = saved(tmp_path / "whole"), saved(tmp_path / "run")
    assert all(same(once[k], often[k]) for k in set(once) - {"config", "seconds", "rows"})

def test_killed_runs_resume_exactly(tmp_path):
    """Catches: a half-written checkpoint, rows written twice or lost, a signal that loses what was played."""
    cfg, checkpoint = tiny(tmp_path, total_steps=16_000), tmp_path / "run" / "checkpoint.pt"
    whole = qmix.train(tiny(tmp_path, "whole", total_steps=16_000))
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
    ({"SIGTERM": 0.0, "SIGINT": 0.05}, 13, 143), ({"SIGHUP": 0.0, "SIGTERM": 1.9}, 13, 129),
    ({"SIGINT": 0.0, "SIGHUP": 1.5, "SIGTERM": 2.1}, 0, 143)])
def test_a_signal_asks_for_a_checkpoint_and_repeats_belong_to_it(tmp_path, monkeypatch, signals, env_steps, code):
    """Catches: a second SIGTERM of `timeout` or `uv run`, or a SIGHUP, that loses the run; a later one not obeyed."""
    now, real = [0.0], time.monotonic

    class Signalled(Script):
        def step(self, actions):
            assert Path(cfg.out, "checkpoint.pt").exists()  # from the start
            for name, now[0] in signals.items() if self.resets == 2 and self.t == 0 else ():
                signal.raise_signal(getattr(signal, name))
            return super().step(actions)
    monkeypatch.setattr(time, "monotonic", lambda: real() + now[0])
    monkeypatch.setattr(qmix, "make_env", lambda *_: Signalled())
    cfg = tiny(tmp_path, total_steps=1000, checkpoint_seconds=1e6)
    assert main(*flags(cfg)) == code and saved(cfg.out)["counts"]["env_steps"] == env_steps

def test_what_is_ignored_from_the_start_stays_so(monkeypatch, capsys):
    """Catches: a run under nohup that ends when its terminal is closed."""
    monkeypatch.setattr(qmix, "train", lambda cfg, resume, stop: signal.raise_signal(signal.SIGHUP) or 1 - len(stop()))
    codes = [main("--env", "two-step", ignored=ignored) for ignored in ([signal.SIGHUP], [signal.SIGINT])]
    assert codes == [0, 129] and "result: 1" in capsys.readouterr().out

@pytest.mark.parametrize("algo", LEARNERS)
def test_everything_moves_and_targets_follow_on_the_count(tmp_path, algo):
    """Catches: mixer parameters missing from the optimiser, a target copied always, never or on the wrong episodes, a
    soft step done twice or to the live networks, updates due too early or too often, lr_anneal that nothing reads."""
    run = qmix.Run(tiny(tmp_path, algo=algo, target_update_episodes=6, buffer_size=64, lr=1e-3, lr_anneal=True))
    copies, due, real = [], [], run.update_target
    vector = lambda net: torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()  # noqa: E731
    before = [parameter.detach().clone() for parameter in run.team.parameters()]
    assert torch.equal(vector(run.target_team), vector(run.team))

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

def test_copies_keep_their_distance():
    """Catches: a fraction of an episode per update whose rounding copies twice in a row, or not at all."""
    run = Mock(cfg=SimpleNamespace(episodes_per_update=0.3, target_update_episodes=200, target_tau=0.0))
    run.team.parameters.return_value = run.target_team.parameters.return_value = [parameter := Mock()]
    copied = []
    for run.counts in ({"updates": n} for n in range(1, 20_001)):
        qmix.Run.update_target(run)
        copied += [run.counts["updates"]] * parameter.lerp_.call_count
        parameter.reset_mock()
    assert len(copied) == 30 and set(np.diff(copied)) <= {666, 667}, copied

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
    env, returns = Script(pay=[0, 1.0, 10.0]), [2.0, 12.0, 3.0, 16.0, 20.0, 120.0]
    found = qmix.greedy_episodes(env, lambda step, memory: (torch.zeros(4, 2, dtype=torch.int64), None), 6)
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
    facts = qmix.train(tiny(tmp_path, total_steps=26, test_interval_steps=13, epsilon_anneal_steps=26))
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
    assert [facts["best_test_return"], facts["test_return"]] == [pytest.approx(3 * mean), pytest.approx(2 * mean)]
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
    monkeypatch.undo()
    qmix.restore(again, content)  # what two ranks have played goes on with one
    assert again.unlearned == 20 - 2.0 * run.counts["updates"] and len(again.replay) == 12

@pytest.mark.parametrize("broken, env_steps, said", [
    ([3], 13, "the game failed 10 times in a row"), ([4], 13, "the game failed 10 times in a row"),
    ([], 0, "the loss or its gradient is not finite before update 1; the last checkpoint is kept")])
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
    cfg = tiny(tmp_path, env=env, algo=algo, total_steps=300, test_interval_steps=300, compile=algo == "iql")
    if algo == "heuristic" and not env.startswith("skirmish"):
        with pytest.raises(UsageError, match="heuristic"):
            qmix.train(cfg)
        return
    facts = qmix.train(cfg)
    assert facts["env_steps"] >= 300 and math.isfinite(facts["test_return"]) and compiled.called == (algo == "iql")
    assert facts["updates"] == 0 if algo in ("random", "heuristic") else facts["updates"] >= 1
    assert algo != "random" or metrics(cfg.out)[-1][6] not in ("", "0.0") and main("--evaluate", cfg.out) == 2

@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_step_is_the_plain_one():
    """Catches: --compile that changes the game: a graph that keeps the state or random numbers of its first call."""
    plain, compiled = (qmix.make_env(qmix.Config(env="skirmish:3m", compile=on), 4, "cpu", 1) for on in (False, True))
    steps = [plain.reset(), compiled.reset()]
    for _ in range(40):
        noise = torch.rand(steps[0].avail.shape).masked_fill(~steps[0].avail, -1)
        steps = [env.step(noise.argmax(-1)) for env in (plain, compiled)]
        for ours, theirs in zip(*(step[:-1] for step in steps)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert steps[0].terminated.any()

# ------------------------------------------------------------------------------------------- bad input, evaluation, use
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cfg = tiny(tmp_path_factory.mktemp("trained"), env="skirmish:3m", total_steps=400)
    content = saved(qmix.train(cfg)["out"])
    team = make_team(cfg, envs.make(cfg.env, 1), 10, std=1.0).float()  # weights that show mistakes
    torch.save(content | {"team": team.state_dict()}, Path(cfg.out, "best.pt"))
    return cfg.out

@pytest.mark.parametrize("arguments, word", [
    ("--env nowhere", "two-step"), ("--algo ppo", "qmix-lin"), ("--env checkers-v9", "checkers"), ("--nope 3", "nope"),
    ("--lr nan", "lr"), ("--lr fast", "lr"), ("--lr", "lr"), ("--gamma 1.5", "gamma"), ("--num-envs 0", "num-envs"),
    ("--seed -1", "seed"), ("--epsilon-spread 0.001", "epsilon-finish"), ("--cuda False", "cuda"), ("stray", "stray"),
    ("--epsilon-spread 0.5 --epsilon-finish 0", "epsilon-finish"), ("--batch-size 9999", "buffer-size"),
    ("--num-envs 5000", "buffer-size"), ("--buffer-size 100000000", "GiB"), ("--device cuda:77", "cuda"),
    ("--device tpu", "tpu"), ("--algo heuristic", "heuristic"), ("--double-q False", "False"),
    ("--resume /nowhere", "/nowhere"), ("--evaluate /nowhere", "/nowhere"), ("--out /dev/null/x", "null"),
    ("--record x.gif", "--evaluate"), ("--episodes 5", "--evaluate"),
    ("--resume {run} --evaluate {run}", "exclude"), ("--resume {run} --lr 1", "lr"),
    ("--evaluate {run} --episodes 0", "episodes"), ("--evaluate {run} --record x.mp4", ".gif"),
    ("--evaluate {run} --env two-step", "shape"), ("--evaluate {run} --lr 1", "lr"),
    ("--out {run}", "already holds a run"), ("--env-args a=1 --env-args a=2", "each key once")])
def test_bad_input_is_said_with_code_2(trained, capsys, arguments, word, tmp_path, monkeypatch):
    """Catches: a traceback, a silent default, a run directory overwritten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qmix.Run, "play", None)  # what is not refused fails at once
    files = lambda: {file: file.read_bytes() for file in (*Path(trained).iterdir(), *tmp_path.iterdir())}  # noqa: E731
    before, code = files(), main(*arguments.format(run=trained).split())
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert code == 2 and word in err and "Traceback" not in err and files() == before

def test_numpys_numbers_and_paths_are_settings_like_others(tmp_path, monkeypatch, capsys):
    """Catches: a run that trains to its end and cannot be read back, True taken for 1, 1 for True, a name not known."""
    Own = type("Own", (Script,), dict(n_actions=np.int64(3), obs_dim=np.int32(3), n_agents=np.int64(2)))
    monkeypatch.setattr(qmix, "make_env", lambda *_: Own(pay=[1.0] * 99))
    cfg = tiny(tmp_path, lr=np.float64(0.012), seed=np.int64(3), double_q=np.bool_(True), gamma=np.float32(0.5),
               algo=np.str_("vdn"), out=tmp_path / "run", total_steps=np.array(20), batch_size=torch.tensor(4))
    qmix.train(cfg)
    assert qmix.load(tmp_path / "run").config == qmix.load(str(tmp_path / "run" / "best.pt")).config == cfg
    assert main("--resume", cfg.out, "--total-steps", 60) == 0 and main("--evaluate", cfg.out, "--episodes", 2) == 0
    assert result(capsys.readouterr().out)["test_return"] == pytest.approx(7) and type(qmix.Config(lr=1).lr) is float
    for wrong in (dict(seed=True), dict(seed=1.0), dict(double_q=1), dict(env=3), dict(lr="1"), dict(lr=None),
                  dict(gamma=math.nan), dict(seed=2**63), dict(batchsize=3), dict(algo=["qmix"]),
                  *(dict(env_args=given) for given in (["a=1", "a=2"], ["a"], ["=1"], "a=1"))):
        with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", ".")):
            qmix.Config(**wrong)

def test_what_is_given_beats_presets_and_arguments_add_up(trained, tmp_path, capsys):
    """Catches: a preset that beats what was said or reaches another's module; --env-args lost, a dict refused."""
    assert qmix.Config(env="checkers").lr == qmix.PRESETS["checkers"]["lr"] == qmix.Config(env="checkers-v3").lr != 5e-4
    assert qmix.Config(env="checkers", lr=5e-4).lr == qmix.Config(env="smac:3m").lr == 5e-4
    assert qmix.Config(env="skirmish:3m").td_lambda == qmix.PRESETS["skirmish"]["td_lambda"]
    assert qmix.parse(["--env=two-step", "--mixing-dim", "9"]).config == qmix.Config(env="two-step", mixing_dim=9)
    assert {qmix.Config(env=f"{name}:Game").lr for name in ("checkers_mine", "checkers", "skirmisher")} == {5e-4}
    for env, steps in (("two-step", 10_000), ("smac:3m", 2_000_000)):
        assert not main("--env", env, "--help")
        assert f"(default: {steps})" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert qmix.parse("--env m:C --env-args a=1 b=x=y --lr 0.1 --env-args c=-2".split()).config == qmix.Config(
        env="m:C", lr=0.1, env_args=("a=1", "b=x=y", "c=-2"))
    content, file = saved(trained), str(tmp_path / "own.pt")
    torch.save(content | {"config": content["config"] | dict(env="m:C", env_args=("a=1",))}, file)
    for given, expected in (["--num-envs=2"], ("a=1",)), (["--env", "other:C"], ()), (["--env-args", "b=2"], ("b=2",)):
        assert qmix.parse(["--evaluate", file, *given]).config.env_args == expected
    for good in (dict(size=7, name="x"), ["size=7", "name=x"], ("size=7", "name=x")):
        assert qmix.Config(env="m:C", env_args=good).env_args == ("size=7", "name=x")

@pytest.mark.parametrize("damage", "missing truncated empty foreign version malicious weights config".split())
def test_bad_checkpoints(trained, tmp_path, capsys, monkeypatch, damage):
    """Catches: a pickle that runs code, a traceback from a damaged file, a resume that starts anew without a word,
    torch's colours and its advice to load without care."""
    monkeypatch.chdir(tmp_path)
    content, file = saved(trained), tmp_path / "run" / "checkpoint.pt"
    file.parent.mkdir()
    if damage == "weights":
        del content["team"]["agent.fc2.bias"]
    content["config"] |= {"learning": 3} if damage == "config" else {}
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.system, ("touch exploded",))})()
    torch.save({"foreign": [torch.zeros(3)], "version": content | {"format": "qmix.py 2"},
                "malicious": content | {"team": bomb}}.get(damage, content), file)
    kept = file.read_bytes()[:{"truncated": 1000, "empty": 0}.get(damage)]
    file.unlink() if damage == "missing" else file.write_bytes(kept)
    assert main("--resume", "run") == main("--evaluate", file) == 2
    with pytest.raises(UsageError, match="is not a usable checkpoint: "):
        qmix.load("run")
    assert not (tmp_path / "exploded").exists() and (damage == "missing" or kept == file.read_bytes())
    err = capsys.readouterr().err
    assert err.count("\n") == err.count("is not a usable checkpoint: ") == 2
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

def test_evaluate_and_record_need_the_agents_alone(trained, tmp_path, capsys, monkeypatch):
    """Catches: a policy that peeks at state or mixer or acts otherwise than training's evaluation does; no picture."""
    best, drawn = str(Path(trained, "best.pt")), []
    monkeypatch.setattr(envs, "record", lambda env, choose, path: drawn.append((env.n_envs, path)))
    assert main("--evaluate", best, "--episodes", 6, "--num-envs", 4, "--record", tmp_path / "demo.gif") == 0
    facts, env, policy = result(capsys.readouterr().out), envs.make("skirmish:3m", 4, "cpu", 1), qmix.load(best)
    found = qmix.greedy_episodes(env, lambda step, memory: qmix.act(policy.agent, step.obs, step.avail, memory), 6)
    assert facts == found | dict(env="skirmish:3m", algo="qmix", episodes=6, best_known=20.0, out=best)
    assert drawn == [(4, tmp_path / "demo.gif")] and set(vars(policy)) == {"agent", "config"}

def test_what_an_environment_is_told(trained, monkeypatch):
    """Catches: --env-args, --env-timeout or --seed that do not arrive, smac's own player or replays not asked for."""
    monkeypatch.setattr(envs, "make", make := Mock(side_effect=UsageError("no game here")))
    given = dict(env="smac:3m", env_args=["a=1"], env_timeout=5, num_envs=3, seed=7, device="cpu")
    for call in (lambda: qmix.Run(qmix.Config(algo="heuristic", **given)), lambda: qmix.evaluate(
            trained, 2, "folder", qmix.Config(**given)), lambda: qmix.evaluate(trained, 9, "x.gif")):
        with pytest.raises(UsageError, match="no game here"):
            call()
    (name, n, _, seed, *first), (_, fewer, _, _, *second), (_, *third) = (call.args for call in make.call_args_list)
    assert (name, n, fewer) == ("smac:3m", 3, 2) and seed != 7 and third[0] == 4 and third[-1] is True
    assert first == [{"a": "1", "heuristic_ai": "true"}, 5.0, False] and second == [
        {"a": "1", "replay_dir": "folder"}, 5.0, False]

def test_agents_each_alone_do_what_the_team_does(trained):
    """Catches: a policy that is not decentralised: an agent's choice that needs another's row, id or memory."""
    policy, env, memory, alone, seen = qmix.load(Path(trained, "best.pt")), envs.make("skirmish:3m", 4), None, {}, []
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
    assert policy.act(obs[::-1, :, ::-1], avail[::-1].astype(int).tolist(), memory)[0].shape == (2, 3)
    none, nan = avail.copy(), obs.copy()
    none[1, 1], nan[1, 0, 3] = False, math.nan
    for bad in (dict(obs=nan), dict(obs=nan + math.inf), dict(avail=none), dict(avail=avail * math.nan),
                dict(avail=avail * -1e9), dict(obs=obs[0], avail=avail[0]), dict(obs=obs[..., 1:]), dict(obs=obs[:1]),
                dict(obs=obs[:, :1], avail=avail[:, :1]), dict(agents=[0]), dict(obs=np.array([[{}] * 3] * 2)),
                dict(obs=obs[:, :1], avail=avail[:, :1], agents=[0]), dict(hidden=(memory[0][..., 1:], memory[1]))):
        with pytest.raises(UsageError, match="Policy.act") as caught:
            policy.act(**dict(obs=obs, avail=avail, hidden=memory) | bad)
        assert "\n" not in str(caught.value)

def test_import_needs_torch_and_numpy_and_the_file_beside_it_only(tmp_path, monkeypatch, capsys):
    """Catches: an import that a reader must install, a lock that only Unix has, another's `envs` taken for ours."""
    (tmp_path / "envs").mkdir()
    for file in ("qmix.py", "envs.py"):
        (tmp_path / file).write_bytes((HERE / file).read_bytes())
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
    assert code == 1 and (err := capsys.readouterr().err).count("\n") == 1 and "cannot be written, and is as it" in err
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
        assert process.returncode == code and "Traceback" not in err and "error" not in str(out), err
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
    with contextlib.suppress(EOFError), qmix.process_group():
        team, stats = one_step([qmix.RANK])
        cfg, due = qmix.Config(env="skirmish:3m", num_envs=2, batch_size=3, buffer_size=8, device="cpu", threads=1), []
        run = qmix.Run(cfg)
        while run.counts["updates"] < 4:
            run.play()
            due.append(run.updates_due())
            run.learn()
        raise EOFError  # the group ends, however its run does
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads  # one that is left aborts Python's exit
    torch.save(dict(team=team.state_dict(), stats=stats, run=run.team.state_dict(), counts=run.counts, due=due,
                    replay=run.replay.data["obs"]), Path(folder) / f"{qmix.RANK}.pt")

def test_two_ranks_do_what_one_process_does_with_both_batches(tmp_path):
    """Catches: gradients that are summed or not weighted by steps, clipping before averaging, ranks that drift apart
    or that play the same episodes, updates due by the episodes of both."""
    code = f"import test_qmix; test_qmix.be_a_rank({str(tmp_path)!r})"
    for process in [*start_ranks("-c", [code], tmp_path)]:
        assert process.wait(120) == 0, (tmp_path / "err0").read_text() + (tmp_path / "err1").read_text()
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    team, stats = one_step([0, 1])  # a norm of the gradient above 1, or clipping would not show
    torch.testing.assert_close([one["stats"], *one["team"].values()], [stats, *team.state_dict().values()])
    assert stats[1] > 1 and one["due"] == other["due"] == ([0, 1] * 4)[:len(one["due"])]  # 2 a round, 4 an update
    assert one["counts"] == other["counts"] and one["counts"]["episodes"] == 4 * len(one["due"])
    assert same(one["run"], other["run"]) and not torch.equal(one["replay"], other["replay"])

def test_rank_0_alone_writes_and_a_dead_rank_ends_the_run(tmp_path):
    """Catches: two writers of one file, results printed twice, a rank that waits for one that is gone or stopped."""
    command = "--env two-step --device cpu --checkpoint-seconds 0 --out".split()
    for process in [*start_ranks("qmix.py", [*command, tmp_path / "run", "--total-steps", 2000], tmp_path)]:
        assert process.wait(120) == 0, (tmp_path / "err0").read_text() + (tmp_path / "err1").read_text()
    facts = result((tmp_path / "out0").read_text())
    assert facts["env_steps"] == 2000 and facts["episodes"] == 1000 and facts["updates"] == (500 - 32) / 2 + 1
    assert (tmp_path / "out1").read_text() == (tmp_path / "err1").read_text() == ""
    for victim, number, codes in ((1, 9, [-9, 1]), (0, 9, [-9, 1]), (1, signal.SIGTERM, [143, 143])):
        out = tmp_path / f"{number}-{victim}"
        processes = [*start_ranks("qmix.py", [*command, out, "--total-steps", 10**9], tmp_path)]
        while not (out / "checkpoint.pt").exists():
            assert processes[0].poll() is None
            time.sleep(0.1)
        processes[victim].send_signal(number)
        assert [processes[rank].wait(60) for rank in (victim, 1 - victim)] == codes and saved(out)
        err = (tmp_path / f"err{1 - victim}").read_text()
        assert ("another process of this run has ended" in err) == (codes[1] == 1) and "Traceback" not in err

# ---- two-step, Checkers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", range(4))
def test_checkers_equals_recorded_ma_gym(variant):
    """Catches: a misread rule, the agents' order, variants mixed up, a stale clock or board, an end as a time-out."""
    data = np.load(TESTDATA / "ma_gym_checkers.npz")
    assert len(set(data["events"])) == 11  # bumps, both ways into a cell, kinds of end; fewer would prove less
    E = len(data["length"])
    env, cells = envs.Checkers(variant, n_envs=E), np.arange(24)
    order = [[8 * r + c for r in range(3) for c in range(6) if (r + c) % 2 == odd] for odd in (0, 1)]
    for _ in range(2):
        step = env.reset()
        for t in range(101):
            now, apples = data["length"] >= t, data["food"][:, t, 0]
            if t > 0:  # what follows after the end of an episode is padding
                step = env.step(torch.from_numpy(data["actions"][:, t - 1]).long())
                np.testing.assert_allclose(step.reward[now], data["reward"][now, t - 1], atol=2e-6)
            np.testing.assert_array_equal(step.obs[now], data[f"obs_v{variant}"][now, t] / np.float32(100))
            state = [*(data["food"][:, t, kind, order[kind]] for kind in (0, 1)), np.full((E, 1), t / np.float32(100)),
                     *(data["cells"][:, t, agent, None] == cells for agent in (0, 1))]
            np.testing.assert_array_equal(step.state[now], np.concatenate(state, 1)[now])
            np.testing.assert_array_equal(step.terminated[now], ~apples.any(1)[now])
            np.testing.assert_array_equal(step.truncated[now], (apples.any(1) & (t == 100))[now])
            assert (step.terminated | step.truncated)[data["length"] == t].all() and step.avail.all()

@pytest.mark.parametrize("text, length, total, discounted", [
    (BEST, 37, 86.26, None), (BEST_DISCOUNTED, 23, 83.54, 74.688680), ("44 " * 100, 100, -2.0, None)])
def test_checkers_known_returns(text, length, total, discounted):
    """Catches: another game than the one whose exact optimum is known. The last line: nobody moves."""
    env, rewards = envs.Checkers(n_envs=2), []
    env.reset()
    for pair in text.split():
        step = env.step(torch.tensor([[int(action) for action in pair]] * 2))
        rewards.append(step.reward[1].double().item())
        assert (step.terminated | step.truncated).all() == (len(rewards) == length)
    assert sum(rewards) == pytest.approx(total, abs=1e-4)
    assert step.truncated.all() == (total < 0) and total <= env.best_return
    if discounted is not None:
        assert sum(0.99 ** t * reward for t, reward in enumerate(rewards)) == pytest.approx(discounted, abs=2e-5)

def test_two_step_is_the_papers_table():
    """Catches: agent 2 choosing the state, a swapped payoff, too long an episode, a stale reset."""
    choices = torch.cartesian_prod(*[torch.arange(2)] * 4)  # (16, 4): first u1 u2, second u1 u2
    env = envs.TwoStep(n_envs=16)
    for _ in range(2):
        first, middle, last = steps = env.reset(), env.step(choices[:, :2]), env.step(choices[:, 2:])
        assert [step.terminated.all() for step in steps] == [step.terminated.any() for step in steps] == [0, 0, 1]
        assert (first.state == torch.tensor([1.0, 0, 0])).all() and not torch.cat([first.reward, middle.reward]).any()
        for b, (u1, _, v1, v2) in enumerate(choices.tolist()):
            assert last.reward[b] == (7 if u1 == 0 else [[0, 1], [1, 8]][v1][v2])
            assert middle.state[b].tolist() == ([0, 1, 0] if u1 == 0 else [0, 0, 1])
        for step in steps:
            assert step.avail.all() and not step.truncated.any() and (step.obs == step.state[:, None]).all()
    assert last.reward.max() == env.best_return

@pytest.mark.parametrize("name", [
    "two-step", "checkers", "checkers-v3", "skirmish:1c3s5z", "skirmish:5m", "skirmish:5m_vs_6m"])
def test_sizes_dtypes_and_no_wait_for_the_device(name):
    """Catches: wrong sizes; live views; .item(), an `if` or shapes by the data (fake tensors); stale last actions."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    env = envs.make(name, 4)
    B, N, A, skirmish = 4, env.n_agents, env.n_actions, name.startswith("skirmish")
    steps, copies = [env.reset()], []
    for _ in range(6):
        copies.append([field.clone() for field in steps[-1][:-1]])
        actions = torch.rand(steps[-1].avail.shape).masked_fill(~steps[-1].avail, -1).argmax(-1)
        steps.append(env.step(actions))
        last = torch.nn.functional.one_hot(actions, A).float().flatten(1)
        assert not skirmish or torch.equal(steps[-1].state[:, -N * A:], last)
    steps.append(env.reset())
    assert not skirmish or not steps[-1].state[:, -N * A:].any()
    for step, before in zip(steps, copies):
        assert all(torch.equal(field, kept) for field, kept in zip(step[:-1], before))
    expected = [((B, N, env.obs_dim), torch.float32), ((B, env.state_dim), torch.float32), ((B, N, A), torch.bool),
                ((B,), torch.float32), ((B,), torch.bool), ((B,), torch.bool)]
    assert all([(field.shape, field.dtype) for field in step[:-1]] == expected for step in steps)
    assert hasattr(env, "generator") == skirmish
    if "5m" in name:  # N and M are not swapped, which maps with N = M cannot show
        M = 6 if "6m" in name else 5
        sizes = N, A, env.obs_dim, env.state_dim, env.max_reward, env.episode_limit
        assert sizes == (5, 6 + M, 4 + 5 * M + 5 * 4 + 1, 4 * 5 + 3 * M + 5 * (6 + M), 55 * M + 200, 70)
    with FakeTensorMode():
        env = envs.make(name, 4)
        env.noise = lambda: torch.rand(4, len(env.names))
        env.reset()
        env.step(env.heuristic() if hasattr(env, "heuristic") else torch.zeros(4, N, dtype=torch.int64))

@pytest.mark.parametrize("name, words", [
    ("checkers-v7", "unknown environment 'checkers-v7'; there are two-step, checkers"), ("3m", "environment '3m'"),
    ("skirmish:4m", "3m, 5m, 8m, 5m_vs_6m, 2s3z, 3s5z, 1c3s5z; got '4m'"), ("checkers", "takes no --env-args, got a"),
    ("mygame.py:Meet", "mygame:Meet"), ("./mygame:Meet", "mygame:Meet"), ("games/mygame.py:Meet", "games.mygame:Meet")])
def test_names_that_make_refuses(name, words):
    """Catches: checkers-v7 trained as something else; a KeyError, or an ImportError for a file that exists."""
    with pytest.raises(envs.UsageError, match=re.escape(words)):
        envs.make(name, arguments={"a": "1"} if name == "checkers" else None)

LOAD = f"import sys\nsys.path.insert(0, {str(Path(envs.__file__).parent)!r})\nimport envs\n"

def test_envs_needs_no_unix_to_be_imported():
    """Catches: `import qmix` failing on Windows, and a traceback where workers are asked for there."""
    code = ("import sys, torch; sys.modules.update(dict.fromkeys(('fcntl', 'mmap', 'resource', 'termios', 'pwd')))\n"
            f"{LOAD}envs.make('checkers').reset(); sys.platform = 'win32'\n"
            "try: envs.make('own:Own')\nexcept envs.UsageError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "own:Own: worker processes need Linux or macOS" in done.stdout, done.stderr

def test_drawings_and_records_of_whole_episodes(tmp_path):
    """Catches: a drawing of another environment, of the dead, of eaten food, without shots; half an episode or file."""
    image = pytest.importorskip("PIL.Image")
    def choose(step, memory):
        asked.append(memory)
        assert len(asked) <= 4
        return step.avail.float().argmax(-1), len(asked)
    for name in ("checkers", "skirmish:3m"):
        env, path, asked = envs.make(name, 2), tmp_path / "demo.gif", []
        env.episode_limit = 4
        envs.record(env, choose, path, fps=2)
        assert asked == [None, 1, 2, 3] and image.open(path).n_frames >= 5
    axes, kept = pytest.importorskip("matplotlib.figure").Figure().subplots(1, 2), path.read_bytes()
    with pytest.raises(AssertionError):
        envs.record(env, choose, str(path))
    assert path.read_bytes() == kept and [file.name for file in tmp_path.iterdir()] == ["demo.gif"]
    for file, words in (("demo.gif", "this environment cannot be drawn"), ("demo.png", "must name a .gif file in a "),
                        ("nowhere/demo.gif", "must name a .gif file in a folder that exists, not ")):
        with pytest.raises(envs.UsageError, match=f"--record.*{words}"):
            envs.record(envs.TwoStep(2), choose, tmp_path / file)
    env = arena("3m", {0: (14, 16), 3: (16, 16), 4: (28, 24)}, n_envs=2)
    env.step(torch.tensor([[envs.ATTACK, 0, 0]] * 2))
    env.health[0] = 0
    env.draw(axes[0], 1)
    assert [patch.center for patch in axes[0].patches] == [(float(env.x[1, i]), float(env.y[1, i])) for i in (0, 3, 4)]
    assert [line.get_color() for line in axes[0].lines] == ["tab:blue", "tab:red"]
    env = envs.Checkers(n_envs=2)
    env.reset(), env.step(torch.tensor([[4, 4], [1, 4]]))  # agent 0 of environment 1 eats the lemon at (0, 5)
    env.draw(axes[1], 1)
    food = [("oD"[odd], c, r) for odd in (0, 1) for r in range(3) for c in range(6) if (r + c) % 2 == odd]
    places = [(line.get_marker(), *line.get_xydata()[0]) for line in axes[1].lines]
    assert places == [spot for spot in food if spot != ("D", 5, 0)] + [("o", 5, 0), ("s", 6, 2)]

# ---- skirmish --------------------------------------------------------------------------------------------------------
FAR = 1e9  # a cooldown that disarms

def arena(map_name, places, n_envs=1):
    """A battle with only the units in `places` {index: (x, y)} alive; reloading does not vary."""
    env = envs.Skirmish(map_name, n_envs)
    env.noise = lambda: torch.full((n_envs, len(env.names)), 1 / 3)  # -1 + 3/3 loops
    env.reset()
    env.calm.zero_()  # enemies notice whatever is in sight
    env.health[:, [unit for unit in range(env.x.shape[1]) if unit not in places]] = 0
    for unit, (x, y) in places.items():
        env.x[:, unit], env.y[:, unit] = x, y
    return env

def loops(env, actions, count):  # plays `count` game loops on one order and yields after each
    orders = env.order(torch.tensor([actions]))
    for loop in range(1, count + 1):
        env.game_loop(*orders, env.reload.expand_as(env.x))
        yield loop

def attack(env, ally, enemy):  # indices among all units; the other allies stop
    return [envs.ATTACK + enemy - env.n_agents if unit == ally else envs.STOP for unit in range(env.n_agents)]

@pytest.mark.parametrize("map_name", ["3m", "8m", "2s3z", "3s5z", "1c3s5z"])
def test_golden_rows_of_smac(map_name):
    """Catches any feature, divisor, order, mask border, type bit or reward term that is not smac's."""
    data = np.load(TESTDATA / "smac_golden" / f"{map_name}.npz")
    K, N = data["last_action"].shape
    env = envs.Skirmish(map_name, n_envs=K)
    env.center, env.extent = ([float(data[f"{key}_{axis}"]) for axis in "xy"] for key in ("center", "max_distance"))
    cells = [np.flatnonzero(data["pathing_grid"].any(axis)) for axis in (1, 0)]
    env.walk_x, env.walk_y = ((float(axis.min()), float(axis.max() + 1)) for axis in cells)
    env.reset()
    sizes = [env.n_agents, env.n_enemies, env.n_actions, env.episode_limit, env.obs_dim, env.state_dim, env.max_reward]
    assert sizes == [*(int(data[key]) for key in ("n_agents", "n_enemies", "n_actions", "episode_limit")),
                     data["obs"].shape[2], data["state"].shape[1], float(data["max_reward"])]
    def plant(prefix):
        for name in ("x", "y", "health", "shield", "cooldown"):
            facts = np.concatenate([data[f"{prefix}{team}_{name}"] for team in ("ally", "enemy")], 1)
            setattr(env, name, torch.tensor(facts))
    moved = data["has_transition"]
    plant("prev_")
    points, alive = env.health + env.shield, env.health > 0
    goal_x, goal_y, walks = (order[:, :N].numpy() for order in env.order(torch.tensor(data["actions"]).long()))
    kind = np.where(walks, 2, np.where(env.target[:, :N] >= 0, 3, 1)) * alive[:, :N].numpy()
    assert (kind == data["order_kind"])[moved].all()
    assert (np.where(kind == 3, env.target[:, :N] - N, -1) == data["order_target"])[moved].all()
    walking = moved[:, None] & walks
    np.testing.assert_allclose(goal_x[walking], data["order_x"][walking], atol=1e-6)
    np.testing.assert_allclose(goal_y[walking], data["order_y"][walking], atol=1e-6)
    plant("")
    env.last_actions = torch.tensor(data["last_action"])
    env.steps = torch.tensor(data["step"])  # (K,): here every row has its own clock
    step = env.look(env.reward(points, alive))
    assert (step.avail.numpy() == data["avail"]).all()
    for key, rows in (("obs", slice(None)), ("state", slice(None)), ("reward", moved)):
        np.testing.assert_allclose(getattr(step, key)[rows], data[key][rows], rtol=0, atol=1e-6)
    assert ((step.terminated | step.truncated).numpy() == data["terminated"])[moved].all()
    assert (step.truncated.numpy() == data["timed_out"])[moved].all()
    for key in ("battle_won", "dead_allies", "dead_enemies"):
        assert (step.info[key].numpy() == data[f"info_{key}"])[moved].all(), key

def test_starts_differ_within_a_batch_and_sorting_keeps_places_together():
    """Catches one battle for the whole batch, another scatter, x sorted without y, sorted enemies, mixed kinds."""
    env = envs.Skirmish("2s3z", 64)
    env.reset()
    assert (env.x[1:] != env.x[:-1]).all() and (env.y[1:] != env.y[:-1]).all() and env.y.std(0).min() > 0.2
    noise = torch.rand(2, 64, 10)
    env.noise = iter(noise).__next__
    env.reset()
    x, y = env.start_x + noise[0] - 0.5, env.start_y + noise[1] - 0.5
    for first, last in ((0, 2), (2, 5)):  # allies of a kind by x
        order = first + x[:, first:last].argsort(1)
        now = env.x[:, first:last], env.y[:, first:last]
        torch.testing.assert_close(now, (x.gather(1, order), y.gather(1, order)))
    torch.testing.assert_close((env.x[:, 5:], env.y[:, 5:]), (x[:, 5:], y[:, 5:]))
    env = envs.Skirmish("1c3s5z", 1)
    env.noise = lambda: torch.tensor([[0.9] + 17 * [0.5]])
    env.reset()
    assert env.x[0, 0] == env.start_x[0] + 0.4

# By hand: shots until the shield is gone and the health is too, armour off every hit that meets health; the first
# shot falls in loop 1, the next ones ceil(reload) loops apart. 1c3s5z: 0 colossus, 1 stalker, 4 zealot; enemies + 9.
@pytest.mark.parametrize("map_name, shooter, victim, shots, reload", [
    ("3m", 0, 3, 8, 14), ("1c3s5z", 4, 13, 11, 20),  # 45 / 6; 16: 48 off 50; 8 with 2 left: 5 + 7; then 14
    ("1c3s5z", 1, 10, 10, 31), ("1c3s5z", 1, 13, 13, 31),  # 18: 72 off 80; 9; then 17; 13: 39 off 50; 1; then 12
    ("1c3s5z", 4, 10, 11, 20), ("1c3s5z", 0, 13, 6, 24),  # 16: 80 off 80; then 14; 30: 30 off 50; 15, 9; then 28
    ("1c3s5z", 0, 10, 9, 24), ("1c3s5z", 0, 9, 19, 24)])  # 20: 80 off 80; then 18; 20: 140 off 150; 10 left: 9; then 18
def test_shots_to_kill_and_the_loop_of_death(map_name, shooter, victim, shots, reload):
    """Catches wrong damage, bonus, armour (also off shields), shield order or reload; both directions of fire."""
    N = 3 if map_name == "3m" else 9
    for first, second in ((shooter, victim), (shooter + N, victim - N)):
        env = arena(map_name, {first: (15, 16), second: (15, 16)})
        env.x[0, second] += env.reach[first] + env.radius[second] - 0.05
        env.cooldown[:, second], env.speed[second], fired = FAR, 0, 0
        for loop in loops(env, attack(env, first, second) if first < N else [envs.STOP] * N, 1 + shots * reload):
            fired += int(env.shots[0, first] == second)
            env.shots.fill_(-1)
            if env.health[0, second] <= 0:
                break
        assert (fired, loop) == (shots, 1 + (shots - 1) * reload)

def test_wounds_equal_a_loop_over_hits():
    """Catches armour or shields mistaken where several attackers of several kinds hit in one loop."""
    env = envs.Skirmish("1c3s5z", n_envs=64)
    env.reset()
    draw = torch.Generator().manual_seed(1)
    env.shield.mul_(torch.rand(env.shield.shape, generator=draw))
    attacks = env.shot * (torch.rand(64, 18, 18, generator=draw) < 0.4)
    env.calm.zero_()
    health, shield = env.health.tolist(), env.shield.tolist()
    for b, attacker, victim in attacks.nonzero().tolist():  # in the attackers' order
        hits = 1 if env.names[attacker] == "stalker" else 2
        for _ in range(hits):
            hit = float(attacks[b, attacker, victim]) / hits
            absorbed = min(hit, shield[b][victim])
            shield[b][victim] -= absorbed
            health[b][victim] -= max(hit - absorbed - 1, 0)
    env.wound(attacks)
    torch.testing.assert_close(env.shield, torch.tensor(shield), rtol=0, atol=1e-3)
    torch.testing.assert_close(env.health, torch.tensor(health).clamp(min=0), rtol=0, atol=1e-3)

@pytest.mark.parametrize("ours, theirs", [(0, 5), (5, 0)])
def test_shields_regenerate_after_160_loops_up_to_their_maximum(ours, theirs):
    """Catches another delay or rate, a delay not restarted, shields that outgrow, and a side without any of it."""
    env, shot = arena("2s3z", {0: (5, 10), 5: (25, 20)}), torch.zeros(1, 10, 10)
    env.shield[0, ours], shot[0, theirs, ours] = 70.0, 18.0
    env.wound(shot)
    for loop in range(1, 401):
        env.wound(torch.zeros(1, 10, 10))
        assert env.shield[0, ours] == min(52 + 0.125 * max(loop - 160, 0), 80)

@pytest.mark.parametrize("angle", [0.0, 0.7, 2.5])
def test_the_beam_hits_what_it_touches_across_the_line_of_fire(angle):
    """Catches a beam along the line of fire, one fixed to the axes, centres taken for bodies, and friendly fire."""
    along, across, cos, sin = 0.15 + 0.5, 1.4 + 0.5, math.cos(angle), math.sin(angle)  # half the beam + zealot's radius
    places = {0: (-5, 0), 10: (0, 0), 13: (0, across - 0.01), 14: (0, -across - 0.01), 15: (along - 0.01, -1),
              16: (-along - 0.01, 1), 4: (0.1, 1.2)}  # from the target: in the direction of fire, and across
    env = arena("1c3s5z", {unit: (16 + f * cos - a * sin, 16 + f * sin + a * cos) for unit, (f, a) in places.items()})
    env.cooldown[:, 1:] = FAR
    next(loops(env, attack(env, 0, 10), 1))
    assert (env.shield_max - env.shield)[0, [10, 13, 14, 15, 16, 4]].tolist() == [20, 30, 0, 30, 0, 0]

@pytest.mark.parametrize("map_name, shooter, victim, reach, speed", [
    ("3m", 0, 3, 5.75, 3.15), ("1c3s5z", 1, 13, 7.125, 4.13), ("1c3s5z", 4, 13, 1.1, 3.15),
    ("1c3s5z", 0, 10, 8.625, 3.15)])
def test_ranges_count_from_edge_to_edge_and_units_walk_into_them(map_name, shooter, victim, reach, speed):
    """Catches ranges between centres, shots on the way, overshooting, and a wrong speed."""
    for gap in (reach - 0.01, reach + 0.01, reach + 0.5):
        env = arena(map_name, {shooter: (12, 16), victim: (12 + 0.6 * gap, 16 + 0.8 * gap)})
        env.cooldown[:, victim], env.speed[victim] = FAR, 0
        walk = max(gap - reach, 0)
        last = math.ceil(walk * 22.4 / speed) + 1
        for loop in loops(env, attack(env, shooter, victim), last):
            walked = math.hypot(float(env.x[0, shooter]) - 12, float(env.y[0, shooter]) - 16)
            assert walked == pytest.approx(min(loop * speed / 22.4, walk), abs=2e-3)
            assert (env.shots[0, shooter] == victim) == (loop == last)

@pytest.mark.parametrize("action, axis, sign", [
    (envs.NORTH, "y", 1), (envs.SOUTH, "y", -1), (envs.EAST, "x", 1), (envs.WEST, "x", -1)])
def test_moves_and_the_borders_of_the_map(action, axis, sign):
    """Catches swapped directions, wrong speed, borders off by one, orders that end too late or too soon."""
    env = arena("3m", {0: (16, 16), 3: (3, 8) if sign > 0 else (29, 24)})
    env.cooldown[:, 3], env.speed[3] = FAR, 0
    border = {"x": (2, 30), "y": (7, 25)}[axis][sign > 0]
    for step in range(19):
        place = float(getattr(env, axis)[0, 0])
        assert place == pytest.approx(16 + sign * min(step * 8 * 3.15 / 22.4, abs(border - 16)), abs=2e-3)
        assert 2 <= env.x[0, 0] < 30 and 7 <= env.y[0, 0] < 25
        free = place + 1 < border if sign > 0 else place - 1 >= border
        assert bool(env.available()[0, 0, action]) == free
        env.step(torch.tensor([[action, 0, 0]]))
    assert not free
    env = arena("2s3z", {0: (16, 16)})
    assert [*loops(env, [action] + 4 * [0], 30)][-1] == 30  # one order is two cells
    assert float(getattr(env, axis)[0, 0]) == pytest.approx(16 + 2 * sign, abs=2e-3)

def test_units_do_not_overlap_but_the_dead_make_way():
    """Catches missing pushes, pushes by corpses, and the wrong zealot radius (0.375 for pushing, 0.5 for the rest)."""
    env = envs.Skirmish("1c3s5z", n_envs=8)
    env.reset()
    env.x, env.y = (16 + torch.rand(env.x.shape, generator=env.generator) for _ in range(2))
    env.cooldown.fill_(FAR)
    env.speed.zero_()
    env.health[:, 8] = 0
    for _ in range(40):
        env.step(torch.ones(8, 9, dtype=torch.long))
    gap = ((env.x[:, None] - env.x[..., None]) ** 2 + (env.y[:, None] - env.y[..., None]) ** 2).sqrt()
    radius = torch.tensor([1.0] + [0.625] * 3 + [0.375] * 5).repeat(2)
    apart, alive = gap + torch.eye(18) * 9 - radius - radius[:, None], env.health[0] > 0
    assert -0.02 < apart[:, alive][:, :, alive].min() < 0.02
    env = arena("2s3z", {2: (16, 16), 3: (16.8, 16), 4: (16, 16.7)})  # zealots: only the last two are too close
    env.x[0, 5], env.y[0, 5], fell = 16.7, 16.1, env.x[0, 6:].clone()  # a corpse pushes nobody
    env.step(torch.tensor([[0, 0, envs.STOP, envs.STOP, envs.STOP]]))
    assert env.x[0, 3] == torch.tensor(16.8) and env.y[0, 4] - env.y[0, 2] == pytest.approx(0.75, abs=1e-2)
    assert env.y[0, 3] == 16 and torch.equal(env.x[0, 6:], fell)  # the dead stay where they fell
    env = arena("3m", {0: (29.999, 24.999), 1: (29.999, 24.999), 3: (4, 8)})  # two on one spot in a corner
    for _ in range(5):
        env.step(torch.tensor([[envs.STOP, envs.STOP, 0]]))
    assert math.hypot(env.x[0, 0] - env.x[0, 1], env.y[0, 0] - env.y[0, 1]) > 0.74

@pytest.mark.parametrize("shooter, victim", [(0, 3), (3, 0)])
@pytest.mark.parametrize("noise, reload", [(0.0, 13), (1 / 3, 14), (0.9999, 16)])
def test_the_cooldown_varies_by_minus_one_to_two_loops(noise, reload, shooter, victim):
    """Catches a variation with another range or sign, or for one side alone: 13.664 loops become 12.664 to 15.664."""
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.noise = lambda: torch.full_like(env.x, noise)
    env.cooldown[:, victim], orders = FAR, [envs.ATTACK if shooter == 0 else envs.STOP, 0, 0]
    env.step(torch.tensor([orders]))  # fires in loop 1 of 8
    assert float(env.cooldown[0, shooter]) == pytest.approx(13.664 + 3 * noise - 1 - 8, abs=1e-3)
    env.shots.fill_(-1)
    assert next(8 + loop for loop in loops(env, orders, 11) if env.shots[0, shooter] >= 0) == reload + 1

def test_ends_and_the_time_limit_and_who_fires_unordered():
    """Catches damage dealt in turn, a draw won, a wrong clock, a time-out as an end, unordered fire."""
    for action in (envs.STOP, envs.ATTACK + 1):  # enemy 1 is dead
        env = arena("3m", {0: (14, 16), 3: (16, 16)})
        step = env.step(torch.tensor([[action, 0, 0]]))
        assert env.health[0, [0, 3]].tolist() == [39, 45] and step.reward == 0 and env.x[0, 0] == 14
    env = arena("3m", {0: (14, 16), 3: (16, 16)})
    env.health[0, [0, 3]] = 5.0
    step = env.step(torch.tensor([[envs.ATTACK, 0, 0]]))
    assert env.health.max() == 0 and step.terminated and not step.truncated and not step.info["battle_won"]
    assert float(step.reward) == pytest.approx((5 + 10) / (365 / 20))
    assert step.avail[0].tolist() == [[True] + [False] * 8] * 3 and step.obs.abs().max() == 0
    env = arena("3m", {0: (4, 8), 3: (28, 24)})
    env.speed.zero_()
    for count in range(1, 61):
        step = env.step(torch.tensor([[envs.STOP, 0, 0]]))
        assert bool(step.truncated) == (count == 60) and not step.terminated
    assert not env.reset().truncated

def test_battles_repeat_with_the_seed_and_only_with_it():
    """Catches an unused seed, other randomness, state that survives a reset, unavailable actions of the heuristic."""
    def battle(env):
        step = env.reset()
        for _ in range(60):
            actions = env.heuristic()
            assert step.avail.gather(2, actions[..., None]).all()
            step = env.step(actions)
        return step.state
    first, second, other, fresh = (envs.Skirmish("2s3z", 8, seed=seed) for seed in (1, 1, 2, 1))
    one = battle(first)
    assert torch.equal(one, battle(second))
    assert not torch.equal(one, battle(other)) and not torch.equal(one, battle(first))
    first.generator.manual_seed(1)
    first.reset(), fresh.reset()
    facts = [name for name, fact in vars(fresh).items() if isinstance(fact, torch.Tensor)]
    assert {"x", "calm", "target", "last_actions"} < set(facts)
    assert all(torch.equal(getattr(first, name), getattr(fresh, name)) for name in facts)

@pytest.mark.parametrize("map_name", ["5m_vs_6m", "1c3s5z"])
def test_a_batch_equals_single_battles(map_name):
    """Catches any leak between environments of a batch."""
    draws = torch.rand(42, 4, len(envs.Skirmish(map_name, 1).names))
    def battles(rows):
        env, feed = envs.Skirmish(map_name, rows.stop - rows.start), iter(draws[:, rows])
        env.noise = lambda: next(feed)
        steps = [env.reset()]
        for t in range(40):
            steps.append(env.step(env.heuristic() if t % 5 else env.available().float().argmax(2)))
        return steps
    batch = battles(slice(0, 4))
    for b in range(4):
        for whole, single in zip(batch, battles(slice(b, b + 1))):
            assert all(torch.equal(many[b], one[0]) for many, one in zip(whole[:-1], single[:-1]))

def test_enemies_notice_keep_and_let_go():
    """Catches enemies that see too far or switch while they can keep, ignore who shoots them, or forget the way."""
    body, stop = 0.75, torch.tensor([[envs.STOP] * 3])  # two marines' radii
    env = arena("3m", {0: (10, 10), 1: (10, 22), 3: (10 + body + envs.NOTICE + 0.05, 10)})
    def target(calm=8, unit=3, x=None, y=10):
        if x is not None:
            env.x[0, unit], env.y[0, unit] = x, y
        env.calm.fill_(calm)
        env.order(stop)
        return int(env.target[0, 3])
    near = 10 + body + envs.NOTICE - 0.05
    assert target() == -1
    assert target(calm=7) == 0  # it was hurt in the last step
    env.target.fill_(-1)
    assert target(x=near) == 0
    assert target(unit=1, x=near, y=11) == 0  # closer, but it has one
    assert target(unit=0, x=near - body - envs.LEASH - 0.05) == 1  # out of the leash
    env.health[0, 1] = 0
    assert target() == -1 and target(calm=7, unit=0, x=near - body - envs.SIGHT - 0.05) == -1
    goal_x, goal_y, walks = env.order(stop)
    assert (goal_x[0, 3], goal_y[0, 3]) == (9, 16) and walks[0, 3]
    env.step(stop)
    walked = math.hypot(near - 9, 10 - 16) - math.hypot(env.x[0, 3] - 9, env.y[0, 3] - 16)
    assert walked == pytest.approx(8 * 3.15 / 22.4, abs=1e-3)

def test_the_heuristic_attacks_the_closest_until_it_dies():
    """Catches a heuristic that switches, attacks the dead, or walks the wrong way."""
    env = arena("3m", {0: (10, 16), 1: (10, 20), 3: (14, 16), 4: (15, 16)})
    assert env.heuristic().tolist() == [[envs.ATTACK, envs.ATTACK, 0]]
    env.last_actions = torch.tensor([[envs.ATTACK + 1, envs.ATTACK + 2, 0]])
    assert env.heuristic().tolist() == [[envs.ATTACK + 1, envs.ATTACK, 0]]
    env.health[0, 4], env.x[0, 4], env.x[0, 0], env.y[0, 1], env.x[0, 1] = 0, 7, 7.5, 24.5, 14
    assert env.heuristic().tolist() == [[envs.EAST, envs.SOUTH, 0]]

# ---- worker processes -----------------------------------------------------------------------------------------------
OWN = '''
import os, subprocess, sys, time
from pathlib import Path
import numpy as np

class Own:
    def __init__(self, seed, fault="", when=2, once="", stuck=0, limit=5, ends=0, child=False, meet="", text="", A=3):
        self.seed, self.fault, self.when, self.once, self.stuck, self.limit = seed, fault, when, once, stuck, limit
        self.ends, self.meet, self.text, self.A, self.t, self.resets = ends, meet, text, A, 0, 0
        if child:   # as a game would be; it outlives whoever does not end it
            self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", os.environ["MARK"]])
        if fault == "init": raise KeyError("no such unit")
    def reset(self):
        self.t, self.resets = 0, self.resets + 1
        if self.fault == "threads":
            import torch
            assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
            print("what a game prints"), sys.stdin.read()
        self.resets == self.stuck and time.sleep(300)
    def step(self, actions):
        self.t += 1
        if self.meet:   # waits until all others are in the same step
            Path(self.meet, f"{os.getpid()} {self.t}").touch()
            while len(list(Path(self.meet).glob(f"* {self.t}"))) < 3:
                time.sleep(0.001)
        if self.t == self.when and (not self.once or Path(self.once).read_text() == str(os.getpid())):
            self.fault == "raise" and 1 / 0
            self.fault == "hang" and time.sleep(300)
            self.fault == "die" and os._exit(17)
        done = self.t == self.ends
        return float(sum(actions)), done, {"battle_won": True} if done else {}
    def get_env_info(self):
        return dict(n_agents=2, n_actions=self.A, obs_shape=4, state_shape=5, episode_limit=self.limit)
    def get_obs(self): return [np.full(4, self.t)] * 2
    def get_state(self): return [*divmod(self.seed, 1000), *divmod(os.getpid(), 1000), np.random.randint(10**6)]
    def get_avail_actions(self): return [[1, 1] + [0] * (self.A - 2)] * 2
    def render(self): return np.full((4, 6, 3), 40 * self.t, np.uint8)
    def close(self): self.fault == "slow close" and time.sleep(1)
'''

@pytest.fixture
def here(tmp_path, monkeypatch):
    decoy = "raise ImportError('the file of that name in the wrong folder')"
    for name, text in (("own.py", OWN), ("envs.py", decoy), ("pickle.py", decoy)):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(envs, "GRACE", 3.0)
    monkeypatch.setenv("MARK", f"mark-{os.getpid()}-{time.monotonic_ns()}")
    made = []
    yield lambda *a, **k: made.append(envs.Workers(*a, **k)) or made[-1]
    for w in made:
        w.close()

def ones(w):
    return torch.ones(w.n_envs, w.n_agents, dtype=torch.int64)

def seeds_and_pids(step):
    s = step.state.long().tolist()
    return [row[0] * 1000 + row[1] for row in s], [row[2] * 1000 + row[3] for row in s]

def wait_for(mark, count, seconds=15):
    """Waits until `count` other living processes have `mark` in their environment or arguments."""
    until = time.monotonic() + seconds
    while True:
        found = []
        for p in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (p / "environ").read_bytes() + (p / "cmdline").read_bytes():  # a zombie has none
                    found += [p.name] * (p.name != str(os.getpid()))
            except OSError:
                pass
        if len(found) == count:
            return
        assert time.monotonic() < until, found
        time.sleep(0.05)

def test_episodes_in_lockstep_seeds_and_messages(here, tmp_path, monkeypatch, capfd):
    """Catches: live views; shared or unused seeds; a limit learned as an end or the reverse; a stale count; steps after
    the end; threads; a worker at a time; messages: two a step, pickled, those of a step broken off; int32 misread."""
    (tmp_path / "meet").mkdir()
    w = here("own:Own", 3, seed=3, arguments={"limit": "3", "fault": "threads", "meet": str(tmp_path / "meet")})
    assert (w.n_agents, w.n_actions, w.obs_dim, w.state_dim, w.episode_limit) == (2, 3, 4, 5, 3)
    first, sent, got, dump, load = w.reset(), [], [], pickle.dump, pickle.load
    monkeypatch.setattr(envs.pickle, "dump", lambda message, file: sent.append(message) or dump(message, file))
    monkeypatch.setattr(envs.pickle, "load", lambda file: got.append(load(file)) or got[-1])
    seeds, pids = seeds_and_pids(first)
    assert seeds == w.seeds and len(set(seeds)) == 3 and len({*pids, os.getpid()}) == 4
    assert first.avail.tolist() == [[[True, True, False]] * 2] * 3 and first.obs.dtype == torch.float32
    for b, seed in enumerate(seeds):  # numpy's global generator is seeded too
        assert first.state[b, 4] == np.random.RandomState(seed).randint(10**6)
    kept = first.obs.clone()
    for _ in range(2):
        for t in (1, 2, 3):
            step = w.step(torch.tensor([[0, 1], [1, 1], [2, 1]], dtype=torch.int32))
            assert step.reward.tolist() == [1, 2, 3] and (step.obs == t).all() and "battle_won" not in step.info
            assert not step.terminated.any() and step.truncated.tolist() == [t == 3] * 3  # cut by the limit, unasked
        assert [command for command, _ in sent] == ["step"] * 9 and len(got) == 9
        assert all(type(body) is bytes for _, body in sent + got) and len(got[0][1]) == w.rows.itemsize
        padding = w.step(torch.full((3, 2), 2))
        assert (padding.obs == 3).all() and not padding.reward.any() and len(sent) == 9  # idle: not stepped
        for marker in (tmp_path / "meet").iterdir():
            marker.unlink()
        assert (w.reset().obs == 0).all() and not w.reset().info["void"].any()
        sent.clear(), got.clear()
    monkeypatch.setattr(envs.pickle, "load", lambda file: 1 / 0)  # in the middle, as Ctrl-C
    with pytest.raises(ZeroDivisionError):
        w.step(ones(w))
    monkeypatch.setattr(envs.pickle, "load", load)
    assert w.step(ones(w)).info["void"].all() and (w.reset().obs == 0).all() and (w.step(ones(w)).obs == 1).all()
    assert (first.obs == kept).all() and capfd.readouterr().out == ""
    w.close(), wait_for(os.environ["MARK"], 0, 0)
    w = here("own:Own", 1, seed=3, arguments={"limit": 3, "ends": 3})
    assert w.seeds[0] == seeds[0] and len({*w.unused_seeds, *w.seeds}) == 10_000  # as before; never one that was used
    for _ in range(3):
        step = w.step(ones(w))
    assert step.terminated.all() and not step.truncated.any() and step.info["battle_won"].tolist() == [True]
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    w.draw(axes)
    assert np.array_equal(axes.images[0].get_array(), np.full((4, 6, 3), 120))

@pytest.mark.parametrize("name, fault, words", [
    ("own:Own", "raise", r"environment 0 \(seed \d+\) .*step: ZeroDivisionError: division by zero \(own.py"),
    ("own:Own", "init", r"environment 0 \(seed \d+\) .*start: KeyError: 'no such unit' \(own.py"),
    ("script:Own", "", "if __name__")])
def test_what_is_raised_in_a_worker_reaches_the_user(here, tmp_path, name, fault, words):
    """Catches: a bare EOFError; no environment, seed or place; workers within workers for want of `if __name__`."""
    (tmp_path / "script.py").write_text(OWN + LOAD + "envs.Workers('script:Own', 1)\n")
    with pytest.raises(envs.EnvFailure if fault else envs.UsageError) as caught:
        w = here(name, 1, arguments={"fault": fault})
        for _ in range(3):
            w.step(ones(w))
    assert re.search(words, str(caught.value)) and "\n" not in str(caught.value)

def test_hang_and_death_are_void_and_training_goes_on(here, tmp_path, capfd, monkeypatch):
    """Catches: waiting for ever; void taken for real or drawn; others disturbed; nan; old processes, seeds; orphans."""
    once, b = tmp_path / "once", 1
    w = here("own:Own", 2, arguments={"fault": "hang", "once": str(once), "limit": 4, "stuck": 4, "child": True})
    start, failed, before = w._start, None, np.array(seeds_and_pids(w.reset()))
    once.write_text(str(before[1][b]))
    monkeypatch.setattr(w, "_start", lambda b: (setattr(w, "timeout", 60.0), start(b)))
    for voided, fault in ((1, "step hangs"), (2, "killed"), (2, ""), (3, "reset hangs")):
        if fault == "reset hangs":
            w.timeout, failed = 1.0, 1 - b  # the only one that was never replaced
        now, voids = np.array(seeds_and_pids(w.reset())), []
        assert (now != before).tolist() == [[failed == 0, failed == 1]] * 2  # who failed is replaced, and nobody else
        for t in range(4):
            w.timeout = 1.0 if fault == "step hangs" and t == 1 else 60.0
            if fault == "killed" and t == 1:
                os.kill(now[1][b], signal.SIGKILL)
            step = w.step(ones(w))
            voids.append(step.info["void"].tolist())
            w.draw(types.SimpleNamespace(imshow=np.shape, axis=str), b)
            assert torch.isfinite(step.obs).all() and torch.isfinite(step.state).all() and step.avail.any(-1).all()
            assert (step.terminated | ~step.info["void"]).all() and not step.reward[step.info["void"]].any()
        before, failed = now, None
        if fault in ("step hangs", "killed"):
            failed = b
            assert voids == [[False, False]] + [[False, True]] * 3  # for the rest of that episode, of that one alone
            assert step.truncated[1 - b] and (step.obs[1 - b] == 4).all()
        else:
            assert step.truncated.all() and not np.any(voids)
        told = capfd.readouterr().err
        assert w.voided == voided and ("episode void" in told) == (fault != "")
        assert ("1 seconds (--env-timeout)" in told) == ("hangs" in fault)
    wait_for(os.environ["MARK"], 4)  # two workers and their games
    w.close(), wait_for(os.environ["MARK"], 0, 5)

def test_failures_in_a_row_are_bounded_and_starts_sooner(here, tmp_path):
    """Catches: replacing for ever; counting failures not in a row; forgetting them at a step; ten failing starts."""
    once = tmp_path / "once"
    w = here("own:Own", 1, arguments={"fault": "die", "once": str(once)}, max_failures=2)
    for void in (True, False, True, None):
        [pid] = seeds_and_pids(w.reset())[1]
        once.write_text(str(pid) if void is not False else "")
        w.step(ones(w))
        assert void is None or [w.step(ones(w)).info["void"].item() for _ in range(4)] == [void] * 4
    with pytest.raises(envs.EnvFailure, match=r"failed 2 time\(s\) in a row, the last time: its process ended in step"):
        w.step(ones(w))
    began = time.monotonic()
    with pytest.raises(envs.EnvFailure, match="no answer to reset"):
        here("own:Own", 1, arguments={"stuck": 1}, timeout=1)
    assert time.monotonic() - began < 12 + 2 * envs.GRACE

@pytest.mark.parametrize("init, closed", [(True, "2>&-"), (False, "<&- >&- 2>&-")])
def test_start_up_in_odd_surroundings(here, tmp_path, init, closed):
    """Catches: a package `envs` hidden by ours; too much for a command line or int16; closed streams; a Path."""
    (tmp_path / "envs.py").unlink(), (tmp_path / "pickle.py").unlink()  # a script's own folder comes first
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/meet.py").write_text(OWN)
    if init:
        (tmp_path / "envs/__init__.py").write_text("")
    (tmp_path / "script.py").write_text(f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(Path(envs.__file__).parent)!r}, Path.cwd() / "lib"]
from qmix import envs
import torch
w = envs.Workers("envs.meet:Own", 1, arguments=dict(text="x" * 200_000, A="40000"))
w.reset()
step = w.step(torch.tensor([[39_999, 1]]))
Path("result").write_text(f"{{step.reward.item()}} {{tuple(step.avail.shape)}}")
""")
    done = subprocess.run(f"{sys.executable} script.py {closed}", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "result").read_text() == "40000.0 (1, 2, 40000)", done.stderr

TRAINER = LOAD + """
import signal, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C
w = envs.Workers("own:Own", 1, arguments={"child": True, "fault": sys.argv[2]})
w.reset()
print("ready", flush=True)
while sys.argv[1] != "return":
    w.reset()
    for _ in range(5): w.step(torch.zeros(1, 2, dtype=torch.int64))
"""

def test_nothing_is_left_behind(here, tmp_path):
    """Catches: workers or games that outlive the trainer, however it ends; the unguarded script imported again."""
    (tmp_path / "train.py").write_text(TRAINER), (tmp_path / "pickle.py").unlink()
    trainers = {}
    for end, fault in (("return", ""), ("INT", ""), ("TERM", "slow close"), ("KILL", "hang")):
        mark = f"{os.environ['MARK']}-{end}"
        trainers[end] = subprocess.Popen([sys.executable, "train.py", end, fault], env=dict(os.environ, MARK=mark),
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for end, trainer in trainers.items():
            assert trainer.stdout.readline() == "ready\n"
            if end != "return":
                wait_for(f"{os.environ['MARK']}-{end}", 3)  # trainer, worker, game, whose name comes with exec
        time.sleep(0.3)
        for end, trainer in trainers.items():
            trainer.send_signal(getattr(signal, "SIG" + end, 0))
        for end, trainer in trainers.items():
            trainer.wait(timeout=15)
            wait_for(f"{os.environ['MARK']}-{end}", 0)
    finally:
        for trainer in trainers.values():
            trainer.kill()

# ---- what comes from outside ----------------------------------------------------------------------------------------
@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(body, ...): what a worker makes of the class Own with `body` in it, without the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    def make(body="pass", name="own:Broken", **arguments):
        (tmp_path / "own.py").write_text(OWN + f"\nclass Broken(Own):\n    {body}\n")
        sys.modules.pop("own", None)
        importlib.invalidate_caches()
        return envs.Checked(name, envs.single(name, 1, arguments))
    return make

@pytest.mark.parametrize("method, gives, words", [
    ("get_env_info", "dict(n_agents='2', n_actions=3)", "whole numbers above 0; got n_agents: '2'"),
    ("get_env_info", "7", "must give a dict with n_agents"), ("get_obs", "{0: np.zeros(4)}", "a dict: flatten it"),
    ("get_obs", "[np.zeros(7)] * 2", "numbers (float32) of shape (2, 4) = (n_agents, obs_shape); got shape (2, 7)"),
    ("get_obs", "[np.zeros(4), np.zeros(3)]", "pad unlike rows"),
    ("get_obs", "[{'seen': 0}] * 2", "a list: flatten it"), ("get_state", "None", "got None, a NoneType"),
    ("get_obs", "np.zeros((2, 8, 8, 3))", "got shape (2, 8, 8, 3): flatten what each agent sees"),
    ("get_state", "np.full(5, np.nan)", "get_state() must be finite numbers (float32) of shape (5,)"),
    ("get_avail_actions", "[[1, 1, 1], [0, 0, 0]]", "none for agent 1: each needs one; leave the dead a no-op"),
    ("get_avail_actions", "[[-1e9, -1e9, 0.0]] * 2", "must be True or False (1 or 0) of shape (2, 3)"),
    ("get_avail_actions", "[[1, 1, -np.inf]] * 2", "got -inf"), ("get_avail_actions", "[[1, 2, 0]] * 2", "got 2"),
    ("get_avail_actions", "[[1, 1, np.nan]] * 2", "got nan"), ("step", "1.0, None, {}", "got None, a NoneType"),
    ("step", "1.0, False, False, {}", "info a dict; got (1.0, False, Fal"),
    ("step", "1.0, False, None", "info a dict; got (1.0, False, None)"), ("step", "np.nan, False, {}", "got nan"),
    ("step", "[1.0, 2.0], False, {}", "reward must be one finite number (float32); got shape (2,)"),
    ("step", "1e39, False, {}", "got 1e+39"), ("step", "1.0, [False], {}", "step()'s terminated must be True or False"),
    ("step", "1.0, False, {'episode_limit': 10}", "info['episode_limit'] must be True"),
    ("step", "1.0, False, {'battle_won': [True, False]}", "info['battle_won'] must be one finite number"),
    ("render", "None", "needs a render() that gives an array (H, W, 3)"), ("close = None #", "0", "has no close"),
    ("render", "np.zeros((3, 4, 6))", "whole numbers, 0 to 255; got [[[0"), ("render", "np.zeros((3, 4, 3))", "got")])
def test_a_broken_class_is_told_in_plain_words(own, method, gives, words):
    """Catches: True for whatever is true; rewards beyond float32; a traceback of numpy; no word of what to do."""
    with pytest.raises(envs.UsageError) as caught:
        env = own(f"def {method}(self, *actions): return {gives}" if "#" not in method else method)
        env.reset()
        env.step([1, 1])
        env.picture()
    assert words in str(caught.value) and re.fullmatch("own:Broken: .*", str(caught.value))

def test_flags_and_arrays_of_every_kind(own, monkeypatch):
    """Catches: np.array(False) refused or True; reversed views, tensors, gradients refused; shared memory."""
    env = own()
    for over, limit in ((True, False), (False, True), (1, 0), (0.0, 1.0), (np.array(0), np.array(1)),
                        (np.array(True), np.bool_(False))):
        env.reset()
        answer = np.array(1.5), over, {"episode_limit": limit, "dead_allies": np.int64(1)}
        monkeypatch.setattr(env.env, "step", {(1, 1): answer}.get)
        row = env.step((1, 1))
        assert (row["reward"], row["terminated"], row["truncated"]) == (1.5, bool(over), bool(limit))
        assert np.array_equal(row["facts"], [np.nan, 1, np.nan], equal_nan=True)
    for mask, dtype in ((False, np.float32), (True, bool)):
        for given in ([[1, 0], [0, 1]], np.eye(2), np.eye(4)[::-2, ::-2], np.eye(2, dtype=bool), torch.eye(2) == 1,
                      torch.eye(2, requires_grad=True), [torch.tensor([1, 0]), torch.tensor([0, 1])]):
            for shape in ((2, 2), (..., 2, 2), (..., 2)):
                array = envs.as_array("act: obs", given, shape, mask=mask)
                assert array.dtype == dtype and array.flags.c_contiguous and sorted(array.sum(1).tolist()) == [1, 1]
                torch.from_numpy(array)[:] = 7
            with pytest.raises(envs.UsageError, match=r"^act: obs must be .* of shape \(..., 3, 2\); got shape \(2, 2"):
                envs.as_array("act: obs", given, (..., 3, 2), mask=mask)
        with pytest.raises(envs.UsageError, match="^act: obs must be .*, a ndarray: flatten it into numbers$"):
            envs.as_array("act: obs", np.array([[1, 0], [0, 1]], object), (2, 2), mask=mask)

def takes(a: int = 1, b=2, c=0.5, d=True, e="text", f: Optional[str] = None, g: "int | None" = 3,  # noqa: UP045
          h: float = 1, i: dict = None, j: "Missing" = 0, k: bool = False, **more):  # noqa: F821
    pass

@pytest.mark.parametrize("key, given, read", [
    ("a", "7", 7), ("a", "1e3", 1000), ("a", "1.5", None), ("a", "true", None), ("a", "None", None), ("b", "1e3", 1000),
    ("b", "2.5", 2.5), ("b", "None", "none"), ("b", "false", None), ("b", np.int64(4), 4), ("b", [1], None),
    ("c", "3", 3), ("c", "x", None), ("d", "false", False), ("d", "TRUE", True), ("d", "1", None), ("d", 0, None),
    ("e", "12", "12"), ("e", "Null", "Null"), ("e", "[1,2", "[1,2"), ("e", 12, None), ("f", "12", "12"),
    ("f", "none", "none"), ("g", "null", "none"), ("g", "5", 5), ("g", "5.5", None), ("h", "2", 2), ("h", "2.5", 2.5),
    ("i", '{"start": true}', {"start": True}), ("i", "[1,2", None), ("i", "{a: 1}", None), ("j", "4", 4),
    ("k", "1", None), ("k", "true", True), ("z", "1e3", 1000.0), ("z", "word", "word"), ("z", (1, 2), (1, 2))])
def test_arguments_are_read_as_the_parameter_says(key, given, read):
    """Catches: `child=false` as True; 1000.0 for 1000; text as a number. None: refused; "none": None."""
    if read is None:
        with pytest.raises(envs.UsageError, match=rf"^own:Own: {key} .*{re.escape(str(given))}"):
            envs.read_arguments("own:Own", takes, {key: given})
    else:
        value, read = envs.read_arguments("own:Own", takes, {key: given})[key], None if read == "none" else read
        assert value == read and type(value) is type(read)

def test_pairs_of_arguments():
    """Catches: a key given twice that wins silently; a dict refused; text taken apart letter by letter."""
    given = {"size": 7, "n": "x", "cap": {"start": True}, "m": None, "k": np.int64(3), "p": Path("a")}
    assert envs.pairs(given) == [("size", "7"), ("n", "x"), ("cap", '{"start": true}'), ("m", "null"), *zip("kp", "3a")]
    assert envs.pairs(["a=1", "b=x=y"]) == [("a", "1"), ("b", "x=y")] and envs.pairs([]) == []
    for given in (["a=1", "a=2"], ["a"], ["=1"], "a=1", [("a", 1)]):
        with pytest.raises(envs.UsageError, match="^--env-args takes key=value, each key once; got "):
            envs.pairs(given)

def test_modules_classes_and_their_seeds(own, tmp_path):
    """Catches: a misspelt name ignored; his missing import or TypeError swallowed; a seed lost, or forced."""
    for arguments, words in (({"limits": "5"}, "no argument limits; it has A, child, ends"),
                             ({"episode_limit": "5"}, "no argument episode_limit"),
                             ({"seed": "5"}, "seed is not an argument"),
                             ({"name": "nowhere:Own"}, "no module nowhere in .* or on Python's path"),
                             ({"name": "own:Mine"}, "the module own must have a class Mine; it has Path, Own, Broken")):
        with pytest.raises(envs.UsageError, match=words):
            own(**arguments)
    (tmp_path / "half.py").write_text("import not_there_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        own(name="half:Own")
    assert own(limit="7", fault="3").env.seed == own("def __init__(self, **m): Own.__init__(self, **m)").env.seed == 1
    for body in ("size=1): Own.__init__(self, seed=1)",
                 "**more): inner(**more); Own.__init__(self, 1)\ndef inner(size=1): pass"):
        assert own(f"def __init__(self, {body}", size="3").env.seed == 1
    for error, handed_on, more in ((TypeError, "sede=1", {}), (envs.UsageError, "**more", {"sede": "1"})):
        with pytest.raises(error, match="sede"):
            own(f"def __init__(self, **more): Own.__init__(self, {handed_on})", **more)

# ---- PettingZoo -----------------------------------------------------------------------------------------------------
class Zoo:
    """As PettingZoo's parallel environments: two unlike agents; script: (terminations, truncations) by step."""
    possible_agents, max_cycles = ["cat", "dog"], 9
    action_space = {"cat": types.SimpleNamespace(n=np.int64(3)), "dog": types.SimpleNamespace(n=2)}.__getitem__
    def __init__(self, script=(), **more):
        self.script, self.more, self.seeds, self.played = [*script, *[("", "")] * 9], more, [], []
        self.render, self.close = lambda: more.get("render_mode"), lambda: None
    def look(self):
        everyone = {"cat": {"observation": np.full((2, 2), self.t + 1), "action_mask": np.array([0, 1, 1], np.int8)},
                    "dog": np.array([self.t + 0.5])}
        return {agent: everyone[agent] for agent in self.shown}, {"dog": {"action_mask": [True, self.t == 0]}}
    def reset(self, seed=None):
        self.t, self.agents, self.shown = 0, self.possible_agents, self.possible_agents
        self.seeds.append(seed)
        return self.look()
    def step(self, actions):
        self.played.append(actions)
        over, cut = self.script[self.t]
        self.t, self.shown = self.t + 1, self.agents
        self.agents = [agent for agent in self.agents if agent not in over + cut]
        ends = [{agent: np.bool_(agent in which) for agent in self.shown} for which in (over, cut)]
        obs, infos = self.look()
        return obs, {agent: 1.5 for agent in self.shown}, *ends, infos

def zoo(env, **arguments):
    return envs.Checked("zoo:Zoo", envs.Parallel("zoo:Zoo", env, 4, arguments))

def test_pettingzoo_observations_actions_and_state():
    """Catches: no padding, lost masks, actions of another or the dead, one agent's reward, seeds, an unused state."""
    env = Zoo([("", ""), ("dog", "")])
    checked = zoo(env)
    assert [checked.info[key] for key in envs.SIZES] == [2, 3, 4, 8, 9] and "joined" in checked.info["note"]
    row = checked.reset()
    assert row["obs"].tolist() == [[1, 1, 1, 1], [0.5, 0, 0, 0]] and (row["state"] == row["obs"].ravel()).all()
    assert row["avail"].tolist() == [[False, True, True], [True, True, False]] and env.seeds == [4, None]
    for actions, played, reward, dog in (([2, 1], {"cat": 2, "dog": 1}, 3, 1.5), ([1, 0], {"cat": 1, "dog": 0}, 3, 0),
                                         ([1, 0], {"cat": 1}, 1.5, 0)):  # the dog is dead, the cat goes on
        row = checked.step(actions)
        assert env.played[-1] == played and row["reward"] == reward and not row["terminated"]
        assert row["obs"].tolist() == [[env.t + 1] * 4, [dog, 0, 0, 0]]
        assert row["avail"].tolist() == [[False, True, True], [True, False, False]]
    checked = zoo(type("Stateful", (Zoo,), {"state": lambda self: np.full((1, 3), self.t)})(), episode_limit="2")
    assert checked.info["note"] == "" and checked.info["episode_limit"] == 2
    assert [checked.reset()["state"][0], *(checked.step([1, 0])["state"][2] for _ in range(2))] == [0, 1, 2]
    assert checked.row["truncated"]

@pytest.mark.parametrize("script, terminated, alive", [
    (("cat dog", ""), True, ""), (("", "cat dog"), False, "cat dog"), (("cat dog", "cat dog"), True, ""),
    (("cat", "dog"), False, "dog"), (("cat", "cat dog"), False, "dog")])
def test_pettingzoo_ends_and_time_limits(script, terminated, alive):
    """Catches: a time limit learned as an end, or the reverse; agents that the limit cuts off shown as dead."""
    checked = zoo(Zoo([("", ""), script]))
    for _ in range(2):
        checked.reset()
        for ends in ((False, False), (terminated, not terminated)):
            row = checked.step([1, 0])
            assert (row["terminated"], row["truncated"]) == ends
        assert [agent for agent, obs in zip(("cat", "dog"), row["obs"]) if obs.any()] == alive.split()

@pytest.mark.parametrize("change, words", [
    ({"agent_iter": None}, "takes turns: name its parallel_env"), ({"max_cycles": None}, "one with --env-args episode"),
    ({"action_space": lambda *_: "Box(2)"}, "Discrete actions, .*Box"), ({"max_cycles": 2.5}, "cycles must.* 2.5"),
    ({"action_space": lambda *_: types.SimpleNamespace(n=3, start=1)}, "counted from 0; got .*start=1"),
    ({"look": lambda self: ({"cat": {"a": 1}, "dog": [1]}, {})}, "get_obs.* must be finite .*flatten it"),
    ({"look": lambda self: ({"cat": [0], "dog": [1]}, {"dog": {"action_mask": [-1, 0]}})}, "avail_actions.*got -1")])
def test_pettingzoo_that_does_not_fit_is_told(change, words):
    """Catches: a traceback, or nothing at all, for continuous actions, turns, additive masks, dicts, no limit."""
    with pytest.raises(envs.UsageError, match=f"^zoo:Zoo: .*{words}"):
        zoo(type("Odd", (Zoo,), change)()).reset()

def test_pettingzoo_is_told_by_what_it_has_and_rendered(monkeypatch):
    """Catches: a factory's environment as PyMARL's; its seed refused; render_mode lost, or pushed if unwanted."""
    module, refuses_a_seed = types.ModuleType("zoo_module"), lambda render_mode=None, N=1: None
    module.parallel_env = lambda **more: refuses_a_seed(**more) or Zoo(**more)
    monkeypatch.setitem(sys.modules, "zoo_module", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for render, mode in ((True, "rgb_array"), (False, None)):
        env = envs.single("zoo_module:parallel_env", 5, {"N": "3", "episode_limit": "4"}, render)
        assert type(env) is envs.Parallel and env.env.more == {"N": 3} | ({"render_mode": mode} if mode else {})
        assert env.render() == mode and env.limit == 4 and env.env.seeds == [5]
    module.parallel_env = lambda N: Zoo()
    assert envs.single("zoo_module:parallel_env", 5, {"N": "3"}, True).render() is None

# ---- smac, ma-gym ---------------------------------------------------------------------------------------------------
SMAC = '''
import types
class StarCraft2Env:
    def __init__(self, map_name="8m", seed=None, difficulty="7", heuristic_ai=False, continuing_episode=False,
                 replay_dir="", replay_prefix="", game_version=None, fault=""):
        self.kwargs = dict(locals())
        self.fault, self.continuing_episode, self.t, self.force_restarts, self.log = fault, continuing_episode, 0, 0, []
    def reset(self):
        if self.fault == "no start": raise ConnectionError("Failed to connect to the SC2 websocket. Is it up?")
        self.t, self.agents = 0, {0: types.SimpleNamespace(health=45 * (self.fault != "dead"))}
        self.force_restarts += self.fault == "first look"   # the units seen are those of the episode before, or dead
    def step(self, actions):
        self.t += 1
        if self.fault == "crash" and self.t == 2:
            self.force_restarts += 1
            return 0, True, {}
        if self.fault == "malformed": raise type("DecodeError", (Exception,), {})("Error parsing message")
        assert actions != [9, 9], "Agent 0 cannot perform action 9"
        limit = {"episode_limit": True} if self.t == 3 and self.continuing_episode else {}
        return 1.0, self.t == 3, {"battle_won": self.t == 3, "dead_allies": 1, "dead_enemies": 2, **limit}
    def get_env_info(self): return dict(n_agents=2, n_actions=3, obs_shape=4, state_shape=5, episode_limit=3)
    def get_obs(self): return [[self.t] * 4] * 2
    def get_state(self): return [self.t] * 5
    def get_avail_actions(self): return [[0, 1, 1]] * 2
    def save_replay(self): self.log.append("replay")
    def close(self): self.log.append("close")
'''

@pytest.fixture
def smac(tmp_path, monkeypatch):
    for path, text in {"smac/__init__.py": "", "smac/env/__init__.py": SMAC, "absl/__init__.py": "from . import flags",
                       "absl/flags.py": "class FLAGS: sc2_timeout = 360", "game/Versions/Base75689/a": "",
                       "game/Maps/SMAC_Maps/3m.SC2Map": ""}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setenv("SC2PATH", str(tmp_path / "game"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    fakes = lambda: [key for key in sys.modules if key.split(".")[0] in ("smac", "absl")]  # noqa: E731
    saved = {key: sys.modules.pop(key) for key in fakes()}
    yield tmp_path
    for key in fakes():
        del sys.modules[key]
    sys.modules.update(saved)

def fake_smac(**arguments):
    return envs.single("smac:3m", 11, arguments)

def test_smac_passes_flags_through(smac):
    """Catches: difficulty=7 or game_version 4.10 as numbers, a 360 s time-out, lost replays, ends as limits."""
    env = fake_smac(difficulty="7", game_version="4.10", continuing_episode="true", replay_dir="replays")
    k = env.env.kwargs
    assert (k["seed"], k["difficulty"], k["game_version"], k["continuing_episode"]) == (11, "7", "4.10", True)
    assert k["replay_prefix"] == "3m_11_" and k["replay_dir"] == str(smac / "replays") and (smac / "replays").is_dir()
    assert sys.modules["absl.flags"].FLAGS.sc2_timeout == 60
    for made in (env, fake_smac()):
        checked = envs.Checked("smac:3m", made)
        checked.reset()
        row = [checked.step([1, 1]) for _ in range(3)][-1]
        assert row["facts"].tolist() == [1, 1, 2] and row["truncated"] != row["terminated"]
        assert row["truncated"] == (made is env)
    env.close()
    assert env.env.log == ["replay", "close"]
    with pytest.raises(envs.UsageError, match="no argument dificulty; it has continuing_episode, difficulty"):
        fake_smac(dificulty="7")

@pytest.mark.parametrize("fault, words", [
    ("crash", "crashed and smac started it again"), ("malformed", "DecodeError: Error"), ("dead", "without units"),
    ("no start", "ConnectionError: .* SC2PATH"), ("first look", "without units"), ("", "before the first episode had")])
def test_smac_misbehaving_is_a_game_failure(smac, fault, words):
    """Catches: learning from (0, True, {}), from a dead start, from rewards scaled by a max_reward that has grown."""
    env = fake_smac(fault=fault)
    with pytest.raises(envs.GameFailure, match=words):
        for play in (env.reset, lambda: env.step([1, 1]), lambda: env.step([1, 1]), env.reset):
            play()
    if not fault:
        with pytest.raises(AssertionError, match="cannot perform"):  # our mistake, not ten void episodes
            env.step([9, 9])

def test_smac_crash_through_the_workers(smac, here):
    """Catches: an environment used again after a crash; void lost on the way; a heuristic that is not smac's own."""
    w = here("smac:3m", 1, arguments={"fault": "crash", "heuristic_ai": "true"}, max_failures=2)
    assert w.heuristic().shape == (1, 2) and not hasattr(envs.Workers, "heuristic")
    old = w.workers[0].pid
    first, step = w.step(ones(w)), w.step(ones(w))
    assert not first.info["void"] and step.info["void"] and step.terminated
    assert not step.obs.any() and not step.info["battle_won"] and w.voided == 1
    assert not w.reset().info["void"] and w.workers[0].pid != old
    w.step(ones(w))
    with pytest.raises(envs.EnvFailure, match="smac:3m: environment 0 .* failed 2 time"):
        w.step(ones(w))

def test_smac_says_what_it_needs(smac, monkeypatch):
    """Catches: a traceback where smac, the game, the map, or the right protobuf is missing."""
    for name, path, text, words in (
            ("smac:8m", "game", SMAC, "Maps/SMAC_Maps/8m.SC2Map does not exist"),
            ("smac:3m", "game/Maps", SMAC, "game/Maps/Versions does not exist"),
            ("smac:3m", "game", "raise TypeError('Descriptors cannot be made')", "TypeError: Descriptors cannot"),
            ("smac:3m", "game", "", "ImportError: cannot import name 'StarCraft2Env'")):
        monkeypatch.setenv("SC2PATH", str(smac / path))
        sys.modules.pop("smac.env", None)
        (smac / "smac/env/__init__.py").write_text(text)
        importlib.invalidate_caches()
        with pytest.raises(envs.UsageError, match=f"^{name}: .*{words}.* needs StarCraft's smac .make install-smac; "):
            envs.single(name, 1, {})

@pytest.mark.skipif(importlib.util.find_spec("smac") is None or "SC2PATH" not in os.environ,
                    reason="smac and StarCraft II are not installed")
def test_smac_itself(here):
    """Catches: what the fake does not show, on the game: sizes, a battle's facts, returns on smac's scale of 20."""
    w, total = here("smac:3m", 1), 0.0
    assert (w.n_agents, w.n_actions, w.obs_dim, w.state_dim, w.episode_limit) == (3, 9, 30, 48, 60)
    step = w.reset()
    while not (step.terminated | step.truncated).all():
        step = w.step(torch.multinomial(step.avail[0].float(), 1).T)
        total += step.reward.item()
    assert 0 <= total <= 20 and not step.info["void"].any() and step.info["battle_won"].dtype == torch.bool

def test_ma_gym_ends_and_errors():
    """Catches: a limit learned as an end, or the reverse; a stopped clock; one agent's reward; no limit; no ma-gym."""
    if importlib.util.find_spec("ma_gym") is None:
        with pytest.raises(envs.UsageError, match="not installed: `make install` adds ma-gym on Python 3.10 and 3.11"):
            envs.single("ma_gym:Switch2-v0", 1, {})
        return
    data = np.load(TESTDATA / "ma_gym_checkers.npz")
    checked = envs.Checked("ma_gym:Checkers-v3", envs.single("ma_gym:Checkers-v3", 5, {}))
    assert "joined" in checked.info["note"] and checked.info["episode_limit"] == 100
    for e, length in enumerate(data["length"]):
        checked.reset()
        for t in range(length):
            row = checked.step(data["actions"][e, t].tolist())
            assert row["reward"] == data["reward"][e, t]
        apples = data["food"][e, length, 0].any()
        assert row["terminated"] == (not apples) and row["truncated"] == apples
        assert row["terminated"] or np.array_equal(row["obs"], data["obs_v3"][e, length] / np.float32(100))
    combat = envs.Checked("ma_gym:Combat-v0", envs.single("ma_gym:Combat-v0", 5, {"episode_limit": "3"}))
    assert combat.info["note"] == "" and combat.info["episode_limit"] == 3 and combat.reset()["state"].any()
    for which, arguments, words in (("Swich2-v0", {}, "no such environment; ma-gym has Checkers-v0"),
                                    ("PongDuel-v0", {}, "no time limit of its own: give one with --env-args"),
                                    ("Switch2-v0", {"end": "1"}, "no argument end; it has")):
        with pytest.raises(envs.UsageError, match=words):
            envs.single(f"ma_gym:{which}", 1, arguments)
