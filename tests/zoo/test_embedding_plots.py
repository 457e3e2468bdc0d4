"""Maps of features: colours that differ for everybody, names that do not cover one another, a page that holds every sample."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from litzoo.zoo.plots import embedding as plots
from litzoo.zoo.plots.embedding import EmbeddingMap, class_palette, plot_embedding, write_embedding_html

DRAW = np.random.RandomState(0)
EVIL = "</script><b>&\"'"


def make_map(samples: int = 40, classes: int = 4, **changes: Any) -> EmbeddingMap:
    made = EmbeddingMap("model", "a note", DRAW.randn(samples, 2), np.arange(samples) % classes, np.arange(samples) + 7)
    return made._replace(**changes)


def content(page: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(text)


def test_colours_differ_for_the_colour_blind() -> None:
    codes = class_palette(100)
    assert len(set(codes)) == 100
    assert codes[:10] == class_palette(10)
    seen = plots._as_seen(np.array([to_rgb(code) for code in codes]))
    for number, least in ((6, 0.075), (10, 0.075), (20, 0.05)):
        apart = np.linalg.norm(seen[:, :number, None] - seen[:, None, :number], axis=-1) + 9 * np.eye(number)
        assert apart.min() > least
    grey = plots._as_seen(np.full((1, 3), 0.5))
    assert np.abs(grey - grey[:1]).max() < 1e-3, "grey looks grey to everybody"


def test_every_class_has_its_name(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(5)]
    made = make_map(40, 4, wrong=np.arange(40) < 3, label=np.arange(40) % 4 - (np.arange(40) < 2))
    figure = plot_embedding([made, made._replace(title="other", wrong=None), make_map(1, 1)], names)
    first, second, third = figure.axes[:3]
    assert [text.get_text() for text in first.texts] == names[:4]
    assert [text.get_text() for text in third.texts] == names[:1]
    assert sum(len(scatter.get_offsets()) for scatter in first.collections) == 43, "the marks are drawn above"
    assert sum(len(scatter.get_offsets()) for scatter in second.collections) == 40
    assert np.array_equal(first.collections[0].get_facecolor(), second.collections[0].get_facecolor())
    written = {text.get_text() for text in figure.texts}
    assert {"model", "a note", "other", "no label", "its nearest neighbour is of another class"} <= written
    figure.canvas.draw()


def test_all_alike_is_drawn() -> None:
    made = make_map(place=np.zeros((40, 2)), label=np.full(40, -1))
    plot_embedding([made], []).canvas.draw()
    plot_embedding([make_map(place=np.zeros((40, 2)))], list("abcd")).canvas.draw()


def test_names_cover_none_of_a_few_points() -> None:
    axes = plot_embedding([make_map(2, 2, place=np.array([[0.0, 0.0], [1.0, 6.0]]))], ["a", "b"]).axes[0]
    (low, high), (a, b) = axes.collections[0].get_offsets()[np.argsort(axes.collections[0].get_offsets()[:, 1])], axes.texts
    assert a.get_position()[1] > low[1] + 0.15
    assert b.get_position()[1] < high[1] - 0.15, "there is no room above"


def test_names_are_drawn_as_they_are() -> None:
    """Dollars begin no formula, and names of folders need not be text."""
    names = ["$5 and $6", "$\\frac$", "caf\udce9", EVIL]
    figure = plot_embedding([make_map(title="$\\frac$", note="caf\udce9" * 99)], names)
    figure.canvas.draw()
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == ["$5 and $6", "$\\frac$", "caf?", "</script><b>&\"'"]
    assert not any(text.get_parse_math() for text in (*texts, *figure.texts))


def test_thousands_of_classes() -> None:
    label = np.concatenate([np.arange(3000), np.repeat(np.arange(2800, 2950), 2)])
    names = [f"class {number}" for number in range(3000)]
    figure = plot_embedding([make_map(len(label), label=label)], names)
    assert [text.get_text() for text in figure.axes[0].texts] == names[2800:2950], "the largest ones"
    assert len(set(class_palette(3000))) == 256


def test_names_do_not_cover_one_another() -> None:
    places = np.concatenate([DRAW.rand(60, 2) * 6, np.full((10, 2), 3.0), [[0, 0], [6, 6]]])
    sizes = np.tile([0.5, 0.15], (len(places), 1))
    moved = plots._apart(places, sizes, 6.0)
    gap = np.abs(moved[:, None] - moved) - sizes + 9 * np.eye(len(places))[..., None]
    assert (gap.max(axis=2) > -1e-3).all()
    assert (moved >= sizes / 2 - 1e-9).all()
    assert (moved <= 6 - sizes / 2 + 1e-9).all()
    assert plots._apart(np.array([[0.0, 6.0]]), sizes[:1], 6.0)[0] == pytest.approx([0.25, 5.925]), "one alone stays inside, too"


def test_page_holds_every_sample(tmp_path: Path) -> None:
    images = DRAW.randint(0, 256, (40, 8, 6, 3), dtype=np.uint8)
    first = make_map(images=images, wrong=np.arange(40) % 20 == 1)
    second = make_map(label=np.full(40, -1), images=images, title=EVIL, note=EVIL)
    names = ["cat", EVIL, "c", "d"]
    page = tmp_path / "new" / "map.html"
    write_embedding_html(page, [first, second], names, EVIL)
    text = page.read_text(encoding="utf-8")
    found = content(page)
    assert "<b>" not in text
    assert text.count("</script>") == 2
    assert "{{" not in text
    assert not re.findall(r"(?:src|href)=|https?://", text), "it loads nothing"
    assert [each["name"] for each in found["classes"]] == names
    assert [each["color"] for each in found["classes"]] == list(class_palette(4))
    for each, given in zip(found["maps"], (first, second), strict=True):
        place = np.array(each["place"]).reshape(-1, 2)
        assert np.abs(place).max() == pytest.approx(1)
        reach = np.ptp(given.place, axis=0).max() / 2
        assert np.allclose(place * reach, given.place - (given.place.max(0) + given.place.min(0)) / 2, atol=1e-3)
        assert each["label"] == given.label.tolist()
        assert each["index"] == given.index.tolist()
    assert found["maps"][0]["wrong"] == [1, 21]
    assert found["maps"][1]["title"] == EVIL
    assert [each["sheet"] for each in found["maps"]] == [0, 0], "maps of the same images share them"
    (sheet,) = found["sheets"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet["png"]))))
    for number, image in enumerate(images):
        row, column = (sheet["side"] * place for place in divmod(number, sheet["columns"]))
        assert np.array_equal(pixels[row : row + 8, column + 1 : column + 7], image)


def test_thumbnails_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = DRAW.rand(40, 100, 80, 1)
    write_embedding_html(tmp_path / "a.html", [make_map(images=images)], list("abcd"), "")
    assert content(tmp_path / "a.html")["sheets"][0]["side"] == 32
    monkeypatch.setattr(plots, "_PIXELS", 40 * 10 * 10)
    write_embedding_html(tmp_path / "b.html", [make_map(images=images)], list("abcd"), "")
    sheet = content(tmp_path / "b.html")["sheets"][0]
    assert sheet["side"] == 10
    picture = Image.open(io.BytesIO(base64.b64decode(sheet["png"])))
    assert picture.mode == "L"
    assert picture.size == (70, 60)


# What the script of the page needs of a browser.
_BROWSER = """
const drawn = [];
function element() {
  return { style: {}, children: [], listeners: {}, attributes: {}, classList: { add() {}, remove() {} }, clientWidth: 400, clientHeight: 400,
    offsetWidth: 50, offsetHeight: 20, textContent: "",
    addEventListener(name, call) { this.listeners[name] = call; }, setAttribute(name, value) { this.attributes[name] = value; },
    append(...others) { this.children.push(...others); }, replaceChildren() { this.children = []; }, setPointerCapture() {},
    getBoundingClientRect() { return { left: 0, top: 0 }; },
    getContext() { return new Proxy({}, { get: (_, name) => (...values) => drawn.push([name, ...values]), set: () => true }); },
    querySelector(name) { return known[name] || (known[name] = element()); } };
}
const known = {};
const document = { documentElement: {}, createElement: element, querySelector: (name) => known[name] || (known[name] = element()),
  getElementById: (name) => known["#" + name] || (known["#" + name] = element()) };
