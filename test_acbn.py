# SPDX-License-Identifier: MIT
"""Tests: pytest -q test_acbn.py. Twins: float64 loops in numpy, a deque, brute force. Scripts run as such.

Tests named test_memory_... and test_losses_... after the faults they guard against follow the order in
which such faults are usually met in public code.
"""
import argparse
import collections
import contextlib
import doctest
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

import acbn
import data
import eval as evaluation
import train
from acbn import METHODS, CrossBatchLoss, CrossBatchMemory

HERE = Path(__file__).parent
LOSSES = (acbn.multi_similarity_loss, acbn.supcon_loss, acbn.contrastive_loss)
torch.set_num_threads(min(2, torch.get_num_threads()))


def rows(n, d, seed=0, dtype=torch.float64):
    """n random unit rows (n, d)."""
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def case(B=12, N=40, classes=5, seed=0, dtype=torch.float64):
    """Similarities (B, N) of anchors to references near their class centres, and both masks."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, 6, generator=g, dtype=dtype)
    y, ref_y = (torch.randint(classes, (n,), generator=g) for n in (B, N))
    z, ref = (acbn.normalize(centre[t] + torch.randn(len(t), 6, generator=g, dtype=dtype))
              for t in (y, ref_y))
    return (z @ ref.T, *acbn.pair_masks(y, ref_y))


# ---------------------------------------------------------------- moments, Eqs. 6 and 23

def test_eq6_moments_and_matching_equal_a_float64_loop():
    z, target = rows(50, 7).numpy(), rows(9, 7, seed=1).numpy()
    expected = np.empty_like(z)
    for d in range(7):
        mean, std = sum(z[:, d]) / 50, 0.0
        std = math.sqrt(sum((v - mean) ** 2 for v in z[:, d]) / 49)
        t_mean = sum(target[:, d]) / 9
        t_std = math.sqrt(sum((v - t_mean) ** 2 for v in target[:, d]) / 8)
        for i in range(50):
            expected[i, d] = (z[i, d] - mean) / std * t_std + t_mean
    got = acbn.match_moments(torch.tensor(z), *acbn.moments(torch.tensor(target)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_eq6_matched_moments_are_the_target_and_twice_is_once():
    memory, (mean, std) = rows(200, 5), acbn.moments(rows(30, 5, seed=1) + 0.3)
    once = acbn.match_moments(memory, mean, std)
    for got, expected in zip(acbn.moments(once), (mean, std)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(acbn.match_moments(once, mean, std), once, rtol=0, atol=1e-12)


def test_eq12_recovers_a_diagonal_affine_drift():
    z, A, b = rows(100, 6), torch.rand(6, dtype=torch.float64) + 0.5, torch.randn(6, dtype=torch.float64)
    drifted = A * z + b                                                             # z' = A z + b, Eq. 7
    torch.testing.assert_close(acbn.match_moments(z, *acbn.moments(drifted)), drifted)


def test_eq6_known_moments_and_out_give_the_same():
    memory, (mean, std) = rows(40, 4), acbn.moments(rows(8, 4, seed=1))
    expected, storage = acbn.match_moments(memory, mean, std), memory.data_ptr()
    assert torch.equal(acbn.match_moments(memory, mean, std, *acbn.moments(memory)), expected)
    acbn.match_moments(memory, mean, std, out=memory)
    assert torch.equal(memory, expected) and memory.data_ptr() == storage


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.7, 1e6])
def test_eq6_constant_dimension_is_only_shifted(constant):
    memory = rows(300, 4, dtype=torch.float32)
    memory[:, 2] = constant
    out = acbn.match_moments(memory, torch.full((4,), 0.25), torch.ones(4))
    torch.testing.assert_close(out[:, 2], torch.full((300,), 0.25), rtol=0,
                               atol=1e-6 * max(1, abs(constant)))


def test_eq6_one_row_has_no_deviation():
    with pytest.raises(ValueError, match="at least 2 rows"):
        acbn.moments(rows(1, 4))


# ---------------------------------------------------------------- the filter, Eqs. 18-22 and Algorithm 1

def test_alg1_lines_1_to_3_equal_a_float_loop_and_reach_the_fixed_point():
    for q, r, B in ((1.0, 0.01, 64), (1e-3, 0.5, 16), (0.0, 0.3, 4)):
        p = twin = 1.0
        for _ in range(500):
            p, K = acbn.kalman_gain(p, B, q, r)
            prior = twin + q
            gain = prior / (prior + r / B)
            twin = (1 - gain) * prior
            assert p == pytest.approx(twin, rel=1e-12) and K == pytest.approx(gain, rel=1e-12)
        if q:
            fixed = (math.sqrt(q * q + 4 * q * r / B) - q) / 2      # the root of p = (p + q) r / (p + q + r)
            assert p == pytest.approx(fixed, rel=1e-9)
            assert K == pytest.approx((p + q) / (p + q + r / B), rel=1e-9)


def test_alg1_published_values_give_a_gain_above_0_999():
    for B, least in ((16, 0.999), (64, 0.9998)):
        p = 1.0
        for _ in range(100):
            p, K = acbn.kalman_gain(p, B)
            assert K > least


def test_alg1_lines_4_and_5_and_the_interval():
    mean, std, p, K = torch.zeros(3), torch.ones(3), 1.0, 1.0
    v, s = torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 3.0)
    gains = []
    for step in range(7):
        before = mean.clone(), std.clone()
        mean, std, p, K = acbn.kalman_update(mean, std, p, K, v, s, 16, step, 0.01, 8.0, gain_interval=3)
        torch.testing.assert_close(mean, before[0] + K * (v - before[0]))
        torch.testing.assert_close(std, before[1] + K * (s - before[1]))
        gains.append(K)
    assert gains[0] == gains[1] == gains[2] != gains[3] == gains[5] != gains[6]


def test_alg1_constant_gain_is_an_exponential_average():         # App. C
    values, average = torch.rand(20, 2), torch.zeros(2)
    mean = torch.zeros(2)
    for v in values:
        mean = acbn.kalman_update(mean, mean, 1.0, 0.3, v, v, 8, step=1)[0]
        average = 0.7 * average + 0.3 * v
    torch.testing.assert_close(mean, average)


def test_alg1_noises_of_zero_are_refused():
    with pytest.raises(ValueError, match="cannot both be 0"):
        acbn.kalman_gain(0.0, 16, 0.0, 0.0)
    with pytest.raises(ValueError, match="not both 0"):
        CrossBatchLoss(4, 8, process_noise=0, measurement_noise=0)


def axbn_twin(batches, M, q, r, interval):
    """Algorithm 1 row by row in float64: the stored rows, oldest first, after all batches."""
    queue, mu, sigma, p, K = collections.deque(maxlen=M), None, None, 1.0, None
    for k, batch in enumerate(batches):
        batch = [row / math.sqrt(sum(v * v for v in row)) for row in batch]
        mean, std = np.mean(batch, 0), np.std(batch, 0, ddof=1)
        if k == 0:
            mu, sigma = mean, std
        if k % interval == 0:
            p = p + q                                           # line 1
            K = p / (p + r / len(batch))                        # line 2
            p = (1 - K) * p                                     # line 3
        mu = mu + K * (mean - mu)                               # line 4
        sigma = sigma + K * (std - sigma)                       # line 5
        if len(queue) > 1:
            m, s = np.mean(queue, 0), np.std(queue, 0, ddof=1)
            for i, row in enumerate(queue):                     # lines 6-9
                queue[i] = (row - m) / s * sigma + mu
        queue.extend(batch)
    return np.array(queue)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_alg1_fifty_steps_equal_a_row_by_row_twin(dtype, tolerance):
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(16, 6)) + 0.02 * k for k in range(50)]
    criterion = CrossBatchLoss(6, 100, "axbn", process_noise=1e-3, measurement_noise=0.5, gain_interval=3)
    criterion.to(dtype)
    for batch in batches:
        criterion(torch.tensor(batch, dtype=dtype), torch.arange(16) // 4)
    memory = criterion.memory
    got = memory.embeddings.roll(-memory.pointer, 0)
    np.testing.assert_allclose(got, axbn_twin(batches, 100, 1e-3, 0.5, 3), rtol=0, atol=tolerance)
    assert 0.05 < criterion.gain < 0.5          # a filter that does nothing would fail above


def run(criterion, steps=12, B=8, dim=5, seed=0, dtype=torch.float32):
    """Losses and anchors' gradients of some steps on random, drifting embeddings."""
    out, g = [], torch.Generator().manual_seed(seed)
    for k in range(steps):
        z = (torch.randn(B, dim, generator=g) + 0.1 * k).to(dtype).requires_grad_()
        y = torch.randint(6, (B,), generator=g)
        loss = criterion(z, y)
        loss.backward()
        out.append((loss.detach(), z.grad))
    return out


@pytest.mark.parametrize("other", [dict(method="axbn", measurement_noise=0.0),
                                   dict(method="ema", momentum=0.0)])
def test_eq23_without_measurement_noise_or_momentum_is_xbn_to_the_last_bit(other):
    xbn, same = CrossBatchLoss(5, 30, "xbn"), CrossBatchLoss(5, 30, gain_interval=1, **other)
    for (a, grad_a), (b, grad_b) in zip(run(xbn), run(same)):
        assert torch.equal(a, b) and torch.equal(grad_a, grad_b)
    assert torch.equal(xbn.memory.embeddings, same.memory.embeddings)


@pytest.mark.parametrize("method", METHODS)
def test_memory_of_exactly_one_batch_gives_the_value_of_none(method):
    plain, other = CrossBatchLoss(5, 8, "none"), CrossBatchLoss(5, 8, method)
    z, y = rows(8, 5, dtype=torch.float32), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    for k in range(3):
        a, b = plain(z + k, y), other(z + k, y)
        torch.testing.assert_close(b, 2 * a if method == "xbm+batch" else a, rtol=0, atol=1e-5)


def test_xbm_gradient_flows_through_the_anchors_only():
    z, y = rows(8, 5).requires_grad_(), torch.arange(8) // 2
    criterion = CrossBatchLoss(5, 8, "xbm", acbn.contrastive_loss).double()
    (grad,) = torch.autograd.grad(criterion(z, y), z)
    fixed = acbn.normalize(z.detach())
    masks = acbn.pair_masks(y, y, torch.arange(8))
    (expected,) = torch.autograd.grad(acbn.contrastive_loss(acbn.normalize(z) @ fixed.T, *masks), z)
    torch.testing.assert_close(grad, expected)
    (both,) = torch.autograd.grad(CrossBatchLoss(5, 8, "none", acbn.contrastive_loss).double()(z, y), z)
    assert not torch.allclose(both, grad) and not criterion.memory.embeddings.requires_grad


# ---------------------------------------------------------------- the memory

def test_memory_label_zero_in_the_last_slot_does_not_empty_it():
    memory = CrossBatchMemory(4, 2)
    memory.enqueue(torch.ones(4, 2), torch.tensor([-5, 2 ** 40, 7, 0]))
    assert len(memory) == 4 and memory.labels.tolist() == [-5, 2 ** 40, 7, 0]


def test_memory_is_a_fifo_equal_to_a_deque_under_random_batches():
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 32):
        memory, twin, n = CrossBatchMemory(size, 1), collections.deque(maxlen=size), 0
        for B in rng.integers(1, 2 * size + 3, 60).tolist() + [1, size, size + 1]:
            new = range(n, n + B)
            n += B
            slots = memory.enqueue(torch.tensor(new).float()[:, None], torch.tensor(new),
                                   torch.tensor(new) + 5)
            twin.extend(new)
            order = [t.roll(-memory.pointer, 0)
                     for t in (memory.embeddings[:, 0], memory.labels, memory.ids - 5)]
            assert all(t.tolist() == list(twin) for t in order) and len(memory) == len(twin)
            assert memory.stored_labels[slots].tolist() == list(new)[-min(B, size):]
    memory.reset()
    assert len(memory) == 0 and memory.embeddings.shape == (0, 1)


@pytest.mark.parametrize("method", METHODS)
def test_memory_state_dict_holds_all_that_the_next_step_depends_on(method, tmp_path):
    make = lambda: CrossBatchLoss(5, 20, method, process_noise=0.01, measurement_noise=1.0,  # noqa
                                  gain_interval=3, warmup_steps=2)
    whole, first, second = make(), make(), make()
    expected = run(whole, 7) + run(whole, 9, B=3, seed=1)
    run(first, 7)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for (a, grad_a), (b, grad_b) in zip(expected[7:], run(second, 9, B=3, seed=1)):
        assert torch.equal(a, b) and torch.equal(grad_a, grad_b)


def test_memory_is_written_in_place():
    criterion = CrossBatchLoss(5, 20, "axbn")
    before = {name: b.data_ptr() for name, b in criterion.named_buffers()}
    run(criterion, 10)
    criterion.load_state_dict(criterion.state_dict())
    assert before == {name: b.data_ptr() for name, b in criterion.named_buffers()}


class Recorder:
    """A loss that keeps what it was called with."""

    def __call__(self, sim, positive, negative):
        self.sim, self.positive, self.negative = sim.detach(), positive, negative
        return sim.sum() * 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 3, 4, 7, 11])
def test_memory_excludes_the_anchors_own_slot_and_no_copy(B, dtype):
    seen, M = Recorder(), 7
    criterion = CrossBatchLoss(4, M, "xbm", seen)
    z, y = torch.ones(B, 4, dtype=dtype), torch.zeros(B, dtype=torch.int64)     # all rows are copies
    for k in range(5):
        criterion(z, y)
        n, kept = len(criterion.memory), min(B, M)
        missing = ~(seen.positive | seen.negative)
        assert missing.sum() == kept and not seen.negative.any()
        slots = [(criterion.memory.pointer - kept + i) % M for i in range(kept)]
        assert [missing[B - kept + i].nonzero().item() for i in range(kept)] == slots
        assert n == min(M, B * (k + 1))


def test_memory_stale_copies_of_an_image_count_as_positives():       # reading 8 of acbn.py
    seen = Recorder()
    criterion = CrossBatchLoss(4, 10, "xbm", seen)
    for _ in range(2):
        criterion(rows(2, 4), torch.tensor([0, 1]), ids=torch.tensor([10, 11]))
    assert seen.positive.tolist() == [[True, False, False, False], [False, True, False, False]]
    assert criterion.memory.ids.tolist() == [10, 11, 10, 11]


