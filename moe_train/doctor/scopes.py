"""The groups of ranks that the doctor measures: within each host, across hosts, and all."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_train.distributed.collectives import Group

SCOPES = ("within", "across", "all")  # of a host, one rank of each host, everybody


@dataclass(frozen=True)
class Scope:
    """One kind of group, and this rank's.

    Attributes:
        name: One of SCOPES.
        group: This rank's; None: it is in none of more than one rank.
        ranks: Of this rank's group.
    """

    name: str
    group: Group | None
    ranks: tuple[int, ...]


def group_ranks(nodes: Sequence[int]) -> dict[str, list[tuple[int, ...]]]:
    """The groups of each scope, those of one rank left out; a scope that equals another one is left out too.

    Args:
        nodes: The host of each rank.
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
    """The ranks of each host, hosts in order of their first rank."""
    hosts: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        hosts.setdefault(node, []).append(rank)
    return list(hosts.values())


def create_scopes(nodes: Sequence[int], seconds: float) -> list[Scope]:
    """The process groups of every scope.

    Args:
        nodes: The host of each rank.
        seconds: Bound of a collective operation.

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
    """Wait for all ranks of a group, on the host: NCCL is kept out of it. None: all ranks. Collective: of the group."""
    dist.all_reduce(torch.zeros(1), group=group)


def largest(seconds: float, group: Group) -> float:
    """The most seconds of any rank. Collective: all ranks of the group."""
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return value.item()
