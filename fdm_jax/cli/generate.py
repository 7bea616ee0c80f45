"""Generate images with the averaged weights (EMA) of a run.

  fdm generate --workdir=runs/digits --seeds=0-63 --out=images/         a PNG per seed
  fdm generate --workdir=runs/digits --seeds=0-99 --out=grid.png        one grid
  fdm generate --workdir=runs/digits --seeds=0-49999 --out=images.npz   arrays: image, seed, label
  fdm generate --workdir=gs://BUCKET/run --out=gs://BUCKET/images       on a TPU pod, from all workers
  fdm generate --workdir=runs/digits --out=fast.png --solver=unipc-2 --grid=log-snr --nfe=10

A seed decides its image (and its class, unless --class is given) whatever is generated beside it.  A command
that was stopped goes on where it was.  Several processes share the work by --distributed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fdm_jax.cli.checks import need_positive
from fdm_jax.cli.distributed import add_distributed_argument, joined, wait_for_all
from fdm_jax.cli.places import place_argument
from fdm_jax.cli.record import SETTINGS, differing, made_otherwise, read_settings
from fdm_jax.cli.sampling import (
    Loaded,
    Sampler,
    add_checkpoint_argument,
    add_class_argument,
    add_sampling_arguments,
    check_noise,
    load_with_guide,
    make_sampler,
)
from fdm_jax.errors import UserError
from fdm_jax.storage_errors import disk_full, refusal
from fdm_jax.whole_files import check_unclaimed, file_sizes, is_remote, remove_files, save_npz, write_text

HELP = "generate images with a trained model"

# That write and read pictures on gs://, where to put one is to wait for its answer.  Python's PNGs take one at a time.
THREADS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=place_argument, metavar="DIR", help="workdir of the run")
    parser.add_argument(
        "--out", required=True, type=place_argument, metavar="PATH", help="a folder, or a file ending in .png or .npz; "
        "local or gs://",
    )  # fmt: skip
    parser.add_argument("--seeds", default="0-63", help="such as 0-63 or 1,2,5-9 (default: %(default)s)")
    add_class_argument(parser)
    add_checkpoint_argument(parser)
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time (default: %(default)s)")
    parser.add_argument("--columns", type=int, metavar="N", help="of a grid (default: as square as it gets)")
    add_sampling_arguments(parser)
    add_distributed_argument(parser)


def parse_seeds(text: str) -> np.ndarray:
    """ "0-3,7" -> [0, 1, 2, 3, 7] as uint32.

    Raises:
      UserError: anything else, a range that falls, or a seed outside 0 ... 2^32 - 1.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"The seeds {text!r} cannot be read at {part!r}: write them as 0-63 or 1,2,5-9.")
        low, high = int(first), int(last or first)
        if high < low:
            raise UserError(f"The range of seeds {part!r} falls: write it as {high}-{low}.")
        if high >= 2**32:
            raise UserError(f"Seeds go up to {2**32 - 1}, and {part!r} goes beyond.")
        if high - low >= 100_000_000:
            raise UserError(f"The range of seeds {part!r} is longer than 100,000,000: ask for less at a time.")
        seeds += range(low, high + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"The seeds {text!r} name one seed twice.")
    return np.asarray(seeds, np.uint32)


def run(args: argparse.Namespace) -> int:
    seeds = parse_seeds(args.seeds)
    need_positive(args, "batch", "columns", "steps", "nfe")
    check_noise(args)
    with joined(args.distributed, args.workdir, leave_when_told=True):
        _generate(args, seeds)
    return 0


def _generate(args: argparse.Namespace, seeds: np.ndarray) -> None:
    import jax

    from fdm_jax.training.locking import locked

    model = load_with_guide(args)
    sampler = make_sampler(args, model)
    out = _Output(args.out)
    with locked(out.folder, hold=jax.process_index() == 0):
        _fill(out, args, model, sampler, seeds)


def _fill(out: _Output, args: argparse.Namespace, model: Loaded, sampler: Sampler, seeds: np.ndarray) -> None:
    """Each process makes every so-manieth batch on its own devices, in a folder that all of them see."""
    import jax

    from fdm_jax.devices import make_mesh
    from fdm_jax.host_memory import program_check
    from fdm_jax.progress import LINE_SECONDS, Progress
    from fdm_jax.sampling.generate import BatchedGenerator
    from fdm_jax.training.agreement import all_or_none, check_shared, of_the_first
    from fdm_jax.training.watchdog import of_process

    labels, first = model.experiment.choose_labels(args.label, seeds), jax.process_index() == 0
    with all_or_none("The first process cannot write the images, and says why."):
        if first:
            out.claim(sampler.settings)
    check_shared(out.folder)
    # The first looks, for all: they must agree on who makes what, and files may show later in one than in the other.
    missing = np.asarray(of_the_first(out.missing(seeds) if first else []), int)
    if len(missing):
        mesh = make_mesh(jax.local_devices())
        generator = BatchedGenerator(sampler.generate, mesh, min(args.batch, len(missing)), check=program_check())
        batches = [
            missing[start : start + generator.batch_size] for start in range(0, len(missing), generator.batch_size)
        ]
        ours = np.concatenate([missing[:0], *batches[jax.process_index() :: jax.process_count()]])
        done, names = len(seeds) - len(missing), iter(seeds[ours])
        progress = Progress(len(seeds), done, quiet=not first, seconds=LINE_SECONDS)
        with of_process(progress) as watchdog, contextlib.closing(progress):
            progress.say(f"Compiling the sampler; then {len(missing):,} images, {generator.batch_size:,} at a time.")
            watchdog.at(f"{generator.batch_size:,} images")
            for images in generator(sampler.variables, seeds[ours], labels[ours]):
                watchdog.at("images to be written")
                out.put(list(itertools.islice(names, len(images))), images)
                done = min(done + len(images) * jax.process_count(), len(seeds))  # the others are as far
                progress.count(done)
                watchdog.at(f"{generator.batch_size:,} images")
            watchdog.at("the other processes")
            wait_for_all("all images are there")
    # The others wait: JAX would end all of them if the first one took more than five minutes to part from them.
    with all_or_none(f"The first process cannot write {args.out}, and says why."):
        if first:
            out.finish(seeds, labels, args.columns or int(np.ceil(np.sqrt(len(seeds)))))
            print(
                f"{len(seeds):,} images in {args.out} (checkpoint of step {model.checkpoint:,}, {args.solver}, "
                f"{sampler.nfe} NFE)."
            )


