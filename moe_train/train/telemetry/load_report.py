"""Report of how the experts shared the tokens of a run's last records, for `moe-train load` and the closing summary."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from moe_train.config.errors import UsageError
from moe_train.train.telemetry.records import ALARMS, EXPERT_FIGURES, Record, expert_counts, layer_name

LAST_STEPS = 100  # default number of steps that a report covers
_MOST_LISTED = 8  # dead experts of a layer
_BARS = "▁▂▃▄▅▆▇█"
_FULL_BAR = 2.0  # the share of the mean that a full bar is
_WIDE_BAR = 40  # characters of a full horizontal bar


@dataclass(frozen=True)
class LayerLoad:
    """Load of one MoE layer over some steps.

    Attributes:
        layer: Index of the layer in the model.
        counts: Number of assignments of every expert.
        max_violation: MaxVio of these counts.
        mean_max_violation: Mean over records of each record's MaxVio, which varies more.
        figures: Mean over steps of the other figures, by name: importance_cv2, load_cv2, router_entropy (nats per
            token), dropped_fraction, rank_overload, z_loss.
        dead: Experts without a token.
        clean_kappa: Mean moe/clean_kappa over steps; None: the routers draw no noise.
        expert_information: val/expert_information at the last validation; None: there was none.
    """

    layer: int
    counts: list[int]
    max_violation: float
    mean_max_violation: float
    figures: dict[str, float]
    dead: list[int]
    clean_kappa: float | None = None
    expert_information: float | None = None

    @property
    def entropy_share(self) -> float:
        """Mean entropy of the router's distribution over its maximum, ln E."""
        return self.figures["router_entropy"] / math.log(max(2, len(self.counts)))

    @property
    def shares(self) -> list[float]:
        """Assignments of every expert over the mean."""
        mean = max(sum(self.counts) / len(self.counts), 1e-9)
        return [count / mean for count in self.counts]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self)
        figures, dead = values.pop("figures"), values.pop("dead")
        return values | figures | {"dead_experts": dead, "shares": self.shares, "entropy_share": self.entropy_share}


@dataclass(frozen=True)
class LoadReport:
    """Load of all MoE layers over some steps.

    Attributes:
        layers: Load of each layer, with the largest max_violation first.
        max_violation: Mean over records of the worst layer's MaxVio.
        num_steps: Number of steps covered.
        num_records: Number of records that cover them.
        last_step: Last step covered.
        alarms: Warnings in those records.
    """

    layers: list[LayerLoad]
    max_violation: float
    num_steps: int
    num_records: int
    last_step: int
    alarms: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"layers": [load.as_dict() for load in self.layers]}


def expert_load(records: Sequence[Record], num_steps: int = LAST_STEPS) -> LoadReport | None:
    """Compute the load over the last records that cover num_steps steps; None: no record has figures of experts.

    Raises:
        UsageError: If the records are not those of one run.
    """
    try:
        return _load_of(records, num_steps)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(
            f"the records do not tell of experts as one run does: {type(error).__name__} {error}"
        ) from error


def _load_of(records: Sequence[Record], num_steps: int) -> LoadReport | None:
    last: list[Record] = []
    for record in reversed([record for record in records if "moe/steps" in record]):
        if sum(taken["moe/steps"] for taken in last) >= num_steps:
            break
        last.insert(0, record)
    if not last:
        return None
    covered = sum(record["moe/steps"] for record in last)
    validated = next((record for record in reversed(records) if "val/expert_information" in record), {})
    layers = [_layer_load(layer, last, validated) for layer in expert_counts(last[-1])]
    return LoadReport(
        layers=sorted(layers, key=lambda load: -load.max_violation),
        max_violation=sum(record["moe/max_violation"] or 0.0 for record in last) / len(last),
        num_steps=covered,
        num_records=len(last),
        last_step=last[-1]["step"],
        alarms=[warning for record in last for name in ALARMS for warning in record.get(name, ())],
    )


def _layer_load(layer: int, records: Sequence[Record], validated: Record) -> LayerLoad:
    counts = [sum(column) for column in zip(*(expert_counts(record)[layer] for record in records), strict=True)]
    figures = {}
    for name in EXPERT_FIGURES:
        value = _mean_over_steps([(record[layer_name(name, layer)], record["moe/steps"]) for record in records])
        figures[name.removeprefix("moe/")] = math.nan if value is None else value
    kappas = [(record.get(layer_name("moe/clean_kappa", layer)), record["moe/steps"]) for record in records]
    del figures["max_violation"]  # the report has both of its forms, under their own names
    violations = [record[layer_name("moe/max_violation", layer)] or 0.0 for record in records]
    mean = sum(counts) / len(counts)
    return LayerLoad(
        layer=layer,
        counts=counts,
        max_violation=max(counts) / mean - 1 if mean else 0.0,
        mean_max_violation=sum(violations) / len(violations),
        figures=figures,
        dead=[expert for expert, count in enumerate(counts) if count == 0],
        clean_kappa=_mean_over_steps(kappas),
        expert_information=validated.get(layer_name("val/expert_information", layer)),
    )


