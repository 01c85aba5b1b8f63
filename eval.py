# SPDX-License-Identifier: MIT
"""The model, its embeddings, and how good they are: Recall@K and MAP@R.

    python eval.py runs/synthetic-axbn-ms-b16-s0/checkpoint.pt      rebuilds the model from that file alone
    python eval.py CHECKPOINT --save z.npz                          keeps the embeddings, labels and names
    python eval.py z.npz                                            scores such a file, whoever made it

The scores are exact. A query is left out of its own search by its index, never by its similarity; where an
image of another class is as near as the right one, it counts as nearer; a query without any match is a miss.
"""
import argparse
import json
import re
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import nn

import data
from acbn import normalize

# ---------------------------------------------------------------- Recall@K and MAP@R

def search(z, y, gallery_z=None, gallery_y=None, chunk=128):
    """Yields, for `chunk` queries at a time, their similarities to what is searched, as two matrices (b, G):
    those of the positives and those of the negatives, with -inf everywhere else.

    z (Q, D), y (Q,): the queries' embeddings, compared by cosine, and labels. gallery_z (G, D), gallery_y
    (G,): what is searched; None: the queries, each without itself.
    """
    itself, z = gallery_z is None, normalize(z).float()                         # (Q, D)
    gallery_z, gallery_y = (z, y) if itself else (normalize(gallery_z).float(), gallery_y)
    if not (z.isfinite().all() and gallery_z.isfinite().all()):
        raise ValueError("embeddings hold NaN or infinity: no neighbour is nearest")
    for rows in torch.arange(len(y), device=y.device).split(chunk):             # (b,)
        sim = z[rows] @ gallery_z.T                                             # (b, G)
        same = y[rows, None] == gallery_y                                       # (b, G) True: same class
        negatives = sim.masked_fill(same, -torch.inf)                           # (b, G)
        positives = sim.masked_fill(~same, -torch.inf)                          # (b, G)
        if itself:
            positives.scatter_(1, rows[:, None], -torch.inf)
        yield positives, negatives


def first_rank(positives, negatives):
    """Rank of each query's nearest positive, from 1: (b, G), (b, G) -> (b,). Without any it is infinite."""
    nearest = positives.amax(1, keepdim=True)                                   # (b, 1)
    nearer = (negatives >= nearest).sum(1)                                      # (b,) a tie counts against
    return (1.0 + nearer).masked_fill(nearest[:, 0] == -torch.inf, torch.inf)


def average_precision(positives, negatives):
    """Average precision at R of each query, R its number of positives (Musgrave et al., ECCV 2020):
    1/R * sum over the positives that are among the R nearest of the precision at their rank; (b,).
    """
    R = (positives > -torch.inf).sum(1, keepdim=True)                           # (b, 1)
    k = min(max(1, int(R.max())), positives.shape[1])       # what is not among the k nearest cannot count
    p = positives.topk(k).values                                                # (b, k) nearest first
    n = negatives.topk(k).values.flip(1)                                        # (b, k) nearest last
    nearer = k - torch.searchsorted(n, p.contiguous())                          # (b, k) negatives, ties too
    found = torch.arange(1, k + 1, device=p.device)                             # (k,) positives so far
    rank = found + nearer                                                       # (b, k)
    precision = (found / rank).masked_fill((rank > R) | (found > R), 0)         # (b, k)
    return precision.sum(1) / R[:, 0].clamp_min(1)


@torch.no_grad()
def scores(query, gallery=(None, None), ks=(1, 10, 100, 1000), map_r=True):
    """{"recall@K": ..., "map@r": ...}, shares in 0..1, of queries and gallery as (embeddings, labels)."""
    ranks, precision = [], []
    with torch.autocast(query[0].device.type, enabled=False):       # 16-bit similarities change the ranks
        for positives, negatives in search(*query, *gallery):
            ranks += first_rank(positives, negatives).tolist()
            precision += average_precision(positives, negatives).tolist() if map_r else []
    result = {f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in ks}
    return {**result, "map@r": sum(precision) / len(precision)} if map_r else result


def recall_at_k(z, y, ks=(1, 10, 100, 1000), gallery_z=None, gallery_y=None):
    """{K: share of the queries with an image of their class among the K nearest}; see `search`."""
    found = scores((z, y), (gallery_z, gallery_y), ks, map_r=False)
    return {k: found[f"recall@{k}"] for k in ks}


