"""fp16: one decision on the loss scale for each window, the same on every rank."""

from __future__ import annotations

import torch
from distributed import run_on_ranks
from test_engine import CPU
from test_nonfinite import Regression, window
from torch import Tensor, nn

from gatrain.config import SGDConfig
from gatrain.plan import StepSettings
from gatrain.train.engine import Engine
from gatrain.train.ranks import Ranks

SMALL = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
DATA = torch.cat([SMALL[:4], 100 * SMALL[4:]])
"""Of its first half no micro-batch overflows at the first loss scale, of its second half each does."""


def _steps() -> dict[str, Tensor]:
    """Two windows, each in two micro-batches of four: on two ranks the second one alone overflows."""
    ranks = Ranks.current()
    task, settings = Regression(lambda: nn.Linear(5, 5)), StepSettings("fp16", "none", False, "window")
    one = Engine(task, task.build_model(), settings, SGDConfig(lr=1e-4), ranks, CPU)
    assert one.scaler is not None
    mine = DATA.split(8 // ranks.world_size)[ranks.rank]
    decisions = []
    for step in range(2):
        result, norm = one.step(window(mine, [4] * (2 // ranks.world_size)), step)
        tracker = one.scaler.state_dict()["_growth_tracker"]
        decisions.append([one.scaler.get_scale(), float(tracker), float(result.skipped), float(norm)])
    weights = torch.cat([p.detach().flatten() for p in one.model.parameters()])
    return {"decisions": torch.tensor(decisions, dtype=torch.float64), "weights": weights}


def test_a_rank_that_overflows_lowers_the_scale_of_all_and_each_window_decides_once() -> None:
    first, second = run_on_ranks(2, _steps)
    for key in first:
        assert torch.equal(first[key], second[key]), key
    alone = _steps()
    for found in (first, alone):
        scales, counts, skipped, norms = found["decisions"].T
        assert 0 < float(scales[0]) < 65536
        assert scales[0] == scales[1]
        assert counts.tolist() == [1.0, 2.0]  # one decision a window, not one a micro-step
        assert not skipped.any()
        assert torch.isfinite(norms).all()
    assert first["decisions"][0, 0] == alone["decisions"][0, 0]
    assert torch.allclose(first["weights"], alone["weights"], rtol=1e-3)
