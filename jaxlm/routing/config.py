"""Config of the training of routers; standard library only."""

import dataclasses

from jaxlm.base.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How the routers of a mixture of experts are kept in balance; without experts it has no effect. Under adapters
    routers are frozen: then the losses move what feeds them, and no choice bias moves."""

    balance_loss: float = 0.01
    """Weight of the load-balancing loss, which is 1 where all experts are chosen alike (arXiv:2101.03961)."""
    router_z_loss: float = 0.001
    """Weight of log²(normaliser) of the router's logits (arXiv:2202.08906)."""
    bias_rate: float = 0.001
    """By how much a choice bias moves each step, up or down (model.experts.choice_bias; arXiv:2412.19437, section
    4.2); balance_loss can be 0 or 1e-4 then."""

    def __post_init__(self):
        for field in ("balance_loss", "router_z_loss", "bias_rate"):
            check(getattr(self, field) >= 0, field, f"got {getattr(self, field)}; 0 (none) or more is needed")
