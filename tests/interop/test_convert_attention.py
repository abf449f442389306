"""Fewer keys and values: means against a slow loop, everything else bit for bit, widths that change no output."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.checkpoint.manifest import ADAM_MOMENTS, DamagedCheckpoint, Manifest, read_manifest
from moe_train.checkpoint.ranges import RangeReader
from moe_train.checkpoint.tools import inspection
from moe_train.checkpoint.verification import verify_checkpoint, verify_surroundings
from moe_train.config.errors import UsageError
from moe_train.config.load import read_yaml, validate_config
from moe_train.config.model import ModelConfig
from moe_train.infer.loading import check_fits, load_weights
from moe_train.interop import convert_attention as conversion
from moe_train.interop import widening
from moe_train.interop.convert_attention import ConversionRequest, Converted, convert_attention
from moe_train.model.build import build_model
from moe_train.model.count import count_parameters
from moe_train.model.parameters import logical_tensors
from tests.checkpoint.made import State, made_state, make_checkpoint
from tests.model.small import SMALL, VOCAB, random_ids, tokens_of

HEADS, HEAD_DIM, HIDDEN = 4, 4, 16
LAYERS = 8
BIAS = {"router": "softmax_topk", "bias_update_rate": 1e-3}
# Changes of the source, and what is asked for: heads and owner layers.
CASES: dict[str, tuple[dict[str, Any], int | None, Any]] = {
    "MHA to GQA": ({}, 2, None),
    "GQA to MQA": ({"num_kv_heads": 2}, 1, None),
    "MHA to MQA": ({}, 1, None),
    "MHA to MLKV": ({}, None, 2),
    "MHA to MLKV with fewer heads": ({}, 2, 3),
    "list of owners": ({"num_kv_heads": 2}, 1, (0, 1, 2, 5)),
    "list of owners, heads as before": ({}, 4, (0, 1, 2, 5)),
    "MLKV to fewer": ({"num_kv_heads": 2, "kv_layers": 4}, 2, 2),
    "MLKV to other layers": ({"kv_layers": [0, 2, 3, 7]}, 2, (0, 1, 4)),
    "MLKV to one": ({"kv_layers": [0, 3]}, 1, 1),
    "one layer for all": ({}, 1, 1),
    "norm of heads, MLKV with fewer heads": ({"qk_norm": "head"}, 2, 3),
    "norm of projections, GQA to MQA": ({"qk_norm": "projection", "num_kv_heads": 2}, 1, None),
    "norm of projections, MLKV with fewer heads": ({"qk_norm": "projection", "kv_layers": [0, 2, 3, 7]}, 2, (0, 1, 4)),
}
cases = pytest.mark.parametrize(("changes", "heads", "owners"), CASES.values(), ids=CASES.keys())


def source_config(**changes: Any) -> dict[str, Any]:
    """A run's configuration; changes are of the model."""
    plain = {**SMALL, "num_layers": LAYERS, "num_kv_heads": HEADS, "vocab_size": VOCAB}
    config = {"model": {**plain, **changes}, "train": {"run_dir": "runs/made", "steps": 1000, "precision": "fp32"}}
    return validate_config({**config, "optim": {"warmup_steps": 100}}).model_dump(mode="json")


def source_state(config: dict[str, Any]) -> tuple[State, dict[str, tuple[int, ...]]]:
    """Weights, moments and shapes of a model."""
    model = build_model(ModelConfig.model_validate(config["model"]), VOCAB)
    shapes = {name: tensor.shape for name, tensor in logical_tensors(model).items()}
    return {name: 0.3 * values for name, values in made_state(shapes=shapes).items()}, shapes


def make_source(folder: Path, state: State | None = None, **changes: Any) -> Manifest:
    """A checkpoint of a made run, of step 7, in several files."""
    config = source_config(**changes)
    made, shapes = source_state(config)
    state = made if state is None else state
    layers = range(1, LAYERS, 2)
    buffers = {f"blocks.{i}.feed_forward.router.selection_bias": [0.5, -0.25, 0.0, float(i)] for i in layers}
    buffers = buffers if config["model"]["moe"]["bias_update_rate"] else {}
    return read_manifest(make_checkpoint(folder / "checkpoints", 7, 3, state, shapes, config=config, buffers=buffers))


def converted(manifest: Manifest, output: Path, **request: Any) -> tuple[Converted, Manifest]:
    done = convert_attention(manifest, ConversionRequest(output, **request), file_elements=1000)
    return done, read_manifest(Path(done.checkpoint))


