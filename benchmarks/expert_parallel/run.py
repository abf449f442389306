"""What expert parallelism costs: bytes and time of one MoE layer's training step, by dispatch and number of chunks.

One layer (route, dispatch, experts, combine; backward; AdamW) is trained in fp32 on CPU ranks of this machine, one
thread each, joined by gloo. In every round each variant has its turn on the same ranks and the same tokens. Bytes are
counted where they enter torch.distributed, and held against what the routing drawn has to send. With --link-mbit the
nodes are network namespaces with a line of that rate each (Linux, root), and ranks of different nodes talk over it.

    python -m benchmarks.expert_parallel [--json] [--ranks 1 2 4] [--chunks 1 2] [--nodes 2]
    python -m benchmarks.expert_parallel --ranks 2 4 --nodes 2 --link-mbit 300 ...
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.expert_parallel.report import show
from benchmarks.expert_parallel.rows import REFERENCE, RowResult, Sent, Shape, Turn, claims_of, result_row
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.processes import rank_places, run_ranks
from benchmarks.runner.results import describe_machine, print_json, say

TIMEOUT_SECONDS = 1800
DISPATCHES = ("flat", "unique", "two_level")
PAYLOADS = ("model", "bf16", "fp8")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, checked."""
    parser = BenchmarkParser("expert_parallel", __doc__, epilog="About a minute on two cores; needs 2 GB of memory.")
    parser.add_numbers("--ranks", (1, 2, 4), "numbers of processes", metavar="P")
    parser.add_number("--tokens", 1024, "tokens of a rank", metavar="T")
    # Rows no wider than a gate could not be told from it.
    parser.add_number("--hidden", 256, "width of a token's row", least=2, metavar="D")
    parser.add_number("--inner", 256, "intermediate width of an expert", metavar="F")
    parser.add_number("--experts", 64, "experts of all ranks together", metavar="E")
    parser.add_number("--top-k", 8, "experts of a token", metavar="K")
    parser.add_number("--rounds", 15, "timed steps of each variant")
    parser.add_number("--seed", 0, "seed of weights and tokens", least=0)
    parser.add_argument("--dispatch", nargs="+", choices=DISPATCHES, default=DISPATCHES, help="to measure (all)")
    parser.add_numbers("--chunks", (1, 2), "numbers of chunks", metavar="C")
    parser.add_argument("--payload", nargs="+", choices=PAYLOADS, default=("model",), help="to measure (model)")
    parser.add_number("--nodes", 2, "nodes, of at least two ranks each for two_level")
    parser.add_argument(
        "--link-mbit", type=float, default=0.0, metavar="M", help="megabits/s of a node's line (default: no network)"
    )
    options = parser.read(arguments)
    if options.hidden % 2:
        parser.error(f"--hidden ({options.hidden}) must be even, for the rotary embedding of the model's configuration")
    if options.top_k > options.experts:
        parser.error(f"--top-k ({options.top_k}) must be at most --experts ({options.experts})")
    if not 0 <= options.link_mbit < math.inf:
        parser.error(f"--link-mbit ({options.link_mbit:g}) must be more than 0, or 0: not slowed")
    options.ranks = sorted(set(options.ranks))
    for ranks in options.ranks:
        if options.experts % ranks:
            parser.error(f"--experts ({options.experts}) must be divisible by --ranks ({ranks})")
        if options.link_mbit and ranks % options.nodes:
            parser.error(
                f"--ranks ({ranks}) must be divisible by --nodes ({options.nodes}), which --link-mbit separates"
            )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks, and print what they measured; the exit code."""
    options = parse_options(arguments)
    names = {field.name for field in fields(Shape)}
    shape = Shape(**{name: _plain(value) for name, value in vars(options).items() if name in names})
    rows: list[RowResult] = []
    for ranks in options.ranks:
        turns = measure(ranks, shape)
        reference = turns[REFERENCE.name]
        rows += [result_row(each, ranks, shape, turns[each.name], reference) for each in shape.variants_on(ranks)]
    claims, machine = claims_of(rows, shape), describe_machine()
    show(rows, claims, shape, machine)
    print_json(options, {"machine": machine, "shape": shape, "rows": rows, "claims": claims})
    return 0


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def measure(num_ranks: int, shape: Shape) -> dict[str, list[Turn]]:
    """Steps of every variant on some ranks, by the name of the variant.

    Args:
        num_ranks: Number of ranks.
        shape: Sizes of the layer, and the link.

    Raises:
        RunFailed: A rank did not end well.
    """
    say(f"{num_ranks} {'rank' if num_ranks == 1 else 'ranks'}: {shape.rounds} rounds")
    num_nodes = shape.nodes if shape.link_mbit else 1
    with (
        tempfile.TemporaryDirectory(prefix="moe_train_expert_parallel_") as name,
        rank_places(num_ranks, num_nodes, shape.link_mbit) as places,
    ):
        program = ["-m", "benchmarks.expert_parallel.rank", name, json.dumps(asdict(shape))]
        run_ranks(f"{num_ranks} ranks", program, places, Path(name, "logs"), TIMEOUT_SECONDS)
        found = json.loads(Path(name, "turns.json").read_text(encoding="utf-8"))
    return {name: [Turn(**turn | {"sent": Sent(**turn["sent"])}) for turn in own] for name, own in found.items()}
