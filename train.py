# SPDX-License-Identifier: MIT
"""Train an embedding with AXBN or one of its baselines.

    python train.py                             synthetic products, 2 minutes on two CPU cores
    python train.py --dataset sop --root DIR    the paper's setting; DIR: Stanford_Online_Products/

Every epoch adds a line to <out>/log.jsonl and rewrites <out>/checkpoint.pt. The best epoch so far
is also kept, as <out>/best.pt. The same command continues where it stopped.

Start reading with `train_epoch`, one step, and then `train`, the run. Another loss is a row of
LOSSES, another optimiser a line of `train`; another measurement is a method of `Measured`, called
after the step, and a field of its record.
"""
import argparse
import copy
import json
import math
import os
import pickle
import random
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean

# Threads that wait sleep. They would spin, on cores that others need: beside two busy programs two
# cores train 1.4 to 3 times as fast this way, and 0.7 times as fast where nothing else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch starts its threads

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import acbn
import data
from data import autocast, gather_object, rank_and_world
from eval import (FORMAT, Encoder, embed_test, kept_buffers, load_checkpoint, load_weights,
                  scores)

# ------------------------------------------------- settings

PAPER = dict(
    loss="supcon", backbone="resnet50", weights="imagenet", augment="paper", image_size=224,
    dim=512, bn="train", batch_size=64, epochs=50, head_epochs=2,
    lr=1e-4, lr_drops=[15, 30, 45], lr_decay=0.33, weight_decay=0.01,
    memory_ratio=0.5, warmup_steps=0, gain_interval=100)        # Sec. 5.1
SMALL = dict(
    loss="ms", backbone="conv4", weights="none", augment="light", image_size=32,
    dim=128, bn="train", batch_size=16, epochs=7, head_epochs=0,
    lr=3e-4, lr_drops=[4, 6], lr_decay=0.33, weight_decay=0.01,
    memory_ratio=0.5, warmup_steps=1000, gain_interval=100)     # from scratch, hence the warm-up
PRESETS = {"synthetic": SMALL,                                  # the other data sets: PAPER
           "df2": {**PAPER, "memory_ratio": 1.0, "gain_interval": 10},
           "folder": {**PAPER, "bn": "frozen", "warmup_steps": None}}   # None: half of the epochs

LOSSES = {      # name: (the loss, a function or a module; the mining whose pairs the log counts)
    "ms": (acbn.multi_similarity_loss, acbn.multi_similarity_pairs),
    "supcon": (acbn.mined_supcon_loss, acbn.pair_margin),
    "contrastive": (acbn.contrastive_loss,
                    lambda sim, positive, negative: (positive, negative & (sim > 0.5))),
}
MAY_CHANGE = {"epochs", "workers", "device", "out", "root", "allow_partial",    # on resuming
              "warmup_epochs"}                          # which has become warmup_steps by then
