"""How the cost of training grows: of an MoE layer with its experts E and tokens T, of a model with its layers L.

Forward and backward passes, in one process. Along an axis all sizes take turns in every round. At fixed K more experts
are more weights, but not more multiplications. What time they cost is measured for every micro-batch separately, since
a larger one reads each weight, and writes its gradient, for more tokens. Writes scaling.md and scaling.png.

    python -m benchmarks.scaling [--json] [--axes experts tokens layers] [--rounds 7] [--experts 8 16 32 64 128]
                                 [--micro-batches 2048 8192] [--threads N] [--output FOLDER] ...
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.results import describe_machine, print_json, require_matplotlib, say, write_results
from benchmarks.scaling.report import draw_chart, markdown_report
from benchmarks.scaling.rows import (
    AXES,
    MODEL,
    MODEL_EXPERT_WIDTH,
    MODEL_SEQUENCE,
    MODEL_VOCAB,
    Plan,
    Point,
    Timing,
    claims_of,
    measure,
    series_of,
)
from moe_train.host.cores import usable_cores
from moe_train.host.memory import keep_freed_memory
from moe_train.host.precision import torch_dtype

# Two micro-batches: of 2 sequences of 1,024 tokens, and of 8, which is what small models are trained with.
MICRO_BATCHES = (2048, 8192)
EXPERTS, TOKENS, LAYERS = (8, 16, 32, 64, 128), (1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16)
FIXED_EXPERTS = 16  # of the MoE layer along T
MODEL_EXPERTS, MODEL_TOKENS = 8, 1024  # of the model along L


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, checked, with all sizes in order."""
    parser = BenchmarkParser("scaling", __doc__, epilog="About four minutes on two cores; needs 5 GB of memory.")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="what is measured (all)")
    parser.add_numbers("--experts", EXPERTS, "sizes along E", metavar="E")
    what = "tokens along E, a line for each; the claim is about the largest"
    parser.add_numbers("--micro-batches", MICRO_BATCHES, what, metavar="T")
    parser.add_numbers("--tokens", TOKENS, "sizes along T", metavar="T")
    parser.add_numbers("--layers", LAYERS, "sizes along L", metavar="L")
    parser.add_number("--hidden", 512, "width of a token's row along E and T", least=2, metavar="D")
    parser.add_number("--inner", 1024, "intermediate width of an expert there", metavar="F")
    parser.add_number("--top-k", 2, "experts of a token", metavar="K")
    parser.add_number("--rounds", 7, "timings of every size")
    parser.add_number("--seed", 0, "seed of weights and tokens", least=0)
    what = "bf16 takes much longer where the processor lacks it (default: fp32)"
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help=what)
    parser.add_number("--threads", usable_cores(), "threads of torch on the CPU")
    parser.add_output("scaling.md and scaling.png")
    options = parser.read(arguments)
    for name in ("experts", "micro_batches", "tokens", "layers"):
        values = sorted(set(getattr(options, name)))
        if len(values) < 2 and name != "micro_batches":
            parser.error(f"--{name} ({values[0]}) must be two or more sizes: a slope is of at least two")
        setattr(options, name, values)
    if options.hidden % 2:
        parser.error(f"--hidden ({options.hidden}) must be even, for the rotary embedding of the model's configuration")
    fewest = {"experts": options.experts[0], "tokens": FIXED_EXPERTS, "layers": MODEL_EXPERTS}
    options.axes = [axis for axis in AXES if axis in options.axes]
    for axis in options.axes:
        if options.top_k > fewest[axis]:
            parser.error(f"--top-k ({options.top_k}) must be at most {fewest[axis]}, the fewest experts along {axis}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; the exit code."""
    options = parse_options(arguments)
    require_matplotlib()
    keep_freed_memory()  # as the trainer does
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"D": options.hidden, "F": options.inner, "K": options.top_k}
    plan = Plan(**sizes, rounds=options.rounds, seed=options.seed, dtype=torch_dtype(options.dtype), device=device)
    timings: dict[Point, list[Timing]] = {}
    parameters: dict[Point, int] = {}
    for axis in options.axes:
        points = points_of(axis, options)
        say(f"{axis}: {plan.rounds} rounds of {len(points)} sizes")
        new = measure(points, plan)
        timings |= new[0]
        parameters |= new[1]
    found = series_of(timings, parameters)
    claims = claims_of(found)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    figures: dict[str, Any] = {
        "machine": describe_machine(threads=torch.get_num_threads(), gpu=gpu),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "what": descriptions(options),
    }
    write_results(options.output, "scaling", markdown_report(found, claims, figures), draw_chart(found))
    rows = [row for series in found for row in series.rows]
    print_json(options, figures | {"rows": rows, "slopes": [s.as_dict() for s in found], "claims": claims})
    return 0


def points_of(axis: str, options: argparse.Namespace) -> list[Point]:
    """What is timed along an axis."""
    if axis == "experts":
        return [Point(axis, tokens, experts, 0) for tokens in options.micro_batches for experts in options.experts]
    if axis == "tokens":
        return [Point(axis, tokens, FIXED_EXPERTS, 0) for tokens in options.tokens]
    return [Point(axis, MODEL_TOKENS, MODEL_EXPERTS, layers) for layers in options.layers]


def descriptions(options: argparse.Namespace) -> list[str]:
    """What was timed, one sentence per axis."""
    longest = f"{options.micro_batches[-1] / 1024:g}"
    layer = f"one MoE layer, D {options.hidden}, F {options.inner}, K {options.top_k}"
    sentences = {
        "experts": f"experts: {layer}; T tokens of a micro-batch, the largest as many as {longest} sequences of 1,024.",
        "tokens": f"tokens: {layer}, {FIXED_EXPERTS} experts.",
        "layers": f"layers: a model, D {MODEL['hidden_size']}, F {MODEL_EXPERT_WIDTH}, K {options.top_k}, every layer "
        f"with {MODEL_EXPERTS} experts, a vocabulary of {MODEL_VOCAB:,}; {MODEL_TOKENS // MODEL_SEQUENCE} sequences of "
        f"{MODEL_SEQUENCE}.",
    }
    return [sentences[axis] for axis in options.axes]
