"""Data without a number for each sample: an IterableDataset, or anything else that gives its samples in order.

A stream has one position, (epoch, samples read of it), and is read forward only. Whoever trains reads all of it,
through a `StreamReader`, on every rank: so its windows are the same for any number of ranks. Whoever only looks at
data (lengths, trials, checks) gets its first samples, by number, from a `Stream`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import time
import types
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any

import numpy as np
import torch

from gatrain.errors import BrokenSampleError, ConfigError, DataError, GatrainError
from gatrain.train.seeding import kept_random_state, seed_everything

LOOKED_AT = 256
"""First samples of a stream that stand for all of it where data is only looked at."""
_PROBED = 3
"""Samples before and after the place at which `state_dict` is tried."""
ENDLESS = 2**40
"""Stands for the unknown number of windows of a stream."""


class BrokenInStream:
    """Stands for a sample that the stream itself wants left out (`gatrain.errors.BrokenSampleError`)."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Stream:
    """The first ``most`` samples of a stream, by number: a map-style dataset for whoever looks at it.

    ``stream.source`` is the stream itself. Its traits (``deterministic``, ``lengths``) are the stream's.

    Raises:
        ConfigError: it can be read only once.
    """

    def __init__(self, source: Any, name: str, most: int = LOOKED_AT) -> None:
        if isinstance(source, Iterator) or iter(source) is source:
            raise ConfigError(
                f"{name} is an iterator ({type(source).__name__}), which can be read only once. Give an object "
                "whose __iter__ starts anew each time, such as a torch.utils.data.IterableDataset."
            )
        self.source = source
        self.name = name
        self.most = most
        self._first: dict[int, list[Any]] = {}
        self._reader: StreamReader | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("source", "__getitems__", "fingerprint", "lengths"):
            raise AttributeError(name)
        return getattr(self.source, name)

    @property
    def deterministic(self) -> bool:
        """Whether reading draws no random number."""
        return bool(getattr(self.source, "deterministic", False))

    def __len__(self) -> int:
        """Samples that can be looked at: ``most``, or all of a stream that has fewer."""
        return len(self._looked_at(0))

    @property
    def is_whole(self) -> bool:
        """Whether those are all: the stream ends within them."""
        return len(self) < self.most

    def __getitem__(self, index: int) -> Any:
        return self._at(0, index, 0)

    def read(self, keys: Sequence[tuple[int, int]], seed: int) -> list[Any]:
        """The samples of (epoch, place in it), as they are read in training. Reads from the start where it must."""
        with kept_random_state():
            return [self._at(epoch, place, seed) for epoch, place in keys]

    def _at(self, epoch: int, place: int, seed: int) -> Any:
        if epoch == 0 and place < len(first := self._looked_at(seed)):
            return first[place]
        if epoch == 0 and place < self.most:
            raise IndexError(f"sample {place} of {len(first)}")
        reader = self._reader
        if reader is None or reader.seed != seed or (epoch, place) < (reader.epoch, reader.place):
            reader = self._reader = StreamReader(self, seed)
        reader.go_to({"epoch": epoch, "place": place})
        (sample,) = reader.take(1) or [None]
        return sample

    def _looked_at(self, seed: int) -> list[Any]:
        if self.deterministic:
            seed = 0
        if seed not in self._first:
            with kept_random_state():
                first = StreamReader(self, seed).take(self.most)
                again = StreamReader(self, seed).take(1)
            if first and not (again and same(first[0], again[0])):
                raise DataError(
                    f"{self.name} is a stream that begins with another sample when it is iterated again, so no "
                    "run could go on with it. Give its shuffle a seed, and let its __iter__ start anew each "
                    "time."
                )
            self._first[seed] = first
        return self._first[seed]


