"""Random damage: a loader raises the package's own error, or gives what a plain reading of the same file gives."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_cai.data import catalogue, d4rl
from offline_cai.data.trajectories import FILES, Trajectories, verify
from offline_cai.errors import UserError

MINARI, D4RL, NPZ = "own/y-v0/data/main_data.hdf5", "own.hdf5", "own.npz"
DATASETS = {
    MINARI: ["observations/a", "observations/b", "observations", "actions", "rewards", "terminations", "truncations"],
    D4RL: ["observations", "actions", "rewards", "terminals", "timeouts", "next_observations", d4rl.LOG_PROB],
}
NAMES = {MINARI: "own/y-v0", D4RL: "own.hdf5", NPZ: "own.npz"}
pytestmark = pytest.mark.filterwarnings("ignore")


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(derandomize=True, max_examples=examples, deadline=None, database=None, suppress_health_check=health)


@contextmanager
def copy_of(sound: Path, part: str) -> Iterator[Path]:
    """For each example a folder of its own with one dataset or store, on which the package works."""
    before = os.environ.copy()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy = Path(folder) / "data"
        (copy / part).parent.mkdir(parents=True)
        (shutil.copytree if (sound / part).is_dir() else shutil.copy)(sound / part, copy / part)
        os.environ.update(OFFLINE_CAI_CACHE=f"{folder}/cache", MINARI_DATASETS_PATH=str(copy))
        try:
            yield copy
        finally:
            os.environ.clear()
            os.environ.update(before)


def load(copy: Path, file: str, repair: bool) -> Trajectories | None:
    """The store of a damaged dataset, or None after an error that is the package's own."""
    try:
        return catalogue.trajectories(NAMES[file] if file == MINARI else str(copy / file), repair=repair)
    except UserError as error:
        assert len(str(error)) > 20
        return None


def check_plain(store: Trajectories, path: Path) -> None:
    """A store that was read without repair holds, row for row, what h5py reads from the file."""
    steps = store.step_rows()
    with h5py.File(path) as file:
        if path.name == "main_data.hdf5":
            groups = [file[f"episode_{number}"] for number in range(store.num_episodes)]
            pairs = [(g["observations/a"][()], g["observations/b"][()]) for g in groups]
            obs = [np.column_stack([a.reshape(-1, 2), b.ravel()])[:-1] for a, b in pairs]
            action, reward = (
                [g[name][()].reshape(-1, n) for g in groups] for name, n in (("actions", 2), ("rewards", 1))
            )
            parts = [np.concatenate(part) for part in (obs, action, reward)]
            assert store.terminal.tolist() == [bool(g["terminations"][-1]) for g in groups]
        else:
            terminal = file["terminals"][()].ravel() == 1
            cut = (file["timeouts"][()].ravel() == 1) | (np.arange(len(terminal)) == len(terminal) - 1)
            known = terminal | ~cut | ("next_observations" in file)  # without them nobody knows what followed a cut
            parts = [file[name][()][known] for name in ("observations", "actions", "rewards")]
            assert store.terminal.sum() == terminal.sum()
    for ours, plain in zip((store.obs, store.action, store.reward), parts, strict=True):
        assert np.array_equal(ours[steps], plain.reshape(ours[steps].shape).astype(np.float32))


KINDS = st.sampled_from(["flip", "set", "copy", "cut", "insert"])
EDITS = st.lists(st.tuples(KINDS, st.floats(0, 1), st.floats(0, 1), st.binary(max_size=40)), min_size=1, max_size=4)


def edited(data: bytes, edits: list[tuple[str, float, float, bytes]]) -> bytes:
    out = bytearray(data)
    for kind, first, second, new in edits:
        at, other = (min(int(x * len(out)), max(len(out) - 1, 0)) for x in (first, second))
        if kind == "flip" and out:
            out[at] ^= 1 << other % 8
        elif kind == "set":
            out[at : at + len(new)] = new
        elif kind == "copy":
            out[at : at + 64] = out[other : other + 64]
        elif kind == "cut":
            del out[at : at + max(1, other)]
        else:
            out[at:at] = new
    return bytes(out)


@fuzz(60)
@given(file=st.sampled_from([MINARI, D4RL, NPZ, "own/y-v0/data/metadata.json"]), edits=EDITS, repair=st.booleans())
def test_changed_bytes(sound: Path, file: str, edits: list[tuple[str, float, float, bytes]], repair: bool) -> None:
    kind = file if file in NAMES else MINARI
    with copy_of(sound, NAMES[kind]) as copy:
        (copy / file).write_bytes(edited((sound / file).read_bytes(), edits))
        store = load(copy, kind, repair)
        if store is not None and not repair and file in (MINARI, D4RL):
            check_plain(store, copy / file)


