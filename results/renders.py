# SPDX-License-Identifier: MIT
"""Renders of 3D models of furniture, in the layout of Stanford Online Products.

    apt-get update && apt-get download sweethome3d-furniture        Debian's, version 1.8
    dpkg-deb -x sweethome3d-furniture_*.deb furniture
    python results/renders.py furniture data/furniture

`--dataset sop --root data/furniture --allow-partial` reads the result. A class is a model, and its
super class is the model's category. An image shows random points on the model's surface, with a
camera, a light and a background of its own. The place of a model in the list is the seed of its
images, so the number of processes does not matter. The processor does, for a few pixels: numpy's
sort with AVX-512 puts points of equal depth in another order. Needs numpy 2 and pillow.
"""
import argparse
import random
import re
import sys
from contextlib import suppress
from functools import lru_cache
from itertools import islice, pairwise
from multiprocessing import Pool
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image

SIZE, VIEWS, POINTS = 96, 6, 250_000    # pixels an image, images a class, points on a model
K = 2 * SIZE                            # pixels a view before it is made smaller, for smooth edges


# ------------------------------------------------- the archives

def catalogue(archive):
    """[(archive, model, category)]: the models of an archive, sorted by their names in it."""
    text = ZipFile(archive).read("PluginFurnitureCatalog.properties").decode("latin-1")
    path, category = (dict(re.findall(rf"^{key}#(\d+)[ \t]*=[ \t]*/?(.*\S)", text, re.M))
                      for key in ("model", "category"))             # each {number: value}
    return sorted({(archive, path[n], category[n]) for n in path})


@lru_cache                              # each process reads them once
def backgrounds(archives):
    """60 photographs (H, W, 3) uint8 among the models' textures, or as many as there are."""
    def photographs():
        for archive in map(ZipFile, archives):
            for name in sorted(archive.namelist()):
                if name.lower().endswith(".jpg"):
                    image = Image.open(archive.open(name)).convert("RGB")
                    image.thumbnail((512, 512))
                    if min(image.size) >= 160:
                        yield np.asarray(image)
    return list(islice(photographs(), 0, 360, 6))


def words(archive, name):
    """The lines of a text file, each split into its words."""
    return filter(None, map(str.split, archive.read(name).decode("latin-1").splitlines()))


def read_materials(archive, name):
    """{name: {keyword: its words}} of the materials of an MTL file."""
    found, material = {}, {}
    for keyword, *rest in words(archive, name):
        if keyword == "newmtl":
            material = found.setdefault(" ".join(rest), {})
        material[keyword.lower()] = rest
    return found


def read_model(archive, name):
    """The triangles of an OBJ file: corners (F, 3, 3), their places in the texture (F, 3, 2), NaN
    where none is given, the materials' names (F,), and the materials by name. Glass is left out.
    """
    folder, v, vt, faces, owner = name.rpartition("/")[0], [], [], [], []
    current, materials = "", {"": {}}
    for keyword, *rest in words(archive, name):
        if keyword == "v":
            v.append([float(x) for x in rest[:3]])
        elif keyword == "vt":
            vt.append([float(x) for x in rest[:2]])
        elif keyword == "mtllib":
            with suppress(KeyError):                    # one model of the package has no such file
                materials |= read_materials(archive, f"{folder}/{' '.join(rest)}")
        elif keyword == "usemtl":
            current = " ".join(rest)
            materials.setdefault(current, {})           # some are not in the file either
        elif keyword == "f" and float(materials[current].get("d", ["1"])[-1]) > 0.3:
            corners = [(corner + "/").split("/")[:2] for corner in rest]    # position/place/normal
            corners = [(int(at) - 1, int(spot or 0) - 1) for at, spot in corners]
            fan = [(corners[0], *pair) for pair in pairwise(corners[1:])]
            faces += fan
            owner += [current] * len(fan)
    at, spot = np.array(faces, int).reshape(-1, 3, 2).transpose(2, 0, 1)            # (F, 3) each
    vt.append([np.nan, np.nan])                         # the place -1
    return np.array(v)[at], np.array(vt)[spot], np.array(owner, object), materials


# ------------------------------------------------- points on the surface

