# SPDX-License-Identifier: MIT
"""What the parts cost, beside a floor and beside peers, in one run.

    python results/bench.py step            one loss step beside its two matrix products
    python results/bench.py share           the loss's share of a ResNet-50 step
    python results/bench.py chunk           memory and time of a ResNet-50 step, whole and in chunks
    python results/bench.py recall          Recall@K and MAP@R at SOP's size beside the product
    python results/bench.py loader          the loader's share of a training step on a CPU
    python results/bench.py gpu             training steps on a GPU, and the loader beside them
    python results/bench.py rehearsal DIR   writes drawn JPEGs in the layout and counts of SOP

Times are medians of runs in turns (gpu: means of steps in a row); on a busy machine trust the
ratios alone. Peers, other libraries, are timed where they are installed. `loader --small` and
`gpu --small` show on any machine, in seconds, that they run.
"""
import argparse
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the scripts are one folder up
import acbn  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402


def race(*functions, runs=9):
    """[(median seconds, median of the ratios to the first)] of functions that are run in turns, so
    that a machine's moods hit all alike.
    """
    times = []
    for _ in range(runs + 1):
        times.append([])
        for function in functions:
            start = time.perf_counter()
            function()
            times[-1].append(time.perf_counter() - start)
    times = torch.tensor(times[1:])                                     # (runs, functions)
    ratios = (times / times[:, :1]).median(0).values.tolist()
    return list(zip(times.median(0).values.tolist(), ratios))


def table(head, lines):
    """Prints each line as soon as it is there."""
    for line in itertools.chain((head, ("---",) * len(head)), lines):
        cells = (str(v) if not isinstance(v, float) else f"{v:.0f}" if v >= 100 else f"{v:.3g}"
                 for v in line)
        print("| " + " | ".join(cells) + " |", flush=True)
    print(flush=True)


def peer(module, package):
    """The peer's name with its version, or None."""
    if importlib.util.find_spec(module):
        return f"{package} {importlib.metadata.version(package)}"
    print(f"{package}: not installed")


# ------------------------------------------------- the loss

