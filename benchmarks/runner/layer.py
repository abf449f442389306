"""An MoE layer alone: built as a model's first block has it, and called without a model around it.

Legend: B batch, S sequence, T tokens.
"""

from typing import cast

import torch
from torch import Tensor

from moe_train.config.model import ModelConfig
from moe_train.model.block import Block
from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.mixers.base import MixerContext
from moe_train.model.moe.layer import MoELayer
from moe_train.model.token_index import TokenIndex

_KEY_BITS = 62


def build_layer(
    hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, placement: ExpertPlacement | None = None
) -> MoELayer:
    """Build an MoE layer with the softmax router, on the meta device.

    Args:
        hidden_size: Width of a token's row; even, for the model's configuration.
        intermediate_size: Width of an expert.
        num_experts: Experts of all ranks together.
        top_k: Experts of a token.
        placement: Which experts are here, and how tokens reach the others; None: all experts are here.
    """
    moe = {"num_experts": num_experts, "top_k": top_k, "intermediate_size": intermediate_size, "router": "softmax_topk"}
    shape = {"hidden_size": hidden_size, "num_layers": 1, "num_heads": 1, "moe_every": 1}
    model = build_model(ModelConfig.model_validate({**shape, "moe": moe}), 1, placement=placement, measures=False)
    return cast("MoELayer", cast("Block", model.blocks[0]).feed_forward)


def draw_keys(num_tokens: int, generator: torch.Generator) -> Tensor:
    """Random keys of tokens, int64 [T]; they break ties between experts."""
    return torch.randint(2**_KEY_BITS, (num_tokens,), generator=generator, device=generator.device)


def apply_layer(layer: MoELayer, x_TD: Tensor, keys_T: Tensor) -> Tensor:
    """Output of a layer, [T, D].

    Args:
        layer: The layer.
        x_TD: Token rows.
        keys_T: int64, random key of each token.

    Collective: All ranks that share the layer's experts.
    """
    positions_1T = torch.arange(len(keys_T), device=keys_T.device).unsqueeze(0)
    tokens = TokenIndex(positions_1T, positions_1T, None, keys_T.unsqueeze(0))
    return layer(x_TD.unsqueeze(0), MixerContext(layer=0, tokens=tokens))[0].squeeze(0)
