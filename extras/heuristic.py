"""What an environment's own heuristic, or a random team, comes to: something to compare with.

    python -m extras.heuristic --env skirmish:2s3z --episodes 256
    python -m extras.heuristic --env checkers --random
    python -m extras.heuristic --env smac:3m --episodes 32      # smac's own heuristic
    python -m extras.heuristic --table                          # writes docs/skirmish_heuristic.csv

The last line is `result: ` and the means over the episodes: return, length, truncated (1 where a
time limit cut the episode off; smac says terminated), and what the environment tells, such as
battle_won.
"""

import contextlib
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import envs
import qmix
from extras.skirmish import MAPS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAPER = {"3m": 76, "5m": 60, "8m": 95, "2s3z": 82, "3s5z": 45, "1c3s5z": 70}  # wins of its own, %


@dataclass
class Settings:
    """Play an environment's own heuristic, or, with --random, any action that is available."""

    env: str = "skirmish:2s3z"  # as in qmix.py
    env_args: tuple[str, ...] = ()  # key=value ...: arguments of a single environment
    random: bool = False  # each agent draws one of its available actions
    episodes: int = 256  # whose means are told
    num_envs: int = 8  # environments that play side by side
    seed: int = 0
    table: bool = False  # instead: both on each skirmish map, 2048 episodes, about two minutes


def play(settings: Settings) -> dict[str, float]:
    """The means over the episodes. Raises UsageError or envs.EnvFailure."""
    if min(settings.episodes, settings.num_envs) < 1:
        raise envs.UsageError("--episodes and --num-envs must be at least 1")
    smac = settings.env.startswith("smac:")
    arguments = tuple(settings.env_args)
    if smac and not settings.random:
        arguments += ("heuristic_ai=True",)  # smac then plays other actions than it is given
    n_envs = min(settings.num_envs, settings.episodes)
    generator = torch.Generator().manual_seed(settings.seed)
    env = envs.make(settings.env, n_envs, "cpu", settings.seed, arguments)

    def random(step, memory):
        chances = step.avail.flatten(0, 1).float()  # (B*N, A)
        actions = torch.multinomial(chances, 1, generator=generator)
        return actions.view(n_envs, env.n_agents), None

    def heuristic(step, memory):
        return env.heuristic(), None

    with contextlib.closing(env):
        if settings.random or smac:
            return means(env, random, settings.episodes)
        if hasattr(env, "heuristic"):
            return means(env, heuristic, settings.episodes)
        raise envs.UsageError(f"{settings.env} has no heuristic of its own; there is --random")


def means(env, choose, episodes: int) -> dict[str, float]:
    """The means of what `rollout` tells of the first `episodes` episodes, and `truncated`."""
    rounds = []
    played = 0
    while played < episodes:
        tensors, facts = qmix.rollout(env, choose)
        ended = tensors["terminated"] & tensors["filled"]  # (B, T)
        facts["truncated"] = ~ended.any(1)
        rounds.append(facts)
        played += len(facts["length"])
    found = {}
    for name in rounds[0]:
        values = torch.cat([facts[name] for facts in rounds])
        found[name] = values[:episodes].float().mean().item()
    return found


def table_row(map_name: str, random: bool, episodes: int = 2048) -> dict:
    """A row of docs/skirmish_heuristic.csv."""
    env = f"skirmish:{map_name}"
    found = play(Settings(env=env, random=random, episodes=episodes, num_envs=episodes))
    row = {"map": map_name, "policy": "random", "paper": ""}
    if not random:
        row["policy"] = "heuristic"
        row["paper"] = PAPER.get(map_name, "")
    row["won"] = round(100 * found["battle_won"], 1)  # %
    row["timed_out"] = round(100 * found["truncated"], 1)  # %
    row["steps"] = round(found["length"], 1)
    row["return"] = round(found["return"], 2)
    row["episodes"] = episodes
    return row


def write_table() -> None:
    rows = []
    for random in (False, True):
        for map_name in MAPS:
            rows.append(table_row(map_name, random))
            print(*rows[-1].values(), flush=True)
    with open(DOCS / "skirmish_heuristic.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, 2 for bad input, 1 where an environment failed."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m extras.heuristic")
    torch.set_num_threads(1)
    try:
        if settings.table:
            write_table()
        else:
            policy = "random" if settings.random else "heuristic"
            facts = {"env": settings.env, "policy": policy, "episodes": settings.episodes}
            facts.update(play(settings))
            print("result: " + json.dumps(facts))
        return 0
    except (envs.UsageError, envs.EnvFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, envs.UsageError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
