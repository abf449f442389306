"""A rank of the peers of the train benchmark: Hugging Face's Mixtral under DeepSpeed.

    python -m benchmarks.train.peers FILE SYSTEM FORM KEEPS_MEMORY WARM_UP [options of moe-train train]

The loop is the least that trains: all batches are made before, nothing is recorded, shown or watched. Sizes, data and
optimizer come from options of the trainer, so that both read the same ones.
Legend: B batch, S sequence.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.runner.resolved import resolve_for
from benchmarks.train.rows import AUTOEP, Outcome
from moe_train.config.load import load_config
from moe_train.config.model import ModelConfig
from moe_train.config.resolve import ResolvedConfig
from moe_train.data import prepare_data
from moe_train.distributed.bootstrap import (
    discover_world,
    init_process_group,
    leave_process_group,
    set_threads,
)
from moe_train.distributed.world import World
from moe_train.host.memory import keep_freed_memory
from moe_train.train.batches import BatchPlan, micro_batches
from moe_train.train.progress import Progress

with contextlib.redirect_stdout(sys.stderr):  # it binds the stream of its messages when it is imported
    import deepspeed
    import deepspeed.ops

_DEVICE = torch.device("cpu")


def main(arguments: Sequence[str]) -> int:
    """Train; rank 0 writes the outcome. Collective: all ranks.

    Args:
        arguments: File to write, name of the system, form of its experts, whether to keep freed memory (1 or 0), steps
            that are not timed; then options of the trainer.
    """
    result, system, form, keeps_memory, warm_up = arguments[:5]
    world = discover_world()
    config = resolve_for(load_config(arguments[5:], program="benchmarks.train"), world)
    set_threads(config.parallel.threads_per_rank, world)
    if keeps_memory == "1":
        keep_freed_memory()
    init_process_group(world, _DEVICE, config.parallel.timeout_seconds)
    batches = load_batches(config, world)
    # AutoEP puts experts of its own in place of those of transformers.
    model = build_mixtral(config.model, config.train.sequence_length, "eager" if system == AUTOEP else form)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    # gate_up_impl: whether the products with w_gate and w_up are one (fused) or two (separate).
    autoep = {"autoep_size": world.world_size, "gate_up_impl": form} if system == AUTOEP else None
    settings = engine_settings(config, world, zero_stage=config.parallel.zero_stage, autoep=autoep)
    seconds, cross_entropy = train(start_engine(model, settings), batches, int(warm_up))
    dist.all_reduce(cross_entropy)
    if world.rank == 0:
        outcome = Outcome(seconds, num_parameters, cross_entropy.item() / world.world_size)
        Path(result).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    dist.barrier()
    leave_process_group(0)
    return 0


def load_batches(config: ResolvedConfig, world: World) -> list[tuple[Tensor, Tensor]]:
    """Load token ids and next tokens of every step, as the trainer gives them to this rank. int64 [B, S] each."""
    train = config.train
    data = prepare_data(
        config.data,
        sequence_length=train.sequence_length,
        seed=train.seed,
        min_sequences=train.global_batch_size,
        local_rank=world.local_rank,
    )
    plan = BatchPlan(train.micro_batch_size, train.global_batch_size, world.rank, world.world_size)
    batches = []
    for step in range(train.steps):
        progress = Progress(step, step * train.global_batch_size)
        for tokens, targets_BS in micro_batches(data.train, plan, progress, None, _DEVICE):
            batches.append((tokens.ids_BS, targets_BS))
    return batches


def build_mixtral(model: ModelConfig, sequence_length: int, experts: str) -> nn.Module:
    """Build the model, the same on all ranks.

    Args:
        model: Sizes of the model.
        sequence_length: Most positions.
        experts: experts_implementation of transformers.
    """
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.expert_intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.attention_kv_heads,
        num_local_experts=model.moe.num_experts,
        num_experts_per_tok=model.moe.top_k,
        max_position_embeddings=sequence_length,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        initializer_range=model.init_std,
        tie_word_embeddings=model.tie_embeddings,
        output_router_logits=True,  # without them there is no loss for the router
        router_aux_loss_coef=model.moe.switch_aux_coef,
        use_cache=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", experts_implementation=experts).train()


def start_engine(model: nn.Module, settings: dict[str, Any], parameters: Any = None) -> Any:
    """Put the model under DeepSpeed.

    Args:
        model: Model with all experts, on every rank.
        settings: Configuration of DeepSpeed, as from `engine_settings`.
        parameters: Parameters or groups of them for the optimizer; None: those of the model.

    Collective: All ranks.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It serves inference alone, and would take a minute to build (deepspeed 0.19.8).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    given = model.parameters() if parameters is None else parameters
    return deepspeed.initialize(model=model, model_parameters=given, config=settings)[0]


def engine_settings(
    config: ResolvedConfig, world: World, *, zero_stage: int, autoep: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Make the configuration of DeepSpeed that trains as a configuration of the trainer says.

    Args:
        config: Configuration of the trainer.
        world: Place of this rank.
        zero_stage: Stage of ZeRO, 0 to 3.
        autoep: Options of AutoEP beside its preset for Mixtral; None: without it.
    """
    optim, train = config.optim, config.train
    adamw = {
        "lr": optim.learning_rate,
        "betas": [optim.beta1, optim.beta2],
        "eps": optim.epsilon,
        "weight_decay": optim.weight_decay,
        "torch_adam": True,  # DeepSpeed's own for the CPU would have to be built first
        "fused": True,
    }
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * world.world_size),
        "gradient_clipping": optim.max_grad_norm,
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_optimization": {"stage": zero_stage},
        "optimizer": {"type": "AdamW", "params": adamw},
        "steps_per_print": 2**31,
    }
    if autoep is not None:
        settings["expert_parallel"] = {"enabled": True, "preset_model": "mixtral", **autoep}
    return settings


def train(engine: Any, batches: list[tuple[Tensor, Tensor]], warm_up: int) -> tuple[float, Tensor]:
    """Train; wall seconds of the timed steps, and this rank's cross-entropy of the last. Collective: all ranks.

    Args:
        engine: The model under DeepSpeed.
        batches: Batch of every step.
        warm_up: First steps, which are not timed.
    """
    began = 0.0
    for step, (ids_BS, targets_BS) in enumerate(batches):
        if step == warm_up:
            dist.barrier()
            began = time.perf_counter()
        # The targets are the next tokens already: nothing is to be shifted.
        output = engine(input_ids=ids_BS, labels=targets_BS, shift_labels=targets_BS)
        engine.backward(output.loss)
        engine.step()
    dist.barrier()
    seconds = time.perf_counter() - began
    coefficient = engine.module.config.router_aux_loss_coef
    return seconds, (output.loss - coefficient * output.aux_loss).detach().float()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
