"""What every benchmark's report needs: the processor's name, lines of progress, matplotlib, whole files."""

import argparse
import importlib.util
import os
import platform
import sys
from pathlib import Path


def processor() -> str:
    """Its name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or os.uname().machine


def say(line: str) -> None:
    """Progress and messages go to stderr, figures to stdout."""
    print(line, file=sys.stderr, flush=True)


def can_draw(program: str) -> bool:
    """Whether matplotlib is there; says how to get it where it is not.

    Args:
        program: Whose message it is.
    """
    if importlib.util.find_spec("matplotlib") is None:
        say(f"{program}: the chart needs matplotlib: pip install -c requirements/constraints.txt -e '.[bench]'")
        return False
    return True


def make_output(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Make the folder of --output; the parser refuses what cannot be one, with exit code 2."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output ({folder}) cannot be a folder: {error.strerror}")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
