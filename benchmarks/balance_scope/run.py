"""Scope step of the CV^2 terms against scope micro_step: does the lag of one step cost anything?

A delayed gradient has half of the largest stable rate, and routers train near it. So both scopes train at hidden 64
with two learning rates, batch 8 x 128, and in the quickstart, with the same seeds: skipped steps, and held-out bits per
byte at the end. Scope step is as good if it has no more skipped steps, and is not worse by more than twice the standard
error of the difference.

    python -m benchmarks.balance_scope [--json] [--seeds 3] [--steps 300] [--quickstart-steps 700] [--jobs 2]
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.balance_scope.rows import SETTINGS, Pair, pairs_of, train_rows
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import markdown_table, print_json, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and compare; 0 if scope step is as good everywhere, else 1."""
    parser = BenchmarkParser("balance_scope", __doc__, epilog="About 30 minutes on two idle cores.")
    parser.add_number("--seeds", 3, "seeds of each setting", least=2)
    parser.add_number("--steps", 300, "steps at hidden 64; 0 leaves it out", least=0)
    parser.add_number("--quickstart-steps", 700, "steps of the quickstart; 0 leaves it out", least=0)
    parser.add_number("--jobs", 2, "runs at the same time")
    options = parser.read(arguments)
    steps = {name: options.quickstart_steps if name == "quickstart" else options.steps for name in SETTINGS}
    steps = {name: each for name, each in steps.items() if each}
    say(f"{2 * len(steps) * options.seeds} runs, {options.jobs} at a time")
    with tempfile.TemporaryDirectory(prefix="moe_train_scope_") as scratch:
        results = train_rows(steps, range(options.seeds), options.jobs, Path(scratch))
    pairs = pairs_of(results)
    print("\n".join(table(pairs, steps)))
    print_json(options, {"settings": [pair.as_dict() for pair in pairs], "passed": all(p.holds for p in pairs)})
    return 0 if all(pair.holds for pair in pairs) else 1


def table(pairs: Sequence[Pair], steps: dict[str, int]) -> list[str]:
    """A row for each setting; in a cell, scope step is before scope micro_step."""
    heads = ["setting", "steps", "skipped", "diverged", "bits per byte", "difference", "noise", "step is as good"]
    rows = []
    for pair in pairs:
        rows.append(
            [
                pair.setting,
                str(steps[pair.setting]),
                " / ".join(map(str, pair.skipped.values())),
                " / ".join(map(str, pair.diverged.values())),
                " / ".join(_shown(each) for each in pair.bits_per_byte.values()),
                _shown(pair.difference),
                _shown(pair.noise),
                "yes" if pair.holds else "no",
            ]
        )
    return markdown_table(heads, rows)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
