"""What expert parallelism costs: bytes and time of one MoE layer's training step, by dispatch and number of chunks.

One layer (route, dispatch, experts, combine; backward; AdamW) is trained in fp32 on CPU ranks of this machine, one
thread each, joined by gloo. In every round each variant has its turn on the same ranks and the same tokens. Bytes are
counted where they enter torch.distributed, and held against what the routing drawn has to send. With --link-mbit the
nodes are network namespaces with a line of that rate each (Linux, root), and ranks of different nodes talk over it.

    python benchmarks/expert_parallel.py [--json] [--ranks 1 2 4] [--chunks 1 2] [--nodes 2]
    python benchmarks/expert_parallel.py --ranks 2 4 --nodes 2 --link-mbit 300 ...
"""

import argparse
import contextlib
import json
import math
import signal
import sys
import tempfile
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.box import SIMPLE_HEAD  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.expert_parallel_rows import (  # noqa: E402
    PARTS,
    REFERENCE,
    RowResult,
    Sent,
    Shape,
    Turn,
    claims_of,
    result_row,
)
from benchmarks.reports import processor, say  # noqa: E402
from benchmarks.slow_link import Node, SlowLinkUnavailable, slow_link  # noqa: E402
from moe_train.distributed.bootstrap import local_rank_environments  # noqa: E402
from moe_train.host.cores import usable_cores  # noqa: E402
from moe_train.launch.fork_server import ForkServer, wait_for_all  # noqa: E402

TIMEOUT_SECONDS = 1800
DISPATCHES = ("flat", "unique", "two_level")
_RANK = "benchmarks.expert_parallel_rounds"
_TABLE_WIDTH = 190


class RankFailed(RuntimeError):
    """A rank ended badly; with what it wrote."""


def parse_options() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="expert_parallel.py",
        description=__doc__.split("\n\n")[0],
        epilog="About a minute on two cores; needs 2 GB of memory.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object as the last line of stdout")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="P", help="numbers of processes (default: 1 2 4)")
    add("--tokens", type=int, default=1024, metavar="T", help="tokens of a rank (default: 1024)")
    add("--hidden", type=int, default=256, metavar="D", help="width of a token's row (default: 256)")
    add("--inner", type=int, default=256, metavar="F", help="intermediate width of an expert (default: 256)")
    add("--experts", type=int, default=64, metavar="E", help="of all ranks together (default: 64)")
    add("--top-k", type=int, default=8, metavar="K", help="experts of a token (default: 8)")
    add("--rounds", type=int, default=15, metavar="N", help="timed steps of each variant (default: 15)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and tokens (default: 0)")
    add("--dispatch", nargs="+", choices=DISPATCHES, default=DISPATCHES, help="to measure (default: all)")
    add("--chunks", type=int, nargs="+", default=[1, 2], metavar="C", help="numbers of chunks (default: 1 2)")
    add("--payload", nargs="+", choices=("model", "bf16", "fp8"), default=["model"], help="to measure (default: model)")
    add("--nodes", type=int, default=2, metavar="N", help="of at least two ranks each, for two_level (default: 2)")
    add("--link-mbit", type=float, default=0.0, metavar="M", help="megabits/s of a node's line (default: no network)")
    options = parser.parse_args()
    # Of rows no wider than a gate nobody could tell which is which.
    for name, least in dict(tokens=1, hidden=2, inner=1, experts=1, top_k=1, rounds=1, seed=0, nodes=1).items():
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be {least} or more")
    if options.top_k > options.experts:
        parser.error(f"--top-k ({options.top_k}) must be at most --experts ({options.experts})")
    if not 0 <= options.link_mbit < math.inf:
        parser.error(f"--link-mbit ({options.link_mbit:g}) must be more than 0, or 0: not slowed")
    for chunks in options.chunks:
        if chunks < 1:
            parser.error(f"--chunks ({chunks}) must be 1 or more")
    options.ranks = sorted(set(options.ranks))
    for ranks in options.ranks:
        if ranks < 1:
            parser.error(f"--ranks ({ranks}) must be 1 or more")
        if options.experts % ranks:
            parser.error(f"--experts ({options.experts}) must be divisible by --ranks ({ranks})")
        if options.link_mbit and ranks % options.nodes:
            parser.error(
                f"--ranks ({ranks}) must be divisible by --nodes ({options.nodes}), which --link-mbit separates"
            )
    return options


