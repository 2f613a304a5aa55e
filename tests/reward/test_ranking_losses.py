"""The hand-checked numbers of DESIGN's section 7 in float64, and what the flat list of pairs must keep of them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.feedback import rankings
from jaxlm.feedback.records import pairs_of
from jaxlm.reward import losses

FOUR, TWO = [2.0, 1.0, 0.5, -1.0], [0.3, 0.1]
# Whole functions compile in less time than their operations one by one.
ranking_sums, batch_loss = jax.jit(losses.ranking_sums, static_argnames="centring"), jax.jit(losses.batch_loss)
ranking_losses, plackett_luce = jax.jit(losses.ranking_losses), jax.jit(losses.plackett_luce)


@pytest.fixture(params=[np.float64, np.float32])
def kind(request):
    with jax.enable_x64(request.param == np.float64):
        yield request.param


def flat(prompts, kind):
    """Flat pairs of prompts, (rewards, annotations), annotations (weight, ranks by answer; None: not ranked)."""
    scores, rows, start = [], [], 0
    for rewards, annotations in prompts:
        places = range(start, start + len(rewards))
        weights = losses.pair_weights(
            (weight, [(places[i], places[j]) for i, j in ahead(ranks)]) for weight, ranks in annotations
        )
        rows += [(better, worse, weight) for (better, worse), weight in weights.items()]
        scores += rewards
        start += len(rewards)
    better, worse, weight = zip(*rows, strict=True)
    return arguments(np.array(scores, kind)[:, None], better, worse, weight, kind)


def ahead(ranks):
    ranked = [i for i, rank in enumerate(ranks) if rank is not None]
    return [(i, j) for i in ranked for j in ranked if ranks[i] < ranks[j]]


def arguments(scores, better, worse, weight, kind=np.float32):
    count = len(better)
    return {
        "scores": jnp.asarray(scores),
        "better": jnp.array(better, jnp.int32),
        "worse": jnp.array(worse, jnp.int32),
        "criterion": jnp.zeros(count, jnp.int32),
        "weight": jnp.array(weight, kind),
        "margin": jnp.zeros(count, kind),
    }


def loss_of(prompts, kind=np.float64):
    counted = jnp.asarray(sum(any(ahead(ranks) for _, ranks in annotations) for _, annotations in prompts), kind)
    return float(batch_loss(ranking_sums(**flat(prompts, kind)), counted))


def test_a_pair_by_hand(kind):
    better, worse = kind(1.2), kind(0.2)
    of = lambda *more: float(losses.pair_losses(jnp.array([better]), jnp.array([worse]), *more)[0])
    assert of() == pytest.approx(0.313262, abs=1e-6)
    assert of(0.5) == pytest.approx(0.474077, abs=1e-6)
    assert of(0.0, 0.01) == pytest.approx(0.332862, abs=1e-6)
    sums = ranking_sums(**arguments(np.array([[0.2], [1.2]], kind), [1], [0], [1], kind), centring=0.01)
    assert float(sums.loss[0]) == pytest.approx(0.332862, abs=1e-6)
    sums = ranking_sums(
        **arguments(np.array([[0.2], [1.2]], kind), [1], [0], [1], kind) | {"margin": jnp.array([0.5], kind)}
    )
    assert float(sums.loss[0]) == pytest.approx(0.474077, abs=1e-6)


def test_rankings_by_hand(kind):
    rewards = jnp.array([FOUR, [*TWO, math.nan, math.nan]], kind)
    ranks = jnp.array([[0, 1, 2, 3], [0, 1, -1, -1]], jnp.int32)
    each, counted = ranking_losses(rewards, ranks)
    assert each.dtype == kind
    assert float(each[0]) == pytest.approx(0.227613, abs=1e-6)
    assert float(each.sum() / counted.sum()) == pytest.approx(0.412876, abs=1e-6)
    drawn = plackett_luce(rewards, ranks)
    assert float(drawn[0]) == pytest.approx(1.251552, abs=1e-6)
    assert float(drawn[1]) == pytest.approx(float(each[1]), abs=1e-6), "of two answers both are Bradley and Terry's"


def test_two_prompts_count_alike_however_many_pairs_they_have(kind):
    prompts = [(FOUR, [(1.0, [0, 1, 2, 3])]), (TWO, [(1.0, [0, 1])])]
    assert loss_of(prompts[:1], kind) == pytest.approx(0.227613, abs=1e-6)
    assert loss_of(prompts, kind) == pytest.approx(0.412876, abs=1e-6)
    given = flat(prompts, kind)
    sums = ranking_sums(**given | {"weight": jnp.ones_like(given["weight"])})
    assert float(sums.loss[0] / sums.weight[0]) == pytest.approx(0.280546, abs=1e-6), "flattened pairs, wrong"


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def test_a_prompt_without_an_untied_pair_is_left_out_of_sum_and_weight(wide):
    prompts = [(FOUR, [(1.0, [0, 1, 2, 3])]), ([5.0, 1.0], [(1.0, [0, 0])]), (TWO, [(1.0, [0, 1]), (7.0, [0, None])])]
    assert loss_of(prompts) == pytest.approx(0.412876, abs=1e-6)
    assert losses.pair_weights([(1.0, []), (0.0, [("a", "b")])]) == {}
    each, counted = ranking_losses(jnp.array([[5.0, 1.0], TWO]), jnp.array([[0, 0], [0, 1]], jnp.int32))
    np.testing.assert_array_equal(counted, [0, 1])
    assert float(each[0]) == 0


def test_ties_make_no_pair(wide):
    bradley_terry = lambda difference: math.log1p(math.exp(-difference))
    rewards, ranks = [2.0, 1.0, 0.5], [0, 1, 1]
    expected = (bradley_terry(1.0) + bradley_terry(1.5)) / 2
    assert loss_of([(rewards, [(1.0, ranks)])]) == pytest.approx(expected, abs=1e-12)
    batched = jnp.array([rewards]), jnp.array([ranks], jnp.int32)
    assert float(ranking_losses(*batched)[0][0]) == pytest.approx(expected, abs=1e-12)
    assert float(plackett_luce(*batched)[0]) == pytest.approx(math.log1p(math.exp(-1) + math.exp(-1.5)), abs=1e-12)
    everything_tied = jnp.zeros((1, 3), jnp.int32)
    assert float(plackett_luce(batched[0], everything_tied)[0]) == 0


def test_annotators_count_by_weight_and_their_pairs_by_mean(wide):
    first, second = [0, 1, 2, 3], [1, 0, None, None]  # the second finds the second answer better, and says no more
    one, other = loss_of([(FOUR, [(1.0, first)])]), loss_of([(FOUR, [(1.0, second)])])
    assert other == pytest.approx(math.log1p(math.e), abs=1e-12)
    assert loss_of([(FOUR, [(1.0, first), (3.0, second)])]) == pytest.approx((one + 3 * other) / 4, abs=1e-12)
    assert loss_of([(FOUR, [(2.0, first), (2.0, first)])]) == pytest.approx(one, abs=1e-12)


def test_pair_weights_by_hand_and_what_is_no_weight():
    weights = losses.pair_weights([(1.0, [("a", "b"), ("a", "c")]), (3.0, [("a", "b")]), (9.0, [])])
    assert weights == {("a", "b"): 0.875, ("a", "c"): 0.125}
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="a finite number of 0 or more"):
            losses.pair_weights([(wrong, [("a", "b")])])


def test_the_weights_of_a_ranking_record():
    """What a stage does: the pairs of a criterion, by the annotations that train and what their annotators weigh."""
    who = {"ann": 1.0, "lea": 3.0}

    def annotated(id, annotator, ranking, status="submitted"):
        return {"id": id, "annotator": annotator, "role": "trainer", "status": status, "rankings": ranking}

    record = rankings.parse(
        {
            "prompt_id": "p",
            "messages": [{"role": "user", "content": "?"}],
            "completions": [{"id": id, "content": id} for id in "abc"],
            "annotations": [
                annotated("1", "ann", {"overall": [["a"], ["b"], ["c"]]}),
                annotated("2", "lea", {"overall": [["b"], ["a"]], "truthful": [["a", "b"]]}),
                annotated("3", "lea", {"overall": [["c"], ["a"]]}, status="draft"),
            ],
        }
    )
    weights = lambda name: losses.pair_weights((who[a.annotator], pairs_of(a, name)) for a in record.annotations)
    third = pytest.approx(1 / 12)
    assert weights("overall") == {("a", "b", 1): third, ("a", "c", 2): third, ("b", "c", 1): third, ("b", "a", 1): 0.75}
    assert weights("truthful") == {}


ranks_of_four = st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=4, max_size=4)
annotations_of_four = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 3.0]), ranks_of_four), min_size=1, max_size=4)


@settings(deadline=None, max_examples=50)
@given(annotations=annotations_of_four)
def test_weighted_pairs_are_the_weighted_mean_over_annotations(annotations):
    weights = losses.pair_weights((weight, ahead(ranks)) for weight, ranks in annotations)
    softplus = lambda x: math.log1p(math.exp(x))
    counted = [(weight, ahead(ranks)) for weight, ranks in annotations if weight and ahead(ranks)]
    if not counted:
        assert weights == {}
        return
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)
    means = [(weight, np.mean([softplus(FOUR[j] - FOUR[i]) for i, j in pairs])) for weight, pairs in counted]
    expected = sum(weight * mean for weight, mean in means) / sum(weight for weight, _ in means)
    assert sum(w * softplus(FOUR[j] - FOUR[i]) for (i, j), w in weights.items()) == pytest.approx(expected, abs=1e-12)


def random_pairs(count=12, answers=16, criteria=2, seed=0):
    random = np.random.default_rng(seed)
    better, worse = zip(*(random.permutation(answers)[:2] for _ in range(count)), strict=True)
    given = arguments(random.normal(size=(answers, criteria)).astype(np.float32), better, worse, random.random(count))
    return given | {
        "criterion": jnp.asarray(random.integers(0, criteria, count).astype(np.int32)),
        "margin": jnp.asarray(random.random(count).astype(np.float32)),
    }


@jax.jit
def total(scores, given):
    return jnp.sum(losses.ranking_sums(**given | {"scores": scores}, centring=0.1).loss)


slope = jax.jit(jax.grad(total))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_padding_adds_exactly_nothing_whatever_stands_there(poison):
    given = random_pairs()

    def padded(filler):
        """Four pairs more, of answers that three rows more hold."""
        extra = {"better": 16, "worse": 18, "criterion": 1, "weight": 0, "margin": filler}
        return jnp.concatenate([given["scores"], jnp.full((3, 2), filler)]), given | {
            name: jnp.concatenate([given[name], jnp.full(4, value).astype(given[name].dtype)])
            for name, value in extra.items()
        }

    clean, poisoned = padded(0.0), padded(poison)
    for of in (total, slope, lambda scores, given: ranking_sums(**given | {"scores": scores})):
        jax.tree.map(np.testing.assert_array_equal, of(*poisoned), of(*clean))
    gradient = slope(*poisoned)
    np.testing.assert_array_equal(gradient[16:], 0)
    np.testing.assert_allclose(gradient[:16], slope(given["scores"], given), atol=1e-7)
    np.testing.assert_allclose(total(*poisoned), total(given["scores"], given), rtol=1e-6)


def test_what_is_not_finite_in_a_pair_that_counts_is_not_hidden():
    given = random_pairs()
    at = int(given["better"][0])
    assert not np.isfinite(total(given["scores"].at[at].set(math.nan), given))


def test_accumulated_over_four_pieces_is_one_batch():
    given = random_pairs(count=12)
    whole, gradient = ranking_sums(**given, centring=0.1), slope(given["scores"], given)
    names = ("better", "worse", "criterion", "weight", "margin")
    pieces = [given | {name: given[name][start : start + 3] for name in names} for start in range(0, 12, 3)]
    added = jax.tree.map(lambda *x: sum(x), *(ranking_sums(**piece, centring=0.1) for piece in pieces))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), added, whole)
    np.testing.assert_allclose(sum(slope(given["scores"], piece) for piece in pieces), gradient, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences(wide):
    given = {name: x.astype(jnp.float64) if x.dtype == jnp.float32 else x for name, x in random_pairs().items()}
    gradient = np.asarray(slope(given["scores"], given))
    for row, column in itertools.product(range(0, 16, 3), range(2)):
        step = jnp.zeros_like(given["scores"]).at[row, column].set(1e-6)
        found = (total(given["scores"] + step, given) - total(given["scores"] - step, given)) / 2e-6
        assert float(found) == pytest.approx(gradient[row, column], abs=1e-8)


def test_sums_are_kept_apart_by_criterion_and_add_up_to_the_loss():
    given = random_pairs(count=30, criteria=3)
    sums = ranking_sums(**given)
    scores, better, worse, criterion, weight, margin = (np.asarray(x, np.float64) for x in given.values())
    better, worse, criterion = (x.astype(int) for x in (better, worse, criterion))
    high, low = scores[better, criterion], scores[worse, criterion]
    for c in range(3):
        inside = criterion == c
        each = np.log1p(np.exp(-(high - low - margin)))
        for got, expected in (
            (sums.loss, each),
            (sums.weight, np.ones(30)),
            (sums.correct, high > low),
            (sums.difference, high - low),
            (sums.level, (high + low) / 2),
        ):
            assert float(got[c]) == pytest.approx(np.sum((weight * expected)[inside]), abs=1e-5)
    assert float(batch_loss(sums, jnp.float32(4))) == pytest.approx(float(sums.loss.sum()) / 4)


def test_two_criteria_add_within_a_prompt_and_prompts_divide_once(wide):
    """A prompt that is ranked by two criteria and one that is ranked by the first alone: (a + b + c) / 2."""
    scores = np.array([[1.0, 3.0], [0.0, 1.0], [0.5, 9.0], [0.0, -9.0]])
    given = arguments(scores, [0, 0, 2], [1, 1, 3], [1, 1, 1], np.float64)
    sums = ranking_sums(**given | {"criterion": jnp.array([0, 1, 0], jnp.int32)})
    parts = [math.log1p(math.exp(-difference)) for difference in (1.0, 2.0, 0.5)]
    assert float(batch_loss(sums, jnp.float64(2))) == pytest.approx(sum(parts) / 2, abs=1e-12)
    np.testing.assert_array_equal(sums.weight, [2, 1])
