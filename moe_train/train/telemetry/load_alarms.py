"""Alarms about experts that are not used: a warning is given once, and again only after its cause was over."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from moe_train.config.moe import MoEConfig
from moe_train.config.run import TelemetryConfig
from moe_train.train.telemetry.records import Record, by_layer, expert_counts, layer_name

_MOST_NAMED = 8  # experts of a layer in one warning


@dataclass(frozen=True)
class Bounds:
    """Bounds of expert load, outside of which there are warnings.

    Attributes:
        dead_after_steps: Steps without a token after which an expert is dead.
        max_violation: Upper bound of MaxVio.
        entropy: Lower bound of a router's mean entropy, in nats.
        after_steps: Steps for which MaxVio or the entropy must be out of bounds before a warning.
    """

    dead_after_steps: int
    max_violation: float
    entropy: float
    after_steps: int

    @classmethod
    def of(cls, telemetry: TelemetryConfig, moe: MoEConfig) -> Self:
        """Make the bounds of a configuration."""
        violation = telemetry.max_violation_alarm
        if violation is None:
            violation = min(2.0, (moe.num_experts / moe.top_k - 1) / 2)
        entropy = telemetry.entropy_alarm * math.log(moe.num_experts)
        return cls(telemetry.dead_after_steps, violation, entropy, telemetry.alarm_after_steps)


class LoadAlarms:
    """Alarms of a run, which depend on its records alone: after resuming, the old records bring them up to date."""

    def __init__(self, layers: Sequence[int], bounds: Bounds, records: Iterable[Record] = ()) -> None:
        """Start from the records of the run so far.

        Args:
            layers: Index in the model of each MoE layer.
            bounds: Bounds of expert load.
            records: Records of the run so far; their warnings have been given already.
        """
        self._layers, self._bounds = tuple(layers), bounds
        self._lasting: dict[tuple[str, int, int], int] = {}  # steps for which a (kind, layer, expert) has had its fault
        self._over: dict[tuple[str, int, int], int] = {}  # steps for which a fault that was warned of has been over
        self._said: set[tuple[str, int, int]] = set()
        for record in records:
            if "moe/steps" in record:
                self.observe(record)

    def begun_anew(self, records: Iterable[Record]) -> "LoadAlarms":
        """Make alarms with the same layers and bounds from other records."""
        return LoadAlarms(self._layers, self._bounds, records)

    def observe(self, record: Record) -> list[str]:
        """Take in a record, and return the warnings that are due now."""
        steps, warnings = record["moe/steps"], []
        for layer, counts in expert_counts(record).items():
            dead = {
                expert: self._lasting[place]
                for expert, count in enumerate(counts)
                if self._begins(place := ("dead", layer, expert), count == 0, steps, self._bounds.dead_after_steps)
            }
            if dead:
                warnings.append(f"layer {layer:02d}, {_name(list(dead))}: no token for {min(dead.values())} steps")
            warnings += self._observe_layer(layer, record, counts, steps)
        return warnings

    def _observe_layer(self, layer: int, record: Record, counts: list[int], steps: int) -> list[str]:
        # A figure that was not finite is None in an old record, and does not count.
        violation, entropy = (record[layer_name(f"moe/{name}", layer)] for name in ("max_violation", "router_entropy"))
        busiest, bounds = max(range(len(counts)), key=counts.__getitem__), self._bounds
        warnings = []
        is_high = violation is not None and violation > bounds.max_violation
        if self._begins(place := ("violation", layer, 0), is_high, steps, bounds.after_steps):
            warnings.append(
                f"layer {layer:02d}, expert {busiest}: {violation + 1:.2f} times the mean tokens; MaxVio has been over "
                f"{bounds.max_violation:g} for {self._lasting[place]} steps"
            )
        is_low = entropy is not None and entropy < bounds.entropy
        if self._begins(place := ("entropy", layer, 0), is_low, steps, bounds.after_steps):
            warnings.append(
                f"layer {layer:02d}, expert {busiest} above all: the router's entropy is {entropy:.3f} nats a token, "
                f"and has been under {bounds.entropy:.3f} for {self._lasting[place]} steps"
            )
        return warnings

    def dead_experts(self) -> Record:
        """Count the dead experts of the worst layer and of each layer, as moe/dead_experts in a record."""
        numbers = dict.fromkeys(self._layers, 0)
        for (kind, layer, _), lasting in self._lasting.items():
            if kind == "dead" and lasting >= self._bounds.dead_after_steps:
                numbers[layer] += 1
        worst = max(numbers.values())
        return {"moe/dead_experts": worst, **by_layer("moe/dead_experts", list(numbers.values()), self._layers)}

    def _begins(self, place: tuple[str, int, int], is_so: bool, steps: int, due: int) -> bool:
        """Return whether a fault has now lasted long enough for a warning that was not given yet.

        The warning can be given again once the fault has been over for as long.
        """
        mine, other = (self._lasting, self._over) if is_so else (self._over, self._lasting)
        other.pop(place, None)
        if not is_so and place not in self._said:
            return False
        mine[place] = mine.get(place, 0) + steps
        if mine[place] < due:
            return False
        if not is_so:
            self._said.discard(place)
            del self._over[place]
            return False
        is_new = place not in self._said
        self._said.add(place)
        return is_new


def _name(experts: list[int]) -> str:
    """Name some experts by their numbers."""
    if len(experts) == 1:
        return f"expert {experts[0]}"
    shown = ", ".join(str(expert) for expert in experts[:_MOST_NAMED])
    more = f" and {len(experts) - _MOST_NAMED} more" if len(experts) > _MOST_NAMED else ""
    return f"experts {shown}{more}"
