"""Benchmark numbers with their protocol, and which part of a reasoning path decides its correctness.

    python eval.py --model M --data math500,aime24,mine.jsonl --samples 16 --temperature 0.6 --top-p 0.95
    python eval.py --model M --data mine.jsonl --segments 0,0.25,0.5,0.75 --paths solutions --samples 16
    python eval.py --compare A/results.json B/results.json

Responses are written as they come: the same command with the same --out goes on where it was killed.
"""
from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import cache
import data
import rewards
import rollout
import rpo

# where a benchmark comes from, if not from --data-dir/NAME.jsonl
BENCHMARKS = {"math500": "HuggingFaceH4/MATH-500:test.jsonl",
              "gsm8k": "openai/gsm8k:main/test-00000-of-00001.parquet", "aime24": "math-ai/aime24",
              "aime25": "math-ai/aime25:test.jsonl", "amc23": "math-ai/amc23",
              "minerva": "math-ai/minervamath", "olympiadbench": "math-ai/olympiadbench"}
BOOTSTRAP = 10_000  # resamples of the problems


# ------------------------------------------------------------------------------------------- statistics


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, n >= k (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(clusters: Sequence[int], correct: Sequence[bool]) -> float:
    """maj@k of one problem: is the most frequent answer right? Of several equally frequent ones, their mean.

    clusters: per sample the number of its answer, equal answers the same one; -1: no answer, no vote.
    """
    votes = {c: list(clusters).count(c) for c in set(clusters) - {-1}}
    winners = [c for c, n in votes.items() if n == max(votes.values())]
    return float(np.mean([correct[list(clusters).index(c)] for c in winners])) if winners else 0.0


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by bootstrap over the values (percentiles of the resampled means)."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(BOOTSTRAP)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def cluster(answers: Sequence[str | None], checker: rewards.Checker) -> list[int]:
    """Number the answers of one problem, equal ones alike; None: -1."""
    distinct = list(dict.fromkeys(a for a in answers if a is not None))
    number: dict[str, int] = {}
    for i, answer in enumerate(distinct):
        same = checker.check([("\\boxed{" + answer + "}", other) for other in distinct[:i]])
        number[answer] = next((number[other] for other, equal in zip(distinct, same) if equal), i)
    return [-1 if a is None else number[a] for a in answers]


def summarise(records: Sequence[dict]) -> dict[str, object]:
    """Figures of one benchmark from its records, one a problem (see `Evaluator.record`)."""
    records = sorted(records, key=lambda r: r["id"])  # in whatever order they came: the same interval
    n = len(records[0]["correct"])
    means = [float(np.mean(r["correct"])) for r in records]
    low, high = interval(means)
    flat = {key: [x for r in records for x in r[key]] for key in ("tokens", "finished", "answers")}
    return {"problems": len(records), "samples": n,
            "avg": float(np.mean(means)), "avg_low": low, "avg_high": high,
            **{f"pass@{k}": float(np.mean([pass_at_k(n, sum(r["correct"]), k) for r in records]))
               for k in sorted({2**i for i in range(1, 12) if 2**i < n} | {n} - {1})},
            "maj": float(np.mean([majority(r["clusters"], r["correct"]) for r in records])),
            "length": float(np.mean(flat["tokens"])), "finished": float(np.mean(flat["finished"])),
            "no_answer": float(np.mean([a is None for a in flat["answers"]])), "tokens": sum(flat["tokens"]),
            "per_problem": {r["id"]: m for r, m in zip(records, means)}}


# ------------------------------------------------------------------------------------------- evaluation


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[data.Problem],
             prompts: Sequence[list[int]], checker: rewards.Checker, max_response: int, memory: float,
             eos: tuple[int, ...]) -> dict[str, float]:
    """pass@1: every problem answered once, greedily, from its prompt alone. memory: GiB for generate()."""
    evaluator = Evaluator(model, tokenizer, rollout.Sampling(eos, len(tokenizer), temperature=0), checker,
                          memory, max_response, 0)
    records: list[dict] = []
    work = [(p, prompt, [], ()) for p, prompt in zip(problems, prompts)]
    evaluator.run(work, 1, records.append, "evaluation")
    names = {"correct": "accuracy", "tokens": "length", "finished": "finished_fraction"}
    return {f"eval/{name}": float(np.mean([r[key] for r in records])) for key, name in names.items()}


