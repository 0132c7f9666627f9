"""The report's figures: numbers in, a matplotlib Figure out, and a Figure as inline SVG.

Knows nothing of a run's files. Colours are roles (`ROLES`): in the SVG each becomes a CSS
variable of the page, so that one figure reads in light, in dark and on paper.
"""

import io
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# CSS variable to its colour in light. No two are equal, since the SVG is searched for them.
ROLES: dict[str, str] = {
    "ink": "#1b1f24",
    "muted": "#5c6672",
    "line": "#d8dde4",
    "page": "#fffffe",
    "series-0": "#1f5fbf",
    "series-1": "#b3541e",
    "series-2": "#1d7a5a",
    "series-3": "#8a3fa0",
    "series-4": "#8a6d00",
    "level-0": "#b4c2d3",
    "level-1": "#8fabc9",
    "level-2": "#6790bd",
    "level-3": "#3569a6",
    "level-4": "#0b3d78",
}
SERIES = [ROLES[f"series-{place}"] for place in range(5)]
LEVELS = [ROLES[f"level-{place}"] for place in range(5)]
MARKERS = "os^Dv"
INK, MUTED, LINE, PAGE = (ROLES[role] for role in ("ink", "muted", "line", "page"))
LONGEST_LABEL = 28  # Characters.
FONT = 10.0  # Points, and units of the SVG's viewBox.


def gain(curves: Mapping[str, Any]) -> Figure:
    """Cumulative gain and lift.

    Args:
        curves: Model to {"share", "gain"}, shares of all rows and of all positives, ascending.
    """
    figure, (left, right) = _panels(1, 2, width=8.4, height=3.6)
    for place, (name, curve) in enumerate(curves.items()):
        share, found = np.asarray(curve["share"]), np.asarray(curve["gain"])
        style: dict[str, Any] = {
            "color": SERIES[place],
            "linestyle": "-" if place == 0 else (0, (5, 2)),
        }
        left.plot(share, found, label=_plain(name), **style)
        some = share > 0
        right.plot(share[some], found[some] / share[some], **style)
    left.plot([0, 1], [0, 1], color=MUTED, linestyle=":", label="at random")
    right.axhline(1, color=MUTED, linestyle=":")
    _label(left, "share of rows, best scored first", "share of positives found")
    _label(right, "share of rows, best scored first", "lift over random")
    right.set_ylim(bottom=0)
    left.legend(loc="lower right", frameon=False, labelcolor=INK)
    return figure


