"""LoRA on referring dialogues: transformers' ``Trainer`` and peft, loss on the assistant's words.

Everything is frozen but LoRA factors on attention and MLP projections of the language model and
the projector between picture and text. The adapter folder says by itself what it speaks, what it
stands on and how it was made (``sam4mllm.json``), so that it can be loaded without being told.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from sam4mllm_tool import embedded
from sam4mllm_tool.errors import CheckpointError, DatasetError, ImageError, InputError
from sam4mllm_tool.evaluation.run import UNREADABLE_LIMIT
from sam4mllm_tool.formats import get_format
from sam4mllm_tool.mllm.encoding import DialogueEncoder, ImageInputs, Transcript, model_inputs
from sam4mllm_tool.mllm.loading import (
    TEMPLATE_FILE,
    choose_placement,
    load_model,
    load_processor,
)
from sam4mllm_tool.protocols import Turn
from sam4mllm_tool.training.checkpoints import last_whole, saving
from sam4mllm_tool.training.convergence import ConvergencePage
from sam4mllm_tool.training.dialogues import Conversation, Recipe
from sam4mllm_tool.training.progress import HeldOut
from sam4mllm_tool.training.recipe import LoraRecipe
from sam4mllm_tool.training.token_loss import TokenLoss
from sam4mllm_tool.types import RgbImage

_log = logging.getLogger(__name__)
IGNORED = -100
PROJECTORS = ("multi_modal_projector", "resampler", "connector", "merger", "mlp1")
"""Names under which model families keep what lies between picture and text."""
VISION = ("vision", "visual")
"""What the names of a vision tower's layers hold."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "qkv", "proj")
"""Names of the linear layers that get LoRA factors, of language models and of vision towers."""


@dataclass(frozen=True)
class Learnt:
    """One sequence of a conversation as the model reads it while it learns.

    Attributes:
        inputs: the model's arguments, without padding; ``input_ids`` is 1 x L.
        labels: 1 x L; the token itself where the assistant speaks, else -100.
        text: tokens before the picture is put in, which counts as one.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    text: int


class ConversationEncoder:
    """Conversations to the ids that are read when they are asked, with labels on the replies.

    A conversation is one sequence, or several where the chat template writes an earlier reply
    otherwise than it is said (:meth:`DialogueEncoder.transcripts`).
    """

    def __init__(self, processor: Any, recipe: Recipe, longest: int | None = None) -> None:
        self.encoder, self.longest = DialogueEncoder(processor), longest
        system = get_format(recipe.format).system_prompt
        self._opening = () if system is None else (Turn("system", system),)

    def fit(self, conversation: Conversation) -> tuple[Learnt, ...]:
        """As many of its questions as the limit of tokens per sequence allows, one at least."""
        encoded = self.encode(conversation)
        while self.longest and max(one.text for one in encoded) > self.longest:
            if len(conversation.topics) == 1:
                break
            conversation = conversation.shortened()
            encoded = self.encode(conversation)
        return encoded

    def encode(self, conversation: Conversation) -> tuple[Learnt, ...]:
        """The whole conversation; each reply is under loss in one of the sequences."""
        image = self.encoder.image_inputs(conversation.image)
        # Templates may trim earlier replies: what is learnt must be what they leave.
        turns = (replace(turn, text=turn.text.strip()) if turn.role == "assistant" else turn
                 for turn in conversation.turns)  # fmt: skip
        transcripts = self.encoder.transcripts((*self._opening, *turns), image)
        return tuple(_learnt(transcript, image) for transcript in transcripts)


def _learnt(transcript: Transcript, image: ImageInputs) -> Learnt:
    inputs = model_inputs(image, transcript.ids, transcript.image_end)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for start, end in transcript.replies:
        labels[0, start:end] = inputs["input_ids"][0, start:end]
    return Learnt(inputs, labels, len(transcript.ids) - len(image.ids) + 1)


class ConversationSet(Dataset[tuple[Learnt, ...]]):
    """Conversations for the trainer, encoded when asked for.

    In place of one whose picture cannot be read the next is learnt; a warning names the file, and
    more than ``UNREADABLE_LIMIT`` of them end the run with a :class:`DatasetError`.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        encoder: ConversationEncoder,
        picture: tuple[int, int] | None = None,
    ) -> None:
        self._conversations, self._encoder, self._picture = conversations, encoder, picture
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> tuple[Learnt, ...]:
        conversation = self._readable(index)
        if self._picture is not None:
            resized = conversation.image.pil.resize(self._picture)
            conversation = replace(conversation, image=RgbImage.from_pil(resized))
        return self._encoder.fit(conversation)

    def _readable(self, index: int) -> Conversation:
        while True:
            try:
                return self._conversations[index]
            except (ImageError, DatasetError) as error:
                self._unreadable.add(index)
                _log.warning("%s The next conversation is learnt instead.", error.message)
                if len(self._unreadable) > min(UNREADABLE_LIMIT, len(self) - 1):
                    raise DatasetError(
                        f"{len(self._unreadable)} conversations cannot be read, the last: "
                        f"{error.message}",
                        hint="Download the pictures again, then continue with --resume.",
                    ) from error
                index = (index + 1) % len(self)


