"""Rows of the steps' metrics, and the speed that they say, by a clock of the test's own."""

import numpy as np
import pytest
from conftest import Clock

from fdm_jax.training import metering
from fdm_jax.training.metering import Meter


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metering, "time", clock)
    return clock


def metrics(loss, bad=0.0, bad_steps=0.0, rate=1.0):
    return {"loss": loss, "bad_gradients": bad, "bad_steps": bad_steps, "learning_rate": rate}


def test_a_row_of_single_steps_and_of_several_at_once(clock):
    seen = []
    meter = Meter(10, lambda given: given, seen.append)
    meter.sent(metrics(3.0, bad=2.0))
    clock.now = 100.0  # to compile takes long, and is not training
    meter.compiled()
    meter.sent({key: np.array([value, value]) for key, value in metrics(6.0, bad=1.0, rate=0.5).items()})
    clock.now = 104.0
    with meter.paused():
        clock.now = 150.0
    clock.now = 151.0
    # Twenty images in 4 + 1 seconds.
    assert meter.row() == {"loss": 5.0, "bad_gradients": 4.0, "bad_steps": 0.0, "learning_rate": 0.5, "img_per_s": 4.0}
    assert len(seen) == 3 and not meter.unreported
    meter.sent(metrics(1.0))
    assert meter.unreported
    clock.now = 153.0
    assert meter.row()["img_per_s"] == 5.0


def test_the_compiled_step_alone_says_nothing_of_the_speed(clock):
    meter = Meter(10, lambda given: given, lambda step: None)
    meter.sent(metrics(3.0))
    meter.compiled()
    clock.now = 1.0
    assert "img_per_s" not in meter.row()


def test_what_the_devices_still_do_before_a_pause_is_training(clock):
    """A checkpoint is saved when the steps are through, which were sent to the devices long before."""

    def through(given):
        clock.now = max(clock.now, done)
        return given

    meter, done = Meter(10, through, lambda step: None), 0.0
    meter.sent(metrics(3.0))
    meter.compiled()
    meter.sent(metrics(3.0))
    done = 2.0
    with meter.paused():
        clock.now += 50.0
    assert meter.row()["img_per_s"] == 5.0


def test_no_more_programs_are_under_way_than_asked_for():
    fetched = []
    meter = Meter(1, lambda given: fetched.append(given) or given, lambda step: None)
    for i in range(5):
        meter.sent(metrics(float(i)))
        meter.wait(2)
        assert len(fetched) == max(i - 1, 0)
    assert meter.row()["loss"] == 2.0 and len(fetched) == 5


def test_every_step_of_a_program_is_checked():
    """A run of bad steps may begin and end within one program."""

    def check(step):
        if step["bad_steps"] >= 3:
            raise ArithmeticError

    meter = Meter(1, lambda given: given, check)
    meter.sent({"loss": np.ones(4), "bad_steps": np.array([1.0, 2.0, 3.0, 0.0])})
    with pytest.raises(ArithmeticError):
        meter.wait()
