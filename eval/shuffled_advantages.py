"""Is it the spread of IQL's weights or what they follow? `shuffled_advantages.py DATASET PROTOCOL RUN [--key VALUE]`.

Trains `iql-hopper-medium` on a dataset with the advantages of each batch in random order. Weights that have nothing to
do with the actions leave the best fit where cloning has it, and only cost samples; so what IQL loses beyond that, it
loses because its advantages follow the actions. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from offline_cai import commands, evaluation_commands, seeding
from offline_cai.algorithms.iql import IQL
from offline_cai.core import Batch
from offline_cai.training import experiment

ORDER = 9
"""A stream of random numbers that IQL draws nothing from."""


def shuffled(self: IQL, batch: Batch, q: Tensor) -> tuple[Tensor, Tensor]:
    wanted, advantage = _backup(self, batch, q)
    return wanted, advantage[seeding.uniform(batch.key, (1,), stream=ORDER)[:, 0].argsort()]


_backup = IQL.backup


def main() -> None:
    torch.set_num_threads(1)
    dataset, protocol, run, *words = sys.argv[1:]
    flags = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    IQL.backup = shuffled  # type: ignore[method-assign]
    exp = experiment.load("iql-hopper-medium", {**flags, "dataset": dataset, "protocol": protocol})
    folder = commands.train(exp, Path(run), quiet=True)
    data = evaluation_commands.evaluate(folder, flags={"references": "[]", "episodes": "10"}, quiet=True)
    result = data["results"][data["policy"]]
    print(json.dumps({"dataset": dataset, "mean": result["mean"], "se": result["se"], "episodes": result["n"]}))


if __name__ == "__main__":
    main()
