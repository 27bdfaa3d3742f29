"""Runs jobs on the emulated kernels, in a process of its own under a sanitizer, without torch.

Reads pickled jobs from standard input and writes the contents of their buffers back.
"""

from __future__ import annotations

import pickle
import sys

sys.path.insert(0, sys.argv[1])

import extrope_emulation


def set_fields(target, fields: dict, buffers: list) -> None:
    for name, value in fields.items():
        if isinstance(value, tuple):  # a pointer: which buffer, how many bytes into it
            buffer, start = value
            value = buffers[buffer].address + start
        setattr(target, name, value)


def run(job: dict) -> list[bytes]:
    buffers = [extrope_emulation.Buffer(contents) for contents in job["buffers"]]
    params = extrope_emulation.RopeParams()
    set_fields(params, job["params"], buffers)
    for i, fields in enumerate(job["tensors"]):
        set_fields(params.tensor(i), fields, buffers)
    error = extrope_emulation.rope_launch(params)
    if error != 0:
        raise RuntimeError(f"{job['name']}: the launch returned {error}")
    return [buffer.contents() for buffer in buffers]


results = []
for one in pickle.load(sys.stdin.buffer):
    print(one["name"], file=sys.stderr, flush=True)  # the last one is the culprit of an abort
    results.append(run(one))
pickle.dump(results, sys.stdout.buffer)
