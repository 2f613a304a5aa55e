"""Talking: what the model sees, what is shown and kept, what commands do; by pipe, and on a real terminal."""

import codecs
import contextlib
import functools
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxlm.__main__ import main as command_line
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError, UserError
from jaxlm.base.sharding import make_mesh
from jaxlm.hub.language_model import LanguageModel, load
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.sample.config import ChatConfig, ChatSamplingConfig
from jaxlm.stages import chat
from jaxlm.tokenizer import chat as templates
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.train import model_directory

TOKENIZER = ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))
SHAPE = ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, compute="float32").complete()


def write_model(folder: Path, *, template: bool = True, context: int = 128, criteria: tuple[str, ...] = ()) -> str:
    shape = ModelConfig(**(vars(SHAPE) | {"criteria": criteria}))
    tokenizers.save(TOKENIZER, folder)
    params = jax.jit(functools.partial(initialize, define_model(shape), 0))()
    model_directory.write(
        folder / "model",
        params,
        shape,
        folder,
        inputs={},
        config={},
        facts={"row_length": context},
        chat_template=templates.load("chatml", TOKENIZER) if template else None,
    )
    return str(folder)


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("assistant"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"), template=False, context=32)


class Pipe:
    """Standard input that is no terminal; `between` is called before each line."""

    def __init__(self, lines, between=lambda: None):
        self.buffer = self._lines(lines, between)

    def isatty(self):
        return False

    def _lines(self, lines, between):
        for line in lines:
            between()
            yield line if isinstance(line, bytes) else f"{line}\n".encode()


@pytest.fixture
def talk(monkeypatch, capsys, assistant):
    """Runs the stage on lines of input; (stdout, stderr)."""

    def run(*lines, between=lambda: None, **fields):
        monkeypatch.setattr(sys, "stdin", Pipe(lines, between))
        chat.main(ChatConfig(**({"model": assistant} | fields)))
        return capsys.readouterr()

    return run


@pytest.fixture
def said(monkeypatch):
    """A model that gives "answer 0", "answer 1", … in pieces; the list gets (the prompt's text, what it was asked)."""
    asked = []

    def stream(self, prompt, **fields):
        asked.append(("".join(TOKENIZER.piece(token) for token in prompt), fields))
        yield from ("answer", " ", str(fields["step"]))

    monkeypatch.setattr(LanguageModel, "stream", stream)
    return asked


def kept(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "chat.jsonl").read_text().splitlines()]


def contents(record: dict) -> list[str]:
    return [message["content"] for message in record["messages"]]


def prompt_of(*contents: str) -> str:
    roles = ("user", "assistant")
    said = (f"<|im_start|>{roles[i % 2]}\n{text}<|im_end|>\n" for i, text in enumerate(contents))
    return f"<s>{''.join(said)}<|im_start|>assistant\n".replace("\n", "<0x0A>")


def test_a_line_is_answered_with_a_line_as_the_model_draws_it(talk, assistant, tmp_path):
    first_question = "Hi, who's this"  # both prompts have 33 to 64 tokens: one program
    sampling = ChatSamplingConfig(max_tokens=2)
    lines = (first_question, "?", "/retry")
    answers = talk(*lines, sampling=sampling, seed=3, workdir=str(tmp_path)).out
    lm = load(assistant, mesh=make_mesh(MeshConfig()))
    drawn = functools.partial(lm.generate, max_tokens=2, temperature=0.7, top_p=0.9, seed=3)
    messages = [{"role": "user", "content": first_question}]
    first = drawn([messages])[0].text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "?"}]
    second, third = (drawn([messages], step=step)[0].text for step in (1, 2))
    assert answers == f"{first}\n{second}\n{third}\n"
    assert second != third, "a retry draws other random numbers"
    assert contents(kept(tmp_path)[0]) == [first_question, first, "?", third]
    assert talk(*lines, sampling=sampling, seed=3).out == answers
    assert talk(*lines, sampling=sampling, seed=4).out != answers


def test_the_model_sees_system_message_and_history(talk, said):
    sampling = ChatSamplingConfig(context_tokens=256)
    out, err = talk("one", "two", "", " /three", system="Be brief.", sampling=sampling)
    assert out == "answer 0\nanswer 1\nanswer 2\n"
    assert err == "", "no banner, prompt or bar in a pipe"
    system = "<|im_start|>system<0x0A>Be brief.<|im_end|><0x0A><|im_start|>user"
    expected = prompt_of("one", "answer 0", "two", "answer 1", "/three").replace("<|im_start|>user", system, 1)
    prompt, fields = said[-1]
    assert prompt == expected
    assert (fields["step"], fields["seed"], fields["temperature"], fields["top_p"]) == (2, 0, 0.7, 0.9)
    assert fields["max_tokens"] == 256 - len(re.sub("<[^>]+>", ".", prompt)), "what the context has room for"


