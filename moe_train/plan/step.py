"""Time of one optimizer step by term, and its variation with the loads of the experts."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from moe_train.plan.compute import BlockWork, Pass, around_operations, attention_work, block_work, head_work
from moe_train.plan.host import copy_seconds, update_seconds
from moe_train.plan.layout import Layout
from moe_train.plan.loads import RowLoads
from moe_train.plan.rates import Rates
from moe_train.plan.shapes import LayerShape, ModelShape
from moe_train.plan.states import ModelStates
from moe_train.plan.traffic import (
    LayerTraffic,
    Reduction,
    Sent,
    gradient_reductions,
    key_value_exchange,
    latency,
    layer_traffic,
    matrix_reductions,
    moe_layers_again,
    send_seconds,
    small_reductions,
    weight_gathers,
)

TERMS = (
    "attention",
    "dense_feed_forward",
    "router",
    "experts",
    "imbalance",
    "head_and_loss",
    "recomputation",
    "all_to_all",
    "key_value_exchange",
    "gradient_reduction",
    "weight_gathering",
    "small_reductions",
    "optimizer",
    "host_copies",
    "operations",
    "waiting",
)
_OWN_WORK = ("attention", "dense_feed_forward", "router", "experts", "head_and_loss", "recomputation", "operations")
_CPU_VARIATION = 0.1  # of a rank's time between two all-to-alls, because other work of the system shares the cores
_COPIES_OF_A_GRADIENT = 8  # reads and writes per element on its way through ZeRO's bucket
_OPERATIONS_OF_A_TENSOR = 25  # operations of ZeRO per tensor and reduction
_OPERATIONS_OF_A_GATHER = 60  # operations of ZeRO-3 per module with weights, pass and micro-batch
_NORM_BYTES = 16  # per element of the norm in fp64
# Bytes per element of the optimizer's update: parameter and gradient; clipping. And of a moment.
_UPDATE_BYTES, _MOMENT_BYTES = 12 + 8, 8


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends per step.

    Attributes:
        parts: Bytes by part, such as all_to_all_forward or gradient_reduction.
    """

    parts: dict[str, Sent]

    @property
    def total(self) -> Sent:
        """Bytes of all parts."""
        return sum(self.parts.values(), Sent())


@dataclass(frozen=True)
class Step:
    """Time of one optimizer step.

    Attributes:
        terms: Mean seconds by name of TERMS, without the time that is hidden behind other work.
        p50: Median seconds per step.
        p99: 99th percentile of the seconds per step.
        hidden: Seconds of all-to-alls that are hidden behind other work.
    """

    terms: dict[str, float]
    p50: float
    p99: float
    hidden: float

    @property
    def seconds(self) -> float:
        """Mean seconds per step."""
        return sum(self.terms.values())

    @property
    def largest_term(self) -> str:
        """Name of the term that takes most time."""
        return max(self.terms, key=lambda name: self.terms[name])


def step_traffic(shape: ModelShape, layout: Layout, loads: RowLoads, states: ModelStates) -> Traffic:
    """Compute the bytes that a rank sends per step.

    Args:
        shape: Sizes of the model.
        layout: Layout of the run.
        loads: Rows at the experts of a rank.
        states: Model states of the rank.
    """
    moe, number = layer_traffic(shape, layout, loads), shape.num_moe_layers
    parts = {
        "all_to_all_forward": moe.forward * ((number + moe_layers_again(shape, layout)) * layout.accumulation),
        "all_to_all_backward": moe.backward * (number * layout.accumulation),
    }
    exchanged: list[Reduction] = []
    for index, layer in enumerate(shape.layers):
        forward, backward = key_value_exchange(layer.mixer, layout)
        exchanged += forward * (1 + layout.recompute.repeats("attention", index)) + backward
    lists = {
        "key_value_exchange": exchanged * layout.accumulation,
        "gradient_reduction": gradient_reductions(states, layout) + matrix_reductions(states, layout),
        "weight_gathering": weight_gathers(states, layout),
        "small_reductions": small_reductions(shape, states, layout),
    }
    return Traffic(parts | {name: sum((each.sent for each in found), Sent()) for name, found in lists.items()})


