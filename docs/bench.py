"""Where the time goes: the learner against the usual way of writing it, the environments, whole runs.

    python docs/bench.py           # make bench; prints its tables and writes docs/bench.md
    python docs/bench.py learner   # one part alone: learner, environments, runs
"""

import copy
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import envs  # noqa: E402
import qmix  # noqa: E402

SHAPES = {"3s5z": dict(n_agents=8, n_actions=14, obs_dim=128, state_dim=216, T=120),
          "Checkers": dict(n_agents=2, n_actions=5, obs_dim=47, state_dim=47, T=100)}


def timed(functions: dict, device: torch.device, rounds: int = 15) -> dict[str, float]:
    """Milliseconds of each, the median of `rounds`; they take turns, so that a slow moment strikes all of them."""
    spent = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                spent[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in spent.items()}


def usual_loss(team, target_team, batch: dict, gamma: float, mixer_per_step: bool) -> torch.Tensor:
    """The loss of `qmix.td_loss`, with the same weights, step by step: the inputs are built, a GRUCell and the layers
    around it are called for each time step, for the live and then for the target network."""
    obs, actions, avail, state = batch["obs"], batch["actions"].long(), batch["avail"], batch["state"]
    B, T1, N, _ = obs.shape
    onehot = F.one_hot(actions, avail.shape[-1]).to(obs.dtype)

    def values(agent):
        cell = torch.nn.GRUCell(agent.gru.input_size, agent.gru.hidden_size, device=obs.device)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(cell, name, getattr(agent.gru, name + "_l0"))
        hidden, q = obs.new_zeros(B * N, agent.gru.hidden_size), []
        for t in range(T1):
            last = onehot[:, t - 1] if t else torch.zeros_like(onehot[:, 0])
            ids = torch.eye(N, device=obs.device).unsqueeze(0).expand(B, -1, -1)
            x = torch.cat([part.reshape(B * N, -1) for part in (obs[:, t], last, ids)], dim=1)
            hidden = cell(F.relu(agent.fc1(x)), hidden)
            q.append(agent.fc2(hidden).view(B, N, -1))
        return torch.stack(q, dim=1)

    def mix(mixer, q, state):
        if not mixer_per_step:
            return mixer(q, state)
        return torch.stack([mixer(q[:, t], state[:, t]) for t in range(q.shape[1])], dim=1)

    q = values(team.agent)
    taken = q[:, :-1].gather(3, actions.unsqueeze(3)).squeeze(3)
    q_target = values(target_team.agent)[:, 1:].masked_fill(~avail[:, 1:], -9999999)
    best = q.detach().masked_fill(~avail, -9999999)[:, 1:].max(dim=3, keepdim=True)[1]
    v_next = mix(target_team.mixer, q_target.gather(3, best).squeeze(3), state[:, 1:])
    target = batch["reward"].unsqueeze(2) + gamma * (1 - batch["terminated"].float().unsqueeze(2)) * v_next
    mask = batch["filled"].float().unsqueeze(2)
    return ((mix(team.mixer, taken, state[:, :-1]) - target.detach()) * mask).pow(2).sum() / mask.sum()


def matrix_products(sizes: dict, cfg, device: torch.device):
    """The products of one update and nothing else: each once forward for the live and once for the target network,
    twice backward (for the weights and, but for the first layers, for the input)."""
    n, A, O, S, T = sizes["n_agents"], sizes["n_actions"], sizes["obs_dim"], sizes["state_dim"], sizes["T"]
    H, E, K, B = cfg.hidden_dim, cfg.mixing_dim, cfg.hypernet_dim, cfg.batch_size
    whole = [(B * (T + 1) * n, O + A + n, H, False), (B * (T + 1) * n, H, 3 * H, True), (B * (T + 1) * n, H, A, True),
             (B * T, S, K, False), (B * T, K, n * E, True), (B * T, S, E, False), (B * T, S, K, False),
             (B * T, K, E, True), (B * T, S, E, False), (B * T, E, 1, True)]
    tensors = [(torch.randn(r, i, device=device), torch.randn(i, o, device=device), torch.randn(r, o, device=device),
                again) for r, i, o, again in whole]
    h, w, g = (torch.randn(*shape, device=device) for shape in ((B * n, H), (H, 3 * H), (B * n, 3 * H)))

    def products():
        for x, weight, out, again in tensors:
            x @ weight, x @ weight, x.t() @ out
            if again:
                out @ weight.t()
        for _ in range(T + 1):  # the hidden state's own product can only be had step by step
            h @ w, h @ w, g @ w.t(), h.t() @ g
    return products


def learner(device: torch.device) -> list[str]:
    lines = ["| shapes | way | ms per update | against the usual way | matrix products' share |", "|---|---|--:|--:|--:|"]
    for name, sizes in SHAPES.items():
        torch.manual_seed(1)
        cfg = qmix.Config(env="smac:any", optimizer="adam", lr=1e-9)  # the weights stay the same
        env = SimpleNamespace(**sizes)
        team = qmix.Team(env, cfg).to(device)
        target_team = copy.deepcopy(team).requires_grad_(False)
        B, T, N, A = cfg.batch_size, sizes["T"], sizes["n_agents"], sizes["n_actions"]
        batch = dict(obs=torch.randn(B, T + 1, N, sizes["obs_dim"]), state=torch.randn(B, T + 1, sizes["state_dim"]),
                     avail=torch.rand(B, T + 1, N, A) < 0.7, actions=torch.randint(A, (B, T, N), dtype=torch.uint8),
                     reward=torch.randn(B, T), terminated=torch.zeros(B, T, dtype=torch.bool),
                     filled=torch.ones(B, T, dtype=torch.bool))
        batch["avail"][..., 0] = True
        batch = {key: value.to(device) for key, value in batch.items()}

        def usual(mixer_per_step: bool):
            optimizer = qmix.make_optimizer(team, cfg)

            def update():
                loss = usual_loss(team, target_team, batch, cfg.gamma, mixer_per_step)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(team.parameters(), cfg.grad_clip)
                optimizer.step()
                return loss
            return update

        optimizer = qmix.make_optimizer(team, cfg)
        ways = {"usual: agent per step, mixer over the episodes (as PyMARL)": usual(False),
                "agent and mixer per step": usual(True),
                "qmix.py": lambda: qmix.gradient_step(team, target_team, optimizer, batch, cfg)[0]}
        losses = [way().item() for way in ways.values()]
        assert np.allclose(losses, losses[0], rtol=1e-4), losses  # the same update
        spent = timed(ways | {"floor": matrix_products(sizes, cfg, device)}, device)
        floor, first = spent.pop("floor"), next(iter(spent.values()))
        lines += [f"| {name} | {way} | {ms:.1f} | {first / ms:.2f} | {floor / ms:.0%} |" for way, ms in spent.items()]
        lines.append(f"| {name} | matrix products alone | {floor:.1f} | {first / floor:.2f} | |")
    return lines


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    print("\n".join(learner(torch.device("cpu"))))