def map_at_r(z, y, gallery_z=None, gallery_y=None):
    """Mean over the queries of their `average_precision`; see `search`."""
    return scores((z, y), (gallery_z, gallery_y), ks=())["map@r"]


# ---------------------------------------------------------------- the model

def conv4(batch_norm=True, widths=(48, 96, 192, 256)):
    """Four convolutions for small images on a CPU: (B, 3, S, S) -> (B, 256)."""
    layers, c = [], 3
    for i, w in enumerate(widths):
        layers.append(nn.Conv2d(c, w, 3, stride=1 if i else 2, padding=1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(w), nn.ReLU()] if batch_norm else [nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in (1, 2) else []
        c = w
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Encoder(nn.Module):
    """Images (B, 3, S, S) uint8 -> embeddings (B, D), not normalised: backbone, then one linear `head`.

    The head takes the place of the classifier's last layer; the dropout beside that is left out: the
    backbones of the field have none between features and embedding. frozen_bn: batch norm keeps its stored
    statistics.
    """

    def __init__(self, backbone, dim, frozen_bn=False):
        super().__init__()
        if backbone in ("conv4", "conv4-nobn"):
            self.backbone, width = conv4(batch_norm=backbone == "conv4"), 256
        else:
            self.backbone = torchvision.models.get_model(backbone, weights=None)
            linear = [n for n, m in self.backbone.named_modules() if isinstance(m, nn.Linear)]
            if not linear or backbone.startswith(("googlenet", "inception")):
                raise data.UserError(f"--backbone {backbone}: its classifier is not one last linear layer")
            parent, _, last = linear[-1].rpartition(".")
            classifier = self.backbone.get_submodule(parent)
            width = getattr(classifier, last).in_features
            for name, layer in list(classifier.named_children()):
                if name == last or isinstance(layer, nn.Dropout):
                    setattr(classifier, name, nn.Identity())
        self.head, self.frozen_bn = nn.Linear(width, dim), frozen_bn
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", 255 * mean[:, None, None], persistent=False)
        self.register_buffer("std", 255 * std[:, None, None], persistent=False)

    def train(self, mode=True):
        super().train(mode)
        for layer in self.modules():
            if self.frozen_bn and isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
        return self

    def features(self, x):
        return self.backbone((x - self.mean) / self.std)

    def forward(self, x):
        return self.head(self.features(x))


def load_weights(encoder, backbone, weights):
    """Fill the encoder's backbone; weights: "none", "imagenet" (torchvision's best) or a state_dict file.

    Read too: a state_dict under "state_dict" or "model", names that begin with "module." or "backbone.".
    """
    if weights == "none":
        return
    if weights == "imagenet":
        try:
            state = torchvision.models.get_model(backbone, weights="DEFAULT", progress=False).state_dict()
        except (URLError, OSError, ValueError, RuntimeError) as error:
            raise data.UserError(f"ImageNet weights of {backbone} cannot be downloaded ({error}); use "
                                 "--weights FILE, a state_dict saved elsewhere, or --weights none") from None
    else:
        state = load_file(weights)
        for name in ("state_dict", "model"):
            state = state[name] if isinstance(state, dict) and name in state else state
        if not isinstance(state, dict):
            raise data.UserError(f"{weights}: not a state_dict of {backbone} but a {type(state).__name__}")
        state = {re.sub(r"^((module|backbone)\.)+", "", str(name)): value for name, value in state.items()}
    # Files from before torch 0.4.1 do not count batch norm's batches; nothing depends on these counts.
    own = {name: value for name, value in encoder.backbone.state_dict().items()
           if not name.endswith("num_batches_tracked")}
    missing = [name for name in own if getattr(state.get(name), "shape", None) != own[name].shape]
    if missing:
        raise data.UserError(f"{weights}: not a state_dict of {backbone}: "
                             f"{missing[0]} is missing or has another shape")
    encoder.backbone.load_state_dict({name: state[name] for name in own}, strict=False)


def load_file(path):
    """A file of plain data written by torch.save, on the CPU; its checksums, which torch skips, must fit."""
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise data.UserError(f"{path}: cannot be read as a checkpoint ({error.strerror or error})") from None
    except Exception as error:      # torn or foreign bytes make the unpickler raise anything
        reason = str(error) if "checksum" in str(error) else type(error).__name__
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise data.UserError(f"{path}: holds a Python object ({foreign[1]}) beside its tensors, and such "
                                 "code is never run here; save the state_dict alone to a file") from None
        raise data.UserError(f"{path}: cannot be read as a checkpoint, it is torn or no file of torch.save "
                             f"({reason})") from None


def rebuild(path):
    """The trained encoder of a checkpoint, in evaluation mode, and the checkpoint's content."""
    state = load_file(path)
    try:
        settings = state["settings"]
        model = Encoder(settings["backbone"], settings["dim"], settings["bn"] == "frozen")
        model.load_state_dict(state["model"])
        if not {"epoch", "data"} <= state.keys():
            raise KeyError("epoch or data")
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise data.UserError(f"{path}: not a checkpoint of this version of train.py ({reason})") from None
    return model.eval(), state


# ---------------------------------------------------------------- embeddings

def rank_and_world():
    """(this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def autocast(device, amp):
    """Mixed precision as --amp names it: off, bf16 or fp16."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()


@torch.no_grad()
def embed(model, split, settings, device="cpu", workers=0):
    """Embeddings (N, D) float32 and labels (N,), on `device`, of a split's images in their order.

    Several processes share the batches; each of them gets the embeddings of all.
    """
    was_training, (rank, world) = model.training, rank_and_world()
    model.eval()
    images = data.Images(split, settings["image_size"], settings["augment"])
    batches = torch.arange(len(images)).split(256)
    mine = batches[rank * len(batches) // world:(rank + 1) * len(batches) // world]
    loader = data.loader(images, workers, batch_sampler=[batch.tolist() for batch in mine])
    with autocast(device, settings["amp"]):
        parts = [model(x.to(device)).float() for x, _, _ in loader]                     # each (b, D)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, [part.cpu() for part in parts])
        parts = [part.to(device) for share in shares for part in share]
    z = torch.cat(parts)                                                                # (N, D)
    model.train(was_training)
    lost = int((~z.isfinite().all(1)).sum())
    if lost:
        raise data.UserError(f"the network makes NaN or infinity of {lost} of {len(z)} images: its weights "
                             "have diverged; train again with a lower --lr, or --amp off")
    return z, split.labels.to(device)


def embed_test(model, splits, settings, device="cpu", workers=0):
    """[(z, y) of the queries, (z, y) of the gallery]; (None, None) where the queries are the gallery."""
    return [embed(model, part, settings, device, workers) if part else (None, None)
            for part in (splits.query, splits.gallery)]


def evaluate(model, splits, ks, settings, device="cpu", workers=0):
    """The scores of the query split, searched in the gallery or in itself; {} on every rank but the first."""
    query, gallery = embed_test(model, splits, settings, device, workers)
    return scores(query, gallery, ks) if rank_and_world()[0] == 0 else {}


def usable_ks(ks, size):
    """The K that are smaller than the gallery; says which are not, since they would tell nothing."""
    if max(ks) >= size:
        print(f"note: Recall@{{{','.join(str(k) for k in ks if k >= size)}}} left out, "
              f"the gallery has {size} images", file=sys.stderr)
    return [k for k in ks if k < size]


def searched(splits):
    """How many images each query is compared with."""
    return len(splits.gallery.labels) if splits.gallery else len(splits.query.labels) - 1


# ---------------------------------------------------------------- embeddings in a file

def save_embeddings(path, splits, query, gallery):
    """Writes the embeddings, labels and relative names of the queries, and of a gallery."""
    arrays, names = {}, data.names(splits)
    for name, part, (z, y) in zip(("query", "gallery"), (splits.query, splits.gallery), (query, gallery)):
        if part:
            arrays.update({name: z.cpu().numpy(), f"{name}_labels": y.cpu().numpy(),
                           f"{name}_names": np.array(names[name])})
    np.savez(path, **arrays)


def read_embeddings(path):
    """[(z, y) of the queries, (z, y) of the gallery or (None, None)] of a file as --save writes it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if not name.endswith("_names")}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, EOFError, TypeError) as error:
        raise data.UserError(f"{path}: cannot be read as an .npz file ({error})") from None
    out = []
    for name in ("query", "gallery") if "gallery" in arrays else ("query",):
        if name not in arrays or f"{name}_labels" not in arrays:
            raise data.UserError(f"{path}: expected the arrays query and query_labels, and perhaps gallery "
                                 f"and gallery_labels, found {', '.join(arrays) or 'none'}")
        z, y = arrays[name], arrays[f"{name}_labels"]
        if z.ndim != 2 or z.dtype.kind != "f" or y.shape != z.shape[:1] or y.dtype.kind not in "iu":
            raise data.UserError(f"{path}: {name} must be floats (N, D) and {name}_labels integers (N,), "
                                 f"found {z.dtype} {z.shape} and {y.dtype} {y.shape}")
        least = 1 if "gallery" in arrays else 2
        if not np.isfinite(z).all() or len(z) < least or z.shape[1] != arrays["query"].shape[1]:
            raise data.UserError(f"{path}: {name} must be at least {least} finite rows, as long as the "
                                 f"queries' ({arrays['query'].shape[1]}), found {z.shape}")
        out.append((torch.from_numpy(z.astype(np.float32)), torch.from_numpy(y.astype(np.int64))))
    return out if len(out) == 2 else [*out, (None, None)]


# ---------------------------------------------------------------- python eval.py

def usable_device(name, parser):
    """Exits with one sentence where a device cannot be used."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name} cannot be used ({str(error).splitlines()[0]}); --device cpu can")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Recall@K and MAP@R of a checkpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("file", type=Path, help="checkpoint.pt or best.pt of a run, or embeddings in an .npz file")
    data.add_flags(add)         # default: as in training
    add("--workers", type=data.number(int, 0), default=0, help="processes that read images (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--save", type=Path, metavar="FILE.npz", help="write embeddings, labels and names there")
    args = parser.parse_args(argv)
    usable_device(args.device, parser)
    if args.save and args.file.suffix == ".npz":
        parser.error(f"--save {args.save}: {args.file} holds embeddings already")
    if args.save and (args.save.suffix != ".npz" or not args.save.absolute().parent.is_dir()):
        parser.error(f"--save {args.save}: expected a file name that ends in .npz, in a folder that exists")
    return args


def evaluate_checkpoint(args):
    """(what was evaluated; its splits; [(z, y) of the queries, (z, y) of the gallery]; the K to count)."""
    model, state = rebuild(args.file)
    settings = {**state["settings"], "amp": state["settings"]["amp"] if args.device != "cpu" else "off"}
    choices = ("dataset", "test_list", "df2_labels", "classes", "max_images")
    given = {name: getattr(args, name) for name in (*choices, "root", "allow_partial") if getattr(args, name)}
    differs = [name for name in given if given[name] != settings[name]]
    other = set(differs) & set(choices) or "dataset" in given and "root" in differs         # data, by wish
    settings.update(given)
    splits = data.load_for(settings, settings["allow_partial"])
    if not other:
        data.refuse_other_data(args.file, state["data"], data.fingerprint(splits))
    model.to(args.device)
    found = embed_test(model, splits, settings, args.device, args.workers)
    ks = usable_ks(data.DATASETS[settings["dataset"]].ks, searched(splits))
    return {"dataset": settings["dataset"], "epoch": state["epoch"]}, splits, found, ks


def run(args):
    if args.file.suffix == ".npz":
        (_, y), (_, gallery_y) = found = read_embeddings(args.file)
        what, size = {"queries": len(y)}, len(y) - 1 if gallery_y is None else len(gallery_y)
        ks = usable_ks(data.DATASETS[args.dataset or "sop"].ks, size)
    else:
        what, splits, found, ks = evaluate_checkpoint(args)
    result = scores(*found, ks)
    print(f"{args.file}: " + ", ".join(f"{name} {value}" for name, value in what.items()))
    print("  ".join(f"{name} {100 * value:.2f}" for name, value in result.items()))
    print(json.dumps({**what, **result}))
    if args.save:
        save_embeddings(args.save, splits, *found)


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (data.UserError, OSError) as error:
        sys.exit(f"eval.py: {data.sentence(error)}")


if __name__ == "__main__":
    main()
