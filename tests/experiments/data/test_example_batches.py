"""Labelled examples reach a model once an epoch, padded to few lengths."""

import dataclasses

import numpy as np
import pytest

from experiments.data.batches import Share
from experiments.data.example_batches import (
    BUCKETS,
    Encoded,
    TrainingExamples,
    encode,
    evaluation_batches,
)
from experiments.data.glue import Examples
from experiments.data.text_files import TextError
from experiments.data.tokenizer import (
    check_tokens,
    copy_tokenizer_settings,
    load_model_tokenizer,
)
from tests.experiments import small_encoder

COUNT, BATCH = 45, 8


@pytest.fixture
def encoded():
    """Example n has the tokens n, n, ... and label n."""
    lengths = np.random.default_rng(0).integers(2, 70, COUNT)
    return Encoded(
        [np.full(length, n, np.int32) for n, length in enumerate(lengths)],
        [np.arange(length, dtype=np.int32) % 2 for length in lengths],
        np.arange(COUNT, dtype=np.int32),
        max_length=70,
    )


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_every_example_is_there_once_an_epoch_in_another_order(encoded):
    batches = TrainingExamples(encoded, BATCH, seed=0)
    assert batches.steps_an_epoch == 6
    orders = []
    for _ in range(2):
        epoch = take(batches, 6)
        seen = [batch["labels"][batch["weights"] > 0] for batch in epoch]
        orders.append(np.concatenate(seen))
        assert sorted(orders[-1]) == list(range(COUNT))
    assert list(orders[0]) != list(orders[1])
    other = TrainingExamples(encoded, BATCH, seed=1)
    assert list(next(other)["labels"]) != list(orders[0][:BATCH])


def test_batches_are_padded_to_the_longest_that_one_may_be_on_demand(encoded):
    padded = dataclasses.replace(encoded, pad_to_max_length=True)
    for make in (
        lambda examples: take(TrainingExamples(examples, BATCH, seed=0), 6),
        lambda examples: [one for _, one in evaluation_batches(examples, BATCH)],
    ):
        for batch, other in zip(make(padded), make(encoded), strict=True):
            width = other["tokens"].shape[1]
            assert batch["tokens"].shape == batch["types"].shape == (BATCH, 70)
            for name in ("tokens", "types"):
                assert not batch[name][:, width:].any()
                batch[name] = batch[name][:, :width]
            assert_equal([batch], [other])


def test_two_shares_of_an_evaluation_are_the_whole_of_it(encoded):
    whole = evaluation_batches(encoded, BATCH)
    shares = [evaluation_batches(encoded, BATCH, Share(index, 2)) for index in (0, 1)]
    for (rows, batch), *parts in zip(whole, *shares, strict=True):
        for numbers, _ in parts:
            np.testing.assert_array_equal(numbers, rows)
        halves = [part for _, part in parts]
        for name, value in batch.items():
            np.testing.assert_array_equal(
                np.concatenate([half[name] for half in halves]), value
            )


def test_a_batch_holds_its_examples_padded_to_a_bucket(encoded):
    for batch in take(TrainingExamples(encoded, BATCH, seed=0), 12):
        assert batch["tokens"].shape[1] in (*BUCKETS, 70)
        for row in range(BATCH):
            n, length = batch["labels"][row], batch["lengths"][row]
            if not batch["weights"][row]:
                assert length == 1
                continue
            assert length == len(encoded.tokens[n])
            assert (batch["tokens"][row, :length] == n).all()
            assert not batch["tokens"][row, length:].any()
            np.testing.assert_array_equal(
                batch["types"][row, :length], encoded.types[n]
            )
    epoch = take(TrainingExamples(encoded, BATCH, seed=0), 6)
    widths = {batch["tokens"].shape[1] for batch in epoch}
    assert len(widths) > 2  # a batch's examples are alike in length
    assert max(widths) == 70  # no bucket is above what the model has positions for


def test_a_position_is_gone_back_to_and_shares_make_the_whole(encoded):
    straight = TrainingExamples(encoded, BATCH, seed=0)
    whole = take(straight, 10)
    again = TrainingExamples(encoded, BATCH, seed=0)
    again.set_state([{"batches": 7}])
    assert_equal(take(again, 3), whole[7:])
    assert again.get_state() == {"batches": 10}
    shares = [TrainingExamples(encoded, BATCH, 0, Share(n, 2)) for n in range(2)]
    parts = [take(one, 10) for one in shares]
    joined = [
        {name: np.concatenate([a[name], b[name]]) for name in a}
        for a, b in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)
    noise = np.concatenate([batch["noise"] for batch in whole])
    assert len(set(noise)) == len(noise)
    with pytest.raises(ValueError, match="not one of labelled examples"):
        again.set_state([{"batches": 1}, {"batches": 2}])


def test_evaluation_sees_every_example_once(encoded):
    found = list(evaluation_batches(encoded, BATCH))
    rows = np.concatenate([rows for rows, _ in found])
    assert sorted(rows) == list(range(COUNT))
    for rows, batch in found:
        np.testing.assert_array_equal(batch["labels"][: len(rows)], rows)
        assert batch["weights"].sum() == len(rows)
        assert len(batch["tokens"]) == BATCH


def test_texts_are_tokenized_as_the_model_s_tokenizer_says(tmp_path):
    folder = small_encoder.write_encoder(tmp_path, "bert")
    tokenizer = load_model_tokenizer(folder)
    pairs = Examples([("the cat sat", "a dog ran on the mat")], np.array([1]))
    one = encode(tokenizer, pairs, max_length=8, token_types=2)
    cls, sep = 1, 2
    words = {word: n for n, word in enumerate(small_encoder.WORDS, start=4)}
    kept = ["the", "cat"], ["a", "dog", "ran"]  # the longer one is cut first
    first, second = ([words[word] for word in text] for text in kept)
    np.testing.assert_array_equal(one.tokens[0], [cls, *first, sep, *second, sep])
    np.testing.assert_array_equal(one.types[0], [0] * 4 + [1] * 4)
    np.testing.assert_array_equal(
        encode(tokenizer, pairs, max_length=8, token_types=1).types[0], 0
    )
    other = encode(
        tokenizer, Examples(pairs.texts, np.array([0])), max_length=8, token_types=2
    )
    assert other.fingerprint != one.fingerprint
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TextError, match=r"tokenizer\.json is no tokenizer"):
        load_model_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TextError, match=r"has no tokenizer\.json"):
        load_model_tokenizer(folder)


def test_tokens_that_the_model_does_not_know_are_refused():
    tokens = [np.array(some, np.int32) for some in ([3, 9], [], [7])]
    check_tokens(tokens, 10, "here")
    check_tokens([], 10, "here")
    with pytest.raises(TextError, match=r"here: .*json. makes token 9, .* has 9 tok"):
        check_tokens(tokens, 9, "here")


def test_settings_of_a_tokenizer_are_copied_where_there_are_any(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    copy_tokenizer_settings(there, here)
    assert not list(here.iterdir())
    for name in ("tokenizer_config.json", "special_tokens_map.json", "other.json"):
        (there / name).write_text(name)
    copy_tokenizer_settings(there, here)
    found = {path.name: path.read_text() for path in here.iterdir()}
    assert found == {
        name: name for name in ("tokenizer_config.json", "special_tokens_map.json")
    }
