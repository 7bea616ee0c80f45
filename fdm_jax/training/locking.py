"""One command at a time per folder that commands fill: a workdir, images, an evaluation, a sweep."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fdm_jax.errors import UserError
from fdm_jax.progress import say
from fdm_jax.storage_errors import file_trouble, refusal
from fdm_jax.training.agreement import all_or_none
from fdm_jax.whole_files import is_remote

# A lock on Google Cloud Storage is written anew so often, and belongs to nobody when it was not for so long (seconds).
BEAT, STALE = 15.0, 60.0


@contextlib.contextmanager
def locked(workdir: Path, hold: bool = True) -> Iterator[None]:
    """Make the workdir, and keep a second process from working in it; death of the process frees it.

    Where the file system has no locks (Lustre and NFS as some clusters mount them), a line says that nobody is kept out.

    On Google Cloud Storage the lock is an object that its holder keeps writing.  Who finds one waits until it has not
    changed for :data:`STALE` seconds, by its own clock, and then takes it over.  A holder that could not write for so
    long (stopped, or cut off) may so be overtaken; it ends at its next beat, and until then both may write.

    Args:
      workdir: a local folder or gs://.
      hold: False for the other processes of one run, of which the first holds the lock; all of them call.

    Raises:
      UserError: another process is at work there, or it cannot be written; in all processes, if in one.
    """
    with contextlib.ExitStack() as stack:
        with all_or_none(f"{workdir} cannot be had by another process, which says why."):
            lock = _remote_lock if is_remote(workdir) else _local_lock
            stack.enter_context(lock(workdir, hold))
        yield


def _in_use(workdir: Path, by: str = "Another process") -> UserError:
    return UserError(f"{by} is at work in {workdir}: stop it, or give another folder.")


@contextlib.contextmanager
def _local_lock(workdir: Path, hold: bool) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{workdir} cannot be written: {error.strerror}; give another folder.") from error
    with file:
        if hold:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(workdir) from None
            except OSError as error:
                say(f"{workdir} cannot be locked ({error.strerror}): see to it that nothing else works there.")
        yield


@contextlib.contextmanager
def _remote_lock(workdir: Path, hold: bool) -> Iterator[None]:
    if not hold:
        yield
        return
    lock = _ObjectLock(workdir)
    lock.acquire()
    over = threading.Event()
    beats = threading.Thread(target=lock.keep, args=(over,), daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join()
        lock.release()


class _ObjectLock:
    """``.lock`` in a workdir on Google Cloud Storage; all writes are conditional on what was there before."""

    def __init__(self, workdir: Path):
        from google.cloud import storage

        self._workdir = workdir
        bucket, _, name = os.fspath(workdir / ".lock").removeprefix("gs://").partition("/")
        self._bucket, self._name = storage.Client().bucket(bucket), name
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._generation = 0  # of the object that is ours, or that we replace; 0: none

    def _write(self) -> bool:
        """Whether nobody else wrote since."""
        from google.api_core.exceptions import PreconditionFailed

        blob, text = self._bucket.blob(self._name), json.dumps(self._owner | {"time": time.time()})
        try:
            blob.upload_from_string(text, content_type="application/json", if_generation_match=self._generation)
            self._generation = blob.generation
            return True
        except PreconditionFailed:  # perhaps by ourselves: the answer to a first attempt may have been lost
            generation, owner = self._read()
            self._generation = generation if owner.get("token") == self._owner["token"] else self._generation
            return self._generation == generation

    def _read(self) -> tuple[int, dict[str, Any]]:
        """(generation, who holds it); (0, {}) without one."""
        from google.api_core.exceptions import NotFound

        blob = self._bucket.blob(self._name)
        try:
            owner = json.loads(blob.download_as_bytes())
        except NotFound:
            return 0, {}
        except ValueError:
            owner = {}
        return blob.generation, owner if isinstance(owner, dict) else {}

    def acquire(self) -> None:
        """Take the lock, at once if there is none, or when nobody keeps it."""
        from google.api_core.exceptions import NotFound

        try:
            if self._write():
                return
        except NotFound as error:
            raise UserError(f"{self._workdir} cannot be written: there is no such bucket.") from error
        except Exception as error:
            if sentence := refusal(error):
                raise UserError(f"{self._workdir} cannot be written: {sentence}") from error
            raise
        self._generation, owner = self._read()
        holder = f"Process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "Another process"
        say(f"{holder} holds {self._workdir}; waiting {STALE:.0f} s for a sign of life from it.")
        deadline = time.monotonic() + STALE
        while self._generation and time.monotonic() < deadline:
            time.sleep(min(BEAT / 3, 1.0))
            generation, _ = self._read()
            if generation not in (0, self._generation):
                raise _in_use(self._workdir, holder)
            self._generation = generation
        if not self._write():
            raise _in_use(self._workdir)

    def keep(self, over: threading.Event) -> None:
        """Write the lock anew until ``over``; ends this process if another one took it."""
        while not over.wait(BEAT):
            try:
                ours = self._write()
            except Exception as error:  # no network: the next beat tells whether the lock was lost meanwhile
                say(f"The lock of {self._workdir} could not be renewed: {error}")
                continue
            if not ours:
                say(f"Another process took over {self._workdir}: this one ends, unsaved.")
                # Not an exception: anything more that is written here could damage the other's files.
                os._exit(2)

    def release(self) -> None:
        """Remove the lock, unless it is no longer ours."""
        from google.api_core.exceptions import NotFound, PreconditionFailed
        from google.cloud.storage.retry import DEFAULT_RETRY

        # Not for the usual two minutes: where the storage fails, the run has already waited for it.
        retry = DEFAULT_RETRY.with_timeout(BEAT)
        with contextlib.suppress(NotFound, PreconditionFailed):  # not ours any more
            try:
                self._bucket.blob(self._name).delete(if_generation_match=self._generation, retry=retry)
            except Exception as error:
                if not file_trouble(error):
                    raise
                say(
                    f"The lock of {self._workdir} could not be removed ({error}): the next start waits {STALE:.0f} s for it."
                )
