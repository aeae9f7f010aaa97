"""The three tools of the policy: `python`, `image_zoom_in` and `tavily-search`.

A `Toolbox` holds the tools of one rollout: its images and, once `python` was called, its interpreter. `call` takes what
stands between <tool_call> and </tool_call> and always returns an `Observation`.

How model-written Python is contained: one zygote per trainer process (a clean interpreter with numpy, PIL and pyplot,
never a fork of the trainer) forks a session per rollout. Before it runs a line of the model's code, the session locks
itself down by rlimits, dropped capabilities, no-new-privileges, Landlock and seccomp. This works as root in a container
with the default profile and as a plain user, on Linux from 5.13 (x86-64, aarch64); `start` first tries to break out.
- Covered: processes, threads and signals (one thread, no exec, no signal but to itself), files (reads the libraries of
  the system and of Python, writes its own folder), sockets, devices and GPUs, the trainer's memory and environment,
  other sessions, CPU time, memory, open files, size of output. Nothing survives the trainer.
- Soft, looked at four times a second while the session stands still: its bytes on the disk, files and mappings.
- Not covered: bugs of the kernel, side channels; stat() and links of any path; a session's page tables (0.2 GB), the
  memory of all sessions together (use the container's limit); a session that breaks or lies about its own results.
- Broken on purpose: threads, subprocess, multiprocessing, asyncio.run, epoll, shared anonymous memory, pip.
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
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a process that imports this file, or runs it as its zygote, loads PIL when it meets a picture
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
_IMAGES, _SIDE = 4, 1280  # the most images of an observation, and the longest side of each


def _option(default: object, help: str) -> object:
    return field(default=default, metadata={"help": help})


@dataclass
class ToolConfig:
    search_corpus: str | None = _option(None, "JSONL file of {title, url, text} to search, TAVILY_API_KEY or not")
    unsafe_python: bool = _option(False, "run model-written Python even where the kernel cannot contain it")
    python_max_timeout: int = _option(60, "cap for the timeout that a call names")
    python_memory_mb: int = _option(2048, "address space of one python session")
    observation_chars: int = _option(4000, "longest text of an observation")
    tool_cache: str = _option("~/.cache/axpo", "folder of Tavily's answers and of a font cache")


@dataclass(frozen=True)
class Observation:
    text: str
    images: list[Image.Image]
    ok: bool


class ToolError(ValueError):
    """What was wrong with a call or with the set-up, in one sentence for the model or the user."""


class Toolbox(AbstractContextManager):
    """The tools and images of one rollout. No process is started and no image decoded before a call needs it."""

    def __init__(self, images: Sequence[Image.Image | bytes | Path], config: ToolConfig | None = None):
        self._session, self._lock = None, threading.Lock()
        self.images, self.config = list(images), config or ToolConfig()

    def __del__(self) -> None:
        with suppress(Exception):  # no lock: nobody else can use it any more, and a fork may have copied it locked
            self._session.kill()

    def close(self, *_: object) -> None:
        with self._lock:
            if self._session:
                self._session.kill()
            self._session = None

    __exit__ = close

    def call(self, text: str) -> Observation:
        """Runs one call. Never raises: what goes wrong is an observation with ok=False."""
        images, ok = [], False
        try:
            with self._lock:
                tool, arguments = self._parse(text)
                text, images, ok = tool(arguments)
                self.images += images
        except Exception as error:  # a bad call, a picture that cannot be decoded, a full disk: go on
            text = f"Error: {getattr(error, 'strerror', None) or str(error) or repr(error)}"
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
        code, timeout = _string(arguments, "code"), arguments.get("timeout", 12)
        seconds = _number(timeout, "timeout", 1, self.config.python_max_timeout)
        with _slots:  # so that a deadline measures the call and not the queue before it
            if self._session is None or self._session.dead:
                self._session = _Session(self.config)
            looks = re.search("image|globals|vars|eval|exec|dir|glob", code)  # most code never looks at the images
            text, images, ok, dropped = self._session.run(code, seconds, self.images if looks else [])
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
        image = _picture(self.images[index])
        left, right = _span(x1, x2, image.width, (y2 - y1) / 1000 * image.height)
        top, bottom = _span(y1, y2, image.height, right - left)
        crop = _fit(image.crop((left, top, right, bottom)), 512)
        return f"Image {len(self.images)}: zoomed crop of image {index}.", [crop], True

    def _search(self, arguments: dict) -> tuple[str, list[Image.Image], bool]:
        """Title, URL and text of each result, the texts cut alike so that all of them fit."""
        query = " ".join(_string(arguments, "query").encode("utf-8", "replace").decode().split())[:400]
        engine = _search_corpus if self.config.search_corpus else _search_web
        found = engine(self.config, query, int(_number(arguments.get("max_results", 5), "max_results", 1, 10)))
        found = [row for row in found if not _EXCLUDED_URL.match(row[1])]
        entries = []
        for number, (title, url, text) in enumerate(found, 1):
            head = "\n".join(filter(None, [f"{number}. {title[:200]}".strip(), url[:300]]))
            room = max(40, self.config.observation_chars // len(found) - len(head) - 3)
            text = " ".join(text.split())
            entries.append("\n".join(filter(None, [head, text if len(text) <= room else text[: room - 1] + "…"])))
        return "\n\n".join(entries) or "No results.", [], True


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


def open_image(source: bytes | Path) -> Image.Image:
    """The RGB picture of an encoded file, as prompts and tools see it: the first frame, converted as by `_rgb`.

    Raises ValueError, with one sentence, for whatever cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _rgb(image)
    except Exception as error:  # decoders raise nearly everything
        what = f"of {len(source)} bytes" if isinstance(source, bytes) else source
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"The picture {what} cannot be decoded ({reason}).") from None


