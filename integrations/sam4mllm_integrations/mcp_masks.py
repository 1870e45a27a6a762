"""Masks as MCP resources: their addresses, their content, and links to them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from io import BytesIO

import mcp_types as types

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.masks.files import masks_to_coco
from sam4mllm_tool.tools.workspace import ObjectRecord, Workspace, labelled_masks

MASK_URI = "sam4mllm://masks/"

_KINDS = {
    "png": ("image/png", "a PNG picture: 255 on the object, 0 elsewhere"),
    "json": ("application/json", "a COCO JSON document with an RLE mask"),
}


def mask_links(one: ObjectRecord | str) -> list[types.ResourceLink]:
    """Links to the forms of an object's mask; the object by itself or by its object_id."""
    object_id, name = (one, "") if isinstance(one, str) else (one.object_id, f" ({one.name[:60]})")
    return [
        types.ResourceLink(
            name=f"{object_id}.{kind}",
            uri=f"{MASK_URI}{object_id}.{kind}",
            description=f"Mask of {object_id}{name} as {text}.",
            mime_type=mime,
        )
        for kind, (mime, text) in _KINDS.items()
    ]


def mask_list(objects: Iterable[ObjectRecord]) -> types.ListResourcesResult:
    """The masks of those objects that have one."""
    links = [link for one in objects if one.mask is not None for link in mask_links(one)]
    plain = [types.Resource(**link.model_dump(exclude={"type"})) for link in links]
    return types.ListResourcesResult(resources=plain)


def mask_templates() -> types.ListResourceTemplatesResult:
    """How the address of a mask is made from an object_id."""
    templates = [
        types.ResourceTemplate(
            name=f"mask_{kind}",
            uri_template=f"{MASK_URI}{{object_id}}.{kind}",
            description=f"Mask of an object as {text}.",
            mime_type=mime,
        )
        for kind, (mime, text) in _KINDS.items()
    ]
    return types.ListResourceTemplatesResult(resource_templates=templates)


def mask_address(uri: str) -> tuple[str, str]:
    """The object_id and the form that an address names.

    Raises:
        InputError: it is not the address of a mask.
    """
    object_id, _, kind = uri.removeprefix(MASK_URI).rpartition(".")
    if not uri.startswith(MASK_URI) or kind not in _KINDS:
        raise InputError(f"there is no resource {uri[:120]!r}")
    return object_id, kind


def read_mask(
    workspace: Workspace, uri: str
) -> types.TextResourceContents | types.BlobResourceContents:
    """A mask in full.

    Raises:
        InputError: no such object, or it has no mask.
    """
    object_id, kind = mask_address(uri)
    one = workspace.object(object_id)
    record = workspace.image(one.image_id)
    if one.mask is None:
        raise InputError(f"{object_id} has no mask yet")
    mime = _KINDS[kind][0]
    if kind == "json":
        text = json.dumps(masks_to_coco(labelled_masks([one]), record.image, record.file_name))
        return types.TextResourceContents(uri=uri, mime_type=mime, text=text)
    png = BytesIO()
    one.mask.to_pil().save(png, "PNG")
    blob = base64.b64encode(png.getvalue()).decode("ascii")
    return types.BlobResourceContents(uri=uri, mime_type=mime, blob=blob)
