"""What a written value means for the type of its field: in a file, on the command line and in Python alike."""

import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

_SWITCH_WORDS = ("yes", "no", "on", "off", "true", "false", "y", "n")
_MOST_DIGITS = 19  # of a whole number: those of an int64
_TOO_LARGE = "is beyond the whole numbers of 64 bits"


def plain_types(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation allows, without bounds: of `PositiveInt | None`, int and NoneType."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from plain_types(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for each in get_args(annotation):
            yield from plain_types(each)
    else:
        yield annotation


def read_value(value: Any, annotation: Any) -> Any:
    """Read a value as the type of its field needs it.

    Args:
        value: Value as given.
        annotation: Type of the field.

    Returns:
        The value: for a whole number, the text 1e3 is 1000; for a section or mapping, None (every key below it is
        commented out) has no keys. A value that no rule is for stays as it is.

    Raises:
        PydanticCustomError: If the value would be misread: a switch or a leading zero for a number, a whole number
            beyond an int64.
    """
    types = list(plain_types(annotation))
    mapping = next((each for each in types if is_mapping(each)), None)
    if mapping is not None and value is None and type(None) not in types:
        return {}
    if isinstance(value, dict) and get_origin(mapping) is dict:
        return {name: read_value(each, get_args(mapping)[1]) for name, each in value.items()}
    if isinstance(value, list | tuple):
        lists = [each for each in types if get_origin(each) is tuple and get_args(each)[-1] is Ellipsis]
        # An item without keys is more likely forgotten than meant.
        return [each if each is None else read_value(each, get_args(lists[0])[0]) for each in value] if lists else value
    if bool in types or not (int in types or float in types):
        return value
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _SWITCH_WORDS):
        raise PydanticCustomError("misread", "must be a number, and this is a switch; write 1 or 0 if that is meant")
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?0[0-9_]+\s*", value):
        raise PydanticCustomError(
            "misread", "must be a number without a leading zero, which some programs read as octal: write it without"
        )
    if float in types:
        return value
    value = _whole(value) if isinstance(value, str) else value
    if isinstance(value, int | float) and abs(value) >= 2**63:
        raise PydanticCustomError("misread", _TOO_LARGE)
    return value


def is_mapping(kind: Any) -> bool:
    """Return whether a type is a section, or a mapping without a schema."""
    return get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, BaseModel))


def _whole(text: str) -> int | str:
    """Read a whole number in any notation, 1e3 or 0x10; text that is none stays text."""
    try:
        if re.fullmatch(r"\s*0x[0-9a-fA-F]+\s*", text):
            return int(text, 16)
        number = Decimal(text.strip())
    except InvalidOperation:
        return text
    if number.is_finite() and number and number.adjusted() >= _MOST_DIGITS:
        raise PydanticCustomError("misread", _TOO_LARGE)
    is_whole = number.is_finite() and number == number.to_integral_value()
    return int(number) if is_whole else text
