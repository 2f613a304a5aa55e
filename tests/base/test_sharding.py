import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxlm.base import sharding
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError


def test_every_mesh_axis_is_auto_and_in_order():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"slices": 1, "data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    # Neighbours are on the innermost axis, where most is exchanged.
    assert [device.id for device in mesh.devices[0, 0, 0, 0, 0]] == [0, 1]


def test_names_become_mesh_axes():
    assert sharding.spec(("embed", "mlp")) == PartitionSpec("fsdp", "tensor")
    assert sharding.spec(("batch", "sequence", None)) == PartitionSpec(
        ("slices", "data", "fsdp", "expert"), "context", None
    )


def test_a_mesh_axis_cannot_be_used_twice():
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        sharding.spec(("mlp", "heads"))


def test_a_weight_that_the_mesh_does_not_divide_is_refused_by_axis():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with pytest.raises(ConfigError, match=r"mesh.fsdp: 4 does not divide axis 'embed' \(size 6\) of layers/query"):
        sharding.weight_sharding(mesh, "layers/query", ("embed", "heads"), (6, 8))


def test_a_large_weight_left_whole_is_refused_and_a_small_one_is_not():
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    with pytest.raises(ConfigError, match="would lie whole on every device"):
        sharding.weight_sharding(mesh, "table", ("norm", None), (8192, 4096))
    assert sharding.weight_sharding(mesh, "scale", ("norm",), (4096,)).is_fully_replicated
    replicas = sharding.make_mesh(MeshConfig(data=8))
    assert sharding.weight_sharding(replicas, "table", ("norm", None), (8192, 4096)).is_fully_replicated


def test_activations_lie_as_the_table_says_where_they_can():
    mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2))
    place = jax.jit(lambda x: sharding.constrain(x, "batch", None, "activation_mlp"))
    with jax.set_mesh(mesh):
        assert place(np.zeros((4, 3, 6))).sharding.shard_shape((4, 3, 6)) == (1, 3, 3)
        # Three rows are not divided by four devices: they stay whole.
        assert place(np.zeros((3, 3, 6))).sharding.shard_shape((3, 3, 6)) == (3, 3, 3)
    x = np.zeros((4, 3, 6))
    assert sharding.constrain(x, "batch", None, "activation_mlp") is x, "no mesh, nothing to do"


def test_rows_of_a_process_become_the_global_batch():
    mesh = sharding.make_mesh(MeshConfig(data=8))
    rows = np.arange(16 * 3).reshape(16, 3)
    own = sharding.own_rows(mesh, 16)
    assert own == tuple(range(16))
    whole = sharding.global_batch(mesh, {"ids": rows}, 16)["ids"]
    np.testing.assert_array_equal(whole, rows)
    assert whole.sharding.shard_shape((16, 3)) == (2, 3)
    assert sharding.batch_pieces(mesh.shape) == 8
