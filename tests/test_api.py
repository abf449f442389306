"""The Python interface: configurations, data, models, training, loading, and a notebook.

What trains or joins ranks runs in forked processes: they change the environment and the threads of their process.
"""

import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import moe_train
from moe_train.checkpoint.manifest import DamagedCheckpoint
from moe_train.config.base import merge
from moe_train.config.registry import REGISTRY
from moe_train.distributed.bootstrap import local_rank_environments
from moe_train.launch.fork_server import wait_for_all
from moe_train.model.transformer import Tokens
from tests.docs.pages import blocks, read_page
from tests.processes import run_process
from tests.train.runs import CPU, ROOT, fork_server, records, run_forked

STEPS = 4
PROMPTS = ("def main(", "import ")
IDS = [[256, 100, 101, 102, 32, 109], [256, 105, 109, 112, 111, 114]]
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 64,
        "moe": {"num_experts": 4, "router": "softmax_topk", "switch_aux_coef": 0.01},
    },
    "data": {"source": "python_stdlib", "tokenizer": "bytes", "validation_max_bytes": 20000},
    "optim": {"schedule": "constant", "warmup_steps": 2},
    "train": {
        "sequence_length": 32,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "precision": "fp32",
        "sample_tokens": 0,
        "steps": STEPS,
    },
    "telemetry": {"every": 1, "tensorboard": False},
}


def small_config(**train: Any) -> moe_train.Config:
    """A configuration that trains in a second."""
    return moe_train.load_config(None, **SECTIONS | {"train": SECTIONS["train"] | train})


def on_ranks(function: Callable[..., Any], *arguments: str | Path, ranks: int = 1) -> tuple[list[Any], str]:
    """What a function of this file gives in a process of its own on each rank, and what rank 0 prints before that."""
    words = [function.__name__, *map(str, arguments)]
    environments = local_rank_environments(ranks)
    started = [fork_server().start("tests.test_api:answer", words, each, ROOT) for each in environments]
    results = wait_for_all(started, timeout=120)
    for result in results:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return [json.loads(result.stdout.splitlines()[-1]) for result in results], results[0].stdout


def answer(words: list[str]) -> int:
    """Call a function of this file, in a forked process, and print its result as the last line."""
    print(json.dumps(globals()[words[0]](*words[1:])), flush=True)
    return 0


def state_of_process() -> dict[str, Any]:
    """What a training must leave as it was."""
    return {
        "files": [(os.fstat(number).st_dev, os.fstat(number).st_ino) for number in (0, 1, 2)],
        "streams": [id(sys.stdin), id(sys.stdout), id(sys.stderr)],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "threads": sorted(thread.name for thread in threading.enumerate() if "experts" not in thread.name),
        "folder": os.getcwd(),
        "handlers": len(logging.getLogger().handlers),
    }


def train_twice(run_dir: str) -> dict[str, Any]:
    before = state_of_process()
    first = moe_train.run_training(small_config(run_dir=run_dir))
    print("between the runs")
    second = moe_train.run_training(small_config(run_dir=run_dir, steps=STEPS + 2))
    print("to the error stream", file=sys.stderr)
    return {
        "steps": [first.steps, second.steps],
        "checkpoints": [str(first.checkpoint), str(second.checkpoint)],
        "losses": [result.validation.cross_entropy for result in (first, second) if result.validation],
        "stopped": [first.stopped, second.stopped],
        "state": [before, state_of_process()],
    }


def fail_and_train(folder: str) -> dict[str, Any]:
    """A run whose numbers go wrong, and another after it."""
    before = state_of_process()
    wrong = small_config(run_dir=f"{folder}/wrong", max_skipped_steps=1).model_dump(exclude_unset=True)
    wrong["optim"]["learning_rate"] = 1e30
    try:
        moe_train.run_training(moe_train.load_config(None, **wrong))
    except moe_train.RunFailed as error:
        told = [str(error), error.exit_code, type(error.__cause__).__name__]
    result = moe_train.run_training(small_config(run_dir=f"{folder}/right"))
    return {"told": told, "steps": result.steps, "state": [before, state_of_process()]}


def use(run_dir: str) -> dict[str, Any]:
    """What a loaded run gives."""
    run = moe_train.load_run(run_dir)
    return {
        "logits": run.logits(IDS).tolist(),
        "texts": run.generate(*PROMPTS, max_new_tokens=12, temperature=0.9, seed=3),
        "experts_here": sum(p.numel() for name, p in run.model.named_parameters() if ".experts." in name),
        "step": run.step,
    }


