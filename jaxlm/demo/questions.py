"""Questions about the installed documentation: chats, rankings and tasks out of real docstrings, without download.

    >>> next(chats(["textwrap"], "train"))
    {"kind": "what", "name": "textwrap.TextWrapper", "messages": [
        {"role": "user", "content": "What does `textwrap.TextWrapper` do?"},
        {"role": "assistant", "content": "`textwrap.TextWrapper`: Object for wrapping/filling text."}]}

A function (or class) is in training or held out, with all that is asked of it. A held-out function's document is
pretrained on like any other, but its name and summary stand in no train chat, ranking or task: neither as question nor
as answer, wrong answer, neighbour or distractor. So what is right about it was not learnt from tuning. Of those in
training, the rankings are about all, the chats about some, the prompts and tasks about the others: a policy is
reinforced where it has no answer by heart (InstructGPT kept its prompts apart too: arXiv:2203.02155, table 6). Train
and held-out sources must list the same modules: these decide under which name an object is known.

Choices are drawn by name (`_dice`): they depend on no order, and on other functions only where another one is shown.
"""

import contextlib
import functools
import inspect
import itertools
import random
import re
import sys
import types
import warnings
import zlib
from collections import Counter
from collections.abc import Collection, Container, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from jaxlm.base.errors import UserError
from jaxlm.demo import documentation
from jaxlm.text.config import Split

# Eighths of the functions. Of the demo's 3,700 466 are held out: a share is known to ±2.3 % (1 σ).
EIGHTHS = {"heldout": (0,), "chats": (1, 2, 3, 4, 5), "prompts": (6, 7), "rankings": (1, 2, 3, 4, 5, 6, 7)}
LONG_SIGNATURE, LONG_TARGET = 80, 20  # characters; 20 are 1 to 6 of the demo's tokens
SUMMARY, LEAST_WORDS = (20, 160), 4  # characters; different words: fewer can hardly be halved or shuffled

WHAT = ("What does `{}` do?", "What is `{}` for?", "Describe `{}`.", "Explain `{}` in one sentence.")
CALL = ("How is `{}` called?", "What is the signature of `{}`?", "Show how to call `{}`.")
MODULE = ("Which module holds `{}`?", "From which module is `{}` imported?", "Where is `{}` found?")
MORE = {
    "what": ("And what does it do?", "What is it for?", "Describe it."),
    "call": ("And how is it called?", "What is its signature?", "Show how to call it."),
    "module": ("Which module holds it?", "And where is it found?"),
}
ANOTHER = ("And `{}`?", "And what does `{}` do?", "What about `{}`?")
SYSTEM = ("Answer questions about Python's libraries.", "You know Python's documentation. Answer briefly.")
FORMS = (
    ("in square brackets", "[{}]"),
    ("in round brackets", "({})"),
    ("in double quotes", '"{}"'),
    ("as module=NAME", "module={}"),
)
TIERS = {
    "overall": (("real",), ("truncated",), ("invented",), ("other", "shuffled")),
    "helpful": (("real",), ("invented",), ("truncated",), ("other", "shuffled")),
    "truthful": (("real", "truncated", "other"), ("invented", "shuffled")),
}
SECOND_OPINION = (("real",), ("invented",), ("truncated",), ("other",), ("shuffled",))
INVENTED = ("get_{}", "make_{}", "to_{}", "fast_{}", "{}_all", "{}_like", "{}_from", "{}s", "{}2")
SPLICED = 2 / 3  # of invented names: so small models go wrong, beginning a name and losing it
HASTY = 2 / 3  # of those who write the answers to "what" and to tasks

_NO_PROSE = re.compile(r">>>|--|==|::|\.\. |\\|~~|\*\*\*| \| | -> |://")
_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!\bcf)\.(?=\s+[^a-z]|\s*$)")
# Addresses, sets and paths differ between processes and machines; (*args, **kwargs) says nothing.
_NO_SIGNATURE = re.compile(r"<|0x|set\(\{|['\"]/\w|\A\(\*args, \*\*kwargs\)\Z")


