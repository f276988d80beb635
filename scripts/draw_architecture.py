"""Draw the map of the house in docs/architecture.md from the imports of the code.

python scripts/draw_architecture.py           # writes the block anew
python scripts/draw_architecture.py --check   # exit status 1 where it is not up to date

A *place* is a folder of the package or a module in its root; its floor is one above the highest
floor that it imports from, so that arrows point down wherever there is no circle.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "densitykit"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- begin: drawn by scripts/draw_architecture.py -->\n"
END = "<!-- end -->\n"

Graph = dict[str, set[str]]


def sources(root: Path = ROOT) -> dict[str, ast.Module]:
    """Return the syntax trees of all modules, by path relative to the package."""
    package = root / PACKAGE
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text())
        for path in sorted(package.rglob("*.py"))
    }


def imports(tree: ast.Module, lazy: bool = True) -> Iterator[str]:
    """Yield the modules of the package that one module imports, as ``io.reader``.

    With ``lazy`` those imported inside functions, too.
    """
    nodes = ast.walk(tree) if lazy else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = node.module == PACKAGE
            names = [f"{PACKAGE}.{a.name}" for a in node.names] if inner else [node.module]
        else:
            continue
        for name in names:
            if name.startswith(f"{PACKAGE}."):
                yield name.removeprefix(f"{PACKAGE}.")


def place(module: str) -> str:
    """Return the folder, or the root module, of ``io/reader.py`` or ``io.reader``."""
    return module.removesuffix(".py").replace("/", ".").split(".")[0]


def arrows(trees: dict[str, ast.Module], lazy: bool = True) -> Graph:
    """Return what each place imports from others; the front door, which is lazy, left out."""
    graph: Graph = {}
    for path, tree in trees.items():
        here = place(path)
        if here != "__init__":
            graph.setdefault(here, set())
            graph[here] |= {place(name) for name in imports(tree, lazy)} - {here, "__version__"}
    return graph


def floors(graph: Graph) -> dict[str, int]:
    """Return the floor of each place, 0 at the bottom; `graphlib.CycleError` names a circle."""
    result: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        result[name] = max((result[below] + 1 for below in graph[name]), default=0)
    return result


def reduced(graph: Graph) -> Graph:
    """Return the arrows that are not implied by others."""

    def reach(name: str) -> set[str]:
        return graph[name].union(*(reach(below) for below in graph[name]))

    return {
        name: below - set().union(*(reach(other) for other in below))
        for name, below in graph.items()
    }


def summary(tree: ast.Module) -> str:
    """Return the first sentence of a module's docstring as Markdown."""
    first = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r":\w+:`", "`", first).replace("``", "`").rstrip(":")


def draw(trees: dict[str, ast.Module]) -> str:
    """Return the block: a diagram of the places, and a table of all modules."""
    graph = arrows(trees)
    floor = floors(graph)
    folders = {place(path) for path in trees if "/" in path}
    lines = ["```mermaid", "flowchart TD"]
    for name, below in sorted(reduced(graph).items(), key=lambda item: (-floor[item[0]], item[0])):
        shape = f"{name}[{name}/]" if name in folders else f"{name}({name}.py)"
        lines += [f"    {shape}", *(f"    {name} --> {other}" for other in sorted(below))]
    lines += ["```", "", "| floor | place | what it owns |", "|---|---|---|"]
    for name in sorted(floor, key=lambda name: (-floor[name], name)):
        owned = [path for path in trees if place(path) == name]
        for path in sorted(owned, key=lambda path: path.replace("__init__", "")):
            head = path in (f"{name}.py", f"{name}/__init__.py")
            label = f"`{path.removesuffix('__init__.py')}`"
            level, label = (str(floor[name]), f"**{label}**") if head else ("", label)
            lines.append(f"| {level} | {label} | {summary(trees[path])} |")
    return "\n".join(lines) + "\n"


def renewed(page: str, block: str) -> str:
    """Return a page with its drawn block replaced."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + block + END + rest.split(END, 1)[1]


def main() -> int:
    page = PAGE.read_text()
    new = renewed(page, draw(sources()))
    if "--check" in sys.argv:
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
