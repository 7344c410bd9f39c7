"""The lottery: what each backup buys and believes, in closed form, and the page that shows it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from offline_cai.inference import lottery


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("prize", [1.0, 10.0, 14.0, 100.0])
def test_the_exact_posterior_conditions_the_draw(prize):
    belief = lottery.belief(prize, "posterior")
    luck = lottery.WIN * math.exp(prize)
    assert belief.buys == pytest.approx(sigmoid(math.log(luck + 1 - lottery.WIN) - lottery.PRICE), rel=1e-9)
    assert belief.believes == pytest.approx(luck / (luck + 1 - lottery.WIN), rel=1e-9)


@pytest.mark.parametrize("prize", [10.0, 1e6, 1e8])
def test_the_variational_backup_keeps_the_draw(prize):
    belief = lottery.belief(prize, "variational")
    assert belief.buys == pytest.approx(sigmoid(lottery.WIN * prize - lottery.PRICE), rel=1e-9)
    assert belief.believes == lottery.WIN
    assert belief.true_return == pytest.approx(belief.buys * (lottery.WIN * prize - lottery.PRICE))


def test_the_page_prints_both_and_draws_the_picture(tmp_path):
    target = tmp_path / "lottery.png"
    command = [sys.executable, "-m", "offline_cai.inference.lottery", str(target)]
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert page.startswith(f"{lottery.table()}\n\n{lottery.identity()}\n")
    assert "log p(O) = 84.491342 nats" in page
    assert target.read_bytes().startswith(b"\x89PNG")