@dataclass
class Evaluator:
    """Samples responses and grades them, with the engine and the checker of the training."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    how: rollout.Sampling
    checker: rewards.Checker
    memory: float  # GiB for keys and values
    max_response: int
    seed: int

    def run(self, work: Sequence[tuple[data.Problem, list[int], list[int], tuple[int, ...]]], samples: int,
            keep: Callable[[dict], None], label: str, **more: object) -> None:
        """Continue each (problem, prompt ids, prefix ids, key) `samples` times; a record for each when done.

        What a row draws depends on the seed, the problem, the key and its number only.
        """
        requests = [rollout.Request(prompt + prefix, max(1, self.max_response - len(prefix)),
                                    [(self.seed, int(p.id, 16), *key, row) for row in range(samples)])
                    for p, prompt, prefix, key in work]
        rollout.generate(self.model, requests, self.how, self.memory, label,
                         lambda i, suffixes: keep(self.record(work[i][0], work[i][2], suffixes) | more))

    def record(self, problem: data.Problem, prefix: list[int], suffixes: list[rollout.Suffix]) -> dict:
        """Lists over the samples: text, answer or None, the answer's cluster, correct, tokens, finished."""
        texts = self.tokenizer.batch_decode([prefix + s.ids for s in suffixes], skip_special_tokens=True)
        answers = [rewards.extract_answer(text) for text in texts]
        return {"id": problem.id, "question": problem.question, "answer": problem.answer,
                "prefix_tokens": len(prefix), "responses": texts, "answers": answers,
                "clusters": cluster(answers, self.checker),
                "correct": self.checker.check([(text, problem.answer) for text in texts]),
                "tokens": [len(s.ids) for s in suffixes], "finished": [s.finished for s in suffixes]}


def resumed(path: Path, protocol: str) -> list[dict]:
    """The records of an earlier call with the same protocol; a last line that was cut off is cut away.

    Raises ValueError where the file belongs to another protocol.
    """
    if not path.exists():
        path.write_text(json.dumps({"protocol": protocol}) + "\n")
        return []
    lines, whole = path.read_bytes().split(b"\n"), []
    for line in lines[:-1]:
        try:
            whole.append(json.loads(line))
        except ValueError:
            break
    if not whole or whole[0] != {"protocol": protocol}:
        raise ValueError(f"--out {path.parent}: {path.name} was made with other options; give another folder")
    path.write_text("".join(json.dumps(record) + "\n" for record in whole))
    return whole[1:]


# --------------------------------------------------------------------------------------------- segments


def segment_figures(rows: dict[float, list[dict]], original: dict[str, bool]) -> dict[str, object]:
    """Accuracy against the fraction of a path that is kept, split by whether the path was right, and per
    problem the pair of fractions between which its success rate changes most.
    """
    fractions = sorted(rows)
    rates = {f: {r["id"]: float(np.mean(r["correct"])) for r in rows[f]} for f in fractions}
    table = []
    for f in fractions:
        row: dict[str, object] = {"kept": f}
        for name, ids in (("all", list(original)), ("right", [i for i, ok in original.items() if ok]),
                          ("wrong", [i for i, ok in original.items() if not ok])):
            values = [rates[f][i] for i in ids]
            row[name] = [float(np.mean(values)), *interval(values), len(values)] if values else None
        table.append(row)
    return {"table": table, "largest_fall": _steepest(rates, original, -1),  # the more is kept, the worse
            "largest_rise": _steepest(rates, original, 1)}


def _steepest(rates: dict[float, dict[str, float]], ids: Iterable[str], sign: int) -> dict[str, dict]:
    """Per pair of neighbouring fractions: the problems whose success rate changes most there; how much."""
    steps, gaps = list(zip(rates, list(rates)[1:])), {}
    for i in ids if steps else ():
        change, step = max((sign * (rates[s[1]][i] - rates[s[0]][i]), s) for s in steps)
        if change > 0:  # a problem that never changes has no place
            gaps.setdefault(step, []).append(change)
    return {f"{a:g}-{b:g}": {"problems": len(gaps[a, b]), "mean_change": float(np.mean(gaps[a, b]))}
            for a, b in sorted(gaps)}


