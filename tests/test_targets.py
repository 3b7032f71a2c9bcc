"""What a configuration names is called only if it may be: hostile targets have no effect, harmless ones work."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import command
import pytest
from hostile import Payload

from gatrain import build, commands, target_rules, targets, trust
from gatrain.errors import ConfigError


def T(target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"_target_": target, **({"_args_": list(args)} if args else {}), **kwargs}


MODULE = """
import asyncio
import collections
import contextlib
import functools
import operator
import os
import subprocess
import sys

import numpy as np
import torch
from torch import nn

run = os.system
partial = functools.partial(os.system)
nested = functools.partial(functools.partial(subprocess.run), check=False)
caller = operator.methodcaller("unlink")
cached = functools.lru_cache(os.system)
given = functools.partial(map, os.system)
Popen = subprocess.Popen
loads = torch.load
bound = __import__("pathlib").Path("victim").unlink
table = {}
update = table.update

@functools.wraps(os.system)
def wrapped(command):
    return os.system(command)

class Net(nn.Linear):
    @classmethod
    def small(cls, width=2):
        return cls(width, width)
    @staticmethod
    def plain():
        return Net(2, 2)
    class Inner:
        def __init__(self, width=1):
            self.width = width

class Points(torch.utils.data.Dataset):
    def __init__(self, count=24, note=None):
        self.note = note
        self.x = torch.randn(count, 4)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        return self.x[index], index % 2

@functools.lru_cache
def remembered(width=3):
    return width

@contextlib.contextmanager
def context():
    yield 1

@torch.no_grad()
def quiet(width=3):
    return torch.zeros(width)

half = functools.partial(Net, 2)
made = Net(2, 2)
Pair = collections.namedtuple("Pair", "a b", module="mine", defaults=(1, 2))

def keeps(**given):
    return given

def config_of(path):
    return {"_target_": "os.system", "command": f"touch {path}"}
