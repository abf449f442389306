"""Every changed byte, cut and missing file of a checkpoint is found."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.checkpoint.inventory import check_latest
from moe_train.checkpoint.manifest import DamagedCheckpoint, read_manifest
from moe_train.checkpoint.resume_point import latest_valid
from moe_train.checkpoint.verification import read_verified, verify_checkpoint, verify_surroundings
from moe_train.config.errors import UsageError
from tests.checkpoint.made import make_checkpoint

FILES = ("manifest.json", "rank_00000.safetensors", "rank_00001.safetensors")


def damaged_files(folder: Path) -> list[str]:
    found = verify_checkpoint(folder)
    assert found.is_whole == all(verdict.problem is None for verdict in found.verdicts)
    return [Path(verdict.path).name for verdict in found.verdicts if verdict.problem is not None]


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    folder, read = make_checkpoint(tmp_path), []
    found = verify_checkpoint(folder, read.append)
    assert [Path(verdict.path).name for verdict in found.verdicts] == list(FILES)
    assert found.is_whole
    assert sum(read) == sum((folder / file).stat().st_size for file in FILES[1:])
    assert verify_surroundings(tmp_path).is_whole


@pytest.mark.parametrize("file", FILES)
def test_any_changed_byte_is_found(tmp_path: Path, file: str) -> None:
    folder = make_checkpoint(tmp_path)
    path = folder / file
    sound = path.read_bytes()
    # 1 and 2 make digits of digits, 7 a carriage return of a newline, 32 a capital of a letter, 128 no UTF-8.
    for flip in (1, 2, 7, 32, 128, 255) if file == "manifest.json" else (1,):
        for place in range(len(sound)):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ flip]) + sound[place + 1 :])
            assert damaged_files(folder) == [file], (place, flip)
    path.write_bytes(sound)
    assert damaged_files(folder) == []


@pytest.mark.parametrize("file", FILES)
def test_any_cut_and_any_addition_are_found(tmp_path: Path, file: str) -> None:
    folder = make_checkpoint(tmp_path)
    path = folder / file
    sound = path.read_bytes()
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        assert damaged_files(folder) == [file], length
    for more in (b"\0", b" ", b"\n"):
        path.write_bytes(sound + more)
        assert damaged_files(folder) == [file], more


def test_any_change_of_latest_is_found(tmp_path: Path) -> None:
    for step in (8, 9, 10):
        make_checkpoint(tmp_path, step)
    path = tmp_path / "latest"
    sound = path.read_bytes()
    assert sound == b"step_00000010\n" and check_latest(tmp_path) is None
    changed = [
        sound[:place] + bytes([value]) + sound[place + 1 :]
        for place in range(len(sound))
        for value in range(256)
        if value != sound[place]
    ]
    changed += [sound[:length] for length in range(len(sound))] + [sound + b"\n", b"\n" + sound, bytes(10**6)]
    for content in changed:
        path.write_bytes(content)
        assert latest_is_damaged(tmp_path), content
    path.unlink()
    assert latest_is_damaged(tmp_path)


def latest_is_damaged(checkpoints: Path) -> bool:
    from moe_train.checkpoint.inventory import _latest_problem  # check_latest asks again a moment later

    return _latest_problem(checkpoints) is not None


@pytest.mark.parametrize("file", FILES)
def test_any_missing_file_is_found(tmp_path: Path, file: str) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / file).unlink()
    assert damaged_files(folder) == [file]


@pytest.mark.parametrize(
    "add",
    [
        lambda folder: (folder / "rank_00002.safetensors").write_bytes(b""),
        lambda folder: (folder / "notes.txt").symlink_to(folder / "manifest.json"),
        lambda folder: (folder / "more").mkdir(),
    ],
)
def test_strays_are_found(tmp_path: Path, add: Callable[[Path], object]) -> None:
    folder = make_checkpoint(tmp_path)
    add(folder)
    assert len(damaged_files(folder)) == 1
    add(tmp_path)
    assert [verdict.problem is None for verdict in verify_surroundings(tmp_path).verdicts] == [True, False]


def test_a_checkpoint_under_the_name_of_another_step_is_found(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    folder.rename(tmp_path / "step_00000007")
    assert damaged_files(tmp_path / "step_00000007") == ["manifest.json"]


def test_exchanged_files_are_found(tmp_path: Path) -> None:
    folder, other = make_checkpoint(tmp_path), make_checkpoint(tmp_path / "other", step=2)
    shutil.copy(other / FILES[0], folder / FILES[0])
    assert damaged_files(folder) == [FILES[0]]


def test_the_latest_valid_one(tmp_path: Path) -> None:
    folders = [make_checkpoint(tmp_path, step) for step in (1, 2, 3)]
    (folders[2] / FILES[1]).unlink()
    (folders[1] / FILES[0]).write_bytes(b"{}")
    found = latest_valid(tmp_path, read_verified)
    assert found.manifest is not None and found.manifest.folder == folders[0]
    assert [damage.folder for damage in found.damaged] == [folders[2], folders[1]]
    (folders[0] / FILES[2]).write_bytes(b"")
    assert latest_valid(tmp_path, read_verified).manifest is None


def test_one_that_vanishes_while_it_is_read_is_not_called_damaged(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    found = verify_checkpoint(folder, lambda _: shutil.rmtree(folder, ignore_errors=True))
    assert found.has_vanished and found.is_whole


def test_another_format_version_is_no_damage(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, format_version=4)
    with pytest.raises(UsageError, match="format version 4") as refused:
        verify_checkpoint(folder)
    assert not isinstance(refused.value, DamagedCheckpoint)
    with pytest.raises(UsageError):
        read_manifest(folder)
