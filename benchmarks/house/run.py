"""Size and order of the source: how much there is, what a routed row passes, what a new part takes, how fast it starts.

Measured in the working tree, and with --against in another commit too, in a git worktree that is removed afterwards.
Classes and files on a routed row's path are those whose code one forward pass of an MoE layer executes, flat dispatch
between two ranks, telemetry off (rank.py says how it counts). Files to touch for a new part are its own and those that
name every part of its kind: an upper bound for mixers, of which there is one. CPU time is user and system time, median.

    python -m benchmarks.house [--json] [--against COMMIT] [--repeats 5]
"""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.house.report import missed_lines, table
from benchmarks.house.rows import measure
from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.processes import ROOT
from benchmarks.runner.results import print_json, say
from moe_train.config.errors import UsageError

_GIT_TIMEOUT_SECONDS = 120


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check a commit out beside the working tree, as long as the block runs.

    Args:
        commit: Whatever git takes for one.

    Yields:
        The folder.

    Raises:
        UsageError: If git does not know the commit.
    """
    with tempfile.TemporaryDirectory(prefix="moe_train_house_") as scratch:
        folder = Path(scratch).resolve() / "tree"
        git("worktree", "add", "--detach", str(folder), commit)
        try:
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> None:
    """Run git in the repository.

    Raises:
        UsageError: If it fails, with what it says.
    """
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=_GIT_TIMEOUT_SECONDS)
    if result.returncode:
        raise UsageError(f"git {' '.join(arguments)}: {result.stderr.strip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0 whatever the figures are."""
    parser = BenchmarkParser("house", __doc__, epilog="About 20 seconds per tree on two cores.")
    parser.add_argument("--against", metavar="COMMIT", help="measure this commit too, and show it before the tree")
    parser.add_number("--repeats", 5, "timings of each command")
    options = parser.read(arguments)
    before = None
    if options.against is not None:
        with worktree(options.against) as folder:
            say(f"measuring {options.against}")
            before = measure(folder, options.repeats)
    say("measuring the working tree")
    after = measure(ROOT, options.repeats)
    print(table(before, after))
    print("\n".join(missed_lines(after)))
    print_json(options, {"against": options.against, "before": before, "after": after})
    return 0
