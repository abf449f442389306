"""Fewer heads and layers of keys and values: which of a source model each new one is the equal-weight mean of.

Source: Ainslie et al. 2023, arXiv 2305.13245 (heads); Zuhri et al. 2024, arXiv 2406.09297 (layers).

Gains of a key norm are averaged over the same heads and layers as the maps before it, so that nothing is lost where
those are equal: a norm of every head has one gain for all heads, which only a mean over layers changes; that of the
whole projection has each head's own, and its mean square is that of the heads that are left. What a key was before its
norm only counts up to a factor, and is not evened out before the mean: heads have equal weights, as without norms.
Legend: D hidden_size, G key/value heads, d head size, M owner layers.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from moe_train.checkpoint.ranges import RangeReader
from moe_train.config.errors import UsageError
from moe_train.config.model import ModelConfig

KINDS = ("key", "value", "key_norm")  # what only owner layers have


@dataclass(frozen=True)
class Reduction:
    """Which keys and values of a source model each head of a smaller one is the mean of."""

    source: ModelConfig
    target: ModelConfig

    def layers(self, owner: int) -> Counter[int]:
        """The source's owner layers that the layers of a new owner's group read, and how many of them read each."""
        ends = (*self.target.kv_owner_layers, self.target.num_layers)
        group = next(range(start, end) for start, end in pairwise(ends) if start == owner)
        return Counter(max(old for old in self.source.kv_owner_layers if old <= layer) for layer in group)

    def heads(self, head: int) -> range:
        """The source's heads that a new head is the mean of."""
        ratio = self.source.attention_kv_heads // self.target.attention_kv_heads
        return range(head * ratio, (head + 1) * ratio)

    def mean_blocks(self, reader: RangeReader, owner: int, kind: str) -> Iterator[Tensor]:
        """The new weight of keys, values or the key norm, head by head. fp32 [d*D] or [d] each, added up in fp64 and
        rounded once; of a norm of every head the one gain that all heads share.

        Args:
            reader: Of the source.
            owner: The layer that owns it.
            kind: One of `KINDS`.
        """
        is_norm = kind == "key_norm"
        is_shared = is_norm and self.source.qk_norm == "head"
        size = self.source.attention_head_dim * (1 if is_norm else self.source.hidden_size)
        layers = self.layers(owner)
        for head in range(1 if is_shared else self.target.attention_kv_heads):
            total, num_parts = None, 0
            for layer, count in layers.items():
                for old in range(1) if is_shared else self.heads(head):
                    wide = reader.read(weight_name(layer, kind), "weight", old * size, (old + 1) * size).double()
                    total = wide * count if total is None else total.add_(wide, alpha=count)
                    num_parts += count
            assert total is not None, "a group has a layer"
            yield (total / num_parts).float()


def weight_name(layer: int, kind: str) -> str:
    """Name of a layer's weight of keys or values, [G*d, D], or of its key norm, [d] or [G*d]."""
    return f"blocks.{layer}.mixer.{kind}.weight"


def cache_elements(model: ModelConfig) -> int:
    """Elements of the keys of one token: M G d."""
    return len(model.kv_owner_layers) * model.attention_kv_heads * model.attention_head_dim


def check_heads(source: ModelConfig, wanted: int) -> None:
    """Refuse a number of heads that means over equal groups of the source's do not give.

    Raises:
        UsageError: Naming both numbers.
    """
    present = source.attention_kv_heads
    if wanted < 1:
        raise UsageError(f"--num-kv-heads ({wanted}) must be 1 or more; the source's num_kv_heads is {present}")
    if wanted > present:
        raise UsageError(f"--num-kv-heads ({wanted}) is larger than the source's num_kv_heads ({present})")
    if present % wanted:
        raise UsageError(f"--num-kv-heads ({wanted}) must divide the source's num_kv_heads ({present})")


def check_reduces(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse more owner layers than there were, and what leaves the cache as large as it was.

    Raises:
        UsageError: Naming the numbers of both.
    """
    before, after = source.kv_owner_layers, target.kv_owner_layers
    if len(after) > len(before):
        raise UsageError(
            f"--kv-layers ({_listed(after)}) are {len(after)} layers, more than the source's {len(before)} that own "
            f"keys and values ({_listed(before)})"
        )
    if cache_elements(source) == cache_elements(target):
        raise UsageError(
            f"nothing becomes less: num_kv_heads ({target.attention_kv_heads}) and the number of kv_layers "
            f"({len(after)}) are the source's ({source.attention_kv_heads} and {len(before)}): give a smaller "
            "--num-kv-heads or --kv-layers"
        )


def _listed(layers: Iterable[int]) -> str:
    return ",".join(map(str, layers))