def png(image: Image.Image) -> bytes:
    """A decoded picture as a file, packed fast rather than tight."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def image_size(source: bytes | Path) -> tuple[int, int]:
    """Width and height of a picture, in pixels as stored, without decoding it."""
    from PIL import Image

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return image.size


def digest(source: bytes | Path) -> str:
    """SHA-256 of a file: finds its copies, but not the same picture encoded anew."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source.expanduser(), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rgb(image: Image.Image) -> Image.Image:
    """A copy as a good viewer shows it: upright, transparent parts white, grey of 16 or 32 bits scaled to 8."""
    import numpy
    from PIL import Image, ImageOps

    if 0 in image.size:
        raise ValueError("the picture is empty")
    raw = image.tile[0][3] if getattr(image, "tile", None) else ""  # how a file not yet decoded stores its pixels
    key = image.info.get("transparency")
    if raw in ("L;2", "L;4") and isinstance(key, int):  # Pillow scales the pixels to 8 bits, but not the clear colour
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[raw]
    if raw == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    with suppress(Exception):  # metadata may be broken; what is wrong with the pixels shows up below
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = numpy.nan_to_num(numpy.asarray(image).astype("f4"), posinf=0, neginf=0)
        low, high = min(0, values.min()), values.max()
        for top in {"I": [255], "F": [255, 1]}.get(image.mode, [65535]):  # the range that is meant; else what it holds
            high = top if values.max() <= top else high
        grey = Image.fromarray((255 / (high - low) * (values - low) + 0.5).astype("u1"))
        if isinstance(image.info.get("transparency"), int):
            grey.putalpha(Image.fromarray(255 * (values != image.info["transparency"]).astype("u1")))
        image = grey
    if image.has_transparency_data:  # white: black lines on nothing would vanish on black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


_decoded = lru_cache(maxsize=8)(open_image)  # rollouts of one question share its pictures; at 8K, one takes 130 MB
_sharing = threading.Lock()  # around what threads share but must not start twice: a lazy image, the search index


def _picture(source: Image.Image | bytes | Path) -> Image.Image:
    if isinstance(source, (bytes, Path)):
        return _decoded(source)
    with _sharing:
        return _rgb(source)


