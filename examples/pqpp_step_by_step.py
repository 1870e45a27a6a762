"""The dialogue of SAM4MLLM one step at a time: where is it, is this point on it, draw it."""

from __future__ import annotations

from sam4mllm_tool import PointLabel, Sam4MLLM, SegmentPrompt, TargetCount, embedded, load_image

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

    # The same in one call.
    at_once = model.segment(image, EXPRESSION, count=TargetCount.ONE)
    assert at_once.objects[0].points == points
    assert at_once.objects[0].mask == drawn.mask


if __name__ == "__main__":
    main()
