"""The playground's server: sessions, limits, and the calls that its page makes."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from starlette.testclient import TestClient
from typer.testing import CliRunner

from sam4mllm_tool.catalogue import FOR_PHOTOGRAPHS
from sam4mllm_tool.cli import app as command_line
from sam4mllm_tool.cli.playground import loading
from sam4mllm_tool.drawing.overlay import colour_of
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.playground import pictures
from sam4mllm_tool.playground.app import LIMITS, Playground, playground_app
from sam4mllm_tool.playground.gallery import gallery
from sam4mllm_tool.playground.gate import Address
from sam4mllm_tool.playground.view import About
from sam4mllm_tool.playground.watching import WatchedModel
from sam4mllm_tool.protocols import MaskCandidate
from sam4mllm_tool.testing import ColourSegmenter
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.types import Mask

HERE = "http://127.0.0.1:7860"
RED_BOX = [70.0, 15.0, 190.0, 45.0]


def application(model, *, address=None, policy=None, limits=LIMITS, folder=None):
    """The application over a model; pictures are decoded in this process, which is quicker."""
    policy = replace(policy or ImagePolicy(), allowed_dirs=(folder,) if folder else ())
    toolbox = Toolbox(WatchedModel.over(model), read_only=True)
    about = About("an MLLM", "a segmenter", "load()")
    playground = Playground(toolbox, about, gallery(folder, policy), policy, limits)
    return playground_app(playground, address or Address())


@pytest.fixture
def browser(model):
    """A client that keeps cookies, as a browser does."""
    return TestClient(application(model), base_url=HERE)


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def upload(browser, data: bytes, name: str = "blocks.png") -> dict:
    return browser.post("/upload", params={"name": name}, content=data).json()


def call(browser, tool: str, arguments: dict, panel: str = "a") -> list[dict]:
    """A tool call's events, the last one its outcome."""
    answer = browser.post("/call", json={"tool": tool, "arguments": arguments, "panel": panel})
    return [json.loads(line) for line in answer.text.splitlines()]


def segment(browser, image_id: str, expression: str, **more) -> dict:
    arguments = {"image": image_id, "expression": expression}
    return call(browser, "segment_object", arguments, **more)[-1]["state"]


def pixels(browser, address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(browser.get(address).content)))


def test_the_dialogue_is_reported_while_it_happens(browser, blocks, truth):
    image_id = upload(browser, png(blocks.pil))["picture"]["image_id"]
    events = call(browser, "segment_object", {"image": image_id, "expression": "the red block"})
    kinds = [e["event"] if e["event"] != "stage" else e["name"] for e in events]
    assert kinds == [
        "waiting", "locate", "boxes", "asking", "points", "answers", "image embedding", "mask",
        "state",
    ]  # fmt: skip
    by_kind = {e["event"]: e for e in events}
    (box,) = by_kind["boxes"]["boxes"]
    assert np.allclose(box, RED_BOX, atol=0.3)  # thousandths of 200 pixels
    asked = [(p["x"], p["y"]) for p in by_kind["asking"]["points"]]
    answered = [(p["x"], p["y"]) for p in by_kind["answers"]["points"]]
    assert asked == answered and len(asked) == 9
    assert {p["label"] for p in by_kind["answers"]["points"]} == {"foreground"}
    (one,) = by_kind["state"]["state"]["objects"]
    layer = pixels(browser, one["mask"])
    assert np.array_equal(layer[..., 3] > 0, truth["the red block"][0].pixels)
    assert set(map(tuple, layer[layer[..., 3] > 0][:, :3])) == {colour_of(1)}
    assert one["area"] == truth["the red block"][0].area


def test_objects_have_colours_of_their_own_which_stay_when_they_are_refined(browser, blocks):
    image_id = upload(browser, png(blocks.pil))["picture"]["image_id"]
    segment(browser, image_id, "the red block")
    state = segment(browser, image_id, "the blue block")
    first, second = state["objects"]
    assert first["colour"] != second["colour"]
    arguments = {
        "object_id": first["object_id"],
        "points": [{"x": 100, "y": 30, "label": "inside"}],
    }
    refined = call(browser, "segment_with_prompts", arguments)[-1]["state"]["objects"]
    assert [one["number"] for one in refined] == [1, 2]
    assert refined[0]["object_id"] == "obj_3" and refined[0]["colour"] == first["colour"]
    forced = [p for p in refined[0]["points"] if p["p_yes"] is None]
    assert [(p["x"], p["y"], p["in_mask"]) for p in forced] == [(100, 30, True)]