def _span(low: float, high: float, size: int, other: float) -> tuple[int, int]:
    """Pixels of low..high (0-1000) of `size`: at least 16, and widened where the crop would be thinner than 1:16."""
    first, last = math.floor(low / 1000 * size), math.ceil(high / 1000 * size)
    length = min(size, max(last - first, 16, math.ceil(other / 16)))
    first = max(0, min(first - (length - (last - first)) // 2, size - length))
    return first, first + length


def _fit(image: Image.Image, least: int = 0) -> Image.Image:
    """Enlarged to the area of a square of side `least`, but no side too long or too short for an image processor."""
    scale = min(max(1.0, least / math.sqrt(image.width * image.height)), _SIDE / max(image.size))
    size = tuple(max(32, round(edge * scale)) for edge in image.size)
    return image if size == image.size else image.resize(size, reducing_gap=2.0)


# --- search ----------------------------------------------------------------------------------------------------------

_EXCLUDED = ["huggingface.co", "hf.co"]  # benchmarks lie there with their answers
_EXCLUDED_URL = re.compile(rf"(\w+:)?(//)?([^/?#]*[.@])?({'|'.join(_EXCLUDED)})\.?([:/?#]|$)", re.IGNORECASE)
_TAVILY_URL, _TAVILY_SECONDS, _TAVILY_TRIES = "https://api.tavily.com/search", 40.0, 5  # seconds: all tries together
_opener = urllib.request.OpenerDirector()  # it follows no redirect, which would carry the key to another host
for _handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    _opener.add_handler(_handler())


@lru_cache
def _index(corpus: str) -> sqlite3.Connection:
    """Full-text index of a JSONL corpus. Built once per process, in a temporary file that SQLite removes itself."""
    database, number = sqlite3.connect("", check_same_thread=False), 0
    try:
        database.execute("CREATE VIRTUAL TABLE docs USING fts5(title, url UNINDEXED, text, tokenize='porter')")
        with open(os.path.expanduser(corpus), encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007
                row = json.loads(line)
                values = [str(row.get(name) or "") for name in ("title", "url", "text")]
                database.execute("INSERT INTO docs VALUES (?, ?, ?)", values)
    except (OSError, sqlite3.Error, ValueError, AttributeError, RecursionError) as error:
        raise ToolError(f"--search_corpus {corpus} cannot be indexed (line {number}: {error}).") from None
    return database


def _search_corpus(config: ToolConfig, query: str, count: int) -> list[Sequence[str]]:
    """Rows of title, URL and text by BM25; a long text is cut to where the words are."""
    match = " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", query.lower())))  # quoted: no syntax
    sql = """SELECT title, url, CASE WHEN length(text) < 600 THEN text ELSE snippet(docs, 2, '', '', '…', 64) END
             FROM docs WHERE docs MATCH ? ORDER BY bm25(docs, 3, 0, 1), rowid LIMIT ?"""
    with _sharing:
        return _index(config.search_corpus).execute(sql, (match or '""', count)).fetchall()


def _search_web(config: ToolConfig, query: str, count: int) -> list[Sequence[str]]:
    """Rows of title, URL and text by Tavily. Answers are kept on disk, so that many rollouts of a question pay once."""
    if not os.environ.get("TAVILY_API_KEY"):
        raise ToolError("web search is not available.")
    body = json.dumps({"query": query, "max_results": count, "exclude_domains": _EXCLUDED}).encode()
    folder = Path(config.tool_cache).expanduser() / "tavily"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(_TAVILY_URL.encode() + body).hexdigest()[:40]
    with open(folder / f"{name}.json", "a+", encoding="utf-8") as answer:
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
        # No connection, a slow or closed one, JSON that is broken or of another shape: all are tried again.
        with suppress(Exception), _opener.open(request, timeout=timeout) as reply:
            while (chunk := reply.read1(2**16)) and time.monotonic() < deadline:
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
_FILE_BYTES, _MOST_BYTES, _MOST_FILES = 2**26, 2**28, 1000  # of one file, and of all that a session holds
_MAPS_BYTES = 2**20  # of the list of its mappings: ten thousand, each of which may cost 8 KB of page tables
_slots = threading.BoundedSemaphore(2 * len(os.sched_getaffinity(0)))  # calls that may run at once