class Function(NamedTuple):
    """A documented function or class, such as "textwrap.dedent": the module as listed, and the object."""

    name: str
    module: str
    object: str
    signature: str
    """ "(text)", without annotations; empty where there is none that can be shown."""
    parameters: tuple[str, ...]
    """The signature's names, without those of *args and **kwargs."""
    summary: str
    """The docstring's first sentence, in one line, with its period."""

    @property
    def answer(self) -> str:
        return f"`{self.name}`: {self.summary}"

    @property
    def unfinished(self) -> str:
        """The answer of somebody in a hurry: the first half of the summary's words, and no period."""
        words = self.summary.removesuffix(".").split()
        return f"`{self.name}`: {' '.join(words[: len(words) // 2])}".rstrip(".,;:")


def functions(modules: Collection[str], field: str = "modules") -> list[Function]:
    """The functions and classes of the modules that have a usable summary, sorted by name, each object once.

    Raises UserError, naming the config's `field`, for a module that cannot be imported.
    """
    return list(_functions(tuple(sorted(set(modules))), field))


@functools.lru_cache(maxsize=4)
def _functions(modules: tuple[str, ...], field: str) -> tuple[Function, ...]:
    found = {}
    for module in modules:
        for name, value in documentation.public(whole_module(module, field)):
            found[f"{module}.{name}"] = (module, name, value)
    firsts = {id(value): name for name, (_, _, value) in sorted(found.items(), reverse=True)}
    return tuple(f for name in sorted(firsts.values()) if (f := _function(*found[name])))


def whole_module(name: str, field: str) -> types.ModuleType:
    """The module with what it only makes when asked for (concurrent.futures.ThreadPoolExecutor): otherwise it would
    depend on what the process did before, what it offers."""
    module = documentation.import_module(name, field)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in vars(module).get("__all__") or ():
            with contextlib.suppress(Exception):  # foreign code
                getattr(module, each)
    return module


def _function(module: str, name: str, value: object) -> Function | None:
    summary = _summary(_prose(documentation.docstring(value), name))
    return Function(f"{module}.{name}", module, name, *_signature(value), summary) if summary else None


def _prose(text: str, name: str) -> str:
    """The first paragraph in one line, without Sphinx's marks and what C functions begin with: "name(x) -> y"."""
    text = re.sub(r"\A(?:[\w.]+\((?:[^()]|\([^()]*\))*\) *(?:->.*)?(?:\n+|\Z))+", "", text)
    text = " ".join(text.split("\n\n")[0].replace("``", "`").split())
    text = re.sub(r":[a-z:]+:`[~!]?([^`]*?)(?: ?<[^`<>]*>)?`", r"`\1`", text).replace("`~", "`")
    text = re.sub(r"`([^`<]+?) ?<[^`]*>`_+", r"\1", text)
    own = re.match(r"`?(?:[\w.]*\.)?(\w+)`? ?(?::|=|--?) ", text)
    return text[own.end() :] if own and own[1] == name else text