class Collator:
    """Pads the sequences of a batch of conversations on the right, and stacks their pictures.

    Pictures of unequal numbers of tiles are filled up with zeros, as the families' processors do.
    """

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, batch: Sequence[Sequence[Learnt]]) -> dict[str, Tensor]:
        """One dictionary for the model's forward."""
        sequences = [one for conversation in batch for one in conversation]
        out = {"labels": _padded([one.labels for one in sequences], IGNORED)}
        for key in sequences[0].inputs:
            filler = self._pad if key == "input_ids" else 0
            out[key] = _padded([one.inputs[key] for one in sequences], filler)
        return out


def _padded(values: Sequence[Tensor], filler: int) -> Tensor:
    """Tensors joined along their first dimension, the others brought to the largest size."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    grown = []
    for value in values:
        missing = [(0, most - size) for most, size in zip(shape, value.shape[1:], strict=True)]
        flat = [end for pair in reversed(missing) for end in pair]  # the last dimension first
        grown.append(torch.nn.functional.pad(value, flat, value=filler))
    return torch.cat(grown)


class DialogueTrainer(Trainer):
    """transformers' ``Trainer`` with PyTorch's one-cycle schedule, as ``recipe`` says.

    ``measure`` gives figures of the model as it is; they are reported beside the held-out loss.
    """

    measure: Callable[[], dict[str, float]] | None = None
    recipe: LoraRecipe = LoraRecipe()

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """The held-out loss, and what else the model can do.

        Training's random numbers are left alone: looking does not change what is looked at.
        """
        with torch.random.fork_rng():
            found = dict(super().evaluate(*arguments, **options))
        if self.measure is not None and self.is_world_process_zero():
            more = {f"eval_{name}": value for name, value in self.measure().items()}
            self.log(more)
            found |= more
        return found

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """One cycle to the peak rate and down, over all steps."""
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler: Any = OneCycleLR(
                _innermost(optimizer or self.optimizer),
                max_lr=self.args.learning_rate,
                total_steps=num_training_steps,
                pct_start=self.recipe.warm_up,
                anneal_strategy=self.recipe.annealing,
            )
        return self.lr_scheduler


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """PyTorch's own optimizer; accelerate's and DeepSpeed's around it lack what a cycle reads."""
    while not isinstance(optimizer, torch.optim.Optimizer) or isinstance(
        optimizer, AcceleratedOptimizer
    ):
        optimizer = optimizer.optimizer
    return optimizer


def adapt(model: Any, recipe: LoraRecipe) -> PeftModel:
    """The model with fresh LoRA layers; all else but the projector is frozen.

    What learns is held in float32, whatever the model is in.

    Raises:
        InputError: LoRA on a projector without linear layers.
    """
    set_seed(recipe.seed)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and _adapted(name, recipe.vision)
    ]
    assert found, f"no language projection named {'|'.join(PROJECTIONS)} in this model"
    kept = {part for name, _ in model.named_modules() for part in PROJECTORS
            if name.endswith("." + part) or name == part}  # fmt: skip
    if recipe.projector == "lora":
        found += _projector_layers(model)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=found,
            modules_to_save=sorted(kept) if recipe.projector == "full" else None,
            task_type="CAUSAL_LM",
        ),
    )
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapted


