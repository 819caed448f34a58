"""A pretrained model: full paths and RPO for the same number of minutes, on chain sums made here.

    python benchmarks/pretrained.py --model SmolLM2-135M-Instruct [--minutes 60] [--seed 0] [--examples 320]

The model first learns from a few hundred worked sums how to write one down (320: it is mostly wrong; 960:
right more often than not). From this policy every run of WAYS goes on, two at a time and on one core each,
until it has trained for --minutes. Runs are in --folder; a killed call goes on with the same command. Takes
90 minutes on two cores and up to 70 GB of disk; on a GPU, which is used if there is one, five minutes do.
Writes docs/pretrained.md.
"""
import argparse
import json
import random
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import (DOCS, ROOT, checkpoints_at, evaluate, head, machine, parser, read_lines, row, run_folder,
                    train_until, write_page)

import torch
from transformers import AutoTokenizer

import data
from eval import interval
from policy import Tree, device_of, load_policy, pack

TERMS, TRAIN, TEST = 12, 256, 512
EXAMPLES, EXAMPLES_PER_STEP, COLD_LR = 320, 8, 1e-4  # of the cold start
COMMON = ["--max-response", 160, "--instruction-role", "user", "--instruction", ""]
TRAINING = ["--max-prompt", 96, "--problems-per-step", 8, "--group-size", 8,
            "--length-reward", 0, "--overlong-penalty", 0, "--lr", 2e-5, "--weight-decay", 0,
            "--warmup-steps", 3, "--steps", 100000, "--eval-every", 0, "--save-every", 4,
            "--keep-checkpoints", 20, "--cache-init-chunk", 64, "--no-gradient-checkpointing",
            "--tokens-per-forward", 2048]
POINTS = (1 / 3, 2 / 3, 1)  # of --minutes: when a run is evaluated
WAYS = {"full paths": ["--rollout", "full"],  # the others are compared with the first
        "RPO": ["--rollout", "rpo", "--max-cut", 0.5]}  # as in the paper


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


def write_problems(folder: Path, examples: int) -> None:
    rng, seen = random.Random(0), {}
    while len(seen) < max(EXAMPLES, examples) + TRAIN + TEST:
        problem = chain_sum(rng)
        seen[problem["problem"]] = json.dumps(problem) + "\n"
    lines, end = list(seen.values()), EXAMPLES + TRAIN + TEST  # further examples come last
    for name, part in (("examples", (lines[:EXAMPLES] + lines[end:])[:examples]),
                       ("train", lines[EXAMPLES:EXAMPLES + TRAIN]), ("test", lines[EXAMPLES + TRAIN:end])):
        (folder / f"{name}.jsonl").write_text("".join(part))


def cold_start(model: Path, folder: Path) -> Path:
    """One pass of supervised fine-tuning on the worked examples; the policy's folder."""
    out = folder / "start"
    if (out / "tokenizer.json").exists():  # written last
        return out
    tokenizer, device = AutoTokenizer.from_pretrained(model), device_of("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = load_policy(model, len(tokenizer), device, dtype)
    problems = data.load_problems(str(folder / "examples.jsonl"), "--data")
    paths = data.encode_solutions(problems, tokenizer, 160, "--paths", "")
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    for step, first in enumerate(range(0, len(problems), EXAMPLES_PER_STEP), 1):
        optimizer.param_groups[0]["lr"] = COLD_LR * min(1, step / 5)
        batch = pack([Tree(data.encode_prompt(tokenizer, p, data.PromptStyle("", "user")), [paths[p.id]])
                      for p in problems[first:first + EXAMPLES_PER_STEP]], device)
        logprobs, _ = policy(batch)
        loss = -logprobs.sum() / batch.mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"cold start: step {step}, loss {loss.item():.3f}", flush=True)
    policy.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def measure(policy: Path, folder: Path, name: str) -> dict:
    """Greedy pass@1 on the held-out problems; how many right answers have a wrong sum in their response."""
    out = folder / f"eval-{name}"
    figures = evaluate(policy, folder / "test.jsonl", out, *COMMON)
    right = [r["responses"][0] for r in read_lines(out / "responses-test.jsonl")[1:] if r["correct"][0]]
    paths = policy.parent / "cache.jsonl"  # empty, or none, where no path is continued
    tokenizer = AutoTokenizer.from_pretrained(policy)
    cached = [tokenizer.decode(r["response_ids"])
              for r in (read_lines(paths)[1:] if paths.exists() else []) if r["correct"]]
    return figures | {"lucky": lucky(right), "cached": lucky(cached)}


