# SPDX-License-Identifier: MIT
"""The model, its embeddings, and how good they are: Recall@K and MAP@R.

    python eval.py runs/synthetic-axbn-ms-b16-s0/checkpoint.pt  rebuilds the model from that file
    python eval.py CHECKPOINT --save z.npz                      keeps the embeddings and labels
    python eval.py z.npz                                        scores such a file, whoever made it

The scores are exact. A query is left out of its own search by its index, never by its similarity.
Where an image of another class is as near as the right one, it counts as nearer. A query without
any match is a miss.
"""
import argparse
import importlib
import json
import os
import re
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch starts, see train.py

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import data
from acbn import normalize
from data import autocast, gather_object, rank_and_world

FORMAT = 5              # of train.py's checkpoints


# ------------------------------------------------- Recall@K and MAP@R

def search(z, y, gallery_z=None, gallery_y=None, chunk=128):
    """Yields, for `chunk` queries at a time, their similarities to what is searched, as two
    matrices (b, G): those of the positives and those of the negatives, with -inf everywhere else.

    z (Q, D), y (Q,): the queries' embeddings, compared by cosine, and labels. gallery_z (G, D),
    gallery_y (G,): what is searched; None: the queries, each without itself.
    """
    itself, z = gallery_z is None, normalize(z).float()                                 # (Q, D)
    gallery_z, gallery_y = (z, y) if itself else (normalize(gallery_z).float(), gallery_y)
    if not (z.isfinite().all() and gallery_z.isfinite().all()):
        raise data.UserError("the embeddings hold NaN or infinity, so no neighbour is nearest; if "
                             "the weights have diverged, train again with a lower --lr, or --amp "
                             "off")
    for rows in torch.arange(len(y), device=y.device).split(chunk):                     # (b,)
        sim = z[rows] @ gallery_z.T                                                     # (b, G)
        same = y[rows, None] == gallery_y                               # (b, G) True: same class
        negatives = sim.masked_fill(same, -torch.inf)                                   # (b, G)
        positives = sim.masked_fill(~same, -torch.inf)                                  # (b, G)
        if itself:
            positives.scatter_(1, rows[:, None], -torch.inf)
        yield positives, negatives


def first_rank(positives, negatives):
    """Rank of each query's nearest positive, from 1: (b, G), (b, G) -> (b,); infinite if none."""
    nearest = positives.amax(1, keepdim=True)                                           # (b, 1)
    nearer = (negatives >= nearest).sum(1)                              # (b,) a tie counts against
    return (1.0 + nearer).masked_fill(nearest[:, 0] == -torch.inf, torch.inf)


def average_precision(positives, negatives):
    """Average precision at R of each query, R its number of positives (Musgrave et al., ECCV 2020):
    1/R * sum over the positives that are among the R nearest of the precision at their rank; (b,).
    """
    R = (positives > -torch.inf).sum(1, keepdim=True)                                   # (b, 1)
    k = min(max(1, int(R.max())), positives.shape[1])       # farther ones cannot count
    p = positives.topk(k).values                                        # (b, k) nearest first
    n = negatives.topk(k).values.flip(1)                                # (b, k) nearest last
    nearer = k - torch.searchsorted(n, p.contiguous())                  # (b, k) negatives, ties too
    found = torch.arange(1, k + 1, device=p.device)                     # (k,) positives so far
    rank = found + nearer                                               # (b, k)
    precision = (found / rank).masked_fill((rank > R) | (found > R), 0)                 # (b, k)
    return precision.sum(1) / R[:, 0].clamp_min(1)


@torch.no_grad()
def scores(query, gallery=(None, None), ks=(1, 10, 100, 1000), map_r=True):
    """{"recall@K": share in 0..1, "map@r": ...} of queries and gallery as (z, y); see `search`."""
    ranks, precision = [], []
    with torch.autocast(query[0].device.type, enabled=False):       # 16 bits would change the ranks
        for positives, negatives in search(*query, *gallery):
            ranks += first_rank(positives, negatives).tolist()
            precision += average_precision(positives, negatives).tolist() if map_r else []
    result = {f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in ks}
    return {**result, "map@r": sum(precision) / len(precision)} if map_r else result


# ------------------------------------------------- the model

