"""Damaged tokenizer files: one message that names the file, whatever is wrong, and never another exception."""

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moe_train.config.errors import UsageError
from moe_train.data import prepare_data
from moe_train.data.tokenizer_file import library_errors
from moe_train.data.tokenizers import load_tokenizer_file
from tests.data.tokenizer_kinds import KINDS, MARK

FILES = {
    name: json.loads(KINDS[name]().to_str()) for name in ("unigram, special", "bpe, merges", "words", "bpe, added")
}
ODD = [None, True, -1, 0, 1, 2**31, 2**32 - 1, 2**63, 1e308, "", MARK, "x" * 50, "(", [], {}, [["a", 1]], {"type": "x"}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of a value's parts, without those deep inside a vocabulary, of which there are hundreds."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in list(inside)[:12] for place in places(part, (*path, key)))]


def damaged(contents: Any, changes: list[tuple[int, Any, bool]]) -> Any:
    """A copy with some parts replaced or removed."""
    contents = copy.deepcopy(contents)
    for number, odd, is_removed in changes:
        paths = [path for path in places(contents) if path]
        if not paths:
            break
        *way, last = paths[number % len(paths)]
        holder = contents
        for key in way:
            holder = holder[key]
        if is_removed:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(odd)
    return contents


def use(path, write_files, make_config):
    """Load the file and tokenize with it, as training does. Returns the message of a refusal."""
    folder = write_files({"a.txt": "a page </s>\nabout ß", "b.txt": "the tag closes"})
    config = make_config(source="text", paths=[str(folder)], tokenizer=str(path), validation_fraction=0.5)
    try:
        data = prepare_data(config, sequence_length=1, seed=0, min_sequences=1)
    except UsageError as error:
        return str(error)
    assert data.tokenizer.vocab_size > data.tokenizer.end_of_document >= 0
    assert all(entry.tokens.max() < data.tokenizer.vocab_size for entry in data.train.entries)
    return None


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    name=st.sampled_from(list(FILES)),
    changes=st.lists(st.tuples(st.integers(0, 200), st.sampled_from(ODD), st.booleans()), min_size=1, max_size=3),
)
@example(name="words", changes=[(0, {}, True)])
def test_a_file_with_damaged_parts_is_used_or_refused(tmp_path, name, changes):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(damaged(FILES[name], changes)))
    try:
        tokenizer = load_tokenizer_file(path, None)
    except UsageError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    for text in ("a page </s> about", "ß", ""):
        try:
            (ids,) = tokenizer.encode_batch([text])
            tokenizer.recover_batch([ids])
        except ValueError as error:
            assert "cannot be" in str(error) or "is encoded to" in str(error)
        else:
            assert tokenizer.end_of_document not in ids and all(ids < tokenizer.vocab_size)
        try:
            assert tokenizer.end_of_document not in tokenizer.encode_known(text)
        except ValueError as error:
            assert str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(FILES)), data=st.data())
def test_a_file_that_is_cut_or_has_odd_bytes_is_refused(tmp_path, name, data):
    whole = json.dumps(FILES[name]).encode()
    place = data.draw(st.integers(0, len(whole) - 2))
    content = whole[:place] + data.draw(st.sampled_from([b"", b"\xff" + whole[place:], b"\0" + whole[place:]]))
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"t\.json'\): not a file of the tokenizers library: "):
        load_tokenizer_file(tmp_path / "t.json", None)


def changed(name, **changes):
    """Contents of a file with parts of its model changed."""
    contents = copy.deepcopy(FILES[name])
    contents["model"] |= changes
    return contents


VOCABULARY = FILES["words"]["model"]["vocab"]
BROKEN = {
    "a list": ([], "not a file of the tokenizers library"),
    "deep": ("[" * 100_000, "not a file of the tokenizers library"),
    "no model": ({**FILES["words"], "model": None}, "not a file of the tokenizers library"),
    "an empty vocabulary": (changed("words", vocab={}), "has none of <|endoftext|>"),
    "no end mark": (changed("words", vocab={"[UNK]": 0, "a": 1}), "has none of <|endoftext|>"),
    "a negative id": (changed("words", vocab={**VOCABULARY, "a": -1}), "not a file of the tokenizers library"),
    "a huge id": (changed("words", vocab={**VOCABULARY, "far": 2**32 - 1}), "token 'far' has id 4294967295, beyond"),
    "a huge end mark": (changed("words", vocab={**VOCABULARY, MARK: 2**24}), "token '</s>' has id 16777216, beyond"),
    "an id twice": (changed("words", vocab={**VOCABULARY, "a": VOCABULARY[MARK]}), "'</s>' and 'a' both have id"),
    "merges to no token": (changed("bpe, merges", merges=[["s", "<first of all>"]]), "has no token 's<first of all>'"),
    "merges of unknown parts": (changed("bpe, merges", merges=[["no", "way"]]), "not a file of the tokenizers library"),
    "a prefix that merges lack": (
        changed("bpe, merges", continuing_subword_prefix="####"),
        "does not begin with '####'",
    ),
    "an unknown id too large": (changed("unigram, special", unk_id=10**6), "not a file of the tokenizers library"),
    "no word for the unknown": (changed("words", unk_token="[NONE]"), "a.txt': cannot be encoded: WordLevel error"),
    "no piece for the unknown": (changed("unigram, special", unk_id=None), "a.txt': cannot be encoded: Encountered an"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said(tmp_path, write_files, make_config, case):
    contents, words = BROKEN[case]
    path = tmp_path / "t.json"
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    message = use(path, write_files, make_config)
    assert message is not None and words in message and "\n" not in message
    assert str(path) in message or "a.txt" in message


def test_a_file_that_will_do_is_used(tmp_path, write_files, make_config):
    (tmp_path / "t.json").write_text(json.dumps(FILES["words"]))
    assert use(tmp_path / "t.json", write_files, make_config) is None


def test_panics_are_errors_and_an_interrupt_is_not():
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ValueError, match=r"it failed: out of range"), library_errors("it failed"):
        raise panic("out of range")
    with pytest.raises(KeyboardInterrupt), library_errors("it failed"):
        raise KeyboardInterrupt
