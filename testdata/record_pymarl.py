"""Run the authors' own PyMARL (unmodified, in ./pymarl) on small random episodes and save what it computed.

    git clone https://github.com/oxwhirl/pymarl pymarl    # at c971afd
    python record_pymarl.py                               # writes pymarl.npz

The real EpisodeRunner, EpisodeBatch, ReplayBuffer, BasicMAC, RNNAgent, mixers and QLearner run; only the game, the
logger, `args` and the import of smac are stand-ins. Weights are saved under the names of qmix.Team.state_dict().
Keys: batch/*; {live,target}/{all,qmix-1,qmix-2}/<name>; q; <mixer>/q_tot; <mixer>/<double|plain>/numbers (loss, norm
of the gradient before clipping, mean Q_tot taken, mean target) and /after (all weights after the update, flat, in the
order of the live/ keys).
"""

import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "pymarl" / "src"))
smac = types.ModuleType("smac.env")
smac.MultiAgentEnv, smac.StarCraft2Env = object, object
sys.modules |= {"smac": types.ModuleType("smac"), "smac.env": smac}
warnings.filterwarnings("ignore")

from components.episode_buffer import ReplayBuffer  # noqa: E402
from components.transforms import OneHot  # noqa: E402
from controllers import REGISTRY as MACS  # noqa: E402
from envs import REGISTRY as ENVS  # noqa: E402
from learners import REGISTRY as LEARNERS  # noqa: E402
from runners.episode_runner import EpisodeRunner  # noqa: E402

N, A, O, S, T = 3, 4, 5, 6, 7
ENDS = [
    (7, False),
    (3, True),
    (5, True),
    (7, True),
    (1, True),
]  # steps of each episode; ended by the game itself?
RENAME = {
    "rnn.weight_ih": "gru.weight_ih_l0",
    "rnn.weight_hh": "gru.weight_hh_l0",
    "rnn.bias_ih": "gru.bias_ih_l0",
    "rnn.bias_hh": "gru.bias_hh_l0",
    "hyper_w_1": "w1",
    "hyper_b_1": "b1",
    "hyper_w_final": "w2",
    "V": "v",
}


class Noise:
    """A game of random numbers whose episodes end as ENDS says."""

    episode_limit = T

    def __init__(self, seed):
        self.rng, self.ends = np.random.default_rng(seed), iter(ENDS)

    def reset(self):
        self.t, (self.length, self.ended) = 0, next(self.ends)

    def get_state(self):
        return self.rng.standard_normal(S).astype(np.float32)

    def get_obs(self):
        return self.rng.standard_normal((N, O)).astype(np.float32)

    def get_avail_actions(self):
        avail = self.rng.random((N, A)) < 0.5
        avail[np.arange(N), self.rng.integers(A, size=N)] = True
        return avail.astype(np.int64)

    def step(self, actions):
        self.t += 1
        over = self.t == self.length
        info = {"episode_limit": True} if over and not self.ended else {}
        return float(np.float32(self.rng.normal(0, 3))), over, info


class Logger:
    """Keeps what the learner logs."""

    console_logger = SimpleNamespace(info=lambda text: None)

    def __init__(self):
        self.stats = {}

    def log_stat(self, name, value, t):
        self.stats[name] = float(value)


def build(mixer, layers, double_q):
    """What run.py builds, with its defaults and those of qmix.yaml where a number matters."""
    args = SimpleNamespace(
        n_agents=N,
        n_actions=A,
        state_shape=S,
        rnn_hidden_dim=8,
        mixing_embed_dim=4,
        hypernet_layers=layers,
        hypernet_embed=8,
        agent="rnn",
        mac="basic_mac",
        obs_last_action=True,
        obs_agent_id=True,
        agent_output_type="q",
        action_selector="epsilon_greedy",
        epsilon_start=1.0,
        epsilon_finish=1.0,
        epsilon_anneal_time=50_000,
        learner="q_learner",
        mixer=mixer,
        double_q=double_q,
        gamma=0.99,
        lr=5e-4,
        optim_alpha=0.99,
        optim_eps=1e-5,
        grad_norm_clip=10,
        target_update_interval=200,
        learner_log_interval=1,
        runner_log_interval=10**9,
        test_nepisode=10**9,
        env="noise",
        env_args=dict(seed=1),
        batch_size_run=1,
        device="cpu",
    )
    scheme = {
        "state": {"vshape": S},
        "obs": {"vshape": O, "group": "agents"},
        "actions": {"vshape": (1,), "group": "agents", "dtype": torch.long},
        "avail_actions": {"vshape": (A,), "group": "agents", "dtype": torch.int},
        "reward": {"vshape": (1,)},
        "terminated": {"vshape": (1,), "dtype": torch.uint8},
    }
    groups, preprocess = {"agents": N}, {"actions": ("actions_onehot", [OneHot(out_dim=A)])}
    buffer = ReplayBuffer(scheme, groups, len(ENDS), T + 1, preprocess=preprocess)
    mac = MACS[args.mac](buffer.scheme, groups, args)
    runner, logger = EpisodeRunner(args, Logger()), Logger()
    runner.setup(scheme=scheme, groups=groups, preprocess=preprocess, mac=mac)
    return buffer, runner, LEARNERS[args.learner](mac, buffer.scheme, logger, args), logger


