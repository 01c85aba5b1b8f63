# SPDX-License-Identifier: MIT
"""Tests: pytest -q test_acbn.py. Twins: float64 numpy loops, a deque, brute force, plain autograd.

In the order of the files, and in each from the equations to what is built of them.
"""
import argparse
import collections
import contextlib
import copy
import doctest
import errno
import functools
import hashlib
import inspect
import json
import math
import ntpath
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

import acbn
import data
import eval as evaluation
import train
from acbn import METHODS, CrossBatchLoss, CrossBatchMemory

HERE = Path(__file__).parent
LOSSES = (acbn.multi_similarity_loss, acbn.supcon_loss, acbn.mined_supcon_loss,
          acbn.contrastive_loss)
ADAPTING = ("xbn", "ema", "axbn")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
            torch.uint32, torch.uint64)
torch.set_num_threads(1)


def rows(n, d, seed=0, dtype=torch.float64):
    """n random unit rows (n, d)."""
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed),
                                   dtype=dtype), dim=1)


def case(B=12, N=40, classes=5, seed=0, dtype=torch.float64):
    """Similarities (B, N) of anchors to references near their class centres, and both masks, which
    leave out a tenth of the pairs.
    """
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, 6, generator=g, dtype=dtype)
    y, ref_y = (torch.randint(classes, (n,), generator=g) for n in (B, N))
    z, ref = (acbn.normalize(centre[t] + torch.randn(len(t), 6, generator=g, dtype=dtype))
              for t in (y, ref_y))
    pairs = torch.rand(B, N, generator=g) < 0.9
    return (z @ ref.T, *(mask & pairs for mask in acbn.pair_masks(y, ref_y)))


def drifting(steps, B=8, dim=5, seed=0, dtype=torch.float32, device="cpu"):
    """Batches whose mean and deviation drift, with labels of 4 classes."""
    g = torch.Generator().manual_seed(seed)
    for k in range(steps):
        z = (torch.randn(B, dim, generator=g) * (1 + 0.2 * k) + 0.1 * k).to(device, dtype)
        yield z.requires_grad_(), torch.randint(4, (B,), generator=g).to(device)


def run(criterion, steps=12, **kwargs):
    """Losses and anchors' gradients of some steps."""
    out = []
    for z, y in drifting(steps, **kwargs):
        loss = criterion(z, y)
        loss.backward()
        out.append((loss.detach(), z.grad))
    return out


def oldest_first(memory, stored=None):
    """What is stored, by default the embeddings, from the oldest row to the newest."""
    stored = memory.embeddings if stored is None else stored
    return stored.roll(-memory.written if len(memory) == memory.size else 0, 0)


def assert_same_state(a, b, tolerance=0.0):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


class Recorder:
    """A loss that keeps what it was called with."""

    def __call__(self, sim, positive, negative):
        self.sim, self.positive, self.negative = sim.detach(), positive, negative
        return sim.sum() * 0


class Tempered(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.log_t = nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("constant", torch.zeros(3), persistent=False)      # in no state_dict

    def forward(self, sim, positive, negative):
        return acbn.supcon_loss(sim, positive, negative, self.log_t.exp())


class Called(Exception):
    pass


NEEDS = {"moments": ADAPTING, "match_moments": ADAPTING, "kalman_gain": ("axbn",),
         "pair_masks": METHODS, "normalize": METHODS, "multi_similarity_pairs": METHODS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NEEDS)
def test_functions_that_are_read_are_those_that_train(name, method, monkeypatch):
    def raising(*_, **__):
        raise Called
    monkeypatch.setattr(acbn, name, raising)
    with pytest.raises(Called) if method in NEEDS[name] else contextlib.nullcontext():
        run(CrossBatchLoss(5, 20, method), 2)


# ------------------------------------------------- moments, Eqs. 6 to 12 and 23

@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_eq6_moments_and_matching_equal_a_float64_loop(scale):
    z, target = (rows(50, 7) * scale).numpy(), (rows(9, 7, seed=1) * scale).numpy()
    expected = np.empty_like(z)
    for d in range(7):
        mean, t_mean = sum(z[:, d]) / 50, sum(target[:, d]) / 9
        std = math.sqrt(sum((v - mean) ** 2 for v in z[:, d]) / 49)
        t_std = math.sqrt(sum((v - t_mean) ** 2 for v in target[:, d]) / 8)
        for i in range(50):
            expected[i, d] = (z[i, d] - mean) / std * t_std + t_mean
    got = acbn.match_moments(torch.tensor(z), *acbn.moments(torch.tensor(target)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * scale)


def test_eq6_is_batch_norm_of_the_memory():
    memory, (mean, std) = rows(40, 4), acbn.moments(rows(8, 4, seed=1))
    weight = std * math.sqrt(39 / 40)               # batch norm divides by the biased deviation
    normed = F.batch_norm(memory, None, None, weight, mean, training=True, eps=1e-15)
    torch.testing.assert_close(acbn.match_moments(memory, mean, std), normed, rtol=0, atol=1e-12)


def test_eq12_recovers_a_diagonal_affine_drift():
    z = rows(100, 6)
    A, b = torch.rand(6, dtype=torch.float64) + 0.5, torch.randn(6, dtype=torch.float64)
    drifted = A * z + b                                                     # z' = A z + b, Eq. 7
    torch.testing.assert_close(acbn.match_moments(z, *acbn.moments(drifted)), drifted)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.7, 1e6])
def test_eq6_constant_dimension_has_no_deviation_and_a_small_one_is_kept(constant):
    z = rows(30000, 4, dtype=torch.float32)
    z[:, 1], z[:, 2] = constant, constant * (1 + 1e-4 * z[:, 0].sign()) + 1e-9 * z[:, 0].sign()
    mean, std = acbn.moments(z)
    assert std[1] == 0
    torch.testing.assert_close(std.double(), z.double().std(0), rtol=5e-3, atol=1e-12)
    torch.testing.assert_close(mean.double(), z.double().mean(0), rtol=1e-6, atol=1e-8)
    out = acbn.match_moments(z, torch.full((4,), 0.25), torch.ones(4))              # shifted only
    torch.testing.assert_close(out[:, 1], torch.full((30000,), 0.25), rtol=0,
                               atol=1e-6 * max(1, abs(constant)))
    kept = acbn.match_moments(z, torch.full((4,), 0.25), torch.tensor([1.0, 1, 0, 1]))  # the same
    torch.testing.assert_close(kept[:, 2].double().std(), z[:, 2].double().std(),
                               rtol=0.1, atol=1e-7)


def test_eq6_a_million_equal_rows_have_no_deviation():
    row = torch.rand(8, generator=torch.Generator().manual_seed(0)) + 1
    assert not acbn.moments(row.expand(2 ** 20, 8).contiguous())[1].any()


# ------------------------------------------------- the filter, Eqs. 18-22 and Algorithm 1

@pytest.mark.parametrize("q, r", [(1.0, 0.01 / 64), (1e-3, 0.03), (0.0, 0.1), (0.5, 0.0)])
def test_alg1_lines_1_to_3_reach_the_fixed_point_of_the_filter(q, r):
    p = 1.0
    for _ in range(500):
        p, K = acbn.kalman_gain(p, q, r)
    if q:
        fixed = (math.sqrt(q * q + 4 * q * r) - q) / 2  # the root of p = (p + q) r / (p + q + r)
        assert p == pytest.approx(fixed, rel=1e-9, abs=1e-12)
        assert K == pytest.approx((fixed + q) / (fixed + q + r), rel=1e-9)
    else:
        assert 1 / p == pytest.approx(1 + 500 / r, rel=1e-9)    # a plain average: precisions add up


def test_alg1_published_values_give_a_gain_above_0_999():
    for B, least in ((16, 0.999), (64, 0.9998)):
        criterion = CrossBatchLoss(5, 4 * B, "axbn", gain_interval=1)
        for z, y in drifting(30, B):
            criterion(z, y)
            assert 1 > criterion.K > least


