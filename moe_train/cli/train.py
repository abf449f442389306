"""Command `moe-train train`, and launch/train.py: train a model on every rank that a launcher started."""

import contextlib
import faulthandler
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.config.errors import EXIT_STOPPED, RunFailed, UsageError
from moe_train.config.load import load_config
from moe_train.distributed.bootstrap import is_first_rank
from moe_train.host.descriptors import has_descriptors
from moe_train.liveness.sentinel import RankSentinel

if TYPE_CHECKING:
    from moe_train.train.loop import TrainResult

DESCRIPTION = "Train a Mixture-of-Experts language model. Dotted options override the fields of the YAML file."


def run(arguments: Sequence[str], program: str = "moe-train train", sentinel: RankSentinel | None = None) -> int:
    """Train a model on this rank, as the command line says.

    Args:
        arguments: Command line after the name of the command.
        program: Name for messages and help.
        sentinel: Sentinel of this rank, which is told where the run folder is.

    Returns:
        Exit code: 0, or 75 if a signal stopped the run after saving.

    Raises:
        UsageError: If the configuration, the data or the checkpoint is wrong.
        RunFailed: If the run fails; it has the exit code.

    Collective: All ranks.
    """
    config = load_config(arguments, program=program, description=DESCRIPTION, say=_say_once)
    if not has_descriptors():  # a notebook called this
        from moe_train.api import run_training

        return _code_of(run_training(config))
    from moe_train.distributed.bootstrap import discover_world
    from moe_train.plan.room import check_room
    from moe_train.train.preparation import prepare_run
    from moe_train.train.rank_log import redirect_output
    from moe_train.train.run_folder import RunFolder

    world, checkpoints = discover_world(), RunFolder(Path(config.train.run_dir)).checkpoints

    def follow(log: Path | None) -> None:
        if sentinel is not None:
            sentinel.tell_run_folder(log, checkpoints)

    follow(None)
    prepared = prepare_run(config, world, check_room)
    log = redirect_output(prepared.folder, world.rank, follow)  # until the process ends: libraries print until then
    faulthandler.enable(log.errors)
    from moe_train.infer.closing_sample import sample_text  # imports DeepSpeed: after the device is chosen
    from moe_train.train.training import train_prepared

    try:
        result = train_prepared(prepared, log, sample_text)
    except (UsageError, RunFailed) as error:
        sys.stderr = log.errors  # where the message belongs
        if isinstance(error, UsageError):
            log.discard()
        raise
    except BaseException as error:
        traceback.print_exc(file=log.errors)
        traceback.print_exc()
        sys.stderr = log.errors
        raise RunFailed(f"rank {prepared.world.rank} failed; its log is {log.path}", 1) from error
    with contextlib.suppress(OSError):  # a closed output ends no run
        log.output.flush()
    return _code_of(result)


def _say_once(line: str) -> None:
    if is_first_rank():
        with contextlib.suppress(OSError):  # a closed output ends no run
            print(f"moe_train: {line}", flush=True)


def _code_of(result: "TrainResult") -> int:
    return EXIT_STOPPED if result.stopped is not None else 0
