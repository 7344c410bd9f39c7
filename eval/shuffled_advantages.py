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

from offline_cai import commands, evaluation_commands
from offline_cai.algorithms.iql import IQL
from offline_cai.training import experiment


def shuffled(self: IQL, error: Tensor) -> Tensor:
    return _advantage(self, error)[torch.randperm(len(error), generator=ORDER)]


_advantage, ORDER = IQL.advantage, torch.Generator().manual_seed(9)


def main() -> None:
    torch.set_num_threads(1)
    dataset, protocol, run, *words = sys.argv[1:]
    flags = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    IQL.advantage = shuffled  # type: ignore[method-assign]
    exp = experiment.load("iql-hopper-medium", {**flags, "dataset": dataset, "protocol": protocol})
    folder = commands.train(exp, Path(run), quiet=True)
    data = evaluation_commands.evaluate(folder, flags={"references": "[]", "episodes": "10"}, quiet=True)
    result = data["results"][data["policy"]]
    print(json.dumps({"dataset": dataset, "mean": result["mean"], "se": result["se"], "episodes": result["n"]}))


if __name__ == "__main__":
    main()
