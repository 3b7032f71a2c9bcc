"""Say what went wrong in a rank: exit code, message, the user's own lines, cause or consequence."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path

from gatrain.causes import told
from gatrain.errors import ConfigError, DoesNotFitError, GatrainError, WorkerError, chain, is_out_of_memory


def describe(error: BaseException) -> tuple[int, str, str]:
    """Exit code, kind and message of an error."""
    if isinstance(error, GatrainError):
        return error.exit_code, type(error).__name__, str(error)
    if is_out_of_memory(error):
        text = re.split(r"(?<=\.) (?=GPU|Of the|Including|If)", str(error) or type(error).__name__)[0]
        hint = "Use a smaller batch.micro, checkpointing=full, or batch.micro=auto to have it measured."
        return DoesNotFitError.exit_code, DoesNotFitError.__name__, f"out of memory: {text} {hint}"
    if is_consequence(error):
        first = str(error).partition("\n")[0].partition(" This is typically")[0]
        text = f"lost the connection to another rank, or waited too long for it ({first})"
        return WorkerError.exit_code, type(error).__name__, text
    checkpoint = sys.modules.get("torch.utils.checkpoint")
    if checkpoint is not None and any(isinstance(each, checkpoint.CheckpointError) for each in chain(error)):
        text = (
            "checkpointing: a block computed other tensors when it was run again in the backward. It changes "
            "something of its own at each call (a cache, a counter, random numbers that are not torch's). "
            "Use checkpointing=none."
        )
        return ConfigError.exit_code, ConfigError.__name__, f"{text}\n{told(error)}"
    if isinstance(error, SystemExit):
        given = "" if error.code is None else repr(error.code)
        text = f"the code called sys.exit({given}), which ends one rank in the middle of its work"
        return WorkerError.exit_code, type(error).__name__, told(error, f"{text}. ")
    return WorkerError.exit_code, type(error).__name__, told(error)


def is_consequence(error: BaseException) -> bool:
    """Whether the error only says that another rank is gone; the launcher looks for the cause elsewhere."""
    if getattr(error, "secondary", False):
        return True
    if is_out_of_memory(error):
        return False  # what NCCL says of memory is a cause, not the end of a peer
    if isinstance(error, GatrainError):
        return error.__cause__ is not None and is_consequence(error.__cause__)
    dist = sys.modules.get("torch.distributed")
    if dist is not None and isinstance(error, dist.DistError):
        return True
    peer_gone = r"gloo|Connection (closed|reset) by peer|Broken pipe|NCCL|process group.*(abort|shut)"
    is_worded_so = isinstance(error, RuntimeError) and re.search(peer_gone, str(error)) is not None
    return (is_worded_so or isinstance(error, ConnectionError)) and _is_of_a_collective(error)


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether torch raised it, below a line of torch's or of gatrain's: the user's own code talks to databases,
    stores and pipes, whose broken connections are causes."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return True
    innermost = Path(frames[-1].filename)
    torch = Path(str(sys.modules["torch"].__file__)).parent if "torch" in sys.modules else None
    ours = Path(__file__).parents[1]
    if torch is not None and innermost.is_relative_to(torch / "utils"):
        return False  # a loader process, not a rank
    return innermost.is_relative_to(ours) or (torch is not None and innermost.is_relative_to(torch))
