"""Checkpoints: saved in one layout, loaded in others; damaged and hostile ones refused."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from moe_train.checkpoint.files import file_digest
from moe_train.checkpoint.folders import Retention, list_checkpoints, remove_checkpoint, superfluous
from moe_train.checkpoint.manifest import DamagedCheckpoint, encode_manifest, read_manifest
from moe_train.checkpoint.resume_point import latest_valid_of_run
from moe_train.config.errors import UsageError
from moe_train.train.parity import LAYOUTS, OPTIONS
from tests.train.conftest import ParityRuns
from tests.train.runs import losses, records, train_forked, train_under_torchrun

MORE_STEPS = 24


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one process that never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    layout = LAYOUTS[0].options()
    result = train_forked(1, *OPTIONS, *layout, f"--train.run_dir={folder}", f"--train.steps={MORE_STEPS}")
    assert result.returncode == 0, result
    return losses(folder)


# From 4 to 1 is a restart on half of the ranks with the same micro-batch, and so with twice the accumulation.
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 0), (1, 3), (3, 4), (0, 2), (4, 1)])
def test_a_run_goes_on_in_another_layout(
    parity_runs: ParityRuns, uninterrupted: dict[int, float], tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    folder, layout = tmp_path / "run", LAYOUTS[loaded_by]
    shutil.copytree(parity_runs.folders[saved_by], folder)
    arguments = (*OPTIONS, *layout.options(), f"--train.run_dir={folder}", f"--train.steps={MORE_STEPS}")
    train = train_under_torchrun if loaded_by == 2 else train_forked  # one of them as a user would start it
    result = train(layout.world_size, *arguments)
    assert result.returncode == 0, result
    continued = losses(folder)
    assert sorted(continued) == list(range(1, MORE_STEPS + 1))
    for step in range(21, MORE_STEPS + 1):
        # The first 20 steps were taken in another layout, and differ by rounding.
        assert continued[step] == pytest.approx(uninterrupted[step], rel=1e-4), step


def test_a_restart_on_half_the_ranks_is_among_them() -> None:
    whole, half = LAYOUTS[4], LAYOUTS[1]
    assert half.world_size * 2 == whole.world_size and half.accumulation == 2 * whole.accumulation
    micro_batch = [option for option in whole.options() if "micro_batch_size" in option]
    assert micro_batch and set(micro_batch) < set(half.options())


def test_every_element_is_saved_once_by_every_layout(parity_runs: ParityRuns) -> None:
    for folder in parity_runs.folders:
        (checkpoint,) = list_checkpoints(folder / "checkpoints")
        manifest = read_manifest(checkpoint)  # refuses gaps and overlaps
        assert manifest.step == 20 and manifest.consumed_sequences == 320
        assert manifest.shapes["blocks.1.feed_forward.experts.gate_up"] == (8, 64, 256)
        assert (folder / "checkpoints" / "latest").read_text() == f"{checkpoint.name}\n"


@pytest.fixture
def copied(parity_runs: ParityRuns, tmp_path: Path) -> Path:
    """A run folder to damage."""
    shutil.copytree(parity_runs.folders[0], tmp_path / "run")
    return tmp_path / "run"


def resume(folder: Path, *more: str) -> tuple[int, str]:
    arguments = (*OPTIONS, *LAYOUTS[0].options(), f"--train.run_dir={folder}", "--train.steps=21", *more)
    result = train_forked(1, *arguments)
    return result.returncode, result.stderr


def test_a_flipped_bit_is_found(copied: Path) -> None:
    (checkpoint,) = list_checkpoints(copied / "checkpoints")
    file = checkpoint / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, message = resume(copied)
    assert code == 2 and str(file) in message and "damaged" in message


def test_another_model_is_refused_by_name(copied: Path) -> None:
    code, message = resume(copied, "--model.hidden_size=32")
    assert code == 2 and "model.hidden_size (32) differs" in message and "(64)" in message
    code, message = resume(copied, "--model.qk_norm=head")
    assert code == 2 and "model.qk_norm (head) differs" in message and "(none)" in message


def test_another_global_batch_takes_the_next_sequences(copied: Path) -> None:
    code, message = resume(copied, "--train.global_batch_size=32")
    assert code == 0, message
    assert records(copied)[-1]["train/tokens"] == (20 * 16 + 32) * 64


def test_never_does_not_write_over_a_run(copied: Path) -> None:
    code, message = resume(copied, "--checkpoint.resume=never")
    assert code == 2 and "checkpoint.resume" in message and "step_00000020" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["files"].update({"../../x.safetensors": {"blake2b": "", "ranges": {}}}), "not the name"),
        (lambda m: m.update(format_version=99), "99"),
        (lambda m: m["tensors"].update({"embedding.weight": [257, 65]}), "embedding.weight has"),
        (
            lambda m: m["files"]["rank_00000.safetensors"]["ranges"].update({"embedding.weight": [5, 257 * 64]}),
            "missing",
        ),
        (lambda m: m.pop("files"), "KeyError"),
        (lambda m: m.pop("buffers"), "KeyError"),
        *(
            (lambda m, value=value: m.update(buffers={"b": value}), "buffer b is not a list of finite numbers")
            for value in (["1"], [True], [[1.0]], "123", {"0": 1.0}, None)
        ),
        (lambda m: m.update(buffers={"b": [10**400]}), "OverflowError"),
        (lambda m: m.update(loss_scale=10**400), "OverflowError"),
        (lambda m: m.update(step=-1), "step"),
        (lambda m: m.update(step=True), "step"),
        (lambda m: m.update(loss_scale="1"), "loss_scale"),
        (lambda m: m.update(config=[]), "config"),
        (lambda m: m["tensors"].update({"embedding.weight": [-257, -64]}), "embedding.weight"),
        (lambda m: m["tensors"].update({"embedding.weight": [1 << 40, 1 << 40]}), "too many elements"),
        (lambda m: m.update(tensors=[1, 2]), "AttributeError"),
        (lambda m: m["files"]["rank_00000.safetensors"].update(ranges={"nobody": [0, 1]}), "nobody"),
    ],
)
def test_a_wrong_manifest_is_a_usage_error(copied: Path, change, words: str) -> None:
    (checkpoint,) = list_checkpoints(copied / "checkpoints")
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    change(manifest)
    path.write_text(encode_manifest(manifest))  # with the digest of what it holds now
    with pytest.raises(UsageError, match=words):
        read_manifest(checkpoint)


def test_a_manifest_that_is_no_json_is_a_usage_error(copied: Path) -> None:
    (checkpoint,) = list_checkpoints(copied / "checkpoints")
    (checkpoint / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(UsageError, match=r"manifest\.json"):
        read_manifest(checkpoint)


def test_incomplete_checkpoints_are_not_listed_and_old_ones_are_pruned(tmp_path: Path) -> None:
    for step in (1, 5, 10, 15):
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / "step_00000020.part").mkdir()
    (tmp_path / "step_00000018.damaged").mkdir()
    steps = [int(folder.name[-8:]) for folder in list_checkpoints(tmp_path)]
    assert steps == [1, 5, 10, 15]
    assert [f.name for f in superfluous(tmp_path, Retention(2, 5))] == ["step_00000001"]
    for folder in superfluous(tmp_path, Retention(2)):
        remove_checkpoint(folder)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000015"]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_an_older_checkpoint_than_the_folder_has_is_refused(copied: Path, parity_runs: ParityRuns) -> None:
    newer = copied / "checkpoints" / "step_00000030"
    shutil.copytree(copied / "checkpoints" / "step_00000020", newer)
    manifest = json.loads((newer / "manifest.json").read_text())
    del manifest["digest"]
    (newer / "manifest.json").write_text(encode_manifest(manifest | {"step": 30, "consumed_sequences": 480}))
    older = parity_runs.folders[0] / "checkpoints" / "step_00000020"
    code, message = resume(copied, f"--checkpoint.resume={older}", "--train.steps=40")
    assert code == 2 and "step_00000030" in message and "train.run_dir" in message


def test_another_tokenizer_is_refused_and_a_refusal_leaves_the_records(copied: Path, tmp_path: Path) -> None:
    before = (copied / "metrics.jsonl").read_bytes()
    code, message = resume(copied, "--data.tokenizer=bpe", "--data.bpe_vocab_size=257")
    assert code == 2 and "data.tokenizer" in message
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_what_changed_since_the_checkpoint_is_said(copied: Path) -> None:
    arguments = (*OPTIONS, *LAYOUTS[0].options(), f"--train.run_dir={copied}", "--train.steps=21")
    result = train_forked(1, *arguments, "--optim.learning_rate=1e-4")
    assert result.returncode == 0, result
    assert "changed since: optim.learning_rate: 0.003 -> 0.0001" in result.stdout


def damage_a_tensor_file(checkpoint: Path) -> None:
    file = checkpoint / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 64
    file.write_bytes(content)


def truncate_the_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_a_tensor_file, "digest differs"),
        (truncate_the_manifest, "not a manifest"),
        (lambda checkpoint: (checkpoint / "rank_00000.safetensors").unlink(), "cannot be read"),
        (lambda checkpoint: (checkpoint / "manifest.json").unlink(), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(copied: Path, damage, words: str) -> None:
    whole = copied / "checkpoints" / "step_00000020"
    newer = copied / "checkpoints" / "step_00000030"
    shutil.copytree(whole, newer)
    manifest = json.loads((newer / "manifest.json").read_text())
    del manifest["digest"]
    (newer / "manifest.json").write_text(encode_manifest(manifest | {"step": 30, "consumed_sequences": 480}))
    damage(newer)
    arguments = (*OPTIONS, *LAYOUTS[0].options(), f"--train.run_dir={copied}", "--train.steps=21")
    result = train_forked(1, *arguments)
    assert result.returncode == 0, result
    assert f"warning: passed over: {newer}" in result.stdout and words in result.stdout
    assert "step_00000020: 20 steps done, 1 to do" in result.stdout
    kept = sorted(folder.name for folder in (copied / "checkpoints").iterdir())
    assert kept == ["latest", "step_00000020", "step_00000021", "step_00000030.damaged"]
    assert records(copied)[-1]["step"] == 21


def test_the_batch_of_the_checkpoint_is_kept_on_other_ranks(copied: Path) -> None:
    """Without train.global_batch_size it would be micro-batch x ranks."""
    arguments = [option for option in LAYOUTS[0].options() if "global_batch" not in option and "micro" not in option]
    result = train_forked(
        2, *OPTIONS, *arguments, "--train.micro_batch_size=2", f"--train.run_dir={copied}", "--train.steps=22"
    )
    assert result.returncode == 0, result
    assert records(copied)[-1]["train/tokens"] == 22 * 16 * 64


def test_old_formats_are_read(copied: Path) -> None:
    """Format 2 had blake2b digests, and neither sizes nor a digest of its own; 1 no buffers either."""
    (checkpoint,) = list_checkpoints(copied / "checkpoints")
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("digest", "guard", "layout"):
        del manifest[name]
    for file, entry in manifest["files"].items():
        digest = file_digest(checkpoint / file, "blake2b")
        manifest["files"][file] = {"blake2b": digest, "ranges": entry["ranges"]}
    path.write_text(json.dumps(manifest | {"format_version": 2}, indent=1))
    code, message = resume(copied)
    assert code == 0, message
    del manifest["buffers"]
    path.write_text(json.dumps(manifest | {"format_version": 1}, indent=1))
    assert read_manifest(checkpoint).buffers == {}


def test_a_checkpoint_by_its_path_begins_a_run_that_goes_on_by_itself(copied: Path, tmp_path: Path) -> None:
    origin, run_dir = copied / "checkpoints" / "step_00000020", tmp_path / "other"
    arguments = (*OPTIONS, *LAYOUTS[0].options(), f"--train.run_dir={run_dir}", f"--checkpoint.resume={origin}")
    result = train_forked(1, *arguments, "--train.steps=21")
    assert result.returncode == 0 and f"going on from {origin}" in result.stdout, result
    again = train_forked(1, *arguments, "--train.steps=22")  # the same command: its own checkpoint is newer
    assert again.returncode == 0 and f"going on from {run_dir / 'checkpoints' / 'step_00000021'}" in again.stdout, again
    # A folder of another run is not mixed with it.
    code, message = resume(run_dir, f"--checkpoint.resume={copied / 'checkpoints' / 'step_00000020'}/.")
    assert code == 2 and "already has step_00000022" in message


def test_a_folder_of_another_step_is_damaged(copied: Path) -> None:
    whole = copied / "checkpoints" / "step_00000020"
    shutil.copytree(whole, copied / "checkpoints" / "step_00000040")
    found = latest_valid_of_run(copied / "checkpoints", 0, 1)
    assert found.manifest is not None and found.manifest.folder == whole
    assert "holds the checkpoint of step 20" in found.damaged[0].reason


def test_what_cannot_be_read_now_is_not_damaged(copied: Path, monkeypatch) -> None:
    def too_many_files(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", too_many_files)
    with pytest.raises(UsageError, match="cannot be read now") as raised:
        latest_valid_of_run(copied / "checkpoints", 0, 1)
    assert not isinstance(raised.value, DamagedCheckpoint)


def test_fields_left_out_are_what_they_come_to(copied: Path) -> None:
    code, message = resume(copied, "--model.head_dim=16")  # 64 / 4 heads
    assert code == 0, message
    code, message = resume(copied, "--model.num_kv_heads=4")
    assert code == 2 and "model.num_kv_heads (4) differs" in message and "(2)" in message
