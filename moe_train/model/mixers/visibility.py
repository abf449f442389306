"""Visibility of keys: which keys each query may see, for everything that attends.

Legend: B batch, S queries, C keys (context).
"""

import torch
from torch import Tensor

from moe_train.model.mixers.key_value import KeyValue
from moe_train.model.token_index import TokenIndex
from moe_train.ops.attention import visible_keys


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
