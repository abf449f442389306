"""Parts that a configuration names: their own settings, and their own checks.

Importing a part imports torch. So parts are loaded only after the rest of the configuration is checked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from moe_train.config.base import Section
from moe_train.config.errors import UsageError
from moe_train.config.messages import describe_errors
from moe_train.config.registry import REGISTRY, load_part
from moe_train.config.root import Config

OPTIONAL_FIELDS = ("beta1", "beta2", "epsilon")  # fields of optim that not every optimizer has

OwnSection = TypeVar("OwnSection", bound=Section)


class Kind(Protocol):
    """A mixer or router, as the configuration sees it."""

    @property
    def section(self) -> type[Section] | None:
        """Class of its own settings; None: it has none."""

    @property
    def check(self) -> Callable[[Any, Any], None]:
        """Function that refuses settings that cannot work."""


class TakesCopies(Protocol):
    """A mixer or dense feed-forward layer, as far as hidden copies are concerned."""

    @property
    def takes_hidden_copies(self) -> bool:
        """Whether it works on a stream with hidden copies of the tokens."""


class DenseLike(TakesCopies, Protocol):
    """A dense feed-forward layer, as the configuration sees it."""

    @property
    def takes_sequence_parts(self) -> bool:
        """Whether it works where ranks share the tokens of a sequence."""


class MixerLike(Kind, TakesCopies, Protocol):
    """A mixer, as the configuration sees it."""

    @property
    def reads(self) -> frozenset[str]:
        """Fields of the model among MIXER_FIELDS that the mixer reads."""

    @property
    def part_obstacle(self) -> Callable[[Any, Any, int], str | None]:
        """Function that says why it does not work where ranks share the tokens of a sequence; None: it does."""

    @property
    def check_length(self) -> Callable[[Any, int], None]:
        """Function that refuses training sequences of a length that cannot work."""


class RouterLike(Kind, Protocol):
    """A router, as the configuration sees it."""

    @property
    def has_smooth_load(self) -> bool:
        """Whether the router's load has a gradient."""


class HasSection(Protocol):
    """A way to balance or a sink, as the configuration sees it."""

    @property
    def section(self) -> type[Section] | None:
        """Class of its own settings; None: it has none."""


class OptimizerLike(HasSection, Protocol):
    """An optimizer, as the configuration sees it."""

    @property
    def fields(self) -> frozenset[str]:
        """Fields among OPTIONAL_FIELDS that the optimizer reads."""

    @property
    def works_on_host(self) -> bool:
        """Whether the update can be made in the memory of the host."""


class DispatcherLike(Protocol):
    """A dispatcher, as the configuration sees it."""

    @property
    def leaves_nodes_once(self) -> bool:
        """Whether rows go across nodes first, and then within a node."""