def run_page(folder: str) -> list[str]:
    """Run the blocks of docs/python.md one after the other, with few steps and small sizes."""
    os.chdir(folder)
    os.symlink(ROOT / "configs", "configs")
    load_config = moe_train.load_config
    sizes = {"steps": 2, "sequence_length": 32, "micro_batch_size": 4, "precision": "fp32", "sample_tokens": 0}
    small = {"train": sizes, "data": SECTIONS["data"], "optim": {"warmup_steps": 1}}
    moe_train.load_config = lambda file, **sections: load_config(file, **merge(sections, small))
    names: dict[str, Any] = {}
    for block in blocks(read_page("python.md"), "python"):
        exec(block, names)
    return [type(names["model"]).__name__, names["text"], names["config"].model.moe.router]


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `load_run` sets in this process does not outlive the test; one thread, for ranks share the cores."""
    threads, environ = torch.get_num_threads(), dict(os.environ)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    os.environ.update(environ)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Two trainings in one process: what they gave, what was printed, and the run's folder."""
    folder = tmp_path_factory.mktemp("api") / "run"
    (found,), printed = on_ranks(train_twice, folder)
    return found, printed, folder


@pytest.fixture(scope="module")
def used(trained: tuple[dict[str, Any], str, Path]) -> dict[str, Any]:
    """The run loaded in one process."""
    return on_ranks(use, trained[2])[0][0]


def test_importing_is_light_and_names_are_listed() -> None:
    code = """
import sys, moe_train
assert {"load_config", "LoadedRun"} <= set(dir(moe_train))
first = {"torch", "deepspeed", "pydantic"} & set(sys.modules)
moe_train.load_config(train={"steps": 3})
print(first, {"torch", "deepspeed"} & set(sys.modules))
"""
    result = run_process([sys.executable, "-c", code], timeout=60)
    assert (result.stdout, result.returncode) == ("set() set()\n", 0), result


def test_the_names_are_those_of_the_module() -> None:
    from moe_train import api

    assert moe_train.__all__ == api.__all__
    assert all(getattr(moe_train, name) is getattr(api, name) for name in api.__all__)
    assert moe_train.Config is type(small_config())


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'moe_train' has no attribute 'train_model'"):
        moe_train.train_model  # noqa: B018
    with pytest.raises(ImportError):
        from moe_train import train_model  # noqa: F401
    assert not hasattr(moe_train, "prepare_run")


