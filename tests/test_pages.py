"""Pages: what strangers wrote is text, in any place; the gallery works in a browser without network."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_fixtures import HOSTILE, every_picture_is_there, jpeg

from openclip_otco.audit import table
from openclip_otco.audit.marks import Marks
from openclip_otco.pages import page as pages
from openclip_otco.pages.chart import Chart, heat, thinned
from openclip_otco.pages.gallery import Estimate, Suspect, by_picture, write_gallery
from openclip_otco.pages.page import percent

FACTS: dict[str, str | int | float] = {"pairs": 31_000, "AUROC": 0.98765, "data": "train/{0000..0007}.tar"}
ESTIMATE = Estimate(30_000, 0.4012, 0.382, 0.42, [12_000, 0, 3_000, 15_000])
WORDS = ("a red star", "two blue rings", "a green cross")


def suspects(count: int = 12, captions: tuple[str, ...] = WORDS) -> list[Suspect]:
    return [
        Suspect(
            rank=i + 1,
            key=f"key{(i * 7) % count:04d}",
            shard=f"{i % 3:04d}.tar",
            caption=captions[i % len(captions)],
            probability=(i + 1) ** 2 / count**2,
            structure=math.sin(i * 1.3),
            cosine=math.cos(i * 2.1),
            best_key=f"key{i:04d}",
            best_caption=captions[(i + 1) % len(captions)],
            thumbnail=jpeg((i * 37 % 256, 90, 60)) + bytes(str(i), "ascii"),  # no two pictures are one file
        )
        for i in range(count)
    ]


def gallery(folder: Path, pairs: list[Suspect], title: str = "Audit") -> Path:
    write_gallery(folder / "out" / "gallery.html", pairs, ESTIMATE, FACTS, title)
    return folder / "out" / "gallery.html"


class Parsed(HTMLParser):
    """Tags, attributes and text of a page, as any HTML parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("caption", HOSTILE)
def test_what_strangers_wrote_is_text(tmp_path, caption):
    """In every place where it stands, the page has the tags and attributes that it has with harmless text."""
    harmless, hostile = (
        Parsed(pages.render("gallery", title=text, estimate=ESTIMATE, facts={text: text}, pictures=[
            [Suspect(1, text, text, text, 0.1, 0.2, 0.3, text, text, jpeg())]
        ])) for text in ("harmless", caption)
    )  # fmt: skip
    assert hostile.tags == harmless.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
    assert hostile.tags.count("script") == 1
    alts = [value for name, value in hostile.attributes if name == "alt"]
    assert alts == [f"Picture captioned: {caption}"]


@settings(max_examples=50, deadline=None)
@given(caption=st.text(max_size=40))
def test_any_text_is_text(caption):
    text = pages.render(
        "gallery",
        title="t",
        estimate=ESTIMATE,
        facts={},
        pictures=[[Suspect(1, "k", "s", caption, 0, 0, 0, "b", caption, b"")]],
    )
    assert [value for name, value in Parsed(text).attributes if name == "alt"] == [
        # What a parser makes of line ends and NUL in an attribute.
        f"Picture captioned: {caption}"
    ]


def test_a_page_needs_nothing_but_itself(tmp_path):
    text = gallery(tmp_path, suspects()).read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert not re.search(r"https?://|@import|url\(", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    assert "unsafe" not in policy[1]


def test_captions_that_utf8_cannot_spell_are_written(tmp_path):
    path = gallery(tmp_path, suspects(2, ("lone \ud800 surrogate",)))
    assert "lone ? surrogate" in path.read_text(encoding="utf-8")


def test_a_page_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = gallery(tmp_path, suspects(2))
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        gallery(tmp_path, suspects(4))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("value", "shown"), [(31000, "31,000"), (0.000123456, "0.0001235"), (math.nan, "nan"), ("a.tar", "a.tar"),
                         (True, "True")]
)  # fmt: skip
def test_numbers_for_reading(value, shown):
    assert pages.number(value) == shown


