"""Problems: nine benchmarks, four training sets, mixtures of them, files of your own, and the toy world.

    load("vstar")                     the whole set; pictures stay encoded until `open_image`
    load("virl39k,fvqa:500", 1000)    a mixture (500 problems of FVQA), of which 1000 are drawn by index with a seed
    load("mine.jsonl")                a file of your own (.jsonl, .json, .parquet, .csv or .tsv), a problem per row; its
                                      columns can have the names in Source, and any other column is named in the log

Questions are stored complete, options included, without instructions. Where the paper leaves its data open: MMSearch
keeps its text-only rows, DynaMath is variant 1, HR-Bench keeps one of four orders in which it asks each question, so
its figure is not the mean over four that others publish, and FVQA's aliases, neighbouring years among them, stay.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import csv
import io
import itertools
import json
import logging
import os
import random
import re
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache, partial
from pathlib import Path
from string import ascii_uppercase
from urllib.parse import unquote

import mpmath
from PIL import Image, ImageDraw
from tqdm import tqdm

from tools import SCHEMAS, Observation, Toolbox, ToolConfig, digest, open_image, png

log = logging.getLogger(__name__)
CACHE = Path("~/.cache/axpo").expanduser()  # digests of pictures that could be decoded, and of the benchmarks'
MARKER = "<image>"  # where a picture stands in a question
TAG = re.compile(r"<image[ _]?(\d*)>|<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>", re.IGNORECASE)

SYSTEM_PROMPT = """Think first. Call a tool when looking, computing or searching helps, and think again about what it \
returns. Then give the final answer, and only it, as <answer>\\boxed{...}</answer>."""


class DataError(ValueError):
    """Data that cannot be used, and what to do about it, in one sentence."""


def demand(met: object, said: str) -> None:
    if not met:
        raise DataError(said)


@dataclass(frozen=True)
class Problem:
    """A question with its pictures, encoded (bytes) or as a file, and the accepted answers, gold first. The question
    holds MARKER exactly once per picture, in their order."""

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
    """Where a set lives, and the names that its columns can have: `+` joins several, of `|` the first that is filled
    counts, an empty last one is "or none"."""

    repo: str = ""
    files: str = ""  # glob of the tables in the repository
    count: int | None = None  # problems expected; None where no source states it exactly
    default_kind: str = ""  # of a gold that is not a letter; "" decides by its look
    id: str = "id|qid|question_id|doc_id|sample_id|data_id|pid|index|"
    question: str = "question|problem|query|prompt|text"
    answers: str = "answer+answers|ground_truth|gt|gt_answer|gold|label|reward_model|solution"
    category: str = "category|subject|area|ability|data_source|source|"
    images: str = "decoded_image|query_image|images|image|image_paths|image_path|img|"  # pictures or their paths
    options: str = "options|choices|A+B+C+D+E+F|"
    kind: str = "kind|"
    cycle: str = ""  # only the first value seen is kept
    revision: str | None = None
    extra: tuple[str, ...] = ()  # globs of loose pictures or of archives
    text_only: bool = False  # rows without a picture are real
    joined: bool = False  # several answers are parts, all demanded, and not aliases
    training: bool = False  # drops what it shares with an evaluation set, and rows without an answer that can be graded


FORMULA = re.compile(r"[\\=^+*/<>]|^[^A-Za-z]*\d[^A-Za-z]*[A-Za-z]*\W*$")  # has its sign, or a number and one word
BOXED = re.compile(r"\A\$*\s*\\boxed\s*\{(?![^{]*\}.*\})((?:(?!\\boxed).)*)\}\s*\$*\Z", re.DOTALL)  # as a whole
FIELDS = ("id", "question", "answers", "category", "options", "kind", "cycle", "images")  # the last is read on demand
OWN = Source(text_only=True)  # a file of one's own
# fmt: off
SETS = {
    "mathvision": Source("MathLLMs/MathVision", "data/testmini-*.parquet", 304, "math"),
    "dynamath": Source("DynaMath/DynaMath_Sample", "data/sample1-*.parquet", 501),
    "mathvr": Source("gogoduan/Math-VR-bench", "data/test-*.parquet", 2500, "math", text_only=True, joined=True,
                     images="+".join(f"image{k}" for k in range(1, 9))),
    "vstar": Source("craigwu/vstar_bench", "test_questions.jsonl", 191, "choice",  # the JSON beside an image leaks
                    extra=("direct_attributes/*", "relative_position/*")),
    "visualprobe": Source("Mini-o3/VisualProbe_Hard", "val.json", 106, "text", extra=("data/*",)),
    **{f"hrbench{size}": Source(  # the TSV streams; the parquet of the same rows may be one row group of gigabytes
        "DreamMr/HR-Bench", f"hr_bench_{size}.tsv", 200, "choice", cycle="cycle_category",
        revision="83b9013d6293b85dc507e87199ca52517536939c") for size in ("4k", "8k")},
    "hrmmsearch": Source("sensenova/HR-MMSearch", "data/train-*.parquet", 305, "text"),
    "mmsearch": Source("CaraJ/MMSearch", "end2end.parquet", 300, "text", answers="gt_answer+alternative_gt_answers",
                       text_only=True),
    "virl39k": Source("TIGER-Lab/ViRL39K", "39Krelease.parquet", 38870, "math", extra=("images.zip",), training=True,
                      revision="812ec617dea4bc8a4e751663b88e4ebb7de4d00e"),
    "fvqa": Source("lmms-lab/FVQA", "fvqa_train.parquet", 4856, "text", training=True,
                   revision="bb4a4ff4c9c3fd0382d11f5d7fccd66d0b8428b5"),
    "pyvision": Source("Agents-X/PyVision-Image-RL-Data", "pyvision_image_rl_data.json", training=True,
                       extra=("*.zip", "pyvision_image_rl_data/*")),  # the name of the archive stands nowhere
    "mmfinereason": Source("OpenDataArena/MMFineReason-SFT-123K-Qwen3-VL-235B-Thinking", "data/train-*.parquet",
                           text_only=True, training=True, revision="cda6140bfba449bef9e57065a528b7424966e144"),
}
MIXES = {"paper-sft": "virl39k,fvqa,pyvision", "paper-rl": "virl39k,fvqa,pyvision,mmfinereason:22000",
         "paper-eval": ",".join(name for name, source in SETS.items() if not source.training)}
# fmt: on
Trajectory = tuple[Problem, list[str | Observation]]  # the texts of the assistant and what tools return, in turn
MADE = {"toy": lambda: toy_problems("train", 480), "toy-test": lambda: toy_problems("test", 192)}  # name -> maker


def load(name: str, limit: int | None = None, seed: int = 0, on_bad_row: str = "stop") -> list[Problem]:
    """Problems of a set, a mixture or a file of your own; raises DataError. `limit` draws that many before any picture
    is touched, never a prefix, because sets are ordered. Rows that cannot be used stop the load, or are left out if
    `on_bad_row` is "skip". Of a training set, what shares a picture with an earlier part or a benchmark is dropped."""
    parts = [(_Table(part), size) for part, size in check(name)]
    ids = [id for table, size in parts for id in _draw(list(table.rows), size, seed)]
    same = [id for id, count in Counter(ids).items() if count > 1]  # sampling and resuming hang on the id
    demand(not same, f"{len(same)} problems of {name} have the id of another, as {''.join(same[:1])}: rename a file.")
    drawn = set(_draw(ids, limit, seed))
    problems, bad, owners = [], [], {}  # owners: digest of a picture -> the set that it was first seen in
    for table, _ in parts:
        fresh = table.load([id for id in table.rows if id in drawn])
        bad += table.bad
        known, dropped = owners | _evaluation_images() if table.source.training else {}, Counter()
        for problem in fresh:
            digests = list(map(digest, problem.images))
            shared = [known[key] for key in digests if key in known]
            dropped.update(shared[:1])
            if not shared:
                problems.append(problem)
                owners.update(dict.fromkeys(digests, problem.source))
        for owner, count in dropped.items():
            log.warning(f"{table.name}: {count} of {len(fresh)} problems share an image with {owner}: dropped")
    leave_out(bad, len(drawn), name, on_bad_row)
    demand(problems, f"No problem of {name} is left.")
    return problems


def leave_out(bad: list[str], count: int, name: str, on_bad_row: str) -> None:
    """Name the bad ones of so many rows: in a warning, if `on_bad_row` is "skip", else in a DataError."""
    told = f"{len(bad)} of {count} rows of {name} cannot be used: {'; '.join(bad[:20])}{' ...' * (len(bad) > 20)}"
    demand(not bad or on_bad_row == "skip", f"{told}. Mend them, or leave them out with `--on_bad_row skip`.")
    if bad:
        log.warning("Left out: %s", told)


def picture_faults(groups: list[Iterable[bytes | Path]], title: str = "pictures") -> list[str]:
    """What is wrong with the first bad picture of each group, "" if none is. What could be decoded is remembered."""
    memory, fresh = CACHE / "pictures.txt", set()
    known = set(memory.read_text(encoding="utf-8").split()) if memory.exists() else set()

    def fault(group: Iterable[bytes | Path]) -> str:
        try:
            for picture in group:
                if (key := digest(picture)) not in known:
                    shorter, longer = sorted(open_image(picture).size)
                    if longer > 200 * shorter:
                        return f"its sides are {shorter} and {longer} pixels, and image processors take at most 1 : 200"
                    fresh.add(key)
        except (OSError, ValueError) as error:
            return str(error).strip(".")
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # a decoded picture of 33 megapixels takes 100 MB
        faults = list(tqdm(pool.map(fault, groups), title, len(groups), disable=len(groups) <= 64))
    with contextlib.suppress(OSError):  # where nothing can be written, the next start decodes again
        write(memory, "\n".join(sorted(known | fresh)).encode())
    return faults


def check(name: str) -> list[tuple[str, int | None]]:
    """(set or file, number of problems or None for all) of each part of a mixture; DataError if one is unknown."""
    parts = []
    for part in map(str.strip, MIXES.get(name, name).split(",")):
        what, _, size = (part, "", "") if Path(part).is_file() else part.partition(":")
        demand(not size or size.isdecimal(), f"{part}: after the colon belongs a number of problems.")
        told = f"No data set and no file is called {what!r}; known are {', '.join([*SETS, *MADE, *MIXES])}"
        demand(what in SETS or what in MADE or Path(what).is_file(), f"{told}, and mixtures with commas.")
        parts.append((what, int(size) if size else None))
    return parts


def _draw(items: list, count: int | None, seed: int) -> list:
    return items if count is None else random.Random(seed).sample(items, min(count, len(items)))


def _fetch(name: str, offline: bool) -> Path:
    """The folder of the set in the Hub's cache, downloaded if need be."""
    from huggingface_hub import constants, errors, snapshot_download

    source = SETS[name]
    wanted = [source.files, *source.extra]
    where = {"repo_id": source.repo, "repo_type": "dataset", "revision": source.revision}
    try:
        folder = Path(snapshot_download(**where, allow_patterns=wanted, local_files_only=offline))
        if any(folder.glob(source.files)):
            return folder
    except errors.GatedRepoError as error:  # before its parent, HfHubHTTPError
        page = f"https://huggingface.co/datasets/{source.repo}"
        raise DataError(f"{name}: {page} is gated; accept its terms there and log in with `hf auth login`.") from error
    except (errors.LocalEntryNotFoundError, ConnectionError):
        pass
    except errors.HfHubHTTPError as error:
        raise DataError(f"{name}: {source.repo} could not be fetched: {' '.join(str(error).split())}.") from error
    raise DataError(
        f"{name}: {source.files} of {source.repo} is not in the cache and cannot be reached; with a network, run "
        f"`hf download {source.repo} --repo-type dataset --revision {source.revision or 'main'} "
        f"--include {' '.join(map(repr, wanted))}`, which fills {constants.HF_HUB_CACHE}."
    )


