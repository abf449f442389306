"""Test-time training: an inner model that learns the sequence by gradient descent, mini-batch by mini-batch.

Token j of a mini-batch has the inner loss 1/2 |LN(f(k_j)) - (v_j - k_j)|^2, with its gradient G_j at the weights W with
which the mini-batch begins. Token i sees W_i = W - row_i (rate_1 G_1 + ... + rate_i G_i), and gives
q_i + LN(f_{W_i}(q_i)). The next mini-batch begins with W_i of the last token. In this dual form no W_i is formed: a
gradient is a product of an input and a slope, so that f_{W_i}(q_i) is f_W(q_i) less a causal product of queries, keys
and slopes.

A bias is the last row of its weight matrix, for inputs that end with a one.

Source: Sun et al. 2024, arXiv 2407.04620, section 2.5; the rows' factors are those of the authors' code, cd831db.
Legend: B batch, H heads, n mini-batches, b tokens of a mini-batch, f head size, m inner width; *1 has one element more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_train.ops.kernels import linear_scan_kernels_for

KEPT_EVERY = 4  # mini-batches between weights that are kept for the backward pass, as in the authors' JAX code
_GELU_SLOPE, _GELU_CUBE = (2 / torch.pi) ** 0.5, 0.044715

Weights = tuple[Tensor, ...]
"""Weights of the inner model, or sums of gradients: [B, H, f + 1, f], or [B, H, f + 1, m] and [B, H, m + 1, f]."""


@dataclass(frozen=True)
class InnerNorm:
    """Layer norm of the inner model's output; weight and bias [H, 1, f], epsilon beside the biased variance."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, z_BHbf: Tensor) -> Tensor:
        normed = F.layer_norm(z_BHbf, z_BHbf.shape[-1:], eps=self.epsilon)
        return normed * self.weight + self.bias

    def slope(self, z_BHbf: Tensor, target_BHbf: Tensor) -> Tensor:
        """Compute the gradient of 1/2 |LN(z) - target|^2 with respect to z."""
        centred = z_BHbf - z_BHbf.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        hat = centred * scale
        slope = (self.weight * hat + self.bias - target_BHbf) * self.weight
        return (slope - slope.mean(-1, keepdim=True) - hat * (slope * hat).mean(-1, keepdim=True)) * scale


@dataclass(frozen=True)
class MiniBatch:
    """Tokens of one mini-batch; those of an empty column have rate 0.

    Attributes:
        q_BHbf: Queries.
        k_BHbf: Keys.
        target_BHbf: Values less keys.
        rates_BHb: Learning rate of each token.
        rows_B1b: Factor of each token's own output.
    """

    q_BHbf: Tensor
    k_BHbf: Tensor
    target_BHbf: Tensor
    rates_BHb: Tensor
    rows_B1b: Tensor

    @property
    def steps_BHbb(self) -> Tensor:
        """Factor row_i * rate_j of the gradient of token j in the weights of token i, 0 for j > i."""
        return (self.rows_B1b.unsqueeze(-1) * self.rates_BHb.unsqueeze(-2)).tril()


@dataclass(frozen=True)
class MiniBatches:
    """Tokens of all mini-batches of a sequence, with the fields of `MiniBatch`."""

    q_BnHbf: Tensor
    k_BnHbf: Tensor
    target_BnHbf: Tensor
    rates_BnHb: Tensor
    rows_Bn1b: Tensor

    def unbind(self) -> list[MiniBatch]:
        """Return one mini-batch after the other."""
        return [MiniBatch(*parts) for parts in zip(*(each.unbind(1) for each in vars(self).values()), strict=True)]


# A step takes the weights at the start of the mini-batch, the sums of gradients of the tokens that it has already got
# (None: it is empty) and its new tokens. It returns f_{W_i}(q_i) and the sums of the new tokens' gradients.
InnerStep = Callable[[Weights, Weights | None, MiniBatch, InnerNorm], tuple[Tensor, Weights]]


