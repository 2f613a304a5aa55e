"""Speed as a ratio that holds on a shared machine: jaxlm beside a plain JAX reference, in turns.

    python tools/benchmark.py             training and decoding
    python tools/benchmark.py train       one of them
    python tools/benchmark.py overhead    a run's loop with all that guards it, beside one without
    python tools/benchmark.py rl          an iteration of reinforcement learning, part by part (benchmark_rl.py)
    python tools/benchmark.py --peer      transformers + torch beside it (pip install transformers torch, in an
                                          environment of its own; give its Python as --peer=PATH)

Shape of training and decoding: 16.9 M parameters (6 layers, width 384, 6 heads, feed-forward 1024, vocabulary 8192),
bf16; training on 16 rows of 256 tokens, decoding 16 prompts of 64 tokens for 128 new ones. Each side runs in a process
of its own, as its user has it (benchmark_sides.py). Figures are medians of 5 pairs, each measured back to back; the
machine and the rate of a matrix product of that minute stand beside them.
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
import benchmark_sides
import jax
import jax.numpy as jnp

from jaxlm.base.errors import JaxlmError

PAIRS = 5


class Side:
    """A child process that runs one side when it is told to."""

    def __init__(self, what: str, side: str):
        command = [sys.executable, str(Path(benchmark_sides.__file__)), what, side]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready":
            raise JaxlmError(f"{what}, {side}: its process ended; what it said stands above")

    def seconds(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def in_turns(what: str) -> dict[str, float]:
    """Median tokens per second of both sides, and the median of the pairs' ratios: the second's time by the first's."""
    sides = {side: Side(what, side) for kind, side in benchmark_sides.SIDES if kind == what}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(PAIRS):
        for side, process in sides.items():
            seconds[side].append(process.seconds())
    for process in sides.values():
        process.close()
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    rates = {side: benchmark_sides.TOKENS[what] / statistics.median(found) for side, found in seconds.items()}
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
    for name in ("train", "decode") if what == "all" else (what,):
        found = in_turns(name)
        (ours, rate), (other, other_rate) = [*found.items()][:2]
        print(
            f"{name:8} {ours} {rate:7,.0f} tokens/s   {other} {other_rate:7,.0f}   "
            f"ratio {found['ratio']:.3f} ({found['lowest']:.3f} to {found['highest']:.3f})"
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
    commands = parser.add_subparsers(metavar="WHAT", help="train, decode, all (both, the default), overhead or rl")
    for name in ("train", "decode", "overhead", "all"):
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
