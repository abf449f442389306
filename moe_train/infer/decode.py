"""Decoding of a batch of prompts with a KV cache, one token per prompt and step.

Prompts of different lengths are padded on the left, so that all continue at the same column. The padding counts as a
separate document, which no token of the prompt attends to.
Legend: B sequences, S prompt length, V vocab_size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_train.infer.sampling import GREEDY, Sampling, choose_tokens
from moe_train.model.decode_state import Cache
from moe_train.model.token_index import document_offsets
from moe_train.model.transformer import Tokens, Transformer
from moe_train.ops.keyed_random import combine, make_key, uniform

_PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class DecodePlan:
    """Settings of decoding.

    Attributes:
        max_new_tokens: Most new tokens per prompt.
        vocab_size: Number of tokens in the vocabulary. Rows of the embedding beyond it are padding and never sampled.
        sampling: How the next token is chosen.
        cache_dtype: dtype of the cached keys and values; None: dtype of the model.
        prefill_chunk: Most tokens per prompt in one forward pass of the prefill, which bounds its memory; None: all.
        end_of_document: Id of the end-of-document token, where the model isolates documents; None: it does not.
        first_sequence: Number of the first prompt. The draws of prompt i depend on first_sequence + i, in any batch.
    """

    max_new_tokens: int
    vocab_size: int
    sampling: Sampling = GREEDY
    cache_dtype: torch.dtype | None = None
    prefill_chunk: int | None = None
    end_of_document: int | None = None
    first_sequence: int = 0


class Decoder:
    """Iterator over the new tokens of a batch of prompts, with their cache. Iterate once."""

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], plan: DecodePlan, padded_length: int | None = None
    ) -> None:
        """Pad the prompts and allocate the cache.

        Args:
            model: Model to decode with; iteration puts it into evaluation mode, without router noise.
            prompts: Token ids of each prompt; at least one prompt, and at least one token each.
            plan: Settings of decoding.
            padded_length: Length of every prompt after padding, in tokens; None: length of the longest prompt.
        """
        assert prompts and min(map(len, prompts)) > 0, "a prompt has a token"
        self._model, self._plan = model, plan
        length = padded_length or max(map(len, prompts))
        self.max_length = length + plan.max_new_tokens
        device = model.embedding.weight.device
        self.prompts = _left_padded(prompts, length, plan, device)
        self._prompt_lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.cache: Cache = model.new_cache(len(prompts), self.max_length, plan.cache_dtype)

    def __iter__(self) -> Iterator[Tensor]:
        """Decode max_new_tokens steps.

        Yields:
            The new token of each prompt, int64 [B].

        Collective: All ranks that share the experts must take the same number of steps, with the same padded length.
        """
        self._model.eval()
        plan, key = self._plan, make_key(self._plan.sampling.seed, "generate")
        tokens = self.prompts
        for step in range(plan.max_new_tokens):
            logits_BV = self._next_logits(tokens)[:, : plan.vocab_size]
            positions_B = self._prompt_lengths_B + step
            draws_B = uniform(combine(combine(tokens.sequences_B, key), positions_B))
            chosen_B = choose_tokens(logits_BV, plan.sampling, draws_B)
            yield chosen_B
            if step + 1 < plan.max_new_tokens:
                tokens = self._following(tokens, chosen_B.unsqueeze(1), positions_B.unsqueeze(1))

    def read_prompts(self, count: int | None = None) -> Tensor:
        """Take columns of the padded prompts into the cache, and compute the logits of the token after them. [B, V].

        Args:
            count: Number of first columns, at least 1; None: all.

        Collective: All ranks that share the experts, with the same padded length and count.
        """
        return self._next_logits(_columns(self.prompts, slice(0, count or self.prompts.ids_BS.shape[1])))

    @torch.no_grad()
    def _next_logits(self, tokens: Tokens) -> Tensor:
        """Compute the logits of the token after the last one. [B, V]."""
        tokens = self._model.for_prefill(tokens)
        length = tokens.ids_BS.shape[1]
        chunk = self._plan.prefill_chunk or length
        for start in range(0, length, chunk):
            part = _columns(tokens, slice(start, min(start + chunk, length)))
            logits_B1V = self._model(part, self.cache, num_logits=1).logits_BSV
        return logits_B1V[:, -1]

    def _following(self, tokens: Tokens, ids_B1: Tensor, positions_B1: Tensor) -> Tokens:
        """Make the next input of the model from the new tokens."""
        sequences_B, step = tokens.sequences_B, tokens.step
        if tokens.positions_BS is None and tokens.documents_BS is None:
            first = tokens.first_position + tokens.ids_BS.shape[1]
            return Tokens(ids_B1, sequences_B, step, first_position=first)
        if tokens.documents_BS is None or tokens.offsets_BS is None:
            return Tokens(ids_B1, sequences_B, step, positions_B1)
        documents_B1, offsets_B1 = tokens.documents_BS[:, -1:], tokens.offsets_BS[:, -1:] + 1
        if self._plan.end_of_document is not None:
            # The end-of-document token belongs to the document after it.
            is_mark_B1 = ids_B1 == self._plan.end_of_document
            documents_B1, offsets_B1 = documents_B1 + is_mark_B1, offsets_B1.masked_fill(is_mark_B1, 0)
        return Tokens(ids_B1, sequences_B, step, positions_B1, documents_B1, offsets_B1)


def _left_padded(prompts: Sequence[Sequence[int]], longest: int, plan: DecodePlan, device: torch.device) -> Tokens:
    padding = [longest - len(prompt) for prompt in prompts]
    ids_BS = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    sequences_B = torch.arange(plan.first_sequence, plan.first_sequence + len(prompts), device=device)
    if plan.end_of_document is None and not any(padding):
        return Tokens(ids_BS.to(device), sequences_B)
    columns_BS = torch.arange(longest) - torch.tensor(padding).unsqueeze(1)
    documents_BS = torch.zeros_like(ids_BS)
    if plan.end_of_document is not None:
        documents_BS = ((ids_BS == plan.end_of_document) & (columns_BS >= 0)).cumsum(1)
    documents_BS = documents_BS.masked_fill(columns_BS < 0, _PADDING_DOCUMENT).to(device)
    # Padding has position 0: it attends to padding only, and no other token attends to it.
    positions_BS = columns_BS.clamp(min=0).to(device)
    return Tokens(
        ids_BS.to(device),
        sequences_B,
        positions_BS=positions_BS,
        documents_BS=documents_BS,
        offsets_BS=document_offsets(documents_BS),
    )


def _columns(tokens: Tokens, span: slice) -> Tokens:
    """Select a span of columns of the prompts."""

    def part(x_BS: Tensor | None) -> Tensor | None:
        return None if x_BS is None else x_BS[:, span]

    return replace(
        tokens,
        ids_BS=tokens.ids_BS[:, span],
        positions_BS=part(tokens.positions_BS),
        documents_BS=part(tokens.documents_BS),
        offsets_BS=part(tokens.offsets_BS),
        first_position=tokens.first_position + span.start,
        hidden_from=None if tokens.hidden_from is None else max(0, tokens.hidden_from - span.start),
    )
