"""Every token of a conversation, or of a packed row, with its role, target mask and segment, in colour.

    python tools/show_tokens.py --tokenizer=runs/demo/tokenizer chats.jsonl                     the first conversation
    python tools/show_tokens.py --tokenizer=PATH --chat_template=llama3 chats.jsonl --index=7   another one
    python tools/show_tokens.py --rows=runs/demo/pack --row=3 --split=heldout                   a packed row
    ... --html=tokens.html                                                                      a page of it as well

In a terminal the tokens run on like text; every second one is underlined, so that their borders show, and the targets,
on which the loss is counted, stand on green. In a pipe there is a line a token: number, id, piece, role, 1 for a
target, segment, position. Spaces are written ␣, line feeds ↵, and control characters as escapes.
"""

import argparse
import collections
import html
import itertools
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import rich.console
import rich.text
from etils import epath

from jaxlm.base import files
from jaxlm.base.errors import JaxlmError, UserError
from jaxlm.tokenizer import chat
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.tokenizer import Tokenizer

MAX_RECORD_BYTES = 2**26
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
# Kind → colour in a terminal, colour on a light page, colour on a dark one.
KINDS = {
    "system": ("magenta", "#8a1c9c", "#e29af0"),
    "user": ("cyan", "#0a5c8f", "#7cc8f5"),
    "assistant": ("yellow", "#8a5a00", "#f0c060"),
    "tool": ("blue", "#3b3bb0", "#a8a8ff"),
    "other role": ("red", "#a02020", "#ff9a90"),
    "odd segment": ("cyan", "#0a5c8f", "#7cc8f5"),
    "even segment": ("yellow", "#8a5a00", "#f0c060"),
    "no message": ("default", "#666666", "#999999"),
    "padding": ("bright_black", "#aaaaaa", "#555555"),
}


class Token(NamedTuple):
    id: int
    piece: str
    role: str
    """Of the message that it belongs to; empty in a packed row."""
    group: str
    """What stands above its message or segment."""
    kind: str
    """A key of KINDS."""
    target: bool
    segment: int
    position: int

    @property
    def ends_line(self) -> bool:
        return "↵" in self.piece


def conversation(tokenizer: Tokenizer, template: chat.ChatTemplate, path: str, index: int) -> list[Token]:
    """Record `index` of a file of chats, in tokens."""
    # Here, because they take longer to import than the rest takes to run.
    from jaxlm.data import chats
    from jaxlm.data.config import ChatSource
    from jaxlm.text import readers
    from jaxlm.text.clean import Reason

    if not epath.Path(path).exists():
        raise UserError(f"CHATS: no such file: {path}")
    records = readers.read_objects(ChatSource(name="chats", path=path), MAX_RECORD_BYTES)
    record = next(itertools.islice(records, index, None), None)
    if record is None:
        raise UserError(f"--index: {path} has no conversation {index}; they are counted from 0")
    messages = record.value if isinstance(record.value, Reason) else chats.messages_of(record.value)
    if isinstance(messages, Reason):
        raise UserError(f"{record.where}: is no conversation: {messages.name.replace('_', ' ')}")
    try:
        encoded = template.encode(messages)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from error
    found = []
    for position, (id, target, number) in enumerate(zip(*(part.tolist() for part in encoded), strict=True)):
        role = messages[number]["role"] if number >= 0 else ""
        kind = (role if role in KINDS else "other role") if role else "no message"
        group = f"message {number}: {visible(role)}" if role else "in no message"
        piece = visible(tokenizer.piece(id))
        found.append(Token(id, piece, role, group, kind, target, segment=1, position=position))
    return found


def packed_row(tokenizer: Tokenizer, folder: str, split: str, index: int) -> list[Token]:
    """Row `index` of a folder of packed rows."""
    from jaxlm.data.loader import RowSource

    source = RowSource(folder, "heldout" if split == "heldout" else "train")
    if source.tokenizer_hash != tokenizer.hash:
        raise UserError(f"--tokenizer: {folder} was packed with another one, of hash {source.tokenizer_hash[:12]}")
    if index >= len(source):
        raise UserError(f"--row: {folder} has no {split} row {index}; there are {len(source)}, counted from 0")
    row = source[index]
    found = []
    columns = (row[name].tolist() for name in ("ids", "loss_mask", "segment_ids", "positions"))
    for id, target, segment, position in zip(*columns, strict=True):
        kind = ("odd segment" if segment % 2 else "even segment") if segment else "padding"
        group = f"segment {segment}" if segment else "padding"
        found.append(Token(id, visible(tokenizer.piece(id)), "", group, kind, target, segment, position))
    return found


