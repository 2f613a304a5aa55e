"""What has to be said to jax before any device is used: simulated devices, several processes."""

import ctypes
import glob
import importlib.util
import os
import pathlib
import platform
import sys
import zlib

from jaxlm.base.errors import UserError

SEQUENTIAL = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8

OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def several() -> bool:
    """Whether the environment says that this is one of several processes; imports no jax.

    Raises UserError when only some of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set: each
    process would take itself for the only one, and all would write into one folder.
    """
    missing = [name for name in OWN if not os.environ.get(name)]
    if 0 < len(missing) < len(OWN):
        given = " and ".join(name for name in OWN if name not in missing)
        raise UserError(f"{given}: set without {' and '.join(missing)}; all three belong together")
    if not missing:
        for name in OWN[1:]:
            if not os.environ[name].isdecimal():
                raise UserError(f"{name}: got {os.environ[name]!r}; a whole number is needed")
        return int(os.environ["JAX_NUM_PROCESSES"]) > 1
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def distributed() -> bool:
    """Whether there are, or may be, other processes: a TPU VM's metadata server knows its workers, if there are any."""
    if several():
        return True
    if os.environ.get("JAX_PLATFORMS", "tpu") != "tpu" or os.environ.get("TPU_SKIP_MDS_QUERY"):
        return False
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def keep_compiled() -> None:
    """Programs that took a second or more to compile are kept for the next start: in JAX_COMPILATION_CACHE_DIR, else in
    the user's cache folder, apart for each kind of CPU: a program of another one may not run here."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(root / "jaxlm" / "compiled" / _cpu()))


def _cpu() -> str:
    """A name for the CPU's instruction set."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"


def keep_memory() -> None:
    """Has the C library keep what it was given, so that a step finds the memory of the step before.

    XLA's CPU path asks anew for the temporaries of every step, which glibc maps, and unmaps after it: a quarter of a
    step's time goes into zeroed pages (16.9 M parameters, 16 rows of 256: 290,000 page faults and 1.17 s a step; none
    and 0.94 s with this). The price is memory, at most twice as much. For processes whose only device is the CPU, and
    before jax makes threads, each with a heap of its own. Who sets GLIBC_TUNABLES decides by himself.
    """
    accelerators = [path for kind in ("accel", "vfio/", "nvidia") for path in glob.glob(f"/dev/{kind}[0-9]*")]
    cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not accelerators
    if "jax" in sys.modules or "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc" or not cpu:
        return
    libc = ctypes.CDLL(None)
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)):
        libc.mallopt(option, value)


def start(deterministic: bool = False) -> None:
    """Makes the devices ready for use: simulated ones, compiled programs of before, the other processes.

    `deterministic`: programs for a GPU take no order of sums that differs from run to run. Raises UserError where jax
    finds no device of the kind that is asked for.
    """
    keep_memory()
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    import jax

    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Simulated devices wait for one another in threads. XLA's CPU client may start independent collectives in
        # another order on each device, and steps that are dispatched ahead take its threads: either is a deadlock,
        # which it ends after 40 seconds (seen in every second run of 120 steps on 4 devices and 2 cores). Nested loops
        # need more threads than there are cores, all of them waiting.
        os.environ.setdefault("PJRT_NPROC", "64")
        if SEQUENTIAL not in os.environ["XLA_FLAGS"]:
            os.environ["XLA_FLAGS"] += f" {SEQUENTIAL}"
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    keep_compiled()
    join()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter of a platform that no installed plugin knows
        wanted = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: " if os.environ.get("JAX_PLATFORMS") else ""
        problem = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise UserError(f"{wanted}jax finds no device{problem}; unset it, or install jaxlm[cuda] or [tpu]") from None
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # gloo joins collectives as they come, and a program that XLA's CPU path reads back from the cache no longer
        # keeps its own in order (jaxlib 0.10.2: "Received data size doesn't match expected size" at a second start).
        jax.config.update("jax_enable_compilation_cache", False)


def join() -> None:
    """Joins the other processes, if there are any.

    On Cloud TPU the addresses come from the machine; elsewhere from JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    import jax

    if not distributed():
        return
    if "JAX_NUM_PROCESSES" not in os.environ:
        jax.distributed.initialize()
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    )
