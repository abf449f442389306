"""Keys and values of attention: what an owner layer hands up, and how they are remembered while decoding.

Legend: B batch, G key/value heads, C keys so far (context), S new tokens, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.model.decode_state import CacheSpec

_NOWHERE = torch.iinfo(torch.int64).max  # position of a column that holds no key: no query reaches it


@dataclass(frozen=True)
class KeyValue:
    """Keys and values, with the positions and documents of their tokens.

    Attributes:
        k_BGCd: Keys after rotary embedding.
        v_BGCd: Values.
        positions_BC: int64 positions of the keys, B may be 1. None: they are the last C positions up to the newest
            query's, in order; for a single query, in any order.
        documents_BC: int64 document ids of the keys; None: no isolation.
    """

    k_BGCd: Tensor
    v_BGCd: Tensor
    positions_BC: Tensor | None
    documents_BC: Tensor | None

    def as_shared(self) -> dict[str, Tensor]:
        """Return the tensors by the names under which layers hand them up."""
        named = {
            "keys": self.k_BGCd,
            "values": self.v_BGCd,
            "key_positions": self.positions_BC,
            "key_documents": self.documents_BC,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @staticmethod
    def from_shared(shared: dict[str, Tensor]) -> "KeyValue":
        """Take the keys and values from what the layers below have handed up."""
        return KeyValue(shared["keys"], shared["values"], shared.get("key_positions"), shared.get("key_documents"))


@dataclass(frozen=True)
class KeyValueMark:
    """Mark of a place that a KeyValueState can return to.

    Attributes:
        lengths: Number of tokens of each row.
        columns: Copy of the columns, if a window will overwrite them; else None.
        is_ordered: Whether every row had token i at position i, and all rows had the same length.
    """

    lengths: tuple[int, ...]
    columns: tuple[Tensor, Tensor, Tensor, Tensor | None] | None
    is_ordered: bool


class KeyValueState:
    """Keys and values of all tokens so far, or of the last `window`, in memory that is allocated at once.

    Token number i of a row is in column i; with a window, in column i modulo the number of columns. Each row has a
    length of its own: rows differ after `keep`. Lengths are known on the host.
    """

    def __init__(
        self, spec: CacheSpec, num_kv_heads: int, head_dim: int, windows: Sequence[int | None] = (None,)
    ) -> None:
        """Allocate the memory.

        Args:
            spec: Sizes of the decode states.
            num_kv_heads: G, number of key/value heads.
            head_dim: d, head size.
            windows: Most keys that a query sees in each layer that reads them, itself included; None: all. Keys that no
                layer sees are not kept.
        """
        window = widest(windows)
        self._max_length, self._window, self._is_even_window = spec.max_length, window, len(set(windows)) == 1
        self._num_columns = spec.max_length if window is None else min(window, spec.max_length)
        shape = (spec.batch_size, num_kv_heads, self._num_columns, head_dim)
        # Zeros, not empty: a shorter row reads columns that it has not written, with weight 0, and 0 * NaN is NaN.
        self._k_BGCd, self._v_BGCd = (torch.zeros(shape, dtype=spec.dtype, device=spec.device) for _ in range(2))
        columns = (spec.batch_size, self._num_columns)
        self._positions_BC = torch.full(columns, _NOWHERE, dtype=torch.int64, device=spec.device)
        self._documents_BC: Tensor | None = None
        self._lengths = [0] * spec.batch_size
        self._is_ordered = True  # every row has token i at position i, and all rows have the same length
        self._since: list[KeyValue] | None = None  # what came since the newest mark of a window; None: no mark

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: 2 B C G d times the size of the dtype, C being max_length or the window."""
        return self._k_BGCd.nbytes + self._v_BGCd.nbytes

    def append(self, new: KeyValue, first_position: int | None = None, with_overwritten: bool = False) -> KeyValue:
        """Add the keys and values of S new tokens to each row.

        Args:
            new: New keys and values, with positions.
            first_position: Position of the first new token, if the host knows that all rows' positions follow one
                another from it; None: it does not know.
            with_overwritten: Whether the keys that a single new token overwrites in the window are returned, too.

        Returns:
            The keys and values that the new tokens can see: all of them; with a window, at least those in sight, in any
            order. They are views if possible, valid until the next call.

        Raises:
            ValueError: If there is no room left.
        """
        count, longest = new.k_BGCd.shape[2], max(self._lengths)
        if longest + count > self._max_length:
            raise ValueError(
                f"{longest + count} tokens are more than the cache has room for: max_length ({self._max_length})"
            )
        if longest == 0 and new.documents_BC is not None:
            self._documents_BC = torch.zeros_like(self._positions_BC)
        assert (self._documents_BC is None) == (new.documents_BC is None), "documents are isolated always or never"
        if self._since is not None:
            self._since.append(new)
        is_even = min(self._lengths) == longest
        self._is_ordered = self._is_ordered and is_even and first_position == longest
        fits = longest + count <= self._num_columns or (count == 1 and is_even and not with_overwritten)
        held = None if fits else self._joined(new)
        if is_even:
            self._write_even(new, longest)
        else:
            self._write_rows(new, [count] * len(self._lengths))
        self._lengths = [length + count for length in self._lengths]
        return held or self._read(count)

    def snapshot(self) -> KeyValueMark:
        """Mark this place. Nothing is copied, except with a window the columns, which will be overwritten."""
        columns = None
        if self._window is not None:
            self._since = []
            documents_BC = None if self._documents_BC is None else self._documents_BC.clone()
            columns = (self._k_BGCd.clone(), self._v_BGCd.clone(), self._positions_BC.clone(), documents_BC)
        return KeyValueMark(tuple(self._lengths), columns, self._is_ordered)

    def restore(self, mark: KeyValueMark) -> None:
        """Forget every token since the mark."""
        self._lengths, self._is_ordered = list(mark.lengths), mark.is_ordered
        if mark.columns is None:
            self._hide_columns_behind_rows()
            return
        self._since = []
        k_BGCd, v_BGCd, positions_BC, documents_BC = mark.columns
        self._k_BGCd.copy_(k_BGCd)
        self._v_BGCd.copy_(v_BGCd)
        self._positions_BC.copy_(positions_BC)
        if self._documents_BC is not None and documents_BC is not None:
            self._documents_BC.copy_(documents_BC)

    def keep(self, mark: KeyValueMark, counts_B: Tensor) -> None:
        """Forget every token since the mark but the first counts_B of each row. Host synchronisation: the counts."""
        counts: list[int] = counts_B.tolist()
        is_ordered = self._is_ordered and len(set(counts)) == 1
        if mark.columns is None:
            self._lengths = [length + count for length, count in zip(mark.lengths, counts, strict=True)]
            self._is_ordered = is_ordered
            self._hide_columns_behind_rows()
            return
        since = self._since or []
        self.restore(mark)
        for new in since:
            length = new.k_BGCd.shape[2]
            taken = [min(length, count) for count in counts]
            self._write_rows(new, taken)
            self._lengths = [before + count for before, count in zip(self._lengths, taken, strict=True)]
            counts = [count - own for count, own in zip(counts, taken, strict=True)]
        self._is_ordered = is_ordered

    def _hide_columns_behind_rows(self) -> None:
        """Give the columns that hold no token of their row a position that no query reaches."""
        lengths_B = torch.tensor(self._lengths, device=self._positions_BC.device)
        columns_C = torch.arange(self._num_columns, device=self._positions_BC.device)
        self._positions_BC.masked_fill_(columns_C >= lengths_B.unsqueeze(1), _NOWHERE)

    def _read(self, num_queries: int) -> KeyValue:
        length = max(self._lengths)
        held = min(length, self._num_columns)
        # One query may see keys in any order, if it sees all.
        is_plain = self._is_ordered and (length == held or (num_queries == 1 and self._is_even_window))
        return KeyValue(
            self._k_BGCd[:, :, :held],
            self._v_BGCd[:, :, :held],
            None if is_plain else self._positions_BC[:, :held],
            None if self._documents_BC is None else self._documents_BC[:, :held],
        )

    def _write_even(self, new: KeyValue, length: int) -> None:
        """Write new tokens after `length` tokens of every row; if they exceed the columns, only the last ones."""
        count = new.k_BGCd.shape[2]
        kept, first = min(count, self._num_columns), length % self._num_columns
        places: slice | Tensor = slice(first, first + count)
        if first + count > self._num_columns:
            end = length + count
            places = torch.arange(end - kept, end, device=self._k_BGCd.device) % self._num_columns
        self._k_BGCd[:, :, places] = new.k_BGCd[:, :, count - kept :].to(self._k_BGCd.dtype)
        self._v_BGCd[:, :, places] = new.v_BGCd[:, :, count - kept :].to(self._v_BGCd.dtype)
        assert new.positions_BC is not None, "positions are given"
        self._positions_BC[:, places] = new.positions_BC[:, count - kept :]
        if self._documents_BC is not None and new.documents_BC is not None:
            self._documents_BC[:, places] = new.documents_BC[:, count - kept :]

    def _write_rows(self, new: KeyValue, counts: list[int]) -> None:
        """Write the first counts[b] new tokens of each row b after its own tokens."""
        assert new.positions_BC is not None, "positions are given"
        rows = torch.arange(len(counts), device=self._k_BGCd.device)
        lengths_B = torch.tensor(self._lengths, device=rows.device)
        for place in range(max(counts)):  # as many as were proposed: few
            chosen = torch.tensor([count > place for count in counts], device=rows.device)
            row_b = rows[chosen]
            column_b = (lengths_B[chosen] + place) % self._num_columns
            self._k_BGCd[row_b, :, column_b] = new.k_BGCd[chosen, :, place].to(self._k_BGCd.dtype)
            self._v_BGCd[row_b, :, column_b] = new.v_BGCd[chosen, :, place].to(self._v_BGCd.dtype)
            self._positions_BC[row_b, column_b] = new.positions_BC[:, place].expand(len(counts))[chosen]
            if self._documents_BC is not None and new.documents_BC is not None:
                self._documents_BC[row_b, column_b] = new.documents_BC[:, place].expand(len(counts))[chosen]

    def _joined(self, new: KeyValue) -> KeyValue:
        """Join held keys and values with the new ones: new tokens in a window overwrite keys that they still see."""
        assert new.positions_BC is not None, "positions are given"
        held, dtype, batch = min(max(self._lengths), self._num_columns), self._k_BGCd.dtype, len(self._lengths)
        documents_BC = None
        if self._documents_BC is not None and new.documents_BC is not None:
            documents_BC = torch.cat((self._documents_BC[:, :held], new.documents_BC.expand(batch, -1)), dim=1)
        positions_BC = torch.cat((self._positions_BC[:, :held], new.positions_BC.expand(batch, -1)), dim=1)
        is_plain = self._is_ordered and held == max(self._lengths)  # no column has been overwritten
        return KeyValue(
            torch.cat((self._k_BGCd[:, :, :held], new.k_BGCd.to(dtype)), dim=2),
            torch.cat((self._v_BGCd[:, :, :held], new.v_BGCd.to(dtype)), dim=2),
            None if is_plain else positions_BC,
            documents_BC,
        )


def widest(windows: Sequence[int | None]) -> int | None:
    """Return the largest window; None, which is all positions, is larger than any."""
    known = [window for window in windows if window is not None]
    return max(known) if len(known) == len(windows) else None


def kv_cache_bytes(
    *,
    batch_size: int,
    length: int,
    num_owner_layers: int,
    num_kv_heads: int,
    head_dim: int,
    bytes_per_element: int,
    window: int | None = None,
) -> int:
    """Count the bytes of the keys and values of an attention model: 2 B S M G d elements.

    Args:
        batch_size: B, number of sequences.
        length: S, tokens of a sequence; no more than the window count.
        num_owner_layers: M, layers that own keys and values.
        num_kv_heads: G, key/value heads of one owner layer.
        head_dim: d, head size.
        bytes_per_element: 4 for fp32, 2 for bf16.
        window: Most keys kept; None: all.

    Source: Zuhri et al. 2024, arXiv 2406.09297.
    """
    kept = length if window is None else min(length, window)
    return 2 * batch_size * kept * num_owner_layers * num_kv_heads * head_dim * bytes_per_element
