"""Values and tables as HTML."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

LONG = 160  # characters of a value


def shown(value: Any) -> str:
    """A value as a cell has it: six significant digits, thousands apart.

    >>> shown(1234567), shown(0.123456789), shown(None), shown({"value": 0.5, "interval": [0.25, 0.75]})
    ('1,234,567', '0.123457', '', '0.5 (0.25 to 0.75)')
    """
    if value is None:
        return ""
    if isinstance(value, bool | str):
        text = str(value)
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    elif isinstance(value, Mapping) and {"value", "interval"} <= {*value}:
        text = f"{shown(value['value'])} ({shown(value['interval'][0])} to {shown(value['interval'][1])})"
    else:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONG else f"{text[:LONG]} …"


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """Rows below headers; a column of numbers stands to the right. Empty where there are no rows."""
    if not rows:
        return Markup("")
    numbers = [all(_is_number(row[column]) for row in rows) for column in range(len(headers))]

    def line(tag: str, cells: Sequence[Any]) -> Markup:
        made = [
            Markup('<{} class="number">{}</{}>' if number else "<{}>{}</{}>").format(tag, cell, tag)
            for cell, number in zip(cells, numbers, strict=True)
        ]
        return Markup("<tr>{}</tr>\n").format(Markup("").join(made))

    body = Markup("").join([line("th", headers), *(line("td", row) for row in rows)])
    return Markup('<div class="wide"><table>\n{}</table></div>').format(body)


def _is_number(cell: Any) -> bool:
    text = str(cell).replace(",", "").removesuffix("%")
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def record_rows(record: Mapping[str, Any]) -> Markup:
    """A nested record as dotted names and values; what is a table in it, many records of one kind, becomes one."""
    flat = flatten(record)
    rows = [[name, shown(value)] for name, value in flat.items() if not isinstance(value, Mapping) or _figure(value)]
    parts = [table(["", "value"], rows)]
    for name, value in flat.items():
        if isinstance(value, Mapping) and not _figure(value):
            fields = [*next(iter(value.values()))]
            lines = [[key, *(shown(line[field]) for field in fields)] for key, line in value.items()]
            inside = table(["", *fields], lines)
            folded = Markup("<details><summary>{}, {}</summary>{}</details>")
            parts.append(folded.format(name, len(value), inside))
    return Markup("").join(parts)


def flatten(record: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}; a figure with its interval stays whole, and so do three records or more alike."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if not isinstance(value, Mapping) or _figure(value) or _alike(value):
            flat[f"{path}{name}"] = value
        else:
            flat |= flatten(value, f"{path}{name}.")
    return flat


def _figure(value: Any) -> bool:
    return isinstance(value, Mapping) and {"value", "interval"} <= {*value}


def _alike(value: Mapping[str, Any]) -> bool:
    records = [*value.values()]
    kinds = {tuple(record) if isinstance(record, Mapping) and not _figure(record) else () for record in records}
    return len(records) >= 3 and len(kinds) == 1 and kinds != {()}
