"""Where the time goes: an update of the learner, environments, worker processes, whole runs.

    python -m extras.bench                                # learner, environments, workers, runs
    python -m extras.bench workers                        # some of them
    python -m extras.bench result checkers 1 2 3          # whole runs, minutes each: ENV SEED ...
    python -m extras.bench result checkers 1 --algo vdn   # what follows are flags of qmix.py

Each part prints its table and puts it into docs/bench.md, in place of its former one. Linux.
"""

import contextlib
import copy
import csv
import importlib.util
import itertools
import math
import os
import platform
import random
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
from torch import Tensor

import envs
import qmix
from extras.skirmish import MAPS

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "docs" / "bench.md"


# ------------------------------------------------------------------------------- the learner
SHAPES = {
    "3s5z": {
        "n_agents": 8,
        "n_actions": 14,
        "obs_dim": 128,
        "state_dim": 216,
        "episode_limit": 150,
    },
    "Checkers": {
        "n_agents": 2,
        "n_actions": 5,
        "obs_dim": 47,
        "state_dim": 67,
        "episode_limit": 100,
    },
}


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(functions: dict, device: torch.device, rounds: int = 15) -> dict[str, float]:
    """Milliseconds of each, the median of `rounds`. They take turns: a slow moment hits all."""
    spent = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            wait(device)
            if turn >= 2:  # two to warm up
                spent[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in spent.items()}


def usual_values(agent: qmix.Agent, batch: dict) -> Tensor:
    """(B, T+1, N, A): at each time step the inputs are built, and the layers are called."""
    obs = batch["obs"]
    B, rows, N, _ = obs.shape
    cell = torch.nn.GRUCell(agent.gru.input_size, agent.gru.hidden_size, device=obs.device)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(agent.gru, name + "_l0"))
    hidden = obs.new_zeros(B * N, agent.gru.hidden_size)
    last = obs.new_zeros(B, N, agent.n_actions)
    q = []
    for t in range(rows):
        if t > 0:
            last = F.one_hot(batch["actions"][:, t - 1], agent.n_actions)
        ids = torch.eye(N, device=obs.device).expand(B, N, N)
        x = torch.cat([obs[:, t], last, ids], dim=2).flatten(0, 1)  # (B*N, O+A+N)
        hidden = cell(F.relu(agent.fc1(x)), hidden)
        q.append(agent.fc2(hidden).view(B, N, -1))
    return torch.stack(q, dim=1)


def usual_loss(team, target_team, batch: dict, gamma: float) -> Tensor:
    """The loss of `qmix.td_loss`, with the same weights, as in PyMARL."""
    unavailable = ~batch["avail"][:, 1:]
    state = batch["state"]
    reward = batch["reward"].unsqueeze(2)
    goes_on = 1 - batch["terminated"].float().unsqueeze(2)
    mask = batch["filled"].float().unsqueeze(2)
    q = usual_values(team.agent, batch)
    taken = q[:, :-1].gather(3, batch["actions"].unsqueeze(3)).squeeze(3)
    q_target = usual_values(target_team.agent, batch)[:, 1:]
    best = q.detach()[:, 1:].masked_fill(unavailable, -9999999).max(dim=3, keepdim=True)[1]
    q_next = q_target.gather(3, best).squeeze(3)
    target = reward + gamma * goes_on * target_team.mixer(q_next, state[:, 1:])
    error = team.mixer(taken, state[:, :-1]) - target.detach()
    return (error * mask).pow(2).sum() / mask.sum()


def matrix_products(sizes: dict, cfg: qmix.Config, device: torch.device):
    """A function that computes the matrix products of one update, and nothing else.

    Each product is computed forward for the live and for the target network, and backward for the
    weights and, behind the first layers, for the inputs.
    """
    N = sizes["n_agents"]
    A = sizes["n_actions"]
    S = sizes["state_dim"]
    T = sizes["episode_limit"]
    H = cfg.hidden_dim
    E = cfg.mixing_dim
    K = cfg.hypernet_dim
    steps = cfg.batch_size * T
    rows = cfg.batch_size * (T + 1) * N
    first = [(rows, sizes["obs_dim"] + A + N, H)]  # (rows, inputs, outputs)
    first += [(steps, S, K), (steps, S, E), (steps, S, K), (steps, S, E)]
    behind = [(rows, H, 3 * H), (rows, H, A)]
    behind += [(steps, K, N * E), (steps, K, E), (steps, E, 1)]

    def noise(*shape) -> Tensor:
        return torch.randn(*shape, device=device)

    layers = []
    for i, (n, inputs, outputs) in enumerate(first + behind):
        tensors = (noise(n, inputs), noise(inputs, outputs), noise(n, outputs))
        layers.append((*tensors, i >= len(first)))
    hidden = noise(cfg.batch_size * N, H)
    recurrent = noise(H, 3 * H)
    gradient = noise(cfg.batch_size * N, 3 * H)

    def products() -> None:
        for x, weight, out, inputs_too in layers:
            torch.mm(x, weight)
            torch.mm(x, weight)
            torch.mm(x.t(), out)
            if inputs_too:
                torch.mm(out, weight.t())
        for _ in range(T + 1):  # the GRU's hidden state: one step after another
            torch.mm(hidden, recurrent)
            torch.mm(hidden, recurrent)
            torch.mm(hidden.t(), gradient)
            torch.mm(gradient, recurrent.t())

    return products


