"""A linear-Gaussian process with a quadratic reward, and its exact denoiser: what samplers and guides are held to."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from offline_cai.diffusion.evidence import Return
from offline_cai.diffusion.exact import ExactDenoiser, gaussian_kl
from offline_cai.diffusion.schedule import Schedule
from offline_cai.inference.gaussian import GaussianLaw, LinearGaussian, QuadraticReward
from offline_cai.inference.temperatures import gaussian_temperature

HORIZON, WIDTH, BUDGET = 5, 3, 5.0  # rows [position, velocity, force]
F64 = torch.float64


class Problem(NamedTuple):
    """A prior, what is known of it, and evidence `BUDGET` nats away."""

    prior: LinearGaussian
    schedule: Schedule
    denoiser: ExactDenoiser  # given what is known
    reward: QuadraticReward
    temperature: float
    free: Tensor  # [d] bool
    posterior: GaussianLaw

    @property
    def evidence(self) -> dict[str, object]:
        """Arguments that every guide takes."""
        return {"evidence": Return(self.reward, quadratic=True), "temperature": self.temperature}

    def kl(self, mean: Tensor, covariance: Tensor, law: GaussianLaw) -> float:
        """KL of N(mean [d], covariance [d, d]) to a law, over the free numbers."""
        f = self.free
        return gaussian_kl(mean[f], covariance[f][:, f], law.mean.flatten()[f], law.covariance[f][:, f])


def make_problem(last: bool, levels: int = 64) -> Problem:
    """The first state is known, and the last one if `last`."""
    prior = LinearGaussian(
        [[1.0, 0.5], [0.0, 0.8]],
        [[0.0], [0.6]],
        horizon=HORIZON,
        initial_mean=[0.2, -0.1],
        initial_covariance=torch.diag(torch.tensor([1.0, 0.6])),
        action_covariance=[[0.8]],
        noise_covariance=torch.diag(torch.tensor([0.05, 0.1])),
        gain=[[-0.4, -0.5]],
    )
    value, mask = torch.zeros(HORIZON, WIDTH, dtype=F64), torch.zeros(HORIZON, WIDTH, dtype=torch.bool)
    value[0, :2], mask[0, :2] = torch.tensor([-0.8, 0.5], dtype=F64), True
    if last:
        value[-1, :2], mask[-1, :2] = torch.tensor([0.6, 0.0], dtype=F64), True
    target = torch.zeros(HORIZON, WIDTH, dtype=F64)
    target[:, 0] = torch.linspace(-1.0, 1.5, HORIZON)
    reward = QuadraticReward.toward(target, torch.diag(torch.tensor([1.0, 0.1, 0.05], dtype=F64)))
    given, free = prior.posterior(known=(value, mask)), ~mask.flatten()
    weight, linear = torch.block_diag(*reward.over(HORIZON, WIDTH)[0]), reward.over(HORIZON, WIDTH)[1].flatten()
    gradient = (linear - weight @ given.mean.flatten())[free]
    covariance = given.covariance[free][:, free]
    temperature = gaussian_temperature(gradient, covariance, BUDGET, weight[free][:, free])
    schedule = Schedule(levels).double()
    denoiser = ExactDenoiser(prior, schedule, value, mask)
    posterior = prior.posterior(reward, temperature=temperature, known=(value, mask))
    return Problem(prior, schedule, denoiser, reward, temperature, free, posterior)


@pytest.fixture(scope="module", params=[False, True], ids=["first given", "first and last given"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(request.param)
