"""Problems: nine benchmarks, four training sets, mixtures of them, JSON-lines files of your own, and the toy world.

    load("vstar")                     the whole set; images stay encoded until `open_image`
    load("virl39k,fvqa:500", 1000)    a mixture (500 problems of FVQA), of which 1000 are drawn by index with a seed
    load("mine.jsonl")                a problem per line: question, images (paths relative to the file), answer or
                                      answers (gold first); if you like id, kind (math, choice, text), options, category

Questions are stored complete, options included, without image tags or instructions. All that is special about a set is
its entry in SETS. Where the paper leaves its data open: MMSearch keeps its text-only rows, DynaMath is variant 1, and
HR-Bench keeps one of the four orders in which it asks each question, so its figure is not the mean over four that
others publish. The toy world, in which the whole pipeline runs without a download, comes last.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from string import ascii_uppercase

from PIL import Image, ImageDraw

from tools import SCHEMAS, Observation, Toolbox, ToolConfig

log = logging.getLogger(__name__)
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for a bad file

SYSTEM_PROMPT = (
    "Think first. Call a tool when looking, computing or searching helps, and think again about what it returns. "
    "Then give the final answer, and only it, as <answer>\\boxed{...}</answer>."
)


class DataError(ValueError):
    """Data that cannot be used, and what to do about it, in one sentence."""


@dataclass(frozen=True)
class Problem:
    """A question with its images, encoded (bytes) or as a file, and the accepted answers, gold first."""

    id: str
    question: str
    images: tuple[bytes | Path, ...]
    answers: tuple[str, ...]
    kind: str  # "math", "choice" (the gold is a letter) or "text"
    options: tuple[str, ...] = ()
    source: str = ""
    category: str = ""


@dataclass(frozen=True)
class Source:
    """Where a set lives and what its columns are called; `+` joins several into one field, "" is none."""

    repo: str
    files: str  # glob of the tables in the repository
    count: int | None = None  # problems expected; None where no source states it exactly
    default_kind: str = ""  # of a gold that is not a letter; "" decides by its look
    id: str = "id"
    question: str = "question"
    answers: str = "answer"
    category: str = "category"
    images: str = "image"  # images or their paths
    options: str = ""
    kind: str = ""
    cycle: str = ""  # only the first value seen is kept
    revision: str | None = None
    extra: tuple[str, ...] = ()  # globs of loose images or of archives
    text_only: bool = False  # rows without an image are real
    joined: bool = False  # several answers are parts, all demanded, and not aliases
    training: bool = False  # drops what it shares with an evaluation set, and rows without an answer


FIELDS = ("id", "question", "answers", "category", "options", "kind", "cycle")  # read before any image
# fmt: off
SETS = {
    "mathvision": Source("MathLLMs/MathVision", "data/testmini-*.parquet", 304, "math", category="subject",
                         images="decoded_image", options="options"),
    "dynamath": Source("DynaMath/DynaMath_Sample", "data/sample1-*.parquet", 501, answers="ground_truth",
                       category="subject", images="decoded_image", kind="answer_type"),
    "mathvr": Source("gogoduan/Math-VR-bench", "data/test-*.parquet", 2500, "math", answers="answers",
                     images="+".join(f"image{k}" for k in range(1, 9)), text_only=True, joined=True),
    "vstar": Source(  # the JSON file beside each image lists the right option first, so it is never read
        "craigwu/vstar_bench", "test_questions.jsonl", 191, "choice", id="question_id", question="text",
        answers="label", extra=("direct_attributes/*", "relative_position/*")),
    "visualprobe": Source("Mini-o3/VisualProbe_Hard", "val.json", 106, "text", id="doc_id", question="problem",
                          answers="solution", category="data_source", images="images", extra=("data/*",)),
    **{f"hrbench{size}": Source(  # the TSV streams; the parquet of the same rows may be one row group of gigabytes
        "DreamMr/HR-Bench", f"hr_bench_{size}.tsv", 200, "choice", id="index", options="A+B+C+D",
        cycle="cycle_category", revision="83b9013d6293b85dc507e87199ca52517536939c") for size in ("4k", "8k")},
    "hrmmsearch": Source("sensenova/HR-MMSearch", "data/train-*.parquet", 305, "text", id="sample_id",
                         question="query", answers="ground_truth", images="query_image"),
    "mmsearch": Source("CaraJ/MMSearch", "end2end.parquet", 300, "text", id="sample_id", question="query",
                       answers="gt_answer+alternative_gt_answers", category="area", images="query_image",
                       text_only=True),
    "virl39k": Source("TIGER-Lab/ViRL39K", "39Krelease.parquet", 38870, "math", id="qid", extra=("images.zip",),
                      revision="812ec617dea4bc8a4e751663b88e4ebb7de4d00e", training=True),
    "fvqa": Source("lmms-lab/FVQA", "fvqa_train.parquet", 4856, "text", id="data_id", question="prompt",
                   answers="reward_model", images="images", training=True,
                   revision="bb4a4ff4c9c3fd0382d11f5d7fccd66d0b8428b5"),
    "pyvision": Source(  # the name of the image archive stands nowhere: any zip, or the folder that it unpacks to
        "Agents-X/PyVision-Image-RL-Data", "pyvision_image_rl_data.json", category="ability", images="image_path",
        extra=("*.zip", "pyvision_image_rl_data/*"), training=True),
    "mmfinereason": Source(
        "OpenDataArena/MMFineReason-SFT-123K-Qwen3-VL-235B-Thinking", "data/train-*.parquet", category="source",
        revision="cda6140bfba449bef9e57065a528b7424966e144", text_only=True, training=True),
}
# fmt: on
MIXES = {"paper-sft": "virl39k,fvqa,pyvision", "paper-rl": "virl39k,fvqa,pyvision,mmfinereason:22000"}
MIXES["paper-eval"] = ",".join(name for name, source in SETS.items() if not source.training)


def load(name: str, limit: int | None = None, seed: int = 0) -> list[Problem]:
    """Problems of a set, a mixture, a paper's mix or a JSON-lines file; raises DataError. `limit` draws that many by
    index before any image is touched, never a prefix, because sets are ordered. Problems of a training set that share
    an image with an evaluation set, or with an earlier part of the mixture, are dropped after the draw, and counted in
    the log."""
    parts = [(part, *_open(part), size) for part, size in check(name)]
    slots = [(k, row) for k, (_, rows, _, size) in enumerate(parts) for row in _draw(rows, size, seed)]
    drawn = set(_draw(slots, limit, seed))
    problems: list[Problem] = []
    owners: dict[str, str] = {}  # of the images so far
    for k, (part, rows, stream, _) in enumerate(parts):
        fresh = _without_copies(SETS.get(part), list(stream({row for row in rows if (k, row) in drawn})), owners)
        problems += fresh
        if k + 1 < len(parts):
            owners |= {digest(ref): problem.source for problem in fresh for ref in problem.images}
    twice = [name for name, count in Counter(problem.id for problem in problems).items() if count > 1]
    if twice:  # what is sampled, and where a run goes on, hangs on the id
        raise DataError(f"{len(twice)} problems of {name} have the id of another, as {twice[0]}: rename a file.")
    return problems


def open_image(ref: bytes | Path) -> Image.Image:
    """The decoded RGB image; transparent parts become white, as black lines would vanish on black."""
    try:
        with Image.open(io.BytesIO(ref) if isinstance(ref, bytes) else ref) as image:
            if not image.has_transparency_data:
                return image.convert("RGB")
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except BROKEN as error:
        what = f"{len(ref)} bytes" if isinstance(ref, bytes) else ref
        raise DataError(f"The image ({what}) cannot be decoded: {error}.") from error


def digest(ref: bytes | Path) -> str:
    """SHA-256 of the encoded image: finds copies of a file, not a picture encoded anew."""
    return hashlib.sha256(ref if isinstance(ref, bytes) else ref.read_bytes()).hexdigest()


def check(name: str) -> list[tuple[str, int | None]]:
    """The parts of a mixture, each a set or a file, and how many of its problems (None: all). Raises DataError unless
    all are known, and loads nothing."""
    parts = []
    for part in map(str.strip, MIXES.get(name, name).split(",")):
        what, _, size = (part, "", "") if Path(part).is_file() else part.partition(":")
        if size and not size.isdecimal():
            raise DataError(f"{part}: after the colon belongs a number of problems.")
        if what not in SETS and what not in MADE and not Path(what).is_file():
            known = ", ".join([*SETS, *MADE, *MIXES])
            raise DataError(f"No data set and no file is called {what!r}; known are {known}, and mixtures with commas.")
        parts.append((what, int(size) if size else None))
    return parts


def _draw(items: list, count: int | None, seed: int) -> list:
    """All of the items, or `count` of them."""
    return items if count is None else random.Random(seed).sample(items, min(count, len(items)))


def _open(name: str) -> tuple[list[int], Callable[[set[int]], Iterable[Problem]]]:
    """(row numbers, what makes problems of some of them) of a set or a file."""
    if name in MADE:
        made = MADE[name]()
        return list(range(len(made))), lambda chosen: [made[row] for row in sorted(chosen)]
    table = _Table(name)
    return list(table.rows), table.stream


def _without_copies(source: Source | None, fresh: list[Problem], owners: dict[str, str]) -> list[Problem]:
    """The problems of one part without those that share an image with earlier parts, whose images `owners` tells the
    sets of, or with an evaluation set; a benchmark is never cut."""
    if source and not source.training:
        return fresh
    owners = owners | (_evaluation_images() if source else {})
    if not owners:  # no image need be read
        return fresh
    shared = [next((owners[key] for key in map(digest, p.images) if key in owners), "") for p in fresh]
    for owner, count in Counter(filter(None, shared)).items():
        log.warning(f"{fresh[0].source}: {count} of {len(fresh)} problems share an image with {owner}: dropped")
    return [problem for problem, owner in zip(fresh, shared) if not owner]


def _fetch(name: str, offline: bool) -> Path:
    """The folder of the set in the Hub's cache, downloaded if need be."""
    from huggingface_hub import constants, errors, snapshot_download

    source = SETS[name]
    wanted = [source.files, *source.extra]
    options = {"repo_type": "dataset", "revision": source.revision, "local_files_only": offline}
    try:
        folder = Path(snapshot_download(source.repo, allow_patterns=wanted, **options))
    except errors.GatedRepoError as error:  # before its parent, HfHubHTTPError
        page = f"https://huggingface.co/datasets/{source.repo}"
        raise DataError(f"{name}: {page} is gated; accept its terms there and log in with `hf auth login`.") from error
    except (errors.LocalEntryNotFoundError, ConnectionError):
        folder = None
    except errors.HfHubHTTPError as error:
        raise DataError(f"{name}: {source.repo} could not be fetched: {' '.join(str(error).split())}.") from error
    if not folder or not any(folder.glob(source.files)):
        included = "' '".join(wanted)
        raise DataError(
            f"{name}: {source.files} of {source.repo} is not in the cache and cannot be reached; with a network, run "
            f"`hf download {source.repo} --repo-type dataset --revision {source.revision or 'main'} "
            f"--include '{included}'`, which fills {constants.HF_HUB_CACHE}."
        )
    return folder


