"""The paper's two-step game (section 5): six algorithms, their tables of Q_tot, their losses.

    python -m extras.two_step     # about a minute on two cores; writes docs/two_step.csv

Two processes train the algorithms, each with the preset and seed 1. Beside each learned table
stands the paper's, where it prints one.
"""

import argparse
import contextlib
import csv
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import envs
import qmix

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLUMNS = ("algo", "seed", "env_steps", "loss", "test_return")
EXPECTED = {  # the greedy return, and the loss that is left where Q_tot cannot fit the payoffs
    "iql": (7, 1.945),
    "vdn": (7, 0.5625),
    "vdn-s": (7, 0.5625),
    "qmix": (8, 0),
    "qmix-lin": (7, 0.5625),
    "qmix-ns": (8, 0),
}
PAPER = {  # Table 2: {state: rows of agent 1's action, columns of agent 2's}
    "vdn": {
        "1": [[6.94, 6.94], [6.35, 6.36]],
        "2A": [[6.99, 7.02], [6.99, 7.02]],
        "2B": [[-1.87, 2.31], [2.33, 6.51]],
    },
    "qmix": {
        "1": [[6.93, 6.93], [7.92, 7.92]],
        "2A": [[7.0, 7.0], [7.0, 7.0]],
        "2B": [[0.0, 1.0], [1.0, 8.0]],
    },
}


@torch.no_grad()
def q_tot_tables(path: str | Path) -> dict[str, list]:
    """Q_tot in the game's three states, by the last checkpoint of the run in `path`.

    Laid out as PAPER. IQL has no Q_tot: the mean of the two agents' values stands in its place.
    """
    saved = qmix.read_checkpoint(path)
    env = envs.make("two-step", n_envs=2)
    team = qmix.Team(env, saved["config"])
    team.load_state_dict(saved["team"])

    # In the first step agent 1 leads environment 0 to state 2A, and environment 1 to 2B
    actions = torch.tensor([[0, 0], [1, 0]])  # (B, N)
    first = env.reset()
    second = env.step(actions)
    obs = torch.stack([first.obs, second.obs], 1)  # (B, T, N, O)
    state = torch.stack([first.state, second.state], 1)  # (B, T, S)
    none_yet = torch.full_like(actions, -1)
    last_actions = torch.stack([none_yet, actions], 1)  # (B, T, N)
    q, _ = team.agent(obs, last_actions)  # (B, T, N, A)
    q1, q2 = q.unbind(2)  # (B, T, A) of agent 1 and 2

    table = torch.zeros(2, 2, 2, 2)  # (B, T, action of agent 1, action of agent 2)
    for i in (0, 1):
        for j in (0, 1):
            chosen = torch.stack([q1[..., i], q2[..., j]], -1)  # (B, T, N)
            table[:, :, i, j] = team.mixer(chosen, state).mean(-1)
    at_1, at_2a = table[0]  # (2, 2) each
    at_2b = table[1, 1]
    return {"1": at_1.tolist(), "2A": at_2a.tolist(), "2B": at_2b.tolist()}


def train(algo: str) -> tuple[dict, dict, list[dict]]:
    """A run with the preset -> facts of its result, its tables, its rows of metrics.csv."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))  # the progress bar
        cfg = qmix.configure("two-step", algo=algo, out=folder, device="cpu")
        facts = qmix.train(cfg)
        with open(Path(folder) / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        return facts, q_tot_tables(folder), rows


def print_table(name: str, tables: dict) -> None:
    text = f"Q_tot {name:<12}"
    for state, ((a, b), (c, d)) in tables.items():
        text += f" {state}: {a:5.2f} {b:5.2f} / {c:5.2f} {d:5.2f}  "
    print(text.rstrip())


def report(algo: str, facts: dict, tables: dict, rows: list[dict]) -> None:
    print_table(algo, tables)
    if algo in PAPER:
        print_table(f"{algo}, paper", PAPER[algo])
    greedy, left = EXPECTED[algo]
    loss = sum(float(row["loss"]) for row in rows[-3:]) / 3  # of the last 3,000 steps
    text = f"      greedy return {facts['test_return']:.0f} (expected {greedy}), "
    text += f"loss {loss:.3f} (exact {left}), {facts['seconds']:.0f} s\n"
    print(text, flush=True)


def main() -> None:
    text = "trains all six algorithms on the two-step game; writes docs/two_step.csv"
    argparse.ArgumentParser(prog="python -m extras.two_step", description=text).parse_args()
    lines = []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for algo, (facts, tables, rows) in zip(EXPECTED, pool.map(train, EXPECTED)):
            report(algo, facts, tables, rows)
            for row in rows:
                lines.append(
                    [algo, facts["seed"], row["env_steps"], row["loss"], row["test_return"]]
                )
    with open(DOCS / "two_step.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(lines)


if __name__ == "__main__":
    main()
