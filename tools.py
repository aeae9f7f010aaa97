"""The three tools of the policy: `python`, `image_zoom_in` and `tavily-search`.

A `Toolbox` holds the tools of one rollout: its images and, once `python` was called, its interpreter. `call` takes what
stands between <tool_call> and </tool_call> and always returns an `Observation`. Read the file from top to bottom: what
the model sees, the toolbox, images, search, then both sides of the Python sandbox.

How model-written Python is contained: one zygote per trainer process (a clean interpreter with numpy, PIL and pyplot,
never a fork of the trainer) forks a session per rollout. Before it runs a line of the model's code, the session locks
itself down by rlimits, dropped capabilities, no-new-privileges, Landlock and seccomp. This works as root in a container
with the default profile and as a plain user, on Linux from 5.13 (x86-64, aarch64); `start` first tries to break out.
- Covered: processes and signals (no fork, exec, ptrace; no signal but to itself), files (reads /usr, /lib and the
  Python prefixes, writes its own folder), network and every other socket, devices and GPUs, the trainer's memory and
  environment, other sessions, CPU time, memory, open files, size of output. Nothing survives the trainer.
- Soft caps, looked at four times a second and overshot by as much: threads, bytes and entries of the session's folder.
- Not covered: bugs of the kernel, side channels; stat() and existence of any path; reading what lies in the Python
  prefixes and /usr; the memory of all sessions together (use the container's limit); a session that breaks or lies
  about its own results. Broken on purpose: subprocess, multiprocessing, asyncio.run, pip.
"""

from __future__ import annotations

import ast
import ctypes
import errno
import fcntl
import gc
import hashlib
import http.client
import io
import json
import linecache
import math
import os
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the zygote runs this file: nothing but the standard library is imported at its top
    from PIL.Image import Image


def _schema(name: str, description: str, **arguments: str) -> dict:
    """In the OpenAI format. An argument is "type: description", and required unless this names a default."""
    properties = {}
    for argument, (kind, _, meaning) in ((key, value.partition(": ")) for key, value in arguments.items()):
        properties[argument] = {"type": kind} | ({"description": meaning} if meaning else {})
        properties[argument] |= {"items": {"type": "number"}} if kind == "array" else {}
    required = [argument for argument, value in arguments.items() if "default" not in value]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


SCHEMAS = [  # short, because they stand in every prompt
    _schema(
        "python",
        "Run Python; state is kept. _pil_images: all images (PIL), _images: their paths. plt.show() returns figures.",
        code="string",
        timeout="integer: seconds, default 12",
    ),
    _schema(
        "image_zoom_in",
        "Crop and enlarge a part of an image.",
        bbox_2d="array: [x1, y1, x2, y2], 0-1000",
        label="string: what is there",
        img_idx="integer: image number, default 0",
    ),
    _schema("tavily-search", "Search the web.", query="string", max_results="integer: default 5"),
]


def _option(default: object, help: str) -> object:
    return field(default=default, metadata={"help": help})


@dataclass
class ToolConfig:
    search_corpus: str | None = _option(None, "JSONL file of {title, url, text}: search this instead of the web")
    unsafe_python: bool = _option(False, "run model-written Python even where the kernel cannot contain it")
    python_timeout: int = _option(12, "seconds of a python call that names no timeout")
    python_max_timeout: int = _option(60, "cap for the timeout that a call names")
    python_memory_mb: int = _option(2048, "address space of one python session")
    observation_chars: int = _option(4000, "longest text of an observation")
    observation_images: int = _option(4, "most images of an observation")
    image_side: int = _option(1280, "longest side of an image that a tool returns")
    zoom_side: int = _option(512, "a zoomed crop is enlarged to at least the area of a square of this side")
    decoded_images_mb: int = _option(1024, "decoded full-resolution images kept for zooming, all rollouts together")
    tool_cache: str = _option("~/.cache/axpo", "folder of the search index, of Tavily's answers and of a font cache")
    tavily_url: str = _option("https://api.tavily.com/search", "where Tavily listens")
    tavily_timeout: float = _option(40.0, "seconds for one search, retries included")
    tavily_retries: int = _option(4, "tries after the first on 429, 5xx and broken answers")


@dataclass(frozen=True)
class Observation:
    text: str
    images: list[Image]
    ok: bool


class ToolError(Exception):
    """What was wrong with a call or with the set-up, in one sentence for the model or the user."""