def loss_steps(B, M, D):
    """{name: a loss step, forward and backward, against a memory of M rows}."""
    stored, y = normalize(torch.randn(M, D)), torch.randint(M // 5, (M,))
    z, steps = torch.randn(B, D), {}

    def step(criterion):    # other labels each time, or one batch's positives fill the memory
        labels = torch.randint(M // 5, (B // 4,)).repeat_interleave(4)
        criterion(z.clone().requires_grad_(), labels).backward()
    for method in ("xbm", "xbn", "axbn"):
        criterion = acbn.CrossBatchLoss(D, M, method)
        criterion.memory.enqueue(stored, y)
        steps[method] = partial(step, criterion)
    if name := peer("pytorch_metric_learning", "pytorch-metric-learning"):
        from pytorch_metric_learning import losses, miners
        other = losses.CrossBatchMemory(losses.MultiSimilarityLoss(2, 50, 0.5), D, M,
                                        miners.MultiSimilarityMiner(0.1))
        other.add_to_memory(stored, y, M)
        steps[f"{name}, xbm"] = partial(step, other)
    return steps


def bench_step(B=64, M=30000, D=512):
    """One loss step, forward and backward, beside the matrix products that it cannot do without."""
    z, stored, weight = torch.randn(B, D), torch.randn(M, D), torch.randn(B, M)

    def product():
        (z.clone().requires_grad_() @ stored.T).backward(weight)
    steps = {"product, forward and backward": product, **loss_steps(B, M, D)}
    table(("step", "ms", "x product"), ((name, 1e3 * s, x) for name, (s, x) in
                                        zip(steps, race(*steps.values()))))


def bench_share(B=64, M=30000, D=512):
    """The share of the loss in a step of ResNet-50 at 224 pixels."""
    model = evaluation.Encoder("resnet50", D)
    x = torch.randint(256, (B, 3, 224, 224), dtype=torch.uint8)         # (B, 3, 224, 224)

    def network():
        model(x).sum().backward()
    steps = {name: step for name, step in loss_steps(B, M, D).items() if name in acbn.METHODS}
    (base, _), *others = race(network, *steps.values(), runs=2)
    table(("part of a step", "ms", "share in %"),
          [("ResNet-50, forward and backward", 1e3 * base, ""),
           *((name, 1e3 * s, 100 * s / (s + base)) for name, (s, _) in zip(steps, others))])


def chunk_step(chunk, B=64, D=512):
    """(seconds, peak GiB) of a ResNet-50 step that keeps `chunk` images' activations at a time."""
    model = evaluation.Encoder("resnet50", D, chunk=chunk)
    criterion, y = acbn.CrossBatchLoss(D, 4 * B, "xbn"), torch.arange(B) // 4
    x = torch.randint(256, (B, 3, 224, 224), dtype=torch.uint8)         # (B, 3, 224, 224)
    for _ in range(2):                                  # the first step warms up
        start = time.perf_counter()
        criterion(model(x), y).backward()
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20    # from KiB


def bench_chunk():
    """Each in a process of its own, since a process knows the peak of its whole life alone."""
    lines = []
    for chunk in (0, 8):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            lines.append((chunk or "all", *pool.apply(chunk_step, (chunk,))))
    table(("images at a time", "s", "peak GiB"), lines)


# ------------------------------------------------- the search


def bench_recall(N=60502, D=512, Q=8192):
    """Recall@K and MAP@R of Q queries in as many images as SOP has, beside the product alone."""
    z, y = normalize(torch.randn(N, D)), torch.randint(N * 11316 // 60502, (N,))
    query, gallery = (z[:Q], y[:Q]), (z, y)

    def product():
        for part in z[:Q].split(128):
            part @ z.T
    searches = {"product": product,
                "Recall@K": lambda: evaluation.scores(query, gallery, map_r=False),
                "Recall@K and MAP@R": lambda: evaluation.scores(query, gallery)}
    if name := peer("faiss", "faiss-cpu"):
        import faiss
        index = faiss.IndexFlatIP(D)
        index.add(z.numpy())
        searches[f"{name}, flat index, K = 1000"] = lambda: index.search(z[:Q].numpy(), 1001)
    table(("search", "s", "x product"), ((name, s, x) for name, (s, x) in
                                         zip(searches, race(*searches.values(), runs=5))))
    z, y = normalize(torch.randn(6000, D)), torch.arange(6000) % 2

    def topk():
        for part in z.split(128):
            (part @ z.T).topk(3000)
    times = race(topk, lambda: evaluation.scores((z, y)), runs=2)
    table(("2 classes x 3,000 images", "s", "x top-k"),
          ((name, s, x) for name, (s, x) in zip(("product and top-k of 3,000", "scores"), times)))


# ------------------------------------------------- a plain training step, and its data

class Job(NamedTuple):
    """A training step, in the words of train.py's flags, and how often to run it."""
    backbone: str = "resnet50"
    image_size: int = 224
    dim: int = 512
    method: str = "axbn"
    rows: int = 30000
    loss: str = "supcon"
    amp: str = "fp16"
    batch_size: int = 64
    chunk: int = 0
    frozen_bn: bool = False
    deterministic: bool = False
    steps: int = 50

    def small(self):
        """The same for a test on a CPU, where fp16 is slower than bf16 by far."""
        return self._replace(backbone="conv4", image_size=32, dim=16, steps=2,
                             rows=max(5, self.rows // 100), chunk=self.chunk // 8,
                             batch_size=max(8, self.batch_size // 8),
                             amp=self.amp.replace("fp16", "bf16"))


def plain_step(job, device):
    """(the criterion with its memory full, a function that trains on images and their labels)."""
    model = evaluation.Encoder(job.backbone, job.dim, job.frozen_bn, job.chunk).train()
    model.to(device, memory_format=(torch.contiguous_format if job.amp == "off" else
                                    torch.channels_last))
    loss_of = train.LOSSES[job.loss][0]
    criterion = acbn.CrossBatchLoss(job.dim, job.rows, job.method, loss_of).to(device)
    criterion.memory.enqueue(normalize(torch.randn(job.rows, job.dim, device=device)),
                             torch.randint(job.rows // 5, (job.rows,), device=device))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device, enabled=job.amp == "fp16")

    def step(x, y):                                                     # (B, 3, S, S), (B,)
        with data.autocast(device, job.amp):
            z = model(x)                                                            # (B, D)
        loss = criterion(z.float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return criterion, step


def make_jpegs(root, side, n=64):
    """The paths of n JPEGs of side x side; those of 500 x 500 have 25 kB, about as SOP's."""
    wave = np.add.outer(np.sin(np.arange(side) / 40), np.cos(np.arange(side) / 30)) * 50 + 128
    paths = [str(Path(root) / f"{k}.jpg") for k in range(n)]
    for k, path in enumerate(paths):
        noise = np.random.default_rng(k).normal(0, 6, (side, side, 3))
        pixels = (wave[..., None] + noise).clip(0, 255).astype(np.uint8)        # (side, side, 3)
        Image.fromarray(pixels).save(path, quality=75)
    return paths


def training_batches(job, images, recipe, n, workers=0, **options):
    """A loader of n batches of these images, four to a class, over and over."""
    labels = torch.arange(n * job.batch_size) // 4                                  # (N,)
    split = data.Split([images[k % len(images)] for k in range(len(labels))], labels)
    sampler = data.ClassBalancedSampler(labels, job.batch_size)
    return data.loader(data.Images(split, job.image_size, recipe, training=True), workers,
                       batch_sampler=data.Seeded(sampler), **options)


# ------------------------------------------------- the loader on a CPU

def decoding(paths, runs):
    """Images a second on one core, decoded whole and at a reduced scale."""
    threads, part = torch.get_num_threads(), data.Split(paths, torch.zeros(len(paths)))
    torch.set_num_threads(1)
    for training in (True, False):
        images = data.Images(part, 224, "paper", training)
        shape = (v2.RandomResizedCrop(224) if training else
                 v2.Compose([v2.Resize(256), v2.CenterCrop(224)]))
        keys = [(i, i) for i in range(len(paths))] if training else range(len(paths))
        (whole, _), (reduced, _) = race(
            lambda: [images.transform(shape(Image.open(path).convert("RGB"))) for path in paths],
            lambda: [images[key] for key in keys], runs=runs)
        yield ("training" if training else "evaluation", len(paths) / whole, len(paths) / reduced,
               whole / reduced)
    torch.set_num_threads(threads)


def bench_loader(small=False):
    """Decoding at a reduced scale; a plain training step with its batch at hand, and with the
    loader's.
    """
    side, n = (64, 4) if small else (1000, 48)
    with tempfile.TemporaryDirectory() as root:
        paths, drawn = make_jpegs(root, side, n), data.synthetic(classes=300).train.images
        table((f"{side} x {side} JPEG, one core", "whole, images/s", "reduced, images/s", "x"),
              decoding(paths, 1 if small else 3))

        def line(name, runs, images, recipe, backbone, image_size, batch_size):
            job = Job(backbone, image_size, 128, rows=1000, amp="off", batch_size=batch_size)
            job, runs = (job.small(), 1) if small else (job, runs)
            _, step = plain_step(job, "cpu")
            batches = iter(training_batches(job, images, recipe, runs + 2))
            at_hand = next(batches)
            (hand, _), (loaded, ratio) = race(lambda: step(*at_hand), lambda: step(*next(batches)),
                                              runs=runs)
            return name, 1e3 * hand, 1e3 * loaded, ratio
        table(("training step", "batch at hand, ms", "loader's, ms", "x"), (line(*job) for job in (
            ("conv4, 32 px, drawn, batch 16", 40, drawn, "light", "conv4", 32, 16),
            ("ResNet-18, 32 px, drawn, batch 32", 20, drawn, "light", "resnet18", 32, 32),
            ("ResNet-50, 224 px, JPEGs, batch 16", 3, paths, "paper", "resnet50", 224, 16))))


# ------------------------------------------------- on a GPU

JOBS = {                    # a memory of 5 rows: none has no use for it
    "none": Job(method="none", rows=5, steps=200),
    "xbm": Job(method="xbm", steps=200),
    "xbn": Job(method="xbn", steps=200),
    "axbn": Job(steps=200),
    "none, MS": Job(method="none", rows=5, loss="ms"),
    "axbn, MS": Job(loss="ms"),
    "axbn, 217,778 rows": Job(rows=217778),
    "axbn, 217,778 rows, MS": Job(rows=217778, loss="ms"),
    "axbn, bf16": Job(amp="bf16"),
    "axbn, float32": Job(amp="off"),
    "axbn, --chunk 16": Job(chunk=16),
    "axbn, --bn frozen": Job(frozen_bn=True),
    "axbn, --deterministic": Job(deterministic=True),
    "none, batch 512": Job(method="none", rows=5, batch_size=512, steps=12),
    "axbn, batch 512": Job(batch_size=512, steps=12),
    "axbn, batch 512, --chunk 64": Job(batch_size=512, chunk=64, steps=12),
}


def now(device):
    """The time at which the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def mean_ms(function, steps, device):
    for _ in range(3):                                  # to warm up
        function()
    start = now(device)
    for _ in range(steps):
        function()
    return 1e3 * (now(device) - start) / steps


def step_costs(job, device):
    """ms a step, images/s, GiB in use and reserved at most, ms of the loss."""
    torch.use_deterministic_algorithms(job.deterministic)
    torch.backends.cudnn.benchmark = not job.deterministic
    criterion, step = plain_step(job, device)
    x = torch.randint(256, (job.batch_size, 3, job.image_size, job.image_size), dtype=torch.uint8,
                      device=device)
    z = torch.randn(job.batch_size, job.dim, device=device)

    def labels():       # others each time, or one batch's positives fill the memory
        y = torch.randint(job.rows // 5, (job.batch_size // 4,), device=device)     # (P,)
        return y.repeat_interleave(4)                                               # (B,)

    def loss():
        criterion(z.clone().requires_grad_(), labels()).backward()
    gib = "", ""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ms = mean_ms(lambda: step(x, labels()), job.steps, device)
    if device == "cuda":
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        gib = [peak / 2 ** 30 for peak in peaks]
    return ms, 1e3 * job.batch_size / ms, *gib, mean_ms(loss, job.steps, device)


def loader_speed(paths, workers, job, device):
    """Images a second, when the batches that the workers fetched in advance are gone."""
    batches = training_batches(job, paths, "paper", 6 * workers + 8, workers,
                               pin_memory=device == "cuda")
    for k, _ in enumerate(batches):
        if k == 2 * workers + 2:
            start = time.perf_counter()
    return (k - 2 * workers - 2) * job.batch_size / (time.perf_counter() - start)


def bench_gpu(small=False):
    """Steps of ResNet-50 at 224 pixels on data at hand, and what the loader delivers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not small:
        raise data.UserError("gpu: there is no CUDA device here; --small runs anywhere")
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU", os.cpu_count(), "cores")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # for --deterministic

    def line(name, job):
        try:
            return name, *step_costs(job.small() if small else job, device)
        except torch.OutOfMemoryError:
            return name, "out of memory", "", "", "", ""
    table(("step", "ms a step", "images/s", "GiB in use", "GiB reserved", "ms of the loss"),
          (line(*row) for row in JOBS.items()))
    side, workers, job = (64, (0, 1), Job().small()) if small else (500, (1, 4, 8, 16), Job())
    with tempfile.TemporaryDirectory() as root:
        paths = make_jpegs(root, side)
        table((f"workers, JPEGs of {side} x {side}", "images/s"),
              ((n, loader_speed(paths, n, job, device)) for n in workers))


# ------------------------------------------------- a data set of SOP's size

def rehearsal(root):
    """Writes 120,053 drawn JPEGs of 32 x 32 in the layout and counts of SOP."""
    base = Path(root) / "Stanford_Online_Products"
    kinds = ("bicycle cabinet chair coffee_maker fan kettle lamp mug sofa stapler table "
             "toaster").split()
    for kind in kinds:
        (base / f"{kind}_final").mkdir(parents=True, exist_ok=True)
    rng, image_id, class_id = np.random.default_rng(0), 0, 0
    for name, images, classes in (("Ebay_train.txt", 59551, 11318),
                                  ("Ebay_test.txt", 60502, 11316)):
        lines = ["image_id class_id super_class_id path"]
        for c in range(classes):
            class_id += 1
            look = rng.integers(0, 256, (4, 4, 3))
            for k in range(images // classes + (c < images % classes)):
                image_id += 1
                path = f"{kinds[class_id % 12]}_final/{110000000000 + class_id}_{k}.JPG"
                turned = np.roll(look, rng.integers(0, 2, 2), (0, 1))
                pixels = np.kron(turned, np.ones((8, 8, 1))) * rng.uniform(0.6, 1)  # (32, 32, 3)
                pixels = (pixels + rng.normal(0, 12, (32, 32, 3))).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(base / path, quality=80)
                lines.append(f"{image_id} {class_id} {class_id % 12 + 1} {path}")
        (base / name).write_text("\n".join(lines) + "\n")


# ------------------------------------------------- python results/bench.py

BENCHES = {"step": bench_step, "share": bench_share, "chunk": bench_chunk, "recall": bench_recall,
           "loader": bench_loader, "gpu": bench_gpu}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=[*BENCHES, "rehearsal"])
    parser.add_argument("root", nargs="?", metavar="DIR", help="where rehearsal writes")
    parser.add_argument("--small", action="store_true", help="loader and gpu, tiny and on any "
                        "machine: shows that they run, not what anything costs")
    args = parser.parse_args(argv)
    if (args.bench == "rehearsal") != (args.root is not None):
        parser.error("rehearsal, and nothing else, takes a folder to write to")
    if args.small and args.bench not in ("loader", "gpu"):
        parser.error("--small: of loader and gpu alone")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.bench == "rehearsal":
            return rehearsal(args.root)
        torch.manual_seed(0)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        BENCHES[args.bench](*[True] * args.small)
    except (data.UserError, OSError) as error:
        sys.exit(f"bench.py: {data.sentence(error)}")


if __name__ == "__main__":
    main()
