"""Models that other people made: transformers and timm, tiny and with random weights."""

from __future__ import annotations

import collections
import copy
import dataclasses
import os
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError, DataError
from gatrain.tasks import HuggingFace, LanguageModel, Supervised
from gatrain.tasks.forms import scores_of
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
    return (scores.double() ** 2).sum()


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "gpt2": (gpt2, lambda model: model(input_ids=IDS, attention_mask=MASK)),
    "llama": (llama, lambda model: model(input_ids=IDS, attention_mask=MASK)),
    "t5": (t5, lambda model: model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS)),
    "bert": (bert, lambda model: model(input_ids=IDS, attention_mask=MASK)),
    "vit": (vit, lambda model: model(pixel_values=PIXELS.to(next(model.parameters()).dtype))),
    "timm": (timm_vit, lambda model: model(PIXELS.to(next(model.parameters()).dtype))),
}


def gradients(
    make: Callable[[], nn.Module], call: Callable[[nn.Module], Any], mode: str
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    # in fp64: a tensor that all blocks share gets its parts in another order, which fp32 shows on some processors
    model = make().double().train()
    assert {"none", "selective", "every_2", "full"} <= set(available_modes(model))
    apply_checkpointing(model, mode)
    torch.manual_seed(1)
    total(call(model)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    make, call = FAMILIES[name]
    plain = gradients(make, call, "none")
    assert plain
    for mode in ("selective", "every_2", "full"):
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


# --- task=huggingface -------------------------------------------------------------------------------------

LABELS = IDS.masked_fill(MASK == 0, -100)
TAGS = torch.where(MASK == 0, -100, IDS % 3)
CLASSES = torch.tensor([0, 2, 1])
TEXT = {"input_ids": IDS, "attention_mask": MASK}
REGRESSION, SEVERAL = torch.randn(3), torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])


class Rows(list[Any]):
    deterministic = True


def task_of(make: Callable[[], nn.Module], batch: dict[str, Tensor], **options: Any) -> HuggingFace:
    count = len(next(iter(batch.values())))
    rows = Rows({name: each[i] for name, each in batch.items()} for i in range(count))
    return HuggingFace(make, rows, **options)


