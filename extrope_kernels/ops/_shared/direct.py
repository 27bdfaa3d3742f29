"""Calls of an op past PyTorch's dispatcher, which takes longer than the work on one token.

Where the work leaves nothing of the dispatcher in a processor's caches, it takes 50 to 65 us, an
eighth of the time of 2,048 keys and values on their way into a cache.

csrc/cpu/runtime/direct.h has the other side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from torch import Tensor

from ... import _ext
from .autograd import in_forward_mode

try:
    from torch._C import (
        _are_functorch_transforms_active,
        _is_tracing,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._autograd import _profiler_enabled
except ImportError:  # PyTorch promises none of them, and without them ops are called as ever
    _KNOWS_WHO_LOOKS_ON = False
else:
    _KNOWS_WHO_LOOKS_ON = True

# A result of so many bytes lies in kept pages, which the op makes: csrc/cpu/runtime/kept_pages.h.
LARGE = 4 * 2**20
_NAMES = ("rope", "rope_norm", "rope_append")
_METH_FASTCALL = 0x80
Direct = Callable[..., "bool | None"]
_functions: dict[str, Direct] = {}
_methods: list[_Method] = []  # which Python reads for as long as there are functions


class _Python(ctypes.Structure):
    """How the library reads Python's objects."""

    _fields_ = [
        ("tensors", ctypes.c_void_p),
        ("none", ctypes.py_object),
        ("done", ctypes.py_object),
        ("tuple_size", ctypes.c_void_p),
        ("tuple_item", ctypes.c_void_p),
        ("as_double", ctypes.c_void_p),
        ("increase_refcount", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("clear_error", ctypes.c_void_p),
        ("release", ctypes.c_void_p),
        ("take_back", ctypes.c_void_p),
    ]


class _Method(ctypes.Structure):
    """Python's PyMethodDef."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


def find_direct(name: str, first: Tensor, like: Tensor | None) -> Direct | None:
    """The function for a call with this first tensor; None: call the op.

    like: a result has to be made about as large as this one.

    Modes, transforms, tracers, profilers and tensors of other classes learn of a call from the
    dispatcher alone, and it alone negates those of which only a bit says that they are negated. Of
    the call's other tensors the caller makes sure that they are plain in this sense: `is_plain`.

    Its arguments are the tuple of where results go, a tuple of numbers, of which the binding knows
    the order, and the tuple of the op's tensors. It returns True, or None where the op refuses the
    call and has to say why.
    """
    function = _functions.get(name)
    if (
        function is None
        or _is_tracing()  # before what a trace would warn of
        or type(first) is not Tensor
        or not first.is_cpu
        or first.is_neg()
        or (like is not None and like.nbytes >= LARGE)
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _profiler_enabled()
        or in_forward_mode()
    ):
        return None
    return function


def is_plain(x: Tensor | None) -> bool:
    """Say whether another tensor of a call may go past the dispatcher."""
    return x is None or (type(x) is Tensor and not x.is_neg())


def _find_functions(reason: str | None) -> None:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if reason is not None or exchange is None or not _KNOWS_WHO_LOOKS_ON:
        return
    python, library = ctypes.pythonapi, ctypes.CDLL(str(_ext.path("cpu")))
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    tensors = pointer(("PyCapsule_GetPointer", python))(exchange, b"dlpack_exchange_api")
    items = (python.PyTuple_Size, python.PyTuple_GetItem, python.PyFloat_AsDouble)
    lock = (python.PyEval_SaveThread, python.PyEval_RestoreThread)
    used = (*items, python.Py_IncRef, python.PyErr_Occurred, python.PyErr_Clear, *lock)
    how = _Python(tensors, None, True, *map(_address, used))
    if not library.extrope_direct(ctypes.byref(how)):
        return
    make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    for name in _NAMES:
        function = _address(getattr(library, f"extrope_direct_{name}"))
        _methods.append(_Method(name.encode(), function, _METH_FASTCALL, None))
        pointer = ctypes.addressof(_methods[-1])
        _functions[name] = make(("PyCFunction_NewEx", python))(pointer, None, None)


def _address(function: ctypes._CFuncPtr) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


_ext.watch("cpu", _find_functions)
