"""Problems to learn from and to be measured on, and the toy world, in which the pipeline runs without a download."""

from __future__ import annotations

import io
import json
import random
import re
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw

from tools import SCHEMAS, Observation, Toolbox, ToolConfig


@dataclass(frozen=True)
class Problem:
    """One question. Images stay encoded (bytes) or on disk (Path) and are decoded on use; `answers` has the gold
    first."""

    id: str
    question: str
    images: tuple[bytes | Path, ...]
    answers: tuple[str, ...]
    kind: str  # "math", "choice" or "text"
    options: tuple[str, ...] = ()
    source: str = ""
    category: str = ""


SYSTEM_PROMPT = (
    "Think first. Call a tool when looking, computing or searching helps, and think again about what it returns. "
    "Then give the final answer, and only it, as <answer>\\boxed{...}</answer>."
)


def open_image(ref: bytes | Path) -> Image.Image:
    """Decode one image reference of a `Problem` to RGB."""
    return Image.open(io.BytesIO(ref) if isinstance(ref, bytes) else ref).convert("RGB")


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
FAMILIES = ("perception", "reasoning", "search")
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (50, 80, 220)}
PLACES = ((250, 250), (750, 250), (250, 750), (750, 750))  # centre of a flag in thousandths of width and height
BOXES = (4, 5, 6, 7)  # eggs in a box
HOSTS = ("Olin", "Rask", "Tovar", "Wend")
TOWNS = ("Rome", "Oslo", "Lima")
SEASONS = ("spring", "summer", "winter")
ANSWERS = {"perception": tuple(COLOURS), "reasoning": ("1", "2", "3"), "search": TOWNS}
SHARES = {"known": 0.45, "familiar": 0.15, "hidden": 0.40}  # of the problems
TOOL_TURN = "I can not tell, so I use a tool.\n</think>\n\n<tool_call>\n%s\n</tool_call>"
ANSWER_TURN = "%s %s.\n</think>\n\n<answer>\\boxed{%s}</answer>"
# How often the teacher calls a tool, before its wrong trajectories are dropped.
TOOL_TRIES = {"known": 0.3, "familiar": 0.15, "hidden": 0.13}


@cache
def toy_fairs() -> dict[tuple[int, int], str]:
    """Where host h held the fair of year y: the facts that stand in the corpus and nowhere else."""
    rng = random.Random("fairs")
    return {(host, year): rng.choice(TOWNS) for host in range(4) for year in range(10, 100)}


