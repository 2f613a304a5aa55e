"""Frozen matrices in 8 and 4 bits: what a code says, how near it is, and what a step keeps in memory of it."""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.adapters import weights
from jaxlm.adapters.quantising import quantise
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import ConfigError
from jaxlm.base.sharding import make_mesh
from jaxlm.model import layout, lora, quantised
from jaxlm.model.config import ExpertsConfig, LoRAConfig, ModelConfig, adapted
from jaxlm.model.transformer import define_model, for_inference
from jaxlm.model.weights import apply, initialize

SHAPE = ModelConfig(
    vocab_size=37, layers=3, width=16, heads=4, kv_heads=2, feed_forward=72, biases=("qkv",), compute="float32"
).complete()
MIXTURE = dataclasses.replace(
    SHAPE, experts=ExpertsConfig(count=4, chosen=2, feed_forward=72, shared=1, first_dense=1)
).complete()
LIMITED = dataclasses.replace(MIXTURE, experts=dataclasses.replace(MIXTURE.experts, capacity=4.0))
IDS = jax.random.randint(jax.random.key(0), (2, 9), 0, 37)
BASES = ("int8", "nf4")


def test_the_levels_are_those_of_the_paper():
    """Its construction: quantiles of the normal distribution at 8 and 9 even steps to either side, scaled to 1."""
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above, below = quantile(np.linspace(offset, 0.5, 9)[:-1]), -quantile(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(quantised.LEVELS, expected / np.abs(expected).max(), atol=3e-7)


def test_codes_by_hand():
    column = jnp.array([[-4.0], [2.0], [0.3], [0.0]])
    codes, scale = quantise(column, "int8")
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes[:, 0], [-127, 64, 10, 0])  # 63.5 to the even one, 9.525 up
    np.testing.assert_allclose(scale, [[4 / 127]])
    codes, scale = quantise(column, "nf4")
    assert (codes.dtype, codes.shape, scale.shape) == (jnp.uint8, (2, 1), (1, 1))
    # -1 is code 0; .5 lies nearer to .4407 (12) than to .5626 (13); .075 is nearest to .0796 (8); 0 is 7.
    np.testing.assert_array_equal(codes[:, 0], [0 | 12 << 4, 8 | 7 << 4])
    levels = np.array(quantised.LEVELS, np.float32)
    np.testing.assert_array_equal(quantised.dequantised(codes, scale)[:, 0], 4 * levels[[0, 12, 8, 7]])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rows", [2, 64, 70, 192])
def test_what_is_quantised_is_near_and_its_own_quantisation(base, rows):
    kernel = jax.random.normal(jax.random.key(1), (3, rows, 5)).at[1, :, 2].set(0.0)
    codes, scale = quantise(kernel, base)
    whole = quantised.dequantised(codes, scale)
    assert whole.shape == kernel.shape
    block = rows if base == "int8" else 64
    for first in range(0, rows, block):
        part, near = kernel[:, first : first + block], whole[:, first : first + block]
        largest = jnp.max(jnp.abs(part), axis=1, keepdims=True)
        # Half of the widest step: 1/127 of the largest number, or from -1 to -.696.
        step = 0.5 / 127 if base == "int8" else 0.5 * (1 - 0.6961928)
        assert jnp.all(jnp.abs(part - near) <= step * largest * 1.0001)
    np.testing.assert_array_equal(whole[1, :, 2], 0.0)
    again, _ = quantise(whole, base)
    np.testing.assert_array_equal(again, codes)


def test_an_odd_row_has_no_half_byte():
    shape = dataclasses.replace(SHAPE, feed_forward=71)
    with pytest.raises(ConfigError, match=r"lora\.base: nf4 keeps two rows in a byte, and down has 71"):
        define_model(adapted(shape, LoRAConfig(base="nf4")))


def both(kind: LoRAConfig, shape: ModelConfig = SHAPE):
    """((definition, parameters) over codes, the same over the matrices that the codes stand for)."""
    plain = define_model(shape)
    base = initialize(plain, 0)
    coded = define_model(adapted(shape, kind))
    whole = define_model(adapted(shape, dataclasses.replace(kind, base="compute")))

    def split(tree, declared):
        made, wholes = {}, {}
        for name, value in tree.items():
            if isinstance(value, dict):
                made[name], wholes[name] = split(value, declared[name])
            elif f"{name}_scale" in declared:
                made[name], made[f"{name}_scale"] = quantise(value, kind.base)
                wholes[name] = quantised.dequantised(made[name], made[f"{name}_scale"])
            else:
                made[name] = wholes[name] = value
        return made, wholes

    codes, wholes = split(base, coded.abstract())
    begun = weights.with_magnitudes(initialize(coded.part(lora.is_adapter), 1), wholes)
    over_codes = weights.with_magnitudes(initialize(coded.part(lora.is_adapter), 1), codes)
    jax.tree.map(np.testing.assert_array_equal, over_codes, begun)
    noise = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), x.shape)
    changes = jax.tree_util.tree_map_with_path(noise, begun)
    return (coded, codes), (whole, wholes), changes


@functools.partial(jax.jit, static_argnums=0)
def logits(definition, base, changes, ids=IDS):
    ones = jnp.ones_like(ids)
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    params = lora.joined(base, changes)
    return apply(definition, params, lambda m: m.logits(m(ids, ones, places)[0]))


