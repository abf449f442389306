"""Command-line options of parts: --model.NAME.setting, where NAME is a mixer, and its like for other parts.

They are taken out of the command line before it is parsed: which settings a part has is known once it is imported.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from moe_train.config.base import merge
from moe_train.config.errors import UsageError
from moe_train.config.registry import Group, is_part

# Where parts have settings: section, with the group of the parts that it names.
PLACES: dict[str, Group] = {
    "model.moe.balance": "balance",
    "model.moe": "routers",
    "model": "mixers",
    "optim": "optimizers",
    "telemetry": "sinks",
}


def take_part_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the options of parts out of a command line.

    Args:
        arguments: The command line.

    Returns:
        The other arguments; and the values that the options of parts set, as nested sections.

    Raises:
        UsageError: If an option has no value, or one that is not YAML.
    """
    others: list[str] = []
    values: dict[str, Any] = {}
    left = list(arguments)
    while left:
        argument = left.pop(0)
        option, equals, text = argument.partition("=")
        path = _part_path(option)
        if path is None:
            others.append(argument)
            continue
        if not equals:
            if not left:
                raise UsageError(f"{option}: has no value")
            text = left.pop(0)
        values = merge(values, _nested(path, _read(option, text)))
    return others, values


def _part_path(option: str) -> list[str] | None:
    """The keys that an option of a part sets; None: it is an option of another kind."""
    for section, group in PLACES.items():
        rest = option.removeprefix(f"--{section}.")
        name, _, setting = rest.partition(".")
        if rest != option and setting and is_part(group, name):
            return [*section.split("."), name, *setting.split(".")]
    return None


def _read(option: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{option} ({text!r}): cannot be read as YAML") from error


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return value
