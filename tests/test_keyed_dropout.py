"""`dropout: keyed`: a sample's masks are the same in every split, on every rank, and where they are drawn again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run_on_ranks
from test_exact_gradient import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatrain.config import SGDConfig
from gatrain.errors import ConfigError, ExactnessError
from gatrain.plan import StepSettings
from gatrain.tasks import Supervised
from gatrain.train.accumulate import gradient_step
from gatrain.train.check import check_loss
from gatrain.train.checkpointing import apply_checkpointing
from gatrain.train.dropout import RandomNumbers
from gatrain.train.dropout.keyed import KeyedDropout
from gatrain.train.dropout.masks import keep_mask, sample_keys
from gatrain.train.engine import Engine
from gatrain.train.gradient import GradientStrategy
from gatrain.train.micro_batches import LoadedWindow, MicroBatch
from gatrain.train.ranks import Ranks
from gatrain.train.step import Step

SAMPLES, LENGTH, WIDTH = 13, 6, 8
SEED = (7, 1, 5)
CPU = torch.device("cpu")


class DropPath(nn.Module):
    """As timm has it: a module by this name with a ``drop_prob`` that draws through no function of torch.nn."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty([len(x), 1, 1]).bernoulli_(1 - self.drop_prob) / (1 - self.drop_prob)


class Block(nn.Module):
    """Dropout as a module that is called twice, as a function, in attention, of whole channels, and of paths."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout, self.channels, self.path = nn.Dropout(0.3), nn.Dropout1d(0.2), DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.dropout(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.25, is_causal=True)
        y = self.out(self.channels(y.transpose(1, 2).flatten(2)))
        return x + self.path(self.dropout(F.dropout(y.tanh(), 0.1, self.training)))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.alpha, self.head = nn.AlphaDropout(0.2), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.alpha(x)).squeeze(-1)


class TwoPasses(GradientStrategy):
    """All forwards once without a graph, then each again with one: what cached representations do."""

    exact = "the same"

    def __call__(self, window: LoadedWindow, step: Step) -> None:
        for with_graph in (False, True):
            for k, batch in step.batches(window):
                step.seed(window, k)
                with torch.set_grad_enabled(with_graph), step.autocast():
                    total = step.loss_sum(batch)["loss"][0]
                if with_graph:
                    step.backward(total * step.scale["loss"])
                    step.counts.add({"loss": (total, float(len(batch)))})


def made(block: type[nn.Module] = Block) -> Net:
    torch.manual_seed(0)
    return Net(block).double().train()


def rows() -> Tensor:
    return torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def gradient(
    sizes: Sequence[int],
    *,
    first: int = 0,
    ranks: Ranks | None = None,
    random: RandomNumbers | None = None,
    checkpointing: str = "none",
    strategy: GradientStrategy | None = None,
    model: nn.Module | None = None,
    seed: tuple[int, ...] = SEED,
) -> Tensor:
    """Of a window's samples from ``first`` on, cut into micro-batches of these sizes."""
    model, random = model or made(), random or KeyedDropout()
    random.set_up(model)
    apply_checkpointing(model, checkpointing)
    step = gradient_step(
        model,
        lambda batch: {"loss": ((model(batch) ** 2).sum(), float(len(batch)))},
        term_names=["loss"],
        ranks=ranks or Ranks(),
        stage=lambda batch: lambda: batch,
        strategy=strategy,
        random=random,
    )
    micro_batches, x = [], rows()
    for size in sizes:
        batch = x[first : first + size]
        micro_batches.append(MicroBatch(batch, {"loss": float(size)}, samples=size, position=first))
        first += size
    step.gradient(LoadedWindow(micro_batches, seed=seed))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def on_two_ranks() -> list[float]:
    ranks = Ranks.current()
    sizes, first = ([5, 2, 1], 0) if ranks.rank == 0 else ([1, 3, 1], 8)
    return gradient(sizes, first=first, ranks=ranks).tolist()


