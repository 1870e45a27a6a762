"""Adapters of the original code base change transformers' model exactly as they change theirs."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_models import _BUILDERS, picture, randomise
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.mllm.loading import load_adapter
from sam4mllm_tool.training.convert_adapter import convert_adapter, renamed

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


class OriginalLayout(LlamaForCausalLM):
    """The original code base's module tree and arithmetic, over copies of given weights.

    There the causal language model is the outer model, and its inner one holds projector, vision
    tower and newline.
    """

    def __init__(self, twin):
        super().__init__(twin.config.text_config)
        self.twin = [twin]  # in a list: not a submodule; used for its image packing, no weights
        inner = self.model
        inner.load_state_dict(twin.model.language_model.state_dict())
        first, second = (
            twin.model.multi_modal_projector.linear_1,
            twin.model.multi_modal_projector.linear_2,
        )
        inner.mm_projector = nn.Sequential(_copy(first), nn.GELU(), _copy(second))
        inner.vision_tower = nn.Module()
        inner.vision_tower.vision_tower = twin.model.vision_tower
        inner.image_newline = nn.Parameter(twin.model.image_newline.detach().clone())
        self.lm_head.load_state_dict(twin.lm_head.state_dict())

    def forward(self, input_ids, pixel_values, image_sizes):
        tiles = pixel_values[0]
        seen = self.model.vision_tower.vision_tower(tiles, output_hidden_states=True)
        features = self.model.mm_projector(seen.hidden_states[-2][:, 1:])
        packed = self.twin[0].model.pack_image_features(
            [features], image_sizes, "default", self.model.image_newline
        )[0]
        embedded = self.model.embed_tokens(input_ids)
        embedded = embedded.masked_scatter(
            (input_ids == self.twin[0].config.image_token_id)[..., None], torch.cat(list(packed))
        )
        return self.lm_head(self.model(inputs_embeds=embedded).last_hidden_state)


def _copy(linear):
    twin = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    twin.load_state_dict(linear.state_dict())
    return twin


@pytest.fixture
def family():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, processor = _BUILDERS["llava_next"]()
    randomise(model, 0)
    model.config.projector_hidden_act = "gelu"
    turn = {"role": "user", "content": [{"type": "image", "image": picture(0, (150, 90)).pil},
                                        {"type": "text", "text": "Where is the dog?"}]}  # fmt: skip
    inputs = processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model.eval(), {
        name: inputs[name] for name in ("input_ids", "pixel_values", "image_sizes")
    }


def published(folder, original, **options):
    """A random adapter, saved as the published ones were."""
    targets = [f"model.layers.{n}.{p}" for n in range(len(original.model.layers))
               for p in PROJECTIONS] + ["mm_projector.0", "mm_projector.2"]  # fmt: skip
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": targets} | options
    adapted = get_peft_model(original, LoraConfig(**settings)).eval()
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.05 if "lora_" in name else 0.2)
    adapted.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "lmms-lab/llama3-llava-next-8b"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return adapted


def logits(model, inputs):
    with torch.inference_mode():
        out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_the_two_layouts_agree_before_any_adapter(family):
    model, inputs = family
    assert torch.allclose(logits(OriginalLayout(model), inputs), logits(model, inputs), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 128, "lora_alpha": 128},
        {"rank_pattern": {"model.layers.1.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "mm_projector.0"]},  # a suffix: the vision tower has it too
        {"modules_to_save": ["mm_projector", "lm_head"], "target_modules": ["gate_proj"]},
        {"use_dora": True},
    ],
    ids=["published", "rank 128", "patterns", "suffixes", "whole modules", "dora"],
)  # fmt: skip
def test_an_adapter_changes_both_layouts_alike(family, tmp_path, options):
    model, inputs = family
    plain = logits(model, inputs)
    original = OriginalLayout(model)
    if "target_modules" in options and "q_proj" in options["target_modules"]:
        # peft adapts the vision tower in place: the original must not share it with the other.
        original.model.vision_tower.vision_tower = type(model.model.vision_tower)(
            model.config.vision_config
        )
        original.model.vision_tower.vision_tower.load_state_dict(
            model.model.vision_tower.state_dict()
        )
    wanted = logits(published(tmp_path / "old", original.eval(), **options), inputs)
    convert_adapter(tmp_path / "old", tmp_path / "new")
    got = logits(PeftModel.from_pretrained(model, str(tmp_path / "new")).eval(), inputs)
    assert (wanted - plain).abs().max() > 0.05, "the adapter does something"
    assert torch.allclose(got, wanted, atol=1e-5)


def test_the_projects_loader_takes_it(family, tmp_path):
    model, inputs = family
    wanted = logits(published(tmp_path / "old", OriginalLayout(model).eval()), inputs)
    convert_adapter(tmp_path / "old", tmp_path / "new", base_model="llava-hf/base")
    config = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llava-hf/base"
    for merge in (False, True):
        adapted = load_adapter(copy.deepcopy(model), str(tmp_path / "new"), merge=merge).eval()
        # Merging rounds the sum of both weights once more.
        assert torch.allclose(logits(adapted, inputs), wanted, atol=1e-4 if merge else 1e-5)


def test_every_published_name_has_its_place(family, tmp_path):
    model, _ = family
    published(tmp_path / "old", OriginalLayout(model).eval())
    convert_adapter(tmp_path / "old", tmp_path / "new")
    old, new = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("old", "new"))
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in old
    assert "base_model.model.model.mm_projector.2.lora_B.weight" in old
    assert len(old) == len(new)
    modules = dict(model.named_modules())
    for key in new:
        assert key.removeprefix("base_model.model.").split(".lora_")[0] in modules


def test_a_bin_file_is_read_as_plain_tensors(family, tmp_path):
    model, inputs = family
    wanted = logits(published(tmp_path / "old", OriginalLayout(model).eval()), inputs)
    file = tmp_path / "old/adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    convert_adapter(tmp_path / "old", tmp_path / "new")
    got = logits(PeftModel.from_pretrained(model, str(tmp_path / "new")).eval(), inputs)
    assert torch.allclose(got, wanted, atol=1e-5)


def whole_weights(model, inputs, folder, *, lora_on_projector):
    """A published folder with the projector trained whole, and what the original says with it."""
    options = {} if lora_on_projector else {"target_modules": ["gate_proj", "down_proj"]}
    adapted = published(folder, OriginalLayout(model).eval(), **options)
    trained = {}
    for name, weight in adapted.named_parameters():
        if "mm_projector" in name and "lora_" not in name:
            weight.data += 0.05 * torch.randn_like(weight)
            trained[name] = weight.detach().clone()
    assert len(trained) == 4  # two matrices, two biases
    return trained, logits(adapted, inputs)


@pytest.mark.parametrize("lora_on_projector", [False, True])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_weights_that_were_trained_whole_come_along(family, tmp_path, lora_on_projector, kind):
    model, inputs = family
    trained, wanted = whole_weights(
        model, inputs, tmp_path / "old", lora_on_projector=lora_on_projector
    )
    file = tmp_path / f"old/non_lora_trainables.{kind}"
    torch.save(trained, file) if kind == "bin" else save_file(trained, file)
    convert_adapter(tmp_path / "old", tmp_path / "new")
    got = logits(
        PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "new")).eval(), inputs
    )
    assert torch.allclose(got, wanted, atol=1e-4)
    file.unlink()
    convert_adapter(tmp_path / "old", tmp_path / "without")
    less = logits(load_adapter(model, str(tmp_path / "without"), merge=False), inputs)
    assert not torch.allclose(less, wanted, atol=1e-2)


def test_a_converted_adapter_is_the_product_added_by_hand(family, tmp_path):
    """No peft in the reference: W + alpha / r * B A, on weights found by their original names."""
    model, inputs = family
    plain = logits(model, inputs)
    published(tmp_path / "old", OriginalLayout(model).eval(), r=4, lora_alpha=12)
    factors = load_file(tmp_path / "old/adapter_model.safetensors")
    original = OriginalLayout(model)
    weights = dict(original.named_parameters())
    names = [key for key in factors if key.endswith(".lora_A.weight")]
    for key in names:
        down, up = factors[key], factors[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[name].data += 12 / 4 * (up @ down)
    assert len(names) == 3 * 7 + 2
    wanted = logits(original.eval(), inputs)
    convert_adapter(tmp_path / "old", tmp_path / "new")
    got = logits(load_adapter(model, str(tmp_path / "new"), merge=True), inputs)
    assert (wanted - plain).abs().max() > 0.05
    assert torch.allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("base_model.model.model.image_newline", "image_newline"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight", "lora_C"),
        ("base_model.model.model.mm_projector.4.weight", "mm_projector.4"),
        ("base_model.model.model.vision_resampler.query.weight", "vision_resampler"),
    ],
)
@pytest.mark.parametrize("file", ["adapter_model", "non_lora_trainables"])
def test_what_has_no_place_is_named(family, tmp_path, key, said, file):
    model, _ = family
    published(tmp_path / "old", OriginalLayout(model).eval())
    path = tmp_path / f"old/{file}.safetensors"
    tensors = load_file(path) if path.exists() else {}
    save_file({**tensors, key: torch.zeros(3, 3)}, path)
    with pytest.raises(CheckpointError, match=said):
        convert_adapter(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_settings_that_cannot_come_along_are_refused(family, tmp_path):
    model, inputs = family
    whole_weights(model, inputs, tmp_path, lora_on_projector=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    key = "base_model.model.model.mm_projector.0.weight"
    save_file({key: torch.zeros(64, 64)}, tmp_path / "non_lora_trainables.safetensors")
    for wrong in ({"bias": "all"}, {"use_dora": True}, {"alpha_pattern": {"q_proj": 3}}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(CheckpointError):
            convert_adapter(tmp_path, tmp_path / "new")
    save_file({key: torch.zeros(2), key.replace("base_model.model.", "", 1): torch.zeros(2)},
              tmp_path / "non_lora_trainables.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="twice"):
        convert_adapter(tmp_path, tmp_path / "new")


class Evil:
    def __reduce__(self):
        return print, ("attacked",)


def test_what_is_no_such_adapter_is_refused(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="adapter_config"):
        convert_adapter(tmp_path, tmp_path / "new")
    config = tmp_path / "adapter_config.json"
    config.write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(CheckpointError, match="LoRA"):
        convert_adapter(tmp_path, tmp_path / "new")
    config.write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_adapter(tmp_path, tmp_path / "new")
    torch.save({"x": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_adapter(tmp_path, tmp_path / "new")
    assert "attacked" not in capsys.readouterr().out
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"\0" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_adapter(tmp_path, tmp_path / "new")
    for name in ("base_model.model.transformer.h.0.lora_A.weight", "model.layers.0.weight"):
        save_file({name: torch.zeros(1)}, file)
        with pytest.raises(CheckpointError):
            convert_adapter(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_names_by_hand():
    assert renamed("model.layers.3.mlp.up_proj") == "model.language_model.layers.3.mlp.up_proj"
    assert renamed("model.mm_projector.0") == "model.multi_modal_projector.linear_1"
    assert renamed("model.mm_projector.2.weight") == "model.multi_modal_projector.linear_2.weight"
    assert renamed("lm_head.weight") == "lm_head.weight"
    assert (
        renamed("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1")
        == "model.vision_tower.encoder.layers.0.mlp.fc1"
    )
    with pytest.raises(CheckpointError, match="original LLaVA-NeXT"):
        renamed("model.mm_projector.1.weight")
