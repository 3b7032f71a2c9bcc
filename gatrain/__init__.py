"""gatrain: name the effective batch size, train at exactly that size.

Importing this package imports nothing heavy. The library names below load torch on first use.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gatrain.loops.accumulator import Accumulator as Accumulator
    from gatrain.loops.keras import accumulate_in_fit as accumulate_in_fit
    from gatrain.loops.optimizer import AccumulatingOptimizer as AccumulatingOptimizer
    from gatrain.report.sink import Logger as Logger
    from gatrain.tasks.base import Task as Task
    from gatrain.train.accumulate import accumulate as accumulate
    from gatrain.train.hook import Hook as Hook
    from gatrain.train.hook import HookRun as HookRun
    from gatrain.train.hook import TrainedStep as TrainedStep
    from gatrain.train.main_gradients import MasterWeights as MasterWeights
    from gatrain.train.window_result import WindowResult as WindowResult
    from gatrain.train.windows import windows as windows

_LIBRARY = {
    "AccumulatingOptimizer": "gatrain.loops.optimizer",
    "Accumulator": "gatrain.loops.accumulator",
    "Task": "gatrain.tasks.base",
    "accumulate": "gatrain.train.accumulate",
    "accumulate_in_fit": "gatrain.loops.keras",
    "Logger": "gatrain.report.sink",
    "Hook": "gatrain.train.hook",
    "HookRun": "gatrain.train.hook",
    "TrainedStep": "gatrain.train.hook",
    "MasterWeights": "gatrain.train.main_gradients",
    "WindowResult": "gatrain.train.window_result",
    "windows": "gatrain.train.windows",
}

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    if name in _LIBRARY:
        import importlib

        return getattr(importlib.import_module(_LIBRARY[name]), name)
    raise AttributeError(f"module 'gatrain' has no attribute {name!r}")
