"""Modules that take calls as the flash-attention packages do, refuse what they refuse, and compute
on PyTorch.

Parameters are those of the packages' sources, recorded from flash-attn 2.8.3.post2, hopper/ of its
repository of 2026-03, and flash-attn-4 4.0.0b36. Record others so, for the three files at will:

    PYTHONPATH=tests python -m support.flash_attn_stubs flash_attn/cute/interface.py ...
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from support.attention_engines import TorchEngine

_RECORD = Path(__file__).parent / "data" / "flash_attn_signatures.json"
SIGNATURES: dict[str, dict[str, str]] = json.loads(_RECORD.read_text())
PACKAGES = dict(zip(SIGNATURES, ("flash-attn", "flash-attn-3", "flash-attn-4")))
_CALLED = {name for functions in SIGNATURES.values() for name in functions}
_NEWEST = "flash_attn.cute.interface"


def signatures(source: Path) -> dict[str, str]:
    """The parameters of the functions that are called here, as a module's source has them."""
    found = {}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name in _CALLED:
            for parameter in node.args.args:
                parameter.annotation = None
            found[node.name] = ast.unparse(node.args)
    return found


def installed_source(module: str) -> Path | None:
    """The file of an installed package's module, which is not imported."""
    try:
        package = importlib.metadata.distribution(PACKAGES[module])
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(package.locate_file(module.replace(".", "/") + ".py"))


def stub_modules() -> dict[str, ModuleType]:
    """Every name of sys.modules that the packages would fill."""
    return {name: stub_module(name, functions) for name, functions in SIGNATURES.items()}


def stub_module(module_name: str, functions: dict[str, str]) -> ModuleType:
    module = ModuleType(module_name)
    run = _Newest() if module_name == _NEWEST else _Older(module_name)
    for name, parameters in functions.items():
        handler = run.backward if "bwd" in name or "backward" in name else run.forward
        scope = {"handler": handler, "SimpleNamespace": SimpleNamespace}
        source = f"lambda {parameters}: handler(SimpleNamespace(**locals()))"
        setattr(module, name, eval(source, scope))
    return module


class _Older:
    """Causal calls, windows whose negative left bound is infinite, gradients written in place."""

    engine = TorchEngine("older")

    def __init__(self, module: str):
        self.deterministic_to = 192 if module == "flash_attn_interface" else 256

    def forward(self, call):
        assert call.causal and call.window_size_right == 0
        out, lse = self.engine.forward(call.q, call.k, call.v, *self._band(call))
        return out, lse, out.new_empty(0), None

    def backward(self, call):
        assert getattr(call, "causal", True) and getattr(call, "is_causal", True)
        assert call.deterministic and call.window_size_right == 0
        assert call.q.shape[-1] <= self.deterministic_to, "Deterministic backward not supported"
        saved = (call.q, call.k, call.v, call.out, call.softmax_lse)
        grads = self.engine.backward(call.dout, None, *saved, *self._band(call))
        for target, grad in zip((call.dq, call.dk, call.dv), grads):
            assert target.is_contiguous()
            target.copy_(grad)

    def _band(self, call):
        _check(call)
        left = None if call.window_size_left < 0 else call.window_size_left
        return call.softmax_scale, left, getattr(call, "cu_seqlens_q", None), call.softcap


class _Newest:
    """Windows, a gradient of lse, gradients returned."""

    engine = TorchEngine("newest", dlse=True)

    def forward(self, call):
        self._check(call)
        assert call.return_lse and not call.causal
        cu_seqlens = getattr(call, "cu_seqlens_q", None)
        left, right = call.window_size
        assert right == 0
        band = (call.softmax_scale, left, cu_seqlens, call.softcap)
        return self.engine.forward(call.q, call.k, call.v, *band)

    def backward(self, call):
        major = self._check(call)
        assert call.deterministic and not call.causal
        window = (call.window_size_left, call.window_size_right)
        assert major in (9, 10, 11), "no backward that is deterministic"
        if major > 9 and call.q.shape[-1] == 256:
            assert window == (None, 0), "does not support local attention"
            assert call.softcap == 0.0, "does not support softcap"
            assert call.dlse is None, "does not support dlse"
        saved = (call.q, call.k, call.v, call.out, call.lse)
        assert window[1] == 0
        band = (call.softmax_scale, window[0], call.cu_seqlens_q, call.softcap)
        return self.engine.backward(call.dout, call.dlse, *saved, *band)

    def _check(self, call) -> int:
        _check(call)
        major, head_dim = torch.cuda.get_device_capability()[0], call.q.shape[-1]
        assert major not in (10, 11) or head_dim <= 128 or head_dim == 256, "is not supported"
        return major


def _check(call) -> None:
    """What the packages ask of tensors."""
    assert call.q.dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16"
    assert call.q.shape[-1] % 8 == 0
    for x in (call.q, call.k, call.v):
        assert x.stride(-1) == 1
    cu_seqlens = getattr(call, "cu_seqlens_q", None)
    if cu_seqlens is not None:
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
        assert call.max_seqlen_q >= cu_seqlens.diff().max()


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        print(json.dumps(signatures(path), indent=2))