class _Table:
    """A set or a file: `rows` are the numbers, or the made problems, of its ids; `bad` names rows that are unusable."""

    def __init__(self, name: str, offline: bool = False):
        self.name, self.source, self.made, self.bad = Path(name).name, SETS.get(name, OWN), name in MADE, []
        self.benchmark = name in SETS and not self.source.training  # of which all rows count
        self.rows = {problem.id: problem for problem in MADE[name]()} if self.made else {}
        if self.made:
            return
        self.folder = Path(name).parent if self.source is OWN else _fetch(name, offline)
        self.paths = [Path(name)] if self.source is OWN else sorted(self.folder.glob(self.source.files))
        cycle, count = [], 0
        for index, row in self._scan():
            kept = _cells(row, self.source.cycle)
            if kept != (cycle := cycle or kept):
                continue
            count += 1
            id = f"{Path(name).stem}/{''.join(_cells(row, self.source.id)) or index}"
            id += f"#{index}" if id in self.rows else ""  # whoever keeps records by id relies on it
            if _cells(row, self.source.answers) or not self.source.training:
                self.rows[id] = index
        expected = self.source.count or max(count, 1)
        demand(count == expected, f"{self.name}: {count} problems, expected {self.source.count or 'at least 1'}.")
        if len(self.rows) < count:
            log.warning("%s: %d problems without an answer were dropped", self.name, count - len(self.rows))

    def load(self, ids: Iterable[str]) -> list[Problem]:
        """Those of the problems of these ids whose pictures can be decoded."""
        if self.made:
            return [self.rows[id] for id in ids]
        found = list(self.stream(ids))
        faults = picture_faults([problem.images for _, problem in found], self.name)
        self.bad += [f"{where} has a bad picture: {fault}" for (where, _), fault in zip(found, faults) if fault]
        return [problem for (_, problem), fault in zip(found, faults) if not fault]

    def stream(self, ids: Iterable[str]) -> Iterator[tuple[str, Problem]]:
        """(where it stands, problem) of each id in the order of the rows, the pictures found and not decoded."""
        try:
            archives = [zipfile.ZipFile(path) for path in self.folder.glob("*.zip")] if self.source.extra else []
        except zipfile.BadZipFile as error:
            raise DataError(f"{self.name}: an archive in {self.folder} is broken: {error}.") from error
        members = {member: archive for archive in archives for member in archive.namelist()}
        names = {self.rows[id]: id for id in ids}
        for index, row in self._scan(names):
            where = f"{self.name}: row {index + 1} ({names[index]})"
            try:
                yield where, self._problem(names[index], row, members)
            except (ValueError, TypeError, LookupError, zipfile.BadZipFile) as error:
                self.bad.append(f"{where} {error}")

    def _problem(self, id: str, row: dict, members: dict[str, zipfile.ZipFile]) -> Problem:
        """The problem that a row holds; DataError says what is wrong with it."""
        source = self.source
        demand(None not in row, "has more cells than the table has columns: quote those that hold the separator")
        question, shown = _content(next(filter(None, map(row.get, source.question.split("|"))), ""))
        question = question.replace("Answer with the option's letter from the given choices directly.", "").strip()
        answers = dict.fromkeys(BOXED.sub(r"\1", cell).strip() for cell in _cells(row, source.answers))
        answers = [answer for answer in answers if answer]
        demand(answers, "has no answer")
        demand(question, "has no question")
        answers = ["; ".join(answers)] if source.joined else answers
        cells = [cell for cell in _cells(row, source.images) if cell != ""] or filter(None, shown)
        images = tuple(picture(cell, self.folder, members) for cell in cells)
        demand(images or source.text_only, "has no image")

        declared = "".join(_cells(row, source.kind)).lower()
        demand(declared in ("", "math", "choice", "text"), "has a kind but math, choice or text")
        gold, given = answers[0], _options(cells := _cells(row, source.options))
        demand(source is not OWN or not re.search(r"####|\\boxed|<answer>", gold), "has a derivation for an answer")
        demand(given or not cells, "has options that no rule reads: make them a list, or write A., B., ... before each")
        for options in [given] if given else [_options([question]), []]:  # what a question lists need not be options
            if letter := _letter(gold, options):
                break
        kind = declared or source.default_kind or ("math" if FORMULA.search(gold) else "text")
        if letter and declared != "math" and "text" not in (declared, source.default_kind):
            demand({_letter(each, options) for each in answers} <= {letter, ""}, "has several right letters")
            kind, answers = "choice", [letter]
        elif kind == "choice" or (given and not declared):
            raise DataError(f"has the answer {gold!r}, which is neither a letter nor the text of one option")
        letters = list(ascii_uppercase[: len(options)])
        listed = "".join(f"\n{letter}. {text}" for letter, text in zip(letters, given))
        if given and all(map(TAG.fullmatch, given)):  # each a picture of its own, or all drawn in a single one
            options = letters
            listed = listed if len(TAG.findall(question + listed)) == len(images) else ""
        question += listed * (given not in (letters, _options([question])))  # which may list them already
        if not images and source is not OWN:  # a tag stands for nothing
            question = TAG.sub(lambda tag: f"[{tag[0].strip('<>')}]", question)
        question, images = _placed(question, images)
        options = tuple(options) if kind == "choice" else ()
        category = " ".join(_cells(row, source.category))
        problem = Problem(id, question, images, tuple(answers), kind, options, id.partition("/")[0], category)
        demand(self.benchmark or answerable(problem), f"has the answer {gold!r}, which no rule can grade right")
        return problem

    def _scan(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, dict]]:
        """(number, row) of the wanted rows, or of all without their pictures; never holds a whole table of pictures."""
        names = [getattr(self.source, field) for field in FIELDS[: -1 if wanted is None else None]]
        columns = re.split("[+|]", "|".join(names))
        numbers = itertools.count()
        for path in self.paths:
            try:
                present, rows = _rows(path, columns)
                lacking = ", ".join(name for name in names if {"", *present}.isdisjoint(re.split("[+|]", name)))
                demand(not lacking, f"lacks {re.sub('[|+]', ' or ', lacking)}; it has {', '.join(present) or 'no row'}")
                unknown = [name for name in present if name not in [*columns, *Source.images.split("|")]]
                if unknown and self.source is OWN and wanted is None:
                    log.warning("%s: not understood, and not read: %s", self.name, ", ".join(unknown))
                for row, index in zip(rows, numbers, strict=False):
                    if wanted is None or index in wanted:
                        yield index, row
            except (OSError, ValueError, RecursionError, csv.Error) as error:
                said = error if isinstance(error, DataError) else f"cannot be read: {error}"
                where = self.name if self.name == path.name else f"{self.name}: {path.name}"
                raise DataError(f"{where} {said}.") from error


