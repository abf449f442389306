"""The one door to DeepSpeed: ZeRO over dense and expert parameters, steps, and access to flat ranges of the state.

DeepSpeed believes in experts only where it finds its own layer classes. `_ExpertEngine` tells it instead; the
contract is that an expert parameter carries allreduce = False and the name of its group (deepspeed 0.19.8).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.utils import groups
from torch import Tensor, nn

from moe_train.checkpoint.sharded_state import STATE_KINDS, Fragment, squares_and_faults
from moe_train.config.run import OptimConfig
from moe_train.distributed.collectives import group_rank
from moe_train.distributed.flight_recorder import FlightRecorder
from moe_train.distributed.mesh import ParallelMesh
from moe_train.model.moe.steps import RoutingSums
from moe_train.model.parameters import ExpertParameter, LogicalTensor, logical_tensor
from moe_train.model.transformer import Tokens, TrainingObjective, Transformer
from moe_train.train.engine.tuple_objective import TupleObjective
from moe_train.train.step_result import Gradients, SkipRule, StepResult


class _ExpertEngine(DeepSpeedEngine):
    """DeepSpeed's engine, told that the model has experts though none of its own layer classes is in it."""

    def _configure_distributed_model(self, model: nn.Module) -> None:
        # DeepSpeed casts buffers with the weights; a bias in bf16 could not take a step of a thousandth.
        wide = dict(model.named_buffers())
        super()._configure_distributed_model(model)
        for name, buffer in wide.items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, buffer.to(self.device))
        experts = [p for p in model.parameters() if isinstance(p, ExpertParameter)]
        self.has_moe_layers = bool(experts)
        self.num_experts = [p.num_experts for p in experts]

    def _validate_zero3_moe_compatibility(self) -> None:
        """Nothing to refuse: expert parameters carry their placement, see `_mark_experts`."""

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
        # bf16 with fp32 accumulation would get a class of its own at stage 1; one class serves every stage 1 and 2.
        super()._do_optimizer_sanity_check(basic_optimizer)
        return ZERO_OPTIMIZATION


