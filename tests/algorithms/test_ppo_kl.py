"""PPO with a KL penalty: its fixed point is previous policy × exp(A / temperature), and its temperature adapts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offline_cai.algorithms.ppo_kl import PPOKL, PPOKLConfig
from offline_cai.errors import UserError

COUNTS = np.array([[2, 1, 5], [4, 3, 1]])  # how often the previous policy takes each action in each of two states
VALUE = np.array([[0.0, 1.0, -0.5], [2.0, 1.0, 3.0]])


def build(small: SimpleNamespace, **settings: object) -> PPOKL:
    """A table of two states, at the policy that `COUNTS` are drawn from."""
    torch.manual_seed(0)
    exact = {"hidden": (), "standardise": False, "minibatches": 1, **settings}
    algorithm = PPOKL(small.choices(2, 3), PPOKLConfig(**exact))  # type: ignore[arg-type]
    with torch.no_grad():
        ((weight, bias),) = algorithm.actor.body.layers
        weight.copy_(torch.tensor(COUNTS).log())
        bias.zero_()
    return algorithm


def table(algorithm: PPOKL) -> np.ndarray:
    return algorithm.actor(torch.eye(2)).log_p.exp().detach().numpy()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_its_fixed_point_is_previous_times_exp_advantage(temperature: float, small: SimpleNamespace) -> None:
    algorithm = build(small, temperature=temperature, epochs=400)
    state = small.state_of(algorithm, learning_rate=0.05)
    metrics = algorithm.update(small.bandit(COUNTS, VALUE), state)
    posterior = COUNTS * np.exp(VALUE / temperature)
    posterior /= posterior.sum(-1, keepdims=True)
    assert np.abs(table(algorithm) - posterior).max() < 1e-3
    previous = COUNTS / COUNTS.sum(-1, keepdims=True)
    kl = (posterior * np.log(posterior / previous)).sum(-1).mean()
    assert metrics["kl"] == pytest.approx(kl, rel=0.01) and metrics["epochs"] == 400


def test_its_temperature_adapts_until_an_update_spends_the_budget(small: SimpleNamespace) -> None:
    """From far below and far above: the KL of the last updates is within the band around its budget."""
    for start in (1e-3, 1e3):
        algorithm = build(small, kl_budget=0.01, epochs=20)
        algorithm.dial.log.data.fill_(np.log(start))
        state, spent = small.state_of(algorithm, learning_rate=0.03), []
        for _ in range(20):
            algorithm.actor.load_state_dict(build(small).actor.state_dict())  # the same update again
            spent.append(algorithm.update(small.bandit(COUNTS, VALUE), state)["kl"])
        assert 0.01 / 1.6 < np.mean(spent[-4:]) < 0.016, start


def test_epochs_end_when_too_much_is_spent(small: SimpleNamespace) -> None:
    algorithm = build(small, kl_budget=0.001, epochs=40)
    metrics = algorithm.update(small.bandit(COUNTS, VALUE), small.state_of(algorithm, learning_rate=0.1))
    assert metrics["epochs"] < 10 and metrics["kl"] > 0.0015 and metrics["temperature"] == pytest.approx(2.0)


def test_clipped_ratios_gain_nothing_more(small: SimpleNamespace, float64: None) -> None:
    """The first action made more likely: by hand, sample by sample."""
    algorithm, free = (build(small, temperature=1.0, ratio_clip=clip) for clip in (0.2, None))
    batch = small.bandit(COUNTS, VALUE)
    for a in (algorithm, free):
        a.old.load_state_dict(a.actor.state_dict())
        a.actor.body.layers[-1][1].data[0] += 1.0
    new, old = table(algorithm), COUNTS / COUNTS.sum(-1, keepdims=True)
    kl = (COUNTS.sum(-1) * (new * np.log(new / old)).sum(-1)).sum()
    ratio = new / old
    clipped = np.minimum(ratio * VALUE, np.clip(ratio, 0.8, 1.2) * VALUE)
    for a, gain in ((algorithm, clipped), (free, ratio * VALUE)):
        assert float(a(batch, "actor").terms["actor_loss"].detach()) == pytest.approx(kl - (COUNTS * gain).sum())
    assert np.abs(clipped - ratio * VALUE).max() > 0.1


@pytest.mark.parametrize("kind", ["box", "choices"])
def test_its_gradients_are_those_of_its_losses(kind: str, small: SimpleNamespace, float64: None) -> None:
    """Away from the previous policy, where the KL has a slope."""
    torch.manual_seed(0)
    algorithm = PPOKL(getattr(small, kind)(3, 2), PPOKLConfig(hidden=(8,), temperature=0.5))
    algorithm.old.body.layers[0][0].mul_(0.5)
    batch = small.random_batch(algorithm.spec, 16)
    for phase in ("actor", "value"):
        small.assert_gradients(algorithm, batch, phase, f"{phase}.")


def test_another_scale_of_the_value_is_the_same_function(small: SimpleNamespace) -> None:
    value, obs = build(small).value, torch.eye(2)
    before = value(obs)
    value.rescale(torch.tensor(50.0))
    torch.testing.assert_close(value(obs), before)
    value.rescale(torch.tensor(0.0))
    assert value.scale == 50 and value.body.layers[-1][0].abs().max() < 0.1


def test_wrong_settings_are_said() -> None:
    with pytest.raises(UserError, match="ratio_clip is 1; it has to be between 0 and 1"):
        PPOKLConfig(ratio_clip=1)
