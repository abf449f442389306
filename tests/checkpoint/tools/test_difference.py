"""Two checkpoints compared, whatever layouts wrote them."""

import json
import math
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint.manifest import read_manifest
from moe_train.checkpoint.tools import inspection
from moe_train.checkpoint.tools.difference import Difference, FieldDifference, compare_checkpoints
from tests.checkpoint.made import BUFFERS, CONFIG, SHAPES, State, made_state, make_checkpoint


def compare(tmp_path: Path, b: State | None = None, tolerance: float | None = None, **changes) -> Difference:
    first = make_checkpoint(tmp_path / "a")
    second = make_checkpoint(tmp_path / "b", state=b, world_size=5, **changes)
    return compare_checkpoints(read_manifest(first), read_manifest(second), tolerance)


def test_other_layouts_of_the_same_state_are_equal(tmp_path: Path) -> None:
    found = compare(tmp_path)
    assert found.is_equal and not found.config
    assert found.fields == (FieldDifference("layout.world_size", 2, 5),)
    assert len(found.tensors) == 3 * len(SHAPES) + 1 and not any(one.differing for one in found.tensors)


@pytest.mark.parametrize("chunk", [1, 4, 1 << 22])
def test_the_worst_is_first(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "CHUNK", chunk)
    before, after = made_state(), made_state()
    after["weight/embedding.weight"][7] += 0.5
    after["exp_avg/norm.weight"] *= 2
    found = compare(tmp_path, after)
    assert not found.is_equal
    worst, next_one, third = found.tensors[:3]
    assert (worst.name, worst.kind, worst.differing) == ("norm.weight", "exp_avg", 3)
    assert worst.relative_l2 == pytest.approx(0.5, rel=1e-6)  # of fp32 values
    assert (next_one.name, next_one.kind, next_one.differing) == ("embedding.weight", "weight", 1)
    assert next_one.max_difference == pytest.approx(0.5, rel=1e-6)
    norm = max(float(state["weight/embedding.weight"].double().norm()) for state in (before, after))
    assert next_one.relative_l2 == pytest.approx(next_one.max_difference / norm, rel=1e-9)
    assert third.differing == 0


def test_a_tolerance(tmp_path: Path) -> None:
    after = made_state()
    after["weight/embedding.weight"] *= 1 + 1e-5
    assert compare(tmp_path, after, tolerance=2e-5).is_equal
    assert not compare(tmp_path, after, tolerance=5e-6).is_equal
    assert not compare(tmp_path, after).is_equal


def test_zeros_of_other_signs_differ_and_the_same_nan_does_not(tmp_path: Path) -> None:
    before, after = made_state(), made_state()
    for state in (before, after):
        state["exp_avg/norm.weight"][:2] = torch.tensor([math.nan, math.inf])
    before["weight/norm.weight"][0], after["weight/norm.weight"][0] = 0.0, -0.0
    after["exp_avg/norm.weight"][2] *= 3
    first = read_manifest(make_checkpoint(tmp_path / "a", state=before))
    second = read_manifest(make_checkpoint(tmp_path / "b", state=after))
    found = [one for one in compare_checkpoints(first, second).tensors if one.differing]
    assert [(one.kind, one.differing) for one in found] == [("exp_avg", 1), ("weight", 1)]
    assert found[0].relative_l2 == pytest.approx(2 / 3, rel=1e-6)  # infinite elements of both are left out of the norm
    assert found[1].relative_l2 == 0 and found[1].is_within(0.0) and not found[1].is_within(None)


def test_what_became_infinite_is_beyond_any_tolerance(tmp_path: Path) -> None:
    for value in (math.nan, math.inf):
        after = made_state()
        after["weight/norm.weight"][1] = value
        found = compare(tmp_path, after, tolerance=1e30)
        assert not found.is_equal and found.tensors[0].relative_l2 == math.inf
        text = json.dumps(found.as_dict(), allow_nan=False)
        assert json.loads(text)["tensors"][0]["relative_l2"] is None


def test_other_tensors_buffers_and_fields(tmp_path: Path) -> None:
    shapes = {"embedding.weight": (5, 3), "experts.gate_up": (2, 6), "head.weight": (3,), "nothing": (0,)}
    config = json.loads(json.dumps(CONFIG))
    config["model"]["moe"]["num_experts"], config["train"]["new"] = 4, True
    first = read_manifest(make_checkpoint(tmp_path / "a"))
    other = make_checkpoint(tmp_path / "b", step=2, shapes=shapes, config=config, buffers={"router.bias": [0.5, 0.25]})
    found = compare_checkpoints(first, read_manifest(other), tolerance=0.01)
    assert not found.is_equal
    assert found.only_in_a == ("norm.weight",) and found.only_in_b == ("head.weight",)
    assert found.other_shape == (FieldDifference("experts.gate_up", [2, 3, 2], [2, 6]),)
    assert found.config == (FieldDifference("model.moe.num_experts", 2, 4), FieldDifference("train.new", None, True))
    assert [one.name for one in found.fields] == ["consumed_sequences", "optimizer_step", "step"]
    (bias,) = [one for one in found.tensors if one.kind == "buffer"]
    assert (bias.name, bias.differing, bias.max_difference) == ("router.bias", 1, 0.5)


def test_a_bias_alone_makes_them_differ(tmp_path: Path) -> None:
    assert not compare(tmp_path, buffers={"router.bias": [0.5, -0.2500001]}).is_equal
    assert compare(tmp_path, buffers=BUFFERS).is_equal
    assert compare(tmp_path, buffers={}).only_in_a == ("buffer router.bias",)
