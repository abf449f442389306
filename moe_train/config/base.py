"""Base class of configuration sections: frozen, no unknown keys, and field docstrings that `--help` shows."""

from collections.abc import Iterator
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from moe_train.config.registry import PartGroup, is_part
from moe_train.config.values import read_value


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

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        """Read a value by the type of its field."""
        return read_value(value, cls.model_fields[info.field_name or ""].annotation)

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
    part_group: ClassVar[PartGroup]

    @property
    def part_settings(self) -> dict[str, dict[str, Any]]:
        """Settings of parts, by the name of the part."""
        return self.model_extra or {}

    @model_validator(mode="wrap")
    @classmethod
    def _check_part_settings(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Refuse keys that are neither fields nor parts, together with whatever else is wrong."""
        if not isinstance(values, dict):
            return handler(values)
        parts = {name for name in values if name not in cls.model_fields and is_part(cls.part_group, name)}
        values = {name: {} if value is None and name in parts else value for name, value in values.items()}
        faults = {}
        for name, value in values.items():
            if name in cls.model_fields:
                continue
            if name not in parts:
                faults[name] = PydanticCustomError("extra_forbidden", "unknown key")
            elif not isinstance(value, dict):
                faults[name] = PydanticCustomError("value_error", "must be a mapping: the settings of a part")
        if not faults:
            return handler(values)
        found = [InitErrorDetails(type=fault, loc=(name,), input=values[name]) for name, fault in faults.items()]
        try:
            handler({name: value for name, value in values.items() if name not in faults})
        except ValidationError as error:
            found += [_as_details(item) for item in error.errors(include_url=False)]
        raise ValidationError.from_exception_data(cls.__name__, found)


def _as_details(item: Any) -> InitErrorDetails:
    """Make an error that is raised again from one that was found."""
    message = item["msg"].replace("{", "{{").replace("}", "}}")
    return InitErrorDetails(type=PydanticCustomError(item["type"], message), loc=item["loc"], input=item["input"])


_WHOLE = ("coef_schedules",)
# Two names of one field: the one given above replaces the other below.
_SAME = {"mixer": "mixers", "mixers": "mixer"}
_SAME |= {"recompute": "recompute_activations", "recompute_activations": "recompute"}


def merge(below: dict[str, Any], above: dict[str, Any], is_one_layer: bool = False) -> dict[str, Any]:
    """Merge two nested mappings; if both have a value, the one of `above` counts.

    A schedule is one value: points of one file make no sense among the points of another. An empty section of `above`
    says nothing, so that the section of `below` stays.

    Args:
        below: Values of a layer, such as a file.
        above: Values of a layer that overrides it, such as the command line.
        is_one_layer: Whether both are parts of one layer: then two names of one field both stay, and are refused later.
    """
    merged = {key: value for key, value in below.items() if is_one_layer or _SAME.get(key) not in above or key in above}
    for key, value in above.items():
        old = merged.get(key)
        if key in _WHOLE or not isinstance(old, dict):
            merged[key] = value
        elif value is not None:
            merged[key] = merge(old, value, is_one_layer) if isinstance(value, dict) else value
    return merged


def field_values(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field of a configuration's plain values with its dotted name; an empty mapping is a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from field_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
