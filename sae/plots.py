"""Small SVG figures for the report: lines and bars that take their colours from the page's CSS.

Owns the look of a figure. matplotlib draws with placeholder colours, which are replaced by CSS
variables (`--s0`, `--s1`, ... for series, `currentColor` for text and axes), so that one figure
serves light and dark; text stays text (`svg.fonttype: none`) in the page's font. Deterministic.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

N_COLOURS = 8  # the page defines --s0 ... --s7
_INK = "#010203"
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "actcache",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
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


@dataclass(frozen=True)
class Line:
    """One series: its points and which of the page's colours it has."""

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]


def lines(
    series: Sequence[Line], *, title: str, x_label: str, size: tuple[float, float] = (3.5, 2.2)
) -> Markup:
    """All series in one set of axes; the y axis is logarithmic where the values span a factor of 8."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    with mpl.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for line in series:
            axes.plot(line.x, line.y, color=_placeholder(line.colour), alpha=0.9)
        values = [y for line in series for y in line.y]
        if min(values) > 0 and max(values) > 8 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0, top=None if max(values) > 0 else 1)
            if all(float(v).is_integer() for v in values):
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(x_label)
        axes.grid(axis="y", color=_INK, alpha=0.1, linewidth=0.5)
        return _svg(figure, f"{title}: {', '.join(line.label for line in series)}")


def bars(
    edges: Sequence[float],
    counts: Sequence[int],
    colour: int,
    title: str,
    x_label: str,
    y_label: str,
    *,
    log10: bool = False,
    size: tuple[float, float] = (4.6, 1.8),
) -> Markup:
    """A histogram. `log10`: the edges are logarithms, shown as powers of ten."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    with mpl.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        widths = [b - a for a, b in pairwise(edges)]
        axes.bar(edges[:-1], counts, widths, align="edge", color=_placeholder(colour), linewidth=0)
        if log10:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * 10**v:g} %"))
            axes.set_xlim(edges[0], edges[-1])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(counts) < 6:  # one bar alone would fill the axes and look like no axis at all
                axes.set_xlim(max(0, edges[0] - 6), edges[-1] + 6)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _svg(figure, title)


def _placeholder(colour: int) -> str:
    return f"#0a0b{colour % N_COLOURS:02x}"


def _svg(figure: object, label: str) -> Markup:
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
    text = text.replace(_INK, "currentColor")
    text = re.sub(r"#0a0b0([0-7])", r"var(--s\1)", text)
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = re.sub(r"\n\s*", "\n", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*pt"', "", head)
    return Markup(f'{head} role="img" aria-label="{escape(label)}">{rest}')
