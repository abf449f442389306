"""Table 6 of Shazeer et al. 2017 (arXiv 1701.06538) in small: routing with and without balance losses.

Each row of the table is a training run of the model in balance.yaml, with the same seed: the noisy top-k router with
weights (w_importance, w_load) of the two CV^2 losses, and beside it the softmax router with the Switch loss and the
sigmoid router with the loss-free bias, each with its own unbalanced run. Writes balance.md and balance.png.

    python benchmarks/balance.py [--json] [--steps 150] [--seed 0] [--jobs N] [--out FOLDER] [--keep FOLDER]
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from balance_rows import ROWS, Row, RowResult, claims_of, read_result
from reports import can_draw, say, write_whole
from training_runs import ROOT, RunFailed, TrainingRun, run_all

EXIT_USAGE = 2
RUN_TIMEOUT_SECONDS = 1800
MIN_STEPS = 20
CONFIG = ROOT / "benchmarks" / "balance.yaml"


def train_rows(options: argparse.Namespace, folder: Path) -> list[RowResult]:
    """Train all rows, with a line on stderr for each that is done.

    Raises:
        RunFailed: One did not end well.
    """
    runs: dict[TrainingRun, Row] = {}
    for number, row in enumerate(ROWS):
        shared = (f"--config={CONFIG}", f"--train.steps={options.steps}", f"--train.seed={options.seed}")
        warmup = f"--optim.warmup_steps={options.steps // 3}"
        name = f"{number:02d}_{row.router}_{row.w_importance:g}_{row.w_load:g}"
        runs[TrainingRun(name, folder / name, (*shared, warmup, *row.options(options.steps)))] = row
    results: dict[TrainingRun, RowResult] = {}

    def note(run: TrainingRun, seconds: float) -> None:
        results[run] = result = read_result(runs[run], run.records(), seconds)
        say(
            f"[{len(results)}/{len(runs)}] {result.method} ({result.w_importance:g}, {result.w_load:g}): loss "
            f"{result.loss:.3f}, max/mean {result.max_over_mean:.2f}, {seconds:.0f} s"
        )

    say(f"{len(runs)} runs of {options.steps} steps, {options.jobs} at a time")
    run_all(list(runs), options.jobs, RUN_TIMEOUT_SECONDS, note)
    return [results[run] for run in runs]


def parse_options() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="balance.py",
        description=__doc__.split("\n\n")[0],
        epilog="Ten minutes or so on two cores; the figures are means over the last tenth of the steps.",
        allow_abbrev=False,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="steps of each run (default: 150)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all runs (default: 0)")
    parser.add_argument(
        "--jobs", type=int, default=cores, metavar="N", help="runs at a time, one thread each (default: the cores)"
    )
    parser.add_argument(
        "--out", type=Path, default=results, metavar="FOLDER", help="of balance.md, balance.png (benchmarks/results)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep the run folders here (default: a temporary folder)"
    )
    options = parser.parse_args()
    for name, least in (("steps", MIN_STEPS), ("seed", 0), ("jobs", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} ({getattr(options, name)}) must be {least} or more")
    for name in ("out", "keep"):
        folder = getattr(options, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            parser.error(f"--{name} ({folder}) is not a folder")
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep ({options.keep}) is not empty: training would go on from what is there")
    return options


def main() -> int:
    """Train, write and print; the exit code."""
    options = parse_options()
    if not can_draw("balance.py"):
        return EXIT_USAGE
    from balance_report import draw_chart, markdown_report

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the runs are ended too
    with tempfile.TemporaryDirectory(prefix="moe_train_balance_") as temporary:
        try:
            results = train_rows(options, (options.keep or Path(temporary)).resolve())
        except RunFailed as error:
            say(f"balance.py: {error}")
            return 1
    claims = claims_of(results)
    options.out.mkdir(parents=True, exist_ok=True)
    report = markdown_report(results, claims, options, CONFIG)
    write_whole(options.out / "balance.md", report.encode())
    write_whole(options.out / "balance.png", draw_chart(results))
    print(report)
    if options.json:
        rows = [result.as_dict() for result in results]
        print(json.dumps({"steps": options.steps, "seed": options.seed, "rows": rows, "claims": claims}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
