"""Reading samples and making micro-batches of them: the one way for training, trials, verify and prediction.

Random numbers of a sample follow from (seed, epoch, sample), those of a collate function from (seed, epoch, first
sample), whoever reads and wherever: a thread, a loader process or the calling thread. The process's own
generators are left as they were.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gatrain import offspring
from gatrain.errors import BrokenSampleError, DataError, DoesNotFitError, GatrainError, is_out_of_memory
from gatrain.tasks.base import Batch, Samples, Task, declares, is_deterministic, weights_of
from gatrain.tasks.streams import BrokenInStream, Stream
from gatrain.train import seeding
from gatrain.train.batches import parts_of
from gatrain.train.micro_batches import MicroBatch
from gatrain.train.sample_names import names_of

Key = tuple[int, int]
"""(epoch, sample id); in an order that draws a sample several times in an epoch, the draw stands for the epoch."""

T = TypeVar("T")

SKIP = (
    "Mend it, or let the dataset skip it: where __getitem__ raises gatrain.errors.BrokenSampleError(text, "
    "skip=True), the sample is left out with weight zero, counted and named."
)

_watch = threading.local()
_elsewhere = contextvars.ContextVar("_elsewhere", default=False)
SEARCHED_FOR_ONE_THAT_READS = 64


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Stands for a sample that cannot be read and is to be left out: see `gatrain.errors.BrokenSampleError`."""

    reason: str


def is_read(sample: Any) -> bool:
    """Whether there is a sample, and not a sign of one that cannot be read."""
    return sample is not None and not isinstance(sample, Skipped)


def read(task: Task, data: Samples, keys: Sequence[Key], seed: int, *, trusted: bool = False) -> list[Any]:
    """The samples of ``keys``, in order; `Skipped` in the place of those to be left out.

    A dataset that declares itself deterministic and draws numbers all the same is read again, seeded.

    Args:
        trusted: take the declaration for true and touch no generator, as a thread beside the model must.
    """
    if isinstance(data, Stream):
        found = data.read(keys, seed)
        return [Skipped(each.reason) if isinstance(each, BrokenInStream) else each for each in found]
    if _elsewhere.get() and torch.utils.data.get_worker_info() is None:
        return _read_elsewhere(task, data, keys, seed)
    if is_deterministic(data):
        if trusted:
            return _read_plain(data, keys)
        samples, drew = _compared(lambda: _read_plain(data, keys))
        if not drew:
            return samples
        _note_draw(undeclared=True)
    samples = []
    with seeding.kept_random_state():
        for epoch, sample in keys:
            seeding.seed_everything(seed, epoch, sample)
            samples.append(_watched(lambda sample=sample: _read_one(data, sample)))  # type: ignore[misc]
    return samples