def main() -> int:
    """Start the ranks, and print what they measured; the exit code."""
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the ranks are ended too
    names = {field.name for field in fields(Shape)}
    shape = Shape(**{name: _plain(value) for name, value in vars(options).items() if name in names})
    rows: list[RowResult] = []
    try:
        with ForkServer([_RANK], local_rank_environments(1)[0]) as server, _nodes(shape) as nodes:
            for ranks in options.ranks:
                turns = run_ranks(server, ranks, shape, nodes)
                reference = turns[REFERENCE.name]
                rows += [
                    result_row(each, ranks, shape, turns[each.name], reference) for each in shape.variants_on(ranks)
                ]
    except (RankFailed, SlowLinkUnavailable) as error:
        say(f"expert_parallel.py: {error}")
        return 1
    claims = claims_of(rows, shape)
    machine = {"cpu": processor(), "cores": usable_cores(), "torch": version("torch")}
    show(rows, claims, shape, machine)
    if options.json:
        figures = {"machine": machine, "shape": asdict(shape), "rows": [row.as_dict() for row in rows]}
        print(json.dumps(figures | {"claims": claims}))
    return 0


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _nodes(shape: Shape) -> contextlib.AbstractContextManager[list[Node]]:
    return slow_link(shape.nodes, shape.link_mbit) if shape.link_mbit else contextlib.nullcontext([])


def run_ranks(server: ForkServer, ranks: int, shape: Shape, nodes: list[Node]) -> dict[str, list[Turn]]:
    """Every variant's steps on some ranks.

    Args:
        server: Starts them.
        ranks: How many.
        shape: Of the layer.
        nodes: Among which they are divided; none: they are all on this machine.

    Raises:
        RankFailed: One did not end well.
    """
    say(f"{ranks} {'rank' if ranks == 1 else 'ranks'}: {shape.rounds} rounds")
    with tempfile.TemporaryDirectory(prefix="moe_train_expert_parallel_") as folder:
        arguments = [folder, json.dumps(asdict(shape)), *(node.namespace for node in nodes)]
        environments = local_rank_environments(ranks)
        if nodes:
            network = {"MASTER_ADDR": nodes[0].address, "GLOO_SOCKET_IFNAME": nodes[0].interface}
            environments = [each | network for each in environments]
        started = [server.start(f"{_RANK}:run_rank", arguments, each, ROOT) for each in environments]
        for result in wait_for_all(started, TIMEOUT_SECONDS):
            if result.returncode:
                raise RankFailed(f"one of {ranks} ranks ended with code {result.returncode}:\n{result.stderr[-3000:]}")
        found = json.loads((Path(folder) / "turns.json").read_text())
    return {name: [Turn(**turn | {"sent": Sent(**turn["sent"])}) for turn in own] for name, own in found.items()}


def show(rows: list[RowResult], claims: list[dict[str, Any]], shape: Shape, machine: dict[str, Any]) -> None:
    """The table for people, how it was made, and what it shows."""
    console = Console(width=_TABLE_WIDTH, highlight=False)  # narrower, its heads would be cut off
    table = Table(
        title="MB sent to other ranks in a forward pass, all ranks; ms of a training step",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for head in ("dispatch", "chunks", "payload", "ranks"):
        table.add_column(head, justify="left" if head in ("dispatch", "payload") else "right")
    for head in (
        "rows MB",
        "formula",
        "uniform",
        "across",
        "metadata",
        "step ms",
        "of flat",
        *PARTS,
        "exchange",
        "differs",
    ):
        table.add_column(head, justify="right")
    for before, row in zip([None, *rows], rows):
        if before is not None and before.ranks != row.ranks:
            table.add_section()
        times = (f"{getattr(row, f'{part}_ms'):.1f}" for part in PARTS)
        sizes = (row.bytes, row.formula_bytes, row.expected_bytes, row.across_bytes, row.metadata_bytes)
        table.add_row(
            *(row.dispatch, str(row.chunks), row.payload, str(row.ranks)),
            *(f"{size / 1e6:.2f}" for size in sizes),
            *(f"{row.step_ms:.0f}", f"{1 / row.speed_over_flat:.2f}", *times, f"{row.exchange_ms:.1f}"),
            "0" if row.difference == 0 else f"{row.difference:.0e}",
        )
    console.print(table)
    most, cores = max(row.ranks for row in rows), machine["cores"]
    crowded = f"; {most} ranks share {cores} cores, so that a rank waits for others' work too" if most > cores else ""
    nodes = f"{shape.nodes} nodes, " + (f"{shape.link_mbit:g} Mbit/s between them" if shape.link_mbit else "no network")
    print(
        f"{shape.tokens} tokens a rank, D {shape.hidden}, F {shape.inner}, E {shape.experts}, K {shape.top_k}, fp32, "
        f"gloo, {nodes}; {cores} cores of {machine['cpu']}, torch {machine['torch']}, one thread a rank{crowded}.\n"
        f"Medians of {shape.rounds} rounds, in each the slowest rank of every part (the parts add up to more than the "
        "step). formula: for the routing drawn; uniform: expected for uniform routing; across: rows between nodes; "
        "metadata: counts, gates, places; exchange: starting all-to-alls of both passes and waiting for them; differs: "
        "outputs and gradients from flat's in one chunk, relative."
    )
    for claim in claims:
        print(f"- {'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
