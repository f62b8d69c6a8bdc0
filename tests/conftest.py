"""Eight CPU devices, strict numerics, and compiled programs that all tests share."""

import atexit
import os
import shutil
import sys
import tempfile

from tests.xla_flags import COMPILE_FAST

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    f" {COMPILE_FAST}"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The same programs, too: xdist's workers and the processes that tests start share them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ngalore-jax-")
    atexit.register(
        shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
    )
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# And bytecode: where containers forbid it, each process would compile all of jax.
if sys.dont_write_bytecode:
    sys.pycache_prefix = tempfile.mkdtemp(prefix="ngalore-jax-")
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
