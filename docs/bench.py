"""Where the time goes: the learner against the usual way of writing it, the environments, whole runs.

    python docs/bench.py           # make bench; prints its tables and writes docs/bench.md
    python docs/bench.py learner   # some parts: learner, environments, runs
"""

import copy
import csv
import itertools
import os
import platform
import statistics
import subprocess
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

HEADS = {
    "learner": "**One learner update**, 32 episodes. Usual: inputs built, GRUCell and the layers around it called at "
               "each time step, as PyMARL does, with the same weights (the losses agree: it is asserted). Last column: "
               "the time of the update's matrix products alone over the whole.",
    "environments": "**Environments**: `step` alone, random available actions.",
    "runs": "**Whole runs**, and two processes against one on an environment that computes for 4 ms per step.",
}
SHARES = ("share_env", "share_act", "share_learn")
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


def random_batch(sizes: dict, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Noise in the shape of what Replay.sample returns."""
    B, T, N, A = len(lengths), sizes["T"], sizes["n_agents"], sizes["n_actions"]
    avail = torch.rand(B, T + 1, N, A) < 0.7
    avail[..., 0] = True
    return dict(obs=torch.randn(B, T + 1, N, sizes["obs_dim"]), state=torch.randn(B, T + 1, sizes["state_dim"]),
                avail=avail, actions=torch.randint(A, (B, T, N), dtype=torch.uint8), reward=torch.randn(B, T),
                terminated=torch.zeros(B, T, dtype=torch.bool), filled=torch.arange(T) < lengths[:, None])


def compare_learners(sizes: dict, device: torch.device, share: float) -> dict[str, float]:
    """Milliseconds of one update, each way; `share` of the longest episode: the length of the shortest."""
    torch.manual_seed(1)
    cfg = qmix.Config(env="smac:any", optimizer="adam", lr=1e-9)  # the weights stay what they are
    team = qmix.Team(SimpleNamespace(**sizes), cfg).to(device)
    target_team = copy.deepcopy(team).requires_grad_(False)
    lengths = torch.linspace(1, share, cfg.batch_size).mul(sizes["T"]).long()  # the longest first
    batch = {name: value.to(device) for name, value in random_batch(sizes, lengths).items()}
    sampled = batch | {"lengths": lengths}  # on the host, as Replay.sample has them
    optimizers = [qmix.make_optimizer(team, cfg) for _ in range(3)]

    def usual(optimizer, mixer_per_step: bool) -> torch.Tensor:
        loss = usual_loss(team, target_team, batch, cfg.gamma, mixer_per_step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(team.parameters(), cfg.grad_clip)
        optimizer.step()
        return loss

    ways = {"usual: agent per step, mixer over the episodes": lambda: usual(optimizers[0], False),
            "agent and mixer per step": lambda: usual(optimizers[1], True),
            "qmix.py": lambda: qmix.gradient_step(team, target_team, optimizers[2], sampled, cfg)[0]}
    losses = [way().item() for way in ways.values()]
    assert np.allclose(losses, losses[0], rtol=1e-4), losses  # it is the same update
    return timed(ways | {"matrix products alone": matrix_products(sizes, cfg, device)}, device)


def learner(device: torch.device) -> list[str]:
    lines = ["| shapes | episodes | one update | ms | times the usual way | matrix products' share |",
             "|---|---|---|--:|--:|--:|"]
    for (name, sizes), share in itertools.product(SHAPES.items(), (1.0, 0.36)):
        found = compare_learners(sizes, device, share)
        floor, usual = found["matrix products alone"], next(iter(found.values()))
        episodes = "all of full length" if share == 1 else "from 36 % to full length"
        for way, ms in found.items():
            if share == 1 or way != "matrix products alone":
                part = f"{floor / ms:.0%}" if share == 1 else ""
                lines.append(f"| {name} | {episodes} | {way} | {ms:.1f} | {usual / ms:.2f} | {part} |")
    return lines


def environments(device: torch.device) -> list[str]:
    names = ["two-step", *(f"checkers-v{v}" for v in range(4)), *(f"skirmish:{name}" for name in envs.SKIRMISHES)]
    lines = ["| environment | steps/s, 32 environments | steps/s, 1024 environments |", "|---|--:|--:|"]
    for name in names:
        speeds = []
        for n_envs in (32, 1024):
            env, best = envs.make(name, n_envs, device), 0.0
            for _ in range(3):  # the best of three: what the machine can, not what else it had to do
                step, spent, steps = env.reset(), 0.0, 0
                while spent < 0.3:
                    actions = torch.rand(step.avail.shape, device=device).masked_fill(~step.avail, -1).argmax(-1)
                    start = time.perf_counter()
                    step = env.step(actions)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    spent += time.perf_counter() - start
                    steps += 1
                    if steps % env.episode_limit == 0:
                        step = env.reset()
                best = max(best, n_envs * steps / spent)
            speeds.append(best)
        lines.append(f"| {name} | {speeds[0]:,.0f} | {speeds[1]:,.0f} |")
    return lines


SLOW = """
import time
class Slow:
    def get_env_info(self):
        return dict(n_agents=2, n_actions=2, obs_shape=2, state_shape=2, episode_limit=50)
    def reset(self):
        self.t = 0
    def step(self, actions):
        end, self.t = time.process_time() + 0.004, self.t + 1
        while time.process_time() < end:
            pass
        return float(actions[0] == actions[1]), self.t == 50, {}
    def get_obs(self):
        return [[1.0, 0.0], [0.0, 1.0]]
    def get_state(self):
        return [1.0, 1.0]
    def get_avail_actions(self):
        return [[1, 1], [1, 1]]
    def close(self):
        pass
"""


def runs(device: torch.device) -> list[str]:
    """Whole runs through the command line: where the time goes, and the most memory that the process held."""
    slow = ("--env slow:Slow --num-envs 1 --threads 1 --batch-size 8 --buffer-size 64 --test-episodes 1 "
            "--test-interval-steps 100000")
    jobs = {"Checkers, preset, its first 150,000 steps": "--env checkers --total-steps 150000",
            "skirmish:2s3z, preset, its first 60,000 steps": "--env skirmish:2s3z --total-steps 60000",
            "4 ms of computing per step, 1 process": slow + " --total-steps 4000",
            "the same, torchrun with 2 processes": slow + " --total-steps 8000"}
    lines = ["| run | env steps/s | environment | acting | learning | peak memory |", "|---|--:|--:|--:|--:|--:|"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "slow.py").write_text(SLOW)
        for i, (name, flags) in enumerate(jobs.items()):
            ranks = ["-m", "torch.distributed.run", "--nproc-per-node=2"] if "torchrun" in name else []
            done = subprocess.run([sys.executable, *ranks, str(HERE.parent / "qmix.py"), *flags.split(), "--device",
                                   str(device), "--out", f"{folder}/{i}"], cwd=folder, text=True, capture_output=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            peak = next(line for line in done.stdout.splitlines() if line.startswith("peak")).split(": ")[1]
            with open(f"{folder}/{i}/metrics.csv") as file:
                rows = [row for row in csv.DictReader(file) if float(row["env_steps"]) > 0]
            seconds = np.array([float(row["env_steps"]) / float(row["env_steps_per_second"]) for row in rows])
            mean = {c: np.average([float(row[c]) for row in rows], weights=seconds) for c in SHARES}
            speed = float(rows[-1]["env_steps"]) / float(rows[-1]["seconds"])
            lines.append(f"| {name} | {speed:,.0f} | " + " | ".join(f"{mean[c]:.0%}" for c in SHARES) + f" | {peak} |")
    return lines


def main(parts: list[str]) -> None:
    if unknown := set(parts) - set(HEADS):
        raise SystemExit(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(HEADS)}")
    device = qmix.pick_device("auto")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = [f"Measured {time.strftime('%Y-%m-%d')} with `python docs/bench.py`: torch {torch.__version__}, Python "
            f"{platform.python_version()}, {cores} CPU cores, learner and environments on "
            + (torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread") + "."]
    print(text[0])
    for part in parts:
        table = ["", HEADS[part], "", *globals()[part](device)]
        print("\n".join(table), flush=True)
        text += table
    if parts == list(HEADS):
        (HERE / "bench.md").write_text("\n".join(["# Speed", "", *text, ""]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:] or list(HEADS))
