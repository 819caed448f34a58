"""Benchmark numbers with their protocol.

    python eval.py --model M --data math500,aime24,mine.jsonl --samples 16 --temperature 0.6 --top-p 0.95
    python eval.py --compare A/results.json B/results.json

Responses are written as they come: the same command with the same --out goes on where it was killed. Under
torchrun --nproc-per-node N the problems are shared out."""
from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import answers
import data
import rewards
import rollout
from answers import Checker
from cache import fingerprint
from data import Problem
from policy import Policy, agreed, device_of, end, gather, join_ranks, load_policy, ranks

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
    clusters: per sample the number of its answer, equal answers the same one; -1: no answer, no vote."""
    votes = {c: list(clusters).count(c) for c in set(clusters) - {-1}}
    winners = [c for c, n in votes.items() if n == max(votes.values())]
    return float(np.mean([correct[list(clusters).index(c)] for c in winners])) if winners else 0.0


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by bootstrap over the values (percentiles of the resampled means)."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(BOOTSTRAP)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def cluster(given: Sequence[str | None], checker: Checker) -> list[int]:
    """Number the answers to one problem, equal ones alike; None: -1."""
    distinct = list(dict.fromkeys(a for a in given if a is not None))
    number: dict[str, int] = {}
    for i, answer in enumerate(distinct):
        same = checker.check([("\\boxed{" + answer + "}", other) for other in distinct[:i]])
        number[answer] = next((number[other] for other, equal in zip(distinct, same) if equal), i)
    return [-1 if a is None else number[a] for a in given]


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


def truncate(weights: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """weights (R, V) with zeros beyond the top_k largest (0: all) and beyond those that make up top_p."""
    return _truncate(weights, top_p, top_k or min(1024, weights.shape[1]), not top_k)


def _truncate(weights: torch.Tensor, top_p: float, largest: int, more: bool) -> torch.Tensor:
    """weights (R, V) with zeros beyond the `largest` ones, and beyond those that make up top_p of the total.
    more: a row whose `largest` ones do not reach top_p is looked at whole. Sorting all rows whole is slow."""
    ranked, order = weights.topk(largest)
    mass, enough = ranked.cumsum(-1), top_p * weights.sum(-1, keepdim=True)
    if top_p < 1:
        ranked = ranked.masked_fill(mass - ranked >= enough, 0.0)  # the token that crosses top_p stays
    kept = torch.zeros_like(weights).scatter_(1, order, ranked)
    short = (mass[:, -1:] < enough)[:, 0]
    if more and largest < weights.shape[1] and short.any():
        kept[short] = _truncate(weights[short], top_p, weights.shape[1], False)
    return kept


def evaluate(policy: Policy, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem],
             prompts: Sequence[list[int]], checker: Checker, max_response: int, memory: float,
             eos_ids: tuple[int, ...], label: str) -> dict[str, float]:
    """pass@1: every problem answered once, greedily, from its prompt alone; also printed after `label`.
    memory: GiB for generate()."""
    start, how = time.perf_counter(), rollout.Sampling(eos_ids, len(tokenizer), temperature=0)
    work = [(p, prompt, [], ()) for p, prompt in zip(problems, prompts)]
    evaluator = Evaluator(policy, tokenizer, how, checker, memory, max_response, 0)
    records = evaluator.run(work, 1, lambda record: None, "evaluation")
    names = {"correct": "accuracy", "tokens": "length", "finished": "finished_fraction"}
    result = {f"eval/{name}": float(np.mean([r[key] for r in records])) for key, name in names.items()}
    seconds = time.perf_counter() - start
    tqdm.write(f"{label}: pass@1 {result['eval/accuracy']:.3f} on {len(problems)} held-out problems (greedy, "
               f"full path; mean response {result['eval/length']:.0f} tokens, "
               f"{result['eval/finished_fraction']:.0%} finished; {seconds:.0f} s)")
    return result | {"time/eval_s": seconds}


@dataclass(frozen=True)
class Evaluator:
    """Samples responses and grades them, with the engine and the checker of the training."""
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    how: rollout.Sampling
    checker: Checker
    memory: float  # GiB for keys and values
    max_response: int
    seed: int

    def run(self, work: Sequence[tuple[Problem, list[int], list[int], tuple[int, ...]]], samples: int,
            keep: Callable[[dict], None], label: str) -> list[dict]:
        """Continue each (problem, prompt ids, prefix ids, key) `samples` times; the record of each, in order.
        `keep` gets it as soon as it is there, on the rank that made it. What a row draws depends on the seed,
        the problem, the key and its number only."""
        requests = [rollout.Request(prompt + prefix, max(1, self.max_response - len(prefix)),
                                    [(self.seed, int(p.id, 16), *key, row) for row in range(samples)])
                    for p, prompt, prefix, key in work]
        records = {}

        def finish(i: int, suffixes: list[rollout.Suffix]) -> None:
            records[i] = self.record(work[i][0], work[i][2], suffixes)
            keep(records[i])
        rollout.generate(self.policy, requests, self.how, self.memory, label, finish)
        return [record for _, record in sorted(gather(records).items())]

    def record(self, problem: Problem, prefix: list[int], suffixes: list[rollout.Suffix]) -> dict:
        """Lists over the samples: text, answer or None, the answer's cluster, correct, tokens, finished."""
        texts = self.tokenizer.batch_decode([prefix + s.ids for s in suffixes], skip_special_tokens=True)
        given = [answers.extract_answer(text) for text in texts]
        return {"id": problem.id, "question": problem.question, "answer": problem.answer,
                "prefix_tokens": len(prefix), "responses": texts, "answers": given,
                "clusters": cluster(given, self.checker),
                "correct": rewards.grade([(problem, text) for text in texts], self.checker),
                "tokens": [len(s.ids) for s in suffixes], "finished": [s.finished for s in suffixes]}


