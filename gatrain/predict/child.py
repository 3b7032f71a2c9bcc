"""Start the tracing process and read what it found. It sees no GPU; no torch here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gatrain import offspring, scratch
from gatrain.errors import EXIT_CODES, GatrainError
from gatrain.predict import request
from gatrain.predict.request import TraceRequest, TraceResult
from gatrain.rundir import write_json, write_text

TIME_LIMIT_S = 300.0
"""A trace takes seconds; a model that needs longer than this is told so."""
_ERRORS = "errors.txt"


def trace_in_child(config_yaml: str, requests: Sequence[TraceRequest], cwd: Path | None) -> list[TraceResult]:
    """Run the tracing process.

    Raises:
        GatrainError: as found by the child, with its message, or out of time.
    """
    folder = scratch.make("gatrain-predict-")
    try:
        process = _start(folder, config_yaml, requests, cwd)
        try:
            process.wait(TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise GatrainError(
                f"tracing the model took longer than {TIME_LIMIT_S:g} s and was stopped. The first time also "
                "prepares the data: try once more. Else measure it on the GPU: gatrain autotune."
            ) from None
        finally:
            offspring.end(process)
        return _read_result(folder, process.returncode)
    finally:
        scratch.remove(folder)


def _start(
    folder: Path, config_yaml: str, requests: Sequence[TraceRequest], cwd: Path | None
) -> subprocess.Popen[bytes]:
    write_text(folder / request.CONFIG, config_yaml, mode=0o600)
    write_json(folder / request.REQUEST, {"requests": [asdict(each) for each in requests]})
    with (folder / _ERRORS).open("w") as errors:
        return offspring.start(
            ["-m", "gatrain.predict.trace", str(folder)],
            cwd=cwd,
            env={"CUDA_VISIBLE_DEVICES": ""},
            said=errors,
        )


def _read_result(folder: Path, exit_status: int) -> list[TraceResult]:
    """What a process that has ended found.

    Raises:
        GatrainError: as found by the child, or it died.
    """
    if not (folder / request.RESULT).is_file():
        text = (folder / _ERRORS).read_text(encoding="utf-8", errors="replace")
        tail = "\n".join(text.strip().splitlines()[-3:])
        raise GatrainError(f"tracing the model failed (exit status {exit_status}).\n{tail}")
    result = json.loads((folder / request.RESULT).read_text(encoding="utf-8"))
    if "error" in result:
        raise EXIT_CODES.get(result["exit_code"], GatrainError)(result["error"])
    return [TraceResult.from_dict(each) for each in result["results"]]
