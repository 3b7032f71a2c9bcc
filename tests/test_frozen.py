"""Laws of `frozen_randomness`: a batch and its pieces agree, whatever draws, and nothing stays changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gatrain.train.frozen import frozen_randomness

ROWS = torch.randn(7, 5, 8, generator=torch.Generator().manual_seed(0))


class Lambda(nn.Module):
    """A layer that applies a function in training mode, between two that learn."""

    def __init__(self, function) -> None:
        super().__init__()
        self.before, self.after, self.function = nn.Linear(8, 8), nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(8, 8, num_layers=2, dropout=0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, selective: bool = False) -> None:
        super().__init__()
        self.inner, self.reentrant, self.selective = Lambda(_drop_path), reentrant, selective

    def forward(self, x: Tensor) -> Tensor:
        kept = [torch.ops.aten.addmm.default]
        more = {"context_fn": lambda: create_selective_checkpoint_contexts(kept)} if self.selective else {}
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant, **more)


def _drop_path(x: Tensor) -> Tensor:
    keep = 0.7
    mask = x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)
    return F.dropout(x * mask, 0.2) + 0.1 * torch.randn_like(x)


def _random_order(x: Tensor) -> Tensor:
    kept = torch.rand(x.shape[:2]).argsort(dim=1)[:, :3]
    return x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


MODELS = {
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.AlphaDropout(0.3)),
    "F.dropout": lambda: Lambda(lambda x: F.dropout(x, 0.3)),
    "torch.dropout": lambda: Lambda(lambda x: torch.dropout(x, 0.3, True)),
    "F.dropout1d": lambda: Lambda(lambda x: F.dropout1d(x, 0.3)),
    "F.alpha_dropout": lambda: Lambda(lambda x: F.alpha_dropout(x, 0.3, True)),
    "F.feature_alpha_dropout": lambda: Lambda(lambda x: F.feature_alpha_dropout(x, 0.3, True)),
    "native_dropout": lambda: Lambda(lambda x: torch.native_dropout(x, 0.3, True)[0]),
    "rrelu": lambda: Lambda(lambda x: F.rrelu(x, training=True)),
    "drop path": lambda: Lambda(_drop_path),
    "mask of numbers": lambda: Lambda(lambda x: x * torch.rand(x.shape[:2]).gt(0.2).unsqueeze(-1)),
    "integer mask": lambda: Lambda(lambda x: x * torch.empty(x.shape, dtype=torch.int64).bernoulli_(0.8)),
    "gumbel": lambda: Lambda(lambda x: F.gumbel_softmax(x, hard=True)),
    "noise of a distribution": lambda: Lambda(lambda x: x + torch.distributions.Normal(x, 1.0).rsample()),
    "choice": lambda: Lambda(
        lambda x: x + torch.multinomial(x[..., 0].softmax(-1), 2).unsqueeze(1).sum(-1, True)
    ),
    "time step": lambda: Lambda(lambda x: x * torch.randint(1, 100, (len(x),)).view(-1, 1, 1)),
    "order": lambda: Lambda(_random_order),
    "sdpa": lambda: Lambda(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4)),
    "lstm": Recurrent,
    "attention": Attention,
    "own generator": lambda: Lambda(lambda x: x + torch.rand(x.shape, generator=torch.Generator())),
    "checkpoint, reentrant": lambda: Checkpointed(True),
    "checkpoint": lambda: Checkpointed(False),
    "checkpoint, selective": lambda: Checkpointed(False, selective=True),
}


def _gradient(model: nn.Module, rows: list[Tensor]) -> Tensor:
    model.zero_grad()
    for each in rows:
        model(each.clone()).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_and_its_pieces_have_equal_gradients(name: str) -> None:
    torch.manual_seed(1)
    model = MODELS[name]().train().double()
    rows = ROWS.double()
    with frozen_randomness(model):
        whole = _gradient(model, [rows])
        pieces = _gradient(model, [rows[:1], rows[1:4], rows[4:]])
    assert whole.norm() > 0
    assert (whole - pieces).norm() <= 1e-12 * whole.norm()
    assert all(module.training for module in model.modules())


def test_dropout_passes_everything_on_and_the_gradient_with_it() -> None:
    x = ROWS.clone().requires_grad_()
    with frozen_randomness(nn.Identity()):
        (torch.native_dropout(x, 0.5, True)[0] + F.dropout(x, 0.5) + F.dropout1d(x, 0.2)).sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 3.0))


def test_it_works_under_autocast() -> None:
    torch.manual_seed(1)
    model = Attention().train()
    with frozen_randomness(model), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ROWS)[:2], model(ROWS)[:2])


def test_afterwards_random_numbers_are_random_again() -> None:
    model = Recurrent().train()
    with frozen_randomness(model):
        pass
    assert model.layers.dropout == 0.4
    assert not torch.equal(torch.rand(4), torch.rand(4))
