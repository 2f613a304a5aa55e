"""What a policy does on prompts that nothing is learned from."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.base import metrics, sharding
from jaxlm.model.weights import Params
from jaxlm.rl import rollout as rollouts
from jaxlm.rl.config import RLConfig
from jaxlm.rl.learner import Models, RLState, assess, rollout_figures, rollout_sums
from jaxlm.rl.prompts import Prompt
from jaxlm.rl.rolling import Roller


def evaluator(
    config: RLConfig, models: Models, roller: Roller, heldout: Sequence[Prompt], frozen: Any, mesh: Mesh
) -> Callable[[RLState], dict[str, float]]:
    """state → the policy's figures on held-out prompts, one answer each, drawn with random numbers of their own.

    Of the averaged policy if there is one: it is what the stage makes.
    """
    rows = config.minibatch_answers
    like = rollouts.abstract(mesh, rows, roller.row_length, config.max_tokens)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def measure(policy: Params, value: Params, frozen: Any, rollout: rollouts.Rollout) -> Any:
        assessed = assess(config, models, policy, value, frozen, rollout)
        return rollout_sums(rollout, assessed, rollout.scores + assessed.model_scores)

    def evaluate(state: RLState) -> dict[str, float]:
        total: Any = None
        gold: Any = None
        policy = state.policy.ema or state.policy.params
        value = state.value.params if state.value else {}
        for at in range(0, len(heldout), rows):
            asked = heldout[at : at + rows]
            made, _, measured = roller.roll(policy, asked, 0, samples=1, seed=config.seed + 1, rows=rows)
            sums = measure(policy, value, frozen, rollouts.place(made, like))
            total = metrics.merge(total, sums) if total is not None else sums
            if "rl/gold" in measured:
                gold = metrics.merge(gold, measured["rl/gold"]) if gold is not None else measured["rl/gold"]
        if total is None:
            return {}
        return rollout_figures(total, "eval/") | (metrics.values({"eval/gold": gold}) if gold is not None else {})

    return evaluate