def calibration(curves: Mapping[str, Any]) -> Figure:
    """Predicted against observed rates, and the rows of each bin.

    Args:
        curves: Model to {"predicted", "observed", "count"}, one entry a bin.
    """
    figure, (top, bottom) = _panels(
        2, 1, width=5.2, height=5.0, sharex=True, height_ratios=(3.2, 1)
    )
    for place, (name, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": SERIES[place], "marker": MARKERS[place], "markersize": 5}
        dashes: Any = "-" if place == 0 else (0, (5, 2))
        top.plot(
            curve["predicted"], curve["observed"], linestyle=dashes, label=_plain(name), **style
        )
        bottom.vlines(curve["predicted"], 0, curve["count"], color=SERIES[place], linewidth=1)
        bottom.plot(curve["predicted"], curve["count"], linestyle="", **style)
    every = [v for c in curves.values() for key in ("predicted", "observed") for v in c[key]]
    top.plot([0, max(every)], [0, max(every)], color=MUTED, linestyle=":", label="as predicted")
    _label(top, "", "observed rate")
    _label(bottom, "mean predicted probability", "rows")
    bottom.set_ylim(bottom=0)
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    top.legend(loc="upper left", frameon=False, labelcolor=INK)
    return figure


def sweep_progress(families: Sequence[str], scores: Sequence[float | None], title: str) -> Figure:
    """Validation score of each variant and the best so far.

    Args:
        families: Each variant's, in order of finishing.
        scores: Validation score, None where the variant failed.
        title: What the score is called.
    """
    figure, (axes,) = _panels(1, 1, width=8.4, height=3.6)
    order = np.arange(1, len(scores) + 1)
    values = np.array([math.nan if score is None else score for score in scores])
    failed = np.isnan(values)
    for place, family in enumerate(dict.fromkeys(families)):
        mine = np.array([each == family for each in families]) & ~failed
        axes.plot(
            order[mine], values[mine], linestyle="", marker=MARKERS[place % 5], markersize=4,
            color=SERIES[place % 5], alpha=0.75, label=_plain(family),
        )  # fmt: skip
    best = np.fmax.accumulate(values)
    axes.step(order, best, where="post", color=INK, linewidth=1.4, label="best so far")
    if failed.any():
        axes.plot(
            order[failed], np.full(failed.sum(), 0.02), linestyle="", marker="x", markersize=5,
            color=MUTED, label="failed", transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _label(axes, "variants, in order of finishing", title)
    figure.legend(loc="outside upper left", ncols=6, frameon=False, labelcolor=INK)
    return figure


def pareto(
    families: Sequence[str], costs: Sequence[float], scores: Sequence[float], title: str
) -> Figure:
    """Each variant's score over its cost, and the front that no other is better than.

    Args:
        families: Each variant's.
        costs: What a row takes, microseconds, above 0.
        scores: Validation score of each variant.
        title: What the score is called.
    """
    figure, (axes,) = _panels(1, 1, width=8.4, height=3.6)
    x, y = np.asarray(costs), np.asarray(scores)
    for place, family in enumerate(dict.fromkeys(families)):
        mine = np.array([each == family for each in families])
        axes.plot(
            x[mine], y[mine], linestyle="", marker=MARKERS[place % 5], markersize=4,
            color=SERIES[place % 5], alpha=0.75, label=_plain(family),
        )  # fmt: skip
    best = front(costs, scores)
    axes.step(x[best], y[best], where="post", color=INK, linewidth=1.4, label="Pareto front")
    axes.set_xscale("log")
    _label(axes, "microseconds a row", title)
    figure.legend(loc="outside upper left", ncols=6, frameon=False, labelcolor=INK)
    return figure


def front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Places of those that none beats in score at no more cost, the cheapest first."""
    found: list[int] = []
    for place in sorted(range(len(costs)), key=lambda at: (costs[at], -scores[at])):
        if not found or scores[place] > scores[found[-1]]:
            found.append(place)
    return found


def parallel_coordinates(
    settings: Mapping[str, Sequence[Any]], scores: Sequence[float], title: str
) -> Figure:
    """One line a variant across its settings, coloured by the fifth its validation score is in.

    Args:
        settings: Setting to its value in each variant. Numbers above 0 that span a factor of 8
            or more are on a log axis; values that aren't numbers are spaced evenly.
        scores: Validation score of each variant.
        title: What the score is called.
    """
    score_n = np.asarray(scores, dtype=np.float64)
    columns = {**settings, title: list(scores)}
    figure, (axes,) = _panels(1, 1, width=max(5.0, 1.45 * len(columns) + 0.6), height=4.2)
    heights = []
    for place, (name, values) in enumerate(columns.items()):
        height, ticks, log = _scale(values)
        heights.append(height)
        axes.vlines(place, 0, 1, color=MUTED, linewidth=0.8)
        for at, text in ticks:
            axes.annotate(
                _plain(text), (place, at), xytext=(-4, 0), textcoords="offset points", ha="right",
                va="center", color=INK, fontsize=8, zorder=5,
                bbox={"facecolor": PAGE, "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            )  # fmt: skip
        label = _plain(name) + ("\n(log)" if log else "")
        axes.text(place, -0.06, label, ha="center", va="top", color=INK, fontsize=9)
    lines = np.stack([np.broadcast_to(np.arange(len(columns)), (len(score_n), len(columns))),
                      np.stack(heights, axis=1)], axis=2)  # fmt: skip
    fifth = fifths(score_n)
    for level in np.unique(fifth):
        mine = np.flatnonzero(fifth == level)
        low, high = score_n[mine].min(), score_n[mine].max()
        axes.add_collection(
            LineCollection(
                list(lines[mine]), colors=LEVELS[level], linewidths=0.8 + 0.15 * level,
                alpha=0.8, zorder=2 + 0.1 * level, label=f"{low:.4f} to {high:.4f}",
            ),
            autolim=False,
        )  # fmt: skip
    best = int(np.argmax(score_n))
    axes.plot(np.arange(len(columns)), lines[best, :, 1], color=SERIES[1], linewidth=2.2, zorder=4,
              label=f"best: {score_n[best]:.4f}")  # fmt: skip
    axes.set_xlim(-0.6, len(columns) - 0.7)
    axes.set_ylim(-0.2, 1.04)
    axes.set_axis_off()
    legend = figure.legend(
        loc="outside upper left", ncols=3, frameon=False, labelcolor=INK, fontsize=8,
        title=f"{title}, by fifth of the variants", title_fontsize=8, alignment="left",
    )  # fmt: skip
    legend.get_title().set_color(INK)
    return figure


def fifths(values: np.ndarray) -> np.ndarray:
    """The fifth by rank that each value is in, 0 the lowest; equal values are in the same.

    Args:
        values: (n,) numbers.

    Returns:
        (n,) int64, 0 to 4.
    """
    # An edge is one of the values, lest a mean of two put equal ones apart.
    edges = np.quantile(values, (0.2, 0.4, 0.6, 0.8), method="higher")
    return np.searchsorted(edges, values, side="right")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; true and false aren't."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def svg(figure: Figure, *, ident: str, alt: str) -> str:
    """The figure as an `<svg>` element to put into a page that sets the variables of `ROLES`.

    Args:
        figure: From this module.
        ident: Begins every id in it; no two figures of a page share it.
        alt: What a reader who can't see the figure is told.
    """
    buffer = io.StringIO()
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": ident,
        "svg.id": f"{ident}-svg",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Only for measuring: the reader's own font draws the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    view = re.search(r'viewBox="0 0 ([0-9.]+) [^"]*"', text)
    assert view is not None
    # So that text is of one size in all figures, and none is wider than its column.
    width = f"max-width: {float(view[1]) * 1.25:.0f}px"
    body = text[text.index(">") + 1 :]
    body = re.sub(r'(?<=[ ])id="', f'id="{ident}-', body)
    body = body.replace("url(#", f"url(#{ident}-").replace('xlink:href="#', f'href="#{ident}-')
    body = re.sub(r'style="[^"]*"', _with_variables, body)
    return f'<svg {view[0]} style="{width}" role="img" aria-label="{_attribute(alt)}">{body}'


def _with_variables(style: re.Match[str]) -> str:
    text = re.sub(r"(font: [^'\";]*?px)[^;\"]*", r"\1 sans-serif", style[0])
    for role, colour in ROLES.items():
        text = text.replace(colour, f"var(--{role})")
    return text


def _attribute(text: str) -> str:
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(sign, entity)
    return text


def _plain(text: str) -> str:
    """Short enough for a figure (the page's tables have it whole), and no formula."""
    text = text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"
    # Between two dollars matplotlib would read a formula.
    return text.replace("$", r"\$")


def _panels(
    rows: int, columns: int, *, width: float, height: float, **shape: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` by `height` inches and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    grid = figure.subplots(rows, columns, squeeze=False, **shape)
    panels: list[Axes] = list(itertools.chain.from_iterable(grid))
    for axes in panels:
        axes.set_facecolor("none")
        axes.grid(color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=FONT - 1, length=0)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(MUTED)
    return figure, panels


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK, fontsize=FONT)
    axes.set_ylabel(y, color=INK, fontsize=FONT)


def _scale(values: Sequence[Any]) -> tuple[np.ndarray, list[tuple[float, str]], bool]:
    """Heights in [0, 1], ticks as (height, text), and whether the axis is log."""
    if not all(is_number(value) for value in values):
        names = [str(value) for value in values]
        places = {name: place for place, name in enumerate(sorted(set(names)))}
        top = max(len(places) - 1, 1)
        ticks = [(place / top, name) for name, place in places.items()]
        return np.array([places[name] / top for name in names]), ticks, False
    numbers = np.asarray(values, dtype=np.float64)
    low, high = numbers.min(), numbers.max()
    log = bool(low > 0 and high / low >= 8)
    span = np.log(high / low) if log else high - low

    def height(number: Any) -> Any:
        if span == 0:
            return 0 * number + 0.5
        return (np.log(number / low) if log else number - low) / span

    some = np.unique(numbers)
    if len(some) > 6 or np.diff(height(some)).min(initial=1) < 0.06:
        some = np.geomspace(low, high, 5) if log else np.linspace(low, high, 5)
    return height(numbers), [(float(height(each)), _tick(float(each))) for each in some], log


def _tick(number: float) -> str:
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
