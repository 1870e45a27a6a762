"""The pages of a trace and of a report, as a browser shows them."""

from __future__ import annotations

import numpy as np
import pytest
from browser import check_fits, chromium
from PIL import Image, ImageDraw

from sam4mllm_tool.drawing.html import trace_page
from sam4mllm_tool.evaluation.cases import Case
from sam4mllm_tool.evaluation.judge import Judged
from sam4mllm_tool.evaluation.outcome import Outcome, PointOutcome
from sam4mllm_tool.evaluation.pictures import report_page
from sam4mllm_tool.evaluation.report import build_report
from sam4mllm_tool.evaluation.run import Line
from sam4mllm_tool.types import Mask, RgbImage

PICTURES = 15
SIZE = 480, 320
ABOUT = {
    "title": "a-data-set-with-a-long-name, split validation-of-unseen-pictures",
    "strategies": ["pqpp", "box_only"],
    "mllm": "/models/of/somebody/with/a/path/that/does/not/end/soon/llava-next-8b",
    "segmenter": "sam_vit_h_4b8939.pth",
    "settings": {"points": 9, "candidates": "grid"},
    "protocol": "ours",
}


def disc(x: int, y: int, radius: int) -> Mask:
    rows, columns = np.indices(SIZE[::-1])
    return Mask((columns - x) ** 2 + (rows - y) ** 2 < radius**2)


def drawn(number: int) -> RgbImage:
    """A yellow disc on green."""
    picture = Image.new("RGB", SIZE, (90 + 5 * number, 150, 90))
    ImageDraw.Draw(picture).ellipse((140, 80, 300, 240), fill=(240, 210, 60))
    return RgbImage.from_pil(picture)


def case(number: int) -> Case:
    truth = disc(220, 160, 80)
    assert truth.box is not None
    return Case(
        f"case-{number}",
        f"picture-{number}",
        "the yellow clock that stands on the lawn",
        lambda: drawn(number),
        lambda: [truth],
        (truth.box,),
        kind=("name", "colour", "compound_relation")[number % 3],
    )


def line(number: int, strategy: str) -> Line:
    """The prediction lies the farther to the right, the lower the number."""
    truth, found = disc(220, 160, 80), disc(220 + 8 * (PICTURES - 1 - number), 160, 80)
    both = int((truth.pixels & found.pixels).sum())
    outcome = Outcome(
        f"case-{number}", f"picture-{number}", both, truth.area, found.area, box_iou=0.5,
        points=(PointOutcome(0.9, 0.1, number % 4 > 0),), questions=2, seconds=0.25,
        kind=case(number).kind,
    )  # fmt: skip
    return Line(strategy, Judged(outcome, case(number).expression, (found.to_rle(),)))


@pytest.fixture(scope="module")
def report_html() -> str:
    lines = [line(n, strategy) for strategy in ABOUT["strategies"] for n in range(PICTURES)]
    report = build_report(lines, ABOUT, where_published="Numbers are published for whole splits.")
    return report_page(report, lines, [case(number) for number in range(PICTURES)])


@pytest.fixture
def trace_html(model, blocks) -> str:
    found = model.segment(blocks, "all blocks", count="1+", source="a-picture-with-a-name.png")
    return trace_page(found.trace.page_data(), blocks)


def test_the_trace_page_says_what_its_numbers_are(trace_html):
    assert "Its coordinates are thousandths of the picture" in trace_html
    assert "<th>x, px</th>" in trace_html


def test_the_report_shows_a_picture_once_and_the_settings_in_a_table(report_html):
    assert report_html.count("<figure>") == len(set(pictures(report_html))) == 12
    assert '<th scope="row">segmenter</th><td>sam_vit_h_4b8939.pth</td>' in report_html
    assert "<td>points: 9, candidates: grid</td>" in report_html
    assert "<td>pqpp, box_only</td>" in report_html


def pictures(html: str) -> list[str]:
    return [part.split('"')[0] for part in html.split('<figure><img src="')[1:]]


def test_pages_fit_a_narrow_screen_in_light_and_dark(trace_html, report_html):
    with chromium() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme)
            for html in (trace_html, report_html):
                page.set_content(html)
                for width in (400, 1280):
                    check_fits(page, width)
                ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]


def test_on_a_narrow_screen_every_number_stands_beside_its_name(report_html):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 400, "height": 900})
        page.set_content(report_html)
        named = "e => getComputedStyle(e, '::before').content"
        cells = page.locator("table.stack td:not(:first-child)")
        names = [cells.nth(n).evaluate(named) for n in range(cells.count())]
        assert '"cases"' in names and '"pqpp, protocol ours"' in names
        assert "none" not in names and "normal" not in names
