# SPDX-License-Identifier: MIT
"""The data sets as they come out of their archives, the batches, and the transforms.

    python data.py --dataset sop --root DIR             what the lists say, split by split
    python data.py --dataset sop --root DIR --check     opens every image and lists the bad ones
    python data.py --dataset sop --download             fetches it (3.1 GB), unpacks it into data/

A data set is one function that returns splits, and a row in DATASETS; its flags are in `add_flags`.
Images are files, or rows of a uint8 array; labels are int64. Everything random comes from a seed.
"""
import argparse
import errno
import hashlib
import json
import math
import mimetypes
import os
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.functional import pil_to_tensor


# ------------------------------------------------- shared by the scripts

class UserError(Exception):
    """A user's mistake, or data that cannot be used; the message names the file or the flag."""


def tolerate_terminal():
    """A terminal that lacks a sign is no error, nor is output that goes to none (Jupyter, >&-)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def sentence(error):
    """The message of an error, also of one that a loader's worker has wrapped in its traceback."""
    return str(error).split("UserError: ")[-1].strip()


def number(kind, low, above=False, below=math.inf):
    """An argparse type: an int or a float from `low` on, or only above it, and below `below`."""
    def number(text):               # argparse puts this name into "invalid number value: 'two'"
        value = kind(text)
        if not (low < value if above else low <= value) or not value < below:
            limits = f"{'above' if above else 'at least'} {low}"
            limits += f" and below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {limits} and finite, got {text}")
        return value
    return number


