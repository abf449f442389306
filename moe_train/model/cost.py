"""Costs of the parts of a model, as each part states them: numbers per token, the same for any machine and layout.

The planner converts them to bytes and seconds. They count elements, not bytes: kept tensors are in the model's dtype,
unless fp32 is stated.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """Matrix products of a token's row with weights of one shape.

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
    """Elementwise work in fp32, with the casts from the model's dtype and back.

    Attributes:
        numbers: Number of elements.
        forward: Bytes read and written per element in the forward pass.
        backward: Bytes read and written per element in the backward pass.
        is_narrow: Whether the work is in the model's dtype, without casts. The bytes are still those of fp32.
    """

    numbers: int
    forward: int
    backward: int
    is_narrow: bool = False


@dataclass(frozen=True)
class Attention:
    """Softmax attention of every token over the tokens before it.

    Attributes:
        num_heads: Number of query heads.
        head_dim: Width of a head.
        window: Number of tokens that a token sees; None: all.
        hidden_keys: Number of keys of hidden copies that are computed for a hidden copy, in addition.
    """

    num_heads: int
    head_dim: int
    window: int | None
    hidden_keys: int = 0


@dataclass(frozen=True)
class MixerCost:
    """Cost of a mixer in one layer, per token; a hidden copy is a token.

    Attributes:
        products: Matrix products with weights.
        kept: Elements that autograd keeps beside the block's own norm, in the model's dtype.
        kept_fp32: Elements that autograd keeps in fp32.
        normed: Elements that pass norms of the mixer's own.
        handed_up: Elements handed up to the layers above; recomputation keeps them too.
        work: fp32 elements that the backward pass needs temporarily.
        elementwise: Elementwise work.
        attention: Attention; None: it has none.
        exchanged: Elements that ranks that share a sequence send each other, keys and values, in the model's dtype;
            fp32 gradients of them travel back. What is sent for a chunk, not for a token, does not count.
        owns_exchanged: Whether this layer makes these keys and values; False: a layer below has handed them up.
    """

    products: tuple[Product, ...]
    kept: int
    kept_fp32: int = 0
    normed: int = 0
    handed_up: int = 0
    work: int = 0
    elementwise: tuple[Elementwise, ...] = ()
    attention: Attention | None = None
    exchanged: int = 0
    owns_exchanged: bool = False


@dataclass(frozen=True)
class FeedForwardCost:
    """Cost of a dense feed-forward layer, per token.

    Attributes:
        products: Matrix products with weights.
        kept: Elements that autograd keeps beside the block's own norm, in the model's dtype.
        kept_fp32: Elements that autograd keeps in fp32.
        work: Elements in the model's dtype that the backward pass needs temporarily.
        elementwise: Elementwise work.
    """

    products: tuple[Product, ...]
    kept: int
    kept_fp32: int = 0
    work: int = 0
    elementwise: tuple[Elementwise, ...] = ()


@dataclass(frozen=True)
class RouterCost:
    """Cost of a router, per token.

    Attributes:
        products: Number of products of a token's row with [hidden_size, num_experts] weights, in fp32.
        kept: fp32 elements that autograd keeps, per token and expert.
        forward: Elements of 8 bytes read and written in the forward pass, per token and expert.
        backward: Elements of 8 bytes read and written in the backward pass, per token and expert.
    """

    products: int
    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class DispatchSizes:
    """Sizes that the traffic of a dispatch depends on.

    Attributes:
        tokens: Number of tokens of a rank.
        assignments: Number of executed assignments of a rank.
        top_k: Experts per token.
        num_experts: Number of experts of a layer.
        num_ranks: Number of ranks that share the experts.
        node_size: Ranks of a node, if rows go across nodes first; None: they do not.
    """

    tokens: int
    assignments: float
    top_k: int
    num_experts: int
    num_ranks: int
    node_size: int | None

    def share_reached(self, num_experts: int) -> float:
        """Compute the share of tokens that reach a rank or node, if every token draws top_k of all experts evenly.

        Args:
            num_experts: Number of experts of the rank or node.
        """
        others = math.comb(self.num_experts - num_experts, self.top_k)
        return 1 - others / math.comb(self.num_experts, self.top_k)


@dataclass(frozen=True)
class Hop:
    """Mean traffic from a rank to each other rank in one hop of a dispatch, under even routing.

    Attributes:
        num_ranks: Number of ranks of the hop's group.
        rows: Number of token rows on the way to the experts; as many come back.
        routing_bytes: Bytes of gates and places that go with the rows, one way.
        counts: Number of int64 counts that are sent before the rows of a chunk.
    """

    num_ranks: int
    rows: float
    routing_bytes: float
    counts: int