class Toolbox(AbstractContextManager):
    """The tools and images of one rollout. No process is started and no image decoded before a call needs it."""

    def __init__(self, images: Sequence[Image | bytes | Path], config: ToolConfig | None = None):
        self._session: _Session | None = None
        self._lock = threading.Lock()
        self.images, self.config = list(images), config or ToolConfig()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # no lock: nobody else can use it any more, and a fork may have copied it locked
            self._session.kill()

    def close(self) -> None:
        with self._lock:
            session, self._session = self._session, None
            if session:
                session.kill()

    def call(self, text: str) -> Observation:
        """Runs one call. Never raises: what goes wrong is an observation with ok=False."""
        images, ok = [], False
        try:
            with self._lock:
                name, arguments = _parse(text)
                tool = {"python": self._python, "image_zoom_in": self._zoom, "tavily-search": self._search}[name]
                text, images, ok = tool(arguments)
                self.images += images
        except ToolError as error:
            text = f"Error: {error}"
        except Exception as error:  # noqa: BLE001 (a full disk, a broken picture: the rollout goes on)
            text = f"Error: the tool failed ({type(error).__name__})."
        return Observation(_clean(text, self.config.observation_chars), images, ok)

    def _python(self, arguments: dict) -> tuple[str, list[Image], bool]:
        code = _string(arguments, "code")
        limit = self.config.python_max_timeout
        seconds = _number(arguments, "timeout", 1, limit, min(self.config.python_timeout, limit))
        with _slots:  # so that a deadline measures the call and not the queue before it
            session = self._session = self._session or _Session(self.config)
            try:
                if re.search("image|globals|vars|eval|exec|dir|glob", code):  # most code never looks at the images
                    session.hand_over(self.images)
                text, images, ok, dropped = session.run(code, seconds)
            except (_Dead, ToolError) as problem:
                text, self._session = session.output(), None
                session.kill()
                if isinstance(problem, ToolError):
                    raise
                return f"{text}\n{problem} The session was restarted: its variables are lost.".lstrip(), [], False
        notes = [f"Image {len(self.images) + i}: shown by the code." for i in range(len(images))]
        notes += [f"{dropped} more images were left out."] if dropped else []
        return "\n".join(filter(None, [text, *notes])) or "(no output)", images, ok

    def _zoom(self, arguments: dict) -> tuple[str, list[Image], bool]:
        box = arguments.get("bbox_2d")
        if not isinstance(box, list) or len(box) != 4:
            raise ToolError("bbox_2d must be [x1, y1, x2, y2].")
        x1, y1, x2, y2 = (_number({"bbox_2d": edge}, "bbox_2d", 0, 1000) for edge in box)
        if x1 >= x2 or y1 >= y2:
            raise ToolError("bbox_2d must have x1 < x2 and y1 < y2, within 0-1000.")
        index = int(_number(arguments, "img_idx", -1, len(self.images), 0))
        if not 0 <= index < len(self.images):
            raise ToolError(f"img_idx must be below {len(self.images)}, the number of images.")
        image = _decoded(self.images[index], self.config)
        left, right = _span(x1, x2, image.width, (y2 - y1) / 1000 * image.height)
        top, bottom = _span(y1, y2, image.height, right - left)
        crop = _fit(image.crop((left, top, right, bottom)), self.config.image_side, self.config.zoom_side)
        return f"Image {len(self.images)}: zoomed crop of image {index}.", [crop], True

    def _search(self, arguments: dict) -> tuple[str, list[Image], bool]:
        query = " ".join(_string(arguments, "query").encode("utf-8", "replace").decode().split())[:400]
        found = _engine(self.config).search(query, int(_number(arguments, "max_results", 1, 10, 5)))
        return _listed(found, self.config.observation_chars), [], True


def _parse(text: str) -> tuple[str, dict]:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        raise ToolError('the call is not JSON of the form {"name": ..., "arguments": {...}}.') from None
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        raise ToolError('the call must be an object with "name" and an object "arguments".')
    names = [schema["function"]["name"] for schema in SCHEMAS]
    if call.get("name") not in names:
        raise ToolError(f"there is no such tool; the tools are {', '.join(names)}.")
    return call["name"], call["arguments"]


