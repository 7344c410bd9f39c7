import numpy as np
import pytest
import torch

from offline_cai.core import Spec
from offline_cai.data.codec import Codec, Normaliser
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows


@pytest.mark.parametrize("kind", ["limits", "gaussian"])
def test_normalisers_do_as_they_say_and_invert(kind: str) -> None:
    data = np.random.default_rng(0).normal(3, 2, size=(500, 2))
    data = np.column_stack([data, np.full(500, 1e5)])
    norm = Normaliser(3, kind)  # type: ignore[arg-type]
    norm.fit(data)
    x = norm.encode(torch.from_numpy(data).float())
    assert torch.allclose(norm.decode(x), torch.from_numpy(data).float(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(x[:, 2], torch.zeros(500)), "a column that does not vary becomes zero"
    if kind == "limits":
        assert torch.allclose(x[:, :2].amax(0), torch.ones(2), atol=1e-5)
        assert torch.allclose(x[:, :2].amin(0), -torch.ones(2), atol=1e-5)
    else:
        assert torch.allclose(x[:, :2].mean(0), torch.zeros(2), atol=1e-5)
        assert torch.allclose(x[:, :2].std(0), torch.ones(2), atol=2e-3)


@pytest.mark.parametrize("actions", [True, False])
def test_rows_decode_to_what_was_encoded(store: Trajectories, spec: Spec, actions: bool) -> None:
    codec = Codec(spec, rows=3, stride=2, fields=["observation"], actions=actions)
    codec.fit(store.obs, store.action)
    batch = Windows(store, 3, 2).gather(np.array([8, 9]), torch.zeros(2, dtype=torch.int64))
    x = codec.encode(batch)
    assert x.shape == (2, 3, codec.width) and codec.width == (8 if actions else 4)
    obs, action = codec.decode(x)
    assert torch.allclose(obs, batch.obs[:, :3, 4:], atol=1e-5)
    if actions:
        assert action is not None and torch.allclose(action, batch.action, atol=1e-5)
        assert torch.allclose(codec.obs_norm.decode(x[..., 4:]), batch.obs[:, :3, 4:], atol=1e-5), "actions come first"
    else:
        assert action is None


def test_statistics_travel_with_the_weights(store: Trajectories, spec: Spec) -> None:
    codec, other = Codec(spec, 3), Codec(spec, 3)
    codec.fit(store.obs, store.action)
    other.load_state_dict(codec.state_dict())
    assert torch.equal(other.obs_norm.scale, codec.obs_norm.scale)