def own_mean(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], int]] = {
    "gpt2": (gpt2, {**TEXT, "labels": LABELS}, 8 + 5 + 8),
    "llama": (llama, {**TEXT, "labels": LABELS}, 8 + 5 + 8),
    "t5": (t5, {**TEXT, "labels": LABELS}, 9 + 6 + 9),
    "bert_masked": (lambda: bert("BertForMaskedLM"), {**TEXT, "labels": LABELS}, 9 + 6 + 9),
    "bert_classes": (bert, {**TEXT, "labels": CLASSES}, 3),
    "bert_regression": (lambda: bert(num_labels=1), {**TEXT, "labels": REGRESSION}, 3),
    "bert_several": (bert, {**TEXT, "labels": SEVERAL}, 9),
    "bert_tokens": (lambda: bert("BertForTokenClassification"), {**TEXT, "labels": TAGS}, 9 + 6 + 9),
    "vit": (vit, {"pixel_values": PIXELS, "labels": CLASSES[:2]}, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_sum_over_the_weight_is_the_loss_that_the_model_itself_computes(name: str) -> None:
    make, batch, weight = CASES[name]
    task = task_of(make, batch)
    torch.manual_seed(0)
    model = task.build_model().double().eval()
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    assert task.weight(batch) == weight
    total_loss, used = task.loss_sum(model, batch)
    assert int(used) == weight
    assert torch.allclose(total_loss / weight, own_mean(model, batch).double(), rtol=1e-6)
    # and it decomposes: the sums of the samples alone add up
    alone = [{n: t[i : i + 1] for n, t in batch.items()} for i in range(len(batch["labels"]))]
    parts = [task.loss_sum(model, each) for each in alone]
    assert torch.allclose(sum(each[0] for each in parts), total_loss, rtol=1e-9)
    assert sum(task.weight(each) for each in alone) == weight


@pytest.mark.parametrize("pad", [None, 3])
def test_rows_of_a_tokenizer_train_without_collate_or_labels(pad: int | None) -> None:
    texts = ([5, 6, 7], [8, 9], [4, 5, 6, 7, 8])
    every = ("attention_mask", "token_type_ids")
    rows = Rows(
        transformers.BatchEncoding({"input_ids": ids, **dict.fromkeys(every, [1] * len(ids))})
        for ids in texts
    )
    task = HuggingFace(lambda: llama(pad_token_id=pad), rows)
    batch = task.collate(list(rows))
    assert batch["input_ids"][1].tolist() == [8, 9, *[pad or 0] * 3]
    assert task.weight(batch) == 2 + 1 + 4
    torch.manual_seed(0)
    model = task.build_model().double().eval()
    whole = task.loss_sum(model, batch)[0]
    alone = [task.loss_sum(model, task.collate([row]))[0] for row in rows]
    assert torch.allclose(whole, sum(alone), rtol=1e-9)  # type: ignore[arg-type]


def test_what_the_labels_mean_is_known_before_the_model_is_made() -> None:
    task = task_of(gpt2, {**TEXT, "labels": LABELS})
    before = torch.get_rng_state()
    assert task.weight({**TEXT, "labels": LABELS}) == 21
    assert torch.equal(before, torch.get_rng_state())


class Unknown(nn.Module):
    """Names nothing that tells what its labels mean; returns its own mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.table(input_ids).mean(1)
        return types.SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels))


def test_a_models_own_loss_counts_where_the_task_says_how_it_is_weighted() -> None:
    batch = {"input_ids": IDS, "labels": CLASSES}
    with pytest.raises(ConfigError, match=r"Unknown does not tell .* \+task.loss_weight"):
        task_of(Unknown, batch).build_model()
    task = task_of(Unknown, batch, loss_weight="samples")
    model = task.build_model()
    assert task.weight(batch) == 3
    assert torch.allclose(task.loss_sum(model, batch)[0], 3 * model(**batch).loss)


def mixtral(routers: bool) -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, output_router_logits=routers, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "batch", "text"),
    [
        (lambda: mixtral(True), TEXT, "output_router_logits=false"),
        (lambda: bert("BertModel"), TEXT, "does not tell what its labels mean"),
        (bert, TEXT, "without labels"),
        (bert, {**TEXT, "labels": LABELS}, "do not fit"),
        (gpt2, {**TEXT, "atention_mask": MASK}, "Did you mean 'attention_mask'"),
        (lambda: bert("BertForMaskedLM"), {**TEXT, "labels": CLASSES}, "one label for each position"),
    ],
)
def test_what_task_huggingface_cannot_do_is_refused_by_name(make: Any, batch: Any, text: str) -> None:
    task = task_of(make, batch)
    with pytest.raises(ConfigError, match=text):
        task.loss_sum(task.build_model(), batch)


# --- outputs and batches of the other tasks ---------------------------------------------------------------


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


@dataclasses.dataclass
class Batch:
    x: Tensor
    y: Tensor


class Returns(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.layer(x))


X, Y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
DATA = torch.utils.data.TensorDataset(X, Y)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (lambda s: Output(s, s + 1), {}),
        (lambda s: types.SimpleNamespace(logits=s, loss=None), {}),
        (lambda s: {"logits": s, "hidden": s + 1}, {}),
        (lambda s: {"out": s}, {}),
        (lambda s: (s, None), {}),
        (lambda s: [s], {}),
        (lambda s: (s, s + 1), {"output": 0}),
        (lambda s: {"out": s, "aux": s + 1}, {"output": "out"}),
        (lambda s: transformers.modeling_outputs.SequenceClassifierOutput(logits=s), {}),
    ],
)
def test_an_output_that_tells_its_scores_trains_on_them(form: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Returns(form)
    task = Supervised(lambda: model, DATA, **options)
    found = task.loss_sum(model, (X, Y))[0]
    assert torch.equal(found, nn.functional.cross_entropy(model.layer(X), Y, reduction="sum"))
    assert "accuracy" in task.eval_metrics(model, (X, Y))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (lambda s: (s, s + 1), r"a tuple \(0: \[5, 3\], 1: \[5, 3\]\).*\+task.output=0"),
        (lambda s: {"out": s, "aux": s}, "would train without aux"),
        (lambda s: types.SimpleNamespace(logits=s, aux_logits=s), "would train without aux_logits"),
        (lambda s: types.SimpleNamespace(logits=s, loss=s.sum()), "would train without loss"),
        (lambda s: (s, (s, s)), r"\+task.output=0"),
        (lambda s: "text", "the model returns a str"),
        (lambda s: s.unsqueeze(1), r"needs scores \[batch, classes"),
        (lambda s: s[:, :1].squeeze(1), r"needs scores \[batch, classes"),
    ],
)
def test_an_output_that_does_not_tell_is_refused_with_what_to_write(form: Any, text: str) -> None:
    model = Returns(form)
    task = Supervised(lambda: model, DATA)
    with pytest.raises(ConfigError, match=text):
        task.loss_sum(model, (X, Y))


def test_googlenet_with_auxiliary_outputs_is_refused_by_name() -> None:
    torchvision = pytest.importorskip("torchvision")
    outputs = torchvision.models.GoogLeNetOutputs(torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(5, 3))
    with pytest.raises(ConfigError, match="aux_logits=false"):
        scores_of(outputs, None, "supervised")
    plain = torchvision.models.GoogLeNetOutputs(torch.zeros(5, 3), None, None)
    assert scores_of(plain, None, "supervised") is plain.logits


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        ([X, Y], {}),
        (Batch(X, Y), {}),
        ({"image": X, "label": Y}, {}),
        (collections.UserDict({"x": X, "y": Y}), {}),
        (types.SimpleNamespace(x=X, target=Y), {}),
        ({"a": X, "b": Y, "c": 0}, {"inputs": "a", "targets": "b"}),
        ((0, X, Y), {"inputs": 1, "targets": 2}),
    ],
)
def test_a_batch_that_tells_inputs_from_targets_trains(batch: Any, options: dict[str, Any]) -> None:
    task = Supervised(lambda: nn.Linear(4, 3), DATA, **options)
    assert task.weight(batch) == 5
    assert torch.isfinite(task.loss_sum(task.build_model(), batch)[0])


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"input_ids": IDS, "labels": IDS}, "Use task=huggingface"),
        ({"a": X, "b": Y}, r"\+task.inputs=a \+task.targets=b"),
        ((X, X, Y), r"\+task.inputs=0 \+task.targets=1"),
    ],
)
def test_a_batch_that_does_not_tell_is_refused_with_what_to_write(batch: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Supervised(lambda: nn.Linear(4, 3), DATA).weight(batch)


def test_language_model_takes_the_logits_of_a_model_of_transformers() -> None:
    task = LanguageModel(gpt2, Rows(IDS))
    torch.manual_seed(0)
    model = task.build_model().eval()
    found, weight = task.loss_sum(model, IDS)
    mean = model(input_ids=IDS, labels=IDS).loss
    assert int(weight) == 24
    assert torch.allclose(found / 24, mean, rtol=1e-5)
    with pytest.raises(ConfigError, match="Use task=huggingface"):
        task.weight({"input_ids": IDS, "labels": IDS})


def test_samples_that_make_no_batch_are_shown_with_what_to_write() -> None:
    rows = [transformers.BatchEncoding({"input_ids": [1] * length}) for length in (2, 3)]
    task = Supervised(lambda: nn.Linear(4, 3), Rows(rows))
    with pytest.raises(DataError, match=r"input_ids: list of 2.*input_ids: list of 3.*use task=huggingface"):
        task.collate(rows)
    with pytest.raises(DataError, match="leaves None out"):
        task.collate([None, (X[0], Y[0])])
