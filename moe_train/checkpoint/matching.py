"""Whether a checkpoint is of a model."""

from collections.abc import Mapping

from moe_train.checkpoint.manifest import Manifest
from moe_train.config.errors import UsageError


def check_same_model(manifest: Manifest, ours: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose tensors have other names or shapes than a model's.

    Raises:
        UsageError: Naming the first that differs.
    """
    for name in sorted(ours.keys() | manifest.shapes.keys()):
        here, there = ours.get(name), manifest.shapes.get(name)
        if here != there:
            raise UsageError(
                f"{manifest.folder} is of another model: tensor {name} is {list(there) if there else 'absent'} in the "
                f"checkpoint and {list(here) if here else 'absent'} in the model of this configuration"
            )


def check_same_buffers(manifest: Manifest, ours: Mapping[str, int]) -> None:
    """Refuse a checkpoint with other buffers, by name and number of values. None at all is what a checkpoint without a
    bias has: one that is wanted now begins at zero.

    Raises:
        UsageError: Naming the first that differs.
    """
    theirs = {name: len(values) for name, values in manifest.buffers.items()}
    for name in sorted(theirs.keys() | (ours.keys() if theirs else set())):
        if name not in ours:
            raise UsageError(
                f"{manifest.folder} has {name}, which the model has no place for: keep model.moe.bias_update_rate "
                'above 0; a bias is held still by model.moe.coef_schedules={"bias_update_rate": [[0, 0]]}'
            )
        if ours[name] != theirs.get(name):
            raise UsageError(f"{manifest.folder}: {name} has {theirs.get(name, 0)} values, the model's {ours[name]}")
