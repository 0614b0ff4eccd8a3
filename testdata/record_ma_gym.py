"""Plays ma-gym's Checkers, all four variants, and writes ma_gym_checkers.npz: what test_envs.py compares with.

    python testdata/record_ma_gym.py        (Python 3.10 or 3.11, after make install-ma-gym)

32 episodes, the same actions in each variant. E episodes of up to T = 100 steps, padded with zeros: length (E,),
actions (E, T, 2), reward (E, T), obs_v0 .. obs_v3 (E, T + 1, 2, O) in hundredths, cells (E, T + 1, 2): where the agents
are, 8 * row + column, food (E, T + 1, 2, 24): the apples and lemons that are left, and events: the corners of the rules
that some episode meets, all of EVENTS.
"""

import random
from pathlib import Path

import gym
import ma_gym  # noqa: F401  (registers the environments)
import numpy as np
from ma_gym.envs.checkers.checkers import PRE_IDS

MOVES = ((1, 0), (0, -1), (-1, 0), (0, 1), (0, 0))  # down, left, up, right, stay
EVENTS = {
    "both want one cell",
    "agent 0 bumps into the edge",
    "agent 1 bumps into the edge",
    "time-out",
    "agent 0 bumps into the other",
    "agent 1 bumps into the other",
    "agent 1 enters the cell agent 0 just left",
    "agent 0 eats the last apple",
    "agent 1 eats the last apple",
    "last apple eaten while the other moves",
    "last apple exactly at step 100",
}
HABITS = ("random", "eat", "eat", "race", "race", "walls", "chase", "crash")


def make(variant):
    env = gym.make(f"ma_gym:Checkers-v{variant}").unwrapped
    env._Checkers__draw_base_img = lambda: (
        None
    )  # a picture at every reset, which takes most of its time
    return env


def places(env):
    return [tuple(env.agent_pos[agent]) for agent in (0, 1)]


def food(env):
    """(2, 24): where apples are, and lemons."""
    cells = [cell for row in env._full_obs for cell in row]
    return np.array([[cell == PRE_IDS[kind] for cell in cells] for kind in ("apple", "lemon")])


def wanted(place, action):
    return place[0] + MOVES[action][0], place[1] + MOVES[action][1]


def toward(rng, here, there):
    down, right = there[0] - here[0], there[1] - here[1]
    return rng.choice(
        [0] * max(down, 0) + [2] * max(-down, 0) + [3] * max(right, 0) + [1] * max(-right, 0) or [4]
    )


def choose(rng, habit, env, last, wait):
    """Actions biased toward the corners of the rules; `wait`: leave the last apple until so many steps are over."""
    at, left = places(env), food(env)
    apples, anything = (
        [divmod(int(cell), 8) for cell in np.flatnonzero(kind)] for kind in (left[0], left.any(0))
    )
    nearest = [
        min(apples, key=lambda cell: abs(cell[0] - row) + abs(cell[1] - column))
        for row, column in at
    ]
    actions = [rng.randrange(5), rng.randrange(5)]
    if habit == "eat" and rng.random() < 0.9:
        actions = [toward(rng, at[0], nearest[0]), toward(rng, at[1], rng.choice(anything))]
    elif habit == "race" and rng.random() < 0.9:
        actions = [toward(rng, at[agent], nearest[0]) for agent in (0, 1)]
    elif habit == "walls" and rng.random() < 0.7:
        actions = last
    elif habit == "chase" and rng.random() < 0.8:
        actions[1] = toward(rng, at[1], at[0])
    elif habit == "crash" and rng.random() < 0.6:
        actions = [toward(rng, at[0], at[1]), toward(rng, at[1], at[0])]
    for agent in (0, 1):
        if (
            len(apples) == 1
            and env._step_count < wait
            and wanted(at[agent], actions[agent]) == apples[0]
        ):
            actions[agent] = 4
    return actions


