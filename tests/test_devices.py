"""Which surroundings mean several processes."""

import dataclasses
import os
import platform
import subprocess
import sys

import pytest

from jaxlm import __main__, devices
from jaxlm.base.errors import UserError
from jaxlm.stages.config import PretrainConfig, RunConfig
from jaxlm.train.config import LoopConfig

OURS = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    for name in (*OURS, "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone(surroundings):
    assert not devices.distributed()
    for name, value in (OURS | {"JAX_NUM_PROCESSES": "1"}).items():
        surroundings.setenv(name, value)
    assert not devices.distributed()


def test_by_our_own_variables_or_those_of_a_slice(surroundings):
    for name, value in OURS.items():
        surroundings.setenv(name, value)
    assert devices.distributed()
    for name in OURS:
        surroundings.delenv(name)
    surroundings.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert devices.distributed()


@pytest.mark.parametrize("missing", OURS)
def test_one_variable_missing_is_refused_by_name(surroundings, missing):
    for name, value in OURS.items():
        if name != missing:
            surroundings.setenv(name, value)
    with pytest.raises(UserError, match=f"without {missing}; all three belong together"):
        devices.distributed()


def test_what_is_no_number_is_refused(surroundings):
    for name, value in (OURS | {"JAX_NUM_PROCESSES": "two"}).items():
        surroundings.setenv(name, value)
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES: got 'two'"):
        devices.distributed()


def test_a_tpu_vm_asks_its_metadata_server_unless_told_not_to(surroundings):
    surroundings.setenv("JAX_PLATFORMS", "tpu")
    surroundings.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    surroundings.setattr(devices.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    surroundings.setattr(devices.importlib.util, "find_spec", lambda name: object())
    assert devices.distributed()
    surroundings.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert not devices.distributed()


# Faults of 16 calls of a program with 64 MiB of temporaries, in pages of 4 KiB: 16,384 a call where all come anew.
FAULTS = """
import resource
from jaxlm import __main__
from jaxlm import devices
devices.keep_memory()
import jax, jax.numpy as jnp
@jax.jit
def step(x):
    return jnp.tanh(x @ x.T) @ x
x = jnp.ones((4096, 64)) / 64
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step(x).block_until_ready()
before = faults()
for _ in range(16):
    step(x).block_until_ready()
print(faults() - before)
"""


# How the heap falls varies from process to process: where several look, one shows what can be.
GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.slow
@pytest.mark.skipif(not GLIBC, reason="it is glibc's malloc that is told")
def test_a_step_finds_the_memory_of_the_step_before():
    def faults(**changed):
        surroundings = {**os.environ, "JAX_PLATFORMS": "cpu", **changed}
        surroundings.pop("XLA_FLAGS", None)
        done = subprocess.run([sys.executable, "-c", FAULTS], env=surroundings, check=True, capture_output=True)
        return int(done.stdout)

    # Who sets tunables is left alone, and has them at every call.
    assert 3 * min(faults() for _ in range(4)) < faults(GLIBC_TUNABLES="glibc.malloc.check=0")


@pytest.mark.skipif(not GLIBC, reason="it is glibc's malloc that is told")
def test_memory_is_kept_on_cpus_before_jax_unless_the_user_decides(monkeypatch):
    told = []
    library = type("Library", (), {"mallopt": staticmethod(lambda option, value: told.append((option, value)))})
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: [])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS")
    devices.keep_memory()
    assert not told, "jax has its threads already"
    monkeypatch.delitem(sys.modules, "jax")
    devices.keep_memory()
    assert dict(told) == {-8: 1, -4: 0, -1: -1, -2: 2**26}
    for change in (
        lambda: monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0"),
        lambda: monkeypatch.setattr(devices.glob, "glob", lambda pattern: ["/dev/accel0"]),
    ):
        told.clear()
        with monkeypatch.context():
            change()
            devices.keep_memory()
            assert not told
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)


def test_the_same_bits_are_asked_of_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    asked = []
    monkeypatch.setattr(devices, "start", lambda deterministic: asked.append(deterministic))
    monkeypatch.setattr(__main__, "perform", lambda config: None)
    loops = LoopConfig(deterministic=True), LoopConfig()
    stages = [PretrainConfig(name=str(number), loop=loop) for number, loop in enumerate(loops)]
    for number, config in enumerate((*stages, RunConfig(stages=(*stages,)))):
        __main__.run(config.stage, dataclasses.replace(config, workdir=str(tmp_path / str(number))))
    assert asked == [True, False, True]
    monkeypatch.undo()
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    devices.start(deterministic=True)
    assert os.environ["XLA_FLAGS"].split()[1] == "--xla_gpu_deterministic_ops=true"
