"""What checkpoint.resume may name, and the batch that a run takes from its checkpoint, without training."""

from pathlib import Path

import pytest

from moe_train.checkpoint.folders import point_latest
from moe_train.checkpoint.resume_point import find_resume_point
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.train.preparation import _with_saved_batch
from moe_train.train.resume import saved_global_batch
from tests.checkpoint.made import CONFIG, make_checkpoint


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with checkpoints of steps 1 and 2, whose global batch has 12 sequences."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a run"
    config = CONFIG | {"train": CONFIG["train"] | {"global_batch_size": 12}}
    for step in (1, 2):
        point_latest(make_checkpoint(folder / "checkpoints", step=step, config=config))
    return folder


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("a run", 2),
        ("a run/", 2),
        ("./a run/checkpoints", 2),
        ("a run/checkpoints/", 2),
        ("a run/checkpoints/latest", 2),
        ("a run/checkpoints/step_00000001", 1),
        ("a run/checkpoints/step_00000002/", 2),
        ("{run_dir}", 2),
        ("~/a run/checkpoints/latest", 2),
        ("link", 2),
        ("link to checkpoints", 2),
    ],
)
def test_resume_takes_what_run_takes(run_dir: Path, tmp_path: Path, name: str, step: int) -> None:
    (tmp_path / "link").symlink_to(run_dir)
    (tmp_path / "link to checkpoints").symlink_to(run_dir / "checkpoints")
    name = load_config(
        ["--train.run_dir=x", f"--checkpoint.resume={name.format(run_dir=run_dir)}"], program="x"
    ).checkpoint.resume
    point = find_resume_point(name, tmp_path / "new" / "checkpoints", 0, 1)
    assert point.manifest is not None and point.manifest.step == step
    saved = saved_global_batch(name, tmp_path / "new" / "checkpoints")
    assert saved is not None and saved[0] == 12 and saved[1].samefile(point.manifest.folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "is not a folder"),
        ("a run/checkpoints/step_00000009", "is not a folder"),
        ("empty", "has no checkpoints"),
        ("empty/latest", "names no checkpoint that is there"),
        ("s3://bucket/run", "is remote"),
        ("$RUN/checkpoints", "$RUN is not replaced"),
    ],
)
def test_what_resume_cannot_take_is_named(run_dir: Path, tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "latest").write_text("step_00000009\n")
    if name == "empty":
        (tmp_path / "empty" / "latest").unlink()
    with pytest.raises(UsageError) as caught:
        find_resume_point(name, tmp_path / "new" / "checkpoints", 0, 1)
    assert str(caught.value).startswith(f"checkpoint.resume ({name!r}) ") or f"({name!r}): " in str(caught.value)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("world_size", "micro", "expected"),
    [(1, None, "auto"), (2, None, "auto"), (12, None, "auto"), (3, 2, 2), (2, 3, 3), (6, "auto", "auto")],
)
def test_the_micro_batch_is_lowered_where_it_is_not_given(
    run_dir: Path, world_size: int, micro: int | str | None, expected: int | str
) -> None:
    options = [] if micro is None else [f"--train.micro_batch_size={micro}", "--train.global_batch_size=12"]
    if isinstance(micro, int):
        options.pop()
    config = _with_saved_batch(load_config([f"--train.run_dir={run_dir}", *options], program="x"), world_size)
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (12, expected)


@pytest.mark.parametrize(
    ("world_size", "micro", "words"),
    [
        (2, 8, ("(8 x 2 = 16)", "--train.micro_batch_size=6", "--train.global_batch_size=16")),
        (4, 2, ("(2 x 4 = 8)", "--train.micro_batch_size=1", "--train.global_batch_size=16")),
        (5, None, ("the ranks (5)", "take ranks that divide 12", "--train.global_batch_size=15")),
        (24, 1, ("(1 x 24 = 24)", "take ranks that divide 12", "--train.global_batch_size=24")),
    ],
)
def test_a_batch_that_comes_from_the_checkpoint_is_said_to(
    run_dir: Path, world_size: int, micro: int | None, words: tuple[str, ...]
) -> None:
    options = [] if micro is None else [f"--train.micro_batch_size={micro}"]
    config = load_config([f"--train.run_dir={run_dir}", *options], program="x")
    with pytest.raises(UsageError) as caught:
        _with_saved_batch(config, world_size)
    source = f"global batch of 12 sequences, which comes from {run_dir}/checkpoints/step_00000002"
    assert all(word in str(caught.value) for word in (source, *words)), caught.value
