"""Which ranks share the experts of a layer, and which ranks hold the same experts."""

from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from moe_train.distributed.collectives import Group

_BACKGROUND_HOURS = 4


@dataclass(frozen=True)
class ParallelMesh:
    """The groups of this rank.

    Attributes:
        ep_group: Ranks that share the experts of a layer: consecutive, so that they stay in a node where they fit.
        ep_ranks: Their global ranks.
        ep_rank: This process among them.
        edp_group: Ranks that hold the same experts: strided.
        edp_ranks: Their global ranks.
        across: Of the ranks that share the experts, those with this rank's place in their node; None: not asked for.
        within: Of the ranks that share the experts, those of this rank's node; None: not asked for.
    """

    ep_group: Group
    ep_ranks: tuple[int, ...]
    ep_rank: int
    edp_group: Group
    edp_ranks: tuple[int, ...]
    across: Group | None = None
    within: Group | None = None

    @property
    def path(self) -> tuple[Group, ...]:
        """The groups in which a token travels to its experts, one after the other; none where all experts are here."""
        if self.ep_size == 1:
            return ()
        return (self.ep_group,) if self.across is None or self.within is None else (self.across, self.within)

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts of a layer."""
        return len(self.ep_ranks)


def expert_parallel_ranks(world_size: int, ep_size: int) -> list[tuple[int, ...]]:
    """Every expert-parallel group: consecutive ranks."""
    return [tuple(range(first, first + ep_size)) for first in range(0, world_size, ep_size)]


def expert_data_parallel_ranks(world_size: int, ep_size: int) -> list[tuple[int, ...]]:
    """Every group of ranks that hold the same experts: strided ranks."""
    return [tuple(range(first, world_size, ep_size)) for first in range(ep_size)]


def across_node_ranks(world_size: int, ep_size: int, node_size: int) -> list[tuple[int, ...]]:
    """In every expert-parallel group, the ranks that have the same place in their nodes."""
    return [
        tuple(range(first + place, first + ep_size, node_size))
        for first in range(0, world_size, ep_size)
        for place in range(node_size)
    ]


def create_mesh(ep_size: int, timeout_seconds: int, node_size: int | None = None) -> ParallelMesh:
    """Create the process groups of every rank and return this rank's.

    Args:
        ep_size: Ranks that share the experts of a layer; divides the world size.
        timeout_seconds: Bound of a collective operation.
        node_size: Ranks of a node, for the groups across and within nodes; divides ep_size. None: without those.

    Collective: All ranks.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    ep_group, ep_ranks = _create(expert_parallel_ranks(world_size, ep_size), rank, timeout_seconds)
    edp_group, edp_ranks = _create(expert_data_parallel_ranks(world_size, ep_size), rank, timeout_seconds)
    groups = ParallelMesh(ep_group, ep_ranks, ep_ranks.index(rank), edp_group, edp_ranks)
    if node_size is None:
        return groups
    across, _ = _create(across_node_ranks(world_size, ep_size, node_size), rank, timeout_seconds)
    within, _ = _create(expert_parallel_ranks(world_size, node_size), rank, timeout_seconds)
    return replace(groups, across=across, within=within)


def create_background_group() -> Group | None:
    """A gloo group of all ranks for a thread beside training; None for one process.

    Its operations wait long, because ranks finish writing a checkpoint at different times.

    Collective: All ranks.
    """
    if dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(hours=_BACKGROUND_HOURS))


def _create(layout: list[tuple[int, ...]], rank: int, timeout_seconds: int) -> tuple[Group, tuple[int, ...]]:
    mine: tuple[Group, tuple[int, ...]] | None = None
    for ranks in layout:  # every rank takes part in creating every group, in the same order
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_seconds))
        if rank in ranks:
            mine = group, ranks
    assert mine is not None, "every rank is in one group of a layout"
    return mine
