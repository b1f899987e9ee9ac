"""vLLM: where a worker's weights lie, and what its post-processing makes of them."""

from wsync.adapters.engines.vllm.engine import Recorded, VLLMEngine
from wsync.adapters.engines.vllm.in_place import keep_linear_weights_in_place

__all__ = ["Recorded", "VLLMEngine", "keep_linear_weights_in_place"]
