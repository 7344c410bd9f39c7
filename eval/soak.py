"""What becomes of a training when things break: `python eval/soak.py` (the long form) or `--short`.

Prints a line for each fault and, as its last line, one JSON object. Each disturbed run is resumed and compared with one
that nobody disturbed: every file of the last checkpoint, by its hash, and every row of metrics but its times. Runs are
forked from a server that has imported torch once, so a run costs what its steps cost.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = ["--quiet", "--training.trackers", "[]", "--training.ema", "0.9", "--training.keep", "3"]
STEPS = 30
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["offline_cai.commands", "torch._dynamo", "torch.distributed.fsdp", "gymnasium_robotics", "soak"]
)


# Children ------------------------------------------------------------------------------------------------------------


def train(log: str, environment: dict[str, str], fault: str, arguments: list[str]) -> None:
    """What a child does: one command line, with a fault of this module built in."""
    os.setsid()
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    from offline_cai import cli

    if fault:
        name, _, value = fault.partition(":")
        globals()[f"fault_{name}"](value)
    sys.exit(cli.main(arguments))


class Run:
    """A run in a folder of its own: started, killed, resumed, compared."""

    def __init__(self, root: Path, name: str, *flags: str, processes: int = 1, config: str = "debug-bc") -> None:
        self.folder, self.log = root / name, root / f"{name}.log"
        steps = ["--training.steps", str(STEPS)]
        self.command = ["train", config, *FLAGS, *steps, *flags, "--output", str(self.folder)]
        self._processes = processes

    def start(self, fault: str = "") -> list[Any]:
        """Begin, or go on with what is there."""
        shared, port = {}, _free_port()
        children = []
        for rank in range(self._processes):
            if self._processes > 1:
                count = str(self._processes)
                shared = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = (str(self.log), shared, fault, [*self.command, "--resume"])
            children.append(FORKS.Process(target=train, args=arguments))
            children[-1].start()
        return children

    def finish(self, fault: str = "") -> int:
        """Run to the end; the first exit status that is not 0."""
        return end(self.start(fault))

    def result(self) -> tuple[Any, ...]:
        """What two equal runs have in common: hashes of the last checkpoint's files, and metrics without times."""
        from offline_cai.training import checkpoint, trackers

        last = checkpoint.find(self.folder)
        rows = trackers.read(self.folder / "metrics.jsonl")
        return json.loads((last / "manifest.json").read_text())["sha256"], [trackers.timeless(row) for row in rows]

    def traces(self, since: float) -> bool:
        """Whether it ended inside a save (or the removal of an old checkpoint), to judge by what is left of it."""
        left = [*(self.folder / "checkpoints").glob(".writing-*"), *(self.folder / "checkpoints").glob(".removing-*")]
        return any(path.stat().st_mtime >= since for path in left)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def end(children: list[Any], seconds: float = 120) -> int:
    for child in children:
        child.join(seconds)
        if child.exitcode is None:
            child.kill()
            child.join()
    return next((child.exitcode for child in children if child.exitcode), 0)


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


# Faults that are built into a child -----------------------------------------------------------------------------------


