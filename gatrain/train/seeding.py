"""The random generators of a process: one rule for seeding all of them, and for leaving them as they were.

What a step computes may depend on random numbers only through seeds that follow from the run's seed and from
what is computed, never from who computes it or what came before.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# the uses of a run's seed; each has a stream of its own
MODEL = 0x6D6F64656C
DATA = 0x64617461
COLLATE = 0x636F6C6C
MICRO_STEP = 0x73746570
PROCESS = 0x70726F63
EVALUATION = 0x6576616C
HOOK = 0x686F6F6B
MEASURED = 0x6D656173

_MASK64 = (1 << 64) - 1


def mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mixed(z: torch.Tensor) -> torch.Tensor:
    """`mix64` of an int64 tensor, on its device."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def derive_seed(*parts: int) -> int:
    """Hash integers to one 63-bit seed; the order of the parts matters."""
    state = 0
    for part in parts:  # `mix64` in Python's integers: an array of one number takes ten times as long
        state = (state + 0x9E3779B97F4A7C15 + part) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def seed_everything(*parts: int) -> int:
    """Seed ``random``, numpy and torch (all devices) from a hash of ``parts``; returns the torch seed."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    _seed_torch(seed)
    return seed


def _seed_torch(seed: int) -> None:
    """`torch.manual_seed`, which notes a stack trace for each kind of device that is not in use: 0.3 ms a call."""
    if _has_other_devices() or (not _uses_cuda() and _has_gpus()):  # a GPU may be used later on: it is noted
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if _uses_cuda():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)


@functools.cache
def _has_gpus() -> bool:
    return torch.cuda.device_count() > 0


@functools.cache
def _has_other_devices() -> bool:
    """Whether PyTorch has generators besides those of CPUs and CUDA."""
    own = torch._C._get_privateuse1_backend_name() != "privateuseone"
    return own or torch.backends.mps.is_built() or torch.xpu._is_compiled()


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the generators of ``random``, numpy and torch (and CUDA's, where it is in use) as they were."""
    state = all_random_states()
    try:
        yield
    finally:
        set_random_states(state)


@contextlib.contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """`seed_everything`, with the generators as before at the end."""
    with kept_random_state():
        seed_everything(*parts)
        yield


def all_random_states() -> tuple[Any, Any, torch.Tensor, list[torch.Tensor]]:
    """State of the generators of ``random``, numpy and torch, and of CUDA's, where it is in use."""
    return *random_state(), torch.cuda.get_rng_state_all() if _uses_cuda() else []


def set_random_states(state: tuple[Any, Any, torch.Tensor, list[torch.Tensor]]) -> None:
    """Put the generators back to where they were at `all_random_states`."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3]:
        torch.cuda.set_rng_state_all(state[3])


def torch_random_state() -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """State of the generators of torch and CUDA alone: a few microseconds, and nothing waits for the device."""
    generators = torch.cuda.default_generators if _uses_cuda() else ()
    return torch.get_rng_state(), [(each.initial_seed(), each.get_offset()) for each in generators]


def set_torch_random_state(state: tuple[torch.Tensor, list[tuple[int, int]]]) -> None:
    """Put them back to where they were at `torch_random_state`."""
    torch.set_rng_state(state[0])
    for generator, (seed, offset) in zip(torch.cuda.default_generators, state[1], strict=False):
        generator.manual_seed(seed)
        generator.set_offset(offset)


def host_random_state() -> tuple[Any, Any]:
    """State of the generators of ``random`` and numpy: some hundred microseconds."""
    return random.getstate(), np.random.get_state()


def set_host_random_state(state: tuple[Any, Any]) -> None:
    """Put them back to where they were at `host_random_state`."""
    random.setstate(state[0])
    np.random.set_state(state[1])


def random_state() -> tuple[Any, Any, torch.Tensor]:
    """State of the three generators of the host; compare two with `same_random_state`."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def same_random_state(one: tuple[Any, Any, torch.Tensor], other: tuple[Any, Any, torch.Tensor]) -> bool:
    """True if nothing was drawn between two states."""
    return same_host_random_state(one[:2], other[:2]) and torch.equal(one[2], other[2])


def same_host_random_state(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """True if nothing was drawn between two `host_random_state`."""
    (_, keys, *places), (_, other_keys, *other_places) = one[1], other[1]
    return one[0] == other[0] and places == other_places and np.array_equal(keys, other_keys)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())
