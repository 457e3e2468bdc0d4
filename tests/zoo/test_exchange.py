"""Files for other programs: PLY as open3d reads it, and a page whose data and script are held against independent readers."""

import base64
import errno
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from litzoo.zoo.plots.exchange import PartScene, Scene, write_html, write_ply

DRAW = np.random.RandomState(0)
CLOUD = DRAW.randn(300, 3) * [1, 2, 0.5] + 7


def scene(name: str = "chair.npy", note: str = "chair 98 %", upper: bool = True) -> Scene:
    return Scene(name, note, CLOUD, np.arange(0, 300, 7), CLOUD[:50] * 1.5 if upper else None)


class Page(HTMLParser):
    """Every tag, what is inside of each script, and whether the tags are closed in order."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        kind = self.tags[-1][1].get("type") or "" if self.tags else ""
        key = f"{self.open[-1]} {kind}".strip() if self.open else ""
        self.texts[key] = self.texts.get(key, "") + text


def test_ply_is_what_open3d_reads(tmp_path: Path) -> None:
    open3d = pytest.importorskip("open3d")
    colors = DRAW.rand(300, 3)
    write_ply(tmp_path / "new" / "cloud.ply", CLOUD, colors)
    read = open3d.io.read_point_cloud(str(tmp_path / "new" / "cloud.ply"))
    np.testing.assert_array_equal(np.asarray(read.points), CLOUD.astype(np.float32))
    np.testing.assert_allclose(np.asarray(read.colors), colors, atol=0.5 / 255 + 1e-6)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cloud.ply"]


def test_ply_is_what_trimesh_reads(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh")
    write_ply(tmp_path / "cloud.ply", CLOUD, np.array([1, 0, 0.2]))
    read = trimesh.load(tmp_path / "cloud.ply")
    np.testing.assert_array_equal(np.asarray(read.vertices, dtype=np.float32), CLOUD.astype(np.float32))
    assert (np.asarray(read.colors)[:, :3] == [255, 0, 51]).all()
    write_ply(tmp_path / "plain.ply", CLOUD)
    assert len(trimesh.load(tmp_path / "plain.ply").vertices) == 300


def test_ply_without_points_and_mistakes(tmp_path: Path) -> None:
    write_ply(tmp_path / "empty.ply", np.zeros((0, 3)))
    assert b"element vertex 0\n" in (tmp_path / "empty.ply").read_bytes()
    with pytest.raises(ValueError, match=r"shape \(points, 3\), got \(5, 2\)"):
        write_ply(tmp_path / "flat.ply", np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"needs colours of the same shape or one of shape \(3,\), got \(4, 3\)"):
        write_ply(tmp_path / "flat.ply", np.zeros((5, 3)), np.zeros((4, 3)))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.ply"]


def test_failed_write_keeps_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cloud.ply"
    write_ply(path, CLOUD)
    before = path.read_bytes()

    def fail(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*cloud\.ply'"):
        write_ply(path, CLOUD)
    assert [file.name for file in tmp_path.iterdir()] == ["cloud.ply"]
    assert path.read_bytes() == before


def test_page_gives_the_points_back(tmp_path: Path) -> None:
    write_html(tmp_path / "page.html", [scene(), scene("table.npy", upper=False)])
    data = json.loads(Page((tmp_path / "page.html").read_text(encoding="utf-8")).texts["script application/json"])
    first, second = data["objects"]
    assert [layer["kind"] for layer in first["layers"]] == ["full", "critical", "upper"]
    assert [layer["kind"] for layer in second["layers"]] == ["full", "critical"]
    wanted = [CLOUD, CLOUD[::7], CLOUD[:50] * 1.5]
    for layer, points in zip(first["layers"], wanted, strict=True):
        bits = np.frombuffer(base64.b64decode(layer["points"]), dtype="<i2").reshape(-1, 3)
        assert layer["count"] == len(points) == len(bits)
        found = bits / 32767 * first["reach"] + first["middle"]
        np.testing.assert_allclose(found, points, atol=0.51 * first["reach"] / 32767)
        assert np.linalg.norm(bits / 32767, axis=1).max() <= 1.0001, "nothing leaves the picture while it turns"


def test_page_needs_no_network(tmp_path: Path) -> None:
    write_html(tmp_path / "page.html", [scene()])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|//\w+\.\w+|\bimport\b|fetch\(|XMLHttpRequest|url\(", text)
    assert all(not {"src", "href"} & set(attributes) for _, attributes in page.tags)
    assert "{{" not in text
    assert "prefers-color-scheme: dark" in text


def test_names_cannot_break_out(tmp_path: Path) -> None:
    evil = "</script><script>alert('1')</script><b>&\"{{DATA}}"
    write_html(tmp_path / "page.html", [scene(evil, evil)], title="</title><i>&{{DATA}}")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    (made,) = json.loads(page.texts["script application/json"])["objects"]
    assert (made["name"], made["note"]) == (evil, evil)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert {"i", "b"}.isdisjoint(tag for tag, _ in page.tags)
    assert page.texts["title"] == "</title><i>&{{DATA}}"
    write_html(tmp_path / "page.html", [scene("not text: \udcff")])
    with pytest.raises(ValueError, match="at least one object"):
        write_html(tmp_path / "none.html", [])
    assert not (tmp_path / "none.html").exists()


# A browser's part in a few lines: enough to run the page's script, to look at the picture, and to press its buttons.
BROWSER = """
const fs = require("fs"), [page] = process.argv.slice(2), text = fs.readFileSync(page, "utf8");
const scripts = [...text.matchAll(/<script([^>]*)>([\\s\\S]*?)<\\/script>/g)].map(match => match[2]);
let picture = null; const frames = [];
function element(tag) {
  const made = { tag, children: [], listeners: {}, style: {}, attributes: {}, textContent: "", classList: { add() {}, remove() {} } };
  made.appendChild = child => { made.children.push(child); return child; };
  made.addEventListener = (name, run) => { made.listeners[name] = run; };
  made.setAttribute = (name, value) => { made.attributes[name] = value; };
  return made;
}
const found = { canvas: element("canvas"), nav: element("nav"), fieldset: element("fieldset"), p: element("p") };
Object.assign(found.fieldset, { offsetLeft: 4, offsetTop: 70, offsetWidth: 30, offsetHeight: 16 });
Object.assign(found.p, { offsetTop: 0, offsetHeight: 0 });
Object.assign(found.canvas, { clientWidth: 120, clientHeight: 90, setPointerCapture() {}, getContext: () => ({
  createImageData: (width, height) => ({ data: new Uint8ClampedArray(4 * width * height) }),
  putImageData: image => { picture = Uint8ClampedArray.from(image.data); } }) });
