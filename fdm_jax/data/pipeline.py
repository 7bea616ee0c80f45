"""Endless shuffled batches whose order depends on the seed alone, whatever the number of processes.

The order is one endless sequence of dataset indices: a permutation of 0..N-1 for epoch 0, another for
epoch 1, and so on.  Global batch k is places kG..(k+1)G-1 of it (batches run on across the ends of epochs),
and process p of P reads the p-th of P equal runs of each batch.  A position in the data is therefore one
number, k.

Grain turns k into a batch and reads ahead in threads.  Its own shuffle is not used: measured with Grain 0.2.18 it takes
3 ms per example for a set of 23 images and 40 us for the digits, where slicing a permutation takes next to
nothing, and a saved position would depend on the version of Grain.
"""

from __future__ import annotations

import collections
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import grain.python as grain
import numpy as np

from fdm_jax.data.sources import MAX_READERS, Source
from fdm_jax.errors import UserError, with_causes
from fdm_jax.host_memory import machine_memory

_GRACE_SECONDS = 10  # what a worker has left after SIGTERM, for the last steps before a run has stopped


class _Order:
    """The endless sequence of dataset indices; any part of it can be had directly."""

    def __init__(self, num_images: int, seed: int):
        self._num_images, self._seed = num_images, seed
        # Several, because threads near the end of an epoch need two at a time.
        self._epoch = functools.lru_cache(maxsize=4)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        # numpy promises that SeedSequence and RandomState never change, but not so for its newer Generator.
        bits = np.random.MT19937(np.random.SeedSequence(self._seed, spawn_key=(epoch,)))
        return np.random.RandomState(bits).permutation(self._num_images)

    def places(self, start: int, stop: int) -> np.ndarray:
        """The dataset indices at places start..stop-1, int64 [stop - start]."""
        n = self._num_images
        epochs = range(start // n, (stop - 1) // n + 1)
        return np.concatenate([self._epoch(e)[max(start - e * n, 0) : stop - e * n] for e in epochs])


class _Reader:
    """Reads this process's rows of global batch k; made anew by pickle in a worker process."""

    def __init__(self, source: Source, seed: int, batch_size: int, rows: range):
        self.source, self.seed, self.batch_size, self._rows = source, seed, batch_size, rows
        self.order = _Order(len(source), seed)

    def __reduce__(self) -> tuple[type[_Reader], tuple[Source, int, int, range]]:
        return _Reader, (self.source, self.seed, self.batch_size, self._rows)

    def __call__(self, k: int) -> dict[str, np.ndarray]:
        start = k * self.batch_size
        indices = self.order.places(start + self._rows.start, start + self._rows.stop)
        return {**self.source.read(indices), "index": np.array(self._rows, np.int32)}


class _Workers(Iterator[dict[str, np.ndarray]]):
    """Batches ``first``, ``first + 1``, ... in order, read by other processes.

    Not Grain's: its workers, and the shared memory they fill, outlive a program that was killed (Grain 0.2.18).
    """

    def __init__(self, read: _Reader, first: int, num_workers: int, prefetch: int):
        spawn = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would lose
        self._to_come = itertools.count(first)
        try:
            self._pool = ProcessPoolExecutor(num_workers, spawn, _become_worker, (read,))
            self._waiting = collections.deque(self._submit() for _ in range(max(prefetch, num_workers)))
        except OSError as error:  # on Linux its locks are in /dev/shm, which containers may withhold
            raise UserError(
                f"processes that read data do not start ({error.strerror or error}; may /dev/shm be written here?): set "
                "--config.data.workers=0."
            ) from error

    def _submit(self) -> Future[dict[str, np.ndarray]]:
        return self._pool.submit(_work, next(self._to_come))

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            self._waiting.append(self._submit())
            return self._waiting.popleft().result()
        except _Refused as error:
            sentence, behind = error.args
            raise UserError(sentence) from behind or error
        except BrokenProcessPool as error:
            self._pool.shutdown(wait=False)  # it has sent SIGTERM to the others, which may take their time
            raise UserError(
                "a process that reads data ended unexpectedly (for want of memory?): set --config.data.workers=0."
            ) from error

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


_reader_of_worker: _Reader | None = None


def _become_worker(read: _Reader) -> None:
    """What a worker process does first: keep the reader, and watch its parent, not to outlive it."""
    global _reader_of_worker
    _reader_of_worker = read
    # Signals are the parent's to act on.  It may want batches until it has saved, and SIGTERM comes to whole groups of
    # processes (from Slurm, systemd, timeout); but also from the pool when another worker has died, which then waits (from
    # Python 3.12 on with a lock held) for the end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(k: int) -> dict[str, np.ndarray]:
    assert _reader_of_worker is not None
    try:
        return _reader_of_worker(k)
    except UserError as error:
        behind = next((each for each in with_causes(error) if isinstance(each, OSError)), None)
        raise _Refused(str(error), behind) from error


class _Refused(Exception):
    """A UserError's sentence and the system's error behind it, which says whether it may pass: pickle drops causes."""


class Batches(Iterator[dict[str, np.ndarray]]):
    """This process's part of every global batch, read ahead by threads or workers; see :func:`make_batches`.

    Yields ``image`` uint8 [G/P, H, W, C], ``label`` int32 [G/P], and ``index`` int32 [G/P]: the place of each
    example in the global batch, to draw its randomness from.  If reading fails, the exception comes with the
    batch it belongs to, and the position stays before that batch.

    Attributes:
      batch_size: G, over all processes.
      batches: how many global batches were delivered so far.
    """

    def __init__(self, read: _Reader, read_options: grain.ReadOptions, num_workers: int):
        self.batch_size, self.batches = read.batch_size, 0
        self._read, self._read_options, self._num_workers = read, read_options, num_workers
        self._running: Any = None  # an iterator with close()

    def _start(self) -> Any:
        if self._num_workers:
            return _Workers(self._read, self.batches, self._num_workers, self._read_options.prefetch_buffer_size)
        to_come = grain.MapDataset.range(self.batches, sys.maxsize)
        return iter(to_come.map(self._read).to_iter_dataset(self._read_options))

    def __next__(self) -> dict[str, np.ndarray]:
        if self._running is None:
            self._running = self._start()
        try:
            batch = next(self._running)
        except BaseException:
            self.close()  # Grain would go on with the batch after; a new reader tries the same one again
            raise
        self.batches += 1
        return batch

    def close(self) -> None:
        """Stops reading ahead. Going on afterwards is allowed and continues in place."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def get_state(self, unused: int = 0) -> dict[str, int]:
        """The position as a small dict for JSON: equal on every process, and independent of their number.

        ``batches`` counts the global batches that ``next`` has returned, not those read ahead, and not the last
        ``unused`` ones.  The rest is there to refuse what does not belong: the seed, N, G, and the dataset index of
        the first example not delivered, which would differ if another version shuffled otherwise.
        """
        batches = self.batches - unused
        return {
            "batches": batches,
            "batch_size": self.batch_size,
            "seed": self._read.seed,
            "num_images": len(self._read.source),
            "next_image": self._next_image(batches),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that :meth:`get_state` gave, with any number of processes.

        Raises:
          UserError: the state is not of this seed, number of images, batch size or order; nothing is changed.
        """
        batches = state.get("batches")
        if type(batches) is not int or batches < 0:
            raise UserError(f"the saved data position has batches={batches!r}: it must be a whole number from 0.")
        expected = self.get_state() | {"batches": batches, "next_image": self._next_image(batches)}
        words = {
            "batch_size": "batch size",
            "seed": "data seed",
            "num_images": "number of images",
            "next_image": "next image in the order of the data",
        }
        for field, what in words.items():
            if state.get(field) != expected[field]:
                raise UserError(
                    f"the saved data position does not fit: its {what} is {state.get(field)!r}, here it is "
                    f"{expected[field]}; resume with the same data, seed, batch size and version of fdm_jax."
                )
        self.close()
        self.batches = batches

    def _next_image(self, batches: int) -> int:
        place = batches * self.batch_size
        return int(self._read.order.places(place, place + 1)[0])


def make_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    num_workers: int = 0,
    prefetch: int = 8,
) -> Batches:
    """The endless iterator of this process's part of shuffled batches.

    Args:
      source: at least one image.
      batch_size: G, the number of examples in a batch over all processes; may exceed the number of images.
      seed: of the order, from 0.
      process_index: p, this process.
      process_count: P, which must divide G.
      num_threads: how many batches are read at the same time; does not change what is delivered.
      num_workers: processes that read instead of threads, for decoding that keeps Python busy; 0 for threads.  The
        source is pickled, and the program must guard its main module, as multiprocessing asks.
      prefetch: how many batches are read ahead, at least one by each thread; 0 reads in the caller's thread.

    Raises:
      UserError: a number is out of range, G is not a multiple of P, or the part of a batch does not fit into memory.
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: it must be at least 1.")
    if process_count < 1:
        raise UserError(f"process count is {process_count}: it must be at least 1.")
    if not 0 <= process_index < process_count:
        raise UserError(f"process index is {process_index}: it must be from 0 to {process_count - 1}.")
    if batch_size % process_count:
        below = batch_size - batch_size % process_count
        advice = f"{below} or {below + process_count}" if below else f"{process_count}"
        raise UserError(f"batch size {batch_size} does not divide by {process_count} processes; {advice} would.")
    if seed < 0:
        raise UserError(f"data seed is {seed}: it must be a whole number from 0.")
    if not (1 <= num_threads <= MAX_READERS and 0 <= num_workers <= MAX_READERS and prefetch >= 0):
        raise UserError(
            f"num_threads={num_threads} must be from 1 to {MAX_READERS}, num_workers={num_workers} from 0 to "
            f"{MAX_READERS}, and prefetch={prefetch} at least 0."
        )
    rows = batch_size // process_count
    size, memory = rows * source.spec.resolution**2 * source.spec.channels, machine_memory()
    if size > memory:
        raise UserError(
            f"batch size is {batch_size}: its images on this machine take {size / 2**30:,.0f} GiB, and it has "
            f"{memory / 2**30:,.0f} GiB of memory; give a smaller one."
        )
    ours = range(process_index * rows, (process_index + 1) * rows)  # of each global batch
    read = _Reader(source, int(seed), batch_size, ours)
    # Grain lets no more threads read than it may read batches ahead.
    options = grain.ReadOptions(*((num_threads, max(num_threads, prefetch)) if prefetch else (0, 0)))
    return Batches(read, options, num_workers)
