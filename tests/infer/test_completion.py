"""The text of a continuation as its tokens come."""

import pytest

from moe_train.data import ByteTokenizer
from moe_train.infer.completion import CompletionBuilder

BYTES = ByteTokenizer()


def pieces(text, *, stop=(), prompt="so: ", tokens=None, end_token=None):
    """What each token shows, the rest, and the completion."""
    builder = CompletionBuilder(BYTES, list(prompt.encode()), stop, end_token)
    shown = [builder.push(token) for token in (list(text.encode()) if tokens is None else tokens)]
    return shown, builder.finish(), builder.completion()


def test_plain_text_comes_at_once():
    shown, rest, completion = pieces("abc")
    assert (shown, rest) == (["a", "b", "c"], "")
    assert completion.text == "abc" and completion.finish_reason == "length"
    assert completion.prompt_tokens == 4 and completion.tokens == tuple(b"abc")


def test_half_a_character_waits():
    shown, rest, completion = pieces("é€x")
    assert shown == ["", "é", "", "", "€", "x"] and rest == ""
    assert completion.text == "é€x"
    shown, rest, _ = pieces("", tokens=[*b"a", 0xE2, 0x82])
    assert shown == ["a", "", ""] and rest == "\ufffd"  # broken at the end: shown as such


def test_a_prompt_that_ends_inside_a_character():
    builder = CompletionBuilder(BYTES, [0xE2, 0x82])
    assert "".join([builder.push(0xAC), builder.push(0x61), builder.finish()]) == "\ufffda"  # its rest is no character
    assert builder.completion().text == "\ufffda"


def test_a_long_text_is_not_decoded_again_and_again():
    class Counting:
        decoded = 0

        def decode(self, ids):
            Counting.decoded += len(ids)
            return BYTES.decode(ids)

    text = "añ€ " * 500
    builder = CompletionBuilder(Counting(), list(b"so: "), ["€ x"])
    shown = [builder.push(token) for token in text.encode()]
    assert "".join(shown) + builder.finish() == text == builder.completion().text
    assert Counting.decoded < 60 * len(text.encode())


@pytest.mark.parametrize("stop", [["END"], ["xyz", "END"], ["END", "ENDING"], ["ND", "END"]], ids=str)
def test_stop_string_is_cut_off_and_never_shown(stop):
    shown, rest, completion = pieces("a EN ENDING", stop=stop)
    assert completion.finish_reason == "stop"
    expected = "a EN " + ("E" if "ND" in stop and "END" not in stop else "")
    assert completion.text == expected == "".join(shown) + rest
    assert len(completion.tokens) < len("a EN ENDING")


def test_what_may_become_a_stop_string_waits():
    shown, rest, completion = pieces("aabx", stop=["ab!"])
    assert shown == ["", "a", "", "abx"] and rest == ""
    assert completion.finish_reason == "length"
    shown, rest, _ = pieces("xab", stop=["ab!"])
    assert "".join(shown) == "x" and rest == "ab"


def test_end_token():
    shown, rest, completion = pieces("", tokens=[97, 256, 98], end_token=256)
    assert (shown, rest) == (["a", "", ""], "")
    assert completion.text == "a" and completion.tokens == (97, 256) and completion.finish_reason == "end"
    _, _, completion = pieces("", tokens=[97, 256, 98])
    assert completion.text == "ab" and completion.finish_reason == "length"
