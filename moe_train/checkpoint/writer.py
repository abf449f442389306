"""Writer from snapshots to files while training continues: one thread per rank, with a process group of their own."""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.checkpoint.files import WrittenFile, write_tensor_file
from moe_train.checkpoint.folders import (
    Retention,
    begin_checkpoint,
    complete_checkpoint,
    part_folder,
    remove_checkpoint,
    superfluous,
)
from moe_train.checkpoint.manifest import FORMAT_VERSION
from moe_train.checkpoint.sharded_state import ShardedState
from moe_train.checkpoint.snapshot import HostMemory, Snapshot
from moe_train.distributed.collectives import Group, gather_objects
from moe_train.distributed.consensus import run_on_all_ranks


@dataclass(frozen=True)
class SaveOutcome:
    """Outcome of a save, the same on every rank except for seconds and num_bytes.

    Attributes:
        step: Step of the saved state.
        folder: Folder of the checkpoint; None if the save failed.
        error: Why the save failed, with the rank; None if it did not fail.
        seconds: Time from the snapshot to the end, in the background.
        num_bytes: Size of this rank's file.
    """

    step: int
    folder: Path | None
    error: str | None
    seconds: float
    num_bytes: int


class CheckpointWriter:
    """Writer of a run's checkpoints, one at a time."""

    def __init__(
        self,
        checkpoints: Path,
        rank: int,
        group: Group | None,
        retention: Retention,
        writing: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """Create a writer without a save under way.

        Args:
            checkpoints: Folder of the run's checkpoints, visible to all ranks.
            rank: Rank of this process.
            group: All ranks, for this writer alone, from `create_background_group`; None: one process.
            retention: Rule for which checkpoints are kept.
            writing: Called around every change of the folder; it raises a RuntimeError if another run has taken the
                folder over.
        """
        self._checkpoints, self._rank, self._group, self._retention = checkpoints, rank, group, retention
        self._writing = writing
        self._memory = HostMemory()
        self._began = time.monotonic()
        self._thread: threading.Thread | None = None
        self._outcome: SaveOutcome | None = None

    def start(self, state: ShardedState, values: Mapping[str, Any]) -> SaveOutcome | None:
        """Copy the state, and begin to write it in the background. First wait for the previous save.

        Args:
            state: Training state to save.
            values: Values of the manifest: step, consumed_sequences, tokenizer, guard (state of step control), layout
                and config.

        Returns:
            Outcome of the previous save, if `wait` has not returned it yet.

        Collective: All ranks.
        """
        before = self.wait()
        self._began = time.monotonic()
        snapshot = self._memory.take(state)
        self._thread = threading.Thread(
            target=self._save, args=(snapshot, dict(values)), name="checkpoint writer", daemon=True
        )
        self._thread.start()
        return before

    @property
    def seconds_since_start(self) -> float:
        """Seconds since the last save began on this rank; before the first save, since the writer was created."""
        return time.monotonic() - self._began

    @property
    def is_done(self) -> bool:
        """Whether a save has ended on this rank, and `wait` has not returned its outcome yet."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> SaveOutcome | None:
        """Wait until the last save has ended on this rank; return its outcome once, and None after that."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        outcome, self._outcome = self._outcome, None
        return outcome

    def _save(self, snapshot: Snapshot, values: dict[str, Any]) -> None:
        began, step = time.monotonic(), values["step"]
        folder, error, num_bytes = None, None, 0
        try:
            written = self._write_files(step, snapshot)
            num_bytes = written.num_bytes
            folder = self._complete(step, snapshot, values, written)
        except Exception as problem:  # any error: `SaveOutcome` reports it, because this thread's end is not observed
            error = f"{problem}" if str(problem) else type(problem).__name__
            if self._rank == 0:  # the disk may be full
                with contextlib.suppress(OSError, RuntimeError), self._writing():  # else it is another run's now
                    shutil.rmtree(self._part(step), ignore_errors=True)
        self._outcome = SaveOutcome(step, folder, error, time.monotonic() - began, num_bytes)

    def _write_files(self, step: int, snapshot: Snapshot) -> WrittenFile:
        self._run_on_first_rank(lambda: begin_checkpoint(self._checkpoints, step))
        path = self._part(step) / self._file

        def write() -> WrittenFile:
            if not snapshot.ranges:  # other ranks own all elements of the model
                return WrittenFile("", 0)
            with self._writing():
                path.touch()  # the long write goes into a file that was still this run's
            return write_tensor_file(path, snapshot.tensors)

        return run_on_all_ranks(write, group=self._group)

    def _complete(self, step: int, snapshot: Snapshot, values: dict[str, Any], written: WrittenFile) -> Path:
        entry = {"xxh3_128": written.digest, "bytes": written.num_bytes, "ranges": snapshot.ranges}
        everyone = gather_objects((self._file, entry, snapshot.shapes, snapshot.tensor_moments), self._group)
        part = self._part(step)
        manifest = {
            "format_version": FORMAT_VERSION,
            **values,
            "optimizer_step": snapshot.optimizer_step,
            "loss_scale": snapshot.loss_scale,
            "buffers": snapshot.buffers,
            "moments": list(snapshot.moments),
            "tensor_moments": {name: list(own) for *_, moments in everyone for name, own in moments.items()},
            "tensors": {name: list(shape) for _, _, shapes, _ in everyone for name, shape in shapes.items()},
            "files": {file: entry for file, entry, *_ in everyone if entry["ranges"]},
        }
        self._run_on_first_rank(lambda: complete_checkpoint(part, manifest))
        if self._rank == 0:
            with contextlib.suppress(OSError):  # a removal that fails does not make the save fail
                for folder in superfluous(self._checkpoints, self._retention):
                    with self._writing():
                        remove_checkpoint(folder)
        return part.with_suffix("")

    def _run_on_first_rank(self, change: Callable[[], object]) -> None:
        """Change the folder on rank 0; raise on all ranks if that fails."""

        def act() -> None:
            if self._rank == 0:
                with self._writing():
                    change()

        run_on_all_ranks(act, group=self._group)

    def _part(self, step: int) -> Path:
        return part_folder(self._checkpoints, step)

    @property
    def _file(self) -> str:
        return f"rank_{self._rank:05d}.safetensors"