def met(before, after, actions, apples, apples_left, step):
    """The events of one step; before, after: where the agents were and are."""
    aims, events = [wanted(before[agent], actions[agent]) for agent in (0, 1)], set()
    if aims[0] == aims[1] and actions[0] != 4 and actions[1] != 4:
        events.add("both want one cell")
    for agent, other in ((0, before[1]), (1, after[0])):  # agent 0 moves first
        if aims[agent][0] not in range(3) or aims[agent][1] not in range(8):
            events.add(f"agent {agent} bumps into the edge")
        elif actions[agent] != 4 and aims[agent] == other:
            events.add(f"agent {agent} bumps into the other")
    if after[1] == before[0] and before[1] != before[0]:
        events.add("agent 1 enters the cell agent 0 just left")
    if apples_left == 0:
        eater = next(agent for agent in (0, 1) if apples[8 * after[agent][0] + after[agent][1]])
        events.add(f"agent {eater} eats the last apple")
        if after[1 - eater] != before[1 - eater]:
            events.add("last apple eaten while the other moves")
        if step == 100:
            events.add("last apple exactly at step 100")
    elif step == 100:
        events.add("time-out")
    return events


def play(env, pick):
    """One episode; pick(last actions) -> actions. Returns its arrays as lists, and its events."""
    obs, cells, left, actions, rewards, events, done = (
        [env.reset()],
        [],
        [food(env)],
        [],
        [],
        set(),
        False,
    )
    cells.append([8 * row + column for row, column in places(env)])
    while not done:
        before = places(env)
        actions.append(list(pick(actions[-1] if actions else [1, 1])))
        seen, reward, dones, info = env.step(actions[-1])
        done = all(dones)
        events |= met(
            before, places(env), actions[-1], left[-1][0], info["food_count"]["apple"], len(actions)
        )
        obs.append(seen)
        rewards.append(sum(reward))
        left.append(food(env))
        cells.append([8 * row + column for row, column in places(env)])
        assert left[-1].sum(1).tolist() == [
            info["food_count"]["apple"],
            info["food_count"]["lemon"],
        ]
    return {"obs": obs, "cells": cells, "food": left, "actions": actions, "reward": rewards}, events


def replay(actions):
    turns = iter(actions)
    return lambda last: next(turns)


def padded(lists, length, dtype):
    shape = np.shape(lists[0])[1:]
    out = np.zeros((len(lists), length, *shape), dtype)
    for row, values in zip(out, lists):
        row[: len(values)] = values
    return out


if __name__ == "__main__":
    rng, env, kept, seen = random.Random(0), make(0), [], set()
    for k in range(5000):
        habit = HABITS[k % len(HABITS)]
        wait = rng.choice((0, 98, 99)) if habit in ("eat", "race") else 0
        episode, events = play(
            env, lambda last, habit=habit, wait=wait: choose(rng, habit, env, last, wait)
        )
        if len(kept) < 32 or events - seen:
            kept.append(episode)
            seen |= events
        if seen == EVENTS and len(kept) >= 32:
            break
    assert seen == EVENTS, EVENTS - seen
    data = {
        "length": np.array([len(episode["actions"]) for episode in kept]),
        "events": np.array(sorted(seen)),
        "actions": padded([episode["actions"] for episode in kept], 100, np.int8),
        "reward": padded([episode["reward"] for episode in kept], 100, np.float32),
        "cells": padded([episode["cells"] for episode in kept], 101, np.int8),
        "food": padded([episode["food"] for episode in kept], 101, bool),
    }
    for variant in range(4):
        env = make(variant)
        again = [play(env, replay(episode["actions"]))[0] for episode in kept]
        assert all(
            one[key] == two[key]
            for one, two in zip(again, kept)
            for key in ("cells", "actions", "reward")
        )
        hundredths = [np.round(np.array(episode["obs"]) * 100) for episode in again]
        assert all((np.array(one["obs"]) == two / 100).all() for one, two in zip(again, hundredths))
        data[f"obs_v{variant}"] = padded(hundredths, 101, np.uint8)
    np.savez_compressed(Path(__file__).with_name("ma_gym_checkers.npz"), **data)
    print(len(kept), "episodes;", sorted(seen))
