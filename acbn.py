# SPDX-License-Identifier: MIT
"""Adaptive Cross Batch Normalization: a cross-batch memory that keeps up with the network.

XBN and AXBN are by Ajanthan, Ma, van den Hengel and Gould, "Adaptive Cross Batch Normalization for
Metric Learning", arXiv 2303.17127. Sections, equations and lines of Algorithm 1 below are those of
that paper. The memory is XBM, by Wang, Zhang, Huang and Scott, arXiv 1912.06798. This file needs
torch alone: copy it. Version 1.0, 27 November 2026.

    >>> criterion = CrossBatchLoss(dim=16, size=256, method="axbn")     # remembers 256 embeddings
    >>> encoder = torch.nn.Linear(8, 16)
    >>> for _ in range(3):
    ...     x, labels = torch.randn(32, 8), torch.arange(32) // 4       # 8 classes x 4 images
    ...     criterion(encoder(x), labels).backward()
    >>> len(criterion.memory)
    96

A training call writes into the memory. So call the criterion once a step, on the whole batch
(gathered, if there are several processes), outside DDP, DataParallel and activation checkpointing,
and keep it in float32 or float64.

One step: normalise the batch, adapt the memory to it, write the batch over the oldest rows, and
compare the batch's anchors with the whole memory, which now holds the batch itself. The memory has
no gradient. XBN, EMA and AXBN adapt: they estimate the embeddings' mean and deviation, move these
estimates by a fraction K, the gain, towards the moments of each batch, and then shift and scale the
memory to them. XBN has K = 1, EMA a constant K = 1 - momentum, AXBN the gain of a Kalman filter.

Symbols (paper | here | shape):
    B-bar      | z, y: embeddings and labels of the batch            | (B, D), (B,)
    R-bar      | memory: the last M embeddings and labels (n so far) | (M, D), (M,)
    E[.], s[.] | mean and standard deviation over the rows           | (D,), (D,)
    mu^, s^    | self.mean, self.std: the estimates                  | (D,), (D,)
    p, K, q, r | variance of the estimate, gain, process noise, measurement noise: Python numbers

Readings, where the paper leaves something open:
    1. The deviation (Algorithm 1 calls it a variance) is the unbiased one. A batch of one row has
       none: it adapts nothing and renews no gain. A dimension that is constant in batch or memory
       is only shifted.
    2. The first moments that are measured become the first estimates.
    3. Adapted rows leave the unit sphere. They are stored that way, and normalised for comparison.
    4. The margins of the paper's miner are Euclidean distances, the default of the library that its
       authors used, pytorch-metric-learning.
    5. The gain is renewed every gain_interval steps, the estimates at every step. The measurement
       noise is divided by the batch size, as Sec. 3.2.1 says; Algorithm 1 prints r alone.
    6. The published noises are the defaults. With them K is above 0.999 for batches of 16 or more,
       so AXBN equals XBN to three digits. What AXBN gains in the paper is not explained by that.
    7. The memory's own moments are taken before its oldest rows leave.
    8. As in that library, an anchor is never compared with its own copy of this step. Older copies
       of the same image, in a memory that outlasts an epoch, are positives like other images.
    9. As in that library, the supervised contrastive loss is the mean over the anchors whose loss
       is above 0, not over all of them.
"""
import torch
import torch.nn.functional as F

METHODS = ("none", "xbm", "xbm+batch", "xbn", "ema", "axbn")
ADAPTING = ("xbn", "ema", "axbn")


# ------------------------------------------------- moments, and the memory matched to them

