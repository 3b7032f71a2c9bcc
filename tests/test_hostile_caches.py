"""What is remembered beside the runs, and what a run folder holds beside its states: made anew where it is odd."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hostile import MARKER, Payload

from gatrain import codec
from gatrain.errors import LaunchError
from gatrain.fit import preparation, resuming
from gatrain.fit.preparation import State
from gatrain.inspected import Inspected
from gatrain.launch.failure import first_cause
from gatrain.plan import Measurement
from gatrain.report.jsonl import keep_until, read_lines
from gatrain.rundir import RunDir, write_json
from gatrain.tune import cache
from gatrain.tune.curve import Curve

FOUND = Inspected(4, 0, "data", 9, 36, ("none",))
DEEP = b"[" * 200_000


def curve_file() -> dict[str, Any]:
    return {
        "version": cache.VERSION,
        "inspected": codec.encode(FOUND),
        "curves": [
            {
                "settings": {"precision": "fp32", "checkpointing": "none", "compile": False, "sync": "window"},
                "measurements": [{"micro_batch": 4, "outcome": "fits", "micro_step_s": 0.1}],
                "stopped": "share", "max_seconds": 9.0, "modes": ["none"], "budget_bytes": 10,
            }
        ],
        "confirmations": [],
    }  # fmt: skip


def test_a_curve_comes_back_from_json_as_it_was() -> None:
    curve = codec.decode(Curve, curve_file()["curves"][0])
    assert curve.measurements == (Measurement(4, "fits", micro_step_s=0.1),)
    assert codec.decode(Curve, json.loads(json.dumps(codec.encode(curve)))) == curve
    no_number = json.loads('{"micro_batch": 4, "outcome": "fits", "micro_step_s": 0.1, "loss": NaN}')
    assert (
        codec.decode(Measurement, no_number, finite=False).micro_batch == 4
    )  # a loss of the user's, not a measurement of ours


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("measurement", {"micro_batch": -3}), ("measurement", {"micro_batch": "4"}),
        ("measurement", {"outcome": "yes"}),
        ("measurement", {"micro_step_s": -1.0}), ("measurement", {"micro_step_s": float("nan")}),
        ("measurement", {"peak_memory_bytes": -1}), ("measurement", {"peak_memory_bytes": 1e9}),
        ("measurement", {"rank_s": ["fast"]}), ("measurement", {"range_s": [1]}),
        ("measurement", {"again": 10**30}),
        ("curve", {"measurements": {}}), ("curve", {"max_seconds": float("inf")}), ("curve", {"modes": "none"}),
        ("curve", {"stopped": None}), ("curve", {"budget_bytes": -1}),
        ("settings", {"precision": "fp12"}), ("settings", {"sync": "evil"}), ("settings", {"compile": 1}),
        ("file", {"version": 10**9}), ("file", {"curves": None}), ("file", {"curves": [[]]}),
    ],
    ids=str,
)  # fmt: skip
def test_odd_measurements_count_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path))
    stored = curve_file()
    curve = stored["curves"][0]
    places = {
        "file": stored,
        "curve": curve,
        "settings": curve["settings"],
        "measurement": curve["measurements"][0],
    }
    write_json(cache.plan_file("key"), stored)
    assert len(cache.load("key").of(FOUND).curves) == 1
    places[where].update(changes)
    write_json(cache.plan_file("key"), stored)
    assert cache.load("key").of(FOUND).curves == []


def remembered(folder: Path) -> list[tuple[str, Path, Callable[[], Any], Any]]:
    """Name, file, reader, and what it gives where the file is of no use."""
    return [
        ("curves", cache.plan_file("key"), lambda: cache.load("key").curves, []),
        ("full steps", cache.plan_file("key"), lambda: cache.load("key").confirmations, []),
        ("inspection", cache.plan_file("key"), lambda: cache.load("key").inspected, None),
        (
            "error report",
            folder / "logs" / "error_rank_0.json",
            lambda: first_cause(RunDir(folder), [], 0.0, set()),
            None,
        ),
        ("metrics", folder / "metrics.jsonl", lambda: read_lines(folder / "metrics.jsonl"), []),
        ("hardware", folder / "hardware.json", lambda: resuming._hardware_before(RunDir(folder)), None),
        ("summary", folder / "summary.json", lambda: resuming._summary_of(RunDir(folder)), {}),
    ]


@pytest.mark.parametrize(
    "content", ["pickle", "deep", "empty", "null", "list", "text", "latin", "numbers", "pipe", "link"]
)
def test_what_cannot_be_read_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("GATRAIN_CACHE", str(tmp_path / "cache"))
    contents = {
        "pickle": pickle.dumps(Payload(tmp_path)), "deep": DEEP, "empty": b"", "null": b"null", "list": b"[1]",
        "text": b'"evil"', "latin": b"\xff\xfe",
        "numbers": b'{"version": -1, "inspected": -1, "curves": -1, "step": -1.5}',
    }  # fmt: skip
    for name, path, read, nothing in remembered(tmp_path / "run"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if content == "pipe":
            if name == "metrics":
                continue  # a run's own, opened by the run alone
            os.mkfifo(path)
        elif content == "link":
            path.symlink_to(tmp_path / "nowhere")
        else:
            path.write_bytes(contents[content])
        assert read() == nothing, name
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize(
    "data", [[], {"state": "evil"}, {"state": "preparing", "trials": ["/"]}, {"state": 3}], ids=str
)
def test_odd_words_of_node_0_are_refused(data: Any) -> None:
    rendezvous: Any = SimpleNamespace(endpoint="a:1", read=lambda kind, node_rank: data)
    with pytest.raises(LaunchError, match=r"what node 0 says at a:1 is not gatrain's"):
        preparation._state(rendezvous)


def test_node_0_sends_nobody_out_of_the_run_folder(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for text, wanted in (
        ("/etc", None),
        ("..", None),
        ("/x/gatrain_host_1", str(tmp_path / "gatrain_host_1")),
    ):
        assert State(trials=text).trials_in(run_dir) == wanted


def test_metrics_are_cut_whatever_stands_between_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + DEEP + b'\n\x80\x04\n{"step": "2"}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_until(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