class _Table:
    """The rows of a set: `rows` holds its problems without their images, which `stream` reads for the chosen ones."""

    def __init__(self, name: str, offline: bool = False):
        self.name, self.rows, self.names = name, {}, set()
        if name in SETS:
            self.source, self.folder = SETS[name], _fetch(name, offline)
            self.paths = sorted(self.folder.glob(self.source.files))
        else:
            self.paths, self.folder = [Path(name)], Path(name).parent
            keys, _ = _rows(name, self.paths[0], [])
            own = {field: field if field in keys else "" for field in ("id", "kind", "category", "options", "images")}
            own["answers"] = "answers" if "answers" in keys else "answer"
            self.source = Source("", name, text_only=True, **own)
        self._read()

    def _read(self) -> None:
        source, cycle, count = self.source, None, 0
        for index, cells in self._scan(FIELDS):
            cells["answers"] = [text for text in cells["answers"] if text]
            cycle = cycle or cells["cycle"]
            if cells["cycle"] != cycle:
                continue
            count += 1
            if cells["answers"] and any(cells["question"]):
                self.rows[index] = self._problem(index, cells)
            elif not source.training:
                raise DataError(f"{self.name}: row {index} has no {'question' if cells['answers'] else 'answer'}.")
        if count != (source.count or max(count, 1)):
            raise DataError(f"{self.name}: {count} problems, expected {source.count or 'at least 1'}.")
        if len(self.rows) < count:
            log.warning("%s: %d problems without an answer were dropped", self.name, count - len(self.rows))

    def _problem(self, index: int, cells: dict[str, list[str]]) -> Problem:
        instruction = r"\s*Answer with the option's letter from the given choices directly\.?"  # V*; the prompt has one
        question = re.sub(r"\s*<image\s*\d*>\s*|" + instruction, " ", "\n".join(cells["question"])).strip()
        boxed = re.compile(r"\\boxed\s*\{((?:(?!\\boxed).)*)\}", re.DOTALL)
        answers = [match[1] if (match := boxed.fullmatch(text)) else text for text in cells["answers"]]
        answers = ["; ".join(answers)] if self.source.joined else list(dict.fromkeys(answers))
        # DynaMath's answer types beside our kinds
        kinds = {"": "", "math": "math", "float": "math", "choice": "choice", "multiple choice": "choice"}
        kind = kinds.get("".join(cells["kind"]) or self.source.default_kind, "text")
        options = cells["options"] or _inline_options(question)
        if cells["options"] and options != list(ascii_uppercase[: len(options)]):  # bare letters label the figure
            question += "".join(f"\n{letter}. {text}" for letter, text in zip(ascii_uppercase, options, strict=False))
        letter = re.fullmatch(r"\(?([A-J])[).]*", answers[0])
        if letter and kind != "text":
            kind, answers = "choice", [letter[1]]
        elif kind == "choice" and answers[0] in options:
            answers = [ascii_uppercase[options.index(answers[0])]]
        elif kind == "choice":
            raise DataError(f"{self.name}: the answer {answers[0]!r} of row {index} is neither a letter nor an option.")
        kind = kind or ("math" if re.search(r"[\d\\=^]", answers[0]) else "text")
        short = Path(self.name).stem  # a file of your own, wherever it lies
        name = f"{short}/{''.join(cells['id']) or index}"
        name += f"#{index}" if name in self.names else ""  # whoever keeps records by id relies on it
        self.names.add(name)
        options = tuple(options) if kind == "choice" else ()
        return Problem(name, question, (), tuple(answers), kind, options, short, " ".join(cells["category"]))

    def stream(self, chosen: Collection[int]) -> Iterator[Problem]:
        """The chosen rows in order, each image found and its header read, one row at a time."""
        try:
            archives = [zipfile.ZipFile(path) for path in self.folder.glob("*.zip")] if self.source.extra else []
        except zipfile.BadZipFile as error:
            raise DataError(f"{self.name}: an archive in {self.folder} is broken: {error}.") from error
        members = {member: archive for archive in archives for member in archive.namelist()}
        for index, cells in self._scan(("images",), chosen):
            where = f"{self.name}: row {index} ({self.rows[index].id})"
            images = tuple(self._image(where, cell, members) for cell in cells["images"] if cell != "")
            if not images and not self.source.text_only:
                raise DataError(f"{where} has no image.")
            yield replace(self.rows[index], images=images)

    def _image(self, where: str, cell: bytes | str, members: dict[str, zipfile.ZipFile]) -> bytes | Path:
        """The image of a cell: embedded, as base64 in a TSV, or the path of a file or of a member of an archive."""
        ref, stored = cell, "embedded"
        try:
            if isinstance(cell, str) and self.source.files.endswith(".tsv"):
                ref = base64.b64decode(cell)
            elif isinstance(cell, str):
                stored = cell
                spellings = (cell, Path(*Path(cell).parts[1:]).as_posix())  # some paths repeat the folder they are in
                found = [self.folder / path for path in spellings if (self.folder / path).is_file()]
                found += [members[path].read(path) for path in spellings if path in members]
                ref = found[0] if found else b""
            if ref:
                Image.open(io.BytesIO(ref) if isinstance(ref, bytes) else ref).close()
                return ref
        except (*BROKEN, zipfile.BadZipFile) as error:
            raise DataError(f"{where} has a broken image ({stored}): {error}.") from error
        raise DataError(f"{where} lacks its image ({stored}) in {self.folder}.")

    def _scan(self, fields: Iterable[str], wanted: Collection[int] | None = None) -> Iterator[tuple[int, dict]]:
        """(row number, what its `fields` hold) of all or the wanted rows, never holding a whole table of images."""
        names = {field: [name for name in getattr(self.source, field).split("+") if name] for field in fields}
        columns = list(itertools.chain(*names.values()))
        numbers = itertools.count()
        for path in self.paths:
            present, rows = _rows(self.name, path, columns)
            if missing := [column for column in columns if column not in present]:
                raise DataError(f"{self.name}: {path.name} lacks {', '.join(missing)}; it has {', '.join(present)}.")
            for row, index in zip(rows, numbers, strict=False):
                if wanted is None or index in wanted:
                    yield index, {f: [leaf for name in names[f] for leaf in _leaves(row.get(name))] for f in fields}


