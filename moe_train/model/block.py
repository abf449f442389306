"""One block of the decoder: norm, mixer, norm, feed-forward layer; and which of its parts are recomputed.

Legend: B batch, S sequence, D hidden_size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_train.config.run import RecomputedPart
from moe_train.model.decode_state import LayerStates
from moe_train.model.feed_forward import FeedForward
from moe_train.model.mixers.base import Mixer, MixerContext, Shared
from moe_train.model.moe.steps import RoutingSums

NO_STATES = LayerStates()


@dataclass(frozen=True)
class BlockOutput:
    """Output of a block.

    Attributes:
        x_BSD: Residual stream after the block.
        shared: Tensors that this layer and those below hand up to the layers above.
        sums: Routing sums of the MoE layer; None for a dense block.
    """

    x_BSD: Tensor
    shared: Shared
    sums: RoutingSums | None


Part = Callable[[Tensor, MixerContext], BlockOutput]
"""A part of a block, or the whole block: from the residual stream before it to that after it."""


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again, because the forward pass does not keep it.

    Attributes:
        part: Part of a block that is computed again.
        every: N, if only every N-th block is concerned: those with the indices N - 1, 2N - 1, ...
    """

    part: RecomputedPart = "none"
    every: int = 1

    def __str__(self) -> str:
        return self.part if self.every == 1 else f"{self.part} in 1 of {self.every}"

    def in_layer(self, layer: int) -> RecomputedPart:
        """Return the part that is computed again in a block, from its index."""
        return self.part if (layer + 1) % self.every == 0 else "none"

    def repeats(self, part: Literal["attention", "experts"], layer: int) -> bool:
        """Return whether a part of a block is computed again, from the block's index."""
        return self.in_layer(layer) in (part, "block")


NO_RECOMPUTE = Recompute()


class Block(nn.Module):
    """A block of the decoder: x + F(N(x)) (pre) or N(x + F(x)) (post), for F = mixer, then F = feed-forward layer."""

    def __init__(
        self,
        mixer: Mixer,
        feed_forward: FeedForward,
        mixer_norm: nn.Module,
        feed_forward_norm: nn.Module,
        norm_position: Literal["pre", "post"],
        recompute: RecomputedPart = "none",
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.is_pre_norm = norm_position == "pre"
        self.recompute = recompute

    def forward(self, x_BSD: Tensor, context: MixerContext, states: LayerStates = NO_STATES) -> BlockOutput:
        """Compute the next residual stream.

        Args:
            x_BSD: Residual stream before the block.
            context: Context of the block; its `shared` has what the layers below have handed up.
            states: States of this layer while decoding.

        Collective: All ranks of the expert-parallel group, if the block has an MoE layer.
        """
        again = self.recompute if self.training and torch.is_grad_enabled() else "none"

        def run(x_BSD: Tensor, context: MixerContext) -> BlockOutput:
            mixer, feed_forward = replace(context, state=states.mixer), replace(context, state=states.feed_forward)
            mixed = _run(self._mix, x_BSD, mixer, is_recomputed=again == "attention")
            fed = _run(self._feed, mixed.x_BSD, feed_forward, is_recomputed=again == "experts")
            return replace(fed, shared=mixed.shared)

        return _run(run, x_BSD, context, is_recomputed=again == "block")

    def _mix(self, x_BSD: Tensor, context: MixerContext) -> BlockOutput:
        mixed_BSD, shared = self.mixer(self.mixer_norm(x_BSD) if self.is_pre_norm else x_BSD, context)
        x_BSD = x_BSD + mixed_BSD
        return BlockOutput(x_BSD if self.is_pre_norm else self.mixer_norm(x_BSD), shared, None)

    def _feed(self, x_BSD: Tensor, context: MixerContext) -> BlockOutput:
        update_BSD, sums = self.feed_forward(self.feed_forward_norm(x_BSD) if self.is_pre_norm else x_BSD, context)
        x_BSD = x_BSD + update_BSD
        return BlockOutput(x_BSD if self.is_pre_norm else self.feed_forward_norm(x_BSD), {}, sums)


def _run(part: Part, x_BSD: Tensor, context: MixerContext, is_recomputed: bool) -> BlockOutput:
    return run_recomputed(part, x_BSD, context) if is_recomputed else part(x_BSD, context)


def run_recomputed(part: Part, x_BSD: Tensor, context: MixerContext) -> BlockOutput:
    """Run a part of a block and keep only its inputs: the rest is computed again in the backward pass.

    Everything that carries a gradient goes in and out as a plain tensor, as the reentrant form needs. The other form is
    not possible under ZeRO-3, which frees a module's weights after the second forward (deepspeed 0.19.8). Every draw is
    keyed, so no generator's state is kept. Sums are those of the first pass: nothing is counted twice.

    Args:
        part: Part to run.
        x_BSD: Residual stream before the part.
        context: Context of the block.

    Collective: As the part, again in the backward pass.
    """

    def run(x_BSD: Tensor, *below: Tensor) -> tuple[Tensor, ...]:
        shared = dict(zip(context.shared, below, strict=True))
        output = part(x_BSD, replace(context, shared=shared))
        names.append(tuple(output.shared))
        return output.x_BSD, *output.shared.values(), *(output.sums.tensors if output.sums else ())

    names: list[tuple[str, ...]] = []
    tensors = checkpoint(run, x_BSD, *context.shared.values(), use_reentrant=True, preserve_rng_state=False)
    shared = dict(zip(names[0], tensors[1:], strict=False))
    sums = tensors[1 + len(shared) :]
    return BlockOutput(tensors[0], shared, RoutingSums(*sums) if sums else None)
