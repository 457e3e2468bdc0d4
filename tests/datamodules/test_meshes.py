"""Files of shapes: every format against known areas and against libraries, the sampler against areas, and broken files."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trimesh
from scipy import stats

from litzoo.datamodules import DataError, meshes
from litzoo.datamodules.meshes import SHAPE_SUFFIXES, read_cloud, read_clouds, turn_up, why_unreadable

CORNERS = [(x, y, z) for x in (0, 1) for y in (0, 2) for z in (0, 3)]
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
FANS = [(a, b, c) for p, q, r, s in QUADS for a, b, c in ((p, q, r), (p, r, s))]


def rows(*values: tuple[float, ...], before: str = "") -> str:
    return "".join(before + " ".join(map(str, row)) + "\n" for row in values)


def counted(*polygons: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(len(polygon), *polygon) for polygon in polygons]


def from_one(*polygons: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(corner + 1 for corner in polygon) for polygon in polygons]


V = rows(*CORNERS, before="v ")
OBJ = V + rows(*from_one(*QUADS), before="f ")
OFF = "8 6 0\n" + rows(*CORNERS) + rows(*counted(*QUADS))
STL = "".join(
    "facet normal 0 0 0\nouter loop\n" + rows(*(CORNERS[corner] for corner in fan), before="vertex ") + "endloop\nendfacet\n"
    for fan in FANS
)
PLY = (
    "ply\nformat {} 1.0\nelement vertex 8\nproperty float x\nproperty float y\nproperty float z\n"
    "element face {}\nproperty list uchar int vertex_indices\nend_header\n"
)


def ply_binary(order: str, polygons: list[tuple[int, ...]]) -> bytes:
    head = PLY.format("binary_little_endian" if order == "<" else "binary_big_endian", len(polygons))
    body = b"".join(struct.pack(f"{order}3f", *corner) for corner in CORNERS)
    return head.encode() + body + b"".join(struct.pack(f"{order}B{len(polygon)}i", len(polygon), *polygon) for polygon in polygons)


def ply_more() -> bytes:
    """With colours and normals of vertices, lists of texture coordinates of different lengths, and elements that are no part of the shape."""
    head = (
        "ply\nformat binary_little_endian 1.0\ncomment box\nobj_info none\nelement camera 2\nproperty list uchar float view\nelement vertex 8\n"
        "property double nx\nproperty double x\nproperty double y\nproperty double z\nproperty uchar red\nelement face 6\nproperty short group\n"
        "property list uchar float texcoord\nproperty list ushort uint vertex_index\nproperty int flags\nelement edge 1\nproperty int vertex1\n"
        "end_header\n"
    )
    body = struct.pack("<BfBff", 1, 0.5, 2, 0.5, 0.5)
    body += b"".join(struct.pack("<4dB", 9, *corner, 255) for corner in CORNERS)
    for place, quad in enumerate(QUADS):
        body += struct.pack(f"<hB{place}fH4Ii", 1, place, *[0.5] * place, 4, *quad, -1)
    return head.encode() + body + struct.pack("<i", 1)


def stl_binary() -> bytes:
    return (
        bytes(80) + struct.pack("<I", 12) + b"".join(struct.pack("<12fH", 0, 0, 0, *sum((CORNERS[i] for i in fan), ()), 0) for fan in FANS)
    )


# All are the surface of a box of 1 x 2 x 3, area 22.
BOXES: dict[str, bytes | str] = {
    "quads.obj": OBJ,
    "upper.OBJ": OBJ,
    "triangles.obj": V + rows(*from_one(*FANS), before="f "),
    "mixed.obj": V + rows(*from_one(*FANS[:2]), before="f ") + rows(*from_one(*QUADS[1:]), before="f "),
    "negative.obj": V + rows(*(tuple(corner - 8 for corner in quad) for quad in QUADS), before="f "),
    "no_material.obj": "mtllib gone.mtl\no box\nusemtl red\nvn 0 0 1\nvt 0 0\n" + OBJ,
    "slashes.obj": V + "vt 0 0\nvn 0 0 1\n" + "".join("f " + " ".join(f"{i + 1}/1/1" for i in quad) + "\n" for quad in QUADS),
    "no_texture.obj": V + "vn 0 0 1\n" + "".join("f " + " ".join(f"{i + 1}//1" for i in quad) + "\n" for quad in QUADS),
    "colours.obj": rows(*((*corner, 0.5, 0.5, 0.5) for corner in CORNERS), before="v ") + rows(*from_one(*QUADS), before="f "),
    "groups.obj": V + "g a\n" + rows(*from_one(*QUADS[:3]), before="f ") + "g b\ns off\n" + rows(*from_one(*QUADS[3:]), before="f "),
    "continued.obj": OBJ.replace("f 1 2 4 3", "f 1 2 \\\n 4 3"),
    "windows.obj": OBJ.replace("\n", "\r\n"),
    "macintosh.obj": OBJ.replace("\n", "\r"),
    "comments.obj": "# box\n" + OBJ.replace("v 0 0 0\n", "  v   0 0\t0   # corner\n\n"),
    "latin.obj": b"# caf\xe9\no caf\xe9\n" + OBJ.encode(),
    "degenerate.obj": V + "f 1 1 1\nf 1 2 2\n" + rows(*from_one(*QUADS), before="f "),
    "quads.off": "OFF\n" + OFF,
    "glued.off": "OFF" + OFF,
    "bare_counts.off": "OFF\n" + OFF.replace("8 6 0", "8 6"),
    "comments.off": "OFF # box\n# of quads\n\n" + OFF,
    "triangles.off": "OFF\n8 12 0\n" + rows(*CORNERS) + rows(*counted(*FANS)),
    "colours.off": "OFF\n8 6 0\n" + rows(*CORNERS) + rows(*((*polygon, 255, 0, 0) for polygon in counted(*QUADS))),
    "vertex_colours.off": "COFF\n8 6 0\n" + rows(*((*corner, 9, 9, 9, 9) for corner in CORNERS)) + rows(*counted(*QUADS)),
    "text.stl": "solid box\n" + STL + "endsolid box\n",
    "binary.stl": stl_binary(),
    "solid.stl": b"solid" + stl_binary()[5:],
    "text.ply": PLY.format("ascii", 12) + rows(*CORNERS) + rows(*counted(*FANS)),
    "quads.ply": PLY.format("ascii", 6) + rows(*CORNERS) + rows(*counted(*QUADS)),
    "little.ply": ply_binary("<", FANS),
    "big.ply": ply_binary(">", FANS),
    "binary_quads.ply": ply_binary("<", QUADS),
    "binary_mixed.ply": ply_binary("<", [*FANS[:2], *QUADS[1:]]),
    "big_mixed.ply": ply_binary(">", [*QUADS[1:], *FANS[:2]]),
    "more.ply": PLY.format("ascii", 6).replace("property list", "property uchar red\nproperty list").replace("uchar int", "uint8 int32")
    + rows(*CORNERS)
    + rows(*((7, *polygon) for polygon in counted(*QUADS))),
    "windows.ply": (PLY.format("ascii", 6) + rows(*CORNERS) + rows(*counted(*QUADS))).replace("\n", "\r\n"),
    "binary_more.ply": ply_more(),
}


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def on_box(points: np.ndarray) -> np.ndarray:
    """How many points lie on each of the six faces of the box; all must lie on one."""
    distance = np.concatenate([np.abs(points), np.abs(points - [1, 2, 3])], axis=1)
    assert distance.min(1).max() < 1e-6
    assert points.min() > -1e-6
    assert (points < np.array([1, 2, 3]) + 1e-6).all()
    return np.bincount(distance.argmin(1), minlength=6)


@pytest.mark.parametrize("name", BOXES)
def test_a_box_in_every_format(name: str, tmp_path: Path) -> None:
    points = read_cloud(write(tmp_path / name, BOXES[name]), 4000)
    assert points.shape == (4000, 3)
    assert points.dtype == np.float32
    assert stats.chisquare(on_box(points), np.array([6, 3, 2, 6, 3, 2]) / 22 * 4000).pvalue > 1e-4
    assert np.ptp(points, axis=0) == pytest.approx([1, 2, 3], abs=1e-6)


@pytest.mark.parametrize("name", ["triangles.obj", "quads.off", "text.stl", "binary.stl", "text.ply", "little.ply"])
def test_area_is_that_of_the_libraries(name: str, tmp_path: Path) -> None:
    import open3d

    path = write(tmp_path / name, BOXES[name])
    vertices, faces = meshes._READERS[path.suffix](path)
    assert trimesh.Trimesh(vertices, faces, process=False).area == pytest.approx(22)
    assert trimesh.load_mesh(path).area == pytest.approx(22)
    assert open3d.io.read_triangle_mesh(str(path)).get_surface_area() == pytest.approx(22)


def test_negative_numbers_count_from_their_line(tmp_path: Path) -> None:
    low = "v 0 0 {0}\nv 1 0 {0}\nv 0 1 {0}\nf -3 -2 -1\n"
    points = read_cloud(write(tmp_path / "a.obj", low.format(0) + low.format(5)), 1000)
    assert 400 < (points[:, 2] == 5).sum() < 600
    assert set(points[:, 2].tolist()) == {0, 5}


def test_polygons_are_fans(tmp_path: Path) -> None:
    house = "v 0 0 0\nv 2 0 0\nv 2 1 0\nv 1 2 0\nv 0 1 0\nf 1 2 3 4 5\n"
    points = read_cloud(write(tmp_path / "a.obj", house), 6000)
    assert stats.binomtest(int((points[:, 1] > 1).sum()), 6000, 1 / 3).pvalue > 1e-4


# --- scenes -------------------------------------------------------------------------------------------------------------------------


def scene() -> trimesh.Scene:
    """Three boxes of 1 x 2 x 3: as it is, moved by 10, and doubled, turned about z and moved by -10."""
    box = trimesh.creation.box(extents=(1, 2, 3))
    placed = trimesh.Scene()
    placed.add_geometry(box)
    placed.add_geometry(box, transform=trimesh.transformations.translation_matrix((10, 0, 0)))
    turn = trimesh.transformations.rotation_matrix(np.pi / 2, (0, 0, 1))
    turn[:3, :3] *= 2
    turn[:3, 3] = (-10, 0, 0)
    placed.add_geometry(trimesh.creation.box(extents=(1, 2, 3)), transform=turn)
    return placed


@pytest.mark.parametrize("suffix", [".glb", ".gltf"])
@pytest.mark.parametrize("missing", [None, "trimesh", "open3d"])
def test_scenes_are_merged_in_world_coordinates(suffix: str, missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene().export(tmp_path / f"scene{suffix}")
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    points = read_cloud(tmp_path / f"scene{suffix}", 6000)
    assert points.min(0) == pytest.approx([-12, -1, -3], abs=0.02)
    assert points.max(0) == pytest.approx([10.5, 1, 3], abs=0.02)
    place = np.array([(points[:, 0] < -5).sum(), (np.abs(points[:, 0]) < 5).sum(), (points[:, 0] > 5).sum()])
    assert stats.chisquare(place, np.array([4, 1, 1]) * 1000).pvalue > 1e-4


def test_a_scene_of_points(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(50, 3))
    trimesh.Scene(trimesh.PointCloud(points)).export(tmp_path / "a.glb")
    assert read_cloud(tmp_path / "a.glb") == pytest.approx(points, abs=1e-6)


# --- sampling -----------------------------------------------------------------------------------------------------------------------


def test_points_are_uniform_by_area(tmp_path: Path) -> None:
    """Counts by triangle against areas over three decades, and the moments of a uniform point in a triangle."""
    rng = np.random.default_rng(0)
    count, size = 40, np.geomspace(0.1, 3, 40)
    # Triangles that are told apart by their height.
    corners = rng.normal(size=(count, 3, 3)) * size[:, None, None]
    corners[..., 2] = np.arange(count)[:, None]
    area = np.array([np.linalg.norm(np.cross(b - a, c - a)) / 2 for a, b, c in corners])
    text = "OFF\n120 40 0\n" + rows(*corners.reshape(-1, 3).tolist())
    text += rows(*((3, 3 * face, 3 * face + 1, 3 * face + 2) for face in range(count)))
    number = 200_000
    points = read_cloud(write(tmp_path / "a.off", text), number).astype(np.float64)
    chosen = points[:, 2].round().astype(int)
    expected = area / area.sum() * number
    assert expected.max() / expected[expected > 5].min() > 100
    large = expected > 5
    found = np.bincount(chosen, minlength=count)
    assert (
        stats.chisquare(np.r_[found[large], found[~large].sum() + 1e-9], np.r_[expected[large], expected[~large].sum() + 1e-9]).pvalue
        > 1e-4
    )
    a, b, c = corners[chosen, :, :2].swapaxes(0, 1)
    weights = np.linalg.solve(np.stack([b - a, c - a], axis=2), (points[:, :2] - a)[..., None])[..., 0]
    weights = np.concatenate([1 - weights.sum(1, keepdims=True), weights], axis=1)
    assert weights.min() > -1e-3
    error = 4 / np.sqrt(number)
    assert weights.mean(0) == pytest.approx([1 / 3] * 3, abs=error)
    assert weights.T @ weights / number == pytest.approx(np.full((3, 3), 1 / 12) + np.eye(3) / 12, abs=error)


def test_triangles_without_area_are_never_drawn(tmp_path: Path) -> None:
    degenerate = "v 9 9 9\nv 8 8 8\nf 1 1 1\nf 1 2 1\n"
    text = degenerate + "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 3 4 5\n" + "f 2 2 1\n"
    assert read_cloud(write(tmp_path / "a.obj", text), 500).max() <= 1
    with pytest.raises(ValueError, match="its faces have no area"):
        read_cloud(write(tmp_path / "b.obj", degenerate))


def test_points_depend_on_seed_and_content_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.obj", OBJ)
    first = read_cloud(path, 300)
    other = read_cloud(write(tmp_path / "b.off", BOXES["colours.off"]), 300)
    read_cloud(path, 300, seed=5)
    assert (read_cloud(path, 300) == first).all()
    # The same triangles in a file of another name and format.
    assert (other == first).all()
    assert (read_cloud(path, 300, seed=1) != first).any(1).all()
    moved = read_cloud(write(tmp_path / "c.obj", OBJ.replace("v 0 0 0", "v 0.1 0 0")), 300)
    assert (moved != first).any(1).mean() > 0.9
    assert read_cloud(path).shape == (2048, 3)


def test_known_points(tmp_path: Path) -> None:
    """Another version of a library, or another machine, must not sample other points."""
    points = read_cloud(write(tmp_path / "a.obj", OBJ), 2)
    assert points == pytest.approx(np.array(KNOWN), abs=1e-6)


KNOWN = [[1.0, 1.71819, 0.055869], [1.0, 1.030937, 1.136472]]


# --- files of points ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cloud() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)


def pcd(cloud: np.ndarray, kind: str, fields: str = "x y z") -> bytes:
    number = len(fields.split())
    head = (
        f"# .PCD v0.7\nVERSION 0.7\nFIELDS {fields}\nSIZE {'4 ' * number}\nTYPE {'F ' * number}\nCOUNT {'1 ' * number}\n"
        f"WIDTH {len(cloud)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(cloud)}\nDATA {kind}\n"
    ).encode()
    return head + (rows(*cloud.tolist()).encode() if kind == "ascii" else cloud.tobytes())


def _open3d_pcd(cloud: np.ndarray, path: Path) -> None:
    import open3d

    points = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(cloud.astype(np.float64)))
    assert open3d.io.write_point_cloud(str(path), points, compressed=True)


def _with_normals(cloud: np.ndarray) -> np.ndarray:
    return np.concatenate([cloud, np.ones_like(cloud)], axis=1)


CLOUDS: dict[str, Callable[[np.ndarray, Path], object]] = {
    "a.xyz": lambda cloud, path: np.savetxt(path, cloud, fmt="%.9g"),
    "normals.xyz": lambda cloud, path: np.savetxt(path, _with_normals(cloud), fmt="%.9g"),
    "commas.xyz": lambda cloud, path: np.savetxt(path, _with_normals(cloud), fmt="%.9g", delimiter=","),
    "semicolons.xyz": lambda cloud, path: np.savetxt(path, cloud, fmt="%.9g", delimiter="; ", header="x;y;z", newline="\r\n"),
    "comments.xyz": lambda cloud, path: write(path, "//X Y Z\n\n" + rows(*cloud.tolist()) + "\n"),
    "a.pts": lambda cloud, path: np.savetxt(path, cloud, fmt="%.9g"),
    "count.pts": lambda cloud, path: write(path, "200\n" + rows(*_with_normals(cloud).tolist())),
    "a.npy": lambda cloud, path: np.save(path, _with_normals(cloud).astype(np.float64)),
    "text.pcd": lambda cloud, path: write(path, pcd(cloud, "ascii")),
    "binary.pcd": lambda cloud, path: write(path, pcd(cloud, "binary")),
    "fields.pcd": lambda cloud, path: write(path, pcd(np.concatenate([cloud[:, :1], cloud], axis=1), "binary", "intensity x y z")),
    "text_fields.pcd": lambda cloud, path: write(path, pcd(np.concatenate([cloud[:, :1], cloud], axis=1), "ascii", "intensity x y z")),
    "compressed.pcd": _open3d_pcd,
    "points.ply": lambda cloud, path: trimesh.PointCloud(cloud).export(path),
    "points.obj": lambda cloud, path: write(path, rows(*cloud.tolist(), before="v ")),
    "points.off": lambda cloud, path: write(path, "OFF\n200 0 0\n" + rows(*cloud.tolist())),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_files_of_points(name: str, cloud: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / name
    CLOUDS[name](cloud, path)
    assert read_cloud(path) == pytest.approx(cloud, abs=1e-6)
    assert read_cloud(path, 1000) == pytest.approx(cloud, abs=1e-6)
    some = read_cloud(path, 60)
    kept = [int(np.abs(cloud - point).sum(1).argmin()) for point in some]
    assert cloud[kept] == pytest.approx(some, abs=1e-6)
    assert kept == sorted(set(kept))
    assert kept != list(range(60))
    assert (read_cloud(path, 60) == some).all()
    assert (read_cloud(path, 60, seed=1) != some).any()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.obj", rows(*CORNERS, before="v ")),
        ("a.off", "OFF\n8 0 0\n" + rows(*CORNERS)),
        ("a.xyz", rows(*CORNERS)),
        ("a.pts", rows(*CORNERS)),
    ],
)
def test_the_mark_that_windows_puts_before_a_text(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8-sig", newline="\r\n")
    assert read_cloud(path).tolist() == np.float32(CORNERS).tolist()


def test_shapes_in_map_coordinates_keep_their_form(cloud: np.ndarray, tmp_path: Path) -> None:
    place = np.array([448_262.0, 5_411_932.0, 35.0])
    points = cloud.astype(np.float64).round(3)
    np.savetxt(tmp_path / "a.xyz", points + place, fmt="%.3f")
    found = read_cloud(tmp_path / "a.xyz")
    assert found - found[0] == pytest.approx(points - points[0], abs=1e-5)
    corners = np.array(CORNERS)
    for suffix, text in ((".obj", OBJ), (".off", "OFF\n" + OFF)):
        moved = text.replace(
            rows(*CORNERS, before="v " * (suffix == ".obj")), rows(*(corners + place).tolist(), before="v " * (suffix == ".obj"))
        )
        assert moved != text
        found = read_cloud(write(tmp_path / f"a{suffix}", moved), 500)
        assert on_box(found + (corners.min(0) + corners.max(0)) / 2).all()
    near = points + 100
    np.savetxt(tmp_path / "a.xyz", near)
    assert read_cloud(tmp_path / "a.xyz").tolist() == near.astype(np.float32).tolist()


def test_points_that_a_scanner_missed(cloud: np.ndarray, tmp_path: Path) -> None:
    holes = cloud.copy()
    holes[::7] = np.nan
    assert len(read_cloud(write(tmp_path / "a.pcd", pcd(holes, "binary")))) == 200 - 29


def test_every_ending_is_tested() -> None:
    assert {Path(name).suffix.lower() for name in (*BOXES, *CLOUDS)} | {".glb", ".gltf"} == set(SHAPE_SUFFIXES) == set(meshes._READERS)


# --- broken files -------------------------------------------------------------------------------------------------------------------


def reason(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # what it says is tested
        read_cloud(path)
    assert not isinstance(caught.value, DataError)
    text = why_unreadable(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("share", [0.001, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize(
    "name", ["sphere.off", "text.stl", "sphere.stl", "text.ply", "sphere.ply", "sphere.glb", "text.pcd", "a.pcd", "a.npy"]
)
def test_truncated_files(name: str, share: float, cloud: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / name
    sphere = trimesh.creation.icosphere(subdivisions=2)
    if path.suffix in (".pcd", ".npy"):
        CLOUDS[name if name != "a.pcd" else "binary.pcd"](cloud, path)
    elif name.startswith("text"):
        path.write_bytes(
            sphere.export(file_type="stl_ascii").encode() if path.suffix == ".stl" else sphere.export(file_type="ply", encoding="ascii")
        )
    else:
        sphere.export(path)
    whole = path.read_bytes()
    read_cloud(path)
    path.write_bytes(whole[: max(1, int(len(whole) * share))])
    assert reason(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.obj", "", "it is empty"),
        ("a.obj", "hello\n", "it holds no points"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1\n", "it is truncated, or holds something else than numbers"),
        ("a.obj", V + "f 1 2 99\n", "a face names vertex 98, but it has 8"),
        ("a.obj", V + "f 1 2 -9\n", "a face names vertex -1, but it has 8"),
        ("a.obj", V + "f 1 2 x\n", "a face is no list of whole numbers"),
        ("a.obj", V + "v nan 0 0\nf 1 2 9\n", "it holds NaN or infinite coordinates"),
        ("a.obj", "v 1e300 0 0\nv 0 1 0\n", "it holds NaN or infinite coordinates"),
        ("a.obj", "v 1e300 0 0\nv 0 1e300 0\nv 0 0 1e300\nf 1 2 3\n", "its faces have no area"),
        ("a.off", "hello", "it does not begin with OFF"),
        ("a.off", "OFF BINARY\n1 2 3", "binary OFF file"),
        ("a.off", "4OFF\n1 0 0\n1 2 3 4", "of other dimensions"),
        ("a.off", "OFF", "it holds no points"),
        ("a.off", "OFF\n8 7 0\n" + OFF.partition("\n")[2], "it has 14 lines for 8 vertices and 7 faces"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n4 0 1 2\n", "a face has fewer corners than it says"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "a face names vertex 7, but it has 3"),
        ("a.off", "OFF\n-3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "its head is broken: it says -3 vertices and 1 faces"),
        (
            "a.ply",
            PLY.format("binary_little_endian", 1).replace("vertex 8", "vertex -8") + 99 * "a",
            "its head is broken (a negative number",
        ),
        ("a.pcd", "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS -1\nDATA ascii\n0 0 0\n1 1 1\n", "its head is broken"),
        ("a.stl", "<html>404</html>", "it holds no points"),
        ("a.ply", "<html>404</html>", "it does not begin with ply"),
        ("a.ply", PLY.format("binary", 1), "its format is binary, and none of ascii"),
        ("a.ply", PLY.format("ascii", 1).replace("float x", "float u") + rows(*CORNERS) + "3 0 1 2\n", "its vertices have no x"),
        ("a.ply", PLY.format("ascii", 1).replace("float x", "quad x"), "its head is broken ('quad')"),
        ("a.ply", PLY.format("ascii", 1) + rows(*CORNERS) + "3 0 1 8\n", "a face names vertex 8, but it has 8"),
        ("a.glb", "<html>404</html>", "no .glb file"),
        ("a.gltf", "{", "no .gltf file (JSONDecodeError"),
        ("a.pcd", "hello", "its head does not say DATA"),
        ("a.pcd", "FIELDS a b\nSIZE 4 4\nTYPE F F\nPOINTS 1\nDATA ascii\n1 2\n", "its head is broken, or names no x, y and z"),
        ("a.xyz", "hello world\n", "could not convert string 'hello'"),
        ("a.xyz", "1 2\n", "it is truncated, or holds something else than numbers"),
        ("a.xyz", "1 2 nan\n", "it holds NaN or infinite coordinates"),
        ("a.pts", "3\n1 2 3\n1 2 3\n", "it says 3 points, and 2 follow"),
        ("a.pts", "# nothing\n", "it holds no points"),
        ("a.npy", "hello", "pickled"),
        ("a.txt", "1 2 3\n", ".txt is none of .obj, .off"),
        ("a", "1 2 3\n", "a name without an ending is none of"),
    ],
)
def test_what_is_wrong_is_said(name: str, content: str, words: str, tmp_path: Path) -> None:
    assert words in reason(write(tmp_path / name, content))


def test_arrays_of_other_shapes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 5, 3)))
    assert "this is float64 (2, 5, 3)" in reason(tmp_path / "a.npy")


def test_a_scene_without_its_buffer(tmp_path: Path) -> None:
    scene().export(tmp_path / "a.gltf")
    for buffer in tmp_path.glob("*.bin"):
        buffer.unlink()
    assert "a file that it names is missing" in reason(tmp_path / "a.gltf")


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "gone.obj").symlink_to(tmp_path / "nowhere.obj")
    found = list(read_clouds([tmp_path / "gone.obj", tmp_path / "gone.ply"]))
    assert found == ["there is no such file"] * 2


@pytest.mark.parametrize("processes", [False, True])
def test_many_files_in_order(processes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if processes:
        monkeypatch.setattr(meshes, "_PARALLEL", 0)
        monkeypatch.setattr(meshes, "_FILES", 5)
    names = [*list(BOXES)[:6], "broken.obj", *list(BOXES)[6:9]]
    paths = [write(tmp_path / name, BOXES.get(name, "hello")) for name in names]
    found = list(read_clouds(paths, 100, seed=3))
    assert len(found) == len(paths)
    for path, points in zip(paths, found, strict=True):
        if path.name == "broken.obj":
            assert points == "it holds no points, it may be truncated"
        else:
            assert (points == read_cloud(path, 100, seed=3)).all()


# --- libraries ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["trimesh", "open3d"])
@pytest.mark.parametrize("name", ["text.stl", "binary.stl", "solid.stl"])
def test_one_library_is_enough(name: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert (on_box(read_cloud(write(tmp_path / name, BOXES[name]), 1000)) > 20).all()


def test_without_any_library(cloud: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CLOUDS["compressed.pcd"](cloud, tmp_path / "compressed.pcd")
    for library in ("trimesh", "open3d"):
        monkeypatch.setitem(sys.modules, library, None)
    assert len(read_cloud(write(tmp_path / "a.obj", OBJ))) == 2048
    for path in (write(tmp_path / "a.stl", BOXES["text.stl"]), tmp_path / "compressed.pcd"):
        with pytest.raises(DataError, match=r'pip install "litzoo\[points\]".*libusb-1\.0-0 libgl1 libegl1'):
            read_cloud(path)
        with pytest.raises(DataError, match="is not installed"):
            list(read_clouds([path]))


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / name, content) for name, content in BOXES.items()]
    paths += [write(tmp_path / f"cut{path.name}", path.read_bytes()[:150]) for path in paths]
    list(read_clouds(paths))
    monkeypatch.setitem(sys.modules, "trimesh", None)
    list(read_clouds(paths))
    assert capfd.readouterr() == ("", "")


def test_turn_up() -> None:
    points = np.array([[0, 0, 1], [1, 2, 3]], np.float32)
    assert turn_up(points, "z").tolist() == [[0, 1, 0], [1, 3, -2]]
    assert turn_up(points, "z").dtype == np.float32
    assert turn_up(points, "y") is points
    turned = turn_up(np.eye(3), "z")
    assert np.linalg.det(turned) == pytest.approx(1)
