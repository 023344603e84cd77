"""Device whose tensors lie in host memory, as strict as a GPU and as MPS.

It is a backend of PyTorch's own (PrivateUse1), so its tensors are ordinary ones for modules,
autograd, optimisers and `torch.func`. Its kernels are those of the CPU, on the same memory.

* A kernel of tensors on two devices raises, except for host scalars, as on a GPU.
* A generator of the host cannot draw on the device, as on a GPU.
* float64 and complex128 raise, as on MPS.
* An operation that PyTorch's own list gives no MPS kernel raises, as on MPS.

What it does not show: the memory, the speed and the rounding of a GPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from accelerate.state import AcceleratorState
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pipeline.runtime import devices

NAME = "strict"
_KEY = "PrivateUse1"
_HOST, _DEVICE = 1, 12  # DLDeviceType kDLCPU and kDLExtDev
_WIDE = (torch.float64, torch.complex128)
_HOST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
#: operations that take indices from the host, also on a GPU
_HOST_INDICES = ("index", "index_put", "index_put_", "_index_put_impl_")
#: kernels that MPS has outside PyTorch's list, or that only a foreign backend is asked for
_ALSO_SUPPORTED = ("convolution_overrideable", "convolution_backward_overrideable")
#: operations that autocast computes in bfloat16
_HALVED = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d",
    "conv_transpose2d", "scaled_dot_product_attention",
)  # fmt: skip

#: operations that autocast computes in float32
_WIDENED = ("group_norm", "layer_norm", "mse_loss")


class DeviceError(RuntimeError):
    """What a GPU or MPS would refuse."""


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _relabelled(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    """The same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor)
    device = _pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    (ctypes.c_int32 * 2).from_address(device)[:] = [kind, 0]
    return torch._C._from_dlpack(capsule)


def _on_device(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _refuse_wide(dtype: torch.dtype, op: str) -> None:
    if dtype in _WIDE:
        raise DeviceError(f"{op}: MPS has no {dtype}")


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel():
        return _relabelled(tensor, _HOST)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _to_device(tensor: torch.Tensor, op: str) -> torch.Tensor:
    _refuse_wide(tensor.dtype, op)
    return _relabelled(tensor, _DEVICE)


# ------------------------------------------------------------------------- every operation


@dataclass(frozen=True)
class _Traits:
    """What the schema of an operation says.

    Attributes:
        name: without its namespace.
        supported: whether MPS has a kernel.
        written: positions of the arguments that it changes.
        outs: keywords of the arguments that it fills.
        views: whether a result may share the memory of an argument.
        host_indices: whether its later arguments may be indices on the host.
    """

    name: str
    supported: bool
    written: frozenset[int]
    outs: tuple[str, ...]
    views: bool
    host_indices: bool


@functools.cache
def _traits(op: Any) -> _Traits:
    name, schema = op.name().removeprefix("aten::"), op._schema
    aliases = [argument.alias_info for argument in schema.arguments]
    return _Traits(
        name,
        name in _mps_kernels(),
        frozenset(i for i, alias in enumerate(aliases) if alias and alias.is_write),
        tuple(argument.name for argument in schema.arguments if argument.is_out),
        any(r.alias_info and not r.alias_info.is_write for r in schema.returns),
        name.split(".")[0] in _HOST_INDICES,
    )


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(function, part) for part in value)
    return function(value)


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Check the arguments as a GPU does and compute on the host."""
    traits = _traits(op)
    _refuse_foreign(traits, args, kwargs)
    if not traits.supported:
        raise DeviceError(f"{traits.name}: MPS has no such kernel")
    return _on_host(op, args, kwargs)


def _refuse_foreign(traits: _Traits, args: Any, kwargs: Any) -> None:
    def check(value: Any, written: bool, index: bool) -> None:
        if isinstance(value, torch.Generator) and value.device.type != NAME:
            raise DeviceError(f"{traits.name}: the generator is on {value.device}")
        if not isinstance(value, torch.Tensor) or _on_device(value):
            return
        index = index and not value.is_floating_point()
        if written or (value.dim() and not index):
            raise DeviceError(
                f"{traits.name}: one tensor is on {value.device}, another on {NAME}; expected "
                "one device"
            )

    for position, argument in enumerate(args):
        written, index = position in traits.written, position > 0 and traits.host_indices
        _mapped(lambda value, w=written, i=index: check(value, w, i), argument)
    for name, value in kwargs.items():
        _mapped(lambda value, w=name in traits.outs: check(value, w, False), value)


def _on_host(op: Any, args: Any, kwargs: Any) -> Any:
    traits = _traits(op)
    pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    outs = {name: kwargs[name] for name in traits.outs}
    fresh = {name: torch.empty(0, dtype=value.dtype) for name, value in outs.items()}

    def lower(value: Any) -> Any:
        if _on_device(value):
            host = _to_host(value)
            pairs[id(host)] = host, value
            return host
        return torch.device("cpu") if isinstance(value, torch.device) else value

    lowered = {name: _mapped(lower, v) for name, v in kwargs.items() if name not in outs}
    results = op(*(_mapped(lower, value) for value in args), **lowered, **fresh)
    for name, host in fresh.items():
        pairs[id(host)] = host, outs[name]
        if host.shape == outs[name].shape:
            _to_host(outs[name]).copy_(host)
        else:  # it was resized
            outs[name].data = _to_device(host, traits.name)

    def lift(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in pairs:
            return pairs[id(value)][1]
        if traits.views and value.numel():
            for host, tensor in pairs.values():
                if value.untyped_storage().data_ptr() == host.untyped_storage().data_ptr():
                    return _view(tensor, value)
        return _to_device(value, traits.name)

    return _mapped(lift, results)


def _view(base: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """The view of a device tensor that a host tensor is of the same memory."""
    if host.dtype != base.dtype:
        return _relabelled(host, _DEVICE)
    moved = (host.data_ptr() - base.data_ptr()) // base.element_size()
    return _as_strided(base, host.shape, host.stride(), base.storage_offset() + moved)


def _as_strided(
    tensor: torch.Tensor, size: Any, stride: Any, storage_offset: int | None = None
) -> torch.Tensor:
    op = torch.ops.aten.as_strided.default
    return op.redispatch(_HOST_KEYS, tensor, size, stride, storage_offset)


@functools.cache
def _mps_kernels() -> frozenset[str]:
    """Names of operations with a kernel on MPS, in PyTorch's list of native functions."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(path.read_text(), yaml.CSafeLoader)
    kernels = {entry["func"].split("(")[0]: entry for entry in entries}

    def supported(entry: dict[str, Any]) -> bool:
        if "structured_delegate" in entry:
            return supported(kernels[entry["structured_delegate"]])
        keys = ", ".join(entry.get("dispatch", {})).split(", ")
        return "MPS" in keys

    return frozenset(n for n, entry in kernels.items() if supported(entry)) | {*_ALSO_SUPPORTED}


