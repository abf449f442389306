"""A rank of benchmarks/expert_parallel.py: trains one MoE layer with every dispatch in turn, and tells what each took.

Legend: T tokens of this rank, K top_k, D hidden_size.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.expert_parallel_rows import PARTS, REFERENCE, Sent, Shape, Turn, count_rows
from moe_train.model.moe.dispatch import DISPATCHERS
from moe_train.model.moe.experts import GroupedExperts
from moe_train.model.moe.layer import MoELayer
from moe_train.model.moe.routers.base import PLAIN
from moe_train.model.moe.routers.softmax_topk import SoftmaxTopKRouter
from moe_train.model.parameters import ExpertParameter, materialize
from moe_train.ops.keyed_random import fill_normal_, make_key
from moe_train.parallel.bootstrap import discover_world, init_process_group, leave_process_group
from moe_train.parallel.collectives import all_reduce_sum, barrier, gather_objects, group_rank, group_size, world_group
from moe_train.parallel.host_memory import keep_freed_memory

_DEVICE = torch.device("cpu")
_TIMEOUT_SECONDS = 300
_LEARNING_RATE = 1e-4
_INIT_STD = 0.02
_WARM_UPS = 2  # steps that are not timed: of the first the numbers are compared


@dataclass
class Wire:
    """What goes through torch.distributed.all_to_all_single, and how long that takes.

    Attributes:
        hidden: D; of rows at least as wide, that much is a token's row and the rest metadata.
        link_mbit: Megabits a second at which a rank sends and, at the same time, receives; 0: as fast as it goes.
        is_backward: Which pass it is.
        rows: Bytes to other ranks, forward pass.
        metadata: Likewise.
        backward: Bytes to other ranks, backward pass.
        seconds: In all-to-alls.
    """

    hidden: int
    link_mbit: float
    is_backward: bool = False
    rows: int = field(default=0, init=False)
    metadata: int = field(default=0, init=False)
    backward: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch all-to-alls while the block runs: from outside, so that the package cannot be wrong about itself."""
        original = dist.all_to_all_single

        def watching(
            output: Tensor,
            input: Tensor,
            output_split_sizes: list[int] | None = None,
            input_split_sizes: list[int] | None = None,
            group: dist.ProcessGroup | None = None,
            async_op: bool = False,
        ) -> Any:
            assert not async_op, "an exchange that goes on by itself is not timed here"
            began = time.perf_counter()
            result = original(output, input, output_split_sizes, input_split_sizes, group)
            sent, received = _to_others(input, input_split_sizes, group), _to_others(output, output_split_sizes, group)
            self._count(input, sent)
            if self.link_mbit:
                time.sleep(max(sent, received) * 8 / (self.link_mbit * 1e6))
            self.seconds += time.perf_counter() - began
            return result

        dist.all_to_all_single = watching
        try:
            yield
        finally:
            dist.all_to_all_single = original

    def _count(self, input: Tensor, sent: int) -> None:
        width = input[:1].numel()
        if self.is_backward:
            self.backward += sent
        elif input.is_floating_point() and width >= self.hidden:
            self.rows += sent * self.hidden // width
            self.metadata += sent - sent * self.hidden // width
        else:
            self.metadata += sent


@dataclass(frozen=True)
class Trainee:
    """A layer with one of the dispatches, and its optimizer."""

    layer: MoELayer
    optimizer: torch.optim.Optimizer


def run_rank(arguments: list[str]) -> int:
    """Measure; rank 0 writes turns.json into the folder. Collective: all ranks.

    Args:
        arguments: The folder, and the fields of Shape as JSON.
    """
    folder, shape = Path(arguments[0]), Shape(**json.loads(arguments[1]))
    world = discover_world()
    keep_freed_memory()  # as in training
    init_process_group(world, _DEVICE, _TIMEOUT_SECONDS)
    turns = measure(shape)
    if world.rank == 0:
        (folder / "turns.json").write_text(json.dumps({name: [asdict(t) for t in own] for name, own in turns.items()}))
    barrier()
    leave_process_group(0)
    return 0


def measure(shape: Shape) -> dict[str, list[Turn]]:
    """All rounds: by dispatch, the compared step and then the timed ones. Collective: all ranks."""
    trainees = {name: make_trainee(name, shape) for name in DISPATCHERS}
    names = [REFERENCE, *(name for name in trainees if name != REFERENCE)]
    found: dict[str, list[Turn]] = {name: [] for name in names}
    reference: list[Tensor] = []
    for number in range(shape.rounds + _WARM_UPS):
        x_TD, grad_TD = (_draw(shape, what, number) for what in ("tokens", "gradient"))
        # What comes first in a round may gain or lose by it: in turn. The first round begins with the reference.
        first = number % len(names)
        for name in names[first:] + names[:first]:
            turn, numbers = take_turn(trainees[name], x_TD, grad_TD, shape)
            if number == 0:
                reference = reference or numbers
                apart = max(_difference(ours, theirs) for ours, theirs in zip(numbers, reference, strict=True))
                found[name].append(replace(turn, difference=max(gather_objects(apart))))
            elif number >= _WARM_UPS:
                found[name].append(turn)
    return found


