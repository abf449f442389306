"""Text of a continuation, built token by token: which part of it is final, and where it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_train.data import Tokenizer

FinishReason = Literal["length", "end", "stop"]
_CONTEXT = 8  # earlier tokens that are decoded with the new ones, because blanks and joined characters depend on them
_SETTLE_TOKENS = 32  # new tokens after which the text so far is final and is not decoded again
_BROKEN = "\ufffd"  # the character that a decoder gives for invalid or incomplete bytes


@dataclass(frozen=True)
class Completion:
    """Continuation of one prompt.

    Attributes:
        prompt_tokens: Number of tokens of the prompt, the end-of-document token at its start included.
        tokens: Ids of the new tokens, the one that ended the text included.
        text: Text of the new tokens, without end-of-document token and stop string.
        finish_reason: Why the continuation ended. length: it has the requested number of tokens. end: the model chose
            the end-of-document token. stop: a stop string came.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON, with the number of new tokens in place of their ids."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "finish_reason": self.finish_reason,
        }


class CompletionBuilder:
    """Builder of the text of one continuation from its tokens, one at a time."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = (), end_token: int | None = None
    ) -> None:
        """Start the continuation of a prompt.

        Args:
            tokenizer: Tokenizer of the model.
            prompt: Token ids of the prompt.
            stop: Stop strings; each ends the text and is not part of it.
            end_token: Id of the token that ends the text; None: no token does.
        """
        self._tokenizer, self._stop, self._end_token = tokenizer, tuple(stop), end_token
        self._prompt_tokens, self._context = len(prompt), list(prompt[-_CONTEXT:])
        self._before = tokenizer.decode(self._context)
        self._tokens: list[int] = []
        self._pending: list[int] = []  # tokens whose text is not final
        self._settled, self._text, self._shown = "", "", 0
        self._reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far."""
        return len(self._tokens)

    @property
    def is_done(self) -> bool:
        """Whether the end token or a stop string has come."""
        return self._reason is not None

    def push(self, token: int) -> str:
        """Add a token, and return the text that became final with it. After the end it has no effect.

        Args:
            token: Id of the next token.

        Returns:
            Text that follows all text returned before; often empty.
        """
        if self.is_done:
            return ""
        self._tokens.append(token)
        self._pending.append(token)
        if token == self._end_token:
            self._reason = "end"
            return self._show(len(self._text))
        self._text = self._decoded()
        places = (self._text.find(stop, self._shown) for stop in self._stop)  # returned text never begins one
        found = min((place for place in places if place >= 0), default=None)
        if found is not None:
            self._text, self._reason = self._text[:found], "stop"
            return self._show(found)
        return self._show(self._certain())

    def finish(self) -> str:
        """End the continuation and return the rest of its text."""
        return self._show(len(self._text))

    def completion(self) -> Completion:
        """Return the continuation so far."""
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
        """Count the characters that no further token changes: no half character, no start of a stop string."""
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
