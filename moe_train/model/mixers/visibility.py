"""Visibility of keys: which keys each query may see, for everything that attends.

Legend: B batch, S queries, C keys (context), c hidden copies of a position.
"""

import torch
from torch import Tensor

from moe_train.model.mixers.key_value import KeyValue
from moe_train.model.token_index import CopiesLayout, TokenIndex
from moe_train.ops.attention import visible_keys
from moe_train.ops.hidden_attention import hidden_reach


def attention_mask(queries: TokenIndex, keys: KeyValue, window: int | None) -> Tensor | None:
    """Make the mask of the keys that each query sees: at or before its position, in its window, of its document.

    Args:
        queries: Index of the queries' tokens.
        keys: Keys, with the positions and documents of their tokens.
        window: Most positions that a query sees, its own included; None: all.

    Returns:
        bool [B, 1, S, C], True where the key is visible; None if no mask is needed: for one query that sees every key,
        or for as many queries as keys, each of which sees the keys up to its own place.
    """
    num_queries, num_keys = queries.positions_BS.shape[1], keys.k_BGCd.shape[2]
    documents_BS, key_positions_BC = queries.documents_BS, keys.positions_BC
    if key_positions_BC is None:  # the last positions up to the newest query's
        all_in_window = window is None or num_keys <= window
        if documents_BS is None and all_in_window and num_queries in (1, num_keys):
            return None
        # (B, 1) + (C): counted back from the newest query.
        places_C = torch.arange(1 - num_keys, 1, device=queries.positions_BS.device)
        key_positions_BC = queries.positions_BS[:, -1:] + places_C
    return visible_keys(queries.positions_BS, key_positions_BC, documents_BS, keys.documents_BC, window)


def visible_hidden_keys(queries: TokenIndex, keys: KeyValue, copies: CopiesLayout) -> Tensor:
    """Make the mask of the hidden keys that hidden queries see: of their own position those up to their own copy.

    And those of positions before it, in the window, the chunk and the document, of whatever copy.

    Args:
        queries: Index of the positions that have hidden queries.
        keys: Hidden keys, with the positions and documents of their tokens.
        copies: Layout of the copies.

    Returns:
        bool [B, 1, c*S, c*C], True where the key is visible; queries and keys are ordered by copy, then by position.
    """
    assert keys.positions_BC is not None, "hidden keys have positions"
    number, device = copies.number - 1, queries.positions_BS.device
    distance_BSC = queries.positions_BS.unsqueeze(2) - keys.positions_BC.unsqueeze(1)
    reach_BS1 = hidden_reach(queries.offsets_BS, copies.window, copies.chunk).unsqueeze(2)
    before_BSC, own_BSC = (distance_BSC > 0) & (distance_BSC <= reach_BS1), distance_BSC == 0
    if queries.documents_BS is not None and keys.documents_BC is not None:
        same_BSC = queries.documents_BS.unsqueeze(2) == keys.documents_BC.unsqueeze(1)
        before_BSC, own_BSC = before_BSC & same_BSC, own_BSC & same_BSC
    is_up_to_own_cc = torch.ones(number, number, dtype=torch.bool, device=device).tril()
    mask_BcScC = before_BSC[:, None, :, None] | (own_BSC[:, None, :, None] & is_up_to_own_cc[:, None, :, None])
    return mask_BcScC.flatten(3, 4).flatten(1, 2).unsqueeze(1)
