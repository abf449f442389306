"""DeepSpeed's reading of its configuration: what it refuses, and what it passes over in silence, is an error here."""

import difflib
import reprlib
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from moe_train.config.errors import UsageError


class _Read(dict[str, Any]):
    """A mapping that knows which keys were asked for; a shallow copy of it, as DeepSpeed makes one, tells it too."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, and note that it was asked for."""
        self.asked.add(key)
        return super().get(key, default)


def read_by_deepspeed(settings: dict[str, Any]) -> DeepSpeedConfig:
    """Let DeepSpeed read its configuration.

    Args:
        settings: DeepSpeed's configuration, from `deepspeed_settings`.

    Raises:
        UsageError: If DeepSpeed refuses a value, or does not read a key: it says nothing of keys that it does not know.

    Collective: No, but the process group must be there: DeepSpeed asks for its size.
    """
    values = _Read(settings)
    try:
        config = DeepSpeedConfig(values)
    except Exception as error:  # whatever DeepSpeed raises for a value that it cannot read
        raise UsageError(_describe(settings, error)) from error
    for key, value in settings.items():
        if key not in values.asked:
            near = difflib.get_close_matches(key, values.asked, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"deepspeed.{key} ({value!r}) has no effect: DeepSpeed does not read this key{hint}")
    return config


def _describe(settings: dict[str, Any], error: Exception) -> str:
    """Describe why DeepSpeed cannot read its configuration, with the key without which it could."""
    culprits = [key for key in settings if _is_read({name: settings[name] for name in settings if name != key})]
    key, value = (f".{culprits[0]}", settings[culprits[0]]) if culprits else ("", settings)
    words = f"{type(error).__name__}: {error}"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        key, value, words = ".".join([key, *(str(part) for part in first["loc"])]), first["input"], first["msg"]
    return f"deepspeed{key} ({reprlib.repr(value)}): DeepSpeed cannot read this: {' '.join(words.split())}"


def _is_read(settings: dict[str, Any]) -> bool:
    try:
        DeepSpeedConfig(settings)
    except Exception:  # as above
        return False
    return True
