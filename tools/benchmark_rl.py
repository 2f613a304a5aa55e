"""The time of an iteration of reinforcement learning, part by part, for several sizes of rollout; see benchmark.py.

    python tools/benchmark.py rl                                         the demo's ppo and grpo; ten minutes on 2 cores
    python tools/benchmark.py rl --stage=ppo --answers=64 --repeats=3

An iteration is the stage's own: `Iteration` of jaxlm/stages/rl.py with its sampler, verifiers and compiled program, and
the configs of configs/demo.py. Weights are random, and prompts as long as they may be: answers seldom end before their
last token, so that all rollouts of a size are the same work, the most there can be.

The parts of a rollout are timed inside of the iteration, the devices done at each part's end. Scoring and learning are
one program there; its pieces, the same functions compiled one by one, are timed right after it on the same rollout, so
that all parts together may differ a little from the iteration.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import random
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table
from jax.sharding import Mesh

from jaxlm.base import sharding
from jaxlm.base.config import StageConfig
from jaxlm.base.errors import UserError, nearest
from jaxlm.base.logging import progress
from jaxlm.config_files import load_config_file
from jaxlm.data.config import ChatSource
from jaxlm.model.config import ModelConfig
from jaxlm.model.transformer import define_model
from jaxlm.model.weights import Params, initialize
from jaxlm.rl import prompts, rolling
from jaxlm.rl.config import RLConfig
from jaxlm.rl.learner import Assessed, Learner, RLState, assess
from jaxlm.rl.models import define_models, load_frozen, row_length
from jaxlm.rl.rewards import Judge
from jaxlm.rl.rolling import Roller
from jaxlm.rl.rollout import Rollout
from jaxlm.sample import decoding
from jaxlm.stages import rl
from jaxlm.stages.config import PretrainConfig
from jaxlm.tokenizer import tokenizer as tokenizers
from jaxlm.tokenizer.byte import ByteTokenizer
from jaxlm.tokenizer.config import BASIC_TOKENS, TokenizerConfig
from jaxlm.train import model_directory

DEMO = Path(__file__).parent.parent / "configs/demo.py"
# Scores, and the field of `Assessed` that holds each.
FIELDS = {
    "old log-probabilities": "logprobs",
    "reference's": "reference",
    "values": "values",
    "reward model": "model_scores",
}
# What of an iteration is timed. The prefill draws the first tokens too. Learning: advantages, then all passes of
# minibatches. Host: batches and texts, arrays to the devices and back, the log.
GROUPS = {
    "rollout": ("weights for the sampler", "prefill", "decoding"),
    "scoring": (*FIELDS, "verifiers"),
    "learning": ("learning",),
    "host": ("host",),
}


class Stopwatch:
    """Seconds in functions that others call, from the devices at rest to their results."""

    def __init__(self):
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.given: dict[str, Any] = {}
        """the last arguments of each"""

    def on(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.given[name] = args
            began = time.perf_counter()
            made = jax.block_until_ready(function(*args, **kwargs))
            self.seconds[name] += time.perf_counter() - began
            return made

        return timed

    @contextlib.contextmanager
    def over(self, functions: Mapping[str, tuple[Any, str]]) -> Iterator[None]:
        """While it lasts, these functions, each the attribute of an object or a module, are timed under their names."""
        with contextlib.ExitStack() as stack:
            for name, (owner, attribute) in functions.items():
                timed = self.on(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            yield


class Round(NamedTuple):
    """One iteration, seconds."""

    whole: float
    parts: dict[str, float]
    """in the order of GROUPS, those that the method has; they add up to about the whole"""
    answers: int
    tokens: int
    """of all answers"""

    def group(self, name: str) -> float:
        return sum(seconds for part, seconds in self.parts.items() if part in GROUPS[name])


class Case:
    """A method with a size of rollout. Each round begins with the same state and answers the same prompts."""

    def __init__(self, config: RLConfig, mesh: Mesh):
        rl.validate(config, mesh.devices.size)
        directories = rl.open_models(config)
        self.mesh, self.program = mesh, rl.build_from(config, mesh, directories)
        models = define_models(config, directories, mesh)
        frozen = load_frozen(directories, models, self.program.abstract_batch["frozen"])
        sampler = rolling.sampler_of(config, directories.policy)
        asked = prompts.read(config.sources, "train", None, sampler.encode, config.max_prompt_tokens)
        self.judge = Judge(config.verifiers, asked, "verifiers")
        roller = Roller(config, sampler, self.judge, None, row_length(config, directories.policy.config, mesh))
        with jax.set_mesh(mesh):
            self.iteration = rl.Iteration(config, self.program, roller, frozen)
            self.first: RLState = self.program.initialize()
        self.batch = next(rl.batches(config, asked, mesh)(0, ()))
        absent = {"values": models.value is None, "reward model": models.reward is None}
        self.parts = [part for group in GROUPS.values() for part in group if not absent.get(part)]
        if not config.verifiers:
            self.parts.remove("verifiers")
        self._cut()

    def _cut(self) -> None:
        """The program's pieces, as programs of their own."""
        learner: Learner = self.program.step.__wrapped__  # what the stage gave to jax.jit

        def score(field: str, policy: Params, value: Params, frozen: dict[str, Params], rollout: Rollout) -> jax.Array:
            # What no output needs is not computed: of the models' passes only this field's is left.
            return getattr(assess(learner.config, learner.models, policy, value, frozen, rollout), field)

        self.scores = {name: jax.jit(functools.partial(score, field)) for name, field in FIELDS.items()}
        whole = sharding.replicated(self.mesh)
        out = self.program.shardings.state, whole, whole
        self.learn = jax.jit(learner.learn, out_shardings=out, donate_argnums=0)

    def iterate(self, watch: Stopwatch) -> RLState:
        """The next state, made as the stage makes it; the watch has its parts, and "iteration"."""
        state = self._state()
        inside = {
            "weights for the sampler": (rolling, "prepare"),
            "prefill": (decoding, "start"),
            "decoding": (decoding, "advance"),
            "verifiers": (self.judge, "scores"),
            "program": (self.iteration, "learn"),
        }
        with jax.set_mesh(self.mesh), watch.over(inside):
            return watch.on("iteration", self.iteration)(state, self.batch)[0]

    def pieces(self, watch: Stopwatch, given: dict[str, Any]) -> RLState:
        """The next state, made of what the iteration gave its program, piece by piece."""
        state, rollout = self._state(), given["rollout"]
        seen = state.policy.params, state.value.params if state.value else {}, given["frozen"], rollout
        with jax.set_mesh(self.mesh):
            made = {FIELDS[name]: watch.on(name, score)(*seen) for name, score in self.scores.items()}
            learn = watch.on("learning", self.learn)
            return learn(state, rollout, Assessed(**made), given.get("pretraining", {}))[0]

    def _state(self) -> RLState:
        """The first one once more: an iteration uses its state up."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.first))

    def round(self) -> Round:
        watch = Stopwatch()
        self.iterate(watch)
        inside = dict(watch.seconds)
        whole = inside.pop("iteration")
        given = watch.given["program"][1]
        self.pieces(watch, given)
        found = watch.seconds | {"host": whole - sum(inside.values())}
        lengths = np.asarray(given["rollout"].answer_lengths)
        parts = {part: found[part] for part in self.parts}
        return Round(whole, parts, len(lengths), int(lengths.sum()))


def demo() -> tuple[ModelConfig, list[RLConfig]]:
    """The demo's model, and its stages of reinforcement."""
    stages: tuple[StageConfig, ...] = load_config_file(str(DEMO)).stages
    vocabulary = next(stage.vocab_size for stage in stages if isinstance(stage, TokenizerConfig))
    shape = next(stage.model for stage in stages if isinstance(stage, PretrainConfig))
    stages_of_rl = [stage for stage in stages if isinstance(stage, RLConfig)]
    return dataclasses.replace(shape, vocab_size=vocabulary).complete(), stages_of_rl


