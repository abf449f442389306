"""Files of a source: folders are walked and patterns expanded, always in the same order."""

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.errors import UsageError

SUFFIXES = {"text": (".txt", ".md"), "jsonl": (".jsonl",), "parquet": (".parquet",)}
STDLIB_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class CorpusFile:
    """File of a corpus.

    Attributes:
        path: Path of the file.
        name: Name relative to the folder, pattern or file that led to it, so that a moved corpus keeps its names.
    """

    path: Path
    name: str


def find_files(patterns: Sequence[str], suffixes: tuple[str, ...], field: str) -> tuple[CorpusFile, ...]:
    """Find the files that paths name: files as given, files in folders, and matches of glob patterns.

    Args:
        patterns: Files, folders or glob patterns. Folders are searched for files with one of the suffixes, except names
            that begin with a dot. In a glob pattern, `**` matches folders at any depth; only files count.
        suffixes: File name endings that are taken from folders.
        field: Name of the setting, for messages.

    Returns:
        The files in the order of the patterns, sorted by name within a pattern. A file that is reached twice is listed
        once.

    Raises:
        UsageError: If a path does not exist, a pattern matches no file or a folder holds none of the files.
    """
    found: dict[Path, CorpusFile] = {}
    for pattern in patterns:
        matches = sorted(_expand(pattern, suffixes), key=lambda file: file.name)
        if not matches:
            raise UsageError(_nothing_found(pattern, suffixes, field))
        for file in matches:
            found.setdefault(file.path.resolve(), file)
    return tuple(found.values())


def check_files(patterns: Sequence[str], suffixes: tuple[str, ...], field: str) -> None:
    """Check that every path or pattern has a match. It stops at the first match of each pattern.

    Args:
        patterns: Files, folders or glob patterns, as in `find_files`.
        suffixes: File name endings that are taken from folders.
        field: Name of the setting, for messages.

    Raises:
        UsageError: If a path does not exist, a pattern matches no file or a folder holds none of the files.
    """
    for pattern in patterns:
        if next(_expand(pattern, suffixes), None) is None:
            raise UsageError(_nothing_found(pattern, suffixes, field))


def stdlib_files() -> tuple[CorpusFile, ...]:
    """Find the .py files of the running interpreter's standard library.

    Returns:
        The files, sorted by relative name, without installed packages.

    Raises:
        UsageError: If the interpreter was installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = tuple(sorted(_walk(root, (".py",), STDLIB_SKIPPED_FOLDERS), key=lambda file: file.name))
    if not files:
        raise UsageError(f"data.source ('python_stdlib'): {root} holds no .py files; name another source")
    return files


def _expand(pattern: str, suffixes: tuple[str, ...]) -> Iterator[CorpusFile]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        yield from _walk(path, suffixes)
    elif path.exists():
        yield CorpusFile(path, path.name)
    elif glob.has_magic(pattern):
        root = _fixed_root(path)
        for match in glob.iglob(str(path), recursive=True):
            if os.path.isfile(match):
                yield CorpusFile(Path(match), os.path.relpath(match, root))


def _fixed_root(pattern: Path) -> Path:
    """Return the folder before the first part of a pattern that can match several names."""
    for parent in reversed(pattern.parents):
        if glob.has_magic(str(parent)):
            return parent.parent
    return pattern.parent


def _walk(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str] = frozenset()) -> Iterator[CorpusFile]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for name in names:
            if name.endswith(suffixes) and not name.startswith("."):
                path = Path(folder, name)
                yield CorpusFile(path, path.relative_to(root).as_posix())


def _nothing_found(pattern: str, suffixes: tuple[str, ...], field: str) -> str:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return f"{field} ({pattern!r}): the folder holds no {' or '.join('*' + suffix for suffix in suffixes)} file"
    if glob.has_magic(pattern):
        return f"{field} ({pattern!r}): the pattern matches no file"
    return f"{field} ({pattern!r}): no such file or folder"