def random_batch(sizes: dict, lengths: Tensor) -> dict[str, Tensor]:
    """Noise in the shape of what Replay.sample returns."""
    B = len(lengths)
    N = sizes["n_agents"]
    A = sizes["n_actions"]
    T = sizes["episode_limit"]
    avail = torch.rand(B, T + 1, N, A) < 0.7
    avail[..., 0] = True
    return {
        "obs": torch.randn(B, T + 1, N, sizes["obs_dim"]),
        "state": torch.randn(B, T + 1, sizes["state_dim"]),
        "avail": avail,
        "actions": torch.randint(A, (B, T, N)),
        "reward": torch.randn(B, T),
        "terminated": torch.zeros(B, T, dtype=torch.bool),
        "filled": torch.arange(T) < lengths[:, None],
    }


def compare_learners(sizes: dict, device: torch.device, share: float) -> dict[str, float]:
    """Milliseconds of one update, each way. share: the shortest episode, in parts of the longest.

    Asserts that both ways have the same loss.
    """
    torch.manual_seed(1)
    cfg = qmix.Config("smac:any", optimizer="adam", lr=1e-9)  # the weights stay what they are
    team = qmix.Team(SimpleNamespace(**sizes), cfg).to(device)
    target_team = copy.deepcopy(team).requires_grad_(False)
    lengths = torch.linspace(1, share, cfg.batch_size) * sizes["episode_limit"]  # longest first
    batch = random_batch(sizes, lengths.long())
    batch = {name: value.to(device) for name, value in batch.items()}
    usual_optimizer = qmix.make_optimizer(team, cfg)
    optimizer = qmix.make_optimizer(team, cfg)

    def usual() -> Tensor:
        loss = usual_loss(team, target_team, batch, cfg.gamma)
        usual_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(team.parameters(), cfg.grad_clip)
        usual_optimizer.step()
        return loss

    def ours() -> Tensor:
        return qmix.gradient_step(team, target_team, optimizer, batch, cfg)[0]

    assert np.isclose(usual().item(), ours().item(), rtol=1e-4), "it is another update"
    products = matrix_products(sizes, cfg, device)
    ways = {"usual": usual, "qmix.py": ours, "matrix products alone": products}
    return timed(ways, device)


def learner(device: torch.device) -> Iterator[str]:
    yield "| shapes | episodes | one update | ms | speed (usual = 1) | matrix products' share |"
    yield "|---|---|---|--:|--:|--:|"
    for name, sizes in SHAPES.items():
        found = compare_learners(sizes, device, share=1.0)
        for way, ms in found.items():
            speed = found["usual"] / ms
            part = found["matrix products alone"] / ms
            yield f"| {name} | all of full length | {way} | {ms:.1f} | {speed:.2f} | {part:.0%} |"
        found = compare_learners(sizes, device, share=0.36)
        for way in ("usual", "qmix.py"):
            ms = found[way]
            speed = found["usual"] / ms
            yield f"| {name} | from 36 % to full length | {way} | {ms:.1f} | {speed:.2f} | |"


# -------------------------------------------------------------------------- the environments
def any_actions(avail: Tensor) -> Tensor:
    """Random available actions, (B, N)."""
    return torch.rand(avail.shape, device=avail.device).masked_fill(~avail, -1).argmax(-1)


def steps_per_second(name: str, n_envs: int, device: torch.device, seconds: float) -> float:
    """`step` alone."""
    env = envs.make(name, n_envs, device)
    step = env.reset()
    spent = 0.0
    steps = 0
    while spent < seconds:
        actions = any_actions(step.avail)
        start = time.perf_counter()
        step = env.step(actions)
        wait(device)
        spent += time.perf_counter() - start
        steps += 1
        if steps % env.episode_limit == 0:
            step = env.reset()
    return n_envs * steps / spent


