"""Accuracy from the bare prompt: one greedy response per problem (pass@1).

    python eval.py --model runs/tiny/policy --data tiny/test.jsonl --max-response 448
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import data
import rewards
import rollout
import rpo


@dataclass
class Evaluation:
    """Result of one evaluation."""

    accuracy: float  # share of problems whose greedy response has the right answer
    problems: int
    length_mean: float  # tokens of a response
    finished_fraction: float  # ended by EOS, not by the limit
    seconds: float
    texts: list[str]
    correct: list[bool]


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[data.Problem],
             prompts: Sequence[list[int]], checker: rewards.Checker, max_response: int, memory: float,
             eos: tuple[int, ...]) -> Evaluation:
    """pass@1: every problem answered once, greedily, from its prompt alone. memory: GiB for generate()."""
    start = time.perf_counter()
    how = rollout.Sampling(eos, len(tokenizer), temperature=0)
    requests = [rollout.Request(prompt, max_response, [(0,)]) for prompt in prompts]
    suffixes = [group[0] for group in rollout.generate(model, requests, how, memory, "evaluation")]
    texts = tokenizer.batch_decode([s.ids for s in suffixes], skip_special_tokens=True)
    correct = checker.check([(text, problem.answer) for text, problem in zip(texts, problems)])
    n = len(suffixes)
    return Evaluation(sum(correct) / n, n, sum(len(s.ids) for s in suffixes) / n,
                      sum(s.finished for s in suffixes) / n, time.perf_counter() - start, texts, correct)


def main() -> None:
    parser = argparse.ArgumentParser("eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id or short name")
    parser.add_argument("--data", required=True, help="file or hub data set with the problems")
    parser.add_argument("--limit", type=int, default=0, help="first problems only; 0: all")
    parser.add_argument("--max-response", type=int, default=3072, help="longest response, tokens")
    parser.add_argument("--instruction", default=data.INSTRUCTION)
    parser.add_argument("--instruction-role", choices=("system", "user"), default="system")
    parser.add_argument("--out", help="JSONL file for the responses")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        problems = data.load_problems(args.data, "--data", rewards.extract_answer, rewards.parse_error)
        problems = problems[:args.limit or None]
        if not problems or args.max_response < 1:
            raise ValueError("nothing to do: --data holds no problem, or --max-response is below 1")
        folder = data.find_model(args.model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [data.encode_prompt(tokenizer, p.question, args.instruction, args.instruction_role)
                   for p in problems]
        model = rpo.load_policy(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    except (ValueError, OSError) as error:
        parser.exit(2, f"eval.py: error: {error}\n")
    eos = data.eos_ids(tokenizer, model.generation_config.eos_token_id)
    with rewards.Checker(loose=False) as checker:
        result = evaluate(model, tokenizer, problems, prompts, checker, args.max_response,
                          rollout.default_memory(device), eos)
    if args.out:
        with open(args.out, "w") as file:
            for problem, text, correct in zip(problems, result.texts, result.correct):
                record = {"id": problem.id, "question": problem.question, "answer": problem.answer,
                          "response": text, "correct": bool(correct)}
                file.write(json.dumps(record) + "\n")
    print(f"pass@1 (greedy) {result.accuracy:.4f} on {result.problems} problems, mean response "
          f"{result.length_mean:.0f} tokens, {result.finished_fraction:.1%} finished, {result.seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
