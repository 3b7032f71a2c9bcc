"""What looks like a secret, and how it is kept out of files, logs and messages. The one home of both questions.

Three things tell a secret: the name that it is given under (``data.api_key``), its own shape (``hf_...``, a signed
address, ``user:password@``), and that this process has met it before under such a name (`note`), wherever it turns
up again: in the message of a library, in a traceback. References (``${oc.env:HF_TOKEN}``) name a secret without
holding it, and stay.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any

REDACTED = "<redacted>"


class _Grade(IntEnum):
    NONE = 0
    RANDOM = 1
    """Hidden where the value itself looks random: ``data.key`` may name a column."""
    TOKEN = 2
    """Hidden but for numbers of few digits and switches: ``use_auth=true``, ``token=3``."""
    SECRET = 3


# --- names ----------------------------------------------------------------------------------------------

_SECRET_ENDS = re.compile(
    r"(password|passwd|passphrase|passcode|secrets?|credentials?|creds?|bearer|sessionid|psk|webhook|jwt|cookies?|connectionstring"
    r"|connectionstr|connstring|connstr|(api|access|secret|private|account|shared|signing|encryption|master|session"
    r"|subscription|storage|license|auth|service|ssh|deploy|client)keys?|accesskeyid|keyid"
    r"|(auth|access|refresh|bearer|api|hf|github|session|security|sas)tokens?|(db|user|smtp|mysql|pg|ftp)(pass|pwd))$"
)
_OWNERS = frozenset(
    {
        "hf", "huggingface", "hub", "wandb", "openai", "anthropic", "aws", "azure", "gcp", "google",
        "comet", "neptune", "mlflow", "github", "gitlab", "s3",
    }
)  # fmt: skip
"""Before ``key``: a service's."""
_LANGUAGE = frozenset(
    {
        "pad", "eos", "bos", "unk", "mask", "cls", "sep", "special", "stop", "start", "end",
        "image", "img", "audio", "video", "text", "class", "prompt", "next", "last", "first",
        "target", "per", "num", "n", "max", "min", "query", "dist", "distill", "distillation",
        "register", "reg", "label", "blank", "space", "pred", "prefix", "suffix", "decoder",
        "encoder", "separator", "newline", "forced", "vocab",
    }
)  # fmt: skip
"""Before ``token``: a token of a vocabulary, not one that opens a door."""
_QUALIFIERS = frozenset(
    {
        "value", "values", "val", "literal", "raw", "plain", "header", "str", "string", "text",
        "b64", "base64",
    }
)  # fmt: skip
_TELLING = frozenset(
    {"token", "password", "passwd", "secret", "auth", "bearer", "credential", "apikey", "pat", "login"}
)
_NOTHING = re.compile(
    r"|null|none|true|false|yes|no|on|off|auto|[^\w]*|[<\[(|]+[\w|/ -]*[>\])|]+", re.IGNORECASE
)
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[^\s/\\]{16,}|(?=.*\d)(?=.*[A-Z])[^\s/\\.]{8,}")


