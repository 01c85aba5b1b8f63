# SPDX-License-Identifier: MIT
"""The scripts of results/: python -m pytest -q results/test_results.py"""
import argparse
import json
import math
import re
import shlex
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the scripts are one folder up
import acbn  # noqa: E402
import bench  # noqa: E402
import data  # noqa: E402
import draw  # noqa: E402
import eval as evaluation  # noqa: E402
import renders  # noqa: E402
import train  # noqa: E402
import variants  # noqa: E402
from acbn import CrossBatchLoss, CrossBatchMemory  # noqa: E402
from test_acbn import (HERE, PARSERS, TINY, accept_commands, readme_block, rows,  # noqa: E402
                       same, tiny)

SCRIPTS = {"bench": bench, "draw": draw, "renders": renders, "variants": variants}


# ------------------------------------------------- all of them

@pytest.mark.parametrize("path", ["README.md", "results/README.md"])
def test_commands_of_the_readmes_are_accepted_by_the_scripts(path):
    parsers = {f"results/{name}.py": script.parse_args for name, script in SCRIPTS.items()}
    seen = accept_commands(path, {**PARSERS, **parsers})
    assert path == "README.md" or parsers.keys() <= seen


@pytest.mark.parametrize("name, script", SCRIPTS.items())
def test_commands_of_a_docstring_are_accepted_by_its_parser(name, script):
    lines = [line.split("   ")[0] for line in map(str.strip, script.__doc__.splitlines())]
    commands = [line for line in lines if line.startswith(f"python results/{name}.py")]
    assert commands
    for command in commands:
        script.parse_args(shlex.split(command)[2:])


def test_mistakes_end_with_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="draw.py: .*(No such file|matplotlib)"):
        draw.main(["curves", str(tmp_path / "no")])
    for module, name in ((acbn, "CrossBatchLoss"), (train, "make_model")):
        monkeypatch.setattr(module, name, getattr(module, name))        # put back afterwards
    with pytest.raises(SystemExit, match="variants.py: .*not in"):
        variants.main(["fresh", "--root", str(tmp_path), "--dataset", "sop", "--weights", "none",
                       "--device", "cpu"])


# ------------------------------------------------- the same training with another library

def losses_of_a_training(criterion, steps=200):
    """The losses (steps,) of a small training in float64, always with the same weights and batches.

    Noise keeps it hard: for a batch with a single mined pair of each kind the other library's loss
    is 0.
    """
    split, g = data.synthetic(classes=40, max_images=6).train, torch.Generator().manual_seed(0)
    images = data.Images(split, 8, "none")
    x = torch.stack([images[i][0] for i in range(len(images))]).double() / 255      # (N, 3, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 96), nn.BatchNorm1d(96), nn.ReLU(),
                            nn.Linear(96, 32)).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    sampler, losses = data.ClassBalancedSampler(split.labels, 32), []
    while len(losses) < steps:
        sampler.set_epoch(len(losses))
        for batch in sampler:
            noise = torch.randn(len(batch), 3, 8, 8, generator=g, dtype=x.dtype)    # (B, 3, 8, 8)
            loss = criterion(net(x[batch] + 0.2 * noise), split.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses[:steps], dtype=torch.float64)


@pytest.mark.parametrize("loss", ["ms", "supcon"])
@pytest.mark.parametrize("method", ["none", "xbm"])
def test_training_equals_pytorch_metric_learning_step_by_step(method, loss):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses, miners
    ours, theirs, miner = {
        "ms": (acbn.multi_similarity_loss, losses.MultiSimilarityLoss(2, 50, 0.5),
               miners.MultiSimilarityMiner(0.1)),
        "supcon": (acbn.mined_supcon_loss, losses.SupConLoss(0.1),
                   miners.PairMarginMiner(0.2, 0.8))}[loss]
    peer = {"none": lambda z, y: theirs(z, y, miner(z, y)),
            "xbm": losses.CrossBatchMemory(theirs, 32, memory_size=100, miner=miner)}[method]
    a = losses_of_a_training(CrossBatchLoss(32, 100, method, ours).double())
    b = losses_of_a_training(peer)
    assert (a - b).abs().max() < 1e-12 and a[-20:].mean() < 0.9 * a[:20].mean()