@pytest.fixture(scope="module")
def whole() -> Tensor:
    return gradient([SAMPLES])


@pytest.mark.parametrize("sizes", [[4, 4, 4, 1], [1, 3, 2, 5, 2], [1] * SAMPLES], ids=str)
def test_a_sample_has_the_same_masks_in_every_split(whole: Tensor, sizes: list[int]) -> None:
    assert relative_error(gradient(sizes), whole) < 1e-12


def test_the_masks_are_there_and_those_of_torch_depend_on_the_split(whole: Tensor) -> None:
    assert relative_error(gradient([SAMPLES], model=made().eval()), whole) > 0.1
    assert relative_error(gradient([SAMPLES], seed=(7, 1, 6)), whole) > 0.1
    torches = [gradient(sizes, random=RandomNumbers()) for sizes in ([SAMPLES], [4, 4, 4, 1])]
    assert relative_error(*torches) > 0.1


def test_two_processes_with_unequal_shares_draw_what_one_draws(whole: Tensor) -> None:
    for found in run_on_ranks(2, on_two_ranks):
        assert relative_error(torch.tensor(found, dtype=torch.float64), whole) < 1e-12


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_a_block_that_is_computed_again_draws_the_same(checkpointing: str) -> None:
    given = gradient([4, 4, 4, 1], checkpointing=checkpointing)
    assert torch.equal(given, gradient([4, 4, 4, 1]))


def test_a_second_pass_over_the_window_draws_the_same(whole: Tensor) -> None:
    assert relative_error(gradient([4, 4, 4, 1], strategy=TwoPasses()), whole) < 1e-12


def test_a_models_own_checkpointing_draws_the_same_or_is_refused() -> None:
    class Again(Block):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = made()
            self.blocks = self.net.blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)  # whole blocks, from outside
            return self.net.head(self.net.alpha(x)).squeeze(-1)

    assert torch.equal(gradient([4, 9], model=Outside()), gradient([4, 9]))
    with pytest.raises(ExactnessError, match=r"by itself.*checkpointing=selective"):
        gradient([4, 9], model=made(Again))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_code_draws_the_same_without_a_graph_break(whole: Tensor) -> None:
    for checkpointing in ("none", "full"):
        torch._dynamo.reset()
        model, random = made(), KeyedDropout()
        random.set_up(model)
        apply_checkpointing(model, checkpointing)
        calls = [
            torch.compile(block._call_impl, dynamic=False, backend="aot_eager", fullgraph=True)
            for block in model.blocks
        ]
        random.start(SEED, range(SAMPLES))
        with random.around(torch.enable_grad)():
            x = rows()
            for call in calls:
                x = call(x)
            total = (model.head(model.alpha(x)) ** 2).sum() / SAMPLES
        total.backward()
        assert relative_error(torch.cat([p.grad.flatten() for p in model.parameters()]), whole) < 1e-12


def test_autocast_draws_the_same() -> None:
    masks = []
    for enabled in (False, True):
        random = KeyedDropout()
        random.set_up(nn.Identity())
        random.start(SEED, range(4))
        with random.around(lambda enabled=enabled: torch.autocast("cpu", torch.bfloat16, enabled=enabled))():
            masks.append(F.dropout(nn.Linear(5, 64)(torch.ones(4, 5)), 0.5) != 0)
    assert torch.equal(*masks)


def test_outside_of_a_keyed_forward_torch_draws() -> None:
    random = KeyedDropout()
    random.set_up(nn.Identity())
    random.start(SEED, range(4))
    torch.manual_seed(3)
    wanted = torch.empty(7, 5).bernoulli_(0.5) / 0.5
    torch.manual_seed(3)
    assert torch.equal(F.dropout(torch.ones(7, 5), 0.5), wanted)


