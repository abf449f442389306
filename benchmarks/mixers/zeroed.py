"""A mixer whose output is multiplied by zero: what a hybrid is without it. It is a part of this benchmark only.

The folder `parts` beside this file names it as an installed package would: it is found where that is on the path.

Legend: B batch, S sequence, D hidden_size.
"""

from typing import Any

from torch import Tensor

from moe_train.config.base import Section
from moe_train.config.model import ModelConfig
from moe_train.config.parts import read_section
from moe_train.config.registry import load_part
from moe_train.model.cost import MixerCost
from moe_train.model.decode_state import CacheSpec, DecodeState
from moe_train.model.mixers.base import Mixer, MixerContext, MixerKind, MixerSpec, Shared


class ZeroedConfig(Section):
    """Settings of the zeroed mixer."""

    of: str = "rwkv4"
    """Mixer whose output is multiplied by zero, with its usual settings."""


class ZeroedMixer(Mixer):
    """Another mixer, computed and trained as ever, times zero."""

    def __init__(self, inner: Mixer) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, Shared]:
        y_BSD, shared = self.inner(x_BSD, context)
        return y_BSD * 0, shared

    def new_state(self, spec: CacheSpec) -> DecodeState | None:
        return self.inner.new_state(spec)

    def warm_up(self, share: float) -> None:
        self.inner.warm_up(share)


def _inside(spec: MixerSpec) -> tuple[MixerKind, MixerSpec]:
    """Kind and settings of the mixer inside, which sees its own name in the pattern."""
    name = spec.section.of
    names = tuple(name if each == "zeroed" else each for each in spec.model.mixers)
    model = spec.model.model_copy(update={"mixers": names})
    kind: MixerKind = load_part("mixers", name)
    section = read_section(kind.section, None, f"model.{name}")
    return kind, MixerSpec(model, section, spec.layer, spec.output_std)


def _build(spec: MixerSpec) -> ZeroedMixer:
    kind, inner = _inside(spec)
    return ZeroedMixer(kind.build(inner))


def _state_bytes(spec: MixerSpec, length: int, element_bytes: int) -> int:
    kind, inner = _inside(spec)
    return kind.state_bytes(inner, length, element_bytes)


def _flops(spec: MixerSpec, length: int) -> float:
    kind, inner = _inside(spec)
    return kind.flops(inner, length)


def _cost(spec: MixerSpec) -> MixerCost:
    kind, inner = _inside(spec)
    return kind.cost(inner)


def _shapes(model: ModelConfig, section: Any) -> dict[str, Any]:
    del model
    return {"model.zeroed.of": section.of}


KIND = MixerKind(
    build=_build,
    state_bytes=_state_bytes,
    flops=_flops,
    cost=_cost,
    section=ZeroedConfig,
    shapes=_shapes,
)
