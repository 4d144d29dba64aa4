"""Functions for the processes that `train.targets.run_for` starts."""

import os
import sys
import time

from train.errors import InputError


def tell(target, request):
    print("printed by a compiler")
    names = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    return {"target": target.name, "request": request, **{name: os.environ.get(name) for name in names}}


def count_devices(target, request):
    return len(target.devices())


def refuse(target, request):
    raise InputError("patch is 7: give 8.")


def fail(target, request):
    raise RuntimeError("RESOURCE_EXHAUSTED: no memory")


def crash(target, request):
    print("the last words", file=sys.stderr, flush=True)
    os._exit(3)


def hang(target, request):
    time.sleep(100)
