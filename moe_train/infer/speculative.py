"""Speculative decoding: a draft model proposes tokens, and the target checks them all in one forward pass.

A round gives each text 1 to N + 1 tokens with exactly the target's distribution; the greedy text is the target's own.
Texts accept different numbers of tokens, and stand at different lengths from then on. Every draw depends on the seed,
the text's number and the position alone, so that a text depends on neither its batch nor the ranks.

Legend: B texts, S tokens of a forward pass, N proposed tokens per round, M = N + 1, V vocab_size.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moe_train.infer.decode import DecodePlan, Decoder
from moe_train.infer.rejection import Verdict, judge
from moe_train.infer.sampling import choose_tokens, distribution, draw_tokens
from moe_train.infer.transcript import Transcript
from moe_train.model.decode_state import Cache
from moe_train.model.transformer import Transformer
from moe_train.ops.keyed_random import combine, make_key, uniform


@dataclass(frozen=True)
class Draft:
    """A draft model and how it is used.

    Attributes:
        model: Model that proposes tokens, of the target's vocabulary.
        num_tokens: N, tokens that it proposes per round; 0 is plain decoding.
        end_of_document: Id of the end-of-document token, where this model isolates documents; None: it does not.
        shares_cache: Whether the model is the target's first layers, which read and write the target's own cache.
    """

    model: Transformer
    num_tokens: int
    end_of_document: int | None = None
    shares_cache: bool = False


@dataclass(frozen=True)
class SpeculationSums:
    """What the rounds were, in sums. Texts that have ended do not count.

    Attributes:
        rounds: Rounds, counted once per text.
        examined: Proposed tokens up to the first rejection, that one included.
        accepted: Proposed tokens that stayed.
        draft_seconds: Seconds of the draft model.
        target_seconds: Seconds of the target, and of the choice among the proposed tokens.
        draft_cache_bytes: Bytes of the draft's own cache; 0 if it shares the target's.
    """

    rounds: int = 0
    examined: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0
    draft_cache_bytes: int = 0

    def __add__(self, other: "SpeculationSums") -> "SpeculationSums":
        return SpeculationSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def of_part(self, texts: int, batch_size: int) -> "SpeculationSums":
        """Return the same sums, with the cache bytes of some texts of a batch."""
        return replace(self, draft_cache_bytes=self.draft_cache_bytes * texts // batch_size)

    def as_dict(self) -> dict[str, float]:
        """Return the figures as plain values for JSON."""
        return {
            "acceptance": self.acceptance,
            "tokens_per_round": self.tokens_per_round,
            "rounds": self.rounds,
            "draft_seconds": self.draft_seconds,
            "target_seconds": self.target_seconds,
            "draft_kv_cache_bytes": self.draft_cache_bytes,
        }

    @property
    def acceptance(self) -> float:
        """Share of the examined tokens that stayed: the estimate of a in the formulas. 0 if none was examined."""
        return self.accepted / max(self.examined, 1)

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens that a round gives a text, 1 to N + 1; 0 without a round."""
        return (self.accepted + self.rounds) / max(self.rounds, 1)


@dataclass(frozen=True)
class _Reader:
    """A model that reads texts, in evaluation mode.

    Attributes:
        model: The model.
        cache: Its cache.
        decoder: Decoder that takes in the prompts.
        transcript: Texts as the model sees them.
    """

    model: Transformer
    cache: Cache
    decoder: Decoder
    transcript: Transcript

    @staticmethod
    def new(
        model: Transformer, prompts: Sequence[Sequence[int]], plan: DecodePlan, padded_length: int | None
    ) -> "_Reader":
        """Pad the prompts and allocate the cache."""
        decoder = Decoder(model.eval(), prompts, plan, padded_length)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.embedding.weight.device)
        room = plan.max_new_tokens + 1  # the token after the proposed ones is written before it is counted
        transcript = Transcript(decoder.prompts, lengths_B, room, plan.end_of_document)
        return _Reader(model, decoder.cache, decoder, transcript)

    @torch.no_grad()
    def read(self, columns_BS: Tensor, first: Sequence[int], num_logits: int) -> Tensor:
        """Take the tokens of columns into the cache; logits of the last ones. [B, num_logits, V]."""
        return self.model(self.transcript.tokens(columns_BS, first), self.cache, num_logits=num_logits).logits_BSV