def _string(arguments: dict, name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value.strip() or len(value) > 200_000:
        raise ToolError(f"{name} must be a string, neither empty nor endless.")
    return value


def _number(arguments: dict, name: str, low: float, high: float, default: float | None = None) -> float:
    value = arguments.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # noqa: PLR0124
        raise ToolError(f"{name} must be a number." if default is not None else f"{name} must hold four numbers.")
    return max(low, min(high, value))


def _clean(text: str, limit: int) -> str:
    """Valid UTF-8 of at most `limit` characters, in which the tokens of the chat template do not survive as such."""
    text = re.sub(r"<(?=\|\w+\|>|/?(?:think|tool_call|tool_response)>)", "< ", text.encode("utf-8", "replace").decode())
    if len(text) <= limit:
        return text
    half = max(0, limit - len(_CUT)) // 2  # the end matters as well: that is where a traceback stands
    return (text[:half] + _CUT + text[len(text) - half :])[:limit]


_CUT = "\n... Output truncated ...\n"

# --- images ----------------------------------------------------------------------------------------------------------

_decoded_images: OrderedDict[object, tuple[object, Image]] = OrderedDict()  # least recently used first
_decoded_lock = threading.Lock()
_decoding = [threading.Lock() for _ in range(16)]


def _decoded(source: Image | bytes | Path, config: ToolConfig) -> Image:
    """The full-resolution RGB image. Rollouts of one question share it; the memory of all of them is bounded."""
    key = str(source) if isinstance(source, Path) else id(source)  # the entry holds the source, so ids stay unique
    with _decoding[hash(key) % len(_decoding)]:  # two rollouts never decode the same 8K picture at once
        with _decoded_lock:
            if key in _decoded_images:
                _decoded_images.move_to_end(key)
                return _decoded_images[key][1]
        image = _open(source) if isinstance(source, (bytes, Path)) else source
        image.load()
        if image.mode != "RGB":
            image = image.convert("RGB")
        elif image is source:
            return image
        with _decoded_lock:
            _decoded_images[key] = (source, image)
            size = sum(kept.width * kept.height * 3 for _, kept in _decoded_images.values())
            while size > config.decoded_images_mb * 2**20:
                _, (_, old) = _decoded_images.popitem(last=False)
                size -= old.width * old.height * 3
        return image


def _open(source: bytes | Path) -> Image:
    from PIL import Image

    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _span(low: float, high: float, size: int, other: float) -> tuple[int, int]:
    """Pixels of low..high (0-1000) of `size`: at least 16, and widened where the crop would be thinner than 1:16."""
    first, last = math.floor(low / 1000 * size), math.ceil(high / 1000 * size)
    length = min(size, max(last - first, 16, math.ceil(other / 16)))
    first = max(0, min(first - (length - (last - first)) // 2, size - length))
    return first, first + length


def _fit(image: Image, longest: int, side: int = 0) -> Image:
    """Enlarged to the area of side x side, but no edge above `longest` and none too short for an image processor."""
    scale = min(max(1.0, side / math.sqrt(image.width * image.height)), longest / max(image.size))
    size = tuple(max(32, round(edge * scale)) for edge in image.size)
    return image if size == image.size else image.resize(size, 3, reducing_gap=2.0)  # 3: bicubic


# --- search ----------------------------------------------------------------------------------------------------------

_EXCLUDED = ["huggingface.co"]  # benchmarks lie there with their answers
_engines: dict[tuple, LocalSearch | TavilySearch] = {}
_engines_lock = threading.Lock()


def _engine(config: ToolConfig) -> LocalSearch | TavilySearch:
    """The engine of this process. A corpus that the user names goes before a key that lies in the environment."""
    if not config.search_corpus and not os.environ.get("TAVILY_API_KEY"):
        raise ToolError("web search is not available.")
    with _engines_lock:
        key = (config.search_corpus, config.tavily_url, config.tool_cache)
        if key not in _engines:
            _engines[key] = (LocalSearch if config.search_corpus else TavilySearch)(config)
        return _engines[key]


def _listed(found: list[Sequence[str]], limit: int) -> str:
    """Title, URL and text of each result, the texts cut alike so that all of them fit."""
    banned = re.compile("|".join(map(re.escape, _EXCLUDED)), re.IGNORECASE)
    found = [row for row in found if not banned.search(row[1])]
    share = limit // max(1, len(found))
    entries = []
    for number, (title, url, text) in enumerate(found, 1):
        head = "\n".join(filter(None, [f"{number}. {title[:200]}".strip(), url[:300]]))
        text, room = " ".join(text.split()), max(40, share - len(head) - 3)
        entries.append("\n".join(filter(None, [head, text if len(text) <= room else text[: room - 1] + "…"])))
    return "\n\n".join(entries) or "No results."


class LocalSearch:
    """BM25 over a JSONL corpus by SQLite FTS5. The index is built once, swapped in atomically and then only read."""

    def __init__(self, config: ToolConfig):
        corpus, folder = Path(config.search_corpus).expanduser().resolve(), Path(config.tool_cache).expanduser()
        if not corpus.is_file():
            raise ToolError(f"--search_corpus {corpus} is not a file.")
        stamp = f"1 {corpus.stat().st_size} {corpus.stat().st_mtime_ns}"
        index = folder.absolute() / f"search-{hashlib.sha256(os.fsencode(corpus)).hexdigest()[:16]}.sqlite"
        self._threads, fresh = threading.local(), False
        self._uri = f"{index.as_uri()}?mode=ro&immutable=1"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(f"{index}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as scratch:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the other ranks of a node wait for the first to build
                with suppress(sqlite3.Error):
                    fresh = self._execute("SELECT stamp FROM meta") == [(stamp,)]
                if not fresh:
                    self._threads = threading.local()
                    self._build(f"{scratch}/index", corpus, stamp).close()
                    os.replace(f"{scratch}/index", index)
        except (OSError, sqlite3.Error):  # a folder that is full or cannot be written
            self._uri = f"file:axpo-{secrets.token_hex(8)}?mode=memory&cache=shared"
            self._memory = self._build(self._uri, corpus, stamp)  # lives as long as one connection is open
        self.size = self._execute("SELECT count(*) FROM docs")[0][0]

    def _execute(self, sql: str, arguments: Sequence[object] = ()) -> list[Sequence[str]]:
        if not hasattr(self._threads, "connection"):
            self._threads.connection = sqlite3.connect(self._uri, uri=True)
        return self._threads.connection.execute(sql, arguments).fetchall()

    @staticmethod
    def _build(place: str, corpus: Path, stamp: str) -> sqlite3.Connection:
        database = sqlite3.connect(place, uri=place.startswith("file:"), check_same_thread=False)
        with database, open(corpus, encoding="utf-8", errors="replace") as lines:
            database.execute("CREATE VIRTUAL TABLE docs USING fts5(title, url UNINDEXED, text, tokenize='porter')")
            database.execute("CREATE TABLE meta AS SELECT ? AS stamp", (stamp,))
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    values = [str(row.get(name) or "") for name in ("title", "url", "text")]
                except (ValueError, AttributeError, RecursionError):
                    raise ToolError(f"line {number} of {corpus} is not a JSON object.") from None
                database.execute("INSERT INTO docs VALUES (?, ?, ?)", values)
        return database

    def search(self, query: str, count: int) -> list[Sequence[str]]:
        words = dict.fromkeys(re.findall(r"\w+", query.lower()))
        # A long document shows where the words are. Words in quotes cannot be FTS syntax.
        sql = """SELECT title, url, CASE WHEN length(text) < 600 THEN text ELSE snippet(docs, 2, '', '', '…', 64) END
                 FROM docs WHERE docs MATCH ? ORDER BY bm25(docs, 3, 0, 1), rowid LIMIT ?"""
        match = " OR ".join(f'"{word}"' for word in words)
        return self._execute(sql, (match, count)) if match else []


class TavilySearch:
    """Tavily's API. Answers are cached on disk, so that many rollouts of one question pay once."""

    def __init__(self, config: ToolConfig):
        self._config, self._locks = config, [threading.Lock() for _ in range(64)]
        handler = urllib.request.HTTPRedirectHandler()
        handler.redirect_request = lambda *_: None  # a redirect would carry the key to another host
        self._opener = urllib.request.build_opener(handler)

    def search(self, query: str, count: int) -> list[Sequence[str]]:
        request = {"query": query, "max_results": count, "exclude_domains": _EXCLUDED}
        body = json.dumps(request, sort_keys=True).encode()
        name = hashlib.sha256(self._config.tavily_url.encode() + body).hexdigest()
        file = Path(self._config.tool_cache).expanduser() / "tavily" / f"{name[:40]}.json"
        with self._locks[int(name, 16) % len(self._locks)]:  # who asks the same at the same time waits for the answer
            with suppress(OSError, ValueError):
                return json.loads(file.read_text())
            found = self._ask(body)
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix("." + secrets.token_hex(4))
                part.write_text(json.dumps(found))
                os.replace(part, file)
        return found

    def _ask(self, body: bytes) -> list[Sequence[str]]:
        deadline, status = time.monotonic() + self._config.tavily_timeout, 0
        for attempt in range(self._config.tavily_retries + 1):
            pause = 2**attempt * random.uniform(0.25, 0.75)
            try:
                rows = json.loads(self._post(body, deadline))["results"]
                return [[str(row.get(name) or "") for name in ("title", "url", "content")] for row in rows]
            except urllib.error.HTTPError as error:
                error.close()
                status = error.code
                if status != 429 and status < 500:
                    break
                with suppress(TypeError, ValueError):
                    pause = max(0.0, min(60.0, float(error.headers.get("Retry-After"))))
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError):
                status = 0
            if time.monotonic() + pause > deadline:
                break
            time.sleep(pause)
        quota = "its quota is used up"
        known = {0: "no reply", 401: "its key is not valid", 429: "too many requests", 432: quota, 433: quota}
        raise ToolError(f"web search does not answer ({known.get(status, f'status {status}')}).")

    def _post(self, body: bytes, deadline: float) -> bytes:
        key = os.environ.get("TAVILY_API_KEY", "")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self._config.tavily_url, body, headers)
        data = b""
        with self._opener.open(request, timeout=max(0.1, (deadline - time.monotonic()) / 2)) as reply:
            while chunk := reply.read1(2**16):
                data += chunk
                if time.monotonic() > deadline or len(data) > 2**22:
                    raise TimeoutError
        return data.replace(key.encode(), b"***") if key else data


# --- python: the trainer's side --------------------------------------------------------------------------------------

LOCKS = ["rlimits", "capabilities", "landlock", "seccomp"]
_GRACE = 2.0  # seconds between asking the code to stop and killing the session
_MOST_THREADS, _MOST_BYTES, _MOST_FILES = 64, 2**28, 1000
_slots = threading.BoundedSemaphore(2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


class _Dead(Exception):
    """The session is gone or has to go; the sentence says why."""


class _Zygote:
    """The process that forks the sessions, and the folder that holds theirs."""

    def __init__(self, config: ToolConfig):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a session costs the trainer three descriptors
        if soft < 4096:
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard < 0 else min(hard, 4096), hard))
        self._base = tempfile.mkdtemp(prefix="axpo-")
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        environment |= {name + "_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        fonts = os.path.expanduser(config.tool_cache + "/matplotlib")  # a list of fonts that takes seconds to make
        environment |= {"MPLBACKEND": "Agg", "MPLCONFIGDIR": fonts, "MALLOC_ARENA_MAX": "2", "TZ": "UTC"}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", os.path.abspath(__file__), self._base],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,  # from scratch: no key, no token, no address
            start_new_session=True,  # signals for the trainer's group pass it by; the closing socket ends it
        )
        theirs.close()
        self._socket.settimeout(120)
        answer = b""
        with suppress(OSError):
            answer = self._socket.recv(4096)
        if answer != b"ready":
            self.kill()
            raise ToolError(f"the python tool does not start ({answer.decode() or 'its process died'}).")

    def fork(self, config: ToolConfig, channel: int, output: int) -> tuple[str, int, int]:
        """Folder, process id and pidfd of a new session."""
        folder = tempfile.mkdtemp(dir=self._base)
        request = {"folder": folder, "locks": LOCKS} | {name: getattr(config, name) for name in _SESSION_OPTIONS}
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [channel, output])
            answer, pidfds, _, _ = socket.recv_fds(self._socket, 4096, 1)
        if not pidfds:
            raise ConnectionError("the zygote is gone")
        return folder, int(answer), pidfds[0]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        _remove(self._base)


