"""Mixers by their name in the configuration: one file and one line here each."""

from collections.abc import Callable

from moe_train.config.model import ModelConfig
from moe_train.model.mixers.attention import AttentionMixer
from moe_train.model.mixers.base import Mixer, MixerContext


def _attention(config: ModelConfig, layer: int, output_std: float) -> Mixer:
    return AttentionMixer(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.attention_kv_heads,
        head_dim=config.attention_head_dim,
        rope_theta=config.rope_theta,
        owns_key_value=layer in config.kv_owner_layers,
        init_std=config.init_std,
        output_std=output_std,
        window=config.sliding_window,
        qk_norm=config.qk_norm,
        norm_epsilon=config.norm_epsilon,
    )


MIXERS: dict[str, Callable[[ModelConfig, int, float], Mixer]] = {"attention": _attention}

__all__ = ["MIXERS", "AttentionMixer", "Mixer", "MixerContext"]
