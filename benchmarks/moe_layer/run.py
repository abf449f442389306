"""What one MoE layer costs, forward and backward: moe_train's beside DeepSpeed's, Hugging Face's and a dense bound.

All layers have the same weights and input, run in one process and take turns in every round. It first checks that
they compute the same.

    python -m benchmarks.moe_layer [--json] [--check] [--shapes 0 1 2] [--routing balanced zipf] [--layers NAME ...]
                                   [--rounds 15] [--dtype auto] [--threads N]
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from benchmarks.moe_layer.measure import SAME_WITHIN, differences, measure
from benchmarks.moe_layer.peers import available_layers, make_problem
from benchmarks.moe_layer.report import PEAK_MEMORY, TABLE_WIDTH, case_table, print_check, print_setting
from benchmarks.moe_layer.rows import (
    CPU_SHAPES,
    CUDA_SHAPES,
    LAYERS,
    ROUTINGS,
    Case,
    RowResult,
    Shape,
    claims_of,
    rows_of,
)
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import claim_lines, describe_machine, print_json, say
from moe_train.host.cores import usable_cores
from moe_train.host.memory import keep_freed_memory
from moe_train.host.precision import resolve_precision, torch_dtype


def parse_options(shapes: Sequence[Shape], arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, checked.

    Args:
        shapes: Shapes of the device.
        arguments: Words of the command line; None: those of this process.
    """
    names = "; ".join(f"{index}: {shape.name}" for index, shape in enumerate(shapes))
    epilog = f"Shapes here: {names}. About ten minutes on two cores; needs 6 GB of memory there."
    parser = BenchmarkParser("moe_layer", __doc__, epilog=epilog)
    add = parser.add_argument
    add("--check", action="store_true", help="only check that all layers compute the same; exit code 1 if not")
    parser.add_numbers("--shapes", range(len(shapes)), "shapes by number", least=0, metavar="I")
    add("--routing", nargs="+", choices=ROUTINGS, default=ROUTINGS, help="how tokens choose experts (both)")
    add("--layers", nargs="+", choices=LAYERS, default=LAYERS, metavar="NAME", help=f"of {', '.join(LAYERS)} (all)")
    parser.add_number("--rounds", 15, "timings of every layer")
    what = "auto: bf16 where the device multiplies bf16 matrices at speed, else fp32"
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help=what)
    parser.add_number("--threads", usable_cores(), "threads of torch on the CPU")
    options = parser.read(arguments)
    for index in options.shapes:
        if index >= len(shapes):
            parser.error(f"--shapes ({index}) must be 0 to {len(shapes) - 1}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure and print; the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    options = parse_options(shapes, arguments)
    keep_freed_memory()  # as the trainer does; for all layers alike
    torch.set_num_threads(options.threads)
    dtype = resolve_precision(options.dtype, device)
    names = [name for name in available_layers() if name in options.layers]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    figures: dict[str, Any] = {
        "machine": describe_machine("deepspeed", "transformers", threads=torch.get_num_threads(), gpu=gpu),
        "dtype": dtype,
        "rounds": options.rounds,
        "peak_memory": PEAK_MEMORY[device.type],
        "left_out": [name for name in LAYERS if name in options.layers and name not in names],
    }
    console = Console(width=TABLE_WIDTH, highlight=False, soft_wrap=True)
    print_setting(console, figures)
    figures["differences"] = found = differences(names)
    print_check(console, found, SAME_WITHIN)
    are_same = all(difference <= SAME_WITHIN for difference in found.values())
    rows: list[RowResult] = []
    cases = [Case(shapes[index], routing) for index in options.shapes for routing in options.routing]
    for case in [] if options.check else cases:
        say(f"{case.shape.name}; {case.routing}")
        problem = make_problem(case, torch_dtype(dtype), device)
        new = rows_of(case, measure(problem, names, options.rounds))
        console.print(case_table(case, new))
        rows += new
    claims = claims_of(rows)
    for line in claim_lines(claims):
        console.print(line, markup=False)
    print_json(options, figures | {"rows": rows, "claims": claims})
    return 0 if are_same or not options.check else 1
