"""Where the time goes: the learner against the usual way of writing it, the environments, whole runs; time to result.

    python docs/bench.py                         # make bench: the first three parts
    python docs/bench.py learner                 # some of them: learner, environments, runs
    python docs/bench.py result checkers 1 2 3   # whole runs, minutes each; what follows the seeds are flags of qmix.py

Each part prints its table and puts it into docs/bench.md, in place of its former one. Linux.
"""

import copy
import csv
import itertools
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import qmix  # noqa: E402

HEADS = {
    "learner": "One learner update, 32 episodes. Usual, as in PyMARL: at each time step the inputs are built and a "
               "GRUCell with the layers around it is called; then the mixer runs over whole episodes. Same weights "
               "(that the losses agree is asserted). Last column: the time of the update's matrix products alone over "
               "the whole.",
    "environments": "`step` alone, random available actions.",
    "runs": "Whole runs, and two processes against one on an environment that computes for 4 ms per step.",
    "result": "Whole runs of `qmix.py`. CPU seconds are the processor's, start and evaluations included, up to the "
              "moment in which the evaluation that reached the goal is told: unlike clock time they hardly depend on "
              "other work on the machine. On Checkers all later evaluations must reach the goal too.",
}
GOALS = {  # column, what it must reach, and whether every later evaluation must too
    "checkers": ("test_return", 83.4, True), "skirmish:3m": ("test_win_rate", 0.9, False),
    "skirmish:2s3z": ("test_win_rate", 0.9, False), "skirmish:3s5z": ("test_win_rate", 0.8, False),
}
SHAPES = {"3s5z": dict(n_agents=8, n_actions=14, obs_dim=128, state_dim=216, episode_limit=150),
          "Checkers": dict(n_agents=2, n_actions=5, obs_dim=47, state_dim=67, episode_limit=100)}


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


def usual_loss(team, target_team, batch: dict, gamma: float) -> torch.Tensor:
    """The loss of `qmix.td_loss`, with the same weights; the inputs are built, a GRUCell and the layers around it are
    called for each time step, for the live and then for the target network."""
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

    q = values(team.agent)
    taken = q[:, :-1].gather(3, actions.unsqueeze(3)).squeeze(3)
    q_target = values(target_team.agent)[:, 1:].masked_fill(~avail[:, 1:], -9999999)
    best = q.detach().masked_fill(~avail, -9999999)[:, 1:].max(dim=3, keepdim=True)[1]
    v_next = target_team.mixer(q_target.gather(3, best).squeeze(3), state[:, 1:])
    target = batch["reward"].unsqueeze(2) + gamma * (1 - batch["terminated"].float().unsqueeze(2)) * v_next
    mask = batch["filled"].float().unsqueeze(2)
    return ((team.mixer(taken, state[:, :-1]) - target.detach()) * mask).pow(2).sum() / mask.sum()


def matrix_products(sizes: dict, cfg, device: torch.device):
    """The products of one update and nothing else: each once forward for the live and once for the target network,
    twice backward (for the weights and, but for the first layers, for the input)."""
    n, A, O, S, T = sizes["n_agents"], sizes["n_actions"], sizes["obs_dim"], sizes["state_dim"], sizes["episode_limit"]
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
    B, T, N, A = len(lengths), sizes["episode_limit"], sizes["n_agents"], sizes["n_actions"]
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
    lengths = torch.linspace(1, share, cfg.batch_size).mul(sizes["episode_limit"]).long()  # the longest first
    batch = {name: value.to(device) for name, value in random_batch(sizes, lengths).items()}
    optimizers = [qmix.make_optimizer(team, cfg) for _ in range(2)]

    def usual() -> torch.Tensor:
        loss = usual_loss(team, target_team, batch, cfg.gamma)
        optimizers[0].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(team.parameters(), cfg.grad_clip)
        optimizers[0].step()
        return loss

    ways = {"usual": usual,
            "qmix.py": lambda: qmix.gradient_step(team, target_team, optimizers[1], batch, cfg)[0]}
    losses = [way().item() for way in ways.values()]
    assert np.allclose(losses, losses[0], rtol=1e-4), losses  # it is the same update
    return timed(ways | {"matrix products alone": matrix_products(sizes, cfg, device)}, device)


def learner(device: torch.device) -> Iterator[str]:
    yield "| shapes | episodes | one update | ms | speed (usual = 1) | matrix products' share |"
    yield "|---|---|---|--:|--:|--:|"
    for (name, sizes), share in itertools.product(SHAPES.items(), (1.0, 0.36)):
        found = compare_learners(sizes, device, share)
        floor, usual = found["matrix products alone"], found["usual"]
        episodes = "all of full length" if share == 1 else "from 36 % to full length"
        for way, ms in found.items():
            if share == 1 or way != "matrix products alone":
                part = f"{floor / ms:.0%}" if share == 1 else ""
                yield f"| {name} | {episodes} | {way} | {ms:.1f} | {usual / ms:.2f} | {part} |"


