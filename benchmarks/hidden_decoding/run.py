"""What hidden copies of every token cost and gain: attention, prefill, decoding, cache, and loss at equal tokens.

Rows are numbers of copies (n) with and without a window of W positions in chunks of C. Times are measured in turn in
every round, over those of the plain model. Each row is trained with the same seeds on the same tokens (model.yaml),
for its loss against tokens and against floating-point operations. Writes hidden_decoding.md and hidden_decoding.png.

    python -m benchmarks.hidden_decoding [--json] [--steps 400] [--seeds 3] [--skip-training] [--output FOLDER] ...
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.hidden_decoding.measure import (
    DTYPE,
    HEAD_DIM,
    DecodePlan,
    measure_attention,
    measure_decoding,
)
from benchmarks.hidden_decoding.report import draw_chart, markdown_report
from benchmarks.hidden_decoding.rows import PLAIN, ROWS, Copies, claims_of, train_rows
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import describe_machine, print_json, require_matplotlib, write_results
from moe_train.host.cores import usable_cores


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; None: that of this process."""
    parser = BenchmarkParser(
        "hidden_decoding", __doc__, epilog="About an hour on two cores, three minutes with --skip-training."
    )
    parser.add_number("--attention-length", 2048, "tokens over which attention is timed", metavar="S")
    parser.add_number("--length", 1024, "tokens of the prompt that is read and continued", metavar="S")
    parser.add_number("--hidden-size", 1024, f"width of the model that decodes, a multiple of {HEAD_DIM}", least=64)
    parser.add_number("--num-layers", 4, "layers of the model that decodes")
    parser.add_number("--decode-steps", 4, "tokens per timing")
    parser.add_number("--rounds", 9, "timings of every row")
    parser.add_number("--steps", 400, "steps of each training run", least=20)
    parser.add_number("--seeds", 3, "training runs of every row")
    parser.add_number("--jobs", usable_cores(), "training runs at the same time")
    parser.add_argument("--skip-training", action="store_true", help="no training: no losses")
    parser.add_output("hidden_decoding.md and hidden_decoding.png")
    options = parser.read(arguments)
    if options.hidden_size % HEAD_DIM:
        parser.error(f"--hidden-size ({options.hidden_size}) must be a multiple of {HEAD_DIM}, the size of a head")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, time, write and print; 0 if every claim holds, else 1."""
    options = parse_options(arguments)
    require_matplotlib()
    trained = {}
    if not options.skip_training:
        with tempfile.TemporaryDirectory(prefix="moe_train_hidden_") as folder:
            trained = train_rows(ROWS, options.steps, options.seeds, options.jobs, Path(folder).resolve())
    torch.set_num_threads(usable_cores())
    plan = DecodePlan(options.hidden_size, options.num_layers, options.length, options.decode_steps, options.rounds)
    attention = measure_attention(ROWS, options.attention_length, options.rounds)
    prefill, decode, cache_bytes = measure_decoding(ROWS, plan)
    extra = {row: (cache_bytes[row] - cache_bytes[PLAIN], _ring_bytes(row, plan)) for row in ROWS}
    claims = claims_of(attention, prefill, decode, extra, trained, options.length)
    figures: dict[str, Any] = {
        "machine": describe_machine(threads=torch.get_num_threads()),
        **{name: getattr(options, name) for name in ("attention_length", "length", "hidden_size", "num_layers")},
        "rounds": options.rounds,
        "steps": None if options.skip_training else options.steps,
        "seeds": options.seeds,
    }
    timings = {"attention": attention, "prefill": prefill, "decode": decode}
    page = markdown_report(ROWS, timings, cache_bytes, trained, claims, figures)
    write_results(options.output, "hidden_decoding", page, draw_chart(ROWS, timings, trained))
    by_name = {
        row.name: {name: found[row] for name, found in timings.items()}
        | {"cache_bytes": cache_bytes[row], "trained": trained.get(row)}
        for row in ROWS
    }
    print_json(options, figures | {"rows": by_name, "claims": claims})
    return 0 if all(claim["holds"] for claim in claims) else 1


def _ring_bytes(row: Copies, plan: DecodePlan) -> int:
    kv_heads = max(1, plan.hidden_size // HEAD_DIM // 4)
    positions = row.window if row.chunk is None else min(row.window, row.chunk - 1)
    return plan.num_layers * 2 * positions * (row.copies - 1) * kv_heads * HEAD_DIM * DTYPE.itemsize
