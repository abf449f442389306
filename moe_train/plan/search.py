"""Search for the fastest layout of a configuration that fits; every candidate is planned by arithmetic.

The search changes expert_parallel_size, zero_stage, micro_batch_size, recompute, recompute_every, offload_optimizer,
dispatch, chunks and context_parallel_size. The global batch stays the same, so that every candidate takes the same
steps. Memory is planned first: a layout that does not fit is not timed. Recomputation and offloading are tried only
where they are needed, one of them before both. More ranks share sequences only where nothing fits without
recomputation on fewer: with sequences of their own, ranks send less.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from moe_train.config.context import check_context
from moe_train.config.errors import UsageError
from moe_train.config.machine import Machine
from moe_train.config.parts import load_kinds
from moe_train.config.registry import load_part, part_names
from moe_train.config.root import Config
from moe_train.config.run import RecomputedPart
from moe_train.model.block import NO_RECOMPUTE, Recompute
from moe_train.model.moe.dispatch.base import DispatcherKind
from moe_train.plan.layout import Cluster, Layout, plan_layout
from moe_train.plan.loads import RowLoads, row_loads
from moe_train.plan.memory import Memory, plan_memory
from moe_train.plan.planner import Question
from moe_train.plan.rates import Rates
from moe_train.plan.shapes import ModelShape, model_shape
from moe_train.plan.step import Step, plan_step
from moe_train.train.engine.optimizers.base import OptimizerKind

_CHUNKS, _RECOMPUTE_EVERY = (1, 2, 4), (1, 2, 4)
_MOST = Recompute("block")  # that can be recomputed
_LARGEST_MICRO_BATCH, _MOST_MICRO_BATCHES = 64, 16  # bounds of the micro-batches that are tried


@dataclass(frozen=True)
class Candidate:
    """Layout with its memory and time.

    Attributes:
        layout: Sizes of the run.
        memory: Peak memory of the rank that needs most.
        step: Time of a step.
    """

    layout: Layout
    memory: Memory
    step: Step


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        best: Candidates that fit, the fastest first.
        tried: Number of layouts that were planned.
        smallest: Memory of the layout that needs least, whether or not it fits.
    """

    best: tuple[Candidate, ...]
    tried: int
    smallest: Memory


def search(config: Config, vocab_size: int, question: Question) -> Found:
    """Find the fastest layouts that fit.

    Args:
        config: Configuration as loaded.
        vocab_size: Rows of the embedding.
        question: Settings of the plan; its margin of memory stays free.

    Raises:
        UsageError: If the global batch cannot be divided among the ranks.
    """
    sizes = _context_sizes(config, question.cluster)
    resolved, base = plan_layout(_open(config, sizes[0]), question.cluster, vocab_size)
    shape = model_shape(resolved.model, resolved.model.vocab_size, base.sequence_length)
    machine, rates = question.cluster.machine, Rates(question.cluster.machine, base.precision)
    loads: dict[tuple[int, int, int, str], RowLoads] = {}
    found: list[Candidate] = []
    tried, smallest = 0, None

    def planned(layout: Layout) -> tuple[RowLoads, Memory]:
        key = (layout.context_size, layout.ep_size, layout.micro_batch, layout.dispatch)
        if key not in loads:
            loads[key] = row_loads(shape, layout, question.imbalance, question.seed, question.shares_LE)
        return loads[key], plan_memory(shape, layout, loads[key], machine.device, question.decoding)

    for spread in _spreads(shape, base, config, sizes, found):
        for savings in _savings(spread, shape, machine):
            before, hopeless = len(found), set[bool]()  # with and without offloading: all blocks again do not help
            for saving in savings:
                if saving.offloads in hopeless:
                    continue
                before_saving = len(found)
                for layout in _ways(saving, shape):
                    own_loads, memory = planned(layout)
                    tried += 1
                    if smallest is None or memory.total < smallest.total:
                        smallest = memory
                    if question.fits(memory):
                        step = plan_step(shape, layout, own_loads, memory.states, rates)
                        found.append(Candidate(layout, memory, step))
                if saving.recompute == _MOST and len(found) == before_saving:
                    hopeless.add(saving.offloads)
            if len(found) > before:
                break
    assert smallest is not None, "the configuration's own layout is a candidate"
    found.sort(key=lambda candidate: (candidate.step.seconds, candidate.memory.total))
    return Found(tuple(found), tried, smallest)


def _open(config: Config, context_size: int) -> Config:
    """Reset the fields that are searched, because their values in the configuration may not suit the cluster."""
    parallel = {
        "expert_parallel_size": 1,
        "offload_optimizer": "none",
        "dispatch": "flat",
        "ranks_per_node": "auto",
        "chunks": 1,
    }
    train = {} if config.train.global_batch_size is None else {"micro_batch_size": 1}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel | _sharing(config, context_size)),
            "train": config.train.model_copy(update=train),
        }
    )


def _sharing(config: Config, context_size: int) -> dict[str, object]:
    """Return the fields about ranks that share sequences; the exchange is as given, if there are such ranks."""
    exchange = config.parallel.context_exchange if context_size > 1 else "all_gather"
    return {"context_parallel_size": context_size, "context_exchange": exchange}


