"""README.md's examples and numbers, and the scripts in docs/. Each test names the mistake it would catch."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import qmix

HERE, LEARNERS = Path(qmix.__file__).parent, sorted(qmix.MIXERS)

def load_script(name):
    spec = importlib.util.spec_from_file_location(name, HERE / "docs" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

def readme_block(word):
    """The first Python block of README.md that contains `word`."""
    blocks = (HERE / "README.md").read_text().split("```python\n")[1:]
    return next(block.split("```")[0] for block in blocks if word in block)

def test_readme_own_environment_runs_as_printed(tmp_path, monkeypatch, capfd):
    """Catches: an example that does not run, --env-args that do not arrive, voided or lost columns."""
    (tmp_path / "mygame.py").write_text(readme_block("class Meet"))
    monkeypatch.chdir(tmp_path)
    assert qmix.main("--env mygame:Meet --env-args size=3 --num-envs 2 --total-steps 60 --batch-size 4 --buffer-size 8 "
                     "--test-episodes 2 --test-interval-steps 60 --out run --device cpu".split()) == 0
    facts = json.loads(capfd.readouterr().out.splitlines()[-1].removeprefix("result: "))
    assert facts["updates"] > 0 and Path("run/metrics.csv").read_text().endswith(",0\n")
    assert qmix.main("--evaluate run --episodes 2 --env-args size=1".split()) == 0  # they have met before they move
    assert json.loads(capfd.readouterr().out.removeprefix("result: "))["mean_length"] == 1

def test_readme_python_lines_run(tmp_path, monkeypatch):
    """Catches: lines for other projects, names in the table of the paper, columns that have drifted from the code."""
    monkeypatch.chdir(tmp_path)
    scope, text = {}, (HERE / "README.md").read_text()
    exec(readme_block("qmix.train").replace("total_steps=50_000", "total_steps=200"), scope)
    assert scope["actions"].shape == (1, 2) and scope["action"].shape == (1,) and scope["facts"]["env_steps"] >= 200
    for name in re.findall(r"`(\w[\w./]+)`", text.split("| in the paper |")[1].split("\n\n")[0]):
        assert (HERE / name).exists() or any(hasattr(part, name) for part in (qmix, qmix.envs, qmix.Run)), name
    assert ", ".join(qmix.COLUMNS) in " ".join(text.split())

def test_gathered_runs_are_kept_apart(tmp_path):
    """Catches: one run gathered twice, a run with other flags drawn among those of the preset, the last weights taken
    for the best ones, COMA's settings read as QMIX's."""
    pytest.importorskip("matplotlib")
    plot, folders = load_script("plot"), [tmp_path / str(i) for i in range(4)]
    plot.AGAIN = 64
    given = [qmix.Config(env="skirmish:3m", **each) for each in
             (dict(seed=1), dict(seed=2, out="x", threads=3), dict(seed=1, lr=0.5, double_q=False))]
    for i, cfg in enumerate([*given, plot.coma.Config(env="skirmish:3m", hidden_dim=16)]):
        folders[i].mkdir()
        (folders[i] / "config.json").write_text(json.dumps(dict(config=vars(cfg))))
        rows = [",".join([str(10 * i + j)] * len(qmix.COLUMNS)) for j in range(3)]
        (folders[i] / "metrics.csv").write_text("\n".join([",".join(qmix.COLUMNS), *rows]))
        saved = qmix.checkpoint((plot.coma.COMA if i == 3 else qmix.Run)(cfg), whole=False)
        # The first run's best policy stands and shoots, all at the first enemy in reach; the others' only stand
        wishes = torch.tensor([0, 4, 0, 0, 0, 0, 7, 6, 5] if i == 0 else [0, 1, 0, 0, 0, 0, 0, 0, 0])
        saved["team"]["agent.fc2.bias"].copy_(1e3 * wishes)
        torch.save(saved, folders[i] / "best.pt")
    plot.gather(tmp_path / "all.csv", folders[:2])
    plot.gather(tmp_path / "all.csv", folders[2:])  # those that are there stay
    runs = {key[1:]: [*run["loss"], run["absolute"][-1]] for key, run in plot.read(tmp_path / "all.csv").items()}
    assert list(runs) == [("coma", "1", "--hidden-dim 16"), ("qmix", "1", ""), ("qmix", "1", "--lr 0.5 --no-double-q"),
                          ("qmix", "2", "")]
    assert [values[:3] for values in runs.values()] == [[30, 31, 32], [0, 1, 2], [20, 21, 22], [10, 11, 12]]
    won = [values[3] for values in runs.values()]
    assert won[1] > 0 and [won[0], *won[2:]] == [0, 0, 0], won
    before = (tmp_path / "all.csv").read_text()
    with pytest.raises(SystemExit, match="second run of skirmish:3m qmix 1"):
        plot.gather(tmp_path / "all.csv", [folders[0]])
    assert (tmp_path / "all.csv").read_text() == before

def test_texts_have_the_results_of_the_csvs():
    """Catches: figures drawn again from new runs, and README's or results.md's tables left as they were; an algorithm
    or map left out; an interval that is not the bootstrap's of the interquartile mean."""
    pytest.importorskip("matplotlib")
    plot, text = load_script("plot"), (HERE / "README.md").read_text()
    lines, more = plot.readme(), (HERE / "docs" / "results.md").read_text()
    assert len(lines) == len(LEARNERS) + len(plot.MAPS) and all(f"\n{line}\n" in text for line in lines)
    assert all(f"\n{line}\n" in more for line in plot.results()) and more.count("\n| 1c3s5z | qmix | ") == 1
    values = [90.0, 10, 20, 30, 40]
    draws = np.sort(np.random.default_rng(7).choice(values, (20_000, 5)), axis=1)[:, 1:-1].mean(1)  # without a quarter
    low, high = plot.interval(np.array(values))  # at each end, rounded down
    assert plot.iqm(np.array(values)) == 30 and plot.summary(values, 0).startswith("30 [")
    assert [low, high] == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=2)

