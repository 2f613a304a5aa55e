"""A cloud's notice ends a run as a signal does: saved, exit code 75. The metadata server here is one of our own."""

import http.server
import re
import signal
import threading
import time

import pytest

from jaxlm import maintenance
from jaxlm.__main__ import run
from jaxlm.base.errors import Interrupted
from jaxlm.data.config import MixtureSource
from jaxlm.maintenance import notices
from jaxlm.model.config import ModelConfig
from jaxlm.stages.config import PretrainConfig
from jaxlm.train.config import LoopConfig, ScheduleConfig


@pytest.fixture
def values(monkeypatch):
    """path → value, served as Google's metadata server serves them: to those who name its header."""
    held = {"instance/maintenance-event": "NONE", "instance/preempted": "FALSE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = held.get(self.path.removeprefix("/computeMetadata/v1/"))
            self.send_response(404 if value is None else 200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(maintenance, "POLL_SECONDS", 0.05)
    yield held
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def signals(monkeypatch):
    """What the process would have been sent."""
    sent = []
    monkeypatch.setattr(maintenance.os, "kill", lambda process, number: sent.append(number))
    return sent


def seen(signals: list, within: float) -> list:
    end = time.monotonic() + within
    while not signals and time.monotonic() < end:
        time.sleep(0.01)
    return signals


@pytest.mark.parametrize(
    ("path", "value"),
    [("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("instance/preempted", "TRUE")],
)
def test_a_notice_is_a_signal_and_quiet_is_none(values, signals, path, value):
    with notices():
        assert not seen(signals, 0.3)
        values[path] = value
        assert seen(signals, 5) == [signal.SIGTERM]


def test_a_notice_that_stands_already_does_not_end_every_start(values, signals):
    values["instance/maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    with notices():
        assert not seen(signals, 0.3)
        values["instance/preempted"] = "TRUE"
        assert seen(signals, 5) == [signal.SIGTERM]


def test_a_server_that_lacks_a_key_or_is_gone_sends_nothing(values, signals, monkeypatch):
    values.clear()
    with notices():
        assert not seen(signals, 0.3)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    with notices():
        assert not seen(signals, 0.3)


def test_nobody_is_asked_on_a_machine_of_another_kind(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    before = threading.active_count()
    with notices():
        assert threading.active_count() == before


def test_a_run_saves_and_says_how_long_it_took(values, packed_rows, tmp_path):
    config = PretrainConfig(
        workdir=str(tmp_path / "run"),
        data=(MixtureSource(path=packed_rows),),
        model=ModelConfig(vocab_size=288, layers=1, width=16, heads=2, compute="float32"),
        batch_rows=8,
        steps=10**6,
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=2),
        loop=LoopConfig(evaluate_every_steps=10**6),
    )
    metrics = tmp_path / "run/metrics.jsonl"

    def announce():
        while not metrics.exists() or not metrics.read_text():
            time.sleep(0.02)
        values["instance/maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"

    announcing = threading.Thread(target=announce)
    announcing.start()
    said = r"saved at step (\d+) of 1000000, \d\.\d s after it was asked to stop"
    with pytest.raises(Interrupted, match=said) as ended:
        run("pretrain", config)
    announcing.join()
    assert ended.value.exit_code == 75
    step = re.search(said, str(ended.value))[1]
    assert (tmp_path / "run/checkpoints" / step / "manifest.json").exists()
