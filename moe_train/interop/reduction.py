"""Reduction of key/value heads and layers: each new head is the mean, with equal weights, of heads of the source model.

Source: Ainslie et al. 2023, arXiv 2305.13245 (heads); Zuhri et al. 2024, arXiv 2406.09297 (layers).

Gains of a key norm are averaged over the same heads and layers as the key weights, so that nothing is lost where the
averaged heads and layers are equal. A norm per head has one gain, shared by all heads: only a mean over layers changes
it. A norm of the complete projection has a gain per head, and its mean square is taken over the remaining heads.
A norm removes the scale of its input. The means do not correct for this scale: heads have equal weights, as without
norms.
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

KINDS = ("key", "value", "key_norm")  # weights that only owner layers have


@dataclass(frozen=True)
class Reduction:
    """Map from the key/value heads of a smaller model to the heads of the source model that they are the mean of.

    Attributes:
        source: Model section of the source.
        target: Model section of the smaller model.
    """

    source: ModelConfig
    target: ModelConfig

    def layers(self, owner: int) -> Counter[int]:
        """Count the layers of a new owner's group by the owner layer whose keys and values they read in the source.

        Args:
            owner: Owner layer of the smaller model.

        Returns:
            Number of layers of the group by owner layer of the source.
        """
        ends = (*self.target.kv_owner_layers, self.target.num_layers)
        group = next(range(start, end) for start, end in pairwise(ends) if start == owner)
        readers = [layer for layer in group if layer in self.source.attention_layers]
        return Counter(max(old for old in self.source.kv_owner_layers if old <= layer) for layer in readers)

    def heads(self, head: int) -> range:
        """Return the heads of the source whose mean is a new head."""
        ratio = self.source.attention_kv_heads // self.target.attention_kv_heads
        return range(head * ratio, (head + 1) * ratio)

    def mean_blocks(self, reader: RangeReader, owner: int, kind: str) -> Iterator[Tensor]:
        """Compute the new weight of keys, values or key norm, head by head, summed in fp64 and rounded once.

        Args:
            reader: Reader of the source checkpoint.
            owner: Owner layer of the smaller model.
            kind: One of `KINDS`.

        Yields:
            The weight of each head, fp32 [d*D], or [d] for the key norm. A norm per head yields only the gain that all
            heads share.
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
    """Return the name of a layer's weight of keys or values, [G*d, D], or of its key norm, [d] or [G*d].

    Args:
        layer: Index of the layer.
        kind: One of `KINDS`.
    """
    return f"blocks.{layer}.mixer.{kind}.weight"


def cache_elements(model: ModelConfig) -> int:
    """Count the elements of the cached keys of one token: M G d."""
    return len(model.kv_owner_layers) * model.attention_kv_heads * model.attention_head_dim


def check_heads(source: ModelConfig, wanted: int) -> None:
    """Check that the source's heads can be averaged in equal groups to the wanted number of heads.

    Args:
        source: Model section of the source.
        wanted: Number of key/value heads.

    Raises:
        UsageError: If they cannot. The message names both numbers.
    """
    present = source.attention_kv_heads
    if wanted < 1:
        raise UsageError(f"--num-kv-heads ({wanted}) must be 1 or more; the source's num_kv_heads is {present}")
    if wanted > present:
        raise UsageError(f"--num-kv-heads ({wanted}) is larger than the source's num_kv_heads ({present})")
    if present % wanted:
        raise UsageError(f"--num-kv-heads ({wanted}) must divide the source's num_kv_heads ({present})")


def check_reduces(source: ModelConfig, target: ModelConfig) -> None:
    """Check that the target has no more owner layers than the source, and a smaller cache.

    Args:
        source: Model section of the source.
        target: Model section of the smaller model.

    Raises:
        UsageError: If it does not. The message names the numbers of both.
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
