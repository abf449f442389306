"""Causal attention with rotary embedding: MHA, GQA, MQA, and MLKV, where layers read another layer's keys and values.

Source: keys and values shared over layers: Zuhri et al. 2024, arXiv 2406.09297. K is shared after its norm and its
rotation. Norms of queries and keys: of a head, Qwen3 (arXiv 2505.09388); of the projection, OLMoE (arXiv 2409.02060).
Legend: B batch, S sequence, C keys, D hidden_size, H query heads, G key/value heads, d head size.
"""

from typing import Any, Literal

from torch import Tensor

from moe_train.config.model import HiddenCopiesConfig, ModelConfig
from moe_train.distributed.context import gather_key_values
from moe_train.distributed.context_attention import context_attention, gathered_attention
from moe_train.model.cost import Attention, Elementwise, MixerCost, Product
from moe_train.model.decode_state import CacheSpec
from moe_train.model.layers import Linear, RMSNorm
from moe_train.model.mixers.base import Mixer, MixerContext, MixerKind, MixerSpec, Shared, works_on_parts
from moe_train.model.mixers.hidden_keys import CopiesState, attend_with_copies
from moe_train.model.mixers.key_value import KeyValue, KeyValueState, kv_cache_bytes, widest
from moe_train.model.mixers.visibility import attend_held
from moe_train.ops.attention import attend
from moe_train.ops.attention_blocks import attend_blocks
from moe_train.ops.hidden_attention import block_keys
from moe_train.ops.rotary import apply_rotary

NO_COPIES = HiddenCopiesConfig()
_ROTARY_BYTES = 36, 40  # read and written for an element, forward and backward