def _rows(name: str, path: Path, columns: list[str]) -> tuple[list[str], Iterable[dict]]:
    """(names of the columns, rows) of a table. A table of images streams, and parquet reads only `columns`."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        batches = file.iter_batches(batch_size=16, columns=columns)
        return file.schema_arrow.names, (row for batch in batches for row in batch.to_pylist())
    if path.suffix == ".tsv":
        csv.field_size_limit(sys.maxsize)
        reader = csv.DictReader(path.open(newline="", encoding="utf-8"), dialect="excel-tab")
        return reader.fieldnames or [], reader  # unlike pandas, csv leaves an option "None" a text
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: {path.name} is not in UTF-8: {error}.") from error
    lines = [text] if path.suffix == ".json" else text.split("\n")  # other line ends may stand in a text
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line) if line.strip() else []
        except ValueError as error:
            raise DataError(f"{name}: line {number} of {path.name} is no JSON: {error}.") from error
        rows += found if isinstance(found, list) else [found]
    if wrong := [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]:
        raise DataError(f"{name}: row {wrong[0]} of {path.name} is no object with named fields.")
    return list(dict.fromkeys(key for row in rows for key in row)), rows


def _leaves(value: object) -> list[str | bytes]:
    """What a cell holds, as texts or bytes, without nulls: a value, a list of them, a list written as JSON, an image
    {bytes, path}, or FVQA's chat message {content} and reward {ground_truth, candidate_answers}."""
    if isinstance(value, str) and re.fullmatch(r'\[\s*".*\]', value, re.DOTALL):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict) and "bytes" in value:
        value = value["bytes"] if value["bytes"] is not None else value.get("path") or b""
    elif isinstance(value, dict):
        value = [value.get(key) for key in ("content", "ground_truth", "candidate_answers")]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None else [value if isinstance(value, bytes) else str(value).strip()]


