"""Training engine: a model under DeepSpeed ZeRO, its steps, and its state as checkpoints see it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_train.checkpoint.sharded_state import Fragment, squares_and_faults
from moe_train.config.parts import read_section
from moe_train.config.registry import load_part
from moe_train.config.run import OptimConfig
from moe_train.distributed.flight_recorder import FlightRecorder
from moe_train.distributed.mesh import ParallelMesh
from moe_train.model.moe.steps import RoutingSums
from moe_train.model.objective import TrainingObjective
from moe_train.model.parameters import LogicalTensor, logical_tensor, optim_rules
from moe_train.model.step_size import StepSize
from moe_train.model.transformer import LossOutput, Tokens, Transformer
from moe_train.train.engine.direct_gradients import DirectGradients
from moe_train.train.engine.fragments import MappedState, PartitionedState, ZeroState
from moe_train.train.engine.groups import ExpertEngine, join_process_groups, mark_experts, parameter_groups
from moe_train.train.engine.optimizers.base import OptimizerKind
from moe_train.train.engine.reading import read_by_deepspeed
from moe_train.train.engine.tuple_objective import TupleObjective
from moe_train.train.engine.update_gate import UpdateGate
from moe_train.train.step_result import SkipRule, StepResult


class TrainEngine:
    """Engine that trains a model under DeepSpeed ZeRO."""

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
            objective: Objective whose model has memory and values, with this rank's experts.
            mesh: Groups that the experts are spread over.
            optim: Optimizer settings.
            settings: DeepSpeed's configuration.
            flight_recorder: Recorder of the part of a step that is under way; None: no recorder.

        Collective: All ranks.
        """
        self._flight_recorder, self._mesh = flight_recorder or FlightRecorder(), mesh
        parameters = [(p, logical_tensor(n, p)) for n, p in objective.model.named_parameters()]
        self._logical_tensors = [tensor for _, tensor in parameters]
        self._model, self._objective = objective.model, objective
        stage: int = settings["zero_optimization"]["stage"]
        self._is_fp16: bool = settings["fp16"]["enabled"]
        join_process_groups(mesh)
        mark_experts(objective.model, mesh)
        self._optimizer = optim.name
        self._kind: OptimizerKind = load_part("optimizers", optim.name)
        section = read_section(self._kind.section, optim.part_settings.get(optim.name), f"optim.{optim.name}")
        parts_matrices = self._kind.matrix_moments is not None
        rules = optim_rules(objective.model) if parts_matrices else {}
        matrices = {name: rule.matrices for name, rule in rules.items() if rule.matrices}
        self._engine = ExpertEngine(
            args=None,
            model=TupleObjective(objective),
            optimizer=self._kind.build(parameter_groups(objective.model, optim, parts_matrices), optim, section),
            config=settings,
            config_class=read_by_deepspeed(settings),
        )
        self._zero = self._engine.optimizer
        state_of = PartitionedState if stage == 3 else MappedState
        self._state: ZeroState = state_of(self._zero, parameters, self._kind, matrices)
        if isinstance(self._state, MappedState) and not self._zero.cpu_offload:
            self._state.divide_gradients(DirectGradients(self._zero).divisor)
        self._gate = UpdateGate(self._zero, self._state, stage)

    @property
    def model(self) -> Transformer:
        """Model, for evaluation and generation; under ZeRO-3 all ranks must call it together."""
        return self._model

    @property
    def mesh(self) -> ParallelMesh:
        """Groups of this rank."""
        return self._mesh

    def train_step(
        self,
        micro_batches: Iterable[tuple[Tokens, Tensor]],
        size: StepSize,
        learning_rate: float,
        should_skip: SkipRule | None = None,
    ) -> StepResult:
        """Take one optimizer step.

        Args:
            micro_batches: Tokens and targets, as many as the configured accumulation.
            size: Sizes of the step over all ranks.
            learning_rate: Learning rate of this step, before the factors of parameter groups.
            should_skip: Function that decides after the gradients whether to skip the update; None: never.

        Collective: All ranks.
        """
        for group in self._zero.param_groups:
            group["lr"] = learning_rate * group["lr_factor"]
        self._engine.train()
        total: list[Tensor] = []
        mean_loss, num_micro_batches, step, skipped_before = torch.zeros(()), 0, 0, self._engine.skipped_steps
        for tokens, targets_BS in micro_batches:
            self._flight_recorder.at("forward")
            outputs = self._engine(tokens, targets_BS, size)
            parts = [output.detach() for output in outputs]
            total = parts if not total else [a + b for a, b in zip(total, parts, strict=True)]
            num_micro_batches, step = num_micro_batches + 1, tokens.step
            self._flight_recorder.at("backward")
            # DeepSpeed divides gradients by the micro-batches, and by all ranks, those of experts too.
            self._engine.backward(outputs[0])
            self._flight_recorder.at("update")
            mean_loss = total[0].float() / num_micro_batches
            self._gate.expect(mean_loss, should_skip)  # which is asked inside of the next line
            self._engine.step()
            self._flight_recorder.at("data")
        sums, skipped = RoutingSums(*total[3:]) if len(total) > 3 else None, self._engine.skipped_steps > skipped_before
        loss = total[2].float() / num_micro_batches
        if sums is not None:
            loss = loss + self._objective.after_step(sums, step, size, skipped)
        return StepResult(
            loss=loss,
            cross_entropy=total[1].float() / num_micro_batches,
            sums=sums,
            grad_norm=self._gate.grad_norm,
            skipped=skipped,
            loss_scale=self.loss_scale,
        )

    def close(self) -> None:
        """Let go of the model: without this DeepSpeed's hooks keep it in memory until the process ends."""
        self._engine.destroy()

    @torch.no_grad()
    def evaluate(self, tokens: Tokens, targets_BS: Tensor) -> Tensor:
        """Compute the loss of each token in evaluation mode: no router noise. [B, S]. Collective: all ranks."""
        self._engine.eval()
        output: LossOutput = self._model(tokens, targets_BS=targets_BS)
        return output.losses_BS

    @property
    def logical_tensors(self) -> list[LogicalTensor]:
        """Every tensor of the model as all ranks together see it."""
        return self._logical_tensors

    @property
    def optimizer(self) -> str:
        """Name of the optimizer."""
        return self._optimizer

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the optimizer's state tensors."""
        return self._kind.moments

    def fragments(self) -> Iterator[Fragment]:
        """Yield the ranges of weights and optimizer state that this rank owns; every element has one owner."""
        return self._state.fragments()

    def read_state(self, read: Callable[[Fragment, str], Tensor]) -> None:
        """Replace this rank's weights and optimizer state; `adopt_state` has to follow.

        Args:
            read: Function that returns one kind of state of a fragment's range, as a 1-D fp32 tensor.
        """
        for fragment in self.fragments():
            for kind, state in fragment.states.items():
                state.copy_(read(fragment, kind))

    def adopt_state(self, optimizer_step: int, loss_scale: float | None) -> None:
        """Continue from the state that was read on every rank.

        Args:
            optimizer_step: Updates that the optimizer has made, for its bias correction.
            loss_scale: Loss scale of fp16; None: start with the configured one. No effect in another precision.

        Collective: All ranks.
        """
        self._state.set_step(optimizer_step)
        self._state.refresh_working_weights()
        if self._is_fp16 and loss_scale is not None:
            self._zero.loss_scaler.cur_scale = loss_scale

    @property
    def optimizer_step(self) -> int:
        """Number of updates that the optimizer has made: fewer than the loop's steps if some were skipped."""
        return self._state.step

    @property
    def loss_scale(self) -> float:
        """Loss scale of fp16; 1 otherwise."""
        return float(self._zero.loss_scale)

    def buffers(self) -> dict[str, Tensor]:
        """Return the model's buffers by name, the same on every rank; they are neither weights nor optimizer state."""
        return dict(self._model.named_buffers())

    def tensor_sums(self) -> dict[str, Tensor]:
        """Compute `squares_and_faults` of this rank's part of each weight, and of each gradient of a skipped step.

        Returns:
            fp64 [4] by the tensor's name: two numbers of the weight, then two of the gradient.
        """
        sums = {tensor.name: torch.zeros(4, dtype=torch.float64) for tensor in self._logical_tensors}
        for fragment in self.fragments():
            sums[fragment.tensor.name][:2] = squares_and_faults(fragment.states["weight"])
        for name, found in self._gate.skipped_gradients.items():
            sums[name][2:] = found
        return sums
