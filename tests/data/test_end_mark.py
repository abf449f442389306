"""The end mark is never the encoding of text: every kind of tokenizer, documents and prompts."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_train.config.errors import UsageError
from moe_train.data import prepare_data
from moe_train.data.tokenizers import load_tokenizer_file
from tests.data.tokenizer_kinds import KINDS, MARK, MERGES_TO_THE_MARK, TEXT, byte_bpe, unigram, words

SPELLED = [TEXT, MARK, f"{MARK}{MARK}", f"x{MARK}s y", f" {MARK} ", f"{MARK}\n", "END", "the </S> tag", "a </s b> s>"]


def loaded(folder, inner, mark=None):
    inner.save(str(folder / "t.json"))
    return load_tokenizer_file(folder / "t.json", mark)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    return {name: (make(), loaded(tmp_path_factory.mktemp("kind"), make(), MARK)) for name, make in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_the_mark_and_all_else_stays(every_kind, kind):
    raw, tokenizer = every_kind[kind]
    mark = raw.token_to_id(MARK)
    assert tokenizer.end_of_document == mark
    for ids in tokenizer.encode_batch(SPELLED):
        assert mark not in ids
    # A text without the mark's name is encoded as the library does by itself; every other token keeps its id.
    plain = ["a page about markup", "closes and ends", "the tag"]
    expected = [raw.encode(text, add_special_tokens=False).ids for text in plain]
    assert [ids.tolist() for ids in tokenizer.encode_batch(plain)] == expected
    before, after = raw.get_vocab(), tokenizer.inner.get_vocab()
    assert {name: i for name, i in before.items() if i != mark} == {n: i for n, i in after.items() if i != mark}
    assert tokenizer.vocab_size == max(before.values()) + 1


def test_the_kinds_are_those_in_which_the_library_finds_the_mark(every_kind):
    """The test above could not fail otherwise."""
    found = {
        name
        for name, (raw, _) in every_kind.items()
        if any(raw.token_to_id(MARK) in raw.encode(t).ids for t in SPELLED)
    }
    assert found == set(KINDS) - {"bpe, vocabulary"}  # no merge leads there


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from([MARK, "<", "/", "s", ">", "</", "s>", " ", "\n", "a", "END", "é", "\0"]), max_size=12
    )
)
@example(parts=[MARK, MARK])
def test_no_text_of_its_parts_becomes_the_mark(every_kind, parts):
    text = "".join(parts)
    for raw, tokenizer in every_kind.values():
        (ids,) = tokenizer.encode_batch([text])
        assert raw.token_to_id(MARK) not in ids


@pytest.mark.parametrize(
    "kind", ["unigram, special", "bpe, added", "bpe, special", "bpe, whole words first", "bpe, merges"]
)
def test_text_with_the_marks_name_comes_back_and_can_be_a_prompt(every_kind, kind):
    _, tokenizer = every_kind[kind]
    assert tokenizer.recover_batch(tokenizer.encode_batch([TEXT])) == [TEXT]
    ids = tokenizer.encode_known(TEXT)
    assert ids == tokenizer.encode_batch([TEXT])[0].tolist() and tokenizer.end_of_document not in ids


def test_a_prompt_that_needs_the_mark_is_refused(every_kind):
    _, tokenizer = every_kind["words"]
    with pytest.raises(ValueError, match=r"no token for '</s>' \(character 4\)"):
        tokenizer.encode_known("the </s>")


# Where nothing else can stand for a part of the text: name of the mark, tokenizer, text.
REFUSED = {
    "a line end is the mark": ("Ċ", byte_bpe, "two\nlines"),
    "unknown pieces are the mark": ("<unk>", unigram, "the ß"),
    "unknown pieces are </s>": (MARK, lambda: unigram(unknown=MARK), "the ß"),
    "unknown words are the mark": ("[UNK]", words, "the ß"),
    "unknown parts of words are the mark": ("[UNK]", lambda: words("WordPiece"), "the ß"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_document_that_needs_the_mark_is_named(tmp_path, write_files, make_config, case):
    mark, make, text = REFUSED[case]
    tokenizer = loaded(tmp_path, make(), mark)
    assert tokenizer.end_of_document not in tokenizer.encode_batch(["the tag"])[0]
    with pytest.raises(ValueError, match=r"cannot be encoded|is encoded to|no token for 'ß'"):
        tokenizer.encode_known(text)
    folder = write_files({"good.txt": "the tag closes", "odd.txt": text, "other.txt": "the tag"})
    config = make_config(source="text", paths=[str(folder)], tokenizer=str(tmp_path / "t.json"), end_of_document=mark)
    with pytest.raises(UsageError) as raised:
        prepare_data(config, sequence_length=2, seed=0, min_sequences=1)
    message = str(raised.value)
    assert "odd.txt" in message and str(folder) in message
    assert repr(mark) in message or mark in message
    assert "good.txt" not in message and "\n" not in message


@pytest.mark.parametrize("model", ["WordLevel", "WordPiece"])
def test_an_end_mark_that_is_also_the_unknown_token_is_said(tmp_path, model):
    tokenizer = loaded(tmp_path, words(model, unknown=MARK))
    reason = r"the unknown token '</s>' is also the end mark: name another data\.end_of_document"
    for encode in (tokenizer.encode_known, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(ValueError, match=reason):
            encode("the ß")
    other = loaded(tmp_path, words(model, unknown=MARK), "<eos>")
    assert other.encode_batch(["the ß"])[0].tolist()[-1] == words(model).token_to_id(MARK)


def test_a_single_character_that_was_added_is_text_too(tmp_path):
    inner = byte_bpe()
    inner.add_tokens(["\u20ac"])
    tokenizer = loaded(tmp_path, inner, "\u20ac")
    assert inner.encode("see \u20ac 2").ids.count(tokenizer.end_of_document) == 1
    ids = tokenizer.encode_batch(["see \u20ac 2"])
    assert tokenizer.end_of_document not in ids[0] and tokenizer.recover_batch(ids) == ["see \u20ac 2"]


def test_merges_that_go_past_the_mark_are_left_out_and_others_keep_their_order(tmp_path):
    raw, tokenizer = byte_bpe(merges=MERGES_TO_THE_MARK), loaded(tmp_path, byte_bpe(merges=MERGES_TO_THE_MARK))
    assert raw.encode("</s>s").tokens == ["</s>s"] and raw.encode("page").tokens == ["p", "ag", "e"]
    names = [tokenizer.inner.id_to_token(int(i)) for i in tokenizer.encode_batch(["</s>s page"])[0]]
    assert names == ["</", "s>", "s", "Ġ", "p", "ag", "e"]


def test_old_files_write_merges_with_a_blank(tmp_path):
    inner = byte_bpe(merges=MERGES_TO_THE_MARK)
    text = inner.to_str()
    for left, right in MERGES_TO_THE_MARK:
        text = text.replace(f'["{left}","{right}"]', f'"{left} {right}"')
    assert text != inner.to_str()
    (tmp_path / "t.json").write_text(text)
    ids = load_tokenizer_file(tmp_path / "t.json", None).encode_batch([TEXT])[0]
    assert inner.token_to_id(MARK) not in ids


def test_two_tokens_with_the_marks_id_are_refused(tmp_path):
    contents = json.loads(words().to_str())
    contents["model"]["vocab"]["closes"] = contents["model"]["vocab"][MARK]
    (tmp_path / "t.json").write_text(json.dumps(contents))
    with pytest.raises(UsageError, match=r"t\.json'\): tokens '</s>' and 'closes' both have id 1: the end mark needs"):
        load_tokenizer_file(tmp_path / "t.json", None)
