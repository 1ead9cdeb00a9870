"""A plug-in of vLLM 0.32: static INT8 on a CPU with AMX, which else takes a path without the scale.

`CPUInt8ScaledMMLinearKernel` gives symmetric INT8 to a kernel that quantises each token by itself
where there is AMX, and never looks at `input_scale`. The change it needs is one condition, `and not
self.config.is_static_input_scheme`, where it chooses.
"""

from typing import Any


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    kernel: Any = cpu.CPUInt8ScaledMMLinearKernel
    stock, choose = kernel.process_weights_after_loading, cpu.check_cpu_sgl_kernel
    if getattr(kernel, "keeps_static", False):
        return

    def process(self: Any, layer: Any) -> None:
        static = self.config.is_static_input_scheme
        cpu.check_cpu_sgl_kernel = (lambda *_: False) if static else choose
        stock(self, layer)

    kernel.process_weights_after_loading, kernel.keeps_static = process, True