def test_attention_and_alpha_dropout_are_those_of_torch_but_for_the_mask() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8).double()
    bias, holes = torch.randn(2, 4, 5, 5).double(), torch.rand(2, 1, 5, 5) < 0.7
    holes[0, 0, 2] = False  # a query that sees nothing
    random = KeyedDropout()
    random.set_up(nn.Identity())
    random.start(SEED, range(2))
    tiny = 1e-12  # drops nothing
    for values in (
        {"attn_mask": bias},
        {"attn_mask": holes},
        {"is_causal": True, "scale": 0.3},
    ):
        wanted = F.scaled_dot_product_attention(q, k, v, **values)
        with random.around(torch.enable_grad)():
            given = F.scaled_dot_product_attention(q, k, v, dropout_p=tiny, **values)
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)
    with random.around(torch.enable_grad)():
        dropped = F.alpha_dropout(torch.randn(2, 200_000), 0.3, True)
    assert dropped.mean().item() == pytest.approx(0, abs=0.01)  # mean and variance are kept
    assert dropped.var().item() == pytest.approx(1, abs=0.01)


def _gpt2() -> tuple[nn.Module, Callable[[nn.Module, slice], Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1,
        attn_implementation="eager",
    )  # fmt: skip
    ids = torch.arange(6 * 9).reshape(6, 9) % 50
    return transformers.GPT2LMHeadModel(config), lambda model, part: model(input_ids=ids[part]).logits


def _timm() -> tuple[nn.Module, Callable[[nn.Module, slice], Tensor]]:
    timm = pytest.importorskip("timm")
    rates = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.3}
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **rates), lambda model, part: model(
        IMAGES[part]
    )


def _swin() -> tuple[nn.Module, Callable[[nn.Module, slice], Tensor]]:
    models = pytest.importorskip("torchvision.models")
    made = models.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 2], [4, 4], dropout=0.1, attention_dropout=0.1, stochastic_depth_prob=0.3,
        num_classes=4,
    )  # fmt: skip
    return made, lambda model, part: model(IMAGES[part])


IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("make", [_gpt2, _timm, _swin], ids=["transformers", "timm", "torchvision"])
def test_models_of_the_libraries_draw_by_sample(make: Callable[[], Any]) -> None:
    found = []
    for sizes, mode in (([6], "none"), ([1, 3, 2], "none"), ([2, 4], "full")):
        torch.manual_seed(0)
        model, call = make()
        model.double().train()
        random = KeyedDropout(flattened=make is _swin)  # which cuts its images into windows
        random.set_up(model)
        apply_checkpointing(model, mode)
        first = 0
        for size in sizes:
            random.start(SEED, range(first, first + size))
            with random.around(torch.enable_grad)():
                total = (call(model, slice(first, first + size)) ** 2).sum()
            total.backward()
            first += size
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert all(relative_error(each, found[0]) < 1e-12 for each in found[1:])


# --- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_the_chance_to_be_kept_is_the_one_asked_for(keep: float) -> None:
    mask = keep_mask(sample_keys((1, 2), range(64), CPU), 0, (64, 100, 250), 0, keep).double()
    deviation = math.sqrt(keep * (1 - keep))
    assert abs(float(mask.mean()) - keep) < 5 * deviation / math.sqrt(mask.numel())
    for dims in ((1, 2), (0, 2), (0, 1)):  # samples, rows and columns, each by themselves
        means = mask.mean(dims)
        assert float((means - keep).abs().max()) < 6 * deviation / math.sqrt(mask.numel() / len(means))


def test_masks_of_samples_draws_rows_and_neighbours_are_independent() -> None:
    keys = sample_keys((1, 2), range(256), CPU)
    one, other = (keep_mask(keys, nth, (256, 16, 64), 0, 0.5).double() * 2 - 1 for nth in (0, 1))
    limit = 6 / math.sqrt(one.numel())

    def related(a: Tensor, b: Tensor) -> float:
        return abs(float((a * b).mean()))

    assert related(one, other) < limit
    for dim in (0, 1, 2):
        for step in (1, 2, 7):
            assert related(one, one.roll(step, dim)) < limit, (dim, step)
    # sums over a row: their variance tells of what pairs do not
    assert float(one.sum(2).var()) == pytest.approx(64, rel=6 * math.sqrt(2 / (256 * 16)))
    later = keep_mask(sample_keys((1, 3), range(256), CPU), 0, (256, 16, 64), 0, 0.5).double() * 2 - 1
    assert related(one, later) < limit


