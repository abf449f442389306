"""TTT layers: a recurrent layer whose state is an inner model, linear or an MLP, that learns the sequence as it comes.

Source: Sun et al. 2024, arXiv 2407.04620; github.com/test-time-training/ttt-lm-pytorch, cd831db.
Legend: B batch, S sequence, D hidden_size, H heads, f = D / H head size, b mini-batch, n mini-batches, m inner width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from moe_train.config.base import Section
from moe_train.config.model import ModelConfig
from moe_train.model.cost import Elementwise, MixerCost, Product
from moe_train.model.decode_state import CacheSpec, DecodeState, RecurrentState, StateGroup, Tensors
from moe_train.model.layers import LayerNorm, Linear
from moe_train.model.mixers.base import Mixer, MixerContext, MixerKind, MixerSpec, Shared, check_heads
from moe_train.model.mixers.lookback import look_back, lookback_state
from moe_train.model.parameters import Constant, InitialValue, Normal, OptimRule
from moe_train.ops.aligned_blocks import AlignedBlocks, align
from moe_train.ops.rotary import apply_rotary
from moe_train.ops.ttt import KEPT_EVERY, InnerNorm, InnerStep, MiniBatches, Weights, linear_step, mlp_step, scan

InnerKind = Literal["linear", "mlp"]

_EPSILON = 1e-6
_CONV_WIDTH = 4  # tokens that a short convolution sees, the own one included
_EXPANSION = 4  # inner width of the MLP, in head sizes
_MATRICES = ("w1", "w2", "lr_weight", "conv_q", "conv_k")  # drawn at the start, and decayed; norms and biases are not
_READS = frozenset({"num_heads", "head_dim", "rope_theta"})
_FIRST_RATE = 0.1  # share of the inner learning rate of an MLP with which warm-up begins


class TTTLinearConfig(Section):
    """Settings of a TTT layer with a linear inner model."""

    mini_batch: PositiveInt = 16
    """Tokens whose gradients are taken at the same weights."""
    inner_learning_rate: NonNegativeFloat = 1.0
    """Highest learning rate of the inner model, before it is divided by the head size."""
    gate: bool = False
    """True: the output is multiplied by GELU(gate x)."""
    short_conv: bool = False
    """True: queries and keys are two causal convolutions, over 4 tokens of each channel, of one shared projection."""


class TTTMLPConfig(TTTLinearConfig):
    """Settings of a TTT layer with an MLP as inner model."""

    inner_learning_rate: NonNegativeFloat = 0.1
    """Highest learning rate of the inner model, before it is divided by the head size. It rises from a tenth of it over
    optim.warmup_steps."""


class TTTMixer(Mixer):
    """A layer whose state is the weights of an inner model, which every document trains from the same learned start."""

    row_delta: nn.Parameter
    lr_weight: nn.Parameter
    lr_bias: nn.Parameter
    inner_norm_weight: nn.Parameter
    inner_norm_bias: nn.Parameter
    w1: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter
    conv_q: nn.Parameter
    conv_q_bias: nn.Parameter
    conv_k: nn.Parameter
    conv_k_bias: nn.Parameter
    warm: Tensor

    def __init__(
        self,
        inner: InnerKind,
        hidden_size: int,
        num_heads: int,
        mini_batch: int,
        inner_learning_rate: float,
        rope_theta: float,
        init_std: float,
        output_std: float,
        has_gate: bool = False,
        has_short_conv: bool = False,
    ) -> None:
        super().__init__()
        self.inner: InnerKind = inner
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.mini_batch, self.inner_learning_rate, self.rope_theta = mini_batch, inner_learning_rate, rope_theta
        self.init_std = init_std
        self.query = Linear(hidden_size, hidden_size, init_std)
        self.key = None if has_short_conv else Linear(hidden_size, hidden_size, init_std)
        self.value = Linear(hidden_size, hidden_size, init_std)
        self.output = Linear(hidden_size, hidden_size, output_std)
        self.gate = Linear(hidden_size, hidden_size, init_std) if has_gate else None
        self.post_norm = LayerNorm(hidden_size, _EPSILON)
        self._shapes = {
            "row_delta": (mini_batch,),
            "lr_weight": (num_heads, hidden_size),
            "lr_bias": (num_heads,),
            "inner_norm_weight": (num_heads, self.head_dim),
            "inner_norm_bias": (num_heads, self.head_dim),
        }
        for number, (width_in, width_out) in enumerate(_inner_widths(inner, self.head_dim), start=1):
            self._shapes[f"w{number}"] = (num_heads, width_in, width_out)
            self._shapes[f"b{number}"] = (num_heads, width_out)
        if has_short_conv:
            for name in ("conv_q", "conv_k"):
                self._shapes[name] = (hidden_size, _CONV_WIDTH)
                self._shapes[f"{name}_bias"] = (hidden_size,)
        for name, shape in self._shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if inner == "mlp":
            # A buffer, so that a checkpoint taken during warm-up is evaluated with the rate that it was trained with.
            self.register_buffer("warm", torch.empty(1, dtype=torch.float32))

    def initial_values(self) -> dict[str, InitialValue]:
        zeros: dict[str, InitialValue] = {name: Constant(0.0) for name in self._shapes}
        drawn: dict[str, InitialValue] = {name: Normal(self.init_std) for name in _MATRICES if name in self._shapes}
        return zeros | drawn | {"inner_norm_weight": Constant(1.0), "warm": Constant(_FIRST_RATE)}

    def optim_rules(self) -> dict[str, OptimRule]:
        return {name: OptimRule(weight_decay=False) for name in self._shapes if name not in _MATRICES}

    def warm_up(self, share: float) -> None:
        if self.inner == "mlp":
            self.warm.fill_(_FIRST_RATE + share * (1 - _FIRST_RATE))

    def new_state(self, spec: CacheSpec) -> DecodeState:
        wide = torch.promote_types(spec.dtype, torch.float32)
        tensors = {}
        for number, (width_in, width_out) in enumerate(_inner_widths(self.inner, self.head_dim), start=1):
            # Zeros: the weights are set to the learned start at the first token of a document.
            shape = (spec.batch_size, self.num_heads, width_in + 1, width_out)
            for name in (f"weights{number}", f"sums{number}"):
                tensors[name] = torch.zeros(shape, dtype=wide, device=spec.device)
        inner = RecurrentState(tensors, self._advance)
        if self.key is not None:
            return StateGroup(inner=inner)
        width = self.num_heads * self.head_dim
        return StateGroup(inner=inner, conv=lookback_state(spec, width, _CONV_WIDTH - 1))

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, Shared]:
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        angles = context.block_angles(self.mini_batch, self.head_dim, self.rope_theta, wide)
        q_BSD, k_BSD = self._queries_and_keys(x_BSD, context, wide)
        q_BHSf, k_BHSf, v_BHSf = (
            part.to(wide).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (q_BSD, k_BSD, self.value(x_BSD))
        )
        new = {
            "queries": apply_rotary(q_BHSf, *angles).transpose(1, 2),
            "keys": apply_rotary(k_BHSf, *angles).transpose(1, 2),
            "values": v_BHSf.transpose(1, 2),
            "rates": self._rates(x_BSD.to(wide)),
            "offsets": context.tokens.offsets_BS.expand(len(x_BSD), -1),
        }
        if context.state is not None:
            blocks = context.state_blocks(self.mini_batch, len(x_BSD), is_compact=True)
            mixed_BSHf = context.state["inner"].append(new, partial(self._advance, blocks=blocks))
        else:
            mixed_BSHf, _ = self._learn(new, context.aligned_blocks(self.mini_batch), None)
        y_BSD = self.post_norm(mixed_BSHf.flatten(2)).to(x_BSD.dtype)
        if self.gate is not None:
            y_BSD = F.gelu(self.gate(x_BSD), approximate="tanh") * y_BSD
        return self.output(y_BSD), context.shared

    def _queries_and_keys(self, x_BSD: Tensor, context: MixerContext, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        own_BSD = self.query(x_BSD)
        if self.key is not None:
            return own_BSD, self.key(x_BSD)
        own_BSD = own_BSD.to(wide)
        state = context.state["conv"] if context.state is not None else None
        rows = [own_BSD, *look_back(own_BSD, context, state, _CONV_WIDTH - 1)]

        def convolve(weight_DK: Tensor, bias_D: Tensor) -> Tensor:
            # The last column of the weight is that of the own token.
            terms = (row * weight for row, weight in zip(rows, weight_DK.to(wide).flip(1).unbind(1), strict=True))
            return torch.stack(list(terms)).sum(0) + bias_D.to(wide)

        return convolve(self.conv_q, self.conv_q_bias), convolve(self.conv_k, self.conv_k_bias)

    def _rates(self, x_BSD: Tensor) -> Tensor:
        """Compute the inner learning rate of every token and head. [B, S, H]."""
        highest = self.inner_learning_rate / self.head_dim
        rates_BSH = F.linear(x_BSD, self.lr_weight.to(x_BSD.dtype), self.lr_bias.to(x_BSD.dtype)).sigmoid() * highest
        return rates_BSH * self.warm.to(x_BSD.dtype) if self.inner == "mlp" else rates_BSH

    def _advance(
        self, tensors: Tensors, new: Tensors, valid_BS: Tensor | None, blocks: AlignedBlocks | None = None
    ) -> tuple[Tensors, Tensor]:
        names = ("weights1", "weights2")[: len(tensors) // 2], ("sums1", "sums2")[: len(tensors) // 2]
        weights, sums = (tuple(tensors[name] for name in each) for each in names)
        blocks = blocks or align(new["offsets"], self.mini_batch, valid_BS, is_compact=True)
        mixed_BSHf, after = self._learn(new, blocks, (weights, sums))
        assert after is not None, "what is carried in is carried out"
        pairs = (zip(each, values, strict=True) for each, values in zip(names, after, strict=True))
        return {name: value for pair in pairs for name, value in pair}, mixed_BSHf

    def _learn(
        self, new: Tensors, blocks: AlignedBlocks, carried: tuple[Weights, Weights] | None
    ) -> tuple[Tensor, tuple[Weights, Weights] | None]:
        """Let the inner model learn new tokens: return its outputs [B, S, H, f], and its weights and open sums."""
        wide, length = new["queries"].dtype, new["queries"].shape[1]
        numbers_b = torch.arange(1, self.mini_batch + 1, device=new["offsets"].device)
        rows_b = (1 / numbers_b.to(wide) + self.row_delta.to(wide)).clamp(min=0)
        rows_BS = rows_b[new["offsets"] % self.mini_batch]
        parts = [new["queries"], new["keys"], new["values"] - new["keys"], new["rates"], rows_BS.unsqueeze(-1)]
        batches = MiniBatches(
            *(blocks.split(part).transpose(2, 3) for part in parts)
        )  # (B, S, H, *) -> (B, n, H, b, *)
        weight, bias = (part.to(wide).unsqueeze(1) for part in (self.inner_norm_weight, self.inner_norm_bias))
        outputs_BnHbf, after = scan(
            _STEPS[self.inner],
            self._start(wide),
            batches,
            InnerNorm(weight, bias, _EPSILON),
            blocks.begins_Bn,
            blocks.is_full_Bn,
            rows_b[-1],
            carried,
            begins_at_first_only=blocks.places_BS is None,
        )
        return blocks.join(outputs_BnHbf.transpose(2, 3), length), after

    def _start(self, dtype: torch.dtype) -> Weights:
        """Join the learned weights and biases with which a document begins. [1, H, ...]."""
        pairs = [(self.w1, self.b1)] if self.inner == "linear" else [(self.w1, self.b1), (self.w2, self.b2)]
        return tuple(torch.cat((weight, bias.unsqueeze(1)), dim=1).to(dtype).unsqueeze(0) for weight, bias in pairs)


_STEPS: dict[InnerKind, InnerStep] = {"linear": linear_step, "mlp": mlp_step}


def _inner_widths(inner: InnerKind, size: int) -> list[tuple[int, int]]:
    """Return the input and output width of each layer of the inner model."""
    return [(size, size)] if inner == "linear" else [(size, _EXPANSION * size), (_EXPANSION * size, size)]


def _make_kind(inner: InnerKind, section: type[TTTLinearConfig]) -> MixerKind:
    name = f"ttt_{inner}"

    def build(spec: MixerSpec) -> TTTMixer:
        model, own = spec.model, spec.section
        return TTTMixer(
            inner,
            model.hidden_size,
            model.num_heads,
            own.mini_batch,
            own.inner_learning_rate,
            model.rope_theta,
            model.init_std,
            spec.output_std,
            own.gate,
            own.short_conv,
        )

    def check(model: ModelConfig, own: TTTLinearConfig) -> None:
        del own
        check_heads(model, name)

    def state_bytes(spec: MixerSpec, length: int, element_bytes: int) -> int:
        del length
        hidden, heads = spec.model.hidden_size, spec.model.num_heads
        weights = sum((width_in + 1) * width_out for width_in, width_out in _inner_widths(inner, hidden // heads))
        conv = (_CONV_WIDTH - 1) * hidden if spec.section.short_conv else 0
        return (2 * heads * weights + conv) * max(4, element_bytes)

    def flops(spec: MixerSpec, length: int) -> float:
        del length
        heads, size = spec.model.num_heads, spec.model.hidden_size // spec.model.num_heads
        weights, scores = {"linear": (6, 4), "mlp": (56, 20)}[inner]
        return float(heads * (weights * size**2 + scores * spec.section.mini_batch * size))

    def shapes(model: ModelConfig, own: TTTLinearConfig) -> dict[str, Any]:
        fields = {f"model.{name}.{field}": getattr(own, field) for field in ("mini_batch", "gate", "short_conv")}
        return {"model.num_heads": model.num_heads} | fields

    return MixerKind(
        build, state_bytes, flops, _cost_of(inner), section=section, check=check, shapes=shapes, reads=_READS
    )


def _cost_of(inner: InnerKind) -> Callable[[MixerSpec], MixerCost]:
    def cost(spec: MixerSpec) -> MixerCost:
        hidden, heads, batch = spec.model.hidden_size, spec.model.num_heads, spec.section.mini_batch
        size = hidden // heads
        projections = 4 + spec.section.gate - spec.section.short_conv
        products = [Product(hidden, hidden, count=projections), Product(hidden, heads)]
        for width_in, width_out in _inner_widths(inner, size):
            # In a mini-batch: what keys and queries give, the gradient, and the products of rows among themselves.
            products.append(Product(width_in, width_out, count=3 * heads))
            products += [Product(width_in, batch, count=heads), Product(batch, width_out, count=heads)]
        widest = 1 if inner == "linear" else _EXPANSION
        weights = heads * sum((width_in + 1) * width_out for width_in, width_out in _inner_widths(inner, size))
        return MixerCost(
            products=tuple(products),
            kept=(2 + 2 * spec.section.gate) * hidden,
            # Queries, keys, targets and outputs, and the weights of some mini-batches. The rest is computed again.
            kept_fp32=(4 + 4 * spec.section.short_conv) * hidden + heads + weights // (KEPT_EVERY * batch),
            work=(6 + 6 * widest) * hidden,
            elementwise=(Elementwise(hidden, 160, 240), Elementwise(widest * hidden, 40, 80)),
        )

    return cost


TTT_LINEAR = _make_kind("linear", TTTLinearConfig)
TTT_MLP = _make_kind("mlp", TTTMLPConfig)
