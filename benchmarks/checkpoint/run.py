"""What checkpoints cost, each part beside the plain operation that it cannot beat by much, in turn and in one run.

stall: how long the training loop is held up by an asynchronous save, with no other save under way; beside it a plain
copy of as many bytes in host memory that was touched before. The first save also has to get its memory; its stall is
told separately. While a save is written, steps are slower: beside them, steps with no save under way.
write: from the start of a save until it is complete and flushed, the snapshot included; beside it shutil.copyfile and
fsync of the same files to the same disk, each rank its own file, all at the same time; and dd conv=fsync.
read: resuming, which reads and verifies every file and then loads it; beside it the same copy, and plain reading.

Page cache: a save ends in fsync, as the copies do, and what only the page cache has taken does not count. The copies
beside it read from the page cache, as a save reads from memory. Before resuming, and before the copy and the plain
reading beside it, the files are dropped from the page cache (POSIX_FADV_DONTNEED), so that the first pass over them
comes from the disk; loading, the second pass of resuming, finds them in the cache again. A virtual disk may have a
cache of its own, which nothing here can drop. Between measurements old files are removed and everything is synced.

Times are those of the slowest rank; figures are medians over rounds, ratios medians of the ratios of each round.

    python -m benchmarks.checkpoint [--json] [--ranks 2] [--rounds 7] [--folder DIR] [--section.field=value ...]
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checkpoint.report import figures_of, show
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.processes import rank_places, run_ranks
from benchmarks.runner.resolved import resolve_for
from benchmarks.runner.results import print_json
from moe_train.config.load import load_config

TIMEOUT_SECONDS = 1800
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks, and print what they measured; the exit code."""
    parser = BenchmarkParser("checkpoint", __doc__, takes_fields=True)
    parser.add_number("--ranks", 2, "processes on this machine")
    parser.add_number("--rounds", 7, "timings of everything")
    parser.add_argument("--folder", default="/var/tmp", help="where to write: the disk to measure (default: /var/tmp)")
    options = parser.read(arguments)
    fields = [*MODEL, *options.fields]
    config = load_config([*fields, "--train.run_dir=unused"], program=parser.prog)
    resolve_for(config, options.ranks)  # here, before any rank starts
    with tempfile.TemporaryDirectory(prefix="moe_train_checkpoint_", dir=options.folder) as name:
        folder = Path(name)
        program = ["-m", "benchmarks.checkpoint.rows", name, str(options.rounds), *fields]
        with rank_places(options.ranks) as places:
            run_ranks("checkpoint", program, places, folder / "logs", TIMEOUT_SECONDS)
        found = json.loads((folder / "rounds.json").read_text(encoding="utf-8"))
    figures = figures_of(found["bytes"], found["rounds"], options.ranks, options.rounds)
    show(figures)
    print_json(options, figures | {"seconds": found["rounds"]})
    return 0