const window = { matchMedia: () => element(), addEventListener() {}, devicePixelRatio: 1 };
const getComputedStyle = () => ({ getPropertyValue: () => "#000" });
const requestAnimationFrame = (call) => call();
class Image {}
document.getElementById("data").textContent = require("fs").readFileSync(process.argv[2], "utf8");
"""
_CHECKS = """
const dots = () => { drawn.length = 0; known["#map > canvas"].listeners.keydown({ key: "-", preventDefault() {} });
  return new Set(drawn.filter((each) => each[0] === "arc").map(String)).size; };
const press = (number, name) => known.aside.children[number].listeners[name]();
const result = { first: dots(), legend: known.aside.children.map((each) => each.title) };
press(0, "click");
result.without = dots();
press(1, "dblclick");
result.alone = dots();
press(1, "dblclick");
result.all = dots();
known["#map > canvas"].listeners.dblclick();
const maps = JSON.parse(known["#data"].textContent).maps;
known["#map > canvas"].listeners.pointermove({ clientX: 200 + 188 * maps[0].place[0], clientY: 200 - 188 * maps[0].place[1] });
result.tip = known.div.textContent;
known.nav.children[1].listeners.click();
result.note = known["#note"].textContent;
console.log(JSON.stringify(result));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the script of the page")
def test_script_of_the_page(tmp_path: Path) -> None:
    place = np.stack([np.cos(np.arange(8)), np.sin(np.arange(8))], axis=1) * 0.01
    first = make_map(8, 4, place=place)
    write_embedding_html(tmp_path / "map.html", [first, first._replace(note=EVIL)], ["a", EVIL, "c", "d"], "")
    (script,) = re.findall(r"<script>\n(.*?)</script>", (tmp_path / "map.html").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "page.js").write_text(_BROWSER + script + _CHECKS)
    (tmp_path / "data.json").write_text(json.dumps(content(tmp_path / "map.html")))
    ran = subprocess.run(["node", tmp_path / "page.js", tmp_path / "data.json"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["legend"] == ["a", EVIL, "c", "d"]
    assert (found["first"], found["without"], found["alone"], found["all"]) == (8, 6, 2, 8)
    assert found["tip"] == "a · number 7"
    assert found["note"] == EVIL


def test_mistakes(tmp_path: Path) -> None:
    names = list("abcd")
    for maps, words in (
        ([], "no map"),
        ([make_map(place=np.zeros((40, 3)))], r"place \(N, 2\)"),
        ([make_map(label=np.zeros(39, int))], "39"),
        ([make_map(images=np.zeros((3, 8, 8, 1)))], "3 of the others"),
        ([make_map(place=np.full((40, 2), np.nan))], "finite"),
        ([make_map(40, 5)], "labels up to 4, but 4 names"),
    ):
        with pytest.raises(ValueError, match=words):
            plot_embedding(maps, names)
        with pytest.raises(ValueError, match=words):
            write_embedding_html(tmp_path / "map.html", maps, names, "")
    assert not list(tmp_path.iterdir())