def environments(device: torch.device) -> Iterator[str]:
    yield "| environment | steps/s, 32 environments | steps/s, 1024 environments |"
    yield "|---|--:|--:|"
    checkers = [f"checkers-v{variant}" for variant in range(4)]
    maps = [f"skirmish:{map_name}" for map_name in MAPS]
    for name in ["two-step", *checkers, *maps]:
        cells = []
        for n_envs in (32, 1024):
            # The best of three: what the machine can do, not what else it had to do
            tries = [steps_per_second(name, n_envs, device, 0.3) for _ in range(3)]
            cells.append(f"{max(tries):,.0f}")
        yield f"| {name} | {' | '.join(cells)} |"


# ---------------------------------------------------------------------- the worker processes
FORAGING = "lbforaging:Foraging-8x8-2p-3f-v3"


class Tiny:
    """An environment that computes nearly nothing."""

    def get_env_info(self):
        sizes = {"n_agents": 2, "n_actions": 6, "obs_shape": 15, "state_shape": 30}
        return {**sizes, "episode_limit": 50}

    def reset(self):
        self.steps = 0

    def step(self, actions):
        self.steps += 1
        return 1.0, self.steps == 50, {}

    def get_obs(self):
        return np.ones((2, 15))

    def get_state(self):
        return np.ones(30)

    def get_avail_actions(self):
        return np.ones((2, 6))

    def close(self):
        pass


def bare_speed(env, seconds: float) -> float:
    """Steps per second in this process, with all that a worker asks an environment for."""
    steps = 0
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        env.reset()
        over = False
        while not over:
            env.get_obs()
            env.get_state()
            avail = env.get_avail_actions()
            actions = [random.choice(np.flatnonzero(row)) for row in avail]
            _, over, _ = env.step(actions)
            steps += 1
    speed = steps / (time.perf_counter() - start)
    env.close()
    return speed


def workers_speed(name: str, arguments: tuple[str, ...], n_envs: int, seconds: float) -> float:
    """Steps per second of whole episodes in worker processes. Steps after an end do not count."""

    def choose(step, memory):
        return any_actions(step.avail), None

    with contextlib.closing(envs.make(name, n_envs, "cpu", 1, arguments)) as env:
        qmix.rollout(env, choose)  # the first one starts them
        start = time.perf_counter()
        steps = 0
        while time.perf_counter() < start + seconds:
            _, facts = qmix.rollout(env, choose)
            steps += int(facts["length"].sum())
        return steps / (time.perf_counter() - start)


def workers(device: torch.device, seconds: float = 5.0) -> Iterator[str]:
    """Level-Based Foraging, or Tiny if that isn't installed."""
    name = "extras.bench:Tiny"
    arguments = ()
    bare = Tiny()
    if importlib.util.find_spec("lbforaging"):
        from extras.adapters import Gymnasium

        name = "extras.adapters:Gymnasium"
        arguments = (f"env={FORAGING}",)
        bare = Gymnasium(FORAGING, seed=1)
    called = " ".join([name, *arguments])
    yield "| environment | number | steps/s |"
    yield "|---|--:|--:|"
    yield f"| {called} | 1, in this process | {bare_speed(bare, seconds):,.0f} |"
    for n_envs in (2, 8, 16):
        speed = workers_speed(name, arguments, n_envs, seconds)
        yield f"| {called} | {n_envs}, in workers | {speed:,.0f} |"


# -------------------------------------------------------------------------------- whole runs
RUNS = {
    "Checkers, preset, its first 150,000 steps": "--env checkers --total-steps 150000",
    "skirmish:2s3z, preset, its first 60,000 steps": "--env skirmish:2s3z --total-steps 60000",
}
GOALS = {  # column, what it must reach, and whether every later evaluation must too
    "checkers": ("test_return", 83.4, True),
    "skirmish:3m": ("test_win_rate", 0.9, False),
    "skirmish:2s3z": ("test_win_rate", 0.9, False),
    "skirmish:3s5z": ("test_win_rate", 0.8, False),
}


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, in user mode and in the kernel. Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def train(flags: list[str]) -> tuple[list[float], list[dict]]:
    """Run qmix.py -> the CPU seconds used at each evaluation, the rows of metrics.csv."""
    command = [sys.executable, str(ROOT / "qmix.py"), *flags]
    used = []
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, "--out", folder + "/run"],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for line in process.stdout:
            lines.append(line)
            if re.match(r" *\d+ steps, ", line):  # it tells of an evaluation
                used.append(cpu_seconds(process.pid))
        if process.wait() != 0:
            raise SystemExit("".join(lines[-20:]))
        with open(folder + "/run/metrics.csv") as file:
            return used, list(csv.DictReader(file))


def runs(device: torch.device) -> Iterator[str]:
    yield "| run | env steps/s |"
    yield "|---|--:|"
    for name, flags in RUNS.items():
        _, rows = train([*flags.split(), "--device", str(device)])
        speed = float(rows[-1]["env_steps"]) / float(rows[-1]["seconds"])
        yield f"| {name} | {speed:,.0f} |"


