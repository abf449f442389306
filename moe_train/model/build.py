"""Construction of a model from its configuration."""

import math
from dataclasses import dataclass

import torch

from moe_train.config.model import ModelConfig
from moe_train.config.parts import read_section
from moe_train.config.registry import load_part
from moe_train.distributed.collectives import Group
from moe_train.distributed.flight_recorder import FlightRecorder
from moe_train.distributed.observer import CommObserver
from moe_train.distributed.traffic import TrafficMeter
from moe_train.model.block import NO_RECOMPUTE, Block, Recompute
from moe_train.model.feed_forward import FeedForward, FeedForwardKind, FeedForwardSpec
from moe_train.model.layers import Embedding, Head, SwiGLU, make_norm
from moe_train.model.mixers.base import MixerKind, MixerSpec
from moe_train.model.moe.capacity import NO_LIMIT, CapacityLimit
from moe_train.model.moe.dispatch.base import Dispatcher, DispatcherKind, DispatchSpec
from moe_train.model.moe.dispatch.local import LocalDispatcher
from moe_train.model.moe.experts import GroupedExperts
from moe_train.model.moe.layer import MoELayer
from moe_train.model.moe.routers.base import Router
from moe_train.model.moe.routers.build import build_router
from moe_train.model.stream.hidden_copies import HiddenCopies
from moe_train.model.transformer import Transformer
from moe_train.ops.payload import Payload, PayloadName


@dataclass(frozen=True)
class ExpertPlacement:
    """Placement of the experts: which of them are on this rank, and how tokens reach the others.

    Each rank has a range of consecutive experts.

    Attributes:
        rank: Rank of this process in its expert-parallel group.
        size: Number of ranks that share the experts.
        dispatch_groups: Process groups that a token passes on its way to its experts; empty if all experts are here.
        dispatch: Name of the dispatcher.
        num_chunks: Number of chunks in which tokens travel.
        payload: Number format in which rows travel.
        meter: Meter of the dispatcher's all-to-alls; None: they are not measured.
        flight_recorder: Recorder of the all-to-all, with its layer, that this process is in; None: no recorder.
    """

    rank: int = 0
    size: int = 1
    dispatch_groups: tuple[Group, ...] = ()
    dispatch: str = "flat"
    num_chunks: int = 1
    payload: PayloadName = "model"
    meter: TrafficMeter | None = None
    flight_recorder: FlightRecorder | None = None

    def dispatcher(self, layer: int) -> Dispatcher:
        """Make the dispatcher of a layer; meter and flight recorder observe its all-to-alls."""
        if not self.dispatch_groups:
            return LocalDispatcher()
        kind: DispatcherKind = load_part("dispatchers", self.dispatch)
        observer = CommObserver(self.meter, self.flight_recorder, layer)
        return kind.build(DispatchSpec(self.dispatch_groups, self.num_chunks, Payload(self.payload), observer))


def build_model(
    config: ModelConfig,
    vocab_size: int,
    *,
    seed: int = 0,
    placement: ExpertPlacement | None = None,
    recompute: Recompute = NO_RECOMPUTE,
    measures: bool = True,
    loss_chunk: int | None = None,
) -> Transformer:
    """Build a model on the meta device: shapes without memory, with only this rank's experts.

    Args:
        config: Model section of the configuration.
        vocab_size: Rows of the embedding.
        seed: Seed of the run; it keys the router noise.
        placement: Placement of the experts; None: all are here.
        recompute: What the backward pass computes again.
        measures: Whether routing sums that only telemetry needs are computed.
        loss_chunk: Tokens whose logits exist at a time while losses are computed; None: by their size.

    Returns:
        The model; `materialize` gives it memory and values.
    """
    place = placement or ExpertPlacement()
    output_std = config.init_std / math.sqrt(2 * config.num_layers)
    with torch.device("meta"):
        embedding = Embedding(vocab_size, config.hidden_size, config.init_std)
        blocks = [
            _build_block(config, layer, seed, place, output_std, measures, recompute)
            for layer in range(config.num_layers)
        ]
        final_norm = (
            make_norm(config.norm, config.hidden_size, config.norm_epsilon) if config.norm_position == "pre" else None
        )
        head = Head(config.hidden_size, vocab_size, config.init_std)
        if config.tie_embeddings:
            head.weight = embedding.weight
        hook = HiddenCopies.of(config) if config.hidden_copies.copies > 1 else None
        return Transformer(embedding, blocks, final_norm, head, seed, hook, loss_chunk)


def _build_block(
    config: ModelConfig,
    layer: int,
    seed: int,
    place: ExpertPlacement,
    output_std: float,
    measures: bool,
    recompute: Recompute,
) -> Block:
    feed_forward: FeedForward
    if layer in config.moe_layer_indices:
        router = build_router(config, layer, seed, measures)
        feed_forward = _build_moe(config, layer, router, place, output_std)
    else:
        dense, dense_spec = feed_forward_of(config, layer, output_std)
        feed_forward = dense.build(dense_spec)
    norms = [make_norm(config.norm, config.hidden_size, config.norm_epsilon) for _ in range(2)]
    kind, spec = mixer_of(config, layer, output_std)
    return Block(kind.build(spec), feed_forward, norms[0], norms[1], config.norm_position, recompute.in_layer(layer))


def feed_forward_of(
    config: ModelConfig, layer: int, output_std: float = 0.0
) -> tuple[FeedForwardKind, FeedForwardSpec]:
    """Find the kind of a layer's dense feed-forward layer, and the settings that it is built from.

    Args:
        config: Model section of the configuration.
        layer: Index of the block, from 0; it has no experts.
        output_std: Standard deviation for `FeedForwardSpec`; only building needs it.
    """
    return load_part("feed_forwards", config.feed_forward), FeedForwardSpec(config, layer, output_std)


def mixer_of(config: ModelConfig, layer: int, output_std: float = 0.0) -> tuple[MixerKind, MixerSpec]:
    """Find the kind of a layer's mixer, and the settings that it is built from.

    Args:
        config: Model section of the configuration.
        layer: Index of the block, from 0.
        output_std: Standard deviation for `MixerSpec`; only building needs it.
    """
    name = config.layer_mixers[layer]
    kind = load_part("mixers", name)
    return kind, MixerSpec(
        config, read_section(kind.section, config.part_settings.get(name), f"model.{name}"), layer, output_std
    )


def _build_moe(config: ModelConfig, layer: int, router: Router, place: ExpertPlacement, output_std: float) -> MoELayer:
    moe, width = config.moe, config.expert_intermediate_size
    num_local = moe.num_experts // place.size
    experts = GroupedExperts(
        config.hidden_size,
        width,
        moe.num_experts,
        num_local,
        first_expert=place.rank * num_local,
        init_std=config.init_std,
        output_std=output_std,
    )
    capacity = NO_LIMIT
    if moe.capacity_factor is not None or moe.eval_capacity_factor is not None:
        per_sequence = moe.capacity_scope == "sequence"
        capacity = CapacityLimit(moe.capacity_factor, moe.eval_capacity_factor, per_sequence, moe.drop_policy)
    shared = None
    if moe.num_shared_experts:
        # The sum of n SwiGLUs is one of n times the width.
        shared = SwiGLU(config.hidden_size, moe.num_shared_experts * width, config.init_std, output_std)
    return MoELayer(router, place.dispatcher(layer), experts, capacity, shared)
