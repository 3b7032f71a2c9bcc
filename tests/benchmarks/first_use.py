"""What a new user waits for: `gatrain fit recipe=llm` in an empty folder with an empty cache, start to end.

    python tests/benchmarks/first_use.py [--out FILE] [OVERRIDE ...]

Writes one JSON file with hardware, versions, the command, its wall time, the plan with all trials, the losses, and
what the command printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import result_path, write_result


def cpu_model() -> str:
    """The processor's own name, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gatrain", "fit", "recipe=llm", "run.dir=run", *arguments.overrides]
        environment = {**os.environ, "GATRAIN_CACHE": f"{folder}/cache"}
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        wall_s = time.perf_counter() - began
        run = Path(folder) / "run"
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        result: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "hardware": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)),
                         "gpus": torch.cuda.device_count()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": " ".join(["gatrain", *command[3:]]),
            "wall_s": round(wall_s, 1),
            "summary": json.loads((run / "summary.json").read_text()),
            "first_loss": records[0]["loss"],
            "last_loss": records[-1]["loss"],
            "plan": json.loads((run / "plan.json").read_text()),
            "printed": done.stdout.replace(f"{folder}/", "").splitlines(),
        }  # fmt: skip
    out = result_path("first_use", arguments.out)
    write_result(out, result)
    print(f"{result['command']}: {wall_s:.1f} s, written to {out}")


if __name__ == "__main__":
    main()
