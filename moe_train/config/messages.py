"""Messages for validation errors: each names its field and value, and what would be right."""

import difflib
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError


def describe_errors(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Describe all errors of a validation in one message.

    Args:
        error: Error of the validation.
        model: Class of the validated section.
        prefix: Dotted name of the section in the whole configuration; "": it is the whole configuration.
    """
    return "; ".join(_describe(item, model, prefix) for item in error.errors())


def _describe(error: Any, model: type[BaseModel], prefix: str) -> str:
    # Parts of a union's branch names ("int", "literal['auto']") are not field names.
    path = [part for part in error["loc"] if isinstance(part, int) or part.isidentifier()]
    path = [part for part in path if part not in ("int", "float", "bool", "str", "constrained")]
    name = ".".join(str(part) for part in [*([prefix] if prefix else []), *path])
    if error["type"] == "extra_forbidden":
        value = error["input"]
        known = _fields_at(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {name} (value {value!r}); {hint}"
    if error["type"] == "missing":
        required = _fields_at(model, path, only_required=True)
        name = ".".join([name, *required[:1]])
        return f"{name} is missing: give it as --{name}=... or in the configuration file"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name} ({error['input']!r}): {message}"


def _fields_at(section: type[BaseModel], path: list[Any], only_required: bool = False) -> list[str]:
    for part in path:
        if isinstance(part, int):  # a place in a list of sections
            continue
        annotation: Any = section.model_fields[part].annotation if part in section.model_fields else None
        if get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return [name for name, field in section.model_fields.items() if field.is_required() or not only_required]