def conv4(batch_norm=True, widths=(48, 96, 192, 256)):
    """Four convolutions for small images on a CPU: (B, 3, S, S) -> (B, 256)."""
    layers, c = [], 3
    for i, w in enumerate(widths):
        layers.append(nn.Conv2d(c, w, 3, stride=1 if i else 2, padding=1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(w), nn.ReLU()] if batch_norm else [nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in (1, 2) else []
        c = w
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Removed(nn.Identity):
    """Stands where `torchvision_backbone` took a layer away."""


def torchvision_backbone(name):
    """(torchvision's network without its classifier's last layer, width of its features).

    The dropout beside that layer is left out: the field's backbones have none before the embedding.
    """
    backbone = torchvision.models.get_model(name, weights=None)
    linear = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear)]
    if not linear or name.startswith(("googlenet", "inception")):
        raise data.UserError(f"--backbone {name}: its classifier is not one last linear layer")
    parent, _, last = linear[-1].rpartition(".")
    classifier = backbone.get_submodule(parent)
    width = getattr(classifier, last).in_features
    for layer, module in list(classifier.named_children()):
        if layer == last or isinstance(module, nn.Dropout):
            setattr(classifier, layer, Removed())
    return backbone, width


def own_backbone(name, size):
    """(the network that MODULE:FUNCTION returns, width of its features of images (B, 3, S, S))."""
    module, _, function = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise data.UserError(f"--backbone {name}: {error}") from None
    if make is None:
        raise data.UserError(f"--backbone {name}: module '{module}' has no attribute '{function}'")
    backbone = make()
    backbone.eval()
    with torch.no_grad():
        features = backbone(torch.zeros(2, 3, size, size))
    shape = tuple(getattr(features, "shape", ()))       # (): no tensor, but a dictionary
    if len(shape) != 2 or shape[0] != 2:
        raise data.UserError(f"--backbone {name}: expected features (2, width) of two images, "
                             f"got {shape or type(features)}")
    return backbone, shape[1]


@contextmanager
def kept_buffers(model):
    """Afterwards buffers, such as batch norm's statistics, are as they were before."""
    saved = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), saved):
                buffer.copy_(value)


