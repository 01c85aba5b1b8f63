# SPDX-License-Identifier: MIT
"""results/renders.py: python -m pytest -q results/test_renders_part.py"""
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the scripts are one folder up
import data  # noqa: E402
import renders  # noqa: E402

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
