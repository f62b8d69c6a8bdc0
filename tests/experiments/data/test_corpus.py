"""Tests of experiments.data.corpus and what it reads from."""

import gzip
import json
import random

import pytest
import zstandard

from experiments.data import documentation
from experiments.data.corpus import load_corpus

TEXTS = [f"Document {i} speaks of the number {i * i}." for i in range(200)]


def write_jsonl(path, texts, compress=lambda data: data):
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts)
    path.write_bytes(compress(lines.encode()))
    return str(path)


def everything(corpus):
    return {*corpus.train, *corpus.validation}


@pytest.fixture(scope="module")
def installed():
    return load_corpus()


def test_installed_documentation_is_megabytes_of_connected_text(installed):
    corpus, summary = installed, installed.summary
    assert summary["bytes"] > 3_000_000
    assert summary["bytes"] / summary["documents"] > 1_500
    assert summary["documents"] == len(everything(corpus))
    assert summary["train_documents"] == len(corpus.train)
    assert summary["validation_documents"] == len(corpus.validation)
    assert 0.03 < len(corpus.validation) / summary["documents"] < 0.07
    assert summary["duplicates_removed"] > 0
    for name in ("Python", "numpy", "scipy", "jax", "optax"):
        assert name in summary["source"]
    text = "\n".join(everything(corpus))
    assert (
        "Assert statements are a convenient way" in text
    )  # the language reference of pydoc_data
    assert "Scan a function over leading array axes" in text  # jax.lax.scan
    assert json.loads(json.dumps(dict(summary))) == dict(summary)


@pytest.fixture
def no_standard_library(tmp_path, monkeypatch):
    paths = {"stdlib": str(tmp_path / "absent")}
    monkeypatch.setattr(documentation.sysconfig, "get_paths", lambda: paths)


def test_installed_documentation_is_the_same_again(monkeypatch, no_standard_library):
    monkeypatch.setattr(documentation, "PACKAGES", ("optax", "grain"))
    first, second = load_corpus(), load_corpus()
    assert len(first.train) > 50
    assert first == second


def test_documentation_is_read_without_importing(
    tmp_path, monkeypatch, no_standard_library
):
    package = tmp_path / "loudpackage"
    (package / "tests").mkdir(parents=True)
    prose = "Sentences about shapes and axes follow one another. " * 10
    other = "The second function has words of its own, and enough of them. " * 10
    (package / "__init__.py").write_text(
        f'"""{prose}"""\nraise RuntimeError("imported")\n\n'
        f"class Box:\n    '''{other}'''\n\n"
        f"    def same(self):\n        '''{other}'''\n"
    )
    (package / "broken.py").write_text("def (:\n")
    (package / "short.py").write_text('"""A one-line module that says little more."""')
    (package / "escape.py").write_text(f'"""\\d {prose[::-1]}"""')
    (package / "tests" / "helper.py").write_text(f'"""Not to be read. {prose}"""')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(documentation, "PACKAGES", ("loudpackage", "notinstalled"))
    found = documentation.read_documentation()
    assert found.documents[0] == (
        f"loudpackage\n\n{prose.strip()}\n\nBox\n\n{other.strip()}"
    )
    assert len(found.documents) == 2
    assert found.duplicates == 1
    assert found.skipped == {"source file that does not parse": 1}


def test_docstrings_lose_indentation_and_interactive_examples():
    text = """Add two numbers.

        Examples follow.

        >>> add(1,
        ...     2)
        3

        Prose after it.



        The end \ud800.
    """
    assert documentation.clean_docstring(text) == (
        "Add two numbers.\n\nExamples follow.\n\nProse after it.\n\nThe end ?."
    )


@pytest.mark.parametrize(
    "name, compress",
    [
        ("a.jsonl", lambda data: data),
        ("a.json.gz", gzip.compress),
        # Concatenated members and frames are one file.
        ("a.jsonl.gz", lambda d: gzip.compress(d[:999]) + gzip.compress(d[999:])),
        ("a.jsonl.zst", zstandard.compress),
        (
            "a.json.zst",
            lambda d: zstandard.compress(d[:999]) + zstandard.compress(d[999:]),
        ),
    ],
)
def test_json_lines_give_a_document_a_line(tmp_path, name, compress):
    write_jsonl(tmp_path / name, TEXTS, compress)
    corpus = load_corpus([str(tmp_path / "a*")])
    assert everything(corpus) == set(TEXTS)
    assert corpus.summary["skipped"] == {}


