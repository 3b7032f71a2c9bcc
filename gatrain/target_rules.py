"""What a `_target_` may not name, beside Python's own library and private names: tables, in one place.

Models, data sets, losses and tasks are made of other things. Where one is wanted all the same, ``--trust NAME``
says so.
"""

from __future__ import annotations

import re

PUBLIC = frozenset(
    {
        "gatrain.data.digits.Digits",
        "gatrain.data.docstrings.Docstrings",
        "gatrain.data.image_folder.ImageFolderData",
        "gatrain.data.mixture.Mixture",
        "gatrain.data.padded.PaddedText",
        "gatrain.data.text.TextWindows",
        "gatrain.models.gpt.GPT",
        "gatrain.models.gan.SmallGAN",
        "gatrain.models.resnet.SmallResNet",
        "gatrain.models.resnet.resnet50",
        "gatrain.models.resnet.small_resnet",
        "gatrain.models.two_towers.TwoTowers",
        "gatrain.tasks.contrastive.Contrastive",
        "gatrain.tasks.huggingface.HuggingFace",
        "gatrain.tasks.language_model.LanguageModel",
        "gatrain.tasks.gan.GAN",
        "gatrain.tasks.supervised.Supervised",
    }
)
"""All that configurations may name of gatrain, where it is defined."""

RUNS, READS, FETCHES, FILES = (
    "it runs programs or code that others chose",
    "it unpickles, and so runs what a file says",
    "it fetches what an address names",
    "it writes or deletes files",
)

_PACKAGES = {
    RUNS: """
        IPython ipykernel jupyter jupyter_client nbconvert nbformat notebook setuptools distutils pkg_resources
        pip _distutils_hack wheel build hatchling flit_core poetry pyproject_hooks pytest _pytest pluggy
        hypothesis coverage mypy mypyc ruff black typer click shellingham fire invoke fabric sh plumbum pexpect
        ptyprocess psutil execnet py anyio trio gevent eventlet twisted tornado flask django fastapi starlette
        uvicorn gunicorn werkzeug jinja2 mako chameleon sympy mpmath numexpr asteval simpleeval numba llvmlite
        cffi pycparser cython Cython pyximport pybind11 cppyy triton pyopencl cupy pycuda ray dask distributed
        celery multiprocess billiard loky hydra hydra_zen hydra_plugins omegaconf antlr4 jsonargparse gin
        tensorboard pydevd debugpy ipdb pudb docker kubernetes ansible paramiko gatrain_plugins mlflow wandb
        accelerate.commands lightning.pytorch.cli pytorch_lightning.cli lightning_utilities.core.imports
        """,
    READS: """
        dill cloudpickle joblib jsonpickle pickle5 pickleshare hickle klepto yaml ruamel skops sklearn.externals
        """,
    FETCHES: """
        requests urllib3 httpx httpx2 httpcore httpcore2 h11 h2 aiohttp websockets websocket pycurl wget gdown
        pooch kaggle kagglehub boto3 botocore s3transfer s3fs gcsfs adlfs smart_open cloudpathlib fsspec
        huggingface_hub hf_xet modelscope grpc sqlalchemy psycopg psycopg2 pymysql pymongo redis duckdb
        smbclient scipy.datasets skimage.data nltk.downloader torchvision.datasets.utils timm.models._hub
        """,
    FILES: """
        filelock portalocker send2trash watchdog matplotlib plotly tomlkit fontTools pygments rich absl namex
        packaging markdown threadpoolctl
        """,
}
_NAMES = {
    RUNS: """
        numpy.testing numpy.f2py numpy.distutils numpy.ctypeslib numpy.test numpy._pytesttester scipy._lib
        pandas.eval pandas.core.computation pandas.core.frame.DataFrame.eval pandas.core.frame.DataFrame.query
        pandas._testing pandas.testing PIL.ImageMath PIL.ImageShow PIL.ImageGrab PIL.Image.Image.show
        transformers.dynamic_module_utils transformers.utils transformers.commands transformers.cli
        transformers.agents transformers.tools transformers.testing_utils transformers.integrations
        transformers.onnx transformers.load_tool datasets.commands datasets.utils
        datasets.arrow_dataset.Dataset.from_sql datasets.builder datasets.streaming datasets.search
        PIL.Image.init transformers.exporters transformers.distributed sklearn.utils.estimator_checks
        sklearn._build_utils networkx.lazy_imports networkx.drawing scipy.odr keras.saving keras.src.saving
        keras.utils keras.src.utils keras.config keras.src.legacy keras.models.model_from_json
        keras.src.models.model sklearn.utils._testing accelerate.launchers accelerate.utils
        accelerate.test_utils peft.import_utils
        """,
    READS: """
        numpy.lib.npyio numpy.lib._npyio_impl numpy.lib.format numpy.lib._format_impl numpy.core.memmap
        numpy.loads pandas.read_pickle pandas.io.pickle pandas.read_hdf pandas.io.pytables
        pandas.compat.pickle_compat pandas.HDFStore datasets.packaged_modules torchvision.datasets.lsun
        sklearn.utils._joblib timm.models._helpers timm.utils networkx.readwrite.gpickle pyarrow.serialization
        pyarrow.deserialize transformers.modeling_utils.load_state_dict
        transformers.modeling_utils.load_sharded_checkpoint
        """,
    FETCHES: """
        numpy.DataSource numpy.lib._datasource datasets.download torchvision._internally_replaced_utils
        datasets.DownloadManager torchvision.datasets.video_utils keras.datasets keras.src.datasets
        transformers.image_utils transformers.video_utils
        """,
    FILES: """
        scipy.io torchvision.datasets.imagenet.parse_devkit_archive
        torchvision.datasets.imagenet.parse_train_archive torchvision.datasets.imagenet.parse_val_archive
        torchvision.datasets.imagenet.load_meta_file timm.models.repghost.repghost_model_convert
        timm.data.readers sklearn.datasets.clear_data_home sklearn.datasets._base.clear_data_home
        numpy._core.memmap numpy.memmap numpy.ndarray.tofile numpy.ndarray.dump numpy.fromregex
        pandas.ExcelWriter pandas.io.excel pyarrow.fs pyarrow._fs pyarrow.OSFile pyarrow.lib.OSFile
        pyarrow.memory_map pyarrow.create_memory_map pyarrow.lib.MemoryMappedFile pyarrow.MemoryMappedFile
        pyarrow.output_stream pyarrow.FileOutputStream pyarrow.parquet.ParquetWriter
        pyarrow.parquet.core.ParquetWriter pyarrow.csv.CSVWriter pyarrow._csv.CSVWriter
        pyarrow.RecordBatchFileWriter pyarrow.orc h5py.h5f
        """,
}
REFUSED: dict[str, str] = {
    name: why for table in (_PACKAGES, _NAMES) for why, names in table.items() for name in names.split()
}
"""Name, or beginning of a name at a dot -> why nothing of that name is called."""

