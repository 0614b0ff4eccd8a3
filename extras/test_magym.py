"""extras/magym.py beside ma-gym itself: each test names the mistake it would catch."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import envs
from extras.magym import MaGym

RECORDED = Path(__file__).resolve().parent.parent / "testdata" / "ma_gym_checkers.npz"
installed = importlib.util.find_spec("ma_gym") is not None
needs_ma_gym = pytest.mark.skipif(not installed, reason="ma-gym is not installed")


def make(name, **arguments):
    return envs.Group(f"ma_gym:{name}", [5], arguments)


@pytest.mark.skipif(installed, reason="ma-gym is installed")
def test_a_missing_ma_gym_is_one_line():
    """Catches: a traceback where ma-gym cannot be installed."""
    with pytest.raises(envs.UsageError, match="is not installed; make install adds"):
        MaGym("Switch2-v0", 1)


@needs_ma_gym
def test_checkers_is_the_recorded_game():
    """Catches: observations, rewards or ends of another step; a clock that is not observed."""
    data = np.load(RECORDED)
    group = make("Checkers-v3")
    for episode in range(4):
        step = group.reset()
        for t in range(data["length"][episode]):
            seen = data["obs_v3"][episode, t] / np.float32(100)
            np.testing.assert_allclose(step.obs[0], seen, atol=1e-6)
            np.testing.assert_allclose(step.state[0], seen.ravel(), atol=1e-6)
            step = group.step([data["actions"][episode, t].tolist()])
            assert step.reward[0] == pytest.approx(data["reward"][episode, t], abs=1e-5)
        eaten = not data["food"][episode, data["length"][episode], 0].any()
        assert step.terminated[0] == eaten
        assert step.truncated[0] != eaten


@needs_ma_gym
def test_a_real_end_in_the_last_step_is_an_end():
    """Catches: ma-gym's own limit, which marks everybody done, taken for the end or hiding it."""
    data = np.load(RECORDED)
    last = data["food"][:, 100, 0].any(1)
    (episode, *_) = np.flatnonzero((data["length"] == 100) & ~last)  # the last apple at step 100
    group = make("Checkers-v0")
    group.reset()
    for t in range(100):
        step = group.step([data["actions"][episode, t].tolist()])
    assert step.terminated[0]
    assert not step.truncated[0]


@needs_ma_gym
def test_a_given_limit_truncates():
    """Catches: episode_limit ignored, a time limit stored as an end."""
    group = make("Checkers-v0", episode_limit=3)
    group.reset()
    for t in range(3):
        step = group.step([[4, 4]])
    assert group.get_sizes()[-1] == 3  # the last of SIZES
    assert step.truncated[0]
    assert not step.terminated[0]


@needs_ma_gym
def test_one_agent_that_is_done_does_not_end_the_episode(monkeypatch):
    """Catches: any(done) for all(done)."""
    game = MaGym("Switch2-v0", 1)
    monkeypatch.setattr(game.env, "step", lambda actions: (None, [1.0, 2.0], [True, False], {}))
    reward, over, _ = game.step([4, 4])
    assert reward == 3.0
    assert not over


@needs_ma_gym
@pytest.mark.parametrize("name", ["Switch2-v0", "TrafficJunction4-v0", "Combat-v0"])
def test_others_give_checked_steps(name):
    """Catches: sizes that differ from what is given, a mask without an action."""
    group = make(name, episode_limit=5)
    step = group.reset()
    for t in range(5):
        actions = [int(np.flatnonzero(mask)[0]) for mask in step.avail[0]]
        step = group.step([actions])
    assert (step.terminated | step.truncated).all()
    group.close()


@needs_ma_gym
@pytest.mark.parametrize("name, arguments", [("Nowhere-v0", {}), ("Switch2-v0", {"siz": 3})])
def test_wrong_names_and_arguments_are_one_line(name, arguments):
    """Catches: gym's own error, a traceback."""
    with pytest.raises(envs.UsageError, match="Nowhere|siz"):
        MaGym(name, 1, **arguments)
