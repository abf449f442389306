"""DeepSpeed's configuration: our fields, the raw additions, and contradictions between them."""

import pytest

from moe_train.config.errors import UsageError
from moe_train.config.load import validate_config
from moe_train.train.engine.settings import check_additions, deepspeed_settings
from tests.resolved import resolve_for


def make(world=1, precision="fp32", additions=None, **sections):
    sections["train"] = {
        "run_dir": "r",
        "precision": precision,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        **sections.get("train", {}),
    }
    return resolve_for(validate_config({**sections, "deepspeed": additions or {}}), world, device="cuda")


def test_fields_become_deepspeeds_keys():
    settings = deepspeed_settings(make(2, "bf16", parallel={"zero_stage": 2}, optim={"max_grad_norm": 0.5}))
    assert settings["train_batch_size"] == 8
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["bf16"] == {"enabled": True}
    assert settings["fp16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("precision", "world", "expected"),
    [("bf16", 2, "fp32"), ("fp16", 2, "fp32"), ("bf16", 4, None), ("fp32", 2, None)],
)
def test_micro_batches_add_up_in_fp32(precision, world, expected):
    settings = deepspeed_settings(make(world, precision))
    assert settings.get("data_types", {}).get("grad_accum_dtype") == expected
    assert settings["fp16"]["enabled"] == (precision == "fp16")
    assert settings["bf16"]["enabled"] == (precision == "bf16")


@pytest.mark.parametrize(
    ("stage", "device", "overlaps"), [(1, "cuda", False), (2, "cuda", False), (3, "cuda", True), (3, "cpu", False)]
)
def test_weights_are_fetched_ahead_by_blocks_under_zero_3_on_gpus(stage, device, overlaps):
    zero = deepspeed_settings(make(2, parallel={"zero_stage": stage}), device, 1234)["zero_optimization"]
    assert zero["overlap_comm"] == overlaps
    assert zero.get("stage3_prefetch_bucket_size") == (1234 if overlaps else None)


def test_no_timer_of_deepspeed_waits_for_the_device():
    assert deepspeed_settings(make())["timers"] == {"throughput": {"enabled": False}}


def test_additions_are_merged_in():
    additions = {
        "zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True},
        "communication_data_type": "fp32",
        "fp16": {"initial_scale_power": 4},
    }
    config = make(precision="fp16", additions=additions)
    settings = deepspeed_settings(config)
    assert settings["zero_optimization"] == {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 1000}
    assert settings["communication_data_type"] == "fp32"
    assert settings["fp16"] == {"enabled": True, "initial_scale_power": 4}
    assert config.deepspeed == additions


def test_additions_that_agree_are_taken():
    additions = {"train_batch_size": 8, "zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}
    assert deepspeed_settings(make(additions=additions))["train_batch_size"] == 8


@pytest.mark.parametrize(
    ("additions", "words"),
    [
        ({"train_batch_size": 9}, ["deepspeed.train_batch_size (9)", "train.global_batch_size", "8"]),
        ({"train_micro_batch_size_per_gpu": 3}, ["train_micro_batch_size_per_gpu (3)", "train.micro_batch_size", "2"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps (1)", "train.global_batch_size", "4"]),
        ({"gradient_clipping": 2.0}, ["gradient_clipping (2.0)", "optim.max_grad_norm", "1.0"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage (3)", "parallel.zero_stage", "1"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled (True)", "train.precision", "False"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled (True)", "train.precision", "False"]),
    ],
)
def test_additions_that_contradict_a_field(additions, words):
    with pytest.raises(UsageError) as error:
        deepspeed_settings(make(additions=additions))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("section", "home"),
    [
        ("optimizer", "optim"),
        ("scheduler", "optim"),
        ("tensorboard", "telemetry"),
        ("activation_checkpointing", "train.recompute"),
        ("expert_parallel", "parallel.expert_parallel_size"),
        ("checkpoint", "checkpoint"),
    ],
)
def test_sections_that_have_their_home_elsewhere(section, home):
    with pytest.raises(UsageError, match=rf"deepspeed\.{section} .*'a'.*{home}"):
        check_additions(make(additions={section: {"a": 1}}))


def test_what_needs_no_world_is_refused_before_it_is_known():
    with pytest.raises(UsageError, match=r"zero_optimization\.stage \(2\)"):
        check_additions(make(additions={"zero_optimization": {"stage": 2}}))
    check_additions(make(additions={"zero_optimization": {"stage": 1}, "train_batch_size": 999}))


def test_an_offloaded_optimizer_is_any_of_torch():
    settings = deepspeed_settings(make(parallel={"offload_optimizer": "cpu"}))
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert "offload_optimizer" not in deepspeed_settings(make())["zero_optimization"]


@pytest.mark.parametrize("device", ["cpu", "nvme", "none"])
def test_offload_has_a_field(device):
    additions = {"zero_optimization": {"offload_optimizer": {"device": device}}}
    with pytest.raises(UsageError, match=r"offload_optimizer \(.*has its home in parallel\.offload_optimizer"):
        check_additions(make(additions=additions))
