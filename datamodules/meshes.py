"""Reading the files of shapes the same way wherever they are read: to be packed, and to be classified."""

import codecs
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import DataError

UpAxis = Literal["y", "z"]

SHAPE_SUFFIXES = (".obj", ".off", ".ply", ".stl", ".glb", ".gltf", ".pcd", ".xyz", ".pts", ".npy")
# Points that a mesh is sampled at, if nobody says how many.
_POINTS = 2048
# Bytes of files from which on several processes are faster than one, in spite of their start; and files that are read at a time.
_PARALLEL, _FILES = 1 << 25, 256

# From so many times its size away from the origin on, a shape is moved there.
_FAR = 1000

# Vertices `(V, 3)`, and triangles `(F, 3)` of positions in them; without triangles it is a cloud.
_Shape = tuple[np.ndarray, np.ndarray]
_NO_FACES = np.zeros((0, 3), np.int64)


def read_cloud(path: str | os.PathLike[str], num_points: int | None = None, seed: int = 0) -> np.ndarray:
    """Read a file of a shape as points: a mesh is sampled uniformly by area, a file of points gives its own.

    A triangle with corners a, b, c is drawn with a probability proportional to its area, and in it the point
    (1 - sqrt(r)) a + sqrt(r) (1 - s) b + sqrt(r) s c with uniform r and s. The random numbers are a function of the seed and of what
    the file holds. Several meshes of a scene are one, in world coordinates; polygons are fans of triangles; triangles without area
    are never drawn. A mesh file without faces is a file of points. A shape that lies more than a thousand times its size away from the
    origin, as scans in map coordinates do, is moved there, because float32 would round it away.

    `.stl`, `.glb` and `.gltf` are read with trimesh, or with Open3D where that is missing, and compressed `.pcd` with Open3D. The others
    need no library.

    Args:
        path: a file of one of `SHAPE_SUFFIXES`.
        num_points: points of a mesh, None means 2048; and the most that are kept of a file of points, a random subset in the order of
            the file, None keeps all.
        seed: of the random choices.

    Returns:
        `(N, 3)` float32.

    Raises:
        DataError: if the library that this file needs is not installed.
        Exception: of any kind that libraries have for broken files; see `why_unreadable`.

    Example:
        >>> read_cloud("chair.obj", num_points=1024).shape
        (1024, 3)
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{suffix or 'a name without an ending'} is none of {', '.join(SHAPE_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    # What overflows is infinite, and told as such.
    with np.errstate(all="ignore"):
        vertices, faces = _READERS[suffix](path)
        vertices = _near(vertices)
        cloud = _sample(vertices, faces, num_points or _POINTS, seed) if len(faces) else _keep(vertices, num_points, seed)
    if len(cloud) == 0:
        raise ValueError("it holds no points, it may be truncated")
    if not np.isfinite(cloud).all():
        raise ValueError("it holds NaN or infinite coordinates")
    return cloud


def read_clouds(paths: Sequence[Path], num_points: int | None = None, seed: int = 0) -> Iterator[np.ndarray | str]:
    """Read many files of shapes, in as many processes as there are cores if they are large enough to gain by it.

    Args:
        paths: the files.
        num_points: as in `read_cloud`.
        seed: of the random choices.

    Yields:
        What `read_cloud` returns, in the order of the files, and for one that cannot be read the reason, a text. A few hundred files are
        read ahead.

    Raises:
        DataError: if the library that a file needs is not installed.

    Example:
        >>> [cloud for cloud in read_clouds([Path("chair.obj"), Path("broken.ply")]) if not isinstance(cloud, str)]
    """
    from joblib import Parallel, cpu_count, delayed

    size = sum(path.stat().st_size for path in paths if path.exists())
    if size < _PARALLEL or cpu_count() == 1:
        for path in paths:
            yield _attempt(path, num_points, seed)
        return
    with Parallel(n_jobs=-1) as pool:
        for start in range(0, len(paths), _FILES):
            yield from pool(delayed(_attempt)(path, num_points, seed) for path in paths[start : start + _FILES])


def _attempt(path: Path, num_points: int | None, seed: int) -> np.ndarray | str:
    try:
        return read_cloud(path, num_points, seed)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  # the libraries have no common class for what is wrong with a file
        return why_unreadable(error)


def turn_up(points: np.ndarray, up_axis: UpAxis) -> np.ndarray:
    """Turn points about the x axis so that their up axis is +y.

    Args:
        points: `(..., 3)`.
        up_axis: the axis that points up; "z" makes (x, z, -y) of (x, y, z).

    Returns:
        Points of the same shape.

    Example:
        >>> turn_up(np.array([[1.0, 2.0, 3.0]]), "z")
        array([[ 1.,  3., -2.]])
    """
    return points if up_axis == "y" else points[..., [0, 2, 1]] * np.array([1, 1, -1], points.dtype)


def why_unreadable(error: Exception) -> str:
    """What is wrong with a file of a shape, in a few words.

    Args:
        error: what `read_cloud` raised.

    Returns:
        Words for a message that names the file.

    Example:
        >>> why_unreadable(ValueError("it is empty"))
        'it is empty'
    """
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r"\s+", " ", str(error)) or type(error).__name__


# Points of a shape


def _uniform(seed: int, content: bytes, *shape: int) -> np.ndarray:
    """Uniform float64 numbers in [0, 1): a counter-based stream that seed and content choose."""
    key = hashlib.sha256(seed.to_bytes(8, "little", signed=True) + content).digest()
    bits = np.random.Philox(key=np.frombuffer(key[:16], "<u8")).random_raw(math.prod(shape))
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(shape)


def _content(*arrays: np.ndarray) -> bytes:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _near(vertices: np.ndarray) -> np.ndarray:
    """Vertices of a shape about the origin, if it is so far away that float32 would round it away; others as they are."""
    if len(vertices) == 0:
        return vertices
    low, high = vertices.min(0).astype(np.float64), vertices.max(0).astype(np.float64)
    size, distance = (high - low).max(), np.maximum(-low, high).max()
    return vertices - (low + high) / 2 if np.isfinite(distance) and 0 < size < distance / _FAR else vertices


def _sample(vertices: np.ndarray, faces: np.ndarray, num_points: int, seed: int) -> np.ndarray:
    """Points on the surface, uniform by area."""
    if faces.min() < 0 or faces.max() >= len(vertices):
        wrong = faces.max() if faces.max() >= len(vertices) else faces.min()
        raise ValueError(f"a face names vertex {wrong}, but it has {len(vertices)} (counted from 0)")
    corners = vertices[faces].astype(np.float64)
    if not np.isfinite(corners).all():
        raise ValueError("it holds NaN or infinite coordinates")
    a, b, c = corners.swapaxes(0, 1)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    below = np.cumsum(area)
    if not (np.isfinite(below[-1]) and below[-1] > 0):
        raise ValueError("its faces have no area")
    r, s, t = _uniform(seed, _content(corners), 3, num_points)
    # The first triangle below which more area lies: one without area is never that.
    chosen = np.searchsorted(below[:-1], r * below[-1], side="right")
    root = np.sqrt(s)[:, None]
    weight = t[:, None]
    return ((1 - root) * a[chosen] + root * (1 - weight) * b[chosen] + root * weight * c[chosen]).astype(np.float32)


def _keep(points: np.ndarray, num_points: int | None, seed: int) -> np.ndarray:
    """All points, or a random subset in their order."""
    cloud = points.astype(np.float32)
    if num_points is None or len(cloud) <= num_points:
        return cloud
    return cloud[np.sort(np.argsort(_uniform(seed, _content(cloud), len(cloud)), kind="stable")[:num_points])]


# Text


def _lines(path: Path) -> bytes:
    """A text with the line ends of Unix, and without the mark that Windows puts at the beginning."""
    return path.read_bytes().removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _table(rows: list[bytes], columns: int, dtype: Any = np.float64) -> np.ndarray:
    """The first columns of rows of numbers."""
    if not rows:
        return np.zeros((0, columns), dtype)
    try:
        # Latin-1 gives every byte a meaning, so that the message tells what stands there instead of a number.
        table = np.loadtxt(rows, dtype, comments=None, usecols=range(columns), ndmin=2, encoding="latin-1")
    except ValueError as error:
        raise ValueError(f"it is truncated, or holds something else than numbers ({error})") from error
    if len(table) != len(rows):
        raise ValueError(f"it is truncated: {len(rows) - len(table)} lines hold no numbers")
    return table


def _triangles(rows: list[list[bytes]]) -> np.ndarray:
    """The triangles of polygons in text."""
    try:
        corners = np.array([int(number) for row in rows for number in row], np.int64)
    except ValueError as error:
        raise ValueError(f"it is truncated, or a face is no list of whole numbers ({error})") from error
    return _fans(corners, np.array([len(row) for row in rows], np.int64))


def _fans(corners: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The triangles of polygons, each a fan from its first corner; those of fewer than three corners have none."""
    start = np.cumsum(size) - size
    fans = np.maximum(size - 2, 0)
    first = np.repeat(start, fans)
    step = np.arange(fans.sum()) - np.repeat(np.cumsum(fans) - fans, fans)
    return corners[np.stack([first, first + step + 1, first + step + 2], axis=1)]