def scatter(corners, rng):
    """POINTS points, spread evenly over triangles (F, 3, 3): each point's triangle (N,), the
    weights of its three corners, each (N, 1), and its normal (N, 3).
    """
    a, b, c = corners.swapaxes(0, 1)                                                # each (F, 3)
    normal = np.cross(b - a, c - a)                                                 # (F, 3)
    area = np.linalg.norm(normal, axis=1)                                           # (F,) doubled
    face = rng.choice(len(area), POINTS, p=area / area.sum())                       # (N,)
    s, t = np.sqrt(rng.random((POINTS, 1))), rng.random((POINTS, 1))                # (N, 1)
    return face, (1 - s, s * (1 - t), s * t), normal[face] / area[face, None]


def colours(archive, name, material, places):
    """(n, 4) red, green, blue and opacity, 0..1, of a material at places (n, 2) of its texture."""
    texture = f"{name.rpartition('/')[0]}/{material.get('map_kd', ['(none)'])[-1]}"
    if texture not in archive.NameToInfo or np.isnan(places).any():     # the package lacks some
        return np.array([*map(float, material.get("kd", [0.7] * 3)[:3]), 1])        # (4,)
    image = Image.open(archive.open(texture)).convert("RGBA")
    image.thumbnail((1024, 1024))
    x, y = (places % 1).T                                                           # (n,) each
    rows, columns = (1 - y) * (image.height - 1), x * (image.width - 1)
    return np.asarray(image, np.float32)[rows.astype(int), columns.astype(int)] / 255


def surface(archive, name, rng):
    """Points on a model: positions, unit normals and colours, each (N, 3) float32; None if all of
    it is glass.
    """
    corners, places, owner, materials = read_model(archive, name)
    if not len(owner):
        return None
    face, weights, normal = scatter(corners, rng)
    points, places = (sum(w * given[face, k] for k, w in enumerate(weights))        # (N, 3), (N, 2)
                      for given in (corners, places))
    owner, rgba = owner[face], np.empty((POINTS, 4), np.float32)
    for material in set(owner):
        mine = owner == material                                                    # (N,)
        rgba[mine] = colours(archive, name, materials[material], places[mine])
    solid = rgba[:, 3] >= 0.5                           # the holes of leaves and the like are not
    return points[solid].astype(np.float32), normal[solid].astype(np.float32), rgba[solid, :3]


# ------------------------------------------------- a view

def rotation(turn, tilt, roll):
    """(3, 3): a turn about the vertical axis y, a tilt about x, and a roll about the sight z."""
    (ca, ce, cr), (sa, se, sr) = np.cos([turn, tilt, roll]), np.sin([turn, tilt, roll])
    return (np.array([[cr, sr, 0], [-sr, cr, 0], [0, 0, 1]])
            @ np.array([[1, 0, 0], [0, ce, -se], [0, se, ce]])
            @ np.array([[ca, 0, -sa], [0, 1, 0], [sa, 0, ca]]))


def project(points, rng):
    """A camera for points (N, 3): its rotation (3, 3), the way from each point to it (N, 3), and
    each point's pixel (N,), counted row by row.
    """
    R = rotation(rng.uniform(0, 2 * np.pi), *np.radians(rng.uniform((2, -8), (50, 8))))
    low, high = points.min(0), points.max(0)                                        # (3,)
    points = (points - (low + high) / 2) / np.linalg.norm(high - low) @ R.T.astype(np.float32)
    to_camera = np.float32((0, 0, rng.uniform(1.4, 2.6))) - points                  # (N, 3)
    flat = to_camera[:, :2] * np.float32((-1, 1)) / to_camera[:, 2:]                # (N, 2)
    low, high = flat.min(0), flat.max(0)                                            # (2,)
    scale = rng.uniform(0.68, 1) * K / (high - low).max()
    shift = np.float32(rng.uniform(-0.4, 0.4, 2)) * (K - scale * (high - low))
    x, y = ((flat - (low + high) / 2) * scale + K / 2 + shift).astype(np.int32).T
    return R, to_camera, y * K + x


def background(photographs, rng):
    """(K, K, 3) in 0..1: a plain ground from one grey to another, or a piece of a photograph."""
    if rng.random() < 0.55:
        grey = np.linspace(*rng.uniform(0.55, 1, 2), K)[:, None, None]              # (K, 1, 1)
        return np.clip(grey * np.ones((1, K, 1)) * (1 + rng.uniform(-0.07, 0.07, 3)), 0, 1)
    photo, side = photographs[rng.integers(len(photographs))], int(rng.integers(48, 160))
    top, left = (rng.integers(0, n - side + 1) for n in photo.shape[:2])
    piece = Image.fromarray(photo[top:top + side, left:left + side]).resize((K, K), Image.BICUBIC)
    return np.clip(np.asarray(piece) / 255 * rng.uniform(0.7, 1.1), 0, 1)


