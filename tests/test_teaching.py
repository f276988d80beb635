"""Notebooks for students: all of the lesson but its solutions and outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def student(tmp_path: Path, *lessons: Path) -> subprocess.CompletedProcess:
    script = ROOT / "scripts" / "student_notebook.py"
    command = [sys.executable, script, *lessons, tmp_path / "class"]
    return subprocess.run(command, capture_output=True, text=True)


def test_students_get_no_solutions(tmp_path: Path) -> None:
    assert student(tmp_path, *LESSONS).returncode == 0
    for lesson in LESSONS:
        text = (tmp_path / "class" / lesson.name).read_text()
        before, after = (json.loads(t)["cells"] for t in (lesson.read_text(), text))
        assert "Solution</summary>" not in text and "# --- a solution" not in text
        n = sum("olution</summary>" in "".join(c["source"]) for c in before)
        assert len(after) == len(before) - n
        solved = [c for c in before if "# --- a solution" in "".join(c["source"])]
        assert n or solved, f"{lesson.name} has no exercise with a solution"
        code = [c for c in after if c["cell_type"] == "code"]
        assert not any(c["outputs"] or c["execution_count"] for c in code)
        for cell in code:
            compile("".join(cell["source"]), lesson.name, "exec")


def test_a_notebook_at_work_is_not_overwritten(tmp_path: Path) -> None:
    assert student(tmp_path, LESSONS[0]).returncode == 0
    again = student(tmp_path, LESSONS[0])
    assert again.returncode == 1 and "exists" in again.stderr


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_the_plan_of_the_class_names_every_lesson(lesson: Path) -> None:
    assert lesson.name in (ROOT / "docs" / "teaching.md").read_text()
