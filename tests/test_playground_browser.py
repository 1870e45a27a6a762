"""The playground in a real browser: Debian's Chromium, driven by Playwright, over stand-ins."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from browser import chromium
from playground_server import playground

from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.tools.toolbox import Toolbox

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Browser, Locator, Page, expect

expect.set_options(timeout=30_000)
MASK_PIXELS = """async (image) => {
    await image.decode();
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    return [canvas.width, canvas.height, Array.from(data.filter((_, n) => n % 4 === 3))];
}"""


@dataclass
class PausingMllm(TruthfulMllm):
    """Waits before it answers about points, until a test lets it go on."""

    go_on: threading.Event = field(default_factory=threading.Event)

    def answer_yes_no(self, *arguments, **options):
        assert self.go_on.wait(60)
        return super().answer_yes_no(*arguments, **options)


@pytest.fixture(scope="module")
def mllm(truth) -> PausingMllm:
    return PausingMllm(truth)


@pytest.fixture(scope="module")
def standing_in(mllm) -> Sam4MLLM:
    return Sam4MLLM(mllm, ColourSegmenter())


@pytest.fixture(scope="module")
def address(standing_in) -> Iterator[str]:
    with playground(standing_in) as url:
        yield url


@pytest.fixture(scope="module")
def running_chromium() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def new_page(running_chromium, address, mllm):
    """Opens the playground in a browser session of its own; no page may have errors."""
    mllm.go_on.set()
    contexts, errors = [], []

    def opened(**options) -> Page:
        context = running_chromium.new_context(
            **{"viewport": {"width": 1300, "height": 900}, **options}
        )
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        expect(page.locator("body[data-ready]")).to_be_attached()
        return page

    yield opened
    mllm.go_on.set()
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def page(new_page) -> Page:
    return new_page()


@pytest.fixture(scope="module")
def blocks_png(blocks) -> dict:
    buffer = io.BytesIO()
    blocks.pil.save(buffer, "PNG")
    return {"name": "blocks.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def open_blocks(page: Page, blocks_png: dict) -> None:
    page.locator("#file").set_input_files(blocks_png)
    expect(page.locator("#status")).to_contain_text("blocks.png: 200 × 120 pixels.")


def segment(page: Page, expression: str) -> None:
    """Type an expression and press Enter; returns when the answer is there."""
    page.get_by_label("What should be found?").fill(expression)
    page.keyboard.press("Enter")
    idle(page)


def idle(page: Page) -> None:
    expect(page.locator("#cancel")).to_be_hidden()


def choose_tool(page: Page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).check()


def stage(page: Page, number: int = 0) -> Locator:
    return page.locator(".stage").nth(number)


def on_screen(page: Page, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the 200 × 120 picture is on the screen."""
    stage(page).scroll_into_view_if_needed()
    area = stage(page).bounding_box()
    return area["x"] + x / 200 * area["width"], area["y"] + y / 120 * area["height"]


def click(page: Page, x: float, y: float) -> None:
    page.mouse.click(*on_screen(page, x, y))
    idle(page)


def mask_pixels(page: Page, object_id: str) -> np.ndarray:
    """The mask that the page shows: True where its layer is not transparent."""
    layer = page.locator(f".masks img[data-object={object_id}]")
    width, height, alpha = layer.evaluate(MASK_PIXELS)
    return np.array(alpha).reshape(height, width) > 0


def state(page: Page) -> dict:
    return page.evaluate("async () => (await fetch('/state')).json()")


def test_a_typed_expression_gives_the_librarys_mask(page, blocks_png, blocks, standing_in):
    open_blocks(page, blocks_png)
    segment(page, "the red block")
    (found,) = standing_in.segment(blocks, "the red block").objects
    assert np.array_equal(mask_pixels(page, "obj_1"), found.mask.pixels)
    layer, picture = page.locator(".masks img").first, page.locator(".stage > img").first
    assert layer.bounding_box() == picture.bounding_box()  # the mask lies on the picture
    assert page.locator(".point.foreground").count() == 9
    expect(page.locator("#status")).to_have_text("1: the red block, 3600 pixels.")
    expect(page.locator(".object.chosen .name")).to_have_text("the red block")


def test_points_are_shown_while_they_are_asked_and_coloured_by_the_answers(page, blocks_png, mllm):
    open_blocks(page, blocks_png)
    mllm.go_on.clear()
    page.get_by_label("What should be found?").fill("the red block")
    page.keyboard.press("Enter")
    expect(page.locator(".point.asking")).to_have_count(9)
    expect(page.locator(".box.preview")).to_have_count(1)
    expect(page.get_by_role("status")).to_have_text("Asking about points …")
    mllm.go_on.set()
    expect(page.locator(".point.foreground")).to_have_count(9)
    expect(page.locator(".point.asking")).to_have_count(0)
    expect(page.locator("#bar")).to_be_hidden()


