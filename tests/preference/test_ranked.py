"""Batches of ranked answers: whole prompts, none lost or doubled, and scores that packing does not change."""

import threading
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.base.errors import ConfigError, UserError
from jaxlm.base.metrics import Mean
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import apply, define_model
from jaxlm.model.weights import initialize
from jaxlm.preference.ranked import PAIR_ARRAYS, Pair, Prompt, RankingBatches
from jaxlm.reward import losses
from jaxlm.train.update import gradients_in_pieces


def ranked(number, sizes, prefix=1, criterion=0):
    """A prompt whose answers rank in their order; token values say which prompt and answer they are of."""
    count = len(sizes)
    answers = [np.arange(size, dtype=np.int32) + 1000 * number + 100 * i + 1 for i, size in enumerate(sizes)]
    pairs = [(i, j, j - i) for i in range(count) for j in range(i + 1, count)]
    weights = losses.pair_weights([(1.0, pairs)])
    made = [Pair(i, j, criterion, weight, distance) for (i, j, distance), weight in weights.items()]
    return Prompt(f"p{number}", answers, made, prefix)


def made(prompts, rows=3, row_length=12, pairs=8, seed=0, **more):
    return RankingBatches(prompts, rows=rows, row_length=row_length, pairs=pairs, seed=seed, **more)


def numbers(batch):
    """Which prompts a batch holds, by their tokens."""
    return sorted({int(token) // 1000 for token in batch["ids"][batch["segment_ids"] > 0]})


def test_a_batch_as_a_picture():
    prompts = [ranked(1, [3, 5, 4], prefix=2), ranked(2, [4, 2])]
    (batch,) = made(prompts, rows=2, row_length=10, pairs=6).heldout()
    # The longest answer of a prompt first, each into the first row with room.
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 2, 2, 2, 2, 3, 3, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 1, 2, 0, 1, 2, 3, 0, 1, 0]]
    assert batch["ids"][0].tolist() == [1101, 1102, 1103, 1104, 1105, 1201, 1202, 1203, 1204, 0]
    assert batch["ids"][1].tolist() == [1001, 1002, 1003, 2001, 2002, 2003, 2004, 2101, 2102, 0]
    assert batch["better"].tolist() == [12, 12, 4, 16, 0, 0]
    assert batch["worse"].tolist() == [4, 8, 8, 18, 0, 0]
    np.testing.assert_allclose(batch["weight"], [1 / 3, 1 / 3, 1 / 3, 1, 0, 0])
    assert batch["distance"].tolist() == [1, 2, 1, 1, 0, 0]
    assert batch["ranked"].tolist() == [3, 3, 3, 2, 0, 0]
    assert batch["better_tokens"].tolist() == [1, 1, 3, 3, 0, 0]
    assert batch["worse_tokens"].tolist() == [3, 2, 2, 1, 0, 0]
    assert batch["prompts"] == 2
    kinds = {name: array.dtype.name for name, array in batch.items()}
    assert kinds == dict.fromkeys(batch, "int32") | dict.fromkeys(("weight", "margin", "prompts"), "float32")
    assert {batch[name].shape for name in PAIR_ARRAYS} == {(6,)}


sizes_of_prompts = st.lists(st.lists(st.integers(2, 14), min_size=2, max_size=9), min_size=1, max_size=25)


@settings(deadline=None, max_examples=60)
@given(sizes=sizes_of_prompts, rows=st.integers(1, 5), pairs=st.integers(1, 40), pieces=st.integers(1, 3))
def test_no_prompt_is_lost_or_doubled(sizes, rows, pairs, pieces):
    prompts = [ranked(number, one) for number, one in enumerate(sizes)]
    fits = ranked(len(prompts), [2, 2])  # so that one is left
    prompts.append(fits._replace(answers=[answer[:1] for answer in fits.answers], prefix=0))
    batches = made(prompts, rows=rows * pieces, row_length=13, pairs=pairs * pieces, pieces=pieces)
    dropped = [name for names in batches.dropped.values() for name in names]
    assert sorted([prompt.name for prompt in batches.prompts] + dropped) == sorted(prompt.name for prompt in prompts)
    left = {int(prompt.name[1:]) for prompt in batches.prompts}
    for epoch in (0, 1):
        first, steps = batches.first_step(epoch), batches.epoch_steps(epoch)
        assert [batches.locate(first + i) for i in range(steps)] == [(epoch, i) for i in range(steps)]
        seen = Counter()
        for step in range(first, first + steps):
            batch = batches.batch(step)
            seen.update(numbers(batch))
            assert batch["prompts"] == len(numbers(batch)) > 0
            check_batch(batch, prompts, pieces)
        assert seen == dict.fromkeys(left, 1)
    assert Counter(n for batch in batches.heldout() for n in numbers(batch)) == dict.fromkeys(left, 1)


