"""What a run tells people and files: nothing is lost, nothing from outside reaches the terminal unescaped."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, ConsoleDimensions
from rich.text import Text

from gatrain import units
from gatrain.batch import Split
from gatrain.errors import ConfigError
from gatrain.plan import DOES_NOT_FIT, FAILED, FITS, SKIPPED, Measurement, Plan, StepSettings, Trial
from gatrain.report import (
    Fanout,
    JsonlSink,
    Logger,
    PlainSink,
    TensorBoardSink,
    console_sink,
    make_sinks,
    plan_lines,
    plan_plot,
    plan_table,
    print_plan,
    save_plots,
    terminal_plot,
)
from gatrain.report import text as words
from gatrain.report.averages import Averages
from gatrain.report.jsonl import keep_until, read_lines
from gatrain.report.live import LiveSink, _Console, _Region
from gatrain.report.plain import step_values
from gatrain.report.plan_plot import plan_plot_lines, terminal_points
from gatrain.report.plot import sparkline
from gatrain.rundir import RunDir, write_json
from gatrain.train.events import RunInfo
from gatrain.train.records import RunSummary, StepRecord

EVIL = "[bold red]x[/bold red]\x1b[2J\x1b]0;title\x07\u202e\x9b31m"


@pytest.fixture(autouse=True)
def _same_terminal_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def run_info(folder: Path, **changes: Any) -> RunInfo:
    facts: dict[str, Any] = {
        "recipe": "llm",
        "run_dir": folder,
        "device": "2 x A GPU",
        "world_size": 2,
        "effective_batch": 512,
        "equation": "512 = 2 ranks x 16 accumulation steps x 16",
        "precision": "bf16",
        "checkpointing": "none",
        "compile": True,
        "sync": "window",
        "parameters": 124_439_808,
        "train_samples": 10_000,
        "eval_samples": 1_000,
        "first_step": 0,
        "total_steps": 600,
        "steps_per_epoch": 200,
        "baseline_name": "unigram",
        "baseline_loss": 6.14,
    }
    return RunInfo(**{**facts, **changes})


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "loss": 4.0 + 6.0 / step,
        "grad_norm": 0.92,
        "lr": 2.9e-3,
        "samples": 512 * step,
        "tokens": 65_536 * step,
        "samples_per_s": 1240.0,
        "tokens_per_s": 158_720.0,
        "step_s": 0.413,
        "peak_memory_bytes": int(1.9 * 2**30),
        "window": "0a1b2c",
    }
    return StepRecord(**{**values, **changes})


def summary(**changes: Any) -> RunSummary:
    values: dict[str, Any] = {
        "status": "completed",
        "step": 600,
        "total_steps": 600,
        "loss": 4.62,
        "eval_loss": 4.71,
        "evaluation": {"loss": 4.71},
        "updates": 600,
        "skipped_steps": 0,
        "unreadable_samples": 0,
        "showcase": None,
        "elapsed_s": 113.0,
    }
    return RunSummary(**{**values, **changes})


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# --- files


def test_metrics_are_cut_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(record(step).to_dict()) + "\n" for step in range(1, 8))
    path.write_text(whole + '{"step": 8, "los')
    (tmp_path / "evaluations.jsonl").write_text('{"step": 4, "loss": 5}\n{"step": 6, "loss": 4}\n')
    sink = JsonlSink(path, first_step=5)
    sink.start(run_info(tmp_path, first_step=5))
    assert steps_in(path) == [1, 2, 3, 4, 5]
    sink.step(record(6))
    sink.evaluation(6, {"loss": 4.5, "accuracy": math.nan})
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]  # whole lines are there before the file is closed
    sink.end(summary())
    sink.close()
    assert read_lines(tmp_path / "evaluations.jsonl") == [
        {"step": 4, "loss": 5},
        {"step": 6, "loss": 4.5, "accuracy": None},
    ]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["evaluations.jsonl", "metrics.jsonl"]


def test_a_whole_last_line_without_its_end_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n[1]\n{"step": 2}')
    keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_new_run_starts_new_files_and_null_stands_for_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    sink = JsonlSink(path, first_step=0)
    sink.start(run_info(tmp_path))
    sink.step(record(1, loss=math.nan, grad_norm=math.inf, tokens=None, metrics={"a": -math.inf, "b": 2.5}))
    sink.close()
    sink.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    (line,) = path.read_text().splitlines()
    found = json.loads(line, parse_constant=refuse)
    assert [found[name] for name in ("loss", "grad_norm", "tokens")] == [None, None, None]
    assert found["metrics"] == {"a": None, "b": 2.5}


def test_tensorboard_hides_steps_that_are_trained_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((0, 6), (3, 5)):
        sink = TensorBoardSink(tmp_path)
        sink.start(run_info(tmp_path, first_step=first))
        for step in range(first + 1, last + 1):
            sink.step(record(step, tokens_per_s=None))
        sink.evaluation(last, {"loss": 4.0, "accuracy": 0.5})
        sink.end(summary())
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    tags = {f"train/{name}" for name in ("loss", "grad_norm", "lr", "skipped_steps")}
    tags |= {"speed/samples_per_s", "memory/peak_gib"}
    assert set(events.Tags()["scalars"]) == tags | {"eval/loss", "eval/accuracy"}


# --- plain lines


def test_plain_lines_say_what_happens(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    sink = PlainSink(stream, log_every=10, clock=clock)
    sink.start(run_info(tmp_path))
    for step in range(1, 600):
        sink.step(record(step))
        clock.now += 0.413
    sink.evaluation(100, {"loss": 4.71, "accuracy": 0.5})
    sink.saved(100, tmp_path / "saved" / "step_00000100")
    sink.notice("a short last window")
    sink.step(record(600))
    sink.end(summary(showcase="line one\nline two", evaluation={"loss": 4.71, "accuracy": 0.5}))
    lines = stream.getvalue().splitlines()
    steps = [line for line in lines if "samples/s" in line]
    assert steps[0].startswith("step   1/600")
    assert steps[-1].startswith("step 600/600  loss")
    (line,) = [line for line in steps if line.startswith("step 120/600")]
    assert line == (
        "step 120/600  loss  4.050  grad_norm 0.9200  lr 2.9e-3  1,240 samples/s  158,720 tokens/s"
        "  mem 1.9 GiB  left 3m 18s"
    )
    assert all(int(line.split("/")[0].split()[-1]) % 10 == 0 for line in steps[1:])
    assert (
        "step 100/600  held-out loss 4.710, 1.43 below the unigram baseline 6.140  accuracy 0.5000" in lines
    )
    assert "step 100/600  state saved in saved/step_00000100" in lines
    assert "note: a short last window" in lines
    assert "  | line two" in lines
    assert "held-out loss      4.710, 1.43 below the unigram baseline 6.140" in lines
    assert "held-out accuracy  0.5000" in lines
    assert lines[-1] == f"results            {tmp_path}"


def test_fast_runs_print_one_line_a_second_at_most(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    sink = PlainSink(stream, clock=clock)
    sink.start(run_info(tmp_path, total_steps=500_000))
    for step in range(1, 5001):
        clock.now += 0.002
        sink.step(record(step, tokens=None, tokens_per_s=None, peak_memory_bytes=None, lr=None, step_s=0.002))
    sink.end(summary(status="stopped", step=5000))
    steps = [line for line in stream.getvalue().splitlines() if line.startswith("step")]
    assert 10 <= len(steps) <= 12
    assert "step   5000/500000" in steps[-1]  # the last one known, though no total was reached
    assert "tokens" not in steps[-1]
    assert "mem" not in steps[-1]
    assert f"gatrain resume {tmp_path}" in stream.getvalue()


def test_a_stream_without_unicode_gets_question_marks(tmp_path: Path) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    sink = PlainSink(stream)
    sink.start(run_info(tmp_path))
    sink.end(summary(showcase="día \udc80"))
    assert b"d?a \\udc80" in raw.getvalue()


def test_output_into_a_closed_pipe_does_not_end_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_report import record, run_info, summary\n"
        "from gatrain.report import make_sinks; from gatrain.rundir import RunDir\n"
        "folder = Path(sys.argv[1]); sinks = make_sinks(RunDir(folder), 0, loggers=())\n"
        "sinks.start(run_info(folder)); sys.stdin.read(1)\n"
        "for step in range(1, 601): sinks.step(record(step))\n"
        "sinks.end(summary())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline().startswith("gatrain llm")
    process.stdout.close()
    process.stdin.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0
    assert errors.count("\n") == 1, errors
    assert "PlainSink is off" in errors
    assert len(steps_in(tmp_path / "metrics.jsonl")) == 600


# --- the terminal


def live(width: int, height: int = 40, **options: Any) -> tuple[LiveSink, Terminal, Clock]:
    stream, clock = Terminal(), Clock()
    size = {"width": width, "height": height}
    console = _Console(file=stream, force_terminal=True, markup=False, highlight=False, **size, **options)
    return LiveSink(console, clock), stream, clock


def screen(output: str, width: int, height: int) -> list[str]:
    """What a terminal of this size shows after this output."""
    pyte = pytest.importorskip("pyte")
    shown = pyte.Screen(width, height)
    pyte.Stream(shown).feed(output.replace("\n", "\r\n"))
    return [line.rstrip() for line in shown.display]


@pytest.mark.parametrize("width", [30, 80, 140])
def test_the_live_display_fits_any_width(tmp_path: Path, width: int) -> None:
    sink, stream, clock = live(width)
    sink.start(run_info(tmp_path))
    for step in range(1, 121):
        sink.step(record(step))
    clock.now += 75
    assert sink._region
    sink._region.refresh()
    shown = screen(stream.getvalue(), width, 40)
    assert any(line.startswith("step 120/600") and "20%" in line for line in shown)
    assert any(line.startswith("loss 4.05") and "smoothed" in line for line in shown)
    assert sum("1,240 samples/s" in line for line in shown) == 1
    for part in ("158,720 tokens/s", "mem 1.9 GiB", "lr 2.9e-3", "grad norm 0.9200"):
        assert any(part in line for line in shown), part
    if width >= 80:
        progress = next(line for line in shown if line.startswith("step 120/600"))
        assert "1m 15s, 2m 03s left" in progress
        assert "━" in progress
        assert any("█" in line and "▁" in line for line in shown)
    sink.evaluation(120, {"loss": 4.71})
    sink.notice("look here")
    sink.end(summary(showcase="a sample"))
    shown = screen(stream.getvalue(), width, 80)
    everything = " ".join(" ".join(shown).split())
    assert "samples/s" not in everything  # the moving part is gone, the events stay
    assert "512 = 2 ranks x 16 accumulation steps x 16" in everything
    assert "held-out loss 4.710, 1.43 below" in everything
    assert "note: look here" in everything
    assert "a sample" in everything
    assert "600 of 600 steps in 1m 53s" in everything
    assert str(tmp_path) in stream.getvalue().splitlines()[-1]  # in one piece, to be copied
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is shown again


def test_the_bar_moves_with_finished_steps_whose_metrics_have_not_come_yet(tmp_path: Path) -> None:
    sink, stream, _ = live(80)
    sink.start(run_info(tmp_path))
    sink.step(record(1))
    sink.watch(lambda: 300)
    assert sink._region
    sink._region.refresh()
    shown = screen(stream.getvalue(), 80, 40)
    assert any(line.startswith("step 300/600") and "50%" in line for line in shown)
    assert any(line.startswith("loss 10.0") for line in shown)
    sink.close()


def test_waiting_is_shown_before_the_first_step(tmp_path: Path) -> None:
    sink, stream, _ = live(60)
    with Fanout([sink]) as sinks:
        sinks.start(run_info(tmp_path))
        assert "waiting for the first steps" in stream.getvalue()
    assert sink._region is None  # closed without an end, as after an error of the training


def test_a_narrower_terminal_keeps_no_debris() -> None:
    """Lines of 100 cells fold into two rows each at 60: the region must climb over the folded ones too."""
    stream = Terminal()
    console = _Console(file=stream, force_terminal=True, width=100, height=20)
    region = _Region(console, lambda width: [Text("x" * width), Text("y" * 10)])
    region.auto_refresh = False
    region.start(refresh=True)
    stream.truncate(0)
    console.size = ConsoleDimensions(60, 20)
    region.refresh()
    assert stream.getvalue().count("\x1b[1A") == 2  # one row too many for the fold, one for the second line
    region.stop()


@pytest.mark.parametrize("plain", [True, False])
def test_nothing_from_outside_reaches_the_terminal_raw(tmp_path: Path, plain: bool) -> None:
    folder = tmp_path / "[red]run[bold] it's"
    folder.mkdir()
    if plain:
        stream: io.StringIO = io.StringIO()
        sink: LiveSink | PlainSink = PlainSink(stream)
    else:
        sink, stream, _ = live(300, no_color=True, color_system=None)
    sink.start(run_info(folder, recipe=EVIL, device=EVIL, baseline_name=EVIL))
    sink.step(record(1))
    sink.evaluation(1, {"loss": 1.0, EVIL: 2.0})
    sink.saved(1, folder / "saved" / "[x]")
    sink.notice(EVIL)
    sink.end(summary(status="stopped", showcase=f"[bold]hi[/bold] :smile: {EVIL}\n\tdeep"))
    output = stream.getvalue()
    assert "\x1b[2J" not in output
    for bad in ("\x1b]0", "\x07", "\u202e", "\x9b"):
        assert bad not in output
    assert "[bold]hi[/bold] :smile: [bold red]x[/bold red]\\x1b[2J\\x1b]0;title\\x07\\u202e\\x9b31m" in output
    assert "    deep" in output
    assert "[red]run[bold]" in output
    assert "saved/[x]" in output
    assert "gatrain resume '" in output
    assert """it'"'"'s'""" in output  # quoted for the shell


