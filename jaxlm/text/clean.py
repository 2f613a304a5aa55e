"""Rules: a rule takes a document's text and gives it back, mended or as it was, or gives the reason to drop it.

    Rule = (text) -> text | Reason

Rules run in order and the first reason ends it, so that every document read is either kept or dropped for one reason.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxlm.text.config import PrepareConfig

MAX_CONTROL_SHARE = 0.05  # of the characters; text has next to none, random bytes have 11 %
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


class Reason(NamedTuple):
    """Why a document is dropped. `bad` when its record could not even be read as text."""

    name: str
    bad: bool = False
    detail: str = ""
    """What is said of this one record, in examples and rejects."""


Rule = Callable[[str], str | Reason]


def rules(config: PrepareConfig) -> list[tuple[str, Rule]]:
    """The rules that look at one document alone, by name, in order."""
    return [
        ("control_characters", remove_nuls),
        ("encoding_repaired", repair_encoding),
        ("nfc", compose),
        ("length", functools.partial(limit_length, low=config.min_characters, high=config.max_characters)),
    ]


def remove_nuls(text: str) -> str | Reason:
    r"""Drops what looks like a binary file; removes NULs elsewhere.

    >>> remove_nuls("some text that holds one NUL\0, " + "and goes on and on " * 4)[:30]
    'some text that holds one NUL, '
    """
    if len(_CONTROL.findall(text)) > MAX_CONTROL_SHARE * len(text):
        return Reason("binary")
    return text.replace("\0", "")


def repair_encoding(text: str) -> str:
    """Undoes UTF-8 that was read as another encoding, line by line, where ftfy finds it; other text stays as it is.

    >>> repair_encoding("cafÃ©, naÃ¯ve")
    'café, naïve'
    """
    import ftfy
    from ftfy.badness import is_bad

    # Only lines with other characters than ASCII can be broken; ftfy's search is the slowest of all rules (3 MB/s).
    if not any(is_bad(line) for line in text.split("\n") if not line.isascii()):
        return text
    only_encoding = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    return ftfy.fix_text(text, only_encoding)


def compose(text: str) -> str:
    """Unicode's composed form, NFC: one spelling of й or é, so that both become the same tokens."""
    return unicodedata.normalize("NFC", text)


def limit_length(text: str, low: int, high: int) -> str | Reason:
    """Drops empty documents and those of fewer than `low` or more than `high` characters."""
    if not text.strip():
        return Reason("empty")
    if len(text) < low:
        return Reason("too_short")
    if len(text) > high:
        return Reason("too_long")
    return text


def parts(text: str, characters: int) -> Iterator[str]:
    """The text, cut at blank lines (at line ends where a paragraph is longer) into parts of at most `characters`.

    Only a line that is longer by itself makes a longer part. All parts joined are the text.
    """
    begun = ""
    for paragraph in re.findall(r".*?(?:\n[^\S\n]*\n+|\Z)", text, re.DOTALL):
        whole = len(paragraph) <= characters
        for piece in [paragraph] if whole else paragraph.splitlines(keepends=True):
            if begun and len(begun) + len(piece) > characters:
                yield begun
                begun = ""
            begun += piece
    if begun:
        yield begun
