"""How near guided samplers come to exact posteriors: a part of `make bench-exactness`.

Prints tables for people and, as its last line, one JSON object: the figures by method. A point mass on a line, 16 rows
of [position, velocity, force], 48 numbers of which the first state (or the first and the last) is given; a quadratic
reward, at the temperature where the posterior is 5 nats from the prior given what is known. KL is from the sampler's
law to the exact one: by moment propagation where every step is affine (n = 0), else from n samples, less their bias.

`--weights FOLDER` keeps the trained networks there and takes them from there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offline_cai import seeding
from offline_cai.core import Known
from offline_cai.diffusion import guidance
from offline_cai.diffusion.evidence import Return
from offline_cai.diffusion.exact import ExactDenoiser, gaussian_kl, propagate
from offline_cai.diffusion.particles import sequential
from offline_cai.diffusion.residual import Residual, measure, wiener
from offline_cai.diffusion.sampler import Denoise, Guide, ddpm, unguided
from offline_cai.diffusion.schedule import Schedule
from offline_cai.inference.gaussian import GaussianLaw, LinearGaussian, QuadraticReward
from offline_cai.inference.temperatures import gaussian_temperature
from offline_cai.networks.temporal_mlp import FilmBlock

F64 = torch.float64
HORIZON, WIDTH, LEVELS, NATS = 16, 3, 64, 5.0
PARTICLES = 16
SCHEDULE = Schedule(LEVELS).double()

# ---- the problem


def process() -> LinearGaussian:
    """A damped point mass, pushed by noisy forces that pull it back to the origin."""
    return LinearGaussian(
        [[1.0, 0.3], [0.0, 0.9]],
        [[0.0], [0.4]],
        horizon=HORIZON,
        initial_mean=[0.0, 0.0],
        initial_covariance=[[1.0, 0.0], [0.0, 0.6]],
        action_covariance=[[0.8]],
        noise_covariance=[[0.04, 0.0], [0.0, 0.09]],
        gain=[[-0.5, -0.6]],
    )


def conditions(last: bool) -> tuple[Tensor, Tensor]:
    value, mask = torch.zeros(HORIZON, WIDTH, dtype=F64), torch.zeros(HORIZON, WIDTH, dtype=torch.bool)
    value[0, :2], mask[0, :2] = torch.tensor([-1.0, 0.5], dtype=F64), True
    if last:
        value[-1, :2], mask[-1, :2] = torch.tensor([0.8, 0.0], dtype=F64), True
    return value, mask


@dataclass(frozen=True)
class Task:
    """A prior given what is known, evidence, and the exact posterior's mean [d], covariance [d, d] and log-evidence."""

    exact: ExactDenoiser
    evidence: Return
    temperature: float
    mean: Tensor
    covariance: Tensor
    log_evidence: float

    @property
    def law(self) -> GaussianLaw:
        return self.exact.law

    @property
    def prior(self) -> Task:
        """The same without evidence."""
        nothing = Return(lambda x: 0 * x[:, 0, 0], quadratic=True)
        return Task(self.exact, nothing, 1.0, self.law.mean.flatten(), self.law.covariance, 0.0)

    def distance(self, mean: Tensor, covariance: Tensor) -> tuple[float, float]:
        """KL of N(mean, covariance) to the posterior, and the mean's error in deviations, over the free numbers."""
        f = ~self.exact.mask.flatten()
        error = ((mean - self.mean)[f] / self.covariance.diagonal()[f].sqrt()).square().mean().sqrt()
        kl = gaussian_kl(mean[f], covariance[f][:, f], self.mean[f], self.covariance[f][:, f])
        return kl, float(error)

    def guide(self, name: str, **options: Any) -> Guide:
        if name == "none":
            return unguided
        return partial(guidance.GUIDES[name], evidence=self.evidence, temperature=self.temperature, **options)


