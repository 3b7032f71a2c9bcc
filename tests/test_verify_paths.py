"""`gatrain verify` proves the path that trains, and calls nothing inexact that is exact."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run
from torch import Tensor, nn

from gatrain.compose import compose
from gatrain.train import main_gradients
from gatrain.train.ranks import Ranks
from gatrain.verify.limits import CEILING, FLOOR, split_limit, trained_limit
from gatrain.verify.looks import Verification
from gatrain.verify.ranks import Cases

MODULE = """
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import gatrain

OWN = np.random.default_rng()

class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(8, 24), nn.Sequential(nn.Linear(8, 8)), dropout

    def forward(self, h):
        q, k, v = (part[:, None] for part in self.qkv(h).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return h + F.dropout(torch.tanh(self.out(mixed[:, 0])), self.dropout, self.training)

class Net(nn.Module):
    def __init__(self, dtype="float32", dropout=0.0, drops="", casts=False):
        super().__init__()
        self.drops, self.casts = drops, casts
        self.inp, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.to(getattr(torch, dtype))

    def forward(self, x):
        h = self.inp(x.to(self.inp.weight.dtype))
        for block in self.blocks:
            drawn = {"random": random.random, "numpy": np.random.random, "own": OWN.random}.get(self.drops)
            if drawn is None or drawn() < 0.5:
                h = block(h)
        if self.casts:
            return F.linear(h.mean(1).float(), self.out.weight.float(), self.out.bias.float())
        return self.out(h.mean(1))

class Data(torch.utils.data.Dataset):
    def __init__(self, augments=False, masks=False):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(40, 5, 6, generator=generator), torch.arange(40) % 3
        self.augments = augments
        if masks:
            self.collate = masked

    def __len__(self):
        return 40

    def __getitem__(self, index):
        x = self.x[index]
        if self.augments:
            x = x + torch.from_numpy(np.random.randn(5, 6)).float() + random.random() + torch.randn(())
        return x, self.y[index]

def masked(samples):
    x, y = torch.utils.data.default_collate(samples)
    return x * (torch.rand_like(x) > 0.3), y

@dataclass
class Points:
    x: torch.Tensor
    y: torch.Tensor

class OnObjects(gatrain.Task):
    def __init__(self, model, data):
        self.make, self.train_data, self.calls = model, data, 0

    def build_model(self):
        return self.make()

    def collate(self, samples):
        return Points(*torch.utils.data.default_collate(samples))

    def weight(self, batch):
        return len(batch.x)

    def loss_sum(self, model, batch):
        return F.cross_entropy(model(batch.x), batch.y, reduction="sum"), len(batch.x)

class Annealed(OnObjects):
    def loss_sum(self, model, batch):
        self.calls += 1
        total, count = super().loss_sum(model, batch)
        return total * min(1.0, self.calls / 4), count

class Counting(OnObjects):
    def loss_sum(self, model, batch):
        self.calls += 1
        return super().loss_sum(model, batch)
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: paths.Net, dtype: float32, dropout: 0.0, drops: "", casts: false}
data: {_target_: paths.Data, augments: false, masks: false}
batch: {effective: 12}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "paths.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "plain.yaml").write_text(RECIPE)
    for name in ("OnObjects", "Annealed", "Counting"):
        recipe = tmp_path / "recipes" / f"{name.lower()}.yaml"
        recipe.write_text(f"{RECIPE}task: {{_target_: paths.{name}}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "paths", raising=False)
    return tmp_path


def cases_of(*words: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The rows of one process, by name and precision, and the notes."""
    config = compose(list(words)).config
    precision = "fp32" if config.precision == "auto" else config.precision
    proof = Verification(
        config, torch.device("cpu"), Ranks(), precision=precision, checkpointing=config.checkpointing
    )
    proof.inspect()
    return {f"{c['name']} {c['precision']}": c for c in Cases(proof).one_process(4)}, proof.notes


def is_exact(cases: dict[str, dict[str, Any]]) -> bool:
    return all(
        c["error"] is None and (c["relative_error"] <= c["tolerance"]) != c["mutation"]
        for c in cases.values()
    )


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=plain", "model.dropout=0.3"],
        ["recipe=plain", "model.dropout=0.3", "checkpointing=full"],
        ["recipe=plain", "model.drops=random"],
        ["recipe=plain", "model.drops=numpy", "model.dropout=0.2"],
        ["recipe=plain", "data.augments=true"],
        ["recipe=plain", "data.augments=true", "data.masks=true"],
        ["recipe=onobjects"],
        ["recipe=counting"],
    ],
    ids=lambda words: " ".join(words[0:]).replace("recipe=", ""),
)
def test_what_is_exact_is_called_exact(folder: Path, words: list[str]) -> None:
    cases, _ = cases_of(*words)
    assert is_exact(cases), cases
    assert cases["planned split fp64"]["relative_error"] < 1e-12
    assert cases["mutation: mean of means fp64"]["relative_error"] > 1e-3


def test_a_model_that_computes_in_fp32_is_judged_by_fp32_rounding(folder: Path) -> None:
    cases, notes = cases_of("recipe=plain", "model.casts=true")
    assert is_exact(cases), cases
    assert max(cases[f"{name} split fp64"]["relative_error"] for name in ("planned", "awkward")) > 1e-12
    assert any("computes in fp32 by itself" in note for note in notes)


def test_numbers_that_gatrain_does_not_control_are_named_and_the_loss_is_not_blamed(folder: Path) -> None:
    cases, notes = cases_of("recipe=plain", "model.drops=own")
    broken = [case["error"] for case in cases.values() if case["error"]]
    assert broken
    assert all("random numbers that gatrain does not control" in error for error in broken)
    assert not any("in-batch" in error for error in broken)
    assert any("no proof of a wrong split" in note for note in notes)


@pytest.mark.parametrize("mixes", [True, False])
def test_a_collate_function_that_mixes_samples_is_named(folder: Path, mixes: bool) -> None:
    mixture = "    return 0.7 * x + 0.3 * x[torch.randperm(len(x))], y\n"
    kept = "    return x * (torch.rand_like(x) > 0.3), y\n"
    assert kept in MODULE
    (folder / "paths.py").write_text(MODULE.replace(kept, mixture if mixes else kept))
    _, notes = cases_of("recipe=plain", "data.masks=true")
    assert any("mixes samples (mixup, cutmix)" in note for note in notes) == mixes


def test_a_loss_that_counts_its_calls_is_named(folder: Path) -> None:
    cases, _ = cases_of("recipe=annealed")
    assert not is_exact(cases)
    assert "Annealed.calls" in cases["state of the model fp64"]["error"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["model.dtype=bfloat16"], "bf16"),
        (["model.dtype=float16"], "fp16"),
        (["precision=bf16"], "bf16"),
        (["precision=fp16"], "fp16"),
    ],
    ids=["bf16 parameters", "fp16 parameters", "bf16", "fp16"],
)
def test_the_trained_path_is_proven_and_its_rounding_is_stated(
    folder: Path, words: list[str], name: str
) -> None:
    cases, notes = cases_of("recipe=plain", "model.dropout=0.2", *words)
    assert is_exact(cases), cases
    rounded, summed = cases[f"trained path, one shot in fp64 {name}"], cases[f"trained path, summed {name}"]
    assert 1e-5 < rounded["relative_error"] < rounded["tolerance"] <= CEILING[name]
    assert summed["relative_error"] < 1e-6
    assert any(f"In {name} the one-shot gradient itself" in note for note in notes)
    has_half_parameters = "model" in words[0]
    assert (f"mutation: 16-bit sums {name}" in cases) == has_half_parameters
    assert f"planned split {name}" not in cases


def test_a_training_core_that_sums_in_16_bits_is_caught(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swamp(parameter: Tensor, stand_in: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        before = 0.0 if stand_in.grad is None else stand_in.grad
        stand_in.grad = (before + gradient).to(parameter.dtype).to(torch.float32)

    monkeypatch.setattr(main_gradients, "_move_gradient", swamp)
    cases, _ = cases_of("recipe=plain", "model.dtype=bfloat16")
    assert cases["trained path, summed bf16"]["relative_error"] > 1e-4
    assert not is_exact(cases)


def test_two_processes_prove_the_trained_path(folder: Path) -> None:
    done = run("verify", "--json", "recipe=plain", "model.dtype=bfloat16", cwd=folder, timeout_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    (row,) = [case for case in report["cases"] if case["name"] == "two processes, summed"]
    assert row["precision"] == "bf16"
    assert row["passed"]
    assert report["passed"]


def test_limits_follow_from_the_rounding() -> None:
    assert split_limit("fp64", "fp64", 1e-9, rounding=1e-3) == FLOOR["fp64"]  # nothing rounds there
    assert split_limit("fp64", "fp32", 1e-13) == FLOOR["fp64"]
    assert split_limit("fp64", "fp32", 1e-7) == FLOOR["fp32"]
    assert split_limit("fp32", "fp64", 1e-5, rounding=1e-5) == pytest.approx(4e-5)
    assert split_limit("fp32", "fp64", 1e-2, rounding=1e-2) == 2e-2  # twice the one-shot gradient's own
    assert split_limit("fp32", "fp32", 1e-2, rounding=1e-2) == CEILING["fp32"]
    assert trained_limit("bf16", 1e-3, spread=1.0) == pytest.approx(4 * (1e-3 + 2**-8))
    assert trained_limit("bf16", 0.2, spread=1.0) == CEILING["bf16"]
    assert trained_limit("bf16", 0.7, spread=1.0) == 1.4


STOCK = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
import torch
import gatrain
from gatrain.compose import compose
from gatrain.train.ranks import Ranks
from gatrain.verify.ranks import Cases
from gatrain.verify.looks import Verification
import transformers as tf

SIZES = dict(vocab_size=90, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)

def gpt2(): return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=90, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                                    bos_token_id=0, eos_token_id=0))
def bert(): return tf.BertForSequenceClassification(tf.BertConfig(num_labels=3, **SIZES))
def llama(): return tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=1, max_position_embeddings=16,
                                                       bos_token_id=0, eos_token_id=0, **SIZES))
def t5(): return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=90, d_model=16, d_kv=8, d_ff=32, num_layers=2,
                                                           num_heads=2, decoder_start_token_id=1, pad_token_id=1))
def keras_net():
    import keras
    given = keras.Input((6,))
    hidden = keras.layers.LayerNormalization()(keras.layers.Dense(16, activation="gelu")(given))
    return keras.Model(given, keras.layers.Dense(3)(keras.layers.Dropout(0.3)(hidden)))

class Rows(list):
    pass

def tokens(kind):
    drawn = torch.Generator().manual_seed(0)
    rows = Rows()
    for _ in range(30):
        length = int(torch.randint(4, 12, (1,), generator=drawn))
        ids = torch.randint(2, 90, (length,), generator=drawn)
        labels = ids.clone() if kind == "tokens" else torch.randint(3, (1,), generator=drawn)
        rows.append((ids, labels))
    return rows

def numbers():
    drawn = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(torch.randn(30, 6, generator=drawn), torch.arange(30) % 3)

class Hugging(gatrain.Task):
    variable_length = True
    def __init__(self, model, data, shift=0):
        self.make, self.train_data, self.shift = model, data, shift
    def build_model(self): return self.make()
    def collate(self, samples):
        longest = max(len(ids) for ids, _ in samples)
        def pad(row, value): return torch.nn.functional.pad(row, (0, longest - len(row)), value=value)
        labels = torch.stack([pad(l, -100) if len(l) > 1 else l for _, l in samples])
        return {"input_ids": torch.stack([pad(i, 1) for i, _ in samples]), "labels": labels,
                "attention_mask": torch.stack([pad(torch.ones_like(i), 0) for i, _ in samples])}
    def weight(self, batch): return int((batch["labels"][:, self.shift:] != -100).sum())
    def loss_sum(self, model, batch):
        count = self.weight(batch)
        return model(**batch).loss * count, count

if __name__ == "__main__":
    for name in sys.argv[1:]:
        config = compose(name.split()).config
        proof = Verification(config, torch.device("cpu"), Ranks(), precision=config.precision, checkpointing="none")
        proof.inspect()
        for c in Cases(proof).one_process(4):
            passed = c["error"] is None and (c["relative_error"] <= c["tolerance"]) != c["mutation"]
            print("CASE", passed, name, c["name"], c["precision"], c["relative_error"], c["tolerance"], c["error"])
"""


def test_stock_models_come_out_exact_with_dropout_in_their_configs(folder: Path) -> None:
    for package in ("transformers", "keras"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    (folder / "stock.py").write_text(STOCK)
    recipes = {"gpt2": "tokens", "llama": "tokens", "t5": "tokens", "bert": "classes"}
    for name, kind in recipes.items():
        shift = int(name in ("gpt2", "llama"))
        (folder / "recipes" / f"{name}.yaml").write_text(
            f"defaults: [base, _self_]\nmodel: {{_target_: stock.{name}}}\n"
            f"data: {{_target_: stock.tokens, kind: {kind}}}\n"
            f"task: {{_target_: stock.Hugging, shift: {shift}}}\nbatch: {{effective: 10}}\n"
        )
    (folder / "recipes" / "keras.yaml").write_text(
        "defaults: [base, _self_]\nmodel: {_target_: stock.keras_net}\ndata: {_target_: stock.numbers}\n"
        "batch: {effective: 10}\n"
    )
    words = [f"recipe={name} precision=bf16" for name in recipes] + ["recipe=keras precision=fp32"]
    done = subprocess.run(
        [sys.executable, "stock.py", *words], cwd=folder, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [line for line in done.stdout.splitlines() if line.startswith("CASE")]
    assert len(cases) > 4 * 7
    assert not [line for line in cases if not line.startswith("CASE True")], "\n".join(cases)
    assert {name for name in (*recipes, "keras") if any(f"recipe={name} " in line for line in cases)} == {
        *recipes, "keras"
    }  # fmt: skip
