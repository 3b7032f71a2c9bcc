"""Keras 3 on the torch backend: `fit` accumulates, and its batch size is the effective batch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_docs import SETUP, example

import gatrain
from gatrain.errors import ConfigError, ExactnessError

X = np.random.default_rng(0).normal(size=(23, 6))
Y = np.stack([np.sin(X.sum(1)), X[:, 0] * X[:, 1]], axis=1)
WEIGHTS = np.random.default_rng(1).uniform(size=23)


@pytest.fixture(scope="module")
def keras() -> Any:
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = "torch"
    found = pytest.importorskip("keras")
    if before is None:
        del os.environ["KERAS_BACKEND"]
    if found.backend.backend() != "torch":
        pytest.skip("Keras was imported with another backend")
    floatx = found.config.floatx()
    found.config.set_floatx("float64")
    yield found
    found.config.set_floatx(floatx)


def net(keras: Any, *middle: Any) -> Any:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(16, activation="gelu", kernel_regularizer="l2"),
            *middle,
            layers.LayerNormalization(),
            layers.Dense(2),
        ]
    )


def fitted(
    keras: Any, model: Any, loss: Any = "mse", sample_weight: Any = None, **options: Any
) -> tuple[Any, Any]:
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss, metrics=["mae"], **options)
    history = model.fit(X, Y, batch_size=10, epochs=2, shuffle=False, verbose=0, sample_weight=sample_weight)
    return weights(model), history.history


def weights(model: Any) -> list[Any]:
    return [weight.value.detach().numpy().copy() for weight in model.weights]


@pytest.mark.parametrize("sample_weight", [None, WEIGHTS], ids=["plain", "sample weights"])
def test_fit_in_pieces_makes_the_steps_of_whole_batches(keras: Any, sample_weight: Any) -> None:
    """Batches of 10, 10 and 3 in pieces of 4: weights, loss and metrics of two epochs, up to what Keras rounds: it
    takes means in fp32 even where all else is fp64. Averaged micro-batch means would be 1e-2 off."""
    wanted, right = fitted(keras, net(keras), sample_weight=sample_weight)
    pieces = gatrain.accumulate_in_fit(net(keras), micro_batch=4)
    found, history = fitted(keras, pieces, sample_weight=sample_weight)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-7)
    for name in right:
        np.testing.assert_allclose(history[name], right[name], rtol=2e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras saves with numpy 2
def test_no_forward_sees_more_than_a_micro_batch(keras: Any, tmp_path: Path) -> None:
    seen = []
    model = gatrain.accumulate_in_fit(net(keras), micro_batch=4)
    model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    fitted(keras, model)
    assert seen[0] == 10  # Keras builds the model with a batch that has no numbers
    assert seen[1:] == 2 * [4, 4, 2, 4, 4, 2, 3]
    model.save(tmp_path / "model.keras")  # nothing of the wrapper is in the way
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for one, other in zip(weights(loaded), weights(model), strict=True):
        np.testing.assert_array_equal(one, other)


def _with(keras: Any, **options: Any) -> Any:
    return fitted(keras, gatrain.accumulate_in_fit(net(keras), 4), **options)


def _own_train_step(keras: Any) -> Any:
    class Own(keras.Model):
        def train_step(self, data: Any) -> Any:
            return {}

    return gatrain.accumulate_in_fit(Own(), 4)


def _keras_accumulation(keras: Any) -> Any:
    model = gatrain.accumulate_in_fit(net(keras), 4)
    model.compile(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), loss="mse")
    return model.fit(X, Y, verbose=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            lambda keras: _with(keras, loss=keras.losses.MeanSquaredError(reduction="sum")),
            "No update was made",
        ),
        (
            lambda keras: _with(
                keras,
                loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"),
                sample_weight=WEIGHTS,
            ),
            "No update was made",
        ),
        (lambda keras: _with(keras, loss=lambda y, p: torch.std(p - y)), "No update was made"),
        (
            lambda keras: fitted(
                keras, gatrain.accumulate_in_fit(net(keras, keras.layers.ActivityRegularization(l2=1.0)), 4)
            ),
            "adds a loss of its own",
        ),
        (_own_train_step, "train_step of its own"),
        (_keras_accumulation, "batch_size is the effective batch already"),
        (lambda keras: gatrain.accumulate_in_fit(torch.nn.Linear(1, 1), 4), "takes a keras.Model"),
        (lambda keras: gatrain.accumulate_in_fit(net(keras), 0), "at least 1"),
    ],
)
def test_what_would_not_be_the_whole_batch_is_refused(
    keras: Any, given: Callable[[Any], Any], words: str
) -> None:
    with pytest.raises((ConfigError, ExactnessError), match=words):
        given(keras)


def test_batch_statistics_are_warned_of(keras: Any) -> None:
    with pytest.warns(UserWarning, match="BatchNormalization takes its statistics"):
        gatrain.accumulate_in_fit(net(keras, keras.layers.BatchNormalization()), 4)


@pytest.mark.usefixtures("keras")
def test_the_example_of_the_docs_trains_as_without_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "torch")  # which the example sets: put back afterwards
    pieces: dict[str, Any] = {}
    exec(example(SETUP) + example("Keras 3"), pieces)
    whole: dict[str, Any] = {}
    exec(
        example(SETUP) + re.sub(r"^network = gatrain.*\n", "", example("Keras 3"), flags=re.MULTILINE), whole
    )
    for one, other in zip(weights(pieces["network"]), weights(whole["network"]), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-7)
