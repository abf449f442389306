"""What a mixer keeps between decoding steps.

Legend: B batch, G key/value heads, C keys so far, S new keys, d head size.
"""

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


class LayerState(Protocol):
    """A layer's memory of the sequence while decoding. Every mixer's state has these four."""

    def append(self, new: Any) -> Any:
        """Take in what the mixer computed for new tokens; returns what it is to read, old and new."""

    def snapshot(self) -> Any:
        """A mark to come back to."""

    def restore(self, mark: Any) -> None:
        """Forget everything appended since the mark."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


class KeyValueState:
    """Keys and values of all positions so far, concatenated."""

    def __init__(self) -> None:
        self._held: KeyValue | None = None

    def append(self, new: KeyValue) -> KeyValue:
        """Add the keys and values of S new tokens; returns those of all tokens so far."""
        old = self._held
        if old is not None:
            assert (old.documents_BC is None) == (new.documents_BC is None), "documents are isolated always or never"
            documents = None
            if old.documents_BC is not None and new.documents_BC is not None:
                documents = torch.cat((old.documents_BC, new.documents_BC), dim=1)
            new = KeyValue(
                torch.cat((old.k_BGCd, new.k_BGCd), dim=2),
                torch.cat((old.v_BGCd, new.v_BGCd), dim=2),
                torch.cat((old.positions_BC, new.positions_BC), dim=1),
                documents,
            )
        self._held = new
        return new

    def snapshot(self) -> KeyValue | None:
        """A mark to come back to; the tensors are never written in place, so that it costs nothing."""
        return self._held

    def restore(self, mark: KeyValue | None) -> None:
        """Forget everything appended since the mark."""
        self._held = mark

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return 0 if self._held is None else self._held.k_BGCd.nbytes + self._held.v_BGCd.nbytes