def _rows(path: Path, columns: list[str]) -> tuple[list[str], Iterable[dict]]:
    """(names of the columns, rows) of a table. A table of pictures streams, and parquet reads only `columns`."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        batches = file.iter_batches(batch_size=16, columns=columns)
        return file.schema_arrow.names, (row for batch in batches for row in batch.to_pylist())
    if kind in (".tsv", ".csv"):
        csv.field_size_limit(1 << 31)
        reader = csv.DictReader(path.open(newline="", encoding="utf-8-sig"), delimiter="," if kind == ".csv" else "\t")
        return reader.fieldnames or [], reader  # unlike pandas, csv leaves an option "None" a text
    text = path.read_text(encoding="utf-8-sig")
    rows = []
    for number, line in enumerate([text] if kind == ".json" else text.split("\n"), 1):  # texts may hold other line ends
        try:
            found = json.loads(line) if line.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"has no JSON in line {number + error.lineno - 1}: {error.msg}") from error
        for row in found if isinstance(found, list) else [found]:
            demand(isinstance(row, dict), f"has a row {len(rows) + 1} that is no object with named fields")
            rows.append(row)
    return list(dict.fromkeys(key for row in rows for key in row)), rows


def _cells(row: dict, names: str) -> list[str | bytes]:
    """What a row holds in columns named as in Source, as texts or bytes; [] if all of them are empty."""
    for alternative in filter(None, names.split("|")):
        cells = [leaf for name in alternative.split("+") for leaf in _leaves(row.get(name))]
        if any(cell != "" for cell in cells):
            return cells
    return []


def _leaves(value: object) -> list[str | bytes]:
    """The texts or bytes of a cell: a value, a list of them, either also written out as text, a picture {bytes, path},
    options {A, B, ...}, or FVQA's reward {ground_truth, candidate_answers}."""
    if isinstance(value, str) and re.fullmatch(r"\s*(\[\s*(['\"].*)?\]|\{\s*['\"]A['\"].*\})\s*", value, re.DOTALL):
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, TypeError):
                return _leaves(parse(value))
    if isinstance(value, dict):
        if "ground_truth" in value:
            value = [value["ground_truth"], value.get("candidate_answers")]
        elif value and ascii_uppercase.startswith("".join(sorted(value)).upper()):
            value = [value[key] for key in sorted(value)]
        else:
            value = next(filter(None, map(value.get, ("bytes", "path", "url", "text"))), b"")
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    if value is None or value != value:  # pandas writes a missing text as NaN
        return [""]
    return [value if isinstance(value, bytes) else str(value).strip()]


def _content(content: object) -> tuple[str, list]:
    """(text, cells of pictures) of a question or a message: a text, parts, or a chat of one user's message. A picture
    among the parts leaves a tag in its place, unless the text has tags of its own."""
    content = content if isinstance(content, (list, dict)) else str(content or "")
    text, tagged, images = "", "", []
    for part in content if isinstance(content, list) else [content]:
        part = {"text": part} if isinstance(part, str) else part
        kind = next(filter(None, [part.get("type"), part.get("role"), *part]), None) if isinstance(part, dict) else part
        if kind == "text" and isinstance(part.get("text"), str):
            text, tagged = text + part["text"], tagged + part["text"]
        elif kind in ("image", "image_url"):
            images.append(next(filter(None, map(part.get, (kind, "url", "path", "base64"))), None))
            tagged += MARKER
        elif kind == "user" and not tagged:
            tagged, images = _content(part.get("content"))
        else:  # the policy has a system message of its own
            demand(kind == "system", f"has a {kind!r} part, which is not understood")
    return text if TAG.search(text) else tagged, images


def _placed(text: str, images: tuple) -> tuple[str, tuple]:
    """The text with a MARKER for each picture, where its tag stands or in front, and the pictures in their order."""
    tags = list(TAG.finditer(text))
    if not tags:
        return f"{MARKER}\n" * len(images) + text, images
    demand(len(tags) == len(images), f"has {len(tags)} tags such as {tags[0][0]} for {len(images)} pictures")
    numbers = [int(tag[1] or -1) for tag in tags]
    if sorted(numbers) in (list(range(len(tags))), list(range(1, len(tags) + 1))):
        images = tuple(images[number - min(numbers)] for number in numbers)
    return TAG.sub(MARKER, text), images