def write(path, save):
    """save(file), whole or not at all: what it writes takes the place of `path` at the end."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            save(file)
            file.flush()
            sync(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # the latter from torch.save on a full disk
        raise UserError(f"{path}: cannot be written ({error})") from None


def sync(file):
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):    # a network disk that has no fsync
            raise


def add_flags(add):
    """The flags that say which data, for every script; returns their names."""
    return [flag.dest for flag in (
        add("--dataset", choices=DATASETS, default="synthetic",
            help="its preset sets train.py's 'preset' flags (synthetic)"),
        add("--root", type=os.path.expanduser, default="data",      # no shell expands --root=~/x
            help="the folder with the unpacked archive (data)"),
        add("--allow-partial", action="store_true",
            help="only warn where counts differ from the official"),
        add("--test-list", choices=("small", "medium", "large"), default="small",
            help="vehicleid: 800, 1600 or 2400 vehicles to test on (small)"),
        add("--df2-labels", choices=("paper", "official"), default="paper",
            help="df2: a class is (pair, category, style), or officially (pair, style) (paper)"),
        add("--classes", type=number(int, 1), default=1000,
            help="synthetic: classes to train on, and as many to test on (1000)"),
        add("--max-images", type=number(int, 3), default=8,
            help="synthetic: 3 to this many images a class (8)"))]


def usable_device(name, parser):
    """Exits with one sentence where a device cannot be used."""
    try:
        (torch.ones(1, device=name) + 1).item()         # runs, not only exists
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name} cannot be used ({str(error).splitlines()[0]}); "
                     "--device cpu can")


def default_workers(device):
    """One process a core for a GPU, at most 16; on a CPU the network's threads use every core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 0 if device == "cpu" else min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def autocast(device, amp):
    """Mixed precision as --amp names it: off, bf16 or fp16."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()


def rank_and_world():
    """(this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_object(value):
    """[the value of each process, in rank order]."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


# ------------------------------------------------- data sets on disk

class Split(NamedTuple):
    images: list            # paths, or a uint8 array (N, H, W, 3)
    labels: torch.Tensor    # (N,) int64
    boxes: torch.Tensor = None      # (N, 4) x0, y0, x1, y1: the part of each image that is used


class Splits(NamedTuple):
    train: Split
    query: Split
    gallery: Split = None   # None: each query is searched for among the other queries


def make_split(pairs, boxes=None):
    """The split of a list of (image, label)."""
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return Split([image for image, _ in pairs], labels, boxes)


def read_list(path, form, parse, header=0):
    """parse(*words) of every row of a list file, whose words are those that `form` names. `header`
    lines come before the rows; the last of them is `form`.
    """
    lines, found = path.read_text("utf-8-sig", "surrogateescape").split("\n") + ["", ""], []
    if header and lines[header - 1].split() != form.split():
        raise UserError(f"{path}, line {header}: expected '{form}', "
                        f"found '{lines[header - 1][:80]}'")
    for number, line in enumerate(lines[header:], header + 1):
        try:
            found += [parse(*line.split())] if line.strip() else []
        except (ValueError, TypeError, OverflowError):      # no int64, or another number of words
            raise UserError(f"{path}, line {number}: expected '{form}', "
                            f"found '{line[:80]}'") from None
    return found


def sop(root):
    """Stanford Online Products; the test images are searched among themselves."""
    splits = []
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        path = find(root, "sop", f"Stanford_Online_Products/{name}", name)
        splits.append(make_split(read_list(
            path, "image_id class_id super_class_id path",
            lambda _, label, kind, image: (str(path.parent / image), np.int64(label)), header=1)))
    return Splits(*splits)


def vehicleid(root, test_list="small"):
    """PKU VehicleID; the small, medium or large test list is searched among itself, each image
    for all others, as metric-learning papers do. (The official protocol draws a gallery of one
    image a vehicle, ten times, and scores lower.)
    """
    splits, size = [], {"small": 800, "medium": 1600, "large": 2400}[test_list]
    for name in ("train_list.txt", f"test_list_{size}.txt"):
        path = find(root, "vehicleid", *(f"{top}train_test_split/{name}"
                                         for top in ("VehicleID_V1.0/", "")))
        splits.append(make_split(read_list(path, "image vehicle", lambda image, label: (
            str(path.parent.parent / "image" / f"{image}.jpg"), np.int64(label)))))
    return Splits(*splits)


def inshop(root):
    """In-shop Clothes Retrieval: queries against a gallery. A class is a whole item_id."""
    tops = ("In-shop Clothes Retrieval Benchmark/", "")
    path = find(root, "inshop", *(f"{top}{place}list_eval_partition.txt"
                                  for place in ("Eval/", "Anno/", "") for top in tops))
    top = path.parent.parent if path.parent.name in ("Eval", "Anno") else path.parent
    images = find(top, "inshop", "Img/img", "img", "Img/img_highres", "img_highres")
    found = read_list(path, "image_name item_id evaluation_status", lambda name, item, status: (
        str(images / name.removeprefix("img/")), np.int64(item.removeprefix("id_")), status),
        header=2)
    return Splits(*(make_split([(image, label) for image, label, status in found if status == part])
                    for part in Splits._fields))


def df2(root, df2_labels="paper"):
    """DeepFashion2, consumer to shop: the users' items of validation search the shops'.

    Items are cut out by their boxes. A class is (pair_id, category_id, style), or officially
    (pair_id, style). Items of style 0 belong to no pair: they are neither trained on nor searched
    for, but the shops' are in the gallery.
    """
    items = {}
    for part in ("train", "validation"):
        annos = find(root, "df2", *(f"{top}{nest}/annos" for top in ("", "deepfashion2/")
                                    for nest in (part, f"{part}/{part}")))
        with ThreadPoolExecutor() as pool:
            found = pool.map(df2_items, sorted(annos.glob("[!.]*.json")))
            items[part] = [item for several in found for item in several]
    chosen = [[i for i in items["train"] if i[2][2] > 0],
              [i for i in items["validation"] if i[1] == "user" and i[2][2] > 0],
              [i for i in items["validation"] if i[1] == "shop"]]
    ids, splits = {}, []        # pair_id restarts in each part, so the part belongs to the class
    for part, of_split in zip(("train", "validation", "validation"), chosen):
        keys = [(part, pair, style) if df2_labels == "official" else (part, pair, style, category)
                for _, _, (pair, category, style), _ in of_split]
        pairs = [(item[0], ids.setdefault(key, len(ids))) for item, key in zip(of_split, keys)]
        boxes = torch.tensor([item[3] for item in of_split]).reshape(-1, 4)
        splits.append(make_split(pairs, boxes))
    return Splits(*splits)


def df2_items(path):
    """(image, source, (pair_id, category_id, style), box) of every item of one annotation."""
    try:
        anno = json.loads(path.read_text("utf-8-sig"))
        image, source = str(path.parent.parent / "image" / f"{path.stem}.jpg"), anno["source"]
        if source not in ("user", "shop"):
            raise ValueError(f"source is {source!r}, not 'user' or 'shop'")
        found = []
        for item in (anno[key] for key in sorted(anno) if key.startswith("item")):
            x0, y0, x1, y1 = map(float, item["bounding_box"])
            label = (int(anno["pair_id"]), int(item["category_id"]), int(item["style"]))
            found.append((image, source, label, [x0, y0, x1, y1]))
        return found
    except Exception as error:                      # a malformed annotation can raise anything
        raise UserError(f"{path}: not a DeepFashion2 annotation ({error!r})") from None


def read_folder(root):
    """The split of one folder a class, and the name of each image's class."""
    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    left_out = Counter()        # pictures whose endings torchvision does not know

    def visible(path):      # by-products of other programs begin with a dot, or lie in __MACOSX
        inside, end = Path(path).relative_to(root).parts, Path(path).suffix.lower()
        if any(part.startswith((".", "__MACOSX")) for part in inside):
            return False
        if end in IMG_EXTENSIONS:
            return True
        if end in readable or (mimetypes.guess_type(path)[0] or "").startswith("image/"):
            left_out[end] += 1
        return False
    try:
        found = ImageFolder(root, is_valid_file=visible, allow_empty=True)
    except FileNotFoundError as error:              # no such folder, or no folder in it
        raise missing("folder", root, error) from None
    if left_out:
        print(f"note: {sum(left_out.values())} pictures below {root} are left out, since "
              f"torchvision does not read their endings: {' '.join(left_out)}", file=sys.stderr)
    deeper = [path for path, _ in found.samples if Path(path).parent.parent != root]
    if deeper:
        print(f"note: {len(deeper)} images lie deeper than their class folder, such as "
              f"{deeper[0]}; their class is the folder directly below {root}", file=sys.stderr)
    def place(path):            # by which images are sorted, the same on every system
        inside = Path(path).relative_to(root)
        return tuple(map(composed, (inside.parts[0], inside.parent, inside.name)))
    placed = sorted((place(path), path) for path, _ in found.samples)
    names = [where[0] for where, _ in placed]
    ids = {name: label for label, name in enumerate(dict.fromkeys(names))}
    return make_split([(path, ids[name]) for (_, path), name in zip(placed, names)]), names


def composed(name):
    """A name with its accents in the composed form (NFC): systems keep them in either form."""
    return unicodedata.normalize("NFC", str(name))


def folder(root):
    """One folder a class: root/{train,test}/<class>/* (val/, valid/ or validation/ will do for
    test/), or root/<class>/*, of whose classes the first half trains and the rest tests.
    """
    root = Path(root)
    tests = [root / name for name in ("test", "val", "valid", "validation")]
    test = next((path for path in tests if path.is_dir()), None)
    if test and (root / "train").is_dir():
        (train, trained), (query, tested) = read_folder(root / "train"), read_folder(test)
        both = set(trained) & set(tested)
        if both:
            print(f"note: {len(both)} of {len(set(tested))} test classes are also trained on",
                  file=sys.stderr)
        return Splits(train, query)
    everything, _ = read_folder(root)
    classes = everything.labels.unique()                                    # (C,) sorted
    trains = torch.isin(everything.labels, classes[:len(classes) // 2])     # (N,)
    return Splits(take(everything, trains), take(everything, ~trains))


def find(root, name, *candidates):
    """The first of root/candidate that exists; where none does, an error with the expected tree."""
    for candidate in candidates:
        if (Path(root) / candidate).exists():
            return Path(root) / candidate
    raise missing(name, root, f"no {candidates[0]} there")


def missing(name, root, what):
    """The error that shows what is expected under a root, and where to get it."""
    row = DATASETS[name]
    get = f"python data.py --dataset {name} --download --root {root}" if row.archive else row.page
    return UserError(f"'{name}' is not in {root}, or not all of it ({what}); expected under "
                     f"--root:\n{row.tree}" + (f"\nget it: {get}" if get else ""))


# ------------------------------------------------- the table of data sets

class Row(NamedTuple):
    load: Callable          # (root, **options) -> Splits
    ks: tuple               # the K of Recall@K
    counts: dict            # official (images, classes) of each split, None: unknown; {}: unchecked
    options: tuple = ()     # flags that its function takes
    sure: bool = True       # False: numbers of classes from one unverified source only warn
    tree: str = "    (nothing: drawn from a seed)"      # what lies under --root
    page: str = ""          # where people get it
    archive: tuple = ()     # where a program gets it: address, MD5, size


DATASETS = {
    "sop": Row(
        sop, (1, 10, 100, 1000), {"train": (59551, 11318), "query": (60502, 11316)}, tree="""\
    Stanford_Online_Products/Ebay_train.txt and Ebay_test.txt
    Stanford_Online_Products/bicycle_final/111085122871_0.JPG ... (12 folders *_final)""",
        page="https://cvgl.stanford.edu/projects/lifted_struct/",
        archive=("http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
                 "7f73d41a2f44250d4779881525aea32e", "3.1 GB")),
    "inshop": Row(
        inshop, (1, 10, 20, 30, 40, 50),
        {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)}, tree="""\
    In-shop Clothes Retrieval Benchmark/Eval/list_eval_partition.txt (or in Anno/, or above it)
    In-shop Clothes Retrieval Benchmark/Img/img/WOMEN/Dresses/id_00000002/02_1_front.jpg ...
        (Img/img.zip unpacked; or img/ without Img/, or img_highres/ in place of img/)""",
        page="https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html"),
    "df2": Row(
        df2, (1, 5, 10, 15, 20),
        {"train": (217778, 31517), "query": (12377, 3128), "gallery": (36961, 7059)},
        ("df2_labels",), sure=False, tree="""\
    train/annos/000001.json, train/image/000001.jpg ... (or nested once more, train/train/...)
    validation/annos/000001.json, validation/image/000001.jpg ...""",
        page="https://github.com/switchablenorms/DeepFashion2 (password by form)"),
    "vehicleid": Row(
        vehicleid, (1, 5), {"train": (None, 13164)}, ("test_list",), tree="""\
    VehicleID_V1.0/train_test_split/train_list.txt, test_list_800.txt, ..._1600.txt, ..._2400.txt
    VehicleID_V1.0/image/0000001.jpg ...""",
        page="https://pkuml.org/resources/pku-vehicleid.html (permission by e-mail)"),
    "folder": Row(folder, (1, 2, 4, 8), {}, tree="""\
    train/<class>/*.jpg and test/<class>/*.jpg
        (or val/, valid/ or validation/ in place of test/)
    or <class>/*.jpg (the first half of the sorted classes trains, the rest tests)"""),
}


def load(name, root="data", allow_partial=False, **options):
    """The splits of a data set, checked against its official counts. Options go to its function."""
    row = DATASETS[name]
    splits = row.load(root, **options)
    for part, found in zip(splits._fields, splits):
        images, classes = row.counts.get(part, (None, None))
        have = (len(found.labels), len(found.labels.unique())) if found else (None, None)
        differs = [want not in (None, has) for want, has in zip((images, classes), have)]
        if any(differs):
            text = (f"{name} in {root}: the {part} split has {have[0]} images of {have[1]} "
                    f"classes, expected {images or 'any number'} of {classes or 'any number'}")
            if (differs[0] or row.sure) and not allow_partial:
                raise UserError(text + "; --allow-partial uses it all the same")
            print(f"warning: {text}", file=sys.stderr)
    shared = set(splits.train.labels.tolist()) & set(splits.query.labels.tolist())
    if row.counts and shared:
        raise UserError(f"{name} in {root}: class {min(shared)} is in the training and the test "
                        "list")
    refuse_hopeless(splits, f"{name} in {root}")
    return splits


def load_for(args):
    """The splits that parsed flags name."""
    options = {name: getattr(args, name) for name in DATASETS[args.dataset].options}
    return load(args.dataset, args.root, args.allow_partial, **options)


def matches(splits):
    """(Q,) True: the query has an image of its class to find."""
    y, gallery = splits.query.labels, splits.gallery
    if gallery:
        return torch.isin(y, gallery.labels)
    _, index, counts = y.unique(return_inverse=True, return_counts=True)
    return counts[index] > 1


def refuse_hopeless(splits, where):
    """Splits on which nothing can be learnt or measured are an error before any work."""
    searched, found = (splits.gallery or splits.query).labels, int(matches(splits).sum())
    trained, classes = len(splits.train.labels.unique()), len(searched.unique())
    if min(trained, classes) < 2 or len(searched) < 3 or found == 0:
        raise UserError(f"{where}: there are {trained} classes to train on, {classes} classes of "
                        f"{len(searched)} images to search, and {found} queries with an image of "
                        "their class to find; at least 2, 2 of 3, and 1 are needed")


def names(splits):
    """{split: the names of its images}, relative to the folder that holds all of them."""
    found = {name: part.images for name, part in zip(splits._fields, splits) if part}
    if not isinstance(splits.train.images, list):
        return {name: [f"drawn/{k}" for k in range(len(images))] for name, images in found.items()}
    base = os.path.commonpath(os.path.dirname(path) for images in found.values() for path in images)
    return {name: [os.path.relpath(path, base).replace(os.sep, "/") for path in images]
            for name, images in found.items()}


def fingerprint(splits):
    """A hash of the images' relative names, labels and boxes, the same on every system."""
    content = [composed(repr(names(splits))).encode()]
    for part in filter(None, splits):
        content += [array.numpy().tobytes() for array in part[1:] if array is not None]
    return hashlib.sha256(b"".join(content)).hexdigest()[:16]


def describe(splits):
    """A line a split, and what is searched."""
    for name, part in zip(splits._fields, splits):
        if part:
            counts = part.labels.unique(return_counts=True)[1]
            yield (f"{name:8} {len(part.labels):7} images {len(counts):6} classes, "
                   f"{int(counts.min())} to {int(counts.max())} images each")
        if part and part.boxes is not None:
            empty = int((part.boxes[:, 2:] <= part.boxes[:, :2]).any(1).sum())
            yield f"{name:8} {empty:7} boxes without area: the whole image is taken"
    single = int((splits.train.labels.unique(return_counts=True)[1] == 1).sum())
    if single:
        yield f"train    {single:7} classes of one image: batches repeat it"
    yield "gallery  " + ("never the queries" if splits.gallery else
                         "the queries, each without itself")
    alone = int((~matches(splits)).sum())
    if alone:
        yield f"query    {alone:7} without any match in the gallery: they count as misses"


def hold_out(splits, fraction, seed=0):
    """(splits, validation split): a share of the training classes, at least one, is held out."""
    classes = splits.train.labels.unique()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    held = torch.isin(splits.train.labels, classes[order[:max(1, round(fraction * len(classes)))]])
    return splits._replace(train=take(splits.train, ~held)), take(splits.train, held)


def take(part, chosen):
    """The rows of a split where the mask (N,) is True."""
    index, images = chosen.nonzero()[:, 0], part.images
    images = [images[i] for i in index.tolist()] if isinstance(images, list) else images[index]
    return Split(images, part.labels[chosen], None if part.boxes is None else part.boxes[chosen])


# ------------------------------------------------- images and transforms

def open_image(item, size=None, cut=None, box=None):
    """A path or a uint8 array (H, W, 3) -> PIL image, in RGB as torchvision's own loader has it.

    size: the region (left, top, right, bottom) that `cut` returns for (width, height) is resized to
    size x size. box (4,): the image is first cut to it, as far as they overlap. JPEGs are decoded
    at 1/2, 1/4 or 1/8 of their scale where as many pixels as wanted remain.
    """
    try:
        with Image.fromarray(item) if isinstance(item, np.ndarray) else Image.open(item) as image:
            if size is None:
                return image.convert("RGB")
            width, height = image.size
            x0, y0, x1, y1 = clamp(box, width, height)
            left, top, right, bottom = cut(x1 - x0, y1 - y0)
            part = (x0 + left, y0 + top, x0 + right, y0 + bottom)           # in the file's pixels
            least = size / min(right - left, bottom - top)                  # of its resolution
            drafted = image.draft(None, (math.ceil(width * least), math.ceil(height * least)))
            sx, sy = (drafted[1][2] / width, drafted[1][3] / height) if drafted else (1, 1)
            image = image.convert("RGB")
            right, bottom = min(part[2] * sx, image.width), min(part[3] * sy, image.height)
            part = (part[0] * sx, part[1] * sy, right, bottom)              # in the decoded pixels
            return image.resize((size, size), Image.Resampling.BILINEAR, box=part)
    except Exception as error:                  # broken files make the image library raise anything
        raise UserError(f"{item}: cannot be read as an image ({error!r})") from None


def clamp(box, width, height):
    """The part of a box (4,) inside the image; the whole image if nothing is left, or for None."""
    if box is not None:
        x0, y0, x1, y1 = box.tolist()
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        if x1 - x0 >= 1 and y1 - y0 >= 1:
            return x0, y0, x1, y1
    return 0, 0, width, height


def whole_image(width, height):
    return 0, 0, width, height


def centre(width, height):
    """What a centre crop of 224 pixels takes after a resize of the shorter side to 256."""
    side = min(width, height) * 224 / 256
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def random_part(width, height):
    """What torchvision's RandomResizedCrop takes at its defaults: 8 to 100 % of the area."""
    canvas = torch.empty(1, max(1, int(height)), max(1, int(width)), device="meta")
    top, left, h, w = RandomResizedCrop.get_params(canvas, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    return left, top, left + w, top + h


def augmentation(recipe):
    """(how a training image is cut, its transform): PIL image -> (3, S, S) uint8.

    "paper" is timm's rand-m9-mstd0.5 as near as torchvision comes: each of two operations with
    probability 0.5, at 9/10 of its range (bin 27 of 31), without noise on the magnitude; erased
    areas get ImageNet's mean. "light" suits small images and follows a batch at a time, see
    `light`; "none" only resizes.
    """
    if recipe in ("light", "none"):
        return whole_image, pil_to_tensor
    operation = v2.RandomApply([v2.RandAugment(num_ops=1, magnitude=27)], p=0.5)
    return random_part, v2.Compose([
        v2.RandomHorizontalFlip(), operation, operation, v2.PILToTensor(),
        v2.RandomErasing(p=0.2, value=(124, 116, 104))])


def light(x, u):
    """Turns (15 degrees), scales (10 %), shifts (10 %) and tints (20 %) each of x (B, 3, S, S)
    uint8 by the random u (B, 7) in 0..1.

    It is torchvision's RandomAffine and ColorJitter for a whole batch: image by image they take as
    long as a small network's step.
    """
    angle, scale, dx, dy, *tints = (2 * u - 1).T                                    # (B,) in -1..1
    angle, scale = angle * math.radians(15), 1 + 0.1 * scale
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cos, -sin, 0.2 * dx, sin, cos, 0.2 * dy], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)                       # (B, S, S, 2)
    x = F.grid_sample(x.float(), grid, align_corners=False)                         # (B, 3, S, S)
    brightness, contrast, saturation = (1 + 0.2 * t[:, None, None, None] for t in tints)
    x = brightness * x
    x = torch.lerp(grey(x).mean((2, 3), keepdim=True), x, contrast)
    return torch.lerp(grey(x), x, saturation).clamp_(0, 255).round_().to(torch.uint8)


def grey(x):
    """Luma of x (B, 3, S, S): (B, 1, S, S)."""
    return (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]


class Images(torch.utils.data.Dataset):
    """(image (3, size, size) uint8, label) of each image of a split.

    In training the image is augmented by the recipe. Its key is then (index, seed): everything
    random comes from that seed alone, whichever worker draws it. Otherwise the key is the index,
    and the image is resized; for "paper" it is the centre crop of a resize to 256/224 of the size.
    """

    def __init__(self, split, size, recipe, training=False):
        self.split, self.size, self.training = split, size, training
        self.light = training and recipe == "light"
        self.cut, self.transform = augmentation(recipe if training else "none")
        if recipe == "paper" and not training:
            self.cut = centre

    def __len__(self):
        return len(self.split.labels)

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):                   # what a DataLoader asks for: a batch at once
        keys = keys if self.training else [(i, None) for i in keys]
        read = [self.read(i, seed) for i, seed in keys]
        x = torch.stack([image for image, _ in read])                               # (B, 3, S, S)
        x = light(x, torch.stack([u for _, u in read])) if self.light else x
        return [(image, self.split.labels[i]) for image, (i, _) in zip(x, keys)]

    def read(self, i, seed):
        """Image i (3, size, size) uint8, and the random numbers (7,) that `light` takes."""
        box = None if self.split.boxes is None else self.split.boxes[i]
        with torch.random.fork_rng(devices=[], enabled=self.training):
            if self.training:
                torch.default_generator.manual_seed(seed)
            image = open_image(self.split.images[i], self.size, self.cut, box)
            return self.transform(image), torch.rand(7) if self.light else None


