"""The whole configuration, and the checks that need more than one section."""

import os
import shlex
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from moe_train.config.base import Section
from moe_train.config.data import DataConfig
from moe_train.config.model import ModelConfig
from moe_train.config.paths import expand_user
from moe_train.config.run import (
    ALARM_FIELDS,
    CheckpointConfig,
    OptimConfig,
    ParallelConfig,
    TelemetryConfig,
    TrainConfig,
)


class Config(Section):
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    """The model."""
    data: DataConfig = DataConfig()
    """Documents, tokens and their order."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the model over ranks."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    train: TrainConfig
    """The training loop."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Records of a run, and warnings."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw additions to DeepSpeed's configuration (as JSON on the command line); they must not contradict a field
    above."""

    _moved_run: str = PrivateAttr("")

    @property
    def moved_run(self) -> str:
        """Why no run may begin with this configuration: its file is that of a moved run; empty: one may."""
        return self._moved_run

    def note_moved_run(self, file: str) -> None:
        """Note whether a configuration file is that of a run whose folder was moved or copied.

        Args:
            file: Configuration file that train.run_dir comes from.
        """
        folder, run_dir = Path(expand_user(file)).absolute().parent, self.train.run_dir
        if any(folder.glob("checkpoints/step_*")) and os.path.realpath(folder) != os.path.realpath(run_dir):
            self._moved_run = (
                f"--config {file} lies in a folder with checkpoints, but its train.run_dir ({run_dir!r}) is another "
                f"folder, {os.path.realpath(run_dir)}: give --train.run_dir={shlex.quote(str(folder))} to go on with "
                f"the run there, or --train.run_dir={shlex.quote(run_dir)} to use the other folder"
            )

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
        again, layers = self.train.recompute_every, self.model.num_layers
        if again > layers:
            raise ValueError(
                f"train.recompute_every ({again}) is above model.num_layers ({layers}): no block would be recomputed"
            )
        self._check_held_out()
        size, experts = self.parallel.expert_parallel_size, self.model.moe.num_experts
        if isinstance(size, int):
            if size > 1 and not self.model.moe_layer_indices:
                raise ValueError(f"expert_parallel_size ({size}) has no effect: the model has no MoE layer")
            if experts % size:
                raise ValueError(f"num_experts ({experts}) must be divisible by expert_parallel_size ({size})")
        if self.parallel.payload == "bf16" and self.train.precision in ("bf16", "fp16"):
            raise ValueError(
                f"parallel.payload (bf16) has no effect with train.precision ({self.train.precision}), whose rows have "
                "16 bits too"
            )
        if self.train.compile and self.parallel.zero_stage == 3:
            raise ValueError(
                "train.compile (True) is not for parallel.zero_stage (3), which gathers weights within what would be "
                "compiled: take zero_stage 1 or 2"
            )
        return self

    def _check_held_out(self) -> None:
        """Refuse settings of held-out text, or of its validation, that no source can give an effect."""
        data, every = self.data, self.train.validate_every
        if data.source == "synthetic":
            nothing = "source 'synthetic' is random"
        elif data.validation_fraction == 0 and not any(source.names_held_out for source in data.sources):
            nothing = "data.validation_fraction is 0, and no source names validation_paths or a validation_split"
        else:
            nothing = ""
        if every and nothing:
            raise ValueError(f"train.validate_every ({every}) has no effect: nothing is held out; {nothing}")
        if all(source.names_held_out for source in data.sources):
            for name in ("validation_fraction", "validation_max_bytes"):
                if data.differs(name):
                    raise ValueError(
                        f"data.{name} ({getattr(data, name)}) has no effect: every source names its held-out text"
                    )
