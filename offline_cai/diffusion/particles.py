"""Sequential Monte Carlo over a guided sampler: weighted plans, and the evidence for them.

A guide's steps are only as good as its approximation; weights correct it. K particles of each plan go down the levels
together, each weighted by what its guide's proposal got wrong, and are resampled when few of them carry the weight.
As K grows their law becomes (the unguided sampler's own law) · exp(evidence): its reverse variance has to be right.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Known
from offline_cai.diffusion.evidence import Evidence, require_temperature
from offline_cai.diffusion.residual import Residual
from offline_cai.diffusion.sampler import (
    Belief,
    Denoise,
    Guide,
    Guided,
    ReverseVariance,
    bounded,
    first_noise,
    unguided,
    walk,
)
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError
from offline_cai.inference.smc import effective_sample_size, systematic


class Population(NamedTuple):
    """K weighted particles of each of N plans."""

    x: Tensor  # [N, K, R, D]
    log_weight: Tensor  # [N, K] nats; the weights of a plan add up to one
    log_evidence: Tensor  # [N] nats: log E[exp(evidence)] under the sampler's own law, given what is known
    evidence: Tensor  # [N, K] nats, of each particle
    resampled: Tensor  # [N], how often

    @property
    def effective(self) -> Tensor:
        """The effective sample size of the weights, [N]."""
        return effective_sample_size(self.log_weight)

    @property
    def kl(self) -> Tensor:
        """The nats between the posterior and the sampler's own law, estimated from the particles, [N]."""
        return (self.log_weight.exp() * self.evidence).sum(1) - self.log_evidence


@torch.no_grad()
def sequential(
    denoiser: Denoise,
    schedule: Schedule,
    known: Known,
    key: Tensor,
    steps: int,
    particles: int,
    clip: float | None = 1.0,
    *,
    guide: Guide,
    evidence: Evidence,
    temperature: float,
    reverse_variance: ReverseVariance = "analytic",
    residual: Residual | None = None,
    keep: float = 0.5,
) -> Population:
    """Twisted sequential Monte Carlo (Wu et al. 2023, algorithm 1) with a guide's steps as the proposal.

    The target at level k is (the reverse process down to k) · exp(the guide's estimate of log E[exp(evidence) | x_k]),
    and at the end · exp(evidence) itself. A step without noise is taken unguided, for no weight could correct it.

    Args:
        known: conditions [N, R, D] of N plans; steps, clip, reverse_variance and residual as in `sampler.ddim`.
        particles: K of each plan.
        guide: the proposal, with its evidence; `sampler.unguided` weighs at the end alone.
        evidence: about x_0.
        keep: resample a plan's particles when their effective sample size falls below this share of K.

    Raises:
        UserError: a guide whose steps have no density (a projection), evidence for noised rows, or no particle that
            explains the evidence; a temperature that is not positive.
    """
    require_temperature(temperature)
    if evidence.noisy:
        raise UserError(
            "weights need evidence about x_0, and this was learned for noised rows: use it in the guide only."
        )
    if particles < 1:
        raise UserError(f"{particles} particles were asked for; take at least 1.")
    plans, shape = len(key), tuple(known.value.shape[1:])
    own = seeding.split(key, particles).flatten()
    known = Known(*(part.repeat_interleave(particles, 0) for part in known))
    x, denoise = first_noise(known, own), bounded(denoiser, known, clip)
    log_weight = x.new_zeros(plans, particles, dtype=torch.float64)
    log_evidence, resampled = torch.zeros_like(log_weight[:, 0]), torch.zeros_like(key)
    for step in walk(schedule, known, steps, 1.0, reverse_variance, residual):
        guided = guide(denoise, x, step)
        log_weight = log_weight + guided.log_evidence.double().view(plans, particles)
        _explained(log_weight)
        few = effective_sample_size(log_weight) < keep * particles
        if few.any():
            shift = seeding.uniform(key, (1,), stream=-1 - step.number)
            index = torch.where(few[:, None], systematic(log_weight, shift=shift), torch.arange(particles).to(key))
            flat = (index + torch.arange(plans).to(key)[:, None] * particles).flatten()
            x, guided = x[flat], _select(guided, flat)
            mean = torch.logsumexp(log_weight, 1) - math.log(particles)
            log_evidence = torch.where(few, log_evidence + mean, log_evidence)
            log_weight = torch.where(few[:, None], 0.0, log_weight)
            resampled = resampled + few
        unsteered = unguided(denoise, x, step).posterior if guided.prior is None else guided.prior
        prior, proposal = step.spread(unsteered), step.spread(guided.posterior)
        expected = step.mean(x, unsteered.mean)
        if prior is None:
            x = known.impose(expected)
            ratio = torch.zeros_like(guided.log_evidence)
        elif proposal is None:
            raise UserError(
                "the guide's step has no density (it projects), so it cannot be weighed: use another guide."
            )
        else:
            mean = step.mean(x, guided.posterior.mean)
            noise = seeding.normal(own, shape, stream=step.number + 1, dtype=x.dtype)
            x = known.impose(mean + proposal.draw(noise))
            ratio = prior.log_prob(x - expected) - proposal.log_prob(x - mean)
        log_weight = log_weight + (ratio - guided.log_evidence).double().view(plans, particles)
    value = evidence(x, torch.zeros_like(own), temperature).double().view(plans, particles)
    log_weight = log_weight + value
    _explained(log_weight)
    log_evidence = log_evidence + torch.logsumexp(log_weight, 1) - math.log(particles)
    return Population(x.view(plans, particles, *shape), log_weight.log_softmax(1), log_evidence, value, resampled)


def _select(guided: Guided, index: Tensor) -> Guided:
    """The particles at `index`."""

    def of(belief: Belief) -> Belief:
        return Belief(belief.mean[index], None if belief.spread is None else belief.spread.select(index))

    prior = None if guided.prior is None else of(guided.prior)
    return Guided(prior, of(guided.posterior), guided.log_evidence[index])


def _explained(log_weight: Tensor) -> None:
    """
    Raises:
        UserError: a plan whose particles all have weight zero, or one that is not a number.
    """
    lost = ~(log_weight.amax(1).isfinite() & ~log_weight.isnan().any(1))
    if lost.any():
        raise UserError(
            f"no particle of plan {int(lost.nonzero()[0])} explains the evidence, which allows nothing that "
            "the model draws: loosen it (a softer barrier, a higher temperature) or take more particles."
        )
