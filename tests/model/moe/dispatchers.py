"""Dispatchers as the model builds them."""

from typing import Any

from moe_train.config.registry import load_part
from moe_train.distributed.mesh import create_mesh
from moe_train.model.moe.dispatch.base import Dispatcher, DispatchSpec
from moe_train.model.moe.dispatch.local import LocalDispatcher


def make_dispatcher(name: str, groups: tuple[Any, ...], num_chunks: int = 1, **options: Any) -> Dispatcher:
    """The dispatcher of a name; without groups the one for experts that are all here."""
    if not groups:
        return LocalDispatcher()
    return load_part("dispatchers", name).build(DispatchSpec(groups, num_chunks, **options))


def groups_of(world_size: int, dispatch: str, node_size: int = 2) -> tuple[Any, ...]:
    """The groups that a dispatcher passes, all ranks sharing the experts. Collective: all ranks."""
    if world_size == 1:
        return ()
    return create_mesh(world_size, 60, node_size=node_size if dispatch == "two_level" else None).dispatch_groups
