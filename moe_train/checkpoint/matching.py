"""Match of checkpoint and model: tensors and buffers must have the same names and shapes."""

from collections.abc import Mapping

from moe_train.checkpoint.manifest import Manifest
from moe_train.config.errors import UsageError
from moe_train.model.moe.routers.last_step import is_remembered


def check_same_model(manifest: Manifest, ours: Mapping[str, tuple[int, ...]]) -> None:
    """Reject a checkpoint whose tensors differ from a model's in name or shape.

    Args:
        manifest: Manifest of the checkpoint.
        ours: Global shape of each of the model's tensors.

    Raises:
        UsageError: If a tensor differs; for the first such tensor.
    """
    for name in sorted(ours.keys() | manifest.shapes.keys()):
        here, there = ours.get(name), manifest.shapes.get(name)
        if here != there:
            raise UsageError(
                f"{manifest.folder} is of another model: tensor {name} is {list(there) if there else 'absent'} in the "
                f"checkpoint and {list(here) if here else 'absent'} in the model of this configuration"
            )


def check_same_buffers(manifest: Manifest, ours: Mapping[str, int]) -> None:
    """Reject a checkpoint whose buffers differ from a model's in name or number of values.

    A checkpoint without any buffers is accepted: it had no bias, and a bias that the model has now starts at zero. What
    routers remember of the last step may be in either alone.

    Args:
        manifest: Manifest of the checkpoint.
        ours: Number of values of each of the model's buffers.

    Raises:
        UsageError: If a buffer differs; for the first such buffer.
    """
    theirs = {name: len(values) for name, values in manifest.buffers.items() if not is_remembered(name)}
    ours = {name: size for name, size in ours.items() if not is_remembered(name)}
    for name in sorted(theirs.keys() | (ours.keys() if theirs else set())):
        if name not in ours:
            raise UsageError(
                f"{manifest.folder} has {name}, which the model has no place for: keep model.moe.bias_update_rate "
                'above 0; a bias is held still by model.moe.coef_schedules={"bias_update_rate": [[0, 0]]}'
            )
        if ours[name] != theirs.get(name):
            raise UsageError(f"{manifest.folder}: {name} has {theirs.get(name, 0)} values, the model's {ours[name]}")
