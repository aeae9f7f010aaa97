"""The study of the README: every variant of the method on the toy world, over seeds. Trains what is not there yet, one
process per core, then writes the table and the figure of all that is there. Killed, it goes on where it was.

    python .ci/study.py                  # 2 SFT seeds x 5 RL seeds x 12 variants, about 4 minutes of a core each
    python .ci/study.py --seeds 0        # table and figure of what is there
"""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).parent.parent / "axpo.py"
ARMS = {  # name in the table: (options, Pass@1 / Pass@4 of the paper's 8B, the mean of four benchmarks)
    "GRPO": ("--algo grpo", "51.9 / 68.3"),
    "AXPO": ("", "53.9 / 70.2"),
    "GRPO, 10 rollouts (as many as AXPO)": ("--algo grpo --rollouts_per_question 10", ""),
    "GRPO, 16 rollouts (2N)": ("--algo grpo --rollouts_per_question 16", "52.4 / 68.2"),
    "AXPO, rank by confidence": ("--rank confidence", ""),
    "AXPO, random rank": ("--rank random", "51.0 / 65.8"),
    "AXPO without prefix credit": ("--ablate prefix_credit", "51.4 / 67.7"),
    "AXPO without prefix fixing": ("--ablate prefix_fix", "52.1 / 69.1"),
    "AXPO, continuations in the source's group": ("--ablate separate_group", "51.2 / 67.0"),
    "AXPO where rollouts without a tool fail": ("--ablate no_tool", "51.7 / 65.9"),
    "GRPO, tool bonus": ("--algo grpo --ablate tool_bonus", "50.8 / 65.6"),
    "GRPO, tool penalty": ("--algo grpo --ablate tool_penalty", "46.0 / 59.1"),
}
# Student's t for a 95 % interval, by degrees of freedom.
T95 = [math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]
COLUMNS = {"Pass@1": "{:.1%}", "Pass@4": "{:.1%}", "tool use": "{:.1%}", "all-wrong": "{:.0%}", "recovery": "{:.0%}",
           "tokens (M)": "{:.2f}", "minutes": "{:.1f}"}  # fmt: skip


def run(folder: Path, name: str, model: str | Path, options: str) -> None:
    """One run of the program, unless it is done."""
    if (folder / name / "results.json").exists():
        return
    command = [sys.executable, PROGRAM, "--output_dir", folder, "--name", name, "--model", model, *options.split()]
    command += ["--data", "toy", "--threads", "1", "--eval_every", "0"]
    with open(folder / f"{name}.log", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    print(f"{name}: {'done' if code == 0 else f'failed, see {name}.log'}", flush=True)


def measured(folder: Path) -> list[float]:
    """The columns of one run: three of the held-out problems, one of its last 20 steps, three of all steps."""
    final = json.loads((folder / "results.json").read_text())[-1]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = list({row["step"]: row for row in rows if row["stage"] == "rl"}.values())
    wrong = [row["all_wrong"] for row in steps[-20:] if row["all_wrong"] is not None]
    recovery = [row["recovery"] for row in steps if row["recovery"] is not None and row["prefixes"]]
    tokens = sum(row["tokens"] for row in steps) / 1e6
    phases = ("rollout_seconds", "resample_seconds", "update_seconds")
    minutes = sum(row.get(phase) or 0 for row in steps for phase in phases) / 60
    mean = lambda values: float(np.mean(values)) if values else math.nan  # noqa: E731
    return [final["pass@1"], final["pass@4"], final["tool_use"], mean(wrong), mean(recovery), tokens, minutes]


def summarise(folder: Path, figure: Path) -> None:
    """Table to the screen, figure to a file."""
    from matplotlib.figure import Figure

    print("\n| | runs |", " | ".join(COLUMNS), "| the paper |\n|" + "---|" * (3 + len(COLUMNS)))
    shown = []
    for number, (arm, (_, paper)) in enumerate(ARMS.items()):
        runs = sorted(path.parent for path in folder.glob(f"arm{number}-*/results.json"))
        if not runs:
            continue
        values, n = np.array([measured(path) for path in runs]), len(runs)
        means = values.mean(0)  # of what a run lacks: nan
        half = T95[min(n - 1, 10)] * values.std(0, ddof=min(1, n - 1)) / n**0.5
        cells = []
        for i, (form, value) in enumerate(zip(COLUMNS.values(), means)):
            interval = f" ± {100 * half[i]:.1f}" if i < 3 and n > 1 else ""
            cells.append("-" if math.isnan(value) else form.format(value) + interval)
        print(f"| {arm} | {n} |", " | ".join(cells), f"| {paper} |")
        shown.append((arm, values[:, :3], means, half))
    plot = Figure(figsize=(11, 0.45 * len(shown) + 1), layout="constrained")
    for axis, column in zip(plot.subplots(1, 3, sharey=True), range(3)):
        for row, (_, values, means, half) in enumerate(reversed(shown)):
            axis.plot(100 * values[:, column], [row] * len(values), "o", color="0.75", markersize=4)
            axis.errorbar(100 * means[column], row, xerr=100 * half[column], fmt="o", color="C0", capsize=3)
        axis.set(title=f"{list(COLUMNS)[column]} (%)", yticks=range(len(shown)))
        axis.set_yticklabels([arm for arm, *_ in reversed(shown)])
        axis.set_xlim(-3, 103)
        axis.grid(axis="x", color="0.9")
    figure.parent.mkdir(exist_ok=True)
    plot.savefig(figure, dpi=110)
    print(f"\nfigure: {figure}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=5, help="RL seeds of each variant and SFT checkpoint")
    parser.add_argument("--sft_seeds", type=int, default=2, help="SFT checkpoints")
    parser.add_argument("--figure", type=Path, default=PROGRAM.parent / "assets" / "study.png")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as cores:
        list(cores.map(lambda s: run(args.runs, f"sft-{s}", "toy", f"--stage sft --seed {s}"), range(args.sft_seeds)))
        jobs = []
        for seed in range(args.seeds):  # every variant has its first run before any has its second
            for sft in range(args.sft_seeds):
                for number, (options, _) in enumerate(ARMS.values()):
                    start = args.runs / f"sft-{sft}" / "sft"
                    jobs.append((f"arm{number}-sft{sft}-seed{seed}", start, f"--stage rl --seed {seed} {options}"))
        list(cores.map(lambda job: run(args.runs, *job), jobs))
    summarise(args.runs, args.figure)


if __name__ == "__main__":
    main()
