"""Evidence as a config says it, on a model of independent Gaussian rows whose posterior is known in closed form."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_cai.diffusion.constraints import HalfSpace, Inside, Outside
from offline_cai.diffusion.evidence import Learned
from offline_cai.errors import UserError
from offline_cai.planning.config import EvidenceConfig, PlannerConfig
from offline_cai.planning.sampling import draw, temperature_of
from tests.planning.conftest import GOAL, ROWS, SCALE, WIDTH, model, nothing

CORRECTED = PlannerConfig(sampler="ddpm", steps=32, reverse_variance="analytic", guide="corrected", evidence=GOAL)
LOG_EVIDENCE = -0.5 * math.log(2) - 1.5**2 / 4


def test_a_goal_in_raw_units_moves_the_plans_to_their_posterior() -> None:
    drawn = draw(model(), *nothing(4000), CORRECTED)
    x = drawn.x[:, 0]
    assert drawn.x.shape == (4000, 1, ROWS, WIDTH) and (drawn.log_weight == 0).all() and drawn.log_evidence is None
    assert abs(float(x[:, -1, 0].mean()) - 0.75) < 4 * math.sqrt(0.5 / 4000)
    assert abs(float(x[:, -1, 0].var()) - 0.5) < 4 * 0.5 * math.sqrt(2 / 4000)
    assert abs(float(x[:, 0, 0].mean())) < 4 / math.sqrt(4000)


@pytest.mark.parametrize("way", [{"particles": 16}, {"candidates": 64, "guide": "none"}])
def test_particles_and_candidates_weigh_and_know_the_evidence(way: dict[str, Any]) -> None:
    drawn = draw(model(), *nothing(200), dataclasses.replace(CORRECTED, **way))
    count = max(way.values(), key=lambda value: value if isinstance(value, int) else 0)
    assert drawn.x.shape == (200, count, ROWS, WIDTH)
    assert torch.allclose(drawn.log_weight.logsumexp(1), torch.zeros(200, dtype=torch.float64), atol=1e-6)
    mean = (drawn.log_weight.exp() * drawn.x[:, :, -1, 0]).sum(1)
    assert abs(float(mean.mean()) - 0.75) < 4 * float(mean.std()) / math.sqrt(200) + 0.02
    assert drawn.log_evidence is not None
    spread = float(drawn.log_evidence.std()) / math.sqrt(200)
    assert abs(float(drawn.log_evidence.mean()) - LOG_EVIDENCE) < 4 * spread + 0.02
    best = drawn.x[torch.arange(200), drawn.log_weight.argmax(1), -1, 0]
    if "candidates" in way:
        assert float((best - 1.5).abs().mean()) < 0.1, "the best of many is at the goal itself"


def test_steered_candidates_are_compared_but_tell_no_evidence() -> None:
    drawn = draw(model(), *nothing(5), dataclasses.replace(CORRECTED, candidates=4))
    assert drawn.log_evidence is None and (drawn.log_weight.exp().sum(1) - 1).abs().max() < 1e-6


def test_constraints_hold_where_they_are_projected() -> None:
    box = Inside(columns=(0,), low=(-1.0,), high=(1.0,), width=0.1)
    circle = Outside(columns=(0, 1), centre=(0.0, 0.0), radius=0.5, width=0.1)
    half = HalfSpace(columns=(1,), normal=(1.0,), offset=0.0, width=0.1)
    slope = HalfSpace(columns=(0, 1), normal=(1.0, 1.0), offset=-1.5, width=0.1)
    evidence = EvidenceConfig(inside=(box,), half_spaces=(half, slope), project=True)
    raw = SCALE * draw(model(), *nothing(50), PlannerConfig(sampler="ddpm", steps=8, evidence=evidence)).x
    assert float(raw[..., 0].abs().max()) <= 1 + 1e-4 and float(raw[..., 1].max()) <= 1e-4
    assert float(raw.sum(-1).max()) <= -1.5 + 2e-4
    soft = EvidenceConfig(outside=(circle,))
    settings = PlannerConfig(sampler="ddpm", steps=8, guide="through_denoiser", evidence=soft, candidates=8)
    raw = SCALE * draw(model(), *nothing(50), settings).x
    plain = SCALE * draw(model(), *nothing(50), PlannerConfig(sampler="ddpm", steps=8)).x
    assert float((raw.norm(dim=-1) < 0.5).double().mean()) < float((plain.norm(dim=-1) < 0.5).double().mean())
    with pytest.raises(UserError, match="no point was found"):
        away = HalfSpace(columns=(0,), normal=(1.0,), offset=-3.0, width=0.1)
        draw(model(), *nothing(1), PlannerConfig(evidence=EvidenceConfig(inside=(box,), half_spaces=(away,))))


def linear(x: Tensor, k: Tensor, temperature: float) -> Tensor:
    """A return: the sum of all numbers, in nats."""
    return x.sum((1, 2)) / temperature


def test_a_learned_return_is_read_where_the_guide_reads() -> None:
    levels: list[int] = []

    def learned(x: Tensor, k: Tensor, temperature: float) -> Tensor:
        levels.extend(set(k.tolist()))
        return linear(x, k, temperature)

    of = model(learned=Learned(learned, "x"))
    means = {}
    for guide in ("none", "at_noisy", "at_mean", "through_denoiser", "corrected"):
        levels.clear()
        settings = PlannerConfig(sampler="ddpm", steps=16, reverse_variance="analytic", guide=guide, temperature=4.0)  # type: ignore[arg-type]
        means[guide] = float(draw(of, *nothing(500), settings).x.mean())
        assert (len(set(levels)) > 2) == (guide in ("at_noisy", "at_mean")) and (guide != "none" or not levels)
    assert abs(means["none"]) < 0.08 and abs(means["corrected"] - 0.25) < 0.08
    assert all(mean > 0.1 for guide, mean in means.items() if guide != "none")


def test_at_noisy_has_the_settings_of_diffuser_s_code() -> None:
    """Two gradients a level reach further than one, and none below the lowest level that is steered."""
    asked: list[int] = []

    def learned(x: Tensor, k: Tensor, temperature: float) -> Tensor:
        asked.append(int(k[0]))
        return linear(x, k, temperature)

    of, means = model(learned=Learned(learned, "x")), []
    for settings, count in (({}, 32), ({"guide_repeats": 2}, 64), ({"guide_lowest": 32}, 0), ({"guide_lowest": 4}, 28)):
        asked.clear()
        planner = PlannerConfig(sampler="ddpm", steps=32, guide="at_noisy", temperature=8.0, **settings)  # type: ignore[arg-type]
        means.append(float(draw(of, *nothing(200), planner).x.mean()))
        assert len(asked) == count and (not asked or min(asked) == settings.get("guide_lowest", 0))
    assert means[1] > means[0] > means[3] > means[2]


@pytest.mark.parametrize("way", [{}, {"sampler": "ddpm"}, {"sampler": "dpm"}])
def test_noise_scales_what_plans_differ_by(way: dict[str, Any]) -> None:
    """This model's estimates are linear in x, so samples are linear in their noise; the most likely plan is zero."""
    whole, half, none = (draw(model(), *nothing(5), PlannerConfig(steps=8, noise=s, **way)).x for s in (1.0, 0.5, 0.0))
    assert torch.allclose(half, whole / 2) and float(whole.std()) > 0.5 and (none == 0).all()


