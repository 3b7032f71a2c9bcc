"""bf16 sums of micro-gradients: as far off as the table says, the same at a resume, fp32 over the ranks."""

from __future__ import annotations

import pytest
import torch
from distributed import run_on_ranks
from test_fold import windows
from test_optimizers import Net, Squares
from torch import Tensor

from gatrain import build
from gatrain.config import RunConfig, SGDConfig
from gatrain.errors import ConfigError
from gatrain.plan import StepSettings
from gatrain.train.engine import Engine
from gatrain.train.gradient.bf16_sums import Bf16Sums, Kahan, Stochastic
from gatrain.train.gradient.plain import Plain
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks

ELEMENTS = 20_000


def error_of(way: Bf16Sums, count: int, coherent: bool) -> float:
    """Relative L2 error of a sum of noisy gradients against fp64, as in the table of A4."""
    generator = torch.Generator().manual_seed(0)
    signal = 0.3 * torch.randn(ELEMENTS, generator=generator)
    sums, exact = way.zeros(signal), torch.zeros(ELEMENTS, dtype=torch.float64)
    for k in range(count):
        gradient = signal + torch.randn(ELEMENTS, generator=generator)
        gradient = gradient.abs() if coherent else gradient
        way.add(sums, gradient, k)
        exact += gradient
    assert all(each.dtype == torch.bfloat16 for each in sums)
    return float((way.total(sums).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("count", "wanted"), [(8, 4.4e-3), (64, 1.1e-2), (512, 3.1e-2)])
def test_stochastic_rounding_is_as_far_off_as_the_table_says(count: int, wanted: float) -> None:
    assert error_of(Stochastic(), count, coherent=False) == pytest.approx(wanted, rel=0.3)


def test_neither_way_stops_growing_where_rounding_to_nearest_does() -> None:
    assert error_of(Stochastic(), 1024, coherent=True) < 0.05
    assert error_of(Kahan(), 1024, coherent=True) < 1e-4
    nearest = torch.zeros(ELEMENTS, dtype=torch.bfloat16)
    for _ in range(1024):
        nearest += 1
    assert float(nearest.float().mean()) == 256.0  # of 1024


def test_rounding_is_right_on_average_and_keeps_what_is_not_finite() -> None:
    value = torch.full((ELEMENTS,), 1 + 2**-10)  # an eighth of the way to the next bf16 number
    way = Stochastic()
    sums = way.zeros(value)
    way.add(sums, value, 0)
    assert set(sums[0].float().unique().tolist()) == {1.0, 1 + 2**-7}
    assert float(sums[0].float().mean()) == pytest.approx(1 + 2**-10, abs=2e-4)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
    odd = torch.cat([odd, torch.tensor([-1], dtype=torch.int32).view(torch.float32)])  # a NaN of ones alone
    sums = way.zeros(odd)
    way.add(sums, odd, 0)
    assert torch.equal(torch.isnan(sums[0]), torch.tensor([True, False, False, False, False, True]))
    assert sums[0][1:5].tolist() == [float("inf"), -float("inf"), 0.0, -1.0]


def gradient_step(way: Plain | Bf16Sums, sizes: list[list[int]], seed: int = 0) -> tuple[Tensor, list[str]]:
    """Change of the fp32 weights by one SGD step, and what the strategy had to tell."""
    settings = StepSettings("fp32", "none", False, "window")
    one = Engine(
        Squares(),
        Net().float(),
        settings,
        SGDConfig(lr=1.0),
        Ranks.current(),
        torch.device("cpu"),
        strategy=way,
    )
    given = windows(0, sizes)[one.ranks.rank].micro_batches
    window = LoadedWindow([MicroBatch(each.batch.float(), each.weights) for each in given], seed=(seed,))
    before = torch.cat([p.detach().flatten() for p in one.model.parameters()])
    one.step(window, 0)
    after = torch.cat([p.detach().flatten() for p in one.model.parameters()])
    assert all(p.grad is None for p in one.model.parameters())
    return after - before, one.new_notices()


def _on_two_ranks() -> list[Tensor]:
    return [gradient_step(way(), [[1, 2, 1], [1, 1]])[0] for way in (Stochastic, Kahan)]


def test_a_step_is_off_by_what_is_told_and_repeats_to_the_bit() -> None:
    wanted, _ = gradient_step(Plain(), [[1, 2, 1, 1, 1]])
    for way, least, most in ((Stochastic, 1e-4, 2e-2), (Kahan, 0.0, 1e-4)):
        found, (said,) = gradient_step(way(), [[1, 2, 1, 1, 1]])
        error = float((found - wanted).norm() / wanted.norm())
        assert least <= error < most
        told = float(said.partition("off by ")[2].split()[0])
        assert told == pytest.approx(error, rel=0.2, abs=1e-6)
        assert torch.equal(found, gradient_step(way(), [[1, 2, 1, 1, 1]])[0])
    other = gradient_step(Stochastic(), [[1, 2, 1, 1, 1]], seed=1)[0]
    assert not torch.equal(other, gradient_step(Stochastic(), [[1, 2, 1, 1, 1]])[0])
    for rank in run_on_ranks(2, _on_two_ranks):
        for found in rank:
            assert float((found - wanted).norm() / wanted.norm()) < 2e-2


def test_overlap_is_refused_and_the_names_are_known() -> None:
    assert isinstance(build.build_strategy(RunConfig(gradient="bf16_kahan")), Kahan)
    with pytest.raises(ConfigError, match="Write sync=window"):
        build.build_strategy(RunConfig(gradient="bf16_stochastic", sync="overlap"))
