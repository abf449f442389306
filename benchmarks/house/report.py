"""What the benchmark shows: a table, with another commit beside it, and what stands behind a goal that is missed."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.house.rows import COMMANDS, Figures
from benchmarks.house.source import MOST_FUNCTION_LINES
from benchmarks.runner.results import markdown_table

MOST_CLASSES, MOST_PATH_FILES, MOST_TOUCHED_FILES, MOST_CPU_SECONDS = 20, 8, 2, 0.6


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: What is measured.
        value: Its value.
        unit: Format of the value.
        goal: Largest value that is good; None: there is no goal.
        parts: What is counted, by name.
    """

    name: str
    value: float
    unit: str = "{:,.0f}"
    goal: float | None = None
    parts: Sequence[str] = ()

    @property
    def is_missed(self) -> bool:
        """Whether there is a goal and the value is over it."""
        return self.goal is not None and self.value > self.goal

    def text(self, value: float | None) -> str:
        """A value as it is shown."""
        return "" if value is None else self.unit.format(value)


def rows_of(figures: Figures) -> list[Row]:
    """The table's lines of one tree."""
    source, path = figures.source, figures.path
    share = 100 * source.stub_lines / max(1, source.docstring_lines)
    circles = [" <-> ".join(circle) for circle in source.circles]
    return [
        Row("files of moe_train/", source.num_files),
        Row("median lines of a file", source.median_lines),
        Row("lines of the longest file", source.biggest_lines),
        Row(f"functions over {MOST_FUNCTION_LINES} lines", len(source.long_functions), parts=source.long_functions),
        Row("classes on a routed row's path", len(path.classes), goal=MOST_CLASSES, parts=path.classes),
        Row("files on a routed row's path", len(path.files), goal=MOST_PATH_FILES, parts=path.files),
        Row("lines of these files", path.num_lines),
        _touched("router", source.router_files),
        _touched("mixer", source.mixer_files),
        Row("import circles", len(source.circles), goal=0, parts=circles),
        *(Row(f"CPU time of {name}", figures.cpu_seconds[name], "{:.2f} s", MOST_CPU_SECONDS) for name in COMMANDS),
        Row("docstring lines that do not stand alone", share, "{:.1f} %"),
    ]


def _touched(kind: str, files: Sequence[str]) -> Row:
    return Row(f"files to touch for a new {kind}", len(files), goal=MOST_TOUCHED_FILES, parts=files)


def table(before: Figures | None, after: Figures) -> str:
    """The table in Markdown.

    Args:
        before: Figures of the other commit; None: there is none.
        after: Figures of the working tree.
    """
    old = {row.name: row.value for row in rows_of(before)} if before is not None else {}
    lines = []
    for row in rows_of(after):
        goal = "" if row.goal is None else f"at most {row.text(row.goal)}"
        verdict = "" if row.goal is None else "missed" if row.is_missed else "holds"
        values = [row.text(old.get(row.name)), row.text(row.value)] if before is not None else [row.text(row.value)]
        lines.append([row.name, *values, goal, verdict])
    heads = ["figure", "before", "after"] if before is not None else ["figure", "value"]
    return "\n".join(markdown_table([*heads, "goal", ""], lines))


def missed_lines(figures: Figures) -> list[str]:
    """For each goal that is missed, what is counted: lines of text."""
    lines = []
    for row in rows_of(figures):
        if row.is_missed and row.parts:
            lines += ["", f"{row.name} ({row.text(row.value)}):", *(f"  {part}" for part in row.parts)]
    return lines
