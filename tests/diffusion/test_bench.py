"""The short form of `make bench-exactness`: its exact rows in a few steps, and its references."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offline_cai.inference.gaussian import QuadraticReward


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[2] / "eval/bench_guidance.py"
    spec = importlib.util.spec_from_file_location("bench_guidance", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["bench_guidance"] = module
    spec.loader.exec_module(module)
    return module


def test_the_posterior_is_its_nats_from_the_prior_whatever_the_reward(bench: ModuleType) -> None:
    for last in (False, True):
        task = bench.quadratic(last)
        assert task.prior.distance(task.mean, task.covariance)[0] == pytest.approx(bench.NATS)
        assert isinstance(task.evidence.function, QuadraticReward)


def test_a_grid_gives_the_same_posterior_as_the_closed_form(bench: ModuleType) -> None:
    """Of the reward that is not quadratic: 400,000 exact samples of the prior, weighed."""
    task = bench.not_quadratic(True)
    x = task.law.sample(400_000, torch.Generator().manual_seed(0))
    nats = task.evidence(x, torch.zeros(1), task.temperature)
    weight, flat = nats.softmax(0), x.flatten(1)
    assert float(nats.logsumexp(0)) - torch.tensor(400_000.0).log() == pytest.approx(task.log_evidence, abs=0.06)
    f, few = ~task.exact.mask.flatten(), float(weight.square().sum()) ** 0.5
    away = ((weight @ flat - task.mean)[f] / task.covariance.diagonal()[f].sqrt()).abs()
    assert float(away.max()) < 5 * few
    assert float(weight @ nats) - task.log_evidence == pytest.approx(bench.NATS, abs=0.2)


def test_its_rows_say_what_the_tests_say(bench: ModuleType) -> None:
    rows = bench.exact_rows(bench.quadratic(False), n=512, steps=8)
    assert rows["corrected"].kl < 1e-6 and rows["jacobian"].kl < 1e-6 and rows["unguided, analytic"].kl < 1e-6
    assert rows["through_denoiser"].kl > 0.1 and rows["unguided, not told what is known"].kl > 1
    smc = rows["SMC, corrected"]
    assert abs(smc.log_evidence_error) < 0.01 and smc.effective > 15.9 and smc.evaluations == 8 * bench.PARTICLES
    d = 46  # free numbers: n times the estimate is half a chi-square of d (d + 3) / 2 degrees
    assert abs(smc.kl) < 4 * (d * (d + 3) / 4) ** 0.5 / 512 < 0.2 and smc.bias > 1
    assert rows["corrected"].evaluations == 8 and rows["jacobian"].evaluations == 8 * 47
