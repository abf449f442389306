"""Disks that fail while a run saves: full, read-only, or with the folder gone. What was saved before stays."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.checkpoint.files import verify_files
from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import read_manifest
from moe_train.launch.fork_server import wait_for_all
from tests.train.runs import SMALL, losses, start_forked, train_forked

# A checkpoint has 0.67 MB.
BASE = (*SMALL, "--train.sample_tokens=0", "--data.validation_fraction=0", "--telemetry.tensorboard=false")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def whole_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints, all of which are whole."""
    manifests = [read_manifest(folder) for folder in list_checkpoints(run_dir / "checkpoints")]
    for manifest in manifests:
        verify_files(manifest, manifest.files)
    return [manifest.step for manifest in manifests]


@pytest.mark.slow
def test_a_full_disk_is_told_of_and_the_run_goes_on(small_disk: Path, tmp_path: Path) -> None:
    options = [*BASE, "--train.steps=14", "--checkpoint.every=4", "--checkpoint.keep_last=5"]
    run_dir, whole = small_disk / "run", tmp_path / "whole"
    result = train_forked(2, *options, f"--train.run_dir={run_dir}")
    assert result.returncode == 1, result  # the last one has to succeed
    assert "warning: step 12 could not be saved: rank " in result.stdout and "No space left" in result.stdout
    assert "step 14 could not be saved" in result.stderr and "the same command goes on" in result.stderr
    assert whole_steps(run_dir) == [4, 8] and not list((run_dir / "checkpoints").glob("*.part"))
    shutil.rmtree(run_dir / "checkpoints" / "step_00000004")  # somebody makes room
    result = train_forked(2, *options[:-1], "--checkpoint.keep_last=1", f"--train.run_dir={run_dir}")
    assert result.returncode == 0 and "step_00000008: 8 steps done" in result.stdout, result
    assert train_forked(2, *options, f"--train.run_dir={whole}").returncode == 0
    assert losses(run_dir) == losses(whole)


def test_by_policy_a_full_disk_stops_the_run(small_disk: Path) -> None:
    options = [*BASE, "--train.steps=40", "--checkpoint.every=4", "--checkpoint.keep_last=5"]
    result = train_forked(2, *options, "--checkpoint.on_error=stop", f"--train.run_dir={small_disk}")
    assert result.returncode == 1 and "step 12 could not be saved" in result.stderr, result
    assert "checkpoint.on_error is stop" in result.stderr and whole_steps(small_disk) == [4, 8]
    assert max(losses(small_disk)) < 40


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_disk_that_becomes_read_only(small_disk: Path, policy: str) -> None:
    options = [*BASE, "--train.steps=60", "--checkpoint.every=10", f"--checkpoint.on_error={policy}"]
    ranks = start_forked(2, *options, f"--train.run_dir={small_disk}", "--train.log_every=50")
    deadline = time.monotonic() + 60
    while not list_checkpoints(small_disk / "checkpoints"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # A read-only mount above: the logs, which are open, can still be written; what is opened anew cannot.
    subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", small_disk], check=True)
        results = wait_for_all(ranks, 90)
    finally:
        subprocess.run(["umount", "--lazy", small_disk], check=True)
    assert [result.returncode for result in results] == [1, 1], results
    if policy == "continue":
        assert "the run goes on" in results[0].stdout and "step     60/60" in results[0].stdout
    else:
        assert "checkpoint.on_error is stop" in results[0].stderr and "step     60/60" not in results[0].stdout
    assert whole_steps(small_disk)


def test_a_folder_that_vanishes_is_made_anew(tmp_path: Path) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    options = [*BASE, "--train.steps=60", "--checkpoint.every=10"]
    ranks = start_forked(2, *options, f"--train.run_dir={run_dir}")
    deadline = time.monotonic() + 60
    while not list_checkpoints(run_dir / "checkpoints"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run_dir.rename(moved)
    results = wait_for_all(ranks, 60)
    assert [result.returncode for result in results] == [0, 0], results
    assert whole_steps(moved) and whole_steps(run_dir)[-1] == 60
    assert max(losses(run_dir)) == 60
