"""Long rows: memory and time of attention with documents and windows, and of a step, over the length of a row.

Beside it stands torch's attention with a mask of all pairs of tokens, as far as that goes. Documents in one row are
timed beside the same documents alone, in turn, and a step beside steps that recompute parts of it. A step is measured
on 1, 2 and 4 ranks that share the row too. Writes
long_context.md and long_context.png.

    python -m benchmarks.long_context [--json] [--lengths 1024 ... 65536] [--shared-lengths 4096 ... 32768]
        [--rounds 7] [--output FOLDER]
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.long_context.recompute import measure_recompute, recompute_claims
from benchmarks.long_context.report import draw_chart, markdown_report
from benchmarks.long_context.rows import RANKS, claims_of, measure_packing, measure_points, measure_shared
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import describe_machine, print_json, require_matplotlib, write_results

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
SHARED_LENGTHS = (4096, 8192, 16_384, 32_768)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, checked."""
    parser = BenchmarkParser("long_context", __doc__, epilog="About seven minutes of one core; needs 4 GB of memory.")
    parser.add_numbers("--lengths", LENGTHS, "tokens of a row", least=64, metavar="S")
    parser.add_numbers("--shared-lengths", SHARED_LENGTHS, "tokens of a row that ranks share", least=64, metavar="S")
    parser.add_number("--rounds", 7, "rounds in which all that is timed side by side has its turn")
    parser.add_number("--seed", 0, "seed of documents and tokens", least=0)
    parser.add_output("long_context.md and long_context.png")
    options = parser.read(arguments)
    options.lengths, options.shared_lengths = sorted(set(options.lengths)), sorted(set(options.shared_lengths))
    for length in options.shared_lengths:
        if length % (2 * max(RANKS)):
            parser.error(f"--shared-lengths ({length}) must be a multiple of twice the ranks ({2 * max(RANKS)})")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; 0 if every claim holds, else 1."""
    options = parse_options(arguments)
    require_matplotlib()
    points = measure_points(options.lengths, options.seed)
    points += measure_shared(options.shared_lengths, options.seed)
    packing = measure_packing(options.rounds, options.seed)
    recomputed = measure_recompute(options.rounds, options.seed)
    claims = claims_of(points, packing) + recompute_claims(recomputed)
    machine = describe_machine(threads=1)
    report = markdown_report(points, recomputed, claims, {"machine": machine})
    write_results(options.output, "long_context", report, draw_chart(points))
    figures = {
        "machine": machine,
        "points": [asdict(point) for point in points],
        "packing": packing,
        "recompute": recomputed,
    }
    print_json(options, figures | {"claims": claims})
    return 0 if all(claim["holds"] for claim in claims) else 1
