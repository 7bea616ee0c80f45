"""What is found out of the errors of file systems and of Google Cloud Storage, and of the libraries that use them."""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from fdm_jax.errors import memory_full, with_causes


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that a disk, or the user's quota of it, is full."""
    return any(
        (isinstance(each, OSError) and each.errno == number) or os.strerror(number) in str(each)  # C++ says it in words
        for each in with_causes(error)
        for number in (errno.ENOSPC, errno.EDQUOT)
    )


class Trouble(NamedTuple):
    """Why a file is not to be had.

    Attributes:
      sentence: with the remedy, and without its full stop.
      may_pass: by itself, as a file server's troubles do.
      damage: it may be the file's own, which stays.
    """

    sentence: str
    may_pass: bool = False
    damage: bool = False


_RIGHTS, _OPEN = "give the right to it, or another place", "let more files be open (`ulimit -n`)"
_AWAY = "move away what is there, or give another place"
_REMEDIES = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EMFILE: _OPEN,
    errno.ENFILE: _OPEN,
    errno.EFBIG: "let files be larger (`ulimit -f`), or take another disk",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EEXIST: _AWAY,
    errno.EISDIR: _AWAY,
    errno.ENOTDIR: _AWAY,
    errno.ELOOP: "its links lead in a circle, mend them or give another place",
}
_DAMAGE = (errno.EIO, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)


def file_trouble(error: BaseException | None) -> Trouble | None:
    """What it is if an error, or one behind it, is that the system does not give a file, or the storage or network fails."""
    for each in with_causes(error):
        if said := _bucket_fails(each):
            return Trouble(
                f"Google Cloud Storage cannot be reached ({said}): wait until it can be again", may_pass=True
            )
        name, number = None, None
        if isinstance(each, OSError):
            name, number = each.filename2 or each.filename, each.errno  # of a rename, where to
        # TensorStore's and array_record's, which have no numbers.
        elif found := re.search(r'local file "([^"]+)"', str(each)) or re.search(
            r"\(\) failed: .*?; \w+ ([^;]+)", str(each)
        ):
            name, number = found[1], next((n for n in (*_REMEDIES, *_PASSING) if os.strerror(n) in str(each)), None)
        if number in _REMEDIES or number in _PASSING:
            remedy = _REMEDIES.get(number, "wait until its disk, or the network to it, works again")
            sentence = f"{name or 'A file'} cannot be used ({os.strerror(number)}): {remedy}"
            return Trouble(sentence, number in _PASSING, number in _DAMAGE)
    return None


def may_pass(error: BaseException | None) -> bool:
    """Whether what led to an error may pass by itself, so that it is worth while to try again."""
    trouble = file_trouble(error)
    return trouble is not None and trouble.may_pass


def system_fails(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is the system's (memory, rights, a file server), so that the file may be sound."""
    trouble = file_trouble(error)
    return memory_full(error) is not None or disk_full(error) or (trouble is not None and not trouble.damage)


def _bucket_fails(error: BaseException) -> str | None:
    """What was said of it, if an error of one of the three clients is that the network or the service fails."""
    kind, text = type(error), " ".join(str(error).split())[:200]
    if tensorstore := re.search(r"gs://\S+: All \d+ retry attempts failed: ([^\[]+)", str(error)):
        return tensorstore[1].strip()
    library, code = kind.__module__.partition(".")[0], getattr(error, "code", None)
    if library in ("aiohttp", "requests") or kind.__name__ in ("FSTimeoutError", "RetryError", "TransportError"):
        return text or kind.__name__  # the names are fsspec's and Google's
    if library in ("gcsfs", "google") and isinstance(code, int) and (code == 429 or code >= 500):
        return text or str(code)
    return None


def refusal(error: BaseException | None) -> str | None:
    """A sentence if an error, or one behind it, is that Google Cloud Storage lets nobody in or finds nothing."""
    for each in with_causes(error):
        kind, text = type(each), " ".join(str(each).split())[:300]
        if (kind.__module__.startswith("google.auth.") and not _bucket_fails(each)) or (
            kind.__name__ == "HttpError" and getattr(each, "code", 0) == 401
        ):
            return (
                f"Google Cloud Storage does not know who asks ({text}): do `gcloud auth application-default login`, or "
                "give the machine a service account."
            )
        if (
            (kind is OSError and text.startswith("Forbidden"))
            or "PERMISSION_DENIED" in text
            or kind.__name__ == "Forbidden"
        ):
            return f"Google Cloud Storage does not allow it ({text}): ask the owner of the bucket for the right."
    return None
