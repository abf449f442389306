"""Runs that several tests look at: started once."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.processes import ProcessResult, run_process
from tests.train.runs import ROOT, SMALL, train_under_deepspeed


@dataclass(frozen=True)
class ParityRuns:
    """What `moe-train parity --json --keep` printed and left."""

    result: ProcessResult
    summary: dict[str, Any]
    folders: list[Path]


@pytest.fixture(scope="session")
def parity_runs(tmp_path_factory: pytest.TempPathFactory) -> ParityRuns:
    """Every layout of `moe-train parity`, each in its own real processes; run once for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "parity_of_all"
    keep, done = shared / "runs", shared / "result.json"
    shared.mkdir(exist_ok=True)
    with FileLock(shared / "lock"):
        if not done.exists():
            command = [sys.executable, "-m", "moe_train", "parity", "--json", "--keep", str(keep)]
            result = run_process(command, timeout=500, env={"DS_ACCELERATOR": "cpu"}, cwd=ROOT)
            done.write_text(json.dumps(asdict(result)))
    result = ProcessResult(**json.loads(done.read_text()))
    assert result.returncode in (0, 1) and result.stdout, result
    summary = json.loads(result.stdout.splitlines()[-1])
    return ParityRuns(result, summary, sorted(keep.glob("layout_*")))


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ProcessResult]:
    """A run of two ranks under `deepspeed`, from the quickstart's configuration made small."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    result = train_under_deepspeed(
        2,
        "--config=configs/quickstart.yaml",
        *SMALL,
        "--optim.schedule=wsd",
        "--data.bpe_vocab_size=300",
        "--model.num_kv_heads=1",
        "--train.global_batch_size=8",
        "--train.steps=6",
        "--train.log_every=2",
        "--train.validate_every=3",
        "--train.validation_sequences=8",
        "--checkpoint.every=2",
        f"--train.run_dir={folder}",
    )
    assert result.returncode == 0, result
    return folder, result
