"""What a model or a loss does to gradients by itself, between backwards or as they are added up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from gatrain.train.check.faults import Fault

_LARGEST = 2**16
"""Parameters with more numbers are not marked where there are smaller ones: a backward reaches those, too, and
memory for all gradients, taken this early, would stay with the allocator."""


@contextlib.contextmanager
def gradients_left_alone(model: nn.Module) -> Iterator[None]:
    """Marks the gradients, and looks after the forwards within whether they are still the same.

    Raises:
        Fault: a forward ran a backward of its own, or cleared gradients: those of the micro-steps before.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    limit = max(_LARGEST, min((p.numel() for _, p in trained), default=0))
    marked = [(name, parameter) for name, parameter in trained if parameter.numel() <= limit]
    kept = [parameter.grad for _, parameter in marked]
    marks = []
    for _, parameter in marked:
        parameter.grad = torch.ones_like(parameter)
        marks.append(parameter.grad)
    changed = ""
    try:
        yield
        for (name, parameter), mark in zip(marked, marks, strict=True):
            if parameter.grad is not mark or not bool((mark == 1).all()):
                changed = name
                break
    finally:
        for (_, parameter), gradient in zip(marked, kept, strict=True):
            parameter.grad = gradient
    if changed:
        raise Fault(
            f"loss_sum() changes the gradient of {changed!r} in its forward: it runs loss.backward() or "
            "zero_grad() itself. Gradients are summed over micro-steps, so it adds to those of the micro-steps "
            "before, or clears them. For a gradient within the loss (adversarial samples, penalties) use "
            "torch.autograd.grad(loss, inputs), which leaves the parameters' gradients alone."
        )


def check_accumulation_hooks(model: nn.Module) -> None:
    """
    Raises:
        Fault: the user's own hook acts on the sum of the micro-steps so far, after each of them.
    """
    for name, parameter in model.named_parameters():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if any(not str(getattr(hook, "__module__", "")).startswith("gatrain.") for hook in hooks.values()):
            raise Fault(
                f"{name!r} has a hook of register_post_accumulate_grad_hook: it runs after each micro-step, on the "
                "sum so far, so what it does depends on the split. To clip, use optimizer.clip_norm; to update in "
                "the backward, gradient=in_backward; for anything else a gradient strategy (gradient: {_target_: "
                "...}), which gets the gradient of the whole window."
            )


def registered_hooks(model: nn.Module) -> set[tuple[str, str, int]]:
    """Every hook on a module or a parameter's gradient: (where, of which kind, its number)."""
    found: set[tuple[str, str, int]] = set()
    for where, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found |= {(where, kind, number) for number in getattr(module, kind, None) or ()}
    for where, parameter in model.named_parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found |= {(where, kind, number) for number in getattr(parameter, kind, None) or ()}
    return found
