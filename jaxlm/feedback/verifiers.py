r"""Verifiers: programs that score an answer, where right and wrong can be computed.

    verify = number("1/3", marker=r"\boxed{", tolerance=1e-3)
    verify("A third of 1?", r"It is \boxed{0.333}.")      # Verdict(score=1.0, reason="found 0.333")

A verifier is a function (prompt, answer) -> Verdict, made by a function below, which raises `ConfigError` with the
argument's name for what could never be right. Every answer gets a score in [0, 1]; only a user's own function raises.
"""

import functools
import importlib
import json
import math
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

from jaxlm.base.config import check
from jaxlm.base.errors import ConfigError, UserError, nearest

# Patterns are matched against so many characters at the most: where one takes quadratic time, that is about a second.
MOST_CHARACTERS = 10_000
# Digits of a number, and size of an exponent, at the most: exact arithmetic on 1e999999999 would fill the memory.
MOST_DIGITS = 400


class Verdict(NamedTuple):
    score: float
    """0 to 1"""
    reason: str
    """for logs and people"""


Verifier = Callable[[str, str], Verdict]


def _verdict(right: bool, reason: str) -> Verdict:
    return Verdict(1.0 if right else 0.0, reason)


def exact(targets: Sequence[str]) -> Verifier:
    """The answer is one of `targets`, character for character."""
    wanted = _texts(targets, "targets")
    return lambda prompt, answer: _verdict(answer in wanted, f"the answer is {answer[:60]!r}")


def normalized(
    targets: Sequence[str], *, case: bool = True, spaces: bool = True, punctuation: bool = True, articles: bool = False
) -> Verifier:
    """The answer is one of `targets` after both went through `normalize`; the options say which differences to ignore.

    Not for numbers: without punctuation, 3.5 is 35 and -5 is 5.
    """
    change = functools.partial(normalize, case=case, spaces=spaces, punctuation=punctuation, articles=articles)
    wanted = {change(text) for text in _texts(targets, "targets")}
    check(
        "" not in wanted, "targets", "one is empty when normalized: it would take an answer of nothing but punctuation"
    )
    return lambda prompt, answer: _verdict(
        change(answer) in wanted, f"the normalized answer is {change(answer)[:60]!r}"
    )


