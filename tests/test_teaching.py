"""Notebooks for students: all of the lesson but its solutions and outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def student(tmp_path: Path, *lessons: Path) -> subprocess.CompletedProcess:
    script = ROOT / "scripts" / "student_notebook.py"
    command = [sys.executable, script, *lessons, tmp_path / "class"]
    return subprocess.run(command, capture_output=True, text=True)


def test_students_get_no_solutions(tmp_path: Path) -> None:
    """And all of the questions."""
    assert student(tmp_path, *LESSONS).returncode == 0
    for lesson in LESSONS:
        text = (tmp_path / "class" / lesson.name).read_text()
        assert "Solution</summary>" not in text and "</details>" not in text
        assert [text.count(f"## Exercise {i}") for i in (1, 2)] == [1, 1], lesson.name
        code = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
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


def markdown(lesson: Path) -> list[str]:
    cells = json.loads(lesson.read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_two_exercises_with_folded_solutions(lesson: Path) -> None:
    assert "\n".join(markdown(lesson)).count("<details><summary>Solution</summary>") == 2


def test_lessons_lead_from_one_to_the_next_and_to_the_words() -> None:
    for before, lesson in pairwise(LESSONS):
        assert f"({before.name})" in markdown(lesson)[0], lesson.name
        assert f"({lesson.name})" in markdown(before)[0], before.name
        assert "(../docs/glossary.md)" in markdown(lesson)[0], lesson.name


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_begins_with_its_switch_and_asserts_no_duration(lesson: Path) -> None:
    cells = json.loads(lesson.read_text())["cells"]
    first, *_, last = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert "DENSITYKIT_FAST" in first
    assert "perf_counter" not in last and "per_step" not in last
