"""Tokenizers: round trips, marks that text can never become, and files that will not do."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from moe_train.config.errors import UsageError
from moe_train.data.tokenizers import BPE_END_OF_DOCUMENT, ByteTokenizer, load_tokenizer_file, token_dtype, train_bpe
from tests.data.conftest import make_documents

ODD_TEXTS = ["", " ", "\n", "\r\n\n\t  x", "\x00\x0b\x0c\x85\u2028", "  日本\u3000語🎈", "a<|endoftext|>b", "0" * 50]


def write_word_tokenizer(path, specials=("</s>",), words=("a", "b", "[UNK]")):
    """A tokenizer file as others make them: it truncates, pads, and adds a mark at the end."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(specials))
    if specials:
        mark = specials[-1]
        inner.post_processor = processors.TemplateProcessing(f"$A {mark}", None, [(mark, inner.token_to_id(mark))])
    inner.enable_truncation(3)
    inner.enable_padding(length=8)
    inner.save(str(path))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(make_documents(40).values(), 340, path)
    return load_tokenizer_file(path, None)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
@example(text="".join(ODD_TEXTS))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([tokenizer.end_of_document, *ids, tokenizer.end_of_document]) == text


def test_bytes_that_are_not_utf8_are_replaced():
    assert ByteTokenizer().decode([0x61, 0xFF, 256, 300, 0x62]) == "a\ufffdb"


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
@example(text="".join(ODD_TEXTS))
def test_bpe_round_trip(bpe, text):
    (ids,) = bpe.encode_batch([text])
    assert ids.dtype == np.uint16
    assert bpe.end_of_document not in ids
    assert bpe.decode([bpe.end_of_document, *ids, 5000]) == text


def test_bpe_has_as_many_entries_as_asked_for_and_shortens_text(bpe):
    assert bpe.vocab_size == 340
    text = next(iter(make_documents(1).values()))
    assert len(bpe.encode_batch([text])[0]) < len(text.encode()) / 2


def test_bpe_keeps_line_end_and_indentation_in_one_token(tmp_path):
    train_bpe(["if x:\n        return y\n" * 50], 300, tmp_path / "t.json")
    tokenizer = load_tokenizer_file(tmp_path / "t.json", None)
    (ids,) = tokenizer.encode_batch(["if x:\n        return y\n"])
    assert [tokenizer.decode([i]) for i in ids] == ["if", " x", ":\n        ", "return", " y", "\n"]


def test_bpe_is_the_same_each_time_and_smaller_where_text_runs_out(tmp_path):
    texts = list(make_documents(30).values())
    for name in "ab":
        train_bpe(texts, 500, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    train_bpe(["aaa"], 500, tmp_path / "small")
    small = load_tokenizer_file(tmp_path / "small", None)
    assert 257 <= small.vocab_size <= 259
    assert small.decode(small.encode_batch(["never seen: ß"])[0]) == "never seen: ß"
    assert small.mark == BPE_END_OF_DOCUMENT


def test_a_file_encodes_whole_texts_without_its_special_tokens(tmp_path):
    tokenizer = load_tokenizer_file(write_word_tokenizer(tmp_path / "t.json"), None)
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (4, 3)
    ids = tokenizer.encode_batch(["a b a b a b", "a </s> b"])
    assert ids[0].tolist() == [0, 1, 0, 1, 0, 1]  # neither cut nor padded nor marked
    assert 3 not in ids[1]  # the mark's name in a text is text
    assert tokenizer.decode([0, 3, 1]) == "a b"


def test_the_mark_is_found_or_named(tmp_path):
    path = write_word_tokenizer(tmp_path / "t.json", specials=["<stop>", "<eos>"])
    assert load_tokenizer_file(path, None).end_of_document == 4
    assert load_tokenizer_file(path, "<stop>").end_of_document == 3
    assert load_tokenizer_file(path, None).fingerprint != load_tokenizer_file(path, "<stop>").fingerprint
    with pytest.raises(UsageError, match=r"data\.end_of_document \('<end>'\): .*t\.json'\) is not in its vocabulary"):
        load_tokenizer_file(path, "<end>")
    bare = write_word_tokenizer(tmp_path / "bare.json", specials=[])
    with pytest.raises(UsageError, match=r"data\.end_of_document \(None\): .*bare\.json'\) has none of <\|endoft"):
        load_tokenizer_file(bare, None)


def test_ids_with_gaps_are_all_below_the_vocabulary_size(tmp_path):
    path = tmp_path / "t.json"
    Tokenizer(models.WordLevel({"[UNK]": 0, "a": 5, "</s>": 70_000}, unk_token="[UNK]")).save(str(path))
    tokenizer = load_tokenizer_file(path, None)
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (70_001, 70_000)
    assert tokenizer.encode_batch(["a"])[0].dtype == np.uint32


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{}", "not a file of the tokenizers library"),
        (b"\xff\xfe", "not a file of"),
        (None, "cannot be read: No such"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content, reason):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"data\.tokenizer \('{path}'\): {reason}"):
        load_tokenizer_file(path, None)


def test_ids_take_two_bytes_as_long_as_they_fit():
    assert (token_dtype(65536), token_dtype(65537)) == (np.dtype(np.uint16), np.dtype(np.uint32))


def test_a_text_with_an_unknown_part_is_refused(tmp_path):
    """Where a token stands for what is unknown, where a word without a token is an error, and where it vanishes."""
    known = {"a": 0, "b": 1, "</s>": 2}
    words = {
        "unk": models.WordLevel(known | {"[UNK]": 3}, unk_token="[UNK]"),
        "none": models.WordLevel(known, unk_token="[UNK]"),
        "unigram": models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("</s>", -1.0), (" ", -2.0)], unk_id=0),
        "bpe": models.BPE(known | {"c": 3}, []),
    }
    for name, model in words.items():
        inner = Tokenizer(model)
        if name in ("unk", "none"):
            inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.save(str(tmp_path / f"{name}.json"))
        tokenizer = load_tokenizer_file(tmp_path / f"{name}.json", None)
        text = "a b" if name != "bpe" else "ab"
        assert tokenizer.encode_known(text) == tokenizer.encode_batch([text])[0].tolist()
        with pytest.raises(ValueError, match=r"no token for 'zz?'|cannot be encoded"):
            tokenizer.encode_known("zz")
    tokenizer = load_tokenizer_file(tmp_path / "unk.json", None)
    with pytest.raises(ValueError, match=r"no token for 'zz' \(character 2\)"):
        tokenizer.encode_known("a zz b")


def test_half_a_surrogate_pair_is_refused(tmp_path):
    tokenizer = load_tokenizer_file(write_word_tokenizer(tmp_path / "t.json", specials=["</s>"]), None)
    for each in (tokenizer, ByteTokenizer()):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            each.encode_known("a \udc80")
    assert ByteTokenizer().encode_known("é") == [0xC3, 0xA9]
