"""Handles: given out once, bounded, and never mixed up."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sam4mllm_tool.errors import AccessDenied, Busy, ImageError, InputError, UnknownHandle
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.tools.workspace import ObjectRecord, Workspace
from sam4mllm_tool.types import Box, Mask


def picture(shade: int, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), (shade, shade, shade))


def test_the_same_pixels_get_the_same_handle(blocks_file):
    workspace = Workspace()
    first = workspace.open_image(str(blocks_file))
    assert first.image_id == "img_1"
    assert workspace.open_image(blocks_file) is first
    assert workspace.open_image(first.image_id) is first
    assert workspace.open_image(Image.open(blocks_file)).image_id == "img_1"
    assert workspace.open_image(picture(3)).image_id == "img_2"


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "p.png"
    picture(1).save(path)
    workspace = Workspace()
    first = workspace.open_image(path)
    picture(2).save(path)
    assert workspace.open_image(path).image_id != first.image_id


def test_a_known_file_is_still_subject_to_the_policy(tmp_path, blocks_file):
    inside = tmp_path / "inside"
    inside.mkdir()
    workspace = Workspace(ImagePolicy(allowed_dirs=(inside,)))
    with pytest.raises(AccessDenied):
        workspace.open_image(blocks_file)
    link = inside / "link.png"
    link.symlink_to(blocks_file)
    with pytest.raises(AccessDenied):
        workspace.open_image(link)


def test_an_unknown_image_is_refused_with_the_known_ones():
    workspace = Workspace()
    workspace.open_image(picture(1))
    with pytest.raises(UnknownHandle, match=r"no image 'img_9'.* img_1"):
        workspace.open_image("img_9")


def test_files_named_like_handles_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace = Workspace()
    for number, name in enumerate(["img_1.png", "img_", "img_photo", "obj_1"], 1):
        picture(number).save(tmp_path / name, "PNG")
        assert workspace.open_image(name).image_id == f"img_{number}"
    with pytest.raises(ImageError, match="Cannot read"):
        workspace.open_image("img_../../etc/passwd")


def test_what_was_not_used_for_longest_is_forgotten():
    workspace = Workspace(max_bytes=2 * 3 * (64 * 64 * 3 + 4096))
    ids = [workspace.open_image(picture(shade)).image_id for shade in range(3)]
    workspace.image(ids[0])
    workspace.open_image(picture(99))
    assert workspace.image(ids[0]).image_id == ids[0]
    with pytest.raises(UnknownHandle, match="img_2 has expired"):
        workspace.image(ids[1])
    with pytest.raises(UnknownHandle, match="no image 'img_5'"):
        workspace.image("img_5")
    with pytest.raises(UnknownHandle, match="no object 'img_2'"):
        workspace.object("img_2")
    # the same picture again gets its old handle back
    assert workspace.open_image(picture(1)).image_id == ids[1]


def test_an_object_too_large_for_the_workspace_is_an_input_error():
    workspace = Workspace(max_bytes=200_000)
    with pytest.raises(InputError, match="too large"):
        workspace.open_image(picture(5, side=600))


def test_handles_from_many_threads_are_all_different_and_right():
    workspace = Workspace()
    barrier = threading.Barrier(8)

    def work(shade: int) -> tuple[int, str, str]:
        barrier.wait()
        record = workspace.open_image(picture(shade))
        mask = Mask(np.full((4, 4), shade % 2 == 0))
        kept = workspace.add_object(
            ObjectRecord(record.image_id, str(shade), Box(0, 0, 1, 1), mask=mask)
        )
        return shade, record.image_id, kept.object_id

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(work, range(8)))
    assert len({image for _, image, _ in done}) == len({obj for _, _, obj in done}) == 8
    for shade, image_id, object_id in done:
        assert workspace.image(image_id).image.array[0, 0, 0] == shade
        assert workspace.object(object_id).name == str(shade)


def test_an_update_keeps_the_handle():
    workspace = Workspace()
    kept = workspace.add_object(ObjectRecord("img_1", "a", Box(0, 0, 1, 1)))
    workspace.update_object(replace(kept, name="b"))
    assert workspace.object(kept.object_id).name == "b"


def test_handles_of_a_workspace_that_follows_another_are_new():
    first = Workspace()
    first.open_image(picture(1))
    first.open_image(picture(2))
    second = Workspace(last_number=first.last_number)
    assert second.open_image(picture(2)).image_id == "img_3"
    with pytest.raises(UnknownHandle, match="img_1 has expired"):
        second.image("img_1")


def test_workspaces_that_share_memory_forget_their_own_first_and_are_busy_last():
    one = 64 * 64 * 3 + 4096
    shared: list[Workspace] = []

    def room() -> int:
        return 4 * one - sum(workspace.bytes_kept for workspace in shared)

    shared += [Workspace(room=room), Workspace(room=room)]
    for shade in range(6):
        shared[0].open_image(picture(shade))
    assert shared[0].image("img_6").image.array[0, 0, 0] == 5
    with pytest.raises(UnknownHandle, match="img_2 has expired"):
        shared[0].image("img_2")
    with pytest.raises(Busy) as caught:
        shared[1].open_image(picture(7))
    assert caught.value.retryable and caught.value.retry_after > 0
    assert shared[0].bytes_kept <= 4 * one
    assert shared[0].image("img_6").image.array[0, 0, 0] == 5
