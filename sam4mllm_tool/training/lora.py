"""LoRA on referring dialogues: transformers' ``Trainer`` and peft, loss on the assistant's tokens.

Everything is frozen except LoRA layers on attention and MLP projections of the language model and
the projector between picture and text. ``sam4mllm.json`` in the adapter's folder records its
dialogue format, its base and how it was made, so that its path is all that is needed to load it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from sam4mllm_tool import embedded
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.mllm.loading import TEMPLATE_FILE, load_model, load_processor
from sam4mllm_tool.mllm.placement import choose_placement
from sam4mllm_tool.training.checkpoints import last_whole, saving
from sam4mllm_tool.training.convergence import ConvergencePage
from sam4mllm_tool.training.dialogues import Conversation, Recipe
from sam4mllm_tool.training.layers import adapt, take_over
from sam4mllm_tool.training.progress import HeldOut
from sam4mllm_tool.training.recipe import LoraRecipe
from sam4mllm_tool.training.sequences import (
    IGNORED,
    Collator,
    ConversationEncoder,
    ConversationSet,
)
from sam4mllm_tool.training.token_loss import TokenLoss

_log = logging.getLogger(__name__)


class DialogueTrainer(Trainer):
    """transformers' ``Trainer`` with PyTorch's one-cycle schedule, as ``recipe`` says.

    ``measure`` returns figures of the current model; they are reported beside the held-out loss.
    """

    measure: Callable[[], dict[str, float]] | None = None
    recipe: LoraRecipe = LoraRecipe()

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """The held-out loss and the figures of ``measure``.

        The state of the random number generator is restored: evaluations do not change training.
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
    """PyTorch's own optimizer; wrappers of other libraries lack attributes that it has."""
    while not isinstance(optimizer, torch.optim.Optimizer) or isinstance(
        optimizer, AcceleratedOptimizer
    ):
        optimizer = optimizer.optimizer
    return optimizer


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
        conversations: the training data.
        out: folder for the adapter; checkpoints go to ``out/checkpoints``.
        recipe: how to train.
        data: how the conversations were made; written beside the adapter.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        resume: continue from the last whole checkpoint (from the beginning, if there is none), with
            the result of a run that never stopped.
        save_steps: steps between checkpoints.
        stop_after: stop after this many steps without finishing the schedule (for tests, and to
            train in several parts).
        held_out: conversations whose loss is reported at every checkpoint.
        examined: expressions asked through the real pipeline at every checkpoint (with
            ``held_out``): box Acc@0.5, point accuracy (also by where the points lie), cIoU, N-acc
            and T-acc.
        start: an adapter over the same base, of the same rank, to continue from with a new schedule
            (other data, another rate); without it, new LoRA layers have no effect at first. A chat
            template beside it replaces the base's.
        deepspeed: DeepSpeed configuration, as transformers takes it (:func:`deepspeed_file` knows
            ours); several processes are detected automatically under ``torchrun``.
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
        # The adapter is bound to this template, even if the base's changes later.
        if isinstance(processor.chat_template, str):
            (out / TEMPLATE_FILE).write_text(processor.chat_template, encoding="utf-8")
    return out


def _gathered(trainer: Trainer) -> dict[str, Tensor] | None:
    """All weights of a model that ZeRO-3 has partitioned over the processes; else ``None``.

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
        replied = labels[:, 1:] != IGNORED
        mean, _ = token_loss(outputs.logits[:, :-1][replied], labels[:, 1:][replied])
        # Gradients of accumulated batches are summed, each weighted by its number of tokens.
        return mean if num_items_in_batch is None else mean * replied.sum() / num_items_in_batch

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
    # The embedded base has another path on every machine.
    named = embedded.NAME if Path(base) == embedded.MLLM else str(base)
    for config in model.peft_config.values():
        config.base_model_name_or_path = named
    # Embeddings are not trained.
    model.save_pretrained(str(out), save_embedding_layers=False, state_dict=weights)
    (out / "README.md").unlink(missing_ok=True)  # peft's model card, an empty form
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
