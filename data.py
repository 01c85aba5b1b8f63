# SPDX-License-Identifier: MIT
"""What is trained and evaluated on: the data sets as they come out of their archives, sampler, transforms.

    python data.py --dataset sop --root DIR             what the lists say, split by split, in seconds
    python data.py --dataset sop --root DIR --check     opens every image and lists the bad ones

A data set is one function that returns splits and one row in DATASETS. Images are files, or rows of a uint8
array; labels are int64. Everything random takes a seed.
"""
import argparse
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


class UserError(Exception):
    """A user's mistake, or data that cannot be used; the message, one sentence, names the file or flag."""


class Split(NamedTuple):
    images: list            # paths, or a uint8 array (N, H, W, 3)
    labels: torch.Tensor    # (N,) int64


class Splits(NamedTuple):
    train: Split
    query: Split
    gallery: Split = None   # None: the queries are searched among themselves, each excluded for itself


# ---------------------------------------------------------------- synthetic: drawn products

def uniform(generator, low, high, *shape):
    return torch.rand(*shape, generator=generator) * (high - low) + low


def waves(frequency, phase, x, y):
    """Two crossing cosines: frequency (n, 2, 2), phase (n, 2), x and y (n, S, S) or (S, S) -> (n, S, S)."""
    fx, fy, phase = frequency[:, :, :1, None], frequency[:, :, 1:, None], phase[:, :, None, None]
    return torch.cos(fx * x.unsqueeze(-3) + fy * y.unsqueeze(-3) + phase).sum(1)


def blend(mask, colours):
    """mask (n, S, S) in 0..1 chooses between two colours (n, 2, 3) -> (n, 3, S, S)."""
    return torch.lerp(colours[:, 1, :, None, None], colours[:, 0, :, None, None], mask[:, None])


