"""The three tools of the policy: `python`, `image_zoom_in` and `tavily-search`.

A `Toolbox` holds the tools of one rollout: its images and, once `python` was called, its interpreter. `call` takes what
stands between <tool_call> and </tool_call> and always returns an `Observation`.

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
import fcntl
import gc
import hashlib
import io
import json
import linecache
import math
import os
import random
import re
import resource
import secrets
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
import urllib.request
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path

import numpy  # this and PIL are all that the zygote, which runs this file too, may import here
from PIL import Image

# fmt: off
SCHEMAS = [  # in the OpenAI format, and short, because they stand in every prompt
    {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": properties, "required": required}}}
    for name, description, required, properties in [
        ("python",
         "Run Python; state is kept. _pil_images: all images (PIL), _images: their paths. plt.show() returns figures.",
         ["code"],
         {"code": {"type": "string"}, "timeout": {"type": "integer", "description": "seconds, default 12"}}),
        ("image_zoom_in", "Crop and enlarge a part of an image.", ["bbox_2d", "label"],
         {"bbox_2d": {"type": "array", "description": "[x1, y1, x2, y2], 0-1000", "items": {"type": "number"}},
          "label": {"type": "string", "description": "what is there"},
          "img_idx": {"type": "integer", "description": "image number, default 0"}}),
        ("tavily-search", "Search the web.", ["query"],
         {"query": {"type": "string"}, "max_results": {"type": "integer", "description": "default 5"}}),
    ]
]
# fmt: on


def _option(default: object, help: str) -> object:
    return field(default=default, metadata={"help": help})


@dataclass
class ToolConfig:
    search_corpus: str | None = _option(None, "JSONL file of {title, url, text} to search, TAVILY_API_KEY or not")
    unsafe_python: bool = _option(False, "run model-written Python even where the kernel cannot contain it")
    python_timeout: int = _option(12, "seconds of a python call that names no timeout")
    python_max_timeout: int = _option(60, "cap for the timeout that a call names")
    python_memory_mb: int = _option(2048, "address space of one python session")
    observation_chars: int = _option(4000, "longest text of an observation")
    observation_images: int = _option(4, "most images of an observation")
    image_side: int = _option(1280, "longest side of an image that a tool returns")
    zoom_side: int = _option(512, "a zoomed crop is enlarged to at least the area of a square of this side")
    tool_cache: str = _option("~/.cache/axpo", "folder of the search index, of Tavily's answers and of a font cache")


_Source = Image.Image | bytes | Path  # of an image: decoded, encoded or a file


@dataclass(frozen=True)
class Observation:
    text: str
    images: list[Image.Image]
    ok: bool


class ToolError(ValueError):
    """What was wrong with a call or with the set-up, in one sentence for the model or the user."""


class Toolbox(AbstractContextManager):
    """The tools and images of one rollout. No process is started and no image decoded before a call needs it."""

    def __init__(self, images: Sequence[_Source], config: ToolConfig | None = None):
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
                tool, arguments = self._parse(text)
                text, images, ok = tool(arguments)
                self.images += images
        except ToolError as error:
            text = f"Error: {error}"
        except Exception as error:  # a full disk, a broken picture: go on
            text = f"Error: the tool failed ({type(error).__name__})."
        return Observation(_clean(text, self.config.observation_chars), images, ok)

    def _parse(self, text: str) -> tuple:
        """The method and the arguments, those that are null left out."""
        try:
            call = json.loads(text)
            name = call["name"]
            arguments = {key: value for key, value in call["arguments"].items() if value is not None}
        except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
            raise ToolError('the call is not JSON of the form {"name": ..., "arguments": {...}}.') from None
        tools = {"python": self._python, "image_zoom_in": self._zoom, "tavily-search": self._search}
        if name not in list(tools):  # a list: what stands there may have no hash
            raise ToolError(f"there is no such tool; the tools are {', '.join(tools)}.")
        return tools[name], arguments

    def _python(self, arguments: dict) -> tuple[str, list[Image.Image], bool]:
        code, timeout = _string(arguments, "code"), arguments.get("timeout", self.config.python_timeout)
        seconds = _number(timeout, "timeout", 1, self.config.python_max_timeout)
        with _slots:  # so that a deadline measures the call and not the queue before it
            session = self._session = self._session or _Session(self.config)
            looks = re.search("image|globals|vars|eval|exec|dir|glob", code)  # most code never looks at the images
            try:
                text, images, ok, dropped = session.run(code, seconds, self.images if looks else [])
            except _Dead as death:
                text, self._session = session.output(), None
                session.kill()
                return f"{text}\n{death} The session was restarted: its variables are lost.".lstrip(), [], False
        notes = [f"Image {len(self.images) + i}: shown by the code." for i in range(len(images))]
        notes += [f"{dropped} more images were left out."] if dropped else []
        return "\n".join(filter(None, [text, *notes])) or "(no output)", images, ok

    def _zoom(self, arguments: dict) -> tuple[str, list[Image.Image], bool]:
        box = arguments.get("bbox_2d")
        if not isinstance(box, list) or len(box) != 4:
            raise ToolError("bbox_2d must be [x1, y1, x2, y2].")
        x1, y1, x2, y2 = (_number(edge, "an edge of bbox_2d", 0, 1000) for edge in box)
        if x1 >= x2 or y1 >= y2:
            raise ToolError("bbox_2d must have x1 < x2 and y1 < y2, within 0-1000.")
        index = int(_number(arguments.get("img_idx", 0), "img_idx", -1, len(self.images)))
        if not 0 <= index < len(self.images):
            raise ToolError(f"img_idx must be below {len(self.images)}, the number of images.")
        image = _decoded(self.images[index])
        left, right = _span(x1, x2, image.width, (y2 - y1) / 1000 * image.height)
        top, bottom = _span(y1, y2, image.height, right - left)
        crop = image.crop((left, top, right, bottom)).convert("RGB")
        crop = _fit(crop, self.config.image_side, self.config.zoom_side)
        return f"Image {len(self.images)}: zoomed crop of image {index}.", [crop], True

    def _search(self, arguments: dict) -> tuple[str, list[Image.Image], bool]:
        query = " ".join(_string(arguments, "query").encode("utf-8", "replace").decode().split())[:400]
        engine = _search_corpus if self.config.search_corpus else _search_web
        count = int(_number(arguments.get("max_results", 5), "max_results", 1, 10))
        return _listed(engine(self.config, query, count), self.config.observation_chars), [], True


def _string(arguments: dict, name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value.strip() or len(value) > 30_000:  # must fit one message to a session
        raise ToolError(f"{name} must be a string, neither empty nor endless.")
    return value


def _number(value: object, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # NaN
        raise ToolError(f"{name} must be a number.")
    return max(low, min(high, value))


def _clean(text: str, limit: int) -> str:
    """Valid UTF-8 of at most `limit` characters, in which the tokens of the chat template do not survive as such."""
    text = re.sub(r"<(?=\|\w+\|>|/?(?:think|tool_call|tool_response)>)", "< ", text.encode("utf-8", "replace").decode())
    cut = "\n... Output truncated ...\n"
    half = max(0, limit - len(cut)) // 2  # the end matters as well: that is where a traceback stands
    return text if len(text) <= limit else (text[:half] + cut + text[len(text) - half :])[:limit]


# --- images ----------------------------------------------------------------------------------------------------------

_DECODED_BYTES = 2**30  # decoded full-resolution images kept for zooming, all rollouts together
_decoded_images: dict[object, tuple] = {}  # source, image and the lock of its decoding; the least recently used first
_decoded_lock = threading.Lock()


def _decoded(source: _Source) -> Image.Image:
    """The full-resolution image. Rollouts of one question share it; the memory of all of them is bounded."""
    key = source if isinstance(source, Path) else id(source)  # the entry holds the source, so ids stay unique
    with _decoded_lock:
        if isinstance(source, Image.Image):
            source.load()  # two threads must not load the same lazy image
            return source
        _, image, lock = entry = _decoded_images.pop(key, None) or (source, _open(source), threading.Lock())
        _decoded_images[key] = entry
        while sum(4 * kept.width * kept.height for _, kept, _ in _decoded_images.values()) > _DECODED_BYTES:
            del _decoded_images[next(iter(_decoded_images))]
    with lock:  # two rollouts never decode the same 8K picture at once
        image.load()
    return image


def _open(source: bytes | Path) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _span(low: float, high: float, size: int, other: float) -> tuple[int, int]:
    """Pixels of low..high (0-1000) of `size`: at least 16, and widened where the crop would be thinner than 1:16."""
    first, last = math.floor(low / 1000 * size), math.ceil(high / 1000 * size)
    length = min(size, max(last - first, 16, math.ceil(other / 16)))
    first = max(0, min(first - (length - (last - first)) // 2, size - length))
    return first, first + length


def _fit(image: Image.Image, longest: int, side: int = 0) -> Image.Image:
    """Enlarged to the area of side x side, but no edge above `longest` and none too short for an image processor."""
    scale = min(max(1.0, side / math.sqrt(image.width * image.height)), longest / max(image.size))
    size = tuple(max(32, round(edge * scale)) for edge in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


# --- search ----------------------------------------------------------------------------------------------------------

_EXCLUDED = ["huggingface.co"]  # benchmarks lie there with their answers
_TAVILY_URL, _TAVILY_SECONDS, _TAVILY_TRIES = "https://api.tavily.com/search", 40.0, 5  # seconds: all tries together
_opener = urllib.request.OpenerDirector()  # it follows no redirect, which would carry the key to another host
for _handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    _opener.add_handler(_handler())


def _listed(found: list[Sequence[str]], limit: int) -> str:
    """Title, URL and text of each result, the texts cut alike so that all of them fit."""
    found = [row for row in found if not any(site in row[1].lower() for site in _EXCLUDED)]
    entries = []
    for number, (title, url, text) in enumerate(found, 1):
        head = "\n".join(filter(None, [f"{number}. {title[:200]}".strip(), url[:300]]))
        text, room = " ".join(text.split()), max(40, limit // len(found) - len(head) - 3)
        entries.append("\n".join(filter(None, [head, text if len(text) <= room else text[: room - 1] + "…"])))
    return "\n\n".join(entries) or "No results."


@lru_cache
def _index(corpus: str, cache: str) -> str:
    """URI of the SQLite index of a JSONL corpus: built once per state of the file, swapped in, then only read."""
    source, folder = Path(corpus).expanduser().resolve(), Path(cache).expanduser().absolute()
    try:
        state = f"1 {source} {source.stat().st_size} {source.stat().st_mtime_ns}"
        index = folder / f"search-{hashlib.sha256(os.fsencode(state)).hexdigest()[:16]}.sqlite"
        folder.mkdir(parents=True, exist_ok=True)
        with open(f"{index}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as scratch:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other ranks of a node wait for the first to build
            if not index.exists():
                _build_index(source, f"{scratch}/index")
                os.replace(f"{scratch}/index", index)
    except (OSError, sqlite3.Error) as error:
        raise ToolError(f"--search_corpus {source} cannot be indexed in {folder} ({error}).") from None
    return f"{index.as_uri()}?mode=ro&immutable=1"


def _build_index(source: Path, index: str) -> None:
    with closing(sqlite3.connect(index)) as database, open(source, encoding="utf-8", errors="replace") as lines:
        database.execute("CREATE VIRTUAL TABLE docs USING fts5(title, url UNINDEXED, text, tokenize='porter')")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                values = [str(row.get(name) or "") for name in ("title", "url", "text")]
                database.execute("INSERT INTO docs VALUES (?, ?, ?)", values)
            except (ValueError, AttributeError, RecursionError):
                raise ToolError(f"line {number} of {source} is not a JSON object of valid text.") from None
        database.commit()


def _query(config: ToolConfig, sql: str, *arguments: object) -> list[Sequence]:
    with closing(sqlite3.connect(_index(config.search_corpus, config.tool_cache), uri=True)) as database:
        return database.execute(sql, arguments).fetchall()


def _search_corpus(config: ToolConfig, query: str, count: int) -> list[Sequence[str]]:
    """Rows of title, URL and text by BM25; a long text is cut to where the words are."""
    match = " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", query.lower())))  # quoted: no syntax
    sql = """SELECT title, url, CASE WHEN length(text) < 600 THEN text ELSE snippet(docs, 2, '', '', '…', 64) END
             FROM docs WHERE docs MATCH ? ORDER BY bm25(docs, 3, 0, 1), rowid LIMIT ?"""
    return _query(config, sql, match, count) if match else []


def _search_web(config: ToolConfig, query: str, count: int) -> list[Sequence[str]]:
    """Rows of title, URL and text by Tavily. Answers are kept on disk, so that many rollouts of a question pay once."""
    if not os.environ.get("TAVILY_API_KEY"):
        raise ToolError("web search is not available.")
    request = {"query": query, "max_results": count, "exclude_domains": _EXCLUDED}
    body = json.dumps(request, sort_keys=True).encode()
    folder = Path(config.tool_cache).expanduser() / "tavily"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{hashlib.sha256(_TAVILY_URL.encode() + body).hexdigest()[:40]}.json", "a+") as answer:
        fcntl.flock(answer, fcntl.LOCK_EX)  # who asks the same at the same time, on any rank, waits for the answer
        answer.seek(0)
        with suppress(ValueError):  # empty, or cut off when its writer died
            return json.load(answer)
        found = _ask_tavily(body)
        answer.truncate(0)
        json.dump(found, answer)
    return found


def _ask_tavily(body: bytes) -> list[Sequence[str]]:
    """Tries again on 429, 5xx and broken answers, after a pause that doubles. Raises ToolError in the end."""
    key, deadline = os.environ["TAVILY_API_KEY"], time.monotonic() + _TAVILY_SECONDS
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(_TAVILY_URL, body, headers)
    for attempt in range(_TAVILY_TRIES):
        status, data, pause = 0, b"", 2**attempt * random.uniform(0.25, 0.75)
        timeout = max(0.1, (deadline - time.monotonic()) / 2)  # half of what is left: another try must have its chance
        with suppress(Exception):  # no connection, a slow or closed one, JSON that is broken or of another shape
            with _opener.open(request, timeout=timeout) as reply:
                while (chunk := reply.read1(2**16)) and len(data) < 2**22 and time.monotonic() < deadline:
                    data += chunk
            status = reply.status
            if status == 200:
                rows = json.loads(data.replace(key.encode(), b"***"))["results"]
                return [[str(row.get(name) or "") for name in ("title", "url", "content")] for row in rows]
            pause = max(0.0, min(60.0, float(reply.headers["Retry-After"])))
        if status not in (0, 200, 429) and status < 500 or time.monotonic() + pause > deadline:
            break
        time.sleep(pause)
    reasons = dict.fromkeys([0, 200], "no reply") | dict.fromkeys([432, 433], "its quota is used up")
    reasons |= {401: "its key is not valid", 429: "too many requests"}
    raise ToolError(f"web search does not answer ({reasons.get(status, f'status {status}')}).")


# --- python: the trainer's side --------------------------------------------------------------------------------------

LOCKS = ["rlimits", "capabilities", "landlock", "seccomp"]  # the tests switch some of them off
_GRACE = 2.0  # seconds between asking the code to stop and killing the session
_MOST_THREADS, _MOST_BYTES, _MOST_FILES = 64, 2**28, 1000
_slots = threading.BoundedSemaphore(2 * len(os.sched_getaffinity(0)))  # calls that may run at once


class _Dead(Exception):
    """The session is gone or has to go; the sentence says why."""


class _Zygote:
    """The process that forks the sessions, and the folder that holds theirs."""

    def __init__(self, config: ToolConfig):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a session costs the trainer three descriptors
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
        self.base, self._lock = tempfile.mkdtemp(prefix="axpo-"), threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The environment is made from scratch: no key, no token, no address.
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        environment |= {name + "_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        fonts = os.path.expanduser(config.tool_cache + "/matplotlib")  # a list of fonts that takes seconds to make
        environment |= {"MPLBACKEND": "Agg", "MPLCONFIGDIR": fonts, "MALLOC_ARENA_MAX": "2", "TZ": "UTC"}
        command = [sys.executable, "-I", "-B", "-X", "no_debug_ranges", os.path.abspath(__file__), self.base]
        pipes = {"stdin": theirs, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with theirs:  # a session of its own: signals for the trainer's group pass it by, the closing socket ends it
            self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        self._socket.settimeout(120)
        with suppress(OSError):
            if self._socket.recv(8) == b"ready":
                return
        self.process.kill()
        reason = self.process.communicate()[1].decode(errors="replace").strip().split("\n")[-1]
        _remove(self.base)
        raise ToolError(f"the python tool does not start ({reason or 'its process died'}).")

    def fork(self, config: ToolConfig) -> tuple[str, int, list[int]]:
        """Folder and process id of a new session; its channel, the file of its output and its pidfd."""
        folder = tempfile.mkdtemp(dir=self.base)
        request = {"folder": folder, "locks": LOCKS, "unsafe": config.unsafe_python, "side": config.image_side}
        request |= {"images": config.observation_images, "memory": config.python_memory_mb * 2**20}
        with self._lock:
            self._socket.send(json.dumps(request).encode())
            try:
                answer, descriptors, _, _ = socket.recv_fds(self._socket, 64, 3)
            except TimeoutError:
                self.process.kill()  # its late answer would be taken for that to the next request
                raise
        if not descriptors:
            raise ConnectionError("the zygote is gone")
        return folder, int(answer), descriptors


_zygotes: dict[int, _Zygote] = {}  # by process id: a fork of the trainer (a data loader's worker) needs its own
_zygotes_lock = threading.Lock()


def _zygote(config: ToolConfig) -> _Zygote:
    with _zygotes_lock:
        zygote = _zygotes.get(os.getpid())
        if zygote is None or zygote.process.poll() is not None:  # the kernel kills it first for want of memory
            if zygote:
                _remove(zygote.base)
            zygote = _zygotes[os.getpid()] = _Zygote(config)
        return zygote


class _Session:
    """One interpreter. Nothing that it sends is trusted: its code may have forged it.

    A call is one message to it on a channel and one back. What the code prints goes to a memory file, and after it, for
    each image, its RGB bytes: so the trainer waits for nothing but that one message.
    """

    def __init__(self, config: ToolConfig):
        self._config, self._owner = config, os.getpid()
        self._handed = 0  # number of images that it has
        self.folder, self.pid, (channel, self._output, self._pidfd) = _zygote(config).fork(config)
        self._channel = socket.socket(fileno=channel)
        self._channel.settimeout(0.25)

    def _hand_over(self, images: Sequence[_Source]) -> list[str]:
        """Writes the images that the session does not have yet where it can only read. Returns their paths."""
        paths = []
        for number, source in enumerate(images[self._handed :], self._handed):
            if isinstance(source, Image.Image):
                paths.append(f"{self.folder}/image_{number}.bmp")  # ten times as quick as PNG
                source.convert("RGB").save(paths[-1])
            else:
                paths.append(f"{self.folder}/image_{number}.{_open(source).format.lower()}")
                Path(paths[-1]).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
        self._handed += len(paths)
        return paths

    def run(self, code: str, seconds: float, images: Sequence[_Source]) -> tuple[str, list[Image.Image], bool, int]:
        """Text, images, success and the number of images left out. `images` are those that the code may look at; it has
        those of earlier calls. Raises _Dead."""
        request = {"id": secrets.token_hex(8), "code": code, "seconds": seconds, "images": self._hand_over(images)}
        side, most = self._config.image_side, self._config.observation_images
        try:
            os.ftruncate(self._output, 0)
            signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
            self._channel.send(json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass"))
            reply = self._reply(seconds)
            sizes = [(int(width), int(height)) for width, height in reply["sizes"]]
            if reply["id"] != request["id"] or len(sizes) > most or not all(0 < e <= side for s in sizes for e in s):
                raise ValueError("forged")
            shown, end = [], int(reply["text"])
            text = self.output(end)
            for size in sizes:
                pixels = os.pread(self._output, 3 * size[0] * size[1], end)
                shown.append(_fit(Image.frombytes("RGB", size, pixels), side))
                end += len(pixels)
            ok, timeout, dropped = reply["ok"] is True, reply["timeout"] is True, int(reply["dropped"])
            self._check()
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)  # threads that the code left behind burn nothing
        except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
            raise _Dead("The python process died.") from None
        text += f"\nTimeout: stopped after {seconds:g} s; variables are kept." if timeout else ""
        return text.lstrip("\n"), shown, ok, dropped

    def _reply(self, seconds: float) -> dict:
        deadline = time.monotonic() + seconds + _GRACE
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                return json.loads(self._channel.recv(4096))
            self._check()
        raise _Dead(f"Timeout: killed after {seconds:g} s.")

    def output(self, size: int | None = None) -> str:
        """What the code has printed; both ends of it where that is far more than an observation holds."""
        size, part = os.fstat(self._output).st_size if size is None else size, 8 * self._config.observation_chars
        data = os.pread(self._output, min(size, part), 0)
        if size > part:
            data += os.pread(self._output, min(size - part, part), max(part, size - part))
        return data.decode("utf-8", "replace").rstrip("\n")

    def _check(self) -> None:
        """The caps for which there is no rlimit."""
        folders, entries, size = [f"{self.folder}/work"], 0, 0
        while folders and entries <= _MOST_FILES:
            with suppress(FileNotFoundError), os.scandir(folders.pop()) as listing:  # it may vanish while we look
                for entry in listing:
                    entries += 1
                    with suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_size
                        folders += [entry.path] if entry.is_dir(follow_symlinks=False) else []
        disk = os.stat(self.folder).st_dev
        with suppress(OSError), os.scandir(f"/proc/{self.pid}/fd") as listing:  # a deleted file lives while it is open
            for entry in listing:
                with suppress(FileNotFoundError):
                    found = entry.stat()
                    size += found.st_size if found.st_nlink == 0 and found.st_dev == disk else 0
        threads = len(os.listdir(f"/proc/{self.pid}/task"))
        if threads > _MOST_THREADS or size > _MOST_BYTES or entries > _MOST_FILES:
            raise _Dead("The python process was killed: too many threads, files or bytes.")

    def kill(self) -> None:
        """Returns when the process is dead and its folder removed."""
        if self._owner != os.getpid():  # a fork of the trainer drops its copy, the session is still its parent's
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        wait([self._pidfd], 2)
        self._channel.close()
        os.close(self._pidfd)
        os.close(self._output)
        _remove(self.folder)


def _remove(folder: str) -> None:
    """Removes what a session left, which may be closed, or nested too deep for Python; two may be at it at once."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        command = ["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', folder]
        subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


