"""Text generation: prompts shared among ranks, each continued until it ends, with speed measured."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_train.data import Tokenizer
from moe_train.distributed.collectives import Group, all_reduce_max, gather_objects, group_rank, group_size
from moe_train.infer.completion import Completion, CompletionBuilder
from moe_train.infer.decode import DecodePlan, Decoder
from moe_train.infer.speculative import Draft, SpeculationSums, SpeculativeDecoder
from moe_train.model.transformer import Transformer

OnText = Callable[[int, str], None]  # called with the number of a prompt and the next piece of its text


@dataclass(frozen=True)
class Generation:
    """Continuations of all prompts, with their speed.

    Attributes:
        completions: Continuations, one per prompt, in the order of the prompts.
        prefill_tokens: Tokens of all prompts.
        prefill_seconds: Seconds until the first new token of every prompt was known.
        decode_tokens: New tokens of all continuations, without the first of each.
        decode_seconds: Seconds of the decode steps after the first.
        kv_cache_bytes: Bytes of the KV caches on all ranks, for the prompts and their new tokens, not of a draft.
        max_length: Tokens per sequence that the cache has room for, prompt and new tokens together; with a draft, also
            the tokens that it proposes in a round.
        speculation: What the draft model gave; None: there is none.
    """

    completions: tuple[Completion, ...]
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    kv_cache_bytes: int
    max_length: int
    speculation: SpeculationSums | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second, until every prompt has its first new token."""
        return self.prefill_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second after the first of each prompt; 0 where there is none."""
        return self.decode_tokens / max(self.decode_seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values for JSON; "text" is the first continuation."""
        values = {
            "text": self.completions[0].text,
            "completions": [completion.as_dict() for completion in self.completions],
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "kv_cache_bytes": self.kv_cache_bytes,
            "max_length": self.max_length,
        }
        return values if self.speculation is None else values | {"speculation": self.speculation.as_dict()}


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    plan: DecodePlan,
    *,
    stop: Sequence[str] = (),
    ends: bool = True,
    group: Group | None = None,
    on_text: OnText | None = None,
    draft: Draft | None = None,
) -> Generation:
    """Generate the continuations of prompts; each rank takes an equal share of the prompts.

    Args:
        model: Model of this rank.
        tokenizer: Tokenizer of the model.
        prompts: Token ids of each prompt, the same on every rank; no prompt is empty.
        plan: Settings of decoding.
        stop: Stop strings; each ends a continuation.
        ends: Whether the end-of-document token ends a continuation.
        group: Ranks that share the prompts; None: this rank takes all.
        on_text: Called with the number of a prompt of this rank and the next piece of its text, as soon as it is final.
        draft: Draft model, which proposes tokens; None: plain decoding.

    Returns:
        The same result on every rank; the seconds are those of rank 0.

    Collective: All ranks of the group.
    """
    share = -(-len(prompts) // group_size(group))
    first = share * group_rank(group)
    mine = list(prompts[first : first + share])
    end_token = tokenizer.end_of_document if ends else None
    builders = [CompletionBuilder(tokenizer, prompt, stop, end_token) for prompt in mine]
    # A rank without a prompt decodes a filler, because other ranks may need its experts.
    filler = [[tokenizer.end_of_document]] * (share - len(mine))
    longest = max(map(len, prompts))
    rows, own_plan = [*mine, *filler], replace(plan, first_sequence=first)

    def is_done(row: int) -> bool:
        return row >= len(builders) or builders[row].is_done

    speculative = None if draft is None else SpeculativeDecoder(model, draft, rows, own_plan, longest, is_done)
    decoder = speculative or Decoder(model, rows, own_plan, longest)
    device, tell = model.embedding.weight.device, _teller(on_text, first)
    seconds = _decode(_steps(decoder), builders, plan.max_new_tokens, tell, group, device)
    own_bytes = decoder.cache.nbytes * len(mine) // share  # without the bytes of the fillers
    sums = None if speculative is None else speculative.sums.of_part(len(mine), share)
    own = [builder.completion() for builder in builders], own_bytes, seconds, sums
    found = [own] if group is None else gather_objects(own, group)
    completions = [completion for rank in found for completion in rank[0]]
    return Generation(
        completions=tuple(completions),
        prefill_tokens=sum(map(len, prompts)),
        prefill_seconds=found[0][2][0],
        decode_tokens=sum(max(0, len(completion.tokens) - 1) for completion in completions),
        decode_seconds=found[0][2][1],
        kv_cache_bytes=sum(rank[1] for rank in found),
        max_length=decoder.max_length,
        speculation=_joined([rank[3] for rank in found]),
    )


def _decode(
    steps: Iterator[list[list[int]]],
    builders: Sequence[CompletionBuilder],
    max_new_tokens: int,
    tell: OnText,
    group: Group | None,
    device: torch.device,
) -> list[float]:
    """Decode until every continuation has ended; the seconds until the first tokens, and of those after."""
    seconds = [0.0, 0.0]
    began, phase = time.perf_counter(), 0
    for new in steps:
        seconds[phase] += time.perf_counter() - began
        for number, (builder, tokens) in enumerate(zip(builders, new, strict=False)):
            for token in tokens:
                tell(number, builder.push(token))
        is_under_way = any(not builder.is_done and builder.num_tokens < max_new_tokens for builder in builders)
        if not _any(is_under_way, group, device):
            break
        began, phase = time.perf_counter(), 1
    for number, builder in enumerate(builders):
        tell(number, builder.finish())
    return seconds


def _steps(decoder: Decoder | SpeculativeDecoder) -> Iterator[list[list[int]]]:
    """Yield the new tokens of every row, step by step."""
    if isinstance(decoder, SpeculativeDecoder):
        yield from decoder
        return
    for chosen_B in decoder:
        yield [[token] for token in chosen_B.tolist()]  # host synchronisation: the text is built on the host


def _joined(sums: Sequence[SpeculationSums | None]) -> SpeculationSums | None:
    """Add up what the ranks counted; the seconds are those of the first."""
    given = [each for each in sums if each is not None]
    others = (replace(each, draft_seconds=0.0, target_seconds=0.0) for each in given[1:])
    return sum(others, given[0]) if given else None


def _teller(on_text: OnText | None, first: int) -> OnText:
    """A function that passes on what is text, with the number of the prompt among those of all ranks."""

    def tell(number: int, text: str) -> None:
        if on_text is not None and text:
            on_text(first + number, text)

    return tell


def _any(here: bool, group: Group | None, device: torch.device) -> bool:
    """Return whether a flag is true on any rank of the group."""
    return here if group is None else bool(all_reduce_max(torch.tensor([float(here)], device=device), group))
