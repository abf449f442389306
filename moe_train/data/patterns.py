"""Patterns of file names: what exists under the very name is meant; then wildcards; then braces."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_train.config.errors import UsageError


def match_paths(pattern: str, field: str) -> Iterator[tuple[Path, str]]:
    """Find the files and folders that a path or pattern names.

    A part of the pattern that exists literally is taken literally, brackets and all. Braces name alternatives,
    {a,b} or {00..09}, each of which must be there.

    Args:
        pattern: Path, or pattern with *, ?, [...], ** and braces.
        field: Name of the setting, for messages.

    Yields:
        Each path, and its name relative to the part of the pattern before the first wildcard.

    Raises:
        UsageError: If there is nothing for one of the alternatives in braces, or a brace is not closed.
    """
    path = Path(pattern)
    if path.exists():
        yield path, path.name
        return
    root, parts = _split(path)
    is_found = False
    for match in _match(root, parts):
        is_found = True
        yield match, match.relative_to(root).as_posix()
    if is_found or "{" not in pattern:
        return
    for alternative in expand_braces(pattern, field):
        found = list(match_paths(alternative, field)) if alternative != pattern else []
        if not found and alternative != pattern:
            raise UsageError(f"{field} ({pattern!r}): nothing is there for {alternative!r}")
        yield from ((match, match.relative_to(root).as_posix()) for match, _ in found)


def expand_braces(pattern: str, field: str) -> list[str]:
    """Write out the alternatives of a pattern's braces; a pattern without braces is its own only one.

    Raises:
        UsageError: If a brace is not closed.
    """
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UsageError(f"{field} ({pattern!r}): a brace is not closed") from error


def has_wildcard(pattern: str) -> bool:
    """Return whether a path can match several names."""
    return glob.has_magic(pattern) or "{" in pattern


def _split(path: Path) -> tuple[Path, Sequence[str]]:
    """Split a pattern into the folder before its first wildcard, and the parts behind it."""
    root = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    for number, part in enumerate(parts):
        if has_wildcard(part) and not (root / part).exists():
            return root, parts[number:]
        root = root / part
    return root.parent, parts[-1:]


def _match(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    part, *rest = parts
    if part == "**":  # any number of folders
        for match in glob.iglob(str(Path(*parts)), root_dir=folder, recursive=True):
            yield folder / match
    elif (folder / part).exists():
        yield from _match(folder / part, rest)
    elif glob.has_magic(part):
        for name in glob.iglob(part, root_dir=folder):
            if not rest or (folder / name).is_dir():
                yield from _match(folder / name, rest)
