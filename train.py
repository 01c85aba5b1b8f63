# SPDX-License-Identifier: MIT
"""Train an embedding with AXBN or one of its baselines.

    python train.py                             synthetic products, about 2 minutes on two CPU cores
    python train.py --dataset sop --root DIR    the paper's setting; DIR holds Stanford_Online_Products/

Every epoch writes <out>/log.jsonl (one JSON line an epoch), <out>/checkpoint.pt and, when it is the best so
far, <out>/best.pt. The same command continues where it stopped.
"""
import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import acbn
import data
from eval import Encoder, autocast, embed_test, evaluate, load_file, load_weights, recall_at_k, usable_ks

# ---------------------------------------------------------------- settings

PAPER = dict(
    backbone="resnet50", weights="imagenet", augment="paper", image_size=224, dim=512, batch_size=64,
    epochs=50, head_epochs=2, lr=1e-4, lr_drops=[15, 30, 45], lr_decay=0.33, weight_decay=0.01,
    memory_ratio=0.5, warmup_steps=0, gain_interval=100)        # Sec. 5.1
SMALL = dict(
    backbone="conv4", weights="none", augment="light", image_size=32, dim=128, batch_size=16,
    epochs=7, head_epochs=0, lr=3e-4, lr_drops=[4, 6], lr_decay=0.33, weight_decay=0.01,
    memory_ratio=0.5, warmup_steps=1000, gain_interval=100)     # from scratch, hence the warm-up
PRESETS = {"synthetic": SMALL, "sop": PAPER, "inshop": PAPER, "vehicleid": PAPER, "folder": PAPER,
           "df2": {**PAPER, "memory_ratio": 1.0, "gain_interval": 10}}