_PROBE = """
import os, socket
for name, attempt in {
    "read files": lambda: open("/etc/passwd"),
    "read the trainer's environment": lambda: open("/proc/PID/environ"),
    "write files": lambda: open("../escape", "w"),
    "signal processes": lambda: os.kill(os.getppid(), 0),
    "open sockets": lambda: socket.socket(),
    "change its root": lambda: os.chroot("."),
    "start processes": lambda: os.fork() or os._exit(0),
    "run programs": lambda: os.execv("/bin/true", ["true"]),
}.items():
    try:
        attempt()
        print(name)
    except OSError:
        pass
"""


def start(config: ToolConfig) -> str:
    """Starts what all rollouts share, tries to break out of the sandbox, and says in one line what runs."""
    cache = os.path.expanduser(config.tool_cache)
    with suppress(OSError):
        os.makedirs(cache, exist_ok=True)
    if not os.access(cache, os.W_OK):
        raise ToolError(f"--tool_cache {cache} cannot be written.")
    session = _Session(config)
    try:
        found = session.run(_PROBE.replace("PID", str(os.getpid())), 60, [])[0].replace("\n", ", ")
    except _Dead as death:
        found = session.output() or str(death)
    session.kill()
    if not found:
        python = f"sandboxed (landlock abi {_call('syscall', 444, 0, 0, 1)}, seccomp)"
    elif config.unsafe_python:
        python = f"NOT CONTAINED (--unsafe_python; the code can: {found})"
    else:
        raise ToolError(f"Model-written python cannot be contained here ({found}), see --unsafe_python.")
    search = "tavily" if os.environ.get("TAVILY_API_KEY") else "none"
    if config.search_corpus:
        search = f"local, {_query(config, 'SELECT count(*) FROM docs')[0][0]} documents"
    return f"python: {python} | search: {search}"


