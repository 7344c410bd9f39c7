import pytest
import torch
from diffusers import DDPMScheduler

from offline_cai.diffusion.schedule import Schedule


@pytest.mark.parametrize(("kind", "name"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
def test_noising_is_diffusers(kind: str, name: str) -> None:
    schedule, theirs = Schedule(50, kind), DDPMScheduler(50, beta_schedule=name)  # type: ignore[arg-type]
    x, noise, k = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.tensor([0, 7, 30, 49])
    noisy = schedule.add_noise(x, noise, k)
    assert torch.allclose(noisy, theirs.add_noise(x, noise, k))
    assert torch.allclose(schedule.clean_from_noise(noisy, noise, k)[:3], x[:3], atol=1e-3)


def test_level_minus_one_is_clean() -> None:
    schedule = Schedule(8)
    assert schedule.abar_at(torch.tensor([-1, 0])).flatten().tolist() == [1.0, pytest.approx(float(schedule.abar[0]))]
