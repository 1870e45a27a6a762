"""Checkpoints that go together, and what they cost: the list behind ``sam4mllm-tool models``.

Parameters are counted from the architectures (built without weights, in the checkpoints' own
configurations; Qwen-VL-Chat's and the adapter's are derived from their published sizes); sizes of
downloads are those that the hub's file lists state. Memory is computed, parameters times bytes,
for the weights alone. On top of it come the key-value cache and the image embeddings, both bounded
by ``cache_bytes``, and the activations of a forward pass.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from sam4mllm_tool import embedded

MLLM_BYTES = 2
"""Bytes per parameter of an MLLM in bfloat16, the default on a GPU."""
SAM_BYTES = 4
"""Bytes per parameter of a segmenter in float32, the default everywhere."""

_LLAMA3 = "Llama 3 Community"
_APACHE = "Apache-2.0"
_NON_COMMERCIAL = "NVIDIA Source Code License for SAM4MLLM (non-commercial)"


@dataclass(frozen=True)
class Part:
    """A checkpoint.

    Attributes:
        name: hub id, or name and place.
        parameters: number of weights that are loaded.
        bytes_each: bytes per weight once loaded.
        download: bytes to download, ``None`` where it is not known.
        licence: of the weights.
    """

    name: str
    parameters: int
    bytes_each: int
    download: int | None
    licence: str

    @property
    def memory(self) -> int:
        """Bytes of the loaded weights."""
        return self.parameters * self.bytes_each


@dataclass(frozen=True)
class Combination:
    """An MLLM and a segmenter, and how to run them.

    Attributes:
        name: short.
        mllm: the MLLM, and an adapter if there is one.
        segmenter: the segmenter, and a decoder laid over it if there is one.
        commands: what to type, in order.
        run: whether the combination was run with its true weights in this project.
        notes: what was checked instead, what to know.
    """

    name: str
    mllm: tuple[Part, ...]
    segmenter: tuple[Part, ...]
    commands: tuple[str, ...]
    run: bool
    notes: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """All checkpoints."""
        return self.mllm + self.segmenter

    @property
    def memory(self) -> int:
        """Bytes of all weights once loaded."""
        return sum(part.memory for part in self.parts)

    @property
    def download(self) -> int:
        """Bytes to download, of the parts whose size is known."""
        return sum(part.download or 0 for part in self.parts)

    @property
    def unsized(self) -> int:
        """Number of parts whose size is not known."""
        return sum(part.download is None for part in self.parts)


LLAVA_NEXT = Part(
    "llava-hf/llama3-llava-next-8b-hf", 8_355_276_800, MLLM_BYTES, 16_720_000_000, _LLAMA3
)
# Rank 128 on all projections of 32 layers and on both layers of the projector.
ADAPTER = Part(
    "SAM4MLLM adapter (link in the authors' README)",
    337_248_256, MLLM_BYTES, None, _NON_COMMERCIAL,
)  # fmt: skip
XL1 = Part(
    "mit-han-lab/efficientvit-sam: efficientvit_sam_xl1.pt",
    203_346_128, SAM_BYTES, 814_000_000, _APACHE,
)  # fmt: skip
DECODER = Part(
    "effvit_xl1_decoder_coco_ft.pt (link in the authors' README)",
    0,  # it takes the place of XL1's own
    SAM_BYTES, None, _NON_COMMERCIAL,
)  # fmt: skip
QWEN_VL = Part("Qwen/Qwen-VL-Chat", 9_600_000_000, MLLM_BYTES, 19_300_000_000, "Tongyi Qianwen")

_SEGMENTERS = (
    Part("facebook/sam2.1-hiera-large", 216_924_865, SAM_BYTES, 898_000_000, _APACHE),
    Part("facebook/sam3", 458_260_369, SAM_BYTES, 3_440_000_000, "SAM License, access on request"),
)
PROPOSERS = (
    "facebook/sam3", "IDEA-Research/grounding-dino-base", "google/owlv2-base-patch16-ensemble",
)  # fmt: skip
"""Hub ids of text-prompted models that find candidates for a phrase; none was run here."""
_ZERO_SHOT = (
    Part("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656, MLLM_BYTES, 16_580_000_000, _APACHE),
    Part("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696, MLLM_BYTES, 17_540_000_000, _APACHE),
    Part("OpenGVLab/InternVL3-8B-hf", 7_944_300_032, MLLM_BYTES, 15_890_000_000, "Qwen"),
)
_TRY = 'sam4mllm-tool segment photo.jpg "the red apple" --out masks'

FOR_PHOTOGRAPHS = f"--mllm {_ZERO_SHOT[0].name} --sam {_SEGMENTERS[0].name}"
"""Options that name stock models, for photographs."""


def is_hub_id(name: str) -> bool:
    """Whether a checkpoint's name can be ``OWNER/NAME`` on the hub, and not only a path."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def nearest_checkpoint(name: str) -> str:
    """The beginning of a hint for a name or path without a checkpoint; empty if none is near.

    The nearest is one of this list, or a file or folder beside the path.
    """
    known = [embedded.NAME]
    known += [part.name for part in (LLAVA_NEXT, QWEN_VL, *_ZERO_SHOT, *_SEGMENTERS)]
    known += PROPOSERS
    folder = Path(name).expanduser().parent
    beside = [one.name for one in folder.iterdir()] if folder.is_dir() else []
    similar = get_close_matches(name, known, n=1)
    similar += [str(folder / one) for one in get_close_matches(Path(name).name, beside, n=1)]
    return f"Did you mean {similar[0]!r}? " if similar else ""


