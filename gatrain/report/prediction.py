"""A prediction as text for people."""

from __future__ import annotations

from gatrain import units
from gatrain.predict import Prediction
from gatrain.predict.forecast import GpuForecast, ModeForecast, seconds


def prediction_lines(prediction: Prediction) -> list[str]:
    """The answer for one GPU in full, or one row for each of several."""
    head = (
        f"Predicted for recipe {prediction.recipe}: {prediction.parameters:,} parameters, effective batch "
        f"{prediction.effective_batch}, {prediction.world_size} "
        f"GPU{'s' * (prediction.world_size != 1)} (traced in {prediction.trace_s:.1f} s, no GPU used)"
    )
    body = _one(prediction.gpus[0]) if len(prediction.gpus) == 1 else _table(prediction)
    return [head, "", *body, "", *(f"Note: {note}" for note in prediction.notes)]


def _one(forecast: GpuForecast) -> list[str]:
    gpu = forecast.gpu
    lines = [
        f"{gpu.name}: {units.size(gpu.memory_bytes)}, of which {units.size(forecast.budget_bytes)} may be used; "
        f"{forecast.precision}, not compiled",
        "",
        "checkpointing  micro-batch  accum.  allocated   reserved   in all      result",
    ]
    for mode in forecast.modes:
        for size in mode.sizes:
            mark = "->" if forecast.plan and mode.proposed == size and _is_chosen(forecast, mode) else "  "
            lines.append(
                f"{mark} {mode.checkpointing:<12}{size.micro_batch:>10}{size.accumulation_steps:>8}"
                f"{units.size(size.allocated_bytes):>13}{units.size(size.reserved_bytes):>11}{units.size(size.peak_bytes):>11}"
                f"   {'fits' if size.fits else 'does not fit'}"
            )
    lines.append("")
    lines += [
        f"checkpointing {mode.checkpointing}: largest micro-batch that fits {mode.largest_micro_batch}"
        + (f", {seconds(mode.step_s)} per optimizer step" if mode.step_s else "")
        for mode in forecast.modes
    ]
    if forecast.plan is not None and forecast.samples_per_s is not None:
        rate = forecast.samples_per_s
        lines += [
            "",
            f"Proposed: {forecast.plan.equation}, checkpointing {forecast.plan.settings.checkpointing}",
            f"Predicted rate: {rate.low:,.3g} to {rate.high:,.3g} samples/s over all GPUs",
        ]
    return lines


def _is_chosen(forecast: GpuForecast, mode: ModeForecast) -> bool:
    return forecast.plan is not None and forecast.plan.settings.checkpointing == mode.checkpointing


def _table(prediction: Prediction) -> list[str]:
    """One row for each GPU: the largest micro-batch of each mode, and the range of the best step."""
    modes = [mode.checkpointing for mode in prediction.gpus[0].modes]
    titles = "".join(f"{mode:>11}" for mode in modes)
    lines = [
        f"{'':<16}{'memory':>10}  {'':<5} largest micro-batch by checkpointing",
        f"{'GPU':<16}{'':>10}  {'':<5}{titles}   predicted time of a step",
    ]
    for forecast in prediction.gpus:
        cells = "".join(f"{mode.largest_micro_batch or '-':>11}" for mode in forecast.modes)
        result = seconds(forecast.step_s) if forecast.step_s else "does not fit"
        memory = units.size(forecast.gpu.memory_bytes)
        lines.append(f"{forecast.gpu.name:<16}{memory:>10}  {forecast.precision:<5}{cells}   {result}")
    if not prediction.fits:
        least = min(forecast.smallest_peak_bytes for forecast in prediction.gpus)
        lines += ["", f"It fits on none of these: one sample needs {units.size(least)} at least."]
    return lines