def quadratic(last: bool) -> Task:
    """Follow a straight line to 1.5, at some cost in speed and force."""
    exact = ExactDenoiser(process(), SCHEDULE, *conditions(last))
    target = torch.zeros(HORIZON, WIDTH, dtype=F64)
    target[:, 0] = torch.linspace(-1.0, 1.5, HORIZON)
    reward = QuadraticReward.toward(target, torch.diag(torch.tensor([1.0, 0.1, 0.05], dtype=F64)))
    weight, linear, _ = reward.over(HORIZON, WIDTH)
    weight, f = torch.block_diag(*weight), ~exact.mask.flatten()
    gradient = (linear.flatten() - weight @ exact.law.mean.flatten())[f]
    temperature = gaussian_temperature(gradient, exact.law.covariance[f][:, f], NATS, weight[f][:, f])
    posterior = exact.law.posterior(reward, temperature=temperature)
    mean, covariance = posterior.mean.flatten(), posterior.covariance
    return Task(exact, Return(reward, quadratic=True), temperature, mean, covariance, float(posterior.log_evidence))


def not_quadratic(last: bool) -> Task:
    """Pass near .8 half-way and near 1.5 in the row before the last: minus rounded distances, exact on a grid.

    The reward looks at two numbers u. The posterior of u is a sum over a grid, the rest given u is the prior's.
    """
    exact, rows, goals = ExactDenoiser(process(), SCHEDULE, *conditions(last)), (8, 14), (0.8, 1.5)

    def reward(x: Tensor) -> Tensor:
        away = torch.stack([x[..., row, 0] - goal for row, goal in zip(rows, goals, strict=True)])
        return -(0.02 + away.square()).sqrt().sum(0)

    mean, covariance = exact.law.mean.flatten(), exact.law.covariance
    seen = [row * WIDTH for row in rows]
    corner = covariance[seen][:, seen]
    white = torch.cartesian_prod(*[torch.linspace(-8, 8, 801, dtype=F64)] * 2)
    u = mean[seen] + white @ torch.linalg.cholesky(corner).T
    grid = torch.zeros(len(u), HORIZON, WIDTH, dtype=F64)
    grid[:, rows, 0] = u
    worth, log_prior = reward(grid), (-0.5 * white.square().sum(1)).log_softmax(0)

    def nats(temperature: float) -> float:
        joint = log_prior + worth / temperature
        return float(joint.softmax(0) @ (worth / temperature) - joint.logsumexp(0))

    cold, hot = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(cold * hot)
        cold, hot = (middle, hot) if nats(middle) > NATS else (cold, middle)
    joint = log_prior + worth / cold
    weight = joint.softmax(0)
    first = weight @ u
    spread = (u - first).T @ (weight[:, None] * (u - first))
    gain = torch.linalg.solve(corner, covariance[seen]).T
    mean = mean + gain @ (first - mean[seen])
    covariance = covariance + gain @ (spread - corner) @ gain.T
    return Task(exact, Return(reward), cold, mean, covariance, float(joint.logsumexp(0)))


# ---- the denoisers


