"""Batches of preferences: whose tokens are whose, what is looked up for them, and answers to other prompts."""

import numpy as np
import pytest

from jaxlm.base.errors import UserError
from jaxlm.preference.batches import PreferenceBatches, Reference
from jaxlm.preference.ranked import Pair, Prompt
from jaxlm.reward import losses

PREFIX = 2


def ranked(number: int, sizes: list[int]) -> Prompt:
    """Answers that rank in their order, of so many tokens of their own, behind two of the prompt's: 1000, 1000."""
    count = len(sizes)
    answers = [
        np.int32([1000 * number] * PREFIX + [1000 * number + 100 * i + t + 1 for t in range(n)])
        for i, n in enumerate(sizes)
    ]
    weights = losses.pair_weights([(1.0, [(i, j) for i in range(count) for j in range(i + 1, count)])])
    pairs = [Pair(i, j, 0, weight) for (i, j), weight in weights.items()]
    return Prompt(f"p{number}", answers, pairs, PREFIX, [np.arange(len(a)) >= PREFIX for a in answers])


PROMPTS = [ranked(1, [1, 3, 2]), ranked(2, [4, 2]), ranked(3, [2, 2])]


def made(prompts=PROMPTS, others=False, rows=3, row_length=11, pairs=6, **more) -> PreferenceBatches:
    return PreferenceBatches(prompts, others=others, rows=rows, row_length=row_length, pairs=pairs, seed=0, **more)


