"""Win rates of the heuristic and of random play on every skirmish map, beside the paper's: writes
docs/skirmish_heuristic.csv. What was tried before the enemy's rules were fixed is in docs/skirmish_tried.csv.

    python docs/calibrate.py            # 2048 episodes per row, about two minutes on one core
"""

import csv
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from qmix import envs  # noqa: E402

PAPER = {"3m": 76, "5m": 60, "8m": 95, "2s3z": 82, "3s5z": 45, "1c3s5z": 70}  # the paper's heuristic, % won, +-1


def play(map_name: str, policy: str, episodes: int, seed: int = 0) -> dict:
    """One episode in each of `episodes` environments; per cent won and timed out, mean steps and return."""
    env = envs.Skirmish(map_name, episodes, seed=seed)
    choose = torch.Generator().manual_seed(seed)
    step = env.reset()
    runs = torch.ones(episodes, dtype=torch.bool)
    won, timed_out, steps, returns = torch.zeros(4, episodes)
    while runs.any():
        if policy == "heuristic":
            actions = env.heuristic()
        else:  # uniform over the available actions
            actions = torch.multinomial(step.avail.flatten(0, 1).float(), 1, generator=choose).view(episodes, -1)
        step = env.step(actions)
        won += runs * step.info["battle_won"]
        timed_out += runs * step.truncated
        steps += runs
        returns += runs * step.reward
        runs &= ~(step.terminated | step.truncated)
    return {"map": map_name, "policy": policy, "paper": PAPER.get(map_name, "") if policy == "heuristic" else "",
            "won": round(100 * won.mean().item(), 1), "timed_out": round(100 * timed_out.mean().item(), 1),
            "steps": round(steps.mean().item(), 1), "return": round(returns.mean().item(), 2), "episodes": episodes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [play(name, policy, 2048) for policy in ("heuristic", "random") for name in envs.SKIRMISHES]
    with open(HERE / "skirmish_heuristic.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    for row in rows:
        print(*row.values())
