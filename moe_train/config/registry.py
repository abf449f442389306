"""Registry of the parts that a configuration can name, each with the place where the part describes itself.

A line is `name: "module:OBJECT"`. It is a string, so that a configuration is read without torch; the object is imported
when the configuration names it. To add a part, write its file and its line. Another package adds a part by an entry
point of the group "moe_train.mixers", "moe_train.routers", ...:

    [project.entry-points."moe_train.mixers"]
    my_mixer = "my_package.my_mixer:KIND"
"""

import difflib
import functools
import importlib
import importlib.metadata
from typing import Annotated, Any, Literal

from moe_train.config.errors import UsageError

PartName = Annotated[str, "name of a part"]  # it has no comma, so that a row with commas is a list of them

PartGroup = Literal["mixers", "feed_forwards", "routers", "balance", "dispatchers", "optimizers", "sinks"]

REGISTRY: dict[PartGroup, dict[str, str]] = {
    # model.mixers: what mixes tokens along the sequence. The object is a MixerKind (model/mixers/base.py).
    "mixers": {
        "attention": "moe_train.model.mixers.attention:ATTENTION",
        "infini": "moe_train.model.mixers.infini:INFINI",
        "rwkv4": "moe_train.model.mixers.rwkv4:RWKV4",
        "rwkv7": "moe_train.model.mixers.rwkv7:RWKV7",
        "ttt_linear": "moe_train.model.mixers.ttt:TTT_LINEAR",
        "ttt_mlp": "moe_train.model.mixers.ttt:TTT_MLP",
    },
    # model.feed_forward: the dense feed-forward layers. A FeedForwardKind (model/feed_forward.py).
    "feed_forwards": {
        "swiglu": "moe_train.model.feed_forward:SWIGLU",
        "rwkv_channel_mix": "moe_train.model.channel_mix:RWKV_CHANNEL_MIX",
        "rwkv7_channel_mix": "moe_train.model.channel_mix:RWKV7_CHANNEL_MIX",
    },
    # model.moe.router: which experts each token goes to. A RouterKind (model/moe/routers/base.py).
    "routers": {
        "noisy_topk": "moe_train.model.moe.routers.noisy_topk:NOISY_TOPK",
        "softmax_topk": "moe_train.model.moe.routers.softmax_topk:SOFTMAX_TOPK",
        "sigmoid_topk": "moe_train.model.moe.routers.sigmoid_topk:SIGMOID_TOPK",
        "switch": "moe_train.model.moe.routers.softmax_topk:SOFTMAX_TOPK",  # one expert, its plain probability as gate
    },
    # Losses and rules that share the tokens among experts. A BalanceKind (model/moe/balance/base.py). Those of this
    # package have fields of their own in model.moe, others stand in its field balance.
    "balance": {
        "importance_cv2": "moe_train.model.moe.balance.cv_squared:IMPORTANCE_CV2",
        "load_cv2": "moe_train.model.moe.balance.cv_squared:LOAD_CV2",
        "switch_aux": "moe_train.model.moe.balance.switch_aux:SWITCH_AUX",
        "z_loss": "moe_train.model.moe.balance.z_loss:Z_LOSS",
        "loss_free_bias": "moe_train.model.moe.balance.loss_free_bias:LOSS_FREE_BIAS",
    },
    # optim.name: the optimizer. An OptimizerKind (train/engine/optimizers/base.py).
    "optimizers": {
        "adamw": "moe_train.train.engine.optimizers.adamw:ADAMW",
        "muon": "moe_train.train.engine.optimizers.muon:MUON",
    },
    # telemetry.sinks: what gets a run's records beside metrics.jsonl. A SinkKind (train/telemetry/sinks/base.py).
    "sinks": {
        "tensorboard": "moe_train.train.telemetry.sinks.tensorboard:TENSORBOARD",
    },
    # parallel.dispatch: how rows reach experts on other ranks. A DispatcherKind (model/moe/dispatch/base.py).
    "dispatchers": {
        "flat": "moe_train.model.moe.dispatch.flat:FLAT",
        "unique": "moe_train.model.moe.dispatch.unique:UNIQUE",
        "two_level": "moe_train.model.moe.dispatch.two_level:TWO_LEVEL",
    },
}


def part_names(group: PartGroup) -> list[str]:
    """List the names of all parts of a group: those of this package, then those of others."""
    return [*REGISTRY[group], *(name for name in _outside(group) if name not in REGISTRY[group])]


def is_part(group: PartGroup, name: str) -> bool:
    """Return whether a group has a part of this name."""
    return name in REGISTRY[group] or name in _outside(group)


def check_part(group: PartGroup, name: str, field: str) -> None:
    """Refuse a name that no part has.

    Args:
        group: Group that the field chooses from.
        name: Name that the field has.
        field: Name of the field, for the message.

    Raises:
        UsageError: If no part has the name; the message has the nearest name, or all names.
    """
    if not is_part(group, name):
        near = difflib.get_close_matches(name, part_names(group), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(part_names(group))}"
        raise UsageError(f"{field} ({name!r}) is not known; {hint}")


@functools.cache
def load_part(group: PartGroup, name: str) -> Any:
    """Import the object in which a part describes itself, at the first call.

    Args:
        group: Group of the part.
        name: Name of the part, checked by `check_part`.

    Raises:
        UsageError: If a part of another package cannot be imported.
    """
    if name in REGISTRY[group]:
        return _import(REGISTRY[group][name])
    try:
        return _outside(group)[name].load()
    except Exception as error:  # whatever the other package raises
        raise UsageError(f"{name}: cannot be imported from {_outside(group)[name].value}: {error}") from error


def _import(line: str) -> Any:
    module, _, name = line.partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def _outside(group: PartGroup) -> dict[str, importlib.metadata.EntryPoint]:
    """Find the parts of other packages, by name."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=f"moe_train.{group}")}
