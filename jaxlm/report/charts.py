"""Charts as SVG that stands in a page and takes its colours from it, in light and in dark.

Drawn here and not by matplotlib: the page of a whole run has a hundred, which took that 25 s of CPU and takes this 0.1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 26, 36  # margins around the plot; a legend goes below
COLOURS = 6  # of the page's variables --series-1, …
MOST_POINTS = 300  # of a curve
FEW_POINTS = 24  # of which each is marked
BINS = 24


class Curve(NamedTuple):
    """x → y, in the order in which the points are joined."""

    x: Sequence[float]
    y: Sequence[float]


class Scale(NamedTuple):
    """Values from `low` to `high` → pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def lines(title: str, curves: Mapping[str, Curve], *, x: str = "step", diagonal: bool = False) -> Markup:
    """Curves over one another, each under its name; a point without a finite value is left out.

    A long curve is drawn through the means of its stretches. `diagonal`: a faint line where y = x.
    """
    thin = {name: thinned(curve) for name, curve in curves.items()}
    xs, ys = ([value for curve in thin.values() for value in curve[axis]] for axis in (0, 1))
    if diagonal:
        xs, ys = xs + ys, xs + ys
    across, up = _scales(xs, ys)
    parts = [_frame(across, up, x)]
    if diagonal:
        ends = [f"{across(value):.1f},{up(value):.1f}" for value in (across.low, across.high)]
        parts.append(Markup('<polyline points="{}" class="faint" stroke-dasharray="4 3"/>').format(" ".join(ends)))
    for number, (name, curve) in enumerate(thin.items()):
        points = [(across(px), up(py)) for px, py in zip(*curve, strict=True)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(Markup('<polyline points="{}" style="stroke:{}"/>').format(path, _colour(number)))
        marked = zip(points, *curve, strict=True) if len(points) <= FEW_POINTS else ()
        for (px, py), vx, vy in marked:
            dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.6" style="fill:{}"><title>{}</title></circle>')
            parts.append(dot.format(px, py, _colour(number), f"{name} {vx:g}: {vy:.5g}"))
    return _svg(title, parts, [*thin])


def bars(title: str, values: Mapping[str, tuple[float, float, float]]) -> Markup:
    """Named values with the ends of their intervals: {"truncated": (value, low, high)}."""
    ends = [0.0, *(end for triple in values.values() for end in triple)]
    left, row = 110, 24
    bottom = TOP + row * len(values)
    across = Scale(min(ends), max(ends) or 1.0, left, WIDTH - RIGHT)
    parts = [
        Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}" class="grid"/>').format(across(tick), TOP, bottom)
        + _text(across(tick), bottom + 14, f"{tick:g}", "middle")
        for tick in ticks(across.low, across.high, 5)
    ]
    for number, (name, (value, low, high)) in enumerate(values.items()):
        y = TOP + row * number + 4
        parts.append(_text(left - 6, y + 12, name[:18], "end"))
        bar = '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" style="fill:{}"><title>{}</title></rect>'
        said = f"{name}: {value:.4g} ({low:.4g} to {high:.4g})"
        start, end = sorted((across(0), across(value)))
        parts.append(Markup(bar).format(start, y, end - start, row - 8, _colour(0), said))
        interval = '<line x1="{0:.1f}" x2="{1:.1f}" y1="{2}" y2="{2}" class="ink"/>'
        parts.append(Markup(interval).format(across(low), across(high), y + (row - 8) / 2))
    return _svg(title, parts, [], height=bottom + 22)


def histogram(title: str, groups: Mapping[str, Sequence[float]], *, x: str) -> Markup:
    """How often values occur, as shares of their group, in bins that the groups have in common."""
    everything = [value for values in groups.values() for value in values]
    low, high = min(everything), max(everything)
    width = (high - low or 1.0) / BINS
    curves = {}
    for name, values in groups.items():
        counts = [0] * BINS
        for value in values:
            counts[min(int((value - low) / width), BINS - 1)] += 1
        corners = [(low + width * (bin + side), n / len(values)) for bin, n in enumerate(counts) for side in (0, 1)]
        curves[name] = Curve([low, *(at for at, _ in corners)], [0.0, *(share for _, share in corners)])
    return lines(title, curves, x=x)


def thinned(curve: Curve) -> Curve:
    """The finite points; of many, the means over stretches of equally many points.

    >>> thinned(Curve([1, 2, 3], [5.0, float("nan"), 7.0]))
    Curve(x=[1, 3], y=[5.0, 7.0])
    """
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y is not None and math.isfinite(y)]
    if len(points) > MOST_POINTS:
        stretch = -(-len(points) // MOST_POINTS)
        parts = [points[at : at + stretch] for at in range(0, len(points), stretch)]
        points = [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
    return Curve([x for x, _ in points], [y for _, y in points])


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in [low, high], some `about` of them, steps of 1, 2 or 5 times a power of ten.

    >>> ticks(0.0, 440.0, 5)
    [0.0, 100.0, 200.0, 300.0, 400.0]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _scales(xs: Sequence[float], ys: Sequence[float]) -> tuple[Scale, Scale]:
    (left, right), (low, high) = _range(xs), _range(ys)
    room = 0.04 * (high - low)
    return Scale(left, right, LEFT, WIDTH - RIGHT), Scale(low - room, high + room, HEIGHT - BOTTOM, TOP)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends, and some room around a single value."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = abs(low) * 0.1 or 1.0
    return (low, high) if high > low else (low - room, high + room)


def _frame(across: Scale, up: Scale, x: str) -> Markup:
    parts = []
    for tick in ticks(up.low, up.high, 5):
        line = '<line x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}" class="grid"/>'
        parts.append(Markup(line).format(LEFT, WIDTH - RIGHT, up(tick)))
        parts.append(_text(LEFT - 5, up(tick) + 3.5, _short(tick), "end"))
    for tick in ticks(across.low, across.high, 6):
        parts.append(_text(across(tick), HEIGHT - BOTTOM + 14, _short(tick), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x, "middle"))
    floor = '<line x1="{0}" x2="{1}" y1="{2}" y2="{2}" class="faint"/>'
    parts.append(Markup(floor).format(LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM))
    return Markup("").join(parts)


def _short(value: float) -> str:
    """12000 → 12k; 0.0005 → 5e-4."""
    if abs(value) >= 1e4:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:g}".replace("e-0", "e-")


def _text(x: float, y: float, said: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, escape(said))


def _colour(number: int) -> str:
    return f"var(--series-{number % COLOURS + 1})"


def _svg(title: str, parts: Sequence[Markup], names: Sequence[str], height: int = HEIGHT) -> Markup:
    """Title, drawing, and a legend where there is more than one name, in rows of two."""
    parts = [Markup('<text x="4" y="14" class="title">{}</text>').format(title), *parts]
    for number, name in enumerate(names if len(names) > 1 else ()):
        at, y = 12 + 195 * (number % 2), height + 10 + 16 * (number // 2)
        key = '<line x1="{0}" x2="{1}" y1="{2}" y2="{2}" style="stroke:{3}" stroke-width="3"/>'
        parts += [Markup(key).format(at, at + 16, y, _colour(number)), _text(at + 22, y + 4, name, "start")]
    height += 16 * -(-len(names) // 2) + 4 if len(names) > 1 else 0
    opening = '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>\n'
    return Markup(opening).format(WIDTH, height, title, Markup("").join(parts))