# name: (the loss of the mined pairs, the mining that the log counts)
LOSSES = {
    "ms": (acbn.multi_similarity_loss_, acbn.multi_similarity_pairs),
    "supcon": (lambda s, p, n: acbn.supcon_loss(s, *acbn.pair_margin(s, p, n)), acbn.pair_margin),
    "contrastive": (acbn.contrastive_loss, lambda s, p, n: (p, n & (s > 0.5))),
}
MAY_CHANGE = {"epochs", "workers", "device", "out", "root", "allow_partial"}    # on resuming
FORMAT = 1              # of checkpoint.pt


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False, epilog="'preset' defaults depend on --dataset.")
    add = p.add_argument
    number = data.number
    g = p.add_argument_group("data").add_argument
    data.add_flags(g, "synthetic")
    g("--val-fraction", type=number(float, 0, below=1), default=0.0,
      help="share of training classes held out to choose the best epoch on (0: the test split)")
    g("--image-size", type=number(int, 1), help="pixels a side (preset)")
    g("--augment", choices=("paper", "light", "none"), help="training transform (preset)")
    g("--workers", type=number(int, 0),
      help="processes that read images, results do not depend on it (GPU: one a core, CPU: 0)")
    g = p.add_argument_group("method").add_argument
    g("--method", choices=acbn.METHODS, default="axbn", help="xbm+batch is the paper's XBM* (axbn)")
    g("--loss", choices=LOSSES, default="ms", help="supcon with pair margins is the paper's (ms)")
    g("--memory-ratio", type=number(float, 0, above=True),
      help="memory rows as a share of the training images (preset)")
    g("--warmup-steps", type=number(int, 0),
      help="steps with the plain loss before the memory is used (preset)")
    g("--fill-memory", action="store_true", help="then fill it at once with random training images")
    g("--process-noise", type=number(float, 0), default=1.0, help="q of the Kalman filter (1)")
    g("--measurement-noise", type=number(float, 0), default=0.01, help="r, divided by the batch size (0.01)")
    g("--gain-interval", type=number(int, 1), help="the gain is renewed every so many steps (preset)")
    g("--momentum", type=number(float, 0, below=1), default=0.1,
      help="ema: share of the old estimate, in [0, 1) (0.1)")
    g = p.add_argument_group("model").add_argument
    g("--backbone", help="conv4, conv4-nobn or any torchvision classifier (preset)")
    g("--weights", help="imagenet, none, or a file with a state_dict (preset)")
    g("--dim", type=number(int, 1), help="size of the embedding (preset)")
    g = p.add_argument_group("training").add_argument
    g("--batch-size", type=number(int, 1), help="images a step, over all processes (preset)")
    g("--images-per-class", type=number(int, 1), default=4, help="images of each class in a batch (4)")
    g("--epochs", type=number(int, 0), help="of len(training images) // batch-size steps (preset)")
    g("--head-epochs", type=number(int, 0), help="before that, epochs of the last layer alone (preset)")
    g("--lr", type=number(float, 0, above=True), help="of AdamW (preset)")
    g("--lr-drops", type=number(int, 0), nargs="*",
      help="epochs after which the rate is multiplied by --lr-decay (preset)")
    g("--lr-decay", type=number(float, 0, above=True), help="(preset)")
    g("--weight-decay", type=number(float, 0), help="of AdamW (preset)")
    g("--amp", choices=("off", "bf16", "fp16"), help="mixed precision (bf16 on a GPU, else off)")
    g("--sync-bn", action="store_true", help="several processes: batch norm over the whole batch, by torch")
    g("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    g("--seed", type=number(int, 0, below=2 ** 32), default=0)
    g("--deterministic", action="store_true", help="the same bits on a GPU too, run after run, but slower")
    add("--out", help="default runs/<dataset>-<method>-<loss>-b<batch>-s<seed>")
    args = p.parse_args(argv)
    for name, value in PRESETS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    on_gpu = args.device.startswith("cuda")
    args.amp = args.amp or ("bf16" if on_gpu else "off")
    if args.workers is None:            # on a CPU the network's own threads use every core already
        args.workers = min(os.cpu_count(), 16) if on_gpu else 0
    args.out = args.out or f"runs/{args.dataset}-{args.method}-{args.loss}-b{args.batch_size}-s{args.seed}"
    if args.batch_size % args.images_per_class:
        p.error(f"--batch-size {args.batch_size} is not a multiple of "
                f"--images-per-class {args.images_per_class}")
    if args.process_noise + args.measurement_noise == 0:
        p.error("--process-noise and --measurement-noise cannot both be 0")
    if args.amp == "fp16" and not on_gpu:
        p.error("--amp fp16 needs a GPU; use bf16 or off")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        p.error(f"--device {args.device} cannot be used ({str(error).splitlines()[0]}); --device cpu can")
    return args


# ---------------------------------------------------------------- many processes, as torchrun starts them

def join(args):
    """Join torchrun's other processes, if there are any. From here on args.device is this process's own."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        on_gpu = args.device.startswith("cuda")
        if on_gpu:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        # The others wait while rank 0 evaluates; when a process dies torchrun ends them all.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=4))


def ranks():
    """(this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(t):
    """Slices (b, ...) of all processes in rank order -> (B, ...); gradient flows to this process's slice."""
    rank, world = ranks()
    if world == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(world)]
    dist.all_gather(parts, t.detach().contiguous())
    parts[rank] = t
    return torch.cat(parts)


def parallel(module, device):
    """The module with its gradients averaged over the processes; with one process, the module itself."""
    if ranks()[1] == 1:
        return module
    return DistributedDataParallel(module, [device] if device.startswith("cuda") else None)


def say(*lines):
    if ranks()[0] == 0:
        print(*lines, sep="\n", flush=True)


# ---------------------------------------------------------------- what is measured on the way

@contextmanager
def untouched(model):
    """No gradients inside; afterwards buffers (batch-norm statistics) and random states are as before."""
    saved = [b.clone() for b in model.buffers()]
    with torch.no_grad(), torch.random.fork_rng():
        try:
            yield
        finally:
            for buffer, value in zip(model.buffers(), saved):
                buffer.copy_(value)


class Probe:
    """Measures, every `every` steps of an epoch, without a trace in the training: the pairs mined, the
    drift (Eq. 5, dk = 1) of the batch, and the staleness of one earlier batch's rows in the memory.

    Embeddings are compared for the same pixels and in the same mode, so that only the network differs.
    """

    def __init__(self, every, loss, mine):
        self.every, self.loss, self.mine = every, loss, mine
        self.active, self.rows, self.sums = False, None, {}

    def __call__(self, sim, positive, negative):
        """The loss as CrossBatchLoss calls it; counts the mined pairs on the way."""
        if self.active:
            p, n = self.mine(sim.detach(), positive, negative)
            self.add(positives_mined=p.sum().item(), negatives_mined=n.sum().item())
        return self.loss(sim, positive, negative)

    def add(self, **values):
        for name, value in values.items():
            self.sums.setdefault(name, []).append(value)

    def measure(self, step, model, criterion, x, z, embed_again):
        """After step `step` on this process's images x (b, ...), z (b, D) before the weights moved."""
        (rank, world), b = ranks(), len(z)
        with untouched(model):
            drift = (embed_again(x) - z).norm(dim=1)                        # (B,) Eq. 5
            self.add(drift_mean=drift.mean().item(), drift_max=drift.max().item(),
                     spread=z.std(0, correction=0).norm().item())         # 0: collapsed, 1: about the origin
            memory = criterion.memory
            if self.rows:
                then, old_x, stored, slots = self.rows
                fresh = embed_again(old_x)                                  # (B, D)
                adapted = acbn.normalize(memory.stored_embeddings[slots])   # (B, D)
                distance = [(fresh - old).norm(dim=1).mean().item() for old in (stored, adapted)]
                self.add(staleness=[step - then, *distance])            # age in steps, as stored, as adapted
            stay = memory.size // (b * world)           # after so many steps the queue has overwritten a row
            if not self.rows or step + self.every - self.rows[0] >= stay:
                slots = memory.pointer - (world - rank) * b + torch.arange(b, device=z.device)      # (b,)
                self.rows = (step, x, z, slots % memory.size) if len(memory) and self.every < stay else None

    def take(self):
        """The epoch's means; staleness also by age, as a list of [age, as stored, as adapted]."""
        sums, self.sums, self.rows = self.sums, {}, None
        by_age = sums.pop("staleness", [])
        record = {name: sum(v) / len(v) for name, v in sums.items()}
        for i, name in enumerate(("staleness_age", "staleness_stored", "staleness_adapted")):
            record[name] = sum(v[i] for v in by_age) / len(by_age) if by_age else None
        return {**record, "staleness": by_age}


# ---------------------------------------------------------------- stages of training

def train_head(model, batches, sampler, args):
    """The new last layer alone, as the paper starts: plain supervised contrastive loss, SGD, rate 0.001."""
    criterion = acbn.CrossBatchLoss(args.dim, 1, "none", acbn.supcon_loss)
    criterion.to(args.device)
    head, world = parallel(model.head, args.device), ranks()[1]
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.001)
    model.eval()                                      # the backbone's batch-norm statistics stay as they are
    for epoch in range(args.head_epochs):
        sampler.set_epoch(epoch - args.head_epochs)         # negative: other batches than those of training
        for x, y, _ in batches:
            with autocast(args.device, args.amp):
                with torch.no_grad():
                    features = model.features(x.to(args.device))
                z = head(features)
            loss = criterion(gather(z.float()), gather(y.to(args.device)))
            optimizer.zero_grad()
            (world * loss).backward()
            optimizer.step()
        say(f"head epoch {epoch + 1}/{args.head_epochs}  loss {loss.item():.4f}")
    model.train()


