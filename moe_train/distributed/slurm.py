"""Slurm's variables for the tasks of a job step: their number and places, the hosts, and a port that all can derive."""

import re
from collections.abc import Mapping

from moe_train.config.errors import UsageError
from moe_train.distributed.addresses import RENDEZVOUS_PORTS

FIRST_SPECIAL_STEP = 0xFFFFFFF0  # batch scripts, interactive shells and similar have step ids from here on
PORTS_BETWEEN_JOBS = 101  # so that the first steps of consecutive jobs on the same host get different ports


def is_step_task(environ: Mapping[str, str]) -> bool:
    """Return whether this process is a task that `srun` started, and not a batch script or an interactive shell."""
    step = environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environ and step.isdecimal() and int(step) < FIRST_SPECIAL_STEP


def expand_nodelist(nodelist: str) -> list[str]:
    """Expand a host list in Slurm's notation, in its order: "a[08-10,3]-x,b" gives a08-x, a09-x, a10-x, a3-x, b.

    Args:
        nodelist: Host list in Slurm's notation.

    Raises:
        UsageError: If the text has another notation.
    """
    hosts = [host for pattern in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodelist) for host in _expand_pattern(pattern)]
    if (
        not hosts
        or nodelist.count("[") != nodelist.count("]")
        or any(character in host for host in hosts for character in "[] ")
    ):
        raise UsageError(f"the host list {nodelist!r} is not in Slurm's notation, such as node[1-4,7],login")
    return hosts


def _expand_pattern(pattern: str) -> list[str]:
    match = re.fullmatch(r"([^\[]*)\[([\d,-]+)\](.*)", pattern)
    if match is None:
        return [pattern]
    prefix, ranges, rest = match.groups()
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return [pattern]  # the caller rejects the brackets that are left in it
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return [prefix + number + tail for number in numbers for tail in _expand_pattern(rest)]


def expand_tasks_per_node(text: str) -> list[int]:
    """Expand the number of tasks on each host: "2(x3),1" gives 2, 2, 2, 1.

    Args:
        text: Tasks per node in Slurm's notation.

    Raises:
        UsageError: If the text has another notation.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UsageError(f"the tasks per node {text!r} are not in Slurm's notation, such as 4(x2),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def derive_port(job_id: int, step_id: int) -> int:
    """Derive a port that is the same for all tasks of a step, and differs for the steps and jobs next to it."""
    first, end = RENDEZVOUS_PORTS
    return first + (job_id * PORTS_BETWEEN_JOBS + step_id) % (end - first)
