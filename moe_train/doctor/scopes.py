"""Groups of ranks that the doctor measures: within each host, across hosts, and all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_train.distributed.collectives import Group

SCOPES = ("within", "across", "all")  # ranks of one host, one rank of each host, all ranks


@dataclass(frozen=True)
class Scope:
    """One kind of group, with this rank's group of that kind.

    Attributes:
        name: One of SCOPES.
        group: Process group of this rank; None: this rank has no partner in this scope.
        ranks: Ranks of that group.
    """

    name: str
    group: Group | None
    ranks: tuple[int, ...]


def group_ranks(nodes: Sequence[int]) -> dict[str, list[tuple[int, ...]]]:
    """List the groups of each scope, without groups of one rank and without a scope that equals another one.

    Args:
        nodes: Host number of each rank.

    Returns:
        Ranks of each group, by scope.
    """
    hosts = host_ranks(nodes)
    lanes = max(len(ranks) for ranks in hosts)
    across = [tuple(ranks[lane] for ranks in hosts if lane < len(ranks)) for lane in range(lanes)]
    layout = {"within": [tuple(ranks) for ranks in hosts], "across": across, "all": [tuple(range(len(nodes)))]}
    layout = {name: [ranks for ranks in groups if len(ranks) > 1] for name, groups in layout.items()}
    if layout["all"] in (layout["within"], layout["across"]):
        del layout["all"]
    return {name: groups for name, groups in layout.items() if groups}


def host_ranks(nodes: Sequence[int]) -> list[list[int]]:
    """List the ranks of each host; hosts come in the order of their first rank."""
    hosts: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        hosts.setdefault(node, []).append(rank)
    return list(hosts.values())


def create_scopes(nodes: Sequence[int], seconds: float) -> list[Scope]:
    """Create the process groups of every scope.

    Args:
        nodes: Host number of each rank.
        seconds: Timeout of a collective operation.

    Returns:
        The scopes, each with this rank's group.

    Collective: All ranks.
    """
    rank, scopes = dist.get_rank(), []
    for name, layout in group_ranks(nodes).items():
        mine = Scope(name, None, (rank,))
        for ranks in layout:  # every rank takes part in creating every group, in the same order
            group = dist.new_group(list(ranks), timeout=timedelta(seconds=seconds))
            if rank in ranks:
                mine = Scope(name, group, ranks)
        scopes.append(mine)
    return scopes


def align(group: Group | None) -> None:
    """Wait for all ranks of a group, on the host and without NCCL.

    Args:
        group: Group of ranks to wait for; None: all ranks.

    Collective: All ranks of the group.
    """
    dist.all_reduce(torch.zeros(1), group=group)


def largest(seconds: float, group: Group) -> float:
    """Return the largest number of seconds that a rank of the group gives.

    Collective: All ranks of the group.
    """
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return value.item()