# ------------------------------------------------- results/bench.py

@pytest.mark.parametrize("name, lines", [("loader", 5), ("gpu", len(bench.JOBS) + 2)])
def test_bench_of_steps_and_loaders_runs_small_on_a_cpu(name, lines, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main([name, "--small"])
    told = re.findall(r"^\| .* \| (\d\S*) \|.* (\d\S*) \|$|^\| \d \| (\S+) \|$",
                      capsys.readouterr().out, re.M)
    figures = [float(figure) for line in told for figure in line if figure]
    assert len(told) == lines and all(0 < figure < math.inf for figure in figures)
    if name == "gpu":
        with pytest.raises(SystemExit, match="bench.py: gpu: there is no CUDA device here"):
            bench.main(["gpu"])


def test_bench_takes_steps_beside_a_full_memory():
    criterion, step = bench.plain_step(bench.Job(rows=4000).small(), "cpu")
    full = criterion.memory.embeddings.clone()
    step(torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) // 4)
    assert len(full) == len(criterion.memory) == 40
    assert not torch.isclose(full, criterion.memory.embeddings).all(1).any()    # all adapted


def test_bench_freezes_batch_norm_where_the_job_says_so(monkeypatch):
    made, encoder = [], evaluation.Encoder
    monkeypatch.setattr(evaluation, "Encoder", lambda *a: made.append(encoder(*a)) or made[-1])
    for frozen in (False, True):
        _, step = bench.plain_step(bench.Job(frozen_bn=frozen).small(), "cpu")
        step(torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) // 4)
    assert [model.backbone[1].num_batches_tracked.item() for model in made] == [1, 0]


# ------------------------------------------------- results/draw.py

def keep_log(path, seed=0, last=2, recall=0.5, speeds=(9, 9, 9, 9), memory=(0, 0, 0, 0),
             epoch_loss=0.1, negatives=(0, 0, 0, 0), **settings):
    """A log as results/ keeps them, of a run that scores its first and last epoch alone."""
    records = [{"epoch": e, "images_per_second": speeds[e], "memory": memory[e],
                "loss": epoch_loss, "negatives_mined": negatives[e]} for e in range(last + 1)]
    for record in records[0], records[-1]:
        record |= {"recall@1": recall, "map@r": 0.2}
    records[0]["settings"] = {"method": "xbn", "lr": 0.1, **settings, "seed": seed}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("other, message", [
    ({"lr": 0.2}, "lr is 0.1 and 0.2"), ({"bn": "frozen"}, "bn is None and frozen"),
    ({"seed": 0}, "seed is 0 in both"), ({"last": 3}, "last epoch is 2 and 3")])
def test_draw_refuses_to_average_what_differs_by_more_than_the_seed(other, message, tmp_path):
    a, c = keep_log(tmp_path / "a-s0.jsonl"), keep_log(tmp_path / "a-s2.jsonl", seed=2)
    b = keep_log(tmp_path / "a-s1.jsonl", **{"seed": 1, **other})
    with pytest.raises(data.UserError) as caught:
        draw.read_runs([a, c, b])
    assert str(caught.value) == f"{a} and {b} cannot be averaged: {message}"


def test_draw_tells_means_and_differences_to_none_seed_by_seed(tmp_path, capsys):
    recalls = {"none": (0.3, 0.5), "xbn": (0.32, 0.53), "late": (0.4, 0.4), "half": (0.4,)}
    logs = [keep_log(tmp_path / f"{name}-s{seed}.jsonl", seed=seed + 2 * (name == "half"),
                     recall=recall, method="none" if name == "none" else "xbn",
                     lr=0.2 if name == "late" else 0.1, warmup_steps=9 * (name == "xbn"))
            for name, several in recalls.items() for seed, recall in enumerate(several)]
    draw.tell(draw.read_runs(logs))
    assert capsys.readouterr().out.splitlines() == [
        "none  runs 2  recall@1 40.00 ± 14.14  map@r 20.00 ± 0.00",
        "xbn  runs 2  recall@1 42.50 ± 14.85  minus none +2.50 ± 0.71  map@r 20.00 ± 0.00  "
        "minus none +0.00 ± 0.00",
        "late  runs 2  recall@1 40.00 ± 0.00  map@r 20.00 ± 0.00",      # its rate is another
        "half  runs 1  recall@1 40.00  map@r 20.00"]                    # its seed is another
    (tmp_path / "c.jsonl").write_text(json.dumps({"epoch": 0, "recall@1": 0.5}) + "\n")
    with pytest.raises(data.UserError, match="c.jsonl: not the log of a run"):
        draw.read_runs([tmp_path / "c.jsonl"])


def test_draw_tells_the_scores_of_held_out_classes_first(capsys):
    runs = [[{"epoch": 0, "val_recall@1": v, "recall@1": 0.5, "map@r": 0.2,
              "settings": {"method": "none", "seed": k}}] for k, v in enumerate((0.4, 0.6))]
    draw.tell({"a": runs})
    assert capsys.readouterr().out.split("  ")[2] == "val_recall@1 50.00 ± 14.14"


def test_draw_takes_the_time_after_the_start_of_the_memory(tmp_path):
    def seconds(**log):
        return draw.seconds(*draw.read_runs([keep_log(tmp_path / "a.jsonl", last=3,
                                                      speeds=(None, 50, 40, 25), **log)]).values())
    assert seconds(memory=(0, 0, 5, 9)) == [1000 / 25]      # it starts within the second epoch
    assert seconds(method="none") == [1000 / 50]
    with pytest.raises(data.UserError, match="no epoch after"):
        seconds(memory=(0, 0, 0, 9))


def test_draw_tells_whether_the_order_of_the_means_changes():
    def group(*curves):
        return [[{"recall@1": v} for v in curve] for curve in curves]
    flat = group([0, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4])
    rising = group([0, 0.1, 0.1, 0.2, 0.3, 0.5, 0.6])
    late = group([0, 0.1, 0.3, 0.4, 0.4, 0.45, 0.5], [0, 0.3, 0.5, 0.6, 0.5, 0.45, 0.5])
    tell = draw.order_of_means
    told = tell({"flat": flat, "late": late})
    assert told == "order of the means of Recall@1 over epochs 4 to 6: does not change"
    told = tell({"flat": flat, "late": late, "rising": rising})
    assert told.endswith("changes between flat and rising, late and rising")


def test_draw_pairs_each_late_xbn_with_the_none_of_its_settings(tmp_path, capsys):
    pytest.importorskip("matplotlib")

    def keep(name, recall, memory=(0, 0, 0, 5), **log):
        return str(keep_log(tmp_path / f"{name}.jsonl", recall=recall, memory=memory, **{
            "last": 3, "batch_size": 16, "loss": "supcon", "weights": "none", **log}))

    def plain(name, recall, negatives=(0, 99, 8, 1), **log):
        return keep(name, recall, (0, 0, 0, 0), negatives=negatives, method="none", **log)
    logs = [keep("xbn-s0", 0.53, epoch_loss=0.3), keep("xbn-s1", 0.56, seed=1),
            plain("none-s1", 0.51, seed=1, warmup_steps=9), plain("none-s0", 0.5, epoch_loss=0.3),
            plain("machine", 0.4, (0, 9, 9, 9)),                # its first epoch is another
            keep("tuned", 0.45, weights="imagenet"),
            plain("tuned-none", 0.5, (0, 9, 80, 9), weights="imagenet", sync_bn=True),
            keep("early", 0.9, (0, 5, 5, 5)), keep("never", 0.9, (0, 0, 0, 0)),
            keep("lonely", 0.9, lr=0.2), keep("other", 0.9, variant="drift"),
            keep("short", 0.9, (0, 0, 5), last=2), keep("xbm", 0.9, method="xbm")]
    draw.main(["pays", *logs, "--out", str(tmp_path / "p.png")])
    loss, folder = "paper’s loss", tmp_path.name
    assert capsys.readouterr().out.splitlines()[:-1] == [
        f"{folder}/xbn  {loss}, from scratch  runs 2  negatives 0.50  gain +4.00 ± 1.41",
        f"{folder}/tuned  {loss}, fine-tuned  runs 1  negatives 5.00  gain -5.00  contradicts"]


def test_draw_shows_the_worst_queries_first_with_their_neighbours():
    y = torch.arange(5).repeat_interleave(3)
    z = F.one_hot(y, 5).float()
    z[3] = -z[3]                            # the fourth query is nearest to nothing of its class
    (q, rank, near, first), second = draw.worst_queries((z, y), (None, None), 2)
    assert q == 3 and rank == 13 and len(near) == 7 and first == (4, -1.0) and 3 not in dict(near)
    assert near[0][1] == 0.0 and second[0] == 0 and second[1] == 1


def test_draw_names_a_class_by_its_folder_where_that_holds_it_alone():
    split = data.make_split([("d/cup/1.jpg", 3), ("d/cup/side/2.jpg", 3), ("d/cup_b/1.jpg", 4),
                             ("d/a cup with a saucer/1.jpg", 5), ("d/all/1.jpg", 6),
                             ("d/all/2.jpg", 7)])
    assert [draw.class_name(split, i) for i in range(6)] == [
        "cup", "cup", "cup_b", "a cup with a …", "class 6", "class 7"]
    drawn = data.synthetic(classes=2).query
    assert draw.class_name(drawn, 0) == f"class {drawn.labels[0]}"


def test_draw_makes_every_picture_from_new_runs_and_from_kept_logs(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "p.png"
    for seed in (0, 1):
        tiny(tmp_path / f"a-s{seed}", "--seed", str(seed))
    runs = [str(tmp_path / "a-s0"), str(tmp_path / "a-s1")]
    old = [str(path) for path in sorted((HERE / "results/logs/default").glob("*.jsonl"))]
    for command in (["curves", *runs], ["curves", *old, *runs], ["overview", *runs],
                    ["against", "batch_size", "--runs", *runs, "--time"],
                    ["overview", str(keep_log(tmp_path / "long.jsonl", last=3))],
                    ["sheet", str(tmp_path / "a-s0" / "best.pt"), "--show", "2", "--device", "cpu"],
                    ["idea", "--steps", "6", "--rows", "32", *TINY]):
        draw.main([*command, "--out", str(out)])
        assert Image.open(out).size[0] >= 500
        out.unlink()
    for command, message in (
            (["idea", "--rows", "8", *TINY], "--rows 8 is less than --batch-size 16"),
            (["against", "colour", "--runs", *runs], "the runs have no such setting"),
            (["pays", *runs], "no xbn that starts after the first epoch")):
        with pytest.raises(SystemExit, match=message):
            draw.main([*command, "--out", str(out)])


# ------------------------------------------------- results/variants.py

@pytest.mark.parametrize("words, world", [("fresh --fill-memory", "1"),
                                          ("drift --rows batch --scale no", "2")])
def test_variants_refuse_images_that_they_have_not_seen(words, world, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit):
        variants.parse_args(words.split())
    assert "it takes one process, and no --fill-memory" in capsys.readouterr().err


@pytest.fixture
def with_images(monkeypatch):
    """(make, step): makes a criterion of variants.py, and takes a step of its network."""
    g = torch.Generator().manual_seed(0)
    args = argparse.Namespace(image_size=16, device="cpu", amp="off", seed=3)
    monkeypatch.setattr(variants.WithImages, "args", args)
    monkeypatch.setattr(variants.WithImages, "model", None)
    net = evaluation.Encoder("conv4", 5)
    net.head = nn.Sequential(nn.Dropout(0.2), net.head)
    variants.watched(lambda args: net, args)

    def make(kind, **options):
        return getattr(variants, kind)(5, 20, "xbn", **options)

    def step(criterion, rate=0.02):
        x = torch.randint(256, (8, 3, 16, 16), generator=g, dtype=torch.uint8)
        criterion(net(x), torch.arange(8) // 4)
        with torch.no_grad():
            for p in net.parameters():
                p += rate * torch.randn(p.shape, generator=g) * p.abs().mean()
    return make, step


@pytest.mark.parametrize("rows", ["batch", "random"])
@pytest.mark.parametrize("scale", ["yes", "no"])
def test_drift_moves_the_rows_as_a_float64_twin_says(rows, scale, with_images, monkeypatch):
    make, step = with_images
    criterion = make("Drift", rows=rows, k=6, scale=scale)
    embed, embedded, chosen = criterion.embed, [], set()

    def watch(slots):
        embedded.append((slots.tolist(), embed(slots).double().numpy()))
        return torch.from_numpy(embedded[-1][1]).float()
    monkeypatch.setattr(criterion, "embed", watch)
    step(criterion)                                             # there is nothing to move yet
    for _ in range(5):
        memory, written = criterion.memory.embeddings.double().numpy(), criterion.memory.written
        step(criterion)
        slots, now = embedded.pop()
        chosen.add(tuple(slots))
        assert rows == "random" or slots == [i % 20 for i in range(written - 8, written)]
        assert len(set(slots)) == len(slots) == (6 if rows == "random" else 8)
        old = memory[slots]
        A = now.std(0, ddof=1) / old.std(0, ddof=1) if scale == "yes" else 1
        expected = A * (memory - old.mean(0)) + now.mean(0)
        if rows == "random":
            expected[slots] = now
        kept = sorted(set(range(len(memory))) - {i % 20 for i in range(written, written + 8)})
        found = criterion.memory.embeddings.numpy()
        np.testing.assert_allclose(found[kept], expected[kept], atol=1e-5)
    assert isinstance(criterion.K, float) and not embedded and len(chosen) == 5


@pytest.mark.parametrize("kind, options", [("Fresh", {"every": 1}),
                                           ("Drift", {"rows": "batch", "k": 4, "scale": "yes"}),
                                           ("Drift", {"rows": "random", "k": 4, "scale": "no"})])
def test_embedding_again_leaves_batch_norm_and_random_numbers_alone(kind, options, with_images):
    make, step = with_images
    criterion = make(kind, **options)
    step(criterion)
    z, before = torch.randn(8, 5), [b.clone() for b in criterion.model.buffers()]
    state, stored = torch.get_rng_state(), criterion.memory.embeddings.clone()
    criterion.adapt(acbn.normalize(z))
    assert all(map(torch.equal, before, criterion.model.buffers())) and criterion.model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(stored, criterion.memory.embeddings)         # something was embedded


def test_images_stand_beside_their_rows(with_images):
    make, step = with_images
    criterion = make("Fresh", every=100)
    criterion.model.eval()
    for _ in range(4):                  # more rows than the memory has
        step(criterion, rate=0)
    torch.testing.assert_close(criterion.embed(torch.arange(20)), criterion.memory.embeddings)


def test_fresh_memory_holds_what_the_present_network_makes_of_its_images(with_images):
    make, step = with_images
    criterion = make("Fresh", every=2)
    criterion.model.eval()              # no dropout, and batch norm does not see the batch
    for k in range(7):
        stored, n = criterion.memory.embeddings.clone(), len(criterion.memory)
        with torch.no_grad():
            fresh = acbn.normalize(criterion.model(criterion.pixels[:n])) if n else stored
        criterion.move(8)
        torch.testing.assert_close(criterion.memory.embeddings, stored if k % 2 else fresh,
                                   rtol=0, atol=1e-5)
        step(criterion)
    assert not torch.allclose(stored, fresh, atol=1e-3)


@pytest.mark.parametrize("words", ["fresh", "drift --rows random --k 4 --scale yes"])
def test_variants_resume_with_the_images_of_their_rows(words, tmp_path, monkeypatch):
    def run(out, *flags):
        with monkeypatch.context() as patch:                            # main puts its own there
            patch.setattr(acbn, "CrossBatchLoss", CrossBatchLoss)
            patch.setattr(train, "make_model", train.make_model)
            variants.main([*words.split(), *TINY, "--memory-ratio", "3", *flags,
                           "--out", str(tmp_path / out)])
    run("whole")
    run("cut", "--epochs", "1")
    run("cut")
    a, b = (evaluation.load_file(tmp_path / out / "checkpoint.pt") for out in ("whole", "cut"))
    assert same(a["model"], b["model"]) and same(a["criterion"], b["criterion"])
    assert (a["criterion"]["pixels"].any()
            and a["records"][0]["settings"]["variant"]["kind"] in words)
    words = "fresh --every 2"
    with pytest.raises(SystemExit, match="was made with --variant .*, now it is .*'every': 2"):
        run("cut")


def test_readme_memory_that_follows_the_batch_before_moves_as_the_variant_that_was_measured():
    scope, memory = {}, CrossBatchMemory(8, 24)
    exec(readme_block("def loss_of(queries") + readme_block("def follow"), scope)
    for k in range(4):
        z = rows(12, 8, seed=k, dtype=torch.float32)
        z[:, 3 + k] = 0.1                           # a dimension that is constant in one batch
        if k:
            before = memory.embeddings[own]
            moved = variants.moved(memory.embeddings, before, z, scale=True)
            scope["follow"](memory, own, z)
            torch.testing.assert_close(memory.embeddings, moved)
        own = memory.enqueue(z, torch.arange(12))


# ------------------------------------------------- results/renders.py

BOX = (1, 2, 3)
FOUR = [[(255, 0, 0, 255), (0, 0, 0, 0)], [(0, 255, 0, 255), (255, 255, 0, 255)]]  # with a hole
FACES = [[1, 2, 4, 3], [5, 6, 8, 7], [1, 2, 6, 5], [3, 4, 8, 7], [1, 3, 7, 5], [2, 4, 8, 6]]


def make_archive(path, materials):
    """A library of boxes, with a material each, and a blue photograph and a texture."""
    corners = [(x, y, z) for x in (0, BOX[0]) for y in (0, BOX[1]) for z in (0, BOX[2])]
    box = [f"v {x} {y} {z}" for x, y, z in corners] + ["vt 0.1 0.1", "vt 0.1 0.9", "vt 0.4 0.9"]
    box += ["usemtl paint"] + ["f " + " ".join(f"{c}/{1 + k % 3}" for k, c in enumerate(face))
                               for face in FACES]
    catalogue = []
    with ZipFile(path, "w") as archive:
        for n, (name, lines) in enumerate(materials.items(), 1):
            archive.writestr(f"a/{name}.obj", "\n".join([f"mtllib {name}.mtl", *box]))
            archive.writestr(f"a/{name}.mtl", "\n".join(["newmtl paint", *lines]))
            catalogue += [f"model#{n}=/a/{name}.obj", f"category#{n}=Boxes {n % 2}"]
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(catalogue))
        with archive.open("a/sky.jpg", "w") as file:
            Image.new("RGB", (200, 160), (20, 20, 200)).save(file, "JPEG")
        with archive.open("a/four.png", "w") as file:
            Image.fromarray(np.uint8(FOUR)).resize((40, 40), Image.NEAREST).save(file, "PNG")


def test_renders_make_a_set_that_is_read_and_shows_the_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(renders, "POINTS", 20_000)
    red = ["Kd 0.9 0.05 0.05"]
    (tmp_path / "in").mkdir()
    make_archive(tmp_path / "in/boxes.sh3f", {
        "red": red, "lost": [*red, "map_Kd none.jpg"], "glass": [*red, "d 0.1"],
        "plain": [*red, "d 1"], "picture": ["map_Kd four.png"]})
    for run in ("one", "two"):
        renders.main([str(tmp_path / "in"), str(tmp_path / run)])
    assert "a/glass.obj: left out" in capsys.readouterr().out
    splits = data.load("sop", tmp_path / "one", allow_partial=True)
    assert [s.labels.bincount().tolist() for s in splits[:2]] == [[0, 6, 6], [0, 0, 0, 6, 6]]
    for path in map(Path, splits.train.images + splits.query.images):
        r, g, b = np.moveaxis(np.asarray(Image.open(path), float), 2, 0)    # (96, 96) each
        shown = (r > 1.5 * b) & ((r > 1.5 * g) | (g > 1.5 * b))             # no ground is so
        assert shown.mean() > 0.08 and not shown.all(), path
    one, two = ({path.relative_to(tmp_path / run): path.read_bytes()
                 for path in (tmp_path / run).rglob("*.*")} for run in ("one", "two"))
    assert one == two and len(one) == 24 + 3


def test_points_are_even_on_the_faces_and_normals_stand_on_them(tmp_path):
    make_archive(tmp_path / "boxes.sh3f", {"box": []})
    corners, _, _, _ = renders.read_model(ZipFile(tmp_path / "boxes.sh3f"), "a/box.obj")
    face, weights, normal = renders.scatter(corners, np.random.default_rng(0))
    points, n = sum(w * corners[face, k] for k, w in enumerate(weights)), renders.POINTS
    areas = np.array([BOX[1] * BOX[2], BOX[0] * BOX[2], BOX[0] * BOX[1]])
    off = np.minimum(np.abs(points), np.abs(points - BOX))              # (N, 3) from the planes
    assert len(corners) == 12 and (points > -1e-12).all() and (points < np.add(BOX, 1e-12)).all()
    for axis, share in enumerate(areas / areas.sum()):
        here = np.abs(normal[:, axis]) == 1                             # (N,)
        assert (off[here, axis] < 1e-12).all()
        assert abs(here.sum() - n * share) < 5 * np.sqrt(n * share * (1 - share))
        for other in {0, 1, 2} - {axis}:                                # even within a face
            low = (points[here, other] < BOX[other] / 3).sum()
            assert abs(low - here.sum() / 3) < 5 * np.sqrt(here.sum() * 2 / 9)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1)


def test_colours_come_from_the_right_place_of_the_texture(tmp_path):
    make_archive(tmp_path / "boxes.sh3f", {})
    archive, material = ZipFile(tmp_path / "boxes.sh3f"), {"map_kd": ["four.png"], "kd": "123"}
    places = np.array([[0.25, 0.75], [0.75, 0.75], [-0.75, 3.25], [5.75, 0.25]])    # y is up
    found = renders.colours(archive, "a/box.obj", material, places)
    np.testing.assert_array_equal(found, np.reshape(FOUR, (4, 4)) / 255)
    places[0] = np.nan
    found = renders.colours(archive, "a/box.obj", material, places)
    np.testing.assert_array_equal(found, [1, 2, 3, 1])


def test_a_folder_without_archives_ends_with_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"^renders.py: .*no archive \*.sh3f in it or below$"):
        renders.main([str(tmp_path / "no"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
