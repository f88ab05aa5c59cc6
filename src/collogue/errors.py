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
    """Base of all errors. ``hint`` is one line: what to do about it.

    Examples:
        >>> try:
        ...     comm.all_reduce(partial[0])
        ... except collogue.CollogueError as error:
        ...     print(error.hint)
        flatten leading dimensions: x.view(-1, H)
    """

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
    """The arguments of a call cannot be right. Nothing was launched; the communicator still works.

    Examples:
        >>> try:
        ...     comm.all_reduce(partial.double())
        ... except ValueError as error:
        ...     print(type(error).__name__)
        DTypeError
    """


class ShapeError(ArgumentError):
    """A tensor has another shape than the call needs.

    Examples:
        >>> comm.all_reduce(partial[0])
        Traceback (most recent call last):
            ...
        collogue.errors.ShapeError: partial must be a tensor of shape [T, H], got [64]
        hint: flatten leading dimensions: x.view(-1, H)
    """


class DTypeError(ArgumentError):
    """A tensor has another dtype than the call needs.

    Examples:
        >>> comm.all_reduce(partial.double())
        Traceback (most recent call last):
            ...
        collogue.errors.DTypeError: partial has dtype torch.float64; the communicator was made for torch.bfloat16
        hint: make one communicator per dtype, or convert the tensor
    """


class DeviceError(ArgumentError):
    """A tensor lies on another device than the communicator.

    Examples:
        >>> comm.all_reduce(partial.to("meta"))
        Traceback (most recent call last):
            ...
        collogue.errors.DeviceError: partial is on meta, the communicator on cpu
        hint: move it: partial.to('cpu')
    """


class LayoutError(ArgumentError):
    """A tensor is not row-contiguous or not aligned to 16 bytes.

    Examples:
        >>> comm.all_reduce(partial[:, ::2])
        Traceback (most recent call last):
            ...
        collogue.errors.LayoutError: partial has strides (64, 2), not row-contiguous
        hint: pass partial.contiguous()
    """


class OverlapError(ArgumentError):
    """Two tensors share memory that must not.

    Examples:
        >>> comm.all_reduce(partial, residual=residual, out=collogue.Output(residual=partial))
        Traceback (most recent call last):
            ...
        collogue.errors.OverlapError: out.residual shares memory with partial
        hint: only the residual may be updated in place; give the others memory of their own
    """


class ScaleError(ArgumentError):
    """A scale is of the wrong kind, or not a positive finite number.

    Examples:
        >>> collogue.FP8Static(scale=0.0)
        Traceback (most recent call last):
            ...
        collogue.errors.ScaleError: FP8Static.scale must be positive and finite, above 2**-128 and below 2**128, got 0.0
        hint: see help(collogue.FP8Static)
    """


class FormatError(ArgumentError):
    """A quantization format or option that does not exist, or that this hidden size does not allow.

    Examples:
        >>> collogue.MXFP8("nearest")
        Traceback (most recent call last):
            ...
        collogue.errors.FormatError: MXFP8.rounding is 'nearest'
        hint: choose one of 'floor', 'ceil'
    """


class CapacityError(ArgumentError):
    """The call is larger than the communicator was made for.

    Examples:
        >>> comm.all_reduce(torch.zeros(17, 64).bfloat16())
        Traceback (most recent call last):
            ...
        collogue.errors.CapacityError: partial has shape [17, 64]; the communicator was made for at most 16 tokens of hidden size 64
        hint: ask comm.fits(tokens) first, or make the communicator with a larger max_tokens or hidden_size
    """


class IndexRangeError(ArgumentError):
    """An index names a row that there is not. Looked for where ``COLLOGUE_DEBUG`` is set; else such slots contribute nothing.

    Examples:
        >>> try:
        ...     out = comm.all_reduce(partial)  # an ExpertCombine, COLLOGUE_DEBUG=1
        ... except collogue.errors.IndexRangeError as error:
        ...     print(error)
    """