def test_a_message_of_several_lines(talk, said):
    talk("one\\", "two\\", "", "three\\")
    assert [prompt for prompt, _ in said] == [prompt_of("one\ntwo\n"), prompt_of("one\ntwo\n", "answer 0", "three\n")]
    with pytest.raises(UserError, match="stdin:2: is not UTF-8"):
        talk("fine", b"\xff\n")


def test_every_answer_is_kept_at_once_a_line_a_conversation(talk, said, tmp_path, assistant):
    seen = []
    look = lambda: seen.append([contents(record) for record in kept(tmp_path)] if any(tmp_path.iterdir()) else [])
    talk("a", "b", "/undo", "c", "/retry", "/reset", "d", "/undo", "/quit", "e", between=look, workdir=str(tmp_path))
    ab, ac = ["a", "answer 0", "b", "answer 1"], ["a", "answer 0", "c", "answer 2"]
    retried = ["a", "answer 0", "c", "answer 3"]
    assert seen == [[], [ab[:2]], [ab], [ab[:2]], [ac], [retried], [retried], [retried, ["d", "answer 4"]], [retried]]
    record = kept(tmp_path)[0]
    assert record["model"] == f"{assistant}/model"
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"] * 2
    # Another session, and another that writes meanwhile, lose nothing.

    def other():
        with (tmp_path / "chat.jsonl").open("a") as file:
            file.write('{"messages": []}\n')

    talk("f", "g", between=other, workdir=str(tmp_path))
    assert [contents(record) for record in kept(tmp_path)] == [
        retried, [], ["f", "answer 0", "g", "answer 1"], []
    ]  # fmt: skip


