"""A secret of the command line is nowhere in clear but in config.yaml, and an ordinary word is not hidden."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import run

from gatrain import secrets
from gatrain.secrets import hide, redact, redact_value

WORDS = {
    "token": "data.token=S3CRETaaa",
    "camel case": "+data.hfToken=S3CRETaaa",
    "api key": "data.api_key=S3CRETbbb",
    "environment's way": "data.AWS_SECRET_ACCESS_KEY=S3CRETlll",
    "auth": "+data.auth=S3CRETccc",
    "personal access token": "data.pat=S3CRETddd",
    "qualified": "data.hf_token_value=S3CRETggg",
    "bearer": "data.bearer=S3CRETiii",
    "passphrase": "data.passphrase='S3CRETjjj with words'",
    "number": "data.token=8414443037",
    "short number": "data.password=84144",
    "user and password": "data.url='https://me:S3CRETeee@host/x'",
    "token as user": "data.url='https://S3CRETeee@github.com/x'",
    "data source name": "data.source='postgres://u:S3CREThhh@h/db'",
    "signed address": "data.url='https://h/x?X-Amz-Credential=S3CRETlll&X-Amz-Signature=S3CRETkkk&v=1'",
    "shared access": "data.url='https://h/x?a=1&sig=S3CRETxx&b=2'",
    "connection string": "data.connection_string='AccountKey=S3CRETmmm;'",
    "pairs": "data.store='Server=db;User=sa;Password=S3CRETmmm;'",
    "mapping": "data.opts={token: S3CRETfff}",
    "mapping, second key": "data.opts={a: 1, client_secret: S3CRETfff}",
    "JSON": """data.opts='{"auth": "S3CRETzzz"}'""",
    "list of mappings": "data.sources=[{url: x, password: S3CRETz}]",
    "list": "data.api_keys=[S3CRETa,S3CRETb]",
    "below": "+data.credentials.user=S3CRETuu",
    "header": "data.headers={Authorization: 'Bearer S3CRETqq'}",
    "Hugging Face's shape": "data.name=hf_S3CRETabcdefg",
    "GitHub's shape": "data.name=ghp_S3CRETabcdefg",
    "OpenAI's shape": "data.name=sk-S3CRETabc",
    "Amazon's shape": "data.name=AKIAS3CRETABC",
    "Slack's shape": "data.name=xoxb-S3CRET-aa",
    "default of a reference": "data.token=${oc.env:HF_TOKEN,S3CRETdef}",
    "pairs with blanks": "data.store='Server=db;Password=S3CRET of S3CRET;User=sa'",
    "no user": "data.url='redis://:S3CRETpw@h:6379/0'",
    "a slash in it": "data.url='https://me:S3/CRET9S3CRET@host/x'",
    "webhook": "data.url='https://hooks.slack.com/services/T0/B0/S3CRET'",
    "in a command": "data.command='curl -X GET --token S3CRETabc --password=S3CRETabc'",
    "more words": "data.token_for_the_hub=S3CRETabc",
    "fragment": "data.url='https://h/x#access_token=S3CRETabc'",
    "export": "export HF_TOKEN=S3CRETexp",
}  # fmt: skip
ORDINARY = [
    "train.tokens=5", "model.key_dim=64", "data.tokenizer=gpt2", "monkey=1", "data.text_field=key",
    "data.image_key=image", "data.key=image", "model.pad_token_id=0", "model.eos_token=<|endoftext|>",
    "data.label_key=label", "model.token_dim=64", "data.key=jpg;png", "data.author=me", "train.patience=10",
    "model.single_pass=true", "data.use_auth_token=true", "data.path=s3://bucket/x:y@z", "data.path=/a/b=c",
    "model.num_token=100000", "data.tokenizer_path=x", "data.path=https://host:8080/x@v2", "data.note=a:b",
    "data.keys=[a,b]", "data.sort_key=length", "data.password_file=/x", "data.special_tokens={pad:0}",
    "optimizer.lr=1e-3", "model.image_token=32000123", "data.urls=https://h/shard-{0000..0099}.tar",
    "data.path=git@github.com:x/y.git", "run.name=token",
    "data.revision=aa84a3bdeadbeefaa84a3bdeadbeefaa84a3bdee", "data.pattern=*.jpg",
    "data.opts={key:image,tokens:5}", "model.auth_head=3", "data.token=${oc.env:HF_TOKEN}",
    "data.url=https://${oc.env:USER}:${oc.env:PASS}@h/", "data.token=null",
    "model.token_mixer=conv1d_block", "data.auth_type=basic", "model.token_kernel=3x3",
    "data.command='x --tokens 5 --key image'", "data.path='a;b=c'",
]  # fmt: skip


@pytest.mark.parametrize("way", WORDS)
def test_a_secret_is_hidden_however_it_is_given(way: str) -> None:
    shown = redact(WORDS[way])
    assert "S3CRET" not in shown
    assert "84144" not in shown
    assert secrets.REDACTED in shown


@pytest.mark.parametrize("word", ORDINARY)
def test_an_ordinary_setting_is_shown(word: str) -> None:
    assert redact(word) == word


def test_nested_values_are_hidden_one_by_one() -> None:
    given = {
        "opts": {"token": "S3CRETa", "size": 3},
        "all": [{"password": "S3CRETb"}, "x"],
        "auth": ["me", "S3CRETc"],
    }
    shown = redact_value("data", given)
    assert shown["opts"] == {"token": secrets.REDACTED, "size": 3}
    assert shown["all"] == [{"password": secrets.REDACTED}, "x"]
    assert "S3CRET" not in str(shown)
    plain = {"a": [1, 2.0, None, True], "b": {"c": "d"}}
    assert redact_value("data", plain) is plain


def test_what_was_met_as_a_secret_is_hidden_in_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())
    secrets.note("data", {"token": "wildly-unlike", "opts": {"password": 123456789}, "path": "folder/file"})
    secrets.note_words(
        ["data.api_key=S3CRETfff", "recipe=llm", "data.url=https://me:unguessable9@host/place"]
    )
    text = (
        "cannot open wildly-unlike with 123456789 or S3CRETfff at unguessable9 in folder/file of llm at host"
    )
    assert hide(text) == (
        "cannot open <redacted> with <redacted> or <redacted> at <redacted> in folder/file of llm at host"
    )


def test_what_a_reference_to_a_secret_comes_to_is_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from gatrain.compose import compose

    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setenv("WANDB_API_KEY", "anything-at-all")
    compose(["recipe=vision", "+data.note=${oc.env:WANDB_API_KEY}"])
    assert hide("the server refused anything-at-all") == "the server refused <redacted>"


def test_numbers_hashes_words_and_places_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())
    secrets.note("data", {"token": 841444, "password": "training", "pat": "S3CRETfff"})
    data = {
        "a": 841444,
        "hash": "ab841444cd",
        "said": ["in training with 841444", "S3CRETfff"],
        "working_dir": "/S3CRETfff",
    }
    assert secrets.hide_in(data) == {
        "a": 841444, "hash": "ab841444cd", "said": ["in training with <redacted>", "<redacted>"],
        "working_dir": "/S3CRETfff",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "there is no key 'token' in data. Known keys: path, tokens, tokenizer.",
        "unexpected token: comma in line 3",
        "the key: value pair is missing; KeyError: 'input_ids'",
        "batch.effective=512 is not a multiple; model.key=image: Did you mean 'model.keys'?",
        "Run folder: /home/me/outputs/llm/2026-01-31_12-00-00",
    ],
)
def test_prose_about_tokens_and_keys_stays(text: str) -> None:
    assert hide(text) == text


@pytest.mark.parametrize(
    "part",
    [
        "a", "a-b_c.", "{a: ", "://a:", "-----BEGIN PRIVATE KEY-----", "a@", "eyJaaaaaaa.", "eyJ-", "k=\"", "--a ",
        "sk-", "Bearer ", "${", "a;b=", "token: [", "https://a@",
    ],
)  # fmt: skip
def test_the_longest_text_takes_no_longer_than_its_length(part: str) -> None:
    """No pattern runs away where something begins like a secret again and again."""
    began = time.process_time()
    text = part * (40_000 // len(part))
    hide(text)
    redact(f"data.x={text}")
    assert time.process_time() - began < 5


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_list_of_processes_does_not_show_it() -> None:
    code = (
        "import sys; from gatrain import secrets; secrets.mask_command_line(sys.argv[1:]); "
        "print(open('/proc/self/cmdline').read().replace(chr(0), ' ')); print(sys.argv[1:])"
    )
    words = ["recipe=llm", "data.token=S3CRETps", "data.url=https://u:S3CRETps@h"]
    said = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    ).stdout
    shown, own = said.strip().splitlines()
    assert "S3CRET" not in shown
    assert "recipe=llm data.token=****" in shown
    assert own == str(words)


MODULE = """
import torch
from torch import nn

