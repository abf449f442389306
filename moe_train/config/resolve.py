"""Resolution of a configuration: every size that is "auto" or None becomes a number, once for all users.

After it, training, evaluation, doctor, planner and parity read only numbers.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field, PositiveFloat, PositiveInt

from moe_train.config.context import check_context, sequence_readers
from moe_train.config.errors import UsageError
from moe_train.config.model import ModelConfig
from moe_train.config.parts import Kinds
from moe_train.config.root import Config
from moe_train.config.run import OptimConfig, ParallelConfig, TrainConfig

Precision = Literal["bf16", "fp16", "fp32"]

AFTER_WATCHDOG_SECONDS = 120  # for reports, before NCCL ends the process by SIGABRT
# parallel.chunks auto, by device type: of n chunks, 1/n of the traffic is not hidden. On a GPU each chunk adds the
# launches of its kernels, about 160 for a layer, which takes longer than a third chunk hides.
MOST_CHUNKS = {"cpu": 4, "cuda": 2}
# parallel.chunks auto: with fewer rows, of all experts or of one, a chunk's own work costs more than it hides.
ROWS_OF_A_CHUNK, ROWS_OF_AN_EXPERT = {"cpu": 16384, "cuda": 32768}, 256
# optim.router_lr_factor auto: how far one update may move a logit if the CV^2 terms lag by a step; measured by
# `python -m benchmarks.balance_scope`.
MOST_LOGIT_MOVE = 0.05
AUTO_MICRO_BATCH = 8  # most sequences of one rank in one pass, with train.micro_batch_size auto


class WorldSize(Protocol):
    """Numbers of ranks, of the run and of a node."""

    @property
    def world_size(self) -> int:
        """Number of ranks of the run."""

    @property
    def local_world_size(self) -> int:
        """Number of ranks of this node."""


@dataclass(frozen=True)
class Ranks:
    """Numbers of ranks that are not started (yet).

    Attributes:
        world_size: Number of ranks of the run.
        local_world_size: Number of ranks of a node.
    """

    world_size: int
    local_world_size: int


@dataclass(frozen=True)
class Device:
    """Properties of a rank's device that a configuration depends on.

    Attributes:
        type: Device type, cpu or cuda.
        has_bf16: Whether the device multiplies matrices in bf16.
    """

    type: str
    has_bf16: bool


class ResolvedModel(ModelConfig):
    """The model section with the size of its vocabulary."""

    vocab_size: PositiveInt
    """Rows of the embedding."""


class ResolvedParallel(ParallelConfig):
    """The parallel section with its sizes."""

    expert_parallel_size: PositiveInt
    """Ranks that share the experts of a layer."""
    chunks: PositiveInt
    """Parts of a micro-batch's tokens."""
    node_size: int | None = Field(exclude=True)
    """Ranks of a node, if rows go across nodes first; None: they do not."""


class ResolvedOptim(OptimConfig):
    """The optim section with its factor."""

    router_lr_factor: PositiveFloat
    """Factor of the learning rate of the routers' maps."""


class ResolvedTrain(TrainConfig):
    """The train section with its sizes."""

    micro_batch_size: PositiveInt
    """Sequences of one rank in one forward and backward pass."""
    global_batch_size: PositiveInt
    """Sequences of one optimizer step over all ranks."""
    precision: Precision
    """Arithmetic of the model."""