class Encoder(nn.Module):
    """Images (B, 3, S, S) uint8 -> embeddings (B, D), not normalised: backbone and linear `head`.

    dim: D, or 0: no head, the backbone's features are the embedding. frozen_bn: batch norm keeps
    its stored statistics while the network trains. chunk: the activations of at most so many images
    are kept; the others are computed anew on the way back (GradCache, arXiv 2101.06983). 0: all are
    kept.
    """

    def __init__(self, backbone, dim, frozen_bn=False, chunk=0, image_size=224):
        super().__init__()
        if backbone in ("conv4", "conv4-nobn"):
            self.backbone, width = conv4(batch_norm=backbone == "conv4"), 256
        elif ":" in backbone:
            self.backbone, width = own_backbone(backbone, image_size)
        else:
            self.backbone, width = torchvision_backbone(backbone)
        self.dim, self.frozen_bn, self.chunk = dim or width, frozen_bn, chunk
        self.head = nn.Linear(width, dim) if dim else nn.Identity()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", 255 * mean[:, None, None], persistent=False)
        self.register_buffer("std", 255 * std[:, None, None], persistent=False)

    def train(self, mode=True):
        super().train(mode)
        for layer in self.modules():
            if self.frozen_bn and isinstance(layer, _BatchNorm):
                layer.eval()
        return self

    def features(self, x):
        parts = x.tensor_split(-(-len(x) // self.chunk)) if self.chunk else [x]     # of one size
        if len(parts) == 1:
            return self.backbone((x - self.mean) / self.std)
        # Each part comes back here, as one part; and once more on the way back, with the same
        # random numbers. Batch norm's statistics, which are a part's, move the first time only.
        moving = any(m.training and m._buffers for m in self.backbone.modules())
        again = partial(kept_buffers, self) if moving else nullcontext
        return torch.cat([checkpoint(self.features, part, use_reentrant=False,
                                     context_fn=lambda: (nullcontext(), again()))
                          for part in parts])

    def forward(self, x):
        return self.head(self.features(x))


def load_weights(encoder, backbone, weights):
    """Fill the encoder's backbone; weights: "none", "imagenet" (torchvision's best) or a file.

    The file holds a state_dict, perhaps under "state_dict" or "model"; the names in it may begin
    with what DataParallel, DDP or another encoder put there. A run's checkpoint will do, too.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        try:
            state = torchvision.models.get_model(backbone, weights="DEFAULT").state_dict()
        except Exception as error:      # no network, no such weights, a torn download
            raise data.UserError(
                f"--weights imagenet: those of {backbone} cannot be had ({error}); use --weights "
                "FILE, a state_dict saved elsewhere, or none") from None
    else:
        state = load_file(weights)
        for name in ("state_dict", "model"):
            state = state[name] if isinstance(state, dict) and name in state else state
        if not isinstance(state, dict):
            raise data.UserError(f"{weights}: not a state_dict but a {type(state).__name__}")
    try:
        encoder.backbone.load_state_dict(for_network(state, encoder.backbone))
    except (RuntimeError, ValueError) as error:
        raise data.UserError(f"--weights {weights}, --backbone {backbone}: {error}") from None


def for_network(state, network):
    """A state_dict's tensors under the network's own names, without those of its last layer, which
    `torchvision_backbone` took away.
    """
    own, state = network.state_dict(), {str(name): value for name, value in state.items()}
    inside = {name.removeprefix("backbone."): value for name, value in state.items()
              if name.startswith("backbone.")}
    if own.keys() <= inside.keys():                                         # of an Encoder
        state = inside
    named = {own_name(name, own): value for name, value in state.items()}
    if len(named) < len(state):
        raise ValueError("two of its names become one without the prefix of DDP or of a wrapper")
    gone = tuple(f"{name}." for name, layer in network.named_modules()
                 if isinstance(layer, Removed))
    return {name: v for name, v in named.items() if name in own or not name.startswith(gone)}


def own_name(name, own):
    """The name without the prefixes that wrappers put there, as far as a name in `own` needs it."""
    while name not in own and re.match(r"(module|backbone|model|_orig_mod)\.", name):
        name = name.partition(".")[2]
    return name


def load_file(path):
    """A file of plain data written by torch.save, on the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # torn or foreign bytes make the unpickler raise anything
        raise data.UserError(f"{path}: cannot be read as a checkpoint ({error})") from None


def load_checkpoint(path):
    """The content of a checkpoint that this version of train.py wrote."""
    state = load_file(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise data.UserError(f"{path}: not a checkpoint of this version of train.py")
    return state


def rebuild(path):
    """The trained encoder of a checkpoint, in evaluation mode, and the checkpoint's content."""
    state = load_checkpoint(path)
    settings = state["settings"]
    model = Encoder(settings["backbone"], settings["dim"], settings["bn"] == "frozen",
                    settings["chunk"], settings["image_size"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise data.UserError(f"{path}: does not fit --backbone {settings['backbone']} as it is "
                             f"now: {error}") from None
    return model.eval(), state


# ------------------------------------------------- embeddings

@torch.no_grad()
def embed(model, images, amp="off", device="cpu", workers=0):
    """Embeddings (N, D) float32 and labels (N,), on `device`, of data.Images in their order.

    Several processes share the batches; each of them gets the embeddings of all.
    """
    was_training, (rank, world) = model.training, rank_and_world()
    model.eval()
    if amp == "fp16" and torch.device(device).type == "cpu":
        amp = "off"                     # a CPU takes 26 times as long in fp16
    batches = torch.arange(len(images)).split(64)        # larger ones are slower on a CPU
    mine = batches[rank * len(batches) // world:(rank + 1) * len(batches) // world]
    loader = data.loader(images, workers, batch_sampler=[batch.tolist() for batch in mine])
    with autocast(device, amp):
        share = [model(x.to(device)).float() for x, _ in loader]                    # each (b, D)
    model.train(was_training)
    shares = gather_object([part.cpu() for part in share])
    return torch.cat(sum(shares, [])).to(device), images.split.labels.to(device)    # (N, D), (N,)


def embed_test(model, splits, args):
    """[(z, y) of the queries, (z, y) of the gallery]; (None, None) if queries are the gallery.

    args: image_size, augment, amp, device and workers, as train.py has them.
    """
    return [embed(model, data.Images(part, args.image_size, args.augment), args.amp, args.device,
                  args.workers) if part else (None, None)
            for part in (splits.query, splits.gallery)]


def save_embeddings(path, splits, query, gallery, ks):
    """Writes embeddings, labels and relative names of the queries, and of a gallery; and the K."""
    arrays, names = {"ks": ks}, data.names(splits)
    for name, (z, y) in (("query", query), ("gallery", gallery)):
        if z is not None:
            arrays.update({name: z.cpu().numpy(), f"{name}_labels": y.cpu().numpy(),
                           f"{name}_names": np.array(names[name])})
    data.write(path, lambda file: np.savez(file, **arrays))


def read_embeddings(path):
    """([(z, y) of the queries, (z, y) of the gallery or (None, None)], the K or []) of a file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if not name.endswith("_names")}
        found = [(None, None), (None, None)]
        for k, name in enumerate(("query", "gallery")[:1 + ("gallery" in arrays)]):
            z, y = arrays.pop(name), arrays.pop(f"{name}_labels")
            if (z.ndim != 2 or z.dtype.kind != "f" or y.shape != z.shape[:1]
                    or y.dtype.kind not in "iu"):
                raise ValueError(f"{name} must be floats (N, D) and {name}_labels integers (N,), "
                                 f"found {z.dtype} {z.shape} and {y.dtype} {y.shape}")
            found[k] = torch.from_numpy(z.astype(np.float32)), torch.from_numpy(y.astype(np.int64))
            if z.shape[1] != found[0][0].shape[1] or len(z) == 0:
                raise ValueError(f"{name} is empty, or its width is not that of query")
        ks = arrays.pop("ks", np.array([]))
        if ks.ndim != 1 or any(k != int(k) or k < 1 for k in ks.tolist()):
            raise ValueError(f"ks must be a list of whole numbers from 1 on, found {ks}")
        if arrays:
            raise ValueError(f"unknown arrays {', '.join(arrays)}")
        return found, [int(k) for k in ks.tolist()]
    except KeyError as error:
        raise data.UserError(f"{path}: there is no array {error}") from None
    except Exception as error:          # torn or foreign bytes, or arrays of other names
        raise data.UserError(f"{path}: cannot be read as embeddings ({error})") from None


# ------------------------------------------------- python eval.py

def parse_args(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Scores of a checkpoint, by "
                                     "default on the data that it was trained for.")
    add = parser.add_argument
    add("file", type=os.path.expanduser,
        help="checkpoint.pt or best.pt of a run, or embeddings in an .npz file")
    parser.set_defaults(**dict.fromkeys(data.add_flags(add)))   # None: as in training
    add("--workers", type=data.number(int, 0),
        help="processes that read images (GPU: one a core, up to 16; CPU: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--save", type=os.path.expanduser, metavar="FILE.npz",
        help="write embeddings, labels and names there")
    args = parser.parse_args(argv)
    args.file, args.save = Path(args.file), args.save and Path(args.save)
    data.usable_device(args.device, parser)
    if args.workers is None:
        args.workers = data.default_workers(args.device)
    if args.save and args.file.suffix == ".npz":
        parser.error(f"--save {args.save}: {args.file} holds embeddings already")
    if args.save and (args.save.suffix != ".npz" or not args.save.absolute().parent.is_dir()):
        parser.error(f"--save {args.save}: expected a name that ends in .npz, in a folder that "
                     "exists")
    return args


def evaluate_checkpoint(flags):
    """(the data set's name, its splits, [(z, y) of the queries, (z, y) of the gallery])."""
    model, state = rebuild(flags.file)
    given = {name: value for name, value in vars(flags).items() if value is not None}
    args = argparse.Namespace(**{**state["settings"], **given})         # the run's, but for these
    splits = data.load_for(args)
    other = given.keys() & {"dataset", *data.DATASETS[args.dataset].options}        # asked for
    if data.fingerprint(splits) != state["data"]:
        text = (f"{args.file}: was made with other data than lie in {args.root}: their names or "
                "labels differ")
        if not other:
            raise data.UserError(f"{text} (--dataset scores them all the same)")
        print(f"note: {text}", file=sys.stderr)
    return args.dataset, splits, embed_test(model.to(args.device), splits, args)


def run(args):
    if args.file.suffix == ".npz":
        found, ks = read_embeddings(args.file)
        name, ks = args.dataset, ks or data.DATASETS[args.dataset or "sop"].ks
    else:
        name, splits, found = evaluate_checkpoint(args)
        ks = data.DATASETS[name].ks
    for part, (z, y) in zip(("query", "gallery"), found):
        if y is not None:
            print(f"{args.file}: {part} {len(y)} images of {len(y.unique())} classes")
    result = scores(*found, ks)
    print("  ".join(f"{key} {100 * value:.2f}" for key, value in result.items()))
    print(json.dumps({"dataset": name, **result}))
    if args.save:
        save_embeddings(args.save, splits, *found, ks)


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (data.UserError, OSError) as error:
        sys.exit(f"eval.py: {data.sentence(error)}")


if __name__ == "__main__":
    data.tolerate_terminal()
    main()
