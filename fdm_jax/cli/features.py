"""The features of an evaluation: made piece by piece in a folder, by all processes, and gone on with after a stop."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdm_jax.cli.distributed import wait_for_all
from fdm_jax.cli.images import Images
from fdm_jax.cli.record import SETTINGS, differing, made_otherwise, read_settings, write_json
from fdm_jax.errors import UserError
from fdm_jax.whole_files import check_unclaimed, made_again, make_folder, save_npz

if TYPE_CHECKING:
    from fdm_jax.evaluation.extractors import Extractor

FEATURES = "features"  # the folder of the pieces


def extract_all(
    folder: Path, settings: dict[str, Any], images: Images, extractor: Extractor, args: argparse.Namespace
) -> tuple[float, int]:
    """Features and logits of all images, piece by piece into ``folder``; the seconds that it took, and a piece's images.

    Each process makes every so-manieth piece on its own devices; the folder is one that all of them see.

    Raises:
      UserError: the folder holds an evaluation of other settings, or files of something else; it cannot be written; or it
        is not one for all processes.
    """
    import jax

    from fdm_jax.devices import make_mesh
    from fdm_jax.evaluation.extractors import FeatureMaker
    from fdm_jax.evaluation.moments import check_finite
    from fdm_jax.host_memory import program_check
    from fdm_jax.progress import Progress
    from fdm_jax.training.agreement import all_or_none
    from fdm_jax.training.watchdog import of_process

    pieces = folder / FEATURES
    with all_or_none(f"{folder} cannot be used by the first process, which says why."):
        if jax.process_index() == 0:
            _claim(folder, settings, images.piece)
    with all_or_none(f"{folder} cannot be used by another process, which says why."):
        piece = _claimed(folder, settings)
    ours = range(0, images.num, piece)[jax.process_index() :: jax.process_count()]
    there = {path.name for path in pieces.glob("*.npz")}  # one list, not a request for each
    missing = [start for start in ours if f"{start:09d}.npz" not in there]
    total, left = (sum(min(piece, images.num - start) for start in starts) for starts in (ours, missing))
    mesh = make_mesh(jax.local_devices())
    maker = FeatureMaker(extractor, mesh, min(args.batch, images.num), program_check())
    progress = Progress(total, total - left, quiet=jax.process_index() > 0)
    if missing:
        progress.say(f"Compiling what runs on the device; then {left:,} images, {piece:,} at a time.")
    began = time.monotonic()
    with of_process(progress) as watchdog, contextlib.closing(progress):
        for start in missing:
            watchdog.at(f"{piece:,} images and their features")
            features, logits = maker(images.make(start, min(start + piece, images.num)))
            check_finite(features)
            watchdog.at("features to be written")
            save_npz(
                pieces / f"{start:09d}.npz", {"features": features} | ({} if logits is None else {"logits": logits})
            )
            progress.more(len(features))
        watchdog.at("the other processes")
        wait_for_all("all features are there")
    return time.monotonic() - began, piece


def gather(folder: Path, starts: Iterable[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Features [N, D] and logits [N, K], in order.

    Raises:
      UserError: a piece is damaged.
    """
    parts = []
    for start in starts:
        piece = folder / FEATURES / f"{start:09d}.npz"
        with made_again(piece), piece.open("rb") as file, np.load(file) as part:
            parts.append(dict(part))
    logits = np.concatenate([part["logits"] for part in parts]) if "logits" in parts[0] else None
    return np.concatenate([part["features"] for part in parts]), logits


def _claim(folder: Path, settings: dict[str, Any], piece: int) -> None:
    """Write the settings down; pieces that are there already decide how many images are in one.

    Raises:
      UserError: see :func:`extract_all`.
    """
    pieces = folder / FEATURES
    try:
        before, kept = read_settings(folder, settings), any(pieces.glob("*"))
        if before is None:  # the features are deleted at the end
            check_unclaimed(folder, ["result.json", *([FEATURES] if kept else [])], "--out")
        make_folder(pieces)
        # Settings alone are of a command that failed before its first piece; hidden files, such as its lock, say nothing.
        begun = kept or any(path.name not in (SETTINGS, FEATURES) for path in folder.glob("[!.]*"))
        if before is not None:  # perhaps with another --batch, or on other devices, which suit other pieces
            of_before = before.pop("piece", piece)
            piece = of_before if kept else piece
        if begun and before is not None and (different := differing(before, settings)):
            raise made_otherwise(folder, "an evaluation", different)
        write_json(folder / SETTINGS, settings | {"piece": piece})
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; give another --out.") from error


def _claimed(folder: Path, settings: dict[str, Any]) -> int:
    """How many images are in a piece of the folder.

    Raises:
      UserError: the first process wrote other settings, or into another folder.
    """
    found = read_settings(folder, settings) or {}
    piece = found.pop("piece", None)
    if piece is None or differing(found, settings):
        raise UserError(
            f"{folder} is not the same for all processes: give --checkpoint if the run goes on, and an --out that all see."
        )
    return piece
