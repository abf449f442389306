"""Small models in fp64 for tests, with weights large enough that every part matters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_train.config.model import ModelConfig
from moe_train.config.run import RecomputedPart
from moe_train.model.block import Recompute
from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.mixers.base import MixerContext
from moe_train.model.moe.steps import RoutingSums
from moe_train.model.parameters import materialize
from moe_train.model.token_index import TokenIndex
from moe_train.model.transformer import Tokens, Transformer

VOCAB = 23
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 12,
    "init_std": 0.4,  # logits and attention scores of order 1
    "moe": {"num_experts": 4, "top_k": 2},
}


def small_config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, **changes})


def small_model(
    config: ModelConfig,
    seed: int = 0,
    placement: ExpertPlacement | None = None,
    recompute: RecomputedPart = "none",
    recompute_every: int = 1,
    dtype: torch.dtype = torch.float64,
    measures: bool = True,
) -> Transformer:
    """A model with values; routers, which start at zero, get some too."""
    again = Recompute(recompute, recompute_every)
    model = build_model(config, VOCAB, seed=seed, placement=placement, recompute=again, measures=measures)
    materialize(model, seed=seed, dtype=dtype, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(99)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def context_of(keys_BS: Tensor, layer: int = 0) -> MixerContext:
    """The surroundings of a layer that needs the tokens' random keys alone."""
    positions = torch.arange(keys_BS.shape[1])[None]
    return MixerContext(layer, TokenIndex(positions, positions, None, keys_BS))


def tokens_of(ids: Tensor, **changes: Any) -> Tokens:
    return Tokens(ids, torch.arange(len(ids)), **changes)


def sums_with(shape: Sequence[int], **given: Tensor) -> RoutingSums:
    """Routing sums of [..., E] experts that are zero but for those given."""
    per_expert, per_layer = torch.zeros(tuple(shape), dtype=torch.float64), torch.zeros(tuple(shape)[:-1])
    sums = {
        name: per_expert if name in ("importance", "load", "probability") else per_layer.double()
        for name in RoutingSums.__dataclass_fields__
    }
    sums |= {name: per_expert.long() for name in ("counts", "dropped")}
    sums |= {name: per_layer.long() for name in ("tokens", "sequences", "rows")}
    return RoutingSums(**(sums | given))
