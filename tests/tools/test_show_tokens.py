import functools
import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.chat import FILE_NAME, load
from jaxlm.tokenizer.tokenizer import save

TOOL = Path(__file__).parent.parent.parent / "tools/show_tokens.py"
CHATS = [
    {"messages": [{"role": "user", "content": "a<b\n"}, {"role": "assistant", "content": "да \x1b[31m"}]},
    {"prompt": "p", "completion": "c"},
    {"messages": []},
    {"messages": [{"role": "user<br>", "content": "a"}, {"role": "assistant", "content": "\u202e"}]},
]


@functools.cache
def tool():
    spec = importlib.util.spec_from_file_location("show_tokens", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    save(ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")), tmp_path)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in CHATS))
    return tmp_path


def lines(captured):
    header, *rows = captured.out.splitlines()
    return header.split("\t"), [row.split("\t") for row in rows]


def test_a_line_a_token_outside_of_a_terminal(folder, capsys):
    assert tool().main([f"--tokenizer={folder}", f"{folder}/chats.jsonl"]) == 0
    header, rows = lines(capsys.readouterr())
    assert header == ["number", "id", "piece", "role", "target", "segment", "position"]
    assert rows[0] == ["0", "257", "<s>", "", "0", "1", "0"]
    assert rows[1] == ["1", "259", "<|im_start|>", "user", "0", "1", "1"]
    assert [row[2] for row in rows[6:11]] == ["↵", "a", "<", "b", "↵"]
    assert "".join(row[2] for row in rows if row[4] == "1") == "<0xD0><0xB4><0xD0><0xB0>␣<0x1B>[31m<|im_end|>"
    assert {row[3] for row in rows if row[4] == "1"} == {"assistant"}

    assert tool().main([f"--tokenizer={folder}", f"{folder}/chats.jsonl", "--index=1"]) == 0
    _, rows = lines(capsys.readouterr())
    assert "".join(row[2] for row in rows) == "<s><|im_start|>user↵p<|im_end|>↵<|im_start|>assistant↵c<|im_end|>↵"


def test_colours_in_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    assert tool().main([f"--tokenizer={folder}", f"{folder}/chats.jsonl"]) == 0
    shown = capsys.readouterr().out
    targets = re.findall(r"\x1b\[1;(?:4;)?30;42m(.*?)\x1b\[0m", shown)
    assert "".join(targets) == "<0xD0><0xB4><0xD0><0xB0>␣<0x1B>[31m<|im_end|>target"
    bare = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert bare.splitlines()[:5] == ["in no message", "<s>", "message 0: user", "<|im_start|>user↵", "a<b↵"]
    assert (
        bare.splitlines()[-1].split()
        == "user assistant no message target tokens: 36, targets: 11, segments: 1, padding: 0".split()
    )
    assert shown.count("\x1b[4;") > 10, "every second token is underlined"


class _Page(HTMLParser):
    """The spans of a page, as (classes, title, text), and every tag."""

    def __init__(self, text):
        super().__init__()
        self.spans, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "span":
            found = dict(attributes)
            self.spans.append([found["class"].split(), found.get("title", ""), ""])

    def handle_data(self, data):
        if self.spans:
            self.spans[-1][2] += data.strip()


def test_the_page(folder, capsys):
    html = folder / "out" / "tokens.html"
    assert tool().main([f"--tokenizer={folder}", f"{folder}/chats.jsonl", "--index=3", f"--html={html}"]) == 0
    _, rows = lines(capsys.readouterr())
    text = html.read_text(encoding="utf-8")
    page = _Page(text)
    tokens = [span for span in page.spans if span[1]]
    assert len(tokens) == len(rows)
    for number, ((classes, title, _), row) in enumerate(zip(tokens, rows, strict=True)):
        mask = "a target" if row[4] == "1" else "no target"
        assert title == f"token {number}, id {row[1]}, {row[3] or 'no message'}, {mask}, segment 1, position {row[6]}"
        assert ("target" in classes) == (row[4] == "1")
        assert ("odd" in classes) == bool(number % 2)
    assert page.tags == {"html", "meta", "title", "style", "h1", "h2", "p", "span", "br"}, "and nothing from a message"
    assert "<h2>message 0: user&lt;br&gt;</h2>" in text
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text, "it needs nothing else"


def test_packed_rows(packed_rows, tmp_path, capsys):
    tokenizer = str(Path(packed_rows).parent / "tokenizer")
    html = tmp_path / "row.html"
    arguments = [f"--tokenizer={tokenizer}", f"--rows={packed_rows}", "--row=3", f"--html={html}"]
    assert tool().main([*arguments, "--split=heldout"]) == 0
    _, rows = lines(capsys.readouterr())
    assert len(rows) == 64
    firsts = [row for row in rows if row[5] != "0" and row[6] == "0"]
    assert [row[5] for row in firsts] == [str(1 + i) for i in range(len(firsts))]
    padding = [row for row in rows if row[5] == "0"]
    assert all(row[4] == ("0" if row in firsts or row in padding else "1") for row in rows)
    text = html.read_text()
    assert "heldout row 3" in text
    assert "<h2>segment 1</h2>" in text
    assert ("padding</h2>" in text) == bool(padding)

    assert tool().main([*arguments[1:3], "--split=heldout"]) == 0, "a pack stage's folder has its tokenizer in it"
    assert lines(capsys.readouterr())[1] == rows
    assert tool().main([*arguments[:2], "--row=9999"]) == 2
    assert re.search(r"--row: .* has no train row 9999; there are \d+, counted from 0", capsys.readouterr().err)
    save(ByteTokenizer(("<pad>", "<s>", "</s>")), tmp_path)
    assert tool().main([f"--tokenizer={tmp_path}", f"--rows={packed_rows}"]) == 2
    assert "--tokenizer: " in capsys.readouterr().err


def test_the_template_of_a_model_directory_is_its_own(folder, capsys):
    source = load("chatml", ByteTokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))).source
    (folder / FILE_NAME).write_text(source.replace("assistant", "bot"))
    assert tool().main([f"--tokenizer={folder}", f"{folder}/chats.jsonl", "--index=1", "--chat_template=chatml"]) == 0
    capsys.readouterr()
    assert tool().main([f"--tokenizer={folder}", f"{folder}/chats.jsonl", "--index=1"]) == 2
    assert "chats.jsonl:2: chat_template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "CHATS: either a file of chats or --rows=FOLDER is needed"),
        (["{}/chats.jsonl", "--rows={}"], "CHATS: either"),
        (["{}/chats.jsonl"], "--tokenizer: is missing"),
        (["--tokenizer={}", "{}/chats.jsonl", "--index=-1"], "--index: got -1; 0 or more"),
        (
            ["--tokenizer={}", "{}/chats.jsonl", "--index=4"],
            "chats.jsonl has no conversation 4; they are counted from 0",
        ),
        (["--tokenizer={}", "{}/chats.jsonl", "--index=2"], "chats.jsonl:3: is no conversation: messages not a list"),
        (["--tokenizer={}", "{}/none.jsonl"], "CHATS: no such file: "),
        (["--tokenizer={}/none", "{}/chats.jsonl"], "none: no such file or folder; a tokenizer is needed"),
        (
            ["--tokenizer={}", "{}/chats.jsonl", "--chat_template=llama3"],
            "chat_template llama3: names <|end_header_id|>",
        ),
        (["--tokenizer={}", "--rows={}"], "is not finished (it has no manifest.json)"),
    ],
)
def test_mistakes_give_one_message(folder, arguments, problem, capsys):
    assert tool().main([argument.format(folder) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("show_tokens: ")
    assert problem in captured.err
    assert captured.err.count("\n") == 1


def test_as_a_command(folder):
    done = subprocess.run(
        [sys.executable, TOOL, f"--tokenizer={folder}", folder / "no"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == f"show_tokens: CHATS: no such file: {folder}/no\n"
