"""A recurrent mixer: a decayed sum of values, mixed in every layer with the values of the first.

Legend: B batch, S sequence, D hidden_size.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from moe_train.config.base import Section
from moe_train.config.errors import UsageError
from moe_train.config.model import ModelConfig
from moe_train.model.cost import Elementwise, MixerCost, Product
from moe_train.model.decode_state import CacheSpec, RecurrentState, Tensors
from moe_train.model.layers import Linear
from moe_train.model.mixers.base import Mixer, MixerContext, MixerKind, MixerSpec, Shared
from moe_train.model.parameters import Computed, InitialValue, OptimRule


class DecayConfig(Section):
    """Settings of the decayed sum."""

    slowest: float = Field(0.9, gt=0.0, lt=1.0)
    """Decay of the last channel at the start; that of the first is 0.1."""


class DecayMixer(Mixer):
    """s_t = decay s_{t-1} + v_t from the document's first token on; y = output(s)."""

    def __init__(self, hidden_size: int, slowest: float, init_std: float, output_std: float) -> None:
        super().__init__()
        self.slowest = slowest
        self.decay = nn.Parameter(torch.empty(hidden_size))
        self.value = Linear(hidden_size, hidden_size, init_std)
        self.output = Linear(hidden_size, hidden_size, output_std)

    def initial_values(self) -> dict[str, InitialValue]:
        last = max(1, self.decay.numel() - 1)
        return {"decay": Computed(lambda places: 0.1 + (self.slowest - 0.1) * places / last)}

    def optim_rules(self) -> dict[str, OptimRule]:
        return {"decay": OptimRule(lr_factor=0.5, weight_decay=False)}

    def new_state(self, spec: CacheSpec) -> RecurrentState:
        # The module is called, not its parameters read, so that a state can be made before weights are gathered.
        return RecurrentState(self._empty(spec.batch_size, spec.device), self.advance)

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, Shared]:
        own_BSD = self.value(x_BSD)
        first_BSD = context.shared.get("first_values", own_BSD)
        is_first_BS = (context.tokens.offsets_BS == 0).expand(len(x_BSD), -1)
        new = {"value": (own_BSD + first_BSD) / 2, "is_first": is_first_BS}
        if context.state is not None:
            sums_BSD = context.state.append(new)
        else:
            _, sums_BSD = self.advance(self._empty(len(x_BSD), x_BSD.device), new, None)
        return self.output(sums_BSD.to(x_BSD.dtype)), context.shared | {"first_values": first_BSD}

    def advance(self, tensors: Tensors, new: Tensors, valid_BS: Tensor | None) -> tuple[Tensors, Tensor]:
        """Token by token: a reference, not a fast one."""
        sum_BD, sums = tensors["sum"], []
        for place in range(new["value"].shape[1]):
            kept_BD = torch.where(new["is_first"][:, place, None], 0.0, sum_BD * self.decay.to(sum_BD.dtype))
            next_BD = kept_BD + new["value"][:, place]
            sum_BD = next_BD if valid_BS is None else torch.where(valid_BS[:, place, None], next_BD, sum_BD)
            sums.append(sum_BD)
        return {"sum": sum_BD}, torch.stack(sums, dim=1)

    def _empty(self, batch_size: int, device: torch.device) -> Tensors:
        wide = torch.promote_types(self.decay.dtype, torch.float32)
        return {"sum": torch.zeros(batch_size, self.value.out_features, dtype=wide, device=device)}


def _build(spec: MixerSpec) -> DecayMixer:
    return DecayMixer(spec.model.hidden_size, spec.section.slowest, spec.model.init_std, spec.output_std)


def _check(model: ModelConfig, section: DecayConfig) -> None:
    if section.slowest <= 0.1:
        raise UsageError(f"model.decay.slowest ({section.slowest}) must be above 0.1, the decay of the first channel")
    del model


def _cost(spec: MixerSpec) -> MixerCost:
    width = spec.model.hidden_size
    return MixerCost(
        products=(Product(width, width, count=2),),
        kept=2 * width,
        kept_fp32=width,
        handed_up=width,
        work=2 * width,
        elementwise=(Elementwise(width, forward=12, backward=20),),
    )


def _shapes(model: ModelConfig, section: Any) -> dict[str, Any]:
    del model, section
    return {}  # hidden_size is the model's own


KIND = MixerKind(
    build=_build,
    state_bytes=lambda spec, length, element_bytes: max(4, element_bytes) * spec.model.hidden_size,
    flops=lambda spec, length: 2.0 * spec.model.hidden_size,
    cost=_cost,
    section=DecayConfig,
    check=_check,
    shapes=_shapes,
)