class SpeculativeDecoder:
    """Iterator over the rounds of a batch of prompts. Iterate once, and stop when all texts have ended."""

    def __init__(
        self,
        model: Transformer,
        draft: Draft,
        prompts: Sequence[Sequence[int]],
        plan: DecodePlan,
        padded_length: int | None = None,
        is_done: Callable[[int], bool] = lambda row: False,
    ) -> None:
        """Pad the prompts and allocate the caches.

        Args:
            model: Target model, whose distribution the texts have.
            draft: Draft model.
            prompts: Token ids of each prompt; at least one prompt, and at least one token each.
            plan: Settings of decoding; its cache dtype and prefill chunk hold for both models.
            padded_length: Length of every prompt after padding, in tokens; None: length of the longest prompt.
            is_done: Tells, between rounds, whether a text has ended early; its rounds give no tokens and do not count.
        """
        self._is_done = is_done
        self._plan, self._draft_is_own = plan, not draft.shares_cache
        self._number, self._device = draft.num_tokens, model.embedding.weight.device
        # Proposed tokens are in the caches before they are rejected.
        roomy = replace(plan, max_new_tokens=plan.max_new_tokens + draft.num_tokens)
        self._target = _Reader.new(model, prompts, roomy, padded_length)
        if draft.shares_cache:
            shared = self._target.cache.below(len(draft.model.blocks))
            self._draft = replace(self._target, model=draft.model.eval(), cache=shared)
        else:
            own = replace(roomy, end_of_document=draft.end_of_document)
            self._draft = _Reader.new(draft.model, prompts, own, padded_length)
        self.max_length = self._target.decoder.max_length
        self._ends = [self._target.decoder.prompts.ids_BS.shape[1]] * len(prompts)  # number of columns of each text
        self._last_end = self._ends[0] + plan.max_new_tokens
        self.sums = SpeculationSums(draft_cache_bytes=self._draft.cache.nbytes if self._draft_is_own else 0)

    @property
    def cache(self) -> Cache:
        """Cache of the target."""
        return self._target.cache

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Decode without an end: other ranks may need this one's experts. A text that has ended gets no more tokens.

        Yields:
            The new tokens of each text: at first one of every text, then those of a round.

        Collective: All ranks that share the experts of a model must take the same number of rounds.
        """
        columns_B1 = self._columns_behind_texts(0, 1)
        logits_BV = self._target.decoder.read_prompts()[:, : self._plan.vocab_size]
        if self._draft_is_own and self._ends[0] > 1:
            self._draft.decoder.read_prompts(self._ends[0] - 1)  # it reads the last two tokens in the first round
        chosen_B = choose_tokens(logits_BV, self._plan.sampling, self._draws("generate", columns_B1)[:, 0])
        self._write(chosen_B.unsqueeze(1), columns_B1)
        self._ends = [end + 1 for end in self._ends]
        yield [[token] for token in chosen_B.tolist()]  # host synchronisation: the text is built there
        while True:
            yield self._round()

    def _round(self) -> list[list[int]]:
        began = time.perf_counter()
        mark = self._draft.cache.snapshot()
        proposed_BN, q_BNV = self._propose()
        if not self._draft_is_own:
            self._draft.cache.restore(mark)  # the target reads the same tokens into the same layers
        _wait(self._device)
        between = time.perf_counter()
        target_mark = self._target.cache.snapshot()
        verdict = self._verify(proposed_BN, q_BNV)
        accepted_B, next_B = verdict.accepted_B, verdict.next_B
        self._write(next_B.unsqueeze(1), self._columns_behind_texts(0, 1) + accepted_B.unsqueeze(1))
        joined = torch.cat((proposed_BN, next_B.unsqueeze(1), accepted_B.unsqueeze(1)), dim=1)
        # Host synchronisation: the texts are built on the host.
        new = self._commit([row[:accepted] + [token] for *row, token, accepted in joined.tolist()])
        counts_B = torch.tensor([len(tokens) for tokens in new], device=self._device)
        # In both caches the tokens since the mark begin with those before the proposed ones: the last token of the
        # text for the target, the last two for the draft. So both keep as many tokens as the text has gained, and stand
        # one and two tokens before its new end.
        self._target.cache.keep(target_mark, counts_B)
        if self._draft_is_own and self._number > 0:
            self._draft.cache.keep(mark, counts_B)
        _wait(self._device)
        seconds = between - began, time.perf_counter() - between
        self.sums += SpeculationSums(draft_seconds=seconds[0], target_seconds=seconds[1])
        return new

    def _propose(self) -> tuple[Tensor, Tensor]:
        """Draw N tokens of each text from the draft, one after the other; int64 [B, N] and their q [B, N, V]."""
        size, sampling, texts = self._plan.vocab_size, self._plan.sampling, len(self._ends)
        proposed = [torch.zeros(texts, 0, dtype=torch.int64, device=self._device)]
        q = [torch.zeros(texts, 0, size, dtype=torch.float64, device=self._device)]
        # A draft with a cache of its own lacks the last two tokens: where all were accepted, it has not read the last.
        behind = 2 if self._draft_is_own else 1
        for place in range(self._number):
            start, count = (-behind, behind) if place == 0 else (place - 1, 1)
            columns_BS = self._columns_behind_texts(start, count)
            logits_BV = self._draft.read(columns_BS, [end + start for end in self._ends], 1)[:, -1, :size]
            q_BV, columns_B1 = distribution(logits_BV, sampling), self._columns_behind_texts(place, 1)
            proposed_B1 = draw_tokens(q_BV, self._draws("draft", columns_B1)[:, 0]).unsqueeze(1)
            self._write(proposed_B1, columns_B1)
            proposed.append(proposed_B1)
            q.append(q_BV.unsqueeze(1))
        return torch.cat(proposed, dim=1), torch.cat(q, dim=1)

    def _verify(self, proposed_BN: Tensor, q_BNV: Tensor) -> Verdict:
        """Read the last token and the proposed ones with the target, and judge them."""
        columns_BM = self._columns_behind_texts(-1, self._number + 1)
        logits_BMV = self._target.read(columns_BM, [end - 1 for end in self._ends], self._number + 1)
        logits_TV = logits_BMV[:, :, : self._plan.vocab_size].flatten(0, 1)
        p_BMV = distribution(logits_TV, self._plan.sampling).unflatten(0, columns_BM.shape)
        accept_BM, next_BM = (self._draws(name, columns_BM + 1) for name in ("accept", "generate"))
        return judge(proposed_BN, q_BNV, p_BMV, accept_BM[:, :-1], next_BM)

    def _columns_behind_texts(self, start: int, count: int) -> Tensor:
        """Columns counted from the end of each text; int64 [B, count]."""
        places_S = torch.arange(start, start + count, device=self._device)
        return torch.tensor(self._ends, device=self._device).unsqueeze(1) + places_S

    def _draws(self, name: str, columns_BS: Tensor) -> Tensor:
        """Draw a number in (0, 1) for every column, by seed, name, text and position. fp64 [B, S]."""
        sequences_B = self._target.decoder.prompts.sequences_B
        key_B1 = combine(sequences_B, make_key(self._plan.sampling.seed, name)).unsqueeze(1)
        return uniform(combine(key_B1, self._target.transcript.positions(columns_BS)))

    def _write(self, ids_BS: Tensor, columns_BS: Tensor) -> None:
        for transcript in {id(reader.transcript): reader.transcript for reader in (self._target, self._draft)}.values():
            transcript.write(ids_BS, columns_BS)

    def _commit(self, found: Sequence[list[int]]) -> list[list[int]]:
        """Add a round's tokens to the texts, as far as there is room, and count the round; those that were added."""
        added = []
        for row, tokens in enumerate(found):
            taken = [] if self._is_done(row) else tokens[: self._last_end - self._ends[row]]
            if taken:
                accepted = len(tokens) - 1
                self.sums += SpeculationSums(1, min(accepted + 1, self._number), accepted)
            self._ends[row] += len(taken)
            added.append(taken)
        return added


def _wait(device: torch.device) -> None:
    """Wait for the device, so that each model's seconds are its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
