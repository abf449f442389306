"""The settings of parts: validated by the part's own section, once the part has been imported."""

from typing import Any, TypeVar

from pydantic import ValidationError

from moe_train.config.base import Section
from moe_train.config.errors import UsageError
from moe_train.config.messages import describe_errors

OwnSection = TypeVar("OwnSection", bound=Section)


def read_section(section: type[OwnSection] | None, values: dict[str, Any] | None, field: str) -> OwnSection | None:
    """A part's own settings.

    Args:
        section: Their names, types and defaults; None: the part has none.
        values: As given; None: nothing is.
        field: Where they stand in the configuration, for messages.

    Raises:
        UsageError: Naming each wrong setting and its value.
    """
    if section is None:
        if values:
            raise UsageError(f"{field} ({values!r}) has no effect: it has no settings")
        return None
    try:
        return section.model_validate(values or {})
    except ValidationError as error:
        raise UsageError(describe_errors(error, section, field)) from error
