"""The demo model's text: stories, their tokenizer, and the windows of each training step."""

import lzma
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"


def read(path: Path) -> list[str]:
    """The stories of a corpus file."""
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    return [story.strip() for story in text.split("\n\n") if story.strip()]


def train_tokenizer(stories: list[str], path: Path, vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE whose id 0 ends a story; kept in `path`."""
    if not path.exists():
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(stories, trainer)
        tokenizer.save(str(path))
    return tokenizers.Tokenizer.from_file(str(path))


def encode(tokenizer: tokenizers.Tokenizer, stories: list[str]) -> np.ndarray:
    """All stories as one row of ids, each after an end-of-text id."""
    return np.concatenate([[0, *encoding.ids] for encoding in tokenizer.encode_batch(stories)]).astype(np.int32)


def batches(ids: np.ndarray, step: int, count: int, length: int) -> np.ndarray:
    """The ids [count, length + 1] of a step: windows in an order and at an offset that differ from epoch to epoch."""
    per_epoch = (len(ids) - 2 * length) // (length * count)
    epoch, index = divmod(step, per_epoch)
    random = np.random.default_rng(epoch)
    offset, order = random.integers(length), random.permutation(per_epoch * count)
    starts = offset + length * order[index * count : (index + 1) * count]
    return ids[starts[:, None] + np.arange(length + 1)]
