"""What all_or_none makes of an error in one of several processes; threads stand for them, see also cli/test_distributed."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fdm_jax.errors import RestartNeeded, UserError
from fdm_jax.training import agreement

MISTAKE, OTHERWISE = UserError("The file a.png is no picture."), "Another process says why."
AWAY = UserError("The file a.png cannot be read.")
AWAY.__cause__ = OSError(errno.ESTALE, "Stale file handle", "a.png")


@pytest.mark.parametrize(
    "errors, kinds",
    [
        ((None, None), (None, None)),
        ((MISTAKE, None), (UserError, UserError)),
        ((None, AWAY), (RestartNeeded, UserError)),  # a scheduler starts them again
        ((AWAY, AWAY), (UserError, UserError)),
        ((None, AWAY, MISTAKE), (UserError, UserError, UserError)),
    ],
)
def test_an_error_in_one_is_one_in_all(monkeypatch, errors, kinds):
    barrier, said = threading.Barrier(len(errors), timeout=30), {}

    def in_all(holds):
        said[threading.get_ident()] = holds
        barrier.wait()
        together = all(said.values())
        barrier.wait()  # before anybody says what comes next
        return together

    def process(error):
        try:
            with agreement.all_or_none(OTHERWISE):
                if error is not None:
                    raise error
        except (UserError, RestartNeeded) as raised:
            return raised
        return None

    monkeypatch.setattr(agreement, "in_all", in_all)
    with ThreadPoolExecutor(len(errors)) as pool:
        raised = list(pool.map(process, errors))
    assert tuple(None if each is None else type(each) for each in raised) == kinds
    for own, each in zip(errors, raised, strict=True):
        assert each is own or (own is None and str(each) == OTHERWISE)
