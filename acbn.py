# SPDX-License-Identifier: MIT
"""Adaptive Cross Batch Normalization: a cross-batch memory that keeps up with the network, in one file.

XBN and AXBN are by Ajanthan, Ma, van den Hengel and Gould, "Adaptive Cross Batch Normalization for Metric
Learning", arXiv 2303.17127: sections, equations and lines of Algorithm 1 below are that paper's. It writes
AXBN; ACBN, the name of this file, is the same. The memory is XBM, Wang et al., arXiv 1912.06798.
This file needs torch alone: copy it.

    >>> criterion = CrossBatchLoss(dim=16, size=256, method="axbn")     # remembers 256 embeddings
    >>> encoder = torch.nn.Linear(8, 16)
    >>> for _ in range(3):
    ...     x, labels = torch.randn(32, 8), torch.arange(32) // 4       # 8 classes x 4 images
    ...     criterion(encoder(x), labels).backward()
    >>> len(criterion.memory)
    96

Three gains make three methods. Each keeps an estimate of the embeddings' mean and deviation, moves it by a
share K towards every batch, and matches the memory to it: XBN has K = 1, EMA a constant K = 1 - momentum,
AXBN the gain of a Kalman filter.

Symbols (paper | here | shape):
    B-bar      | z, y: embeddings and labels of the batch          | (B, D), (B,)
    R-bar      | memory: the last M embeddings and labels          | (M, D), (M,)
    E[.], s[.] | mean and standard deviation over the rows         | (D,), (D,)
    mu^, s^    | self.mean, self.std: the estimates                | (D,), (D,)
    p, K, q, r | variance of the estimate, gain, process noise, measurement noise | scalars

Readings, where the paper leaves something open:
    1. The deviation is the unbiased one. A batch of one row has none, so nothing is adapted to it; a
       dimension that is constant in the batch or in the memory (of one row, say) is shifted, not scaled.
    2. The first moments measured are the first estimates.
    3. Adapted rows leave the unit sphere. They are stored as they are and normalised to be compared.
    4. The margins of the paper's miner are Euclidean distances, as in the library its authors used.
    5. The gain (lines 1-3) is renewed every gain_interval iterations, the estimates (lines 4-5) at each one.
    6. With the published q = 1 and r = 0.01 the gain is above 0.999 from 16 images on: AXBN is then XBN to
       three digits. The arithmetic is kept as published; q and r are arguments.
    7. The memory's own moments are taken before its oldest rows leave.
    8. An anchor is never compared with its own copy of this iteration. Older copies of the same image, in a
       memory that outlasts an epoch, are positives like any other image of the class.
"""
import torch
import torch.nn.functional as F

METHODS = ("none", "xbm", "xbm+batch", "xbn", "ema", "axbn")


# ---------------------------------------------------------------- moments, and the memory matched to them

