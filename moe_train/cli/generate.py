"""Command `moe-train generate`: generate text with a trained model, in one process or several that share experts."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.cli.paths import path_argument
from moe_train.cli.trained import add_trained_options, check_positive, open_from_options, use_of
from moe_train.config.command_line import Parser
from moe_train.config.errors import UsageError
from moe_train.config.moe import DROPLESS
from moe_train.data import Tokenizer

if TYPE_CHECKING:
    from moe_train.infer.decode import DecodePlan
    from moe_train.infer.draft import DraftSource
    from moe_train.infer.generate import Generation
    from moe_train.infer.trained import Trained

_DRAFT_TOKENS = 4  # default number of tokens that a draft proposes per round
_NEW_TOKENS = 128  # default number of new tokens, as far as there is room
_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Prompt:
    """Prompt as the user gave it.

    Attributes:
        where: Option or file that gave it, for messages.
        text: Text of the prompt; None where token ids were given.
        ids: Token ids of the prompt; empty where text was given.
    """

    where: str
    text: str | None
    ids: tuple[int, ...] = ()


def run(arguments: Sequence[str]) -> int:
    """Generate text from prompts and print it.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code 0.

    Raises:
        UsageError: If an argument is wrong, a prompt does not fit, or a checkpoint cannot be read.

    Collective: All ranks of the world.
    """
    options = _parser().parse_args(list(arguments))
    _check(options)
    prompts = _prompts(options)
    model_changes: dict[str, Any] = {"moe": DROPLESS}
    if options.sliding_window is not None:
        model_changes |= {"sliding_window": options.sliding_window, "window_pattern": None}
    trained = open_from_options(options, "moe-train generate", {"model": model_changes})
    ids = [_encode(prompt, trained.tokenizer) for prompt in prompts]
    plan = _plan(options, trained, prompts, ids)
    source = _draft_source(options, trained, plan)
    from moe_train.distributed.collectives import world_group
    from moe_train.infer.generate import generate
    from moe_train.infer.trained import load_model

    model = load_model(trained)
    draft = source.load(model) if source is not None else None
    is_alone = trained.world.world_size == 1
    streams = is_alone and len(prompts) == 1 and not options.json
    if streams and prompts[0].text is not None:
        _write(prompts[0].text)
    result = generate(
        model,
        trained.tokenizer,
        ids,
        plan,
        stop=options.stop,
        ends=not options.ignore_end,
        group=None if is_alone else world_group(),
        on_text=(lambda _, text: _write(text)) if streams else None,
        draft=draft,
    )
    if trained.world.rank == 0:
        _report(options, trained, prompts, result, streams)
    return 0


def _report(
    options: argparse.Namespace, trained: "Trained", prompts: Sequence[Prompt], result: "Generation", streams: bool
) -> None:
    """Print the texts that were not printed as they came, and the speed."""
    if options.json:
        values = result.as_dict()
        if result.speculation is not None:
            values["speculation"] |= {"draft": options.draft, "draft_tokens": options.draft_tokens or _DRAFT_TOKENS}
        for prompt, completion in zip(prompts, values["completions"], strict=True):
            completion["prompt"] = prompt.text if prompt.text is not None else list(prompt.ids)
        print(json.dumps(values | {"checkpoint": str(trained.manifest.folder), "step": trained.manifest.step}))
        return
    if streams:
        _write("\n")
    else:
        for number, (prompt, completion) in enumerate(zip(prompts, result.completions, strict=True), 1):
            _write(f"--- {number}\n{prompt.text or ''}{completion.text}\n")
    print(
        f"prefill {result.prefill_tokens_per_second:,.0f} tokens/s, decode {result.decode_tokens_per_second:,.1f} "
        f"tokens/s, KV cache {result.kv_cache_bytes:,} bytes",
        file=sys.stderr,
    )
    if (sums := result.speculation) is not None:
        print(
            f"draft: {sums.acceptance:.1%} of the examined tokens accepted, {sums.tokens_per_round:.2f} tokens per "
            f"round; {sums.draft_seconds:.2f} s in the draft, {sums.target_seconds:.2f} s in the target",
            file=sys.stderr,
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="moe-train generate",
        description="Go on with one prompt or several by a trained model. A prompt follows an end-of-document mark, as "
        "documents do in training. The text goes to the standard output as it comes, speed and cache size to the "
        "standard error. Routing is without noise and without capacity.",
        allow_abbrev=False,
    )
    add_trained_options(parser)
    group = parser.add_argument_group("prompts (of none of these, all of the standard input is one prompt)")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given again")
    help_text = 'a file that is a prompt, or, named .jsonl, has one a line: {"prompt": "..."}; -: the standard input'
    group.add_argument("--prompt-file", type=path_argument, action="append", default=[], metavar="FILE", help=help_text)
    help_text = "a prompt as token ids, separated by commas; no mark is put before them"
    group.add_argument("--prompt-tokens", action="append", default=[], metavar="IDS", help=help_text)
    group = parser.add_argument_group("how it goes on")
    help_text = f"most tokens of each continuation (default: {_NEW_TOKENS}, as far as --max-length has room)"
    group.add_argument("--max-new-tokens", type=int, metavar="N", help=help_text)
    help_text = "most tokens of prompt and continuation (default: train.sequence_length of the run)"
    group.add_argument("--max-length", type=int, metavar="N", help=help_text)
    which = group.add_mutually_exclusive_group()
    help_text = f"divides the logits (default: {_TEMPERATURE:g}); 0: always the likeliest token"
    which.add_argument("--temperature", type=float, default=_TEMPERATURE, metavar="X", help=help_text)
    help_text = "the same as --temperature 0"
    which.add_argument("--greedy", dest="temperature", action="store_const", const=0.0, help=help_text)
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    help_text = "draw from the fewest likeliest tokens that together have this probability"
    group.add_argument("--top-p", type=float, metavar="P", help=help_text)
    group.add_argument("--seed", type=int, metavar="N", help="of the draws (default: 0)")
    help_text = "end before this text, taken as it is (a line end: --stop $'\\n'); may be given again"
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help=help_text)
    group.add_argument("--ignore-end", action="store_true", help="go on past the end-of-document mark")
    group = parser.add_argument_group("cache")
    help_text = "of keys and values (default: that of the model)"
    group.add_argument("--cache-dtype", choices=("fp32", "bf16"), help=help_text)
    help_text = "attend to the last N positions, and keep no more (default: the windows of the run)"
    group.add_argument("--sliding-window", type=int, metavar="N", help=help_text)
    help_text = "tokens of the prompts that pass the model at once, which bounds its memory (default: all)"
    group.add_argument("--prefill-chunk", type=int, metavar="N", help=help_text)
    _add_draft_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line, and no text")
    return parser


def _add_draft_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "speculative decoding",
        "A smaller model proposes tokens, and the model checks them all at once. Greedy text stays the same, sampled "
        "text keeps its distribution.",
    )
    help_text = (
        "the smaller model, of the same tokenizer: a run's folder (its newest checkpoint) or a checkpoint's; or "
        "self:K, for the first K layers of the model itself"
    )
    group.add_argument("--draft", type=_draft_argument, metavar="DIR", help=help_text)
    help_text = f"tokens that it proposes per round (default: {_DRAFT_TOKENS})"
    group.add_argument("--draft-tokens", type=int, metavar="N", help=help_text)


def _draft_argument(text: str) -> str:
    return text if text.startswith("self:") else path_argument(text)


def _check(options: argparse.Namespace) -> None:
    check_positive(options, "max_new_tokens", "max_length", "top_k", "sliding_window", "prefill_chunk", "draft_tokens")
    if not 0.0 <= options.temperature < math.inf:
        raise UsageError(f"--temperature ({options.temperature:g}) must be 0 or more")
    if options.top_p is not None and not 0.0 < options.top_p <= 1.0:
        raise UsageError(f"--top-p ({options.top_p:g}) must be above 0 and at most 1")
    for name in ("top_k", "top_p", "seed"):
        value = getattr(options, name)
        if value is not None and options.temperature == 0.0:
            raise UsageError(
                f"--{name.replace('_', '-')} ({value:g}) has no effect with --temperature 0, which always takes the "
                "likeliest token"
            )
    if options.draft is None and options.draft_tokens is not None:
        raise UsageError(f"--draft-tokens ({options.draft_tokens}) has no effect without --draft")
    if "" in options.stop:
        raise UsageError("--stop ('') is empty: it would end every text at once")


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    several = len(options.prompt) > 1
    prompts = [
        Prompt(f"--prompt number {number}" if several else "--prompt", text)
        for number, text in enumerate(options.prompt, 1)
    ]
    prompts += [prompt for path in options.prompt_file for prompt in _read_file(path)]
    prompts += [_read_ids(text) for text in options.prompt_tokens]
    if not (options.prompt or options.prompt_file or options.prompt_tokens):
        prompts = [_standard_input("the standard input (no --prompt, --prompt-file or --prompt-tokens is given)")]
    if options.prompt_file.count("-") > 1:
        raise UsageError("--prompt-file (-) is given twice: there is one standard input")
    for prompt in prompts:
        if not prompt.text and not prompt.ids:
            raise UsageError(f"{prompt.where} is empty: give some text to go on with")
    return prompts


def _standard_input(where: str) -> Prompt:
    if sys.stdin is not None and sys.stdin.isatty():
        print("reading the prompt from the standard input, up to its end (Ctrl-D)", file=sys.stderr)
    return Prompt(where, _decoded(where, lambda: sys.stdin.buffer.read() if sys.stdin is not None else b""))


def _read_file(path: str) -> list[Prompt]:
    where = f"--prompt-file ({path!r})"
    if path == "-":
        return [_standard_input("--prompt-file (-), the standard input,")]
    text = _decoded(where, Path(path).read_bytes)
    if not path.endswith(".jsonl"):
        return [Prompt(where, text)]
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split inside JSON strings too
        if not line.strip():
            continue
        try:
            found = json.loads(line)["prompt"]
        except (ValueError, LookupError, TypeError) as error:
            raise UsageError(f'{where}, line {number}: is not {{"prompt": "..."}}: {error}') from error
        if not isinstance(found, str):
            raise UsageError(f"{where}, line {number}: prompt ({found!r}) is not a text")
        prompts.append(Prompt(f"{where}, line {number}", found))
    if not prompts:
        raise UsageError(f"{where} has no prompt")
    return prompts


def _decoded(where: str, read: Callable[[], bytes]) -> str:
    try:
        return read().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8: {error}") from error


def _read_ids(text: str) -> Prompt:
    try:
        return Prompt(f"--prompt-tokens ({text!r})", None, tuple(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--prompt-tokens ({text!r}) must be whole numbers, separated by commas") from error


def _encode(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Encode a prompt to token ids; a text gets an end-of-document token before it.

    Raises:
        UsageError: If the vocabulary has no token for a part of the text, or not all of the given ids.
    """
    if prompt.text is None:
        for token in prompt.ids:
            if not 0 <= token < tokenizer.vocab_size:
                raise UsageError(
                    f"{prompt.where}: token {token} is unknown: they are 0 to {tokenizer.vocab_size - 1} in this "
                    "model's vocabulary"
                )
        return list(prompt.ids)
    try:
        return [tokenizer.end_of_document, *tokenizer.encode_known(prompt.text)]
    except ValueError as error:
        raise UsageError(f"{prompt.where}: {error}") from error


