"""Laws of the built-in models: shapes, names, precision, and samples that do not see each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gatrain.errors import ConfigError
from gatrain.models.gpt import GPT, rotary_tables, rotate
from gatrain.models.resnet import resnet50, small_resnet


def tiny_gpt(**options: object) -> GPT:
    torch.manual_seed(0)
    return GPT(**{"vocab_size": 50, "context": 16, "layers": 2, "heads": 2, "width": 16, **options})  # type: ignore[arg-type]


@pytest.fixture(params=["rotary", "learned"])
def gpt(request: pytest.FixtureRequest) -> GPT:
    return tiny_gpt(positions=request.param, bias=request.param == "learned")


def tokens(batch: int = 3, length: int = 16) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(1))


def test_gpt_gives_logits_for_every_position(gpt: GPT) -> None:
    assert gpt(tokens()).shape == (3, 16, 50)
    assert gpt(tokens(1, 5)).shape == (1, 5, 50)


def test_gpt_position_does_not_see_later_tokens(gpt: GPT) -> None:
    before = tokens()
    after = before.clone()
    after[:, 9:] = (after[:, 9:] + 1) % 50
    torch.testing.assert_close(gpt(before)[:, :9], gpt(after)[:, :9])
    assert not torch.allclose(gpt(before)[:, 9:], gpt(after)[:, 9:])


def test_gpt_knows_the_order_of_tokens(gpt: GPT) -> None:
    ordered = tokens(1, 8)
    swapped = ordered.clone()
    swapped[0, [0, 3]] = ordered[0, [3, 0]]
    assert ordered[0, 0] != ordered[0, 3]
    assert not torch.allclose(gpt(ordered)[0, -1], gpt(swapped)[0, -1])


def test_gpt_state_dict_names_every_tensor_once(gpt: GPT) -> None:
    state = gpt.state_dict()
    addresses = [tensor.data_ptr() for tensor in state.values()]
    assert len(addresses) == len(set(addresses))
    assert set(state) == {name for name, _ in gpt.named_parameters()}  # no table of positions among them


def test_gpt_in_fp64_is_fp64_throughout(gpt: GPT) -> None:
    double = gpt.double()
    whole = double(tokens())
    assert whole.dtype == torch.float64
    parts = torch.cat([double(tokens()[:1]), double(tokens()[1:])])
    torch.testing.assert_close(whole, parts, rtol=1e-13, atol=1e-15)


def test_gpt_runs_under_bf16_autocast(gpt: GPT) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = gpt(tokens())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), gpt(tokens()), rtol=0.1, atol=0.02)


def test_gpt_builds_without_memory_and_with_equal_sizes() -> None:
    with torch.device("meta"):
        empty = tiny_gpt()
    real = tiny_gpt()
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_gpt2_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = GPT(50257, 1024, 12, 12, 768, positions="learned", bias=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_gpt_starts_near_the_uniform_distribution_with_scaled_residual_branches() -> None:
    model = tiny_gpt(vocab_size=500, width=64, layers=8)
    logits = model(torch.randint(500, (4, 16)))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(500, (64,)))
    assert abs(loss.item() - math.log(500)) < 0.2
    block = model.blocks[0]
    assert block.mlp.hidden.weight.std().item() == pytest.approx(0.02, rel=0.1)  # type: ignore[union-attr]
    assert block.mlp.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)  # type: ignore[union-attr]


def test_gpt_every_parameter_gets_a_gradient(gpt: GPT) -> None:
    gpt(tokens()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in gpt.parameters())


def test_rotation_depends_on_distance_only() -> None:
    cos, sin = rotary_tables(32, 8)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> Tensor:
        return (rotate(q, cos[i : i + 1], sin[i : i + 1]) * rotate(k, cos[j : j + 1], sin[j : j + 1])).sum()

    torch.testing.assert_close(score(3, 1), score(23, 21), rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_gpt(dropout=0.5)
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"heads": 3}, "model.heads=2"),
        ({"heads": 16}, "positions=learned"),
        ({"positions": "rotari"}, "Did you mean 'rotary'"),
        ({"layers": 0}, "model.layers=0"),
        ({"dropout": 1.0}, "model.dropout"),
    ],
)
def test_gpt_refuses_sizes_that_do_not_go_together(options: dict[str, object], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        tiny_gpt(**options)


def test_gpt_names_both_lengths_when_a_sequence_is_too_long() -> None:
    with pytest.raises(ConfigError, match=r"17 tokens.*context=16.*model\.context=17"):
        tiny_gpt()(tokens(1, 17))


@pytest.mark.parametrize("channels", [(8, 16), (12, 20, 24)])
def test_small_resnet_samples_are_independent(channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = small_resnet(10, channels).double()
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    assert model(images).shape == (5, 10)
    torch.testing.assert_close(model(images)[:2], model(images[:2]), rtol=1e-12, atol=1e-14)


def test_small_resnet_with_batch_norm_is_not_independent() -> None:
    model = small_resnet(10, (8, 16), norm="batch")
    images = torch.randn(5, 1, 8, 8)
    assert not torch.allclose(model(images)[:2], model(images[:2]))


@pytest.mark.parametrize(("norm", "kind"), [("group", nn.GroupNorm), ("batch", nn.BatchNorm2d)])
def test_resnet50_uses_the_named_norm_everywhere(norm: str, kind: type[nn.Module]) -> None:
    with torch.device("meta"):
        model = resnet50(classes=7, norm=norm)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)
    norms = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))]
    assert len(norms) == 53
    assert all(type(m) is kind for m in norms)


def test_unknown_norm_and_no_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.norm=grop.*Did you mean 'group'"):
        small_resnet(10, norm="grop")
    with pytest.raises(ConfigError, match=r"model\.norm=layer"):
        resnet50(norm="layer")
    with pytest.raises(ConfigError, match=r"model\.classes=0"):
        resnet50(classes=0)
    with pytest.raises(ConfigError, match=r"model\.channels"):
        small_resnet(10, channels=[])