def write_inputs(folder: Path, shape: ModelConfig, config: RLConfig, count: int) -> RLConfig:
    """Writes random models and `count` prompts; returns the config with these in place of its own."""
    # A name for every row of the embedding, as a trained tokenizer has.
    rest = shape.vocab_size - ByteTokenizer(BASIC_TOKENS).vocab_size
    tokenizers.save(ByteTokenizer((*BASIC_TOKENS, *(f"<{n}>" for n in range(rest)))), folder / "tokenizer")
    heads: dict[str, tuple[str, ...]] = {"policy": ()}
    if config.reward_model:
        heads["reward"] = tuple(criterion.name for criterion in config.criteria)
    for seed, (name, criteria) in enumerate(heads.items()):
        made = dataclasses.replace(shape, criteria=criteria)
        params = jax.jit(functools.partial(initialize, define_model(made), seed))()
        facts: Any = dict(inputs={}, config={}, facts={})
        model_directory.write(folder / name, params, made, folder / "tokenizer", **facts)
    draw = random.Random(0)
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for _ in range(count):
            # Letters are tokens, and BOS is one.
            text = "".join(draw.choices(string.ascii_lowercase, k=config.max_prompt_tokens - 1))
            file.write(json.dumps({"prompt": text, "target": text[:8]}) + "\n")
    return dataclasses.replace(
        config,
        workdir=str(folder),
        model=str(folder / "policy"),
        reward_model=str(folder / "reward") if config.reward_model else "",
        sources=(ChatSource(name="train", path=str(folder / "prompts.jsonl")),),
        gold=None,
    )


