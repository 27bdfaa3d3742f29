"""Run PTX that a test has written, without Triton."""

from __future__ import annotations

import struct

from support.ptx import parse
from support.ptx.machine import Machine, Program
from support.ptx.memory import Findings, Global

MODULE = """
.version 8.7
.target sm_100a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel({parameters})
{{
.reg .b32 %r<{registers}>;
.reg .b64 %rd<32>;
.reg .pred %p<8>;
{body}
ret;
}}
"""


def run(body, tensors, *, threads=128, blocks=1, shared=4096, registers=64, seed=0) -> list[str]:
    """Execute a body on pointers [p0], [p1], ... to the tensors; return the kinds of findings."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(tensors)))
    text = MODULE.format(parameters=parameters, registers=registers, body=body)
    findings = Findings()
    memory = Global(tensors, findings)
    given = b"".join(struct.pack("q", memory.address(x)) for x in tensors)
    program = Program(parse.kernels(text)["kernel"])
    machine = Machine(program, (blocks, 1, 1), (threads, 1, 1), given, memory, shared, seed=seed)
    machine.run()
    memory.copy_back()
    return sorted({finding.split(": kernel")[0] for finding in findings})
