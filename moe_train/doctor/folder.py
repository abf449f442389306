"""Whether a folder is seen and writable by all ranks, and is one and the same folder."""

import contextlib
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from moe_train.doctor.board import Board
from moe_train.doctor.finding import Finding, name_ranks

_CACHE_SECONDS = 3.0  # network file systems show a new file or folder of another host after a while
WAIT_SECONDS = 3 * _CACHE_SECONDS  # at most, for all that they show late
_PAUSE_SECONDS = 0.1  # between two looks
_LEAST_FREE_BYTES = 2**30


def check_folder(folder: Path, board: Board, seconds: float) -> tuple[list[Finding], list[Finding], dict[str, Any]]:
    """Every rank writes a file; rank 0 reads all of them and each rank reads rank 0's. Nothing of it stays.

    Args:
        folder: As this rank names it. Rank 0 makes it if it is not there, and then removes it again.
        board: Of all ranks.
        seconds: To wait for the slowest rank.

    Returns:
        Problems, warnings and what is known of the folder; the same on all ranks.

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
                deadline = time.monotonic() + _CACHE_SECONDS  # one for all of them
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
    """What follows from the ranks' attempts.

    Args:
        path: As rank 0 names it.
        given: For each rank: why it could not write ("": it could), whether it read rank 0's file, free bytes.
        unseen: Ranks that wrote a file which rank 0 does not see.
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
    """Make a folder. The parts of it that were not there, the innermost first, and why it could not be made; ""."""
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
    """Why it could not be written; "" if it was. A folder that is not there yet is waited for."""
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
    """0 where it cannot be told: then it could not be written either."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _reads(file: Path, text: str, deadline: float) -> bool:
    while True:
        with contextlib.suppress(OSError):
            list(file.parent.iterdir())  # makes a network file system ask again
            if file.read_text(encoding="utf-8") == text:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