# ------------------------------------------------- batches of P classes x m images

class ClassBalancedSampler(torch.utils.data.Sampler):
    """Batches of batch_size / m distinct classes, m images each; N // batch_size of them an epoch.

    Classes come from a shuffled deck that is dealt out before it is shuffled again. Of a class with
    n >= m images m different ones are drawn; a smaller one gives all n, then m - n of them once
    more. Over `world` processes each rank gets its consecutive share of every batch. The same seed
    and epoch give the same batches; call set_epoch before each epoch.
    """

    def __init__(self, labels, batch_size, images_per_class=4, seed=0, rank=0, world=1):
        classes, counts = labels.unique(return_counts=True)
        if batch_size % images_per_class or batch_size % world:
            raise UserError(f"batch size {batch_size} must be a multiple of {images_per_class} "
                            f"images per class and of {world} processes")
        if batch_size // images_per_class > len(classes) or batch_size > len(labels):
            raise UserError(f"batch size {batch_size} with {images_per_class} images per class "
                            f"needs {batch_size // images_per_class} classes and {batch_size} "
                            f"images, the training split has {len(classes)} and {len(labels)}")
        self.by_class = labels.argsort(stable=True).split(counts.tolist())      # (n,) indices each
        self.batch_size, self.m, self.seed, self.epoch = batch_size, images_per_class, seed, 0
        self.length, share = len(labels) // batch_size, batch_size // world
        self.share = slice(rank * share, (rank + 1) * share)

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        P, deck = self.batch_size // self.m, []
        for _ in range(self.length):
            if len(deck) < P:   # what is left of the old deck goes last in the new: no class twice
                fresh = torch.randperm(len(self.by_class), generator=g).tolist()
                deck += [c for c in fresh if c not in deck] + [c for c in fresh if c in deck]
            chosen, deck = deck[:P], deck[P:]
            batch = torch.cat([self.draw(self.by_class[c], g) for c in chosen])
            yield batch[self.share].tolist()

    def draw(self, indices, g):
        """m of a class's indices (n,)."""
        n = len(indices)
        order = torch.randperm(n, generator=g)
        if n < self.m:
            order = torch.cat([order, torch.randint(n, (self.m - n,), generator=g)])
        return indices[order[:self.m]]


