"""Starting a run of several processes. One process needs none of this."""

import os
from collections.abc import Mapping

from jaxlm.base.errors import UserError


def distributed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the surroundings say that this is one of several processes; imports no jax."""
    if int(environment.get("JAX_NUM_PROCESSES", "1")) > 1:
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, before any device is used; nothing to do for a single one.

    On Cloud TPU the addresses come from the machine; elsewhere from JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if not distributed(environment):
        return
    import jax

    if "JAX_NUM_PROCESSES" not in environment:
        jax.distributed.initialize()
        return
    missing = [name for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID") if name not in environment]
    if missing:
        raise UserError(f"JAX_NUM_PROCESSES is set, but {' and '.join(missing)} is not; all three belong together")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        environment["JAX_COORDINATOR_ADDRESS"],
        int(environment["JAX_NUM_PROCESSES"]),
        int(environment["JAX_PROCESS_ID"]),
    )
