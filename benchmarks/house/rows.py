"""What is measured of a tree: its source, what a routed row passes in it, and the processor time of its commands."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.house.source import SourceFigures, read_source
from benchmarks.runner.processes import rank_places, run_ranks

RANK = Path(__file__).with_name("rank.py")
NUM_RANKS = 2
TIMEOUT_SECONDS = 240
COMMAND_TIMEOUT_SECONDS = 60
# Two MoE layers of which the first is traced, with everything optional off.
OPTIONS = (
    "--model.hidden_size=32",
    "--model.num_layers=2",
    "--model.num_heads=2",
    "--model.intermediate_size=64",
    "--model.moe_every=1",
    "--model.moe.num_experts=4",
    "--model.moe.top_k=2",
    "--model.moe.router=softmax_topk",
    "--model.moe.load_cv2_coef=0",
    "--parallel.dispatch=flat",
    f"--parallel.expert_parallel_size={NUM_RANKS}",
    "--train.steps=3",
    "--train.sequence_length=16",
    "--train.micro_batch_size=2",
    "--train.precision=fp32",
    "--train.sample_tokens=0",
    "--optim.warmup_steps=1",
    "--telemetry.experts=false",
    "--telemetry.tensorboard=false",
    "--data.source=text",
    "--data.validation_fraction=0",
)
COMMANDS = {
    "import moe_train": ("-c", "import moe_train"),
    "moe-train --help": ("--help",),
    "moe-train train --help": ("train", "--help"),
}
_CONSOLE_SCRIPT = "import sys; from moe_train.cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class RowPath:
    """What one MoE layer's forward pass executes, as rank.py counts it.

    Attributes:
        files: Files of the package.
        classes: Classes of the package, as "module:Class".
        num_lines: Lines of these files.
    """

    files: tuple[str, ...]
    classes: tuple[str, ...]
    num_lines: int


@dataclass(frozen=True)
class Figures:
    """All that is measured of a tree.

    Attributes:
        source: Figures of the source.
        path: What a routed row passes.
        cpu_seconds: Median processor time by command, user and system.
    """

    source: SourceFigures
    path: RowPath
    cpu_seconds: dict[str, float]


def measure(root: Path, repeats: int) -> Figures:
    """Measure a tree.

    Args:
        root: Folder that holds the package.
        repeats: Timings of each command.
    """
    return Figures(read_source(root), trace_row(root), {name: time_command(root, name, repeats) for name in COMMANDS})


def trace_row(root: Path) -> RowPath:
    """Train two steps on two ranks that share the experts, and see what an MoE layer executes.

    Raises:
        RunFailed: If a rank fails.
    """
    with tempfile.TemporaryDirectory(prefix="moe_train_house_") as scratch, rank_places(NUM_RANKS) as places:
        folder = Path(scratch)
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
        data = (f"--data.paths={json.dumps([str(folder / 'text.txt')])}", f"--data.cache_dir={folder / 'cache'}")
        program = (str(RANK), str(folder / "path.json"), *OPTIONS, *data, f"--train.run_dir={folder / 'run'}")
        ours = [replace(place, environment=place.environment | {"PYTHONPATH": str(root)}) for place in places]
        run_ranks("house", program, ours, folder / "output", TIMEOUT_SECONDS)
        found = json.loads((folder / "path.json.0").read_text(encoding="utf-8"))
    num_lines = sum(len((root / path).read_text(encoding="utf-8").splitlines()) for path in found["files"])
    return RowPath(tuple(found["files"]), tuple(found["classes"]), num_lines)


def time_command(root: Path, name: str, repeats: int) -> float:
    """Measure the processor time of a command, which has run once before.

    Args:
        root: Folder that holds the package.
        name: Key of COMMANDS.
        repeats: Number of timings.

    Returns:
        Their median, user and system time together, in seconds.

    Raises:
        CalledProcessError: If the command fails.
    """
    words = COMMANDS[name]
    arguments = words if words[0] == "-c" else ("-c", _CONSOLE_SCRIPT, *words)
    times = [_cpu_seconds(root, arguments) for _ in range(1 + repeats)]  # the first one compiles
    return statistics.median(times[1:])


def _cpu_seconds(root: Path, arguments: Sequence[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        (sys.executable, *arguments),
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=COMMAND_TIMEOUT_SECONDS,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