def normalize(
    text: str, *, case: bool = True, spaces: bool = True, punctuation: bool = True, articles: bool = False
) -> str:
    """Unicode's NFKC, then as asked for, in this order.

    `case`: casefold. `punctuation`: ASCII's (+, $ and the like among it) and Unicode's category P go, and what stood
    left and right of them joins. `articles`: the words a, an, the go. `spaces`: runs of white space become one blank,
    none at the ends.

    >>> normalize("  The  U.S.A.! ", articles=True)
    'usa'
    """
    text = unicodedata.normalize("NFKC", text)
    if case:
        text = text.casefold()
    if punctuation:
        text = "".join(c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    if articles:
        text = re.sub(r"\b(?:a|an|the)\b", "", text, flags=re.IGNORECASE)
    return " ".join(text.split()) if spaces else text


def _texts(texts: Sequence[str], field: str) -> tuple[str, ...]:
    fine = not isinstance(texts, str) and len(texts) > 0 and all(isinstance(text, str) and text for text in texts)
    check(fine, field, f"got {texts!r}; a list of one or more texts, none of them empty, is needed")
    return tuple(texts)


def _after(answer: str, marker: str) -> str:
    """What follows the last `marker`, "" without one; after one that ends in {, up to the brace that closes it."""
    rest = answer.rpartition(marker)[2] if marker and marker in answer else "" if marker else answer
    depth = 1
    for at, character in enumerate(rest if marker.endswith("{") else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:at]
    return rest


# Not inside of words, after a power sign (the 2 of cm^2) or going on another number (1.2.3). A sign is the number's own
# unless something to subtract from stands in front of it.
_NUMBER = re.compile(
    r"""(?<![A-Za-z0-9_^]) (?<!\^[-+{]) (?<!\^\{[-+]) (?<![0-9][.])
    (?P<sign>(?<![)\]}%])[-+])?[$€£]?
    (?: \\[dt]?frac\{(?P<top>[0-9]+)\}\{(?P<bottom>[0-9]+)\}
      | (?:(?P<whole>[0-9]+)[ ](?=[0-9]+/[0-9]))?
        (?P<plain>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)
        (?:[eE](?P<e>[-+]?[0-9]+)|[ ]?(?:×|x|\*|\\times|\\cdot)[ ]?10\^\{?(?P<ten>[-+]?[0-9]+)\}?)?
        (?:[ ]?/[ ]?(?P<over>[0-9]+(?:\.[0-9]+)?))?
    ) (?P<percent>[ ]?\\?%)?""",
    re.VERBOSE,
)


def number(target: str | float, *, marker: str = "", tolerance: float = 0.0, relative: float = 0.0) -> Verifier:
    r"""The last number of the answer, or the first one after its last `marker`, is within tolerance of `target`.

    Markers: "####", "answer is"; \boxed{ reaches up to the closing brace. An answer without its marker is wrong.
    |found - target| ≤ max(tolerance, relative · |target|), in exact arithmetic. Read, in target too: -1,234.5, $3, .5,
    3/4, 2 1/2, \frac{3}{4}, 50% (= .5), 1e-3, 1.5 × 10^3. Digits behind a letter (x2) or a power sign (cm^2) are no
    numbers; other arithmetic is not done (10^3 is read as 10).
    """
    match = _NUMBER.fullmatch(str(target).strip().replace("−", "-"))
    wanted = _value(match) if match else None
    if wanted is None:
        raise ConfigError("target", f"got {target!r}; a number such as 42, -1,234.5, 3/4, 50% or 1e-3 is needed")
    for field, value in (("tolerance", tolerance), ("relative", relative)):
        check(0 <= value < math.inf, field, f"got {value}; 0 or more is needed")
    allowed = max(Fraction(tolerance), Fraction(relative) * abs(wanted))

    def verify(prompt: str, answer: str) -> Verdict:
        found = list(_NUMBER.finditer(_after(answer, marker).replace("−", "-")))
        if not found:
            return Verdict(0.0, f"no number after {marker!r}" if marker else "no number")
        chosen = found[0] if marker else found[-1]
        value = _value(chosen)
        right = value is not None and abs(value - wanted) <= allowed
        return _verdict(right, f"found {chosen.group()[:60]}" + ("" if right else f", not {target}"))

    return verify


def _value(match: re.Match[str]) -> Fraction | None:
    """The number that stands there; None with a zero below the line, or too long to calculate with."""
    part = match.groupdict()
    exponent = part["e"] or part["ten"] or "0"
    below = part["bottom"] or part["over"] or "1"
    if len(match.group()) > MOST_DIGITS or abs(int(exponent)) > MOST_DIGITS or not float(below):
        return None
    above = Fraction((part["top"] or part["plain"]).replace(",", "")) * Fraction(10) ** int(exponent)
    value = (above / Fraction(below) + int(part["whole"] or 0)) / (100 if part["percent"] else 1)
    return -value if part["sign"] == "-" else value


# "A" in front of a lower-case word is the article, and "I" the pronoun, except in front of these.
_NO_ARTICLE = "is|was|and|or|not|because|since|as|over|but|would|seems|looks|if"


def choice(target: str, choices: Sequence[str] = ("A", "B", "C", "D", "E"), *, marker: str = "") -> Verifier:
    """Of `choices`, the answer (from its last `marker` on) names `target` and no other: two different ones are wrong.

    Letters count in upper case where they stand alone, in either case in brackets or as the whole answer; words in any
    case, the longest that fits.

    >>> choice("B")("", "The answer is (B).")
    Verdict(score=1.0, reason='found B')
    """
    choices = _texts(choices, "choices")
    names = {name.casefold(): name for name in choices}
    check(
        len(names) == len(choices) >= 2, "choices", f"got {', '.join(choices)}; two or more different ones are needed"
    )
    check(target in choices, "target", f"got {target!r}; one of the choices {', '.join(choices)} is needed")
    if all(len(name) == 1 and name in string.ascii_uppercase for name in choices):
        upper, both = "".join(choices), "".join(choices) + "".join(choices).lower()
        article = rf"(?<=[AI])\s+(?!(?:{_NO_ARTICLE})\b)[a-z]"
        pattern = (
            rf"(?<![\w'’])[{upper}](?![\w'’+#]|-\w|{article})|(?<=[(\[{{])[{both}](?=[)\]}}])|\A[{both}](?=[.)]?\Z)"
        )
        compiled = re.compile(pattern)
    else:
        longest_first = sorted(map(re.escape, choices), key=len, reverse=True)
        compiled = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", re.IGNORECASE)

    def verify(prompt: str, answer: str) -> Verdict:
        hits: list[str] = compiled.findall(_after(answer, marker).strip())
        found = sorted({names.get(hit.casefold(), hit) for hit in hits})
        return _verdict(found == [target], f"found {' and '.join(found)}" if found else "none of the choices is named")

    return verify


def regex(pattern: str, *, full: bool = False) -> Verifier:
    """`pattern` is found in the answer, or matches all of it (`full`). Flags go inside, as in (?i).

    Answers above `MOST_CHARACTERS` are wrong, unread. This bounds quadratic time only: (a+)+$ would hang on 40
    characters, and nothing stops Python's matcher. Write a++ or (?>a+) for what need not be tried again.
    """
    compiled = _compiled(pattern, "pattern")

    def verify(prompt: str, answer: str) -> Verdict:
        if len(answer) > MOST_CHARACTERS:
            return Verdict(0.0, f"{len(answer)} characters: more than {MOST_CHARACTERS} are not matched")
        match = compiled.fullmatch(answer) if full else compiled.search(answer)
        return _verdict(match is not None, f"matches {match.group()[:60]!r}" if match else "does not match")

    return verify


def _compiled(pattern: str, field: str) -> re.Pattern[str]:
    check(isinstance(pattern, str) and pattern != "", field, f"got {pattern!r}; a regular expression is needed")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(field, f"{pattern!r} is no regular expression: {error}") from None


def python(function: str) -> Verifier:
    """The user's own "package.module:function", imported here: (prompt, answer) -> bool, or number in [0, 1].

    What it raises, and any other result, NaN among them, is a `UserError` that names it: no score is made up.
    """
    module, _, name = function.partition(":")
    check(bool(module and name), "function", f'got {function!r}; "package.module:function" is needed')
    try:
        call = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError("function", f"{function} cannot be imported: {type(error).__name__}: {error}") from error
    check(callable(call), "function", f"{function} is no function but {type(call).__name__}")

    def verify(prompt: str, answer: str) -> Verdict:
        try:
            score = call(prompt, answer)
            value = float(score) if isinstance(score, Real) else math.nan
        except Exception as error:
            raise UserError(f"{function} raised {type(error).__name__}: {error}; answer {answer[:200]!r}") from error
        if not 0 <= value <= 1:
            raise UserError(f"{function} returned {score!r}; a bool, or a number from 0 to 1, is needed")
        return Verdict(value, f"{function} returned {score}")

    return verify


def weighted(parts: Sequence[tuple[float, Verifier]]) -> Verifier:
    """Σ weight · score / Σ weight over all parts."""
    weights = [weight for weight, _ in parts]
    fine = all(weight >= 0 for weight in weights) and 0 < sum(weights) < math.inf
    check(fine, "parts", f"got weights {weights}; numbers of 0 or more, not all of them 0, are needed")

    def verify(prompt: str, answer: str) -> Verdict:
        verdicts = [part(prompt, answer) for _, part in parts]
        score = math.fsum(w * v.score for w, v in zip(weights, verdicts, strict=True)) / math.fsum(weights)
        return Verdict(min(score, 1.0), "; ".join(verdict.reason for verdict in verdicts))

    return verify


def json_schema(schema: Mapping[str, Any] | str) -> Verifier:
    """The answer is JSON that conforms to `schema` (an object, or its JSON text); else the answer's only fenced block.

    JSON Schema 2020-12 as far as `_KEYWORDS`, `_NESTED` and `_NOTES` go; any other keyword ($ref, format) is refused,
    since a constraint passed over is none. NaN and Infinity are no JSON.
    """
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        parsed = json.loads(text, parse_constant=_no_json)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError("schema", f"is no JSON: {error}") from None
    check(isinstance(parsed, dict), "schema", f"got {parsed!r}; a JSON object is needed")
    _check_schema(parsed, "schema")

    def verify(prompt: str, answer: str) -> Verdict:
        fenced = re.findall(r"```[^\n`]*\n(.*?)```", answer, flags=re.DOTALL)
        for text in (answer, *(fenced if len(fenced) == 1 else ())):
            try:
                problem = _violation(parsed, json.loads(text, parse_constant=_no_json), "answer")
                return _verdict(not problem, problem or "conforms")
            except (ValueError, RecursionError):  # the former also for integers of more digits than Python reads, 4300
                continue
        return Verdict(0.0, "neither the answer nor its only fenced block is JSON")

    return verify


def _no_json(constant: str) -> None:
    raise ValueError(constant)


def _is(value: Any, kind: str) -> bool:
    """Whether it has JSON Schema's type `kind`: true is no number, 1.0 is an integer."""
    if kind not in ("number", "integer"):
        return isinstance(value, _TYPES[kind])
    return type(value) is int or (type(value) is float and (kind == "number" or value.is_integer()))


def _key(value: Any) -> Any:
    """Equal for equal JSON values: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return frozenset((name, _key(item)) for name, item in value.items())
    return tuple(map(_key, value)) if isinstance(value, list) else (isinstance(value, bool), value)


_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": 0, "integer": 0}
_size = lambda x: _is(x, "integer") and x >= 0
_bound = lambda x: _is(x, "number")
_listed = lambda x: x if isinstance(x, list) else [x]
_types = lambda x: x != [] and all(t in [*_TYPES] for t in _listed(x))
_names = lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x)
# Keyword: the type of values it constrains ("" all), what it can be set to (x), when a value v conforms.
_KEYWORDS: dict[str, tuple[str, Callable[[Any], bool], Callable[[Any, Any], bool]]] = {
    "type": ("", _types, lambda v, x: any(_is(v, t) for t in _listed(x))),
    "enum": ("", lambda x: isinstance(x, list) and x != [], lambda v, x: _key(v) in map(_key, x)),
    "const": ("", lambda x: True, lambda v, x: _key(v) == _key(x)),
    "minimum": ("number", _bound, lambda v, x: v >= x),
    "maximum": ("number", _bound, lambda v, x: v <= x),
    "exclusiveMinimum": ("number", _bound, lambda v, x: v > x),
    "exclusiveMaximum": ("number", _bound, lambda v, x: v < x),
    "minLength": ("string", _size, lambda v, x: len(v) >= x),
    "maxLength": ("string", _size, lambda v, x: len(v) <= x),
    "pattern": ("string", lambda x: True, lambda v, x: len(v) <= MOST_CHARACTERS and re.search(x, v) is not None),
    "minItems": ("array", _size, lambda v, x: len(v) >= x),
    "maxItems": ("array", _size, lambda v, x: len(v) <= x),
    "uniqueItems": ("array", lambda x: isinstance(x, bool), lambda v, x: not x or len({*map(_key, v)}) == len(v)),
    "required": ("object", _names, lambda v, x: all(name in v for name in x)),
}
_NESTED = ("properties", "additionalProperties", "items", "anyOf", "allOf")
_NOTES = ("$schema", "$comment", "title", "description", "default", "examples")


def _check_schema(schema: Any, path: str) -> None:
    check(isinstance(schema, dict | bool), path, f"got {schema!r}; a schema is needed")
    for keyword, x in schema.items() if isinstance(schema, dict) else ():
        at = f"{path}.{keyword}"
        known = (*_KEYWORDS, *_NESTED, *_NOTES)
        check(keyword in known, at, "this keyword is not checked here" + nearest(keyword, known))
        if keyword == "pattern":
            _compiled(x, at)
        if keyword in _KEYWORDS:
            check(_KEYWORDS[keyword][1](x), at, f"cannot be {x!r}")
        elif keyword in ("items", "additionalProperties"):
            _check_schema(x, at)
        elif keyword in _NESTED:
            kind = dict if keyword == "properties" else list
            check(isinstance(x, kind) and x != [], at, f"got {x!r}; schemas are needed")
            for name, inner in x.items() if isinstance(x, dict) else enumerate(x):
                _check_schema(inner, f"{at}.{name}")


def _violation(schema: Any, value: Any, path: str) -> str:
    """The first constraint that does not hold; "" when all do."""
    if isinstance(schema, bool):
        return "" if schema else f"{path} must not be there"
    for keyword, x in schema.items():
        kind, _, conforms = _KEYWORDS.get(keyword, ("", None, lambda v, x: True))
        if (not kind or _is(value, kind)) and not conforms(value, x):
            return f"{path} breaks {keyword} {json.dumps(x)[:60]}"
    inner = [(each, value, path) for each in schema.get("allOf", ())]
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        inner += [(known.get(name, others), item, f"{path}.{name[:40]}") for name, item in value.items()]
    if isinstance(value, list):
        inner += [(schema.get("items", True), item, f"{path}.{at}") for at, item in enumerate(value)]
    problem = next(filter(None, (_violation(*each) for each in inner)), "")
    if not problem and "anyOf" in schema and all(_violation(each, value, path) for each in schema["anyOf"]):
        return f"{path} fits none of anyOf"
    return problem
