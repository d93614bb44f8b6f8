"""The pictures of a record, where matplotlib is there: bars for cases, lines for curves."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Sequence[Mapping[str, Any]]
MISSING = '<p>No plot: matplotlib is not installed (pip install "gpt4v_fast[demo]").</p>'


def curves(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """The points of every curve by its title, in the order of x."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for r in results:
        if r["point"] is not None:
            found.setdefault(f"{r['op']} {r['point']['curve']}, {r['dtype']} {r['direction']}", []).append(r)
    return {title: sorted(points, key=lambda r: r["point"]["x"]) for title, points in found.items()}


def html_images(op: str, results: Results) -> list[str]:
    """The pictures of an op's results, for a page that loads nothing."""
    try:
        import matplotlib
    except ImportError:
        return [MISSING]
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    cases = [r for r in results if r["point"] is None]
    images = [_image(f"{op}: share of peak by case", _bars(Figure, cases))] if cases else []
    for title, points in curves(results).items():
        images.append(_image(title, _lines(Figure, title, points)))
    return images


def _image(title: str, figure: Figure) -> str:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    encoded = base64.b64encode(image.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{encoded}">'


OURS = "C0"
PEERS = [f"C{i}" for i in range(1, 10)]


def _colours(results: Results) -> dict[str, str]:
    """The contenders that have something to draw, each with a colour; ours has one that no peer gets."""
    rows = [row for r in results for row in r["contenders"] if row["median_ms"] or row["extra_bytes"] is not None]
    ours = {row["name"] for row in rows if row["ours"]}
    peers = itertools.cycle(PEERS)
    return {name: OURS if name in ours else next(peers) for name in dict.fromkeys(row["name"] for row in rows)}


def _bars(new_figure: Callable[..., Figure], results: Results) -> Figure:
    """Every contender's share of the measured peak."""
    colours = _colours(results)
    height = 0.8 / max(1, len(colours))
    figure = new_figure(figsize=(11, 1.2 + 0.25 * max(1, len(colours)) * len(results)), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, colour) in enumerate(colours.items()):
        bars = [
            (y + i * height, 100 * row["share_of_peak"])
            for y, r in enumerate(results)
            for row in r["contenders"]
            if row["name"] == name and row["share_of_peak"] is not None
        ]
        axes.barh([y for y, _ in bars], [x for _, x in bars], height=height, label=name, color=colour)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(results))])
    axes.set_yticklabels([f"{r['case']}\n{r['dtype']} {r['direction']}" for r in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the peak measured beside it")
    axes.legend(fontsize=8)
    return figure


def _lines(new_figure: Callable[..., Figure], title: str, points: Results) -> Figure:
    """Time over x and, where it was measured, extra memory; with the line that proportional times would make."""
    point = points[0]["point"]
    has_memory = any(row["extra_bytes"] is not None for r in points for row in r["contenders"])
    figure = new_figure(figsize=(11 if has_memory else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if has_memory else 1, squeeze=False)[0]
    figure.suptitle(title, fontsize=10)
    for name, colour in _colours(points).items():
        rows = [(r["point"]["x"], row) for r in points for row in r["contenders"] if row["name"] == name]
        times = [(x, row["median_ms"]) for x, row in rows if row["status"] == "timed"]
        axes[0].plot([x for x, _ in times], [y for _, y in times], marker="o", label=name, color=colour)
        if point["proportional"] and times and any(row["ours"] for _, row in rows):
            last_x, last_y = times[-1]
            axes[0].plot(
                [0, last_x], [0, last_y], linestyle=":", color="gray", label="in proportion to the blocks left"
            )
        if has_memory:
            extra = [(x, row["extra_bytes"] / 2**20) for x, row in rows if row["extra_bytes"] is not None]
            axes[1].plot([x for x, _ in extra], [y for _, y in extra], marker="o", label=name, color=colour)
    for one, label in zip(axes, ("ms", "MiB extra"), strict=False):
        if not point["proportional"]:
            one.set_xscale("log", base=2)
            one.set_yscale("log")
        one.set_xlabel(point["x_name"])
        one.set_ylabel(label)
        one.legend(fontsize=8)
    return figure
