"""Train on one rank, go on with two, and show that the losses are those of a run that was never interrupted.

    python examples/resume_on_more_ranks.py [FOLDER] [STEPS]

The script starts torchrun by itself for the second half. What keeps the losses the same is the global batch: two ranks
take half of it each. Expert weights and optimizer states are cut anew when a checkpoint is loaded.
"""

import subprocess
import sys
from pathlib import Path

from rich import print
from rich.table import Table

import moe_train
from moe_train.train.telemetry.records import read_records

CONFIG = Path(__file__).with_name("tiny.yaml")
BATCH = 16


def train(run_dir: str, steps: int, num_ranks: int = 1) -> None:
    """Train up to a step, from the newest checkpoint of the folder if there is one; on all ranks of the launcher."""
    config = moe_train.load_config(
        CONFIG,
        # A schedule that depends on the number of steps would give the shorter run other learning rates.
        optim={"schedule": "constant", "learning_rate": 1e-3},
        # Balance losses are formed over one micro-batch of all ranks, so all ranks together take the same one.
        train={
            "run_dir": run_dir,
            "steps": steps,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH // num_ranks,
            "log_every": steps,
        },
    )
    moe_train.run_training(config)


def main(folder: str = "runs/resume_on_more_ranks", steps: str = "40") -> None:
    half = int(steps) // 2
    train(f"{folder}/whole", int(steps))
    train(f"{folder}/resumed", half)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, __file__, "--go-on", f"{folder}/resumed", steps], check=True)

    whole, resumed = (
        {record["step"]: record["train/loss"] for record in read_records(Path(folder, name, "metrics.jsonl"))}
        for name in ("whole", "resumed")
    )
    table = Table("step", "ranks", "loss", "uninterrupted", "difference")
    for step in range(max(1, half - 2), half + 4):
        numbers = f"{resumed[step]:.6f}", f"{whole[step]:.6f}", f"{resumed[step] - whole[step]:+.1e}"
        table.add_row(str(step), "1" if step <= half else "2", *numbers)
    print(table)
    biggest = max(abs(resumed[step] - whole[step]) for step in whole)
    print(f"biggest difference in {len(whole)} steps: {biggest:.1e}, which is rounding in fp32")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--go-on"]:  # a rank of torchrun
        train(sys.argv[2], int(sys.argv[3]), num_ranks=2)
    else:
        main(*sys.argv[1:])