def test_undo_goes_back_through_answers_masks_and_removals(browser, blocks):
    image_id = upload(browser, png(blocks.pil))["picture"]["image_id"]
    located = {"image": image_id, "expression": "the red block"}
    states = [call(browser, "locate_object", located)[-1]["state"]]
    about = {"object_id": "obj_1"}
    for tool, arguments in (
        ("is_point_inside_object", {**about, "points": [{"x": 80, "y": 20}, {"x": 5, "y": 100}]}),
        ("segment_with_prompts", about),  # the object's first mask, under its own handle
        ("is_point_inside_object", {**about, "points": [{"x": 90, "y": 21}]}),
        ("segment_with_prompts", {**about, "points": [{"x": 20, "y": 60, "label": "outside"}]}),
    ):
        states.append(call(browser, tool, arguments)[-1]["state"])
    states.append(browser.post("/remove", json={"name": "obj_2"}).json())
    assert [len(one["points"]) for s in states for one in s["objects"]] == [0, 2, 2, 3, 4]
    assert [one["area"] for s in states for one in s["objects"]][:3] == [None, None, 3600]
    assert states[-1]["objects"] == []
    for former in reversed(states[:-1]):
        assert browser.post("/undo", json={}).json() == former
    assert browser.post("/undo", json={}).json()["objects"] == []
    answer = browser.post("/undo", json={})
    assert answer.status_code == 400 and "nothing to undo" in answer.json()["message"]