_READERS = ("load", "loadtxt", "genfromtxt")
KEPT = frozenset(
    {
        "huggingface_hub.hub_mixin.PyTorchModelHubMixin",
        "huggingface_hub.hub_mixin.ModelHubMixin",
        "scipy.io.loadmat",
        "scipy.io.mmread",
        "scipy.io.matlab._mio.loadmat",
        "scipy.io._fast_matrix_market.mmread",
        "scipy.io.wavfile.read",
        *(
            f"{home}.{name}"
            for home in ("numpy", "numpy.lib.npyio", "numpy.lib._npyio_impl")
            for name in _READERS
        ),
    }
)
"""What models and data sets are read with, although its name begins like those that are refused. The arguments of
NumPy's readers are looked at."""

_CLASS = r"(?:[\w.]+\.)?_?[A-Z]\w*"
MADE_OF: dict[str, tuple[re.Pattern[str], str]] = {
    "torch": (
        re.compile(
            r"torch\.(nn|optim|distributions|functional|random|masked|nested|sparse|special|fft|linalg|signal|amp|func"
            r"|cuda\.amp|_functorch|_C\.(_nn|_fft|_linalg|_special|_nested|_sparse)|ao|_lobpcg|_jit_internal"
            r"|utils\.(data|checkpoint|_contextlib)|autograd\.(grad_mode|function|functional))(\..*)?"
            r"|torch\.[A-Za-z]*Tensor(\..*)?|torch\.(device|dtype|Size|Generator|memory_format|layout|finfo|iinfo)"
            r"|torch\._C\.(TensorBase|_TensorBase|Generator)(\..*)?"
            r"|torch\._VariableFunctionsClass\.(?!from_file)\w+"
            r"|torch\.jit\.(ScriptFunction|_script\.\w*ScriptModule)"
            r"|torch\.(compile|einsum|is_tensor|set_default_device|set_default_dtype|get_default_dtype|typename|vmap"
            r"|set_float32_matmul_precision|use_deterministic_algorithms|manual_seed|unravel_index)"
        ),
        "tensors' functions, torch.nn, torch.optim, torch.utils.data, torch.distributions and the like",
    ),
    "transformers": (
        re.compile(
            rf"transformers\.({_CLASS}(\.from_\w+)?|pipelines?(\.\w+)?|optimization\.get_\w+|activations\.\w+"
            r"|trainer_utils\.set_seed|data\.data_collator\.\w+|modeling_rope_utils\.\w+)"
        ),
        "classes, their from_pretrained and from_config, pipeline, schedules and collators",
    ),
    "datasets": (
        re.compile(
            rf"datasets\.({_CLASS}(\.from_\w+)?|(load\.)?load_(dataset|from_disk)|(combine\.)?\w+_datasets)"
        ),
        "classes, load_dataset, load_from_disk and what combines data sets",
    ),
    "pandas": (
        re.compile(
            r"pandas\.(?!io\.|util\.|read_|conftest)[\w.]+"
            r"|pandas\.(io\.[\w.]+\.)?read_(csv|json|table|fwf|parquet|feather|orc)"
        ),
        "what computes, and the readers of text, JSON and Parquet",
    ),
    "PIL": (
        re.compile(
            r"PIL\.(Image(|Ops|Filter|Enhance|Chops|Color|Draw|Font|Stat|Transform|Sequence|Palette))(\.\w+){1,2}"
        ),
        "Image, ImageOps, ImageFilter and the like",
    ),
    "peft": (
        re.compile(
            rf"peft\.({_CLASS}(\.from_\w+)?|([\w.]+\.)?(get_peft_(model|config)|inject_adapter_in_model"
            r"|prepare_model_for_kbit_training))"
        ),
        "classes, get_peft_model and get_peft_config",
    ),
    "accelerate": (
        re.compile(rf"accelerate\.({_CLASS}|(big_modeling\.)?init_\w+)"),
        "classes and init_empty_weights",
    ),
}
"""What models, data sets, losses and tasks are made of, for packages that do much else besides."""
_NOT_MADE_OF = re.compile(r"torch\.utils\.data\.datapipes\b.*")

