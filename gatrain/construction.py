"""Making a stranger's model: without memory where that works, for real where it does not."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gatrain.errors import ConfigError


def build_without_memory_or_really(
    make: Callable[[], nn.Module], really: Callable[[], nn.Module]
) -> nn.Module:
    """The model for a look at its shapes: on the meta device, or real where its making needs numbers.

    Whatever fails without memory is tried for real: ``.item()``, ``from_pretrained``, NumPy, copies for a moving
    average. If that fails too, its own error is the one that counts.

    Args:
        make: makes the model on the device that is in force.
        really: makes it with numbers.
    """
    gone: list[BaseException] = []
    with kept_defaults():
        try:
            with torch.device("meta"):
                model = make()
            if isinstance(model, nn.Module) and all(p.is_meta for p in model.parameters()):
                return model
        except Exception as error:  # of any kind: a wrapped one says no less
            gone.append(error)
    model = None  # type: ignore[assignment]
    gone.clear()  # its traceback may hold half a model
    gc.collect()
    return really()


@contextlib.contextmanager
def kept_defaults() -> Iterator[None]:
    """Put torch's default device and type and its switch for gradients back, whatever happens inside."""
    device, dtype, grad = torch.get_default_device(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def check_shapes(model: object) -> nn.Module:
    """Refuse what is no module, or has parameters whose shape is not known yet.

    Raises:
        ConfigError: says what to write.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model gave a {type(model).__name__}, not a torch.nn.Module.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            owner = model.get_submodule(name.rpartition(".")[0])
            raise ConfigError(
                f"the model's {name} has no shape yet: {type(owner).__name__} waits for its first input to learn "
                "it. Call the model once where it is made, for example "
                "def net(): model = MyModel(); model(torch.zeros(1, 3, 32, 32)); return model, with the shape of "
                "your own samples, or name the sizes (Linear instead of LazyLinear)."
            )
    return model


def check_numbers(model: nn.Module) -> None:
    """Refuse parameters and buffers without numbers.

    Raises:
        ConfigError: names one.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ConfigError(
                f"the model's {name} is on the meta device: it has a shape, but no numbers. Make the model on the "
                "CPU, or give it numbers with model.to_empty(device='cpu') and its own initialisation."
            )