class _Zygote:
    """The process that forks the sessions, and the folder that holds theirs. It is started when it is first needed."""

    _lock, _owner = threading.Lock(), 0

    def _start(self, config: ToolConfig) -> None:
        if self._owner == os.getpid():  # it is dead: short of memory, the kernel kills it first
            _remove(self.base)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a session costs the trainer four descriptors
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
        self.base = os.path.realpath(tempfile.mkdtemp(prefix="axpo-"))
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(120)
        # The environment is made from scratch: no key, no token, no address.
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        environment |= {name + "_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        fonts = os.path.expanduser(config.tool_cache + "/matplotlib")  # a list of fonts that takes seconds to make
        environment |= {"MPLBACKEND": "Agg", "MPLCONFIGDIR": fonts, "OPENCV_FOR_THREADS_NUM": "1", "TZ": "UTC"}
        options = ["-I", "-B", "-X", "no_debug_ranges", "-X", "utf8"]
        command = [sys.executable, *options, os.path.abspath(__file__), self.base]
        pipes = {"stdin": theirs, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with theirs:  # a session of its own: signals for the trainer's group pass it by, the closing socket ends it
            self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        self._owner = os.getpid()

    def fork(self, config: ToolConfig) -> tuple[str, int, list[int]]:
        """Folder and process id of a new session; its channel, the files of its text and pixels and its pidfd."""
        answer, descriptors = b"", []
        with self._lock:
            if self._owner != os.getpid() or self.process.poll() is not None:  # a fork of the trainer needs its own
                self._start(config)
            folder = tempfile.mkdtemp(dir=self.base)
            request = {"folder": folder, "locks": LOCKS, "unsafe": config.unsafe_python, "mb": config.python_memory_mb}
            with suppress(OSError):
                self._socket.send(json.dumps(request).encode())
                answer, descriptors, _, _ = socket.recv_fds(self._socket, 256, 4)
            if not answer:  # a late one would be taken for that to the next request
                self.process.kill()
                answer = self.process.communicate()[1].strip().rpartition(b"\n")[2] or b"its zygote died"
        if len(descriptors) == 4:
            return folder, int(answer), descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        _remove(folder)
        raise ToolError(f"no python process can be started ({answer.decode(errors='replace')}).")


_zygote = _Zygote()


class _Session:
    """One interpreter. Nothing that it sends is trusted: its code may have forged it.

    A call is one message to it and one back; text and the RGB bytes of images are left in two memory files.
    """

    def __init__(self, config: ToolConfig):
        self.dead, self._owner, self._text_bytes = False, os.getpid(), 8 * config.observation_chars
        self._handed = 0  # number of images that it has
        self.folder, self.pid, (channel, *files) = _zygote.fork(config)
        self._channel, (self._output, self._pixels, self._pidfd) = socket.socket(fileno=channel), files
        self._channel.settimeout(0.25)

    def run(self, code: str, seconds: float, images: Sequence) -> tuple[str, list[Image.Image], bool, int]:
        """Text, images, success and the number of images left out. Whatever is odd ends the session."""
        from PIL import Image

        paths = []
        for number in range(self._handed, len(images)):  # it cannot write where they lie
            paths.append(f"{self.folder}/image_{number}.bmp")  # written ten times as fast as a PNG
            _picture(images[number]).save(paths[-1])
        self._handed += len(paths)
        request = {"id": os.urandom(8).hex(), "code": code, "seconds": seconds, "images": paths}
        try:
            self._channel.send(json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass"))
            deadline, reply = time.monotonic() + seconds + _GRACE, None
            while reply is None:
                if time.monotonic() > deadline:
                    raise ToolError(f"Timeout: killed after {seconds:g} s.")
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
                with suppress(TimeoutError):
                    reply = json.loads(self._channel.recv(4096))
                    if reply["id"] != request["id"]:  # the first ends it: a flood would keep the trainer busy
                        raise ValueError("forged")
                # It must not move what is being counted, and what the code left behind burns nothing.
                signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
                self._check()
            shown, start = [], 0
            for width, height in reply["sizes"][:_IMAGES]:
                if not (0 < width <= _SIDE and 0 < height <= _SIDE):
                    raise ValueError("forged")
                pixels = os.pread(self._pixels, 3 * width * height, start)
                shown.append(_fit(Image.frombytes("RGB", (width, height), pixels)))
                start += len(pixels)
            ok, timeout, dropped = reply["ok"] is True, reply["timeout"] is True, int(reply["dropped"])
            text = self.output()
            os.ftruncate(self._output, 0)
            os.ftruncate(self._pixels, 0)
        except Exception as error:
            reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
            death = error if isinstance(error, ToolError) else f"The python process died{reason}."
            text = f"{self.output()}\n{death} The session was restarted: its variables are lost."
            self.kill()
            return text.lstrip(), [], False, 0
        text += f"\nTimeout: stopped after {seconds:g} s; variables are kept." if timeout else ""
        return text.lstrip("\n"), shown, ok, dropped

    def output(self) -> str:
        """What the code has printed; both ends of it where that is far more than an observation holds."""
        size, part = os.fstat(self._output).st_size, self._text_bytes
        data = os.pread(self._output, part, 0) + os.pread(self._output, part, max(part, size - part))
        return data.decode("utf-8", "replace").rstrip("\n")

    def _check(self) -> None:
        """The caps for which there is no rlimit. Raises ToolError, or OSError for what it cannot count."""
        folders, files, size, folder = [f"{self.folder}/work"], 0, 0, os.fsencode(self.folder)
        while folders and files <= _MOST_FILES:
            with suppress(FileNotFoundError), os.scandir(folders.pop()) as listing:  # it may vanish while we look
                for entry in listing:
                    files += 1
                    with suppress(FileNotFoundError):
                        size += 512 * entry.stat(follow_symlinks=False).st_blocks
                        folders += [entry.path] if entry.is_dir(follow_symlinks=False) else []
        for number in os.listdir(f"/proc/{self.pid}/fd"):  # a removed file lives while it is open ...
            with suppress(FileNotFoundError):
                found = os.stat(f"/proc/{self.pid}/fd/{number}")
                if found.st_nlink == 0 and found.st_dev != os.fstat(self._output).st_dev:
                    size += 512 * found.st_blocks
        with open(f"/proc/{self.pid}/maps", "rb") as file:  # ... or mapped, and then its size is not known
            maps = file.read(_MAPS_BYTES)
        if len(maps) == _MAPS_BYTES:  # 65530 mappings of one long path are gigabytes to read
            raise ToolError("The python process was killed: too many mappings.")
        mapped = {line.split()[4] for line in maps.split(b"\n") if b" (deleted)" in line and folder in line}
        size += _FILE_BYTES * len(mapped)
        if files > _MOST_FILES or size > _MOST_BYTES:
            raise ToolError(f"The python process was killed: too many files ({files}) or bytes ({size >> 20} MB).")

    def kill(self) -> None:
        """Returns when the process is dead and its folder removed."""
        if self.dead or self._owner != os.getpid():  # a fork of the trainer drops its copy alone
            return
        self.dead = True
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        wait([self._pidfd], 2)
        self._channel.close()
        for descriptor in (self._pidfd, self._output, self._pixels):
            os.close(descriptor)
        _remove(self.folder)


def _remove(folder: str) -> None:
    """Removes what a session left, which may be closed, or nested too deep for Python; two may be at it at once."""
    with suppress(OSError, RecursionError):
        return shutil.rmtree(folder)
    subprocess.run(["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', folder], stderr=subprocess.DEVNULL, check=False)


_PROBE = """
import os, socket
for name, attempt in {
    "read files": lambda: open("/etc/passwd"),
    "read the trainer's environment": lambda: open(f"/proc/{trainer}/environ"),
    "read the program's folder": lambda: os.listdir(program),
    "read the working folder": lambda: os.listdir(folder),
    "write files": lambda: open("../escape", "w"),
    "open sockets": lambda: socket.socket(),
    "start processes": lambda: os.fork() or os._exit(0),
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
    names = (os.getpid(), os.path.dirname(os.path.abspath(__file__)), os.getcwd())
    session = _Session(config)
    found = session.run(f"trainer, program, folder = {names}{_PROBE}", 60, [])[0].replace("\n", ", ")
    session.kill()
    if found and not config.unsafe_python:
        raise ToolError(f"Model-written python cannot be contained here ({found}), see --unsafe_python.")
    python = f"NOT CONTAINED (--unsafe_python; the code can: {found})" if found else "sandboxed"
    search = "tavily" if os.environ.get("TAVILY_API_KEY") else "none"
    if config.search_corpus:
        search = f"local, {_index(config.search_corpus).execute('SELECT count(*) FROM docs').fetchone()[0]} documents"
    return f"python: {python} | search: {search}"


# --- python: the zygote and its sessions -----------------------------------------------------------------------------


def _run_zygote(base: str) -> None:
    """Loads what the model's code needs, then forks a session per request until the trainer is gone."""
    trainer, parent, children = socket.socket(fileno=0), os.getppid(), set()
    try:
        _preload()
        # A fork of the trainer may hold the socket open, so its end is not the only sign that the trainer is gone.
        while os.getppid() == parent:
            while children and (dead := os.waitpid(-1, os.WNOHANG)[0]):
                children.discard(dead)
            if not wait([trainer], 0.5):
                continue
            if not (message := trainer.recv(65536)):
                break
            if pid := _fork_session(message, trainer):
                children.add(pid)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        _remove(base)


def _fork_session(message: bytes, trainer: socket.socket) -> int:
    """Answers a request with a session's process id and descriptors, or with what went wrong. Returns the id, or 0."""
    pid, descriptors = 0, []
    try:
        for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET):  # the trainer's and the session's
            descriptors.append(end.detach())
        for name in ("text", "pixels"):
            descriptors.append(os.memfd_create(name))
            fcntl.fcntl(descriptors[-1], fcntl.F_SETFL, os.O_APPEND)
        if (pid := os.fork()) == 0:
            try:
                _run_session(json.loads(message), *descriptors[1:])
            finally:
                os._exit(1)
        descriptors.append(os.pidfd_open(pid))
        socket.send_fds(trainer, [str(pid).encode()], descriptors[:1] + descriptors[2:])
    except OSError as error:  # too many processes, no memory: the other sessions go on
        if pid:
            os.kill(pid, signal.SIGKILL)
        trainer.send(error.strerror.encode())
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def _preload() -> None:
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, the kernel takes a session rather than the trainer
    import numpy
    from PIL import Image

    os.register_at_fork(after_in_child=numpy.random.seed)  # or each session would repeat the zygote's numbers
    os.nice(10)
    Image.init()
    Image.Image.show = _show
    with suppress(ImportError):
        from matplotlib import figure, pyplot

        def show_figures(*_: object, **__: object) -> None:
            try:
                for number in pyplot.get_fignums():
                    _show(pyplot.figure(number))
            finally:
                pyplot.close("all")

        figure.Figure.show, pyplot.show = _show, show_figures
        pyplot.plot([0, 1])[0].figure.canvas.draw()  # a first drawing loads the fonts
        pyplot.close("all")
    if len(os.listdir("/proc/self/task")) > 1 or "torch" in sys.modules:
        raise RuntimeError("its process is not clean")
    gc.freeze()  # or the collector of every session would copy every page


_shown: list[Image.Image | None] = []  # RGB images of this call, None for each that was left out


class _Timeout(BaseException):
    """Raised inside the model's code when its time is over."""


def _show(picture: object, *_: object, **__: object) -> None:
    """Image.show and Figure.show: keeps a copy for the observation, or only counts where there are enough."""
    from PIL import Image

    if len(_shown) >= _IMAGES:
        return _shown.append(None)
    if not isinstance(picture, Image.Image):
        picture.canvas.draw()
        picture = Image.frombuffer("RGBA", picture.canvas.get_width_height(), picture.canvas.buffer_rgba())
    picture = _rgb(picture)
    picture.thumbnail((_SIDE, _SIDE))
    _shown.append(picture)


def _run_session(options: dict, channel: int, text: int, pixels: int) -> None:
    """Locks this process down, then answers requests on descriptor 3 until it is killed."""
    _lock_down(options, channel, text, pixels)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main._images, main._pil_images = [], []
    for number, message in enumerate(iter(lambda: os.read(3, 2**18), b""), 1):
        request = json.loads(message)
        _shown.clear()
        ok, timeout = False, False
        try:
            ok = _execute(request, vars(main), f"<call {number}>")
        except BaseException as problem:
            if not (timeout := type(problem) is _Timeout):  # from a method of what was raised or left to be shown
                os.write(1, b"What the code raised cannot be shown.")
        with suppress(BaseException):
            sys.stdout.flush()
        pictures = [picture for picture in _shown if picture]
        reply = {"id": request["id"], "ok": ok, "timeout": timeout, "dropped": len(_shown) - len(pictures)}
        os.write(4, b"".join(picture.tobytes() for picture in pictures))
        os.write(3, json.dumps(reply | {"sizes": [picture.size for picture in pictures]}).encode())


def _execute(request: dict, names: dict, file: str) -> bool:
    """As a notebook does: shows the value of a last expression, or a traceback. Returns whether it went well."""
    from PIL import Image

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
        for path in request["images"]:
            names.setdefault("_pil_images", []).append(open_image(Path(path)))
            names.setdefault("_images", []).append(path)
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
    finally:
        armed = False  # first: an alarm here would end the session
        signal.setitimer(signal.ITIMER_REAL, 0)


# --- python: the locks -----------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes) -> int:
    """A function of libc, its arguments of full width."""
    result = getattr(_libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _lock_down(options: dict, channel: int, text: int, pixels: int) -> None:
    """Everything between fork and the first line of the model's code."""
    for target, source in enumerate([os.open(os.devnull, os.O_RDONLY), text, text, channel, pixels]):
        os.dup2(source, target)
    os.closerange(5, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    work = options["folder"] + "/work"
    os.mkdir(work)
    os.chdir(work)
    os.environ.update(HOME=work, TMPDIR=work)
    limits = {resource.RLIMIT_AS: options["mb"] << 20, resource.RLIMIT_CPU: 120, resource.RLIMIT_FSIZE: _FILE_BYTES}
    limits |= {resource.RLIMIT_NOFILE: 128, resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_MSGQUEUE: 0}
    limits |= {resource.RLIMIT_SIGPENDING: 256}  # timers
    # A program of the system that is handed dumps by a pipe is started at a limit of 0 as well; at 1 it is not.
    limits |= {resource.RLIMIT_CORE: int(resource.getrlimit(resource.RLIMIT_CORE)[1] != 0)}
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
    with suppress(OSError):  # PR_SET_THP_DISABLE: a huge page stays whole when all but one of its pages are given back
        _call("prctl", 41, 1, 0, 0, 0)
    for name in options["locks"]:
        try:
            steps[name]()
        except (OSError, ValueError, KeyError) as problem:  # a limit above the user's own; an architecture not listed
            if not options["unsafe"]:
                os.write(1, f"this kernel does not let Python be contained: {name}: {problem}".encode())
                os._exit(1)


def _landlock(folder: str, work: str) -> None:
    """Reads libraries and the session's folder; writes the session's `work`; nothing else."""
    abi = _call("syscall", 444, 0, 0, 1)
    write, read, listing, refer, truncate, device = 2, 4, 8, 1 << 13, 1 << 14, 1 << 15
    remove, make_folder, make_file, make_link = 16 | 32, 128, 256, 1 << 12
    handled = (1 << 13) - 1 | (refer if abi > 1 else 0) | (truncate if abi > 2 else 0) | (device if abi > 4 else 0)
    own = (write | read | listing | remove | make_folder | make_file | make_link | refer | truncate) & handled
    ruleset = _call("syscall", 444, struct.pack("<Q", handled), 8, 0)  # sockets and signals are seccomp's affair
    rules = {work: own, folder: read | listing, "/usr/share": read | listing, "/dev/null": read | write}
    rules |= {"/dev/urandom": read, "/etc/ld.so.cache": read}
    # Not all of a prefix: a virtual environment may be the checkout itself, where the answers of runs lie.
    for prefix in ("", "/usr", "/usr/local", sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix):
        rules |= {f"{prefix}/lib": read | listing, f"{prefix}/lib64": read | listing}
    for path, rights in rules.items():
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_PATH)
            _call("syscall", 445, ruleset, 1, struct.pack("<Qi", rights, descriptor), 0)
            os.close(descriptor)
    _call("syscall", 446, ruleset, 0)
    os.close(ruleset)


# Numbers of system calls on x86-64 and on aarch64.
_DENIED = (
    ("41-55 288 299 307", "198-212 242 243 269"),  # sockets
    ("56-59 322", "220 221 281"),  # clone (threads too), fork, vfork, exec
    ("101 274 279 256 310-312", "117 100 239 238 270-272"),  # ptrace, other processes' memory and robust lists, kcmp
    ("129 200 297 109 112 424 434 438 440 448", "138 130 240 154 157 424 434 438 440 448"),  # signals, groups, pidfds
    ("141 142 144 203 251 314", "140 118 119 122 30 274"),  # priorities and schedulers, which reach other processes
    ("29-31 64-71 220 240-245 319 447", "180-197 279 447"),  # SysV, message queues, memory without a limit
    ("206-210 333 425-427", "0-4 292 425-427"),  # asynchronous I/O, io_uring
    ("298 317 321 323 248-250", "241 277 280 282 217-219"),  # perf, seccomp, bpf, userfaultfd, keys
    # The administration of a system, mounts.
    ("103 134 135 153-156 159 161-180 246 272 304 303", "116 92 58 41 171 51 81 89 170 39 40 42 104-106 97 264 265"),
    ("305 306 308 313 320 428-433 442 443 457-461", "60 142 161 162 224 225 266-268 273 294 428-433 442 443 457-461"),
    ("76 133 259 92-94 260 188-190 197-199", "45 33 54 55 5-7 14-16"),  # truncate, mknod, owners, xattr
    ("285 444-446", "47 444-446"),  # fallocate, which fills a disk at once; Landlock, which holds memory of the kernel
    ("253-255 294 300 301", "26-28 262 263"),  # inotify, fanotify
    ("40 275 276 278", "71 75-77"),  # sendfile, splices: a pipe would hold pages of files that are gone
    ("213 291", "20"),  # epoll: its watches are counted per user
)
_PRETENDED = ("73 90 91 268 452 132 235 261 280", "32 52 53 452 88")  # locks (nobody else has its files), modes, times
_MISSING = ("435 437", "435 437")  # clone3 and openat2 hide their flags from a filter; libc then uses the older calls


def _seccomp() -> None:
    """A filter that no later code can take off. It compares the lower halves of arguments, as the kernel reads them."""
    column, architecture = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}[os.uname().machine]
    allow, deny, pretend, missing = 0x7FFF0000, 0x50001, 0x50000, 0x50026  # EPERM, success, ENOSYS
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]  # others: kill

    def between(low: int, high: int, verdict: int) -> None:
        program.extend([(0x35, 0, 2, low), (0x25, 1, 0, high), (0x06, 0, 0, verdict)])

    def only(number: int, argument: int, values: Sequence[int], mask: int = 2**32 - 1, faked: tuple = ()) -> None:
        block = [(0x20, 0, 0, 16 + 8 * argument), (0x54, 0, 0, mask)]
        for value in [*values, *faked]:
            block += [(0x15, 0, 1, value), (0x06, 0, 0, pretend if value in faked else allow)]
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
    only((9, 222)[column], 3, [1, 2, 3, 0x22], 0x23)  # mmap: no shared memory but a file's; no limit counts it
    only((72, 25)[column], 1, [0, 1, 2, 3, 4, 5, 1030], faked=(6, 7))  # fcntl: not F_SETOWN, F_SETSIG, F_SETPIPE_SZ
    only((16, 29)[column], 1, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451])  # ioctl: isatty, sizes, close-on-exec
    only((157, 167)[column], 0, [3, 15, 16, 23, 0x53564D41])  # prctl: names, and what can only be read
    # Landlock does not see access mode 3, nor, before ABI 3, O_TRUNC on a descriptor that is not open for writing.
    for number, argument in ((2, 1), (257, 2)) if column == 0 else ((56, 2),):
        only(number, argument, [0, 1, 2, 0x201, 0x202], 0x203)
    program.append((0x06, 0, 0, allow))
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *instruction) for instruction in program))
    filter = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(buffer)))
    _call("prctl", 22, 2, filter, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    _run_zygote(sys.argv[1])
