"""DeepSpeed's configuration, made from our fields and the raw additions of the deepspeed section."""

from typing import Any

from moe_train.config.base import merge
from moe_train.config.context import sequence_readers
from moe_train.config.errors import UsageError
from moe_train.config.resolve import Precision, ResolvedConfig, Sizes
from moe_train.config.root import Config

# DeepSpeed's keys that our fields decide; they must be set through these fields.
_FIELD_OF_KEY = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "zero_optimization.stage": "parallel.zero_stage",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
}
_REFUSED_SECTIONS = {
    "optimizer": "the optim section",
    "scheduler": "the optim section",
    "tensorboard": "the telemetry section",
    "activation_checkpointing": "train.recompute",
    "expert_parallel": "parallel.expert_parallel_size",
    "sequence_parallel_size": "parallel.context_parallel_size",
    "checkpoint": "the checkpoint section",
}


def deepspeed_settings(config: ResolvedConfig, device_type: str = "cpu", layer_numel: int = 0) -> dict[str, Any]:
    """Make DeepSpeed's configuration.

    Args:
        config: Resolved configuration.
        device_type: cpu or cuda.
        layer_numel: Parameters of the largest block on this rank, which ZeRO-3 fetches ahead on CUDA.

    Returns:
        DeepSpeed's configuration.

    Raises:
        UsageError: If an addition contradicts a field.
    """
    train = config.train
    batch, micro = train.global_batch_size, train.micro_batch_size
    ours = _from_fields(config, train.precision, batch, micro, config.accumulation)
    if config.parallel.zero_stage == 3 and device_type == "cuda":
        # The next block's weights arrive while this one computes. Stages 1 and 2 gain nothing: their buckets would be
        # reduced beside the all-to-alls of the backward pass, in the same links.
        ours["zero_optimization"] |= {"overlap_comm": True, "stage3_prefetch_bucket_size": layer_numel}
    check_additions(config, ours)
    return merge(ours, config.deepspeed)


def check_sizes(config: Config, sizes: Sizes, world_size: int) -> None:
    """Refuse raw additions that contradict a field, before the data is known.

    Args:
        config: Configuration.
        sizes: Sizes that the world gives.
        world_size: Number of ranks.

    Raises:
        UsageError: If an addition contradicts a field.
    """
    batch, micro = sizes.global_batch_size, sizes.micro_batch_size
    readers, _ = sequence_readers(config, world_size)
    check_additions(config, _from_fields(config, sizes.precision, batch, micro, batch // (micro * readers)))


def _from_fields(
    config: Config, precision: Precision, batch: int, micro_batch: int, accumulation: int
) -> dict[str, Any]:
    ours: dict[str, Any] = {
        # DeepSpeed (0.19.8) multiplies micro batch, accumulation and ranks: it counts a shared sequence once per rank.
        "train_batch_size": batch * config.parallel.context_parallel_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {"stage": config.parallel.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,  # what works is what an OptimizerKind promises
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice in each micro-batch
    }
    if config.parallel.offload_optimizer == "cpu":
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # Any torch optimizer updates tensors on the CPU. DeepSpeed's own (0.19.8) is a tenth faster than torch's fused
        # AdamW, but needs a compiler and a minute at the first start.
        ours["zero_force_ds_cpu_optimizer"] = False
    if precision != "fp32" and accumulation > 1:
        # Micro-batches are added up in fp32: bf16 has 8 bits, and the sum would lose the smaller gradients.
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    return ours


def check_additions(config: Config, ours: dict[str, Any] | None = None) -> None:
    """Refuse raw additions that contradict a field.

    Args:
        config: Configuration, as loaded or resolved.
        ours: DeepSpeed's configuration from the fields; None if the world is not known yet: then only the keys that do
            not depend on the world are compared.

    Raises:
        UsageError: If an addition contradicts a field; it names DeepSpeed's key, both values and the field to use.
    """
    for section, home in _REFUSED_SECTIONS.items():
        if section in config.deepspeed:
            raise UsageError(
                f"deepspeed.{section} ({config.deepspeed[section]!r}) has its home in {home}: set it there"
            )
    if _lookup(config.deepspeed, "zero_optimization.compute_grad_norm") is False:
        raise UsageError(
            "deepspeed.zero_optimization.compute_grad_norm (False): a step is judged by its gradient norm; leave it out"
        )
    offloaded = _lookup(config.deepspeed, "zero_optimization.offload_optimizer")
    if offloaded is not None:
        raise UsageError(
            f"deepspeed.zero_optimization.offload_optimizer ({offloaded!r}) has its home in "
            "parallel.offload_optimizer: set it there"
        )
    for key, value in config.deepspeed.items():
        if key in ("zero_optimization", "bf16", "fp16", "data_types") and not isinstance(value, dict):
            raise UsageError(f"deepspeed.{key} ({value!r}) must be a mapping: it is merged with what the fields give")
    known = ours if ours is not None else {"zero_optimization": {"stage": config.parallel.zero_stage}}
    for key, field in _FIELD_OF_KEY.items():
        added, decided = _lookup(config.deepspeed, key), _lookup(known, key)
        if added is not None and decided is not None and added != decided:
            raise UsageError(
                f"deepspeed.{key} ({added!r}) contradicts {field}, which makes it {decided!r}: set {field}"
            )


def _lookup(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return None
        values = values[part]
    return values
