import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.base.config import MeshConfig
from jaxlm.base.sharding import make_mesh
from jaxlm.train import checksum

MESHES = [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(tensor=8)]
SPECS = [(), ("fsdp",), (None, ("tensor", "fsdp")), (("data", "fsdp"), None, "tensor")]
DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool", "float8_e4m3fn"]


def of(x) -> tuple[int, int]:
    return checksum.examine({"x": x})[0]["x"]


def bits_of(x: np.ndarray) -> np.ndarray:
    return x.view(f"uint{8 * x.dtype.itemsize}")


def random_array(dtype: str, shape: tuple[int, ...] = (8, 16, 24)) -> np.ndarray:
    """Random bits: infinities, payloads of NaNs and denormal numbers included."""
    made = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(jnp.dtype(dtype)).itemsize), np.uint8)
    return made[..., 0] > 127 if dtype == "bool" else made.view(jnp.dtype(dtype)).reshape(shape)


def on_host(x: np.ndarray) -> tuple[int, int]:
    """The definition, written with numpy and Python's integers."""

    def mix(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    lanes = [0, 0]
    for index in np.ndindex(x.shape):
        position = x.ndim
        for coordinate in index:
            position = mix((position + coordinate + 0x9E3779B9) % 2**32)
        bits = int(bits_of(x)[index])
        lanes = [lanes[0] + bits, lanes[1] + mix(bits ^ position)]
    return lanes[0] % 2**32, lanes[1] % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_its_definition(dtype):
    x = random_array(dtype, (3, 5, 2))
    assert of(jnp.asarray(x)) == on_host(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_same_on_every_mesh(dtype):
    x = random_array(dtype)
    found = {of(jnp.asarray(x))}
    cases = itertools.product(MESHES, SPECS) if dtype == "float32" else [(MESHES[1], SPECS[2])]
    for mesh, spec in cases:
        found.add(of(jax.device_put(x, NamedSharding(make_mesh(mesh), PartitionSpec(*spec)))))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_flipped_bit_changes_both_lanes(dtype):
    x = random_array(dtype, (2, 3))
    before = of(jnp.asarray(x))
    for index in np.ndindex(x.shape):
        for bit in range(8 * x.dtype.itemsize):
            damaged = x.copy()
            bits_of(damaged)[index] ^= bits_of(damaged).dtype.type(1 << bit)
            after = of(jnp.asarray(damaged))
            assert after[0] != before[0], (index, bit)
            assert after[1] != before[1], (index, bit)


def test_swapped_elements_change_it():
    # 1 and -1 differ by the highest bit alone: a sum weighted by odd numbers would not see the swap.
    x = np.array([[1.0, -1.0], [2.0, -2.0]], np.float32)
    for swapped in (x[:, ::-1], x[::-1], x.T):
        assert of(jnp.asarray(swapped.copy())) != of(jnp.asarray(x))


def test_shape_and_scalars_count():
    assert of(jnp.int32(7)) != of(jnp.int32(8))
    assert len({of(jnp.arange(12).reshape(shape)) for shape in ((12,), (3, 4), (4, 3), (1, 12))}) == 4
    assert of(jnp.zeros((0, 4))) == (0, 0)


def test_a_sharded_array_is_neither_gathered_nor_copied():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    x = jax.device_put(jnp.zeros((1024, 2048)), NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    compiled = jax.jit(checksum.checksums).lower({"x": x}).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 10_000  # The shard has 1,048,576 bytes.


def test_arrays_that_are_not_finite_are_named():
    arrays = {
        "fine": jnp.ones(3, jnp.bfloat16),
        "nan": jnp.array([1.0, jnp.nan], jnp.bfloat16),
        "infinity": jnp.array([[-jnp.inf]]),
        "integers": jnp.arange(3),
    }
    assert sorted(checksum.examine(arrays)[1]) == ["infinity", "nan"]
