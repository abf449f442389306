"""Every layout's checkpoint loaded in every layout: the same bits, and the same losses afterwards.

Layouts are 1, 2 and 4 ranks x every expert-parallel size x ZeRO 1, 2 and 3: 18, so 324 pairs. Each trains a small model
3 steps, saves, and trains 3 more. Then each checkpoint is loaded in each layout, saved again before any step, and
trained 3 more steps. Held against what was loaded: every weight, Adam's moments and step, and the router's bias, bit
for bit. Held against the run that never stopped: the losses. The suite has 18 of the pairs
(tests/checkpoint/test_layouts.py).

    python -m benchmarks.layout_matrix [--json]
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import print_json, say
from tests.checkpoint.layouts import LAYOUTS, LOSS_TOLERANCE, Resumption, resume_in_layouts, save_in_layouts
from tests.train.runs import fork_server

_SHOWN = 5  # of the largest differences


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all pairs; 0 if every one is within bounds, else 1."""
    options = BenchmarkParser("layout_matrix", __doc__).read(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moe_train_layouts_") as scratch:
        folder = Path(scratch)
        say(f"{len(LAYOUTS)} layouts: training and saving")
        origins = save_in_layouts(LAYOUTS, folder)
        pairs = [(origin, layout) for layout in LAYOUTS for origin in origins.values()]
        found = resume_in_layouts(pairs, folder, lambda one: say(one.name))
    fork_server().close()
    first = origins[LAYOUTS[0]].losses
    apart = {one.layout.name: max(abs(a - b) / b for a, b in zip(one.losses, first)) for one in origins.values()}
    figures = figures_of(found, apart) | {"seconds": time.monotonic() - began}
    show(found, figures)
    print_json(options, figures)
    return 0 if figures["passed"] else 1


def figures_of(found: Sequence[Resumption], apart: dict[str, float]) -> dict[str, Any]:
    """Figures of all pairs, as plain values for JSON.

    Args:
        found: Every pair.
        apart: By layout, how far its losses without a stop are from those of the first layout.
    """
    worst = max(found, key=lambda one: one.loss_difference)
    figures = {
        "pairs": len(found),
        "bit_for_bit": sum(not one.differing for one in found),
        "worst_loss_difference": worst.loss_difference,
        "worst_pair": worst.name,
        "loss_tolerance": LOSS_TOLERANCE,
        "uninterrupted_difference": max(apart.values()),
    }
    is_close = max(worst.loss_difference, *apart.values()) <= LOSS_TOLERANCE
    return figures | {"passed": figures["bit_for_bit"] == len(found) and is_close}


def show(found: Sequence[Resumption], figures: dict[str, Any]) -> None:
    """Print the figures and the worst pairs."""
    print(f"{len(found)} pairs of {len(LAYOUTS)} layouts in {figures['seconds']:.0f} s")
    print(f"weights, moments, steps and buffers bit for bit: {figures['bit_for_bit']} of {len(found)}")
    for one in [one for one in found if one.differing][:_SHOWN]:
        print(f"  {one.name}: {', '.join(one.differing[:_SHOWN])}")
    print(f"losses after loading against the run that never stopped, relative, the largest (<= {LOSS_TOLERANCE:g}):")
    for one in sorted(found, key=lambda one: -one.loss_difference)[:_SHOWN]:
        print(f"  {one.name}: {one.loss_difference:.1e}")
    apart = figures["uninterrupted_difference"]
    print(f"losses of the layouts that never stopped against {LAYOUTS[0].name}: at most {apart:.1e}")
