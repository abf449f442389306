"""A user's model with fewer layers and shorter windows, as plain values, for the short runs of parity."""

from typing import Any


def cut_patterns(model: dict[str, Any], layers: int) -> None:
    """Keep of patterns over layers what the first layers have.

    Args:
        model: Values of the model section; changed in place.
        layers: Number of layers that are kept.
    """
    for name in ("mixers", "window_pattern"):
        pattern = model[name]
        if pattern is not None and layers % len(pattern):
            model[name] = [pattern[layer % len(pattern)] for layer in range(layers)]
            for left in set(pattern) - set(model[name]) if name == "mixers" else ():
                model.pop(left, None)  # its settings


def narrow_windows(model: dict[str, Any], length: int) -> None:
    """Make windows that would not matter half as long as the sequences, so that their layers are compared too.

    Args:
        model: Values of the model section; changed in place.
        length: Tokens of a sequence.
    """

    def narrowed(window: int | None) -> int | None:
        return window if window is None or window < length else length // 2

    model["sliding_window"] = narrowed(model["sliding_window"])
    if model["window_pattern"] is not None:
        model["window_pattern"] = [narrowed(window) for window in model["window_pattern"]]
