import numpy as np
import pytest

from offline_cai.data import stats
from offline_cai.data.trajectories import Trajectories


def test_the_numbers_are_those_of_numpy(store: Trajectories, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "_PART", 4)
    facts = stats.stats(store, (-1.0, 3.0))
    steps, columns = store.rows[store.step_rows()].astype(float), facts["columns"]
    assert list(columns)[:2] == ["achieved_goal[0]", "achieved_goal[1]"] and list(columns)[-2:] == [
        "action[1]",
        "reward",
    ]
    for column, row in enumerate(columns.values()):
        values = steps[:, column]
        exact = [values.mean(), values.std(), values.min(), *np.quantile(values, [0.01, 0.25, 0.5, 0.75, 0.99])]
        assert np.allclose(list(row.values()), [*exact, values.max()], atol=1e-6)
    assert facts["episodes"]["length"]["mean"] == 6
    assert facts["episodes"]["score"]["mean"] == pytest.approx(100 * (store.returns.mean() + 1) / 4)
    assert "are returns of -1 and 3 in the evaluation environment" in stats.text(facts)


def test_a_score_without_a_reference_is_not_made_up(store: Trajectories) -> None:
    facts = stats.stats(store)
    assert facts["reference"] is None and "score" not in facts["episodes"]
    assert "no score" in stats.text(facts)
