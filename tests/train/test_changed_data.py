"""What a resumed run says of data that is not the data of its checkpoint."""

import json
import os
from pathlib import Path

from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from tests.train.runs import SMALL, train_forked


def train(folder: Path, steps: int) -> str:
    """What the run says from step `steps` - 1 to `steps`."""
    data = ("--data.source=jsonl", f"--data.paths={folder / 'data'}", f"--data.cache_dir={folder / 'cache'}")
    result = train_forked(1, *SMALL, *data, f"--train.run_dir={folder / 'run'}", f"--train.steps={steps}")
    assert result.returncode == 0, result
    return result.stdout


def test_changed_data_is_said_on_resume_also_with_the_same_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "data" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": f"row {i} of a few words"}) + "\n" for i in range(100)))
    assert "data changed" not in train(tmp_path, 1)
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    (source,) = read_manifest(checkpoint).data
    assert (source["documents"], list(source["files"])) == (100, ["a.jsonl"])
    assert "data changed" not in train(tmp_path, 2)

    status = path.stat()
    path.write_text(path.read_text().replace("row 50 of", "ROW 50 of"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    said = train(tmp_path, 3)
    assert "data changed since: data.paths" in said
    assert "1 texts removed, 1 added" in said.replace("\n", " ")

    # The checkpoint of the changed data knows it. An old one, which knows nothing of its data, says nothing.
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    manifest = json.loads((newest / MANIFEST).read_text())
    del manifest["digest"], manifest["data"]
    (newest / MANIFEST).write_text(encode_manifest(manifest))
    assert "data changed" not in train(tmp_path, 4)
