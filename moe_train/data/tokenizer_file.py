"""Files of the `tokenizers` library: opened with one message for whatever is wrong, and the end mark out of reach.

The library finds the end-of-document token in ordinary text in several ways: as an added token that is not special, as
a word or piece of the model's vocabulary, or through a merge. Here it gets another name, which text does not hold. Its
id stays, and text that spells the old name is encoded like any other text.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moe_train.data.digests import digest_of

MAX_VOCAB_SIZE = (
    2**24
)  # 60 times the largest vocabularies in use; a larger id is damage, and would ask for a huge model


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn every failure of the library inside the block into a ValueError.

    The library raises bare Exceptions. A panic of its Rust code is not even an Exception.

    Args:
        what: What failed, the start of the message.

    Raises:
        ValueError: If the library fails.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 gives it no name that can be imported
            raise
        raise ValueError(f"{what}: {error}") from error


def parse_tokenizer_file(text: str) -> dict[str, Any]:
    """Parse the contents of a file as JSON, and refuse merges on which the library panics.

    Args:
        text: Contents of the file.

    Raises:
        ValueError: If the contents are no JSON object, or a merge does not fit the vocabulary.
    """
    with library_errors("not a file of the tokenizers library"):
        contents = json.loads(text)
        if not isinstance(contents, dict):
            raise ValueError("not a JSON object")
        model = contents.get("model")
        if isinstance(model, dict) and isinstance(model.get("merges"), list):
            _check_merges(model)
        return contents


def open_library_tokenizer(text: str) -> Any:
    """Open the contents of a file, without truncation or padding; added special tokens are not looked for in text.

    Args:
        text: Contents of the file.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        ValueError: If the contents are not those of such a file.
    """
    import tokenizers

    with library_errors("not a file of the tokenizers library"):
        inner = tokenizers.Tokenizer.from_str(text)
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # otherwise "</s>" in the text of a document would end it
        return inner


def check_ids(inner: Any, mark: str) -> int:
    """Check that ids are of a reasonable size, and that no other token has the id of the end mark.

    Args:
        inner: `tokenizers.Tokenizer`.
        mark: Name of the end-of-document token.

    Returns:
        The vocabulary size: one more than the largest id.

    Raises:
        ValueError: If an id is too large, or two tokens share the mark's id.
    """
    vocabulary = inner.get_vocab(with_added_tokens=True)
    largest = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[largest] >= MAX_VOCAB_SIZE:
        raise ValueError(
            f"token {largest!r} has id {vocabulary[largest]}, beyond {MAX_VOCAB_SIZE - 1}: the model would need a row "
            f"for every id up to it, and there are {len(vocabulary)} tokens"
        )
    for name, token in vocabulary.items():
        if token == vocabulary[mark] and name != mark:
            raise ValueError(f"tokens {mark!r} and {name!r} both have id {token}: the end mark needs one of its own")
    return int(vocabulary[largest]) + 1


def hide_token(inner: Any, contents: dict[str, Any], name: str) -> None:
    """Rename a token, so that no text is encoded to it. All ids stay.

    A single character of the vocabulary of a BPE without byte fallback stays: the model would drop it from all text.

    Args:
        inner: `tokenizers.Tokenizer` of the file.
        contents: Contents of the file, which are changed.
        name: Name of the token.
    """
    model = contents["model"]
    vocabulary = model["vocab"]
    is_bpe = type(inner.model).__name__ == "BPE"
    # The digest makes it a name that no document holds by chance.
    hidden = f"\0end of document {digest_of([contents, name])}\0"
    if is_bpe and len(name) == 1 and name in vocabulary and not model.get("byte_fallback"):
        return
    if isinstance(vocabulary, dict):
        model["vocab"] = {hidden if each == name else each: value for each, value in vocabulary.items()}
    else:  # a Unigram model: a list of names with their scores, whose places are the ids
        model["vocab"] = [[hidden if each == name else each, score] for each, score in vocabulary]
    if is_bpe:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [_pair(merge) for merge in model["merges"]]
        model["merges"] = [
            merge
            for merge, (left, right) in zip(model["merges"], pairs, strict=True)
            if name not in (left, right, left + right[prefix:])
        ]
    for added in contents.get("added_tokens") or ():
        if added["content"] == name:
            added |= {"content": hidden, "special": True}


def unknown_token(inner: Any, contents: dict[str, Any]) -> int | None:
    """Find the id of the token that stands for unknown parts of a text; None if there is none.

    Args:
        inner: `tokenizers.Tokenizer` of the file.
        contents: Contents of the file.
    """
    name = getattr(inner.model, "unk_token", None)
    if name is not None:
        found: int | None = inner.token_to_id(name)
        return found
    given: int | None = contents["model"].get("unk_id")  # Unigram models give it in no other way
    return given


def _check_merges(model: dict[str, Any]) -> None:
    """Refuse merges whose second part lacks the prefix of continuing parts, or whose result has no token."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        left, right = _pair(merge)
        if not right.startswith(prefix):
            raise ValueError(f"merge {merge!r}: its second part does not begin with {prefix!r}")
        if left + right[len(prefix) :] not in model["vocab"]:
            raise ValueError(f"merge {merge!r}: the vocabulary has no token {left + right[len(prefix) :]!r}")


def _pair(merge: Any) -> tuple[str, str]:
    """Split a merge, which is a list of two or, in older files, a text with a blank between."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
