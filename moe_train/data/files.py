"""Files of a source: folders are walked and patterns expanded, always in the same order."""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.errors import UsageError
from moe_train.config.paths import expand_user, is_remote, unreplaced_variable
from moe_train.data.folders import cache_root
from moe_train.data.patterns import has_wildcard, match_paths
from moe_train.data.remote import RemoteFile, fetch, list_remote

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


def find_files(
    patterns: Sequence[str], suffixes: tuple[str, ...], field: str, cache_dir: str | None = None
) -> tuple[CorpusFile, ...]:
    """Find the files that paths name: files, folders, matches of patterns, and copies of remote files.

    Args:
        patterns: Files, folders or patterns. Folders, also those that a pattern matches, are searched for files with
            one of the suffixes, except names that begin with a dot. `**` matches folders at any depth.
        suffixes: File name endings that are taken from folders.
        field: Name of the setting, for messages.
        cache_dir: Setting of the cache, which remote files are copied into.

    Returns:
        The files in the order of the patterns, sorted by name within a pattern. A file that is reached twice is listed
        once.

    Raises:
        UsageError: If a path does not exist, a pattern matches no file or a folder holds none of the files.
    """
    found: dict[Path, CorpusFile] = {}
    for pattern in patterns:
        matches = sorted(_expand(pattern, suffixes, field), key=lambda file: file.name)
        if not matches:
            raise UsageError(_nothing_found(pattern, suffixes, field))
        for match in matches:
            file = _copy_of(match, cache_dir) if isinstance(match, RemoteFile) else match
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
        if next(_expand(pattern, suffixes, field), None) is None:
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


def _expand(pattern: str, suffixes: tuple[str, ...], field: str) -> Iterator[CorpusFile | RemoteFile]:
    pattern = expand_user(pattern)
    if is_remote(pattern):
        yield from list_remote(pattern, suffixes, field)
        return
    for path, name in match_paths(pattern, field):
        if not path.is_dir():
            yield CorpusFile(path, name)
            continue
        inside = "" if path == Path(pattern) else f"{name}/"  # of several folders, each file has the name of its own
        yield from (CorpusFile(file.path, f"{inside}{file.name}") for file in _walk(path, suffixes))


def _copy_of(file: RemoteFile, cache_dir: str | None) -> CorpusFile:
    return CorpusFile(fetch(file, cache_root(cache_dir)), file.name)


def _walk(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str] = frozenset()) -> Iterator[CorpusFile]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for name in names:
            if name.endswith(suffixes) and not name.startswith("."):
                path = Path(folder, name)
                yield CorpusFile(path, path.relative_to(root).as_posix())


def _nothing_found(pattern: str, suffixes: tuple[str, ...], field: str) -> str:
    path = expand_user(pattern)
    if os.path.isdir(path):
        return f"{field} ({pattern!r}): the folder holds no {' or '.join('*' + suffix for suffix in suffixes)} file"
    if variable := unreplaced_variable(path):
        return f"{field} ({pattern!r}): {variable}"
    if has_wildcard(path):
        return f"{field} ({pattern!r}): the pattern matches no file"
    return f"{field} ({pattern!r}): no such file or folder"
