"""Held-out rankings in the course of training: figures of a state, and the report at the end."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxlm.base import metrics, sharding
from jaxlm.model.weights import Definition, Params
from jaxlm.preference import figures, records
from jaxlm.preference.batches import PreferenceBatches, placed
from jaxlm.preference.config import PreferenceConfig
from jaxlm.preference.ranked import RankingBatches
from jaxlm.preference.rewards import piece_sums, placed_batch, scores_of
from jaxlm.preference.scoring import answer_logprobs, as_metrics, pair_losses, reference_point, weighted_sums
from jaxlm.reward.config import RewardConfig
from jaxlm.train.state import Program, TrainState


class RankingHeldout:
    """Held-out rankings: the figures of a state's parameters."""

    def __init__(self, config: RewardConfig, program: Program, definition: Definition, batches: RankingBatches | None):
        self.config, self.program, self.batches = config, program, batches
        whole = sharding.replicated(program.mesh)

        @functools.partial(jax.jit, out_shardings=whole)
        def measure(params: Params, batch: dict[str, jax.Array]) -> Any:
            scores = scores_of(params, batch, definition)
            criterion = batch["criterion"]
            return (
                scores[batch["better"], criterion],
                scores[batch["worse"], criterion],
                piece_sums(params, batch, definition, 0.0),
            )

        self.measure = measure

    def results(self, state: TrainState) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, float]]:
        """(batch, rewards of its better answers, those of its worse ones, its summed loss); of the average if any."""
        for batch in self.batches.heldout(self.config.heldout_batches or None) if self.batches else ():
            placed = placed_batch(self.program.mesh, batch, self.config.batch_rows // self.config.accumulate)
            better, worse, sums = jax.device_get(self.measure(self.program.whole(state.ema or state.params), placed))
            yield batch, better, worse, float(sums.loss.sum())

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """eval/loss and eval/pair_accuracy."""
        found = list(self.results(state))
        if not found:
            return {}
        pairs, _ = figures.gather(result[:3] for result in found)
        loss = sum(result[3] for result in found) / sum(float(result[0]["prompts"]) for result in found)
        return {"eval/loss": loss, "eval/pair_accuracy": figures.accuracy(pairs).share}

    def report(self, state: TrainState, encoder: records.Encoder) -> dict[str, Any]:
        """What `figures.report` says of all held-out pairs; empty without any."""
        found = [result[:3] for result in self.results(state)]
        return figures.report(*figures.gather(found), self.config.criteria, encoder.names) if found else {}


class PreferenceHeldout:
    """Held-out rankings: the figures of a state's parameters, or of their average if it has one."""

    def __init__(
        self, config: PreferenceConfig, program: Program, definition: Definition, batches: PreferenceBatches | None
    ):
        self.config, self.program, self.batches = config, program, batches

        @functools.partial(jax.jit, out_shardings=sharding.replicated(program.mesh))
        def measure(params: Params, batch: dict[str, jax.Array]) -> Any:
            kl = reference_point(config, params, batch, definition, 1)
            logprobs = answer_logprobs(params, batch, definition, config.loss_chunk_tokens)
            made = pair_losses(config, logprobs, batch, kl)
            return made.chosen, made.rejected, as_metrics(weighted_sums(made, logprobs, batch), batch["prompts"])

        self.measure = measure

    def results(self, state: TrainState) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, Any]]:
        """(batch, implicit rewards of its better answers, those of its worse ones, its metrics)."""
        for batch in self.batches.heldout(self.config.heldout_batches or None) if self.batches else ():
            given = placed(self.program, batch, self.config.batch_rows // self.config.accumulate)
            yield batch, *jax.device_get(self.measure(self.program.whole(state.ema or state.params), given))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """eval/loss, eval/pair_accuracy, and the rewards and log-probabilities."""
        found = list(self.results(state))
        if not found:
            return {}
        named = metrics.values(functools.reduce(metrics.merge, (result[3] for result in found)))
        pairs, _ = figures.gather(result[:3] for result in found)
        values = {name.replace("preference/", "eval/"): value for name, value in named.items()}
        del values["eval/accuracy"]  # of tokens, elsewhere; and of pairs, there is one for all alike
        return values | {"eval/pair_accuracy": figures.accuracy(pairs).share}

    def report(self, state: TrainState, encoder: records.Encoder) -> dict[str, Any]:
        """What `figures.report` says of all held-out pairs; empty without any."""
        found = [result[:3] for result in self.results(state)]
        return figures.report(*figures.gather(found), encoder.criteria, encoder.names) if found else {}
