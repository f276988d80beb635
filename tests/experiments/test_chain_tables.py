"""The experiments in one dimension: what is trained, what is kept, what is written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from densitykit.chain.recipes import PUBLISHED, SMOOTH, Entry, Smooth
from densitykit.chain.snapshots import load_snapshots, score
from densitykit.errors import DensityKitError
from densitykit.models import load_model, read_provenance
from experiments import chain_tables
from experiments.chain_tables import TABLES, run_experiments

DATA = Path(__file__).parents[2] / "data"
RESULTS = DATA / "deep-density-1d" / "results.csv"
SMALL = {"sizes": {"nodes": 4, "pair_nodes": (3, 2)}, "epochs": 2, "batch": 50}


@pytest.fixture
def two_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry("metal", 2, 20), Entry("metal", 1, 20)]
    monkeypatch.setattr(chain_tables, "TABLES", {"table3": entries})


def run(tmp_path: Path, seeds: list[int], tables: tuple[str, ...] = ("table3",)) -> pd.DataFrame:
    folders = {"run_dir": tmp_path / "runs"}
    return run_experiments(
        DATA / "chain", tmp_path / "out", tables=tables, seeds=seeds, **folders, **SMALL
    )


def test_every_seed_and_split_has_its_rows(two_entries: None, tmp_path: Path) -> None:
    rows = run(tmp_path, [0, 1])
    assert len(rows) == 2 * 2 * 5 * 4  # entries, seeds, splits, metrics
    assert set(rows.split) == {"validation", "test-within", "step-29000", "test", "transfer"}
    assert rows.value.gt(0).all() and rows.cpu_seconds.notna().all()


def test_more_seeds_are_added_and_the_best_model_is_kept(
    two_entries: None, tmp_path: Path
) -> None:
    run(tmp_path, [0])
    rows = run(tmp_path, [1, 2])
    assert sorted(rows.seed.unique()) == [0, 1, 2]
    errors = rows.query("n_near == 2 and split == 'validation' and metric == 'mse'")
    best = errors.sort_values("value").iloc[0]
    card = read_provenance(tmp_path / "out" / "metal-paper")
    assert card["seed"] == best.seed
    log = pd.read_csv(tmp_path / "out" / "metal-paper-log.csv")
    assert log.filter(like="validation").min().min() == pytest.approx(best.value, rel=1e-3)


def test_a_finished_run_is_not_trained_again(
    two_entries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(tmp_path, [0])
    monkeypatch.setattr(
        "densitykit.chain.training._AdamRun.epoch", lambda *_: pytest.fail("trained again")
    )
    pd.testing.assert_frame_equal(run(tmp_path, [0]), rows)


def test_smooth_models_are_saved_with_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"n_near": 2, "spans": [2], "waves": 6}
    settings = {"all": Smooth({"insulator": 4, "metal": 4}, small)}
    monkeypatch.setattr(chain_tables, "SMOOTH", settings)
    rows = run(tmp_path, [0], ("smooth",))
    assert set(rows.system) == {"insulator", "metal"}
    model = load_model(tmp_path / "out" / "all-smooth")
    again = score(model, load_snapshots(DATA / "chain" / "metal.zarr", "test"))
    written = rows.query("system == 'metal' and split == 'test'").set_index("metric").value
    assert written.l1 == pytest.approx(again.set_index("metric").value.l1, rel=1e-3)


def test_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DensityKitError, match="table5"):
        run(tmp_path, [0], ("table5",))


def test_tables_are_those_of_the_paper() -> None:
    assert {e for entries in TABLES.values() for e in entries} == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_bundled_smooth_models_give_the_bundled_results(name: str) -> None:
    model = load_model(RESULTS.parent / f"{name}-smooth")
    variant, system = ("smooth, all chains", "metal") if name == "all" else ("smooth", name)
    rows = pd.read_csv(RESULTS).query("variant == @variant and system == @system")
    rows = rows.query("split == 'step-29000'")
    late = load_snapshots(DATA / "chain" / f"{system}.zarr", "test").at(torch.tensor([19]))
    l1 = score(model, late).set_index("metric").value.l1
    assert l1 == pytest.approx(rows.set_index("metric").value.l1, rel=1e-2)


@pytest.mark.parametrize("system", ["insulator", "metal", "mixed"])
def test_bundled_networks_give_the_bundled_results(system: str) -> None:
    path = RESULTS.parent / f"{system}-paper"
    model, card = load_model(path), read_provenance(path)
    data = load_snapshots(DATA / "chain" / f"{system}.zarr", "validation")
    assert score(model, data).value[0] == pytest.approx(card["validation_mse"], rel=1e-2)
