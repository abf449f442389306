"""What the checkpoint benchmark shows: medians, ratios beside the plain operations, and their bars."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.runner.results import describe_machine, machine_words
from benchmarks.runner.rounds import median_ratio

STALL_BAR, WRITE_BAR, READ_BAR = 1.2, 0.7, 0.7


def figures_of(num_bytes: int, rounds: dict[str, list[float]], num_ranks: int, num_rounds: int) -> dict[str, Any]:
    """Figures of all rounds, as plain values for JSON.

    Args:
        num_bytes: Bytes of a checkpoint, all ranks.
        rounds: By what was measured, a figure per round: seconds, but for ratios.
        num_ranks: Number of ranks.
        num_rounds: Number of rounds.
    """
    median = {name: statistics.median(values) for name, values in rounds.items() if values}
    has_dd = "dd" in median
    return {
        "world_size": num_ranks,
        "bytes": num_bytes,
        "rounds": num_rounds,
        "stall_ms": 1e3 * median["stall"],
        "host_copy_ms": 1e3 * median["host_copy"],
        "stall_ratio": median_ratio(rounds["stall"], rounds["host_copy"]),
        "first_stall_ms": 1e3 * median["first_stall"],
        "step_ms": 1e3 * median["step"],
        "step_ratio_while_writing": median.get("step_ratio"),
        "write_bytes_per_second": num_bytes / median["write"],
        "copy_bytes_per_second": num_bytes / median["copy"],
        "write_ratio": median_ratio(rounds["copy"], rounds["write"]),
        "dd_bytes_per_second": num_bytes / median["dd"] if has_dd else None,
        "write_to_dd_ratio": median_ratio(rounds["dd"], rounds["write"]) if has_dd else None,
        "read_bytes_per_second": num_bytes / median["read"],
        "copy_from_disk_bytes_per_second": num_bytes / median["cold_copy"],
        "read_ratio": median_ratio(rounds["cold_copy"], rounds["read"]),
        "plain_read_bytes_per_second": num_bytes / median["plain_read"],
        "read_to_plain_read_ratio": median_ratio(rounds["plain_read"], rounds["read"]),
        "machine": describe_machine(),
    }


def show(figures: dict[str, Any]) -> None:
    """Print the figures of `figures_of` as a table."""
    rows: list[Sequence[str]] = [
        ("", "", "beside it", "", "ratio", "bar"),
        ("stall of a save", _ms(figures["stall_ms"]), "host copy", _ms(figures["host_copy_ms"]))
        + (_ratio(figures["stall_ratio"]), f"<= {STALL_BAR:g}"),
        ("  of the first save", _ms(figures["first_stall_ms"]), "", "", "", ""),
        ("step while writing", "", "step", _ms(figures["step_ms"])) + (_ratio(figures["step_ratio_while_writing"]), ""),
        ("write", _speed(figures["write_bytes_per_second"]), "copy + fsync", _speed(figures["copy_bytes_per_second"]))
        + (_ratio(figures["write_ratio"]), f">= {WRITE_BAR:g}"),
        ("", "", "dd conv=fsync", _speed(figures["dd_bytes_per_second"])) + (_ratio(figures["write_to_dd_ratio"]), ""),
        ("verify and load", _speed(figures["read_bytes_per_second"]), "copy + fsync")
        + (_speed(figures["copy_from_disk_bytes_per_second"]), _ratio(figures["read_ratio"]), f">= {READ_BAR:g}"),
        ("", "", "plain reading", _speed(figures["plain_read_bytes_per_second"]))
        + (_ratio(figures["read_to_plain_read_ratio"]), ""),
    ]
    print(
        f"{figures['bytes'] / 1e6:.0f} MB over {figures['world_size']} ranks, medians of {figures['rounds']} rounds, "
        f"on {machine_words(figures['machine'])}"
    )
    for what, value, beside, other, ratio, bar in rows:
        print(f"{what:20} {value:>10}  {beside:14} {other:>10} {ratio:>6}  {bar}".rstrip())


def _ms(value: float) -> str:
    return f"{value:.0f} ms"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f} MB/s"
