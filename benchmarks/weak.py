"""A mostly wrong policy whose mistakes can cancel: full paths and RPO for the same number of seconds.

    python benchmarks/weak.py [--seconds 300] [--seeds 3]     # 35 minutes on two cores

A small policy like that of tiny/ first learns worked sums in which some lines are wrong by ten. Some of these
mistakes are its likeliest line, and two of them can make up for each other. From there every run of WAYS goes
on, each on one core, for so many seconds. Some of its checkpoints are evaluated by sampling. Runs are in
--folder; a killed call goes on with the same command. Writes docs/weak.md."""
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import (DOCS, ROOT, checkpoints_at, evaluate, head, machine, parser, row, run_folder, train_until,
                    write_page)

import numpy as np

sys.path.append(str(ROOT / "tiny"))
import make  # noqa: E402

SLIP, HARD = 0.05, frozenset(random.Random(7).sample(range(100), 20))
TRAIN, TEST, EVERY = 512, 1024, 3  # problems; steps between checkpoints
TRAINING = ["--problems-per-step", 16, "--group-size", 8, "--max-prompt", 128, "--max-response", 192,
            "--max-cut", 0.5, "--dynamic-rounds", 2, "--length-reward", 0, "--overlong-penalty", 0,
            "--lr", 3e-5, "--warmup-steps", 5, "--weight-decay", 0, "--steps", 100000, "--eval-every", 0,
            "--save-every", EVERY, "--keep-checkpoints", 1000, "--cache-init-chunk", 64,
            "--no-gradient-checkpointing"]
WAYS = {"full paths": ["--rollout", "full"], "RPO": ["--rollout", "rpo"]}
MARKS = (0.1, 0.25, 0.5, 1.0)  # of what full paths use
POINTS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # of --seconds: when a run is evaluated


def counting(rng: random.Random, slip: float = 0.0) -> dict[str, str]:
    """A shorter problem of the kind of tiny/make.py. slip: chance that a line is wrong by ten; where the
    number before ends in one of HARD, more often than not."""
    count, addends = rng.randint(8, 12), rng.sample(range(2, 6), 2)
    start = value = rng.randint(250, 900 - 5 * count)
    lines = []
    for left in range(count, 0, -1):
        addend = addends[(count - left) % 2]
        total = value + addend
        if slip:
            chances = [0.35, 0.45, 0.2] if value % 100 in HARD else [1 - slip, slip / 2, slip / 2]
            total += rng.choices([0, 10, -10], chances)[0]
        lines.append(f"{left}:{value}+{addend}={total}")
        value = total
    question = f"Count down to 1, adding {addends[0]} and {addends[1]} in turn, from {count}:{start}"
    return {"problem": question, "answer": str(value), "solution": "\n".join([*lines, f"\\boxed{{{value}}}"])}


def start_policy(folder: Path) -> Path:
    out = folder / "start"
    if not (out / "model.safetensors").exists():
        make.make_problem = counting  # what make.py's problems are drawn by
        make.main(["--out", str(out), "--slip", str(SLIP), "--train", str(TRAIN), "--test", str(TEST)])
    return out


def curve(way: str, seed: int, start: Path, folder: Path, seconds: float) -> list[dict]:
    """Train, then evaluate the checkpoints nearest to POINTS: [{"step", "tokens", "seconds", "pass@1"}]."""
    out = run_folder(way, seed, folder)
    train_until(out, seconds, "--model", start, "--seed", seed, *TRAINING, *WAYS[way])
    points = [{"step": line["step"], "tokens": line["tokens/generated"], "seconds": line["time/total_s"],
               "pass@1": sampled(policy, start, Path(f"{out}-eval") / str(line["step"]))}
              for policy, line in checkpoints_at(out, [x * seconds for x in POINTS])]
    (folder / f"{out.name}.json").write_text(json.dumps(points))
    return points


def sampled(policy: Path, start: Path, out: Path) -> float:
    out.parent.mkdir(parents=True, exist_ok=True)
    return evaluate(policy, start / "test.jsonl", out, "--max-response", 192, "--temperature", 1)["avg"]


def at(points: list[dict], axis: str, value: float, first: float) -> float:
    """pass@1 when so many tokens or seconds were spent; after its last point a run stays where it is."""
    return float(np.interp(value, [0, *(p[axis] for p in points)], [first, *(p["pass@1"] for p in points)]))


def write(first: float, curves: dict[str, list[list[dict]]], seconds: float) -> str:
    """docs/weak.md. curves: by way, one per seed."""
    base, lines = next(iter(curves.values())), []
    for axis in ("tokens", "seconds"):
        end = float(np.mean([points[-1][axis] for points in base]))
        lines += ["", f"At equal {axis} ({end:,.0f} at the end of full paths):", "",
                  head("way", *(f"{mark:.0%}" for mark in MARKS), "worst against full paths from 10 % on")]
        grid = np.linspace(0.1, 1, 37)
        for way, seeds in curves.items():
            ours = [[at(points, axis, end * x, first) for x in grid] for points in seeds]
            full = [[at(points, axis, end * x, first) for x in grid] for points in base[:len(seeds)]]
            gap = np.mean(ours, 0) - np.mean(full, 0)
            values = [np.mean([at(points, axis, end * mark, first) for points in seeds]) for mark in MARKS]
            lines.append(row(f"{way} ({len(seeds)} seeds)", *(f"{x:.3f}" for x in values),
                             f"{100 * gap.min():+.1f} points at {grid[gap.argmin()]:.0%}"))
    target = np.mean([points[-1]["pass@1"] for points in base]) - 0.01
    lines += ["", f"Until the mean curve reaches full paths' last pass@1 less a point ({target:.3f}):", ""]
    for way, seeds in curves.items():
        reached = [next((f"{x:,.0f} {axis}" for x in np.linspace(0, end, 400) if np.mean(
            [at(points, axis, x, first) for points in seeds]) >= target), f"not reached ({axis})")
            for axis in ("seconds", "tokens")
            for end in [max(points[-1][axis] for points in (*seeds, *base))]]
        lines.append(f"- {way}: {', '.join(reached)}")
    text = (f"# A mostly wrong policy whose mistakes can cancel\n\nWritten by `python benchmarks/weak.py "
            f"--seconds {seconds:g}` ({machine()}, one core a run): {TRAIN} problems to train on, {TEST} "
            f"held out, pass@1 by sampling at temperature 1, {first:.3f} before training.\n"
            + "\n".join(lines) + "\n")
    write_page(DOCS / "weak.md", text)
    return text


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--seconds", type=float, default=300)
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--folder", type=Path, default=ROOT / "runs" / "weak")
    args = command.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start = start_policy(folder)
    first, text = sampled(start, start, folder / "start-eval"), ""
    print(f"before: pass@1 {first:.3f}", flush=True)
    curves: dict[str, list[list[dict]]] = {way: [] for way in WAYS}
    with ThreadPoolExecutor(2) as pool:
        todo = [(way, seed) for seed in range(args.seeds) for way in WAYS]
        runs = pool.map(lambda x: curve(*x, start, folder, args.seconds), todo)
        for (way, seed), points in zip(todo, runs):
            curves[way].append(points)
            last = points[-1]
            print(f"{way}, seed {seed}: step {last['step']}, pass@1 {last['pass@1']:.3f}", flush=True)
            if len({len(seeds) for seeds in curves.values()}) == 1:  # what is there so far
                text = write(first, curves, args.seconds)
    print(text)


if __name__ == "__main__":
    main()
