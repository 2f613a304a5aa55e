"""What follows from a config of pretraining, told before it starts."""

from typing import Any

from jax.sharding import Mesh

from jaxlm.base.logging import logger
from jaxlm.model.transformer import define_model
from jaxlm.plan.flops import active_parameters, flops_per_token
from jaxlm.train import optimizer as optimizers


def announce(config: Any, mesh: Mesh) -> None:
    """Prints sizes, tokens, FLOPs and each weight's rule of a complete `PretrainConfig`."""
    definition = define_model(config.model)
    model = config.model
    tokens = config.batch_rows * config.row_length
    flops = flops_per_token(model, config.row_length)
    logger.info(
        "%s parameters (%s a token): %d layers, width %d, %d heads (%d for keys), feed-forward %d, vocabulary %d",
        *(f"{definition.parameter_count():,}", f"{active_parameters(model):,}"),
        *(model.layers, model.width, model.heads, model.kv_heads, model.feed_forward, model.vocab_size),
    )
    logger.info(
        "%d steps of %s tokens: %s tokens, %.2e FLOPs; peak learning rate %.2e",
        config.steps,
        f"{tokens:,}",
        f"{config.steps * tokens:,}",
        flops * tokens * config.steps,
        config.schedule.peak,
    )
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    logger.info("mesh: %s of %s", shape, mesh.devices.flat[0].device_kind)
    if model.scan_layers and mesh.devices.flat[0].platform == "cpu":
        # XLA's CPU path runs a scan's elementwise work on one core: a step of 16.9 M takes 1.6 times as long.
        logger.info("on a CPU, model.scan_layers=false makes steps faster (and compiling longer)")
    for path, size, rule in optimizers.table(definition, config.optimizer):
        logger.info("  %-28s %-18s %s", path, size, rule)
