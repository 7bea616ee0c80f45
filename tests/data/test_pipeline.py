"""The order of the data: whole epochs, one sequence for any number of processes, exact resumption."""

import errno
import itertools
import json
import multiprocessing.synchronize
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fdm_jax.data.pipeline import make_batches
from fdm_jax.data.sources import DataSpec, Source
from fdm_jax.errors import UserError
from fdm_jax.storage_errors import file_trouble

N, G = 23, 8  # three epochs are 69 examples; no batch ends where an epoch does before the 23rd


class Traced(Source):
    """Image i holds i in its one pixel and as its label; remembers what was read."""

    def __init__(self, n=N):
        self.spec, self.seen = DataSpec("traced", n, 1, 1, n), []

    def read(self, indices):
        self.seen.append(indices.tolist())
        return {"image": indices.astype(np.uint8).reshape(-1, 1, 1, 1), "label": indices.astype(np.int32)}


def batches(process=0, count=1, *, source=None, seed=3, **options):
    options = {"batch_size": G, "num_threads": 3, "prefetch": 5} | options
    return make_batches(source or Traced(), seed=seed, process_index=process, process_count=count, **options)


def labels(data, steps):
    return np.concatenate([batch["label"] for batch in itertools.islice(data, steps)])


def global_labels(streams, steps):
    return np.concatenate([next(stream)["label"] for _ in range(steps) for stream in streams])


def test_what_a_batch_holds():
    for p in range(2):
        batch = next(batches(p, 2))
        assert set(batch) == {"image", "label", "index"}
        assert batch["image"].shape == (4, 1, 1, 1) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"].ravel(), batch["label"])
        np.testing.assert_array_equal(batch["index"], np.arange(4) + 4 * p)
        assert batch["index"].dtype == np.int32


def test_every_image_once_per_epoch_and_another_order_in_each():
    epochs = labels(batches(), 9)[: 3 * N].reshape(3, N)
    for epoch in epochs:
        assert sorted(epoch) == list(range(N))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not any(np.array_equal(epoch, np.arange(N)) for epoch in epochs)


@pytest.mark.parametrize("n, g", [(1, 4), (2, 1), (3, 10)])
def test_batches_larger_than_the_data(n, g):
    order = labels(batches(source=Traced(n), batch_size=g), 30)[: 10 * n].reshape(10, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in order)


def test_the_order_stays_what_it_was():
    """Saved positions mean something only in this order: the numbers are of the first version."""
    first = [15, 16, 20, 10, 5, 14, 6, 3, 21, 4, 0, 18, 19, 7, 13, 2, 1, 12, 9, 22, 8, 17, 11]
    second = [12, 19, 2, 13, 5, 6, 8, 18, 1, 16, 0, 7, 15, 3, 4, 11, 22, 17, 21, 9, 14, 10, 20]
    assert labels(batches(), 6)[: 2 * N].tolist() == first + second


@pytest.mark.parametrize("count", [2, 4, 8])
def test_one_global_sequence_for_any_number_of_processes(count):
    sources = [Traced() for _ in range(count)]
    streams = [batches(p, count, source=source, prefetch=0) for p, source in enumerate(sources)]
    np.testing.assert_array_equal(global_labels(streams, 12), labels(batches(), 12))
    for p, source in enumerate(sources):  # and each read its own rows only
        own = labels(batches(), 12).reshape(12, count, -1)[:, p]
        assert source.seen == own.tolist()


def test_the_order_does_not_depend_on_threads_but_on_the_seed():
    expected = labels(batches(prefetch=0), 12)
    for threads, prefetch in [(1, 1), (8, 16), (4, 2)]:
        np.testing.assert_array_equal(labels(batches(num_threads=threads, prefetch=prefetch), 12), expected)
    assert labels(batches(seed=2**40), 1).tolist() != labels(batches(seed=0), 1).tolist()
    epochs = {tuple(labels(batches(seed=seed), 9)[i * N : (i + 1) * N]) for seed in range(20) for i in range(3)}
    assert len(epochs) == 60  # neighbouring seeds share no epoch either


@pytest.mark.parametrize("before, after", [(1, 2), (4, 1), (2, 4)])
@pytest.mark.parametrize("done", [0, 1, 7])
def test_resumed_on_another_number_of_processes(before, after, done):
    expected = labels(batches(), done + 10)
    streams = [batches(p, before) for p in range(before)]
    first = global_labels(streams, done) if done else np.zeros(0, int)
    states = [json.dumps(stream.get_state(), sort_keys=True) for stream in streams]
    assert len(set(states)) == 1  # the same on every process, whatever was read ahead
    assert json.loads(states[0])["batches"] == done
    resumed = [batches(p, after) for p in range(after)]
    for stream in resumed:
        stream.set_state(json.loads(states[0]))
        assert stream.get_state() == json.loads(states[0])
    np.testing.assert_array_equal(np.concatenate([first, global_labels(resumed, 10)]), expected)


