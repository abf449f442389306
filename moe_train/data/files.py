"""Files of a source: folders are walked and patterns expanded, always in the same order."""

import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moe_train.config.errors import UsageError
from moe_train.config.paths import expand_user, is_remote, unreplaced_variable
from moe_train.data.folders import cache_root
from moe_train.data.patterns import has_wildcard, match_paths
from moe_train.data.remote import RemoteFile, fetch, list_remote
from moe_train.data.walking import walk_folders

SUFFIXES = {
    "text": (".txt", ".text", ".md", ".markdown", ".rst"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
}
PACKED_SUFFIXES = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd")
# Files that `datasets` writes beside the data.
DATA_SET_RECORDS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
SHOWN_NAMES = 3  # of what is left out for one reason
STDLIB_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})

LeftOut = dict[str, dict[Path, str]]  # by the reason: real path, and the name under which it was reached first


@dataclass(frozen=True)
class CorpusFile:
    """File of a corpus.

    Attributes:
        path: Path of the file.
        name: Name relative to the folder, pattern or file that led to it, so that a moved corpus keeps its names.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class FoundFiles:
    """Files that paths name, and an account of what was met and left out.

    Attributes:
        files: Files that are taken, in their order.
        left_out: Names of what was left out, by the reason.
        searched: Whether a folder or a pattern was searched; False where each file was named.
    """

    files: tuple[CorpusFile, ...]
    left_out: Mapping[str, tuple[str, ...]]
    searched: bool

    def account(self, field: str, what: str = "files taken") -> str:
        """Say how many files are taken and left out, and why."""
        count = sum(len(names) for names in self.left_out.values())
        reasons = "; ".join(f"{len(names)} {reason} ({_some(names)})" for reason, names in self.left_out.items())
        return f"{field}: {len(self.files):,} {what}, {count:,} left out{': ' + reasons if reasons else ''}"


def find_files(
    patterns: Sequence[str], suffixes: tuple[str, ...], field: str, cache_dir: str | None = None
) -> FoundFiles:
    """Find the files that paths name: files, folders, matches of patterns, and copies of remote files.

    Args:
        patterns: Files, folders or patterns. Folders, also those that a pattern matches, are searched for files with
            one of the suffixes, except names that begin with a dot; links are followed. `**` matches folders at any
            depth.
        suffixes: File name endings that are taken from folders, also with an ending of packed files behind them.
            Capital letters count as small ones.
        field: Name of the setting, for messages.
        cache_dir: Setting of the cache, which remote files are copied into.

    Returns:
        The files in the order of the patterns, sorted by name within a pattern. A file that is reached twice is listed
        once. With them, all that was left out.

    Raises:
        UsageError: If a path does not exist, a pattern matches no file, or a folder holds none of the files or cannot
            be read.
    """
    found: dict[Path, CorpusFile] = {}
    left_out: LeftOut = {}
    for pattern in patterns:
        matches = sorted(_expand(pattern, suffixes, field, left_out), key=lambda file: file.name)
        if not matches:
            raise UsageError(_nothing_found(pattern, suffixes, field))
        for match in matches:
            file = _copy_of(match, cache_dir) if isinstance(match, RemoteFile) else match
            if found.setdefault(file.path.resolve(), file) is not file:
                _leave_out(left_out, "reached twice", file.name, file.path.resolve())
    named = [pattern for pattern in patterns if is_remote(pattern) or os.path.isfile(expand_user(pattern))]
    searched = len(named) < len(patterns) or bool(left_out)
    return FoundFiles(tuple(found.values()), _sorted_names(left_out), searched)


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
        if next(_expand(pattern, suffixes, field, {}), None) is None:
            raise UsageError(_nothing_found(pattern, suffixes, field))


def stdlib_files() -> tuple[CorpusFile, ...]:
    """Find the .py files of the running interpreter's standard library.

    Returns:
        The files, sorted by relative name, without installed packages.

    Raises:
        UsageError: If the interpreter was installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = tuple(
        sorted(
            _walk(root, (".py",), "data.source", {}, set(), skipped=STDLIB_SKIPPED_FOLDERS), key=lambda file: file.name
        )
    )
    if not files:
        raise UsageError(f"data.source ('python_stdlib'): {root} holds no .py files; name another source")
    return files


