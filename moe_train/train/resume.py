"""Going on from a checkpoint."""

from pathlib import Path

from moe_train.config.errors import UsageError
from moe_train.config.root import Config
from moe_train.train.checkpoint import Manifest, list_checkpoints, load_checkpoint, read_manifest
from moe_train.train.loop import Run
from moe_train.train.run_folder import RunFolder


def find_checkpoint(config: Config, folder: RunFolder) -> Manifest | None:
    """The checkpoint that checkpoint.resume names, or None to begin anew.

    Raises:
        UsageError: If it is not there, damaged, or past the end of the run.
    """
    setting, found = config.checkpoint.resume, list_checkpoints(folder.checkpoints)
    if setting == "never":
        if found:
            raise UsageError(
                f"checkpoint.resume ('never') would write over {found[-1]}: choose another train.run_dir, or remove it"
            )
        return None
    if setting == "auto":
        if not found:
            return None
        manifest = read_manifest(found[-1])
    else:
        if not Path(setting).is_dir():
            raise UsageError(
                f"checkpoint.resume ({setting!r}): no such folder; give auto, never or a checkpoint's folder"
            )
        manifest = read_manifest(Path(setting))
    if manifest.step > config.train.steps:
        raise UsageError(f"train.steps ({config.train.steps}) is below the step of {manifest.folder} ({manifest.step})")
    _check_batch(manifest, config)
    return manifest


def resume(run: Run, manifest: Manifest) -> None:
    """Load a checkpoint and say so. Collective: all ranks."""
    load_checkpoint(run.engine, manifest, run.plan.rank, run.plan.world_size)
    left = run.config.train.steps - manifest.step
    run.console.say(f"going on from {manifest.folder}: {manifest.step} steps done, {left} to do")


def _check_batch(manifest: Manifest, config: Config) -> None:
    # The place in the data is step x global_batch_size: with another size, sequences would be left out or seen twice.
    consumed, batch = manifest.consumed_sequences, config.train.global_batch_size
    assert batch is not None
    if consumed != manifest.step * batch:
        raise UsageError(
            f"train.global_batch_size ({batch}) differs from that of {manifest.folder} "
            f"({consumed // max(1, manifest.step)}): set train.global_batch_size to it"
        )
