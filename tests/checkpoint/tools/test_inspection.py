"""Statistics of tensors, read in parts."""

import math
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint.manifest import DamagedCheckpoint, read_manifest
from moe_train.checkpoint.tools import inspection
from moe_train.checkpoint.tools.inspection import inspect_manifest, tensor_statistics
from moe_train.config.errors import UsageError
from tests.checkpoint.made import SHAPES, made_state, make_checkpoint


def test_what_a_manifest_says(tmp_path: Path) -> None:
    found = inspect_manifest(read_manifest(make_checkpoint(tmp_path, step=3)))
    assert found.step == 3 and found.consumed_sequences == 24 and found.parameters == 30 and found.num_bytes == 360
    assert [(one.name, one.elements) for one in found.tensors] == [
        ("embedding.weight", 15),
        ("experts.gate_up", 12),
        ("norm.weight", 3),
        ("nothing", 0),
    ]
    assert sum(one.share for one in found.tensors) == pytest.approx(1.0)
    assert found.buffers == {"router.bias": 2} and found.layout["world_size"] == 2


@pytest.mark.parametrize("chunk", [1, 4, 1 << 22])
def test_statistics_are_those_of_the_whole_tensor(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "CHUNK", chunk)
    state = made_state()
    state["weight/embedding.weight"] += 1000.0  # a mean far from 0, where sums of squares alone would lose the std
    state["exp_avg/embedding.weight"][3:6] = torch.tensor([math.nan, math.inf, -math.inf])
    state["exp_avg_sq/embedding.weight"][:] = math.nan
    manifest = read_manifest(make_checkpoint(tmp_path, state=state, world_size=3))
    weight, average, square = tensor_statistics(manifest, "embedding.weight")
    for found, name in ((weight, "weight"), (average, "exp_avg")):
        values = state[f"{name}/embedding.weight"].double()
        values = values[values.isfinite()]
        assert (found.min, found.max) == (float(values.min()), float(values.max()))
        expected = [float(values.mean()), float(values.std(correction=0)), float(values.norm())]
        assert [found.mean, found.std, found.norm] == pytest.approx(expected, rel=1e-9)  # float64 in another order
    assert (weight.non_finite, average.non_finite, square.non_finite) == (0, 3, 15)
    assert square.min is None and square.norm is None
    assert tensor_statistics(manifest, "nothing")[0].elements == 0


def test_no_such_tensor_and_a_cut_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    manifest = read_manifest(folder)
    with pytest.raises(UsageError, match=r"--tensor \('norm'\)"):
        tensor_statistics(manifest, "norm")
    (folder / "rank_00001.safetensors").write_bytes(b"")
    for name in SHAPES:
        with pytest.raises(DamagedCheckpoint, match="rank_00001"):
            tensor_statistics(manifest, name)
