"""What the stage chat shows and understands: commands, answers as they are drawn, interrupts, and what is kept."""

import contextlib
import dataclasses
import itertools
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath
from rich.text import Text

from jaxlm.base import config as configs
from jaxlm.base import files, logging
from jaxlm.base.errors import ConfigError, UserError, nearest
from jaxlm.hub.language_model import ANSWER_TOKENS, LanguageModel
from jaxlm.sample.config import ChatConfig, ChatSamplingConfig

HELP = """\
/reset                  begin a new conversation
/undo                   take back the last question and its answer
/retry                  draw the last answer again
/system TEXT            begin a new conversation with this system message; without TEXT: with none
/save FILE              put the conversation into a JSONL file, in place of what was put there of it before
/set temperature=0.5    how answers are drawn; without anything: show it
/help, /quit            this list; end, as Ctrl-D does
A message that begins with / has a blank before it."""
COMMANDS = ("/reset", "/undo", "/retry", "/system", "/save", "/set", "/help", "/quit")
SETTINGS = [f.name for f in dataclasses.fields(ChatSamplingConfig) if f.name not in ("samples", "batch_rows")]
# On a terminal, control characters that a model draws are shown, not obeyed: all but tab and newline.
SHOWN = {c: 0x2400 + c for c in {*range(32)} - {9, 10}} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


