import math
import time
from types import SimpleNamespace

import jax
import pytest

from jaxlm.train import throughput


def run_on(monkeypatch, kind: str, platform: str = "tpu", processes: int = 1):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind, platform=platform)])
    monkeypatch.setattr(jax, "process_count", lambda: processes)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
    ],
)
def test_chips_are_found_by_the_name_that_jax_gives_them(monkeypatch, kind, teraflops):
    run_on(monkeypatch, kind)
    assert throughput.peak_flops_per_second(4, "bfloat16") == pytest.approx(4 * teraflops * 1e12)


def test_no_name_hides_a_longer_one():
    names = list(throughput.PEAK_FLOPS_PER_SECOND)
    hidden = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if b.startswith(a)]
    assert hidden == []


def test_an_unknown_chip_has_no_utilization(monkeypatch):
    run_on(monkeypatch, "TPU v99")
    assert math.isnan(throughput.peak_flops_per_second(4, "bfloat16"))


def test_the_cpu_is_measured_once_and_simulated_devices_do_not_add_up():
    one = throughput.peak_flops_per_second(1, "float32")
    start = time.perf_counter()
    assert throughput.peak_flops_per_second(8, "float32") == one
    assert time.perf_counter() - start < 0.1
    assert 1e9 < one < 1e14


def test_processes_on_cpu_add_up(monkeypatch):
    one = throughput.measured_flops_per_second("float32")
    run_on(monkeypatch, "cpu", "cpu", processes=2)
    assert throughput.peak_flops_per_second(4, "float32") == 2 * one
