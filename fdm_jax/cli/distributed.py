"""Several processes as one: ``--distributed``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fdm_jax.cli.compile_cache import share_compile_cache
from fdm_jax.errors import RESTART_CODE, RestartNeeded, UserError, lost_another
from fdm_jax.progress import say

PATIENCE = 300  # seconds that a process waits for the others to come; JAX's default

# Where a process that ends for what the user can mend says what it is: a key of the service that connects all.
REFUSAL = "fdm_jax/refusal"


def add_distributed_argument(parser: argparse.ArgumentParser) -> None:
    """Add it."""
    parser.add_argument(
        "--distributed", default="off", metavar="HOW", help="several processes share the work: auto (TPU pods, Slurm), or "
        "HOST:PORT,N,I with the first process's address, their number, and which one this is (default: %(default)s)",
    )  # fmt: skip


@contextlib.contextmanager
def joined(how: str, workdir: Path | None, *, leave_when_told: bool = False) -> Iterator[None]:
    """Join the other processes, and part from them in good order; before anything else is done with JAX.

    Args:
      how: the argument.
      workdir: the run's, if there is one: see :func:`~fdm_jax.cli.compile_cache.share_compile_cache`.
      leave_when_told: for work that is kept piece by piece: end at once on SIGTERM, which JAX would else keep to itself
        for those who ask its service.

    Raises:
      UserError: ``how`` cannot be read, its port is taken, or it is auto where JAX knows no cluster.
      RestartNeeded: another process was lost; the block's own is passed on.
    """
    if how == "off":
        yield
        return

    _initialise(how)
    if leave_when_told:
        _leave_when_told()
    others = _Others()
    try:
        share_compile_cache(workdir)
        _connect()
        yield
    except RestartNeeded as error:
        if not isinstance(error, ProcessLost):
            _shut_down()  # waits for the others, which would else miss the first one and be ended for it
        raise
    except UserError:
        raise
    except Exception as error:
        if _state().num_processes > 1 and lost_another(error):
            others.end_if_refused()
            raise ProcessLost(error) from error
        raise
    else:
        _shut_down()
    finally:
        others.forget()


def _connect() -> None:
    """A sum over all devices.

    The first one connects them, and (on CPUs) gives those up that do not come within half a minute.  Here all are ready
    for it; later ones wait for whoever has something to do first, such as to compile, or for a lock.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fdm_jax.devices import make_mesh, sharded

    each = jax.make_array_from_process_local_data(sharded(make_mesh()), np.ones(jax.local_device_count(), np.int32))
    jax.block_until_ready(jax.jit(jnp.sum)(each))


_ENDINGS = {
    signal.SIGTERM: ("stopped by SIGTERM; the same command begins again or goes on.", RESTART_CODE),
    signal.SIGINT: ("stopped; the same command begins again or goes on.", 130),
}


def _leave_when_told() -> None:
    """End at SIGTERM or Ctrl-C, wherever the main thread is: it may compile for minutes, or wait for what has ended already."""
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno())  # gets the numbers of signals as they come
    tell.detach()  # stays open as long as the process
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as shells have it for what runs in the background
        # A second one ends it at once.
        signal.signal(signal.SIGINT, lambda number, frame: signal.signal(number, signal.SIG_DFL))

    def leave() -> None:
        while (number := told.recv(1)[0]) not in _ENDINGS:
            pass
        sentence, code = _ENDINGS[signal.Signals(number)]
        say(f"fdm: {sentence}")
        # As a rule all are told, and the first one's end would be taken for a loss; but perhaps the others never come to this.
        _part(10)
        os._exit(code)

    threading.Thread(target=leave, daemon=True).start()