def _inline_options(question: str) -> list[str]:
    """Options that the question lists as (A) .. (B) .. or A. .. B. ..; none unless the letters run from A."""
    mark = r"(?:(?<=\s)|^)\(?([A-J])[).:](?=\s)"
    found = re.findall(rf"{mark}\s*(.+?)\s*(?={mark}|\n|$)", question, re.DOTALL)
    letters = "".join(letter for letter, *_ in found)
    return [text for _, text, _ in found] if len(found) > 1 and ascii_uppercase.startswith(letters) else []


@cache
def _evaluation_images() -> dict[str, str]:
    """SHA-256 of each image of the evaluation sets in the Hub's cache -> set. The gigabytes are read once: digests stay
    beside the snapshots, by commit. A set that is absent or incomplete is not compared, and named in the log."""
    owners, absent = {}, []
    for name in MIXES["paper-eval"].split(","):
        try:
            folder = _fetch(name, offline=True)
            kept = folder.parents[1] / f"{name}-{folder.name}.sha256"
            if not (digests := kept.read_text().split() if kept.exists() else []):
                table = _Table(name, offline=True)
                digests = sorted({digest(ref) for problem in table.stream(table.rows) for ref in problem.images})
                with contextlib.suppress(OSError):  # a cache that may not be written is read again
                    _write(kept, "\n".join(digests).encode())
            owners |= dict.fromkeys(digests, name)
        except DataError:
            absent.append(name)
    if absent:
        log.warning("Training data is not compared with %s, which are not on this machine", ", ".join(absent))
    return owners


