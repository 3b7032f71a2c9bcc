"""Whatever a model's factory does, it is made; and what cannot be made says why, with all its causes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import command
import pytest
import torch
from torch import nn

from gatrain import build
from gatrain.causes import told
from gatrain.compose import compose
from gatrain.config import RunConfig
from gatrain.errors import ConfigError, chain
from gatrain.inspection import inspect_run
from gatrain.train.groups import exempt_from_decay

STRANGER = '''
import copy, functools
import numpy as np, torch
from torch import nn
from stranger_package.deep import Table


class Paths(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        rates = [x.item() for x in torch.linspace(0, 0.1, depth)]
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in rates)


def pretrained():
    """As from_pretrained: refuses the meta device, with an error wrapped in another."""
    if torch.get_default_device().type == "meta":
        try:
            raise NotImplementedError("no numbers here")
        except NotImplementedError as error:
            raise OSError("cannot load the weights") from error
    return nn.Linear(4, 4)


class Average(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.average.weight.numpy()


class Numbers(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.from_numpy(np.random.randn(4, 4)).float())
        self.bias.data += torch.tensor(np.ones(4, np.float32))


def lazy_import():
    import torch._dynamo.config
    from torch.distributed.device_mesh import DeviceMesh
    from torch._dynamo import optimize
    return Table(4)


def leaves_a_default():
    device = torch.zeros(1).device.type
    if device == "meta":
        torch.set_default_device("meta")
    raise RuntimeError(f"half way on {device}")


@functools.cache
def encoder():
    return nn.Linear(4, 4)


def cached():
    """What the attempt without memory made is still there in the next."""
    net = nn.Sequential(encoder(), nn.Linear(4, 4))
    net[0].weight.sum().item()
    return net


def points():
    return torch.utils.data.TensorDataset(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long))


def deep_failure():
    try:
        try:
            {}["the key"]
        except KeyError as error:
            raise ValueError("a level between") from error
    except ValueError as error:
        raise RuntimeError("could not load") from error


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8))


def lazy_called():
    net = lazy()
    net(torch.zeros(1, 4))
    return net


def on_meta():
    return nn.Linear(4, 4, device="meta")


class AllInOne(__import__("gatrain").Task):
    """Makes its model and data itself."""
    def __init__(self, width=4):
        self.width, self.train_data = width, points()
    def build_model(self):
        return nn.Linear(4, self.width)
    def weight(self, batch):
        return len(batch[0])
    def loss_sum(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[0])


class WantsModel(AllInOne):
    def __init__(self, model):
        self.build_model, self.train_data = model, points()
'''


DEEP = """
from torch import nn
class Table(nn.Linear):
    def __init__(self, n): super().__init__(n, n)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stranger.py").write_text(STRANGER)
    package = tmp_path / "stranger_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text(DEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def words(here: Path, *lines: str) -> list[str]:
    (here / "recipes").mkdir(exist_ok=True)
    text = "\n".join(["defaults: [base, _self_]", *lines, "batch: {effective: 4}"])
    (here / "recipes" / "mine.yaml").write_text(text)
    return ["recipe=mine"]


def composed(here: Path, model: str) -> Any:
    lines = [f"model: {{_target_: stranger.{model}}}", "data: {_target_: stranger.points}"]
    return compose(words(here, *lines), here)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("Paths", 60),
        ("pretrained", 20),
        ("Average", 40),
        ("Numbers", 20),
        ("lazy_import", 20),
        ("lazy_called", 40),
    ],
)
def test_what_cannot_be_made_without_memory_is_made_for_real(here: Path, model: str, parameters: int) -> None:
    task = build.build_task(composed(here, model).config)
    made = build.model_for_a_look(task, 0)
    assert sum(p.numel() for p in made.parameters()) == parameters
    assert torch.zeros(1).device.type == "cpu"


def test_a_default_device_that_a_failed_attempt_left_is_put_back(here: Path) -> None:
    task = build.build_task(composed(here, "leaves_a_default").config)
    with pytest.raises(ConfigError, match="half way on cpu"):
        build.model_for_a_look(task, 0)
    assert torch.zeros(1).device.type == torch.get_default_device().type == "cpu"


def test_what_the_attempt_without_memory_left_in_a_cache_is_gone_in_a_fresh_process(here: Path) -> None:
    assert inspect_run(composed(here, "cached").yaml).parameters == 40


@pytest.mark.parametrize(
    ("model", "text"), [("lazy", "1.weight has no shape yet: LazyLinear"), ("on_meta", "meta device")]
)
def test_parameters_without_shape_or_numbers_are_refused_by_name(here: Path, model: str, text: str) -> None:
    task = build.build_task(composed(here, model).config)
    with pytest.raises(ConfigError, match=text):
        build.build_model(task, 0, torch.device("cpu"))


