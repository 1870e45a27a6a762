"""Decoding where it can be killed: limits hold, others do not notice, results are the same."""

import io
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from hostile_pictures import CORPUS, encoded, many_scans, polyglots, spelled_out
from PIL import Image

from sam4mllm_tool.concurrency import CallCancelled, CallContext, call_context
from sam4mllm_tool.errors import ImageError
from sam4mllm_tool.images import isolation
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.decoding import MAX_JPEG_SCANS, decode
from sam4mllm_tool.images.isolation import DecoderPool, decode_isolated
from sam4mllm_tool.images.loading import load_image

MAX_PIXELS = ImagePolicy().max_pixels
ISOLATED = ImagePolicy(isolated=True)
PICTURE = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 13)


@pytest.fixture(scope="module")
def pool():
    one = DecoderPool(size=2)
    yield one
    one.close()


def outcome(decoder, data: bytes):
    try:
        image, notes = decoder(data, MAX_PIXELS)
    except ImageError as error:
        return type(error), error.message, error.hint
    return image.size, image.tobytes(), notes


ORDINARY = {
    "png": encoded(PICTURE, "PNG"),
    "transparent": encoded(Image.new("LA", (5, 3), (9, 100)), "PNG"),
    "turned": encoded(PICTURE, "TIFF"),
    "16 bits": encoded(Image.new("I;16", (4, 2), 40_000), "PNG"),
    "truncated": encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-200],
    "none": b"not a picture",
}


@pytest.mark.parametrize("data", ORDINARY.values(), ids=ORDINARY)
def test_the_process_gives_what_the_library_gives(data, pool):
    assert outcome(pool.decode, data) == outcome(decode, data)


def test_the_policy_chooses(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "sam4mllm_tool.images.loading.decode_isolated",
        lambda data, most: asked.append(data) or decode_isolated(data, most),
    )
    assert load_image(ORDINARY["png"], ISOLATED) is not None
    assert load_image(ORDINARY["png"]).image.digest == load_image(PICTURE).image.digest
    assert asked == [ORDINARY["png"]]


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_picture_is_refused_or_decoded_within_the_limits(name, pool, monkeypatch):
    """The limit on computing is a fifth of the real one, so that the test is short."""
    monkeypatch.setattr(isolation, "MAX_CPU_SECONDS", 1)
    data = CORPUS[name]()
    begun = time.monotonic()
    try:
        pool.decode(data, MAX_PIXELS)
    except ImageError as error:
        assert error.hint
    assert time.monotonic() - begun < isolation.MAX_SECONDS / 2


def test_others_do_not_notice(pool, monkeypatch):
    monkeypatch.setattr(isolation, "MAX_CPU_SECONDS", 1)
    refused, slow = [], spelled_out(2500)

    def hostile() -> None:
        with pytest.raises(ImageError) as caught:
            pool.decode(slow, MAX_PIXELS)
        refused.append(caught.value)

    thread = threading.Thread(target=hostile)
    thread.start()
    times = []
    while thread.is_alive():
        begun = time.monotonic()
        pool.decode(ORDINARY["png"], MAX_PIXELS)
        times.append(time.monotonic() - begun)
    thread.join()
    assert "1 s of computing" in refused[0].message
    assert len(times) > 20
    assert np.percentile(times, 95) < 0.25
    # The worker that was ended is replaced.
    assert pool.decode(ORDINARY["png"], MAX_PIXELS)[0].size == PICTURE.size


def test_memory_is_bounded_while_decoding(pool, monkeypatch):
    monkeypatch.setattr(isolation, "MAX_BYTES_ABOVE_BASE", 50_000_000)
    with pytest.raises(ImageError, match="memory"):
        pool.decode(encoded(Image.new("RGB", (5000, 5000)), "PNG"), MAX_PIXELS)
    assert pool.decode(ORDINARY["png"], MAX_PIXELS)[0].size == PICTURE.size


def test_a_cancelled_call_frees_its_worker(pool):
    context, slow = CallContext(), spelled_out(2500)
    threading.Timer(0.3, context.cancelled.set).start()
    begun = time.monotonic()
    with call_context(context), pytest.raises(CallCancelled):
        pool.decode(slow, MAX_PIXELS)
    assert time.monotonic() - begun < 2


def test_a_crashed_worker_is_an_image_error_and_is_replaced():
    pool = DecoderPool(size=1)
    (worker,) = psutil.Process().children()[-1:]
    assert "decoder_process" in " ".join(worker.cmdline())
    worker.kill()
    with pytest.raises(ImageError, match="makes the decoder fail"):
        pool.decode(ORDINARY["png"], MAX_PIXELS)
    assert pool.decode(ORDINARY["png"], MAX_PIXELS)[0].size == PICTURE.size
    pool.close()


def test_workers_know_no_secrets_and_no_torch(pool):
    code = "import sam4mllm_tool.images.decoding, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    workers = [
        one for one in psutil.Process().children() if "decoder_process" in str(one.cmdline())
    ]
    assert workers
    for one in workers:
        assert not any("TOKEN" in name or "KEY" in name for name in one.environ())


def test_it_works_from_a_script_without_a_main_guard(tmp_path):
    """Nothing of the caller is imported again, as multiprocessing's spawn would."""
    path = tmp_path / "script.py"
    (tmp_path / "a.png").write_bytes(ORDINARY["png"])
    path.write_text(
        "from sam4mllm_tool import ImagePolicy, load_image\n"
        f"print(load_image({str(tmp_path / 'a.png')!r}, ImagePolicy(isolated=True)).image.size)\n"
    )
    done = subprocess.run([sys.executable, path], check=True, capture_output=True, text=True)
    assert done.stdout == "(3, 2)\n"


# -- the library's own path ----------------------------------------------------------------------


def test_too_many_scans_are_refused_before_decoding():
    begun = time.process_time()
    with pytest.raises(ImageError, match=f"limit is {MAX_JPEG_SCANS}"):
        load_image(many_scans())
    assert time.process_time() - begun < 1
    ten = encoded(Image.effect_noise((64, 64), 60).convert("RGB"), "JPEG", progressive=True)
    assert 5 < ten.count(b"\xff\xda") < MAX_JPEG_SCANS
    load_image(ten)


@pytest.mark.parametrize("kind, mode", [("TIFF", "F"), ("PNG", "I;16"), ("PNG", "LA")])
def test_converting_takes_little_more_memory_than_the_pixels(kind, mode, tmp_path):
    """25 megapixels are 100 MB in Pillow, before and after."""
    colour = (7, 100) if mode == "LA" else 7
    path = tmp_path / "large"
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}
    path.write_bytes(encoded(Image.new(mode, (5000, 5000), colour), kind, **options))
    code = (
        "import resource, sys; from sam4mllm_tool import load_image\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = used(); load_image(sys.argv[1]); print(used() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True)
    assert int(done.stdout) < 350


def test_polyglots_are_their_picture():
    picture = Image.new("RGB", (4, 3), (200, 10, 60))
    for name, data in polyglots(picture).items():
        assert load_image(data).image.array.tolist() == np.asarray(picture).tolist(), name


def test_a_constant_float_picture_is_no_error():
    constant = Image.new("F", (3, 2), -7.5)
    buffer = io.BytesIO()
    constant.save(buffer, "TIFF")
    assert load_image(buffer.getvalue()).image.array.max() == 0
