"""Which part of a reasoning path decides its correctness: accuracy against the fraction of it that is kept.

    python benchmarks/segments.py --model tiny --data tiny/test.jsonl --fractions 0,0.25,0.5,0.75,0.9 \\
        --samples 64 --temperature 1 --max-response 384 --out results/segments     # 30 minutes on one core

Each path is cut to every fraction and continued --samples times. Paths are sampled from the policy, worked
solutions, or those in the cache of a run. Writes results.json, segments.png and .svg (with matplotlib) and
the responses, as they come, to --out: the same command goes on where it was killed.
"""
import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from common import has, parser, pyplot, save_figure

import numpy as np
import torch
from transformers import AutoTokenizer

import answers
import cache
import data
import eval
import rewards
import rollout
from data import Problem
from policy import load_policy

SPLITS = {"all": "all", "right": "path was right", "wrong": "path was wrong"}


def segment_figures(rows: dict[float, list[dict]], original: dict[str, bool]) -> dict[str, object]:
    """Accuracy by fraction kept, also of right and of wrong paths alone, and where success rates change most.

    rows: by fraction one record a problem; original: is the whole path of this problem right?
    """
    fractions = sorted(rows)
    rates = {f: {r["id"]: float(np.mean(r["correct"])) for r in rows[f]} for f in fractions}
    splits = {"all": list(original), "right": [i for i, ok in original.items() if ok],
              "wrong": [i for i, ok in original.items() if not ok]}
    table = []
    for f in fractions:
        values = {name: [rates[f][i] for i in ids] for name, ids in splits.items()}
        table.append({"kept": f} | {name: [float(np.mean(x)), *eval.interval(x), len(x)] if x else None
                                    for name, x in values.items()})
    return {"table": table, "largest_fall": steepest(rates, original, -1),
            "largest_rise": steepest(rates, original, 1)}


def steepest(rates: dict[float, dict[str, float]], ids: Iterable[str], sign: int) -> dict[str, dict]:
    """By pair of neighbouring fractions: how many problems change most there, and by how much on average.

    rates: by fraction and problem, the share of correct continuations. sign 1: rises, -1: falls.
    """
    steps, gaps = list(zip(rates, list(rates)[1:])), {}
    for i in ids if steps else ():
        change, step = max((sign * (rates[s[1]][i] - rates[s[0]][i]), s) for s in steps)
        if change > 0:  # a problem that never changes belongs nowhere
            gaps.setdefault(step, []).append(change)
    return {f"{a:g}-{b:g}": {"problems": len(gaps[a, b]), "mean_change": float(np.mean(gaps[a, b]))}
            for a, b in sorted(gaps)}


def draw(table: list[dict], samples: int, path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(6, 4))
    split = table[0]["right"] and table[0]["wrong"]  # else one of them is the curve of all
    for name, label in SPLITS.items():
        rows = [(r["kept"], *r[name]) for r in table if r[name] and (split or name == "all")]
        if rows:
            kept, mean, low, high, count = map(list, zip(*rows))
            axes.plot(kept, mean, marker="o", label=f"{label} (n = {count[0]})")
            axes.fill_between(kept, low, high, alpha=0.15)
    axes.set(xlabel="fraction of the path that is kept", ylabel=f"accuracy of {samples} continuations",
             ylim=(0, 1.02))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3, fontsize="small")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)


def print_figures(figures: dict) -> None:
    print(f"{figures['problems']} problems; accuracy (95 % interval) by fraction of the path that is kept\n"
          f"{'kept':>6s} " + " ".join(f"{label:>22s}" for label in SPLITS.values()))
    for row in figures["table"]:
        cells = [f"{x[0]:.3f} ({x[1]:.3f}-{x[2]:.3f})" if (x := row[name]) else "-" for name in SPLITS]
        print(f"{row['kept']:6g} " + " ".join(f"{cell:>22s}" for cell in cells))
    for key in ("largest_fall", "largest_rise"):
        print(f"{key.replace('_', ' ')} of the success rate, problems by segment: "
              + (", ".join(f"{s}: {v['problems']}" for s, v in figures[key].items()) or "none"))


def find_paths(source: str, evaluator: eval.Evaluator, problems: Sequence[Problem],
               prompts: dict[str, list[int]], records: list[dict],
               keep: Callable[[dict], None]) -> dict[str, list[int]]:
    """The paths to cut, token ids by problem id. records: all so far; keep: adds one to them."""
    tokenizer = evaluator.tokenizer
    if source == "solutions":
        return data.encode_solutions(problems, tokenizer, evaluator.max_response, "--paths", "left out")
    if source != "policy":
        vocabulary = cache.fingerprint(tokenizer.get_vocab())
        entries = cache.load(Path(source), vocabulary, {p.id for p in problems}, len(tokenizer), print)
        return {name: entry.response_ids for name, entry in entries.items()}
    done = {r["id"] for r in records if r["kept"] is None}
    todo = [p for p in problems if p.id not in done]
    requests = [rollout.Request(prompts[p.id], evaluator.max_response,
                                [(evaluator.seed, int(p.id, 16), 10**6)]) for p in todo]
    rollout.generate(evaluator.policy, requests, evaluator.how, evaluator.memory, "paths",
                     lambda i, rows: keep({"id": todo[i].id, "kept": None, "path": rows[0].ids}))
    return {r["id"]: r["path"] for r in records if r["kept"] is None}


