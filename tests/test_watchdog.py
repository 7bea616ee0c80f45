"""What is said of a run that stands still, by a clock of the test's own."""

import time

import pytest
from conftest import Clock

from fdm_jax.progress import Progress
from fdm_jax.training import watchdog


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog, "PATIENCE", 0.6)  # it looks every 0.03 true seconds
    return clock


def test_what_it_waits_for_is_said_less_and_less_often(clock):
    said = []

    def at(seconds, *lines):
        clock.now = seconds
        if len(lines) == len(said):
            time.sleep(0.3)
        deadline = time.monotonic() + 60
        while len(said) < len(lines) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert tuple(said) == lines

    with watchdog.Watchdog(said.append, "Process 3: ") as dog:
        dog.at("data")
        at(0.59)
        first = "Process 3: Nothing has moved for 0.0103 minutes: waiting for data."
        at(0.62, first)
        at(1.23, first)
        second = "Process 3: Nothing has moved for 0.021 minutes: waiting for data."
        at(1.26, first, second)
        dog.at("the devices")  # since 1.26
        at(1.85, first, second)
        at(1.92, first, second, "Process 3: Nothing has moved for 0.011 minutes: waiting for the devices.")
    clock.now = 100.0
    time.sleep(0.3)
    assert len(said) == 3


@pytest.mark.parametrize("index, count, prefix", [(0, 1, ""), (0, 4, "Process 0: "), (3, 4, "Process 3: ")])
def test_each_process_speaks_of_itself_though_one_alone_shows_progress(
    monkeypatch, capsys, clock, index, count, prefix
):
    monkeypatch.setattr("jax.process_index", lambda: index)
    monkeypatch.setattr("jax.process_count", lambda: count)
    with watchdog.of_process(Progress(8, 0, quiet=index > 0)) as dog:
        dog.at("the other processes")
        clock.now, deadline, said = 0.6, time.monotonic() + 60, ""
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
            said = capsys.readouterr().err
    assert said == f"{prefix}Nothing has moved for 0.01 minutes: waiting for the other processes.\n"