def test_the_script_makes_the_same_masks(browser, blocks, model, monkeypatch, tmp_path):
    image_id = upload(browser, png(blocks.pil))["picture"]["image_id"]
    segment(browser, image_id, "the red block")
    segment(browser, image_id, "the blue block")
    about = {"object_id": "obj_1", "points": [{"x": 12.5, "y": 60, "label": "outside"}]}
    call(browser, "segment_with_prompts", about)
    both = {"object_ids": ["obj_3", "obj_2"], "combine": "union"}
    state = call(browser, "compare_objects", both)[-1]["state"]
    made = json.loads(state["json"])
    assert [one["name"] for one in made] == [
        "segment_object", "segment_object", "segment_with_prompts", "compare_objects",
    ]  # fmt: skip
    assert made[3]["arguments"] == both
    blocks.pil.save(tmp_path / "blocks.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    script = state["python"].replace("Toolbox(load())", "Toolbox(the_model)")
    assert "obj_" not in script and "img_" not in script
    exec(compile(script, "script", "exec"), names | {"the_model": model}, names)
    combined = names["toolbox"].workspace.object(names["step_4"].combined.object_id)
    shown = state["objects"][-1]
    layer = pixels(browser, shown["mask"])
    assert np.array_equal(combined.mask.pixels, layer[..., 3] > 0)
    assert browser.get("/save/calls.py").text == state["python"]


def test_what_is_saved_is_what_the_library_makes(browser, blocks, truth, model, tmp_path):
    image_id = upload(browser, png(blocks.pil))["picture"]["image_id"]
    segment(browser, image_id, "the red block")
    segment(browser, image_id, "the blue block", panel="b")
    mask = pixels(browser, "/save/obj_1.png")
    assert np.array_equal(mask == 255, truth["the red block"][0].pixels)
    document = browser.get("/save/coco.json?panel=b").json()
    (annotation,) = document["annotations"]
    decoded = coco_mask.decode(
        {**annotation["segmentation"], "counts": annotation["segmentation"]["counts"].encode()}
    )
    assert np.array_equal(decoded.astype(bool), truth["the blue block"][0].pixels)
    assert document["images"][0]["file_name"] == "blocks.png"
    overlay = pixels(browser, "/save/overlay.png")
    assert overlay.shape == (120, 200, 3)
    outside = ~truth["the red block"][0].pixels
    assert np.array_equal(overlay[outside], blocks.array[outside])
    trace = browser.get("/save/obj_1.json").json()
    assert trace["expression"] == "the red block" and trace["objects"][0]["area"] == 3600
    page = browser.get("/save/obj_2.html")
    assert "attachment" in page.headers["content-disposition"] and "the blue block" in page.text
    assert np.array_equal(pixels(browser, "/save/picture.png"), blocks.array)
    missing = browser.get("/save/obj_9.png")
    assert missing.status_code == 400 and "nothing to save" in missing.json()["message"]


def test_a_comparison_has_two_sides_of_the_same_colours(browser, blocks):
    image_id = upload(browser, png(blocks.pil))["picture"]["image_id"]
    segment(browser, image_id, "the red block")
    state = segment(browser, image_id, "the red block", panel="b")
    a, b = state["objects"]
    assert (a["panel"], b["panel"]) == ("a", "b") and a["colour"] == b["colour"]
    both = {"object_ids": [a["object_id"], b["object_id"]]}
    compared = call(browser, "compare_objects", both)[-1]["state"]
    assert [pair["iou"] for pair in compared["relations"]] == [pytest.approx(1)]
    segment(browser, image_id, "the blue block")
    segment(browser, image_id, "all blocks")
    later = segment(browser, image_id, "the blue block", panel="b")["objects"]
    numbers = [(one["panel"], one["name"], one["number"]) for one in later]
    assert ("a", "the blue block", 2) in numbers and ("b", "the blue block", 2) in numbers


def test_two_browsers_are_apart(model, blocks):
    app = application(model)
    one, other = TestClient(app, base_url=HERE), TestClient(app, base_url=HERE)
    image_id = upload(one, png(blocks.pil))["picture"]["image_id"]
    segment(one, image_id, "the red block")
    assert other.get("/state").json()["picture"] is None
    answer = other.get("/masks/obj_1")
    assert answer.status_code == 400 and "no object" in answer.json()["message"]
    assert other.get(f"/pictures/{image_id}").status_code == 400
    assert len(one.get("/state").json()["objects"]) == 1


def test_an_invented_cookie_opens_nothing(model, blocks):
    app = application(model)
    one = TestClient(app, base_url=HERE)
    upload(one, png(blocks.pil))
    (cookie,) = one.cookies.jar
    name, _, signature = cookie.value.partition(".")
    forged = f"{'A' if name[0] != 'A' else 'B'}{name[1:]}.{signature}"
    other = TestClient(app, base_url=HERE, cookies={cookie.name: forged})
    answer = other.get("/state")
    assert answer.json()["picture"] is None
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=Strict" in answer.headers["set-cookie"]


def test_sessions_are_bounded_and_idle_ones_make_room(model, blocks, monkeypatch):
    from sam4mllm_tool.playground import sessions

    now = [1000.0]
    monkeypatch.setattr(sessions, "time", SimpleNamespace(monotonic=lambda: now[0]))
    app = application(model, limits=replace(LIMITS, clients=2, idle_seconds=60))
    first, second, third = (TestClient(app, base_url=HERE) for _ in range(3))
    upload(first, png(blocks.pil))
    assert second.get("/state").status_code == 200
    refused = third.get("/state")
    assert refused.status_code == 503 and "2 browser sessions" in refused.json()["message"]
    now[0] += 50
    assert first.get("/state").json()["picture"] is not None
    now[0] += 20  # the second was heard of 70 seconds ago
    assert third.get("/state").status_code == 200
    assert first.get("/state").json()["picture"] is not None


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": "[::1"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
    ],
)
def test_other_names_and_other_pages_are_turned_away(browser, headers, status):
    assert browser.get("/state", headers=headers).status_code == status


