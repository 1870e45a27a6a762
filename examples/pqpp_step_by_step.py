"""The dialogue of SAM4MLLM one step at a time: where is it, is this point on it, draw it."""

from __future__ import annotations

from sam4mllm_tool import PointLabel, Sam4MLLM, SegmentPrompt, TargetCount, embedded, load_image
from sam4mllm_tool.masks.relations import mask_iou

EXPRESSION = "the alarm clock left of the tree"


def main() -> None:
    """Walk through PQPP, then do it in one call."""
    model = Sam4MLLM.from_pretrained()
    image = load_image(embedded.DEMO / "demo.png").image

    # Round 1: where is it?
    location = model.locate(image, EXPRESSION, TargetCount.ONE)
    found = location.objects[0]
    print("round 1:", location.dialogue[-2].text)
    print("reply:  ", location.dialogue[-1].text.strip())

    # Round 2, the same dialogue: are these points on it?
    candidates = model.candidate_points(found.box, image)
    points = model.check_points(image, location, found.box, candidates)
    for point in points:
        print(f"({point.x:5.1f}, {point.y:5.1f}) {point.label}, p_yes {point.p_yes:.2f}")
    sure = [point for point in points if point.label is not PointLabel.UNDECIDED]
    print(f"{len(sure)} of {len(points)} points are sure enough to be shown to SAM")

    # SAM draws from the box and the points that are sure.
    drawn = model.draw(image, [SegmentPrompt(found.box, points)])[0]
    print(f"mask: {drawn.mask.area} pixels, predicted IoU {drawn.predicted_iou:.2f}")

    # The same in one call. The keys and values of round 1 are reused there, which may change the
    # last places of a probability, so numbers are compared with a tolerance.
    (at_once,) = model.segment(image, EXPRESSION, count=TargetCount.ONE).objects
    for one, other in zip(at_once.points, points, strict=True):
        assert (one.x, one.y, one.label) == (other.x, other.y, other.label)
        assert abs((one.p_yes or 0) - (other.p_yes or 0)) < 1e-4
    assert mask_iou(at_once.mask, drawn.mask) > 0.99


if __name__ == "__main__":
    main()