def weights_of(manifest: Manifest, kind: str = "weight") -> dict[str, Tensor]:
    with RangeReader(manifest) as reader:
        return {
            name: reader.read(name, kind, 0, torch.Size(shape).numel()).view(shape)
            for name, shape in manifest.shapes.items()
        }


def slow_mean(weights: dict[str, Tensor], old: ModelConfig, new: ModelConfig, owner: int, kind: str) -> Tensor:
    """Row by row, layer by layer, head by head, in fp64. A gain that all heads share is that of one head."""
    later = [layer for layer in new.kv_owner_layers if layer > owner]
    group = range(owner, later[0] if later else old.num_layers)
    num_heads, ratio = new.attention_kv_heads, old.attention_kv_heads // new.attention_kv_heads
    if kind == "key_norm" and old.qk_norm == "head":
        num_heads, ratio = 1, 1
    width = () if kind == "key_norm" else (HIDDEN,)
    mean = torch.zeros(num_heads * HEAD_DIM, *width, dtype=torch.float64)
    for head in range(num_heads):
        for row in range(HEAD_DIM):
            for layer in group:
                read = [o for o in old.kv_owner_layers if o <= layer][-1]
                for old_head in range(head * ratio, (head + 1) * ratio):
                    values = weights[f"blocks.{read}.mixer.{kind}.weight"][old_head * HEAD_DIM + row].double()
                    mean[head * HEAD_DIM + row] += values / (ratio * len(group))
    return mean


def load(manifest: Manifest) -> Any:
    """The model of a checkpoint, in fp64."""
    config = validate_config(manifest.config)
    model = build_model(config.model, VOCAB, seed=config.train.seed)
    check_fits(model, manifest)
    load_weights(model, manifest, dtype=torch.float64, device=torch.device("cpu"))
    return model.eval()


@torch.no_grad()
def logits(manifest: Manifest) -> Tensor:
    return load(manifest)(tokens_of(random_ids(2, 12))).logits_BSV


@cases
def test_means_are_those_of_a_slow_loop_and_the_rest_is_untouched(
    tmp_path: Path, changes: dict[str, Any], heads: int | None, owners: Any
) -> None:
    source = make_source(tmp_path / "run", **changes, moe={**SMALL["moe"], **BIAS})
    done, manifest = converted(source, tmp_path / "new", num_kv_heads=heads, kv_layers=owners)
    old, new = (ModelConfig.model_validate(each.config["model"]) for each in (source, manifest))
    before, after = weights_of(source), weights_of(manifest)
    for owner in new.kv_owner_layers:
        for kind in ("key", "value") if old.qk_norm == "none" else ("key", "value", "key_norm"):
            found = after.pop(f"blocks.{owner}.mixer.{kind}.weight")
            mean = slow_mean(before, old, new, owner, kind)
            # One rounding to fp32, of sums whose order differs in the last bits of fp64.
            torch.testing.assert_close(found.double(), mean, rtol=2**-23, atol=1e-12)
    kept = {name for name in before if not any(f".mixer.{kind}." in name for kind in ("key", "value", "key_norm"))}
    assert after.keys() == kept and all(torch.equal(after[name], before[name]) for name in kept)
    assert manifest.buffers == source.buffers and manifest.buffers
    assert len(manifest.files) > 3 and verify_checkpoint(manifest.folder).is_whole
    assert done.kv_layers == new.kv_owner_layers and done.num_kv_heads == new.attention_kv_heads
    assert done.parameters.before == count_parameters(old, VOCAB).total
    assert done.parameters.after == count_parameters(new, VOCAB).total
    caches = [2 * len(each.kv_owner_layers) * each.attention_kv_heads * HEAD_DIM * 4 for each in (old, new)]
    assert [done.kv_cache_bytes_per_token.before, done.kv_cache_bytes_per_token.after] == caches
    assert torch.isfinite(logits(manifest)).all()


def test_a_layer_alone_in_its_group_keeps_its_weights_bit_for_bit(tmp_path: Path) -> None:
    source = make_source(tmp_path / "run")
    _, manifest = converted(source, tmp_path / "new", kv_layers=(0, 1, 2, 5))
    before, after = weights_of(source), weights_of(manifest)
    for layer, is_same in ((0, True), (1, True), (2, False), (5, False)):
        name = f"blocks.{layer}.mixer.key.weight"
        assert torch.equal(before[name], after[name]) == is_same


