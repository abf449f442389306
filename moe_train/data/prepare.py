"""Preparation of data, from the data settings to training and held-out sequences, and a quick check to run first."""

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.data import DataConfig
from moe_train.config.errors import UsageError
from moe_train.config.paths import local_path
from moe_train.data.build import cut
from moe_train.data.cache import FORMAT_VERSION, CacheFolder, TokenCache
from moe_train.data.corpus import Corpus
from moe_train.data.digests import digest_of
from moe_train.data.folders import build_once, cache_root, replaced_folder
from moe_train.data.identity import SourceIdentity, identify
from moe_train.data.report import say
from moe_train.data.selection import SelectedCorpus, select_documents
from moe_train.data.sequences import HeldOut, TrainEntry, TrainingSequences, join_held_out
from moe_train.data.sources import check_source, open_corpus
from moe_train.data.synthetic import synthetic_entry
from moe_train.data.tokenizers import (
    BPE_PATTERN,
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    load_tokenizer_file,
    train_bpe,
)

BPE_TRAINING_BYTES = 32 * 2**20
TOKENIZER_FILE = "tokenizer.json"
OTHER_RANKS_WAIT_SECONDS = 1.0  # so that local rank 0 builds, which shows the progress
NAME_HASH_RANGE = 2**32
SAMPLE_CHARACTERS = 2**16  # characters per piece; so a few documents of gigabytes are sampled like many small ones


@dataclass(frozen=True)
class PreparedData:
    """Data that training reads.

    Attributes:
        tokenizer: Tokenizer of the data.
        train: Training sequences by global sample index.
        held_out: Held-out sequences; None when nothing is held out.
        cache_dirs: Folder of each source's tokens, in the order of the mixture.
        sources: Identity of each source, which a checkpoint keeps; in the same order.
    """

    tokenizer: Tokenizer
    train: TrainingSequences
    held_out: HeldOut | None
    cache_dirs: tuple[Path, ...]
    sources: tuple[SourceIdentity, ...] = ()


def check_data(config: DataConfig) -> None:
    """Check that the files, patterns and folders in the settings exist: fast, without heavy imports.

    Args:
        config: Data settings.

    Raises:
        UsageError: If one does not exist. The message names the field, the value and the problem.
    """
    for source, field in zip(config.sources, source_fields(config), strict=True):
        check_source(source, field)
    if config.tokenizer not in ("bytes", "bpe") and not os.path.isfile(local_path(config.tokenizer, "data.tokenizer")):
        raise UsageError(f"data.tokenizer ({config.tokenizer!r}): neither bytes nor bpe nor the path of a file")


def prepare_data(
    config: DataConfig,
    *,
    sequence_length: int,
    seed: int,
    min_sequences: int,
    local_rank: int = 0,
    show_progress: bool = False,
) -> PreparedData:
    """Open the data, and tokenize the sources that are not in the cache.

    Every process calls it. On each machine one process builds while the others wait. Processes communicate through the
    cache folder only.

    Args:
        config: Data settings.
        sequence_length: Tokens per sequence.
        seed: Seed of the order of the training sequences.
        min_sequences: Value of train.global_batch_size; fewer training sequences are an error.
        local_rank: Rank of this process on its machine; rank 0 gets a head start.
        show_progress: Whether to show a progress bar where standard error is a terminal.

    Returns:
        The data, memory-mapped.

    Raises:
        UsageError: If the data cannot be read or is too small. Every process raises the same error.
    """
    check_data(config)
    if config.source == "synthetic" and not config.mixture:
        entry = synthetic_entry(sequence_length, config.ignored_targets)
        return PreparedData(ByteTokenizer(), TrainingSequences((entry,), sequence_length, seed), None, ())
    wait_seconds = OTHER_RANKS_WAIT_SECONDS if local_rank else 0.0
    folder = CacheFolder(cache_root(config.cache_dir), wait_seconds, show_progress)
    corpora, fingerprints = open_corpora(config, folder)
    for note in (note for corpus in corpora if not local_rank for note in corpus.notes):
        say(note)
    tokenizer = _given_tokenizer(config) or _trained_bpe(config, corpora, fingerprints, folder)
    caches = [folder.tokens(corpus, mark, tokenizer) for corpus, mark in zip(corpora, fingerprints, strict=True)]
    _check_enough(corpora, caches, sequence_length, min_sequences)
    _check_held_out(corpora, caches)
    if show_progress:
        for corpus, cache in zip(corpora, caches, strict=True):
            warn_of_loss(corpus, cache)
    entries = tuple(
        TrainEntry(cache.train_tokens, source.weight) for cache, source in zip(caches, config.sources, strict=True)
    )
    return PreparedData(
        tokenizer=tokenizer,
        train=TrainingSequences(entries, sequence_length, seed),
        held_out=join_held_out(caches, sequence_length, tokenizer.end_of_document),
        cache_dirs=tuple(cache.folder for cache in caches),
        sources=tuple(identify(corpus, folder.digest_files) for corpus in corpora),
    )


def find_tokenizer(config: DataConfig, *, local_rank: int = 0) -> Tokenizer:
    """Open the tokenizer of the data settings without the data. A BPE that is not in the cache is trained first.

    Args:
        config: Data settings.
        local_rank: Rank of this process on its machine; rank 0 gets a head start.

    Returns:
        The tokenizer.

    Raises:
        UsageError: If the tokenizer file, or the data for the training of a BPE, cannot be read.
    """
    given = _given_tokenizer(config)
    if given is not None:
        return given
    check_data(config)
    folder = CacheFolder(cache_root(config.cache_dir), OTHER_RANKS_WAIT_SECONDS if local_rank else 0.0, False)
    corpora, fingerprints = open_corpora(config, folder)
    return _trained_bpe(config, corpora, fingerprints, folder)


