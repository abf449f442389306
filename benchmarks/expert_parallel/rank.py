"""A rank of the expert_parallel benchmark: trains one MoE layer with every dispatch in turn, and tells what each took.

    python -m benchmarks.expert_parallel.rank FOLDER SHAPE

Legend: T tokens of this rank, K top_k, D hidden_size.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.expert_parallel.rows import Sent, Shape, Turn, Variant, count_rows
from benchmarks.runner.layer import apply_layer, build_layer
from benchmarks.runner.rounds import in_turn
from moe_train.distributed.bootstrap import discover_world, init_process_group, leave_process_group
from moe_train.distributed.collectives import (
    all_reduce_sum,
    barrier,
    gather_objects,
    group_rank,
    group_size,
    world_group,
)
from moe_train.distributed.mesh import create_mesh
from moe_train.host.memory import keep_freed_memory
from moe_train.model.build import ExpertPlacement
from moe_train.model.moe.dispatch.base import Dispatcher
from moe_train.model.moe.layer import MoELayer
from moe_train.model.parameters import ExpertParameter, materialize
from moe_train.ops.keyed_random import fill_normal_, make_key

_DEVICE = torch.device("cpu")
_TIMEOUT_SECONDS = 300
_LEARNING_RATE = 1e-4
_WARM_UPS = 2  # steps that are not timed; the numbers of the first one are compared


@dataclass
class Wire:
    """Bytes that go through torch.distributed.all_to_all_single, and how long this rank waits for them.

    Attributes:
        hidden: D; messages with rows that wide or wider are token rows, all others metadata.
        node_size: Ranks of a node.
        is_backward: Whether this is the backward pass.
        across: Bytes of token rows to ranks of other nodes, forward pass.
        within: Bytes of token rows to other ranks of the node, forward pass.
        metadata: Bytes of all else to other ranks, forward pass.
        backward: Bytes to other ranks, backward pass.
        seconds: Time of starting all-to-alls and of waiting for them.
    """

    hidden: int
    node_size: int
    is_backward: bool = False
    across: int = field(default=0, init=False)
    within: int = field(default=0, init=False)
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
            began = time.perf_counter()
            work = original(output, input, output_split_sizes, input_split_sizes, group, async_op)
            self.seconds += time.perf_counter() - began
            self._count(input, input_split_sizes, group)
            return _TimedWork(work, self) if async_op else work

        dist.all_to_all_single = watching
        try:
            yield
        finally:
            dist.all_to_all_single = original

    def _count(self, input: Tensor, splits: list[int] | None, group: dist.ProcessGroup | None) -> None:
        ranks = dist.get_process_group_ranks(group)
        splits = splits or [len(input) // len(ranks)] * len(ranks)
        own = dist.get_rank()
        row_bytes = input[:1].numel() * input.element_size() if len(input) else 0
        others = [(rank, split * row_bytes) for rank, split in zip(ranks, splits, strict=True) if rank != own]
        total = sum(num_bytes for _, num_bytes in others)
        if self.is_backward:
            self.backward += total
        elif input.dtype != torch.int64 and input[:1].numel() >= self.hidden:
            across = sum(num_bytes for rank, num_bytes in others if rank // self.node_size != own // self.node_size)
            self.across += across
            self.within += total - across
        else:
            self.metadata += total


@dataclass(frozen=True)
class _TimedWork:
    """A collective operation under way, the wait for which is timed."""

    work: dist.Work
    wire: Wire

    def wait(self) -> Any:
        began = time.perf_counter()
        result = self.work.wait()
        self.wire.seconds += time.perf_counter() - began
        return result


class Clock:
    """Adds up the time of the parts of a layer's forward pass."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("route", "dispatch", "experts", "combine"), 0.0)

    def watch(self, layer: MoELayer) -> None:
        """Time the layer's four steps from now on: its chunks take turns in them."""
        for part, module in (("route", layer.router), ("experts", layer.experts)):
            began: list[float] = []
            module.register_forward_pre_hook(lambda *_, began=began: began.append(time.perf_counter()))
            module.register_forward_hook(lambda *_, part=part, began=began: self._add(part, began.pop()))
        layer.dispatcher = _TimedDispatcher(layer.dispatcher, self)

    def timed(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function, and add its time to a part."""
        began = time.perf_counter()
        result = function(*arguments)
        self._add(part, began)
        return result

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading."""
        seconds, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return seconds

    def _add(self, part: str, began: float) -> None:
        self.seconds[part] += time.perf_counter() - began


@dataclass(frozen=True)
class _TimedDispatcher:
    """A dispatcher whose calls are timed, and the waits for what they start."""

    dispatcher: Dispatcher
    clock: Clock

    def plan(self, *arguments: Any) -> Any:
        return self.clock.timed("dispatch", self.dispatcher.plan, *arguments)

    def start(self, *arguments: Any) -> Any:
        return self._started("dispatch", self.dispatcher.start, *arguments)

    def start_combine(self, *arguments: Any) -> Any:
        return self._started("combine", self.dispatcher.start_combine, *arguments)

    def _started(self, part: str, start: Callable[..., Any], *arguments: Any) -> "_TimedPending":
        return _TimedPending(self.clock.timed(part, start, *arguments), self.clock, part)


@dataclass(frozen=True)
class _TimedPending:
    """Rows on their way, the wait for which is timed."""

    pending: Any
    clock: Clock
    part: str

    def wait(self) -> Any:
        return self.clock.timed(self.part, self.pending.wait)


@dataclass(frozen=True)
class Trainee:
    """A layer with one of the dispatches, its optimizer, and the clock of its parts."""

    layer: MoELayer
    optimizer: torch.optim.Optimizer
    clock: Clock


def main(arguments: Sequence[str]) -> int:
    """Measure; rank 0 writes turns.json into the folder. Collective: all ranks.

    Args:
        arguments: Folder, and the fields of Shape as JSON.
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
    """Run all rounds: by variant, the compared step and then the timed ones. Collective: all ranks."""
    names = [variant.name for variant in shape.variants_on(group_size(world_group()))]
    trainees = {variant.name: make_trainee(variant, shape) for variant in shape.variants_on(group_size(world_group()))}
    found: dict[str, list[Turn]] = {name: [] for name in names}
    reference: list[Tensor] = []
    for number in range(shape.rounds + _WARM_UPS):
        x_TD, grad_TD = (_draw(shape, what, number) for what in ("tokens", "gradient"))
        for name in in_turn(names, number):  # the first round begins with the reference
            turn, numbers = take_turn(trainees[name], x_TD, grad_TD, shape)
            if number == 0:
                reference = reference or numbers
                apart = max(_difference(ours, theirs) for ours, theirs in zip(numbers, reference, strict=True))
                found[name].append(replace(turn, difference=max(gather_objects(apart))))
            elif number >= _WARM_UPS:
                found[name].append(turn)
    return found


def make_trainee(variant: Variant, shape: Shape) -> Trainee:
    """Build a layer whose weights are the same for every variant. Collective: all ranks."""
    num_ranks, groups = group_size(world_group()), ()
    if num_ranks > 1:
        node_size = shape.node_size(num_ranks) if variant.dispatch == "two_level" else None
        groups = create_mesh(num_ranks, _TIMEOUT_SECONDS, node_size).dispatch_groups
    place = ExpertPlacement(
        rank=group_rank(world_group()),
        size=num_ranks,
        dispatch_groups=groups,
        dispatch=variant.dispatch,
        num_chunks=variant.chunks,
        payload=variant.payload,
    )
    layer = build_layer(shape.hidden, shape.inner, shape.experts, shape.top_k, place)
    materialize(layer, seed=shape.seed, dtype=torch.float32, device=_DEVICE)
    clock = Clock()
    clock.watch(layer)
    return Trainee(layer, torch.optim.AdamW(layer.parameters(), lr=_LEARNING_RATE, fused=True), clock)


def take_turn(trainee: Trainee, x_TD: Tensor, grad_TD: Tensor, shape: Shape) -> tuple[Turn, list[Tensor]]:
    """Train one step; what it took, and its output and gradients. Collective: all ranks.

    Args:
        trainee: Layer with one of the dispatches.
        x_TD: Tokens.
        grad_TD: Gradient of the layer's output.
        shape: Sizes of the layer.
    """
    layer, group = trainee.layer, world_group()
    chosen: list[Tensor] = []
    watcher = layer.router.register_forward_hook(lambda *told: chosen.append(told[2].experts_TK))
    x_TD = x_TD.clone().requires_grad_()
    wire = Wire(shape.hidden, shape.node_size(group_size(group)))
    barrier()
    began = time.perf_counter()
    with wire.watched():
        y_TD = apply_layer(layer, x_TD, torch.arange(shape.tokens))
        forward_end = time.perf_counter()
        wire.is_backward = True
        y_TD.backward(grad_TD)
    backward_end = time.perf_counter()
    _add_up_router_gradients(layer, group)
    trainee.optimizer.step()
    end = time.perf_counter()
    watcher.remove()
    seconds = trainee.clock.read() | {"backward": backward_end - forward_end, "optimizer": end - backward_end}
    seconds |= {"step": end - began, "exchange": wire.seconds}
    gradients = [x_TD.grad, *(parameter.grad for parameter in layer.parameters())]
    numbers = [y_TD.detach(), *(gradient for gradient in gradients if gradient is not None)]
    trainee.optimizer.zero_grad()
    rows = count_rows(chosen[0].tolist(), group_rank(group), shape, group_size(group))
    return _over_ranks(seconds, wire, rows), numbers


def _add_up_router_gradients(layer: nn.Module, group: dist.ProcessGroup | None) -> None:
    for parameter in layer.parameters():
        if not isinstance(parameter, ExpertParameter) and parameter.grad is not None:
            parameter.grad = all_reduce_sum(parameter.grad, group)


def _over_ranks(seconds: dict[str, float], wire: Wire, rows: dict[str, tuple[int, int]]) -> Turn:
    """Times of the slowest rank, and bytes of all ranks. Collective: all ranks."""
    told = gather_objects((seconds, (wire.across, wire.within, wire.metadata, wire.backward), rows))
    slowest = {name: max(one[0][name] for one in told) for name in seconds}
    sent = Sent(*(sum(one[1][i] for one in told) for i in range(4)))
    drawn = {name: tuple(sum(one[2][name][i] for one in told) for i in range(2)) for name in rows}
    return Turn(slowest, sent, drawn, difference=None)


def _draw(shape: Shape, what: str, number: int) -> Tensor:
    """Normal numbers, the same for every dispatch, different on every rank and in every round. [T, D]."""
    out_TD = torch.empty(shape.tokens, shape.hidden)
    start = group_rank(world_group()) * out_TD.numel()
    fill_normal_(out_TD, make_key(shape.seed, "benchmark", what, number), start, 1.0)
    return out_TD


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of an element, as a share of the largest element."""
    largest = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / largest if largest else float(ours.abs().max().item() > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
