# SPDX-License-Identifier: MIT
"""The model, its embeddings, and how good they are: Recall@K and MAP@R.

    python eval.py runs/synthetic-axbn-ms-b64-s0/checkpoint.pt      rebuilds the model from that file alone

recall_at_k and map_at_r are exact and work in chunks. A query is excluded from its own search by its index,
never by its similarity; a tie with another class counts against it; one without any match is a miss.
"""
import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import data


# ---------------------------------------------------------------- Recall@K and MAP@R

@torch.no_grad()
def positive_ranks(z, y, gallery_z=None, gallery_y=None, chunk=2 ** 26):
    """Rank, from 1, of every query's every positive in its search: (Q, R_max) int64, ascending, 0-padded.

    z (Q, D), y (Q,): embeddings, compared by cosine, and labels of the queries; gallery_z (G, D), gallery_y
    (G,): what is searched, None: the queries, each without itself; chunk: similarities held at a time.
    """
    if not (torch.isfinite(z).all() and (gallery_z is None or torch.isfinite(gallery_z).all())):
        raise ValueError("embeddings hold NaN or infinity: no neighbour is nearest")
    itself = gallery_z is None
    z = F.normalize(z.float(), dim=1)                                           # (Q, D)
    gallery_z, gallery_y = (z, y) if itself else (F.normalize(gallery_z.float(), dim=1), gallery_y)
    G, order = len(gallery_y), gallery_y.argsort(stable=True)             # (G,) gallery rows, class by class
    start = torch.searchsorted(gallery_y[order], y)                       # (Q,) where a query's class begins
    count = torch.searchsorted(gallery_y[order], y, right=True) - start   # (Q,) its size
    slot = torch.arange(max(int(count.max()), 1), device=z.device)        # (R_max,)
    ranks = torch.zeros(len(z), len(slot), dtype=torch.int64, device=z.device)
    for rows in torch.arange(len(z), device=z.device).split(max(1, chunk // G)):                # (b,)
        # The last column stands for "no such image": whatever is left out of a search points there.
        sim = z.new_full((len(rows), G + 1), -torch.inf)                        # (b, G + 1)
        torch.mm(z[rows], gallery_z.T, out=sim[:, :G])
        column = order[(start[rows, None] + slot).clamp_max(G - 1)]             # (b, R_max)
        column = column.masked_fill(slot >= count[rows, None], G)
        if itself:
            sim.scatter_(1, rows[:, None], -torch.inf)
        positive = sim.gather(1, column).sort(1, descending=True).values     # (b, R_max) -inf: no such image
        sim.scatter_(1, column, -torch.inf)                                  # only negatives are left
        for i in slot.tolist():
            ahead = (sim >= positive[:, i:i + 1]).sum(1)                # (b,) a tie counts against the query
            ranks[rows, i] = (ahead + i + 1).masked_fill(positive[:, i] == -torch.inf, 0)
    return ranks


def recall_from_ranks(ranks, ks):
    """{K: share of all queries whose first positive is among the K nearest}."""
    first = ranks[:, 0]
    return {k: ((first > 0) & (first <= k)).double().mean().item() for k in ks}


def map_from_ranks(ranks):
    """MAP@R: mean over all queries of 1/R * sum over the positives ranked at most R of their precision."""
    R = (ranks > 0).sum(1, keepdim=True)                                    # (Q, 1)
    found = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)        # (R_max,) positives found so far
    precision = (found / ranks.clamp_min(1).double()).masked_fill((ranks == 0) | (ranks > R), 0)
    return (precision.sum(1) / R.squeeze(1).clamp_min(1)).mean().item()


def recall_at_k(z, y, ks=(1, 10, 100, 1000), gallery_z=None, gallery_y=None):
    """Recall@K of embeddings z (Q, D) with labels y (Q,), {K: share in 0..1}; see positive_ranks."""
    return recall_from_ranks(positive_ranks(z, y, gallery_z, gallery_y), ks)


def map_at_r(z, y, gallery_z=None, gallery_y=None):
    """Mean average precision at R, the number of a query's positives (Musgrave et al., ECCV 2020)."""
    return map_from_ranks(positive_ranks(z, y, gallery_z, gallery_y))


# ---------------------------------------------------------------- the model

def conv4(widths=(48, 96, 192, 256)):
    """Four convolutions with batch norm, for small images on a CPU: (B, 3, S, S) -> (B, 256)."""
    layers, c = [], 3
    for i, w in enumerate(widths):
        layers += [nn.Conv2d(c, w, 3, stride=1 if i else 2, padding=1, bias=False),
                   nn.BatchNorm2d(w), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in (1, 2) else []
        c = w
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Encoder(nn.Module):
    """Images (B, 3, S, S) uint8 -> embeddings (B, D), not normalised: backbone, then one linear `head`."""

    def __init__(self, backbone, dim):
        super().__init__()
        if backbone == "conv4":
            self.backbone, width = conv4(), 256
        else:
            self.backbone = torchvision.models.get_model(backbone, weights=None)
            linear = [n for n, m in self.backbone.named_modules() if isinstance(m, nn.Linear)]
            if not linear or backbone.startswith(("googlenet", "inception")):
                raise data.UserError(f"--backbone {backbone}: its classifier is not one last linear layer")
            parent, _, child = linear[-1].rpartition(".")       # the classifier, which the head replaces
            width = self.backbone.get_submodule(linear[-1]).in_features
            setattr(self.backbone.get_submodule(parent), child, nn.Identity())
        self.head = nn.Linear(width, dim)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", 255 * mean[:, None, None], persistent=False)
        self.register_buffer("std", 255 * std[:, None, None], persistent=False)

    def features(self, x):
        return self.backbone((x - self.mean) / self.std)

    def forward(self, x):
        return self.head(self.features(x))


def load_weights(encoder, backbone, weights):
    """Fill the encoder's backbone; weights: "none", "imagenet" (torchvision's best) or a state_dict file."""
    if weights == "none":
        return
    if weights == "imagenet":
        try:
            state = torchvision.models.get_model_weights(backbone).DEFAULT.get_state_dict(progress=False)
        except (URLError, OSError, ValueError) as error:
            raise data.UserError(f"ImageNet weights of {backbone} cannot be had ({error}); use "
                                 "--weights FILE, a state_dict saved elsewhere, or --weights none") from None
    else:
        state = load_file(weights)
        state = {k.removeprefix("backbone."): v for k, v in state.get("model", state).items()}
    own = encoder.backbone.state_dict()
    missing = [k for k in own if k not in state or state[k].shape != own[k].shape]
    if missing:
        raise data.UserError(f"{weights}: not a state_dict of {backbone}: "
                             f"{missing[0]} is missing or has another shape")
    encoder.backbone.load_state_dict({k: state[k] for k in own})


def load_file(path):
    """A file of plain data written by torch.save, on the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # torn bytes make the unpickler raise anything
        reason = ("no such file" if isinstance(error, FileNotFoundError)
                  else f"{type(error).__name__}: {error}")
        raise data.UserError(f"{path}: cannot be read as a checkpoint ({reason.splitlines()[0]})") from None


# ---------------------------------------------------------------- evaluation

def autocast(device, amp):
    """Mixed precision as --amp names it: off, bf16 or fp16."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()


@torch.no_grad()
def embed(model, split, settings, device="cpu", workers=0):
    """Embeddings (N, D) float32 and labels (N,), on `device`, of a split's images in their order."""
    was_training = model.training
    model.eval()
    images = data.Images(split, data.eval_transform(settings["image_size"], settings["augment"]))
    batches = data.loader(images, workers, batch_size=256)
    with autocast(device, settings["amp"]):
        z = torch.cat([model(x.to(device)).float() for x, _, _ in batches])
    model.train(was_training)
    return z, split.labels.to(device)


def evaluate(model, splits, ks, settings, device="cpu", workers=0):
    """{"recall@K": ..., "map@r": ...} of the test splits, shares in 0..1."""
    query = embed(model, splits.query, settings, device, workers)
    gallery = embed(model, splits.gallery, settings, device, workers) if splits.gallery else (None, None)
    ranks = positive_ranks(*query, *gallery)
    recall = {f"recall@{k}": v for k, v in recall_from_ranks(ranks, ks).items()}
    return {**recall, "map@r": map_from_ranks(ranks)}


def usable_ks(ks, splits):
    """The K that are smaller than the gallery; says which are not, since they would always be 100 %."""
    size = len((splits.gallery or splits.query).labels) - (splits.gallery is None)
    if max(ks) >= size:
        print(f"note: Recall@{{{','.join(str(k) for k in ks if k >= size)}}} left out, "
              f"the gallery has {size} images", file=sys.stderr)
    return [k for k in ks if k < size]


def rebuild(state):
    """The trained encoder of a checkpoint's content, in evaluation mode."""
    model = Encoder(state["settings"]["backbone"], state["settings"]["dim"])
    model.load_state_dict(state["model"])
    return model.eval()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Recall@K and MAP@R of a checkpoint.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt or best.pt of a run")
    parser.add_argument("--dataset", choices=data.DATASETS, help="default: the one it was trained on")
    parser.add_argument("--root", help="default: where it was in training")
    parser.add_argument("--allow-partial", action="store_true",
                        help="other than official counts are a warning")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        state = load_file(args.checkpoint)
        if not isinstance(state, dict) or not {"settings", "model", "epoch"} <= state.keys():
            raise data.UserError(f"{args.checkpoint}: not a checkpoint of train.py")
        settings = {**state["settings"], "amp": state["settings"]["amp"] if args.device != "cpu" else "off"}
        settings.update({k: v for k, v in (("dataset", args.dataset), ("root", args.root)) if v})
        splits = data.load_for(settings, args.allow_partial or settings["allow_partial"])
        ks = usable_ks(data.DATASETS[settings["dataset"]].ks, splits)
        result = evaluate(rebuild(state).to(args.device), splits, ks, settings, args.device, args.workers)
    except data.UserError as error:
        sys.exit(f"eval.py: {data.sentence(error)}")
    print(f"{args.checkpoint}: {settings['dataset']}, epoch {state['epoch']}")
    print("  ".join(f"{name} {100 * value:.2f}" for name, value in result.items()))
    print(json.dumps({"dataset": settings["dataset"], "epoch": state["epoch"], **result}))


if __name__ == "__main__":
    main()
