"""Losses of pairs of answers, one better than the other: plain functions of log-probabilities, nats.

What they take is summed over an answer's tokens, its stop token included, or divided by their number:

    log-ratio     log p(answer) - log p_reference(answer)        DPO, IPO, KTO
    mean          log p(answer) / tokens                         ORPO, SimPO, which have no reference

`losses` of pairs by a config's method; the caller weighs them (a prompt's pairs weigh 1 in all), adds them up over the
global batch and divides once, by its prompts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.base.arrays import Array, Float
from jaxlm.preference.config import DPOConfig, KTOConfig, ORPOConfig, SimPOConfig
from jaxlm.reward.losses import pair_losses


class Answers(NamedTuple):
    """The chosen or the rejected answers of R pairs."""

    logprobs: Float[Array, "R"]
    """summed over the answer's tokens"""
    tokens: Float[Array, "R"]
    reference: Float[Array, "R"]
    """`logprobs` of the reference; of no meaning where a method has none"""

    def ratios(self, normalised: bool = False) -> Float[Array, "R"]:
        """log p - log p_reference of the answer, or of its mean token."""
        each = self.logprobs - self.reference
        return each / self.tokens if normalised else each

    def means(self) -> Float[Array, "R"]:
        return self.logprobs / self.tokens


def dpo(
    chosen: Float[Array, "R"], rejected: Float[Array, "R"], beta: float, label_smoothing: float = 0.0
) -> Float[Array, "R"]:
    """-(1 - ε) log σ(β Δ) - ε log σ(-β Δ), with Δ the difference of the two log-ratios.

    Rafailov et al. 2023 (arXiv:2305.18290, equation 7). ε, the share of labels taken to be wrong: "A note on DPO with
    noisy preferences" (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf). Of log-ratios divided by the answers' lengths:
    length-normalised DPO (Lambert et al. 2024, arXiv:2411.15124, section 5.1).
    """
    right, wrong = (pair_losses(beta * a, beta * b) for a, b in ((chosen, rejected), (rejected, chosen)))
    return (1 - label_smoothing) * right + label_smoothing * wrong


def ipo(chosen: Float[Array, "R"], rejected: Float[Array, "R"], beta: float) -> Float[Array, "R"]:
    """(Δ - 1 / 2β)²: the margin is to be 1 / 2β, no more (Azar et al. 2023, arXiv:2310.12036, equation 17, τ = β).

    The paper's is of whole log-ratios; TRL's, after its authors' code, of log-ratios divided by the answers' lengths.
    """
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def kto(
    chosen: Float[Array, "R"],
    rejected: Float[Array, "R"],
    kl: Float[Array, ""],
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "R"]:
    """Mean of λ_D (1 - σ(β (r - z))) of the chosen and λ_U (1 - σ(β (z - r))) of the rejected answer, r its log-ratio.

    Ethayarajh et al. 2024 (arXiv:2402.01306, section 4). Each answer is judged alone, against `kl`, z: how far
    the policy is from the reference on answers of other prompts, 0 or more, which gets no gradient.
    """
    point = jnp.broadcast_to(jax.lax.stop_gradient(jnp.maximum(kl, 0)), chosen.shape)
    desirable = desirable_weight * jax.nn.sigmoid(-beta * (chosen - point))
    undesirable = undesirable_weight * jax.nn.sigmoid(-beta * (point - rejected))
    return (desirable + undesirable) / 2


def orpo(chosen: Float[Array, "R"], rejected: Float[Array, "R"], weight: float) -> Float[Array, "R"]:
    """-log p of the chosen answer's mean token - λ log σ(log odds of the chosen - log odds of the rejected answer).

    Of means (Hong et al. 2024, arXiv:2403.07691, equations 2, 4, 6 and 7).
    """
    return -chosen + weight * pair_losses(log_odds(chosen), log_odds(rejected))


def log_odds(means: Float[Array, "R"]) -> Float[Array, "R"]:
    """log(p / (1 - p)) of log p. A p that rounds to 1 counts as 1 - 1e-7: its odds would be infinite."""
    below = jnp.minimum(means, -1e-7)
    # Each form keeps its digits where the other has none: near p = 1, and near p = 0.
    against = jnp.where(below > -0.5, jnp.log(-jnp.expm1(below)), jnp.log1p(-jnp.exp(below)))
    return below - against


def simpo(chosen: Float[Array, "R"], rejected: Float[Array, "R"], beta: float, margin: float) -> Float[Array, "R"]:
    """-log σ(β (chosen - rejected) - γ), of means (Meng et al. 2024, arXiv:2405.14734, equation 6)."""
    return pair_losses(beta * chosen, beta * rejected, margin)


class PairLosses(NamedTuple):
    """Of R pairs."""

    loss: Float[Array, "R"]
    chosen: Float[Array, "R"]
    """the implicit reward that the loss compares; without gradient"""
    rejected: Float[Array, "R"]


def losses(
    method: DPOConfig | KTOConfig | ORPOConfig | SimPOConfig,
    chosen: Answers,
    rejected: Answers,
    kl: Float[Array, ""],
) -> PairLosses:
    """By the method's own formula; `kl` is KTO's.

    Rewards: β times the log-ratio (DPO, IPO, KTO) or the mean (SimPO), λ times the log odds (ORPO).
    """
    if isinstance(method, DPOConfig):
        a, b = (side.ratios(method.length_normalised) for side in (chosen, rejected))
        each = ipo(a, b, method.beta) if method.loss == "ipo" else dpo(a, b, method.beta, method.label_smoothing)
        scale = method.beta
    elif isinstance(method, KTOConfig):
        a, b = chosen.ratios(), rejected.ratios()
        each = kto(a, b, kl, method.beta, method.desirable_weight, method.undesirable_weight)
        scale = method.beta
    elif isinstance(method, ORPOConfig):
        each = orpo(chosen.means(), rejected.means(), method.weight)
        a, b, scale = log_odds(chosen.means()), log_odds(rejected.means()), method.weight
    else:
        a, b, scale = chosen.means(), rejected.means(), method.beta
        each = simpo(a, b, method.beta, method.margin)
    return PairLosses(each, *jax.lax.stop_gradient((scale * a, scale * b)))