def draw(shape, wobble, frequency, phase, palette, size, g):
    """One image a row, (n, size, size, 3) uint8: the identity is given, the nuisance drawn from generator g.

    Identity: outline, r(angle) = 1 + sum of shape_k cos(k angle + wobble_k), k = 2..6, both (n, 5);
    pattern, frequency (n, 2, 2) and phase (n, 2); palette (n, 2, 3).
    """
    n, axis = len(shape), (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")                                    # (S, S) in -1..1
    # Pose: shift, rotation, scale, stretch take the image's coordinates to the object's, u and v (n, S, S).
    angle, scale = uniform(g, -0.3, 0.3, n, 1, 1), uniform(g, 0.95, 1.2, n, 1, 1)
    shift, stretch = uniform(g, -0.12, 0.12, n, 2, 1, 1), uniform(g, 0.92, 1.08, n, 1, 1)
    dx, dy = scale * (x - shift[:, 0]), scale * (y - shift[:, 1])
    u, v = (angle.cos() * dx + angle.sin() * dy) * stretch, angle.cos() * dy - angle.sin() * dx
    k, polar = torch.arange(2, 7)[:, None, None], torch.atan2(v, u)[:, None]            # (n, 1, S, S)
    radius = 0.75 * (1 + (shape[:, :, None, None] * torch.cos(k * polar + wobble[:, :, None, None])).sum(1))
    inside = ((radius - torch.hypot(u, v)) * size / 4 + 0.5).clamp(0, 1)                # (n, S, S) 1: object
    product = blend((waves(frequency, phase, u, v) * 4 + 0.5).clamp(0, 1), palette)
    # Background: a pattern of the same kind in greyish colours.
    stripes = waves(uniform(g, -5, 5, n, 2, 2), uniform(g, 0, 2 * math.pi, n, 2), x, y)
    colours = 0.3 * torch.rand(n, 2, 3, generator=g) + 0.7 * torch.rand(n, 2, 1, generator=g)
    image = torch.lerp(blend((stripes * 2 + 0.5).clamp(0, 1), colours), product, inside[:, None])
    # Occlusion: a disc of one colour. Light: a cast, a brightness, a gradient, and noise.
    centre, reach = uniform(g, -1, 1, n, 2, 1, 1), uniform(g, 0, 0.3, n, 1, 1)
    disc = torch.hypot(x - centre[:, 0], y - centre[:, 1]) < reach                   # (n, S, S) True: hidden
    image = torch.where(disc[:, None], torch.rand(n, 3, 1, 1, generator=g), image)
    slope = uniform(g, -0.25, 0.25, n, 2, 1, 1)
    light = uniform(g, 0.9, 1.1, n, 3, 1, 1) * uniform(g, 0.75, 1.15, n, 1, 1, 1)
    image = image * light * (1 + slope[:, 0] * x + slope[:, 1] * y)[:, None]
    image = image + 0.04 * torch.randn(image.shape, generator=g)
    return (image.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def synthetic(root=None, classes=1000, max_images=8, image_size=32, seed=0):
    """`classes` drawn products to train on and as many others to test on, of each 3 to max_images images."""
    g = torch.Generator().manual_seed(seed)
    C = 2 * classes
    bound = torch.tensor([0.22, 0.2, 0.16, 0.13, 0.1])
    identity = (uniform(g, -1, 1, C, 5) * bound, uniform(g, 0, 2 * math.pi, C, 5),      # outline
                uniform(g, -5, 5, C, 2, 2), uniform(g, 0, 2 * math.pi, C, 2),           # pattern
                torch.rand(C, 2, 3, generator=g))                                       # palette
    y = torch.arange(C).repeat_interleave(torch.randint(3, max_images + 1, (C,), generator=g))      # (N,)
    images = torch.cat([draw(*(f[part] for f in identity), image_size, g) for part in y.split(1000)]).numpy()
    n = int((y < classes).sum())
    return Splits(Split(images[:n], y[:n]), Split(images[n:], y[n:]))


# ---------------------------------------------------------------- data sets on disk

def read_lines(path):
    """Lines of a list file, without line ends."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None


def sop(root):
    """Stanford Online Products: `image_id class_id super_class_id path` a line; queries are the gallery."""
    folder = find(root, "sop", "Stanford_Online_Products/Ebay_train.txt", "Ebay_train.txt").parent
    return Splits(*(sop_list(find(folder, "sop", name)) for name in ("Ebay_train.txt", "Ebay_test.txt")))


def sop_list(path):
    lines, header = read_lines(path), "image_id class_id super_class_id path"
    if not lines or lines[0].split() != header.split():
        raise UserError(f"{path}, line 1: expected '{header}', found '{lines[0][:80] if lines else ''}'")
    images, labels = [], []
    for number, line in enumerate(lines[1:], 2):
        tokens = line.split()
        if not tokens:
            continue
        if len(tokens) != 4 or not is_id(tokens[1]):
            raise UserError(f"{path}, line {number}: expected four tokens, '{header}', found '{line[:80]}'")
        images.append(str(path.parent / tokens[3]))
        labels.append(int(tokens[1]))
    return Split(images, torch.tensor(labels, dtype=torch.int64))


def folder(root):
    """One folder a class: root/{train,test}/<class>/*, or root/<class>/*, of which the first half trains."""
    def read(path):
        try:
            samples = ImageFolder(path).samples
        except FileNotFoundError as error:      # no root, no class folder, or one without an image
            raise UserError(f"nothing of 'folder' in {path} ({error}); expected under --root:\n"
                            f"{DATASETS['folder'].tree}") from None
        return Split([p for p, _ in samples], torch.tensor([c for _, c in samples], dtype=torch.int64))

    root = Path(root)
    if (root / "train").is_dir() and (root / "test").is_dir():
        return Splits(read(root / "train"), read(root / "test"))
    images, y = read(root)
    n = int((y < (int(y.max()) + 1) // 2).sum())        # classes are sorted, so the first half comes first
    return Splits(Split(images[:n], y[:n]), Split(images[n:], y[n:]))


def is_id(token):
    """Whether a token of a list file is a whole number that fits int64."""
    return token.isascii() and token.removeprefix("-").isdigit() and len(token) < 19


def find(root, name, *candidates):
    """The first of root/candidate that exists; where none does, a sentence that shows the expected tree."""
    for candidate in candidates:
        if (Path(root) / candidate).exists():
            return Path(root) / candidate
    raise UserError(f"nothing of '{name}' in {root}: no {candidates[0]} there; expected under --root:\n"
                    f"{DATASETS[name].tree}")


class Row(NamedTuple):
    load: Callable      # (root, ...) -> Splits
    ks: tuple           # the K of Recall@K
    counts: dict        # official images and classes of each split; {} where any number goes
    tree: str           # what lies under --root


DATASETS = {
    "synthetic": Row(synthetic, (1, 10, 100, 1000), {}, "    (nothing: drawn from a seed)"),
    "sop": Row(sop, (1, 10, 100, 1000), {"train": (59551, 11318), "query": (60502, 11316)},
               "    Stanford_Online_Products/Ebay_train.txt\n"
               "    Stanford_Online_Products/Ebay_test.txt\n"
               "    Stanford_Online_Products/bicycle_final/111085122871_0.JPG ... (12 folders *_final)"),
    "folder": Row(folder, (1, 2, 4, 8), {},
                  "    train/<class>/*.jpg and test/<class>/*.jpg\n"
                  "    or <class>/*.jpg (the first half of the sorted classes trains, the rest tests)"),
}


def load(name, root="data", allow_partial=False, **options):
    """The splits of a data set, checked against its official counts. Options go to its function."""
    row = DATASETS[name]
    splits = row.load(root, **options)
    for split_name, split in zip(splits._fields, splits):
        if split is None:
            continue
        if len(split.labels) == 0:
            raise UserError(f"{name} in {root}: the {split_name} split is empty")
        found, expected = (len(split.labels), len(split.labels.unique())), row.counts.get(split_name)
        if expected and found != expected:
            text = "{} images of {} classes"
            text = (f"{name} in {root}: the {split_name} split has {text.format(*found)}, "
                    f"expected {text.format(*expected)}")
            if not allow_partial:
                raise UserError(text + "; --allow-partial uses it all the same")
            print(f"warning: {text}", file=sys.stderr)
    shared = set(splits.train.labels.tolist()) & set(splits.query.labels.tolist())
    if row.counts and shared:
        raise UserError(f"{name} in {root}: class {min(shared)} is in the training and in the test list")
    return splits


def load_for(settings, allow_partial):
    """The splits that a run's settings name."""
    names = ("classes", "max_images", "image_size") if settings["dataset"] == "synthetic" else ()
    options = {name: settings[name] for name in names}
    return load(settings["dataset"], settings["root"], allow_partial, **options)


def sentence(error):
    """The message of a UserError, also of one that a loader's worker has wrapped in its traceback."""
    return str(error).split("UserError: ")[-1].strip()


# ---------------------------------------------------------------- images and transforms

def open_image(item):
    """A path or a uint8 array (H, W, 3) -> PIL image in RGB, whatever the file's extension says it is."""
    if not isinstance(item, (str, os.PathLike)):
        return Image.fromarray(item)
    try:
        with Image.open(item) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":        # convert() would clip 16 bits to 8
                return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(f"{item}: cannot be read as an image ({reason})") from None


def eval_transform(size, recipe):
    """PIL image -> (3, size, size) uint8: centre crop of a resize to 256/224 of it, or a plain resize."""
    if recipe == "paper":
        return v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), v2.PILToTensor()])
    return v2.Compose([v2.Resize((size, size)), v2.PILToTensor()])


def train_transform(size, recipe):
    """PIL image -> (3, size, size) uint8. recipe: "paper", "light" (small drawn images) or "none".

    "paper" is timm's rand-m9-mstd0.5 as near as torchvision comes: each of two operations with probability
    0.5, at 9/10 of its range (bin 27 of 31), its magnitude without noise; erased areas get ImageNet's mean.
    """
    if recipe == "none":
        return eval_transform(size, recipe)
    if recipe == "light":
        return v2.Compose([v2.Resize((size, size)), v2.RandomAffine(15, (0.1, 0.1), (0.9, 1.1)),
                           v2.ColorJitter(0.2, 0.2, 0.2), v2.PILToTensor()])
    operation = v2.RandomApply([v2.RandAugment(num_ops=1, magnitude=27)], p=0.5)
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), operation, operation,
                       v2.PILToTensor(), v2.RandomErasing(p=0.2, value=(124, 116, 104))])


class Images(torch.utils.data.Dataset):
    """(image (3, S, S) uint8, label, id) of each image of a split; the id is its index.

    An index may come with a seed, (index, seed): the augmentation is then drawn from that seed alone, so
    that it depends neither on the worker that happens to draw it nor on what was drawn before.
    """

    def __init__(self, split, transform):
        self.split, self.transform = split, transform

    def __len__(self):
        return len(self.split.labels)

    def __getitem__(self, key):
        i, seed = key if isinstance(key, tuple) else (key, None)
        image = open_image(self.split.images[i])
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return self.transform(image), self.split.labels[i], i


# ---------------------------------------------------------------- batches of P classes x m images

class ClassBalancedSampler(torch.utils.data.Sampler):
    """Batches of batch_size / m distinct classes, m images each, N // batch_size batches an epoch.

    Classes come from a shuffled deck that is dealt out before it is shuffled again. Of a class with n >= m
    images m different ones are drawn; of a smaller one all n, then m - n of them again. Over `world`
    processes each rank gets its consecutive share of every batch. Same seed and epoch, same batches; call
    set_epoch before each epoch.
    """

    def __init__(self, labels, batch_size, images_per_class=4, seed=0, rank=0, world=1):
        classes, counts = labels.unique(return_counts=True)
        if batch_size % images_per_class or batch_size % world:
            raise ValueError(f"batch size {batch_size} must be a multiple of {images_per_class} images per "
                             f"class and of {world} processes")
        if batch_size // images_per_class > len(classes):
            raise ValueError(
                f"batch size {batch_size} with {images_per_class} images per class needs "
                f"{batch_size // images_per_class} classes, the training split has {len(classes)}")
        self.by_class = labels.argsort(stable=True).split(counts.tolist())      # one (n,) of indices a class
        self.batch_size, self.m, self.seed, self.epoch = batch_size, images_per_class, seed, 0
        self.length, self.share = len(labels) // batch_size, slice(rank * batch_size // world,
                                                                   (rank + 1) * batch_size // world)

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        P, deck = self.batch_size // self.m, []
        for _ in range(self.length):
            if len(deck) < P:    # classes still in the old deck go to the end of the new one: no class twice
                fresh = torch.randperm(len(self.by_class), generator=g).tolist()
                deck += [c for c in fresh if c not in deck] + [c for c in fresh if c in deck]
            chosen, deck = deck[:P], deck[P:]
            yield torch.cat([self.draw(self.by_class[c], g) for c in chosen])[self.share].tolist()

    def draw(self, indices, g):
        """m of a class's indices (n,)."""
        n = len(indices)
        order = torch.randperm(n, generator=g)
        if n < self.m:
            order = torch.cat([order, torch.randint(n, (self.m - n,), generator=g)])
        return indices[order[:self.m]]


class Seeded(torch.utils.data.Sampler):
    """A ClassBalancedSampler's batches as (index, seed) pairs for Images; no pair comes twice in a run."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        s = self.sampler
        for step, batch in enumerate(s):
            first = (s.epoch * len(s) + step) * s.batch_size + s.share.start + s.seed * 0x9E3779B1
            yield [(i, (first + k) % 2 ** 32) for k, i in enumerate(batch)]


def loader(dataset, workers=0, pin_memory=False, **options):
    """A DataLoader whose workers stay alive from epoch to epoch."""
    return torch.utils.data.DataLoader(dataset, num_workers=workers, pin_memory=pin_memory,
                                       persistent_workers=workers > 0, **options)


# ---------------------------------------------------------------- python data.py

def check(split):
    """Opens every image; returns the sentences about the bad ones."""
    def complaint(item):
        try:
            open_image(item)
        except UserError as error:
            return str(error)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [text for text in pool.map(complaint, split.images) if text]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="What a data set's lists say.", allow_abbrev=False)
    parser.add_argument("--dataset", choices=DATASETS, default="synthetic")
    parser.add_argument("--root", default="data",
                        help="the folder that holds the unpacked archive (default data)")
    parser.add_argument("--allow-partial", action="store_true",
                        help="other than official counts are a warning")
    parser.add_argument("--check", action="store_true", help="open every image and list the bad ones")
    return parser.parse_args(argv)


def main(argv=None):
    args, bad = parse_args(argv), []
    try:
        splits = load(args.dataset, args.root, args.allow_partial)
    except (UserError, OSError) as error:
        sys.exit(f"data.py: {error}")
    for name, split in zip(splits._fields, splits):
        if split is None:
            print(f"{name:8} the queries, each without itself")
            continue
        counts = split.labels.unique(return_counts=True)[1]
        print(f"{name:8} {len(split.labels):7} images {len(counts):6} classes, "
              f"{int(counts.min())} to {int(counts.max())} images each")
        bad += check(split) if args.check else []
    if bad:
        print(*bad, sep="\n")
        sys.exit(f"data.py: {len(bad)} images of {args.dataset} in {args.root} cannot be read")


if __name__ == "__main__":
    main()