class _Output:
    """A folder of PNGs by seed, local or gs://; for a grid or an npz that folder is a temporary one beside it."""

    def __init__(self, path: Path):
        if path.suffix not in ("", ".png", ".npz"):
            raise UserError(f"--out must be a folder or end in .png or .npz, and is {path}.")
        if path.suffix and path.is_dir():
            raise UserError(f"--out {path} is a folder, where a file was to be written: give another --out.")
        self.path = path
        self.folder = path if path.suffix == "" else path.with_name(f"{path.name}.parts")
        self.threads = THREADS if is_remote(path) else 1

    def claim(self, settings: dict[str, Any]) -> None:
        """Say in the folder, which is there and locked, what it is for.

        Raises:
          UserError: it holds images of other settings, or of which nobody knows how they were made; or it cannot be written.
        """
        path = self.path
        try:
            before = read_settings(self.folder, settings)
            there = [each.name for each in self.folder.iterdir() if not each.name.startswith(".")]
            # A temporary folder is deleted in the end, with all that is in it.
            kept = [name for name in there if name.endswith(".png") or self.folder != path]
            if before is None and kept:
                raise UserError(
                    f"{self.folder} holds {min(kept)}, which fdm generate did not make: delete it, or give another --out."
                )
            if before is not None and (different := differing(before, settings)):
                if self.folder != path:
                    self._clear()  # ours, and of another request
                elif kept:
                    raise made_otherwise(path, "images", different)
                else:  # the settings may be an evaluation's
                    check_unclaimed(path, ("features", "result.json"), "--out")
            write_text(self.folder / SETTINGS, json.dumps(settings, indent=1))
        except OSError as error:
            if disk_full(error):
                raise  # the command line has a sentence for it
            raise UserError(f"--out {path} cannot be written: {error.strerror or refusal(error) or error}.") from error

    def _file(self, seed: int) -> Path:
        return self.folder / f"{seed:06d}.png"

    def missing(self, seeds: np.ndarray) -> list[int]:
        """Places of the seeds without a picture; an empty file is what a machine that lost its power can leave of one."""
        sizes = file_sizes(self.folder)
        return [i for i, seed in enumerate(seeds) if not sizes.get(self._file(seed).name)]

    def put(self, seeds: Sequence[int], images: np.ndarray) -> None:
        from fdm_jax.pictures import save_png

        with ThreadPoolExecutor(self.threads) as threads:
            list(threads.map(lambda seed, image: save_png(image, self._file(seed)), seeds, images))

    def _read(self, seeds: np.ndarray) -> np.ndarray:
        from PIL import Image

        def read(seed: int) -> np.ndarray:
            image = np.asarray(Image.open(io.BytesIO(self._file(seed).read_bytes())))
            return image if image.ndim == 3 else image[..., None]

        with ThreadPoolExecutor(self.threads) as threads:
            return np.stack(list(threads.map(read, seeds)))

    def finish(self, seeds: np.ndarray, labels: np.ndarray, columns: int) -> None:
        """Make the one file that was asked for, if it is one."""
        from fdm_jax.pictures import image_grid, save_png

        if self.folder == self.path:
            return
        images = self._read(seeds)
        if self.path.suffix == ".png":
            scale = max(1, 32 // images.shape[1])
            save_png(image_grid(images, columns, scale=scale), self.path)
        else:
            temporary = self.folder / "all.npz"  # which, after a kill, the next start removes
            save_npz(temporary, {"image": images, "seed": seeds, "label": labels})
            temporary.replace(self.path)
        self._clear()
        if not is_remote(self.folder):  # of which nothing is left when the lock is gone, too
            shutil.rmtree(self.folder)

    def _clear(self) -> None:
        """Empty the folder, but for its lock; the settings, without which the pictures would be a stranger's, come last."""
        names = {name for name in file_sizes(self.folder) if not name.startswith(".")}
        for some in (names - {SETTINGS}, names & {SETTINGS}):
            if some:
                remove_files(self.folder, some)