@pytest.mark.parametrize(
    ("base", "dora", "shape"),
    [
        ("nf4", True, SHAPE),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("nf4", False, SHAPE),
                ("int8", False, SHAPE),
                ("int8", True, SHAPE),
                ("nf4", True, MIXTURE),
                ("int8", True, MIXTURE),
                ("int8", False, LIMITED),
                ("nf4", True, LIMITED),
            )
        ),
    ],
)
def test_a_model_over_codes_is_the_model_over_what_they_stand_for(base, dora, shape):
    coded, whole, changes = both(LoRAConfig(rank=3, alpha=7.0, dora=dora, base=base), shape)
    kinds = {str(path[-1].key): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(coded[1])}
    assert {name for name, kind in kinds.items() if kind in (jnp.int8, jnp.uint8)} == {
        *("query", "key", "value", "output", "gate", "up", "down")
    }
    np.testing.assert_allclose(logits(*coded, changes), logits(*whole, changes), atol=2e-6)
    loss = lambda definition, base: lambda changes: jnp.sum(jnp.sin(logits(definition, base, changes)))
    ours, theirs = (jax.grad(loss(*one))(changes) for one in (coded, whole))
    for (path, ours_), theirs_ in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours_, theirs_, atol=2e-5 * float(jnp.max(jnp.abs(theirs_)) + 1), err_msg=str(path))
    # And the plain model that is made of it.
    config = LoRAConfig(rank=3, alpha=7.0, dora=dora)
    merged = weights.merged(lora.joined(coded[1], changes), config)
    np.testing.assert_allclose(logits(define_model(shape), merged, {}), logits(*coded, changes), atol=1e-4)


def test_unrolled_and_in_the_compute_type():
    shape = dataclasses.replace(SHAPE, compute="bfloat16")
    kind = LoRAConfig(rank=3, base="nf4")
    coded, _, changes = both(kind, dataclasses.replace(shape, compute="float32"))
    config, definition = for_inference(adapted(shape, kind))
    params = layout.unroll(lora.joined(coded[1], changes), config)
    like = definition.abstract()
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, like)
    kept = params["layers"]["1"]["attention"]
    assert (kept["query"].dtype, kept["query_scale"].dtype) == (jnp.uint8, jnp.float32)
    np.testing.assert_allclose(logits(definition, params, {}), logits(*coded, changes), atol=0.15)


FEW = ExpertsConfig(count=4, chosen=1, feed_forward=192)


def bytes_of_a_step(
    kind: LoRAConfig, remat: str = "none", scan_layers: bool = True, layers: int = 12, **fields: ExpertsConfig
) -> tuple[int, int, int]:
    """(of the frozen base, of temporaries, of one layer's matrices in the compute type)."""
    shape = dataclasses.replace(SHAPE, layers=layers, width=256, heads=4, kv_heads=4, feed_forward=768, **fields)
    shape = dataclasses.replace(shape, head_size=64)
    shape = dataclasses.replace(shape, compute="bfloat16", remat=remat, vocab_size=64)
    shape = dataclasses.replace(shape, scan_layers=scan_layers).complete()
    definition = define_model(adapted(shape, kind), jnp.bfloat16)
    frozen = define_model(adapted(shape, kind, adapters=False), jnp.bfloat16).abstract()
    changes = definition.part(lora.is_adapter).abstract()
    ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    loss = lambda changes, base, ids: jnp.sum(logits(definition, base, changes, ids % 64))
    found = jax.jit(jax.grad(loss, allow_int=True)).lower(changes, frozen, ids).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    return size, found.temp_size_in_bytes, 2 * (4 * 256 * 256 + 3 * 256 * 768)


def test_where_layers_lie_apart_none_waits_whole_for_the_way_back():
    """The compiler would take what both ways make for one thing."""
    kind = LoRAConfig(rank=2, base="int8")
    _, temporary, layer = bytes_of_a_step(kind, scan_layers=False)
    assert temporary < 8 * layer  # of twelve, in float32 24


@pytest.mark.slow
def test_dropped_inputs_of_dora_keep_no_layer_whole():
    kind = LoRAConfig(rank=2, base="int8", dora=True)
    _, plain, layer = bytes_of_a_step(kind)
    _, dropped, _ = bytes_of_a_step(dataclasses.replace(kind, dropout=0.5))
    assert dropped < plain + 4 * layer


def test_scales_are_divided_where_the_mesh_divides_them():
    shape = dataclasses.replace(SHAPE, width=128, feed_forward=192, head_size=32, vocab_size=40, kv_heads=4)
    definition = define_model(adapted(shape.complete(), LoRAConfig(base="nf4"), adapters=False))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    placed = definition.shardings(mesh)["stack"]["0"]
    assert tuple(placed["mlp"]["up_scale"].spec) == (None, "fsdp", "tensor")  # 2 blocks of 128 rows
    assert tuple(placed["mlp"]["down_scale"].spec) == (None, None, "fsdp")  # 3 blocks among 4
    assert tuple(placed["mlp"]["down"].spec) == (None, "tensor", "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("experts", [ExpertsConfig(), FEW, dataclasses.replace(FEW, capacity=1.0)])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_step_holds_all_layers_whole(remat, experts):
    """The gradient of a scan would keep every layer's matrix, made whole, for the way back."""
    of_compute, _, layer = bytes_of_a_step(LoRAConfig(rank=2), remat, experts=experts)
    for base, share in (("int8", 0.52), ("nf4", 0.30)):
        size, temporary, _ = bytes_of_a_step(LoRAConfig(rank=2, base=base), remat, experts=experts)
        _, of_twice_as_many, _ = bytes_of_a_step(LoRAConfig(rank=2, base=base), remat, layers=24, experts=experts)
        assert size < share * of_compute
        # Of twelve more layers, their activations: whole, they would take twelve times a layer's bytes.
        assert of_twice_as_many - temporary < 4 * layer
