"""Small figures for the report: lines, bars and frontiers, as SVG in the page's colours or as files.

Owns the look of a figure. matplotlib draws with placeholder colours, which are replaced by CSS
variables (`--s0`, `--s1`, ... for series, `currentColor` for text and axes), so that one figure
serves light and dark; text stays text (`svg.fonttype: none`) in the page's font. Files are drawn
in the colours of the light page. Deterministic.
"""

import io
import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

COLOURS = ("#2166ac", "#c5561b", "#1b8a5a", "#8e44a0", "#a8871a", "#b5304f", "#3d93a8", "#6b6f76")
"""Of the light page: its --s0 ... --s7."""

_INK = "#1d2024"
_PLACEHOLDER_INK = "#010203"
_STYLE = {
    "svg.hashsalt": "actcache",
    "font.size": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5),
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.4,
    "lines.solid_joinstyle": "round",
}
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


@dataclass(frozen=True)
class Line:
    """One series: its points and which of the page's colours it has."""

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Point:
    """One SAE on a frontier; `error` is one standard error of y, points of one family are joined."""

    label: str
    colour: int
    family: Hashable
    x: float
    y: float
    error: float | None = None
    number: int = 0
    """Written beside the mark, for those who cannot tell it by its colour."""


@dataclass(frozen=True)
class Plot:
    """A figure that is drawn when it is needed, into a page or into files."""

    title: str
    label: str
    """What a screen reader says of it."""
    size: tuple[float, float]
    """Inches."""
    draw: Callable[[Any, Sequence[str], str], None]
    """Given axes, the colours of series and that of text."""

    def inline(self) -> Markup:
        """The figure as an `<svg>` in the colours of the page around it."""
        placeholders = [f"#0a0b{i:02x}" for i in range(len(COLOURS))]
        with _style(_PLACEHOLDER_INK, "none"):
            return _svg(self._drawn(placeholders, _PLACEHOLDER_INK), self.label)

    def save(self, directory: Path, name: str) -> list[Path]:
        """Write `name`.svg and `name`.png (200 dots per inch) in the colours of the light page."""
        paths = [directory / f"{name}.{kind}" for kind in ("svg", "png")]
        with _style(_INK, "path"):
            figure = self._drawn(COLOURS, _INK)
            figure.axes[0].set_title(self.title, fontsize=9)
            for path in paths:
                figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
        return paths

    def _drawn(self, colours: Sequence[str], ink: str) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, layout="constrained")
        self.draw(figure.add_subplot(), colours, ink)
        return figure


def _style(ink: str, fonts: str) -> Any:
    import matplotlib as mpl

    return mpl.rc_context(_STYLE | dict.fromkeys(_INKED, ink) | {"svg.fonttype": fonts})


def lines(series: Sequence[Line], *, title: str, x_label: str) -> Plot:
    """All series in one set of axes; the y axis is logarithmic where the values span a factor of 8."""

    def draw(axes: Any, colours: Sequence[str], ink: str) -> None:
        from matplotlib.ticker import EngFormatter, MaxNLocator

        for line in series:
            axes.plot(line.x, line.y, color=colours[line.colour % len(colours)], alpha=0.9)
        values = [y for line in series for y in line.y]
        if not _logarithmic(axes.yaxis, values):
            axes.set_ylim(bottom=0, top=None if max(values) > 0 else 1)
            if all(float(v).is_integer() for v in values):
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(x_label)
        axes.grid(axis="y", color=ink, alpha=0.1, linewidth=0.5)

    return Plot(title, f"{title}: {', '.join(line.label for line in series)}", (3.5, 2.2), draw)


