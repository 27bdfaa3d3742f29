"""Builds csrc/cuda/rope/rope.cu for the host under a sanitizer and runs it on torch tensors."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from extrope_kernels import _build
from extrope_kernels.ops.rope.call import Rotation

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as in rope_params.h
POSITION_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


@dataclass(frozen=True)
class Sanitizer:
    """A way to build the kernels: compiler flags, the runtime to preload, its options."""

    name: str
    flags: tuple[str, ...]
    runtime: str
    environment: dict[str, str]


ADDRESS = Sanitizer(
    "address",
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "libasan.so",
    {"ASAN_OPTIONS": "detect_leaks=0"},  # the interpreter frees nothing at exit
)
# Two workers that share out the CUDA threads: the sanitizer sees when threads of both meet.
THREAD = Sanitizer(
    "thread",
    ("-fsanitize=thread", "-DEXTROPE_EMULATED_WORKERS=2"),
    "libtsan.so",
    {"TSAN_OPTIONS": "halt_on_error=1"},
)


SANITIZERS = (ADDRESS, THREAD)


class MissingTool(RuntimeError):
    """The emulation cannot be built here; the message says why."""


class SanitizerError(AssertionError):
    """A sanitizer stopped the kernels; the message is its report."""


def find_cuda_headers() -> Path:
    """The folder with cuda_bf16.h, of a CUDA toolkit."""
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        roots.append(str(Path(nvcc).resolve().parent.parent))
    for root in filter(None, roots):
        if (Path(root) / "include" / "cuda_bf16.h").is_file():
            return Path(root) / "include"
    raise MissingTool("no CUDA headers (cuda_bf16.h) found; set CUDA_HOME")


def build(folder: Path) -> None:
    """Compile one module per sanitizer under `folder`; MissingTool when something is not there."""
    try:
        import pybind11

        compiler = _build.find_compiler()
    except ImportError as error:
        raise MissingTool("pybind11 is not installed") from error
    except _build.BuildError as error:
        raise MissingTool(str(error)) from error
    common = [*compiler, _build.STANDARD, "-O0", "-g1", "-fPIC", "-fvisibility=hidden", "-c"]
    warnings = ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
    # Our cuda/launch.h is found before that of the sources.
    headers = ["-I", str(HERE), *_build.include(), "-isystem", str(find_cuda_headers())]
    kernel = [*warnings, *headers, "-xc++"]
    source = str(_build.source_dir() / "cuda" / "rope" / "rope.cu")
    python = ["-I", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    objects = {
        folder / f"rope.{s.name}.o": [*common, *s.flags, *kernel, source] for s in SANITIZERS
    }
    objects[folder / "module.o"] = [*common, *_build.include(), *python, str(HERE / "module.cpp")]
    compiling = [
        subprocess.Popen([*command, "-o", str(target)], stderr=subprocess.PIPE, text=True)
        for target, command in objects.items()
    ]
    for process in compiling:
        report = process.communicate()[1]
        assert process.returncode == 0, report
    for s in SANITIZERS:
        (folder / s.name).mkdir()
        parts = [str(folder / f"rope.{s.name}.o"), str(folder / "module.o")]
        module = str(folder / s.name / "extrope_emulation.so")
        subprocess.run([*compiler, "-shared", *s.flags, *parts, "-o", module], check=True)


def run(jobs: Sequence[Job], sanitizer: Sanitizer, folder: Path) -> None:
    """Run jobs in one process under the sanitizer; their tensors then hold the results."""
    compiler = _build.find_compiler()
    found = subprocess.run(
        [*compiler, f"-print-file-name={sanitizer.runtime}"],
        capture_output=True,
        text=True,
        check=True,
    )
    done = subprocess.run(
        [sys.executable, str(HERE / "runner.py"), str(folder / sanitizer.name)],
        input=pickle.dumps([job.request for job in jobs]),
        capture_output=True,
        env={**os.environ, "LD_PRELOAD": found.stdout.strip(), **sanitizer.environment},
    )
    if done.returncode != 0:
        raise SanitizerError(done.stderr.decode(errors="replace")[-6000:])
    for job, contents in zip(jobs, pickle.loads(done.stdout), strict=True):
        job.receive(contents)


class Job:
    """One launch: parameters, with pointers into copies of the tensors."""

    def __init__(self, name: str) -> None:
        self.storages: list[Tensor] = []
        self.request = {"name": name, "params": {}, "tensors": [], "buffers": []}

    def close(self) -> None:
        """Copy what the launch is given."""
        self.request["buffers"] = [storage.numpy().tobytes() for storage in self.storages]

    def receive(self, contents: Sequence[bytes]) -> None:
        for storage, now in zip(self.storages, contents, strict=True):
            if now:
                storage.copy_(torch.frombuffer(bytearray(now), dtype=torch.uint8))

    def pointer(self, tensor: Tensor) -> tuple[int, int]:
        storage = tensor.untyped_storage()
        known = [s.data_ptr() for s in self.storages]
        if storage.data_ptr() not in known or storage.data_ptr() == 0:
            self.storages.append(torch.empty(0, dtype=torch.uint8).set_(storage))
            known.append(storage.data_ptr())
        return known.index(storage.data_ptr()), tensor.storage_offset() * tensor.itemsize

    def place(self, name: str, tensor: Tensor, pointer: str) -> dict:
        batch, seq, head, _ = tensor.stride()
        strides = {f"{name}_batch": batch, f"{name}_seq": seq, f"{name}_head": head}
        return {pointer: self.pointer(tensor), **strides}

    def add_tensor(self, source: Tensor, target: Tensor, **fields) -> None:
        places = {**self.place("in", source, "in_"), **self.place("out", target, "out")}
        self.request["tensors"].append({**places, "heads": source.shape[2], **fields})

    def set_tokens(self, inputs: Sequence[Tensor], by: Rotation) -> None:
        """Sizes and positions; with axes, those of the first."""
        batch, seqlen, _, head_dim = inputs[0].shape
        params = {
            "num_tensors": len(inputs),
            "batch": batch,
            "seqlen": seqlen,
            "head_dim": head_dim,
            "offset": by.offset,
        }
        if (positions := by.positions) is not None:
            params["positions"] = self.pointer(positions)
            params["position_type"] = POSITION_DTYPES.index(positions.dtype)
            params["positions_are_offsets"] = by.positions_are_offsets
            row = positions if positions.dim() < 3 else positions[0]
            params["position_batch"] = row.stride(0) if len(row) > 1 else 0
            params["position_seq"] = 0 if by.positions_are_offsets else row.stride(1)
        if by.cu_seqlens is not None:
            params["cu_seqlens"] = self.pointer(by.cu_seqlens)
            params["num_sequences"] = len(by.cu_seqlens) - 1
        self.request["params"].update(params)


def rope_job(
    name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    rotation: Rotation,
    saved: Sequence[Tensor] = (),
    angle_grad: Tensor | None = None,
) -> Job:
    job = Job(name)
    for i, (x, out) in enumerate(zip(inputs, outputs, strict=True)):
        kept = job.place("saved", saved[i], "saved") if saved else {}
        job.add_tensor(x, out, decay_sign=rotation.decay_signs[i], **kept)
    job.set_tokens(inputs, rotation)
    rows, columns, _ = rotation.inv_freq.shape
    params = {
        "dtype": DTYPES.index(inputs[0].dtype),
        "interleaved": rotation.interleaved,
        "conjugate": rotation.conjugate,
        "rotary_dim": rotation.rotary_dim,
        "rotary_offset": rotation.rotary_offset,
        "inv_freq": job.pointer(rotation.inv_freq),
        "inv_freq_is_f64": rotation.inv_freq.dtype == torch.float64,
        "freq_batch": rotation.inv_freq.stride(0) if rows > 1 else 0,
        "freq_head": rotation.inv_freq.stride(1) if columns > 1 else 0,
        "amplitude": rotation.amplitude,
        "angle_heads": columns,
    }
    if rotation.axes is not None:
        params["axes"] = job.pointer(rotation.axes)
        params["num_axes"] = len(rotation.positions)
        params["position_axis"] = rotation.positions.stride(0)
    if rotation.log_decay is not None:
        params["log_decay"] = job.pointer(rotation.log_decay)
        params["decay_origin"] = rotation.decay_origin
    if angle_grad is not None:
        params["angle_grad"] = job.pointer(angle_grad)
    job.request["params"].update(params)
    job.close()
    return job
