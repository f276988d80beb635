"""Variants compared seed by seed, and that nothing is trained twice."""

import numpy as np
import pandas as pd
import pytest
import torch

from densitykit import ablations
from densitykit.models import LatentDiffusion, save_model
from densitykit.trajectory import write_splits


def rows_of(values):
    """Rows of one metric from {variant: one value a seed}."""
    rows = [(v, s, 10, "l2", x) for v, xs in values.items() for s, x in enumerate(xs)]
    return pd.DataFrame(rows, columns=ablations.COLUMNS)


def test_ratios_are_paired_by_seed():
    """The same ratio for every seed is certain, however much seeds differ."""
    table = ablations.compare_variants(
        rows_of({"no sJSD": [1.0, 2.0, 9.0], "value": [0.5, 1.0, 4.5]})
    )
    assert table.variant.tolist() == ["value"] and table.seeds.tolist() == [3]
    np.testing.assert_allclose(table[["ratio", "low", "high"]], 0.5, rtol=1e-12)


def test_the_interval_is_that_of_student():
    """ln ratios 0 and 2: mean 1, standard error 1, and t(0.975, 1) = 12.706."""
    table = ablations.compare_variants(
        rows_of({"no sJSD": [1.0, 1.0], "spatial": [1.0, np.exp(2.0)]})
    )
    found = np.log(table[["ratio", "low", "high"]].values[0])
    np.testing.assert_allclose(found, [1, 1 - 12.7062, 1 + 12.7062], rtol=1e-5)


def test_one_seed_has_no_interval():
    table = ablations.compare_variants(rows_of({"no sJSD": [1.0], "spatial": [2.0]}))
    assert table.ratio[0] == pytest.approx(2.0) and np.isnan(table.low[0])


@pytest.fixture
def setting(mock_trajectory, tmp_path):
    store = mock_trajectory("li.zarr", n_frames=60)
    bounds = {"train": (0, 30), "test": (30, 60)}
    write_splits(store, {k: {"run": ".", "start": a, "stop": b} for k, (a, b) in bounds.items()})
    torch.manual_seed(0)
    card = {"mu": -2.6, "sigma": 0.3, "eps": 0.01, "horizon": 4.0, "latent_channels": 2}
    card |= {"autoencoder_width": 8, "autoencoder_blocks": 1}
    model = LatentDiffusion(**card, widths=(8,), blocks=(1,))
    donor = save_model(model, tmp_path / "donor", card | {"widths": [8], "blocks": [1]})
    options = {"seeds": [0], "steps": 2, "rollout_steps": 4, "run_dir": tmp_path / "runs"}
    return store, donor, tmp_path / "rows.csv", options


def test_rows_grow_and_are_not_made_twice(setting, monkeypatch):
    store, donor, out, options = setting
    monkeypatch.setattr(ablations, "SMALL", {"widths": (8,), "blocks": (1,)})
    rows = ablations.run_ablations(store, donor, out, **options)
    assert list(rows.columns) == ablations.COLUMNS
    assert set(rows.variant) == set(ablations.VARIANTS)
    assert {"one-step l2", "value-sJSD / floor", "S(q) error"} <= set(rows.metric)
    assert np.isfinite(rows.value).all()
    # the term alone differs, so after two steps all are close, and none the same
    errors = rows[rows.metric == "one-step l2"].set_index("variant").value
    assert errors.nunique() == len(ablations.VARIANTS)
    errors = errors[["no sJSD", "spatial", "value", "no conditioning noise"]]
    assert np.ptp(errors) < 0.05 * errors.mean()

    def fail(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(ablations, "train_latent_diffusion", fail)
    again = ablations.run_ablations(store, donor, out, **options)
    pd.testing.assert_frame_equal(again, rows)
    with pytest.raises(AssertionError, match="trained again"):
        ablations.run_ablations(store, donor, out, **options | {"seeds": [0, 1]})