class Chat:
    """What was said, how the model sees it, where it is kept; and what a line of input does to all that."""

    def __init__(self, lm: LanguageModel, config: ChatConfig, model: str, terminal: bool):
        """Raises UserError where the model's context is too small for a chat."""
        self.lm, self.model, self.terminal = lm, model, terminal
        self.turns: list[tuple[str, str]] = []  # questions and answers
        self.left_out = 0  # of the oldest turns: what the model no longer sees
        self.drawn = 0  # answers of this session: the step of their random numbers
        self.kept: dict[str, bytes] = {}  # file → this conversation's line in it
        self.file = config.workdir and f"{config.workdir}/chat.jsonl"
        self.change(config)

    def change(self, config: ChatConfig) -> None:
        """Takes another config. Raises UserError where that leaves no room for a conversation."""
        if config.system and not self.lm.chat_template:
            raise ConfigError("system", "the model has no chat template, in which a system message could stand")
        context, most = config.sampling.context_tokens or self.lm.context_tokens, config.sampling.max_tokens
        # What an answer shall have room for: old turns make way for it.
        reserve = max(1, min(most or ANSWER_TOKENS, context // 4))
        taken = len(self._encode(config.system, [], ""))
        if context and taken + reserve >= context:
            what = "the chat template and the system message take" if config.system else "the chat template takes"
            problem = f"its context of {context} tokens is too small: {what} {taken}, an answer shall have {reserve}"
            raise UserError(f"model: {self.model}: {problem}; sampling.context_tokens may go past the trained length")
        self.config, self.context, self.most, self.reserve = config, context, most or ANSWER_TOKENS, reserve
        self.left_out = 0

    def greet(self) -> None:
        if self.terminal:
            parameters = self.lm.definition.parameter_count()
            self.note(f"{self.model}: {parameters:,} parameters, context of {self.context or '?'} tokens", "bold")
        if not self.lm.chat_template:
            self.note("A base model, without chat template: it goes on with your text, each text by itself.")
        if self.terminal:
            self.note("/help lists the commands; a line that ends in \\ goes on; Ctrl-C stops an answer, Ctrl-D ends.")
            self.note(f"Conversations are kept in {self.file}." if self.file else "Nothing is kept but by /save FILE.")

    def note(self, text: str, style: str = "dim") -> None:
        logging.console.print(Text(text.translate(SHOWN), style))

    def ask(self, question: str, turns: list[tuple[str, str]]) -> None:
        """Shows the answer after `turns` and keeps all; an answer that is stopped before its first word is none."""
        ids, left_out = self._prompt(question, turns)
        room = self.lm.room(ids, self.most, self.context)
        if left_out > self.left_out:
            out = f"the oldest of {len(turns)} turns are left out: {left_out}"
            self.note(f"The context of {self.context} tokens has no room for all; {out}.")
        self.left_out = left_out
        answer, stopped = self._show(ids, room)
        if stopped and not answer:
            self.note("Stopped before the first word; nothing has changed.")
            return
        self.turns = [*turns, (question, answer)]
        if stopped or not answer:
            self.note("Stopped." if stopped else "The answer is empty.")
        elif self.lm.chat_template and len(self.lm.tokenizer.encode(answer)) >= room:
            more = f"/set max_tokens={2 * room} for longer ones" if room == self.most else "the context is full"
            self.note(f"An answer of {room} tokens, which may be cut off: {more}.")
        if self.file:
            self.keep(self.file)

    def _prompt(self, question: str, turns: list[tuple[str, str]]) -> tuple[list[int], int]:
        """(The ids to answer, how many of the oldest turns are not in them: an answer would not have its room.)"""
        first, system = self.left_out, self.config.system
        ids = self._encode(system, turns[first:], question)
        while first < len(turns) and len(ids) + self.reserve > self.context > 0:
            first += 1
            ids = self._encode(system, turns[first:], question)
        return ids, first

    def _show(self, ids: Sequence[int], room: int) -> tuple[str, bool]:
        """Writes an answer of at most `room` tokens as it is drawn. (What was written, whether Ctrl-C ended it.)"""
        fields = vars(self.config.sampling) | {"max_tokens": room, "seed": self.config.seed}
        pieces = self.lm.stream(ids, step=self.drawn, **fields)
        self.drawn += 1
        said = ""
        with _interrupts() if self.terminal else contextlib.nullcontext(threading.Event()) as pressed:
            with waiting(self.terminal, "… (a new size of prompt compiles first)"):
                piece = next(pieces, None)
            while piece is not None and not pressed.is_set():
                said += piece
                print(piece.translate(SHOWN) if sys.stdout.isatty() else piece, end="", flush=True)
                piece = next(pieces, None)
        print(flush=True)
        return said, pressed.is_set()

    def take(self, line: str) -> None:
        """Does what a line says. Raises UserError for what cannot be done, EOFError at /quit."""
        name, _, argument = (part.strip() for part in line.partition(" "))
        if name in ("/undo", "/retry", "/save") and not self.turns:
            raise UserError(f"{name}: nothing was said yet")
        match name:
            case "/help":
                self.note(HELP)
            case "/reset":
                self.begin()
                self.note("A new conversation.")
            case "/undo":
                self.note(f"Taken back: {self.turns.pop()[0]}")
                self.left_out = 0
                if self.file:
                    self.keep(self.file)
            case "/retry":
                self.ask(self.turns[-1][0], self.turns[:-1])
            case "/system":
                self.change(dataclasses.replace(self.config, system=argument))
                self.begin()
                self.note(f"A new conversation {'with this' if argument else 'without'} system message.")
            case "/save":
                if not argument:
                    raise UserError("/save: needs a file, as in /save chat.jsonl")
                self.keep(str(epath.Path(argument).expanduser()))
                self.note(f"Saved in {argument}.")
            case "/set":
                self.set(argument)
            case "/quit":
                raise EOFError
            case _ if line.startswith("/"):
                raise UserError(f"{name}: no such command" + nearest(name, COMMANDS))
            case _ if line.strip():
                if not self.lm.chat_template:
                    self.begin()
                self.ask(line.removeprefix(" ") if line.startswith(" /") else line, self.turns)

    def begin(self) -> None:
        """A new conversation; what was kept of the old one stays where it is."""
        self.turns, self.left_out, self.kept = [], 0, {}

    def set(self, assignment: str) -> None:
        name, equals, value = (part.strip() for part in assignment.partition("="))
        if name and not (equals and name in SETTINGS):
            raise UserError(f"/set {assignment}: is not NAME=VALUE of a setting" + nearest(name, SETTINGS))
        if name:
            self.change(configs.override(self.config, {name if name == "seed" else f"sampling.{name}": value}))
        values = vars(self.config.sampling) | {"seed": self.config.seed}
        self.note(" ".join(f"{setting}={values[setting]}" for setting in ([name] if name else SETTINGS)))

    def keep(self, path: str) -> None:
        """Writes the conversation as it stands: in place of its line in the file, else at the end of it."""
        line, file = b"", epath.Path(path)
        if self.turns:
            record: dict[str, Any] = {"messages": self._messages(self.config.system, self.turns)}
            if not self.lm.chat_template:
                record = dict(zip(("prompt", "completion"), self.turns[-1], strict=True))
            line = json.dumps(record | {"model": self.model}, ensure_ascii=False).encode() + b"\n"
        content = file.read_bytes() if file.is_file() else b""
        # Found by its content: another chat may have written into the file meanwhile.
        before, own, after = content.rpartition(self.kept.get(path) or b"\0")
        before, after = (before, after) if own else (content, b"")
        files.write_bytes(path, before + (b"\n" if before and not before.endswith(b"\n") else b"") + line + after)
        self.kept[path] = line

    def _messages(self, system: str, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": system}] if system else []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages

    def _encode(self, system: str, turns: Sequence[tuple[str, str]], question: str) -> list[int]:
        if not self.lm.chat_template:
            return self.lm.sampler.encode(question)
        return self.lm.chat_template.prompt([*self._messages(system, turns), {"role": "user", "content": question}])


def typed() -> Iterator[tuple[str, str]]:
    """("", message) as typed, with line editing. Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (`input` uses it)
    while True:
        line = input("\n> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(". ")
        yield "", line


def piped() -> Iterator[tuple[str, str]]:
    """(where it stands, message) of what is piped in."""
    begun = ""
    for number, content in enumerate(itertools.chain(sys.stdin.buffer, [b""]), 1):
        try:
            begun += content.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"stdin:{number}: is not UTF-8: {error}") from error
        if content and begun.endswith("\\"):
            begun = begun[:-1] + "\n"
        else:
            yield f"stdin:{number}", begun
            begun = ""


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by Ctrl-C, which so falls between two pieces and not into the midst of jax; a second one acts as before."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set() or signal.signal(signal.SIGINT, before))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def waiting(terminal: bool, what: str) -> contextlib.AbstractContextManager[Any]:
    """A sign of life on a terminal, gone when the wait is over."""
    return logging.console.status(Text(what, "dim")) if terminal else contextlib.nullcontext()
