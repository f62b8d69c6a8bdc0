"""Tests of experiments.data.pipeline."""

import threading

import numpy as np
import pytest

from experiments.data.batches import Share
from experiments.data.pipeline import train_batches, validation_batches
from experiments.data.tokens import Tokens, tokenize


class Letters:
    """A tokenizer of one token a character."""

    eos_id = 1
    fingerprint = "letters"

    def __init__(self, vocab_size=256):
        self.vocab_size = vocab_size

    def encode_batch(self, texts):
        return [[ord(letter) for letter in text] for text in texts]

    def decode(self, ids):
        return "".join(map(chr, ids))


def counting(targets):
    """Tokens 0, 1, 2 ...: each names its own position."""
    return Tokens(
        ids=np.arange(targets + 1, dtype=np.uint16),
        document_ends=np.array([targets]),
        document_bytes=np.array([3 * targets]),
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["weights"], b["weights"])


def test_documents_are_joined_by_the_end_of_document():
    tokens = tokenize(["ab", "\u00fc"], Letters())
    assert tokens.ids.tolist() == [1, 97, 98, 1, 252, 1]
    assert tokens.document_ends.tolist() == [3, 5]
    assert tokens.document_bytes.sum() == 4
    many = tokenize([f"text {i}" for i in range(1000)], Letters())
    assert Letters().decode(many.ids) == "\1" + "".join(
        f"text {i}\1" for i in range(1000)
    )


@pytest.mark.parametrize(
    "vocab_size, dtype",
    [
        (256, np.uint8),
        (257, np.uint16),
        (65_536, np.uint16),
        (65_537, np.uint32),
    ],
)
def test_tokens_take_the_smallest_type(vocab_size, dtype):
    assert tokenize(["ab"], Letters(vocab_size)).ids.dtype == dtype


def test_bytes_per_token_follow_the_targets_used():
    tokens = tokenize(["abc", "\u00fc\u00fc\u00fc"], Letters())

    def bytes_per_token(max_tokens=None):
        return validation_batches(
            tokens, batch_size=1, sequence_length=3, max_tokens=max_tokens
        )[1]

    assert bytes_per_token() == 9 / 8
    assert bytes_per_token(100) == 9 / 8
    assert bytes_per_token(4) == 3 / 4
    assert bytes_per_token(6) == (3 + 6 / 2) / 6


def test_training_batches_have_the_promised_form():
    batch = next(train_batches(counting(100), batch_size=3, sequence_length=10, seed=0))
    assert batch.keys() == {"tokens", "weights"}
    assert batch["tokens"].shape == (3, 11)
    assert batch["tokens"].dtype == np.int32
    assert batch["weights"].shape == (3, 10)
    assert batch["weights"].dtype == np.float32
    assert (batch["weights"] == 1).all()
    for row in batch["tokens"]:
        assert row[0] % 10 == 0
        np.testing.assert_array_equal(row, row[0] + np.arange(11))


def test_every_epoch_visits_every_sequence_once_in_its_own_order():
    # 25 sequences and a rest of 4 targets; 5 batches of 5 are an epoch.
    batches = train_batches(counting(254), batch_size=5, sequence_length=10, seed=0)
    epochs = [
        np.concatenate([batch["tokens"][:, 0] for batch in take(batches, 5)]) // 10
        for _ in range(4)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(25))
    orders = {tuple(epoch) for epoch in epochs} | {tuple(range(25))}
    assert len(orders) == 5


def test_batches_may_span_epochs():
    batches = train_batches(counting(50), batch_size=3, sequence_length=10, seed=0)
    starts = np.concatenate([b["tokens"][:, 0] for b in take(batches, 5)]) // 10
    for epoch in starts.reshape(3, 5):
        assert sorted(epoch) == list(range(5))


def test_the_seed_decides_the_order():
    def starts(seed):
        batches = train_batches(
            counting(2000), batch_size=50, sequence_length=10, seed=seed
        )
        return np.concatenate([b["tokens"][:, 0] for b in take(batches, 12)])

    np.testing.assert_array_equal(starts(0), starts(0))
    first, second = starts(0).reshape(3, 200), starts(1).reshape(3, 200)
    # No epoch of one seed is an epoch of the next seed.
    for one in first:
        for other in second:
            assert (one != other).any()