def _projector_layers(model: Any) -> list[str]:
    """The linear layers of the projector."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and set(name.split(".")) & set(PROJECTORS)
    ]
    if not found:
        raise InputError(
            "the projector of this model has no linear layers to put LoRA on",
            hint="Train it whole or leave it: --projector full, --projector frozen.",
        )
    return found


def _adapted(module: str, vision: bool) -> bool:
    """Whether a linear layer of this name gets LoRA factors."""
    if any(part in module for part in VISION):
        between = any(part in module for part in PROJECTORS)  # trained whole, if at all
        return vision and not between and module.endswith(VISION_PROJECTIONS)
    return module.endswith(PROJECTIONS)


def take_over(model: PeftModel, adapter: Path) -> None:
    """Set an adapted model's layers to those of a saved adapter.

    The vision tower's may begin anew where the adapter left the tower as it was.

    Raises:
        CheckpointError: missing, corrupt, or of other layers or another rank.
    """
    try:
        weights = load_file(adapter / "adapter_model.safetensors")
        found = set_peft_model_state_dict(model, weights)
        lost = [name for name in found.missing_keys if "lora_" in name or "modules_to_save" in name]
        if not any(part in name for name in weights for part in VISION):
            lost = [name for name in lost if not any(part in name for part in VISION)]
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"no way on from the adapter in {adapter}: {error}",
            hint="It must have been trained over this base with the same --rank and --projector.",
        ) from error
    if lost or found.unexpected_keys:
        raise CheckpointError(
            f"the adapter in {adapter} has other layers, first {(lost + found.unexpected_keys)[0]}",
            hint="It must have been trained over this base with the same --rank and --projector.",
        )


def train(
    base: str | Path,
    conversations: Sequence[Conversation],
    out: Path,
    recipe: LoraRecipe,
    data: Recipe,
    *,
    device: str = "auto",
    resume: bool = False,
    save_steps: int = 200,
    stop_after: int | None = None,
    held_out: Sequence[Conversation] = (),
    examined: HeldOut | None = None,
    start: Path | None = None,
    deepspeed: Path | None = None,
    tensorboard: bool = False,
    show_progress: bool = False,
) -> Path:
    """Train an adapter and write it to ``out``, and its figures to ``out/convergence.html``.

    Args:
        base: directory of the base model.
        conversations: what to learn.
        out: folder for the adapter; checkpoints go to ``out/checkpoints``.
        recipe: how to train.
        data: how the conversations were made; written beside the adapter.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        resume: go on from the last whole checkpoint (from the beginning, if there is none), with
            the result of a run that never stopped.
        save_steps: steps between checkpoints.
        stop_after: stop after this many steps without finishing the schedule (for tests, and to
            train in several sittings).
        held_out: conversations whose loss is reported at every checkpoint.
        examined: expressions asked through the real pipeline at every checkpoint (with
            ``held_out``): box Acc@0.5, point accuracy (also by where the points lie), cIoU, N-acc
            and T-acc.
        start: an adapter over the same base, of the same rank, to go on from with a fresh schedule
            (other data, another rate); without it LoRA layers begin by doing nothing. A chat
            template beside it is used in place of the base's.
        deepspeed: DeepSpeed configuration, as transformers takes it (:func:`deepspeed_file` knows
            ours); several processes are found by themselves under ``torchrun``.
        tensorboard: write all figures to ``out/tensorboard`` as well.
        show_progress: draw transformers' progress bars.

    Returns:
        the adapter's folder.

    Raises:
        CheckpointError: the base cannot be loaded, or ``start`` does not fit it.
        InputError: TensorBoard is asked for and not installed.
        StorageError: the disk is full; the checkpoints before are kept.
    """
    processor = load_processor(Path(base), start)
    placement = choose_placement(device, "float32")
    if recipe.bf16 and placement.device.type == "cuda":
        placement = choose_placement(device, "bfloat16")
    model = adapt(load_model(Path(base), placement), recipe)
    if start is not None:
        take_over(model, start)
    recipe, token_loss = _loss_of(recipe, processor.tokenizer)
    encoder = ConversationEncoder(processor, data, recipe.longest)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        optim=recipe.optimizer,
        bf16=recipe.bf16,
        **recomputing(recipe.checkpointing),
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_steps=save_steps,
        save_total_limit=2,
        eval_strategy="steps" if held_out else "no",
        eval_steps=save_steps,
        logging_steps=min(10, save_steps),
        report_to=[],
        deepspeed=None if deepspeed is None else str(deepspeed),
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=placement.device.type == "cpu",
        disable_tqdm=not show_progress,
    )
    callbacks: list[TrainerCallback] = [] if stop_after is None else [_StopAfter(stop_after)]
    callbacks.append(ConvergencePage(out / "convergence.html", f"Training {out.name}"))
    if tensorboard:
        callbacks.append(_tensorboard(out / "tensorboard"))
    trainer = DialogueTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(processor.tokenizer.pad_token_id or 0),
        train_dataset=ConversationSet(conversations, encoder, data.picture),
        eval_dataset=ConversationSet(held_out, encoder, data.picture) if held_out else None,
        callbacks=callbacks,
        compute_loss_func=_as_trainer_calls(token_loss) if token_loss else None,
    )
    trainer.recipe = recipe
    if examined is not None:
        trainer.measure = partial(examined.measure, model.get_base_model(), processor, data.format)
    last = last_whole(out / "checkpoints") if resume else None
    with saving(out):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    weights = _gathered(trainer)
    if trainer.is_world_process_zero():
        with saving(out):
            save_adapter(model, out, base, recipe, data, weights)
        # The adapter knows this dialogue: it is asked in it, whatever the base's template becomes.
        if isinstance(processor.chat_template, str):
            (out / TEMPLATE_FILE).write_text(processor.chat_template, encoding="utf-8")
    return out


def _gathered(trainer: Trainer) -> dict[str, Tensor] | None:
    """All weights of a model that ZeRO-3 has spread over the processes; else ``None``.

    Every process has to call it.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return None
    weights: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights


