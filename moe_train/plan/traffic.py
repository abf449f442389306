"""Traffic of one rank: bytes sent to other ranks per optimizer step, inside its node and across nodes, by part.

All-to-alls are as in moe_train/model/moe: rows to the experts and back in both passes, with gates and places, and
counts before them. The numbers are expectations under even routing; for `flat` they are exact in the mean. Collective
operations of n ranks count as rings: (n - 1)/n B for an all-gather or reduce-scatter of B bytes, and twice that for an
all-reduce. If a group has m ranks on a node, each of them sends 1/m of this across nodes.
Legend: T tokens per rank, K top_k, E experts, x experts on a rank of the group, P ranks, C chunks.
"""

import math
from dataclasses import dataclass

from moe_train.config.machine import Link, Machine, Network
from moe_train.model.cost import MixerCost
from moe_train.model.moe.balance.build import balance_kinds, needed_sums
from moe_train.plan.activations import payload_bytes
from moe_train.plan.layout import Layout, RankGroup, dispatch_hops
from moe_train.plan.loads import RowLoads
from moe_train.plan.shapes import ModelShape
from moe_train.plan.states import ModelStates

_COUNT_BYTES, _SUM_BYTES, _WIDE_BYTES, _FP32_BYTES = 8, 4, 8, 4
_STEP_SUMS = 4  # of an expert over a step: importance, load, probability, count


@dataclass(frozen=True)
class Sent:
    """Bytes sent to other ranks.

    Attributes:
        intra_node: Bytes to ranks of the same node.
        inter_node: Bytes to ranks of other nodes.
    """

    intra_node: float = 0.0
    inter_node: float = 0.0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.intra_node + other.intra_node, self.inter_node + other.inter_node)

    def __mul__(self, factor: float) -> "Sent":
        return Sent(self.intra_node * factor, self.inter_node * factor)

    @property
    def total(self) -> float:
        """Bytes to all other ranks."""
        return self.intra_node + self.inter_node


@dataclass(frozen=True)
class LayerTraffic:
    """Traffic of the all-to-alls of one MoE layer and micro-batch.

    Attributes:
        forward: Bytes of a forward pass.
        backward: Bytes of a backward pass.
        forward_operations: Number of all-to-alls of a forward pass, inside a node and across nodes.
        backward_operations: Number of all-to-alls of a backward pass, inside a node and across nodes.
    """

    forward: Sent
    backward: Sent
    forward_operations: tuple[int, int]
    backward_operations: tuple[int, int]


@dataclass(frozen=True)
class Reduction:
    """Collective operations of one kind in a step.

    Attributes:
        kind: Kind of the operations, all_reduce, all_gather or ring; a reduce-scatter counts as an all-gather.
        ranks: RankGroup of the group.
        num_bytes: Bytes of the tensors, summed over all operations.
        operations: Number of operations.
    """

    kind: str
    ranks: RankGroup
    num_bytes: float
    operations: float

    @property
    def sent(self) -> Sent:
        """Bytes that a rank sends to other ranks."""
        size = self.ranks.size
        if size <= 1:
            return Sent()
        total = (2 if self.kind == "all_reduce" else 1) * (size - 1) / size * self.num_bytes
        if self.ranks.across <= 0:
            return Sent(total, 0.0)
        return Sent(total * (1 - 1 / self.ranks.on_node), total / self.ranks.on_node)

    def seconds(self, machine: Machine) -> float:
        """Compute the seconds on a machine; both kinds of links work at once, and the slower one counts."""
        if self.ranks.size <= 1:
            return 0.0
        moving = max(send_seconds(machine, self.kind, self.sent))
        return self.operations * latency(machine, self.kind, self.ranks) + moving


def send_seconds(machine: Machine, kind: str, sent: Sent) -> tuple[float, float]:
    """Compute the seconds of sending bytes, without latency.

    Args:
        machine: Machine with the link rates.
        kind: Kind of the operation, a field of `Network`.
        sent: Bytes to other ranks.

    Returns:
        Seconds inside a node and across nodes. An operation over both takes the longer of them.
    """
    inside = sent.intra_node / link_of(machine.intra_node, kind).bytes_per_second if sent.intra_node > 0 else 0.0
    across = sent.inter_node / link_of(machine.inter_node, kind).bytes_per_second if sent.inter_node > 0 else 0.0
    return inside, across


