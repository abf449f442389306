"""`python -m tests.vectors` on vectors of other programs, and on files made here: what passes, fails, is damaged."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.config.model import ModelConfig
from moe_train.model.build import mixer_of
from moe_train.model.parameters import materialize
from tests.model.mixers import slow
from tests.vectors.__main__ import main

DATA = Path(__file__).parent / "data"  # of independent fp64 programs, one or two short vectors of each kind


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A file of one vector of Infini-attention, from the slow loop."""
    section = {"segment_length": 3, "memory": "delta"}
    model = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "moe_every": 0, "init_std": 0.5}
    kind, spec = mixer_of(ModelConfig.model_validate(model | {"mixer": "infini", "infini": section}), 0, 0.5)
    with torch.device("meta"):
        mixer = kind.build(spec)
    materialize(mixer, seed=3, dtype=torch.float64, device=torch.device("cpu"))
    x = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short = {"query.weight": "q", "key.weight": "k", "value.weight": "v", "output.weight": "o", "beta": "beta"}
    vector = {
        "heads": 2,
        "kv_heads": 1,
        "segment": 3,
        "delta": True,
        "documents": None,
        "x": x.tolist(),
        "parameters": {short[name]: parameter.tolist() for name, parameter in mixer.named_parameters()},
        "y": slow.infini(mixer, x).tolist(),
    }
    return {"layer": "infini", "dtype": "float64", "vectors": [vector]}


def run(folder: Path, content: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], str]:
    path = folder / "infini.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    code = main([str(path), "--json"])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_what_agrees_passes(content, tmp_path, capsys):
    code, lines, _ = run(tmp_path, content, capsys)
    found = json.loads(lines[-1])
    assert code == 0 and found["passed"] and found["bound"] == 1e-10 and found["skipped"] == []
    assert [(each["file"], each["index"], each["quantity"]) for each in found["results"]] == [
        ("infini.json", 0, "y (whole)"),
        ("infini.json", 0, "y (parts)"),
    ]
    assert all(0 <= each["difference"] < 1e-12 and each["passed"] for each in found["results"])
    assert lines[0].startswith("infini.json 0 y (whole) ") and lines[0].endswith(" ok")


@pytest.mark.parametrize("change", [1e-9, float("nan")])
def test_what_differs_fails(content, tmp_path, capsys, change):
    changed = copy.deepcopy(content)
    changed["vectors"][0]["y"][-1][0] += change
    code, lines, _ = run(tmp_path, changed, capsys)
    assert code == 1 and not json.loads(lines[-1])["passed"]
    assert all(line.endswith(" FAIL") for line in lines[:-1])


def without(content: dict[str, Any], *names: str) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    inner = changed["vectors"][0]
    for name in names[:-1]:
        inner = inner[name]
    del inner[names[-1]]
    return changed


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: json.dumps(content)[:-9], "cannot be read"),
        (lambda content: content | {"vectors": []}, "no vectors"),
        (lambda content: without(content, "y"), "vector 0"),
        (lambda content: without(content, "parameters", "beta"), "beta"),
        (lambda content: without(content, "x", 0), "shape"),
        (lambda content: [], "not a mapping"),
        (lambda content: content | {"layer": "unheard"}, "no vector"),
    ],
)
def test_what_is_damaged_or_empty_is_code_2(content, tmp_path, capsys, damage, words):
    code, _, error = run(tmp_path, damage(content), capsys)
    assert code == 2 and words in error


