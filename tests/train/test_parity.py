"""The same numbers for every layout, in real runs of real processes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moe_train.checkpoint.folders import list_checkpoints
from moe_train.checkpoint.manifest import read_manifest
from moe_train.config.errors import UsageError
from moe_train.config.load import load_config, validate_config
from moe_train.config.registry import load_part, part_names
from moe_train.model.moe.balance.build import balance_kinds
from moe_train.train.parity import (
    GLOBAL_BATCH,
    LAYOUTS,
    NUM_STEPS,
    OPTIONS,
    Bounds,
    Layout,
    bounds_of_spread,
    choose_layouts,
    compare,
    context_obstacle,
    options_for,
    own_model,
)
from moe_train.train.telemetry.records import EXPERT_FIGURES, read_records
from tests.processes import run_process
from tests.train.conftest import ParityRuns
from tests.train.runs import CPU, ROOT


def full_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every state of every logical tensor, put together by a loop over the pieces."""
    manifest = read_manifest(checkpoint)
    whole = {}
    for name, pieces in manifest.pieces.items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            parts = []
            for piece in pieces:
                with safe_open(checkpoint / piece.file, framework="pt") as file:
                    parts.append(file.get_tensor(f"{kind}/{name}"))
            whole[f"{kind}/{name}"] = torch.cat(parts).view(manifest.shapes[name])
    return whole


def test_all_layouts_give_the_same_losses_and_gradient_norms(parity_runs: ParityRuns) -> None:
    summary = parity_runs.summary
    assert parity_runs.result.returncode == 0 and summary["passed"], summary
    assert len(summary["layouts"]) == len(LAYOUTS) and not summary["skipped"]
    for row in summary["layouts"]:
        assert row["steps"] == NUM_STEPS, row
        assert row["loss_difference"] <= 1e-4 and row["grad_norm_difference"] <= 1e-3, row


def test_the_layouts_asked_for_are_compared() -> None:
    spread = {(x.world_size, x.expert_parallel_size, x.zero_stage) for x in LAYOUTS if not x.ignores}
    assert spread >= {(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 3), (4, 4, 1)}
    assert {x.accumulation for x in LAYOUTS} == {1, 2, 4, 8, 16}
    assert {x.dispatch for x in LAYOUTS} == {"flat", "unique", "two_level"}
    assert {x.context_parallel_size for x in LAYOUTS} == {1, 2, 4}
    # A micro-batch of one sequence, of which some have no target.
    assert any(x.ignores and x.world_size * x.accumulation == GLOBAL_BATCH for x in LAYOUTS)


def test_every_balance_term_is_on() -> None:
    config = load_config([*OPTIONS, "--train.run_dir=unused"], program="t")
    kinds = {load_part("balance", name).field for name in part_names("balance")}
    assert {name for name, _, _ in balance_kinds(config.model.moe)} == kinds


@pytest.mark.parametrize("index", [i for i, layout in enumerate(LAYOUTS) if layout.world_size > 1])
def test_expert_figures_are_those_of_one_process(parity_runs: ParityRuns, index: int) -> None:
    first = next(i for i, layout in enumerate(LAYOUTS) if layout.ignores == LAYOUTS[index].ignores)
    ours, reference = (read_records(parity_runs.folders[i] / "metrics.jsonl") for i in (index, first))
    assert len(ours) == len(reference) == NUM_STEPS
    # Before anything was learned every number is the same to the last bit of a sum; counts are whole numbers.
    for layer in (1, 3):
        assert ours[0][f"moe/counts/layer_{layer:02d}"] == reference[0][f"moe/counts/layer_{layer:02d}"]
    for here, there in zip(ours, reference):
        for name in (*EXPERT_FIGURES, "moe/clean_agreement", "moe/clean_kappa"):
            if name == "moe/rank_overload":  # it is about ranks
                continue
            for suffix in ("", "/layer_01", "/layer_03"):
                # Later a rounding may send a token elsewhere. Of 256 tokens an expert one is 0.4%, which is MaxVio's
                # and rank rows' unit; CV^2 of 0.003 then changes by at most 2 x 0.05 x 0.004 / 8.
                is_share = name in ("moe/max_violation", "moe/dropped_fraction", "moe/clean_kappa")
                close = pytest.approx(there[name + suffix], rel=5e-3, abs=1e-2 if is_share else 1e-4)
                assert here[name + suffix] == close, (here["step"], name + suffix)
        for layer in (1, 3):
            counts = f"moe/counts/layer_{layer:02d}"
            assert sum(here[counts]) == sum(here[f"moe/rank_rows/layer_{layer:02d}"]) == 16 * 64 * 2
            assert here[counts] == pytest.approx(there[counts], abs=4)


