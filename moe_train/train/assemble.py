"""From a configuration to a run: groups, model, engine, records."""

from typing import Any

import torch

from moe_train.config.root import Config
from moe_train.data import PreparedData
from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.moe.balance import make_balance_terms
from moe_train.model.parameters import materialize
from moe_train.model.transformer import TrainingObjective
from moe_train.parallel.collectives import world_group
from moe_train.parallel.groups import create_expert_groups
from moe_train.parallel.precision import torch_dtype
from moe_train.train.batches import BatchPlan
from moe_train.train.console import RunConsole
from moe_train.train.engine import TrainEngine
from moe_train.train.loop import Run
from moe_train.train.run_folder import RunFolder
from moe_train.train.telemetry import MetricsWriter


def make_engine(config: Config, settings: dict[str, Any], device: torch.device) -> TrainEngine:
    """The model of this rank under DeepSpeed.

    Args:
        config: Every size resolved.
        settings: DeepSpeed's configuration.
        device: Of this rank.

    Collective: All ranks.
    """
    size, model = config.parallel.expert_parallel_size, config.model
    assert isinstance(size, int) and model.vocab_size is not None and config.train.precision != "auto"
    groups = create_expert_groups(size, config.parallel.timeout_seconds)
    transformer = build_model(
        model,
        model.vocab_size,
        seed=config.train.seed,
        placement=ExpertPlacement(
            groups.ep_rank, size, groups.ep_group if size > 1 else None, config.parallel.dispatch
        ),
        recompute_activations=config.train.recompute_activations,
    )
    materialize(transformer, seed=config.train.seed, dtype=torch_dtype(config.train.precision), device=device)
    scope = world_group() if model.moe.balance_scope == "global" else None
    objective = TrainingObjective(transformer, make_balance_terms(model.moe), scope)
    return TrainEngine(objective, groups, config.optim, settings)


def assemble_run(
    config: Config,
    rank: int,
    world_size: int,
    folder: RunFolder,
    device: torch.device,
    data: PreparedData,
    console: RunConsole,
    first_step: int,
    settings: dict[str, Any],
) -> Run:
    """Everything the loop works with.

    Args:
        config: Every size resolved.
        rank: This rank.
        world_size: Ranks.
        folder: The run's folder.
        device: Of this rank.
        data: Training and held-out sequences.
        console: What one sees.
        first_step: Step the run begins or goes on with.
        settings: DeepSpeed's configuration.

    Collective: All ranks.
    """
    assert config.train.global_batch_size is not None
    engine = make_engine(config, settings, device)
    plan = BatchPlan(config.train.micro_batch_size, config.train.global_batch_size, rank, world_size)
    writer = MetricsWriter(folder.root, first_step, config.telemetry.tensorboard) if rank == 0 else None
    return Run(config, folder, data, engine, plan, device, console, writer)
