"""A lesson without its solutions and outputs, for students to work in.

Folded solutions go, outputs go; the rest stays as it is.

python scripts/student_notebook.py notebooks/11_deep_density_1d.ipynb [MORE ...] class
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?</details>\s*", re.DOTALL)


def without_solutions(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook, as JSON, less what only a teacher should have."""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell = cell | dict(outputs=[], execution_count=None)
        else:
            source = SOLUTION.sub("", "".join(cell["source"]))
            cell = cell | dict(source=source.splitlines(keepends=True))
        cells += [cell] if cell["source"] else []
    return notebook | dict(cells=cells)


def main() -> None:
    *lessons, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for lesson in lessons:
        target = folder / lesson.name
        if target.exists():
            sys.exit(f"{target} exists; move it away, or choose another folder")
        student = without_solutions(json.loads(lesson.read_text()))
        target.write_text(json.dumps(student, indent=1, ensure_ascii=False) + "\n")
        print(target)


if __name__ == "__main__":
    main()
