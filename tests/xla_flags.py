"""XLA's flags for programs that take longer to compile than to run."""

from importlib.metadata import version

COMPILE_FAST = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # newer ones know but one way to emit
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