def plan_step(shape: ModelShape, layout: Layout, loads: RowLoads, states: ModelStates, rates: Rates) -> Step:
    """Compute the time of a step.

    Args:
        shape: Sizes of the model.
        layout: Layout of the run.
        loads: Rows at the experts of a rank.
        states: Model states of the rank.
        rates: Speed of the machine.
    """
    times: dict[str, float] = dict.fromkeys(TERMS, 0.0)
    works: dict[LayerShape, BlockWork] = {}
    for layer in shape.layers:
        if layer not in works:
            works[layer] = block_work(shape, layer, layout, loads, rates)
    traffic = layer_traffic(shape, layout, loads)
    varying = exchanged = hidden = 0.0
    host = around_operations(rates)
    device = head_work(shape, layout, rates)
    times["head_and_loss"] = device.forward + device.backward
    for index, layer in enumerate(shape.layers):
        work, part = works[layer], layout.recompute.in_layer(index)
        whole = work.mixer + work.feed_forward + work.router + work.experts
        device, host = device + whole, host + work.mixer_operations + work.feed_forward_operations
        times["attention"] += _both(work.mixer)
        times["dense_feed_forward"] += _both(work.feed_forward)
        times["router"] += _both(work.router)
        times["experts"] += _both(work.experts)
        seconds, operations = work.forward(part)
        times["recomputation"] += seconds
        device, host = device + Pass(0.0, seconds), host + Pass(0.0, operations)
        times["key_value_exchange"] += _meet(layer, layout, rates, layout.recompute.repeats("attention", index))
        if layer.is_moe and layout.ep_size > 1:
            is_again = layout.recompute.repeats("experts", index)
            shown, behind = _exchange(traffic, work, layout, rates, is_again)
            exchanged, hidden = exchanged + shown, hidden + behind
            varying += _both(work.experts) + is_again * work.experts.forward + shown
    times["all_to_all"], times["operations"] = exchanged, _both(host)
    times = {name: seconds * layout.accumulation for name, seconds in times.items()}
    varying, hidden = varying * layout.accumulation, hidden * layout.accumulation
    _add_reductions(times, shape, layout, states, rates)
    fixed = _zero_operations(shape, layout, rates)
    if rates.is_cpu:
        times |= {name: times[name] + seconds for name, seconds in fixed.items()}
    else:  # a GPU computes while the host launches the next operations; a CPU does both in turn
        launching = times["operations"] + sum(fixed.values())
        times["operations"] = max(0.0, launching - _both(device) * layout.accumulation)
    if rates.is_cpu:
        own = sum(times[name] for name in _OWN_WORK)
        times["waiting"] = _CPU_VARIATION * _slowest_of(layout.world_size) * own
    overload_N = _overloads(loads, shape)
    times["imbalance"] = varying * float(overload_N.mean() - 1)
    seconds_N = sum(times.values()) + varying * (overload_N - overload_N.mean())
    p50, p99 = (float(value) for value in np.quantile(seconds_N, (0.5, 0.99)))
    return Step(times, p50, p99, hidden)


def _slowest_of(ranks: int) -> float:
    """Compute how many standard deviations the slowest of the ranks is above the mean (Blom 1958)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


def _both(work: Pass) -> float:
    return work.forward + work.backward


def _exchange(
    traffic: LayerTraffic, work: BlockWork, layout: Layout, rates: Rates, is_again: bool
) -> tuple[float, float]:
    """Compute the seconds of a layer's all-to-alls in one micro-batch: not hidden by other work, and hidden.

    If the layer is computed again, they are those of two forward passes and a backward pass.
    """
    group = layout.expert_parallel
    passes = [(traffic.forward, traffic.forward_operations, work.experts.forward, work.feed_forward.forward)]
    if is_again:
        passes *= 2
    passes.append((traffic.backward, traffic.backward_operations, work.experts.backward, work.feed_forward.backward))
    shown = behind = 0.0
    for sent, operations, experts, shared in passes:
        fixed = 0.0
        if operations[0] and rates.machine.intra_node is not None:  # one rank per node sends nothing inside it
            fixed += operations[0] * rates.machine.intra_node.all_to_all.latency_seconds
        if operations[1]:
            fixed += operations[1] * latency(rates.machine, "all_to_all", group)
        inside, across = send_seconds(rates.machine, "all_to_all", sent)
        # The hop inside the node follows the hop across nodes, and is waited for at once. So only the hop across nodes
        # can be hidden.
        two_hops = layout.ranks_per_node is not None
        moving, leaving = (inside + across, across) if two_hops else (max(inside, across), max(inside, across))
        can_hide = 0.0
        if not rates.is_cpu or sent.inter_node > 0:
            others = 1 - 1 / layout.chunks  # the first chunk to the experts and the last chunk back are not hidden
            # Shared experts hide one chunk on its way to the experts.
            can_hide = min(others * leaving, others * experts) + min(leaving / layout.chunks / 2, shared)
        shown += fixed + moving - can_hide
        behind += can_hide
    return shown, behind


def _meet(layer: LayerShape, layout: Layout, rates: Rates, is_again: bool) -> float:
    """Compute the seconds in which a layer's keys and values travel, in one micro-batch, and nothing else happens."""
    forward, backward = key_value_exchange(layer.mixer, layout)
    moving = [sum(each.seconds(rates.machine) for each in found) for found in (forward, backward)]
    if layout.context_exchange == "ring" and layer.mixer.attention and not rates.is_cpu:
        behind = attention_work(layer.mixer.attention, layout, rates)  # each block but the last hides a hop
        share = (layout.context_size - 1) / layout.context_size
        moving = [max(0.0, moving[0] - share * behind.forward), max(0.0, moving[1] - share * behind.backward)]
    return moving[0] * (1 + is_again) + moving[1]