def linear_step(weights: Weights, sums: Weights | None, batch: MiniBatch, norm: InnerNorm) -> tuple[Tensor, Weights]:
    """Take the step of the inner model x w + b."""
    (w,) = weights
    q1, k1 = _with_one(batch.q_BHbf), _with_one(batch.k_BHbf)
    slope = norm.slope(k1 @ w, batch.target_BHbf)
    z = _product(q1, w, sums[0] if sums else None, batch) - (batch.steps_BHbb * (q1 @ k1.mT)) @ slope
    return z, (_sum(batch, k1, slope),)


def mlp_step(weights: Weights, sums: Weights | None, batch: MiniBatch, norm: InnerNorm) -> tuple[Tensor, Weights]:
    """Take the step of the inner model gelu(x w1 + b1) w2 + b2."""
    w1, w2 = weights
    q1, k1, steps = _with_one(batch.q_BHbf), _with_one(batch.k_BHbf), batch.steps_BHbb
    hidden = k1 @ w1
    features1 = _with_one(F.gelu(hidden, approximate="tanh"))
    slope2 = norm.slope(features1 @ w2, batch.target_BHbf)
    slope1 = (slope2 @ w2[..., :-1, :].mT) * gelu_slope(hidden)
    hidden_q = _product(q1, w1, sums[0] if sums else None, batch) - (steps * (q1 @ k1.mT)) @ slope1
    features_q1 = _with_one(F.gelu(hidden_q, approximate="tanh"))
    z = _product(features_q1, w2, sums[1] if sums else None, batch) - (steps * (features_q1 @ features1.mT)) @ slope2
    return z, (_sum(batch, k1, slope1), _sum(batch, features1, slope2))


def scan(
    step: InnerStep,
    start: Weights,
    batches: MiniBatches,
    norm: InnerNorm,
    begins_Bn: Tensor,
    is_full_Bn: Tensor,
    last_row: Tensor,
    carried: tuple[Weights, Weights] | None = None,
    begins_at_first_only: bool = False,
) -> tuple[Tensor, tuple[Weights, Weights] | None]:
    """Go through the mini-batches of a sequence, where nothing is carried by one Triton kernel if there is one for it.

    Else it is a loop, which in training keeps the weights of every fourth mini-batch.

    Args:
        step: Step of the inner model.
        start: Weights with which a document begins, [1, H, ...].
        batches: Tokens.
        norm: Norm of the inner model.
        begins_Bn: bool, whether the mini-batch begins a document.
        is_full_Bn: bool, whether the mini-batch has its last token.
        last_row: Factor row_b of the last token, a scalar.
        carried: Weights and open sums before the first token; None: every row begins with a document.
        begins_at_first_only: Whether, as the host knows, no later mini-batch than the first begins a document.

    Returns:
        q_i + LN(f_{W_i}(q_i)), [B, n, H, b, f], and the weights and open sums after the last token; None if none were
        carried.
    """
    if carried is not None:
        return _scan_with_sums(step, start, batches, norm, begins_Bn, is_full_Bn, last_row, carried)
    if step is linear_step and (kernels := linear_scan_kernels_for(batches.q_BnHbf)):
        return _scan_by_kernel(kernels, start[0], batches, norm, begins_Bn, is_full_Bn, last_row), None
    weights, outputs, each = start, list[Tensor](), batches.unbind()
    for first in range(0, len(each), KEPT_EVERY):
        numbers = range(first, min(first + KEPT_EVERY, len(each)))

        def run(*weights: Tensor, numbers: range = numbers) -> tuple[Tensor, ...]:
            found = []
            for number in numbers:
                if number and not begins_at_first_only:
                    weights = tuple(_choose(begins_Bn[:, number], s, w) for s, w in zip(start, weights, strict=True))
                batch = each[number]
                z, sums = step(weights, None, batch, norm)
                found.append(batch.q_BHbf + norm(z))
                weights = _learn(weights, sums, is_full_Bn[:, number], last_row)
            return *found, *weights

        keeps = torch.is_grad_enabled() and len(each) > KEPT_EVERY
        # The form that is not reentrant: it sees tensors alone, and nothing of it is a module.
        results = checkpoint(run, *weights, use_reentrant=False, preserve_rng_state=False) if keeps else run(*weights)
        outputs += results[: len(numbers)]
        weights = results[len(numbers) :]
    return torch.stack(outputs, dim=1), None


