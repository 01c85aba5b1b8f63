# SPDX-License-Identifier: MIT
"""Adaptive Cross Batch Normalization: a cross-batch memory that keeps up with the network, in one file.

Methods: XBN and AXBN, Ajanthan, Ma, van den Hengel, Gould, "Adaptive Cross Batch Normalization for Metric
Learning", arXiv 2303.17127 ("the paper": sections, equations and algorithm lines below are its own), on top
of XBM, Wang et al., "Cross-Batch Memory for Embedding Learning", arXiv 1912.06798. The paper abbreviates
its method AXBN; ACBN, this file's name, is the same thing. Checked by test_acbn.py against float64 loops in
numpy, a deque, closed forms and, for the losses, pytorch-metric-learning. Needs only torch: copy it.

    >>> criterion = CrossBatchLoss(dim=16, size=256, method="axbn")     # 256 embeddings are remembered
    >>> encoder = torch.nn.Linear(8, 16)
    >>> for _ in range(3):
    ...     x, labels = torch.randn(32, 8), torch.arange(32) // 4       # 8 classes x 4 images
    ...     loss = criterion(encoder(x), labels)                        # adapt, enqueue, compare
    ...     loss.backward()
    >>> len(criterion.memory), loss.shape
    (96, torch.Size([]))

Symbols (paper | here | shape):
    B-bar      | z, y: embeddings and labels of the batch          | (B, D), (B,)
    R-bar      | memory: at most M embeddings and labels           | (M, D), (M,)
    E[.], s[.] | mean, std of the rows, dimension by dimension     | (D,), (D,)
    mu^, s^    | mean, std as the Kalman filter estimates them     | (D,), (D,)
    p, K       | estimation variance, Kalman gain                  | scalars
    q, r       | process_noise, measurement_noise                  | scalars

Where the paper is silent, this file reads it so:
    1. The deviation is the unbiased one (torch's default). A batch of one row has none: it adapts nothing.
       A dimension that is constant in the memory cannot be scaled, so it is only shifted.
    2. The first estimates of the filter are the first batch's moments.
    3. Adapted rows leave the unit sphere. They are stored as they are and normalised where compared.
    4. The margins of the paper's miner are Euclidean distances, as in the library its authors used.
    5. Algorithm 1's lines 1-3 run every gain_interval iterations, lines 4-5 at every one.
    6. With the published q = 1, r = 0.01 the gain is above 0.999 for 16 images or more: AXBN is then XBN to
       three digits. The arithmetic is kept; q and r are arguments.
    7. The memory's own moments are those before the oldest rows leave.
    8. An anchor is never compared with its own copy of this iteration. Older copies of its image, which
       exist when the memory outlasts the image's return, are positives like any other image of the class.
"""
import torch
import torch.nn.functional as F

METHODS = ("none", "xbm", "xbm+batch", "xbn", "ema", "axbn")


# ---------------------------------------------------------------- moments and their filter

