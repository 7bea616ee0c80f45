"""When a run has to end early: signals, and notices that the machine is about to go, agreed on by all processes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

# Where a machine of Google's cloud learns of its maintenance; the variable is the one that Google's libraries honour.
_METADATA_HOST = "GCE_METADATA_HOST"
_NO_EVENT = "NONE"
_SECONDS_BETWEEN_TRIES = 10.0


class Stop:
    """Whether to end the run, asked after every program that is sent: a step, or several.

    Of several processes, each one's SIGTERM (or Ctrl-C) is told to the others by JAX's coordination service, which also
    chooses the program, a few ahead, after which all of them stop.

    Attributes:
      signals: names of those that came to this process and that it handles itself.
    """

    def __init__(self, signals: list[str]):
        self.signals = signals
        self._many = jax.distributed.is_initialized()

    def after(self, programs: int) -> bool:
        """Whether the run ends here: alike in every process.

        Args:
          programs: how many this start has sent, from 1; asked for each in turn, once or more.  JAX's service stops all
            at the number after the highest that any of them asked for last, and takes 0 before the first: steps would
            not do, as a run goes on from any, and in leaps.  So nothing else may ask it.
        """
        if self._many:
            return multihost_utils.reached_preemption_sync_point(programs)
        return bool(self.signals)

    def now(self) -> bool:
        """Whether work between two steps may be broken off; never where other processes would wait for this one."""
        return bool(self.signals) and jax.process_count() == 1

    @property
    def reason(self) -> str:
        """In words."""
        return self.signals[0] if self.signals else "SIGTERM, here or in another process,"

    @property
    def preempted(self) -> bool:
        """Whether whoever started the run would have it started again: not after Ctrl-C, nor in a lone process."""
        return self._many and not self.signals


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """Listen for SIGTERM, Ctrl-C, a terminal that closes and notices of maintenance.

    A second signal acts as usual, but for SIGHUP, which then does nothing: a terminal that closes may send it twice, by
    its shell and by itself, or while a run that was stopped is saving.
    """
    received: list[str] = []
    before: dict[signal.Signals, Any] = {}
    many = jax.distributed.is_initialized()

    def note(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_IGN if signum == signal.SIGHUP else handler)
        if many:
            os.kill(os.getpid(), signal.SIGTERM)  # the way in to JAX's service

    try:
        # With several processes, SIGTERM is JAX's: its service listens for it since it was started.
        for signum in (signal.SIGINT,) if many else (signal.SIGTERM, signal.SIGINT):
            before[signum] = signal.signal(signum, note)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it, to outlive the terminal
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, note)
    except ValueError:  # not the main thread (a notebook's worker, a test): signals are not ours to take
        before.clear()
    watching = threading.Event()
    if _METADATA_HOST in os.environ or jax.default_backend() == "tpu":
        threading.Thread(target=_watch_maintenance, args=(watching,), daemon=True).start()
    try:
        yield Stop(received)
    finally:
        watching.set()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _watch_maintenance(ended: threading.Event) -> None:
    """Send this process SIGTERM when its machine of Google's cloud is about to be stopped for maintenance, or taken back."""
    host = os.environ.get(_METADATA_HOST, "metadata.google.internal")
    failures = 0
    while not ended.is_set():
        for key, quiet in (("maintenance-event", _NO_EVENT), ("preempted", "FALSE")):
            url = f"http://{host}/computeMetadata/v1/instance/{key}"
            try:
                request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
                with urllib.request.urlopen(request, timeout=5) as answer:
                    event = answer.read().decode().strip()
            except OSError as error:  # urllib's own are of it
                failures += 1
                if failures == 3:
                    log.warning(
                        "Notices of maintenance cannot be had from %s (%s): they will come as SIGTERM.", host, error
                    )
                    return
                continue
            failures = 0
            if event != quiet and not ended.is_set():
                log.warning("The machine says %s=%s: saving, and stopping.", key, event)
                os.kill(os.getpid(), signal.SIGTERM)
                return
        ended.wait(_SECONDS_BETWEEN_TRIES)
