import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.base.errors import ConfigError, UserError
from jaxlm.feedback import verifiers


def score(verify: verifiers.Verifier, answer: str) -> float:
    return verify("", answer).score


def test_exact_is_character_for_character():
    verify = verifiers.exact(["Paris", "paris"])
    assert verify("Capital of France?", "Paris") == (1.0, "the answer is 'Paris'")
    assert [score(verify, answer) for answer in ("paris", "PARIS", "Paris ", "Paris.", "")] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("answer", "options", "right"),
    [
        ("the  u.s.a.!\n", {"articles": True}, True),
        ("the  u.s.a.!\n", {}, False),
        ("U.S.A.", {"articles": True}, True),
        ("u.s.a.", {"case": False}, False),
        ("USA", {"case": False, "punctuation": False, "spaces": False}, True),
        ("U.S.A", {"punctuation": False}, False),
        (" USA", {"spaces": False}, False),
        ("ＵＳＡ„“", {}, True),  # NFKC; quotation marks of category P
        ("USB", {}, False),
    ],
)
def test_normalized(answer, options, right):
    assert score(verifiers.normalized(["USA"], **options), answer) == right


def test_articles_within_words_stay():
    assert verifiers.normalize("The anthem, a tea", articles=True) == "anthem tea"


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("It is 42.", 42),
        ("1 and 2, so 3", "3"),
        ("costs $1,234,567.50 in all", "1234567.5"),
        ("-5", -5),
        ("−5", "-5"),
        ("x = -5", -5),
        ("10-5", 5),
        ("(7)-5", 5),
        ("-$5", -5),
        ("1, 2,3", 3),
        ("12,3456", 3456),
        (".5", 0.5),
        ("3/4", "0.75"),
        ("3 / 4", "0.75"),
        ("2 1/2 cups", 2.5),
        ("1.5/2", "3/4"),
        (r"\frac{3}{4}", "3/4"),
        (r"-\dfrac{3}{4}", "-.75"),
        ("50%", 0.5),
        ("50 %", "50%"),
        (r"12.5\%", "1/8"),
        ("1e-3", 0.001),
        ("1.5E+3", 1500),
        ("1.5 × 10^3", 1500),
        (r"6.02 \times 10^{23}", 6.02e23),
        ("-2*10^-2", "-0.02"),
        ("20 cm^2", 20),
        ("9 m2", 9),
        ("x_1^{-2} 8", 8),
        ("2.5", "5/2"),
        ("0.1", 0.1),
        ("100000000000000000000001", "100000000000000000000001"),
    ],
)
def test_numbers_are_read(answer, target):
    assert verifiers.number(target)("", answer).score == 1, verifiers.number(target)("", answer).reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no number"),
        ("forty-two", "no number"),
        ("x42", "no number"),
        ("42 - or 41", "found 41, not 42"),
        ("-42", "found -42, not 42"),
        ("42/0", "found 42/0, not 42"),
        ("42 1/0", "found 42 1/0, not 42"),
        ("42e999999999999", "found 42e999999999999, not 42"),
        ("42%", "found 42%, not 42"),
        ("42" + "0" * 5000, "found 42" + "0" * 58 + ", not 42"),
    ],
)
def test_numbers_that_are_wrong(answer, reason):
    assert verifiers.number(42)("", answer) == (0.0, reason)


@pytest.mark.parametrize(
    ("marker", "answer", "right"),
    [
        ("####", "6 * 7 = 42\n#### 42\n(1 step)", 1),
        ("####", "42", 0),
        ("####", "#### 41 no, #### 42", 1),
        ("####", "#### 42 no, #### 41", 0),
        ("####", "#### unknown", 0),
        ("answer is", "The answer is: $42, of 50", 1),
        (r"\boxed{", r"\boxed{42} 7", 1),
        (r"\boxed{", r"\boxed{x_1 = 42}", 1),
        (r"\boxed{", r"\boxed{\frac{84}{2}}", 1),
        (r"\boxed{", r"\boxed{} 42", 0),
        (r"\boxed{", r"\boxed{\text{none}} 42", 0),
        (r"\boxed{", r"\boxed{42", 1),
    ],
)
def test_the_number_after_the_marker(marker, answer, right):
    assert score(verifiers.number(42, marker=marker), answer) == right


