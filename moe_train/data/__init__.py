"""Training data: documents, tokenizers, token sequences and their order.

Importing it needs neither torch nor datasets.
"""

from moe_train.data.domains import Domain, Split, open_domains
from moe_train.data.order import locate_samples, mixture_slots, permute
from moe_train.data.prepare import PreparedData, check_data, find_tokenizer, prepare_data
from moe_train.data.sequences import IGNORED_TARGET, HeldOut, TrainEntry, TrainingSequences, document_ids
from moe_train.data.tokenizers import ByteTokenizer, SubwordTokenizer, Tokenizer, load_tokenizer_file, token_dtype

__all__ = [
    "IGNORED_TARGET",
    "ByteTokenizer",
    "Domain",
    "HeldOut",
    "PreparedData",
    "Split",
    "SubwordTokenizer",
    "Tokenizer",
    "TrainEntry",
    "TrainingSequences",
    "check_data",
    "document_ids",
    "find_tokenizer",
    "load_tokenizer_file",
    "locate_samples",
    "mixture_slots",
    "open_domains",
    "permute",
    "prepare_data",
    "token_dtype",
]
