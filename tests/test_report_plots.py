"""What is drawn in the plots of `fdm report`: the figures themselves, each on its axis."""

import numpy as np
import pytest

from fdm_jax.reporting.plots import curves_png, sigma_png, small_png, sweep_png
from fdm_jax.reporting.runs import PALETTE, Case, Pair, Run


@pytest.fixture(autouse=True)
def canvases(monkeypatch):
    """The functions give what they drew instead of its PNG."""
    monkeypatch.setattr("fdm_jax.reporting.plots._png", lambda canvas: canvas)


def lines(panel):
    return {line.get_color(): line.get_xydata().T.tolist() for line in panel.lines}


@pytest.fixture
def runs():
    """Held-out errors of 2, 1, 0.5 with momentum and 4, 2, 1 without; also at two noise levels."""

    def rows(scale):
        return [
            {"nimg": 1000 * n, "seconds": 60.0 * n, "val/error": e, "val/error@0.1": e, "val/error@1.0": 3 * e * scale}
            for n, e in ((1, 4 * scale), (2, 2 * scale), (4, scale))
        ]

    return [
        Run("fdm", {"momentum.enabled": True}, flops_per_image=2_000_000_000, rows=rows(0.5)),
        Run("plain", {"momentum.enabled": False}, rows=rows(1.0), colour=PALETTE[1]),
    ]


def test_curves(runs):
    panels = curves_png(runs, "val/error", "held-out error").axes
    labels = ["images seen", "training compute ($10^{12}$ FLOP)", "wall time (min)"]
    assert [panel.get_xlabel() for panel in panels] == labels and panels[0].get_ylabel() == "held-out error"
    fdm, plain = [2.0, 1.0, 0.5], [4.0, 2.0, 1.0]
    assert lines(panels[0]) == {PALETTE[0]: [[1000, 2000, 4000], fdm], PALETTE[1]: [[1000, 2000, 4000], plain]}
    assert lines(panels[1]) == {PALETTE[0]: [[2, 4, 8], fdm]}  # what a step of the other takes is not known
    assert lines(panels[2]) == {PALETTE[0]: [[1, 2, 4], fdm], PALETTE[1]: [[1, 2, 4], plain]}


@pytest.mark.parametrize("longest, unit, shown", [(170, "s", 170), (180, "min", 3), (10800, "h", 3), (259200, "d", 3)])
def test_units_of_time(longest, unit, shown):
    run = Run("a", {}, rows=[{"nimg": n, "seconds": longest * n, "loss": 1.0} for n in (0.5, 1)])
    panel = curves_png([run], "loss", "loss").axes[1]
    assert panel.get_xlabel() == f"wall time ({unit})" and lines(panel)[PALETTE[0]][0] == [shown / 2, shown]


def test_errors_by_noise_level(runs):
    [first, second] = sigma_png(runs, [Pair(*runs, [])]).axes
    assert lines(first) == {PALETTE[0]: [[0.1, 1.0], [0.5, 0.75]], PALETTE[1]: [[0.1, 1.0], [1.0, 3.0]]}
    assert lines(second)[PALETTE[0]] == [[0.1, 1.0], [0.5, 0.25]]
    assert second.get_ylabel() == "error of FDM / error of plain"
    assert len(sigma_png(runs, []).axes) == 1


def test_small_plots(runs):
    points = {run.name: run.points("val/error") for run in runs}
    short = {run.name: run.points("val/error")[:1] for run in runs}
    panels = small_png(runs, [("recall", points), ("none", short), *((f"{n}", points) for n in range(3))]).axes
    assert [panel.get_title() for panel in panels if panel.get_visible()] == ["recall", "0", "1", "2"]
    assert lines(panels[0])[PALETTE[1]] == [[1000, 2000, 4000], [4.0, 2.0, 1.0]] and len(panels) == 6
    assert small_png(runs, [("none", short)]) is None


def test_deviations_are_a_band():
    rows = [{"nimg": n, "fid": 5.0 * n, "fid_deviation": 0.5} for n in (1, 2)]
    [band] = curves_png([Run("a", {}, rows=rows)], "fid", "FID").axes[0].collections
    corners = band.get_paths()[0].vertices
    np.testing.assert_allclose(sorted({tuple(corner) for corner in corners}), [(1, 4.5), (1, 5.5), (2, 9.5), (2, 10.5)])


def test_sweeps(runs):
    cases = [Case(runs[0], "heun", nfe, {"FID, 50": (100 / nfe, None)}) for nfe in (20, 5, 10)]
    cases.append(Case(runs[1], "heun", 5, {"KID": (7.0, None)}))
    first, second, *_ = sweep_png(cases, ["FID, 50", "KID"], {"heun": "o"}).axes
    assert lines(first) == {PALETTE[0]: [[5, 10, 20], [20, 10, 5]]} and lines(second) == {PALETTE[1]: [[5], [7]]}
    assert first.get_title() == "FID\n50" and first.get_xlabel() == "function evaluations"