COLLAPSED = 0.29    # below this spread: all runs in results/logs that fell below it had collapsed


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="'preset' defaults depend on --dataset.")
    add = p.add_argument
    number = data.number
    g = p.add_argument_group("data").add_argument
    data.add_flags(g)
    g("--val-fraction", type=number(float, 0, below=1), default=0.0,
      help="share of training classes held out to choose the best epoch on (0: the test split)")
    g("--image-size", type=number(int, 1), help="pixels a side (preset)")
    g("--augment", choices=("paper", "light", "none"), help="training transform (preset)")
    g("--workers", type=number(int, 0),
      help="processes that read images, without effect on results (GPU: one a core, up to 16; "
      "CPU: 0)")
    group = p.add_argument_group("method")
    g = group.add_argument
    g("--method", choices=acbn.METHODS, default="axbn", help="xbm+batch is the paper's XBM* (axbn)")
    g("--loss", choices=LOSSES, help="supcon, with pair margins, is the paper's (preset)")
    g("--memory-ratio", type=number(float, 0, above=True),
      help="memory rows as a share of the training images (preset)")
    late = group.add_mutually_exclusive_group().add_argument
    late("--warmup-steps", type=number(int, 0),
         help="steps with the plain loss before the memory is used (preset)")
    late("--warmup-epochs", type=number(int, 0), help="the same in epochs (folder: half of them)")
    g("--fill-memory", action="store_true",
      help="after the warm-up, fill the memory at once with random training images")
    g("--process-noise", type=number(float, 0), default=1.0, help="q of the Kalman filter (1)")
    g("--measurement-noise", type=number(float, 0), default=0.01,
      help="r, over the batch size (0.01)")
    g("--gain-interval", type=number(int, 1),
      help="the gain is renewed every so many steps (preset)")
    g("--momentum", type=number(float, 0, below=1), default=0.1,
      help="ema: share of the old estimate, in [0, 1) (0.1)")
    g = p.add_argument_group("model").add_argument
    g("--backbone", help="conv4, conv4-nobn, a torchvision classifier, or MODULE:FUNCTION, which "
      "returns a network from images to features (B, width) (preset)")
    g("--weights", type=os.path.expanduser,
      help="imagenet, none, or a file with a state_dict (preset)")
    g("--dim", type=number(int, 0),
      help="size of the embedding; 0: the backbone's own features, without a new layer (preset)")
    g("--bn", choices=("train", "frozen"), help="batch norm uses the batch's statistics, as in the "
      "paper, or its stored ones (preset)")
    g = p.add_argument_group("training").add_argument
    g("--batch-size", type=number(int, 1), help="images a step, over all processes (preset)")
    g("--images-per-class", type=number(int, 1), default=4,
      help="images of each class in a batch (4)")
    g("--epochs", type=number(int, 0),
      help="each of len(training images) // batch-size steps (preset)")
    g("--head-epochs", type=number(int, 0), help="first, epochs of the last layer alone (preset)")
    g("--lr", type=number(float, 0, above=True), help="of AdamW (preset)")
    g("--lr-drops", type=number(int, 0), nargs="*",
      help="epochs after which the rate is multiplied by --lr-decay (preset)")
    g("--lr-decay", type=number(float, 0, above=True), help="(preset)")
    g("--weight-decay", type=number(float, 0), help="of AdamW (preset)")
    g("--amp", choices=("off", "bf16", "fp16"), help="mixed precision; the rounding of bf16 hides "
      "the drift that the log measures (fp16 on an Nvidia GPU, else off)")
    g("--chunk", type=number(int, 0), default=0, help="keep the activations of at most so many "
      "images, for one more forward pass: large batches on a small GPU. Batch norm in training "
      "mode sees a chunk at a time (0: keep all)")
    g("--device", default="cuda" if torch.cuda.is_available() else "cpu",
      help="(a GPU if there is one)")
    g("--seed", type=number(int, 0, below=2 ** 32), default=0,
      help="of weights, batches, augmentation and dropout (0)")
    g("--deterministic", action="store_true", help="the same bits on a GPU too, but slower")
    add("--out", type=os.path.expanduser,
        help="default runs/<dataset>-<method>-<loss>-b<batch>-s<seed>")
    args = p.parse_args(argv)
    if args.backbone and ":" in args.backbone and args.weights is None:
        args.weights = "none"           # such a function brings its own
    for name, value in PRESETS.get(args.dataset, PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    on_gpu = args.device.startswith("cuda")
    if on_gpu and "LOCAL_RANK" in os.environ:       # torchrun's processes have one GPU each; where
        gpus = max(1, torch.cuda.device_count())    # a process sees its own alone, that is cuda:0
        args.device = f"cuda:{int(os.environ['LOCAL_RANK']) % gpus}"
    args.amp = args.amp or ("fp16" if on_gpu else "off")
    if args.workers is None:
        args.workers = data.default_workers(args.device)
    args.out = args.out or (f"runs/{args.dataset}-{args.method}-{args.loss}-b{args.batch_size}"
                            f"-s{args.seed}")
    if args.chunk and args.device.startswith("mps"):
        p.error("--chunk: on Apple's GPUs torch cannot repeat the random numbers of a forward pass")
    if args.process_noise + args.measurement_noise == 0:
        p.error("--process-noise and --measurement-noise cannot both be 0")
    data.usable_device(args.device, p)
    return args


# ------------------------------------------------- many processes, as torchrun starts them

def join(device):
    """Takes this process's GPU, and joins torchrun's other processes, if there are any."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(torch.device(device).index or 0)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        try:    # 4 hours: the other processes wait while rank 0 computes the scores
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=4))
        except ValueError as error:
            raise data.UserError("WORLD_SIZE is set as if torchrun had started several processes, "
                                 f"but it did not: {error}") from None


def gather(t):
    """Slices (b, ...) of all processes in rank order -> (B, ...), the same in every process.

    Gradient flows to this process's slice alone, times the number of processes, by which DDP
    divides it. So every process calls the loss on the whole batch, as a single one would.
    """
    rank, world = rank_and_world()
    if world == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(world)]
    dist.all_gather(parts, t.detach().contiguous())
    parts[rank] = t.detach() + world * (t - t.detach())         # the value t, the gradient world
    return torch.cat(parts)


def parallel(module, device, unused=False):
    """The module with its gradients averaged over the processes; with one process, the module.
    unused: it may have parameters that get no gradient.
    """
    if rank_and_world()[1] == 1:
        return module
    return DistributedDataParallel(module, [device] if device.startswith("cuda") else None,
                                   find_unused_parameters=unused)


def say(*lines):
    if rank_and_world()[0] == 0:
        print(*lines, sep="\n", flush=True)


# ------------------------------------------------- random numbers

def generators(device):
    """{kind: torch's module of its random numbers}, of the CPU and of the device."""
    kind = torch.device(device).type
    return {"cpu": torch.random, **({} if kind == "cpu" else {kind: getattr(torch, kind)})}


def random_state(device):
    """{kind: state of this process's random numbers}, of the CPU and of the device."""
    return {kind: module.get_rng_state() for kind, module in generators(device).items()}


def set_random_state(device, state):
    for kind, module in generators(device).items():
        if kind in state:               # not where a run goes on with another kind of device
            module.set_rng_state(state[kind])


@contextmanager
def without_trace(model, device, state):
    """Inside: no gradients, and the random numbers that follow `state`. Afterwards buffers (batch
    norm's statistics) and random numbers are as before.
    """
    before = random_state(device)
    with torch.no_grad(), kept_buffers(model):
        set_random_state(device, state)
        try:
            yield
        finally:
            set_random_state(device, before)


# ------------------------------------------------- what is measured on the way

class CountedLoss(nn.Module):
    """A loss that counts the pairs that its mining leaves. (xbm+batch calls it twice a step; the
    counts of the second call, against the memory, stay.)
    """

    def __init__(self, loss, mine):
        super().__init__()
        self.loss, self.mine = copy.deepcopy(loss), mine    # each run trains its own weights

    def forward(self, sim, positive, negative):
        mined = self.mine(sim.detach(), positive, negative)                     # 2 x (B, N)
        self.pairs = torch.stack([mask.sum() for mask in mined])                # (2,)
        return self.loss(sim, positive, negative)


class Measured:
    """What the log says of an epoch. The figures of the steps stay on the device: the host waits
    for them only where it prints, and at the end.
    """

    def __init__(self, epoch, steps, args):
        self.epoch, self.steps, self.args = epoch, steps, args
        self.every = min(50, max(1, steps // 6))                # drift is measured at these steps
        self.step, self.drifts, self.spreads = 0, [], []
        self.seen = torch.zeros(4, steps, device=args.device)   # loss, norm, positives, negatives
        self.start = self.shown = time.perf_counter()

    def add(self, loss, norm, pairs):
        """A step's loss (), gradient norm () and numbers of mined positives and negatives (2,)."""
        self.seen[:, self.step] = torch.stack([loss.detach(), norm, *pairs])
        self.step += 1
        if time.perf_counter() - self.shown > 5 and self.step < self.steps:
            self.progress()

    def drift(self, model, x, z, state):
        """How far this step moved the embeddings z (B, D) of the batch; x (b, 3, S, S): this
        process's images, state: the random numbers' before they were embedded.
        """
        if self.step % self.every:
            return
        device, amp = self.args.device, self.args.amp
        with without_trace(model, device, state), autocast(device, amp):
            moved = acbn.normalize(gather(model(x).float()))            # (B, D)
        z = acbn.normalize(z.detach())
        self.drifts.append((moved - z).norm(dim=1))         # (B,) Eq. 5, dk = 1, the same pixels
        self.spreads.append(z.std(0, correction=0).norm())  # () 0: collapsed, 1: centred

    def progress(self):
        """Prints a line; returns the means so far, and the steps a second."""
        means = summary(self.seen[:, :self.step], self.epoch, self.steps, self.args)
        self.shown = time.perf_counter()
        speed = self.step / (self.shown - self.start)
        left = round(((self.args.epochs - self.epoch + 1) * self.steps - self.step) / speed)
        say(f"epoch {self.epoch}/{self.args.epochs}  step {self.step}/{self.steps}  "
            f"loss {self.seen[0, self.step - 1].item():.4f}  "
            f"{speed * self.args.batch_size:.0f} images/s  {left // 60}:{left % 60:02} left")
        return means, speed

    def record(self, rate, criterion):
        """The epoch's line of the log."""
        means, speed = self.progress()
        started = criterion.method in acbn.ADAPTING and len(criterion.memory)
        return {"epoch": self.epoch, "lr": rate, **means, "gain": criterion.K if started else None,
                "memory": len(criterion.memory),
                "images_per_second": round(speed * self.args.batch_size, 1),
                "drift_mean": fmean(drift.mean().item() for drift in self.drifts),
                "drift_max": fmean(drift.max().item() for drift in self.drifts),
                "spread": fmean(spread.item() for spread in self.spreads)}


def summary(seen, epoch, steps, args):
    """Means over the steps so far of an epoch, from seen (4, steps so far): loss, gradient norm,
    positives and negatives. A loss or gradient that is not finite ends the run. But fp16 skips a
    step whose gradient overflows, unless it has skipped every step of the epoch, and ten or more.
    """
    losses, norms, positives, negatives = seen.tolist()
    taken = [norm for norm in norms if math.isfinite(norm)]
    fp16 = args.amp == "fp16"
    may_skip = fp16 and (taken or len(losses) < max(steps, 10))
    for step, (loss, norm) in enumerate(zip(losses, norms), 1):
        if not math.isfinite(loss) or not (math.isfinite(norm) or may_skip):
            raise data.UserError(f"epoch {epoch}, step {step}: the loss or its gradient is not "
                                 f"finite; try a lower --lr than {args.lr:g}"
                                 + (", or --amp bf16 or off" if fp16 else ""))
    return {"loss": fmean(losses), "gradient_norm": fmean(taken or [0]),
            "steps_skipped": len(norms) - len(taken), "steps_without_pairs": losses.count(0),
            "positives_mined": fmean(positives), "negatives_mined": fmean(negatives)}


def warning(record, steps):
    """What an epoch's record should warn of, or ""."""
    texts = []
    if record["steps_without_pairs"] == steps:
        texts.append("no step of the epoch had a pair to learn from: the loss was 0 throughout")
    if record["spread"] < COLLAPSED:
        texts.append("the embeddings have collapsed: all images get nearly the same one (spread "
                     f"{record['spread']:.2g} of 1)")
    return "; ".join(texts)


# ------------------------------------------------- parts of a run

def load_data(args):
    """(all splits, splits to use, validation split or None, P x m sampler)."""
    everything, val = data.load_for(args), None
    splits = everything
    if args.val_fraction:
        splits, val = data.hold_out(everything, args.val_fraction)
        data.refuse_hopeless(data.Splits(splits.train, val),
                             f"--val-fraction {args.val_fraction:g}")
    sampler = data.ClassBalancedSampler(splits.train.labels, args.batch_size, args.images_per_class,
                                        args.seed, *rank_and_world())
    if args.method != "none" and memory_rows(args, splits.train) < args.batch_size:
        raise data.UserError(f"--memory-ratio {args.memory_ratio:g} makes a memory of less than "
                             f"one batch, --batch-size {args.batch_size}")
    return everything, splits, val, sampler


def memory_rows(args, split):
    return int(args.memory_ratio * len(split.labels))


def make_model(args):
    """The encoder with its first weights, in training mode, on the device."""
    try:
        model = Encoder(args.backbone, args.dim, args.bn == "frozen", args.chunk, args.image_size)
        with torch.no_grad():       # fails here already where the network cannot take such images
            model.eval()(torch.zeros(1, 3, args.image_size, args.image_size))
    except (ValueError, RuntimeError, AssertionError) as error:         # of torch and torchvision
        if ":" in args.backbone:                    # a fault of one's own shows where it stands
            raise
        raise data.UserError(f"--backbone {args.backbone}, --image-size {args.image_size}, --dim "
                             f"{args.dim}: {str(error)[:300]}") from None
    load_weights(model, args.backbone, args.weights)
    # channels_last is faster with --amp alone, and gives wrong gradients on Apple's GPUs.
    plain = args.amp == "off" or args.device.startswith("mps")
    model.to(args.device, memory_format=torch.contiguous_format if plain else torch.channels_last)
    if args.bn == "train" and rank_and_world()[1] > 1 and args.device.startswith("cuda"):
        model = synchronised(model)
    return model.train()


def synchronised(model):
    """The model with batch norm over the whole batch of all processes, by torch's SyncBatchNorm."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and type(layer) not in (
                nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
            raise data.UserError(f"--backbone: its layer {name} is a {type(layer).__name__}, which "
                                 "torch would turn into a plain SyncBatchNorm; with several GPUs "
                                 "use --bn frozen")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def refuse_foreign_randomness(model, args):
    """--chunk embeds each image twice. It can repeat torch's random numbers, but no others."""
    def others():
        return pickle.dumps((random.getstate(), np.random.get_state()))
    size, state, found, before = args.image_size, random_state(args.device), [], others()
    x = torch.arange(12 * size ** 2).view(4, 3, size, size) % 251           # (4, 3, S, S)
    for _ in range(2):
        with without_trace(model, args.device, state):
            found.append(model(x.to(args.device)))                          # (4, D)
    alike = torch.allclose(*found, rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))
    if not alike or others() != before:
        raise data.UserError(f"--chunk: {args.backbone} draws random numbers that are not torch's, "
                             "which cannot be repeated on the way back")


def warmup_steps(args, steps):
    """The warm-up in steps, of `steps` an epoch. A folder without flags has half of the epochs that
    its run began with.
    """
    if args.warmup_epochs is not None:
        return args.warmup_epochs * steps
    if args.warmup_steps is not None:
        return args.warmup_steps
    path = Path(args.out) / "checkpoint.pt"
    begun = load_checkpoint(path)["settings"] if path.exists() else {}
    return begun.get("warmup_steps", args.epochs // 2 * steps)


def make_criterion(args, dim, split):
    """The loss against the memory, on the device; for "none" the memory stays empty."""
    rows = 1 if args.method == "none" else memory_rows(args, split)
    return acbn.CrossBatchLoss(
        dim, rows, args.method, CountedLoss(*LOSSES[args.loss]),
        args.process_noise, args.measurement_noise, args.gain_interval, args.momentum,
        args.warmup_steps).to(args.device)


def train_head(model, batches, sampler, epochs, device, amp):
    """The new last layer alone, as the paper starts: plain supervised contrastive loss, SGD."""
    criterion = acbn.CrossBatchLoss(model.dim, 1, "none", acbn.supcon_loss).to(device)
    head = parallel(model.head, device)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.001)
    model.eval()                            # the backbone's batch-norm statistics stay as they are
    for epoch in range(epochs):
        sampler.set_epoch(epoch - epochs)       # negative: other batches than training's
        for x, y in batches:
            with autocast(device, amp):
                with torch.no_grad():
                    features = model.features(x.to(device))                     # (b, width)
                z = head(features)                                              # (b, D)
            loss = criterion(gather(z.float()), gather(y.to(device)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        say(f"head epoch {epoch + 1}/{epochs}  loss {loss.item():.4f}")
    model.train()


def fill_memory(model, criterion, images, args):
    """Random training images, in whole batches, embedded by the network as it is now (XBM)."""
    g = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(images), generator=g)[:criterion.memory.size].tolist()
    batches = data.loader(images, args.workers, batch_size=args.batch_size, drop_last=True,
                          sampler=[(i, k) for k, i in enumerate(order)])
    state = random_state(args.device)
    with without_trace(model, args.device, state), autocast(args.device, args.amp):
        torch.manual_seed(args.seed)        # the same dropout, so the same rows, in every process
        for x, y in batches:
            z = acbn.normalize(model(x.to(args.device)))                        # (B, D)
            criterion.memory.enqueue(z, y.to(args.device))


# ------------------------------------------------- the step, and the scores

def train_epoch(epoch, args, batches, network, model, criterion, optimizer, scaler):
    """One epoch, step by step; returns its line of the log. network: the model, or DDP of it."""
    model.train()
    rate = args.lr * args.lr_decay ** sum(epoch > drop for drop in args.lr_drops)
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    measured = Measured(epoch, len(batches), args)
    for x, y in batches:
        if args.fill_memory and criterion.step == args.warmup_steps:
            fill_memory(model, criterion, batches.dataset, args)
        x = x.to(args.device, non_blocking=batches.pin_memory)      # (b, 3, S, S) uint8
        y = y.to(args.device, non_blocking=batches.pin_memory)      # (b,) this process's share
        state = random_state(args.device)
        with autocast(args.device, args.amp):
            z = network(x)                                          # (b, D)
        z, y = gather(z.float()), gather(y)                         # (B, D), (B,) the whole batch
        loss = criterion(z, y)                                      # () adapt, enqueue, compare
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, math.inf)       # () clips nothing
        scaler.step(optimizer)                                      # fp16: not if norm is infinite
        scaler.update()
        measured.add(loss, norm, criterion.loss.pairs)
        measured.drift(model, x, z, state)
    return measured.record(rate, criterion)


def evaluate(model, splits, val, args):
    """Scores of the test split, and val_... of the held-out classes; on rank 0 alone."""
    start, result = time.perf_counter(), {}
    held_out = [("val_", data.Splits(None, val), [1])] if val else []
    for prefix, part, ks in [("", splits, data.DATASETS[args.dataset].ks), *held_out]:
        query, gallery = embed_test(model, part, args)
        if rank_and_world()[0] == 0:
            found = scores(query, gallery, ks)
            result.update({prefix + name: value for name, value in found.items()})
    return {**result, "eval_seconds": round(time.perf_counter() - start, 1)}


# ------------------------------------------------- checkpoints and the log

def claim(out):
    """Locks the folder; the system frees the lock when the process ends."""
    lock = (out / "lock").open("w")
    try:
        import fcntl
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise data.UserError(f"--out {out}: another run is writing there; use another "
                             "--out") from None
    except (ImportError, OSError):      # no such locks on this system or disk: nothing is refused
        pass
    return lock


def write_log(out, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    data.write(out / "log.jsonl", lambda file: file.write(lines.encode()))


def best_of(records):
    """The epoch that is best on the held-out classes, or else on the test split."""
    return max(records, key=lambda record: record.get("val_recall@1", record["recall@1"]))


def save(args, fingerprint, parts, records):
    """Writes the state after the last epoch of the records; each process gives its random state."""
    states = gather_object(random_state(args.device))
    if rank_and_world()[0] == 0:
        out, epoch = Path(args.out), records[-1]["epoch"]
        state = {"format": FORMAT, "epoch": epoch, "settings": vars(args), "data": fingerprint,
                 "model": parts["model"].state_dict()}
        if best_of(records)["epoch"] == epoch:
            data.write(out / "best.pt", partial(torch.save, state))
        state.update({name: part.state_dict() for name, part in parts.items()})
        state.update(records=records, rng=states)
        data.write(out / "checkpoint.pt", partial(torch.save, state))
        write_log(out, records)


def resume(path, args, fingerprint, parts):
    """Fills the parts from a checkpoint and returns its records; refuses other settings or data."""
    state, (rank, world) = load_checkpoint(path), rank_and_world()
    for name in {**state["settings"], **vars(args)}:
        then, now = state["settings"].get(name), vars(args).get(name)
        if name not in MAY_CHANGE and then != now:
            raise data.UserError(f"{path}: was made with --{name.replace('_', '-')} {then}, now it "
                                 f"is {now}; give the former, or another --out")
    if state["data"] != fingerprint:
        raise data.UserError(f"{path}: was made with other data: their names or labels differ from "
                             f"those in {args.root}; use another --out")
    if len(state["rng"]) != world:
        raise data.UserError(f"{path}: was made with {len(state['rng'])} processes, now there are "
                             f"{world}")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError) as error:
        raise data.UserError(f"{path}: does not fit --backbone {args.backbone} or --loss "
                             f"{args.loss} as they are now: {error}") from None
    for p, of_p in parts["optimizer"].state.items():
        for name, t in of_p.items():        # laid out as p is: fused optimisers ignore strides
            if isinstance(t, torch.Tensor) and t.shape == p.shape:
                of_p[name] = torch.empty_like(p).copy_(t)
    set_random_state(args.device, state["rng"][rank])
    return state["records"]


def open_run(args, fingerprint, parts):
    """(the lock of the folder --out, the records of the run in it that the parts now continue)."""
    out, rank = Path(args.out), rank_and_world()[0]
    out.mkdir(parents=True, exist_ok=True)
    lock = claim(out) if rank == 0 else None
    resumed = (out / "checkpoint.pt").exists()
    records = resume(out / "checkpoint.pt", args, fingerprint, parts) if resumed else []
    if len(set(gather_object(len(records)))) > 1:       # all have looked before rank 0 writes
        raise data.UserError(f"--out {out}: the processes find different checkpoints there; it "
                             "must lie on a disk that all of them share")
    if not resumed and (out / "log.jsonl").exists():
        raise data.UserError(f"--out {out}: holds a log without its checkpoint; use another --out")
    if resumed and rank == 0:
        write_log(out, records)         # it lacks a line if the run was killed after its checkpoint
    say(f"writing to {out}; stopped at any time, the same command continues after the last epoch")
    if resumed:
        say(f"continuing {out} after epoch {records[-1]['epoch']}")
    return lock, records


# ------------------------------------------------- the run, from top to bottom

def train(args):
    # Data, model, loss and optimiser.
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")         # as torch asks for it
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.manual_seed(args.seed)
    join(args.device)
    rank, world = rank_and_world()
    everything, splits, val, sampler = load_data(args)
    args.warmup_steps = warmup_steps(args, len(sampler))
    model = make_model(args)
    if args.chunk:
        refuse_foreign_randomness(model, args)
    torch.manual_seed(args.seed + rank)     # the same weights everywhere, but each its own dropout
    network = parallel(model, args.device, unused=":" in args.backbone)     # such as a mask token
    images = data.Images(splits.train, args.image_size, args.augment, training=True)
    batches = data.loader(images, args.workers, pin_memory=args.device.startswith("cuda"),
                          batch_sampler=data.Seeded(sampler))
    criterion = make_criterion(args, model.dim, splits.train)
    parameters = [*model.parameters(), *criterion.parameters()]         # a loss may have some
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay,
                                  fused=True)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.amp == "fp16")
    parts = {"model": model, "criterion": criterion, "optimizer": optimizer, "scaler": scaler}

    # A new run, or the one that stopped in the same folder.
    say(*data.describe(splits), json.dumps(vars(args)))
    fingerprint = data.fingerprint(everything)
    lock, records = open_run(args, fingerprint, parts)
    if args.method != "none" and 0 < args.epochs * len(batches) <= args.warmup_steps:
        say(f"warning: --warmup-steps {args.warmup_steps}: the memory does not start in "
            f"{args.epochs} epochs of {len(batches)} steps")

    for epoch in range(len(records), args.epochs + 1):
        if epoch == 0:
            if args.dim and args.head_epochs:
                train_head(model, batches, sampler, args.head_epochs, args.device, args.amp)
            settings = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
            record = {"epoch": 0, "settings": settings}
        else:
            sampler.set_epoch(epoch)
            record = train_epoch(epoch, args, batches, network, **parts)
            if text := warning(record, len(batches)):
                record["warning"] = text
                say(f"warning: {text}")
        if world > 1:       # rank 0 saves: all get its batch-norm statistics and loss parameters
            for t in [*model.buffers(), *criterion.parameters()]:
                dist.broadcast(t.detach(), 0)
        record.update(evaluate(model, splits, val, args))
        records.append(record)
        say(f"epoch {epoch}/{args.epochs}  " + "  ".join(
            f"{k} {100 * v:.2f}" for k, v in record.items() if "recall" in k or "map" in k))
        save(args, fingerprint, parts, records)

    if rank == 0:
        last, best = records[-1], best_of(records)
        say(f"Recall@1: last {100 * last['recall@1']:.2f} (epoch {last['epoch']}), best "
            f"{100 * best['recall@1']:.2f} (epoch {best['epoch']}, chosen on "
            f"{'held-out training classes' if val else 'the test split'})")
        lock.close()
    return records


def main(argv=None):
    args = parse_args(argv)
    try:
        return train(args)
    except (data.UserError, OSError) as error:
        sys.exit(f"train.py: {data.sentence(error)}")


if __name__ == "__main__":
    data.tolerate_terminal()
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends it at once, like SIGTERM
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
