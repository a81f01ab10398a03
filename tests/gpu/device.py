"""A device that is not the CPU, for machines without a GPU: `start()` registers it with torch under the name "rehearsal".

Its memory is the CPU's under another name. torch hands every operation on it to `run`, which computes it on the CPU: real
numbers, forward and backward, through torch's own checks. What CUDA refuses raises (`Mixed`, or torch's own error): tensors
of the CPU and of the device in one operation, but for scalars where CUDA takes them. Inside `no_waits()` so does what makes
the host wait for a CUDA device (`Wait`): numbers read back, results whose shape depends on values, copies of memory that
is not pinned.

What it cannot show: kernels and their rounding, bf16, streams, memory, torch.compile, CUDA graphs, speed; and code for
`device.type == "cuda"` alone does not run.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "rehearsal"
EXTERNAL, CPU = 12, 1  # DLPack's numbers: torch takes the first for a registered device
aten = torch.ops.aten

# On CUDA they read from the device, for the shape of the result or to find an error.
WAITS = {"_local_scalar_dense", "bincount", "equal", "histc", "masked_select", "nonzero", "repeat_interleave"}
WAITS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive"}
WAITS |= {"_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Take scalar tensors of the CPU, as elementwise operations do.
SCALARS = {*INDEXING, "fill_", "masked_fill", "masked_fill_", "index_fill", "index_fill_", "_fused_adam_", "_fused_adamw_"}


class Mixed(RuntimeError):
    """The CPU and the device in one operation."""


class Wait(RuntimeError):
    """The host waits for the device."""


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_watched = False
_libraries = []


def start() -> torch.device:
    """For the rest of the process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    everything, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(run, "PrivateUse1")
    own.impl("_copy_from", _copy, "PrivateUse1")
    own.impl("set_.source_Storage", _set, "PrivateUse1")
    own.impl("convolution_overrideable", functools.partial(run, aten.convolution.default), "PrivateUse1")
    own.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    _libraries.extend((everything, own))  # they end with their objects
    torch.empty = _pinned_where_asked(torch.empty)
    torch.Tensor.pin_memory = lambda tensor: _pinned(tensor.clone())
    torch.Tensor.__deepcopy__ = _deepcopy_of(torch.Tensor.__deepcopy__)
    return torch.device(NAME, 0)


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    global _watched
    before, _watched = _watched, True
    try:
        yield
    finally:
        _watched = before


def _wait(what: str) -> None:
    if _watched:
        raise Wait(what)


_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _on(kind: int, tensor: Tensor) -> Tensor:
    """The same memory as a tensor of the device (EXTERNAL) or of the CPU."""
    capsule = torch._C._to_dlpack(tensor)
    device = ctypes.cast(_pointer_in(capsule, b"dltensor"), ctypes.POINTER(ctypes.c_int32))
    device[2], device[3] = kind, 0  # behind the pointer to the data
    return torch._C._from_dlpack(capsule)


def _of_each(function: Callable, value: object) -> object:
    return type(value)([_of_each(function, part) for part in value]) if type(value) in (list, tuple) else function(value)


