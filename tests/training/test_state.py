"""The optimiser step."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from offline_cai.core import Algorithm, Batch, Chunks, Loss, Needs, Policy, Spec
from offline_cai.errors import UserError
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.state import TrainingState


class Sometimes(Algorithm):
    """Two numbers, of which the second counts only where samples have a positive reward."""

    def __init__(self, spec: Spec, config: Any) -> None:
        super().__init__(spec, config)
        self.always, self.sometimes = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))

    @property
    def needs(self) -> Needs:
        return Needs()

    def fit(self, chunks: Chunks) -> None: ...

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        error = self.always + self.sometimes if batch.reward.any() else self.always
        return Loss({"loss": error.square() * len(batch.key)}, len(batch.key))

    def policy(self, seed: int = 0, **options: Any) -> Policy:
        raise AssertionError("it is trained alone, and nobody acts by it")


def test_a_parameter_that_a_loss_leaves_out_has_gradient_zero(spec: Spec) -> None:
    """Its moments decay and it goes on by them, as PyTorch's AdamW has it for a gradient of zero."""
    algorithm, rewards = Sometimes(spec, None), [1.0, 0.0, 0.0, 1.0]
    training = TrainingConfig(steps=4, schedule="constant", learning_rate=0.1, warmup=0, weight_decay=0.01, clip=None)
    state = TrainingState(algorithm, training, Accelerator(cpu=True))
    own = [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)]
    peer, moved = torch.optim.AdamW(own, lr=0.1, weight_decay=0.01), []
    for step, reward in enumerate(rewards):
        x = torch.full((3, 1), reward)
        batch = Batch(x[..., None], x[..., None, None], x, x > 2, x < 2, x, None, torch.arange(3))
        before = algorithm.sometimes.item()
        state.iterate(step, batch)
        moved.append(abs(algorithm.sometimes.item() - before))
        (own[0] + (own[1] if reward else 0.0 * own[1])).square().backward()
        peer.step()
        peer.zero_grad()
        assert [algorithm.always.item(), algorithm.sometimes.item()] == pytest.approx([p.item() for p in own], rel=1e-6)
    assert moved[1] > 0.01


def test_moments_of_other_phases_are_refused(spec: Spec) -> None:
    """A resume without them would be another run, and say nothing."""
    state = TrainingState(Sometimes(spec, None), TrainingConfig(steps=4), Accelerator(cpu=True))
    other = {**state.tensors(), "optimiser/critic/00000/exp_avg": torch.zeros(())}
    with pytest.raises(
        UserError, match=r"state of a run holds the optimisers of .*critic.*those of all: another version"
    ):
        state.load(other, state.facts(), "the state of a run")