class Seeded(torch.utils.data.Sampler):
    """A ClassBalancedSampler's batches as (index, seed) pairs for Images; no pair comes twice."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        s = self.sampler
        for step, batch in enumerate(s):
            first = (s.epoch * len(s) + step) * s.batch_size + s.share.start
            first += s.seed * 0x9E3779B1                    # odd: sets the runs far apart
            yield [(i, (first + k) % 2 ** 32) for k, i in enumerate(batch)]


def loader(images, workers=0, **options):
    """A DataLoader of Images whose workers stay alive. It has a generator of its own: it draws as
    often as workers start, and from the global one a network's dropout would depend on that.
    """
    return torch.utils.data.DataLoader(images, num_workers=workers, persistent_workers=workers > 0,
                                       generator=torch.Generator(), **options)


# ------------------------------------------------- synthetic: drawn products

def uniform(generator, low, high, *shape):
    return torch.rand(*shape, generator=generator) * (high - low) + low


def waves(frequency, phase, x, y):
    """Two crossing cosines (n, S, S) of frequency (n, 2, 2), phase (n, 2), x and y ([n,] S, S)."""
    fx, fy, phase = frequency[:, :, :1, None], frequency[:, :, 1:, None], phase[:, :, None, None]
    return torch.cos(fx * x.unsqueeze(-3) + fy * y.unsqueeze(-3) + phase).sum(1)


def blend(mask, colours):
    """mask (n, S, S) in 0..1 chooses between two colours (n, 2, 3) -> (n, 3, S, S)."""
    return torch.lerp(colours[:, 1, :, None, None], colours[:, 0, :, None, None], mask[:, None])


def draw(shape, wobble, frequency, phase, palette, size, g):
    """One image a row, (n, size, size, 3) uint8. The identity is given; pose, background, occlusion
    and light are drawn from generator g.

    Identity: outline, r(angle) = 1 + sum of shape_k cos(k angle + wobble_k), k = 2..6, both (n, 5);
    pattern, frequency (n, 2, 2) and phase (n, 2); palette (n, 2, 3).
    """
    n, axis = len(shape), (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")                        # (S, S) in -1..1
    # Pose: shift, rotation, scale and stretch take the image's coordinates to the object's, u, v.
    angle, scale = uniform(g, -0.3, 0.3, n, 1, 1), uniform(g, 0.95, 1.2, n, 1, 1)
    shift, stretch = uniform(g, -0.12, 0.12, n, 2, 1, 1), uniform(g, 0.92, 1.08, n, 1, 1)
    dx, dy = scale * (x - shift[:, 0]), scale * (y - shift[:, 1])
    u, v = (angle.cos() * dx + angle.sin() * dy) * stretch, angle.cos() * dy - angle.sin() * dx
    k, polar = torch.arange(2, 7)[:, None, None], torch.atan2(v, u)[:, None]        # (n, 1, S, S)
    bumps = shape[:, :, None, None] * torch.cos(k * polar + wobble[:, :, None, None])
    radius = 0.75 * (1 + bumps.sum(1))                                              # (n, S, S)
    inside = ((radius - torch.hypot(u, v)) * size / 4 + 0.5).clamp(0, 1)            # 1: object
    product = blend((waves(frequency, phase, u, v) * 4 + 0.5).clamp(0, 1), palette)
    # Background: a pattern of the same kind in greyish colours.
    stripes = waves(uniform(g, -5, 5, n, 2, 2), uniform(g, 0, 2 * math.pi, n, 2), x, y)
    colours = 0.3 * torch.rand(n, 2, 3, generator=g) + 0.7 * torch.rand(n, 2, 1, generator=g)
    image = torch.lerp(blend((stripes * 2 + 0.5).clamp(0, 1), colours), product, inside[:, None])
    # Occlusion: a disc of one colour. Light: a cast, a brightness, a gradient, and noise.
    centre, reach = uniform(g, -1, 1, n, 2, 1, 1), uniform(g, 0, 0.3, n, 1, 1)
    disc = torch.hypot(x - centre[:, 0], y - centre[:, 1]) < reach          # (n, S, S) True: hidden
    image = torch.where(disc[:, None], torch.rand(n, 3, 1, 1, generator=g), image)
    slope = uniform(g, -0.25, 0.25, n, 2, 1, 1)
    light = uniform(g, 0.9, 1.1, n, 3, 1, 1) * uniform(g, 0.75, 1.15, n, 1, 1, 1)
    image = image * light * (1 + slope[:, 0] * x + slope[:, 1] * y)[:, None]
    image = image + 0.04 * torch.randn(image.shape, generator=g)
    return (image.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def synthetic(root=None, classes=1000, max_images=8, image_size=32, seed=0):
    """`classes` products to train on and as many others to test on, 3 to max_images images each."""
    g = torch.Generator().manual_seed(seed)
    C = 2 * classes
    bound = torch.tensor([0.22, 0.2, 0.16, 0.13, 0.1])
    identity = (uniform(g, -1, 1, C, 5) * bound, uniform(g, 0, 2 * math.pi, C, 5),      # outline
                uniform(g, -5, 5, C, 2, 2), uniform(g, 0, 2 * math.pi, C, 2),           # pattern
                torch.rand(C, 2, 3, generator=g))                                       # palette
    counts = torch.randint(3, max_images + 1, (C,), generator=g)
    y = torch.arange(C).repeat_interleave(counts)                                       # (N,)
    images = torch.cat([draw(*(f[part] for f in identity), image_size, g)
                        for part in y.split(1000)]).numpy()
    n = int((y < classes).sum())
    return Splits(Split(images[:n], y[:n]), Split(images[n:], y[n:]))


DATASETS["synthetic"] = Row(synthetic, (1, 10, 100, 1000), {},
                            ("classes", "max_images", "image_size"))


# ------------------------------------------------- python data.py

def check(split):
    """Opens every image; returns the sentences about the bad ones."""
    def complaint(item):
        try:
            open_image(item)
        except UserError as error:
            return str(error)
    images = dict.fromkeys(split.images) if isinstance(split.images, list) else split.images
    with ThreadPoolExecutor() as pool:
        return [text for text in pool.map(complaint, images) if text]


def download(name, root):
    """Fetches and checks an archive and unpacks it below root, unless the lists are there."""
    row, root = DATASETS[name], Path(root)
    if not row.archive:
        raise UserError(f"--download: '{name}' cannot be fetched by a program; "
                        f"see {row.page or row.tree.strip()}")
    address, md5, size = row.archive
    archive = root / address.rpartition("/")[2]
    with suppress(UserError):
        row.load(root)
        if not archive.exists():                    # it would, had unpacking it been cut short
            return print(f"{name} is in {root} already")
    print(f"fetching {size} from {address} to {archive}, to be unpacked there", flush=True)
    try:
        download_and_extract_archive(address, root, md5=md5, remove_finished=True)
    except Exception as error:                      # the network and the unpacker raise anything
        raise UserError(f"--download: {address} could not be fetched to {archive} "
                        f"({error})") from None


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="What a data set's lists say.", allow_abbrev=False)
    add_flags(parser.add_argument)
    parser.add_argument("--check", action="store_true",
                        help="open every image and list the bad ones")
    parser.add_argument("--download", action="store_true", help="fetch and unpack it first (sop)")
    parser.set_defaults(image_size=32)          # of the drawn products
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.download:
            download(args.dataset, args.root)
        splits = load_for(args)
    except (UserError, OSError) as error:
        sys.exit(f"data.py: {error}")
    print(*describe(splits), sep="\n")
    bad = [text for part in splits if part for text in check(part)] if args.check else []
    if bad:
        print(*bad, sep="\n")
        sys.exit(f"data.py: {len(bad)} images of {args.dataset} in {args.root} cannot be read")


if __name__ == "__main__":
    tolerate_terminal()
    main()
