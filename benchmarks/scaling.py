"""How the cost of training grows: of an MoE layer with its experts E and tokens T, of a model with its layers L.

Forward and backward passes, in one process. Along an axis all sizes take turns in every round. At fixed K more experts
are more weights, but not more multiplications: what time they cost is told apart for every micro-batch, since a larger
one reads each weight, and writes its gradient, for more tokens. Writes scaling.md and scaling.png.

    python benchmarks/scaling.py [--json] [--axes experts tokens layers] [--rounds 7] [--experts 8 16 32 64 128]
                                 [--micro-batches 2048 8192] [--threads N] [--output FOLDER] ...
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.reports import can_draw, make_output, processor, say, write_whole  # noqa: E402
from benchmarks.scaling_measure import (  # noqa: E402
    MODEL,
    MODEL_EXPERT_WIDTH,
    MODEL_SEQUENCE,
    MODEL_VOCAB,
    Plan,
    measure,
)
from benchmarks.scaling_rows import AXES, Point, Timing, claims_of, series_of  # noqa: E402
from moe_train.host.cores import usable_cores  # noqa: E402
from moe_train.host.memory import keep_freed_memory  # noqa: E402

EXIT_USAGE = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Two micro-batches: of 2 sequences of 1,024 tokens, and of 8, which is what small models are trained with.
MICRO_BATCHES = (2048, 8192)
EXPERTS, TOKENS, LAYERS = (8, 16, 32, 64, 128), (1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16)
FIXED_EXPERTS = 16  # of the MoE layer along T
MODEL_EXPERTS, MODEL_TOKENS = 8, 1024  # of the model along L


def parse_options() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="scaling.py",
        description=__doc__.split("\n\n")[0],
        epilog="Four minutes or so on two cores; needs 5 GB of memory.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object as the last line of stdout")
    add("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="what is measured (all)")
    add("--experts", type=int, nargs="+", default=EXPERTS, metavar="E", help="sizes along E (8 16 32 64 128)")
    add(
        "--micro-batches",
        type=int,
        nargs="+",
        default=MICRO_BATCHES,
        metavar="T",
        help="tokens along E, a line for each; the claim is about the largest (2048 8192)",
    )
    add("--tokens", type=int, nargs="+", default=TOKENS, metavar="T", help="sizes along T (1024 2048 ... 16384)")
    add("--layers", type=int, nargs="+", default=LAYERS, metavar="L", help="sizes along L (1 2 4 8 16)")
    add("--hidden", type=int, default=512, metavar="D", help="width of a token's row along E and T (default: 512)")
    add("--inner", type=int, default=1024, metavar="F", help="intermediate width of an expert there (default: 1024)")
    add("--top-k", type=int, default=2, metavar="K", help="experts of a token (default: 2)")
    add("--rounds", type=int, default=7, metavar="N", help="timings of every size (default: 7)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and tokens (default: 0)")
    add("--dtype", choices=DTYPES, default="fp32", help="bf16 takes much longer where the processor lacks it (fp32)")
    add("--threads", type=int, default=usable_cores(), metavar="N", help="of torch on CPU (default: the cores)")
    results = ROOT / "benchmarks" / "results"
    add("--output", type=Path, default=results, metavar="FOLDER", help="of scaling.md, .png (benchmarks/results)")
    options = parser.parse_args()
    _check(parser, options)
    return options


def main() -> int:
    """Measure, write and print; the exit code."""
    options = parse_options()
    if not can_draw("scaling.py"):
        return EXIT_USAGE
    from benchmarks.scaling_report import draw_chart, markdown_report

    keep_freed_memory()  # as the trainer does
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"D": options.hidden, "F": options.inner, "K": options.top_k}
    plan = Plan(**sizes, rounds=options.rounds, seed=options.seed, dtype=DTYPES[options.dtype], device=device)
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
    figures: dict[str, Any] = {
        "machine": {
            "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "threads": torch.get_num_threads(),
            "torch": version("torch"),
        },
        "dtype": options.dtype,
        "rounds": options.rounds,
        "what": descriptions(options),
    }
    report = markdown_report(found, claims, figures)
    write_whole(options.output / "scaling.md", report.encode())
    write_whole(options.output / "scaling.png", draw_chart(found))
    print(report)
    if options.json:
        rows = [row.as_dict() for series in found for row in series.rows]
        print(json.dumps(figures | {"rows": rows, "slopes": [s.as_dict() for s in found], "claims": claims}))
    return 0


def points_of(axis: str, options: argparse.Namespace) -> list[Point]:
    """What is timed along an axis."""
    if axis == "experts":
        return [Point(axis, tokens, experts, 0) for tokens in options.micro_batches for experts in options.experts]
    if axis == "tokens":
        return [Point(axis, tokens, FIXED_EXPERTS, 0) for tokens in options.tokens]
    return [Point(axis, MODEL_TOKENS, MODEL_EXPERTS, layers) for layers in options.layers]


def descriptions(options: argparse.Namespace) -> list[str]:
    """What was timed, a sentence an axis."""
    longest = f"{options.micro_batches[-1] / 1024:g}"
    layer = f"one MoE layer, D {options.hidden}, F {options.inner}, K {options.top_k}"
    sentences = {
        "experts": f"experts: {layer}; T tokens a micro-batch, the largest as many as {longest} sequences of 1,024.",
        "tokens": f"tokens: {layer}, {FIXED_EXPERTS} experts.",
        "layers": f"layers: a model, D {MODEL['hidden_size']}, F {MODEL_EXPERT_WIDTH}, K {options.top_k}, every layer "
        f"with {MODEL_EXPERTS} experts, a vocabulary of {MODEL_VOCAB:,}; {MODEL_TOKENS // MODEL_SEQUENCE} sequences of "
        f"{MODEL_SEQUENCE}.",
    }
    return [sentences[axis] for axis in options.axes]


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be measured, and put sizes in order."""
    for name in ("experts", "micro_batches", "tokens", "layers"):
        option, values = f"--{name.replace('_', '-')}", sorted(set(getattr(options, name)))
        if values[0] < 1:
            parser.error(f"{option} ({values[0]}) must be 1 or more")
        if len(values) < 2 and name != "micro_batches":
            parser.error(f"{option} ({values[0]}) must be two or more sizes: a slope is of at least two")
        setattr(options, name, values)
    for name, least in dict(hidden=2, inner=1, top_k=1, rounds=1, seed=0, threads=1).items():
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be {least} or more")
    if options.hidden % 2:
        parser.error(f"--hidden ({options.hidden}) must be even, for the rotary embedding of the model's configuration")
    fewest = {"experts": options.experts[0], "tokens": FIXED_EXPERTS, "layers": MODEL_EXPERTS}
    for axis in options.axes:
        if options.top_k > fewest[axis]:
            parser.error(f"--top-k ({options.top_k}) must be at most {fewest[axis]}, the fewest experts along {axis}")
    options.axes = [axis for axis in AXES if axis in options.axes]
    make_output(parser, options.output)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
