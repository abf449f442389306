"""Paths that a user writes: home folders, URLs, variables, and the configuration of a run that was moved."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.config.errors import UsageError
from moe_train.config.load import load_config, read_yaml
from moe_train.config.paths import expand_user, home_folder, is_remote, local_path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~", "{home}"),
        ("~/", "{home}/"),
        ("~/runs/a", "{home}/runs/a"),
        ("~root/x", os.path.expanduser("~root") + "/x"),
        ("file:///data/x", "/data/x"),
        ("file://localhost/data/x", "/data/x"),
        ("FILE://data/x", "data/x"),
        ("file://~/x", "{home}/x"),
        ("a/~/b", "a/~/b"),
        ("./~", "./~"),
        ("runs/a/", "runs/a/"),
        ("bytes", "bytes"),
        ("s3://bucket/~x", "s3://bucket/~x"),
    ],
)
def test_home_folders_and_file_urls_are_written_out(home: Path, text: str, expected: str) -> None:
    assert expand_user(text) == expected.format(home=home)


@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "~nobody-of-this-name"])
def test_an_unknown_user_is_named_and_makes_no_folder(text: str) -> None:
    with pytest.raises(UsageError, match=r"train.run_dir: .*'nobody-of-this-name'.*\./~nobody"):
        load_config([f"--train.run_dir={text}"], program="x")


def test_an_empty_home_is_not_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    assert home_folder() is None
    with pytest.raises(UsageError, match=r"home folder is not known here .'~/x'"):
        local_path("~/x", "--run")


def test_every_path_of_a_configuration_is_written_out(home: Path) -> None:
    names = ("train.run_dir", "checkpoint.resume", "data.cache_dir", "data.tokenizer")
    arguments = [f"--{name}=~/{name}" for name in names]
    config = load_config([*arguments, "--data.source=text", '--data.paths=["~/a", "b"]'], program="x")
    assert config.train.run_dir == f"{home}/train.run_dir" and config.checkpoint.resume == f"{home}/checkpoint.resume"
    assert config.data.cache_dir == f"{home}/data.cache_dir" and config.data.tokenizer == f"{home}/data.tokenizer"
    assert config.data.paths == (f"{home}/a", "b")


@pytest.mark.parametrize(
    ("text", "remote"),
    [
        ("s3://bucket/x", True),
        ("hf://datasets/a/b", True),
        ("memory://x", True),
        ("dir::memory://x", True),
        ("zip://*.txt::s3://bucket/x.zip", True),
        ("/data/x", False),
        ("runs/a:b", False),
        ("C:/x", False),
        ("a::b", False),
    ],
)
def test_urls_are_remote_unless_a_file_has_the_name(tmp_path: Path, text: str, remote: bool) -> None:
    (tmp_path / "a::b").touch()
    assert is_remote(text) == remote


@pytest.mark.parametrize("text", ["s3://bucket/runs", "gs://bucket/runs", "hf://a/b", "memory://runs"])
def test_what_must_be_on_this_host_is_refused_elsewhere(text: str) -> None:
    with pytest.raises(UsageError, match=r"train.run_dir .*is remote: .*mounted"):
        local_path(text, "train.run_dir")


@pytest.mark.parametrize(
    ("text", "variable"), [("$SCRATCH/runs", "$SCRATCH"), ("a/${USER}/b", "${USER}"), ("a/b$X", "$X"), ("$A", "$A")]
)
def test_a_variable_is_named_unless_it_is_a_name(tmp_path: Path, text: str, variable: str) -> None:
    with pytest.raises(UsageError) as caught:
        local_path(text, "train.run_dir")
    assert f"train.run_dir ({text!r}): {variable} is not replaced" in str(caught.value)
    (tmp_path / text).mkdir(parents=True)
    assert local_path(text, "train.run_dir") == Path(text)


def write_run(folder: Path, run_dir: str) -> Path:
    """The files of a run that say where it is: its configuration and a checkpoint."""
    (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"train:\n  run_dir: {run_dir}\n")
    return folder / "config.yaml"


@pytest.mark.parametrize(
    "move",
    [
        lambda tmp_path: (tmp_path / "runs/a").rename(tmp_path / "runs/b"),
        lambda tmp_path: write_run(tmp_path / "runs/b", "runs/a"),  # copied
        lambda tmp_path: (tmp_path / "runs").rename(tmp_path / "old"),
    ],
)
def test_the_configuration_of_a_moved_run_begins_no_other(tmp_path: Path, move: Callable[[Path], object]) -> None:
    write_run(tmp_path / "runs/a", "runs/a")
    assert not load_config(["--config=runs/a/config.yaml"], program="x").moved_run
    move(tmp_path)
    file = next(path for path in tmp_path.glob("*/*/config.yaml") if path.parent != tmp_path / "runs/a")
    moved = load_config([f"--config={file}"], program="x").moved_run
    assert f"--train.run_dir={file.parent}" in moved and "--train.run_dir=runs/a " in moved
    assert not load_config([f"--config={file}", f"--train.run_dir={file.parent}"], program="x").moved_run


def test_another_working_folder_is_another_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run(tmp_path / "runs/a", "runs/a")
    monkeypatch.chdir(file.parent)
    assert load_config(["--config=config.yaml"], program="x").moved_run


def test_a_link_to_the_run_folder_is_the_same_folder(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a", "link")
    (tmp_path / "link").symlink_to(tmp_path / "runs/a")
    assert not load_config(["--config=runs/a/config.yaml"], program="x").moved_run
    (tmp_path / "first.yaml").write_text("train:\n  run_dir: elsewhere\n")  # no run's own file
    assert not load_config(["--config=first.yaml"], program="x").moved_run


def test_of_several_files_the_one_that_names_the_folder_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs/b", "runs/a")
    for text, is_moved in (("train:\n  run_dir: runs/c\n", False), ("train:\n  steps: 5\n", True)):
        (tmp_path / "more.yaml").write_text(text)
        config = load_config([f"--config={run}", "--config=more.yaml"], program="x")
        assert bool(config.moved_run) == is_moved


def test_a_remote_configuration_is_named_as_it_was_written() -> None:
    with pytest.raises(UsageError, match=r"--config \('s3://bucket/a.yaml'\) is remote"):
        read_yaml("s3://bucket/a.yaml")