def normalize(z):
    """Rows of z (N, D) scaled to unit length, in float32 at least; a row of zeros stays zero."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)


def moments(z):
    """Mean and unbiased standard deviation of z (N, D), dimension by dimension: (D,), (D,).

    The deviation of a single row, or of a dimension constant up to rounding, is exactly 0.
    """
    mean = z.mean(0)                                                            # (D,)
    std = ((z - mean).square().sum(0) / max(len(z) - 1, 1)).sqrt()              # (D,) reading 1
    # torch sums block by block, so the mean of equal float32 rows is off by few eps: by 4 with
    # 4,000 rows and 9 with a million, measured on a CPU. (A plain loop would be off by thousands.)
    rounding = 16 * torch.finfo(z.dtype).eps * mean.abs()                       # (D,)
    return mean, std.masked_fill(std <= rounding, 0)


def match_moments(memory, mean, std):
    """The memory (M, D), shifted and scaled so that its moments become mean and std (D,): (M, D).

    Assumes that embeddings drift as z' = A z + b, with a diagonal A (Eq. 7). A dimension whose
    deviation is 0, in the memory or in std, is only shifted.
    """
    memory_mean, memory_std = moments(memory)                                   # (D,), (D,)
    constant = (memory_std == 0) | (std == 0)                                   # (D,) reading 1
    A = std.masked_fill(constant, 1) / memory_std.masked_fill(constant, 1)      # (D,) Eq. 12
    b = mean - A * memory_mean                                                  # (D,) Eq. 11
    return A * memory + b                                                       # Eqs. 6 and 23


def kalman_gain(p, q, r):
    """Algorithm 1, lines 1-3: variance p of the estimate, process and measurement noise -> p, K."""
    p = p + q                                                                   # line 1
    K = p / (p + r)                                                             # line 2, Eq. 20
    return (1 - K) * p, K                                                       # line 3


# ------------------------------------------------- pairs and losses
# A loss takes sim (B, N), the cosine similarities of B anchors to N references, and two boolean
# masks (B, N): which pairs are positive, and which negative. It returns a scalar in the precision
# of sim, which CrossBatchLoss computes in float32 at least.

def pair_masks(y, reference_y, own=None):
    """Which references are of the anchor's class, and which of another: two boolean masks (B, N).

    y (B,), reference_y (N,): labels. own (m,): for each of the last m anchors (all of them, unless
    the batch is larger than the memory), the column that holds its own copy. Such a pair is
    neither positive nor negative.
    """
    positive = y[:, None] == reference_y                            # (B, N) True: same class
    negative = y[:, None] != reference_y                            # (B, N) True: another class
    if own is not None:
        positive[len(y) - len(own):].scatter_(1, own[:, None], False)           # reading 8
    return positive, negative


@torch.no_grad()
def multi_similarity_pairs(sim, positive, negative, margin=0.1):
    """Mining of the MS loss: the hard pairs among the given ones, two masks (B, N).

    Keeps a negative whose sim + margin is above the anchor's least positive sim, and a positive
    whose sim - margin is below its greatest negative sim. An anchor without positives, or without
    negatives, keeps no pair.
    """
    least_positive = sim.masked_fill(~positive, torch.inf).amin(1, keepdim=True)            # (B, 1)
    greatest_negative = sim.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)        # (B, 1)
    return positive & (sim - margin < greatest_negative), negative & (sim + margin > least_positive)


def log_1_plus_sum_exp(x, keep):
    """log(1 + sum of exp(x) over the kept entries of a row): x, keep (B, N) -> (B,)."""
    x = F.pad(x.masked_fill(~keep, -torch.inf), (0, 1))         # (B, N + 1) the added 0 is log 1
    return x.logsumexp(1)                                       # (B,)


def multi_similarity_loss(sim, positive, negative, alpha=2.0, beta=50.0, base=0.5, margin=0.1):
    """Multi-similarity loss (Wang et al., CVPR 2019) over the mined pairs; mean over all B anchors.

    The base is that of the common libraries; the MS paper has 1.
    """
    positive, negative = multi_similarity_pairs(sim, positive, negative, margin)
    pull = log_1_plus_sum_exp(-alpha * (sim - base), positive) / alpha          # (B,)
    push = log_1_plus_sum_exp(beta * (sim - base), negative) / beta             # (B,)
    return (pull + push).mean()


@torch.no_grad()
def pair_margin(sim, positive, negative, pos_margin=0.2, neg_margin=0.8):
    """The paper's mining (Sec. 5.1): positives beyond pos_margin, negatives within neg_margin.

    Distances are Euclidean, d^2 = 2 - 2 sim for unit vectors (reading 4): the default margins keep
    positives with sim < 0.98 and negatives with sim > 0.68. Returns two masks (B, N).
    """
    return positive & (sim < 1 - pos_margin ** 2 / 2), negative & (sim > 1 - neg_margin ** 2 / 2)


def supcon_loss(sim, positive, negative, temperature=0.1):
    """Supervised contrastive loss. For an anchor with positives P and negatives N, and logits l =
    sim / temperature: the mean over p in P of log(sum of exp(l) over P and N) - l_p.

    The mean is over the anchors whose loss is above 0. The loss is 0 if the whole batch has no
    positive or no negative.
    """
    logits = sim / temperature                                                  # (B, N)
    lowest = torch.finfo(sim.dtype).min     # not -inf: a row without pairs makes no NaN on the way
    pairs = positive | negative                                                 # (B, N)
    log_sum = logits.masked_fill(~pairs, lowest).logsumexp(1, keepdim=True)     # (B, 1)
    pulls = (log_sum - logits).masked_fill(~positive, 0)                        # (B, N)
    losses = pulls.sum(1) / positive.sum(1).clamp_min(1)                        # (B,)
    included = (losses > 0) & positive.any() & negative.any()                   # (B,) reading 9
    return losses.masked_fill(~included, 0).sum() / included.sum().clamp_min(1)


def mined_supcon_loss(sim, positive, negative, pos_margin=0.2, neg_margin=0.8, temperature=0.1):
    """The paper's loss (Sec. 5.1): supervised contrastive over the pairs of `pair_margin`."""
    pairs = pair_margin(sim, positive, negative, pos_margin, neg_margin)
    return supcon_loss(sim, *pairs, temperature)