def fill_memory(model, criterion, split, args):
    """Random training images, embedded by the network as it is now, until the memory is full (XBM)."""
    g = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(split.labels), generator=g)[:criterion.memory.size].tolist()
    images = data.Images(split, args.image_size, args.augment, training=True)
    batches = data.loader(images, args.workers, batch_size=args.batch_size, drop_last=True,
                          sampler=[(i, k) for k, i in enumerate(order)])
    with untouched(model), autocast(args.device, args.amp):
        for x, y, ids in batches:
            z = model(x.to(args.device))
            criterion.memory.enqueue(acbn.normalize(z), y.to(args.device), ids.to(args.device))


def train_epoch(run, epoch):
    """One pass of N // B steps; returns the epoch's part of the log."""
    args, model, criterion, optimizer, scaler, probe = (
        run[k] for k in ("args", "model", "criterion", "optimizer", "scaler", "probe"))
    world = ranks()[1]
    rate = args.lr * args.lr_decay ** sum(epoch > drop for drop in args.lr_drops)
    for group in optimizer.param_groups:
        group["lr"] = rate
    run["sampler"].set_epoch(epoch)
    steps = len(run["batches"])
    seen = torch.zeros(2, steps, device=args.device)  # loss and gradient norm, read by the host now and then
    start = shown = time.perf_counter()

    def embed_again(x):
        with autocast(args.device, args.amp):
            return acbn.normalize(model(x))

    for step, (x, y, ids) in enumerate(run["batches"], 1):
        if args.fill_memory and args.method != "none" and criterion.step == args.warmup_steps:
            fill_memory(model, criterion, run["splits"].train, args)
        x, y, ids = (t.to(args.device, non_blocking=True) for t in (x, y, ids))
        probe.active = step % probe.every == 0
        with autocast(args.device, args.amp):
            z = run["parallel"](x)                          # (b, D) this process's share of the batch
        loss = criterion(gather(z.float()), gather(y), gather(ids))         # the same value in every process
        optimizer.zero_grad()
        scaler.scale(world * loss).backward()            # the processes' gradients are averaged: hence world
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)         # measures, clips nothing
        scaler.step(optimizer)                              # fp16: not where the norm is not finite
        scaler.update()
        seen[:, step - 1] = torch.stack([loss.detach(), norm])
        if probe.active:
            probe.measure(step, model, criterion, x, acbn.normalize(z.detach()), embed_again)
        now = time.perf_counter()
        if now - shown > 5 or step == steps:
            shown, speed = now, step / (now - start)
            refuse_infinite(seen[:, :step], epoch, rate, args.amp)
            left = ((args.epochs - epoch) * steps + steps - step) / speed
            say(f"epoch {epoch}/{args.epochs}  step {step}/{steps}  loss {loss.item():.4f}  "
                f"{speed * args.batch_size:.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left")
    losses, norms = seen.double()
    taken = norms.isfinite()
    record = {"loss": losses.mean().item(), "lr": rate, "gradient_norm": norms[taken].mean().item(),
              "steps_skipped": int((~taken).sum()), "steps_without_pairs": int((losses == 0).sum()),
              "gain": criterion.gain if criterion.filter_step else None, "memory": len(criterion.memory),
              "images_per_second": round(steps * args.batch_size / (time.perf_counter() - start), 1),
              **probe.take()}
    if record.get("spread", 1) < 0.01:
        record["warning"] = "the embeddings have collapsed: all images get nearly the same one"
        say(f"warning: {record['warning']} (spread {record['spread']:.2g} of 1)")
    return record


