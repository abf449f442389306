"""Time mix of RWKV-7: a state per head that decays, and from which a delta rule takes what a new value replaces.

Every layer mixes its values with those of the first RWKV-7 layer, which go up as a shared tensor.

Source: github.com/BlinkDL/RWKV-LM, RWKV-v7 (names of parameters and start values are its own); Peng et al. 2025,
arXiv 2503.14456.
Legend: B batch, S sequence, D hidden_size, H heads, d = D / H head size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from moe_train.config.base import Section
from moe_train.config.model import ModelConfig
from moe_train.model.cost import Elementwise, MixerCost, Product
from moe_train.model.decode_state import CacheSpec, RecurrentState, StateGroup, Tensors
from moe_train.model.layers import Linear
from moe_train.model.mixers.base import Mixer, MixerContext, MixerKind, MixerSpec, Shared, check_heads
from moe_train.model.mixers.lookback import look_back, lookback_state
from moe_train.model.parameters import Computed, Constant, InitialValue, Normal, OptimRule
from moe_train.ops.rwkv7 import CHUNK, DeltaInputs, advance

FIRST_VALUES = "rwkv7_first_values"
_NORM_EPSILON = 64e-5
_DECAY_SCALE = -math.exp(-0.5)
_MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


class RWKV7Config(Section):
    """Settings of the time mix of RWKV-7: ranks of its low-rank maps. None: from hidden_size, as its authors do."""

    decay_rank: PositiveInt | None = None
    """Rank of the map to the decays (w1, w2); None: 2.5 sqrt(hidden_size), rounded to a multiple of 32."""
    rate_rank: PositiveInt | None = None
    """Rank of the map to the in-context learning rates (a1, a2); None: as decay_rank."""
    value_rank: PositiveInt | None = None
    """Rank of the map to the shares of the first layer's values (v1, v2); None: 1.7 sqrt(hidden_size), rounded."""
    gate_rank: PositiveInt | None = None
    """Rank of the map to the output gate (g1, g2); None: 5 sqrt(hidden_size), rounded."""

    def ranks(self, hidden_size: int) -> dict[str, int]:
        """Return the ranks by the letter of their parameters."""
        given = {"w": (self.decay_rank, 2.5), "a": (self.rate_rank, 2.5)}
        given |= {"v": (self.value_rank, 1.7), "g": (self.gate_rank, 5.0)}
        return {
            letter: rank or max(32, round(factor * math.sqrt(hidden_size) / 32) * 32)
            for letter, (rank, factor) in given.items()
        }


