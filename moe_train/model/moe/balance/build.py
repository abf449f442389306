"""Construction of the ways to balance that a configuration asks for."""

from typing import Any

from moe_train.config.errors import UsageError
from moe_train.config.moe import MoEConfig
from moe_train.config.parts import read_section
from moe_train.config.registry import REGISTRY, load_part
from moe_train.model.moe.balance.base import BalanceKind, BalanceTerm, BiasRule, Scheduled


def make_balance_terms(moe: MoEConfig) -> list[Scheduled[BalanceTerm]]:
    """Make the loss terms whose weight is not zero."""
    return [
        Scheduled(kind.term(moe, section), moe.coef_schedules.get(schedule, ()), bool(kind.remembers(moe, section)))
        for schedule, kind, section in balance_kinds(moe)
        if kind.term is not None
    ]


def make_bias_rule(moe: MoEConfig) -> Scheduled[BiasRule] | None:
    """Make the rule whose weight is not zero; None: there is none.

    Raises:
        UsageError: If there are several: each would move the biases.
    """
    found = [
        (schedule, kind.rule(moe, section)) for schedule, kind, section in balance_kinds(moe) if kind.rule is not None
    ]
    if len(found) > 1:
        names = " and ".join(schedule for schedule, _ in found)
        raise UsageError(f"model.moe: {names} both move the routers' biases: take one of them")
    return Scheduled(found[0][1], moe.coef_schedules.get(found[0][0], ())) if found else None


def needed_sums(moe: MoEConfig) -> frozenset[str]:
    """List the optional routing sums that the loss terms need."""
    return frozenset(name for _, kind, section in balance_kinds(moe) for name in kind.sums(moe, section))


def remembered_sums(moe: MoEConfig) -> frozenset[str]:
    """List the sums of the last step that the loss terms need."""
    return frozenset(name for _, kind, section in balance_kinds(moe) for name in kind.remembers(moe, section))


def split_settings(moe: MoEConfig) -> list[str]:
    """List the settings, with their values, that make the loss depend on how a step is split into micro-batches."""
    found = (kind.split_setting(moe, section) for _, kind, section in balance_kinds(moe))
    return list(dict.fromkeys(setting for setting in found if setting is not None))


def balance_kinds(moe: MoEConfig) -> list[tuple[str, BalanceKind, Any]]:
    """List the kinds whose weight is not zero, each with the name of its schedule and its own section."""
    found = []
    for name in (*REGISTRY["balance"], *(name for name in moe.balance if name not in REGISTRY["balance"])):
        kind: BalanceKind = load_part("balance", name)
        section = read_section(kind.section, moe.balance.get(name), f"model.moe.balance.{name}")
        if kind.weight(moe, section) > 0:
            found.append((name if kind.field is None else kind.field, kind, section))
    return found
