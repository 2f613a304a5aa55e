"""Chat text → ids and loss mask, in this one place: what training counts is what sampling is asked for.

>>> load("chatml", tokenizer).encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}])

    ids      <s> <|im_start|> u s e r \\n H i <|im_end|> \\n <|im_start|> a s s i s t a n t \\n Y e s <|im_end|> \\n
    targets   0       0       0 0 0 0  0 0 0     0       0       0       0 0 0 0 0 0 0 0 0  0 1 1 1     1       0
    messages -1       0       0 0 0 0  0 0 0     0       0       1       1 1 1 1 1 1 1 1 1  1 1 1 1     1       1

Templates are Hugging Face's, in Jinja: any model's renders as it does there. The text is cut at special tokens and at
the borders of answers, and each part is encoded alone, so that `prompt(messages[:i])` begins `encode(messages).ids`.

A template is foreign code. It runs in Jinja's sandbox (no private attributes, no changing of its arguments, ranges up
to 100,000), begins at most `MOST_ROUNDS` rounds of loops and macros, and makes nothing large by `*` and `**`. Memory is
not bounded beyond that: a text doubled by `~` in a loop can exhaust it.
"""

import contextvars
import datetime
import functools
import hashlib
import itertools
import json
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from etils import epath
from jaxtyping import Bool, Int32
from jinja2 import ext, nodes, parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxlm.base.errors import UserError, nearest
from jaxlm.tokenizer.tokenizer import Tokenizer

FILE_NAME = "chat_template.jinja"
ASSISTANT = "assistant"
MOST_ROUNDS = 1_000_000
# Unicode keeps these for a program's inner use. INNER comes into a special token's name that a message says, after its
# first character, so that it is not taken for the token; BEGIN and END stand around what {% generation %} holds.
INNER, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
# What only ever names a special token: <|any|> (DeepSeek: with wide bars), and names in plain angles of known models.
_NAMED = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|</?s>|<(?:bos|eos|pad)>|<(?:start|end)_of_\w+>")
_MEND = "put {% generation %} and {% endgeneration %} around what the assistant writes, its stop token included"

Message = Mapping[str, Any]
Ends = list[int | None]  # where messages[:i] end in the rendered text; None: it does not begin as these do alone
Block = tuple[int, int]  # begin and end in the rendered text
Target = tuple[int, int, int]  # the same, and the index of the assistant's message
_REASONING = ("reasoning_content", "thinking", "reasoning")
_ANSWERS = ("answer number one", "answer number two")
_PROBE = [{"role": role, "content": text} for a in _ANSWERS for role, text in (("user", "question"), (ASSISTANT, a))]


class Encoded(NamedTuple):
    ids: Int32[np.ndarray, " S"]
    targets: Bool[np.ndarray, " S"]
    """The assistant's content and its stop token, nothing else: to predict these is what is learnt."""
    messages: Int32[np.ndarray, " S"]
    """Index of the message that a token begins in, or is added to by the template; -1: BOS, and where it is not known,
    because the template writes these messages in another way once more follow. Targets have theirs."""