_SESSION_OPTIONS = ("python_memory_mb", "observation_images", "image_side", "unsafe_python")
_zygotes: dict[int, _Zygote] = {}
_zygotes_lock = threading.Lock()


def _zygote(config: ToolConfig, broken: _Zygote | None = None) -> _Zygote:
    """The zygote of this process: by its id, since a fork of the trainer (a data loader's worker) needs its own."""
    with _zygotes_lock:
        zygote = _zygotes.get(os.getpid())
        if zygote and zygote is broken:
            zygote.kill()
        if zygote is broken:
            zygote = _zygotes[os.getpid()] = _Zygote(config)
        return zygote


class _Session:
    """One interpreter. Nothing that it sends is trusted: its code may have forged it."""

    def __init__(self, config: ToolConfig):
        self._config, self._owner = config, os.getpid()
        self._images: list[str] = []
        self._sent = 0
        zygote = _zygote(config)
        self._channel, theirs = socket.socketpair()
        self._output = os.memfd_create("output")
        fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)
        try:
            forked = zygote.fork(config, theirs.fileno(), self._output)
        except (ConnectionError, TimeoutError):  # the kernel may have killed it for want of memory
            forked = _zygote(config, zygote).fork(config, theirs.fileno(), self._output)
        self._folder, self._pid, self._pidfd = forked
        theirs.close()

    def hand_over(self, images: list[Image | bytes | Path]) -> None:
        """Writes the images that the session does not have yet where it can only read them, encoded ones as they are."""
        for number in range(len(self._images), len(images)):
            source = images[number]
            encoded = isinstance(source, (bytes, Path))
            path = f"{self._folder}/image_{number}.{(_open(source).format or 'bin').lower() if encoded else 'bmp'}"
            if isinstance(source, Path):
                shutil.copyfile(source, path)
            elif encoded:
                Path(path).write_bytes(source)
            else:
                source.convert("RGB").save(path)  # BMP is ten times as quick as PNG
            self._images.append(path)

    def run(self, code: str, seconds: float) -> tuple[str, list[Image], bool, int]:
        """Text, images, success and the number of images left out. Raises _Dead."""
        from PIL import Image

        limit, token = self._config.image_side, secrets.token_hex(8)
        request = {"id": token, "code": code, "seconds": seconds, "images": self._images[self._sent :]}
        data = json.dumps(request).encode()
        self._seconds, self._deadline = seconds, time.monotonic() + seconds + _GRACE
        try:
            os.ftruncate(self._output, 0)
            signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
            if _ready(self._channel.fileno(), 0):
                raise ValueError("an answer before the question")
            self._channel.settimeout(seconds + _GRACE)
            self._channel.sendall(struct.pack("<I", len(data)) + data)
            size = struct.unpack("<I", self._receive(4))[0]
            reply = json.loads(self._receive(size if size <= 4096 else 0))
            if reply["id"] != token:
                raise ValueError("an answer to another question")
            if "error" in reply:
                raise ToolError(str(reply["error"]))
            sizes = [(int(width), int(height)) for width, height in reply["sizes"]]
            if len(sizes) > self._config.observation_images or not all(0 < e <= limit for size in sizes for e in size):
                raise ValueError("images beyond the bounds")
            images = [Image.frombytes("RGB", size, self._receive(3 * size[0] * size[1])) for size in sizes]
            self._check()
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)  # threads that the code left behind burn nothing
            timeout = f"\nTimeout: stopped after {seconds:g} s; variables are kept." if reply["timeout"] else ""
            ok, dropped = reply["ok"] is True, int(reply["dropped"])
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise _Dead("The python process died.") from None
        self._sent = len(self._images)
        return (self.output() + timeout).lstrip("\n"), [_fit(image, limit) for image in images], ok, dropped

    def output(self) -> str:
        """What the code has printed; both ends of it where that is far more than an observation holds."""
        with suppress(OSError):
            size, part = os.fstat(self._output).st_size, 8 * self._config.observation_chars
            data = os.pread(self._output, part, 0)
            if size > part:
                data += os.pread(self._output, part, max(part, size - part))
            return data.decode("utf-8", "replace").rstrip("\n")
        return ""

    def _receive(self, size: int) -> bytes:
        data, look = bytearray(), time.monotonic() + 0.25
        while len(data) < size:
            now = time.monotonic()
            if now > self._deadline:
                raise _Dead(f"Timeout: killed after {self._seconds:g} s.")
            if now > look:
                self._check()
                look = now + 0.25
            self._channel.settimeout(max(0.01, min(look, self._deadline) - now))
            with suppress(TimeoutError):
                chunk = self._channel.recv(min(size - len(data), 2**20))
                if not chunk:
                    raise OSError("end of file")
                data += chunk
        return bytes(data)

    def _check(self) -> None:
        """The caps for which there is no rlimit."""
        with open(f"/proc/{self._pid}/status") as status:
            threads = int(re.search(r"Threads:\s*(\d+)", status.read())[1])
        folders, entries, size = [f"{self._folder}/work"], 0, 0
        while folders and entries <= _MOST_FILES:
            with suppress(FileNotFoundError), os.scandir(folders.pop()) as listing:  # it may vanish while we look
                for entry in listing:
                    entries += 1
                    folders += [entry.path] if entry.is_dir(follow_symlinks=False) else []
                    with suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_size
                    if entries > _MOST_FILES:
                        break
        if threads > _MOST_THREADS or size > _MOST_BYTES or entries > _MOST_FILES:
            raise _Dead("The python process was killed: too many threads, files or bytes.")

    def kill(self) -> None:
        if self._owner != os.getpid():  # a fork of the trainer drops its copy, the session is still its parent's
            return
        with suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            _ready(self._pidfd, 2.0)
        self._channel.close()
        os.close(self._pidfd)
        os.close(self._output)
        _remove(self._folder)