def _counted_polygons(rows: list[bytes]) -> np.ndarray:
    """The triangles of polygons that begin with their number of corners; what follows the corners is left alone."""
    if all(row.split(None, 1)[0] == b"3" for row in rows):
        return _table(rows, 4, np.int64)[:, 1:]
    polygons = [row.split() for row in rows]
    if any(len(row) <= int(row[0]) for row in polygons):
        raise ValueError("it is truncated: a face has fewer corners than it says")
    return _triangles([row[1 : int(row[0]) + 1] for row in polygons])


# Open3D stops at the first polygon of an OBJ file without a word, and trimesh counts negative numbers from the end of the file instead of
# from their line.
def _read_obj(path: Path) -> _Shape:
    text = _lines(path).replace(b"\\\n", b" ")
    vertices = _table(_VERTEX.findall(text), 3)
    rows = _FACE.findall(text)
    if not rows:
        return vertices, _NO_FACES
    # Without the numbers of texture and normal behind the slashes.
    rows = re.sub(rb"/\S*", b"", b"\n".join(rows)).split(b"\n")
    if any(b"-" in row for row in rows):
        start = [[match.start() for match in line.finditer(text)] for line in (_VERTEX, _FACE)]
        above = np.searchsorted(start[0], start[1]).tolist()
        return vertices, _triangles([_absolute(row.split(), count) for row, count in zip(rows, above, strict=True)]) - 1
    try:
        faces = np.loadtxt(rows, np.int64, comments=None, ndmin=2, encoding="latin-1")
    except ValueError:  # as many columns as the first row has
        faces = _NO_FACES
    if faces.shape != (len(rows), 3):
        faces = _triangles([row.split() for row in rows])
    return vertices, faces - 1


