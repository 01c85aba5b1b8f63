# SPDX-License-Identifier: MIT
"""Figures of runs, and the means that their tables show. A run is its folder, or a copy of its log.jsonl.
Runs whose names differ by "-s<seed>" alone are drawn as one, the mean and one deviation about it.

    python results/draw.py curves runs/a-s0 runs/a-s1 runs/b-s0 --out plot.png      recall, loss, drift, ...
    python results/draw.py overview runs/a-s0 runs/b-s0 --out overview.png          recall and drift alone
    python results/draw.py against batch_size memory_ratio --runs runs/a-s0 runs/b-s0 --out figure.png
    python results/draw.py sheet runs/a-s0/best.pt --show 8 --out sheet.png         the worst queries
    python results/draw.py idea --steps 40 --out idea.png --batch-size 64           stored and adapted rows

Needs matplotlib. `idea` takes train.py's flags; `--help` after a command lists its own.
"""
import argparse
import json
import re
import sys
from itertools import combinations
from pathlib import Path
from statistics import mode

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # the scripts are one folder up
import acbn  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402


# ---------------------------------------------------------------- logs and their means

def read_runs(paths):
    """{label: the logs, lists of records, of the runs that differ by their seed alone}."""
    groups = {}
    for path in paths:
        log = path / "log.jsonl" if path.is_dir() else path
        try:
            records = [json.loads(line) for line in log.read_text().splitlines()]
            records[0]["settings"], [r["recall@1"] + r["map@r"] + 0.0 for r in records]     # numbers
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


def tell(groups):
    """Prints what a table shows of each group."""
    for label, runs in groups.items():
        figures = [(key, *mean_and_std(in_percent(runs, key))) for key in ("recall@1", "map@r")]
        figures = [f"{key} {mean:.2f}" + f" ± {std:.2f}" * (len(runs) > 1) for key, mean, std in figures]
        print(label, f"runs {len(runs)}", *figures, sep="  ")


# ---------------------------------------------------------------- curves

