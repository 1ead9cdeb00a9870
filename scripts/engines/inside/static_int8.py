"""A plug-in of vLLM 0.32: INT8 by oneDNN on a CPU with AMX, which else takes a path without scales.

`CPUInt8ScaledMMLinearKernel` gives symmetric INT8 to a kernel that quantises each token by itself
where there is AMX, and never looks at `input_scale`. The change it needs is one condition, `and not
self.config.is_static_input_scheme`, where it chooses. Here no layer takes that path, so that rows
per token go by the same kernel as those with fixed ranges.
"""


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    cpu.check_cpu_sgl_kernel = lambda *_: False