_VERTEX = re.compile(rb"^[ \t]*v[ \t]([^\n#]*)", re.MULTILINE)
_FACE = re.compile(rb"^[ \t]*f[ \t]([^\n#]*)", re.MULTILINE)


def _absolute(row: list[bytes], above: int) -> list[bytes]:
    """Numbers of vertices from 1; a negative one counts back from the `above` vertices that stand above its line."""
    return [b"%d" % (above + 1 + int(number)) if number.startswith(b"-") else number for number in row]


def _read_off(path: Path) -> _Shape:
    text = re.sub(rb"#[^\n]*", b"", _lines(path))
    # The first line of ModelNet40's files often runs into the second: OFF490 518 0.
    head = re.match(rb"\s*(?:ST)?C?N?(4|n)?OFF\s*(BINARY)?", text)
    if head is None:
        raise ValueError("it does not begin with OFF")
    if head[1] or head[2]:
        raise ValueError("it is a binary OFF file or one of other dimensions: save it as text, with three coordinates")
    rows = [row for row in text[head.end() :].split(b"\n") if row.strip()]
    if not rows:
        return np.zeros((0, 3)), _NO_FACES
    vertex_count, face_count = _table(rows[:1], 2, np.int64)[0]
    if min(vertex_count, face_count) < 0:
        raise ValueError(f"its head is broken: it says {vertex_count} vertices and {face_count} faces")
    if len(rows) - 1 < vertex_count + face_count:
        raise ValueError(f"it is truncated: it has {len(rows) - 1} lines for {vertex_count} vertices and {face_count} faces")
    vertices = _table(rows[1 : 1 + vertex_count], 3)
    return vertices, _counted_polygons(rows[1 + vertex_count : 1 + vertex_count + face_count])


