"""Results on disk: a self-contained HTML page, readable without a network, and tidy rows.

Models trained from several seeds are compared seed by seed (`paired_ratios`).
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from scipy.stats import t as student

from densitykit import __version__

__all__ = ["merge_rows", "paired_ratios", "run_missing", "write_report"]

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 "Open Sans", Arial, sans-serif; color: #222; max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; }} h2 {{ font-size: 1.25rem; margin-top: 2.5rem; }}
nav {{ background: #f5f5f5; padding: .5rem 1rem; }} a {{ color: #0072B2; }}
section {{ overflow-x: auto; }} footer {{ margin-top: 3rem; color: #666; font-size: .85rem; }}
table {{ border-collapse: collapse; border: 0; font-size: .9rem; margin: 1rem 0; }}
th, td {{ border: 0; border-bottom: 1px solid #ddd; padding: .3rem .8rem; text-align: right; }}
</style>
{script}</head><body>
<h1>{title}</h1>
<nav><ol>{contents}</ol></nav>
{sections}
<footer>densitykit {version}</footer>
</body></html>
"""


def write_report(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[tuple[str, str, go.Figure | None]],
) -> None:
    """Write one page that needs no network: plotly.js is inside, once (5 MB).

    Parameters
    ----------
    path
        The file; it appears, or is replaced, only when complete.
    title
        Plain text, like the headings.
    sections
        Heading, body and figure or None. A body that starts with a tag is taken as HTML (such as
        `pandas.DataFrame.to_html` gives); any other is text, with blank lines between paragraphs.
    """
    drawn = any(figure is not None for _, _, figure in sections)
    heads = [html.escape(heading) for heading, _, _ in sections]
    page = _PAGE.format(
        title=html.escape(title),
        script=f"<script>{get_plotlyjs()}</script>\n" if drawn else "",
        contents="".join(f'<li><a href="#s{i}">{head}</a></li>' for i, head in enumerate(heads)),
        sections="\n".join(_section(i, *section) for i, section in enumerate(sections)),
        version=__version__,
    )
    part = Path(f"{os.fspath(path)}.part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)


def run_missing(
    path: Path,
    columns: Sequence[str],
    keys: Sequence[str],
    wanted: Sequence[tuple],
    make: Callable[..., pd.DataFrame],
) -> pd.DataFrame:
    """Make what a CSV file lacks, piece by piece; a kill loses the piece in work.

    Parameters
    ----------
    path
        The file; it may not exist yet.
    columns
        Of the file.
    keys
        Those of them that say what a row is about.
    wanted
        Values of the keys, of all pieces that the file shall hold.
    make
        Called with the values of one piece; returns its rows, without the keys.

    Returns
    -------
    pandas.DataFrame
        All that the file holds then.
    """
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*columns])
    known = set(rows[[*keys]].itertuples(index=False, name=None))
    for piece in wanted:
        if piece not in known:
            print(", ".join(f"{k} {v}" for k, v in zip(keys, piece, strict=True)), flush=True)
            new = make(*piece).assign(**dict(zip(keys, piece, strict=True)))
            rows = merge_rows(path, new.reindex(columns=[*columns]), keys)
    return rows


def merge_rows(path: Path, rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Put rows into a CSV file, which is replaced in one piece.

    Parameters
    ----------
    path
        The file; it is made if need be.
    rows
        What to put in. Rows of the file that have the same keys give way.
    keys
        Columns that say what a row is about; the file is sorted by them.

    Returns
    -------
    pandas.DataFrame
        All that the file holds then.
    """
    if path.exists():
        old = pd.read_csv(path)
        known = old.set_index([*keys]).index.isin(rows.set_index([*keys]).index)
        rows = pd.concat([old[~known], rows], ignore_index=True)
    rows = rows.sort_values([*keys], kind="stable", ignore_index=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    rows.to_csv(part, index=False, float_format="%.6g")
    part.replace(path)
    return pd.read_csv(path)


def _section(number: int, heading: str, body: str, figure: go.Figure | None) -> str:
    """HTML of one section."""
    if not re.match(r"\s*<[a-zA-Z!]", body):
        paragraphs = [p.strip() for p in html.escape(body).split("\n\n")]
        body = "".join(f"<p>{p}</p>" for p in paragraphs if p)
    options = dict(config=dict(displaylogo=False), div_id=f"figure-{number}", auto_play=False)
    options |= dict(include_plotlyjs=False, full_html=False)
    drawing = "" if figure is None else figure.to_html(**options)
    head = f'<h2 id="s{number}">{html.escape(heading)}</h2>'
    return f"<section>{head}\n{body}\n{drawing}</section>"


def paired_ratios(
    rows: pd.DataFrame, base: str, within: Sequence[str] = ("seed",)
) -> pd.DataFrame:
    """Mean ratio of each metric of variants to that of one of them, seed by seed.

    Parameters
    ----------
    rows
        Columns variant, metric, value and those of ``within``, whose values make the pairs.
    base
        The variant to divide by.
    within
        See above.

    Returns
    -------
    pd.DataFrame
        Rows (variant, metric, ratio, low, high, seeds): the geometric mean of the ratios and its
        95 % interval from Student's t in ln ratio; NaN with one seed.
    """
    table = rows.pivot_table("value", [*within], ["variant", "metric"], sort=False)
    found = []
    for variant, metric in table.drop(columns=base, level="variant").columns:
        if (base, metric) not in table:
            continue
        log = np.log(table[variant, metric] / table[base, metric]).dropna()
        mean, n = log.mean(), len(log)
        half = student.ppf(0.975, n - 1) * log.std() / np.sqrt(n) if n > 1 else np.nan
        found.append((variant, metric, *np.exp([mean, mean - half, mean + half]), n))
    return pd.DataFrame(found, columns=["variant", "metric", "ratio", "low", "high", "seeds"])
