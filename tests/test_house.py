"""House rules: what the files beside the code promise about one another.

The versions in pyproject.toml, environment.yml and constraints.txt, the list of modules in the
README, the sizes of what goes into git, and the state of saved notebooks. Nothing here imports the
package.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from scripts import draw_architecture as architecture

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = ROOT / architecture.PACKAGE
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FOLDERS = ("densitykit", "scripts", "tests", "benchmarks", "experiments")
SOURCES = [p for d in FOLDERS for p in (ROOT / d).rglob("*.py")]

#: names on conda-forge, where they differ; None: no conda package, pip brings it with `-e .`
CONDA_NAMES = {
    "freud-analysis": "freud",
    "torch": "pytorch",
    "dask": "dask-core",
    "lightning-fabric": None,
    "sphericart": None,
    "sphinx-mathjax-offline": None,
    "kaleido": "python-kaleido",
    "tblite": "tblite-python",
}
#: names to import, where they differ from the distribution's
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow"}

KB, MB = 1_000, 1_000_000


def requirements(*extras: str) -> dict[str, Requirement]:
    """Requirements of the package and of these extras, by canonical name."""
    listed = list(PROJECT["dependencies"])
    for extra in extras:
        listed += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(r.name): r for r in map(Requirement, listed)}


def pins() -> dict[str, SpecifierSet]:
    """What constraints.txt says, by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r.specifier for r in parsed}


