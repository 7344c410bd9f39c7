"""Evidence in nats: units, composition, goals, the one dial."""

import math

import pytest
import torch

from offline_cai.core import Spec
from offline_cai.data.codec import Codec
from offline_cai.diffusion.evidence import Goal, InUnits, Learned, Return, fingerprint, temperature_for, together
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError
from offline_cai.inference.temperatures import posterior_kl

X = torch.randn(6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
K = torch.zeros(6, dtype=torch.int64)


def test_the_temperature_divides_rewards_and_nothing_else() -> None:
    reward, goal = Return(lambda x: x.sum((1, 2))), Goal((0.5, -1.0), (0, 2), width=0.2, row=1)
    both = together(reward, goal)
    torch.testing.assert_close(both(X, K, 2.0), X.sum((1, 2)) / 2 + goal(X, K, 7.0))
    exact = -0.5 * ((X[:, 1, 0] - 0.5) ** 2 + (X[:, 1, 2] + 1) ** 2) / 0.04
    torch.testing.assert_close(goal(X, K, 1.0), exact)
    assert not both.quadratic and not both.noisy and goal.quadratic
    assert together(Return(lambda x: x[:, 0, 0], quadratic=True), goal).quadratic


def test_a_goal_in_any_row_counts_the_nearest_one() -> None:
    goal = Goal((0.0,), (0,), width=0.01, row=None)
    x = torch.ones(1, 5, 2, dtype=torch.float64)
    x[0, 3, 0] = 0.0
    assert float(goal(x, K[:1], 1.0)) == pytest.approx(-math.log(5)) and not goal.quadratic


def test_raw_units_are_the_codec_s(spec: Spec) -> None:
    codec = Codec(spec, 4, fields=("observation",), actions=True)
    codec.obs_norm.shift.copy_(torch.tensor([1.0, 2.0, 0.0, 0.0]))
    codec.obs_norm.scale.copy_(torch.tensor([2.0, 4.0, 1.0, 1.0]))
    x = torch.zeros(1, 4, codec.width)
    goal = InUnits(codec, Goal((1.0, 2.0), (0, 1), width=0.1))
    assert float(goal(x, K[:1], 1.0)) == 0.0 and goal.quadratic
    x[0, -1, codec.actions] = 0.1  # a fifth of a unit
    assert float(goal(x, K[:1], 1.0)) == pytest.approx(-0.5 * (0.2 / 0.1) ** 2, rel=1e-5)
    assert not InUnits(Codec(spec, 4, normaliser="quantile"), goal.evidence).quadratic


def test_learned_evidence_serves_the_model_that_it_was_trained_beside(spec: Spec) -> None:
    codec, mask = Codec(spec, 4), torch.zeros(4, 3, dtype=torch.bool)
    mine = fingerprint(schedule=Schedule(16).abar, codec=codec, mask=mask)
    assert mine == fingerprint(mask=mask, codec=Codec(spec, 4), schedule=Schedule(16).abar)
    others = [fingerprint(schedule=Schedule(16, "linear").abar, codec=codec, mask=mask)]
    others += [fingerprint(schedule=Schedule(16).abar, codec=codec, mask=~mask)]
    codec.obs_norm.scale[0] = 2.0
    others += [fingerprint(schedule=Schedule(16).abar, codec=codec, mask=mask)]
    assert len({mine, *others}) == 4
    learned = Learned(lambda x, k, temperature: x.sum((1, 2)) * k / temperature, made_for=mine)
    torch.testing.assert_close(learned(X, K + 3, 2.0), 1.5 * X.sum((1, 2)))
    learned.check(mine)
    with pytest.raises(UserError, match=r"schedule, codec or known rows differ\. Train it again"):
        learned.check(others[0])
    with pytest.raises(UserError, match="no guide reads at once"):
        together(learned, Return(lambda x: x.sum((1, 2))))


def test_the_budget_is_spent_on_the_reward_alone() -> None:
    x = torch.randn(3, 400, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reward, goal = Return(lambda x: x[:, 1].sum(1)), Goal((0.0,), (0,), width=0.1)
    for evidence in (reward, together(reward, goal)):
        temperature = temperature_for(evidence, x, 1.2)
        nats = posterior_kl(x[:, :, 1].sum(-1), temperature)
        assert float(nats.mean()) == pytest.approx(1.2, rel=1e-6)
    with pytest.raises(UserError, match=r"kl_budget cannot be spent: .* 6.0 nats cannot be met by 400 samples"):
        temperature_for(reward, x, 6.0)
    with pytest.raises(UserError, match="kl_budget cannot be spent"):
        temperature_for(reward, x, 0.0)
    with pytest.raises(UserError, match="kl_budget cannot be spent"):
        temperature_for(Return(lambda x: 0 * x[:, 0, 0]), x, 1.0)


def test_mistakes_are_sentences() -> None:
    with pytest.raises(UserError, match="no evidence is given"):
        together()
    with pytest.raises(UserError, match=r"width is 0\.0"):
        Goal((1.0,), (0,), width=0.0)
    with pytest.raises(UserError, match=r"target is 1\.0, nan; give finite"):
        Goal((1.0, float("nan")), (0, 1), width=0.1)
    with pytest.raises(UserError, match="gives 1 numbers for 2 columns"):
        Goal((1.0,), (0, 1), width=0.1)
