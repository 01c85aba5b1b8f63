# SPDX-License-Identifier: MIT
"""Trainings that keep the memory fresh in another way than the paper's.

    python results/variants.py fresh --every 1 --memory-ratio 0.1 --out runs/fresh
        The bound: every so many steps the network embeds all stored images again. That costs a
        memory's forward passes.
    python results/variants.py drift --rows random --k 16 --scale yes --out runs/drift
        The memory moves by the drift of images that the network embeds again: those of the batch
        before, or k random ones, which also take their fresh embeddings. --scale no: shifted alone.

All other flags are train.py's. The stored images, augmented as they were, are kept on the device
and in the checkpoint. Batch norm works on the images that are embedded together, as in training.
"""
import argparse
import os
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the scripts are one folder up
import acbn  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402


# ------------------------------------------------- the images of the rows, embedded again

class WithImages(acbn.CrossBatchLoss):
    """A memory beside which the images of its rows are kept, so that they can be embedded again."""

    model = args = None         # set by `watched`: the network, and train.py's flags

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        side = self.args.image_size
        self.register_buffer("pixels", torch.zeros(self.memory.size, 3, side, side,
                                                   dtype=torch.uint8))              # (M, 3, S, S)

    def adapt(self, z):
        x, memory = self.model.seen, self.memory                                    # (B, 3, S, S)
        if len(memory):
            self.move(len(x))
        new = torch.arange(memory.written, memory.written + len(x))
        self.pixels[new % memory.size] = x              # the slots that this batch's rows will take

    def embed(self, slots):
        """Embeddings (n, D) of the rows in these slots (n,) by the network as it is now.

        This pass runs between a forward and its backward, when nothing may write to batch norm's
        buffers, not even to restore them (`train.without_trace`). So it works on copies of them.
        """
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        amp = data.autocast(self.args.device, self.args.amp)
        with torch.no_grad(), torch.random.fork_rng(), amp:             # fork_rng: for dropout
            z = torch.func.functional_call(self.model, buffers, (self.pixels[slots],))      # (n, D)
        return acbn.normalize(z.float())


class Fresh(WithImages):
    """Every so many steps all rows are embedded again."""

    def __init__(self, *args, every, **settings):
        super().__init__(*args, **settings)
        self.every = every

    def move(self, B):
        if (self.step - self.warmup_steps) % self.every == 0:
            for slots in torch.arange(len(self.memory)).split(B):                   # (B,)
                self.memory.embeddings[slots] = self.embed(slots)


class Drift(WithImages):
    """All rows move as the rows of some images did between their storing and now: z' = A z + b."""

    def __init__(self, *args, rows, k, scale, **settings):
        super().__init__(*args, **settings)
        self.random, self.k, self.scale = rows == "random", k, scale == "yes"

    def move(self, B):
        memory = self.memory
        if self.random:
            # Drawn from a seed that the step gives, so that a resumed run draws the same.
            g = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)
            slots = torch.randperm(len(memory), generator=g)[:self.k]               # (k,)
        else:
            slots = torch.arange(memory.written - B, memory.written) % memory.size  # (B,)
        before, now = memory.embeddings[slots], self.embed(slots)       # (n, D) as stored, fresh
        memory.embeddings.copy_(moved(memory.embeddings, before, now, self.scale))
        if self.random:
            memory.embeddings[slots] = now


def moved(memory, before, now, scale):
    """The memory (M, D), moved as the moments of some images moved, before and now (n, D): (M, D).

    scale: also scaled, but where one of the two deviations is 0.
    """
    (mean, std), (now_mean, now_std) = acbn.moments(before), acbn.moments(now)      # (D,) each
    constant = (std == 0) | (now_std == 0)                                          # (D,)
    A = now_std.masked_fill(constant, 1) / std.masked_fill(constant, 1) if scale else 1.0   # (D,)
    return A * memory + (now_mean - A * mean)


def watched(make_model, args):
    """The model, which remembers the images that it was given last."""
    model = make_model(args)
    model.register_forward_pre_hook(lambda module, inputs: setattr(module, "seen", inputs[0]))
    WithImages.model, WithImages.args = model, args
    return model


# ------------------------------------------------- python results/variants.py

KINDS = {"fresh": Fresh, "drift": Drift}


def parse_args(argv=None):
    """(train.py's flags, with the variant among them, and what makes its criterion)."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    add = {kind: kinds.add_parser(kind, allow_abbrev=False).add_argument for kind in KINDS}
    add["fresh"]("--every", type=data.number(int, 1), default=1, help="steps (1)")
    add["drift"]("--rows", choices=("batch", "random"), required=True)
    add["drift"]("--k", type=data.number(int, 1), default=16, help="random rows a step (16)")
    add["drift"]("--scale", choices=("yes", "no"), required=True)
    given, flags = parser.parse_known_args(argv)
    args = train.parse_args([*flags, "--method", "xbn"])
    if args.fill_memory or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error(f"{given.kind} knows the images of its own steps alone: it takes one process, "
                     "and no --fill-memory")
    args.variant = vars(given)          # in the log; a run is not resumed as another variant
    options = {name: value for name, value in vars(given).items() if name != "kind"}
    return args, partial(KINDS[given.kind], **options)


def main(argv=None):
    args, acbn.CrossBatchLoss = parse_args(argv)
    train.make_model = partial(watched, train.make_model)
    try:
        return train.train(args)
    except (data.UserError, OSError) as error:
        sys.exit(f"variants.py: {data.sentence(error)}")


if __name__ == "__main__":
    main()