# Names of the types of PLY files, and the letters that struct and NumPy have for them.
_PLY_TYPES = {
    **dict(zip(("char", "uchar", "short", "ushort", "int", "uint", "float", "double"), "bBhHiIfd", strict=True)),
    **dict(zip(("int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"), "bBhHiIfd", strict=True)),
}


@dataclass
class _Element:
    """An element of a PLY file: how many there are, and the name, the type and for lists the type of the length of each property."""

    name: str
    count: int
    properties: list[tuple[str, str, str | None]]

    def axis(self, name: str) -> int:
        names = [given for given, _, _ in self.properties]
        if name not in names:
            raise ValueError(f"its vertices have no {name}")
        return names.index(name)

    @property
    def corners(self) -> int | None:
        """The property that lists the corners of a face."""
        places = (place for place, (name, _, length) in enumerate(self.properties) if length and name in ("vertex_indices", "vertex_index"))
        return next(places, None)


# Open3D crashes on damaged PLY files and fills truncated ones with what was in memory; trimesh reads no binary file whose polygons differ,
# and takes the whole lines of a truncated text.
def _read_ply(path: Path) -> _Shape:
    content = path.read_bytes()
    end = re.search(rb"\nend_header[ \t]*(\r\n|\n|\r)", content[: 1 << 16])
    if end is None or not content.startswith(b"ply"):
        raise ValueError("it does not begin with ply, or its head is truncated")
    kind, elements = _ply_head(content[: end.start()].decode("latin-1"))
    body = content[end.end() :]
    read = _ply_text(body, elements) if kind == "ascii" else _ply_binary(body, elements, ">" if kind == "binary_big_endian" else "<")
    vertices, faces = np.zeros((0, 3)), _NO_FACES
    for name, array in read:
        if name == "vertex":
            vertices = array
        else:
            faces = array
    return vertices, faces


def _ply_head(head: str) -> tuple[str, list[_Element]]:
    kind, elements = "", []
    try:
        for words in map(str.split, head.splitlines()):
            match words:
                case ["format", kind, *_]:
                    pass
                case ["element", name, count]:
                    elements.append(_Element(name, int(count), []))
                case ["property", "list", length, number, name]:
                    elements[-1].properties.append((name, _PLY_TYPES[number], _PLY_TYPES[length]))
                case ["property", number, name]:
                    elements[-1].properties.append((name, _PLY_TYPES[number], None))
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"its head is broken ({error})") from error
    if any(element.count < 0 for element in elements):
        raise ValueError("its head is broken (a negative number of elements)")
    if kind not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise ValueError(f"its format is {kind or 'not said'}, and none of ascii, binary_little_endian and binary_big_endian")
    return kind, elements


def _ply_text(body: bytes, elements: list[_Element]) -> Iterator[tuple[str, np.ndarray]]:
    rows = [row for row in body.replace(b"\r", b"\n").split(b"\n") if row.strip()]
    for element in elements:
        if len(rows) < element.count:
            raise ValueError(f"it is truncated: {len(rows)} lines follow for {element.count} of its element {element.name}")
        mine, rows = rows[: element.count], rows[element.count :]
        if element.name == "vertex":
            axes = [element.axis(name) for name in "xyz"]
            yield element.name, _table(mine, max(axes) + 1)[:, axes]
        elif element.name == "face" and mine and element.corners is not None:
            if any(length for _, _, length in element.properties[: element.corners]):
                raise ValueError("its faces have a list before that of their corners")
            yield element.name, _counted_polygons([row.split(None, element.corners)[-1] for row in mine] if element.corners else mine)


def _ply_binary(body: bytes, elements: list[_Element], order: str) -> Iterator[tuple[str, np.ndarray]]:
    start = 0
    for element in elements:
        records = _ply_records(body, start, element, order) if element.count else None
        if records is not None:
            start += records.nbytes
            if element.name == "vertex":
                yield element.name, np.stack([records[f"{element.axis(name)}"].astype(np.float64) for name in "xyz"], axis=1)
            elif element.name == "face" and element.corners is not None:
                corners = records[f"{element.corners}"].astype(np.int64)
                yield element.name, _fans(corners.reshape(-1), np.full(len(corners), corners.shape[1]))
        elif element.count:
            start, corners, size = _ply_walk(body, start, element, order)
            if element.name == "face":
                yield element.name, _fans(corners, size)