class Mlp(nn.Module):
    """Rows [N, R, D] and levels [N] to rows: a residual MLP on the flattened rows."""

    def __init__(self, width: int = 256, layers: int = 3, embedding: int = 64) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(17, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        self.first, self.last = nn.Linear(HORIZON * WIDTH, width), nn.Linear(width, HORIZON * WIDTH)
        self.layers = nn.ModuleList(FilmBlock(width, embedding) for _ in range(layers))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        time = (k[:, None].to(x) + 0.5) / LEVELS
        waves = time * torch.arange(1, 9) * (math.pi / 2)
        embedding = self.embed(torch.cat([time, waves.sin(), waves.cos()], -1))
        h = self.first(x.flatten(1))
        for layer in self.layers:
            h = layer(h, embedding)
        return self.last(h).view_as(x)


def from_velocity(network: Callable[[Tensor, Tensor], Tensor]) -> Denoise:
    """A denoiser whose network predicts v = sqrt(abar) eps - sqrt(1 - abar) x_0."""

    def denoise(x: Tensor, k: Tensor) -> Tensor:
        abar = SCHEDULE.abar_at(k).to(x)
        return abar.sqrt() * x - (1 - abar).sqrt() * network(x, k)

    return denoise


def train(network: nn.Module, mask: Tensor, steps: int, batch: int = 256, rate: float = 2e-3, seed: int = 0) -> float:
    """v-prediction on windows of the process with their known numbers imposed; the weights end as their average.

    Adam, cosine to zero, average with decay .999. Returns CPU seconds.
    """
    began, abar = time.process_time(), SCHEDULE.abar.float()
    data = process().sample(200_000, torch.Generator().manual_seed(seed)).float()
    optimiser = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    weights = list(network.parameters())
    average = [weight.detach().clone() for weight in weights]
    g = torch.Generator().manual_seed(seed + 1)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = data[torch.randint(len(data), (batch,), generator=g)]
        k = torch.randint(LEVELS, (batch,), generator=g)
        a, noise = abar[k][:, None, None], torch.randn(x.shape, generator=g)
        noised = Known(x, mask.expand_as(x)).impose(a.sqrt() * x + (1 - a).sqrt() * noise)
        error = (network(noised, k) - a.sqrt() * noise + (1 - a).sqrt() * x).square() * ~mask
        optimiser.zero_grad()
        (error.sum() / (batch * (~mask).sum())).backward()
        optimiser.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], max(1e-3, 9 / (step + 10)))
    with torch.no_grad():
        for weight, mean in zip(weights, average, strict=True):
            weight.copy_(mean)
    return time.process_time() - began


def learned(task: Task, steps: int, folder: Path | None, name: str) -> tuple[Denoise, Residual, dict[str, float]]:
    """A trained MLP, its residual covariance and the CPU seconds that both took."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    network, seconds = Mlp(), 0.0
    file = folder / f"{name}-{steps}.safetensors" if folder else None
    if file and file.exists():
        network.load_state_dict(load_file(file))
    else:
        seconds = train(network, task.exact.mask, steps)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(network.state_dict(), file)
    began, n = time.process_time(), 8192
    data = process().sample(n, torch.Generator().manual_seed(9)).float()
    denoise = from_velocity(network.requires_grad_(False))
    residual = measure(denoise, SCHEDULE, data, task.exact.mask, seeding.keys(5, 0, torch.arange(n)))
    parameters = float(sum(weight.numel() for weight in network.parameters()))
    times = {"training_cpu_seconds": seconds, "residual_cpu_seconds": time.process_time() - began}
    return denoise, residual, {"parameters": parameters, "steps": steps, **times}


# ---- the figures


@dataclass(frozen=True)
class Row:
    """One method. Evaluations of the denoiser and CPU milliseconds are per sample (per plan with particles)."""

    kl: float
    mean_error: float
    n: int = 0
    bias: float = 0.0  # of the KL of n samples' moments, already taken off
    kl_se: float = 0.0
    effective: float | None = None
    log_evidence_error: float | None = None
    log_evidence_se: float | None = None
    evaluations: float = 0.0
    milliseconds: float = 0.0


def sampled(task: Task, x: Tensor) -> Row:
    """KL and error of samples' moments, less the exact bias of KL at that many: about d(d + 3) / 4n."""
    x, d, n = x.flatten(1).double(), int((~task.exact.mask).sum()), len(x)
    half = (n - torch.arange(1, d + 1, dtype=F64)) / 2
    bias = 0.5 * (d / n + d * math.log((n - 1) / 2) - float(torch.digamma(half).sum()))
    kl, error = task.distance(x.mean(0), x.T.cov())
    return Row(kl - bias, error, n, bias, math.sqrt(d * (d + 3)) / (2 * n))  # the rest is chi-square, nearly