def make_trainee(dispatch: str, shape: Shape) -> Trainee:
    """A layer whose weights are the same for every dispatch."""
    group = world_group()
    local = shape.experts // group_size(group)
    with torch.device("meta"):
        router = SoftmaxTopKRouter(
            shape.hidden,
            shape.experts,
            shape.top_k,
            renormalize=shape.top_k > 1,
            init_std=_INIT_STD,
            options=replace(PLAIN, optional_sums=frozenset()),
        )
        experts = GroupedExperts(
            shape.hidden, shape.inner, shape.experts, local, group_rank(group) * local, _INIT_STD, _INIT_STD
        )
        layer = MoELayer(router, DISPATCHERS[dispatch](None), experts, shape.experts, group)
    materialize(layer, seed=shape.seed, dtype=torch.float32, device=_DEVICE)
    return Trainee(layer, torch.optim.AdamW(layer.parameters(), lr=_LEARNING_RATE, fused=True))


def take_turn(trainee: Trainee, x_TD: Tensor, grad_TD: Tensor, shape: Shape) -> tuple[Turn, list[Tensor]]:
    """One step; and its output and gradients. Collective: all ranks.

    Args:
        trainee: To train.
        x_TD: Tokens.
        grad_TD: Gradient of the layer's output.
        shape: Of the layer.
    """
    layer, group = trainee.layer, trainee.layer.group
    keys_T = torch.arange(shape.tokens)
    x_TD = x_TD.clone().requires_grad_()
    wire = Wire(shape.hidden, shape.link_mbit)
    barrier()
    clock = [time.perf_counter()]
    with wire.watched():
        # MoELayer.forward in its parts.
        routing = layer.router(x_TD, keys_T)
        clock.append(time.perf_counter())
        dispatched = layer.dispatcher.dispatch(x_TD, routing, shape.experts, group)
        clock.append(time.perf_counter())
        rows_ND = layer.experts(dispatched.rows_ND, dispatched.assignments)
        clock.append(time.perf_counter())
        y_TD = layer.dispatcher.combine(rows_ND, dispatched, group)
        clock.append(time.perf_counter())
        wire.is_backward = True
        y_TD.backward(grad_TD)
        clock.append(time.perf_counter())
    _add_up_router_gradients(layer, group)
    trainee.optimizer.step()
    clock.append(time.perf_counter())
    seconds = {part: end - begin for part, begin, end in zip(PARTS, clock, clock[1:], strict=False)}
    seconds |= {"step": clock[-1] - clock[0], "exchange": wire.seconds}
    gradients = [x_TD.grad, *(parameter.grad for parameter in layer.parameters())]
    numbers = [y_TD.detach(), *(gradient for gradient in gradients if gradient is not None)]
    trainee.optimizer.zero_grad()
    rows = count_rows(routing.experts_TK.tolist(), group_rank(group), shape.experts // group_size(group))
    return _over_ranks(seconds, wire, rows), numbers


def _add_up_router_gradients(layer: nn.Module, group: dist.ProcessGroup | None) -> None:
    for parameter in layer.parameters():
        if not isinstance(parameter, ExpertParameter) and parameter.grad is not None:
            parameter.grad = all_reduce_sum(parameter.grad, group)


def _over_ranks(seconds: dict[str, float], wire: Wire, rows: tuple[int, int]) -> Turn:
    """The slowest rank's times, and all ranks' bytes. Collective: all ranks."""
    told = gather_objects((seconds, (wire.rows, wire.metadata, wire.backward), rows))
    slowest = {name: max(one[0][name] for one in told) for name in seconds}
    sent = Sent(*(sum(one[1][i] for one in told) for i in range(3)))
    return Turn(slowest, sent, *(sum(one[2][i] for one in told) for i in range(2)), difference=None)


def _to_others(tensor: Tensor, splits: list[int] | None, group: dist.ProcessGroup | None) -> int:
    """Bytes of the blocks that are not this rank's own."""
    own = splits[dist.get_rank(group)] if splits else len(tensor) // dist.get_world_size(group)
    return (len(tensor) - own) * tensor[:1].numel() * tensor.element_size() if len(tensor) else 0


def _draw(shape: Shape, what: str, number: int) -> Tensor:
    """Normal numbers, the same for every dispatch, others on every rank and in every round. [T, D]."""
    out_TD = torch.empty(shape.tokens, shape.hidden)
    start = group_rank(world_group()) * out_TD.numel()
    fill_normal_(out_TD, make_key(shape.seed, "benchmark", what, number), start, 1.0)
    return out_TD


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of an element, of the largest element."""
    largest = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / largest if largest else float(ours.abs().max().item() > 0)
