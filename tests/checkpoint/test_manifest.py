"""Manifests: written by anyone, read without trust."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.checkpoint.manifest import MANIFEST, DamagedCheckpoint, encode_manifest, read_manifest
from moe_train.config.errors import UsageError
from tests.checkpoint.made import make_checkpoint

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**62, 2**63, 10**400, 10**4000, 3.0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(["../x", "/etc/passwd", "rank_00000.safetensors", "rank_00001.safetensors", "\ud800", ""]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a sound manifest."""
    raw = json.loads((make_checkpoint(tmp_path_factory.mktemp("sound")) / MANIFEST).read_text())
    del raw["digest"]
    return raw


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key in nested plain values."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [found for key in keys for found in [(value, key), *places(value[key])]]


def read_without_surprise(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
        assert manifest.optimizer and manifest.num_bytes >= 0
    except UsageError:  # DamagedCheckpoint is one
        return False
    return True


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_values_with_a_fitting_digest(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], data: st.DataObject
) -> None:
    changed = copy.deepcopy(values)
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(places(changed)))
        change = data.draw(st.sampled_from(["replace", "remove", "rename"]))
        if change == "replace":
            holder[key] = data.draw(JSON)
        elif change == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[data.draw(st.one_of(st.text(max_size=5), st.sampled_from(list(values))))] = holder.pop(key)
        if not changed:
            break
    folder = tmp_path_factory.getbasetemp()
    (folder / MANIFEST).write_text(encode_manifest(changed), encoding="utf-8")
    read_without_surprise(folder)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / MANIFEST).write_bytes(content)
    assert not read_without_surprise(folder)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "9" * 5000, '{"format_version": 3, "a": NaN}'])
def test_json_that_is_hard_to_read(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(("name", "section"), [("optim", None), ("train", [1]), ("model", "x"), ("checkpoint", 3)])
def test_a_section_of_the_configuration_that_is_none_is_damage(
    tmp_path: Path, values: dict[str, Any], name: str, section: object
) -> None:
    changed = values | {"config": values["config"] | {name: section}}
    (tmp_path / MANIFEST).write_text(encode_manifest(changed))
    with pytest.raises(DamagedCheckpoint, match=rf"config\.{name} \("):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["../rank_00000.safetensors", "/rank_00000.safetensors", "rank_00000.safetensors/.", "latest"]
)
def test_a_file_outside_the_folder_is_refused(tmp_path: Path, values: dict[str, Any], name: str) -> None:
    files = {name: values["files"]["rank_00000.safetensors"]}
    (tmp_path / MANIFEST).write_text(encode_manifest(values | {"files": files}))
    with pytest.raises(DamagedCheckpoint, match="is not the name of a checkpoint file"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "missing", "huge"])
def test_what_is_no_regular_file_of_usual_size_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / MANIFEST
    if kind == "link":
        make_checkpoint(tmp_path)
        path.symlink_to(tmp_path / "step_00000001" / MANIFEST)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)  # holes: it takes no room on the disk
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_other_versions_are_refused_and_a_damaged_number_is_damage(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / MANIFEST
    for version in (0, 4, True, 3.0, "3", None, []):
        path.write_text(encode_manifest(values | {"format_version": version}))
        with pytest.raises(UsageError, match="format version") as refused:
            read_manifest(tmp_path)
        assert not isinstance(refused.value, DamagedCheckpoint)
    sound = encode_manifest(values)
    for digit in "012456789":
        path.write_text(sound.replace('"format_version": 3', f'"format_version": {digit}'))
        with pytest.raises(DamagedCheckpoint):
            read_manifest(tmp_path)


def test_another_kind_of_newline_is_damage(tmp_path: Path, values: dict[str, Any]) -> None:
    sound = encode_manifest(values).encode()
    for newline in (b"\r", b"\r\n"):
        (tmp_path / MANIFEST).write_bytes(sound.replace(b"\n", newline))
        with pytest.raises(DamagedCheckpoint, match="digest"):
            read_manifest(tmp_path)