def lucky(right: Iterable[str]) -> str:
    """How many of these right responses have a wrong sum in them."""
    sound = [is_sound(text) for text in right]
    return f"{len(sound) - sum(sound)} of {len(sound)}" if sound else ""


def is_sound(response: str) -> bool:
    """Is every sum in it right? If not, a right answer comes from mistakes that cancel."""
    sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", response)
    return all(int(a) + int(sign + b) == int(c) for a, sign, b, c in sums)


def run(model: Path, folder: Path, way: str, args: argparse.Namespace) -> list[tuple[dict, dict]]:
    """Train on one core for so long; (figures, metrics) of the checkpoints nearest to POINTS."""
    minutes, seed = args.minutes, args.seed
    out = run_folder(way, seed, folder)
    train_until(out, 60 * minutes, "--model", model, "--data", folder / "train.jsonl", *COMMON, *TRAINING,
                *WAYS[way], "--problems", args.problems, "--seed", seed)
    points = []
    for policy, metrics in checkpoints_at(out, [60 * minutes * x for x in POINTS]):
        figures = measure(policy, folder, f"{out.name}-{metrics['step']}")
        points.append((figures, metrics))
        print(f"{way}, step {metrics['step']}: pass@1 {figures['avg']:.3f}", flush=True)
    return points


def cells(way: str, figures: dict) -> list[str]:
    return [way, "{avg:.3f} ({avg_low:.3f}-{avg_high:.3f})".format(**figures), figures["lucky"],
            figures["cached"], f"{figures['length']:.0f}"]


def write(args: argparse.Namespace, before: dict,
          after: dict[str, list[tuple[dict, dict]]]) -> str:
    """docs/pretrained.md. after: by way, (figures, metrics) of its points."""
    lines = [row(*cells("before", before), "", "", "")]
    lines += [row(*cells(way, figures), metrics["step"], f"{metrics['tokens/generated']:,}",
                  f"{metrics['time/total_s'] / 60:.0f}")
              for way, points in after.items() for figures, metrics in points]
    base, *others = after
    for way in others:
        ours, full = (after[x][-1][0]["per_problem"] for x in (way, base))
        gaps = [100 * (ours[i] - full[i]) for i in full]
        low, high = interval(gaps)
        lines.append(f"\n{way} against {base}, at the end: {sum(gaps) / len(gaps):+.1f} points "
                     f"({low:+.1f} to {high:+.1f}, paired by problem).")
    table = [head("policy", "pass@1", "right answers with a wrong sum in them",
                  "right paths in the cache with one", "mean length", "steps", "tokens generated", "minutes")]
    call = (f"python benchmarks/pretrained.py --minutes {args.minutes:g} --seed {args.seed} "
            f"--examples {args.examples} --problems {args.problems}")
    text = (f"# Chain sums with {Path(args.model).name}\n\nWritten by `{call}` ({machine()}, one core a run): "
            f"sums of {TERMS} numbers, a cold start on {args.examples} worked ones, {args.problems} problems to "
            f"train on, {TEST} held out; greedy pass@1 with 95 % intervals by bootstrap over the problems.\n\n"
            + "\n".join(table + lines) + "\n")
    write_page(DOCS / "pretrained.md", text)
    return text


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--model", default="SmolLM2-135M-Instruct")
    command.add_argument("--minutes", type=float, default=60)
    command.add_argument("--seed", type=int, default=0, help="of the runs; the cold start is the same")
    command.add_argument("--examples", type=int, default=EXAMPLES, help="worked sums of the cold start")
    command.add_argument("--problems", type=int, default=64, help=f"to train on, of {TRAIN}; 64 are visited "
                                                                  "several times within the hour")
    command.add_argument("--folder", type=Path, help="default: runs/pretrained-EXAMPLES-PROBLEMS")
    args = command.parse_args()
    folder = (args.folder or ROOT / "runs" / f"pretrained-{args.examples}-{args.problems}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder, args.examples)
    first = cold_start(data.find_model(args.model), folder)
    before = measure(first, folder, "start")
    print(f"before: pass@1 {before['avg']:.3f}", flush=True)

    with ThreadPoolExecutor(2) as pool:
        after = dict(zip(WAYS, pool.map(lambda way: run(first, folder, way, args), WAYS)))
    print(write(args, before, after))


if __name__ == "__main__":
    main()