class ResolvedConfig(Config):
    """A configuration in which every size is a number."""

    model: ResolvedModel
    """The model."""
    parallel: ResolvedParallel
    """Layout of the model over ranks."""
    optim: ResolvedOptim
    """The optimizer and the schedule of its learning rate."""
    train: ResolvedTrain
    """The training loop."""
    world_size: int = Field(exclude=True)
    """Number of ranks of the run."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        num_readers = self.world_size // self.parallel.context_parallel_size
        return self.train.global_batch_size // (self.train.micro_batch_size * num_readers)

    def collective_seconds(self, device_type: str) -> int:
        """Return the time limit of a collective operation: on CUDA later than the watchdog's, which reports first.

        Args:
            device_type: cpu or cuda.
        """
        least = self.train.step_timeout_seconds + AFTER_WATCHDOG_SECONDS if device_type == "cuda" else 0
        return max(self.parallel.timeout_seconds, least)


@dataclass(frozen=True)
class Sizes:
    """Sizes that depend on the world and the device; see the fields of `ResolvedConfig`."""

    expert_parallel_size: int
    ranks_per_node: int | Literal["auto"]
    node_size: int | None
    chunks: int
    micro_batch_size: int
    global_batch_size: int
    precision: Precision

    def updates(self) -> dict[str, dict[str, Any]]:
        """Return the sizes by section, under their names in the configuration."""
        return {
            "parallel": {
                "expert_parallel_size": self.expert_parallel_size,
                "ranks_per_node": self.ranks_per_node,
                "chunks": self.chunks,
            },
            "train": {
                "micro_batch_size": self.micro_batch_size,
                "global_batch_size": self.global_batch_size,
                "precision": self.precision,
            },
        }


def resolve(config: Config, world: WorldSize, device: Device, vocab_size: int, kinds: Kinds) -> ResolvedConfig:
    """Resolve a configuration.

    Args:
        config: Configuration as loaded.
        world: Numbers of ranks.
        device: Properties of a rank's device; the devices of all ranks are alike.
        vocab_size: Number of tokens of the tokenizer.
        kinds: Kinds of the parts that the configuration names, from `load_kinds`.

    Raises:
        UsageError: If sizes do not divide each other, or a part refuses its settings.
    """
    sizes = resolve_sizes(config, world, device, kinds)
    given = config.model.vocab_size
    if given is not None and given < vocab_size:
        raise UsageError(f"model.vocab_size ({given}) is smaller than the tokenizer's vocabulary ({vocab_size})")
    values = config.model_dump()
    for section, fields in sizes.updates().items():
        values[section] |= fields
    values["parallel"]["node_size"] = sizes.node_size
    values["optim"]["router_lr_factor"] = router_lr_factor(config)
    values["model"]["vocab_size"] = given if given is not None else vocab_size
    return ResolvedConfig.model_validate(values | {"world_size": world.world_size})


def resolve_sizes(config: Config, world: WorldSize, device: Device, kinds: Kinds) -> Sizes:
    """Resolve the sizes that need no tokenizer, and check all that can be checked without it.

    Args:
        config: Configuration as loaded.
        world: Numbers of ranks.
        device: Properties of a rank's device.
        kinds: Kinds of the parts that the configuration names.

    Raises:
        UsageError: If sizes do not divide each other, or a part refuses its settings.
    """
    kinds.check(config)
    precision = choose_precision(config.train.precision, device)
    if config.parallel.payload == "bf16" and precision != "fp32":
        raise UsageError(
            f"parallel.payload (bf16) has no effect with train.precision ({precision}), whose rows have 16 bits too"
        )
    size = config.parallel.expert_parallel_size
    passes_nodes = kinds.dispatcher.leaves_nodes_once
    if size == "auto":
        size = _largest_expert_parallel_size(config, world, passes_nodes)
    if world.world_size % size:
        raise UsageError(
            f"world size ({world.world_size}) must be divisible by parallel.expert_parallel_size ({size}): start "
            f"{size} ranks or a multiple, or find another layout: moe-train plan --config FILE --search --device DEVICE"
        )
    check_context(config, world.world_size)
    micro, batch = _batch_sizes(config, world.world_size)
    per_node, node_size = config.parallel.ranks_per_node, None
    if passes_nodes:
        per_node = world.local_world_size if per_node == "auto" else per_node
        if size > per_node:
            node_size = per_node
            if size % per_node:
                raise UsageError(
                    f"parallel.expert_parallel_size ({size}) must be a multiple of parallel.ranks_per_node "
                    f"({per_node}) for parallel.dispatch {config.parallel.dispatch}"
                )
    elif per_node != "auto":
        raise UsageError(
            f"parallel: ranks_per_node ({per_node}) has no effect with dispatch {config.parallel.dispatch!r}: it is "
            "for two_level"
        )
    chunks = config.parallel.chunks
    if chunks == "auto":
        copies = config.model.hidden_copies.copies
        tokens = micro * config.train.sequence_length * copies // config.parallel.context_parallel_size
        chunks = _number_of_chunks(config, size, tokens, device.type)
    return Sizes(size, per_node, node_size, chunks, micro, batch, precision)


def choose_precision(setting: Precision | Literal["auto"], device: Device) -> Precision:
    """Choose the precision for a setting of train.precision; auto: bf16 if the device has it, else fp32.

    Raises:
        UsageError: If the device cannot train in this precision.
    """
    if setting == "fp16" and device.type == "cpu":
        raise UsageError("train.precision (fp16) needs parallel.device cuda: on a CPU it is bf16 or fp32")
    return setting if setting != "auto" else ("bf16" if device.has_bf16 else "fp32")


def router_lr_factor(config: Config) -> float:
    """Choose the factor of the routers' learning rate for optim.router_lr_factor.

    Raises:
        UsageError: If there is one and no router.
    """
    setting, moe = config.optim.router_lr_factor, config.model.moe
    has_routers = bool(config.model.moe_layer_indices)
    if setting == "auto":
        has_terms = has_routers and bool(moe.importance_cv2_coef or moe.load_cv2_coef)
        if not has_terms or moe.balance_scope != "step":
            return 1.0
        return min(1.0, MOST_LOGIT_MOVE / (config.optim.learning_rate * config.model.hidden_size))
    if setting != 1.0 and not has_routers:
        raise UsageError(f"optim.router_lr_factor ({setting}) has no effect: no layer of the model has a router")
    return setting


def _batch_sizes(config: Config, world_size: int) -> tuple[int, int]:
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    readers, note = sequence_readers(config, world_size)
    if batch is None:
        assert micro != "auto", "the train section needs global_batch_size with it"
        return micro, micro * readers
    if micro == "auto":
        if batch % readers:
            raise UsageError(f"train.global_batch_size ({batch}) must be divisible by the ranks ({readers}){note}")
        share = batch // readers
        return max(size for size in range(1, AUTO_MICRO_BATCH + 1) if share % size == 0), batch
    if batch % (micro * readers):
        raise UsageError(
            f"train.global_batch_size ({batch}) must be divisible by train.micro_batch_size x ranks "
            f"({micro} x {readers} = {micro * readers}){note}"
        )
    return micro, batch


def _number_of_chunks(config: Config, size: int, tokens: int, device_type: str) -> int:
    """Choose the number of chunks: each has enough rows, and no more chunks than hide most of the traffic.

    Args:
        config: Configuration as loaded.
        size: Number of ranks that share the experts.
        tokens: Number of tokens of a micro-batch, hidden copies included.
        device_type: cpu or cuda.
    """
    if size == 1:
        return 1
    rows = tokens * config.model.moe.top_k
    least = max(ROWS_OF_A_CHUNK[device_type], ROWS_OF_AN_EXPERT * config.model.moe.num_experts // size)
    return max(1, min(MOST_CHUNKS[device_type], rows // least))


def _largest_expert_parallel_size(config: Config, world: WorldSize, passes_nodes: bool) -> int:
    if not config.model.moe_layer_indices:
        return 1
    experts = config.model.moe.num_experts
    sizes = [size for size in range(1, world.world_size + 1) if experts % size == world.world_size % size == 0]
    if passes_nodes:  # its purpose is to leave the node
        per_node = config.parallel.ranks_per_node
        node = world.local_world_size if per_node == "auto" else per_node
        return max(size for size in sizes if size % node == 0 or node % size == 0)
    return max(size for size in sizes if world.local_world_size % size == 0)
