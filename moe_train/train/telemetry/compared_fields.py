"""Fields of a run that a sink shows beside those of other runs."""

from typing import Any

from moe_train.config.base import field_values
from moe_train.config.resolve import ResolvedConfig
from moe_train.config.root import Config
from moe_train.config.run import TrainConfig


def compared_fields(config: ResolvedConfig) -> dict[str, Any]:
    """Return the fields for the comparison of runs, those that differ from the defaults first.

    They are without the run's folder, and without fields that are None.
    """
    defaults = dict(field_values(Config(train=TrainConfig(run_dir=config.train.run_dir)).model_dump(mode="json")))
    fields = {
        name: value
        for name, value in field_values(config.model_dump(mode="json"))
        if name.startswith(("model.", "optim.", "parallel.", "train."))
        and name != "train.run_dir"
        and value is not None
    }
    chosen = [name for name, value in fields.items() if defaults.get(name) not in (value, "auto")]
    return {name: fields[name] for name in dict.fromkeys([*chosen, *fields])}