def test_tolerance_is_exact_and_includes_its_end():
    tenth = verifiers.number("1/3", tolerance=0.25)
    assert [score(tenth, answer) for answer in ("7/12", "0.58333", "0.58334", "1/12", "0.0833")] == [1, 1, 0, 1, 0]
    relative = verifiers.number(-200, relative=0.125)
    assert [score(relative, answer) for answer in ("-175", "-225", "-174.9", "200")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("answer", "right", "reason"),
    [
        ("The answer is (B).", 1, "found B"),
        ("B", 1, "found B"),
        ("b", 1, "found B"),
        (" b.\n", 1, "found B"),
        ("(b)", 1, "found B"),
        ("**B**", 1, "found B"),
        (r"\boxed{B}", 1, "found B"),
        ("Answer: B) Paris", 1, "found B"),
        ("B, and B again", 1, "found B"),
        ("A good answer is B", 1, "found B"),
        ("C", 0, "found C"),
        ("A or B", 0, "found A and B"),
        ("A is wrong, so it is B.", 0, "found A and B"),
        ("(a) or B", 0, "found A and B"),
        ("Big Cats don't", 0, "none of the choices is named"),
        ("B-flat, C++, vitamin-b", 0, "none of the choices is named"),
        ("", 0, "none of the choices is named"),
    ],
)
def test_choice_of_letters(answer, right, reason):
    assert verifiers.choice("B")("", answer) == (right, reason)


def test_choice_after_a_marker_leaves_out_the_reasoning():
    verify = verifiers.choice("B", marker="answer is")
    assert score(verify, "A is wrong, so the answer is B") == 1
    assert score(verify, "the answer is A. No: the answer is B") == 1
    assert score(verify, "B") == 0


def test_choice_of_words():
    verify = verifiers.choice("very positive", ("positive", "very positive", "negative"))
    assert verify("", "It is VERY positive.") == (1.0, "found very positive")
    assert verify("", "positive") == (0.0, "found positive")
    assert verify("", "very positive, not negative") == (0.0, "found negative and very positive")
    assert verify("", "nonnegative") == (0.0, "none of the choices is named")


def test_i_the_pronoun_is_no_choice():
    verify = verifiers.choice("I", tuple("ABCDEFGHIJ"))
    assert verify("", "I think it is J") == (0.0, "found J")
    assert verify("", "I is right") == (1.0, "found I")


def test_regex():
    assert score(verifiers.regex(r"(?i)yes"), "Oh Yes!") == 1
    assert score(verifiers.regex(r"(?i)yes", full=True), "Oh Yes!") == 0
    assert score(verifiers.regex(r"[0-9]{4}", full=True), "2024") == 1
    assert score(verifiers.regex(r"[0-9]{4}", full=True), "2024\n") == 0


def test_patterns_of_quadratic_time_are_bounded():
    verify, start = verifiers.regex("x*y"), time.monotonic()
    assert score(verify, "x" * verifiers.MOST_CHARACTERS) == 0
    assert verify("", "y" * (verifiers.MOST_CHARACTERS + 1)).reason.startswith("10001 characters")
    assert time.monotonic() - start < 20


PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 1]}, "maxItems": 3, "minItems": 1, "uniqueItems": True},
        "id": {"anyOf": [{"type": "null"}, {"type": ["string", "number"]}]},
        "never": False,
        "kind": {"const": {"x": [1, True]}},
        "share": {"allOf": [{"exclusiveMinimum": 0}, {"maximum": 1}]},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('{"name": "Ada"}', ""),
        ('{"name": "Ada", "age": 36.0, "tags": ["a", 1.0], "id": null, "kind": {"x": [1.0, true]}, "share": 1}', ""),
        ('{"age": 36}', "answer breaks required"),
        ('{"name": ""}', "answer.name breaks minLength 1"),
        ('{"name": "Adelaide"}', "answer.name breaks maxLength 5"),
        ('{"name": "ada"}', "answer.name breaks pattern"),
        ('{"name": 3}', "answer.name breaks type"),
        ('{"name": "Ada", "age": 36.5}', "answer.age breaks type"),
        ('{"name": "Ada", "age": true}', "answer.age breaks type"),
        ('{"name": "Ada", "age": -1}', "answer.age breaks minimum 0"),
        ('{"name": "Ada", "age": 150}', "answer.age breaks exclusiveMaximum 150"),
        ('{"name": "Ada", "tags": []}', "answer.tags breaks minItems 1"),
        ('{"name": "Ada", "tags": ["a", "c"]}', "answer.tags.1 breaks enum"),
        ('{"name": "Ada", "tags": [1, true]}', "answer.tags.1 breaks enum"),
        ('{"name": "Ada", "tags": [1, 1.0]}', "answer.tags breaks uniqueItems"),
        ('{"name": "Ada", "tags": ["a", "a", "b", "b"]}', "answer.tags breaks maxItems 3"),
        ('{"name": "Ada", "id": []}', "answer.id fits none of anyOf"),
        ('{"name": "Ada", "never": 1}', "answer.never must not be there"),
        ('{"name": "Ada", "more": 1}', "answer.more must not be there"),
        ('{"name": "Ada", "kind": {"x": [1, 1]}}', "answer.kind breaks const"),
        ('{"name": "Ada", "share": 0}', "answer.share breaks exclusiveMinimum 0"),
        ('{"name": "Ada", "share": 1.5}', "answer.share breaks maximum 1"),
        ("[]", "answer breaks type"),
        ('Sure:\n```json\n{"name": "Ada"}\n```\nDone.', ""),
        ('```\n{"name": ""}\n```', "answer.name breaks minLength 1"),
        ('```\n{"name": "Ada"}\n```\n```\n{}\n```', "neither"),
        ("Ada", "neither"),
        ('{"name": "Ada", "age": NaN}', "neither"),
        ('{"name": "Ada", "age": ' + "9" * 5000 + "}", "neither"),
        ("[" * 100_000, "neither"),
        ("```\n" + "\n" * 50_000, "neither"),
    ],
    ids=lambda text: text[:40],
)
def test_json_schema(answer, problem):
    verdict = verifiers.json_schema(PERSON)("", answer)
    assert verdict.score == (not problem)
    assert verdict.reason.startswith(problem or "conforms")