def version() -> str:
    """The version written in densitykit/__init__.py."""
    text = (ROOT / "densitykit" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def git(*arguments: str, stdin: str | None = None) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


@cache
def git_files() -> list[Path]:
    """What git tracks or would add, relative to the root; skips outside a checkout of our own."""
    try:
        top = git("rev-parse", "--show-toplevel").strip()
    except (OSError, subprocess.CalledProcessError):
        top = ""
    if not top or Path(top).resolve() != ROOT:
        pytest.skip("not a git checkout")
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    files = [Path(name) for name in listed if name and (ROOT / name).is_file()]
    assert Path("pyproject.toml") in files
    return files


def too_large(files: list[Path], limit: int) -> dict[str, int]:
    sizes = {str(f): (ROOT / f).stat().st_size for f in files}
    return {name: size for name, size in sizes.items() if size > limit}


def imported(source: str) -> set[str]:
    """Top-level names of the modules that Python source imports, relative imports left out."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def cells(notebook: Path, kind: str = "code") -> list[dict]:
    """Cells of one kind that are not empty."""
    found = json.loads(notebook.read_text())["cells"]
    return [c for c in found if c["cell_type"] == kind and "".join(c["source"]).strip()]


# versions


def test_every_requirement_is_pinned_within_its_range() -> None:
    locked = pins()
    for name, requirement in requirements(*PROJECT["optional-dependencies"]).items():
        assert name in locked, f"{name} is missing from constraints.txt: make lock"
        pin = str(locked[name]).removeprefix("==")
        assert requirement.specifier.contains(pin), f"{name}: {pin} is not {requirement.specifier}"


def test_constraints_pin_exact_versions() -> None:
    for name, specifier in pins().items():
        assert re.fullmatch(r"==[0-9][^*,+]*", str(specifier)), (
            f"{name}{specifier} is no exact pin"
        )


def test_versions_held_back_are_the_pinned_ones() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    held_back = [line.removeprefix("#pin ") for line in lines if line.startswith("#pin ")]
    assert held_back
    assert set(held_back) <= set(lines)


def test_environment_file_matches_the_project() -> None:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [entry for entry in listed if not isinstance(entry, str)] == [{"pip": ["-e ."]}]
    conda = {
        r.name: r.specifier for r in map(Requirement, filter(lambda e: isinstance(e, str), listed))
    }
    assert conda.pop("python") == SpecifierSet(PROJECT["requires-python"])
    assert conda.pop("pip") == SpecifierSet()
    expected = {
        CONDA_NAMES.get(name, name): requirement.specifier
        for name, requirement in requirements("dft", "lab", "test", "dask", "docs").items()
    }
    expected.pop(None)
    assert conda == expected


def test_imports_are_declared() -> None:
    known = set(sys.stdlib_module_names) | {"densitykit", "experiments", "scripts"}
    known |= {p.stem for p in (ROOT / "tests").rglob("*.py")}
    known |= {"qepy"}  # in the environment of the plane-wave engine, see densitykit/generate
    declared = set(requirements(*PROJECT["optional-dependencies"]))
    for path in SOURCES:
        for name in imported(path.read_text()) - known:
            distribution = canonicalize_name(DISTRIBUTIONS.get(name, name))
            assert distribution in declared, f"{path.relative_to(ROOT)} imports {name}"


def test_changelog_has_the_current_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(version())}\]", changelog, re.MULTILINE)


# the house

CORE_APART = {"generate", "chain"}  # worlds beside the core, which import it
TREES = architecture.sources(ROOT)


def test_arrows_point_down() -> None:
    """Counting imports inside functions, too; a circle is named."""
    graph = architecture.arrows(TREES)
    floor = architecture.floors(graph)
    assert all(floor[a] > floor[b] for a, below in graph.items() for b in below)


def test_the_core_stands_without_the_worlds_beside_it() -> None:
    """Only the command line asks them, when it runs."""
    at_import, ever = (architecture.arrows(TREES, lazy) for lazy in (False, True))
    for name in ever.keys() - CORE_APART:
        assert not at_import[name] & CORE_APART, f"{name} imports {at_import[name] & CORE_APART}"
        if name not in ("cli", "__main__"):
            assert not ever[name] & CORE_APART, f"{name} imports {ever[name] & CORE_APART}"


def test_the_map_of_the_house_is_up_to_date() -> None:
    page = architecture.PAGE.read_text()
    drawn = architecture.renewed(page, architecture.draw(TREES))
    assert page == drawn, "run `python scripts/draw_architecture.py`"


def test_the_root_is_small() -> None:
    assert len([path for path in TREES if "/" not in path]) <= 12


def lines_of_code(path: str) -> int:
    """Lines that are no docstring, no comment and not blank."""
    lines = (PACKAGE / path).read_text().splitlines()
    counted = {i for i, x in enumerate(lines, 1) if x.strip() and not x.strip().startswith("#")}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            counted -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(counted)


def test_the_core_is_thin() -> None:
    """At most 9 500 lines of code; a third more are docstrings."""
    core = [path for path in TREES if architecture.place(path) not in CORE_APART]
    assert sum(map(lines_of_code, core)) <= 9500


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.lineno} {node.name}", node


def test_functions_are_short() -> None:
    """At most 60 lines, without signature and docstring."""
    for name, node in functions():
        body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
        assert node.end_lineno - body[0].lineno < 60, name


#: words of our own for what the field has words for: see docs/glossary.md
DIALECT = set(
    "adopt begin floor keeper pieces places poster propagate settle sight verdict".split()
)


def test_names_are_words_of_the_field() -> None:
    """Of public functions, classes, and arguments of public functions."""
    for where, node in functions():
        if not node.name.startswith("_"):
            names = [node.name, *(a.arg for a in [*node.args.args, *node.args.kwonlyargs])]
            assert not DIALECT & set("_".join(names).split("_")), where
    classes = [n.name for t in TREES.values() for n in ast.walk(t) if isinstance(n, ast.ClassDef)]
    for name in classes:
        assert not DIALECT & set(re.findall("[a-z]+", re.sub("([A-Z])", r" \1", name).lower())), (
            name
        )


# files


def test_files_outside_data_are_small() -> None:
    files = [f for f in git_files() if f.parts[0] != "data"]
    assert not too_large(files, 500 * KB)


def test_data_is_small_enough_for_git() -> None:
    files = [f for f in git_files() if f.parts[0] == "data"]
    assert not too_large(files, 50 * MB)
    assert sum((ROOT / f).stat().st_size for f in files) < 160 * MB


def test_git_takes_data_for_binary() -> None:
    """Chunks and checkpoints must never have their line ends rewritten."""
    names = ["data/a.zarr/density/c/0/0/0/0", "data/a.zarr/step/c", "data/b.safetensors"]
    names += ["data/a.zarr/density/c.0.0.0.0", "data/a.zarr/run/time/c.0"]
    kinds = ("", ".safetensors", *(f".{i}" for i in range(100)))  # c.0.0: a flat chunk key
    names += [str(f) for f in git_files() if f.parts[0] == "data" and f.suffix in kinds]
    names = [n for n in names if Path(n).name not in ("LICENSE", "README", ".gitignore")]
    answer = git("check-attr", "-z", "--stdin", "text", stdin="\0".join(names)).split("\0")
    is_text = {answer[i]: answer[i + 2] for i in range(0, len(answer) - 2, 3)}
    assert set(is_text) == set(names)
    assert not [name for name, value in is_text.items() if value != "unset"]


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^\s*(exec )?make test$", script.read_text(), re.MULTILINE)


# notebooks

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)


@each_notebook
def test_notebook_is_small(notebook: Path) -> None:
    assert not too_large([notebook.relative_to(ROOT)], 500 * KB)


@each_notebook
def test_notebook_has_no_widget_state(notebook: Path) -> None:
    assert "widgets" not in json.loads(notebook.read_text())["metadata"], "run `make notebooks`"


@each_notebook
def test_notebook_ran_from_top_to_bottom(notebook: Path) -> None:
    counts = [cell["execution_count"] for cell in cells(notebook)]
    assert counts, "no code"
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"


@each_notebook
def test_notebook_keeps_outputs_without_errors(notebook: Path) -> None:
    outputs = [output for cell in cells(notebook) for output in cell["outputs"]]
    assert outputs, "run `make notebooks`"
    assert not [output for output in outputs if output["output_type"] == "error"]


@each_notebook
def test_notebook_says_what_it_takes(notebook: Path) -> None:
    """Minutes and what the reader needs, at the head."""
    head = "".join(cells(notebook, "markdown")[0]["source"])
    assert re.search(r"\*\*Time\*\* .*minute.*\*\*Needs\*\*", head, re.DOTALL)


@each_notebook
def test_notebook_links_its_references(notebook: Path) -> None:
    title, *rest = "".join(cells(notebook, "markdown")[-1]["source"]).splitlines()
    assert title == "## References"
    for line in rest:
        assert not line.startswith("* ") or "](https://" in line, line


@each_notebook
def test_notebook_links_lead_somewhere(notebook: Path) -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells(notebook, "markdown"))
    assert "python -m densitykit " not in text, "the command is `densitykit`"
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#", "attachment")):
            assert (notebook.parent / target.split("#")[0]).exists(), target


@each_notebook
def test_notebook_ends_with_checks(notebook: Path) -> None:
    assert re.search(r"^\s*assert ", "".join(cells(notebook)[-1]["source"]), re.MULTILINE)
