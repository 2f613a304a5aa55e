"""Rewards that programs give, on the host: each prompt's own verifiers, made from its record."""

import math
from collections.abc import Sequence

from jaxlm.feedback.config import VerifierConfig
from jaxlm.feedback.verifying import verifier_for
from jaxlm.rl.prompts import Prompt
from jaxlm.sample.sampler import Completion


class Judge:
    """The verifiers of all prompts, made before the first rollout, so that a bad record is refused at the start."""

    def __init__(self, configs: Sequence[VerifierConfig], prompts: Sequence[Prompt], field: str):
        self._parts = [
            [
                (config.weight, verifier_for(config, prompt.record, f"{field}: {prompt.where or prompt.number}"))
                for config in configs
            ]
            for prompt in prompts
        ]
        self.prompts = len(prompts)

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """The weighted sum for each completion; as many for each prompt as there are."""
        samples = len(completions) // len(prompts)
        return [
            math.fsum(
                weight * verify(prompt.text, completion.text).score for weight, verify in self._parts[prompt.number]
            )
            for index, completion in enumerate(completions)
            for prompt in [prompts[index // samples]]
        ]
