"""Pictures of what a generator draws, in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gatrain.errors import ConfigError
from gatrain.train.engine import evaluating
from gatrain.train.hook import Hook, HookRun


class SampleGrid(Hook):
    """After each evaluation and at the end, a PNG of images drawn by a task that has ``draw(model, count)``
    (`gatrain.tasks.GAN`): ``samples/step_00000100.png`` in the run folder, always of the same latents.

    Args:
        rows: of the grid, which is a square.
        pixel: sides of a pixel of an image, in pixels of the picture.
    """

    needs_verdict = False

    def __init__(self, rows: int = 10, pixel: int = 4) -> None:
        for key, value in (("rows", rows), ("pixel", pixel)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"sample_grid: {key}={value!r} is not a whole number of at least 1.")
        self._rows, self._pixel = rows, pixel

    def start(self, run: HookRun) -> None:
        if not callable(getattr(run.task, "draw", None)):
            raise ConfigError(
                f"sample_grid: {type(run.task).__name__} has no method draw(model, count) that gives images "
                "[count, channels, height, width] in [0, 1]."
            )
        self._run = run

    def evaluated(self, step: int, numbers: Mapping[str, Any]) -> None:
        self._write(step)

    def end(self, step: int, completed: bool) -> None:
        self._write(step)

    def _write(self, step: int) -> None:
        if self._run.rank:
            return
        from torchvision.utils import make_grid, save_image

        folder = self._run.run_dir / "samples"
        path = folder / f"step_{step:08d}.png"
        if path.exists():
            return
        with evaluating(self._run.model), torch.no_grad():
            images: Tensor = self._run.task.draw(self._run.model, self._rows**2).float().cpu()  # type: ignore[attr-defined]
        images = images.clamp(0, 1).repeat_interleave(self._pixel, -1).repeat_interleave(self._pixel, -2)
        folder.mkdir(exist_ok=True)
        save_image(make_grid(images, nrow=self._rows, padding=self._pixel // 2 or 1, pad_value=0.5), path)
