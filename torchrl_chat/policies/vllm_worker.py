"""What runs inside vLLM's worker: loading the weights that a trainer hands over. Imported by vLLM, by its name.

On the CPU vLLM 0.32 packs the weights of linear layers into opaque handles when it loads a model, and empties the
parameters, so that nothing can be loaded afterwards (``reload_weights`` returns without an error, and the log-probs are
wrong). Importing this file, which happens before the model is built, keeps them plain instead; that costs some speed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.platforms import current_platform


def _plain_linear(layer: Any, remove_weight: bool) -> None:
    """In place of ``dispatch_cpu_unquantized_gemm``: the layer keeps its weight, and reads it at every call."""
    layer.cpu_linear = torch.nn.functional.linear


if current_platform.is_cpu():
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _plain_linear


class WeightLoader:
    """A ``worker_extension_cls``: its methods become methods of vLLM's worker."""

    model_runner: Any

    def load_trained_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | str) -> None:
        """Load weights into the model that runs, in place.

        Args:
            weights: names of transformers and tensors, or the path of a safetensors file of such.
        """
        if isinstance(weights, str):
            from safetensors.torch import load_file

            weights = load_file(weights).items()
        self.model_runner.model.load_weights(weights)