def picture(cell: object, folder: Path, members: dict[str, zipfile.ZipFile] | None = None) -> bytes | Path:
    """The picture of a cell: bytes, the path of a file or of an archive's member, a file: or data: address, base64."""
    ref = next(iter(_leaves(cell)), b"")
    if ref and isinstance(ref, bytes):
        return ref
    path = ref if ref and len(ref) < 4096 else ""  # the system's limit; base64 can be megabytes
    path = unquote(path[7:]) if path.startswith("file://") else path
    for spelling in (path, Path(*Path(path).parts[1:]).as_posix()):  # some paths repeat the folder they are in
        if os.path.isfile(folder / spelling):  # unlike Path.is_file, it does not mind base64
            return folder / spelling
        if members and spelling in members:
            return members[spelling].read(spelling)
    with contextlib.suppress(ValueError, TypeError):
        encoded = "".join(ref.rpartition("base64,")[2].split())
        if len(encoded) > 64:  # a path may be made of the same letters
            return base64.b64decode(encoded, validate=True)
    raise DataError(f"lacks its image ({ref[:60] if ref else 'embedded'}) in {folder.absolute()}")


def _letter(gold: str, options: list[str]) -> str:
    """The letter that a gold means, "" if none: B, (B), B. blue, or else the text of an option."""
    letters = ascii_uppercase[: len(options) or 10]
    marked = re.fullmatch(r"\(?([A-Z])[).:]*(?:\s+(.+))?", gold, re.DOTALL)
    if marked and marked[1] in letters and marked[2] in (None, *options[letters.index(marked[1]) :][:1]):
        return marked[1]
    texts = [text.casefold() for text in options]
    if texts.count(gold.casefold()) == 1:
        return letters[texts.index(gold.casefold())]
    return gold.upper() if options and len(gold) == 1 and gold.upper() in letters else ""


def _options(cells: list[str]) -> list[str]:
    """The texts of options without their letters: cells, or what one text lists as (A) .. (B) .. or A. .. B. .., which
    is the last run of letters from A on, up to the end of a line; [] if it lists none."""
    while cells and not cells[-1]:  # a table has columns for more
        cells = cells[:-1]
    text = "\n".join(cells)
    marks = list(re.finditer(r"\(([A-J])\)|(?:(?<=\s)|^)([A-J])[.:)](?=\s|$)", text))
    letters = "".join(mark[1] or mark[2] for mark in marks)
    start = max(letters.rfind("A"), 0)
    count = len(os.path.commonprefix([letters[start:], ascii_uppercase]))
    if count < 2 or len(cells) not in (1, count):
        return cells if len(cells) > 1 else []
    run, end = marks[start : start + count], text.find("\n", marks[start + count - 1].end())
    ends = [*(mark.start() for mark in run[1:]), end if end >= 0 else len(text)]
    return [text[mark.end() : end].strip() for mark, end in zip(run, ends)]


@cache
def _evaluation_images() -> dict[str, str]:
    """Digest -> set of the benchmarks' pictures in the Hub's cache, read once for each commit of a set."""
    owners, absent = {}, []
    for name in MIXES["paper-eval"].split(","):
        try:
            memory = CACHE / f"{name}-{_fetch(name, offline=True).name}.txt"
            digests = memory.read_text(encoding="utf-8").split() if memory.exists() else []
            if not digests:
                table = _Table(name, offline=True)
                digests = {digest(ref) for _, problem in table.stream(table.rows) for ref in problem.images}
                demand(not table.bad, "incomplete")
                with contextlib.suppress(OSError):
                    write(memory, "\n".join(digests).encode())
            owners |= dict.fromkeys(digests, name)
        except DataError:
            absent.append(name)
    if absent:
        log.warning("Training data is not compared with %s, which are not on this machine", ", ".join(absent))
    return owners