class GradError(ArgumentError):
    """A tensor requires grad while grad mode is on; Collogue is for inference.

    Examples:
        >>> comm.all_reduce(partial.clone().requires_grad_())
        Traceback (most recent call last):
            ...
        collogue.errors.GradError: partial requires grad
        hint: call under torch.inference_mode() or torch.no_grad()
    """


class GroupError(ArgumentError):
    """The process group cannot carry a communicator.

    Examples:
        >>> collogue.Communicator(None, max_tokens=16, hidden_size=64)
        Traceback (most recent call last):
            ...
        collogue.errors.GroupError: group is required: there is no default to WORLD
        hint: pass the tensor-parallel group, e.g. dist.new_group(ranks) or dist.group.WORLD
    """


class UnsupportedError(ArgumentError, NotImplementedError):
    """A part of another library's interface that Collogue does not serve.

    Examples:
        >>> collogue.flashinfer.create_allreduce_fusion_workspace("auto", 1, 0, 16, 64, top_k=8)
        Traceback (most recent call last):
            ...
        collogue.errors.UnsupportedError: top_k: only backend='mnnvl-cutedsl' takes them
        hint: pass them to allreduce_fusion, as with the other backends
    """


class ClosedError(CollogueError):
    """The communicator was closed.

    Examples:
        >>> closed = collogue.Communicator(group, max_tokens=16, hidden_size=64)
        >>> closed.close()
        >>> closed.all_reduce(partial)
        Traceback (most recent call last):
            ...
        collogue.errors.ClosedError: the communicator is closed
        hint: make a new collogue.Communicator
    """


class NotPrepared(CollogueError):
    """A kernel that is not loaded was needed while a CUDA graph was being captured.

    Examples:
        >>> comm.prepare(4)  # before `with torch.cuda.graph(..)`, for every shape that it captures
    """


class CaptureError(CollogueError):
    """Something that synchronizes with the other ranks on the host was called while a CUDA graph was being captured.

    Examples:
        >>> comm.prepare(4)  # before the capture, not in it
    """


class PlatformError(CollogueError):
    """This machine, or this set of ranks, cannot do what was asked.

    Examples:
        >>> collogue.Communicator(group, max_tokens=16, hidden_size=64, transport="peer")
        Traceback (most recent call last):
            ...
        collogue.errors.PlatformError: ranks on the CPU have no memory that others reach
        hint: leave transport out, or give transport="host"
    """


class CompileError(CollogueError):
    """NVRTC failed to compile a kernel.

    Examples:
        >>> try:
        ...     comm.prepare(4)
        ... except collogue.errors.CompileError as error:
        ...     print(error)  # with NVRTC's own log
    """


class CollectiveError(CollogueError):
    """A collective failed on this rank. ``comm.reset()`` makes the communicator usable again.

    Examples:
        >>> try:
        ...     out = comm.all_reduce(partial)
        ... except collogue.CollectiveError:
        ...     comm.reset()  # on every rank; the call may then be made again
    """


class CollectiveTimeout(CollectiveError):
    """A rank waited longer than the communicator's timeout for a peer.

    Examples:
        >>> try:
        ...     out = comm.all_reduce(partial)
        ... except collogue.CollectiveTimeout as error:
        ...     print(error)  # names the rank that was late
    """


class MismatchedCall(CollectiveError):
    """Ranks called the same collective with different arguments.

    Examples:
        >>> try:
        ...     comm.check()  # also looks at earlier calls
        ... except collogue.MismatchedCall as error:
        ...     print(error)  # what each rank called
    """


class CorruptedWorkspace(CollectiveError):
    """Something wrote into a communicator's control words.

    Examples:
        >>> try:
        ...     comm.check()
        ... except collogue.errors.CorruptedWorkspace:
        ...     comm.reset()
    """


class ConcurrentUseError(CollogueError):
    """Two threads used one communicator at once.

    Examples:
        >>> comms = [collogue.Communicator(group, max_tokens=16, hidden_size=64) for thread in range(2)]  # one for each
    """