# --- python: the zygote ----------------------------------------------------------------------------------------------


def _run_zygote(base: str) -> None:
    """Loads what the model's code needs, then forks a session per request until the trainer is gone."""
    trainer, parent, children = socket.socket(fileno=0), os.getppid(), set()
    try:
        _preload()
        trainer.send(b"ready")
        # A fork of the trainer may hold the socket open, so its end is not the only sign that the trainer is gone.
        while os.getppid() == parent:
            while children and (dead := os.waitpid(-1, os.WNOHANG)[0]):
                children.discard(dead)
            if not wait([trainer], 0.5):
                continue
            if not (message := trainer.recv(65536)):
                break
            channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            output = os.memfd_create("output")
            fcntl.fcntl(output, fcntl.F_SETFL, os.O_APPEND)
            pid = os.fork()
            if pid == 0:
                try:
                    _run_session(json.loads(message), theirs.fileno(), output)
                finally:
                    os._exit(1)
            children.add(pid)
            descriptors = [channel.detach(), output, os.pidfd_open(pid), theirs.detach()]
            socket.send_fds(trainer, [str(pid).encode()], descriptors[:3])
            for descriptor in descriptors:
                os.close(descriptor)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        _remove(base)


def _preload() -> None:
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, the kernel takes a session rather than the trainer
    os.nice(10)
    Image.init()
    Image.Image.show = _show
    with suppress(ImportError):
        from matplotlib import figure, pyplot

        def show_figures(*_: object, **__: object) -> None:
            for number in pyplot.get_fignums():
                _show(pyplot.figure(number))
            pyplot.close("all")

        figure.Figure.show, pyplot.show = _show, show_figures
        pyplot.plot([0, 1])  # a first drawing loads the fonts
        pyplot.gcf().canvas.draw()
        pyplot.close("all")
    if len(os.listdir("/proc/self/task")) > 1 or "torch" in sys.modules:
        raise RuntimeError("its process is not clean")
    gc.collect()
    gc.freeze()  # or the collector of every session would copy every page