def test_candidates_with_less_noise_are_no_samples_of_the_model() -> None:
    planner = PlannerConfig(steps=8, noise=0.5, candidates=4, evidence=GOAL)
    drawn = draw(model(), *nothing(3), planner)
    assert drawn.log_evidence is None and drawn.log_weight.exp().sum(1) == pytest.approx(1.0)


@pytest.mark.parametrize("bounds", [None, (0.1, 100.0)])
def test_a_kl_budget_becomes_the_temperature_that_spends_it(bounds: tuple[float, float] | None) -> None:
    """A Gaussian return of standard deviation s: its posterior is s² / 2 / temperature² nats away."""
    of = model(learned=Learned(linear, "x"), temperatures=bounds)
    settings = PlannerConfig(sampler="ddpm", steps=16, reverse_variance="analytic", kl_budget=1.0, kl_samples=512)
    settings = dataclasses.replace(settings, evidence=GOAL)  # it counts, but its nats are not the return's
    temperature = temperature_of(of, *nothing(20), settings)
    assert temperature == pytest.approx(math.sqrt(ROWS * WIDTH / 2), rel=0.1)
    assert temperature_of(of, *nothing(20), dataclasses.replace(settings, kl_budget=None)) == 1.0
    with pytest.raises(UserError, match="budget"):
        temperature_of(of, *nothing(20), dataclasses.replace(settings, kl_budget=7.0, kl_samples=64))


def test_what_cannot_be_done_is_named() -> None:
    for changes, words in (
        ({"guide": "corrected"}, "nothing to steer by"),
        ({"candidates": 4}, "need evidence"),
        ({"particles": 4, "sampler": "ddpm"}, "need evidence"),
        ({"kl_budget": 1.0}, "nothing to spend it on"),
    ):
        with pytest.raises(UserError, match=words):
            temperature_of(model(), *nothing(1), PlannerConfig(**changes))  # type: ignore[arg-type]
            draw(model(), *nothing(1), PlannerConfig(**changes))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"temperature is -1\.0; take a positive"):
        draw(model(), *nothing(1), CORRECTED, -1.0)
    for changes, words in (
        ({"temperature": 0.0}, "temperature is 0"),
        ({"kl_budget": -1.0}, "kl_budget is -1"),
        ({"candidates": 2, "particles": 2}, "one of them is 1"),
        ({"candidates": 0}, "at least 1"),
        ({"particles": 2}, "set it to ddpm"),
        ({"kl_samples": 1}, "two samples"),
        ({"target": 1.5}, "quantile from 0 to 1"),
        ({"noise": -0.1}, "noise is -0.1; it is at least 0"),
        ({"noise": 0.0, "candidates": 2}, "above 0 with candidates"),
        ({"noise": 0.5, "particles": 2, "sampler": "ddpm"}, "leave it at 1"),
        ({"eta": -0.1}, "eta"),
        ({"condition_weight": math.inf}, "a number of at least 0"),
        ({"sampler": "dpm", "reverse_variance": "analytic"}, "dpm's steps have no noise"),
        ({"guide": "at_noisy", "guide_repeats": 0}, "take at least 1"),
        ({"guide": "corrected", "guide_lowest": 2}, "are for at_noisy, but planner.guide is corrected"),
        ({"reverse_variance": "beta"}, "eta is 0.0: set planner.sampler to ddpm"),
    ):
        with pytest.raises(UserError, match=words):
            PlannerConfig(**changes)  # type: ignore[arg-type]
