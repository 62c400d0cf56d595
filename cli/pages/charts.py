"""Curves and histograms as SVG to put into a page. Their colours are the page's, so they follow its light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from edgeflame.dataset import GOOD

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH_IN, DPI = 5.2, 100

# matplotlib knows no CSS: it draws in colours that nobody would choose, which then become the page's variables.
_VARIABLES = {
    "#010203": "var(--ink)",
    "#010204": "var(--soft)",
    "#010205": "var(--line)",
    "#010206": "var(--good)",
    "#010207": "var(--bad)",
    "#010208": "var(--accent)",
    **{f"#01030{index}": f"var(--class{index})" for index in range(6)},
}
_COLOUR = {css.removeprefix("var(--").removesuffix(")"): code for code, css in _VARIABLES.items()}


def roc_chart(
    good: npt.NDArray[np.floating], by_class: Mapping[str, npt.NDArray[np.floating]], threshold: float
) -> str:
    """Shares of defective images caught against good ones rejected; the dot is the threshold."""
    import numpy as np
    from sklearn.metrics import roc_curve

    figure, axes = _figure(4.3)
    for style, name, labels, scores in _curves(good, by_class):
        fpr, tpr, _ = roc_curve(labels, scores)
        axes.plot(fpr, tpr, label=name, **style)
    everything = np.concatenate(list(by_class.values()))
    axes.plot([0, 1], [0, 1], color=_COLOUR["line"], linewidth=1)
    axes.plot((good > threshold).mean(), (everything > threshold).mean(), **_DOT)
    axes.set_xlabel("good photographs rejected")
    axes.set_ylabel("defective photographs caught")
    return _finish(figure, axes, "roc", legend="lower right")


def precision_recall_chart(
    good: npt.NDArray[np.floating], by_class: Mapping[str, npt.NDArray[np.floating]], threshold: float
) -> str:
    """How many of the rejected are defective against how many of the defective are caught."""
    import numpy as np
    from sklearn.metrics import precision_recall_curve

    figure, axes = _figure(4.3)
    for style, name, labels, scores in _curves(good, by_class):
        precision, recall, _ = precision_recall_curve(labels, scores)
        axes.plot(recall, precision, label=name, drawstyle="steps-post", **style)
    everything = np.concatenate(list(by_class.values()))
    caught, rejected = (everything > threshold).sum(), (good > threshold).sum()
    if caught + rejected:
        axes.plot(caught / len(everything), caught / (caught + rejected), **_DOT)
    axes.set_xlabel("defective photographs caught")
    axes.set_ylabel("share of the rejected that is defective")
    return _finish(figure, axes, "pr", legend=None)


def histogram_chart(by_label: Mapping[str, npt.NDArray[np.floating]], threshold: float) -> str:
    """Scores of the good images and of each class, one row each, as multiples of the threshold."""
    import numpy as np

    ratios = {name: scores / threshold for name, scores in by_label.items()}
    everything = np.concatenate(list(ratios.values()))
    low, high = max(1e-3, min(0.5, float(everything.min()))), max(1.5, float(everything.max()))
    bins = np.geomspace(low * 0.98, high * 1.02, 48)
    figure, axes_of_all = _figure(0.72 * len(ratios) + 0.75, rows=len(ratios))
    rows = axes_of_all if len(ratios) > 1 else [axes_of_all]
    for axes, (name, values) in zip(rows, ratios.items(), strict=True):
        colour = _COLOUR["good" if name == GOOD else "bad"]
        axes.hist(np.clip(values, bins[0], bins[-1]), bins=bins, color=colour, alpha=0.8)
        axes.axvline(1.0, color=_COLOUR["accent"], linewidth=1.4, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_yticks([])
        axes.set_ylabel(f"{name.replace('_', ' ')}\n{len(values)}", rotation=0, ha="right", va="center", fontsize=10.5)
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
    ticks = [tick for tick in (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10) if bins[0] <= tick <= bins[-1]]
    rows[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    rows[-1].minorticks_off()
    rows[-1].set_xlabel("score over threshold (dashed: the threshold)")
    return _svg(figure, "histogram")


def _curves(
    good: npt.NDArray[np.floating], by_class: Mapping[str, npt.NDArray[np.floating]]
) -> Iterator[tuple[dict[str, Any], str, npt.NDArray[Any], npt.NDArray[Any]]]:
    """Line style, name, labels and scores of each class against the good, thin, and of all of them, thick, on top."""
    import numpy as np

    kinds = list(by_class.items()) if len(by_class) > 1 else []
    for index, (name, scores) in enumerate([*kinds, ("all defects", np.concatenate(list(by_class.values())))]):
        style: dict[str, Any] = {"color": _COLOUR["ink"], "linewidth": 2.4}
        if index < len(kinds):
            dashes = ("-", "--", ":")[(index // 6) % 3]
            style = {"color": _COLOUR[f"class{index % 6}"], "linewidth": 1.3, "linestyle": dashes}
        labels = np.concatenate([np.zeros(len(good)), np.ones(len(scores))])
        yield style, name.replace("_", " "), labels, np.concatenate([good, scores])


_DOT: dict[str, Any] = {
    "marker": "o",
    "markersize": 8,
    "color": _COLOUR["accent"],
    "linestyle": "none",
    "zorder": 5,
    "label": "at the threshold",
}


def _figure(height_in: float, rows: int = 1) -> tuple[Figure, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    soft, line = _COLOUR["soft"], _COLOUR["line"]
    with mpl.rc_context(
        {
            "font.size": 11.5,
            "text.color": _COLOUR["ink"],
            "axes.labelcolor": soft,
            "axes.edgecolor": line,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": line,
            "grid.linewidth": 0.8,
            "xtick.color": line,
            "ytick.color": line,
            "xtick.labelcolor": soft,
            "ytick.labelcolor": soft,
        }
    ):
        figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
        return figure, figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0] if rows > 1 else figure.subplots()


def _finish(figure: Figure, axes: Axes, name: str, *, legend: Literal["lower right"] | None) -> str:
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.03)
    if legend is not None:
        style = {"frameon": False, "fontsize": 10, "handlelength": 1.5, "labelspacing": 0.35}
        axes.legend(loc=legend, labelcolor=_COLOUR["ink"], **style)
    return _svg(figure, name)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element in the page's colours and font."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Its names are given out anew for every figure; a page has several figures.
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    for code, css in _VARIABLES.items():
        text = text.replace(code, css)
    return text