def combinations() -> tuple[Combination, ...]:
    """All known combinations: the shipped one, the paper's two, and stock models."""
    return (_shipped(), _paper(), _paper_on_qwen_vl(), *_zero_shot())


def _shipped() -> Combination:
    """The shipped combination; its sizes are read from the files."""
    mllm = Part("embedded MLLM", _stored(embedded.MLLM), 4, 0, _APACHE)
    sam = Part("embedded small SAM", _stored(embedded.SAM), SAM_BYTES, 0, _APACHE)
    return Combination(
        "embedded",
        (mllm,),
        (sam,),
        ("sam4mllm-tool demo",),
        run=True,
        notes="demo models: they know drawn scenes only; on photographs results are meaningless",
    )


def _paper() -> Combination:
    return Combination(
        "SAM4MLLM-8B (the paper's)",
        (LLAVA_NEXT, ADAPTER),
        (XL1, DECODER),
        (
            f"sam4mllm-tool convert-adapter checkpoint/sam4mllm adapter --base {LLAVA_NEXT.name}",
            f"{_TRY} --mllm {LLAVA_NEXT.name} --adapter adapter --sam efficientvit_sam_xl1.pt"
            " --sam-decoder effvit_xl1_decoder_coco_ft.pt",
        ),
        run=False,
        notes="the dialogue equals the authors' recorded demo token for token; the segmenter "
        "equals the original code, compared with random weights (docs/checkpoints.md)",
    )


def _paper_on_qwen_vl() -> Combination:
    return Combination(
        "Qwen-VL-Chat, served (the paper's other base)",
        (QWEN_VL,),
        (XL1,),
        (
            f"vllm serve {QWEN_VL.name} --trust-remote-code --max-logprobs 20"
            ' --hf-overrides \'{"architectures": ["QwenVLForConditionalGeneration"]}\''
            " --generation-config vllm",
            f"{_TRY} --mllm http://localhost:8000/v1 --format qwen_vl"
            " --sam efficientvit_sam_xl1.pt",
        ),
        run=False,
        notes="the boxes in its documentation's replies are where it draws them; the "
        "server runs the checkpoint's tokenizer code, and needs the MLLM's memory",
    )


def _zero_shot() -> list[Combination]:
    """Stock models, asked in their own formats."""
    return [
        Combination(
            f"{mllm.name.split('/')[1]} + {sam.name.split('/')[1]}",
            (mllm,),
            (sam,),
            (f"{_TRY} --mllm {mllm.name} --sam {sam.name}",),
            run=False,
            notes="small models of both architectures were run, with random weights",
        )
        for mllm in _ZERO_SHOT
        for sam in _SEGMENTERS
    ]


def _stored(folder: Path) -> int:
    """Parameters of a shipped checkpoint, which is stored in half precision."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2