@dataclass(frozen=True)
class Kinds:
    """Kinds of the parts that a configuration names.

    Attributes:
        mixers: Kinds of mixers, by name.
        feed_forwards: Kinds of dense feed-forward layers, by name.
        router: Kind of router.
        dispatcher: Kind of dispatcher.
        optimizer: Kind of optimizer.
        balance: Kinds of ways to balance that have settings in the configuration, by name.
        sinks: Kinds of sinks of other packages, by name. Those of this package have no settings, and import slowly.
    """

    mixers: Mapping[str, MixerLike]
    feed_forwards: Mapping[str, DenseLike]
    router: RouterLike
    dispatcher: DispatcherLike
    optimizer: OptimizerLike
    balance: Mapping[str, HasSection]
    sinks: Mapping[str, HasSection]

    def check(self, config: Config) -> None:
        """Let every part check its settings.

        Args:
            config: Configuration as loaded.

        Raises:
            UsageError: If a part refuses its settings.
        """
        model, moe = config.model, config.model.moe
        try:
            model.check_mixer_fields(frozenset[str]().union(*(kind.reads for kind in self.mixers.values())))
        except ValueError as error:
            raise UsageError(f"model: {error}") from error
        for name, kind in self.mixers.items():
            own = read_section(kind.section, model.part_settings.get(name), f"model.{name}")
            kind.check(model, own)
            kind.check_length(own, config.train.sequence_length)
        self._check_copies(config)
        self._check_sequence_parts(config)
        section = read_section(self.router.section, moe.part_settings.get(moe.router), f"model.moe.{moe.router}")
        self.router.check(moe, section)
        for name, each in self.balance.items():
            read_section(each.section, moe.balance[name], f"model.moe.balance.{name}")
        for name, each in self.sinks.items():
            read_section(each.section, config.telemetry.part_settings.get(name), f"telemetry.{name}")
        optim = config.optim
        read_section(self.optimizer.section, optim.part_settings.get(optim.name), f"optim.{optim.name}")
        for field in OPTIONAL_FIELDS:
            if optim.differs(field) and field not in self.optimizer.fields:
                raise UsageError(f"optim.{field} ({getattr(optim, field)}) has no effect with name {optim.name!r}")
        if config.parallel.offload_optimizer == "cpu" and not self.optimizer.works_on_host:
            raise UsageError(
                f"parallel.offload_optimizer (cpu) does not work with optim.name ({optim.name!r}), whose update needs "
                "whole matrices on the devices: set offload_optimizer to none, or name to adamw"
            )
        if moe.load_cv2_coef > 0 and not self.router.has_smooth_load:
            raise UsageError(
                f"model.moe.load_cv2_coef ({moe.load_cv2_coef}) has no effect with router {moe.router!r}: its load has "
                "no gradient; set load_cv2_coef to 0, or router to noisy_topk"
            )

    def _check_copies(self, config: Config) -> None:
        copies = config.model.hidden_copies.copies
        if copies == 1:
            return
        parts = [("mixers", name, mixer.takes_hidden_copies) for name, mixer in self.mixers.items()]
        parts += [("feed_forward", name, each.takes_hidden_copies) for name, each in self.feed_forwards.items()]
        for field, name, takes_copies in parts:
            if not takes_copies:
                raise UsageError(
                    f"model.hidden_copies.copies ({copies}) does not work with model.{field} ({name!r}): it reads the "
                    "tokens one after the other, and hidden copies stand side by side; set copies to 1, or "
                    "choose attention and swiglu"
                )

    def _check_sequence_parts(self, config: Config) -> None:
        size, model = config.parallel.context_parallel_size, config.model
        if size == 1:
            return
        chunk = config.train.sequence_length // (2 * size)
        obstacles = []
        for name, kind in self.mixers.items():
            own = read_section(kind.section, model.part_settings.get(name), f"model.{name}")
            obstacles.append((f"model.mixers ({name!r})", kind.part_obstacle(model, own, chunk)))
        for name, each in self.feed_forwards.items():
            obstacle = None if each.takes_sequence_parts else "it looks at tokens that other ranks have"
            obstacles.append((f"model.feed_forward ({name!r})", obstacle))
        for setting, obstacle in obstacles:
            if obstacle is not None:
                raise UsageError(f"parallel.context_parallel_size ({size}) does not work with {setting}: {obstacle}")


def load_kinds(config: Config) -> Kinds:
    """Import the parts that a configuration names.

    Raises:
        UsageError: If a part of another package cannot be imported.
    """
    model = config.model
    has_no_dense_layer = len(model.moe_layer_indices) == model.num_layers
    return Kinds(
        {name: load_part("mixers", name) for name in dict.fromkeys(model.layer_mixers)},
        {} if has_no_dense_layer else {model.feed_forward: load_part("feed_forwards", model.feed_forward)},
        load_part("routers", model.moe.router),
        load_part("dispatchers", config.parallel.dispatch),
        load_part("optimizers", config.optim.name),
        {name: load_part("balance", name) for name in model.moe.balance},
        {name: load_part("sinks", name) for name in config.telemetry.active_sinks if name not in REGISTRY["sinks"]},
    )


def read_section(section: type[OwnSection] | None, values: dict[str, Any] | None, field: str) -> OwnSection | None:
    """Read a part's own settings.

    Args:
        section: Class of the settings; None: the part has none.
        values: Given values; None: none are given.
        field: Dotted name of the settings in the configuration, for messages.

    Raises:
        UsageError: If settings are wrong; it names each of them and its value.
    """
    if section is None:
        if values:
            raise UsageError(f"{field} ({values!r}) has no effect: it has no settings")
        return None
    try:
        return section.model_validate(values or {})
    except ValidationError as error:
        raise UsageError(describe_errors(error, section, field)) from error