def fill(image, hit):
    """Gives the pinholes between the points the mean of the points around them. image (K, K, 3);
    hit (K, K, 1), 1: a point is there.
    """
    moves = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    near = sum(np.roll(hit, move, (0, 1)) for move in moves)                        # (K, K, 1)
    mean = sum(np.roll(image * hit, move, (0, 1)) for move in moves) / np.maximum(near, 1)
    return np.where((hit == 0) & (near >= 5), mean, image)


def view(place, normal, colour, photographs, rng):
    """An image of points, each (N, 3), from somewhere, in some light, before some background."""
    R, to_camera, pixel = project(place, rng)
    nearest, order = np.full(K * K, -1), np.argsort(-to_camera[:, 2])
    nearest[pixel[order]] = order                       # from far to near: the nearest one stays
    hit = nearest >= 0                                                              # (K * K,)
    p = nearest[hit]                                                                # (n,)
    light = rng.normal(size=3) * (1, 0.4, 0.6) + (0, 1, 0.8)                        # from above
    light /= np.linalg.norm(light)
    n = normal[p] @ R.T                                                             # (n, 3)
    n *= np.where((n * to_camera[p]).sum(1) < 0, -1, 1)[:, None]    # towards the camera
    shade = rng.uniform(0.35, 0.6) + rng.uniform(0.5, 0.8) * np.clip(n @ light, 0, 1)       # (n,)
    shown = np.clip(colour[p] * shade[:, None] * (1 + rng.uniform(-0.08, 0.08, 3)), 0, 1)
    image = background(photographs, rng).reshape(-1, 3)                             # (K * K, 3)
    image[hit] = shown
    image = fill(image.reshape(K, K, 3), hit.reshape(K, K, 1).astype(float))
    return Image.fromarray((image * 255).astype(np.uint8)).resize((SIZE, SIZE), Image.BOX)


def render(job):
    """The views of a model; none if all of it is glass."""
    seed, archive, name, archives = job
    archive, rng = ZipFile(archive), np.random.default_rng(seed)
    points = surface(archive, name, rng)
    return [view(*points, backgrounds(archives), rng) for _ in range(VIEWS if points else 0)]


# ------------------------------------------------- python results/renders.py

def write_lists(top, models):
    """The lists of (archive, name, category): the first half of the models trains, the rest tests.
    classes.txt names each class's model, whose author a copy of the pictures has to credit.
    """
    kinds = sorted({category for _, _, category in models})
    rows, classes, half = [], [], len(models) // 2 * VIEWS
    for c, (archive, name, category) in enumerate(models, 1):
        classes.append(f"{c}\t{archive.name}\t{name}\t{category}\n")
        rows += [f"{(c - 1) * VIEWS + v + 1} {c} {kinds.index(category) + 1} "
                 f"furniture_final/{c}_{v}.JPG\n" for v in range(VIEWS)]
    for part, lines in (("train", rows[:half]), ("test", rows[half:])):
        text = "image_id class_id super_class_id path\n" + "".join(lines)
        (top / f"Ebay_{part}.txt").write_text(text)
    (top / "classes.txt").write_text("".join(classes))


def make(source, out):
    """Renders all models below `source` and writes the data set into `out`."""
    archives = tuple(sorted(source.rglob("*.sh3f")))
    if not archives:
        raise FileNotFoundError(f"{source}: no archive *.sh3f in it or below")
    models, shown = [row for archive in archives for row in catalogue(archive)], []
    random.Random(0).shuffle(models)
    top = out / "Stanford_Online_Products"
    (top / "furniture_final").mkdir(parents=True, exist_ok=True)
    jobs = [(seed, *model[:2], archives) for seed, model in enumerate(models)]
    with Pool() as pool:
        for model, views in zip(models, pool.imap(render, jobs, chunksize=4)):
            if not views:
                print(f"{model[1]}: left out, all of it is glass", flush=True)
                continue
            shown.append(model)
            for v, image in enumerate(views):
                image.save(top / f"furniture_final/{len(shown)}_{v}.JPG", quality=90)
    write_lists(top, shown)
    print(f"{top}: {len(shown)} classes, {len(shown) * VIEWS} images")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="the folder with the unpacked package")
    parser.add_argument("out", type=Path, help="the folder to make, train.py's --root")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        make(args.models, args.out)
    except OSError as error:
        sys.exit(f"renders.py: {error}")


if __name__ == "__main__":
    main()