def test_a_call_can_be_cancelled(page, blocks_png, mllm):
    open_blocks(page, blocks_png)
    mllm.go_on.clear()
    page.get_by_label("What should be found?").fill("the red block")
    page.keyboard.press("Enter")
    expect(page.locator(".point.asking")).to_have_count(9)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status")).to_have_text("Cancelled.")
    mllm.go_on.set()
    segment(page, "the blue block")
    (one,) = state(page)["objects"]
    assert one["name"] == "the blue block"


def test_a_clicked_point_is_asked_about_at_its_own_pixel(page, blocks_png):
    open_blocks(page, blocks_png)
    segment(page, "the red block")
    choose_tool(page, "Ask")
    click(page, 30, 80)  # on the blue block
    expect(page.get_by_role("status")).to_contain_text("outside, p_yes 0.03, p_no 0.97")
    expect(page.get_by_role("status")).to_contain_text("outside the mask")
    (step,) = state(page)["steps"][1:]
    (asked,) = step["arguments"]["points"]
    assert step["tool"] == "is_point_inside_object" and step["arguments"]["object_id"] == "obj_1"
    assert asked["x"] == pytest.approx(30, abs=0.3) and asked["y"] == pytest.approx(80, abs=0.3)
    marker = page.locator(".point.background")
    assert float(marker.get_attribute("data-x")) == asked["x"]
    drawn, (x, y) = marker.bounding_box(), on_screen(page, asked["x"], asked["y"])
    assert drawn["x"] + drawn["width"] / 2 == pytest.approx(x, abs=1)
    assert drawn["y"] + drawn["height"] / 2 == pytest.approx(y, abs=1)


def test_points_set_by_hand_correct_the_mask_and_undo_takes_them_back(
    page, blocks_png, blocks, truth, standing_in
):
    open_blocks(page, blocks_png)
    segment(page, "the red block")
    choose_tool(page, "Outside")
    click(page, 100, 30)
    expect(page.locator(".point.background .forced")).to_have_count(1)
    toolbox = Toolbox(standing_in)
    image_id = toolbox.workspace.open_image(blocks.pil).image_id
    for step in state(page)["steps"]:  # the calls that were made, made by the library
        assert step["arguments"].get("image", image_id) == image_id  # both are img_1
        toolbox.call(step["tool"], step["arguments"])
    corrected = mask_pixels(page, "obj_2")
    assert np.array_equal(corrected, toolbox.workspace.object("obj_2").mask.pixels)
    assert not corrected[30, 100]
    page.keyboard.press("Control+z")
    expect(page.locator(".masks img[data-object=obj_1]")).to_be_visible()
    idle(page)
    red, blue = truth["the red block"][0].pixels, truth["the blue block"][0].pixels
    assert np.array_equal(mask_pixels(page, "obj_1"), red)
    page.get_by_role("radio", name="New object").check()
    choose_tool(page, "Inside")
    click(page, 30, 80)
    assert np.array_equal(mask_pixels(page, "obj_3"), blue)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".masks img")).to_have_count(1)
    idle(page)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".masks img")).to_have_count(0)
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()


def test_a_dragged_box_and_a_dragged_corner(page, blocks_png, truth):
    open_blocks(page, blocks_png)
    choose_tool(page, "Box")
    page.mouse.move(*on_screen(page, 52, 116))
    page.mouse.down()
    page.mouse.move(*on_screen(page, 20, 60), steps=3)
    expect(page.locator(".box.rubber")).to_have_count(1)
    page.mouse.move(*on_screen(page, 8, 52), steps=3)
    page.mouse.up()
    idle(page)
    (one,) = state(page)["objects"]
    assert one["box"] == pytest.approx([8, 52, 52, 116], abs=0.3)
    assert np.array_equal(mask_pixels(page, "obj_1"), truth["the blue block"][0].pixels)
    page.mouse.move(*on_screen(page, 8, 52))  # the upper left corner, onto the block
    page.mouse.down()
    page.mouse.move(*on_screen(page, 30, 70), steps=3)
    page.mouse.up()
    idle(page)
    (one,) = state(page)["objects"]
    assert one["box"] == pytest.approx([30, 70, 52, 116], abs=0.3)
    assert one["area"] == 20 * 44  # the block's part in it: (30, 70) to (50, 114)


