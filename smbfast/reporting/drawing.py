"""What all plots share: colours, style, and from a matplotlib axes to inline SVG.

A plot is one panel: the page lays panels out, three beside each other or one on a phone, so that
text never shrinks with the screen. There is no script and no font file; the bytes are the same
every time. Ids carry the name of the plot, so that several can stand in one page. Text stays text
and takes the page's font.
"""

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito: distinct with every common colour vision deficiency
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
GREY, INK, SOFT, EDGE, GRID = "#8a8f98", "#1f2430", "#4a5160", "#b6bbc4", "#e9ebef"
PAPER, BAND, DARK_BAND = "#ffffff", "#f3f5f8", "#e6eaf0"
# what a colour is called in the style of a page, which has another for the night
_VARIABLES = {
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PURPLE: "purple",
    GREY: "grey",
    INK: "ink",
    SOFT: "soft",
    EDGE: "edge",
    GRID: "grid",
    PAPER: "paper",
    BAND: "band",
    DARK_BAND: "dark-band",
}
# inches; on a screen of 390 px a panel is 358 px wide, so that 8.5 points are 9 px or more
WIDTH, HEIGHT, WIDE = 3.4, 2.75, 4.5
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "smbfast",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.parse_math": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.labelcolor": SOFT,
    "axes.edgecolor": EDGE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
DASHED = (0, (4, 3))
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def panel(
    name: str,
    label: str,
    draw: Callable[[Axes], None],
    width: float = WIDTH,
    height: float = HEIGHT,
) -> str:
    """Return one plot as text that starts with `<svg`, for a page.

    Args:
        name: of the plot, unlike any other of the page; ids begin with it.
        label: what it shows, for those who hear the page.
        draw: fills the axes.
        width, height: inches.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        return _svg(figure, slug(name), label)


def themed(svg: str) -> str:
    """Return a plot whose colours a page may change, by the variables of its style."""
    return re.sub(
        "|".join(_VARIABLES),
        lambda match: f"var(--{_VARIABLES[match.group()]}, {match.group()})",
        svg,
    )


def standalone(svg: str) -> str:
    """Return a plot as the text of a file of its own."""
    return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


def dashed(ax: Axes, y: float, label: str, color: str, below: bool = False) -> None:
    """Draw a level that values are compared with, and its name, in ink, at the right."""
    ax.axhline(y, color=color, linewidth=1.0, linestyle=DASHED)
    ax.annotate(
        label,
        (0.99, y),
        (0, -2 if below else 2),
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top" if below else "bottom",
        fontsize=8.5,
        color=INK,
    )


def legend_below(ax: Axes, columns: int = 1) -> None:
    """Name the lines below the axes, where no line or error bar runs through the names."""
    lines, labels = ax.get_legend_handles_labels()
    if lines:
        style: dict[str, Any] = {"handlelength": 1.5, "columnspacing": 1.1, "borderpad": 0.2}
        ax.figure.legend(lines, labels, loc="outside lower left", ncols=columns, **style)


def plain(text: str, limit: int = 44) -> str:
    """Return text that xml can hold, cut to a number of characters."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", " ", text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def slug(text: str) -> str:
    """Return text as an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())


def _svg(figure: Figure, name: str, label: str) -> str:
    buffer = io.BytesIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=empty)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # its stylesheet would rule the whole page, its metadata names a licence server
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    meant = set(re.findall(r"#([\w.-]+)", buffer.getvalue().decode()))
    for element in root.iter():
        # inside html the namespace is implied
        element.tag = element.tag.removeprefix(_SVG)
        element.tail = None
        if element.attrib.get("id") not in meant:
            element.attrib.pop("id", None)
        if link := element.attrib.pop(_LINK, None):
            element.set("href", link.replace("#", f"#{name}-"))
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
            elif key in ("d", "x", "y", "transform"):
                # hundredths of a point are finer than any screen
                element.set(key, re.sub(r"(\.\d\d)\d+", r"\1", value))
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "img")
    root.set("aria-label", plain(label, 200))
    return ElementTree.tostring(root, encoding="unicode")