def test_a_batch_as_a_picture():
    batches = made()
    batches.reference = Reference(np.float32([-1, -2, -3, -4, -5, -6, -7]), np.zeros(0, np.float32))
    batch = next(batches.heldout())
    assert batch["ids"][0].tolist() == [1000, 1000, 1101, 1102, 1103, 1000, 1000, 1201, 1202, 0, 0]
    assert batch["loss_mask"].astype(int).tolist() == [
        [0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch["better_tokens"].tolist() == [1, 1, 3, 4, 0, 0]
    assert batch["worse_tokens"].tolist() == [3, 2, 2, 2, 0, 0]
    assert batch["better_answer"].tolist() == [0, 0, 1, 3, 0, 0]
    assert batch["worse_answer"].tolist() == [1, 2, 2, 4, 0, 0]
    assert batch["better_reference"].tolist() == [-1, -1, -2, -4, 0, 0]
    assert batch["worse_reference"].tolist() == [-2, -3, -3, -5, 0, 0]
    assert "other_ids" not in batch


def test_answers_to_other_prompts_lie_where_the_answers_do():
    batches = made(others=True, rows=4, row_length=12)
    # Each prompt has the answers of the one before it, the first those of the last.
    assert [[x.tolist()[PREFIX:] for x in each.ids] for each in batches.others] == [
        [[3001, 3002], [3101, 3102], [3001, 3002]],
        [[1001], [1101, 1102, 1103]],
        [[2001, 2002, 2003, 2004], [2101, 2102]],
    ]
    batches.reference = Reference(-np.arange(7, dtype=np.float32), 100 - np.arange(7, dtype=np.float32))
    seen = 0
    for batch in batches.heldout():
        flat = {name: x.reshape(-1) for name, x in batch.items() if x.ndim == 2}
        for pair in np.flatnonzero(batch["weight"]):
            for side in ("better", "worse"):
                # A place ends where its longer content does; what counts in it is all of either one, nothing else.
                end = int(batch[side][pair])
                start = end - int(flat["positions"][end])
                number, answer = next(
                    (n, a)
                    for n in range(3)
                    for a in range(len(batches.prompts[n].answers))
                    if batches.first[n] + a == batch[f"{side}_answer"][pair]
                )
                own, other = PROMPTS[number], batches.others[number]
                for ids, mask, wanted in (
                    ("ids", "loss_mask", own.answers[answer][PREFIX:]),
                    ("other_ids", "other_mask", other.ids[answer][PREFIX:]),
                ):
                    counted = flat[mask][start : end + 1]
                    assert flat[ids][start : end + 1][counted].tolist() == wanted.tolist()
                    assert flat[ids][start : start + PREFIX].tolist() == [1000 * (number + 1)] * PREFIX
                assert batch[f"{side}_tokens"][pair] == len(own.answers[answer]) - PREFIX
                assert batch[f"{side}_other"][pair] == 100 - batch[f"{side}_answer"][pair]
                seen += 1
        assert not flat["loss_mask"][flat["segment_ids"] == 0].any()
        assert not flat["other_mask"][flat["segment_ids"] == 0].any()
    assert seen == 2 * (3 + 1 + 1)


def test_an_answer_to_another_prompt_is_cut_at_the_rows_end_and_nothing_is_added():
    long = ranked(1, [9, 9])
    batches = made([long, ranked(2, [1, 1])._replace(name="other")], others=True)
    assert len(batches.prompts) == 2
    assert batches.others[1].ids[0].tolist() == [2000, 2000, *range(1001, 1010)]
    prompt = ranked(2, [1, 1])
    far = Prompt(
        "far",
        [np.r_[[9] * 4, a].astype(np.int32) for a in prompt.answers],
        prompt.pairs,
        6,
        [np.r_[np.zeros(4, bool), t] for t in prompt.targets],
    )
    batches = made([long, far], others=True)
    assert batches.others[1].ids[0].tolist() == [9, 9, 9, 9, 2000, 2000, *range(1001, 1006)]
    assert batches.others[1].targets[0].sum() == 5


def test_pairs_of_one_prompt_are_no_other_prompt():
    """Pairs come a record each: neighbours with the same prompt give no mismatched answer."""
    same = [ranked(n, [1, 1])._replace(name="same") for n in (1, 2, 3)]
    with pytest.raises(UserError, match="sources: kto compares with answers to other prompts, and there are 1 prompts"):
        made(same, others=True)
    tied = ranked(5, [2, 2])._replace(pairs=[])
    batches = made([*same, tied, ranked(4, [2, 2])], others=True)
    assert batches.dropped == {"no_untied_pair": ["p5"]}
    assert [each.ids[0][PREFIX] for each in batches.others] == [4001, 4001, 4001, 3001]


def test_pieces_hold_whole_prompts_and_point_into_themselves():
    whole, halves = (
        made(rows=4, pairs=8, others=True, row_length=12),
        made(rows=8, pairs=16, pieces=2, others=True, row_length=12),
    )
    for batches in (whole, halves):
        batches.reference = Reference(-np.arange(7, dtype=np.float32), np.arange(7, dtype=np.float32))
    (batch,) = halves.heldout()
    found = []
    for piece in range(2):
        part = {name: x[piece::2] for name, x in batch.items() if x.ndim}
        ids, mask = part["ids"].reshape(-1), part["loss_mask"].reshape(-1)
        for pair in np.flatnonzero(part["weight"]):
            assert mask[part["better"][pair]] or ids[part["better"][pair]] == 0
            found.append((part["better_answer"][pair], part["better_reference"][pair], part["worse_tokens"][pair]))
    alone = [
        (batch["better_answer"][pair], batch["better_reference"][pair], batch["worse_tokens"][pair])
        for batch in whole.heldout()
        for pair in np.flatnonzero(batch["weight"])
    ]
    assert sorted(found) == sorted(alone)
    some = made(rows=4, pairs=8, others=True, row_length=12, own=(1, 3))
    for mine, all_rows in zip(some.heldout(), made(rows=4, pairs=8, others=True, row_length=12).heldout(), strict=True):
        for name in ("ids", "loss_mask", "other_ids", "other_mask"):
            np.testing.assert_array_equal(mine[name], all_rows[name][[1, 3]])


def test_an_excluded_prompt_has_no_tokens_and_answers_nobody():
    batches = made(others=True, rows=4, row_length=12, exclude=["p2"], avoid=["p2"])
    whole = made(others=True, rows=4, row_length=12)
    assert [x.tolist()[PREFIX:] for x in batches.others[2].ids] == [[1001], [1101, 1102, 1103]]
    batches.reference = whole.reference = Reference(-np.arange(7, dtype=np.float32), np.arange(7, dtype=np.float32))
    for batch, before in zip(batches.heldout(), whole.heldout(), strict=True):
        out = before["ids"] // 1000 == 2
        assert not (batch["loss_mask"] | batch["other_mask"])[out].any()
        assert not batch["segment_ids"][out].any()
        kept = [k for k in range(6) if before["weight"][k] and before["better_answer"][k] not in (3, 4)]
        for name in ("better_answer", "worse_answer", "better_reference", "worse_reference", "better_tokens"):
            assert batch[name][: len(kept)].tolist() == before[name][kept].tolist()
