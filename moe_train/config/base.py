"""Base class of configuration sections: frozen, no unknown keys, and field docstrings that `--help` shows."""

from collections.abc import Iterator
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from moe_train.config.registry import Group, is_part


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
        """Return whether the value of a field differs from its default.

        Whether the user gave the value would not help: a resolved configuration names every field.
        """
        return getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)


class SectionWithParts(Section):
    """A section whose fields name parts of a registry; a part's own settings are under its name, beside the fields.

    They stay a raw mapping until the part is imported, because only the part knows their names: see
    `parts.read_section`.
    """

    model_config = ConfigDict(extra="allow")
    part_group: ClassVar[Group]

    @property
    def part_settings(self) -> dict[str, dict[str, Any]]:
        """Settings of parts, by the name of the part."""
        return self.model_extra or {}

    @model_validator(mode="after")
    def _check_part_settings(self) -> Self:
        for name, value in self.part_settings.items():
            if not is_part(self.part_group, name):
                raise PydanticCustomError("extra_forbidden", "unknown key", {"key": name, "value": value})
            if not isinstance(value, dict):
                raise ValueError(f"{name} ({value!r}) must be a mapping: the settings of {name}")
        return self


_WHOLE = ("coef_schedules",)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; if both have a value, the one of `above` counts.

    A schedule is one value: points of one file make no sense among the points of another.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if key not in _WHOLE and isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def field_values(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field of a configuration's plain values with its dotted name; an empty mapping is a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from field_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
