"""One training step on one problem: RPO and full paths here, against TRL's GRPOTrainer with the same model.

    pip install trl==1.16.0 && python benchmarks/versus_trl.py --model FOLDER [--lengths 512 2048]
    OMP_NUM_THREADS=1 python benchmarks/versus_trl.py --tiny 10     # 4 minutes; docs/trl_tiny.json

All sample G responses of exactly T tokens (RPO: the last m of a path of T, m uniform up to 10 % of it, mean
of several steps), score them, and take one AdamW step without KL; float32, no activation checkpointing.
SmolLM2-135M takes 5 minutes at T = 512, 30 at 2048. Prints a table, copied to docs/update.md; the last line
is one JSON object. --tiny: steps of GRPOTrainer on tiny/, as large as in reproduce.py, with the same checker.
"""
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

from common import DOCS, ROOT, head, need, parser, print_json, row

import numpy as np
import torch
from transformers import AutoTokenizer, TrainerCallback

import answers
import data
import rollout
import rpo
from data import Problem
from policy import Policy, load_policy
from rewards import Group

QUESTION = ("Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
            "How many clips did Natalia sell altogether in April and May?")
GROUP = 16
STYLE = data.PromptStyle()


def trl_steps(folder: str, rows: list[dict], reward: Callable[..., list[float]],
              **settings: object) -> list[float]:
    """Seconds between beginning and end of each step of GRPOTrainer, generation included."""
    trl, times = need("trl"), []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

        on_step_end = on_step_begin

    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            out, beta=0.0, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "float32"}, **settings)
        trl.GRPOTrainer(folder, reward, args=config, callbacks=[Clock()],
                        train_dataset=need("datasets").Dataset.from_list(rows)).train()
    return [end - begin for begin, end in zip(times[::2], times[1::2])]


def trl_step(folder: str, prompt: str, length: int, rows: int) -> float:
    """Seconds of a step on one prompt."""
    def reward(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
        assert {len(ids) for ids in completion_ids} == {length}, "TRL did not sample the wanted length"
        return [float(i % 2) for i in range(len(completion_ids))]

    (seconds,) = trl_steps(
        folder, [{"prompt": prompt}] * GROUP, reward, per_device_train_batch_size=rows,
        gradient_accumulation_steps=GROUP // rows, max_steps=1, num_generations=GROUP,
        max_completion_length=length, generation_kwargs={"min_new_tokens": length}, learning_rate=1e-6)
    return seconds


def trl_tiny(steps: int, rows: int) -> None:
    """Steps of 16 problems and 8 responses; rows: responses in a micro-batch."""
    folder = ROOT / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = data.load_problems(str(folder / "train.jsonl"), "--data")
    prompts = data.encode_prompts(problems, tokenizer, STYLE, 128)
    tokens = []

    def reward(completion_ids: list[list[int]], answer: list[str], **kwargs: object) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return list(map(float, checker.check(list(zip(texts, answer)))))

    checker = answers.Checker()
    seconds = trl_steps(
        str(folder), [{"prompt": tokenizer.decode(prompts[p.id]), "answer": p.answer} for p in problems],
        reward, per_device_train_batch_size=rows, gradient_accumulation_steps=128 // rows,
        max_steps=steps, num_generations=8, max_completion_length=448, temperature=1.0,
        epsilon_high=0.28, learning_rate=3e-5)
    result = {"trl": version("trl"), "steps": steps, "seconds_per_step": round(statistics.mean(seconds), 2),
              "tokens_per_step": round(statistics.mean(tokens)), "rows": rows}
    (DOCS / "trl_tiny.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def our_step(policy: Policy, optimizer: torch.optim.Optimizer, prompt: list[int], prefix: list[int],
             length: int) -> tuple[float, int, int]:
    """Seconds of a step that continues `prefix` to `length` tokens; tokens generated; tokens forwarded."""
    start, budget = time.perf_counter(), length - len(prefix)
    request = rollout.Request(prompt + prefix, budget, [(0, i) for i in range(GROUP)])
    (suffixes,) = rollout.generate(policy, [request], rollout.Sampling((), policy.vocab_size), 6.0)
    correct = [i % 2 == 1 for i in range(GROUP)]
    group = Group(Problem("0", QUESTION, "72"), prompt, prefix, budget, [s.ids for s in suffixes],
                  [s.logprobs for s in suffixes], [False] * GROUP, correct, list(map(float, correct)))
    objective = rpo.ALGORITHMS["dapo"]
    advantages = rpo.group_advantages(group.rewards, objective.advantage)
    metrics, *_ = rpo.update(policy, None, optimizer, [group], [advantages], objective, 1.0, 1, 4096)
    return time.perf_counter() - start, GROUP * budget, metrics["tokens/forwarded"]


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--model", default="tiny")
    command.add_argument("--tiny", type=int, metavar="STEPS", help="of GRPOTrainer on the problems of tiny/")
    command.add_argument("--rows", type=int, default=16, help="responses in a micro-batch of --tiny")
    command.add_argument("--lengths", type=int, nargs="+", default=[512])
    command.add_argument("--cuts", type=int, default=5, help="RPO steps whose mean is taken")
    args = command.parse_args()
    need("trl")
    if args.tiny:
        return trl_tiny(args.tiny, args.rows)
    folder = data.find_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = data.encode_prompt(tokenizer, Problem("0", QUESTION, "72"), STYLE)
    policy = load_policy(folder, len(tokenizer), torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    our_step(policy, optimizer, prompt, [], 4)  # warm up: Adam's states, thread pools
    result: dict[str, float] = {}
    print(head("T", "way", "seconds", "tokens generated", "tokens through the update"))
    for length in args.lengths:
        rng = np.random.default_rng(0)
        path = rng.integers(10, 300, length).tolist()
        cuts = rng.integers(1, length // 10 + 1, args.cuts).tolist()
        steps = [our_step(policy, optimizer, prompt, path[:length - cut], length) for cut in cuts]
        full = our_step(policy, optimizer, prompt, [], length)
        trl = trl_step(str(folder), tokenizer.decode(prompt), length, rows=2 if length <= 512 else 1)
        ways = {"RPO": [statistics.mean(column) for column in zip(*steps)], "full paths": full,
                "TRL": (trl, GROUP * length, GROUP * (len(prompt) + length))}
        for way, (seconds, generated, forwarded) in ways.items():
            print(row(length, way, f"{seconds:.1f}", f"{generated:,.0f}", f"{forwarded:,.0f}"), flush=True)
        result |= {f"rpo_vs_trl_{length}": trl / ways["RPO"][0], f"full_vs_trl_{length}": trl / full[0]}
    print_json(result, 2)


if __name__ == "__main__":
    main()
