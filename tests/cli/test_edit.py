"""`fdm edit` on the tiny run: what stays, what changes, and what is refused."""

import numpy as np
import pytest
from encoded import png
from PIL import Image

from fdm_jax.cli.main import main

IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
SCALE, GAP = 8, 1


def cells(path):
    """The images of a row, without the lines between them."""
    sheet = np.asarray(Image.open(path))[::SCALE, ::SCALE][GAP:-GAP, GAP:]
    return [sheet[:, i : i + 8] for i in range(0, sheet.shape[1], 8 + GAP)]


@pytest.fixture
def edit(straight_run, tmp_path, capsys):
    (tmp_path / "image.png").write_bytes(png(IMAGE))
    mask = np.zeros((8, 8), np.uint8)
    mask[:3] = 255
    (tmp_path / "mask.png").write_bytes(png(mask))

    def run(action, *more, code=0):
        out = tmp_path / f"{action}.png"
        arguments = ["edit", action, f"--workdir={straight_run}", f"--out={out}", "--steps=4", "--class=3", *more]
        assert main([argument.replace("DIR", str(tmp_path)) for argument in arguments]) == code
        said = capsys.readouterr()
        return said.err.strip().splitlines()[-1] if code else cells(out)

    return run


def test_inpainting(edit):
    shown, *made = edit("inpaint", "--image=DIR/image.png", "--mask=DIR/mask.png", "--seeds=0-2")
    assert len(made) == 3
    np.testing.assert_array_equal(shown[3:], IMAGE[3:])
    assert (shown[:3] == 128).all()
    for image in made:
        assert abs(image[3:].astype(int) - IMAGE[3:]).max() <= 1
    assert (made[0][:3] != made[1][:3]).any()


def test_inpainting_with_resampling_and_guidance(edit):
    arguments = ["--image=DIR/image.png", "--mask=DIR/mask.png", "--seeds=0"]
    _, plain = edit("inpaint", *arguments)
    _, resampled = edit("inpaint", *arguments, "--resample=3")
    _, guided = edit("inpaint", *arguments, "--guidance=3")
    for other in (resampled, guided):
        assert abs(other[3:].astype(int) - IMAGE[3:]).max() <= 1
        assert (other[:3] != plain[:3]).any()


def test_variations(edit):
    shown, *little = edit("vary", "--image=DIR/image.png", "--strength=0.3", "--seeds=0,1")
    np.testing.assert_array_equal(shown, IMAGE)
    _, *alone = edit("vary", "--image=DIR/image.png", "--strength=0.3", "--seeds=0,1", "--batch=1")
    for image, same in zip(little, alone, strict=True):
        assert abs(image.astype(int) - same).max() <= 1
    _, *much = edit("vary", "--image=DIR/image.png", "--strength=1", "--seeds=0,1", "--solver=dpmpp-2m")
    far, near = (np.mean([abs(image.astype(int) - IMAGE).mean() for image in images]) for images in (much, little))
    assert far > near


def test_encoding_comes_back(edit):
    shown, back = edit("encode", "--image=DIR/image.png", "--seeds=0", "--steps=64")
    np.testing.assert_array_equal(shown, IMAGE)
    assert abs(back.astype(int) - IMAGE).mean() < 20  # a network that is hardly trained bends the way


def test_interpolation(edit, straight_run, tmp_path):
    frames = edit("interpolate", "--seeds=3,7", "--frames=5")
    assert len(frames) == 5
    out = tmp_path / "ends"
    assert main(["generate", f"--workdir={straight_run}", f"--out={out}", "--steps=4", "--class=3", "--seeds=3,7"]) == 0
    for frame, seed in ((frames[0], 3), (frames[-1], 7)):
        assert abs(frame.astype(int) - np.asarray(Image.open(out / f"{seed:06d}.png"))).max() <= 1
    steps = [abs(a.astype(int) - b).mean() for a, b in zip(frames[:-1], frames[1:], strict=True)]
    assert max(steps) < abs(frames[0].astype(int) - frames[-1]).mean() * 1.01


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["inpaint", "--image=DIR/image.png"], "inpaint needs a --mask"),
        (["vary"], "vary needs an --image"),
        (["vary", "--image=DIR/image.png", "--mask=DIR/mask.png"], "--mask is for inpaint, not for vary"),
        (["vary", "--image=DIR/nothing.png"], "cannot be read (No such file"),
        (["vary", "--image=DIR/image.png", "--strength=2"], "strength must be above 0 and at most 1"),
        (["vary", "--image=DIR/image.png", "--solver=dpmpp"], "vary takes a solver with a step for each level"),
        (["vary", "--image=DIR/large.png"], "large.png is 9x9 with 1 channel, and the model makes 8x8"),
        (["colorise", "--image=DIR/image.png"], "needs a model of RGB images"),
        (["interpolate", "--seeds=1,2,3"], "give two, not 3"),
        (["interpolate", "--image=DIR/image.png", "--seeds=1,2"], "--image is not for interpolate"),
        (["interpolate", "--seeds=1,2", "--frames=1"], "--frames must be 2 or more"),
        (["vary", "--image=DIR/image.png", "--resample=2"], "--resample is for inpaint, not for vary"),
        (["inpaint", "--image=DIR/image.png", "--mask=DIR/mask.png", "--resample=0"], "--resample must be 1 or more"),
        (
            ["inpaint", "--image=DIR/image.png", "--mask=DIR/mask.png", "--resample=2", "--solver=dpmpp-2m"],
            "Resampling belongs to the solvers heun and euler, not to dpmpp-2m",
        ),
        (["interpolate", "--seeds=1,2", "--guide=DIR"], "--guide needs a scale"),
        (["encode", "--image=DIR/image.png", "--strength=0.3"], "--strength is for vary, not for encode"),
        (["vary", "--image=DIR/image.png", "--frames=3"], "--frames is for interpolate, not for vary"),
        (["interpolate", "--seeds=1,2", "--grid=9,0", "--sigma-max=5"], "--sigma-max would change nothing"),
        (["interpolate", "--seeds=1,2", "--frames=1001"], "room for 1000 results, and 1,001 are asked for"),
        (["vary", "--image=DIR/image.png", "--batch=0"], "--batch must be 1 or more, and is 0"),
    ],
)
def test_bad_input(edit, tmp_path, arguments, words):
    (tmp_path / "large.png").write_bytes(png(np.zeros((9, 9), np.uint8)))
    assert words in edit(*arguments, code=2)
