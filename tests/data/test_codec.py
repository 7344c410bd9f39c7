import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from offline_cai.core import Spec
from offline_cai.data.codec import SAMPLE, Codec, Normaliser, Sample
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows

KINDS = ["limits", "gaussian", "quantile", "none"]


def fitted(kind: str, data: np.ndarray, parts: int = 3) -> Normaliser:
    norm = Normaliser(data.shape[1], kind)  # type: ignore[arg-type]
    norm.fit(np.array_split(data, parts))
    return norm


@pytest.mark.parametrize("kind", KINDS)
def test_normalisers_do_as_they_say_and_invert(kind: str) -> None:
    data = np.random.default_rng(0).normal(3, 2, size=(5000, 2))
    data = np.column_stack([data, np.full(5000, 1e5)])
    norm, raw = fitted(kind, data), torch.from_numpy(data).float()
    x = norm.encode(raw)
    assert torch.allclose(norm.decode(x), raw, rtol=1e-5, atol=1e-5)
    first = x[:, :2]
    if kind in ("limits", "quantile"):
        assert torch.allclose(first.amax(0), torch.ones(2), atol=1e-5)
        assert torch.allclose(first.amin(0), -torch.ones(2), atol=1e-5)
    if kind == "gaussian":
        assert torch.allclose(first.mean(0), torch.zeros(2), atol=1e-5)
        assert torch.allclose(first.std(0), torch.ones(2), atol=1e-3)
    if kind == "quantile":
        assert np.allclose(
            np.quantile(first.numpy(), [0.1, 0.5, 0.9], axis=0), [[-0.8] * 2, [0] * 2, [0.8] * 2], atol=0.01
        )
    if kind == "none":
        assert torch.equal(x, raw)
    else:
        assert torch.allclose(x[:, 2], torch.zeros(5000)), "a column that does not vary becomes zero"


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    data=arrays(np.float32, (40, 2), elements=st.floats(-1e3, 1e3, width=32)),
    kind=st.sampled_from(KINDS),
    parts=st.integers(1, 5),
)
def test_decode_inverts_encode_on_the_data(data: np.ndarray, kind: str, parts: int) -> None:
    """To float32 precision of the data's range; the quantile map is steep between values that lie close together."""
    norm, raw = fitted(kind, data, parts), torch.from_numpy(data)
    error = (norm.decode(norm.encode(raw)) - raw).abs().amax(0)
    size = raw.abs().amax(0).clamp(min=1e-3)
    assert (error <= (1e-3 if kind == "quantile" else 1e-5) * size).all()


@pytest.mark.parametrize("kind", ["limits", "gaussian"])
def test_one_streaming_pass_gives_the_statistics_of_the_whole(kind: str) -> None:
    data = np.random.default_rng(1).normal(1e3, 1, size=(1000, 3))
    whole, parts = fitted(kind, data, 1), fitted(kind, data, 17)
    assert torch.allclose(whole.shift, parts.shift, rtol=1e-6) and torch.allclose(whole.scale, parts.scale, rtol=1e-4)


def test_flat_stretches_of_a_distribution_keep_their_value() -> None:
    """Half the mass on one value: it maps to the middle of its stretch, comes back, and the rest stays in order."""
    rng = np.random.default_rng(0)
    data = np.where(rng.random(4000) < 0.5, 2.0, rng.uniform(0, 4, size=4000))[:, None]
    norm = fitted("quantile", data)
    values = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    x = norm.encode(values)
    assert torch.allclose(norm.decode(x), values, atol=1e-4)
    assert (x.diff(dim=0) > 0).all() and abs(float(x[2])) < 0.05
    assert x[:, 0].tolist() == pytest.approx([-1, -0.75, 0, 0.75, 1], abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_data_the_map_goes_on_and_inverts(kind: str) -> None:
    norm = fitted(kind, np.random.default_rng(0).uniform(-1, 1, size=(1000, 1)))
    far = torch.tensor([[-5.0], [5.0]])
    assert torch.allclose(norm.decode(norm.encode(far)), far, atol=1e-4)
    assert norm.encode(far)[0] < norm.encode(-torch.ones(1, 1)) < norm.encode(torch.ones(1, 1)) < norm.encode(far)[1]


def test_heavy_tails_keep_their_small_values() -> None:
    data = np.random.default_rng(0).lognormal(0, 3, size=(20_000, 1))
    norm, raw = fitted("quantile", data), torch.from_numpy(data).float()
    x = norm.encode(raw)
    relative = ((norm.decode(x) - raw) / raw).abs()
    assert float(relative.quantile(0.99)) < 1e-2 and abs(float(x.median())) < 0.02


def test_the_sample_of_the_quantiles_is_even_and_bounded() -> None:
    sample = Sample()
    for start in range(0, 4 * SAMPLE, 1 << 15):
        sample.add(np.arange(start, start + (1 << 15))[:, None])
    rows = sample.rows()[:, 0]
    assert SAMPLE / 2 <= len(rows) <= SAMPLE and len(set(np.diff(rows))) == 1


@pytest.mark.parametrize("actions", [True, False])
def test_rows_decode_to_what_was_encoded(store: Trajectories, spec: Spec, actions: bool) -> None:
    codec = Codec(spec, rows=3, stride=2, fields=["observation"], actions=actions)
    codec.fit(store.chunks)
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


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_travel_with_the_weights(store: Trajectories, spec: Spec, kind: str) -> None:
    codec, other = Codec(spec, 3, normaliser=kind), Codec(spec, 3, normaliser=kind)  # type: ignore[arg-type]
    codec.fit(store.chunks)
    other.load_state_dict(codec.state_dict())
    x = torch.randn(2, 3, spec.obs_width)
    assert torch.equal(other.encode_obs(x), codec.encode_obs(x))
