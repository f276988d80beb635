"""What README and docs promise: links lead somewhere, commands are commands, code runs."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import yaml

import densitykit as dk
from densitykit.cli import parser
from densitykit.io.schema import SCHEMA_VERSION, schema_for

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.prefix) / "bin"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "data").glob("*.md")),
    *sorted((ROOT / "data").glob("*/README.md")),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def fences(page: Path, language: str) -> list[str]:
    """Give the blocks of code of one language, "" for none."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def command_lines(page: Path) -> list[str]:
    """Give the lines of shell blocks, and code in the text that may be a command in short."""
    lines = "".join(fences(page, "")).splitlines()
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    return [line.split(" #")[0].strip() for line in lines]


def check_command(words: list[str]) -> None:
    """Raise unless the command and its options exist; it may be abridged in a text."""
    found = parser()
    while subparsers := [a for a in found._actions if isinstance(a, argparse._SubParsersAction)]:
        if not words or words[0].isupper():
            return
        found = subparsers[0].choices[words.pop(0)]
    options = {name for action in found._actions for name in action.option_strings}
    assert {word for word in words if word.startswith("--")} <= options, words


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


@each_page
def test_commands_are_commands(page: Path) -> None:
    for line in command_lines(page):
        if line.startswith("densitykit "):
            check_command(shlex.split(line)[1:])
        for name in re.findall(r"^python -m (experiments\.[a-z_]+)\b", line):
            assert (ROOT / f"{name.replace('.', '/')}.py").exists(), line
        for name in re.findall(r"^python ((?:scripts|benchmarks)/\S+)", line):
            assert (ROOT / name).exists(), line


@each_page
def test_commands_of_blocks_are_complete(page: Path) -> None:
    for line in "".join(fences(page, "")).splitlines():
        if line.startswith("densitykit "):
            parser().parse_args(shlex.split(line, comments=True)[1:])


def cheap_fences(page: Path) -> list[str]:
    """Blocks of commands marked as cheap: all that follow take a minute together."""
    return re.findall(r"^<!-- cheap -->\n```\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.mark.skipif(not (BIN / "activate").exists(), reason="not in a virtual environment")
@pytest.mark.parametrize("page", ["README.md", "docs/your-own-data.md", "docs/teaching.md"])
def test_cheap_commands_run_as_printed(page: str, tmp_path: Path) -> None:
    """In a folder like a clone, or with a run of one's own; the environment is not active."""
    for folder in ("data", "notebooks", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    path = os.environ["PATH"].replace(f"{BIN}:", "")
    if page != "README.md":
        run = dk.open_trajectory(ROOT / "data" / "ethane.zarr").isel(time=slice(0, 12))
        options = dict(n_frames=12, grid=run.density.shape[1:], cell=run.cell.values)
        with dk.create_trajectory(
            tmp_path / "run.zarr", numbers=run.numbers.values, pbc=False, **options
        ) as writer:
            for frame in range(12):
                one = run.isel(time=frame)
                nuclei = {"positions": one.positions.values}
                writer.append(one.density.values, time=2.0 * frame, **nuclei)
        path = f"{BIN}:{path}"
    blocks = cheap_fences(ROOT / page)
    assert blocks, "nothing is marked as cheap"
    for block in blocks:
        job = subprocess.run(
            ["bash", "-e", "-c", block],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert job.returncode == 0, f"{block}\n{job.stderr}"


@each_page
def test_the_command_has_its_short_name(page: Path) -> None:
    assert "python -m densitykit " not in page.read_text(), "the command is `densitykit`"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 7000


@pytest.mark.parametrize("page", ["README.md", "docs/format.md", "docs/your-own-model.md"])
def test_code_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few steps, and without windows that pop up."""
    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda figure: shown.append(figure))
    monkeypatch.chdir(ROOT)
    code = "\n".join(fences(ROOT / page, "python")).replace("steps=100", "steps=2")
    namespace: dict[str, object] = {}
    exec(compile(code.replace("every=20", "every=200"), page, "exec"), namespace)
    assert len(shown) == code.count(".show()")
    if page.endswith("model.md"):
        mine, persistence = (
            namespace["table"].query("model == @name and metric == 'one-step l2'").value.item()
            for name in ("mine", "persistence")
        )
        assert 0 < mine < persistence


@pytest.mark.filterwarnings("ignore")
def test_an_ensemble_runs_in_two_processes(tmp_path: Path) -> None:
    """The page's script, two members of two steps, as in this process; run again, it is there."""
    pytest.importorskip("distributed")
    (tmp_path / "data").symlink_to(ROOT / "data")
    (code,) = fences(ROOT / "docs" / "ensembles.md", "python")
    code = code.replace("steps=100", "steps=2").replace("range(8)", "range(2)")
    code = code.replace("    return path", "    return path, os.getpid()").replace(
        "for path in stores", "for path, _ in stores"
    )
    script = tmp_path / "ensemble.py"
    told = "    print(len({pid for _, pid in stores} - {os.getpid()}))\n"
    script.write_text(f"import os\n{code}{told}")
    for _ in range(2):
        job = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert job.returncode == 0, job.stderr
        assert job.stdout.strip() == "2"
    emulator = dk.load_model(ROOT / "data/checkpoints/lithium-nuclear")
    store = ROOT / "data/lithium-800K.zarr"
    window = dk.load_windows(store, "test", emulator.horizon, emulator.context)[0]
    here = dk.rollout(emulator, window, steps=2, seed=1, progress=False)
    there = dk.open_trajectory(tmp_path / "runs/ensemble/member-1")
    np.testing.assert_allclose(there.density.values, here.density.values, rtol=1e-5)


def test_the_format_lists_all_variables() -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    assert f"follows, {SCHEMA_VERSION};" in page
    for name, variable in schema_for(3).items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert ", ".join(variable.dims) in row and variable.units in row


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == dk.__version__ and cited["license"] == "BSD-3-Clause"
