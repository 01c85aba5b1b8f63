# SPDX-License-Identifier: MIT
"""Trainings with another adaptation in the place of the paper's; all other flags are train.py's.

    python results/variants.py moments MEAN STD --batch-size 16 --out runs/variant
        a rule of its own for the mean and for the deviation. A rule is a constant gain from 0 to 1; "off":
        the memory keeps its own; "measured": a Kalman filter whose noises are found from the data; for the
        deviation also "classes": the batch's, corrected for the few classes that it consists of.
    python results/variants.py fresh --every 1 --bn frozen --memory-ratio 0.1 --out runs/fresh
        the bound: every so many steps the stored images, with the augmentation that they had, are embedded
        anew by the network as it is. That costs a memory's forward passes a step, and the checkpoint holds
        the pixels. One process; batch norm must be frozen, or the passes would move its statistics.
"""
import argparse
import os
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # the scripts are one folder up
import acbn  # noqa: E402
import train  # noqa: E402


class Variant(acbn.CrossBatchLoss):
    """An adapting method whose mean and deviation each have a rule of their own."""

    def __init__(self, rules, *args):
        super().__init__(*args)
        self.rules = rules                                                      # (of mean, of deviation)
        self.register_buffer("filters", torch.tensor([[1.0, 0.0, 0.0]] * 2))    # (2, 3) p, S, r of each

    def forward(self, z, y):
        self.y = y
        return super().forward(z, y)

    @torch.no_grad()
    def adapt(self, z):
        (mean, std), noises, corrected = moments_of_classes(z, self.y)
        stored, started, target = self.memory.embeddings, bool(self.std.any()), []
        own = acbn.moments(stored) if len(stored) > 1 else (mean, std)
        measured = mean, corrected if self.rules[1] == "classes" else std
        for k, (rule, estimate) in enumerate(zip(self.rules, (self.mean, self.std))):
            gain = {"off": 0.0, "classes": 1.0}.get(rule, rule)
            if not started:
                estimate.copy_(measured[k])
            if rule == "measured":
                gain = measured_gain(self.filters[k], (measured[k] - estimate).square().mean(), noises[k])
            estimate.lerp_(measured[k], gain)
            target.append(own[k] if rule == "off" else estimate)
            self.K.fill_(gain if k == 0 else self.K.item())
        if len(stored) > 1:
            stored.copy_(acbn.match_moments(stored, *target))


def moments_of_classes(z, y):
    """Of a batch z (B, D) of P classes y (B,) drawn at random, since one class's images hang together:
    (mean, std), the variances of their errors as estimates of the data set's by the jackknife over classes,
    averaged over D, and the std that has no bias from P being small. ((D,), (D,)), ((), ()), (D,).
    """
    classes = y.unique()                                                                        # (P,)
    without = [acbn.moments(z[y != c]) for c in classes]
    noises = [((len(classes) - 1) ** 2 / len(classes) * torch.stack(m).var(0)).mean() for m in zip(*without)]
    centres = torch.stack([z[y == c].mean(0) for c in classes])                                 # (P, D)
    within = torch.stack([z[y == c].var(0, correction=0) for c in classes]).mean(0)             # (D,)
    return acbn.moments(z), noises, (within + centres.var(0)).sqrt()


def measured_gain(state, innovation, r, rate=0.02):
    """Innovation matching (Mehra 1972): S, the running mean of squared innovations, should be p + q + r. So
    q = max(S - r - p, 0); then Algorithm 1, lines 1-3. state (3,): p, S, r; written.
    """
    p, S, noise = state.tolist()
    S, noise = (S + rate * (innovation - S), noise + rate * (r - noise)) if noise else (innovation, r)
    S, noise = float(S), float(noise)
    p, K = acbn.kalman_gain(p, max(S - noise - p, 0), noise)
    state.copy_(torch.tensor([p, S, noise]))
    return K


class Fresh(acbn.CrossBatchLoss):
    """The memory holds what the present network makes of its images: the rows are embedded anew every
    `every` steps, from their pixels in a ring beside the memory.
    """
    model, side = None, 0       # set by `watched`: the network, whose last input stands in model.seen

    def __init__(self, every, *args):
        super().__init__(*args)
        shape, self.every = (self.memory.size, 3, self.side, self.side), every
        self.register_buffer("pixels", torch.zeros(shape, dtype=torch.uint8))       # (M, 3, S, S) saved too

    @torch.no_grad()
    def adapt(self, z):
        x, memory = self.model.seen, self.memory                        # (B, 3, S, S)
        if (self.step - self.warmup_steps) % self.every == 0:
            with torch.random.fork_rng():
                for rows in torch.arange(len(memory)).split(len(x)):
                    memory.all_embeddings[rows] = acbn.normalize(self.model(self.pixels[rows]).float())
        new = torch.arange(len(x), device=x.device)
        self.pixels[(memory.written + new) % memory.size] = x           # where this batch's rows will stand


def watched(make_model, args):
    """The model, remembering the images that it was given last."""
    model = make_model(args)
    model.register_forward_pre_hook(lambda module, inputs: setattr(module, "seen", inputs[0]))
    Fresh.model, Fresh.side = model, args.image_size
    return model


def rule(*names):
    def rule(text):
        if text not in names and not 0 <= float(text) <= 1:
            raise argparse.ArgumentTypeError(f"must be a gain from 0 to 1 or one of {names}, got {text}")
        return text if text in names else float(text)
    return rule


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    moments = kinds.add_parser("moments", allow_abbrev=False)
    moments.add_argument("mean", type=rule("off", "measured"))
    moments.add_argument("std", type=rule("off", "measured", "classes"))
    fresh = kinds.add_parser("fresh", allow_abbrev=False)
    fresh.add_argument("--every", type=train.data.number(int, 1), default=1, help="steps (1)")
    args, args.flags = parser.parse_known_args(argv)
    given = train.parse_args(args.flags)        # refuses wrong flags
    if args.kind == "fresh" and given.bn != "frozen":
        parser.error("fresh needs --bn frozen: embedding anew would move batch norm's statistics")
    if args.kind == "fresh" and (given.fill_memory or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        parser.error("fresh keeps the pixels of its own steps alone: one process, and no --fill-memory")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.kind == "moments":
        acbn.CrossBatchLoss = partial(Variant, (args.mean, args.std))
    else:
        acbn.CrossBatchLoss = partial(Fresh, args.every)
        train.make_model = partial(watched, train.make_model)
    return train.main(["--method", "xbn", *args.flags])


if __name__ == "__main__":
    main()
