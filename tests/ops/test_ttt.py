"""The scan over mini-batches: without learning, without a norm, and against its primal form."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.ops.ttt import InnerNorm, MiniBatches, linear_step, mlp_step, scan
from tests.model.mixers import slow

HEADS, SIZE, BATCH = 2, 4, 6  # heads, head size, tokens of a mini-batch
LENGTH = 3 * BATCH + 5
STEPS = {"linear": linear_step, "mlp": mlp_step}
CLOSE = {"rtol": 0, "atol": 1e-12}  # fp64, values of order 10


def learned(inner: str) -> dict[str, Tensor]:
    """Parameters of an inner model by the names of the layer."""
    generator = torch.Generator().manual_seed(4)
    widths = [(SIZE, SIZE)] if inner == "linear" else [(SIZE, 4 * SIZE), (4 * SIZE, SIZE)]
    shapes: dict[str, tuple[int, ...]] = {"row_delta": (BATCH,)}
    for number, (width_in, width_out) in enumerate(widths, start=1):
        shapes |= {f"w{number}": (HEADS, width_in, width_out), f"b{number}": (HEADS, width_out)}
    shapes |= dict.fromkeys(("inner_norm_weight", "inner_norm_bias"), (HEADS, SIZE))
    return {
        name: (0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()
        for name, shape in shapes.items()
    }


def tokens(length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(HEADS, length, SIZE, dtype=torch.float64, generator=generator) for _ in range(3))
    rates = torch.rand(length, HEADS, dtype=torch.float64, generator=generator)
    return {name: each.requires_grad_() for name, each in (("q", q), ("k", k), ("v", v), ("rates", rates))}


def blocks_of(x_HS: Tensor, batch: int = BATCH) -> Tensor:
    """(H, S, *) -> (1, n, H, b, *); empty columns of the last block are zero."""
    padded = F.pad(x_HS, (0, 0) * (x_HS.dim() - 2) + (0, -x_HS.shape[1] % batch))
    return padded.unflatten(1, (-1, batch)).transpose(0, 1).unsqueeze(0)


def dual(inner: str, parts: dict[str, Tensor], of: dict[str, Tensor]) -> Tensor:
    """[H, S, f] by the scan."""
    length = parts["q"].shape[1]
    rows_b = (1 / torch.arange(1, BATCH + 1).double() + of["row_delta"]).clamp(min=0)
    rates_HS, target = parts["rates"].T, parts["v"] - parts["k"]
    rows_HS = rows_b[torch.arange(length) % BATCH].expand(1, -1)
    batches = MiniBatches(*(blocks_of(x) for x in (parts["q"], parts["k"], target, rates_HS, rows_HS)))
    pairs = [("w1", "b1")] if inner == "linear" else [("w1", "b1"), ("w2", "b2")]
    start = tuple(torch.cat((of[w], of[b].unsqueeze(1)), dim=1).unsqueeze(0) for w, b in pairs)
    norm = InnerNorm(of["inner_norm_weight"].unsqueeze(1), of["inner_norm_bias"].unsqueeze(1), 1e-6)
    numbers = torch.arange(batches.q_BnHbf.shape[1])[None]
    out, _ = scan(STEPS[inner], start, batches, norm, numbers == 0, (numbers + 1) * BATCH <= length, rows_b[-1])
    return out[0].transpose(0, 1).flatten(1, 2)[:, :length]


@pytest.mark.parametrize("inner", STEPS)
def test_the_dual_form_is_the_primal_one_with_gradients(inner):
    """At three mini-batches and an open one; in the primal form every token has weights of its own."""
    parts, of = tokens(LENGTH), learned(inner)
    mixer = SimpleNamespace(inner=inner, mini_batch=BATCH, **of)
    slots = torch.arange(LENGTH) % BATCH
    primal = torch.stack(
        [
            slow._learn(mixer, head, *(parts[name][head] for name in "qkv"), parts["rates"][:, head], slots)
            for head in range(HEADS)
        ]
    )
    found = dual(inner, parts, of)
    torch.testing.assert_close(found, primal, **CLOSE)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [*parts.values(), *of.values()]
    ours, theirs = (torch.autograd.grad((y * upstream).sum(), leaves) for y in (found, primal))
    for name, mine, other in zip([*parts, *of], ours, theirs, strict=True):
        assert other.abs().max() > 1e-3, name
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("inner", STEPS)
def test_at_rate_zero_every_token_sees_the_start(inner):
    parts, of = tokens(LENGTH), learned(inner)
    found = dual(inner, parts | {"rates": torch.zeros_like(parts["rates"])}, of)
    hidden = parts["q"] @ of["w1"] + of["b1"].unsqueeze(1)
    if inner == "mlp":
        hidden = F.gelu(hidden, approximate="tanh") @ of["w2"] + of["b2"].unsqueeze(1)
    normed = F.layer_norm(hidden, (SIZE,), eps=1e-6)
    normed = normed * of["inner_norm_weight"].unsqueeze(1) + of["inner_norm_bias"].unsqueeze(1)
    torch.testing.assert_close(found, parts["q"] + normed, **CLOSE)


class NoNorm:
    """The inner loss 1/2 |z - target|^2."""

    def __call__(self, z: Tensor) -> Tensor:
        return z

    def slope(self, z: Tensor, target: Tensor) -> Tensor:
        return z - target


@pytest.mark.parametrize("has_residual", [False, True])
def test_one_mini_batch_of_a_linear_model_is_linear_attention(has_residual):
    """From zero weights, with factors of 1: Q + tril(Q K^T) (V - K), or V for V - K; the bias adds a running sum."""
    parts = {name: each.detach() for name, each in tokens(LENGTH).items()}
    q, k, v = (parts[name] for name in "qkv")
    target = v - k if has_residual else v
    ones = torch.ones(HEADS, LENGTH, dtype=torch.float64)
    batches = MiniBatches(*(blocks_of(x, LENGTH) for x in (q, k, target, ones, ones[:1])))
    start = (torch.zeros(1, HEADS, SIZE + 1, SIZE, dtype=torch.float64),)
    mark = torch.ones(1, 1, dtype=torch.bool)
    out, _ = scan(linear_step, start, batches, NoNorm(), mark, mark, torch.tensor(1.0).double())
    expected = q + (q @ k.mT).tril() @ target + target.cumsum(1)
    torch.testing.assert_close(out[0, 0], expected, **CLOSE)