def contrastive_loss(sim, positive, negative, margin=0.5):
    """XBM's loss: sum of 1 - sim over positives and of sim over negatives above the margin; mean
    over all B.
    """
    pull = (1 - sim).masked_fill(~positive, 0)                                  # (B, N)
    push = sim.masked_fill(~(negative & (sim > margin)), 0)                     # (B, N)
    return (pull + push).sum(1).mean()


# ------------------------------------------------- the memory, and the loss against it

def check_batch(z, y, buffer):
    """Raises ValueError unless z is (B, dim) and y (B,) integers, with at least one row, both on
    the device of the buffer (..., dim), which is in float32 at least.
    """
    if not isinstance(y, torch.Tensor) or y.is_floating_point():
        raise ValueError(f"labels must be a tensor of integers, got {type(y)} of "
                         f"{getattr(y, 'dtype', None)}")
    if z.ndim != 2 or z.shape[1] != buffer.shape[-1] or y.shape != z.shape[:1] or len(z) == 0:
        raise ValueError(f"expected embeddings (B, {buffer.shape[-1]}) and labels (B,) with B at "
                         f"least 1, got {tuple(z.shape)} and {tuple(y.shape)}")
    if not z.device == y.device == buffer.device or buffer.dtype.itemsize < 4:
        raise ValueError(f"embeddings are on {z.device}, labels on {y.device}, the memory is on "
                         f"{buffer.device} in {buffer.dtype}; bring all to one device, the memory "
                         "with criterion.to(device), and keep it in float32")


