"""Step 0 of SFT, pair reward and preferences against TRL's trainers, on the same tiny weights and ids, in float32.

`make_trl_numbers.py` makes weights and data on both sides and says how TRL's numbers are made. Stored ones are
compared always, fresh ones as well where JAXLM_TRL_PYTHON names a Python that has TRL.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trl_tool import SHAPE, SOURCES, Numbers, close, numbers, tool, weights

from jaxlm.base.metrics import values
from jaxlm.data.config import ChatSource
from jaxlm.data.rows import Piece, expand
from jaxlm.distill.teaching import CrossEntropy
from jaxlm.model.config import ModelConfig
from jaxlm.preference import ranked
from jaxlm.preference.batches import PreferenceBatches, Reference
from jaxlm.preference.config import DPOConfig, KTOConfig, ORPOConfig, PreferenceConfig, SimPOConfig
from jaxlm.preference.scoring import answer_logprobs
from jaxlm.reward.config import RankingSource, RewardConfig
from jaxlm.stages import preference, reward, sft
from jaxlm.stages.config import SFTConfig
from jaxlm.train import optimizer as optimizers
from jaxlm.train.state import initial_state

pytestmark = pytest.mark.slow

# The last line of `make_trl_numbers.py` with trl 1.12.0, transformers 5.23.0, torch 2.13.0+cpu, numpy 2.4.6.
STORED: dict[str, dict[str, Any]] = {
    "sft": {"loss": 4.6370478, "gradient_norm": 1.9435091},
    "sft accumulated": {"loss": 4.6370468, "gradient_norm": 1.9435091},
    "reward": {"loss": 0.58228123, "gradient_norm": 2.5784936},
    "reward margin": {"loss": 0.80710787, "gradient_norm": 3.0716209},
    "reward centring": {"loss": 0.63326353, "gradient_norm": 2.9354992},
    "dpo": {
        "loss": 0.54523218,
        "gradient_norm": 0.84305501,
        "mean chosen": -19.989113,
        "mean rejected": -30.231173,
        "policy chosen": [-30.18469, -11.966581, -28.406368, -9.3988075],
        "policy rejected": [-18.526014, -50.466751, -29.316523, -22.615402],
        "reference chosen": [-33.147343, -11.365578, -24.574619, -10.399635],
        "reference rejected": [-16.550346, -44.347687, -24.97846, -21.24357],
    },
    "ipo": {
        "loss": 19.934765,
        "gradient_norm": 36.751869,
        "mean chosen": -19.989113,
        "mean rejected": -30.231173,
    },
    "dpo normalised": {
        "loss": 0.66630399,
        "gradient_norm": 0.20160253,
        "mean chosen": -19.989113,
        "mean rejected": -30.231173,
    },
    "kto": {
        "loss": 0.51098013,
        "gradient_norm": 0.27815494,
        "mean chosen": -19.989113,
        "mean rejected": -30.231173,
        "kl": 0.0,
    },
    "kto turned": {
        "loss": 0.6076231,
        "gradient_norm": 0.28888771,
        "mean chosen": -19.871794,
        "mean rejected": -26.780016,
        "kl": 2.1395068,
    },
    # Their log-probabilities are those of the mean token.
    "orpo": {
        "loss": 4.779552,
        "gradient_norm": 3.5631092,
        "mean chosen": -4.4185371,
        "mean rejected": -4.4600677,
    },
    "simpo": {
        "loss": 0.82702565,
        "gradient_norm": 4.9581714,
        "mean chosen": -4.4336891,
        "mean rejected": -4.7718363,
    },
}


@pytest.fixture(scope="module", params=SOURCES)
def trl(request) -> Numbers:
    return numbers(request, "make_trl_numbers", STORED)


def first_step(
    stage: Any, config: Any, shape: ModelConfig, batch: dict[str, np.ndarray], model: str = "policy", **more: Any
) -> dict[str, float]:
    """What the stage's own step measures."""
    definition, params = weights(model, shape)
    optimizer = optimizers.make_optimizer(config.optimizer, definition)
    step = functools.partial(stage.train_step, config=config, definition=definition, optimizer=optimizer, **more)
    return values(jax.jit(step)(initial_state(params, optimizer, ema=False), batch)[1])


@pytest.mark.parametrize(
    ("chats", "more"),
    [
        ([[0], [1], [2], [3], [4]], {}),
        ([[0, 1], [2, 3], [4], []], {"accumulate": 2, "loss_chunk_tokens": 32}),
    ],
    ids=["a chat a row, as TRL has them", "packed, in pieces"],
)
def test_sft(trl, chats, more):
    pieces = [Piece(np.array(one.ids), n, np.array(one.targets, bool)) for n, one in enumerate(tool.CHATS)]
    rows = [expand([pieces[n] for n in row], 32, tool.PAD) for row in chats]
    config = SFTConfig(
        model="unread", sources=(ChatSource(name="unread", path="unread"),), batch_rows=len(rows), **more
    )
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    measured = first_step(sft, config, SHAPE, batch, learnt=CrossEntropy())
    # TRL too divides by the targets of all accumulated batches, of which one has 3 and another 14.
    for name in ("sft", "sft accumulated"):
        close(measured["train/loss"], trl[name]["loss"])
        close(measured["train/gradient_norm"], trl[name]["gradient_norm"])