def test_a_failure_shows_every_cause_once_and_the_users_line(here: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        inspect_run(composed(here, "deep_failure").yaml)
    lines = str(raised.value).splitlines()
    assert lines[0] == "model: could not make stranger.deep_failure: RuntimeError: could not load"
    assert lines[1:3] == ["  caused by ValueError: a level between", "  caused by KeyError: 'the key'"]
    assert f"at {here / 'stranger.py'}:" in lines[3]
    assert len(lines) == 4


def test_a_chain_ends_and_respects_from_none() -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__context__ = second, first
    assert chain(first) == [first, second]
    hidden = ValueError("shown")
    hidden.__context__, hidden.__suppress_context__ = OSError("hidden"), True
    assert told(hidden) == "ValueError: shown"


# --- tasks that bring everything --------------------------------------------------------------------------


def test_a_task_that_makes_its_own_model_and_data_needs_no_nodes_for_them(here: Path) -> None:
    recipe = words(here, "task: {_target_: stranger.AllInOne, width: 3}")
    settings = ["train.steps=1", "batch.micro=2", "device=cpu", "run.dir=out"]
    done = command.run("fit", *recipe, *settings)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["task: {_target_: stranger.WantsModel}"], "model has no _target_, but stranger.WantsModel takes"),
        (["task: {_target_: stranger.AllInOne}", "data: {_target_: a.b}"], "takes no argument 'data'"),
        (["model: {_target_: torch.nn.Linear}"], "data has no _target_"),
    ],
)
def test_a_task_and_its_nodes_fit_together(here: Path, lines: list[str], text: str) -> None:
    recipe = words(here, *lines)
    with pytest.raises(ConfigError, match=text):
        build.check_targets(compose(recipe, here).config)


# --- keywords ---------------------------------------------------------------------------------------------


def plain(size: int, depth: int = 1) -> nn.Module:
    return nn.Linear(size, depth)


@functools.wraps(plain)
def wrapped(*args: Any, **kwargs: Any) -> nn.Module:
    kwargs.pop("anything", None)
    return plain(*args, **kwargs)


class Claims:
    """Says less than it takes."""

    __signature__ = __import__("inspect").signature(plain)

    def __init__(self, **options: Any) -> None:
        self.options = options


class Meta(type):
    def __call__(cls, *args: Any, **options: Any) -> Any:
        return super().__call__()


class ByMeta(metaclass=Meta):
    def __init__(self) -> None: ...


class Auto:
    @classmethod
    def from_config(cls, config: Any, **more: Any) -> Any:
        return config

    def __init__(self) -> None: ...


half = functools.partial(plain, depth=2)
cached = functools.lru_cache(plain)


def node(name: str, **options: Any) -> RunConfig:
    target = {"_target_": f"{__name__}.{name}", **options}
    task = {"_target_": f"{__name__}.Auto.from_config", "config": 0}
    return RunConfig(model=target, data={"_target_": "torch.utils.data.TensorDataset"}, task=task)


def make(name: str, **options: Any) -> None:
    config = node(name, **options)
    build.check_targets(config)
    build.instantiate("model", config.model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wrapped", {"size": 1, "anything": 2}),
        ("Claims", {"num_labels": 3}),
        ("ByMeta", {"x": 1}),
        ("half", {"size": 1}),
        ("half", {"size": 1, "depth": 3}),
        ("Auto.from_config", {"config": 1, "num_labels": 3}),
        ("cached", {"size": 1}),
    ],
)
def test_keywords_that_the_callable_takes_are_accepted(name: str, options: dict[str, Any]) -> None:
    make(name, **options)


@pytest.mark.parametrize("name", ["plain", "cached", "half", "wrapped"])
def test_a_misspelt_keyword_gets_the_nearest_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model.sise is not an argument .* Did you mean 'size'"):
        make(name, sise=1)


@pytest.mark.parametrize("name", ["plain", "wrapped"])
def test_a_missing_argument_is_named_behind_a_decorator_too(name: str) -> None:
    with pytest.raises(ConfigError, match="needs the argument 'size'"):
        make(name)


# --- weight decay -----------------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed, self.other = nn.Parameter(torch.ones(1, 2, 3)), nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))
        self.other._no_weight_decay = True  # type: ignore[attr-defined]
        self.table = nn.Embedding(3, 3)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "bias"}


def test_what_a_model_lists_gets_no_weight_decay_wherever_the_model_is() -> None:
    assert set(exempt_from_decay(Tokens())) == {"pos_embed", "other"}
    assert set(exempt_from_decay(nn.Sequential(Tokens()))) == {"0.pos_embed", "0.other"}
    assert not exempt_from_decay(nn.Linear(2, 2))
