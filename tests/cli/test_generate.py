"""`moe-train generate`: what it prints, where prompts come from, the same text in every layout, what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.cli.conftest import check_refused, last_object
from tests.train.runs import CPU, ROOT, run_forked

FOX = "--prompt=The quick brown"


def test_json(generate, trained_run):
    found = last_object(generate(FOX, "--max-new-tokens=6", "--greedy", "--json"))
    (completion,) = found["completions"]
    assert found["text"] == completion["text"] and found["text"]
    assert completion["prompt"] == "The quick brown"
    assert completion["new_tokens"] == 6 and completion["finish_reason"] == "length"
    assert found["max_length"] == completion["prompt_tokens"] + 6
    # 2 B S M G d of fp32: one owner layer with one head of 16.
    assert found["kv_cache_bytes"] == 2 * 1 * found["max_length"] * 1 * 1 * 16 * 4
    assert found["prefill_tokens_per_second"] > 0 and found["decode_tokens_per_second"] > 0
    assert found["checkpoint"] == str(trained_run / "checkpoints" / "step_00000004") and found["step"] == 4


def test_text_streams_behind_its_prompt(generate):
    found = last_object(generate(FOX, "--max-new-tokens=6", "--seed=3", "--json"))
    result = generate(FOX, "--max-new-tokens=6", "--seed=3")
    assert result.stdout == f"The quick brown{found['text']}\n"
    assert "prefill" in result.stderr and "KV cache" in result.stderr


def test_same_text_alone_in_a_batch_on_two_ranks_and_in_chunks(generate):
    prompts = ["The quick", "0123", "The quick brown fox jumps over"]
    options = ("--max-new-tokens=5", "--temperature=0.9", "--json")
    given = [f"--prompt={prompt}" for prompt in prompts]
    texts = [each["text"] for each in last_object(generate(*given, *options))["completions"]]
    assert len(set(texts)) == 3
    assert last_object(generate(given[0], *options))["text"] == texts[0]
    layouts = [
        {"ranks": 2, "more": ()},  # experts on two ranks; three prompts, so that one rank has a filler
        {"ranks": 2, "more": ("--expert-parallel-size=1",)},
        {"ranks": 1, "more": ("--prefill-chunk=2",)},
    ]
    for layout in layouts:
        found = last_object(generate(*given, *options, *layout["more"], ranks=layout["ranks"]))
        assert [each["text"] for each in found["completions"]] == texts, layout


def test_prompts_from_files_and_standard_input(generate, trained_run, tmp_path):
    options = ("--max-new-tokens=4", "--greedy", "--json")
    expected = last_object(generate(FOX, *options))
    (tmp_path / "prompt.txt").write_text("The quick brown")
    assert last_object(generate(f"--prompt-file={tmp_path / 'prompt.txt'}", *options))["text"] == expected["text"]
    (tmp_path / "many.jsonl").write_text('{"prompt": "0123"}\n\n{"prompt": "The quick brown", "id": 1}\n')
    found = last_object(generate(f"--prompt-file={tmp_path / 'many.jsonl'}", *options))
    assert [each["prompt"] for each in found["completions"]] == ["0123", "The quick brown"]
    assert found["completions"][1]["text"] == expected["text"]
    command = [sys.executable, "-m", "moe_train", "generate", f"--run={trained_run}", *options]
    environment = os.environ | CPU
    piped = subprocess.run(
        command, input="The quick brown", capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60
    )
    assert json.loads(piped.stdout.splitlines()[-1])["text"] == expected["text"], piped
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    check_refused(generate(f"--prompt-file={tmp_path / 'bad.jsonl'}"), "bad.jsonl", "line 1")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    check_refused(generate(f"--prompt-file={tmp_path / 'latin.txt'}"), "latin.txt", "UTF-8")
    check_refused(generate("--prompt-file=/nowhere.txt"), "/nowhere.txt")


def test_lines_of_jsonl_end_at_line_ends_only(generate, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c\u0085"}\n', encoding="utf-8")
    found = last_object(generate(f"--prompt-file={tmp_path / 'p.jsonl'}", "--max-new-tokens=2", "--json"))
    assert [each["prompt"] for each in found["completions"]] == ["a\u2028b", "c\u0085"]


def test_cache_bytes_are_those_of_the_prompts_on_any_ranks(generate):
    prompts = ("--prompt=a", "--prompt=b", "--prompt=c")
    alone, shared = (last_object(generate(*prompts, "--max-new-tokens=4", "--json", ranks=ranks)) for ranks in (1, 2))
    assert alone["kv_cache_bytes"] == shared["kv_cache_bytes"] == 2 * 3 * alone["max_length"] * 16 * 4


def test_a_closed_output_ends_it_without_a_traceback(trained_run):
    command = f"{sys.executable} -m moe_train generate --run {trained_run} --prompt a --max-new-tokens 20 | true"
    script = ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"]
    result = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=os.environ | CPU, timeout=60)
    assert "Traceback" not in result.stderr and result.stdout.split()[-1] in ("0", "141"), result


def test_stop_string(generate):
    whole = last_object(generate(FOX, "--max-new-tokens=12", "--greedy", "--json"))["text"]
    stop = whole[4:6]
    found = last_object(generate(FOX, "--max-new-tokens=12", "--greedy", f"--stop={stop}", "--json"))
    assert found["text"] == whole[: whole.index(stop)]
    assert found["completions"][0]["finish_reason"] == "stop"
    assert found["completions"][0]["new_tokens"] < 12


def test_window_and_cache_dtype_change_what_is_set_aside(generate):
    options = (FOX, "--max-new-tokens=6", "--greedy", "--json")
    whole, narrow, window = (
        last_object(generate(*options, *more)) for more in ((), ("--cache-dtype=bf16",), ("--sliding-window=4",))
    )
    assert narrow["kv_cache_bytes"] * 2 == whole["kv_cache_bytes"]
    assert window["kv_cache_bytes"] == 2 * 4 * 16 * 4


def test_an_older_checkpoint_by_its_folder(trained_run):
    folder = trained_run / "checkpoints" / "step_00000002"
    assert last_object(run_forked(1, "generate", f"--run={folder}", FOX, "--json"))["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt="], ["--prompt", "empty"]),
        ([FOX, "--prompt="], ["--prompt number 2", "empty"]),
        (["--prompt-file=-"], ["--prompt-file (-)", "empty"]),
        (["--prompt-file=-", "--prompt-file=-"], ["--prompt-file (-)", "twice"]),
        ([], ["standard input", "empty"]),
        (["--prompt-tokens=1,300"], ["token 300 is unknown", "0 to 296"]),
        (["--prompt-tokens=1,x"], ["--prompt-tokens ('1,x')"]),
        (["--prompt=" + "0123456789 " * 30], ["--prompt is too long", "train.sequence_length (32)", "--max-length"]),
        ([FOX, "--max-new-tokens=400"], ["--max-new-tokens (400)", "too long", "(32)"]),
        ([FOX, "--max-new-tokens=9", "--max-length=9"], ["--max-length (9)"]),
        ([FOX, "--max-new-tokens=0"], ["--max-new-tokens (0)"]),
        ([FOX, "--temperature=-1"], ["--temperature (-1)"]),
        ([FOX, "--top-p=1.5"], ["--top-p (1.5)"]),
        ([FOX, "--greedy", "--top-k=3"], ["--top-k (3)", "--temperature 0"]),
        ([FOX, "--greedy", "--seed=3"], ["--seed (3)", "--temperature 0"]),
        ([FOX, "--stop="], ["--stop ('')"]),
        ([FOX, "--precision=fp16"], ["--precision (fp16)", "--device cuda"]),
        ([FOX, "--expert-parallel-size=3"], ["expert_parallel_size (3)"]),
    ],
    ids=lambda value: "_".join(value)[:40] if value and isinstance(value, list) else "",
)
def test_bad_input(generate, arguments, words):
    check_refused(generate(*arguments), *words)


def test_two_ranks_say_it_once_and_leave(generate):
    check_refused(generate("--prompt=", ranks=2), "--prompt", "empty")


def test_what_is_no_run(tmp_path):
    check_refused(run_forked(1, "generate", "--run=/nowhere", FOX), "--run", "/nowhere")
    check_refused(run_forked(1, "generate", f"--run={tmp_path}", FOX), "--run", str(tmp_path), "no checkpoints")


def copy_of(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "copy")
    return tmp_path / "copy"


def test_damage_is_found(trained_run, tmp_path):
    run = copy_of(trained_run, tmp_path)
    file = run / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    check_refused(run_forked(1, "generate", f"--run={run}", FOX), "rank_00000.safetensors", "damaged")


def test_a_checkpoint_of_another_model(trained_run, tmp_path):
    """As where the code has changed since: the configuration says one shape, the tensors have another."""
    from moe_train.checkpoint.folders import complete_checkpoint
    from moe_train.checkpoint.manifest import MANIFEST

    run = copy_of(trained_run, tmp_path)
    folder = run / "checkpoints" / "step_00000004"
    values = json.loads((folder / MANIFEST).read_text())
    del values["digest"]
    values["config"]["model"]["hidden_size"] = 64
    part = folder.with_name("step_00000004.part")
    folder.rename(part)
    complete_checkpoint(part, values)
    check_refused(
        run_forked(1, "generate", f"--run={run}", FOX), "another model", "down.weight", "[32, 64]", "[64, 64]"
    )


def test_another_tokenizer(trained_run, tmp_path):
    run = copy_of(trained_run, tmp_path)
    text = (run / "tokenizer.json").read_text()
    (run / "tokenizer.json").write_text(text.replace('"version"', '"version" '))
    check_refused(run_forked(1, "generate", f"--run={run}", FOX), "tokenizer.json", "another tokenizer")
    # A run without the file, as older ones are: the tokenizer is found through its data.
    (run / "tokenizer.json").unlink()
    assert last_object(run_forked(1, "generate", f"--run={run}", FOX, "--json"))["text"]


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpirun", marks=pytest.mark.slow)])
def test_under_launchers(trained_run, launcher):
    scripts = os.path.dirname(sys.executable)
    commands = {
        "torchrun": [f"{scripts}/torchrun", "--standalone", "--nproc-per-node=2", "--no-python"],
        "mpirun": [f"{scripts}/mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"],
    }
    if not os.path.exists(commands[launcher][0]):
        pytest.skip(f"{launcher} is not installed")
    command = [*commands[launcher], f"{scripts}/moe-train", "generate", f"--run-dir={trained_run}", FOX, "--json"]
    environment = os.environ | CPU
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert json.loads(result.stdout.splitlines()[-1])["text"], result