def frontier(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> Plot:
    """One mark for each SAE with its error bar, those of one family joined in the order of x."""

    def draw(axes: Any, colours: Sequence[str], ink: str) -> None:
        from matplotlib.ticker import MaxNLocator

        families: dict[Hashable, list[Point]] = {}
        for point in sorted(points, key=lambda p: p.x):
            families.setdefault(point.family, []).append(point)
        for family in families.values():
            if len(family) > 1:
                axes.plot([p.x for p in family], [p.y for p in family], color=ink, alpha=0.35, linewidth=1)
        for p in points:
            colour = colours[p.colour % len(colours)]
            error = p.error if p.error and math.isfinite(p.error) else None
            axes.errorbar(
                p.x, p.y, yerr=error, color=colour, marker="o", markersize=5, capsize=2, linewidth=1
            )
        axes.margins(0.12)
        xs, ys = [p.x for p in points], [p.y for p in points]
        if not _logarithmic(axes.xaxis, xs):
            middle, half = (min(xs) + max(xs)) / 2, max(0.6 * (max(xs) - min(xs)), 0.05 * max(xs))
            axes.set_xlim(middle - half, middle + half)  # a difference of 0.1 in L0 is none
            axes.xaxis.set_major_locator(MaxNLocator(6))
        _logarithmic(axes.yaxis, ys)
        _number(axes, points, ink)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=ink, alpha=0.1, linewidth=0.5)

    said = ", ".join(f"{p.label} at {p.x:.3g} has {p.y:.4g}" for p in points)
    return Plot(title, f"{title}: {said}", (4.4, 2.8), draw)


def _number(axes: Any, points: Sequence[Point], ink: str) -> None:
    """Each mark's number, on the side that no other mark or number near it takes."""
    sides = ((6, 3, "left"), (-6, 3, "right"), (6, -9, "left"), (-6, -9, "right"))
    axes.autoscale_view()
    at = axes.transData.transform([(p.x, p.y) for p in points]) * 72 / axes.figure.dpi
    taken: list[tuple[float, float]] = [(x, y) for x, y in at]

    def free(x: float, y: float) -> float:
        return min(math.hypot(x - u, y - v) for u, v in taken)

    for p, (x, y) in zip(points, at, strict=True):
        dx, dy, side = max(sides, key=lambda s: min(10.0, free(x + 1.5 * s[0], y + s[1] + 3)))
        taken.append((x + 1.5 * dx, y + dy + 3))
        axes.annotate(
            str(p.number), (p.x, p.y), (dx, dy), textcoords="offset points", ha=side, fontsize=7, color=ink
        )


def bars(
    edges: Sequence[float],
    counts: Sequence[int],
    colour: int,
    *,
    title: str,
    x_label: str,
    y_label: str,
    log10: bool = False,
) -> Plot:
    """A histogram. `log10`: the edges are logarithms of shares, shown as powers of ten."""

    def draw(axes: Any, colours: Sequence[str], ink: str) -> None:
        from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

        widths = [b - a for a, b in pairwise(edges)]
        axes.bar(edges[:-1], counts, widths, align="edge", color=colours[colour % len(colours)], linewidth=0)
        if log10:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * 10**v:g} %"))
            axes.set_xlim(edges[0], edges[-1])
        elif all(float(edge).is_integer() for edge in edges):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(counts) < 6:  # one bar alone would fill the axes and look like no axis at all
                axes.set_xlim(max(0, edges[0] - 6), edges[-1] + 6)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return Plot(title, title, (4.6, 1.8), draw)


def _logarithmic(axis: Any, values: Sequence[float]) -> bool:
    """Make the axis logarithmic if the values span a factor of 8; whether they do."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if not (min(values) > 0 and max(values) > 8 * min(values)):
        return False
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(NullLocator())
    return True


def _svg(figure: Any, label: str) -> Markup:
    """The figure as an inline `<svg>` that scales to its container."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(
        buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<g id=\"patch_1\">.*?</g>", "", text, count=1, flags=re.DOTALL)  # the white background
    text = re.sub(r"<g id=\"patch_2\">.*?</g>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would restyle the whole page
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)  # only markers and clips are referred to
    text = re.sub(r"<g>\s*<g/>\s*</g>", "", text)
    text = text.replace(_PLACEHOLDER_INK, "currentColor")
    text = re.sub(r"#0a0b0([0-7])", r"var(--s\1)", text)
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = re.sub(r"\n\s*", "\n", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*pt"', "", head)
    return Markup(f'{head} role="img" aria-label="{escape(label)}">{rest}')