def _words_of(name: str) -> list[str]:
    """``hfToken``, ``HF_TOKEN`` and ``hf-token`` are all hf, token."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def _grade_of_name(name: str) -> _Grade:
    words = _words_of(name)
    grade = _grade_of_words(words)
    while not grade and words and (words[-1] in _QUALIFIERS or words[-1].isdigit()):
        words.pop()
        grade = _grade_of_words(words)
    if not grade and _TELLING & set(words):
        return _Grade.RANDOM  # `token_for_hub`, and `token_dim` as well: the value tells
    return grade


def _grade_of_words(words: list[str]) -> _Grade:
    if not words:
        return _Grade.NONE
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if _SECRET_ENDS.search("".join(words)) or last in ("pwd", "passwd"):
        return _Grade.SECRET
    if last == "key" and before in _OWNERS:
        return _Grade.SECRET
    if last.endswith("token"):
        return _Grade.NONE if (last.removesuffix("token") or before) in _LANGUAGE else _Grade.TOKEN
    if last in ("auth", "authorization", "oauth", "pat", "pass", "sig", "signature", "sas", "otp", "dsn"):
        return _Grade.TOKEN
    if words == ["pw"]:
        return _Grade.TOKEN
    return _Grade.RANDOM if last in ("key", "tokens") else _Grade.NONE


def _grade(key: str) -> _Grade:
    """Of a dotted key: what lies below ``credentials`` is one, whatever it is called."""
    *above, last = key.lstrip("+~-").split(".")
    grades = [grade for each in above if (grade := _grade_of_name(each)) > _Grade.RANDOM]
    return max([_grade_of_name(last), *grades])


def _is_secret(grade: _Grade, value: Any) -> bool:
    if grade is _Grade.NONE or value is None or isinstance(value, bool):
        return False
    text = str(value).strip().strip("'\"")
    if _NOTHING.fullmatch(text):
        return False
    if grade is _Grade.SECRET:
        return True
    if grade is _Grade.TOKEN:
        return not re.fullmatch(r"[-+.\d]{1,5}|[\w.]*\*[\w.*]*", text)
    return _RANDOM.fullmatch(text) is not None


# --- values ---------------------------------------------------------------------------------------------

# what may fail to match is bounded, so that the longest text takes no longer than its length
_SHAPES = re.compile(
    r"\b(?:hf|gh[pousr]|github_pat|glpat|npm|pypi|dckr_pat|xapp)[_-](?=[\w-]{0,60}[A-Z\d])[\w-]{8,}+"
    r"|\bsk-(?=[\w-]{0,60}[A-Z\d])[\w-]{8,}+"
    r"|\b(?:AKIA|ASIA)[A-Z\d]{8,}+"
    r"|\bxox[a-z]-[\w-]{6,}+"
    r"|\bAIza[\w-]{20,}+|\bya29\.[\w-]{8,}+|\bSG\.[\w-]{8,200}\.[\w-]{8,}+"
    r"|\beyJ[\w-]{6,300}+\.[\w-]{4,4000}+\.[\w-]*+"
    r"|(?<=hooks\.slack\.com/services/)[\w/-]++|(?<=/api/webhooks/)[\w/-]++|(?<=api\.telegram\.org/bot)[\w:-]++"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)"
)
_SCHEME = re.compile(
    r"\b(Bearer|Basic|Token)(\s{1,8}|%20)(?=[^\s\"']{0,300}[\dA-Z+/=_-])[\w.~+/=-]{6,}+", re.IGNORECASE
)
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]{0,30}://)(?P<user>[^/?#\s'\"]{1,300})@")
_ODD_ADDRESS = re.compile(r"(://[^\s'\"/:@${}]{0,100}:)(?!\d{1,5}/)([^\s'\"@${}]{1,300})(?=@[\w\[])")
"""A password that holds what an address must not hold, such as a slash."""
_OPTION = re.compile(
    r"(?<!\S)--?(?P<key>[A-Za-z][\w-]{0,60})(?P<between> {1,8})(?P<value>[^\s'\"-][^\s'\"]*+)"
)
_PAIR = re.compile(
    r"(?P<key>(?<![\w.$])[A-Za-z_][\w.-]{0,100}(?: [Kk]ey| [Ii]d)?)"
    r"(?P<between>[\"']?\s{0,8}(?:=|:(?!//))\s{0,8})"
    r"(?P<value>\"(?:[^\"\\]|\\.){0,4000}\"|'(?:[^'\\]|\\.){0,4000}'|\$\{[^}]{0,500}\}|[^\s,;&\"'{}\[\]()]++)"
)
_IN_ADDRESSES = frozenset(
    ("code", "key", "sig", "signature", "credential", "policy", "sas", "awsaccesskeyid")
)
_REFERENCE = re.compile(r"\$\{[^{}]{0,500}\}")


def redact(word: str) -> str:
    """Hide what is secret in one word of a command line, such as ``data.token=...``."""
    key, equals, value = word.partition("=")
    return f"{key}={redact_value(key, value)}" if equals else redact_text(word)


def redact_value(key: str, value: Any) -> Any:
    """The value, with what is secret in it hidden; the same object where nothing is.

    Args:
        key: the name that it is given under; dotted for nested ones.
        value: text, a number, or mappings and lists of them.
    """
    grade = _grade(key)
    if isinstance(value, dict):
        found = {name: redact_value(f"{key}.{name}", each) for name, each in value.items()}
        return value if found == value else found
    if isinstance(value, list | tuple):
        found_list = [redact_value(key, each) for each in value]
        return value if found_list == list(value) else type(value)(found_list)
    if isinstance(value, str) and "${" in value:
        default = re.fullmatch(r"(\s*['\"]?\$\{oc\.env:[^,{}]*,)([^{}]*)(\}['\"]?\s*)", value)
        if default and (grade > _Grade.RANDOM or _grade_of_name(default[1]) > _Grade.RANDOM):
            return value if _NOTHING.fullmatch(default[2].strip()) else f"{default[1]}{REDACTED}{default[3]}"
        if grade > _Grade.RANDOM and not _REFERENCE.sub("", value).strip(" '\""):
            return value
    if isinstance(value, str) and value.strip()[:1] in "{[" and value.strip():
        hidden = _in_braces(value, grade)
        return REDACTED if hidden else redact_text(value)
    if _is_secret(grade, value):
        return REDACTED
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Hide secrets that a text shows by their shape, or by a name beside them (``token=...``)."""
    if not text:
        return text
    text = _SHAPES.sub(REDACTED, text)
    text = _SCHEME.sub(lambda found: f"{found[1]}{found[2]}{REDACTED}", text)
    text = _ODD_ADDRESS.sub(rf"\1{REDACTED}", _ADDRESS.sub(_without_user, text))
    if ";" in text:
        text = ";".join(map(_without_assigned, text.split(";")))
    return _OPTION.sub(_without_value, _PAIR.sub(_without_value, text))


