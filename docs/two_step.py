"""The paper's two-step game (section 5): six algorithms, their tables of Q_tot beside the paper's, their losses.

    python docs/two_step.py            # under a minute on two cores; writes docs/two_step.csv
"""

import contextlib
import csv
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import qmix  # noqa: E402

EXACT = {"qmix": (8, 0), "qmix-ns": (8, 0), "iql": (7, 1.945)}  # greedy return, plateau of the loss; others: 7, 0.5625
PAPER_TABLES = {  # Table 2 of the paper
    "vdn": {"1": [[6.94, 6.94], [6.35, 6.36]], "2A": [[6.99, 7.02], [6.99, 7.02]], "2B": [[-1.87, 2.31], [2.33, 6.51]]},
    "qmix": {"1": [[6.93, 6.93], [7.92, 7.92]], "2A": [[7.0, 7.0], [7.0, 7.0]], "2B": [[0.0, 1.0], [1.0, 8.0]]},
}


@torch.no_grad()
def q_tot_tables(run: str | Path) -> dict[str, list]:
    """Q_tot of the game's three states, by the last checkpoint of a run; row: agent 1's action, column: agent 2's. IQL
    has no Q_tot: the mean of the two agents' values stands in its place."""
    env = qmix.envs.make("two-step", n_envs=2)
    start = env.reset()
    second = env.step(torch.tensor([[0, 0], [1, 0]]))  # environment 0 goes to 2A, 1 to 2B

    def load(saved: dict) -> qmix.Team:
        team = qmix.Team(env, qmix.Config(**saved["config"]))
        team.load_state_dict(saved["team"])
        return team

    team = qmix.read_checkpoint(Path(run), load)
    obs, state = torch.stack([start.obs, second.obs], 1), torch.stack([start.state, second.state], 1)
    last_actions = torch.tensor([[[-1, -1], [0, 0]], [[-1, -1], [1, 0]]])  # (B, T, N)
    q, _ = team.agent(obs, last_actions)  # (B, T, N, A)
    cells = [team.mixer(torch.stack([q[..., 0, i], q[..., 1, j]], -1), state).mean(-1) for i in (0, 1) for j in (0, 1)]
    table = torch.stack(cells, -1).view(2, 2, 2, 2)  # (B, T, A, A)
    return {"1": table[0, 0].tolist(), "2A": table[0, 1].tolist(), "2B": table[1, 1].tolist()}


def print_tables(tables: dict, algo: str) -> None:
    """The learned tables, and the paper's beside them where it prints any."""
    for name, source in [(algo, tables), (f"{algo}, paper", PAPER_TABLES.get(algo))]:
        if source:
            cells = (f"{state}: " + " / ".join("{:5.2f} {:5.2f}".format(*row) for row in rows)
                     for state, rows in source.items())
            print(f"Q_tot {name:<12} " + "   ".join(cells))


def train(algo: str, seed: int = 1) -> tuple[dict, dict, list[dict]]:
    """The result line's facts, the tables and the rows of metrics.csv of a run with the preset."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        facts = qmix.train(qmix.Config(env="two-step", algo=algo, seed=seed, out=folder, device="cpu"))
        with open(Path(folder) / "metrics.csv") as file:
            return facts, q_tot_tables(folder), list(csv.DictReader(file))


def main() -> None:
    algos = ("iql", "vdn", "vdn-s", "qmix", "qmix-lin", "qmix-ns")
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool, open(HERE / "two_step.csv", "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["algo", "seed", "env_steps", "loss", "test_return"])
        for algo, (facts, tables, rows) in zip(algos, pool.map(train, algos)):
            print_tables(tables, algo)
            loss, (greedy, plateau) = sum(float(row["loss"]) for row in rows[-3:]) / 3, EXACT.get(algo, (7, 0.5625))
            print(f"{'':6}greedy return {facts['test_return']:.0f} (paper {greedy}), "
                  f"loss {loss:.3f} (exact {plateau}), {facts['seconds']:.0f} s\n", flush=True)
            table.writerows([algo, facts["seed"], row["env_steps"], row["loss"], row["test_return"]] for row in rows)


if __name__ == "__main__":
    main()
