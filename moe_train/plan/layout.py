"""How a configuration is spread over the ranks of a cluster, in numbers."""

from dataclasses import dataclass
from typing import Any

from moe_train.config.errors import UsageError
from moe_train.config.machine import Arithmetic, Machine
from moe_train.config.root import Config, check_payload, check_world

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_BUCKET_ELEMENTS = 500_000_000  # zero_optimization.reduce_bucket_size of deepspeed 0.19.8
_PLANNED = ("stage", "reduce_bucket_size", "offload_optimizer", "offload_param")  # settings that a plan is told of


@dataclass(frozen=True)
class Cluster:
    """Where to run.

    Attributes:
        nodes: Of the cluster.
        gpus_per_node: Ranks of a node.
        machine: Its device.

    Raises:
        UsageError: If the machine tells nothing of links that the cluster needs, or its nodes have fewer devices.
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
        """What a plan for it cannot know."""
        measured = self.machine.ranks_per_node
        if self.gpus_per_node <= measured:
            return ()
        return (
            f"--gpus-per-node ({self.gpus_per_node}): links and rates of {self.machine.name} were measured with "
            f"{measured} a node; more of them may be slower",
        )

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Ranks:
    """A group of ranks, as one of them sees it.

    Attributes:
        size: Ranks of the group.
        on_node: Of those, on the same node, itself included; the mean over its ranks.
    """

    size: int
    on_node: float

    @property
    def across(self) -> float:
        """Ranks on other nodes."""
        return self.size - self.on_node


@dataclass(frozen=True)
class Layout:
    """Sizes of a run.

    Attributes:
        world_size: Ranks.
        node_size: Ranks of a node.
        ep_size: Ranks that share the experts of a layer.
        zero_stage: Of DeepSpeed ZeRO.
        micro_batch: Sequences of a rank in one pass.
        accumulation: Passes of a step.
        sequence_length: Tokens of a sequence.
        precision: bf16, fp16 or fp32.
        recomputes: Whether blocks are computed again in the backward pass.
        dispatch: Its name.
        chunks: In which tokens travel.
        payload: The form in which rows travel.
        ranks_per_node: Between which bytes are cheap, for dispatch two_level; None: it makes no difference.
        bucket_elements: Of ZeRO's gradient bucket.
    """

    world_size: int
    node_size: int
    ep_size: int
    zero_stage: int
    micro_batch: int
    accumulation: int
    sequence_length: int
    precision: Arithmetic
    recomputes: bool
    dispatch: str
    chunks: int
    payload: str
    ranks_per_node: int | None
    bucket_elements: int = _BUCKET_ELEMENTS

    @property
    def tokens(self) -> int:
        """Of a rank in one pass."""
        return self.micro_batch * self.sequence_length

    @property
    def dtype_bytes(self) -> int:
        """Of a weight or an activation."""
        return DTYPE_BYTES[self.precision]

    @property
    def gradient_bytes(self) -> int:
        """Of an element of the gradients that are kept: fp32 where passes are added up."""
        return 4 if self.accumulation > 1 else self.dtype_bytes

    @property
    def edp_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.ep_size

    @property
    def world(self) -> Ranks:
        """All ranks."""
        return Ranks(self.world_size, min(self.node_size, self.world_size))

    @property
    def expert_parallel(self) -> Ranks:
        """The ranks that share the experts: consecutive."""
        return Ranks(self.ep_size, _mean_on_node(self.ep_size, self.node_size, self.world_size))

    @property
    def expert_data_parallel(self) -> Ranks:
        """The ranks that hold the same experts: strided."""
        return Ranks(self.edp_size, max(1.0, min(self.node_size, self.world_size) / self.ep_size))


def _mean_on_node(size: int, node_size: int, world_size: int) -> float:
    """Of consecutive groups of ranks: how many of its group a rank has on its node, in the mean."""
    if size % node_size == 0 or node_size % size == 0:
        return min(size, node_size)
    total = 0
    for rank in range(world_size):
        node, group = rank // node_size * node_size, rank // size * size
        total += min(node + node_size, group + size) - max(node, group)
    return total / world_size


def resolve(config: Config, cluster: Cluster) -> tuple[Config, Layout]:
    """The configuration with every size a number, and the layout.

    Args:
        config: As loaded.
        cluster: Where to run; precision auto is bf16 where its device multiplies in it.

    Raises:
        UsageError: If sizes do not divide, or the device or a setting of DeepSpeed is another than is planned.
    """
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if "bf16" in cluster.machine.flops_per_second else "fp32"
    if precision not in cluster.machine.flops_per_second:
        known = ", ".join(cluster.machine.flops_per_second)
        raise UsageError(
            f"train.precision ({precision}): nothing is known of it for {cluster.machine.name}, only {known}"
        )
    if config.parallel.device not in ("auto", cluster.machine.device):
        raise UsageError(
            f"parallel.device ({config.parallel.device}) contradicts the machine that is planned for: "
            f"{cluster.machine.name} is {cluster.machine.device}"
        )
    check_payload(config.parallel, precision)
    config = check_world(config, cluster.world_size, cluster.gpus_per_node)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    parallel, train = config.parallel, config.train
    assert isinstance(parallel.expert_parallel_size, int) and isinstance(parallel.chunks, int)
    assert isinstance(train.micro_batch_size, int) and train.global_batch_size is not None
    layout = Layout(
        world_size=cluster.world_size,
        node_size=cluster.gpus_per_node,
        ep_size=parallel.expert_parallel_size,
        zero_stage=parallel.zero_stage,
        micro_batch=train.micro_batch_size,
        accumulation=train.global_batch_size // (train.micro_batch_size * cluster.world_size),
        sequence_length=train.sequence_length,
        precision=precision,
        recomputes=train.recompute_activations,
        dispatch=parallel.dispatch,
        chunks=parallel.chunks if parallel.expert_parallel_size > 1 else 1,
        payload=parallel.payload,
        ranks_per_node=parallel.node_size,
        bucket_elements=_bucket_elements(config),
    )
    return config, layout


def _bucket_elements(config: Config) -> int:
    zero = _zero_settings(config)
    for name in ("offload_optimizer", "offload_param"):
        kept = zero.get(name)
        if kept is not None and not (isinstance(kept, dict) and kept.get("device", "none") == "none"):
            raise UsageError(f"deepspeed.zero_optimization.{name} ({kept!r}) is not planned: leave it out")
    size = zero.get("reduce_bucket_size", _BUCKET_ELEMENTS)
    is_number = isinstance(size, int | float) and not isinstance(size, bool)
    if not is_number or not 1 <= size < float("inf") or size != int(size):
        raise UsageError(
            f"deepspeed.zero_optimization.reduce_bucket_size ({size!r}) must be a whole number of elements, 1 or more"
        )
    return int(size)


def settings_not_planned(config: Config) -> tuple[str, ...]:
    """Settings of DeepSpeed's ZeRO that are given, and make no difference to the plan.

    Args:
        config: As loaded.
    """
    ignored = [
        name
        for name, value in _zero_settings(config).items()
        if name not in _PLANNED and (name, value) != ("overlap_comm", False)  # as the trainer has it
    ]
    return tuple(f"deepspeed.zero_optimization.{name}" for name in ignored)


def _zero_settings(config: Config) -> dict[str, Any]:
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UsageError(f"deepspeed.zero_optimization ({zero!r}) must be a mapping")
    return zero
