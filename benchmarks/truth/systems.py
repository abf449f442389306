"""How the truth benchmark runs its systems: ranks that are forked from a server which has imported all of them.

This project is `moe-train train` with its checkpoints, as anyone runs it. The ranks of the peers are peers.py; between
two layouts their checkpoints go through DeepSpeed's own converter to the universal form.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.runner.processes import ROOT
from benchmarks.truth.cases import NUDGED, OPTIONS, OURS, SAVED_AFTER, TERMS, Case, Task, code_of
from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import read_manifest
from moe_train.checkpoint.ranges import RangeReader
from moe_train.checkpoint.tools.inspection import read_chunks
from moe_train.cli.parity import TRAINING_MODULES
from moe_train.distributed.bootstrap import local_rank_environments
from moe_train.launch.fork_server import ForkedRank, ForkServer
from moe_train.train.parity import NUM_STEPS, Layout
from moe_train.train.telemetry.records import Record, read_records

_RUN_SECONDS = 400  # for the ranks of one run
_GRACE_SECONDS = 10  # for the other ranks, after one has failed
_CONVERTER_SECONDS = 300


class CaseFailed(Exception):
    """A rank or the converter did not end well; the message is the last line that it wrote."""


@dataclass(frozen=True)
class Numbers:
    """What a run gave.

    Attributes:
        records: Records of all its steps, with train/loss and train/grad_norm.
        weights: Weights after the last step, by name.
    """

    records: list[Record]
    weights: dict[str, torch.Tensor]


class Systems:
    """All systems, ready to run.

    Use it as a context: it ends the server of the ranks.
    """

    def __init__(self, folder: Path) -> None:
        """Start the server.

        Args:
            folder: For run folders and checkpoints.
        """
        self._folder, self._num_folders = folder, 0
        self._saved: dict[tuple[str, str, Layout], Path] = {}
        modules = (*TRAINING_MODULES, "benchmarks.truth.peers", "transformers.models.mixtral.modeling_mixtral")
        self._server = ForkServer(modules, local_rank_environments(1)[0])

    def __enter__(self) -> "Systems":
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.close()

    def run(self, system: str, case: Case, terms: str) -> Numbers:
        """Run a case.

        Args:
            system: Name of the system.
            case: What it is asked to do.
            terms: Name of the losses.

        Raises:
            CaseFailed: It crashed, hung or refused.
        """
        if case.saved_by is None:
            nudge = [NUDGED] if case.is_control else []
            return self._train(system, case.layout, terms, self._new_folder(system, case.code, terms), extra=nudge)
        first = self._save(system, case.saved_by, terms)
        folder = self._new_folder(system, case.code, terms)
        if system == OURS:
            shutil.copytree(first, folder, symlinks=True)
            return self._train(system, case.layout, terms, folder)
        # A checkpoint is loaded as it is where DeepSpeed needs no more: with the same ranks, EP and ZeRO stage.
        same = code_of(case.saved_by).partition("a")[0] == code_of(case.layout).partition("a")[0]
        if not same:
            convert_to_universal(first / "checkpoint")
        task = self._task(system, case.layout, folder, load=str(first / "checkpoint"), is_universal=not same)
        second = self._run_peer(task, terms)
        return Numbers([*json.loads((first / "records.json").read_text()), *second.records], second.weights)

    def _new_folder(self, system: str, code: str, terms: str) -> Path:
        self._num_folders += 1
        folder = self._folder / f"{self._num_folders:04d}_{system}_{terms}_{code}"
        if system != OURS:  # whose trainer makes its own
            folder.mkdir()
        return folder

    def _task(self, system: str, layout: Layout, folder: Path, *, load: str = "", is_universal: bool = False) -> Task:
        records, weights = str(folder / "records.json"), str(folder / "weights.safetensors")
        first = SAVED_AFTER + 1 if load else 1
        return Task(system, layout, first, NUM_STEPS, records, weights, load=load, is_universal=is_universal)

    def _save(self, system: str, layout: Layout, terms: str) -> Path:
        """Train the first half and save; the folder. Once for all cases that go on from it."""
        key = (system, terms, layout)
        if key not in self._saved:
            folder = self._new_folder(system, f"{code_of(layout)}_saved", terms)
            if system == OURS:
                self._train(system, layout, terms, folder, SAVED_AFTER)
            else:
                records, weights = str(folder / "records.json"), str(folder / "weights.safetensors")
                save = str(folder / "checkpoint")
                self._run_peer(Task(system, layout, 1, SAVED_AFTER, records, weights, save=save), terms)
            self._saved[key] = folder
        return self._saved[key]

    def _train(
        self,
        system: str,
        layout: Layout,
        terms: str,
        folder: Path,
        steps: int = NUM_STEPS,
        extra: Sequence[str] = (),
    ) -> Numbers:
        if system != OURS:
            return self._run_peer(self._task(system, layout, folder), terms, extra)
        options = [*_options(layout, terms), *extra, f"--train.steps={steps}", f"--train.run_dir={folder}"]
        self._run_ranks("moe_train.cli.main:main", ["train", *options], layout.world_size)
        last = list_checkpoints(folder / "checkpoints")[-1]
        return Numbers(read_records(folder / "metrics.jsonl"), read_weights(last))

    def _run_peer(self, task: Task, terms: str, extra: Sequence[str] = ()) -> Numbers:
        # Steps count from the first of the run, so that a run which goes on takes the data where it left them.
        options = [*_options(task.layout, terms), *extra, f"--train.steps={task.last}"]
        options.append(f"--train.run_dir={Path(task.records).parent}")
        self._run_ranks("benchmarks.truth.peers:main", [task.as_json(), *options], task.layout.world_size)
        return Numbers(json.loads(Path(task.records).read_text()), load_file(task.weights))

    def _run_ranks(self, function: str, arguments: Sequence[str], num_ranks: int) -> None:
        environments = local_rank_environments(num_ranks)
        _wait([self._server.start(function, list(arguments), each, ROOT) for each in environments])


def _options(layout: Layout, terms: str) -> list[str]:
    given = [option for option in layout.options() if not option.startswith("--parallel.zero_stage")]
    stage = f"--parallel.zero_stage={max(1, layout.zero_stage)}"  # the task of a peer has its own
    return [*OPTIONS, *given, stage, f"--model.moe.switch_aux_coef={TERMS[terms]}"]


def _wait(ranks: Sequence[ForkedRank]) -> None:
    """Wait for ranks; when one has failed, end the others.

    Raises:
        CaseFailed: With the last line of the rank that failed first.
    """
    deadline, first = time.monotonic() + _RUN_SECONDS, None
    try:
        while time.monotonic() < deadline:
            codes = [rank.poll() for rank in ranks]
            if all(code is not None for code in codes):
                break
            if first is None and any(codes):
                first = next(rank for rank, code in zip(ranks, codes, strict=True) if code)
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            time.sleep(0.02)
        failed = [rank for rank in ranks if rank.poll()]
        if first is None and failed:
            first = failed[0]
        if first is not None:
            raise CaseFailed(_last_line(first))
        if any(rank.poll() is None for rank in ranks):
            raise CaseFailed(f"not done after {_RUN_SECONDS} s")
    finally:
        for rank in ranks:
            rank.end()


def _last_line(rank: ForkedRank) -> str:
    stdout, stderr = rank.output()
    return last_words(stdout + "\n" + stderr) or f"ended with code {rank.poll()}"


def last_words(output: str) -> str:
    """Find the last line of an output; for an error without a message, also the line of code that it came from.

    Args:
        output: What a process wrote.
    """
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line).strip() for line in output.splitlines()]
    lines = [line for line in lines if line.strip("^~ ")]
    if not lines:
        return ""
    is_bare = re.fullmatch(r"[\w.]+(Error|Exception)", lines[-1]) is not None and len(lines) > 1
    return f"{lines[-1]}: {lines[-2]}" if is_bare else lines[-1]


def convert_to_universal(checkpoints: Path) -> None:
    """Convert the checkpoint of a folder to DeepSpeed's universal form, once, by DeepSpeed's own command.

    Args:
        checkpoints: Folder that `save_checkpoint` was given.

    Raises:
        CaseFailed: The converter failed.
    """
    target = checkpoints / "universal"
    if target.exists():
        return
    source = checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source)]
    command += ["--output_folder", str(target), "--num_extract_workers", "1", "--num_merge_workers", "1"]
    command.append("--inject_missing_state")  # what only Megatron-DeepSpeed's checkpoints have
    environment = local_rank_environments(1)[0]
    try:
        done = subprocess.run(
            command, cwd=checkpoints, env=environment, capture_output=True, text=True, timeout=_CONVERTER_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise CaseFailed(f"ds_to_universal: not done after {_CONVERTER_SECONDS} s") from error
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)  # half of it would be loaded by the next case
        raise CaseFailed(f"ds_to_universal: {last_words(done.stderr) or f'code {done.returncode}'}")


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read the weights of one of this project's checkpoints, each flattened."""
    manifest = read_manifest(checkpoint)
    with RangeReader(manifest) as reader:
        return {name: torch.cat(list(read_chunks(reader, manifest, name, "weight"))) for name in manifest.shapes}