def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise data.UserError("figures need matplotlib: python -m pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def draw_lines(axis, groups, title, lines):
    """One panel: for each group its figures over the epochs; lines: {style: key of the log}."""
    for n, (label, runs) in enumerate(groups.items()):
        for style, key in lines.items():
            epochs = [e for e, of in enumerate(zip(*runs)) if all(r.get(key) is not None for r in of)]
            scale = 100 if "%" in title else 1
            mean, std = mean_and_std([[scale * r[e][key] for e in epochs] for r in runs])
            axis.plot(epochs, mean, style, color=f"C{n}", label=label if style == "-" else None)
            axis.fill_between(epochs, mean - std, mean + std, color=f"C{n}", alpha=0.2, linewidth=0)
    axis.set(title=title, xlabel="epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


PANELS = (("Recall@1 (%)", {"-": "recall@1"}), ("loss", {"-": "loss"}), ("gain K", {"-": "gain"}),
          ("drift (Eq. 5), dotted: maximum", {"-": "drift_mean", ":": "drift_max"}),
          ("staleness, dotted: as adapted", {"-": "staleness_stored", ":": "staleness_adapted"}))


def curves(args):
    groups = read_runs(args.runs)
    tell(groups)
    print(order_of_means(groups))
    figure, axes = pyplot().subplots(2, 3, figsize=(10, 6), layout="constrained")
    axes = axes.flatten()
    for axis, (title, lines) in zip(axes, PANELS):
        draw_lines(axis, groups, title, lines)
    for n, runs in enumerate(groups.values()):
        by_age = torch.tensor([row for r in runs for record in r[-(len(r) // 3):]
                               for row in record.get("staleness", [])]).view(-1, 3)     # (rows, 3) age, ...
        means = [by_age[by_age[:, 0] == age].mean(0) for age in by_age[:, 0].unique()]      # each (3,)
        for k, style in ((1, "-"), (2, ":")):
            axes[-1].plot([m[0] for m in means], [m[k] for m in means], style, color=f"C{n}")
    axes[-1].set(title="staleness, last third of the epochs", xlabel="age in steps")
    axes[-1].grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(args.out, dpi=100)


def overview(args):
    groups = read_runs(args.runs)
    tell(groups)
    print(order_of_means(groups))
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (title, lines) in zip(axes, (PANELS[0], PANELS[3])):
        draw_lines(axis, groups, title, lines)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(args.out, dpi=110)


def against(args):
    """Recall@1 of the last epoch against each of some settings, a line a method. In each panel the other
    settings have the value that most runs have; a method with one value alone is a level line.
    """
    groups, settings = read_runs(args.runs), args.settings
    first = {label: runs[0][0]["settings"] for label, runs in groups.items()}
    for name in settings:
        if any(name not in of for of in first.values()):
            raise data.UserError(f"against {name}: the runs have no such setting")
    tell(groups)
    figure, axes = pyplot().subplots(1, len(settings), figsize=(5 * len(settings), 4), squeeze=False,
                                     layout="constrained")
    usual = {name: mode([of[name] for of in first.values()]) for name in settings}
    for axis, name in zip(axes[0], settings):
        for n, method in enumerate(dict.fromkeys(of["method"] for of in first.values())):
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
    figure.savefig(args.out, dpi=100)


# ---------------------------------------------------------------- contact sheets

def worst_queries(query, gallery, show):
    """The worst `show` queries: (query, rank of its first match or inf, its nearest 7, its first match), the
    last two as (image, similarity). query, gallery: (embeddings, labels), the gallery (None, None) where the
    queries are searched themselves.
    """
    (z, y), rows = query, []
    for positives, negatives in evaluation.search(*query, *gallery):
        sim = positives.maximum(negatives)                                                  # (b, G)
        rank = evaluation.first_rank(positives, negatives)                                  # (b,)
        near = sim.topk(min(7, sim.shape[1] - (gallery[0] is None)))                        # (b, 7), (b, 7)
        nearest = [list(zip(*pair)) for pair in zip(near.indices.tolist(), near.values.tolist())]
        first = positives.max(1)                                                            # (b,), (b,)
        rows += zip(rank.tolist(), nearest, zip(first.indices.tolist(), first.values.tolist()))
    order = sorted(range(len(y)), key=lambda q: (-rows[q][0], q))[:show]
    return [(q, *rows[q]) for q in order]


def sheet(args):
    model, state = evaluation.rebuild(args.checkpoint)
    model.to(args.device)
    settings = {**state["settings"], "amp": "off", **({"root": args.root} if args.root else {})}
    splits = data.load_for(settings, settings["allow_partial"])
    data.refuse_other_data(args.checkpoint, state["data"], data.fingerprint(splits))
    query, gallery = evaluation.embed_test(model, splits, settings, args.device)
    ks = evaluation.usable_ks(data.DATASETS[settings["dataset"]].ks, evaluation.searched(splits))
    print("  ".join(f"{k} {100 * v:.2f}" for k, v in evaluation.scores(query, gallery, ks).items()))
    worst = worst_queries(query, gallery, args.show)
    searched = splits.gallery or splits.query
    figure, axes = pyplot().subplots(len(worst), 9, figsize=(9 * 1.1, len(worst) * 1.35 + 0.3), squeeze=False)
    for row, (q, rank, near, first) in zip(axes, worst):
        y = int(splits.query.labels[q])
        tile(row[0], splits.query, q, f"class {y}", None)
        for k, (axis, (g, sim)) in enumerate(zip(row[1:8], near), 1):
            tile(axis, searched, g, f"#{k}  {sim:.3f}", int(searched.labels[g]) == y)
        if rank < float("inf"):
            tile(row[8], searched, first[0], f"#{rank:.0f}  {first[1]:.3f}", True)
        for axis in row[len(near) + 1:8] if rank < float("inf") else row[len(near) + 1:]:
            axis.axis("off")
    for column, title in ((0, "query"), (4, "nearest images"), (8, "first right one")):
        axes[0, column].set_title(title, fontsize=10)
    figure.tight_layout(pad=0.4)
    figure.savefig(args.out, dpi=100)


def tile(axis, split, i, caption, right):
    """One image, framed: right, solid and with a tick; wrong, dashed and with a cross; None: the query."""
    box = None if split.boxes is None else split.boxes[i]
    axis.imshow(data.open_image(split.images[i], 96, data.whole_image, box))
    axis.set(xticks=[], yticks=[])
    mark, colour, style = {True: (" ✓", "#0060c0", "-"), False: (" ✗", "#d04000", "--"),
                           None: ("", "black", "-")}[right]
    axis.set_xlabel(caption + mark, fontsize=9, color=colour, labelpad=2)
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=1 if right is None else 3, linestyle=style)


# ---------------------------------------------------------------- the idea

def two_memories(args, flags):
    """A short training; returns the fresh embeddings of the newest images in the memory (n, D), and the
    same rows as stored and as adapted at every step.
    """
    train_args = train.parse_args(flags)
    device, batch = train_args.device, train_args.batch_size
    if args.rows < batch:
        raise data.UserError(f"--rows {args.rows} is less than --batch-size {batch}")
    torch.manual_seed(train_args.seed)
    try:
        _, splits, _, sampler = train.load_data(train_args)
        model = train.make_model(train_args)
    except (ValueError, RuntimeError) as error:         # flags that do not fit data or model
        raise data.UserError(error) from None
    images = data.Images(splits.train, train_args.image_size, train_args.augment, training=True)
    loss = train.LOSSES[train_args.loss][0]
    stored, adapted = (acbn.CrossBatchLoss(train_args.dim, args.rows, method, loss).to(device)
                       for method in ("xbm", "xbn"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=train_args.lr)
    pixels, epoch = [], 0
    while adapted.step < args.steps:
        sampler.set_epoch(epoch)
        epoch += 1
        for x, y, _ in data.loader(images, batch_sampler=data.Seeded(sampler)):
            if adapted.step == args.steps:
                break
            x, y = x.to(device), y.to(device)
            z = model(x)
            stored(z.detach(), y)
            loss = adapted(z, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pixels = [*pixels, x][-(args.rows // batch):]
        print(f"step {adapted.step}/{args.steps}  loss {loss.item():.4f}", flush=True)
    with train.without_trace(model, train.random_state()):
        fresh = torch.cat([acbn.normalize(model(x)) for x in pixels])                       # (n, D)
    slots = train.own_slots(stored.memory, len(fresh))                                      # (n,)
    rows = (acbn.normalize(c.memory.all_embeddings[slots]) for c in (stored, adapted))      # each (n, D)
    return fresh.cpu(), *(r.cpu() for r in rows)


def idea(args, flags):
    fresh, stored, adapted = two_memories(args, flags)
    _, _, axes_of = torch.pca_lowrank(fresh, 2)             # (D, 2) the fresh ones', so neither panel's rows'
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 5.4), sharex=True, sharey=True, layout="constrained")
    f = fresh @ axes_of                                                                     # (n, 2)
    for axis, rows, title in ((axes[0], stored, "as stored (XBM)"), (axes[1], adapted, "adapted (XBN)")):
        r, distance = rows @ axes_of, (rows - fresh).norm(dim=1).mean()
        axis.plot(torch.stack([r[:, 0], f[:, 0]]), torch.stack([r[:, 1], f[:, 1]]), color="#999999", lw=0.5)
        axis.plot(*r.T, "o", ms=3.5, color="#d04000", label="row of the memory")
        axis.plot(*f.T, "o", ms=3.5, color="#0060c0", label="the same image, embedded now")
        axis.set(title=f"{title}: {distance:.2f} from fresh", xticks=[], yticks=[], aspect="equal")
        print(f"{title}: mean distance {distance:.3f}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(args.out, dpi=110)


# ---------------------------------------------------------------- python results/draw.py

def picture(text):
    """An argparse type: a file that can be written as a picture."""
    path = Path(text)
    if path.suffix not in (".png", ".jpg", ".pdf", ".svg") or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError("must end in .png, .jpg, .pdf or .svg, in a folder that exists, "
                                         f"got {text}")
    return path


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name, allow_abbrev=False).add_argument
           for name in ("curves", "overview", "against", "sheet", "idea")}
    for name in ("curves", "overview"):
        add[name]("runs", type=Path, nargs="+", metavar="RUN")
    add["against"]("settings", nargs="+", metavar="SETTING", help="batch_size, memory_ratio, ...")
    add["against"]("--runs", type=Path, nargs="+", metavar="RUN", required=True)
    add["sheet"]("checkpoint", type=Path)
    add["sheet"]("--show", type=data.number(int, 1), default=8, metavar="N", help="how many queries (8)")
    add["sheet"]("--root", help="the folder with the unpacked archive (as in training)")
    add["sheet"]("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add["idea"]("--steps", type=data.number(int, 1), default=300, help="of training (300)")
    add["idea"]("--rows", type=data.number(int, 2), default=320, help="of the memory (320)")
    for name in add:
        add[name]("--out", type=picture, default=Path(f"{name}.png"), help=f"({name}.png)")
    args, args.flags = parser.parse_known_args(argv)
    if args.flags and args.command != "idea":
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    if args.command == "sheet":
        evaluation.usable_device(args.device, parser)
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        pyplot()
        if args.command == "idea":
            idea(args, args.flags)
        else:
            {"curves": curves, "overview": overview, "against": against, "sheet": sheet}[args.command](args)
    except (data.UserError, OSError) as error:
        sys.exit(f"draw.py: {data.sentence(error)}")
    print(f"{args.out}: written")


if __name__ == "__main__":
    main()