def check_batch(batch, prompts, pieces):
    """Every pair of every prompt in it, pointing at the last tokens of its answers, within its piece."""
    found = Counter()
    for a in range(pieces):
        piece = {name: array[a::pieces] for name, array in batch.items() if array.ndim}
        ids, segments = piece["ids"].reshape(-1), piece["segment_ids"]
        for better, worse, weight in zip(piece["better"], piece["worse"], piece["weight"], strict=True):
            if weight == 0:
                assert (better, worse) == (0, 0)
                continue
            number, i, j = ids[better] // 1000, ids[better] % 1000 // 100, ids[worse] % 1000 // 100
            for at, answer in ((better, i), (worse, j)):
                whole = prompts[number].answers[answer]
                assert ids[at - len(whole) + 1 : at + 1].tolist() == whole.tolist()
                row, end = divmod(int(at), segments.shape[1])
                inside = np.flatnonzero(segments[row] == segments[row, end])
                assert (len(inside), inside[-1]) == (len(whole), end), "a segment is an answer, whole and alone"
            found[(int(number), int(i), int(j))] += 1
    expected = [(n, pair.better, pair.worse) for n in numbers(batch) for pair in prompts[n].pairs]
    assert found == Counter(expected)


@pytest.fixture(scope="module")
def thirty():
    random = np.random.default_rng(0)
    return [ranked(n, random.integers(2, 12, random.integers(2, 5)).tolist()) for n in range(30)]


def test_a_batch_is_a_function_of_the_step(thirty):
    batches = made(thirty)
    in_order = [batches.batch(step) for step in range(60)]
    assert batches.first_step(2) < 60, "into the third epoch"
    again = made(thirty)
    for step in reversed(range(60)):
        jax.tree.map(np.testing.assert_array_equal, again.batch(step), in_order[step])
    epochs = [[numbers(b) for b in in_order[batches.first_step(e) : batches.first_step(e + 1)]] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    other = made(thirty, seed=1)
    assert [numbers(other.batch(step)) for step in range(10)] != [numbers(b) for b in in_order[:10]]


def test_processes_have_their_rows_and_all_of_the_pairs(thirty):
    whole = made(thirty, rows=4)
    parts = [made(thirty, rows=4, own=own) for own in ((0, 1), (2, 3))]
    for step in (0, 3, 17):
        batch, split = whole.batch(step), [part.batch(step) for part in parts]
        for name, array in batch.items():
            both = [one[name] for one in split]
            if name in ("ids", "segment_ids", "positions"):
                np.testing.assert_array_equal(np.concatenate(both), array)
            else:
                np.testing.assert_array_equal(both, [array, array])


def test_the_iterator_gives_the_same_batches_from_any_step_and_ends_its_thread(thirty):
    batches = made(thirty, prefetch=3)
    before = threading.active_count()
    iterator = batches.batches(5)
    for expected, (step, batch) in zip(range(5, 12), iterator, strict=False):
        assert step == expected
        jax.tree.map(np.testing.assert_array_equal, batch, batches.batch(step))
    assert threading.active_count() == before + 1
    iterator.close()
    assert threading.active_count() == before


def test_what_goes_wrong_in_the_thread_is_raised_at_its_step(thirty, monkeypatch):
    batches = made(thirty)
    good = batches.batch

    def fails_at_two(step):
        if step == 2:
            raise UserError("no more")
        return good(step)

    monkeypatch.setattr(batches, "batch", fails_at_two)
    iterator = batches.batches(0)
    assert [next(iterator)[0], next(iterator)[0]] == [0, 1]
    with pytest.raises(UserError, match="no more"):
        next(iterator)


def test_heldout_prompts_come_in_order_and_padding_counts_for_nothing(thirty):
    batches = made(thirty, seed=3)
    held = list(batches.heldout())
    assert [n for batch in held for n in numbers(batch)] == sorted(n for batch in held for n in numbers(batch))
    assert sum(batch["prompts"] for batch in held) == len(batches.prompts)
    assert {batch["ids"].shape for batch in held} == {(3, 12)}
    for batch in held:
        assert float(batch["weight"].sum()) == pytest.approx(float(batch["prompts"]))
    assert len(list(batches.heldout(limit=2))) == 2


def test_what_cannot_train_is_left_out_by_reason():
    prompts = [
        ranked(0, [3, 3]),
        ranked(1, [3, 13]),
        ranked(2, [12, 12, 12, 12]),
        ranked(3, [2] * 5),
        Prompt("p4", [np.arange(3)] * 2, []),
        ranked(5, [3, 3])._replace(answers=[*ranked(5, [3, 3]).answers, np.arange(99)]),
    ]
    batches = made(prompts)
    assert [prompt.name for prompt in batches.prompts] == ["p0", "p5"], "an answer in no pair does not matter"
    assert batches.dropped == {
        "answer_longer_than_a_row": ["p1"],
        "answers_longer_than_a_piece": ["p2"],
        "more_pairs_than_a_piece": ["p3"],
        "no_untied_pair": ["p4"],
    }
    with pytest.raises(UserError, match="no prompt is left .*: 1 answer_longer_than_a_row, 1 no_untied_pair"):
        made([prompts[1], prompts[4]])
    with pytest.raises(UserError, match="there is none"):
        made([])


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair(0, 2, 0, 1.0), "is no pair of 2 answers"),
        (Pair(-1, 1, 0, 1.0), "is no pair of 2 answers"),
        (Pair(1, 1, 0, 1.0), "is no pair of 2 answers"),
        (Pair(0, 1, -1, 1.0), "is no pair of 2 answers"),
        (Pair(0, 1, 0, 0.0), "needs a weight above 0"),
        (Pair(0, 1, 0, float("nan")), "needs a weight above 0"),
        (Pair(0, 1, 0, 1.0, margin=float("inf")), "a margin, both finite"),
        (Pair(0, 1, 0, 0.5), "pairs on criterion 0 weigh 0.5; 1 in all is needed"),
    ],
)
def test_what_is_no_prompt_is_refused(pair, message):
    good = ranked(7, [3, 3])
    with pytest.raises(ValueError, match=f"prompt p7: .*{message}"):
        made([good._replace(pairs=[pair])])


