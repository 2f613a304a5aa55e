"""Checkpoints in processes of their own: one that is killed, and two that save together."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.config import CheckpointConfig

PROGRAM = """
    import os, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxlm.base.config import MeshConfig
    from jaxlm.base.sharding import make_mesh
    from jaxlm.train.checkpoint import Checkpointer
    from jaxlm.train.config import CheckpointConfig
"""


def start(program: str, *arguments: object) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM) + textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_while_saving_leaves_a_whole_step(tmp_path):
    program = """
        checkpoints = Checkpointer(sys.argv[1], CheckpointConfig(keep_last=1, keep_best=0))
        for step in range(1, 10**6):
            checkpoints.save(step, {"w": jnp.full((512, 512), step, jnp.int32)}, extra={})
            print(step, flush=True)
    """
    with start(program, tmp_path) as process:
        assert process.stdout is not None
        assert any(line.strip() == "20" for line in process.stdout)
        process.kill()
    restored = Checkpointer(tmp_path, CheckpointConfig()).restore(
        lambda _: {"w": jax.ShapeDtypeStruct((512, 512), jnp.int32)}
    )
    assert restored is not None
    assert restored.step >= 18
    assert (np.asarray(restored.state["w"]) == restored.step).all()


TWO_PROCESSES = """
    rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    assert jax.device_count() == 4
    placed = NamedSharding(make_mesh(MeshConfig(fsdp=4)), PartitionSpec("fsdp"))
    def rows(step):
        return np.arange(4096, dtype=np.float32).reshape(64, 64) * step
    def state(step):
        return {"w": jax.make_array_from_callback((64, 64), placed, lambda index: rows(step)[index])}
    wanted = {"w": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=placed)}
    def check(restored, step):
        assert (restored.step, restored.extra) == (step, {"step": step})
        for shard in restored.state["w"].addressable_shards:
            np.testing.assert_array_equal(shard.data, rows(step)[shard.index])
"""


def run_two(program: str, folder: object) -> list[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = textwrap.dedent(TWO_PROCESSES) + textwrap.dedent(program)
    processes = [start(program, rank, port, folder) for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


def test_two_processes_save_restore_and_agree(tmp_path):
    """Both write their shards, both pass over the damaged step, both restore the same one, and refuse together."""
    program = """
        config = CheckpointConfig(keep_last=2, keep_best=0)
        checkpoints = Checkpointer(folder, config)
        for step in (1, 2, 3):
            assert checkpoints.save(step, state(step), extra={"step": step})
        assert checkpoints.wait() == 3
        assert checkpoints.latest_intact() == 3
        if rank == 0:
            assert sorted(os.listdir(folder)) == ["2", "3"]
            os.truncate(f"{folder}/3/manifest.json", 50)
        check(Checkpointer(folder, config).restore(lambda _: wanted), 2)
        try:
            Checkpointer(folder, config).restore(lambda _: wanted, step=9)
        except Exception as error:
            print("refused:", type(error).__name__, error, flush=True)
    """
    for output in run_two(program, tmp_path):
        assert "refused: UserError" in output
        assert "no checkpoint of step 9; there are" in output


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_fails_the_save_on_both(tmp_path):
    program = """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        config = CheckpointConfig(timeout_seconds=5)
        checkpoints = Checkpointer(folder, config)
        checkpoints.save(1, state(1), extra={"step": 1})
        assert checkpoints.wait() == 1
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1))
        checkpoints.save(2, state(2), extra={"step": 2})
        assert checkpoints.wait() == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        check(Checkpointer(folder, config).restore(lambda _: wanted), 1)
        checkpoints.save(3, state(3), extra={"step": 3})
        assert checkpoints.wait() == 3
        check(Checkpointer(folder, config).restore(lambda _: wanted), 3)
    """
    for output in run_two(program, tmp_path):
        assert "saving step 2 FAILED (1 in a row)" in output