def _summary(prose: str) -> str:
    """The first sentence; empty where it is none, or does not read well alone."""
    end = _END.search(prose)
    text = prose[: end.start()] if end else prose
    fine = re.fullmatch(r"[A-Z0-9`].*[\w)`\"'%]", text) and not _NO_PROSE.search(text) and text.count("`") % 2 == 0
    balanced = all(text.count(left) == text.count(right) for left, right in ("()", "[]", "{}"))
    short = SUMMARY[0] <= len(text) + 1 <= SUMMARY[1] and len(set(_words(text))) >= LEAST_WORDS
    return f"{text}." if fine and balanced and short else ""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _signature(value: Any) -> tuple[str, tuple[str, ...]]:
    """("(text, width=70)", ("text", "width")); ("", ()) where it cannot be had or shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = inspect.signature(value)
        kept = [p.replace(annotation=p.empty) for n, p in found.parameters.items() if n not in ("self", "cls")]
        text = str(found.replace(parameters=kept, return_annotation=found.empty))
    except Exception:  # there is none, or foreign code raised: a default's repr can raise anything
        return "", ()
    if len(text) > LONG_SIGNATURE or _NO_SIGNATURE.search(text):
        return "", ()
    return text, tuple(p.name for p in kept if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


Part = Literal["chats", "prompts", "rankings"]


def _split(modules: Collection[str], split: Split, part: Part, field: str) -> list[Function]:
    """The split's functions; of train's those of the `part`, without any that names a held-out one or says the same."""
    eighth = {each: zlib.crc32(each.name.encode()) % 8 for each in functions(modules, field)}
    heldout = [each for each, number in eighth.items() if number in EIGHTHS["heldout"]]
    if split == "heldout":
        return heldout
    names, told = {each.name for each in heldout}, {each.summary for each in heldout}
    rest = [each for each, number in eighth.items() if number in EIGHTHS[part] and each.summary not in told]
    return [each for each in rest if not _tells(f"{each.name}{each.signature} {each.summary}", names)]


def _tells(text: str, names: Container[str]) -> bool:
    """Whether one of the names stands in the text, also as a part of another (numpy.add in jax.numpy.add.at)."""
    dotted = (each.split(".") for each in re.findall(r"\w+(?:\.\w+)+", text))
    spans = ((parts, *span) for parts in dotted for span in itertools.combinations(range(len(parts) + 1), 2))
    return any(".".join(parts[begin:end]) in names for parts, begin, end in spans)


def _dice(*names: str) -> random.Random:
    """Random numbers by name. (Not by crc32: its values for "call/x" and "what/x" differ by a constant for all x.)"""
    return random.Random("/".join(names))


def chats(modules: Collection[str], split: Split, field: str = "modules") -> Iterator[dict[str, Any]]:
    """{"kind", "name", "messages"} for each function of the split.

    | kind | question | answer | for which of train |
    | --- | --- | --- | --- |
    | what | What does `textwrap.dedent` do? | `textwrap.dedent`: Remove any … in `text`. | all |
    | call | How is `textwrap.dedent` called? | `textwrap.dedent(text)`. | those with a signature |
    | module | Which module holds `dedent`? | `textwrap`. | those whose object has no namesake |
    | task | one of `tasks` | its target | all |
    | turns | 2 or 3 of the first three, about one function or two | | a quarter |

    Each is asked in one of several ways; an eighth of train's begin with a system message. Held out: single turns, no
    system message and a task for all, so that each kind measures one thing.

    Of those who write train's answers, `HASTY` are in a hurry: they stop half-way (`Function.unfinished`), and they
    overlook in which form a task wants its answer ("`70`." for 70). Tuning learns to answer from them all the same;
    which answers are wanted is what rankings and verifiers tell. Held out, all answers are as they should be.
    """
    own, loaded = _split(modules, split, "chats", field), [whole_module(name, field) for name in {*modules}]
    objects = Counter(name for module in loaded for name, _ in documentation.public(module))
    for place, function in enumerate(own):
        dice = _dice("chats", function.name)
        hasty = split == "train" and dice.random() < HASTY
        asked = {"what": (dice.choice(WHAT).format(function.name), function.unfinished if hasty else function.answer)}
        if function.signature:
            asked["call"] = (dice.choice(CALL).format(function.name), f"`{function.name}{function.signature}`.")
        if objects[function.object] == 1:
            asked["module"] = (dice.choice(MODULE).format(function.object), f"`{function.module}`.")
        made = [(kind, [turn]) for kind, turn in asked.items()]
        if tasks := _tasks(function):
            _, prompt, target, bare = dice.choice(tasks)
            made.append(("task", [(prompt, f"`{bare}`." if hasty else target)]))
        if split == "train" and dice.random() < 1 / 4:
            made.append(("turns", _turns(dice, asked, own[(place + 1) % len(own)])))
        for kind, turns in made:
            system = dice.choice(SYSTEM) if split == "train" and dice.random() < 1 / 8 else ""
            if kind != "turns" or len(turns) > 1:
                yield {"kind": kind, "name": function.name, "messages": _messages(turns, system)}


def _turns(dice: random.Random, asked: dict[str, tuple[str, str]], other: Function) -> list[tuple[str, str]]:
    """All that is asked of one function, by name the first time; or what it does, and what the `other` one does."""
    if dice.random() < 1 / 3 and other.answer != asked["what"][1]:
        return [asked["what"], (dice.choice(ANOTHER).format(other.name), other.answer)]
    kinds = dice.sample([*asked], len(asked))
    return [asked[kinds[0]], *((dice.choice(MORE[kind]), asked[kind][1]) for kind in kinds[1:])]


def _messages(turns: Sequence[tuple[str, ...]], system: str = "") -> list[dict[str, str]]:
    said = [(("user", "assistant")[i], text) for turn in turns for i, text in enumerate(turn)]
    return [{"role": role, "content": text} for role, text in [("system", system)] * bool(system) + said]


def prompts(modules: Collection[str], split: Split, field: str = "modules") -> Iterator[dict[str, Any]]:
    """{"name", "prompt"}: "What does `textwrap.dedent` do?", to be answered by a policy, asked as `rankings` ask it."""
    for function in _split(modules, split, "prompts", field):
        yield {"name": function.name, "prompt": _dice("prompts", function.name).choice(WHAT).format(function.name)}


def tasks(modules: Collection[str], split: Split, field: str = "modules") -> Iterator[dict[str, Any]]:
    """{"kind", "name", "prompt", "target": [text]}: open-book questions, for the verifier exact.

    | kind | prompt | target |
    | --- | --- | --- |
    | first | Name the first parameter of `textwrap.dedent(text)`. Answer with the name alone. | text |
    | default | What is the default of `width` in `textwrap.wrap(text, width=70)`? Answer with the value alone. | 70 |
    | module | Which module holds `textwrap.dedent`? Answer with the module alone. | textwrap |
    | format | Which module holds `textwrap.dedent`? Answer in square brackets. | [textwrap] |

    The answer stands in the prompt, whose last sentence says in which form it is wanted. The train chats of the kind
    task teach these forms.
    """
    for function in _split(modules, split, "prompts", field):
        for kind, prompt, target, _ in _tasks(function):
            yield {"kind": kind, "name": function.name, "prompt": prompt, "target": [target]}


def _tasks(function: Function) -> list[tuple[str, str, str, str]]:
    """(kind, prompt, answer, and that without the form)"""
    dice, called, names = _dice("tasks", function.name), function.name + function.signature, function.parameters
    wanted, form = dice.choice(FORMS)
    asked = f"Which module holds `{function.name}`? Answer"
    made = [("module", f"{asked} with the module alone.", function.module, function.module)]
    made.append(("format", f"{asked} {wanted}.", form.format(function.module), function.module))
    if names and not re.search(r"\*\w", function.signature):
        asked = f"Name the first parameter of `{called}`. Answer with the name alone."
        made.append(("first", asked, names[0], names[0]))
    # Words and whole numbers: a verifier that ignores punctuation takes 5 for 0.5 and -5.
    defaults = [pair for pair in re.findall(r"(\w+)=(\w+)(?=[,)])", function.signature) if pair[0] in names]
    if defaults:
        name, value = dice.choice(defaults)
        asked = f"What is the default of `{name}` in `{called}`? Answer with the value alone."
        made.append(("default", asked, value, value))
    return [each for each in made if each[2].strip("_") and len(each[2]) <= LONG_TARGET]


def _other(dice: random.Random, function: Function, own: Sequence[Function]) -> Function | None:
    """Another function of the split, for which the right one cannot be taken."""
    tries = (dice.choice(own) for _ in range(20))
    taken = (function.object.replace("_", "").lower(), function.summary)
    return next((o for o in tries if o.object.replace("_", "").lower() != taken[0] and o.summary != taken[1]), None)


def rankings(modules: Collection[str], split: Split, field: str = "modules") -> Iterator[dict[str, Any]]:
    """Records for `feedback.rankings.parse`: what a function does, the real answer and 2 to 4 worse ones, ranked.

    | policy | answer | overall | helpful | truthful |
    | --- | --- | --- | --- | --- |
    | real | the docstring's | 1 | 1 | 1 |
    | truncated | the first half of its words, no period | 2 | 3: half is missing | 1: what it says is true |
    | invented | the real text under a name that is none | 3: leads astray | 2: explains all of it | 2 |
    | other | another function's answer | 4 | 4: was not asked for | 1: true of what it names |
    | shuffled | the real words, hardly two of them neighbours as before | 4 | 4 | 2 |

    `ann` ranks so, `bo` too but for a quarter of the records, where overall is `SECOND_OPINION`. A tenth of bo's are
    drafts that still have the order shown: they must not train.
    """
    own = _split(modules, split, "rankings", field)
    heldout = {each.name for each in _split(modules, "heldout", "rankings", field)}
    for function in own:
        dice, words = _dice("rankings", function.name), function.summary.removesuffix(".").split()
        orders = (["", *dice.sample(words, len(words)), ""] for _ in range(20))
        pairs = {*itertools.pairwise(["", *words, ""])}
        mixed = min(orders, key=lambda order: len(pairs & {*itertools.pairwise(order)}))[1:-1]
        answers = {
            "truncated": function.unfinished,
            "invented": f"`{_invented(dice, function, own, heldout)}`: {function.summary}",
            "shuffled": f"`{function.name}`: {' '.join(mixed)}.",
        }
        if other := _other(dice, function, own):
            answers["other"] = other.answer
        chosen = ["real", *dice.sample([*answers], min(dice.randint(2, 4), len(answers)))]
        ids = dict(zip(dice.sample(chosen, len(chosen)), "abcde", strict=False))
        answers["real"] = function.answer
        yield {
            "prompt_id": function.name,
            "messages": _messages([(dice.choice(WHAT).format(function.name),)]),
            "completions": [{"id": id, "content": answers[policy], "policy": policy} for policy, id in ids.items()],
            "annotations": [_annotation(dice, annotator, ids) for annotator in ("ann", "bo")],
        }


def _invented(dice: random.Random, function: Function, own: Sequence[Function], heldout: Container[str]) -> str:
    """A plausible name that the module does not have: the object's changed, or begun and ended with another's."""
    forms = itertools.chain(dice.sample(INVENTED, len(INVENTED)), map("{{}}{}".format, itertools.count(3)))
    objects = [form.format(function.object) for form in itertools.islice(forms, len(INVENTED) + 5)]
    other = dice.choice(own).object
    spliced = function.object[: dice.randint(1, len(function.object))] + other[dice.randrange(len(other)) :]
    if dice.random() < SPLICED:
        objects.insert(0, spliced)
    names = (f"{function.module}.{name}" for name in objects if name not in vars(sys.modules[function.module]))
    return next(name for name in names if not _tells(name, heldout))


def _annotation(dice: random.Random, annotator: str, ids: dict[str, str]) -> dict[str, Any]:
    """What an annotator says; `ids` are {policy: id}."""
    shown = dice.sample([*ids.values()], len(ids))
    made = {"id": annotator, "annotator": annotator, "role": "trainer", "shown": shown}
    if annotator == "bo" and dice.random() < 1 / 10:
        return made | {"status": "draft", "rankings": {"overall": [[id] for id in shown]}}
    differs = annotator == "bo" and dice.random() < 1 / 4
    rules = TIERS | ({"overall": SECOND_OPINION} if differs else {})
    ranked = {name: [[ids[p] for p in tier if p in ids] for tier in rule] for name, rule in rules.items()}
    rankings = {name: [tier for tier in tiers if tier] for name, tiers in ranked.items()}
    return made | {"status": "approved" if dice.random() < 1 / 4 else "submitted", "rankings": rankings}


def gold(prompt: str, answer: str) -> float:
    """The rule's own score in [0, 1] of an answer to "What does `X` do?", which a reward model only approaches.

    A third each for the form (a name in backticks, text, a period, in one line), for the prompt's name in it, and for
    the overlap with the true summary: F1 of words and of neighbouring pairs, without which shuffled words would count
    as much as the sentence. Means of the `rankings`' answers: real 1, shuffled .85, invented .67, truncated .53, other
    .35. It is measured beside a reward model and never trained on: VerifierConfig(kind="function",
    function="jaxlm.demo.questions:gold"). The module of the prompt's first name in backticks is imported (only give
    it prompts that you trust); where it has no such function, the overlap is 0.
    """
    asked, given = re.search(r"`(\w+(?:\.\w+)+)", prompt), re.match(r"`([^`\s]+)`:?", answer)
    form = re.fullmatch(r"`[^`\s]+`[^\n]*\.", answer) is not None
    named = asked is not None and given is not None and asked[1] == given[1]
    texts = (answer[given.end() :] if given else answer, _true_summary(asked[1]) if asked else "")
    said, true = (Counter([*words, *itertools.pairwise(words)]) for words in map(_words, texts))
    return (form + named + 2 * (said & true).total() / max(said.total() + true.total(), 1)) / 3


@functools.cache
def _true_summary(name: str) -> str:
    module, _, object_name = name.rpartition(".")
    try:
        value = vars(whole_module(module, "prompt")).get(object_name)
    except UserError:
        return ""
    function = _function(module, object_name, value) if value is not None else None
    return function.summary if function else ""