def study(args: argparse.Namespace, evaluator: eval.Evaluator, problems: Sequence[Problem],
          prompts: dict[str, list[int]], records: list[dict], keep: Callable[[dict], None]) -> dict:
    """Continue every fraction of every path; the figures. Raises ValueError if there is no path."""
    paths = find_paths(args.paths, evaluator, problems, prompts, records, keep)
    problems = [p for p in problems if p.id in paths]
    if not problems:
        raise ValueError(f"--paths {args.paths}: no path for a problem of --data")
    texts = evaluator.tokenizer.batch_decode([paths[p.id] for p in problems], skip_special_tokens=True)
    right = rewards.grade(list(zip(problems, texts)), evaluator.checker)
    for number, f in enumerate(args.fractions):
        done = {r["id"] for r in records if r["kept"] == f}
        # of a path that is kept whole, at least the last token is sampled again
        work = [(p, prompts[p.id], paths[p.id][:min(int(f * len(paths[p.id])), len(paths[p.id]) - 1)],
                 (number,)) for p in problems if p.id not in done]
        evaluator.run(work, args.samples, lambda record: keep(record | {"kept": f}), f"{f:g} kept")
    rows = {f: [r for r in records if r["kept"] == f] for f in args.fractions}
    return {"problems": len(problems)} | segment_figures(rows, dict(zip((p.id for p in problems), right)))


def fractions(text: str) -> list[float]:
    try:
        values = sorted({float(x) for x in text.split(",")})
    except ValueError:
        values = [-1.0]
    if not all(0 <= x <= 1 for x in values):
        raise argparse.ArgumentTypeError(f"{text}: give comma-separated numbers from 0 to 1")
    return values


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__)
    add = command.add_argument
    add("--model", required=True, help="folder, hub id or short name")
    add("--data", required=True, help="file or hub data set, as of eval.py")
    add("--fractions", type=fractions, default="0,0.25,0.5,0.75,0.9", help="comma-separated, from 0 to 1")
    add("--paths", default="policy", help="policy: one sampled response each; solutions: those of --data; or "
                                          "the cache.jsonl of a run")
    add("--samples", type=int, default=16, help="continuations of each prefix")
    add("--temperature", type=float, default=1.0)
    add("--max-response", type=int, default=3072, help="tokens of the longest response")
    add("--instruction", default=data.INSTRUCTION)
    add("--instruction-role", choices=("system", "user"), default="system")
    add("--limit", type=int, default=0, help="first problems only; 0: all")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="folder of the figures and responses")
    args = command.parse_args(arguments)
    for name, value, least in (("samples", args.samples, 1), ("max-response", args.max_response, 1),
                               ("limit", args.limit, 0)):
        if value < least:
            command.error(f"--{name} {value}: give a number of at least {least}")
    if args.paths not in ("policy", "solutions") and not Path(args.paths).is_file():
        command.error(f"--paths {args.paths}: no such file; give policy, solutions or the cache.jsonl of a run")
    if not 0 < args.temperature < float("inf"):
        command.error(f"--temperature {args.temperature}: give a number above 0, else all continuations are "
                      "the same")
    return args


def evaluate(args: argparse.Namespace) -> dict:
    """The figures of the study; what an earlier call has sampled is not sampled again. Raises ValueError."""
    source = eval.BENCHMARKS.get(args.data, args.data)
    problems = data.load_problems(source, "--data")[:args.limit or None]
    folder = data.find_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    style = data.PromptStyle(args.instruction, args.instruction_role)
    prompts = {p.id: data.encode_prompt(tokenizer, p, style) for p in problems}
    args.out.mkdir(parents=True, exist_ok=True)
    protocol = vars(args) | {"out": None, "problems": [p.id for p in problems]}
    records = eval.resumed(args.out / "responses.jsonl", cache.fingerprint(protocol))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = load_policy(folder, len(tokenizer), device, dtype, weights=dtype)
    eos_ids = data.eos_ids(tokenizer, policy.model.generation_config.eos_token_id)
    how = rollout.Sampling(eos_ids, len(tokenizer), args.temperature)
    with open(args.out / "responses.jsonl", "a") as file:
        def keep(record: dict) -> None:
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()

        evaluator = eval.Evaluator(policy, tokenizer, how, answers.Checker(), rollout.default_memory(device),
                                   args.max_response, args.seed)
        return study(args, evaluator, problems, prompts, records, keep)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        figures = evaluate(args)
    except (ValueError, OSError) as error:
        print(f"segments.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    protocol = {name: str(value) if name == "out" else value for name, value in vars(args).items()}
    (args.out / "results.json").write_text(json.dumps({"protocol": protocol, **figures}, indent=1) + "\n")
    print_figures(figures)
    if has("matplotlib", "figure"):
        draw(figures["table"], args.samples, args.out / "segments")
    print(f"figures and responses: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
