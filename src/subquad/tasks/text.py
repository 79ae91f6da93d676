"""Texts as bytes or tokens, split so that nothing of a held-out document is seen in training, and the texts every
Python has.

Windows of :class:`TextData` feed language modelling; :meth:`TextData.bigram_bits` is the bar that a model must beat.
"""

import functools
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .contract import SPLITS, Batch, Draw, check_choice, check_integer

HELD_OUT = 0.05
"""Share of the bytes that each of valid and test should hold."""


@dataclass(frozen=True, eq=False)
class TextData:
    """Three token arrays: uint8 bytes with a NUL between documents, or int32 tokens of a tokenizer.

    Attributes:
        train, valid, test: 1-D and read-only.
        vocab_size: tokens are 0..vocab_size-1; 256 for bytes.
        source: where the text comes from, for reports.
        split_by: "document" if no document stands in two splits; "position" if there were too few documents for that
            and the joined text was cut at 90% and 95% of its length; "given" if the source came with splits.
        num_bytes: bytes of text per split; loss in nats times tokens / (num_bytes ln 2) is bits per byte.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocab_size: int
    source: str
    split_by: str
    num_bytes: dict[str, int]

    @classmethod
    def from_documents(cls, documents: Sequence[bytes], source: str) -> "TextData":
        """Split UTF-8 documents (without NUL) about 90/5/5 and join those of a split with a NUL byte.

        Whole documents go to test, then to valid, until each holds 5% of the bytes, in the order of their SHA-256:
        the split depends on nothing but the texts, and equal documents stay in one split. Documents larger than 5%
        always train. Where that leaves a held-out split under 2% or over 12% of the bytes (a single file, say) the
        joined text is cut by position instead, at the next line end or, without one nearby, the next character;
        ``split_by`` says so.

        Raises:
            ValueError: there is no text, or too little to give every split two bytes.
        """
        documents = [document for document in documents if document]
        total = sum(map(len, documents))
        if not total:
            raise ValueError(f"{source} holds no text: 0 bytes")
        assigned = _assign(documents, total)
        if assigned is not None:
            parts = {split: b"\0".join(documents[i] for i in chosen) for split, chosen in assigned.items()}
            split_by = "document"
        else:
            joined = b"\0".join(documents)
            first = _next_cut(joined, round(len(joined) * (1 - 2 * HELD_OUT)))
            second = _next_cut(joined, max(first, round(len(joined) * (1 - HELD_OUT))))
            parts = {"train": joined[:first], "valid": joined[first:second], "test": joined[second:]}
            split_by = "position"
        return cls.from_splits(parts, source, split_by)

    @classmethod
    def from_splits(cls, parts: dict[str, bytes], source: str, split_by: str = "given") -> "TextData":
        """The bytes of each of "train", "valid" and "test" as they are."""
        for split in SPLITS:
            if len(parts[split]) < 2:
                sizes = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
                raise ValueError(f"{source} holds too little text: every split needs 2 bytes; they have {sizes}")
        arrays = {split: np.frombuffer(parts[split], dtype=np.uint8) for split in SPLITS}
        num_bytes = {split: len(parts[split]) for split in SPLITS}
        return cls(**arrays, vocab_size=256, source=source, split_by=split_by, num_bytes=num_bytes)

    def tokens(self, split: str) -> np.ndarray:
        """The array of a split."""
        check_choice("split", split, tuple(SPLITS))
        return {"train": self.train, "valid": self.valid, "test": self.test}[split]

    def documents(self, split: str) -> list[str]:
        """The documents of a split as text; the texts that train a tokenizer. Bytes only."""
        self._need_bytes("documents")
        return self.tokens(split).tobytes().decode().split("\0")

    def tokenized(self, tokenizer: Any) -> "TextData":
        """The same splits in the tokens of a ``transformers`` tokenizer, its end token (if any) after each document."""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        arrays = {}
        for split in SPLITS:
            encoded = tokenizer(self.documents(split), add_special_tokens=False, verbose=False)["input_ids"]
            arrays[split] = np.array([token for ids in encoded for token in (*ids, *end)], dtype=np.int32)
            arrays[split].flags.writeable = False
        return TextData(
            **arrays,
            vocab_size=len(tokenizer),
            source=self.source,
            split_by=self.split_by,
            num_bytes=self.num_bytes,
        )

    def windows(self, split: str, length: int, batch_size: int, *, seed: int, index: int) -> Batch:
        """Batch ``index`` of windows that start anywhere in the split: a pure function of the text and the arguments.

        Returns:
            ``Batch(inputs, labels)``, ``(batch_size, length)`` int64; ``labels[b, t]`` is the token after
            ``inputs[b, t]``: the shift is already made.
        """
        check_integer("batch_size", batch_size, 1)
        tokens = self._long_enough(split, length)
        starts = Draw("text", seed=seed, split=split, index=index).integers(0, len(tokens) - length, batch_size)
        return _windows(tokens, starts, length)

    def eval_windows(
        self, split: str, length: int, limit: int | None = None, *, batch_size: int = 16
    ) -> Iterator[Batch]:
        """The split in order, in windows whose labels do not overlap; a tail shorter than a window is left out.

        Args:
            limit: at most this many windows, taken at even distances over the whole split; all of them if None.
            batch_size: windows per batch; the last batch may hold fewer.
        """
        tokens = self._long_enough(split, length)
        check_integer("batch_size", batch_size, 1)
        count = (len(tokens) - 1) // length
        chosen = np.arange(count)
        if limit is not None and check_integer("limit", limit, 1) < count:
            chosen = np.arange(limit) * count // limit
        pieces = (chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size))
        return (_windows(tokens, piece * length, length) for piece in pieces)

    def bigram_bits(self, split: str = "test") -> float:
        """Bits per byte of ``split`` under a table of byte pairs counted in train, one added to each count.

        p(b | a) = (count(a, b) + 1) / (count(a) + 256). What a model must beat to have learnt more than pairs.
        """
        self._need_bytes("bigram_bits")
        pairs = self.train[:-1].astype(np.int64) * 256 + self.train[1:]
        counts = 1.0 + np.bincount(pairs, minlength=256 * 256).reshape(256, 256)
        bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
        held_out = self.tokens(split)
        return float(bits[held_out[:-1], held_out[1:]].mean())

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(self.tokens(split)):,}" for split in SPLITS)
        return f"TextData({self.source}: {sizes} tokens of {self.vocab_size}, split by {self.split_by})"

    def _need_bytes(self, method: str) -> None:
        if self.train.dtype != np.uint8:
            raise ValueError(f"{method} needs text as bytes; this text is tokenized (vocabulary {self.vocab_size})")

    def _long_enough(self, split: str, length: int) -> np.ndarray:
        tokens = self.tokens(split)
        if len(tokens) < check_integer("length", length, 1) + 1:
            raise ValueError(
                f"a window of {length} needs {length + 1} tokens; {split} of {self.source} has {len(tokens)}: "
                "use shorter windows or more text"
            )
        return tokens


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    window = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())


def _assign(documents: Sequence[bytes], total: int) -> dict[str, list[int]] | None:
    """Indices of the documents of each split in their given order, or None if whole documents cannot make the split."""
    groups: dict[bytes, list[int]] = {}
    for i, document in enumerate(documents):
        groups.setdefault(hashlib.sha256(document).digest(), []).append(i)
    sizes = dict.fromkeys(SPLITS, 0)
    assigned: dict[str, list[int]] = {split: [] for split in SPLITS}
    for digest in sorted(groups):
        size = sum(len(documents[i]) for i in groups[digest])
        open_splits = [split for split in ("test", "valid") if sizes[split] < HELD_OUT * total]
        split = open_splits[0] if open_splits and size <= HELD_OUT * total else "train"
        sizes[split] += size
        assigned[split] += groups[digest]
    if not all(0.02 * total <= sizes[split] <= 0.12 * total for split in ("valid", "test")):
        return None
    return {split: sorted(chosen) for split, chosen in assigned.items()}


def _next_cut(text: bytes, place: int) -> int:
    """The first line start within the next 1% of the text (200 bytes at most), else the first character start."""
    line_end = text.find(b"\n", max(place - 1, 0), place + min(200, len(text) // 100))
    if line_end >= 0:
        return line_end + 1
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place += 1
    return place


@functools.cache
def source_text(size: str = "tiny") -> TextData:
    """The Python standard library's own sources (top-level ``*.py``), without the comments that head a file.

    "standard" is all of them (168 files, 4.7 MB in Python 3.11), "tiny" every eighth. They differ between Python
    versions: compare methods on one machine, and state no absolute figure.

    Example:
        >>> source_text("tiny").windows("train", 128, 4, seed=0, index=0).inputs.shape
        torch.Size([4, 128])
    """
    check_choice("size", size, ("tiny", "standard"))
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if not files:
        raise ValueError(f"this Python has no sources of its standard library in {folder}; use text_files(...) instead")
    chosen = files if size == "standard" else files[::8]
    documents = [_without_heading(file.read_text(encoding="utf-8")).encode() for file in chosen]
    return TextData.from_documents(documents, f"source_text({size}, Python {sysconfig.get_python_version()})")


def _without_heading(source: str) -> str:
    """A Python file from its first line that is neither comment nor blank (copyright headings repeat)."""
    lines = source.splitlines(keepends=True)
    for i, line in enumerate(lines):
        if line.strip() and not line.startswith("#"):
            return "".join(lines[i:])
    return ""


@functools.cache
def prose_text() -> TextData:
    """Plain English: the help topics of Python's language reference (``pydoc_data``), each paragraph once.

    The topics quote one another at length (split as they are, 40% of the test text stands in train too), so a paragraph
    is kept in the longest topic that has it, and topics of which less than 200 characters remain are left out: some
    370,000 of 465,000 characters.
    """
    if importlib.util.find_spec("pydoc_data") is None:
        raise ValueError("this Python was built without pydoc_data; use text_files(...) instead")
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        paragraphs = {" ".join(paragraph.split()): paragraph for paragraph in topics[topic].split("\n\n")}
        documents.append("\n\n".join(text for key, text in paragraphs.items() if key not in seen))
        seen.update(paragraphs)
    long_enough = [document.encode() for document in documents if len(document) >= 200]
    return TextData.from_documents(long_enough, f"prose_text(Python {sysconfig.get_python_version()})")