class CrossBatchMemory(torch.nn.Module):
    """The last `size` embeddings and labels, first in, first out.

    `embeddings` (n, dim) and `labels` (n,) are views of the n = len(memory) rows that are filled.
    `written` counts the rows ever written. It is a Python number: no step waits for a GPU to tell.
    """

    def __init__(self, dim, size):
        super().__init__()
        if dim < 1 or size < 1 or isinstance(size, float):
            raise ValueError(f"dim and size must be integers from 1 on, got dim={dim}, size={size}")
        self.size, self.written = size, 0
        self.register_buffer("all_embeddings", torch.zeros(size, dim))                      # (M, D)
        self.register_buffer("all_labels", torch.zeros(size, dtype=torch.int64))            # (M,)

    embeddings = property(lambda self: self.all_embeddings[:len(self)])                     # (n, D)
    labels = property(lambda self: self.all_labels[:len(self)])                             # (n,)

    def __len__(self):
        return min(self.written, self.size)

    @torch.no_grad()
    def enqueue(self, z, y):
        """Write z (B, D), y (B,) over the oldest rows. Returns the slots (m,) of the last m rows;
        m is B, or M if the batch is larger than the memory.
        """
        check_batch(z, y, self.all_embeddings)
        m = min(len(z), self.size)
        self.written += len(z)
        slots = torch.arange(self.written - m, self.written, device=z.device) % self.size   # (m,)
        self.all_embeddings[slots] = z[-m:].to(self.all_embeddings.dtype)                   # (m, D)
        self.all_labels[slots] = y[-m:].long()                                              # (m,)
        return slots

    def reset(self):
        """Forget every row."""
        self.written = 0

    def get_extra_state(self):
        return torch.tensor(self.written)

    def set_extra_state(self, state):
        self.written = int(state)


