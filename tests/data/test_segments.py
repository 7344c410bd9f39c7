"""Segments: pieces of one episode, resampled, with the steps that they take."""

import numpy as np
import pytest
import torch

from offline_cai import seeding
from offline_cai.core import Box, Episode, Field, Spec
from offline_cai.data.codec import Codec
from offline_cai.data.segments import Segments
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError

SPEC = Spec((Field("observation", 2),), Box((-1.0,), (1.0,)))
LENGTHS = (20, 5, 40)


@pytest.fixture
def data() -> Trajectories:
    """Observation (episode, time): a segment shows which episode and which times it is made of."""
    episodes = []
    for number, length in enumerate(LENGTHS):
        obs = np.stack([np.full(length + 1, number), np.arange(length + 1)], axis=1).astype(np.float32)
        episodes.append(Episode(obs, np.zeros((length, 1)), np.zeros(length), terminal=False))
    return Trajectories.from_episodes(SPEC, episodes)


def test_a_segment_is_evenly_resampled_within_one_episode(data: Trajectories) -> None:
    segments = Segments(data, rows=7, to_end=0.4, least=6)
    batch = segments.gather(segments.draw(np.random.default_rng(0), 3000), seeding.keys(0, 0, torch.arange(3000)))
    number, time = batch.obs[..., 0], batch.obs[..., 1]
    assert batch.obs.shape == (3000, 7, 2) and batch.action.shape == (3000, 6, 1, 1) and batch.span is not None
    assert (number == number[:, :1]).all() and not (number == 1).any(), "an episode of 5 steps holds none of 6"
    assert torch.allclose(time[:, -1] - time[:, 0], batch.span) and batch.span.min() == 6
    assert torch.allclose(time.diff(dim=1), (batch.span / 6)[:, None].expand(-1, 6), atol=1e-4)
    length = torch.tensor([LENGTHS[int(i)] for i in number[:, 0]], dtype=torch.float32)
    ends, n = time[:, -1] == length, 3000
    left = length - time[:, 0]  # of the later ends that are uniform, one in (left - 5) is the last one as well
    expected = 0.4 + 0.6 / (left - 5)
    assert abs(float(ends.float().mean() - expected.mean())) < 4 * float((expected * (1 - expected)).mean() / n) ** 0.5


def test_a_row_knows_the_steps_of_its_segment(data: Trajectories) -> None:
    segments = Segments(data, rows=4, least=6)
    batch = segments.gather(segments.draw(np.random.default_rng(0), 8), seeding.keys(0, 0, torch.arange(8)))
    codec = Codec(SPEC, 4, 1, (), actions=False, normaliser="limits", span=True)
    codec.fit(data.chunks)
    x = codec.encode(batch)
    assert x.shape == (8, 4, 3) and batch.span is not None
    assert torch.allclose(codec.steps(x), batch.span[:, None].expand(-1, 4), rtol=1e-5)
    assert torch.allclose(codec.decode(x)[0], batch.obs, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rows": 1}, "two rows or more"),
        ({"rows": 4, "to_end": 1.5}, "to_end in"),
        ({"rows": 4, "least": 41}, "no episode has 41 steps, which a segment needs: the longest has 40"),
    ],
)
def test_segments_that_cannot_be_are_refused(data: Trajectories, settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Segments(data, **settings)  # type: ignore[arg-type]
