"""Stein directions and weighted particles against autograd, exact moments and expectations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_cai.inference import smc, svgd

F64 = torch.float64
quick = settings(max_examples=25, derandomize=True, deadline=None)
seeds = st.integers(0, 10_000)


def normal(seed, *shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# ---- Stein


def test_the_direction_is_its_defining_sum():
    """Kernel gradients by autograd, one pair at a time, for particles and for other points."""
    x, y, score, h = normal(0, 2, 5, 3), normal(1, 2, 4, 3), normal(2, 2, 5, 3), 0.8
    for at in (None, y):
        target = x if at is None else y
        phi = svgd.stein_direction(x, score, at, bandwidth=h)
        for b in range(2):
            for j in range(target.shape[1]):
                total = torch.zeros(3, dtype=F64)
                for i in range(5):
                    xi = x[b, i].clone().requires_grad_()
                    k = (-(xi - target[b, j]).square().sum() / h).exp()
                    (slope,) = torch.autograd.grad(k, xi)
                    total += k.detach() * score[b, i] + slope
                torch.testing.assert_close(phi[b, j], total / 5, rtol=1e-9, atol=1e-12)


def test_the_bandwidth_is_the_median_over_log_k():
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=F64)  # squared distances 1, 4, 9
    assert float(svgd.median_bandwidth(x)) == pytest.approx(4 / math.log(3))
    y = torch.tensor([[0.0]], dtype=F64)  # 0, 1, 9
    assert float(svgd.median_bandwidth(x, y)) == pytest.approx(1 / math.log(3))
    assert svgd.median_bandwidth(torch.zeros(2, 4, 3)).tolist() == pytest.approx([1e-3, 1e-3])
    with pytest.raises(ValueError, match="particles: the median heuristic needs at least two, got 1"):
        svgd.median_bandwidth(x[:1])
    with pytest.raises(ValueError, match="score: expected the particles' shape"):
        svgd.stein_direction(x, x[:2])
    batch = torch.stack([x, 10 * x])
    directions = svgd.stein_direction(batch, -batch)
    torch.testing.assert_close(directions[1], svgd.stein_direction(10 * x, -10 * x))


def test_no_gradient_flows_through_the_kernel():
    x, score = normal(6, 5, 2).requires_grad_(), normal(7, 5, 2)
    assert not svgd.stein_direction(x, score).requires_grad
    assert not svgd.stein_direction(x, score, at=x + 1).requires_grad
    assert svgd.stein_direction(x.detach(), score.requires_grad_()).requires_grad


def test_a_bandwidth_is_positive_and_goes_where_the_particles_are():
    x = normal(8, 5, 2)
    for bad in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="bandwidth: expected a positive finite number"):
            svgd.stein_direction(x, x, bandwidth=bad)
    elsewhere = x.to("meta")
    for bandwidth in (0.5, None):
        assert svgd.stein_direction(elsewhere, elsewhere, bandwidth=bandwidth).device.type == "meta"
    with torch.device("meta"):
        svgd.stein_direction(x, x, bandwidth=0.5)
        svgd.stein_direction(x, x)
        smc.next_inverse_temperature(x[:, 0], 0.1)
        smc.stratified(x, torch.Generator().manual_seed(0))


def test_particles_flow_to_a_gaussian_and_stay_there():
    mean, std = torch.tensor([2.0, -1.0], dtype=F64), torch.tensor([0.5, 1.5], dtype=F64)
    x = 0.3 * normal(3, 60, 2)
    for _ in range(1500):
        x = x + 0.2 * svgd.stein_direction(x, (mean - x) / std.square())
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(x.std(0), std, rtol=0.12, atol=0)


def test_the_squashed_score_has_its_jacobian_in_u_only():
    """exp(q(a)) on (-1, 1): particles in u with the Jacobian reach the right mean, without it they do not."""
    q = lambda a: 2.0 * a  # noqa: E731
    grid = torch.linspace(-1, 1, 4001, dtype=F64)
    density = q(grid).exp()
    exact = float(torch.trapezoid(grid * density, grid) / torch.trapezoid(density, grid))

    def settle(jacobian):
        u = 0.5 * normal(4, 80, 1)
        for _ in range(1500):
            leaf = u.clone().requires_grad_()
            log_p = q(leaf.tanh()) + jacobian * (1 - leaf.tanh().square()).log()
            (score,) = torch.autograd.grad(log_p.sum(), leaf)
            u = u + 0.1 * svgd.stein_direction(u, score)
        return float(u.tanh().mean())

    assert settle(1.0) == pytest.approx(exact, abs=0.02)
    assert abs(settle(0.0) - exact) > 0.2


# ---- weights and resampling


def test_the_effective_sample_size_counts_particles():
    log_weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, -math.inf, 5.0, -math.inf], [900.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(smc.effective_sample_size(log_weight), torch.tensor([4.0, 2.0, 1.0]))
    w = torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    assert float(smc.effective_sample_size(w.log() + 3)) == pytest.approx(float(1 / w.square().sum()), rel=1e-12)
    for bad in ([[0.0, 0.0], [-math.inf, -math.inf]], [[0.0, 0.0], [math.nan, 0.0]]):
        with pytest.raises(ValueError, match=r"log_weight: .*population \[1\] (holds only zero weights|is nan)"):
            smc.effective_sample_size(torch.tensor(bad))
    infinite = torch.tensor([[0.0, 0.0], [0.0, math.inf]])
    for call in (smc.effective_sample_size, smc.systematic, smc.stratified):
        with pytest.raises(ValueError, match=r"log_weight: particle 1 of population \[1\] is inf; use finite"):
            call(infinite)
        with pytest.raises(ValueError, match=r"log_weight: expected \[\.\.\., K\] with K of at least 1"):
            call(torch.zeros(2, 0))


@pytest.mark.parametrize("resample", [smc.systematic, smc.stratified])
def test_resampling_is_unbiased(resample):
    log_weight, n = torch.tensor([0.0, 1.0, -2.0, -math.inf, 0.5], dtype=F64), 8000
    index = resample(log_weight.expand(n, 5), torch.Generator().manual_seed(0))
    copies = torch.nn.functional.one_hot(index, 5).sum(1).double()
    expected = 5 * log_weight.softmax(-1)
    error = copies.std(0) / math.sqrt(n)
    assert ((copies.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all()
    assert (copies[:, 3] == 0).all()
    assert not torch.equal(index[0], index[1]) or resample is smc.systematic
    same = [resample(log_weight, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*same)


@quick
@given(seed=seeds, count=st.integers(1, 40), scale=st.sampled_from([0.1, 3.0, 1e3]))
def test_copies_stay_near_their_share(seed, count, scale):
    log_weight = scale * normal(seed, 3, count)
    share = count * log_weight.softmax(-1)
    for resample, slack in ((smc.systematic, 1.0), (smc.stratified, 2.0)):
        index = resample(log_weight, torch.Generator().manual_seed(seed))
        assert index.shape == (3, count)
        copies = torch.nn.functional.one_hot(index, count).sum(1)
        assert ((copies - share).abs() < slack + 1e-9).all()
        assert torch.equal(smc.systematic(log_weight + 50, torch.Generator().manual_seed(1)),
                           smc.systematic(log_weight, torch.Generator().manual_seed(1)))  # fmt: skip


def test_equal_weights_keep_everyone():
    for resample in (smc.systematic, smc.stratified):
        assert resample(torch.zeros(2, 6)).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_strata_are_drawn_on_their_own():
    """A particle over the middle of three strata: one shared shift makes two copies, three make one to three."""
    log_weight = torch.tensor([1 / 6, 4 / 6, 1 / 6], dtype=F64).log().expand(500, 3)
    for resample, seen in ((smc.systematic, {2}), (smc.stratified, {1, 2, 3})):
        copies = (resample(log_weight, torch.Generator().manual_seed(0)) == 1).sum(-1)
        assert set(copies.tolist()) == seen


def test_a_tooth_at_the_very_start_finds_a_living_particle():
    assert smc._comb(torch.tensor([-math.inf, 0.0, 0.0]), torch.zeros(1, dtype=F64)).tolist() == [1, 1, 2]


def test_a_tooth_at_the_very_end_finds_a_living_particle():
    shift = torch.tensor([1.0], dtype=F64)  # what a uniform draw just below one may round to
    assert smc._comb(torch.tensor([0.0, -math.inf, -math.inf]), shift).tolist() == [0, 0, 0]


# ---- tempering


@quick
@given(seed=seeds, scale=st.sampled_from([0.1, 5.0, 1e4]), weighted=st.booleans())
def test_each_tempering_step_keeps_its_share(seed, scale, weighted):
    evidence = scale * normal(seed, 4, 50)
    weight = normal(seed + 1, 4, 50) if weighted else torch.zeros(4, 50, dtype=F64)
    now = torch.full((4,), 0.1, dtype=F64)
    after = smc.next_inverse_temperature(evidence, now, log_weight=weight, keep=0.6)
    before = smc.effective_sample_size(weight)
    left = smc.effective_sample_size(weight + (after - now)[:, None] * evidence)
    assert (after > now).all()
    arrived = after == 1
    assert (left >= 0.6 * before - 1e-6).all()
    torch.testing.assert_close(left[~arrived], 0.6 * before[~arrived], rtol=1e-6, atol=0)
    whole = smc.effective_sample_size(weight + 0.9 * evidence)
    assert torch.equal(arrived, whole >= 0.6 * before)


def test_dead_particles_do_not_stall_tempering():
    evidence = torch.tensor([-math.inf, -math.inf, -math.inf, 0.0, 2.0], dtype=F64)
    after = smc.next_inverse_temperature(evidence, keep=0.7)
    assert 0 < float(after) < 1
    assert float(smc.effective_sample_size(after * evidence)) == pytest.approx(1.4, rel=1e-9)
    with pytest.raises(ValueError, match="only zero weights"):
        smc.next_inverse_temperature(evidence[:3])
    with pytest.raises(ValueError, match="log_evidence where log_weight is not -inf: the population holds only zero"):
        smc.next_inverse_temperature(evidence, log_weight=torch.tensor([0.0, 0.0, 0.0, -math.inf, -math.inf]))
    with pytest.raises(ValueError, match="log_evidence: particle 2 of the population is inf"):
        smc.next_inverse_temperature(torch.tensor([0.0, 0.0, math.inf]))
    with pytest.raises(ValueError, match=r"log_evidence: population \[1\] spans so many nats that no step"):
        smc.next_inverse_temperature(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 1e20]]), keep=0.9)
    with pytest.raises(ValueError, match="inverse_temperature: expected numbers up to final = 1"):
        smc.next_inverse_temperature(evidence, 1.5)
    with pytest.raises(ValueError, match=r"keep: expected a share in \(0, 1\), got 1"):
        smc.next_inverse_temperature(evidence, keep=1.0)


def test_tempered_smc_finds_the_evidence_of_a_gaussian():
    """Prior N(0, 1), log-evidence 3x - x²: E exp = exp(9/6) / sqrt(3); every step here is exact but for sampling."""
    n, g = 20_000, torch.Generator().manual_seed(0)
    x, now, total, steps = normal(5, n), torch.tensor(0.0, dtype=F64), 0.0, 0
    while now < 1:
        evidence = 3 * x - x.square()
        after = smc.next_inverse_temperature(evidence, now, keep=0.5)
        log_weight = (after - now) * evidence
        total += float(torch.logsumexp(log_weight, 0)) - math.log(n)
        x, now, steps = x[smc.systematic(log_weight, g)], after, steps + 1
        target, variance = 3 * now / (1 + 2 * now), 1 / (1 + 2 * now)
        x = target + variance.sqrt() * torch.randn(n, dtype=F64, generator=g)  # a perfect move step
    assert 1 < steps < 10
    assert total == pytest.approx(9 / 6 - 0.5 * math.log(3), abs=0.04)