def test_the_display_is_chosen_by_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(console_sink(Terminal()), LiveSink)
    assert isinstance(console_sink(io.StringIO()), PlainSink)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(console_sink(Terminal()), PlainSink)
    closed = io.StringIO()
    closed.close()
    assert isinstance(console_sink(closed), PlainSink)


class Gone(Terminal):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_terminal_that_is_gone_does_not_end_the_process(tmp_path: Path) -> None:
    sinks = Fanout([console_sink(Gone()), hearing := Hearing()])
    sinks.start(run_info(tmp_path))
    sinks.step(record(1))
    assert hearing.steps == [1]
    assert "LiveSink is off" in hearing.notices[0]


# --- what is derived


def test_rates_come_from_the_records_and_forget_the_first_step(tmp_path: Path) -> None:
    meter = Averages(run_info(tmp_path))
    meter.add(record(1, step_s=60.0, samples_per_s=8.0))
    assert meter.samples_per_s == pytest.approx(8.0)
    for step in (2, 3):
        meter.add(record(step, step_s=0.5, samples_per_s=1024.0, loss=math.nan))
    assert meter.samples_per_s == pytest.approx(1024.0)
    assert meter.seconds_left == pytest.approx(597 * 0.5)
    assert meter.smooth_loss == pytest.approx(10.0)


