"""The whole configuration, and the checks that need more than one section or the size of the world."""

from typing import Any, Self

from pydantic import Field, model_validator

from moe_train.config.base import Section
from moe_train.config.data import DataConfig
from moe_train.config.errors import UsageError
from moe_train.config.model import ModelConfig
from moe_train.config.run import (
    ALARM_FIELDS,
    CheckpointConfig,
    OptimConfig,
    ParallelConfig,
    TelemetryConfig,
    TrainConfig,
)

MOST_CHUNKS = 4  # parallel.chunks auto: of n chunks, 1/n of the traffic is not hidden
# parallel.chunks auto: with fewer rows, of all experts or of one, a chunk's own work costs more than it hides.
ROWS_OF_A_CHUNK, ROWS_OF_AN_EXPERT = 16384, 256
AUTO_MICRO_BATCH = 8  # sequences; most of what one rank takes at once under train.micro_batch_size auto


class Config(Section):
    """Everything a run is made of."""

    model: ModelConfig = ModelConfig()
    """The model."""
    data: DataConfig = DataConfig()
    """Documents, tokens and their order."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is spread over ranks."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    train: TrainConfig
    """The loop."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """What is written of a run."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw additions to DeepSpeed's configuration (as JSON on the command line), contradicting no field above."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("experts", *ALARM_FIELDS):
            if self.telemetry.differs(name) and not self.model.moe_layer_indices:
                raise ValueError(
                    f"telemetry.{name} ({getattr(self.telemetry, name)}) has no effect: the model has no MoE layer"
                )
        for name in ("dispatch", "payload", "chunks"):
            is_default = not self.parallel.differs(name) or (name, self.parallel.chunks) == ("chunks", 1)
            if not is_default and not self.model.moe_layer_indices:
                value = getattr(self.parallel, name)
                raise ValueError(f"parallel.{name} ({value}) has no effect: the model has no MoE layer")
        alarm, most = self.telemetry.max_violation_alarm, self.model.moe.num_experts / self.model.moe.top_k - 1
        if alarm is not None and alarm >= most:
            raise ValueError(
                f"telemetry.max_violation_alarm ({alarm}) has no effect: MaxVio is at most "
                f"num_experts / top_k - 1 ({most:g})"
            )
        size, experts = self.parallel.expert_parallel_size, self.model.moe.num_experts
        if isinstance(size, int):
            if size > 1 and not self.model.moe_layer_indices:
                raise ValueError(f"expert_parallel_size ({size}) has no effect: the model has no MoE layer")
            if experts % size:
                raise ValueError(f"num_experts ({experts}) must be divisible by expert_parallel_size ({size})")
        check_payload(self.parallel, self.train.precision)
        if self.train.compile and self.parallel.zero_stage == 3:
            raise ValueError(
                "train.compile (True) is not for parallel.zero_stage (3), which gathers weights within what would be "
                "compiled: take zero_stage 1 or 2"
            )
        return self


def check_payload(parallel: ParallelConfig, precision: str) -> None:
    """Refuse rows that would travel in no fewer bits than they have.

    Args:
        parallel: The section.
        precision: Of training.

    Raises:
        UsageError: If they would.
    """
    if parallel.payload == "bf16" and precision in ("bf16", "fp16"):
        raise UsageError(
            f"parallel.payload (bf16) has no effect with train.precision ({precision}), whose rows have 16 bits too"
        )


def check_world(config: Config, world_size: int, local_world_size: int) -> Config:
    """The configuration with every size that depends on the world filled in.

    Args:
        config: As loaded.
        world_size: Ranks of the run.
        local_world_size: Ranks of this node.

    Returns:
        A copy in which expert_parallel_size, chunks, micro_batch_size, global_batch_size and, for dispatch two_level,
        ranks_per_node are numbers.

    Raises:
        UsageError: If the sizes do not divide.
    """
    size = config.parallel.expert_parallel_size
    if size == "auto":
        size = _largest_expert_parallel_size(config, world_size, local_world_size)
    if world_size % size:
        raise UsageError(f"world size ({world_size}) must be divisible by parallel.expert_parallel_size ({size})")
    micro, batch = _batch_sizes(config, world_size)
    per_node = config.parallel.ranks_per_node
    if config.parallel.dispatch == "two_level":
        per_node = local_world_size if per_node == "auto" else per_node
        if size > per_node and size % per_node:
            raise UsageError(
                f"parallel.expert_parallel_size ({size}) must be a multiple of parallel.ranks_per_node ({per_node}) "
                "for parallel.dispatch two_level"
            )
    chunks = config.parallel.chunks
    if chunks == "auto":
        chunks = _number_of_chunks(config, size, micro * config.train.sequence_length)
    resolved = {"expert_parallel_size": size, "ranks_per_node": per_node, "chunks": chunks}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=resolved),
            "train": config.train.model_copy(update={"micro_batch_size": micro, "global_batch_size": batch}),
        }
    )


def _batch_sizes(config: Config, world_size: int) -> tuple[int, int]:
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    if micro == "auto":
        assert batch is not None, "auto is a part of global_batch_size"
        if batch % world_size:
            raise UsageError(f"train.global_batch_size ({batch}) must be divisible by the ranks ({world_size})")
        share = batch // world_size
        return max(size for size in range(1, AUTO_MICRO_BATCH + 1) if share % size == 0), batch
    if batch is None:
        return micro, micro * world_size
    if batch % (micro * world_size):
        raise UsageError(
            f"train.global_batch_size ({batch}) must be divisible by train.micro_batch_size x ranks "
            f"({micro} x {world_size} = {micro * world_size})"
        )
    return micro, batch


def _number_of_chunks(config: Config, size: int, tokens: int) -> int:
    """As many as leave each chunk enough to do, and no more than hide most of the traffic.

    Args:
        config: As loaded.
        size: Ranks that share the experts.
        tokens: Of a micro-batch.
    """
    if size == 1:
        return 1
    rows = tokens * config.model.moe.top_k
    least = max(ROWS_OF_A_CHUNK, ROWS_OF_AN_EXPERT * config.model.moe.num_experts // size)
    return max(1, min(MOST_CHUNKS, rows // least))


def _largest_expert_parallel_size(config: Config, world_size: int, local_world_size: int) -> int:
    if not config.model.moe_layer_indices:
        return 1
    experts = config.model.moe.num_experts
    sizes = [size for size in range(1, world_size + 1) if experts % size == 0 and world_size % size == 0]
    if config.parallel.dispatch == "two_level":  # its purpose is to leave the node
        per_node = config.parallel.ranks_per_node
        node = local_world_size if per_node == "auto" else per_node
        return max(size for size in sizes if size % node == 0 or node % size == 0)
    return max(size for size in sizes if local_world_size % size == 0)
