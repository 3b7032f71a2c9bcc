"""`checkpointing=offload` and `every_2`: waiting in main memory or computed again, a gradient keeps every bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from test_engine import convolutional, deeper_gpt, engine, gradient
from torch import Tensor, nn

from gatrain.errors import ConfigError
from gatrain.train import offload
from gatrain.train.checkpointing import apply_checkpointing, available_modes, blocks_of
from gatrain.train.offload import Offloading, forward_context

TOKENS = torch.randint(17, (3, 8), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
MODELS = {"gpt": (deeper_gpt, TOKENS), "convolutions": (convolutional, IMAGES)}


@pytest.fixture(autouse=True)
def _everything_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 1)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[offload._Away]]:
    """Whatever is taken away."""
    made: list[weakref.ref[offload._Away]] = []
    init = offload._Away.__init__

    def noted(self: offload._Away, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        made.append(weakref.ref(self))

    monkeypatch.setattr(offload._Away, "__init__", noted)
    return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["offload", "every_2"])
def test_a_mode_changes_no_bit_of_the_gradient(
    name: str, mode: str, taken: list[weakref.ref[offload._Away]]
) -> None:
    make, batch = MODELS[name]
    found = []
    for checkpointing in ("none", mode):
        one = engine(make, checkpointing=checkpointing)
        for _ in range(2):  # accumulated
            one.micro_step(batch, {"loss": 0.25})
        found.append((gradient(one.model), [buffer.clone() for buffer in one.model.buffers()]))
    (plain, buffers), (given, others) = found
    assert torch.equal(given, plain)
    assert all(map(torch.equal, buffers, others))
    assert bool(taken) == (mode == "offload")


def test_what_was_taken_away_is_let_go_with_the_graph(taken: list[weakref.ref[offload._Away]]) -> None:
    one = engine(deeper_gpt, checkpointing="offload")
    gc.disable()  # a circle of references would hold main memory until it runs
    try:
        one.micro_step(TOKENS, {"loss": 0.25})
        assert len(taken) > 20
        assert not [each for each in taken if each() is not None]
    finally:
        gc.enable()


def test_parameters_small_and_expanded_tensors_stay(
    monkeypatch: pytest.MonkeyPatch, taken: list[weakref.ref[offload._Away]]
) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 100)
    layer = nn.Linear(8, 8)
    x = torch.randn(2, 8)
    with Offloading(layer).forward():
        small = layer(x)  # keeps 64 bytes and a view of the weight
        one = torch.randn(1, requires_grad=True).expand(64)
        total = small.sum() + (one * one).sum()
    assert not taken
    with Offloading(layer).forward():
        total = total + layer(torch.randn(8, 8)).sum()
    assert len(taken) == 1
    total.backward()


def test_a_graph_may_be_used_twice() -> None:
    layer = nn.Linear(8, 8)
    with Offloading(layer).forward():
        total = layer(torch.randn(4, 8)).square().sum()
    (first,) = torch.autograd.grad(total, [layer.weight], retain_graph=True)
    (second,) = torch.autograd.grad(total, [layer.weight])
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_code_keeps_its_activations_there_too(taken: list[weakref.ref[offload._Away]]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    call = torch.compile(layers, dynamic=False, backend="aot_eager", fullgraph=True)
    x, found = torch.randn(4, 8), []
    for mode in ("none", "offload"):
        layers.zero_grad()
        with forward_context(mode, layers, torch.enable_grad)():
            total = call(x).square().sum()
        total.backward()
        found.append(gradient(layers))
    assert taken
    assert torch.equal(*found)


def test_every_nth_block_is_computed_again_and_no_other() -> None:
    model = deeper_gpt()
    blocks, calls = blocks_of(model), [0] * len(blocks_of(model))
    assert {"every_4", "every_3", "every_2"} <= set(available_modes(model))
    for nth, block in enumerate(blocks):
        block.attention.register_forward_pre_hook(lambda *_, nth=nth: calls.__setitem__(nth, calls[nth] + 1))
    apply_checkpointing(model, "every_3")
    model(TOKENS).sum().backward()
    assert calls == [2 if nth % 3 == 0 else 1 for nth in range(len(blocks))]


def test_fewer_blocks_than_asked_for_are_refused() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential()) for _ in range(2)))
    assert available_modes(model) == ("none", "selective", "every_2", "full")
    with pytest.raises(ConfigError, match=r"has 2 block\(s\). Use checkpointing=full"):
        apply_checkpointing(model, "every_3")


# --- on a GPU ----------------------------------------------------------------------------------------------


def _deep(width: int = 1024, layers: int = 12) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    made = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*made).cuda(), torch.randn(8192, width, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_transfers_beside_the_computation_change_no_bit_and_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 2**20)
    model, x = _deep()
    found, peaks = [], []
    for mode in ("none", "offload", "offload", "offload"):
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):  # memory that the allocator gives again would show a copy that came too late
            with forward_context(mode, model, torch.enable_grad)():
                total = model(x).square().sum()
            total.backward()
        torch.cuda.synchronize()
        found.append(gradient(model))
        peaks.append(torch.cuda.max_memory_allocated())
    assert all(torch.equal(found[0], each) for each in found[1:])
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_mode_is_offered() -> None:
    assert available_modes(_deep(8, 2)[0])[-1] == "offload"


def test_what_is_kept_twice_is_taken_away_once(taken: list[weakref.ref[offload._Away]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(7, 4)
    model(x).square().sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    with Offloading(model).forward():
        loss = model(x).square().sum()
    assert len(taken) == 4  # the input, what either ReLU gives (which the next layer keeps, too), the result
    loss.backward()
    for parameter, right in zip(model.parameters(), wanted, strict=True):
        assert right is not None
        assert torch.equal(parameter.grad, right)  # type: ignore[arg-type]
