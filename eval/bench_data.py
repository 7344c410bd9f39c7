"""What the data layer saves, and what it costs: `python eval/bench_data.py [--keep FILE]`.

Prints a table for people and, as its last line, one JSON object. `--keep` writes it, with what lies behind it, to a
file. All times are CPU seconds, medians of rounds in which the two sides of a ratio take turns. What is compared:

- minari_read_ratio, minari_dict_read_ratio: the user's loop over the episodes of a Minari dataset of 200,000 steps
  (`iterate_episodes`; observations, of a dict side by side, actions, rewards and ends of each episode to arrays; all
  arrays concatenated at the end) / our first `trajectories(id)`: read, checked, written, mapped. Long episodes of a Box
  (hopper's spaces, no infos), and short ones of a Dict (the point maze's spaces, and four infos as in its public data:
  Minari's loop reads them too, ours does not). Numbers are random.
- reopen_ratio: the same loop, over the long episodes, / our second `trajectories(id)`. open_ms: the slowest opening, of
  these two datasets and of stores up to 10 million steps.
- transition_batch_ratio, window_batch_ratio: batches of 256 transitions, and of 32 windows of 128 steps: torch's
  DataLoader over a Dataset that cuts one item at a time out of tensors in memory, its returns computed beforehand /
  ours, drawn and gathered from the mapped store. These ratios, and the next, are those of 200,000 steps.
- transition_vs_memory, window_vs_memory: one bare `index_select` of the same rows, drawn and numbered in the same way,
  from a tensor in memory / ours. It is the honest ceiling: it leaves out ends, padding and returns, and cuts nothing
  into fields. (In the file, `pair` is a stricter one for transitions: two rows that follow each other are one item.)
- anon_mib_10m: the most anonymous memory (RssAnon), above that after the imports, while behaviour cloning fits its
  normaliser to a store of 10 million steps and trains on it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from offline_cai.core import Box, Episode, Field, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.provenance import versions

STEPS = 200_000  # of the Minari datasets, and of the store whose batches are compared
SIZES = (10_000, STEPS, 1_000_000, 10_000_000)  # of the stores
BATCHES = {"transition": (256, 1), "window": (32, 128)}  # windows of a batch, steps of a window
HOPPER = Spec((Field("observation", 11),), Box((-1.0,) * 3, (1.0,) * 3))
POINT_MAZE = Spec(
    (Field("achieved_goal", 2), Field("desired_goal", 2), Field("observation", 4)), Box((-1.0,) * 2, (1.0,) * 2)
)
TRAINING_STEPS = 300
Detail = dict[str, Any]


def take_turns(sides: dict[str, Callable[[], object]], rounds: int, repeats: int = 1) -> dict[str, float]:
    """CPU seconds of one call of each side: the median of rounds, each of which calls every side `repeats` times."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            start = time.process_time()
            for _ in range(repeats):
                work()
            seconds[name].append((time.process_time() - start) / repeats)
    return {name: median(values) for name, values in seconds.items()}


def episodes(spec: Spec, steps: int, mean: int) -> Iterator[Episode]:
    """Episodes of random numbers with `steps` steps in all, of lengths even between half and one and a half `mean`."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(40 * mean, spec.obs_width))
    action = rng.uniform(-1, 1, size=(40 * mean, spec.action_width)).astype(np.float32)
    while steps:
        length = min(int(rng.integers(mean // 2, mean * 3 // 2)), steps)
        steps -= length
        part = slice(at := int(rng.integers(38 * mean)), at + length)
        yield Episode(obs[at : at + length + 1], action[part], rng.normal(size=length), bool(rng.integers(2)))


# Minari --------------------------------------------------------------------------------------------------------------


def minari_dataset(name: str, spec: Spec, mean: int) -> str:
    """Write a Minari dataset and return its id."""
    import gymnasium as gym
    import minari
    from minari.data_collector import EpisodeBuffer

    spaces = {field.name: gym.spaces.Box(-np.inf, np.inf, (field.width,), np.float64) for field in spec.obs}
    nested = len(spaces) > 1
    buffers = []
    for episode in episodes(spec, STEPS, mean):
        cuts = np.cumsum([field.width for field in spec.obs])[:-1]
        parts = dict(zip(spaces, np.split(episode.obs, cuts, axis=1), strict=True))
        ends = np.zeros((2, len(episode.reward)), dtype=bool)
        ends[0 if episode.terminal else 1, -1] = True
        obs, infos = parts if nested else episode.obs, None
        if nested:  # as in D4RL/pointmaze: one for each observation
            position, velocity, goal = np.split(episode.obs, [2, 4], axis=1)[:3]
            success = np.zeros(len(episode.obs), dtype=bool)
            infos = {"success": success, "goal": goal[:, :2], "qpos": position, "qvel": velocity}
        buffers.append(EpisodeBuffer(None, None, None, obs, episode.action, episode.reward, *ends, infos))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an author, among others
        minari.create_dataset_from_buffers(
            f"bench/{name}-v0",
            buffers,
            observation_space=gym.spaces.Dict(spaces) if nested else spaces["observation"],
            action_space=gym.spaces.Box(-1, 1, (spec.action_width,), np.float32),
        )
    return f"bench/{name}-v0"


def user_loop(dataset_id: str) -> list[np.ndarray]:
    import minari

    parts = []
    for episode in minari.load_dataset(dataset_id).iterate_episodes():
        obs = episode.observations
        if isinstance(obs, dict):
            obs = np.concatenate([obs[name] for name in sorted(obs)], axis=1)
        parts.append((obs, episode.actions, episode.rewards, episode.terminations, episode.truncations))
    return [np.concatenate(column, dtype=np.float32) for column in zip(*parts, strict=True)]


def reading(rounds: int) -> Detail:
    """Seconds of the user's loop, of our first reading and of our second, by dataset."""
    from offline_cai.data import minari
    from offline_cai.data.cache import cache_at

    found: Detail = {}
    for name, spec, mean in (("box", HOPPER, 600), ("dict", POINT_MAZE, 80)):
        dataset_id = minari_dataset(name, spec, mean)
        folders = (Path(os.environ["OFFLINE_CAI_CACHE"]) / f"{name}{number}" for number in count())

        def convert(dataset_id: str = dataset_id, folders: Iterator[Path] = folders) -> None:
            with cache_at(next(folders)):
                minari.trajectories(dataset_id)

        store = minari.trajectories(dataset_id)
        found[name] = take_turns({"loop": lambda i=dataset_id: user_loop(i), "convert": convert}, rounds)
        found[name] |= take_turns({"reopen": lambda i=dataset_id: minari.trajectories(i)}, 5 * rounds)
        found[name] |= {"episodes": store.num_episodes, "steps": store.num_steps}
    return found