def resumed(path: Path, protocol: str) -> list[dict]:
    """The records of an earlier call with the same protocol; a last line that was cut off is cut away.
    Raises ValueError where the file belongs to another protocol."""
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
        raise ValueError(f"--out {path.parent}: {path.name} was made with other options or weights; "
                         "give another folder")
    path.write_text("".join(json.dumps(record) + "\n" for record in whole))
    return whole[1:]


# ------------------------------------------------------------------------------------------ command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder, hub id or short name")
    add("--data", help=f"comma-separated: {', '.join(BENCHMARKS)}, files, hub data sets owner/name[:file]")
    add("--data-dir", help="folder with NAME.jsonl for the names above, instead of the hub")
    add("--limit", type=int, default=0, help="first problems of each only; 0: all")
    add("--samples", type=int, default=1, help="responses per problem")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0, help="0: all")
    add("--max-response", type=int, default=3072, help="longest response, tokens")
    add("--instruction", default=data.INSTRUCTION)
    add("--instruction-role", choices=("system", "user"), default="system")
    add("--template-args", default="", help="JSON for the chat template, as in train.py")
    add("--memory", type=float, default=0.0,
        help="GiB for keys and values; 0: 0.8 of a free GPU, 1/4 of a CPU's")
    add("--seed", type=int, default=0)
    add("--out", help="folder of results.json and the responses; a killed evaluation in it goes on")
    add("--compare", nargs=2, metavar="RESULTS", help="two results.json: paired differences, second - first")
    args = parser.parse_args(arguments)
    if not args.compare and not (args.model and args.data):
        parser.error("give --model and --data, or --compare")
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


def load_problems(args: argparse.Namespace) -> dict[str, tuple[str, list[Problem]]]:
    """By benchmark name: where it comes from, and its problems. Raises ValueError."""
    sets = {}
    for name in args.data.split(","):
        source = str(Path(args.data_dir, f"{name}.jsonl")) if name in BENCHMARKS and args.data_dir else \
            BENCHMARKS.get(name, name)
        problems = data.load_problems(source, "--data")
        if not problems:
            raise ValueError(f"--data {name}: holds no problem with an answer that can be checked")
        short = name if name in BENCHMARKS else Path(name).stem
        if short in sets:
            raise ValueError(f"--data {args.data}: two of the sets are called {short}; evaluate them apart")
        sets[short] = (source, problems[:args.limit or None])
    return sets


