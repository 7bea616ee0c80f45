"""Geometry of grids, files that are whole or absent."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fdm_jax.errors import UserError
from fdm_jax.pictures import curves_png, image_grid, log_scale, own_ticks, rows_png, save_png
from fdm_jax.reporting.plots import sweep_png
from fdm_jax.reporting.runs import Case, Run


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_puts_each_image_where_it_belongs(channels, mode):
    images = np.random.default_rng(0).integers(1, 256, (5, 4, 6, channels), dtype=np.uint8)
    grid = image_grid(images, 3, scale=2, gap=1)
    assert grid.mode == mode
    assert grid.size == (2 * (3 * 7 + 1), 2 * (2 * 5 + 1))
    pixels = np.array(grid).reshape(22, 44, channels)
    # Nearest neighbour: every 2x2 block has one value.
    small = pixels[::2, ::2]
    np.testing.assert_array_equal(np.kron(small, np.ones((2, 2, 1), np.uint8)), pixels)
    for i, (top, left) in enumerate([(1, 1), (1, 8), (1, 15), (6, 1), (6, 8)]):
        np.testing.assert_array_equal(small[top : top + 4, left : left + 6], images[i])
        small[top : top + 4, left : left + 6] = 0
    assert not small.any()  # gaps and the empty place


def test_grid_without_gap_is_the_images_side_by_side():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 1), dtype=np.uint8)
    expected = np.block([[images[0, ..., 0], images[1, ..., 0]], [images[2, ..., 0], images[3, ..., 0]]])
    np.testing.assert_array_equal(np.asarray(image_grid(images, 2, gap=0)), expected)
    assert image_grid(images, 10**12).size == image_grid(images, 4).size  # no room for images that are not there


@pytest.mark.parametrize("shape", [(5, 4, 1), (5, 4, 3)])
def test_saved_arrays_read_back(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save_png(image, str(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as back:
        assert back.format == "PNG"
        np.testing.assert_array_equal(np.asarray(back).reshape(shape), image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


class Broken(Image.Image):
    def save(self, file, format=None, **params):
        file.write(b"half of a picture")
        raise OSError(5, "Input/output error")


def test_a_failed_save_leaves_the_old_picture_and_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    save_png(np.zeros((2, 2, 1), np.uint8), path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="a.png cannot be written: Input/output error"):
        save_png(Broken(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_new_picture_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "a.png"
    for value in (0, 7):
        save_png(Image.new("L", (3, 2), value), path)
    with Image.open(path) as back:
        assert back.size == (3, 2) and back.getpixel((0, 0)) == 7


def test_curves_are_a_png_drawn_without_pyplot(tmp_path):
    pyplot_before = "matplotlib.pyplot" in sys.modules
    path = tmp_path / "curves.png"
    x = np.arange(1, 50)
    curves_png(path, {"FDM": (x, 1 / x), "plain": (list(x), list(2 / x))}, "images seen", "loss", logy=True)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**20)) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.0, 2.4], None),  # no more than a factor of 2.5
        ([0.0, 5.0], None),
        ([], None),
        ([0.5, 4.0], ["0.6", "0.8", "1", "1.5", "2", "3", "4"]),
        ([0.5, 40.0], ["0.5", "1", "2", "5", "10", "20"]),
        ([0.5, 400.0], ["1", "3", "10", "30", "100", "300"]),
        ([0.5, 40000.0], ["1", "10", "100", "1000", "10000"]),
    ],
)
def test_ticks_of_a_logarithmic_axis(values, shown):
    axes = Figure().subplots()
    log_scale(axes.yaxis, values)
    assert axes.get_yscale() == ("linear" if shown is None else "log")
    if shown is not None:
        assert [label.get_text() for label in axes.get_yticklabels()] == shown
        assert axes.get_ylim() == pytest.approx((min(values) / 1.1, max(values) * 1.1))


def test_ticks_where_the_few_numbers_are_that_were_chosen():
    axes = Figure().subplots()
    own_ticks(axes.xaxis, [5, 35, 9, 5])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "9", "35"]
    before = axes.get_yticks()
    own_ticks(axes.yaxis, range(13))
    np.testing.assert_array_equal(axes.get_yticks(), before)


CASE = Case(Run("run", {"momentum.enabled": True}), "heun", 9, {"FID": (2.0, None)})


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: curves_png(path, {"FDM": ([1, 2], [3, 1])}, "images seen", "loss"),
        lambda path: rows_png(path, {"edited": np.zeros((3, 8, 8, 1), np.uint8)}),
        lambda path: path.write_bytes(sweep_png([CASE], ["FID"], {"heun": "o"})),
    ],
    ids=["curves", "rows", "sweep"],
)
def test_settings_of_the_user_for_other_figures(tmp_path, draw):
    """LaTeX, which few machines have, would end a run at its first plot."""
    draw(tmp_path / "plain.png")
    settings = {"text.usetex": True, "savefig.bbox": "tight", "lines.linewidth": 9, "image.cmap": "jet"}
    with matplotlib.rc_context(settings):
        draw(tmp_path / "set.png")
        assert all(matplotlib.rcParams[name] == value for name, value in settings.items())
    assert (tmp_path / "set.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_mistakes_are_sentences(tmp_path):
    images = np.zeros((4, 2, 2, 1), np.uint8)
    with pytest.raises(UserError, match="these are 0, 1 and 1"):
        image_grid(images, 0)
    with pytest.raises(UserError, match=r"\[0, 2, 2, 1\]"):
        image_grid(images[:0], 2)
    with pytest.raises(UserError, match="float32"):
        image_grid(images.astype(np.float32), 2)
    with pytest.raises(UserError, match=r"\[2, 2, 2\]"):
        save_png(np.zeros((2, 2, 2), np.uint8), tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a.png cannot be written: "):
        save_png(images[0], tmp_path / "file" / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    save_png(images[0], tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").exists()