def test_objects_are_compared_and_combined(page, blocks_png, truth):
    open_blocks(page, blocks_png)
    segment(page, "the red block")
    segment(page, "the blue block")
    for number in (1, 2):
        page.get_by_label(f"Tick object {number}").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#relations li")).to_contain_text("1 is right of and above 2")
    page.get_by_role("button", name="Union").click()
    idle(page)
    both = truth["the red block"][0].pixels | truth["the blue block"][0].pixels
    assert np.array_equal(mask_pixels(page, "obj_3"), both)
    assert len({one["colour"] for one in state(page)["objects"]}) == 3


def test_two_strategies_side_by_side(page, blocks_png):
    open_blocks(page, blocks_png)
    page.get_by_label("Compare with another strategy").check()
    segment(page, "the red block")
    captions = page.locator("figcaption").all_inner_texts()
    assert captions == ["A: pqpp", "B: box_only"]
    left, right = stage(page, 0).bounding_box(), stage(page, 1).bounding_box()
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert [stage(page, n).locator(".point").count() for n in (0, 1)] == [9, 0]
    assert [stage(page, n).locator(".masks img").count() for n in (0, 1)] == [1, 1]
    expect(page.get_by_role("status")).to_contain_text("A and B overlap by 100.0 %")


def test_what_is_saved(page, blocks_png, truth):
    open_blocks(page, blocks_png)
    segment(page, "the blue block")

    def saved(link: str) -> Path:
        with page.expect_download() as download:
            page.get_by_role("link", name=link).click()
        assert download.value.suggested_filename
        return Path(download.value.path())

    from PIL import Image

    mask = np.asarray(Image.open(saved("Mask 1 (PNG)"))) == 255
    assert np.array_equal(mask, truth["the blue block"][0].pixels)
    document = json.loads(saved("COCO (JSON)").read_text())
    assert document["annotations"][0]["area"] == truth["the blue block"][0].area
    assert json.loads(saved("Trace 1 (JSON)").read_text())["expression"] == "the blue block"
    assert "toolbox.call('segment_object'" in saved("Calls (Python)").read_text()


def test_the_calls_are_shown_as_json_and_as_python(page, blocks_png):
    open_blocks(page, blocks_png)
    segment(page, "the red block")
    (call,) = json.loads(page.locator("#code").inner_text())
    assert call["name"] == "segment_object"
    assert call["arguments"]["expression"] == "the red block"
    page.get_by_role("radio", name="Python").check()
    code = page.locator("#code").inner_text()
    compile(code, "script", "exec")
    assert "image = 'blocks.png'" in code


def test_two_sessions_are_apart(new_page, blocks_png):
    one, other = new_page(), new_page()
    open_blocks(one, blocks_png)
    segment(one, "the red block")
    other.reload()
    expect(other.locator("#panels.empty")).to_be_visible()
    one.reload()  # the same session again
    expect(one.locator(".masks img[data-object=obj_1]")).to_be_visible()


def test_a_broken_picture_is_told_where_it_was_chosen(page, blocks_png):
    cut = {**blocks_png, "name": "cut.png", "buffer": blocks_png["buffer"][:80]}
    page.locator("#file").set_input_files(cut)
    problem = page.locator("#picture-problem")
    expect(problem.locator("p").first).not_to_be_empty()
    assert len(problem.locator("p").all_inner_texts()[1]) > 10  # the hint
    open_blocks(page, blocks_png)
    expect(problem).to_be_empty()
    page.get_by_role("button", name="Segment", exact=True).click()
    expect(page.locator("#question-problem")).to_contain_text("What should be found?")


def test_a_file_dropped_anywhere_is_opened(page, blocks_png):
    page.evaluate(
        """(bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
            const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
            document.querySelector("#stages").dispatchEvent(new DragEvent("drop", options));
        }""",
        list(blocks_png["buffer"]),
    )
    expect(page.get_by_role("status")).to_contain_text("dropped.png: 200 × 120 pixels.")


def test_what_is_not_there_is_a_result(page, blocks_png):
    open_blocks(page, blocks_png)
    segment(page, "the green block")
    expect(page.get_by_role("status")).to_have_text(
        "The model says that nothing in the picture matches."
    )


