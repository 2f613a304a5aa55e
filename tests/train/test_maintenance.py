"""A cloud's notice ends a run as a signal does: saved, exit code 75. The metadata server here is one of our own."""

import contextlib
import http.server
import threading
import time

import pytest

from jaxlm.base.errors import Interrupted
from jaxlm.data.config import MixtureSource
from jaxlm.model.config import ModelConfig
from jaxlm.stages import pretrain
from jaxlm.stages.config import PretrainConfig
from jaxlm.train import maintenance
from jaxlm.train.config import LoopConfig, ScheduleConfig
from jaxlm.train.maintenance import notices
from jaxlm.train.signals import Stop


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


def requested(stop: Stop, within: float) -> bool:
    end = time.monotonic() + within
    while not stop.requested and time.monotonic() < end:
        time.sleep(0.01)
    return stop.requested


@pytest.mark.parametrize(
    ("path", "value"),
    [("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("instance/preempted", "TRUE")],
)
def test_a_notice_requests_a_stop_and_quiet_does_not(values, path, value):
    stop = Stop()
    with notices(stop):
        assert not requested(stop, 0.3)
        values[path] = value
        assert requested(stop, 5)
        assert stop.signal == value


def test_a_server_that_lacks_a_key_or_is_gone_requests_nothing(values, monkeypatch):
    stop = Stop()
    values.clear()
    with notices(stop):
        assert not requested(stop, 0.3)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    with notices(stop):
        assert not requested(stop, 0.3)


def test_nobody_is_asked_on_a_machine_of_another_kind(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    before = threading.active_count()
    with notices(Stop()):
        assert threading.active_count() == before


def test_a_run_saves_and_says_how_long_it_took(values, packed_rows, tmp_path, monkeypatch):
    config = PretrainConfig(
        workdir=str(tmp_path / "run"),
        data=(MixtureSource(path=packed_rows),),
        model=ModelConfig(vocab_size=288, layers=1, width=16, heads=2, compute="float32"),
        batch_rows=8,
        steps=10**6,
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=2),
        loop=LoopConfig(evaluate_every_steps=10**6),
    )
    timer = threading.Timer(2.0, values.update, [{"instance/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}])
    timer.start()
    with contextlib.ExitStack() as stack:
        stack.callback(timer.join)
        with pytest.raises(
            Interrupted, match=r"saved at step \d+ of 1000000, \d\.\d s after it was asked to stop"
        ) as ended:
            pretrain.main(config)
    assert ended.value.exit_code == 75
    step = str(ended.value).split("step ")[1].split()[0]
    assert (tmp_path / "run/checkpoints" / step / "manifest.json").exists()
