"""A pretrained model of 135M parameters: full paths and RPO for as many minutes, on chain sums made here.

    python benchmarks/pretrained.py --model SmolLM2-135M-Instruct [--minutes 60]

The model first learns from a few hundred worked sums how to write one down. From this policy every run goes on,
two at a time and one core each, until it has trained for so many minutes. pass@1 on held-out problems goes to
docs/pretrained.md. A killed call goes on with the same command.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import rpo  # noqa: E402
from eval import interval  # noqa: E402
from reproduce import PAPER, folder_of  # noqa: E402

TERMS, TRAIN, TEST = 12, 256, 512
EXAMPLES, EXAMPLES_PER_STEP, COLD_LR = 320, 8, 1e-4  # of the cold start
COMMON = ["--max-response", "160", "--instruction-role", "user", "--instruction", ""]
TRAINING = ["--max-prompt", "96", "--problems-per-step", "8", "--group-size", "8", "--lr", "2e-5",
            "--dynamic-rounds", "2", "--length-reward", "0", "--overlong-penalty", "0",
            "--weight-decay", "0", "--warmup-steps", "3", "--steps", "100000", "--eval-every", "0",
            "--save-every", "10", "--cache-init-chunk", "64", "--no-gradient-checkpointing",
            "--tokens-per-forward", "2048"]
SOLUTIONS = ["--cache-init", "solutions"]
ALIKE = ["--cut-position", "uniform", "--cut-tail", "0"]
WAYS = {"full paths": ["--rollout", "full"],
        "RPO, L = 1.0, worked solutions first, cuts alike, none skipped": [
            "--rollout", "rpo", "--max-cut", "1.0", *SOLUTIONS, *ALIKE, "--no-skip-certain"],
        "RPO, L = 1.0, worked solutions first, cuts alike": [
            "--rollout", "rpo", "--max-cut", "1.0", *SOLUTIONS, *ALIKE],
        "RPO, L = 1.0, worked solutions first": ["--rollout", "rpo", "--max-cut", "1.0", *SOLUTIONS],
        "RPO, L = 1.0": ["--rollout", "rpo", "--max-cut", "1.0"],
        "RPO, worked solutions first": ["--rollout", "rpo", "--max-cut", "0.2", *SOLUTIONS],
        "RPO": ["--rollout", "rpo", "--max-cut", "0.2"],
        "paper, L = 0.5": [*shlex.split(PAPER), "--max-cut", "0.5"]}


def chain_sum(rng: random.Random) -> dict[str, str]:
    """A sum of TERMS numbers from 1 to 9 with both signs, never below 1 on the way."""
    value = rng.randint(1, 9)
    text, lines = str(value), []
    for _ in range(TERMS - 1):
        term = rng.randint(1, 9)
        sign = "-" if value > term and rng.random() < 0.5 else "+"
        after = value + term if sign == "+" else value - term
        lines.append(f"{value} {sign} {term} = {after}")
        text, value = f"{text} {sign} {term}", after
    return {"problem": f"Compute {text}.", "answer": str(value),
            "solution": "\n".join([*lines, f"The answer is \\boxed{{{value}}}."])}


def write_problems(folder: Path) -> None:
    rng, seen = random.Random(0), {}
    while len(seen) < EXAMPLES + TRAIN + TEST:
        problem = chain_sum(rng)
        seen[problem["problem"]] = json.dumps(problem) + "\n"
    lines = list(seen.values())
    for name, count in (("examples", EXAMPLES), ("train", TRAIN), ("test", TEST)):
        part, lines = lines[:count], lines[count:]
        (folder / f"{name}.jsonl").write_text("".join(part))


def cold_start(model: Path, folder: Path) -> Path:
    """One pass over the worked examples, the mean log-prob of their tokens being maximised; its folder."""
    out = folder / "start"
    if (out / "tokenizer.json").exists():  # written last
        return out
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = rpo.load_policy(str(model), torch.device("cpu"))
    problems = data.load_problems(str(folder / "examples.jsonl"), "--data", lambda text: None,
                                  lambda gold: None)
    paths = data.encode_solutions(problems, tokenizer, 160, "--paths", "")
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    for step, first in enumerate(range(0, EXAMPLES, EXAMPLES_PER_STEP), 1):
        optimizer.param_groups[0]["lr"] = COLD_LR * min(1, step / 5)
        batch = rpo.pack([
            rpo.Item(data.encode_prompt(tokenizer, p.question, "", "user"), [paths[p.id]], [0.0],
                     [[0.0] * len(paths[p.id])]) for p in problems[first:first + EXAMPLES_PER_STEP]])
        logprobs, _ = rpo.shared_logprobs(policy, batch)
        loss = -logprobs.sum() / batch.mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"cold start: step {step}, loss {loss.item():.3f}", flush=True)
    policy.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def evaluate(policy: Path, folder: Path, name: str) -> dict:
    """Greedy pass@1 on the held-out problems, on one core."""
    out = folder / f"eval-{name}"
    subprocess.run([sys.executable, "eval.py", "--model", str(policy), "--data", str(folder / "test.jsonl"),
                    "--out", str(out), *COMMON], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (figures,) = json.loads((out / "results.json").read_text())["results"].values()
    records = [json.loads(line) for line in (out / "responses-test.jsonl").read_text().splitlines()[1:]]
    lucky = [not is_sound(r["responses"][0]) for r in records if r["correct"][0]]
    return figures | {"lucky": f"{sum(lucky)} of {len(lucky)}"}


def is_sound(response: str) -> bool:
    """Is every sum in it right? If not, a right answer comes from mistakes that cancel."""
    sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", response)
    return all(int(a) + int(sign + b) == int(c) for a, sign, b, c in sums)


def train(model: Path, folder: Path, way: str, minutes: float) -> dict[str, float]:
    """train.py on one core until it has trained for so long; its last metrics."""
    out = folder_of(way, 0, folder)

    def last() -> dict[str, float]:
        log = out / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return json.loads(lines[-1]) if lines else {"time/total_s": 0.0}

    while last()["time/total_s"] < 60 * minutes:
        with open(f"{out}.log", "a") as output:
            process = subprocess.Popen(
                [sys.executable, "train.py", "--model", str(model), "--data", str(folder / "train.jsonl"),
                 "--out", str(out), *COMMON, *TRAINING, *WAYS[way]], cwd=ROOT, stdout=output, stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": "1"})
            while process.poll() is None and last()["time/total_s"] < 60 * minutes:
                time.sleep(1)
            process.send_signal(signal.SIGTERM)  # ends after the step in hand, with a checkpoint
            if process.wait() != 130:
                sys.exit(f"train.py failed: see {out}.log")
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
    start = cold_start(data.find_model(args.model), folder)
    before = evaluate(start, folder, "start")
    print(f"before: {cell(before)}", flush=True)
    rows = {"before": f"| before | {cell(before)} | {before['lucky']} | {before['length']:.0f} | | | |"}
    after = {}

    def run(way: str) -> None:
        metrics = train(start, folder, way, args.minutes)
        out = folder_of(way, 0, folder)
        after[way] = evaluate(out / "policy", folder, f"{out.name}-{metrics['step']}")
        rows[way] = (f"| {way} | {cell(after[way])} | {after[way]['lucky']} | {after[way]['length']:.0f} | "
                     f"{metrics['step']} | {metrics['tokens/generated']:,} | "
                     f"{metrics['time/total_s'] / 60:.0f} |")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, WAYS))
    full, *others = (after[way]["per_problem"] for way in WAYS)
    lines = []
    for way, ours in zip(list(WAYS)[1:], others):
        gaps = [ours[i] - full[i] for i in full]
        low, high = interval(gaps)
        lines.append(f"- {way}: {100 * sum(gaps) / len(gaps):+.1f} points ({100 * low:+.1f} to "
                     f"{100 * high:+.1f}, the same problems)")
    (ROOT / "docs" / "pretrained.md").write_text(
        f"# Chain sums with {Path(args.model).name}\n\nWritten by `python benchmarks/pretrained.py --minutes "
        f"{args.minutes:g}` ({platform.machine()}, torch {torch.__version__.split('+')[0]}, one core a run): "
        f"sums of {TERMS} numbers, a cold start on {EXAMPLES} worked ones, {TRAIN} problems to train on, "
        f"{TEST} held out; greedy pass@1 with 95 % intervals by bootstrap over the problems.\n\n"
        "| policy | pass@1 | right answers with a wrong sum in them | mean length | steps | tokens generated | "
        "minutes |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(rows[way] for way in ["before", *WAYS])
        + "\n\nAgainst full paths:\n" + "\n".join(lines) + "\n")
    print((ROOT / "docs" / "pretrained.md").read_text())


if __name__ == "__main__":
    main()
