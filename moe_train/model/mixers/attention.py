"""Causal attention with rotary embedding: MHA, GQA, MQA, and MLKV where a layer reads another layer's keys and values.

Source: keys and values shared over layers: Zuhri et al. 2024, arXiv 2406.09297. K is shared after its rotation.
Legend: B batch, S sequence, C keys, D hidden_size, H query heads, G key/value heads, d head size.
"""

from torch import Tensor

from moe_train.model.cache import KeyValue, KeyValueState
from moe_train.model.layers import Linear
from moe_train.model.mixers.base import Mixer, MixerContext
from moe_train.ops.attention import attend, causal_mask
from moe_train.ops.rotary import apply_rotary, rotary_angles


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
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope_theta = rope_theta
        self.query = Linear(hidden_size, num_heads * head_dim, init_std)
        self.key = Linear(hidden_size, num_kv_heads * head_dim, init_std) if owns_key_value else None
        self.value = Linear(hidden_size, num_kv_heads * head_dim, init_std) if owns_key_value else None
        self.output = Linear(num_heads * head_dim, hidden_size, output_std)

    def new_state(self) -> KeyValueState | None:
        return KeyValueState() if self.key is not None else None

    def publish(self, x_BSD: Tensor, context: MixerContext) -> KeyValue | None:
        if self.key is None or self.value is None:
            return context.key_value
        k_BGSd = self._split_heads(self.key(x_BSD), self.num_kv_heads)
        v_BGSd = self._split_heads(self.value(x_BSD), self.num_kv_heads)
        k_BGSd = apply_rotary(k_BGSd, *rotary_angles(context.positions_BS, self.head_dim, self.rope_theta))
        new = KeyValue(k_BGSd, v_BGSd, context.positions_BS, context.documents_BS)
        return new if context.state is None else context.state.append(new)

    def forward(self, x_BSD: Tensor, context: MixerContext) -> Tensor:
        held = context.key_value
        assert held is not None, "the first layer owns keys and values"
        q_BHSd = self._split_heads(self.query(x_BSD), self.num_heads)
        q_BHSd = apply_rotary(q_BHSd, *rotary_angles(context.positions_BS, self.head_dim, self.rope_theta))
        mixed_BHSd = attend(q_BHSd, held.k_BGCd, held.v_BGCd, self._mask(q_BHSd, held, context))
        batch, _, length, _ = mixed_BHSd.shape
        return self.output(mixed_BHSd.transpose(1, 2).reshape(batch, length, -1))  # (B, H, S, d) -> (B, S, H*d)

    def _mask(self, q_BHSd: Tensor, held: KeyValue, context: MixerContext) -> Tensor | None:
        if context.documents_BS is None and q_BHSd.shape[2] == held.k_BGCd.shape[2]:
            return None  # plain causal: SDPA's fast path
        return causal_mask(context.positions_BS, held.positions_BC, context.documents_BS, held.documents_BC)

    def _split_heads(self, x_BSM: Tensor, num_heads: int) -> Tensor:
        batch, length, _ = x_BSM.shape
        return x_BSM.view(batch, length, num_heads, self.head_dim).transpose(1, 2)  # (B, S, H*d) -> (B, H, S, d)