def draw_segments(table: list[dict], samples: int, path: Path) -> None:
    """path.png and path.svg, if matplotlib is there."""
    try:
        import matplotlib
        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        print("no figure: it needs the optional package matplotlib (pip install matplotlib); "
              "the table has all values")
        return
    figure, axes = pyplot.subplots(figsize=(6, 4))
    split = table[0]["right"] and table[0]["wrong"]  # else one of them is the curve of all
    for name, label in (("all", "all"), ("right", "path was right"), ("wrong", "path was wrong")):
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
    for ending in ("png", "svg"):
        figure.savefig(f"{path}.{ending}", dpi=150)


# ------------------------------------------------------------------------------------------ command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder, hub id or short name")
    add("--data", help=f"comma-separated: {', '.join(BENCHMARKS)}, files, hub data sets owner/name[:file]")
    add("--data-dir", help="folder with NAME.jsonl for the names above, instead of the hub")
    add("--limit", type=int, default=0, help="first problems of each only; 0: all")
    add("--samples", type=int, default=1, help="responses per problem, or continuations per prefix")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0, help="0: all")
    add("--max-response", type=int, default=3072, help="longest response, tokens")
    add("--instruction", default=data.INSTRUCTION)
    add("--instruction-role", choices=("system", "user"), default="system")
    add("--segments", help="comma-separated fractions of a path to keep, such as 0,0.25,0.5,0.75")
    add("--paths", default="policy", help="of --segments: policy (one sampled response each), solutions "
        "(of --data), or the cache.jsonl of a run")
    add("--memory", type=float, default=0.0,
        help="GiB for keys and values; 0: half of a free GPU, 1/4 of a CPU's")
    add("--seed", type=int, default=0)
    add("--out", help="folder of results.json and the responses; a killed evaluation in it goes on")
    add("--compare", nargs=2, metavar="RESULTS", help="two results.json: paired differences, second - first")
    args = parser.parse_args(arguments)
    if not args.compare and not (args.model and args.data):
        parser.error("give --model and --data, or --compare")
    args.segments = sorted({_fraction(parser, x) for x in args.segments.split(",")}) if args.segments else []
    for name, least in (("samples", 1), ("max_response", 1), ("limit", 0), ("temperature", 0), ("top_k", 0)):
        if not least <= getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: "
                         f"give a number of at least {least}")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p {args.top_p}: give a number above 0 and at most 1")
    if args.temperature == 0 and args.samples > 1:
        parser.error(f"--samples {args.samples}: greedy responses are all the same; "
                     "give a --temperature above 0")
    return args


