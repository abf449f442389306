"""A rank of the peers of the truth benchmark: it trains some steps of the shared model, and says what came of them.

    python -m benchmarks.truth.peers TASK [options of moe-train train]

The model is Hugging Face's Mixtral with the start weights of this project's model. `deepspeed_moe` has DeepSpeed's MoE
layer in place of each Mixtral block, `hf_autoep` is what AutoEP makes of the blocks.
Legend: B batch, S sequence, D hidden_size, F intermediate_size, E experts, e experts of this rank.
"""

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.runner.resolved import resolve_for
from benchmarks.train.peers import build_mixtral, engine_settings, load_batches, start_engine
from benchmarks.truth.cases import AUTOEP, DEEPSPEED_MOE, Task
from moe_train.config.load import load_config
from moe_train.config.resolve import ResolvedConfig
from moe_train.distributed.bootstrap import discover_world, init_process_group, leave_process_group, set_threads
from moe_train.model.build import build_model
from moe_train.model.parameters import materialize
from moe_train.train.telemetry.records import Record

with contextlib.redirect_stdout(sys.stderr):  # it binds the stream of its messages when it is imported
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
    from deepspeed.runtime.utils import clip_grad_norm_
    from deepspeed.utils import groups

_DEVICE = torch.device("cpu")
UNIVERSAL = "universal"  # tag of a checkpoint in DeepSpeed's universal form


def main(arguments: Sequence[str]) -> int:
    """Train as a task says; rank 0 writes records and weights. Collective: all ranks.

    Args:
        arguments: The task as JSON; then options of the trainer.
    """
    task = Task.from_json(arguments[0])
    world = discover_world()
    config = resolve_for(load_config(arguments[1:], program="benchmarks.truth"), world)
    set_threads(config.parallel.threads_per_rank, world)
    init_process_group(world, _DEVICE, config.parallel.timeout_seconds)
    batches = load_batches(config, world)
    model, parameters = build_peer(task, config)
    autoep = {"autoep_size": task.layout.expert_parallel_size} if task.system == AUTOEP else None
    settings = engine_settings(config, world, zero_stage=task.layout.zero_stage, autoep=autoep)
    if task.is_universal:
        settings["checkpoint"] = {"load_universal": True}
    engine = start_engine(model, settings, parameters)
    if task.load:
        loaded, _ = engine.load_checkpoint(task.load, tag=UNIVERSAL if task.is_universal else None)
        if loaded is None:
            raise RuntimeError(f"load_checkpoint found nothing in {task.load}")
    records = train(engine, batches, task, config.model.moe.switch_aux_coef)
    if task.save:
        engine.save_checkpoint(task.save)
    weights = whole_weights(engine)
    if world.rank == 0:
        save_file(weights, task.weights)
        Path(task.records).write_text(json.dumps(records), encoding="utf-8")
    dist.barrier()
    leave_process_group(0)
    return 0


def build_peer(task: Task, config: ResolvedConfig) -> tuple[nn.Module, Any]:
    """Build the model of a peer with this project's start weights; with groups of parameters, or None, for DeepSpeed.

    Args:
        task: System and layout.
        config: Configuration of the trainer.
    """
    # AutoEP puts experts of its own in place of those of transformers.
    form = "eager" if task.system == AUTOEP else "grouped_mm"
    model = build_mixtral(config.model, config.train.sequence_length, form)
    model.load_state_dict(start_weights(config))
    if task.system != DEEPSPEED_MOE:
        return model, None
    model.config.output_router_logits = False  # the layers have a loss of their own
    for layer in model.model.layers:
        layer.mlp = DeepSpeedBlock(layer.mlp, task.layout.expert_parallel_size)
    everything = {"params": list(model.parameters()), "name": "parameters"}
    split = split_params_into_different_moe_groups_for_optimizer(everything)
    return model, [group for group in split if group["params"]]


def start_weights(config: ResolvedConfig) -> dict[str, Tensor]:
    """Compute the start weights of this project's model, under the names of transformers' Mixtral.

    Args:
        config: Configuration of the trainer.
    """
    ours = build_model(config.model, config.model.vocab_size)
    materialize(ours, seed=config.train.seed, dtype=torch.float32, device=_DEVICE)
    values = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    parts = {
        "mixer_norm.weight": "input_layernorm.weight",
        "mixer.query.weight": "self_attn.q_proj.weight",
        "mixer.key.weight": "self_attn.k_proj.weight",
        "mixer.value.weight": "self_attn.v_proj.weight",
        "mixer.output.weight": "self_attn.o_proj.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
        "feed_forward.router.gate.weight": "mlp.gate.weight",
        "feed_forward.experts.gate_up": "mlp.experts.gate_up_proj",
        "feed_forward.experts.down": "mlp.experts.down_proj",
    }
    for layer in range(config.model.num_layers):
        names |= {f"blocks.{layer}.{own}": f"model.layers.{layer}.{theirs}" for own, theirs in parts.items()}
    # [E, D, 2F] -> [E, 2F, D] and [E, F, D] -> [E, D, F]: the experts', the only ones with three dimensions
    return {names[name]: value.transpose(1, 2) if value.ndim == 3 else value for name, value in values.items()}