def _ready(descriptor: int, seconds: float) -> bool:
    poll = select.poll()  # select.select ends at descriptor 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _remove(folder: str) -> None:
    """Removes what a session left. That may be nested too deep for any path or recursion, so whatever lies two levels
    down is first moved up; and the trainer and the zygote may both be at it."""
    number, before = 0, set()
    with suppress(OSError):
        while (names := set(os.listdir(folder))) != before:
            before = names
            for child in (f"{folder}/{name}" for name in names):
                with suppress(OSError):
                    if os.path.islink(child) or not os.path.isdir(child):
                        os.unlink(child)
                        continue
                    os.chmod(child, 0o700)
                    for grandchild in (f"{child}/{name}" for name in os.listdir(child)):
                        if os.path.islink(grandchild) or not os.path.isdir(grandchild):
                            os.unlink(grandchild)
                        else:
                            number += 1
                            os.chmod(grandchild, 0o700)
                            os.rename(grandchild, f"{folder}/.{os.getpid()}.{number}")
                    os.rmdir(child)
        os.rmdir(folder)


_PROBE = """
import ctypes, os, socket
libc, attempts = ctypes.CDLL(None), {
    "read files": lambda: open("/etc/passwd"),
    "read the trainer's environment": lambda: open("/proc/PID/environ"),
    "write files": lambda: open("../escape", "w"),
    "signal processes": lambda: os.kill(os.getppid(), 0),
    "trace processes": lambda: libc.ptrace(16, os.getppid(), 0, 0) and 1 / 0,
    "open sockets": lambda: socket.socket(),
    "change its root": lambda: os.chroot("."),
    "start processes": lambda: os.fork() or os._exit(0),
    "run programs": lambda: os.execv("/bin/true", ["true"]),
}
for name, attempt in attempts.items():
    try:
        attempt()
        print(name)
    except (OSError, ZeroDivisionError):
        pass
"""


