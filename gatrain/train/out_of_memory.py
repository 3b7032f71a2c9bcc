"""What to say where training runs out of memory: what was in use, and a command that uses less and works."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from gatrain import commands
from gatrain.config import RunConfig
from gatrain.errors import DoesNotFitError, chain, is_out_of_memory
from gatrain.plan import Plan
from gatrain.rundir import RunDir


@contextlib.contextmanager
def told(config: RunConfig, plan: Plan, run_dir: RunDir, device: str, modes: Sequence[str]) -> Iterator[None]:
    """Turn an error that means "out of memory" into one with advice.

    Args:
        device: ``cpu`` or ``cuda``.
        modes: of activation checkpointing that the model offers; empty while the model is being built.

    Raises:
        DoesNotFitError: memory ran out inside.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DoesNotFitError) or not is_out_of_memory(error):
            raise
        lines = [f"out of {'GPU ' if device == 'cuda' else ''}memory: {_reason(error)}"]
        lines += _advice(config, plan, run_dir, device, modes)
        raise DoesNotFitError("\n".join(lines)) from error


def _reason(error: BaseException) -> str:
    """The sentence of the innermost error that says it; torch's own advice is about its allocator."""
    innermost = [each for each in chain(error) if is_out_of_memory(each)][-1]
    first = (str(innermost).strip() or type(innermost).__name__).splitlines()[0]
    return re.split(r"(?<=\.) (?=GPU|Of the|Including|If)", first)[0]


def _advice(
    config: RunConfig, plan: Plan, run_dir: RunDir, device: str, modes: Sequence[str]
) -> Iterator[str]:
    if not modes:
        yield "The model with its gradients and its optimizer's state does not fit, whatever the micro-batch."
    else:
        in_use = f"checkpointing={plan.settings.checkpointing}, precision={plan.settings.precision}"
        yield f"In use were micro-batches of at most {plan.micro_batch}, {in_use}."
    smaller = None
    if modes and plan.micro_batch > 1:
        smaller = f"batch.micro={plan.micro_batch // 2}"
    elif "full" in modes and plan.settings.checkpointing != "full":
        smaller = "checkpointing=full"
    if smaller is not None:
        yield f"A smaller one gives the same result: {_command(run_dir, smaller)}"
    further = []
    if "full" in modes and plan.settings.checkpointing != "full" and smaller != "checkpointing=full":
        further.append("checkpointing=full")
    if device == "cuda" and plan.settings.precision == "fp32":
        further.append("a new run with precision=bf16")
    if config.train.data_workers:
        further.append(f"fewer than train.data_workers={config.train.data_workers}")
    further.append("a GPU with more memory" if device == "cuda" else "a machine with more memory")
    yield f"{'Also' if smaller else 'What'} helps: {', '.join([*further, 'a smaller model'])}."


def _command(run_dir: RunDir, setting: str) -> str:
    """Go on where there is a state to go on from, else begin again in the place of what is there."""
    if run_dir.saved_steps():
        return commands.resume(run_dir, setting)
    key, _, value = setting.partition("=")
    return commands.start_over(run_dir, {key: value})
