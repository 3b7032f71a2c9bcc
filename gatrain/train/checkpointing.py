"""Activation checkpointing: recompute a block's activations in the backward instead of storing them.

``full`` keeps only the inputs of each block; ``selective`` also keeps the results of matrix products,
convolutions and attention, which are dear to recompute, and recomputes the cheap rest
(https://pytorch.org/blog/activation-checkpointing-techniques/). ``every_2`` does as ``full`` for every second block
and leaves the others alone, ``every_3`` and ``every_4`` alike. ``offload`` recomputes nothing
(`gatrain.train.offload`). Blocks are what a model names through
``checkpoint_blocks()``, else the layers that transformers made for it, else the elements of the largest ModuleList
or Sequential of like modules.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gatrain.errors import ConfigError
from gatrain.train.dropout.functions import replayed

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that checkpointing wraps; empty if the model has no repeated block."""
    if callable(own := getattr(model, "checkpoint_blocks", None)):
        return list(own())
    named = {"GradientCheckpointingLayer"}  # of transformers, which then need not be imported
    if theirs := [m for m in model.modules() if named & {cls.__name__ for cls in type(m).__mro__}]:
        return [block for block in theirs if not any(_inside(block, o) for o in theirs if o is not block)]
    blocks: list[nn.Module] = []
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            children = [child for child in container if any(True for _ in child.parameters())]
            like = len({type(child) for child in children}) == 1
            # a block is more than one layer: wrapping single Linears would store as much as it saves
            deep = all(any(True for _ in child.children()) for child in children)
            if like and deep and not any(_inside(container, block) for block in blocks):
                blocks.extend(children)
    return blocks


def _inside(module: nn.Module, block: nn.Module) -> bool:
    return any(module is part for part in block.modules())


def available_modes(model: nn.Module) -> tuple[str, ...]:
    """Which values of ``checkpointing`` the model offers, from the cheapest to the dearest."""
    count = len(blocks_of(model))
    parts = tuple(f"every_{n}" for n in (4, 3, 2) if count >= n)
    recomputing = ("selective", *parts, "full") if count else ()
    # on a CPU it works and gains nothing
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    return ("none", *recomputing, *(("offload",) if on_gpu else ()))


def apply_checkpointing(model: nn.Module, mode: str) -> None:
    """Make the model's blocks recompute in the backward, in place; parameter names do not change.

    Raises:
        ConfigError: the model has no repeated block.
    """
    if mode in ("none", "offload"):
        return
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(
            f"checkpointing={mode}: {type(model).__name__} has no list of repeated blocks to recompute. "
            "Use checkpointing=none, or give the model a checkpoint_blocks() method that returns its blocks."
        )
    nth = int(mode.removeprefix("every_")) if mode.startswith("every_") else 1
    if len(blocks) < nth:
        raise ConfigError(
            f"checkpointing={mode}: {type(model).__name__} has {len(blocks)} block(s). Use checkpointing=full."
        )
    for block in blocks[::nth]:
        block.forward = _checkpointed(block, block.forward, mode)  # type: ignore[method-assign]


def _checkpointed(block: nn.Module, forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    Contexts = tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]

    def contexts() -> Contexts:
        if mode == "selective":
            first, second = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
        else:
            first, second = contextlib.nullcontext(), contextlib.nullcontext()
        return first, (_recompute(second, norms) if norms else second)

    def seeded_contexts() -> Contexts:
        first, second = contexts()
        return first, _same_numbers(second, random.getstate(), np.random.get_state(), replayed())

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        args = tuple(_without_cache(mode, argument) for argument in args)
        kwargs = {name: _without_cache(mode, argument) for name, argument in kwargs.items()}
        if kwargs.get("use_cache") is True:
            kwargs["use_cache"] = False
        options: dict[str, Any] = {"use_reentrant": False}
        if not torch.compiler.is_compiling():
            options["context_fn"] = seeded_contexts
        elif (
            mode == "selective" or norms
        ):  # torch.compile follows a context function only where there is a need
            options["context_fn"] = contexts
        return checkpoint(forward, *args, **options, **kwargs)

    return run


def _without_cache(mode: str, argument: Any) -> Any:
    """Keys and values kept for generating text: the recomputation would add its own to them once more.

    Raises:
        ConfigError: the block reads from it.
    """
    cls = type(argument)
    if not cls.__name__.endswith("Cache") or not (hasattr(cls, "get_seq_length") and hasattr(cls, "update")):
        return argument
    if argument.get_seq_length():
        raise ConfigError(
            f"checkpointing={mode}: the model reads keys and values from a filled {cls.__name__} (a prefix, say), "
            "to which the recomputation would add once more. Use checkpointing=none."
        )
    return None


@contextlib.contextmanager
def _same_numbers(
    inner: contextlib.AbstractContextManager[Any],
    python: Any,
    numpy: Any,
    keyed: contextlib.AbstractContextManager[Any],
) -> Iterator[None]:
    """The second forward draws from Python's and NumPy's generators, and by keys, what the first drew; torch sees
    to its own."""
    before = random.getstate(), np.random.get_state()
    random.setstate(python)
    np.random.set_state(numpy)
    try:
        with keyed, inner:
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _recompute(inner: contextlib.AbstractContextManager[Any], norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """The second forward must not count the batch into BatchNorm's running statistics again: it gets copies."""
    originals = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, originals, strict=True):
        norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        with inner:
            yield
    finally:
        for norm, buffers in zip(norms, originals, strict=True):
            norm._buffers.update(buffers)
