"""Attention of a stream with hidden copies: in training over whole rows, and while decoding with a cache.

The cache of the originals is that of the model without copies. Beside it, a ring holds the keys and values of the
hidden copies of the last W positions, if there is a window.
Legend: B batch, H query heads, G key/value heads, n copies, c = n - 1 hidden copies, t originals, s positions with
hidden copies, N = t + c*s stream, C originals' keys, M positions of hidden keys, W window, d head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_train.config.model import HiddenCopiesConfig
from moe_train.model.decode_state import CacheSpec
from moe_train.model.mixers.base import MixerContext, Shared
from moe_train.model.mixers.key_value import KeyValue, KeyValueMark, KeyValueState
from moe_train.model.mixers.visibility import attend_held, attention_mask, visible_hidden_keys
from moe_train.model.token_index import CopiesLayout, TokenIndex
from moe_train.ops.hidden_attention import hidden_attention
from moe_train.ops.partial_attention import additive, merge_attention, partial_attention

_PREFIX = "hidden_"  # of the names under which hidden keys and values are handed up while decoding


class CopiesState:
    """Keys and values of the originals so far, and of the hidden copies of the last positions in reach."""

    def __init__(
        self,
        spec: CacheSpec,
        num_kv_heads: int,
        head_dim: int,
        windows: Sequence[int | None],
        copies: HiddenCopiesConfig,
    ) -> None:
        """Allocate the memory.

        Args:
            spec: Sizes of the decode states.
            num_kv_heads: G, number of key/value heads.
            head_dim: d, head size.
            windows: Most originals that a query sees in each layer that reads them, its own included; None: all.
            copies: Settings of the hidden copies.
        """
        self.originals = KeyValueState(spec, num_kv_heads, head_dim, windows)
        self.hidden: KeyValueState | None = None
        if copies.reach:  # the hidden copies of a position are further heads of it
            heads = num_kv_heads * (copies.copies - 1)
            self.hidden = KeyValueState(spec, heads, head_dim, (copies.reach,))
        self._without_hidden = 0  # tokens since the newest mark without hidden copies; they are the first ones

    def append(self, k_BGNd: Tensor, v_BGNd: Tensor, tokens: TokenIndex) -> Shared:
        """Add the keys and values of all copies of new tokens.

        Args:
            k_BGNd: Keys of the new part of the stream, rotated.
            v_BGNd: Values of the new part of the stream.
            tokens: Index of the stream.

        Returns:
            What layers hand up: all keys and values in sight, those of the hidden copies with the copies as heads
            [B, G*c, M, d].
        """
        copies = tokens.copies
        assert copies is not None, "the stream has copies"
        length = copies.num_originals
        own = tokens.columns(slice(length))
        new = KeyValue(k_BGNd[:, :, :length], v_BGNd[:, :, :length], own.positions_BS, own.documents_BS)
        shared = self.originals.append(new, tokens.first_position).as_shared()
        self._without_hidden += length - copies.num_positions
        if copies.num_positions == 0:
            return shared
        last = own.columns(slice(length - copies.num_positions, None))
        dtype = shared["keys"].dtype  # also where no hidden key is cached, all keys of a query have one dtype
        k_BGsd, v_BGsd = (_copies_as_heads(x_BGNd.to(dtype), copies) for x_BGNd in (k_BGNd, v_BGNd))
        hidden = KeyValue(k_BGsd, v_BGsd, last.positions_BS, last.documents_BS)
        if self.hidden is not None:
            hidden = self.hidden.append(hidden, with_overwritten=True)
        return shared | {_PREFIX + name: tensor for name, tensor in hidden.as_shared().items()}

    def snapshot(self) -> tuple[KeyValueMark, KeyValueMark | None]:
        """Mark this place."""
        self._without_hidden = 0
        return self.originals.snapshot(), None if self.hidden is None else self.hidden.snapshot()

    def restore(self, mark: tuple[KeyValueMark, KeyValueMark | None]) -> None:
        """Forget every token since the mark."""
        originals, hidden = mark
        self._without_hidden = 0
        self.originals.restore(originals)
        if self.hidden is not None and hidden is not None:
            self.hidden.restore(hidden)

    def keep(self, mark: tuple[KeyValueMark, KeyValueMark | None], counts_B: Tensor) -> None:
        """Forget every token since the mark but the first counts_B of each row. Host synchronisation: the counts."""
        originals, hidden = mark
        self.originals.keep(originals, counts_B)
        if self.hidden is not None and hidden is not None:
            self.hidden.keep(hidden, (counts_B - self._without_hidden).clamp(min=0))
        self._without_hidden = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the originals' keys and values, and of the ring: 2 B W (n-1) G d times the size of the dtype."""
        return self.originals.nbytes + (0 if self.hidden is None else self.hidden.nbytes)


