"""Warnings of experts that are not used: said once when they begin, and again only after they were over."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from moe_train.config.moe import MoEConfig
from moe_train.config.run import TelemetryConfig
from moe_train.train.records import Record, by_layer, expert_counts, layer_name


@dataclass(frozen=True)
class Bounds:
    """What is out of order.

    Attributes:
        dead_after_steps: Steps without a token after which an expert is dead.
        max_violation: MaxVio above this is.
        entropy: Mean entropy of a router below this is, nats.
        after_steps: Steps that MaxVio or the entropy must be out of bounds for.
    """

    dead_after_steps: int
    max_violation: float
    entropy: float
    after_steps: int

    @classmethod
    def of(cls, telemetry: TelemetryConfig, moe: MoEConfig) -> Self:
        """The bounds of a configuration."""
        violation = telemetry.max_violation_alarm
        if violation is None:
            violation = min(2.0, (moe.num_experts / moe.top_k - 1) / 2)
        entropy = telemetry.entropy_alarm * math.log(moe.num_experts)
        return cls(telemetry.dead_after_steps, violation, entropy, telemetry.alarm_after_steps)


class ExpertWatch:
    """Follows the records of a run and depends on nothing else: after resuming, the old ones bring it up to date."""

    def __init__(self, layers: Sequence[int], bounds: Bounds, records: Iterable[Record] = ()) -> None:
        """Begin.

        Args:
            layers: Index of each MoE layer in the model.
            bounds: What is out of order.
            records: Of the run so far; what they would warn of has been said.
        """
        self._layers, self._bounds = tuple(layers), bounds
        self._lasting: dict[tuple[str, int, int], int] = {}  # steps that a (kind, layer, expert) has been so for
        self._said: set[tuple[str, int, int]] = set()
        for record in records:
            if "moe/steps" in record:
                self.observe(record)

    def observe(self, record: Record) -> list[str]:
        """Take in a record; returns what has just become worth a warning."""
        steps, warnings = record["moe/steps"], []
        for layer, counts in expert_counts(record).items():
            for expert, count in enumerate(counts):
                lasting = self._last("dead", layer, expert, count == 0, steps)
                if self._is_new("dead", layer, expert, lasting >= self._bounds.dead_after_steps):
                    warnings.append(f"layer {layer:02d}, expert {expert}: no token for {lasting} steps")
            warnings += self._observe_layer(layer, record, counts, steps)
        return warnings

    def _observe_layer(self, layer: int, record: Record, counts: list[int], steps: int) -> list[str]:
        violation, entropy = (record[layer_name(f"moe/{name}", layer)] for name in ("max_violation", "router_entropy"))
        busiest, after = max(range(len(counts)), key=counts.__getitem__), self._bounds.after_steps
        warnings = []
        lasting = self._last("violation", layer, 0, violation > self._bounds.max_violation, steps)
        if self._is_new("violation", layer, 0, lasting >= after):
            warnings.append(
                f"layer {layer:02d}, expert {busiest}: {violation + 1:.2f} times the mean tokens; MaxVio has been over "
                f"{self._bounds.max_violation:g} for {lasting} steps"
            )
        lasting = self._last("entropy", layer, 0, entropy < self._bounds.entropy, steps)
        if self._is_new("entropy", layer, 0, lasting >= after):
            warnings.append(
                f"layer {layer:02d}, expert {busiest} above all: the router's entropy is {entropy:.3f} nats a token, "
                f"and has been under {self._bounds.entropy:.3f} for {lasting} steps"
            )
        return warnings

    def dead_experts(self) -> Record:
        """moe/dead_experts: experts without a token for long enough, in the worst layer and by layer."""
        numbers = [
            sum(
                kind == "dead" and here == layer and lasting >= self._bounds.dead_after_steps
                for (kind, here, _), lasting in self._lasting.items()
            )
            for layer in self._layers
        ]
        return {"moe/dead_experts": max(numbers), **by_layer("moe/dead_experts", numbers, self._layers)}

    def _last(self, kind: str, layer: int, expert: int, is_so: bool, steps: int) -> int:
        """Steps that it has been so for, those of this record included."""
        place = (kind, layer, expert)
        if is_so:
            self._lasting[place] = self._lasting.get(place, 0) + steps
        else:
            self._lasting.pop(place, None)
        return self._lasting.get(place, 0)

    def _is_new(self, kind: str, layer: int, expert: int, is_due: bool) -> bool:
        place = (kind, layer, expert)
        if not is_due:
            # What is over may be said again.
            self._said.discard(place)
            return False
        if place in self._said:
            return False
        self._said.add(place)
        return True
