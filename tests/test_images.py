"""Every kind of picture gives exact pixels or a typed error; policies hold."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam4mllm_tool.errors import AccessDenied, ImageError
from sam4mllm_tool.images.loading import ImagePolicy, load_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
# Two rows of three: no two turns or flips of it are alike.
PIXELS = np.array([[RED, GREEN, BLUE], [WHITE, (0, 0, 0), (10, 20, 30)]], dtype=np.uint8)


def picture() -> Image.Image:
    return Image.fromarray(PIXELS)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(source, policy=None) -> list:
    return load_image(source, policy).image.array.tolist()


def test_every_way_in_gives_the_same_image(tmp_path):
    path = tmp_path / "ein Bild.png"
    path.write_bytes(encoded(picture()))
    b64 = base64.b64encode(path.read_bytes()).decode()
    sources = [
        path,
        str(path),
        path.as_uri(),
        path.read_bytes(),
        picture(),
        PIXELS,
        f"data:image/png;base64,{b64}",
        "data:image/png;base64," + b64.replace("+", "%2B").replace("/", "%2F"),
        f"  DATA:;BASE64,{b64[:20]}\n{b64[20:]}",
    ]
    loaded = [load_image(source) for source in sources]
    assert {image.image.digest for image in loaded} == {loaded[0].image.digest}
    assert all(image.image.array.tolist() == PIXELS.tolist() for image in loaded)
    assert all(image.notes == () for image in loaded)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_lossless_formats_are_exact(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert pixels(encoded(picture(), kind, **options)) == PIXELS.tolist()


def test_caller_keeps_its_image_and_array():
    image, array = picture(), PIXELS.copy()
    from_image, from_array = load_image(image).image, load_image(array).image
    image.putpixel((0, 0), (9, 9, 9))
    array[:] = 7
    assert from_image.array.tolist() == PIXELS.tolist()
    assert from_array.array.tolist() == PIXELS.tolist()


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, PIXELS[::-1, ::-1]),
        (4, PIXELS[::-1]),
        (5, PIXELS.transpose(1, 0, 2)),
        (6, np.rot90(PIXELS, -1)),
        (7, PIXELS.transpose(1, 0, 2)[::-1, ::-1]),
        (8, np.rot90(PIXELS, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(kind, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    loaded = load_image(encoded(picture(), kind, exif=exif, **options))
    assert loaded.image.array.tolist() == upright.tolist()
    assert bool(loaded.notes) == (orientation > 1 and kind != "TIFF")  # Pillow turns TIFF itself


def test_broken_exif_keeps_the_pixels():
    data = encoded(picture(), exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff")
    assert pixels(data) == PIXELS.tolist()


def test_animated_gives_its_first_frame():
    later = Image.new("RGB", (3, 2), (1, 2, 3))
    loaded = load_image(encoded(picture(), "GIF", save_all=True, append_images=[later]))
    assert loaded.image.array.tolist() == PIXELS.tolist()
    assert "several frames" in loaded.notes[0]


def test_palette_and_bilevel_and_grey():
    palette = picture().quantize(6)
    assert pixels(encoded(palette)) == np.asarray(palette.convert("RGB")).tolist()
    bits = Image.fromarray(np.array([[True, False]]))
    assert pixels(encoded(bits)) == [[[255] * 3, [0] * 3]]
    grey = Image.fromarray(np.array([[0, 77, 255]], dtype=np.uint8))
    assert pixels(encoded(grey)) == [[[0] * 3, [77] * 3, [255] * 3]]


def test_alpha_is_laid_on_white():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    loaded = load_image(encoded(Image.fromarray(rgba)))
    assert loaded.image.array.tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert "white" in loaded.notes[0]
    transparent = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    data = encoded(transparent, transparency=transparent.getpixel((0, 0)))
    assert pixels(data)[0][0] == [255, 255, 255]


def test_cmyk():
    cmyk = np.array([[[0, 255, 255, 0], [0, 0, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    image = Image.fromarray(cmyk, mode="CMYK")
    loaded = load_image(encoded(image, "TIFF"))
    assert loaded.image.array.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 0]]]
    assert "CMYK" in loaded.notes[0]
    # Adobe writes inverted CMYK into JPEG; a plain area survives the compression exactly enough.
    area = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(np.array(pixels(encoded(area, "JPEG"))) - [255, 0, 0]).max() <= 2


def test_sixteen_bits():
    values = np.array([[0, 257 * 77, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        loaded = load_image(encoded(Image.fromarray(values), kind))
        assert loaded.image.array[..., 0].tolist() == [[0, 77, 255]]
        assert "16-bit" in loaded.notes[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 77.0, 255.0]], np.float32), [0, 77, 255]),
        (np.array([[-1.0, np.nan, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0, 1, 255]], np.int32), [0, 1, 255]),
        (np.array([[0, 70_000, 140_000]], np.int32), [0, 128, 255]),
    ],
)
def test_float_and_32_bit(values, expected):
    loaded = load_image(encoded(Image.fromarray(values), "TIFF"))
    assert loaded.image.array[0].tolist() == [[v, v, v] for v in expected]
    assert loaded.notes


def test_one_pixel():
    assert pixels(encoded(Image.new("RGB", (1, 1), (4, 5, 6)))) == [[[4, 5, 6]]]


NOISE = Image.effect_noise((64, 64), 50).convert("RGB")
JPEG, PNG = encoded(NOISE, "JPEG"), encoded(NOISE)


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"\x00" * 100,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        JPEG[: len(JPEG) // 2],
        PNG[: len(PNG) // 2],
        PNG[:20],
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;base64,!!!!",
        "data:,hello",
        "no/such/file.png",
        "",
        "x" * 10_000,
        "nul\0.png",
        Path("/"),
        Path("/dev/zero"),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        12,
        None,
    ],
)
def test_what_is_no_picture_gets_a_typed_error_with_a_hint(source):
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert caught.value.hint
    assert len(str(caught.value)) < 600


def test_zero_byte_truncated_and_text_files(tmp_path):
    for content in (b"", PNG[:-500], b"not a picture"):
        path = tmp_path / "file.png"
        path.write_bytes(content)
        with pytest.raises(ImageError):
            load_image(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one compressed run of zeros."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(1_000_000), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [7_072, 12_000, 20_000, 2_000_000])
def test_too_many_pixels_are_refused_before_decoding(side, monkeypatch):
    decoded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: decoded.append(self))
    with pytest.raises(ImageError, match="limit"):
        load_image(png_header(side, side))
    assert not decoded


def test_pixel_limit_is_exact_and_counts_every_way_in():
    policy = ImagePolicy(max_pixels=6)
    assert pixels(encoded(picture()), policy) == PIXELS.tolist()
    for source in (
        encoded(Image.new("RGB", (7, 1))),
        Image.new("RGB", (7, 1)),
        PIXELS.repeat(2, 0),
    ):
        with pytest.raises(ImageError, match="limit is 6 pixels"):
            load_image(source, policy)


def test_byte_limit(tmp_path):
    data = encoded(picture())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    uri = "data:;base64," + base64.b64encode(data).decode()
    for source in (data, path, uri):
        assert pixels(source, ImagePolicy(max_bytes=len(data))) == PIXELS.tolist()
        with pytest.raises(ImageError, match="limit"):
            load_image(source, ImagePolicy(max_bytes=len(data) - 3))


@pytest.fixture
def folders(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.png").write_bytes(encoded(picture()))
    return inside, outside


def test_allowed_folders(folders):
    inside, outside = folders
    policy = ImagePolicy(allowed_dirs=(inside,))
    (inside / "link.png").symlink_to(outside / "a.png")
    (inside / "linked").symlink_to(outside)
    (inside / "own.png").symlink_to(inside / "a.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    assert pixels(inside / "a.png", policy) == PIXELS.tolist()
    assert pixels(inside / "own.png", policy) == PIXELS.tolist()
    assert pixels(inside / ".." / "inside" / "a.png", policy) == PIXELS.tolist()
    for path in (
        outside / "a.png",
        outside / "missing.png",
        inside / "link.png",
        inside / "linked" / "a.png",
        inside / ".." / "outside" / "a.png",
        f"{inside}/../outside/a.png",
        (outside / "a.png").as_uri(),
        f"{inside}x/a.png",
    ):
        with pytest.raises(AccessDenied) as caught:
            load_image(path, policy)
        assert str(inside) in caught.value.hint
    with pytest.raises(ImageError):
        load_image(inside / "loop.png", policy)


def test_an_allowed_folder_may_itself_be_a_link(folders, tmp_path):
    inside, _ = folders
    (tmp_path / "alias").symlink_to(inside)
    policy = ImagePolicy(allowed_dirs=(tmp_path / "alias",))
    assert pixels(tmp_path / "alias" / "a.png", policy) == PIXELS.tolist()