class AttentionMixer(Mixer):
    """Causal self-attention; query head i reads key/value head i // (H/G) of the nearest owner layer."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_theta: float,
        owns_key_value: bool,
        init_std: float,
        output_std: float,
        window: int | None = None,
        reader_windows: tuple[int | None, ...] = (None,),
        qk_norm: Literal["none", "head", "projection"] = "none",
        norm_epsilon: float = 1e-5,
        hidden_copies: HiddenCopiesConfig = NO_COPIES,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope_theta, self.window, self.qk_norm = rope_theta, window, qk_norm
        self.reader_windows = reader_windows
        self.hidden_copies = hidden_copies
        self.query = Linear(hidden_size, num_heads * head_dim, init_std)
        self.key = Linear(hidden_size, num_kv_heads * head_dim, init_std) if owns_key_value else None
        self.value = Linear(hidden_size, num_kv_heads * head_dim, init_std) if owns_key_value else None
        self.output = Linear(num_heads * head_dim, hidden_size, output_std)
        self.query_norm = self._make_norm(num_heads, norm_epsilon)
        self.key_norm = self._make_norm(num_kv_heads, norm_epsilon) if owns_key_value else None

    def new_state(self, spec: CacheSpec) -> KeyValueState | CopiesState | None:
        if self.key is None:
            return None
        if self.hidden_copies.copies > 1:
            return CopiesState(spec, self.num_kv_heads, self.head_dim, self.reader_windows, self.hidden_copies)
        return KeyValueState(spec, self.num_kv_heads, self.head_dim, self.reader_windows)

    def forward(self, x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, Shared]:
        shared = context.shared
        if self.key is not None:
            shared = without_key_value(shared) | self._key_value(x_BSD, context)
        q_BHSd = self._split_heads(self.query(x_BSD), self.num_heads, self.query_norm)
        q_BHSd = apply_rotary(q_BHSd, *context.rotary_angles(self.head_dim, self.rope_theta, x_BSD.dtype))
        # A cache may be narrower than the model. It has many keys, so the queries are cast, not the keys.
        mixed_BHSd = self._attend(q_BHSd.to(shared["keys"].dtype), shared, context).to(x_BSD.dtype)
        if self.key is not None and len(self.reader_windows) == 1:
            # No other layer reads them, and a layer that is recomputed keeps what is handed up to it.
            shared = without_key_value(shared)
        batch, _, length, _ = mixed_BHSd.shape
        mixed_BSM = mixed_BHSd.transpose(1, 2).reshape(batch, length, -1)  # (B, H, S, d) -> (B, S, H*d)
        return self.output(mixed_BSM), shared

    def _attend(self, q_BHSd: Tensor, shared: Shared, context: MixerContext) -> Tensor:
        if context.tokens.copies is not None:
            return attend_with_copies(q_BHSd, shared, context, self.window)
        held = KeyValue.from_shared(shared)
        if context.shard is not None:
            shard = context.shard.in_layer(context.layer)
            attend_shared = gathered_attention if shard.ranks.exchange == "gather_once" else context_attention
            return attend_shared(q_BHSd, held.k_BGCd, held.v_BGCd, shard, self.window)
        if context.tokens.is_whole:
            blocks = context.attention_blocks(self.window, self.head_dim, q_BHSd.dtype)
            if blocks is None:
                return attend(q_BHSd, held.k_BGCd, held.v_BGCd, None)
            return attend_blocks(q_BHSd, held.k_BGCd, held.v_BGCd, blocks)
        return attend_held(q_BHSd, context.tokens, held, self.window)

    def _key_value(self, x_BSD: Tensor, context: MixerContext) -> Shared:
        """Compute this layer's keys and values, including those of the tokens before, as they are handed up."""
        assert self.key is not None and self.value is not None
        k_BGSd = self._split_heads(self.key(x_BSD), self.num_kv_heads, self.key_norm)
        v_BGSd = self._split_heads(self.value(x_BSD), self.num_kv_heads)
        k_BGSd = apply_rotary(k_BGSd, *context.rotary_angles(self.head_dim, self.rope_theta, x_BSD.dtype))
        tokens = context.tokens
        if tokens.copies is not None and context.state is not None:
            return context.state.append(k_BGSd, v_BGSd, tokens)
        if context.state is not None:
            new = KeyValue(k_BGSd, v_BGSd, tokens.positions_BS, tokens.documents_BS)
            return context.state.append(new, tokens.first_position).as_shared()
        if context.sharing is not None and context.sharing.exchange == "gather_once":
            k_BGSd, v_BGSd = gather_key_values(k_BGSd, v_BGSd, context.sharing)  # (B, ...) -> (P, B, ...)
        if tokens.is_whole:  # keys and queries are the same tokens
            return KeyValue(k_BGSd, v_BGSd, None, None).as_shared()
        positions_BS = None if tokens.first_position is not None else tokens.positions_BS
        return KeyValue(k_BGSd, v_BGSd, positions_BS, tokens.documents_BS).as_shared()

    def _make_norm(self, num_heads: int, epsilon: float) -> RMSNorm | None:
        widths = {"head": self.head_dim, "projection": num_heads * self.head_dim}
        return RMSNorm(widths[self.qk_norm], epsilon) if self.qk_norm != "none" else None

    def _split_heads(self, x_BSM: Tensor, num_heads: int, norm: RMSNorm | None = None) -> Tensor:
        """Split a projection into heads, and normalise them if there is a norm. (B, S, H*d) -> (B, H, S, d)."""
        batch, length, _ = x_BSM.shape
        if norm is not None and self.qk_norm == "projection":
            x_BSM = norm(x_BSM)
        x_BSHd = x_BSM.view(batch, length, num_heads, self.head_dim)
        if norm is not None and self.qk_norm == "head":
            x_BSHd = norm(x_BSHd)
        return x_BSHd.transpose(1, 2)


def without_key_value(shared: Shared) -> Shared:
    """Drop keys and values from what is handed up; an owner layer replaces them by its own."""
    return {name: tensor for name, tensor in shared.items() if name.removeprefix("hidden_") not in KEY_VALUE_NAMES}


