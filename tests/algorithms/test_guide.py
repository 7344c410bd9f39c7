"""Learned returns against enumeration: two kinds of trajectories, and a prize that is a matter of luck."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.algorithms.diffuser import Diffuser, DiffuserConfig
from offline_cai.algorithms.guide import STEEPEST, Guide, GuideConfig, gumbel_loss
from offline_cai.core import Episode, Known, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.diffusion.evidence import Learned
from offline_cai.errors import UserError
from offline_cai.planning.config import PlannerConfig

SMALL = DiffuserConfig(rows=4, stride=1, goal_field=None, channels=8, multipliers=(1, 2), levels=8, discount=1.0)
LUCK = {1.0: 0.7, -1.0: 0.2}  # probability of the prize by side
PRIZE = 4.0


@pytest.fixture(scope="module")
def lucky(spec: Spec) -> Trajectories:
    """After the first state the second coordinate is +1 or -1; the first step pays PRIZE or nothing."""
    rng, episodes = np.random.default_rng(0), []
    for number in range(4000):
        side = rng.choice([1.0, -1.0])
        obs, reward = np.zeros((5, 8)), np.zeros(4)
        obs[:, 0] = number  # in a field that rows leave out: no two episodes are the same
        obs[1:, 5] = side
        reward[0] = PRIZE * (rng.random() < LUCK[side])
        episodes.append(Episode(obs, np.zeros((4, 2)), reward, False))
    return Trajectories.from_episodes(spec, episodes)


def guide(store: Trajectories, **changes: object) -> Guide:
    torch.manual_seed(0)
    config = dataclasses.replace(GuideConfig(diffuser=SMALL, channels=16, multipliers=(1, 4)), **changes)  # type: ignore[arg-type]
    made = Guide(store.spec, config)
    made.fit(store.chunks)
    return made


def trained(store: Trajectories, kind: str, **changes: object) -> Guide:
    made = guide(store, kind=kind, **changes)
    windows, rng = Windows(store, 4, discount=1.0), np.random.default_rng(0)
    optimiser = torch.optim.Adam(made.network.parameters(), 5e-3)
    for step in range(150):
        for group in optimiser.param_groups:
            group["lr"] = 5e-3 * (1 - step / 150)
        batch = windows.gather(rng.choice(store.offsets[:-1], size=96), seeding.keys(0, step, torch.arange(96)))
        optimiser.zero_grad()
        loss = made(batch, "guide")
        (loss.terms["guide_loss"] / loss.entries).backward()
        torch.nn.utils.clip_grad_norm_(made.network.parameters(), 1.0)
        optimiser.step()
    return made.requires_grad_(False)


def exact(made: Guide, x: Tensor, k: Tensor, temperature: float) -> Tensor:
    """log E[exp(R / temperature) | x_k] by Bayes' rule over the two sides, whose rows differ in one coordinate."""
    abar = made.diffuser.schedule.abar_at(k)[:, 0]
    gap = 2 * abar.sqrt() * x[:, 1:, 1] / (1 - abar)  # log N(x_k; +1) - log N(x_k; -1)
    plus = torch.sigmoid(gap.sum(-1))
    worth = {side: np.log(p * np.exp(PRIZE / temperature) + 1 - p) for side, p in LUCK.items()}
    return torch.logaddexp(plus.log() + worth[1.0], (1 - plus).log() + worth[-1.0])


def noised(made: Guide, store: Trajectories, k: int, count: int = 500) -> tuple[Tensor, Tensor]:
    key = seeding.keys(9, k, torch.arange(count))
    x = made.diffuser.codec.encode(Windows(store, 4).gather(store.offsets[:count], key))
    level = torch.full((count,), k)
    noise = seeding.normal(key, tuple(x.shape[1:]), stream=5)
    return Known(x, made.diffuser.mask(x)).impose(made.diffuser.schedule.add_noise(x, noise, level)), level


