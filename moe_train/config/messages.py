"""Messages for validation errors: each names its field and value, and what would be right."""

import difflib
import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from moe_train.config.errors import one_line
from moe_train.config.values import plain_types

# What pydantic says of Python's types, in the words of a file.
_WORDS = {
    "tuple_type": "must be a list, such as [a, b]",
    "model_type": "must be a mapping: the settings of a section",
    "dict_type": "must be a mapping",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    "int_parsing_size": "is beyond the whole numbers of 64 bits",
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
}
_values = reprlib.Repr()
_values.maxstring = _values.maxother = _values.maxlong = 120


def describe_errors(
    error: ValidationError,
    model: type[BaseModel],
    prefix: str = "",
    origin_of: Callable[[Sequence[str | int]], str] = lambda path: "",
) -> str:
    """Describe all errors of a validation in one message.

    Args:
        error: Error of the validation.
        model: Class of the validated section.
        prefix: Dotted name of the section in the whole configuration; "": it is the whole configuration.
        origin_of: Called with the keys that lead to a bad value; returns the files or the option that it comes from,
            or "". It is said once for errors in a row that share it.
    """
    texts, last = [], ""
    for item in error.errors():
        path, section = _field_path(model, item["loc"])
        name = ".".join(str(part) for part in [*([prefix] if prefix else []), *path])
        text, origin = _describe(item, path, section, name), origin_of(path)
        if origin == f"--{name}":
            text, origin = f"--{text}", ""
        texts.append(f"{origin}: {text}" if origin and origin != last else text)
        last = origin
    return one_line("; ".join(texts))


def _describe(error: Any, path: Sequence[str | int], section: type[BaseModel], name: str) -> str:
    value = _values.repr(error["input"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {name} (value {value}); {_hint(str(path[-1]), section)}"
    if error["type"] == "missing":
        inner = section.model_fields[str(path[-1])].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            name = ".".join([name, *_fields(inner, only_required=True)[:1]])
        return f"{name} is missing: give it as --{name}=... or in the configuration file"
    message = _WORDS.get(error["type"], error["msg"].removeprefix("Value error, "))
    message = re.sub(r"^Input should be (a valid )?", lambda found: "must be a " if found[1] else "must be ", message)
    if error["type"] == "value_error":
        return f"{name}: {message}" if name else message
    if error["input"] is None:
        message = f"has no value; give one, or leave the key out for its default: {message}"
    elif error["type"] == "string_type" and isinstance(error["input"], bool | int | float):
        message += "; put quotes around it"
    return f"{name} ({value}): {message}"


def _hint(key: str, section: type[BaseModel]) -> str:
    known = _fields(section)
    first, dot, rest = key.partition(".")
    if dot and first in known:
        return f"did you mean {first}: {{{rest.replace('.', ': {')}: ...{'}' * (rest.count('.') + 1)}?"
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def _field_path(section: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str | int], type[BaseModel]]:
    """Find the keys in an error's location, which also names branches of unions, and the section of the last key."""
    path: list[str | int] = []
    annotation: Any = section
    for part in location:
        types = [kind for kind in plain_types(annotation) if get_origin(kind) in (tuple, dict) or _is_section(kind)]
        if not types:
            break  # what follows is the name of a type, such as "int"
        kind = types[0]
        if _is_section(kind):
            section = kind
            field = section.model_fields.get(str(part))
            annotation = field.annotation if field is not None else None
        elif get_origin(kind) is tuple and not isinstance(part, int):
            break
        else:
            annotation = get_args(kind)[-1 if get_origin(kind) is dict else 0]
        path.append(part)
    return path, section


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _fields(section: type[BaseModel], only_required: bool = False) -> list[str]:
    return [name for name, field in section.model_fields.items() if field.is_required() or not only_required]
