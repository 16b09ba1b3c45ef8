"""Every error that splatc raises on purpose. Messages are one line: what is wrong, where, and what to do."""


class SplatcError(Exception):
    """Base class: catch this to catch everything that splatc raises on purpose."""


class InvalidInput(SplatcError, ValueError):
    """The caller's pattern, mask, tensors or options cannot be used as they are."""


class PatternSyntaxError(InvalidInput):
    """A text pattern does not parse; the message quotes the text with a caret."""


class Unsupported(SplatcError, NotImplementedError):
    """A valid request that this target does not implement; the message names the condition and a way round."""


class CompileError(SplatcError, RuntimeError):
    """A back end (LLVM, nvcc, NVRTC, the linker) refused a kernel, or the kernel spills registers."""


class CudaError(SplatcError, RuntimeError):
    """The CUDA driver refused to load or to start a kernel; the message has the driver's words."""


class CacheError(SplatcError, RuntimeError):
    """The kernel cache cannot be used safely (for instance, others may write to it)."""


class VerifyError(SplatcError, AssertionError):
    """A stage broke one of its own invariants: a bug in splatc, never the caller's fault. Please report it."""