def visible(text: str) -> str:
    """A piece on one line, with nothing that a terminal would obey.

    >>> visible("a b\\x1b\\n")
    'a␣b\\\\x1b↵'
    """
    if text == "<0x0A>":
        return "↵"
    escaped = (c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return "".join(VISIBLE.get(c, e) for c, e in zip(text, escaped, strict=True))


def summary(tokens: Sequence[Token]) -> str:
    segments = len({token.segment for token in tokens} - {0})
    padding = sum(not token.segment for token in tokens)
    targets = sum(token.target for token in tokens)
    return f"tokens: {len(tokens)}, targets: {targets}, segments: {segments}, padding: {padding}"


def print_lines(tokens: Sequence[Token]) -> None:
    """A line a token, with tabs between the columns."""
    print("number\tid\tpiece\trole\ttarget\tsegment\tposition")
    for number, token in enumerate(tokens):
        columns = (number, token.id, token.piece, visible(token.role), int(token.target), token.segment, token.position)
        print(*columns, sep="\t")


def print_running(console: rich.console.Console, tokens: Sequence[Token]) -> None:
    """The tokens as running text, a paragraph a message or segment."""
    number = 0
    for group, members in itertools.groupby(tokens, lambda token: token.group):
        console.print(rich.text.Text(group, style="dim"))
        text = rich.text.Text(overflow="fold")
        for token in members:
            style = "bold black on green" if token.target else KINDS[token.kind][0]
            text.append(token.piece, f"{style} underline" if number % 2 else style)
            text.append("\n" if token.ends_line else "")
            number += 1
        text.rstrip()
        console.print(text)
    legend = rich.text.Text("\n")
    for kind in shown_kinds(tokens):
        legend.append(kind, KINDS[kind][0]).append("  ")
    console.print(legend.append("target", "bold black on green").append(f"  {summary(tokens)}", "dim"))


def page(title: str, tokens: Sequence[Token]) -> str:
    """The same as an HTML page that needs nothing else; pointing at a token shows its id, mask and place."""
    names = {kind: f"kind{number}" for number, kind in enumerate(KINDS)}
    paragraphs, number = [], 0
    for group, members in itertools.groupby(tokens, lambda token: token.group):
        spans = []
        for token in members:
            classes = [names[token.kind], *["target"] * token.target, *["odd"] * (number % 2)]
            mask = "a target" if token.target else "no target"
            place = f"segment {token.segment}, position {token.position}"
            about = f"token {number}, id {token.id}, {visible(token.role) or token.kind}, {mask}, {place}"
            span = f'<span class="{" ".join(classes)}" title="{html.escape(about)}">{html.escape(token.piece)}</span>'
            spans.append(span + ("<br>" if token.ends_line else ""))
            number += 1
        paragraphs.append(f"<h2>{html.escape(group)}</h2>\n<p>{''.join(spans)}</p>")
    legend = " ".join(f'<span class="{names[kind]}">{kind}</span>' for kind in shown_kinds(tokens))
    light, dark = (
        " ".join(f"--{names[kind]}: {colours[scheme]};" for kind, colours in KINDS.items()) for scheme in (1, 2)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; --back: #ffffff; --text: #222222; --target: #b8f0b8; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #16181c; --text: #dddddd; --target: #14532d; {dark} }} }}
body {{ background: var(--back); color: var(--text); font: 15px/1.7 monospace; margin: 2em; overflow-wrap: anywhere }}
h1 {{ font-size: 1.1em }}
h2 {{ font-size: .85em; font-weight: normal; opacity: .7; margin: 1.2em 0 0 }}
p {{ margin: 0 }}
.odd {{ text-decoration: underline; text-underline-offset: 3px }}
.target {{ background: var(--target); font-weight: bold }}
{" ".join(f".{name} {{ color: var(--{name}) }}" for name in names.values())}
</style>
<h1>{html.escape(title)}</h1>
<p>{legend} <span class="target">target</span> {summary(tokens)}; every second token is underlined</p>
{chr(10).join(paragraphs)}
</html>
"""


def shown_kinds(tokens: Sequence[Token]) -> list[str]:
    counts = collections.Counter(token.kind for token in tokens)
    return [kind for kind in KINDS if counts[kind]]


def tokenizer_of(arguments: argparse.Namespace) -> Tokenizer:
    """What --tokenizer names; packed rows have theirs beside them."""
    beside = epath.Path(arguments.rows or ".") / "tokenizer"
    if not arguments.tokenizer and not (arguments.rows and beside.exists()):
        raise UserError("--tokenizer: is missing; a tokenizer stage's folder, a model directory or a file is needed")
    return tokenizers.load(arguments.tokenizer or beside)


def template_of(arguments: argparse.Namespace, tokenizer: Tokenizer) -> chat.ChatTemplate:
    """What --chat_template names, else the one in the tokenizer's folder, else ChatML."""
    own = epath.Path(arguments.tokenizer) / chat.FILE_NAME
    return chat.load(arguments.chat_template or (own if own.exists() else "chatml"), tokenizer)


def show(arguments: argparse.Namespace) -> None:
    if bool(arguments.chats) == bool(arguments.rows):
        raise UserError("CHATS: either a file of chats or --rows=FOLDER is needed, and not both")
    for flag in ("index", "row"):
        if getattr(arguments, flag) < 0:
            raise UserError(f"--{flag}: got {getattr(arguments, flag)}; 0 or more is needed")
    tokenizer = tokenizer_of(arguments)
    if arguments.rows:
        tokens = packed_row(tokenizer, arguments.rows, arguments.split, arguments.row)
        title = f"{arguments.rows}: {arguments.split} row {arguments.row}"
    else:
        tokens = conversation(tokenizer, template_of(arguments, tokenizer), arguments.chats, arguments.index)
        title = f"{arguments.chats}: conversation {arguments.index}"
    if arguments.html:
        files.write_bytes(arguments.html, page(title, tokens).encode())
    console = rich.console.Console(highlight=False)
    if console.is_terminal:
        print_running(console, tokens)
    else:
        print_lines(tokens)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chats", nargs="?", metavar="CHATS", help="a file of chats, such as chats.jsonl")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's folder or file, or a model directory")
    parser.add_argument("--chat_template", metavar="NAME", help="chatml, llama2, llama3 or a .jinja file")
    parser.add_argument("--index", type=int, default=0, help="which conversation of the file, from 0")
    parser.add_argument("--rows", metavar="FOLDER", help="a folder of packed rows, instead of chats")
    parser.add_argument("--row", type=int, default=0, help="which of the rows, from 0")
    parser.add_argument("--split", choices=["train", "heldout"], default="train", help="of the rows")
    parser.add_argument("--html", metavar="FILE", help="writes a page as well")
    try:
        show(parser.parse_args(given))
        return 0
    except JaxlmError as error:
        print(f"show_tokens: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
