"""What several benchmarks share: a model of torchvision as a recipe, and the head of a result file."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VIT = """\
defaults: [base, {data: image_folder}, _self_]
model: {_target_: torchvision.models.VisionTransformer, image_size: 224, patch_size: 16, num_layers: 12,
  num_heads: 12, hidden_dim: 768, mlp_dim: 3072, num_classes: 8}
loss: {_target_: torch.nn.CrossEntropyLoss}
"""


def header() -> dict[str, Any]:
    """Date, hardware, versions."""
    import torch

    from gatrain.hardware import detect_hardware

    hardware = detect_hardware()
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": {"device": hardware.describe(), "driver": hardware.driver, "cores": hardware.cpu_cores},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "torch_has_byte_code": has_byte_code(),
    }


def has_byte_code() -> bool:
    """Whether torch was compiled to byte code, as pip does on installing: without, each process that imports it
    compiles some thousand sources again, for 5 to 12 s."""
    import torch

    return Path(importlib.util.cache_from_source(torch.__file__)).exists()


def make_byte_code() -> None:
    """Compile what the commands import, in a folder of its own, where an installation came without byte code."""
    if has_byte_code():
        return
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = tempfile.mkdtemp()
    modules = "gatrain.tune.trials.session, gatrain.inspection, torch._inductor.compile_fx"
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)


def result_path(kind: str, out: Path | None) -> Path:
    """Where a result goes: the file that was asked for, or a dated one beside the earlier ones."""
    name = f"{kind}_{datetime.date.today().isoformat()}.json"
    return (out or Path(__file__).parent / "results" / name).resolve()


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, with its folder if that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
