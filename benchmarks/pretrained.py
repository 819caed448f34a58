"""A pretrained model of 135M parameters: full paths and RPO for the same time, on word problems made here.

    python benchmarks/pretrained.py --model SmolLM2-135M-Instruct [--minutes 60]

Both runs begin with the same policy and end after so many minutes of training (evaluation not counted).
pass@1 on held-out problems, before and after, greedy and sampled, goes to docs/pretrained.md. A killed one
goes on with the same command.
"""
from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402

TRAIN, TEST = 2000, 300
INSTRUCTION = "Think step by step in short sentences. End with: The answer is \\boxed{number}."
COMMON = ["--instruction-role", "user", "--instruction", INSTRUCTION]
TRAINING = ["--max-prompt", "160", "--max-response", "160", "--problems-per-step", "8", "--group-size", "8",
            "--dynamic-rounds", "1", "--temperature", "0.7", "--lr", "1e-5", "--warmup-steps", "5",
            "--weight-decay", "0", "--steps", "100000", "--eval-every", "0", "--save-every", "5",
            "--cache-init-chunk", "64", "--no-gradient-checkpointing", "--overlong-penalty", "0"]
WAYS = {"full": ["--rollout", "full"], "rpo": ["--max-cut", "0.3", "--length-reward", "0"]}
NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "stamps")


def make_problem(rng: random.Random) -> dict[str, str]:
    """Two steps: one addition or subtraction, then another, or a product, then a subtraction."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a, b, c = rng.randint(5, 30), rng.randint(2, 20), rng.randint(2, 5)
    total, first = rng.choice([
        (a + b, f"{name} has {a} {thing}. {other} gives {name} {b} more."),
        (a * c, f"{name} has {c} boxes with {a} {thing} each."),
        (a + b, f"{name} finds {a} {thing} in the morning and {b} in the evening."),
        (c * b, f"{name} buys {b} {thing} a day for {c} days.")])
    d = rng.randint(1, total - 1)
    result, second = rng.choice([
        (total - d, f"Then {name} gives away {d} {thing}. How many {thing} does {name} have left?"),
        (total + d, f"Then {name} gets {d} more. How many {thing} does {name} have now?"),
        (total - d, f"{d} of them are lost. How many {thing} are left?")])
    return {"problem": f"{first} {second}", "answer": str(result)}


def write_problems(folder: Path) -> None:
    rng, seen = random.Random(0), {}
    while len(seen) < TRAIN + TEST:
        problem = make_problem(rng)
        seen[problem["problem"]] = json.dumps(problem)
    lines = list(seen.values())
    for name, part in (("train", lines[:TRAIN]), ("test", lines[TRAIN:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")


def evaluate(policy: Path, folder: Path, name: str) -> dict[str, dict]:
    """Greedy, and four samples at the temperature of the training; figures of both."""
    results = {}
    for way, samples, temperature in (("greedy", 1, 0), ("sampled", 4, 0.7)):
        out = folder / f"eval-{name}-{way}"
        subprocess.run([
            sys.executable, "eval.py", "--model", str(policy), "--data", str(folder / "test.jsonl"), "--out",
            str(out), "--samples", str(samples), "--temperature", str(temperature), "--max-response", "160",
            *COMMON], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (results[way],) = json.loads((out / "results.json").read_text())["results"].values()
    return results


def train(model: Path, folder: Path, way: str, minutes: float) -> dict[str, float]:
    """train.py until it has trained for so long; its last metrics."""
    out = folder / way
    log = out / "metrics.jsonl"

    def last() -> dict[str, float]:
        lines = log.read_text().splitlines() if log.exists() else []
        return json.loads(lines[-1]) if lines else {"time/total_s": 0.0}

    if last()["time/total_s"] < 60 * minutes:
        with open(folder / f"{way}.log", "a") as output:
            process = subprocess.Popen([
                sys.executable, "train.py", "--model", str(model), "--data", str(folder / "train.jsonl"),
                "--out", str(out), *COMMON, *TRAINING, *WAYS[way]], cwd=ROOT, stdout=output, stderr=output)
            while process.poll() is None and last()["time/total_s"] < 60 * minutes:
                time.sleep(1)
            process.send_signal(signal.SIGTERM)  # ends after the step in hand, with a checkpoint
            if process.wait() != 130:
                sys.exit(f"train.py failed: see {folder / way}.log")
    return last()


def cell(figures: dict) -> str:
    return f"{figures['avg']:.3f} ({figures['avg_low']:.3f}-{figures['avg_high']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "pretrained")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder)
    model = data.find_model(args.model)
    rows = [("before", {}, evaluate(model, folder, "before"))]
    for way in WAYS:
        metrics = train(model, folder, way, args.minutes)
        rows.append((way, metrics, evaluate(folder / way / "policy", folder, f"{way}-{metrics['step']}")))
    head = ("policy", "greedy pass@1", "avg@4, temperature 0.7", "mean length", "steps", "tokens generated",
            "minutes")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, metrics, figures in rows:
        done = f"{metrics['step']} | {metrics['tokens/generated']:,} | {metrics['time/total_s'] / 60:.0f}" \
            if metrics else "| |"
        lines.append(f"| {name} | {cell(figures['greedy'])} | {cell(figures['sampled'])} | "
                     f"{figures['sampled']['length']:.0f} | {done} |")
    (ROOT / "docs" / "pretrained.md").write_text(
        f"# Two-step word problems with {Path(args.model).name}\n\nWritten by `python "
        f"benchmarks/pretrained.py --minutes {args.minutes:g}`; {TEST} held-out problems, 95 % intervals by "
        "bootstrap over them.\n\n"
        + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
