"""A checkpoint's weights in a model for inference: every range where it belongs, this rank's experts only."""

from pathlib import Path

import pytest
import torch

from moe_train.checkpoint.ranges import RangeReader
from moe_train.config.errors import UsageError
from moe_train.config.load import validate_config
from moe_train.infer.loading import check_fits, load_weights
from moe_train.model.build import ExpertPlacement, build_model
from moe_train.model.parameters import logical_tensors
from tests.interop.test_convert_attention import BIAS, SMALL, VOCAB, make_source

CPU = torch.device("cpu")
BIASED = {**SMALL["moe"], **BIAS}  # with a buffer in every MoE layer


def loaded(manifest, rank=0, size=1, dtype=torch.float32):
    config = validate_config(manifest.config)
    model = build_model(config.model, VOCAB, placement=ExpertPlacement(rank, size))
    load_weights(model, manifest, dtype=dtype, device=CPU)
    return model


@pytest.mark.parametrize("chunk", [None, 7])
def test_every_range_is_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    if chunk is not None:  # a tensor is then put together from many reads
        monkeypatch.setattr("moe_train.infer.loading._CHUNK", chunk)
    manifest = make_source(tmp_path / "run", moe=BIASED)
    for rank, size in ((0, 1), (0, 2), (1, 2), (3, 4)):
        model = loaded(manifest, rank, size)
        parameters = dict(model.named_parameters())
        with RangeReader(manifest) as reader:
            for name, place in logical_tensors(model).items():
                expected = reader.read(name, "weight", place.start, place.start + place.numel)
                assert torch.equal(parameters[name].detach().flatten(), expected), name
        assert {name: buffer.tolist() for name, buffer in model.named_buffers()} == manifest.buffers
    assert manifest.buffers


def test_weights_take_the_dtype_and_buffers_keep_theirs(tmp_path: Path) -> None:
    model = loaded(make_source(tmp_path / "run", moe=BIASED), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_another_model_is_refused(tmp_path: Path) -> None:
    manifest = make_source(tmp_path / "run")
    config = validate_config(manifest.config).model
    check_fits(build_model(config, VOCAB), manifest)
    with pytest.raises(UsageError, match=rf"another model: tensor embedding.weight is \[{VOCAB}, "):
        check_fits(build_model(config, VOCAB + 1), manifest)