def test_other_kinds_are_skipped_and_files_of_a_folder_are_found(content, tmp_path, capsys):
    (tmp_path / "unheard.json").write_text(json.dumps({"method": "unheard", "vectors": [{}]}))
    (tmp_path / "infini.json").write_text(json.dumps(content))
    assert main([str(tmp_path), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["skipped"] == ["unheard.json"]
    assert main([str(tmp_path / "nowhere")]) == 2


@pytest.fixture
def rates() -> dict[str, Any]:
    """A file of speculative decoding: p and q of two tokens, worked out by hand."""
    vector = {"vocab": 2, "options": {"top_k": 2}, "p": [0.75, 0.25], "q": [0.5, 0.5]}
    return {
        "method": "speculative",
        "vectors": [vector | {"acceptance": 0.75, "residual": [1.0, 0.0]}],
        "p": [0.75, 0.25],
        "q": [0.5, 0.5],
        "alpha": 0.75,
        "expected_tokens": {"1": 1.75, "2": 2.3125},
    }


def test_speculative_decoding(rates, tmp_path, capsys):
    code, lines, _ = run(tmp_path, rates, capsys)
    named = {(each["index"], each["quantity"]) for each in json.loads(lines[-1])["results"]}
    assert code == 0 and named == {
        *((0, name) for name in ("acceptance", "residual", "p", "q", "first token")),
        *((1, name) for name in ("alpha", "expected_tokens 1", "expected_tokens 2")),
    }
    rates["expected_tokens"]["2"] += 1e-9
    assert run(tmp_path, rates, capsys)[0] == 1
    rates["expected_tokens"]["2"] -= 1e-9
    rates["vectors"][0]["residual"] = [1.0 - 1e-9, 1e-9]
    assert run(tmp_path, rates, capsys)[0] == 1
    del rates["alpha"]
    assert run(tmp_path, rates, capsys)[0] == 2


def test_vectors_of_other_programs(capsys):
    """Every kind, and all that is compared of it."""
    assert main([str(DATA), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    quantities = {}
    for each in told["results"]:
        quantities.setdefault(each["file"], set()).add(each["quantity"])
    ways = ("whole", "parts")
    gradients = {f"grad_{name}" for name in ("k", "v", "decay", "first")}
    exchanges = [way + again for way in ("all_gather", "ring") for again in ("", ", recomputed")]
    results = {f"{name} ({way})" for name in ("out", "lse", "dq", "dk", "dv") for way in exchanges}
    mixes = {f"{name} ({way})" for name in ("time_mix", "channel_mix") for way in ways}
    assert told["skipped"] == [] and quantities == {
        "infini.json": {f"y ({way})" for way in ways},
        "phd_mask.json": {
            *("visible", "y", "logits_last_copy (whole)", "logits_last_copy (parts)"),
            *("prefill_positions", "last logits of the prefill", "one_fewer_changes_the_logits"),
        },
        "ring.json": {"zigzag", "work"} | results,
        "rwkv4.json": mixes | gradients | {"wkv", "state_a", "state_b"},
        "rwkv7.json": mixes | {"v_first_out", "state"},
        "speculative.json": {
            *("acceptance", "residual", "p", "q", "first token", "alpha"),
            *(f"expected_tokens {number}" for number in read_numbers("speculative.json")),
        },
        "ttt.json": {f"{name} ({way})" for name in ("y", "y_base_lr_0") for way in ways},
    }
    # The bound of the command is for files of any origin; these are closer.
    assert max(each["difference"] for each in told["results"]) < 1e-12


def read_numbers(name: str) -> list[str]:
    return list(json.loads((DATA / name).read_text())["expected_tokens"])


@pytest.fixture
def shared_row() -> dict[str, Any]:
    """A file of one row that two ranks share, with two documents and a window, from a mask of the whole row."""
    random = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(heads, 8, 4, dtype=torch.float64, generator=random) for heads in (2, 1, 1, 2))
    documents, places = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), torch.arange(8)
    distance = places[:, None] - places
    visible = (distance >= 0) & (distance < 3) & (documents[:, None] == documents)
    own = [tensor.requires_grad_() for tensor in (q, k, v)]
    scores = (q @ k.mT / 2).masked_fill(~visible, -torch.inf)
    out = scores.softmax(-1) @ v
    gradients = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, own, grad), strict=True))
    tensors = {"q": q, "k": k, "v": v, "grad": grad, "out": out, "lse": scores.logsumexp(-1)} | gradients
    vector = {name: tensor.tolist() for name, tensor in tensors.items()}
    layout = {"ranks": 2, "window": 3, "zigzag": [[0, 1, 6, 7], [2, 3, 4, 5]], "work": [18, 18]}
    return {"method": "ring", "vectors": [vector | layout | {"documents": documents.tolist()}]}


def test_a_row_that_ranks_share(shared_row, tmp_path, capsys):
    code, lines, _ = run(tmp_path, shared_row, capsys)
    found = json.loads(lines[-1])
    assert code == 0 and len(found["results"]) == 2 + 5 * 4
    assert all(each["difference"] < 1e-12 for each in found["results"])
    shared_row["vectors"][0]["dk"][0][3][0] += 1e-9
    code, lines, _ = run(tmp_path, shared_row, capsys)
    assert code == 1 and sum(line.endswith(" FAIL") for line in lines) == 4
    shared_row["vectors"][0]["ranks"] = 99
    code, _, error = run(tmp_path, shared_row, capsys)
    assert code == 2 and "ranks (99)" in error
