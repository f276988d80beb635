"""Progress where stderr is no terminal."""

from __future__ import annotations

import pytest

from densitykit.io import progress
from densitykit.io.progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which stands still until a test moves it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress._Lines, "last", 0.0)
    return now


def test_a_line_a_minute_of_all_bars(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two bars of 100 steps of 3 s: ten minutes, ten lines, each a whole one with its name."""
    for name in ("training", "rollout"):
        for _ in progress_bar(range(100), name, mininterval=0, disable=None):
            clock[0] += 3.0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == 5 * ["training"] + 5 * ["rollout"]
    assert all("\r" not in line and "/100" in line for line in lines)


def test_short_work_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=100, desc="short") as bar:
        bar.update(100)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    list(progress_bar(range(3), "watched"))
    assert "\rwatched: 100%" in capsys.readouterr().err