def _in_braces(value: str, grade: _Grade) -> bool:
    """Whether a mapping or list written as text holds a secret; its syntax may be YAML's, JSON's or Hydra's."""
    if grade > _Grade.RANDOM and _is_secret(grade, re.sub(r"[\[\]{}\s]", "", value)):
        return True
    if any(
        _grade_of_name(key) > _Grade.RANDOM
        for key in re.findall(r"([\w-]{1,80})[\"']?\s{0,8}[:=]\s{0,8}[{\[]", value)
    ):
        return True
    return any(_without_value(found) != found[0] for found in _PAIR.finditer(value))


def _without_assigned(part: str) -> str:
    """One part of a connection string, whose value may hold blanks."""
    key, equals, value = part.partition("=")
    plain = equals and not re.search(r"[?&{}\[\]'\"$]|://", part) and REDACTED not in part
    return f"{key}={REDACTED}" if plain and _is_secret(_grade_of_name(key.strip()), value) else part


def _without_user(found: re.Match[str]) -> str:
    scheme = found["scheme"]
    name, colon, password = _REFERENCE.sub("", found["user"]).partition(":")
    is_secret = password if colon else name and scheme.startswith(("http:", "https:"))
    return f"{scheme}{REDACTED}@" if is_secret else found[0]


def _without_value(found: re.Match[str]) -> str:
    key, value = found["key"], found["value"]
    before = found.string[found.start() - 1 : found.start()]
    grade = _grade(key)
    if before in ("?", "&") and (words := _words_of(key)):
        in_address = words[-1] in _IN_ADDRESSES or "".join(words) in _IN_ADDRESSES
        grade = max(grade, _Grade.TOKEN) if in_address else grade
    if REDACTED in value or _REFERENCE.fullmatch(value) or not _is_secret(grade, value):
        return found[0]
    if (
        ":" in found["between"]
        and grade < _Grade.SECRET
        and not re.search(r"[\dA-Z]", value.strip("'\"")[1:])
    ):
        return found[0]  # prose: "unexpected token: comma"
    quote = value[0] if value[0] in "\"'" else ""
    return f"{key}{found['between']}{quote}{REDACTED}{quote}"


