"""Every layout's checkpoint loaded in every layout: the same bits, and the same losses afterwards.

Layouts are 1, 2 and 4 ranks x every expert-parallel size x ZeRO 1, 2 and 3: 18, so 324 pairs. Each trains a small model
3 steps, saves, and trains 3 more. Then each checkpoint is loaded in each layout, saved again before any step, and
trained 3 more steps. Held against what was loaded: every weight, Adam's moments and step, and the router's bias, bit
for bit. Held against the run that never stopped: the losses. The suite has 18 of the pairs
(tests/checkpoint/test_layouts.py).

    python benchmarks/layout_matrix.py [--json]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.checkpoint.layouts import (  # noqa: E402
    LAYOUTS,
    LOSS_TOLERANCE,
    Resumption,
    resume_in_layouts,
    save_in_layouts,
)
from tests.train.runs import fork_server  # noqa: E402

_SHOWN = 5  # of the largest differences


def main() -> int:
    """Run all pairs; 0 if every one is within bounds, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moe_train_layouts_") as scratch:
        folder = Path(scratch)
        print(f"{len(LAYOUTS)} layouts: training and saving", file=sys.stderr, flush=True)
        origins = save_in_layouts(LAYOUTS, folder)
        pairs = [(origin, layout) for layout in LAYOUTS for origin in origins.values()]
        found = resume_in_layouts(pairs, folder, lambda one: print(one.name, file=sys.stderr, flush=True))
    fork_server().close()
    first = origins[LAYOUTS[0]].losses
    apart = {one.layout.name: max(abs(a - b) / b for a, b in zip(one.losses, first)) for one in origins.values()}
    return report(found, apart, time.monotonic() - began, options.json)


def report(found: list[Resumption], apart: dict[str, float], seconds: float, as_json: bool) -> int:
    """Print the worst; the exit code.

    Args:
        found: Every pair.
        apart: By layout, how far its losses without a stop are from those of the first layout.
        seconds: For all of it.
        as_json: Whether to print it for a machine too.
    """
    worst = sorted(found, key=lambda one: -one.loss_difference)
    other_bits = [one for one in found if one.differing]
    passed = not other_bits and worst[0].loss_difference <= LOSS_TOLERANCE and max(apart.values()) <= LOSS_TOLERANCE
    print(f"{len(found)} pairs of {len(LAYOUTS)} layouts in {seconds:.0f} s")
    print(f"weights, moments, steps and buffers bit for bit: {len(found) - len(other_bits)} of {len(found)}")
    for one in other_bits[:_SHOWN]:
        print(f"  {one.name}: {', '.join(one.differing[:_SHOWN])}")
    print(f"losses after loading against the run that never stopped, relative, the largest (<= {LOSS_TOLERANCE:g}):")
    for one in worst[:_SHOWN]:
        print(f"  {one.name}: {one.loss_difference:.1e}")
    print(f"losses of the layouts that never stopped against {LAYOUTS[0].name}: at most {max(apart.values()):.1e}")
    if as_json:
        figures = {
            "pairs": len(found),
            "bit_for_bit": len(found) - len(other_bits),
            "worst_loss_difference": worst[0].loss_difference,
            "worst_pair": worst[0].name,
            "loss_tolerance": LOSS_TOLERANCE,
            "uninterrupted_difference": max(apart.values()),
            "seconds": seconds,
            "passed": passed,
        }
        print(json.dumps(figures))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