# Batches -------------------------------------------------------------------------------------------------------------


class Items(Dataset):
    """What one writes first: tensors in memory, cut one window at a time, padded as ours are."""

    def __init__(self, windows: Windows, store: Trajectories) -> None:
        self.starts, self.ahead = windows.starts, torch.arange(windows.horizon + 1)
        arrays = store.obs, store.action, store.reward, store.end
        self.obs, self.action, self.reward, self.end = (torch.from_numpy(np.array(array)) for array in arrays)
        self.returns = torch.from_numpy(store.return_to_go(windows.discount))
        self.true_end = torch.from_numpy(np.repeat(store.terminal, np.diff(store.offsets)))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        start = self.starts[item]
        end, at = self.end[start], start + self.ahead
        rows = torch.minimum(at, end)
        return {
            "obs": self.obs[rows],
            "action": self.action[rows[:-1]],
            "reward": self.reward[rows[:-1]],
            "returns": self.returns[rows[:-1]],
            "terminal": self.true_end[start] & (at[1:] == end),
            "valid": at[1:] <= end,
        }


def ours(windows: Windows, size: int) -> Callable[[], object]:
    rng, key = np.random.default_rng(0), torch.zeros(size, dtype=torch.int64)
    return lambda: windows.gather(windows.draw(rng, size), key)


def bare(windows: Windows, memory: torch.Tensor, size: int) -> Callable[[], object]:
    """`index_select` of the rows of the same windows from a tensor in memory."""
    rng, ahead, last = np.random.default_rng(0), np.arange(windows.horizon + 1), len(memory) - windows.horizon - 1

    def work() -> torch.Tensor:
        first = np.minimum(windows.draw(rng, size), last)
        return memory.index_select(0, torch.from_numpy((first[:, None] + ahead).ravel()))

    return work


def bare_pair(windows: Windows, memory: torch.Tensor, size: int) -> Callable[[], object]:
    """`index_select` of transitions from a view of the tensor in which every row is followed by the next."""
    rng, (count, width) = np.random.default_rng(0), memory.shape
    pairs = memory.as_strided((count - 1, 2 * width), (width, 1))
    return lambda: pairs.index_select(0, torch.from_numpy(windows.draw(rng, size)))


def per_item(windows: Windows, store: Trajectories, size: int) -> Callable[[], object]:
    """The next batch of a DataLoader whose iterator is made, and its order drawn, before the clock starts."""
    batches = iter(DataLoader(Items(windows, store), batch_size=size, shuffle=True))
    return lambda: next(batches)


def batches(root: Path, rounds: int) -> Detail:
    """Seconds of a batch by kind, at each size, beside the bare gather; the per-item loader at one of them."""
    found: Detail = {kind: {} for kind in BATCHES} | {"open": {}}
    for steps in SIZES:
        store = Trajectories.open(root / str(steps))
        found["open"][steps] = take_turns({"open": lambda p=store.path: Trajectories.open(p)}, 5 * rounds)["open"]
        memory = torch.from_numpy(np.array(store.rows))  # it also brings the whole file into the page cache
        for kind, (size, horizon) in BATCHES.items():
            windows = Windows(store, horizon)
            sides = {"ours": ours(windows, size), "bare": bare(windows, memory, size)}
            if horizon == 1:
                sides["pair"] = bare_pair(windows, memory, size)
            take_turns(sides, 1, 2000)  # the mapped pages are entered in this process's page table
            found[kind][steps] = take_turns(sides, 3 * rounds, 400)
            if steps == STEPS:
                sides = {"ours": sides["ours"], "loader": per_item(windows, store, size)}
                found[kind]["loader"] = take_turns(sides, rounds, 20)
    return found


