"""Workspaces on disk: everything comes back as it was, also after ``kill -9``."""

import errno
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest
from PIL import Image

from benchmarks.load_ends import survive
from sam4mllm_tool.errors import InputError, StorageError, UnknownHandle
from sam4mllm_tool.tools.state import StateStore
from sam4mllm_tool.tools.toolbox import Toolbox
from sam4mllm_tool.tools.workspace import ObjectRecord, Workspace
from sam4mllm_tool.types import Box, Mask


@pytest.fixture
def store(tmp_path):
    one = StateStore(tmp_path / "state")
    yield one
    one.close()


def reopened(store: StateStore, **options) -> StateStore:
    store.close()
    return StateStore(store.folder, **options)


def test_all_that_tools_made_comes_back_equal(model, blocks, blocks_file, store):
    before = Toolbox(model, Workspace(state=store.workspace("a")))
    image = {"image": str(blocks_file)}
    before.call("segment_object", {**image, "expression": "all blocks"})
    before.call("locate_object", {**image, "expression": "the blue block", "alternates": 2})
    points = [{"x": 130, "y": 30}, {"x": 5, "y": 110}]
    before.call("is_point_inside_object", {"object_id": "obj_3", "points": points})
    before.call("compare_objects", {"object_ids": ["obj_1", "obj_2"], "combine": "union"})
    records = before.workspace.objects()
    assert [one.object_id for one in records] == ["obj_1", "obj_2", "obj_3", "obj_4"]

    store = reopened(store)
    after = Workspace(state=store.workspace("a"))
    assert after.image("img_1").image.array.tolist() == blocks.array.tolist()
    assert after.image("img_1") == before.workspace.image("img_1")
    for was in records:
        now = after.object(was.object_id)
        assert replace(now, drawn=None) == replace(was, drawn=None)
        assert (now.drawn is None) == (was.drawn is None)
        if was.drawn and now.drawn:
            assert np.array_equal(now.drawn.logits, was.drawn.logits)
            assert now.drawn.logits.dtype == np.float32
            assert now.drawn.predicted_iou == was.drawn.predicted_iou
    # Work goes on where it was, with new handles.
    tools = Toolbox(model, after)
    refined = tools.call("segment_with_prompts", {"object_id": "obj_3"}).result.objects[0]
    assert (refined.object_id, refined.area) == ("obj_3", 2400)
    again = tools.call("segment_object", {"image": "img_1", "expression": "the red block"})
    assert again.result.objects[0].object_id == "obj_5"
    assert after.open_image(blocks_file).image_id == "img_1"
    assert Workspace(state=store.workspace("b")).objects() == []
    store.close()


def test_what_memory_forgets_is_read_from_disk(store):
    workspace = Workspace(max_bytes=60_000, state=store.workspace("a"))
    for shade in range(6):
        workspace.open_image(Image.new("RGB", (64, 64), (shade, 0, 9)))
    assert workspace.bytes_kept < 60_000
    for shade in range(6):
        assert tuple(workspace.image(f"img_{shade + 1}").image.array[0, 0]) == (shade, 0, 9)


def kept(store: StateStore, number: int) -> None:
    workspace = Workspace(state=store.workspace("a"))
    noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    record = workspace.open_image(noise)
    mask = Mask(np.eye(64, dtype=bool))
    workspace.add_object(ObjectRecord(record.image_id, "x", Box(0, 0, 1, 1), mask=mask))


def test_what_is_old_or_too_much_expires_and_its_handle_is_not_given_again(store):
    for number in range(4):
        kept(store, number)
    files = list(store.folder.glob("blobs/*/*"))
    assert len(files) == 4
    size = max(file.stat().st_size for file in files)
    store = reopened(store, max_bytes=2 * size)
    workspace = Workspace(state=store.workspace("a"))
    assert workspace.image("img_4").image_id == "img_4"
    with pytest.raises(UnknownHandle, match="img_1 has expired"):
        workspace.image("img_1")
    assert len(list(store.folder.glob("blobs/*/*"))) == 2
    store = reopened(store, max_age_seconds=0)
    workspace = Workspace(state=store.workspace("a"))
    with pytest.raises(UnknownHandle, match="obj_4 has expired"):
        workspace.object("obj_4")
    kept(store, 9)
    assert [one.object_id for one in Workspace(state=store.workspace("a")).objects()] == ["obj_5"]
    store.close()


