"""Data sets full of what evaluators differ about, and predictions for them, all from a seed."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((60, 40), (37, 81), (640, 427), (50, 50))


def corners(rng: random.Random, width: int, height: int) -> list[list[float]]:
    """A polygon, as often crossing itself as not, on quarter pixels, partly outside."""
    count = rng.randint(3, 8)
    return [[rng.randint(-12, 4 * width + 12) / 4, rng.randint(-12, 4 * height + 12) / 4]
            for _ in range(count)]  # fmt: skip


def write_reasonseg(root: Path, split: str = "val", seed: int = 5, files: int = 24) -> Path:
    """``root/SPLIT/NAME.jpg`` and ``.json``: every rule makes a difference."""
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number in range(files):
        width, height = SIZES[number % 4]
        shown = Image.new("RGB", (width, height), (number, 9, 9))
        if number % 6 == 1:  # lies on its side in the file, EXIF says so
            exif = Image.Exif()
            exif[0x0112] = 6
            shown.transpose(Image.Transpose.ROTATE_90).save(folder / f"{number:02d}.jpg", exif=exif)
        else:
            shown.save(folder / f"{number:02d}.jpg")
        labels = [rng.choice(["target", "Target", "ignore", "target"]) for _ in range(5)]
        if number % 8 == 2:
            labels += ["target"] * 30  # more than a sort by insertion takes
        shapes = [{"label": label, "points": corners(rng, width, height)} for label in labels]
        if number % 3 == 0:  # a target and an ignored region of the same shape, either order
            twin = corners(rng, width, height)
            order = ["target", "ignore"] if number % 2 else ["ignore", "target"]
            shapes += [{"label": label, "points": twin} for label in order]
        if number % 4 == 3:
            shapes.append({"label": "Flag", "points": corners(rng, width, height)})
            shapes.append({"label": "flagpole", "points": corners(rng, width, height)})
        texts: object = [f"Thing {number} {k} " for k in range(rng.randint(1, 3))]
        if number == 7:
            texts = "A plain string"
        if number == 8:
            texts = ["the café’s sign"]
        notes = json.dumps(
            {"text": texts, "is_sentence": True, "shapes": shapes}, ensure_ascii=False
        )
        encoding = "cp1252" if number == 8 else "utf-8"
        (folder / f"{number:02d}.json").write_bytes(notes.encode(encoding))
    return root


def write_grefcoco(root: Path, split: str = "val", seed: int = 6, pictures: int = 20) -> Path:
    """gRefCOCO's files: crowds beside targets, no targets, several, ``raw`` other than ``sent``."""
    rng = random.Random(seed)
    images, annotations, refs = [], [], []
    folder = root / "images/train2014"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "grefcoco").mkdir(exist_ok=True)
    for number in range(1, pictures + 1):
        width, height = SIZES[number % 4]
        name = f"COCO_train2014_{number:012d}.jpg"
        Image.new("RGB", (width, height), (number, 0, 0)).save(folder / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        ids = []
        for place in range(4):
            ids.append(100 * number + place)
            entry = {"id": ids[-1], "image_id": number, "category_id": 1, "iscrowd": 0,
                     "bbox": [1.0, 2.0, width / 2, height / 3], "area": 9.0}  # fmt: skip
            if place == 3:
                left = np.zeros((height, width), np.uint8)
                left[height // 3 :, : width // 2] = 1
                entry |= {"iscrowd": 1, "segmentation": {"size": [height, width],
                                                         "counts": run_lengths(left)}}  # fmt: skip
            else:
                parts = [corners(rng, width, height) for _ in range(rng.randint(1, 3))]
                entry["segmentation"] = [[n for point in part for n in point] for part in parts]
            annotations.append(entry)
        for targets in ([ids[0]], [ids[1], ids[2]], [ids[0], ids[3]], [-1]):
            sentences = [
                {"sent": f"thing {len(refs)} {k}", "raw": f"Thing, {len(refs)} {k}!",
                 "tokens": [], "sent_id": 10 * len(refs) + k}
                for k in range(2)
            ]  # fmt: skip
            refs.append({"ref_id": len(refs), "ann_id": targets, "image_id": number,
                         "split": split, "category_id": [1], "file_name": name,
                         "no_target": targets == [-1],
                         "sent_ids": [s["sent_id"] for s in sentences],
                         "sentences": sentences})  # fmt: skip
    content = {"images": images, "annotations": annotations,
               "categories": [{"id": 1, "name": "thing"}]}  # fmt: skip
    (root / "grefcoco/instances.json").write_text(json.dumps(content))
    (root / "grefcoco/grefs(unc).json").write_text(json.dumps(refs))
    return root


def write_refcoco(root: Path, split: str = "val", seed: int = 7) -> Path:
    """RefCOCO's files, made of gRefCOCO's: the first target of each ref that has one."""
    write_grefcoco(root, split, seed)
    (root / "refcoco").mkdir()
    (root / "grefcoco/instances.json").rename(root / "refcoco/instances.json")
    refs = json.loads((root / "grefcoco/grefs(unc).json").read_text())
    kept = [{**ref, "ann_id": ref["ann_id"][0], "category_id": 1}
            for ref in refs if ref["ann_id"][0] != -1]  # fmt: skip
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(kept, protocol=0))
    return root


def run_lengths(pixels: np.ndarray) -> list[int]:
    """Uncompressed COCO run lengths, column by column, beginning with zeros."""
    flat = pixels.ravel(order="F").astype(int)
    steps = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *steps, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def predicted(expression: str, width: int, height: int) -> np.ndarray | None:
    """A mask for an expression, the same for everybody; ``None``: "nothing there".

    Now and then something is there, but its mask is empty.
    """
    rng = random.Random(expression.strip().lower().replace(",", "").replace("!", ""))
    if rng.random() < 0.3:
        return None
    pixels = np.zeros((height, width), bool)
    if rng.random() < 0.9:
        left, top = rng.randrange(width // 4), rng.randrange(height // 3)
        pixels[top : top + 2 * height // 3 + 1, left : left + 3 * width // 4] = True
    return pixels