def replacement(kind: int, rows: int, width: int) -> Any:
    """What a dataset may be replaced by: other types, lengths and shapes; None: nothing."""
    shape = (rows, width)
    ragged = np.empty(rows, dtype=object)
    ragged[:] = [np.arange(row % 3) for row in range(rows)]
    return [
        lambda: None,
        lambda: np.ones(shape),
        lambda: np.ones(rows, dtype=np.int8),
        lambda: np.full(shape, -1, dtype=np.int64),
        lambda: np.full(shape, np.nan),
        lambda: np.full(shape, 1e300),
        lambda: np.ones((*shape, 2)),
        lambda: np.ones(rows, dtype=complex),
        lambda: np.ones(rows, dtype=bool),
        lambda: np.full(rows, 255, dtype=np.uint8),
        lambda: np.ones(rows, dtype=[("a", "f4"), ("b", "i8")]),
        lambda: np.full(rows, b"text"),
        lambda: np.ones(rows, dtype="V7"),
        lambda: "text",
        lambda: np.float32(1),
        lambda: h5py.Empty("f4"),
        lambda: (h5py.vlen_dtype(np.int64), ragged),
        lambda: (h5py.string_dtype(), np.full(rows, "text", dtype=object)),
        lambda: ("f8", None),
    ][kind]()


def replace(file: h5py.File, name: str, value: Any) -> None:
    if name in file:
        del file[name]
    if isinstance(value, tuple):
        kind, data = value
        file.create_dataset(name, (7,) if data is None else data.shape, dtype=kind, data=data)
    elif value is not None:
        file[name] = value


@fuzz(80)
@given(
    file=st.sampled_from([MINARI, D4RL]),
    number=st.integers(0, 3),
    which=st.integers(0, 6),
    value=st.builds(replacement, st.integers(0, 18), st.sampled_from([0, 1, 3, 4, 5, 18]), st.integers(0, 3)),
    attribute=st.booleans(),
    repair=st.booleans(),
)
def test_changed_structure(
    sound: Path, file: str, number: int, which: int, value: Any, attribute: bool, repair: bool
) -> None:
    with copy_of(sound, NAMES[file]) as copy:
        with h5py.File(copy / file, "a") as root:
            group = root[f"episode_{number}"] if file == MINARI else root
            if not attribute:
                replace(group, DATASETS[file][which], value)
            elif value is not None and not isinstance(value, tuple):
                group.attrs["total_steps" if file == MINARI else "offline_cai"] = value
        store = load(copy, file, repair)
        if store is not None and not repair:
            check_plain(store, copy / file)


@fuzz(50)
@given(
    name=st.sampled_from(["observations", "actions", "rewards", "terminals", "timeouts", "log_probs", "spec"]),
    value=st.builds(replacement, st.integers(0, 14), st.sampled_from([0, 1, 3, 17, 18]), st.integers(0, 3)),
    declared=st.sampled_from(["spec", "action_low", "action_n"]),
    repair=st.booleans(),
)
def test_changed_arrays(sound: Path, name: str, value: Any, declared: str, repair: bool) -> None:
    with np.load(sound / NPZ) as file:
        data = {key: file[key] for key in file.files if declared == "spec" or key != "spec"}
    data |= {name: value} if declared == "spec" else {declared: value, "action_high": np.ones(2)}
    with copy_of(sound, NPZ) as copy:
        np.savez(copy / NPZ, **{key: array for key, array in data.items() if array is not None})
        store = load(copy, NPZ, repair)
        assert store is None or store.num_episodes <= 18


KEYS = ["total_episodes", "total_steps", "data_format", "offline_cai", "env_spec", "type", "low", "shape", "dt", "n"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["Box", "Discrete"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=5,
)


@fuzz(50)
@given(
    space=st.sampled_from([None, "observation_space", "action_space"]),
    key=st.sampled_from(KEYS),
    value=JSON,
    text=st.booleans(),
)
def test_changed_metadata(sound: Path, space: str | None, key: str, value: Any, text: bool) -> None:
    with copy_of(sound, NAMES[MINARI]) as copy:
        file = (copy / MINARI).with_name("metadata.json")
        about = json.loads(file.read_text())
        if space is None:
            about[key] = json.dumps(value) if text else value
        else:
            about[space] = json.dumps(json.loads(about[space]) | {key: value})
        file.write_text(json.dumps(about))
        store = load(copy, MINARI, repair=False)
        if store is not None:
            assert store.num_episodes <= 4 and store.spec.obs_width == 3


@fuzz(100)
@given(file=st.sampled_from([*(f"{name}.bin" for name in FILES), "meta.json"]), edits=EDITS)
def test_changed_store(sound: Path, file: str, edits: list[tuple[str, float, float, bytes]]) -> None:
    before = Trajectories.open(sound / "store")
    with copy_of(sound, "store") as copy:
        (copy / "store" / file).write_bytes(edited((sound / "store" / file).read_bytes(), edits))
        try:
            Trajectories.open(copy / "store")
            verify(copy / "store")
        except UserError:
            return
        after = Trajectories.open(copy / "store")
        assert (after.spec, after.info) == (before.spec, before.info)
        assert all(np.array_equal(getattr(after, name), getattr(before, name)) for name in FILES)
