"""What the system says about a disk, in words that help: each cause has another way out of it."""

from __future__ import annotations

import errno
import os
import re

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing there is not permitted",
    errno.EPERM: "writing there is not permitted",
    errno.EIO: "the disk, or the connection to it, fails (input/output error)",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EFBIG: "the file would be larger than allowed (ulimit -f, or what the file system can hold)",
    errno.ESTALE: "the network file system has lost the file (stale handle)",
    errno.ENOENT: "the folder is gone",
    errno.ENOTDIR: "a file stands where a folder belongs",
    errno.EEXIST: "something else stands in its place",
    errno.ELOOP: "a link stands in the way",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENODEV: "the device is gone",
}
_REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Delete something of yours, or ask for a larger quota",
    errno.EROFS: "Make it writable again (a disk with errors is mounted read-only: see dmesg)",
    errno.EACCES: "Make the folder writable for you",
    errno.EPERM: "Make the folder writable for you",
    errno.EIO: "Look at dmesg and at the disk",
    errno.EFBIG: "Raise the limit (ulimit -f unlimited)",
    errno.EMFILE: "Raise the limit (ulimit -n 4096)",
}
FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE,
    errno.EFBIG, errno.ENODEV,
)  # fmt: skip
"""Causes that lie with the machine, never with the program."""
PASSING = (*FAULTS, errno.ENOENT, errno.ETIMEDOUT, errno.EAGAIN)
"""Causes that may be gone at the next try."""


def known(error: BaseException) -> OSError:
    """The error with its number: libraries written in Rust hand on the system's words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None:
        return error if isinstance(error, OSError) else OSError(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])))


def reason(error: BaseException) -> str:
    """Why something could not be written, in a clause such as ``the disk is full``."""
    cause = known(error)
    if cause.errno in _REASONS:
        return _REASONS[cause.errno]
    return cause.strerror or str(cause) or type(cause).__name__


def remedy(error: BaseException) -> str:
    """What to do about it, without a full stop, to be followed by what to type then."""
    return _REMEDIES.get(known(error).errno or 0, "Mend that")
