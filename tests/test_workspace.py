"""Handles: given out once, bounded, and never mixed up."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sam4mllm_tool.errors import AccessDenied, Busy, ImageError, InputError, UnknownHandle
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.protocols import MaskCandidate
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


@pytest.mark.parametrize("what", ["mtime", "inode", "size"])
def test_one_difference_is_enough_to_read_a_file_again(tmp_path, what):
    path, other = tmp_path / "p.bmp", tmp_path / "other.bmp"
    picture(1).save(path)
    before = path.stat()
    workspace = Workspace()
    first = workspace.open_image(path)
    if what == "mtime":  # written in place, as many bytes
        picture(2).save(path)
        os.utime(path, ns=(0, before.st_mtime_ns + 1))
    elif what == "inode":
        picture(2).save(other)
        os.utime(other, ns=(0, before.st_mtime_ns))
        other.replace(path)
    else:
        picture(2, side=65).save(path)
        os.utime(path, ns=(0, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_mtime_ns != after.st_mtime_ns) == (what == "mtime")
    assert (before.st_ino != after.st_ino) == (what == "inode")
    assert (before.st_size != after.st_size) == (what == "size")
    assert workspace.open_image(path).image.array[0, 0, 0] == 2
    assert workspace.open_image(path).image_id != first.image_id


def test_an_unchanged_file_is_not_decoded_again(blocks_file, monkeypatch):
    workspace = Workspace()
    first = workspace.open_image(blocks_file)
    monkeypatch.setattr("sam4mllm_tool.tools.workspace.load_image", None)
    assert workspace.open_image(str(blocks_file)) is first


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


def drawn(side: int = 64) -> MaskCandidate:
    mask = Mask(np.ones((side, side), bool))
    return MaskCandidate(mask, np.zeros((side, side), np.float32), 0.9)


def test_objects_weigh_what_their_masks_and_logits_take():
    workspace = Workspace()
    workspace.add_object(ObjectRecord("img_1", "bare", Box(0, 0, 1, 1)))
    assert workspace.bytes_kept == 4096
    one = drawn()
    workspace.add_object(ObjectRecord("img_1", "combined", Box(0, 0, 1, 1), mask=one.mask))
    assert workspace.bytes_kept == 2 * 4096 + 64 * 64
    workspace.add_object(ObjectRecord("img_1", "drawn", Box(0, 0, 1, 1), drawn=one, mask=one.mask))
    assert workspace.bytes_kept == 3 * 4096 + 2 * 64 * 64 + 4 * 64 * 64
    workspace.open_image(picture(1, side=10))
    assert workspace.bytes_kept == 4 * 4096 + 6 * 64 * 64 + 300


def test_logits_count_for_what_is_forgotten():
    workspace = Workspace(max_bytes=2 * 3 * (4096 + 5 * 64 * 64))
    for n in range(4):
        one = drawn()
        workspace.add_object(
            ObjectRecord("img_1", str(n), Box(0, 0, 1, 1), drawn=one, mask=one.mask)
        )
    assert [one.object_id for one in workspace.objects()] == ["obj_2", "obj_3", "obj_4"]
    with pytest.raises(UnknownHandle, match="obj_1 has expired") as caught:
        workspace.object("obj_1")
    assert "Still known: obj_2, obj_3, obj_4" in caught.value.hint


def test_objects_are_listed_by_image_in_the_order_they_were_made():
    workspace = Workspace()
    for name, image_id in [("a", "img_1"), ("b", "img_2"), ("c", "img_1")]:
        workspace.add_object(ObjectRecord(image_id, name, Box(0, 0, 1, 1)))
    workspace.update_object(replace(workspace.object("obj_1"), name="A", number=99))
    workspace.object("obj_1")
    assert [one.name for one in workspace.objects()] == ["A", "b", "c"]
    assert [one.number for one in workspace.objects("img_1")] == [1, 3]


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