class ChatTemplate:
    """A Jinja template for one tokenizer; `load` gives those that come with jaxlm."""

    def __init__(self, source: str, tokenizer: Tokenizer, where: str = "chat_template"):
        """Raises UserError, in which `where` names the template: for one that cannot be parsed, that breaks on a simple
        conversation, or that names special tokens which `tokenizer` does not have."""
        self.source, self.hash = source, hashlib.sha256(source.encode()).hexdigest()
        self._where, self._tokenizer, self._token_bytes = where, tokenizer, tokenizer.token_bytes()
        known = tokenizer.special_ids
        names = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
        self._special = re.compile(f"(?:{names})(?!{INNER})")
        self._special_begins = re.compile(f"(?s)(?={names}).")
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": known.get("<unk>")}
        self._variables = {f"{kind}_token": name for kind, id in ids.items() for name in known if known[name] == id}

        self._template, tree = _compile(source, where)
        literals, used, asked = _contents(tree)
        self._has_blocks = BEGIN in literals
        self.reads_clock = "strftime_now" in used
        if lacking := {"bos_token", "eos_token"} & used - asked - {*self._variables}:
            raise self._error(f"uses {min(lacking)}, but the tokenizer has none; take it out, or use another tokenizer")
        probe, _ = self._render(_PROBE, False)
        stops = [self._special.search(probe, probe.find(answer)) for answer in _ANSWERS if answer in probe]
        self.stop_ids = tuple(dict.fromkeys(known[stop[0]] for stop in stops if stop))
        if missing := {name for text in (*literals, probe) for name in _NAMED.findall(text)} - {*known}:
            raise self._error(
                f"names {', '.join(sorted(missing))}, which would be spelled out: the tokenizer's special tokens are "
                f"{', '.join(known)}; change the template, or train a tokenizer with special_tokens"
            )

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Any = None,
        **variables: Any,
    ) -> str:
        """The text, as transformers' `apply_chat_template(..., tokenize=False)` renders it; `tools`: JSON schemas.

        `continue_final_message`: it ends with the last message's content, for the model to go on with. Raises UserError
        where the template does not write that, or where both are asked for.
        """
        plain = _checked(messages)
        if not continue_final_message:
            return self._render(plain, add_generation_prompt, tools=tools, **variables)[0]
        if add_generation_prompt:
            raise self._error("continue_final_message and add_generation_prompt: ask for one of them")
        # A mark after the content, with a space that a template which trims contents takes away.
        content = plain[-1]["content"]
        marked = [*plain[:-1], {**plain[-1], "content": f"{content}{INNER} "}]
        text, mark, after = self._render(marked, False, tools=tools, **variables)[0].rpartition(INNER)
        if not mark or content.strip() not in text:
            raise self._error(f"does not write the last message's {content[:40]!r}, so that none can go on with it")
        return text if after.startswith(" ") else text.rstrip()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant's answer is drawn: BOS, the conversation, the generation prompt."""
        return self._encode(messages, opened=True).ids.tolist()

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """A whole conversation, to train on.

        Raises UserError where it is not certain what the assistant wrote, or with which token it ended.
        """
        return self._encode(messages, opened=False)

    def _encode(self, messages: Sequence[Message], opened: bool) -> Encoded:
        plain = _checked(messages)
        guarded = self._guarded(plain)
        text, blocks = self._render(guarded, opened)
        if guarded != plain and text.replace(INNER, "") != self._render(plain, opened)[0]:
            raise self._error("looks into messages for special tokens, and these say some, which must stay text")
        ends, openings = self._beginnings(guarded, text, opened)
        found = [self._answer(i, guarded[i]["content"], text, begin, ends[i + 1]) for i, begin in openings.items()]
        failed = [answer for answer in found if isinstance(answer, UserError)]
        targets = [answer for answer in found if not isinstance(answer, UserError)]
        borders = [*openings.values(), *(at for begin, end, *_ in (*targets, *blocks) for at in (begin, end))]
        if self._has_blocks and not opened:
            targets = self._block_targets(text, blocks, ends, [*openings])
        elif failed and not opened:
            raise failed[0]
        return self._assemble(text, {at for at in borders if at is not None}, ends, targets)

    def _beginnings(self, messages: list[Message], text: str, opened: bool) -> tuple[Ends, dict[int, int | None]]:
        """Where messages[:i], rendered alone, end in `text`, and where the prompts for the assistant's messages do."""

        def length(count: int, opened: bool) -> int | None:
            try:
                beginning, _ = self._render(messages[:count], opened)
            except UserError:  # such as for a conversation of nothing but a system message
                return None
            return len(beginning) if text.startswith(beginning) else None

        last = length(len(messages), False) if opened else len(text)
        ends = [0, *(length(count, False) for count in range(1, len(messages))), last]
        return ends, {i: length(i, True) for i, message in enumerate(messages) if message["role"] == ASSISTANT}

    def _answer(self, index: int, content: str, text: str, begin: int | None, end: int | None) -> Target | UserError:
        """What of `text` the assistant wrote, its stop token included; or why that is not certain."""
        stop = self._special.search(text, begin, end) if begin is not None and end is not None else None
        if begin is None or end is None:
            problem = "is written in another way when messages follow it, or the prompt for it is"
        elif not stop or self._tokenizer.special_ids[stop[0]] not in self.stop_ids:
            first = f"{stop[0]}, which ends no answer" if stop else "none"
            problem = f"has no stop token: the first special token after the prompt for it is {first}"
        elif content.strip() not in text[begin : stop.start()]:
            problem = "is not written as its content says"
        else:
            return begin, stop.end(), index
        return self._error(f"messages[{index}], the assistant's, {problem}; in the template, {_MEND}")

    def _block_targets(self, text: str, blocks: list[Block], ends: Ends, answers: list[int]) -> list[Target]:
        """The {% generation %} blocks, each with its message."""
        if answers and not blocks:
            raise self._error(f"renders no {{% generation %}} block, so that nothing would be learnt; {_MEND}")
        owners = [_owner(ends, begin) for begin, _ in blocks]
        messages = answers if -1 in owners and len(answers) == len(blocks) else owners
        for (begin, end), message in zip(blocks, messages, strict=True):
            if not any(special.end() == end for special in self._special.finditer(text, begin, end)):
                raise self._error(
                    f"messages[{message}]: its {{% generation %}} block ends in {text[begin:end][-12:]!r}, which is no "
                    "special token; let the stop token be the last in it, so that the model learns to stop there"
                )
        return [(*block, message) for block, message in zip(blocks, messages, strict=True)]

    def _assemble(self, text: str, cuts: set[int], ends: Ends, targets: list[Target]) -> Encoded:
        """The ids of `text`, part by part, with what each token is."""
        ids, wanted, messages = [], [], []
        cuts = cuts | {0, len(text)} | {at for special in self._special.finditer(text) for at in special.span()}
        for begin, end in itertools.pairwise(sorted(cuts)):
            id = self._tokenizer.special_ids.get(text[begin:end])
            part = self._tokenizer.encode(text[begin:end].replace(INNER, "")) if id is None else [id]
            message = next((message for first, last, message in targets if first <= begin and end <= last), None)
            ids += part
            wanted += [message is not None] * len(part)
            messages += self._owners(text, begin, end, part, ends) if message is None else [message] * len(part)
        bos = self._tokenizer.bos_id
        if bos is not None:
            if ids[:1] != [bos]:
                ids, wanted, messages = [bos, *ids], [False, *wanted], [-1, *messages]
            messages[0] = -1
            # Where one token both begins texts and ends answers, there is no telling what a second one is.
            if ids.count(bos) > 1 and bos != self._tokenizer.eos_id and bos not in self.stop_ids:
                raise self._error(
                    f"writes {self._tokenizer.piece(bos)}, the beginning of text, twice, or not at the beginning; take "
                    "it out of the template's loop, or out altogether: it is put in front anyway"
                )
        return Encoded(np.array(ids, np.int32), np.array(wanted, np.bool_), np.array(messages, np.int32))

    def _owners(self, text: str, begin: int, end: int, ids: list[int], ends: Ends) -> list[int]:
        """The message that each token of the part text[begin:end] begins in."""
        borders = [begin, *sorted(border for border in ends if border is not None and begin < border < end)]
        owners = [_owner(ends, border) for border in borders]
        if len(owners) == 1:
            return owners * len(ids)
        sizes = [len(text[begin:border].replace(INNER, "").encode()) for border in (*borders[1:], end)]
        # Counted from the end of the part: a tokenizer that puts a space in front counts its byte too.
        starts = sizes[-1] - np.cumsum(self._token_bytes[ids][::-1])[::-1]
        return [owners[place] for place in np.searchsorted(sizes[:-1], starts, side="right")]

    def _guarded(self, value: Any) -> Any:
        """The same with INNER in every special token's name that it says."""
        if isinstance(value, str):
            return self._special_begins.sub(rf"\g<0>{INNER}", value) if self._special.search(value) else value
        if isinstance(value, list):
            return [self._guarded(item) for item in value]
        if isinstance(value, dict):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        return value

    def _render(self, messages: Sequence[Message], opened: bool, **variables: Any) -> tuple[str, list[Block]]:
        """(the text, where its {% generation %} blocks begin and end). Raises UserError for whatever goes wrong."""
        fixed = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": opened}
        _rounds.set(itertools.count(1))
        try:
            marked = self._template.render({**self._variables, **fixed, **variables})
        except Exception as error:  # foreign code: it can raise anything
            if type(error) is jinja2.TemplateError:  # from raise_exception; Jinja's own are of its subclasses
                raise self._error(f"refuses the conversation: {error}") from error
            # Jinja gives the template's code this file name.
            lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == "<template>"]
            where = f"line {lines[-1]} " if lines else ""
            raise self._error(f"{where}fails with {type(error).__name__}: {error}") from error
        parts = re.split(f"[{BEGIN}{END}]", marked)
        if "".join(re.findall(f"[{BEGIN}{END}]", marked)).replace(BEGIN + END, ""):
            raise self._error("has {% generation %} within {% generation %}; one of them is enough")
        borders = [*itertools.accumulate(map(len, parts))]
        return "".join(parts), [*zip(borders[:-1:2], borders[1::2], strict=True)]

    def _error(self, problem: str) -> UserError:
        return UserError(f"{self._where}: {problem}")


