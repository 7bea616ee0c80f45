"""TFDS builders over local files: pictures in, array_record shards out, in the order of the source; no TensorFlow.

A prepared set is a folder ``DATA_DIR/name[/config]/1.0.0`` that describes itself: ``features.json`` has the size,
the channels and the classes, ``dataset_info.json`` the splits and counts, ``metadata.json`` the source, its checksum
and what was done to it.  :mod:`fdm_jax.data.prepared` reads it.
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from fdm_jax.data.raw import RawData, RawSplit
from fdm_jax.errors import UserError
from fdm_jax.owners import allow_nameless_owners
from fdm_jax.progress import LINE_SECONDS, Progress
from fdm_jax.storage_errors import system_fails
from fdm_jax.whole_files import check_utf8, locked

allow_nameless_owners()  # TFDS looks at the shards that it wrote

SHARD_BYTES = 2**26  # of pixels; TFDS holds the images of a shard in memory while it writes it
_CHUNK = 16  # pictures that a thread reads at a time


class LocalImages(tfds.core.ShardBasedBuilder):
    """Splits of ``image`` uint8 [R, R, C] and, if there are classes, ``label``.

    Args:
      raw: where the images come from.
      metadata: what is to be remembered of the source, strings and numbers.
      threads: how many pictures are read at the same time.
      skip_bad: whether bad pictures are left out and counted, or end the work.
      left_out: receives the sentence of each one that was left out.
      config: what tells this set from others of its kind, if there may be others.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Images in the order of their source."}

    def __init__(
        self,
        *,
        raw: RawData,
        metadata: dict[str, Any],
        threads: int = 1,
        skip_bad: bool = False,
        left_out: list[str] | None = None,
        config: str | None = None,
        **kwargs: Any,
    ):
        self._raw, self._source_metadata, self._threads = raw, metadata, threads
        self._skip_bad, self._left_out = skip_bad, [] if left_out is None else left_out
        if config is not None:
            kwargs["config"] = tfds.core.BuilderConfig(name=config, version=self.VERSION, description=config)
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        raw = self._raw
        shape = (raw.resolution, raw.resolution, raw.channels)
        # As bytes: TFDS would write a list of integers otherwise, which takes 7 times as long to write and 2.5 to read.
        features = {"image": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")}
        if raw.num_classes:
            names = {"names": list(raw.class_names)} if raw.class_names else {"num_classes": raw.num_classes}
            features["label"] = tfds.features.ClassLabel(**names)
        return _LocalInfo(
            builder=self,
            description=(type(self).__doc__ or "").split("\n")[0],
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(self._source_metadata),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator[Any]]]]:
        per_shard = max(SHARD_BYTES // (self._raw.resolution**2 * self._raw.channels), 1)

        def shards(split: RawSplit) -> list[Callable[[], Iterator[Any]]]:
            examples = self._examples(split)  # goes on from shard to shard
            return [lambda: itertools.islice(examples, per_shard)] * -(-len(split) // per_shard)

        return {name: shards(split) for name, split in self._raw.splits.items()}

    def _examples(self, split: RawSplit) -> Iterator[tuple[int, dict[str, Any]]]:
        def read(rows: range) -> list[np.ndarray | UserError]:
            images: list[np.ndarray | UserError] = []
            for i in rows:
                try:
                    images.append(split.read(i))
                except UserError as error:
                    if not self._skip_bad or system_fails(error):
                        raise  # a file server's hiccup, say, makes no picture bad
                    images.append(error)
            return images

        chunks = [range(i, min(i + _CHUNK, len(split))) for i in range(0, len(split), _CHUNK)]
        for rows, images in zip(chunks, _ordered_map(read, chunks, self._threads), strict=True):
            for i, image in zip(rows, images, strict=True):
                if isinstance(image, UserError):
                    self._left_out.append(str(image))
                    continue
                label = {} if split.labels is None else {"label": int(split.labels[i])}
                yield i, {"image": image, **label}
            self._progress.more(len(rows))

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        total = sum(map(len, self._raw.splits.values()))
        with contextlib.closing(Progress(total, 0, seconds=LINE_SECONDS)) as self._progress:
            super()._download_and_prepare(*args, **kwargs)
        for split in self.info.splits.values():
            if not split.num_examples:
                raise UserError(f"None of the pictures in {split.name} can be read.")
            # array_record does not always say that a disk was full; TFDS renames the folder after this.
            for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
                if count and ArrayRecordReader(os.fspath(path)).num_records() != count:
                    raise OSError(f"{path} was not written to its end")
        self.info.metadata.update(
            sha256=self._raw.checksum(), left_out=len(self._left_out), enlarged=self._raw.enlarged()
        )


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: these sets are not among those of TFDS's bucket.  (It would leave an empty folder behind as well.)"""


class Cifar10(LocalImages):
    """CIFAR-10 (Krizhevsky, 2009), from its authors' archive."""


class Ffhq64(LocalImages):
    """FFHQ (Karras et al., arXiv 1812.04948) at 64x64, from its authors' pictures."""


class Afhqv2(LocalImages):
    """AFHQv2 (Choi et al., arXiv 1912.01865) at 64x64, from its authors' pictures."""


class Mnist(LocalImages):
    """MNIST (LeCun et al., 1998) or a data set in its format."""


class Folder(LocalImages):
    """A tree of pictures."""


class Zip(LocalImages):
    """A data set in EDM's layout."""


BUILDERS: dict[str, type[LocalImages]] = {
    "cifar10": Cifar10, "ffhq64": Ffhq64, "afhqv2": Afhqv2, "mnist": Mnist, "folder": Folder, "zip": Zip,
}  # fmt: skip


def prepare(data_dir: Path, name: str, make_builder: Callable[[], tfds.core.DatasetBuilder]) -> Path:
    """Writes a data set below ``data_dir`` unless it is there, and returns its folder.

    TFDS writes into a temporary folder and renames it, so the final folder is whole or absent. A lock makes
    all but one of several processes wait, and lets that one sweep up after another that was killed.

    Args:
      data_dir: made if it is not there.
      name: of the data set, with its configuration after a slash if it has one.
      make_builder: makes a builder with this ``data_dir``; called again once files are there, so that it finds them.

    Raises:
      OSError: ``data_dir`` cannot be written.
      UserError: what the builder says of its source; or see :func:`fdm_jax.whole_files.check_utf8`.
    """
    check_utf8(data_dir)
    folder = Path(make_builder().data_dir)
    if not folder.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        with locked(data_dir / f"{name.replace('/', '-')}.lock") as alone:
            if alone:
                for remains in (data_dir / name).glob("incomplete.*"):
                    shutil.rmtree(remains, ignore_errors=True)
            try:
                # TFDS announces itself on stdout, draws bars on stderr where our own belongs, and wants a folder
                # for what it would download.
                with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()), _no_bars():
                    make_builder().download_and_prepare(download_dir=unused)
            except OSError:
                # Without a lock another process may have renamed its folder first, which does as well.
                if not folder.exists():
                    raise
    return folder


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def _ordered_map(function: Callable[[Any], Any], items: list[Any], threads: int) -> Iterator[Any]:
    """Like ``map`` in threads, but at most a few results ahead of what was taken."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
