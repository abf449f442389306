"""Real training runs of small models: started as a user would start them, or, faster, forked with all imports done."""

import atexit
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_train.cli.parity import TRAINING_MODULES
from moe_train.distributed.addresses import free_port
from moe_train.distributed.bootstrap import local_rank_environments
from moe_train.launch.fork_server import ForkedRank, ForkServer, wait_for_all
from moe_train.train.telemetry.records import read_records
from tests.processes import ProcessResult, run_process

ROOT = Path(__file__).resolve().parents[2]
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # ranks that share two cores must not fight for them

# Seconds a step, 2 layers, one of them an MoE layer.
SMALL = (
    "--model.hidden_size=32",
    "--model.num_layers=2",
    "--model.num_heads=2",
    "--model.intermediate_size=64",
    "--model.moe.num_experts=4",
    "--optim.schedule=constant",
    "--optim.warmup_steps=2",
    "--train.sequence_length=32",
    "--train.micro_batch_size=2",
    "--train.precision=fp32",
    "--train.sample_tokens=4",
    "--data.validation_max_bytes=20000",
    "--telemetry.every=1",
)


def train_alone(*arguments: str, timeout: float = 120) -> ProcessResult:
    """One process."""
    return run_process([sys.executable, "-m", "moe_train", "train", *arguments], timeout, env=CPU, cwd=ROOT)


def without_own_place() -> dict[str, str | None]:
    """What removes from an environment the place among ranks that a command in this process has written down."""
    starts = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "CROSS_", "MASTER_", "MOE_TRAIN_", "OMPI_", "PMI", "SLURM_")
    return {name: None for name in os.environ if name.startswith(starts)}


def train_under_torchrun(world_size: int, *arguments: str, timeout: float = 180) -> ProcessResult:
    """Several ranks under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return run_process([*launcher, "launch/train.py", *arguments], timeout, env=without_own_place() | CPU, cwd=ROOT)


def train_under_deepspeed(world_size: int, *arguments: str, timeout: float = 180) -> ProcessResult:
    """Several ranks under DeepSpeed's launcher, as `make train` does."""
    launcher = [Path(sys.executable).parent / "deepspeed", "--log_level", "critical", "--num_gpus", str(world_size)]
    launcher += ["--master_port", str(free_port())]
    return run_process([*launcher, "launch/train.py", *arguments], timeout, env=without_own_place() | CPU, cwd=ROOT)


def train_forked(world_size: int, *arguments: str, timeout: float = 120) -> ProcessResult:
    """`moe-train train` as `run_forked` does it."""
    return run_forked(world_size, "train", *arguments, timeout=timeout)


def in_both_precisions(folder: Path, *arguments: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The same training on one rank in bf16 and in fp32. Returns: their records, step by step."""
    records = []
    for precision in ("bf16", "fp32"):
        own = folder / precision
        result = train_forked(1, *arguments, f"--train.precision={precision}", f"--train.run_dir={own}")
        assert result.returncode == 0, result
        records.append(read_records(own / "metrics.jsonl"))
    return list(zip(*records, strict=True))


def run_forked(world_size: int, *arguments: str, timeout: float = 120) -> ProcessResult:
    """A subcommand of moe-train on ranks without a launcher and without the seconds of their imports.

    Returns: the exit code of the first rank that failed, and the outputs of all ranks, one after the other.
    """
    started = time.monotonic()
    results = wait_for_all(_start_forked(world_size, arguments), timeout)
    code = next((result.returncode for result in results if result.returncode), 0)
    stdout, stderr = "".join(r.stdout for r in results), "".join(r.stderr for r in results)
    command = [f"{world_size} forked x", "moe_train", *arguments]
    return ProcessResult(command, code, stdout, stderr, time.monotonic() - started)


def start_forked(world_size: int, *arguments: str) -> Sequence[ForkedRank]:
    """Starts the ranks of a training and leaves them running: to poll, to kill, and to wait for."""
    return _start_forked(world_size, ["train", *arguments])


def _start_forked(world_size: int, arguments: Sequence[str]) -> Sequence[ForkedRank]:
    environments = local_rank_environments(world_size)
    server = fork_server()
    return [server.start("moe_train.cli.main:main", list(arguments), each, ROOT) for each in environments]


def fork_server() -> ForkServer:
    """One for all tests of the session; it imports when it is first used."""
    if _make_fork_server().closed:  # a test that was interrupted has ended it
        _make_fork_server.cache_clear()
    return _make_fork_server()


@functools.cache
def _make_fork_server() -> ForkServer:
    server = ForkServer(TRAINING_MODULES, local_rank_environments(1)[0])
    atexit.register(server.close)
    return server


def losses(run_dir: Path) -> dict[int, float]:
    """train/loss by step."""
    return {record["step"]: record["train/loss"] for record in records(run_dir) if "train/loss" in record}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