def test_a_chart_keeps_its_points_within_the_frame_and_in_order():
    chart = Chart.of("t", "a", {"x": {step: math.sin(step) for step in range(50)}, "none": {}})
    assert chart is not None
    (line,) = chart.lines
    placed = chart.placed(line)
    assert [x for x, _ in placed] == sorted(x for x, _ in placed)
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in placed)
    highest = max(line.points, key=lambda point: point[1])
    assert placed[line.points.index(highest)][1] == chart.top
    assert all(chart.left <= tick.at <= chart.right for tick in chart.x_ticks)
    assert len(chart.y_ticks) >= 2
    assert "lowest -1, highest 0.9" in chart.summary()


def test_a_chart_breaks_where_a_value_is_missing():
    chart = Chart.of("t", "a", {"x": {0: 1.0, 1: math.nan, 2: 2.0, 3: 3.0}})
    assert chart is not None
    assert [part[0] for part in re.findall(r"[ML][^ML]+", chart.path(chart.lines[0]))] == ["M", "M", "L"]
    assert Chart.of("t", "a", {"x": {0: math.nan}}) is None


@given(st.integers(0, 5000))
def test_thinned_points_are_some_of_them_with_the_last(count):
    points = [(float(i), 0.0) for i in range(count)]
    left = thinned(points)
    assert len(left) <= 800
    assert set(left) <= set(points)
    assert left[-1:] == tuple(points[-1:])


@pytest.mark.parametrize("finite", [[0], [1], [0, 1], [900]])
def test_a_run_that_diverged_early_has_its_chart(finite):
    chart = Chart.of("t", "a", {"x": {step: 1.0 if step in finite else math.nan for step in range(1602)}})
    assert chart is not None
    assert f"1 at {finite[-1]}" in chart.summary() or f"1 at step {finite[-1]}" in chart.summary()


def test_a_heat_map_has_a_cell_for_each_value_and_the_ends_of_the_scale():
    cells = heat([[0.0, 0.5], [2.0, 1.0]], [["a", "b"], ["c", "d"]], 0.0, 1.0)
    assert [(cell.row, cell.column, cell.title) for cell in cells] == [
        (0, 0, "a"), (0, 1, "b"), (1, 0, "c"), (1, 1, "d")
    ]  # fmt: skip
    assert cells[0].colour == "#440154"  # viridis' ends, as its authors give them
    assert cells[2].colour == cells[3].colour == "#fde725"


def keys(page) -> list[str]:
    return page.eval_on_selector_all(".pair", "pairs => pairs.filter(p => p.checkVisibility()).map(p => p.dataset.key)")


def test_pictures_are_there(tmp_path, visit):
    page = visit(gallery(tmp_path, suspects()))
    assert page.title() == "Audit"
    assert every_picture_is_there(page) == 12
    assert page.locator("dd", has_text="31,000").count() == 1
    assert page.locator("#count").inner_text() == "12 of 12 pairs"


@pytest.mark.parametrize(
    ("order", "by"),
    [
        ("rank", lambda pair: pair.rank),
        ("-rank", lambda pair: -pair.rank),
        ("structure", lambda pair: pair.structure),
        ("cosine", lambda pair: pair.cosine),
        ("-cosine", lambda pair: -pair.cosine),
        ("key", lambda pair: pair.key),
    ],
)
def test_sorting(tmp_path, visit, order, by):
    pairs = suspects()
    page = visit(gallery(tmp_path, pairs))
    page.select_option("#order", order)
    assert keys(page) == [pair.key for pair in sorted(pairs, key=by)]


def test_filtering_and_the_threshold(tmp_path, visit):
    pairs = suspects()
    page = visit(gallery(tmp_path, pairs))
    page.fill("#filter", "KEY0003")
    assert keys(page) == [pair.key for pair in pairs if "key0003" in (pair.key, pair.best_key)]
    page.fill("#filter", "star red")
    assert len(keys(page)) == sum("a red star" in (pair.caption, pair.best_caption) for pair in pairs)
    page.fill("#filter", "no such words")
    assert page.locator("#none").is_visible()
    assert page.locator("#count").inner_text() == "0 of 12 pairs"
    page.fill("#filter", "")
    page.locator("#threshold").fill("5")
    assert keys(page) == [pair.key for pair in pairs[:5]]
    assert page.locator("#limit").inner_text() == f"{100 * pairs[4].probability:.2g} %"
    # In the histogram's own units: ten for each bin.
    assert float(page.locator("#cut").get_attribute("x1")) == pytest.approx(40 * pairs[4].probability, rel=1e-6)
    assert page.locator("#count").get_attribute("aria-live") == "polite"


