"""What a training process holds on a GPU besides the tensors of its code.

Measured means: on 2026-11-24, on an H100 80GB with PyTorch 2.11 for CUDA 13.0, one process, GPT-2 and ResNet-50 in
bf16. What was not measured is called an ASSUMPTION.
"""

from __future__ import annotations

from gatrain.units import MIB

CONTEXT_BYTES = 526 * MIB
"""The CUDA context before the first kernel of a step: what a process was measured to hold beside the allocator's
memory (837 to 839 MiB at two sizes of both models) less `KERNELS_BYTES`. That other GPUs, drivers and versions hold
the same is an ASSUMPTION."""

KERNELS_BYTES = 312 * MIB
"""What the driver takes while a training step runs: mostly the code of kernels, loaded at first use. It is what is
left of the measured peaks of GPT-2's trials, which do not count the context, after the predicted memory of the
allocator is taken away (274 to 322 MiB at seven sizes, median 312). The sum with the context was measured, its
division was not. Code that calls other libraries loads more or less: an ASSUMPTION for it."""

NCCL_BYTES = 300 * MIB
"""NCCL's channels and proxy buffers in one node, with more than one rank; taken from the driver directly. An
ASSUMPTION: not measured."""

CUBLAS_WORKSPACE_BYTES = {9: 32 * MIB, 10: 32 * MIB, 12: 32 * MIB}
"""By major compute capability. ``aten/src/ATen/cuda/CublasHandlePool.cpp``: 4096 KiB x 8 on Hopper and, in newer
versions, Blackwell; else `OTHER_CUBLAS_WORKSPACE_BYTES`. Taken by each thread that uses cuBLAS, the forward's and
the autograd engine's: `gatrain.predict.timeline.WORKSPACE`. With it GPT-2's predicted peaks of allocated memory
agree with those measured to 0.1 %; on other GPUs nothing was measured."""
OTHER_CUBLAS_WORKSPACE_BYTES = 8 * MIB + 128 * 1024
"""4096 KiB x 2 + 16 KiB x 8, the default of all other GPUs (same source)."""


def outside_bytes(world_size: int) -> int:
    """Bytes that never pass through PyTorch's allocator."""
    return CONTEXT_BYTES + KERNELS_BYTES + (NCCL_BYTES if world_size > 1 else 0)


def workspace_bytes(capability: tuple[int, int]) -> int:
    """cuBLAS's workspace for one thread."""
    return CUBLAS_WORKSPACE_BYTES.get(capability[0], OTHER_CUBLAS_WORKSPACE_BYTES)