def test_a_schema_may_be_text_and_is_not_changed_from_outside():
    assert score(verifiers.json_schema('{"type": "array"}'), "[1e999]") == 1
    schema = {"type": "array"}
    verify = verifiers.json_schema(schema)
    schema["type"] = "string"
    assert score(verify, "[]") == 1


USER_MODULE = """
def length(prompt, answer): return len(answer) / 10
def is_yes(prompt, answer): return answer == "yes"
def fails(prompt, answer): raise KeyError("missing")
def not_a_number(prompt, answer): return float("nan")
def text(prompt, answer): return "1"
def nothing(prompt, answer): pass
constant = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_verifiers.py").write_text(USER_MODULE)
    (tmp_path / "my_broken_verifiers.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)


def test_python_functions(user_module):
    assert verifiers.python("my_verifiers:length")("", "four") == (0.4, "my_verifiers:length returned 0.4")
    assert [score(verifiers.python("my_verifiers:is_yes"), answer) for answer in ("yes", "no")] == [1, 0]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("length", "returned 1.1; a bool, or a number from 0 to 1"),
        ("fails", "raised KeyError: 'missing'; answer 'eleven char'"),
        ("not_a_number", "returned nan"),
        ("text", "returned '1'"),
        ("nothing", "returned None"),
    ],
)
def test_what_a_python_function_does_wrong_is_an_error_with_its_name(user_module, name, problem):
    with pytest.raises(UserError, match=f"my_verifiers:{name} {problem}"):
        verifiers.python(f"my_verifiers:{name}")("", "eleven char")


def test_weighted():
    yes, no = verifiers.regex("."), verifiers.exact(["never"])
    verify = verifiers.weighted([(3, yes), (1, no), (0, no)])
    assert verify("", "x") == (0.75, "matches 'x'; the answer is 'x'; the answer is 'x'")
    assert score(verifiers.weighted([(0.1, yes)] * 7), "x") == 1


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: verifiers.exact([]), "targets"),
        (lambda: verifiers.exact([""]), "targets"),
        (lambda: verifiers.exact("Paris"), "targets"),
        (lambda: verifiers.normalized(["?!"]), "targets"),
        (lambda: verifiers.normalized(["the"], articles=True), "targets"),
        (lambda: verifiers.number(""), "target"),
        (lambda: verifiers.number("4 or 5"), "target"),
        (lambda: verifiers.number("1/0"), "target"),
        (lambda: verifiers.number(math.nan), "target"),
        (lambda: verifiers.number(1, tolerance=-1), "tolerance"),
        (lambda: verifiers.number(1, relative=math.nan), "relative"),
        (lambda: verifiers.choice("F"), "target"),
        (lambda: verifiers.choice(""), "target"),
        (lambda: verifiers.choice("A", ("A",)), "choices"),
        (lambda: verifiers.choice("yes", ("yes", "Yes")), "choices"),
        (lambda: verifiers.choice("A", ("A", "")), "choices"),
        (lambda: verifiers.regex(""), "pattern"),
        (lambda: verifiers.regex("(a"), "pattern"),
        (lambda: verifiers.json_schema("{"), "schema"),
        (lambda: verifiers.json_schema("[]"), "schema"),
        (lambda: verifiers.json_schema({"type": "int"}), "schema.type"),
        (lambda: verifiers.json_schema({"type": []}), "schema.type"),
        (lambda: verifiers.json_schema({"propertys": {}}), "schema.propertys: .*did you mean 'properties'"),
        (lambda: verifiers.json_schema({"$ref": "#/x"}), "schema.[$]ref"),
        (lambda: verifiers.json_schema({"properties": {"a": {"format": "date"}}}), "schema.properties.a.format"),
        (lambda: verifiers.json_schema({"properties": []}), "schema.properties"),
        (lambda: verifiers.json_schema({"items": {"pattern": "("}}), "schema.items.pattern"),
        (lambda: verifiers.json_schema({"items": [{}]}), "schema.items"),
        (lambda: verifiers.json_schema({"anyOf": []}), "schema.anyOf"),
        (lambda: verifiers.json_schema({"anyOf": [{}, {"minimum": "1"}]}), "schema.anyOf.1.minimum"),
        (lambda: verifiers.json_schema({"enum": []}), "schema.enum"),
        (lambda: verifiers.json_schema({"required": "name"}), "schema.required"),
        (lambda: verifiers.json_schema({"maxLength": -1}), "schema.maxLength"),
        (lambda: verifiers.json_schema({"maxLength": float("nan")}), "schema"),
        (lambda: verifiers.python("math"), "function"),
        (lambda: verifiers.python("no_such_module:f"), "function: no_such_module:f cannot be imported"),
        (lambda: verifiers.python("my_broken_verifiers:f"), "function: .*ZeroDivisionError"),
        (lambda: verifiers.python("my_verifiers:no_such"), "function: .*AttributeError"),
        (lambda: verifiers.python("my_verifiers:constant"), "function: .*is no function but int"),
        (lambda: verifiers.weighted([]), "parts"),
        (lambda: verifiers.weighted([(0, verifiers.regex("."))]), "parts"),
        (lambda: verifiers.weighted([(-1, verifiers.regex(".")), (2, verifiers.regex("."))]), "parts"),
        (lambda: verifiers.weighted([(math.inf, verifiers.regex("."))]), "parts"),
    ],
)
def test_refused_at_construction(user_module, make, field):
    with pytest.raises(ConfigError, match=f"^{field}"):
        make()


EVERY = {
    "exact": verifiers.exact(["a"]),
    "normalized": verifiers.normalized(["a b"], articles=True),
    "number": verifiers.number("1/3", tolerance=0.1),
    "boxed number": verifiers.number(2, marker=r"\boxed{", relative=0.5),
    "letters": verifiers.choice("A"),
    "words": verifiers.choice("yes", ("yes", "no"), marker=":"),
    "regex": verifiers.regex(r"\w.*\d"),
    "json": verifiers.json_schema(PERSON),
    "any json": verifiers.json_schema({"uniqueItems": True, "enum": [1, "a", [1]], "pattern": "a"}),
}
EVERY["weighted"] = verifiers.weighted([(i + 0.1, verify) for i, verify in enumerate(EVERY.values())])

anything = st.text(st.characters(), max_size=200)  # lone surrogates too
number_like = st.text("0123456789+-−.,/%eE^{}\\ ()×*x10$", max_size=60)
pieces = st.lists(
    st.sampled_from([*'{}[]",:`\n', "```\n", '{"name":', r"\boxed{", r"\frac{", "1e9", "A", "(b)", "no:", "yes", "NaN"])
).map("".join)
json_like = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(list(PERSON["properties"])), inner),
).map(verifiers.json.dumps)


@settings(max_examples=400, deadline=None)
@given(answer=anything | number_like | pieces | json_like)
def test_any_answer_gets_a_score_from_0_to_1(answer):
    for name, verify in EVERY.items():
        verdict = verify("prompt", answer)
        assert type(verdict.score) is float, name
        assert 0 <= verdict.score <= 1, name
        assert verdict.reason
        assert verify("another", answer) == verdict


@settings(max_examples=200, deadline=None)
@given(value=st.fractions() | st.integers() | st.floats(-1e300, 1e300))
def test_any_number_is_read_as_what_it_is(value):
    assert score(verifiers.number(str(value)), f"so it is {value}.") == 1


@settings(max_examples=200, deadline=None)
@given(value=st.integers(-(10**12), 10**12), places=st.integers(0, 4))
def test_any_number_with_thousands_separators(value, places):
    assert score(verifiers.number(value), f"It is {value:,.{places}f}!") == 1


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "piece", ["1", "1,", "1 ", "1/", "1.", "A ", "{", "[", "`", "```\n", "\\boxed{", "-", "(a", " "]
)
def test_long_answers_take_linear_time(name, piece):
    start = time.monotonic()
    assert EVERY[name]("", piece * (100_000 // len(piece))).score in (0, 1) or name == "weighted"
    assert time.monotonic() - start < 5
