"""Construction of the router of a layer."""

from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.config.moe import MoEConfig
from moe_train.config.parts import read_section
from moe_train.config.registry import load_part
from moe_train.model.moe.balance.build import make_bias_rule, needed_sums, remembered_sums
from moe_train.model.moe.routers.base import InputJitter, Router, RouterKind, RouterOptions, RouterSpec
from moe_train.ops.keyed_random import make_key


def build_router(config: ModelConfig, layer: int, seed: int, measures: bool) -> Router:
    """Make the router of a layer.

    Args:
        config: Model section of the configuration.
        layer: Index of the block, from 0.
        seed: Seed of the run.
        measures: Whether sums that only telemetry needs are computed.
    """
    moe = config.moe
    kind: RouterKind = load_part("routers", moe.router)
    section = read_section(kind.section, moe.part_settings.get(moe.router), f"model.moe.{moe.router}")
    measured = {"entropy", "squared_logsumexp", *(["agreement"] if kind.has_noise else [])}
    sums = needed_sums(moe) | (measured if measures else set())
    jitter = InputJitter(moe.input_jitter, make_key(seed, "router_jitter", layer)) if moe.input_jitter else None
    options = RouterOptions(jitter, make_bias_rule(moe) is not None, sums, remembered_sums(moe))
    return kind.build(RouterSpec(config, section, layer, seed, options))


def router_shapes(moe: MoEConfig) -> dict[str, Any]:
    """Settings of the router on which the meaning of a checkpoint's weights depends, by field name."""
    kind: RouterKind = load_part("routers", moe.router)
    return kind.shapes(moe, read_section(kind.section, moe.part_settings.get(moe.router), f"model.moe.{moe.router}"))