@pytest.mark.parametrize("qk_norm", ["none", "head", "projection"])
def test_nothing_is_lost_where_the_heads_of_a_group_are_equal(tmp_path: Path, qk_norm: str) -> None:
    state, shapes = source_state(source_config(qk_norm=qk_norm))
    per_head = ["key", "value", *(["key_norm"] if qk_norm == "projection" else [])]
    for name in [name for name in shapes if any(f".mixer.{kind}." in name for kind in per_head)]:
        by_head = state[f"weight/{name}"].view(HEADS, -1)
        by_head[1], by_head[3] = by_head[0], by_head[2]
    source = make_source(tmp_path / "run", state, qk_norm=qk_norm)
    _, manifest = converted(source, tmp_path / "new", num_kv_heads=2)
    assert logits(source).std() > 0.1
    torch.testing.assert_close(logits(manifest), logits(source), rtol=0, atol=1e-10)  # fp64; another kernel
    _, other = converted(source, tmp_path / "other", num_kv_heads=1)
    assert (logits(other) - logits(source)).abs().max() > 1e-3


def test_the_run_folder_is_that_of_a_run_at_step_0(tmp_path: Path) -> None:
    moe = {**SMALL["moe"], **BIAS, "coef_schedules": {"bias_update_rate": [[0, 1.0], [14, 0.0]]}}
    source = make_source(tmp_path / "run", moe=moe)
    (tmp_path / "run" / "tokenizer.json").write_text('{"a": "ä"}\n', encoding="utf-8")
    done, manifest = converted(source, tmp_path / "deep" / "new", num_kv_heads=2)
    output = Path(done.output)
    assert sorted(path.name for path in output.iterdir()) == ["checkpoints", "config.yaml", "tokenizer.json"]
    assert (output / "tokenizer.json").read_bytes() == (tmp_path / "run" / "tokenizer.json").read_bytes()
    assert verify_surroundings(output / "checkpoints").is_whole
    assert manifest.folder == output / "checkpoints" / "step_00000000"
    assert (manifest.step, manifest.optimizer_step, manifest.loss_scale) == (0, 0, 1.0)
    assert manifest.consumed_sequences == source.consumed_sequences > 0
    assert manifest.tokenizer == source.tokenizer
    assert manifest.step_control.grad_norms == () and manifest.step_control.skipped_steps == 0
    assert manifest.layout == {"world_size": 1, "expert_parallel_size": 1, "zero_stage": 1}
    for kind in ADAM_MOMENTS:
        assert all(not values.any() for values in weights_of(manifest, kind).values())
    config = validate_config(read_yaml(output / "config.yaml"))
    assert config.train.run_dir == str(output) and config.model.num_kv_heads == 2
    assert (config.train.steps, config.optim.warmup_steps, done.steps) == (50, 5, 50)
    assert config.model.moe.coef_schedules == {"bias_update_rate": ((0, 0.5),)}  # where it had come to at step 7


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (500, 50), (5000, 100)])
def test_the_warm_up_keeps_its_share_of_the_steps(tmp_path: Path, steps: int, warmup: int) -> None:
    source = make_source(tmp_path / "run")
    _, manifest = converted(source, tmp_path / "new", num_kv_heads=1, steps=steps)
    config = validate_config(manifest.config)
    assert (config.train.steps, config.optim.warmup_steps) == (steps, warmup)


@pytest.mark.parametrize(
    ("source_scale", "fp16", "expected"),
    [(2.0**20, {}, 2.0**16), (8.0, {}, 8.0), (2.0**9, {"initial_scale_power": 8}, 2.0**8), (4.0, {"loss_scale": 4}, 4)],
)
def test_an_fp16_run_begins_with_a_loss_scale_that_fits(
    tmp_path: Path, source_scale: float, fp16: dict[str, Any], expected: float
) -> None:
    config = source_config()
    config["train"]["precision"] = "fp16"
    config["deepspeed"] = {"fp16": fp16}
    state, shapes = source_state(config)
    changes = {"config": config, "buffers": {}, "loss_scale": source_scale}
    source = read_manifest(make_checkpoint(tmp_path / "run" / "checkpoints", 7, 3, state, shapes, **changes))
    _, manifest = converted(source, tmp_path / "new", num_kv_heads=1)
    assert manifest.loss_scale == expected