def test_on_400_pixels_nothing_is_cut_off(new_page, blocks_png):
    page = new_page(viewport={"width": 400, "height": 800}, has_touch=True, is_mobile=True)

    def width() -> int:
        return page.evaluate("document.documentElement.scrollWidth")

    assert width() <= 400
    open_blocks(page, blocks_png)
    page.get_by_label("Compare with another strategy").check()
    segment(page, "the red block")
    page.get_by_role("radio", name="Python").check()
    assert width() <= 400
    area = stage(page).bounding_box()
    assert area["x"] >= 0 and area["x"] + area["width"] <= 400
    choose_tool(page, "Ask")
    stage(page).tap(position={"x": area["width"] * 0.15, "y": area["height"] * 0.7})
    expect(page.get_by_role("status")).to_contain_text("outside")
    small = [
        one for one in page.locator("button:visible, a.button:visible").all()
        if one.bounding_box()["height"] < 24 or one.bounding_box()["width"] < 24
    ]  # fmt: skip
    assert small == []  # WCAG 2.2: targets of 24 CSS pixels at least


def test_everything_can_be_done_by_keyboard(page):
    press = page.keyboard.press

    def tab_to(selector: str, most: int = 60) -> None:
        for _ in range(most):
            if page.evaluate("(s) => document.activeElement.matches(s)", selector):
                return
            press("Tab")
        pytest.fail(f"{selector} cannot be reached with Tab")

    tab_to("#gallery button")
    press("Enter")  # the demo picture, 320 × 320
    expect(page.get_by_role("status")).to_contain_text("demo.png")
    idle(page)
    tab_to("#expression")
    page.keyboard.type("the red block")
    press("Enter")
    expect(page.locator(".masks img[data-object=obj_1]")).to_be_attached()
    idle(page)
    tab_to("input[name=tool]")
    press("ArrowRight")
    press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == "ask"
    tab_to(".stage")
    press("ArrowLeft")  # shows the cross-hair in the middle
    press("ArrowLeft")
    press("Shift+ArrowUp")
    expect(page.locator(".stage .hair")).to_have_count(1)
    press("Enter")
    expect(page.get_by_role("status")).to_contain_text("(155.5, 159.5): outside")
    idle(page)
    press("Control+z")
    expect(page.get_by_role("status")).to_have_text("Undone.")
    idle(page)
    press("Shift+Tab")
    tab_to("input[name=tool]")
    press("ArrowLeft")
    assert page.evaluate("document.activeElement.value") == "box"
    tab_to(".stage")
    for keys in (["ArrowLeft", "Enter"], ["ArrowRight"] * 4 + ["ArrowDown"] * 3 + ["Enter"]):
        for key in keys:
            press(key)
    expect(page.locator(".object.chosen")).to_have_attribute("data-object", "obj_2")
    assert state(page)["objects"][0]["box"] == [160.5, 160.5, 180.5, 175.5]


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour ``rgb(…)`` (WCAG 2)."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(new_page, blocks_png, scheme):
    page = new_page(color_scheme=scheme)
    open_blocks(page, blocks_png)
    segment(page, "the red block")

    def colours(selector: str, behind: str) -> tuple[float, float]:
        style = "(e, name) => getComputedStyle(e)[name]"
        ink = page.locator(selector).first.evaluate(style, "color")
        paper = page.locator(behind).first.evaluate(style, "backgroundColor")
        return luminance(ink), luminance(paper)

    for selector, behind in (
        ("h1", "body"),
        ("#stage-help", "body"),
        (".object .quiet", ".card"),
        ("#segment", "#segment"),
        ("#tools input:checked + span", "#tools input:checked + span"),
        ("#code", "#code"),
        (".chip", ".chip") if page.locator(".chip").count() else ("h2", ".card"),
    ):
        ink, paper = colours(selector, behind)
        contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert contrast >= 4.5, (selector, contrast)
    _, paper = colours("body", "body")
    assert (paper < 0.1) if scheme == "dark" else (paper > 0.8)
    page.get_by_label("Switch between light and dark").click()
    _, other = colours("body", "body")
    assert (other > 0.8) if scheme == "dark" else (other < 0.1)


def test_only_the_embedded_models_are_warned_of(
    new_page, running_chromium, standing_in, blocks_png
):
    page = new_page()
    expect(page.locator("#caution")).to_be_hidden()
    notes = with_caution(standing_in)
    with playground(notes) as url:
        context = running_chromium.new_context()
        warned = context.new_page()
        warned.goto(url)
        expect(warned.locator("#caution-text")).to_have_text("Demo models: drawn scenes only.")
        expect(warned.locator("#caution-command")).to_be_hidden()
        open_blocks(warned, blocks_png)  # not one of the scenes: perhaps a photograph
        expect(warned.locator("#caution-command")).to_contain_text("playground --mllm")
        context.close()


def with_caution(model: Sam4MLLM) -> Sam4MLLM:
    notes = model.mllm.notes.model_copy(update={"caution": "demo models: drawn scenes only; so"})
    return replace(model, mllm=replace(model.mllm, notes=notes))