def open_corpora(config: DataConfig, folder: CacheFolder) -> tuple[tuple[SelectedCorpus, ...], list[str]]:
    """Open all sources, and leave out of training what any of them holds out.

    Args:
        config: Data settings.
        folder: Cache folder, which keeps the index of each source.

    Returns:
        The corpora in the order of the mixture, and the fingerprint of each.

    Raises:
        UsageError: If a source cannot be read.
    """
    named_sources = zip(config.sources, source_fields(config), strict=True)
    corpora = [open_corpus(source, config, field, folder.digest_files) for source, field in named_sources]
    indexes = [folder.index(corpus, corpus.fingerprint(folder.digest_files)) for corpus in corpora]
    selected = select_documents(corpora, indexes)
    return selected, [corpus.fingerprint(folder.digest_files) for corpus in selected]


def source_fields(config: DataConfig) -> list[str]:
    """Name the place of each source in the configuration, for messages ("data" or "data.mixture[0]")."""
    return [f"data.mixture[{i}]" for i in range(len(config.mixture))] or ["data"]


def warn_of_loss(corpus: Corpus, cache: TokenCache) -> None:
    """Print a warning if decoding the tokens of a corpus does not give its text back."""
    lost = cache.train.unrecovered + cache.held_out.unrecovered
    if lost:
        documents = cache.train.documents + cache.held_out.documents
        num_bytes = cache.train.num_bytes + cache.held_out.num_bytes
        told = lost.describe(documents, num_bytes)
        say(f"warning: the tokenizer does not keep all text of {corpus.description}: {told}; so no bits per byte of it")


def _check_enough(
    corpora: Sequence[SelectedCorpus], caches: Sequence[TokenCache], sequence_length: int, min_sequences: int
) -> None:
    counts = [max(0, (cache.train.tokens - 1) // sequence_length) for cache in caches]
    for corpus, cache, count in zip(corpora, caches, counts, strict=True):
        if count == 0:
            raise UsageError(
                f"{corpus.description} has 0 sequences of {sequence_length} tokens (train.sequence_length): "
                f"{cache.train.documents} documents to train on hold {cache.train.tokens} tokens, "
                f"{cache.held_out.documents} are held out, and {corpus.num_left_out} are left out because the same "
                "text is held out"
            )
    if sum(counts) < min_sequences:
        raise UsageError(
            f"{' with '.join(corpus.description for corpus in corpora)} has {sum(counts)} sequences of "
            f"{sequence_length} tokens, fewer than one batch (train.global_batch_size {min_sequences})"
        )


def _check_held_out(corpora: Sequence[Corpus], caches: Sequence[TokenCache]) -> None:
    for corpus, cache in zip(corpora, caches, strict=True):
        if cache.held_out.documents and not cache.held_out.num_bytes:
            raise UsageError(
                f"{corpus.description} holds out {cache.held_out.documents} documents, all of them empty: nothing to "
                "validate on"
            )


def _given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """Open a tokenizer that needs no data; None for a BPE."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        return None
    return load_tokenizer_file(local_path(config.tokenizer, "data.tokenizer"), config.end_of_document)


def _trained_bpe(
    config: DataConfig, corpora: Sequence[Corpus], fingerprints: Sequence[str], folder: CacheFolder
) -> SubwordTokenizer:
    """Open the BPE of all sources; one process trains it first, on each source in proportion to its weight."""
    total = sum(source.weight for source in config.sources)
    shares = [source.weight / total for source in config.sources]
    key = digest_of(
        [FORMAT_VERSION, list(fingerprints), shares, config.bpe_vocab_size, BPE_PATTERN, BPE_TRAINING_BYTES]
    )
    target = folder.root / "tokenizers" / key

    def find() -> SubwordTokenizer | None:
        try:
            return load_tokenizer_file(target / TOKENIZER_FILE, None)
        except UsageError:
            return None  # it does not exist or is damaged; it is not the user's file, so it is trained again

    def build() -> SubwordTokenizer:
        names = ", ".join(corpus.description for corpus in corpora)
        say(f"training a BPE of {config.bpe_vocab_size} entries on {names}")
        with replaced_folder(target) as temporary:
            texts = (
                text
                for corpus, share in zip(corpora, shares, strict=True)
                for text in training_sample(corpus, int(share * BPE_TRAINING_BYTES))
            )
            train_bpe(texts, config.bpe_vocab_size, temporary / TOKENIZER_FILE)
            for corpus, fingerprint in zip(corpora, fingerprints, strict=True):
                folder.check_unchanged(corpus, fingerprint)
        return load_tokenizer_file(target / TOKENIZER_FILE, None)

    return build_once(target, find, build, folder.wait_seconds)


def training_sample(corpus: Corpus, max_bytes: int) -> Iterator[str]:
    """Sample training text from all parts of a corpus, up to a number of bytes; never held-out text.

    Args:
        corpus: Corpus to sample from.
        max_bytes: Most bytes of text, as UTF-8.

    Yields:
        Documents, long ones in pieces. A corpus within the bound is yielded completely. Of a larger one, a hash of
        document name and piece number picks the pieces. The last piece may be cut.
    """
    picked_below = NAME_HASH_RANGE * max_bytes / max(1, corpus.size_bytes)
    left = max_bytes
    for document in corpus.documents():
        for number, piece in enumerate([] if document.held_out else cut(document.text, SAMPLE_CHARACTERS)):
            if zlib.crc32(f"{document.name}:{number}".encode("utf-8", "surrogateescape")) >= picked_below:
                continue
            text = piece.encode("utf-8")[:left]
            left -= len(text)
            yield text.decode("utf-8", "ignore")  # the cut may be inside a character
            if left <= 0:
                return