def normalize(z):
    """Rows of z (N, D) scaled to unit length, in float32 at least; a row of zeros stays zero."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)


def moments(z, rows=None):
    """Mean and unbiased standard deviation of z (N, D), dimension by dimension: (D,), (D,).

    rows (N,): True for the rows that count; by default all, and then at least two. The deviation of a
    dimension that is constant up to rounding is exactly 0.
    """
    if z.ndim != 2 or (rows is None and len(z) < 2):
        raise ValueError(f"moments needs a matrix of at least 2 rows, got shape {tuple(z.shape)}")
    rows = torch.ones_like(z[:, :1], dtype=torch.bool) if rows is None else rows[:, None]           # (N, 1)
    n = rows.sum()                                                          # () rows that count
    mean = torch.where(rows, z, 0).sum(0) / n.clamp_min(1)                  # (D,)
    squares = torch.where(rows, z - mean, 0).square().sum(0)                # (D,) about the mean
    std = (squares / (n - 1).clamp_min(1)).sqrt()                           # (D,)
    constant = std <= 16 * torch.finfo(z.dtype).eps * mean.abs()            # (D,) True: rounding errors only
    return mean, std.masked_fill(constant, 0)


def match_moments(memory, mean, std, rows=None):
    """The memory (M, D), shifted and scaled so that its moments become mean (D,) and std (D,): (M, D).

    Assumes that the embeddings drift as z' = A z + b with diagonal A (Eq. 7). rows (M,): as in `moments`.
    """
    old_mean, old_std = moments(memory, rows)                               # (D,), (D,) E[R], s[R]
    scaled = (old_std > 0) & (std > 0)                                      # (D,) False: shifted only
    A = torch.where(scaled, std, 1) / torch.where(scaled, old_std, 1)       # (D,) Eq. 12
    b = mean - A * old_mean                                                 # (D,) Eq. 11
    return A * memory + b                                                   # (M, D) Eqs. 6 and 23


def kalman_gain(p, q, r):
    """Algorithm 1, lines 1-3: variance p of the estimate, process noise q, measurement noise r -> p, K."""
    p = p + q                                                               # line 1
    K = p / (p + r)                                                         # line 2, Eq. 20
    return (1 - K) * p, K                                                   # line 3


# ---------------------------------------------------------------- pairs and losses
# A loss takes sim (B, N), the cosine similarities of B anchors to N references, and two boolean masks (B, N)
# of the positive and of the negative pairs. It returns a scalar, in the precision of sim: CrossBatchLoss
# gives it 32 bits at least.

def pair_masks(y, reference_y, own=None, rows=None):
    """Which references share the anchor's class, and which have another: two boolean masks (B, N).

    y (B,), reference_y (N,): labels. own (n,): the columns of the last n anchors, if they are among the
    references; with itself none makes a pair. rows (N,): True for the references that count, by default all.
    """
    positive = y[:, None] == reference_y                                    # (B, N) True: same class
    negative = ~positive                                                    # (B, N) True: another class
    if rows is not None:
        positive, negative = positive & rows, negative & rows
    if own is not None:
        anchors = torch.arange(len(y) - len(own), len(y), device=y.device)  # (n,)
        positive[anchors, own] = False
    return positive, negative


@torch.no_grad()
def multi_similarity_pairs(sim, positive, negative, margin=0.1):
    """Mining of the MS loss: the hard pairs among the given ones, two masks (B, N).

    A negative is hard if it is nearer than the anchor's farthest positive, a positive if it is farther than
    the nearest negative, each up to the margin. An anchor that lacks one kind keeps none of the other.
    """
    least_positive = sim.masked_fill(~positive, torch.inf).amin(1, keepdim=True)                    # (B, 1)
    greatest_negative = sim.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)                # (B, 1)
    return positive & (sim - margin < greatest_negative), negative & (sim + margin > least_positive)


def log_1_plus_sum_exp(x, keep):
    """log(1 + sum of exp(x) over the kept entries of a row): x, keep (B, N) -> (B,)."""
    x = F.pad(x.masked_fill(~keep, -torch.inf), (0, 1))                     # (B, N + 1) the added 0 is the 1
    return x.logsumexp(1)                                                   # (B,)


def multi_similarity_loss(sim, positive, negative, alpha=2.0, beta=50.0, base=0.5, margin=0.1):
    """Multi-similarity loss (Wang et al., CVPR 2019) over the mined pairs, mean over all B anchors."""
    positive, negative = multi_similarity_pairs(sim, positive, negative, margin)
    pull = log_1_plus_sum_exp(-alpha * (sim - base), positive) / alpha      # (B,)
    push = log_1_plus_sum_exp(beta * (sim - base), negative) / beta         # (B,)
    return (pull + push).mean()


@torch.no_grad()
def pair_margin(sim, positive, negative, pos_margin=0.2, neg_margin=0.8):
    """The paper's mining (Sec. 5.1): positives farther than pos_margin, negatives nearer than neg_margin.

    Distances are Euclidean, d^2 = 2 - 2 sim for unit vectors; the default margins are sim < 0.98 and
    sim > 0.68. Returns two masks (B, N).
    """
    return positive & (sim < 1 - pos_margin ** 2 / 2), negative & (sim > 1 - neg_margin ** 2 / 2)


def supcon_loss(sim, positive, negative, temperature=0.1):
    """Supervised contrastive loss: -1/|P| sum over p in P of log(exp(l_p) / sum over P and N of exp(l)).

    l = sim / temperature, P and N the anchor's positives and negatives. The mean is over the anchors whose
    loss is above 0; the loss is 0 where the whole batch has no positive or no negative.
    """
    l = sim / temperature                                                   # (B, N)
    lowest = torch.finfo(l.dtype).min       # not -inf: a row without any pair would have NaN on its way back
    log_sum = l.masked_fill(~(positive | negative), lowest).logsumexp(1, keepdim=True)              # (B, 1)
    losses = (log_sum - l).masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp_min(1)          # (B,)
    counts = (losses > 0) & positive.any() & negative.any()                 # (B,) True: part of the mean
    return losses.masked_fill(~counts, 0).sum() / counts.sum().clamp_min(1)


def mined_supcon_loss(sim, positive, negative, pos_margin=0.2, neg_margin=0.8, temperature=0.1):
    """The paper's loss (Sec. 5.1): supervised contrastive over the pairs of `pair_margin`."""
    return supcon_loss(sim, *pair_margin(sim, positive, negative, pos_margin, neg_margin), temperature)