class StreamReader:
    """Reads a stream forward, epoch after epoch; random numbers of a sample follow from (seed, epoch, place).

    Args:
        stream: what is read.
        seed: the run's.
        saves: whether `position` is to hold the stream's own state. Then copies of the stream are read: its state
            is that of one iteration, and another one may begin meanwhile.
    """

    def __init__(self, stream: Stream, seed: int, *, saves: bool = False) -> None:
        self.seed = seed
        self.name = stream.name
        self.epoch = 0
        self.place = 0
        """Samples of the epoch that were read."""
        self.skipped_s = 0.0
        """Seconds that `go_to` spent on reading past samples."""
        self.skipped = 0
        self.by_state = False
        """Whether `go_to` went on from the stream's own state."""
        self._stream = stream
        self._seeds = not stream.deterministic
        self._iterator: Iterator[Any] | None = None
        self._source = stream.source
        self._last: Any = None
        self._before: dict[str, Any] = {}
        self._gives_state = saves and _state_is_exact(stream.source, seed)

    def take(self, count: int) -> list[Any]:
        """The next samples of this epoch: fewer where it ends, and then `next_epoch` follows.

        Raises:
            DataError: one cannot be read.
        """
        found: list[Any] = []
        while len(found) < count:
            try:
                found.append(self._next())
            except StopIteration:
                break
        return found

    def next_epoch(self) -> None:
        """Begin the stream anew.

        Raises:
            DataError: the epoch that ends had no sample.
        """
        if not self.place:
            raise DataError(
                f"{self.name} is a stream that gave no sample in epoch {self.epoch + 1}: it can be read only "
                "once, or is empty. Let its __iter__ start anew each time, or give a smaller train.steps."
            )
        self.epoch, self.place, self._iterator = self.epoch + 1, 0, None

    # --- positions

    def position(self) -> dict[str, Any]:
        """Where the next sample is, as `go_to` takes it: JSON.

        The stream's own state in it is of the position before, so that whoever goes on reads what lies between and
        sees, by the last sample, whether the stream has really gone on at the very next one.
        """
        before, self._before = self._before, self._own_state()
        return {"epoch": self.epoch, "place": self.place, "last": fingerprint(self._last), **before}

    def _own_state(self) -> dict[str, Any]:
        state = _state_of(self._source, self._iterator) if self._gives_state and self.place else None
        return {} if state is None else {"state": state, "state_epoch": self.epoch, "state_place": self.place}

    def go_to(self, position: dict[str, Any]) -> None:
        """Go on at a position: from the stream's own state before it, or else from the beginning.

        Raises:
            DataError: the stream ends before it, or holds something else there: it is another one.
        """
        began, wanted = time.monotonic(), (position["epoch"], position["place"])
        self.by_state = self._went_on_by_state(position, wanted)
        if not self.by_state:
            if hasattr(self._stream.source, "set_epoch") and self.epoch < wanted[0]:
                self.epoch, self.place, self._iterator = wanted[0], 0, None
            if not self._read_up_to(wanted):
                raise DataError(
                    f"{self.name} ended after {self.place} samples of epoch {wanted[0] + 1}, but the run had read "
                    f"{wanted[1]} of them: it is another stream than before."
                )
            if "last" in position and position["last"] != fingerprint(self._last):
                raise DataError(
                    f"sample {wanted[1] - 1} of epoch {wanted[0] + 1} of {self.name} is not the one that the run "
                    "had read there: it is another stream than before, or not one that begins anew in the same "
                    "order."
                )
        self._before = self._own_state()
        self.skipped_s = time.monotonic() - began

    def _went_on_by_state(self, position: dict[str, Any], wanted: tuple[int, int]) -> bool:
        if position.get("state") is None:
            return False
        try:
            self.epoch, self.place = position["state_epoch"], position["state_place"]
            self._open(self.epoch, position["state"])
            if self._read_up_to(wanted) and fingerprint(self._last) == position["last"]:
                return True
        except Exception:  # a state that this stream does not take; an error in its samples comes again below
            pass
        self.epoch, self.place, self.skipped, self._iterator, self._last = 0, 0, 0, None, None
        return False

    def _read_up_to(self, wanted: tuple[int, int]) -> bool:
        while (self.epoch, self.place) < wanted:
            try:
                self._next()
                self.skipped += 1
            except StopIteration:
                if self.epoch == wanted[0]:
                    return False
                self.next_epoch()
        return True

    # --- reading

    def _open(self, epoch: int, state: Any = None) -> None:
        copies = self._gives_state or state is not None
        self._source = copy.deepcopy(self._stream.source) if copies else self._stream.source
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(epoch)
        self._iterator = _opened(self._source, state)

    def _next(self) -> Any:
        if self._iterator is None:
            self._open(self.epoch)
        assert self._iterator is not None
        if self._seeds:
            seed_everything(self.seed, self.epoch, self.place)
        where = f"sample {self.place} of epoch {self.epoch + 1} of {self.name}"
        try:
            sample = next(self._iterator)
        except StopIteration:
            raise
        except BrokenSampleError as error:
            if not error.skip:
                raise
            if inspect.isgenerator(self._iterator):
                raise DataError(
                    f"{where}: {error}. It is to be skipped, but a generator ends with its first error: leave "
                    "the sample out inside it, or write a class with __next__."
                ) from error
            sample = BrokenInStream(str(error))
        except GatrainError:
            raise
        except Exception as error:
            raise DataError(f"cannot read {where}: {type(error).__name__}: {error}") from error
        self.place += 1
        self._last = sample
        return sample