# --- what this process has met --------------------------------------------------------------------------

_known: set[str] = set()
_SHORTEST, _ORDINARY = 6, re.compile(r"[a-z_]{1,15}|[A-Z]?[a-z]{1,12}")
"""Shorter secrets, and those that are words, would be found everywhere; where they are named they are hidden."""


def note(key: str, value: Any) -> None:
    """Remember the secrets among the values below ``key``, so that `hide` finds them in any text."""
    if isinstance(value, dict):
        for name, each in value.items():
            note(f"{key}.{name}" if key else str(name), each)
    elif isinstance(value, list | tuple):
        for each in value:
            note(key, each)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        shown = redact_value(key, value)
        if shown is not value and shown != value:
            _remember(str(value), str(shown))


def note_words(words: Iterable[str]) -> None:
    """Remember the secrets in the words of a command line."""
    for word in words:
        _, equals, value = word.partition("=")
        shown = redact(word)
        if shown != word:
            _remember(value if equals else word, shown)


def _remember(value: str, shown: str) -> None:
    parts = re.split(r"[\s,;:&=?{}\[\]\"'()/@<>]+", value)
    whole = value.strip().strip("'\"")
    found = {part for part in parts if part not in shown}
    if shown.endswith(REDACTED) and not re.search(r"[{\[:=]", whole):
        found.add(whole)
    _known.update(part for part in found if len(part) >= _SHORTEST and not _ORDINARY.fullmatch(part))


def hide(text: str) -> str:
    """The text without secrets: those that this process has met, and those that show themselves."""
    return hide_known(redact_text(text))


_DIGITS = re.compile(r"[0-9a-fA-F]+")


def hide_known(text: str) -> str:
    """The text without the secrets that this process has met."""
    for secret in sorted(_known, key=len, reverse=True):
        if secret in text:
            whole = _DIGITS.fullmatch(secret)  # no part of a hash or of another number
            pattern = rf"(?<![0-9A-Za-z]){re.escape(secret)}(?![0-9A-Za-z])" if whole else re.escape(secret)
            text = re.sub(pattern, REDACTED, text)
    return text


def hide_in(data: Any) -> Any:
    """Nested data with `hide_known` in its texts; numbers stay, and the folders that a run needs to find again."""
    if not _known:
        return data
    if isinstance(data, str):
        return hide_known(data)
    if isinstance(data, dict):
        return {name: each if name in _PLACES else hide_in(each) for name, each in data.items()}
    if isinstance(data, list | tuple):
        return [hide_in(each) for each in data]
    return data


_PLACES = ("working_dir", "recipe_file", "weights")


# --- the command line that others see -------------------------------------------------------------------


def mask_command_line(words: Iterable[str], hide_word: Callable[[str], str] = redact) -> None:
    """Overwrite secret words in what ``ps`` shows of this process (Linux; elsewhere nothing happens)."""
    secret = [word for word in words if hide_word(word) != word]
    if not secret:
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, 48th and 49th of proc(5)
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            shown = memory.read(end - start)
            for word in secret:
                raw = word.encode("utf-8", "surrogateescape")
                key = raw.partition(b"=")[0] + b"=" if b"=" in raw else b""
                shown = shown.replace(raw, key + b"*" * (len(raw) - len(key)))
            memory.seek(start)
            memory.write(shown)
