"""A corpus of damaged datasets: none of them gets through in silence, and repair leaves out what is damaged alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest

from offline_cai.core import Episode
from offline_cai.data import catalogue, d4rl
from offline_cai.data.cache import cache_root
from offline_cai.data.trajectories import Trajectories, verify
from offline_cai.errors import Notice, UserError


class Damage(NamedTuple):
    """What is done to a sound dataset, and what has to be said about it."""

    name: str
    do: Callable[[Path], None]  # to the HDF5 file or the folder of the store
    words: str  # a pattern in the error, or in the warning
    warning: bool = False
    left: tuple[int, ...] = ()  # episodes after repair; none: repair refuses too


def hdf5(change: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        with h5py.File(path, "a") as file:
            change(file)

    return do


def metadata(**changes: object) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        file = path.parent / "metadata.json"
        about = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in about.items() if value is not None}))

    return do


def at(name: str, index: object, value: float) -> Callable[[Path], None]:
    return hdf5(lambda file: file[name].__setitem__(index, value))


def new(name: str, data: object) -> Callable[[Path], None]:
    """Another dataset in the place of one; None: nothing."""

    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        if data is not None:
            file[name] = data

    return hdf5(change)


def every_end_carries_both(file: h5py.File) -> None:
    for episode in file.values():
        episode["terminations"][-1] = episode["truncations"][-1] = True


def a_time_limit_as_true_ends(file: h5py.File) -> None:
    for episode in file.values():
        episode["terminations"][-1], episode["truncations"][-1] = True, False
        episode.attrs["total_steps"] = 3
        for name in ("actions", "rewards", "terminations", "truncations", "observations/a", "observations/b"):
            kept = episode[name][-4 if name.startswith("obs") else -3 :]
            del episode[name]
            episode[name] = kept


def never_written(file: h5py.File) -> None:
    del file["episode_2/rewards"]
    file.create_dataset("episode_2/rewards", (6,), dtype=float)


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def again(file: h5py.File) -> None:
    del file["episode_3"]
    file.copy("episode_0", "episode_3")


MINARI = [
    Damage("nan", at("episode_1/observations/a", (2, 0), np.nan), "episode 1: observations hold nan", left=(0, 2, 3)),
    Damage("infinite", at("episode_2/rewards", 1, np.inf), "episode 2: rewards hold inf at row 1", left=(0, 1, 3)),
    Damage(
        "action out of range", at("episode_0/actions", (1, 1), 1.5), "episode 0: action 1.5 .*row 1", left=(1, 2, 3)
    ),
    Damage("fewer actions", new("episode_1/actions", np.zeros((2, 2))), "episode 1: 2 actions for 3", left=(0, 2, 3)),
    Damage("fewer states", new("episode_1/observations/b", np.zeros((3, 1))), "episode 1 cannot be", left=(0, 2, 3)),
    Damage("width", new("episode_1/observations/b", np.zeros((4, 2))), "episode 1 .*'observations/b'", left=(0, 2, 3)),
    Damage("no end flag", at("episode_1/truncations", -1, False), "episode 1 without an end flag", warning=True),
    Damage(
        "all terminal", at("episode_2/terminations", slice(None), True), "episode 2: an end .*step 0", left=(0, 1, 3)
    ),
    Damage("end in the middle", at("episode_2/truncations", 3, True), "episode 2: an end .*step 3", left=(0, 1, 3)),
    Damage(
        "both end flags", hdf5(every_end_carries_both), "all 4 ends are flagged as true ends and as cut", warning=True
    ),
    Damage("time limit as end", hdf5(a_time_limit_as_true_ends), "4 of 4 .*after exactly 3 steps", warning=True),
    Damage("wrong step count", metadata(total_steps=17), "counts 17 steps, and its episodes hold 18", warning=True),
    Damage("counted too few", metadata(total_episodes=3, total_steps=14), "counts 3 episodes, and 4", warning=True),
    Damage("counted too many", metadata(total_episodes=5), "episode 4 cannot be read .*episode_4", left=(0, 1, 2, 3)),
    Damage("counted far too many", metadata(total_episodes=10**12), "counts 1000000000000 episodes, but only 4"),
    Damage("no count", metadata(total_steps="18"), r"metadata\.json: 'total_steps' is '18', not a count"),
    Damage(
        "lost steps",
        hdf5(lambda f: f["episode_0"].attrs.update(total_steps=9)),
        "episode 0: .*counts 9",
        left=(1, 2, 3),
    ),
    Damage("lost episode", hdf5(lambda f: f.pop("episode_2")), "episode 2 cannot be read .*episode_2", left=(0, 1, 3)),
    Damage("duplicate", hdf5(again), "1 of 4 episodes repeat .*episode 3, which is episode 0 again", warning=True),
    Damage("missing field", new("episode_3/rewards", None), "episode 3 cannot be read .*rewards", left=(0, 1, 2)),
    Damage("text as numbers", new("episode_3/actions", [b"left"] * 4), "episode 3 cannot be read", left=(0, 1, 2)),
    Damage("flags beside steps", new("episode_3/terminations", [False]), "episode 3: 'terminations'", left=(0, 1, 2)),
    Damage(
        "no flags", new("episode_3/terminations", [0.5] * 4), "episode 3 .*'terminations' hold other", left=(0, 1, 2)
    ),
    Damage("no steps", new("episode_3/rewards", np.zeros(0)), "episode 3: .*there are no steps", left=(0, 1, 2)),
    Damage("never written", hdf5(never_written), "episode 2 cannot be read .*were ever written", left=(0, 1, 3)),
    Damage("truncated file", cut_file, r"cannot be read .*minari delete"),
    Damage("empty file", lambda path: path.write_bytes(b""), "cannot be read .*minari delete"),
    Damage(
        "bad JSON", lambda path: (path.parent / "metadata.json").write_text('{"a": '), r"metadata\.json cannot be read"
    ),
    Damage("missing key", metadata(data_format=None), r"metadata\.json should hold .*data_format"),
    Damage("no space", metadata(action_space="{}"), "cannot be read"),
    Damage("no environment", metadata(env_spec="{"), "cannot be read"),
    Damage("bad note", metadata(offline_cai="[]"), "'offline_cai' is no JSON object"),
]


def npz(**changes: object) -> Callable[[Path], None]:
    """Other arrays in the place of some; None: nothing; a function: of the array."""

    def do(path: Path) -> None:
        with np.load(path) as file:
            data = {name: file[name] for name in file.files}
        for name, value in changes.items():
            data[name] = value(data[name].copy()) if callable(value) else value
        np.savez(path, **{name: value for name, value in data.items() if value is not None})

    return do


def put(index: object, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 200] ^= 1
    path.write_bytes(data)


NPZ = [
    Damage("nan", npz(observations=put((6, 0), np.nan)), "episode 1: 'observations' hold nan at row 6", left=(0, 2, 3)),
    Damage("action out of range", npz(actions=put((0, 1), 3)), "episode 0: action 3 at row 0", left=(1, 2, 3)),
    Damage("missing field", npz(rewards=None), "has no 'rewards'"),
    Damage("unknown field", npz(reward=np.zeros(18)), "no place for 'reward'; did you mean 'rewards'"),
    Damage("no time-outs", npz(timeouts=None), "has no 'timeouts'"),
    Damage("lengths", npz(terminals=np.zeros(17)), r"'terminals' have shape \(17,\) beside 18 rows"),
    Damage("no flags", npz(terminals=np.arange(18)), "'terminals' hold 2 at row 2"),
    Damage("Python objects", npz(actions=np.array([{}] * 18)), "Python objects, which are not loaded"),
    Damage("no bounds", npz(spec=None), "does not say what an action may be"),
    Damage("bad bounds", npz(spec=None, action_n=np.float64(np.inf)), "do not say what an action may be"),
    Damage("bad spec", npz(spec="{}"), "'spec' is no spec"),
    Damage("log-probabilities", npz(log_probs=np.zeros(3)), "'log_probs' have to be one finite"),
    Damage("no end flagged", npz(terminals=np.zeros(18), timeouts=np.zeros(18)), "no end is flagged", warning=True),
    Damage("a bit", a_byte, "cannot be read"),
    Damage("truncated file", cut_file, "is no .npz"),
]


def no_flags(file: h5py.File) -> None:
    file["terminals"][:] = file["timeouts"][:] = False
    del file["next_observations"]


def twice(file: h5py.File) -> None:
    for name in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts", d4rl.LOG_PROB):
        rows = file[name][()]
        del file[name]
        file[name] = np.concatenate([rows, rows[:5]])


D4RL = [
    Damage("nan", at("observations", (6, 1), np.nan), "episode 1: 'observations' hold nan at row 6", left=(0, 2, 3)),
    Damage("nan afterwards", at("next_observations", (6, 0), np.nan), "episode 1: 'next_observations'", left=(0, 2, 3)),
    Damage("infinite", at("rewards", 0, -np.inf), "episode 0: 'rewards' hold -inf at row 0", left=(1, 2, 3)),
    Damage("action out of range", at("actions", (16, 1), -2), "episode 3: action -2 .*row 2", left=(0, 1, 2)),
    Damage("missing field", new("terminals", None), "has no 'terminals'"),
    Damage("lengths", new("actions", np.zeros((17, 2))), r"'actions' have shape \(17, 2\) beside 18 rows"),
    Damage("next width", new("next_observations", np.zeros((18, 2))), r"'next_observations' have shape \(18, 2\)"),
    Damage("text as numbers", new("rewards", np.array([b"1"] * 18)), r"'rewards' hold \|S1, not numbers"),
    Damage("no rows", new("rewards", np.zeros(0)), "'rewards' hold no rows"),
    Damage("no flags", new("terminals", np.arange(18)), "'terminals' hold 2 at row 2, but a flag is 0 or 1"),
    Damage("no end flagged", hdf5(no_flags), "no end is flagged in any of its 18 rows", warning=True),
    Damage(
        "both end flags", hdf5(lambda f: f["timeouts"].write_direct(f["terminals"][()])), "all 2 ends", warning=True
    ),
    Damage("no time-out flag", at("timeouts", 7, False), "1 of the episodes .*no end flag, .*row 7", warning=True),
    Damage("end in the middle", at("terminals", 2, True), "1 of 3 terminals are in the middle, .*row 2", warning=True),
    Damage("all terminal", at("terminals", slice(None), True), "14 of 18 terminals are in the middle", warning=True),
    Damage(
        "shuffled", hdf5(lambda f: f["observations"].write_direct(f["observations"][()][::-1].copy())), "are shuffled"
    ),
    Damage("duplicate", hdf5(twice), "1 of 5 episodes repeat .*episode 4, which is episode 0 again", warning=True),
    Damage("log-probabilities", at(d4rl.LOG_PROB, 3, np.nan), "'infos/action_log_probs' are not used", warning=True),
    Damage(
        "never written", hdf5(lambda f: (f.pop("rewards"), f.create_dataset("rewards", (18,)))), "were ever written"
    ),
    Damage("no log-probabilities", new(d4rl.LOG_PROB, "none"), "'infos/action_log_probs' are not used", warning=True),
    Damage("bad spec", hdf5(lambda f: f.attrs.update(offline_cai="{")), "'offline_cai'"),
    Damage("truncated file", cut_file, "cannot be read as HDF5"),
    Damage("another file", lambda path: path.write_text("<html>"), "cannot be read as HDF5"),
]


@pytest.mark.parametrize(
    ("kind", "damage"),
    [pytest.param("minari", damage, id=f"minari-{damage.name}") for damage in MINARI]
    + [pytest.param("d4rl", damage, id=f"d4rl-{damage.name}") for damage in D4RL]
    + [pytest.param("npz", damage, id=f"npz-{damage.name}") for damage in NPZ],
)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_no_damage_is_silent(kind: str, damage: Damage, copy: Path, recwarn: pytest.WarningsRecorder) -> None:
    named = copy / {"minari": "own/y-v0", "d4rl": "own.hdf5", "npz": "own.npz"}[kind]
    name = "own/y-v0" if kind == "minari" else str(named)
    before = [Episode(*map(np.array, episode)) for episode in catalogue.trajectories(name).episodes()]
    assert not [one for one in recwarn if issubclass(one.category, Notice)]
    damage.do(named / "data" / "main_data.hdf5" if kind == "minari" else named)
    if damage.warning:
        with pytest.warns(Notice, match=damage.words) as given:
            store = catalogue.trajectories(name)
        assert str(given[0].message).startswith(f"dataset {store.info['dataset']!r} ({named}): ")
        assert [str(one.message).partition("): ")[2] for one in given] == store.info["warnings"]
        return
    with pytest.raises(UserError, match=damage.words) as error:
        catalogue.validate(name)
    assert str(named) in str(error.value)
    if not damage.left:
        with pytest.raises(UserError, match=damage.words):
            catalogue.trajectories(name, repair=True)
        return
    repaired = catalogue.trajectories(name, repair=True)
    for ours, number in zip(repaired.episodes(), damage.left, strict=True):
        for one, other in zip(ours, before[number], strict=True):
            assert np.array_equal(one, other), "nothing else is changed"
    (dropped,) = {0, 1, 2, 3, 4 if "too many" in damage.name else 0} - {*damage.left}
    assert len(repaired.info["dropped"]) == 1 and f"episode {dropped}" in repaired.info["dropped"][0]
    with pytest.raises(UserError, match=damage.words):
        catalogue.trajectories(name)


def flip(name: str, byte: int) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[byte] ^= 1
        (folder / name).write_bytes(data)

    return do


STORE = [
    *(
        Damage(f"a bit of {name}", flip(f"{name}.bin", 9), rf"{name}\.bin differs")
        for name in ("rows", "offsets", "end")
    ),
    Damage("a bit of terminal", flip("terminal.bin", 1), r"terminal\.bin differs"),
    Damage(
        "a digit of meta",
        lambda s: (s / "meta.json").write_text((s / "meta.json").read_text().replace("0.5", "0.6")),
        r"meta\.json differs",
    ),
    Damage("bad JSON", lambda s: (s / "meta.json").write_text("{"), "cannot open"),
    Damage("deep JSON", lambda s: (s / "meta.json").write_text("[" * 10**5), "cannot open"),
    Damage("no key", lambda s: (s / "meta.json").write_text('{"format": 3}'), "cannot open"),
    Damage("shorter", lambda s: (s / "rows.bin").write_bytes((s / "rows.bin").read_bytes()[:-4]), "cannot open"),
    Damage(
        "longer", lambda s: (s / "end.bin").write_bytes((s / "end.bin").read_bytes() * 2), "longer than it was written"
    ),
    Damage("a missing file", lambda s: (s / "terminal.bin").unlink(), "cannot open .*terminal"),
]


@pytest.mark.parametrize("damage", [pytest.param(damage, id=damage.name) for damage in STORE])
def test_no_damage_of_a_store_is_silent(damage: Damage, copy: Path) -> None:
    verify(copy / "store")
    damage.do(copy / "store")
    with pytest.raises(UserError, match=damage.words) as error:
        verify(copy / "store")
    assert str(copy / "store") in str(error.value)


def test_damage_in_arrow_storage_is_local_too(copy: Path) -> None:
    data = copy / "own" / "arrow-v0" / "data"
    for part in (data / "2").glob("*.arrow"):
        cut_file(part)
    (data / "1" / "metadata.json").write_text('{"id": 1, "total_steps": 30}')
    with pytest.raises(UserError, match=r"arrow-v0.*, episode 1: .*counts 30 steps"):
        catalogue.validate("own/arrow-v0")
    with pytest.warns(Notice, match="left out 2 damaged episodes"):
        store = catalogue.trajectories("own/arrow-v0", repair=True)
    assert store.lengths.tolist() == [5, 4]
    assert ["episode 1" in store.info["dropped"][0], "episode 2" in store.info["dropped"][1]] == [True, True]


def test_repair_refuses_to_leave_nothing(copy: Path) -> None:
    at("rewards", slice(None), np.nan)(copy / "own.hdf5")
    with pytest.raises(UserError, match=r"each of its 4 episodes is damaged.*episode 0: 'rewards' hold nan at row 0"):
        catalogue.trajectories(str(copy / "own.hdf5"), repair=True)
    assert not list((cache_root() / "stores").glob("*/*")), "nothing is kept of a refused dataset"


def test_episodes_of_anyone_are_checked_for_type_too(store: Trajectories) -> None:
    sound = store.episode(0)
    bad = [
        sound._replace(reward=np.array(["1"] * 5)),
        sound._replace(obs=sound.obs.astype(complex)),
        sound._replace(action=[[1.0, 2.0], [1.0]]),
        sound._replace(reward=None),
    ]
    for episode in bad:
        with pytest.raises(UserError, match=r"the data, episode 1: .*(not numbers|different lengths)"):
            Trajectories.from_episodes(store.spec, [sound, episode])
    with pytest.warns(Notice, match="left out 4 damaged episodes; the first: the data, episode 0: rewards hold"):
        left = Trajectories.from_episodes(store.spec, [*bad, sound, store.episode(1)], repair=True)
    assert left.lengths.tolist() == [5, 1] and len(left.info["dropped"]) == 4
