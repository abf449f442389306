"""What the checks of all mixers have in common: a layer built through the registry, and its streaming in parts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_train.config.model import ModelConfig
from moe_train.model.build import feed_forward_of, mixer_of
from moe_train.model.decode_state import CacheSpec
from moe_train.model.mixers.base import MixerContext, Shared
from moe_train.model.parameters import materialize
from moe_train.model.token_index import TokenIndex, document_offsets

Vector = Mapping[str, Any]
Quantity = tuple[str, Tensor, Tensor]
"""Name of a quantity, ours, and theirs."""


def numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def build_mixer(model: dict[str, Any], layer: int, values: Mapping[str, Any], names: Mapping[str, str]) -> nn.Module:
    """Build the mixer of a layer through the registry, in fp64, with given weights.

    Args:
        model: Model section of the configuration.
        layer: Index of the layer.
        values: Weights by the names of the file.
        names: Parameters by the names of the file; a name that is not there is the parameter's own.
    """
    kind, spec = mixer_of(ModelConfig.model_validate(model), layer)
    with torch.device("meta"):
        mixer = kind.build(spec)
    return with_weights(mixer, values, names)


def build_channel_mix(
    model: dict[str, Any], layer: int, values: Mapping[str, Any], names: Mapping[str, str]
) -> nn.Module:
    """Build the dense feed-forward layer of a layer through the registry, as `build_mixer` does."""
    kind, spec = feed_forward_of(ModelConfig.model_validate(model), layer)
    with torch.device("meta"):
        feed_forward = kind.build(spec)
    return with_weights(feed_forward, values, names)


def with_weights(module: nn.Module, values: Mapping[str, Any], names: Mapping[str, str]) -> nn.Module:
    """Give a module built on the meta device its weights; every parameter must be given."""
    materialize(module, seed=0, dtype=torch.float64, device=torch.device("cpu"))
    state = {names.get(name, name): numbers(value) for name, value in values.items()}
    missing = {name for name, _ in module.named_parameters()} ^ set(state)
    if missing:
        raise ValueError(f"parameters that only one side has: {sorted(missing)}")
    module.load_state_dict(state, strict=False)  # buffers keep their first values
    return module.eval()


@dataclass(frozen=True)
class Sequence:
    """A sequence, alone in its row: x [1, S, D], and the documents in it, or None."""

    x_1SD: Tensor
    documents_1S: Tensor | None

    @staticmethod
    def of(vector: Vector) -> "Sequence":
        documents = vector["documents"]
        return Sequence(numbers(vector["x"])[None], None if documents is None else torch.tensor(documents)[None])

    @property
    def length(self) -> int:
        return self.x_1SD.shape[1]

    def context(self, start: int, end: int, layer: int, shared: Shared, state: Any) -> MixerContext:
        positions_1S = torch.arange(self.length)[None]
        offsets_1S = positions_1S if self.documents_1S is None else document_offsets(self.documents_1S)
        documents_1S = None if self.documents_1S is None else self.documents_1S[:, start:end]
        columns = slice(start, end)
        index = TokenIndex(
            positions_1S[:, columns],
            offsets_1S[:, columns],
            documents_1S,
            positions_1S[:, columns],
            first_position=start,
        )
        return MixerContext(layer, index, {name: part[:, columns] for name, part in shared.items()}, state)


def splits(length: int) -> Iterator[list[int]]:
    """The ends of parts: one by one, and random ones."""
    yield list(range(1, length + 1))
    generator = torch.Generator().manual_seed(length)
    for _ in range(4):
        yield [*torch.randperm(length - 1, generator=generator)[: length // 3].add(1).sort().values.tolist(), length]


@torch.no_grad()
def outputs(
    layer: nn.Module, sequence: Sequence, number: int = 0, shared: Shared | None = None
) -> Iterator[tuple[str, Tensor, Shared, Any]]:
    """Yield the layer's outputs [S, D], what it hands up and its state: of the whole sequence, then of parts."""
    handed: Shared = shared or {}
    y_1SD, found = layer(sequence.x_1SD, sequence.context(0, sequence.length, number, handed, None))
    yield "whole", y_1SD[0], found or {}, None
    for ends in splits(sequence.length):
        state = layer.new_state(CacheSpec(1, sequence.length, torch.float64, torch.device("cpu")))
        parts, start = [], 0
        for end in ends:
            context = sequence.context(start, end, number, handed, state)
            parts.append(layer(sequence.x_1SD[:, start:end], context)[0])
            start = end
        yield "parts", torch.cat(parts, dim=1)[0], {}, state


Check = Callable[[Vector], Iterator[Quantity]]
