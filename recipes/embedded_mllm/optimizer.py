"""The optimisers of base training: Muon for matrices inside the network, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


class Optimizers:
    """Several optimisers stepped as one, with learning rates scaled together."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        for part in self.parts:
            for group in part.param_groups:
                group["full_rate"] = group["lr"]

    def set_scale(self, scale: float) -> None:
        """Set every learning rate to ``scale`` times its full value."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["full_rate"] * scale

    def step(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Backward, clip the gradient's norm to 1, update, clear."""
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """State of each part, in order."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: Sequence[dict]) -> None:
        """Restore the result of :meth:`state_dict`, except for the full learning rates."""
        for part, state in zip(self.parts, states, strict=True):
            rates = [group["full_rate"] for group in part.param_groups]
            part.load_state_dict(state)
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["full_rate"] = rate


def make_optimizers(
    named: Iterable[tuple[str, nn.Parameter]],
    rate: float,
    kind: str = "muon",
    rate_factor: Callable[[str], float] = lambda name: 1.0,
) -> Optimizers:
    """Optimisers for named parameters.

    Args:
        named: (name, parameter) pairs; those without gradient are skipped.
        rate: learning rate.
        kind: "muon", or "adamw" for everything.
        rate_factor: factor on the learning rate, by name. Parameters with a factor below 1 contain
            built-in circuits: they get AdamW (Muon's full-rank updates would destroy the circuits)
            and no weight decay.
    """
    matrices: list[nn.Parameter] = []
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        factor = rate_factor(name)
        inside = parameter.ndim == 2 and "embed" not in name and "head" not in name
        if kind == "muon" and inside and factor == 1:
            matrices.append(parameter)
        else:
            decay = 0.02 if inside and factor == 1 else 0.0
            groups.setdefault((factor, decay), []).append(parameter)
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {"params": members, "lr": rate * factor, "weight_decay": decay}
                for (factor, decay), members in groups.items()
            ],
            betas=(0.9, 0.98),
            fused=True,
        )
    ]
    if matrices:
        parts.append(
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        )
    return Optimizers(parts)