def test_wrong_sizes_are_refused_by_field():
    with pytest.raises(ValueError, match="prompt p7: answer 0 has 3 tokens, 3 of the prompt"):
        made([ranked(7, [3, 3], prefix=3)])
    for field, sizes in {
        "batch_rows: got 0": {"rows": 0},
        "batch_pairs: got 0": {"pairs": 0},
        "row_length: got 0": {"row_length": 0},
        "accumulate: got 0": {"pieces": 0},
        "batch_rows: 3 do not divide into 2 pieces": {"pieces": 2},
    }.items():
        with pytest.raises(ConfigError, match=field):
            made([ranked(0, [3, 3])], **sizes)


CONFIG = ModelConfig(
    vocab_size=50, layers=1, width=32, heads=4, feed_forward=48, compute="float32", criteria=("overall", "truthful")
).complete()


@jax.jit
def scores_of(params, ids, segments, positions):
    """[B * S, C]"""
    run = lambda m: m.scores(m(ids, segments, positions)[0])
    return apply(define_model(CONFIG), params, run).reshape(-1, 2)


def scored(params, batch):
    return scores_of(params, *(jnp.asarray(batch[name]) for name in ("ids", "segment_ids", "positions")))


@pytest.fixture(scope="module")
def params():
    return initialize(define_model(CONFIG), 0)


@pytest.fixture(scope="module")
def prompts():
    """Eight prompts of 2 to 4 answers in a vocabulary of 50, of one criterion or the other."""
    random = np.random.default_rng(1)
    made = [ranked(n, random.integers(3, 11, random.integers(2, 5)).tolist(), criterion=n % 2) for n in range(8)]
    tokens = lambda answer: random.integers(1, 50, len(answer)).astype(np.int32)
    return [prompt._replace(answers=[tokens(answer) for answer in prompt.answers]) for prompt in made]


def alone(params, answer, length=12):
    """The scores at an answer's last token, in a row of its own, padded on the right."""
    size, padding = len(answer), length - len(answer)
    row = lambda values: jnp.asarray(np.pad(np.asarray(values, np.int32), (0, padding))[None])
    return scores_of(params, row(answer), row([1] * size), row(range(size)))[size - 1]


def test_packed_answers_score_as_each_alone(params, prompts):
    checked = 0
    for batch in made(prompts, rows=4, row_length=24, pairs=20).heldout():
        scores, real = scored(params, batch), batch["weight"] > 0
        for end in {*batch["better"][real], *batch["worse"][real]}:
            row, position = divmod(int(end), 24)
            segments = batch["segment_ids"][row]
            answer = batch["ids"][row][segments == segments[position]]
            np.testing.assert_allclose(scores[end], alone(params, answer), atol=1e-5)
            checked += 1
    assert checked == sum(len(prompt.answers) for prompt in prompts)