def test_evidence_finds_the_exact_one_and_the_regression_does_not(lucky: Trajectories) -> None:
    evidence, value = trained(lucky, "evidence"), trained(lucky, "value")
    assert evidence.return_norm.decode(torch.zeros(1, 1)).item() == pytest.approx(PRIZE * 0.45 / 4, abs=0.05)
    for temperature in (0.8, 1.0, 4.0):
        for k in (0, 4, 7):
            x, level = noised(evidence, lucky, k)
            truth = exact(evidence, x, level, temperature)
            error = (evidence.log_evidence(x, level, temperature) - truth).square().mean().sqrt()
            short = (truth - value.log_evidence(x, level, temperature)).mean()
            assert float(error) < 0.15 + 0.05 * float(truth.max()), (temperature, k, float(error))
            if temperature <= 1:
                assert float(short) > 4 * float(error) and float(short) > 0.5, "Jensen's gap"
    x, level = noised(value, lucky, 4)
    plus = torch.sigmoid((2 * x[:, 1:, 1] * _slope(value, level)).sum(-1))
    mean = PRIZE * (LUCK[1.0] * plus + LUCK[-1.0] * (1 - plus))
    assert float((value.log_evidence(x, level, 1.0) - mean).square().mean().sqrt()) < 0.25, "it regresses the mean"


def test_a_perceptron_finds_the_evidence_as_well(lucky: Trajectories) -> None:
    made = trained(lucky, "evidence", network="mlp", hidden=64, blocks=1)
    for k in (0, 4, 7):
        x, level = noised(made, lucky, k)
        truth = exact(made, x, level, 1.0)
        error = (made.log_evidence(x, level, 1.0) - truth).square().mean().sqrt()
        assert float(error) < 0.15 + 0.05 * float(truth.max()), (k, float(error))


def test_the_check_of_a_ranker_tells_what_plans_add_from_what_states_are_worth(lucky: Trajectories) -> None:
    """Here nothing is known of the return before a plan is, and its side is all that is known then."""
    path = Path(__file__).parents[2] / "eval/check_ranker.py"
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec and module_spec.loader
    script = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(script)
    script.WINDOWS = 1024
    blind = guide(lucky, kind="value", network="mlp", hidden=64, blocks=1).requires_grad_(False)
    for made, correlation in ((trained(lucky, "value", network="mlp", hidden=64, blocks=1), 0.5), (blind, 0.0)):
        found = script.check(made, lucky)
        assert found["added_with_left_open"] == pytest.approx(correlation, abs=0.1)
        assert found["share_left_open"] == pytest.approx(1.0, abs=0.1)
        assert 0.005 < found["added_with_left_open_se"] < 0.08


def _slope(made: Guide, level: Tensor) -> Tensor:
    abar = made.diffuser.schedule.abar_at(level)[:, 0]
    return abar.sqrt() / (1 - abar)


def test_the_gumbel_loss_is_least_at_the_log_mean_of_the_exponential() -> None:
    r = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    f = torch.linspace(-2, 4, 60_001, dtype=torch.float64)
    best = f[gumbel_loss(r[None] - f[:, None]).mean(1).argmin()]
    assert float(best) == pytest.approx(float(torch.logsumexp(r, 0) - np.log(3)), abs=1e-3)
    u = torch.tensor([-50.0, 0.0, STEEPEST, STEEPEST + 1, 1e4], dtype=torch.float64, requires_grad=True)
    loss = gumbel_loss(u)
    (slope,) = torch.autograd.grad(loss.sum(), u)
    assert loss.isfinite().all() and (loss >= 0).all()
    assert slope.tolist() == pytest.approx([-1, 0, np.e**6 - 1, np.e**6 - 1, np.e**6 - 1], abs=1e-9)


def test_only_the_states_that_sampling_knows_enter_without_noise(lucky: Trajectories) -> None:
    made, seen = guide(lucky), []
    made.network.forward = lambda x, k, told: (seen.append(x), x.sum((1, 2)))[1]  # type: ignore[method-assign,assign,func-returns-value]
    batch = Windows(lucky, 4).gather(lucky.offsets[:3], seeding.keys(0, 0, torch.arange(3)))
    made(batch, "guide")
    clean = made.diffuser.codec.encode(batch)
    assert torch.equal(seen[0][:, 0], clean[:, 0]) and (seen[0][:, 1:] != clean[:, 1:]).all()


