"""The check of the loss raises no false alarm on the shipped recipes and on other libraries' models.

All are tiny, with random weights and with their dropout on; nothing is downloaded. A model is checked in fp32,
under bf16 and fp16 autocast, and with 16-bit parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatrain import build
from gatrain.compose import compose
from gatrain.config import SGDConfig
from gatrain.errors import ExactnessError
from gatrain.models.resnet import resnet50
from gatrain.plan import StepSettings
from gatrain.tasks import Supervised, Task
from gatrain.train.check import check_loss
from gatrain.train.engine import Engine
from gatrain.train.ranks import Ranks

IGNORED = -100


def check(task: Task, model: nn.Module, precision: str = "fp32") -> list[str]:
    settings = StepSettings(precision=precision, checkpointing="none", compile=False, sync="window")
    engine = Engine(task, model.train(), settings, SGDConfig(), Ranks.current(), torch.device("cpu"))
    return check_loss(engine, range(min(16, len(task.train_data))), seed=1, micro_batch=4)


WAYS = ("fp32", "bf16", "fp16", "bf16 parameters")


def check_every_way(task: Task, ways: tuple[str, ...] = WAYS) -> None:
    for way in ways:
        torch.manual_seed(0)
        model = task.build_model()
        if way == "bf16 parameters":
            model = model.to(torch.bfloat16)
        assert check(task, model, way.split()[0] if "param" not in way else "fp32") == [], way


class Images(torch.utils.data.Dataset):
    deterministic = True

    def __init__(self, size: int = 32, classes: int = 7) -> None:
        self.size, self.classes = size, classes

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        made = torch.Generator().manual_seed(index)
        return torch.randn(3, self.size, self.size, generator=made), index % self.classes


class Rows(torch.utils.data.Dataset):
    """Token sequences of unlike length."""

    deterministic = True

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        made = torch.Generator().manual_seed(index)
        tokens = torch.randint(3, 60, (6 + 5 * index % 13,), generator=made)
        return {"tokens": tokens, "label": index % 3, "target": tokens.flip(0)[: 3 + index % 4]}


def padded(tokens: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=value)


class OwnTask(Task):
    def __init__(
        self, model: Callable[[], nn.Module], data: Any, collate: Any, weight: Any, loss_sum: Any
    ) -> None:
        self._model, self.train_data = model, data
        self._collate, self._weight, self._loss_sum = collate, weight, loss_sum

    def build_model(self) -> nn.Module:
        return self._model()

    def collate(self, samples: list[Any]) -> Any:
        return self._collate(samples)

    def weight(self, batch: Any) -> Any:
        return self._weight(batch)

    def loss_sum(self, model: nn.Module, batch: Any) -> Any:
        return self._loss_sum(model, batch)


# --- the shipped recipes --------------------------------------------------------------------------------

SHIPPED = {
    "llm": ("data.context=32", "data.vocab_size=300", "model.layers=1", "model.width=32", "model.heads=2"),
    "gpt2": ("data.context=32", "data.vocab_size=300", "model.layers=1", "model.width=32", "model.heads=2"),
    "padded": ("data.context=48", "model.layers=1", "model.width=32", "model.heads=2"),
    "vision": (),
}


@pytest.mark.parametrize("recipe", SHIPPED)
def test_a_shipped_recipe_passes(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"def f{n}(x):\n    return x + {n} * " + "x " * (n % 17) for n in range(600)))
    own = (f"data.path={text}",) if recipe != "vision" else ()
    config = compose([f"recipe={recipe}", "batch.effective=8", *SHIPPED[recipe], *own]).config
    task = build.build_task(config)
    check_every_way(task)


def test_resnet50_on_a_folder_passes() -> None:
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    check_every_way(Supervised(lambda: resnet50(7, norm="batch"), Images(48), loss), ("fp32", "bf16"))


# --- torchvision ----------------------------------------------------------------------------------------


def test_torchvisions_resnet_passes() -> None:
    models = pytest.importorskip("torchvision.models")
    check_every_way(Supervised(lambda: models.resnet18(num_classes=7), Images()))


class Boxes(Images):
    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        image, _ = super().__getitem__(index)
        corners = torch.rand(1 + index % 3, 2, generator=torch.Generator().manual_seed(index)) * 30
        return image, {
            "boxes": torch.cat([corners, corners + 20], 1),
            "labels": torch.ones(len(corners)).long(),
        }


def detector() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    return detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )


def detection_task(loss_sum: Any) -> OwnTask:
    return OwnTask(
        detector, Boxes(64), lambda samples: tuple(zip(*samples, strict=True)), lambda b: len(b[0]), loss_sum
    )


def test_a_detection_model_passes_whose_loss_is_a_mean_over_images() -> None:
    def loss_sum(model: nn.Module, batch: Any) -> Any:
        images, targets = batch
        return sum(model(list(images), list(targets)).values()) * len(images), len(images)

    check_every_way(detection_task(loss_sum), ("fp32", "bf16"))


# --- timm -----------------------------------------------------------------------------------------------


def test_a_timm_vit_with_drop_path_passes() -> None:
    timm = pytest.importorskip("timm")

    def vit() -> nn.Module:
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=7,
            drop_path_rate=0.3, drop_rate=0.1, attn_drop_rate=0.1,
        )  # fmt: skip

    check_every_way(Supervised(vit, Images()))


# --- transformers ---------------------------------------------------------------------------------------


def causal(batch: Any) -> Any:
    return (batch["labels"][:, 1:] != IGNORED).sum()


def causal_rows(samples: list[Any]) -> dict[str, Tensor]:
    tokens = [s["tokens"] for s in samples]
    return {
        "input_ids": padded(tokens, 0),
        "attention_mask": padded([torch.ones_like(t) for t in tokens], 0),
        "labels": padded(tokens, IGNORED),
    }


def summed(model: nn.Module, batch: Any) -> Any:
    return model(**batch, num_items_in_batch=1).loss, causal(batch)


def of_transformers(name: str) -> OwnTask:
    hf = pytest.importorskip("transformers")
    small = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    if name == "gpt2":
        config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **small)
        return OwnTask(
            lambda: hf.GPT2LMHeadModel(config), Rows(), causal_rows, lambda b: float(causal(b)), summed
        )
    if name == "llama":
        config = hf.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            attention_dropout=0.1, **small,
        )  # fmt: skip
        return OwnTask(
            lambda: hf.LlamaForCausalLM(config), Rows(), causal_rows, lambda b: float(causal(b)), summed
        )
    if name == "bert":
        config = hf.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
            num_labels=3,
        )  # fmt: skip

        def classes(samples: list[Any]) -> dict[str, Tensor]:
            made = causal_rows(samples)
            return {**made, "labels": torch.tensor([s["label"] for s in samples])}

        def mean_times_count(model: nn.Module, batch: Any) -> Any:
            return model(**batch).loss * len(batch["labels"]), len(batch["labels"])

        return OwnTask(
            lambda: hf.BertForSequenceClassification(config), Rows(), classes, lambda b: len(b["labels"]),
            mean_times_count,
        )  # fmt: skip
    config = hf.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip

    def pairs(samples: list[Any]) -> dict[str, Tensor]:
        made = causal_rows(samples)
        return {**made, "labels": padded([s["target"] for s in samples], IGNORED)}

    def labels(batch: Any) -> Any:
        return (batch["labels"] != IGNORED).sum()

    def per_label(model: nn.Module, batch: Any) -> Any:
        return model(**batch).loss * labels(batch), labels(batch)

    return OwnTask(
        lambda: hf.T5ForConditionalGeneration(config), Rows(), pairs, lambda b: float(labels(b)), per_label
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_a_model_of_transformers_passes(name: str) -> None:
    check_every_way(of_transformers(name))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_their_own_mean_over_labels_given_as_a_sum_is_refused(name: str) -> None:
    task = of_transformers(name)
    task._loss_sum = lambda model, batch: (model(**batch).loss, task._weight(batch))
    with pytest.raises(ExactnessError, match="loss_sum\\(\\) returns a mean over what weight\\(\\) counts"):
        check_every_way(task, ("fp32",))


# --- Keras ----------------------------------------------------------------------------------------------


def test_a_keras_model_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras was imported with another backend")

    class Net(nn.Module):
        """Runs a Keras model in training mode."""

        def __init__(self) -> None:
            super().__init__()
            layers = keras.layers
            self.body = keras.Sequential(
                [
                    keras.Input((8, 8, 3)),
                    layers.Conv2D(8, 3, activation="relu"),
                    layers.Dropout(0.3),
                    layers.Flatten(),
                    layers.LayerNormalization(),
                    layers.Dense(7),
                ]
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.movedim(1, -1), training=self.training)

    check_every_way(Supervised(Net, Images(8)), ("fp32", "bf16"))