def test_training_really_moved(parity_runs: ParityRuns) -> None:
    # Equal losses would prove nothing if nothing were learned.
    final = full_tensors(list_checkpoints(parity_runs.folders[0] / "checkpoints")[-1])
    router = final["weight/blocks.1.feed_forward.router.gate.weight"]
    assert router.abs().max() > 1e-3  # it starts at zero


@pytest.mark.parametrize("index", range(1, 5))
def test_final_weights_and_moments_agree(parity_runs: ParityRuns, index: int) -> None:
    ours, reference = (full_tensors(list_checkpoints(parity_runs.folders[i] / "checkpoints")[-1]) for i in (index, 0))
    assert ours.keys() == reference.keys()
    for name in reference:
        # Adam divides by the root of the second moment, so that rounding of tiny gradients grows: the norm is compared.
        difference = (ours[name] - reference[name]).norm() / reference[name].norm().clamp(min=1e-12)
        assert difference < 2e-2, (name, float(difference))


def test_compare_finds_a_difference_and_a_missing_step() -> None:
    layout = Layout(2, 2, 1, 2)
    reference = [{"step": i, "train/loss": 2.0, "train/grad_norm": 1.0} for i in range(1, NUM_STEPS + 1)]
    changed = [record | {"train/loss": 2.001} if record["step"] == 7 else record for record in reference]
    assert compare(layout, reference, reference).passed
    assert not compare(layout, changed, reference).passed
    assert not compare(layout, reference[:-1], reference).passed
    assert not compare(layout, [], reference).passed


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_the_same(value: float | None) -> None:
    layout = Layout(2, 2, 1, 2)
    reference = [{"step": i, "train/loss": 2.0, "train/grad_norm": 1.0} for i in range(1, NUM_STEPS + 1)]
    broken = [record | {"train/loss": value} if record["step"] > 6 else record for record in reference]
    assert not compare(layout, broken, reference).passed
    assert not compare(layout, broken, broken).passed


@pytest.mark.slow
def test_under_a_launcher_its_ranks_are_what_is_checked(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "moe_train", "parity", "--json", "--layouts=1", f"--keep={tmp_path}"]
    result = run_process([*command, "--model.num_layers=2"], timeout=300, env=CPU, cwd=ROOT)
    assert result.returncode == 0, result
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["passed"]
    assert [row["world_size"] for row in summary["layouts"]] == [1, 2]  # the one asked for and its reference


def test_layouts_are_chosen_with_their_references() -> None:
    assert choose_layouts(None) == list(LAYOUTS)
    assert choose_layouts("3,9") == [LAYOUTS[0], LAYOUTS[3], LAYOUTS[8], LAYOUTS[9]]
    for wrong in (str(len(LAYOUTS)), "x", "1,", "-1"):
        with pytest.raises(UsageError, match="--layouts"):
            choose_layouts(wrong)


def test_nothing_to_compare_is_not_a_pass() -> None:
    result = run_process(
        [sys.executable, "-m", "moe_train", "parity", "--max-ranks=1", "--layouts=1"], timeout=60, env=CPU, cwd=ROOT
    )
    assert result.returncode == 2 and "nothing can be compared" in result.stderr, result