def test_a_guide_takes_a_run_over_and_leaves_it_as_it_is(lucky: Trajectories, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = Diffuser(lucky.spec, SMALL)
    theirs.fit(lucky.chunks)
    theirs.save_pretrained(tmp_path / "diffuser")
    made = guide(lucky, denoiser=str(tmp_path / "diffuser"), diffuser=None)
    assert made.needs.groups == {"guide": ("network.",)} and made.needs.discount == 1.0
    assert not any(p.requires_grad for p in made.diffuser.parameters())
    own = made.diffuser.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.state_dict().items())
    made.save_pretrained(tmp_path / "guide")
    theirs_gone = tmp_path / "diffuser"
    theirs_gone.rename(tmp_path / "elsewhere")
    again = Guide.from_pretrained(tmp_path / "guide")
    assert again.config.diffuser == SMALL and again.config.denoiser == str(theirs_gone)
    assert torch.equal(again.diffuser.codec.obs_norm.scale, made.diffuser.codec.obs_norm.scale)
    with pytest.raises(UserError, match="holds no export"):
        guide(lucky, denoiser=str(theirs_gone), diffuser=None)
    with pytest.raises(UserError, match=r"leave model\.diffuser out"):
        guide(lucky, denoiser=str(tmp_path / "elsewhere"))


def test_trained_together_each_has_its_phase(lucky: Trajectories) -> None:
    assert guide(lucky).needs.groups == {"all": ("diffuser.",), "guide": ("network.",)}
    both = guide(lucky, diffuser=dataclasses.replace(SMALL, inverse_dynamics=True)).needs.groups
    assert both == {"denoiser": ("diffuser.network.",), "inverse": ("diffuser.inverse.",), "guide": ("network.",)}


def test_temperatures_that_were_not_learned_are_named(lucky: Trajectories) -> None:
    made = guide(lucky, temperatures=(0.5, 2.0))
    x, level = noised(made, lucky, 4, 3)
    scale = float(made.return_norm.scale)
    for temperature in (0.5 * scale, 2 * scale):
        assert made.log_evidence(x, level, temperature).isfinite().all()
    for temperature in (0.4 * scale, 2.1 * scale):
        with pytest.raises(UserError, match="learned the evidence for"):
            made.log_evidence(x, level, temperature)
    for bounds in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(UserError, match="temperatures"):
            GuideConfig(temperatures=bounds)


def test_a_return_that_was_learned_for_another_model_is_refused(lucky: Trajectories) -> None:
    made = guide(lucky)
    learned = Learned(made.log_evidence, made.diffuser.fingerprint)
    made.diffuser.steer_by(learned, None)
    for changes in (
        {"schedule": "linear"},
        {"prediction": "v"},
        {"goal_field": "desired_goal"},
        {"normaliser": "gaussian"},
        {"stride": 2},
    ):
        torch.manual_seed(0)
        other = Diffuser(lucky.spec, dataclasses.replace(SMALL, **changes))
        other.fit(lucky.chunks)
        with pytest.raises(UserError, match=r"weights, noise schedule, codec or known rows differ"):
            other.steer_by(learned, None)
    longer = guide(lucky, planner=PlannerConfig(rows=8))
    with pytest.raises(UserError, match=r"planner\.rows is 8, but the learned return is for plans of 4 rows"):
        longer.guided()
    same = guide(lucky).diffuser
    same.steer_by(learned, None)
    with torch.no_grad():
        next(same.network.parameters()).add_(1e-3)
    with pytest.raises(UserError, match="Train it again"):
        same.steer_by(learned, None)


def test_its_policy_plans_by_the_return(lucky: Trajectories) -> None:
    made = guide(lucky, planner=PlannerConfig(candidates=8, temperature=2.0))
    obs, key = np.zeros((3, 8)), seeding.keys(0, 0, torch.arange(3))
    plan = made.guided().plan(obs, key)
    x = made.diffuser.codec.obs_norm.encode(plan.obs.flatten(0, 1))
    nats = made.log_evidence(x, torch.zeros(24).long(), 2.0).view(3, 8).detach()
    assert torch.allclose(plan.log_weight, nats.log_softmax(1), atol=1e-4)
    assert plan.log_evidence is not None and torch.allclose(plan.log_evidence, nats.logsumexp(1) - np.log(8), atol=1e-4)
    chosen = plan.log_weight.argmax(1)
    assert torch.equal(made.policy().propose(obs, key).best.obs[:, 0], plan.obs[torch.arange(3), chosen])
    assert (chosen > 0).any()
