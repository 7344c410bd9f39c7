"""Where the data has been, on a ring: distances, draws, and the evidence that is made of them."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from offline_cai import seeding
from offline_cai.core import Chunk
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError
from offline_cai.planning.support import Denoised, Nearest, Short, Support, SupportConfig, Supported

ANGLE = np.linspace(0, 2 * np.pi, 4000)
RING = np.stack([np.cos(ANGLE), np.sin(ANGLE)], axis=1).astype(np.float32)


def chunks(discount: float = 1.0) -> Iterator[Chunk]:
    for part in np.split(RING, 4):
        yield Chunk(part, part[:, :1], part[:, 0])


@pytest.fixture
def support() -> Support:
    found = Support(SupportConfig(cell=0.05, cells=48))
    found.fit(chunks, [0, 1])
    return found


def test_distances_are_those_to_the_data(support: Support) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2000, 2, generator=generator) * 2 - 1
    exact = (points.norm(dim=1) - 1).abs()
    assert (support(points) - exact).abs().max() < 0.05 * math.sqrt(2)
    assert support(torch.tensor(RING)).max() < 0.05


def test_places_are_drawn_from_all_of_the_data(support: Support) -> None:
    places = support.draw(seeding.keys(0, 0, torch.arange(4000)))
    assert ((places.norm(dim=1) - 1).abs() < 0.05 * math.sqrt(2)).all()
    share = torch.bincount(((torch.atan2(places[:, 1], places[:, 0]) / math.pi + 1) * 4).long().clamp(max=7)) / 4000
    assert ((share - 1 / 8).abs() < 0.03).all()


def test_a_plan_pays_for_what_leaves_the_data_and_for_its_length(support: Support) -> None:
    half = torch.tensor(RING[:2001:100])[None]  # along the ring, from (1, 0) to (-1, 0)
    chord = torch.stack([torch.linspace(1, -1, 21), torch.zeros(21)], -1)[None]
    inside = Supported(support, nats=10.0, margin=0.05)
    assert inside.share(half) < 0.05 and inside.share(chord) > 0.8
    assert torch.allclose(inside(chord, torch.zeros(1), 1.0), -10 * inside.share(chord))
    fine, coarse = support.along(chord), support.along(chord, 2)
    assert fine.shape == (1, 81) and torch.allclose(fine[:, ::2], coarse), "which feasibility reads as well"
    assert torch.equal(inside.of(coarse), inside(chord, torch.zeros(1), 1.0))
    short = Short((0, 1), nats=2.0)
    assert short.length(half).item() == pytest.approx(math.pi, rel=0.01)
    assert short(chord, torch.zeros(1), 1.0).item() == pytest.approx(-4, rel=1e-4)


def test_its_gradient_points_back_to_the_data(support: Support) -> None:
    x = torch.tensor([[[0.9, 0.0], [0.86, 0.0], [0.85, 0.0]]], requires_grad=True)
    Supported(support, nats=1.0, margin=0.05)(x, torch.zeros(1), 1.0).sum().backward()
    assert x.grad is not None and (x.grad[..., 0] > 0).all()


def test_a_grid_that_is_too_small_says_how_large_a_cell_would_do() -> None:
    small = Support(SupportConfig(cell=0.05, cells=40))
    with pytest.raises(
        UserError, match=r"the data spans 2\.05, more than 40 cells of 0\.05: raise support\.cell to 0\.05"
    ):
        small.fit(chunks, [0, 1])
    with pytest.raises(UserError, match="has to be positive"):
        SupportConfig(cell=0.0)


def test_the_nearest_states_of_the_data_tell_ring_from_chord() -> None:
    episode = np.random.default_rng(0).integers(40, size=4000)
    nearest = Nearest((0, 1), RING, episode, nats=10.0)
    assert 0 < nearest.usual < 0.05, "states held out lie between those that are kept"
    half = torch.tensor(RING[:2001:50])[None]
    chord = torch.stack([torch.linspace(1, -1, 41), torch.zeros(41)], -1)[None]
    assert (nearest.away(half) <= 0.02).all() and nearest.away(chord).max() == pytest.approx(1, abs=0.01)
    both = nearest(torch.cat([half, chord]), torch.zeros(2), 1.0)
    assert both[0] == 0 and both[1] < -8


def test_denoising_changes_what_the_model_finds_unlikely() -> None:
    """Rows ~ N(0, I): of any rows the change that the exact denoiser makes is known."""
    schedule = Schedule(16)

    def denoise(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return schedule.abar_at(k).sqrt() * x

    x = torch.stack([torch.zeros(400, 3), torch.full((400, 3), 4.0)])
    found = Denoised(denoise, schedule, level=4, nats=2.0)
    b = 1 - float(schedule.abar[4])
    expected = torch.tensor([(1 - b) * b, (1 - b) * b + 16 * b**2])
    assert torch.allclose(found.change(x), expected, rtol=0.1)
    assert torch.allclose(found(x, torch.zeros(2), 1.0), -2 * found.change(x))