def _opened(source: Any, state: Any = None) -> Iterator[Any]:
    if state is not None and hasattr(source, "load_state_dict"):
        source.load_state_dict(copy.deepcopy(state))
        began: Iterator[Any] = iter(source)
        return began
    iterator: Iterator[Any] = iter(source)
    if state is not None:
        iterator.load_state_dict(copy.deepcopy(state))  # type: ignore[attr-defined]
    return iterator


def _state_of(source: Any, iterator: Any) -> Any:
    """The stream's own position as JSON; None if it has none that JSON holds."""
    owner = source if hasattr(source, "state_dict") else iterator
    try:
        state = owner.state_dict()
        return state if json.loads(json.dumps(state)) == state else None
    except Exception:
        return None


def _state_is_exact(source: Any, seed: int) -> bool:
    """Whether a copy that is given the stream's state goes on with the very next samples.

    It is tried, since many do not: Hugging Face's forget what lies in a shuffle buffer.
    """
    try:
        with kept_random_state():
            one, other = copy.deepcopy(source), copy.deepcopy(source)
            iterator = _opened(one)
            _some(iterator, seed, 0)
            if (state := _state_of(one, iterator)) is None:
                return False
            wanted = _some(iterator, seed, _PROBED)
            return same(wanted, _some(_opened(other, state), seed, _PROBED))
    except Exception:
        return False


def _some(iterator: Iterator[Any], seed: int, first: int) -> list[Any]:
    found = []
    for place in range(first, first + _PROBED):
        seed_everything(seed, 0, place)
        with contextlib.suppress(StopIteration):
            found.append(next(iterator))
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two samples hold the same, bit for bit."""
    return fingerprint(one) == fingerprint(other)


def fingerprint(sample: Any) -> int:
    """32 bits of what a sample holds, tensors and arrays with every byte, objects with all that they keep."""
    return _walked(sample, 0, 0)


_DEEP = 20
"""Objects may hold each other."""


def _walked(value: Any, code: int, depth: int) -> int:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        plain = (plain if plain.layout is torch.strided else plain.to_dense()).contiguous()
        code = zlib.crc32(f"{plain.dtype}{tuple(plain.shape)}".encode(), code)
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return zlib.crc32(data, code)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        code = zlib.crc32(f"{value.dtype}{value.shape}".encode(), code)
        return zlib.crc32(np.ascontiguousarray(value).tobytes(), code)
    if isinstance(value, Mapping):
        for key in value:
            code = _walked(
                value[key], zlib.crc32(str(key).encode("utf-8", "backslashreplace"), code), depth + 1
            )
        return code
    if isinstance(value, list | tuple | np.ndarray | deque):
        for each in value:
            code = _walked(each, code, depth + 1)
        return zlib.crc32(b"%d" % len(value), code)
    if isinstance(value, bytes | bytearray | memoryview):
        return zlib.crc32(value, code)
    if hasattr(value, "tobytes"):  # an image
        return zlib.crc32(value.tobytes(), code)
    if value is None or isinstance(value, str | int | float | bool | complex):
        return zlib.crc32(repr(value).encode("utf-8", "backslashreplace"), code)
    if isinstance(value, Set):
        return zlib.crc32(str(sorted(fingerprint(each) for each in value)).encode(), code)
    code = zlib.crc32(type(value).__qualname__.encode(), code)
    if depth >= _DEEP or isinstance(value, type | types.ModuleType | types.FunctionType):
        return code
    if (held := held_by(value)) is not None:
        return _walked(held, code, depth + 1)
    text = repr(value)  # a date, a path, a member of an Enum
    return code if " at 0x" in text else zlib.crc32(text.encode("utf-8", "backslashreplace"), code)


def held_by(value: Any) -> dict[str, Any] | None:
    """What an object keeps in attributes and slots, by name; None for one that keeps nothing so."""
    if isinstance(value, Enum):
        return None
    given = [cls.__dict__.get("__slots__", ()) for cls in type(value).__mro__]
    names = [name for each in given for name in ([each] if isinstance(each, str) else each)]
    if not hasattr(value, "__dict__") and not names:
        return None
    return {**getattr(value, "__dict__", {}), **{n: getattr(value, n) for n in names if hasattr(value, n)}}
