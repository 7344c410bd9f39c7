"""The picture of docs/guidance.md: `python eval/plot_guidance.py docs/guidance.png`.

Left: what a guided sampler should give and what it gives, on `bench_guidance.py`'s problem with the exact denoiser.
Right: KL to the exact posterior against the number of levels and steps.
"""

import sys

import matplotlib.pyplot as plt
import torch
from bench_guidance import HORIZON, WIDTH, Task, conditions, process, quadratic
from torch import Tensor

from offline_cai.diffusion.exact import ExactDenoiser, propagate
from offline_cai.diffusion.schedule import Schedule

COLOURS = {"at_noisy": "tab:red", "through_denoiser": "tab:orange", "corrected": "tab:blue"}
NAMES = {
    "at_noisy": "gradient at x_k",
    "through_denoiser": "gradient through the denoiser",
    "corrected": "corrected by the covariance",
}


def law(task: Task, name: str, levels: int) -> tuple[Tensor, Tensor]:
    schedule = Schedule(levels).double()
    exact = ExactDenoiser(process(), schedule, *conditions(last=False))
    options = {"reverse_variance": "analytic", "guide": task.guide(name), "residual": exact.residual}
    return propagate(exact, schedule, exact.known(1), levels, **options)  # type: ignore[arg-type]


def band(axes: plt.Axes, mean: Tensor, covariance: Tensor, column: int, **style: object) -> None:
    middle = mean.view(HORIZON, WIDTH)[:, column]
    deviation = covariance.diagonal().clamp(min=0).sqrt().view(HORIZON, WIDTH)[:, column]
    fill = style.pop("fill", False)
    rows = range(HORIZON)
    if fill:
        axes.fill_between(rows, middle - 2 * deviation, middle + 2 * deviation, lw=0, **style)  # type: ignore[arg-type]
        return
    axes.plot(rows, middle, **style)  # type: ignore[arg-type]
    style.pop("label", None)
    for sign in (-2, 2):
        axes.plot(rows, middle + sign * deviation, **{**style, "lw": 1})  # type: ignore[arg-type]


def main(file: str) -> None:
    task, sizes = quadratic(last=False), (8, 16, 32, 64, 128, 256)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    band(left, task.law.mean.flatten(), task.law.covariance, 0, color="0.9", fill=True, label="prior, start given")
    band(left, task.mean, task.covariance, 0, color="0.65", fill=True, label="exact posterior")
    for name in ("at_noisy", "corrected"):
        band(left, *law(task, name, 16), 0, color=COLOURS[name], lw=1.8, label=NAMES[name])
    left.set(xlabel="row", ylabel="position", title="Mean and two deviations, 16 steps")
    left.legend(frameon=False, loc="upper left", fontsize=9)
    for name, colour in COLOURS.items():
        kl = [max(1e-6, task.distance(*law(task, name, size))[0]) for size in sizes]
        right.loglog(sizes, kl, "o-", color=colour, label=NAMES[name])
    right.set(xlabel="steps", ylabel="KL to the exact posterior, nats", title="Error against steps", ylim=(5e-7, 20))
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.minorticks_off()
    right.axhline(1e-6, color="0.8", lw=0.8, zorder=0)
    right.text(sizes[0], 1.4e-6, "below 1e-6", fontsize=9, color="0.4")
    right.legend(frameon=False, fontsize=9, loc="center right")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