def first_reached(values: list[float], goal: float, held: bool) -> int | None:
    """Where `goal` was reached first; held: where it was reached and never lost again."""
    reached = None
    for i, value in enumerate(values):
        if value < goal:
            if held:
                reached = None
        elif reached is None:
            reached = i
    return reached


def number(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:,.0f}"


def result(device: torch.device, env: str, seeds: list[str], flags: list[str]) -> Iterator[str]:
    column, goal, held = GOALS[env]
    all_seconds = []
    all_steps = []
    goal_text = f"CPU seconds to {column} {goal:g}"
    yield f"| seed | {goal_text} | env steps to it | CPU seconds in all | at the end |"
    yield "|---|--:|--:|--:|--:|"
    for seed in seeds:
        given = ["--env", env, "--seed", seed, "--threads", "1", "--device", str(device), *flags]
        used, rows = train(given)
        values = [float(row[column]) for row in rows]
        at = first_reached(values, goal, held)
        seconds = math.inf
        steps = math.inf
        if at is not None:
            seconds = used[at]
            steps = float(rows[at]["env_steps"])
        all_seconds.append(seconds)
        all_steps.append(steps)
        cells = f"{number(seconds)} | {number(steps)} | {used[-1]:,.0f} | {values[-1]:.4g}"
        yield f"| {seed} | {cells} |"
    seconds = number(statistics.median(all_seconds))
    steps = number(statistics.median(all_steps))
    yield f"| median of {len(seeds)} | {seconds} | {steps} | | |"


# ----------------------------------------------------------------------------- docs/bench.md
TEXTS = {
    "learner": """
One learner update, 32 episodes. Usual, as in PyMARL: at each time step the inputs are built and a
GRUCell with the layers around it is called; then the mixer runs over whole episodes. Same weights
(that the losses agree is asserted). Last column: the time of the update's matrix products alone
over the whole.
""",
    "environments": "`step` alone, random available actions.",
    "workers": """
Single environments, random available actions, whole episodes. In this process: one environment's
own methods, without checks. In workers: `envs.make` and `qmix.rollout`. All episodes of a round
start together; what follows an episode's end is not counted.
""",
    "runs": "Whole runs of `qmix.py`.",
    "result": """
Whole runs of `qmix.py`. CPU seconds are the processor's, start and evaluations included, up to the
moment in which the evaluation that reached the goal is told: unlike clock time they hardly depend
on other work on the machine. On Checkers all later evaluations must reach the goal too.
""",
}
PARTS = {"learner": learner, "environments": environments, "workers": workers, "runs": runs}


def machine(device: torch.device) -> str:
    model = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = model[1] if model else platform.machine()
    gpu = "no GPU, one thread"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
    return (
        f"Measured {time.strftime('%Y-%m-%d')}: torch {torch.__version__}, "
        f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores of {processor}, "
        f"{gpu}; load average before: {os.getloadavg()[0]:.1f}."
    )


def keep(title: str, text: str) -> None:
    """Put a section into docs/bench.md, in place of its former one."""
    old = BENCH.read_text() if BENCH.exists() else "# Speed\n"
    first, *sections = re.split(r"(?m)^## ", old)
    texts = {section.partition("\n")[0]: section.strip() for section in sections}
    texts[title] = f"{title}\n\n{text}"
    pieces = [first.strip()] + [f"## {section}" for section in texts.values()]
    BENCH.write_text("\n\n".join(pieces) + "\n")


def show(part: str, title: str, lines: Iterator[str], measured: str) -> None:
    """Print the lines as they come, then keep them."""
    print(f"{title}. {measured}", flush=True)
    shown = []
    for line in lines:
        print(line, flush=True)
        shown.append(line)
    keep(title, "\n".join([TEXTS[part].strip(), "", *shown, "", measured]))


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    torch.set_num_threads(1)
    device = envs.find_device("auto")
    measured = machine(device)
    if arguments[:1] == ["result"]:
        env = "".join(arguments[1:2])
        seeds = list(itertools.takewhile(str.isdigit, arguments[2:]))
        flags = arguments[2 + len(seeds) :]
        if env not in GOALS or not seeds:
            print(
                f"error: expected result ENV SEED ..., ENV of {', '.join(GOALS)}", file=sys.stderr
            )
            return 2
        title = " ".join(["Time to result:", env, *flags])
        show("result", title, result(device, env, seeds, flags), measured)
        return 0
    unknown = [part for part in arguments if part not in PARTS]
    if unknown:
        known = ", ".join([*PARTS, "result"])
        print(f"error: expected parts of {known}, not {', '.join(unknown)}", file=sys.stderr)
        return 2
    for part in arguments or PARTS:
        show(part, part.capitalize(), PARTS[part](device), measured)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
