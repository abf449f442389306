"""Visibility of keys: which keys each query may see, for everything that attends.

Legend: B batch, S queries, C keys (context), c hidden copies of a position.
"""

import torch
from torch import Tensor

from moe_train.model.mixers.key_value import KeyValue
from moe_train.model.token_index import CopiesLayout, TokenIndex
from moe_train.ops.attention import attend, visible_keys
from moe_train.ops.hidden_attention import hidden_reach

MOST_QUERIES = 512  # of a prompt that attend at once: the mask of a part of the queries exists at a time


def attend_held(q_BHSd: Tensor, queries: TokenIndex, keys: KeyValue, window: int | None) -> Tensor:
    """Compute the attention of new tokens over held keys; a long prompt in parts, so that it needs no mask of all.

    Args:
        q_BHSd: Queries, rotated.
        queries: Index of the queries' tokens.
        keys: Keys, with the positions and documents of their tokens.
        window: Most positions that a query sees, its own included; None: all.

    Returns:
        [B, H, S, d], the outputs of all heads.
    """
    length = q_BHSd.shape[2]
    if length <= MOST_QUERIES or not _needs_mask(queries, keys, window):
        return attend(q_BHSd, keys.k_BGCd, keys.v_BGCd, attention_mask(queries, keys, window))
    parts = []
    for first in range(0, length, MOST_QUERIES):
        own = slice(first, min(first + MOST_QUERIES, length))
        seen = _in_sight(own, length, keys, window)
        mask_B1sC = attention_mask(queries.columns(own), seen, window)
        parts.append(attend(q_BHSd[:, :, own], seen.k_BGCd, seen.v_BGCd, mask_B1sC))
    return torch.cat(parts, dim=2)


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
    if not _needs_mask(queries, keys, window):
        return None
    key_positions_BC = keys.positions_BC
    if key_positions_BC is None:  # the last positions up to the newest query's
        # (B, 1) + (C): counted back from the newest query.
        places_C = torch.arange(1 - keys.k_BGCd.shape[2], 1, device=queries.positions_BS.device)
        key_positions_BC = queries.positions_BS[:, -1:] + places_C
    return visible_keys(queries.positions_BS, key_positions_BC, queries.documents_BS, keys.documents_BC, window)


def _needs_mask(queries: TokenIndex, keys: KeyValue, window: int | None) -> bool:
    num_queries, num_keys = queries.positions_BS.shape[1], keys.k_BGCd.shape[2]
    all_in_window = window is None or num_keys <= window
    is_plain = keys.positions_BC is None and queries.documents_BS is None and all_in_window
    return not (is_plain and num_queries in (1, num_keys))


def _in_sight(own: slice, length: int, keys: KeyValue, window: int | None) -> KeyValue:
    """Select the keys that the queries `own` of `length` new ones may see, as far as the host knows where they are."""
    if keys.positions_BC is not None:
        return keys
    before = keys.k_BGCd.shape[2] - length  # keys in order: those of the new tokens come last
    first = 0 if window is None else max(0, before + own.start - window + 1)
    span = slice(first, before + own.stop)
    documents_BC = None if keys.documents_BC is None else keys.documents_BC[:, span]
    return KeyValue(keys.k_BGCd[:, :, span], keys.v_BGCd[:, :, span], None, documents_BC)


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