def test_the_history_stays_small(tmp_path: Path) -> None:
    meter = Averages(run_info(tmp_path))
    for step in range(1, 5001):
        meter.add(record(step, loss=float(step)))
    losses = meter.losses()
    assert 256 <= len(losses) <= 512
    assert losses == sorted(losses)


def test_numbers_read_well() -> None:
    assert [words.decimal(v) for v in (4.81234, 0.5, 123.456, 1e-5, math.nan, None)] == [
        "4.812", "0.5000", "123.5", "1e-5", "nan", "-",
    ]  # fmt: skip
    assert [units.duration(v) for v in (0.2, 59.6, 3599, 7500, 273_600)] == [
        "0s",
        "1m 00s",
        "59m 59s",
        "2h 05m",
        "3d 04h",
    ]
    assert [words.learning_rate(v) for v in (0.1, 2.9e-3, 0.0)] == ["0.1", "2.9e-3", "0"]
    assert words.learning_rate(math.nan) == "nan"


def test_the_rate_of_a_phase_is_written_as_the_rate(tmp_path: Path) -> None:
    meter = Averages(run_info(tmp_path))
    meter.add(record(1, lr=1e-3, metrics={"generator.lr": 1e-3, "norm": 1e-3}))
    shown = step_values(meter)
    assert shown["lr"] == "lr 1e-3"
    assert shown["metrics.generator.lr"] == "generator.lr 1e-3"
    assert shown["metrics.norm"] == "norm 0.0010"
    assert [units.size(v) for v in (2**20 * 312, 2**30 * 1.9)] == ["312 MiB", "1.9 GiB"]
    assert [units.seconds(v) for v in (8.1e-5, 0.413, 2.31, 1234)] == [
        "0.081 ms",
        "413 ms",
        "2.31 s",
        "1,234 s",
    ]