class Expert(nn.Module):
    """One SwiGLU expert, as DeepSpeed's MoE layer takes it."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DeepSpeedBlock(nn.Module):
    """DeepSpeed's MoE layer in place of a Mixtral block, with its weights.

    Nothing in it is random, and no token is dropped: as in the other systems, the same tokens give the same output.
    """

    def __init__(self, block: nn.Module, ep_size: int) -> None:
        """Take the weights of a block: of all experts, those that this rank has.

        Args:
            block: MixtralSparseMoeBlock.
            ep_size: Ranks that share the experts.
        """
        super().__init__()
        gate_up_EGD, down_EDF = block.experts.gate_up_proj, block.experts.down_proj
        num_experts, hidden_size, intermediate_size = down_EDF.shape
        self.moe = MoE(
            hidden_size,
            Expert(hidden_size, intermediate_size),
            num_experts=num_experts,
            ep_size=ep_size,
            k=block.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        experts = self.moe.deepspeed_moe.experts.deepspeed_experts
        first = dist.get_rank() % ep_size * len(experts)  # groups of consecutive ranks
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(block.gate.weight)
            for number, expert in enumerate(experts, start=first):
                expert.gate_up.weight.copy_(gate_up_EGD[number])
                expert.down.weight.copy_(down_EDF[number])

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.moe(x_BSD)[0]


def train(engine: Any, batches: list[tuple[Tensor, Tensor]], task: Task, aux_coef: float) -> list[Record]:
    """Train the steps of a task. Collective: all ranks.

    Args:
        engine: Model under DeepSpeed.
        batches: Token ids and targets of every micro-step, from the first step of the run on.
        task: First and last step.
        aux_coef: Coefficient of the balance loss, where this loop has to add it.

    Returns:
        Records of the steps: loss over the global batch, and the global gradient norm before clipping.
    """
    count = engine.gradient_accumulation_steps()
    layers = [module for module in engine.module.modules() if isinstance(module, MoE)]
    records: list[Record] = []
    for step in range(task.first, task.last + 1):
        losses, norm = [], None
        for ids_BS, targets_BS in batches[(step - 1) * count : step * count]:
            # The targets are the next tokens already: nothing is to be shifted.
            loss = engine(input_ids=ids_BS, labels=targets_BS, shift_labels=targets_BS).loss
            if layers and aux_coef:
                loss = loss + aux_coef * torch.stack([layer.deepspeed_moe.l_aux for layer in layers]).sum()
            engine.backward(loss)
            losses.append(loss.detach().float())
            if engine.is_gradient_accumulation_boundary() and not engine.zero_optimization():
                # In fp32 without ZeRO, DeepSpeed tells no norm. It clips by what this function returns.
                norm = clip_grad_norm_(parameters=engine.module.parameters(), max_norm=math.inf, mpu=engine.mpu)
            engine.step()
        mean = torch.stack(losses).mean()  # all micro-batches have as many targets
        dist.all_reduce(mean)
        norm = engine.get_global_grad_norm() if norm is None else norm
        records.append(
            {
                "step": step,
                "train/loss": mean.item() / dist.get_world_size(),
                "train/grad_norm": float(cast("Any", norm)),
            }
        )
    return records


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """Gather the weights of all experts and all shards, the same on every rank. Collective: all ranks."""
    num_local = next((each.num_local_experts for each in engine.module.modules() if isinstance(each, MoE)), 0)
    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            value = parameter.detach().clone().contiguous()
        if not is_moe_param(parameter):
            weights[name] = value
            continue
        group = groups._get_expert_parallel_group(parameter.group_name)
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, value, group=group)
        weights |= name_experts(name, parts, num_local)
    return weights


def name_experts(name: str, parts: Sequence[Tensor], num_local: int) -> dict[str, Tensor]:
    """Name the weights of experts so that the names do not depend on the rank that has them.

    Args:
        name: Name of the parameter, which is the same on every rank.
        parts: Its value on each rank that shares the experts: one expert's, or [e, ...].
        num_local: Experts of a rank, where a parameter is one expert's.
    """
    before, marker, behind = name.partition(".deepspeed_experts.")
    if not marker:
        return {name: torch.cat(tuple(parts))}  # [e, ...] -> [E, ...]
    local, _, rest = behind.partition(".")
    return {f"{before}{marker}{rank * num_local + int(local)}.{rest}": part for rank, part in enumerate(parts)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
