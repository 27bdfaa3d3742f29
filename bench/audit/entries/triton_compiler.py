"""Compile Triton launches ahead of time, without a GPU, specialised as they are at run time.

Usable only in a process without TRITON_INTERPRET: the decorator picks interpreter or compiler when
a kernel module is imported.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from ..case import Binary

# What Triton's hook tells of a compilation, without paths.
SPECIALISED = (
    *("signature", "constants", "configs"),
    *("num_warps", "num_stages", "num_ctas", "enable_fp_fusion"),
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoDriver:
    """Answers what compilation asks of a CUDA driver; Triton keeps its kernels by device."""

    def __init__(self, capability: int, device: int) -> None:
        self.capability, self.device = capability, device

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@dataclass(frozen=True)
class Launch:
    """One launch of a jitted kernel: what a launcher passed to it."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict

    def argument(self, name: str):
        """What the kernel's parameter was given."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[self.kernel.arg_names.index(name)]

    def made_from(self, capability: int) -> str:
        """A hash of the kernel, of all it calls, and of what Triton specialises it for."""
        seen = []

        def hook(fn, compile, **others) -> bool:
            # Neither the key nor the options: they hold paths of this machine.
            seen.extend([fn.jit_function.cache_key, capability, triton.__version__])
            seen.extend(compile[name] for name in SPECIALISED)
            return True  # leave it at that

        # On a device for which nothing is compiled: the hook is not asked about what already is.
        runtime = triton.knobs.runtime
        with (
            _driver(capability, device=-capability),
            mock.patch.object(runtime, "jit_cache_hook", hook),
        ):
            self._run()
        if not seen:
            raise RuntimeError(f"Triton {triton.__version__} did not ask its hook")
        names = set(self.kernel.arg_names)
        options = {name: value for name, value in self.kwargs.items() if name not in names}
        return hashlib.sha256(repr((*seen, sorted(options.items()))).encode()).hexdigest()

    def compile(self, capability: int) -> Binary:
        with _driver(capability, device=capability):
            compiled = self._run()
        with TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage = _run("cuobjdump", "--dump-resource-usage", cubin)
            sass = _run("nvdisasm", "-c", cubin)
        used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
        return Binary(
            registers=used["REG"],
            stack=used["STACK"],
            local=used["LOCAL"],
            shared=max(used["SHARED"], compiled.metadata.shared),
            warps=compiled.metadata.num_warps,
            sass=sass,
            tensor_memory=compiled.metadata.tmem_size or 0,
        )

    def _run(self):
        return self.kernel.run(*self.args, grid=self.grid, warmup=True, **self.kwargs)


def record(kernel: str, capability: int, call: Callable[[], object], nth: int = 0) -> Launch:
    """The nth launch of `kernel` that `call` asks for on that chip; none of any kernel is made."""
    launches = []

    def run(launched, *args, grid, warmup, **kwargs) -> None:
        if launched.__name__ == kernel:
            launches.append(Launch(launched, grid, args, kwargs))

    with (
        mock.patch.dict(os.environ, EXTROPE_TRITON_CHIP=str(capability)),
        mock.patch.object(triton.JITFunction, "run", run),
    ):
        call()
    return launches[nth]


@contextmanager
def _driver(capability: int, device: int):
    with mock.patch.object(triton.runtime.driver, "_active", _NoDriver(capability, device)):
        yield


def _run(tool: str, *args: object) -> str:
    command = [str(TOOLS / tool), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
