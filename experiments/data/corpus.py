"""The corpus of a run: cleaned, deduplicated and split documents."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from experiments.data.documentation import read_documentation
from experiments.data.text_files import OnBadInput, read_documents


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents to validate on, and where they are from.

    Attributes:
      train: Training documents in the order in which they were read.
      validation: Validation documents in the order of their hashes, so that a
        prefix of them is a sample of all.
      summary: JSON-able facts: ``source`` (what was read), ``documents``,
        ``train_documents``, ``validation_documents``, ``bytes`` (UTF-8, of both
        parts), ``duplicates_removed``, ``skipped`` (reason -> count) and
        ``fingerprint`` (SHA-256 of both parts, in hex).
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    summary: Mapping[str, Any]


def load_corpus(
    patterns: Sequence[str] = (),
    *,
    validation_patterns: Sequence[str] = (),
    on_bad_input: OnBadInput = "error",
    validation_fraction: float = 0.05,
) -> Corpus:
    r"""Load, clean, deduplicate and split a corpus.

    Without ``patterns`` the corpus is the English documentation that comes with
    the Python installation (see ``documentation.py``). Cleaning makes line ends
    ``\n`` and takes outer white space off. Documents that are empty then are counted
    in ``summary["skipped"]``, exact duplicates are removed, and a document that
    is in both parts stays in validation only.

    Args:
      patterns: Globs of text or JSON-lines files; see ``text_files.py`` for formats.
      validation_patterns: Globs of the validation files. Without them, the hash
        of each document decides whether it is one of the ``validation_fraction``,
        so that a document keeps its part when others are added or reordered.
        (If no hash falls below the fraction, the smallest one is taken.)
      on_bad_input: ``"error"`` raises at the first bad input, ``"skip"`` counts
        it in ``summary["skipped"]``.
      validation_fraction: Expected share of the documents, in (0, 1), that goes
        to validation where ``validation_patterns`` is empty.

    Returns:
      The corpus; neither part is empty.

    Raises:
      FileNotFoundError: A pattern matches no file.
      ValueError: An argument out of range; a bad input (not UTF-8, a JSON line
        without a text, a damaged archive) with ``on_bad_input="error"``; nothing
        left after cleaning; a single document, which cannot be split.
    """
    _check_arguments(patterns, validation_patterns, on_bad_input, validation_fraction)
    read = _read(patterns, on_bad_input)
    if validation_patterns:
        held_out = _read(validation_patterns, on_bad_input)
        train, validation = _without(read.texts, held_out.texts), held_out.texts
        read = _Read(
            texts=[*train, *validation],
            source=f"{read.source}; validation: {held_out.source}",
            duplicates=(
                read.duplicates + held_out.duplicates + len(read.texts) - len(train)
            ),
            skipped=read.skipped + held_out.skipped,
        )
        validation = sorted(validation, key=_digest)
    else:
        train, validation = _split(read.texts, validation_fraction)
    if not train or not validation:
        raise ValueError(
            f"The corpus is too small: {len(train)} training and {len(validation)} "
            f"validation documents are left of {read.source} (skipped: "
            f"{dict(read.skipped)}, duplicates removed: {read.duplicates}). Both "
            "parts need a document. Give more text, or separate files for "
            "validation; a text file is one document."
        )
    summary = _summarize(read, train, validation)
    return Corpus(tuple(train), tuple(validation), summary)


def load_held_out(
    patterns: Sequence[str], *, on_bad_input: OnBadInput = "error"
) -> tuple[list[str], Mapping[str, int]]:
    """Load and clean validation text that stands alone, as `load_corpus` does.

    Args:
      patterns: Globs of text or JSON-lines files.
      on_bad_input: ``"error"`` raises at the first bad input, ``"skip"`` counts it.

    Returns:
      The documents in the order of their hashes, and what was skipped by reason.

    Raises:
      FileNotFoundError: A pattern matches no file.
      ValueError: A bad input with ``on_bad_input="error"``; no document.
    """
    read = _read(patterns, on_bad_input)
    if not read.texts:
        raise ValueError(f"There is no text in {read.source}: give other files.")
    return sorted(read.texts, key=_digest), dict(sorted(read.skipped.items()))


def fingerprint_texts(texts: Iterable[str]) -> str:
    """Return a SHA-256 of the texts, their order and their borders, in hex."""
    fingerprint = hashlib.sha256()
    for text in texts:
        data = text.encode()
        fingerprint.update(len(data).to_bytes(8, "little"))
        fingerprint.update(data)
    return fingerprint.hexdigest()


def _check_arguments(
    patterns: Sequence[str],
    validation_patterns: Sequence[str],
    on_bad_input: str,
    validation_fraction: float,
) -> None:
    """Raise on arguments that no corpus can be loaded with."""
    for name, value in (
        ("patterns", patterns),
        ("validation_patterns", validation_patterns),
    ):
        # A string is a sequence of one-letter patterns.
        if isinstance(value, str):
            raise TypeError(f"{name} must be a sequence of globs, as in ({value!r},).")
    if on_bad_input not in get_args(OnBadInput):
        raise ValueError(f"on_bad_input={on_bad_input!r} is not 'error' or 'skip'.")
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} is not between 0 and 1."
        )


@dataclass(frozen=True)
class _Read:
    """Clean, distinct documents of one source, and what was left out."""

    texts: list[str]
    source: str
    duplicates: int
    skipped: Counter[str]


def _read(patterns: Sequence[str], on_bad_input: OnBadInput) -> _Read:
    """Read and clean the files of ``patterns``, the documentation without any."""
    if patterns:
        documents, skipped = read_documents(patterns, on_bad_input)
        source, duplicates = ", ".join(patterns), 0
    else:
        found = read_documentation()
        documents, skipped = found.documents, found.skipped.copy()
        source, duplicates = found.source, found.duplicates
    cleaned = [
        text.replace("\r\n", "\n").replace("\r", "\n").strip() for text in documents
    ]
    kept = [text for text in cleaned if text]
    if len(kept) < len(cleaned):
        skipped["empty document"] = len(cleaned) - len(kept)
    texts = list(dict.fromkeys(kept))
    return _Read(texts, source, duplicates + len(kept) - len(texts), skipped)


def _summarize(
    read: _Read, train: Sequence[str], validation: Sequence[str]
) -> dict[str, Any]:
    """Return the summary that ``Corpus`` describes."""
    return {
        "source": read.source,
        "documents": len(read.texts),
        "train_documents": len(train),
        "validation_documents": len(validation),
        "bytes": sum(len(text.encode()) for text in read.texts),
        "duplicates_removed": read.duplicates,
        "skipped": dict(sorted(read.skipped.items())),
        # No document is empty, so the border between the parts is unambiguous.
        "fingerprint": fingerprint_texts([*train, "", *validation]),
    }


def _without(texts: Sequence[str], excluded: Iterable[str]) -> list[str]:
    """Return the texts that are not among ``excluded``, in their order."""
    excluded = set(excluded)
    return [text for text in texts if text not in excluded]


def _split(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split documents into train and validation by their hashes alone."""
    if len(documents) < 2:
        return documents, []
    by_hash = sorted(documents, key=_digest)
    limit = int(fraction * 2**64).to_bytes(8, "big")
    count = sum(_digest(text)[:8] < limit for text in by_hash)
    # The hash order makes these picks, too, independent of the reading order.
    count = min(max(count, 1), len(by_hash) - 1)
    validation = by_hash[:count]
    return _without(documents, validation), validation


def _digest(text: str) -> bytes:
    """Return the SHA-256 of one document."""
    return hashlib.sha256(text.encode()).digest()