WIDENED: dict[str, dict[str, Any]] = {
    "dense and experts": {},
    "widths of their own": {"moe": {**SMALL["moe"], "intermediate_size": 8}},
    "shared experts": {"moe": {**SMALL["moe"], "num_shared_experts": 2}},
    "all MoE layers": {"moe_every": 1},
    "all MoE layers, width of their own": {
        "moe_every": 1,
        "intermediate_size": ModelConfig().intermediate_size,  # which has no effect
        "moe": {**SMALL["moe"], "intermediate_size": 8},
    },
    "dense": {"moe_every": 0, "moe": {}},
}


@pytest.mark.parametrize("changes", WIDENED.values(), ids=WIDENED.keys())
def test_wider_mlps_change_no_output(tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Heads wide enough that there is something to spend; blocks that end inside of tensors.
    changes = {**changes, "num_layers": 4, "head_dim": 16, "num_heads": 16, "num_kv_heads": 16}
    for module in (inspection, widening):
        monkeypatch.setattr(module, "CHUNK", 50)
    source = make_source(tmp_path / "run", **changes)
    _, narrow = converted(source, tmp_path / "narrow", num_kv_heads=1, kv_layers=2)
    done, wide = converted(source, tmp_path / "wide", num_kv_heads=1, kv_layers=2, widen_mlp=True)
    old, new = (ModelConfig.model_validate(each.config["model"]) for each in (narrow, wide))
    grown = (new.intermediate_size - old.intermediate_size, new.expert_intermediate_size - old.expert_intermediate_size)
    num_moe = len(old.moe_layer_indices)
    steps = [24 * HIDDEN * (4 - num_moe), 24 * HIDDEN * num_moe * (4 + old.moe.num_shared_experts)]
    assert all(growth % 8 == 0 for growth in grown)
    assert 0 <= done.parameters.before - done.parameters.after < min(step for step in steps if step)
    torch.testing.assert_close(logits(wide), logits(narrow), rtol=0, atol=1e-10)  # fp64; sums with more zeros
    before, after = weights_of(narrow), weights_of(wide)
    widened = [name for name in after if after[name].shape != before[name].shape]
    assert widened
    for name in widened:
        more = after[name].count_nonzero() - before[name].count_nonzero()
        assert (more == after[name].numel() - before[name].numel()) if "gate_up" in name else more == 0


def test_too_little_to_widen_by_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "run", num_kv_heads=2)
    layers = tuple(range(LAYERS - 1))  # one gives up its keys and values: 2 x 8 x 16 parameters
    with pytest.raises(UsageError, match="wider by 8 have 1536 more parameters, the reduction saves 256"):
        converted(source, tmp_path / "new", kv_layers=layers, widen_mlp=True)


def test_a_damaged_checkpoint_is_not_converted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "run")
    path = source.folder / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(DamagedCheckpoint, match="rank_00001"):
        converted(source, tmp_path / "new", num_kv_heads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_nothing_half_written_stays(tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "run")

    def fail(*_: object) -> None:
        assert (tmp_path / "new.part" / "checkpoints").is_dir()
        raise error

    monkeypatch.setattr(conversion, "complete_checkpoint", fail)
    with pytest.raises(type(error)):
        converted(source, tmp_path / "new", num_kv_heads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_layers_that_are_not_attention_are_untouched_or_refused(tmp_path: Path) -> None:
    """Their keys and values have the names of attention's, and other meanings."""
    hybrid = {"mixers": ["rwkv4", "attention"], "feed_forward": "rwkv_channel_mix"}
    source = make_source(tmp_path / "hybrid", **hybrid)
    _, target = converted(source, tmp_path / "new", num_kv_heads=1)
    before, after = weights_of(source), weights_of(target)
    kept = [name for name in after if not re.fullmatch(r"blocks\.[1357]\.mixer\.(key|value)\.weight", name)]
    assert len(kept) == len(after) - 8 and all(torch.equal(after[name], before[name]) for name in kept)
    with pytest.raises(UsageError, match=r"--widen-mlp.*rwkv_channel_mix"):
        converted(source, tmp_path / "wide", num_kv_heads=1, widen_mlp=True)
    infini = make_source(tmp_path / "infini", mixers=["attention", "infini"], infini={"segment_length": 4})
    with pytest.raises(UsageError, match=r"--num-kv-heads \(1\).*layer 1.*infini"):
        converted(infini, tmp_path / "none", num_kv_heads=1)
    converted(infini, tmp_path / "fewer", kv_layers=1)
