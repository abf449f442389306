"""Causal attention with rotary embedding: MHA, GQA, MQA, and MLKV where a layer reads another layer's keys and values.

Source: keys and values shared over layers: Zuhri et al. 2024, arXiv 2406.09297. K is shared after its norm and its
rotation. Norms of queries and keys: of a head, Qwen3 (arXiv 2505.09388); of the projection, OLMoE (arXiv 2409.02060).
Legend: B batch, S sequence, C keys, D hidden_size, H query heads, G key/value heads, d head size.
"""

from typing import Literal

from torch import Tensor

from moe_train.model.decode_state import CacheSpec, KeyValue, KeyValueState
from moe_train.model.layers import Linear, RMSNorm
from moe_train.model.mixers.base import Mixer, MixerContext
from moe_train.ops.attention import attend, causal_mask
from moe_train.ops.rotary import apply_rotary


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
        qk_norm: Literal["none", "head", "projection"] = "none",
        norm_epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope_theta, self.window, self.qk_norm = rope_theta, window, qk_norm
        self.query = Linear(hidden_size, num_heads * head_dim, init_std)
        self.key = Linear(hidden_size, num_kv_heads * head_dim, init_std) if owns_key_value else None
        self.value = Linear(hidden_size, num_kv_heads * head_dim, init_std) if owns_key_value else None
        self.output = Linear(num_heads * head_dim, hidden_size, output_std)
        self.query_norm = self._make_norm(num_heads, norm_epsilon)
        self.key_norm = self._make_norm(num_kv_heads, norm_epsilon) if owns_key_value else None

    def new_state(self, room: CacheSpec) -> KeyValueState | None:
        if self.key is None:
            return None
        return KeyValueState(room, self.num_kv_heads, self.head_dim, self.window)

    def publish(self, x_BSD: Tensor, context: MixerContext) -> KeyValue | None:
        if self.key is None or self.value is None:
            return context.key_value
        k_BGSd = self._split_heads(self.key(x_BSD), self.num_kv_heads, self.key_norm)
        v_BGSd = self._split_heads(self.value(x_BSD), self.num_kv_heads)
        k_BGSd = apply_rotary(k_BGSd, *context.rotary_angles(self.head_dim, self.rope_theta))
        new = KeyValue(k_BGSd, v_BGSd, context.positions_BS, context.documents_BS)
        return new if context.state is None else context.state.append(new)

    def forward(self, x_BSD: Tensor, context: MixerContext) -> Tensor:
        held = context.key_value
        assert held is not None, "the first layer owns keys and values"
        q_BHSd = self._split_heads(self.query(x_BSD), self.num_heads, self.query_norm)
        q_BHSd = apply_rotary(q_BHSd, *context.rotary_angles(self.head_dim, self.rope_theta))
        mask_B1SC = self._mask(q_BHSd.shape[2], held, context)
        # A cache may be narrower than the model: its keys are many, so the queries are cast and not they.
        mixed_BHSd = attend(q_BHSd.to(held.k_BGCd.dtype), held.k_BGCd, held.v_BGCd, mask_B1SC).to(x_BSD.dtype)
        batch, _, length, _ = mixed_BHSd.shape
        return self.output(mixed_BHSd.transpose(1, 2).reshape(batch, length, -1))  # (B, H, S, d) -> (B, S, H*d)

    def _mask(self, num_queries: int, held: KeyValue, context: MixerContext) -> Tensor | None:
        num_keys = held.k_BGCd.shape[2]
        has_all_in_sight = context.documents_BS is None and (self.window is None or num_keys <= self.window)
        if has_all_in_sight and num_queries in (1, num_keys):
            return None  # plain causal, or the newest token, which sees all: SDPA's fast paths
        return causal_mask(
            context.positions_BS, held.positions_BC, context.documents_BS, held.documents_BC, self.window
        )

    def _make_norm(self, num_heads: int, epsilon: float) -> RMSNorm | None:
        widths = {"head": self.head_dim, "projection": num_heads * self.head_dim}
        return RMSNorm(widths[self.qk_norm], epsilon) if self.qk_norm != "none" else None

    def _split_heads(self, x_BSM: Tensor, num_heads: int, norm: RMSNorm | None = None) -> Tensor:
        """A projection by head, normed where there is a norm. (B, S, H*d) -> (B, H, S, d)."""
        batch, length, _ = x_BSM.shape
        if norm is not None and self.qk_norm == "projection":
            x_BSM = norm(x_BSM)
        x_BSHd = x_BSM.view(batch, length, num_heads, self.head_dim)
        if norm is not None and self.qk_norm == "head":
            x_BSHd = norm(x_BSHd)
        return x_BSHd.transpose(1, 2)
