"""The paper's two-step game (section 5): six algorithms, their tables of Q_tot beside the paper's, their losses.

    python docs/two_step.py            # about half a minute on two cores; writes docs/two_step.csv
"""

import contextlib
import csv
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import qmix  # noqa: E402

EXACT = {"qmix": (8, 0), "qmix-ns": (8, 0), "iql": (7, 1.945)}  # greedy return, plateau of the loss; others: 7, 0.5625


PAPER_TABLES = {  # Table 2 of the paper
    "vdn": {"1": [[6.94, 6.94], [6.35, 6.36]], "2A": [[6.99, 7.02], [6.99, 7.02]], "2B": [[-1.87, 2.31], [2.33, 6.51]]},
    "qmix": {"1": [[6.93, 6.93], [7.92, 7.92]], "2A": [[7.0, 7.0], [7.0, 7.0]], "2B": [[0.0, 1.0], [1.0, 8.0]]},
}


def print_tables(tables: dict, algo: str) -> None:
    """The learned tables, and the paper's beside them where it prints any."""
    for name, source in [(algo, tables), (f"{algo}, paper", PAPER_TABLES.get(algo))]:
        if source:
            cells = (f"{state}: " + " / ".join("{:5.2f} {:5.2f}".format(*row) for row in rows)
                     for state, rows in source.items())
            print(f"Q_tot {name:<12} " + "   ".join(cells))


def run(algo: str, seed: int = 1) -> tuple[dict, list[dict]]:
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        facts = qmix.train(qmix.Config(env="two-step", algo=algo, seed=seed, out=folder, device="cpu"))
        with open(Path(folder) / "metrics.csv") as file:
            return facts, list(csv.DictReader(file))


def main() -> None:
    algos = list(qmix.MIXERS)
    with multiprocessing.get_context("spawn").Pool(2) as pool, open(HERE / "two_step.csv", "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["algo", "seed", "env_steps", "loss", "test_return"])
        for algo, (facts, rows) in zip(algos, pool.imap(run, algos)):
            print_tables(facts["q_tot"], algo)
            loss, (greedy, plateau) = sum(float(row["loss"]) for row in rows[-3:]) / 3, EXACT.get(algo, (7, 0.5625))
            print(f"{'':6}greedy return {facts['test_return']:.0f} (paper {greedy}), "
                  f"loss {loss:.3f} (exact {plateau}), {facts['seconds']:.0f} s\n", flush=True)
            table.writerows([algo, facts["seed"], row["env_steps"], row["loss"], row["test_return"]] for row in rows)


if __name__ == "__main__":
    main()