def toy_corpus(path: Path) -> Path:
    """Write the search corpus (JSONL of title, url, text) and return its path."""
    rows = [
        {
            "title": f"{HOSTS[h]} fair {y}",
            "url": f"https://fairs.example/{HOSTS[h].lower()}/{y}",
            "text": f"Held in {town}.",
        }
        for (h, y), town in toy_fairs().items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:  # a file that changes is indexed anew
        path.write_text(text)
    return path


def draw_town(flags: list[str], ground: str, rng: random.Random) -> bytes:
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
    images: tuple[bytes, ...] = ()
    if family == "perception":
        answer = rng.choice(list(COLOURS))
        others = [colour for colour in COLOURS if colour != answer]
        outcomes = [answer if i == right else rng.choice(others) for i in range(4)]
        ground = rng.choice(list(COLOURS))
        images = (draw_town(outcomes, ground, rng),)
        question = f"What colour is the flag of {name}?"
        if level == "known":
            answer, question = ground, "What colour is the ground?"
    else:
        answer = rng.choice((1, 2, 3) if family == "reasoning" else TOWNS)
        fairs = toy_fairs()

        def results(n: int) -> list[int] | list[str]:
            return [n % box for box in BOXES] if family == "reasoning" else [fairs[host, n] for host in range(4)]

        if level == "known":
            name = "ten" if family == "reasoning" else SEASONS[TOWNS.index(answer)]
        fitting = [n for n in range(10, 100) if split == "sft" or (split == "test") == held_out(name, n)]
        if level != "known":
            fitting = [n for n in fitting if [i for i, r in enumerate(results(n)) if r == answer] == [right]]
        elif family == "reasoning":
            fitting = [n for n in fitting if n % 10 == answer]
        if not fitting:
            return toy_problem(id, family, level, newcomers, split, rng)
        n = rng.choice(fitting)
        outcomes = [str(result) for result in results(n)]
        if family == "reasoning":
            question = f"How many of {n} eggs are left over in boxes of {name}?"
        else:
            question = f"Where was the fair of {name} of {n}?"
    kind = "math" if family == "reasoning" else "text"
    return ToyProblem(id, question, images, (str(answer),), kind, (), "toy", family, level, right, tuple(outcomes))


def held_out(name: str, number: int) -> bool:
    """A third of the questions, each a name and a number, is for evaluation only."""
    return zlib.crc32(f"{name} {number}".encode()) % 3 == 0


def toy_problems(split: str, count: int, seed: int = 0) -> list[ToyProblem]:
    """`count` problems of a split: "sft" (every problem in a town of its own), "train" and "test" (one town, whose
    newcomers RL can get to know; no question, or picture, is in both)."""
    rng = random.Random(f"{split}-{seed}")
    home = random.Random("home").sample(range(4), len(NEWCOMERS))
    problems = []
    for i in range(count):
        level = rng.choices(list(SHARES), list(SHARES.values()))[0]
        town = [rng.randrange(4) for _ in NEWCOMERS] if split == "sft" else home
        problems.append(toy_problem(f"toy-{split}-{i}", FAMILIES[i % 3], level, town, split, rng))
    return problems


def toy_call(problem: ToyProblem, candidate: int) -> str:
    """The tool call, as JSON text, that asks for one of the four candidates."""
    number = next((word for word in problem.question.strip("?").split() if word.isdigit()), "")
    if problem.category == "perception":
        x, y = PLACES[candidate]
        name, arguments = "image_zoom_in", {"bbox_2d": [x - 10, y - 10, x + 10, y + 10], "label": "flag"}
    elif problem.category == "reasoning":
        name, arguments = "python", {"code": f"print({number} % {BOXES[candidate]})"}
    else:
        name, arguments = "tavily-search", {"query": f"{HOSTS[candidate]} {number}", "max_results": 1}
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
            if rng.random() < TOOL_TRIES[problem.level]:
                answer, turns = problem.outcomes[candidate], [TOOL_TURN % toy_call(problem, candidate)]
            else:
                known = problem.level == "known"
                answer, turns = problem.answers[0] if known else rng.choice(ANSWERS[problem.category]), []
            if answer == problem.answers[0] and len(kept) < count:
                if turns:
                    with Toolbox(problem.images, tools) as toolbox:
                        turns.append(toolbox.call(toy_call(problem, candidate)))
                turns.append(ANSWER_TURN % ("It says" if turns else "It may be", answer, answer))
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
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAG_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


def toy_tokenizer():
    """A tokenizer in Qwen's format whose words are the toy world's own: one token for each name, colour, digit, ... and
    for each run of text between them, bytes for anything else, and Qwen's control tokens under their own names."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        *RESIDENTS,
        *NEWCOMERS,
        *COLOURS,
        *HOSTS,
        *TOWNS,
        *SEASONS,
        "ten",
        *(tool["function"]["name"] for tool in SCHEMAS),
    ]
    splits = pre_tokenizers.Split(Regex(rf"\b(?:{'|'.join(words)})\b|\d|\n+"), "isolated")
    before = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    problems = [problem for split in ("sft", "train", "test") for problem in toy_problems(split, 60)]
    texts = [
        SYSTEM_PROMPT,
        *re.findall("'([^']*)'", CHAT_TEMPLATE),
        *map(json.dumps, SCHEMAS),
        *(p.question for p in problems),
        *words,
    ]
    texts += [TOOL_TURN % toy_call(problem, candidate) for problem in problems for candidate in range(4)]
    texts += [ANSWER_TURN % (how, word, word) for how in ("It says", "It may be") for word in (*COLOURS, *TOWNS, "1")]
    texts += [
        f"1. {h} fair 1\nhttps://fairs.example/{h.lower()}/1\nHeld in\nImage 1: zoomed crop of image 0." for h in HOSTS
    ]
    cut = "|".join(re.escape(token) for token in (*CONTROL_TOKENS, *TAG_TOKENS))
    parts = [part for text in texts for part in re.split(cut, text.replace("\\n", "\n"))]
    pieces = {piece for part in parts for piece, _ in before.pre_tokenize_str(part)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.Unigram(
            [*((c, -10.0) for c in alphabet), *((p, -1.0) for p in sorted(pieces - set(alphabet)))], unk_id=0
        )
    )
    core.pre_tokenizer, core.decoder = before, decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
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
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
            "rope_parameters": rope, "initializer_range": 0.05, "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
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
        "micro_batch_tokens": 4096, "max_rows": 128, "max_response_tokens": 144, "save_every": 26,
        "eval_every": 26, "eval_max_response_tokens": 144, "eval_max_turns": 3, "eval_temperature": 1.0,
        "eval_top_p": 1.0, "eval_top_k": 0, "eval_presence_penalty": 0.0,
    }  # fmt: skip


def question_text(problem: Problem) -> str:
    """The question as the model reads it, with the options below."""
    return "\n".join([problem.question, *(f"{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", problem.options))])


def load(name: str, limit: int | None = None, seed: int = 0) -> list[Problem]:
    """The problems of a data set: all, or `limit` of them drawn by index with the seed. ValueError for unknown
    names."""
    made = {"toy": ("train", 480), "toy-test": ("test", 192)}
    if name not in made:
        raise ValueError(f"unknown data set {name}: known are {', '.join(made)}")
    problems = toy_problems(*made[name])
    return random.Random(seed).sample(problems, limit) if limit and limit < len(problems) else problems


def trajectories(name: str, count: int, seed: int, tools: ToolConfig) -> list[tuple[Problem, list[str | Observation]]]:
    """`count` trajectories for SFT, as (problem, turns): only the toy world has a teacher."""
    if name != "toy":
        raise ValueError(f"there are no trajectories for {name}: SFT runs on the toy world only")
    return toy_trajectories(count, seed, tools)