class RWKV7Mixer(Mixer):
    """The time mix of one layer."""

    k_k: nn.Parameter
    k_a: nn.Parameter
    r_k: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    ln_weight: nn.Parameter
    ln_bias: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        ranks: dict[str, int],
        layer: int,
        num_layers: int,
        is_first: bool,
        init_std: float,
        output_std: float,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.init_std = num_heads, hidden_size // num_heads, init_std
        self.layer, self.num_layers, self.is_first = layer, num_layers, is_first
        low_rank = [letter for letter in ranks if letter != "v" or not is_first]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys((*_MIXES, "k_k", "k_a"), (hidden_size,))
        shapes["r_k"] = (num_heads, self.head_dim)
        for letter in low_rank:
            shapes |= {f"{letter}1": (hidden_size, ranks[letter]), f"{letter}2": (ranks[letter], hidden_size)}
        shapes |= {f"{letter}0": (hidden_size,) for letter in low_rank if letter != "g"}
        shapes |= {"ln_weight": (hidden_size,), "ln_bias": (hidden_size,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self._names = tuple(shapes)
        self.receptance, self.key, self.value = (Linear(hidden_size, hidden_size, init_std) for _ in range(3))
        self.output = Linear(hidden_size, hidden_size, output_std)

    def initial_values(self) -> dict[str, InitialValue]:
        return start_values(self.layer, self.num_layers, self.num_heads * self.head_dim, self.head_dim, self.init_std)

    def optim_rules(self) -> dict[str, OptimRule]:
        # As the authors do: matrices of linear maps decay, and nothing else; the decay's bias learns twice as fast.
        return {name: OptimRule(2.0 if name == "w0" else 1.0, weight_decay=False) for name in self._names}

    def new_state(self, spec: CacheSpec) -> StateGroup:
        wide, size = torch.promote_types(spec.dtype, torch.float32), self.head_dim
        state = torch.zeros(spec.batch_size, self.num_heads, size, size, dtype=wide, device=spec.device)
        matrix = RecurrentState({"state": state}, _advance)
        return StateGroup(matrix=matrix, shift=lookback_state(spec, self.num_heads * size))

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, Shared]:
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        (before_BSD,) = look_back(x_BSD, context, context.state and context.state["shift"])
        step_BSD = before_BSD - x_BSD
        x_r, x_w, x_k, x_v, x_a, x_g = (x_BSD + getattr(self, name) * step_BSD for name in _MIXES)
        r_BSD, k_BSD, v_BSD = self.receptance(x_r).to(wide), self.key(x_k).to(wide), self.value(x_v).to(wide)
        log_decay_BSD = _DECAY_SCALE * self._low_rank("w", x_w, wide, torch.tanh).sigmoid()
        rate_BSD = self._low_rank("a", x_a, wide).sigmoid()
        gate_BSD = (x_g @ self.g1).sigmoid() @ self.g2
        first_BSD = v_BSD
        if not self.is_first:
            first_BSD = context.shared[FIRST_VALUES]
            v_BSD = v_BSD + (first_BSD - v_BSD) * self._low_rank("v", x_v, wide).sigmoid()
        kk_BSHd = F.normalize(self._heads(k_BSD * self.k_k.to(wide)), dim=-1, eps=1e-12)
        k_BSD = k_BSD * (1 + (rate_BSD - 1) * self.k_a.to(wide))
        r_BSHd, k_BSHd, v_BSHd = self._heads(r_BSD), self._heads(k_BSD), self._heads(v_BSD)
        new = {
            "r": r_BSHd,
            "log_decay": self._heads(log_decay_BSD),
            "k": k_BSHd,
            "v": v_BSHd,
            "a": -kk_BSHd,
            "b": kk_BSHd * self._heads(rate_BSD),
            "begins": (context.tokens.offsets_BS == 0).expand(len(x_BSD), -1),
        }
        if context.state is not None:
            y_BSHd = context.state["matrix"].append(new)
        else:
            empty = r_BSHd.new_zeros(len(x_BSD), self.num_heads, self.head_dim, self.head_dim)
            _, y_BSHd = _advance({"state": empty}, new, None)
        y_BSHd = F.layer_norm(y_BSHd, (self.head_dim,), eps=_NORM_EPSILON)
        y_BSD = y_BSHd.flatten(2) * self.ln_weight.to(wide) + self.ln_bias.to(wide)
        bonus_BSH1 = (r_BSHd * k_BSHd * self.r_k.to(wide)).sum(-1, keepdim=True)
        y_BSD = y_BSD + (bonus_BSH1 * v_BSHd).flatten(2)
        return self.output(y_BSD.to(x_BSD.dtype) * gate_BSD), context.shared | {FIRST_VALUES: first_BSD}

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.num_heads, self.head_dim))

    def _low_rank(
        self, letter: str, x_BSD: Tensor, dtype: torch.dtype, inner: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Compute the low-rank map of a letter, with its bias."""
        down, up, bias = (getattr(self, f"{letter}{number}") for number in (1, 2, 0))
        low_BSr = x_BSD @ down
        return ((inner(low_BSr) if inner else low_BSr) @ up).to(dtype) + bias.to(dtype)


def _advance(tensors: Tensors, new: Tensors, valid_BS: Tensor | None) -> tuple[Tensors, Tensor]:
    begins_BS = new["begins"]
    inputs = DeltaInputs(*(new[name] for name in ("r", "log_decay", "k", "v", "a", "b")))
    if valid_BS is not None:
        valid = valid_BS[..., None, None]
        inputs = DeltaInputs(inputs.r, inputs.log_decay * valid, inputs.k * valid, inputs.v, inputs.a, inputs.b * valid)
        begins_BS = begins_BS & valid_BS
    y_BSHd, state = advance(inputs, tensors["state"], begins_BS)
    return {"state": state}, y_BSHd


def start_values(layer: int, num_layers: int, width: int, head_dim: int, init_std: float) -> dict[str, InitialValue]:
    """Return the authors' start values, except for the matrices, which are drawn, so that all of them learn at once.

    Args:
        layer: Index of the layer, from 0.
        num_layers: Number of layers.
        width: D, number of channels.
        head_dim: d, channels of a head.
        init_std: Standard deviation of drawn matrices.
    """
    up = layer / (num_layers - 1) if num_layers > 1 else 0.0
    down = 1 - layer / num_layers

    def linear(i: Tensor) -> Tensor:
        return i / max(1, width - 1) - 0.5

    def zigzag(i: Tensor) -> Tensor:
        middle = max(1, head_dim - 1) / 2
        place = (i % head_dim - middle) / middle
        return place * place.abs()

    def decay(i: Tensor) -> Tensor:
        return -6 + 6 * (i / max(1, width - 1)) ** (1 + up**0.3) + 0.5 + 2.5 * zigzag(i)

    powers = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
    values: dict[str, InitialValue] = {name: mix_start(width, power * down) for name, power in powers.items()}
    values |= {
        "w0": Computed(decay),
        "a0": Computed(lambda i: -0.19 + 0.3 * zigzag(i) + 0.4 * linear(i)),
        "v0": Computed(lambda i: 0.73 - 0.4 * linear(i)),
        "k_k": Computed(lambda i: 0.71 - 0.1 * linear(i)),
        "k_a": Constant(1.02),
        "r_k": Constant(-0.04),
        "ln_weight": Constant(1.0),
        "ln_bias": Constant(0.0),
    }
    return values | {f"{letter}{number}": Normal(init_std) for letter in "wavg" for number in (1, 2)}


def mix_start(width: int, power: float) -> Computed:
    """Start value of a share of the token before: 1 - (i / D)^power for channel i."""
    return Computed(lambda i: 1 - (i / width) ** power)


def _build(spec: MixerSpec) -> RWKV7Mixer:
    model = spec.model
    return RWKV7Mixer(
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        ranks=spec.section.ranks(model.hidden_size),
        layer=spec.layer,
        num_layers=model.num_layers,
        is_first=_is_first(spec),
        init_std=model.init_std,
        output_std=spec.output_std,
    )


def _is_first(spec: MixerSpec) -> bool:
    """Return whether no layer below has the same mixer."""
    return spec.model.layer_mixers.index("rwkv7") == spec.layer


def _state_bytes(spec: MixerSpec, length: int, element_bytes: int) -> int:
    del length
    hidden, size = spec.model.hidden_size, spec.model.hidden_size // spec.model.num_heads
    return (hidden * size + hidden) * max(4, element_bytes)


def _flops(spec: MixerSpec, length: int) -> float:
    """Count the state's two reads and two writes, of d^2 per head each, and 30 elementwise operations per channel."""
    del length
    hidden, size = spec.model.hidden_size, spec.model.hidden_size // spec.model.num_heads
    return float(8 * hidden * size + 30 * hidden)


def _cost(spec: MixerSpec) -> MixerCost:
    hidden, heads, ranks = spec.model.hidden_size, spec.model.num_heads, spec.section.ranks(spec.model.hidden_size)
    size = hidden // heads
    products = [Product(hidden, hidden, count=4)]
    for letter in ranks if not _is_first(spec) else [letter for letter in ranks if letter != "v"]:
        products += [Product(hidden, ranks[letter]), Product(ranks[letter], hidden)]
    # Products of a chunk's rows among themselves, with its values, with the state, and of chunks with the state.
    products += [Product(size, CHUNK, count=4 * heads), Product(CHUNK, size, count=8 * heads)]
    products += [Product(size, size, count=(4 + size // CHUNK) * heads)]
    return MixerCost(
        products=tuple(products),
        kept=9 * hidden,
        kept_fp32=44 * hidden + 6 * heads * CHUNK,
        handed_up=hidden,
        work=20 * hidden,
        elementwise=(Elementwise(hidden, 400, 600),),
    )


def _shapes(model: ModelConfig, section: RWKV7Config) -> dict[str, Any]:
    names = {"w": "decay_rank", "a": "rate_rank", "v": "value_rank", "g": "gate_rank"}
    ranks = section.ranks(model.hidden_size)
    return {"model.num_heads": model.num_heads} | {f"model.rwkv7.{names[key]}": rank for key, rank in ranks.items()}


RWKV7 = MixerKind(
    _build,
    _state_bytes,
    _flops,
    _cost,
    section=RWKV7Config,
    check=lambda model, section: check_heads(model, "rwkv7"),
    shapes=_shapes,
    reads=frozenset({"num_heads", "head_dim"}),
)
