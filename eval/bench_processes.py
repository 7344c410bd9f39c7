"""What sharing a step between two processes costs: `python eval/bench_processes.py`.

An actor-critic of SAC's sizes is updated in three phases (critic, actor, temperature) of 256 samples, by the package's
step, which adds up the gradients of a phase's group in one reduction through Accelerate, and by torch's
DistributedDataParallel, which has to search for the parameters that a phase leaves without gradients. A single phase
over all parameters is compared as well, where DistributedDataParallel needs no search. Also: what it costs to look at
every loss and gradient norm before each optimiser step. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from offline_cai import seeding
from offline_cai.core import Algorithm, Batch, Box, Chunks, Field, Loss, Needs, Spec
from offline_cai.networks.mlp import mlp
from offline_cai.policies.acting import ActorPolicy
from offline_cai.policies.distributions import Gaussian
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.state import TrainingState

BATCH, ROUNDS, STEPS = 256, 20, 20


class ActorCritic(Algorithm):
    """The networks and the gradient flow of SAC on Hopper; its targets are made up."""

    def __init__(self, phases: bool) -> None:
        super().__init__(Spec((Field("observation", 11),), Box((-1.0,) * 3, (1.0,) * 3)), None)
        self.phases = phases
        self.critics = nn.ModuleList(mlp(14, (256, 256), 1) for _ in range(2))
        self.actor = mlp(11, (256, 256), 3)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    @property
    def needs(self) -> Needs:
        groups = {"critic": ("critics",), "actor": ("actor",), "temperature": ("log_temperature",)}
        return Needs(groups=groups if self.phases else {"all": ("",)})

    def fit(self, chunks: Chunks) -> None: ...

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        step, terms = batch.transition, {}
        action = torch.tanh(self.actor(step.obs)) if phase != "critic" else step.action[:, 0]
        if phase in ("critic", "all"):
            terms["critic"] = sum(
                ((self._value(q, step.obs, step.action[:, 0]) - step.reward) ** 2).sum() for q in self.critics
            )
        if phase in ("actor", "all"):
            values = [self._value(q, step.obs, action, frozen=True) for q in self.critics]
            terms["actor"] = -torch.minimum(*values).sum()
        if phase in ("temperature", "all"):
            terms["temperature"] = (self.log_temperature * action.detach().sum(-1)).sum()
        return Loss(terms, len(step.obs))

    def _value(self, critic: nn.Module, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        x = torch.cat([obs, action], dim=-1)
        weights = {name: p.detach() for name, p in critic.named_parameters()} if frozen else {}
        return torch.func.functional_call(critic, weights, (x,))[:, 0]

    def pi(self, obs: np.ndarray) -> Gaussian:
        mean = torch.tanh(self.actor(torch.as_tensor(obs, dtype=torch.float32)))
        return Gaussian(mean, torch.ones_like(mean))

    def policy(self, seed: int = 0, **options: Any) -> ActorPolicy:
        return ActorPolicy(self.spec, self.pi, seed)


def batch(step: int, rank: int, processes: int) -> Batch:
    keys = seeding.keys(0, step, torch.arange(BATCH))[rank * BATCH // processes : (rank + 1) * BATCH // processes]
    n, draw = len(keys), lambda stream, *shape: seeding.normal(keys, shape, stream)
    none = torch.zeros(n, 1, dtype=torch.bool)
    return Batch(draw(0, 2, 11), draw(1, 1, 1, 3), draw(2, 1), none, ~none, draw(2, 1), None, keys)


def ours(phases: bool, accelerator: Accelerator, check: bool = True) -> Callable[[Batch], object]:
    torch.manual_seed(0)
    state = TrainingState(ActorCritic(phases), TrainingConfig(), accelerator)
    if not check:
        state._allowed = lambda values, norms: True  # type: ignore[method-assign]
    return lambda b: [state(b, phase) for phase in state.optimisers]


def ddp(phases: bool, accelerator: Accelerator) -> Callable[[Batch], object]:
    """The same step through DistributedDataParallel: same losses, clipping and optimiser, no metrics."""
    torch.manual_seed(0)
    algorithm = ActorCritic(phases)
    parameters = {
        phase: [p for name, p in algorithm.named_parameters() if name.startswith(prefixes)]
        for phase, prefixes in algorithm.needs.groups.items()
    }
    module = DistributedDataParallel(algorithm, find_unused_parameters=phases)
    optimisers = {phase: torch.optim.AdamW(group, lr=1e-3) for phase, group in parameters.items()}

    def step(b: Batch) -> None:
        for phase, optimiser in optimisers.items():
            optimiser.zero_grad(set_to_none=True)
            loss = module(b, phase)
            (sum(loss.terms.values()) / loss.entries).backward()
            torch.nn.utils.clip_grad_norm_(parameters[phase], 1.0)
            optimiser.step()

    return step


def compare(steps: dict[str, Callable[[Batch], object]], accelerator: Accelerator) -> dict[str, float]:
    """CPU milliseconds per update and process, the fastest of rounds in which all take turns."""
    batches = [batch(i, accelerator.process_index, accelerator.num_processes) for i in range(STEPS)]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            began = time.process_time()
            for b in batches:
                step(b)
            times[name].append((time.process_time() - began) / STEPS)
    return {name: 1000 * min(rounds[1:]) for name, rounds in times.items()}


def work() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    shared = {
        f"{kind}, {name}": make(phases, accelerator)
        for phases, kind in ((True, "three phases"), (False, "one phase"))
        for name, make in (("one reduction", ours), ("DistributedDataParallel", ddp))
    }
    times = compare(shared, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(json.dumps(times))
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", action="store_true")
    if parser.parse_args().worker:
        work()
        return
    torch.set_num_threads(1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    out = subprocess.run([*command, "--worker"], capture_output=True, text=True, check=True).stdout
    times = json.loads(out.splitlines()[-1])
    alone = Accelerator(cpu=True)
    checks = {"checked": ours(True, alone), "unchecked": ours(True, alone, check=False)}
    times |= {f"one process, {name}": ms for name, ms in compare(checks, alone).items()}
    ratios = {
        kind: times[f"{kind}, DistributedDataParallel"] / times[f"{kind}, one reduction"]
        for kind in ("three phases", "one phase")
    } | {"check": times["one process, checked"] / times["one process, unchecked"]}
    for name, ms in times.items():
        print(f"{name:<44}{ms:>8.2f} ms of CPU per update")
    print("DistributedDataParallel / one reduction: " + ", ".join(f"{k} {ratios[k]:.2f}" for k in list(ratios)[:2]))
    print(f"with / without a look at every loss and norm: {ratios['check']:.3f}")
    print(json.dumps({"command": "python eval/bench_processes.py", "ms": times, "ratios": ratios}))


if __name__ == "__main__":
    main()
