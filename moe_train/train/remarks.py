"""Remarks on settings that have no effect in this run: for its length, its ranks or its data.

A setting that has no effect whatever the run is, is refused when the configuration is loaded. What is remarked on here
is right for another number of steps or ranks, so that training goes on.
"""

from collections.abc import Iterator

from moe_train.config.base import Section
from moe_train.config.resolve import ResolvedConfig
from moe_train.train.schedule import learning_rate
from moe_train.train.step_control import NUM_NEEDED
from moe_train.train.tracing import FIRST_TRACED_STEP

# Fields that act every so many steps, or not before so many.
_IN_STEPS = {
    "checkpoint": ("every",),
    "train": ("validate_every", "log_every"),
    "telemetry": ("every", "dead_after_steps", "alarm_after_steps"),
}
_AMONG_EXPERTS = ("dispatch", "payload", "chunks")
_AMONG_RANKS = ("zero_stage", "network_interface", "timeout_seconds", "peer_timeout_seconds")


def remarks(config: ResolvedConfig, has_held_out: bool) -> Iterator[str]:
    """Yield a line for every group of settings without effect.

    Args:
        config: Resolved configuration.
        has_held_out: Whether the data has held-out text.
    """
    if not has_held_out and config.data.source != "synthetic":
        yield from _on_held_out(config)
    yield from _on_schedule(config)
    yield from _on_length(config)
    yield from _on_ranks(config)
    yield from _on_model(config)


def _on_held_out(config: ResolvedConfig) -> Iterator[str]:
    fraction, every = config.data.validation_fraction, config.train.validate_every
    if fraction > 0:
        without = f", and train.validate_every ({every}) has no effect" if every else ""
        yield (
            f"nothing is held out{without}: data.validation_fraction ({fraction}) picks none of the documents; raise "
            "it, or name data.validation_paths"
        )


def _on_schedule(config: ResolvedConfig) -> Iterator[str]:
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps >= steps:
        last = learning_rate(steps - 1, steps, optim)
        after = "" if optim.schedule == "constant" else f"; optim.schedule ({optim.schedule}) has no effect"
        yield (
            f"optim.warmup_steps ({optim.warmup_steps}) does not end before train.steps ({steps}): the learning rate "
            f"rises to {last:.3g} of optim.learning_rate ({optim.learning_rate:g}) at the last step{after}"
        )
    elif optim.schedule == "wsd" and learning_rate(optim.warmup_steps, steps, optim) < optim.learning_rate:
        yield (
            f"optim.warmup_steps ({optim.warmup_steps}) ends after the decay of schedule wsd begins, with "
            f"decay_fraction ({optim.decay_fraction}) of train.steps ({steps}): the learning rate never is "
            f"optim.learning_rate ({optim.learning_rate:g})"
        )
    for name, points in config.model.moe.coef_schedules.items():
        if points[-1][0] >= steps:
            yield (
                f"model.moe.coef_schedules.{name}: its last point, of step {points[-1][0]}, is not reached with "
                f"train.steps ({steps})"
            )


def _on_length(config: ResolvedConfig) -> Iterator[str]:
    steps = config.train.steps
    beyond = [
        f"{section}.{name} ({getattr(getattr(config, section), name)})"
        for section, names in _IN_STEPS.items()
        for name in names
        if getattr(config, section).differs(name) and getattr(getattr(config, section), name) > steps
    ]
    if config.train.differs("max_grad_norm_ratio") and steps <= NUM_NEEDED:
        beyond.append(f"train.max_grad_norm_ratio ({config.train.max_grad_norm_ratio}), which needs {NUM_NEEDED} steps")
    if config.train.profile_steps and steps < FIRST_TRACED_STEP:
        beyond.append(f"train.profile_steps ({config.train.profile_steps}), from step {FIRST_TRACED_STEP} on")
    if beyond:
        yield f"without effect before the end, at train.steps ({steps}): {', '.join(beyond)}"


def _on_ranks(config: ResolvedConfig) -> Iterator[str]:
    parallel = config.parallel
    unused = []
    if parallel.expert_parallel_size == 1 and config.model.moe_layer_indices:
        # Resolved chunks are a number: 1 is what auto gives here.
        unused += [name for name in _AMONG_EXPERTS if parallel.differs(name) and getattr(parallel, name) != 1]
    if unused:
        yield f"without effect, as every rank has all experts: {_named(parallel, unused)}"
    alone = [name for name in _AMONG_RANKS if config.world_size == 1 and parallel.differs(name)]
    if alone:
        yield f"without effect on one rank: {_named(parallel, alone)}"


def _named(section: Section, names: list[str]) -> str:
    return ", ".join(f"parallel.{name} ({getattr(section, name)})" for name in names)


def _on_model(config: ResolvedConfig) -> Iterator[str]:
    model, moe, length = config.model, config.model.moe, config.train.sequence_length
    for name, windows in (("sliding_window", (model.sliding_window,)), ("window_pattern", model.window_pattern or ())):
        for window in dict.fromkeys(windows):
            if window is not None and window >= length and model.attention_layers:
                shown = f"model.{name} ({window})" if name == "sliding_window" else f"window {window} of model.{name}"
                yield f"{shown} has no effect in training: train.sequence_length ({length}) is not longer"
    most = moe.num_experts / moe.top_k
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(moe, name)
        if factor is not None and factor >= most and model.moe_layer_indices:
            yield (
                f"model.moe.{name} ({factor:g}) drops nothing: from num_experts / top_k ({most:g}) on an expert has "
                "room for every token"
            )
