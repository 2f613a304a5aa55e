"""How fast the devices could be, and what share of that a run reaches."""

import functools
import math
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxlm.base.precision import Compute, dtype
from jaxlm.train import hosts
from jaxlm.train.goodput import Ledger

T = TypeVar("T")

# Dense bf16 FLOP/s of one jax device, by the start of its `device_kind`; longer names stand before shorter ones.
# TPUs: cloud.google.com/tpu/docs, page of each generation, "peak compute per chip (bf16)". GPUs: NVIDIA's data sheets,
# which give the rate with 2:4 sparsity, twice the one here, except for the A100.
PEAK_FLOPS_PER_SECOND = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e, Trillium
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # Ironwood; a chip is two jax devices.
    "NVIDIA A100": 312e12,  # A100 data sheet, PCIe and SXM alike
    "NVIDIA H100 PCIe": 756e12,  # H100 data sheet: 1,513 sparse
    "NVIDIA H100 NVL": 835e12,  # H100 NVL data sheet: 1,671 sparse
    "NVIDIA H100": 989e12,  # H100 data sheet, SXM: 1,979 sparse
    "NVIDIA H200 NVL": 835e12,  # H200 data sheet: 1,671 sparse
    "NVIDIA H200": 989e12,  # H200 data sheet, SXM: 1,979 sparse
    "NVIDIA B200": 2250e12,  # DGX B200 data sheet: 36 PFLOP/s sparse in 8 GPUs
}


def peak_flops_per_second(devices: int, compute: Compute) -> float:
    """FLOP/s of so many of this run's devices together; NaN for a chip that is not in the table.

    Accelerators count with their bf16 rate whatever `compute` is: by default they multiply float32 in bf16 or TF32.
    CPU devices are the cores of one machine, however many jax simulates: each process counts once, at a measured rate.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measured_flops_per_second(compute) * jax.process_count()
    rates = (rate for name, rate in PEAK_FLOPS_PER_SECOND.items() if device.device_kind.startswith(name))
    return next(rates, math.nan) * devices


@functools.cache
def measured_flops_per_second(compute: Compute, size: int = 1024) -> float:
    """The best rate of some square products on this process's first device; takes under a second, once a process."""
    x = jnp.ones((size, size), dtype(compute), device=jax.local_devices()[0])
    # With float32 sums and result, as `base/precision` multiplies.
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    product(x, x).block_until_ready()
    best, end = math.inf, time.perf_counter() + 0.3
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Clock:
    """Speed between two readings of metrics.

    A reading returns when its step has ended on the devices, so the time between two readings is the devices' own for
    the steps between them, though the loop never waited for the newest one. Evaluation and saving restart the clock.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float, ledger: Ledger):
        self.tokens_per_step, self.flops_per_token, self.peak = tokens_per_step, flops_per_token, peak
        self.ledger, self.low, self.note = ledger, False, ""
        self.blocked, self.compared_at, self.stepped = 0.0, 0, 0.0
        """of the time since hosts were compared: seconds for which the loop waited for the devices; the step and the
        seconds of steps then"""
        self.restart(0)

    def restart(self, step: int) -> None:
        self.began, self.waited, self.at = time.monotonic(), 0.0, step

    def wait_begins(self) -> None:
        self.wait_began = time.monotonic()

    def wait_ends(self) -> None:
        waited = time.monotonic() - self.wait_began
        self.waited += waited
        self.ledger.data_seconds += waited

    def waiting(self, read: Callable[[], T]) -> T:
        """`read()`, which waits for the devices."""
        began = time.monotonic()
        found = read()
        self.blocked += time.monotonic() - began
        return found

    def compare_hosts(self, step: int) -> None:
        """Names the processes that hold up the others; all call it together, where they wait for each other anyway."""
        steps, seconds = step - self.compared_at, self.ledger.watchdog.seconds()["step"] - self.stepped
        if steps > 0 and self.compared_at:
            hosts.name_slow(step, (seconds - self.blocked) / steps, seconds / steps)
        self.compared_at, self.stepped, self.blocked = step, self.stepped + seconds, 0.0

    def lap(self, step: int) -> dict[str, float]:
        """The timing metrics of the steps up to `step`, whose end has just been seen."""
        self.low = self.low or hosts.memory_is_low(step)
        steps, seconds, waited = step - self.at, time.monotonic() - self.began, self.waited
        self.restart(step)
        if steps <= 0:
            return self.ledger.values()
        rate = steps * self.tokens_per_step / seconds
        mfu = rate * self.flops_per_token / self.peak
        self.note = f"{rate:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if math.isfinite(mfu) else "")
        return {
            "train/tokens_per_second": rate,
            "train/step_seconds": seconds / steps,
            "train/data_wait": waited / seconds,
            "train/mfu": mfu,
            **self.ledger.values(),
        }
