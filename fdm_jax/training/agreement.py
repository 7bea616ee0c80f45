"""What several processes of one run must have in common: where they do not, each would go its own way, or wait for ever."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fdm_jax.defaults import flatten
from fdm_jax.errors import RestartNeeded, UserError
from fdm_jax.storage_errors import may_pass
from fdm_jax.whole_files import is_remote, write_text

if TYPE_CHECKING:
    from fdm_jax.data.sources import Source

# Fields that each process may have for itself: where its host has the data, and how they are read there.
OWN_FIELDS = (
    "init_from", "data.source", "data.data_dir", "data.cache_mb", "data.threads", "data.workers",
    "eval.held_out_source", "eval.ref", "eval.weights",
)  # fmt: skip


def in_all(holds: bool) -> bool:
    """Whether it holds in every process; all of them ask."""
    return holds if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(holds)).all())


@contextlib.contextmanager
def all_or_none(otherwise: str) -> Iterator[None]:
    """What one process cannot do, none does: a UserError in one is one in all, which would else wait for it.

    The block is each process's own affair: nothing in it may wait for another one.

    Args:
      otherwise: the sentence for the others.

    Raises:
      RestartNeeded: what all the errors are of may pass by itself, and none is of this process.
    """
    error = None
    try:
        yield
    except UserError as found:
        error = found
    # Two questions, asked by all: a scheduler does not start again what ends with a user's mistake.
    fine, may_be_soon = in_all(error is None), in_all(error is None or may_pass(error))
    if not fine:
        raise error or (RestartNeeded if may_be_soon else UserError)(otherwise)


def of_the_first(numbers: Sequence[int]) -> list[int]:
    """The numbers that process 0 gives, up to 2^31 - 1; all of them ask."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.zeros(count, np.int32)
    if jax.process_index() == 0:
        mine[:] = numbers
    return multihost_utils.broadcast_one_to_all(mine).tolist() if count else []


def other_for(folder: Path, *, make: bool = False) -> list[int]:
    """The processes for which a folder is another one than for process 0, which cannot write it if it is among them.

    All of them ask.  What is on gs:// is one for all.

    Args:
      folder: local or gs://.
      make: have process 0 make it.
    """
    if jax.process_count() == 1 or is_remote(folder):
        return []
    # A name that nobody has looked for before: network file systems remember what was not there.
    mark = folder / f".seen_by_all_{secrets.randbelow(2**31)}"
    first = jax.process_index() == 0
    if first:
        with contextlib.suppress(OSError):
            if make:
                folder.mkdir(parents=True, exist_ok=True)
            write_text(mark, "")
    number = multihost_utils.broadcast_one_to_all(np.int32(mark.name.rpartition("_")[2]))
    seen = multihost_utils.process_allgather(np.array(mark.with_name(f".seen_by_all_{number}").exists()))
    if first:
        mark.unlink(missing_ok=True)
    return np.flatnonzero(~seen).tolist()


def check_shared(folder: Path) -> None:
    """Raise a UserError, in all processes alike, unless all of them see one folder: each would have a part of the files."""
    others = other_for(folder)
    if others[:1] == [0]:
        raise UserError(
            f"{folder} cannot be written by process 0: see to it that there is room, and the right to write."
        )
    if others:
        raise UserError(
            f"{folder} is another folder for process {others[0]} than for process 0: give one that all of them see, on "
            "a shared file system."
        )


def check_config(config: dict[str, Any]) -> None:
    """Refuse different configurations in different processes, of commands that were typed host by host, say."""
    text = json.dumps(config)
    ours, theirs = flatten(json.loads(text)), flatten(json.loads(bytes(of_the_first(list(text.encode())))))
    fields = [
        f"{name} ({theirs.get(name)} in process 0, {ours.get(name)} here)"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name) and name not in OWN_FIELDS
    ]
    if not in_all(not fields):
        where = f" in {'; '.join(fields)}" if fields else ", and the others say where"
        raise UserError(f"The processes differ in their configurations{where}: give all of them the same command.")


def check_data(source: Source) -> None:
    """Refuse different data in different processes, such as copies on their hosts: each would have an order of its own."""
    if jax.process_count() == 1:
        return
    spec = dataclasses.replace(source.spec, name="", class_names=None)
    some = source.read(np.linspace(0, len(source) - 1, 16).astype(np.int64))
    digest = hashlib.sha256(repr(spec).encode() + some["image"].tobytes() + some["label"].tobytes()).digest()
    ours = np.frombuffer(digest, np.uint8)
    if (multihost_utils.process_allgather(ours) != ours).any():
        raise UserError(f"The processes have different data ({source.spec} in this one): give all of them the same.")
