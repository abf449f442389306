"""What benchmarks tell: the machine, tables, claims and files."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.runner import results
from benchmarks.runner.results import claim_lines, describe_machine, machine_words, markdown_table, print_json

CPUINFO = """processor	: 0
model name	: Some CPU @ 2.00GHz
flags		: fpu avx512_bf16 amx_bf16 amx_tile
"""


@dataclass(frozen=True)
class Row:
    name: str
    by_length: dict[int, float]


def test_machine_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(results, "_CPUINFO", tmp_path / "cpuinfo")
    machine = describe_machine("no-such-package", threads=1)
    assert machine["cpu"] == "Some CPU @ 2.00GHz" and machine["bf16"] == ["AVX-512", "AMX"]
    words = machine_words(machine | {"cores": 2, "torch": "2.13"})
    cores = "2 cores of Some CPU @ 2.00GHz with bf16 by AVX-512 and AMX"
    assert words == f"{cores}, 1 thread, torch 2.13, no-such-package not installed"


def test_machine_without_bf16_and_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_CPUINFO", tmp_path / "nowhere")
    machine = describe_machine(gpu="Some GPU")
    assert machine["cpu"] and machine["bf16"] == []
    assert machine_words(machine | {"cores": 1}).startswith(f"Some GPU, 1 core of {machine['cpu']} without bf16 ")


def test_table_and_claims() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]
    claims = [{"claim": "One.", "holds": True}, {"claim": "Two.", "holds": False}]
    assert claim_lines(claims) == ["- holds: One.", "- DOES NOT HOLD: Two."]


def test_files_are_written_and_the_page_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write_results(tmp_path, "name", "a page\n", b"a picture")
    assert {path.name for path in tmp_path.iterdir()} == {"name.md", "name.png"}
    assert (tmp_path / "name.md").read_text() == "a page\n" and (tmp_path / "name.png").read_bytes() == b"a picture"
    assert capsys.readouterr().out == "a page\n\n"


def test_json_is_one_line_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(argparse.Namespace(json=False), {"rows": []})
    assert capsys.readouterr().out == ""
    print_json(argparse.Namespace(json=True), {"rows": [Row("a", {64: 1.5})]})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and json.loads(printed) == {"rows": [{"name": "a", "by_length": {"64": 1.5}}]}
