from pathlib import Path

import numpy as np
import pytest

from offline_cai.core import Episode, Spec
from offline_cai.data.trajectories import Trajectories, verify
from offline_cai.errors import UserError


def test_rows_hold_every_step_and_one_extra_per_episode(store: Trajectories, episodes: list[Episode]) -> None:
    assert (store.num_episodes, store.num_steps, len(store.obs)) == (3, 18, 21)
    assert store.lengths.tolist() == [5, 1, 12]
    assert store.terminal.tolist() == [True, True, False]
    assert np.allclose(store.returns, [e.reward.sum() for e in episodes], atol=1e-5)
    for stored, original in zip(store.episodes(), episodes, strict=True):
        for name in ("obs", "action", "reward"):
            assert np.allclose(getattr(stored, name), getattr(original, name), atol=1e-6), name
    assert not store.action[store.offsets[1:] - 1].any(), "extra rows act with zero"
    assert 5 not in store.step_rows() and len(store.step_rows()) == 18
    assert store.step_rows(np.array([1, 0])).tolist() == [6, 0, 1, 2, 3, 4]


def test_return_to_go_is_the_discounted_sum(store: Trajectories, episodes: list[Episode]) -> None:
    got = store.return_to_go(0.9)
    reward = episodes[2].reward
    for t in range(12):
        expected = sum(0.9**j * r for j, r in enumerate(reward[t:]))
        assert got[store.offsets[2] + t] == pytest.approx(expected, abs=1e-5)
    assert got[store.offsets[1:] - 1].tolist() == [0, 0, 0]


def test_save_and_open_give_the_same_store_by_memory_map(store: Trajectories, tmp_path: Path) -> None:
    store.save(tmp_path / "s", {"dataset": "x"})
    opened = Trajectories.open(tmp_path / "s")
    assert isinstance(opened.rows, np.memmap)
    assert opened.spec == store.spec and opened.info == {"dataset": "x"}
    for name in ("rows", "end", "offsets", "terminal"):
        assert np.array_equal(getattr(opened, name), getattr(store, name))
    assert [path.name for path in tmp_path.iterdir()] == ["s"], "no temporary folder stays behind"


def test_a_second_writer_of_the_same_store_changes_nothing(store: Trajectories, tmp_path: Path) -> None:
    store.save(tmp_path / "s", {"by": "first"})
    store.save(tmp_path / "s", {"by": "second"})
    assert Trajectories.open(tmp_path / "s").info == {"by": "first"}


def damage(episode: Episode, **changes: np.ndarray) -> Episode:
    return episode._replace(**changes)


@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        ("obs", lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x), ["observations", "nan", "row 3"]),
        ("reward", lambda x: np.where(np.arange(len(x)) == 1, np.inf, x), ["rewards", "inf", "row 1"]),
        ("action", lambda x: x * 100, ["action", "outside the bounds"]),
        ("obs", lambda x: x[:, :5], ["observations", "width 8"]),
        ("obs", lambda x: x[:-1], ["5 observations for 5 rewards", "there should be 6"]),
        ("action", lambda x: x[:-1], ["4 actions for 5 rewards"]),
    ],
)
def test_a_damaged_episode_is_named(spec: Spec, episodes: list[Episode], field: str, change, words: list[str]) -> None:
    broken = episodes[0]._replace(**{field: change(getattr(episodes[0], field))})
    with pytest.raises(UserError) as error:
        Trajectories.from_episodes(spec, [episodes[1], broken], "dataset 'd'")
    assert all(word in str(error.value) for word in ["dataset 'd', episode 1", *words]), error.value


def test_no_episodes_and_no_steps_are_errors(spec: Spec, episodes: list[Episode]) -> None:
    with pytest.raises(UserError, match="no episodes"):
        Trajectories.from_episodes(spec, [])
    e = episodes[0]
    with pytest.raises(UserError, match="no steps"):
        Trajectories.from_episodes(spec, [Episode(e.obs[:1], e.action[:0], e.reward[:0], True)])
    with pytest.raises(UserError, match="give all or none"):
        Trajectories.from_episodes(spec, [e, e._replace(log_prob=np.zeros(5))])


@pytest.mark.parametrize("log_prob", [np.array([0, np.nan, 0, 0, 0]), np.zeros(1), np.zeros((5, 1))])
def test_damaged_log_probabilities_are_named(spec: Spec, episodes: list[Episode], log_prob: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"episode 0: log-probabilities"):
        Trajectories.from_episodes(spec, [episodes[0]._replace(log_prob=log_prob)])


def test_a_damaged_store_is_named(store: Trajectories, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open"):
        Trajectories.open(tmp_path / "nothing")
    store.save(tmp_path / "s")
    verify(tmp_path / "s")
    data = bytearray((tmp_path / "s" / "rows.bin").read_bytes())
    data[40] ^= 1
    (tmp_path / "s" / "rows.bin").write_bytes(data)
    Trajectories.open(tmp_path / "s")
    with pytest.raises(UserError, match=r"rows\.bin differs from what was written"):
        verify(tmp_path / "s")
    (tmp_path / "s" / "rows.bin").write_bytes(data[:100])
    with pytest.raises(UserError, match=r"cannot open .* Delete it and convert again"):
        Trajectories.open(tmp_path / "s")
    (tmp_path / "s" / "meta.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="format 1, and this version reads 3"):
        Trajectories.open(tmp_path / "s")
