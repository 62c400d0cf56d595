"""Peak memory of a process that does nothing but load a model and run it ten times; in KB, on standard output."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime

settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = int(sys.argv[2])
settings.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], settings, providers=["CPUExecutionProvider"])
given = session.get_inputs()[0]
image = np.zeros((1, *given.shape[1:]), dtype=np.uint8 if given.type == "tensor(uint8)" else np.float32)
for _ in range(10):
    session.run(None, {given.name: image})
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
