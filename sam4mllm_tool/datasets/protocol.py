"""How different evaluators read and score the same data sets, each difference by name.

What LISA (Lai et al., CVPR 2024; ``utils/reason_seg_dataset.py``, ``utils/dataset.py``,
``train_ds.py``), ReLA (Liu et al., CVPR 2023; detectron2 with ``gres_model/``) and the REFER API
(``refer.py``) do was read in their code and compared with it on the same files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args, get_type_hints

from sam4mllm_tool.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate.

    Attributes:
        name: as reports name it.
        texts: of a ReasonSeg file: ask each of them, or the first alone.
        plain_text: how a ReasonSeg ``text`` is read that is a string instead of a list: as one
            expression, or as a sequence of characters (of which ``texts="first"`` asks the first).
        flag: ReasonSeg shapes to leave out: labelled exactly "flag", or with "flag" in the label.
        ties: of ReasonSeg shapes with equally many pixels, which lies on top.
        sentence: the field of a RefCOCO sentence that is asked: ``sent``, ``sent`` in lower case,
            or ``raw``.
        crowds: targets annotated as crowds count, or are dropped.
        size: masks are compared at the picture's own size, or stretched to 480 x 480 pixels, the
            truth's polygons before they are rasterised.
        no_target: whether there is a target is what the masks show, or what the model states: a
            stated absence then has IoU 0 with a target (its mask still in cIoU's union) and 1
            without, a stated presence without target 0 even if its mask is empty.
        exif: pictures with an EXIF orientation are turned upright, taken as stored, or upright
            unless the masks fit only what is stored.
    """

    name: str
    texts: Literal["all", "first"] = "all"
    plain_text: Literal["one", "characters"] = "one"
    flag: Literal["exact", "substring"] = "substring"
    ties: Literal["later", "earlier"] = "later"
    sentence: Literal["sent", "lower", "raw"] = "sent"
    crowds: Literal["keep", "drop"] = "keep"
    size: Literal["own", "480"] = "own"
    no_target: Literal["mask", "statement"] = "mask"
    exif: Literal["fit", "upright", "stored"] = "fit"

    @property
    def rules(self) -> dict[str, str]:
        """The rules by name."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    def with_rules(self, changes: list[str]) -> Protocol:
        """The protocol with some rules changed, ``NAME=VALUE`` each, and a name that says so.

        Raises:
            InputError: an unknown rule or value.
        """
        if not changes:
            return self
        hints = get_type_hints(Protocol)
        known = {field.name: get_args(hints[field.name]) for field in fields(self)}
        known.pop("name")
        found = {}
        for change in changes:
            rule, _, value = change.partition("=")
            if value not in known.get(rule, ()):
                options = "; ".join(f"{name}={'|'.join(some)}" for name, some in known.items())
                raise InputError(f"no rule {change!r}", hint=f"Rules: {options}.")
            found[rule] = value
        changed = {rule: value for rule, value in found.items() if self.rules[rule] != value}
        name = " ".join([self.name, *(f"{rule}={value}" for rule, value in changed.items())])
        return replace(self, **{**changed, "name": name})  # type: ignore[arg-type]


OURS = Protocol("ours")
PROTOCOLS: dict[str, Protocol] = {
    known.name: known
    for known in (
        OURS,
        Protocol(
            "lisa", texts="first", plain_text="characters", flag="exact", ties="earlier",
            sentence="lower", exif="upright",
        ),
        Protocol(
            "rela", sentence="raw", crowds="drop", size="480", no_target="statement",
            exif="upright",
        ),
        Protocol("refer", exif="stored"),
    )
}  # fmt: skip


def get_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        InputError: there is none.
    """
    if name not in PROTOCOLS:
        raise InputError(f"no protocol {name!r}", hint=f"Known: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
