# SPDX-License-Identifier: MIT
"""Figures of runs, and the means that the tables show. A run is its folder, or a copy of its log.

    python results/draw.py curves runs/a-s0 runs/a-s1 runs/b-s0     recall, loss, gain and drift
    python results/draw.py overview runs/a-s0 runs/b-s0             recall and drift alone
    python results/draw.py against batch_size memory_ratio --runs runs/a-s0 runs/b-s0
    python results/draw.py pays runs/xbn-s0 runs/none-s0            what a late xbn gains, and when
    python results/draw.py sheet runs/a-s0/best.pt --show 8         the worst queries
    python results/draw.py idea --steps 40 --batch-size 64          stored and adapted rows

Runs whose names differ by "-s<seed>" alone are averaged: their mean, and one deviation about it.
Where a run of `none` with the same seed and settings is among them, so is the difference to it; the
settings of the memory may differ.
--out names the picture; `idea` takes train.py's flags as well. Needs matplotlib.
"""
import argparse
import json
import os
import re
import sys
from functools import partial
from itertools import combinations, count
from pathlib import Path
from statistics import mode

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the scripts are one folder up
import acbn  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402


# ------------------------------------------------- logs and their means

def read_logs(paths):
    """{(folder, name without the seed): {path: log}}; a log is a list of records."""
    groups = {}
    for path in paths:
        log = path / "log.jsonl" if path.is_dir() else path
        records = [json.loads(line) for line in log.read_text().splitlines()]
        if not records or "settings" not in records[0]:
            raise data.UserError(f"{log}: not the log of a run, its first line has no settings")
        name = re.sub(r"-s\d+$", "", path.name.removesuffix(".jsonl"))
        groups.setdefault((path.parent.name, name), {})[log] = records
    return groups


def read_runs(paths):
    """{label: the logs of the runs that differ by their seed alone}."""
    groups = read_logs(paths)
    for logs in groups.values():
        for pair in combinations(logs, 2):
            refuse_unlike(*pair, *(logs[log] for log in pair))
    clear = len({name for _, name in groups}) == len(groups)
    return {name if clear else f"{parent}/{name}": list(logs.values())
            for (parent, name), logs in groups.items()}


def refuse_unlike(log, other_log, records, others):
    """Two runs that are averaged have the same settings and last epoch, and different seeds."""
    a, b = ({**r[0]["settings"], "last epoch": r[-1]["epoch"]} for r in (records, others))
    seeds = a.pop("seed"), b.pop("seed")
    differ = [f"{name} is {a.get(name)} and {b.get(name)}"
              for name in {**a, **b} if a.get(name) != b.get(name)]
    differ += [f"seed is {seeds[0]} in both"] * (seeds[0] == seeds[1])
    if differ:
        raise data.UserError(f"{log} and {other_log} cannot be averaged: {', '.join(differ)}")


def mean_and_std(values):
    """Over the runs, of one figure each or of a list each; the deviation of a single run is 0."""
    values = torch.tensor(values, dtype=torch.float64)                              # (runs, ...)
    mean = values.mean(0)
    return mean, ((values - mean).square().sum(0) / max(1, len(values) - 1)).sqrt()


def in_percent(runs, key, epoch=-1):
    return [100 * records[epoch][key] for records in runs]