def _mean_over_steps(values: Sequence[tuple[float | None, int]]) -> float | None:
    """Compute the mean of values, each of some steps, without those that were not finite; None: there are none."""
    known = [(value, steps) for value, steps in values if value is not None]
    return sum(value * steps for value, steps in known) / sum(steps for _, steps in known) if known else None


def load_table(report: LoadReport, num_layers: int | None = None) -> Table:
    """Make a table with one row per layer, worst first, and one bar per expert.

    Columns that say the same of every run of the kind are left out: nothing dropped, one rank, no noise.

    Args:
        report: Load of all layers.
        num_layers: Number of worst layers to show; None: all.
    """
    table = Table(
        title=f"Tokens per expert over the last {report.num_steps} steps (a full bar: twice the mean)",
        title_justify="left",
    )
    shown = report.layers[:num_layers]
    columns: dict[str, list[str]] = {
        "layer": [f"{load.layer:02d}" for load in shown],
        "MaxVio": [f"{load.max_violation:.2f}" for load in shown],
        "least": [f"{min(load.shares):.2f}" for load in shown],
        "most": [f"{max(load.shares):.2f}" for load in shown],
        "entropy": [f"{load.entropy_share:.0%}" for load in shown],
    }
    if any(load.clean_kappa is not None for load in shown):
        columns["kappa"] = [_number(load.clean_kappa) for load in shown]
    if any(load.expert_information is not None for load in shown):
        columns["info"] = [_number(load.expert_information) for load in shown]
    if any(load.figures["dropped_fraction"] > 0 for load in shown):
        columns["dropped"] = [f"{load.figures['dropped_fraction']:.1%}" for load in shown]
    if any(load.figures["rank_overload"] > 1 for load in shown):
        columns["ranks"] = [f"{load.figures['rank_overload']:.2f}" for load in shown]
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("experts", overflow="fold")
    for load, *cells in zip(shown, *columns.values(), strict=True):
        table.add_row(*cells, load_bars(load.shares))
    dead = [f"{len(load.dead)} in layer {load.layer:02d} ({_listed(load.dead)})" for load in shown if load.dead]
    table.caption = f"dead experts: {'; '.join(dead)}" if dead else "no dead expert"
    table.caption_justify = "left"
    return table


def learning_remark(report: LoadReport, least_kappa: float, least_information: float) -> str | None:
    """Say which layers choose experts by what the tokens are, and which at random; None: it was not measured.

    Args:
        report: Load of all layers.
        least_kappa: Lower bound of kappa for a choice that is not at random.
        least_information: Lower bound of the information for such a choice.
    """
    layers = sorted(report.layers, key=lambda load: load.layer)
    measured = [load for load in layers if load.clean_kappa is not None or load.expert_information is not None]
    if not measured:
        return None

    def is_learned(load: LayerLoad) -> bool:
        kappa, information = load.clean_kappa, load.expert_information
        return (kappa is None or kappa >= least_kappa) and (information is None or information >= least_information)

    learned = [f"{load.layer:02d}" for load in measured if is_learned(load)]
    others = [f"{load.layer:02d}" for load in measured if not is_learned(load)]
    texts = [f"layers that choose experts by the token: {', '.join(learned)}"] if learned else []
    texts += [f"layers that route at random: {', '.join(others)}"] if others else []
    return "; ".join(texts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def layer_table(load: LayerLoad) -> Table:
    """Make a table with one row per expert of a layer, the busiest first."""
    learning = {"kappa": load.clean_kappa, "expert information": load.expert_information}
    figures = load.figures | {name: value for name, value in learning.items() if value is not None}
    title = f"Layer {load.layer:02d}: MaxVio {load.max_violation:.2f}; " + ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items()
    )
    table = Table(title=title, title_justify="left", min_width=72)
    for column in ("expert", "tokens", "share"):
        table.add_column(column, justify="right")
    table.add_column("mean is half of a full bar")
    order = sorted(range(len(load.counts)), key=lambda expert: -load.counts[expert])
    for expert in order:
        share = load.shares[expert]
        length = round(min(share / _FULL_BAR, 1.0) * _WIDE_BAR)
        table.add_row(str(expert), f"{load.counts[expert]:,}", f"{share:.2f}", Text("█" * length, _style(share)))
    return table


def load_bars(shares: Sequence[float]) -> Text:
    """Draw one bar per expert, full at twice the mean.

    Args:
        shares: Assignments of every expert over the mean.
    """
    return Text.assemble(*((_bar(share), _style(share)) for share in shares))


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts[:_MOST_LISTED])) + (", ..." if len(experts) > _MOST_LISTED else "")


def _bar(share: float) -> str:
    if share == 0:
        return "·"
    return _BARS[min(len(_BARS) - 1, int(share / _FULL_BAR * len(_BARS)))]


def _style(share: float) -> str:
    if share == 0 or share >= _FULL_BAR:
        return "red"
    return "yellow" if share > 1.5 or share < 0.5 else "green"