def at_least_float32(x):
    """16-bit floats become float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def moments(z):
    """Mean and unbiased standard deviation of the rows: (N, D) -> (D,), (D,). Needs N >= 2."""
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"moments needs a matrix of at least 2 rows, got shape {tuple(z.shape)}")
    std, mean = torch.std_mean(at_least_float32(z), dim=0)                      # (D,), (D,)
    return mean, std


def affine_drift(mean, std, new_mean, new_std):
    """A, b (D,), (D,) of the drift z' = A z + b between moments: A = s'/s, b = mu' - A mu (Eqs. 7-12).

    A constant dimension has a deviation of rounding errors only, which must not be divided by: there A = 1.
    """
    constant = std <= 4 * torch.finfo(std.dtype).eps * mean.abs()               # (D,) True: shift only
    A = torch.where(constant, 1.0, new_std / std.masked_fill(constant, 1.0))    # (D,)
    return A, new_mean - A * mean


def match_moments(memory, mean, std, memory_mean=None, memory_std=None, out=None):
    """Shift and scale the rows of `memory` until their moments are `mean` and `std` (Eqs. 6 and 23).

    memory (M, D), M >= 2; mean, std (D,): the batch's (XBN) or the filter's (AXBN); memory_mean, memory_std
    (D,): the memory's own, where they are known already. Returns (M, D); `out=memory` works in place.
    """
    memory = at_least_float32(memory)
    if memory_mean is None:
        memory_mean, memory_std = moments(memory)                               # (D,), (D,)
    A, b = affine_drift(memory_mean, memory_std, mean, std)                     # (D,), (D,)
    return torch.addcmul(b, memory, A, out=out)                                 # (M, D)


def moments_after_swap(mean, std, n, old, new):
    """Moments of n rows of which `old` (B, D) became `new` (B, D), from their moments before: (D,), (D,)."""
    change = new - old                                                          # (B, D)
    shift = change.sum(0) / n                                                   # (D,)
    scatter = (change * (new + old - 2 * mean)).sum(0) - n * shift.square()     # (D,) added to (n - 1) std^2
    return mean + shift, (std.square() + scatter / (n - 1)).clamp_min(0).sqrt()


def kalman_gain(p, batch_size, process_noise=1.0, measurement_noise=0.01):
    """Algorithm 1, lines 1-3: the variance `p` one iteration on, and the gain. Scalars in, (p, K) out."""
    q, r = process_noise, measurement_noise / batch_size        # r falls with the batch (Sec. 3.2.1)
    if p + q + r <= 0:
        raise ValueError("process_noise and measurement_noise cannot both be 0: the gain would be 0 / 0")
    p = p + q                                                   # Alg. 1, line 1
    K = p / (p + r)                                             # Alg. 1, line 2; Eq. 20
    return (1 - K) * p, K                                       # Alg. 1, line 3


def kalman_update(mean, std, p, K, batch_mean, batch_std, batch_size, step=0,
                  process_noise=1.0, measurement_noise=0.01, gain_interval=100):
    """One iteration of the filter, Eqs. 18-22 in the form of Algorithm 1, lines 1-5.

    mean, std (D,): the estimates; p, K: their variance and the last gain, plain floats, so that no step
    waits for a GPU; batch_mean, batch_std (D,): the batch's moments, the measurement; step: counts the
    calls from 0, the gain is renewed where gain_interval divides it. Returns the new mean, std, p, K.
    """
    if step % gain_interval == 0:
        p, K = kalman_gain(p, batch_size, process_noise, measurement_noise)     # Alg. 1, lines 1-3
    mean = torch.lerp(mean, batch_mean, K)          # (D,) line 4: mean + K (E[B] - mean), exact at K = 1
    std = torch.lerp(std, batch_std, K)             # (D,) line 5
    return mean, std, p, K


# ---------------------------------------------------------------- similarities, pairs and losses
# A loss takes sim (B, N), cosine similarities of B anchors to N references, and two boolean masks (B, N) of
# the positive and of the negative pairs. It returns a scalar that keeps the graph even without any pair.

def normalize(z):
    """Rows (N, D) scaled to unit length, at any scale; a zero row stays zero."""
    z = at_least_float32(z)
    scale = z.detach().abs().amax(1, keepdim=True)        # (N, 1) keeps the squares from over- and underflow
    return F.normalize(z / scale.masked_fill(scale == 0, 1.0), dim=1)


def pair_masks(y, reference_y, own=None):
    """Positive and negative pairs of labels y (B,) against reference_y (N,): two boolean masks (B, N).

    own: columns of the references that are the last len(own) anchors themselves; their pairs are in no mask.
    """
    positive = y[:, None] == reference_y[None]                  # (B, N) True: same class
    negative = ~positive                                        # (B, N) True: other class
    if own is not None:
        positive[len(y) - len(own):].scatter_(1, own[:, None], False)
    return positive, negative


class GivenGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to x was computed along with it.

    once: the backward pass may use up the gradient; torch then refuses a second pass.
    """

    @staticmethod
    def forward(ctx, x, value, gradient, once=False):
        ctx.save_for_backward(gradient)
        ctx.once = once
        return value.clone()

    @staticmethod
    def backward(ctx, g):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(g) if ctx.once else gradient * g, None, None, None


