"""One training process per workdir, in a bucket too: live holders are respected, dead ones are not."""

import errno
import json
import subprocess
import sys
import threading

import pytest
import tiny

from fdm_jax.errors import UserError
from fdm_jax.training import locking
from fdm_jax.whole_files import place

BEAT, STALE = 0.2, 1.5


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(locking, "BEAT", BEAT)
    monkeypatch.setattr(locking, "STALE", STALE)


def holder(store, name):
    return json.loads(store.text("bucket", f"{name}/.lock"))


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locking.fcntl, "flock", flock)
    with locking.locked(tmp_path / "run"):
        said = capsys.readouterr().err
    assert "cannot be locked (Function not implemented): see to it that nothing else works there." in said


def test_a_file_of_others_with_the_name_of_the_lock_keeps_what_it_holds(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with locking.locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"


def test_lock_is_held_and_given_back(store):
    workdir = place("gs://bucket/held")
    with locking.locked(workdir):
        first = holder(store, "held")
        with pytest.raises(
            UserError, match=f"Process {first['pid']} on {first['host']} is at work in gs://bucket/held"
        ):
            with locking.locked(workdir):
                raise AssertionError("two hold it")
        assert holder(store, "held")["time"] > first["time"]  # it beats
        with locking.locked(workdir, hold=False):  # another process of the same run
            assert holder(store, "held")["token"] == first["token"]
    assert store.names("bucket", "held/") == []


def test_dead_holder_is_succeeded(store, capsys):
    store.put("bucket", "dead/.lock", b'{"host": "gone", "pid": 7, "token": "x"}')
    with locking.locked(place("gs://bucket/dead")):
        assert holder(store, "dead")["token"] != "x"
    assert "Process 7 on gone holds gs://bucket/dead; waiting" in capsys.readouterr().err
    assert store.names("bucket", "dead/") == []


def test_of_two_successors_one_wins(store):
    store.put("bucket", "both/.lock", b"not json")
    outcomes, done = [], threading.Event()

    def succeed():
        try:
            with locking.locked(place("gs://bucket/both")):
                outcomes.append("won")
                done.wait(10)
        except UserError:
            outcomes.append("lost")
            done.set()

    threads = [threading.Thread(target=succeed) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["lost", "won"]


@pytest.mark.parametrize("heard", [True, False])
def test_holder_that_was_overtaken_ends(store, heard):
    """Even where nobody takes what it says."""
    name = f"lost-{heard}"
    program = (
        "import sys, time; from fdm_jax.training import locking; from fdm_jax.whole_files import place\n"
        f"locking.BEAT = {BEAT}\n"
        f"with locking.locked(place('gs://bucket/{name}')):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tiny.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "held\n"
    if not heard:
        process.stderr.close()
        process.stderr = None
    store.put("bucket", f"{name}/.lock", b'{"host": "other", "pid": 7, "token": "x"}')
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert not heard or "Another process took over gs://bucket/lost-True" in said
    assert holder(store, name)["token"] == "x"
