"""DeepSpeed's reading of its configuration: what it refuses or passes over is one message with key and value."""

from typing import Any

import pytest

from moe_train.config.errors import UsageError
from moe_train.config.load import validate_config
from moe_train.train.engine.reading import read_by_deepspeed
from moe_train.train.engine.settings import deepspeed_settings
from tests.resolved import resolve_for


def read(additions: dict[str, Any]) -> Any:
    config = validate_config({"train": {"run_dir": "r"}, "deepspeed": additions})
    return read_by_deepspeed(deepspeed_settings(resolve_for(config, 1)))


def test_what_deepspeed_reads_arrives() -> None:
    assert read({}).gradient_clipping == 1.0
    assert read({"prescale_gradients": True}).prescale_gradients is True
    assert read({"zero_optimization": {"reduce_bucket_size": 1000}}).zero_config.reduce_bucket_size == 1000


@pytest.mark.parametrize(
    ("additions", "words"),
    [
        ({"typo": 1}, r"deepspeed\.typo \(1\) has no effect: DeepSpeed does not read this key"),
        ({"prescale_gradient": True}, r"deepspeed\.prescale_gradient \(True\) .*did you mean prescale_gradients\?"),
        ({"zero_optimisation": {"stage": 1}}, r"deepspeed\.zero_optimisation .*did you mean zero_optimization\?"),
        ({"zero_optimization": {"typo": 1}}, r"deepspeed\.zero_optimization\.typo \(1\): DeepSpeed cannot read this"),
        ({"bf16": {"enable": True}}, r"deepspeed\.bf16\.enable \(True\): DeepSpeed cannot read this"),
        (
            {"zero_optimization": {"reduce_bucket_size": "x"}},
            r"deepspeed\.zero_optimization\.reduce_bucket_size \('x'\)",
        ),
        ({"flops_profiler": 3}, r"deepspeed\.flops_profiler \(3\): DeepSpeed cannot read this"),
    ],
)
def test_what_deepspeed_refuses_or_passes_over_is_named(additions: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        read(additions)
    assert "\n" not in str(error.value)