def test_save_and_what_is_written_where(talk, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("a line without end")
    _, err = talk("a", "/save mine.jsonl", "b", "/save mine.jsonl", "/reset", "c", "/save mine.jsonl")
    first, *saved = (tmp_path / "mine.jsonl").read_text().splitlines()
    assert first == "a line without end"
    assert [contents(json.loads(line)) for line in saved] == [["a", "answer 0", "b", "answer 1"], ["c", "answer 2"]]
    assert "Saved in mine.jsonl." in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"], "nothing else is kept"
    with pytest.raises(UserError, match="stdin:2: /save: needs a file"):
        talk("a", "/save")
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be written"):
        talk("a", f"/save {tmp_path}")


def test_settings_are_checked_and_taken_from_the_next_answer_on(talk, said):
    _, err = talk("a", "/set temperature=0.5", "/set stop=x, y", "/set seed=7", "/set max_tokens=5", "b", "/set")
    fields = said[-1][1]
    assert (fields["temperature"], fields["stop"], fields["seed"], fields["max_tokens"]) == (0.5, ("x", "y"), 7, 5)
    assert said[0][1]["temperature"] == 0.7
    assert "temperature=0.5" in err.splitlines()[-1]
    for line, problem in {
        "/set temprature=1": "/set temprature=1: is not NAME=VALUE of a setting; did you mean 'temperature'?",
        "/set temperature": "is not NAME=VALUE",
        "/set temperature=-1": "sampling.temperature: got -1.0; 0 or more is needed",
        "/set top_p=high": "sampling.top_p: got 'high'; a number is needed",
        "/set context_tokens=20": "its context of 20 tokens is too small",
        "/undo": "/undo: nothing was said yet",
        "/retry": "/retry: nothing was said yet",
        "/rest": "/rest: no such command; did you mean '/reset' or '/retry' or '/set'?",
        f"/system {'x' * 100}": "chat template and the system message take 1",
    }.items():
        with pytest.raises(UserError, match=f"^stdin:1: .*{re.escape(problem)}"):
            talk(line)


def test_system_begins_a_new_conversation(talk, said, tmp_path):
    talk("a", "/system Rhyme.", "b", "/system", "c", workdir=str(tmp_path))
    assert [contents(record) for record in kept(tmp_path)] == [
        ["a", "answer 0"], ["Rhyme.", "b", "answer 1"], ["c", "answer 2"]
    ]  # fmt: skip
    assert said[1][0].startswith("<s><|im_start|>system<0x0A>Rhyme.")


def test_the_oldest_turns_make_way_whole_and_it_is_said(talk, said, assistant):
    questions = ["q" * 30 + str(n) for n in range(4)]
    sampling = ChatSamplingConfig(context_tokens=260)
    _, err = talk(*questions, system="Be brief.", sampling=sampling)
    starts = [
        "<s><|im_start|>system<0x0A>Be brief.<|im_end|><0x0A><|im_start|>user<0x0A>" + "q" * 30 + n for n in "0001"
    ]
    assert [prompt[: len(start)] for (prompt, _), start in zip(said, starts, strict=True)] == starts
    last = said[-1][0]
    assert last.endswith(prompt_of(*(part for n in (1, 2) for part in (questions[n], f"answer {n}")), questions[3])[3:])
    assert err == "The context of 260 tokens has no room for all; the oldest of 3 turns are left out: 1.\n"
    assert all(fields["max_tokens"] >= 260 // 4 for _, fields in said)
    # A question that leaves less than that is answered in the room there is; one that leaves none is refused.
    talk("x" * 100)
    assert said[-1][1]["max_tokens"] == 128 - 100 - 20
    with pytest.raises(UserError, match="stdin:2: the prompt has 128 tokens, and the context of 128 has no room"):
        talk("a", "x" * 108)


def test_a_refused_question_changes_nothing(talk, said, monkeypatch, tmp_path):
    chats = []
    original = chat.Chat.__init__
    monkeypatch.setattr(chat.Chat, "__init__", lambda self, *args: (chats.append(self), original(self, *args))[1])
    with pytest.raises(UserError, match="has no room"):
        talk("a", "x" * 108)
    assert (chats[0].turns, chats[0].left_out) == ([("a", "answer 0")], 0)


def test_answers_that_are_empty_or_cut_off_are_noted(talk, monkeypatch):
    monkeypatch.setattr(LanguageModel, "stream", lambda self, prompt, **fields: iter(()))
    assert talk("a") == ("\n", "The answer is empty.\n")
    monkeypatch.setattr(LanguageModel, "stream", lambda self, prompt, **fields: iter(["x" * fields["max_tokens"]]))
    _, err = talk("a", sampling=ChatSamplingConfig(max_tokens=9))
    assert err == "An answer of 9 tokens, which may be cut off: /set max_tokens=18 for longer ones.\n"
    assert talk("a").err == "An answer of 107 tokens, which may be cut off: the context is full.\n"


def test_in_a_pipe_the_answer_is_what_the_model_said_to_the_letter(talk, monkeypatch):
    pieces = ["[bold]", "x[/bold] :smile:", "\t\x1b[31m\r", "日本 "]
    monkeypatch.setattr(LanguageModel, "stream", lambda self, prompt, **fields: iter(pieces))
    assert talk("a").out == "".join(pieces) + "\n"


def test_a_base_model_goes_on_with_each_text(talk, said, base, tmp_path):
    out, err = talk("One ", "Two", "/retry", model=base, workdir=str(tmp_path))
    assert out == "answer 0\nanswer 1\nanswer 2\n"
    assert err.startswith("A base model, without chat template: it goes on with your text, each text by itself.")
    assert [prompt for prompt, _ in said] == ["<s>One ", "<s>Two", "<s>Two"]
    model = f"{base}/model"
    assert kept(tmp_path) == [
        {"prompt": "One ", "completion": "answer 0", "model": model},
        {"prompt": "Two", "completion": "answer 2", "model": model},
    ]
    with pytest.raises(ConfigError, match="system: the model has no chat template"):
        talk("a", model=base, system="Be brief.")


def test_mistakes_of_a_newcomer_are_one_message_and_exit_code_2(monkeypatch, capsys, tmp_path, assistant):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "rewards", criteria=("overall",))
    write_model(tmp_path / "small", context=24)
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    config = (
        "from jaxlm.sample.config import SampleConfig as C\ndef get_config(): return C(model='x', prompts=('a',))\n"
    )
    (tmp_path / "other.py").write_text(config)
    for arguments, problem in {
        (): "model: is empty; give a model directory or a run's folder",
        ("nowhere",): "model: nowhere: no such folder",
        ("rewards",): "model: rewards/model is a reward model, which says nothing; a language model is needed",
        ("unfinished",): "model: unfinished: holds no finished model; found checkpoints",
        ("small",): "model: small/model: its context of 24 tokens is too small: the chat template takes 20",
        (assistant, "more"): "'more': is not understood",
        (assistant, f"--config.model={assistant}"): f"{assistant!r}: is not understood",
        (assistant, "--config=other.py"): "other.py: is a config for 'sample', not for 'chat'",
        (assistant, "--config.sampling.max_tokens=-1"): "sampling.max_tokens: got -1; 0 or more is needed",
        (assistant, "--config.sampling.samples=2"): "sampling.samples: got 2; a chat has one answer at a time",
        (assistant, "--config.sampling.seed=2"): "sampling.seed: got 2; a chat's seed is its config's own",
    }.items():
        monkeypatch.setattr(sys, "stdin", Pipe(["Hi"]))
        assert command_line(["chat", *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert problem in err
        assert len(err.splitlines()) == 1


def test_the_command_line_takes_a_model_alone_or_flags(monkeypatch, capsys, tmp_path, assistant, said):
    monkeypatch.chdir(tmp_path)
    config = (
        "from jaxlm.sample.config import ChatConfig\ndef get_config(): return ChatConfig(model='x', system='Hm.')\n"
    )
    (tmp_path / "chat.py").write_text(config)
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments in (
        [assistant, "--config.seed=5"],
        ["--config.seed=5", assistant, "--config=chat.py"],
        [assistant, "--config.seed=5", "--workdir=kept"],
        [assistant, "--config.seed=6", "--workdir=kept"],
    ):
        monkeypatch.setattr(sys, "stdin", Pipe(["Hi"]))
        assert command_line(["chat", *arguments]) == 0
        assert capsys.readouterr().out == "answer 0\n"
        if "--workdir=kept" not in arguments:
            assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert [fields["seed"] for _, fields in said] == [5, 5, 5, 6]
    assert "Hm." in said[1][0]
    assert "Hm." not in said[0][0]
    assert len(kept("kept")) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"continued_identity": {"stage": "pretrain"}}')
    assert command_line(["chat", assistant, "--workdir=other"]) == 2
    assert "belongs to a run with another config" in capsys.readouterr().err


TERMINAL = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
from jaxlm.__main__ import main
from jaxlm.hub.language_model import LanguageModel

def stream(self, prompt, **fields):
    yield from ("[bold]", "x", "[/bold] :smile: ", "\\x1b[31mred\\r", "日本 ", "of", " step ", str(fields["step"]))
    while fields["step"] == 0:
        time.sleep(0.05)
        yield "."

LanguageModel.stream = stream
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, *command: str):
        self.end, inner = pty.openpty()
        quiet = os.environ | {"TERM": "xterm", "XLA_FLAGS": "", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True, env=quiet
        )
        os.close(inner)
        self.shown, self._decoder = "", codecs.getincrementaldecoder("utf-8")()

    def until(self, text: str) -> str:
        """What was shown from the last call on, up to `text`."""
        give_up = time.monotonic() + 300
        while text not in self.shown:
            assert time.monotonic() < give_up, self.shown
            self._read()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def ends(self) -> int:
        """The exit code; a program waits at its end until all that it showed is read."""
        give_up = time.monotonic() + 300
        while self.process.poll() is None:
            assert time.monotonic() < give_up, self.shown
            self._read()
        os.close(self.end)
        return self.process.returncode

    def _read(self) -> None:
        if select.select([self.end], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # so Linux says that the other end is closed
                self.shown += self._decoder.decode(os.read(self.end, 4096))

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def plain(self, text: str) -> str:
        """Without colours and without the sign of waiting, which is erased."""
        text = re.sub(r"(\x1b\[32m.\x1b\[0m \x1b\[2m[^\x1b]*\x1b\[0m\r?\n?)", "", text)
        return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|\r", "", text)


@pytest.fixture
def terminal(assistant):
    terminal = Terminal(sys.executable, "-c", TERMINAL, "chat", assistant)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


def test_on_a_terminal(terminal, assistant, tmp_path):
    begin = terminal.plain(terminal.until("> "))
    assert f"{assistant}/model: 15,568 parameters, context of 128 tokens\n" in begin
    assert "Nothing is kept but by /save FILE." in begin
    terminal.type("Hi\n")
    answer = terminal.until("step 0...")
    terminal.type("\x03")
    answer = terminal.plain((answer + terminal.until("> ")).replace("^C", ""))
    said = "[bold]x[/bold] :smile: \x1b[31mred\r日本 of step 0..."
    shown = said.replace("\x1b", "␛").replace("\r", "␍")
    assert re.fullmatch(re.escape("Hi\n" + shown) + r"\.*\nStopped\.\n\n> ", answer), repr(answer)
    terminal.type(f"/save {tmp_path}/saved.jsonl\n")
    terminal.until("Saved in ")
    terminal.until("> ")
    (line,) = (tmp_path / "saved.jsonl").read_text().splitlines()
    dots = answer.count(".") - 1  # without that of "Stopped."
    assert contents(json.loads(line)) == ["Hi", said.rstrip(".") + "." * dots], "what was shown is what is kept"
    terminal.type("/rest\n")
    assert "no such command; did you mean '/reset'" in terminal.until("> ")
    # The line before the last, changed: the history and the editing of readline; and a line that goes on.
    terminal.type("\x1b[A\x1b[A\x15a\\\n")
    terminal.until(". ")
    terminal.type("b\n")
    terminal.until("of step 1")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.ends() == 0


def test_ctrl_c_at_the_prompt_ends(terminal):
    terminal.until("> ")
    terminal.type("half a li")
    terminal.until("half a li")
    time.sleep(0.5)  # CPython's `input` notices a signal only once it waits for keys again
    terminal.type("\x03")
    assert terminal.ends() == 0
