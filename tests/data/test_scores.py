import numpy as np
import pytest

from offline_cai.data import scores
from offline_cai.errors import UserError


def test_scores_are_d4rls() -> None:
    assert scores.normalised(np.array([1500.0]), *scores.reference("hopper-medium-v2"))[0] == pytest.approx(
        46.71189, abs=1e-4
    )
    assert scores.normalised(np.array([100.0]), *scores.reference("maze2d-umaze-v1"))[0] == pytest.approx(
        55.17716, abs=1e-4
    )
    assert scores.reference("maze2d-umaze-v1") == (23.85, 161.86)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match="maze2d-umaze-v1"):
        scores.reference("maze2d-umaze-v9")