# Memory --------------------------------------------------------------------------------------------------------------


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def train(path: Path) -> Detail:
    """Train on a store and watch the anonymous memory every 2 ms, in a process of its own."""
    from offline_cai.algorithms.bc import BC, BCConfig
    from offline_cai.training.sources import OfflineSource

    torch.nn.Linear(1, 1)(torch.zeros(1, 1)).backward()
    imports, most, done = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    store = Trajectories.open(path)
    algorithm = BC(store.spec, BCConfig())
    algorithm.fit(store.chunks)
    source = OfflineSource(Windows(store, 1), 256, seed=0)
    ready = time.process_time() - start
    optimiser = torch.optim.AdamW(algorithm.parameters(), lr=1e-3)
    for step in range(TRAINING_STEPS):
        optimiser.zero_grad()
        loss, _ = algorithm(source(step))
        loss.backward()
        optimiser.step()
    done.set()
    watcher.join()
    return {
        "after imports": imports,
        "most": most[0],
        "seconds to the first batch": ready,
        "loss": float(loss.detach()),
    }


def memory(path: Path) -> Detail:
    command = [sys.executable, __file__, "--train", str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# All of it -----------------------------------------------------------------------------------------------------------


def measure(root: Path, rounds: int) -> tuple[dict[str, float], Detail]:
    """The figures of the last line, and what lies behind them."""
    os.environ["MINARI_DATASETS_PATH"], os.environ["OFFLINE_CAI_CACHE"] = str(root / "minari"), str(root / "cache")
    for steps in SIZES:
        Trajectories.write(root / str(steps), HOPPER, episodes(HOPPER, steps, 600))
    detail = {"minari": reading(rounds), "batches": batches(root, rounds), "memory": memory(root / str(SIZES[-1]))}
    box, nested, kinds = detail["minari"]["box"], detail["minari"]["dict"], detail["batches"]
    figures = {
        "minari_read_ratio": box["loop"] / box["convert"],
        "minari_dict_read_ratio": nested["loop"] / nested["convert"],
        "reopen_ratio": box["loop"] / box["reopen"],
    }
    for kind in ("window", "transition"):
        figures[f"{kind}_batch_ratio"] = kinds[kind]["loader"]["loader"] / kinds[kind]["loader"]["ours"]
    for kind in ("window", "transition"):
        figures[f"{kind}_vs_memory"] = kinds[kind][STEPS]["bare"] / kinds[kind][STEPS]["ours"]
    figures["open_ms"] = 1e3 * max(box["reopen"], nested["reopen"], *kinds["open"].values())
    figures["anon_mib_10m"] = detail["memory"]["most"] - detail["memory"]["after imports"]
    return {name: float(f"{value:.4g}") for name, value in figures.items()}, detail


def table(detail: Detail) -> str:
    lines = [
        f"{'Minari, 200,000 steps':<26}{'episodes':>10}{'loop s':>10}{'convert s':>10}{'reopen ms':>10}{'ratio':>8}"
    ]
    for name, row in detail["minari"].items():
        ratio = row["loop"] / row["convert"]
        cells = f"{row['loop']:>10.3f}{row['convert']:>10.3f}{ratio:>10.2f}{1e3 * row['reopen']:>10.2f}"
        lines.append(f"{name:<26}{row['episodes']:>10}{cells}")
    lines += ["", f"{'microseconds by steps':<26}" + "".join(f"{steps:>12,}" for steps in SIZES)]
    for kind, (size, horizon) in BATCHES.items():
        rows = [detail["batches"][kind][steps] for steps in SIZES]
        for side, label in (("ours", f"{size} x {horizon}"), ("bare", "  bare index_select")):
            lines.append(f"{label:<26}" + "".join(f"{1e6 * row[side]:>12.1f}" for row in rows))
        loader = " " * 12 * SIZES.index(STEPS) + f"{1e6 * detail['batches'][kind]['loader']['loader']:>12.1f}"
        lines.append(f"{'  DataLoader':<26}{loader}")
    opened = "".join(f"{1e6 * detail['batches']['open'][steps]:>12.1f}" for steps in SIZES)
    lines += [f"{'opening':<26}{opened}", ""]
    found = detail["memory"]
    grown = found["most"] - found["after imports"]
    lines.append(
        f"training on 10 million steps: {grown:.0f} MiB anonymous above {found['after imports']:.0f} of imports"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write the result to this JSON file as well")
    parser.add_argument("--rounds", type=int, default=5, help="of each comparison (default: %(default)s)")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.train:
        print(json.dumps(train(arguments.train)))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-data-") as root:
        figures, detail = measure(Path(root), arguments.rounds)
    if arguments.keep:
        about = {"command": "make bench-data", "date": date.today().isoformat(), "versions": versions()}
        about |= {"load before and after": [load, os.getloadavg()[0]]}
        arguments.keep.write_text(json.dumps({**about, "result": figures, "detail": detail}, indent=1) + "\n")
    print(table(detail))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