def environments(device: torch.device) -> Iterator[str]:
    names = ["two-step", *(f"checkers-v{v}" for v in range(4)), *(f"skirmish:{name}" for name in qmix.envs.SKIRMISHES)]
    yield "| environment | steps/s, 32 environments | steps/s, 1024 environments |"
    yield "|---|--:|--:|"
    for name in names:
        speeds = []
        for n_envs in (32, 1024):
            env, best = qmix.envs.make(name, n_envs, device), 0.0
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
        yield f"| {name} | {speeds[0]:,.0f} | {speeds[1]:,.0f} |"


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


def child(flags: list[str], cwd: str, ranks: int = 1) -> tuple[list[float], list[dict]]:
    """Run qmix.py; the processor seconds it had used when it told of each evaluation, and the rows of metrics.csv."""
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    process = subprocess.Popen([sys.executable, *start, str(HERE.parent / "qmix.py"), *flags, "--out", f"{cwd}/run"],
                               cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    used, lines = [], []
    for line in process.stdout:
        lines.append(line)
        if re.match(r" *\d+ steps, ", line):
            stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()  # Linux
            used.append((int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"))  # in user mode, in the kernel
    if process.wait():
        raise SystemExit("".join(lines[-20:]))
    with open(f"{cwd}/run/metrics.csv") as file:
        return used, list(csv.DictReader(file))


def runs(device: torch.device) -> Iterator[str]:
    slow = ("--env slow:Slow --num-envs 1 --threads 1 --batch-size 8 --buffer-size 64 --test-episodes 1 "
            "--test-interval-steps 100000")
    jobs = {"Checkers, preset, its first 150,000 steps": (1, "--env checkers --total-steps 150000"),
            "skirmish:2s3z, preset, its first 60,000 steps": (1, "--env skirmish:2s3z --total-steps 60000"),
            "4 ms of computing per step, 1 process": (1, slow + " --total-steps 4000"),
            "the same, torchrun with 2 processes": (2, slow + " --total-steps 8000")}
    yield "| run | env steps/s |"
    yield "|---|--:|"
    for name, (ranks, flags) in jobs.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "slow.py").write_text(SLOW)
            _, rows = child([*flags.split(), "--device", str(device)], folder, ranks)
        yield f"| {name} | {float(rows[-1]['env_steps']) / float(rows[-1]['seconds']):,.0f} |"


def first_reached(values: list[float], goal: float, held: bool) -> int | None:
    """Where `goal` was reached first; held: where it was reached and never lost again."""
    good = [value >= goal for value in values]
    start = len(good) - [*reversed(good), False].index(False) if held else [*good, True].index(True)
    return start if start < len(good) else None


def result(device: torch.device, env: str, seeds: list[str], flags: list[str]) -> Iterator[str]:
    (column, goal, held), reached = GOALS[env], []
    yield f"| seed | CPU seconds to {column} {goal:g} | env steps to it | CPU seconds in all | at the end |"
    yield "|---|--:|--:|--:|--:|"
    for seed in seeds:
        given = ["--env", env, "--seed", seed, "--threads", "1", "--device", str(device), *flags]
        with tempfile.TemporaryDirectory() as folder:
            used, rows = child(given, folder)
        values = [float(row[column]) for row in rows]
        at = first_reached(values, goal, held)
        reached.append((math.inf, math.inf) if at is None else (used[at], float(rows[at]["env_steps"])))
        cells = " | ".join(f"{number:,.0f}" for number in (*reached[-1], used[-1]))
        yield f"| {seed} | {cells} | {values[-1]:.4g} |".replace("inf", "never")
    middle = " | ".join(f"{statistics.median(numbers):,.0f}" for numbers in zip(*reached))
    yield f"| median of {len(seeds)} | {middle} | | |".replace("inf", "never")


def keep(title: str, text: str) -> None:
    """Put a section into docs/bench.md, in place of its former one."""
    file = HERE / "bench.md"
    first, *sections = re.split(r"(?m)^## ", file.read_text() if file.exists() else "# Speed\n\n")
    sections = {section.partition("\n")[0]: section for section in sections} | {title: f"{title}\n\n{text}\n\n"}
    file.write_text((first + "".join(f"## {section}" for section in sections.values())).rstrip() + "\n")


def main(arguments: list[str]) -> None:
    jobs = {part: () for part in arguments}
    if arguments[0] == "result":
        env, seeds = "".join(arguments[1:2]), list(itertools.takewhile(str.isdigit, arguments[2:]))
        if env not in GOALS or not seeds:
            raise SystemExit(f"expected: result ENV SEED ..., with ENV one of {', '.join(GOALS)}")
        jobs = {"result": (env, seeds, arguments[2 + len(seeds):])}
    if unknown := jobs.keys() - HEADS.keys():
        raise SystemExit(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(HEADS)}")
    device = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu").device
    model = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    measured = (f"Measured {time.strftime('%Y-%m-%d')}: torch {torch.__version__}, Python {platform.python_version()}, "
                f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else platform.machine()}, "
                + (torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU, one thread")
                + f"; load average before: {os.getloadavg()[0]:.1f}.")
    for part, more in jobs.items():
        title = " ".join(["Time to result:", more[0], *more[2]]) if part == "result" else part.capitalize()
        print(f"{title}. {measured}", flush=True)
        lines = []
        for line in globals()[part](device, *more):
            print(line, flush=True)
            lines.append(line)
        keep(title, "\n".join([HEADS[part], "", *lines, "", measured]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:] or ["learner", "environments", "runs"])