# --- python: the session ---------------------------------------------------------------------------------------------

_options: dict = {}  # of this session
_shown: list[Image.Image | None] = []  # RGB images of this call, None for each that was left out


class _Timeout(BaseException):
    """Raised inside the model's code when its time is over."""


def _show(picture: object, *_: object, **__: object) -> None:
    """Image.show and Figure.show: keeps a copy for the observation, or only counts where there are enough."""
    if len(_shown) >= _options["images"]:
        return _shown.append(None)
    if not isinstance(picture, Image.Image):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(picture)
        canvas.draw()
        picture = Image.fromarray(numpy.asarray(canvas.buffer_rgba()))
    picture = picture.convert("RGB")
    picture.thumbnail((_options["side"], _options["side"]))
    _shown.append(picture)


def _run_session(options: dict, channel: int, output: int) -> None:
    """Locks this process down, then answers requests on descriptor 3 until it is killed."""
    _lock_down(options, channel, output)
    _options.update(options)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main._images, main._pil_images = [], []
    for number, message in enumerate(iter(lambda: os.read(3, 2**18), b""), 1):
        request = json.loads(message)
        _shown.clear()
        ok, timeout = _execute(request, vars(main), f"<call {number}>")
        with suppress(Exception):
            sys.stdout.flush()
        pictures = [picture for picture in _shown if picture]
        reply = {"id": request["id"], "ok": ok, "timeout": timeout, "text": os.fstat(1).st_size}
        reply |= {"sizes": [picture.size for picture in pictures], "dropped": len(_shown) - len(pictures)}
        message = json.dumps(reply).encode()  # first: what fails here must leave no pixels behind the text
        os.write(1, b"".join(picture.tobytes() for picture in pictures))
        os.write(3, message)