def ours(learner, which):
    """Weights under the names of qmix.Team.state_dict()."""
    mac, mixer = (
        (learner.mac, learner.mixer)
        if which == "live"
        else (learner.target_mac, getattr(learner, "target_mixer", None))
    )
    state = {f"agent.{name}": w for name, w in mac.agent.state_dict().items()}
    state |= (
        {f"mixer.{name}": w for name, w in mixer.state_dict().items()} if mixer is not None else {}
    )
    for theirs, our in RENAME.items():
        state = {name.replace(f".{theirs}", f".{our}"): w for name, w in state.items()}
    return {name: w.detach().numpy().copy() for name, w in state.items()}


def main():
    torch.set_num_threads(1)
    ENVS["noise"] = Noise
    saved = {}

    def put(key, value):
        value = np.asarray(value)
        value = value.astype(np.float32) if value.dtype == np.float64 else value
        if key in saved:  # what cases share must be the same in each
            assert np.array_equal(saved[key], value), key
        saved[key] = value

    for name, mixer, layers in [
        ("qmix-2", "qmix", 2),
        ("qmix-1", "qmix", 1),
        ("vdn", "vdn", 1),
        ("iql", None, 1),
    ]:
        for double_q in (True, False):
            torch.manual_seed(3)
            buffer, runner, learner, logger = build(mixer, layers, double_q)
            torch.manual_seed(4)
            for mac in (learner.mac, learner.target_mac):  # live and target differ
                for p in mac.agent.parameters():
                    p.data.normal_(0, 0.5)
            for mix in (learner.mixer, getattr(learner, "target_mixer", None)) if mixer else ():
                for p in mix.parameters():
                    p.data.normal_(0, 0.5)
            torch.manual_seed(5)  # the runner explores with the global generator
            for _ in ENDS:
                buffer.insert_episode_batch(runner.run())
            batch = buffer.sample(len(ENDS))
            batch = batch[:, : batch.max_t_filled()]  # as run.py does
            for which in ("live", "target"):
                for key, w in ours(learner, which).items():
                    put(f"{which}/{'all' if key.startswith('agent') else name}/{key}", w)
            q, q_tot = [], []
            learner.mac.agent.register_forward_hook(lambda m, i, out: q.append(out[0].detach()))  # noqa: B023
            if mixer:
                learner.mixer.register_forward_hook(lambda m, i, out: q_tot.append(out.detach()))  # noqa: B023
            learner.train(batch, t_env=1, episode_num=0)

            put(
                "q", torch.stack(q, 1).view(len(ENDS), N, T + 1, A).transpose(1, 2).numpy()
            )  # (B, T+1, N, A)
            taken = (
                torch.from_numpy(saved["q"])[:, :-1].gather(3, batch["actions"][:, :-1]).squeeze(3)
            )
            put(f"{name}/q_tot", (q_tot[0] if mixer else taken).numpy())
            case = f"{name}/{'double' if double_q else 'plain'}"
            scale = dict(
                loss=1, grad_norm=1, q_taken_mean=N, target_mean=N
            )  # PyMARL logs the last two per agent
            put(f"{case}/numbers", [logger.stats[key] * times for key, times in scale.items()])
            put(
                f"{case}/after", np.concatenate([w.ravel() for w in ours(learner, "live").values()])
            )
            print(case, {k: round(v, 4) for k, v in logger.stats.items()})
    lengths = np.array([length for length, _ in ENDS])
    assert (batch["terminated"][:, :, 0].numpy().sum(1) == [ended for _, ended in ENDS]).all()
    put("batch/obs", batch["obs"].numpy())
    put("batch/state", batch["state"].numpy())
    put("batch/avail", batch["avail_actions"].numpy().astype(bool))
    put("batch/actions", batch["actions"][:, :-1, :, 0].numpy().astype(np.uint8))
    put("batch/reward", batch["reward"][:, :-1, 0].numpy())
    put("batch/terminated", batch["terminated"][:, :-1, 0].numpy().astype(bool))
    put("batch/filled", np.arange(T) < lengths[:, None])
    (HERE / "testdata").mkdir(exist_ok=True)
    np.savez_compressed(HERE / "pymarl.npz", **saved)
    print((HERE / "pymarl.npz").stat().st_size, "bytes,", len(saved), "arrays")


if __name__ == "__main__":
    main()
