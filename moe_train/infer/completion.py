"""From the tokens of one prompt's continuation to its text: what is certain already, and where it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_train.data import Tokenizer

FinishReason = Literal["length", "end", "stop"]
_CONTEXT = 8  # tokens of the prompt that are decoded with the new ones: blanks and joined characters depend on them
_SETTLE_TOKENS = 32  # new tokens after which the text so far is not decoded again
_BROKEN = "\ufffd"  # what stands for bytes that are no character, or not yet


@dataclass(frozen=True)
class Completion:
    """How a prompt went on.

    Attributes:
        prompt_tokens: Tokens of the prompt, the mark at its beginning included.
        tokens: The new tokens that the text is made of, the one that ended it included.
        text: Of the new tokens, without end mark and stop string.
        finish_reason: length: as many tokens as were asked for; end: the end-of-document mark; stop: a stop string.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "finish_reason": self.finish_reason,
        }


class CompletionBuilder:
    """The text of one prompt as its tokens come."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = (), end_token: int | None = None
    ) -> None:
        """Begin.

        Args:
            tokenizer: Of the model.
            prompt: Its token ids.
            stop: Texts that end it, and are not part of it.
            end_token: A token that ends it; None: none does.
        """
        self._tokenizer, self._stop, self._end_token = tokenizer, tuple(stop), end_token
        self._prompt_tokens, self._context = len(prompt), list(prompt[-_CONTEXT:])
        self._before = tokenizer.decode(self._context)
        self._tokens: list[int] = []
        self._pending: list[int] = []  # those whose text is not settled
        self._settled, self._text, self._shown = "", "", 0
        self._reason: FinishReason | None = None

    @property
    def is_done(self) -> bool:
        """Whether an end mark or a stop string has come."""
        return self._reason is not None

    def push(self, token: int) -> str:
        """Take a token in, unless it is done already; the text that is certain now and was not before."""
        if self.is_done:
            return ""
        self._tokens.append(token)
        self._pending.append(token)
        if token == self._end_token:
            self._reason = "end"
            return self._show(len(self._text))
        self._text = self._decoded()
        places = (self._text.find(stop, self._shown) for stop in self._stop)  # nothing that is shown begins one
        found = min((place for place in places if place >= 0), default=None)
        if found is not None:
            self._text, self._reason = self._text[:found], "stop"
            return self._show(found)
        return self._show(self._certain())

    def finish(self) -> str:
        """No token follows; the rest of the text."""
        return self._show(len(self._text))

    def completion(self) -> Completion:
        """The continuation so far."""
        return Completion(self._prompt_tokens, tuple(self._tokens), self._text, self._reason or "length")

    def _decoded(self) -> str:
        whole = self._tokenizer.decode([*self._context, *self._pending])
        if whole.startswith(self._before):
            text = self._settled + whole[len(self._before) :]
        else:  # the prompt ends inside a character
            text = self._settled + self._tokenizer.decode(self._pending)
        if len(self._pending) >= _SETTLE_TOKENS and not text.endswith(_BROKEN):
            self._context = [*self._context, *self._pending][-_CONTEXT:]
            self._before, self._settled, self._pending = self._tokenizer.decode(self._context), text, []
        return text

    def _certain(self) -> int:
        """Characters that no further token changes: not half a character, nor what may become a stop string."""
        length = len(self._text.rstrip(_BROKEN))
        for stop in self._stop:
            for size in range(min(len(stop) - 1, length), 0, -1):
                if self._text[:length].endswith(stop[:size]):
                    length -= size
                    break
        return length

    def _show(self, end: int) -> str:
        new = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return new
