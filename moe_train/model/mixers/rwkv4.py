"""Time mix of RWKV-4: every channel averages its values with fading weights, behind a gate of the token itself.

Source: Peng et al. 2023, arXiv 2305.13048; start values and learning rates of github.com/BlinkDL/RWKV-LM, RWKV-v4(neo).
Legend: B batch, S sequence, D hidden_size.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.config.model import ModelConfig
from moe_train.distributed.context import ContextRanks
from moe_train.model.cost import Elementwise, MixerCost, Product
from moe_train.model.decode_state import CacheSpec, RecurrentState, StateGroup, Tensors
from moe_train.model.layers import Linear
from moe_train.model.mixers.base import Mixer, MixerContext, MixerKind, MixerSpec, Shared, works_on_parts
from moe_train.model.mixers.chunks import all_chunks, join_chunks, own_chunks, split_chunks
from moe_train.model.mixers.lookback import look_back, lookback_state
from moe_train.model.parameters import Computed, InitialValue, OptimRule
from moe_train.ops.wkv import Average, chunk_sums, sums_before, wkv

_LARGEST_DECAY = 20.0  # its exponential is the fading of a token; beyond, nothing but the token before counts anyway
_SUMS = ("values", "weights", "exponent")


class RWKV4Mixer(Mixer):
    """The time mix of one layer."""

    def __init__(self, hidden_size: int, layer: int, num_layers: int, init_std: float, output_std: float) -> None:
        super().__init__()
        self.hidden_size, self.layer, self.num_layers = hidden_size, layer, num_layers
        self.mix_k, self.mix_v, self.mix_r, self.decay, self.first = (
            nn.Parameter(torch.empty(hidden_size)) for _ in range(5)
        )
        self.key, self.value, self.receptance = (Linear(hidden_size, hidden_size, init_std) for _ in range(3))
        self.output = Linear(hidden_size, hidden_size, output_std)

    def initial_values(self) -> dict[str, InitialValue]:
        width, last = self.hidden_size, max(1, self.hidden_size - 1)
        up = self.layer / (self.num_layers - 1) if self.num_layers > 1 else 0.0
        down = 1 - self.layer / self.num_layers
        return {
            "mix_k": Computed(lambda i: (i / width) ** down),
            "mix_v": Computed(lambda i: (i / width) ** down + 0.3 * up),
            "mix_r": Computed(lambda i: (i / width) ** (0.5 * down)),
            "decay": Computed(lambda i: -5 + 8 * (i / last) ** (0.7 + 1.3 * up)),
            "first": Computed(lambda i: math.log(0.3) + 0.5 * ((i + 1) % 3 - 1)),
        }

    def optim_rules(self) -> dict[str, OptimRule]:
        factors = {"mix_k": 1.0, "mix_v": 1.0, "mix_r": 1.0, "decay": 2.0, "first": 3.0}
        return {name: OptimRule(factor, weight_decay=False) for name, factor in factors.items()}

    def new_state(self, spec: CacheSpec) -> StateGroup:
        wide = torch.promote_types(spec.dtype, torch.float32)
        sums = _empty(torch.zeros(spec.batch_size, self.hidden_size, dtype=wide, device=spec.device))
        return StateGroup(average=RecurrentState(sums, self._advance), shift=lookback_state(spec, self.hidden_size))

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, Shared]:
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        (before_BSD,) = look_back(x_BSD, context, context.state and context.state["shift"])
        k_BSD, v_BSD, r_BSD = (
            project(torch.lerp(before_BSD, x_BSD, mix))
            for project, mix in ((self.key, self.mix_k), (self.value, self.mix_v), (self.receptance, self.mix_r))
        )
        begins_BS = (context.tokens.offsets_BS == 0).expand(len(x_BSD), -1)
        new = {"k": k_BSD.to(wide), "v": v_BSD.to(wide), "begins": begins_BS}
        if context.state is not None:
            average_BSD = context.state["average"].append(new)
        elif context.sharing is not None:
            average_BSD = self._average_in_chunks(new, context.sharing)
        else:
            _, average_BSD = self._advance(_empty(new["k"][:, 0]), new, None)
        return self.output((r_BSD.to(wide).sigmoid() * average_BSD).to(x_BSD.dtype)), context.shared

    def _average_in_chunks(self, new: Tensors, ranks: ContextRanks) -> Tensor:
        """Average over rows that ranks share: each chunk from the sums that those before hand on."""
        wide = new["k"].dtype
        w_D = -self.decay.to(wide).clamp(max=_LARGEST_DECAY).exp()
        chunks = {name: split_chunks(tensor) for name, tensor in new.items()}
        own = chunk_sums(chunks["k"], chunks["v"], w_D, chunks["begins"])  # (4, 2B, D)
        everyone = all_chunks(own.transpose(0, 1), ranks)  # (B, 2P, 4, D)
        before = sums_before(everyone.transpose(1, 2)).transpose(1, 2)  # (B, 2P, 3, D)
        entering = dict(zip(_SUMS, own_chunks(before, ranks).unbind(1), strict=True))
        return join_chunks(self._advance(entering, chunks, None)[1])

    def _advance(self, tensors: Tensors, new: Tensors, valid_BS: Tensor | None) -> tuple[Tensors, Tensor]:
        wide = new["k"].dtype
        before = Average(*(tensors[name] for name in _SUMS))
        w_D = -self.decay.to(wide).clamp(max=_LARGEST_DECAY).exp()
        average_BSD, after = wkv(new["k"], new["v"], w_D, self.first.to(wide), before, new["begins"], valid_BS)
        return {name: getattr(after, name) for name in _SUMS}, average_BSD


def _empty(like_BD: Tensor) -> Tensors:
    empty = Average.empty(like_BD)
    return {name: getattr(empty, name) for name in _SUMS}


def _build(spec: MixerSpec) -> RWKV4Mixer:
    model = spec.model
    return RWKV4Mixer(model.hidden_size, spec.layer, model.num_layers, model.init_std, spec.output_std)


def _cost(spec: MixerSpec) -> MixerCost:
    hidden = spec.model.hidden_size
    return MixerCost(
        products=(Product(hidden, hidden, count=4),),
        kept=7 * hidden,
        kept_fp32=15 * hidden,
        work=8 * hidden,
        elementwise=(Elementwise(hidden, 400, 700),),
    )


def _shapes(model: ModelConfig, section: Any) -> dict[str, Any]:
    del model, section
    return {}  # hidden_size is the model's own


RWKV4 = MixerKind(
    _build,
    # Three sums and the last row.
    state_bytes=lambda spec, length, element_bytes: 4 * max(4, element_bytes) * spec.model.hidden_size,
    flops=lambda spec, length: 30.0 * spec.model.hidden_size,  # elementwise; there is no product
    cost=_cost,
    shapes=_shapes,
    reads=frozenset(),  # there are no heads
    part_obstacle=works_on_parts,
)