# ----------------------------------------------------------------------- single operations


def _copy_from(source: torch.Tensor, target: torch.Tensor, _: bool = False) -> torch.Tensor:
    """Copy between devices, or on this one; the host converts what it sends, as for MPS."""
    _refuse_wide(target.dtype, "copy to or from the device")
    one, other = (_to_host(x) if _on_device(x) else x for x in (source, target))
    other.copy_(one)
    return target


def _empty(size: Any, dtype: Any = None, *_: Any, **options: Any) -> torch.Tensor:
    memory_format = options.get("memory_format") or torch.contiguous_format
    return _to_device(torch.empty(size, dtype=dtype, memory_format=memory_format), "empty")


def _empty_strided(size: Any, stride: Any, dtype: Any = None, *_: Any, **__: Any) -> torch.Tensor:
    return _to_device(torch.empty_strided(size, stride, dtype=dtype), "empty_strided")


def _zeros(size: Any, dtype: Any = None, *_: Any, **__: Any) -> torch.Tensor:
    return _to_device(torch.zeros(size, dtype=dtype), "zeros")


def _item(tensor: torch.Tensor) -> Any:
    return _to_host(tensor).item()


def _convolution(*args: Any) -> Any:
    _refuse_foreign(_traits(torch.ops.aten.convolution.default), args, {})
    return _on_host(torch.ops.aten.convolution.default, args, {})


def _convolution_backward(gradient: Any, x: Any, weight: Any, *args: Any) -> Any:
    transposed, groups, mask = args[3], args[5], args[6]
    biases = [weight.shape[1] * groups if transposed else weight.shape[0]] if mask[2] else None
    op = torch.ops.aten.convolution_backward.default
    return _on_host(op, (gradient, x, weight, biases, *args), {})


def _autocast(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The operation under autocast: its floating-point tensors get a dtype."""
    outside = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        def cast(value: Any) -> Any:
            return value.to(dtype) if _on_device(value) and value.is_floating_point() else value

        with torch._C._ExcludeDispatchKeyGuard(outside):
            named = {key: _mapped(cast, value) for key, value in kwargs.items()}
            return getattr(torch.ops.aten, name)(*_mapped(cast, args), **named)

    return run


def _copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    memo[id(tensor)] = copy = tensor.detach().clone()
    return copy


# ----------------------------------------------------------------------------- registration


class _Module:
    """What PyTorch asks `torch.strict` for."""

    is_initialized = is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)  # it draws from the host's generator
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    _lazy_init = synchronize = staticmethod(lambda *_: None)


_libraries: list[torch.library.Library] = []


def register() -> torch.device:
    """Register the device in this process, once; return it.

    The process must not have differentiated yet. tests/conftest.py calls this for all tests.
    """
    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        everything = torch.library.Library("_", "IMPL")
        everything.fallback(_kernel, _KEY)
        everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        aten = torch.library.Library("aten", "IMPL")
        for name, kernel in {
            "_copy_from": _copy_from, "empty.memory_format": _empty, "as_strided": _as_strided,
            "empty_strided": _empty_strided, "_efficientzerotensor": _zeros,
            "_local_scalar_dense": _item, "convolution_overrideable": _convolution,
            "convolution_backward_overrideable": _convolution_backward,
        }.items():  # fmt: skip
            aten.impl(name, kernel, _KEY)
        for dtype, names in ((torch.bfloat16, _HALVED), (torch.float32, _WIDENED)):
            for name in names:
                aten.impl(name, _autocast(name, dtype), "AutocastPrivateUse1")
        _libraries.extend([everything, aten])
        original = torch.Tensor.__deepcopy__
        torch.Tensor.__deepcopy__ = lambda self, memo: (  # the original clones storages
            _copied(self, memo) if type(self) is torch.Tensor and _on_device(self)
            else original(self, memo)
        )  # fmt: skip
    return torch.device(NAME, 0)


@contextmanager
def lent(name: str) -> Iterator[str]:
    """`--device NAME` for the commands of this process; the strict device exists only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
        if name == NAME:
            known = devices.require_device
            there = {NAME: register(), str(register()): register()}
            for place in ("jkoflow.model", "pipeline.runtime.devices"):
                target = f"{place}.require_device"
                patch.setattr(target, lambda name: there.get(name) or known(name))
            patch.setenv("ACCELERATE_TORCH_DEVICE", name)  # accelerate knows no such device
        AcceleratorState._reset_state(True)
        yield name
        AcceleratorState._reset_state(True)
