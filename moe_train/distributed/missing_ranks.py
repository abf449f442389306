"""Ranks that have not come to the rendezvous: who is missing, and which variables made the world that waits."""

import sys
from collections.abc import Callable, Mapping, Sequence

from moe_train.distributed.world import World

NOTICE_SECONDS = 15.0  # a rank that comes later has most often not been started at all
_MOST_NAMED = 8
# For each launcher: variables that describe its world, and those without which a process is alone.
_VARIABLES = {
    "srun": (("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID"), "SLURM_PROCID"),
    "mpirun": (
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK"),
        "OMPI_COMM_WORLD_SIZE PMI_SIZE",
    ),
    "torchrun": (("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"), "TORCHELASTIC_RUN_ID WORLD_SIZE RANK LOCAL_RANK"),
    "deepspeed": (("WORLD_SIZE", "RANK", "CROSS_SIZE"), "WORLD_SIZE RANK LOCAL_RANK CROSS_SIZE CROSS_RANK"),
    "environment": (("WORLD_SIZE", "RANK"), "WORLD_SIZE RANK LOCAL_RANK"),
}


def describe_missing(missing: Sequence[int], world: World, environ: Mapping[str, str]) -> str:
    """Describe which ranks are missing, why they are expected, and how to train without them.

    Args:
        missing: Ranks that have not come.
        world: Place of this process among the ranks.
        environ: Environment variables of this process.
    """
    named = ", ".join(map(str, missing[:_MOST_NAMED])) + (", ..." if len(missing) > _MOST_NAMED else "")
    ranks = (
        f"rank {named} of {world.world_size} has" if len(missing) == 1 else f"ranks {named} of {world.world_size} have"
    )
    names, unset = _VARIABLES.get(world.launcher, ((), ""))
    expected = ", ".join(f"{name} ({environ[name]})" for name in names if name in environ)
    own = [name for name in unset.split() if name in environ]
    place = "a shell inside srun" if world.launcher == "srun" else "a shell that has inherited them"
    hint = f"; if this is {place} and the process is to train alone: unset {' '.join(own)}" if own else ""
    return f"{ranks} not come; they are expected because of {expected}{hint}"


class Notice:
    """Message about missing ranks, said once, when the wait has become long.

    Args:
        world: Place of this process among the ranks.
        environ: Environment variables of this process.
        say: Called with the message.
    """

    def __init__(self, world: World, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._world, self._environ, self._say = world, environ, say
        self._is_said = False

    def is_due(self, seconds: float) -> bool:
        """Return whether the wait has become long, and nothing has been said yet."""
        return seconds >= NOTICE_SECONDS and not self._is_said

    def give(self, missing: Sequence[int], seconds: float) -> None:
        """Say who is missing after so many seconds, if it is due."""
        if missing and self.is_due(seconds):
            self._is_said = True
            text = describe_missing(missing, self._world, self._environ)
            self._say(f"rank {self._world.rank} waits since {seconds:.0f} s: {text}")

    def timeout(self, missing: Sequence[int], seconds: float) -> TimeoutError:
        """Return the error for ranks that have not come in time."""
        text = describe_missing(missing, self._world, self._environ)
        return TimeoutError(f"after {seconds:.0f} s (parallel.timeout_seconds) {text}")


def say_error(text: str) -> None:
    """Write a message to the error stream."""
    print(text, file=sys.stderr, flush=True)
