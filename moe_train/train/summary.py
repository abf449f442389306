"""The closing summary: what was reached, beside what general compressors reach, and how the experts share the work."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_train.model.count import ParameterCount
from moe_train.train.loop import Run, TrainResult
from moe_train.train.records import Record, read_records

LAST_STEPS = 100  # the balance figures are over this many last records


@dataclass(frozen=True)
class ExpertLoad:
    """How experts shared the tokens of the last records.

    Attributes:
        counts: Assignments of every expert, by layer.
        max_violation: Mean over records of the worst layer's MaxVio.
        dead: (layer, expert) that no token was sent to.
        num_records: Records taken.
    """

    counts: dict[int, list[int]]
    max_violation: float
    dead: list[tuple[int, int]]
    num_records: int


def expert_load(records: Sequence[Record], layers: Sequence[int]) -> ExpertLoad | None:
    """Expert load over the last records that have it, or None where there are none."""
    last = [record for record in records if "moe/max_violation" in record][-LAST_STEPS:]
    if not last:
        return None
    counts = {}
    for layer in layers:
        columns = zip(*(record[f"moe/counts/layer_{layer:02d}"] for record in last), strict=True)
        counts[layer] = [sum(column) for column in columns]
    dead = [(layer, i) for layer, row in counts.items() for i, count in enumerate(row) if count == 0]
    mean = sum(record["moe/max_violation"] for record in last) / len(last)
    return ExpertLoad(counts, mean, dead, len(last))


def make_summary(run: Run, result: TrainResult, parameters: ParameterCount, sample: str | None) -> dict[str, Any]:
    """Everything of the closing summary as plain values.

    Args:
        run: The run.
        result: How training ended.
        parameters: Of the model.
        sample: A text drawn from the model, or None.
    """
    records = read_records(run.folder.metrics)
    steps = [record for record in records if "train/loss" in record]
    rates = sorted(record["perf/tokens_per_second"] for record in steps)
    load = expert_load(steps, run.config.model.moe_layer_indices)
    held_out, validation = run.data.held_out, result.validation
    return {
        "steps": run.config.train.steps,
        "tokens": steps[-1]["train/tokens"] if steps else 0,
        "parameters": {"total": parameters.total, "active": parameters.active},
        "world_size": run.plan.world_size,
        "expert_parallel_size": run.config.parallel.expert_parallel_size,
        "zero_stage": run.config.parallel.zero_stage,
        "precision": run.config.train.precision,
        "device": str(run.device.type),
        "steps_of_this_process": result.steps,
        "seconds": result.seconds,
        "train/loss": steps[-1]["train/loss"] if steps else None,
        "train/cross_entropy": steps[-1]["train/cross_entropy"] if steps else None,
        "val/cross_entropy": validation.cross_entropy if validation else None,
        "val/bits_per_byte": validation.bits_per_byte if validation else None,
        "reference_bits_per_byte": dict(held_out.reference_bits_per_byte) if held_out else {},
        "perf/tokens_per_second": rates[len(rates) // 2] if rates else None,
        "moe/max_violation": load.max_violation if load else None,
        "moe/dead_experts": [list(place) for place in load.dead] if load else [],
        "moe/counts": {f"layer_{layer:02d}": row for layer, row in load.counts.items()} if load else {},
        "moe/records": load.num_records if load else 0,
        "sample": sample,
        "checkpoint": str(result.checkpoint),
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write summary.json."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def show_summary(run: Run, summary: dict[str, Any]) -> None:
    """Print the summary for a person."""
    say = run.console.say
    say()
    parameters = summary["parameters"]
    say(
        f"{summary['steps_of_this_process']} steps in {summary['seconds']:.0f} s on {summary['world_size']} x "
        f"{summary['device']} ({summary['precision']}), {summary['perf/tokens_per_second'] or math.nan:,.0f} tokens/s, "
        f"{summary['tokens']:,} tokens in all; {parameters['total']:,} parameters, {parameters['active']:,} active"
    )
    if summary["train/loss"] is not None:
        say(
            f"training: loss {summary['train/loss']:.4f}, cross-entropy {summary['train/cross_entropy']:.4f} nats/token"
        )
    if summary["val/bits_per_byte"] is not None:
        beside = "".join(f", {name} {value:.3f}" for name, value in summary["reference_bits_per_byte"].items())
        say(f"held-out text, bits per byte: this model {summary['val/bits_per_byte']:.3f}{beside}")
    if summary["moe/counts"]:
        say(_load_table(summary))
    if summary["sample"]:
        say("A text drawn from the model:")
        say("\n".join(f"  | {line}" for line in summary["sample"].splitlines()))
    say(f"Checkpoint: {summary['checkpoint']}")
    if run.config.telemetry.tensorboard:
        say(f"To see the curves: tensorboard --logdir {run.folder.tensorboard}")


def _load_table(summary: dict[str, Any]) -> Table:
    records, violation = summary["moe/records"], summary["moe/max_violation"]
    title = f"Tokens an expert over the last {records} records, as a share of the mean (MaxVio {violation:.2f})"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("least", justify="right")
    table.add_column("most", justify="right")
    table.add_column("experts")
    for layer, row in summary["moe/counts"].items():
        mean = sum(row) / len(row)
        shares = [count / mean for count in row]
        shown = " ".join(f"{share:.2f}" for share in shares[:16]) + (" ..." if len(shares) > 16 else "")
        table.add_row(layer.removeprefix("layer_"), f"{min(shares):.2f}", f"{max(shares):.2f}", shown)
    dead = summary["moe/dead_experts"]
    table.caption = f"dead: {dead}" if dead else "no dead expert"
    return table