def net():
    return nn.Linear(4, 2)

class Points(torch.utils.data.Dataset):
    def __init__(self, fails=False, **anything):
        self.said = anything
        self.fails = fails
    def __len__(self):
        return 24
    def __getitem__(self, index):
        if self.fails and index == 3:
            raise ValueError(f"the server refused {self.said}")
        generator = torch.Generator().manual_seed(index)
        return torch.randn(4, generator=generator), index % 2
"""
RECIPE = """
defaults: [base, _self_]
model: {_target_: mine.net}
data: {_target_: mine.Points}
batch: {effective: 8, micro: 4}
train: {steps: 2, check: "off"}
precision: fp32
device: cpu
save: {every: 1}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text(RECIPE)
    (tmp_path / "tmp").mkdir()
    for name, folder in (("GATRAIN_CACHE", "cache"), ("TMPDIR", "tmp")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("HF_TOKEN", "S3CRETenv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def holding(secret: str, *folders: Path) -> list[str]:
    """Files that hold it, but for a config.yaml that nobody else may read."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    found = [path for path in files if secret.encode() in path.read_bytes()]
    return [str(p) for p in found if p.name != "config.yaml" or p.stat().st_mode & 0o077]


def test_twenty_secrets_of_one_command_are_only_in_the_private_configuration(here: Path) -> None:
    """As told, as failed, and resumed: files of run, cache and temporary folder, and everything printed."""
    given = [word for word in WORDS.values() if word.startswith(("data.", "+data.")) and "oc.env" not in word]
    unlike = [word.replace("data.", f"data.n{number}.", 1) for number, word in enumerate(given)]
    words = [f"+{word.lstrip('+')}" for word in unlike if "8414" not in word]
    assert len(words) >= 20
    failed = run("fit", "recipe=own", "run.dir=a", "+data.fails=true", *words)
    assert failed.returncode == 4, failed.stderr
    assert "the server refused" in failed.stderr
    shown = run("show", "recipe=own", *words)
    done = run(
        "fit", "recipe=own", "run.dir=b", "+data.plain=S1LLY", "+data.token=${oc.env:HF_TOKEN}", *words
    )
    assert done.returncode == 0, done.stderr
    resumed = run("resume", "b", "train.steps=3")
    assert resumed.returncode == 0, resumed.stderr
    wrong = run("fit", "recipe=own", "dataa.token=S3CRETwrong")
    assert wrong.returncode == 2
    assert "dataa" in wrong.stderr
    for said in (failed, shown, done, resumed, wrong):
        assert "S3CRET" not in said.stdout + said.stderr
    assert holding("S3CRET", here / "a", here / "b", here / "cache", here / "tmp") == []
    assert os.stat(here / "b" / "config.yaml").st_mode & 0o777 == 0o600
    kept = (here / "b" / "config.yaml").read_text()
    assert "${oc.env:HF_TOKEN}" in kept
    assert "S3CRETenv" not in kept
    assert "S3CRETfff" in kept
    assert "S1LLY" in (here / "b" / "overrides.txt").read_text()