def test_processes_share_a_folder_and_see_each_others_changes(model, blocks_file, store):
    ours, theirs = (
        Toolbox(model, Workspace(state=StateStore(store.folder).workspace("a"))) for _ in range(2)
    )
    segment = {"image": str(blocks_file), "expression": "the red block"}
    for number, box in enumerate([ours, theirs, theirs, ours], 1):
        found = box.call("segment_object", segment).result
        assert (found.image_id, found.objects[0].object_id) == ("img_1", f"obj_{number}")
    assert len(ours.workspace.objects()) == len(theirs.workspace.objects()) == 4
    # What one has in memory is not what the other has made of it since.
    assert theirs.workspace.object("obj_1").points == ours.workspace.object("obj_1").points
    ours.call("is_point_inside_object", {"object_id": "obj_1", "points": [{"x": 120, "y": 30}]})
    asked = [(p.x, p.y) for p in theirs.workspace.object("obj_1").points]
    assert (120, 30) in asked
    with pytest.raises(UnknownHandle, match="there is no object 'obj_5'"):
        theirs.workspace.object("obj_5")


def test_threads_and_processes_never_get_one_handle_twice(store):
    stores = [StateStore(store.folder) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda n: stores[n % 4].next_number("a", "obj", 0), range(80)))
    assert sorted(given) == list(range(1, 81))


def once(box: Toolbox, call_id: str, arguments: dict) -> str:
    with box.workspace.once(call_id) as call:
        if call.answer is None:
            call.answer = box.call("segment_object", arguments).text
    return call.answer


@pytest.mark.parametrize("kept_on_disk", [True, False])
def test_a_repeated_call_gets_the_first_answer_and_makes_nothing(
    model, blocks_file, store, kept_on_disk
):
    state = store.workspace("a") if kept_on_disk else None
    box = Toolbox(model, Workspace(state=state))
    segment = {"image": str(blocks_file), "expression": "all blocks"}
    first = once(box, "call 1", segment)
    assert "obj_1" in first and "obj_2" in first
    assert once(box, "call 1", segment) == first
    assert len(box.workspace.objects()) == 2
    assert "obj_3" in once(box, "call 2", segment)
    if kept_on_disk:
        later = Toolbox(model, Workspace(state=StateStore(store.folder).workspace("a")))
        assert once(later, "call 1", segment) == first
        assert len(later.workspace.objects()) == 4
        other = Toolbox(model, Workspace(state=store.workspace("b")))
        assert once(other, "call 1", segment) == first  # another client's, made anew
        assert len(other.workspace.objects()) == 2


@pytest.mark.parametrize("kept_on_disk", [True, False])
def test_a_call_that_ends_in_the_middle_leaves_nothing(model, blocks_file, store, kept_on_disk):
    box = Toolbox(model, Workspace(state=store.workspace("a") if kept_on_disk else None))
    red = {"image": str(blocks_file), "expression": "the red block"}
    box.call("segment_object", red)
    before = box.workspace.object("obj_1")
    with pytest.raises(KeyboardInterrupt), box.workspace.once("call"):
        box.call("segment_object", red)
        points = [{"x": 120, "y": 30}]
        box.call("is_point_inside_object", {"object_id": "obj_1", "points": points})
        # The call itself sees what it made.
        assert [one.object_id for one in box.workspace.objects()] == ["obj_1", "obj_2"]
        assert len(box.workspace.object("obj_1").points) == len(before.points) + 1
        raise KeyboardInterrupt
    (one,) = box.workspace.objects()
    assert one.points == before.points
    with pytest.raises(UnknownHandle):
        box.workspace.object("obj_2")


def test_of_two_processes_that_answer_one_call_the_first_counts(model, blocks_file, store):
    ours, theirs = (
        Toolbox(model, Workspace(state=StateStore(store.folder).workspace("a"))) for _ in range(2)
    )
    segment = {"image": str(blocks_file), "expression": "the red block"}
    with ours.workspace.once("call") as call:
        call.answer = ours.call("segment_object", segment).text
        assert "obj_1" in call.answer
        first = once(theirs, "call", segment)  # ends while ours is still at it
        assert "obj_2" in first
    assert call.answer == first
    assert [one.object_id for one in ours.workspace.objects()] == ["obj_2"]


def test_a_call_repeated_while_it_runs_waits_for_the_first(model, blocks_file):
    box = Toolbox(model)
    segment = {"image": str(blocks_file), "expression": "the red block"}
    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(lambda _: once(box, "call", segment), range(8)))
    assert len(answers) == len(box.workspace.objects()) == 1