def latency(machine: Machine, kind: str, ranks: RankGroup) -> float:
    """Return the latency of one operation in a group of ranks, in seconds."""
    return link_of(machine.inter_node if ranks.across > 0 else machine.intra_node, kind).latency_seconds


def link_of(network: Network | None, kind: str) -> Link:
    """Return the link rates of an operation; `layout.Cluster` has checked that the machine has the network."""
    assert network is not None
    found: Link | None = getattr(network, kind)
    return network.all_gather if found is None else found


def layer_traffic(shape: ModelShape, layout: Layout, loads: RowLoads) -> LayerTraffic:
    """Compute the traffic of the all-to-alls of one MoE layer and micro-batch.

    Args:
        shape: Sizes of the model.
        layout: Layout of the run.
        loads: Rows at the experts of a rank.
    """
    if layout.ep_size == 1:
        return LayerTraffic(Sent(), Sent(), (0, 0), (0, 0))
    moe, group, chunks = shape.config.moe, layout.expert_parallel, layout.chunks
    hops = dispatch_hops(moe, layout, layout.tokens * moe.top_k * loads.kept)
    row = payload_bytes(layout, shape.config.hidden_size)
    passed = counts = Sent()
    operations, is_across = [0, 0], group.across > 0  # inside a node, and across nodes
    for number, hop in enumerate(hops):
        if len(hops) == 1:
            inside, across = group.on_node - 1, group.across
        else:  # across nodes first, then inside
            is_across = number == 0
            inside, across = (0, hop.num_ranks - 1) if is_across else (hop.num_ranks - 1, 0)
        # Rows and what goes with them to the experts, and rows back; counts once for all chunks.
        num_bytes, num_counts = 2 * hop.rows * row + hop.routing_bytes, chunks * hop.counts * _COUNT_BYTES
        passed += Sent(num_bytes * inside, num_bytes * across)
        counts += Sent(num_counts * inside, num_counts * across)
        operations[is_across] += 3 * chunks
    forward = tuple(each + (each > 0) for each in operations)
    return LayerTraffic(passed + counts, passed, (forward[0], forward[1]), (operations[0], operations[1]))


def moe_layers_again(shape: ModelShape, layout: Layout) -> int:
    """Count the MoE layers that a backward pass computes again, and whose rows it sends again.

    Args:
        shape: Sizes of the model.
        layout: Layout of the run.
    """
    return sum(layer.is_moe and layout.recompute.repeats("experts", n) for n, layer in enumerate(shape.layers))


def key_value_exchange(mixer: MixerCost, layout: Layout) -> tuple[list[Reduction], list[Reduction]]:
    """List how a layer's keys and values of shared sequences travel in a micro-batch: forward, and backward.

    With X bytes of a rank's keys and values, a forward pass sends (P - 1) X. A backward pass sends as much again,
    unless they were gathered once, and (P - 1) X' for their fp32 gradients, or P X' in a ring, which takes them home.

    Args:
        mixer: Cost of the layer's mixer.
        layout: Layout of the run.
    """
    size, ranks, is_once = layout.context_size, layout.context, layout.context_exchange == "gather_once"
    # Gathered once: by the layers that make them.
    if size == 1 or not mixer.exchanged or (is_once and not mixer.owns_exchanged):
        return [], []
    own = float(layout.tokens * mixer.exchanged)
    is_ring = layout.context_exchange == "ring"
    hops = size - 1 if is_ring else 1
    kind = "ring" if is_ring else "all_gather"
    keys = Reduction(kind, ranks, size * own * layout.dtype_bytes, hops)
    # A reduction of B bytes sends (P - 1)/P B. In a ring, gradients make P hops.
    whole = own * _SUM_BYTES * size * (size / (size - 1) if is_ring else 1)
    return [keys], [*([] if is_once else [keys]), Reduction(kind, ranks, whole, size if is_ring else 1)]