def _context_sizes(config: Config, cluster: Cluster) -> list[int]:
    """List the numbers of ranks of a node that can share sequences.

    It is the given number alone if no other can, or if the global batch follows from the ranks with own sequences.
    """
    world, node, batch = cluster.world_size, cluster.gpus_per_node, config.train.global_batch_size
    own = config.parallel.context_parallel_size
    found = []
    for size in sorted({own, *(size for size in range(1, node + 1) if node % size == 0)}):
        changed = config.model_copy(update={"parallel": config.parallel.model_copy(update=_sharing(config, size))})
        try:
            check_context(changed, world)
            load_kinds(changed).check(changed)
        except UsageError:
            continue
        if batch is None or batch % (world // size) == 0:
            found.append(size)
    return found if batch is not None and found else [own]


def apply_layout(config: Config, layout: Layout) -> Config:
    """Put the sizes of a layout into a configuration; the precision stays as given.

    Args:
        config: Configuration as loaded.
        layout: Layout of a candidate.
    """
    batch = layout.micro_batch * layout.accumulation * layout.world_size // layout.context_size
    parallel = {
        "expert_parallel_size": layout.ep_size,
        "zero_stage": layout.zero_stage,
        "offload_optimizer": "cpu" if layout.offloads else "none",
        "dispatch": layout.dispatch,
        "chunks": layout.chunks,
        "payload": layout.payload,
        "ranks_per_node": layout.ranks_per_node or "auto",
        **_sharing(config, layout.context_size),
    }
    train = {
        "micro_batch_size": layout.micro_batch,
        "global_batch_size": batch,
        "recompute": layout.recompute.part,
        "recompute_every": layout.recompute.every,
    }
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "train": config.train.model_copy(update=train),
        }
    )


def _spreads(
    shape: ModelShape, base: Layout, config: Config, sizes: list[int], found: list[Candidate]
) -> Iterator[Layout]:
    """Yield the layout with every context- and expert-parallel size, ZeRO stage and micro-batch to try.

    A larger context-parallel size comes only if nothing of what was `found` until then fits without recomputation.
    """
    experts, world = shape.config.moe.num_experts, base.world_size
    expert_sizes = [size for size in range(1, min(experts, world) + 1) if experts % size == 0 and world % size == 0]
    for context_size in sizes:
        # Sequences per rank and step, or per ranks that share them.
        share = base.micro_batch * base.accumulation * context_size // base.context_size
        divisors = [size for size in range(1, min(share, _LARGEST_MICRO_BATCH) + 1) if share % size == 0]
        micros = divisors[:_MOST_MICRO_BATCHES]
        if context_size == base.context_size and base.micro_batch not in micros:
            micros.append(base.micro_batch)
        sharing = replace(
            base,
            context_size=context_size,
            context_exchange=config.parallel.context_exchange if context_size > 1 else "all_gather",
        )
        for size in expert_sizes if shape.num_moe_layers else [1]:
            for stage in (1, 2) if config.train.compile else (1, 2, 3):
                for micro in micros:
                    accumulation = share // micro
                    yield replace(sharing, ep_size=size, zero_stage=stage, micro_batch=micro, accumulation=accumulation)
        if any(candidate.layout.recompute == NO_RECOMPUTE for candidate in found):
            return


def _savings(layout: Layout, shape: ModelShape, machine: Machine) -> tuple[list[Layout], ...]:
    """List the ways to save memory in a layout: each is tried if nothing before it fits."""
    again = [replace(layout, recompute=each) for each in _recomputations(shape)]
    optimizer: OptimizerKind = load_part("optimizers", layout.optimizer)
    # A CPU has one memory, and of other hosts nothing is known.
    if machine.host is None or not optimizer.works_on_host:
        return [layout], again
    return [layout], [*again, replace(layout, offloads=True)], [replace(each, offloads=True) for each in again]


def _recomputations(shape: ModelShape) -> list[Recompute]:
    """List the ways to recompute something, first the one that saves most."""
    parts = [part for part in get_args(RecomputedPart) if part != NO_RECOMPUTE.part]
    ways = [Recompute(part, every) for part in parts for every in _RECOMPUTE_EVERY if every <= len(shape.layers)]
    return [_MOST, *(way for way in ways if way != _MOST)]


def _ways(layout: Layout, shape: ModelShape) -> Iterator[Layout]:
    """Yield the layout with every dispatch and number of chunks to try."""
    if layout.ep_size == 1:
        yield replace(layout, dispatch="flat", chunks=1, payload="model", ranks_per_node=None)
        return
    node = layout.node_size
    for chunks in _CHUNKS:
        if chunks > layout.tokens:
            continue
        for name in part_names("dispatchers"):
            kind: DispatcherKind = load_part("dispatchers", name)
            if kind.merges_rows and shape.config.moe.top_k == 1:
                continue
            if not kind.leaves_nodes_once:
                yield replace(layout, dispatch=name, chunks=chunks, ranks_per_node=None)
            elif 1 < node < layout.ep_size and layout.ep_size % node == 0:
                yield replace(layout, dispatch=name, chunks=chunks, ranks_per_node=node)
