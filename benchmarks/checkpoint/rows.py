"""A rank of the checkpoint benchmark: saves, copies and loads in turn, and tells how long each took.

python -m benchmarks.checkpoint.rows FOLDER ROUNDS [options of moe-train train]
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.runner.resolved import resolve_for
from benchmarks.runner.rounds import in_turn
from moe_train.checkpoint.folders import Retention
from moe_train.checkpoint.reader import load_checkpoint
from moe_train.checkpoint.resume_point import find_resume_point
from moe_train.checkpoint.writer import CheckpointWriter
from moe_train.config.load import load_config
from moe_train.data import TrainEntry, TrainingSequences
from moe_train.distributed.bootstrap import discover_world, init_process_group, leave_process_group, set_threads
from moe_train.distributed.collectives import barrier, gather_objects
from moe_train.distributed.mesh import create_background_group
from moe_train.host.memory import keep_freed_memory
from moe_train.train.batches import BatchPlan, micro_batches
from moe_train.train.engine.build import make_engine
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.progress import Progress

_DEVICE = torch.device("cpu")
_BLOCK = 1 << 24  # bytes copied or read at once, as the trainer does
_NUM_TOKENS = 1 << 14  # of the training data, which is random
_LEARNING_RATE = 1e-4
_NUM_STEPS = 4  # in each round, timed with no save under way


def main(arguments: Sequence[str]) -> int:
    """Measure; rank 0 writes rounds.json into the folder. Collective: all ranks.

    Args:
        arguments: Folder, number of rounds, and options of `moe-train train`.
    """
    folder, num_rounds = Path(arguments[0]), int(arguments[1])
    world = discover_world()
    config = load_config([*arguments[2:], f"--train.run_dir={folder}"], program="benchmarks.checkpoint")
    config = resolve_for(config, world)
    set_threads(config.parallel.threads_per_rank, world)
    keep_freed_memory()  # as in training
    init_process_group(world, _DEVICE, config.parallel.timeout_seconds)
    engine = make_engine(config, _DEVICE)
    plan = BatchPlan(config.train.micro_batch_size, config.train.global_batch_size, world.rank, world.world_size)
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=_NUM_TOKENS)
    data = TrainingSequences((TrainEntry(tokens),), config.train.sequence_length, seed=0)
    measurement = Measurement(folder, engine, plan, data)
    rounds = measurement.run(num_rounds)
    if world.rank == 0:
        (folder / "rounds.json").write_text(json.dumps({"bytes": measurement.num_bytes, "rounds": rounds}))
    barrier()
    leave_process_group(0)
    return 0


class Measurement:
    """The parts of a round. Collective: every method, all ranks."""

    def __init__(self, folder: Path, engine: TrainEngine, plan: BatchPlan, data: TrainingSequences) -> None:
        """Prepare: a step, so that the state is that of a run, and memory for the plain copy.

        Args:
            folder: Where everything is written, on the disk to measure.
            engine: Engine whose state is saved and loaded.
            plan: Sizes of a batch, and this rank.
            data: Sequences to train on.
        """
        self._folder, self._engine, self._plan, self._data = folder, engine, plan, data
        self._checkpoints, self._copy = folder / "checkpoints", folder / f"copy_{plan.rank}"
        self._progress = Progress()
        # Nothing is removed while a save is timed.
        self._writer = CheckpointWriter(self._checkpoints, plan.rank, create_background_group(), Retention(1000))
        self._step()
        own = sum(state.numel() for fragment in engine.fragments() for state in fragment.states.values())
        self._source, self._target = torch.ones(own), torch.ones(own)  # touched
        self.num_bytes = sum(gather_objects(self._source.nbytes))

    def run(self, num_rounds: int) -> dict[str, list[float]]:
        """All rounds: seconds by what was measured, a figure per round; step_ratio is a ratio."""
        found: dict[str, list[float]] = {"first_stall": [self._save()["stall"]]}
        for number in range(num_rounds):
            parts = in_turn([self._copy_files, self._save], number)
            one: dict[str, float] = {"host_copy": _slowest(lambda: self._target.copy_(self._source))}
            for part in (*parts, self._compare_steps, self._read):
                one |= part()
                self._tidy()
            for name, value in one.items():
                found.setdefault(name, []).append(value)
        return found

    def _save(self) -> dict[str, float]:
        """Save with nothing else going on."""
        self._step()  # another state under another name
        barrier()
        began = time.perf_counter()
        self._writer.start(self._engine, self._values())
        stall = time.perf_counter() - began
        self._finish_save()
        write = time.perf_counter() - began
        return {"stall": max(gather_objects(stall)), "write": max(gather_objects(write))}

    def _copy_files(self) -> dict[str, float]:
        """Copy the file of each rank, which the page cache has."""
        file = self._newest_file()
        _read_plainly(file)  # so that it has
        found = {"copy": _slowest(lambda: _copy_durably(file, self._copy))}
        self._tidy()
        if shutil.which("dd"):
            command = ["dd", f"if={file}", f"of={self._copy}", f"bs={_BLOCK}", "conv=fsync", "status=none"]
            found["dd"] = _slowest(lambda: subprocess.run(command, check=True))
        return found

    def _compare_steps(self) -> dict[str, float]:
        """Time steps with no save under way, and steps that begin and end while every rank writes."""
        without = [self._step() for _ in range(_NUM_STEPS)]
        self._writer.start(self._engine, self._values())
        beside = []
        while True:
            seconds = self._step()
            if any(gather_objects(self._writer.is_done)):
                break
            beside.append(seconds)
        self._finish_save()
        ratio = {"step_ratio": statistics.median(beside) / statistics.median(without)} if beside else {}
        return {"step": statistics.median(without)} | ratio

    def _read(self) -> dict[str, float]:
        """Resume, copy and read, each from the disk."""
        file = self._newest_file()
        found = {}
        for name, action in (
            ("read", self._resume),
            ("cold_copy", lambda: _copy_durably(file, self._copy)),
            ("plain_read", lambda: _read_plainly(file)),
        ):
            self._tidy()
            _drop_from_cache(file)
            found[name] = _slowest(action)
        return found

    def _resume(self) -> None:
        found = find_resume_point("auto", self._checkpoints, self._plan.rank, self._plan.world_size)
        assert found.manifest is not None and not found.damaged
        load_checkpoint(self._engine, found.manifest)

    def _step(self) -> float:
        """Train a step; seconds of the slowest rank."""
        size = self._plan.step_size(self._data.sequence_length)
        batches = micro_batches(self._data, self._plan, self._progress, None, _DEVICE)
        seconds = _slowest(lambda: self._engine.train_step(batches, size, _LEARNING_RATE))
        consumed = self._progress.consumed_sequences + self._plan.global_batch_size
        self._progress = Progress(self._progress.step + 1, consumed)
        return seconds

    def _finish_save(self) -> None:
        outcome = self._writer.wait()
        if outcome is None or outcome.folder is None:
            raise RuntimeError(f"the save failed: {outcome}")
        self._newest = outcome.folder

    def _newest_file(self) -> Path:
        return self._newest / f"rank_{self._plan.rank:05d}.safetensors"

    def _tidy(self) -> None:
        """Remove what is not needed any more, and let the disk come to rest."""
        self._copy.unlink(missing_ok=True)
        barrier()
        if self._plan.rank == 0:
            for folder in self._older():
                shutil.rmtree(folder)
            os.sync()
        barrier()

    def _older(self) -> Iterator[Path]:
        return (folder for folder in self._checkpoints.iterdir() if folder.is_dir() and folder != self._newest)

    def _values(self) -> dict[str, object]:
        """Values of the manifest."""
        return {
            "step": self._progress.step,
            "consumed_sequences": self._progress.consumed_sequences,
            "tokenizer": "random",
            "guard": {"grad_norms": [], "skipped_steps": 0},
            "layout": {},
            "config": {},
        }


def _slowest(action: Callable[[], object]) -> float:
    """Seconds of the rank that takes longest; all begin together. Collective: all ranks."""
    barrier()
    began = time.perf_counter()
    action()
    return max(gather_objects(time.perf_counter() - began))


def _copy_durably(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_plainly(file: Path) -> None:
    block = bytearray(_BLOCK)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(block):
            pass


def _drop_from_cache(file: Path) -> None:
    """Only what the disk has can be dropped: the file was synced."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
