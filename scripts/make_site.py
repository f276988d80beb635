"""Build the site: lessons with their outputs, every module, a gallery, the pages of docs/.

Sources are gathered in a folder of their own, so that links between README, docs, data and lessons
lead where they do in the repository; nothing is run. Warnings are errors.

python scripts/make_site.py build/site        (make docs)
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plotly.io as pio

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["*.md", "docs/*.md", "docs/*.webp", "docs/*.png", "data/*.md", "data/*/*.md", "LICENSE"]
PAGES += ["CITATION.cff", "data/*/*.csv"]
PLOTLY = "application/vnd.plotly.v1+json"


def gather(source: Path) -> None:
    """Copy pages, lessons and plotly; write the pages that only the site has."""
    shutil.rmtree(source, ignore_errors=True)
    for path in sorted(p for pattern in PAGES for p in ROOT.glob(pattern)):
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for page in source.rglob("*.md"):
        page.write_text(_with_links(page, source))
    (source / "notebooks").mkdir()
    (source / "_static" / "gallery").mkdir(parents=True)
    entries = [_lesson(path, source) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    grid = '<div style="display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-end">'
    gallery = "\n".join(["# Gallery", "", grid, *filter(None, entries), "</div>", ""])
    (source / "gallery.md").write_text(gallery)
    modules = [_module(path, source) for path in sorted((ROOT / "densitykit").rglob("*.py"))]
    names = "\n".join(sorted(filter(None, modules)))
    (source / "api.md").write_text(
        f"# Reference\n\n```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n"
    )
    cite = (ROOT / "CITATION.cff").read_text()
    (source / "cite.md").write_text(f"# How to cite\n\n```yaml\n{cite}```\n")
    shutil.copy(ROOT / "docs" / "site" / "index.md", source / "index.md")
    (source / "_static" / "plotly.min.js").write_text(_plotly())
    _copy_mathjax(source / "_static" / "mathjax")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _copy_mathjax(out: Path) -> None:
    """What pages with equations need, so that they need no network."""
    files = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    for folder in ("output/chtml/fonts", "input/tex/extensions"):
        shutil.copytree(files / folder, out / folder)
    shutil.copy(files / "tex-chtml.js", out)


def _with_links(page: Path, source: Path) -> str:
    """A page whose links to what the site does not have are text."""

    def kept(found: re.Match) -> str:
        target = found[2].split("#")[0]
        here = (page.parent / target).resolve()
        if target.startswith("http") or not target:
            return found[0]
        there = ROOT / here.relative_to(source) if here.is_relative_to(source) else here
        is_page = there.suffix in (".md", ".ipynb", ".png", ".webp") and there.is_file()
        return found[0] if is_page else found[1]

    text = re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", kept, page.read_text())
    return text.replace("```mermaid", "```text")


def _lesson(path: Path, source: Path) -> str | None:
    """Copy a lesson, with figures that move; gives its entry in the gallery."""
    notebook = json.loads(path.read_text())
    picture, has_plotly = None, False
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            data: dict[str, Any] = output.get("data", {})
            if PLOTLY in data:
                picture = picture or data.get("image/jpeg")
                figure = pio.from_json(json.dumps(data[PLOTLY]), skip_invalid=True)
                script = False if has_plotly else "../_static/plotly.min.js"
                html = figure.to_html(full_html=False, include_plotlyjs=script, auto_play=False)
                has_plotly = True
                output["data"] = {"text/html": html}
            data.pop("application/vnd.jupyter.widget-view+json", None)
    (source / "notebooks" / path.name).write_text(json.dumps(notebook))
    if picture is None:
        return None
    image = source / "_static" / "gallery" / f"{path.stem}.jpg"
    image.write_bytes(base64.b64decode(picture))
    title = "".join(notebook["cells"][0]["source"]).splitlines()[0].lstrip("# ")
    shown = f'<img src="_static/gallery/{path.stem}.jpg" alt=""><br>{title}'
    return f'<a href="notebooks/{path.stem}.html" style="width: 13rem">{shown}</a>'


def _module(path: Path, source: Path) -> str | None:
    """Write the page of a module; of packages only what they say of themselves."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__main__":
        return None
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    members = "" if is_package else "   :members:\n   :member-order: bysource\n"
    page = f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n{members}```\n"
    (source / "api").mkdir(exist_ok=True)
    (source / "api" / f"{name}.md").write_text(page)
    return f"api/{name}"


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    source = out.with_name(out.name + "-source")
    gather(source)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E"]
    command += ["-c", str(ROOT / "docs" / "site"), "-D", f"html_static_path={source / '_static'}"]
    command += [str(source), str(out)]
    status = subprocess.run(command).returncode
    print(f"{out / 'index.html'}" if status == 0 else "the site has warnings, see above")
    sys.exit(status)


if __name__ == "__main__":
    main()
