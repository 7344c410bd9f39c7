"""The dial meets its budget, and two ways to set it at once are refused."""

import pytest
import torch

from offline_cai.errors import UserError
from offline_cai.inference import soft
from offline_cai.policies import dial
from offline_cai.policies.dial import Dial


def test_the_learned_temperature_spends_the_budget() -> None:
    """The policy is the exact posterior over 64 choices; gradient steps on the dual against the root of its own KL."""
    advantage = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    knob = Dial("auto", 0.7, auto_budget=9.0)
    optimiser = torch.optim.Adam(knob.parameters(), lr=0.02)
    for _ in range(400):
        optimiser.zero_grad()
        knob.loss(soft.posterior_kl(advantage, knob.temperature)).mean().backward()
        optimiser.step()
    assert knob.temperature == pytest.approx(float(soft.temperature_for_kl(advantage, 0.7)), rel=0.01)


def test_a_fixed_temperature_is_no_parameter_to_learn() -> None:
    fixed = Dial(0.2, None, auto_budget=1.0)
    assert not fixed.learned and fixed.temperature == pytest.approx(0.2)
    assert not any(p.requires_grad for p in fixed.parameters())


def test_a_kl_that_no_temperature_mends_does_not_take_it_out_of_sight() -> None:
    knob = Dial("auto", 0.1, auto_budget=9.0)
    knob.begin(torch.tensor(300.0))
    for _ in range(2000):
        knob.steer(5.0)
    assert float(knob.temperature) == pytest.approx(300 * 1e5, rel=1e-4)
    for _ in range(600):
        knob.steer(0.0)
    assert float(knob.temperature) < 300


@pytest.mark.parametrize(
    ("temperature", "budget", "words"),
    [
        (0.0, None, "temperature is 0.0; it has to be positive, or auto"),
        ("auto", -1.0, "kl_budget is -1.0; it has to be a positive number of nats"),
        (0.2, 0.1, "two ways to say the same"),
    ],
)
def test_wrong_settings_are_said(temperature: dial.Temperature, budget: float | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        dial.check(temperature, budget)