def run(op: torch._ops.OpOverload, *args: object, **kwargs: object) -> object:
    """An operation with tensors of the device, or that is to make one there."""
    pairs: list[tuple[Tensor, Tensor]] = []
    others: list[object] = []

    def enter(value: object) -> object:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, Tensor) or value.device.type != NAME:
            others.append(value)
            return value
        # What is empty may be a result that is to grow, which borrowed memory cannot.
        inner = _on(CPU, value) if value.numel() else torch.empty(value.shape, dtype=value.dtype)
        pairs.append((value, inner))
        return inner

    def leave(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        for outer, inner in pairs:
            if inner is value:
                return outer
        # In inference mode, a view of an ordinary tensor is an ordinary one.
        with torch.inference_mode(pairs[0][0].is_inference()) if op.is_view else contextlib.nullcontext():
            return _on(EXTERNAL, value)

    inner_args, inner_kwargs = _of_each(enter, args), {name: _of_each(enter, value) for name, value in kwargs.items()}
    _check(op, args, kwargs, [outer for outer, _ in pairs], others)
    # What was a number on its way to a tensor is a number again: another overload takes it.
    call = op.overloadpacket if any(isinstance(a, int | float) for a in map(args.__getitem__, _tensors_of(op))) else op
    result = call(*inner_args, **inner_kwargs)
    for outer, inner in pairs:
        if outer.shape != inner.shape:
            outer.data = _on(EXTERNAL, inner)
    return _of_each(leave, result)


def _check(op: torch._ops.OpOverload, args: tuple, kwargs: dict, ours: list[Tensor], others: list[object]) -> None:
    """Raise Mixed or Wait where CUDA would fail or wait."""
    name, on_cpu = op._schema.name.removeprefix("aten::"), [value for value in others if isinstance(value, Tensor)]
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        on_cpu = [tensor for tensor in on_cpu if not any(tensor is index for index in indices)]
        if any(index.device.type == "cpu" for index in indices):
            _wait(f"{name}: indices on the CPU")
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _wait(f"{name}: a mask for an index")
    if wrong := [tensor for tensor in on_cpu if tensor.dim() or not _takes_scalars(op, name)]:
        raise Mixed(f"{name}: {tuple(wrong[0].shape)} on the CPU, {[tuple(tensor.shape) for tensor in ours]} on the device")
    if any(isinstance(value, torch.Generator) for value in others):
        raise Mixed(f"{name}: a generator of the CPU")
    # aten/src/ATen/native/TensorCompare.cpp: so many are sorted, by `unique`.
    two = name == "isin" and isinstance(args[0], Tensor) and isinstance(args[1], Tensor)
    sorts = two and args[1].numel() >= 10 * args[0].numel() ** 0.145
    if (name in WAITS and kwargs.get("output_size") is None) or sorts:
        _wait(name)


@functools.cache
def _takes_scalars(op: torch._ops.OpOverload, name: str) -> bool:
    overloads = (getattr(op.overloadpacket, overload) for overload in op.overloadpacket.overloads())
    return name in SCALARS or any(torch.Tag.pointwise in overload.tags for overload in overloads)


@functools.cache
def _tensors_of(op: torch._ops.OpOverload) -> list[int]:
    """Which positional arguments are one tensor."""
    return [i for i, a in enumerate(op._schema.arguments) if a.type.kind() == "TensorType" and not a.kwarg_only]


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if source.device.type == "cpu" and not (non_blocking and hasattr(source, "pinned")):
        _wait(f"{tuple(source.shape)} to the device, not from pinned memory or not non_blocking")
    if target.device.type == "cpu":
        _wait(f"{tuple(source.shape)} from the device")
    inner = [_on(CPU, tensor) if tensor.device.type == NAME else tensor for tensor in (source, target)]
    inner[1].copy_(inner[0])
    return target


def _set(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """So torch.save reads bytes."""
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    tensor.data = _on(EXTERNAL, torch.frombuffer(memory, dtype=torch.uint8))
    return tensor


def _convolution_backward(gradient: Tensor, images: Tensor, weight: Tensor, *how: object) -> tuple[Tensor, ...]:
    return run(aten.convolution_backward.default, gradient, images, weight, [len(weight)], *how)


def _pinned(tensor: Tensor) -> Tensor:
    tensor.pinned = True
    return tensor


def _pinned_where_asked(empty: Callable) -> Callable:
    return lambda *size, pin_memory=False, **how: _pinned(empty(*size, **how)) if pin_memory else empty(*size, **how)


def _deepcopy_of(original: Callable) -> Callable:
    def deepcopy(tensor: Tensor, memo: dict) -> Tensor:
        if tensor.device.type != NAME:
            return original(tensor, memo)
        return memo.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))

    return deepcopy