def start(config: ToolConfig) -> str:
    """Starts what all rollouts share, tries to break out of the sandbox, and says in one line what runs."""
    with Toolbox([], config) as toolbox:
        code = _PROBE.replace("PID", str(os.getpid()))
        found = toolbox.call(json.dumps({"name": "python", "arguments": {"code": code}})).text.replace("\n", ", ")
    if found == "(no output)":
        python = f"sandboxed (landlock abi {_landlock_abi()}, seccomp)"
    elif config.unsafe_python:
        python = f"NOT CONTAINED (--unsafe_python; the code can: {found})"
    else:
        raise ToolError(f"Model-written python cannot be contained here ({found}), see --unsafe_python.")
    search = "tavily" if os.environ.get("TAVILY_API_KEY") else "none"
    if config.search_corpus:
        search = f"local, {_engine(config).size} documents"
    return f"python: {python} | search: {search}"


# --- python: the zygote ----------------------------------------------------------------------------------------------


def _run_zygote(base: str) -> None:
    """Loads what the model's code needs, then forks a session per request until the trainer is gone."""
    trainer, parent = socket.socket(fileno=os.dup(0)), os.getppid()
    try:
        _preload()
        trainer.send(b"ready")
    except Exception as error:  # noqa: BLE001 (the trainer says why)
        trainer.send(str(error).encode()[:4000])
        return
    children: set[int] = set()
    try:
        # A fork of the trainer may hold the socket open, so its end is not the only sign that the trainer is gone.
        while os.getppid() == parent:
            ready = _ready(trainer.fileno(), 0.5)
            while children and (dead := os.waitpid(-1, os.WNOHANG)[0]):
                children.discard(dead)
            if not ready:
                continue
            message, descriptors, _, _ = socket.recv_fds(trainer, 65536, 2)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                try:
                    _run_session(json.loads(message), *descriptors, os.getppid())
                finally:
                    os._exit(1)
            children.add(pid)
            descriptors.append(os.pidfd_open(pid))
            socket.send_fds(trainer, [str(pid).encode()], descriptors[2:])
            for descriptor in descriptors:
                os.close(descriptor)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)
        _remove(base)


def _preload() -> None:
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, the kernel takes a session rather than the trainer
    os.nice(10)
    import numpy.random  # noqa: F401
    import PIL.Image

    PIL.Image.init()
    PIL.Image.Image.show = _show
    with suppress(ImportError):
        from matplotlib import figure, pyplot

        figure.Figure.show, pyplot.show = _show, _show_figures
        pyplot.plot([0, 1])  # a first drawing loads the fonts
        pyplot.gcf().canvas.draw()
        pyplot.close("all")
    if len(os.listdir("/proc/self/task")) > 1 or "torch" in sys.modules:
        raise RuntimeError("its process is not clean")
    gc.collect()
    gc.freeze()  # or the collector of every session would copy every page


# --- python: the session ---------------------------------------------------------------------------------------------

_shown: list = []  # RGB images of this call
_bounds = {"images": 0, "side": 0, "dropped": 0}


class _Timeout(BaseException):
    """Raised inside the model's code when its time is over."""


def _show(picture: object, *_: object, **__: object) -> None:
    """Image.show and Figure.show: keeps a copy for the observation, or only counts where there are enough."""
    from PIL import Image

    if len(_shown) >= _bounds["images"]:
        _bounds["dropped"] += 1
        return
    if not isinstance(picture, Image.Image):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(picture)
        canvas.draw()
        picture = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    picture = picture.convert("RGB")
    picture.thumbnail((_bounds["side"], _bounds["side"]))
    _shown.append(picture)


def _show_figures(*_: object, **__: object) -> None:
    from matplotlib import pyplot

    for number in pyplot.get_fignums():
        _show(pyplot.figure(number))
    pyplot.close("all")