def of_size(config: RLConfig, answers: int) -> RLConfig:
    """The config with another size of rollout; minibatches stay as they are, or are the whole of a smaller rollout."""
    minibatch = min(config.minibatch_answers, answers)
    return dataclasses.replace(config, prompts=answers // config.samples, minibatch_answers=minibatch)


def measure(
    shape: ModelConfig, config: RLConfig, answers: Sequence[int], repeats: int, mesh: Mesh
) -> dict[int, list[Round]]:
    """Rounds of each size, which take turns, after one that compiles."""
    with tempfile.TemporaryDirectory() as folder, progress(config.name, len(answers) * (repeats + 1)) as bar:
        config = write_inputs(Path(folder), shape, config, max(answers))
        cases = {size: Case(of_size(config, size), mesh) for size in answers}
        rounds: dict[int, list[Round]] = {size: [] for size in cases}
        for _ in range(repeats + 1):
            for size, case in cases.items():
                rounds[size].append(case.round())
                bar.advance(1)
    return {size: found[1:] for size, found in rounds.items()}


def table(measured: dict[int, list[Round]]) -> rich.table.Table:
    """Groups and parts down, sizes of rollout across."""
    layout: Any = dict(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    made = rich.table.Table(**layout)
    made.add_column("\npart", no_wrap=True)
    for size in measured:
        for column in (f"{size} answers\nseconds", "\nshare", "\ngrowth"):
            made.add_column(column, justify="right", no_wrap=True)

    def add(label: str, seconds: Callable[[Round], float], **style: Any) -> None:
        made.add_row(label, *(cell for size in measured for cell in cells(measured, size, seconds)), **style)

    first = next(iter(measured.values()))[0]
    for group, parts in GROUPS.items():
        inner = [part for part in parts if part in first.parts]
        add(group, lambda one, group=group: one.group(group), style="bold")
        for part in inner if len(inner) > 1 else ():
            add(f"  {part}", lambda one, part=part: one.parts[part])
    made.add_section()
    add("parts together", lambda one: sum(one.parts.values()))
    add("iteration", lambda one: one.whole, style="bold")
    made.add_section()
    rates: dict[str, Callable[[Round], float]] = {
        "answers/s": lambda one: one.answers / one.whole,
        "answers' tokens/s": lambda one: one.tokens / one.whole,
        # An answer's first token is drawn with the prefill.
        "decoding, tokens/s": lambda one: (one.tokens - one.answers) / one.parts["decoding"],
    }
    for label, rate in rates.items():
        found = [statistics.median(map(rate, rounds)) for rounds in measured.values()]
        made.add_row(label, *(cell for value in found for cell in (f"{value:,.1f}", "", "")))
    return made


def cells(measured: dict[int, list[Round]], size: int, seconds: Callable[[Round], float]) -> tuple[str, str, str]:
    """Median and half the range; the share of the iteration; the time an answer over that at the smallest size."""
    median = lambda size: statistics.median(map(seconds, measured[size]))
    whole = statistics.median(one.whole for one in measured[size])
    found, smallest = sorted(map(seconds, measured[size])), min(measured)
    spread = (found[-1] - found[0]) / 2 / median(size) if found[-1] else 0.0
    growth = f"{median(size) / size / (median(smallest) / smallest):.2f}" if size > smallest else ""
    return f"{median(size):.3f} ±{spread:3.0%}", f"{median(size) / whole:.0%}", growth


def sizes(text: str) -> list[int]:
    """
    >>> sizes("64,16")
    [16, 64]
    """
    return sorted({int(part) for part in text.split(",")})


def describe(shape: ModelConfig, config: RLConfig) -> str:
    return (
        f"{config.name}: {define_model(shape).parameter_count() / 1e6:.1f} M parameters, prompts of "
        f"{config.max_prompt_tokens} tokens, answers of {config.max_tokens}, {config.samples} a prompt, minibatches of "
        f"at most {config.minibatch_answers}, passes: {config.passes}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", type=sizes, default="16,64,128", help="sizes of rollout (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="iterations of each that count (default: %(default)s)")
    parser.add_argument("--stage", default="", help="one of the demo's stages, such as ppo (default: all)")


def main(answers: Sequence[int], repeats: int, only: str) -> None:
    """Prints a table for each of the demo's stages. Raises UserError for sizes that a stage cannot have."""
    shape, stages = demo()
    chosen = [config for config in stages if only in ("", config.name)]
    if not chosen:
        raise UserError(f"--stage: the demo has no {only!r}" + nearest(only, [config.name for config in stages]))
    if repeats < 1:
        raise UserError(f"--repeats: got {repeats}; 1 or more is needed")
    for config in chosen:
        for size in answers:
            if size < 1 or size % config.samples:
                raise UserError(f"--answers: {size} are no multiple of {config.name}'s {config.samples} a prompt")
            of_size(config, size)
    console = rich.console.Console(highlight=False)
    # A pipe has no width: 80 columns would break the lines.
    console.width = max(console.width, 120)
    for config in chosen:
        measured = measure(shape, config, answers, repeats, sharding.make_mesh(config.mesh))
        console.print(f"\n{describe(shape, config)}", table(measured), sep="\n")
    console.print(
        f"Medians of {repeats}; ±: half the range; share: of the iteration; growth: seconds an answer, over those at "
        f"{min(answers)} answers"
    )
