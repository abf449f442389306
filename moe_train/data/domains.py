"""Evaluation text by source: the held-out documents, the training documents, or all of them."""

from dataclasses import dataclass
from typing import Literal

from moe_train.config.data import DataConfig, SourceConfig
from moe_train.config.errors import UsageError
from moe_train.data.cache import CacheFolder, TokenCache
from moe_train.data.folders import cache_root
from moe_train.data.prepare import OTHER_RANKS_WAIT_SECONDS, open_corpora, source_fields, warn_of_loss
from moe_train.data.recovery import ALL_RECOVERED
from moe_train.data.sequences import HeldOut, join_streams
from moe_train.data.sources import check_source
from moe_train.data.tokenizers import Tokenizer

Split = Literal["held_out", "train", "all"]


@dataclass(frozen=True)
class Domain:
    """Text of one source.

    Attributes:
        name: Name of the source.
        text: Text of the source, cut into sequences.
    """

    name: str
    text: HeldOut


def open_domains(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    split: Split,
    local_rank: int = 0,
    show_progress: bool = False,
) -> tuple[Domain, ...]:
    """Open the text of every source, and tokenize the sources that are not in the cache.

    As in `prepare_data`, every process calls it, and processes communicate through the cache folder only.

    Args:
        config: Data settings; the tokenizer in them is not used.
        tokenizer: Tokenizer that encodes the text.
        sequence_length: Tokens per sequence.
        split: Which documents of each source to take.
        local_rank: Rank of this process on its machine; rank 0 gets a head start.
        show_progress: Whether to show a progress bar where standard error is a terminal.

    Returns:
        One domain per source, in the order of the mixture.

    Raises:
        UsageError: If a source cannot be read, or has no text in the split. Every process raises the same error.
    """
    if config.source == "synthetic" and not config.mixture:
        raise UsageError(
            "data.source ('synthetic') is random and has no text to measure: name other data, such as "
            "--data.source=text --data.paths=FILE"
        )
    for source, field in zip(config.sources, source_fields(config), strict=True):
        check_source(source, field)
    wait_seconds = OTHER_RANKS_WAIT_SECONDS if local_rank else 0.0
    folder = CacheFolder(cache_root(config.cache_dir), wait_seconds, show_progress)
    domains = []
    corpora, fingerprints = open_corpora(config, folder)
    for source, corpus, fingerprint in zip(config.sources, corpora, fingerprints, strict=True):
        if split == "all":  # also what training leaves out, and no document in two parts
            cache = folder.tokens(corpus.corpus, corpus.corpus.fingerprint(folder.digest_files), tokenizer)
        else:
            cache = folder.tokens(corpus, fingerprint, tokenizer)
        if show_progress:
            warn_of_loss(corpus, cache)
        text = _text_of(cache, split, sequence_length, tokenizer.end_of_document)
        if text.num_bytes == 0:
            raise UsageError(f"{corpus.description} has no text in --split ({split}): {_reason(split)}")
        domains.append(Domain(_name_of(source), text))
    return tuple(domains)


def _text_of(cache: TokenCache, split: Split, sequence_length: int, end_of_document: int) -> HeldOut:
    parts = {
        "held_out": [(cache.held_out_tokens, cache.held_out)],
        "train": [(cache.train_tokens, cache.train)],
        "all": [(cache.train_tokens, cache.train), (cache.held_out_tokens, cache.held_out)],
    }[split]
    parts = [(tokens, size) for tokens, size in parts if size.documents]
    lost = sum((size.unrecovered for _, size in parts), ALL_RECOVERED)
    return HeldOut(
        tokens=join_streams([tokens for tokens, _ in parts]),
        sequence_length=sequence_length,
        end_of_document=end_of_document,
        num_documents=sum(size.documents for _, size in parts),
        num_bytes=sum(size.num_bytes for _, size in parts),
        reference_bits_per_byte=cache.reference_bits_per_byte if split == "held_out" and not lost else {},
        unrecovered=lost,
    )


def _name_of(source: SourceConfig) -> str:
    return ", ".join(source.paths) or source.name or source.source


def _reason(split: Split) -> str:
    if split == "held_out":
        return "nothing is held out of it; give --split all, or name data.validation_paths"
    return "its documents are empty, or all held out" if split == "train" else "its documents are empty"
