"""Several GPUs: with SyncBatchNorm, CUDA graphs and the overlapped reduction the weights are those of one GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from command import gatrain
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
USUAL = (
    "device=cuda", "precision=fp32", "checkpointing=none", "optimizer=sgd", "optimizer.lr=0.05",
    "batch.effective=32", "train.steps=4", "eval.every=0", "save.every=0",
)  # fmt: skip


def weights(folder: Path, gpus: int, *words: str) -> torch.Tensor:
    """Those of a short run, in one piece."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
    command = ("launch", "--nproc", str(gpus), *USUAL, *words, f"run.dir={folder}")
    gatrain(folder.parent, *command, CUDA_VISIBLE_DEVICES=visible)
    (file,) = folder.glob("saved/step_00000004/model.safetensors")
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(load_file(file).items())])


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).norm() / wanted.norm()) < 1e-6


def test_sync_batch_norm_sees_the_batch_of_all_gpus(tmp_path: Path) -> None:
    model = ("recipe=vision", "model.norm=batch", "compile=false")
    synchronised = weights(tmp_path / "sync", 2, *model, "norm=sync", "batch.micro=16")
    assert same(synchronised, weights(tmp_path / "whole", 1, *model, "norm=torch", "batch.micro=32"))


def test_graphs_compilation_and_overlap_change_no_weight(tmp_path: Path) -> None:
    model = ("recipe=llm", "batch.micro=8")
    wanted = weights(tmp_path / "one", 1, *model, "compile=false")
    for name, way in (
        ("two", ["compile=false", "sync=window"]),
        ("overlap", ["compile=false", "sync=overlap"]),
        ("graphs", ["compile=reduce-overhead"]),
    ):
        assert same(weights(tmp_path / name, 2, *model, *way), wanted), name
