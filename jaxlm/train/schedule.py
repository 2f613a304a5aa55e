"""The learning rate as a function of the step."""

import jax.numpy as jnp

from jaxlm.base.arrays import Array
from jaxlm.base.logging import logger
from jaxlm.train.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, step: Array | int, steps: int) -> Array:
    """The rate of step `step` (0 is the first) of `steps`; a float32 scalar.

    Warm-up gives step 0 already 1/warmup of the peak, so that no step is without effect; the last step gets
    `final_share` of the peak exactly.
    """
    at = jnp.asarray(step, jnp.float32)
    warm = min(config.warmup_steps, steps)
    if warm == steps:
        logger.warning("schedule.warmup_steps: the run's %d steps all warm up, and the rate never falls", steps)
    rising = (at + 1) / max(warm, 1)
    if config.kind == "wsd":
        falling_steps = max(round(config.decay_share * steps), 1)
    else:
        falling_steps = max(steps - warm, 1)
    # 0 when the fall begins, 1 at the last step.
    progress = jnp.clip((at - (steps - 1 - falling_steps)) / falling_steps, 0.0, 1.0)
    if config.kind == "cosine":
        progress = (1 - jnp.cos(jnp.pi * progress)) / 2
    share = jnp.where(at < warm, rising, 1 - (1 - config.final_share) * progress)
    return jnp.asarray(config.peak * share, jnp.float32)
