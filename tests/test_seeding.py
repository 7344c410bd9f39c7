import numpy as np
import pytest
import torch
from scipy import stats

from offline_cai import seeding


def test_draws_are_functions_of_the_key_alone() -> None:
    whole = seeding.normal(seeding.keys(3, 7, torch.arange(10)), (4, 2))
    part = seeding.normal(seeding.keys(3, 7, torch.arange(6, 10)), (4, 2))
    assert torch.equal(whole[6:], part)


def test_torch_hashes_as_numpy_does() -> None:
    """On a GPU it is torch that does."""
    keys = torch.cat([seeding.keys(3, 7, torch.arange(50)), torch.tensor([0, -1, 2**63 - 1, -(2**63)])])
    ours = seeding._hash(keys.numpy().view(np.uint64), np.arange(1, 6, dtype=np.uint64), 2)
    assert np.array_equal(seeding._hash(keys, torch.arange(1, 6), 2).numpy(), ours.astype(np.int64))


@pytest.mark.parametrize("other", [{"seed": 4}, {"step": 8}, {"stream": 1}])
def test_another_seed_step_or_stream_gives_unrelated_draws(other: dict[str, int]) -> None:
    def draw(seed: int = 3, step: int = 7, stream: int = 0) -> torch.Tensor:
        return seeding.normal(seeding.keys(seed, step, torch.arange(500)), (20,), stream).flatten()

    correlation = float(torch.corrcoef(torch.stack([draw(), draw(**other)]))[0, 1])
    assert abs(correlation) < 4 / np.sqrt(10_000)


def test_normal_draws_have_the_normal_law() -> None:
    draws = seeding.normal(seeding.keys(0, 0, torch.arange(20_000)), (5,), dtype=torch.float64)
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 0.01
    correlation = torch.corrcoef(draws.T) - torch.eye(5)
    assert correlation.abs().max() < 4 / np.sqrt(20_000)  # columns of one key are independent of each other
    shifted = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]
    assert abs(float(shifted)) < 4 / np.sqrt(20_000)  # and so are neighbouring keys


def test_uniform_and_integer_draws_cover_their_range_evenly() -> None:
    keys = seeding.keys(1, 2, torch.arange(50_000))
    assert stats.kstest(seeding.uniform(keys).numpy(), "uniform").pvalue > 0.01
    counts = torch.bincount(seeding.integers(keys, 7), minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_keys_of_other_lengths_and_cuts_do_not_collide() -> None:
    parts = [(7,), (7, 0), (7, 0, 0), (3, 5), (3 + 5 * 2**32,), (3, 5, 0), (0, 3, 5)]
    assert len({seeding.key(*p) for p in parts}) == len(parts)
    assert len({int(seeding.rng(*p).integers(1 << 62)) for p in parts}) == len(parts)
    assert all(0 <= seeding.seed_of(*p) < 2**31 for p in parts)


def test_generators_differ_by_key_and_repeat() -> None:
    assert seeding.rng(1, 2).integers(1 << 40) == seeding.rng(1, 2).integers(1 << 40)
    assert seeding.rng(1, 2).integers(1 << 40) != seeding.rng(2, 1).integers(1 << 40)
    assert seeding.key(-1, -5) == seeding.key(-1, -5)


def test_keys_never_change() -> None:
    """Whoever trains again from the same seed finds the same batches and noise."""
    keys = seeding.keys(3, 7, torch.tensor([0, 1, 1 << 40]))
    assert keys.tolist() == [-603041954800334407, 5819399993626769701, 8503334558020445311]
