"""Learn, roll out and judge electron-density trajectories.

``import densitykit as dk`` is the front door: the names below, each imported when it is first used
(PEP 562), so that looking into a store needs no torch. Everything else is in its own module.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

#: where the names of the front door live: module, and name there
_NAMES = {
    "open_trajectory": ("io.reader", "open_trajectory"),
    "create_trajectory": ("io.writer", "create_trajectory"),
    "TrajectoryWriter": ("io.writer", "TrajectoryWriter"),
    "convert": ("io.convert", "convert"),
    "validate": ("io.validate", "validate_trajectory"),
    "load_windows": ("data.windows", "load_windows"),
    "load_model": ("models.checkpoint", "load_model"),
    "save_model": ("models.checkpoint", "save_model"),
    "train": ("training", "train"),
    "predict": ("models.deep_density.predict", "predict"),
    "structure_factor": ("analysis.modes", "structure_factor"),
    "explore": ("plot.explore", "explore"),
}
#: modules; the first two are called as the function of their own name
_CALLED = ("assess", "rollout")
_MODULES = (*_CALLED, "plot")

__all__ = [*_NAMES, *_MODULES]


class _Imported(ModuleType):
    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by name, as a plain module, in functions that go to another process."""
        return import_module, (self.__name__,)


class _Called(_Imported):
    """A module that is called as the function of its own name: `dk.rollout(...)`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(_Imported):
    def __setattr__(self, name: str, value: Any) -> None:
        """Make a module callable when the import system, whoever asked it, binds it here."""
        if name in _CALLED and isinstance(value, ModuleType):
            value.__class__ = _Called
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _NAMES[name]
    return globals().setdefault(name, getattr(import_module(f"{__name__}.{module}"), attribute))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
