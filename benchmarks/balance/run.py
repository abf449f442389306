"""Table 6 of Shazeer et al. 2017 (arXiv 1701.06538), scaled down: routing with and without balance losses.

Each row of the table is a training run of the model in model.yaml, with the same seed: the noisy top-k router with
weights (w_importance, w_load) of the two CV^2 losses, and beside it the softmax router with the Switch loss and the
sigmoid router with the loss-free bias, each with its own unbalanced run. Writes balance.md and balance.png.

    python -m benchmarks.balance [--json] [--steps 150] [--seed 0] [--jobs N] [--output FOLDER] [--keep FOLDER]
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.balance.report import draw_chart, markdown_report
from benchmarks.balance.rows import claims_of, train_rows
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import describe_machine, print_json, require_matplotlib, write_results
from moe_train.host.cores import usable_cores

MIN_STEPS = 20


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, checked."""
    parser = BenchmarkParser(
        "balance",
        __doc__,
        epilog="About ten minutes on two cores; the figures are means over the last tenth of the steps.",
    )
    parser.add_number("--steps", 150, "steps of each run", least=MIN_STEPS)
    parser.add_number("--seed", 0, "seed of all runs", least=0)
    parser.add_number("--jobs", usable_cores(), "runs at the same time, one thread each")
    parser.add_output("balance.md and balance.png")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep the run folders here (default: a temporary folder)"
    )
    options = parser.read(arguments)
    if options.keep is not None and options.keep.exists():
        if not options.keep.is_dir():
            parser.error(f"--keep ({options.keep}) is not a folder")
        if any(options.keep.iterdir()):
            parser.error(f"--keep ({options.keep}) is not empty: training would go on from what is there")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, write and print; the exit code."""
    options = parse_options(arguments)
    require_matplotlib()
    with tempfile.TemporaryDirectory(prefix="moe_train_balance_") as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        results = train_rows(options.steps, options.seed, options.jobs, folder)
    claims, machine = claims_of(results), describe_machine()
    page = markdown_report(results, claims, options, machine)
    write_results(options.output, "balance", page, draw_chart(results))
    rows = [result.as_dict() for result in results]
    print_json(
        options, {"machine": machine, "steps": options.steps, "seed": options.seed, "rows": rows, "claims": claims}
    )
    return 0
