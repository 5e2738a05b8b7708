"""Settings that must be in place before torch and triton are imported by a test."""

import os
import shutil

# Without a GPU, Triton kernels run in Triton's interpreter: same code, real numbers, small shapes.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A graph from the cache of an earlier run was planned in another process: a test would see nothing of it.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