@pytest.mark.parametrize(
    ("name", "margins", "centring"),
    [("reward", False, 0.0), ("reward margin", True, 0.0), ("reward centring", False, tool.CENTRING)],
)
def test_pair_reward(trl, name, margins, centring):
    prompts = [
        ranked.Prompt(
            name=str(number),
            answers=[np.array(one.prompt + one.chosen), np.array(one.prompt + one.rejected)],
            pairs=[ranked.Pair(0, 1, criterion=0, weight=1.0, margin=one.margin if margins else 0.0)],
            prefix=len(one.prompt),
        )
        for number, one in enumerate(tool.PAIRS)
    ]
    batch = ranked.RankingBatches(prompts, rows=4, row_length=32, pairs=4, seed=0, pieces=2).batch(0)
    # Each prompt has one pair: the mean over prompts is TRL's over pairs.
    assert batch["prompts"] == len(prompts)
    config = RewardConfig(
        model="unread",
        sources=(RankingSource(name="unread", path="unread"),),
        centring=centring,
        batch_rows=4,
        batch_pairs=4,
        accumulate=2,
    )
    measured = first_step(reward, config, dataclasses.replace(SHAPE, criteria=("overall",)), batch)
    close(measured["reward/loss"], trl[name]["loss"])
    # TRL's head has no bias b. Ours gets a gradient from centring: d/db c (r + r' + 2b)^2 = 8 c (r + r') / 2.
    bias = 8 * centring * measured["reward/level"]
    close(np.sqrt(measured["train/gradient_norm"] ** 2 - bias**2), trl[name]["gradient_norm"])


def preferences(pairs: list, method: dict[str, Any], reference: str) -> tuple[PreferenceConfig, dict[str, np.ndarray]]:
    """The config, and a batch of the pairs, packed and in two pieces, with what the model `reference` says of them."""
    prompts = [
        ranked.Prompt(
            name=str(number),
            answers=[np.array(one.prompt + answer, np.int32) for answer in (one.chosen, one.rejected)],
            pairs=[ranked.Pair(0, 1, criterion=0, weight=1.0)],
            prefix=len(one.prompt),
            targets=[np.arange(len(one.prompt + x)) >= len(one.prompt) for x in (one.chosen, one.rejected)],
        )
        for number, one in enumerate(pairs)
    ]
    config = PreferenceConfig(
        model="unread",
        sources=(RankingSource(name="unread", path="unread"),),
        batch_rows=8,
        batch_pairs=8,
        accumulate=2,
        loss_chunk_tokens=32,
        **method,
    )
    others = config.kto is not None
    made = PreferenceBatches(prompts, others=others, rows=8, row_length=32, pairs=8, seed=0, pieces=2)
    if config.has_reference:
        values = [logprobs(reference, ids, targets) for ids, targets in zip(*answers_of(made, own=True), strict=True)]
        strange = [logprobs(reference, ids, targets) for ids, targets in zip(*answers_of(made, own=False), strict=True)]
        made.reference = Reference(np.array(values, np.float32), np.array(strange, np.float32))
    batch = made.batch(0)
    assert batch["prompts"] == len(pairs)
    return config, batch


def answers_of(made: PreferenceBatches, own: bool) -> tuple[list, list]:
    """(ids, targets) of all answers, or of all that stand for answers to other prompts."""
    found = [(p.answers, p.targets) for p in made.prompts] if own else made.others
    return [x for ids, _ in found for x in ids], [x for _, targets in found for x in targets]


def logprobs(model: str, ids: np.ndarray, targets: np.ndarray) -> float:
    """An answer's log-probability under the tool's weights, alone in its row."""
    definition, params = weights(model, SHAPE)
    row = expand([Piece(ids, 0, targets)], 32, tool.PAD)
    rows = {name: jnp.asarray(x)[None, :] for name, x in row.items()}
    return float(scored(definition, params, rows)[len(ids) - 1])


scored = jax.jit(lambda definition, params, rows: answer_logprobs(params, rows, definition), static_argnums=0)


PREFERENCES: dict[str, tuple[dict[str, Any], str, str]] = {
    "dpo": (dict(dpo=DPOConfig(beta=tool.BETA)), "policy", "reference"),
    "ipo": (dict(dpo=DPOConfig(beta=tool.BETA, loss="ipo", length_normalised=True)), "policy", "reference"),
    "dpo normalised": (dict(dpo=DPOConfig(beta=tool.BETA, length_normalised=True)), "policy", "reference"),
    "kto": (dict(kto=KTOConfig(beta=tool.BETA, undesirable_weight=tool.UNDESIRABLE)), "policy", "reference"),
    "kto turned": (dict(kto=KTOConfig(beta=tool.BETA, undesirable_weight=tool.UNDESIRABLE)), "reference", "policy"),
    "orpo": (dict(orpo=ORPOConfig(weight=tool.ODDS_WEIGHT)), "policy", ""),
    "simpo": (dict(simpo=SimPOConfig(beta=tool.SIMPO_BETA, margin=tool.SIMPO_MARGIN)), "policy", ""),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(trl, name):
    method, policy, reference = PREFERENCES[name]
    config, batch = preferences(tool.EVEN_PAIRS if name == "orpo" else tool.PAIRS, method, reference)
    measured = first_step(preference, config, SHAPE, batch, model=policy)
    close(measured["preference/loss"], trl[name]["loss"])
    close(measured["train/gradient_norm"], trl[name]["gradient_norm"])
    if config.has_reference:
        close(measured["preference/chosen_logprob"], trl[name]["mean chosen"])
        close(measured["preference/rejected_logprob"], trl[name]["mean rejected"])
    if config.kto:
        close(max(measured["preference/kl"], 0.0), trl[name]["kl"])


def test_log_probabilities_of_answers(trl):
    for model in ("policy", "reference"):
        for side in ("chosen", "rejected"):
            found = []
            for one in tool.PAIRS:
                ids = np.array(one.prompt + getattr(one, side))
                found.append(logprobs(model, ids, np.arange(len(ids)) >= len(one.prompt)))
            close(found, trl["dpo"][f"{model} {side}"])
