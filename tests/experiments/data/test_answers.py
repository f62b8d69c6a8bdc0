"""Of a prompt and its answer the answer alone is learnt."""

import numpy as np

from experiments.data.answers import Answered, encode_answers
from tests.experiments.tinyagent.small_planner import byte_tokenizer

TEXTS = [("ask", "yes"), ("a longer one", "no"), ("x" * 40, "too long")]


def encoded(max_length=32):
    return encode_answers(byte_tokenizer(), TEXTS, end=1, max_length=max_length)


def test_prompts_begin_and_answers_end_as_the_model_s_texts_do():
    found, long = encoded()
    assert long == [2] and len(found.prompts) == 2
    decode = byte_tokenizer().decode
    for (prompt, answer), asked, said in zip(
        TEXTS, found.prompts, found.answers, strict=False
    ):
        assert decode(asked, skip_special_tokens=False) == f"<s>{prompt}"
        assert decode(said, skip_special_tokens=False) == f"{answer}</s>"
    # Read are all tokens but the last one.
    assert found.lengths.tolist() == [1 + 3 + 3, 1 + 12 + 2]
    assert encoded(max_length=49)[1] == []
    assert encoded(max_length=48)[1] == [2]


def test_weights_are_where_the_next_token_is_the_answer_s():
    found, _ = encoded()
    batch = found.collate(np.array([0, 1]), 3)
    assert batch["tokens"].shape == (3, 17) and batch["weights"].shape == (3, 16)
    for row in (0, 1):
        at = np.flatnonzero(batch["weights"][row])
        np.testing.assert_array_equal(batch["tokens"][row, at + 1], found.answers[row])
        np.testing.assert_array_equal(
            batch["tokens"][row, : at[0] + 1], found.prompts[row]
        )
    assert not batch["weights"][2].any() and not batch["tokens"][2].any()
    assert set(np.unique(batch["weights"])) == {0, 1}


def test_batches_are_padded_to_the_longest_that_one_may_be_on_demand():
    found, _ = encode_answers(
        byte_tokenizer(), TEXTS, end=1, max_length=40, pad_to_max_length=True
    )
    batch, short = (one.collate(np.arange(2), 3) for one in (found, encoded()[0]))
    assert batch["tokens"].shape == (3, 41) and short["tokens"].shape == (3, 17)
    for name, array in short.items():
        width = array.shape[1]
        np.testing.assert_array_equal(batch[name][:, :width], array)
        assert not batch[name][:, width:].any()


def test_a_fingerprint_is_of_all_of_it():
    found, _ = encoded()
    assert encoded()[0].fingerprint == found.fingerprint
    changed = [found.answers[0], found.answers[1] + 1]
    assert Answered(found.prompts, changed, 32).fingerprint != found.fingerprint
    whole = np.arange(5, dtype=np.int32)
    one, other = (
        Answered([whole[:cut]], [whole[cut:]], 32).fingerprint for cut in (2, 3)
    )
    assert one != other
