"""The block: where norms stand, and what is handed on."""

import pytest
import torch

from moe_train.model.block import Block
from moe_train.model.feed_forward import FeedForward
from moe_train.model.layers import make_norm
from moe_train.model.mixers.base import Mixer, MixerContext
from moe_train.model.token_index import TokenIndex
from moe_train.ops.norms import layer_norm, rms_norm

HIDDEN = 6


class Scaled(Mixer):
    """F(x) = factor * x^2: no mixing, not linear."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x_BSD, context):
        return self.factor * x_BSD**2, context.shared


class ScaledLayer(FeedForward):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x_BSD, context):
        return self.factor * x_BSD**2, None


def make(position, kind="rmsnorm", mixer=0.0, feed_forward=0.0):
    norms = [make_norm(kind, HIDDEN, 1e-5).double() for _ in range(2)]
    for i, norm in enumerate(norms):
        for j, parameter in enumerate(norm.parameters()):
            parameter.data = torch.linspace(0.5, 1.5 + i, HIDDEN, dtype=torch.float64) - j
    return Block(Scaled(mixer), ScaledLayer(feed_forward), norms[0], norms[1], position)


def run(block, x):
    positions = torch.arange(x.shape[1])[None]
    shared = {"below": torch.ones(1)}
    return block(x, MixerContext(0, TokenIndex(positions, positions, None, positions), shared))


def norm(block, which, kind, x):
    module = (block.mixer_norm, block.feed_forward_norm)[which]
    parameters = list(module.parameters())
    return rms_norm(x, *parameters, 1e-5) if kind == "rmsnorm" else layer_norm(x, *parameters, 1e-5)


X = torch.randn(2, 3, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_without_an_update_pre_norm_is_the_identity_and_post_norm_the_norm(kind):
    assert torch.equal(run(make("pre", kind), X).x_BSD, X)
    block = make("post", kind)
    expected = norm(block, 1, kind, norm(block, 0, kind, X))
    assert torch.equal(run(block, X).x_BSD, expected)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_order_of_norm_and_update(kind):
    block = make("pre", kind, mixer=0.3, feed_forward=0.7)
    middle = X + 0.3 * norm(block, 0, kind, X) ** 2
    expected = middle + 0.7 * norm(block, 1, kind, middle) ** 2
    torch.testing.assert_close(run(block, X).x_BSD, expected, rtol=0, atol=1e-13)  # fp64
    block = make("post", kind, mixer=0.3, feed_forward=0.7)
    middle = norm(block, 0, kind, X + 0.3 * X**2)
    expected = norm(block, 1, kind, middle + 0.7 * middle**2)
    torch.testing.assert_close(run(block, X).x_BSD, expected, rtol=0, atol=1e-13)


def test_a_dense_block_has_no_sums_and_hands_on_what_it_was_given():
    output = run(make("pre"), X)
    assert output.sums is None
    assert output.shared == {"below": torch.ones(1)}
