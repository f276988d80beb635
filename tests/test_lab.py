"""Lessons in JupyterLab, in a browser: they run, figures are drawn, every control moves them.

The page may not complain on its console; `--durations=0` prints how long each lesson takes.

nbval runs the same cells without a page, so it cannot see a figure that JupyterLab does not draw.
Needs Chrome or Chromium (the one that kaleido finds); the browser is driven by choreographer,
which kaleido brings.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from choreographer import Browser
from choreographer.browsers.chromium import chromium_based_browsers
from choreographer.utils import get_browser_path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
CHROME = os.environ.get("BROWSER_PATH") or get_browser_path(chromium_based_browsers)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROME is None, reason="no Chrome or Chromium on this machine"),
]

RUN = """(async () => {
  await jupyterapp.restored;
  const panel = jupyterapp.shell.currentWidget;
  await panel.revealed;
  await panel.sessionContext.ready;
  await jupyterapp.commands.execute('notebook:run-all-cells');
  return JSON.stringify(panel.content.model.sharedModel.toJSON().cells);
})()"""
#: scroll to a cell; JupyterLab draws only what is near the screen
SHOW = """(async () => {{
  const notebook = jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = {index};
  await notebook.scrollToItem({index}, 'center');
}})()"""
STATE = """(() => {{
  const cell = jupyterapp.shell.currentWidget.content.widgets[{index}].node;
  const plot = cell.querySelector('.jp-RenderedPlotly');
  const rail = cell.querySelector('.slider-rail-touch-rect');
  const box = rail && rail.getBoundingClientRect();
  return JSON.stringify({{
    drawn: plot ? plot.querySelectorAll('svg.main-svg').length : 0,
    slider: box && [box.left + 0.8 * box.width, box.top + 0.5 * box.height],
    active: rail && plot._fullLayout.sliders[0].active,
    shown: plot && plot.data ? JSON.stringify(plot.data).length + JSON.stringify(plot.data) : '',
  }});
}})()"""


#: what the page complains of, from its first line on
LISTEN = """window.complaints = [];
addEventListener('error', e => complaints.push(String(e.message)));
addEventListener('unhandledrejection', e => complaints.push(String(e.reason)));
const say = console.error;
console.error = (...words) => { complaints.push(words.map(String).join(' ')); say(...words); };
"""
#: of the browser and of JupyterLab themselves, with no lesson open as well
HARMLESS = re.compile("ResizeObserver|favicon|Failed to load resource")
#: all that the figures of the explorer of a cell show, in a few letters; nothing before they do
WIDGET = """(() => {{
  const cell = jupyterapp.shell.currentWidget.content.widgets[{index}].node;
  const plots = [...cell.querySelectorAll('.js-plotly-plot')].filter(x => x.data && x.offsetWidth);
  const plain = (_, x) => ArrayBuffer.isView(x) ? Array.from(x) : x;
  const text = plots.map(x => JSON.stringify([x.data, x.layout.title], plain)).join();
  let hash = 0;
  for (let i = 0; i < text.length; i++) hash = (31 * hash + text.charCodeAt(i)) | 0;
  return text && hash + ' ' + text.length;
}})()"""
#: run a cell again; anywidget gives a figure two seconds to load, a busy machine needs more
AGAIN = """(async () => {{
  jupyterapp.shell.currentWidget.content.activeCellIndex = {index};
  await jupyterapp.commands.execute('notebook:run-cell');
}})()"""
#: each control of an explorer: what is done to it
CONTROL = """(() => {{
  const cell = jupyterapp.shell.currentWidget.content.widgets[{index}].node;
  const all = (what) => [...cell.querySelectorAll(what)].filter(x => x.offsetWidth);
  const named = (what, name) => all(what).find(x => x.textContent.trim() === name);
  {action};
}})()"""
SLIDERS = {
    name: f"all('.noUi-handle')[{i}].focus()" for i, name in enumerate(("time", "plane", "level"))
}
CLICKS = {
    "normal": "named('button', 'x').click()",
    "hkl": "named('button', 'hkl').click()",
    "indices": "const box = all('.widget-text input')[0]; box.value = '1 1 0'; "
    "for (const name of ['input', 'change']) box.dispatchEvent(new Event(name, {bubbles: true}))",
    "play": "all('.jupyter-widgets.widget-play button')[0].click()",
    "numbers": "all('.lm-TabBar-tab')[1].click()",
}


class Page:
    """A page of JupyterLab; ``js`` gives the value of an expression."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab

    async def js(self, expression: str) -> Any:
        options = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        reply = (await self.tab.send_command("Runtime.evaluate", options))["result"]
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    async def wait_for(
        self, found: Callable[[], Awaitable[Any]], seconds: float, what: str
    ) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := await found():
                return value
            await asyncio.sleep(0.2)
        raise AssertionError(f"{what}: nothing after {seconds} s")

    async def is_content(self) -> None:
        """Raise if the page has complained of anything that is ours."""
        found = json.loads(await self.js("JSON.stringify(window.complaints)"))
        assert not [x for x in found if not HARMLESS.search(x)], found

    async def state(self, index: int) -> dict[str, Any]:
        return json.loads(await self.js(STATE.format(index=index)))

    async def click(self, x: float, y: float) -> None:
        where = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for event in ("mousePressed", "mouseReleased"):
            await self.tab.send_command("Input.dispatchMouseEvent", where | {"type": event})

    async def press(self, key: str, code: int) -> None:
        which = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        for event in ("keyDown", "keyUp"):
            await self.tab.send_command("Input.dispatchKeyEvent", which | {"type": event})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], str]]:
    """JupyterLab on a copy of the lessons, with settings of its own; gives the address of one."""
    root = tmp_path_factory.mktemp("lab")
    (root / "notebooks").mkdir()
    (root / "data").symlink_to(ROOT / "data")
    folders = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    own = {f"JUPYTER_{name}": str(root / name) for name in folders}
    own |= {f"JUPYTERLAB_{name}_DIR": str(root / name) for name in ("SETTINGS", "WORKSPACES")}
    own |= {"DENSITYKIT_FAST": "1", "OMP_NUM_THREADS": "1", "PLOTLY_RENDERER": "plotly_mimetype"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--port={port}", f"--ServerApp.root_dir={root}", "--IdentityProvider.token="]
    options += ["--no-browser", "--allow-root", "--expose-app-in-browser"]
    with (root / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *options],
            env=os.environ | own,
            stdout=log,
            stderr=log,
        )
    try:
        _wait_for_server(f"http://127.0.0.1:{port}/api", root / "lab.log")

        def address(notebook: Path) -> str:
            (root / "notebooks" / notebook.name).write_bytes(notebook.read_bytes())
            return f"http://127.0.0.1:{port}/lab/tree/notebooks/{notebook.name}?reset"

        yield address
    finally:
        server.terminate()
        server.wait(30)


