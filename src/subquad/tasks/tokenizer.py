"""Tokenizers made here and saved beside a model as ordinary ``PreTrainedTokenizerFast``: bytes, byte-level BPE."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .contract import check_integer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """UTF-8 bytes as tokens: token id == byte value, then ``<pad>`` 256, ``<bos>`` 257, ``<eos>`` 258.

    Lossless: ``decode(encode(text)) == text`` for every text, also one that spells ``<pad>`` (which then is five bytes;
    special tokens are only ever set by id). No special token is added on encoding. Pads on the left, for generation.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("é!")["input_ids"], tokenizer.decode([195, 169, 33])
        ([195, 169, 33], 'é!')
    """
    from tokenizers import Tokenizer, models

    vocabulary = {token: i for i, token in enumerate((*_byte_characters(), *SPECIAL_TOKENS))}
    return _as_fast(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), split_words=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level byte-pair tokenizer trained on ``texts``, of exactly ``vocab_size`` entries with the special tokens.

    Entries: ``<pad>``, ``<bos>``, ``<eos>``, 256 bytes, then merges; lossless like :func:`byte_tokenizer`.

    Raises:
        ValueError: ``vocab_size`` is below 259, or the texts have too few different pairs to fill it.
        TypeError: ``texts`` is one string.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of strings; got one string: wrap it in a list")
    check_integer("vocab_size", vocab_size, 256 + len(SPECIAL_TOKENS))
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the texts give a vocabulary of {tokenizer.get_vocab_size()}, not {vocab_size}: use more text"
        )
    return _as_fast(tokenizer, split_words=True)


def _as_fast(tokenizer: "Tokenizer", *, split_words: bool) -> "PreTrainedTokenizerFast":
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_characters() -> list[str]:
    """The printable character that the byte-level tokenizers write for each byte 0..255 (GPT-2's table).

    Printable Latin-1 characters stand for themselves, the other bytes in order for U+0100, U+0101, ...
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
