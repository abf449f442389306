"""What expert parallelism costs: bytes and time of one MoE layer's training step with every dispatch.

One layer (route, dispatch, experts, combine; backward; AdamW) is trained in fp32 on CPU ranks of this machine, one
thread each, joined by gloo. In every round each dispatch has its turn on the same ranks and the same tokens. Bytes are
counted where they enter torch.distributed, and held against what the routing drawn has to send. --link-mbit makes each
all-to-all as slow as a link of that rate would be, by waiting: between processes of one machine bytes are nearly free.

    python benchmarks/expert_parallel.py [--json] [--ranks 1 2 4] [--rounds 15] [--link-mbit 1000] ...
"""

import argparse
import json
import math
import signal
import sys
import tempfile
from dataclasses import asdict
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
from moe_train.parallel.bootstrap import local_rank_environments  # noqa: E402
from moe_train.parallel.cores import usable_cores  # noqa: E402
from moe_train.parallel.forked import ForkServer, wait_for_all  # noqa: E402

TIMEOUT_SECONDS = 1800
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
    add("--rounds", type=int, default=15, metavar="N", help="timed steps of each dispatch (default: 15)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and tokens (default: 0)")
    add("--link-mbit", type=float, default=0.0, metavar="M", help="megabits/s of a rank's link (default: not slowed)")
    options = parser.parse_args()
    # Of rows no wider than a gate nobody could tell which is which.
    for name, least in dict(tokens=1, hidden=2, inner=1, experts=1, top_k=1, rounds=1, seed=0).items():
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be {least} or more")
    if options.top_k > options.experts:
        parser.error(f"--top-k ({options.top_k}) must be at most --experts ({options.experts})")
    if not 0 <= options.link_mbit < math.inf:
        parser.error(f"--link-mbit ({options.link_mbit:g}) must be more than 0, or 0: not slowed")
    options.ranks = sorted(set(options.ranks))
    for ranks in options.ranks:
        if ranks < 1:
            parser.error(f"--ranks ({ranks}) must be 1 or more")
        if options.experts % ranks:
            parser.error(f"--experts ({options.experts}) must be divisible by --ranks ({ranks})")
    return options


def main() -> int:
    """Start the ranks, and print what they measured; the exit code."""
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the ranks are ended too
    names = ("tokens", "hidden", "inner", "experts", "top_k", "rounds", "seed", "link_mbit")
    shape = Shape(**{name: getattr(options, name) for name in names})
    rows: list[RowResult] = []
    try:
        with ForkServer([_RANK], local_rank_environments(1)[0]) as server:
            for ranks in options.ranks:
                turns = run_ranks(server, ranks, shape)
                rows += [result_row(name, ranks, shape, own, turns[REFERENCE]) for name, own in turns.items()]
    except RankFailed as error:
        say(f"expert_parallel.py: {error}")
        return 1
    claims = claims_of(rows)
    machine = {"cpu": processor(), "cores": usable_cores(), "torch": version("torch")}
    show(rows, claims, shape, machine)
    if options.json:
        figures = {"machine": machine, "shape": asdict(shape), "rows": [row.as_dict() for row in rows]}
        print(json.dumps(figures | {"claims": claims}))
    return 0


def run_ranks(server: ForkServer, ranks: int, shape: Shape) -> dict[str, list[Turn]]:
    """Every dispatch's steps on some ranks.

    Raises:
        RankFailed: One did not end well.
    """
    say(f"{ranks} {'rank' if ranks == 1 else 'ranks'}: {shape.rounds} rounds")
    with tempfile.TemporaryDirectory(prefix="moe_train_expert_parallel_") as folder:
        arguments = [folder, json.dumps(asdict(shape))]
        environments = local_rank_environments(ranks)
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
    table.add_column("dispatch")
    heads = ("ranks", "rows MB", "formula", "uniform", "metadata", "step ms", "of flat", *PARTS, "exchange", "differs")
    for head in heads:
        table.add_column(head, justify="right")
    for before, row in zip([None, *rows], rows):
        if before is not None and before.ranks != row.ranks:
            table.add_section()
        times = (f"{getattr(row, f'{part}_ms'):.1f}" for part in PARTS)
        table.add_row(
            *(row.dispatch, str(row.ranks), _megabytes(row.bytes), _megabytes(row.formula_bytes)),
            *(_megabytes(row.expected_bytes), _megabytes(row.metadata_bytes)),
            *(f"{row.step_ms:.0f}", f"{1 / row.speed_over_flat:.2f}", *times, f"{row.exchange_ms:.1f}"),
            "0" if row.difference == 0 else f"{row.difference:.0e}",
        )
    console.print(table)
    most, cores = max(row.ranks for row in rows), machine["cores"]
    crowded = f"; {most} ranks share {cores} cores, so that a rank waits for others' work too" if most > cores else ""
    link = f"each rank's link slowed to {shape.link_mbit:g} Mbit/s" if shape.link_mbit else "links not slowed"
    print(
        f"{shape.tokens} tokens a rank, D {shape.hidden}, F {shape.inner}, E {shape.experts}, K {shape.top_k}, fp32, "
        f"gloo, {link}; {cores} cores of {machine['cpu']}, torch {machine['torch']}, one thread a rank{crowded}.\n"
        f"Medians of {shape.rounds} rounds, in each the slowest rank of every part (the parts add up to more than the "
        "step). formula: for the routing drawn; uniform: expected for uniform routing; metadata: counts, gates, "
        "places; exchange: in all-to-alls of both passes, waiting included; differs: outputs and gradients from "
        "flat's, relative."
    )
    for claim in claims:
        print(f"- {'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['claim']}")


def _megabytes(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.2f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
