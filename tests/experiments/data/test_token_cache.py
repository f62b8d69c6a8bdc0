"""Tests of experiments.data.token_cache."""

import threading

import numpy as np
import pytest

from experiments.data.text_files import TextError
from experiments.data.token_cache import TokenCache
from experiments.data.tokens import Tokens, tokenize
from tests.experiments.data.shard_cases import Numbers, numbered


@pytest.fixture
def tokens():
    return tokenize(numbered([5, 3, 9, 30]), Numbers())


def never(line):
    raise AssertionError(line)


def only_file(folder):
    (path,) = (path for path in folder.rglob("*") if path.is_file())
    return path


def assert_equal(kept, tokens):
    for name in ("ids", "document_ends", "document_bytes"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(tokens, name))
        assert getattr(kept, name).dtype == getattr(tokens, name).dtype


def test_what_is_kept_comes_back_memory_mapped(tmp_path, tokens):
    cache = TokenCache(tmp_path / "new", never)
    assert cache.load("a") is None
    cache.save("a", tokens)
    kept = cache.load("a")
    assert_equal(kept, tokens)
    base = kept.ids
    while not isinstance(base, np.memmap):
        base = base.base
    assert not base.flags.writeable
    assert cache.load("b") is None
    assert len(list(tmp_path.rglob("*.part"))) == 0


def test_no_document_at_all_can_be_kept(tmp_path, tokens):
    cache = TokenCache(tmp_path, never)
    nothing = Tokens(
        tokens.ids[:1], tokens.document_ends[:0], tokens.document_bytes[:0]
    )
    cache.save("a", nothing)
    assert_equal(cache.load("a"), nothing)


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "foreign", "empty"])
def test_damaged_and_foreign_files_are_reported_and_replaced(tmp_path, tokens, damage):
    lines = []
    cache = TokenCache(tmp_path, lines.append)
    cache.save("a", tokens)
    path = only_file(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-1]
    elif damage == "longer":
        data += b"x"
    elif damage == "flipped":
        data[-3] ^= 1
    elif damage == "foreign":
        cache.save("b", tokens)
        (other,) = {p for p in tmp_path.rglob("*.tokens")} - {path}
        data = other.read_bytes()
        other.unlink()
    else:
        data = b""
    path.write_bytes(data)
    assert cache.load("a") is None
    (line,) = lines
    assert line.startswith(f"{path} is no good (")
    cache.save("a", tokens)
    assert_equal(cache.load("a"), tokens)


def test_writers_of_the_same_file_do_not_clash(tmp_path, tokens):
    cache = TokenCache(tmp_path, never)
    failures = []

    def work():
        try:
            for _ in range(50):
                cache.save("a", tokens)
                assert_equal(cache.load("a"), tokens)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    only_file(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path, tokens):
    (tmp_path / "file").write_bytes(b"")
    cache = TokenCache(tmp_path / "file", never)
    with pytest.raises(TextError, match=r"file cannot keep tokens .*--token-cache"):
        cache.save("a", tokens)
