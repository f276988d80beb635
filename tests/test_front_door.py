"""The front door: the names of `import densitykit as dk`, and what they cost."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import densitykit as dk

NAMES = """open_trajectory create_trajectory TrajectoryWriter convert validate load_windows
    load_model save_model train predict rollout assess structure_factor plot explore""".split()
HEAVY = ["numpy", "pandas", "plotly", "torch", "xarray", "zarr"]
ROOT = Path(__file__).parents[1]


def loaded_after(code: str) -> list[str]:
    """Give the heavy libraries that a fresh interpreter has loaded after this code."""
    code += f"\nimport sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    words = [sys.executable, "-c", code]
    return json.loads(subprocess.run(words, capture_output=True, check=True, cwd=ROOT).stdout)


def test_the_door_lists_its_names() -> None:
    assert set(dk.__all__) == set(NAMES)
    assert set(NAMES) | {"__version__"} <= set(dir(dk))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str) -> None:
    found = getattr(dk, name)
    assert found is getattr(dk, name)  # the same each time
    assert inspect.getdoc(found)
    assert name == "plot" or callable(found)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="densitykit.*has no attribute 'verdict'"):
        dk.verdict  # noqa: B018


def test_the_door_is_light() -> None:
    assert loaded_after("import densitykit as dk; dir(dk)") == []


def test_stores_need_no_torch() -> None:
    assert "torch" not in loaded_after("from densitykit import open_trajectory, validate")


def test_modules_of_main_functions_are_called_whoever_imports_them_first() -> None:
    code = """
from densitykit.rollout import rollout
import densitykit.assess as assess
import densitykit as dk
assert callable(dk.rollout) and dk.rollout.rollout is rollout
assert callable(dk.assess) and dk.assess is assess
"""
    assert "torch" in loaded_after(code)


def test_a_called_module_gives_what_its_function_gives(monkeypatch) -> None:
    module = importlib.import_module("densitykit.rollout")
    monkeypatch.setattr(module, "rollout", lambda *a, **o: (a, o))
    assert dk.rollout(1, 2, seed=3) == ((1, 2), {"seed": 3})