def deepspeed_file(name: str) -> Path:
    """The configuration of ZeRO stage 2 or 3 by name (``zero2``, ``zero3``), or a file.

    Raises:
        InputError: neither.
    """
    known = Path(__file__).parent / "deepspeed" / f"{name}.json"
    found = known if known.exists() else Path(name)
    if not found.is_file():
        raise InputError(
            f"no DeepSpeed configuration {name!r}", hint="zero2, zero3 or the path of a file."
        )
    return found


def _loss_of(recipe: LoraRecipe, tokenizer: Any) -> tuple[LoraRecipe, TokenLoss | None]:
    """The smoothed loss, or a recipe without it where the vocabulary does not allow it."""
    if not recipe.smoothing:
        return recipe, None
    try:
        return recipe, TokenLoss(tokenizer, recipe.smoothing)
    except InputError as error:
        _log.warning("%s; training with plain cross-entropy", error.message)
        return replace(recipe, smoothing=0.0), None


def _as_trainer_calls(token_loss: TokenLoss) -> Callable[..., Tensor]:
    """The loss as ``Trainer`` calls it, in place of the model's own."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        spoken = labels[:, 1:] != IGNORED
        mean, _ = token_loss(outputs.logits[:, :-1][spoken], labels[:, 1:][spoken])
        # Gradients of accumulated batches are summed: each weighs as much as it has tokens.
        return mean if num_items_in_batch is None else mean * spoken.sum() / num_items_in_batch

    return loss


def save_adapter(
    model: PeftModel,
    out: Path,
    base: str | Path,
    recipe: LoraRecipe,
    data: Recipe,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write the adapter and ``sam4mllm.json``: format, base model, longest list and recipes."""
    # Where the embedded base lies differs from machine to machine.
    named = embedded.NAME if Path(base) == embedded.MLLM else str(base)
    for config in model.peft_config.values():
        config.base_model_name_or_path = named
    # Embeddings are not trained.
    model.save_pretrained(str(out), save_embedding_layers=False, state_dict=weights)
    (out / "README.md").unlink(missing_ok=True)  # peft's card: a form nobody has filled in
    about = {
        "format": data.format,
        "base_model": named,
        "points_per_question": data.candidates.asked[1],
        "lora": asdict(recipe),
        "data": asdict(data),
    }
    (out / "sam4mllm.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return out


def _tensorboard(folder: Path) -> TrainerCallback:
    try:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        return TensorBoardCallback(SummaryWriter(str(folder)))
    except ImportError as error:
        raise InputError(
            "TensorBoard is not installed", hint="pip install 'sam4mllm-tool[train]'."
        ) from error


def recomputing(wanted: bool) -> dict[str, Any]:
    """Arguments by which the installed transformers recomputes activations to save memory.

    The name was ``gradient_checkpointing`` before it was ``activation_checkpointing``.
    """
    known = {field.name for field in fields(TrainingArguments)}
    new = "activation_checkpointing"
    name = new if new in known else "gradient_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False} if wanted else None}


class _StopAfter(TrainerCallback):
    """Saves and stops after some steps, as an interruption would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= self.steps:
            control.should_save = control.should_training_stop = True
        return control