def _execute(request: dict, names: dict, file: str) -> tuple[bool, bool]:
    """Runs the code in its time. Returns whether it went well and whether its time ran out."""
    armed = True

    def alarm(*_: object) -> None:
        if armed:
            raise _Timeout

    # Made anew for each call: the one before may have closed or replaced it.
    stream = open(1, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stderr = stream
    signal.signal(signal.SIGALRM, alarm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        signal.setitimer(signal.ITIMER_REAL, request["seconds"], 0.2)  # again and again: code can swallow the first
        return _run_cell(request, names, file), False
    except _Timeout:
        return False, True
    finally:
        armed = False  # first: an alarm here would end the session
        signal.setitimer(signal.ITIMER_REAL, 0)


def _run_cell(request: dict, names: dict, file: str) -> bool:
    """As a notebook does: shows the value of a last expression, or a traceback. Returns whether it went well."""
    linecache.cache[file] = (len(request["code"]), None, request["code"].splitlines(True), file)
    try:
        for path in request["images"]:
            image = Image.open(path)  # decoded when the code looks at it
            names.setdefault("_images", []).append(path)
            names.setdefault("_pil_images", []).append(image if image.mode == "RGB" else image.convert("RGB"))
        tree = ast.parse(request["code"], file)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, file, "exec"), names)
        value = eval(compile(ast.Expression(last.value), file, "eval"), names) if last else None
        if isinstance(value, Image.Image):
            _show(value)
        elif value is not None:
            print(repr(value))
        return True
    except _Timeout:
        raise
    except SystemExit as stop:  # exit("text") prints it
        with suppress(Exception):  # the stream may be closed
            print(stop.code if isinstance(stop.code, str) else "", end="")
        return not stop.code
    except BaseException as problem:
        trace = problem.__traceback__
        while trace and trace.tb_frame.f_code.co_filename != file:
            trace = trace.tb_next  # our own frames
        with suppress(OSError):
            os.ftruncate(1, min(os.fstat(1).st_size, 2**25))  # the output may be full: room for the traceback
            traceback.print_exception(type(problem), problem, trace)
        return False