_VERBS = re.compile(
    r"(^|_)(un)?pickles?(_|$)|pickle|unlink|rmtree|popen|subprocess|download|urlopen|urlretrieve|deseriali[sz]e"
    r"|write|upload|(^|_)(save|dump|remove|delete|del|exec|spawn|fetch|import|install|push|launch|rename|chmod|chown"
    r"|mkdir|makedirs|truncate|touch|kill|fork|shell|system|connect|retrieve|instantiate|export|send|requests?)"
    r"|^(load|loads|run|main|eval|evaluate|execute|test|open_url|load_model|load_module|load_tool|load_library"
    r"|load_checkpoint|load_state_dict|from_sql|show|edit|rmdir|move|copyfile|cli|from_config_dict)$"
    r"|^to_(file|csv|json|parquet|hdf|sql|excel|feather|stata|disk|html|xml|orc|gbq|clipboard)$"
    r"|_(file|files|dir|dirs|tree)_?(remove|delete)|^im(write|save)|^sav(e|ing)",
    re.IGNORECASE,
)


def does_more(function: str) -> bool:
    """Whether the name of an installed package's function says that it does more than compute."""
    return _VERBS.search(function) is not None


def is_kept(name: str) -> bool:
    """Whether the name, or its class, is one of those that are made for this."""
    return name in KEPT or any(name.startswith(f"{kept}.") for kept in KEPT)


def foreign(name: str) -> str | None:
    """Why a name of one of those packages is refused; None where it may be called."""
    top = name.partition(".")[0]
    if top not in MADE_OF or is_kept(name):
        return None
    known, what = MADE_OF[top]
    if known.fullmatch(name) and not _NOT_MADE_OF.fullmatch(name):
        return None
    if re.search(r"(^|[._])(load|package|serialization)\b", name) and top == "torch":
        return READS
    return f"of {top} a configuration may name {what}, not what loads, saves, compiles, fetches or launches"


def refusal(name: str) -> str | None:
    """Why a dotted name is refused; None where it is not."""
    if is_kept(name):
        return None
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (why := REFUSED.get(".".join(parts[:length]))) is not None:
            return why
    return None