def test_a_mask_depends_on_the_sample_alone_not_on_its_batch_or_padding() -> None:
    whole = keep_mask(sample_keys(SEED, range(9), CPU), 2, (9, 2, 12, 12), 0, 0.7)
    part = keep_mask(sample_keys(SEED, [7, 3], CPU), 2, (2, 2, 8, 8), 0, 0.7)
    assert torch.equal(part, whole[[7, 3], :, :8, :8])
    time_first = keep_mask(sample_keys(SEED, range(9), CPU), 2, (2, 9, 12, 12), 1, 0.7)
    assert torch.equal(time_first.movedim(1, 0), whole)


# --- what is refused ---------------------------------------------------------------------------------------


def test_another_layout_is_refused_unless_told() -> None:
    def call(random: KeyedDropout, x: Tensor) -> Tensor:
        random.set_up(nn.Identity())
        random.start(SEED, range(4))
        with random.around(torch.enable_grad)():
            return F.dropout(x, 0.5)

    with pytest.raises(ExactnessError, match=r"batch_dim: 1.*flattened: true.*dropout=torch"):
        call(KeyedDropout(), torch.ones(6, 4, 3))
    assert call(KeyedDropout(batch_dim=1), torch.ones(6, 4, 3)).shape == (6, 4, 3)
    rows = call(KeyedDropout(flattened=True), torch.ones(12, 5))
    assert torch.equal(rows.view(4, 3, 5), call(KeyedDropout(), torch.ones(4, 3, 5)))
    with pytest.raises(ValueError, match="batch_dim=-1"):
        KeyedDropout(batch_dim=-1)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.LSTM(4, 4, 2, dropout=0.1), "between its layers"),
        (type("StochasticDepth", (nn.Module,), {"mode": "batch"})(), "mode='row'"),
    ],
    ids=["lstm", "stochastic depth by batch"],
)
def test_what_draws_for_a_whole_batch_is_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KeyedDropout().set_up(nn.Sequential(module))


def test_a_micro_batch_that_does_not_tell_its_samples_is_refused() -> None:
    x = rows()[:4]
    random = KeyedDropout()
    left_out = MicroBatch(x, {"loss": 4.0}, samples=4, dropped=1, position=0)
    with pytest.raises(ExactnessError, match="left out 1 sample"):
        random.seed(LoadedWindow([left_out], seed=SEED), 0)


class Beside(nn.Module):
    """Draws what no keys reach, and folds samples into each other's rows, as asked."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.layer, self.fault = nn.Linear(WIDTH, 3), fault

    def forward(self, x: Tensor) -> Tensor:
        if self.fault == "noise":
            x = x * torch.rand_like(x)
        return F.dropout(self.layer(x), 0.5, self.training)


class Points(torch.utils.data.Dataset[Any]):
    deterministic = True

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index)), index % 3


@pytest.mark.parametrize("fault", ["", "noise"])
def test_the_check_before_the_first_step_names_what_keys_do_not_reach(fault: str) -> None:
    task = Supervised(lambda: Beside(fault), Points(), loss=nn.CrossEntropyLoss())
    model = task.build_model().train()
    engine = Engine(
        task,
        model,
        StepSettings("fp32", "none", False, "window"),
        SGDConfig(),
        Ranks(),
        CPU,
        random=KeyedDropout(),
    )
    if not fault:
        assert check_loss(engine, range(12)) == []
        return
    with pytest.raises(ExactnessError, match=r"rand_like in .*dropout=torch"):
        check_loss(engine, range(12))
