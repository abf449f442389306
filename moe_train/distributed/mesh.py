"""The mesh of ranks: which share the experts of a layer, which hold the same experts, which share sequences."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from moe_train.distributed.collectives import Group

_BACKGROUND_HOURS = 4


@dataclass(frozen=True)
class MeshGroup:
    """This process's group along one axis of the mesh.

    Attributes:
        group: Process group.
        ranks: Global ranks of the group.
        rank: Rank of this process in the group.
    """

    group: Group
    ranks: tuple[int, ...]
    rank: int

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return len(self.ranks)


@dataclass(frozen=True)
class ParallelMesh:
    """Groups of this process.

    Attributes:
        data: Ranks over which the gradients of dense parameters are averaged: all of them. Ranks that share sequences
            count as ranks with other sequences here.
        expert: Ranks that share the experts of a layer. They are consecutive, and so stay in one node if they fit.
        expert_data: Ranks that hold the same experts; they are strided.
        across_nodes: Ranks of `expert` with this rank's place in their nodes; None: rows do not pass nodes first.
        within_node: Ranks of `expert` in this rank's node; None: rows do not pass nodes first.
        context: Ranks that share the tokens of sequences; they are consecutive. None: every rank has whole sequences.
    """

    data: MeshGroup
    expert: MeshGroup
    expert_data: MeshGroup
    across_nodes: MeshGroup | None = None
    within_node: MeshGroup | None = None
    context: MeshGroup | None = None

    @property
    def dispatch_groups(self) -> tuple[Group, ...]:
        """Groups that a token passes on its way to its experts, one after the other; empty if all experts are here."""
        if self.expert.size == 1:
            return ()
        if self.across_nodes is None or self.within_node is None:
            return (self.expert.group,)
        return self.across_nodes.group, self.within_node.group


def expert_parallel_ranks(world_size: int, ep_size: int) -> list[tuple[int, ...]]:
    """List the ranks of every expert-parallel group; they are consecutive."""
    return [tuple(range(first, first + ep_size)) for first in range(0, world_size, ep_size)]


def expert_data_parallel_ranks(world_size: int, ep_size: int) -> list[tuple[int, ...]]:
    """List the ranks of every group that holds the same experts; they are strided."""
    return [tuple(range(first, world_size, ep_size)) for first in range(ep_size)]


def across_node_ranks(world_size: int, ep_size: int, node_size: int) -> list[tuple[int, ...]]:
    """List, for every expert-parallel group, the ranks that have the same place in their nodes."""
    return [
        tuple(range(first + place, first + ep_size, node_size))
        for first in range(0, world_size, ep_size)
        for place in range(node_size)
    ]


def context_ranks(world_size: int, context_size: int) -> list[tuple[int, ...]]:
    """List the ranks of every group that shares sequences; they are consecutive."""
    return [tuple(range(first, first + context_size)) for first in range(0, world_size, context_size)]


def create_mesh(
    ep_size: int, timeout_seconds: int, node_size: int | None = None, context_size: int | None = None
) -> ParallelMesh:
    """Create the process groups of every rank and return those of this process.

    Args:
        ep_size: Ranks that share the experts of a layer; divides the world size.
        timeout_seconds: Timeout of a collective operation, in seconds.
        node_size: Ranks per node, for the groups across and within nodes; divides ep_size. None: no such groups.
        context_size: Ranks that share sequences; divides the world size. None: no such group.

    Collective: All ranks.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is initialised"
    data = MeshGroup(world, tuple(range(world_size)), rank)
    expert = _create(expert_parallel_ranks(world_size, ep_size), rank, timeout_seconds)
    expert_data = _create(expert_data_parallel_ranks(world_size, ep_size), rank, timeout_seconds)
    across = within = context = None
    if node_size is not None:
        across = _create(across_node_ranks(world_size, ep_size, node_size), rank, timeout_seconds)
        within = _create(expert_parallel_ranks(world_size, node_size), rank, timeout_seconds)
    if context_size is not None:  # never another axis's group: the operations of each have an order of their own
        context = create_context_group(context_size, timeout_seconds)
    return ParallelMesh(data, expert, expert_data, across, within, context)


def create_context_group(context_size: int, timeout_seconds: int) -> MeshGroup:
    """Create the groups of ranks that share sequences and return that of this process.

    Args:
        context_size: Ranks that share sequences; divides the world size.
        timeout_seconds: Timeout of a collective operation, in seconds.

    Collective: All ranks.
    """
    return _create(context_ranks(dist.get_world_size(), context_size), dist.get_rank(), timeout_seconds)


def create_background_group() -> Group | None:
    """Create a gloo group of all ranks for a thread beside training; None for one process.

    Its operations wait long, because ranks finish writing a checkpoint at different times.

    Collective: All ranks.
    """
    if dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(hours=_BACKGROUND_HOURS))


def _create(layout: list[tuple[int, ...]], rank: int, timeout_seconds: int) -> MeshGroup:
    mine: MeshGroup | None = None
    for ranks in layout:  # every rank takes part in creating every group, in the same order
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_seconds))
        if rank in ranks:
            mine = MeshGroup(group, ranks, ranks.index(rank))
    assert mine is not None, "every rank is in one group of a layout"
    return mine