def gradient_reductions(states: ModelStates, layout: Layout) -> list[Reduction]:
    """List ZeRO's reductions of gradients per step: dense tensors over all ranks, experts over ranks with the same.

    Stages 1 and 2 all-reduce complete buckets: stage 1 once per step, stage 2 after every pass. Stage 3 reduces to each
    rank its part, after every pass.

    Args:
        states: Model states of the rank.
        layout: Layout of the run.
    """
    e, found = layout.dtype_bytes, []
    times = 1 if layout.zero_stage == 1 else layout.accumulation
    buckets = max(1.0, states.local_elements / layout.bucket_elements)
    kind = "all_gather" if layout.zero_stage == 3 else "all_reduce"
    for is_expert, ranks in ((False, layout.world), (True, layout.expert_data_parallel)):
        numel = sum(group.numel for group in states.groups if group.is_expert is is_expert)
        if numel:
            found.append(Reduction(kind, ranks, float(times * e * numel), times * buckets))
    return found


def matrix_reductions(states: ModelStates, layout: Layout) -> list[Reduction]:
    """List the reductions of an optimizer that treats matrices as a whole: it gathers them, and spreads the updates.

    Args:
        states: Model states of the rank.
        layout: Layout of the run.
    """
    found = []
    for group in states.groups:
        if group.is_matrix:
            ranks = layout.expert_data_parallel if group.is_expert else layout.world
            buckets = math.ceil(group.numel / layout.optimizer_kind.bucket_elements)
            found.append(Reduction("all_reduce", ranks, 2.0 * _FP32_BYTES * group.numel, 2.0 * buckets))
    return found


def weight_gathers(states: ModelStates, layout: Layout) -> list[Reduction]:
    """List the gathers of working weights per step.

    Under stages 1 and 2, all weights are gathered after the update. Under stage 3, only the tensors that are not
    divided are gathered then. The other tensors are gathered in every pass; the backward pass gathers again the weights
    that did not stay from the forward pass. Each tensor is gathered separately.

    Args:
        states: Model states of the rank.
        layout: Layout of the run.
    """
    ranks_of = {False: layout.world, True: layout.expert_data_parallel}
    found, e = [], layout.dtype_bytes
    if layout.zero_stage < 3:
        for is_expert, ranks in ranks_of.items():
            groups = [group for group in states.groups if group.is_expert is is_expert]
            if groups and ranks.size > 1:
                found.append(Reduction("all_gather", ranks, float(e * sum(g.numel for g in groups)), len(groups)))
        return found
    passing = e * sum(cut.passing for cut in states.cuts)
    times = layout.accumulation * (2 - states.gathered / passing) if passing else 0.0
    for cut in states.cuts:
        size, number = cut.staying + times * cut.passing, cut.num_staying + times * cut.num_passing
        if number:
            found.append(Reduction("all_gather", ranks_of[cut.is_expert], e * size, number))
    return found


def small_reductions(shape: ModelShape, states: ModelStates, layout: Layout) -> list[Reduction]:
    """List the sums of few numbers over ranks: balance terms of each pass, gradient norms and overflow flags.

    Args:
        shape: Sizes of the model.
        states: Model states of the rank.
        layout: Layout of the run.
    """
    moe, found = shape.config.moe, []
    terms = sum(kind.reduces(moe, section) for _, kind, section in balance_kinds(moe))
    if shape.num_moe_layers and terms:
        times = 2 * terms * layout.accumulation  # forward and backward pass
        size = _SUM_BYTES * shape.num_moe_layers * moe.num_experts
        found.append(Reduction("all_reduce", layout.world, float(times * size), times))
    if shape.num_moe_layers and any(kind.remembers(moe, section) for _, kind, section in balance_kinds(moe)):
        size = _STEP_SUMS * _WIDE_BYTES * shape.num_moe_layers * moe.num_experts
        found.append(Reduction("all_reduce", layout.world, float(size), 1))  # once per step
    needed = needed_sums(moe) if shape.num_moe_layers else frozenset()
    if layout.context_size > 1 and "sequence_balance" in needed:  # counts and probabilities of every sequence
        passes = 2 * shape.num_moe_layers + moe_layers_again(shape, layout)
        times = passes * layout.accumulation
        size = 2 * _SUM_BYTES * layout.micro_batch * moe.num_experts
        found.append(Reduction("all_reduce", layout.context, float(times * size), times))
    norms = len(states.groups) + 2
    found.append(Reduction("all_reduce", layout.world, float(_SUM_BYTES * norms), norms))
    return found
