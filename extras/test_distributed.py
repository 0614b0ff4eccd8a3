"""extras/distributed.py on two processes: each test names the mistake it would catch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import qmix

HERE = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
PATIENCE = 180  # seconds that a busy machine may take for what an idle one does in five


def start(*arguments, **more):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=HERE, env={**environment, **more}, **pipes)


def start_ranks(*arguments):
    """Two processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = []
    for rank in "01":
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": str(port)}
        ranks.append(start(*arguments, **shared, **own))
    return ranks


def wait_until(happened, process):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def running(word):
    """The processes with `word` among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_text():
                found.append(path.parent.name)
        except OSError:
            pass  # it has ended
    return found


def settings(**given):
    small = {"num_envs": 2, "batch_size": 3, "buffer_size": 8, "hidden_dim": 8, "threads": 1}
    return qmix.configure(given.pop("env", "skirmish:3m"), **{"device": "cpu", **small, **given})


def be_a_rank(folder):
    """What each of two processes does for the fixture below."""
    from extras import distributed

    cfg = distributed.join(settings(optimizer="rmsprop", lr_anneal=False))
    run = distributed.DistributedRun(cfg)
    alone = qmix.Team(run.env, cfg)  # the same network, whose gradients stay its own
    gradients = []
    due = []
    while run.counts["updates"] < 3:
        run.play()
        due.append(run.updates_due())
        if due[-1] > 0:
            alone.load_state_dict(run.team.state_dict())
            before = run.generators["sample"].get_state()
            batch = run.replay.sample(cfg.batch_size, run.generators["sample"])
            run.generators["sample"].set_state(before)
            loss, *_ = qmix.td_loss(alone, run.target_team, batch, cfg.gamma, True, cfg.td_lambda)
            alone.zero_grad()
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in alone.parameters()]))
        run.learn()
    found = {
        "gradients": gradients,
        "averaged": torch.cat([p.grad.flatten() for p in run.team.parameters()]),
        "team": run.team.state_dict(),
        "counts": run.counts,
        "due": due,
        "obs": run.replay.data["obs"],
    }
    rank = distributed.dist.get_rank()
    distributed.dist.destroy_process_group()
    found["threads"] = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    code = "import sys; from extras.test_distributed import be_a_rank; be_a_rank(sys.argv[1])"
    processes = start_ranks("-c", code, folder)
    for process in processes:
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_gradients_are_the_mean_of_both_ranks(ranks):
    """Catches: gradients that are summed, left alone, or averaged after clipping."""
    mean = (ranks[0]["gradients"][-1] + ranks[1]["gradients"][-1]) / 2
    mean = mean * min(1.0, 10.0 / mean.norm().item())  # clipped afterwards
    for rank in ranks:
        torch.testing.assert_close(rank["averaged"], mean, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ranks[0]["gradients"][-1], ranks[1]["gradients"][-1])


def test_ranks_keep_the_same_weights(ranks):
    """Catches: ranks that begin with other weights, or drift apart."""
    for name, value in ranks[0]["team"].items():
        assert torch.equal(value, ranks[1]["team"][name]), name


def test_ranks_play_different_episodes(ranks):
    """Catches: the same seed for all."""
    assert not torch.equal(ranks[0]["obs"], ranks[1]["obs"])


def test_counts_are_those_of_all_ranks(ranks):
    """Catches: counts of one rank alone, updates due by the episodes of both."""
    assert ranks[0]["counts"] == ranks[1]["counts"]
    rounds = len(ranks[0]["due"])
    assert ranks[0]["counts"]["episodes"] == 4 * rounds
    assert ranks[0]["due"] == ranks[1]["due"] == [0, 1, 0, 1, 0, 1]  # 2 a round, 4 an update


def test_no_thread_outlives_the_group(ranks):
    """Catches: gloo's threads, kept by an import, that abort Python's exit now and then."""
    for rank in ranks:
        assert not [name for name in rank["threads"] if "gloo" in name]


def test_torchrun_learns_the_two_step_game_and_rank_0_alone_speaks(tmp_path):
    """Catches: two ranks that do not learn together, results printed or written twice."""
    flags = "--env two-step --total-steps 4000 --lr 1e-2 --threads 1 --device cpu --out".split()
    process = start(*TORCHRUN, "extras.distributed", *flags, tmp_path / "run")
    out, err = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("result: ")]
    facts = json.loads(line.removeprefix("result: "))
    assert facts["test_return"] == 8
    assert facts["episodes"] == 2000
    assert out.count("4000 steps,") == 1
    team = qmix.load(tmp_path / "run")
    assert team.config.seed == 1


def test_a_rank_that_dies_ends_the_other(tmp_path):
    """Catches: a rank that waits for ever for one that is gone."""
    flags = "--env two-step --total-steps 1000000000 --device cpu --out".split()
    first, second = start_ranks("-m", "extras.distributed", *flags, tmp_path / "run")
    wait_until((tmp_path / "run" / "metrics.csv").exists, first)
    second.kill()
    began = time.monotonic()
    _, err = first.communicate(timeout=PATIENCE)
    second.communicate()
    assert time.monotonic() - began < 60
    assert first.returncode == 1, err


def test_a_failure_ends_the_group_too(tmp_path):
    """Catches: gloo's threads, left after an error, that abort Python's exit now and then."""
    code = "import sys; from extras import distributed; code = distributed.main(sys.argv[1:])"
    (tmp_path / "file").touch()  # no folder for a run
    flags = ["--env", "two-step", "--device", "cpu", "--out", tmp_path / "file"]
    ask = "; print(code, distributed.dist.is_initialized())"
    first, second = start_ranks("-c", code + ask, *flags)
    out, err = first.communicate(timeout=PATIENCE)
    second.communicate(timeout=PATIENCE)
    assert out.split()[-2:] == ["2", "False"], err


def test_sigterm_to_torchrun_ends_all(tmp_path):
    """Catches: ranks that go on without torchrun."""
    flags = "--env two-step --total-steps 1000000000 --device cpu --out".split()
    process = start(*TORCHRUN, "extras.distributed", *flags, tmp_path / "run")
    wait_until((tmp_path / "run" / "metrics.csv").exists, process)
    assert len(running(str(tmp_path))) == 3  # torchrun and two ranks
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while running(str(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_resume_is_refused(tmp_path):
    """Catches: a run that goes on with one rank's replay in silence."""
    qmix.train(settings(env="two-step", total_steps=20, out=tmp_path / "run"))
    for process in start_ranks("-m", "extras.distributed", "--resume", tmp_path / "run"):
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 2
        assert "only trains" in err
        assert "Traceback" not in err
