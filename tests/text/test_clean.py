import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.base.errors import ConfigError
from jaxlm.text import clean
from jaxlm.text.clean import Reason
from jaxlm.text.config import PrepareConfig, SourceConfig
from jaxlm.text.decontaminate import HeldoutIndex, ngrams
from jaxlm.text.dedup import Deduplicator
from jaxlm.text.tally import Tally

SOURCE = SourceConfig(name="mine", path="a.txt")


def test_nuls_go_and_binaries_are_dropped():
    assert clean.remove_nuls("a\0b" * 1 + "c" * 200) == "ab" + "c" * 200
    assert clean.remove_nuls("a\0b\x01") == Reason("binary")
    assert clean.remove_nuls("tabs\tand\r\nlines\f\v") == "tabs\tand\r\nlines\f\v"


def test_only_broken_encoding_is_repaired():
    assert clean.repair_encoding("fine line\ncafÃ© Ã  la crÃ¨me\n") == "fine line\ncafé à la crème\n"
    assert clean.repair_encoding("ÐŸÑ€Ð¸Ð²ÐµÑ‚, Ð¼Ð¸Ñ€") == "Привет, мир"
    for fine in ("“quotes” &amp; ﬁ ｆｕｌｌ\x1b[0m …", "São Tomé – naïve", "Ёлка, чай, район", "日本語"):
        assert clean.repair_encoding(fine) == fine


def test_both_spellings_become_one():
    text = "й ё é ộ Å"
    assert clean.compose(unicodedata.normalize("NFD", text)) == clean.compose(text) == text


def test_lengths_are_counted_in_characters_and_both_bounds_are_kept():
    limits = {"low": 3, "high": 5}
    assert clean.limit_length("абв", **limits) == "абв"
    assert clean.limit_length("абвгд", **limits) == "абвгд"
    assert clean.limit_length("аб", **limits) == Reason("too_short")
    assert clean.limit_length("абвгде", **limits) == Reason("too_long")
    assert clean.limit_length(" \n\t ", **limits) == Reason("empty")


def test_duplicates_are_found_whatever_their_white_space():
    rule = Deduplicator()
    assert rule("one text\nof two lines") == "one text\nof two lines"
    assert rule("  one  text of two\tlines\n") == Reason("duplicate")
    assert rule("One text of two lines") == "One text of two lines"


def test_overlap_is_the_share_of_common_runs_of_words():
    index = HeldoutIndex(3)
    index.add("the quick brown fox jumps")
    index.add("over the lazy dog")
    assert index.overlap("The quick, BROWN fox!") == 1.0
    assert index.overlap("a quick brown fox") == 0.5
    assert index.overlap("fox jumps over the") == 0.0  # no run reaches over two documents
    assert index.overlap("lazy dog") == 0.0  # too short to judge
    assert index.rule(0.5)("a quick brown fox") == "a quick brown fox"
    assert index.rule(0.49)("a quick brown fox") == Reason("overlaps_heldout")


def test_scripts_without_spaces_are_compared_by_character():
    index = HeldoutIndex(5)
    index.add("今日はとても良い天気です")
    assert index.overlap("「今日はとても寒い」") > 0
    assert len(ngrams("今日は abc", 1)) == 4


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=30))
def test_overlap_agrees_with_a_plain_set(first, second):
    def runs(words):
        return [tuple(words[i : i + 2]) for i in range(len(words) - 1)]

    index = HeldoutIndex(2)
    index.add(" ".join(first))
    expected = [run in set(runs(first)) for run in runs(second)]
    assert index.overlap(" ".join(second)) == (sum(expected) / len(expected) if expected else 0.0)


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(max_size=8), st.builds(Reason, st.sampled_from("xyz"), st.booleans()))))
def test_kept_and_dropped_by_reason_is_read(outcomes):
    tally = Tally()
    config = PrepareConfig(sources=(SOURCE,), min_characters=3, max_characters=6)
    rules = [*clean.rules(config), ("duplicates", Deduplicator())]
    kept = [o for o in (tally.judge("here:1", o, str(o) * 100, rules) for o in outcomes) if isinstance(o, str)]
    report = tally.report()
    assert report["kept"] == len(kept)
    assert report["kept"] + sum(report["dropped"].values()) == report["read"] == len(outcomes)
    for reason, examples in report["examples"].items():
        assert len(examples) == min(3, report["dropped"][reason])
        assert all(len(example["text"]) <= 200 for example in examples)
    assert set(report["examples"]) == set(report["dropped"])


def test_what_rules_mend_is_counted():
    tally = Tally()
    rules = clean.rules(PrepareConfig(sources=(SOURCE,), min_characters=1))
    tally.judge("here:1", "и\u0306", "", rules)
    tally.judge("here:2", "й", "", rules)
    assert tally.changed == Counter({"nfc": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": ()}, "sources: none has split='train'"),
        ({"sources": (SOURCE, SOURCE)}, "2 are named 'mine'"),
        ({"max_characters": 10}, r"max_characters: got 10; at least min_characters \(50\)"),
        ({"max_bad_share": 1.5}, "max_bad_share: got 1.5"),
        ({"shard_bytes": 0}, "shard_bytes: got 0"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**{"sources": (SOURCE,), **fields})