def _ply_records(body: bytes, start: int, element: _Element, order: str) -> np.ndarray | None:
    """The records of an element; None if their lists differ in length."""
    columns: list[tuple[Any, ...]] = []
    place = start
    for number, (_, kind, length) in enumerate(element.properties):
        if length is None:
            columns.append((f"{number}", order + kind))
        else:
            found = np.frombuffer(body[place : place + np.dtype(length).itemsize], order + length)
            if len(found) == 0 or not 0 <= found[0] <= len(body):
                return None
            columns += [(f"{number} length", order + length), (f"{number}", order + kind, (int(found[0]),))]
        place = start + np.dtype(columns).itemsize
    record = np.dtype(columns)
    if len(body) - start < record.itemsize * element.count:
        if any(length for _, _, length in element.properties):
            return None
        raise ValueError(f"it is truncated: fewer than {element.count} of its element {element.name} follow")
    records = np.frombuffer(body, record, element.count, start)
    same = all((records[name] == records[name][0]).all() for name in record.names or () if name.endswith("length"))
    return records if same else None


def _ply_walk(body: bytes, start: int, element: _Element, order: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Where an element with lists of different lengths ends, the corners of all its faces, and how many each has."""
    steps = [
        (place == element.corners, None if length is None else struct.Struct(order + length), np.dtype(kind).itemsize)
        for place, (_, kind, length) in enumerate(element.properties)
    ]
    pieces, size = [], []
    try:
        for _ in range(element.count):
            for wanted, length, width in steps:
                number = 1
                if length is not None:
                    number = length.unpack_from(body, start)[0]
                    start += length.size
                if wanted:
                    pieces.append(body[start : start + number * width])
                    size.append(number)
                start += number * width
    except struct.error:
        start = len(body) + 1
    if start > len(body) or min(size, default=0) < 0:
        raise ValueError(f"it is truncated: fewer than {element.count} of its element {element.name} follow")
    kind = element.properties[element.corners][1] if element.corners is not None else "b"
    return start, np.frombuffer(b"".join(pieces), order + kind).astype(np.int64), np.array(size, np.int64)


def _read_text(path: Path) -> _Shape:
    """Rows of numbers, of which the first three are coordinates; a first row of one number says how many there are."""
    text = re.sub(rb"(#|//)[^\n]*", b"", _lines(path)).translate(bytes.maketrans(b",;", b"  "))
    rows = [row for row in text.split(b"\n") if row.strip()]
    if rows and len(rows[0].split()) == 1:
        said = int(_table(rows[:1], 1)[0, 0])
        if said != len(rows) - 1:
            raise ValueError(f"it is truncated, or its first line is wrong: it says {said} points, and {len(rows) - 1} follow")
        rows = rows[1:]
    return _table(rows, 3), _NO_FACES


def _read_npy(path: Path) -> _Shape:
    points = np.load(path, allow_pickle=False)
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind not in "fiu":
        raise ValueError(f"a cloud has shape (points, 3), this is {points.dtype} {points.shape}")
    return points[:, :3], _NO_FACES


# Of a truncated file, Open3D gives points of zeros or whatever was in memory.
def _read_pcd(path: Path) -> _Shape:
    content = path.read_bytes()
    end = re.search(rb"^DATA[ \t]+(\w+)[^\n]*\n", content, re.MULTILINE)
    if end is None:
        raise ValueError("its head does not say DATA, it may be truncated")
    head = {row.split()[0].upper(): row.split()[1:] for row in content[: end.start()].splitlines() if row.strip()}
    try:
        fields = [name.lower() for name in head[b"FIELDS"]]
        count = [int(number) for number in head.get(b"COUNT", [b"1"] * len(fields))]
        points = int(head[b"POINTS"][0]) if b"POINTS" in head else int(head[b"WIDTH"][0]) * int(head[b"HEIGHT"][0])
        kinds = [f"<{kind.decode().lower()}{int(size)}" for kind, size in zip(head[b"TYPE"], head[b"SIZE"], strict=True)]
        columns = np.cumsum([0, *count])
        axes = [fields.index(axis) for axis in (b"x", b"y", b"z")]
        if points < 0:
            raise ValueError(f"{points} points")
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"its head is broken, or names no x, y and z ({error})") from error
    body = content[end.end() :]
    if end[1] == b"ascii":
        rows = [row for row in body.split(b"\n") if row.strip()]
        stored = _table(rows, int(columns[axes].max()) + 1)[:, columns[axes]]
    elif end[1] == b"binary":
        record = np.dtype([(f"{place}", kind, (number,)) for place, (kind, number) in enumerate(zip(kinds, count, strict=True))])
        found = np.frombuffer(body[: len(body) // record.itemsize * record.itemsize], record)
        stored = np.stack([found[f"{axis}"][:, 0].astype(np.float64) for axis in axes], axis=1)
    else:
        stored = _open3d(path)[0]
    if len(stored) < points:
        raise ValueError(f"it is truncated: it says {points} points, and holds {len(stored)}")
    stored = stored[:points]
    # Points that a scanner missed.
    return stored[~np.isnan(stored).any(1)], _NO_FACES


# Libraries


def _read_with_library(path: Path) -> _Shape:
    try:
        import trimesh  # noqa: F401
    except ImportError:
        return _open3d(path)
    return _trimesh(path)


def _trimesh(path: Path) -> _Shape:
    import logging

    import trimesh

    logger = logging.getLogger("trimesh")
    if not logger.handlers:  # or its warnings would be printed
        logger.addHandler(logging.NullHandler())
    try:
        if path.suffix.lower() == ".gltf":
            json.loads(path.read_bytes())  # trimesh would say that a file is missing
        scene: Any = trimesh.load(path, process=False)
    except FileNotFoundError as error:
        raise ValueError(f"a file that it names is missing ({error})") from error
    except Exception as error:  # its loaders have no common class for what is wrong with a file
        raise ValueError(f"it is truncated, or no {path.suffix} file ({type(error).__name__}: {error})") from error
    if not isinstance(scene, trimesh.Scene):
        shapes = [(np.asarray(scene.vertices), np.asarray(getattr(scene, "faces", _NO_FACES)).reshape(-1, 3))]
    else:
        shapes = []
        for node in scene.graph.nodes_geometry:
            transform, name = scene.graph[node]
            shape: Any = scene.geometry[name]
            placed = np.asarray(shape.vertices).reshape(-1, 3) @ transform[:3, :3].T + transform[:3, 3]
            shapes.append((placed, np.asarray(getattr(shape, "faces", _NO_FACES)).reshape(-1, 3)))
    return _merge(shapes)


def _merge(shapes: list[_Shape]) -> _Shape:
    """One shape of several; if any has faces, vertices without them do not count."""
    if any(len(faces) for _, faces in shapes):
        shapes = [shape for shape in shapes if len(shape[1])]
    if not shapes:
        return np.zeros((0, 3)), _NO_FACES
    before = np.cumsum([0, *(len(vertices) for vertices, _ in shapes)])
    faces = np.concatenate([faces + start for (_, faces), start in zip(shapes, before, strict=False)])
    return np.concatenate([vertices.reshape(-1, 3) for vertices, _ in shapes]), faces


def _open3d(path: Path) -> _Shape:
    try:
        import open3d
    except (ImportError, OSError) as error:  # OSError: a system library is missing
        raise DataError(
            f"{path} needs a library that is not installed or does not start ({error}): "
            'pip install "litzoo[points]"; open3d also needs the system packages libusb-1.0-0 libgl1 libegl1'
        ) from error
    with open3d.utility.VerbosityContextManager(open3d.utility.VerbosityLevel.Error):
        if path.suffix.lower() != ".pcd":
            mesh = open3d.io.read_triangle_mesh(path)
            if len(mesh.triangles):
                return np.asarray(mesh.vertices), np.asarray(mesh.triangles)
        return np.asarray(open3d.io.read_point_cloud(path).points), _NO_FACES


_READERS: dict[str, Callable[[Path], _Shape]] = {
    ".obj": _read_obj,
    ".off": _read_off,
    ".ply": _read_ply,
    ".pcd": _read_pcd,
    ".xyz": _read_text,
    ".pts": _read_text,
    ".npy": _read_npy,
    **dict.fromkeys((".stl", ".glb", ".gltf"), _read_with_library),
}
