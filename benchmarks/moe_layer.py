"""What one MoE layer costs, forward and backward: moe_train's beside DeepSpeed's, Hugging Face's and a dense bound.

All layers have the same weights and input, run in one process and take turns in every round. It first checks that
they compute the same.

    python benchmarks/moe_layer.py [--json] [--check] [--shapes 0 1 2] [--routing balanced zipf] [--layers NAME ...]
                                   [--rounds 15] [--dtype auto] [--threads N]
"""

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from moe_layer_measure import SAME_WITHIN, differences, measure  # noqa: E402
from moe_layer_peers import available_layers, make_problem  # noqa: E402
from moe_layer_report import case_table, print_check, print_claims, print_setting  # noqa: E402
from moe_layer_rows import (  # noqa: E402
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
from reports import processor, say  # noqa: E402
from rich.console import Console  # noqa: E402

from moe_train.host.cores import usable_cores  # noqa: E402
from moe_train.host.memory import keep_freed_memory  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PEAK_MEMORY = {
    "cpu": "over the weights and the input, in one thread, as torch's allocator tells a profile; not what libraries "
    "keep, nor what moe_train's other threads hold of the one expert that each is at",
    "cuda": "over the weights and the input, from torch.cuda.max_memory_allocated",
}
TABLE_WIDTH = 120


def parse_options(shapes: tuple[Shape, ...]) -> argparse.Namespace:
    """The command line, checked.

    Args:
        shapes: Those of the device.
    """
    names = "; ".join(f"{index}: {shape.name}" for index, shape in enumerate(shapes))
    parser = argparse.ArgumentParser(
        prog="moe_layer.py",
        description=__doc__.split("\n\n")[0],
        epilog=f"Shapes here: {names}. Ten minutes or so on two cores; needs 6 GB of memory there.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object as the last line of stdout")
    add("--check", action="store_true", help="only check that all layers compute the same; exit code 1 if not")
    add("--shapes", type=int, nargs="+", default=range(len(shapes)), metavar="I", help="shapes by number (all)")
    add("--routing", nargs="+", choices=ROUTINGS, default=ROUTINGS, help="how tokens choose experts (both)")
    add("--layers", nargs="+", choices=LAYERS, default=LAYERS, metavar="NAME", help=f"of {', '.join(LAYERS)} (all)")
    add("--rounds", type=int, default=15, metavar="N", help="timings of every layer (default: 15)")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: bf16 where the device multiplies bf16 matrices at speed, else fp32",
    )
    add("--threads", type=int, default=usable_cores(), metavar="N", help="of torch on CPU (default: the cores)")
    options = parser.parse_args()
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} ({getattr(options, name)}) must be 1 or more")
    for index in options.shapes:
        if not 0 <= index < len(shapes):
            parser.error(f"--shapes ({index}) must be 0 to {len(shapes) - 1}")
    return options


def choose_dtype(name: str, device: torch.device) -> str:
    """bf16 or fp32. Without instructions for it, bf16 is up to 80 times slower than fp32 on CPU (torch 2.13)."""
    if name != "auto":
        return name
    is_fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if is_fast else "fp32"


def main() -> int:
    """Check, measure and print; the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    options = parse_options(shapes)
    keep_freed_memory()  # as the trainer does; for all layers alike
    torch.set_num_threads(options.threads)
    names = [name for name in available_layers() if name in options.layers]
    figures: dict[str, Any] = {
        "machine": _machine(device),
        "dtype": choose_dtype(options.dtype, device),
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
        problem = make_problem(case, DTYPES[figures["dtype"]], device)
        new = rows_of(case, measure(problem, names, options.rounds))
        console.print(case_table(case, new))
        rows += new
    claims = claims_of(rows)
    print_claims(console, claims)
    if options.json:
        print(json.dumps(figures | {"rows": [row.as_dict() for row in rows], "claims": claims}))
    return 0 if are_same or not options.check else 1


def _machine(device: torch.device) -> dict[str, Any]:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        **{package: installed(package) for package in ("torch", "deepspeed", "transformers")},
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