def _plan(
    options: argparse.Namespace, trained: "Trained", prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]
) -> "DecodePlan":
    from moe_train.host.precision import torch_dtype
    from moe_train.infer.decode import DecodePlan
    from moe_train.infer.sampling import Sampling

    config = trained.config
    given, most = options.max_length is not None, options.max_length or config.train.sequence_length
    limit = f"--max-length ({most})" if given else f"train.sequence_length ({most}), which the model was trained on"
    remedy = "" if given else "; --max-length N goes beyond it"
    longest = max(range(len(ids)), key=lambda number: len(ids[number]))
    length = len(ids[longest])
    if length >= most:
        raise UsageError(f"{prompts[longest].where} is too long: its {length} tokens leave no room in {limit}{remedy}")
    new_tokens = options.max_new_tokens or min(_NEW_TOKENS, most - length)
    if length + new_tokens > most:
        raise UsageError(
            f"--max-new-tokens ({new_tokens}) is too long: with the {length} tokens of {prompts[longest].where} it "
            f"exceeds {limit}{remedy}"
        )
    tokenizer = trained.tokenizer
    return DecodePlan(
        max_new_tokens=new_tokens,
        vocab_size=tokenizer.vocab_size,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.seed or 0),
        cache_dtype=torch_dtype(options.cache_dtype) if options.cache_dtype else None,
        prefill_chunk=options.prefill_chunk,
        end_of_document=tokenizer.end_of_document if config.model.isolate_documents else None,
    )


def _draft_source(options: argparse.Namespace, trained: "Trained", plan: "DecodePlan") -> "DraftSource | None":
    """Find the draft and check that it fits; None: there is none."""
    if options.draft is None:
        return None
    if plan.max_new_tokens == 1:
        raise UsageError(f"--draft ({options.draft}) has no effect on one new token: the prompt alone gives the first")
    from moe_train.infer.draft import open_draft

    return open_draft(options.draft, options.draft_tokens or _DRAFT_TOKENS, trained, use_of(options))


def _write(text: str) -> None:
    """Write text to standard output at once, and replace characters that its encoding lacks."""
    if sys.stdout is None:  # it was closed when the process started
        return
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
