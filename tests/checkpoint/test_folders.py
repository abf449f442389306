"""The checkpoints of a run: completed, kept, removed; what killed saves leave."""

import os
import time
from pathlib import Path

import pytest

from moe_train.checkpoint.folders import (
    Retention,
    begin_checkpoint,
    list_checkpoints,
    list_leftovers,
    quarantine,
    remove_checkpoint,
    remove_leftovers,
    superfluous,
)
from moe_train.checkpoint.tools.pruning import SAVING_SECONDS, prune
from moe_train.checkpoint.verification import verify_checkpoint
from tests.checkpoint.made import made_state, make_checkpoint

LONG_AGO = SAVING_SECONDS + 60


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def make_old(path: Path) -> None:
    """As if written long ago."""
    for one in (path, *path.rglob("*")):
        os.utime(one, (one.stat().st_atime - LONG_AGO, one.stat().st_mtime - LONG_AGO))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, state=made_state(0))
    folder = make_checkpoint(tmp_path, state=made_state(1), world_size=3)
    assert verify_checkpoint(folder).is_whole
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]


@pytest.mark.parametrize(
    ("retention", "removed"),
    [
        (Retention(1), [1, 2, 3, 4, 5]),
        (Retention(2), [1, 2, 3, 4]),
        (Retention(6), []),
        (Retention(9), []),
        (Retention(1, keep_every=2), [1, 3, 5]),
        (Retention(2, keep_every=3), [1, 2, 4]),
    ],
)
def test_retention(tmp_path: Path, retention: Retention, removed: list[int]) -> None:
    for step in range(1, 7):
        (tmp_path / f"step_{step:08d}").mkdir()
    assert names(superfluous(tmp_path, retention)) == [f"step_{step:08d}" for step in removed]


def test_only_complete_checkpoints_are_listed_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (100_000_000, 2, 30):
        make_checkpoint(tmp_path, step)
    begin_checkpoint(tmp_path, 5)
    aside = [quarantine(make_checkpoint(tmp_path, 40)) for _ in range(2)]
    (tmp_path / "step_00000007").write_bytes(b"a file")
    assert names(aside) == ["step_00000040.damaged", "step_00000040.damaged2"]
    assert names(list_checkpoints(tmp_path)) == ["step_00000002", "step_00000030", "step_100000000"]
    assert names(list_leftovers(tmp_path)) == ["step_00000005.part"]
    assert list_checkpoints(tmp_path / "nowhere") == list_leftovers(tmp_path / "nowhere") == []


def test_leftovers_go_and_an_old_copy_without_a_new_one_comes_back(tmp_path: Path) -> None:
    for step in (1, 2):
        make_checkpoint(tmp_path, step).rename(tmp_path / f"step_{step:08d}.old")
    make_checkpoint(tmp_path, 2)
    begin_checkpoint(tmp_path, 1)
    spared = begin_checkpoint(tmp_path, 3)
    (tmp_path / "step_00000009.removed").mkdir()
    remove_leftovers(tmp_path, spare=[spared])
    assert names(list_checkpoints(tmp_path)) == ["step_00000001", "step_00000002"]
    assert list_leftovers(tmp_path) == [spared]
    remove_checkpoint(tmp_path / "step_00000001")
    assert names(list_checkpoints(tmp_path)) == ["step_00000002"]


def test_pruning_says_what_it_does(tmp_path: Path) -> None:
    folders = [make_checkpoint(tmp_path, step) for step in (1, 2, 3, 4)]
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in folders]
    old, fresh = begin_checkpoint(tmp_path, 5), begin_checkpoint(tmp_path, 6)
    (old / "rank_00000.safetensors").write_bytes(bytes(1000))
    (fresh / "rank_00000.safetensors").write_bytes(bytes(1000))
    make_old(old)
    before = sorted(os.listdir(tmp_path))
    dry = prune(tmp_path, Retention(1, keep_every=2), is_dry=True)
    assert sorted(os.listdir(tmp_path)) == before
    done = prune(tmp_path, Retention(1, keep_every=2), is_dry=False)
    assert done == dry
    assert done.removed == ["step_00000001", "step_00000003"] and done.kept == ["step_00000002", "step_00000004"]
    assert done.leftovers == [old.name] and done.spared == [fresh.name]
    assert done.freed_bytes == sizes[0] + sizes[2] + 1000
    assert done.latest_valid == "step_00000004" and not done.damaged
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000002", "step_00000004", fresh.name]


def test_pruning_keeps_the_latest_valid_one(tmp_path: Path) -> None:
    folders = [make_checkpoint(tmp_path, step) for step in (1, 2, 3, 4)]
    for folder in folders[2:]:
        (folder / "rank_00001.safetensors").write_bytes(b"damaged")
    done = prune(tmp_path, Retention(1), is_dry=False)
    assert done.latest_valid == "step_00000002" and list(done.damaged) == ["step_00000004", "step_00000003"]
    assert names(list_checkpoints(tmp_path)) == ["step_00000002", "step_00000004"]
    (folders[1] / "manifest.json").unlink()
    done = prune(tmp_path, Retention(1), is_dry=False)
    assert done.latest_valid is None and done.removed == []
    assert names(list_checkpoints(tmp_path)) == ["step_00000002", "step_00000004"]


def test_pruning_passes_over_a_checkpoint_of_a_newer_format(tmp_path: Path) -> None:
    for step in (1, 2):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 3, format_version=9)
    found = prune(tmp_path, Retention(1, 0), is_dry=False)
    assert found.latest_valid == "step_00000002" and found.removed == ["step_00000001"]
    assert "9" in found.damaged["step_00000003"]


def test_pruning_gives_an_old_copy_its_name_back(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    folder.rename(tmp_path / "step_00000001.old")
    make_old(tmp_path / "step_00000001.old")
    # Just renamed: perhaps by a save that is under way.
    assert prune(tmp_path, Retention(1), is_dry=False).spared == ["step_00000001.old"]
    done = prune(tmp_path, Retention(1), is_dry=False, now=time.time() + LONG_AGO)
    assert done.restored == ["step_00000001.old"] and done.freed_bytes == 0
    assert list_checkpoints(tmp_path) == [folder]
