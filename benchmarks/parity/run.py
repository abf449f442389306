"""Every balance term with every router in every layout: the same losses, gradient norms and router gradients.

Accumulation 1, 2, 4 and 16 x 1, 2 and 4 ranks, with expert-parallel sizes and ZeRO stages, x each balance term alone
and all together, x every router; with all terms, every expert-parallel size and ZeRO stage. Routers begin with a
planted imbalance, so that the terms act. Compared with one process and one micro-batch, at every step: the loss, the
gradient norm, and the gradient of each map of the routers. Terms over a micro-step are compared without accumulation.
The suite has a slice (tests/benchmarks/parity/test_rows.py).

    python -m benchmarks.parity [--json] [--steps 20] [--routers noisy_topk switch]
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.parity.rows import (
    GRADIENT_TOLERANCE,
    NUM_STEPS,
    Comparison,
    all_routers,
    compare_all,
    make_server,
    product,
)
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import markdown_table, print_json, say
from moe_train.train.parity import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE

_SHOWN = 10  # of the runs that are not alike


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and compare; 0 if every run is alike, else 1."""
    parser = BenchmarkParser("parity", __doc__, epilog="About 40 minutes on two idle cores.")
    parser.add_number("--steps", NUM_STEPS, "steps of each run", least=2)
    parser.add_argument("--routers", nargs="+", choices=all_routers(), default=list(all_routers()), help="routers")
    options = parser.read(arguments)
    tasks, began = product(options.routers), time.monotonic()
    say(f"{len(tasks)} runs of {options.steps} steps")
    found: list[Comparison] = []

    def note(comparison: Comparison) -> None:
        found.append(comparison)
        figures = f"{comparison.loss:.1e} {comparison.norm:.1e} {comparison.gradient:.1e}"
        say(f"[{len(found)}] {'same ' if comparison.passed else 'OTHER'} {comparison.task.name}: {figures}")

    with tempfile.TemporaryDirectory(prefix="moe_train_parity_") as scratch, make_server() as server:
        compare_all(tasks, Path(scratch), options.steps, note, server=server)
    figures = figures_of(found) | {"steps": options.steps, "seconds": time.monotonic() - began}
    show(found, figures)
    print_json(options, figures)
    return 0 if figures["passed"] else 1


def figures_of(found: Sequence[Comparison]) -> dict[str, Any]:
    """Figures of all runs, as plain values for JSON."""
    return {
        "runs": len(found),
        "alike": sum(one.passed for one in found),
        "worst_loss": max(one.loss for one in found),
        "worst_grad_norm": max(one.norm for one in found),
        "worst_router_gradient": max(one.gradient for one in found),
        "others": [one.task.name for one in found if not one.passed],
        "passed": all(one.passed for one in found),
    }


def show(found: Sequence[Comparison], figures: dict[str, Any]) -> None:
    """Print the largest differences of each case, and the runs that are not alike."""
    heads = ["router, balance term", "runs", "alike", "loss", "gradient norm", "router's gradient"]
    rows = []
    for name in dict.fromkeys(one.task.case.name for one in found):
        these = [one for one in found if one.task.case.name == name]
        worst = [max(getattr(one, figure) for one in these) for figure in ("loss", "norm", "gradient")]
        rows.append([name, str(len(these)), str(sum(one.passed for one in these)), *(f"{each:.1e}" for each in worst)])
    print("\n".join(markdown_table(heads, rows)))
    bounds = f"{LOSS_TOLERANCE:g}, {GRAD_NORM_TOLERANCE:g} and {GRADIENT_TOLERANCE:g}"
    print(f"largest relative differences over {figures['steps']} steps; bounds {bounds}; {figures['seconds']:.0f} s")
    for name in figures["others"][:_SHOWN]:
        print(f"OTHER  {name}")
