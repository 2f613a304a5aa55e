"""What has to be said to jax before any device is used: simulated devices, several processes."""

import os

from jaxlm.base.errors import UserError

SEQUENTIAL = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def distributed() -> bool:
    """Whether the surroundings say that this is one of several processes; imports no jax."""
    environment = os.environ
    if int(environment.get("JAX_NUM_PROCESSES", "1")) > 1:
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment


def start() -> None:
    """Joins the other processes, if there are any.

    On Cloud TPU the addresses come from the machine; elsewhere from JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Raises UserError when only some of these are set.
    """
    import jax

    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Simulated devices wait for one another in threads. XLA's CPU client may start independent collectives in
        # another order on each device, and steps that are dispatched ahead take its threads: either is a deadlock,
        # which it ends after 40 seconds (seen in every second run of 120 steps on 4 devices and 2 cores).
        if SEQUENTIAL not in os.environ["XLA_FLAGS"]:
            os.environ["XLA_FLAGS"] += f" {SEQUENTIAL}"
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not distributed():
        return
    if "JAX_NUM_PROCESSES" not in os.environ:
        jax.distributed.initialize()
        return
    missing = [name for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID") if name not in os.environ]
    if missing:
        raise UserError(f"JAX_NUM_PROCESSES is set, but {' and '.join(missing)} is not; all three belong together")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    )