def read_one(task: Task, data: Samples, key: Key, seed: int) -> Any:
    """The sample of ``key``, or another one where that cannot be read (is None or skipped): for measurements.

    Raises:
        DataError: every sample that was tried is skipped.
    """
    total, many = len(data), SEARCHED_FOR_ONE_THAT_READS
    skipped = None
    # the next ones, then some from everywhere: a whole folder may be broken
    for step in dict.fromkeys([*range(min(total, many)), *(total * nth // many for nth in range(many))]):
        (sample,) = read(task, data, [(key[0], (key[1] + step) % total)], seed)
        if is_read(sample):
            return sample
        skipped = sample or skipped
    if skipped is not None:
        raise DataError(f"none of the samples that were tried can be read. One of them: {skipped.reason}.")
    return None


def collated(
    task: Task, samples: list[Any], keys: Sequence[Key], seed: int, *, trusted: bool = False
) -> Batch:
    """One batch of the samples that were read for ``keys``; see `read` for ``trusted``.

    The collate function gets lists and dicts of its own: many take entries out of them.
    """
    own = _unchanged if task.collates_by_default else own_containers
    if task.collates_deterministically:
        if trusted:
            return task.collate(own(samples))
        batch, drew = _compared(lambda: task.collate(own(samples)))
        if not drew:
            return batch
        _note_draw(undeclared=True)
    with seeding.seeded(seed, seeding.COLLATE, *keys[0]):
        return _watched(lambda: task.collate(own_containers(samples)))


def load(
    task: Task,
    data: Samples,
    keys: Sequence[Key],
    seed: int,
    *,
    trusted: bool = False,
    given: list[Any] | None = None,
) -> MicroBatch:
    """Read, collate, weigh and count one micro-batch. ``given`` are its samples where they were read already.

    Raises:
        DataError: a sample cannot be read, or the batch does not hold the samples that it was made of.
        GatrainError: whatever the task itself raises of its own.
    """
    _watch.reading = None
    was_undeclared, _watch.undeclared = getattr(_watch, "undeclared", False), False
    try:
        if given is None and (whole := _gathered(task, data, keys)) is not None:
            return whole
        samples = read(task, data, keys, seed, trusted=trusted) if given is None else given
        _watch.reading = None
        found = make(task, samples, keys, seed, data=data, trusted=trusted)
        return dataclasses.replace(found, undeclared_draws=_watch.undeclared)
    except GatrainError:
        raise
    except Exception as error:
        ids = names_of(data, [sample for _, sample in keys], _watch.reading)
        if is_out_of_memory(error):
            raise DoesNotFitError(
                f"out of memory in reading and collating the samples {ids}: {type(error).__name__}: {error}. "
                f"Use {f'batch.micro={len(keys) // 2}, ' if len(keys) > 1 else ''}fewer train.data_workers, or a "
                "machine with more memory."
            ) from error
        raise DataError(f"cannot load the samples {ids}: {type(error).__name__}: {error}\n{SKIP}") from error
    finally:
        _watch.undeclared = was_undeclared


def _gathered(task: Task, data: Samples, keys: Sequence[Key]) -> MicroBatch | None:
    """A micro-batch of data whose samples lie in tensors, in one call; None where they are read one by one.

    Nothing of it draws a random number: it is torch's and gatrain's own, or declared.
    """
    if not keys or not task.collates_by_default or not is_deterministic(data) or _elsewhere.get():
        return None
    ids = [sample for _, sample in keys]
    if type(data) is TensorDataset:
        if not all(type(each) is Tensor and each.device.type == "cpu" for each in data.tensors):
            return None
        chosen = torch.as_tensor(ids)
        batch: Batch = [each[chosen].contiguous() for each in data.tensors]  # as a stack of samples would lie
    elif declares(data, "batch_of", "__getitem__", "__getitems__"):
        batch = data.batch_of(ids)  # type: ignore[attr-defined]
    else:
        return None
    if task.count_samples(batch) not in (None, len(ids)):
        return None  # told of where the samples are collated
    weights = weights_of(task, batch)
    return MicroBatch(batch, weights, samples=len(ids), tokens=task.tokens(batch), keys=tuple(keys))


def make(
    task: Task,
    samples: list[Any],
    keys: Sequence[Key],
    seed: int,
    *,
    data: Samples | None = None,
    trusted: bool = False,
) -> MicroBatch:
    """Collate, weigh and count samples that were read for ``keys``. Skipped ones are not given to collate.

    Raises:
        DataError: the batch does not hold the samples that it was made of.
    """
    skipped = tuple(sample.reason for sample in samples if isinstance(sample, Skipped))
    if skipped:
        left = [each for each in zip(keys, samples, strict=True) if not isinstance(each[1], Skipped)]
        found = MicroBatch(None, {}, samples=0)
        if left:
            kept_keys, kept = [key for key, _ in left], [sample for _, sample in left]
            found = make(task, kept, kept_keys, seed, data=data, trusted=trusted)
        dropped = found.dropped + len(skipped)
        read_at = [place for place, sample in enumerate(samples) if not isinstance(sample, Skipped)]
        inner = range(len(read_at)) if found.places is None and not found.dropped else found.places
        places = None if inner is None else tuple(read_at[place] for place in inner)
        return dataclasses.replace(found, dropped=dropped, skipped=skipped, keys=tuple(keys), places=places)
    broken = sum(sample is None for sample in samples)
    try:
        batch = collated(task, samples, keys, seed, trusted=trusted)
    except Exception as error:
        if broken < len(samples):
            raise
        source = data if data is not None else task.train_data
        _check_that_none_is_dropped(task, source, keys, seed, trusted, error)
        return MicroBatch(None, {}, samples=0, dropped=broken, keys=tuple(keys))
    weights = weights_of(task, batch)
    count = _samples_in(task, samples, batch, keys, seed, trusted)
    # a collate function that leaves out what is None
    there = tuple(place for place, sample in enumerate(samples) if sample is not None) if broken else None
    return MicroBatch(
        batch,
        weights,
        samples=count,
        dropped=len(samples) - count,
        tokens=task.tokens(batch),
        keys=tuple(keys),
        places=there if there is not None and len(there) == count else None,
    )


@contextlib.contextmanager
def read_in_a_process(wanted: bool = True) -> Iterator[None]:
    """Inside, `read` reads in a process of its own: files that a dataset opens when it is first read (HDF5, LMDB)
    must not be open yet where loader processes are forked later."""
    before = _elsewhere.set(wanted)
    try:
        yield
    finally:
        _elsewhere.reset(before)


class _Reader(Dataset[Any]):
    """`read` in a loader process."""

    def __init__(self, task: Task, data: Samples, seed: int) -> None:
        self._task, self._data, self._seed = task, data, seed

    def __getitem__(self, key: Key) -> Any:
        raise NotImplementedError("samples are read together, through __getitems__")

    def __getitems__(self, keys: list[Key]) -> Any:
        try:
            samples, drew = draws_random_numbers(lambda: read(self._task, self._data, keys, self._seed))
            return samples, drew, getattr(_watch, "undeclared", False)
        except GatrainError as error:
            return type(error)(str(error))
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            ids = names_of(self._data, [sample for _, sample in keys], getattr(_watch, "reading", None))
            return DataError(f"cannot read the samples {ids}: {type(error).__name__}: {error}")


def _read_elsewhere(task: Task, data: Samples, keys: Sequence[Key], seed: int) -> list[Any]:
    loader = DataLoader(
        _Reader(task, data, seed),
        batch_sampler=[list(keys)],  # type: ignore[arg-type]
        collate_fn=_unchanged,
        num_workers=1,
        worker_init_fn=offspring.follow_parent,
        generator=torch.Generator(),
    )
    (found,) = loader
    if isinstance(found, GatrainError):
        raise found
    samples, drew, undeclared = found
    if drew:
        _note_draw(undeclared)
    return samples  # type: ignore[no-any-return]


def _unchanged(found: Any) -> Any:
    return found


def draws_random_numbers(call: Callable[[], T]) -> tuple[T, bool]:
    """The result of ``call`` and whether it drew from ``random``, numpy or torch, also inside `read` or
    `collated`."""
    before, _watch.drew, was = getattr(_watch, "drew", None), False, getattr(_watch, "active", False)
    _watch.active = True
    try:
        result, drew = _compared(call)
        return result, drew or _watch.drew
    finally:
        _watch.active, _watch.drew = was, before


def split_batch(batch: Batch, sizes: Sequence[int], count: int) -> list[Batch] | None:
    """Cut a batch of ``count`` samples into pieces of ``sizes`` samples, or None where that cannot be done.

    Tensors are cut along their first dimension and lists of ``count`` items along their length; plain values are
    part of every piece. Padding stays as it is in the whole.
    """
    if sum(sizes) != count:
        raise ValueError(f"sizes {list(sizes)} do not add up to {count} samples")
    ends = [sum(sizes[: nth + 1]) for nth in range(len(sizes))]
    try:
        return [_cut(batch, end - size, end, count, top=True) for size, end in zip(sizes, ends, strict=True)]
    except _CannotCutError:
        return None


class _CannotCutError(Exception):
    pass


def _cut(part: Any, start: int, stop: int, count: int, top: bool = False) -> Any:
    if isinstance(part, Tensor):
        if part.is_nested or part.dim() == 0 or part.shape[0] != count:
            raise _CannotCutError
        return part[start:stop]
    if part is None or isinstance(part, str | bytes | int | float):
        return part
    if isinstance(part, list | tuple) and not hasattr(part, "_fields") and len(part) == count:
        is_columns = all(isinstance(x, Tensor) and x.dim() and x.shape[0] == count for x in part)
        if not is_columns:
            return part[start:stop]
        if not top:
            raise _CannotCutError  # as many tensors as each has rows: samples or columns
    found = parts_of(part)
    if found is None or isinstance(part, torch.nn.utils.rnn.PackedSequence):
        raise _CannotCutError
    parts, rebuild = found
    return rebuild([_cut(each, start, stop, count) for each in parts])


def _read_plain(data: Samples, keys: Sequence[Key]) -> list[Any]:
    ids = [sample for _, sample in keys]
    if hasattr(data, "__getitems__") and len(ids) != 1:
        _watch.reading = None
        try:
            found = list(data.__getitems__(ids))
            if len(found) != len(ids):
                raise DataError(
                    f"{type(data).__name__}.__getitems__ gives {len(found)} samples for {len(ids)} numbers "
                    f"({names_of(data, ids)}). Let it return one for each, in their order; None, which a collate "
                    "of yours leaves out, for one that is not there."
                )
            return found
        except BrokenSampleError as error:  # which of them is it?
            if not error.skip:
                raise
    return [_read_one(data, sample) for sample in ids]


def _read_one(data: Samples, sample: int) -> Any:
    _watch.reading = sample
    try:
        return data.__getitems__([sample])[0] if hasattr(data, "__getitems__") else data[sample]
    except BrokenSampleError as error:
        if not error.skip:
            raise
        return Skipped(str(error))


def own_containers(nested: Any) -> Any:
    """Copies of lists and dicts, however nested; whatever else they hold is the same."""
    if type(nested) is list:
        return [own_containers(part) for part in nested]
    if type(nested) is dict:
        return {key: own_containers(value) for key, value in nested.items()}
    if type(nested) is tuple:
        return tuple(own_containers(part) for part in nested)
    return copy.copy(nested) if isinstance(nested, MutableMapping) else nested


def _compared(call: Callable[[], T]) -> tuple[T, bool]:
    before = seeding.random_state()
    result = call()
    return result, not seeding.same_random_state(before, seeding.random_state())


def _watched(call: Callable[[], T]) -> T:
    """``call()``, noting for `draws_random_numbers` whether it draws."""
    if not getattr(_watch, "active", False):
        return call()
    result, drew = _compared(call)
    if drew:
        _note_draw()
    return result


def _note_draw(undeclared: bool = False) -> None:
    _watch.drew = True
    if undeclared:
        _watch.undeclared = True


def _samples_in(
    task: Task, samples: list[Any], batch: Batch, keys: Sequence[Key], seed: int, trusted: bool
) -> int:
    """How many of ``samples`` are in their batch: all, unless the collate function drops some.

    Raises:
        DataError: the loss would count another number of samples.
    """
    given = len(samples)
    readable = given - sum(sample is None for sample in samples)
    found = task.count_samples(batch)
    if found is None or found in (given, readable):
        return readable if found is None else found
    if found < given and _drops_samples(task, samples, keys, seed, trusted, found):
        return found
    if task.counts_samples:
        raise DataError(
            f"{given} samples were collated into a batch whose targets count as {found} samples. The loss is a "
            "mean over samples, so the step would be wrong by that factor. Let the first dimension of the "
            "targets (or a list's length) be the samples, give task.weight, a function of the targets that "
            "counts what the loss's mean divides by, or write a Task with a weight of its own."
        )
    return readable


def _drops_samples(
    task: Task, samples: list[Any], keys: Sequence[Key], seed: int, trusted: bool, found: int
) -> bool:
    """Whether the collate function leaves samples out: alone, each of them counts as one or as none."""
    total = 0
    for sample, key in zip(samples, keys, strict=True):
        try:
            alone = task.count_samples(collated(task, [sample], [key], seed, trusted=trusted))
        except Exception:  # nothing is left to collate
            alone = 0
        if alone not in (0, 1):
            return False
        total += alone
    return total == found


def _check_that_none_is_dropped(
    task: Task, data: Samples, keys: Sequence[Key], seed: int, trusted: bool, error: Exception
) -> None:
    """Of a micro-batch of unreadable samples alone nothing is left, if the collate function drops such samples.

    Raises:
        DataError: it does not; says what to write.
    """
    epoch, first = keys[0]
    for step in range(1, min(len(data), SEARCHED_FOR_ONE_THAT_READS)):
        key = (epoch, (first + step) % len(data))
        (other,) = read(task, data, [key], seed, trusted=trusted)
        if other is None:
            continue
        try:
            batch = collated(task, [None, other], [keys[0], key], seed, trusted=trusted)
        except Exception:
            break
        if task.count_samples(batch) in (None, 1):
            return
        break
    ids = names_of(data, [sample for _, sample in keys])
    raise DataError(
        f"the data gives None for the samples {ids}, and collate cannot make a batch of them: "
        f"{type(error).__name__}: {error}. Let the dataset raise an error or return another sample, or let "
        "collate leave None out: return default_collate([s for s in samples if s is not None])."
    ) from error