def fault_crash(at: str) -> None:
    """End without a word at the given line of all that saving executes."""
    from offline_cai.training import checkpoint

    count = 0

    def lines(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        code = frame.f_code
        saves = code.co_filename in (checkpoint.__file__, checkpoint.exports.__file__)
        if not saves or code.co_name.startswith("<"):
            return None
        if event == "line":
            count += 1
            if count == int(at):
                os._exit(137)
        return lines

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            sys.settrace(lines)
            try:
                return function(*arguments)
            finally:
                sys.settrace(None)

        return call

    checkpoint.save, checkpoint.prune = traced(checkpoint.save), traced(checkpoint.prune)


def fault_nan(at: str) -> None:
    """A NaN in the batch of one step: always ("15"), or at the first visit only ("15 once")."""
    from offline_cai.training import sources

    step_at, *once = at.split()
    original, seen = sources.OfflineSource.__call__, []

    def spoiled(self: Any, step: int) -> Any:
        batch = original(self, step)
        if step == int(step_at) and not (once and seen):
            seen.append(step)
            batch.obs[0, 0] = float("nan")
        return batch

    sources.OfflineSource.__call__ = spoiled  # type: ignore[method-assign]


def fault_float64(_: str) -> None:
    """Train in float64."""
    import torch

    from offline_cai.training import loop

    original = loop.build
    torch.set_default_dtype(torch.float64)
    loop.build = lambda *arguments: original(*arguments).double()  # type: ignore[assignment]


def fault_full(at: str) -> None:
    """No file may grow beyond 4 KB any more, from the given checkpoint on: a full disk."""
    from offline_cai.training import checkpoint

    original, calls = checkpoint.save, []

    def save(*arguments: Any) -> Path:
        calls.append(1)
        if len(calls) == int(at):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return original(*arguments)

    checkpoint.save = save  # type: ignore[assignment]


def fault_gather(value: str) -> None:
    """Algorithms of a folder as well; "FOLDER|12": the second process is killed in its 12th step of environments."""
    from offline_cai import algorithms
    from offline_cai.training.online import OnlineSource

    folder, _, last = value.partition("|")
    algorithms.__path__.append(folder)
    original, steps = OnlineSource._advance, []

    def killed(self: Any) -> None:
        steps.append(1)
        if len(steps) == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        original(self)

    if last and os.environ["RANK"] == "1":
        OnlineSource._advance = killed  # type: ignore[method-assign]


def fault_slow(seconds: str) -> None:
    """A save that takes long."""
    from offline_cai.training import checkpoint

    original = checkpoint.exports.write

    def slow(*arguments: Any) -> None:
        original(*arguments)
        time.sleep(float(seconds))

    checkpoint.exports.write = slow  # type: ignore[assignment]


# What is tried --------------------------------------------------------------------------------------------------------


class Soak:
    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.random = root, random.Random(seed)
        self.flags = ["--training.checkpoint_every", "2", "--training.evaluate_every", "15"]
        self.flags += ["--training.evaluate_episodes", "2"]

    def undisturbed(self, name: str, *flags: str, processes: int = 1) -> tuple[tuple[Any, ...], float]:
        """The result of a run that nobody disturbs, and its seconds."""
        run, began = Run(self.root, name, *flags, processes=processes), time.monotonic()
        status = run.finish()
        assert status == 0, run.said()
        return run.result(), time.monotonic() - began

    def kills(self, count: int, processes: int = 1) -> dict[str, Any]:
        """kill -9 at a random moment, of one process; then a resume."""
        self.undisturbed(f"warm-{processes}", *self.flags, processes=processes)
        wanted, seconds = self.undisturbed(f"whole-{processes}", *self.flags, processes=processes)
        exact = inside = alone = 0
        for number in range(count):
            run = Run(self.root, f"kill-{processes}-{number}", *self.flags, processes=processes)
            since, children = time.time(), run.start()
            metrics = run.folder / "metrics.jsonl"
            while processes > 1 and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.005)  # before they have met, the other one waits for as long as torch does
            time.sleep(self.random.uniform(0.1, 1) * (seconds if processes == 1 else 0.3))
            victim = self.random.choice(children)
            victim.kill()
            victim.join()
            inside += run.traces(since)
            for child in children:
                child.join(60)
                alone += child is not victim and child.exitcode is not None
            end(children, 0)
            status = run.finish()
            exact += status == 0 and run.result() == wanted
            shutil.rmtree(run.folder)
        facts = {"kills": count, "inside a save": inside, "bit-exact resumes": exact}
        return facts if processes == 1 else facts | {"the other process ended by itself": alone}

    def crashes(self, every: int) -> dict[str, Any]:
        """A crash before each line (or each n-th) that two saves execute, the removal of the older one included."""
        flags = ["--training.steps", "20", "--training.checkpoint_every", "10", "--training.keep", "1"]
        wanted, _ = self.undisturbed("whole-crash", *flags)
        points = exact = 0
        at, ended = 1, False
        while not ended:
            run = Run(self.root, f"crash-{at}", *flags)
            ended = run.finish(f"crash:{at}") == 0
            if not ended:
                points += 1
                exact += run.finish() == 0 and run.result() == wanted
            at += every
            shutil.rmtree(run.folder)
        return {"points of a save": points, "bit-exact resumes": exact}

    def signals(self, count: int, processes: int = 1) -> dict[str, Any]:
        """SIGTERM at a random moment of the steps, to one process; all stop after the same step."""
        flags = ["--training.steps", "600", "--training.checkpoint_every", "1000"]
        wanted, _ = self.undisturbed(f"whole-signal-{processes}", *flags, processes=processes)
        right = exact = 0
        slowest = 0.0
        for number in range(count):
            run = Run(self.root, f"signal-{processes}-{number}", *flags, processes=processes)
            children = run.start()
            while not (run.folder / "metrics.jsonl").exists() or not (run.folder / "metrics.jsonl").stat().st_size:
                time.sleep(0.005)
            time.sleep(self.random.uniform(0, 0.3))
            began = time.monotonic()
            os.kill(self.random.choice(children).pid, signal.SIGTERM)
            end(children)
            slowest = max(slowest, time.monotonic() - began)
            ended = [child.exitcode for child in children] == [143] * processes
            right += ended and "interrupted: stopped at step" in run.said()
            exact += run.finish() == 0 and run.result() == wanted
            shutil.rmtree(run.folder)
        return {"signals": count, "status 143": right, "slowest seconds": round(slowest, 2), "bit-exact resumes": exact}

    def second_signal(self) -> dict[str, Any]:
        """A second signal while a save takes half a minute: it ends at once, and the last checkpoint is whole."""
        from offline_cai.training import checkpoint

        flags = ["--training.steps", "100000", "--training.checkpoint_every", "100000"]
        run = Run(self.root, "second", *flags)
        children = run.start()
        while not (run.folder / "metrics.jsonl").exists() or not (run.folder / "metrics.jsonl").stat().st_size:
            time.sleep(0.01)
        os.kill(children[0].pid, signal.SIGINT)
        first = end(children)
        before = checkpoint.find(run.folder)
        written = (run.folder / "metrics.jsonl").stat().st_size
        children = run.start("slow:30")
        while (run.folder / "metrics.jsonl").stat().st_size <= written and children[0].is_alive():
            time.sleep(0.01)
        os.kill(children[0].pid, signal.SIGTERM)
        while not list((run.folder / "checkpoints").glob(".writing-*")) and children[0].is_alive():
            time.sleep(0.01)
        began = time.monotonic()
        os.kill(children[0].pid, signal.SIGTERM)
        end(children)
        seconds = time.monotonic() - began
        return {"first": first, "seconds": round(seconds, 2), "whole": checkpoint.find(run.folder) == before}

    def damage(self, count: int) -> dict[str, Any]:
        """A bit flipped, a file cut, deleted or swapped, in the last checkpoint: never loaded, the one before it is."""
        from offline_cai.errors import UserError
        from offline_cai.training import checkpoint

        run = Run(self.root, "damage", *self.flags)
        assert run.finish() == 0, run.said()
        *_, before, last = checkpoint.checkpoints(run.folder / "checkpoints")
        spare, found, kinds = self.root / "spare", 0, dict.fromkeys(("flip", "truncate", "delete", "swap"), 0)
        shutil.copytree(last, spare)
        files = [*sorted(checkpoint.FILES), "manifest.json"]
        for _ in range(count):
            kind, name = self.random.choice(list(kinds)), self.random.choice(files)
            if kind == "swap" and (last / name).read_bytes() == (before / name).read_bytes():
                kind = "flip"  # two checkpoints share their config: to swap it is no damage
            self._damage(last / name, before / name, kind)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                passed_over = checkpoint.find(run.folder) == before and len(said) == 1
            try:
                checkpoint.verify(last)
                refused = kind == "swap" and name == "manifest.json" and checkpoint.damage(last) != ""
            except UserError:
                refused = True
            found += passed_over and refused
            kinds[kind] += 1
            shutil.rmtree(last)
            shutil.copytree(spare, last)
        return {"damaged files": count, **kinds, "found, and the checkpoint before taken": found}

    def _damage(self, path: Path, other: Path, kind: str) -> None:
        data = bytearray(path.read_bytes())
        if kind == "delete":
            path.unlink()
        elif kind == "swap":
            path.write_bytes(other.read_bytes())
        elif kind == "truncate":
            path.write_bytes(data[: self.random.randrange(len(data))])
        else:
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            path.write_bytes(data)

    def malice(self) -> dict[str, Any]:
        """A pickle that would run a program, in place of each file, with a manifest that fits it."""
        from offline_cai.errors import UserError
        from offline_cai.training import checkpoint

        run, harm = Run(self.root, "malice"), self.root / "harm"
        assert run.finish() == 0, run.said()
        last, executed, refused = checkpoint.find(run.folder), 0, 0
        for name in (*sorted(checkpoint.FILES), "manifest.json"):
            kept = {path: path.read_bytes() for path in (last / name, last / "manifest.json")}
            (last / name).write_bytes(pickle.dumps(_Malice(str(harm))))
            if name != "manifest.json":
                manifest = json.loads((last / "manifest.json").read_text())
                del manifest["own sha256"]
                manifest["sha256"][name] = checkpoint.digest(last / name)
                manifest["own sha256"] = checkpoint._own_digest(manifest)
                (last / "manifest.json").write_text(json.dumps(manifest))
            for read in (checkpoint.load, checkpoint.load_state):
                try:
                    read(last)
                except UserError:
                    refused += 1
            executed += harm.exists()
            for path, data in kept.items():
                path.write_bytes(data)
        return {"pickles": len(checkpoint.FILES) + 1, "executed": executed, "refusals": refused}

    def nan(self) -> dict[str, Any]:
        """A NaN in the batch of step 15, with each `on_divergence`."""
        out = {}
        for policy, fault in (("stop", "15"), ("skip", "15"), ("rollback", "15 once"), ("rollback", "15")):
            name = f"nan-{policy}-{fault[3:] or 'always'}"
            run = Run(self.root, name, "--training.on_divergence", policy, "--training.checkpoint_every", "10")
            status = run.finish(f"nan:{fault}")
            rows = run.result()[1]
            named = "diverged after 15 steps: loss is nan" in run.said()
            out[name] = {"status": status, "last row": rows[-1]["step"], "named": named}
        return out

    def disk_full(self, at: int = 3) -> dict[str, Any]:
        """No file may grow while a checkpoint is written."""
        from offline_cai.training import checkpoint

        flags = ["--training.checkpoint_every", "10"]
        wanted, _ = self.undisturbed("whole-full", *flags)
        run = Run(self.root, "full", *flags)
        status = run.finish(f"full:{at}")
        said = "cannot write the checkpoint" in run.said() and "Earlier checkpoints are untouched" in run.said()
        intact = checkpoint.find(run.folder).name == f"step-{10 * (at - 1):08d}"
        exact = run.finish() == 0 and run.result() == wanted
        return {"status": status, "said": said, "old checkpoint intact": intact, "bit-exact resume": exact}

    def ways(self) -> dict[str, Any]:
        """The ways to start two processes: they meet, say so, and train as the forked ones do."""
        wanted, _ = self.undisturbed("whole-ways", processes=2)
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        ours = ["-m", "offline_cai"]
        agent = [*torchrun, "--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{_free_port()}"]
        starts = {
            "train --processes 2": ([sys.executable, *ours], ["--processes", "2"], 1),
            "torchrun --nproc_per_node 2": ([*torchrun, "--standalone", "--nproc_per_node", "2", *ours], [], 1),
            "two torchrun agents": ([*agent, "--nproc_per_node", "1", *ours], [], 2),
        }
        out = {}
        for name, (launcher, flags, agents) in starts.items():
            run = Run(self.root, name.replace(" ", "-"))
            command = [*launcher, *(word for word in run.command if word != "--quiet"), *flags]
            with run.log.open("w") as log:
                started = [subprocess.Popen(command, stdout=log, stderr=log) for _ in range(agents)]
                codes = [process.wait(300) for process in started]
            out[name] = codes == [0] * agents and "2 processes, gloo" in run.said() and run.result() == wanted
        return out

    def curves(self) -> dict[str, Any]:
        """The learning rates of one process and of two."""
        one, _ = self.undisturbed("curve-1")
        two, _ = self.undisturbed("curve-2", processes=2)
        rates = [[row["learning_rate"] for row in result[1]] for result in (one, two)]
        return {"rows": len(rates[0]), "equal": rates[0] == rates[1]}