def test_neither_padding_nor_another_answer_changes_a_score(params, prompts):
    batch = next(made(prompts, rows=4, row_length=24, pairs=20).heldout())
    scores = np.asarray(scored(params, batch))
    ends = np.concatenate([batch["better"], batch["worse"]])[np.concatenate([batch["weight"]] * 2) > 0]
    padding = batch["segment_ids"] == 0
    assert padding.any()
    filled = np.asarray(scored(params, batch | {"ids": np.where(padding, 7, batch["ids"])}))
    np.testing.assert_array_equal(filled[ends], scores[ends])
    row, segment = 0, 1
    other = (np.arange(4)[:, None] == row) & (batch["segment_ids"] == segment)
    changed = np.asarray(scored(params, batch | {"ids": np.where(other, batch["ids"] % 49 + 1, batch["ids"])}))
    kept = [end for end in ends if not other.reshape(-1)[end]]
    assert len(kept) < len(ends)
    np.testing.assert_array_equal(changed[kept], scores[kept])
    assert np.abs(changed[ends] - scores[ends]).max() > 1e-3


def objective(params, batch):
    """The loss of a batch out of eight prompts in all."""
    scores = scores_of(params, batch["ids"], batch["segment_ids"], batch["positions"])
    pairs = (batch[name] for name in ("better", "worse", "criterion", "weight", "margin"))
    sums = losses.ranking_sums(scores, *pairs, centring=0.01)
    each = {name: Mean(getattr(sums, name), sums.weight) for name in ("loss", "correct", "difference", "level")}
    return losses.batch_loss(sums, jnp.float32(8)), each


def test_one_batch_its_pieces_and_its_prompts_one_by_one_are_the_same(params, prompts):
    run = jax.jit(lambda batch, pieces: gradients_in_pieces(objective, params, batch, pieces), static_argnums=1)

    def only(batches, pieces):
        (batch,) = batches.heldout()
        return run({name: array for name, array in batch.items() if array.ndim}, pieces)

    whole = only(made(prompts, rows=16, row_length=24, pairs=64), 1)
    assert float(whole[0][0]) > 0
    in_pieces = only(made(prompts, rows=16, row_length=24, pairs=64, pieces=4), 4)
    singles = [only(made([prompt], rows=16, row_length=24, pairs=64), 1) for prompt in prompts]
    for other in (in_pieces, jax.tree.map(lambda *x: sum(x), *singles)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, whole)


def test_packing_counts_what_an_epochs_batches_hold():
    prompts = [ranked(1, [3, 5, 4], prefix=2), ranked(2, [4, 2]), Prompt("tied", [np.arange(3)] * 2, [])]
    batches = made(prompts, rows=2, row_length=10, pairs=6)
    filled = sum(int((batches.batch(step)["segment_ids"] > 0).sum()) for step in range(batches.first_step(1)))
    room = batches.first_step(1) * 20
    found = batches.packing()
    assert (found["prompts"], found["pairs"], found["tokens"], filled) == (2, 4, 18, 18)
    assert found["padding_share"] == 1 - 18 / room
    assert found["left_out"] == {"no_untied_pair": 1}


def test_an_excluded_prompt_is_padding_in_its_place():
    prompts = [ranked(number, [3, 2, 4][: 2 + number % 2]) for number in range(1, 9)]
    whole, without = made(prompts, rows=2), made(prompts, rows=2, exclude=["p3", "p6"])
    assert whole.first_step(2) == without.first_step(2) > 4
    met = []
    for step in range(whole.first_step(2)):
        before, after = whole.batch(step), without.batch(step)
        out = np.isin(before["ids"] // 1000, [3, 6])
        met += [prompt["prompt"] for prompt in without.described(step)]
        assert (after["segment_ids"] == np.where(out, 0, before["segment_ids"])).all()
        assert (after["ids"] == np.where(out, 0, before["ids"])).all()
        gone = [number for number in numbers(before) if number in (3, 6)]
        assert after["prompts"] == before["prompts"] - len(gone)
        # The others' pairs, in their order, point to where they did.
        kept = [k for k in range(8) if before["weight"][k] and not out.reshape(-1)[before["better"][k]]]
        for name in PAIR_ARRAYS:
            assert after[name][: len(kept)].tolist() == before[name][kept].tolist()
            assert not after[name][len(kept) :].any()
    assert Counter(met) == {f"p{number}": 2 for number in (1, 2, 4, 5, 7, 8)}


def test_what_cannot_be_excluded_is_named():
    prompts = [ranked(number, [3, 2]) for number in (1, 2)]
    with pytest.raises(ConfigError, match="exclude: no prompt is named 'p9'; known here: p1, p2"):
        made(prompts, exclude=["p9"])
    with pytest.raises(UserError, match="no prompt is left"):
        made(prompts, exclude=["p1", "p2"])