def _run_session(options: dict, channel: int, output: int, parent: int) -> None:
    """Locks this process down, then answers requests on descriptor 3 until it is killed."""
    error = ""
    try:
        _lock_down(options, channel, output, parent)
    except (OSError, KeyError) as problem:
        error = f"this kernel does not let Python be contained ({problem})"
    _bounds.update(images=options["observation_images"], side=options["image_side"])
    main = types.ModuleType("__main__")
    ours, sys.modules["__main__"] = sys.modules["__main__"], main  # noqa: F841 (ours must stay alive)
    main.__dict__.update(_images=[], _pil_images=[])
    number = 0
    while header := os.read(3, 4):
        size, data = struct.unpack("<I", header)[0], b""
        while len(data) < size:
            data += os.read(3, size - len(data))
        request, number = json.loads(data), number + 1
        reply = {"id": request["id"], "error": error}
        if not error:
            _shown.clear()
            _bounds["dropped"] = 0
            ok, timeout = _execute(request, main.__dict__, f"<call {number}>")
            with suppress(Exception):
                sys.stdout.flush()
            sizes = [picture.size for picture in _shown]
            reply = {"id": request["id"], "ok": ok, "timeout": timeout, "sizes": sizes, "dropped": _bounds["dropped"]}
        data = json.dumps(reply).encode()
        view = memoryview(b"".join([struct.pack("<I", len(data)), data, *(p.tobytes() for p in _shown)]))
        while view:
            view = view[os.write(3, view) :]


def _execute(request: dict, names: dict, file: str) -> tuple[bool, bool]:
    """Runs the code as a notebook runs a cell. Returns whether it went well and whether its time ran out."""
    armed = True

    def alarm(*_: object) -> None:
        if armed:
            raise _Timeout

    # Made anew for each call: the one before may have closed or replaced it.
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    linecache.cache[file] = (len(request["code"]), None, request["code"].splitlines(True), file)
    signal.signal(signal.SIGALRM, alarm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        signal.setitimer(signal.ITIMER_REAL, request["seconds"], 0.2)  # again and again: code can swallow the first
        try:
            _run_cell(request, names, file)
            return True, False
        except _Timeout:
            raise
        except SystemExit as stop:
            return not stop.code, False
        except BaseException as problem:  # noqa: BLE001
            trace = problem.__traceback__
            while trace and trace.tb_frame.f_code.co_filename != file:
                trace = trace.tb_next  # our own frames
            lines = "".join(traceback.format_exception(type(problem), problem, trace))
            with suppress(OSError):
                os.ftruncate(1, min(os.fstat(1).st_size, 2**25))  # the output may be full: room for the traceback
                sys.stderr.write(lines if isinstance(problem, SyntaxError) else re.sub(r"(?m)^ +[~^]+\n", "", lines))
            return False, False
        finally:
            armed = False
    except _Timeout:
        return False, True
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def _run_cell(request: dict, names: dict, file: str) -> None:
    from PIL import Image

    for path in request["images"]:
        image = Image.open(path)  # decoded when the code looks at it
        names.setdefault("_images", []).append(path)
        names.setdefault("_pil_images", []).append(image if image.mode == "RGB" else image.convert("RGB"))
    tree = ast.parse(request["code"], file)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, file, "exec"), names)  # noqa: S102
    value = eval(compile(ast.Expression(last.value), file, "eval"), names) if last else None
    if isinstance(value, Image.Image):
        _show(value)
    elif value is not None:
        print(repr(value))


# --- python: the locks -----------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes) -> int:
    """A function of libc, its arguments of full width."""
    result = getattr(_libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _lock_down(options: dict, channel: int, output: int, parent: int) -> None:
    """Everything between fork and the first line of the model's code."""
    channel, output = (fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (channel, output))
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2), (channel, 3)):
        os.dup2(source, target)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    work = options["folder"] + "/work"
    os.mkdir(work)
    os.chdir(work)
    os.environ.update(HOME=work, TMPDIR=work)
    import numpy

    random.seed()  # a fork would repeat its parent's numbers
    numpy.random.seed()
    capset = {"x86_64": 126, "aarch64": 91}[os.uname().machine]
    steps = {
        "rlimits": lambda: _limit_resources(options["python_memory_mb"]),
        "capabilities": lambda: _call("syscall", capset, struct.pack("<Ii", 0x20080522, 0), bytes(24)),
        "landlock": lambda: _landlock(options["folder"], work),
        "seccomp": _seccomp,
    }
    _call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: no session outlives the zygote
    if os.getppid() != parent:
        os._exit(1)
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    for name in options["locks"]:
        try:
            steps[name]()
        except OSError as error:
            if not options["unsafe_python"]:
                raise OSError(f"{name}: {error.strerror}") from None


def _limit_resources(memory_mb: int) -> None:
    limits = {resource.RLIMIT_AS: memory_mb * 2**20, resource.RLIMIT_CPU: 120, resource.RLIMIT_FSIZE: 2**26}
    limits |= {resource.RLIMIT_NOFILE: 128, resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0}
    for name, value in (limits | {11: 256, 12: 0}).items():  # pending signals (timers), message queues
        resource.setrlimit(name, (value, value))


def _landlock_abi() -> int:
    return _call("syscall", 444, 0, 0, 1)