def test_load_config_puts_sections_above_the_file(tmp_path: Path) -> None:
    file = ROOT / "configs" / "quickstart.yaml"
    plain = moe_train.load_config(file)
    run_dir = tmp_path / "run"
    ours = moe_train.load_config(
        str(file), train=MappingProxyType({"steps": 7, "run_dir": run_dir}), model={"moe": {"num_experts": 16}}
    )
    assert (plain.train.steps, ours.train.steps) == (700, 7)
    assert ours.train.run_dir == str(run_dir) and plain.train.run_dir == "runs/quickstart"
    assert ours.model.moe == plain.model.moe.model_copy(update={"num_experts": 16})
    assert ours.data == plain.data and ours.train.sequence_length == plain.train.sequence_length
    assert moe_train.load_config().train.run_dir == "unused"
    assert moe_train.load_config(model={"moe": None}) == moe_train.load_config()  # an empty section: defaults
    with pytest.raises(ValueError, match="frozen"):
        ours.train.steps = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"trane": {}}, ["trane", "did you mean train?"]),
        ({"train": {"step": 3}}, ["train.step", "did you mean", "steps"]),
        ({"train": {"steps": -1}, "optim": {"beta1": 2}}, ["train.steps (-1)", "optim.beta1 (2)"]),
        ({"model": {"hidden_size": 30, "num_heads": 4}}, ["hidden_size (30)", "num_heads (4)"]),
        ({"model": {"moe": {"router": "soft_topk"}}}, ["soft_topk", "did you mean softmax_topk?"]),
        ({"train": 3}, ["train (3)"]),
    ],
)
def test_load_config_names_what_is_wrong(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(moe_train.UsageError) as error:
        moe_train.load_config(None, **sections)
    assert [word for word in words if word not in str(error.value)] == []


def test_load_config_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    with pytest.raises(moe_train.UsageError, match=r"wrong\.yaml: cannot be read"):
        moe_train.load_config(file)
    file.write_text("train: {steps: 0}")
    with pytest.raises(moe_train.UsageError, match=r"wrong\.yaml: train\.steps \(0\)"):
        moe_train.load_config(file)
    file.write_text("- 1")
    with pytest.raises(moe_train.UsageError, match="must be a mapping"):
        moe_train.load_config(file)


def test_open_data_gives_the_sequences_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij" * 40)
    (tmp_path / "b.txt").write_text("0123456789" * 5)
    data = {
        "source": "text",
        "paths": [tmp_path / "a.txt"],
        "validation_paths": [tmp_path / "b.txt"],
        "cache_dir": tmp_path / "cache",
    }
    config = moe_train.load_config(data=data, train={"sequence_length": 16})
    opened = moe_train.open_data(config)
    batch = opened.train.batch(torch.arange(3).numpy())
    assert batch.shape == (3, 17) and opened.tokenizer.vocab_size == 257
    assert all(opened.tokenizer.decode(row) in "abcdefghij" * 3 for row in batch if 256 not in row)
    assert opened.held_out is not None and opened.held_out.num_bytes == 50
    assert (moe_train.open_data(config).train.batch(torch.arange(3).numpy()) == batch).all()
    with pytest.raises(moe_train.UsageError, match=r"data\.paths .*nowhere"):
        moe_train.open_data(moe_train.load_config(data={"source": "text", "paths": ["/nowhere/*.txt"]}))
    with pytest.raises(moe_train.UsageError, match="sequence_length"):
        moe_train.open_data(moe_train.load_config(data=data, train={"sequence_length": 512}))


def test_build_model_gives_the_same_weights_for_the_same_seed() -> None:
    one, same, other = (moe_train.build_model(small_config(seed=seed), 257).state_dict() for seed in (0, 0, 1))
    assert list(one) == list(same) == list(other)
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if one[name].dim() > 1 and one[name].std() > 0]
    assert len(drawn) > 8 and not any(torch.equal(one[name], other[name]) for name in drawn)
    narrow = moe_train.build_model(small_config(), 257, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}


def test_build_model_refuses_what_cannot_be_built() -> None:
    with pytest.raises(moe_train.UsageError, match=r"model\.vocab_size \(None\)"):
        moe_train.build_model(small_config())
    moe = SECTIONS["model"]["moe"] | {"softmax_topk": {"size": 3}}
    config = moe_train.load_config(model=SECTIONS["model"] | {"moe": moe})
    with pytest.raises(moe_train.UsageError, match=r"model\.moe\.softmax_topk \(\{'size': 3\}\)"):
        moe_train.build_model(config, 257)


def test_the_model_learns_in_a_loop_of_torch() -> None:
    config = small_config()
    data, model = moe_train.open_data(config), moe_train.build_model(config, 257)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(8):
        numbers = torch.arange(8)
        sequences = torch.from_numpy(data.train.batch(numbers.numpy()))
        logits = model(Tokens(sequences[:, :-1], numbers, step)).logits_BSV
        loss = F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < losses[0] - 1  # the same eight sequences each time


def test_a_run_begins_with_the_weights_and_sequences_that_the_functions_give(trained) -> None:
    config = small_config()
    sequences = torch.from_numpy(moe_train.open_data(config).train.batch(torch.arange(4).numpy()))
    model = moe_train.build_model(config, 257)
    logits = model(Tokens(sequences[:, :-1], torch.arange(4), 0)).logits_BSV
    loss = F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).item()
    # fp32 in another order of the sums: two micro-batches there, one batch here.
    assert records(trained[2])[0]["train/cross_entropy"] == pytest.approx(loss, rel=1e-6)


def test_a_second_training_in_the_process_goes_on(trained) -> None:
    found, printed, folder = trained
    assert found["steps"] == [STEPS, 2] and found["stopped"] == [None, None]
    assert [Path(path).name for path in found["checkpoints"]] == [f"step_{STEPS:08d}", f"step_{STEPS + 2:08d}"]
    lines = records(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 3))
    assert [lines[step - 1]["val/cross_entropy"] for step in (STEPS, STEPS + 2)] == found["losses"]
    first, _, second = printed.partition("between the runs\n")
    assert "going on from" not in first and f"going on from {found['checkpoints'][0]}" in second
    assert f"{STEPS} steps done, 2 to do" in second