def _add_reductions(
    times: dict[str, float], shape: ModelShape, layout: Layout, states: ModelStates, rates: Rates
) -> None:
    """Add the terms that occur once per step or, for stages 2 and 3, once per pass."""
    machine, size = rates.machine, layout.gradient_bytes
    local, own = states.local_elements, states.partition_elements
    passes = 1 if layout.zero_stage == 1 else layout.accumulation

    def seconds(found: list[Reduction]) -> float:
        return sum(each.seconds(machine) for each in found)

    copies = rates.moving(_COPIES_OF_A_GRADIENT * layout.dtype_bytes * local) * passes
    if layout.accumulation > 1:
        copies += rates.moving((layout.dtype_bytes + 8) * (local if layout.zero_stage == 1 else own)) * (
            layout.accumulation
        )
    times["gradient_reduction"] = seconds(gradient_reductions(states, layout)) + copies
    times["weight_gathering"] = seconds(weight_gathers(states, layout))
    times["weight_gathering"] += rates.moving(2 * states.gathered) * layout.accumulation
    times["small_reductions"] = seconds(small_reductions(shape, states, layout))
    if layout.offloads:
        times["optimizer"] = rates.moving(_NORM_BYTES * own) + update_seconds(states, layout, rates)
        times["host_copies"] = copy_seconds(states, layout, rates)
        return
    per_element = _UPDATE_BYTES + _NORM_BYTES + 3 * size + 4 + layout.dtype_bytes
    times["optimizer"] = rates.moving(per_element * own + _MOMENT_BYTES * states.moment_elements)
    times["optimizer"] += seconds(matrix_reductions(states, layout)) + _matrix_seconds(shape, layout, rates)


def _matrix_seconds(shape: ModelShape, layout: Layout, rates: Rates) -> float:
    """Compute the seconds of the products of an optimizer that treats matrices as a whole, spread over the ranks."""
    products = layout.optimizer_kind.matrix_products
    if products is None:
        return 0.0
    total = 0.0
    for tensor in shape.tensors:
        beside = shape.matrices.get(tensor.name, 0)
        if not beside:
            continue
        ranks = layout.edp_size if tensor.is_expert else layout.world_size
        rows, columns = tensor.shape[-2:]
        rows, columns = (rows, columns // beside) if tensor.is_expert else (rows // beside, columns)
        count = beside * (tensor.shape[0] // layout.ep_size if tensor.is_expert else 1)
        each = sum(rates.product(*sizes, precision="fp32") for sizes in products(rows, columns))
        total += each * count / ranks
    return total


def _zero_operations(shape: ModelShape, layout: Layout, rates: Rates) -> dict[str, float]:
    """Compute the host's seconds in ZeRO per step, by term."""
    passes = 1 if layout.zero_stage == 1 else layout.accumulation
    fixed = {"gradient_reduction": rates.operations(_OPERATIONS_OF_A_TENSOR * len(shape.tensors)) * passes}
    if layout.zero_stage == 3:
        modules = len({tensor.name.rpartition(".")[0] for tensor in shape.tensors})
        # Passes over a module: forward, backward, and forward again in the parts that are recomputed.
        parts = [layout.recompute.in_layer(number) for number in range(len(shape.layers))]
        again = 2 + sum({"none": 0.0, "block": 1.0}.get(part, 0.5) for part in parts) / len(parts)
        fixed["weight_gathering"] = rates.operations(_OPERATIONS_OF_A_GATHER * modules * again) * layout.accumulation
    return fixed


def _overloads(loads: RowLoads, shape: ModelShape) -> np.ndarray:
    """Compute for each sampled step the slowest rank's rows divided by the mean, averaged over layers."""
    if loads.overload_NL.shape[1] == 0:
        return np.ones(len(loads.overload_NL))
    mean_N = loads.overload_NL.mean(1)
    # Layers that were not sampled count as further draws: a mean over more layers varies less.
    part = (loads.overload_NL.shape[1] / max(shape.num_moe_layers, 1)) ** 0.5
    return mean_N.mean() + (mean_N - mean_N.mean()) * min(1.0, part)