# --- failures


class Breaking(Logger):
    """Raises at every event."""

    def step(self, record: StepRecord) -> None:
        raise OSError(28, "No space left on device")


class Hearing(Logger):
    """Remembers what it hears."""

    for_people = True

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.notices: list[str] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record.step)

    def notice(self, text: str) -> None:
        self.notices.append(text)


def test_a_sink_that_cannot_write_is_told_of_once_and_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    hearing, breaking = Hearing(), Breaking()
    sinks = Fanout([breaking, hearing])
    for step in (1, 2, 3):
        sinks.step(record(step))
    assert hearing.steps == [1, 2, 3]
    (told,) = hearing.notices
    assert "Breaking cannot write (step): the disk is full" in told
    breaking.step = lambda record: None  # type: ignore[method-assign]
    sinks.step(record(4))
    assert hearing.notices[1:] == ["Breaking writes again; 3 lines missing."]
    assert capsys.readouterr().err == ""


def test_a_sink_with_another_error_is_told_of_once_and_dropped() -> None:
    class Wrong(Logger):
        def step(self, record: StepRecord) -> None:
            raise ValueError("no such thing")

    sinks = Fanout([Wrong(), hearing := Hearing()])
    for step in (1, 2):
        sinks.step(record(step))
    (told,) = hearing.notices
    assert "Wrong is off after an error in step: no such thing" in told


