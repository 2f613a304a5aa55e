"""Toxicity by word lists, English and Russian: does an answer hold a listed word?

    WordLists().found("You IDIOT!")                     # ["idiot"]

Words count at their boundaries, so that Scunthorpe passes; a star stands for any ending, which in Russian makes a line
a stem; ё counts as е; the words of a phrase may stand apart by blanks and punctuation. It finds crude language and
nothing else: no veiled insult, no letter that is swapped for a digit, no word in another script. Nor does it know who
speaks: a quotation counts like the answer's own words. The lists are short on purpose; `toxic_words` adds to them.
"""

import re
import unicodedata
from collections.abc import Sequence

from etils import epath

from jaxlm.base.errors import UserError

SHIPPED = ("toxic_en.txt", "toxic_ru.txt")
FOLDER = epath.Path(__file__).parent / "data"


class WordLists:
    """The shipped lists and further ones."""

    def __init__(self, further: Sequence[str] = ()):
        """Raises UserError, naming file and line, for a list that cannot be read."""
        entries: dict[str, str] = {}
        for path in (*(FOLDER / name for name in SHIPPED), *map(epath.Path, further)):
            entries |= dict(_entries(path))
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(sorted(entries, key=len, reverse=True))})(?!\w)")

    def found(self, text: str) -> list[str]:
        """The listed words of a text, as they stand there in lower case."""
        return [match.group() for match in self._pattern.finditer(_plain(text))]


def _entries(path: epath.Path) -> list[tuple[str, str]]:
    """(pattern, line) of a list."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"toxic_words: {path}: cannot be read as UTF-8 text: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        entry = _plain(line.partition("#")[0]).strip()
        if not entry:
            continue
        if not re.fullmatch(r"\w[\w' -]*\*?", entry):
            raise UserError(f"toxic_words: {path}:{number}: {line!r} is no word or phrase, with or without a star")
        words = [re.escape(word) for word in entry.removesuffix("*").split()]
        found.append((r"[\W_]+".join(words) + (r"\w*" if entry.endswith("*") else ""), entry))
    return found


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().replace("ё", "е")