def order_of_means(groups):
    """A sentence: do the means of Recall@1 keep their order over the last third of the epochs?"""
    last = min(len(records) for runs in groups.values() for records in runs) - 1
    epochs = [e for e in range(last - last // 3, last + 1)      # those that all runs have scored
              if all("recall@1" in log[e] for runs in groups.values() for log in runs)]
    if not epochs:
        return "order of the means of Recall@1: no epoch of the last third is scored in all runs"
    means = {label: torch.stack([mean_and_std(in_percent(runs, "recall@1", e))[0] for e in epochs])
             for label, runs in groups.items()}                                     # each (epochs,)
    swaps = [f"{a} and {b}" for a, b in combinations(means, 2)
             if (means[a] > means[b]).unique().numel() > 1]
    return (f"order of the means of Recall@1 over epochs {epochs[0]} to {epochs[-1]}: "
            + (f"changes between {', '.join(swaps)}" if swaps else "does not change"))


OF_THE_MEMORY = {"method", "memory_ratio", "warmup_steps", "fill_memory", "process_noise",
                 "measurement_noise", "gain_interval", "momentum"}      # `none` uses none of these


def runs_of_none(groups):
    return [log for logs in groups for log in logs if log[0]["settings"]["method"] == "none"]


def partner(log, plain):
    """The run of `none` with the seed, length and settings of this log, or None.

    Older logs lack some settings, so only those count that both have. Where two machines ran the
    same `none`, the partner has the same first epoch: their rounding differs.
    """
    mine = log[0]["settings"]
    alike = [other for other in plain if len(other) == len(log) and all(
        mine.get(name, value) == value for name, value in other[0]["settings"].items()
        if name not in OF_THE_MEMORY)]
    return min(alike, key=lambda other: other[:2][-1].get("loss") != log[:2][-1].get("loss"),
               default=None)


def minus_none(groups, runs, key):
    """Each run's figure minus that of its partner, in percent; [] where one has none. Two runs of a
    seed share its luck, so these differences can deviate far less than either mean.
    """
    plain = runs_of_none(groups.values())
    partners = [partner(log, plain) for log in runs]
    if runs[0][0]["settings"]["method"] == "none" or None in partners:
        return []
    return [a - b for a, b in zip(in_percent(runs, key), in_percent(partners, key))]


def shown(values, sign=""):
    mean, std = mean_and_std(values)
    return f"{mean:{sign}.2f}" + f" ± {std:.2f}" * (len(values) > 1)


def tell(groups):
    """Prints what a table shows of each group."""
    for label, runs in groups.items():
        figures = []
        for key in ("val_recall@1", "recall@1", "map@r"):
            if any(key not in records[-1] for records in runs):
                continue                                    # no classes were held out
            figures.append(f"{key} {shown(in_percent(runs, key))}")
            if differences := minus_none(groups, runs, key):
                figures.append(f"minus none {shown(differences, '+')}")
        print(label, f"runs {len(runs)}", *figures, sep="  ")


# ------------------------------------------------- curves

def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def finish(figure, axis, args, dpi=100):
    """Writes the picture, with one panel's labels as the legend of all."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(args.out, dpi=dpi)


PANELS = (("Recall@1 (%)", {"-": "recall@1"}), ("loss", {"-": "loss"}), ("gain K", {"-": "gain"}),
          ("drift (Eq. 5), dotted: maximum", {"-": "drift_mean", ":": "drift_max"}))


def has(groups, key):
    """Whether any log has data under this key."""
    return any(record.get(key) not in (None, [])
               for runs in groups.values() for log in runs for record in log)


def draw_panel(axis, groups, title, lines):
    """For each group its figures over the epochs; lines: {style: key of the log}."""
    scale = 100 if "%" in title else 1
    for n, (label, runs) in enumerate(groups.items()):
        for style, key in lines.items():
            epochs = [e for e, of in enumerate(zip(*runs))
                      if all(record.get(key) is not None for record in of)]
            mean, std = mean_and_std([[scale * log[e][key] for e in epochs] for log in runs])
            axis.plot(epochs, mean, style, color=f"C{n}", label=label if style == "-" else None)
            axis.fill_between(epochs, mean - std, mean + std, color=f"C{n}", alpha=0.2, linewidth=0)
    axis.set(title=title, xlabel="epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def curves(args):
    groups = read_runs(args.runs)
    tell(groups)
    print(order_of_means(groups))
    brief = args.command == "overview"
    panels = [(title, lines) for title, lines in (PANELS[::3] if brief else PANELS)
              if has(groups, lines["-"])]
    columns = len(panels) if brief else 2
    figure, axes = pyplot().subplots(-(-len(panels) // columns), columns, squeeze=False,
                                     figsize=(10, 4 if brief else 6), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels):
        draw_panel(axis, groups, title, lines)
    for unused in axes.flat[len(panels):]:
        unused.remove()
    finish(figure, axes[0, 0], args, dpi=110 if brief else 100)


def seconds(runs):
    """For 1,000 training images, in the fastest epoch of all runs: others may have had company.

    Of a method with a memory only the epochs after its start count: until then it does the work of
    `none`, of which all epochs count.
    """
    rates = [record["images_per_second"] for log in runs for before, record in zip(log, log[1:])
             if before.get("memory") or log[0]["settings"]["method"] == "none"]
    if not rates:
        raise data.UserError("--time: a run has no epoch after the one in which its memory starts")
    return [1000 / max(rates)]


def against(args):
    """Recall@1 of the last epoch against each of some settings, a line a method; --time adds the
    training time against the first. In each panel the other settings have the value that most runs
    have; a method with one value is a level line.
    """
    groups, settings = read_runs(args.runs), args.settings
    first = {label: runs[0][0]["settings"] for label, runs in groups.items()}
    for name in settings:
        if any(name not in of for of in first.values()):
            raise data.UserError(f"against {name}: the runs have no such setting")
    usual = {name: mode([of[name] for of in first.values()]) for name in settings}
    tell(groups)
    recall = partial(in_percent, key="recall@1")
    panels = [(name, "Recall@1 (%)", recall) for name in settings]
    panels += [(settings[0], "seconds for 1,000 images", seconds)] * args.time
    figure, axes = pyplot().subplots(1, len(panels), figsize=(5 * len(panels), 4),
                                     squeeze=False, layout="constrained")
    for axis, (name, title, values) in zip(axes[0], panels):
        others = [other for other in settings if other != name]
        for n, method in enumerate(dict.fromkeys(of["method"] for of in first.values())):
            points = sorted((of[name], *mean_and_std(values(groups[label])))
                            for label, of in first.items() if of["method"] == method
                            and all(of[other] == usual[other] for other in others))
            if len(points) == 1:
                axis.axhline(points[0][1], color=f"C{n}", linestyle="--", label=method)
            elif points:
                x, mean, std = zip(*points)
                axis.errorbar(x, mean, std, fmt="o-", color=f"C{n}", capsize=3, label=method)
        axis.set(title=", ".join(f"{other.replace('_', ' ')} {usual[other]}" for other in others),
                 xlabel=name.replace("_", " "), ylabel=title)
        axis.grid(alpha=0.3)
    finish(figure, axes[0, 0], args)


# ------------------------------------------------- when a memory pays

FEW = 0.75      # negatives an image; chosen on the runs in logs/, where 0.73 gains and 0.78 loses


def late_gain(log, plain):
    """(negatives an image that `none` mines in the epoch before the memory starts, what this run
    gains on it in percent); None but for an `xbn` that starts after the first epoch.
    """
    settings = log[0]["settings"]
    start = next((e for e, record in enumerate(log) if record.get("memory")), 0)
    late = settings["method"] == "xbn" and "variant" not in settings and start > 1
    none = partner(log, plain) if late else None
    return none and (none[start - 1]["negatives_mined"] / settings["batch_size"],
                     100 * (log[-1]["recall@1"] - none[-1]["recall@1"]))


def late_gains(groups):
    """[((negatives, gain), its deviation, the runs' number, name and settings)], a row a group."""
    plain, rows = runs_of_none(logs.values() for logs in groups.values()), []
    for name, logs in groups.items():
        if found := [point for log in logs.values() if (point := late_gain(log, plain))]:
            mean, std = (figures.tolist() for figures in mean_and_std(found))
            settings = next(iter(logs.values()))[0]["settings"]
            rows.append((mean, std[1], len(found), "/".join(name), settings))
    if not rows:
        raise data.UserError("pays: no xbn that starts after the first epoch has its none here")
    return sorted(rows, key=lambda row: row[0])


def pays(args):
    """The gain of each late `xbn` over the negatives that `none` had left, and as a table. A name
    stands at what contradicts the rule: few negatives, or fine-tuning with the paper's loss.
    """
    rows = late_gains(read_logs(args.runs))
    figure, axis = pyplot().subplots(figsize=(7, 5), layout="constrained")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(FEW, color="black", linewidth=0.8, linestyle=":")
    for point, std, runs, name, settings in rows:
        ms, scratch = settings["loss"] == "ms", settings["weights"] == "none"
        kind = f"{'MS' if ms else 'paper’s loss'}, {'from scratch' if scratch else 'fine-tuned'}"
        odd = (point[0] < FEW or not (ms or scratch)) != (point[1] > 0)
        print(f"{name}  {kind}  runs {runs}  negatives {point[0]:.2f}  gain {point[1]:+.2f}"
              + f" ± {std:.2f}" * (runs > 1) + "  contradicts" * odd)
        axis.errorbar(*point, std, fmt="o" if ms else "s", color="#0060c0" if ms else "#d04000",
                      mfc="white" if scratch else None, capsize=2, label=kind)
        axis.annotate(name.split("/")[0] * odd, point, (-6, 6), textcoords="offset points",
                      ha="right")
    axis.set_xscale("symlog", linthresh=0.25, linscale=0.3, base=2)
    axis.set_yscale("symlog", linthresh=2)
    axis.set(xticks=[0, 0.25, 0.5, 1, 2, 4, 8], yticks=[-10, -5, -2, -1, 0, 1, 2, 5, 10, 20],
             xlabel="negatives an image that none mines in the epoch before the memory starts",
             ylabel="Recall@1 of xbn minus none")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    handles, kinds = axis.get_legend_handles_labels()
    marks = dict(zip(kinds, handles))                               # one of each kind
    axis.legend(marks.values(), marks.keys(), loc="lower left")
    figure.savefig(args.out, dpi=100)


# ------------------------------------------------- contact sheets

def worst_queries(query, gallery, show):
    """The worst `show` queries: (query, rank of its first match or inf, its nearest 7, its first
    match), the last two as (image, similarity). query, gallery: as `evaluation.search` takes them.
    """
    rows = []
    for positives, negatives in evaluation.search(*query, *gallery):
        sim = positives.maximum(negatives)                                          # (b, G)
        rank = evaluation.first_rank(positives, negatives)                          # (b,)
        near = sim.topk(min(7, sim.shape[1] - (gallery[0] is None)))                # 2 x (b, 7)
        nearest = [list(zip(*pair)) for pair in zip(near.indices.tolist(), near.values.tolist())]
        first = positives.max(1)                                                    # 2 x (b,)
        found = zip(first.indices.tolist(), first.values.tolist())
        rows += zip(count(len(rows)), rank.tolist(), nearest, found)
    return sorted(rows, key=lambda row: -row[1])[:show]


def class_name(split, i):
    """The folder that holds the class of image i and nothing else, or else the class's number."""
    y = split.labels[i]
    if isinstance(split.images, list):
        own = (split.labels == y).tolist()
        folder = os.path.commonpath([os.path.dirname(path)
                                     for path, mine in zip(split.images, own) if mine])
        name = os.path.basename(folder)
        if not any(path.startswith(folder + os.sep)
                   for path, mine in zip(split.images, own) if not mine):
            return name if len(name) <= 14 else name[:13] + "…"     # as wide as an image
    return f"class {y}"


def sheet(args):
    model, state = evaluation.rebuild(args.checkpoint)
    run = {**state["settings"], "amp": "off", "workers": 0, "device": args.device}
    run = argparse.Namespace(**{**run, "root": args.root or run["root"]})
    splits = data.load_for(run)
    if data.fingerprint(splits) != state["data"]:
        raise data.UserError(f"{args.checkpoint}: was made with other data than lie in {run.root}")
    found = evaluation.embed_test(model.to(args.device), splits, run)
    worst, searched = worst_queries(*found, args.show), splits.gallery or splits.query
    figure, axes = pyplot().subplots(len(worst), 9, figsize=(9.9, len(worst) * 1.35 + 0.3),
                                     squeeze=False)
    for axis in axes.flat:
        axis.axis("off")                                # what stays empty
    for row, (q, rank, near, first) in zip(axes, worst):
        y = splits.query.labels[q]
        tile(row[0], splits.query, q, class_name(splits.query, q), None)
        for k, (axis, (g, sim)) in enumerate(zip(row[1:8], near), 1):
            tile(axis, searched, g, f"#{k}  {sim:.3f}", bool(searched.labels[g] == y))
        if rank < float("inf"):
            tile(row[8], searched, first[0], f"#{rank:.0f}  {first[1]:.3f}", True)
    for column, title in ((0, "query"), (4, "nearest images"), (8, "first right one")):
        axes[0, column].set_title(title, fontsize=10)
    figure.tight_layout(pad=0.4)
    figure.savefig(args.out, dpi=100)


def tile(axis, split, i, caption, right):
    """One image, framed: right, solid and with a tick; wrong, dashed and with a cross; None: the
    query.
    """
    box = None if split.boxes is None else split.boxes[i]
    axis.imshow(data.open_image(split.images[i], 96, data.whole_image, box))
    axis.axis("on")
    axis.set(xticks=[], yticks=[])
    mark, colour, style = {True: (" ✓", "#0060c0", "-"), False: (" ✗", "#d04000", "--"),
                           None: ("", "black", "-")}[right]
    axis.set_xlabel(caption + mark, fontsize=9, color=colour, labelpad=2,
                    parse_math=False)                   # a $ in a folder's name is a $
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=1 if right is None else 3, linestyle=style)


# ------------------------------------------------- the idea

def batches_without_end(args, splits, sampler):
    images = data.Images(splits.train, args.image_size, args.augment, training=True)
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from data.loader(images, batch_sampler=data.Seeded(sampler))


def two_memories(rows, steps, args):
    """A short training; returns the fresh embeddings of the newest images in the memory (n, D),
    and the same rows as stored and as adapted at every step.
    """
    if rows < args.batch_size:
        raise data.UserError(f"--rows {rows} is less than --batch-size {args.batch_size}")
    torch.manual_seed(args.seed)
    _, splits, _, sampler = train.load_data(args)
    model, loss, pixels = train.make_model(args), train.LOSSES[args.loss][0], []
    stored, adapted = (acbn.CrossBatchLoss(args.dim, rows, method, loss).to(args.device)
                       for method in ("xbm", "xbn"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step, (x, y) in zip(range(1, steps + 1), batches_without_end(args, splits, sampler)):
        x, y = x.to(args.device), y.to(args.device)
        z = model(x)                                                                # (B, D)
        stored(z.detach(), y)
        loss = adapted(z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pixels = [*pixels, x][-(rows // len(x)):]
        if step % 10 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    with train.without_trace(model, args.device, train.random_state(args.device)):
        fresh = torch.cat([acbn.normalize(model(x)) for x in pixels])               # (n, D)
    written = stored.memory.written
    slots = torch.arange(written - len(fresh), written) % rows                      # (n,)
    return fresh.cpu(), *(acbn.normalize(criterion.memory.all_embeddings[slots]).cpu()
                          for criterion in (stored, adapted))                       # each (n, D)


def idea(args):
    fresh, stored, adapted = two_memories(args.rows, args.steps, train.parse_args(args.flags))
    _, _, plane = torch.pca_lowrank(fresh, 2)       # (D, 2) the fresh rows', it favours neither
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 5.4), sharex=True, sharey=True,
                                     layout="constrained")
    f = fresh @ plane                                                               # (n, 2)
    for axis, rows, title in zip(axes, (stored, adapted), ("as stored (XBM)", "adapted (XBN)")):
        r, distance = rows @ plane, (rows - fresh).norm(dim=1).mean()               # (n, 2), ()
        axis.plot(torch.stack([r[:, 0], f[:, 0]]), torch.stack([r[:, 1], f[:, 1]]), color="#999999",
                  lw=0.5)
        axis.plot(*r.T, "o", ms=3.5, color="#d04000", label="row of the memory")
        axis.plot(*f.T, "o", ms=3.5, color="#0060c0", label="the same image, embedded now")
        axis.set(title=f"{title}: {distance:.2f} from fresh", xticks=[], yticks=[], aspect="equal")
        print(f"{title}: mean distance {distance:.3f}")
    finish(figure, axes[0], args, dpi=110)


# ------------------------------------------------- python results/draw.py

COMMANDS = {"curves": curves, "overview": curves, "against": against, "pays": pays, "sheet": sheet,
            "idea": idea}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name, allow_abbrev=False).add_argument for name in COMMANDS}
    for name in ("curves", "overview", "pays"):
        add[name]("runs", type=Path, nargs="+", metavar="RUN")
    add["against"]("settings", nargs="+", metavar="SETTING", help="batch_size, memory_ratio, ...")
    add["against"]("--runs", type=Path, nargs="+", metavar="RUN", required=True)
    add["against"]("--time", action="store_true", help="one more panel: the time of training")
    add["sheet"]("checkpoint", type=Path)
    add["sheet"]("--show", type=data.number(int, 1), default=8, help="how many queries (8)")
    add["sheet"]("--root", help="the folder with the unpacked archive (as in training)")
    add["sheet"]("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add["idea"]("--steps", type=data.number(int, 1), default=300, help="of training (300)")
    add["idea"]("--rows", type=data.number(int, 2), default=320, help="of the memory (320)")
    for name in add:
        add[name]("--out", default=f"{name}.png", help=f"({name}.png)")
    args, args.flags = parser.parse_known_args(argv)
    if args.flags and args.command != "idea":
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    if args.command == "sheet":
        data.usable_device(args.device, parser)
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        pyplot()
        COMMANDS[args.command](args)
    except (data.UserError, OSError, ImportError, ValueError) as error:
        sys.exit(f"draw.py: {data.sentence(error)}")
    print(f"{args.out}: written")


if __name__ == "__main__":
    main()
