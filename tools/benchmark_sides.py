"""One side of the benchmark in a process of its own, as its user has it: jaxlm started by its own command's rules, or
the plain reference. Compiles, runs once, and then answers each line on stdin with the seconds of one more run.

    python tools/benchmark_sides.py train jaxlm        (or one of the other SIDES)
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

B, S, PROMPT, NEW = 16, 256, 64, 128
LOOP_STEPS = 25  # and a save: by default there is one in 500


def training_config() -> Any:
    from jaxlm.data.config import MixtureSource
    from jaxlm.stages.config import PretrainConfig
    from jaxlm.train.config import ScheduleConfig

    return PretrainConfig(
        data=(MixtureSource(path="none"),),
        model=our_model(),
        row_length=S,
        batch_rows=B,
        steps=1000,
        schedule=ScheduleConfig(peak=3e-4),
    )


def training_rows() -> dict[str, Any]:
    import numpy as np

    return {
        "ids": np.random.default_rng(0).integers(0, our_model().vocab_size, (B, S)).astype(np.int32),
        "segment_ids": np.ones((B, S), np.int32),
        "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)),
        "loss_mask": np.arange(S)[None] > np.zeros((B, 1)),
    }


def one_device() -> Any:
    import jax

    from jaxlm.base import sharding
    from jaxlm.base.config import MeshConfig

    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def our_training() -> Callable[[], None]:
    """One step of pretrain."""
    import jax

    from jaxlm.stages import pretrain

    mesh = one_device()
    program = pretrain.build(training_config(), mesh)
    with jax.set_mesh(mesh):
        state = [program.initialize()]
        step = program.step.lower(program.abstract_state, program.abstract_batch).compile()
        batch = jax.device_put(training_rows(), program.shardings.batch)

    def run() -> None:
        state[0], _ = step(state[0], batch)
        jax.block_until_ready(state[0])

    return run


def training_loop(guarded: bool) -> Callable[[], float]:
    """LOOP_STEPS of a run's own loop, a save after the last: with all that guards it, or without checksums, watchdog,
    black box and a look for spikes. A run gives its seconds from the first step to the last and its save."""
    import jax

    from jaxlm.replay.blackbox import BlackBox
    from jaxlm.stages import pretrain
    from jaxlm.train import checksum
    from jaxlm.train.config import OptimizerConfig, PlateauConfig
    from jaxlm.train.loop import Task, compiled_step, train
    from jaxlm.train.watchdog import Watchdog

    optimizer = OptimizerConfig(spike_limit=1e9 if guarded else 0.0)
    config = dataclasses.replace(training_config(), steps=LOOP_STEPS, optimizer=optimizer)
    mesh = one_device()
    program = pretrain.build(config, mesh)
    with jax.set_mesh(mesh):
        batch = jax.device_put(training_rows(), program.shardings.batch)
        compiled = compiled_step(program)
    if not guarded:
        checksum.examine = lambda arrays: (dict.fromkeys(arrays, (0, 0)), [])

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            here = dataclasses.replace(config, workdir=folder)
            watchdog = Watchdog(config.loop.watchdog)
            task = Task(
                program=program,
                compile=lambda: compiled,
                other_layout=None,
                model=config.model,
                steps=LOOP_STEPS,
                weights=(1.0,),
                batches=lambda step, history: itertools.repeat(batch),
                evaluate=lambda state: {},
                tokens_per_step=B * S,
                flops_per_token=1.0,
                identity={},
                plateau=PlateauConfig(),
                best_metric="",
                black_box=BlackBox(here, program) if guarded else None,
            )
            outcome = train(task, config.loop, folder, stack.enter_context(watchdog) if guarded else watchdog)
        return LOOP_STEPS * B * S / outcome.tokens_per_second

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

    def run() -> None:
        jax.block_until_ready(decode(weights, jnp.array(prompts()), key))

    return run


TOKENS = {"train": B * S, "decode": B * NEW, "overhead": LOOP_STEPS * B * S}
SIDES = {
    ("train", "jaxlm"): our_training,
    ("train", "reference"): reference_training,
    ("decode", "jaxlm"): our_decoding,
    ("decode", "reference"): reference_decoding,
    ("overhead", "guarded"): functools.partial(training_loop, True),
    ("overhead", "bare"): functools.partial(training_loop, False),
}


def main() -> None:
    what, side = sys.argv[1:]
    if side != "reference":
        from jaxlm import devices

        devices.start()
    run = SIDES[what, side]()
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        own = run()
        print(own or time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
