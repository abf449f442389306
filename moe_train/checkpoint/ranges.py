"""Ranges of logical tensors, read from the files that hold them."""

from bisect import bisect_right
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_train.checkpoint.manifest import DamagedCheckpoint, Manifest, cannot_read


class RangeReader:
    """Reader of ranges of logical tensors; it opens each file once."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "RangeReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()

    def read(self, name: str, kind: str, start: int, end: int) -> Tensor:
        """Read a range of a tensor, joined from the pieces that hold it.

        Args:
            name: Name of the logical tensor.
            kind: One of manifest.kinds_of(name).
            start: First element of the range in the flattened tensor.
            end: Element behind the last one of the range; an empty range gives an empty tensor.

        Returns:
            The values, fp32 [end - start].

        Raises:
            DamagedCheckpoint: If a file is missing, or does not hold what the manifest says.
        """
        pieces = self.manifest.pieces[name]
        first = max(0, bisect_right(pieces, start, key=lambda piece: piece.start) - 1)
        parts = []
        for piece in pieces[first:]:
            if piece.start >= end:
                break
            low, high = max(start, piece.start) - piece.start, min(end, piece.start + piece.numel) - piece.start
            if low < high:
                parts.append(self._read_piece(piece.file, f"{kind}/{name}", low, high))
        found = parts[0] if len(parts) == 1 else torch.cat([torch.empty(0), *parts])
        assert found.numel() == end - start, "a range inside the tensor"
        return found

    def _read_piece(self, file: str, entry: str, low: int, high: int) -> Tensor:
        path = self.manifest.folder / file
        try:
            if file not in self._open:
                self._open[file] = safe_open(path, framework="pt")
            found: Tensor = self._open[file].get_slice(entry)[low:high]
        except (OSError, RuntimeError, SafetensorError) as error:  # torch maps the file and raises RuntimeErrors
            raise cannot_read(path, error) from error
        if found.dtype != torch.float32 or found.shape != (high - low,):
            raise DamagedCheckpoint(f"{path} does not hold the ranges that the manifest names: {entry}")
        return found
