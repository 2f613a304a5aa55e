import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest

from jaxlm.train.metrics_writer import MetricsWriter


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, steps, start_step=0):
    with MetricsWriter(str(workdir), start_step, tensorboard=False) as writer:
        for step in steps:
            writer.write(step, 100 * step, {"train/loss": step / 8})


def test_a_line_is_an_object_with_step_time_tokens_and_values(tmp_path):
    write(tmp_path, [10])
    (line,) = lines(tmp_path)
    assert list(line) == ["step", "time", "tokens", "train/loss"]
    assert (line["step"], line["tokens"], line["train/loss"]) == (10, 1000, 1.25)


def test_resuming_cuts_what_lies_past_the_step_and_half_a_line(tmp_path):
    write(tmp_path, [10, 20, 30])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "train/lo')
    write(tmp_path, [21], start_step=20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 21]


def test_lines_that_are_not_json_or_have_no_step_are_cut(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\0\0\0\0\n[1]\n{"tokens": 3}\n{"step": 2}\n')
    write(tmp_path, [], start_step=5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_what_is_not_finite_is_null_and_named(tmp_path):
    with MetricsWriter(str(tmp_path), 0, tensorboard=False) as writer:
        writer.write(1, 2, {"train/loss": float("nan"), "train/accuracy": 0.5, "train/gradient_norm": float("inf")})
    (line,) = lines(tmp_path)
    assert (line["train/loss"], line["train/accuracy"], line["train/gradient_norm"]) == (None, 0.5, None)
    assert line["nonfinite"] == ["train/loss", "train/gradient_norm"]


def test_unknown_names_are_refused_with_their_neighbors(tmp_path):
    with MetricsWriter(str(tmp_path), 0, tensorboard=False) as writer, pytest.raises(ValueError, match="'train/loss'"):
        writer.write(1, 2, {"train/los": 1.0})


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    write(tmp_path, [1, 2])
    assert os.listdir(tmp_path) == []


def test_tensorboard_holds_the_values_and_forgets_the_steps_past_the_restored_one(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3,))):
        with MetricsWriter(str(tmp_path), start) as writer:
            for step in steps:
                writer.write(step, step, {"train/loss": float(step)})
    events = [event for name in sorted(os.listdir(tmp_path / "tensorboard")) for event in read_events(tmp_path, name)]
    assert [(e.step, e.summary.value[0].simple_value) for e in events if e.summary.value] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (3, 3),
    ]
    # A reader of the log drops what is at or past a restart's step.
    assert [e.step for e in events if e.session_log.status == e.session_log.START] == [1, 3]


def test_a_full_disk_is_warned_about_and_leaves_whole_lines(tmp_path, caplog):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with MetricsWriter(str(tmp_path), 0) as writer:
            writer.write(1, 1, {"train/loss": 1.0})
            size = (tmp_path / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
            for step in range(2, 22):
                writer.write(step, step, {"train/loss": 1.0})
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            writer.write(22, 22, {"train/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [line["step"] for line in lines(tmp_path)] == [1, 22]
    assert "the metrics of step 2 could not be written" in caplog.text


def read_events(workdir, name):
    from tensorboardX.proto import event_pb2

    content = (workdir / "tensorboard" / name).read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_a_kill_leaves_whole_lines(tmp_path):
    program = """
        import sys
        from jaxlm.train.metrics_writer import MetricsWriter
        writer = MetricsWriter(sys.argv[1], 0, tensorboard=False)
        for step in range(10**9):
            writer.write(step, step, {"train/loss": 1.0, "train/accuracy": 0.5})
            if step == 2000:
                print("ready", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(len(found)))
    assert len(found) > 2000