KEY_VALUE_NAMES = ("keys", "values", "key_positions", "key_documents")


def _build(spec: MixerSpec) -> AttentionMixer:
    model = spec.model
    return AttentionMixer(
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.attention_kv_heads,
        head_dim=model.attention_head_dim,
        rope_theta=model.rope_theta,
        owns_key_value=spec.layer in model.kv_owner_layers,
        init_std=model.init_std,
        output_std=spec.output_std,
        window=model.layer_windows[spec.layer],
        reader_windows=model.reader_windows(spec.layer),
        qk_norm=model.qk_norm,
        norm_epsilon=model.norm_epsilon,
        hidden_copies=model.hidden_copies,
    )


def _state_bytes(spec: MixerSpec, length: int, element_bytes: int) -> int:
    model, own = spec.model, spec.model.hidden_copies
    owners = int(spec.layer in model.kv_owner_layers)
    ring = 2 * owners * min(length, own.reach) * (own.copies - 1) * model.attention_kv_heads * model.attention_head_dim
    return ring * element_bytes + kv_cache_bytes(
        batch_size=1,
        length=length,
        num_owner_layers=owners,
        num_kv_heads=model.attention_kv_heads,
        head_dim=model.attention_head_dim,
        bytes_per_element=element_bytes,
        window=widest(model.reader_windows(spec.layer)),
    )


def _flops(spec: MixerSpec, length: int) -> float:
    """Count two products, queries with keys and scores with values, over the mean number of keys that a query sees.

    All copies of a token count: each sees the originals; hidden ones see those of their token and of the window, too.
    """
    model, own = spec.model, spec.model.hidden_copies
    window = min(model.layer_windows[spec.layer] or length, length)
    # The first `window` tokens see 1, 2, ... keys, the others `window`.
    keys = (window * (window + 1) / 2 + (length - window) * window) / length
    hidden = own.copies - 1
    keys = own.copies * keys + own.copies * hidden / 2 + hidden**2 * own.mean_reach(length)
    return 4 * model.num_heads * model.attention_head_dim * keys


def _shapes(model: ModelConfig, section: Any) -> dict[str, Any]:
    del section
    return {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.attention_kv_heads,
        "model.head_dim": model.attention_head_dim,
        "model.kv_layers": model.kv_owner_layers,
        "model.qk_norm": model.qk_norm,
    }


def _cost(spec: MixerSpec) -> MixerCost:
    model = spec.model
    queries, keys = model.num_heads * model.attention_head_dim, model.attention_kv_heads * model.attention_head_dim
    products = [Product(model.hidden_size, queries), Product(queries, model.hidden_size)]
    own = model.hidden_copies
    hidden_keys = (own.copies - 1) * block_keys(own.reach) if own.copies > 1 else 0
    owns_key_value = spec.layer in model.kv_owner_layers
    rotated = queries + (keys if owns_key_value else 0)
    if owns_key_value:
        products.append(Product(model.hidden_size, keys, count=2))
    return MixerCost(
        products=tuple(products),
        # The input, queries, keys, values, the heads' outputs, and their copy in token order.
        kept=model.hidden_size + 3 * queries + 2 * keys,
        kept_fp32=model.num_heads,  # logsumexp
        normed=rotated if model.qk_norm != "none" else 0,
        handed_up=2 * keys if owns_key_value and len(model.reader_windows(spec.layer)) > 1 else 0,
        work=3 * queries,
        elementwise=(Elementwise(rotated, *_ROTARY_BYTES),),
        attention=Attention(model.num_heads, model.attention_head_dim, model.layer_windows[spec.layer], hidden_keys),
        exchanged=2 * keys,
        owns_exchanged=owns_key_value,
    )


ATTENTION = MixerKind(
    _build, _state_bytes, _flops, _cost, shapes=_shapes, takes_hidden_copies=True, part_obstacle=works_on_parts
)