"""


def forget_modules() -> None:
    for known in (targets._is_stdlib, targets._is_installed, targets._is_users):
        known.cache_clear()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "victim").write_text("keep")
    (tmp_path / "pickled").write_bytes(pickle.dumps(Payload(tmp_path, "mark")))
    (tmp_path / "script.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    (tmp_path / "hubconf.py").write_text(f"def m():\n    open({str(tmp_path / 'mark')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    forget_modules()
    yield tmp_path
    sys.modules.pop("mine", None)


X, V, P, S = "mark", "victim", "pickled", "script.py"
TOUCH, CODE = "touch mark", "open('mark', 'w')"
HOSTILE: dict[str, dict[str, Any]] = {
    # Python's own
    "os.system": T("os.system", TOUCH),
    "posix.system": T("posix.system", TOUCH),
    "posixpath.os.system": T("posixpath.os.system", TOUCH),
    "nt alias": T("os.path.os.system", TOUCH),
    "subprocess.Popen": T("subprocess.Popen", ["touch", X]),
    "builtins.exec": T("builtins.exec", CODE),
    "builtins.open": T("builtins.open", X, "w"),
    "io.open": T("io.open", X, "w"),
    "_io.open": T("_io.open", X, "w"),
    "pathlib unlink": T("pathlib.Path.unlink", T("pathlib.Path", V)),
    "shutil.move": T("shutil.move", V, X),
    "tempfile": T("tempfile.NamedTemporaryFile", dir=".", prefix=X, delete=False),
    "logging.FileHandler": T("logging.FileHandler", X),
    "logging.config": T("logging.config.dictConfig", {"version": 1, "handlers": {"a": {"()": "os.system"}}}),
    "sqlite3": T("sqlite3.connect", X),
    "ctypes": T("ctypes.CDLL", None),
    "pickle": T("pickle.load", T("io.open", P, "rb")),
    "shelve": T("shelve.open", X),
    "dbm": T("dbm.dumb.open", X, "n"),
    "zipfile": T("zipfile.ZipFile", X, "w"),
    "runpy": T("runpy.run_path", S),
    "importlib": T("importlib.import_module", "script"),
    "pkgutil": T("pkgutil.resolve_name", "os:system"),
    "code": T("code.interact"),
    "this": T("this.s"),
    "antigravity": T("antigravity.webbrowser.open", "http://127.0.0.1:9"),
    "idlelib": T("idlelib.run.main"),
    "test": T("test.support.os_helper.unlink", V),
    "functools.partial": T("functools.partial", T("os.system", TOUCH)),
    "operator.call": T("operator.call", T("hydra.utils.get_method", path="os.system"), TOUCH),
    "harmless stdlib, too": T("collections.OrderedDict"),
    # by another way
    "through torch": T("torch.os.system", TOUCH),
    "through logging": T("logging.os.system", TOUCH),
    "through numpy": T("numpy.os.system", TOUCH),
    "through a deep module": T("torch.utils.cpp_extension.subprocess.check_call", ["touch", X]),
    "through one's own module": T("mine.os.system", TOUCH),
    "alias": T("mine.run", TOUCH),
    "class alias": T("mine.Popen", ["touch", X]),
    "partial of one's own": T("mine.partial", TOUCH),
    "partial of a partial": T("mine.nested", ["touch", X]),
    "partial with a function": T("mine.given", [TOUCH]),
    "methodcaller": T("mine.caller", T("mine.Path")),
    "cache around": T("mine.cached", TOUCH),
    "decorated": T("mine.wrapped", TOUCH),
    "bound method": T("mine.bound"),
    "method of a mapping": T("mine.update", a=1),
    "numpy under another name": T("mine.np.load", P, allow_pickle=True),
    "torch.load under another name": T("mine.loads", P, weights_only=False),
    "get_method": T("hydra.utils.get_method", path="os.system"),
    "get_class by position": T("hydra.utils.get_class", "subprocess.Popen"),
    "get_object": T("hydra.utils.get_object", path="mine.run"),
    "instantiate": T("hydra.utils.instantiate", {"a": 1}),
    "OmegaConf": T("omegaconf.OmegaConf.save", {"a": 1}, X),
    "inner node": T("mine.keeps", deep=[{"er": T("os.system", TOUCH)}]),
    "inner, by position": T("mine.keeps", **{"_args_": [T("os.system", TOUCH)]}),
    "inner, not made": T("mine.keeps", _recursive_=False, a=T("os.system", TOUCH)),
    "partial node": T("os.system", TOUCH, _partial_=True),
    # private names
    "private": T("mine._hidden"),
    "dunder": T("mine.Net.__init__.__globals__"),
    "subclasses": T("mine.Net.__subclasses__"),
    "code of a function": T("mine.wrapped.__code__"),
    "private module": T("torch._C._jit_set_profiling_mode", False),
    "not a dotted name": T("mine..run", TOUCH),
    "with a colon": T("os:system", TOUCH),
    "not text": {"_target_": ["os.system"]},
    # gatrain's own
    "slurm": T("gatrain.launch.schedulers.sbatch.submit", S),
    "slurm, any program": T("gatrain.launch.schedulers.slurm.run", "touch", X),
    "write_text": T("gatrain.rundir.write_text", T("pathlib.Path", X), "x"),
    "atomic file": T("gatrain.rundir.atomic_file", X),
    "remove_run": T("gatrain.fit.claim.remove_run", "."),
    "worker": T("gatrain.launch.local.run_workers", "this", "."),
    "offspring": T("gatrain.offspring.start", ["-c", CODE]),
    "build": T("gatrain.build.instantiate", "k", {"_target": "x"}),
    "trust": T("gatrain.trust.accept", ["os.system"]),
    "subprocess of gatrain": T("gatrain.launch.schedulers.slurm.subprocess.run", ["touch", X]),
    "base of a task": T("gatrain.tasks.Task.build_model"),
    # what unpickles
    "torch.load": T("torch.load", P, weights_only=False),
    "torch.load, unsaid": T("torch.load", P),
    "torch.load with a module": T("torch.load", P, weights_only=True, pickle_module=1),
    "torch.serialization": T("torch.serialization.load", P, weights_only=False),
    "torch.jit.load": T("torch.jit.load", P),
    "torch.package": T("torch.package.PackageImporter", P),
    "torch.export.load": T("torch.export.load", P),
    "torch.distributed": T("torch.distributed.checkpoint.load", {}, checkpoint_id="."),
    "numpy.load": T("numpy.load", P, allow_pickle=True),
    "numpy.load by position": T("numpy.load", P, None, True),
    "text from an address": T("numpy.loadtxt", "http://127.0.0.1:9/x"),
    "table from an address": T("pandas.read_csv", filepath_or_buffer="http://127.0.0.1:9/x"),
    "numpy.load as text": T("numpy.load", P, allow_pickle="yes"),
    "numpy format": T("numpy.lib.format.read_array", P, allow_pickle=True),
    "joblib": T("joblib.load", P),
    "pandas": T("pandas.read_pickle", P),
    "pandas, hidden": T("datasets.load_dataset", "pandas", data_files=P),
    "dill": T("dill.load_module", P),
    "cloudpickle": T("cloudpickle.loads", "x"),
    "keras": T("keras.saving.load_model", P),
    "keras from_config": T("keras.Sequential.from_config", {"name": "x", "layers": []}),
    "keras activation": T("keras.layers.Dense", 2, activation={"module": "os", "class_name": "system"}),
    "yaml": T("yaml.unsafe_load", "!!python/object/apply:os.system ['touch mark']"),
    # what runs programs or others' code
    "asyncio": T("asyncio.run", T("asyncio.create_subprocess_shell", TOUCH)),
    "setuptools": T("setuptools._distutils.spawn.spawn", ["touch", X]),
    "pip": T("pip.main", ["--version"]),
    "torch.hub": T("torch.hub.load", ".", "m", source="local"),
    "torch extension": T("torch.utils.cpp_extension.load_inline", "x", ""),
    "torch.ops": T("torch.ops.load_library", P),
    "torch.classes": T("torch.classes.load_library", P),
    "torch benchmark": T("torch.utils.benchmark.Timer", CODE),
    "torch launcher": T("torch.multiprocessing.spawn", 1),
    "torch from_file": T("torch.from_file", X, shared=True, size=8),
    "torch file writer": T("torch.PyTorchFileWriter", X),
    "torch.fx": T("torch.fx.GraphModule", {}, {}),
    "numpy.testing": T("numpy.testing.runstring", CODE, {}),
    "numpy.test": T("numpy.test", extra_argv=["--version"]),
    "numpy.f2py": T("numpy.f2py.compile", "x"),
    "pandas.eval": T("pandas.eval", "1"),
    "sympify": T("sympy.sympify", CODE),
    "pytest": T("pytest.main", ["--version"]),
    "psutil": T("psutil.Popen", ["touch", X]),
    "click": T("click.launch", X),
    "Jinja": T("jinja2.Template", "x"),
    "transformers' remote code": T("transformers.AutoModel.from_pretrained", ".", trust_remote_code=True),
    "remote code further in": T("transformers.pipeline", "x", model_kwargs={"trust_remote_code": "true"}),
    "transformers' dynamic modules": T(
        "transformers.dynamic_module_utils.get_class_from_dynamic_module", "a", "."
    ),
    "remote code of a data set": T("datasets.load_dataset", ".", trust_remote_code=True),
    "SQL": T("datasets.Dataset.from_sql", "select 1", "sqlite:///mark"),
    "a pipe": T("mine.keeps", urls="pipe:touch mark"),
    "conversion": T("transformers.convert_slow_tokenizer.convert_slow_tokenizer", 1),
    "checkpoints": T("transformers.trainer_utils.rotate_checkpoints", "."),
    "ffmpeg": T("transformers.pipelines.audio_utils.ffmpeg_read", "x", 1),
    "Ghostscript": T("PIL.EpsImagePlugin.Ghostscript", 1, 1, 1),
    "clipboard": T("pandas.io.clipboard.init_xclip_clipboard"),
    "notebook": T("accelerate.notebook_launcher", 1),
    "template": T("sklearn._build_utils.tempita.process_tempita", V),
    # what fetches, writes or deletes
    "torch.save": T("torch.save", 1, X),
    "url": T("torch.hub.download_url_to_file", "http://127.0.0.1:9/x", X),
    "torchvision download": T("torchvision.datasets.utils.download_url", "http://127.0.0.1:9/x", "."),
    "hub": T("huggingface_hub.hf_hub_download", "a", "b"),
    "snapshot": T("huggingface_hub.snapshot_download", "a"),
    "sklearn": T("sklearn.datasets.fetch_openml", "x"),
    "numpy.memmap": T("numpy.memmap", V, mode="w+", shape=1),
    "numpy.save": T("numpy.save", X, [1]),
    "tofile": T("numpy.ndarray.tofile", T("numpy.zeros", 1), X),
    "savetxt": T("numpy.savetxt", X, [1]),
    "safetensors": T("safetensors.torch.save_file", {}, X),
    "image": T("torchvision.utils.save_image", T("torch.zeros", 3, 2, 2), "mark.png"),
    "h5py": T("h5py.File", V, "w"),
    "to_csv": T("pandas.DataFrame.to_csv", T("pandas.DataFrame"), X),
    "push": T("transformers.GPT2Model.push_to_hub", "x"),
    "lock": T("filelock.FileLock", X),
    "file system": T("fsspec.open", X, "w"),
    "pyarrow": T("pyarrow.OSFile", V, "w"),
    "tensorboard": T("torch.utils.tensorboard.SummaryWriter", X),
    "clearing": T("sklearn.datasets.clear_data_home", "."),
    "adapter files": T("peft.tuners.lora.corda.preprocess_corda", 1),
    "netcdf": T("scipy.io.netcdf_file", X, "w"),
    "PDF": T("PIL.PdfParser.PdfParser", X),
    "plot": T("matplotlib.pyplot.savefig", X),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_target_is_refused_and_has_no_effect(here: Path, name: str) -> None:
    before = sorted(path.name for path in here.iterdir() if path.name != "__pycache__")
    with pytest.raises(ConfigError) as refused:
        build.instantiate("data.note", HOSTILE[name])
    assert refused.value.exit_code == 2
    assert "data.note" in str(refused.value)
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == before
    assert (here / V).read_text() == "keep"
    words = (
        "is refused: ",
        "not a dotted name",
        "not the dotted name",
        "has no ",
        "does not import",
        "importing ",
    )
    assert any(word in str(refused.value) for word in words), refused.value


def test_what_is_refused_by_its_name_is_not_even_imported(here: Path) -> None:
    names = (
        "this",
        "antigravity",
        "idlelib.run",
        "test.regrtest",
        "turtle",
        "pip",
        "jinja2.sandbox",
        "pytest",
    )
    code = (
        "import sys\nfrom gatrain import targets\nfrom gatrain.errors import ConfigError\n"
        f"for name in {names!r}:\n"
        "    try:\n        targets.locate('model', name + '.x')\n"
        "    except ConfigError:\n        pass\n"
        f"print([name for name in {names!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_message_says_what_was_named_what_it_is_why_and_what_to_type(here: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        build.instantiate("loss", T("mine.run", "true"))
    text = str(refused.value)
    assert text.startswith(
        "loss._target_=mine.run resolves to posix.system and is refused: posix belongs to Python's "
    )
    assert text.endswith("add --trust mine.run to the command.")


GPT2 = T("transformers.GPT2Config", n_layer=1, n_head=1, n_embd=4, vocab_size=8)
HARMLESS: dict[str, dict[str, Any]] = {
    "module": T("torch.nn.Linear", 2, 2),
    "keywords": T("torch.nn.Linear", in_features=2, out_features=2),
    "nested": T("torch.nn.Sequential", T("torch.nn.Linear", 2, 2), T("torch.nn.ReLU")),
    "loss": T("torch.nn.CrossEntropyLoss", label_smoothing=0.1),
    "function of torch": T("torch.zeros", 2),
    "functional, later": T("torch.nn.functional.gelu", _partial_=True),
    "einsum": T("torch.einsum", "i,i->i", T("torch.ones", 2), T("torch.ones", 2)),
    "optimizer, later": T("torch.optim.AdamW", lr=0.1, _partial_=True),
    "scheduler, later": T("torch.optim.lr_scheduler.StepLR", step_size=1, _partial_=True),
    "data set": T("torch.utils.data.TensorDataset", T("torch.zeros", 2)),
    "random": T("torch.Generator"),
    "distribution": T("torch.distributions.Normal", 0.0, 1.0),
    "average": T("torch.optim.swa_utils.get_ema_multi_avg_fn", 0.9),
    "initialisation": T("torch.nn.init.xavier_uniform_", T("torch.empty", 2, 2)),
    "seed": T("torch.manual_seed", 1),
    "tensors' weights only": T("torch.load", "weights.pt", weights_only=True),
    "vision model": T("torchvision.models.resnet18", num_classes=2),
    "vision transform": T("torchvision.transforms.v2.Compose", [T("torchvision.transforms.v2.ToImage")]),
    "vision data": T("torchvision.datasets.FakeData", 2),
    "vision function": T("torchvision.transforms.functional.resize", _partial_=True, size=2),
    "timm": T("timm.create_model", "resnet10t", num_classes=2),
    "timm transform": T("timm.data.create_transform", 8),
    "numpy": T("numpy.load", "numbers.npy"),
    "numpy random": T("numpy.random.default_rng", 1),
    "numpy zeros": T("numpy.zeros", 2),
    "numpy exp": T("numpy.exp", 1.0),
    "scikit-learn": T("sklearn.datasets.load_iris"),
    "scikit-learn's model": T("sklearn.linear_model.LinearRegression"),
    "pandas": T("pandas.DataFrame", {"a": [1]}),
    "csv": T("pandas.read_csv", "table.csv"),
    "matlab, later": T("scipy.io.loadmat", _partial_=True),
    "schedule, later": T("transformers.get_cosine_schedule_with_warmup", _partial_=True),
    "pipeline, later": T("transformers.pipeline", _partial_=True, task="text-generation"),
    "collator": T("transformers.DefaultDataCollator"),
    "joined data": T("datasets.concatenate_datasets", [T("datasets.Dataset.from_dict", {"a": [1]})]),
    "adapters, later": T("peft.get_peft_model", _partial_=True),
    "table of numbers": T("pandas.concat", [T("pandas.Series", [1])]),
    "network": T("networkx.path_graph", 2),
    "Pillow": T("PIL.Image.new", "L", [2, 2]),
    "data sets": T("datasets.Dataset.from_dict", {"a": [1]}),
    "data from JSON": T("datasets.load_dataset", _partial_=True, path="json", data_files="x.json"),
    "configuration": T("transformers.GPT2Config", n_layer=1),
    "model": T("transformers.GPT2LMHeadModel", GPT2),
    "auto": T("transformers.AutoModelForCausalLM.from_config", GPT2),
    "pretrained": T("transformers.AutoModelForCausalLM.from_pretrained", "local", trust_remote_code=False),
    "tokenizer, later": T("transformers.AutoTokenizer.from_pretrained", "gpt2", _partial_=True),
    "adapter": T("peft.LoraConfig", r=2),
    "own class": T("mine.Net", 2, 2),
    "own class method": T("mine.Net.small", width=3),
    "own static method": T("mine.Net.plain"),
    "own inner class": T("mine.Net.Inner"),
    "own cached function": T("mine.remembered"),
    "own context": T("mine.context"),
    "own decorated function": T("mine.quiet"),
    "own partial": T("mine.half", 3),
    "own instance": T("mine.made", T("torch.zeros", 1, 2)),
    "own named tuple": T("mine.Pair"),
    "class without a call": T("hydra.utils.get_class", path="torch.nn.Linear"),
    "method without a call": T("hydra.utils.get_method", "mine.quiet"),
    "gatrain's model": T("gatrain.models.resnet.small_resnet", classes=2),
    "gatrain's data": T("gatrain.data.Digits"),
    "gatrain's task": T("gatrain.tasks.Supervised", _partial_=True),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_target_works(here: Path, name: str) -> None:
    if name == "tensors' weights only":
        import torch

        torch.save({"a": torch.zeros(1)}, "weights.pt")
    if name == "numpy":
        import numpy

        numpy.save("numbers.npy", [1])
    if name == "csv":
        Path("table.csv").write_text("a\n1\n")
    if name == "pretrained":
        import transformers

        config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8)
        transformers.GPT2LMHeadModel(config).save_pretrained("local")
    pytest.importorskip(HARMLESS[name]["_target_"].partition(".")[0])
    assert build.instantiate("data", HARMLESS[name]) is not None


@pytest.mark.parametrize("name", ["build", "ray", "wheel", "redis", "py", "kaggle"])
def test_ones_own_module_may_be_called_like_a_package(here: Path, name: str) -> None:
    (here / f"{name}.py").write_text("def load_it(width=1):\n    return width\n")
    sys.modules.pop(name, None)
    forget_modules()
    try:
        targets.check_name("data", f"{name}.load_it", here)
        assert build.instantiate("data", T(f"{name}.load_it")) == 1
    finally:
        sys.modules.pop(name, None)


def test_a_module_of_ones_own_that_python_hides_is_named(here: Path) -> None:
    (here / "test.py").write_text("def net():\n    return 1\n")
    targets.check_name("model", "test.net", here)  # where it is called, the folder may come first
    sys.modules.pop("test", None)
    path, sys.path = sys.path, [folder for folder in sys.path if folder not in ("", str(here))]
    try:
        forget_modules()
        with pytest.raises(ConfigError, match=r"hides your test\.py"):
            targets.locate("model", "test.net")
    finally:
        sys.path = path


def test_every_shipped_target_is_public() -> None:
    root = Path(__file__).parent.parent
    for path in [*root.glob("conf/**/*.yaml"), *root.glob("recipes/*.yaml")]:
        for line in (each.split("#")[0] for each in path.read_text().splitlines()):
            if "_target_:" in line:
                targets.locate("x", line.partition("_target_:")[2].strip())
    for name in target_rules.PUBLIC:
        assert targets.locate("x", name) is not None


def test_trust_admits_exactly_what_it_names(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_trusted", ())
    trust.accept(["collections.OrderedDict", "mine.run"])
    assert build.instantiate("data", T("collections.OrderedDict")) == {}
    assert build.instantiate("data", T("mine.run", "true")) == 0
    for other in ("collections.Counter", "os.system", "mine.os.system"):
        with pytest.raises(ConfigError):
            build.instantiate("data", T(other, "true"))
    trust.accept(["posix.system"])  # as it resolves
    assert build.instantiate("data", T("mine.run", "true")) == 0
    for wrong in ("os", "os.*", "a b.c", ""):
        with pytest.raises(ConfigError, match="dotted name"):
            trust.accept([wrong])


def test_what_a_target_returns_is_not_read_as_configuration(here: Path) -> None:
    made = build.instantiate("data", T("mine.config_of", "mark"))
    kept = build.instantiate("task", T("mine.keeps"), data=made)
    text = build.instantiate("data", T("mine.keeps", note="${oc.create:'{_target_: os.system}'}"))
    assert kept["data"] == {"_target_": "os.system", "command": "touch mark"}
    assert text == {"note": "${oc.create:'{_target_: os.system}'}"}
    assert not (here / "mark").exists()


def test_hydras_own_words_keep_their_meaning(here: Path) -> None:
    node = T("mine.keeps", a=[1, {"b": T("mine.remembered")}], c={"d": None})
    copy = json.loads(json.dumps(node))
    assert build.instantiate("data", node) == {"a": [1, {"b": 3}], "c": {"d": None}}
    assert node == copy
    raw = build.instantiate("data", node | {"_recursive_": False})
    assert raw["a"][1]["b"] == {"_target_": "mine.remembered"}
    assert raw["a"] is not node["a"]
    later = build.instantiate("data", node | {"_partial_": True})
    assert later(e=1)["e"] == 1
    container = build.instantiate("data", node | {"_convert_": "none"})
    assert container["c"].d is None
    assert build.instantiate("task", T("mine.keeps", data=1), data=2) == {"data": 2}


RECIPE = """
defaults: [base, _self_]
model: {_target_: mine.Net, _args_: [4, 2]}
data: {_target_: mine.Points}
batch: {effective: 8, micro: 4}
train: {steps: 2, check: "off"}
precision: fp32
device: cpu
save: {every: 1}
"""


def gatrain(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return command.run(*words, **env)


def test_only_the_command_line_can_give_trust(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe, tampered run folder and environment: refused by each command, before anything is called."""
    monkeypatch.setenv("GATRAIN_CACHE", str(here / "cache"))
    (here / "recipes").mkdir()
    (here / "recipes" / "own.yaml").write_text(RECIPE)
    hostile = ["recipe=own", "+data.note={_target_: mine.run, _args_: ['touch mark']}"]
    believed = {
        "HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE": "posix.system:mine.run", "GATRAIN_INHERITED_TRUST": "mine.run"
    }  # fmt: skip
    refused = gatrain("autotune", *hostile, **believed)
    assert refused.returncode == 2, refused.stderr
    assert "mine.run resolves to posix.system and is refused" in refused.stderr
    assert not (here / "mark").exists()
    told = gatrain("autotune", "recipe=own", "data.note._target_=os.system", "+data.note.command=touch mark")
    assert told.returncode == 2

    trusted = gatrain("fit", *hostile, "run.dir=run", "--trust", "mine.run")
    assert trusted.returncode == 0, trusted.stderr
    (here / "mark").unlink()
    for path in (here / "run").glob("*.*"):  # nothing there gives it again
        if path.suffix in (".json", ".txt") and "--trust" in path.read_text():
            path.write_text(path.read_text())
    resumed = gatrain("resume", "run", "train.steps=3", **believed)
    assert resumed.returncode == 2, resumed.stderr
    assert not (here / "mark").exists()
    resumed = gatrain("resume", "run", "train.steps=3", "--trust", "mine.run")
    assert resumed.returncode == 0, resumed.stderr
    assert (here / "mark").exists()


def test_commands_that_are_printed_keep_the_trust_and_take_none_from_a_file(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gatrain.rundir import RunDir, write_json

    monkeypatch.setattr(trust, "_trusted", ("mine.run",))
    run = RunDir(here / "run")
    assert commands.resume(run).endswith("--trust mine.run")
    write_json(
        run.env, {"command": ["fit", "--trust", "os.system", "a=b", "--trust=x.y"], "working_dir": str(here)}
    )
    monkeypatch.setattr(trust, "_trusted", ())
    again = commands.again(run)
    assert again is not None
    assert again.words == ("fit", "a=b")
