"""Minari's own download, from a remote that is a folder."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import minari as real_minari
import pytest
from minari.namespace import list_local_namespaces
from minari.storage import remotes

from offline_cai.core import Spec
from offline_cai.data import catalogue, minari, minari_download
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError


class Folder:
    """What Minari asks of a remote, answered from `root`."""

    root: Path
    asked: list[str]

    def __init__(self, name: str, token: str | None = None) -> None:
        self.asked.append(name)

    def list_datasets(self, prefix: str | None = None) -> Iterable[str]:
        ids = [str(path.parent.parent.relative_to(self.root)) for path in self.root.rglob("metadata.json")]
        return [name for name in ids if name.startswith(prefix or "")]

    def get_dataset_metadata(self, dataset_id: str) -> dict:
        return json.loads((self.root / dataset_id / "data" / "metadata.json").read_text())

    def list_namespaces(self) -> Iterable[str]:
        return [str(path.parent.relative_to(self.root)) for path in self.root.rglob("namespace_metadata.json")]

    def download_dataset(self, dataset_id: str, path: Path) -> None:
        shutil.copytree(self.root / dataset_id, path / dataset_id)

    def download_namespace_metadata(self, namespace: str, path: Path) -> None:
        (path / namespace).mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / namespace / "namespace_metadata.json", path / namespace)


@pytest.fixture
def root(tmp_path: Path, store: Trajectories, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty dataset root, and a remote with far/maze/one-v0."""
    monkeypatch.setenv("OFFLINE_CAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "far"))
    minari.write("far/maze/one-v0", spec, store.episodes())
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "here"))
    monkeypatch.setattr(minari, "online", lambda *args: True)
    monkeypatch.setitem(remotes._registry, "hf", lambda: Folder)
    Folder.root, Folder.asked = tmp_path / "far", []
    yield tmp_path / "here"


@pytest.mark.parametrize("remote", ["", "hf://someone/"])
def test_a_dataset_is_fetched_with_its_namespaces(remote: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{remote}far/maze/one-v0"
    assert catalogue.download(name) == "far/maze/one-v0"
    assert catalogue.trajectories(name).lengths.tolist() == [5, 1, 12], "the remote may stay before the id"
    assert list(real_minari.list_local_datasets()) == ["far/maze/one-v0"]
    assert list_local_namespaces() == ["far", "far/maze"]
    assert set(Folder.asked) == {remote[5:-1] or "farama-minari"}
    assert capsys.readouterr().out == "", "Minari's chatter is not on stdout, where programs read"
    Folder.asked.clear()
    assert catalogue.download(name) == "far/maze/one-v0" and not Folder.asked, "it is here now"
    assert {path.name for path in root.iterdir()} == {"far"}


@pytest.mark.parametrize("error", [ConnectionError("reset by peer"), KeyboardInterrupt()])
def test_a_download_that_breaks_off_leaves_nothing(
    error: BaseException, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Folder, dataset_id: str, path: Path) -> None:
        (path / dataset_id / "data").mkdir(parents=True)
        (path / dataset_id / "data" / "metadata.json").write_text("{}")
        raise error

    monkeypatch.setattr(Folder, "download_dataset", broken)
    with pytest.raises((UserError, KeyboardInterrupt)) as stop:
        catalogue.download("far/maze/one-v0")
    assert "broke off (ConnectionError: reset by peer). Try again" in str(stop.value) or stop.type is KeyboardInterrupt
    assert not minari.local_ids() and not list(root.iterdir())


def test_what_cannot_be_downloaded_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in {
        "far/maze/none-v0": "Couldn't find any version for dataset far/maze/none",
        "far/maze/one-v3": "far/maze/one-v3, doesn't exist .* far/maze/one-v0",
        "no id": "no Minari dataset id",
        "ftp://someone/far/maze/one-v0": "'ftp://someone' is no remote of Minari's",
        "hf:///far/maze/one-v0": "'hf://' is no remote",
        "own-v0.hdf5": "D4RL has no dataset 'own-v0.hdf5'",
    }.items():
        with pytest.raises(UserError, match=words):
            catalogue.download(name)
    monkeypatch.setenv("MINARI_REMOTE", "somewhere")
    with pytest.raises(UserError, match="'somewhere' is no remote"):
        catalogue.download("far/maze/one-v0")


def test_a_remote_whose_package_is_missing_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError('google-cloud-storage is not installed. Please install it using `pip install "minari[gcs]"`')

    monkeypatch.setitem(remotes._registry, "gcp", missing)
    with pytest.raises(UserError, match=r"pip install .minari\[gcs\]"):
        catalogue.download("gcp://bucket/far/maze/one-v0")


def test_without_a_network_it_is_said_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minari, "online", lambda *args: False)
    with pytest.raises(UserError, match="no network here"):
        minari_download.download("far/maze/one-v0")
    assert not Folder.asked


def test_the_server_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        asked.append(address)
        raise OSError("no route")

    monkeypatch.setattr(minari.socket, "create_connection", refuse)
    for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "MINARI_REMOTE", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    minari.online()
    minari.online("gcp://bucket")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror:8443")
    minari.online("hf://someone")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    minari.online("gcp://bucket")
    assert asked == [("huggingface.co", 443), ("storage.googleapis.com", 443), ("mirror", 8443), ("proxy", 3128)]
