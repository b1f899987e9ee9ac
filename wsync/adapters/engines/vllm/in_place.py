"""Keeps linear weights of a vLLM on a CPU where they can be written, instead of in native packed matrices.

vLLM on a CPU hands every linear weight to oneDNN, which keeps a packed copy that nothing can write: a version must be
packed again, at 1-2 GB/s. Without that step weights stay in their parameters, so that a sync writes them in place, and
generation runs on torch's own linear layers, which are slower. A table in `docs/guides/vllm.md` has updates and
generation both ways.
"""

from __future__ import annotations

from typing import Any


def keep_linear_weights_in_place() -> bool:
    """Make models that are loaded from now on keep their linear weights in their parameters.

    For a process that is going to load a model, before it does. Nothing changes where vLLM does not run on a CPU, and
    expert weights are packed all the same.

    Returns:
        Whether this vLLM has the switch.
    """
    import vllm._custom_ops as ops
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        return False

    def never(*_: Any, **__: Any) -> bool:
        return False

    # The two ways of packing that vLLM asks about: oneDNN's, and the one of CPUs with matrix tiles (AMX).
    known = hasattr(ops, "_supports_onednn")
    if known:
        ops._supports_onednn = False
    if hasattr(utils, "check_cpu_sgl_kernel"):
        utils.check_cpu_sgl_kernel = never
    return known