def test_a_training_leaves_the_process_as_it_was(trained) -> None:
    before, after = trained[0]["state"]
    assert after == before


def test_a_failed_run_is_an_error_with_its_cause_and_another_can_follow(tmp_path: Path) -> None:
    (found,), _ = on_ranks(fail_and_train, tmp_path)
    message, code, cause = found["told"]
    assert message.startswith("rank 0: ") and str(tmp_path / "wrong" / "logs") in message
    assert (code, cause) == (65, "TrainingDiverged")
    assert found["steps"] == STEPS
    before, after = found["state"]
    assert {**after, "threads": before["threads"]} == before  # a failed run leaves its watchdog, which watches nothing


def test_run_training_refuses_a_configuration_that_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(moe_train.UsageError, match=r"train\.run_dir is missing"):
        moe_train.run_training(small_config())
    (tmp_path / "file").write_text("")
    with pytest.raises(moe_train.UsageError, match=r"train\.run_dir .* cannot be created"):
        moe_train.run_training(small_config(run_dir=tmp_path / "file" / "run"))
    config = moe_train.load_config(data={"source": "text", "paths": ["/nowhere"]}, train={"run_dir": tmp_path / "run"})
    with pytest.raises(moe_train.UsageError, match=r"data\.paths"):
        moe_train.run_training(config)


def test_logits_are_those_of_the_model_and_of_the_held_out_loss(trained) -> None:
    config, folder = small_config(), trained[2]
    run = moe_train.load_run(folder, device="cpu")
    assert run.step == STEPS + 2 and not run.model.training
    assert run.config.model.moe == config.model.moe
    held_out = moe_train.open_data(config).held_out
    inputs_BS, targets_BS = (
        torch.from_numpy(each) for each in held_out.batch(torch.arange(held_out.num_sequences).numpy())
    )
    logits_BSV = run.logits(inputs_BS)
    assert logits_BSV.shape == (*inputs_BS.shape, 257) and not logits_BSV.requires_grad
    loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten()).item()
    assert records(folder)[-1]["val/cross_entropy"] == pytest.approx(loss, rel=1e-5)
    # Another model with the same weights, and each sequence for itself.
    model = moe_train.build_model(config, 257)
    model.load_state_dict(run.model.state_dict())
    ids = torch.tensor(IDS)
    with torch.no_grad():
        direct = model(Tokens(ids, torch.arange(2), 0)).logits_BSV
    assert torch.equal(run.logits(IDS), direct)
    torch.testing.assert_close(torch.cat([run.logits([IDS[0]]), run.logits([IDS[1]])]), direct, rtol=0, atol=1e-5)


def test_a_checkpoint_can_be_loaded_by_its_folder(trained) -> None:
    older = moe_train.load_run(trained[0]["checkpoints"][0], precision="bf16", device="cpu")
    assert older.step == STEPS and older.model.embedding.weight.dtype is torch.bfloat16


def test_logits_and_texts_are_the_same_on_two_ranks(trained, used) -> None:
    both, _ = on_ranks(use, trained[2], ranks=2)
    for found in both:
        # Experts' outputs are added in another order.
        torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(used["logits"]), rtol=0, atol=1e-5)
        assert found["texts"] == used["texts"] and found["step"] == used["step"]
        assert 2 * found["experts_here"] == used["experts_here"]


def test_generate_gives_what_the_command_gives(trained, used) -> None:
    options = ("--max-new-tokens=12", "--temperature=0.9", "--seed=3", "--json")
    result = run_forked(1, "generate", f"--run={trained[2]}", *(f"--prompt={each}" for each in PROMPTS), *options)
    assert result.returncode == 0, result
    found = json.loads(result.stdout.splitlines()[-1])
    assert used["texts"] == [completion["text"] for completion in found["completions"]]
    assert all(used["texts"])


def test_generate_in_its_other_ways(trained) -> None:
    run = moe_train.load_run(trained[2], device="cpu")
    greedy = run.generate(PROMPTS[0], max_new_tokens=8, temperature=0)
    assert greedy == run.generate(PROMPTS[0], max_new_tokens=8, temperature=1.0, top_k=1, seed=5)
    texts = [run.generate(PROMPTS[0], max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert run.generate() == []
    for wrong in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}):
        ((name, value),) = wrong.items()
        with pytest.raises(moe_train.UsageError, match=rf"{name} \({value}\) must be"):
            run.generate(PROMPTS[0], **wrong)


