"""Closing summary of a run: its results beside those of general compressors, and how the experts share the work."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from moe_train.model.count import ParameterCount
from moe_train.train.loop import Run, TrainResult
from moe_train.train.telemetry.load_report import expert_load, learning_remark, load_table
from moe_train.train.telemetry.records import read_records


def make_summary(run: Run, result: TrainResult, parameters: ParameterCount, sample: str | None) -> dict[str, Any]:
    """Collect the closing summary as plain values.

    Args:
        run: Run that has ended.
        result: Result of training.
        parameters: Numbers of parameters of the model.
        sample: Text drawn from the model; None: no text.
    """
    records = read_records(run.folder.metrics)
    steps = [record for record in records if "train/loss" in record]
    rates = sorted(record["perf/tokens_per_second"] for record in steps)
    load = expert_load(steps)
    by_layer = sorted(load.layers, key=lambda each: each.layer) if load else []
    held_out, validation = run.data.held_out, result.validation
    return {
        "steps": run.config.train.steps,
        "tokens": steps[-1]["train/tokens"] if steps else 0,
        "parameters": {"total": parameters.total, "active": parameters.active},
        "world_size": run.plan.world_size,
        "expert_parallel_size": run.config.parallel.expert_parallel_size,
        "context_parallel_size": run.config.parallel.context_parallel_size,
        "zero_stage": run.config.parallel.zero_stage,
        "precision": run.config.train.precision,
        "device": str(run.device.type),
        "steps_of_this_process": result.steps,
        "seconds": result.seconds,
        "train/loss": steps[-1]["train/loss"] if steps else None,
        "train/cross_entropy": steps[-1]["train/cross_entropy"] if steps else None,
        "val/cross_entropy": validation.cross_entropy if validation else None,
        "val/bits_per_byte": validation.bits_per_byte if validation else None,
        "val/lost_bytes_share": held_out.unrecovered.num_bytes / held_out.num_bytes if held_out else None,
        "reference_bits_per_byte": dict(held_out.reference_bits_per_byte) if held_out else {},
        "perf/tokens_per_second": rates[len(rates) // 2] if rates else None,
        "moe/max_violation": load.max_violation if load else None,
        "moe/dead_experts": [[each.layer, expert] for each in by_layer for expert in each.dead],
        "moe/counts": {f"layer_{each.layer:02d}": each.counts for each in by_layer},
        "moe/clean_kappa": {f"layer_{each.layer:02d}": each.clean_kappa for each in by_layer},
        "val/expert_information": {f"layer_{each.layer:02d}": each.expert_information for each in by_layer},
        "moe/records": load.num_records if load else 0,
        "sample": sample,
        "checkpoint": str(result.checkpoint),
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write the summary to summary.json."""
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
    elif run.data.held_out is not None and summary["val/cross_entropy"] is not None:
        lost = run.data.held_out.describe_loss()
        say(f"held-out text: {summary['val/cross_entropy']:.4f} nats/token; no bits per byte: {lost}")
    load = expert_load(read_records(run.folder.metrics))
    if load is not None:
        say(load_table(load))
        bounds = run.config.telemetry
        remark = learning_remark(load, bounds.kappa_alarm, bounds.information_alarm)
        if remark is not None:
            say(remark)
    if summary["sample"]:
        say("A text drawn from the model:")
        say("\n".join(f"  | {line}" for line in summary["sample"].splitlines()))
    say(f"Checkpoint: {summary['checkpoint']}")
    say(f"To try it: moe-train generate --run {shlex.quote(str(run.folder.root))} --prompt TEXT")
    if "tensorboard" in run.config.telemetry.active_sinks:
        say(f"To see the curves: tensorboard --logdir {run.folder.tensorboard}")
