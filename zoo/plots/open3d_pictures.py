"""Critical sets drawn by Open3D, in a process of its own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import Colormap

from .critical_points import CRITICAL, PALE, body_of, shape_of
from .point_clouds import DEPTH, VIEW, Frame, cloud_of, frame_of

_PIXELS = 1000  # of a picture, each way
_CURE = "install libvulkan1 and mesa-vulkan-drivers, for older versions of Open3D libegl1"


class RenderingError(RuntimeError):
    """Open3D cannot draw on this machine; the message says why in one sentence."""


def render_with_open3d(
    clouds: Sequence[np.ndarray] | np.ndarray, critical: Sequence[np.ndarray], upper: Sequence[np.ndarray] | None, timeout: float = 60.0
) -> list[list[np.ndarray]]:
    """Draw what `plot_critical_points` draws, by Open3D: its argument `pictures`.

    Open3D ends the whole process where a driver is missing, so it runs in another one, without a window.

    Args:
        clouds: M clouds `(N, 3)`.
        critical: M arrays `(K,)` of indices into the cloud.
        upper: M shapes `(L, 3)`, or None.
        timeout: seconds for a picture.

    Returns:
        M times 3 images `(S, S, 3)` of uint8, two without `upper`.

    Raises:
        RenderingError: if Open3D is not installed, finds no driver, crashes or takes longer.

    Example:
        >>> cloud = np.random.rand(512, 3)
        >>> pictures = render_with_open3d([cloud], [np.arange(60)], None)
        >>> plot_critical_points([cloud], [np.arange(60)], None, ["chair"], pictures)
    """
    with tempfile.TemporaryDirectory(prefix="litzoo_") as folder:
        arrays: dict[str, np.ndarray] = {}
        for row, (points, chosen) in enumerate(zip(clouds, critical, strict=True)):
            cloud = cloud_of(points)
            arrays[f"{row}_full"] = cloud
            arrays[f"{row}_critical"] = cloud[np.asarray(chosen)]
            arrays[f"{row}_other"] = np.delete(cloud, np.asarray(chosen), axis=0)
            if upper is not None:
                arrays[f"{row}_upper"] = shape_of(upper[row])
        # Mypy takes the arrays for savez's own keyword, allow_pickle.
        np.savez(Path(folder) / "clouds.npz", **arrays)  # type: ignore[arg-type]
        # Without a screen Mesa draws on the processor.
        environment = {"EGL_PLATFORM": "surfaceless", "OPEN3D_CPU_RENDERING": "true", **os.environ}
        command = [sys.executable, "-m", __name__, folder]
        try:
            done = subprocess.run(
                command, check=False, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout * len(arrays)
            )
        except subprocess.TimeoutExpired as error:
            raise RenderingError(f"Open3D was not ready after {timeout * len(arrays):g} s: {_CURE}") from error
        if done.returncode != 0:
            raise RenderingError(_reason(done.returncode, done.stderr))
        columns = 2 if upper is None else 3
        return [[np.load(Path(folder) / f"{row}_{column}.npy") for column in range(columns)] for row in range(len(clouds))]


def _reason(status: int, errors: str) -> str:
    if "No module named 'open3d'" in errors:
        return "Open3D is not installed: pip install litzoo[points]"
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no message")
    how = f"ended by signal {-status}" if status < 0 else last.removeprefix("RuntimeError: ")[:200].rstrip("!. ")
    return f"Open3D cannot draw on this machine ({how}): {_CURE}"


def _draw(folder: Path) -> None:
    """What the other process does: a picture for each cloud and column."""
    from open3d import geometry, utility
    from open3d.visualization import rendering

    with np.load(folder / "clouds.npz") as file:
        arrays = dict(file)
    renderer = rendering.OffscreenRenderer(_PIXELS, _PIXELS)
    renderer.scene.set_background([1.0, 1.0, 1.0, 1.0])
    renderer.scene.view.set_post_processing(False)

    def picture(layers: list[tuple[np.ndarray, float, np.ndarray]], frame: Frame) -> np.ndarray:
        renderer.scene.clear_geometry()
        for number, (points, size, colors) in enumerate(layers):
            if len(points):
                cloud = geometry.PointCloud(utility.Vector3dVector(points))
                cloud.colors = utility.Vector3dVector(colors[:, :3])
                material = rendering.MaterialRecord()
                # Neither light nor tone mapping of Open3D's, which turn white into beige: the colours hold the light.
                material.shader = "defaultUnlit"
                material.point_size = size
                renderer.scene.add_geometry(str(number), cloud, material)
        middle = frame.middle @ VIEW[:2] + np.mean(frame.depth) * VIEW[2]
        reach = frame.reach
        camera = renderer.scene.camera
        camera.set_projection(camera.Projection.Ortho, -reach, reach, -reach, reach, 0.1 * reach, 20 * reach)
        camera.look_at(middle, middle + 8 * reach * VIEW[2], VIEW[1])
        return np.asarray(renderer.render_to_image())

    for row in range(sum(name.endswith("_full") for name in arrays)):
        cloud, critical, upper = arrays[f"{row}_full"], arrays[f"{row}_critical"], arrays.get(f"{row}_upper")
        frame = frame_of(cloud) if upper is None else frame_of(cloud, upper)
        far, near = frame.depth

        def by_depth(points: np.ndarray, shades: Colormap, far: float = far, near: float = near) -> np.ndarray:
            return shades((points @ VIEW[2] - far) / max(near - far, 1e-12))[:, :3]

        dot = 0.014 * _PIXELS * min(1.5, (2048 / len(cloud)) ** 0.5)
        other = arrays[f"{row}_other"]
        pale = (other, 0.8 * dot, by_depth(other, PALE))
        pictures = [[(cloud, dot, by_depth(cloud, DEPTH))], [pale, (critical, 1.4 * dot, by_depth(critical, CRITICAL))]]
        if upper is not None:
            colors, pitch = body_of(upper) if len(upper) else (np.zeros((0, 4)), 0.0)
            # Neighbours overlap, so that nothing shines through.
            pictures.append([(upper, 1.4 * pitch / (2 * frame.reach) * _PIXELS, colors)])
        for column, layers in enumerate(pictures):
            np.save(folder / f"{row}_{column}.npy", picture(layers, frame))


if __name__ == "__main__":
    _draw(Path(sys.argv[1]))
    # Open3D's own end of a process may crash, after everything is written.
    sys.stdout.flush()
    os._exit(0)