def test_going_back_in_a_running_iterator():
    data = batches()
    start = data.get_state()
    first = labels(data, 5)
    middle = data.get_state()
    labels(data, 3)
    data.set_state(start)
    np.testing.assert_array_equal(labels(data, 5), first)
    assert data.get_state() == middle
    data.close()
    assert data.get_state() == middle and data.batches == 5
    np.testing.assert_array_equal(labels(data, 3), labels(batches(), 8)[5 * G :])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 4}, "its data seed is 4, here it is 3;"),
        ({"num_images": 46}, "its number of images is 46, here it is 23;"),
        ({"batch_size": 16}, "its batch size is 16, here it is 8;"),
        ({"next_image": 99}, "its next image in the order of the data is 99,"),
        ({"seed": None}, "its data seed is None"),
        ({"batches": -1}, "batches=-1"),
        ({"batches": "7"}, "batches='7'"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(change, words):
    data = batches()
    labels(data, 2)
    with pytest.raises(UserError, match=words):
        data.set_state(data.get_state() | change)
    np.testing.assert_array_equal(labels(data, 2), labels(batches(), 4)[2 * G :])


@pytest.mark.parametrize("prefetch", [0, 4])
def test_failure_comes_with_its_batch_and_can_be_tried_again(prefetch):
    expected = labels(batches(), 6)
    broken = threading.Event()
    broken.set()

    class Broken(Traced):
        def read(self, indices):
            if broken.is_set() and np.array_equal(indices, expected[3 * G : 4 * G]):
                raise UserError("img.png is damaged.")
            return super().read(indices)

    data = batches(source=Broken(), prefetch=prefetch)
    np.testing.assert_array_equal(labels(data, 3), expected[: 3 * G])
    for _ in range(2):
        with pytest.raises(UserError, match="img.png is damaged"):
            next(data)
        assert data.get_state()["batches"] == 3
    broken.clear()
    np.testing.assert_array_equal(labels(data, 3), expected[3 * G :])


def test_batches_are_read_ahead():
    source = Traced()
    data = batches(source=source, num_threads=1, prefetch=4)
    next(data)
    for _ in range(100):
        if len(source.seen) == 5:
            break
        threading.Event().wait(0.02)
    assert len(source.seen) == 5 and data.get_state()["batches"] == 1
    data.close()


def test_all_threads_read():
    """As many as asked for, though that is more than are read ahead otherwise."""
    together = threading.Barrier(12)

    class Slow(Traced):
        def read(self, indices):
            together.wait(timeout=20)
            return super().read(indices)

    data = batches(source=Slow(), num_threads=12, prefetch=8)
    next(data)
    together.abort()
    data.close()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch_size": 10, "count": 4}, "batch size 10 does not divide by 4 processes; 8 or 12 would."),
        ({"batch_size": 3, "count": 4}, "batch size 3 does not divide by 4 processes; 4 would."),
        ({"batch_size": 0}, "batch size is 0"),
        ({"batch_size": 10**15}, "its images on this machine take .* GiB of memory; give a smaller one"),
        ({"process": 2, "count": 2}, "process index is 2: it must be from 0 to 1"),
        ({"count": 0}, "process count is 0"),
        ({"seed": -1}, "data seed is -1"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"num_threads": 1025}, "num_threads=1025 must be from 1 to 1024"),
        ({"num_workers": 2**32}, "num_workers=4294967296 from 0 to 1024"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(UserError, match=words):
        batches(**options)


def test_three_epochs_with_five_stops_lose_and_repeat_nothing():
    """Every index three times, stopped anywhere."""
    rng = np.random.RandomState(0)
    stops = np.sort(rng.choice(np.arange(1, 3 * N), 5, replace=False))  # batches of 1 at first, to stop anywhere
    data, seen = batches(batch_size=1), []
    for stop in [*stops, 3 * N]:
        seen += labels(data, stop - len(seen)).tolist()
        state = json.loads(json.dumps(data.get_state()))
        data.close()
        data = batches(batch_size=1)
        data.set_state(state)
    assert np.bincount(seen, minlength=N).tolist() == [3] * N
    assert all(sorted(seen[i * N : (i + 1) * N]) == list(range(N)) for i in range(3))


def test_stops_with_changing_numbers_of_processes_and_batches_placed_ahead():
    expected = labels(batches(), 9)
    seen, state = [], batches().get_state()
    for steps, count in ((2, 1), (1, 4), (3, 2), (1, 1), (1, 8), (1, 2)):
        streams = [batches(p, count) for p in range(count)]
        for stream in streams:
            stream.set_state(state)
        seen.append(global_labels(streams, steps))
        ahead = [next(stream) for stream in streams]  # on the devices, but not trained on
        assert len({batch["image"].shape for batch in ahead}) == 1
        states = [stream.get_state(unused=1) for stream in streams]
        state = json.loads(json.dumps(states[0]))
        assert all(each == state for each in states)
    np.testing.assert_array_equal(np.concatenate(seen), expected)
    assert (np.bincount(expected[: 3 * N]) == 3).all()


class Failing(Traced):
    """As a module's class, for worker processes."""

    def read(self, indices):
        if 7 in indices:
            raise UserError("img.png is damaged.")
        return super().read(indices)


def test_worker_processes_read_the_same_and_report_the_same():
    data = batches(num_workers=2)
    np.testing.assert_array_equal(labels(data, 7), labels(batches(), 7))
    state = data.get_state()
    data.close()
    assert state["batches"] == 7
    data.set_state(state)
    np.testing.assert_array_equal(labels(data, 2), labels(batches(), 9)[7 * G :])
    data.close()
    failing = batches(source=Failing(), num_workers=2)
    before = np.flatnonzero(labels(batches(), 3) == 7)[0] // G
    labels(failing, before)
    with pytest.raises(UserError, match="img.png is damaged"):
        next(failing)
    assert failing.get_state()["batches"] == before
    failing.close()


class Away(Traced):
    """On a file server that does not answer."""

    def read(self, indices):
        try:
            raise OSError(errno.ESTALE, "Stale file handle", "/data/img.png")
        except OSError as error:
            raise UserError("img.png cannot be read.") from error


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_may_pass_by_itself_is_known(num_workers):
    """So that launchers try again."""
    data = batches(source=Away(), num_workers=num_workers)
    with pytest.raises(UserError, match="^img.png cannot be read") as caught:
        next(data)
    data.close()
    trouble = file_trouble(caught.value)
    assert trouble.may_pass and trouble.sentence.startswith("/data/img.png cannot be used (Stale file handle)")


class ReadBy(Traced):
    """The labels are the process's id."""

    def read(self, indices):
        time.sleep(0.05)  # for the other one to come to its turn
        batch = super().read(indices)
        return batch | {"label": np.full_like(batch["label"], os.getpid())}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_worker_processes_and_signals(signum):
    """SIGTERM and SIGHUP come to all processes of a run, which then saves; SIGKILL to one that takes too much memory."""
    data = batches(source=ReadBy(), num_workers=2)
    workers = set()
    while len(workers) < 2:
        workers |= set(next(data)["label"].tolist())
    stopped, now = data.batches, time.monotonic()
    try:
        for pid in workers if signum != signal.SIGKILL else list(workers)[:1]:
            os.kill(pid, signum)
        time.sleep(0.5)
        if signum != signal.SIGKILL:
            images = np.concatenate([next(data)["image"].ravel() for _ in range(20)])
            np.testing.assert_array_equal(images, labels(batches(), stopped + 20)[stopped * G :])
        else:
            with pytest.raises(UserError, match="a process that reads data ended unexpectedly"):
                labels(data, 20)
            assert time.monotonic() - now < 25
    finally:
        for pid in filter(alive, workers):
            os.kill(pid, signal.SIGKILL)
        data.close()


ORPHANS = """
import sys, time
sys.path.insert(0, sys.argv[1])
if __name__ == "__main__":
    from test_pipeline import batches
    data = batches(num_workers=2)
    next(data)
    print(*(process.pid for process in data._running._pool._processes.values()), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="asks Linux which processes run")
def test_worker_processes_that_do_not_start(monkeypatch):
    """As in containers whose /dev/shm cannot be written: there multiprocessing does not get its locks."""

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", refused)
    with pytest.raises(UserError, match=r"do not start \(Permission denied; .* set --config.data.workers=0"):
        next(batches(num_workers=2))


def test_worker_processes_end_with_a_program_that_was_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    folder = str(pathlib.Path(__file__).parent)
    with subprocess.Popen([sys.executable, str(script), folder], stdout=subprocess.PIPE, text=True) as program:
        workers = [int(pid) for pid in program.stdout.readline().split()]
        program.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
