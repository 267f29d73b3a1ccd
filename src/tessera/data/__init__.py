"""Text to batches: corpus -> tokenizer -> token shards -> sequences that a position alone determines.

Read in this order: `prepare` (what is done once and kept), `corpus` (documents), `split`, `fill_in_middle`,
`tokenizer`, `shards`, `batches` (the endless stream). `bigram` is the baseline that a model must beat. Whatever is
random is a hash of the recipe's seed and of what it is about (`draws`), so nothing depends on workers or ranks.
"""

from tessera.data.batches import Batch, Batches
from tessera.data.bigram import WittenBellBigram
from tessera.data.prepare import Dataset, prepare
from tessera.data.shards import TokenDocuments
from tessera.data.tokenizer import Tokenizer

__all__ = ["Batch", "Batches", "Dataset", "TokenDocuments", "Tokenizer", "WittenBellBigram", "prepare"]
