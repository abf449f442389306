"""Decode states: what a model remembers of a sequence while it decodes, one state per layer that remembers something.

A state can go back: `snapshot` marks a place, `restore` returns to it, and `keep` returns to it and takes in the first
tokens since then, a given number for each row. So tokens can be proposed, checked, and kept in part.

Legend: B batch, S new tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheSpec:
    """Sizes of the states, which are allocated before the first token.

    Attributes:
        batch_size: Sequences that are decoded together.
        max_length: Most tokens of one sequence, padding included.
        dtype: dtype of cached keys and values: bf16 and fp32 are usual, whatever the model computes in. Recurrent
            states are at least fp32.
        device: Device of the model.
    """

    batch_size: int
    max_length: int
    dtype: torch.dtype
    device: torch.device


class DecodeState(Protocol):
    """A layer's memory of the sequence. Only the layer knows what the state takes in and returns."""

    def snapshot(self) -> Any:
        """Mark this place.

        A mark is void once an earlier mark is restored. Only tokens since the newest mark can be kept.
        """

    def restore(self, mark: Any) -> None:
        """Forget every token since the mark; the mark can be restored again."""

    def keep(self, mark: Any, counts_B: Tensor) -> None:
        """Forget every token since the mark but the first counts_B of each row.

        Args:
            mark: Newest mark.
            counts_B: int64, between 0 and the number of tokens since the mark.
        """

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""


Tensors = dict[str, Tensor]
"""Named tensors [B, ...], whose values are never changed in place."""


class RecurrentState:
    """A decode state of named tensors that stand for the whole past, with the function that takes in new tokens.

    Training runs the same function from an empty state. It never writes in place, so that a mark is a reference and
    copies nothing.
    """

    def __init__(self, tensors: Tensors, advance: Callable[[Tensors, Tensors, Tensor | None], tuple[Tensors, Any]]):
        """Start from an empty state.

        Args:
            tensors: Tensors of the empty state, [B, ...].
            advance: Function of a state, the new tokens' tensors [B, S, ...] and valid_BS (bool; None: all are valid).
                It returns the next state and what the layer reads at each token. A token that is not valid does not
                change the state.
        """
        self._tensors, self._advance = dict(tensors), advance
        self._since: list[Tensors] | None = None  # what came since the newest mark; None: nobody has asked for one

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors of the state, by name."""
        return self._tensors

    def append(
        self, new: Tensors, advance: Callable[[Tensors, Tensors, None], tuple[Tensors, Any]] | None = None
    ) -> Any:
        """Take in new tokens and return what the layer reads at each of them.

        Args:
            new: Tensors [B, S, ...] of S new tokens.
            advance: The state's own function, with what it forms from the tokens alone, such as blocks, already formed
                for all layers; None: the state's own.
        """
        self._tensors, read = (advance or self._advance)(self._tensors, new, None)
        if self._since is not None:
            self._since.append(new)
        return read

    def snapshot(self) -> Tensors:
        self._since = []
        return self._tensors

    def restore(self, mark: Tensors) -> None:
        self._tensors, self._since = mark, [] if self._since is not None else None

    def keep(self, mark: Tensors, counts_B: Tensor) -> None:
        assert self._since is not None, "there is a mark"
        since, self._since = self._since, []
        self._tensors = mark
        if since:
            new = {name: torch.cat([part[name] for part in since], dim=1) for name in since[0]}
            length = next(iter(new.values())).shape[1]
            valid_BS = torch.arange(length, device=counts_B.device) < counts_B.unsqueeze(1)
            self._tensors, _ = self._advance(mark, new, valid_BS)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())


class StateGroup:
    """Several decode states of one layer by name, such as a window of keys beside a compressive memory."""

    def __init__(self, **states: DecodeState) -> None:
        self.states: dict[str, DecodeState] = dict(states)

    def __getitem__(self, name: str) -> Any:
        return self.states[name]

    def snapshot(self) -> dict[str, Any]:
        return {name: state.snapshot() for name, state in self.states.items()}

    def restore(self, mark: Mapping[str, Any]) -> None:
        for name, state in self.states.items():
            state.restore(mark[name])

    def keep(self, mark: Mapping[str, Any], counts_B: Tensor) -> None:
        for name, state in self.states.items():
            state.keep(mark[name], counts_B)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())


@dataclass(frozen=True)
class LayerStates:
    """Decode states of one block.

    Attributes:
        mixer: State of the mixer; None: it remembers nothing of its own.
        feed_forward: State of the feed-forward layer; None: it remembers nothing.
    """

    mixer: DecodeState | None = None
    feed_forward: DecodeState | None = None

    @property
    def all(self) -> tuple[DecodeState, ...]:
        """States of the block that are not None."""
        return tuple(state for state in (self.mixer, self.feed_forward) if state is not None)


class Cache:
    """Decode states of all layers of a model."""

    def __init__(self, layers: Sequence[LayerStates]) -> None:
        self._layers = tuple(layers)

    def layer(self, layer: int) -> LayerStates:
        """Return the states of a layer."""
        return self._layers[layer]

    def below(self, layer: int) -> "Cache":
        """Return the cache of the layers below one: the same states, not copies."""
        return Cache(self._layers[:layer])

    @property
    def layers_with_state(self) -> tuple[int, ...]:
        """Indices of the layers that remember something."""
        return tuple(layer for layer, states in enumerate(self._layers) if states.all)

    def snapshot(self) -> tuple[Any, ...]:
        """Mark the place of every state, for example before tokens that may be rejected."""
        return tuple(state.snapshot() for state in self._states)

    def restore(self, marks: Sequence[Any]) -> None:
        """Forget every token since the marks."""
        for state, mark in zip(self._states, marks, strict=True):
            state.restore(mark)

    def keep(self, marks: Sequence[Any], counts_B: Tensor) -> None:
        """Forget every token since the marks but the first counts_B of each row.

        Args:
            marks: Marks of the newest `snapshot`.
            counts_B: int64, between 0 and the number of tokens since the marks.
        """
        for state, mark in zip(self._states, marks, strict=True):
            state.keep(mark, counts_B)

    @property
    def nbytes(self) -> int:
        """Allocated bytes, over all layers."""
        return sum(state.nbytes for state in self._states)

    @property
    def _states(self) -> list[DecodeState]:
        return [state for states in self._layers for state in states.all]