def _wait_for_server(address: str, log: Path) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(address)
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()}")


async def _open(browser: Browser, address: str) -> Page:
    """A page of JupyterLab that listens to what the browser has to say."""
    page = Page(await browser.create_tab())
    await page.tab.send_command("Page.enable")
    await page.tab.send_command("Page.addScriptToEvaluateOnNewDocument", {"source": LISTEN})
    await page.tab.send_command("Page.navigate", {"url": address})
    ready = "!!window.jupyterapp && !!document.querySelector('.jp-NotebookPanel .jp-CodeCell')"
    await page.wait_for(lambda: page.js(ready), 60, "JupyterLab")
    return page


async def _read(address: str) -> int:
    """Run a lesson, look at each figure, move each slider; returns how many have one."""
    async with Browser(path=CHROME, headless=True) as browser:
        page = await _open(browser, address)
        screen = {"width": 1400, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        await page.tab.send_command("Emulation.setDeviceMetricsOverride", screen)
        cells = json.loads(await page.js(RUN))
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        outputs = [output for cell in code for output in cell["outputs"]]
        assert not [o["evalue"] for o in outputs if o["output_type"] == "error"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        drawn = _with(cells, lambda data: PLOTLY in data)
        # progress bars are widgets as well
        explorers = _with(cells, _explorer)
        assert drawn or explorers, "no figure in this lesson"
        for index in explorers:
            await _turn(page, index)
        moving = sum([await _look(page, index) for index in drawn]) + len(explorers)
        await page.is_content()
        return moving


def _explorer(data: dict[str, Any]) -> bool:
    """An explorer, or the page that holds one."""
    return bool(re.search("Explorer|Dropdown", str(data.get("text/plain"))))


def _with(cells: list[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool]) -> list[int]:
    """Cells that have such an output."""
    outputs = [cell.get("outputs", ()) for cell in cells]
    return [i for i, out in enumerate(outputs) if any(wanted(o.get("data", {})) for o in out)]


async def _turn(page: Page, index: int) -> None:
    """Assert that the explorer of a cell is drawn, and follows each of its controls."""

    async def drawn() -> str:
        await page.js(SHOW.format(index=index))
        return await page.js(WIDGET.format(index=index))

    await page.wait_for(drawn, 30, f"explorer of cell {index}")
    await asyncio.sleep(3)
    for _ in range(3):  # as a reader would, who sees that it does not move
        if not await page.js("complaints.splice(0).some(x => x.includes('[anywidget]'))"):
            break
        await page.js(AGAIN.format(index=index))
        await asyncio.sleep(3)
    for name, action in (SLIDERS | CLICKS).items():
        await asyncio.sleep(1)
        before = await drawn()
        await page.js(CONTROL.format(index=index, action=action))
        if name in SLIDERS:
            await page.press("ArrowRight", 39)

        async def moved(before: str = before) -> bool:
            await asyncio.sleep(1)  # time for the page
            return before != await page.js(WIDGET.format(index=index))

        await page.wait_for(moved, 120, f"{name} of the explorer of cell {index}")


async def _look(page: Page, index: int) -> bool:
    """Assert that the figure of a cell is drawn, and moves with its slider, if it has one."""

    async def drawn() -> dict[str, Any] | None:
        await page.js(SHOW.format(index=index))
        state = await page.state(index)
        return state if state["drawn"] else None

    await page.wait_for(drawn, 30, f"figure of cell {index}")
    await asyncio.sleep(0.5)  # the notebook scrolls until all near it has its size
    before = await page.state(index)
    if not before["slider"]:
        return False
    await page.click(*before["slider"])

    async def moved() -> bool:
        after = await page.state(index)
        return after["active"] != before["active"] and after["shown"] != before["shown"]

    await page.wait_for(moved, 10, f"slider of cell {index}")
    return True


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_lesson_in_the_browser(notebook: Path, lab: Callable[[Path], str]) -> None:
    found = asyncio.run(_read(lab(notebook)))
    cells = json.loads(notebook.read_text())["cells"]
    saved = [o.get("data", {}) for c in cells for o in c.get("outputs", ())]
    moving = [
        "sliders" in data.get(PLOTLY, {}).get("layout", {}) or _explorer(data) for data in saved
    ]
    assert found == sum(moving)


CHOOSE = """(() => {{
  const cell = jupyterapp.shell.currentWidget.content.widgets[{index}].node;
  const list = cell.querySelector('select');
  list.selectedIndex = {choice};
  list.dispatchEvent(new Event('change', {{bubbles: true}}));
}})()"""
TITLE = """(() => {{
  const cell = jupyterapp.shell.currentWidget.content.widgets[{index}].node;
  const texts = cell.querySelectorAll('.gtitle, option:checked');
  return [...texts].map(x => x.textContent).join();
}})()"""


async def _choose(address: str) -> tuple[str, str]:
    """Run the app, choose another system; titles before and after."""
    async with Browser(path=CHROME, headless=True) as browser:
        page = await _open(browser, address)
        cells = json.loads(await page.js(RUN))
        (index,) = _with(cells, _explorer)

        async def title() -> str:
            await page.js(SHOW.format(index=index))
            found = await page.js(TITLE.format(index=index))
            return found if "=" in found else ""

        before = await page.wait_for(title, 60, "the app")
        action = "named('button', 'compare').click()"
        await page.js(CONTROL.format(index=index, action=action))

        async def both() -> bool:
            return "l²" in await title()

        await page.wait_for(both, 120, "the app with an emulator")
        await page.js(CHOOSE.format(index=index, choice=3))

        async def other() -> str:
            found = await title()
            return found if found.split("z =")[-1] != before.split("z =")[-1] else ""

        after = await page.wait_for(other, 60, "the app with another system")
        await page.is_content()
        return before, after


def test_the_app_shows_another_system(lab: Callable[[Path], str]) -> None:
    before, after = asyncio.run(_choose(lab(ROOT / "notebooks" / "app.ipynb")))
    assert "lithium" in before and "aluminium" in after