def attend_with_copies(q_BHNd: Tensor, shared: Shared, context: MixerContext, window: int | None) -> Tensor:
    """Compute the attention of all copies.

    Args:
        q_BHNd: Queries of the stream, rotated.
        shared: Keys and values that the owner layer has handed up: of the whole stream as it is, or from `CopiesState`.
        context: Context of the layer.
        window: Most originals that a query sees, its own included; None: all.

    Returns:
        [B, H, N, d], the outputs of all copies.
    """
    copies, held = context.tokens.copies, KeyValue.from_shared(shared)
    assert copies is not None, "the stream has copies"
    own = context.tokens.columns(slice(copies.num_originals))
    if f"{_PREFIX}keys" not in shared and copies.num_positions > 0:
        return _attend_whole_rows(q_BHNd, held, context, window)
    length, positions = copies.num_originals, copies.num_positions
    if positions == 0:
        return attend_held(q_BHNd, own, held, window)
    last_B1sC = attention_mask(own.columns(slice(length - positions, None)), held, window)
    if positions == length:  # the keys are read once for all copies
        out_BHnsd, lse_BHns = _over_originals(q_BHNd.unflatten(2, (copies.number, length)), held, last_B1sC)
        first_BHsd, out_BHcsd, lse_BHcs = out_BHnsd[:, :, 0], out_BHnsd[:, :, 1:], lse_BHns[:, :, 1:]
    else:
        first_BHsd = attend_held(q_BHNd[:, :, :length], own, held, window)
        q_BHcsd = q_BHNd[:, :, length:].unflatten(2, (copies.number - 1, positions))
        out_BHcsd, lse_BHcs = _over_originals(q_BHcsd, held, last_B1sC)
    near, near_lse = _over_hidden(q_BHNd[:, :, length:], shared, own, context)
    merged, _ = merge_attention(out_BHcsd.flatten(2, 3), lse_BHcs.flatten(2, 3), near, near_lse)
    return torch.cat((first_BHsd, merged), dim=2)


def _attend_whole_rows(q_BHNd: Tensor, stream: KeyValue, context: MixerContext, window: int | None) -> Tensor:
    originals = context.attention_blocks(window, q_BHNd.shape[3], q_BHNd.dtype)
    return hidden_attention(q_BHNd, stream.k_BGCd, stream.v_BGCd, context.hidden_blocks(), originals)


def _over_originals(q_BHnsd: Tensor, held: KeyValue, mask_B1sC: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the attention of several copies over the originals' keys, and its logsumexp."""
    batch, heads, copies, length, size = q_BHnsd.shape
    is_causal = mask_B1sC is None and length > 1
    if length > 1:  # copies are further query heads of their group
        q = q_BHnsd.reshape(batch, heads * copies, length, size)
        mask = None if mask_B1sC is None else additive(mask_B1sC, q.dtype)
    else:  # heads and copies of a group are further queries, so that its keys are read once
        q = q_BHnsd.reshape(batch, held.k_BGCd.shape[1], -1, size)
        mask = None if mask_B1sC is None else additive(mask_B1sC, q.dtype).expand(-1, -1, q.shape[2], -1)
    out, lse = partial_attention(q, held.k_BGCd, held.v_BGCd, mask, is_causal)
    return out.reshape(q_BHnsd.shape), lse.reshape(q_BHnsd.shape[:4])


def _over_hidden(q_BHMd: Tensor, shared: Shared, own: TokenIndex, context: MixerContext) -> tuple[Tensor, Tensor]:
    """Compute the attention of the hidden queries over the hidden keys, and its logsumexp. (B, H, c*s, d)."""
    copies = context.tokens.copies
    assert copies is not None, "the stream has copies"
    hidden = KeyValue.from_shared({name.removeprefix(_PREFIX): x for name, x in shared.items() if _PREFIX in name})
    assert hidden.positions_BC is not None, "hidden keys have positions"
    number = copies.number - 1
    # (B, G*c, M, d) -> (B, G, c*M, d)
    k, v = (x.unflatten(1, (-1, number)).flatten(2, 3) for x in (hidden.k_BGCd, hidden.v_BGCd))
    last = own.columns(slice(copies.num_originals - copies.num_positions, None))
    # Every layer's ring has the same positions, so all layers have one mask.
    mask = context.once(
        ("hidden mask", k.dtype),
        context.tokens.positions_BS,
        lambda: additive(visible_hidden_keys(last, hidden, copies), k.dtype),
    )
    return partial_attention(q_BHMd, k, v, mask, is_causal=False)


def _copies_as_heads(x_BGNd: Tensor, copies: CopiesLayout) -> Tensor:
    """Make the hidden copies of a position further heads. (B, G, t + c*s, d) -> (B, G*c, s, d)."""
    hidden = x_BGNd[:, :, copies.num_originals :]
    return hidden.unflatten(2, (copies.number - 1, copies.num_positions)).flatten(1, 2)