def contrastive_loss(sim, positive, negative, margin=0.5):
    """XBM's loss: sum of 1 - sim over positives and of sim over negatives above the margin; mean over B."""
    pull = (1 - sim).masked_fill(~positive, 0)                              # (B, N)
    push = sim.masked_fill(~(negative & (sim > margin)), 0)                 # (B, N)
    return (pull + push).sum(1).mean()


# ---------------------------------------------------------------- the memory, and the loss against it

def whole_or_nothing(module, state, prefix):
    """What of a state a module may load: all, or nothing where a part is missing. Refuses other sizes."""
    own = module.state_dict(prefix=prefix)
    for name, value in own.items():
        if name in state and state[name].shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}: "
                             "a state of another size or dim, of which nothing was loaded")
    return state if own.keys() <= state.keys() else {}


class CrossBatchMemory(torch.nn.Module):
    """The last `size` embeddings and labels, first in, first out.

    `embeddings` (n, dim) and `labels` (n,) are views of the n = len(memory) rows. For simplicity the loss
    looks at all `size` slots and masks those not yet filled. The number of rows written is a tensor, so that
    no step waits for a GPU to tell it; `len`, `embeddings` and `labels` do wait.
    """

    def __init__(self, size, dim):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"size and dim of the memory must be at least 1, got size={size}, dim={dim}")
        self.size = size
        self.register_buffer("all_embeddings", torch.zeros(size, dim))                  # (M, D)
        self.register_buffer("all_labels", torch.zeros(size, dtype=torch.int64))        # (M,)
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))             # () rows, ever

    embeddings = property(lambda self: self.all_embeddings[:len(self)])                 # (n, D)
    labels = property(lambda self: self.all_labels[:len(self)])                         # (n,)

    def __len__(self):
        return min(int(self.written), self.size)

    def filled(self):
        """(M,) True: the slot holds a row."""
        return torch.arange(self.size, device=self.written.device) < self.written

    @torch.no_grad()
    def enqueue(self, z, y):
        """Write z (B, D) and y (B,) over the oldest rows; returns the slots (n,) of the last n = min(B, M).

        Rows that are not finite are left out, as if the batch had come without them.
        """
        if z.ndim != 2 or z.shape[1] != self.all_embeddings.shape[1] or y.shape != z.shape[:1]:
            raise ValueError(f"the memory takes embeddings (B, {self.all_embeddings.shape[1]}) and "
                             f"labels (B,), got {tuple(z.shape)} and {tuple(y.shape)}")
        finite = z.isfinite().all(1)                                            # (B,)
        last = finite.int().argsort(stable=True)[-self.size:]       # (n,) finite rows in order, behind others
        z, y, finite = z[last], y[last], finite[last]                           # (n, D), (n,), (n,)
        place = torch.arange(len(z), device=z.device) - (~finite).sum()         # (n,) 0, 1, ... if finite
        slots = (self.written + place) % self.size                              # (n,)
        z = torch.where(finite[:, None], z, self.all_embeddings[slots])         # (n, D) or what is there
        y = torch.where(finite, y, self.all_labels[slots])                      # (n,)
        self.all_embeddings.index_copy_(0, slots, z.to(self.all_embeddings.dtype))
        self.all_labels.index_copy_(0, slots, y.to(self.all_labels.dtype))
        self.written += finite.sum()
        return slots

    def reset(self):
        """Forget every row."""
        for buffer in self.buffers():
            buffer.zero_()

    def _load_from_state_dict(self, state, prefix, *args):
        super()._load_from_state_dict(whole_or_nothing(self, state, prefix), prefix, *args)


