"""Sequence mixers beside each other in one model: quality, recall, speed and state.

Quality: the quickstart's model with attention, with each mixer, and with each hybrid (three of four layers the mixer,
one attention), trained by the trainer on the same tokens of real text: held-out bits per byte, paired by seed. The
control is a hybrid whose mixers give zero. Recall: small models trained to find the value of a key four segments later.
Speed: training and decoding at growing contexts, and the bytes of the decode state. What is in --keep from an earlier
call with the same sizes is not measured again. Writes mixers.md and mixers.png.

    python -m benchmarks.mixers [--json] [--only quality recall speed report] [--full] [--steps 120] [--sequences 4]
                                [--tokenizer bytes] [--seeds 3] [--jobs 2] [--keep FOLDER] [--output FOLDER] ...
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.mixers.recall import Recall, measure_recall
from benchmarks.mixers.report import draw_chart, markdown_report
from benchmarks.mixers.rows import ALONE, ATTENTION, FULL, TIMED, Size, quality_claims, results_in, runs_of, train
from benchmarks.mixers.speed import LONG, Speed, measure_speed, speed_claims
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import describe_machine, print_json, require_matplotlib, write_results

PARTS = ("quality", "recall", "speed")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, checked."""
    parser = BenchmarkParser(
        "mixers", __doc__, epilog="About 25 minutes of CPU time; with --full about five hours. One thread per process."
    )
    parser.add_argument(
        "--only", nargs="+", choices=(*PARTS, "report"), default=list(PARTS), metavar="PART",
        help="what to measure: quality, recall, speed; report: nothing more than what --keep has (default: all)",
    )  # fmt: skip
    parser.add_number("--steps", 120, "steps of each training run", least=10)
    parser.add_number("--sequences", 4, "sequences of 128 tokens in a step")
    parser.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bytes", help="its tokens (default: bytes)")
    parser.add_argument(
        "--full",
        action="store_true",
        help="the quickstart's own size: 700 steps of 16 sequences, a BPE of 4,096 entries",
    )
    parser.add_number("--seeds", 3, "seeds of each training run", least=2)
    parser.add_number("--recall-steps", 600, "steps of training for recall", least=10)
    parser.add_numbers("--contexts", (256, 1024, 4096, LONG), "contexts of speed and state", least=64)
    parser.add_number("--rounds", 7, "rounds of timings")
    parser.add_number("--jobs", 2, "training processes at the same time")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder of runs and figures (default: temporary)")
    parser.add_output("mixers.md and mixers.png")
    options = parser.read(arguments)
    options.size = FULL if options.full else Size(options.steps, options.sequences, options.tokenizer)
    options.contexts = sorted(set(options.contexts))
    if options.contexts[-1] > LONG:
        parser.error(f"--contexts ({options.contexts[-1]}) must be at most {LONG}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; 0 if every claim holds, else 1."""
    options = parse_options(arguments)
    require_matplotlib()
    with tempfile.TemporaryDirectory(prefix="moe_train_mixers_") as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        recalls, speeds = _recalls(folder, options), _speeds(folder, options)
        runs = runs_of(range(options.seeds), options.size)
        if "quality" in options.only:
            train(runs, options.jobs, folder)
        results = results_in(folder, runs)
    claims = quality_claims(results) + speed_claims(speeds)
    figures = {
        "machine": describe_machine(threads=1),
        "size": options.size,
        "num_runs": len(runs),
        "runs": results,
        "recall": recalls,
        "speed": speeds,
        "claims": claims,
    }
    write_results(
        options.output, "mixers", markdown_report(results, recalls, speeds, figures), draw_chart(results, speeds)
    )
    print_json(options, figures)
    return 0 if all(claim["holds"] for claim in claims) else 1


def _recalls(folder: Path, options: argparse.Namespace) -> list[Recall]:
    file = folder / f"recall_v2_{options.recall_steps}.json"  # v2: by the mixers' rules, TTT with convolutions
    recalls = [Recall(**values) for values in _read(file)]
    if "recall" in options.only:
        for variant in (ATTENTION, *ALONE):
            if variant.name not in {recall.variant for recall in recalls}:
                recalls.append(measure_recall(variant, options.recall_steps, seed=0))
                _write(file, recalls)
    return recalls


def _speeds(folder: Path, options: argparse.Namespace) -> list[Speed]:
    file = folder / f"speed_{'_'.join(map(str, options.contexts))}_{options.rounds}.json"
    speeds = [Speed(**values) for values in _read(file)]
    if "speed" in options.only and not speeds:
        speeds = measure_speed(TIMED, options.contexts, options.rounds, seed=0)
        _write(file, speeds)
    return speeds


def _read(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def _write(file: Path, figures: Sequence[Any]) -> None:
    """Replace a file as a whole: a call that is ended leaves the earlier one."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps([asdict(each) for each in figures]), encoding="utf-8")
    part.replace(file)
