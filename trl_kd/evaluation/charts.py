"""Line charts as inline SVG, coloured by the page's style sheet so that they follow its light or dark mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape


WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 44

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Parameters:
        name (`str`):
            Name in the legend.
        points (`Sequence[tuple[float, float]]`):
            Points in the order of x; those that are not finite are left out.
        color (`int`, *optional*, defaults to `0`):
            Number of its colour in the style sheet, 0 to 6.
        dashed (`bool`, *optional*, defaults to `False`):
            Whether it is a dashed line, as for a level to compare with.
    """

    name: str
    points: Sequence[Point]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class LineChart:
    """A line chart.

    Parameters:
        title (`str`):
            What it shows; also its text for screen readers.
        x_label, y_label (`str`):
            Names of the axes.
        series (`Sequence[Series]`):
            Its lines; a chart without a point renders as a sentence that says so.
        percent (`bool`, *optional*, defaults to `False`):
            Whether y is a share, to be written in per cent and shown from 0 to 100.
        note (`str`, *optional*, defaults to `""`):
            What a reader should see in it.
        whole (`bool`, *optional*, defaults to `False`):
            Whether x counts something: there are no marks between whole numbers.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    percent: bool = False
    note: str = ""
    whole: bool = False
    finite: list[Series] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self):
        for one in self.series:
            points = [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
            if points:
                self.finite.append(Series(one.name, points, one.color, one.dashed))

    def svg(self) -> str:
        """The chart as an `<svg>` element, without its title and legend."""
        if not self.finite:
            return '<p class="empty">Nothing was recorded.</p>'
        xs = [x for one in self.finite for x, _ in one.points]
        ys = [y for one in self.finite for _, y in one.points]
        x_ticks = [x for x in _ticks(min(xs), max(xs)) if not self.whole or x % 1 == 0]
        y_ticks = [0, 0.25, 0.5, 0.75, 1] if self.percent else _ticks(min(0.0, min(ys)), max(ys))
        scale = _Scale((min(xs), max(xs)), (y_ticks[0], max(y_ticks[-1], max(ys))))
        middle = ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">',
            *(self._horizontal(scale, y) for y in y_ticks),
            *(
                f'<text class="tick" text-anchor="middle" x="{scale.x(x):.1f}" y="{HEIGHT - BOTTOM + 18}">{x:g}</text>'
                for x in x_ticks
                if x <= max(xs)
            ),
            f'<text class="axis" text-anchor="middle" x="{middle[0]}" y="{HEIGHT - 6}">{escape(self.x_label)}</text>',
            f'<text class="axis" text-anchor="middle" transform="translate(12 {middle[1]}) rotate(-90)">'
            f"{escape(self.y_label)}</text>",
            *(_line(scale, one) for one in self.finite),
            "</svg>",
        ]
        return "".join(parts)

    def _horizontal(self, scale: "_Scale", y: float) -> str:
        label = f"{100 * y:g}%" if self.percent else f"{y:g}"
        at = scale.y(y)
        return (
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{at + 4:.1f}">{label}</text>'
        )


@dataclass(frozen=True)
class _Scale:
    """Maps values to positions in the drawing."""

    x_range: Point
    y_range: Point

    def x(self, value: float) -> float:
        return LEFT + _share(value, self.x_range) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - _share(value, self.y_range) * (HEIGHT - TOP - BOTTOM)


def _share(value: float, bounds: Point) -> float:
    low, high = bounds
    return (value - low) / (high - low) if high > low else 0.5


def _line(scale: _Scale, series: Series) -> str:
    points = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in series.points)
    dashed = " dashed" if series.dashed else ""
    name = f"<title>{escape(series.name)}</title>"
    return f'<polyline class="line c{series.color}{dashed}" points="{points}">{name}</polyline>'


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span `low` to `high`, about `count` of them."""
    if high <= low:
        return [low, low + 1] if low == 0 else sorted([0.0, low])
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * index, 12) for index in range(first, last + 1)]
