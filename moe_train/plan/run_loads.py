"""Expert loads that a run measured, from its metrics.jsonl."""

from pathlib import Path

import numpy as np

from moe_train.config.errors import UsageError
from moe_train.train.telemetry.load_report import expert_load
from moe_train.train.telemetry.records import read_records

_STEPS = 1000  # last steps of the run to average over


def read_shares(run_dir: Path) -> np.ndarray:
    """Read the experts' shares of the assignments over the last steps of a run.

    Args:
        run_dir: Folder of the run.

    Returns:
        [L, E] for L MoE layers and E experts.

    Raises:
        UsageError: If the run has no records of experts.
    """
    path = run_dir / "metrics.jsonl"
    report = expert_load(read_records(path), _STEPS) if path.is_file() else None
    if report is None:
        raise UsageError(f"--loads ({str(run_dir)!r}): has no metrics.jsonl with the load of experts")
    counts_LE = np.array([load.counts for load in sorted(report.layers, key=lambda load: load.layer)], dtype=np.float64)
    return counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1.0)
