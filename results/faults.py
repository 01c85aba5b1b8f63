# SPDX-License-Identifier: MIT
"""The campaigns of faults that are too long for the tests; writes results/reliability.md as it goes.

    python results/faults.py --kills 20
"""
import argparse
import contextlib
import io
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # the scripts are one folder up
from data import number  # noqa: E402
from eval import load_file  # noqa: E402
try:
    import test_acbn as tests  # noqa: E402
except ImportError as error:
    sys.exit(f"faults.py needs what the tests need: {error}")

REPORT = Path(__file__).resolve().parent / "reliability.md"


class Campaigns:
    """Each campaign asserts what must hold and returns its outcome in words; files go to a folder `root`."""

    def __init__(self, root, kills, seed=0):
        self.root, self.kills, self.g = root, kills, random.Random(seed)

    def as_never_killed(self, name):
        tests.tiny(self.root / name, *tests.KILLED)
        if not (self.root / "whole").exists():
            tests.tiny(self.root / "whole", *tests.KILLED)
        a, b = (load_file(self.root / n / "checkpoint.pt") for n in (name, "whole"))
        assert tests.same(a, b) and tests.whole_epochs(self.root / name) == len(b["records"])
        return "every file whole or the previous one; in the end the same bits as a run never killed"

    def killed_writing(self):
        for _ in range(self.kills):
            if tests.killed_while_writing(self.root / "writing", self.g.randrange(1, 13)) == 0:
                shutil.rmtree(self.root / "writing")            # it came to its end: from the start
        return self.as_never_killed("writing")

    def ended(self, numbers, name, flags):
        """Signals in turn, at random moments of training; returns the longest time a run took to end."""
        worst = 0
        for k in range(self.kills):
            number = numbers[k % len(numbers)]
            code, seconds, words = tests.interrupted(self.root / name, number, self.g.uniform(0, 1.5), flags)
            assert code in (0, -number) and "Traceback" not in words, words
            if code == 0:
                shutil.rmtree(self.root / name)
            tests.whole_epochs(self.root / name)
            worst = max(worst, seconds)
        return worst

    def killed(self):
        self.ended([signal.SIGKILL], "killed", tests.KILLED)
        return self.as_never_killed("killed")

    def told_to_end(self):
        worst = self.ended([signal.SIGTERM, signal.SIGINT], "told", tests.KILLED)
        return f"ended after {worst:.1f} s at most, no traceback; " + self.as_never_killed("told")

    def torn(self):
        refused = tests.torn_checkpoints(self.root, 1000)
        return f"a sentence for all 500 cut off and {refused - 500} of 500 with junk"

    def fuzzed(self, name):
        loaded = tests.fuzz(name, self.root / name, 2500)
        return f"{loaded} loaded, with the right counts; {2500 - loaded} times a sentence"


def main(argv=None):
    args = parse_args(argv)
    command = f"`python results/faults.py --kills {args.kills}`, torch {torch.__version__}"
    lines = ["# Reliability", "", f"{command}; a row stops at its first failure.", "",
             "| fault | tried | outcome |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as root:
        c = Campaigns(Path(root), args.kills)
        for fault, tried, campaign in (
                ("SIGKILL while a file is written: half of it, before and after its renaming", args.kills,
                 c.killed_writing),
                ("SIGKILL at a random moment of training, a worker reading", args.kills, c.killed),
                ("SIGTERM or Ctrl-C at a random moment, a worker reading", args.kills, c.told_to_end),
                ("checkpoint cut off, or 200 bytes of junk in it", 1000, c.torn),
                *((f"mutated lists of {name}", 2500, partial(c.fuzzed, name)) for name in tests.FUZZED)):
            start = time.perf_counter()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    outcome = campaign()
            except Exception as error:
                outcome = f"**failed**: {type(error).__name__}: {error}"
            lines.append(f"| {fault} | {tried} | {outcome} |")
            print(lines[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
            REPORT.write_text("\n".join(lines) + "\n")
    return any("**failed**" in line for line in lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=number(int, 1), default=20, help="how often each signal is sent (20)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
