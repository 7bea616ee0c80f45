"""Signals, and notices that a machine is about to be stopped, from a made-up metadata server."""

import http.server
import os
import signal
import threading
import time

import numpy as np
import pytest
from jax.experimental import multihost_utils

from fdm_jax.training import stopping
from fdm_jax.training.checkpoints import Checkpoints


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers as Google's does, with what ``events`` says now."""

    events: dict[str, str] = {}

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        key = self.path.removeprefix("/computeMetadata/v1/instance/")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.events[key].encode())

    def log_message(self, *args):
        """Tests are quiet."""


@pytest.fixture
def metadata(monkeypatch):
    server = http.server.ThreadingHTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    monkeypatch.setattr(stopping, "_SECONDS_BETWEEN_TRIES", 0.02)
    Metadata.events = {"maintenance-event": "NONE", "preempted": "FALSE"}
    yield Metadata.events
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("key, event", [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")])
def test_a_notice_stops_the_run(metadata, key, event):
    with stopping.stop_requests() as stop:
        time.sleep(0.1)
        assert not stop.after(1) and not stop.now()
        metadata[key] = event
        deadline = time.monotonic() + 10
        while not stop.after(2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert stop.now() and stop.reason == "SIGTERM" and not stop.preempted
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_run(signum, handled_by):
    handled_by(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests have it ignored
    before = signal.getsignal(signum)
    with stopping.stop_requests() as stop:
        assert not stop.after(1)
        signal.raise_signal(signum)
        assert stop.after(1) and stop.now() and stop.reason == signum.name
        if signum == signal.SIGHUP:
            signal.raise_signal(signum)  # a terminal that closes tells it by its shell, and itself
        else:
            assert signal.getsignal(signum) == before  # a second one does not wait
        signal.raise_signal(signal.SIGHUP)  # the terminal of a run that was stopped is closed while it saves
    assert signal.getsignal(signum) == before


def test_nohup_outlives_the_terminal(handled_by):
    handled_by(signal.SIGHUP, signal.SIG_IGN)
    with stopping.stop_requests() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.after(1)


def test_no_server_is_no_harm(monkeypatch, caplog):
    monkeypatch.setenv("GCE_METADATA_HOST", "localhost:1")
    monkeypatch.setattr(stopping, "_SECONDS_BETWEEN_TRIES", 0.01)
    with stopping.stop_requests() as stop:
        time.sleep(0.3)
        assert not stop.after(1)
    assert "will come as SIGTERM" in caplog.text


def test_the_second_signal_acts_as_usual(handled_by):
    handled_by(signal.SIGINT, signal.default_int_handler)
    with stopping.stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.after(1) and stop.signals == ["SIGINT"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_only_the_loop_asks_whether_to_stop(tmp_path, monkeypatch):
    """Orbax would ask JAX's service with numbers of its own, after which no process comes to where all should stop."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_latest=1)
    checkpoints.save_model(7, {"params": {"kernel": np.ones(2, np.float32)}}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [7] and asked == []
    checkpoints.close()
