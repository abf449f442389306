"""What keys and values cost when fewer layers and heads own them: cache, largest batch, decoding speed, quality.

Each row of the table is one (kv_layers, num_kv_heads) of one model: MHA (all, all), GQA (all, some), MQA (all, 1), and
MLKV (some, any). First each is trained from the same seed on the same tokens, scaled down (model.yaml), for its loss;
then each decodes, with heads of 64, in one process, the rows in turn in every round. Writes kv_cache.md and
kv_cache.png.

    python -m benchmarks.kv_cache [--json] [--steps 300] [--lengths 128 512 1024 2048] [--jobs N] [--skip-training]
                                  [--memory-gib 1] [--output FOLDER] ...
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.kv_cache.decode import STEPS, DecodePlan, measure_decoding, measure_recomputation
from benchmarks.kv_cache.report import draw_chart, markdown_report
from benchmarks.kv_cache.rows import CONFIG, RECOMPUTED_LENGTH, Sharing, claims_of, result_rows, train_rows
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import describe_machine, print_json, require_matplotlib, write_results
from moe_train.host.cores import usable_cores

MIN_STEPS = 20
KV_LAYERS, NUM_KV_HEADS = (8, 4, 2, 1), (8, 2, 1)
LENGTHS = (128, 512, 1024, 2048)


def parse_options(model: dict[str, Any], arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, checked against the model.

    Args:
        model: Section `model` of model.yaml.
        arguments: Words of the command line; None: those of this process.
    """
    parser = BenchmarkParser(
        "kv_cache",
        __doc__,
        epilog="About twenty minutes on two cores, five with --skip-training; needs 5 GB of memory.",
    )
    parser.add_numbers("--kv-layers", KV_LAYERS, "rows: layers that own keys and values", metavar="M")
    parser.add_numbers("--kv-heads", NUM_KV_HEADS, "rows: heads of each such layer", metavar="G")
    parser.add_numbers("--lengths", LENGTHS, "tokens at which decoding is timed", least=STEPS)
    parser.add_number("--batch-size", 16, "sequences that are decoded together")
    parser.add_number("--rounds", 15, f"timings, each of {STEPS} tokens per sequence")
    parser.add_argument(
        "--memory-gib", type=float, default=1.0, metavar="GIB", help="for weights and cache: largest batch (default: 1)"
    )
    parser.add_number("--steps", 300, "steps of each training run", least=MIN_STEPS)
    parser.add_number("--seed", 0, "seed of all runs", least=0)
    parser.add_number("--jobs", usable_cores(), "training runs at the same time")
    parser.add_argument("--skip-training", action="store_true", help="no training: no losses")
    parser.add_output("kv_cache.md and kv_cache.png")
    options = parser.read(arguments)
    if not 0 < options.memory_gib < float("inf"):
        parser.error(f"--memory-gib ({options.memory_gib:g}) must be more than 0")
    options.lengths = sorted(set(options.lengths))
    for name, field in (("kv_layers", "num_layers"), ("kv_heads", "num_heads")):
        option, most = f"--{name.replace('_', '-')}", model[field]
        values = sorted(set(getattr(options, name)), reverse=True)
        if most not in values:
            parser.error(f"{option} ({' '.join(map(str, values))}) must include {most}, {field} of {CONFIG.name}: MHA")
        for value in values:
            if value > most or (name == "kv_heads" and most % value):
                what = "divide" if name == "kv_heads" else "be 1 to"
                parser.error(f"{option} ({value}) must {what} {field} ({most}) of {CONFIG.name}")
        setattr(options, name, values)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, decode, write and print; the exit code."""
    model = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]
    options = parse_options(model, arguments)
    require_matplotlib()
    shape = (model["num_layers"], model["num_heads"])
    sharings = [Sharing(layers, heads, *shape) for layers in options.kv_layers for heads in options.kv_heads]
    losses: dict[Sharing, float] = {}
    if not options.skip_training:
        with tempfile.TemporaryDirectory(prefix="moe_train_kv_cache_") as folder:
            losses = train_rows(sharings, options.steps, options.seed, options.jobs, Path(folder).resolve())
    torch.set_num_threads(usable_cores())
    plan = DecodePlan(model, options.batch_size, tuple(options.lengths), options.rounds, options.seed)
    decoded = measure_decoding(sharings, plan)
    recomputed = measure_recomputation(sharings[0], plan, RECOMPUTED_LENGTH)  # MHA: the largest cache
    rows = result_rows(decoded, losses, int(options.memory_gib * 2**30))
    claims = claims_of(rows, recomputed)
    figures = {
        "machine": describe_machine(threads=torch.get_num_threads()),
        "lengths": options.lengths,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "memory_gib": options.memory_gib,
        "steps": None if options.skip_training else options.steps,
        "seed": options.seed,
        "rows": rows,
        "recomputed": recomputed,
        "claims": claims,
    }
    page = markdown_report(rows, recomputed, claims, figures)
    write_results(options.output, "kv_cache", page, draw_chart(rows, figures))
    print_json(options, figures)
    return 0