class CrossBatchLoss(torch.nn.Module):
    """A metric-learning loss of a batch against a cross-batch memory.

    method: "none" compares the batch with itself; "xbm" with the memory, not adapted; "xbm+batch"
        (the paper's XBM*) with both, and adds the two losses; "xbn", "ema" and "axbn" with the
        adapted memory.
    loss: any function of sim (B, N) and two boolean masks (B, N). Its parameters, if it has some,
        are parameters of the criterion. The default is MS; the paper's loss is mined_supcon_loss.
    process_noise, measurement_noise, gain_interval: q, r and how often K is renewed, for "axbn".
        The paper has the defaults, but an interval of 10 on DeepFashion2.
    momentum: 1 - K, for "ema"; the paper's best of 0.1 to 0.9 was 0.1 (App. C).
    warmup_steps: in so many first training calls every method acts like "none" and stores nothing.
    In eval mode nothing changes: a batch is compared with the memory as it is, or with itself
    during the warm-up or while the memory is empty, and is not added. A batch with a NaN has a NaN
    loss; its rows that hold one count as zeros in the memory and the moments, so that later steps
    go on.
    """

    def __init__(self, dim, size, method="axbn", loss=multi_similarity_loss,
                 process_noise=1.0, measurement_noise=0.01, gain_interval=100,      # reading 6
                 momentum=0.1, warmup_steps=0):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        noises = (process_noise, measurement_noise)
        if min(noises) < 0 or max(noises) == 0:
            raise ValueError("process_noise and measurement_noise must be at least 0 and not both "
                             f"0, got {noises}")
        if gain_interval < 1 or warmup_steps < 0 or gain_interval % 1 or warmup_steps % 1:
            raise ValueError("gain_interval must be an integer from 1 on and warmup_steps must be "
                             f"one from 0 on, got {gain_interval} and {warmup_steps}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.method, self.loss, self.momentum = method, loss, momentum
        self.q, self.r, self.gain_interval = process_noise, measurement_noise, gain_interval
        self.warmup_steps = warmup_steps
        self.memory = CrossBatchMemory(dim, size)
        self.register_buffer("mean", torch.zeros(dim))      # (D,) mu^
        self.register_buffer("std", torch.zeros(dim))       # (D,) s^; 0 means no estimate yet
        self.reset()

    def reset(self):
        """Start over: an empty memory, no estimates, the warm-up from its first step."""
        self.memory.reset()
        self.mean.zero_()
        self.std.zero_()
        self.step, self.p, self.K = 0, 1.0, 1.0                         # p0 = 1 (Sec. 5.1)

    @torch.compiler.disable     # the counts change with every call: it would be compiled anew
    def forward(self, embeddings, labels):
        """Embeddings (B, D), normalised or not, and integer labels (B,) -> the loss, a scalar."""
        check_batch(embeddings, labels, self.mean)
        with torch.autocast(embeddings.device.type, enabled=False):     # in full precision
            z, y = normalize(embeddings).to(self.mean.dtype), labels.long()         # (B, D), (B,)
            # A zero that depends on z: backward works even without any pair, and a NaN in z reaches
            # the loss even where the masks leave it out.
            loss = 0 * z.sum()                                          # ()
            use_memory = (self.method != "none" and self.step >= self.warmup_steps
                          and (self.training or len(self.memory) > 0))
            if self.method == "xbm+batch" or not use_memory:
                loss = loss + self.compare(z, y, z, y, torch.arange(len(z), device=z.device))
            own = None
            if use_memory and self.training:
                stored = z.detach().nan_to_num()    # (B, D) a NaN would spoil the moments for good
                if self.method in ADAPTING and len(z) > 1:              # reading 1
                    self.adapt(stored)                                  # reading 7: before enqueue
                own = self.memory.enqueue(stored, y)                    # (m,)
            if use_memory:
                reference = normalize(self.memory.embeddings)           # (n, D) reading 3
                loss = loss + self.compare(z, y, reference, self.memory.labels, own)
            if self.training:
                self.step += 1
            return loss

    @torch.no_grad()
    def adapt(self, z):
        """Algorithm 1 for the batch z (B, D): move the estimates, and match the memory to them."""
        batch_mean, batch_std = moments(z)                              # (D,), (D,) E[B], s[B]
        if self.method == "xbn":
            self.K = 1.0
        elif self.method == "ema":
            self.K = 1 - self.momentum                                              # App. C
        elif (self.step - self.warmup_steps) % self.gain_interval == 0:             # reading 5
            self.p, self.K = kalman_gain(self.p, self.q, self.r / len(z))   # lines 1-3, Sec. 3.2.1
        # (D,) K, or 1 in a dimension without an estimate: it takes the batch's moments (reading 2).
        gain = torch.full_like(self.std, self.K).masked_fill(self.std == 0, 1)
        # A dimension that is constant in the batch keeps its deviation, in the estimate and in the
        # memory: there match_moments sees a 0, and only shifts (reading 1).
        constant = batch_std == 0                               # (D,)
        self.mean.lerp_(batch_mean, gain)                       # line 4: mu^ + K (E[B] - mu^)
        self.std.lerp_(torch.where(constant, self.std, batch_std), gain)            # line 5
        std = self.std.masked_fill(constant, 0)                 # (D,)
        # Lines 6-9. The adapted rows stay in the memory, so the next step has one step of drift to
        # correct, not many (Sec. 3.1). An empty memory stays empty.
        self.memory.embeddings.copy_(match_moments(self.memory.embeddings, self.mean, std))

    def compare(self, z, y, reference, reference_y, own):
        """The loss of anchors z (B, D) against references (N, D); own: see `pair_masks`."""
        sim = z @ reference.T                                           # (B, N)
        return self.loss(sim, *pair_masks(y, reference_y, own))

    def get_extra_state(self):
        # float64 keeps p and K exact. Its bits travel as int64, since a state may be loaded to an
        # Apple GPU, which has no float64.
        return torch.tensor([self.step, self.p, self.K], dtype=torch.float64).view(torch.int64)

    def set_extra_state(self, state):
        step, self.p, self.K = state.cpu().view(torch.float64).tolist()
        self.step = int(step)