class _Malice:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (os.mkdir, (self.path,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few of each")
    short = parser.parse_args().short
    from offline_cai import collect

    with tempfile.TemporaryDirectory(prefix="offline-cai-soak-") as root:
        os.environ |= {"MINARI_DATASETS_PATH": f"{root}/data", "OFFLINE_CAI_CACHE": f"{root}/cache"}
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        collect.collect(collect.load("debug-umaze"), quiet=True)
        soak, results = Soak(Path(root)), {}
        trials: dict[str, Callable[[], dict[str, Any]]] = {
            "kill -9": lambda: soak.kills(5 if short else 100),
            "kill -9 of one of two": lambda: soak.kills(2 if short else 20, processes=2),
            "crash at each point of a save": lambda: soak.crashes(40 if short else 1),
            "damaged file": lambda: soak.damage(200),
            "malicious pickle": soak.malice,
            "SIGTERM": lambda: soak.signals(3 if short else 20),
            "SIGTERM to one of two": lambda: soak.signals(1 if short else 10, processes=2),
            "second signal": soak.second_signal,
            "NaN at step 15": soak.nan,
            "disk full": soak.disk_full,
            "starts of two processes": soak.ways,
            "learning rates of 1 and 2 processes": soak.curves,
        }
        for name, trial in trials.items():
            began = time.monotonic()
            results[name] = trial()
            facts = ", ".join(f"{key}: {value}" for key, value in results[name].items())
            print(f"{name:<36} {facts}  ({time.monotonic() - began:.0f} s)", flush=True)
    print(json.dumps({"command": f"python eval/soak.py{' --short' if short else ''}", "results": results}))


if __name__ == "__main__":
    main()