def test_memory_is_adapted_then_enqueued_then_compared():
    seen, z = Recorder(), [rows(6, 4, seed=k, dtype=torch.float32) for k in range(2)]
    criterion, y = CrossBatchLoss(4, 20, "xbn", seen), torch.arange(6) // 2
    criterion(z[0], y)
    criterion(z[1], y)
    stored = torch.cat([acbn.match_moments(z[0], *acbn.moments(z[1])), z[1]])
    torch.testing.assert_close(criterion.memory.embeddings, stored)         # the adapted rows stay in store
    torch.testing.assert_close(seen.sim, z[1] @ F.normalize(stored, dim=1).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_memory_takes_16_bit_inputs_and_stays_float32(method, dtype):
    half, full = CrossBatchLoss(5, 20, method), CrossBatchLoss(5, 20, method)
    for k in range(4):
        z, y = rows(8, 5, seed=k).to(dtype), torch.arange(8) // 2
        with torch.autocast("cpu", torch.bfloat16):
            loss = half(z.requires_grad_(), y)
        loss.backward()
        torch.testing.assert_close(loss, full(z.detach().float(), y), rtol=0, atol=1e-6)
        assert loss.dtype == torch.float32 and z.grad.dtype == dtype
    assert half.memory.embeddings.dtype == half.mean.dtype == torch.float32


def test_memory_of_float64_and_many_adaptations_stay_accurate():
    single, double = CrossBatchLoss(6, 256, "xbn"), CrossBatchLoss(6, 256, "xbn").double()
    g = torch.Generator().manual_seed(0)
    for k in range(930):
        z = torch.randn(8, 6, generator=g) + 2
        for criterion in (single, double):
            with torch.no_grad():
                criterion(z.to(criterion.mean.dtype), torch.arange(8) // 4)
    assert (single.memory.embeddings - double.memory.embeddings).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_the_same_on_all_ranks_and_the_gradient_is_not_off_by_the_world_size(method):
    """Each rank's own slice is live in the batch gathered in rank order; ranks are played one by one."""
    one, ranks, W = CrossBatchLoss(5, 30, method), [CrossBatchLoss(5, 30, method) for _ in range(2)], 2
    for k in range(5):
        z, y = rows(8, 5, seed=k, dtype=torch.float32).requires_grad_(), torch.arange(8) // 2
        loss = one(z, y)
        (expected,) = torch.autograd.grad(loss, z)
        for rank, criterion in enumerate(ranks):
            slices = list(z.detach().split(4))
            slices[rank].requires_grad_()
            live = slices[rank]
            local = criterion(torch.cat(slices), y)
            (grad,) = torch.autograd.grad(W * local, live)
            torch.testing.assert_close(grad / W, expected[4 * rank:4 * rank + 4])      # DDP divides by W
            torch.testing.assert_close(local, loss)
            assert torch.equal(criterion.memory.embeddings, one.memory.embeddings)


def test_memory_warms_up_and_resets():
    criterion, plain = CrossBatchLoss(5, 30, "xbn", warmup_steps=3), CrossBatchLoss(5, 1, "none")
    for _ in range(2):
        losses = list(zip(run(criterion, 5), run(plain, 5)))
        assert all(torch.equal(a, b) and torch.equal(g, h) for (a, g), (b, h) in losses[:3])
        assert not torch.equal(losses[4][0][0], losses[4][1][0]) and len(criterion.memory) == 16
        criterion.reset()
        assert len(criterion.memory) == criterion.step == 0


@pytest.mark.parametrize("method", METHODS)
def test_memory_takes_batches_of_any_size(method):
    criterion = CrossBatchLoss(5, 12, method)
    for k, B in enumerate((1, 2, 30, 1, 12, 5, 1, 13)):
        z = rows(B, 5, seed=k, dtype=torch.float32).requires_grad_()
        criterion(z, torch.arange(B) // 2).backward()
        assert torch.isfinite(z.grad).all() and torch.isfinite(criterion.memory.embeddings).all()


def test_memory_refuses_what_does_not_fit():
    for wrong in (dict(size=0, dim=4), dict(size=4, dim=0)):
        with pytest.raises(ValueError, match="at least 1"):
            CrossBatchMemory(**wrong)
    with pytest.raises(ValueError, match="takes embeddings"):
        CrossBatchMemory(4, 3).enqueue(torch.ones(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="expected embeddings"):
        CrossBatchLoss(4, 8)(torch.ones(2, 4), torch.ones(2, 1))
    with pytest.raises(ValueError, match="one of none, xbm"):
        CrossBatchLoss(4, 8, "moco")
    for wrong in (dict(gain_interval=0), dict(momentum=1.0), dict(momentum=-0.1)):
        with pytest.raises(ValueError, match="gain_interval"):
            CrossBatchLoss(4, 8, **wrong)


# ---------------------------------------------------------------- the losses

def ms_twin(sim, positive, negative, alpha=2.0, beta=50.0, base=0.5, margin=0.1):
    total = 0.0
    for s, p, n in zip(sim, positive, negative):
        if not p.any() or not n.any():
            continue
        pos = [v for v in s[p] if v - margin < max(s[n])]
        neg = [v for v in s[n] if v + margin > min(s[p])]
        total += math.log(1 + sum(math.exp(-alpha * (v - base)) for v in pos)) / alpha
        total += math.log(1 + sum(math.exp(beta * (v - base)) for v in neg)) / beta
    return total / len(sim)


def supcon_twin(sim, positive, negative, temperature=0.1):
    losses = []
    for s, p, n in zip(sim / temperature, positive, negative):
        if p.any():
            top = math.log(sum(math.exp(v) for v in s[p | n]))
            losses.append(-sum(v - top for v in s[p]) / p.sum())
    losses = [v for v in losses if v > 0]
    return sum(losses) / len(losses) if losses and positive.any() and negative.any() else 0.0


def contrastive_twin(sim, positive, negative, margin=0.5):
    return sum(sum(1 - v for v in s[p]) + sum(v for v in s[n] if v > margin)
               for s, p, n in zip(sim, positive, negative)) / len(sim)


@pytest.mark.parametrize("loss, twin, factors", [
    (acbn.multi_similarity_loss, ms_twin, dict(alpha=3.0, beta=20.0, base=0.8, margin=0.3)),
    (acbn.supcon_loss, supcon_twin, dict(temperature=0.4)),
    (acbn.contrastive_loss, contrastive_twin, dict(margin=0.2))])
def test_losses_equal_float64_loops_and_every_factor_is_an_argument(loss, twin, factors):
    assert list(inspect.signature(loss).parameters) == ["sim", "positive", "negative", *factors]
    for seed in range(6):
        sim, positive, negative = case(seed=seed, classes=3 + 4 * seed)
        for kwargs in ({}, factors):
            expected = twin(sim.numpy(), positive.numpy(), negative.numpy(), **kwargs)
            assert loss(sim, positive, negative, **kwargs).item() == pytest.approx(expected, abs=1e-12)


def test_losses_of_two_points_have_closed_forms():
    sim, own = torch.tensor([[0.7, 0.65]], dtype=torch.float64), torch.tensor([[True, False]])
    assert acbn.contrastive_loss(sim, own, ~own).item() == pytest.approx(0.3 + 0.65)
    assert acbn.supcon_loss(sim, own, ~own).item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    expected = math.log(1 + math.exp(-0.4)) / 2 + math.log(1 + math.exp(7.5)) / 50
    assert acbn.multi_similarity_loss(sim, own, ~own).item() == pytest.approx(expected)
    assert acbn.multi_similarity_loss(sim - torch.tensor([0, 0.3]), own, ~own).item() == 0  # nothing is hard


def test_losses_pair_margin_is_a_euclidean_distance():
    sim = torch.tensor([[0.97, 0.99, 0.67, 0.69]])
    positive, negative = torch.ones(2, 1, 4, dtype=torch.bool)
    p, n = acbn.pair_margin(sim, positive, negative)
    assert p.tolist() == [[True, False, True, True]] and n.tolist() == [[True, True, False, True]]
    p, n = acbn.pair_margin(sim, ~positive, ~negative)
    assert not p.any() and not n.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_have_the_right_gradient(loss):
    sim, positive, negative = case(B=5, N=9, classes=3)
    assert torch.autograd.gradcheck(lambda s: loss(s, positive, negative), sim.clone().requires_grad_())


@pytest.mark.parametrize("missing", ["positives", "negatives", "both", "of one anchor"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_without_pairs_are_a_zero_that_keeps_a_finite_graph(loss, missing):
    sim, positive, negative = case(dtype=torch.float32)
    sim.requires_grad_()
    if missing in ("positives", "both"):
        positive = positive & False
    if missing in ("negatives", "both"):
        negative = negative & False
    if missing == "of one anchor":
        positive[0] = negative[0] = False
    value = loss(sim, positive, negative)
    (grad,) = torch.autograd.grad(value, sim)
    assert torch.isfinite(grad).all() and torch.isfinite(value)
    if missing == "of one anchor":
        assert (grad[0] == 0).all() and value > 0
    elif missing == "both" or loss is not acbn.contrastive_loss:
        assert value == 0 and (grad == 0).all()


def test_losses_log1p_sum_neither_overflows_nor_gives_nan():
    x = torch.tensor([[-torch.inf, -torch.inf], [1e4, -1e4], [-torch.inf, 3], [-20, -torch.inf]])
    top = torch.tensor([[7.0], [1e4], [3], [0]])            # the first row: a top, but no pair that is mined
    v, factor = acbn.log1p_sum((x - top).exp(), top)
    torch.testing.assert_close(v[:, 0], torch.tensor([0, 1e4, math.log1p(math.exp(3)), math.exp(-20)]))
    weights = (x - top).exp() * factor
    torch.testing.assert_close(weights, x.exp().div(1 + x.exp().sum(1, keepdim=True)).nan_to_num(1.0))
    sim, positive, negative = case(dtype=torch.float32)
    steep = acbn.multi_similarity_loss(sim.requires_grad_(), positive, negative, alpha=300.0, beta=900.0)
    assert torch.isfinite(steep) and torch.isfinite(torch.autograd.grad(steep, sim)[0]).all()


def plain_ms(sim, positive, negative, alpha=2.0, beta=50.0, base=0.5, margin=0.1):
    """The multi-similarity loss as autograd differentiates it."""
    p, n = acbn.multi_similarity_pairs(sim.detach(), positive, negative, margin)
    zero = sim.new_zeros(len(sim), 1)
    parts = [torch.cat([x.masked_fill(~m, -torch.inf), zero], 1).logsumexp(1)
             for x, m in ((-alpha * (sim - base), p), (beta * (sim - base), n))]
    return (parts[0] / alpha + parts[1] / beta).mean()


def test_losses_ms_weights_equal_autograd_through_the_plain_form():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        sim, positive, negative = case(B=32, N=500, classes=40, dtype=dtype)
        sim.requires_grad_()
        ours, plain = (f(sim, positive, negative) for f in (acbn.multi_similarity_loss, plain_ms))
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=0)
        grads = [torch.autograd.grad(3 * v, sim)[0] for v in (ours, plain)]
        assert (grads[0] - grads[1]).abs().max() <= tolerance * grads[1].abs().max()


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_losses_ms_in_place_is_the_same_and_gives_sim_for_the_gradient(path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: path == "dense")    # as on a GPU
    for classes, seed in ((3, 0), (40, 1), (1, 2), (500, 3)):       # 1: no negatives, 500: hardly a positive
        sim, positive, negative = case(B=9, N=300, classes=classes, seed=seed)
        expected = torch.autograd.grad(plain_ms(leaf := sim.clone().requires_grad_(), positive, negative),
                                       leaf)[0]
        storage = sim.clone().requires_grad_()
        value = acbn.multi_similarity_loss_(storage, positive, negative)
        torch.testing.assert_close(value, plain_ms(sim, positive, negative), rtol=1e-12, atol=1e-14)
        (gradient,) = torch.autograd.grad(value, storage, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
        assert gradient.data_ptr() == storage.data_ptr()
        with pytest.raises(RuntimeError, match="inplace"):          # used up, and not silently wrong
            torch.autograd.grad(value, storage)


@pytest.mark.parametrize("method", METHODS)
def test_losses_take_more_than_one_backward_pass(method):
    criterion, y = CrossBatchLoss(5, 20, method, warmup_steps=1), torch.arange(8) // 2
    for k in range(3):
        z = rows(8, 5, k, torch.float32).requires_grad_()
        loss = criterion(z, y)
        first, second = (torch.autograd.grad(2 * loss, z, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and first.norm() > 0


def peak_bytes(function):
    """The most bytes that a call holds on the CPU, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        function()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events()
                    if e.name() == "[memory]")
    return int(np.cumsum([n for _, n in events]).max())


@pytest.mark.parametrize("method", ["xbm", "xbm+batch", "axbn"])
def test_memory_step_holds_few_bytes_an_entry(method):
    """Similarities, their gradient (4 bytes each) and at most 12 more."""
    B, M = 64, 8000
    criterion = CrossBatchLoss(16, M, method)
    criterion.memory.enqueue(rows(M, 16, dtype=torch.float32), torch.arange(M) // 5)
    z = rows(B, 16, 1, torch.float32).requires_grad_()
    assert 4 * B * M < peak_bytes(lambda: criterion(z, torch.arange(B) // 4).backward()) < 20 * B * M


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_computed_in_float32_under_autocast(loss):
    z, y = rows(16, 8, dtype=torch.float32), torch.arange(16) // 4
    expected = CrossBatchLoss(8, 16, "none", loss)(z, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CrossBatchLoss(8, 16, "none", loss)(z, y), expected)
    for dtype in (torch.float16, torch.bfloat16):   # as a pure function: exp(50 (1 - 0.5)) is inf in float16
        sim, positive, negative = case(dtype=torch.float32)
        sim[positive] = 1.0
        value = loss(sim.to(dtype), positive, negative)
        torch.testing.assert_close(value, loss(sim.to(dtype).float(), positive, negative))
        assert value.dtype == torch.float32


@pytest.mark.parametrize("name", ["match_moments", "kalman_update", "multi_similarity_loss", "supcon_loss",
                                  "pair_margin", "contrastive_loss"])
def test_pure_functions_compile_as_one_graph(name):
    sim, positive, negative = case(dtype=torch.float32)
    mean, std = acbn.moments(rows(9, 5, dtype=torch.float32))
    args = {"match_moments": (rows(20, 5, dtype=torch.float32), mean, std),
            "kalman_update": (mean, std, 1.0, 1.0, mean + 1, std, 16)}.get(name, (sim, positive, negative))
    compiled = torch.compile(getattr(acbn, name), fullgraph=True, backend="eager")
    for got, expected in zip(compiled(*args), getattr(acbn, name)(*args)) if isinstance(
            getattr(acbn, name)(*args), tuple) else [(compiled(*args), getattr(acbn, name)(*args))]:
        torch.testing.assert_close(got, expected)


def test_memory_knows_the_norms_of_its_rows():
    memory, g = CrossBatchMemory(3000, 4), torch.Generator().manual_seed(0)
    for k in range(40):
        memory.match(torch.rand(4, generator=g), torch.rand(4, generator=g))
        memory.enqueue(torch.randn(200, 4, generator=g), torch.zeros(200, dtype=torch.int64))
        torch.testing.assert_close(memory.norms, memory.embeddings.norm(dim=1))


def test_memory_rows_of_zero_give_finite_losses():
    criterion, y = CrossBatchLoss(4, 16, "xbn"), torch.arange(8) // 2
    for scale in (0, 0, 1):
        z = (scale * rows(8, 4, dtype=torch.float32)).requires_grad_()
        loss = criterion(z, y)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("method", ["xbn", "axbn"])
def test_eq23_known_moments_stay_true_over_many_swaps_and_a_collapse(method):
    criterion = CrossBatchLoss(8, 256, method, Recorder(), process_noise=0.01, measurement_noise=1.0)
    g, worst = torch.Generator().manual_seed(0), 0.0
    for k in range(2000):
        z = torch.randn(16, 8, generator=g) + torch.tensor([0, 5, -5, 3, 9, 0, 0, 1])   # means far from zero
        z[:, 6] *= k < 500                                                            # collapses to constant
        with torch.no_grad():
            criterion(z, torch.zeros(16, dtype=torch.int64))
        if criterion.memory.known:
            true = criterion.memory.embeddings.double()
            for known, exact in ((criterion.memory.mean, true.mean(0)), (criterion.memory.std, true.std(0))):
                worst = max(worst, (known - exact).abs().max().item())
    assert 0 < worst < 1e-5


class NoHostSync(TorchDispatchMode):
    """Fails on the operations that would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
                            "aten::equal"), name
        assert not (name == "aten::index"
                    and any(i is not None and i.dtype == torch.bool for i in args[1])), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", [*LOSSES, train.LOSSES["supcon"][0]])
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_memory_never_synchronise_with_the_host(method, loss, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)       # the way a GPU's tensors take
    criterion = CrossBatchLoss(5, 20, method, loss)
    with NoHostSync():
        run(criterion, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_memory_never_synchronise_with_a_gpu(method):
    criterion = CrossBatchLoss(5, 20, method).cuda()
    batches = [(rows(8, 5, k, torch.float32).cuda().requires_grad_(), (torch.arange(8) // 2).cuda())
               for k in range(6)]
    criterion(*batches[0]).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for z, y in batches[1:]:
            criterion(z, y).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_losses_and_updaters_cite_the_equation_where_it_is_computed():
    source = (HERE / "acbn.py").read_text()
    for place in ("Eq. 6", "Eqs. 6 and 23", "Eqs. 7-12", "Eq. 20", "Eqs. 18-22", "Alg. 1, line 1",
                  "Alg. 1, line 2", "Alg. 1, line 3", "line 4", "line 5", "lines 6-9"):
        assert place in source, place
    assert "Eq. 5" in (HERE / "train.py").read_text()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_normalize_at_any_scale(scale):
    z = rows(5, 4, dtype=torch.float32)
    x = (z * scale).requires_grad_()
    torch.testing.assert_close(acbn.normalize(x), z)
    assert (acbn.normalize(torch.zeros(2, 3)) == 0).all()
    acbn.normalize(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_losses_equal_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers
    mined_supcon = train.LOSSES["supcon"][0]
    pairs = [(acbn.multi_similarity_loss, losses.MultiSimilarityLoss(2, 50, 0.5),
              miners.MultiSimilarityMiner(0.1)),
             (acbn.supcon_loss, losses.SupConLoss(0.1), None),
             (mined_supcon, losses.SupConLoss(0.1), miners.PairMarginMiner(0.2, 0.8))]
    y = torch.arange(24) // 4
    for ours, theirs, miner in pairs:
        z = (rows(6, 8)[y] + 0.5 * rows(24, 8, seed=1)).requires_grad_()
        value = CrossBatchLoss(8, 1, "none", ours).double()(z, y)
        expected = theirs(z, y, miner(z, y) if miner else None)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (value, expected)),
                                   rtol=1e-5, atol=1e-6)
    # Its contrastive loss of a negative is sim - 0.5, XBM's is sim: another value with the same gradient.
    theirs = losses.ContrastiveLoss(1, 0.5, distance=distances.CosineSimilarity(),
                                    reducer=reducers.SumReducer())
    sim, negative = acbn.normalize(z) @ acbn.normalize(z).T, acbn.pair_masks(y, y)[1]
    value = CrossBatchLoss(8, 1, "none", acbn.contrastive_loss).double()(z, y)
    expected = (theirs(z, y) + 0.5 * (negative & (sim > 0.5)).sum()) / 24
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (value, expected)),
                               rtol=1e-5, atol=1e-6)


def twin_run(criterion, steps=200):
    """The losses of a small training run in float64, the same weights and batches whatever the criterion.

    Noise keeps it hard: for a batch with a single mined pair of each kind the other library's loss is 0.
    """
    split, g = data.synthetic(classes=40, max_images=6).train, torch.Generator().manual_seed(0)
    images = data.Images(split, 8, "none", training=True)
    x = torch.stack([images[i][0] for i in range(len(images))]).double() / 255              # (N, 3, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 96), nn.BatchNorm1d(96), nn.ReLU(),
                            nn.Linear(96, 32)).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    sampler, values = data.ClassBalancedSampler(split.labels, 32), []
    while len(values) < steps:
        sampler.set_epoch(len(values))
        for batch in sampler:
            noise = 0.2 * torch.randn(len(batch), 3, 8, 8, generator=g, dtype=x.dtype)      # (B, 3, 8, 8)
            loss = criterion(net(x[batch] + noise), split.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    return np.array(values[:steps])


TWINS = [(method, loss) for method in ("none", "xbm") for loss in ("ms", "supcon")]


def twin_differences(method, loss):
    """|ours - pytorch-metric-learning's| of each of 200 losses of two trainings, and ours."""
    from pytorch_metric_learning import losses, miners
    theirs, miner = {"ms": (losses.MultiSimilarityLoss(2, 50, 0.5), miners.MultiSimilarityMiner(0.1)),
                     "supcon": (losses.SupConLoss(0.1), miners.PairMarginMiner(0.2, 0.8))}[loss]
    peer = losses.CrossBatchMemory(theirs, 32, memory_size=100, miner=miner)
    ours = twin_run(CrossBatchLoss(32, 100, method, train.LOSSES[loss][0]).double())
    return abs(ours - twin_run(peer if method == "xbm" else lambda z, y: theirs(z, y, miner(z, y)))), ours


def test_variants_equal_the_methods_they_vary():
    g = torch.Generator().manual_seed(0)
    centres, batches = torch.randn(30, 8, generator=g), []
    for _ in range(40):
        y = torch.randperm(30, generator=g)[:4].repeat_interleave(4)
        batches.append((centres[y] + 0.3 * torch.randn(16, 8, generator=g), y))
    for rule, method in ((1.0, "xbn"), (0.5, "ema"), ("off", "xbm")):
        ours, theirs = Variant((rule, rule), 8, 64, "xbn"), CrossBatchLoss(8, 64, method, momentum=0.5)
        for z, labels in batches:
            torch.testing.assert_close(ours(z, labels), theirs(z, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", [["2", "1"], ["classes", "1"], ["1", "fast"], ["1"]])
def test_variants_of_wrong_rules_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        variant(words)
    assert "test_acbn.py variant: error: " in capsys.readouterr().err


def test_variants_measure_noise_and_correct_for_few_classes():
    g, y = torch.Generator().manual_seed(0), torch.arange(16) // 4
    drawn = [moments_of_classes(torch.randn(4, 6, generator=g)[y] + 0.5 * torch.randn(16, 6, generator=g), y)
             for _ in range(2000)]                          # variance 1 between classes, 0.25 within
    means, stds, corrected = (torch.stack(t) for t in zip(*((m, s, c) for (m, s), _, c in drawn)))
    of_mean, of_std = torch.tensor([noises for _, noises, _ in drawn]).mean(0)
    assert corrected.square().mean().item() == pytest.approx(1.25, rel=0.02)
    assert stds.square().mean() < 1.1                       # the plain one is too small for four classes
    assert of_mean.item() == pytest.approx(means.var(0).mean().item(), rel=0.03)
    assert of_std.item() == pytest.approx(stds.var(0).mean().item(), rel=0.35)          # to first order


def test_variants_gain_follows_the_noises():
    for q, r in ((1e-3, 1e-2), (1e-2, 1e-3)):
        g, state, truth, estimate = torch.Generator().manual_seed(0), torch.tensor([1.0, 0, 0]), 0.0, 0.0
        for step in range(4000):
            truth += math.sqrt(q) * torch.randn((), generator=g)
            measured = truth + math.sqrt(r) * torch.randn((), generator=g)
            K = measured_gain(state, (measured - estimate) ** 2, torch.tensor(r), rate=0.005)
            estimate += K * (measured - estimate)
        p = 0.0
        for _ in range(100):
            p, best = acbn.kalman_gain(p, 1, q, r)
        assert K == pytest.approx(best, rel=0.3)


@pytest.mark.parametrize("method, loss", TWINS)
def test_training_equals_pytorch_metric_learning_step_by_step(method, loss):
    pytest.importorskip("pytorch_metric_learning")
    difference, losses = twin_differences(method, loss)
    assert difference.max() < 1e-5 and losses[-20:].mean() < 0.9 * losses[:20].mean()


def test_docstring_usage_runs():
    assert doctest.testmod(acbn).attempted > 3 and doctest.testmod(acbn).failed == 0


def test_acbn_imports_torch_alone():
    imports = re.findall(r"^\s*(?:import|from) (\w+)", (HERE / "acbn.py").read_text(), re.M)
    assert set(imports) == {"torch"}
    assert (HERE / "acbn.py").read_text().startswith("# SPDX-License-Identifier: MIT\n")


# ---------------------------------------------------------------- data sets

def make_sop(root, train=(3, 4, 2), test=(4, 3, 1), edit=lambda text: text):
    """A replica of Stanford Online Products with so many images of each class, odd files among them."""
    base, image_id, class_id = root / "Stanford_Online_Products", 0, 0
    (base / "bicycle_final").mkdir(parents=True)
    for name, counts in (("Ebay_train.txt", train), ("Ebay_test.txt", test)):
        lines = ["image_id class_id super_class_id path"]
        for n in counts:
            class_id += 1
            for k in range(n):
                image_id += 1
                path = f"bicycle_final/{110000000000 + class_id}_{k}.JPG"
                pixels = np.random.default_rng(class_id * 100 + k).integers(0, 60, (40, 50, 3))
                image = Image.fromarray((pixels + 30 * (class_id % 6)).astype(np.uint8))
                image = image.convert("L") if k == 2 else image
                image.save(base / path, format="GIF" if k == 1 else "JPEG")         # a GIF named .JPG
                lines.append(f"{image_id} {class_id} 1 {path}")
        (base / name).write_text(edit("\n".join(lines) + "\n"))
    return root


def test_sop_replica_is_read_and_counts_are_enforced(tmp_path, capsys):
    make_sop(tmp_path)
    with pytest.raises(data.UserError,
                       match="train split has 9 images of 3 classes, expected 59551 .*allow-partial"):
        data.load("sop", tmp_path)
    for root in (tmp_path, tmp_path / "Stanford_Online_Products"):
        splits = data.load("sop", root, allow_partial=True)
        assert splits.train.labels.tolist() == [1] * 3 + [2] * 4 + [3] * 2 and splits.gallery is None
        assert splits.query.labels.tolist() == [4] * 4 + [5] * 3 + [6] and len(splits.query.images) == 8
        assert all(Path(p).exists() for p in splits.train.images + splits.query.images)
    assert "warning: sop in" in capsys.readouterr().err
    images = data.Images(splits.train, 16, "light")
    assert all(x.shape == (3, 16, 16) and x.dtype == torch.uint8 and i == k
               for k, (x, _, i) in enumerate(images))


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.replace("image_id", "id", 1), "Ebay_train.txt, line 1: expected 'image_id class_id"),
    (lambda t: t.replace("2 1 1 ", "2 one 1 ", 1), "Ebay_train.txt, line 3: expected a whole number"),
    (lambda t: t.replace("2 1 1 ", "2 1 ", 1), "Ebay_train.txt, line 3: expected 4 words"),
    (lambda t: "", "Ebay_train.txt, line 1"),
    (lambda t: t.splitlines()[0], "train split is empty"),
    (lambda t: re.sub(r"(?m)^(\d+) \d+ ", r"\1 1 ", t), "class 1 is in the training and in the test list")])
def test_sop_faults_name_file_and_line(tmp_path, edit, message):
    make_sop(tmp_path, edit=edit)
    with pytest.raises(data.UserError, match=message):
        data.load("sop", tmp_path, allow_partial=True)


def test_sop_windows_line_ends_and_blank_lines_are_read(tmp_path):
    make_sop(tmp_path, edit=lambda t: t.replace("\n", "\r\n") + "\r\n")
    assert len(data.load("sop", tmp_path, allow_partial=True).query.labels) == 8


def test_folder_in_both_layouts(tmp_path):
    for layout, classes in (("train/", "ab"), ("test/", "cd"), ("", "")):
        for c in classes:
            (tmp_path / "split" / layout / c).mkdir(parents=True)
            (tmp_path / "flat" / c).mkdir(parents=True)
            for k in range(2):
                for folder in (tmp_path / "split" / layout / c, tmp_path / "flat" / c):
                    Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / f"{k}.png")
    for root in (tmp_path / "split", tmp_path / "flat"):
        splits = data.load("folder", root)
        assert [Path(p).parent.name for p in splits.train.images] == list("aabb")
        assert [Path(p).parent.name for p in splits.query.images] == list("ccdd")
    for wrong in (tmp_path / "nothing", tmp_path / "flat" / "a"):
        with pytest.raises(data.UserError, match="expected under --root"):
            data.load("folder", wrong)


def jpeg(path, seed=0, size=(60, 40)):
    """One small image file of noise; by the seed an odd one: grey, CMYK, turned, or no JPEG at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6 if seed % 7 == 5 else 1                                # 6: turn by 90 degrees
    kind, mode = {1: ("JPEG", "L"), 2: ("JPEG", "CMYK"), 3: ("GIF", "P"), 4: ("PNG", "P")}.get(
        seed % 7, ("JPEG", "RGB"))
    image = image.convert(mode)
    if seed % 7 == 6:
        kind, image = "PNG", Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)     # 16 bits
    image.save(path, format=kind, exif=exif)


def make_inshop(root, place="Eval", images="Img/img", edit=lambda text: text):
    """A replica of In-shop Clothes Retrieval: blank-padded rows, a class with one image, 4 + 4 classes."""
    rows = []
    for item, (status, n) in enumerate([("train", 4), ("train", 1), ("train", 4), ("train", 5),
                                        ("query", 2), ("query", 1), ("query", 3), ("query", 2)], 1):
        for k in range(n):
            rows.append((f"WOMEN/Dresses/id_{item:08d}/{k:02d}_1_front.jpg", item, status))
            if status == "query":
                rows.append((f"WOMEN/Dresses/id_{item:08d}/{k:02d}_2_side.jpg", item, "gallery"))
    for k, (name, _, _) in enumerate(rows):
        jpeg(root / images / name, k)
    lines = [str(len(rows)), "image_name item_id evaluation_status"]
    lines += [f"img/{name:60} id_{item:08d} {status}      " for name, item, status in rows]
    (root / place).mkdir(exist_ok=True)
    (root / place / "list_eval_partition.txt").write_text(edit("\n".join(lines) + "\n"))
    return root


def make_df2(root, nest=False, edit=lambda anno: anno):
    """A replica of DeepFashion2: two items an image, style 0, a box without area, pair ids that restart."""
    for part in ("train", "validation"):
        base = root / part / part if nest else root / part
        for k in range(12):
            box = [0, 0, 0, 0] if k == 0 else [-4, 2, 99, 30]
            item = {"category_id": 1 + k % 2, "style": k // 4 % 3, "bounding_box": [5, 5, 45, 35]}
            other = {"category_id": 3, "style": 1, "bounding_box": box}
            source = "user" if k % 3 else "shop"
            anno = {"item2": other, "source": source, "pair_id": 1 + k // 6, "item1": item}
            jpeg(base / "image" / f"{k + 1:06d}.jpg", k)
            (base / "annos").mkdir(exist_ok=True)
            (base / "annos" / f"{k + 1:06d}.json").write_text(json.dumps(edit(anno)))
    return root


def make_vehicleid(root, edit=lambda text: text):
    """A replica of VehicleID: a training list and three test lists."""
    base, k = root / "VehicleID_V1.0", 0
    (base / "train_test_split").mkdir(parents=True)
    for name, vehicles in (("train_list", range(5)), ("test_list_800", range(5, 9)),
                           ("test_list_1600", range(5, 10)), ("test_list_2400", range(5, 11))):
        lines = []
        for vehicle in vehicles:
            for _ in range(4):
                k += 1
                jpeg(base / "image" / f"{k:07d}.jpg", k)
                lines.append(f"{k:07d} {vehicle}")
        (base / "train_test_split" / f"{name}.txt").write_text(edit("\n".join(lines)))
    return root


def make_folder(root):
    """Six classes of four images, a folder each."""
    for k in range(24):
        jpeg(root / f"class{k // 4}" / f"{k}.jpg", k)


MAKE = {"sop": make_sop, "inshop": make_inshop, "df2": make_df2, "vehicleid": make_vehicleid,
        "folder": make_folder}


@pytest.mark.parametrize("place", ["Eval", "Anno", "."])
@pytest.mark.parametrize("images", ["Img/img", "img", "img_highres"])
def test_inshop_replica_in_every_layout(tmp_path, place, images):
    make_inshop(tmp_path, place, images)
    with pytest.raises(data.UserError, match="has 14 images of 4 classes, expected 25882 of 3997"):
        data.load("inshop", tmp_path)
    splits = data.load("inshop", tmp_path, allow_partial=True)
    assert splits.train.labels.tolist() == [1] * 4 + [2] + [3] * 4 + [4] * 5
    assert splits.query.labels.tolist() == splits.gallery.labels.tolist() == [5, 5, 6, 7, 7, 7, 8, 8]
    assert all(Path(p).exists() for part in splits for p in part.images)
    assert len({*splits.query.images, *splits.gallery.images}) == 16


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.replace("30", "31", 1), "line 1: says 31 images, 30 rows follow"),
    (lambda t: t.replace("image_name", "name", 1), "line 2: expected 'image_name item_id"),
    (lambda t: t.replace(" query ", " probe ", 1), "line 17: expected 'img/<path> id_<number>"),
    (lambda t: t.replace("id_00000001 train", "id_x train", 1), "line 3: expected a whole number"),
    (lambda t: t.replace("id_00000001 train", "train", 1), "line 3: expected 3 words"),
    (lambda t: "\xff" * 9, "line 2: expected")])
def test_inshop_faults_name_file_and_line(tmp_path, edit, message):
    make_inshop(tmp_path, edit=edit)
    with pytest.raises(data.UserError, match="list_eval_partition.txt.*" + message):
        data.load("inshop", tmp_path, allow_partial=True)


@pytest.mark.parametrize("nest", [False, True])
def test_df2_replica_follows_the_paper_s_rules(tmp_path, nest, capsys):
    make_df2(tmp_path, nest)
    with pytest.raises(data.UserError, match="train split has 20 images of .* expected 217778"):
        data.load("df2", tmp_path)
    train_split, query, gallery = data.load("df2", tmp_path, allow_partial=True)
    # 24 items a part, 4 of them of style 0; of validation 8 are shops', of which 2 have style 0.
    assert len(train_split.labels) == 20 and len(gallery.labels) == 8 and len(query.labels) == 16 - 2
    assert not set(train_split.labels.tolist()) & set(query.labels.tolist() + gallery.labels.tolist())
    keys = {(k // 6, 3, 1) for k in range(12)} | {(k // 6, 1 + k % 2, k // 4 % 3) for k in range(4, 12)}
    assert len(train_split.labels.unique()) == len(keys)
    assert torch.isin(query.labels, gallery.labels).any()
    official = data.load("df2", tmp_path, allow_partial=True, df2_labels="official")
    assert len(official.train.labels.unique()) == len({(pair, style) for pair, _, style in keys})
    lines = list(data.describe(data.Splits(train_split, query, gallery)))
    assert any("1 boxes without area: the whole image is taken" in line for line in lines)
    images = data.Images(train_split, 16, "none")
    assert all(images[i][0].shape == (3, 16, 16) for i in range(20))


@pytest.mark.parametrize("edit, message", [
    (lambda a: {**a, "source": "web"}, "source is not user or shop"),
    (lambda a: {k: v for k, v in a.items() if k != "pair_id"}, "KeyError: 'pair_id'"),
    (lambda a: {**a, "item1": {**a["item1"], "bounding_box": [1, 2, 3]}}, "a box has not four numbers"),
    (lambda a: [a], "not a DeepFashion2 annotation")])
def test_df2_faults_name_the_annotation(tmp_path, edit, message):
    make_df2(tmp_path, edit=edit)
    with pytest.raises(data.UserError, match="000001.json: not a DeepFashion2 annotation") as error:
        data.load("df2", tmp_path, allow_partial=True)
    assert message in str(error.value)


def test_vehicleid_replica_and_its_three_test_lists(tmp_path):
    make_vehicleid(tmp_path)
    with pytest.raises(data.UserError, match="has 20 images of 5 classes, expected any number of 13164"):
        data.load("vehicleid", tmp_path)
    for test_list, vehicles in (("small", 4), ("medium", 5), ("large", 6)):
        splits = data.load("vehicleid", tmp_path, allow_partial=True, test_list=test_list)
        assert len(splits.train.labels) == 20 and len(splits.query.labels) == 4 * vehicles
        assert splits.gallery is None and all(Path(p).exists() for p in splits.train.images)


@pytest.mark.parametrize("name", ["sop", "inshop", "df2", "vehicleid", "folder"])
def test_loaders_of_a_wrong_root_show_the_expected_tree(tmp_path, name):
    with pytest.raises(data.UserError) as error:
        data.load(name, tmp_path)
    assert data.DATASETS[name].tree in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["inshop", "df2", "vehicleid", "folder"])
def test_scripts_train_and_evaluate_on_each_replica(tmp_path, name, capsys):
    (tmp_path / "data").mkdir()
    MAKE[name](tmp_path / "data")
    flags = ["--dataset", name, "--root", str(tmp_path / "data"), "--allow-partial"]
    data.main([*flags, "--check"])
    assert "gallery" in capsys.readouterr().out
    small = ("--backbone conv4 --weights none --image-size 32 --dim 8 --batch-size 8 --epochs 1 "
             "--head-epochs 1")
    records = train.main([*flags, *small.split(), "--memory-ratio", "1", "--device", "cpu", "--workers", "0",
                          "--val-fraction", "0.25", "--out", str(tmp_path / "run")])
    assert "held-out training classes" in capsys.readouterr().out and "val_recall@1" in records[-1]
    evaluation.main([str(tmp_path / "run" / "checkpoint.pt"), "--device", "cpu", "--show", "3",
                     "--out", str(tmp_path / "sheet.png")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recall@1"] == pytest.approx(records[-1]["recall@1"])
    assert Image.open(tmp_path / "sheet.png").size[1] == 24 + 3 * (96 + 34)


@pytest.mark.parametrize("name", MAKE)
def test_check_names_missing_and_truncated_images_of_each_replica(tmp_path, name, capsys):
    MAKE[name](tmp_path)
    files = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() == ".jpg")
    gone, cut = files[0], files[3]
    cut.write_bytes(cut.read_bytes()[:-300])
    if name != "folder":        # a folder has what it has
        gone.unlink()
    splits = data.load(name, tmp_path, allow_partial=True)
    with pytest.raises(SystemExit, match=f"{1 if name == 'folder' else 2} images of .* cannot be read"):
        data.main(["--dataset", name, "--root", str(tmp_path), "--allow-partial", "--check"])
    out = capsys.readouterr().out
    assert f"{cut}: cannot be read as an image" in out and (name == "folder") != (f"{gone}: " in out)
    with pytest.raises(data.UserError, match=f"{cut.name}: cannot be read as an image"):
        data.Images(splits.train, 16, "none")[splits.train.images.index(str(cut))]


@pytest.mark.parametrize("name", ["inshop", "vehicleid"])
def test_loaders_read_windows_line_ends(tmp_path, name):
    MAKE[name](tmp_path / "unix"), MAKE[name](tmp_path / "windows", edit=lambda t: t.replace("\n", "\r\n"))
    unix, windows = (data.load(name, tmp_path / end, allow_partial=True) for end in ("unix", "windows"))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(unix, windows) if a)
    assert [Path(p).name for p in unix.query.images] == [Path(p).name for p in windows.query.images]


def test_held_out_classes_are_disjoint():
    splits = data.synthetic(classes=20, max_images=4)
    rest, val = data.hold_out(splits, 0.25)
    assert len(val.labels.unique()) == 5
    assert len(rest.train.labels) + len(val.labels) == len(splits.train.labels)
    assert not set(rest.train.labels.tolist()) & set(val.labels.tolist())
    assert rest.train.images.shape[0] == len(rest.train.labels)


@pytest.mark.parametrize("recipe", ["paper", "light"])
def test_images_decoded_at_reduced_scale_look_like_the_whole_resized(tmp_path, recipe):
    smooth = np.add.outer(np.sin(np.arange(900) / 60), np.cos(np.arange(1100) / 50))
    picture = np.stack([smooth, smooth[::-1], -smooth], 2) * 60 + 128
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")         # the same pixels, never decoded reduced
    part = data.Split([str(tmp_path / "a.jpg"), str(tmp_path / "a.png")], torch.zeros(2, dtype=torch.int64),
                      torch.tensor([[100.0, 50, 1090, 850], [100, 50, 1090, 850]]))
    for training in (False, True):
        images = data.Images(part, 64, recipe if not training else "paper", training)
        images.transform = data.augmentation("none")[1]
        a, b = images[0, 3][0].float(), images[1, 3][0].float()
        assert (a - b).abs().mean() < 2
    cut = data.open_image(part.images[1], 64, data.centre, part.boxes[1])
    box = (100 + 95 + 50, 50 + 50, 1090 - 95 - 50, 850 - 50)       # the centre 7/8 of the box's 800 x 800
    expected = Image.open(part.images[1]).crop(box).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(cut, float) - np.asarray(expected, float)).mean() < 1


def test_synthetic_is_drawn_from_the_seed():
    a, b, c = (data.synthetic(classes=30, max_images=5, seed=s) for s in (0, 0, 1))
    assert (a.train.images == b.train.images).all() and not np.array_equal(a.train.images, c.train.images)
    for split, classes in ((a.train, range(30)), (a.query, range(30, 60))):
        labels, counts = split.labels.unique(return_counts=True)
        assert labels.tolist() == list(classes) and counts.min() >= 3 and counts.max() <= 5
        assert split.images.shape == (len(split.labels), 32, 32, 3) and split.images.dtype == np.uint8


def test_images_of_every_kind_are_opened_as_they_look(tmp_path):
    grey = Image.fromarray(np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8))
    deep = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    turned, exif = Image.new("RGB", (8, 4), (255, 0, 0)), Image.Exif()
    exif[0x0112] = 6                                                        # turn by 90 degrees
    for name, image, form, more in (("grey.jpg", grey, "JPEG", {}),
                                    ("gif.JPG", grey.convert("P"), "GIF", {}),
                                    ("cmyk.jpg", grey.convert("CMYK"), "JPEG", {}),
                                    ("deep.png", deep, "PNG", {}),
                                    ("palette.png", grey.convert("P"), "PNG", {}),
                                    ("turned.jpg", turned, "JPEG", {"exif": exif})):
        image.save(tmp_path / name, format=form, **more)
        opened = data.open_image(str(tmp_path / name))
        assert opened.mode == "RGB" and opened.size == ((4, 8) if name == "turned.jpg" else (8, 8))
        if name != "turned.jpg":
            assert np.asarray(opened)[-1, -1].min() > 230 and np.asarray(opened)[0, 0].max() < 25, name
    bad = {"empty.jpg": b"", "text.jpg": b"not an image",
           "cut.jpg": (tmp_path / "grey.jpg").read_bytes()[:-60]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in (*bad, "missing.jpg"):
        with pytest.raises(data.UserError, match=f"{name}: cannot be read as an image"):
            data.open_image(str(tmp_path / name))


@pytest.mark.parametrize("recipe", ["paper", "light", "none"])
def test_transforms_give_uint8_and_depend_on_the_seed_alone(recipe):
    splits = data.synthetic(classes=3)
    images = data.Images(splits.train, 24, recipe, training=True)
    before = torch.get_rng_state()
    (a, *_), (b, *_), (c, *_) = images[0, 5], images[0, 5], images[0, 6]
    assert a.shape == (3, 24, 24) and a.dtype == torch.uint8 and torch.equal(a, b)
    assert torch.equal(a, c) == (recipe == "none") and torch.equal(before, torch.get_rng_state())
    fixed = data.Images(splits.train, 24, recipe)
    assert fixed[0][0].shape == (3, 24, 24) and torch.equal(fixed[0, 5][0], fixed[0, 6][0])


def test_light_augmentation_equals_torchvision_one_image_at_a_time():
    TF, size = v2.functional, 40
    x = torch.tensor(data.synthetic(classes=4, image_size=size).train.images[:6]).permute(0, 3, 1, 2)
    assert torch.equal(data.light(x, torch.full((6, 7), 0.5)), x)                      # 0.5: nothing changes
    u = torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    for image, got, (angle, scale, dx, dy, *tints) in zip(x, data.light(x, u), (2 * u - 1).tolist()):
        image = image.float()
        angle, scale, shift = 15 * angle, 1 + 0.1 * scale, [-0.1 * size * dx, -0.1 * size * dy]
        # grid_sample moves what is looked at, affine what is seen: the inverse, about the shifted centre.
        a, (tx, ty) = math.radians(angle), shift
        c, s = scale * math.cos(a), scale * math.sin(a)
        image = TF.affine(image, -angle, [c * tx + s * ty, c * ty - s * tx], scale, [0.0, 0.0],
                          interpolation=v2.InterpolationMode.BILINEAR)
        image = (1 + 0.2 * tints[0]) * image
        image = torch.lerp(TF.rgb_to_grayscale(image).mean(), image, 1 + 0.2 * tints[1])
        image = torch.lerp(TF.rgb_to_grayscale(image), image, 1 + 0.2 * tints[2]).clamp(0, 255)
        inner = (slice(None), slice(8, -8), slice(8, -8))               # edges fade differently
        assert (image[inner] - got[inner].float()).abs().mean() < 2


LABELS = torch.arange(20).repeat_interleave(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2))


def test_sampler_deals_distinct_classes_and_images():
    sampler, used = data.ClassBalancedSampler(LABELS, 16, 4), collections.Counter()
    assert len(sampler) == len(LABELS) // 16 and len(list(sampler)) == len(sampler)
    for epoch in range(30):
        sampler.set_epoch(epoch)
        for batch in sampler:
            y = LABELS[batch].view(4, 4)
            assert (y == y[:, :1]).all() and len(y[:, 0].unique()) == 4             # 4 classes x 4 images
            for group in torch.tensor(batch).view(4, 4):
                n = int((LABELS == LABELS[group[0]]).sum())
                assert len(group.unique()) == min(n, 4)                             # all of a small class
            used.update(y[:, 0].tolist())
    assert max(used.values()) - min(used.values()) <= 30                      # a deck an epoch, dealt evenly


def test_sampler_is_seeded_and_shards_in_rank_order():
    def batches(epoch=0, **kw):
        sampler = data.ClassBalancedSampler(LABELS, 16, 4, **kw)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches() == batches() != batches(seed=1) and batches() != batches(epoch=1)
    shards = [batches(rank=r, world=2) for r in range(2)]
    assert [a + b for a, b in zip(*shards)] == batches()
    for wrong, message in (((15, 4), "multiple of 4"),
                           ((128, 4), "needs 32 classes, the training split has 20")):
        with pytest.raises(ValueError, match=message):
            data.ClassBalancedSampler(LABELS, *wrong)
    seeds = [s for epoch in range(2) for rank in range(2) for batch in
             seeded(LABELS, epoch, rank) for _, s in batch]
    assert len(set(seeds)) == len(seeds)


def seeded(labels, epoch, rank):
    sampler = data.ClassBalancedSampler(labels, 16, 4, rank=rank, world=2)
    sampler.set_epoch(epoch)
    return data.Seeded(sampler)


def test_loader_gives_the_same_images_whatever_the_number_of_workers():
    splits = data.synthetic(classes=20, max_images=4)
    sampler = data.ClassBalancedSampler(splits.train.labels, 16)
    images = data.Images(splits.train, 32, "light", training=True)
    none, two = ([x for x, _, _ in data.loader(images, w, batch_sampler=data.Seeded(sampler))]
                 for w in (0, 2))
    assert len(none) == len(two) > 2 and all(torch.equal(a, b) for a, b in zip(none, two))


# ---------------------------------------------------------------- Recall@K and MAP@R

def brute_force(z, y, ks, gallery=None, gallery_y=None):
    z, itself = np.asarray(z, np.float64), gallery is None
    gallery, gallery_y = (z, y) if itself else (np.asarray(gallery, np.float64), gallery_y)
    hits, precision = {k: 0 for k in ks}, 0.0
    for i, (row, label) in enumerate(zip(z, y)):
        sims = [(-float(row @ g) / np.linalg.norm(row) / np.linalg.norm(g), bool(l == label))
                for j, (g, l) in enumerate(zip(gallery, gallery_y)) if not (itself and i == j)]
        right = [r for _, r in sorted(sims)]        # at equal similarity False, the other class, comes first
        R = sum(right)
        for k in ks:
            hits[k] += any(right[:k])
        precision += sum(sum(right[:j + 1]) / (j + 1) for j in range(R) if right[j]) / max(R, 1)
    return {k: v / len(z) for k, v in hits.items()}, precision / len(z)


@pytest.mark.parametrize("chunk", [1, 300, 2 ** 26])
def test_recall_and_map_equal_brute_force(chunk):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(12, (50,), generator=g) + 2 ** 40
    gallery_y = torch.randint(9, (40,), generator=g) + 2 ** 40
    z = rows(12, 6)[y - 2 ** 40] + 0.6 * rows(50, 6, 1)
    gallery = rows(12, 6)[gallery_y - 2 ** 40] + 0.6 * rows(40, 6, 2)
    for args in ((), (gallery, gallery_y)):
        ranks = evaluation.positive_ranks(z, y, *args, chunk=chunk)
        recall, precision = brute_force(z, y, (1, 3, 10), *args)
        assert evaluation.recall_from_ranks(ranks, (1, 3, 10)) == pytest.approx(recall)
        assert evaluation.map_from_ranks(ranks) == pytest.approx(precision)
        assert evaluation.recall_at_k(z, y, (1, 3, 10), *args) == pytest.approx(recall)
        assert evaluation.map_at_r(z, y, *args) == pytest.approx(precision)


def test_recall_excludes_self_by_index_and_finds_duplicates():
    z = rows(4, 8)
    assert evaluation.recall_at_k(torch.cat([z, z]), torch.arange(4).repeat(2), (1,)) == {1: 1.0}
    assert evaluation.recall_at_k(z, torch.arange(4), (1, 3)) == {1: 0.0, 3: 0.0}      # only itself is right


@pytest.mark.parametrize("n, d", [(8, 4), (301, 7), (1000, 128)])
def test_recall_of_collapsed_embeddings_is_not_perfect(n, d):
    z, y = torch.ones(n, d), torch.arange(n) // 2
    assert evaluation.recall_at_k(z, y, (1, n - 3, n - 1)) == {1: 0.0, n - 3: 0.0, n - 1: n // 2 * 2 / n}
    assert evaluation.map_at_r(z, y) == 0.0


def test_recall_counts_queries_without_match_as_misses_and_labels_beyond_float32():
    z, gallery = torch.eye(4), torch.eye(4)[:3]
    y = torch.tensor([2 ** 24, 2 ** 24 + 1, 2 ** 30, 7])
    assert evaluation.recall_at_k(z, y, (1,), gallery, y[:3]) == {1: 0.75}
    assert evaluation.recall_at_k(z, y, (1,), gallery, y[:3] + 1)[1] == 0.0
    with pytest.raises(ValueError, match="NaN"):
        evaluation.recall_at_k(z * math.nan, y)


# ---------------------------------------------------------------- the scripts

TINY = ("--classes 24 --max-images 4 --image-size 16 --batch-size 16 --epochs 2 --warmup-steps 3 --dim 16 "
        "--lr 1e-3 --device cpu --workers 0").split()


def tiny(out, *more):
    return train.main([*TINY, "--out", str(out), *more])


def strip(records):
    return [{k: v for k, v in r.items() if k not in ("images_per_second", "eval_seconds")} for r in records]


def test_train_writes_log_settings_and_checkpoints(tmp_path, capsys):
    records = tiny(tmp_path, "--head-epochs", "1")
    assert records == [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1, 2]
    for key in ("loss", "lr", "gain", "positives_mined", "negatives_mined", "images_per_second",
                "drift_mean", "drift_max", "staleness_stored", "staleness_adapted",
                "recall@1", "recall@10", "map@r"):
        assert math.isfinite(records[2][key]), key
    assert records[2]["drift_max"] >= records[2]["drift_mean"] > 0 and "recall@100" not in records[2]
    assert json.loads((tmp_path / "settings.json").read_text())["method"] == "axbn"
    best = max(r["recall@1"] for r in records)
    assert re.search(rf"Recall@1: last {100 * records[2]['recall@1']:.2f} \(epoch 2\), "
                     rf"best {100 * best:.2f} ", capsys.readouterr().out.splitlines()[-1])
    for name in ("checkpoint.pt", "best.pt"):
        state = torch.load(tmp_path / name, weights_only=True)
        evaluation.main([str(tmp_path / name)])
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["recall@1"] == pytest.approx(records[state["epoch"]]["recall@1"])


@pytest.mark.parametrize("method", METHODS)
def test_train_resumes_exactly(tmp_path, method, capsys):
    whole = tiny(tmp_path / "whole", "--method", method, "--fill-memory")
    tiny(tmp_path / "parts", "--method", method, "--fill-memory", "--epochs", "1")
    parts = tiny(tmp_path / "parts", "--method", method, "--fill-memory")
    assert strip(whole) == strip(parts) and "after epoch 1" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "parts"))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def test_train_refuses_to_resume_with_other_settings(tmp_path):
    tiny(tmp_path, "--epochs", "0")
    with pytest.raises(SystemExit, match="was made with --lr 0.001, now it is 0.01"):
        tiny(tmp_path, "--lr", "0.01")
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="cannot be read as a checkpoint"):
        tiny(tmp_path)


def test_train_diagnostics_leave_no_trace(tmp_path):
    weights = []
    for every in (1, 10 ** 9):
        run = train.build(train.parse_args([*TINY, "--loss", "supcon"]))
        run["probe"].every = every
        record = train.train_epoch(run, 1)
        weights.append(run["model"].state_dict())
        assert ("drift_mean" in record) == (every == 1)
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


@pytest.mark.parametrize("rows", [8, 31, 32, 33, 100])
def test_train_staleness_is_of_rows_that_are_still_there(rows):
    run = train.build(train.parse_args([*TINY, "--method", "xbm", "--batch-size", "8"]))
    run["criterion"] = CrossBatchLoss(run["args"].dim, rows, "xbm", run["probe"])
    run["probe"].every = 3
    ages = train.train_epoch(run, 1)["staleness"]
    assert bool(ages) == (rows >= 32)                   # 31 rows do not stay for three steps after their own
    assert all(stored == pytest.approx(adapted) and age <= rows // 8 - 1 for age, stored, adapted in ages)


def test_train_fills_the_memory_and_leaves_the_network_alone():
    run = train.build(train.parse_args(TINY))
    model, criterion = run["model"].train(), run["criterion"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train.fill_memory(model, criterion, run["splits"].train, run["args"])
    assert len(criterion.memory) == criterion.memory.size // 16 * 16 and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    labels = run["splits"].train.labels[criterion.memory.ids]
    assert torch.equal(labels, criterion.memory.labels)
    assert len(criterion.memory.ids.unique()) == len(criterion.memory)


@pytest.mark.parametrize("backbone", ["resnet18", "swin_t", "efficientnet_b0"])
def test_train_takes_any_torchvision_backbone(backbone):
    flags = "--classes 9 --image-size 32 --batch-size 8".split()
    run = train.build(train.parse_args([*TINY, "--backbone", backbone, *flags]))
    before = run["model"].head.weight.clone()
    run["batches"] = list(run["batches"])[:1]
    assert math.isfinite(train.train_epoch(run, 1)["loss"])
    assert not torch.equal(before, run["model"].head.weight)


def test_raw_pixels_are_compared_about_grey_in_the_gallery_too():
    y = torch.arange(6).repeat_interleave(2)
    query, gallery = (np.random.default_rng(k).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
                      for k in (0, 1))
    splits = data.Splits(None, data.Split(query, y), data.Split(gallery, y))
    flat = [torch.tensor(x).permute(0, 3, 1, 2).flatten(1).double() - 127.5 for x in (query, gallery)]
    expected, _ = brute_force(flat[0], y, [1], flat[1], y)
    assert train.raw_pixels(splits, train.parse_args(TINY)) == pytest.approx(expected[1])


def test_train_schedule_and_losses(tmp_path):
    records = tiny(tmp_path, "--epochs", "3", "--lr-drops", "1", "2", "--lr-decay", "0.5",
                   "--loss", "contrastive")
    assert [r["lr"] for r in records[1:]] == [0.001, 0.0005, 0.00025]


def test_train_weights_from_a_file_or_a_clear_sentence(tmp_path, monkeypatch):
    import torchvision
    from urllib.error import URLError
    source = torchvision.models.resnet18(num_classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    encoder = evaluation.Encoder("resnet18", 8)
    evaluation.load_weights(encoder, "resnet18", str(tmp_path / "weights.pt"))
    assert torch.equal(encoder.backbone.conv1.weight, source.conv1.weight)
    with pytest.raises(data.UserError, match="not a state_dict of resnet34"):
        evaluation.load_weights(evaluation.Encoder("resnet34", 8), "resnet34", str(tmp_path / "weights.pt"))
    with pytest.raises(data.UserError, match="nothing.pt: cannot be read .*No such file"):
        evaluation.load_weights(encoder, "resnet18", str(tmp_path / "nothing.pt"))

    def offline(*args, **kwargs):
        raise URLError("no network")
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.DEFAULT.__class__, "get_state_dict", offline)
    with pytest.raises(data.UserError, match="ImageNet weights of resnet18 cannot be had .*--weights FILE"):
        evaluation.load_weights(encoder, "resnet18", "imagenet")


WRONG = {       # flags: part of the sentence
    "--batch-size 18": "not a multiple of --images-per-class 4",
    "--batch-size 128": "needs 32 classes, the training split has 24",
    "--batch-size 0": "--batch-size: must be at least 1",
    "--batch-size 96 --images-per-class 96": "--batch-size 96 is more than the 8. training images",
    "--images-per-class 0": "--images-per-class: must be at least 1",
    "--memory-ratio 0.01": "makes a memory of 0 rows, less than --batch-size 16",
    "--memory-ratio 0": "--memory-ratio: must be above 0", "--memory-ratio inf": "and finite, got inf",
    "--lr -1": "--lr: must be above 0 and finite, got -1", "--lr nan": "finite, got nan",
    "--lr ten": "invalid number value: 'ten'",
    "--lr-decay 0": "--lr-decay: must be above 0", "--lr-drops 1 -2": "--lr-drops: must be at least 0",
    "--weight-decay -1": "--weight-decay: must be at least 0",
    "--epochs -1": "--epochs: must be at least 0", "--epochs two": "invalid number value: 'two'",
    "--head-epochs -1": "--head-epochs: must be at least 0",
    "--warmup-steps -1": "--warmup-steps: must be at least 0",
    "--gain-interval 0": "--gain-interval: must be at least 1",
    "--workers -1": "--workers: must be at least 0", "--dim 0": "--dim: must be at least 1",
    "--dim 1000000000000": "allocate", "--seed -1": "--seed: must be at least 0",
    "--seed 4294967296": "--seed: must be at least 0 and below 4294967296",
    "--image-size 0": "--image-size: must be at least 1", "--image-size 2": "too small",
    "--momentum 1": "--momentum: must be at least 0 and below 1",
    "--process-noise -1": "--process-noise: must be at least 0",
    "--measurement-noise nan": "--measurement-noise: must be at least 0",
    "--process-noise 0 --measurement-noise 0": "cannot both be 0",
    "--val-fraction 1": "--val-fraction: must be at least 0 and below 1",
    "--val-fraction 0.999": "needs 4 classes, the training split has",
    "--classes 0": "--classes: must be at least 1", "--max-images 2": "--max-images: must be at least 3",
    "--amp fp16": "--amp fp16 needs a GPU", "--device abacus": "--device abacus cannot be used",
    "--backbone resnet19": "resnet19", "--backbone inception_v3": "not one last linear layer",
    "--weights nothing.pt": "nothing.pt: cannot be read", "--weights imagenet": "conv4",
    "--method moco": "invalid choice: 'moco'", "--loss triplet": "invalid choice: 'triplet'",
    "--augment heavy": "invalid choice", "--amp fp8": "invalid choice", "--dataset cub": "invalid choice",
    "--test-list tiny": "invalid choice", "--df2-labels mine": "invalid choice",
    "--dataset sop --root nowhere --backbone conv4 --weights none": "nothing of 'sop' in nowhere",
    "--meth axbn": "unrecognized arguments: --meth", "--help-me": "unrecognized arguments"}


@pytest.mark.parametrize("flags", WRONG)
def test_train_refuses_wrong_flags_before_any_work(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as error:
        tiny(tmp_path / "run", *flags.split())
    text = capsys.readouterr().err
    assert error.value.code == 2 and re.search(WRONG[flags], text.splitlines()[-1] + text), text
    assert not (tmp_path / "run").exists() and "Traceback" not in text


def test_train_wrong_flags_are_tried_for_every_flag():
    import argparse
    flags = {word.split("=")[0] for text in WRONG for word in text.split() if word.startswith("--")}
    parser = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv=None: parser.append(self))
        with contextlib.suppress(AttributeError):
            train.parse_args([])
    every = {option for action in parser[0]._actions for option in action.option_strings}
    yes_or_no = {"--help", "-h", "--allow-partial", "--fill-memory", "--sync-bn", "--deterministic"}
    assert every - flags == yes_or_no | {"--out"}       # any --out will do


# ---------------------------------------------------------------- nothing is lost, nothing lies

@pytest.mark.parametrize("workers", ["1", "2"])
def test_train_is_the_same_whatever_the_number_of_workers(tmp_path, workers):
    none, some = (tiny(tmp_path / w, "--workers", w) for w in ("0", workers))
    assert strip(none) == strip(some)
    a, b = (evaluation.load_file(tmp_path / w / "checkpoint.pt") for w in ("0", workers))
    assert same(a["rng"], b["rng"])                             # or a network with dropout would differ
    assert strip(none)[1:] != strip(tiny(tmp_path / "seed", "--seed", "1"))[1:]


def test_train_resumes_exactly_with_workers_deterministic_and_best_so_far(tmp_path):
    flags = "--workers 2 --epochs 3 --val-fraction 0.3 --deterministic".split()
    whole = tiny(tmp_path / "whole", *flags)
    for epochs in "13":
        parts = tiny(tmp_path / "parts", *flags, "--epochs", epochs)
    assert strip(whole) == strip(parts)
    for name in ("checkpoint.pt", "best.pt"):
        assert same(*(evaluation.load_file(tmp_path / n / name) for n in ("whole", "parts")))
    torch.use_deterministic_algorithms(False)


def same(a, b):
    """Whether two checkpoints hold the same bits; times, --out and --epochs aside."""
    if isinstance(a, dict):
        free = {"images_per_second", "eval_seconds", "out", "epochs"}
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in free)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def whole_epochs(out):
    """How many epochs are logged; fails on a torn or doubled line, or on a checkpoint that does not fit."""
    log = out / "log.jsonl"
    epochs = [json.loads(line)["epoch"] for line in log.read_text().splitlines()] if log.exists() else []
    assert epochs == list(range(len(epochs)))
    if (out / "checkpoint.pt").exists():
        assert evaluation.rebuild(out / "checkpoint.pt")[1]["epoch"] + 1 in (len(epochs), len(epochs) + 1)
    return len(epochs)


# train.py, killed at the n-th of the moments that matter: a file half written, whole, or just renamed.
DIES_WRITING = """
import os, signal, sys, torch, train
left, save, replace = int(sys.argv.pop(1)), torch.save, os.replace
def moment():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def half(content, file):
    save(content, file)
    if left == 1:
        file.truncate(file.tell() // 2)
    moment()
def renamed(part, path):
    moment(), replace(part, path), moment()
torch.save, os.replace = half, renamed
train.main()
"""
KILLED = [*TINY, "--epochs", "3", "--workers", "1"]


def killed_while_writing(out, moment, flags=KILLED):
    """Runs train.py until it is killed at that moment, or to its end; returns its exit code."""
    (out.parent / "dies_writing.py").write_text(DIES_WRITING)
    result = script(out.parent / "dies_writing.py", moment, *flags, "--out", out, PYTHONPATH=str(HERE))
    assert result.returncode in (0, -9), result.stderr
    whole_epochs(out)
    return result.returncode


def test_train_killed_while_it_writes_loses_nothing(tmp_path):
    for moment in (6, 14):          # the first checkpoint half written; then another, or its log
        assert killed_while_writing(tmp_path / "killed", moment, (*TINY, "--epochs", "3")) == -9
    tiny(tmp_path / "killed", "--epochs", "3"), tiny(tmp_path / "whole", "--epochs", "3")
    assert whole_epochs(tmp_path / "killed") == 4
    killed, whole = (evaluation.load_file(tmp_path / n / "checkpoint.pt") for n in ("killed", "whole"))
    assert same(killed, whole)


def interrupted(out, number, wait, flags=(*TINY, "--workers", "2", "--epochs", "9999", "--classes", "60")):
    """Sends a signal `wait` seconds into the training of a long run: exit code, seconds it took, words."""
    run = subprocess.Popen([sys.executable, HERE / "train.py", *flags, "--out", out], cwd=HERE, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                           env={**os.environ, "OMP_NUM_THREADS": "2"})
    try:
        while (line := run.stdout.readline()) and not line.startswith("epoch"):
            pass
        time.sleep(wait)
        start = time.perf_counter()
        if run.poll() is None:          # as a terminal does: Ctrl-C goes to the workers too
            (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
        while run.poll() is None and time.perf_counter() < start + 60:    # workers may hold the pipes longer
            time.sleep(0.01)
        seconds, (_, words) = time.perf_counter() - start, run.communicate(timeout=60)
        return run.returncode, seconds, words
    finally:
        run.kill()


def test_train_ends_soon_and_with_a_sentence_when_told_to(tmp_path):
    code, seconds, words = interrupted(tmp_path / "run", signal.SIGTERM, 1.0)
    assert code == 130 and "the same command continues after the last whole epoch" in words
    assert "Traceback" not in words and seconds < 5 and whole_epochs(tmp_path / "run") > 0


def test_checkpoints_of_others_are_refused_with_a_sentence(tmp_path):
    tiny(tmp_path, "--epochs", "0")
    path = tmp_path / "checkpoint.pt"
    good, whole_log = torch.load(path, weights_only=True), (tmp_path / "log.jsonl").read_text()
    lacks = {k: v for k, v in good["settings"].items() if k != "deterministic"}
    for other, message in (({**good, "format": 2}, "expected format 1, found 2"),
                           ({"state_dict": {}}, "expected format 1, found None"), ([1], "found None"),
                           ({**good, "settings": lacks}, "KeyError: 'deterministic'"),
                           ({**good, "optimizer": {}}, "KeyError"),
                           ({**good, "rng": []}, "made with 0 processes"),
                           ({**good, "model": {"w": torch.ones(1)}}, "RuntimeError: Error"),
                           ({**good, "criterion": {}}, "RuntimeError: Error")):
        torch.save(other, path)
        with pytest.raises(SystemExit, match=f"checkpoint.pt: .*{message}") as error:
            tiny(tmp_path)
        assert "\n" not in str(error.value) and whole_log == (tmp_path / "log.jsonl").read_text()
        if not isinstance(other, dict) or "state_dict" in other:
            with pytest.raises(SystemExit, match="not a checkpoint of this version"):
                evaluation.main([str(path)])


def test_write_on_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    tiny(tmp_path, "--epochs", "1")
    for name in ("checkpoint.pt", "log.jsonl"):
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        (tmp_path / f"{name}.part").symlink_to("/dev/full")         # every write: no space left on device
        with pytest.raises(SystemExit, match=f"{name}.part: cannot be written .*; {name} is as it was"):
            tiny(tmp_path, "--epochs", "2")
        (tmp_path / f"{name}.part").unlink()
        assert before[name] == (tmp_path / name).read_bytes()
    assert strip(tiny(tmp_path))[2] == strip(tiny(tmp_path / "whole"))[2]
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):       # a folder that cannot be made
        tiny(tmp_path / "file" / "run")


def test_train_names_a_loss_or_gradient_that_is_not_finite(tmp_path):
    with pytest.raises(SystemExit, match="epoch 1, step [2-9]: the (loss|gradient) is not finite at a "
                                         r"learning rate of 1e\+30; try a lower --lr"):
        tiny(tmp_path, "--lr", "1e30")
    assert whole_epochs(tmp_path) == 1                              # the checkpoint before it stands
    inf, nan = math.inf, math.nan
    for seen, amp, message in (([[1, inf, 1], [1, 1, nan]], "off", "step 2: the loss"),
                               ([[1, 1, nan], [1, inf, 1]], "off", "step 2: the gradient"),
                               ([[1, 1, nan], [1, inf, 1]], "fp16", "step 3: the loss .*or --amp bf16")):
        with pytest.raises(data.UserError, match=message):
            train.refuse_infinite(torch.tensor(seen), 1, 0.1, amp)
    train.refuse_infinite(torch.tensor([[1, 1], [inf, 1]]), 1, 0.1, "fp16")         # skipped, not refused


def test_train_counts_steps_without_pairs_and_names_a_collapse(tmp_path, capsys, monkeypatch):
    record = tiny(tmp_path / "a", "--epochs", "1")[1]
    assert record["steps_without_pairs"] == record["steps_skipped"] == 0
    assert 0.1 < record["spread"] <= 1 and record["gradient_norm"] > 0 and "warning" not in record
    fake, flags = 5.0, ("--epochs", "1", "--loss", "supcon", "--method", "none")
    monkeypatch.setattr(evaluation.Encoder, "forward",
                        lambda self, x: self.head.bias.expand(len(x), -1) * fake)
    record = tiny(tmp_path / "b", *flags)[1]                # all cosines are 1: there is no hard positive
    assert record["steps_without_pairs"] == 5 and record["loss"] == 0 and record["recall@1"] == 0
    assert "collapsed" in record["warning"] and "warning: the embeddings have" in capsys.readouterr().out
    fake = math.nan
    with pytest.raises(SystemExit, match="NaN or infinity of .* images"):
        tiny(tmp_path / "c", *flags)


def test_train_skips_and_counts_steps_whose_scaled_gradient_overflows(monkeypatch):
    run = train.build(train.parse_args(TINY))
    monkeypatch.setattr(train, "autocast", lambda device, amp: contextlib.nullcontext())
    run["args"].amp, run["scaler"], calls = "fp16", torch.amp.GradScaler("cpu"), []

    def overflow(gradient):
        calls.append(1)
        return gradient * math.inf if len(calls) in (2, 4) else gradient
    run["model"].head.weight.register_hook(overflow)
    record = train.train_epoch(run, 1)
    assert record["steps_skipped"] == 2 and math.isfinite(record["loss"] + record["gradient_norm"])
    assert all(v.isfinite().all() for v in run["model"].state_dict().values())
    run["args"].amp, calls[:] = "off", []
    with pytest.raises(data.UserError, match="epoch 1, step 2: the gradient is not finite"):
        train.train_epoch(run, 1)


def random_case(seed):
    """A random batch, memory size, dimension, labels, dtype, and a scale from 1e-20 to 1e20."""
    rng = np.random.default_rng(seed)
    B, M, D, classes = rng.integers(2, 40), rng.integers(1, 100), rng.integers(1, 20), rng.integers(1, 12)
    dtype = (torch.float32, torch.float64)[seed % 2]
    z = torch.tensor(rng.normal(size=(int(rng.integers(1, 9)), B, D)) + rng.normal(size=D), dtype=dtype)
    y = torch.tensor(rng.integers(-classes, classes, z.shape[:2]) * int(rng.integers(1, 2 ** 40)))
    return z, y, int(M), 10.0 ** rng.uniform(-20, 20)


@pytest.mark.parametrize("seed", range(24))
def test_properties_of_any_memory_and_loss(seed):
    z, y, M, scale = random_case(seed)
    method, loss = METHODS[seed % 6], LOSSES[seed // 6 % 3]
    plain, scaled = (CrossBatchLoss(z.shape[2], M, method, loss, 0.01, 0.1, gain_interval=2).to(z.dtype)
                     for _ in range(2))
    queue, tolerance = collections.deque(maxlen=M), 1e-3 if z.dtype == torch.float32 else 1e-9
    for batch, labels in zip(z, y):
        batch.requires_grad_()
        a, b = plain(batch, labels), scaled(batch.detach() * scale, labels)
        (gradient,) = torch.autograd.grad(a, batch)
        assert a.isfinite() and a >= -tolerance and gradient.isfinite().all()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)       # length does not matter
        queue.extend(labels.tolist())
        memory = plain.memory
        if method != "none":
            assert memory.labels.roll(-memory.pointer).tolist() == list(queue)
            torch.testing.assert_close(memory.norms, memory.embeddings.norm(dim=1))
        if plain.adapts and memory.known and len(memory) > 1:
            mean, std = acbn.moments(memory.embeddings)
            torch.testing.assert_close(memory.mean, mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(memory.std, std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_properties_of_any_loss(seed):
    rng = np.random.default_rng(seed)
    B, N, classes = (int(rng.integers(1, n)) for n in (30, 300, 60))
    sim, positive, negative = case(B, N, classes, seed)
    order, turn = torch.randperm(N), torch.randperm(B)
    for loss in LOSSES:
        value = loss(sim, positive, negative)
        others = [m[turn][:, order] for m in (sim, positive, negative)]         # neither order matters
        torch.testing.assert_close(loss(*others), value, rtol=1e-10, atol=1e-12)
        none = [torch.cat([m, n], 1) for m, n in zip((sim, positive, negative), (
            torch.rand(B, 7, dtype=sim.dtype), *torch.zeros(2, B, 7, dtype=torch.bool)))]
        torch.testing.assert_close(loss(*none), value, rtol=1e-10, atol=1e-12)  # nor what is no pair
        low = loss(sim.float(), positive, negative)
        torch.testing.assert_close(low.double(), value, rtol=1e-3, atol=1e-4)  # float32: pairs on the margin


@pytest.mark.parametrize("seed", range(12))
def test_properties_of_any_filter_and_matching(seed):
    rng = np.random.default_rng(seed)
    q, r, scale = 10.0 ** rng.uniform(-20, 20, 3)
    B, p = int(rng.integers(1, 512)), 10.0 ** rng.uniform(-20, 20)
    for _ in range(50):
        before, (p, K) = p, acbn.kalman_gain(p, B, q, r)
        assert 0 <= p <= (before + q) * (1 + 1e-12) and 0 <= K <= 1
        assert p <= r / B + 1e-15 * (before + q)        # never less sure than the last measurement alone
    z, target = (torch.tensor(rng.normal(size=(n, 5)) * scale + rng.normal() * scale) for n in (60, 9))
    matched = acbn.match_moments(z, *acbn.moments(target))
    for got, expected in zip(acbn.moments(matched), acbn.moments(target)):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("seed", range(12))
def test_properties_of_any_recall(seed):
    rng = np.random.default_rng(seed)
    Q, G, D, classes = (int(rng.integers(2, n)) for n in (60, 60, 9, 25))
    z, gallery = (torch.tensor(rng.normal(size=(n, D))) for n in (Q, G))
    y, gallery_y = (torch.tensor(rng.integers(0, classes, n)) * 2 ** 40 for n in (Q, G))
    pair, ks = () if seed % 2 else (gallery, gallery_y), (1, 2, 7)
    recall, precision = brute_force(z, y, ks, *pair)
    scaled, turn = z * torch.tensor(10.0 ** rng.uniform(-20, 20, (Q, 1))), torch.randperm(Q)
    for chunk, (other, labels) in ((1, (z, y)), (2 ** 26, (z[turn], y[turn])), (99, (scaled.float(), y))):
        ranks = evaluation.positive_ranks(other, labels, *pair, chunk=chunk)
        assert evaluation.recall_from_ranks(ranks, ks) == pytest.approx(recall)
        assert evaluation.map_from_ranks(ranks) == pytest.approx(precision)
        first = evaluation.positive_ranks(other, labels, *pair, most=1)
        assert torch.equal(first, ranks[:, :1])


HARMLESS = (lambda t, g: t.replace(b"\n", b"\r\n"), lambda t, g: t + b"\n \n\t\n",
            lambda t, g: re.sub(rb" +", lambda m: m[0] + b" " * g.randrange(3), t),
            lambda t, g: t.rstrip(), lambda t, g: t.replace(b" ", b"\t"))
ROWS = (lambda rows, g: g.shuffle(rows), lambda rows, g: rows.pop(g.randrange(len(rows))),
        lambda rows, g: rows.append(rows[g.randrange(len(rows))]))
PIECES = (b"", b"x", b"-1", b" ", b"\n", b"\x00", b"\xff", "\u00e9\u2028".encode(), b"9" * 30, b"1e5", b"{",
          b"[", b"]", b'"', b",", b"null", b"NaN", b"query", b"gallery", b"id_", b"../", b"0")


def mutated(text, g, head):
    """A list file's bytes with harmless changes, with other rows, or with harm done anywhere."""
    kind = g.randrange(3)
    if kind == 0:
        return g.choice(HARMLESS)(text, g)
    if kind == 1 and head is not None:
        lines = text.splitlines()
        rows = lines[head:]
        g.choice(ROWS)(rows, g)
        return b"\n".join(lines[:head] + rows) + b"\n"
    for _ in range(g.randrange(1, 4)):
        i = g.randrange(len(text) + 1)
        text = text[:i] + g.choice(PIECES) + text[i + g.randrange(4) * g.randrange(9):]
    return text[:g.randrange(len(text) + 1)] if g.random() < 0.1 else text


def counted(name, root):
    """How many images the lists in a replica hold, by other means than data.py's."""
    def lines(path, skip):
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][skip:]
    if name == "inshop":
        status = [line.split()[-1] for line in lines(root / "Eval/list_eval_partition.txt", 2)]
        return [status.count(part) for part in ("train", "query", "gallery")]
    if name == "df2":
        found = collections.Counter()
        for path in root.glob("*/annos/*.json"):
            anno, part = json.loads(path.read_text()), path.parent.parent.name
            for item in (v for k, v in anno.items() if k.startswith("item")):
                paired = int(item["style"]) > 0
                found["train"] += part == "train" and paired
                found["query"] += part == "validation" and anno["source"] == "user" and paired
                found["gallery"] += part == "validation" and anno["source"] == "shop"
        return [found[part] for part in ("train", "query", "gallery")]
    pair = {"sop": ["Stanford_Online_Products/Ebay_train.txt", "Stanford_Online_Products/Ebay_test.txt"],
            "vehicleid": ["VehicleID_V1.0/train_test_split/train_list.txt",
                          "VehicleID_V1.0/train_test_split/test_list_800.txt"]}[name]
    return [len(lines(root / path, name == "sop")) for path in pair]


FUZZED = {"sop": ("Ebay_*.txt", 1), "inshop": ("list_eval_partition.txt", 2),      # files, lines before rows
          "df2": ("*.json", None), "vehicleid": ("*_list*.txt", 0)}


def fuzz(name, root, trials, seed=0):
    """Loads a replica's lists so many times, each time with one mutated; returns how often they loaded."""
    pattern, head = FUZZED[name]
    MAKE[name](root)
    files, g, loaded = sorted(root.rglob(pattern)), random.Random(seed), 0
    for _ in range(trials):
        path = g.choice(files)
        original = path.read_bytes()
        path.write_bytes(mutated(original, g, head))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                splits = data.load(name, root, allow_partial=True)
            assert [len(part.labels) for part in splits if part] == counted(name, root)
            loaded += 1
        except data.UserError as error:
            assert str(root) in str(error), error
        path.write_bytes(original)
    return loaded


@pytest.mark.parametrize("name", FUZZED)
def test_fuzzed_lists_give_data_or_a_sentence(tmp_path, name):
    assert 20 < fuzz(name, tmp_path, 150) < 150


def torn_checkpoints(root, trials, seed=0):
    """Reads a checkpoint cut off, or with junk in it, so many times; returns how often it was refused."""
    tiny(root / "run", "--epochs", "0")
    good, g, refused = (root / "run" / "checkpoint.pt").read_bytes(), random.Random(seed), 0
    for k in range(trials):
        i = g.randrange(len(good))
        bad = good[:i] if k % 2 else good[:i] + g.randbytes(200) + good[i + 200:]
        (root / "torn.pt").write_bytes(bad)
        try:
            evaluation.rebuild(root / "torn.pt")
            assert k % 2 == 0, "a checkpoint that was cut off was read"
        except data.UserError as error:
            assert "torn.pt: " in str(error) and "\n" not in str(error)
            refused += 1
    return refused


def test_torn_checkpoints_are_refused_with_a_sentence(tmp_path):
    assert torn_checkpoints(tmp_path, 40) >= 20


# Two gloo processes with half the batch each, against one process with the whole batch.

# A small rate: AdamW makes a step of any sign of a rounded gradient near zero, which would add up.
DISTRIBUTED = [*TINY, *"--backbone conv4-nobn --head-epochs 1 --lr 1e-5".split()]


def one_of_two(rank, port, out):
    """What a process does: for each method an epoch, a resumed second one; keeps each step's memory."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for method in METHODS:
        args = [*DISTRIBUTED, "--method", method, "--out", str(out / method)]
        memories, enqueue = [], CrossBatchMemory.enqueue

        def spy(memory, *batch):
            slots = enqueue(memory, *batch)
            memories.append(memory.stored_embeddings.clone())
            return slots
        CrossBatchMemory.enqueue = spy
        train.main([*args, "--epochs", "1"])
        train.main(args)
        CrossBatchMemory.enqueue = enqueue
        torch.save(memories, out / f"{method}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, tmp_path), nprocs=2)
    for method in METHODS:
        expected = train.main([*DISTRIBUTED, "--method", method, "--out", str(tmp_path / "one" / method)])
        got = [json.loads(line) for line in (tmp_path / method / "log.jsonl").read_text().splitlines()]
        assert [r["loss"] for r in got[1:]] == pytest.approx([r["loss"] for r in expected[1:]], rel=1e-4)
        one, two = (torch.load(path / "checkpoint.pt", weights_only=True)
                    for path in (tmp_path / "one" / method, tmp_path / method))
        for name, weight in one["model"].items():
            assert (two["model"][name] - weight).abs().mean() < 1e-6
        for a, b in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values()):
            assert (a["exp_avg"] - b["exp_avg"]).norm() <= 1e-3 * a["exp_avg"].norm()      # of the gradients
        mine, other = (torch.load(tmp_path / f"{method}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert len(mine) == len(other) and all(torch.equal(a, b) for a, b in zip(mine, other))
        assert (method == "none") == (len(mine) == 0)


def script(*command, cwd=HERE, **env):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "2", **env})


def test_a_process_that_dies_ends_the_others(tmp_path):
    (tmp_path / "dies.py").write_text(
        "import os, signal, train\n"
        "train_epoch = train.train_epoch\n"
        "def dies(run, epoch):\n"
        "    if epoch == 2 and train.ranks()[0] == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return train_epoch(run, epoch)\n"
        "train.train_epoch = dies\n"
        "train.main()\n")
    result = script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    tmp_path / "dies.py", *DISTRIBUTED, "--out", tmp_path / "run",
                    OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    assert result.returncode == 1 and "SIGKILL" in result.stderr
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [0, 1]
    assert evaluation.rebuild(tmp_path / "run" / "checkpoint.pt")[1]["epoch"] == 1


def test_scripts_run_on_an_sop_replica(tmp_path):
    make_sop(tmp_path, train=(4, 4, 5, 3), test=(3, 4, 2))
    sop = ["--dataset", "sop", "--root", tmp_path]
    listed = script("data.py", *sop, "--allow-partial", "--check")
    assert listed.returncode == 0
    assert "train         16 images      4 classes, 3 to 5 images each" in listed.stdout
    flags = ("--backbone conv4 --weights none --image-size 32 --dim 8 --batch-size 8 --epochs 1 "
             "--head-epochs 1 --device cpu --out").split()
    trained = script("train.py", *sop, "--allow-partial", *flags, tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-1].startswith("Recall@1: last ")
    evaluated = script("eval.py", tmp_path / "run" / "best.pt", "--device", "cpu")
    assert evaluated.returncode == 0 and json.loads(evaluated.stdout.splitlines()[-1])["dataset"] == "sop"


def test_scripts_fail_with_one_sentence_and_without_a_traceback(tmp_path, capsys):
    make_sop(tmp_path, train=(4, 4, 4, 4), test=(4, 4))
    victim = sorted((tmp_path / "Stanford_Online_Products" / "bicycle_final").iterdir())[1]
    victim.write_bytes(b"broken")
    sop = ["--dataset", "sop", "--root", tmp_path, "--allow-partial"]
    conv4 = ("--backbone conv4 --weights none --head-epochs 0 --batch-size 8 --device cpu --workers 2 "
             "--out").split()
    result = script("train.py", *sop, *conv4, tmp_path / "run")
    assert f"train.py: {victim}: cannot be read" in result.stderr and result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    with pytest.raises(SystemExit, match="1 images of sop in .* cannot be read"):
        data.main([*map(str, sop), "--check"])
    assert f"{victim}: cannot be read as an image" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="none.pt: cannot be read as a checkpoint"):
        evaluation.main([str(tmp_path / "none.pt")])
    with pytest.raises(SystemExit) as error:
        data.main(["--dataset", "sop", "--root", str(tmp_path / "no")])
    assert error.value.code == 2 and "expected under --root" in capsys.readouterr().err   # nothing was begun


def test_contact_sheet_shows_the_worst_queries_first():
    splits, z = data.synthetic(classes=5, max_images=4), None
    z = F.one_hot(splits.query.labels - 5, 5).float()
    z[3] = -z[3]                                    # the fourth query is nearest to nothing of its class
    sheet = np.asarray(evaluation.contact_sheet(splits.query, None, z, None, 2, nearest=3, side=32))
    first = np.asarray(data.open_image(splits.query.images[3], 32, data.everything))
    assert (sheet[24:24 + 32, 6:6 + 32][2:-2, 2:-2] == first[2:-2, 2:-2]).all()
    assert sheet.shape == (24 + 2 * 66, 5 * 44, 3)


def test_plot_groups_runs_by_their_seed_or_says_what_is_missing(tmp_path, monkeypatch, capsys):
    values = [tiny(tmp_path / f"a-s{seed}", "--epochs", "1", "--seed", str(seed))[-1] for seed in (0, 1)]
    runs = [str(tmp_path / "a-s0"), str(tmp_path / "a-s1")]
    shutil.copy(tmp_path / "a-s0" / "log.jsonl", tmp_path / "b-s0.jsonl")           # as kept in results/
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        evaluation.main(["--plot", *runs])
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    out = str(tmp_path / "p.png")
    evaluation.main(["--plot", *runs, str(tmp_path / "b-s0.jsonl"), "--out", out])
    mean, std = (f([100 * r["recall@1"] for r in values]) for f in (np.mean, partial(np.std, ddof=1)))
    told = capsys.readouterr().out
    assert f"a  runs 2  recall@1 {mean:.2f} ± {std:.2f}  map@r" in told
    assert "±" not in told.split("b  runs 1")[1]
    assert Image.open(out).size == (1000, 600)
    evaluation.main(["--plot", *runs, "--against", "batch_size", "memory_ratio", "--out", out])
    assert Image.open(out).size == (1000, 400)
    for words, message in ((["--plot", str(tmp_path)], "cannot be read as the log of a run"),
                           (["--plot", *runs, "--against", "colour"], "the runs have no such setting"),
                           (["best.pt", "--against", "dim"], "2")):        # says so on stderr
        with pytest.raises(SystemExit, match=message):
            evaluation.main([*words, "--out", out])


def test_plot_tells_whether_the_order_of_the_means_changes():
    def group(*curves):
        return [[{"recall@1": v} for v in curve] for curve in curves]
    flat, rising = group([0, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4]), group([0, 0.1, 0.1, 0.2, 0.3, 0.5, 0.6])
    late = group([0, 0.1, 0.3, 0.4, 0.4, 0.45, 0.5], [0, 0.3, 0.5, 0.6, 0.5, 0.45, 0.5])
    told = evaluation.order_of_means({"flat": flat, "late": late})
    assert told == "order of the means of Recall@1 over epochs 4 to 6: does not change"
    told = evaluation.order_of_means({"flat": flat, "late": late, "rising": rising})
    assert told.endswith("changes between flat and rising, late and rising")


# ---------------------------------------------------------------- the README

def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def test_readme_commands_are_accepted_by_the_scripts():
    parsers = {"train.py": train.parse_args, "eval.py": evaluation.parse_args, "data.py": data.parse_args}
    lines = "\n".join(readme_blocks("bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(python (?:train|eval|data)\.py [^`]*)`", (HERE / "README.md").read_text())
    seen = set()
    for command in (part.strip() for line in lines for part in re.split("&&", line)):
        words = shlex.split(command, comments=True)
        if words[:1] == ["torchrun"]:
            words = ["python", *words[2:]]
        if words[:1] == ["python"] and words[1] in parsers:
            if words[2:] != ["--help"]:
                parsers[words[1]](words[2:])
            seen.add(words[1])
        elif words:
            assert words[0] in ("git", "cd", "pip", "python", "pytest", "tar"), command
    assert seen == set(parsers)


def test_readme_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "runs" / "synthetic-axbn-ms-b16-s0", "--epochs", "0")
    for k in range(9):
        jpeg(tmp_path / "photos" / f"{k}.jpg", k)
    exec(readme_blocks("python")[2], {})


def test_paste_acbn_alone_halves_the_distance_of_stored_rows(tmp_path):
    loss, queue, _ = readme_blocks("python")
    scripts = [loss, *(loss.replace('"xbn"', f'"{method}"') for method in ("axbn", "xbm")),
               queue, re.sub(r".*match_moments\(.*\n", "", queue)]
    shutil.copy(HERE / "acbn.py", tmp_path)
    for k, source in enumerate(scripts):
        (tmp_path / f"{k}.py").write_text(source)
    run_all = "import sys, runpy; sys.path.append('.'); [runpy.run_path(f'{k}.py') for k in range(5)]"
    done = subprocess.run([sys.executable, "-I", "-c", run_all],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    xbn, axbn, xbm, matched, plain = map(float, re.findall(r"\d\.\d\d", done.stdout))
    assert xbn <= xbm / 2 and axbn <= xbm / 2 and matched <= plain / 2
    text = (HERE / "README.md").read_text().replace("\n", " ")
    assert f"prints {xbn:.2f}, and {xbm:.2f}" in text and f": {matched:.2f} here, and {plain:.2f}" in text


# ---------------------------------------------------------------- python test_acbn.py: too long for a test

class Variant(CrossBatchLoss):
    """An adapting method whose mean and deviation each have a rule of their own. A rule is a constant gain;
    "off", the memory keeps its own; "measured", a Kalman filter whose noises are found from the data; for
    the deviation also "classes", the batch's, corrected for the few classes that it consists of.
    """

    def __init__(self, rules, *args):
        super().__init__(*args)
        self.rules = rules                                      # (of the mean, of the deviation)
        self.register_buffer("filters", torch.tensor([[1.0, 0.0, 0.0]] * 2))    # (2, 3) p, S, r of each

    def forward(self, z, y, ids=None):
        self.y = y
        return super().forward(z, y, ids)

    def adapt(self, z):
        moments, noises, corrected = moments_of_classes(z, self.y)
        if len(self.memory) > 1 and not self.memory.known:
            self.memory.know(*acbn.moments(self.memory.embeddings))
        target = []
        for rule, k, r, own in zip(self.rules, (0, 1), noises, (self.memory.mean, self.memory.std)):
            estimate, measured = (self.mean, self.std)[k], corrected if rule == "classes" else moments[k]
            if self.filter_step == 0:
                estimate.copy_(measured)
            if rule == "measured":
                gain = measured_gain(self.filters[k], (measured - estimate).square().mean(), r)
            else:
                gain = {"off": 0.0, "classes": 1.0}.get(rule, rule)
            estimate.lerp_(measured, gain)
            target.append(own.clone() if rule == "off" else estimate)
            self.gain = gain if k == 0 else self.gain
        self.filter_step += 1
        self.memory.match(*target)


def moments_of_classes(z, y):
    """Of a batch z (B, D) of P classes y (B,) drawn at random, since one class's images hang together:
    (mean, std), the variances of their errors as estimates of the data set's by the jackknife over classes,
    averaged over D, and the std that has no bias from P being small. ((D,), (D,)), ((), ()), (D,).
    """
    classes = y.unique()                                                                        # (P,)
    without = [acbn.moments(z[y != c]) for c in classes]
    noises = [((len(classes) - 1) ** 2 / len(classes) * torch.stack(m).var(0)).mean() for m in zip(*without)]
    centres = torch.stack([z[y == c].mean(0) for c in classes])                                 # (P, D)
    within = torch.stack([z[y == c].var(0, correction=0) for c in classes]).mean(0)             # (D,)
    return acbn.moments(z), noises, (within + centres.var(0)).sqrt()


def measured_gain(state, innovation, r, rate=0.02):
    """Innovation matching (Mehra 1972): S, the running mean of squared innovations, should be p + q + r. So
    q = max(S - r - p, 0); then Algorithm 1, lines 1-3. state (3,): p, S, r; written."""
    p, S, noise = state.tolist()
    S, noise = (S + rate * (innovation - S), noise + rate * (r - noise)) if noise else (innovation, r)
    S, noise = float(S), float(noise)
    p = p + max(S - noise - p, 0)
    K = p / (p + noise)
    state.copy_(torch.tensor([(1 - K) * p, S, noise]))
    return K


def variant(words):
    """`train.py` with the rules of Variant in the place of its method: variant 1 0.2 --batch-size 16 ..."""
    def rule(*names):
        def rule(text):
            if text not in names and not 0 <= float(text) <= 1:
                raise argparse.ArgumentTypeError(f"must be a gain from 0 to 1 or one of {names}, got {text}")
            return text if text in names else float(text)
        return rule
    parser = argparse.ArgumentParser("test_acbn.py variant", description=Variant.__doc__, allow_abbrev=False)
    parser.add_argument("mean", type=rule("off", "measured"))
    parser.add_argument("std", type=rule("off", "measured", "classes"))
    args, flags = parser.parse_known_args(words)
    acbn.CrossBatchLoss = partial(Variant, (args.mean, args.std))
    train.main(["--method", "xbn", *flags])


def rehearsal(root):
    """Writes 120,053 drawn JPEGs of 32 x 32 in the exact layout and counts of Stanford Online Products."""
    base = Path(root) / "Stanford_Online_Products"
    kinds = "bicycle cabinet chair coffee_maker fan kettle lamp mug sofa stapler table toaster".split()
    for kind in kinds:
        (base / f"{kind}_final").mkdir(parents=True, exist_ok=True)
    rng, image_id, class_id = np.random.default_rng(0), 0, 0
    for name, images, classes in (("Ebay_train.txt", 59551, 11318), ("Ebay_test.txt", 60502, 11316)):
        lines = ["image_id class_id super_class_id path"]
        for c in range(classes):
            class_id += 1
            look = rng.integers(0, 256, (4, 4, 3))
            for k in range(images // classes + (c < images % classes)):
                image_id += 1
                path = f"{kinds[class_id % 12]}_final/{110000000000 + class_id}_{k}.JPG"
                pixels = np.kron(np.roll(look, rng.integers(0, 2, 2), (0, 1)), np.ones((8, 8, 1)))
                pixels = (pixels * rng.uniform(0.6, 1) + rng.normal(0, 12, (32, 32, 3))).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(base / path, quality=80)
                lines.append(f"{image_id} {class_id} {class_id % 12 + 1} {path}")
        (base / name).write_text("\n".join(lines) + "\n")


def race(*functions, runs=15):
    """[(median seconds, median of the ratios to the first)] of functions that are run in turns, so that a
    machine's moods hit all alike."""
    times = []
    for _ in range(runs + 1):
        times.append([])
        for function in functions:
            start = time.perf_counter()
            function()
            times[-1].append(time.perf_counter() - start)
    times = torch.tensor(times[1:], dtype=torch.float64)                        # (runs, functions)
    return list(zip(times.median(0).values.tolist(), (times / times[:, :1]).median(0).values.tolist()))


def table(*lines):
    lines = [lines[0], ("---",) * len(lines[0]), *lines[1:]]
    for line in lines:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in line) + " |")
    print(flush=True)


def bench_step(B=64, M=30000, D=512):
    """One loss step, forward and backward, beside the matrix products that it cannot do without."""
    z, stored = torch.randn(B, D), acbn.normalize(torch.randn(M, D))
    stored_y, weight, steps = torch.randint(M // 5, (M,)), torch.randn(B, M), {}

    def product():
        (z.clone().requires_grad_() @ stored.T).backward(weight)

    def step(criterion):        # other labels each time, or the memory fills with the positives of one batch
        y = torch.randint(M // 5, (B // 4,)).repeat_interleave(4)
        criterion(z.clone().requires_grad_(), y).backward()
    for method in ("xbm", "xbn", "axbn"):
        criterion = CrossBatchLoss(D, M, method)
        criterion.memory.enqueue(stored, stored_y)
        steps[f"CrossBatchLoss, {method}"] = partial(step, criterion)
    try:
        import pytorch_metric_learning
        from pytorch_metric_learning import losses, miners
        peer = losses.CrossBatchMemory(losses.MultiSimilarityLoss(2, 50, 0.5), D, M,
                                       miners.MultiSimilarityMiner(0.1))
        peer.embedding_memory, peer.label_memory = stored.clone(), stored_y.clone()
        peer.has_been_filled = True
        steps[f"pytorch-metric-learning {pytorch_metric_learning.__version__}, xbm"] = partial(step, peer)
    except ImportError:
        print("pytorch-metric-learning: not installed")
    steps = {"product, forward and backward": product, **steps}
    table(("step", "ms", "bytes held an entry of (B, M)", "x product"),
          *((name, s * 1e3, peak_bytes(steps[name]) / B / M, x)
            for name, (s, x) in zip(steps, race(*steps.values()))))
    print(f"The product reads {8 * M * D / 1e6:.0f} MB of memory, adapting reads and writes as many.\n")


def bench_recall(N=60502, D=512):
    """Recall@K and MAP@R of as many queries as SOP has, beside the chunked product alone."""
    import resource
    z, y = acbn.normalize(torch.randn(N, D)), torch.randint(N * 11316 // 60502, (N,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss                 # KiB
    evaluation.positive_ranks(z, y)
    held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20
    out = torch.empty(2 ** 26 // N, N)

    def product():
        for part in z.split(len(out)):
            torch.mm(part, z.T, out=out[:len(part)])
    searches = {"chunked product": product,
                "recall_at_k": lambda: evaluation.recall_at_k(z, y),
                "positive_ranks: Recall@K and MAP@R": lambda: evaluation.positive_ranks(z, y)}
    try:
        import faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(D)
        index.add(z.numpy())
        searches[f"faiss {faiss.__version__}, flat index, K = 1000"] = lambda: index.search(z.numpy(), 1001)
    except ImportError:
        print("faiss: not installed")
    table(("search", "s", "x product"),
          *((name, s, x) for name, (s, x) in zip(searches, race(*searches.values(), runs=2))))
    print(f"positive_ranks held {held:.2f} GiB beyond the features.\n")


def make_jpegs(root, n, side):
    """n JPEGs of side x side, four a class, as --dataset folder takes them."""
    wave = np.add.outer(np.sin(np.arange(side) / 40), np.cos(np.arange(side) / 30)) * 50 + 128
    for k in range(n):
        noise = np.random.default_rng(k).normal(0, 12, (side, side, 3))
        path = Path(root) / f"{k // 4:05d}" / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((wave[..., None] + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def seconds_a_step(flags, at_hand=False, epochs=3):
    """Of train.py's own loop, the loader warm, the memory full; at_hand: the batches are there already."""
    run = train.build(train.parse_args(flags.split()))
    run["probe"].every, memory, seconds = 10 ** 9, run["criterion"].memory, []
    device = memory.mean.device
    memory.enqueue(acbn.normalize(torch.randn(memory.size, len(memory.mean))).to(device),
                   torch.arange(memory.size, device=device) // 5)
    if at_hand:
        run["batches"] = [[t.to(device) for t in batch] for batch in run["batches"]]
    for epoch in range(epochs + 1):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            train.train_epoch(run, epoch)
        seconds.append((time.perf_counter() - start) / len(run["batches"]))
    return sorted(seconds[1:])[epochs // 2]


def bench_loader(n=48, side=1000):
    """Decoding at a reduced scale, on one core; train.py's loop beside the same steps on data at hand."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as root:
        make_jpegs(root, 2 * n, side)
        part, lines = data.load("folder", root).train, []
        torch.set_num_threads(1)
        for training in (True, False):
            images = data.Images(part, 224, "paper", training)
            shape = (v2.RandomResizedCrop(224) if training else
                     v2.Compose([v2.Resize(256), v2.CenterCrop(224)]))
            (whole, _), (reduced, _) = race(
                lambda: [images.transform(shape(Image.open(p).convert("RGB"))) for p in part.images[:n]],
                lambda: [images[i] for i in range(n)], runs=3)
            name = "training" if training else "evaluation"
            lines.append((name, n / whole, n / reduced, whole / reduced))
        table((f"{side} x {side} JPEG", "whole, images/s", "reduced, images/s", "x"), *lines)
        torch.set_num_threads(threads)
        lines = []
        for flags in ("--classes 300 --warmup-steps 0",
                      "--classes 150 --warmup-steps 0 --backbone resnet18 --batch-size 32",
                      f"--dataset folder --root {root} --weights none --batch-size 16 --memory-ratio 1"):
            hand, loop = (seconds_a_step(f"{flags} --device cpu", at_hand) for at_hand in (True, False))
            lines.append((f"train.py {flags}".replace(root, "DIR"), hand * 1e3, loop * 1e3, loop / hand))
        table(("loop", "data at hand, ms a step", "train.py, ms a step", "x"), *lines)


def bench_gpu(B=64, M=60000):
    """The memory's share of a ResNet-50 step, the loader's, and the cost of --deterministic."""
    if not torch.cuda.is_available():
        return print("bench gpu: not run: no CUDA")
    lines, base = [], None
    resnet = f"--weights none --head-epochs 0 --batch-size {B} --amp bf16 --device cuda"
    with tempfile.TemporaryDirectory() as root:
        for side in (256, 1000):
            make_jpegs(Path(root), 4096, side)
            folder = f"--dataset folder --root {root} {resnet} --memory-ratio {M / 2048}"
            for name, flags, at_hand in (("none, data at hand", "--method none", True),
                                         ("axbn, data at hand", "--method axbn", True),
                                         ("axbn, data at hand, --deterministic", "--deterministic", True),
                                         (f"axbn, JPEGs of {side} x {side}", "--method axbn", False)):
                if not at_hand or side == 256:
                    torch.cuda.reset_peak_memory_stats()
                    s = seconds_a_step(f"{folder} {flags}", at_hand)
                    base, gib = base or s, torch.cuda.max_memory_allocated() / 2 ** 30
                    lines.append((name, s * 1e3, B / s, gib, s / base))
    table(("ResNet-50, 224 px, bf16", "ms a step", "images/s", "peak GiB", "x none"), *lines)
    print(torch.cuda.get_device_name(), os.cpu_count(), "cores")


def faults(kills=20):
    """The campaigns that are too long for the tests; writes results/reliability.md as it goes."""
    g, root = random.Random(0), Path(tempfile.mkdtemp())
    lines = ["# Reliability", "", f"`python test_acbn.py faults --kills {kills}`, torch "
             f"{torch.__version__}; a row stops at its first failure.", "",
             "| fault | tried | outcome |", "|---|---|---|"]

    def row(fault, tried, campaign):
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                outcome = campaign()
        except Exception as error:
            outcome = f"**failed**: {type(error).__name__}: {error}"
        lines.append(f"| {fault} | {tried} | {outcome} |")
        print(lines[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
        (HERE / "results" / "reliability.md").write_text("\n".join(lines) + "\n")

    def as_never_killed(name):
        tiny(root / name, *KILLED)
        if not (root / "whole").exists():
            tiny(root / "whole", *KILLED)
        a, b = (evaluation.load_file(root / n / "checkpoint.pt") for n in (name, "whole"))
        assert same(a, b) and whole_epochs(root / name) == len(b["records"])
        return "every file whole or the previous one; in the end the same bits as a run never killed"

    def killed_writing():
        for _ in range(kills):
            if killed_while_writing(root / "writing", g.randrange(1, 13)) == 0:
                shutil.rmtree(root / "writing")             # it came to its end: from the start
        return as_never_killed("writing")

    def killed_anywhere():
        for _ in range(kills):
            code, _, _ = interrupted(root / "anywhere", signal.SIGKILL, g.uniform(0, 1.5), KILLED)
            if code != -9:
                shutil.rmtree(root / "anywhere")
            whole_epochs(root / "anywhere")
        return as_never_killed("anywhere")

    def told_to_end():
        worst = 0
        for k in range(kills):
            number = (signal.SIGTERM, signal.SIGINT)[k % 2]
            code, seconds, words = interrupted(root / "told", number, g.uniform(0, 2))
            assert code == 130 and words.splitlines()[-1].startswith("train.py: stopped; "), words
            assert words.count("stopped") == 1 and "Trace" not in words, words
            whole_epochs(root / "told")
            worst = max(worst, seconds)
        return f"a sentence and exit code 130, after {worst:.1f} s at most"

    def fuzzed(name):
        loaded = fuzz(name, root / name, 2500)
        return f"{loaded} loaded, with the right counts; {2500 - loaded} times a sentence"

    row("SIGKILL while a file is written: half of it, before and after it is renamed", kills, killed_writing)
    row("SIGKILL at a random moment of training", kills, killed_anywhere)
    row("SIGTERM or Ctrl-C at a random moment, two workers", kills, told_to_end)
    row("checkpoint cut off, or 200 bytes of junk in it", 1000,
        lambda: f"a sentence for all 500 cut off and {torn_checkpoints(root, 1000) - 500} of 500 with junk")
    for name in FUZZED:
        row(f"mutated lists of {name}", 2500, partial(fuzzed, name))
    shutil.rmtree(root)
    return any("**failed**" in line for line in lines)


if __name__ == "__main__":
    benches = {"step": bench_step, "recall": bench_recall, "loader": bench_loader, "gpu": bench_gpu}
    words = sys.argv[1:]
    if words[:1] == ["bench"] and len(words) < 3 and set(words[1:]) <= set(benches):
        torch.manual_seed(0)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        for name in words[1:] or benches:
            benches[name]()
    elif words[:1] == ["faults"] and (len(words) == 1 or len(words) == 3 and words[1] == "--kills"):
        sys.exit(faults(*map(int, words[2:])))
    elif words[:1] == ["rehearsal"] and len(words) == 2:
        rehearsal(words[1])
    elif words == ["twin"]:
        from pytorch_metric_learning import __version__
        print(f"pytorch-metric-learning {__version__}, torch {torch.__version__}, 200 steps in float64")
        table(("method", "loss", "greatest difference"),
              *((*pair, float(twin_differences(*pair)[0].max())) for pair in TWINS))
    elif words[:1] == ["variant"]:
        variant(words[1:])
    else:
        sys.exit("usage: python test_acbn.py bench [step|recall|loader|gpu]   prints tables\n"
                 "       python test_acbn.py faults [--kills 20]           writes results/reliability.md\n"
                 "       python test_acbn.py rehearsal DIR                 writes a stand-in for SOP\n"
                 "       python test_acbn.py twin                          beside pytorch-metric-learning\n"
                 "       python test_acbn.py variant MEAN STD FLAGS        train.py, a rule for each moment")
