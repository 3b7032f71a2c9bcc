"""Start the tracing process and read what it found. It sees no GPU; no torch here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gatrain import codec
from gatrain.child import Child
from gatrain.errors import GatrainError
from gatrain.predict.request import CONFIG, REQUEST, TraceRequest, TraceResult

TIME_LIMIT_S = 300.0
"""A trace takes seconds; a model that needs longer than this is told so."""
FAILED = "tracing the model failed"


def trace_in_child(config_yaml: str, requests: Sequence[TraceRequest], cwd: Path | None) -> list[TraceResult]:
    """Run the tracing process.

    Raises:
        GatrainError: as found by the child, with its message, or out of time.
    """
    files = {CONFIG: config_yaml, REQUEST: json.dumps(codec.encode(requests))}
    env = {"CUDA_VISIBLE_DEVICES": ""}
    with Child("gatrain.predict.trace", files, FAILED, cwd=cwd, env=env) as child:
        try:
            result = child.result(TIME_LIMIT_S)
        except TimeoutError:
            raise GatrainError(
                f"tracing the model took longer than {TIME_LIMIT_S:g} s and was stopped. The first time also "
                "prepares the data: try once more. Else measure it on the GPU: gatrain autotune."
            ) from None
    return [codec.decode(TraceResult, each) for each in result["results"]]
