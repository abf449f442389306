"""Channel mixes of RWKV: dense feed-forward layers that see the token before, with a squared ReLU.

Source: RWKV-4: Peng et al. 2023, arXiv 2305.13048; RWKV-7: github.com/BlinkDL/RWKV-LM, RWKV-v7.
Legend: B batch, S sequence, D hidden_size, F intermediate_size (4 D for its authors).
"""

import torch
from torch import Tensor, nn

from moe_train.model.cost import Elementwise, FeedForwardCost, Product
from moe_train.model.decode_state import CacheSpec, RecurrentState
from moe_train.model.feed_forward import FeedForward, FeedForwardKind, FeedForwardSpec
from moe_train.model.layers import Linear
from moe_train.model.mixers.base import MixerContext
from moe_train.model.mixers.lookback import look_back, lookback_state
from moe_train.model.parameters import Computed, InitialValue, OptimRule


class RWKVChannelMix(FeedForward):
    """sigmoid(receptance x_r) * value(relu(key x_k)^2), where x_c = mix_c x + (1 - mix_c) times the token before."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, layer: int, num_layers: int, init_std: float, output_std: float
    ) -> None:
        super().__init__()
        self.hidden_size, self.down = hidden_size, 1 - layer / num_layers
        self.mix_k, self.mix_r = nn.Parameter(torch.empty(hidden_size)), nn.Parameter(torch.empty(hidden_size))
        self.key = Linear(hidden_size, intermediate_size, init_std)
        self.receptance = Linear(hidden_size, hidden_size, init_std)
        self.value = Linear(intermediate_size, hidden_size, output_std)

    def initial_values(self) -> dict[str, InitialValue]:
        return dict.fromkeys(("mix_k", "mix_r"), Computed(lambda i: (i / self.hidden_size) ** self.down))

    def optim_rules(self) -> dict[str, OptimRule]:
        return dict.fromkeys(("mix_k", "mix_r"), OptimRule(weight_decay=False))

    def new_state(self, spec: CacheSpec) -> RecurrentState:
        return lookback_state(spec, self.hidden_size)

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, None]:
        (before_BSD,) = look_back(x_BSD, context, context.state)
        inner_BSF = self.key(torch.lerp(before_BSD, x_BSD, self.mix_k)).relu().square()
        gate_BSD = self.receptance(torch.lerp(before_BSD, x_BSD, self.mix_r)).sigmoid()
        return gate_BSD * self.value(inner_BSF), None


class RWKV7ChannelMix(FeedForward):
    """value(relu(key(x + x_k (before - x)))^2), where `before` is the token before."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, layer: int, num_layers: int, init_std: float, output_std: float
    ) -> None:
        super().__init__()
        self.hidden_size, self.down = hidden_size, 1 - layer / num_layers
        self.x_k = nn.Parameter(torch.empty(hidden_size))
        self.key = Linear(hidden_size, intermediate_size, init_std)
        self.value = Linear(intermediate_size, hidden_size, output_std)

    def initial_values(self) -> dict[str, InitialValue]:
        return {"x_k": Computed(lambda i: 1 - (i / self.hidden_size) ** self.down**4)}

    def optim_rules(self) -> dict[str, OptimRule]:
        return {"x_k": OptimRule(weight_decay=False)}

    def new_state(self, spec: CacheSpec) -> RecurrentState:
        return lookback_state(spec, self.hidden_size)

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, None]:
        (before_BSD,) = look_back(x_BSD, context, context.state)
        return self.value(self.key(torch.lerp(x_BSD, before_BSD, self.x_k)).relu().square()), None


def _cost(spec: FeedForwardSpec, num_mixes: int) -> FeedForwardCost:
    hidden, inner = spec.model.hidden_size, spec.model.intermediate_size
    gates = num_mixes - 1  # all mixes but the key's are of gates
    return FeedForwardCost(
        products=(Product(hidden, inner), Product(inner, hidden), *(Product(hidden, hidden),) * gates),
        # The input and the token before, each mix, the ReLU and its square, and a gate with what it multiplies.
        kept=(2 + num_mixes + 2 * gates) * hidden + 2 * inner,
        work=3 * inner,
        elementwise=(
            Elementwise(inner, forward=16, backward=24, is_narrow=True),
            Elementwise(hidden, forward=20 + 16 * num_mixes, backward=24 + 32 * num_mixes, is_narrow=True),
        ),
    )


def _state_bytes(spec: FeedForwardSpec, element_bytes: int) -> int:
    return max(4, element_bytes) * spec.model.hidden_size


def _make_kind(channel_mix: type[RWKVChannelMix] | type[RWKV7ChannelMix], num_mixes: int) -> FeedForwardKind:
    def build(spec: FeedForwardSpec) -> FeedForward:
        model = spec.model
        sizes = (model.hidden_size, model.intermediate_size, spec.layer, model.num_layers)
        return channel_mix(*sizes, model.init_std, spec.output_std)

    return FeedForwardKind(build, lambda spec: _cost(spec, num_mixes), _state_bytes, takes_sequence_parts=True)


RWKV_CHANNEL_MIX = _make_kind(RWKVChannelMix, 2)
RWKV7_CHANNEL_MIX = _make_kind(RWKV7ChannelMix, 1)