global.window = { devicePixelRatio: 1, matchMedia: () => ({ matches: false, addEventListener() {} }), addEventListener() {},
  requestAnimationFrame: run => frames.push(run), setTimeout: () => 0, clearTimeout() {} };
global.document = { getElementById: () => ({ textContent: scripts[0] }), querySelector: name => found[name],
  querySelectorAll: () => found.nav.children, createElement: element, createTextNode: text => ({ text }) };
new Function(scripts[1])();
function seen() {
  while (frames.length) frames.shift()();
  let red = 0, blue = 0, any = 0, outside = 0;
  for (let i = 0; i < picture.length; i += 4) {
    const wide = found.canvas.width, fine = wide / found.canvas.clientWidth, ink = picture[i] + picture[i + 1] + picture[i + 2] < 740;
    const x = (i / 4) % wide / fine, y = Math.floor(i / 4 / wide) / fine, legend = x < 34 && y > found.fieldset.offsetTop;
    if (ink) any++;
    if (ink && (Math.min(x, y, found.canvas.clientWidth - x, found.canvas.clientHeight - y) < 10 || legend)) outside++;
    if (picture[i] > picture[i + 2] + 60) red++;
    if (picture[i + 2] > picture[i] + 60) blue++;
  }
  return { any, red, blue, outside, dots: found.fieldset.children.map(label => label.children[1].style.background), pixels: picture.length / 4 };
}
const toggle = place => { const box = found.fieldset.children[place].children[0]; box.checked = !box.checked; box.listeners.change(); };
const result = { buttons: found.nav.children.map(button => button.textContent), start: seen() };
toggle(1); result.full = seen();
toggle(0); result.nothing = seen();
if (!found.fieldset.children[2]) { console.log(JSON.stringify(result)); process.exit(0); }
toggle(2); result.upper = seen(); const before = picture;
found.canvas.listeners.pointerdown({ pointerId: 1, clientX: 10, clientY: 10 });
found.canvas.listeners.pointermove({ pointerId: 1, clientX: 60, clientY: 10 });
found.canvas.listeners.pointerup({ pointerId: 1 });
result.aside = seen(); result.turned = picture.length !== before.length || picture.some((value, i) => value !== before[i]);
found.canvas.listeners.wheel({ preventDefault() {}, deltaY: 200, deltaMode: 0 }); result.small = seen();
found.canvas.listeners.dblclick();
found.canvas.clientWidth = 70; found.canvas.clientHeight = 100; found.fieldset.offsetTop = 80; result.narrow = seen();
found.nav.children[1].listeners.click(); toggle(0); result.second = seen();
console.log(JSON.stringify(result));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_of_the_page_draws(tmp_path: Path) -> None:
    write_html(tmp_path / "page.html", [scene(), scene("table.npy", upper=False)])
    (tmp_path / "browser.js").write_text(BROWSER, encoding="utf-8")
    done = subprocess.run(["node", "browser.js", "page.html"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["buttons"] == ["chair.npy ", "table.npy "]
    assert result["start"]["pixels"] == 240 * 180, "fine while it rests"
    assert result["start"]["red"] > 20, "the critical points are red"
    assert result["full"]["red"] == 0
    assert result["full"]["blue"] > 20, "the cloud alone is blue"
    assert result["nothing"]["any"] == 0
    assert result["upper"]["any"] > 100
    assert result["turned"]
    for shown in ("start", "full", "upper", "aside", "narrow"):
        assert result[shown]["outside"] == 0, f"{shown}: the object keeps clear of the edges and of the legend"
    grey, blue = "rgb(188,197,207)", "rgb(42,103,168)"
    assert [result[shown]["dots"][0] for shown in ("start", "full", "nothing")] == [grey, blue, blue], "the legend says what is drawn"
    assert result["small"]["any"] > 0
    assert result["second"]["blue"] > 20


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_parts_have_their_colours_on_the_page(tmp_path: Path) -> None:
    """The first part of the palette is blue; another one is orange, which counts as red here; each is hidden by its own box."""
    part = np.repeat([0, 1], 150)
    write_html(tmp_path / "page.html", [PartScene("chair", "Chair", CLOUD, part, ["leg", "seat", "arm"])], "Parts")
    (made,) = json.loads(Page((tmp_path / "page.html").read_text(encoding="utf-8")).texts["script application/json"])["objects"]
    assert [(layer["name"], layer["count"]) for layer in made["layers"]] == [("leg", 150), ("seat", 150)]
    assert [layer["color"] for layer in made["layers"]] == [[47, 111, 178], [224, 142, 43]]
    (tmp_path / "browser.js").write_text(BROWSER, encoding="utf-8")
    done = subprocess.run(["node", "browser.js", "page.html"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert min(result["start"]["red"], result["start"]["blue"]) > 20
    assert result["full"]["red"] == 0
    assert result["full"]["blue"] > 20
    assert result["nothing"]["any"] == 0
