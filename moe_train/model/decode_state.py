"""What a model keeps between decoding steps: one entry for every layer that owns keys and values.

Legend: B batch, G key/value heads, C keys so far, S new keys, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyValue:
    """Keys and values that an owner layer publishes for itself and the layers above that read them.

    Attributes:
        k_BGCd: Keys after rotary embedding.
        v_BGCd: Values.
        positions_BC: int64 positions of the keys; B may be 1.
        documents_BC: int64 document ids of the keys, or None.
    """

    k_BGCd: Tensor
    v_BGCd: Tensor
    positions_BC: Tensor
    documents_BC: Tensor | None


@dataclass(frozen=True)
class CacheSpec:
    """The room that is set aside before the first token.

    Attributes:
        batch_size: Sequences that are decoded together.
        max_length: Most tokens of one of them, padding included.
        dtype: Of keys and values: bf16 and fp32 are usual, whatever the model computes in.
        device: Where the model is.
    """

    batch_size: int
    max_length: int
    dtype: torch.dtype
    device: torch.device


class DecodeState(Protocol):
    """A layer's memory of the sequence while decoding. Every mixer's state has these four."""

    def append(self, new: Any) -> Any:
        """Take in what the mixer computed for new tokens; returns what it is to read, old and new."""

    def snapshot(self) -> Any:
        """A mark to come back to; one that was taken after another is void once that is restored."""

    def restore(self, mark: Any) -> None:
        """Forget everything appended since the mark; it can be restored again."""

    @property
    def nbytes(self) -> int:
        """Bytes set aside."""


@dataclass(frozen=True)
class _Mark:
    """Where a KeyValueState was: its length, and a copy of its columns where they will be written over."""

    length: int
    columns: KeyValue | None


class KeyValueState:
    """Keys and values of all positions so far, or of the last `window`, in memory that is set aside at once.

    Token number i is in column i; with a window, in column i modulo the number of columns.
    """

    def __init__(self, room: CacheSpec, num_kv_heads: int, head_dim: int, window: int | None = None) -> None:
        """Set the memory aside.

        Args:
            room: For how much.
            num_kv_heads: G.
            head_dim: d.
            window: Most keys that a query sees, itself included: older ones are not kept; None: all.
        """
        self._max_length, self._window, self._length = room.max_length, window, 0
        columns = room.max_length if window is None else min(window, room.max_length)
        shape = (room.batch_size, num_kv_heads, columns, head_dim)
        self._k_BGCd, self._v_BGCd = (torch.empty(shape, dtype=room.dtype, device=room.device) for _ in range(2))
        self._positions_BC = torch.zeros(room.batch_size, columns, dtype=torch.int64, device=room.device)
        self._documents_BC: Tensor | None = None

    def append(self, new: KeyValue) -> KeyValue:
        """Add the keys and values of S new tokens.

        Returns:
            Those of all tokens so far; with a window, those that the new tokens can see, in any order. Views where
            possible: valid until the next call.

        Raises:
            ValueError: If there is no room left.
        """
        count = new.k_BGCd.shape[2]
        end = self._length + count
        if end > self._max_length:
            raise ValueError(f"{end} tokens are more than the cache has room for: max_length ({self._max_length})")
        if self._length == 0:
            self._documents_BC = None if new.documents_BC is None else torch.zeros_like(self._positions_BC)
        assert (self._documents_BC is None) == (new.documents_BC is None), "documents are isolated always or never"
        columns = self._k_BGCd.shape[2]
        if end <= columns or count == 1:
            start = self._length % columns
            self._write(new, slice(start, start + count))
            self._length = end
            return self._read()
        joined = self._joined(new)
        kept = min(count, columns)
        places_C = torch.arange(end - kept, end, device=self._k_BGCd.device) % columns
        self._write(_last(new, kept), places_C)
        self._length = end
        return joined

    def snapshot(self) -> _Mark:
        """A mark to come back to. Nothing is copied, but with a window the columns, which will be written over."""
        held = self._read() if self._window is not None else None
        return _Mark(self._length, None if held is None else _mapped(torch.clone, held))

    def restore(self, mark: _Mark) -> None:
        """Forget everything appended since the mark."""
        self._length = mark.length
        if mark.columns is not None:
            self._write(mark.columns, slice(0, mark.columns.k_BGCd.shape[2]))

    @property
    def nbytes(self) -> int:
        """Bytes set aside for keys and values: 2 B C G d of the dtype, C being max_length or the window."""
        return self._k_BGCd.nbytes + self._v_BGCd.nbytes

    def _read(self) -> KeyValue:
        held = min(self._length, self._k_BGCd.shape[2])
        documents_BC = None if self._documents_BC is None else self._documents_BC[:, :held]
        return KeyValue(
            self._k_BGCd[:, :, :held], self._v_BGCd[:, :, :held], self._positions_BC[:, :held], documents_BC
        )

    def _write(self, new: KeyValue, places: slice | Tensor) -> None:
        self._k_BGCd[:, :, places] = new.k_BGCd.to(self._k_BGCd.dtype)
        self._v_BGCd[:, :, places] = new.v_BGCd.to(self._v_BGCd.dtype)
        self._positions_BC[:, places] = new.positions_BC
        if self._documents_BC is not None and new.documents_BC is not None:
            self._documents_BC[:, places] = new.documents_BC

    def _joined(self, new: KeyValue) -> KeyValue:
        """What is held, and the new tokens behind it."""
        old, dtype = self._read(), self._k_BGCd.dtype
        documents_BC = None
        if old.documents_BC is not None and new.documents_BC is not None:
            documents_BC = torch.cat((old.documents_BC, new.documents_BC.expand(len(old.documents_BC), -1)), dim=1)
        positions_BS = new.positions_BC.expand(len(old.positions_BC), -1)
        return KeyValue(
            torch.cat((old.k_BGCd, new.k_BGCd.to(dtype)), dim=2),
            torch.cat((old.v_BGCd, new.v_BGCd.to(dtype)), dim=2),
            torch.cat((old.positions_BC, positions_BS), dim=1),
            documents_BC,
        )


class Cache:
    """The states of all layers of a model. Exactly the layers that own something have an entry."""

    def __init__(self, states: Sequence[DecodeState | None]) -> None:
        """Hold them.

        Args:
            states: One a layer, as its mixer made it; None where the layer reads another layer's.
        """
        self._states = tuple(states)

    def state(self, layer: int) -> DecodeState | None:
        """The entry of a layer, or None where it keeps nothing of its own."""
        return self._states[layer]

    @property
    def owner_layers(self) -> tuple[int, ...]:
        """The layers that have an entry."""
        return tuple(layer for layer, state in enumerate(self._states) if state is not None)

    def snapshot(self) -> tuple[Any, ...]:
        """A mark of every layer to come back to, as after tokens that may be rejected."""
        return tuple(None if state is None else state.snapshot() for state in self._states)

    def restore(self, marks: Sequence[Any]) -> None:
        """Forget everything since the marks."""
        for state, mark in zip(self._states, marks, strict=True):
            if state is not None:
                state.restore(mark)

    @property
    def nbytes(self) -> int:
        """Bytes set aside over all layers."""
        return sum(state.nbytes for state in self._states if state is not None)


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
    """Bytes of the keys and values of an attention model: 2 B S M G d elements.

    Args:
        batch_size: B.
        length: S, tokens of a sequence; no more than the window count.
        num_owner_layers: M, layers that own keys and values.
        num_kv_heads: G, of one owner layer.
        head_dim: d.
        bytes_per_element: 4 for fp32, 2 for bf16.
        window: Most keys kept; None: all.

    Source: Zuhri et al. 2024, arXiv 2406.09297.
    """
    kept = length if window is None else min(length, window)
    return 2 * batch_size * kept * num_owner_layers * num_kv_heads * head_dim * bytes_per_element


def _mapped(change: Any, held: KeyValue) -> KeyValue:
    documents_BC = None if held.documents_BC is None else change(held.documents_BC)
    return KeyValue(change(held.k_BGCd), change(held.v_BGCd), change(held.positions_BC), documents_BC)


def _last(new: KeyValue, count: int) -> KeyValue:
    """Its last so many keys."""
    return KeyValue(
        new.k_BGCd[:, :, -count:],
        new.v_BGCd[:, :, -count:],
        new.positions_BC[:, -count:],
        None if new.documents_BC is None else new.documents_BC[:, -count:],
    )