def axbn_twin(batches, M, q, r, interval):
    """Algorithm 1 row by row in float64: the last stored rows, oldest first, and the filter."""
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
    return np.array(queue), mu, sigma, p, K


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_alg1_fifty_steps_equal_a_row_by_row_twin(dtype, tolerance):
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(16, 6)) + 0.02 * k for k in range(50)]
    criterion = CrossBatchLoss(6, 100, "axbn", process_noise=1e-3, measurement_noise=0.5,
                               gain_interval=3)
    criterion.to(dtype)
    for batch in batches:
        criterion(torch.tensor(batch, dtype=dtype), torch.arange(16) // 4)
    got = oldest_first(criterion.memory), criterion.mean, criterion.std, criterion.p, criterion.K
    for ours, twin in zip(got, axbn_twin(batches, 100, 1e-3, 0.5, 3)):
        np.testing.assert_allclose(ours, twin, rtol=0, atol=tolerance)
    assert 0.05 < criterion.K < 0.5             # a filter that does nothing would fail above


def test_alg1_constant_gain_is_an_exponential_average():         # App. C
    criterion, average = CrossBatchLoss(5, 20, "ema", momentum=0.7).double(), None
    for z, y in drifting(20, dtype=torch.float64):
        criterion(z, y)
        new = torch.stack(acbn.moments(acbn.normalize(z.detach())))
        average = new if average is None else 0.7 * average + 0.3 * new
    torch.testing.assert_close(torch.stack([criterion.mean, criterion.std]), average,
                               rtol=0, atol=1e-14)


@pytest.mark.parametrize("other", [dict(method="axbn", measurement_noise=0.0),
                                   dict(method="ema", momentum=0.0)])
def test_eq23_without_measurement_noise_or_momentum_is_xbn_to_the_last_bit(other):
    xbn, same = CrossBatchLoss(5, 30, "xbn"), CrossBatchLoss(5, 30, gain_interval=1, **other)
    for (a, grad_a), (b, grad_b) in zip(run(xbn), run(same)):
        assert torch.equal(a, b) and torch.equal(grad_a, grad_b)
    assert torch.equal(xbn.memory.embeddings, same.memory.embeddings)


# ------------------------------------------------- the losses

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
            log_sum = math.log(sum(math.exp(v) for v in s[p | n]))
            losses.append(-sum(v - log_sum for v in s[p]) / p.sum())
    losses = [v for v in losses if v > 0]
    return sum(losses) / len(losses) if losses and positive.any() and negative.any() else 0.0


def mined_supcon_twin(sim, positive, negative, pos_margin=0.2, neg_margin=0.8, temperature=0.1):
    distance = np.sqrt(2 - 2 * sim)
    positive, negative = positive & (distance > pos_margin), negative & (distance < neg_margin)
    return supcon_twin(sim, positive, negative, temperature)


def contrastive_twin(sim, positive, negative, margin=0.5):
    return sum(sum(1 - v for v in s[p]) + sum(v for v in s[n] if v > margin)
               for s, p, n in zip(sim, positive, negative)) / len(sim)


@pytest.mark.parametrize("loss, twin, factors", [
    (acbn.multi_similarity_loss, ms_twin, dict(alpha=3.0, beta=20.0, base=0.8, margin=0.3)),
    (acbn.supcon_loss, supcon_twin, dict(temperature=0.4)),
    (acbn.mined_supcon_loss, mined_supcon_twin,
     dict(pos_margin=0.5, neg_margin=1.1, temperature=0.4)),
    (acbn.contrastive_loss, contrastive_twin, dict(margin=0.2))])
def test_losses_equal_float64_loops_and_every_factor_is_an_argument(loss, twin, factors):
    assert list(inspect.signature(loss).parameters) == ["sim", "positive", "negative", *factors]
    for seed in range(6):
        sim, positive, negative = case(seed=seed, classes=3 + 4 * seed)
        for kwargs in ({}, factors):
            expected = twin(sim.numpy(), positive.numpy(), negative.numpy(), **kwargs)
            assert loss(sim, positive, negative, **kwargs).item() == pytest.approx(
                expected, abs=1e-12)


def test_losses_of_two_points_have_closed_forms():
    sim, own = torch.tensor([[0.7, 0.65]], dtype=torch.float64), torch.tensor([[True, False]])
    assert acbn.contrastive_loss(sim, own, ~own).item() == pytest.approx(0.3 + 0.65)
    assert acbn.supcon_loss(sim, own, ~own).item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    expected = math.log(1 + math.exp(-0.4)) / 2 + math.log(1 + math.exp(7.5)) / 50
    assert acbn.multi_similarity_loss(sim, own, ~own).item() == pytest.approx(expected)
    easy = sim - torch.tensor([0, 0.3])                         # no pair is hard
    assert acbn.multi_similarity_loss(easy, own, ~own).item() == 0


def test_losses_pair_margin_is_a_euclidean_distance():
    sim = torch.tensor([[0.97, 0.99, 0.67, 0.69]])
    positive, negative = torch.ones(2, 1, 4, dtype=torch.bool)
    p, n = acbn.pair_margin(sim, positive, negative)
    assert p.tolist() == [[True, False, True, True]] and n.tolist() == [[True, True, False, True]]
    p, n = acbn.pair_margin(sim, ~positive, ~negative)
    assert not p.any() and not n.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_have_the_right_first_and_second_derivatives(loss):
    sim, positive, negative = case(B=5, N=9, classes=3)
    def of_sim(s):
        return loss(s, positive, negative)
    assert torch.autograd.gradcheck(of_sim, sim.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(of_sim, sim.clone().requires_grad_())


@pytest.mark.parametrize("missing", ["positives", "negatives", "both", "of one anchor"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_without_pairs_are_a_zero_with_a_finite_gradient(loss, missing):
    sim, positive, negative = case(dtype=torch.float32)
    sim.requires_grad_()
    if missing in ("positives", "both"):
        positive = positive & False
    if missing in ("negatives", "both"):
        negative = negative & False
    if missing == "of one anchor":
        positive[0] = negative[0] = False
    with torch.autograd.set_detect_anomaly(True):             # no NaN on the way back either
        value = loss(sim, positive, negative)
        (grad,) = torch.autograd.grad(value, sim)
    assert torch.isfinite(grad).all() and torch.isfinite(value)
    if missing == "of one anchor":
        assert (grad[0] == 0).all() and value > 0
    elif missing == "both" or loss is not acbn.contrastive_loss:
        assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_do_not_overflow(dtype):
    sim, positive, negative = case(dtype=torch.float32)
    sim = sim.masked_fill(positive, 1.0).to(dtype).requires_grad_()  # exp(25) is inf in float16
    for loss, factors in zip(LOSSES,
                             (dict(alpha=300.0, beta=900.0), dict(temperature=0.01), {}, {})):
        for kwargs in ({}, factors):
            value = loss(sim, positive, negative, **kwargs)
            assert value.isfinite() and torch.autograd.grad(value, sim)[0].isfinite().all()


SIM = case(dtype=torch.float32)
COMPILED = {"moments": (SIM[0],), "match_moments": (SIM[0], *acbn.moments(SIM[0] + 1)),
            "kalman_gain": (torch.ones(()), 1.0, 0.01), "normalize": (SIM[0],),
            "pair_masks": (torch.arange(6) // 2, torch.arange(9) // 2, torch.arange(6)),
            **{name: SIM
               for name in ("multi_similarity_pairs", "pair_margin", "multi_similarity_loss",
                            "supcon_loss", "mined_supcon_loss", "contrastive_loss")}}


@pytest.mark.parametrize("name", COMPILED)
def test_pure_functions_compile_as_one_graph(name):
    function = getattr(acbn, name)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*COMPILED[name]), function(*COMPILED[name]))


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_normalize_gives_unit_rows_and_keeps_a_row_of_zeros(scale):
    z = rows(5, 4, dtype=torch.float32)
    torch.testing.assert_close(acbn.normalize(z * scale), z)
    zeros = torch.zeros(2, 3, requires_grad=True)
    assert (acbn.normalize(zeros) == 0).all()
    acbn.normalize(zeros).sum().backward()
    assert torch.isfinite(zeros.grad).all()
    assert ([acbn.normalize(z.to(t)).dtype for t in (torch.float16, torch.bfloat16, torch.float64)]
            == [torch.float32, torch.float32, torch.float64])


def test_pair_masks_equal_loops():
    y, other = torch.tensor([3, 3, -1, 0]), torch.tensor([0, 3, 3, 2 ** 40, -1, 3])
    positive, negative = acbn.pair_masks(y.int(), other, own=torch.tensor([4, 0]))
    for i, j in np.ndindex(4, 6):
        same = bool(y[i] == other[j])
        assert positive[i, j] == (same and (i, j) not in ((2, 4), (3, 0)))
        assert negative[i, j] == (not same)


# ------------------------------------------------- the memory

def test_memory_label_zero_in_the_last_slot_does_not_empty_it():
    memory = CrossBatchMemory(2, 4)
    memory.enqueue(torch.ones(4, 2), torch.tensor([-5, 2 ** 40, 7, 0]))
    assert len(memory) == 4 and memory.labels.tolist() == [-5, 2 ** 40, 7, 0]


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_memory_is_a_fifo_equal_to_a_deque_under_random_batches(size):
    rng = np.random.default_rng(0)
    memory, twin, n = CrossBatchMemory(1, size), collections.deque(maxlen=size), 0
    for B in rng.integers(1, 2 * size + 3, 60).tolist() + [1, size, size + 1, 1]:
        new = torch.arange(n, n + B)
        n += B
        slots = memory.enqueue(new[:, None].float(), new)
        twin.extend(new.tolist())
        assert len(memory) == len(twin) and memory.written == n
        for stored in (memory.embeddings[:, 0], memory.labels):
            assert oldest_first(memory, stored).tolist() == list(twin)
        assert memory.all_labels[slots].tolist() == new[-size:].tolist()
    memory.reset()
    assert len(memory) == 0 and memory.embeddings.shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 3, 4, 7, 11])
def test_memory_excludes_the_anchors_own_slot_and_no_copy(B, dtype):
    seen, M = Recorder(), 7
    criterion = CrossBatchLoss(4, M, "xbm", seen)
    z, y = torch.ones(B, 4, dtype=dtype), torch.zeros(B, dtype=torch.int64)    # all rows are copies
    for k in range(5):
        criterion(z, y)
        n, kept, end = len(criterion.memory), min(B, M), B * (k + 1)
        missing = ~seen.positive
        assert n == min(M, B * (k + 1)) == seen.sim.shape[1] and missing.sum() == kept
        assert not seen.negative.any()
        slots = [(end - kept + i) % M for i in range(kept)]
        assert [missing[B - kept + i].nonzero().item() for i in range(kept)] == slots


def test_memory_stale_copies_of_an_image_count_as_positives():       # reading 8
    seen = Recorder()
    criterion = CrossBatchLoss(4, 10, "xbm", seen)
    for _ in range(2):
        criterion(rows(2, 4), torch.tensor([0, 1]))
    assert seen.positive.tolist() == [[True, False, False, False], [False, True, False, False]]


def test_memory_is_adapted_then_enqueued_then_compared():            # readings 3 and 7
    seen, z = Recorder(), [rows(6, 4, seed=k, dtype=torch.float32) for k in range(3)]
    criterion, y, stored = CrossBatchLoss(4, 14, "xbn", seen), torch.arange(6) // 2, z[0]
    criterion(z[0], y)
    for batch in z[1:]:
        criterion(batch, y)
        stored = torch.cat([acbn.match_moments(stored, *acbn.moments(batch)), batch])[-14:]
        torch.testing.assert_close(oldest_first(criterion.memory), stored)      # adapted rows stay
    sim = seen.sim.roll(-criterion.memory.written, 1)
    torch.testing.assert_close(sim, z[2] @ F.normalize(stored, dim=1).T)


@pytest.mark.parametrize("method", ADAPTING)
def test_memory_of_one_row_is_constant_and_only_shifted(method):            # reading 1
    criterion, z = CrossBatchLoss(4, 20, method), rows(9, 4, dtype=torch.float32)
    criterion(z[:1], torch.zeros(1, dtype=torch.int64))
    criterion(z[1:], torch.arange(8) // 2)
    torch.testing.assert_close(criterion.memory.embeddings[0], z[1:].mean(0))


@pytest.mark.parametrize("method", METHODS)
def test_memory_takes_batches_of_any_size_and_rows_of_zeros(method):
    for M in (1, 12):
        criterion = CrossBatchLoss(5, M, method)
        for k, B in enumerate((1, 2, 30, 1, 12, 5, 1, 13)):
            z = (rows(B, 5, seed=k, dtype=torch.float32)
                 * (torch.arange(B)[:, None] != k)).requires_grad_()
            loss = criterion(z, (torch.arange(B) // 2).to(INTEGERS[k]))
            loss.backward()
            assert loss.isfinite() and z.grad.isfinite().all()
            assert criterion.memory.all_embeddings.isfinite().all() and len(criterion.memory) <= M


def test_memory_and_loss_refuse_what_does_not_fit():
    for wrong in (dict(size=0, dim=4), dict(size=4, dim=0), dict(size=0.5 * 1001, dim=4)):
        with pytest.raises(ValueError, match="integers from 1 on"):
            CrossBatchMemory(**wrong)
    for door in (CrossBatchMemory(4, 8).enqueue,
                 *(CrossBatchLoss(4, 8, method) for method in METHODS)):
        for z, y in (((2, 4), (2, 1)), ((2, 5), (2,)), ((2, 1), (2,)), ((2, 4), (1,)),
                     ((0, 4), (0,)), ((4,), (4,))):
            with pytest.raises(ValueError, match=r"expected embeddings \(B, 4\) and labels \(B,\)"):
                door(torch.ones(z), torch.ones(y, dtype=torch.int64))
        for y, got in ((torch.ones(2), ".*torch.float32"), ([0, 1], "<class 'list'>"),
                       (np.arange(2), "<class 'numpy.ndarray'> of int64")):
            with pytest.raises(ValueError, match=f"labels must be a tensor of integers, got {got}"):
                door(torch.ones(2, 4), y)
    with pytest.raises(ValueError, match="one of none, xbm"):
        CrossBatchLoss(4, 8, "moco")
    for wrong in (dict(process_noise=0, measurement_noise=0), dict(measurement_noise=-1)):
        with pytest.raises(ValueError, match="not both 0"):
            CrossBatchLoss(4, 8, **wrong)
    for wrong in (dict(gain_interval=0), dict(gain_interval=1.5), dict(warmup_steps=2.5),
                  dict(warmup_steps=-3), dict(momentum=1.0), dict(momentum=-0.1)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.* must be"):
            CrossBatchLoss(4, 8, **wrong)


@pytest.mark.parametrize("method", METHODS)
def test_memory_left_on_another_device_or_in_16_bits_is_told_in_the_first_step(method):
    z, y = torch.ones(2, 4), torch.tensor([0, 1])
    for criterion, z, y in ((CrossBatchLoss(4, 8, method, warmup_steps=9), z.to("meta"),
                             y.to("meta")),
                            (CrossBatchLoss(4, 8, method, warmup_steps=9), z, y.to("meta")),
                            (CrossBatchLoss(4, 8, method, warmup_steps=9).half(), z, y)):
        with pytest.raises(ValueError, match=r"the memory is on .*with criterion.to\(device\)"):
            criterion(z, y)


# ------------------------------------------------- the loss against the memory: derivatives

@pytest.mark.parametrize("method", METHODS)
def test_memory_of_exactly_one_batch_gives_the_value_of_none(method):
    plain, other = CrossBatchLoss(5, 8, "none"), CrossBatchLoss(5, 8, method)
    z, y = rows(8, 5, dtype=torch.float32), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    for k in range(3):
        a, b = plain(z + k, y), other(z + k, y)
        torch.testing.assert_close(b, 2 * a if method == "xbm+batch" else a, rtol=0, atol=1e-5)


def frozen(criterion, y):
    """The loss of a criterion's last batch as a function of z: plain torch, the memory copied."""
    loss, memory, n = criterion.loss, criterion.memory, len(y)
    stored, labels = memory.embeddings.clone(), memory.labels.clone()
    slots = (memory.written - n + torch.arange(n)) % memory.size

    def value(z):
        z, total = z / z.norm(dim=1, keepdim=True), 0
        if criterion.method in ("none", "xbm+batch"):
            same = y[:, None] == y
            total = total + loss(z @ z.T, same & ~torch.eye(n, dtype=torch.bool), ~same)
        if criterion.method != "none":
            same, reference = y[:, None] == labels, stored / stored.norm(dim=1, keepdim=True)
            own = F.one_hot(slots, len(labels)).bool()
            total = total + loss(z @ reference.T, same & ~own, ~same)
        return total
    return value


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_autograd_is_right_twice_and_with_two_forwards_before_one_backward(method, loss):
    """Values, gradients, second derivatives; against the memory they flow through the anchors."""
    criterion = CrossBatchLoss(5, 20, method, loss).double()
    batches, ours, plain = list(drifting(5, dtype=torch.float64)), [], []
    for z, y in batches:
        ours.append(criterion(z, y))
        plain.append(frozen(criterion, y)(z))
    leaves = [z for z, _ in batches]
    for total in (ours, plain):
        total.append(torch.autograd.grad(sum(total), leaves, create_graph=True))
        total.append(torch.autograd.grad(sum(g.square().sum() for g in total[-1]), leaves))
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert ours[4] > 0 and ours[-2][4].norm() > 0 and not criterion.memory.embeddings.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_loss_with_a_parameter_is_trained(method):
    criterion = CrossBatchLoss(5, 20, method, Tempered(), warmup_steps=1).double()
    assert list(criterion.parameters()) == [criterion.loss.log_t]
    for k, (z, y) in enumerate(drifting(5, dtype=torch.float64)):
        (ours,) = torch.autograd.grad(criterion(z, y), criterion.loss.log_t)
        if k > 0:
            (plain,) = torch.autograd.grad(frozen(criterion, y)(z), criterion.loss.log_t)
            torch.testing.assert_close(ours, plain)
        assert ours != 0
    restored = CrossBatchLoss(5, 20, method, Tempered(), warmup_steps=1).double()
    restored.load_state_dict(criterion.state_dict())
    assert_same_state(restored, criterion)


# ------------------------------------------------- the loss against the memory: state

@pytest.mark.parametrize("bad", [(3,), (0, 1, 2, 4, 5, 6, 7), range(8)], ids=len)
@pytest.mark.parametrize("when", [0, 1, 4])     # the first batch, memory filling, full and wrapping
@pytest.mark.parametrize("method", METHODS)
def test_one_batch_that_is_not_finite_has_a_nan_loss_and_spreads_no_further(method, when, bad):
    for size, loss, value in zip((20, 5, 20, 20), LOSSES,
                                 (torch.nan, torch.inf, -torch.inf, torch.nan)):
        criterion = CrossBatchLoss(5, size, method, loss, 0.01, 1.0, gain_interval=2).double()
        for k, (z, y) in enumerate(drifting(8, dtype=torch.float64)):
            if k == when:
                z = z.detach().clone()
                z[list(bad), 2] = value
                assert criterion(z, y).isnan()
                if method != "none":
                    stored = criterion.memory.embeddings[
                        (8 * k + torch.arange(8)) % criterion.memory.size]
                    assert size < 8 or (stored[list(bad)] == 0).all()
            else:
                (grad,) = torch.autograd.grad(criterion(z, y), z)
                assert grad.isfinite().all()
            assert all(v.isfinite().all() for v in criterion.state_dict().values())


@pytest.mark.parametrize("method", METHODS)
def test_state_does_not_change_in_eval_mode(method):
    criterion, twin = (CrossBatchLoss(5, 20, method, gain_interval=2) for _ in range(2))
    for z, y in drifting(5):
        before, values, reference = copy.deepcopy(criterion), [], criterion.memory.embeddings
        with_itself = method in ("none", "xbm+batch") or len(reference) == 0
        expected = with_itself * CrossBatchLoss(5, 1, "none")(z, y)
        if len(reference):
            sim = acbn.normalize(z) @ acbn.normalize(reference).T
            expected = expected + criterion.loss(
                sim, *acbn.pair_masks(y, criterion.memory.labels))
        criterion.eval()
        for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
            with mode():
                values.append(criterion(z, y))
        for value in values:
            torch.testing.assert_close(value, expected)
        assert torch.autograd.grad(values[0], z)[0].isfinite().all()
        assert_same_state(criterion, before)
        criterion.train()
        assert torch.equal(criterion(z, y), twin(z, y))


@pytest.mark.parametrize("dead", [[2], [0, 1, 2, 3, 4]])    # a dead dimension; one image 8 times
@pytest.mark.parametrize("method", ADAPTING)
def test_state_is_shifted_and_not_scaled_by_a_batch_constant_in_a_dimension(method, dead):
    criterion = CrossBatchLoss(5, 24, method, process_noise=0.01, measurement_noise=1.0,
                               momentum=0.3).double()
    for k, (z, y) in enumerate(drifting(9, dtype=torch.float64)):
        z = z.detach()
        if k in (0, 4):         # the first batch, too: no deviation of 0 is taken for an estimate
            z[:, dead] = z[0, dead]
        before, estimate = criterion.memory.embeddings.clone(), criterion.std.clone()
        criterion.adapt(z)
        after = criterion.memory.embeddings
        if k in (0, 4):
            torch.testing.assert_close(criterion.std[dead], estimate[dead])
        if k == 4:
            torch.testing.assert_close(after.std(0)[dead], before.std(0)[dead])
            torch.testing.assert_close(after.mean(0), criterion.mean)
        elif k > 1 and method == "xbn":         # the next batch's moments, whatever came before
            torch.testing.assert_close(acbn.moments(after), acbn.moments(z))
        criterion.memory.enqueue(z, y)
        criterion.step += 1


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_holds_all_that_the_next_step_depends_on(method, tmp_path):
    make = lambda: CrossBatchLoss(5, 21, method, process_noise=0.01, measurement_noise=1.0,  # noqa
                                  gain_interval=3, warmup_steps=2)
    whole, first, second = make(), make(), make()
    expected = run(whole, 7) + run(whole, 9, B=3, seed=1)
    run(first, 7)
    storage = [buffer.data_ptr() for buffer in second.buffers()]
    assert all(isinstance(v, torch.Tensor) for v in first.state_dict().values())
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for (a, grad_a), (b, grad_b) in zip(expected[7:], run(second, 9, B=3, seed=1)):
        assert torch.equal(a, b) and torch.equal(grad_a, grad_b)
    assert_same_state(whole, second)
    assert second.p == whole.p and second.K == whole.K
    assert storage == [buffer.data_ptr() for buffer in second.buffers()]    # written in place


def test_state_of_another_method_changes_no_gain():
    xbn, ema = CrossBatchLoss(5, 20, "xbn"), CrossBatchLoss(5, 20, "ema", momentum=0.5)
    run(xbn, 2)
    ema.load_state_dict(xbn.state_dict())
    (z, y), old = next(drifting(1, seed=9)), xbn.mean.clone()
    ema(z, y)
    torch.testing.assert_close(ema.mean, (old + acbn.normalize(z.detach()).mean(0)) / 2)


def test_memory_warms_up_and_resets():
    settings = dict(process_noise=0.01, measurement_noise=1.0, gain_interval=2)
    criterion = CrossBatchLoss(5, 30, warmup_steps=3, **settings)
    plain = CrossBatchLoss(5, 1, "none")
    for _ in range(2):
        assert all(torch.equal(a, b) for ours, own in zip(run(criterion, 3), run(plain, 3))
                   for a, b in zip(ours, own))
        assert len(criterion.memory) == 0
        cold = CrossBatchLoss(5, 30, **settings)            # goes on like one that had no warm-up
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(run(criterion, 5), run(cold, 5)))
        assert torch.equal(criterion.mean, cold.mean) and criterion.K == cold.K
        criterion.reset()
        assert (len(criterion.memory) == 0 and not criterion.std.any()
                and criterion.K == criterion.p == 1)


# ------------------------------------------------- the loss against the memory: precision

@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_16_bit_inputs_and_autocast_change_nothing_but_the_inputs(method, dtype, loss):
    half, full = CrossBatchLoss(5, 20, method, loss), CrossBatchLoss(5, 20, method, loss)
    for z, y in drifting(4):
        low = z.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = half(low, y)
        value.backward()
        assert torch.equal(value, full(low.detach().float(), y))
        assert value.dtype == torch.float32 and low.grad.dtype == dtype
    assert all(b.dtype in (torch.float32, torch.int64) for b in half.buffers())
    double = CrossBatchLoss(5, 20, method, loss).double()
    assert run(double, 2, dtype=torch.float64)[1][0].dtype == torch.float64


def fake_cuda_works():
    """Torch 2.5 with CUDA indexes fake CUDA tensors only where there is a driver."""
    with FakeTensorMode(), contextlib.suppress(RuntimeError):
        return torch.ones(2, device="cuda")[:, None].ndim == 2


needs_fake_cuda = pytest.mark.skipif(not fake_cuda_works(),
                                     reason="needs a newer torch, or a GPU's driver")


class OneDevice(TorchDispatchMode):
    """Fails where an operation takes tensors of two devices; keeps and answers the host's reads."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        assert len({t.device.type for t in leaves if isinstance(t, torch.Tensor)}) < 2, func
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal"):
            self.read.append(args[0])
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


@needs_fake_cuda
@pytest.mark.parametrize("loss", [*LOSSES, Tempered])
@pytest.mark.parametrize("method", METHODS)
def test_fake_cuda_tensors_meet_no_cpu_tensor_and_are_never_read(method, loss):
    """Fake tensors tell even of a scalar that the CPU hands to a GPU."""
    with FakeTensorMode():
        with torch.device("cuda"):
            criterion = CrossBatchLoss(5, 20, method, loss() if loss is Tempered else loss,
                                       warmup_steps=1)
        z, y = torch.randn(8, 5, device="cuda"), torch.randint(4, (8,), device="cuda")
        with OneDevice() as seen:
            for mode in (criterion.train, criterion.train, criterion.train, criterion.eval):
                mode()
                assert criterion(z, y).device.type == "cuda"
        assert not seen.read


def test_a_compiled_encoder_is_compiled_once_and_the_criterion_stays_outside():
    def backend(graph, _):
        graphs.append(graph)
        return graph
    encoder, y = nn.Linear(6, 5), torch.arange(8) // 2
    compiled = torch.compile(encoder, backend=backend)
    first, second = CrossBatchLoss(5, 20), CrossBatchLoss(5, 20)
    whole = torch.compile(lambda x: second(encoder(x), y), backend=backend)
    for step, criterion in ((lambda x: first(compiled(x), y), first), (whole, second)):
        graphs = []
        for _ in range(12):
            x, twin = torch.randn(8, 6), copy.deepcopy(criterion)
            assert torch.equal(step(x), twin(encoder(x), y))
        assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_the_host_never_waits_for_a_gpu(method):
    criterion, batches = CrossBatchLoss(5, 20, method).cuda(), list(drifting(6, device="cuda"))
    criterion(*batches[0]).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for z, y in batches[1:]:
            criterion(z, y).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------- any memory, any batch

@pytest.mark.parametrize("seed", range(24))
def test_properties_of_any_memory_and_loss(seed):
    rng = np.random.default_rng(seed)
    B, M, D, classes = (int(rng.integers(*span)) for span in ((2, 40), (1, 100), (1, 20), (1, 12)))
    dtype, tolerance = ((torch.float32, 1e-3), (torch.float64, 1e-9))[seed % 2]
    z = torch.tensor(rng.normal(size=(int(rng.integers(1, 9)), B, D)) + rng.normal(size=D),
                     dtype=dtype)
    y = torch.tensor(rng.integers(-classes, classes, z.shape[:2]) * int(rng.integers(1, 2 ** 40)))
    scale, method, loss = 10.0 ** rng.uniform(-8, 15), METHODS[seed % 6], LOSSES[seed // 6]
    plain, scaled = (CrossBatchLoss(D, M, method, loss, 0.01, 0.1, gain_interval=2).to(dtype)
                     for _ in range(2))
    queue = collections.deque(maxlen=M)
    for batch, labels in zip(z, y):
        batch.requires_grad_()
        a, b = plain(batch, labels), scaled(batch.detach() * scale, labels)
        (gradient,) = torch.autograd.grad(a, batch)
        assert a.isfinite() and a >= -tolerance and gradient.isfinite().all()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)    # length does not matter
        queue.extend(labels.tolist())
        if method != "none":
            assert oldest_first(plain.memory, plain.memory.labels).tolist() == list(queue)


# ------------------------------------------------- acbn.py as a text

def test_docstring_usage_runs():
    assert doctest.testmod(acbn).attempted > 3 and doctest.testmod(acbn).failed == 0


def test_acbn_imports_torch_alone():
    source = Path(acbn.__file__).read_text()
    assert set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.M)) == {"torch"}
    assert source.startswith("# SPDX-License-Identifier: MIT\n")


# ------------------------------------------------- peers

def test_losses_equal_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers
    pairs = [(acbn.multi_similarity_loss, losses.MultiSimilarityLoss(2, 50, 0.5),
              miners.MultiSimilarityMiner(0.1)),
             (acbn.supcon_loss, losses.SupConLoss(0.1), None),
             (acbn.mined_supcon_loss, losses.SupConLoss(0.1), miners.PairMarginMiner(0.2, 0.8))]
    y = torch.arange(24) // 4
    for ours, theirs, miner in pairs:
        z = (rows(6, 8)[y] + 0.5 * rows(24, 8, seed=1)).requires_grad_()
        value = CrossBatchLoss(8, 1, "none", ours).double()(z, y)
        expected = theirs(z, y, miner(z, y) if miner else None)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (value, expected)),
                                   rtol=1e-5, atol=1e-6)
    # Its contrastive loss of a negative is sim - 0.5, XBM's is sim: only the gradient is the same.
    theirs = losses.ContrastiveLoss(1, 0.5, distance=distances.CosineSimilarity(),
                                    reducer=reducers.SumReducer())
    sim, negative = acbn.normalize(z) @ acbn.normalize(z).T, acbn.pair_masks(y, y)[1]
    value = CrossBatchLoss(8, 1, "none", acbn.contrastive_loss).double()(z, y)
    expected = (theirs(z, y) + 0.5 * (negative & (sim > 0.5)).sum()) / 24
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (value, expected)),
                               rtol=1e-5, atol=1e-6)


# ------------------------------------------------- small runs of the scripts, for many tests

TINY = ("--classes 24 --max-images 4 --image-size 16 --batch-size 16 --epochs 2 --warmup-steps 3 "
        "--dim 16 --lr 1e-3 --device cpu --workers 0").split()
ON_REPLICA = ("--backbone conv4 --weights none --image-size 32 --dim 8 --batch-size 8 "
              "--head-epochs 1 --memory-ratio 1 --device cpu --workers 0").split()


def tiny(out, *more):
    return train.main([*TINY, "--out", str(out), *more])


def strip(records):
    return [{k: v for k, v in r.items() if k not in ("images_per_second", "eval_seconds")}
            for r in records]


def script(*command, cwd=HERE, **env):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True,
                          text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ------------------------------------------------- data sets

def make_sop(root, train=(3, 4, 2), test=(4, 3, 1), edit=lambda text: text):
    """A replica of Stanford Online Products with so many images of each class, some of them odd."""
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
                image.save(base / path, format="GIF" if k == 1 else "JPEG")     # a GIF named .JPG
                lines.append(f"{image_id} {class_id} 1 {path}")
        (base / name).write_text(edit("\n".join(lines) + "\n"))
    return root


def test_sop_replica_is_read_and_counts_are_enforced(tmp_path, capsys):
    make_sop(tmp_path)
    with pytest.raises(data.UserError, match="train split has 9 images of 3 classes, "
                                             "expected 59551 .*allow-partial"):
        data.load("sop", tmp_path)
    for root in (tmp_path, tmp_path / "Stanford_Online_Products"):
        splits = data.load("sop", root, allow_partial=True)
        assert (splits.train.labels.tolist() == [1] * 3 + [2] * 4 + [3] * 2
                and splits.gallery is None)
        assert (splits.query.labels.tolist() == [4] * 4 + [5] * 3 + [6]
                and len(splits.query.images) == 8)
        assert all(Path(p).exists() for p in splits.train.images + splits.query.images)
    assert "warning: sop in" in capsys.readouterr().err
    images = data.Images(splits.train, 16, "light")
    assert all(x.shape == (3, 16, 16) and x.dtype == torch.uint8 for x, _ in images)


@pytest.mark.parametrize("test", ["test", "val", "valid", "validation"])
def test_folder_in_both_layouts(tmp_path, test):
    for place, classes in (("split/train", "ab"), (f"split/{test}", "cd"), ("flat", "abcd")):
        make_folder(tmp_path / place, classes)
    for layout in ("split", "flat"):
        splits = data.load("folder", tmp_path / layout)
        assert [Path(p).parent.name for p in splits.train.images] == list("aaaabbbb")
        assert [Path(p).parent.name for p in splits.query.images] == list("ccccdddd")
    with pytest.raises(data.UserError, match="expected under --root"):
        data.load("folder", tmp_path / "flat" / "a")


def jpeg(path, seed=0, size=(60, 40)):
    """One small image file of noise; by the seed an odd one: grey, CMYK, or no JPEG at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    kind, mode = {1: ("JPEG", "L"), 2: ("JPEG", "CMYK"), 3: ("GIF", "P"), 4: ("PNG", "P")}.get(
        seed % 7, ("JPEG", "RGB"))
    Image.fromarray(pixels).convert(mode).save(path, format=kind)


def make_inshop(root, place="Eval", images="Img/img", edit=lambda text: text):
    """A replica of In-shop Clothes Retrieval: padded rows, a class of one image, 4 + 4 classes."""
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
    """A replica of DeepFashion2: two items an image, style 0, an empty box, restarting pair ids."""
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


def make_vehicleid(root):
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
        (base / "train_test_split" / f"{name}.txt").write_text("\n".join(lines))
    return root


def make_folder(root, classes=tuple(f"class{c}" for c in range(6))):
    """Four images of each class, a folder each."""
    for k in range(4 * len(classes)):
        jpeg(root / classes[k // 4] / f"{k}.jpg", k)


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
    assert (splits.query.labels.tolist() == splits.gallery.labels.tolist()
            == [5, 5, 6, 7, 7, 7, 8, 8])
    assert all(Path(p).exists() for part in splits for p in part.images)
    assert len({*splits.query.images, *splits.gallery.images}) == 16
    assert any("1 classes of one image" in line for line in data.describe(splits))


@pytest.mark.parametrize("nest", [False, True])
def test_df2_replica_follows_the_paper_s_rules(tmp_path, nest, capsys):
    make_df2(tmp_path, nest)
    for path in list(tmp_path.rglob("000001.json")):
        path.with_name("._000001.json").write_bytes(b"\0 of another program")
    with pytest.raises(data.UserError, match="train split has 20 images of .* expected 217778"):
        data.load("df2", tmp_path)
    train_split, query, gallery = data.load("df2", tmp_path, allow_partial=True)
    # 24 items a part, 4 of them of style 0; of validation 8 are shops', of which 2 have style 0.
    assert (len(train_split.labels) == 20 and len(gallery.labels) == 8
            and len(query.labels) == 16 - 2)
    assert not (set(train_split.labels.tolist())
                & set(query.labels.tolist() + gallery.labels.tolist()))
    keys = ({(k // 6, 3, 1) for k in range(12)}
            | {(k // 6, 1 + k % 2, k // 4 % 3) for k in range(4, 12)})
    assert len(train_split.labels.unique()) == len(keys)
    assert torch.isin(query.labels, gallery.labels).any()
    official = data.load("df2", tmp_path, allow_partial=True, df2_labels="official")
    assert len(official.train.labels.unique()) == len({(pair, style) for pair, _, style in keys})
    lines = list(data.describe(data.Splits(train_split, query, gallery)))
    assert any("1 boxes without area: the whole image is taken" in line for line in lines)
    images = data.Images(train_split, 16, "none")
    assert all(images[i][0].shape == (3, 16, 16) for i in range(20))


@pytest.mark.parametrize("name, edit, message", [
    ("sop", lambda t: t.replace("image_id", "id", 1),
     "Ebay_train.txt, line 1: expected 'image_id class_id"),
    ("sop", lambda t: t.replace("2 1 1 ", "2 one 1 ", 1),
     "Ebay_train.txt, line 3: expected .*, found '2 one 1"),
    ("sop", lambda t: t.replace("2 1 1 ", "2 1 ", 1), "line 3: expected 'image_id class_id"),
    ("sop", lambda t: t.replace("2 1 1 ", "2 " + "9" * 30 + " 1 ", 1), "line 3: expected 'image"),
    ("sop", lambda t: "", "Ebay_train.txt, line 1"),
    ("sop", lambda t: t.splitlines()[0], "there are 0 classes to train on"),
    ("sop", lambda t: re.sub(r"(?m)^(\d+) \d+ ", r"\1 1 ", t),
     "class 1 is in the training and the test list"),
    ("inshop", lambda t: t.replace("image_name", "name", 1),
     "list_eval_partition.txt, line 2: expected 'image_name item_id"),
    ("inshop", lambda t: t.replace("id_00000001 train", "id_x train", 1), "line 3: expected"),
    ("df2", lambda a: {**a, "source": "web"},
     "000001.json: not a DeepFashion2 annotation .*source is 'web', not 'user' or 'shop'"),
    ("df2", lambda a: {k: v for k, v in a.items() if k != "pair_id"}, r"KeyError\('pair_id'\)"),
    ("df2", lambda a: {**a, "item1": {**a["item1"], "bounding_box": [1, 2, 3]}},
     "not enough values to unpack"),
    ("df2", lambda a: [a], "not a DeepFashion2 annotation")])
def test_faults_of_lists_name_the_file_and_the_line(tmp_path, name, edit, message):
    MAKE[name](tmp_path, edit=edit)
    with pytest.raises(data.UserError, match=message):
        data.load(name, tmp_path, allow_partial=True)


def test_vehicleid_replica_and_its_three_test_lists(tmp_path):
    make_vehicleid(tmp_path)
    with pytest.raises(data.UserError,
                       match="has 20 images of 5 classes, expected any number of 13164"):
        data.load("vehicleid", tmp_path)
    for test_list, vehicles in (("small", 4), ("medium", 5), ("large", 6)):
        splits = data.load("vehicleid", tmp_path, allow_partial=True, test_list=test_list)
        assert len(splits.train.labels) == 20 and len(splits.query.labels) == 4 * vehicles
        assert splits.gallery is None and all(Path(p).exists() for p in splits.train.images)


@pytest.mark.parametrize("name", MAKE)
def test_missing_data_are_told_with_the_expected_tree_and_the_place_to_get_them(tmp_path, name):
    row = data.DATASETS[name]
    get = row.page if name != "sop" else f"data.py --dataset sop --download --root {tmp_path}"
    with pytest.raises(data.UserError) as error:
        data.load(name, tmp_path)
    assert all(words in str(error.value) for words in (row.tree, str(tmp_path), get))


@pytest.mark.parametrize("name", MAKE)
def test_check_names_missing_and_truncated_images_of_each_replica(tmp_path, name, capsys):
    MAKE[name](tmp_path)
    files = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() == ".jpg")
    gone, cut = files[0], files[3]
    cut.write_bytes(cut.read_bytes()[:-300])
    if name != "folder":        # a folder has what it has
        gone.unlink()
    splits = data.load(name, tmp_path, allow_partial=True)
    with pytest.raises(SystemExit,
                       match=f"{1 if name == 'folder' else 2} images of .* cannot be read"):
        data.main(["--dataset", name, "--root", str(tmp_path), "--allow-partial", "--check"])
    out = capsys.readouterr().out
    assert (f"{cut}: cannot be read as an image" in out
            and (name == "folder") != (f"{gone}: " in out))
    with pytest.raises(data.UserError, match=f"{cut.name}: cannot be read as an image"):
        data.Images(splits.train, 16, "none")[splits.train.images.index(str(cut))]


@pytest.mark.parametrize("name", ["sop", "inshop", "vehicleid", "df2"])
def test_lists_from_windows_are_read_as_those_from_unix(tmp_path, name):
    for system in ("unix", "windows"):
        (tmp_path / system).mkdir()
        MAKE[name](tmp_path / system)
    for path in (p for end in ("txt", "json") for p in (tmp_path / "windows").rglob(f"*.{end}")):
        text = path.read_bytes().replace(b"\n", b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + text + b"\r\n\r\n")   # a byte-order mark, blank lines
    unix, windows = (data.load(name, tmp_path / system, allow_partial=True)
                     for system in ("unix", "windows"))
    assert data.fingerprint(unix) == data.fingerprint(windows)
    assert all(Path(p).exists() for part in windows if part for p in part.images)


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
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")         # the same pixels, never reduced
    part = data.Split([str(tmp_path / "a.jpg"), str(tmp_path / "a.png")],
                      torch.zeros(2, dtype=torch.int64),
                      torch.tensor([[100.0, 50, 1090, 850], [100, 50, 1090, 850]]))
    for training, keys in ((False, (0, 1)), (True, ((0, 3), (1, 3)))):
        images = data.Images(part, 64, recipe if not training else "paper", training)
        images.transform = data.augmentation("none")[1]
        a, b = (images[key][0].float() for key in keys)
        assert (a - b).abs().mean() < 2
    cut = data.open_image(part.images[1], 64, data.centre, part.boxes[1])
    box = (100 + 95 + 50, 50 + 50, 1090 - 95 - 50, 850 - 50)    # centre 7/8 of the box's 800 x 800
    expected = Image.open(part.images[1]).crop(box).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(cut, float) - np.asarray(expected, float)).mean() < 1


def test_synthetic_is_drawn_from_the_seed():
    a, b, c = (data.synthetic(classes=30, max_images=5, seed=s) for s in (0, 0, 1))
    assert ((a.train.images == b.train.images).all()
            and not np.array_equal(a.train.images, c.train.images))
    for split, classes in ((a.train, range(30)), (a.query, range(30, 60))):
        labels, counts = split.labels.unique(return_counts=True)
        assert labels.tolist() == list(classes) and counts.min() >= 3 and counts.max() <= 5
        assert (split.images.shape == (len(split.labels), 32, 32, 3)
                and split.images.dtype == np.uint8)


def test_images_of_every_kind_are_opened_as_torchvision_opens_them(tmp_path):
    grey = Image.fromarray(np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8))
    for name, image, form in (("grey.jpg", grey, "JPEG"), ("gif.JPG", grey.convert("P"), "GIF"),
                              ("cmyk.jpg", grey.convert("CMYK"), "JPEG"),
                              ("palette.png", grey.convert("P"), "PNG")):
        image.save(tmp_path / name, format=form)
        opened = data.open_image(str(tmp_path / name))
        assert opened.mode == "RGB" and opened == default_loader(str(tmp_path / name))
        assert np.asarray(opened)[-1, -1].min() > 230 and np.asarray(opened)[0, 0].max() < 25, name


@pytest.mark.parametrize("recipe", ["paper", "light", "none"])
def test_transforms_give_uint8_and_depend_on_the_seed_alone(recipe):
    splits = data.synthetic(classes=3)
    images = data.Images(splits.train, 24, recipe, training=True)
    before = torch.get_rng_state()
    a, b, c = (images[0, seed][0] for seed in (5, 5, 6))
    assert a.shape == (3, 24, 24) and a.dtype == torch.uint8 and torch.equal(a, b)
    assert torch.equal(a, c) == (recipe == "none") and torch.equal(before, torch.get_rng_state())
    assert data.Images(splits.train, 24, recipe)[0][0].shape == (3, 24, 24)


def test_light_augmentation_equals_torchvision_one_image_at_a_time():
    TF, size = v2.functional, 40
    x = torch.tensor(
        data.synthetic(classes=4, image_size=size).train.images[:6]).permute(0, 3, 1, 2)
    assert torch.equal(data.light(x, torch.full((6, 7), 0.5)), x)           # 0.5: nothing changes
    u = torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    for image, got, (angle, scale, dx, dy, *tints) in zip(x, data.light(x, u),
                                                          (2 * u - 1).tolist()):
        image = image.float()
        angle, scale, shift = 15 * angle, 1 + 0.1 * scale, [-0.1 * size * dx, -0.1 * size * dy]
        # grid_sample moves the view, affine what is seen: the inverse, about the shifted centre.
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
            assert (y == y[:, :1]).all() and len(y[:, 0].unique()) == 4     # 4 classes x 4 images
            for group in torch.tensor(batch).view(4, 4):
                n = int((LABELS == LABELS[group[0]]).sum())
                assert len(group.unique()) == min(n, 4)                     # all of a small class
            used.update(y[:, 0].tolist())
    assert max(used.values()) - min(used.values()) <= 30            # a deck an epoch, dealt evenly


def test_sampler_is_seeded_and_shards_in_rank_order():
    def batches(epoch=0, keys=lambda sampler: sampler, **kw):
        sampler = data.ClassBalancedSampler(LABELS, 16, 4, **kw)
        sampler.set_epoch(epoch)
        return list(keys(sampler))

    assert batches() == batches() != batches(seed=1) and batches() != batches(epoch=1)
    shards = [batches(rank=r, world=2) for r in range(2)]
    assert [a + b for a, b in zip(*shards)] == batches()
    for wrong, message in (
            ((15, 4), "multiple of 4"),
            ((128, 4), "needs 32 classes and 128 images, the training split has 20")):
        with pytest.raises(data.UserError, match=message):
            data.ClassBalancedSampler(LABELS, *wrong)
    seeds = [s for epoch in range(2) for rank in range(2)
             for batch in batches(epoch, data.Seeded, rank=rank, world=2) for _, s in batch]
    assert len(set(seeds)) == len(seeds)


def test_folder_leaves_out_the_by_products_of_other_programs(tmp_path, capsys):
    make_folder(tmp_path)
    clean = data.fingerprint(data.load("folder", tmp_path))
    for name in (".ipynb_checkpoints/a.jpg", "__MACOSX/class0/._0.jpg", "class0/._0.jpg",
                 "class1/Thumbs.db", "class2/labels.csv",
                 "class3/.ipynb_checkpoints/3.jpg", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"no image")
    assert data.fingerprint(data.load("folder", tmp_path)) == clean
    assert "note" not in capsys.readouterr().err
    for name in ("class0/a.jfif", "class0/b.JPE", "class0/c.heic", "class0/.d.jfif"):
        (tmp_path / name).write_bytes(b"a picture")
    assert data.fingerprint(data.load("folder", tmp_path)) == clean
    (told,) = re.findall("note: 3 pictures below .* left out, .*:(.*)", capsys.readouterr().err)
    assert sorted(told.split()) == [".heic", ".jfif", ".jpe"]


def test_folder_notes_classes_in_both_parts_and_images_that_lie_deeper(tmp_path, capsys):
    make_folder(tmp_path / "train"), make_folder(tmp_path / "test")
    data.load("folder", tmp_path)
    told = capsys.readouterr().err
    assert "note: 6 of 6 test classes are also trained on" in told and "deeper" not in told
    for k in range(4):                                          # a tree of queries and galleries
        jpeg(tmp_path / "test" / "query" / f"class{k // 2}" / f"{k}.jpg", k)
    data.load("folder", tmp_path)
    told = capsys.readouterr().err
    assert "note: 6 of 7 test classes are also trained on" in told
    assert ("note: 4 images lie deeper than their class folder, "
            f"such as {tmp_path}/test/query/class0") in told
    (tmp_path / "train" / "class0" / "up").symlink_to(tmp_path / "train")
    data.load("folder", tmp_path)
    assert "/train/class0/up/class" in capsys.readouterr().err  # a link to a parent


@pytest.mark.parametrize("train_counts, test_counts, message", [
    ((3,), (2, 2), "1 classes to train on, 2 classes of 4 images to search, and 4 queries"),
    ((2, 2), (2,), "1 classes of 2 images to search"), ((2, 2), (5,), "1 classes of 5 images"),
    ((2, 2), (1, 1, 1), "and 0 queries with an image of their class to find")])
def test_folder_on_which_nothing_can_be_learnt_or_measured_is_refused(
        tmp_path, train_counts, test_counts, message):
    for part, counts in (("train", train_counts), ("test", test_counts)):
        for c, n in enumerate(counts):
            for k in range(n):
                jpeg(tmp_path / part / f"class{c}" / f"{k}.jpg", k)
    with pytest.raises(data.UserError, match=message):
        data.load("folder", tmp_path)


def test_fingerprint_follows_names_and_labels_alone(tmp_path):
    drawn = [data.fingerprint(data.synthetic(classes=5, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    make_sop(tmp_path)
    splits, same_splits = (data.load("sop", root, allow_partial=True)
                           for root in (tmp_path, tmp_path / "Stanford_Online_Products"))
    assert data.fingerprint(splits) == data.fingerprint(same_splits)
    labels = splits.query.labels.clone()
    labels[0] += 1
    other = splits._replace(query=splits.query._replace(labels=labels))
    assert data.fingerprint(other) != data.fingerprint(splits)


def test_folder_is_the_same_however_its_accents_are_kept(tmp_path):
    splits = []
    for form in ("NFC", "NFD"):
        make_folder(tmp_path / form, [unicodedata.normalize(form, name)
                                      for name in ("é1", "ea", "f1", "z", "z2", "z3")])
        splits.append(data.load("folder", tmp_path / form))
    assert data.fingerprint(splits[0]) == data.fingerprint(splits[1])
    assert [Path(path).parent.name for path in splits[1].query.images][-1].endswith("1")    # é1


def test_fingerprint_is_the_same_on_every_system(monkeypatch):
    def of(*images):
        return data.fingerprint(data.Splits(*(data.Split([image], torch.tensor([k]))
                                              for k, image in enumerate(images))))
    assert of("/r/a/1.jpg", "/r/b/2.jpg") == "adc5b5bc52f91858"
    composed, decomposed = (unicodedata.normalize(form, "/r/é/1.jpg") for form in ("NFC", "NFD"))
    assert composed != decomposed and of(composed, "/r/b/2.jpg") == of(decomposed, "/r/b/2.jpg")
    unix = of("/r/a/1.jpg", "/r/b/2.jpg")
    monkeypatch.setattr(data, "os", argparse.Namespace(path=ntpath, sep="\\"))
    assert of(r"C:\r\a\1.jpg", r"C:\r\b\2.jpg") == unix


def test_download_unpacks_and_checks_or_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    """At this address nobody answers, but torchvision takes an archive that is there already."""
    made = shutil.make_archive(tmp_path / "sop", "zip", make_sop(tmp_path / "made"))
    md5, got = hashlib.md5(Path(made).read_bytes()).hexdigest(), tmp_path / "got"
    row = data.DATASETS["sop"]._replace(archive=("http://127.0.0.1:9/sop.zip", md5, "9 kB"))
    monkeypatch.setitem(data.DATASETS, "sop", row)
    flags = ["--dataset", "sop", "--allow-partial", "--download", "--root", str(got)]
    with pytest.raises(SystemExit, match="--download: http://127.0.0.1:9/sop.zip could not be f"):
        data.main(flags)
    shutil.copy(made, got)
    data.main([*flags, "--check"])
    assert "9 images" in capsys.readouterr().out
    data.main(flags)
    assert "already" in capsys.readouterr().out
    shutil.copy(made, got)                              # as if unpacking had been cut short
    data.main(flags)
    assert "fetching 9 kB from http://127.0.0.1:9/sop.zip" in capsys.readouterr().out
    (got / "sop.zip").write_bytes(Path(made).read_bytes() + b" ")       # another checksum
    with pytest.raises(SystemExit, match="could not be fetched"):
        data.main(flags)
    for name in ("inshop", "df2", "vehicleid"):
        with pytest.raises(SystemExit, match=re.escape(data.DATASETS[name].page)):
            data.main(["--dataset", name, "--download"])


# ------------------------------------------------- Recall@K and MAP@R

def brute_force(z, y, ks, gallery=None, gallery_y=None):
    z, itself = np.asarray(z, np.float64), gallery is None
    gallery, gallery_y = (z, y) if itself else (np.asarray(gallery, np.float64), gallery_y)
    hits, precision = {k: 0 for k in ks}, 0.0
    for i, (row, label) in enumerate(zip(z, y)):
        sims = [(-float(row @ g) / np.linalg.norm(row) / np.linalg.norm(g), bool(l == label))
                for j, (g, l) in enumerate(zip(gallery, gallery_y)) if not (itself and i == j)]
        right = [r for _, r in sorted(sims)]        # among ties False, the other class, comes first
        R = sum(right)
        for k in ks:
            hits[k] += any(right[:k])
        precision += sum(sum(right[:j + 1]) / (j + 1) for j in range(R) if right[j]) / max(R, 1)
    return {k: v / len(z) for k, v in hits.items()}, precision / len(z)


@pytest.mark.parametrize("seed", range(10))
def test_recall_and_map_equal_brute_force(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    Q, G, D, classes = (int(rng.integers(2, n)) for n in (60, 60, 9, 25))
    z, gallery = (torch.tensor(rng.normal(size=(n, D))) for n in (Q, G))
    y, gallery_y = (torch.tensor(rng.integers(0, classes, n)) + 2 ** 40 for n in (Q, G))
    pair, ks = ((None, None), (1, 2, 7)) if seed % 2 else ((gallery, gallery_y), (1, 2, 70))
    expected, precision = brute_force(z, y, ks, *pair)
    scaled, turn = z * torch.tensor(10.0 ** rng.uniform(-9, 15, (Q, 1))), torch.randperm(Q)
    for chunk, (other, labels) in ((1, (z, y)), (7, (z[turn], y[turn])),
                                   (128, (scaled.float(), y))):
        monkeypatch.setattr(evaluation.search, "__defaults__", (None, None, chunk))
        found = evaluation.scores((other, labels), pair, ks)
        assert {k: found[f"recall@{k}"] for k in ks} == pytest.approx(expected)
        assert found["map@r"] == pytest.approx(precision, abs=1e-6)
        assert "map@r" not in evaluation.scores((other, labels), pair, ks, map_r=False)


@pytest.mark.parametrize("sizes", [(40, 1, 1, 2), (30, 30), (2,) * 30])
def test_recall_of_classes_of_any_size_with_ties_equals_brute_force(sizes):
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    z = F.one_hot(torch.randint(
        4, (len(y),), generator=torch.Generator().manual_seed(0))).float()      # all ties
    expected, precision = brute_force(z, y, (1, 5))
    found = evaluation.scores((z, y), ks=(1, 5))
    assert found == pytest.approx({"recall@1": expected[1], "recall@5": expected[5],
                                   "map@r": precision})


class Made(TorchDispatchMode):
    """The dtypes and sizes of the tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.tensors = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tensors |= {(t.dtype, t.numel()) for t in torch.utils._pytree.tree_leaves(out)
                         if isinstance(t, torch.Tensor)}
        return out


def test_recall_never_holds_all_similarities():
    z, y = rows(1500, 8, dtype=torch.float32), torch.arange(1500) // 3
    with Made() as made:
        evaluation.scores((z, y))
    assert max(size for _, size in made.tensors) <= 128 * 1500


def recall_at_k(z, y, ks, *gallery):
    found = evaluation.scores((z, y), gallery or (None, None), ks)
    return {k: found[f"recall@{k}"] for k in ks}


def test_recall_excludes_self_by_index_and_finds_duplicates():
    z = rows(4, 8)
    assert recall_at_k(torch.cat([z, z]), torch.arange(4).repeat(2), (1,)) == {1: 1.0}
    assert recall_at_k(z, torch.arange(4), (1, 3)) == {1: 0.0, 3: 0.0}      # only itself is right


@pytest.mark.parametrize("n, d", [(8, 4), (301, 7), (1000, 128)])
def test_recall_of_collapsed_embeddings_is_not_perfect(n, d):
    z, y = torch.ones(n, d), torch.arange(n) // 2
    assert recall_at_k(z, y, (1, n - 3, n - 1)) == {1: 0.0, n - 3: 0.0, n - 1: n // 2 * 2 / n}
    assert evaluation.scores((z, y))["map@r"] == 0.0


def test_recall_counts_queries_without_match_as_misses_and_labels_beyond_float32():
    z, gallery = torch.eye(4), torch.eye(4)[:3]
    y = torch.tensor([2 ** 24, 2 ** 24 + 1, 2 ** 30, 7])
    assert recall_at_k(z, y, (1,), gallery, y[:3]) == {1: 0.75}
    assert recall_at_k(z, y, (1,), gallery, y[:3] + 1)[1] == 0.0
    with pytest.raises(data.UserError, match="NaN"):
        evaluation.scores((z * math.nan, y))


@pytest.mark.parametrize("method", ["xbm+batch", "axbn"])
def test_nothing_in_training_or_evaluation_makes_64_bit_floats(tmp_path, method):
    """Apple's devices hold none. (Three numbers of the criterion's state are packed on the CPU.)"""
    with Made() as made:
        tiny(tmp_path, "--method", method, "--loss", "supcon", "--head-epochs", "1")
        evaluation.main([str(tmp_path / "best.pt"), "--device", "cpu"])
    assert {size for dtype, size in made.tensors if dtype == torch.float64} <= {3}


@needs_fake_cuda
def test_a_training_step_and_the_scores_mix_no_devices_and_read_only_the_scores(monkeypatch):
    with FakeTensorMode():
        with torch.device("cuda"):
            model = evaluation.Encoder("resnet18", 8, chunk=6)
            criterion = CrossBatchLoss(8, 40, "axbn", train.CountedLoss(*train.LOSSES["supcon"]))
            measured = train.Measured(1, 4, argparse.Namespace(device="cuda"))
        batch = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8), torch.randint(4, (16,))
        batch = [t.to("cuda", non_blocking=True) for t in batch]    # the transfer, as in train.py
        with OneDevice() as mode:
            for _ in range(3):
                x, y = batch
                z = train.gather(model(x).float())
                loss = criterion(z, train.gather(y))
                measured.add(loss, z.detach().norm(), criterion.loss.pairs)
            assert not mode.read
            searched = ((8, *t.shape[1:]) for t in (z, y))
            query = torch.randn(*next(searched), device="cuda"), y[:8]
            for p, n in evaluation.search(*query):
                rank, precision = evaluation.first_rank(p, n), evaluation.average_precision(p, n)
                assert rank.device.type == precision.device.type == "cuda"
            assert [t.dtype for t in mode.read] == [torch.bool] * 2 + [torch.int64]
            # is all finite, in queries and gallery? how many positives at most?


# ------------------------------------------------- the model and its weights

@pytest.mark.parametrize("backbone",
                         ["resnet18", "mobilenet_v2", "efficientnet_b0", "swin_t", "vgg11"])
def test_encoder_has_no_classifier_and_no_dropout_of_one(backbone):
    model = evaluation.Encoder(backbone, 8)
    assert not any(isinstance(m, nn.Dropout) and m.p >= 0.2 for m in model.modules())
    assert (model.head.out_features == 8
            and torch.isfinite(model.eval()(torch.zeros(1, 3, 32, 32))).all())


def test_encoder_with_frozen_batch_norm_keeps_its_statistics():
    x = torch.randint(256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    for frozen in (False, True):
        model = evaluation.Encoder("resnet18", 8, frozen).eval()
        evaluated, before = model(x), copy.deepcopy(model.state_dict())
        trained, after = model.train()(x), model.state_dict()
        assert frozen == torch.equal(trained, evaluated)
        assert frozen == all(torch.equal(after[name], v) for name, v in before.items())


def gradients(model, x, weight, state):
    torch.set_rng_state(state)
    z = model(x)
    return z.detach(), *torch.autograd.grad((z * weight).sum(), [*model.parameters()])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("backbone", ["resnet18", "conv4"])
def test_chunks_with_frozen_batch_norm_give_the_step_of_the_whole_batch(backbone, dtype, tolerance):
    torch.manual_seed(0)
    model = evaluation.Encoder(backbone, 8, frozen_bn=True, image_size=32).to(dtype).train()
    x = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8)
    weight = torch.randn(10, 8, dtype=dtype)
    whole = gradients(model, x, weight, torch.get_rng_state())
    model.chunk = 4
    for a, b in zip(whole, gradients(model, x, weight, torch.get_rng_state())):
        torch.testing.assert_close(a, b, rtol=tolerance,
                                   atol=tolerance * max(1, float(a.abs().max())))


@pytest.mark.parametrize("backbone, bn", [("resnet18", "train"), ("efficientnet_b0", "train"),
                                          ("efficientnet_b0", "frozen")])
def test_chunks_keep_random_numbers_and_move_statistics_the_first_time_only(backbone, bn):
    """The twin keeps all activations: it embeds chunk by chunk and adds nothing on the way back."""
    torch.manual_seed(0)
    twin = evaluation.Encoder(backbone, 8, bn == "frozen").double().train()
    for m in twin.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.1                                           # random beside stochastic depth
    model, state = copy.deepcopy(twin), torch.get_rng_state()
    x = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8)
    weight = torch.randn(10, 8, dtype=torch.float64)
    model.chunk = 4
    ours = gradients(model, x, weight, state)
    twin.forward = lambda x: torch.cat([evaluation.Encoder.forward(twin, x[part]) for part in
                                        (slice(0, 4), slice(4, 7), slice(7, 10))])  # of one size
    for a, b in zip(ours, gradients(twin, x, weight, state)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1, float(b.abs().max())))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers()))


@pytest.mark.parametrize("bn", ["train", "frozen"])
def test_chunks_keep_buffers_only_where_something_moves_them(bn, monkeypatch):
    model, kept = evaluation.Encoder("resnet18", 8, bn == "frozen", chunk=4).train(), []
    keep = evaluation.kept_buffers
    monkeypatch.setattr(evaluation, "kept_buffers", lambda model: kept.append(1) or keep(model))
    model(torch.randint(256, (8, 3, 32, 32))).sum().backward()
    assert len(kept) == 2 * (bn == "train")


def test_chunks_keep_fewer_activations():
    kept = []
    for chunk in (0, 4):
        model = evaluation.Encoder("conv4", 8, chunk=chunk).train()
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept[-1].append(t.numel()) or t, lambda t: t):
            kept.append([])
            model(torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8))
    assert sum(kept[1]) < sum(kept[0]) / 4


def test_a_backbone_of_ones_own_is_trained_and_rebuilt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("mymodels.py").write_text(
        "from torch import nn\n"
        "class Small(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model, self.head = nn.LazyLinear(12), nn.Linear(12, 16)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.model(x.flatten(1)))\n"
        "def maps():\n    return nn.Conv2d(3, 2, 1)\n"
        "class Output(nn.Module):\n    def forward(self, x):\n        return {'features': x}\n"
        "def other():\n"
        "    return nn.Sequential(nn.Flatten(1), nn.Unflatten(1, (2, -1)), nn.Flatten(0, 1), "
        "nn.LazyLinear(3))\n")
    record = tiny("run", "--backbone", "mymodels:Small", "--epochs", "1", "--chunk", "6")[-1]
    evaluation.main(["run/checkpoint.pt", "--device", "cpu"])
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["recall@1"] == pytest.approx(record["recall@1"])
    tiny("more", "--backbone", "mymodels:Small", "--epochs", "0", "--weights", "run/checkpoint.pt")
    first, more = (evaluation.load_file(f"{run}/checkpoint.pt")["model"] for run in ("run", "more"))
    assert all(torch.equal(v, more[k]) for k, v in first.items() if k.startswith("backbone."))
    for name, got in (("maps", "(2, 2, 16, 16)"), ("other", "(4, 3)"), ("Output", "'dict'")):
        with pytest.raises(SystemExit, match=f"mymodels:{name}: expected .*{re.escape(got)}"):
            tiny(name, "--backbone", f"mymodels:{name}")


def test_a_fault_in_a_backbone_of_ones_own_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "faulty.py").write_text(
        "from torch import nn\n"
        "def make():\n    raise ValueError('their make')\n"
        "class Forward(nn.Flatten):\n"
        "    def forward(self, x):\n        raise RuntimeError('their forward')\n")
    (tmp_path / "torn.py").write_text("None.their_module\n")
    for name, error, text in (("faulty:make", ValueError, "their make"),
                              ("faulty:Forward", RuntimeError, "their forward"),
                              ("torn:make", AttributeError, "their_module")):
        with pytest.raises(error, match=text):
            tiny(tmp_path / "run", "--backbone", name)
    with pytest.raises(SystemExit, match="module 'faulty' has no attribute 'more'"):
        tiny(tmp_path / "run", "--backbone", "faulty:more")


@pytest.mark.parametrize("library", ["random", "numpy.random", "torch"])
def test_chunks_of_a_backbone_with_other_random_numbers_than_torchs_are_refused(
        library, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = library.replace(".", "_") + "_drops"
    draw = "torch.rand(()).item()" if library == "torch" else f"{library}.random()"
    (tmp_path / f"{name}.py").write_text(
        f"import random, numpy, torch\nfrom torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(nn.Flatten(), nn.LazyLinear(8))\n"
        "    def forward(self, x):\n"
        f"        return super().forward(x) * (1 + 1e-6 * {draw})\n")     # hardly to be seen
    flags = ("--backbone", f"{name}:Net", "--epochs", "1", "--method", "xbn")
    assert len(tiny(tmp_path / "whole", *flags)) == 2
    with (contextlib.nullcontext() if library == "torch" else
          pytest.raises(SystemExit, match="--chunk: .* draws random numbers that are not torch's")):
        tiny(tmp_path / "chunks", *flags, "--chunk", "4")


def test_batch_norm_with_more_in_it_is_not_made_synchronous():
    class WithReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()
    made = train.synchronised(train.synchronised(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))
    assert isinstance(made[1], nn.SyncBatchNorm)
    with pytest.raises(data.UserError, match="its layer 1 is a WithReLU"):
        train.synchronised(nn.Sequential(nn.Conv2d(3, 4, 1), WithReLU(4)))


@pytest.mark.parametrize("backbone", ["conv4", "resnet18"])
def test_without_a_head_the_embedding_is_the_backbone_s_own_features(
        backbone, tmp_path, monkeypatch):
    flags = ("--backbone", backbone, "--dim", "0", "--head-epochs", "1")
    scored = tiny(tmp_path / "untrained", *flags, "--epochs", "0")
    model, state = evaluation.rebuild(tmp_path / "untrained" / "best.pt")
    split = data.load_for(argparse.Namespace(**state["settings"])).query
    z, y = evaluation.embed(model, data.Images(split, 16, "light"))
    x = torch.stack([data.Images(split, 16, "light")[i][0] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(z[:4], model.backbone((x - model.mean) / model.std))
    assert evaluation.scores((z, y))["recall@1"] == scored[-1]["recall@1"]
    assert len(tiny(tmp_path / "trained", *flags, "--epochs", "1")) == 2


def test_fp16_is_off_where_a_cpu_embeds():
    model, images = embedding_case()
    images.split = data.take(images.split, torch.arange(len(images)) < 20)
    assert torch.equal(evaluation.embed(model, images, "fp16")[0],
                       evaluation.embed(model, images, "off")[0])


def test_weights_are_read_in_the_forms_that_people_have(tmp_path, monkeypatch):
    import torchvision
    from urllib.error import URLError
    source, path = torchvision.models.resnet18(num_classes=7), tmp_path / "weights.pt"
    plain = source.state_dict()
    old = {name: v for name, v in plain.items() if not name.endswith("num_batches_tracked")}
    for state in (plain, old, {"model": plain, "epoch": 3}, {"state_dict": plain},
                  {"state_dict": {f"module.{name}": v for name, v in plain.items()}},
                  {f"_orig_mod.model.{name}": v for name, v in plain.items()},
                  {"model": {f"module.backbone.{name}": v for name, v in plain.items()}},
                  {"model": {"head.weight": torch.ones(8, 512),         # a run's checkpoint
                             **{f"backbone.{name}": v for name, v in plain.items()}}}):
        torch.save(state, path)
        encoder = evaluation.Encoder("resnet18", 8)
        evaluation.load_weights(encoder, "resnet18", str(path))
        assert torch.equal(encoder.backbone.conv1.weight, source.conv1.weight)
    args = train.parse_args([*TINY, "--backbone", "resnet18", "--weights", str(path)])
    for state, message in (
            ({"model": plain, "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
            ([plain], "not a state_dict but a list"),
            ({"model": "resnet18"}, "not a state_dict but a str"),
            ({"state_dict": {0: 1}}, 'Missing .*"conv1.weight"'),
            (torchvision.models.resnet34().state_dict(), 'Unexpected .*"layer1.2.conv1.weight"'),
            ({**plain, "conv1.weight": torch.ones(3)}, "size mismatch for conv1.weight")):
        torch.save(state, path)
        with pytest.raises(data.UserError, match=f"(?s)weights.pt.*{message}"):
            train.make_model(args)
    for part in ("backbone", "model", "module", "body"):        # networks of one's own
        network = encoder.backbone = nn.ModuleDict({part: nn.Linear(2, 2), "head": nn.Linear(2, 2)})
        for k, prefix in enumerate(("", "module.", "_orig_mod.", "module.model.")):
            plain = {name: torch.full_like(v, k) for name, v in network.state_dict().items()}
            torch.save({prefix + name: v for name, v in plain.items()}, path)
            evaluation.load_weights(encoder, "mine:make", str(path))
            assert same(dict(network.state_dict()), plain)
    torch.save({**plain, **{f"module.{name}": v for name, v in plain.items()}}, path)
    with pytest.raises(data.UserError, match="two of its names become one"):
        evaluation.load_weights(encoder, "mine:make", str(path))
    encoder.backbone = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    torch.save({**encoder.backbone.state_dict(), "1.gamma": torch.ones(2)}, path)
    with pytest.raises(data.UserError, match='Unexpected .*"1.gamma"'):
        evaluation.load_weights(encoder, "mine:make", str(path))
    with pytest.raises(data.UserError, match="nothing.pt: cannot be read .*No such file"):
        evaluation.load_weights(encoder, "resnet18", str(tmp_path / "nothing.pt"))

    def offline(*args, **kwargs):
        raise URLError("no network")
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.DEFAULT.__class__, "get_state_dict",
                        offline)
    with pytest.raises(data.UserError,
                       match="imagenet: those of resnet18 cannot be had .*--weights FILE"):
        evaluation.load_weights(encoder, "resnet18", "imagenet")


# ------------------------------------------------- embeddings in and out

def test_embeddings_are_saved_and_scored_again(tmp_path, capsys):
    make_inshop(tmp_path)
    inshop = ["--dataset", "inshop", "--root", str(tmp_path), "--allow-partial", *ON_REPLICA]
    for k, flags in enumerate((inshop, TINY)):
        train.main([*flags, "--epochs", "0", "--out", str(tmp_path / f"run{k}")])
        capsys.readouterr()
        evaluation.main([str(tmp_path / f"run{k}" / "best.pt"),
                         "--save", str(tmp_path / f"{k}.npz")])
        first = json.loads(capsys.readouterr().out.splitlines()[-1])
        evaluation.main([str(tmp_path / f"{k}.npz")])
        told = capsys.readouterr().out
        again = json.loads(told.splitlines()[-1])
        assert ({k: v for k, v in first.items() if "@" in k}
                == {k: v for k, v in again.items() if "@" in k})
    assert re.search(r"1.npz: query 8\d images of 24 classes", told)
    with np.load(tmp_path / "0.npz") as file:
        assert file["query"].shape == (8, 8) and file["gallery"].dtype == np.float32
        assert file["query_labels"].tolist() == [5, 5, 6, 7, 7, 7, 8, 8]
        assert file["query_names"][0] == "id_00000005/00_1_front.jpg"


@pytest.mark.parametrize("change, message", [
    (dict(query=None), "z.npz: there is no array 'query'$"),
    (dict(query_labels=None), "z.npz: there is no array 'query_labels'$"),
    *((dict(ks=np.array(ks)), "ks must be a list of whole numbers from 1 on")
      for ks in (5, [0, 1], [1.5], [[1]])),
    (dict(query_labels=np.arange(5)), "query_labels integers"),
    (dict(query_labels=np.linspace(0, 1, 6)), "query_labels integers"),
    (dict(query=np.zeros((6, 3, 1))), "query must be floats"),
    (dict(query=np.full((6, 3), np.nan)), "the embeddings hold NaN"),
    (dict(query=np.array([None] * 6)), "cannot be read as embeddings"),
    (dict(galery=np.ones((6, 3))), "unknown arrays galery"),
    (dict(gallery=np.ones((6, 4)), gallery_labels=np.arange(6)), "its width is not that of query"),
    (dict(gallery=np.ones((0, 3)), gallery_labels=np.arange(0)), "gallery is empty"),
    (dict(gallery=np.ones((6, 4))), "there is no array 'gallery_labels'")])
def test_embeddings_of_others_that_do_not_fit_are_refused_with_a_sentence(
        tmp_path, change, message):
    z = np.random.default_rng(0).normal(size=(6, 3))
    arrays = {"query": z, "query_labels": np.arange(6) // 2, **change}
    np.savez(tmp_path / "z.npz", **{name: a for name, a in arrays.items() if a is not None})
    with pytest.raises(SystemExit, match=message):
        evaluation.main([str(tmp_path / "z.npz")])
    np.save(tmp_path / "z.npy", z)
    for content in (b"PK torn", (tmp_path / "z.npy").read_bytes()):
        (tmp_path / "z.npz").write_bytes(content)
        with pytest.raises(SystemExit, match="z.npz: cannot be read as embeddings"):
            evaluation.main([str(tmp_path / "z.npz")])


def test_embeddings_that_cannot_be_written_leave_the_former_ones(tmp_path):
    tiny(tmp_path, "--epochs", "0")
    (tmp_path / "z.npz").write_bytes(b"former")
    (tmp_path / "z.npz.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="z.npz: cannot be written"):
        evaluation.main([str(tmp_path / "best.pt"), "--save", str(tmp_path / "z.npz")])
    assert (tmp_path / "z.npz").read_bytes() == b"former"


def test_a_network_that_has_changed_since_its_checkpoint_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "changes.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8))\n")
    tiny(tmp_path / "run", "--backbone", "changes:make", "--epochs", "0")
    import changes
    monkeypatch.setattr(changes, "make", lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(9)))
    for command in (lambda: evaluation.main([str(tmp_path / "run" / "best.pt")]),
                    lambda: tiny(tmp_path / "run", "--backbone", "changes:make")):
        with pytest.raises(SystemExit, match=r"\.pt: does not fit --backbone changes:make"):
            command()


def test_one_query_is_enough_where_there_is_a_gallery(tmp_path, capsys):
    z = np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "z.npz", query=z[:1], query_labels=[7], gallery=z, gallery_labels=[7, 8, 8])
    evaluation.main([str(tmp_path / "z.npz")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["recall@1"] == 1


@pytest.mark.parametrize("flags, message", [
    ("--save nowhere/z.npz", "in a folder that exists"), ("--save z.txt", "that ends in .npz"),
    ("--workers -1", "must be at least 0"), ("--device cuda:77", "--device cuda:77 cannot be used"),
    ("--plot x", "unrecognized arguments: --plot")])
def test_eval_refuses_wrong_flags_before_any_work(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        evaluation.main(["not-even-there.pt", *flags.split()])
    assert error.value.code == 2 and message in capsys.readouterr().err


def embedding_case():
    torch.manual_seed(0)
    images = data.Images(data.synthetic(classes=110, max_images=8).query, 32, "light")
    return evaluation.Encoder("conv4", 8), images


# ------------------------------------------------- what train.py makes of its flags

def test_presets_are_the_paper_s_run_and_a_gpu_gets_fp16(monkeypatch):
    monkeypatch.setattr(data, "usable_device", lambda *_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    args = train.parse_args(["--dataset", "sop", "--device", "cuda"])
    assert (args.loss, args.amp, args.backbone, args.batch_size, args.workers) == (
        "supcon", "fp16", "resnet50", 64, 6)
    assert train.parse_args(["--dataset", "sop", "--device", "mps"]).amp == "off"
    assert train.parse_args(["--device", "cpu"]).loss == "ms"
    assert train.parse_args(["--backbone", "a:b", "--dataset", "sop"]).weights == "none"
    monkeypatch.setenv("LOCAL_RANK", "3")
    for gpus, device in ((8, "cuda:3"), (1, "cuda:0")):         # 1: a task that sees its own alone
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        assert train.parse_args(["--device", "cuda"]).device == device


def test_the_preset_of_a_folder_freezes_batch_norm_and_starts_the_memory_halfway(
        tmp_path, capsys):
    make_folder(tmp_path / "data")
    flags = ["--dataset", "folder", "--root", str(tmp_path / "data"), *ON_REPLICA]
    settings = train.main([*flags, "--epochs", "3", "--out", str(tmp_path / "a")])[0]["settings"]
    assert settings["bn"] == "frozen" and settings["warmup_steps"] == 1 * (12 // 8)
    epochs = [word.replace("-steps", "-epochs") for word in TINY]
    epochs[epochs.index("--warmup-epochs") + 1] = "1"
    by_epochs = train.main([*epochs, "--out", str(tmp_path / "b")])
    assert strip(by_epochs) == strip(tiny(tmp_path / "c", "--warmup-steps", "5"))
    assert strip(by_epochs) == strip(tiny(tmp_path / "b", "--warmup-steps", "5"))   # it is resumed
    more = train.main([*flags, "--epochs", "6", "--out", str(tmp_path / "a")])  # as it has begun
    assert len(more) == 7 and more[-1]["memory"] == 12
    assert train.parse_args(["--warmup-epochs", "0"]).warmup_epochs == 0
    with pytest.raises(SystemExit):
        train.parse_args(["--warmup-epochs", "1", "--warmup-steps", "5"])
    assert "not allowed with argument" in capsys.readouterr().err


WRONG = {       # flags: part of the sentence
    "--batch-size 18": "batch size 18 must be a multiple of 4 images per class",
    "--batch-size 128": "needs 32 classes and 128 images, the training split has 24",
    "--batch-size 96 --images-per-class 96":
        "needs 1 classes and 96 images, the training split has 24 and 8",
    "--memory-ratio 0.01": "makes a memory of less than one batch, --batch-size 16",
    "--memory-ratio inf": "--memory-ratio: must be above 0 and finite, got inf",
    "--lr nan": "--lr: must be above 0 and finite, got nan",
    "--epochs two": "invalid number value: 'two'",
    "--seed 4294967296": "--seed: must be at least 0 and below 4294967296",
    "--dim 1000000000000": "--dim 1000000000000: .*allocate",
    "--image-size 2": "--image-size 2.*too small",
    "--process-noise 0 --measurement-noise 0": "cannot both be 0",
    "--val-fraction 0.999": "--val-fraction 0.999: there are 0 classes to train on",
    "--val-fraction 0.01": "--val-fraction 0.01: .* 1 classes of [34] images to search",
    "--classes 1": "there are 1 classes to train on",
    "--device abacus": "--device abacus cannot be used",
    "--backbone resnet19": "resnet19", "--backbone nowhere:make": "No module named 'nowhere'",
    "--backbone math:dino": "has no attribute 'dino'", "--chunk -1": "--chunk: must be at least 0",
    "--backbone inception_v3": "not one last linear layer",
    "--backbone vit_b_32": "Wrong image height",
    "--weights nothing.pt": "nothing.pt: cannot be read", "--weights imagenet": "conv4",
    "--method moco": "invalid choice: 'moco'", "--meth axbn": "unrecognized arguments: --meth",
    "--dataset sop --root nowhere --backbone conv4 --weights none": "'sop' is not in nowhere, .*"
    "(?s:.*)data.py --dataset sop --download --root nowhere"}


@pytest.mark.parametrize("flags", WRONG)
def test_train_refuses_wrong_flags_before_any_work(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as error:
        tiny(tmp_path / "run", *flags.split())
    text = f"{capsys.readouterr().err}{error.value.code}"
    assert re.search(WRONG[flags], text), text
    assert not (tmp_path / "run").exists() and "Traceback" not in text


def test_a_device_that_runs_no_kernel_is_told(monkeypatch, capsys):
    class Old:
        def __add__(self, other):
            raise RuntimeError("CUDA error: no kernel image is available for execution")
    monkeypatch.setattr(torch, "ones", lambda *_, **__: Old())
    with pytest.raises(SystemExit):
        train.parse_args(["--device", "cuda:0"])
    assert "--device cuda:0 cannot be used (CUDA error: no kernel image" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder_where_no_shell_says_so(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = train.parse_args(["--out=~/run", "--root=~/data", "--device", "cpu"])
    assert (args.out, args.root) == ("/home/me/run", "/home/me/data")
    args = evaluation.parse_args(["~/run/best.pt", "--root=~/data", "--device", "cpu"])
    assert (str(args.file), args.root) == ("/home/me/run/best.pt", "/home/me/data")


# ------------------------------------------------- the run and its log

def test_train_writes_log_settings_and_checkpoints(tmp_path, capsys):
    records = tiny(tmp_path, "--head-epochs", "1")
    assert records == [json.loads(line)
                       for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1, 2]
    assert list(records[2])[0] == "epoch"
    for key in ("loss", "lr", "gain", "positives_mined", "negatives_mined", "images_per_second",
                "drift_mean", "drift_max", "spread", "recall@1", "recall@10", "map@r"):
        assert math.isfinite(records[2][key]), key
    assert records[2]["drift_max"] >= records[2]["drift_mean"] > 0
    assert records[0]["settings"]["method"] == "axbn"
    recalls = [r["recall@1"] for r in records]
    best = max(recalls)
    assert re.search(rf"Recall@1: last {100 * recalls[2]:.2f} \(epoch 2\), best {100 * best:.2f} ",
                     capsys.readouterr().out.splitlines()[-1])
    for name, recall in (("checkpoint.pt", recalls[2]), ("best.pt", best)):
        evaluation.main([str(tmp_path / name)])
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["recall@1"] == pytest.approx(recall)


def test_train_schedule_and_losses(tmp_path):
    records = tiny(tmp_path, "--epochs", "3", "--lr-drops", "1", "2", "--lr-decay", "0.5",
                   "--loss", "contrastive")
    assert [r["lr"] for r in records[1:]] == [0.001, 0.0005, 0.00025]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_train_is_the_same_whatever_the_number_of_workers(tmp_path, workers):
    none, some = (tiny(tmp_path / w, "--workers", w) for w in ("0", workers))
    assert strip(none) == strip(some)
    a, b = (evaluation.load_file(tmp_path / w / "checkpoint.pt") for w in ("0", workers))
    assert same(a["rng"], b["rng"])                         # or a network with dropout would differ
    assert strip(none)[1:] != strip(tiny(tmp_path / "seed", "--seed", "1"))[1:]


def test_train_names_a_loss_or_gradient_that_is_not_finite(tmp_path):
    with pytest.raises(SystemExit, match="epoch 1, step [1-9]: the loss or its gradient is not "
                                         r"finite; try a lower --lr than 1e\+30"):
        tiny(tmp_path, "--lr", "1e30")
    assert whole_epochs(tmp_path) == 1                          # the checkpoint before it stands
    inf, nan, pairs = math.inf, math.nan, [[4, 4, 4, 4], [2, 4, 6, 8]]
    off, fp16 = (argparse.Namespace(amp=amp, lr=0.1) for amp in ("off", "fp16"))
    for losses, norms, args, steps, message in (
            ([1, inf, 1, 1], [1, 1, nan, 1], off, 9, "step 2: "),
            ([1, 1, nan, 1], [1, inf, 1, 1], off, 9, "step 2: "),
            ([1, 1, nan, 1], [1, inf, 1, 1], fp16, 9, "step 3: .*or --amp bf16"),
            ([1, 1, 1, 1] * 3, [inf, inf, nan, inf] * 3, fp16, 12,      # no step was taken
             "step 1: .*or --amp bf16")):
        with pytest.raises(data.UserError, match=message):
            train.summary(torch.tensor([losses, norms, losses, losses]), 1, steps, args)
    skipped = torch.tensor([[1, 0, 1, 1], [inf, 1, nan, nan], *pairs])
    assert train.summary(skipped, 1, 4, fp16) == {
        "loss": 0.75, "gradient_norm": 1, "steps_skipped": 3, "steps_without_pairs": 1,
        "positives_mined": 4, "negatives_mined": 5}
    skipped[1, 1] = inf
    train.summary(skipped, 1, 9, fp16)                              # the epoch is not over yet


def test_train_counts_steps_without_pairs_and_warns_of_a_collapse(tmp_path, capsys, monkeypatch):
    record = tiny(tmp_path / "a", "--epochs", "1")[1]
    assert record["steps_without_pairs"] == record["steps_skipped"] == 0
    assert 0.1 < record["spread"] <= 1 and record["gradient_norm"] > 0 and "warning" not in record
    flags, spread = ("--epochs", "1", "--method", "none"), 0.0

    def fake(self, x):
        noise = torch.randn(len(x), 16, generator=torch.Generator().manual_seed(0))
        return self.head.bias.expand(len(x), -1) * 5 + spread * noise
    monkeypatch.setattr(evaluation.Encoder, "forward", fake)
    record = tiny(tmp_path / "b", *flags, "--loss", "supcon")[1]    # cosines of 1: no hard positive
    assert record["steps_without_pairs"] == 5 and record["loss"] == 0 and record["recall@1"] == 0
    assert "no step of the epoch had a pair" in record["warning"]
    record = tiny(tmp_path / "c", *flags)[1]                        # with MS there are pairs
    assert ("collapsed" in record["warning"]
            and "warning: the embeddings have" in capsys.readouterr().out)
    record["steps_without_pairs"] = 0
    assert "collapsed" in train.warning({**record, "spread": 0.1}, 5)   # a mean cosine of 0.99
    assert train.warning({**record, "spread": 0.297}, 5) == ""
    spread = math.nan
    with pytest.raises(SystemExit, match="embeddings hold NaN or infinity"):
        tiny(tmp_path / "d", *flags)


def test_train_in_fp16_skips_and_counts_steps_whose_scaled_gradient_overflows(
        tmp_path, monkeypatch):
    make_model, calls = train.make_model, []

    def overflow(gradient):
        calls.append(1)
        return gradient * math.inf if len(calls) in (2, 4) else gradient

    def hooked(args):
        model = make_model(args)
        model.head.weight.register_hook(overflow)
        return model
    monkeypatch.setattr(train, "make_model", hooked)
    record = tiny(tmp_path, "--epochs", "1", "--amp", "fp16")[1]
    assert record["steps_skipped"] == 2 and math.isfinite(record["loss"] + record["gradient_norm"])
    state = evaluation.load_file(tmp_path / "checkpoint.pt")
    assert all(v.isfinite().all() for part in ("model", "criterion") for v in state[part].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_in_fp16_makes_the_host_wait_nowhere(method, monkeypatch):
    args = train.parse_args([*TINY, "--method", method, "--device", "cuda", "--amp", "fp16"])
    _, splits, _, sampler = train.load_data(args)
    model = train.make_model(args)
    criterion = train.make_criterion(args, model.dim, splits.train)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batches = data.loader(data.Images(splits.train, 16, "none", training=True), pin_memory=True,
                          batch_sampler=data.Seeded(sampler))
    parts = (batches, model, model, criterion, optimizer, torch.amp.GradScaler("cuda"))
    train.train_epoch(1, args, *parts)                          # the first one sets cuDNN up
    monkeypatch.setattr(train.Measured, "record", lambda *_: None)      # the end may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.train_epoch(2, args, *parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_measuring_leaves_no_trace_in_the_training(tmp_path, monkeypatch):
    """Drift is measured at every step, and then at none."""
    record = tiny(tmp_path / "every", "--epochs", "1")[1]
    assert record["drift_max"] > record["drift_mean"] > 0
    monkeypatch.setattr(train.Measured, "drift", lambda *_: None)
    monkeypatch.setattr(train, "fmean", lambda values: 0.0)                 # of nothing
    tiny(tmp_path / "none", "--epochs", "1")
    assert same(*(evaluation.load_file(tmp_path / run / "checkpoint.pt")["model"]
                  for run in ("every", "none")))


def test_eq5_drift_is_the_distance_that_a_step_moves_its_batch():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 5)), rows(8, 12)
    model, x = model.double(), x.view(8, 3, 2, 2)
    measured = train.Measured(1, 1, argparse.Namespace(device="cpu", amp="off"))
    state, z = train.random_state("cpu"), model(x)
    with torch.no_grad():
        model[2].weight += 0.1
    measured.drift(model, x, z, state)
    before, now = (t / np.linalg.norm(t, axis=1, keepdims=True)
                   for t in (z.detach().numpy(), model(x).detach().numpy()))
    np.testing.assert_allclose(measured.drifts[0], np.linalg.norm(now - before, axis=1), rtol=1e-5)
    np.testing.assert_allclose(measured.spreads[0], np.linalg.norm(before.std(0)), rtol=1e-5)


def test_no_drift_is_measured_where_no_weight_moves_whatever_is_random(tmp_path):
    flags = ("--backbone efficientnet_b0 --classes 8 --image-size 32 --batch-size 8 --epochs 1 "
             "--lr 1e-30 --weight-decay 0").split()         # it has stochastic depth
    record = tiny(tmp_path, *flags)[1]
    assert record["drift_max"] == 0 < record["spread"]


def test_log_counts_the_pairs_that_the_loss_mined(tmp_path, monkeypatch):
    counted = []

    def spy(sim, positive, negative):
        counted.append([int(mask.sum())
                        for mask in acbn.pair_margin(sim, positive, negative, 0.2, 0.8)])
        return acbn.mined_supcon_loss(sim, positive, negative)
    monkeypatch.setitem(train.LOSSES, "supcon", (spy, acbn.pair_margin))
    for method in ("none", "axbn"):
        counted.clear()
        record = tiny(tmp_path / method, "--method", method, "--loss", "supcon", "--epochs", "1")[1]
        assert ([record["positives_mined"], record["negatives_mined"]]
                == np.mean(counted, 0).tolist())


def test_filling_the_memory_leaves_no_trace_and_gives_every_process_the_same_rows(
        tmp_path, monkeypatch):
    fill, filled = train.fill_memory, []

    def watched(model, criterion, images, args):
        model.head = nn.Sequential(nn.Dropout(), model.head)
        weights = copy.deepcopy(model.state_dict())
        for rank in (0, 1):
            torch.manual_seed(rank)                         # as each process has its own dropout
            before = torch.get_rng_state()
            criterion.memory.reset()
            fill(model, criterion, images, args)
            filled.append(criterion.memory.embeddings.clone())
            assert torch.equal(before, torch.get_rng_state()) and model.training
        assert same(model.state_dict(), weights)
        assert len(filled[0]) == criterion.memory.size // 16 * 16
        assert torch.equal(*filled) and len(criterion.memory.labels.unique()) > 10
    monkeypatch.setattr(train, "fill_memory", watched)
    tiny(tmp_path, "--fill-memory")
    assert len(filled) == 2                                 # it is filled once in a run


@pytest.mark.parametrize("name", MAKE)
def test_scripts_train_and_evaluate_on_each_replica(tmp_path, name, capsys):
    (tmp_path / "data").mkdir()
    MAKE[name](tmp_path / "data")
    flags = ["--dataset", name, "--root", str(tmp_path / "data"), "--allow-partial"]
    data.main([*flags, "--check"])
    assert "gallery" in capsys.readouterr().out
    fraction = {"df2": "0.25", "folder": "0", "sop": "0"}.get(name, "0.5")
    records = train.main([*flags, *ON_REPLICA, "--epochs", "1", "--out", str(tmp_path / "run"),
                          "--val-fraction", fraction])
    held_out = "held-out training classes" in capsys.readouterr().out
    assert held_out == ("val_recall@1" in records[-1]) == (fraction != "0")
    evaluation.main([str(tmp_path / "run" / "checkpoint.pt"), "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recall@1"] == pytest.approx(records[-1]["recall@1"])


# ------------------------------------------------- resume

def same(a, b):
    """Whether two checkpoints hold the same bits; times, --out and --epochs aside."""
    if isinstance(a, dict):
        free = {"images_per_second", "eval_seconds", "out", "epochs"}
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in free)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("flags", [
    *(f"--method {method} --fill-memory" for method in METHODS), "--loss tempered",
    "--chunk 6 --workers 1 --val-fraction 0.3 --deterministic"])
def test_train_resumes_exactly(tmp_path, flags, capsys, monkeypatch):
    conv4, flags = evaluation.conv4, [*flags.split(), "--epochs", "3"]
    monkeypatch.setattr(evaluation, "conv4", lambda batch_norm: nn.Sequential(
        conv4(batch_norm), nn.Dropout(0.2)))            # draws from the global random numbers
    monkeypatch.setitem(train.LOSSES, "tempered", (Tempered(), acbn.pair_margin))
    whole = tiny(tmp_path / "whole", *flags)
    for epochs in "13":
        parts = tiny(tmp_path / "parts", *flags, "--epochs", epochs)
    torch.use_deterministic_algorithms(False)
    assert strip(whole) == strip(parts) and "after epoch 1" in capsys.readouterr().out
    for name in ("checkpoint.pt", "best.pt"):
        assert same(*(evaluation.load_file(tmp_path / n / name) for n in ("whole", "parts")))
    criterion = evaluation.load_file(tmp_path / "whole" / "checkpoint.pt")["criterion"]
    assert criterion.get("loss.loss.log_t", 0) != -1            # a loss's own parameter has moved


def momentum(parameters, lr, weight_decay, fused):
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, fused=fused)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, momentum])
def test_train_resumes_the_same_whatever_the_layout_of_the_moments(
        tmp_path, optimizer, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    flags = ("--classes", "9", "--batch-size", "8")
    tiny(tmp_path / "a", *flags, "--epochs", "1")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    state, laid_out = evaluation.load_file(tmp_path / "b" / "checkpoint.pt"), 0
    for moments in state["optimizer"]["state"].values():
        for name, t in moments.items():
            if t.ndim == 4:                                     # as another device had it
                laid_out += t.shape[1] > 1 and t.shape[2] > 1
                moments[name] = t.contiguous(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "b" / "checkpoint.pt")
    a, b = (tiny(tmp_path / run, *flags) and evaluation.load_file(tmp_path / run / "checkpoint.pt")
            for run in ("a", "b"))
    assert laid_out > 2 and same(a["model"], b["model"])


def test_random_numbers_are_those_of_the_cpu_and_of_the_device_of_the_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)      # is not even asked
    assert train.random_state("cpu").keys() == {"cpu"}
    states = [torch.tensor([7])]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    state = train.random_state("mps:0")
    assert state["mps"] == 7 and state["cpu"].numel() > 1000
    states.append(torch.tensor([8]))
    with train.without_trace(nn.Linear(1, 1), "mps", state):
        assert states[-1] == 7
    assert states[-1] == 8
    train.set_random_state("cpu", state)                        # a run that goes on with a CPU


def whole_epochs(out):
    """Counts logged epochs; fails on a torn or doubled line, or a checkpoint that does not fit."""
    log = out / "log.jsonl"
    epochs = ([json.loads(line)["epoch"] for line in log.read_text().splitlines()]
              if log.exists() else [])
    assert epochs == list(range(len(epochs)))
    if (out / "checkpoint.pt").exists():
        assert (evaluation.rebuild(out / "checkpoint.pt")[1]["epoch"] + 1
                in (len(epochs), len(epochs) + 1))
    return len(epochs)


def test_train_ends_at_once_at_ctrl_c_and_leaves_the_folder_free(tmp_path):
    flags = [*TINY, "--workers", "2", "--epochs", "9999", "--classes", "60", "--out", tmp_path]
    run = subprocess.Popen([sys.executable, HERE / "train.py", *flags], cwd=HERE, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while (line := run.stdout.readline()) and not line.startswith("epoch"):
            pass
        time.sleep(0.5)
        os.killpg(run.pid, signal.SIGINT)           # as a terminal does: it goes to the workers too
        code, words = run.wait(60), run.communicate(timeout=60)[1]
        assert code == -signal.SIGINT and 'train.py", line' not in words, words
    finally:
        run.kill()
    assert whole_epochs(tmp_path) > 0
    train.claim(tmp_path).close()


def test_run_knows_the_data_that_it_was_trained_on(tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "run"
    make_folder(root, "klmnop")
    flags = ["--dataset", "folder", *ON_REPLICA, "--epochs", "1", "--out", str(out), "--root"]
    train.main([*flags, str(root)])
    shutil.copytree(root, tmp_path / "moved")
    evaluation.main([str(out / "best.pt"), "--root", str(tmp_path / "moved")])
    train.main([*flags, str(tmp_path / "moved"), "--workers", "1"])
    (tmp_path / "moved" / "p").rename(tmp_path / "moved" / "a")
    make_folder(root, "ab")
    for other in (root, tmp_path / "moved"):
        with pytest.raises(SystemExit, match="best.pt: was made with other data than lie in"):
            evaluation.main([str(out / "best.pt"), "--root", str(other)])
        with pytest.raises(SystemExit, match="checkpoint.pt: was made with other data"):
            train.main([*flags, str(other), "--epochs", "2"])
        evaluation.main([str(out / "best.pt"), "--dataset", "folder", "--root", str(other)])
        told = capsys.readouterr()
        assert "note: " in told.err and "recall@1" in told.out


def test_a_log_without_its_checkpoint_is_kept_and_a_memory_that_never_starts_is_told(
        tmp_path, capsys):
    tiny(tmp_path, "--epochs", "1", "--warmup-steps", "5")
    assert ("warning: --warmup-steps 5: the memory does not start in 1 epochs"
            in capsys.readouterr().out)
    log = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(SystemExit, match="holds a log without its checkpoint"):
        tiny(tmp_path, "--epochs", "1", "--warmup-steps", "5")
    assert log == (tmp_path / "log.jsonl").read_bytes()


# ------------------------------------------------- broken files, disks and terminals

def test_checkpoints_that_do_not_fit_are_refused_with_a_sentence(tmp_path):
    tiny(tmp_path, "--epochs", "0")
    path = tmp_path / "checkpoint.pt"
    good, whole_log = torch.load(path, weights_only=True), (tmp_path / "log.jsonl").read_text()
    torn = path.read_bytes()[:9999]
    with pytest.raises(SystemExit, match="was made with --lr 0.001, now it is 0.01"):
        tiny(tmp_path, "--lr", "0.01")
    for other, message in (({**good, "format": 1}, "not a checkpoint of this version of train.py"),
                           ({"state_dict": {}}, "not a checkpoint of this version"),
                           ({**good, "rng": []}, "made with 0 processes"),
                           ([1], "not a checkp"), (b"torn", "cannot be read as a checkpoint"),
                           (torn, "cannot be read as a checkpoint")):
        path.write_bytes(other) if isinstance(other, bytes) else torch.save(other, path)
        with pytest.raises(SystemExit, match=f"checkpoint.pt: .*{message}"):
            tiny(tmp_path)
        assert whole_log == (tmp_path / "log.jsonl").read_text()
    with pytest.raises(SystemExit, match="cannot be read as a checkpoint"):
        evaluation.main([str(path)])


def test_write_on_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    tiny(tmp_path, "--epochs", "1")
    for name in ("checkpoint.pt", "log.jsonl"):
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        (tmp_path / f"{name}.part").symlink_to("/dev/full")   # every write: no space left on device
        with pytest.raises(SystemExit, match=f"{name}: cannot be written .*"
                           "(No space left|failed writing|unexpected pos)"):
            tiny(tmp_path, "--epochs", "2")
        (tmp_path / f"{name}.part").unlink()
        assert before[name] == (tmp_path / name).read_bytes() and whole_epochs(tmp_path)
    tiny(tmp_path), tiny(tmp_path / "whole")
    assert same(*(evaluation.load_file(out / "checkpoint.pt")
                  for out in (tmp_path, tmp_path / "whole")))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):       # a folder that cannot be made
        tiny(tmp_path / "file" / "run")


@pytest.mark.parametrize("code, fails", [("EINVAL", False), ("EIO", True)])
def test_a_disk_without_fsync_is_written_to_and_a_broken_one_is_named(
        tmp_path, monkeypatch, code, fails):
    def fsync(_):
        raise OSError(getattr(errno, code), "of the disk")
    monkeypatch.setattr(os, "fsync", fsync)
    with (pytest.raises(SystemExit, match="best.pt: cannot be written .*of the disk") if fails
          else contextlib.nullcontext()):
        assert len(tiny(tmp_path, "--epochs", "0")) == 1


def test_a_disk_without_locks_refuses_nothing(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert len(tiny(tmp_path, "--epochs", "0")) == 1


def test_two_runs_cannot_write_into_one_folder(tmp_path):
    tiny(tmp_path, "--epochs", "0")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with train.claim(tmp_path):                                 # this process is the first run
        second = script("train.py", *TINY, "--out", tmp_path)
    assert second.returncode == 1 and "another run is writing there" in second.stderr
    assert "Traceback" not in second.stderr
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(tiny(tmp_path, "--epochs", "1")) == 2            # the lock left nothing behind


def test_file_names_that_are_no_utf8(tmp_path):
    make_folder(tmp_path / "data")
    odd = os.fsdecode(os.fsencode(tmp_path / "data" / "class4") + b"/\xff\xe9.jpg")
    (tmp_path / "data" / "class4" / "16.jpg").rename(odd)
    flags = ["--dataset", "folder", "--root", str(tmp_path / "data")]
    train.main([*flags, *ON_REPLICA, "--epochs", "0", "--out", str(tmp_path / "run")])
    evaluation.main([str(tmp_path / "run" / "best.pt"), "--device", "cpu",
                     "--save", str(tmp_path / "z.npz")])


@pytest.mark.parametrize("command", ["data.py --classes 3", "train.py --epochs 0 --classes 8 --out "
                                     "OUT --image-size 16 --batch-size 8 --device cpu"])
def test_scripts_run_without_a_standard_output(tmp_path, command):
    words = command.replace("OUT", str(tmp_path / "run"))
    done = subprocess.run(f"{sys.executable} {words} >&-", shell=True, cwd=HERE, text=True,
                          stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    with contextlib.redirect_stdout(argparse.Namespace()):      # as Jupyter's: no reconfigure
        data.tolerate_terminal()


def test_scripts_fail_with_one_sentence_and_without_a_traceback(tmp_path):
    make_sop(tmp_path, train=(4, 4, 4, 4), test=(4, 4))
    base = tmp_path / "Stanford_Online_Products"
    odd = os.fsdecode(b"bicycle_final/\xff.JPG")            # no UTF-8, and no terminal can print it
    victim = sorted((base / "bicycle_final").iterdir())[1].rename(base / odd)
    lists = (base / "Ebay_train.txt").read_bytes()
    lists = lists.replace(b"bicycle_final/110000000001_1.JPG", os.fsencode(odd))
    (base / "Ebay_train.txt").write_bytes(lists)
    victim.write_bytes(b"broken")
    sop = ["--dataset", "sop", "--root", tmp_path, "--allow-partial"]
    conv4 = ("--backbone conv4 --weights none --head-epochs 0 --batch-size 8 --device cpu "
             "--workers 2 --out").split()
    result = script("train.py", *sop, *conv4, tmp_path / "run", PYTHONIOENCODING="ascii")
    assert (".JPG: cannot be read as an image" in result.stderr
            and result.returncode == 1), result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------- several processes

# Two gloo processes with half the batch each, against one process with the whole batch.

# A small rate: AdamW makes a step of any sign of a rounded gradient near zero, which would add up.
DISTRIBUTED = [*TINY, *"--backbone conv4-nobn --head-epochs 1 --lr 1e-5 --chunk 6".split()]
OF_TWO = {**{method: ["--method", method] for method in METHODS},
          "tempered": ["--loss", "tempered"],           # a loss with a parameter
          "unused": ["--backbone", "unused:Net", "--method", "none"]}   # one without a gradient

UNUSED = """from torch import nn, zeros
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(768, 8))
        self.mask_token = nn.Parameter(zeros(8))
"""


def one_of_two(rank, port, out):
    """What a process does: it embeds its share of a split; a run with batch norm; and for each
    method an epoch and a resumed second one. It keeps what it got.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    train.LOSSES["tempered"] = Tempered(), acbn.pair_margin
    sys.path.append(str(out))
    for name, flags in OF_TWO.items():
        args = [*DISTRIBUTED, *flags, "--out", str(out / name)]
        memories, enqueue = [], CrossBatchMemory.enqueue

        def spy(memory, *batch):
            slots = enqueue(memory, *batch)
            memories.append(memory.all_embeddings.clone())
            return slots
        CrossBatchMemory.enqueue = spy
        train.main([*args, "--epochs", "1"])
        train.main(args)
        CrossBatchMemory.enqueue = enqueue
        torch.save(memories, out / f"{name}-{rank}.pt")
    read, getitems = [], data.Images.__getitems__
    data.Images.__getitems__ = lambda self, keys: read.extend(keys) or getitems(self, keys)
    z, _ = evaluation.embed(*embedding_case())
    torch.save((z, read), out / f"{rank}.pt")
    tiny(out / "bn")
    if rank == 0:
        shutil.copytree(out / "none", out / "apart0")           # the other one finds nothing
    try:
        train.main([*DISTRIBUTED, "--method", "none", "--out", str(out / f"apart{rank}")])
    except SystemExit as error:     # pytest.raises would keep DDP alive, beyond the process group
        (out / f"apart-{rank}.txt").write_text(str(error))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def of_two(tmp_path_factory):
    """The folder that two such processes wrote."""
    out = tmp_path_factory.mktemp("two")
    (out / "unused.py").write_text(UNUSED)
    torch.multiprocessing.spawn(one_of_two, (free_port(), out), nprocs=2)
    return out


def test_embedding_is_shared_by_two_processes_and_the_same_to_the_last_bit(of_two):
    z, _ = evaluation.embed(*embedding_case())
    (a, read), (b, others) = (torch.load(of_two / f"{rank}.pt", weights_only=True)
                              for rank in (0, 1))
    assert torch.equal(a, z) and torch.equal(b, z) and len(z) > 512
    assert sorted(read + others) == list(range(len(z))) and min(len(read), len(others)) >= 256


def test_two_processes_train_as_one(of_two, tmp_path, monkeypatch):
    monkeypatch.setitem(train.LOSSES, "tempered", (Tempered(), acbn.pair_margin))
    monkeypatch.syspath_prepend(of_two)
    for method, flags in OF_TWO.items():
        expected = train.main([*DISTRIBUTED, *flags, "--out", str(tmp_path / "one" / method)])
        got = [json.loads(line)
               for line in (of_two / method / "log.jsonl").read_text().splitlines()]
        assert [r["loss"] for r in got[1:]] == pytest.approx(
            [r["loss"] for r in expected[1:]], rel=1e-4)
        one, two = (torch.load(path / "checkpoint.pt", weights_only=True)
                    for path in (tmp_path / "one" / method, of_two / method))
        for name, weight in one["model"].items():
            assert (two["model"][name] - weight).abs().mean() < 1e-6
        for a, b in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values()):
            a, b = a["exp_avg"], b["exp_avg"]       # of the gradients
            assert (a - b).norm() <= 1e-3 * a.norm()
        mine, other = (torch.load(of_two / f"{method}-{rank}.pt", weights_only=True)
                       for rank in (0, 1))
        assert len(mine) == len(other) and all(torch.equal(a, b) for a, b in zip(mine, other))
        assert (method in ("none", "unused")) == (len(mine) == 0)


def test_processes_that_find_different_checkpoints_end_with_a_sentence(of_two):
    for rank in (0, 1):         # as on two machines without a common disk
        assert ("the processes find different checkpoints"
                in (of_two / f"apart-{rank}.txt").read_text())


def test_several_processes_that_torchrun_did_not_start_are_refused(tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit,
                       match="WORLD_SIZE is set as if torchrun .*RANK expected, but not set"):
        tiny(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_processes_score_the_network_that_they_save(of_two, capsys):
    logged = json.loads((of_two / "bn" / "log.jsonl").read_text().splitlines()[-1])
    evaluation.main([str(of_two / "bn" / "checkpoint.pt"), "--device", "cpu"])
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])       # batch norm differs by rank
    assert scored["map@r"] == pytest.approx(logged["map@r"], abs=1e-9)


def test_a_process_that_dies_ends_the_others(tmp_path):
    (tmp_path / "dies.py").write_text(
        "import os, signal, train\n"
        "summary = train.summary\n"
        "def dies(seen, epoch, *rest):\n"
        "    if epoch == 2 and train.rank_and_world()[0] == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return summary(seen, epoch, *rest)\n"
        "train.summary = dies\n"
        "train.main()\n")
    result = script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    tmp_path / "dies.py", *DISTRIBUTED, "--out", tmp_path / "run",
                    OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    assert result.returncode == 1 and "SIGKILL" in result.stderr
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [0, 1]
    assert evaluation.rebuild(tmp_path / "run" / "checkpoint.pt")[1]["epoch"] == 1


# ------------------------------------------------- the README

STANDS_FOR = {"$s": "0", "$m": "xbn", "$bn": "frozen", "$loss": "ms", "W": "9", "B": "16",
              "LR": "1e-3", "METHOD": "xbn", "M": "0.5", "S": "0"}
PARSERS = {"train.py": train.parse_args, "eval.py": evaluation.parse_args,
           "data.py": data.parse_args}


def readme_blocks(language, path="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / path).read_text(), re.S)


def readme_block(text, language="python"):
    """The README's only block of that language with this text in it."""
    (block,) = [block for block in readme_blocks(language) if text in block]
    return block


def readme_section(title):
    return (HERE / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def accept_commands(path, parsers):
    """Gives the commands of a README to the scripts' parsers; returns the scripts it has seen."""
    lines = "\n".join(readme_blocks("bash", path)).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python (?:train|eval|data|results/\w+)\.py|torchrun) [^`]*)`",
                        (HERE / path).read_text())
    seen = set()
    for command in (part.strip() for line in lines for part in re.split("&&|;", line)):
        words = shlex.split(re.sub(r"^do ", "", command), comments=True)
        if words[:1] == ["torchrun"]:
            words = ["python", *words[2:]]
        if words[:1] == ["python"] and words[1] in parsers:
            parsers[words[1]]([STANDS_FOR.get(word, word) for word in words[2:]])
            seen.add(words[1])
        elif words:
            assert words[0] in ("python", "for", "do", "done", "apt-get", "dpkg-deb"), command
    return seen


def test_readme_commands_are_accepted_by_the_scripts():
    assert accept_commands("README.md", PARSERS) == PARSERS.keys()


def test_readme_first_snippet_runs_beside_acbn_alone(tmp_path):
    shutil.copy(HERE / "acbn.py", tmp_path)
    source = readme_block("for epoch in") + "\nprint(len(criterion.memory), loss.isfinite())\n"
    (tmp_path / "mine.py").write_text(source)
    done = subprocess.run([sys.executable, "-c",
                           "import sys; sys.path.insert(0, '.'); import mine"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["192", "tensor(True)"], done.stderr


def test_readme_snippet_of_parts_keeps_a_queue_near_its_fresh_keys():
    parts, distances = readme_block("def loss_of(queries"), []
    for source in (parts, re.sub(r".*match_moments\(memory.*\n", "    pass\n", parts)):
        scope, g = {}, torch.Generator().manual_seed(0)
        exec(source, scope)
        images, A, b = torch.randn(4096, 128, generator=g), torch.ones(128), torch.zeros(128)
        for step in range(100):                     # the encoder A x + b drifts; 64 keys a step
            A = A * (1 + 0.1 * torch.randn(128, generator=g))
            b = b + 0.1 * torch.randn(128, generator=g)
            batch = 64 * (step % 64) + torch.arange(64)
            keys = acbn.normalize(A * images[batch] + b)
            queries = keys.clone().requires_grad_()
            scope["loss_of"](queries, keys, batch // 4).backward()
            assert queries.grad.isfinite().all()
        kept = (torch.arange(100 - 32, 100) % 64 * 64)[:, None] + torch.arange(64)  # newest 2,048
        fresh = acbn.normalize(A * images[kept.flatten()] + b)
        stored = acbn.normalize(oldest_first(scope["memory"]))
        distances.append((stored - fresh).norm(dim=1).mean().item())
    assert distances[0] < distances[1] / 2


def test_readme_line_of_pytorch_metric_learning_is_replaced_by_the_same_loss():
    pytest.importorskip("pytorch_metric_learning")
    old, new = re.findall(r"^[-+](criterion = .*)$", readme_block("steps // 2", "diff"), re.M)
    new, scope = new.replace('"xbn", warmup_steps=steps // 2', '"xbm"'), {"device": "cpu"}
    exec("from acbn import CrossBatchLoss\n"
         "from pytorch_metric_learning.losses import CrossBatchMemory, MultiSimilarityLoss\n"
         "from pytorch_metric_learning.miners import MultiSimilarityMiner\n"
         f"{old}\nold = criterion\n{new}\n", scope)
    for k in range(4):
        y = torch.arange(48) // 4
        z = (rows(12, 128, seed=9)[y] + 1.5 * rows(48, 128, seed=k)).float()
        value = scope["criterion"](z, y)
        torch.testing.assert_close(value, scope["old"](z, y), rtol=1e-4, atol=1e-5)
        assert value > 0.1


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "ContrastiveLoss", "TripletMarginLoss",
                                  "CircleLoss"])
def test_readme_line_runs_any_loss_of_pytorch_metric_learning_on_an_adapted_memory(name):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    scope = {"pair_masks": acbn.pair_masks, "normalize": acbn.normalize}
    exec(readme_block("def any_loss"), scope)
    theirs, memory = getattr(losses, name)(), CrossBatchMemory(8, 24)
    for k in range(4):
        z = rows(12, 8, seed=k, dtype=torch.float32).requires_grad_()
        y = torch.arange(12) // 3 + k % 2
        memory.embeddings.copy_(acbn.match_moments(memory.embeddings, *acbn.moments(z.detach())))
        own = memory.enqueue(z.detach(), y)
        value = scope["any_loss"](theirs, z, y, memory, own)
        (grad,) = torch.autograd.grad(value, z)
        assert value > 0 and grad.isfinite().all() and grad.any()
    if name == "MultiSimilarityLoss":           # the one that is here too, without its mining
        sim = acbn.normalize(z) @ acbn.normalize(memory.embeddings).T
        positive, negative = acbn.pair_masks(y, memory.labels, own)
        expected = acbn.multi_similarity_loss(sim, positive, negative, 2, 50, 0.5, margin=9)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_readme_snippet_of_new_images_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "runs" / "synthetic-axbn-ms-b16-s0", "--epochs", "0")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    with pytest.raises(SystemExit, match="no pictures in photos/"):
        exec(readme_block("no pictures in"), {})
    for k in range(6):
        jpeg(tmp_path / "photos" / "a" / f"{k}.{('jpg', 'JPEG', 'png')[k % 3]}", k)
    capsys.readouterr()
    exec(readme_block("no pictures in"), {})
    assert sorted(capsys.readouterr().out.split()) == [
        "photos/a/1.JPEG", "photos/a/2.png", "photos/a/3.jpg", "photos/a/4.JPEG", "photos/a/5.png"]


def test_readme_snippet_of_several_labels_equals_a_loop():
    scope, g = {}, torch.Generator().manual_seed(0)
    exec(readme_block("def loss_of(queries") + readme_block("def loss_of(z, ids)"), scope)
    labels = scope["labels"] = torch.rand(1000, 20, generator=g) < 0.1
    for k in range(3):
        z, ids = rows(12, 128, seed=k, dtype=torch.float32), torch.randperm(1000, generator=g)[:12]
        value, memory = scope["loss_of"](z, ids), scope["memory"]
        sim = z @ acbn.normalize(memory.embeddings).T
        share, n = torch.tensor([[bool((labels[i] & labels[j]).any()) for j in memory.labels]
                                 for i in ids]), len(memory)
        others = torch.arange(n) != torch.arange(n - 12, n)[:, None]    # all but an anchor's own
        expected = supcon_twin(sim.double().numpy(), *((mask & others).numpy()
                                                       for mask in (share, ~share)))
        assert value.item() == pytest.approx(expected, rel=1e-4) and (share & others).any()


def test_readme_line_of_pairs_without_classes():
    (line,) = re.findall(r"`(criterion\(torch.cat.*)`", (HERE / "README.md").read_text())
    loss, z = Recorder(), rows(5, 8)
    exec(line, {"criterion": CrossBatchLoss(8, 1, "none", loss), "torch": torch,
                "z_sketch": z, "z_photo": z + 0.1, "pair": torch.arange(5)})
    assert torch.equal(loss.positive, torch.eye(10).roll(5, 1) > 0)


def test_readme_snippet_of_ones_own_network_gets_pixels_from_minus_1_to_1(monkeypatch):
    timm = argparse.Namespace(create_model=lambda *_, **__: nn.Identity())
    monkeypatch.setitem(sys.modules, "timm", timm)
    scope, model = {}, evaluation.Encoder("conv4", 8)
    exec(readme_block("import timm"), scope)
    x = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    torch.testing.assert_close(scope["vit"]()((x - model.mean) / model.std), x / 127.5 - 1)


def test_readme_snippet_of_parts_of_a_batch_gives_the_gradient_of_the_whole():
    encoder, y = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), torch.arange(40) // 4
    scope = {"torch": torch, "encoder": encoder, "images": rows(40, 6, dtype=torch.float32)}
    exec(readme_block("import checkpoint"), scope)

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*encoder.parameters()])])
    criterion, parts = (CrossBatchLoss(5, 80, "xbn", acbn.supcon_loss) for _ in range(2))
    whole = gradient(copy.deepcopy(criterion)(encoder(scope["images"]), y))
    torch.testing.assert_close(gradient(criterion(scope["z"], y)), whole)
    wrong = gradient(sum(parts(z, labels) for z, labels in zip(
        encoder(scope["images"]).split(16), y.split(16))) / 3)
    assert (wrong - whole).norm() > 0.2 * whole.norm()


def test_readme_explains_every_field_of_the_log(tmp_path):
    records = tiny(tmp_path, "--val-fraction", "0.3", "--epochs", "1")
    table = readme_section("What the log says")
    for field in {field for record in records for field in record} - {"epoch"}:
        assert f"`{re.sub(r'recall@.*', 'recall@K', field.removeprefix('val_'))}`" in table, field


def test_readme_names_functions_and_their_tests_as_they_are():
    section = readme_section("Algorithm 1, line by line")
    proofs = set(re.findall(r"`(test_\w+)`", section))
    assert len(proofs) > 8 and all(inspect.isfunction(globals().get(name)) for name in proofs)
    rows = [row.split("|")[1:-1] for row in re.findall(r"^\|.*", section, re.M)[2:]]
    for _, code, proof in rows:
        assert "`test_" in proof
        (name,) = re.findall(r"`([\w.]+)`", code)
        homes = [home for home in (acbn, train) if hasattr(home, name.split(".")[0])]
        assert homes and inspect.isfunction(functools.reduce(getattr, name.split("."), homes[0]))
