"""How fast the devices could be, and what share of that a run reaches."""

import functools
import math
import time

import jax
import jax.numpy as jnp

from jaxlm.base.precision import Compute, dtype

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