class CrossBatchLoss(torch.nn.Module):
    """A metric-learning loss of a batch against a cross-batch memory.

    method: "none" compares the batch with itself; "xbm" with the memory as stored; "xbm+batch" (the paper's
        XBM*) with both, and adds the two; "xbn", "ema" and "axbn" with the memory adapted, K being 1,
        1 - momentum (App. C), and the Kalman gain.
    loss: any function of sim (B, N) and two boolean masks (B, N); one with parameters is trained too.
    process_noise, measurement_noise, gain_interval: q, r and how often K is renewed, "axbn" only.
    warmup_steps: so many first calls act like "none" and leave the memory alone.
    In eval mode a batch is compared with the memory as it is, and nothing changes. Keep the criterion itself
    in float32 (or float64); the embeddings may have 16 bits.
    """

    def __init__(self, dim, size, method="axbn", loss=multi_similarity_loss, process_noise=1.0,
                 measurement_noise=0.01, gain_interval=100, momentum=0.1, warmup_steps=0):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if process_noise < 0 or measurement_noise < 0 or process_noise + measurement_noise == 0:
            raise ValueError("process_noise and measurement_noise must be at least 0 and not both 0, "
                             f"got {process_noise} and {measurement_noise}")
        if gain_interval < 1 or not 0 <= momentum < 1:
            raise ValueError("gain_interval must be at least 1 and momentum in [0, 1), "
                             f"got {gain_interval} and {momentum}")
        self.method, self.loss, self.momentum = method, loss, momentum
        self.q, self.r, self.gain_interval = process_noise, measurement_noise, gain_interval
        self.warmup_steps = warmup_steps
        self.memory = CrossBatchMemory(size, dim)
        self.register_buffer("mean", torch.zeros(dim))                      # (D,) mu^
        self.register_buffer("std", torch.zeros(dim))                       # (D,) s^, 0: no estimate yet
        self.register_buffer("p", torch.ones(()))                           # () p
        self.register_buffer("K", torch.ones(()))                           # () K, the last gain
        self.reset()

    def reset(self):
        """Forget the memory, the estimates and the warm-up."""
        self.memory.reset()
        self.mean.zero_()
        self.std.zero_()
        self.p.fill_(1)                                                     # p0 = 1 (Sec. 5.1)
        self.K.fill_(1)
        self.step = 0               # calls so far; an integer of the host, which decides by it what to do

    def forward(self, z, y):
        """Embeddings z (B, D), normalised or not, and labels y (B,) -> the loss, a scalar."""
        if z.ndim != 2 or z.shape[1:] != self.mean.shape or y.shape != z.shape[:1]:
            raise ValueError(f"expected embeddings (B, {len(self.mean)}) and labels (B,), "
                             f"got {tuple(z.shape)} and {tuple(y.shape)}")
        with torch.autocast(z.device.type, enabled=False):      # 16-bit similarities change the weights
            z = normalize(z).to(self.mean.dtype)                            # (B, D)
            # Adds nothing, but keeps the graph without any pair, and NaN where a loss's masks would hide it.
            loss = 0 * z.sum()                                              # ()
            use_memory = self.method != "none" and self.step >= self.warmup_steps
            if self.method == "xbm+batch" or not use_memory:
                loss = loss + self.compare(z, y, z, y, torch.arange(len(z), device=z.device))
            if use_memory:
                memory, slots = self.memory, None
                if self.training:
                    # The adapted memory stays in store: it is one step behind, not many (Sec. 3.1).
                    self.adapt(z)
                    slots = memory.enqueue(z, y)                            # (n,)
                reference = normalize(memory.all_embeddings)                # (M, D) a copy: the store changes
                loss = loss + self.compare(z, y, reference, memory.all_labels, slots, memory.filled())
            self.step += self.training
            return loss

    @torch.no_grad()
    def adapt(self, z):
        """Algorithm 1 for the batch z (B, D): follow its moments, then match the memory to them."""
        if self.method not in ("xbn", "ema", "axbn"):
            return
        memory, p, K = self.memory, self.p, self.K
        finite = z.isfinite().all(1)                                        # (B,) True: the row counts
        n = finite.sum()                                                    # ()
        mean, std = moments(z, finite)                                      # (D,), (D,) E[B], s[B]
        if self.method == "xbn":
            K = torch.ones_like(K)
        elif self.method == "ema":
            K = torch.full_like(K, 1 - self.momentum)                       # App. C
        elif (self.step - self.warmup_steps) % self.gain_interval == 0:
            p, K = kalman_gain(p, self.q, self.r / n.clamp_min(1))          # lines 1-3, r / |B| (Sec. 3.2.1)
        share = torch.where(self.std > 0, K, 1)                     # (D,) 1: nothing is known of it yet
        new_mean = self.mean.lerp(mean, share)                      # (D,) line 4: mu^ + K (E[B] - mu^)
        new_std = self.std.lerp(std.where(std > 0, self.std), share)        # (D,) line 5
        target = new_std.where(std > 0, 0)                                  # (D,) 0: only shifted
        matched = match_moments(memory.all_embeddings, new_mean, target, memory.filled())   # (M, D) lines 6-9
        for old, new in ((self.p, p), (self.K, K), (self.mean, new_mean), (self.std, new_std),
                         (memory.all_embeddings, matched)):
            old.copy_(torch.where(n > 1, new, old))         # one row has no deviation: all stays as it is

    def compare(self, z, y, reference, reference_y, own, rows=None):
        """The loss of anchors z (B, D) against references (N, D); own and rows as `pair_masks` takes them."""
        sim = z @ reference.T                                               # (B, N)
        return self.loss(sim, *pair_masks(y, reference_y, own, rows))

    def get_extra_state(self):
        return torch.tensor(self.step)

    def set_extra_state(self, state):
        self.step = int(state)

    def _load_from_state_dict(self, state, prefix, *args):
        super()._load_from_state_dict(whole_or_nothing(self, state, prefix), prefix, *args)
