"""What checkpoints cost, each part beside the plain operation that it cannot beat by much, in turn and in one run.

stall: how long the training loop is held up by an asynchronous save, with none under way; beside it a plain host copy
of as many bytes into memory that was touched before. The first save, which has to get its memory, is told separately.
While a save is written, steps are slower: beside them steps with no save under way.
write: from the start of a save until it is complete and flushed, the snapshot included; beside it shutil.copyfile and
fsync of the same files to the same disk, each rank its own file, all at the same time; and dd conv=fsync.
read: resuming, which reads and verifies every file and then loads it; beside it the same copy, and plainly reading.

Page cache: a save ends in fsync, as the copies do, and what only the page cache has taken does not count. The copies
beside it read from the page cache, as a save reads from memory. Before resuming, and before the copy and the
plain reading beside it, the files are dropped from the page cache (POSIX_FADV_DONTNEED), so that the first pass over
them comes from the disk; loading, the second pass of resuming, finds them in the cache again. A virtual disk may have a
cache of its own, which nothing here can drop. Between measurements old files are removed and everything is synced.

Times are those of the slowest rank; figures are medians over rounds, ratios medians of each round's own ratio.

    python benchmarks/checkpoint.py [--json] [--ranks 2] [--rounds 7] [--folder DIR] [--section.field=value ...]
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.reports import processor  # noqa: E402
from moe_train.cli.parity import TRAINING_MODULES  # noqa: E402
from moe_train.distributed.bootstrap import local_rank_environments  # noqa: E402
from moe_train.host.cores import usable_cores  # noqa: E402
from moe_train.launch.fork_server import ForkServer, wait_for_all  # noqa: E402

TIMEOUT_SECONDS = 1800
STALL_BAR, WRITE_BAR, READ_BAR = 1.2, 0.7, 0.7
# 38 million parameters, so 460 MB of weights and moments; options override it.
MODEL = (
    "--model.vocab_size=512",
    "--model.hidden_size=512",
    "--model.num_layers=3",
    "--model.num_heads=8",
    "--model.num_kv_heads=4",
    "--model.moe_every=1",
    "--model.moe.num_experts=8",
    "--model.moe.intermediate_size=1024",
    "--train.sequence_length=32",
    "--train.micro_batch_size=1",
    "--train.precision=fp32",
    "--parallel.device=cpu",
)
Rounds = dict[str, list[float]]  # by what was measured, a figure a round; seconds, but for ratios


def main() -> int:
    """Start the ranks, and print what they measured; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--folder", default="/var/tmp", help="where to write: the disk to measure (default: /var/tmp)")
    options, extra = parser.parse_known_args()
    for name in ("ranks", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} ({getattr(options, name)}) must be 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the files are removed
    environments = local_rank_environments(options.ranks)
    with (
        tempfile.TemporaryDirectory(prefix="moe_train_checkpoint_", dir=options.folder) as folder,
        ForkServer(TRAINING_MODULES, environments[0]) as server,
    ):
        arguments = [folder, str(options.rounds), *MODEL, *extra]
        ranks = [server.start("benchmarks.checkpoint_rounds:run_rank", arguments, each) for each in environments]
        for result in wait_for_all(ranks, TIMEOUT_SECONDS):
            if result.returncode:
                print(result.stderr[-3000:], file=sys.stderr)
                return result.returncode if result.returncode > 0 else 1
        found = json.loads((Path(folder) / "rounds.json").read_text())
    report(found["bytes"], found["rounds"], options)
    return 0


def report(num_bytes: int, rounds: Rounds, options: argparse.Namespace) -> None:
    """Print the figures."""
    median = {name: statistics.median(values) for name, values in rounds.items() if values}

    def ratio(ours: str, theirs: str, divide: Callable[[float, float], float]) -> float:
        return statistics.median(divide(a, b) for a, b in zip(rounds[ours], rounds[theirs], strict=True))

    def slower(a: float, b: float) -> float:
        return a / b

    def faster(a: float, b: float) -> float:
        return b / a

    figures = {
        "world_size": options.ranks,
        "bytes": num_bytes,
        "rounds": options.rounds,
        "stall_ms": 1e3 * median["stall"],
        "host_copy_ms": 1e3 * median["host_copy"],
        "stall_ratio": ratio("stall", "host_copy", slower),
        "first_stall_ms": 1e3 * median["first_stall"],
        "step_ms": 1e3 * median["step"],
        "step_ratio_while_writing": median.get("step_ratio"),
        "write_bytes_per_second": num_bytes / median["write"],
        "copy_bytes_per_second": num_bytes / median["copy"],
        "write_ratio": ratio("write", "copy", faster),
        "dd_bytes_per_second": num_bytes / median["dd"] if "dd" in median else None,
        "write_to_dd_ratio": ratio("write", "dd", faster) if "dd" in median else None,
        "read_bytes_per_second": num_bytes / median["read"],
        "copy_from_disk_bytes_per_second": num_bytes / median["cold_copy"],
        "read_ratio": ratio("read", "cold_copy", faster),
        "plain_read_bytes_per_second": num_bytes / median["plain_read"],
        "read_to_plain_read_ratio": ratio("read", "plain_read", faster),
        "machine": {"cpu": processor(), "cores": usable_cores()},
    }
    show(figures)
    if options.json:
        print(json.dumps(figures | {"seconds": rounds}))


def show(figures: dict) -> None:
    """The figures for people."""

    def speed(name: str) -> str:
        value = figures[name]
        return "-" if value is None else f"{value / 1e6:.0f} MB/s"

    step_ratio = figures["step_ratio_while_writing"]
    rows = [
        ("stall of a save", f"{figures['stall_ms']:.0f} ms", "host copy", f"{figures['host_copy_ms']:.0f} ms")
        + (f"{figures['stall_ratio']:.2f}", f"<= {STALL_BAR:g}"),
        ("  of the first save", f"{figures['first_stall_ms']:.0f} ms", "", "", "", ""),
        ("step while writing", "", "step", f"{figures['step_ms']:.0f} ms")
        + ("-" if step_ratio is None else f"{step_ratio:.2f}", ""),
        ("write", speed("write_bytes_per_second"), "copy + fsync", speed("copy_bytes_per_second"))
        + (f"{figures['write_ratio']:.2f}", f">= {WRITE_BAR:g}"),
        ("", "", "dd conv=fsync", speed("dd_bytes_per_second"))
        + ("-" if figures["write_to_dd_ratio"] is None else f"{figures['write_to_dd_ratio']:.2f}", ""),
        ("verify and load", speed("read_bytes_per_second"), "copy + fsync", speed("copy_from_disk_bytes_per_second"))
        + (f"{figures['read_ratio']:.2f}", f">= {READ_BAR:g}"),
        ("", "", "plain reading", speed("plain_read_bytes_per_second"))
        + (f"{figures['read_to_plain_read_ratio']:.2f}", ""),
    ]
    machine = figures["machine"]
    print(
        f"{figures['bytes'] / 1e6:.0f} MB over {figures['world_size']} ranks, medians of {figures['rounds']} rounds, "
        f"on {machine['cores']} cores of {machine['cpu']}"
    )
    for what, value, beside, other, ratio, bar in [("", "", "beside it", "", "ratio", "bar"), *rows]:
        print(f"{what:20} {value:>10}  {beside:14} {other:>10} {ratio:>6}  {bar}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
