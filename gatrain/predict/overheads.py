"""What a training process holds on a GPU besides the tensors of its code.

Every figure here is an ASSUMPTION until a committed result of ``tests/benchmarks/memory_prediction.py``
calibrates it; each says where it comes from.
"""

from __future__ import annotations

from gatrain.predict.gpus import GpuModel

MIB = 2**20

CONTEXT_BYTES = 520 * MIB
"""CUDA context, and the code of the kernels that a training step loads lazily. Hundreds of MiB on every recent
driver; 0.4 to 0.6 GiB is what NVML commonly shows beside an empty allocator."""

NCCL_BYTES = 300 * MIB
"""NCCL's channels and proxy buffers in one node, with more than one rank; taken from the driver directly."""

CUBLAS_WORKSPACE_BYTES = {9: 32 * MIB, 10: 32 * MIB, 12: 12 * MIB}
"""By major compute capability. ``aten/src/ATen/cuda/CublasHandlePool.cpp``: 4096 KiB x 8 on Hopper and data-centre
Blackwell; else `OTHER_CUBLAS_WORKSPACE_BYTES`."""
OTHER_CUBLAS_WORKSPACE_BYTES = 8 * MIB + 128 * 1024
"""4096 KiB x 2 + 16 KiB x 8, the default of all other GPUs (same source)."""
CUBLAS_HANDLES = 2
"""The forward's thread and the autograd engine's thread have a handle, and so a workspace, each."""

CONVOLUTION_WORKSPACE_BYTES = 128 * MIB
"""Taken from the allocator while a convolution runs. cuDNN's heuristics choose between none and some hundred MiB;
PyTorch caps a workspace at what is free only."""


def outside_bytes(world_size: int) -> int:
    """Bytes that never pass through PyTorch's allocator."""
    return CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)


def workspace_bytes(gpu: GpuModel) -> list[int]:
    """Workspaces that the allocator keeps for the process's whole life."""
    each = CUBLAS_WORKSPACE_BYTES.get(gpu.capability[0], OTHER_CUBLAS_WORKSPACE_BYTES)
    return [each] * CUBLAS_HANDLES