class TrainEngine:
    """Trains a model under DeepSpeed ZeRO."""

    def __init__(
        self,
        objective: TrainingObjective,
        mesh: ParallelMesh,
        optim: OptimConfig,
        settings: dict[str, Any],
        flight_recorder: FlightRecorder | None = None,
    ) -> None:
        """Shard the model's state.

        Args:
            objective: Materialised, holding this rank's experts.
            mesh: Groups that the experts are spread over.
            optim: Optimizer settings.
            settings: DeepSpeed's configuration.
            flight_recorder: Told which part of a step is under way; None: nobody asks.

        Collective: All ranks.
        """
        self._flight_recorder = flight_recorder or FlightRecorder()
        self._tensors = [(p, logical_tensor(n, p)) for n, p in objective.model.named_parameters()]
        self._model, self._objective = objective.model, objective
        self._stage: int = settings["zero_optimization"]["stage"]
        self._is_fp16: bool = settings["fp16"]["enabled"]
        _join_process_group(mesh)
        _mark_experts(objective.model, mesh)
        self._engine = _ExpertEngine(
            args=None,
            model=TupleObjective(objective),
            optimizer=_make_adamw(objective.model, optim),
            config=settings,
            config_class=DeepSpeedConfig(settings),
        )
        self._zero = self._engine.optimizer
        self._should_skip: SkipRule | None = None
        self._mean_loss = self._grad_norm = torch.zeros(())
        self._last_gradients: dict[str, Tensor] = {}
        self._ask_before_update()

    @property
    def model(self) -> Transformer:
        """The model, for evaluation and generation; under ZeRO-3 every rank must call it together."""
        return self._model

    @property
    def logical_tensors(self) -> list[LogicalTensor]:
        """Every tensor of the model as all ranks together see it."""
        return [tensor for _, tensor in self._tensors]

    def train_step(
        self, micro_batches: Iterable[tuple[Tokens, Tensor]], learning_rate: float, should_skip: SkipRule | None = None
    ) -> StepResult:
        """One optimizer step.

        Args:
            micro_batches: As many as the configured accumulation: tokens and targets.
            learning_rate: Of this step.
            should_skip: Asked between the gradients and the update whether to leave out the update; None: never.

        Collective: All ranks.
        """
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._engine.train()
        total: list[Tensor] = []
        num_micro_batches, step, skipped_before = 0, 0, self._engine.skipped_steps
        for tokens, targets_BS in micro_batches:
            self._flight_recorder.at("forward")
            outputs = self._engine(tokens, targets_BS)
            parts = [output.detach() for output in outputs]
            total = parts if not total else [a + b for a, b in zip(total, parts, strict=True)]
            num_micro_batches, step = num_micro_batches + 1, tokens.step
            self._flight_recorder.at("backward")
            self._engine.backward(outputs[0])
            self._flight_recorder.at("update")
            self._mean_loss, self._should_skip = total[0].float() / num_micro_batches, should_skip
            self._engine.step()
            self._flight_recorder.at("data")
        sums, skipped = RoutingSums(*total[2:]) if len(total) > 2 else None, self._engine.skipped_steps > skipped_before
        if sums is not None and not skipped:
            self._objective.after_step(sums.counts, step)
        return StepResult(
            loss=self._mean_loss,
            cross_entropy=total[1].float() / num_micro_batches,
            sums=sums,
            grad_norm=self._grad_norm,
            skipped=skipped,
            loss_scale=self.loss_scale,
        )

    @torch.no_grad()
    def evaluate(self, tokens: Tokens) -> Tensor:
        """Logits in evaluation mode: no router noise. [B, S, V]. Collective: all ranks."""
        self._engine.eval()
        return self._model(tokens).logits_BSV

    def fragments(self) -> Iterator[Fragment]:
        """The ranges of weights and optimizer state that this rank owns; every element of the model has one owner."""
        self._create_optimizer_state()
        for parameter, tensor in self._tensors:
            find = self._partitioned_fragment if self._stage == 3 else self._mapped_fragment
            fragment = find(parameter, tensor)
            if fragment is not None and fragment.numel:
                yield fragment

    def read_state(self, read: Callable[[Fragment, str], Tensor]) -> None:
        """Replace this rank's weights and optimizer state; `adopt_state` has to follow.

        Args:
            read: Gives a state kind of a fragment's range as a 1-D fp32 tensor.
        """
        for fragment in self.fragments():
            for kind, state in fragment.states.items():
                state.copy_(read(fragment, kind))

    def adopt_state(self, optimizer_step: int, loss_scale: float | None) -> None:
        """Go on with the state that was read on every rank.

        Args:
            optimizer_step: Updates that Adam has made, for its bias correction.
            loss_scale: fp16's loss scale; None: begin with the configured one. No effect in another precision.

        Collective: All ranks.
        """
        for flat in self._flat_partitions():
            self._zero.optimizer.state[flat]["step"].fill_(float(optimizer_step))
        self._refresh_working_weights()
        if self._is_fp16 and loss_scale is not None:
            self._zero.loss_scaler.cur_scale = loss_scale

    @property
    def optimizer_step(self) -> int:
        """Updates that Adam has made: fewer than the loop's steps where fp16 skipped some."""
        states = [self._zero.optimizer.state[flat] for flat in self._flat_partitions()]
        return int(states[0]["step"]) if states and states[0] else 0

    @property
    def loss_scale(self) -> float:
        """fp16's loss scale; 1 otherwise."""
        return float(self._zero.loss_scale)

    def tensor_sums(self) -> dict[str, Tensor]:
        """This rank's part of each tensor's `squares_and_faults`: weights, gradients of a skipped step. fp64 [4]."""
        sums = {tensor.name: torch.zeros(4, dtype=torch.float64) for tensor in self.logical_tensors}
        for fragment in self.fragments():
            sums[fragment.tensor.name][:2] = squares_and_faults(fragment.states[STATE_KINDS[0]])
        for name, found in self._last_gradients.items():
            sums[name][2:] = found
        return sums

    def _sum_gradients(self, scale: float) -> dict[str, Tensor]:
        sums = {}
        for parameter, tensor in self._tensors:
            if self._stage == 3:
                gradient = self._zero.get_local_fp32_grad_for_param(parameter)
            elif parameter._hp_mapping is None:
                continue
            else:
                place = parameter._hp_mapping.lp_fragment_address
                gradient = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
                if gradient.numel() == parameter.numel():  # bf16 keeps a buffer of the whole on each rank
                    gradient = gradient.narrow(0, place.start, place.numel)
            sums[tensor.name] = squares_and_faults(gradient / scale)
        return sums

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers by name, the same on every rank: what is neither weight nor optimizer state."""
        return dict(self._model.named_buffers())

    def _ask_before_update(self) -> None:
        """Have DeepSpeed's optimizer ask whether to skip the update.

        Every ZeRO stage forms the norm of the gradients, then tells its loss scaler whether they overflowed, and then
        leaves out the update where `overflow` is set (deepspeed 0.19.8). So the norm is noted where it is formed, and
        the question is asked where the scaler is told.
        """
        norms: list[Tensor] = []
        zero, update_scale = self._zero, self._zero._update_scale
        if self._stage == 3:
            norm_groups = zero._get_norm_groups
            zero._get_norm_groups = lambda: _noted(norms, norm_groups(), combine_grad_norm_groups)
        else:
            global_norm = zero.scaled_global_norm
            zero.scaled_global_norm = lambda *args: _noted(norms, global_norm(*args), lambda norm: norm)

        def tell_scaler(has_overflow: bool) -> None:
            scale = zero.loss_scale
            self._grad_norm = norms.pop() / scale if norms else torch.full((), math.inf)
            norms.clear()
            is_bad = False
            if self._should_skip is not None:
                # A scale that can go no lower is no reason for an overflow.
                overflowed = has_overflow and scale > getattr(zero.loss_scaler, "min_scale", scale)
                is_bad = self._should_skip(Gradients(self._mean_loss, self._grad_norm, overflowed))
                zero.overflow = is_bad or overflowed
                self._last_gradients = self._sum_gradients(scale) if is_bad else {}
            update_scale(has_overflow and not is_bad)  # the scale is lowered for its own overflow alone

        zero._update_scale = tell_scaler

    def _flat_partitions(self) -> list[Tensor]:
        # The fp32 partitions are what the inner AdamW updates and keys its state by.
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _create_optimizer_state(self) -> None:
        states = self._zero.optimizer.state
        for flat in self._flat_partitions():
            if not states[flat]:
                moments = {k: torch.zeros_like(flat, memory_format=torch.preserve_format) for k in STATE_KINDS[1:]}
                states[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **moments}

    def _mapped_fragment(self, parameter: nn.Parameter, tensor: LogicalTensor) -> Fragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:  # another rank owns all of it
            return None
        place = mapping.lp_fragment_address
        # DeepSpeed links optimizer state to parameters after its first group's first step, when the other groups have
        # none yet; so the moments are looked up where they are kept.
        flat, within = self._flat_partitions()[mapping.param_group_index], mapping.get_hp_fragment_address()
        whole = {"weight": flat.detach()} | {kind: self._zero.optimizer.state[flat][kind] for kind in STATE_KINDS[1:]}
        states = {kind: state.narrow(0, within.start, within.numel) for kind, state in whole.items()}
        return Fragment(tensor, tensor.start + place.start, place.numel, states)

    def _partitioned_fragment(self, parameter: nn.Parameter, tensor: LogicalTensor) -> Fragment:
        size = parameter.ds_tensor.ds_numel
        start = group_rank(parameter.ds_process_group) * size
        numel = max(0, min(size, tensor.numel - start))  # the last partitions may be padding, in part or whole
        keys = [None, *STATE_KINDS[1:]]
        found = [self._zero._get_fp32_opt_state_partition(parameter, False, key)[0][:numel].detach() for key in keys]
        return Fragment(tensor, tensor.start + start, numel, dict(zip(STATE_KINDS, found, strict=True)))

    def _refresh_working_weights(self) -> None:
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        # As in its own step: gathered parameters are let go, or they would keep the old values.
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _noted(notes: list[Tensor], found: Any, norm_of: Callable[[Any], Tensor]) -> Any:
    notes[:] = [torch.as_tensor(norm_of(found))]
    return found


def _join_process_group(mesh: ParallelMesh) -> None:
    # Without this DeepSpeed builds an optional operator for CPU: a compiler and a minute that nothing here needs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    name = _group_name(mesh)
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.expert.group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = mesh.expert.ranks
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.expert_data.group
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = mesh.expert_data.ranks


def _mark_experts(model: Transformer, mesh: ParallelMesh) -> None:
    for parameter in model.parameters():
        if isinstance(parameter, ExpertParameter):
            parameter.allreduce = False
            parameter.group_name = _group_name(mesh)
            parameter.ds_zero_placement_family = "autoep_expert"  # what ZeRO-3 asks for
            parameter.ds_zero_partition_group_name = parameter.group_name


def _group_name(mesh: ParallelMesh) -> str:
    return f"ep_size_{mesh.expert.size}"


def _make_adamw(model: Transformer, optim: OptimConfig) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    wanted = [
        {"name": "decay", "params": matrices, "weight_decay": optim.weight_decay},
        {"name": "no_decay", "params": vectors, "weight_decay": 0.0},
    ]
    split = split_params_into_different_moe_groups_for_optimizer(wanted)
    return torch.optim.AdamW(
        [group for group in split if group["params"]],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=True,
    )
