"""Which layer gives a model's output."""

from __future__ import annotations

from torch import nn

_OUTPUTS = ("get_output_embeddings", "get_classifier")
"""Methods by which transformers' and timm's models name the layer of their output."""
_OUTPUT_NAMES = ("head", "lm_head", "classifier", "fc_out", "output", "logits")


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that the model names as its output, those of the usual names, and the last linear one."""
    found: list[nn.Module] = []
    for module in model.modules():
        for method in _OUTPUTS:
            try:
                made = getattr(module, method)() if callable(getattr(module, method, None)) else None
            except Exception:  # a model without an output layer of that kind
                continue
            found += [made] if isinstance(made, nn.Module) else []
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found += [module for name, module in linear if name.rpartition(".")[2] in _OUTPUT_NAMES]
    found += [linear[-1][1]] if linear else []  # the last in the model's order: in most models its output
    return found
