"""Files of a checkpoint that one process makes of another: tensors in blocks, with moments of zero or none."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.checkpoint.files import write_tensor_file
from moe_train.checkpoint.manifest import ADAM_MOMENTS

FILE_ELEMENTS = 1 << 27  # weights per file; with two moments, a file has 1.6 GB


class TensorFiles:
    """Writer of the files of a checkpoint: it takes tensors in blocks, one after the other."""

    def __init__(self, folder: Path, num_elements: int, moments: Sequence[str] = ADAM_MOMENTS) -> None:
        """Prepare to write.

        Args:
            folder: Folder of the checkpoint, from `begin_checkpoint`.
            num_elements: Most weights of a file, which are kept in memory.
            moments: Names of the moments to add to every weight; they are zero.
        """
        self._folder, self._moments = folder, tuple(moments)
        self._weights, self._zeros = torch.empty(num_elements), torch.zeros(num_elements if moments else 0)
        self._used = 0
        self._ranges: dict[str, list[int]] = {}  # [start, number of elements] of each tensor in the current file
        self._ends: Counter[str] = Counter()  # elements of each tensor that have been added
        self._files: dict[str, dict[str, Any]] = {}

    def add(self, name: str, block: Tensor) -> None:
        """Append the next block of a tensor. fp32, 1-D."""
        while block.numel():
            taken = block[: len(self._weights) - self._used]
            self._weights[self._used : self._used + len(taken)] = taken
            self._ranges.setdefault(name, [self._ends[name], 0])[1] += len(taken)
            self._used, self._ends[name] = self._used + len(taken), self._ends[name] + len(taken)
            block = block[len(taken) :]
            if self._used == len(self._weights):
                self._write()

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write the last file, and return the manifest's entry of every file."""
        if self._used:
            self._write()
        return self._files

    def _write(self) -> None:
        tensors: dict[str, Tensor] = {}
        place = 0
        for name, (_, numel) in self._ranges.items():
            tensors[f"weight/{name}"] = self._weights[place : place + numel]
            tensors |= {f"{moment}/{name}": self._zeros[:numel] for moment in self._moments}
            place += numel
        path = self._folder / f"rank_{len(self._files):05d}.safetensors"
        written = write_tensor_file(path, tensors)
        self._files[path.name] = {"xxh3_128": written.digest, "bytes": written.num_bytes, "ranges": self._ranges}
        self._ranges, self._used = {}, 0
