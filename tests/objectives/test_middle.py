"""Fill in the middle: the two orders by eye, and put back what was rearranged."""

import numpy as np
import pytest

from jaxlm.base.errors import ConfigError
from jaxlm.objectives.config import FillInTheMiddleConfig, MaskedWordsConfig, ObjectiveConfig
from jaxlm.objectives.middle import Sentinels, rearrange_row, rearranged, sentinels_of
from jaxlm.tokenizer.byte import ByteTokenizer

PRE, SUF, MID, BOS, EOS = 91, 92, 93, 1, 2
SENTINELS = Sentinels(PRE, SUF, MID)
ALWAYS = FillInTheMiddleConfig(rate=1.0)
TEXT = np.array([10, 11, 12, 13, 14], np.int32)


def test_the_two_orders():
    """The prefix 10, the middle 11 12, the suffix 13 14 (arXiv:2207.14255: PSM, and the second form of SPM)."""
    assert rearranged(TEXT, 1, 3, False, SENTINELS).tolist() == [PRE, 10, SUF, 13, 14, MID, 11, 12]
    assert rearranged(TEXT, 1, 3, True, SENTINELS).tolist() == [PRE, SUF, 13, 14, MID, 10, 11, 12]


def test_empty_parts_leave_their_sentinels():
    assert rearranged(TEXT, 0, 5, False, SENTINELS).tolist() == [PRE, SUF, MID, *TEXT]
    assert rearranged(TEXT, 5, 5, True, SENTINELS).tolist() == [PRE, SUF, MID, *TEXT]
    assert rearranged(TEXT, 2, 2, False, SENTINELS).tolist() == [PRE, 10, 11, SUF, 12, 13, 14, MID]


def put_back(ids):
    """The text of a rearranged document, as a reader of the format takes it apart."""
    ids = list(ids)
    assert [ids.count(sentinel) for sentinel in SENTINELS] == [1, 1, 1]
    suffix, middle = ids.index(SUF), ids.index(MID)
    assert ids[0] == PRE
    if suffix == 1:  # SPM, or PSM with an empty prefix: the same text either way
        return [*ids[middle + 1 :], *ids[2:middle]]
    return [*ids[1:suffix], *ids[middle + 1 :], *ids[suffix + 1 : middle]]


def row_of(*documents, length=40, front=(BOS,), back=(EOS,)):
    """(ids, segments, loss mask) of documents, each between `front` and `back`."""
    ids, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
    loss_mask, at = np.zeros(length, bool), 0
    for number, text in enumerate(documents, 1):
        whole = [*front, *text, *back]
        place = slice(at, at + len(whole))
        ids[place], segments[place], loss_mask[at + 1 : at + len(whole)] = whole, number, True
        at += len(whole)
    return ids, segments, loss_mask


def documents_of(ids, segments):
    return [ids[segments == number] for number in range(1, segments.max() + 1)]


@pytest.mark.parametrize("suffix_first", [0.0, 1.0, 0.5])
def test_put_back_it_is_the_text_without_its_last_three_tokens(suffix_first):
    texts = [range(10, 20), range(20, 26), range(30, 43)]
    ids, segments, loss_mask = row_of(*texts)
    orders = set()
    for seed in range(50):
        random = np.random.default_rng(seed)
        config = FillInTheMiddleConfig(rate=1.0, suffix_first=suffix_first)
        made = rearrange_row(ids, segments, loss_mask, random, config, SENTINELS, (BOS, EOS))
        assert made.shape == ids.shape
        np.testing.assert_array_equal(made[segments == 0], ids[segments == 0])
        for text, document in zip(texts, documents_of(made, segments), strict=True):
            suffix = list(document).index(SUF) + 1
            assert document[suffix] in text  # something of it is left to see
            assert (document[0], document[-1]) == (BOS, EOS)
            assert put_back(document[1:-1]) == list(text)[:-3]
            orders.add(document[2] == SUF)
    assert orders >= {True, False} if suffix_first < 1 else orders == {True}


def test_rates_cuts_and_orders_are_drawn_alike():
    ids, segments, loss_mask = row_of(range(10, 18), length=10)
    config = FillInTheMiddleConfig(rate=0.5, suffix_first=0.5)
    prefixes, rearrangements = [], 0
    for seed in range(4000):
        made = rearrange_row(ids, segments, loss_mask, np.random.default_rng(seed), config, SENTINELS, (BOS, EOS))
        if PRE not in made:
            np.testing.assert_array_equal(made, ids)
            continue
        rearrangements += 1
        inner = list(made[1:-1])
        if inner[1] != SUF:
            prefixes.append(inner.index(SUF) - 1)
    assert abs(rearrangements / 4000 - 0.5) < 4 * (0.25 / 4000) ** 0.5
    # Of 5 tokens cut at two of the 5 places before one: the lower is the first in 9 of 25, then 7, 5, 3, 1. Where it is
    # the first, the orders look alike; of the others half are PSM.
    shares = np.bincount(prefixes, minlength=5)[1:] / (rearrangements / 2)
    expected = np.array([7, 5, 3, 1]) / 25
    assert np.all(np.abs(shares - expected) < 4 * (expected / (rearrangements / 2)) ** 0.5)


def test_what_stays_as_it_is():
    draw = lambda *row: rearrange_row(*row, np.random.default_rng(0), ALWAYS, SENTINELS, (BOS, EOS))
    short = row_of(range(10, 15))
    np.testing.assert_array_equal(draw(*short), short[0])
    ids, segments, loss_mask = row_of(range(10, 20), range(20, 30))
    chat = loss_mask.copy()
    chat[1:6] = False  # of the first document only the end is a target: a chat
    made = draw(ids, segments, chat)
    np.testing.assert_array_equal(made[segments == 1], ids[segments == 1])
    assert PRE in made[segments == 2]
    # A document left out of the row reads as padding; the one behind it keeps its place.
    hollow = np.where(segments == 1, 0, segments)
    made = draw(ids, hollow, loss_mask & (hollow > 0))
    np.testing.assert_array_equal(made[hollow == 0], ids[hollow == 0])
    assert put_back(made[hollow == 2][1:-1]) == list(range(20, 27))


def test_a_tokenizer_without_bos_and_a_piece_without_eos():
    ids, segments, loss_mask = row_of(range(10, 20), length=10, front=(), back=())
    made = rearrange_row(ids, segments, loss_mask, np.random.default_rng(0), ALWAYS, SENTINELS, (None, EOS))
    assert put_back(made) == list(range(10, 17))


def test_sentinels_are_the_tokenizers_special_tokens():
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    tokenizer = ByteTokenizer(("<pad>", "<s>", "</s>", *names))
    assert sentinels_of(ALWAYS, tokenizer) == (259, 260, 261)
    without = ByteTokenizer(("<pad>", "<s>", "</s>", *names[:1]))
    problem = r"objective.fill_in_the_middle.suffix_token: the rows' tokenizer has no special token '<\|fim_suffix\|>'"
    with pytest.raises(ConfigError, match=problem + ".*the tokenizer stage's special_tokens"):
        sentinels_of(ALWAYS, without)
    with pytest.raises(ConfigError, match="middle_token: .* are not all different"):
        FillInTheMiddleConfig(middle_token="<|fim_prefix|>")
    with pytest.raises(ConfigError, match="give one of them"):
        ObjectiveConfig(masked_words=MaskedWordsConfig(), fill_in_the_middle=ALWAYS)