def files_below(root: Path, field: str) -> FoundFiles:
    """Find all files in a folder at any depth, except names that begin with a dot; links are followed.

    Args:
        root: Folder to search.
        field: Name of the setting, for messages.

    Returns:
        The files, sorted by name, and all that was left out.

    Raises:
        UsageError: If a folder cannot be read.
    """
    left_out: LeftOut = {}
    files = sorted(_walk(root, None, field, left_out, set()), key=lambda file: file.name)
    return FoundFiles(tuple(files), _sorted_names(left_out), True)


def _expand(
    pattern: str, suffixes: tuple[str, ...], field: str, left_out: LeftOut
) -> Iterator[CorpusFile | RemoteFile]:
    pattern = expand_user(pattern)
    if is_remote(pattern):
        for remote in list_remote(pattern, field):
            if reason := _why_name_left_out(remote.name, suffixes) if remote.is_in_folder else "":
                _leave_out(left_out, reason, remote.name, Path(remote.path))
            else:
                yield remote
        return

    def leave_out(reason: str, path: Path, real: Path) -> None:
        _leave_out(left_out, reason, path.as_posix(), real)

    seen = set[Path]()  # folders, of which a pattern can reach one in several ways
    for path, name in match_paths(pattern, field, leave_out):
        if os.path.isdir(path):
            inside = "" if path == Path(pattern) else name  # of several folders, a file has the name of its own
            yield from _walk(path, suffixes, field, left_out, seen, inside)
        elif os.path.isfile(path):
            yield CorpusFile(path, name)
        elif os.path.exists(path):
            raise UsageError(
                f"{field} ({pattern!r}): is a pipe or a device: data is read more than once, save it as a file"
            )
        else:
            leave_out("links that lead nowhere", Path(name), path)


def _copy_of(file: RemoteFile, cache_dir: str | None) -> CorpusFile:
    return CorpusFile(fetch(file, cache_root(cache_dir)), file.name)


def _walk(
    root: Path,
    suffixes: tuple[str, ...] | None,
    field: str,
    left_out: LeftOut,
    seen: set[Path],
    inside: str = "",
    skipped: frozenset[str] = frozenset(),
) -> Iterator[CorpusFile]:
    """Walk a folder for its files, whose names begin with `inside`; without suffixes, all that are not hidden."""

    def name_of(path: Path) -> str:
        return PurePosixPath(inside, path.relative_to(root)).as_posix()

    def leave_out(reason: str, path: Path, real: Path) -> None:
        _leave_out(left_out, reason, name_of(path), real)

    for folder, real, names in walk_folders(root, field, leave_out, seen, skipped):
        for path in (folder / name for name in names):
            if reason := _why_left_out(path, suffixes):
                leave_out(reason, path, real / path.name)
            else:
                yield CorpusFile(path, name_of(path))


def _leave_out(left_out: LeftOut, reason: str, name: str, real: Path) -> None:
    """Count what is left out for a reason, each real path once."""
    left_out.setdefault(reason, {}).setdefault(real, name)


def _sorted_names(left_out: LeftOut) -> dict[str, tuple[str, ...]]:
    return {reason: tuple(sorted(names.values())) for reason, names in left_out.items()}


def _why_left_out(path: Path, suffixes: tuple[str, ...] | None) -> str:
    """Say why a file of a folder is not taken; empty if it is taken."""
    if reason := _why_name_left_out(path.name, suffixes):
        return reason
    if not path.exists():
        return "links that lead nowhere"
    return "" if path.is_file() else "neither files nor folders"


def _why_name_left_out(path: str, suffixes: tuple[str, ...] | None) -> str:
    """Say why a file of a folder is not taken, by its path inside of the folder; empty if the path is no reason."""
    if any(part.startswith(".") for part in PurePosixPath(path).parts):
        return "hidden"
    if suffixes is None:
        return ""
    name = PurePosixPath(path).name.lower()
    for packed in PACKED_SUFFIXES:
        name = name.removesuffix(packed)
    if name in DATA_SET_RECORDS:
        return "about a data set"
    if not name.endswith(suffixes):
        return f"without an ending of this source ({', '.join(suffixes)})"
    return ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")


def _nothing_found(pattern: str, suffixes: tuple[str, ...], field: str) -> str:
    path = expand_user(pattern)
    if os.path.isdir(path):
        return f"{field} ({pattern!r}): the folder holds no file with one of the endings {', '.join(suffixes)}"
    if variable := unreplaced_variable(path):
        return f"{field} ({pattern!r}): {variable}"
    if has_wildcard(path):
        return f"{field} ({pattern!r}): the pattern matches no file"
    return f"{field} ({pattern!r}): no such file or folder"
