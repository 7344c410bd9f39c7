"""TRPO's products and steps against dense linear algebra, and what its line search demands."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from offline_cai import algorithms, config
from offline_cai.algorithms.sac import SAC, SACConfig
from offline_cai.algorithms.trpo import TRPO, TRPOConfig
from offline_cai.core import Batch
from offline_cai.errors import UserError
from offline_cai.policies.distributions import Categorical
from offline_cai.training import experiment, loop

KINDS = ["choices", "box"]


def build(small: SimpleNamespace, kind: str, **settings: object) -> tuple[TRPO, Batch]:
    """A small network, and 40 single steps with standardised advantages of any kind."""
    torch.manual_seed(0)
    algorithm = TRPO(getattr(small, kind)(3, 2), TRPOConfig(hidden=(5,), **settings))  # type: ignore[arg-type]
    steps = small.random_batch(algorithm.spec, 40)
    return algorithm, steps._replace(returns=(steps.returns - steps.returns.mean()) / steps.returns.std())


def dense_fisher(algorithm: TRPO, steps: Batch) -> Tensor:
    """E_s Σ over the distribution's own parameters: Jᵀ M J, with their Fisher matrix M in closed form."""
    parameters, total = list(algorithm.actor.parameters()), 0.0
    for obs in steps.obs[:, :1]:
        pi = algorithm.actor(obs)
        if isinstance(pi, Categorical):
            out, metric = pi.log_p[0], pi.log_p[0].exp()  # E_a of the outer product of the scores
        else:
            out = torch.cat([pi.mean[0], pi.std[0]])
            metric = torch.cat([pi.std[0] ** -2, 2 * pi.std[0] ** -2])
        rows = [parameters_to_vector(torch.autograd.grad(o, parameters, retain_graph=True)) for o in out]
        jacobian = torch.stack(rows)
        total = total + jacobian.T @ (metric.detach()[:, None] * jacobian)
    return total / len(steps.obs)


@pytest.mark.parametrize("kind", KINDS)
def test_its_products_and_its_step_are_those_of_dense_linear_algebra(
    kind: str, small: SimpleNamespace, float64: None
) -> None:
    algorithm, steps = build(small, kind, iterations=200, kl_budget=0.02, damping=0.05)
    before = parameters_to_vector(algorithm.actor.parameters()).detach()
    matrix = dense_fisher(algorithm, steps) + 0.05 * torch.eye(len(before))
    product = algorithm.fisher(steps)
    for v in torch.randn(3, len(before), generator=torch.Generator().manual_seed(1)):
        torch.testing.assert_close(product(v), matrix @ v)
    gain, _ = algorithm.surrogate(steps)
    gradient = parameters_to_vector(torch.autograd.grad(gain, list(algorithm.actor.parameters())))
    direction = torch.linalg.solve(matrix, gradient)
    longest = (2 * 0.02 / (direction @ matrix @ direction)).sqrt()
    trials = algorithm.natural_step(steps)["trials"]
    moved = parameters_to_vector(algorithm.actor.parameters()).detach() - before
    torch.testing.assert_close(moved, 0.8 ** (trials - 1) * longest * direction, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_an_accepted_step_keeps_the_budget_and_improves(kind: str, small: SimpleNamespace, float64: None) -> None:
    """With budgets so large that the quadratic model of the KL is wrong, so that the line search has to say no."""
    refused = 0
    for budget in (0.01, 0.5, 2.0):
        algorithm, steps = build(small, kind, kl_budget=budget, damping=1e-3)
        metrics = algorithm.natural_step(steps)
        gain, kl = (float(x.detach()) for x in algorithm.surrogate(steps))
        assert 0 < kl < budget and gain > float(steps.returns.mean()) and metrics["gain"] > 0
        refused += metrics["trials"] > 1
    assert refused


def test_the_policy_stays_if_no_trial_keeps_the_budget_or_improves(
    small: SimpleNamespace, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm, steps = build(small, "box", kl_budget=2.0, damping=1e-3, trials=1)
    before = parameters_to_vector(algorithm.actor.parameters()).detach()
    assert algorithm.natural_step(steps)["kl"] == 0, "too far"
    assert torch.equal(parameters_to_vector(algorithm.actor.parameters()), before)
    algorithm, steps = build(small, "box")
    surrogate = algorithm.surrogate
    monkeypatch.setattr(algorithm, "surrogate", lambda s: (x := surrogate(s)) and (x[0] if x[1] == 0 else -x[0], x[1]))
    assert algorithm.natural_step(steps)["gain"] == 0, "worse"
    assert torch.equal(parameters_to_vector(algorithm.actor.parameters()), before)
    still = algorithm.natural_step(steps._replace(returns=torch.zeros_like(steps.returns)))
    assert still["gain"] == 0, "nothing to gain"


def test_its_gradients_are_those_of_its_losses(small: SimpleNamespace, float64: None) -> None:
    algorithm, steps = build(small, "box")
    small.assert_gradients(algorithm, steps, "value", "value.")


@pytest.mark.parametrize("name", ["maxent_pg", "trpo", "ppo_kl"])
def test_an_online_run_starts_from_another_actor(name: str, tmp_path: Path) -> None:
    """A clone of a squashed actor, with its normaliser; the previous policy is that one from the first update on."""
    debug = experiment.load(f"debug-{name}")
    assert debug.environment is not None
    fresh = loop.build(debug, None)
    torch.manual_seed(5)
    prior = SAC(fresh.spec, SACConfig(hidden=(16,)))
    prior.normaliser.scale.fill_(2.0)
    prior.save_pretrained(tmp_path / "prior")
    started = loop.build(experiment.load(f"debug-{name}", {"start_from": str(tmp_path / "prior")}), None)
    obs = torch.ones(4, 3).numpy()
    assert (started.policy().act(obs)[0] == prior.policy().act(obs)[0]).all()
    assert (started.policy().act(obs)[0] != fresh.policy().act(obs)[0]).any()


def test_wrong_settings_are_said() -> None:
    assert algorithms.find("trpo") is TRPO and config.to_dict(TRPOConfig())["kl_budget"] == 0.01
    with pytest.raises(UserError, match="kl_budget is -1; it has to be a positive number of nats"):
        TRPOConfig(kl_budget=-1)
    with pytest.raises(UserError, match="shrink between 0 and 1"):
        TRPOConfig(shrink=1.0)