def _scan_by_kernel(
    kernels: ModuleType,
    start: Tensor,
    batches: MiniBatches,
    norm: InnerNorm,
    begins_Bn: Tensor,
    is_full_Bn: Tensor,
    last_row: Tensor,
) -> Tensor:
    batch, num_batches, _, size, _ = batches.q_BnHbf.shape
    rows_Bnb = batches.rows_Bn1b.squeeze(2).expand(batch, num_batches, size)
    marks = (mark.expand(batch, num_batches) for mark in (begins_Bn, is_full_Bn))
    tokens = (batches.q_BnHbf, batches.k_BnHbf, batches.target_BnHbf, batches.rates_BnHb, rows_Bnb)
    norm_Hf = (norm.weight.squeeze(1), norm.bias.squeeze(1))
    out: Tensor = kernels.LinearScan.apply(*tokens, start.squeeze(0), *norm_Hf, last_row, *marks, norm.epsilon)
    return out


def _scan_with_sums(
    step: InnerStep,
    start: Weights,
    batches: MiniBatches,
    norm: InnerNorm,
    begins_Bn: Tensor,
    is_full_Bn: Tensor,
    last_row: Tensor,
    carried: tuple[Weights, Weights],
) -> tuple[Tensor, tuple[Weights, Weights]]:
    """Do the same from a state, whose mini-batches may be open before the first token and after the last one."""
    weights, sums = carried
    outputs = []
    for number, batch in enumerate(batches.unbind()):
        begins_B, is_full_B = begins_Bn[:, number], is_full_Bn[:, number]
        weights = tuple(_choose(begins_B, s, w) for s, w in zip(start, weights, strict=True))
        sums = tuple(_choose(begins_B, torch.zeros_like(s), s) for s in sums)
        z, added = step(weights, sums, batch, norm)
        outputs.append(batch.q_BHbf + norm(z))
        sums = tuple(s + a for s, a in zip(sums, added, strict=True))
        weights = _learn(weights, sums, is_full_B, last_row)
        sums = tuple(_choose(is_full_B, torch.zeros_like(s), s) for s in sums)
    return torch.stack(outputs, dim=1), (weights, sums)


def gelu_slope(x: Tensor) -> Tensor:
    """Compute the derivative of the tanh form of GELU."""
    tanh = torch.tanh(_GELU_SLOPE * (x + _GELU_CUBE * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * _GELU_SLOPE * (1 + 3 * _GELU_CUBE * x.square())


def _with_one(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)


def _product(x1: Tensor, weight: Tensor, sums: Tensor | None, batch: MiniBatch) -> Tensor:
    """Apply the weights that the gradients of earlier tokens of an open mini-batch give to each row."""
    return x1 @ weight if sums is None else x1 @ weight - batch.rows_B1b.unsqueeze(-1) * (x1 @ sums)


def _sum(batch: MiniBatch, x1: Tensor, slope: Tensor) -> Tensor:
    return (batch.rates_BHb.unsqueeze(-1) * x1).mT @ slope


def _learn(weights: Weights, sums: Weights, is_full_B: Tensor, last_row: Tensor) -> Weights:
    """Return the weights after a mini-batch: those of its last token, or the same while it is open."""
    factor_B111 = (is_full_B * last_row).view(-1, 1, 1, 1)
    return tuple(w - factor_B111 * s for w, s in zip(weights, sums, strict=True))


def _choose(chosen_B: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen_B.view(-1, 1, 1, 1), one, other)
