# SPDX-License-Identifier: MIT
"""What the parts cost, beside a floor and beside peers, in one run.

    python results/bench.py step            one loss step beside its two matrix products
    python results/bench.py share           the loss's share of a ResNet-50 step
    python results/bench.py chunk           memory and time of a ResNet-50 step, whole and in chunks
    python results/bench.py recall          Recall@K and MAP@R at SOP's size beside the product
    python results/bench.py loader          train.py's loop beside the same steps with data at hand
    python results/bench.py gpu             the memory's and the loader's share on a GPU
    python results/bench.py rehearsal DIR   writes drawn JPEGs in the layout and counts of SOP

Times are medians of runs in turns; on a busy machine trust the ratios alone. Peers, other
libraries, are timed where they are installed.
"""
import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

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


def table(*lines):
    for line in (lines[0], ("---",) * len(lines[0]), *lines[1:]):
        cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in line)
        print("| " + " | ".join(cells) + " |")
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
    table(("step", "ms", "x product"), *((name, 1e3 * s, x) for name, (s, x) in
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
          ("ResNet-50, forward and backward", 1e3 * base, ""),
          *((name, 1e3 * s, 100 * s / (s + base)) for name, (s, _) in zip(steps, others)))


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
    table(("images at a time", "s", "peak GiB"), *lines)


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
    table(("search", "s", "x product"), *((name, s, x) for name, (s, x) in
                                          zip(searches, race(*searches.values(), runs=5))))
    z, y = normalize(torch.randn(6000, D)), torch.arange(6000) % 2

    def topk():
        for part in z.split(128):
            (part @ z.T).topk(3000)
    times = race(topk, lambda: evaluation.scores((z, y)), runs=2)
    table(("2 classes x 3,000 images", "s", "x top-k"),
          *((name, s, x) for name, (s, x) in zip(("product and top-k of 3,000", "scores"), times)))


# ------------------------------------------------- train.py's loop

def make_jpegs(root, n, side):
    """n JPEGs of side x side, four a class, as --dataset folder takes them."""
    wave = np.add.outer(np.sin(np.arange(side) / 40), np.cos(np.arange(side) / 30)) * 50 + 128
    for k in range(n):
        noise = np.random.default_rng(k).normal(0, 12, (side, side, 3))
        path = Path(root) / f"{k // 4:05d}" / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        pixels = (wave[..., None] + noise).clip(0, 255).astype(np.uint8)        # (side, side, 3)
        Image.fromarray(pixels).save(path, quality=90)


def seconds_a_step(flags, at_hand=False, epochs=3):
    """Of train.py's own loop, the loader warm; at_hand: the batches are there already."""
    loader = data.loader
    try:
        if at_hand:
            data.loader = lambda *args, **options: list(loader(*args, **options))
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            records = train.main([*flags.split(), "--head-epochs", "0", "--epochs", str(epochs),
                                  "--out", out])
    finally:
        data.loader = loader
    batch = records[0]["settings"]["batch_size"]
    return sorted(batch / record["images_per_second"] for record in records[2:])[(epochs - 1) // 2]


def bench_loader(n=48, side=1000):
    """Decoding at a reduced scale, on one core; train.py's loop beside the same steps on data at
    hand.
    """
    threads, lines = torch.get_num_threads(), []
    with tempfile.TemporaryDirectory() as root:
        make_jpegs(root, 2 * n, side)
        part = data.load("folder", root).train
        torch.set_num_threads(1)
        for training in (True, False):
            images = data.Images(part, 224, "paper", training)
            shape = (v2.RandomResizedCrop(224) if training else
                     v2.Compose([v2.Resize(256), v2.CenterCrop(224)]))
            keys = [(i, i) for i in range(n)] if training else range(n)
            (whole, _), (reduced, _) = race(
                lambda: [images.transform(shape(Image.open(part.images[i]).convert("RGB")))
                         for i in range(n)],
                lambda: [images[key] for key in keys], runs=3)
            lines.append(("training" if training else "evaluation", n / whole, n / reduced,
                          whole / reduced))
        table((f"{side} x {side} JPEG", "whole, images/s", "reduced, images/s", "x"), *lines)
        torch.set_num_threads(threads)
        lines = []
        for flags in ("--classes 300 --warmup-steps 0",
                      "--classes 150 --warmup-steps 0 --backbone resnet18 --batch-size 32",
                      f"--dataset folder --root {root} --weights none --batch-size 16 "
                      "--memory-ratio 1"):
            hand, loop = (seconds_a_step(f"{flags} --device cpu", at_hand)
                          for at_hand in (True, False))
            name = f"train.py {flags}".replace(root, "DIR")
            lines.append((name, hand * 1e3, loop * 1e3, loop / hand))
        table(("loop", "data at hand, ms a step", "train.py, ms a step", "x"), *lines)


def bench_gpu(B=64, M=60000):
    """The memory's share of a ResNet-50 step, the loader's, and the cost of --deterministic."""
    if not torch.cuda.is_available():
        raise data.UserError("gpu: there is no CUDA device here")
    runs = {256: (("none, data at hand", "--method none", True),
                  ("axbn, data at hand", "--method axbn", True),
                  ("axbn, data at hand, --deterministic", "--deterministic", True),
                  ("axbn, JPEGs of 256 x 256", "--method axbn", False)),
            1000: (("axbn, JPEGs of 1000 x 1000", "--method axbn", False),)}
    resnet = (f"--weights none --batch-size {B} --device cuda "
              f"--memory-ratio {M / 2048}")             # the first half of 4,096 images trains
    lines, base = [], None
    for side in runs:
        with tempfile.TemporaryDirectory() as root:
            make_jpegs(root, 4096, side)
            for name, flags, at_hand in runs[side]:
                torch.cuda.reset_peak_memory_stats()
                s = seconds_a_step(f"--dataset folder --root {root} {resnet} {flags}", at_hand)
                base, gib = base or s, torch.cuda.max_memory_allocated() / 2 ** 30
                lines.append((name, s * 1e3, B / s, gib, s / base))
    table(("ResNet-50, 224 px, fp16", "ms a step", "images/s", "peak GiB", "x none"), *lines)
    print(torch.cuda.get_device_name(), os.cpu_count(), "cores")


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
    args = parser.parse_args(argv)
    if (args.bench == "rehearsal") != (args.root is not None):
        parser.error("rehearsal, and nothing else, takes a folder to write to")
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        if args.bench == "rehearsal":
            sys.exit(rehearsal(args.root))
        torch.manual_seed(0)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        BENCHES[args.bench]()
    except (data.UserError, OSError) as error:
        sys.exit(f"bench.py: {data.sentence(error)}")
