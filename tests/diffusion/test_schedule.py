import pytest
import torch
from diffusers import DDPMScheduler

from offline_cai.diffusion.schedule import Schedule


@pytest.mark.parametrize(("kind", "name"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
def test_noising_is_diffusers(kind: str, name: str) -> None:
    theirs = DDPMScheduler(50, beta_schedule=name, beta_start=0.1 / 50, beta_end=20 / 50)
    schedule = Schedule(50, kind)  # type: ignore[arg-type]
    x, noise, k = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.tensor([0, 7, 30, 49])
    noisy = schedule.add_noise(x, noise, k)
    assert torch.allclose(noisy, theirs.add_noise(x, noise, k))
    assert torch.allclose(schedule.clean_from_noise(noisy, noise, k)[:3], x[:3], atol=1e-3)


@pytest.mark.parametrize("levels", [8, 64, 1000])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_last_level_is_noise(kind: str, levels: int) -> None:
    abar = Schedule(levels, kind).abar  # type: ignore[arg-type]
    assert float(abar[-1]) < 1e-2 and float(abar[0]) > 0.8 and (abar.diff() < 0).all()


def test_level_minus_one_is_clean() -> None:
    schedule = Schedule(8)
    assert schedule.abar_at(torch.tensor([-1, 0])).flatten().tolist() == [1.0, pytest.approx(float(schedule.abar[0]))]


def test_velocity_and_noise_say_the_same_about_clean_rows() -> None:
    schedule, x, noise = Schedule(50), torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    k = torch.tensor([0, 7, 30, 49])
    noisy = schedule.add_noise(x, noise, k)
    velocity = schedule.velocity(x, noise, k)
    assert torch.allclose(schedule.clean_from_velocity(noisy, velocity, k), x, atol=1e-5)
    assert torch.allclose(velocity.square() + noisy.square(), x.square() + noise.square(), atol=1e-4), "a rotation"