def multi_similarity_pairs(sim, positive, negative, margin=0.1):
    """MS mining: negatives with sim + margin > the anchor's least positive, positives with sim - margin <
    its greatest negative; an anchor without positives or negatives keeps none. Two masks (B, N), thinned.
    """
    least_p = sim.masked_fill(~positive, torch.inf).amin(1, keepdim=True)       # (B, 1) +inf: no positive
    greatest_n = sim.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)   # (B, 1) -inf: no negative
    return positive & (sim < greatest_n + margin), negative & (sim > least_p - margin)


def log1p_sum(e, top):
    """log(1 + sum of exp(x)) over a row, from e = exp(x - top) (B, N), 0 for what is no pair; top (B, 1):
    max(0, the greatest x). Returns it (B, 1), and the factor (B, 1) that makes e its gradient by x.
    """
    total = e.sum(1, keepdim=True)                                              # (B, 1)
    v, none = torch.log1p(total + torch.expm1(-top)), total == 0                # (B, 1) less top, (B, 1)
    return (v + top).masked_fill(none, 0), torch.exp(-v).masked_fill(none, 0)


@torch.no_grad()
def multi_similarity_weights_(sim, positive, negative, alpha, beta, base, margin):
    """The MS loss, a scalar; sim (B, N) becomes its gradient, the weights of the mined pairs.

    weight = exp(x) / (1 + sum of exp(x)) / B over an anchor's mined pairs, x = beta (s_n - base) for its
    negatives and, with a minus, x = -alpha (s_p - base) for its positives. Made for speed on a CPU: in
    place, a few anchors at a time, whose rows stay in the cache; masks only for the few columns that are not
    negative throughout; comparisons that give floats, a third of the time of booleans; exponents with a
    lower bound, since exp takes fifty times as long where it underflows.
    """
    on_cpu = sim.device.type == "cpu" and not torch.compiler.is_compiling()
    some = (negative.view(torch.uint8).amin(0) == 0).nonzero()[:, 0] if on_cpu else slice(None)     # (n,)
    near = sim[:, some]                                                         # (B, n)
    s_p = torch.where(positive[:, some], near, torch.inf)                       # (B, n) +inf: not a positive
    least_p = F.pad(s_p, (0, 1), value=torch.inf).amin(1, keepdim=True)        # (B, 1) n may be 0: hence pad
    sim[:, some] = torch.where(negative[:, some], near, -1e30)                  # (B, N) -1e30: no negative
    greatest_n = sim.amax(1, keepdim=True)                                      # (B, 1) -1e30: no negative
    top, v_n = (beta * (greatest_n - base)).clamp_min(0), torch.empty_like(greatest_n)              # (B, 1)
    rows = max(1, 2 ** 18 // sim.shape[1]) if on_cpu else len(sim)
    scratch = torch.empty_like(sim[:rows])                                      # (b, N)
    for x, bound, t, v in zip(*(each.split(rows) for each in (sim, least_p - margin, top, v_n))):
        mined = torch.gt(x, bound, out=scratch[:len(x)])                        # (b, N) 1.0: mined
        e = x.mul_(beta).sub_(beta * base + t).clamp_min_(-80).exp_().mul_(mined)                   # (b, N)
        value, factor = log1p_sum(e, t)                                         # (b, 1), (b, 1)
        v.copy_(value), e.mul_(factor / len(sim))
    top = (alpha * (base - least_p)).clamp_min(0)                               # (B, 1)
    e = torch.add(alpha * base - top, s_p, alpha=-alpha).exp_()                 # (B, n)
    e.mul_(torch.lt(s_p, greatest_n + margin, out=s_p))                         # (B, n) 0: not mined
    v_p, factor = log1p_sum(e, top)                                             # (B, 1), (B, 1)
    sim[:, some] -= e.mul_(factor / len(sim))
    return (v_p / alpha + v_n / beta).mean()


def multi_similarity_loss(sim, positive, negative, alpha=2.0, beta=50.0, base=0.5, margin=0.1):
    """Multi-similarity loss (Wang et al., CVPR 2019) of multi_similarity_pairs, 0 for none; mean over B.

    Its gradient, the weights of the pairs, is computed along with it, in a fraction of the time of autograd.
    """
    gradient = at_least_float32(sim).detach().clone()                           # (B, N)
    value = multi_similarity_weights_(gradient, positive, negative, alpha, beta, base, margin)
    return GivenGradient.apply(sim, value, gradient)


def multi_similarity_loss_(sim, positive, negative, alpha=2.0, beta=50.0, base=0.5, margin=0.1):
    """The same, in place: sim (B, N), at least float32, is lost to its gradient. Saves (B, N) of memory."""
    value = multi_similarity_weights_(sim, positive, negative, alpha, beta, base, margin)
    return GivenGradient.apply(sim, value, sim.detach(), sim.is_leaf)   # a leaf has nothing before it


def pair_margin(sim, positive, negative, pos_margin=0.2, neg_margin=0.8):
    """The paper's mining (Sec. 5.1): positives farther than pos_margin, negatives nearer than neg_margin.

    Margins are Euclidean distances of unit vectors, d^2 = 2 - 2 sim: by default sim < 0.98 and sim > 0.68.
    Returns the two masks (B, N), thinned.
    """
    return positive & (sim < 1 - pos_margin ** 2 / 2), negative & (sim > 1 - neg_margin ** 2 / 2)


def supcon_loss(sim, positive, negative, temperature=0.1):
    """Supervised contrastive loss over the given pairs; mean over the anchors whose loss is above 0.

    Anchor i: -1/|P| * sum over P of [l_ip - log sum over P and N of exp(l_ij)], l = sim / temperature.
    0 if the whole batch has no positive or no negative. Over pair_margin's pairs it is the paper's loss.
    """
    l = at_least_float32(sim) / temperature                                     # (B, N)
    # A finite fill instead of -inf: an anchor without any pair keeps a finite gradient.
    fill = torch.finfo(l.dtype).min
    log_sum = l.masked_fill(~(positive | negative), fill).logsumexp(1, keepdim=True)                # (B, 1)
    per_anchor = (log_sum - l).masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp_min(1)      # (B,)
    counted = (per_anchor > 0) & positive.any() & negative.any()                # (B,) True: in the mean
    return per_anchor.masked_fill(~counted, 0).sum() / counted.sum().clamp_min(1)


def contrastive_loss(sim, positive, negative, margin=0.5):
    """XBM's loss: sum of 1 - sim over positives plus sum of sim over negatives above margin; mean over B."""
    sim = at_least_float32(sim)
    pull = (1 - sim).masked_fill(~positive, 0)                  # (B, N)
    push = sim.masked_fill(~(negative & (sim > margin)), 0)     # (B, N)
    return (pull + push).sum(1).mean()


# ---------------------------------------------------------------- the memory, and the loss against it

class CrossBatchMemory(torch.nn.Module):
    """A first-in-first-out queue of the last `size` embeddings with their labels and image ids.

    `embeddings` (n, dim), `labels` (n,) and `ids` (n,) are views of the n = len(memory) rows in slot order,
    to be read: who writes to embeddings sets `known` to False. `pointer` is the next slot to be written, so
    rolling by -pointer gives the rows from the oldest to the newest. Ids not given are -1.

    The moments of the rows are known from the last adaptation and the few rows enqueued since, instead of by
    a pass over all of them, which costs a CPU four times the loss's matrix products. Once a round of the
    queue, and while it fills, they are computed anew, so that errors do not add up.
    """

    def __init__(self, size, dim):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"size and dim of the memory must be at least 1, got size={size}, dim={dim}")
        self.size, self.pointer, self.count = size, 0, 0  # host integers: reading them never waits for a GPU
        self.known = False                                # True: `mean` and `std` are those of the rows
        self.register_buffer("stored_embeddings", torch.zeros(size, dim))
        self.register_buffer("stored_norms", torch.zeros(size))
        self.register_buffer("stored_labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("stored_ids", torch.full((size,), -1))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.zeros(dim))

    embeddings = property(lambda self: self.stored_embeddings[:self.count])     # (n, dim)
    norms = property(lambda self: self.stored_norms[:self.count])               # (n,) adapted rows are not 1
    labels = property(lambda self: self.stored_labels[:self.count])             # (n,)
    ids = property(lambda self: self.stored_ids[:self.count])                   # (n,)

    def __len__(self):
        return self.count

    @torch.no_grad()
    def enqueue(self, z, y, ids=None):
        """Add z (B, dim), y (B,), ids (B,); drop the oldest. Returns the slots of the last min(B, size)."""
        if z.ndim != 2 or z.shape[1] != self.stored_embeddings.shape[1] or y.shape != z.shape[:1]:
            raise ValueError(f"the memory takes embeddings (B, {self.stored_embeddings.shape[1]}) and "
                             f"labels (B,), got {tuple(z.shape)} and {tuple(y.shape)}")
        n = min(len(z), self.size)                             # of a larger batch only the last rows survive
        ids = torch.full_like(y, -1) if ids is None else ids
        slots = (self.pointer + torch.arange(n, device=z.device)) % self.size               # (n,)
        self.known = self.known and self.count == self.size and self.pointer + n < self.size
        if self.known:
            old = self.embeddings[self.pointer:self.pointer + n]                            # (n, dim)
            self.know(*moments_after_swap(self.mean, self.std, self.size, old, z.to(old.dtype)))
        for stored, new in ((self.stored_embeddings, z), (self.stored_norms, z.norm(dim=1)),
                            (self.stored_labels, y), (self.stored_ids, ids)):
            stored.index_copy_(0, slots, new[len(new) - n:].to(stored.dtype))               # in place
        self.pointer, self.count = (self.pointer + n) % self.size, min(self.count + n, self.size)
        return slots

    @torch.no_grad()
    def match(self, mean, std):
        """Shift and scale all rows in place until their moments are mean and std (dim,), Eqs. 6 and 23."""
        if self.count < 2:
            return                                              # one row has no deviation
        if not self.known:
            self.know(*moments(self.embeddings))
        A, b = affine_drift(self.mean, self.std, mean, std)                                 # (dim,), (dim,)
        rows = 1024 if b.device.type == "cpu" else self.count   # few enough to be in the cache for the norm
        for z, norm in zip(self.embeddings.split(rows), self.norms.split(rows)):
            torch.addcmul(b, z, A, out=z)                                                 # Alg. 1, lines 6-9
            torch.linalg.vector_norm(z, dim=1, out=norm)
        self.know(mean, A * self.std)

    def know(self, mean, std):
        self.mean.copy_(mean), self.std.copy_(std)
        self.known = True

    def reset(self):
        """Forget every row."""
        self.pointer, self.count, self.known = 0, 0, False

    def get_extra_state(self):
        return {"pointer": self.pointer, "count": self.count, "known": self.known}

    def set_extra_state(self, state):
        self.pointer, self.count, self.known = state["pointer"], state["count"], state["known"]


class CrossBatchLoss(torch.nn.Module):
    """A metric-learning loss of a batch against a cross-batch memory.

    method: "none" no memory, the batch against itself; "xbm" the memory as stored; "xbm+batch" (the paper's
        XBM*) the loss against the memory plus the loss within the batch; "xbn" the memory adapted to the
        batch's moments (Eq. 6); "ema" to a running average that keeps the share `momentum` of the old
        estimate (App. C); "axbn" to the Kalman estimates (Eq. 23, Algorithm 1).
    loss: any function of sim (B, N) and two boolean masks (B, N).
    process_noise, measurement_noise, gain_interval: q, r and how often the gain is renewed; "axbn" only.
    warmup_steps: so many first calls act like "none" and leave the memory alone.
    The state_dict holds everything that the next step depends on; `gain` is the last gain used.
    """

    def __init__(self, dim, size, method="axbn", loss=multi_similarity_loss_, process_noise=1.0,
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
        self.method, self.loss, self.warmup_steps = method, loss, warmup_steps
        self.adapts = method in ("xbn", "ema", "axbn")
        self.noise = process_noise, measurement_noise, gain_interval
        self.constant_gain = 1 - momentum if method == "ema" else 1.0           # App. C; XBN's gain is 1
        self.memory = CrossBatchMemory(size, dim)
        self.register_buffer("mean", torch.zeros(dim))                          # mu^, (D,)
        self.register_buffer("std", torch.zeros(dim))                           # s^, (D,)
        self.reset()

    def reset(self):
        """Forget the memory, the filter and the warm-up."""
        self.memory.reset()
        self.step, self.filter_step, self.p, self.gain = 0, 0, 1.0, 1.0         # p0 = 1 (Sec. 5.1)

    def forward(self, z, y, ids=None):
        """Embeddings z (B, D), raw or normalised, labels y (B,), image ids (B,) or None -> scalar loss."""
        if z.ndim != 2 or y.shape != z.shape[:1]:
            raise ValueError("expected embeddings (B, D) and labels (B,), "
                             f"got {tuple(z.shape)} and {tuple(y.shape)}")
        with torch.autocast(z.device.type, enabled=False):      # 16-bit similarities change the pair weights
            z = normalize(z).to(self.mean.dtype)                # (B, D)
            use_memory = self.method != "none" and self.step >= self.warmup_steps
            self.step += 1
            if not use_memory:
                return self.loss_within_batch(z, y)
            if self.adapts:
                self.adapt(z.detach())
            # The adapted memory stays in store: it is one step behind the network, not many (Sec. 3.1).
            slots = self.memory.enqueue(z.detach(), y, ids)     # (min(B, M),)
            loss = self.loss_against_memory(z, y, slots)
            return loss + self.loss_within_batch(z, y) if self.method == "xbm+batch" else loss

    @torch.no_grad()
    def adapt(self, z):
        """Algorithm 1: filter the moments of the batch z (B, D), then match the memory to them in place."""
        if len(z) < 2:
            return
        mean, std = moments(z)                                                  # (D,), (D,) E[B], s[B]
        if self.filter_step == 0:
            self.mean.copy_(mean), self.std.copy_(std)
        if self.method == "axbn":
            mean, std, self.p, self.gain = kalman_update(
                self.mean, self.std, self.p, self.gain, mean, std, len(z), self.filter_step, *self.noise)
        else:
            self.gain = self.constant_gain
            mean, std = torch.lerp(self.mean, mean, self.gain), torch.lerp(self.std, std, self.gain)
        self.mean.copy_(mean), self.std.copy_(std)
        self.filter_step += 1
        self.memory.match(self.mean, self.std)                                  # Alg. 1, lines 6-9

    def loss_against_memory(self, z, y, slots):
        """Anchors z (B, D) against all rows of the memory; gradient flows through the anchors only.

        It is computed here already, so that no (B, n) tensor waits for the network's backward pass.
        """
        memory, masks = self.memory, pair_masks(y, self.memory.labels, slots)
        norms = memory.norms.clamp_min(torch.finfo(z.dtype).tiny)               # (n,) a row may be zero
        sim = z.detach() @ memory.embeddings.T                                  # (B, n)
        if self.adapts:            # adapted rows have left the unit sphere; others are as they were enqueued
            sim.div_(norms)
        with torch.enable_grad():
            loss = self.loss(sim.requires_grad_(), *masks)
            (weights,) = torch.autograd.grad(loss, sim)                         # (B, n) of the pairs
        if self.adapts:
            weights = weights.contiguous().div_(norms)
        return GivenGradient.apply(z, loss.detach(), weights @ memory.embeddings)           # () and (B, D)

    def loss_within_batch(self, z, y):
        """Anchors z (B, D) against the batch itself; gradient flows through both sides."""
        own = torch.arange(len(z), device=z.device)                             # (B,)
        return self.loss(z @ z.T, *pair_masks(y, y, own))

    def get_extra_state(self):
        return {"step": self.step, "filter_step": self.filter_step, "p": self.p, "gain": self.gain}

    def set_extra_state(self, state):
        self.step, self.filter_step, self.p, self.gain = (
            state[name] for name in ("step", "filter_step", "p", "gain"))
