"""What a part of the model costs, as the part says itself: numbers of one token, whatever machine and layout.

The planner makes bytes and seconds of them. Elements are counted, not bytes: kept tensors are in the model's dtype but
where fp32 is said.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """Products of a token's row with weights of one shape.

    Attributes:
        width_in: Width of the row.
        width_out: Width of the result.
        count: Number of such products.
    """

    width_in: int
    width_out: int
    count: int = 1


@dataclass(frozen=True)
class Elementwise:
    """Elementwise work in fp32, to which the model's dtype is cast and back.

    Attributes:
        numbers: Elements.
        forward: Bytes read and written for an element in the forward pass.
        backward: Bytes read and written for an element in the backward pass.
    """

    numbers: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Attention:
    """Softmax attention of every token over those before it.

    Attributes:
        num_heads: Query heads.
        head_dim: Width of a head.
        window: Tokens that a token sees; None: all.
    """

    num_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class MixerCost:
    """Cost of a mixer in one layer, for one token.

    Attributes:
        products: Products with weights.
        kept: Elements that autograd keeps beside the block's own norm, in the model's dtype.
        kept_fp32: Elements that autograd keeps in fp32.
        normed: Elements that pass norms of the mixer's own.
        handed_up: Elements that the layers above get; they are kept under recomputation too.
        work: fp32 elements that the backward pass needs for a while.
        elementwise: Elementwise work.
        attention: Attention; None: it has none.
    """

    products: tuple[Product, ...]
    kept: int
    kept_fp32: int = 0
    normed: int = 0
    handed_up: int = 0
    work: int = 0
    elementwise: tuple[Elementwise, ...] = ()
    attention: Attention | None = None


@dataclass(frozen=True)
class RouterCost:
    """Cost of a router.

    Attributes:
        products: Products of a token's row with [hidden_size, num_experts] weights, in fp32.
        kept: fp32 elements that autograd keeps, for a token and expert.
        forward: Elements of 8 bytes read and written in the forward pass, for a token and expert.
        backward: The same in the backward pass.
    """

    products: int
    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class DispatchSizes:
    """Sizes that the traffic of a dispatch depends on.

    Attributes:
        tokens: Tokens of a rank.
        assignments: Executed assignments of a rank.
        top_k: Experts of a token.
        num_experts: Experts of a layer.
        num_ranks: Ranks that share them.
        node_size: Ranks of a node, where rows pass nodes first; None: they don't.
    """

    tokens: int
    assignments: float
    top_k: int
    num_experts: int
    num_ranks: int
    node_size: int | None

    def share_reached(self, num_experts: int) -> float:
        """Share of tokens with at least one of some experts, if every token draws top_k of all evenly.

        Args:
            num_experts: How many experts the rank or node in question has.
        """
        others = math.comb(self.num_experts - num_experts, self.top_k)
        return 1 - others / math.comb(self.num_experts, self.top_k)


@dataclass(frozen=True)
class Hop:
    """What a rank sends to each other rank in one hop of a dispatch. Even routing, in the mean.

    Attributes:
        num_ranks: Ranks of the hop's group.
        rows: Token rows on the way to the experts; as many come back.
        routing_bytes: Bytes of gates and places that go with them, one way.
        counts: int64 numbers that are sent before the rows of a chunk.
    """

    num_ranks: int
    rows: float
    routing_bytes: float
    counts: int