def test_bounds_in_bf16_are_three_spreads_and_not_too_much() -> None:
    reference = [{"step": i, "train/loss": 2.0, "train/grad_norm": 1.0} for i in range(1, NUM_STEPS + 1)]
    near = [record | {"train/loss": 2.002, "train/grad_norm": 1.5} for record in reference]
    bounds = bounds_of_spread([compare(LAYOUTS[0], near, reference), compare(LAYOUTS[0], reference, reference)])
    assert bounds == Bounds(pytest.approx(3e-3), 2e-2)
    assert compare(LAYOUTS[1], [r | {"train/grad_norm": 1.0} for r in near], reference, bounds, "bf16").passed
    assert not compare(LAYOUTS[1], near, reference, bounds, "bf16").passed


def test_the_users_model_keeps_its_shapes_precision_and_terms() -> None:
    options = ["--config=configs/moe_7b_a1b_mlkv.yaml", "--train.run_dir=r"]
    config = load_config(options, program="t")
    values = own_model(config, layers=3)
    assert values["model"]["num_layers"] == 3 and values["model"]["hidden_size"] == config.model.hidden_size
    assert values["model"]["moe"] == config.model_dump(mode="json")["model"]["moe"]
    assert values["train"]["precision"] == config.train.precision and values["train"]["sequence_length"] == 64
    assert "data" not in values and "optim" not in values
    with pytest.raises(UsageError, match=r"--layers \(99\).*num_layers"):
        own_model(config, layers=99)


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 8])
def test_patterns_over_layers_are_cut_and_windows_matter(layers: int) -> None:
    options = ["--config=configs/qwen3_30b_a3b.yaml", "--train.run_dir=r", "--model.window_pattern=[4096,null,8,null]"]
    options += ["--model.mixers=attention,infini", "--model.infini.segment_length=16"]
    values = own_model(load_config(options, program="t"), layers)
    model = validate_config(values).model
    assert model.layer_windows == ((32, None, 8, None) * 2)[:layers]
    assert model.layer_mixers == (("attention", "infini") * 4)[:layers]


@pytest.mark.slow
def test_a_users_model_in_both_precisions(tmp_path: Path) -> None:
    options = ["--config=configs/quickstart.yaml", "--layers=2", "--layouts=1,9", "--json", f"--keep={tmp_path}"]
    result = run_process([sys.executable, "-m", "moe_train", "parity", *options], timeout=300, env=CPU, cwd=ROOT)
    assert result.returncode == 0, result
    rows = json.loads(result.stdout.splitlines()[-1])["layouts"]
    assert {row["precision"] for row in rows} >= {"fp32"} and len(rows) % 4 == 0
    assert all(row["loss_bound"] <= 2e-2 and row["passed"] for row in rows)


@pytest.mark.parametrize(
    ("extra", "missing"),
    [
        ([], set()),
        (["--model.num_layers=6"], set()),
        (["--model.mixers=rwkv4,attention"], set()),
        (["--model.mixer=rwkv4"], {"num_heads", "num_kv_heads", "kv_layers"}),
        (["--model.mixers", '["rwkv4"]'], {"num_heads", "num_kv_heads", "kv_layers"}),
        (["--model.mixers=rwkv4,rwkv7"], {"num_kv_heads", "kv_layers"}),
        (["--model.mixer=infini"], {"kv_layers"}),
        (["--model.mixer=unheard"], {"num_heads", "num_kv_heads", "kv_layers"}),
        (["--model.mixer=rwkv4", "--model.mixer=attention"], set()),
    ],
)
def test_the_small_model_has_no_field_that_no_mixer_reads(extra: list[str], missing: set[str]) -> None:
    found = options_for(extra)
    assert found == [option for option in OPTIONS if option.split("=")[0].removeprefix("--model.") not in missing]
    assert len(found) == len(OPTIONS) - len(missing)


def test_a_model_that_cannot_share_sequences_is_compared_without() -> None:
    options = options_for(["--model.mixer=ttt_linear"])
    config = load_config([*options, "--model.mixer=ttt_linear", "--train.run_dir=unused"], program="t")
    for layout in LAYOUTS:
        obstacle = context_obstacle(config, layout)
        assert (obstacle is None) == (layout.context_parallel_size == 1)
        assert obstacle is None or "ttt_linear" in obstacle
    assert all(context_obstacle(load_config([*OPTIONS, "--train.run_dir=u"], program="t"), x) is None for x in LAYOUTS)