def test_the_last_resort_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    sinks = Fanout([Breaking()])
    sinks.step(record(1))
    sinks.step(record(2))
    assert capsys.readouterr().err.count("Breaking cannot write") == 1


@pytest.mark.parametrize("taken", [0, 7])  # bytes of a line that a disk takes before it is full
def test_after_a_full_disk_no_line_is_missing_and_none_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    sinks = Fanout([JsonlSink(tmp_path / "metrics.jsonl", 0), hearing := Hearing()])
    sinks.start(run_info(tmp_path))
    real, full = os.write, False

    def write(handle: int, line: bytes) -> int:
        if not full:
            return real(handle, line)
        if taken:
            return real(handle, line[:taken])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    for step in range(1, 7):
        full = step in (3, 4)
        sinks.step(record(step))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 3 if full else step + 1))
    assert ["the disk is full" in hearing.notices[0], "no line is missing" in hearing.notices[1]] == [
        True,
        True,
    ]
    sinks.end({})
    assert sinks.failures == []


def test_a_disk_that_stays_full_is_among_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = Fanout([JsonlSink(tmp_path / "metrics.jsonl", 0), Hearing()])
    sinks.start(run_info(tmp_path))

    def write(handle: int, line: bytes) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "write", write)
    sinks.step(record(1))
    sinks.end({})
    (failure,) = sinks.failures
    assert "the disk quota is used up, 1 line missing" in failure


