"""Everything that Collogue raises, one class per mistake.

CollogueError
├── ArgumentError (ValueError)      a call that cannot be right; nothing was launched
│   ├── ShapeError                  sizes that do not fit together
│   ├── DTypeError                  a dtype the communicator or the format does not take
│   ├── DeviceError                 a tensor on another device than the communicator
│   ├── LayoutError                 not row-contiguous, or not aligned to 16 bytes
│   ├── OverlapError                an output that shares memory with something it may not
│   ├── ScaleError                  a scale of the wrong kind, or not positive and finite
│   ├── FormatError                 a format this hidden size or option set does not have
│   ├── CapacityError               more tokens than the communicator was made for
│   ├── IndexRangeError             an index that names no row, under COLLOGUE_DEBUG
│   ├── GradError                   a tensor that requires grad, in grad mode
│   ├── GroupError                  a group that cannot be used (rank not in it, too large, not given)
│   └── UnsupportedError            (NotImplementedError) a part of another library's interface that Collogue does not serve
├── ClosedError                     the communicator was closed
├── NotPrepared                     a kernel was needed under graph capture before it was loaded
├── CaptureError                    something that a CUDA graph cannot hold was called under graph capture
├── PlatformError                   this machine cannot do it (no peer access, several hosts, no symmetric memory)
├── CompileError                    NVRTC failed to compile a kernel
├── ConcurrentUseError              two threads used one communicator at once
└── CollectiveError                 a collective failed; ``comm.reset()`` makes the communicator usable again
    ├── CollectiveTimeout           a rank waited longer than the communicator's timeout
    ├── MismatchedCall              ranks called with different arguments
    └── CorruptedWorkspace          something wrote over a communicator's control words

Every error carries a ``hint``: one line that says what to do, shown as the last line of the message.
"""

from __future__ import annotations


class CollogueError(Exception):
    """Base of all errors. ``hint`` is one line: what to do about it."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(f"{message}\nhint: {hint}")
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        """For pickle and copy: the same error with its hint and everything else that it carries, without calling ``__init__``."""
        return _again, (type(self), self.args), vars(self)


def _again(kind: type[CollogueError], args: tuple[object, ...]) -> CollogueError:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class ArgumentError(CollogueError, ValueError):
    """The arguments of a call cannot be right. Nothing was launched; the communicator still works."""


class ShapeError(ArgumentError):
    """A tensor has another shape than the call needs."""


class DTypeError(ArgumentError):
    """A tensor has another dtype than the call needs."""


class DeviceError(ArgumentError):
    """A tensor lies on another device than the communicator."""


class LayoutError(ArgumentError):
    """A tensor is not row-contiguous or not aligned to 16 bytes."""


class OverlapError(ArgumentError):
    """Two tensors share memory that must not."""


class ScaleError(ArgumentError):
    """A scale is of the wrong kind, or not a positive finite number."""


class FormatError(ArgumentError):
    """A quantization format or option that does not exist, or that this hidden size does not allow."""


class CapacityError(ArgumentError):
    """The call is larger than the communicator was made for."""


class IndexRangeError(ArgumentError):
    """An index names a row that there is not. Looked for where ``COLLOGUE_DEBUG`` is set; else such slots contribute nothing."""


class GradError(ArgumentError):
    """A tensor requires grad while grad mode is on; Collogue is for inference."""


class GroupError(ArgumentError):
    """The process group cannot carry a communicator."""


class UnsupportedError(ArgumentError, NotImplementedError):
    """A part of another library's interface that Collogue does not serve."""


class ClosedError(CollogueError):
    """The communicator was closed."""


class NotPrepared(CollogueError):
    """A kernel that is not loaded was needed while a CUDA graph was being captured."""


class CaptureError(CollogueError):
    """Something that synchronizes with the other ranks on the host was called while a CUDA graph was being captured."""


class PlatformError(CollogueError):
    """This machine, or this set of ranks, cannot do what was asked."""


class CompileError(CollogueError):
    """NVRTC failed to compile a kernel."""


class CollectiveError(CollogueError):
    """A collective failed on this rank. ``comm.reset()`` makes the communicator usable again."""


class CollectiveTimeout(CollectiveError):
    """A rank waited longer than the communicator's timeout for a peer."""


class MismatchedCall(CollectiveError):
    """Ranks called the same collective with different arguments."""


class CorruptedWorkspace(CollectiveError):
    """Something wrote into a communicator's control words."""


class ConcurrentUseError(CollogueError):
    """Two threads used one communicator at once."""
