"""Models that other people made: transformers and timm, tiny and with random weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatrain.train.checkpointing import apply_checkpointing, available_modes, blocks_of

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def gpt2(**more: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **more
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def llama(**more: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, attention_dropout=0.1, bos_token_id=0, eos_token_id=0,
        **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def t5(**more: Any) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        **more,
    )
    return transformers.T5ForConditionalGeneration(config)  # type: ignore[no-any-return]


def bert(head: str = "BertForSequenceClassification", **more: Any) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, **{"num_labels": 3, **more},
    )  # fmt: skip
    return getattr(transformers, head)(config)  # type: ignore[no-any-return]


def vit(**more: Any) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=8, hidden_dropout_prob=0.1, num_labels=3, **more,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)  # type: ignore[no-any-return]


def timm_vit() -> nn.Module:
    return timm.create_model(  # type: ignore[no-any-return]
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3, drop_rate=0.1,
        proj_drop_rate=0.1, drop_path_rate=0.2,
    )  # fmt: skip


def total(outputs: Any) -> Tensor:
    scores = outputs if isinstance(outputs, Tensor) else outputs.logits
    return (scores.float() ** 2).sum()


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "gpt2": (gpt2, lambda model: model(input_ids=IDS, attention_mask=MASK)),
    "llama": (llama, lambda model: model(input_ids=IDS, attention_mask=MASK)),
    "t5": (t5, lambda model: model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS)),
    "bert": (bert, lambda model: model(input_ids=IDS, attention_mask=MASK)),
    "vit": (vit, lambda model: model(pixel_values=PIXELS)),
    "timm": (timm_vit, lambda model: model(PIXELS)),
}


def gradients(
    make: Callable[[], nn.Module], call: Callable[[nn.Module], Any], mode: str
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = make().train()
    assert available_modes(model) == ("none", "selective", "full")
    apply_checkpointing(model, mode)
    torch.manual_seed(1)
    total(call(model)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    make, call = FAMILIES[name]
    plain = gradients(make, call, "none")
    assert plain
    for mode in ("selective", "full"):
        found = gradients(make, call, mode)
        assert found.keys() == plain.keys()
        for key, gradient in plain.items():
            assert torch.allclose(found[key], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max())), (
                key
            )


def test_checkpointing_really_recomputes_the_layers_of_transformers() -> None:
    model = gpt2().train()
    assert len(blocks_of(model)) == 2
    calls: list[int] = []
    blocks_of(model)[0].attn.register_forward_hook(lambda *_: calls.append(1))
    apply_checkpointing(model, "full")
    total(model(IDS)).backward()
    assert len(calls) == 2
    assert copy.deepcopy(model.config).use_cache  # what is exported keeps its cache
