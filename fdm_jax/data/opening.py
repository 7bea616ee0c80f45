"""From what ``data.source`` says to a source: a data set's name, or the path of a prepared set, a zip or a folder."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from fdm_jax.data.archives import open_archive
from fdm_jax.data.sources import Cached, FileSource, Source, Subset, XFlip
from fdm_jax.data.staging import local_copy
from fdm_jax.errors import UserError, nearest
from fdm_jax.user_dirs import data_root, default_data_dir, writable_data_root
from fdm_jax.whole_files import is_remote, place

# What `fdm dataset prepare` makes, and from what.
ORIGINALS = {
    "cifar10": "cifar-10-python.tar.gz",
    "ffhq64": "images1024x1024",
    "afhqv2": "afhq-v2-dataset",
    "mnist": "FOLDER_OF_IDX_FILES",
    "folder": "FOLDER",
    "zip": "EDM_DATASET.zip",
}
NAMES = ("digits", *ORIGINALS)


def open_source(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
    use_labels: bool = True,
    xflip: bool = False,
    max_images: int | None = None,
    seed: int = 0,
    cache_mb: int = 512,
) -> Source:
    """Opens a data set.

    Args:
      source: the name of a prepared data set (``cifar10``, ``folder/cats``; ``digits`` prepares itself), or the path of
        one, or of a zip or folder of images. A folder that is called like a data set is reached as ``./digits``.
        What is on Google Cloud Storage (gs://) is copied to this host once.
      split: ``train``, ``test`` or ``all``, or of prepared sets a slice such as ``train[:1000]``; a zip or folder has
        only ``train``.
      data_dir: where named data sets are, also gs://; ``$XDG_CACHE_HOME/fdm_jax/data`` by default.
      use_labels: whether labels are read, and required; without, all are 0 and ``spec.num_classes`` is 0.
      xflip: whether every image is there a second time, mirrored; N doubles.
      max_images: at most so many images, chosen at random by ``seed``, before mirroring.
      seed: of that choice alone.
      cache_mb: decoded images stay in memory if all of them fit in so many MiB.

    Raises:
      UserError: the data set is unknown, not prepared, missing, damaged or not of the kind described above.
    """
    if not os.fspath(source).strip():  # a path that is empty would be the current folder
        raise UserError("the data source is empty; if it is a variable of the shell, it is not set.")
    try:
        opened = _open(os.fspath(source), split, data_root(data_dir), use_labels)
    except PermissionError as error:
        raise UserError(f"{error.filename or source} cannot be read or written ({error.strerror or error}).") from error
    if max_images is not None:
        opened = Subset(opened, max_images, seed)
    spec = opened.spec
    if spec.num_images * spec.resolution**2 * spec.channels <= cache_mb * 2**20:
        opened = Cached(opened)
    return XFlip(opened) if xflip else opened


def _open(name: str, split: str, data_dir: Path, use_labels: bool) -> Source:
    from fdm_jax.data.prepared import PreparedSource, find_prepared

    path = place(name)
    if is_remote(path):
        path = local_copy(find_prepared(path.name, path.parent) or path)
    known = name.split("/")[0] in NAMES
    if known or not path.exists():
        if name == "digits":
            from fdm_jax.data.digits import prepare_digits

            return PreparedSource(prepare_digits(writable_data_root(data_dir)), split, use_labels=use_labels)
        if not path.is_absolute() and (folder := find_prepared(name, data_dir)):
            return PreparedSource(local_copy(folder), split, use_labels=use_labels)
    if not path.exists():
        if known:
            where = "" if data_dir == default_data_dir() else f" --data_dir={shlex.quote(str(data_dir))}"
            kind = name.split("/")[0]
            raise UserError(
                f"{name} is not prepared in {data_dir}, and nothing is downloaded: do `fdm dataset prepare {kind} "
                f"--source={ORIGINALS[kind]}{where}` once, or give the path of a prepared set, a zip or a folder."
            )
        if path.name == name and not path.suffix:  # a bare word: a name, not a path
            raise UserError(f"no data set, zip or folder is called {name!r}: {nearest(name, NAMES)}")
    if path.is_dir() and (folder := find_prepared(path.name, path.parent)):
        return PreparedSource(folder, split, use_labels=use_labels)
    archive = open_archive(path)
    if split not in ("train", "all"):
        raise UserError(f"split is {split!r}, but a zip or folder such as {name} has only 'train'.")
    return FileSource(archive, use_labels=use_labels)