def test_tensorboard_gets_every_point_after_a_full_disk(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer.record_writer import RecordWriter

    from gatrain.report import TensorBoardSink

    sink = TensorBoardSink(tmp_path)
    sinks = Fanout([sink, hearing := Hearing()])
    sinks.start(run_info(tmp_path))
    for step in range(1, 6):
        if step == 3:
            sink._writer.close()
            full = Path("/dev/full").open("wb")  # noqa: SIM115
            sink._writer._writer = RecordWriter(full)
        sinks.step(record(step))
        if step == 3:
            sinks.evaluation(3, {"loss": 1.0})
    sinks.end({})
    assert ["the disk is full" in hearing.notices[0], "writes again" in hearing.notices[1]] == [True, True]
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [point.step for point in read.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_make_sinks(tmp_path: Path) -> None:
    sinks = make_sinks(RunDir(tmp_path), 0, stream=io.StringIO(), loggers=())
    assert [type(sink) for sink in sinks] == [PlainSink, JsonlSink]
    assert list(make_sinks(None, 0)) == []


# --- the plan


def a_plan() -> Plan:
    def trial(micro: int, outcome: str, rate: float | None = None, **more: Any) -> Trial:
        settings = StepSettings("bf16", more.pop("checkpointing", "none"), compile=True, sync="window")
        if rate is None:
            return Trial(settings, Measurement(micro, outcome, **more))
        measured = Measurement(micro, outcome, peak_memory_bytes=micro * 2**30, **more)
        return Trial(settings, measured, samples_per_s=rate, step_s=512 / rate)

    return Plan(
        split=Split(512, 2),
        micro_batch=32,
        settings=StepSettings("bf16", "none", compile=True, sync="window"),
        reason="the fastest [of] four",
        notes=["A note."],
        trials=[
            trial(64, DOES_NOT_FIT),
            trial(32, FITS, 3702.0),
            trial(16, FITS, 3580.0),
            trial(128, SKIPPED, error="out of time"),
            trial(256, SKIPPED, error="out of time"),
            trial(64, FITS, 2790.0, checkpointing="full"),
            trial(96, FAILED, error="RuntimeError: [boom]\nmore", checkpointing="full"),
        ],
    )


@pytest.mark.parametrize("form", ["lines", "table", "printed"])
def test_the_plan_marks_its_choice_and_shows_every_outcome(form: str) -> None:
    plan = a_plan()
    if form == "lines":
        lines = plan_lines(plan)
    elif form == "printed":
        stream = io.StringIO()
        print_plan(plan, stream)
        lines = stream.getvalue().splitlines()
    else:
        console = Console(width=100, file=io.StringIO(), record=True, markup=True)
        console.print(plan_table(plan))
        lines = [line.rstrip() for line in console.export_text().splitlines()]
    rows = [line.split() for line in lines]
    assert [row for row in rows if row[:1] == ["->"]] == [
        ["->", "32", "8", "none", "fits", "32.0", "GiB", "3,702", "138", "ms"]
    ]
    assert lines[0] == "All trials: bf16, compiled."
    assert ["64", "4", "none", "does", "not", "fit", "-", "-", "-"] in rows
    assert ["128", "2", "none", "skipped", "-", "-", "-"] in rows
    assert ["96", "3", "full", "failed", "-", "-", "-"] in rows
    order = [row[0] if row[0] != "->" else row[1] for row in rows if row and row[-1] in ("ms", "-")]
    assert order == ["16", "32", "64", "128", "256", "64", "96"]
    assert plan.equation in lines
    assert "Why: the fastest [of] four" in lines
    assert "Note: A note." in lines
    assert "Micro-batch 128, 256 (checkpointing none) skipped: out of time" in lines
    assert "Micro-batch 96 (checkpointing full) failed: RuntimeError: [boom]" in lines


def test_whole_steps_and_the_memory_budget_are_shown_where_they_are_known() -> None:
    assert not any("measured" in line or "Peak memory" in line for line in plan_lines(a_plan()))
    trials = [
        dataclasses.replace(t, confirmed_step_s=0.141, confirmed_steps=9) if t.micro_batch == 32 else t
        for t in a_plan().trials
    ]
    known = {"predicted_peak_bytes": 32 * 2**30, "memory_budget_bytes": 72 * 2**30}
    lines = plan_lines(dataclasses.replace(a_plan(), trials=trials, **known))
    (chosen,) = [line for line in lines if line.startswith("->")]
    assert chosen.split()[-4:] == ["138", "ms", "141", "ms"]
    assert "Peak memory 32.0 GiB; 72.0 GiB may be used" in lines


def test_a_run_that_begins_tells_of_its_plan_what_its_head_does_not() -> None:
    plan = dataclasses.replace(a_plan(), advice=["Another batch."])
    stream = io.StringIO()
    print_plan(plan, stream, trains=True)
    told = stream.getvalue()
    assert "Why: " in told
    assert "Note: A note." in told
    assert plan.equation not in told
    assert "->" not in told
    assert "Another batch." not in told
    assert "Note: Another batch." in plan_lines(plan)


def test_the_chosen_row_is_bold() -> None:
    stream = Terminal()
    console = Console(width=100, file=stream, force_terminal=True, color_system="standard")
    console.print(plan_table(a_plan()))
    (row,) = [line for line in stream.getvalue().splitlines() if "->" in line]
    assert "\x1b[1m" in row


def test_a_narrow_terminal_gets_fewer_columns_not_torn_ones() -> None:
    console = Console(width=50, file=io.StringIO(), record=True)
    console.print(plan_table(a_plan()))
    output = console.export_text()
    assert "…" not in output
    assert "does not fit" in output
    assert "138 ms" in output


def test_a_plan_without_trials_still_explains_itself() -> None:
    settings = StepSettings("fp32", "full", compile=False, sync="overlap")
    plan = Plan(split=Split(23, 3), micro_batch=5, settings=settings, reason="given by hand")
    assert plan_lines(plan) == [
        "23 = 2 ranks x (2 x 4) + 1 rank x (4 + 3)",
        "fp32, full checkpointing, not compiled, sync overlap",
        "Why: given by hand",
    ]


# --- pictures


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_dir = RunDir(tmp_path / "$x_{[odd]" / "漢字 \x1b")
    run_dir.path.mkdir(parents=True)
    assert save_plots(run_dir.path) == []  # nothing to draw yet
    lines = [json.dumps({"step": step, "loss": None if step == 7 else 10 / step}) for step in range(1, 90)]
    run_dir.metrics.write_text("\n".join(lines) + '\n{"step": 9')
    (run_dir.path / "evaluations.jsonl").write_text('{"step": 50, "loss": 3.0}\n')
    write_json(run_dir.plan, a_plan().to_dict())
    write_json(run_dir.summary, {"baseline": {"name": "unigram", "loss": 6.14}})
    written = save_plots(run_dir.path)
    assert [path.name for path in written] == ["loss.png", "plan.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_without_matplotlib_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatrain.report.plot.importlib.util.find_spec", lambda name: None)
    assert save_plots(tmp_path) == []


def test_terminal_plot() -> None:
    lines = terminal_plot([10.0, 8.0, math.nan, 2.0, 1.0], 20, 4).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("10.000 ┤")
    assert lines[-1].startswith(" 1.000 ┤")
    assert max(map(len, lines)) <= 20
    falling = terminal_plot([float(-x) for x in range(200)], 40, 5).splitlines()
    assert all(any(0x2800 < ord(char) <= 0x28FF for char in line) for line in falling)
    assert terminal_plot([], 20, 4) == terminal_plot([math.nan], 20, 4) == terminal_plot([1.0], 3, 4) == ""
    assert terminal_plot([2.0, 2.0], 20, 1)


def test_points_are_drawn_over_a_logarithmic_axis_with_the_choice_marked() -> None:
    points = [(1.0, 10.0), (2.0, 20.0), (4.0, 40.0), (16.0, 30.0)]
    lines = terminal_points(points, 60, 6, mark=4)
    assert len(lines) == 7
    assert max(map(len, lines)) <= 60
    assert sum(line.count("*") for line in lines) == 1
    assert lines[0].startswith("40.000 ┤")
    assert "*" in lines[0]  # the highest is the choice
    assert lines[5].startswith("     0 ┤")
    axis = lines[-1].split()
    assert axis == ["1", "2", "4", "16"]
    star, four = lines[0].index("*"), lines[-1].index("4")
    assert abs(star - four) <= 1
    assert abs(star - (8 + (60 - 8) / 2)) <= 1  # 4 lies halfway from 1 to 16
    assert (
        terminal_points([], 60, 6) == terminal_points(points, 12, 6) == terminal_points(points, 60, 1) == []
    )
    assert terminal_points([(8.0, 5.0)], 40, 4, mark=8)
    assert terminal_points([(0.0, 5.0), (1.0, math.nan)], 40, 4) == []


def test_the_plans_curve_in_a_terminal_and_in_a_file(tmp_path: Path) -> None:
    lines = plan_plot_lines(a_plan(), 70)
    assert [line for line in lines if "by micro-batch" in line] == [
        "samples per s, by micro-batch (* chosen)",
        "peak memory, GiB, by micro-batch (* chosen)",
    ]
    assert sum(line.count("*") for line in lines if "┤" in line or "│" in line) == 2
    assert max(map(len, lines)) <= 70
    settings = StepSettings("fp32", "none", compile=False, sync="window")
    empty = Plan(split=Split(4, 1), micro_batch=2, settings=settings, reason="by hand")
    assert plan_plot_lines(empty) == []
    pytest.importorskip("matplotlib")
    plan_plot.save_plan_plot(a_plan(), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    plan_plot.save_plan_plot(empty, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_picture_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatrain.report.plan_plot.importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="there is no folder"):
        plan_plot.check_can_draw(tmp_path / "nowhere" / "curve.png")
    monkeypatch.setattr("gatrain.report.plan_plot.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'gatrain\[plot\]'"):
        plan_plot.check_can_draw(tmp_path / "curve.png")


def test_sparkline() -> None:
    assert sparkline([3, 2, 1, 0], 4) == "█▅▃▁"
    assert sparkline([1.0, math.nan, 1.0], 10) == "▁ ▁"
    assert len(sparkline(list(range(1000)), 12)) == 12
    assert sparkline([], 5) == sparkline([1.0], 0) == ""


# --- what is imported


def test_reports_import_no_training_code_and_no_heavy_package() -> None:
    code = (
        "import sys, gatrain.report\n"
        "heavy = {'torch', 'hydra', 'typer', 'omegaconf', 'matplotlib', 'tensorboard', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
