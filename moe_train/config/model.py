"""Settings of the model: the decoder, its mixer and its hidden copies."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moe_train.config.base import Section, SectionWithParts
from moe_train.config.moe import MoEConfig
from moe_train.config.registry import PartName, check_part

MIXER_FIELDS = frozenset(
    {"num_heads", "num_kv_heads", "head_dim", "rope_theta", "sliding_window", "window_pattern", "qk_norm"}
)
"""Fields of the model that only mixers read; each mixer reads some of them."""


class HiddenCopiesConfig(Section):
    """Parallel hidden decoding: more computation for every token, without more parameters and cached tokens.

    Every token passes the blocks in several copies at once, and the last copy predicts. A copy sees the first copy
    (the original) of the tokens up to its own, the earlier copies of its own token, and hidden copies in a window.
    """

    copies: PositiveInt = 1
    """Copies of every token, the original included; 1: there are no hidden copies."""
    window_positions: int = Field(0, ge=0)
    """Positions before its own whose hidden copies a hidden copy sees (PHD-SWA); 0: none (PHD)."""
    chunk: int | None = Field(None, ge=2)
    """Positions of a chunk, counted from the first token of the document: the window does not reach into the chunk
    before (PHD-CSWA). None: there are no chunks."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.copies == 1 and (self.window_positions or self.chunk is not None):
            raise ValueError(
                f"window_positions ({self.window_positions}) and chunk ({self.chunk}) have no effect with copies (1): "
                "there are no hidden copies"
            )
        if self.chunk is not None and not self.window_positions:
            raise ValueError(f"chunk ({self.chunk}) has no effect with window_positions (0)")
        return self

    @property
    def reach(self) -> int:
        """Most positions before its own whose hidden copies a hidden copy sees."""
        return self.window_positions if self.chunk is None else min(self.window_positions, self.chunk - 1)

    def mean_reach(self, length: int) -> float:
        """Compute the mean over the positions of a sequence of the positions before it that are in reach.

        Args:
            length: Tokens of the sequence, which is one document.
        """
        period = length if self.chunk is None else min(self.chunk, length)

        def total(positions: int) -> float:  # 0 + 1 + ... up to the reach, and then the reach
            rising = min(positions, self.reach + 1)
            return rising * (rising - 1) / 2 + (positions - rising) * self.reach

        return (length // period * total(period) + total(length % period)) / length


class ModelConfig(SectionWithParts):
    """The decoder: embedding, num_layers x (norm, mixer, norm, SwiGLU or MoE), final norm, head."""

    part_group = "mixers"

    vocab_size: PositiveInt | None = None
    """Rows of the embedding; None: the tokenizer's size. A value above the tokenizer's size adds rows of padding."""
    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    num_layers: int = Field(4, gt=0, le=100_000)
    """Blocks of the decoder."""
    num_heads: PositiveInt = 8
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads of one owner layer: num_heads is MHA, fewer is GQA, 1 is MQA; None: num_heads."""
    kv_layers: PositiveInt | tuple[int, ...] | None = None
    """Attention layers that own keys and values (MLKV): their number, or a list of layers that begins with the first
    attention layer; None: all attention layers."""
    sliding_window: PositiveInt | None = None
    """Positions that a token sees, including its own, in training and in decoding; the cache does not keep older keys.
    None: all."""
    window_pattern: tuple[PositiveInt | None, ...] | None = Field(None, min_length=1)
    """Windows by layer, in place of sliding_window: a pattern that repeats over the layers, such as [4096, null], where
    null is a layer that sees all positions; its length must divide num_layers. The cache of an owner layer keeps what
    the widest of its readers sees. None: sliding_window is that of all layers."""
    head_dim: PositiveInt | None = None
    """Width of one head, an even number; None: hidden_size / num_heads."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMS norm of queries and keys before the rotary embedding, with norm_epsilon. head: over the head_dim elements of
    each head, and all heads of a layer have the same gains (Qwen3); projection: over the elements of all heads
    together, and each element has its own gain (OLMoE)."""
    intermediate_size: PositiveInt = 1024
    """Inner width of the dense feed-forward layers."""
    feed_forward: str = "swiglu"
    """Dense feed-forward layer, of every layer that has no experts. swiglu; rwkv_channel_mix: that of RWKV-4, which
    looks one token back, with a squared ReLU and a gate; rwkv7_channel_mix: that of RWKV-7, without a gate."""
    moe_every: int = Field(2, ge=0)
    """Every moe_every-th layer is an MoE layer (1: all, 2: layers 1, 3, 5, ... counted from 0); 0: none."""
    moe_layers: tuple[int, ...] | None = None
    """List of the MoE layers, counted from 0; it replaces moe_every."""
    moe: MoEConfig = MoEConfig()
    """The Mixture-of-Experts layers."""
    mixer: str | None = None
    """Mixer of all layers; it is the same as mixers with one name."""
    mixers: tuple[PartName, ...] = Field(("attention",), min_length=1)
    """Sequence mixers by layer: a pattern that repeats over the layers; its length must divide num_layers. attention,
    infini, rwkv4, rwkv7, ttt_linear, ttt_mlp. A mixer's own settings are under its name, beside this field."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation of the residual stream."""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: x + F(N(x)) with a final norm; post: N(x + F(x)) without one."""
    norm_epsilon: PositiveFloat = 1e-5
    """Constant that every norm adds to the variance."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the wavelengths of the rotary embedding, in positions."""
    tie_embeddings: bool = False
    """True: the head uses the weight of the embedding."""
    hidden_copies: HiddenCopiesConfig = HiddenCopiesConfig()
    """Parallel hidden decoding. Any number of copies can continue from any other."""
    isolate_documents: bool = False
    """True: a packed document sees nothing of another; every mixer's state begins anew with it."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; for weights that write to the residual stream, it is divided by
    sqrt(2 num_layers)."""

    @model_validator(mode="before")
    @classmethod
    def _take_mixer(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("mixer") is None:
            return values
        if "mixers" in values:
            raise ValueError(
                f"mixer ({values['mixer']!r}) and mixers ({values['mixers']!r}) both name the mixers: give one of them"
            )
        check_part("mixers", values["mixer"], "mixer")
        return values | {"mixer": None, "mixers": (values["mixer"],)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_mixers()
        if self.attention_layers:  # what other mixers read is known when they are imported
            self._check_heads(MIXER_FIELDS)
        self._check_windows()
        self._check_layers("moe_layers", self.moe_layers)
        if self.moe_layers is not None and self.differs("moe_every"):
            raise ValueError(
                f"moe_every ({self.moe_every}) and moe_layers ({list(self.moe_layers)}) both say which layers are MoE "
                "layers: give one of them"
            )
        self._check_kv_layers()
        self._check_capacity()
        all_moe = len(self.moe_layer_indices) == self.num_layers
        if all_moe and self.moe.intermediate_size is not None and self.differs("intermediate_size"):
            raise ValueError(
                f"intermediate_size ({self.intermediate_size}) has no effect: every layer is an MoE layer, with "
                f"moe.intermediate_size ({self.moe.intermediate_size})"
            )
        check_part("feed_forwards", self.feed_forward, "feed_forward")
        if all_moe and self.differs("feed_forward"):
            raise ValueError(f"feed_forward ({self.feed_forward!r}) has no effect: every layer is an MoE layer")
        if not self.moe_layer_indices and self.differs("moe"):
            raise ValueError(
                f"model.moe has no effect: no layer of {self.num_layers} is an MoE layer with moe_every "
                f"({self.moe_every}) and moe_layers ({self.moe_layers})"
            )
        return self

    def _check_mixers(self) -> None:
        for name in self.mixers:
            check_part("mixers", name, "mixers")
        if self.num_layers % len(self.mixers):
            raise ValueError(
                f"num_layers ({self.num_layers}) must be divisible by the length of mixers ({list(self.mixers)}), a "
                "pattern that repeats"
            )
        for name, values in self.part_settings.items():
            if name not in self.mixers:
                raise ValueError(f"{name} ({values}) has no effect: it is not among mixers ({list(self.mixers)})")

    def check_mixer_fields(self, reads: frozenset[str]) -> None:
        """Refuse fields of mixers that have no effect, and heads that do not fit.

        Args:
            reads: Fields among MIXER_FIELDS that the mixers of the pattern read.

        Raises:
            ValueError: If a field that none of them reads differs from its default, or one that they read is wrong.
        """
        for name in sorted(MIXER_FIELDS - reads):
            if self.differs(name):
                raise ValueError(
                    f"{name} ({getattr(self, name)}) has no effect: no mixer reads it, with mixers {list(self.mixers)}"
                )
        self._check_heads(reads)

    def _check_heads(self, reads: frozenset[str]) -> None:
        if "num_heads" in reads and self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be divisible by num_heads ({self.num_heads})")
        if "rope_theta" in reads and self.attention_head_dim % 2:
            raise ValueError(f"head_dim ({self.attention_head_dim}) must be even, for the rotary embedding")
        if "num_kv_heads" in reads and self.num_heads % self.attention_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be divisible by num_kv_heads ({self.num_kv_heads})")

    def _check_windows(self) -> None:
        pattern = self.window_pattern
        if pattern is None:
            return
        shown = f"window_pattern ({list(pattern)})"
        if self.sliding_window is not None:
            raise ValueError(
                f"sliding_window ({self.sliding_window}) and {shown} both say what a layer sees: give one of them"
            )
        if self.num_layers % len(pattern):
            raise ValueError(
                f"num_layers ({self.num_layers}) must be divisible by the length of {shown}, a pattern that repeats"
            )
        places = {layer % len(pattern) for layer in self.attention_layers}
        for place, window in enumerate(pattern):
            if window is not None and place not in places:
                raise ValueError(
                    f"{shown}: window {window} at place {place} has no effect: no layer there is attention, with "
                    f"mixers {list(self.mixers)}"
                )
        if not any(pattern):
            raise ValueError(f"{shown} has no effect: it has no window")

    def _check_kv_layers(self) -> None:
        given, layers = self.kv_layers, self.attention_layers
        if given is not None and not layers:
            raise ValueError(
                f"kv_layers ({given}) has no effect: no layer is attention, with mixers {list(self.mixers)}"
            )
        if isinstance(given, int) and given > len(layers):
            which = "num_layers" if len(layers) == self.num_layers else "the number of attention layers"
            raise ValueError(f"kv_layers ({given}) must not exceed {which} ({len(layers)})")
        if not isinstance(given, tuple):
            return
        self._check_layers("kv_layers", given)
        if not given or given[0] != layers[0]:
            raise ValueError(
                f"kv_layers ({list(given)}) must begin with layer {layers[0]}, which has no owner below it"
            )
        if others := sorted(set(given) - set(layers)):
            raise ValueError(f"kv_layers ({list(given)}) must be attention layers: {others} are not")

    def _check_capacity(self) -> None:
        if self.hidden_copies.copies == 1 or not self.moe_layer_indices:
            return
        for name in ("capacity_factor", "eval_capacity_factor"):
            if (value := getattr(self.moe, name)) is not None:
                raise ValueError(
                    f"moe.{name} ({value}) does not work with hidden_copies.copies ({self.hidden_copies.copies}): "
                    "copies would take the room of other tokens, and a prompt, most of whose hidden copies are not "
                    "computed, would be routed otherwise than in training; leave the experts without a capacity"
                )

    def _check_layers(self, name: str, layers: tuple[int, ...] | None) -> None:
        if layers is None:
            return
        if list(layers) != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < self.num_layers):
            raise ValueError(
                f"{name} ({list(layers)}) must be increasing layer numbers from 0 to {self.num_layers - 1} "
                f"(num_layers is {self.num_layers})"
            )

    @property
    def attention_head_dim(self) -> int:
        """Width of one head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def attention_kv_heads(self) -> int:
        """Key and value heads of one owner layer."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """Mixer of each layer."""
        return self.mixers * (self.num_layers // len(self.mixers))

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose mixer is attention."""
        return tuple(layer for layer, name in enumerate(self.layer_mixers) if name == "attention")

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Most positions that a token sees in each layer, if it is attention; None: all."""
        pattern = (self.sliding_window,) if self.window_pattern is None else self.window_pattern
        return pattern * (self.num_layers // len(pattern))

    def reader_windows(self, owner: int) -> tuple[int | None, ...]:
        """List the windows of the layers that read an owner layer's keys, its own first; None: all positions.

        Args:
            owner: Layer that owns keys and values.
        """
        end = min((layer for layer in self.kv_owner_layers if layer > owner), default=self.num_layers)
        return tuple(self.layer_windows[layer] for layer in self.attention_layers if owner <= layer < end)

    @property
    def moe_layer_indices(self) -> tuple[int, ...]:
        """MoE layers, counted from 0."""
        if self.moe_layers is not None:
            return self.moe_layers
        if self.moe_every == 0:
            return ()
        return tuple(i for i in range(self.num_layers) if (i + 1) % self.moe_every == 0)

    @property
    def kv_owner_layers(self) -> tuple[int, ...]:
        """Layers that own keys and values: of A attention layers, number 0, then int((i + 1) A / M), i = 0 .. M - 2.

        Source: Zuhri et al. 2024, arXiv 2406.09297.
        """
        if isinstance(self.kv_layers, tuple):
            return self.kv_layers
        layers = self.attention_layers
        num_owners = self.kv_layers if self.kv_layers is not None else len(layers)
        return tuple(layers[i * len(layers) // num_owners] for i in range(num_owners))

    @property
    def expert_intermediate_size(self) -> int:
        """Inner width of one expert's SwiGLU."""
        return self.moe.intermediate_size if self.moe.intermediate_size is not None else self.intermediate_size