def test_a_link_from_elsewhere_may_lead_to_the_page(browser):
    answer = browser.get("/", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_off_loopback_the_address_holds_a_secret(model):
    address = Address.on("0.0.0.0", 7860)
    assert address.token and address.token in address.url
    assert Address.on("127.0.0.1", 7860).token == ""
    app = application(model, address=address)
    stranger = TestClient(app, base_url=HERE)
    assert stranger.get("/").status_code == 403
    assert stranger.get("/?token=guess").status_code == 403
    guest = TestClient(app, base_url=HERE)
    assert guest.get(f"/?token={address.token}").status_code == 200
    assert guest.get("/state").status_code == 200  # the cookie is enough from now on


def test_a_plain_form_of_another_page_cannot_call(browser):
    text = json.dumps({"tool": "locate_object", "arguments": {}})
    answer = browser.post("/call", content=text, headers={"content-type": "text/plain"})
    assert answer.status_code == 415


def test_errors_come_with_their_hint_and_change_nothing(browser, blocks):
    broken = browser.post("/upload", params={"name": "x.png"}, content=png(blocks.pil)[:60])
    assert broken.status_code == 400 and broken.json()["kind"] == "ImageError"
    assert broken.json()["hint"]
    assert browser.get("/state").json()["picture"] is None
    image_id = upload(browser, png(blocks.pil))["picture"]["image_id"]
    for tool, arguments, kind in (
        ("segment_object", {"image": image_id, "expression": "  "}, "ExpressionError"),
        ("segment_object", {"image": "/etc/passwd", "expression": "x"}, "AccessDenied"),
        ("save_objects", {"object_ids": ["obj_1"], "folder": "/tmp"}, "InputError"),
        ("segment_with_prompts", {"image": image_id, "box": [5, 5, 1, 1]}, "PromptError"),
        ("is_point_inside_object", {"object_id": "obj_1", "points": []}, "UnknownHandle"),
    ):
        last = call(browser, tool, arguments)[-1]
        assert last["event"] == "error" and last["kind"] == kind, last
        assert last["message"] and last["hint"]
    state = browser.get("/state").json()
    assert state["steps"] == [] and not state["can_undo"]


def test_files_of_the_machine_and_addresses_are_closed_by_default(browser):
    for source in ("/etc/hostname", "http://127.0.0.1:1/a.png", "file:///etc/hostname"):
        answer = browser.post("/open", json={"name": source})
        assert answer.status_code == 400 and answer.json()["kind"] == "AccessDenied", source


def test_a_picture_over_the_limit_is_refused_before_it_is_read(model, blocks):
    app = application(model, policy=ImagePolicy(max_bytes=300))
    browser = TestClient(app, base_url=HERE)
    answer = browser.post("/upload", content=b"x" * 301)
    assert answer.status_code == 400 and "larger than" in answer.json()["message"]

    def stream():
        for _ in range(4):
            yield b"x" * 100

    assert browser.post("/upload", content=stream()).status_code == 400


def test_the_models_failure_is_an_error_and_not_a_result(browser, blocks, model, monkeypatch):
    from sam4mllm_tool.errors import DeviceOutOfMemory

    def fail(*_, **__):
        raise DeviceOutOfMemory("no room", hint="Use a smaller picture.")

    image_id = upload(browser, png(blocks.pil))["picture"]["image_id"]
    monkeypatch.setattr(model.mllm, "generate", fail)
    last = call(browser, "locate_object", {"image": image_id, "expression": "the red block"})[-1]
    assert last["kind"] == "DeviceOutOfMemory" and last["hint"] == "Use a smaller picture."


def exif_turned(image: Image.Image) -> bytes:
    """A JPEG stored on its side, with the orientation that puts it upright (6: turn clockwise)."""
    stored = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


class BoxFiller(ColourSegmenter):
    """Draws the whole box: quick on large pictures."""

    def predict(self, image, prompts):
        return [(self._filled(image, prompt),) for prompt in prompts]

    def _filled(self, image, prompt):
        pixels = np.zeros((image.height, image.width), bool)
        x0, y0, x1, y1 = map(round, prompt.box)
        pixels[y0:y1, x0:x1] = True
        return MaskCandidate(Mask(pixels), np.zeros((256, 256), np.float32), 0.9)


def test_a_large_photograph_is_scaled_for_display_only(model, blocks, truth):
    """12 megapixels, stored on its side: points and boxes are pixels of the upright original."""
    big = blocks.pil.resize((4400, 2640), Image.Resampling.NEAREST)
    red = Mask((np.asarray(big) == (214, 40, 40)).all(axis=2))
    mllm = replace(model.mllm, truth={"the red block": [red]})
    model = replace(model, mllm=mllm, segmenter=BoxFiller())
    browser = TestClient(application(model), base_url=HERE)
    picture = upload(browser, exif_turned(big), "IMG_0001.JPG")["picture"]
    assert (picture["width"], picture["height"]) == (4400, 2640)
    assert (picture["shown_width"], picture["shown_height"]) == (2048, 1229)
    assert pixels(browser, picture["address"]).shape == (1229, 2048, 3)
    one = segment(browser, picture["image_id"], "the red block")["objects"][0]
    assert np.allclose(one["box"], np.array(RED_BOX) * 22, atol=5)
    assert pixels(browser, one["mask"]).shape[:2] == (1229, 2048)
    assert pixels(browser, "/save/obj_1.png").shape == (2640, 4400)
    width, height = one["box"][2] - one["box"][0], one["box"][3] - one["box"][1]
    assert one["area"] == pytest.approx(width * height, rel=0.01)
    point = {"object_id": "obj_1", "points": [{"x": 4399.5, "y": 2600}, {"x": 2000, "y": 500}]}
    answers = call(browser, "is_point_inside_object", point)[-1]["result"]["points"]
    assert [(p["x"], p["answer"], p["in_mask"]) for p in answers] == [
        (4399.5, "outside", False),
        (2000, "inside", True),
    ]


@pytest.mark.parametrize("kind", ["16 bit", "CMYK"])
def test_sources_that_browsers_cannot_show_are_shown_as_rgb(browser, blocks, kind):
    buffer = io.BytesIO()
    if kind == "CMYK":
        blocks.pil.convert("CMYK").save(buffer, "TIFF")
    else:
        grey = np.asarray(blocks.pil.convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(buffer, "PNG")
    picture = upload(browser, buffer.getvalue(), "scan.tif")["picture"]
    shown = pixels(browser, picture["address"])
    assert shown.shape == (120, 200, 3)
    wanted = blocks.array if kind == "CMYK" else np.asarray(blocks.pil.convert("L").convert("RGB"))
    assert np.abs(shown.astype(int) - wanted).max() <= 3
    assert picture["notes"]  # what was changed is told


def test_a_folder_of_pictures_is_offered_beside_the_scenes(model, blocks, tmp_path):
    (tmp_path / "deep").mkdir()
    blocks.pil.save(tmp_path / "deep" / "mine.png")
    browser = TestClient(application(model, folder=tmp_path), base_url=HERE)
    offers = browser.get("/settings").json()["offers"]
    scenes = [one for one in offers if one["kind"] == "scene"]
    assert len(scenes) == 8 and all(one["expressions"] for one in scenes)
    assert offers[-1]["name"] == "mine.png" and offers[-1]["kind"] == "file"
    state = browser.post("/choose", json={"name": str(len(offers) - 1)}).json()
    assert np.array_equal(pixels(browser, state["picture"]["address"]), blocks.array)
    assert max(pixels(browser, "/thumbnails/0").shape) <= pictures.THUMBNAIL_SIDE
    for wrong in ("99", "-1", "x"):
        assert browser.post("/choose", json={"name": wrong}).status_code == 400
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        gallery(tmp_path / "empty", ImagePolicy())


def test_the_models_are_loaded_in_the_script_as_they_were_on_the_command_line():
    usual = {"sam_dtype": "auto", "proposer": "mllm"}
    assert loading("embedded", None, None, "embedded", None, **usual) == "load()"
    given = ("org/vlm", "adapter", "sam4mllm", "sam.pt", "decoder.pt")
    assert loading(*given, sam_dtype="bfloat16", proposer="sam3") == (
        "load('org/vlm', adapter='adapter', segmenter='sam.pt', format='sam4mllm', "
        "proposer='sam3', segmenter_options={'decoder': 'decoder.pt', 'dtype': 'bfloat16'})"
    )


def test_the_embedded_models_say_what_photographs_need(model):
    from playground_server import playground

    notes = model.mllm.notes.model_copy(
        update={"caution": "demo models: they know drawn scenes only"}
    )
    cautious = replace(model, mllm=replace(model.mllm, notes=notes))
    with playground(cautious) as url:
        about = httpx.get(f"{url}settings").json()["about"]
    assert about["caution"] == notes.caution
    assert about["command"] == f"sam4mllm-tool playground {FOR_PHOTOGRAPHS}"
    assert "--mllm" in about["command"] and "--sam" in about["command"]


def test_a_port_that_is_taken_is_found_before_the_models_are_loaded(monkeypatch):
    from sam4mllm_tool.playground.serving import listen

    opened, address = listen(Address.on("127.0.0.1", 0))
    with opened:
        opened.listen()
        result = CliRunner().invoke(
            command_line, ["playground", "--port", str(address.port), "--mllm", "/no/such/place"]
        )
    assert isinstance(result.exception, InputError) and "cannot listen on" in str(result.exception)


def test_without_its_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sam4mllm_tool.playground.serving", None)
    result = CliRunner().invoke(command_line, ["playground"])
    assert isinstance(result.exception, InputError)
    assert 'pip install "sam4mllm-tool[playground]"' in result.exception.hint
