import subprocess
import sys
import textwrap
import time

import pytest

from jaxlm.base.errors import ConfigError
from jaxlm.train import watchdog
from jaxlm.train.config import WatchdogConfig
from jaxlm.train.watchdog import Watchdog


def run(program: str, log: str) -> subprocess.CompletedProcess[str]:
    start = """
        import sys, threading, time
        from jaxlm.train import watchdog
        from jaxlm.train.config import WatchdogConfig
        watchdog.POLL_SECONDS = 0.05
    """
    command = [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(program), log]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_hang_ends_with_76_and_all_stacks_on_stderr_and_in_the_log(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    program = """
        def waiting_for_a_peer(): threading.Event().wait()
        threading.Thread(target=waiting_for_a_peer, daemon=True).start()
        def stuck_step(): time.sleep(60)
        with watchdog.Watchdog(WatchdogConfig(step_seconds=0.3), sys.argv[1]) as watch:
            watch.enter("step")
            stuck_step()
    """
    ended = run(program, str(log))
    assert ended.returncode == 76
    for text in (ended.stderr, log.read_text()):
        assert "watchdog: 'step' took more than 0.3 seconds" in text
        assert "in stuck_step" in text
        assert "in waiting_for_a_peer" in text
    assert log.read_text().startswith("before\n")


def test_a_hang_in_a_phase_and_one_after_it_are_told_apart(tmp_path):
    program = """
        with watchdog.Watchdog(WatchdogConfig(step_seconds=0.3, save_seconds=0)) as watch:
            watch.enter("step")
            watch.enter("save")
            time.sleep(0.8)    # No limit.
            watch.enter("step")
            print("saved", flush=True)
            time.sleep(60)
    """
    ended = run(program, "")
    assert ended.returncode == 76
    assert ended.stdout == "saved\n"
    assert "watchdog: 'step' took" in ended.stderr


def test_a_run_that_gets_on_is_left_alone(monkeypatch):
    monkeypatch.setattr(watchdog, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(Watchdog, "_end", lambda *_: pytest.fail("a hang was seen where there is none"))
    with Watchdog(WatchdogConfig(start_seconds=1.0, step_seconds=1.0)) as watch:
        for _ in range(30):
            watch.enter("step")
            time.sleep(0.05)
    assert not watch._thread.is_alive()


def test_entering_a_step_is_cheap():
    watch = Watchdog(WatchdogConfig())
    start = time.perf_counter()
    for _ in range(10_000):
        watch.enter("step")
    assert time.perf_counter() - start < 0.5  # 50 microseconds each, 100 times what it takes.


def test_negative_limits_are_refused():
    with pytest.raises(ConfigError, match="step_seconds: got -1"):
        WatchdogConfig(step_seconds=-1.0)