class Counted:
    """A denoiser that counts the rows it was given."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.rows, self.began = denoise, 0, time.process_time()

    def __call__(self, x: Tensor, k: Tensor) -> Tensor:
        self.rows += len(x)
        return self.denoise(x, k)

    def cost(self, row: Row, n: int) -> Row:
        spent = 1000 * (time.process_time() - self.began) / n
        return replace(row, evaluations=self.rows / n, milliseconds=spent)


def affine(task: Task, guide: Guide, residual: Residual | None, variance: str = "analytic", **options: Any) -> Row:
    denoise = Counted(options.pop("denoise", task.exact))
    choices = {"reverse_variance": variance, "guide": guide, "residual": residual}
    law = propagate(denoise, SCHEDULE, task.exact.known(1), options.get("steps", LEVELS), **choices)  # type: ignore[arg-type]
    kl, error = task.distance(*law)
    return denoise.cost(Row(kl, error), HORIZON * WIDTH + 1)


def drawn(
    task: Task, denoise: Denoise, guide: Guide, residual: Residual, n: int, dtype: torch.dtype, steps: int = LEVELS
) -> Row:
    counted, known = Counted(denoise), task.exact.known(n)
    known = Known(known.value.to(dtype), known.mask)
    key = seeding.keys(1, 0, torch.arange(n))
    options = {"reverse_variance": "analytic", "guide": guide, "residual": residual}
    x = ddpm(counted, SCHEDULE, known, key, None, steps=steps, **options)  # type: ignore[arg-type]
    return counted.cost(sampled(task, x), n)


def weighed(
    task: Task, denoise: Denoise, guide: Guide, residual: Residual, n: int, dtype: torch.dtype, steps: int = LEVELS
) -> Row:
    """n populations; of each one particle is drawn by its weight, so that the n are independent."""
    counted, known = Counted(denoise), task.exact.known(n)
    known = Known(known.value.to(dtype), known.mask)
    key = seeding.keys(2, 0, torch.arange(n))
    evidence = {"evidence": task.evidence, "temperature": task.temperature}
    out = sequential(
        counted, SCHEDULE, known, key, steps, PARTICLES, None, guide=guide, residual=residual, **evidence  # type: ignore[arg-type]
    )  # fmt: skip
    ratio = (out.log_evidence - task.log_evidence).exp()
    chosen = torch.multinomial(out.log_weight.exp(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    row = counted.cost(sampled(task, out.x[torch.arange(n), chosen]), n)
    return replace(
        row,
        effective=float(out.effective.mean()),
        log_evidence_error=float(ratio.mean().log()),
        log_evidence_se=float(ratio.std() / ratio.mean() / math.sqrt(n)),
    )


def best_of(
    task: Task, denoise: Denoise, residual: Residual, n: int, count: int, dtype: torch.dtype, steps: int = LEVELS
) -> Row:
    counted, known = Counted(denoise), task.exact.known(n * count)
    known = Known(known.value.to(dtype), known.mask)
    options = {"reverse_variance": "analytic", "residual": residual}
    x = ddpm(counted, SCHEDULE, known, seeding.keys(3, 0, torch.arange(n * count)), None, steps=steps, **options)  # type: ignore[arg-type]
    best = guidance.best_of(x.unflatten(0, (n, count)), task.evidence, task.temperature)
    return counted.cost(sampled(task, best), n)


def scalar(residual: Residual) -> Residual:
    """One number per level: Analytic-DPM."""
    basis, variance, outer, mask, _ = residual
    free = int((~mask).sum())
    total = variance.sum(1) + outer * (free - variance.shape[1])
    return residual._replace(basis=basis[:, :, :0], variance=variance[:, :0], outer=total / free)


def exact_rows(task: Task, n: int, steps: int = LEVELS) -> dict[str, Row]:
    exact, residual = task.exact, task.exact.residual
    whole = ExactDenoiser(process(), SCHEDULE)
    rows = {
        "unguided, posterior variance": affine(task.prior, unguided, None, "posterior", steps=steps),
        "unguided, beta": affine(task.prior, unguided, None, "beta", steps=steps),
        "unguided, analytic scalar": affine(task.prior, unguided, scalar(residual), steps=steps),
        "unguided, analytic": affine(task.prior, unguided, residual, steps=steps),
        "unguided, not told what is known": affine(task.prior, unguided, residual, denoise=whole, steps=steps),
    }
    for name in ("at_noisy", "at_mean", "through_denoiser", "jacobian", "corrected"):
        rows[name] = affine(task, task.guide(name), residual, steps=steps)
    rows["best of 16"] = best_of(task, exact, residual, n // 2, 16, F64, steps)
    for name in ("none", "through_denoiser", "corrected"):
        rows[f"SMC, {name}"] = weighed(task, exact, task.guide(name), residual, n, F64, steps)
    return rows


def learned_rows(task: Task, denoise: Denoise, residual: Residual, n: int) -> dict[str, Row]:
    single = torch.float32
    rows = {"unguided, analytic": drawn(task.prior, denoise, unguided, residual, n, single)}
    for name in ("at_noisy", "at_mean", "through_denoiser", "corrected"):
        rows[name] = drawn(task, denoise, task.guide(name), residual, n, single)
    filtered = wiener(process().covariance, SCHEDULE, task.exact.mask)
    rows["corrected, Wiener"] = drawn(task, denoise, task.guide("corrected"), filtered, n, single)
    rows["jacobian"] = drawn(task, denoise, task.guide("jacobian"), residual, n // 32, single)
    rows["best of 16"] = best_of(task, denoise, residual, n // 8, 16, single)
    for name in ("none", "through_denoiser", "corrected"):
        rows[f"SMC, {name}"] = weighed(task, denoise, task.guide(name), residual, n // 8, single)
    return rows


def curved_rows(
    task: Task, denoise: Denoise, residual: Residual, n: int, dtype: torch.dtype, steps: int = LEVELS
) -> dict[str, Row]:
    sizes = (residual, n, dtype, steps)
    rows = {name: drawn(task, denoise, task.guide(name), *sizes) for name in ("at_noisy", "through_denoiser")}
    rows["corrected, one Newton step"] = drawn(task, denoise, task.guide("corrected", newton=1), *sizes)
    rows["corrected"] = drawn(task, denoise, task.guide("corrected"), *sizes)
    rows["SMC, corrected"] = weighed(task, denoise, task.guide("corrected"), residual, n // 4, dtype, steps // 2)
    return rows


def bundles(n: int) -> dict[str, float]:
    """Two bundles of trajectories, one above and one below; linear evidence gives the upper one three in four.

    Under a linear reward each bundle moves by covariance · slope, and log-odds change by slope · (difference of means).
    """
    law = ExactDenoiser(process(), SCHEDULE, *conditions(last=True))
    side = torch.zeros(HORIZON, WIDTH, dtype=F64)
    side[1:-1, 0] = 2.5 * torch.sin(torch.linspace(0, math.pi, HORIZON, dtype=F64))[1:-1]
    f = ~law.mask.flatten()
    basis = law.residual.at(0).basis[:, : int(f.sum())]
    values = (basis.T @ law.law.covariance @ basis).diagonal()

    def denoise(x: Tensor, k: Tensor) -> Tensor:
        abar = SCHEDULE.abar_at(k)
        clean, log_p = [], []
        for sign in (1.0, -1.0):
            shifted = x - sign * abar.sqrt() * side
            clean.append(law(shifted, k) + sign * side)
            away = (shifted - abar.sqrt() * law.law.mean).flatten(1) @ basis
            log_p.append(-0.5 * (away.square() / (abar[:, 0] * values + 1 - abar[:, 0])).sum(1))
        share = torch.sigmoid(log_p[0] - log_p[1])[:, None, None]
        return share * clean[0] + (1 - share) * clean[1]

    slope = 0.5 * math.log(3) * side / side.square().sum()
    evidence = Return(lambda x: (x * slope).sum((1, 2)), quadratic=True)
    count = 8192
    g = torch.Generator().manual_seed(4)
    signs = torch.randint(0, 2, (count, 1, 1), generator=g) * 2.0 - 1
    data = law.law.sample(count, g) + signs * side
    residual = measure(denoise, SCHEDULE, data, law.mask, seeding.keys(6, 0, torch.arange(count)))
    options = {"evidence": evidence, "temperature": 1.0}

    def upper(x: Tensor) -> Tensor:
        return (((x - law.law.mean) * side).sum((-2, -1)) > 0).double()

    masses = {"exact": 0.75}
    for name in ("none", "through_denoiser", "corrected"):
        guide = unguided if name == "none" else partial(guidance.GUIDES[name], **options)
        choices = {"reverse_variance": "analytic", "guide": guide, "residual": residual}
        key = seeding.keys(7, 0, torch.arange(n))
        masses[name] = float(upper(ddpm(denoise, SCHEDULE, law.known(n), key, None, **choices)).mean())  # type: ignore[arg-type]
    plans, particles = max(1, n // 64), 64
    out = sequential(
        denoise, SCHEDULE, law.known(plans), seeding.keys(8, 0, torch.arange(plans)), LEVELS, particles, None,
        guide=partial(guidance.corrected, **options), residual=residual, **options,
    )  # fmt: skip
    share = (out.log_evidence.softmax(0)[:, None] * out.log_weight.exp() * upper(out.x)).sum()
    return {**masses, f"SMC of {particles}, corrected": float(share)}


# ---- the report


def show(title: str, rows: dict[str, Row]) -> None:
    head = f"{'KL':>9}{'± se':>7}{'mean err':>9}{'ESS':>7}{'log-evidence':>16}{'evals':>8}{'ms':>8}{'n':>7}{'bias':>7}"
    print(f"\n{title:<34}{head}")
    for name, row in rows.items():
        ess = "" if row.effective is None else f"{row.effective:.1f}"
        worth = "" if row.log_evidence_error is None else f"{row.log_evidence_error:+.3f}±{row.log_evidence_se:.3f}"
        counts = f"{row.evaluations:>8.0f}{row.milliseconds:>8.2f}{row.n:>7}{row.bias:>7.3f}"
        print(f"{name:<34}{row.kl:>9.4f}{row.kl_se:>7.3f}{row.mean_error:>9.3f}{ess:>7}{worth:>16}{counts}", flush=True)


def results(steps: int = 6000, folder: Path | None = None) -> dict[str, Any]:
    """All figures, printed while they are made."""
    found: dict[str, Any] = {}
    networks: dict[str, Any] = {}
    for last in (False, True):
        given, task = "first and last given" if last else "first given", quadratic(last)
        parts = {"exact score": exact_rows(task, 1024)}
        show(f"{given}, exact score", parts["exact score"])
        curved = not_quadratic(last)
        parts["exact score, not quadratic"] = curved_rows(curved, task.exact, task.exact.residual, 512, F64)
        show("... reward not quadratic", parts["exact score, not quadratic"])
        denoise, residual, networks[given] = learned(task, steps, folder, given.replace(" ", "-"))
        parts["learned"] = learned_rows(task, denoise, residual, 8192)
        show(f"{given}, learned", parts["learned"])
        parts["learned, not quadratic"] = curved_rows(curved, denoise, residual, 512, torch.float32)
        show("... reward not quadratic", parts["learned, not quadratic"])
        found[given] = {name: {row: asdict(figures) for row, figures in rows.items()} for name, rows in parts.items()}
    masses = bundles(4096)
    print("\nmass of the upper of two bundles  " + "   ".join(f"{name} {mass:.3f}" for name, mass in masses.items()))
    return {"nats": NATS, "guided": found, "networks": networks, "mode_mass": masses}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="training steps of each network")
    parser.add_argument("--weights", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(results(arguments.steps, arguments.weights)))


if __name__ == "__main__":
    main()
