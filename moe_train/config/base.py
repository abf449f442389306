"""The base of every configuration section: frozen, unknown keys refused, field docstrings shown by `--help`."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings. The docstring under a field is its description, with the unit where it has one."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )

    def differs(self, name: str) -> bool:
        """Whether a field has another value than its default; a resolved configuration names every field, so that
        "was given" cannot tell a user's wish from a default."""
        return getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)


_WHOLE = ("coef_schedules",)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in one, nested ones merged; where both have a value, the one above counts.

    Schedules are one value as a whole: points of one file make no sense among those of another.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if key not in _WHOLE and isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def field_values(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a configuration's plain values by its dotted name; an empty mapping is a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from field_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
