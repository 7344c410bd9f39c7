"""Why the exact posterior buys the lottery ticket, and the variational cure.

A ticket costs 1 and wins a prize with probability 1e-6. Asked "which actions would explain success?", exact inference
answers: buy, and believe that you win. Seeing a large prize is evidence that the draw went well, so the exact posterior
conditions the *draw* on success, not only the action: its policy is that of an optimist who thinks luck can be chosen.
The variational backup keeps the true draw and lets only the action vary: it buys once the ticket is worth its price.

    python -m offline_cai.inference.lottery [PICTURE.png]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from offline_cai.inference.tabular import MDP, Backup, elbo, kl_to_posterior, solve

HOME, POOR, RICH = range(3)
KEEP, BUY = range(2)

WIN = 1e-6  # probability that a ticket wins
PRICE = 1.0  # reward units, as all rewards here


class Belief(NamedTuple):
    """What one backup does and believes."""

    buys: float  # p(buy | O)
    believes: float  # p(win | buy, O)
    true_return: float  # expected return of its policy in the real world, reward units


def lottery(prize: float) -> MDP:
    """Two steps: keep or buy at home; then collect the prize if rich."""
    transition = np.zeros((3, 2, 3))
    transition[:, :, POOR] = 1.0
    transition[HOME, BUY] = [0.0, 1.0 - WIN, WIN]
    reward = np.zeros((2, 3, 2))
    reward[0, HOME, BUY] = -PRICE
    reward[1, RICH, :] = prize
    return MDP(transition, reward, initial=[1.0, 0.0, 0.0])


def belief(prize: float, backup: Backup, temperature: float = 1.0) -> Belief:
    """Solve the lottery with one backup."""
    mdp = lottery(prize)
    answer = solve(mdp, temperature, backup)
    buys = float(answer.policy[0, HOME, BUY])
    return Belief(
        buys,
        believes=float(answer.dynamics_at(0)[HOME, BUY, RICH]),
        true_return=buys * (WIN * prize - PRICE),
    )


def table(prizes: tuple[float, ...] = (10.0, 100.0, 1e4, 1e7)) -> str:
    """Both backups side by side, as text."""
    head = f"{'':>10} | {'exact posterior':^33} | {'variational (true dynamics kept)':^33}"
    names = f"{'p(buy)':>7} {'p(win|buy)':>11} {'true return':>13}"
    lines = [head, f"{'prize':>10} | {names} | {names}"]
    for prize in prizes:
        sides = (belief(prize, "posterior"), belief(prize, "variational"))
        cells = (f"{b.buys:7.4f} {b.believes:11.2g} {b.true_return:13.4f}" for b in sides)
        lines.append(f"{prize:10g} | " + " | ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def identity(prize: float = 100.0) -> str:
    """log p(O) = ELBO + KL for both policies when the dynamics stay true, as text."""
    mdp = lottery(prize)
    log_evidence = solve(mdp, backup="posterior").log_evidence
    lines = [f"prize {prize:g}: log p(O) = {log_evidence:.6f} nats"]
    for backup in ("posterior", "variational"):
        policy = solve(mdp, backup=backup).policy
        bound, gap = elbo(mdp, policy), kl_to_posterior(mdp, policy)
        lines.append(f"  {backup + ' policy':<19} ELBO {bound:10.6f} + KL {gap:10.6f} = {bound + gap:.6f}")
    return "\n".join(lines)


def picture(path: str | Path) -> None:
    """Draw p(buy) and the believed p(win | buy) against the prize, both backups."""
    from matplotlib.figure import Figure

    prizes = np.logspace(0, 8, 161)
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    does, thinks = figure.subplots(1, 2, sharex=True)
    looks: tuple[tuple[Backup, str, str, str], ...] = (
        ("posterior", "exact posterior", "#c0392b", "-"),
        ("variational", "variational", "#1f5a93", "--"),
    )
    for backup, label, colour, line in looks:
        beliefs = [belief(float(prize), backup) for prize in prizes]
        does.plot(prizes, [b.buys for b in beliefs], line, color=colour, label=label, linewidth=2)
        thinks.plot(prizes, [b.believes for b in beliefs], line, color=colour, label=label, linewidth=2)
    does.axvline(PRICE / WIN, color="0.6", linewidth=1)
    does.text(PRICE / WIN, 0.03, " a fair ticket", color="0.4", fontsize=9)
    does.set(xscale="log", xlabel="prize (reward, temperature 1)", ylabel="p(buy)", ylim=(-0.03, 1.06))
    does.set_title("What it does", fontsize=11)
    thinks.set(yscale="log", xlabel="prize (reward, temperature 1)", ylabel="p(win | buy) it believes", ylim=(2e-7, 3))
    thinks.set_title("What it believes about the draw", fontsize=11)
    for axes in (does, thinks):
        axes.spines[["top", "right"]].set_visible(False)
    thinks.legend(frameon=False, loc="center right", fontsize=9)
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> None:
    print(table(), identity(), sep="\n\n")
    if arguments:
        picture(arguments[0])
        print(f"\npicture: {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
