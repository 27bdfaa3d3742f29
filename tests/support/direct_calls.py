"""Calls past PyTorch's dispatcher: which there were, who looks on, and the same calls of the op."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from extrope_kernels.ops._shared import direct


def counted(monkeypatch, name: str) -> list:
    """What the direct function of this name returns, from now on."""
    returned: list = []
    function = direct._functions[name]

    def call(*args):
        returned.append(function(*args))
        return returned[-1]

    monkeypatch.setitem(direct._functions, name, call)
    return returned


def by_the_op(monkeypatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(direct, "_functions", {})
        return call()


def assert_same(got, expected) -> None:
    """In every bit, and in memory alike."""
    for x, same in zip(got, expected, strict=True):
        assert x is same is None or (torch.equal(x, same) and x.stride() == same.stride())


class Dispatched(TorchDispatchMode):
    """Sees what is dispatched."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Sees which functions of torch are called."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A tensor of another class."""


def lets_go_of_pythons_lock(monkeypatch, name: str, call: Callable[[], Any]) -> bool:
    """Whether another thread of Python runs while `call` is in the direct function of this name.

    No thread takes the lock from another here: whoever runs during a call was let.
    """
    call()
    function, ticks, passed, done = direct._functions[name], 0, [], threading.Event()

    def counting(*args):
        before = ticks
        result = function(*args)
        passed.append(ticks - before)
        return result

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0)

    monkeypatch.setitem(direct._functions, name, counting)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    thread = threading.Thread(target=tick)
    try:
        thread.start()
        for _ in range(2000):  # where other processes have the cores, few of them see a thread run
            call()
            if passed[-1]:
                break
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()
    return any(passed)


def assert_keeps_no_references(watched: Sequence[object], call: Callable[[], None]) -> None:
    """200 calls leave the counts of these, and of True and None, as they are.

    Of five times that they must once: others of the process change those of True and None as well.
    """
    watched = [*watched, True, None]

    def counts() -> list[int]:
        gc.collect()
        return [sys.getrefcount(x) for x in watched]

    def changed() -> bool:
        before = counts()
        for _ in range(200):
            call()
        return any(abs(now - then) >= 100 for now, then in zip(counts(), before))

    call()  # what is imported or cached at first
    assert not all(changed() for _ in range(5))
