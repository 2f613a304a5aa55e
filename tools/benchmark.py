"""Speed as a ratio that holds on a shared machine: jaxlm beside a plain JAX reference, in turns, in one process.

    python tools/benchmark.py             training and decoding
    python tools/benchmark.py train       one of them
    python tools/benchmark.py rl          an iteration of reinforcement learning, part by part (benchmark_rl.py)
    python tools/benchmark.py --peer      transformers + torch beside it (pip install transformers torch, in an
                                          environment of its own; give its Python as --peer=PATH)

Shape of training and decoding: 16.9 M parameters (6 layers, width 384, 6 heads, feed-forward 1024, vocabulary 8192),
bf16; training on 16 rows of 256 tokens, decoding 16 prompts of 64 tokens for 128 new ones. Figures are medians of 5
pairs, each measured back to back; the machine and the rate of a matrix product of that minute stand beside them.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import benchmark_rl
import jax
import jax.numpy as jnp
import numpy as np
import reference_model

from jaxlm.base import sharding
from jaxlm.base.config import MeshConfig
from jaxlm.base.errors import JaxlmError
from jaxlm.data.config import MixtureSource
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import initialize
from jaxlm.sample.config import SamplingConfig
from jaxlm.sample.decoding import prepare
from jaxlm.sample.sampler import Sampler
from jaxlm.stages import pretrain
from jaxlm.stages.config import PretrainConfig
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.config import BASIC_TOKENS
from jaxlm.train.config import ScheduleConfig

B, S, PROMPT, NEW = 16, 256, 64, 128
PAIRS = 5
MODEL = ModelConfig(vocab_size=8192, layers=6, width=384, heads=6, feed_forward=1024, scan_layers=False).complete()


def training_pair() -> tuple[Callable[[], None], Callable[[], None]]:
    """(one step of jaxlm, one step of the reference), compiled."""
    ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, (B, S)).astype(np.int32)
    config = PretrainConfig(
        data=(MixtureSource(path="none"),),
        model=MODEL,
        row_length=S,
        batch_rows=B,
        steps=1000,
        schedule=ScheduleConfig(peak=3e-4),
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    program = pretrain.build(config, mesh)
    ones = np.ones((B, S), np.int32)
    rows = {
        "ids": ids,
        "segment_ids": ones,
        "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)),
        "loss_mask": np.arange(S)[None] > np.zeros((B, 1)),
    }
    with jax.set_mesh(mesh):
        state = [program.initialize()]
        step = program.step.lower(program.abstract_state, program.abstract_batch).compile()
        batch = jax.device_put(rows, program.shardings.batch)

    def ours() -> None:
        state[0], _ = step(state[0], batch)
        jax.block_until_ready(state[0])

    params = reference_model.init(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    plain: list[Any] = [(params, zeros, jax.tree.map(jnp.copy, zeros), jnp.float32(1))]
    reference_step = jax.jit(reference_model.train_step, donate_argnums=(0, 1, 2))

    def reference() -> None:
        *plain[0], _ = jax.block_until_ready(reference_step(*plain[0], jnp.asarray(ids)))

    return ours, reference


def decoding_pair() -> tuple[Callable[[], None], Callable[[], None]]:
    """(jaxlm's sampler, the reference's loop) drawing NEW tokens for B prompts."""
    sampler = Sampler(MODEL, ByteTokenizer(BASIC_TOKENS))
    params = prepare(MODEL, initialize(define_model(MODEL), 0))
    prompts = np.random.default_rng(0).integers(4, 256, (B, PROMPT)).tolist()
    sampling = SamplingConfig(max_tokens=NEW, stop_at_eos=False, batch_rows=B)

    def ours() -> None:
        found = sampler.generate(params, prompts, sampling)
        assert all(len(completion.ids) == NEW for completion in found)

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

    def reference() -> None:
        jax.block_until_ready(decode(weights, jnp.array(prompts), key))

    return ours, reference


def in_turns(ours: Callable[[], None], reference: Callable[[], None], tokens: int, repeat: int) -> dict[str, float]:
    """Median tokens per second of both, and the median of the pairs' ratios."""
    seconds: dict[str, list[float]] = {"jaxlm": [], "reference": []}
    ours()
    reference()
    for _ in range(PAIRS):
        for name, run in (("jaxlm", ours), ("reference", reference)):
            began = time.perf_counter()
            for _ in range(repeat):
                run()
            seconds[name].append((time.perf_counter() - began) / repeat)
    ratios = [b / a for a, b in zip(seconds["jaxlm"], seconds["reference"], strict=True)]
    rates = {name: tokens / statistics.median(found) for name, found in seconds.items()}
    return rates | {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def product_rate(dtype: jnp.dtype, size: int = 2048) -> float:
    """GFLOP/s of a square matrix product with float32 sums and result."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(a, a))
    best = min(_timed(lambda: jax.block_until_ready(product(a, a))) for _ in range(5))
    return 2 * size**3 / best / 1e9


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def machine() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    amx = "AMX" if "amx_bf16" in text else "no AMX"
    return f"{names[0] if names else platform.processor()}, {len(names) or '?'} cores, {amx}; jax {jax.__version__}"


def ratios(what: str, peer: str) -> None:
    """Prints "train", "decode" or "all"; `peer`: a Python that has transformers and torch, or nothing."""
    cases = {"train": (training_pair, B * S, 1), "decode": (decoding_pair, B * NEW, 1)}
    for name, (make, tokens, repeat) in cases.items():
        if what in (name, "all"):
            found = in_turns(*make(), tokens, repeat)
            print(
                f"{name:7} jaxlm {found['jaxlm']:7,.0f} tokens/s   reference {found['reference']:7,.0f}   "
                f"ratio {found['ratio']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"
            )
    if peer:
        script = Path(__file__).parent / "benchmark_peer.py"
        done = subprocess.run([peer, script], check=True, capture_output=True, text=True)
        for name, rate in json.loads(done.stdout.splitlines()[-1]).items():
            print(f"{name:28} {rate:7,.0f} tokens/s")


def main(given: Sequence[str] | None = None) -> int:
    # Given before or after the command: a default would undo what stands before it.
    peer = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    peer.add_argument("--peer", metavar="PYTHON", help="a Python that has transformers and torch")
    kind: Any = dict(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, parents=[peer], **kind)
    parser.set_defaults(what="all")
    commands = parser.add_subparsers(metavar="WHAT", help="train, decode, all (the default) or rl")
    for name in ("train", "decode", "all"):
        commands.add_parser(name, parents=[peer]).set_defaults(what=name)
    rl = commands.add_parser("rl", description=benchmark_rl.__doc__, **kind)
    rl.set_defaults(what="rl")
    benchmark_rl.add_arguments(rl)
    arguments = parser.parse_args(given)
    print(machine())
    rates = (product_rate(jnp.dtype(kind)) for kind in (jnp.bfloat16, jnp.float32))
    print("matrix product: {:.0f} GFLOP/s in bfloat16, {:.0f} in float32".format(*rates))
    try:
        if arguments.what == "rl":
            benchmark_rl.main(arguments.answers, arguments.repeats, arguments.stage)
        else:
            ratios(arguments.what, getattr(arguments, "peer", ""))
        return 0
    except JaxlmError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