def refuse_infinite(seen, epoch, rate, amp):
    """seen (2, n): loss and gradient norm of an epoch's steps so far. fp16 skips a step for its gradient."""
    wrong = ~seen[0].isfinite() if amp == "fp16" else ~seen.isfinite().all(0)           # (n,)
    if wrong.any():
        step = int(wrong.nonzero()[0]) + 1
        what = "gradient" if seen[0, step - 1].isfinite() else "loss"
        raise data.UserError(
            f"epoch {epoch}, step {step}: the {what} is not finite at a learning rate of {rate:g}; try a "
            "lower --lr" + (", or --amp bf16 or off in place of fp16" if amp == "fp16" else ""))


# ---------------------------------------------------------------- checkpoints and the log

def write(path, content):
    """Text, or anything torch.save takes, written whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # a full disk is the one or the other to torch.save
        raise data.UserError(f"{part}: cannot be written ({str(error).splitlines()[0]}); "
                             f"{path.name} is as it was") from None


def save(run, epoch):
    """Rank 0 writes; every process gives its random states."""
    out, args, rng = Path(run["args"].out), run["args"], random_states()
    if ranks()[0] == 0:
        state = {"format": FORMAT, "epoch": epoch, "settings": vars(args),
                 "model": run["model"].state_dict()}
        if best_record(run)["epoch"] == epoch:
            write(out / "best.pt", state)
        state.update({name: run[name].state_dict() for name in ("optimizer", "scaler", "criterion")})
        write(out / "checkpoint.pt", {**state, "records": run["records"], "rng": rng})
        write_log(run)


def write_log(run):
    write(Path(run["args"].out) / "log.jsonl", "".join(json.dumps(r) + "\n" for r in run["records"]))


def random_states():
    """The random states (CPU, GPU) of every process, in rank order."""
    own = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    states = [own] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(states, own)
    return states


def resume(run, path):
    """Fill the run from a checkpoint; refuses one that was made with settings that change the result."""
    state = load_file(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise data.UserError(f"{path}: not a checkpoint of this version of train.py: expected format "
                             f"{FORMAT}, found {found}; use another --out")
    try:
        settings, (rank, world) = state["settings"], ranks()
        for name, value in vars(run["args"]).items():
            if name not in MAY_CHANGE and settings[name] != value:
                raise data.UserError(f"{path}: was made with --{name.replace('_', '-')} {settings[name]}, "
                                     f"now it is {value}; use the same, or another --out")
        if len(state["rng"]) != world:
            raise data.UserError(f"{path}: was made with {len(state['rng'])} processes, "
                                 f"now there are {world}")
        for name in ("model", "optimizer", "scaler", "criterion"):
            run[name].load_state_dict(state[name])
        run["records"], (cpu, gpu) = state["records"], state["rng"][rank]
        torch.set_rng_state(cpu)
        if gpu is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(gpu)
        return state["epoch"]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise data.UserError(f"{path}: not a checkpoint of this version of train.py ({reason}); "
                             "use another --out") from None


# ---------------------------------------------------------------- the run

def build(args):
    """Everything a run consists of, in one dict."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")         # as torch asks for it
    torch.use_deterministic_algorithms(args.deterministic)
    torch.manual_seed(args.seed)
    splits, val = data.load_for(vars(args), args.allow_partial), None
    if args.val_fraction:
        splits, val = data.hold_out(splits, args.val_fraction)
    sampler = data.ClassBalancedSampler(splits.train.labels, args.batch_size, args.images_per_class,
                                        args.seed, *ranks())
    rows = int(args.memory_ratio * len(splits.train.labels))
    if len(sampler) == 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than "
                         f"the {len(splits.train.labels)} training images")
    if args.method != "none" and rows < args.batch_size:
        raise ValueError(f"--memory-ratio {args.memory_ratio:g} makes a memory of {rows} rows, "
                         f"less than --batch-size {args.batch_size}")
    images = data.Images(splits.train, args.image_size, args.augment, training=True)
    on_gpu = args.device.startswith("cuda")
    batches = data.loader(images, args.workers, pin_memory=on_gpu, batch_sampler=data.Seeded(sampler))
    model = Encoder(args.backbone, args.dim)
    with torch.no_grad():                           # fails here already where --image-size is too small
        model.eval()(torch.zeros(1, 3, args.image_size, args.image_size))
    load_weights(model, args.backbone, args.weights)
    faster = torch.contiguous_format if args.amp == "off" and not on_gpu else torch.channels_last
    model.train().to(args.device, memory_format=faster)
    if args.sync_bn and ranks()[1] > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.manual_seed(args.seed + ranks()[0])       # the same weights everywhere, but each its own dropout
    stay = rows // args.batch_size                  # so many steps a row stays in the memory
    probe = Probe(max(1, min(50, len(sampler) // 6, max(10, stay - 1))), *LOSSES[args.loss])
    criterion = acbn.CrossBatchLoss(args.dim, rows if args.method != "none" else 1, args.method, probe,
                                    args.process_noise, args.measurement_noise, args.gain_interval,
                                    args.momentum, args.warmup_steps).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(enabled=args.amp == "fp16")
    return dict(args=args, splits=splits, val=val, sampler=sampler, batches=batches, probe=probe,
                model=model, parallel=parallel(model, args.device),
                criterion=criterion, optimizer=optimizer, scaler=scaler, records=[],
                ks=usable_ks(data.DATASETS[args.dataset].ks, splits))


def raw_pixels(splits, args):
    """Recall@1 of the test images' pixels at 32 x 32, as a floor."""
    settings = dict(image_size=32, augment="none", amp="off")
    (z, y), (gallery_z, gallery_y) = embed_test(torch.nn.Flatten(), splits, settings, workers=args.workers)
    grey = 127.5                # cosines of pixels are about mid-grey, in the gallery as in the queries
    gallery_z = None if gallery_z is None else gallery_z - grey
    return recall_at_k(z - grey, y, [1], gallery_z, gallery_y)[1]


def finish_epoch(run, epoch, record):
    """Evaluate, log, save; best.pt is the epoch best on the held-out classes, or else on the test split."""
    start, args = time.perf_counter(), run["args"]
    if ranks()[0] == 0:
        options = vars(args), args.device, args.workers
        result = evaluate(run["model"], run["splits"], run["ks"], *options)
        if run["val"]:
            val = evaluate(run["model"], data.Splits(None, run["val"]), [1], *options)
            result["val_recall@1"] = val["recall@1"]
        seconds = round(time.perf_counter() - start, 1)
        run["records"].append({"epoch": epoch, **record, **result, "eval_seconds": seconds})
        say(f"epoch {epoch}/{args.epochs}  " + "  ".join(f"{k} {100 * v:.2f}" for k, v in result.items()))
    save(run, epoch)


def best_record(run):
    key = "val_recall@1" if run["val"] else "recall@1"
    return max(run["records"], key=lambda r: r[key])


def train(args):
    out = Path(args.out)
    join(args)
    try:
        run = build(args)
    except (data.UserError, ValueError, RuntimeError) as error:     # flags that do not fit data or model
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    say(*data.describe(run["splits"]), json.dumps(vars(args)))
    if args.epochs == 0:
        say(f"Recall@1 of raw pixels: {100 * raw_pixels(run['splits'], args):.2f}")
    out.mkdir(parents=True, exist_ok=True)
    resumed = (out / "checkpoint.pt").exists()
    epoch = resume(run, out / "checkpoint.pt") if resumed else 0
    if dist.is_initialized():
        dist.barrier()                      # every process has looked before rank 0 writes
    if ranks()[0] == 0:
        write(out / "settings.json", json.dumps(vars(args), indent=1) + "\n")
        if resumed:
            write_log(run)                  # it lacks a line where the run was killed after its checkpoint
    if resumed:
        say(f"continuing {out} after epoch {epoch}")
    else:
        train_head(run["model"], run["batches"], run["sampler"], args)
        finish_epoch(run, 0, {"settings": {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}})
    run["model"].train()
    for epoch in range(epoch + 1, args.epochs + 1):
        finish_epoch(run, epoch, train_epoch(run, epoch))
    if ranks()[0] == 0:
        last, best = run["records"][-1], best_record(run)
        say(f"Recall@1: last {100 * last['recall@1']:.2f} (epoch {last['epoch']}), best "
            f"{100 * best['recall@1']:.2f} (epoch {best['epoch']}, chosen on "
            f"{'held-out training classes' if run['val'] else 'the test split'})")
    return run["records"]


def main(argv=None):
    args = parse_args(argv)
    try:
        return train(args)
    except (data.UserError, OSError) as error:
        sys.exit(f"train.py: {data.sentence(error)}")


def stop(pid, number, frame):
    """Ends the process at once, which no file minds: each is written whole, then renamed. (An exception
    would now and then be raised in some object's destructor, where Python drops it: the run would go on.)
    """
    if os.getpid() == pid:                              # the loader's workers inherit this handler
        os.write(2, b"train.py: stopped; the same command continues after the last whole epoch\n")
        for worker in multiprocessing.active_children():
            worker.kill()
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, partial(stop, os.getpid()))       # clusters preempt
    signal.signal(signal.SIGINT, partial(stop, os.getpid()))        # Ctrl-C
    main()
