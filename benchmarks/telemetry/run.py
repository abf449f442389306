"""What expert-load telemetry costs of a training step: pairs of blocks of steps, with it and without, in turn.

Two models of the same configuration train in the same processes. One has everything of telemetry: sums formed in the
forward pass and added up, all-to-alls timed, one all-reduce per record, metrics.jsonl and TensorBoard with heat map,
histograms and a scalar per expert. The other has nothing of it (telemetry.experts off, never a record). A block is
telemetry.every steps, so that a block with telemetry writes one record.

    python -m benchmarks.telemetry [--json] [--ranks 2] [--pairs 30] [--config FILE] [--section.field=value ...]
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.processes import ROOT, rank_places, run_ranks
from benchmarks.runner.resolved import resolve_for
from benchmarks.runner.results import describe_machine, machine_words, print_json
from benchmarks.runner.rounds import median_ratio, quartiles, round_ratios
from moe_train.config.load import load_config

TIMEOUT_SECONDS = 3600


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks, and print what they measured; the exit code."""
    parser = BenchmarkParser("telemetry", __doc__, takes_fields=True)
    parser.add_number("--ranks", 2, "processes on this machine")
    parser.add_number("--pairs", 30, "pairs of blocks")
    default = ROOT / "configs" / "quickstart.yaml"
    parser.add_argument("--config", type=Path, default=default, help="configuration (default: configs/quickstart.yaml)")
    options = parser.read(arguments)
    fields = [f"--config={options.config.resolve()}", *options.fields]
    config = load_config([*fields, "--train.run_dir=unused"], program=parser.prog)
    resolve_for(config, options.ranks)  # here, before any rank starts
    with tempfile.TemporaryDirectory(prefix="moe_train_telemetry_") as name:
        program = ["-m", "benchmarks.telemetry.rows", name, str(options.pairs), *fields]
        with rank_places(options.ranks, on_cpu=False) as places:
            run_ranks("telemetry", program, places, Path(name, "logs"), TIMEOUT_SECONDS)
        costs = json.loads(Path(name, "costs.json").read_text(encoding="utf-8"))
    figures = figures_of(costs, options.ranks, config.telemetry.every)
    show(figures)
    print_json(options, figures | {"blocks": costs})
    return 0


def figures_of(costs: dict[str, list[float]], num_ranks: int, steps_per_block: int) -> dict[str, Any]:
    """Medians and ratios of all pairs, as plain values for JSON.

    Args:
        costs: Fields of `Costs`, as the ranks wrote them.
        num_ranks: Number of ranks.
        steps_per_block: Steps of a block.
    """
    return {
        "machine": describe_machine(),
        "ranks": num_ranks,
        "pairs": len(costs["without"]),
        "steps_per_block": steps_per_block,
        "step_ms_without": statistics.median(costs["without"]) / steps_per_block * 1e3,
        "recording": median_ratio(costs["recording"], costs["with_telemetry"]),
        "overhead": overhead(costs["with_telemetry"], costs["without"]),
        "cpu_overhead": overhead(costs["cpu_with_telemetry"], costs["cpu_without"]),
    }


def overhead(with_telemetry: Sequence[float], without: Sequence[float]) -> dict[str, float]:
    """Median and quartiles over pairs of (with / without - 1)."""
    lower, median, upper = quartiles(round_ratios(with_telemetry, without), "exclusive")
    return {"median": median - 1, "lower": lower - 1, "upper": upper - 1}


def show(figures: dict[str, Any]) -> None:
    """Print the figures of `figures_of`."""
    wall, cpu = figures["overhead"], figures["cpu_overhead"]
    print(
        f"{figures['pairs']} pairs of blocks of {figures['steps_per_block']} steps on {figures['ranks']} ranks, "
        f"{figures['step_ms_without']:.0f} ms per step without telemetry; {machine_words(figures['machine'])}\n"
        f"telemetry costs {wall['median']:+.2%} of the wall time ({wall['lower']:+.2%} to {wall['upper']:+.2%}), "
        f"{cpu['median']:+.2%} of the processor time ({cpu['lower']:+.2%} to {cpu['upper']:+.2%})\n"
        f"(medians and quartiles over pairs); {figures['recording']:.2%} of it is spent in the recorder itself"
    )
