"""Layout of a run: all sizes of a configuration on the ranks of a cluster, as numbers."""

from dataclasses import dataclass
from typing import Any

from moe_train.config.errors import UsageError
from moe_train.config.machine import Arithmetic, Machine
from moe_train.config.moe import MoEConfig
from moe_train.config.parts import load_kinds
from moe_train.config.registry import load_part
from moe_train.config.resolve import Device, Ranks, ResolvedConfig, resolve
from moe_train.config.root import Config
from moe_train.model.block import Recompute
from moe_train.model.cost import DispatchSizes, Hop
from moe_train.model.moe.dispatch.base import DispatcherKind
from moe_train.train.engine.optimizers.base import OptimizerKind

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_BUCKET_ELEMENTS = 500_000_000  # zero_optimization.reduce_bucket_size of deepspeed 0.19.8
_PLANNED = ("stage", "reduce_bucket_size", "offload_param")  # settings that a plan considers


@dataclass(frozen=True)
class Cluster:
    """Cluster to plan for.

    Attributes:
        nodes: Number of nodes.
        gpus_per_node: Ranks per node.
        machine: Speed, memory and links of its devices.

    Raises:
        UsageError: If the machine has no rates for links that the cluster needs, or its nodes have fewer devices.
    """

    nodes: int
    gpus_per_node: int
    machine: Machine

    def __post_init__(self) -> None:
        name = self.machine.name
        if self.nodes > 1 and self.machine.inter_node is None:
            raise UsageError(
                f"--nodes ({self.nodes}): nothing is known of links between nodes of {name}: run moe-train doctor on "
                "two of them, or give --inter-node-gbps"
            )
        if self.gpus_per_node > 1 and self.machine.intra_node is None:
            raise UsageError(
                f"--gpus-per-node ({self.gpus_per_node}): nothing is known of links inside of a node of {name}: run "
                "moe-train doctor with two ranks on a node"
            )
        if self.gpus_per_node > self.machine.ranks_per_node and not self.machine.products:
            raise UsageError(
                f"--gpus-per-node ({self.gpus_per_node}): a node of {name} has {self.machine.ranks_per_node} devices"
            )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about what a plan for this cluster cannot know."""
        measured = self.machine.ranks_per_node
        if self.gpus_per_node <= measured:
            return ()
        return (
            f"--gpus-per-node ({self.gpus_per_node}): links and rates of {self.machine.name} were measured with "
            f"{measured} a node; more of them may be slower",
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class RankGroup:
    """Group of ranks, as one of its ranks sees it.

    Attributes:
        size: Number of ranks in the group.
        on_node: Number of its ranks on the node of this rank, itself included; the mean over ranks.
    """

    size: int
    on_node: float

    @property
    def across(self) -> float:
        """Number of its ranks on other nodes."""
        return self.size - self.on_node


@dataclass(frozen=True)
class Layout:
    """Sizes of a run on a cluster.

    Attributes:
        world_size: Number of ranks.
        node_size: Ranks per node.
        ep_size: Ranks that share the experts of a layer.
        zero_stage: Stage of DeepSpeed ZeRO.
        micro_batch: Sequences per rank, or per ranks that share sequences, and pass.
        accumulation: Passes per step.
        sequence_length: Tokens per sequence.
        precision: Precision of the model, bf16, fp16 or fp32.
        recompute: What the backward pass computes again.
        dispatch: Name of the dispatcher.
        chunks: Number of chunks in which tokens travel.
        payload: Number format in which rows travel.
        optimizer: Name of the optimizer.
        ranks_per_node: Ranks of a node, where rows pass nodes first; None: they don't.
        copies: Copies of every token that pass the blocks, the original included.
        bucket_elements: Elements of ZeRO's gradient bucket.
        loss_chunk_tokens: Tokens whose logits exist at a time, as given; None: by their size.
        context_size: Ranks that share sequences.
        context_exchange: How their keys and values meet.
        offloads: Whether master weights and optimizer states are in the host's memory.
    """

    world_size: int
    node_size: int
    ep_size: int
    zero_stage: int
    micro_batch: int
    accumulation: int
    sequence_length: int
    precision: Arithmetic
    recompute: Recompute
    dispatch: str
    chunks: int
    payload: str
    optimizer: str
    ranks_per_node: int | None
    copies: int = 1
    bucket_elements: int = _BUCKET_ELEMENTS
    loss_chunk_tokens: int | None = None
    context_size: int = 1
    context_exchange: str = "all_gather"
    offloads: bool = False

    @property
    def tokens(self) -> int:
        """Tokens per rank and pass that the blocks compute, hidden copies included."""
        return self.micro_batch * self.sequence_length * self.copies // self.context_size

    @property
    def predictions(self) -> int:
        """Tokens per rank and pass that head and loss compute: one copy of each."""
        return self.micro_batch * self.sequence_length // self.context_size

    @property
    def dtype_bytes(self) -> int:
        """Bytes per element of weights and activations."""
        return DTYPE_BYTES[self.precision]

    @property
    def gradient_bytes(self) -> int:
        """Bytes per element of the gradients that are kept: fp32 where several passes are accumulated."""
        return 4 if self.accumulation > 1 else self.dtype_bytes

    @property
    def optimizer_kind(self) -> OptimizerKind:
        """Description of the optimizer."""
        return load_part("optimizers", self.optimizer)

    @property
    def edp_size(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.world_size // self.ep_size

    @property
    def world(self) -> RankGroup:
        """Group of all ranks."""
        return RankGroup(self.world_size, min(self.node_size, self.world_size))

    @property
    def expert_parallel(self) -> RankGroup:
        """Group of the ranks that share the experts; they are consecutive."""
        return RankGroup(self.ep_size, _mean_on_node(self.ep_size, self.node_size, self.world_size))

    @property
    def context(self) -> RankGroup:
        """Group of the ranks that share sequences; they are consecutive."""
        return RankGroup(self.context_size, _mean_on_node(self.context_size, self.node_size, self.world_size))

    @property
    def expert_data_parallel(self) -> RankGroup:
        """Group of the ranks that hold the same experts; they are strided."""
        return RankGroup(self.edp_size, max(1.0, min(self.node_size, self.world_size) / self.ep_size))


def _mean_on_node(size: int, node_size: int, world_size: int) -> float:
    """Compute how many ranks of its group a rank has on its node, in the mean, for groups of consecutive ranks."""
    if size % node_size == 0 or node_size % size == 0:
        return min(size, node_size)
    total = 0
    for rank in range(world_size):
        node, group = rank // node_size * node_size, rank // size * size
        total += min(node + node_size, group + size) - max(node, group)
    return total / world_size


def plan_layout(config: Config, cluster: Cluster, vocab_size: int) -> tuple[ResolvedConfig, Layout]:
    """Resolve a configuration for a cluster, and compute the layout.

    Args:
        config: Configuration as loaded.
        cluster: Cluster to plan for. Precision auto becomes bf16 where its device has a rate for bf16, else fp32.
        vocab_size: Rows of the embedding.

    Returns:
        The resolved configuration, and the layout.

    Raises:
        UsageError: If sizes do not divide, the configuration names another device, or the plan does not support a
            setting of DeepSpeed.
    """
    machine = cluster.machine
    if config.parallel.device not in ("auto", machine.device):
        raise UsageError(
            f"parallel.device ({config.parallel.device}) contradicts the machine that is planned for: "
            f"{machine.name} is {machine.device}"
        )
    ranks = Ranks(cluster.world_size, cluster.gpus_per_node)
    device = Device(machine.device, has_bf16="bf16" in machine.flops_per_second)
    resolved = resolve(config, ranks, device, vocab_size, load_kinds(config))
    train = resolved.train
    if train.precision not in machine.flops_per_second:
        known = ", ".join(machine.flops_per_second)
        raise UsageError(
            f"train.precision ({train.precision}): nothing is known of it for {machine.name}, only {known}"
        )
    if resolved.parallel.offload_optimizer == "cpu" and machine.device == "cuda" and machine.host is None:
        raise UsageError(
            f"parallel.offload_optimizer (cpu): nothing is known of the host of {machine.name}: run moe-train doctor "
            "of this version on it, or plan for a device by its name"
        )
    return resolved, layout_of(resolved, cluster.gpus_per_node)


def layout_of(resolved: ResolvedConfig, node_size: int) -> Layout:
    """Compute the layout of a resolved configuration.

    Args:
        resolved: Resolved configuration.
        node_size: Ranks per node.

    Raises:
        UsageError: If the plan does not support a setting of DeepSpeed.
    """
    parallel, train = resolved.parallel, resolved.train
    return Layout(
        world_size=resolved.world_size,
        node_size=node_size,
        ep_size=parallel.expert_parallel_size,
        zero_stage=parallel.zero_stage,
        micro_batch=train.micro_batch_size,
        accumulation=resolved.accumulation,
        sequence_length=train.sequence_length,
        precision=train.precision,
        recompute=Recompute(train.recompute, train.recompute_every),
        dispatch=parallel.dispatch,
        chunks=parallel.chunks if parallel.expert_parallel_size > 1 else 1,
        payload=parallel.payload,
        optimizer=resolved.optim.name,
        ranks_per_node=parallel.node_size,
        copies=resolved.model.hidden_copies.copies,
        bucket_elements=_bucket_elements(resolved),
        loss_chunk_tokens=train.loss_chunk_tokens,
        context_size=parallel.context_parallel_size,
        context_exchange=parallel.context_exchange,
        offloads=parallel.offload_optimizer == "cpu",
    )


def dispatch_hops(moe: MoEConfig, layout: Layout, assignments: float) -> tuple[Hop, ...]:
    """What the dispatch of a layout sends in one MoE layer and micro-batch.

    Args:
        moe: MoE section of the configuration.
        layout: Layout of the run, in which several ranks share the experts.
        assignments: Executed assignments per rank.
    """
    sizes = DispatchSizes(layout.tokens, assignments, moe.top_k, moe.num_experts, layout.ep_size, layout.ranks_per_node)
    kind: DispatcherKind = load_part("dispatchers", layout.dispatch)
    return kind.hops(sizes)


def _bucket_elements(config: Config) -> int:
    zero = _zero_settings(config)
    kept = zero.get("offload_param")
    if kept is not None and not (isinstance(kept, dict) and kept.get("device", "none") == "none"):
        raise UsageError(f"deepspeed.zero_optimization.offload_param ({kept!r}) is not planned: leave it out")
    size = zero.get("reduce_bucket_size", _BUCKET_ELEMENTS)
    is_number = isinstance(size, int | float) and not isinstance(size, bool)
    if not is_number or not 1 <= size < float("inf") or size != int(size):
        raise UsageError(
            f"deepspeed.zero_optimization.reduce_bucket_size ({size!r}) must be a whole number of elements, 1 or more"
        )
    return int(size)


def settings_not_planned(config: Config) -> tuple[str, ...]:
    """List the settings of DeepSpeed's ZeRO that are given but do not change the plan.

    Args:
        config: Configuration as loaded.

    Returns:
        Their names, with all sections.
    """
    ignored = [
        name
        for name, value in _zero_settings(config).items()
        if name not in _PLANNED and (name, value) != ("overlap_comm", False)  # the value that the trainer sets
    ]
    return tuple(f"deepspeed.zero_optimization.{name}" for name in ignored)


def _zero_settings(config: Config) -> dict[str, Any]:
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UsageError(f"deepspeed.zero_optimization ({zero!r}) must be a mapping")
    return zero