def _landlock(folder: str, work: str) -> None:
    """Reads the system's libraries, this Python and the session's folder; writes the session's `work`; nothing else."""
    abi = _landlock_abi()
    write, read, listing, refer, truncate, device = 2, 4, 8, 1 << 13, 1 << 14, 1 << 15
    remove, make_folder, make_file, make_link = 16 | 32, 128, 256, 1 << 12
    handled = (1 << 13) - 1 | (refer if abi > 1 else 0) | (truncate if abi > 2 else 0) | (device if abi > 4 else 0)
    own = (write | read | listing | remove | make_folder | make_file | make_link | refer | truncate) & handled
    # TCP from ABI 4, abstract sockets and signals from ABI 6; seccomp forbids them in any case.
    attributes = struct.pack("<QQQ", handled, 3, 3)[: 24 if abi > 5 else 16 if abi > 3 else 8]
    ruleset = _call("syscall", 444, attributes, len(attributes), 0)
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64", folder}
    rules = dict.fromkeys(prefixes, read | listing) | {work: own, "/dev/null": read | write}
    for path, rights in (rules | dict.fromkeys(("/dev/zero", "/dev/urandom", "/etc/ld.so.cache"), read)).items():
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_PATH)
            _call("syscall", 445, ruleset, 1, struct.pack("<Qi", rights, descriptor), 0)
            os.close(descriptor)
    _call("syscall", 446, ruleset, 0)
    os.close(ruleset)


# Numbers of system calls on x86-64 and on aarch64.
_DENIED = (
    ("41-55 288 299 307", "198-212 242 243 269"),  # sockets
    ("57-59 322", "221 281"),  # fork, vfork, exec
    ("101 274 279 256 310-312", "117 100 239 238 270-272"),  # ptrace, other processes' memory and robust lists, kcmp
    ("129 200 297 109 112", "138 130 240 154 157"),  # queued signals, tkill, process groups
    ("424 434 438 440 448", "424 434 438 440 448"),  # pidfds and what they allow
    ("141 142 144 203 251 314", "140 118 119 122 30 274"),  # priorities and schedulers, which reach other processes
    ("29-31 64-71 220 240-245 319 447", "180-197 279 447"),  # SysV, message queues, memory without a limit
    ("206-210 333 425-427", "0-4 292 425-427"),  # asynchronous I/O, io_uring
    ("298 317 321 323 248-250", "241 277 280 282 217-219"),  # perf, seccomp, bpf, userfaultfd, keys
    ("103 134 135 153-156 159 161-180 246 272 304 303", "116 92 58 41 171 51 81 89 170 39 40 42 104-106 97 264 265"),
    ("305 306 308 313 320", "60 142 161 162 224 225 266-268 273 294"),  # both lines: the administration of a system
    ("428-433 442 443 457 458", "428-433 442 443 457 458"),  # mounts
    ("76 133 259 73 92-94 260 188-190 197-199", "45 33 32 54 55 5-7 14-16"),  # truncate, mknod, flock, owners, xattr
    ("253-255 294 300 301 275 276 278", "26-28 262 263 75-77"),  # inotify, fanotify, splice
)
_PRETENDED = ("90 91 268 452 132 235 261 280", "52 53 452 88")  # modes and times: shutil.copy must not fail
_MISSING = ("435 437", "435 437")  # clone3 and openat2 hide their flags from a filter; libc then uses the older calls


def _seccomp() -> None:
    """A filter that no later code can take off. Arguments are compared by their lower halves, as the kernel reads them."""
    column, architecture = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}[os.uname().machine]
    allow, deny, pretend, missing = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000, 0x50000 | errno.ENOSYS
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]  # others: kill

    def between(low: int, high: int, verdict: int) -> None:
        program.extend([(0x35, 0, 2, low), (0x25, 1, 0, high), (0x06, 0, 0, verdict)])

    def only(number: int, argument: int, values: Sequence[int], mask: int = 0xFFFFFFFF) -> None:
        block = [(0x20, 0, 0, 16 + 8 * argument), (0x54, 0, 0, mask)]
        for value in values:
            block += [(0x15, 0, 1, value), (0x06, 0, 0, allow)]
        program.extend([(0x15, 0, len(block) + 1, number), *block, (0x06, 0, 0, deny)])

    between(463, 0xFFFFFFFF, missing)  # calls newer than this list, and all of x32
    for verdict, table in ((deny, _DENIED), (pretend, [_PRETENDED]), (missing, [_MISSING])):
        for numbers in (row[column].split() for row in table):
            for low, _, high in (number.partition("-") for number in numbers):
                between(int(low), int(high or low), verdict)
    own = os.getpid()
    only((62, 129)[column], 0, [own])  # kill
    only((234, 131)[column], 0, [own])  # tgkill
    only((302, 261)[column], 0, [0, own])  # prlimit64
    only((56, 220)[column], 0, [0x10000], 0x7E030000)  # clone: threads (CLONE_THREAD), no namespaces
    only((72, 25)[column], 1, [0, 1, 2, 3, 4, 5, 6, 7, 1030])  # fcntl: not F_SETOWN, F_SETSIG, F_NOTIFY, F_SETPIPE_SZ
    only((16, 29)[column], 1, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451])  # ioctl: isatty, sizes, close-on-exec
    only((157, 167)[column], 0, [3, 15, 16, 23, 0x53564D41])  # prctl: names, and what can only be read
    # Landlock before ABI 3 does not see O_TRUNC on a descriptor that is not open for writing.
    for number, argument in ((2, 1), (257, 2)) if column == 0 else ((56, 2),):
        only(number, argument, [0, 1, 2, 3, 0x201, 0x202], 0x203)
    program.append((0x06, 0, 0, allow))
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    filter = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(buffer)))
    _call("prctl", 22, 2, filter, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    _run_zygote(sys.argv[1])
