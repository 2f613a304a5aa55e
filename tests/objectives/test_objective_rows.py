"""Changed batches: the same rows in the same order, whoever loads which of them, and at every step others."""

import numpy as np
import pytest

from jaxlm.data.loader import Loader
from jaxlm.objectives import rows as objectives
from jaxlm.objectives.config import FillInTheMiddleConfig, MaskedWordsConfig, ObjectiveConfig
from jaxlm.tokenizer import tokenizer as tokenizers

NAMES = ("prefix_token", "suffix_token", "middle_token")
RESERVED = {name: f"<|reserved_{number}|>" for number, name in enumerate(NAMES)}
MASKED = ObjectiveConfig(masked_words=MaskedWordsConfig(mask_token="<|reserved_0|>"))
MIDDLE = ObjectiveConfig(fill_in_the_middle=FillInTheMiddleConfig(**RESERVED))
both = pytest.mark.parametrize("objective", [MASKED, MIDDLE], ids=["masked words", "fill in the middle"])


@pytest.fixture
def tokenizer(packed_rows):
    return tokenizers.load(f"{packed_rows}/tokenizer")


def loader(packed_rows, change, own=None):
    return Loader([(packed_rows, 1.0)], "train", global_batch=8, seed=3, own=own, change=change)


@both
def test_any_host_makes_the_same_rows(packed_rows, tokenizer, objective):
    change = objectives.change_of(objective, tokenizer, seed=3)
    whole = loader(packed_rows, change).batch(5)
    parts = [loader(packed_rows, change, own).batch(5) for own in ([0, 1, 2], [3, 4, 5, 6, 7])]
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)
    again = next(loader(packed_rows, objectives.change_of(objective, tokenizer, seed=3)).batches(5))[1]
    assert all(np.array_equal(again[name], value) for name, value in whole.items())


@both
def test_another_step_row_or_seed_draws_anew(packed_rows, tokenizer, objective):
    plain = loader(packed_rows, None).batch(5)
    made = lambda seed, step, numbers: objectives.change_of(objective, tokenizer, seed)(plain, step, numbers)["ids"]
    first = made(3, 5, range(8))
    for other in (made(4, 5, range(8)), made(3, 6, range(8)), made(3, 5, range(8, 16))):
        assert not np.array_equal(first, other)
    # A row's draws are its own: the same company or another, it comes out alike.
    np.testing.assert_array_equal(made(3, 5, [0, 9, 10, 11, 12, 13, 14, 7])[[0, 7]], first[[0, 7]])


def test_masked_rows_carry_what_is_missing(packed_rows, tokenizer):
    plain = loader(packed_rows, None).batch(0)
    made = loader(packed_rows, objectives.change_of(MASKED, tokenizer, seed=3)).batch(0)
    np.testing.assert_array_equal(made["targets"], plain["ids"])
    for name in ("segment_ids", "positions"):
        np.testing.assert_array_equal(made[name], plain[name])
    changed = made["ids"] != plain["ids"]
    assert changed.any()
    assert not (changed & ~made["loss_mask"]).any()
    assert not np.isin(plain["ids"][made["loss_mask"]], list(tokenizer.special_ids.values())).any()
    assert not made["loss_mask"][plain["segment_ids"] == 0].any()


def test_rearranged_rows_keep_everything_but_their_order(packed_rows, tokenizer):
    plain = loader(packed_rows, None).batch(0)
    made = loader(packed_rows, objectives.change_of(MIDDLE, tokenizer, seed=3)).batch(0)
    assert made.keys() == plain.keys()
    for name in ("segment_ids", "positions", "loss_mask"):
        np.testing.assert_array_equal(made[name], plain[name])
    sentinel = tokenizer.special_ids["<|reserved_0|>"]
    moved = 0
    for row in range(8):
        for number in range(1, plain["segment_ids"][row].max() + 1):
            place = plain["segment_ids"][row] == number
            before, after = plain["ids"][row][place], made["ids"][row][place]
            if sentinel in after:
                moved += 1
                ends = [tokenizer.bos_id, tokenizer.eos_id]
                kept = [id for id in before if id not in ends][:-3]
                added = list(tokenizer.special_ids.values())
                assert sorted(id for id in after if id not in added) == sorted(kept)
            else:
                np.testing.assert_array_equal(before, after)
    assert moved > 0


def test_held_out_words_are_missing_alike_at_every_step_and_in_every_batch(packed_rows, tokenizer):
    change = objectives.heldout_change_of(MASKED, tokenizer)
    plain = loader(packed_rows, None).batch(0)
    first = change(plain, 0, range(8))
    np.testing.assert_array_equal(change(plain, 17, range(8))["ids"], first["ids"])
    half = {name: value[4:] for name, value in plain.items()}
    np.testing.assert_array_equal(change(half, 0, range(4, 8))["ids"], first["ids"][4:])
    assert not np.array_equal(objectives.change_of(MASKED, tokenizer, 0)(plain, 0, range(8))["ids"], first["ids"])
    # A decoder is measured on plain text.
    assert objectives.heldout_change_of(MIDDLE, tokenizer) is None
    assert objectives.change_of(ObjectiveConfig(), tokenizer, 0) is None
