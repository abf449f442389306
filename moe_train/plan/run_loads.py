"""The loads of experts as a run had them, from its metrics.jsonl."""

from pathlib import Path

import numpy as np

from moe_train.config.errors import UsageError
from moe_train.train.telemetry.load_report import expert_load
from moe_train.train.telemetry.records import read_records

_STEPS = 1000  # the last ones of the run


def read_shares(run_dir: Path) -> np.ndarray:
    """Shares of the assignments that experts had over the last steps of a run. [L, E].

    Args:
        run_dir: The run's folder.

    Raises:
        UsageError: If it has no records of experts.
    """
    path = run_dir / "metrics.jsonl"
    report = expert_load(read_records(path), _STEPS) if path.is_file() else None
    if report is None:
        raise UsageError(f"--loads ({str(run_dir)!r}): has no metrics.jsonl with the load of experts")
    counts_LE = np.array([load.counts for load in sorted(report.layers, key=lambda load: load.layer)], dtype=np.float64)
    return counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1.0)