def test_the_keys_of_the_pairs_in_sight_can_be_saved(tmp_path, visit):
    pairs = suspects()
    page = visit(gallery(tmp_path, pairs))
    page.locator("#threshold").fill("3")
    page.select_option("#which", "shown")
    with page.expect_download() as download:
        page.click("#save")
    assert Path(download.value.path()).read_text().split() == [pair.key for pair in pairs[:3]]


def several_captions() -> list[Suspect]:
    """Six pairs of two pictures, which take turns."""
    return [replace(pair, thumbnail=jpeg((0, 200 * (index % 2), 0))) for index, pair in enumerate(suspects(6))]


def test_pairs_stand_by_picture(tmp_path, visit):
    pairs = several_captions()
    assert by_picture(pairs) == [pairs[::2], pairs[1::2]]
    page = visit(gallery(tmp_path, pairs))
    assert page.locator(".card").count() == every_picture_is_there(page) == 2
    assert keys(page) == [pair.key for pair in pairs[::2] + pairs[1::2]]
    page.select_option("#order", "-rank")
    assert keys(page) == [pair.key for pair in pairs[::-2] + pairs[-2::-2]]
    page.fill("#filter", pairs[0].key)
    named = [pair.key for pair in pairs[::-2] + pairs[-2::-2] if pairs[0].key in (pair.key, pair.best_key)]
    assert keys(page) == named


def test_marks_are_saved_and_outlive_the_visit(tmp_path, visit):
    pairs = several_captions()
    page = visit(gallery(tmp_path, pairs))
    page.locator(".pair").nth(1).get_by_role("button", name="Drop").click()
    page.keyboard.press("Home")
    page.keyboard.press("d")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("k")
    shown = keys(page)
    assert page.locator("#count").inner_text() == "6 of 6 pairs, 2 to drop, 1 to keep"
    page.reload()
    for which, expected in (("drop", {shown[0], shown[1]}), ("keep", {shown[2]})):
        page.select_option("#which", which)
        with page.expect_download() as download:
            page.click("#save")
        assert set(Path(download.value.path()).read_text().split()) == expected
    # The same key once more takes the mark away.
    page.locator(".pair").first.focus()
    page.keyboard.press("d")
    assert page.locator("#count").inner_text() == "6 of 6 pairs, 1 to drop, 1 to keep"


def test_an_audit_reads_the_marks_that_the_page_saves(tmp_path, visit):
    captions = (*HOSTILE, "two\r\nlines", "a \u2028 line separator", "a dog")
    pairs = suspects(len(captions), captions)
    page = visit(gallery(tmp_path, pairs))
    for number, pair in enumerate(pairs):
        page.locator(".pair").nth(number).get_by_role("button", name="Drop" if pair.rank % 2 else "Keep").click()
    with page.expect_download() as download:
        page.click("#save")
    saved = Path(download.value.path())
    assert download.value.suggested_filename == "marks.jsonl"
    assert len(saved.read_text().split("\n")) == len(pairs) + 1
    rows = [
        dict.fromkeys(table.PART.names)
        | {"key": pair.key, "shard": pair.shard, "caption": pair.caption.encode("utf-8", "replace").decode()}
        | {"probability": 0.0, "evidence": 0.0, "shard_number": 0, "sample": pair.rank, "line": 0}
        for pair in pairs
    ]
    table.write(tmp_path / "part.parquet", rows, table.PART)
    assert Marks(saved).places([tmp_path / "part.parquet"]) == {(0, pair.rank, 0): pair.rank % 2 == 0 for pair in pairs}


