"""The look of all figures: colours, template, colour bars, titles, sliders.

The reference is dark grey; models take the colours of Okabe and Ito (distinct to colour-blind
eyes) in a fixed order; densities are viridis; absolute errors start at white.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from numpy.typing import NDArray

TRUTH = "#333333"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
DENSITY_SCALE = "viridis"
SIGNED_SCALE = ["#8a3d00", PALETTE[1], "#ffffff", PALETTE[0], "#00406b"]
ERROR_SCALE = ["#ffffff", "#fdd0bc", "#fb8a6a", "#d92523", "#67000d"]
_AXIS = dict(showline=True, linecolor="#777", ticks="outside", tickcolor="#777", ticklen=4)
_AXIS |= dict(gridcolor="#e8e8e8", zeroline=False, exponentformat="power", title_standoff=8)
_TITLE = dict(x=0, xref="paper", xanchor="left", y=1, yref="container", yanchor="top", pad_t=14)
_LAYOUT = dict(font=dict(family="Open Sans, Arial, sans-serif", size=13, color="#222"))
_LAYOUT |= dict(paper_bgcolor="white", plot_bgcolor="white", hoverlabel_bgcolor="white")
_LAYOUT |= dict(colorway=PALETTE, xaxis=_AXIS, yaxis=_AXIS, title=dict(font_size=16, **_TITLE))
#: what changes from frame to frame
_MOVING = ("type", *"xyzijk", "x0", "dx", "y0", "dy", "text")
TEMPLATE = go.layout.Template(layout=_LAYOUT | dict(margin=dict(l=75, r=20, t=50, b=60)))


def use_notebook_renderer() -> None:
    """Show figures in notebooks interactively, and as pictures where those can be made.

    Sites that show notebooks without running them draw no plotly; a JPEG beside each figure
    serves their readers. Making one needs kaleido and a Chrome or Chromium browser: without them,
    or where PLOTLY_RENDERER is set, nothing is lost but the JPEG.
    """
    browsers = ("google-chrome", "chromium", "chromium-browser", "chrome")
    can_draw = find_spec("kaleido") and (
        os.environ.get("BROWSER_PATH") or any(map(shutil.which, browsers))
    )
    if "PLOTLY_RENDERER" not in os.environ:
        pio.renderers.default = "plotly_mimetype+jpeg" if can_draw else "plotly_mimetype"


def line_styles(names: Iterable[str], truth: str | None = None) -> dict[str, dict[str, Any]]:
    """Name to plotly line; pass it as `styles` so that several figures agree. `truth` is grey."""
    names = list(names)
    styles = {truth: dict(color=TRUTH, dash="solid", width=3)} if truth in names else {}
    for i, name in enumerate(name for name in names if name != truth):
        dash = ("solid", "dash", "dot")[i // len(PALETTE) % 3]
        styles[name] = dict(color=PALETTE[i % len(PALETTE)], dash=dash, width=2)
    return styles


def colour_range(values: NDArray[np.floating], low: float | None = None) -> dict[str, float]:
    """Ends of a colour axis, cmin and cmax: those of the finite values, or from `low` up."""
    finite = values[np.isfinite(values)]
    ends = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low, high = ends[0] if low is None else low, ends[1]
    return dict(cmin=low, cmax=high if high > low else low + 1)


def colour_axis(values: NDArray[np.floating], kind: str = "ρ") -> dict[str, Any]:
    """Colour axis over values of a `kind`, "ρ", "Δρ" of both signs, or "|error|" from 0 up."""
    bar = dict(title_text=f"{kind} (Å<sup>−3</sup>)", thickness=14, outlinewidth=0)
    bar |= dict(exponentformat="power", x=1, xpad=16, ypad=0, len=1)
    scale = {"Δρ": SIGNED_SCALE, "|error|": ERROR_SCALE}.get(kind, DENSITY_SCALE)
    ends = colour_range(values, 0.0 if kind == "|error|" else None)
    if kind == "Δρ":
        most = max(map(abs, ends.values()))
        ends = dict(cmin=-most, cmax=most)
    return dict(colorscale=scale, colorbar=bar) | ends


def heading(title: str, *below: str) -> dict[str, Any]:
    """Layout with a title, and a small grey line below it, of what is not empty.

    One text: plotly prints its own subtitle over the title where a page draws the figure before
    it is on the screen (`FigureWidget`).
    """
    line = ", ".join(filter(None, below))
    small = f'<br><span style="font-size:13px;color:#666">{line}</span>' if line else ""
    return dict(title_text=title + small, title_pad_t=28 if line else 14)


def film(
    fig: go.Figure, frames: Sequence[Sequence[Any]], labels: Sequence[str], is_timed: bool
) -> go.Figure:
    """Add to a figure of the first frame all frames, traces in its order, slider and button."""
    parts = [[trace.to_plotly_json() for trace in traces] for traces in frames]
    moving = [[{key: t[key] for key in _MOVING if key in t} for t in traces] for traces in parts]
    order = list(range(len(fig.data)))
    fig.frames = [go.Frame(name=str(n), data=t, traces=order) for n, t in enumerate(moving)]
    labels = [label.removesuffix(" fs") for label in labels]
    return fig.update_layout(film_controls(labels, *(("t = ", " fs") if is_timed else ())))


def film_controls(labels: Sequence[str], prefix: str = "", suffix: str = "") -> dict[str, Any]:
    """Layout with slider and play button for frames named 0, 1, ..."""
    now = dict(mode="immediate", transition_duration=0, frame=dict(duration=0, redraw=True))
    play = now | dict(fromcurrent=True, frame=dict(duration=100, redraw=True))
    buttons = [
        dict(label=label, method="animate", args=args)
        for label, args in (("▶", [None, play]), ("❚❚", [[None], now]))
    ]
    steps = [
        dict(label=label, method="animate", args=[[str(frame)], now])
        for frame, label in enumerate(labels)
    ]
    place = dict(y=0, yanchor="top", xanchor="left")
    menu = dict(type="buttons", direction="left", showactive=False, buttons=buttons)
    shown = dict(prefix=prefix, suffix=suffix, xanchor="right")
    slider = dict(steps=steps, currentvalue=shown, x=0.25, len=0.75, pad_t=45, **place)
    return dict(sliders=[slider], updatemenus=[menu | dict(x=0, pad_t=60, **place)])