def test_damage_is_a_storage_error(store, tmp_path):
    kept(store, 1)
    for path in store.folder.glob("blobs/*/*"):
        path.write_bytes(b"rotten")
    with pytest.raises(StorageError, match="damaged"):
        Workspace(state=store.workspace("a")).image("img_1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.sqlite").write_bytes(b"no database at all, but long enough" * 50)
    with pytest.raises(StorageError):
        StateStore(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        StateStore(tmp_path / "file")


def test_the_clock_may_be_set_back(store, monkeypatch):
    """What was written last is kept, not what has the highest time."""
    now = iter(range(2_000_000_000, 0, -1_000_000))
    monkeypatch.setattr("sam4mllm_tool.tools.state.time.time", lambda: next(now))
    for number in range(4):
        kept(store, number)
    size = max(file.stat().st_size for file in store.folder.glob("blobs/*/*"))
    store = reopened(store, max_bytes=2 * size)
    workspace = Workspace(state=store.workspace("a"))
    assert {workspace.image(f"img_{n}").image_id for n in (3, 4)} == {"img_3", "img_4"}
    with pytest.raises(UnknownHandle):
        workspace.image("img_1")
    # A time in the future does not keep a record for ever.
    monkeypatch.setattr("sam4mllm_tool.tools.state.time.time", lambda: 1000.0)
    store.prune()
    monkeypatch.setattr("sam4mllm_tool.tools.state.time.time", lambda: 1000.0 + 8 * 86_400)
    store.prune()
    assert Workspace(state=store.workspace("a")).objects() == []
    store.close()


def test_a_new_value_leaves_nothing_of_the_former_one(store, model, blocks_file):
    tools = Toolbox(model, Workspace(state=store.workspace("a")))
    for _ in range(2):  # two objects with the same logits share a file
        tools.call("segment_object", {"image": str(blocks_file), "expression": "the red block"})
    before = {path.name for path in store.folder.glob("blobs/*/*")}
    for handle, expected in (("obj_1", 3), ("obj_2", 2)):
        record = tools.workspace.object(handle)
        drawn = replace(record.drawn, logits=record.drawn.logits + 1)
        tools.workspace.update_object(replace(record, drawn=drawn))
        assert len(list(store.folder.glob("blobs/*/*"))) == expected
    after = {path.name for path in store.folder.glob("blobs/*/*")}
    assert len(before) == 2 and len(before & after) == 1
    kept_object = Workspace(state=store.workspace("a")).object("obj_1")
    assert np.array_equal(kept_object.drawn.logits, drawn.logits)


def test_a_folder_that_is_removed_while_it_is_used_is_said(store):
    kept(store, 1)
    store.folder.rename(store.folder.with_name("elsewhere"))
    with pytest.raises(StorageError, match="removed") as caught:
        kept(store, 2)
    assert caught.value.hint
    store.folder.mkdir()
    (store.folder / "state.sqlite").write_bytes(b"")
    with pytest.raises(StorageError, match="removed"):
        kept(store, 2)


@pytest.mark.parametrize("full", ["database", "files"])
def test_a_full_disk_is_a_storage_error_and_what_was_kept_stays(store, full, monkeypatch):
    kept(store, 1)
    if full == "database":  # SQLite's own bound: the same error as a full disk
        (pages,) = store._database.execute("PRAGMA page_count").fetchone()
        store._database.execute(f"PRAGMA max_page_count={pages}")
    else:

        def write_half(path, data):
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(StorageError) as caught:
        for number in range(2, 100):
            kept(store, number)
    assert caught.value.retryable and "room" in caught.value.hint
    assert not list(store.folder.glob("blobs/*/*.part"))
    monkeypatch.undo()
    store._database.execute("PRAGMA max_page_count=1000000")
    kept(store, 200)  # there is room again
    store = reopened(store)
    found = Workspace(state=store.workspace("a")).objects()
    assert found[0].object_id == "obj_1" and len(found) >= 2
    store.close()


def test_a_secret_that_was_cut_short_is_made_anew(store):
    first = store.secret("cookie_key")
    assert len(first) == 32 and store.secret("cookie_key") == first
    assert (store.folder / "cookie_key").stat().st_mode & 0o777 == 0o600
    for broken in (b"", first[:5]):
        (store.folder / "cookie_key").write_bytes(broken)
        again = store.secret("cookie_key")
        assert len(again) == 32 and again != first


def test_a_toolbox_with_state(model, blocks_file, tmp_path):
    box = Toolbox(model, state=tmp_path / "state")
    box.call("segment_object", {"image": str(blocks_file), "expression": "the red block"})
    with pytest.raises(InputError):
        Toolbox(model, Workspace(), state=tmp_path / "other")


def test_no_acknowledged_object_is_lost_to_kill_9(tmp_path):
    """The short form of ``python -m benchmarks.load --kills 20``."""
    report = anyio.run(survive, 1, 4, 0.0, tmp_path / "state")
    assert report["acknowledged"] >= 8 and report["checks"] >= 4
    assert report["lost"] == 0
