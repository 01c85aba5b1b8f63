# SPDX-License-Identifier: MIT
"""The model, its embeddings, and how good they are: Recall@K and MAP@R.

    python eval.py runs/synthetic-axbn-ms-b16-s0/checkpoint.pt      rebuilds the model from that file alone

recall_at_k and map_at_r are exact and work in chunks. A query is excluded from its own search by its index,
never by its similarity; a tie with another class counts against it; one without any match is a miss.
"""
import argparse
import json
import math
import re
import sys
import zipfile
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from statistics import mode
from urllib.error import URLError

import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import data
from acbn import normalize


# ---------------------------------------------------------------- Recall@K and MAP@R

@torch.no_grad()
def positive_ranks(z, y, gallery_z=None, gallery_y=None, most=None, chunk=2 ** 26):
    """Rank, from 1, of every query's every positive in its search: (Q, R_max) int64, ascending, 0-padded.

    z (Q, D), y (Q,): embeddings, compared by cosine, and labels of the queries; gallery_z (G, D), gallery_y
    (G,): what is searched, None: the queries, each without itself; most: of each query only so many of the
    nearest positives (R_max); chunk: similarities held at a time.
    """
    itself, z = gallery_z is None, normalize(z).float()                         # (Q, D)
    gallery_z, gallery_y = (z, y) if itself else (normalize(gallery_z).float(), gallery_y)
    if not math.isfinite(z.sum() + gallery_z.sum()):
        raise ValueError("embeddings hold NaN or infinity: no neighbour is nearest")
    G, order = len(gallery_y), gallery_y.argsort(stable=True)             # (G,) gallery rows, class by class
    start = torch.searchsorted(gallery_y[order], y)                       # (Q,) where a query's class begins
    count = torch.searchsorted(gallery_y[order], y, right=True) - start   # (Q,) its size
    R_max = max(1, int(count.max()) - itself)
    R_max = min(R_max, most or R_max)
    ranks = z.new_zeros(len(z), R_max, dtype=torch.int64)
    similarities = z.new_empty(min(max(1, chunk // G), len(z)), G)        # kept: a CPU pays for fresh pages
    for rows in count.argsort(stable=True).split(len(similarities)):      # (b,) few positives first
        C = max(1, int(count[rows].max()))
        slot = torch.arange(C, device=z.device)                           # (C,)
        last = start[rows, None] + count[rows, None] - 1                  # (b, 1)
        column = order[(start[rows, None] + slot).minimum(last)]        # (b, C) its class, the last repeated
        other = slot < count[rows, None]                                  # (b, C) True: an image
        other = other & (column != rows[:, None]) if itself else other    # and not the query
        sim = torch.mm(z[rows], gallery_z.T, out=similarities[:len(rows)])                  # (b, G)
        positive = sim.gather(1, column).masked_fill(~other, -torch.inf)  # (b, C) -inf: none
        positive = positive.sort(1, descending=True).values[:, :min(R_max, max(1, C - itself))]      # (b, R)
        sim.scatter_(1, column, -torch.inf)                               # (b, G) only negatives are left
        negatives = count_at_least(sim, positive)                     # (b, R) a tie counts against the query
        R = positive.shape[1]
        rank = negatives + torch.arange(1, R + 1, device=z.device)        # (b, R) and the positives up to it
        ranks[rows, :R] = rank.masked_fill(positive == -torch.inf, 0)
    return ranks


def count_at_least(sim, bound):
    """How many of each row's sim (b, G) are at least each of its bounds (b, R): (b, R) int64.

    In float and in parts, which on a CPU stay in its cache: a tenth of the time of a sum of booleans.
    """
    (_, G), (b, R), out = sim.shape, bound.shape, torch.empty_like(bound)
    f = max(1, min(b, (2 ** 19 if sim.device.type == "cpu" else 2 ** 26) // (R * G)))
    flags = sim.new_empty(f, R, G)                                        # 1.0: at least
    for s, t, o in zip(sim.split(f), bound.split(f), out.split(f)):       # (f, G), (f, R), (f, R)
        torch.ge(s[:, None], t[:, :, None], out=flags[:len(s)])
        torch.sum(flags[:len(s)], 2, out=o)         # exact: float32 counts to 2^24, the gallery is smaller
    return out.long()


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
    return recall_from_ranks(positive_ranks(z, y, gallery_z, gallery_y, most=1), ks)


def map_at_r(z, y, gallery_z=None, gallery_y=None):
    """Mean average precision at R, the number of a query's positives (Musgrave et al., ECCV 2020)."""
    return map_from_ranks(positive_ranks(z, y, gallery_z, gallery_y))


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
    """Images (B, 3, S, S) uint8 -> embeddings (B, D), not normalised: backbone, then one linear `head`."""

    def __init__(self, backbone, dim):
        super().__init__()
        if backbone in ("conv4", "conv4-nobn"):
            self.backbone, width = conv4(batch_norm=backbone == "conv4"), 256
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
        if not isinstance(state, dict):
            raise data.UserError(f"{weights}: not a state_dict of {backbone} but a {type(state).__name__}")
        state = {k.removeprefix("backbone."): v for k, v in state.get("model", state).items()}
    own = encoder.backbone.state_dict()
    missing = [k for k in own if k not in state or state[k].shape != own[k].shape]
    if missing:
        raise data.UserError(f"{weights}: not a state_dict of {backbone}: "
                             f"{missing[0]} is missing or has another shape")
    encoder.backbone.load_state_dict({k: state[k] for k in own})


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
        raise data.UserError(f"{path}: cannot be read as a checkpoint, it is torn or no file of torch.save "
                             f"({reason})") from None


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
    images = data.Images(split, settings["image_size"], settings["augment"])
    batches = data.loader(images, workers, batch_size=256)
    with autocast(device, settings["amp"]):
        z = torch.cat([model(x.to(device)).float() for x, _, _ in batches])
    model.train(was_training)
    lost = int((~z.isfinite().all(1)).sum())
    if lost:
        raise data.UserError(f"the network makes NaN or infinity of {lost} of {len(z)} images: its weights "
                             "have diverged; train again with a lower --lr, or --amp off")
    return z, split.labels.to(device)


def scores(query, gallery, ks):
    """{"recall@K": ..., "map@r": ...}, shares in 0..1, of (z, y) pairs as embed returns them."""
    ranks = positive_ranks(*query, *gallery)
    recall = {f"recall@{k}": v for k, v in recall_from_ranks(ranks, ks).items()}
    return {**recall, "map@r": map_from_ranks(ranks)}


def embed_test(model, splits, settings, device="cpu", workers=0):
    """[(z, y) of the queries, (z, y) of the gallery]; (None, None) where the queries are the gallery."""
    return [embed(model, part, settings, device, workers) if part else (None, None)
            for part in (splits.query, splits.gallery)]


def evaluate(model, splits, ks, settings, device="cpu", workers=0):
    """The scores of the query split, searched in the gallery or in itself."""
    return scores(*embed_test(model, splits, settings, device, workers), ks)


def usable_ks(ks, splits):
    """The K that are smaller than the gallery; says which are not, since they would always be 100 %."""
    size = len((splits.gallery or splits.query).labels) - (splits.gallery is None)
    if max(ks) >= size:
        print(f"note: Recall@{{{','.join(str(k) for k in ks if k >= size)}}} left out, "
              f"the gallery has {size} images", file=sys.stderr)
    return [k for k in ks if k < size]


def rebuild(path):
    """The trained encoder of a checkpoint, in evaluation mode, and the checkpoint's content."""
    state = load_file(path)
    try:
        model = Encoder(state["settings"]["backbone"], state["settings"]["dim"])
        model.load_state_dict(state["model"])
        state["epoch"]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise data.UserError(f"{path}: not a checkpoint of this version of train.py ({error})") from None
    return model.eval(), state


# ---------------------------------------------------------------- results to look at

def contact_sheet(query, gallery, z, gallery_z, show, nearest=7, side=96):
    """PIL image: the `show` worst queries, worst first, with their nearest images and the first right one.

    query, gallery: splits, gallery None: the queries themselves; z (Q, D), gallery_z (G, D) or None: their
    embeddings. A right neighbour has a full frame and a tick, a wrong one a dashed frame and a cross.
    """
    itself, gallery = gallery is None, gallery or query
    y, gallery_y = query.labels, gallery.labels
    first = positive_ranks(z, y, gallery_z, None if itself else gallery_y)[:, 0]        # (Q,) 0: no match
    worst = first.where(first > 0, len(gallery_y)).argsort(descending=True, stable=True)[:show]
    sim = normalize(z[worst]) @ normalize(z if itself else gallery_z).T       # (show, G)
    if itself:
        sim.scatter_(1, worst[:, None], -torch.inf)
    near = sim.topk(min(nearest, sim.shape[1] - itself)).indices                        # (show, nearest)
    right = sim.masked_fill(y[worst, None] != gallery_y, -torch.inf).argmax(1)          # (show,)
    sheet = Image.new("RGB", ((nearest + 2) * (side + 12), 24 + len(worst) * (side + 34)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in ((0, "query"), (1, "nearest images"), (nearest + 1, "first right one")):
        pen.text((column * (side + 12) + 6, 4), title, "black", ImageFont.load_default(13))
    for r, q in enumerate(worst.tolist()):
        top = 24 + r * (side + 34)
        tile(sheet, 0, top, side, query, q, f"class {y[q]}", None)
        for c, g in enumerate(near[r].tolist()):
            right_one = bool(gallery_y[g] == y[q])
            tile(sheet, c + 1, top, side, gallery, g, f"#{c + 1}   {sim[r, g]:.3f}", right_one)
        if first[q] > 0:
            g = int(right[r])
            tile(sheet, nearest + 1, top, side, gallery, g, f"#{first[q]}   {sim[r, g]:.3f}", True)
        else:
            pen.text(((nearest + 1) * (side + 12) + 6, top + 6), "there is none", "black")
    return sheet


def tile(sheet, column, top, side, split, i, caption, right):
    """One image of a sheet, framed as right (True), wrong (False) or a query (None), with its caption."""
    x, y, pen = column * (side + 12) + 6, top, ImageDraw.Draw(sheet)
    box = None if split.boxes is None else split.boxes[i]
    sheet.paste(data.open_image(split.images[i], side, data.everything, box), (x, y))
    colour = {True: "#0060c0", False: "#d04000", None: "black"}[right]
    if right is False:          # dashes
        for k in range(0, side, 12):
            for a, b in (((x + k, y), (x + k + 6, y)), ((x + k, y + side), (x + k + 6, y + side)),
                         ((x, y + k), (x, y + k + 6)), ((x + side, y + k), (x + side, y + k + 6))):
                pen.line((a, b), colour, 3)
    else:
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline=colour, width=4 if right else 1)
    sx, sy = x + side - 14, y + side + 5
    if right is not None:
        lines = [(0, 6, 4, 11), (4, 11, 12, 0)] if right else [(1, 1, 11, 11), (1, 11, 11, 1)]
        for x0, y0, x1, y1 in lines:
            pen.line((sx + x0, sy + y0, sx + x1, sy + y1), colour, 3)
    pen.text((x, y + side + 3), caption, "black", ImageFont.load_default(13))


def read_runs(paths):
    """{label: the logs, lists of records, of runs that differ by their seed, "-s<seed>" in the name, alone}.

    paths: run folders, or copies of their log.jsonl under other names.
    """
    groups = {}
    for path in paths:
        log = path / "log.jsonl" if path.is_dir() else path
        try:
            records = [json.loads(line) for line in log.read_text().splitlines()]
            records[0]["settings"], records[-1]["recall@1"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise data.UserError(f"{log}: cannot be read as the log of a run ({error})") from None
        name = re.sub(r"-s\d+$", "", path.name.removesuffix(".jsonl"))
        groups.setdefault((path.parent.name, name), []).append(records)
    clear = len({name for _, name in groups}) == len(groups)
    return {name if clear else f"{parent}/{name}": runs for (parent, name), runs in groups.items()}


def mean_and_std(values):
    """Of a list of one figure a run, or of lists (runs, n), over the runs; the deviation of one run is 0."""
    values = torch.tensor(values, dtype=torch.float64)                                      # (runs, ...)
    mean = values.mean(0)
    return mean, values.std(0, correction=min(1, len(values) - 1)) if values.numel() else mean


def in_percent(runs, key, epoch=-1):
    return [100 * records[epoch][key] for records in runs]


def order_of_means(groups):
    """A sentence: do the means of Recall@1 keep their order over the last third of the epochs?"""
    last = min(len(records) for runs in groups.values() for records in runs) - 1
    epochs = range(last - last // 3, last + 1)
    means = {label: torch.stack([mean_and_std(in_percent(runs, "recall@1", e))[0] for e in epochs])
             for label, runs in groups.items()}                                             # each (epochs,)
    swaps = [f"{a} and {b}" for a, b in combinations(means, 2) if (means[a] > means[b]).unique().numel() > 1]
    return (f"order of the means of Recall@1 over epochs {epochs[0]} to {last}: "
            + (f"changes between {', '.join(swaps)}" if swaps else "does not change"))


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise data.UserError("--plot needs matplotlib: python -m pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


PANELS = (("Recall@1 (%)", {"-": "recall@1"}), ("loss", {"-": "loss"}), ("gain K", {"-": "gain"}),
          ("drift (Eq. 5), dotted: maximum", {"-": "drift_mean", ":": "drift_max"}),
          ("staleness, dotted: as adapted", {"-": "staleness_stored", ":": "staleness_adapted"}))


def plot(groups, out):
    """Groups of runs over their epochs, the mean and one deviation about it, drawn to the file `out`."""
    figure, axes = pyplot().subplots(2, 3, figsize=(10, 6), layout="constrained")
    axes = axes.flatten()
    for n, (label, runs) in enumerate(groups.items()):
        for axis, (title, lines) in zip(axes, PANELS):
            for style, key in lines.items():
                epochs = [e for e, rs in enumerate(zip(*runs)) if all(r.get(key) is not None for r in rs)]
                scale = 100 if "%" in title else 1
                mean, std = mean_and_std([[scale * r[e][key] for e in epochs] for r in runs])
                axis.plot(epochs, mean, style, color=f"C{n}", label=label if style == "-" else None)
                axis.fill_between(epochs, mean - std, mean + std, color=f"C{n}", alpha=0.2, linewidth=0)
            axis.set(title=title, xlabel="epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        by_age = torch.tensor([row for r in runs for record in r[-(len(r) // 3):]
                               for row in record.get("staleness", [])]).view(-1, 3)     # (rows, 3) age, ...
        means = [by_age[by_age[:, 0] == age].mean(0) for age in by_age[:, 0].unique()]      # each (3,)
        for k, style in ((1, "-"), (2, ":")):
            axes[-1].plot([m[0] for m in means], [m[k] for m in means], style, color=f"C{n}")
    axes[-1].set(title="staleness, last third of the epochs", xlabel="age in steps")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(out, dpi=100)


def plot_against(groups, settings, out):
    """Recall@1 of the last epoch against each of some settings, a line a method, to the file `out`.

    In each panel the other settings have the value that most runs have; a method that stands at one value
    alone, as `none` does for the memory's size, is a level line.
    """
    first = {label: runs[0][0]["settings"] for label, runs in groups.items()}
    for name in settings:
        if any(name not in of for of in first.values()):
            raise data.UserError(f"--against {name}: the runs have no such setting")
    figure, axes = pyplot().subplots(1, len(settings), figsize=(5 * len(settings), 4), squeeze=False,
                                     layout="constrained")
    usual = {name: mode([of[name] for of in first.values()]) for name in settings}
    methods = list(dict.fromkeys(of["method"] for of in first.values()))
    for axis, name in zip(axes[0], settings):
        for n, method in enumerate(methods):
            drawn = [label for label, of in first.items() if of["method"] == method
                     and all(of[o] == usual[o] for o in settings if o != name)]
            points = sorted((first[d][name], *mean_and_std(in_percent(groups[d], "recall@1"))) for d in drawn)
            if len(points) == 1:
                axis.axhline(points[0][1], color=f"C{n}", linestyle="--", label=method)
            elif points:
                x, mean, std = zip(*points)
                axis.errorbar(x, mean, std, fmt="o-", color=f"C{n}", capsize=3, label=method)
        others = ", ".join(f"{o.replace('_', ' ')} {usual[o]}" for o in settings if o != name)
        axis.set(title=others, xlabel=name.replace("_", " "), ylabel="Recall@1 (%)")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(out, dpi=100)


# ---------------------------------------------------------------- python eval.py

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Recall@K and MAP@R of a checkpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="checkpoint.pt or best.pt of a run")
    data.add_flags(add)         # default: as in training
    add("--workers", type=data.number(int, 0), default=0, help="processes that read images (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--show", type=data.number(int, 1), metavar="N",
        help="draw the N worst queries with their neighbours to --out")
    add("--plot", type=Path, nargs="+", metavar="RUN",
        help="draw the logs of runs to --out and print their means; no checkpoint")
    add("--against", nargs="+", metavar="SETTING", help="with --plot: the last epoch over batch_size, ...")
    add("--out", type=Path, help="sheet.png with --show, plot.png with --plot")
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.plot is None):
        parser.error("expected a checkpoint, or --plot with the folders of runs")
    if args.against and not args.plot:
        parser.error("--against needs --plot with the folders of runs")
    return args


def run(args):
    if args.plot:
        out, groups = args.out or Path("plot.png"), read_runs(args.plot)
        plot_against(groups, args.against, out) if args.against else plot(groups, out)
        for label, runs in groups.items():
            figures = [(key, *mean_and_std(in_percent(runs, key))) for key in ("recall@1", "map@r")]
            figures = [f"{key} {mean:.2f}" + f" ± {std:.2f}" * (len(runs) > 1) for key, mean, std in figures]
            print(label, f"runs {len(runs)}", *figures, sep="  ")
        if not args.against:
            print(order_of_means(groups))
        return print(f"{out}: {len(args.plot)} runs")
    model, state = rebuild(args.checkpoint)
    settings = {**state["settings"], "amp": state["settings"]["amp"] if args.device != "cpu" else "off"}
    settings.update({k: v for k, v in vars(args).items() if k in settings and k != "out" and v})
    splits = data.load_for(settings, settings["allow_partial"])
    ks = usable_ks(data.DATASETS[settings["dataset"]].ks, splits)
    model.to(args.device)
    query, gallery = embed_test(model, splits, settings, args.device, args.workers)
    result = scores(query, gallery, ks)
    if args.show:
        out = args.out or Path("sheet.png")
        z, gallery_z = (None if z is None else z.cpu() for z, _ in (query, gallery))
        contact_sheet(splits.query, splits.gallery, z, gallery_z, args.show).save(out)
        print(f"{out}: the {min(args.show, len(z))} worst queries")
    print(f"{args.checkpoint}: {settings['dataset']}, epoch {state['epoch']}")
    print("  ".join(f"{name} {100 * value:.2f}" for name, value in result.items()))
    print(json.dumps({"dataset": settings["dataset"], "epoch": state["epoch"], **result}))


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (data.UserError, OSError) as error:
        sys.exit(f"eval.py: {data.sentence(error)}")


if __name__ == "__main__":
    main()