def load(name_or_path: epath.PathLike, tokenizer: Tokenizer) -> ChatTemplate:
    """One that comes with jaxlm ("chatml", "llama2", "llama3"), or that of a .jinja file."""
    shipped = {path.stem: path for path in sorted((epath.Path(__file__).parent / "templates").glob("*.jinja"))}
    path = shipped.get(str(name_or_path), epath.Path(name_or_path))
    if not path.exists() or path.is_dir():
        raise UserError(f"chat_template: got {str(path)!r}, no file and no template{nearest(str(path), shipped)}")
    try:
        return ChatTemplate(path.read_bytes().decode(), tokenizer, f"chat_template {name_or_path}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8: {error}") from error


def _checked(messages: Sequence[Message]) -> list[Message]:
    """A copy of the messages without keys that are null. Raises UserError for what is no conversation."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"messages: got {messages!r}; a list of at least one object with role and content is needed")
    copies = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: got {message!r}; an object with role and content is needed")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(f"{where}.{key}: got {message.get(key)!r}; a string is needed")
        try:
            said = json.dumps({key: value for key, value in message.items() if value is not None}, ensure_ascii=False)
            said.encode()
        except (TypeError, ValueError) as error:  # one of them: half a UTF-16 pair
            raise UserError(f"{where}: holds what is no JSON or no Unicode: {error}") from error
        if found := re.search(f"[{INNER}{BEGIN}{END}]", said):
            raise UserError(f"{where}: holds U+{ord(found[0]):X}, which no text has and jaxlm uses inside; take it out")
        copy = json.loads(said)
        # As transformers gives it to templates, whatever it is called.
        thought = next((copy[name] for name in _REASONING if name in copy), None)
        copies.append(copy if thought is None else {"thinking": thought} | copy | {"reasoning_content": thought})
    return copies


def _owner(ends: Ends, at: int) -> int:
    """The message that the character `at` belongs to; -1: not known."""
    after = next((count for count, end in enumerate(ends) if end is not None and end > at), 0)
    return after - 1 if after and ends[after - 1] is not None else -1


# From here on: Jinja, as chat templates know it.

_rounds: contextvars.ContextVar[Iterator[int]] = contextvars.ContextVar("rounds begun in this rendering")


class _Generation(ext.Extension):
    """{% generation %}…{% endgeneration %}: the text inside, between two marks, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END))
        return [begin, nodes.Scope(body, lineno=line), end]


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"{attribute!r} of {type(obj).__name__!r} is not open to templates")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        texts = [side for side in (left, right) if isinstance(side, str | list | tuple)]
        sizes = [len(side) if side in texts else abs(side) if isinstance(side, int) else 1 for side in (left, right)]
        size = sizes[0] * sizes[1] if operator == "*" else sizes[1]
        if max(sizes) > 2**64 or size > (MOST_ROUNDS if texts else 2**64 if operator == "*" else 64):
            raise SecurityError(f"{operator} would make something too large")
        return super().call_binop(context, operator, left, right)


