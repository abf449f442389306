"""Tokenizers of many kinds, as files of the `tokenizers` library have them, in which text could become the end mark."""

from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

MARK = "</s>"
TEXT = "a page about markup: the tag </s> closes and <eos> ends"
LETTERS = sorted(set(TEXT) - {" "})


def unigram(byte_fallback: bool = False, unknown: str = "<unk>") -> Any:
    """As SentencePiece has it: marks are pieces of the model, with the best of scores."""
    names = ["<unk>", "<s>", MARK, *([f"<0x{i:02X}>" for i in range(256)] if byte_fallback else [])]
    pieces = [(name, 0.0 if name == MARK else -9.0) for name in names]
    pieces += [("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=names.index(unknown), byte_fallback=byte_fallback))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return inner


def unigram_special() -> Any:
    inner = unigram()
    inner.add_special_tokens(["<s>", MARK])
    return inner


def byte_bpe(extra: tuple[str, ...] = (), merges: tuple[tuple[str, str], ...] = (), **options: Any) -> Any:
    """All bytes, so that any text can be encoded."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges), *extra]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(dict.fromkeys(names))}, list(merges), **options))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|[^\s]+"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [inner.pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    return inner


def bpe_added(special: bool = False, normalized: bool = False) -> Any:
    """Marks that only were added, and tokens added after them, whose ids must stay."""
    inner = byte_bpe()
    for content, is_special in (("<first>", True), (MARK, special), ("<later>", True), ("<plain>", False)):
        token = AddedToken(content, normalized=normalized, special=is_special)
        (inner.add_special_tokens if is_special else inner.add_tokens)([token])
    return inner


def lower_case_bpe() -> Any:
    inner = bpe_added(normalized=True)
    inner.normalizer = normalizers.Lowercase()
    return inner


def bpe_of_a_normalizer() -> Any:
    """Another text becomes the mark's name."""
    inner = byte_bpe((MARK,), ignore_merges=True)
    inner.normalizer = normalizers.Replace("END", MARK)
    return inner


def words(model: str = "WordLevel", unknown: str = "[UNK]") -> Any:
    names = ["[UNK]", MARK, "<eos>", *sorted(set(TEXT.split()) - {MARK, "<eos>"})]
    if model == "WordPiece":
        names += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    inner = Tokenizer(getattr(models, model)(vocabulary, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if model == "WordPiece":
        inner.decoder = decoders.WordPiece(cleanup=False)
    return inner


def nfc_bpe() -> Any:
    inner = bpe_added(special=True)
    inner.normalizer = normalizers.NFC()
    return inner


def blank_first_bpe() -> Any:
    """As RoBERTa's: a blank is put before every text, and stays when it is decoded."""
    inner = bpe_added(special=True)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return inner


MERGES_TO_THE_MARK = (("<", "/"), ("s", ">"), ("</", "s>"), ("a", "g"), (MARK, "s"))

# Every one of them can encode any text without the mark, or has a token for what is unknown.
KINDS: dict[str, Callable[[], Any]] = {
    "unigram": unigram,
    "unigram, special": unigram_special,
    "unigram, bytes": lambda: unigram(byte_fallback=True),
    "bpe, added": bpe_added,
    "bpe, added, normalized": lambda: bpe_added(normalized=True),
    "bpe, special": lambda: bpe_added(special=True),
    "bpe, vocabulary": lambda: byte_bpe((MARK,)),
    "bpe, whole words first": lambda: byte_bpe((MARK,), ignore_merges=True),
    "bpe, merges": lambda: byte_bpe(merges=MERGES_TO_THE_MARK),
    "bpe, unknown is the mark": lambda: byte_bpe((MARK,), unk_token=MARK, ignore_merges=True),
    "bpe, lower case": lower_case_bpe,
    "bpe, of a normalizer": bpe_of_a_normalizer,
    "bpe, composed characters": nfc_bpe,
    "bpe, blank first": blank_first_bpe,
    "words": words,
    "pieces of words": lambda: words("WordPiece"),
}