def test_text_files_are_a_document_each(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne,\r\ntwo.\n\n")
    (tmp_path / "deep" / "b.txt.gz").write_bytes(gzip.compress(b"Three."))
    (tmp_path / "c.zst").write_bytes(zstandard.compress("Vier \u00fc.".encode()))
    corpus = load_corpus([str(tmp_path / "**" / "*"), str(tmp_path / "a.txt")])
    assert everything(corpus) == {"One,\ntwo.", "Three.", "Vier \u00fc."}
    assert corpus.summary["bytes"] == 9 + 6 + 8
    assert corpus.summary["duplicates_removed"] == 0  # each file once


def test_split_is_by_text_whatever_the_order(tmp_path):
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    first = load_corpus([write_jsonl(tmp_path / "a.jsonl", TEXTS)])
    second = load_corpus([write_jsonl(tmp_path / "b.jsonl", shuffled)])
    more = load_corpus(
        [str(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "c.jsonl", ["New one."])]
    )
    assert first.validation == second.validation
    assert set(first.train) == set(second.train)
    assert first.train == tuple(t for t in TEXTS if t not in first.validation)
    assert set(first.train) <= set(more.train)
    assert set(first.validation) <= set(more.validation)
    assert first.summary["fingerprint"] != second.summary["fingerprint"]
    half = load_corpus([str(tmp_path / "a.jsonl")], validation_fraction=0.5)
    assert 70 < len(half.validation) < 130


def test_two_documents_suffice_for_a_split(tmp_path):
    corpus = load_corpus([write_jsonl(tmp_path / "a.jsonl", ["One.", "Two."])])
    assert len(corpus.train) == len(corpus.validation) == 1


def test_duplicates_and_empty_documents_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, " ", TEXTS[3] + "\n", TEXTS[4]])
    corpus = load_corpus([path])
    assert everything(corpus) == set(TEXTS)
    assert corpus.summary["duplicates_removed"] == 2
    assert corpus.summary["skipped"] == {"empty document": 1}
    assert corpus.summary["documents"] == len(TEXTS)


def test_validation_files_are_taken_out_of_training(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", TEXTS)
    validation = write_jsonl(tmp_path / "valid.jsonl", [TEXTS[5], "Only here."])
    corpus = load_corpus([train], validation_patterns=[validation])
    assert set(corpus.validation) == {TEXTS[5], "Only here."}
    assert set(corpus.train) == set(TEXTS) - {TEXTS[5]}
    assert corpus.summary["duplicates_removed"] == 1
    assert corpus.summary["documents"] == len(TEXTS) + 1
    assert corpus.summary["bytes"] == sum(map(len, everything(corpus)))
    assert validation in corpus.summary["source"]


GOOD_LINE = b'{"text": "A good line."}\n'


@pytest.mark.parametrize(
    "name, content, reason, place",
    [
        ("a.txt", "caf\u00e9".encode("latin-1"), "not UTF-8", "a.txt"),
        ("a.jsonl", GOOD_LINE + b'{"text": "\xff"}\n', "not UTF-8", "a.jsonl:2"),
        ("a.jsonl", GOOD_LINE + b'\n{"text": "\\ud800"}\n', "not UTF-8", "a.jsonl:3"),
        ("a.jsonl", GOOD_LINE + b"text\n", "line that is not JSON", "a.jsonl:2"),
        ("a.jsonl", b'{"body": ""}\n', 'line without a string "text"', "a.jsonl:1"),
        ("a.jsonl", b'{"text": 3}\n', 'line without a string "text"', "a.jsonl:1"),
        ("a.jsonl", b'["text"]\n', 'line without a string "text"', "a.jsonl:1"),
        (
            "a.gz",
            gzip.compress(b"x" * 99, mtime=0)[:-9],
            "damaged or truncated archive",
            "a.gz",
        ),
        ("a.gz", b"no gzip", "damaged or truncated archive", "a.gz"),
        (
            "a.zst",
            zstandard.compress(b"x" * 99)[:-3],
            "damaged or truncated archive",
            "a.zst",
        ),
        ("a.zst", b"no zstd", "damaged or truncated archive", "a.zst"),
    ],
)
def test_bad_input_is_an_error_or_counted(tmp_path, name, content, reason, place):
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    bad = tmp_path / name
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        load_corpus([good, str(bad)])
    assert str(tmp_path / place) in str(error.value)
    corpus = load_corpus([good, str(bad)], on_bad_input="skip")
    assert corpus.summary["skipped"] == {reason: 1}
    extra = {"A good line."} if content.startswith(GOOD_LINE) else set()
    assert everything(corpus) == set(TEXTS) | extra


def test_no_match_is_an_error_with_either_choice(tmp_path):
    missing = str(tmp_path / "*.txt")
    for choice in ("error", "skip"):
        with pytest.raises(FileNotFoundError, match="matches no file"):
            load_corpus([missing], on_bad_input=choice)
    with pytest.raises(FileNotFoundError, match="matches a folder"):
        load_corpus([str(tmp_path)])


def test_too_little_text_is_an_error(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    one = tmp_path / "one.txt"
    one.write_text("One document.")
    with pytest.raises(ValueError, match="too small: 0 training and 0"):
        load_corpus([str(empty)])
    with pytest.raises(ValueError, match="too small: 1 training and 0"):
        load_corpus([str(empty), str(one)])
    with pytest.raises(ValueError, match="too small: 0 training and 1"):
        load_corpus([str(one)], validation_patterns=[str(one)])


def test_arguments_out_of_range_are_errors(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(TypeError, match="sequence of globs"):
        load_corpus(path)
    with pytest.raises(ValueError, match="on_bad_input='ignore'"):
        load_corpus([path], on_bad_input="ignore")
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match="validation_fraction"):
            load_corpus([path], validation_fraction=fraction)
