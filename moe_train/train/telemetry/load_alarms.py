"""Alarms about experts that are not used, and routers that choose at random.

A warning is given once, and again only after its cause was over.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from moe_train.config.moe import MoEConfig
from moe_train.config.run import TelemetryConfig
from moe_train.train.telemetry.records import Record, by_layer, expert_counts, layer_name

_MOST_NAMED = 8  # experts of a layer in one warning
_HELP = "smaller balance weights (model.moe.*_coef) or a larger optim.router_lr_factor let it learn"


@dataclass(frozen=True)
class Bounds:
    """Bounds of expert load, outside of which there are warnings.

    Attributes:
        dead_after_steps: Steps without a token after which an expert is dead.
        max_violation: Upper bound of MaxVio.
        entropy: Lower bound of a router's mean entropy, in nats.
        after_steps: Steps for which a figure must be out of bounds before a warning.
        kappa: Lower bound of moe/clean_kappa.
        information: Lower bound of val/expert_information; 0 if every token goes to every expert.
        warmup_steps: Steps of the learning rate's warm-up, in which routers may choose at random.
    """

    dead_after_steps: int
    max_violation: float
    entropy: float
    after_steps: int
    kappa: float = 0.0
    information: float = 0.0
    warmup_steps: int = 0

    @classmethod
    def of(cls, telemetry: TelemetryConfig, moe: MoEConfig, warmup_steps: int) -> Self:
        """Make the bounds of a configuration, and of the warm-up's steps."""
        violation = telemetry.max_violation_alarm
        if violation is None:
            violation = min(2.0, (moe.num_experts / moe.top_k - 1) / 2)
        entropy = telemetry.entropy_alarm * math.log(moe.num_experts)
        return cls(
            telemetry.dead_after_steps,
            violation,
            entropy,
            telemetry.alarm_after_steps,
            kappa=telemetry.kappa_alarm,
            information=telemetry.information_alarm if moe.top_k < moe.num_experts else 0.0,
            warmup_steps=warmup_steps,
        )


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
        self._validated = bounds.warmup_steps  # last step that a validation was judged at
        for record in records:
            if "moe/steps" in record:
                self.observe(record)
            if "val/expert_information" in record:
                self.observe_validation(record)

    def begun_anew(self, records: Iterable[Record]) -> "LoadAlarms":
        """Make alarms with the same layers and bounds from other records."""
        return LoadAlarms(self._layers, self._bounds, records)

    def observe_validation(self, record: Record) -> list[str]:
        """Take in a record of a validation, and return the warnings that are due now."""
        steps, bound = record["step"] - self._validated, self._bounds.information
        if steps <= 0:
            return []
        self._validated, warnings = record["step"], []
        for layer in self._layers:
            known = record.get(layer_name("val/expert_information", layer))
            information = bound if known is None else known  # None: it was not finite
            is_low = information < bound
            if self._begins(place := ("information", layer, 0), is_low, steps, self._bounds.after_steps):
                warnings.append(
                    f"layer {layer:02d} routes at random: a token's id explains {max(0.0, information):.1%} of the "
                    f"choice of experts on held-out text, under {bound:.1%} for {self._lasting[place]} steps: {_HELP}"
                )
        return warnings

    def observe(self, record: Record) -> list[str]:
        """Take in a record of training, and return the warnings that are due now."""
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
        kappa = record.get(layer_name("moe/clean_kappa", layer))
        is_random = kappa is not None and kappa < bounds.kappa and record["step"] > bounds.warmup_steps
        if self._begins(place := ("kappa", layer, 0), is_random, steps, bounds.after_steps):
            agreement = record[layer_name("moe/clean_agreement", layer)]
            warnings.append(
                f"layer {layer:02d} routes at random: without its noise the router would choose {agreement:.1%} of the "
                f"same experts (kappa {kappa:.2f}: dice have 0), under {bounds.kappa:g} for {self._lasting[place]} "
                f"steps: {_HELP}"
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
