"""Missing words: which tokens are predicted and what stands there, by eye and by their shares."""

import dataclasses

import numpy as np
import pytest

from jaxlm.base.errors import ConfigError
from jaxlm.objectives.config import MaskedWordsConfig, ObjectiveConfig
from jaxlm.objectives.masked_words import Vocabulary, mask_row, vocabulary_of
from jaxlm.tokenizer.byte import ByteTokenizer

BYTES = ByteTokenizer(("<pad>", "<s>", "</s>", "[MASK]"))
OBJECTIVE = ObjectiveConfig(masked_words=MaskedWordsConfig())
WORDS = Vocabulary(mask_id=4, special=np.arange(5, dtype=np.int32), ordinary=np.arange(5, 50, dtype=np.int32))
# Two documents between 2 and 3 (<s>, </s>), one of which says 1 (<unk>), and padding.
IDS = np.array([2, 9, 8, 7, 3, 2, 1, 6, 3, 0], np.int32)
SEGMENTS = np.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 0], np.int32)


class Fixed:
    """Draws that are given."""

    def __init__(self, places, kinds, others):
        self.given, self.others = np.array([places, kinds]), np.array(others)

    def random(self, shape):
        assert shape == self.given.shape
        return self.given

    def integers(self, high, size):
        assert (high, size) == (45, len(self.others))
        return self.others


def test_by_hand():
    """The draws below 0.15 are predicted, but for special tokens; 80 % of them are missing, 10 % another token."""
    places = [0.1, 0.1, 0.14, 0.15, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0]
    kinds = [0.0, 0.79, 0.8, 0.0, 0.0, 0.0, 0.0, 0.95, 0.0, 0.0]
    made, chosen = mask_row(IDS, SEGMENTS, Fixed(places, kinds, [30] * 10), MaskedWordsConfig(), WORDS)
    assert chosen.astype(int).tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 0, 0]
    assert made.tolist() == [2, 4, 35, 7, 3, 2, 1, 6, 3, 0]  # missing; the ordinary token number 30; as it was


def test_shares_are_those_of_the_paper():
    ids = np.random.default_rng(0).integers(0, 50, 200_000).astype(np.int32)
    made, chosen = mask_row(ids, np.ones_like(ids), np.random.default_rng(1), MaskedWordsConfig(), WORDS)
    words = ids >= 5
    assert not chosen[~words].any()
    np.testing.assert_array_equal(made[~chosen], ids[~chosen])
    # Within four standard deviations of a binomial.
    close = lambda share, p, n: abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert close(chosen[words].mean(), 0.15, words.sum())
    missing, same = made[chosen] == 4, made[chosen] == ids[chosen]
    assert close(missing.mean(), 0.8, chosen.sum())
    assert close(same.mean(), 0.1 + 0.1 / 45, chosen.sum())
    swapped = made[chosen][~missing & ~same]
    assert set(swapped) == set(range(5, 50))  # any ordinary token, never a special one


@pytest.mark.parametrize(("field", "expected"), [("masked", {4}), ("random", set(range(5, 50)))])
def test_all_of_one_kind(field, expected):
    config = MaskedWordsConfig(**({"rate": 1.0, "masked": 0.0, "random": 0.0} | {field: 1.0}))
    ids = np.full(5000, 9, np.int32)
    made, chosen = mask_row(ids, np.ones_like(ids), np.random.default_rng(0), config, WORDS)
    assert chosen.all()
    assert set(made) == expected


def test_the_vocabulary_of_a_tokenizer():
    found = vocabulary_of(OBJECTIVE, BYTES)
    assert found.mask_id == BYTES.special_ids["[MASK]"] == 259
    assert found.special.tolist() == [256, 257, 258, 259]
    assert found.ordinary.tolist() == list(range(256))


def test_what_cannot_be_is_refused():
    unnamed = dataclasses.replace(OBJECTIVE, masked_words=MaskedWordsConfig(mask_token="<mask>"))
    with pytest.raises(ConfigError, match="objective.masked_words.mask_token: the rows' tokenizer has no"):
        vocabulary_of(unnamed, BYTES)
    with pytest.raises(ConfigError, match="special_tokens"):
        vocabulary_of(unnamed, BYTES)
    for fields in ({"rate": 0.0}, {"masked": 1.5}, {"random": 0.3}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            MaskedWordsConfig(**fields)
