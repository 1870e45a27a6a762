"""Each proposer, small and with random weights, against its own processor and model."""

import json
import string

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from test_transformers_sam import PERCEPTION

from sam4mllm_tool.errors import BackendError, CheckpointError, ExpressionError
from sam4mllm_tool.geometry import box_iou, clip_box
from sam4mllm_tool.proposer import load_proposer
from sam4mllm_tool.protocols import Proposer
from sam4mllm_tool.types import Box, RgbImage

SIZES = [(200, 60), (45, 170), (301, 303)]
PHRASE = "Red apple"
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2}  # fmt: skip


def clip_tokenizer():
    """CLIP's own tokenizer over single bytes, without merges."""
    letters = [*map(chr, range(33, 127)), *(chr(n) for n in range(161, 324))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>",
              "<|endoftext|>"]  # fmt: skip
    return tf.CLIPTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[])


def bert_tokenizer():
    """BERT's own tokenizer over single letters."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?"]
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters)]
    return tf.BertTokenizer(vocab={piece: n for n, piece in enumerate(pieces)})


def ends(tokenizer) -> dict:
    return {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id}  # fmt: skip


def sam3():
    tokenizer = clip_tokenizer()
    parts = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = tf.Sam3Config(
        vision_config=PERCEPTION,
        text_config={"model_type": "clip_text_model", **NARROW, "projection_dim": 32,
                     "max_position_embeddings": 32, **ends(tokenizer)},
        geometry_encoder_config={**parts, "num_layers": 1},
        detr_encoder_config={**parts, "num_layers": 1},
        detr_decoder_config={**parts, "num_layers": 2, "num_queries": 12},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )  # fmt: skip
    pictures = tf.Sam3ImageProcessor(size={"height": 112, "width": 112})
    return tf.Sam3Model(config), tf.Sam3Processor(pictures, tokenizer)


def owlv2():
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 16
    config = tf.Owlv2Config(
        text_config={**NARROW, "max_position_embeddings": 16, **ends(tokenizer)},
        vision_config={**NARROW, "image_size": 96, "patch_size": 16}, projection_dim=32,
    )  # fmt: skip
    pictures = tf.Owlv2ImageProcessorPil(size={"height": 96, "width": 96})
    return tf.Owlv2ForObjectDetection(config), tf.Owlv2Processor(pictures, tokenizer)


def grounding_dino():
    tokenizer = bert_tokenizer()
    config = tf.GroundingDinoConfig(
        backbone_config={"model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 16,
                         "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 4,
                         "out_indices": [2, 3, 4]},
        text_config={"model_type": "bert", **NARROW, "vocab_size": len(tokenizer)},
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=20, max_text_len=48,
    )  # fmt: skip
    pictures = tf.GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 200})
    model = tf.GroundingDinoForObjectDetection(config)
    return model, tf.GroundingDinoProcessor(pictures, tokenizer)


def asked(name, processor, image, phrase):
    """The documented call of each processor."""
    text = {
        "sam3": phrase, "owlv2": [[phrase]], "grounding_dino": phrase.lower() + "."
    }[name]  # fmt: skip
    inputs = processor(images=image.pil, text=text, return_tensors="pt")
    return {key: value for key, value in inputs.items() if key != "original_sizes"}


def detected(name, processor, output, inputs, size, threshold):
    """The documented post-processing of each processor."""
    if name == "sam3":
        process = processor.post_process_instance_segmentation
        return process(output, threshold=threshold, target_sizes=[size])[0]
    process = processor.post_process_grounded_object_detection
    extra = (inputs["input_ids"],) if name == "grounding_dino" else ()
    return process(output, *extra, threshold=threshold, target_sizes=[size])[0]


BUILD = {"sam3": sam3, "owlv2": owlv2, "grounding_dino": grounding_dino}
LIMIT = 50


@pytest.fixture(scope="module", params=BUILD)
def family(request, tmp_path_factory):
    """(name, folder of the checkpoint, the family's model, its processor)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = BUILD[request.param]()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():  # so that boxes and scores differ
        if weight.ndim > 1 and "position" not in name:
            wide = 0.4 if "box" in name else 1.5
            weight.data.normal_(0.0, wide / weight[0].numel() ** 0.5, generator=generator)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Loaded again, as the library may choose another implementation of the picture's resizing.
    return request.param, folder, model.eval(), tf.AutoProcessor.from_pretrained(folder)


def noise(size, seed=0) -> RgbImage:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return RgbImage.from_pil(Image.fromarray(coarse).resize(size))


def reference(family, image, threshold):
    """What the library finds, in plain steps."""
    name, _, model, processor = family
    inputs = asked(name, processor, image, PHRASE)
    with torch.no_grad():
        output = model(**inputs)
    return detected(name, processor, output, inputs, (image.height, image.width), threshold)


@pytest.mark.parametrize("size", SIZES)
def test_candidates_are_those_of_the_librarys_own_post_processing(family, size):
    image = noise(size)
    proposer = load_proposer(family[1], device="cpu", threshold=0.0)
    assert isinstance(proposer, Proposer)
    found = proposer.propose(image, PHRASE, LIMIT)
    wanted = reference(family, image, 0.0)
    assert len(found) > 1
    assert [one.confidence for one in found] == sorted((f.confidence for f in found), reverse=True)
    boxes = [clip_box(Box(*box), *size) for box in wanted["boxes"].tolist()]
    scores, taken = wanted["scores"].tolist(), []
    for one in found:
        rows = np.array([[*box, 100 * score] for box, score in zip(boxes, scores, strict=True)])
        number = int(np.abs(rows - [*one.box, 100 * one.confidence]).max(axis=1).argmin())
        assert one.box == pytest.approx(boxes[number], abs=0.01)
        assert one.confidence == pytest.approx(scores[number], abs=1e-5)
        if family[0] == "sam3":
            assert one.mask.pixels.shape == (size[1], size[0])
            assert (one.mask.pixels != wanted["masks"][number].numpy().astype(bool)).mean() < 0.001
        taken.append(number)
    # What is left out repeats a better one, or lies outside the picture.
    for number in set(range(len(boxes))) - set(taken):
        better = [n for n in taken if scores[n] >= scores[number]]
        repeats = any(box_iou(boxes[number], boxes[n]) > 0.69 for n in better)
        assert repeats or boxes[number].area < 0.01, number


def test_the_threshold_and_the_limit_leave_out_the_least_likely(family):
    image = noise((150, 90))
    every = load_proposer(family[1], device="cpu", threshold=0.0).propose(image, PHRASE, LIMIT)
    middle = (every[0].confidence + every[1].confidence) / 2
    strict = load_proposer(family[1], device="cpu", threshold=middle)
    assert [one.box for one in strict.propose(image, PHRASE, LIMIT)] == [every[0].box]
    loose = load_proposer(family[1], device="cpu", threshold=0.0)
    assert [one.box for one in loose.propose(image, PHRASE, 2)] == [one.box for one in every[:2]]
    nothing = load_proposer(family[1], device="cpu", threshold=1.0)
    assert nothing.propose(image, PHRASE, LIMIT) == []


def test_a_phrase_that_the_model_cannot_read_whole_is_refused(family):
    proposer = load_proposer(family[1], device="cpu")
    with pytest.raises(ExpressionError, match="tokens") as caught:
        proposer.propose(noise((60, 40)), "a very long phrase " * 9, LIMIT)
    assert "noun phrase" in caught.value.hint


def test_numbers_that_are_not_finite_are_a_failure_and_not_an_empty_picture(family):
    proposer = load_proposer(family[1], device="cpu", threshold=0.0)
    for parameter in proposer._model.parameters():
        if parameter.ndim == 1:
            parameter.data[0] = float("nan")
    with pytest.raises(BackendError, match="not finite"):
        proposer.propose(noise((60, 40)), PHRASE, LIMIT)


def test_bad_checkpoints(family, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in family[1].iterdir():
        content = file.read_bytes()
        shortened = content[:-100] if file.suffix == ".safetensors" else content
        (cut / file.name).write_bytes(shortened)
    for path in (tmp_path / "bert", tmp_path / "missing", cut):
        with pytest.raises(CheckpointError) as caught:
            load_proposer(path, device="cpu")
        assert "mllm" in caught.value.hint, path


def test_the_embedded_default_is_the_mllm_itself():
    assert load_proposer() is None