def _fraction(parser: argparse.ArgumentParser, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        parser.error(f"--segments: {text!r} is no fraction between 0 and 1")
    return value


def load_problems(args: argparse.Namespace) -> dict[str, tuple[str, list[data.Problem]]]:
    """By benchmark name: where it comes from, and its problems. Raises ValueError."""
    sets = {}
    for name in args.data.split(","):
        source = str(Path(args.data_dir, f"{name}.jsonl")) if name in BENCHMARKS and args.data_dir else \
            BENCHMARKS.get(name, name)
        problems = data.load_problems(source, "--data", rewards.extract_answer, rewards.parse_error)
        if not problems:
            raise ValueError(f"--data {name}: holds no problem with an answer that can be checked")
        short = name if name in BENCHMARKS else Path(name).stem
        if short in sets:
            raise ValueError(f"--data {args.data}: two of the sets are called {short}; evaluate them apart")
        sets[short] = (source, problems[:args.limit or None])
    return sets


def protocol_of(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase,
                sets: dict) -> dict[str, object]:
    """Everything that the numbers depend on."""
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return {"model": args.model, "samples": args.samples, "temperature": args.temperature,
            "top_p": args.top_p, "top_k": args.top_k, "max_response": args.max_response, "seed": args.seed,
            "instruction": args.instruction, "instruction_role": args.instruction_role,
            "template": cache.fingerprint(tokenizer.chat_template or "plain"), "segments": args.segments,
            "paths": args.paths if args.segments else None,
            "checker": cache.fingerprint((here / "rewards.py").read_text()),
            "data": {name: {"source": source, "problems": len(problems),
                            "hash": cache.fingerprint([p.id for p in problems])}
                     for name, (source, problems) in sets.items()},
            "commit": commit.stdout.strip() or "unknown", "torch": torch.__version__,
            "transformers": transformers.__version__}


def first_paths(args: argparse.Namespace, evaluator: Evaluator, problems: list[data.Problem],
                prompts: dict[str, list[int]], records: list[dict], keep: Callable) -> dict[str, list[int]]:
    """The paths that --segments cuts, token ids by problem id."""
    tokenizer = evaluator.tokenizer
    if args.paths == "solutions":
        return data.encode_solutions(problems, tokenizer, args.max_response, "--paths", "left out")
    if args.paths != "policy":
        vocabulary = cache.fingerprint(tokenizer.get_vocab())
        entries = cache.load(Path(args.paths), vocabulary, {p.id for p in problems}, len(tokenizer), print)
        return {name: entry.response_ids for name, entry in entries.items()}
    done = {r["id"] for r in records if r["kept"] is None}
    todo = [p for p in problems if p.id not in done]
    requests = [rollout.Request(prompts[p.id], args.max_response, [(args.seed, int(p.id, 16), 10**6)])
                for p in todo]
    rollout.generate(evaluator.model, requests, evaluator.how, evaluator.memory, "paths",
                     lambda i, rows: keep({"id": todo[i].id, "kept": None, "path": rows[0].ids}))
    return {r["id"]: r["path"] for r in records if r["kept"] is None}


def run_segments(args: argparse.Namespace, evaluator: Evaluator, problems: list[data.Problem],
                 prompts: dict[str, list[int]], records: list[dict], keep: Callable) -> dict[str, object]:
    """Continue every fraction of every path; its figures. keep: puts a record into `records`."""
    paths = first_paths(args, evaluator, problems, prompts, records, keep)
    problems = [p for p in problems if p.id in paths]
    if not problems:
        raise ValueError(f"--paths {args.paths}: no path for a problem of --data")
    texts = evaluator.tokenizer.batch_decode([paths[p.id] for p in problems], skip_special_tokens=True)
    right = evaluator.checker.check([(text, p.answer) for text, p in zip(texts, problems)])
    for number, f in enumerate(args.segments):
        done = {r["id"] for r in records if r["kept"] == f}
        # a path that is kept whole has nothing left to sample: at least its last token is sampled again
        work = [(p, prompts[p.id], paths[p.id][:min(int(f * len(paths[p.id])), len(paths[p.id]) - 1)],
                 (number,)) for p in problems if p.id not in done]
        evaluator.run(work, args.samples, keep, f"{f:g} kept", kept=f)
    rows = {f: [r for r in records if r["kept"] == f] for f in args.segments}
    return {"problems": len(problems)} | segment_figures(rows, dict(zip((p.id for p in problems), right)))


def print_results(results: dict[str, dict], segments: bool) -> None:
    for name, r in results.items():
        if segments:
            print(f"{name}: {r['problems']} problems; accuracy (95 % interval) by fraction of the path kept\n"
                  f"{'kept':>6s} {'all':>22s} {'path was right':>22s} {'path was wrong':>22s}")
            for row in r["table"]:
                cells = [f"{x[0]:.3f} ({x[1]:.3f}-{x[2]:.3f})" if (x := row[key]) else "-"
                         for key in ("all", "right", "wrong")]
                print(f"{row['kept']:6g} " + " ".join(f"{cell:>22s}" for cell in cells))
            for key in ("largest_fall", "largest_rise"):
                print(f"{key.replace('_', ' ')} of the success rate, problems by segment: "
                      + (", ".join(f"{s}: {v['problems']}" for s, v in r[key].items()) or "none"))
        else:
            k = r["samples"]
            print(f"{name}: {r['problems']} problems, avg@{k} {r['avg']:.4f} "
                  f"({r['avg_low']:.4f}-{r['avg_high']:.4f}), "
                  + "".join(f"{x} {r[x]:.4f}, " for x in r if x.startswith("pass@"))
                  + f"maj@{k} {r['maj']:.4f}, mean response {r['length']:.0f} tokens, "
                  f"{r['finished']:.1%} finished, {r['no_answer']:.1%} without an answer")
        print(f"{name}: {r['seconds']:.0f} s, {r['tokens_sampled']:,} tokens, {r['tokens_per_s']:.0f} "
              "tokens/s (of this call)")


def compare(first: str, second: str) -> None:
    """Paired differences of the problems that both results have. Raises ValueError where there is none."""
    loaded = []
    for name in (first, second):
        try:
            loaded.append(json.loads(Path(name).read_text())["results"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--compare {name}: no results.json of eval.py ({error})") from error
    shared = [name for name in loaded[0] if name in loaded[1] and "per_problem" in loaded[0][name]]
    if not shared:
        raise ValueError(f"--compare: {first} and {second} have no benchmark in common")
    print("benchmark: first, second, difference (95 % interval, bootstrap over problems)")
    for name in shared:
        a, b = (x[name]["per_problem"] for x in loaded)
        ids = [i for i in a if i in b]
        gaps = [b[i] - a[i] for i in ids]
        low, high = interval(gaps)
        means = [float(np.mean([x[i] for i in ids])) for x in (a, b)]
        print(f"{name}: {means[0]:.4f}, {means[1]:.4f}, {np.mean(gaps):+.4f} ({low:+.4f} to {high:+.4f}), "
              f"{len(ids)} problems")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.compare:
            compare(*args.compare)
            return 0
        sets = load_problems(args)
        folder = data.find_model(args.model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        protocol = protocol_of(args, tokenizer, sets)
        out = Path(args.out or f"runs/eval-{folder.name}-{cache.fingerprint(protocol)[:6]}")
        out.mkdir(parents=True, exist_ok=True)
        earlier = {name: resumed(out / f"responses-{name}.jsonl", cache.fingerprint(protocol))
                   for name in sets}
        model = rpo.load_policy(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        eos = data.eos_ids(tokenizer, model.generation_config.eos_token_id)
        how = rollout.Sampling(eos, len(tokenizer), args.temperature, args.top_p, args.top_k)
        results = {}
        with rewards.Checker(loose=False) as checker:
            evaluator = Evaluator(model, tokenizer, how, checker,
                                  args.memory or rollout.default_memory(device), args.max_response, args.seed)
            for name, (_, problems) in sets.items():
                results[name] = run_one(args, evaluator, problems, earlier[name],
                                        out / f"responses-{name}.jsonl")
    except (ValueError, OSError) as error:
        print(f"eval.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    (out / "results.json").write_text(json.dumps({"protocol": protocol, "results": results}, indent=1) + "\n")
    print_results(results, bool(args.segments))
    if args.segments:
        for name, r in results.items():
            draw_segments(r["table"], args.samples, out / f"segments-{name}")
    print(f"protocol, figures and responses: {out}")
    return 0


def run_one(args: argparse.Namespace, evaluator: Evaluator, problems: list[data.Problem],
            earlier: list[dict], path: Path) -> dict[str, object]:
    """One benchmark: what is missing is sampled, each record written at once."""
    prompts = {p.id: data.encode_prompt(evaluator.tokenizer, p.question, args.instruction,
                                        args.instruction_role) for p in problems}
    start, records = time.perf_counter(), list(earlier)
    with open(path, "a") as file:
        def keep(record: dict) -> None:
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()

        if args.segments:
            figures = run_segments(args, evaluator, problems, prompts, records, keep)
        else:
            done = {r["id"] for r in records}
            evaluator.run([(p, prompts[p.id], [], ()) for p in problems if p.id not in done], args.samples,
                          keep, "responses")
            figures = summarise(records)
    seconds = time.perf_counter() - start
    sampled = sum(sum(r.get("tokens", [])) for r in records[len(earlier):])
    return figures | {"seconds": seconds, "tokens_sampled": sampled, "tokens_per_s": sampled / seconds}


if __name__ == "__main__":
    sys.exit(main())