def _compile(source: str, where: str) -> tuple[jinja2.Template, nodes.Template]:
    """The template, and what it was parsed into."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
    # Jinja's own tojson escapes < and >.
    environment.filters |= {"tojson": functools.partial(json.dumps, ensure_ascii=False), "count round": _count_round}
    now = datetime.datetime.now
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda form: now().strftime(form)}
    try:
        tree = environment.parse(source)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.Block)):
            counted = nodes.Filter(nodes.Const(None), "count round", [], [], None, None, lineno=node.lineno)
            node.body.insert(0, nodes.ExprStmt(counted, lineno=node.lineno))
        return environment.from_string(tree), tree
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}, line {error.lineno}: is not a template: {error.message}") from error
    except (SyntaxError, RecursionError) as error:  # {% break %} outside of a loop, a thousand brackets
        raise UserError(f"{where}: is not a template: {error}") from error


def _contents(tree: nodes.Template) -> tuple[list[str], set[str], set[str]]:
    """(texts that it can write by itself, variables that it uses, variables that it asks `is defined` of)."""
    texts = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    texts += [node.data for node in tree.find_all(nodes.TemplateData)]
    asked = [test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    names = [node for node in tree.find_all(nodes.Name) if node.ctx == "load" and not any(node is a for a in asked)]
    return texts, {node.name for node in names}, {node.name for node in asked if isinstance(node, nodes.Name)}


@jinja2.pass_context  # so that Jinja does not compute it once and for all when it compiles
def _count_round(context: Any, value: None) -> None:
    if next(_rounds.get()) > MOST_ROUNDS:
        raise SecurityError(f"more than {MOST_ROUNDS:,} rounds of loops; does one have no end?")


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))
