"""Guided plans of hopper against a brute-force reweighting of unguided ones: `python eval/bench_guidance_hopper.py`.

No closed form exists here. For each of some states of the data, many unguided plans weighted by exp(evidence) stand for
the posterior; every guide is compared with them: evidence, means of all planned numbers, log-evidence, and the return
that the value network predicts. Then plans are played in the simulator from the very state, and the actor that
collected the data goes on to the end.
Prints a table for people and, as its last line, one JSON object. It collects hopper-medium and trains
guide-hopper-medium, and a value network for its denoiser, where `--runs` does not hold them yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline_cai import collect, commands, config, seeding
from offline_cai.algorithms.guide import Guide
from offline_cai.core import Known
from offline_cai.data import catalogue
from offline_cai.data.windows import Windows
from offline_cai.environments.actors import Actor
from offline_cai.environments.make import make
from offline_cai.planning.config import PlannerConfig
from offline_cai.planning.sampling import draw, temperature_of
from offline_cai.training import experiment

STATES, SAMPLES, BRUTE, CHUNK = 16, 16, 1024, 256
BUDGET = 0.5  # nats between the posterior and the unguided plans
PLAYED = 4  # plans of each state that are played in the simulator
LONGEST = 500  # steps of a played plan and what follows

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "unguided": ("evidence", {"guide": "none"}),
    "value network at x_k (Diffuser)": ("value", {"guide": "at_noisy"}),
    "evidence network at x_k": ("evidence", {"guide": "at_noisy"}),
    "evidence network at the mean": ("evidence", {"guide": "at_mean"}),
    "through the denoiser": ("evidence", {"guide": "through_denoiser"}),
    "corrected": ("evidence", {"guide": "corrected"}),
    "best of 64, unguided": ("evidence", {"guide": "none", "candidates": 64}),
    "16 particles, corrected": ("evidence", {"guide": "corrected", "particles": 16}),
}


class Sample(NamedTuple):
    """Plans of a method, [STATES, n, R, D], with weights, and what they took."""

    x: Tensor
    log_weight: Tensor
    log_evidence: Tensor | None
    seconds: float
    evaluations: int


def guides(folder: Path) -> dict[str, Guide]:
    """The evidence network with its Diffuser, and a value network for the same Diffuser."""
    recipe = collect.load("hopper-medium")
    if not collect.collected(recipe):
        collect.collect(recipe, quiet=True)
    both, value = folder / "guide-hopper-medium", folder / "value-hopper-medium"
    if not both.exists():
        commands.train(experiment.load("guide-hopper-medium"), both, quiet=True)
    evidence = Guide.from_pretrained(both)
    if not value.exists():
        denoiser = folder / "diffuser-hopper-medium"
        if not denoiser.exists():
            evidence.diffuser.save_pretrained(denoiser)
        flags = {"model.kind": "value", "model.diffuser": "null", "model.denoiser": str(denoiser)}
        commands.train(experiment.load("guide-hopper-medium", flags), value, quiet=True)
    return {"evidence": evidence, "value": Guide.from_pretrained(value)}


def states(guide: Guide) -> tuple[np.ndarray, Tensor]:
    """Observations [STATES, O] of the data, and their keys."""
    needs, store = guide.needs, catalogue.trajectories("offline-cai/hopper/medium-v0")
    windows = Windows(store, needs.horizon, needs.stride, needs.discount, padding=False)
    key = seeding.keys(7, 0, torch.arange(STATES))
    return windows.gather(windows.draw(seeding.rng(7), STATES), key).obs[:, 0].double().numpy(), key


def sample(guide: Guide, obs: np.ndarray, key: Tensor, c: PlannerConfig, temperature: float, count: int) -> Sample:
    """At least `count` plans of each state; of particles one population, of candidates `count` winners."""
    diffuser, calls = guide.guided(), 0
    inner = diffuser.model

    def denoise(x: Tensor, k: Tensor) -> Tensor:
        nonlocal calls
        calls += len(x)
        return inner.denoise(x, k)

    each = 1 if c.particles > 1 else count
    known = Known(*(part.repeat_interleave(each, 0) for part in diffuser.known(obs)))
    parts, began = [], time.perf_counter()
    for number, keys in enumerate(seeding.split(key, each).flatten().split(CHUNK)):
        rows = slice(number * CHUNK, number * CHUNK + len(keys))
        some = Known(known.value[rows], known.mask[rows])
        parts.append(draw(inner._replace(denoise=denoise), some, keys, c, temperature))
    seconds = time.perf_counter() - began
    x, weight = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "log_weight"))
    evidence = None
    if parts[0].log_evidence is not None:
        each_draw = torch.cat([p.log_evidence for p in parts]).view(STATES, each)  # type: ignore[misc]
        evidence = each_draw.logsumexp(1) - math.log(each)
    if c.candidates > 1:
        x, weight = x[torch.arange(len(x)), weight.argmax(1)][:, None], weight[:, :1] * 0
    x, weight = (part.reshape(STATES, -1, *part.shape[2:]) for part in (x, weight))
    return Sample(x, weight.double().log_softmax(1), evidence, seconds, calls)


class Reference(NamedTuple):
    """Unguided plans, their evidence [STATES, BRUTE] and what it adds up to, [STATES]."""

    sample: Sample
    value: Tensor
    log_evidence: Tensor
    temperature: float


def worth(guide: Guide, x: Tensor, temperature: float) -> Tensor:
    """What a guide says of plans [STATES, n, R, D], nats."""
    flat = x.flatten(0, 1)
    with torch.no_grad():
        parts = [guide.log_evidence(part, torch.zeros(len(part)).long(), temperature) for part in flat.split(1024)]
    return torch.cat(parts).view(x.shape[:2]).double()


def realised(guide: Guide, obs: np.ndarray, drawn: Sample) -> np.ndarray:
    """Discounted returns [STATES, PLAYED] of plans drawn by weight: their actions, then the behaviour's."""
    recipe, spec = collect.load("hopper-medium"), guide.spec
    actor = Actor(config.find("hopper-medium.npz", "datasets/actors"), spec, seed=0)
    env, rng, discount = make(recipe.environment), np.random.default_rng(0), guide.needs.discount
    returns = np.zeros((STATES, PLAYED))
    env.reset(seed=0)
    for i, start in enumerate(obs):
        chosen = rng.choice(drawn.x.shape[1], size=PLAYED, p=drawn.log_weight[i].exp().numpy())
        actions = guide.diffuser.codec.decode(drawn.x[i, chosen])[1].double().numpy()[:, :, 0]  # type: ignore[union-attr]
        for j, plan in enumerate(actions):
            env.reset()
            env.unwrapped.set_state(np.concatenate([[0.0], start[:5]]), start[5:])  # type: ignore[attr-defined]
            now = start
            for t in range(LONGEST):
                action = plan[t] if t < len(plan) else actor.act(now[None])[0][0]
                now, reward, terminal, *_ = env.step(np.clip(action, spec.action.low, spec.action.high))
                returns[i, j] += discount**t * float(reward)
                if terminal:
                    break
    env.close()
    return returns


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-guidance"), help="where the trained runs are")
    torch.set_num_threads(1)
    by_kind = guides(parser.parse_args().runs)
    evidence = by_kind["evidence"]
    obs, key = states(evidence)
    base = _with(evidence.guided().config.planner, kl_budget=BUDGET)
    temperature = temperature_of(
        evidence.guided().model, evidence.diffuser.known(obs), key, _with(base, kl_samples=256)
    )
    brute = sample(
        evidence, obs, seeding.keys(8, 0, torch.arange(STATES)), _with(base, guide="none"), temperature, BRUTE
    )
    value = worth(evidence, brute.x, temperature)
    log_evidence = value.logsumexp(1) - math.log(BRUTE)
    brute = brute._replace(log_weight=value.log_softmax(1))
    reference = Reference(brute, value, log_evidence, temperature)
    rows = {"reweighted: the reference": measure(by_kind, obs, brute, reference)}
    for name, (kind, changes) in METHODS.items():
        drawn = sample(by_kind[kind], obs, key, _with(base, **changes), temperature, SAMPLES)
        rows[name] = measure(by_kind, obs, drawn, reference)
        print(f"{name:34}" + "  ".join(f"{k} {v:.3g}" for k, v in rows[name].items() if v is not None), flush=True)
    facts = {"temperature": temperature, "kl_budget": base.kl_budget, "states": STATES, "samples": SAMPLES}
    facts |= {"brute_force": BRUTE, "discount": evidence.needs.discount}
    table(rows)
    print(json.dumps({**facts, "methods": rows}))


