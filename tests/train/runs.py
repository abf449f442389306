"""Real training runs of small models, started as a user would start them."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

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


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_alone(*arguments: str, timeout: float = 120) -> ProcessResult:
    """One process."""
    return run_process([sys.executable, "-m", "moe_train", "train", *arguments], timeout, env=CPU, cwd=ROOT)


def train_under_torchrun(world_size: int, *arguments: str, timeout: float = 180) -> ProcessResult:
    """Several ranks under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return run_process([*launcher, "launch/train.py", *arguments], timeout, env=CPU, cwd=ROOT)


def train_under_deepspeed(world_size: int, *arguments: str, timeout: float = 180) -> ProcessResult:
    """Several ranks under DeepSpeed's launcher, as `make train` does."""
    launcher = [Path(sys.executable).parent / "deepspeed", "--log_level", "critical", "--num_gpus", str(world_size)]
    launcher += ["--master_port", str(free_port())]
    return run_process([*launcher, "launch/train.py", *arguments], timeout, env=CPU, cwd=ROOT)


def losses(run_dir: Path) -> dict[int, float]:
    """train/loss by step."""
    return {record["step"]: record["train/loss"] for record in records(run_dir) if "train/loss" in record}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
