"""The same exactness for people who keep their own loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gatrain

EXAMPLE = Path(__file__).parent / "examples" / "own_loop.py"


def _losses(*command: str) -> list[float]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # some versions of gloo greet on standard output
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line[:1].isdigit()]


def test_the_example_is_short_and_gives_the_same_losses_on_two_processes() -> None:
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) < 30
    one = _losses(str(EXAMPLE))
    two = _losses("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE))
    assert len(one) == 40
    assert one[-1] < one[0]
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 2e-6


def test_the_public_names_are_these_and_load_on_demand() -> None:
    assert gatrain.__all__ == sorted(gatrain.__all__)
    assert set(gatrain.__all__) == {
        "AccumulatingOptimizer",
        "Accumulator",
        "Hook",
        "HookRun",
        "Logger",
        "MasterWeights",
        "Task",
        "TrainedStep",
        "WindowResult",
        "__version__",
        "accumulate",
        "accumulate_in_fit",
        "windows",
    }
    for name in gatrain.__all__:
        assert getattr(gatrain, name)
    code = "import gatrain, sys; assert not {'torch', 'numpy', 'hydra', 'rich', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