def _with(planner: PlannerConfig, **changes: Any) -> PlannerConfig:
    return dataclasses.replace(planner, **{"candidates": 1, "particles": 1, **changes})


def measure(by_kind: dict[str, Guide], obs: np.ndarray, drawn: Sample, to: Reference) -> dict[str, float | None]:
    """A method's figures; standard errors are over states."""
    weight = drawn.log_weight.exp()
    nats = (weight * worth(by_kind["evidence"], drawn.x, to.temperature)).sum(1)
    gap = nats - (to.sample.log_weight.exp() * to.value).sum(1)
    predicted = (weight * worth(by_kind["value"], drawn.x, 1.0)).sum(1)
    played = realised(by_kind["evidence"], obs, drawn).mean(1)
    error = None if drawn.log_evidence is None else (drawn.log_evidence - to.log_evidence).numpy()
    return {
        "evidence_minus_reference_nats": float(gap.mean()),
        "evidence_minus_reference_se": float(gap.std() / math.sqrt(STATES)),
        "mean_error_sds": mean_error(by_kind["evidence"], drawn, to.sample),
        "log_evidence_error": None if error is None else float(error.mean()),
        "log_evidence_error_se": None if error is None else float(error.std() / math.sqrt(STATES)),
        "predicted_return": float(predicted.mean()),
        "realised_return": float(played.mean()),
        "realised_return_se": float(played.std(ddof=1) / math.sqrt(STATES)),
        "effective_samples": float((1 / weight.square().sum(1)).mean()),
        "evaluations_per_plan": drawn.evaluations / (STATES * (1 if drawn.log_evidence is not None else SAMPLES)),
        "milliseconds_per_plan": 1000 * drawn.seconds / (STATES * drawn.x.shape[1]),
    }


