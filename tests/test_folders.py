"""Files inside allowed folders: links that appear meanwhile, names that exist, full disks."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sam4mllm_tool.errors import AccessDenied, ImageError, InputError, StorageError
from sam4mllm_tool.images import folders as module
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.folders import read_file, write_file
from sam4mllm_tool.images.sources import expand_sources
from sam4mllm_tool.tools.workspace import Workspace


@pytest.fixture
def places(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "sub", outside):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(folder.name.encode())
    return inside, outside


@pytest.fixture
def after_the_check(monkeypatch):
    """Runs something between the check of a path and its opening: a race, lost every time."""

    def arrange(swap) -> None:
        check = module.resolve_inside

        def checked(*arguments):
            result = check(*arguments)
            swap()
            return result

        monkeypatch.setattr(module, "resolve_inside", checked)

    return arrange


def test_a_folder_that_becomes_a_link_is_not_followed(places, after_the_check):
    inside, outside = places
    policy = ImagePolicy(allowed_dirs=(inside,), output_dirs=(inside,))
    assert read_file(inside / "sub" / "a.png", policy) == b"sub"

    def swap() -> None:
        if not (inside / "sub").is_symlink():
            (inside / "sub").rename(inside / "away")
            (inside / "sub").symlink_to(outside)

    after_the_check(swap)
    with pytest.raises(ImageError):
        read_file(inside / "sub" / "a.png", policy)
    with pytest.raises(InputError):
        write_file(inside / "sub", "b.png", b"x", policy)
    (inside / "sub").unlink()
    (inside / "away").rename(inside / "sub")
    with pytest.raises(InputError):
        write_file(inside / "sub" / "deeper", "b.png", b"x", policy)
    assert sorted(path.name for path in outside.iterdir()) == ["a.png"]


def test_a_file_that_becomes_a_link_is_not_followed(places, after_the_check):
    inside, outside = places
    policy = ImagePolicy(allowed_dirs=(inside,), output_dirs=(inside,))

    def swap() -> None:
        for name in ("a.png", "b.png"):
            (inside / "sub" / name).unlink(missing_ok=True)
            (inside / "sub" / name).symlink_to(outside / name)

    after_the_check(swap)
    with pytest.raises(ImageError):
        read_file(inside / "sub" / "a.png", policy)
    # The new link's name is taken, so the file gets another.
    assert write_file(inside / "sub", "b.png", b"x", policy).name == "b-2.png"
    assert sorted(path.name for path in outside.iterdir()) == ["a.png"]


def test_a_file_that_becomes_a_pipe_keeps_nobody_waiting(places, after_the_check):
    inside, _ = places

    def swap() -> None:
        (inside / "sub" / "a.png").unlink()
        os.mkfifo(inside / "sub" / "a.png")

    after_the_check(swap)
    with pytest.raises(ImageError, match="Not a file"):
        read_file(inside / "sub" / "a.png", ImagePolicy(allowed_dirs=(inside,)))


def test_a_folder_that_may_not_be_listed_can_be_passed(places):
    inside, _ = places
    (inside / "sub").chmod(stat.S_IXUSR)
    try:
        assert read_file(inside / "sub" / "a.png", ImagePolicy((inside,))) == b"sub"
    finally:
        (inside / "sub").chmod(stat.S_IRWXU)


def test_nothing_is_overwritten_by_many_writers(places):
    inside, _ = places
    policy = ImagePolicy(output_dirs=(inside,))

    def write(number: int):
        return write_file(inside / "new" / "er", "m.png", str(number).encode(), policy)

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(write, range(40)))
    assert {path.name for path in paths} == {"m.png", *(f"m-{n}.png" for n in range(2, 41))}
    assert sorted(int(path.read_text()) for path in paths) == list(range(40))
    assert [int(path.read_text()) for path in paths] == list(range(40))


def test_where_and_what_may_be_written(places):
    inside, outside = places
    with pytest.raises(AccessDenied):  # what may be read may not be written
        write_file(inside, "m.png", b"", ImagePolicy(allowed_dirs=(inside,)))
    policy = ImagePolicy(output_dirs=(inside,))
    for folder, name in [
        (outside, "m.png"),
        (inside / "..", "m.png"),
        (inside, "../m.png"),
        (inside, "/etc/passwd"),
        (inside, ".."),
        (inside, ""),
        (inside, "a\\b.png"),
        (inside, "a\0.png"),
        (inside, "x" * 300),
        (Path("~no such user/inside"), "m.png"),
        (inside / "a\0b", "m.png"),
        (inside / "\ud800", "m.png"),
        (inside / ("x" * 300), "m.png"),
        (inside / "sub" / "a.png", "m.png"),
    ]:
        with pytest.raises(InputError) as caught:
            write_file(folder, name, b"", policy)
        assert caught.value.hint
    anywhere = ImagePolicy(output_dirs=None)
    assert write_file(outside / "deep" / "er", "m.png", b"y", anywhere).read_bytes() == b"y"


@pytest.mark.parametrize(
    "name",
    ["~no such user/a.png", "a\0.png", "\ud800.png", "x" * 300, "../outside/a.png", "x/" * 3000],
)
def test_paths_that_are_none_are_typed_errors(places, name):
    inside, _ = places
    policy = ImagePolicy(allowed_dirs=(inside,))
    for path in (name, f"{inside}/{name}", f"file://{inside}/{name}"):
        with pytest.raises(InputError) as caught:
            Workspace(policy).open_image(path)
        assert caught.value.hint
    assert expand_sources([name, "x" * 5000]) == [name, "x" * 5000]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error_and_leaves_nothing(places, monkeypatch):
    inside, _ = places
    opened = os.open

    def full(path, flags, *rest, **options):
        descriptor = opened(path, flags, *rest, **options)
        if flags & os.O_CREAT:
            os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
        return descriptor

    monkeypatch.setattr(module.os, "open", full)
    with pytest.raises(StorageError) as caught:
        write_file(inside, "m.png", bytes(100), ImagePolicy(output_dirs=(inside,)))
    assert caught.value.retryable
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert not (inside / "m.png").exists()
