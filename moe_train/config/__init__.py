"""Configuration: frozen pydantic models, YAML and dotted overrides, cross-field checks. Needs no torch."""

from moe_train.config.data import DataConfig, MixtureEntry, SourceConfig
from moe_train.config.errors import EXIT_USAGE, UsageError
from moe_train.config.model import ModelConfig
from moe_train.config.moe import MoEConfig
from moe_train.config.root import Config, check_world
from moe_train.config.run import CheckpointConfig, OptimConfig, ParallelConfig, TelemetryConfig, TrainConfig

__all__ = [
    "EXIT_USAGE",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "MixtureEntry",
    "ModelConfig",
    "MoEConfig",
    "OptimConfig",
    "ParallelConfig",
    "SourceConfig",
    "TelemetryConfig",
    "TrainConfig",
    "UsageError",
    "check_world",
]
