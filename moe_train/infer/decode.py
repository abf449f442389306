"""Decoding a batch of prompts with a cache, one token of each at a time.

Prompts of unequal length are filled up on the left, so that all go on at the same column; the padding counts as a
document of its own, which no token of the prompt attends to.
Legend: B sequences, S prompt length, V vocab_size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_train.infer.sampling import GREEDY, Sampling, choose_tokens
from moe_train.model.decode_state import Cache
from moe_train.model.transformer import Tokens, Transformer
from moe_train.ops.keyed_random import combine, make_key, uniform

_PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class DecodePlan:
    """How prompts are gone on with.

    Attributes:
        max_new_tokens: Most tokens a prompt is given.
        vocab_size: Tokens that exist; rows of the embedding beyond them are padding and never drawn.
        sampling: How a token is chosen.
        cache_dtype: Of keys and values; None: the model's.
        prefill_chunk: Most tokens of a prompt that pass the model at once, which bounds its memory; None: all.
        end_of_document: The mark that separates documents, where the model isolates them; None: it does not.
        first_sequence: Number of the first prompt: prompt i is drawn for as number first_sequence + i, in any batch.
    """

    max_new_tokens: int
    vocab_size: int
    sampling: Sampling = GREEDY
    cache_dtype: torch.dtype | None = None
    prefill_chunk: int | None = None
    end_of_document: int | None = None
    first_sequence: int = 0


class Decoder:
    """A batch of prompts and its cache. To be iterated over once: each step gives one new token of each prompt."""

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], plan: DecodePlan, padded_length: int | None = None
    ) -> None:
        """Set the cache aside.

        Args:
            model: Put into evaluation mode: no router noise.
            prompts: Token ids of each, at least one.
            plan: How.
            padded_length: Of every prompt once it is filled up; None: that of the longest.
        """
        assert prompts and min(map(len, prompts)) > 0, "a prompt has a token"
        self._model, self._plan = model, plan
        length = padded_length or max(map(len, prompts))
        self.max_length = length + plan.max_new_tokens
        self._prompts = _left_padded(prompts, length, plan, model.embedding.weight.device)
        self.cache: Cache = model.new_cache(len(prompts), self.max_length, plan.cache_dtype)

    def __iter__(self) -> Iterator[Tensor]:
        """The new tokens of each step, int64 [B]; max_new_tokens steps.

        Collective: All ranks that share the experts take as many steps, with prompts of one padded length.
        """
        self._model.eval()
        plan, key = self._plan, make_key(self._plan.sampling.seed, "generate")
        tokens = self._prompts
        for step in range(plan.max_new_tokens):
            logits_BV = self._next_logits(tokens)[:, : plan.vocab_size]
            positions_B1 = _last_column(tokens.positions_BS) + 1
            draws_B = uniform(combine(combine(tokens.sequences_B, key), positions_B1[:, 0]))
            chosen_B = choose_tokens(logits_BV, plan.sampling, draws_B)
            yield chosen_B
            if step + 1 < plan.max_new_tokens:
                tokens = self._following(tokens, chosen_B.unsqueeze(1), positions_B1)

    @torch.no_grad()
    def _next_logits(self, tokens: Tokens) -> Tensor:
        """Of the token behind the last one. [B, V]."""
        length = tokens.ids_BS.shape[1]
        chunk = self._plan.prefill_chunk or length
        for start in range(0, length, chunk):
            part = _columns(tokens, slice(start, min(start + chunk, length)))
            logits_B1V = self._model(part, self.cache, num_logits=1).logits_BSV
        return logits_B1V[:, -1]

    def _following(self, tokens: Tokens, ids_B1: Tensor, positions_B1: Tensor) -> Tokens:
        documents_B1 = None
        if tokens.documents_BS is not None:
            documents_B1 = _last_column(tokens.documents_BS)
            if self._plan.end_of_document is not None:
                documents_B1 = documents_B1 + (ids_B1 == self._plan.end_of_document)
        return replace(tokens, ids_BS=ids_B1, positions_BS=positions_B1, documents_BS=documents_B1)


def _left_padded(prompts: Sequence[Sequence[int]], longest: int, plan: DecodePlan, device: torch.device) -> Tokens:
    padding = [longest - len(prompt) for prompt in prompts]
    ids_BS = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    columns_BS = torch.arange(longest) - torch.tensor(padding).unsqueeze(1)
    documents_BS = None
    if plan.end_of_document is not None or any(padding):
        documents_BS = torch.zeros_like(ids_BS)
        if plan.end_of_document is not None:
            documents_BS = ((ids_BS == plan.end_of_document) & (columns_BS >= 0)).cumsum(1)
        documents_BS = documents_BS.masked_fill(columns_BS < 0, _PADDING_DOCUMENT).to(device)
    sequences_B = torch.arange(plan.first_sequence, plan.first_sequence + len(prompts), device=device)
    # Padding stands at position 0: it sees padding alone, and nothing sees it.
    positions_BS = columns_BS.clamp(min=0).to(device)
    return Tokens(ids_BS.to(device), sequences_B, positions_BS=positions_BS, documents_BS=documents_BS)


def _columns(tokens: Tokens, span: slice) -> Tokens:
    assert tokens.positions_BS is not None
    documents_BS = None if tokens.documents_BS is None else tokens.documents_BS[:, span]
    return replace(
        tokens,
        ids_BS=tokens.ids_BS[:, span],
        positions_BS=tokens.positions_BS[:, span],
        documents_BS=documents_BS,
    )


def _last_column(x_BS: Tensor | None) -> Tensor:
    assert x_BS is not None
    return x_BS[:, -1:]
