"""Diagnosis of training that went wrong: the skipped steps, their data, and figures of tensors and layers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_train.distributed.collectives import all_reduce_sum, world_group
from moe_train.model.moe.steps import RoutingSums
from moe_train.train.engine.engine import TrainEngine
from moe_train.train.step_control import SkippedStep
from moe_train.train.telemetry.load_metrics import layer_figures

_MOST_NAMED = 3  # tensors named in the message


def diagnose(
    engine: TrainEngine, skipped: tuple[SkippedStep, ...], sums: RoutingSums | None, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Collect what is known about skipped steps, as plain values.

    Args:
        engine: Engine right after the last skipped step.
        skipped: Skipped steps.
        sums: Routing sums of the last step on this rank; None without MoE layers.
        layers: Index in the model of each MoE layer.

    Returns:
        The diagnosis, the same on every rank except for the losses, which are each rank's own.

    Collective: All ranks.
    """
    own = engine.tensor_sums()
    total = all_reduce_sum(torch.stack(list(own.values())), world_group())
    tensors = {
        name: {
            "weight_norm": weight**0.5,
            "weights_not_finite": int(weight_faults),
            "gradient_norm": gradient**0.5,
            "gradients_not_finite": int(gradient_faults),
        }
        for name, (weight, weight_faults, gradient, gradient_faults) in zip(own, total.tolist(), strict=True)
    }
    found: dict[str, Any] = {
        "steps": [asdict(step) for step in skipped],
        "sequences": [[step.first_sequence, step.first_sequence + step.num_sequences] for step in skipped],
        "tensors": tensors,
    }
    if sums is not None:
        packed = [all_reduce_sum(part.double(), world_group()) for part in sums.tensors]
        figures = layer_figures(RoutingSums(*packed))
        found["layers"] = {
            f"layer_{layer:02d}": {name: float(values[place]) for name, values in figures.items()}
            for place, layer in enumerate(layers)
        }
    return found


def summarize(diagnosis: dict[str, Any]) -> str:
    """Summarise a diagnosis in one line."""
    steps, tensors = diagnosis["steps"], diagnosis["tensors"]
    last = steps[-1]
    text = (
        f"steps {steps[0]['step'] + 1} to {last['step'] + 1} were skipped: {last['reason']} (loss {last['loss']:.4g}); "
    )
    text += f"sequences {diagnosis['sequences'][0][0]} to {diagnosis['sequences'][-1][1] - 1}"
    for kind in ("weights", "gradients"):
        bad = [name for name, figures in tensors.items() if figures[f"{kind}_not_finite"]]
        if bad:
            more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
            text += f"; {kind} that are not finite in {', '.join(bad[:_MOST_NAMED])}{more}"
    largest = max(tensors, key=lambda name: tensors[name]["gradient_norm"])
    return f"{text}; largest gradient norm {tensors[largest]['gradient_norm']:.3g} in {largest}"


def write_diagnosis(path: Path, diagnosis: dict[str, Any]) -> None:
    """Write a diagnosis as JSON, with numbers that are not finite as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, float) and value - value != 0 else value

    path.write_text(json.dumps(plain(diagnosis), indent=1, allow_nan=False) + "\n", encoding="utf-8")