class _Others:
    """Listens, beside the work, for another process that ends for what the user can mend, such as a damaged image.

    This one could only wait for its part of the next sum, and take it for lost; and who started them would start them
    again.  So it ends with the same code.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._refused = threading.Event()
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def forget(self) -> None:
        """This process ends by itself."""
        self._ended.set()

    def end_if_refused(self) -> None:
        """Do not return if another process has ended so."""
        if self._refused.is_set():
            self._listening.join()

    def _listen(self) -> None:
        import jax

        service, sentence = _service(), ""
        while not sentence:
            if self._ended.wait(2):
                return
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no such key, or no service any more
                sentence = service.key_value_try_get(REFUSAL)
        self._refused.set()
        if self._ended.wait(10):  # what all find, each says by itself
            return
        say(f"fdm: {sentence}")
        _part(30)
        os._exit(2)


def leave_together(sentence: str | None, seconds: float = 30) -> None:
    """Before an end for what the user can mend, which as a rule all processes find: wait until they end too.

    The first one holds the service that connects them, and those that have not said yet what is wrong would be aborted
    when it is gone.

    Args:
      sentence: what is wrong, for those that do not find it; None if it may pass, and they are to be started again, or
        if they find it anyway.
      seconds: to wait at most.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, or one more of them: at once, then
        _part(seconds, sentence and f"process {_state().process_id} has ended: {sentence}")


def _state() -> Any:
    """What JAX knows of the processes: num_processes, process_id and client, before it starts on their devices."""
    # No public name leads to it; Orbax takes this one too, of all releases from 0.7.2 to 0.12.
    from jax._src.distributed import global_state

    return global_state


def _service() -> Any:
    """What connects the processes, and keeps a few words for all of them."""
    return _state().client


_SHUTTING_DOWN = threading.Lock()


def _shut_down() -> None:
    """Part from the other processes when they do, once: JAX would abort a second thread that does."""
    import jax

    with _SHUTTING_DOWN:
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()


def _part(seconds: float, refusal: str | None = None) -> None:
    """From the other processes, as soon as they do likewise, or after so many seconds."""

    def part() -> None:
        with contextlib.suppress(RuntimeError):  # the others are gone already
            if refusal is not None:
                _service().key_value_set(REFUSAL, refusal, allow_overwrite=True)
            _shut_down()

    parting = threading.Thread(target=part, daemon=True)
    parting.start()
    parting.join(seconds)


def wait_for_all(what: str) -> None:
    """Until every process has come here; ``what`` names the place."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)  # nothing where there is one process


class ProcessLost(RestartNeeded):
    """One of several processes does not answer any more."""

    def __init__(self, error: Exception):
        reason = " ".join(str(error).split())[:200]
        super().__init__(
            f"another process was lost ({reason}): start all of them again with the same command, to go on from the newest "
            "checkpoint."
        )


def _check_free(how: str, port: int) -> None:
    """Raise a UserError if the first process cannot listen there: JAX would crash, or share the port of another run."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not matter
            probe.bind(("", port))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"The first process of --distributed={how} cannot listen at port {port} ({getattr(error, 'strerror', error)}): give "
            "one that is free."
        ) from error


def _initialise(how: str) -> None:
    import jax

    arguments: dict[str, Any] = {}
    if how != "auto":
        try:
            address, count, index = how.split(",")
            if not (0 <= int(index) < int(count) and address.rpartition(":")[2].isdecimal()):
                raise ValueError
        except ValueError as error:
            raise UserError(
                "--distributed must be off, auto (where JAX knows the cluster) or HOST:PORT,N,I with I from 0 to N - 1, and "
                f"is {how!r}."
            ) from error
        arguments = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        if int(index) == 0:
            _check_free(how, int(address.rpartition(":")[2]))
    # Said before, as nobody can afterwards: JAX aborts a program that has waited in vain, with a page of C++ stack.
    print(f"Waiting for the other processes of --distributed={how}, {PATIENCE} s at most.", flush=True)
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        if how == "auto":
            raise UserError(
                f"--distributed=auto found no cluster that JAX knows, such as a TPU pod or Slurm ({error}): give "
                "HOST:PORT,N,I, or leave it out."
            ) from error
        raise UserError(f"The processes of --distributed={how} did not find each other: {error}") from error
