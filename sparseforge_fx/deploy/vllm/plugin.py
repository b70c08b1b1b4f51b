"""vLLM's entry point ``vllm.general_plugins``: with sparseforge_fx installed, vLLM loads packed checkpoints.

vLLM calls ``register`` in every process that it starts, whatever model is served: it is cheap, may be called again, and
never stands in the way of another model.
"""

from __future__ import annotations

import importlib.util
import logging

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import METHOD


def register() -> None:
    """Make ``quant_method: sparseforge`` known to vLLM.

    A vLLM that is too old or too new for ours gets a warning in its log and goes on without us.
    Raises SparseForgeError if vLLM is not installed: then it was not vLLM that called.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SparseForgeError("vLLM is not installed: pip install vllm, which then finds sparseforge_fx by itself")
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        if METHOD in QUANTIZATION_METHODS:
            return
        from sparseforge_fx.deploy.vllm.linear import PackedVllmConfig

        register_quantization_config(METHOD)(PackedVllmConfig)
    except Exception as error:  # an open set: whatever another version of vLLM has moved, renamed or refuses
        logging.getLogger("vllm.sparseforge_fx").warning(
            "packed 2:4 checkpoints cannot be loaded: sparseforge_fx does not fit this version of vLLM (%s: %s)",
            type(error).__name__,
            error,
        )
