"""The shared folder: what is said where it cannot be had, and how long a rank waits for it."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from moe_train.doctor import folder as module
from moe_train.doctor.board import Board
from moe_train.doctor.folder import check_folder

NOBODY = 65534


@contextlib.contextmanager
def closed(folder: Path) -> Iterator[None]:
    """Nobody may look into the folder; not even root, which is somebody else for as long."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0)
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


def test_folder_above_that_may_not_be_looked_into(tmp_path: Path) -> None:
    board = Board(dist.HashStore(), 0, 1)
    with closed(tmp_path):
        problems, warnings, about = check_folder(tmp_path / "runs" / "a", board, 5.0)
    assert [found.message for found in problems] == [f"{tmp_path}/runs/a: cannot be written: Permission denied"]
    assert (warnings, about["free_bytes"]) == ([], 0)


def test_folder_that_shows_late_is_waited_for(tmp_path: Path) -> None:
    thread = threading.Timer(0.4, (tmp_path / "new").mkdir)  # as a network file system shows what another host made
    thread.start()
    assert module._write(tmp_path / "new" / "file", "text", time.monotonic() + 3.0) == ""
    thread.join()
    assert (tmp_path / "new" / "file").read_text() == "text"


def test_folder_that_never_shows_is_told(tmp_path: Path) -> None:
    began = time.monotonic()
    assert module._write(tmp_path / "none" / "file", "", began + 0.3) == "No such file or directory"
    assert time.monotonic() - began < 1.0
