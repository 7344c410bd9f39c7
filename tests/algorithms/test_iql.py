"""IQL against a fixed point by iteration, and its extraction against prior x exp(advantage / temperature)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offline_cai.algorithms.iql import IQL, IQLConfig, expectile_loss
from offline_cai.core import Batch
from offline_cai.errors import UserError

COUNTS = np.array([[5, 2, 1], [1, 3, 4], [2, 2, 2]])
REWARD = np.array([[0.0, 1.0, -1.0], [0.5, 0.0, 0.3], [-1.0, 1.0, 0.0]])
AFTER = np.array([[0, 1, 2], [2, 0, 1], [1, 0, 2]])
ENDS = np.array([[False, False, True], [False, False, False], [False, True, False]])
DISCOUNT, EXPECTILE, TEMPERATURE = 0.6, 0.8, 0.5


def expectile(x: np.ndarray, count: np.ndarray, share: float) -> float:
    """The root of share · E(x - v)+ = (1 - share) · E(v - x)+, by repeated weighted means (Newey and Powell 1987)."""
    v = float(np.average(x, weights=count))
    for _ in range(200):
        v = float(np.average(x, weights=count * np.where(x > v, share, 1 - share)))
    return v


def fixed_point() -> tuple[np.ndarray, np.ndarray]:
    """Q [S, A] and V [S]: V the expectile of Q over the data's actions, Q = r + discount · V after, if it goes on."""
    v = np.zeros(3)
    for _ in range(200):
        q = REWARD + DISCOUNT * np.where(ENDS, 0.0, v[AFTER])
        v = np.array([expectile(q[s], COUNTS[s], EXPECTILE) for s in range(3)])
    return q, v


@pytest.fixture(scope="module")
def solved(small: SimpleNamespace) -> IQL:
    """Trained on every transition as often as it was counted."""
    torch.manual_seed(0)
    config = IQLConfig((), EXPECTILE, TEMPERATURE, clip=None, discount=DISCOUNT, tau=0.5, normaliser="none")
    iql = IQL(small.choices(3, 3), config)
    state, action = (np.repeat(i, COUNTS.reshape(-1)) for i in np.indices(COUNTS.shape).reshape(2, -1))
    obs = torch.eye(3)[np.stack([state, AFTER[state, action]], 1)]
    ends = torch.tensor(ENDS[state, action])[:, None]
    batch = small.windows(obs, torch.tensor(action)[:, None, None], torch.tensor(REWARD[state, action])[:, None], ends)
    steps = 600
    training = small.state_of(iql, steps=steps, learning_rate=0.05)
    for step in range(steps):
        training.iterate(step, batch)
    return iql


def test_values_are_the_fixed_point_of_expectiles(solved: IQL) -> None:
    q, v = fixed_point()
    eye = torch.eye(3)
    with torch.no_grad():
        assert solved.value(eye).numpy() == pytest.approx(v, abs=0.01)
        table = solved.critic(eye, eye[:, None].expand(3, 3, 3))  # [2, action, state]
        assert table.numpy() == pytest.approx(np.stack([q.T, q.T]), abs=0.01)
    assert np.abs(v - (COUNTS * q).sum(1) / COUNTS.sum(1)).max() > 0.1, "no mere means"


def test_extraction_is_prior_times_exponentiated_advantage(solved: IQL) -> None:
    q, v = fixed_point()
    wanted = COUNTS * np.exp((q - v[:, None]) / TEMPERATURE)
    with torch.no_grad():
        found = solved.pi(np.eye(3)).log_p.exp().numpy()
    assert found == pytest.approx(wanted / wanted.sum(1, keepdims=True), abs=0.01)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_expectile_s_loss_is_least_there(share: float) -> None:
    x = np.random.default_rng(0).normal(size=50)
    v = torch.tensor(expectile(x, np.ones(50), share), dtype=torch.float64, requires_grad=True)
    expectile_loss(torch.from_numpy(x) - v, share).sum().backward()
    assert v.grad is not None and abs(float(v.grad)) < 1e-5


@pytest.mark.parametrize("network", ["value", "critic", "actor"])
@pytest.mark.parametrize("kind", ["box", "choices"])
def test_gradients(small: SimpleNamespace, float64: None, kind: str, network: str) -> None:
    """Each network's is that of its own term, which takes the other networks as they are."""
    torch.manual_seed(0)
    spec = small.box(3, 2) if kind == "box" else small.choices(3, 4)
    iql = IQL(spec, IQLConfig(hidden=(6,), temperature=1.5, normaliser="none", clip=None))
    batch: Batch = small.random_batch(iql.spec, 7)
    small.assert_gradients(iql, batch, "all", f"{network}.", term=f"{network}_loss")


def test_an_expectile_that_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match="expectile is 1"):
        IQLConfig(expectile=1.0)
