"""Construction of this rank's model under DeepSpeed, from a configuration."""

import torch

from moe_train.config.resolve import ResolvedConfig
from moe_train.distributed.collectives import world_group
from moe_train.distributed.context import ContextRanks
from moe_train.distributed.flight_recorder import FlightRecorder
from moe_train.distributed.mesh import ParallelMesh, create_mesh
from moe_train.distributed.observer import CommObserver
from moe_train.distributed.traffic import TrafficMeter
from moe_train.host.precision import torch_dtype
from moe_train.model.block import Recompute
from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.compiled import compile_dense_parts
from moe_train.model.moe.balance.build import make_balance_terms, make_bias_rule
from moe_train.model.objective import TrainingObjective
from moe_train.model.parameters import materialize
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.engine.settings import deepspeed_settings


def make_mesh(config: ResolvedConfig, device_type: str = "cpu") -> ParallelMesh:
    """Create the process groups that a configuration asks for. Collective: all ranks.

    Args:
        config: Resolved configuration.
        device_type: cpu or cuda.
    """
    parallel, seconds = config.parallel, config.collective_seconds(device_type)
    context_size = parallel.context_parallel_size if parallel.context_parallel_size > 1 else None
    return create_mesh(parallel.expert_parallel_size, seconds, parallel.node_size, context_size)


def sharing_ranks(
    config: ResolvedConfig, mesh: ParallelMesh, flight_recorder: FlightRecorder | None = None
) -> ContextRanks | None:
    """Describe the ranks that share this rank's sequences; None: it has whole sequences.

    Args:
        config: Resolved configuration.
        mesh: Groups of this rank, from `make_mesh`.
        flight_recorder: Recorder of what is sent between these ranks; None: no recorder.
    """
    if mesh.context is None:
        return None
    observer = CommObserver(flight_recorder=flight_recorder)
    exchange = config.parallel.context_exchange
    return ContextRanks(mesh.context.group, mesh.context.rank, mesh.context.size, exchange, observer)


def make_engine(
    config: ResolvedConfig,
    device: torch.device,
    meter: TrafficMeter | None = None,
    flight_recorder: FlightRecorder | None = None,
) -> TrainEngine:
    """Build the model of this rank under DeepSpeed.

    Args:
        config: Resolved configuration.
        device: Device of this rank.
        meter: Meter of all-to-alls; None: they are not measured.
        flight_recorder: Recorder of the part of a step and the all-to-all that this process is in; None: no recorder.

    Raises:
        UsageError: If an addition for DeepSpeed contradicts a field.

    Collective: All ranks.
    """
    model, parallel = config.model, config.parallel
    mesh = make_mesh(config, device.type)
    transformer = build_model(
        model,
        model.vocab_size,
        seed=config.train.seed,
        placement=ExpertPlacement(
            mesh.expert.rank,
            parallel.expert_parallel_size,
            mesh.dispatch_groups,
            parallel.dispatch,
            parallel.chunks,
            parallel.payload,
            meter,
            flight_recorder,
        ),
        recompute=Recompute(config.train.recompute, config.train.recompute_every),
        measures=config.telemetry.experts,
        loss_chunk=config.train.loss_chunk_tokens,
    )
    materialize(transformer, seed=config.train.seed, dtype=torch_dtype(config.train.precision), device=device)
    if config.train.compile:
        compile_dense_parts(transformer)
    objective = TrainingObjective(
        transformer, make_balance_terms(model.moe), world_group(), make_bias_rule(model.moe), config.optim.warmup_steps
    )
    layer_numel = max(sum(parameter.numel() for parameter in block.parameters()) for block in transformer.blocks)
    settings = deepspeed_settings(config, device.type, layer_numel)
    return TrainEngine(objective, mesh, config.optim, settings, flight_recorder)