def test_state_continues_bit_for_bit_in_another_iterator():
    def build():
        return train_batches(counting(254), batch_size=4, sequence_length=10, seed=3)

    batches = build()
    take(batches, 9)
    state = batches.get_state()
    expected = take(batches, 20)
    assert_same(take(build(), 29)[9:], expected)
    other = build()
    take(other, 2)
    other.set_state([state])
    assert_same(take(other, 20), expected)


def test_processes_split_batches_and_need_no_rows_of_others():
    def build(share):
        return train_batches(
            counting(254), batch_size=6, sequence_length=10, seed=3, share=share
        )

    whole = take(build(Share()), 8)
    parts = [build(Share(index, 3)) for index in range(3)]
    for batch in whole:
        rows = [next(part)["tokens"] for part in parts]
        assert {len(r) for r in rows} == {2}
        np.testing.assert_array_equal(np.concatenate(rows), batch["tokens"])
    again = build(Share(1, 2))
    again.set_state([part.get_state() for part in parts])
    expected = take(build(Share(1, 2)), 10)[8:]
    assert_same(take(again, 2), expected)


def test_states_that_differ_or_are_of_another_kind_are_errors():
    batches = train_batches(counting(254), batch_size=4, sequence_length=10, seed=3)
    for states in ([{"batches": 1}, {"batches": 2}], [{"streams": {}}], []):
        with pytest.raises(ValueError, match="not one of text in memory"):
            batches.set_state(states)


def test_batches_come_without_threads():
    before = threading.active_count()
    batches = train_batches(counting(254), batch_size=4, sequence_length=10, seed=0)
    take(batches, 3)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "targets, batch_size, length, max_tokens, used",
    [
        (100, 2, 10, None, 100),
        (100, 2, 10, 1000, 100),
        (101, 2, 10, None, 101),
        (119, 4, 10, None, 119),
        (100, 3, 10, 47, 47),
        (7, 2, 10, None, 7),
        (1, 1, 1, 1, 1),
    ],
)
def test_validation_counts_every_target_once(
    targets, batch_size, length, max_tokens, used
):
    batches, _ = validation_batches(
        counting(targets),
        batch_size=batch_size,
        sequence_length=length,
        max_tokens=max_tokens,
    )
    counted = []
    for batch in batches:
        assert batch["tokens"].shape == (batch_size, length + 1)
        assert batch["tokens"].dtype == np.int32
        assert batch["weights"].shape == (batch_size, length)
        assert batch["weights"].dtype == np.float32
        assert set(np.unique(batch["weights"])) <= {0, 1}
        assert batch["weights"].any()
        on = batch["weights"] == 1
        inputs, outputs = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        np.testing.assert_array_equal(inputs[on] + 1, outputs[on])
        counted += outputs[on].tolist()
    assert counted == list(range(1, used + 1))
    again, _ = validation_batches(
        counting(targets),
        batch_size=batch_size,
        sequence_length=length,
        max_tokens=max_tokens,
    )
    assert_same(batches, again)


def test_too_few_tokens_and_bad_sizes_are_errors():
    with pytest.raises(ValueError, match="texts is empty"):
        tokenize([], Letters())
    with pytest.raises(ValueError, match="30 tokens make 2 sequences of 10"):
        train_batches(counting(29), batch_size=3, sequence_length=10, seed=0)
    nothing = tokenize(["a"], Letters())
    nothing = Tokens(nothing.ids[:1], nothing.document_ends[:0], nothing.ids[:0])
    with pytest.raises(ValueError, match="no tokens"):
        validation_batches(nothing, batch_size=1, sequence_length=1)
    with pytest.raises(ValueError, match="max_tokens=0"):
        validation_batches(counting(9), batch_size=1, sequence_length=1, max_tokens=0)
    for sizes in ((0, 1), (1, 0)):
        arguments = dict(zip(("batch_size", "sequence_length"), sizes, strict=True))
        with pytest.raises(ValueError, match="at least 1"):
            train_batches(counting(9), seed=0, **arguments)
        with pytest.raises(ValueError, match="at least 1"):
            validation_batches(counting(9), **arguments)
    with pytest.raises(ValueError, match="seed=-1"):
        train_batches(counting(9), batch_size=1, sequence_length=1, seed=-1)
