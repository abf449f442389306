"""Fields of a run that a sink shows beside those of other runs."""

from moe_train.config.load import load_config
from moe_train.train.telemetry.compared_fields import compared_fields
from tests.resolved import resolve_for


def test_fields_that_differ_from_the_defaults_come_first() -> None:
    config = load_config(["--train.run_dir=x", "--optim.learning_rate=3e-3", "--model.moe.num_experts=16"], program="t")
    fields = compared_fields(resolve_for(config, 1))
    assert {"optim.learning_rate", "model.moe.num_experts"} <= set(list(fields)[:10]), list(fields)
    assert "train.run_dir" not in fields and fields["optim.learning_rate"] == 3e-3
    assert list(fields).index("model.norm") > list(fields).index("optim.learning_rate")
