"""Check of the shared folder: whether all ranks can write to it, and whether it is one and the same folder."""

import contextlib
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from moe_train.doctor.board import Board
from moe_train.doctor.finding import Finding, name_ranks

_CACHE_SECONDS = 3.0  # a network file system shows another host's new file or folder after a delay
WAIT_SECONDS = 3 * _CACHE_SECONDS  # longest wait for all such delays of one check
_PAUSE_SECONDS = 0.1  # between two polls
_LEAST_FREE_BYTES = 2**30


def check_folder(folder: Path, board: Board, seconds: float) -> tuple[list[Finding], list[Finding], dict[str, Any]]:
    """Let every rank write a file, rank 0 read all files, and each rank read rank 0's file. All files are removed.

    Args:
        folder: Path of the folder on this rank. If it does not exist, rank 0 creates it and removes it again.
        board: Board of all ranks.
        seconds: Time to wait for the slowest rank.

    Returns:
        Problems, warnings, and path and free bytes of the folder; the same on all ranks.

    Collective: All ranks.
    """
    missing, failure = _make(folder) if board.rank == 0 else ([], "")
    try:
        word = board.meet("folder/word", failure, lambda given: [given[0], uuid.uuid4().hex], seconds)
        failure, nonce = word
        own = folder / f".moe_train_doctor_{nonce}_{board.rank}"
        failure = failure or _write(own, nonce, time.monotonic() + _CACHE_SECONDS)
        try:
            board.meet("folder/written", None, lambda given: None, seconds + _CACHE_SECONDS)
            seen = _reads(folder / f".moe_train_doctor_{nonce}_0", nonce, time.monotonic() + _CACHE_SECONDS)
            free = _free_bytes(folder)

            def judge(given: list[list[Any]]) -> list[Any]:
                files = [folder / f".moe_train_doctor_{nonce}_{rank}" for rank in range(board.world_size)]
                deadline = time.monotonic() + _CACHE_SECONDS  # one deadline for all files
                unseen = [r for r, file in enumerate(files) if not given[r][0] and not _reads(file, nonce, deadline)]
                problems, warnings = judge_folder(str(folder), given, unseen)
                about = {"path": str(folder), "free_bytes": min(values[2] for values in given)}
                return [[p.as_dict() for p in problems], [w.as_dict() for w in warnings], about]

            verdict = board.meet("folder/read", [failure, seen, free], judge, seconds + 2 * _CACHE_SECONDS)
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
        board.meet("folder/removed", None, lambda given: None, seconds)
        return [Finding(**p) for p in verdict[0]], [Finding(**w) for w in verdict[1]], verdict[2]
    finally:
        for part in missing:  # the innermost first
            with contextlib.suppress(OSError):
                part.rmdir()


def judge_folder(path: str, given: list[list[Any]], unseen: list[int]) -> tuple[list[Finding], list[Finding]]:
    """Judge what the ranks found.

    Args:
        path: Path of the folder on rank 0.
        given: For each rank: why it could not write ("" if it could), whether it read rank 0's file, and free bytes.
        unseen: Ranks that wrote a file which rank 0 does not see.

    Returns:
        Problems and warnings.
    """
    problems, warnings = [], []
    failures = {rank: values[0] for rank, values in enumerate(given) if values[0]}
    remedy = "give train.run_dir (or --shared-dir) a folder that is mounted, writable, on all hosts"
    for reason in dict.fromkeys(failures.values()):
        where = name_ranks([rank for rank, text in failures.items() if text == reason])
        problems.append(Finding("folder", where, f"{path}: cannot be written: {reason}", remedy))
    apart = [rank for rank, values in enumerate(given) if rank not in failures and rank > 0]
    apart = [rank for rank in apart if rank in unseen or (0 not in failures and not given[rank][1])]
    if apart:
        message = f"{path}: is another folder than rank 0's: files that one has written are not seen by the other"
        problems.append(Finding("folder", name_ranks(apart), message, remedy))
    free = min(values[2] for values in given)
    if not problems and free < _LEAST_FREE_BYTES:
        message = f"{path}: only {free / 2**30:.2f} GiB are free"
        warnings.append(Finding("folder", path, message, "make room: a checkpoint has 12 bytes a parameter and more"))
    return problems, warnings


def _make(folder: Path) -> tuple[list[Path], str]:
    """Create a folder. Return its parts that did not exist, innermost first, and the error ("" if there was none)."""
    missing = list[Path]()
    try:
        for part in (folder, *folder.parents):
            if part.exists():
                break
            missing.append(part)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return missing, error.strerror or str(error)
    return missing, ""


def _write(file: Path, text: str, deadline: float) -> str:
    """Write a file, and wait for its folder if that is not visible yet. Return the error, or "" if there was none."""
    while True:
        try:
            with file.open("x", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or time.monotonic() >= deadline:
                return error.strerror or str(error)
            time.sleep(_PAUSE_SECONDS)
        else:
            return ""


def _free_bytes(folder: Path) -> int:
    """Return the free bytes of a folder; 0 if unknown, as in a folder that cannot be written either."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _reads(file: Path, text: str, deadline: float) -> bool:
    while True:
        with contextlib.suppress(OSError):
            list(file.parent.iterdir())  # makes a network file system look again
            if file.read_text(encoding="utf-8") == text:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