def mean_error(guide: Guide, drawn: Sample, brute: Sample) -> float:
    """Root mean square, over states and planned numbers, of the error of the mean in posterior standard deviations.

    What finite samples would show if both were from the posterior is taken off.
    """
    free = ~guide.diffuser.known(np.zeros((1, guide.spec.obs_width))).mask[0]

    def moments(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        weight, x = sample.log_weight.exp()[..., None], sample.x[:, :, free].double()
        mean = (weight * x).sum(1)
        return mean, (weight * (x - mean[:, None]) ** 2).sum(1), weight.square().sum(1)

    (mean, _, noise), (wanted, variance, floor) = moments(drawn), moments(brute)
    square = ((mean - wanted) ** 2 / variance).mean() - (noise + floor).mean()
    return float(square.clamp(min=0).sqrt())


def table(rows: dict[str, dict[str, float | None]]) -> None:
    head = ("evidence − reference, nats", "mean error, sds", "predicted", "realised", "ms")
    print(f"\n{'method':34}{head[0]:>28}{head[1]:>18}{head[2]:>12}{head[3]:>16}{head[4]:>8}")
    for name, row in rows.items():
        gap = f"{row['evidence_minus_reference_nats']:+.2f} ± {row['evidence_minus_reference_se']:.2f}"
        played = f"{row['realised_return']:.0f} ± {row['realised_return_se']:.0f}"
        figures = f"{row['mean_error_sds']:>18.3f}{row['predicted_return']:>12.1f}{played:>16}"
        print(f"{name:34}{gap:>28}{figures}{row['milliseconds_per_plan']:>8.1f}")


if __name__ == "__main__":
    main()
