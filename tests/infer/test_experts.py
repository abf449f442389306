"""What experts work on: typical tokens against a count by hand, kinds of tokens, and the command on a real run."""

import json
import math
from pathlib import Path

import pytest
import torch

from moe_train.cli.main import main
from moe_train.infer.experts import KINDS, kind_of, log_odds
from tests.train.runs import SMALL, train_forked


def test_log_odds_follow_their_definition() -> None:
    joint = [[30, 2, 1], [5, 40, 7], [1, 1, 1], [9, 9, 9]]
    found = log_odds(torch.tensor(joint))
    of_class, total = [sum(row) for row in joint], sum(map(sum, joint))
    prior = [0.01 * count + 1e-6 for count in of_class]
    for c, row in enumerate(joint):
        for e, y in enumerate(row):
            n, a, a0 = sum(other[e] for other in joint), prior[c], sum(prior)
            rest, n_rest = of_class[c] - y, total - n
            own, others = (y + a) / (n + a0 - y - a), (rest + a) / (n_rest + a0 - rest - a)
            z = (math.log(own) - math.log(others)) / math.sqrt(1 / (y + a) + 1 / (rest + a))
            assert found[c, e].item() == pytest.approx(z, rel=1e-9)
    assert found[0].argmax() == 0 and found[1].argmax() == 1


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n    ", "newline"),
        ("  ", "space"),
        (" self", "word"),
        ("_name", "word"),
        ("Error", "Capitalised"),
        ("NONE", "UPPER"),
        (" 12", "number"),
        (" ==", "punctuation"),
        ("\ufffd", "punctuation"),
        ("\x00", "other"),
    ],
)
def test_kinds_of_tokens(text: str, kind: str) -> None:
    assert kind_of(text) == kind and kind in KINDS


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    options = (*SMALL, "--train.steps=30", "--optim.learning_rate=1e-2", "--train.sample_tokens=0")
    options += ("--optim.router_lr_factor=1", "--model.moe.importance_cv2_coef=0.01", "--model.moe.load_cv2_coef=0.01")
    result = train_forked(1, *options, "--data.tokenizer=bytes", f"--train.run_dir={folder}")
    assert result.returncode == 0, result
    return folder


def test_the_command_names_tokens_and_one_object_has_all(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["experts", str(run_dir), "--max-sequences", "40"]) == 0
    text = capsys.readouterr().out
    assert "Layer 01: a token's id explains" in text and "share" in text
    picture = run_dir / "experts.png"
    options = ["--max-sequences", "40", "--tokens", "3", "--picture", str(picture), "--json"]
    assert main(["experts", str(run_dir), *options]) == 0
    (layer,) = json.loads(capsys.readouterr().out.splitlines()[-1])["layers"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert layer["layer"] == 1 and 0 < layer["information"] <= 1 and len(layer["experts"]) == 4
    assert sum(expert["share"] for expert in layer["experts"]) == pytest.approx(4.0)
    for expert in layer["experts"]:
        assert len(expert["tokens"]) <= 3 and expert["kinds"].keys() == set(KINDS)
        assert all(token["count"] >= 8 and token["lift"] > 1 and token["z"] > 0 for token in expert["tokens"])
    assert any(expert["tokens"] for expert in layer["experts"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["RUN", "--layer", "0"], ["--layer (0)", "1"]),
        (["RUN", "--tokens", "0"], ["--tokens (0)"]),
        (["RUN", "--picture", "/nowhere/x.png"], ["--picture", "/nowhere"]),
        (["/nowhere"], ["/nowhere"]),
    ],
)
def test_wrong_input_is_named(
    run_dir: Path, options: list[str], words: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["experts", *(str(run_dir) if word == "RUN" else word for word in options)]) == 2
    errors = capsys.readouterr().err
    assert all(word in errors for word in words) and errors.count("\n") == 1, errors
