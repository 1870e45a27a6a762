"""Pictures of a batch: folders, lists and object stores, and what is wrong with them."""

import json

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sam4mllm_tool.annotate import annotate, plan
from sam4mllm_tool.errors import ImageError, InputError, StorageError
from sam4mllm_tool.images import batches
from sam4mllm_tool.images.batches import read_batch


@pytest.fixture
def pictures(tmp_path, blocks):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "a.png", "deep/c.png"):
        blocks.pil.save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture
def stored(pictures):
    """The pictures in fsspec's store of this process's memory."""
    store = fsspec.filesystem("memory")
    store.put(str(pictures), "/bucket/set", recursive=True)
    yield "memory://bucket/set"
    store.rm("/bucket", recursive=True)


def test_a_store_holds_what_the_folder_holds(pictures, stored, blocks):
    batch = read_batch(stored)
    names = ("a.png", "b.png", "broken.jpg", "deep/c.png")
    assert batch.names == read_batch(str(pictures)).names == names
    assert batch.open("deep/c.png").digest == blocks.digest
    with pytest.raises(ImageError):
        batch.open("broken.jpg")
    with pytest.raises(ImageError, match="There is no"):
        batch.open("gone.png")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_list_names_pictures_and_expressions(pictures, stored, blocks, suffix, where):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"picture": "deep/c.png", "expressions": ["the red block", "all blocks"], "number": 1},
        {"picture": "memory://bucket/set/a.png", "expressions": ["the blue block"], "number": 2},
        {"picture": "deep/c.png", "expressions": ["the red block"], "number": 3},
    ]
    root = stored if where == "store" else str(pictures)
    if suffix == "jsonl":
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        data = sink.getvalue().to_pybytes()
    with fsspec.open(f"{root}/list.{suffix}", "wb") as file:
        file.write(data)
    source = f"{root}/list.{suffix}"
    assert plan(source, None) == {
        "deep/c.png": ["the red block", "all blocks"],
        "memory://bucket/set/a.png": ["the blue block"],
    }
    assert plan(source, ["x"]) == {"deep/c.png": ["x"], "memory://bucket/set/a.png": ["x"]}
    batch = read_batch(source)
    assert {batch.open(name).digest for name in batch.names} == {blocks.digest}


def test_one_document_wherever_the_pictures_are(model, truth, pictures, stored, tmp_path):
    texts = ["the red block", "all blocks"]
    names = ("a.png", "b.png", "broken.jpg", "deep/c.png")
    (pictures / "list.jsonl").write_text(
        "".join(json.dumps({"picture": n, "expressions": texts}) + "\n" for n in names)
    )
    given = {"folder": (pictures, texts), "url": (stored, texts),
             "file": (pictures.as_uri(), texts),
             "list": (pictures / "list.jsonl", None)}  # fmt: skip
    files = []
    for name, (source, expressions) in given.items():
        out = tmp_path / f"{name}.json"
        done = annotate(model, source, expressions, out)
        assert list(done.failures) == ["broken.jpg"], name
        files.append(out.read_bytes())
    assert len(set(files)) == 1
    found = json.loads(files[0])["annotations"]
    assert len(found) == 9 and found[0]["area"] == int(np.sum(truth["the red block"][0].pixels))


@pytest.mark.parametrize(
    "text",
    ["{", "[1]\n", '{"image": "a.png"}\n', '{"picture": 3}\n', "\n",
     '{"picture": "a.png", "expressions": [1]}\n'],
)  # fmt: skip
def test_lists_that_are_none(pictures, text):
    (pictures / "list.jsonl").write_text(text)
    with pytest.raises(InputError):
        plan(pictures / "list.jsonl", ["x"])


def test_what_is_not_there(pictures):
    (pictures / "list.parquet").write_bytes(b"no parquet")
    (pictures / "bare.jsonl").write_text('{"picture": "a.png"}\n')
    for source, why in {
        f"{pictures}/list.parquet": "not Parquet",
        f"{pictures}/gone.jsonl": "there is no",
        "memory://nowhere": "holds no pictures",
        "nonsense://bucket": "cannot be opened",
        f"{pictures}/bare.jsonl": "no expressions are given",
    }.items():
        with pytest.raises(InputError, match=why):
            plan(source, None)


class MoodyStore(MemoryFileSystem):
    """Does not answer so many times."""

    protocol = "moody"
    away = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("moody://", "memory://"))

    def _open(self, path, *args, **kwargs):
        if type(self).away > 0:
            type(self).away -= 1
            raise TimeoutError("no answer")
        return super()._open(path, *args, **kwargs)


def test_a_store_that_is_away_is_asked_again_and_nothing_is_lost(
    model, stored, tmp_path, monkeypatch
):
    monkeypatch.setattr(batches, "_FIRST_WAIT_SECONDS", 0)
    fsspec.register_implementation("moody", MoodyStore, clobber=True)
    source = stored.replace("memory", "moody")
    out = tmp_path / "coco.json"

    def leave(name):
        if name == "a.png":
            MoodyStore.away = 100

    MoodyStore.away = 3
    with pytest.raises(StorageError, match=r"b\.png cannot be read after 4 attempts: no answer"):
        annotate(model, source, ["all blocks"], out, on_picture=leave)
    MoodyStore.away = 0
    done = annotate(model, source, ["all blocks"], out)
    assert done.done_before == 1 and len(done.document["images"]) == 3
