"""A chat template tried out before anything else renders it: in a child process, with bounds.

Templates are programs out of a foreign folder. transformers renders them in a sandbox without
limits on time or memory; here a short conversation is rendered with limits on both. Knows nothing
of tokenizers.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.files.file_kinds import is_there
from harness.files.strict_json import MAX_CONFIG_BYTES, read_json_object, read_small_text

__all__ = ["check_template", "template_of"]

_CPU_SECONDS = 5
_WALL_SECONDS = 120  # a stopped or starved child; processor time is the bound that counts
_MEMORY = 1 << 30
_MOST_OUTPUT = 1 << 20
_REMEDY = "copy the template that belongs to the tokenizer"
_AGAIN = "free some memory, and try again"
# The environment is transformers' own (`utils/chat_template_utils.py`), without its functions'
# effects. What a template itself raises is an answer ("system is not supported"), no fault.
_CHILD = """
import json, math, resource, sys, time
import jinja2, jinja2.ext, jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
cpu, memory, most = map(int, sys.argv[1:])
cpu += math.ceil(time.process_time())  # what starting took, slow under an emulator, is not its own
resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))  # the first by SIGXCPU
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)
    def _body(self, caller):
        return caller()

class Refused(Exception):
    pass

def refuse(message):
    raise Refused(message)

def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)

def answer(kind, text=""):
    print(json.dumps([kind, str(text)[:300]]))
    sys.exit(0)

template, special = json.load(sys.stdin)
try:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: form
    compiled = environment.from_string(template)
except jinja2.TemplateSyntaxError as error:
    answer("syntax", f"line {error.lineno}: {error.message}")
except (RecursionError, SyntaxError, MemoryError) as error:
    answer("syntax", type(error).__name__)
user = {"role": "user", "content": "Hello"}
system = {"role": "system", "content": "Be brief."}
reply = {"role": "assistant", "content": "Hi."}
for messages in ([user], [system, user], [user, reply, user]):
    for add in (False, True):
        try:
            size = 0
            for part in compiled.generate(messages=messages, add_generation_prompt=add,
                                          tools=None, documents=None, **special):
                size += len(part)
                if size > most:
                    answer("large")
        except SecurityError as error:
            answer("unsafe", error)
        except MemoryError:
            answer("large")
        except Exception:
            pass
answer("sound")
"""


def template_of(folder: Path, faults: list[InputError]) -> tuple[str, Path] | None:
    """The chat template that a tokenizer's folder holds, and the file that it is in."""
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not is_there(path):
            continue
        try:
            if name.endswith(".jinja"):
                return read_small_text(path, what="the chat template"), path
            template = read_json_object(path, what=name).get("chat_template")
        except InputError as error:
            faults.extend(error.faults)
            return None
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default") or next(iter(named.values()), None)
        if template is None:
            continue
        if not isinstance(template, str) or len(template) > MAX_CONFIG_BYTES:
            faults.append(InputError("chat_template: is no text", where=path, remedy=_REMEDY))
            return None
        return template, path
    return None


def check_template(template: str, path: Path, faults: list[InputError]) -> None:
    """Render *template* with three short conversations, within bounds.

    Faults: it does not parse, reaches past the sandbox, takes more than five seconds of processor
    time or a gigabyte, or answers "Hello" with a megabyte.
    """
    kind, text = _tried(template)
    words = {
        "syntax": f"chat_template: {text}",
        "unsafe": f"chat_template: reaches past the sandbox: {text}",
        "large": f"chat_template: makes more than {_MOST_OUTPUT} characters, or takes more than "
        f"{_MEMORY >> 20} MiB, for a prompt of one word",
        "killed": f"chat_template: could not be tried, its process was ended by signal {text}",
        "slow": f"chat_template: takes more than {_CPU_SECONDS} seconds for a prompt of one word",
    }
    if kind in words:
        remedy = _AGAIN if kind == "killed" else _REMEDY
        faults.append(InputError(words[kind], where=path, remedy=remedy))


def _tried(template: str) -> tuple[str, str]:
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
                               "unk_token": "<unk>"}  # fmt: skip
    try:
        child = subprocess.run(
            [
                sys.executable,
                "-I",
                "-c",
                _CHILD,
                str(_CPU_SECONDS),
                str(_MEMORY),
                str(_MOST_OUTPUT),
            ],
            input=json.dumps([template, special]),
            capture_output=True,
            text=True,
            check=False,
            timeout=_WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "slow", ""
    try:
        kind, text = json.loads(child.stdout)
    except ValueError:
        if child.returncode == -signal.SIGXCPU:
            return "slow", ""
        return ("killed", str(-child.returncode)) if child.returncode < 0 else ("large", "")
    return kind, text
