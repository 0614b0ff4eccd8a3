"""Several learner processes ("ranks"), on one machine or on more.

    torchrun --nproc-per-node=2 -m extras.distributed --env checkers --out runs/two

On two machines, the same on both, with the address of the first one:

    torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=ADDRESS:29400 \
        -m extras.distributed --env checkers --out runs/two

Each rank plays its own environments and keeps its own replay. Gradients are averaged over the
ranks, all with the same weight, as DistributedDataParallel does. Steps and episodes are counted
together, so all ranks do the same at the same time and keep the same networks. Rank 0 alone
evaluates, writes and speaks. Such a run can be evaluated, but not resumed.
"""

import contextlib
import dataclasses
import json
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401

import envs
import qmix

# subtle: an optimizer's first step imports torch.distributed.nn, whose functions keep the group of
# that time. Imported here, before there is a group, they keep none, and gloo's threads can end with
# the group. Threads that outlive it abort Python's exit now and then.


class DistributedRun(qmix.Run):
    def __init__(self, cfg: qmix.Config, resumed_at: int = 0):
        self.ranks = dist.get_world_size()
        seed = cfg.seed + 1_000_003 * dist.get_rank()  # other games and other exploration
        super().__init__(dataclasses.replace(cfg, seed=seed), resumed_at)
        for parameter in self.team.parameters():
            dist.broadcast(parameter.data, src=0)  # the same weights
            parameter.register_post_accumulate_grad_hook(self.average)
        self.target_team.load_state_dict(self.team.state_dict())

    def average(self, parameter: torch.Tensor) -> None:
        """backward() calls this as soon as the gradient of a parameter is there."""
        dist.all_reduce(parameter.grad)
        parameter.grad /= self.ranks

    def play(self) -> None:
        """A round of all ranks."""
        before = dict(self.counts)
        super().play()
        for name in ("env_steps", "episodes"):
            played = torch.tensor(self.counts[name] - before[name], device=self.device)
            dist.all_reduce(played)
            self.counts[name] = before[name] + int(played)

    def updates_due(self) -> int:
        """As in Run, counting the episodes of one rank, once every replay holds a batch."""
        smallest = torch.tensor(len(self.replay), device=self.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        if smallest < self.cfg.batch_size:
            return 0
        since = self.counts["episodes"] / self.ranks - self.cfg.batch_size
        return 1 + int(since / self.cfg.episodes_per_update) - self.counts["updates"]


def nothing() -> None:
    pass


def join(cfg: qmix.Config) -> qmix.Config:
    """Meet the other ranks. Returns cfg with the device of this rank."""
    local_rank = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    backend = "gloo"
    if gpus >= int(os.environ["LOCAL_WORLD_SIZE"]):
        backend = "nccl"  # it wants a GPU for each rank
    if gpus > 0 and cfg.device != "cpu":
        cfg = dataclasses.replace(cfg, device=f"cuda:{local_rank % gpus}")
    else:
        backend = "gloo"
    dist.init_process_group(backend)
    return cfg


def main(arguments: list[str]) -> int:
    try:
        command = qmix.parse(arguments)
        if command.resume or command.evaluate:
            raise envs.UsageError("extras.distributed only trains: use qmix.py for the rest")
        cfg = join(command.config)
        if dist.get_rank() == 0:
            result = qmix.train(cfg, run_class=DistributedRun)
            print("result: " + json.dumps(result), flush=True)
        else:
            run = DistributedRun(cfg)
            with contextlib.closing(run.env):
                qmix.loop(run, between_rounds=nothing)
        dist.destroy_process_group()
        return 0
    except (envs.UsageError, qmix.TrainingFailed, envs.EnvFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, envs.UsageError) else 1
    finally:  # NCCL would wait for the other ranks, which may be gone
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