# --- python: the locks -----------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes) -> int:
    """A function of libc, its arguments of full width."""
    result = getattr(_libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _lock_down(options: dict, channel: int, output: int) -> None:
    """Everything between fork and the first line of the model's code."""
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2), (channel, 3)):
        os.dup2(source, target)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    work = options["folder"] + "/work"
    os.mkdir(work)
    os.chdir(work)
    os.environ.update(HOME=work, TMPDIR=work)
    random.seed()  # a fork would repeat its parent's numbers
    numpy.random.seed()
    output_bytes = 2**26 + 3 * options["images"] * options["side"] ** 2  # the text and the images of a call
    limits = {resource.RLIMIT_AS: options["memory"], resource.RLIMIT_CPU: 120, resource.RLIMIT_FSIZE: output_bytes}
    limits |= {resource.RLIMIT_NOFILE: 128, resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0}
    limits |= {resource.RLIMIT_SIGPENDING: 256, resource.RLIMIT_MSGQUEUE: 0}  # the first are timers
    steps = {
        "rlimits": lambda: [resource.setrlimit(name, (value, value)) for name, value in limits.items()],
        "capabilities": lambda: _call("capset", struct.pack("<Ii", 0x20080522, 0), bytes(24)),
        "landlock": lambda: _landlock(options["folder"], work),
        "seccomp": _seccomp,
    }
    _call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: no session outlives the zygote
    if os.getppid() != os.getsid(0):  # the zygote leads the POSIX session: it died before this was set
        os._exit(1)
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    for name in options["locks"]:
        try:
            steps[name]()
        except (OSError, ValueError, KeyError) as problem:  # a limit above the user's own; an architecture not listed
            if not options["unsafe"]:
                os.write(1, f"this kernel does not let Python be contained: {name}: {problem}".encode())
                os._exit(1)


def _landlock(folder: str, work: str) -> None:
    """Reads the system's libraries, this Python and the session's folder; writes the session's `work`; nothing else."""
    abi = _call("syscall", 444, 0, 0, 1)
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
    """A filter that no later code can take off. It compares the lower halves of arguments, as the kernel reads them."""
    column, architecture = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}[os.uname().machine]
    allow, deny, pretend, missing = 0x7FFF0000, 0x50001, 0x50000, 0x50026  # EPERM, success, ENOSYS
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
        for numbers in " ".join(row[column] for row in table).split():
            first, _, last = numbers.partition("-")
            between(int(first), int(last or first), verdict)
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