def test_the_page_says_how_many_pairs_are_wrong(tmp_path, visit):
    page = visit(gallery(tmp_path, suspects()))
    said = " ".join(page.locator(".estimate").inner_text().split())
    assert said.startswith("About 12,036 of 30,000 pairs do not belong together: 40 %, with a probability of 95 %")
    heights = page.eval_on_selector_all(
        ".histogram rect", "bars => bars.map(bar => Number(bar.getAttribute('height')))"
    )
    assert heights == pytest.approx([48 * 0.8**0.5, 0, 48 * 0.2**0.5, 48], abs=0.01)
    assert page.locator(".likely").first.inner_text().startswith("0.69 % likely")


def test_without_a_trained_model_there_is_no_cosine(tmp_path, visit):
    page = visit(gallery(tmp_path, [replace(pair, cosine=None) for pair in suspects()]))
    assert page.locator("option[value=cosine]").count() == 0
    assert "cosine" not in page.locator(".where").first.inner_text()


def test_the_keyboard_is_enough(tmp_path, visit):
    page = visit(gallery(tmp_path, suspects()))
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "filter"
    page.keyboard.type("ring")
    assert len(keys(page)) == 8
    page.keyboard.press("Escape")
    assert len(keys(page)) == 12
    for _ in range(4):  # the slider, which keys, the button, and then the first pair
        page.keyboard.press("Tab")
    focused = "document.activeElement.dataset.key"
    assert page.evaluate(focused) == keys(page)[0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == keys(page)[2]
    page.keyboard.press("End")
    assert page.evaluate(focused) == keys(page)[-1]
    page.keyboard.press("Home")
    assert page.evaluate(focused) == keys(page)[0]


def test_a_caption_that_is_a_script_does_not_run(tmp_path, visit):
    pairs = suspects(len(HOSTILE), HOSTILE)
    page = visit(gallery(tmp_path, pairs, title=HOSTILE[1]))
    assert every_picture_is_there(page) == len(HOSTILE)
    assert page.locator(".own").first.inner_text().endswith("<script>alert(1)</script>")
    assert page.locator("script").count() == 1
    page.fill("#filter", "<script>")
    assert len(keys(page)) == 3


def test_a_script_that_got_in_would_not_run(tmp_path, browser):
    """The second wall: the policy refuses what the escaping would have let through."""
    path = gallery(tmp_path, suspects(1))
    hole = "<script>window.ran = true</script><img src='https://example.invalid/x.png' onerror='window.ran = true'>"
    path.write_text(path.read_text().replace("</main>", f"{hole}</main>"))
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("window.ran") is None
    assert page.locator("#count").inner_text() == "1 of 1 pairs"
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_light_and_dark(tmp_path, visit, theme):
    page = visit(gallery(tmp_path, suspects(1)), theme)
    ground = "getComputedStyle(document.body).backgroundColor"
    bright, dark = "rgb(246, 246, 243)", "rgb(20, 22, 26)"
    before, after = (bright, dark) if theme == "light" else (dark, bright)
    assert page.evaluate(ground) == before
    page.click("#theme")
    assert page.evaluate(ground) == after
    # The browser stores the choice some time after the click, later if the machine is busy.
    for _ in range(100):
        page.reload()
        if page.evaluate(ground) == after:
            break
        page.wait_for_timeout(50)
    assert page.evaluate(ground) == after


def test_a_thousand_suspects(tmp_path, visit):
    pairs = suspects(1000)
    page = visit(gallery(tmp_path, pairs))
    page.select_option("#order", "-cosine")
    assert keys(page) == [pair.key for pair in sorted(pairs, key=lambda pair: -pair.cosine)]
    assert page.locator("#count").inner_text() == "1,000 of 1,000 pairs"


def test_no_suspects(tmp_path, visit):
    page = visit(gallery(tmp_path, []))
    assert page.locator(".note").inner_text() == "There are no pairs to show."


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (0.0, "0 %"),
        (6.5e-7, "less than 0.1 %"),
        (0.0012, "0.12 %"),
        (0.123, "12 %"),
        (0.9951, "99.51 %"),
        (1.0, "100 %"),
    ],
)
def test_percentages_claim_no_more_than_is_known(share, told):
    assert percent(share) == told
