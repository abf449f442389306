"""Patterns of file names: what exists under the very name is meant; then wildcards; then braces."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from moe_train.config.errors import UsageError
from moe_train.data.walking import LeaveOut, walk_folders

Walk = Callable[[Path], Iterator[tuple[Path, Iterator[Path]]]]
MOST_ALTERNATIVES = 100_000  # of the braces of a pattern; every one is looked for


def match_paths(pattern: str, field: str, leave_out: LeaveOut) -> Iterator[tuple[Path, str]]:
    """Find the files and folders that a path or pattern names.

    A part of the pattern that exists literally is taken literally, brackets and all. Braces name alternatives,
    {a,b} or {00..09}, each of which must be there. ** enters every real folder once; at the end of a pattern it names
    the files in all of them.

    Args:
        pattern: Path, or pattern with *, ?, [...], ** and braces.
        field: Name of the setting, for messages.
        leave_out: Called with what ** leaves out: the reason, the path in the names' root, and the real path.

    Yields:
        Each path, and its name relative to the part of the pattern before the first wildcard.

    Raises:
        UsageError: If there is nothing for one of the alternatives in braces, a brace is not closed, or ** meets a
            folder that cannot be read.
    """
    path = Path(pattern)
    if os.path.exists(path):
        yield path, path.name
        return
    root, parts = _split(path)
    is_found = False

    def leave_out_inside(reason: str, path: Path, real: Path) -> None:
        leave_out(reason, path.relative_to(root), real)

    for match in _match(root, parts, partial(_walk_once, field=field, leave_out=leave_out_inside)):
        is_found = True
        yield match, match.relative_to(root).as_posix()
    if is_found or "{" not in pattern:
        return
    for alternative in expand_braces(pattern, field):
        found = list(match_paths(alternative, field, leave_out)) if alternative != pattern else []
        if not found and alternative != pattern:
            raise UsageError(f"{field} ({pattern!r}): nothing is there for {alternative!r}")
        yield from ((match, match.relative_to(root).as_posix()) for match, _ in found)


def expand_braces(pattern: str, field: str) -> list[str]:
    """Write out the alternatives of a pattern's braces; a pattern without braces is its own only one.

    Raises:
        UsageError: If a brace is not closed, or there are too many alternatives.
    """
    from braceexpand import braceexpand

    try:
        count = _count_alternatives(pattern)
        if count > MOST_ALTERNATIVES:
            raise UsageError(
                f"{field} ({pattern!r}): its braces have {count:,} alternatives, more than {MOST_ALTERNATIVES:,}: name "
                "the folder, or use *"
            )
        return list(braceexpand(pattern))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{field} ({pattern!r}): a brace is not closed") from error
    except RecursionError as error:
        raise UsageError(f"{field} ({pattern[:80]!r}...): too many braces inside of each other") from error


def _count_alternatives(pattern: str) -> int:
    """Count what `braceexpand` would list; it would list a whole range before it gives the first name."""
    count, depth, start = 1, 0, 0
    for place, letter in _unescaped(pattern):
        if letter == "{":
            depth += 1
            start = place + 1 if depth == 1 else start
        elif letter == "}":
            depth -= 1
            if depth == 0:
                count *= _count_in_braces(pattern[start:place])
    return count


def _count_in_braces(inside: str) -> int:
    from braceexpand import braceexpand

    if numbers := re.match(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$", inside):
        first, last, step = (int(number or 1) for number in numbers.groups())
        return abs(last - first) // (step or 1) + 1
    if re.match(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?$", inside):
        return len(list(braceexpand(f"{{{inside}}}")))  # never many
    depth, start, pieces = 0, 0, []
    for place, letter in _unescaped(inside):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            pieces.append(inside[start:place])
            start = place + 1
    return sum(_count_alternatives(piece) for piece in [*pieces, inside[start:]])


def _unescaped(pattern: str) -> Iterator[tuple[int, str]]:
    """Yield the letters that no backslash stands before, with their places."""
    return (
        (match.start(), match.group()) for match in re.finditer(r"\\.|.", pattern, re.DOTALL) if len(match.group()) == 1
    )


def has_wildcard(pattern: str) -> bool:
    """Return whether a path can match several names."""
    return glob.has_magic(pattern) or "{" in pattern


def _split(path: Path) -> tuple[Path, Sequence[str]]:
    """Split a pattern into the folder before its first wildcard, and the parts behind it."""
    root = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    for number, part in enumerate(parts):
        if has_wildcard(part) and not os.path.exists(root / part):
            return root, parts[number:]
        root = root / part
    return root.parent, parts[-1:]


def _match(folder: Path, parts: Sequence[str], walk: Walk) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    part, *rest = parts
    if part == "**":  # any number of folders
        while rest[:1] == ["**"]:
            del rest[0]
        for inner, files in walk(folder) if os.path.isdir(folder) else ():
            yield from _match(inner, rest, walk) if rest else files
    elif os.path.exists(folder / part):
        yield from _match(folder / part, rest, walk)
    elif glob.has_magic(part):
        names = (name for name in glob.iglob(part, root_dir=folder) if not rest or os.path.isdir(folder / name))
        # What several names lead to has the name that is no link.
        for name in sorted(names, key=lambda name: (os.path.islink(folder / name), name)):
            yield from _match(folder / name, rest, walk)


def _walk_once(root: Path, field: str, leave_out: LeaveOut) -> Iterator[tuple[Path, Iterator[Path]]]:
    """Walk a folder for **, and yield each folder in it with its files that are not hidden."""

    def visible(folder: Path, real: Path, names: Sequence[str]) -> Iterator[Path]:
        for name in names:
            if name.startswith("."):
                leave_out("hidden", folder / name, real / name)
            else:
                yield folder / name

    for folder, real, names in walk_folders(root, field, leave_out, set()):
        yield folder, visible(folder, real, names)