def protocol_of(args: argparse.Namespace, folder: Path, tokenizer: PreTrainedTokenizerBase,
                sets: dict) -> dict[str, object]:
    """Everything that the numbers depend on."""
    here, git = Path(__file__).resolve().parent, shutil.which("git")
    commit = git and subprocess.run([git, "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True,
                                    text=True).stdout.strip()
    digests = []  # runs/NAME/policy is another policy when the run goes on
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return {"model": args.model, "weights": fingerprint(digests), "samples": args.samples,
            "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
            "max_response": args.max_response, "seed": args.seed,
            "instruction": args.instruction, "instruction_role": args.instruction_role,
            "template_args": args.template_args,
            "template": fingerprint(tokenizer.chat_template or "plain"),
            "checker": fingerprint((here / "answers.py").read_text()),
            "data": {name: {"source": source, "problems": len(problems),
                            "hash": fingerprint([p.id for p in problems])}
                     for name, (source, problems) in sets.items()},
            "commit": commit or "unknown", "torch": torch.__version__,
            "transformers": transformers.__version__}


def print_results(results: dict[str, dict]) -> None:
    for name, r in results.items():
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


def fail(program: str, code: int, error: object) -> int:
    """Say in one line why a program ends with that exit code."""
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    join_ranks()
    args = parse(arguments)
    try:
        if args.compare:
            compare(*args.compare)
            return 0
        sets, device = load_problems(args), device_of("auto")
        folder = data.find_model(args.model)
        tokenizer = data.load_tokenizer(folder)
        with agreed(ValueError, OSError):  # by one rank, which reads all weights
            protocol = {0: protocol_of(args, folder, tokenizer, sets)} if ranks()[0] == 0 else {}
        protocol = gather(protocol)[0]
        out = Path(args.out or f"runs/eval-{folder.name}-{fingerprint(protocol)[:6]}")
        out.mkdir(parents=True, exist_ok=True)
        with agreed(ValueError, OSError):
            earlier = {name: resumed(out / f"responses-{name}.jsonl", fingerprint(protocol))
                       for name in sets if ranks()[0] == 0}
        earlier = gather(earlier)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        policy = load_policy(folder, len(tokenizer), device, dtype, weights=dtype)
        rollout.use_pages(policy)
        eos_ids = data.eos_ids(tokenizer, policy.model.generation_config.eos_token_id)
        cut = functools.partial(truncate, top_p=args.top_p, top_k=args.top_k)
        how = rollout.Sampling(eos_ids, len(tokenizer), args.temperature,
                               cut if args.top_k or args.top_p < 1 else None)
        results = {}
        memory = args.memory or rollout.default_memory(device)
        evaluator = Evaluator(policy, tokenizer, how, Checker(), memory, args.max_response, args.seed)
        for name, (_, problems) in sets.items():
            results[name] = run_one(args, evaluator, problems, earlier[name], out / f"responses-{name}.jsonl")
    except (ValueError, OSError) as error:
        return fail("eval.py", 2, error)
    except torch.OutOfMemoryError as error:
        sys.stderr = sys.__stderr__ if ranks()[0] else sys.stderr  # whichever rank it is
        return fail("eval.py", 1, "out of memory: is the device in use, or too small to load the weights in "
                                  f"float32? If not, lower --memory ({error})")
    if ranks()[0] == 0:
        text = json.dumps({"protocol": protocol, "results": results}, indent=1)
        (out / "results.json").write_text(text + "\n")
    print_results(results)
    print(f"protocol, figures and responses: {out}")
    return 0


def run_one(args: argparse.Namespace, evaluator: Evaluator, problems: list[Problem],
            earlier: list[dict], path: Path) -> dict[str, object]:
    """One benchmark: what is missing is sampled, each record written at once."""
    arguments = data.template_arguments(args.template_args)
    style = data.PromptStyle(args.instruction, args.instruction_role, arguments)
    prompts = data.encode_prompts(problems, evaluator.tokenizer, style, sys.maxsize)
    window = getattr(evaluator.policy.model.config, "max_position_embeddings", None) or sys.maxsize
    if (longest := max(map(len, prompts.values()))) + args.max_response > window:
        what = f"at most {window - longest}" if window > longest else "data with shorter prompts"
        raise ValueError(f"--max-response {args.max_response}: with the longest prompt of {path.stem} "
                         f"({longest} tokens) more than the {window} positions of {args.model}; give {what}")
    start, done = time.perf_counter(), {r["id"] for r in earlier}
    with open(path, "ab", buffering=0) as file:  # a line is one write, so that ranks do not mix theirs
        work = [(p, prompts[p.id], [], ()) for p in problems if p.id not in done]
        records = evaluator.run(work, args.samples, lambda r: file.write(f"{json.dumps(r)}\n".encode()),
                                "responses")
    figures = summarise(earlier + records)
    seconds = time.perf_counter() - start
    sampled = sum(sum(r.get("tokens", [])) for r in records)
    return figures | {"seconds": seconds, "tokens_sampled": sampled, "tokens_per_s": sampled / seconds}


if __name__ == "__main__":
    end(main())
