"""How fast it is: run `pytest .ci/bench.py -s`, with TRL installed too if it is to be compared. Every number is a ratio
to what takes turns with it in the same run, in seconds and in CPU seconds of this thread, which other programs on the
machine, and waits for a tool, disturb less."""

import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import axpo
import data
from axpo import Sampling
from test_axpo import padded_logps, parsed, plain_model, rolled_out, siblings, told, trl_trainer
from tools import Toolbox


def now():
    """Seconds and CPU seconds."""
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    return np.array([time.perf_counter(), time.thread_time()])


def race(title, contenders, rounds, target="none"):
    """Let the contenders {name: function} take turns, after one round to warm up."""
    seconds = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, work in contenders.items():
            began = now()
            work()
            seconds[name].append(now() - began)
    report(title, seconds, target)


def report(title, seconds, target="none"):
    """Each contender's median of [seconds, CPU seconds] and their ratios to the first one's, round by round, but for
    the first round."""
    print(f"\n{title} (target: {target}), load {os.getloadavg()[0]:.1f}")
    first = np.array(next(iter(seconds.values()))[1:])
    for name, own in seconds.items():
        own = np.array(own[1:])
        for unit, x, ratios in zip(("s", "CPU s"), own.T, np.sort(own / first, axis=0).T):
            print(f"  {name:<24}{np.median(x):8.3f} {unit:<6}", end="")
            print(f"{np.median(ratios):6.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def longer(problem, words):
    """The toy's prompts have 81 tokens, as its vocabulary holds whole sentences. 142 words make them 365, which is what
    a plain question and the tools' schemas take in Qwen's."""
    return replace(problem, question=" Mira" * words + problem.question)


def endless(policy):
    """It can neither end a turn nor call a tool: every rollout is as long as allowed."""
    policy.bias[[*policy.eos, policy.call_open]] = -math.inf
    return policy


@pytest.fixture(scope="module")
def bench_cfg(tmp_path_factory):
    return parsed("--output_dir", tmp_path_factory.mktemp("bench"), "--sft_steps 200 --sft_batch 48")


@pytest.fixture(scope="module")
def practised(bench_cfg):
    """A checkpoint that calls tools: AXPO_BENCH_MODEL, or the toy after SFT, behind short and long prompts."""
    if path := os.environ.get("AXPO_BENCH_MODEL"):
        return path
    folder, pairs = Path(bench_cfg.output_dir) / "practised", data.toy_trajectories(bench_cfg, 0, 1200)
    pairs = [(longer(problem, 142 * (i % 3 == 0)), turns) for i, (problem, turns) in enumerate(pairs)]
    axpo.train_sft(axpo.load_policy("toy", bench_cfg), pairs, bench_cfg, axpo.Run(folder, bench_cfg, 0))
    return str(folder / "sft")


def generate_again(model, policy, rollouts, cfg):
    """Finished rollouts once more, in the way of trainers that build on `generate`: turn by turn, one call over all
    rows that have the turn, left-padded, everything before it encoded anew; then the tools, on as many threads. A
    logits processor dictates the same tokens."""
    boxes = {r: Toolbox(r.problem.images, cfg) for r in rollouts}
    with ThreadPoolExecutor(8) as pool:
        for turn in range(max(r.turns for r in rollouts)):
            rows = [r for r in rollouts if r.turns > turn]
            spans = [np.flatnonzero(np.diff([0, *r.sampled, 0]))[2 * turn : 2 * turn + 2] for r in rows]  # of the turn
            inputs = told(model, [r.fork(start, ()) for r, (start, _) in zip(rows, spans)], "left")
            said = [torch.tensor([*r.ids[start : end - 1], policy.end]) for r, (start, end) in zip(rows, spans)]
            script, width = torch.nn.utils.rnn.pad_sequence(said, True, policy.end), inputs["input_ids"].shape[1]

            def dictate(ids, scores, script=script, width=width):
                return torch.full_like(scores, -math.inf).scatter(1, script[:, ids.shape[1] - width, None], 0.0)

            out = model.generate(
                **inputs, max_new_tokens=script.shape[1], do_sample=True, top_k=0, top_p=1.0, pad_token_id=policy.end,
                eos_token_id=policy.end, logits_processor=[dictate],
            )  # fmt: skip
            assert torch.equal(out[:, width:], script)
            called = [r for r in rows if r.turns - 1 > turn]
            calls = [policy.tokenizer.decode(r.ids[r.calls[turn].start : r.calls[turn].end - 1]) for r in called]
            for observation in pool.map(lambda r, call: boxes[r].call(call), called, calls):
                [policy.encode_image(image) for image in observation.images]
    for box in boxes.values():
        box.close()


@pytest.mark.parametrize("words, equal, target", [(0, False, "3 x"), (142, False, "3 x"), (0, True, "")])
def test_bench_rollouts_against_generate(practised, bench_cfg, words, equal, target):
    """Equally long, and without tools, is the case best for generate: what is left is prefill and the decode step."""
    policy, model = axpo.load_policy(practised, bench_cfg, False), plain_model(practised)
    problems = [longer(problem, words) for problem in data.load("toy", 8 if equal else 16)]
    first = siblings(endless(policy) if equal else policy, problems, 8)

    def engine():
        rollouts = [r.parent.fork(r.prompt_len, r.seed) for r in first]
        return rolled_out(axpo.Engine(policy, Sampling(1.0, max_response_tokens=144), bench_cfg), rollouts)

    ways = {"engine": engine, "generate": partial(generate_again, model, policy, engine(), bench_cfg)}
    race(f"{len(first)} {'equal ' * equal}rollouts, {first[0].prompt_len}-token prompts", ways, 5, target)


def rl_step(name, cfg, problems, change=lambda policy: policy):
    """A function that takes one RL step after the other with a vanishing learning rate, so that all are alike."""
    policy, reference, steps = change(axpo.load_policy(name, cfg)), axpo.load_policy(name, cfg, False), iter(range(999))
    optimizer = axpo.make_optimizer(policy)
    axpo.set_lr(optimizer, 1e-9, 1, 1, 999)

    def step():
        batch = axpo.axpo_batch(problems, policy, cfg, next(steps))
        axpo.update(policy, reference, optimizer, batch.streams, len(problems) * cfg.rollouts_per_question, cfg)
        rollouts = [*sum(batch.groups.values(), []), *(c for r in batch.resamples for c in r.continuations)]
        tokens = sum(len(r.ids) - r.parent_len for r in rollouts)
        step.made.append((tokens, np.mean([r.reward for r in rollouts]), len(batch.resamples)))

    step.made = []  # response tokens, observations included; mean reward; resampled prefixes
    return step


@pytest.mark.parametrize("turns, words, target", [(1, 0, "2 x"), (3, 0, "2.5 x"), (3, 142, "4 x")])
def test_bench_grpo_step_against_trl(practised, bench_cfg, turns, words, target):
    trl = pytest.importorskip("trl")
    from transformers import TrainerCallback

    problems = [longer(p, words) for p in data.load("toy", 48) if not p.images][:16]
    cfg, seconds = replace(bench_cfg, algo="grpo", max_turns=turns), {"axpo": [], "trl": []}
    policy, ours = axpo.load_policy(practised, cfg, False), rl_step(practised, cfg, problems)

    class Alternate(TrainerCallback):
        """TRL's step, then ours."""

        def on_step_begin(self, *_, **__):
            self.began = now()

        def on_step_end(self, *_, **__):
            between = now()
            ours()
            seconds["trl"].append(between - self.began)
            seconds["axpo"].append(now() - between)

    sizes = {"max_steps": 6, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 8}
    theirs, made = trl_trainer(trl.GRPOTrainer, plain_model(practised), policy, problems, cfg, **sizes)
    theirs.add_callback(Alternate())
    theirs.train()
    length = len(policy.prompt(problems[0]).ids)
    report(f"GRPO step against TRL's GRPOTrainer, {turns} turns at most, {length}-token prompts", seconds, target)
    print("  tokens, reward, prefixes of a step: axpo", *np.mean(ours.made, 0), "trl", *np.mean(made, 0))


def test_bench_axpo_step_against_grpo(practised, bench_cfg):
    some = {"grpo": {"algo": "grpo"}, "axpo": {}, "grpo, 2 N": {"algo": "grpo", "rollouts_per_question": 16}}
    steps = {name: rl_step(practised, replace(bench_cfg, **x), data.load("toy", 16)) for name, x in some.items()}
    race(f"AXPO step, {bench_cfg.prefix_budget(16)} prefixes at most, against GRPO", steps, 6, "at most 1.25 x")
    print("  tokens, reward, prefixes of a step:", *((name, *np.mean(step.made, 0)) for name, step in steps.items()))


def test_bench_update_on_a_tree_against_padded_rows(practised, bench_cfg, monkeypatch):
    """All of an update, but log-probs come from rows alike in length through transformers' own forward."""

    def by_length(streams, tokens):
        batches = [[]]
        for stream in sorted(streams, key=lambda s: s.end):
            batches += [[]] * ((len(batches[-1]) + 1) * stream.end > tokens)
            batches[-1] = [*batches[-1], stream]
        return batches

    def contender(trained, frozen, *way):
        optimizer, trained.skipped = torch.optim.AdamW(trained.parameters(), 1e-9), 0

        def work():
            for name, function in zip(("stream_logps", "micro_batches"), way):
                monkeypatch.setattr(axpo, name, function)
            norms.append(axpo.update(trained, frozen, optimizer, streams, 128, bench_cfg)["grad_norm"])

        return work

    policy, reference, norms = axpo.load_policy(practised, bench_cfg), axpo.load_policy(practised, bench_cfg, False), []
    streams = axpo.axpo_batch(data.load("toy", 16), policy, bench_cfg, 0).streams
    tree = contender(policy, reference, axpo.stream_logps, axpo.micro_batches)
    rows = contender(plain_model(practised), plain_model(practised), partial(padded_logps, bias=policy.bias), by_length)
    race(f"Update on {len(streams)} streams", {"tree of segments": tree, "padded rows": rows}, 5)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-3)


def test_bench_cost_grows_in_proportion(bench_cfg):
    """Four times the rollouts, four times the length: at most four times the seconds, but for attention."""
    steps = {}
    for name, count, tokens in (("once", 4, 48), ("4 times the rollouts", 16, 48), ("4 times the tokens", 4, 192)):
        cfg = replace(bench_cfg, algo="grpo", max_response_tokens=tokens)
        steps[name] = rl_step("toy", cfg, data.load("toy", count), endless)
    race("A step of 4 x 8 rollouts of 48 tokens grows", steps, 3, "at most 4 x")