def test_generate_with_a_draft(trained) -> None:
    run = moe_train.load_run(trained[2], device="cpu")
    greedy = run.generate(*PROMPTS, max_new_tokens=8, temperature=0)
    for draft, settings in ((run, {}), (1, {"draft_tokens": 2})):
        assert run.generate(*PROMPTS, max_new_tokens=8, temperature=0, draft=draft, **settings) == greedy
    for wrong, words in (
        ({"draft": 2}, r"draft \(2\) must have 1 to 1 layers"),
        ({"draft": run, "draft_tokens": 0}, r"draft_tokens \(0\) must be 1"),
        ({"draft_tokens": 3}, r"draft_tokens \(3\) has no effect"),
    ):
        with pytest.raises(moe_train.UsageError, match=words):
            run.generate(PROMPTS[0], **wrong)


def test_load_run_names_what_is_missing_or_damaged(trained, tmp_path: Path) -> None:
    with pytest.raises(moe_train.UsageError, match="nowhere"):
        moe_train.load_run(tmp_path / "nowhere")
    with pytest.raises(moe_train.UsageError, match="expert_parallel_size"):
        moe_train.load_run(trained[2], expert_parallel_size=3)
    copy = tmp_path / "run" / "checkpoints" / "step_00000006"
    shutil.copytree(trained[0]["checkpoints"][1], copy)
    biggest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(biggest.read_bytes())
    content[len(content) // 2] ^= 1
    biggest.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=biggest.name):
        moe_train.load_run(tmp_path / "run", device="cpu")


def test_the_page_about_it_is_true(tmp_path: Path) -> None:
    (found,), printed = on_ranks(run_page, tmp_path)
    assert found[0] == "Transformer" and found[1] and found[2] == "mine"
    assert "torch.Size([16, 32, 257])" in printed and "checkpoints/step_00000002" in printed
    page, table = read_page("python.md"), {}
    for group, choice, kind, path in re.findall(
        r"^\| `(\w+)` \| `([\w.]+)` \| `(\w+)` \| `([\w/.]+)` \|$", page, re.MULTILINE
    ):
        assert f"class {kind}:" in (ROOT / path).read_text(encoding="utf-8")
        section: Any = moe_train.load_config()
        for name in choice.split("."):
            section = getattr(section, name)
        table[group] = choice
    assert set(table) == set(REGISTRY)


NOTEBOOK = (
    "import os, sys, moe_train\n"
    "before = [os.fstat(number).st_ino for number in (1, 2)], id(sys.stdout), id(sys.stderr)",
    "config = moe_train.load_config(None, **{sections!r})\nresult = moe_train.run_training(config)",
    "print('after the run')\n"
    "assert before == ([os.fstat(number).st_ino for number in (1, 2)], id(sys.stdout), id(sys.stderr))\n"
    "run = moe_train.load_run(config.train.run_dir)\n"
    "print(len(run.generate('def ', max_new_tokens=5)), result.steps)\n"
    "run.step",
)


def test_a_notebook_trains_and_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "of the extra `test`: pip install nbclient ipykernel"
    nbclient = pytest.importorskip("nbclient", reason=why)
    pytest.importorskip("ipykernel", reason=why)
    import nbformat  # nbclient brings it

    for name, value in CPU.items():
        monkeypatch.setenv(name, value)
    sections = SECTIONS | {"train": SECTIONS["train"] | {"run_dir": str(tmp_path / "run")}}
    cells = [nbformat.v4.new_code_cell(cell.replace("{sections!r}", repr(sections))) for cell in NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=90, kernel_name="python3", resources=resources).execute()
    _, trained_cell, used_cell = notebook.cells
    # rich shows lines by display_data, print by a stream.
    progress = "".join(output.get("text") or output["data"]["text/plain"] for output in trained_cell.outputs)
    assert f"step {STEPS:6d}  held out:" in progress and "1 x cpu" in progress
    assert all(output.get("name", "stdout") == "stdout" for output in trained_cell.outputs)
    *printed, value = used_cell.outputs  # the kernel may send what is printed in several pieces
    assert "".join(piece["text"] for piece in printed) == f"after the run\n1 {STEPS}\n"
    assert value["data"]["text/plain"] == str(STEPS)
    assert (tmp_path / "run" / "logs" / "rank_00000.log").is_file()
