"""One side of the benchmark in a process of its own, as its user has it: jaxlm started by its own command's rules, or
the plain reference. Compiles, runs once, and then answers each line on stdin with the seconds of one more run.

    python tools/benchmark_sides.py train jaxlm        (or: train reference, decode jaxlm, decode reference)
"""

import sys
import time
from collections.abc import Callable
from typing import Any

B, S, PROMPT, NEW = 16, 256, 64, 128


def our_training() -> Callable[[], None]:
    """One step of pretrain."""
    import jax
    import numpy as np

    from jaxlm.base import sharding
    from jaxlm.base.config import MeshConfig
    from jaxlm.data.config import MixtureSource
    from jaxlm.stages import pretrain
    from jaxlm.stages.config import PretrainConfig
    from jaxlm.train.config import ScheduleConfig

    ids = np.random.default_rng(0).integers(0, our_model().vocab_size, (B, S)).astype(np.int32)
    config = PretrainConfig(
        data=(MixtureSource(path="none"),),
        model=our_model(),
        row_length=S,
        batch_rows=B,
        steps=1000,
        schedule=ScheduleConfig(peak=3e-4),
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    program = pretrain.build(config, mesh)
    rows = {
        "ids": ids,
        "segment_ids": np.ones((B, S), np.int32),
        "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)),
        "loss_mask": np.arange(S)[None] > np.zeros((B, 1)),
    }
    with jax.set_mesh(mesh):
        state = [program.initialize()]
        step = program.step.lower(program.abstract_state, program.abstract_batch).compile()
        batch = jax.device_put(rows, program.shardings.batch)

    def run() -> None:
        state[0], _ = step(state[0], batch)
        jax.block_until_ready(state[0])

    return run


def our_model() -> Any:
    from jaxlm.model.config import ModelConfig

    return ModelConfig(vocab_size=8192, layers=6, width=384, heads=6, feed_forward=1024, scan_layers=False).complete()


def reference_training() -> Callable[[], None]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import reference_model

    ids = jnp.asarray(np.random.default_rng(0).integers(0, reference_model.V, (B, S)).astype(np.int32))
    params = reference_model.init(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state: list[Any] = [(params, zeros, jax.tree.map(jnp.copy, zeros), jnp.float32(1))]
    step = jax.jit(reference_model.train_step, donate_argnums=(0, 1, 2))

    def run() -> None:
        *state[0], _ = jax.block_until_ready(step(*state[0], ids))

    return run


def our_decoding() -> Callable[[], None]:
    """NEW tokens for B prompts by the sampler."""
    from jaxlm.model.transformer import define_model
    from jaxlm.model.weights import initialize
    from jaxlm.sample.config import SamplingConfig
    from jaxlm.sample.decoding import prepare
    from jaxlm.sample.sampler import Sampler
    from jaxlm.tokenizer.byte import ByteTokenizer
    from jaxlm.tokenizer.config import BASIC_TOKENS

    sampler = Sampler(our_model(), ByteTokenizer(BASIC_TOKENS))
    params = prepare(our_model(), initialize(define_model(our_model()), 0))
    sampling = SamplingConfig(max_tokens=NEW, stop_at_eos=False, batch_rows=B)

    def run() -> None:
        found = sampler.generate(params, prompts(), sampling)
        assert all(len(completion.ids) == NEW for completion in found)

    return run


def prompts() -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(4, 256, (B, PROMPT)).tolist()


def reference_decoding() -> Callable[[], None]:
    import jax
    import jax.numpy as jnp
    import reference_model

    weights = reference_model.init(0)

    @jax.jit
    def decode(params, ids, key):
        T = PROMPT + NEW
        empty = jnp.zeros((B, T, reference_model.H, reference_model.N), jnp.bfloat16)
        cache = [(empty, empty)] * reference_model.L
        positions = jnp.broadcast_to(jnp.arange(PROMPT), (B, PROMPT))
        logits, cache = reference_model.forward(params, ids, positions, cache)

        def token(carry, slot):
            logits, cache = carry
            chosen = jax.random.categorical(jax.random.fold_in(key, slot), logits)
            positions = jnp.full((B, 1), slot)
            logits, cache = reference_model.forward(params, chosen[:, None], positions, cache, slot)
            return (logits[:, -1], cache), chosen

        return jax.lax.scan(token, (logits[:, -1], cache), jnp.arange(PROMPT, T))[1]

    key = jax.random.key(0)
    return lambda: jax.block_until_ready(decode(weights, jnp.array(prompts()), key))


TOKENS = {"train": B * S, "decode": B * NEW}
SIDES = {
    ("train", "jaxlm"): our_training,
    ("train", "reference"): reference_training,
    ("decode", "jaxlm"): our_decoding,
    ("decode", "reference"): reference_decoding,
}


def main() -> None:
    what, side = sys.argv[1:]
    if side == "jaxlm":
        from jaxlm.base import devices

        devices.start()
    run = SIDES[what, side]()
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
