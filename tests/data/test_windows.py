import numpy as np
import pytest
import torch

from offline_cai.core import Batch, Episode, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError

KEY = torch.zeros(1, dtype=torch.int64)


def window(store: Trajectories, row: int, horizon: int, stride: int, discount: float = 0.9) -> Batch:
    return Windows(store, horizon, stride, discount).gather(np.array([row]), KEY)


def test_a_strided_window_inside_an_episode(store: Trajectories, episodes: list[Episode]) -> None:
    b, e = window(store, int(store.offsets[2]) + 1, horizon=3, stride=2), episodes[2]
    assert np.allclose(b.obs[0], e.obs[[1, 3, 5, 7]], atol=1e-6)
    assert np.allclose(b.action[0], e.action[[[1, 2], [3, 4], [5, 6]]], atol=1e-6)
    assert np.allclose(b.reward[0], [e.reward[t] + 0.9 * e.reward[t + 1] for t in (1, 3, 5)], atol=1e-6)
    assert b.valid.all() and not b.terminal.any()
    to_go = [sum(0.9**j * r for j, r in enumerate(e.reward[t:])) for t in (1, 3, 5)]
    assert np.allclose(b.returns[0], to_go, atol=1e-5)


def test_past_a_true_end_the_last_state_stays_and_only_the_last_block_is_terminal(
    store: Trajectories, episodes: list[Episode]
) -> None:
    b, e = window(store, 2, horizon=4, stride=2), episodes[0]  # 3 steps are left: blocks of 2, 1, 0 and 0 steps
    assert np.allclose(b.obs[0], e.obs[[2, 4, 5, 5, 5]], atol=1e-6)
    assert b.terminal[0].tolist() == [False, True, False, False]
    assert b.valid[0].tolist() == [True, True, False, False]
    assert np.allclose(b.reward[0], [e.reward[2] + 0.9 * e.reward[3], e.reward[4], 0, 0], atol=1e-6)
    assert not b.action[0, 1, 1].any() and not b.action[0, 2:].any()
    assert b.returns[0, 2:].tolist() == [0, 0]


def test_a_block_cut_by_a_time_limit_is_not_valid(store: Trajectories) -> None:
    b = window(store, int(store.offsets[2]) + 9, horizon=2, stride=2)  # 3 steps are left, no true end
    assert b.valid[0].tolist() == [True, False] and not b.terminal.any()


def test_bootstrapping_over_blocks_gives_the_return(store: Trajectories, episodes: list[Episode]) -> None:
    b = window(store, 0, horizon=3, stride=2)
    total = sum(0.9 ** (2 * j) * float(b.reward[0, j]) for j in range(3))
    assert total == pytest.approx(sum(0.9**t * r for t, r in enumerate(episodes[0].reward)), abs=1e-5)


def test_windows_without_padding_fit(store: Trajectories) -> None:
    fit = Windows(store, horizon=3, stride=2, padding=False)
    assert fit.starts.tolist() == [8 + t for t in range(7)]
    assert len(Windows(store, horizon=3, stride=2).starts) == 18
    with pytest.raises(UserError, match="the longest has 12"):
        Windows(store, horizon=7, stride=2, padding=False)


@pytest.mark.parametrize(("horizon", "stride"), [(1, 1), (3, 1), (15, 1), (1, 3), (4, 2), (2, 9)])
@pytest.mark.parametrize("logged", [False, True])
def test_every_window_is_what_the_definition_says(
    spec: Spec, episodes: list[Episode], horizon: int, stride: int, logged: bool
) -> None:
    """Block j of the window at t has the steps t + jk to t + (j+1)k - 1 of its episode, as far as they exist."""
    if logged:
        episodes = [e._replace(log_prob=np.linspace(-1, 0, len(e.reward))) for e in episodes]
    store, discount = Trajectories.from_episodes(spec, episodes), 0.9
    windows = Windows(store, horizon, stride, discount)
    batch = windows.gather(windows.starts, torch.arange(len(windows.starts)))
    assert batch.key.tolist() == list(range(18)) and (batch.log_prob is not None) == logged
    at = 0
    for e in episodes:
        steps = len(e.reward)
        pad = horizon * stride
        obs = np.concatenate([e.obs, np.repeat(e.obs[-1:], pad, axis=0)])
        action = np.concatenate([e.action, np.zeros((pad, 2))])
        reward, log_prob = (np.concatenate([x, np.zeros(pad)]) for x in (e.reward, e.log_prob if logged else e.reward))
        to_go = [sum(discount**i * r for i, r in enumerate(reward[t:])) for t in range(steps + pad)]
        for t in range(steps):
            for j in range(horizon):
                begin, stop = t + j * stride, t + (j + 1) * stride
                ends = e.terminal and begin < steps <= stop
                assert np.allclose(batch.obs[at, j], obs[begin], atol=1e-6)
                assert np.allclose(batch.obs[at, j + 1], obs[stop], atol=1e-6)
                assert np.allclose(batch.action[at, j], action[begin:stop], atol=1e-6)
                block = sum(discount**i * r for i, r in enumerate(reward[begin:stop]))
                assert batch.reward[at, j] == pytest.approx(block, abs=1e-5)
                assert batch.returns[at, j] == pytest.approx(to_go[begin], abs=1e-5)
                assert batch.terminal[at, j] == ends and batch.valid[at, j] == (ends or stop <= steps)
                if batch.log_prob is not None:
                    assert np.allclose(batch.log_prob[at, j], log_prob[begin:stop], atol=1e-6)
            at += 1
