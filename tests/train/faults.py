"""Training ranks in which something goes wrong on purpose: forked as any other, with one part of them replaced.

What is wrong is in the first argument, as JSON; the others are the command line's:
    {"poison": [[first, last, factor]]}  the loss of a micro-batch with one of these sequences is multiplied by factor
    {"hang": [rank, step]}               this rank sleeps for ever before the update of this step (from 0)
    {"die_in_save": [rank, step]}        this rank is killed when half of its file of this step's checkpoint is written
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from moe_train.distributed.bootstrap import local_rank_environments
from moe_train.launch.fork_server import ForkedRank, wait_for_all
from tests.processes import ProcessResult
from tests.train.runs import ROOT, fork_server


def start_faulty(world_size: int, faults: dict[str, Any], *arguments: str) -> Sequence[ForkedRank]:
    """Starts the ranks of a training with faults and leaves them running."""
    server, command = fork_server(), [json.dumps(faults), "train", *arguments]
    environments = local_rank_environments(world_size)
    return [server.start("tests.train.faults:main", command, each, ROOT) for each in environments]


def train_faulty(world_size: int, faults: dict[str, Any], *arguments: str, timeout: float = 120) -> list[ProcessResult]:
    """Each rank's end."""
    ranks = start_faulty(world_size, faults, *arguments)
    return [
        ProcessResult([f"rank {i}", *arguments], r.returncode, r.stdout, r.stderr, r.seconds)
        for i, r in enumerate(wait_for_all(ranks, timeout))
    ]


def main(arguments: list[str]) -> int:
    """What a forked rank runs."""
    from moe_train.cli.main import main as command

    faults = json.loads(arguments[0])
    if "poison" in faults:
        poison_losses(faults["poison"])
    if "hang" in faults:
        hang(*faults["hang"])
    if "die_in_save" in faults:
        die_in_save(*faults["die_in_save"])
    return command(arguments[1:])


def poison_losses(ranges: list[list[float]]) -> None:
    """Multiplies the loss of some sequences."""
    from moe_train.model.objective import Losses, TrainingObjective

    forward = TrainingObjective.forward

    def poisoned(self, tokens, targets_BS, size) -> Losses:
        losses = forward(self, tokens, targets_BS, size)
        for first, last, factor in ranges:
            if any(first <= index <= last for index in tokens.sequences_B.tolist()):
                losses = Losses(losses.total * factor, losses.cross_entropy, losses.shown * factor, losses.sums)
        return losses

    TrainingObjective.forward = poisoned


def hang(rank: int, step: int) -> None:
    """Sleeps for ever in one rank's step."""
    from moe_train.train.step_control import StepControl

    should_skip, num_steps = StepControl.should_skip, [0]

    def hanging(self, gradients) -> bool:
        if num_steps[0] == step and os.environ["RANK"] == str(rank):
            time.sleep(3600)
        num_steps[0] += 1
        return should_skip(self, gradients)

    StepControl.should_skip = hanging


def die_in_save(rank: int, step: int) -> None:
    """Is killed in the middle of a file."""
    from moe_train.checkpoint import writer

    write = writer.write_tensor_file

    def dying(path, tensors):
        if path.parent.name == f"step_{step:08d}.part" and os.environ["RANK"] == str(rank):
            write(path, tensors)
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, tensors)

    writer.write_tensor_file = dying
