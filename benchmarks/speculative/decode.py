"""Decoding in the speculative benchmark: one text at a time, with drafts and without, in turn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner.rounds import run_rounds
from benchmarks.speculative.rows import Difference, Measured, Setting
from moe_train.api import LoadedRun, load_run
from moe_train.infer.decode import DecodePlan
from moe_train.infer.draft import first_layers
from moe_train.infer.generate import generate
from moe_train.infer.sampling import Sampling
from moe_train.infer.speculative import Draft
from moe_train.model.transformer import Tokens, Transformer

PROMPTS = (
    "def __init__(self, ",
    "import os\nimport sys\n\n\nclass ",
    "    def test_read(self):\n        ",
    "    if not isinstance(",
    '"""Utilities for ',
    "    try:\n        return self.",
)


@dataclass(frozen=True)
class Text:
    """Token ids of a prompt and of its continuation."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


class Subject:
    """A target with its drafts."""

    def __init__(self, run: LoadedRun, drafts: dict[str, tuple[Transformer, bool]], new_tokens: int, seed: int) -> None:
        """Encode the prompts.

        Args:
            run: Target.
            drafts: Drafts by name: model, and whether it is the target's first layers.
            new_tokens: Tokens of each text.
            seed: Seed of the draws.
        """
        self.run, self.drafts, self.new_tokens, self.seed = run, drafts, new_tokens, seed
        mark = run.tokenizer.end_of_document
        self.prompts = [[mark, *run.tokenizer.encode_known(prompt)] for prompt in PROMPTS]

    def decode(self, temperature: float, draft: str | None, draft_tokens: int) -> tuple[Measured, list[Text]]:
        """Continue every prompt, one after the other."""
        proposer = None
        if draft is not None:
            model, is_own = self.drafts[draft]
            proposer = Draft(model, draft_tokens, shares_cache=is_own)
        sampling = Sampling(temperature, seed=self.seed)
        plan = DecodePlan(self.new_tokens, self.run.tokenizer.vocab_size, sampling)
        found = [
            generate(self.run.model, self.run.tokenizer, [prompt], plan, ends=False, draft=proposer)
            for prompt in self.prompts
        ]
        seconds, tokens = sum(each.decode_seconds for each in found), sum(each.decode_tokens for each in found)
        sums = [each.speculation for each in found if each.speculation is not None]
        measured = Measured(
            seconds=seconds,
            tokens=tokens,
            rounds=sum(each.rounds for each in sums) if sums else tokens,
            examined=sum(each.examined for each in sums),
            accepted=sum(each.accepted for each in sums),
            draft_seconds=sum(each.draft_seconds for each in sums),
            target_seconds=sum(each.target_seconds for each in sums) if sums else seconds,
        )
        texts = [
            Text(tuple(prompt), each.completions[0].tokens) for prompt, each in zip(self.prompts, found, strict=True)
        ]
        return measured, texts


def load_subjects(folders: dict[str, Path], own_layers: int, new_tokens: int, seed: int) -> dict[str, Subject]:
    """Load the models; each target has the trained draft and its own first layers as drafts."""
    runs = {name: load_run(folder, device="cpu", precision="fp32") for name, folder in folders.items()}
    subjects = {}
    for name in ("dense", "sparse"):
        model = runs[name].model
        drafts = {"draft": (runs["draft"].model, False), f"self:{own_layers}": (first_layers(model, own_layers), True)}
        subjects[name] = Subject(runs[name], drafts, new_tokens, seed)
    return subjects


def measure(
    subjects: dict[str, Subject], temperatures: Sequence[float], numbers: Sequence[int], rounds: int
) -> tuple[dict[Setting, list[Measured]], list[Difference], int]:
    """Measure every setting, and plain decoding as setting without a draft, in turn in every round.

    Returns:
        The turns of every setting; where greedy texts part from the plain ones; the number of greedy texts compared.
    """
    settings = []
    for name, subject in subjects.items():
        for temperature in temperatures:
            settings.append(Setting(name, "", temperature, 0))
            settings += [Setting(name, draft, temperature, n) for draft in subject.drafts for n in numbers]
    texts: dict[Setting, list[Text]] = {}

    def turn(setting: Setting, _: int) -> Measured:
        draft = setting.draft or None
        measured, texts[setting] = subjects[setting.target].decode(setting.temperature, draft, setting.draft_tokens)
        return measured

    found = run_rounds(settings, rounds, turn, rotates=False)
    differences, compared = [], 0
    for setting in settings:
        if setting.draft and setting.temperature == 0:
            plain = texts[Setting(setting.target, "", 0.0, 0)]
            compared += len(plain)
            for theirs, ours in zip(plain, texts[setting], strict=True):
                if difference := first_difference(subjects[setting.target].run.model, theirs, ours):
                    differences.append(difference)
    return found, differences, compared


def compare_in_fp64(subjects: dict[str, Subject], draft_tokens: int) -> tuple[int, int]:
    """Count the greedy texts in fp64 that part from the plain ones, and all that are compared.

    In fp64 rounding decides no token, so that none may part. The models are fp64 from then on; nothing is timed.

    Args:
        subjects: Targets with their drafts.
        draft_tokens: Tokens that a draft proposes per round.
    """
    parted, compared = 0, 0
    for subject in subjects.values():
        for model in (subject.run.model, *(model for model, _ in subject.drafts.values())):
            model.double()
        _, plain = subject.decode(0.0, None, 0)
        for draft in subject.drafts:
            _, found = subject.decode(0.0, draft, draft_tokens)
            parted += sum(ours != theirs for ours, theirs in zip(found, plain, strict=True))
            compared += len(plain)
    return parted, compared


@torch.no_grad()
def first_difference(model: Transformer, plain: Text, other: Text) -> Difference | None:
    """Find the first token that differs, and how far apart the two tokens' logits are; None: there is none."""
    for place, (ours, theirs) in enumerate(zip(plain.tokens, other.tokens, strict=True)):
        if ours != theirs:
            ids = torch.tensor([[*plain.prompt, *plain.tokens[:place]]])
            logits_V = model(Tokens(ids, torch.zeros(1, dtype=torch.int64)), num_logits=1).logits_BSV[0, -1]
            return Difference(place, abs(float(logits_V[ours] - logits_V[theirs])))
    return None


@torch.no_grad()
def experts_touched(subject: Subject, numbers: Sequence[int]) -> dict[int, float]:
    """Count the experts that a check of N + 1 tokens touches, mean of a layer, by N; 0 is a plain step."""
    draft = next(iter(subject.drafts))
    touched = {}
    for number in (0, *numbers):
        with counted(subject.run.model, number + 1) as found:
            subject.decode(0.0, draft if number else None, number)
        touched[number] = sum(found) / len(found)
    return touched


@contextmanager
def counted(model: Transformer, length: int) -> Iterator[list[float]]:
    """Note the mean number of experts a layer that each forward pass over `length` tokens touches."""
    found: list[float] = []

    def note(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        del module
        if arguments[0].ids_BS.shape[1] == length:
            found.append(float((output.sums.counts > 0).sum(-1).double().mean()))

    handle = model.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()
