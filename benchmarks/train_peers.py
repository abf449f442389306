"""A rank of the systems that benchmarks/train.py holds moe_train against: Hugging Face's Mixtral under DeepSpeed.

The loop is the least that trains: all batches are made before, nothing is recorded, shown or watched. Sizes, data and
optimizer come from options of the trainer, so that both read the same ones.
Legend: B batch, S sequence.
"""

import contextlib
import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.train_rows import AUTOEP, Outcome  # noqa: E402
from moe_train.config.load import load_config  # noqa: E402
from moe_train.config.model import ModelConfig  # noqa: E402
from moe_train.config.root import Config, check_world  # noqa: E402
from moe_train.data import prepare_data  # noqa: E402
from moe_train.distributed.bootstrap import (  # noqa: E402
    discover_world,
    init_process_group,
    leave_process_group,
    set_threads,
)
from moe_train.distributed.world import World  # noqa: E402
from moe_train.host.memory import keep_freed_memory  # noqa: E402
from moe_train.train.batches import BatchPlan, micro_batches  # noqa: E402
from moe_train.train.progress import Progress  # noqa: E402

with contextlib.redirect_stdout(sys.stderr):  # it binds the stream of its messages when it is imported
    import deepspeed
    import deepspeed.ops

_DEVICE = torch.device("cpu")


def main(arguments: list[str]) -> int:
    """Train; rank 0 writes the outcome. Collective: all ranks.

    Args:
        arguments: File to write, name of the system, the form of its experts, whether to keep freed memory (1 or
            0), steps that are not timed; then options of the trainer.
    """
    result, system, form, keeps_memory, warm_up = arguments[:5]
    world = discover_world()
    config = check_world(load_config(arguments[5:], program="train_peers.py"), world.world_size, world.world_size)
    set_threads(config.parallel.threads_per_rank, world)
    if keeps_memory == "1":
        keep_freed_memory()
    init_process_group(world, _DEVICE, config.parallel.timeout_seconds)
    batches = load_batches(config, world)
    # AutoEP puts experts of its own in place of those of transformers.
    model = build_mixtral(config.model, config.train.sequence_length, "eager" if system == AUTOEP else form)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds, cross_entropy = train(start_engine(model, system, form, config, world), batches, int(warm_up))
    dist.all_reduce(cross_entropy)
    if world.rank == 0:
        outcome = Outcome(seconds, num_parameters, cross_entropy.item() / world.world_size)
        Path(result).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    dist.barrier()
    leave_process_group(0)
    return 0


def load_batches(config: Config, world: World) -> list[tuple[Tensor, Tensor]]:
    """Token ids and next tokens of every step: those that the trainer gives this rank. int64 [B, S] each."""
    train = config.train
    assert train.micro_batch_size != "auto" and train.global_batch_size is not None
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
    """The model, the same on all ranks.

    Args:
        model: Its sizes.
        sequence_length: Most positions.
        experts: transformers' experts_implementation.
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


def start_engine(model: nn.Module, system: str, form: str, config: Config, world: World) -> Any:
    """The model under ZeRO-1.

    Args:
        model: On every rank with all experts.
        system: AutoEP takes the experts and spreads them over all ranks.
        form: Whether AutoEP's products with w_gate and w_up are one (fused) or two (separate).
        config: Of the trainer.
        world: Of this rank.

    Collective: All ranks.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It serves inference alone, and would take a minute to build (deepspeed 0.19.8).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    optim = config.optim
    adamw = {
        "lr": optim.learning_rate,
        "betas": [optim.beta1, optim.beta2],
        "eps": optim.epsilon,
        "weight_decay": optim.weight_decay,
        "torch_adam": True,  # DeepSpeed's own for the CPU would have to be built first
        "fused": True,
    }
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "optimizer": {"type": "AdamW", "params": adamw},
        "steps_per_print": 2**31,
    }
    if system == AUTOEP:
        settings["expert_parallel"] = {
            "enabled": True,
            "autoep_size": world.world_size,
            "preset_model": "mixtral",
            "gate_up_impl": form,
        }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


def train(engine: Any, batches: list[tuple[Tensor, Tensor]], warm_up: int) -> tuple[float, Tensor]:
    """Wall seconds of all steps but the first ones, and this rank's cross-entropy of the last. Collective: all ranks.

    Args:
        engine: The model under DeepSpeed.
        batches: Of every step.
        warm_up: Steps that are not timed.
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