def test_bench_compares_equal_updates():
    """Catches: a learner that is fast because it computes something else (the losses are compared inside)."""
    bench, sizes = load_script("bench"), dict(n_agents=2, n_actions=3, obs_dim=4, state_dim=5, episode_limit=20)
    assert min(bench.compare_learners(sizes, torch.device("cpu"), share=0.4).values()) > 0
    reached = [bench.first_reached(values, 1, True) for values in ([1, 0, 1, 1], [1, 1], [1, 0], [0])]
    assert reached == [2, 0, None, None] and bench.first_reached([0, 1, 0], 1, False) == 1

def test_two_step_tables_are_those_of_the_loss(tmp_path):
    """Catches: rows and columns exchanged, a table under another state's name, weights that were not loaded."""
    qmix.train(qmix.Config(env="two-step", total_steps=1, out=tmp_path / "run", device="cpu"))
    saved, env = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True), qmix.envs.make("two-step", n_envs=1)
    (team := qmix.Team(env, qmix.Config(**saved["config"]))).load_state_dict(saved["team"])
    tables = load_script("two_step").q_tot_tables(tmp_path / "run")
    for u, w, i, j in itertools.product((0, 1), repeat=4):
        script = iter(([u, w], [i, j]))
        episode, _ = qmix.rollout(env, lambda step, memory: (torch.tensor([next(script)]), None))  # noqa: B023
        first, mean = (qmix.td_loss(team, team, episode | {"filled": torch.tensor([[True, both]])}, 0.99)[1]["q_taken"]
                       for both in (False, True))
        assert tables["1"][u][w] == pytest.approx(first.item(), abs=1e-5)
        if w == 0:  # as the script gets there: the agents see their last actions too
            assert tables[("2A", "2B")[u]][i][j] == pytest.approx((2 * mean - first).item(), abs=1e-5)