# --- Trajectories as messages ----------------------------------------------------------------------------------------
def to_messages(problem: Problem, turns: Iterable[str | Observation], folder: Path) -> list[dict]:
    """A trajectory in Qwen's message format, with pictures as paths relative to `folder`, in which they are stored."""

    def shown(image: bytes | Path | Image.Image) -> dict:
        if isinstance(image, Image.Image):  # a tool's
            image = png(image)
        content = image.read_bytes() if isinstance(image, Path) else image
        with Image.open(io.BytesIO(content)) as opened:
            name = f"images/{digest(content)[:32]}.{opened.format.lower()}"
        if not (folder / name).exists():
            write(folder / name, content)
        return {"type": "image", "image": name}

    images = iter(problem.images)
    pieces = [piece for piece in re.split(f"({MARKER})", problem.question) if piece]
    asked = [shown(next(images)) if piece == MARKER else {"type": "text", "text": piece} for piece in pieces]
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": asked}]
    for turn in turns:
        said = isinstance(turn, str)
        content = f"<think>\n{turn}" if said else [*map(shown, turn.images), {"type": "text", "text": turn.text}]
        messages.append({"role": "assistant" if said else "tool", "content": content})
    return messages


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all: another process may read it meanwhile, or write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.{os.getpid()}.draft")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_trajectory(row: dict, folder: Path) -> Trajectory:
    """The trajectory of a row {messages} in Qwen's or OpenAI's format, or DataError; its texts begin behind `<think>`.
    Pictures may stand beside the messages, in a column. Only a system message is dropped, as the policy has its own."""
    understood = {"role", "content", "reasoning_content", "reasoning", "tool_calls", "tool_call_id", "name", "id"}
    messages = row.get("messages") if isinstance(row.get("messages"), list) else []
    demand({*map(type, messages)} == {dict}, "lacks 'messages', a list of {role, content}")
    beside = [picture(cell, folder) for cell in _cells(row, Source.images) if cell]
    asked, turns = None, []
    for message in messages[messages[0].get("role") == "system" :]:
        text, cells = _content(message.get("content"))
        framed = re.fullmatch(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", text, re.DOTALL)
        role = "tool" if framed and asked and message.get("role") == "user" else message.get("role")
        due = "user" if not asked else "assistant" if len(turns) % 2 == 0 else "tool"
        demand(role == due, f"has a message of {role!r} where one of {due!r} must stand: {text[:60]!r}")
        for key in message:
            demand(key in understood or not message[key], f"has a message with {key!r}, which is not understood")
        if due == "assistant":
            demand(not cells, "has a picture by the assistant, which cannot show any")
            turns.append(_turn(message, text))
            continue
        images = [picture(cell, folder) for cell in cells if cell]
        missing = max(len(TAG.findall(text)) - len(images), 0)
        images, beside = images + beside[:missing], beside[missing:]
        if due == "user":
            asked = text, images
        else:
            demand(turns[-1].endswith("</tool_call>"), f"has an answer to no tool call: {text[:60]!r}")
            text = framed[1] if framed else text
            text = _placed(text, tuple(images))[0].replace(MARKER, "") if images else text
            turns.append(Observation(text, images, True))
    demand(len(turns) % 2, "must end with a message of 'assistant'")
    question, images = _placed(asked[0], (*asked[1], *beside))
    return Problem(str(row.get("id", "")), question, images, (), "text"), turns


def _turn(message: dict, text: str) -> str:
    """The assistant's text from behind `<think>` on. The thinking and the call stand in it, or beside it."""
    text = re.sub(r"\s*(<\|im_end\|>\s*)?$", "", text)
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    if text.lstrip().startswith("<think>") and not thought:
        text = re.sub(r"^\s*<think>\n?", "", text)
    elif thought or "</think>" not in text:
        text = f"{thought.strip()}\n</think>\n\n{text.lstrip()}"
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        with contextlib.suppress(ValueError, TypeError):  # they may be written out
            arguments = json.loads(arguments)
        usable = isinstance(function.get("name"), str) and isinstance(arguments, dict)
        demand(usable, f"has a call without a name or an object of arguments: {call}")
        written = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
        text += ("" if text.endswith("\n\n") else "\n") + f"<tool_call>\n{written}\n</tool_call>"
    said, calls = text.partition("</think>")[2], text.count("</tool_call>")
    demand(said.strip() or calls, "has a message of 'assistant' that is empty, or only thinks")
    sound = "think>" not in said and calls <= 1 and (not calls or text.endswith("</tool_call>"))
    demand(sound, f"must think once in a turn, and make one call at most, as its last word: {said[:60]!r}")
    return text


# --- How answers are compared ----------------------------------------------------------------------------------------
# What may be meant in two ways is wrong, as a wrong reward does more harm than a missed one. By spelling alone: ratios
# (2:3 is not 4:6), |x|, n!, sums, integrals, arcsines, and units (15 cm is not 150 mm).
# fmt: off
_CHARACTERS = str.maketrans(dict(zip("−–—×·⋅∗÷⁄≦≧⩽⩾~“”’", "---****//≤≥≤≥ \"\"'")) | {"π": "\\pi ", "√": "\\sqrt "})
_COMMANDS = {"times|cdot": "*", "div": "/", "leq?(?:slant)?": "≤", "geq?(?:slant)?": "≥", "lt": "<", "gt": ">",
    "approx": "=", "pm": "±", "infty": "∞", "cup": "∪", "in": "∈", "circ|degree": "°", "[dtc]frac": r"\\frac ",
    "lor": " or ", "q?quad": " ", "left|right|displaystyle|boxed": "", "angle": "∠", "triangle": "△", "neq?": "≠",
    "colon": ":", "Omega": "Ω", "lambda": r"\\lamda "}  # lambda is Python's
_SPELLINGS = [(re.compile(pattern, re.DOTALL), new) for pattern, new in [
    *[(rf"\\(?:{names})(?![A-Za-z])", new) for names, new in _COMMANDS.items()], (r"\\begin\{[pb]?matrix\}", "(("),
    (r"\\\\(?=.*\\end\{[pb]?matrix\})", "),("), (r"\\end\{[pb]?matrix\}", "))"), ("&", ","), (r"\{([.,:])\}", r"\1"),
    (r"\\([{}%$])", r"\1"), (r"([_^])\{(\w)\}(?!\w)", r"\1\2"), (r"\\\\|\n", " ; "), (">=", "≥"), ("<=", "≤"),
    *[(r"\\(?:text\w*|math[a-z]+|operatorname|mbox|boldsymbol|emph)\s*\{([^{}]*)\}", r" \1 ")] * 2, (r"\\!|^\s*=", ""),
    (r"(?<![\w)}*])(\*\*|[*`\"])([^*`\"]+)\1(?![\w({*])", r"\2"), (r"\*\*", "^"), (r"\+∞", "∞"),  # bold or quoted
    (r"\\[()\[\],;: ]|\{? ?\\begin\{(?:cases|array\}\{l)\}|\\end\{(?:cases|array)\}", " "), (r"\s+", " "),
    (r"(?<=[\d})i] )(?:square|sq\.?) (\w+)", r"\1^2"), (r"(?<=[\d})i] )cubic (\w+)", r"\1^3"), (r" +\^", "^"),
    (r"(?i)(:\d\d) ?([ap])\.?m\b", r"\1 \2m"), (r"\\frac\s*(\w|\\pi(?![a-z]))", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*(\w|\\pi(?![a-z]))", r"\1{\2}"), (r"(?<!\.)[. ]+$|^ ", ""),
    (r"\^\s*(?:\{\s*°\s*\}|°)| degrees?\b", "°"), ("° ?([CF])[a-z]+", r"°\1"), (r"\\sqrt\s*(\d+)", r"\\sqrt{\1}"),
    (r"^(?i:(?:the )?(?:final |correct )*(?:answer|option|choice)(?: is:?| ?[:=])|(?:it|this)(?: is|'s)|"
     r"there (?:is|are)|in(?= \d{4}$)) (?=.)", ""),
    (r"^[({] ?([^(){}\[\],;]*|-?\\frac\{-?\w+\}\{\w+\}) ?[)}]$", r"\1")]]  # (-7) and {60} are no point and no set
_WORDS = dict(re.findall(r"(\S+):(\S+)", "zero:0 one:1 two:2 three:3 four:4 five:5 six:6 seven:7 eight:8 nine:9 ten:10 "
    "eleven:11 twelve:12 fifteen:15 twenty:20 hundred:*10^2 thousand:*10^3 million:*10^6 billion:*10^9 minus:- "
    "negative:- percent:% per-cent:% dollar:$ second:s minute:min hour:h foot:ft feet:ft inch:in inche:in mile:mi "
    "gram:g meter:m metre:m millimeter:mm millimetre:mm centimeter:cm centimetre:cm kilometer:km kilometre:km"))
_WORD = re.compile(rf"(?<![\w\\])({'|'.join(_WORDS).replace('-', '[- ]')})s?(?![\w-])", re.IGNORECASE)
_UNIT = r"(?:[mck]?m|in|ft|min?|[mk]?g|lb|m?[lLA]|mol|day|year|units?|[mkM]?(?:Hz|Pa|[NJWVΩ])|[sh])(?:\^?\{?[23]\}?)?"
_LITERAL = re.compile(  # money, sign, fraction or decimal with power; unit (5m, 2mg: products?) or what is counted
    r"([$€£¥]?)([+-]?)(?=\.?\d)(?:(?:(\d+) )?(\d+)/(\d+)|(\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d*)((?:\.\d+)?)"
    rf"(?:(?:\*10\^\{{?|[eE])([+-]?\d{{1,3}})\}}?)?)(| ?°[CF]?|[%$€£¥]|(?![a-zA-Z]\b|mg|Pa|[mkM][A-KM-Z]){_UNIT}"
    rf"| {_UNIT}(?:/{_UNIT})?| (?!plus|times|less|doz|hal|third|quarter|\w+ths)(?:[a-z]{{3,}}s|people|yuan))", re.ASCII)
_PARTS = re.compile(r"(?:m(?=∠))?(?:((?:\\[a-z]++ ?){0,2}+∠?(?!not)[A-Za-z]*+(?:_\w|_\{△?\w++\})?'*+(?:\([^()=,]*+\))?|"
    r"\(\w(?:,\w)++\))[=∈](?!.*=))?(.*?)(?:(?<=[\d})i]) ((?:[ckm]?m|units?)(?:\^?[23])?|[ap]m))?", re.S | re.I)
_MP = mpmath.MPContext()  # a context of its own, so that no other user of mpmath loses or gains digits
_MP.dps = 50
_close = partial(_MP.almosteq, rel_eps=1e-30, abs_eps=0)  # to 9 digits, x+1+10^{-12} would pay for x+1
_CALLS, _GREEK = "sin|cos|tan|ln|log|exp|sqrt", "(?:pi|alpha|beta|gamma|theta|lamda|mu|rho|sigma|phi)(?![A-Za-z])"
_KNOWN = {name: getattr(_MP, name) for name in (*_CALLS.split("|"), "pi", "e")} | {"log": _MP.log10, "i": _MP.j}
_OPERATORS = {"Add": _MP.fadd, "Sub": _MP.fsub, "Mult": _MP.fmul, "Div": _MP.fdiv, "Pow": _MP.power, "USub": _MP.fneg}
_REWRITES = [(re.compile(pattern.replace("GROUP", r"\{([^{}]*)\}").replace("CALL", _CALLS)), new) for pattern, new in [
    (r"\\frac ?GROUP ?GROUP", r"((\1)/(\2))"), (r"\\sqrt\[(\d)\]GROUP", r"((\2)^(1/\1))"), (r"_GROUP", r"_\1"),
    (r"(CALL|\^)GROUP", r"\1(\2)"), (r"(?<![A-Za-z])([A-Za-z])\((\d+|[a-z])\)", r"\1_\2"),  # f(0) is a name,
    (r"(?<![\w)}.^/])(\d+)/(\d+)(?= ?[A-Za-z\\(])", r"(\1/\2)"),  # and 1/2x is half of x
    (rf"(CALL)((?:\^\(?\d\)?)?) ?(\d* ?(?:[a-z]|\\?{_GREEK})|\d+)(?! ?[\w(^]|\\(?!CALL))", r"\1\2(\3)"),
    (r"\\?(sin|cos|tan)\^\(?(\d)\)?(\([^()]*\))", r"(\1\3)^\2"),
]] * 6 + [(re.compile(rf"\\(?=(?:{_CALLS})\(|{_GREEK})"), " ")]  # six levels of nesting, from the inside out
_TOKEN = re.compile(rf"(?:\d{{0,6}}\.\d{{1,9}}|\d{{1,20}})(?![\d.])|(?:{_CALLS})\(|{_GREEK}|(?!ln)[A-Za-z](?:_\w++)?"
    r"(?![A-Za-z]{2})|[-+*/^()]", re.ASCII)  # no words, and no numbers so long that they come close to a root
_DATE = re.compile(r"(\d{1,2} )?(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|"
    r"oct(ober)?|nov(ember)?|dec(ember)?)( \d{1,2})?( [12]\d{3})?")
_CONNECTING = {"of", "and", "it", "is", "its", "was", "are", "da", "de", "dr", "mr", "mrs", "ms", "sir"}
_DECISIVE = re.compile(r"\w|yes|no[tn]?|never|none|nor|without|anti|vice|former|new|(?:north|south|east|west)(?:ern)?")
_PLACE = ("(?:Australia|Austria|Brazil|Canada|China|Egypt|England|France|Germany|Greece|India|Ireland|Italy|Japan|"
    "Mexico|Netherlands|Poland|Portugal|Russia|Scotland|Spain|Sweden|UK|USA?)")  # no state: Paris, Texas is not Paris
# fmt: on


def same_answer(answer: str, problem: Problem, tolerance: float = 0.0) -> bool:
    """Whether what the box holds is an accepted answer. Never raises. `tolerance`: absolute, between two numbers."""
    same = {"math": _same_math, "choice": _same_choice}.get(problem.kind, _same_text)
    golds = [gold for gold in problem.answers if max(len(answer), len(gold)) <= 300]  # characters that a box may hold
    return any(same(_spell(answer), _spell(gold), problem, tolerance) for gold in golds)


def answerable(problem: Problem) -> bool:
    """Whether each accepted answer, boxed as it is, is graded right."""
    return all(same_answer(gold, problem) for gold in problem.answers)


def _spell(text: str) -> str:
    """One spelling of what LaTeX, Markdown, Unicode and plain text write differently. NFKC alone reads 10⁸ as 108."""
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0> ", text)).translate(_CHARACTERS)[:1000]
    text = re.sub(r"\$\$[\s;]*\$\$", "¦", text)  # between the blanks of one question, which are filled in order
    text = text if text.count("$") % 2 or "\\$" in text else text.replace("$", " ")  # a pair delimits, one is money
    for pattern, new in _SPELLINGS:
        text = pattern.sub(new, text)
    return text.strip()


def _tidy(text: str) -> str:
    """Mathematics in symbols, without the spaces that mean nothing; inequalities as intervals, x>5 as x∈(5,∞)."""
    text = _WORD.sub(lambda m: _WORDS[m[1].lower().replace(" ", "-")], text).replace(" per ", "/")
    text = re.sub(r"^([A-Z]'?) ?(?=\([^()]*[,;][^()]*\)$)", r"\1=", text)  # P(3,-4) is a point with its name
    text = re.sub(r",? (?:or|and) |, (?=\d{3}(?!\d))", ";", text)  # 1, 234 is no thousand
    text = re.sub(r"(?<!\w)(?!(?<=\}) [A-Za-z]) | (?!\w)", "", text)
    if re.search("[>≥]", text) and not re.search("[<≤,;]", text):
        text = "".join(re.split("([>≥])", text)[::-1]).translate(str.maketrans(">≥", "<≤"))
    text = re.sub(r"^[A-Za-z](?=[<≤][^<>≤≥]+$)", r"-∞<\g<0>", re.sub(r"^[^<>≤≥]+[<≤][A-Za-z]$", r"\g<0><∞", text))
    sides = re.fullmatch("([^<>≤≥,;]+)([<≤])([A-Za-z])([<≤])([^<>≤≥,;]+)", text)
    return f"{sides[3]}∈{'(['[sides[2] == '≤']}{sides[1]},{sides[5]}{')]'[sides[4] == '≤']}" if sides else text


def _number(text: str, question: str = "") -> tuple[Fraction, str] | None:
    """(value, unit) of a literal; None for 17*23. 50% is 1/2, unless the question is for a percentage."""
    text = re.sub(r"(?<!\d) (?=[\d-])", "", re.sub(r"\\frac\{(-?\d+)\}\{(\d+)\}", r" \1/\2", text))
    match = _LITERAL.fullmatch(re.sub(r"^([+-]?)10\^", r"\g<1>1*10^", text))
    if not match or int(match[5] or 1) == 0:
        return None
    money, sign, whole, top, bottom, digits, decimals, power, unit = match.groups("")
    value = Fraction(f"{top}/{bottom}" if top else re.sub("[ ,]", "", digits) + decimals) + int(whole or 0)
    value *= Fraction(10) ** int(power or 0) * (-1 if sign == "-" else 1)
    if unit == "%":
        return (value if re.search(r"(?i)(?<![\d\\])(?<!\d )(?:\\?%|percent)", question) else value / 100), ""
    return value, re.sub(r"[\^{} ]", "", money + unit)


def _same_math(answer: str, gold: str, problem: Problem, tolerance: float = 0.0) -> bool:
    """Prose, numbers, points in order, lists in any, formulas. One side may lack a unit (not am or pm) or `name =`."""
    if re.fullmatch(r"[A-Za-z' ,.()-]*[A-Za-z]{3}[A-Za-z' ,.()-]*", gold):
        return _same_text(answer, gold, problem, tolerance)
    both = _tidy(answer), _tidy(gold)
    if (":" in both[0]) != (":" in both[1]) and re.search(r"\bratios?\b", problem.question):  # there 1/4 is 1:4
        both = [re.sub("(?<![^=])([^:=,;]+):([^:=,;]+)$", r"\\frac{\1}{\2}", text) for text in both]
    (name, answer, unit), (its_name, gold, its_unit) = (_PARTS.fullmatch(text).groups("") for text in both)
    number, given = (_number(text, problem.question) for text in (gold, answer))
    unit, its_unit = (given[1] if given else "") or unit.lower(), (number[1] if number else "") or its_unit.lower()
    if not gold or (name and its_name and not re.match(rf"{re.escape(name)}(_|$)", its_name)):  # x may stand for x_1
        return False
    if unit != its_unit and (unit and its_unit or its_unit in ("am", "pm")):
        return False
    if number:
        return given is not None and abs(given[0] - number[0]) <= tolerance
    (brackets, items), (its_brackets, golds) = _items(answer), _items(gold)
    if answer == gold or golds == [gold]:
        bare, asked = (re.sub(r"[{}()* ]", "", t) for t in (answer, _tidy(_spell(problem.question[:3000]))))
        ours, theirs = (None if bare in asked and not bare.isalnum() else _values(answer)), _values(gold)
        return answer == gold or bool(ours and theirs and ours[0] == theirs[0] and all(map(_close, ours[1], theirs[1])))
    if brackets != its_brackets or len(items) != len(golds) or len(items) > 20 or given:  # 1,000 is no list
        return False
    labelled = [len({_PARTS.fullmatch(_tidy(t))[1] for t in side}) > 1 for side in (items, golds)]  # AB=4, CD=5
    if brackets or "¦" in gold or labelled[0] != labelled[1]:
        return all(_same_math(a, g, problem, tolerance) for a, g in zip(items, golds))
    found = all(any(_same_math(a, g, problem, tolerance) for a in items) for g in golds)
    return found and all(any(_same_math(a, g, problem, tolerance) for g in golds) for a in items)


def _items(text: str) -> tuple[str, list[str]]:
    """(brackets of a point or an interval, what they hold), or ("", items of a set or a list)."""
    pieces, depth = [""], 0
    for character in re.sub(r"^\{(.*)\}$", r"\1", text):
        depth += (character in "([{") - (character in ")]}")
        pieces = [*pieces, ""] if depth == 0 and character in ",;∪¦" else [*pieces[:-1], pieces[-1] + character]
    if len(pieces) == 1 and re.fullmatch(r"[(\[].*[,;].*[)\]]", text):
        return text[0] + text[-1], _items(text[1:-1])[1]
    return "", [piece.replace("±", sign).strip() for piece in pieces for sign in ("+-" if "±" in piece else " ")]


@lru_cache(maxsize=4096)
def _values(text: str) -> tuple[set[str], list] | None:
    """(variables, values at three points) of a formula, or of an equation, whose multiples are the same; else None."""
    if re.search(r"\d ?\\frac ?\{-?\d+\}|\d \d|[+-]{2}|^[A-Za-z ]{2,}$|f\([^()]*[^\w()]", text):
        return None  # names (AB is not BA), and riddles: 2\frac{1}{2} may be a sum or a product
    left, *right = text.split("=")
    text = f"({left})-({'='.join(right)})" if right else text
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    source = re.sub(r"(?<=[\w)]) (?=[A-Za-z(])", " · ", " ".join(_TOKEN.findall(text)))
    if _TOKEN.sub("", text).strip() or re.search(r"/ (?:\([^()]*\)|[\w.]+)(?: \^ \w+)? ·", source):  # a/bc: a/(bc)?
        return None
    names = {*re.findall(r"[A-Za-z]\w*", source)} - _KNOWN.keys()
    points = [{v: sign * _MP.mpf(random.Random(v + str(sign)).uniform(0.2, 3)) for v in names} for sign in (1, -1, 2)]
    try:  # one point is negative, as x is not the root of x^2
        tree = ast.parse(source.replace("·", "*").replace("^", "**"), mode="eval").body
        values = [_compute(tree, _KNOWN | point) for point in points]
        return names | {*"=" * len(right)}, [value / values[0] for value in values] if right else values
    except (SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _compute(node: ast.expr, names: dict):
    """Value of a parsed formula. Beyond 1e15 neighbouring integers come close, and towers of powers get expensive."""
    if isinstance(node, ast.Name | ast.Constant):
        return names[node.id] if isinstance(node, ast.Name) else _MP.mpf(str(node.value))
    parts = [_compute(child, names) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    value = parts[0](*parts[1:]) if isinstance(node, ast.Call) else _OPERATORS[type(node.op).__name__](*parts)
    if abs(value) > 1e15:
        raise OverflowError
    return value


def _same_choice(answer: str, gold: str, problem: Problem, tolerance: float) -> bool:
    """A bare letter, whatever the options say, else exactly one option's text ("A red ball" is not A), or both."""
    options = {key: _spell(text) for key, text in zip(ascii_uppercase, problem.options) if "<image" not in text}
    answer = re.sub(r"(?i)^(?:option|choice) (?=\W*[a-z]\b)| is (?:the )?(?:correct|right)(?: \w+)?$", "", answer)
    key, behind = re.fullmatch(r"[(\[]?([A-Za-z])(?:(?:[)\].:,]| -)+ *(.*))?|.*", answer, re.DOTALL).groups("")
    if key and not behind and key.upper() in ascii_uppercase[: len(problem.options) or 26]:
        return key.upper() == gold
    named = [key for key, option in options.items() if _same_math(answer, option, problem)]
    if named or key.upper() != gold:
        return named == [gold]
    if gold in options:
        return _same_math(behind, options[gold], problem)
    return bool(behind) and not re.search(r"\b(?:or|not|but|nor|maybe|[B-J])\b|\bA\b(?! [a-z])|[/;|?]", behind)


def _same_text(answer: str, gold: str, problem: Problem, tolerance: float = 0.0) -> bool:
    """Dates in any order, numbers, else words, in order or rotated ("Smith, John"). Only connecting ones and a place
    behind ("Paris, France") are added; leading ones may lack (General George Washington), unless they decide."""
    answer, gold = (re.sub(r"(?i)^(?:in|on|at|by|from) (?:the )?|^the year ", "", text) for text in (answer, gold))
    if not re.search(rf"(?:^|[ (]){_PLACE}\)?$", gold):
        answer = re.sub(rf"(?:(?:, ?| \(){_PLACE}\)?)+$", "", answer)
    ours, theirs, number = _words(answer), _words(gold), _number(_tidy(gold))
    if _DATE.fullmatch(" ".join(ours)) and (_DATE.fullmatch(" ".join(theirs)) or re.fullmatch(r"[12]\d{3}", gold)):
        ours, theirs = (sorted(word[:3] if word.isalpha() else word for word in words) for words in (ours, theirs))
        return ours == theirs or (gold.isdigit() and gold in ours)  # a year is also right within a full date
    if (number and not re.search("[a-z]{2}s$", number[1])) or re.match(r"\d+:\d\d", gold):
        return _same_math(answer, _tidy(gold), problem, tolerance)
    given, wanted = ([word for word in words if word not in _CONNECTING] or words for words in (ours, theirs))
    digits, left_out = re.search(r"\d", gold), theirs[: len(theirs) - len(ours)]
    decides = digits or any(_DECISIVE.fullmatch(word) or word in _CONNECTING for word in left_out)
    leading = theirs == left_out + ours and not decides and 2 * len(given) >= 0.75 * (len(given) + len(wanted))
    rotations = [wanted[k:] + wanted[:k] for k in range(1 if digits else len(wanted))]
    return bool(given) and (leading or given in rotations or (not digits and "".join(given) == "".join(wanted)))


def _words(text: str) -> list[str]:
    """Lower-case words without accents and articles (vitamin A, The The and C++ keep theirs), numbers with signs."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|(?<=\d),(?=\d{3})|(?<=[A-Za-z])(?:['’]|(?<!^A)\.(?!\d))", "", text)
    shorter = re.sub(r"\b(?:[Tt]he|[Aa]n|a(?= \w))\b|^A\b(?= \w)|(?<=\d )(?:of\b|to(?= \d))", " ", text)
    words = [re.findall(r"(?<!\w)-?\d+(?:\.\d+)?|\.\d+|[^\W_]+[+#]*", t.casefold()) for t in (shorter, text)]
    return [_WORDS[word] if _WORDS.get(word, "").isdigit() else word for word in words[0] or words[1]]


# --- The toy world: the Thinking-Acting gap in miniature -------------------------------------------------------------
# A name decides what a tool must be asked: where the flag of Mira stands (image_zoom_in), how many eggs a box of Mira
# holds (python), who runs the fair of Mira (tavily-search). Three of four candidates are wrong, and answer as well. The
# residents are the same in every town, so the teacher's trajectories teach how to call for them ("familiar"). The
# newcomers are somebody else in every town the teacher wrote from, so SFT leaves a call for them a guess ("hidden"); RL
# and evaluation happen in one town, where it can be found out. Other questions need no call, which misleads ("known").
RESIDENTS, NEWCOMERS = ("Mira", "Ivo", "Tess", "Rolf"), ("Una", "Pia", "Kurt")
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (50, 80, 220)}
PLACES = ((250, 250), (750, 250), (250, 750), (750, 750))  # centre of a flag in thousandths of width and height
BOXES = (4, 5, 6, 7)  # eggs in a box
HOSTS, TOWNS = ("Olin", "Rask", "Tovar", "Wend"), ("Rome", "Oslo", "Lima")
SEASONS = ("spring", "summer", "winter")  # whose fairs are in these towns, as is known
FAIR_RNG = random.Random("fairs")
FAIRS = {(host, year): FAIR_RNG.choice(TOWNS) for host in range(4) for year in range(10, 100)}  # for the corpus
REMAINDERS = {n: tuple(str(n % box) for box in BOXES) for n in range(10, 100)}  # of the four candidates
RESULTS = {"reasoning": REMAINDERS, "search": {n: tuple(FAIRS[host, n] for host in range(4)) for n in REMAINDERS}}
ANSWERS = {"perception": tuple(COLOURS), "reasoning": ("1", "2", "3"), "search": TOWNS}  # of each family
SHARES = {"known": 0.45, "familiar": 0.15, "hidden": 0.40}  # of the problems
TOOL_TRIES = {"known": 0.3, "familiar": 0.15, "hidden": 0.13}  # of the teacher, before what is wrong is dropped
TOOL_TURN = "I can not tell, so I use a tool.\n</think>\n\n<tool_call>\n%s\n</tool_call>"
ANSWER_TURN = "%s %s.\n</think>\n\n<answer>\\boxed{%s}</answer>"


def draw_town(flags: tuple[str, ...], ground: str, rng: random.Random) -> bytes:
    """Four houses with flags: plain in a crop, a faint tint among confetti at the 64 x 64 that the toy model sees."""
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
    return png(image)


@dataclass(frozen=True)
class ToyProblem(Problem):
    """With what its author knows: which of four candidates is right, and the answer that each of them leads to."""

    level: str = ""
    right: int = 0
    outcomes: tuple[str, ...] = ()


def toy_problem(id: str, family: str, level: str, newcomers: list[int], split: str, rng: random.Random) -> ToyProblem:
    """Draw one; newcomer i stands for the candidate `newcomers[i]`. A wrong call always misleads."""
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
        question = f"{MARKER}What colour is the flag of {name}?"
        if level == "known":
            answer, question = ground, f"{MARKER}What colour is the ground?"
    else:
        if level == "known":
            name = "ten" if family == "reasoning" else SEASONS[TOWNS.index(answer)]
        results = RESULTS[family]
        held_out = {n for n in results if zlib.crc32(f"{name} {n}".encode()) % 3 == 0}  # a third, for evaluation
        fitting = [n for n in results if split == "sft" or (split == "test") == (n in held_out)]
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
    """Problems of "sft", each in a town of its own, or of "train" or "test", all in one, with no question in both."""
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


def toy_trajectories(tools: ToolConfig, seed: int, count: int = 1600) -> list[Trajectory]:
    """What a scripted teacher leaves for SFT: right trajectories only, about a quarter of them with a tool call."""
    rng = random.Random(f"teacher-{seed}")
    kept: list[Trajectory] = []
    while len(kept) < count:
        for problem in toy_problems("sft", count, rng.randrange(2**31)):
            known = problem.level == "known"
            candidate = rng.randrange(4) if known else problem.right
            calls, gold = rng.random() < TOOL_TRIES[problem.level], problem.answers[0]
            thought = gold if calls or known else rng.choice(ANSWERS[problem.category])
            answer = problem.outcomes[candidate] if calls else thought
            if answer != gold or len(kept) == count:
                continue
            turns: list[str | Observation] = [ANSWER_TURN % ("It says" if calls else "It may be", answer, answer)]
            if calls:
                call = toy_call(problem, candidate)
                with Toolbox(problem.images, tools) as toolbox:
                    turns = [TOOL_TURN % call, toolbox.call(call), *turns]
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


def toy_model(seed: int = 0):
    """(model, tokenizer, image processor): a tiny Qwen3-VL with random weights; a token for each name, colour, digit of
    the toy world, each run of text between them and each of Qwen's control tokens, bytes for anything else."""
    import torch
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = [*RESIDENTS, *NEWCOMERS, *COLOURS, *HOSTS, *TOWNS, *SEASONS, "ten"]
    words += [tool["function"]["name"] for tool in SCHEMAS]
    splits = pre_tokenizers.Split(Regex(rf"\b(?:{'|'.join(words)})\b|\d|\n+"), "isolated")
    before = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = [SYSTEM_PROMPT, *re.findall("'([^']*)'", CHAT_TEMPLATE), *map(json.dumps, SCHEMAS), *words]
    for problem in toy_problems("sft", 60):
        texts += [problem.question.removeprefix(MARKER), TOOL_TURN % toy_call(problem, 0)]
    texts += [f"1. {host} fair 1\nhttps://fairs.example/{host.lower()}/1\nHeld in" for host in HOSTS]
    texts += [ANSWER_TURN % (how, "red", "red") for how in ("It says", "It may be")]
    texts += ["Image 1: zoomed crop of image 0."]
    cut = "|".join(map(re.escape, CONTROL_TOKENS + TAG_TOKENS))
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
    size = {"min_pixels": 64 * 64, "max_pixels": 64 * 64}  # four visual tokens, whatever the picture
    processor = Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, **size)
    return model, tokenizer, processor


def toy_recipe(folder: Path) -> dict:
    """Defaults of Config for half a million weights on two cores, and the search corpus, written into the folder."""
    text = ""
    for (host, year), town in FAIRS.items():
        url = f"https://fairs.example/{HOSTS[host].lower()}/{year}"
        text += json.dumps({"title": f"{HOSTS[host]} fair {year}", "url": url, "text": f"Held in {town}."}) + "\n"
    write(folder / "toy_corpus.jsonl", text.encode())
    return {
        "search_corpus": str(folder / "toy_corpus.jsonl"),
        "threads": 2, "questions_per_step": 16, "steps": 130, "lr": 5e-4,
        "sft_steps": 400, "sft_lr": 2e-3, "sft_batch": 64,
        "micro_batch_tokens": 4096, "recompute": False, "max_prompt_tokens": 1024, "max_response_tokens": 144,
        "eval_every": 26, "eval_max_response_tokens": 144, "eval_max_turns": 3,
        "eval_temperature": 1.0, "eval_top_p": 1.0, "eval_top_k": 0, "eval_presence_penalty": 0.0,
    }  # fmt: skip
