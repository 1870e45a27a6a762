"""Train the small SAM: dense pre-training, then simulated interaction.

::

    python -m recipes.embedded_sam.train --run runs/sam --minutes 80 --out runs/sam/best

Scenes are drawn once into the run's folder. Training stops when its minutes are spent; a run that
is started again continues from its last checkpoint. The best weights so far, by the mean IoU of box
prompts and of box-and-points prompts on validation scenes, are written to `--out`.
"""

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from segment_anything.modeling import Sam
from torch import nn

from recipes.embedded_sam.data import BatchSettings, scene_batches
from recipes.embedded_sam.dense import DenseHeads, dense_loss
from recipes.embedded_sam.init import initialise
from recipes.embedded_sam.interaction import interaction_step
from recipes.embedded_sam.resize import extend_sam, resize_sam
from recipes.embedded_sam.scene_cache import build_scene_cache
from recipes.embedded_sam.validate import validate
from sam4mllm_tool.segmenter.small import (
    SmallSamConfig,
    build_small_sam,
    load_small_sam,
    load_small_sam_config,
    save_small_sam,
)

MUON_FACTOR = 2.0  # Muon's learning rate over AdamW's in pre-training
AVERAGE = 0.996  # decay of the running average of the weights
SMALL = SmallSamConfig(depth=4, global_blocks=(1, 3))
DECODER_ALONE = 0.05  # share of the interactive stage in which the encoder rests


@dataclass(frozen=True)
class SamTraining:
    """Settings of a run.

    Attributes:
        run: folder of scenes, checkpoint and log.
        out: where the best weights go.
        minutes: wall-clock time of training, over all starts of the run.
        dense: share of it spent on dense pre-training.
        scenes: pictures drawn beforehand.
        world: what they are drawn from, by name.
        pictures: pictures per batch (twice as many in pre-training).
        rate: peak learning rate.
        seed: of scenes, weights and batches.
        checkpoint: minutes between checkpoints and validations.
        threads: CPU threads of the model.
        image_size, patch: pixels of the picture's and a patch's side; 0 leaves the
            configuration's.
        new_blocks: where the encoder gets further blocks that begin by doing nothing: their
            indices in the deeper encoder, with commas between.
        drawn_prompts: let boxes and points be drawn onto the image embedding.
        others: how much the candidates that were not the best are taught: little lets the three
            differ, much makes the choice among them matter less.
        start: weights of an earlier sitting to begin with (then mostly with `dense` 0); the
            model takes their configuration, at `image_size` and `patch`, extended by
            `new_blocks` and `drawn_prompts`.
    """

    run: Path
    out: Path
    minutes: float = 80.0
    dense: float = 0.33
    scenes: int = 20000
    world: str = "sam"
    pictures: int = 4
    rate: float = 1e-3
    seed: int = 0
    checkpoint: float = 3.0
    threads: int = 1
    image_size: int = 0
    patch: int = 0
    new_blocks: str = ""
    drawn_prompts: bool = False
    others: float = 0.15
    start: Path | None = None


