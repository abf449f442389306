"""Looking back a few tokens of the document: the token shift of RWKV, short causal convolutions.

Legend: B batch, S new tokens, D width, K tokens back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_train.distributed.context import ContextRanks
from moe_train.model.decode_state import CacheSpec, RecurrentState, Tensors
from moe_train.model.mixers.base import MixerContext
from moe_train.model.mixers.chunks import join_chunks, rows_before, split_chunks


def lookback_state(spec: CacheSpec, width: int, count: int = 1) -> RecurrentState:
    """Make the state of a layer that looks back: its last rows, in at least fp32.

    Args:
        spec: Sizes of the decode states.
        width: D, width of a row.
        count: K, number of rows.
    """
    wide = torch.promote_types(spec.dtype, torch.float32)
    return RecurrentState({"rows": torch.zeros(spec.batch_size, count, width, dtype=wide, device=spec.device)}, _append)


def look_back(x_BSD: Tensor, context: MixerContext, state: RecurrentState | None, count: int = 1) -> list[Tensor]:
    """Return the rows 1, 2, ..., K tokens before each token; zeros before the first token of its document.

    Args:
        x_BSD: New rows.
        context: Context of the layer, with the offsets of the new tokens.
        state: State from `lookback_state`, which takes in the new rows; None: no decoding.
        count: K, number of tokens to look back.

    Returns:
        K tensors [B, S, D] in the dtype of x.

    Collective: All ranks that share the rows, if they are shared.
    """
    length = x_BSD.shape[1]
    if context.sharing is not None and state is None:
        return _look_back_in_chunks(x_BSD, context, context.sharing, count)
    if state is None:
        joined = F.pad(x_BSD, (0, 0, count, 0))
    else:
        joined = state.append({"x": x_BSD}).to(x_BSD.dtype)
    offsets_BS1 = context.tokens.offsets_BS.unsqueeze(-1)
    return [
        torch.where(offsets_BS1 >= back, joined[:, count - back : count - back + length], 0.0)
        for back in range(1, count + 1)
    ]


def _look_back_in_chunks(x_BSD: Tensor, context: MixerContext, ranks: ContextRanks, count: int) -> list[Tensor]:
    length = x_BSD.shape[1] // 2
    joined = torch.cat((rows_before(x_BSD, count, ranks), split_chunks(x_BSD)), dim=1)  # (2B, K + c, D)
    offsets_BS1 = context.tokens.offsets_BS.unsqueeze(-1)
    return [
        torch.where(offsets_BS1 >= back, join_chunks(joined[:, count - back : count - back + length]), 0.0)
        for back in range(1, count + 1)
    ]


def _append(tensors: Tensors, new: Tensors, valid_BS: Tensor | None) -> tuple[Tensors, Tensor]:
    """Return the last K rows, and all rows, those of the state first [B, K + S, D]."""
    old_BKD = tensors["rows"]
    count = old_BKD.shape[1]
    joined = torch.cat((old_BKD, new["x"].to(old_BKD.dtype)), dim=1)
    if valid_BS is None:
        return {"rows": joined[:, -count:]}, joined
    columns_BK = valid_BS.sum(1, keepdim=True) + torch.arange(count, device=joined.device)
    return {"rows": joined.gather(1, columns_BK.unsqueeze(-1).expand(-1, -1, joined.shape[2]))}, joined