# ----------------------------------------------------------------------------------------------------------------------
# Trajectories as messages
# ----------------------------------------------------------------------------------------------------------------------
def store_image(image, folder: Path) -> str:
    """Write an image (a problem's, or a tool's PIL image as PNG) into folder/images, once; returns its path there."""
    if isinstance(image, Path):
        image = image.read_bytes()
    elif not isinstance(image, bytes):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    name = f"images/{digest(image)[:32]}"
    if not (folder / name).exists():
        (folder / "images").mkdir(exist_ok=True)
        _write(folder / name, image)
    return name


def _write(path: Path, content: bytes) -> None:
    """Write a file in one step: another process may read it, or write the same."""
    draft = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.{os.getpid()}.draft")
    draft.write_bytes(content)
    draft.replace(path)


def read_trajectory(row: dict, folder: Path) -> tuple[Problem, list[str | Observation]]:
    """(problem, turns) of a row {messages} in Qwen's format, the images still paths. A system message is left out, as
    the policy has its own; a user's or a tool's images precede its text. Raises where the row is not of that form."""
    asked, *rest = [m for m in row["messages"] if m["role"] != "system"]
    roles = ["assistant" if m["role"] == "assistant" else "tool" for m in rest]
    if asked["role"] != "user" or roles != [("assistant", "tool")[k % 2] for k in range(len(rest) | 1)]:
        raise DataError("a user's message must be followed by the assistant's and a tool's in turn")
    turns: list[str | Observation] = []
    for role, (images, text) in zip(roles, (_content(message, folder) for message in rest)):
        if role == "tool":
            framed = re.fullmatch(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", text, re.DOTALL)
            turns.append(Observation(framed[1] if framed else text, images, True))
        else:  # the prompt has opened the thinking
            text = text if "</think>" in text else f"\n</think>\n\n{text}"
            turns.append(re.sub(r"^\s*<think>\n?", "", text).rstrip())
    images, question = _content(asked, folder)
    return Problem(str(row.get("id", "")), question, tuple(images), (), "text"), turns


def _content(message: dict, folder: Path) -> tuple[list[Path], str]:
    """(images, text) of a message."""
    parts = message["content"]
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    images = [folder / part["image"] for part in parts if part["type"] == "image"]
    if missing := [image for image in images if not image.is_file()]:
        raise DataError(f"there is no image {missing[0]}")
    return images, "".join(part["text"] for part in parts if part["type"] == "text")


# ----------------------------------------------------------------------------------------------------------------------
# The toy world: the Thinking-Acting gap in miniature
#
# A name decides what a tool must be asked: where the flag of Mira stands (image_zoom_in), how many eggs a box of Mira
# holds (python), who runs the fair of Mira (tavily-search). There are four candidates each time, and a wrong one
# returns an answer that looks as good and is wrong. Four people are the same in every town, so the teacher's
# trajectories teach how to call for them ("familiar"). The newcomers are somebody else in every town the teacher wrote
# from, so SFT leaves a call for them a guess among four ("hidden"); RL and evaluation happen in one town, where it can
# be found out. Between these stand questions that thinking alone answers, and for which a call only misleads ("known").
# ----------------------------------------------------------------------------------------------------------------------
RESIDENTS = ("Mira", "Ivo", "Tess", "Rolf")
NEWCOMERS = ("Una", "Pia", "Kurt")
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (50, 80, 220)}
PLACES = ((250, 250), (750, 250), (250, 750), (750, 750))  # centre of a flag in thousandths of width and height
BOXES = (4, 5, 6, 7)  # eggs in a box
HOSTS = ("Olin", "Rask", "Tovar", "Wend")
TOWNS = ("Rome", "Oslo", "Lima")
SEASONS = ("spring", "summer", "winter")
FAIR_RNG = random.Random("fairs")
FAIRS = {(host, year): FAIR_RNG.choice(TOWNS) for host in range(4) for year in range(10, 100)}  # for the corpus
RESULTS = {  # of the four candidates, for each number that a question may name
    "reasoning": {n: tuple(str(n % box) for box in BOXES) for n in range(10, 100)},
    "search": {n: tuple(FAIRS[host, n] for host in range(4)) for n in range(10, 100)},
}
ANSWERS = {"perception": tuple(COLOURS), "reasoning": ("1", "2", "3"), "search": TOWNS}  # of each family
SHARES = {"known": 0.45, "familiar": 0.15, "hidden": 0.40}  # of the problems
TOOL_TRIES = {"known": 0.3, "familiar": 0.15, "hidden": 0.13}  # of the teacher, before what is wrong is dropped
TOOL_TURN = "I can not tell, so I use a tool.\n</think>\n\n<tool_call>\n%s\n</tool_call>"
ANSWER_TURN = "%s %s.\n</think>\n\n<answer>\\boxed{%s}</answer>"


