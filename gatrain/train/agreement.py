"""Whether all ranks have the same weights, and their hooks the same state: rank 0's are what is saved."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from gatrain.train.gradient import GradientStrategy
from gatrain.train.hooks import Hooks
from gatrain.train.parts import digest
from gatrain.train.ranks import Ranks

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of as many bytes."""


def ranks_differ(model: nn.Module, hooks: Hooks, ranks: Ranks, strategy: GradientStrategy) -> list[str]:
    """In words, where they do. Collective; waits for the device.

    It is told and ends nothing: unlike GPUs may round an update differently.
    """
    if ranks.world_size == 1:
        return []
    found = ranks.gather((_bits(model), hooks.digests(), _digest(strategy)))
    texts = []
    ours, states, kept = found[0]
    for rank, (theirs, _, _) in enumerate(found):
        if name := next((name for name in ours if theirs.get(name) != ours[name]), None):
            texts.append(
                f"the ranks have different weights by now ({name} of rank {rank} is not that of rank 0), so the "
                "gradient is that of no one model. A hook or the model changes them differently on each rank: let "
                "it draw from torch's own generator, which hooks find seeded alike on all ranks, and not go by the "
                "rank or by its part of a window. Only GPUs of several kinds may differ in their last bits."
            )
            break
    for name, state in states.items():
        if any(theirs.get(name) != state for _, theirs, _ in found):
            texts.append(
                f"the hook {name} has another state on each rank; rank 0's is saved, and all ranks go on from it "
                "after a resume. Keep in state_dict() only what is the same on every rank: means over all ranks "
                "are in Hook.measured."
            )
    if any(theirs != kept for _, _, theirs in found):
        texts.append(
            f"the gradient strategy {type(strategy).__name__} has another state on each rank; rank 0's is saved, "
            "and all ranks go on from it after a resume, which is another run. Keep what is the same on every rank "
            "(after the reduction), or gather the ranks' in state_dict()."
        )
    return texts


def _digest(strategy: GradientStrategy) -> int:
    with contextlib.suppress(Exception):  # a save tells of it
        if state := dict(strategy.state_dict()):
            return digest(state, f"gradient strategy {type(strategy).__name__}")
    return 0


def _bits(model: nn.Module) -> dict[str, int]:
    """Of each parameter, the sum of its bits read as whole numbers: other bits give another one, but for chance."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = (torch.view_as_real(value) if value.is_complex() else value).contiguous()
        if value.layout is torch.strided and value.element_size() in _WHOLE:
            found[name] = value.view(_WHOLE[value.element_size()]).sum(dtype=torch.int64)
    numbers = torch.stack(list(found.values())).tolist() if found else []
    return dict(zip(found, numbers, strict=True))