class Trainer:
    """A run: model, its running average, optimisers and the time spent."""

    def __init__(self, settings: SamTraining, fresh: SmallSamConfig) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.sam, self.config = starting_sam(settings, fresh)
        config = self.config
        self.heads = DenseHeads(config.prompt_dim)
        self.average = build_small_sam(config).eval()
        self.average.load_state_dict(self.sam.state_dict())
        self.optimisers = optimisers(self.sam, self.heads, settings.rate)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.spent, self.step, self.best = 0.0, 0, 0.0  # seconds, batches, mean IoU
        self.recent: deque[tuple[float, ...]] = deque(maxlen=100)

    @property
    def stage(self) -> str:
        """`dense` or `interactive`."""
        share = self.spent / (60 * self.settings.minutes)
        return "dense" if share < self.settings.dense else "interactive"

    def train(self) -> None:
        """Train until the minutes are spent, with checkpoints and validation on the way."""
        while not self.finished:
            stage = self.stage
            batches = self._batches(stage)
            next_checkpoint = self.spent + 60 * self.settings.checkpoint
            started = time.monotonic()
            while self.stage == stage and self.spent < next_checkpoint and not self.finished:
                self.one_step(stage, next(batches))
                self.spent += time.monotonic() - started
                started = time.monotonic()
            del batches
            self.save()
            self.report(stage)

    @property
    def finished(self) -> bool:
        """Whether the minutes are spent."""
        return self.spent >= 60 * self.settings.minutes

    def one_step(self, stage: str, batch: object) -> None:
        """One batch, one update of the weights and of their running average."""
        self.sam.train()
        if stage == "dense":
            loss, iou = dense_loss(self.sam, self.heads, batch)  # type: ignore[arg-type]
            loss.backward()
            self.recent.append((float(loss.detach()), iou, iou))
        else:
            teach = self.settings.dense == 0 or self._done(stage) > DECODER_ALONE
            played = interaction_step(
                self.sam,
                batch,  # type: ignore[arg-type]
                self.generator,
                teach_encoder=teach,
                others=self.settings.others,
                heads=self.heads,
            )
            self.recent.append(played)
        nn.utils.clip_grad_norm_(self.sam.parameters(), 1.0)
        rate = self.settings.rate * self._schedule(stage)
        factors = (MUON_FACTOR if stage == "dense" else 1.0, 1.0)
        for optimiser, factor in zip(self.optimisers, factors, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self._update_average()
        if self.step % 50 == 0:
            print(
                f"{self.spent / 60:6.1f} min  step {self.step}  {stage}  {self._means()}",
                flush=True,
            )

    def save(self) -> None:
        """Write the state from which the run continues."""
        state = {
            "sam": self.sam.state_dict(),
            "heads": self.heads.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "spent": self.spent,
            "step": self.step,
            "best": self.best,
        }
        new = self.settings.run / "state.new.pt"
        torch.save(state, new)
        new.replace(self.settings.run / "state.pt")

    def resume(self) -> None:
        """Continue from the run's state, if there is one."""
        path = self.settings.run / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.sam.load_state_dict(state["sam"])
        self.heads.load_state_dict(state["heads"])
        self.average.load_state_dict(state["average"])
        for optimiser, former in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(former)
        self.spent, self.step, self.best = state["spent"], state["step"], state["best"]

    def report(self, stage: str) -> None:
        """Validate the running average, note the result, keep the weights if they are the best."""
        line = {"minutes": round(self.spent / 60, 1), "step": self.step, "stage": stage}
        if stage == "interactive":
            found = validate(self.average, self.config, self.settings.seed)
            score = (found["box"] + found["box_10_points"]) / 2
            line |= {key: round(value, 4) for key, value in found.items()}
            if score > self.best:
                self.best = score
                save_small_sam(self.average, self.config, self.settings.out)
        with (self.settings.run / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)

    def _batches(self, stage: str) -> Iterator[object]:
        dense = stage == "dense"
        pictures = self.settings.pictures * (2 if dense else 1)
        settings = BatchSettings(4 * self.config.grid, pictures, dense=dense)
        return scene_batches(self.settings.run / "scenes", settings, self.settings.seed + self.step)

    def _done(self, stage: str) -> float:
        """Share of the stage's time that is spent."""
        share, dense = self.spent / (60 * self.settings.minutes), self.settings.dense
        return share / dense if stage == "dense" else (share - dense) / (1 - dense)

    def _schedule(self, stage: str) -> float:
        """Warm-up, then half a cosine over the stage's time."""
        done, floor = self._done(stage), 0.3 if stage == "dense" else 0.01
        falling = floor + (1 - floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return falling * min(1.0, 0.05 + done * self.settings.minutes)

    @torch.no_grad()
    def _update_average(self) -> None:
        keep = min(AVERAGE, 1 - 1 / (self.step + 1))
        pairs = zip(self.average.parameters(), self.sam.parameters(), strict=True)
        for mean, value in pairs:
            mean.lerp_(value, 1 - keep)

    def _means(self) -> str:
        columns = [sum(column) / len(column) for column in zip(*self.recent, strict=True)]
        return "loss {:.3f}  first IoU {:.3f}  last IoU {:.3f}".format(*columns)


def starting_sam(settings: SamTraining, fresh: SmallSamConfig) -> tuple[Sam, SmallSamConfig]:
    """Fresh weights, or those of an earlier sitting, at the resolution that is asked for."""
    if settings.start is None:
        config = replace(
            fresh,
            image_size=settings.image_size or fresh.image_size,
            patch_size=settings.patch or fresh.patch_size,
        )
        sam = build_small_sam(config)
        initialise(sam)
    else:
        sam, config = load_small_sam(settings.start), load_small_sam_config(settings.start)
        size = settings.image_size or config.image_size
        sam, config = resize_sam(sam, config, size, settings.patch or config.patch_size)
    blocks = [int(place) for place in settings.new_blocks.split(",") if place]
    return extend_sam(sam, config, blocks, settings.drawn_prompts)


def optimisers(sam: Sam, heads: DenseHeads, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside encoder and decoder, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in sam.named_parameters():
        inner = (".blocks." in name or ".transformer." in name) and parameter.dim() == 2
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [*others, *heads.parameters()], lr=rate, weight_decay=0.02, betas=(0.9, 0.98)
        ),
    ]


def train_small_sam(settings: SamTraining) -> None:
    """Draw the scenes, then train a small SAM, or continue its training."""
    torch.set_num_threads(settings.threads)
    settings.run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, SMALL)
    side = trainer.config.image_size
    scenes = settings.run / "scenes"
    drawn = settings.world, "train", settings.seed, settings.scenes, side
    for done in build_scene_cache(scenes, *drawn):
        print(f"{done} of {settings.scenes} scenes drawn", flush=True)
    trainer.resume()
    described = {key: str(value) for key, value in asdict(settings).items()}
    print(json.dumps(described | {"model": asdict(trainer.config)}), flush=True)
    trainer.train()


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path)
    for field in fields(SamTraining)[2:-1]:
        kind = {"action": "store_true"} if field.default is False else {"type": type(field.default)}
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, default=field.default, **kind)
    train_small_sam(SamTraining(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