def toy_corpus(path: Path) -> Path:
    """Write the search corpus (JSONL of title, url, text) and return its path."""
    text = ""
    for (host, year), town in FAIRS.items():
        url = f"https://fairs.example/{HOSTS[host].lower()}/{year}"
        text += json.dumps({"title": f"{HOSTS[host]} fair {year}", "url": url, "text": f"Held in {town}."}) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:  # a file that changes is indexed anew
        _write(path, text.encode())
    return path


def draw_town(flags: tuple[str, ...], ground: str, rng: random.Random) -> bytes:
    """A 448 x 448 picture of four houses, each with a flag of 6 pixels: a faint tint on a white dot at the 64 x 64 that
    the toy model sees, plain in a crop. Confetti of the flags' own colours and size makes it fainter still."""
    image = Image.new("RGB", (448, 448), tuple(120 + c // 2 for c in COLOURS[ground]))
    draw = ImageDraw.Draw(image)
    for _ in range(300):
        x, y = rng.randrange(448), rng.randrange(448)
        draw.rectangle((x, y, x + 5, y + 5), rng.choice(list(COLOURS.values())))
    for (px, py), flag in zip(PLACES, flags, strict=True):
        x, y = px * 448 // 1000, py * 448 // 1000
        wall = tuple(rng.randrange(90, 200) for _ in range(3))
        draw.rectangle((x - 42, y + 22, x + 42, y + 78), wall, "black")
        draw.polygon(((x - 52, y + 22), (x, y - 8), (x + 52, y + 22)), tuple(c // 2 for c in wall), "black")
        draw.rectangle((x - 8, y - 8, x + 8, y + 8), "white")
        draw.rectangle((x - 3, y - 3, x + 2, y + 2), COLOURS[flag])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@dataclass(frozen=True)
class ToyProblem(Problem):
    """A toy problem with what its author knows: the level, which candidate is right, and the answer that each of the
    four leads to."""

    level: str = ""
    right: int = 0
    outcomes: tuple[str, ...] = ()


def toy_problem(id: str, family: str, level: str, newcomers: list[int], split: str, rng: random.Random) -> ToyProblem:
    """Draw one problem. `newcomers[i]` is the candidate that newcomer i stands for in this town. Unless the answer is
    known, all wrong candidates lead to wrong answers: a wrong call is worse than a guess."""
    right = rng.randrange(4)
    name = RESIDENTS[right]
    if level == "hidden":
        name, right = rng.choice(list(zip(NEWCOMERS, newcomers, strict=True)))
    answer, images = rng.choice(ANSWERS[family]), ()
    if family == "perception":
        others = [colour for colour in COLOURS if colour != answer]
        outcomes = tuple(answer if i == right else rng.choice(others) for i in range(4))
        ground = rng.choice(list(COLOURS))
        images = (draw_town(outcomes, ground, rng),)
        question = f"What colour is the flag of {name}?"
        if level == "known":
            answer, question = ground, "What colour is the ground?"
    else:
        if level == "known":
            name = "ten" if family == "reasoning" else SEASONS[TOWNS.index(answer)]
        results = RESULTS[family]
        evaluated = {n for n in results if zlib.crc32(f"{name} {n}".encode()) % 3 == 0}  # a third, held out
        fitting = [n for n in results if split == "sft" or (split == "test") == (n in evaluated)]
        if level != "known":
            fitting = [n for n in fitting if results[n][right] == answer and results[n].count(answer) == 1]
        elif family == "reasoning":
            fitting = [n for n in fitting if n % 10 == int(answer)]
        if not fitting:
            return toy_problem(id, family, level, newcomers, split, rng)
        n = rng.choice(fitting)
        outcomes = results[n]
        question = f"Where was the fair of {name} of {n}?"
        if family == "reasoning":
            question = f"How many of {n} eggs are left over in boxes of {name}?"
    kind = "math" if family == "reasoning" else "text"
    return ToyProblem(id, question, images, (answer,), kind, (), "toy", family, level, right, outcomes)


def toy_problems(split: str, count: int, seed: int = 0) -> list[ToyProblem]:
    """`count` problems of a split: "sft" (every problem in a town of its own), "train" and "test" (one town, whose
    newcomers RL can get to know; no question, or picture, is in both)."""
    rng = random.Random(f"{split}-{seed}")
    home = random.Random("home").sample(range(4), len(NEWCOMERS))
    problems = []
    for i in range(count):
        level = rng.choices(list(SHARES), list(SHARES.values()))[0]
        town = [rng.randrange(4) for _ in NEWCOMERS] if split == "sft" else home
        problems.append(toy_problem(f"toy-{split}-{i}", list(ANSWERS)[i % 3], level, town, split, rng))
    return problems


def toy_call(problem: ToyProblem, candidate: int) -> str:
    """The tool call, as JSON text, that asks for one of the four candidates."""
    number = re.search(r"\d+|$", problem.question)[0]
    x, y = PLACES[candidate]
    name, arguments = {
        "perception": ("image_zoom_in", {"bbox_2d": [x - 10, y - 10, x + 10, y + 10], "label": "flag"}),
        "reasoning": ("python", {"code": f"print({number} % {BOXES[candidate]})"}),
        "search": ("tavily-search", {"query": f"{HOSTS[candidate]} {number}", "max_results": 1}),
    }[problem.category]
    return json.dumps({"name": name, "arguments": arguments})


def toy_trajectories(count: int, seed: int, tools: ToolConfig) -> list[tuple[ToyProblem, list[str | Observation]]]:
    """What a scripted teacher, right by luck or by knowledge, leaves for SFT: (problem, turns) with the assistant's
    texts and the tools' observations in turn. Like the paper's, only right trajectories are kept, about a quarter of
    them with a tool call."""
    rng = random.Random(f"teacher-{seed}")
    kept: list[tuple[ToyProblem, list[str | Observation]]] = []
    while len(kept) < count:
        for problem in toy_problems("sft", count, rng.randrange(2**31)):
            candidate = rng.randrange(4) if problem.level == "known" else problem.right
            if calls := rng.random() < TOOL_TRIES[problem.level]:
                answer = problem.outcomes[candidate]
            else:
                answer = problem.answers[0] if problem.level == "known" else rng.choice(ANSWERS[problem.category])
            if answer != problem.answers[0] or len(kept) == count:
                continue
            turns: list[str | Observation] = []
            if calls:
                call = toy_call(problem, candidate)
                with Toolbox(problem.images, tools) as toolbox:
                    turns = [TOOL_TURN % call, toolbox.call(call)]
            turns.append(ANSWER_TURN % ("It says" if calls else "It may be", answer, answer))
            kept.append((problem, turns))
    return kept


# Qwen3-VL-Thinking's message format, for the one thing a chat template is used for here: the first prompt.
CHAT_TEMPLATE = r"""
{{- '<|im_start|>system\n' + messages[0].content + '\n\n# Tools\n\nYou may call one function at a time. ' -}}
{{- 'Their signatures stand within <tools></tools> XML tags:\n<tools>' -}}
{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor -%}
{{- '\n</tools>\n\nTo call one, return a JSON object with its name and arguments within <tool_call></tool_call> ' -}}
{{- 'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' -}}
{{- '<|im_start|>user\n' -}}
{%- for part in messages[1].content -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text -}}
{%- endfor -%}
{{- '<|im_end|>\n<|im_start|>assistant\n<think>\n' -}}
"""
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                  "<|video_pad|>")  # fmt: skip
TAG_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


def toy_tokenizer():
    """A tokenizer in Qwen's format whose words are the toy world's own: one token for each name, colour, digit, ... and
    for each run of text between them, bytes for anything else, and Qwen's control tokens under their own names."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*RESIDENTS, *NEWCOMERS, *COLOURS, *HOSTS, *TOWNS, *SEASONS, "ten"]
    words += [tool["function"]["name"] for tool in SCHEMAS]
    splits = pre_tokenizers.Split(Regex(rf"\b(?:{'|'.join(words)})\b|\d|\n+"), "isolated")
    before = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    problems = toy_problems("sft", 60)
    texts = [SYSTEM_PROMPT, *re.findall("'([^']*)'", CHAT_TEMPLATE), *map(json.dumps, SCHEMAS), *words]
    texts += [problem.question for problem in problems] + [TOOL_TURN % toy_call(problem, 0) for problem in problems]
    texts += [ANSWER_TURN % (how, "red", "red") for how in ("It says", "It may be")]
    found = "1. {} fair 1\nhttps://fairs.example/{}/1\nHeld in\nImage 1: zoomed crop of image 0."
    texts += [found.format(host, host.lower()) for host in HOSTS]
    cut = "|".join(re.escape(token) for token in (*CONTROL_TOKENS, *TAG_TOKENS))
    parts = [part for text in texts for part in re.split(cut, text.replace("\\n", "\n"))]
    pieces = {piece for part in parts for piece, _ in before.pre_tokenize_str(part)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    scores = [(c, -10.0) for c in alphabet] + [(p, -1.0) for p in sorted(pieces - set(alphabet))]
    core = Tokenizer(models.Unigram(scores, unk_id=0))
    core.pre_tokenizer, core.decoder = before, decoders.ByteLevel()
    core.add_special_tokens(list(CONTROL_TOKENS))
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAG_TOKENS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def toy_model(seed: int = 0):
    """(model, tokenizer, image processor): transformers' own Qwen3-VL class, tiny and randomly initialised from
    `seed`."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = toy_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            "initializer_range": 0.05, "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 96,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0], "initializer_range": 0.05,
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]
    pixels = 64 * 64  # four visual tokens, whatever the picture
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, min_pixels=pixels, max_pixels=pixels, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return model, tokenizer, processor


def toy_recipe(folder: Path) -> dict:
    """Defaults of Config where the data is the toy world: sizes and rates for half a million weights on two cores."""
    return {
        "search_corpus": str(toy_corpus(folder / "toy_corpus.jsonl")),
        "threads": 1, "questions_per_step": 16, "steps": 130, "lr": 5e-4,
        "sft_steps": 400, "sft_lr": 2e-3, "sft_batch": 64,
        "micro_batch_tokens": 4096, "gradient_checkpointing": False, "max_rows": 128, "max_response_tokens": 144,
        "save_every": 26, "eval_every": 26, "eval_max_response_tokens": 144, "eval_max_turns": 3,
        "eval_temperature": 1.0, "eval_top_p": 1.0, "eval_top_k": 0, "eval_presence_penalty": 0.0,
    }  # fmt: skip


MADE = {"toy": lambda: toy_problems("train", 480), "toy-test": lambda: toy_problems("test", 192)}  # name -> maker
