"""One training step on one problem: RPO and full paths here, against TRL's GRPOTrainer with the same model.

    pip install trl==1.16.0 && python benchmarks/versus_trl.py --model FOLDER [--lengths 512 2048]
    OMP_NUM_THREADS=1 python benchmarks/versus_trl.py --tiny 10    # docs/trl_tiny.json, for reproduce.py

All sample G responses of exactly T tokens (RPO: the last m of a path of T, m uniform up to 10 % of it, mean
of several steps), score them, and take one AdamW step without KL; float32, no activation checkpointing.
The last line is one JSON object. --tiny: steps of GRPOTrainer on the problems of tiny/, as many problems and
responses a step as in reproduce.py, with the same answer check.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import rewards  # noqa: E402
import rollout  # noqa: E402
import rpo  # noqa: E402

QUESTION = ("Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
            "How many clips did Natalia sell altogether in April and May?")
GROUP = 16


def trl_steps(folder: str, rows: list[dict], reward: Callable[..., list[float]],
              **settings: object) -> list[float]:
    """Seconds between beginning and end of each step of GRPOTrainer, generation included."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        sys.exit(f"this benchmark compares with TRL: pip install trl==1.16.0 ({error})")
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            out, beta=0.0, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "float32"}, **settings)
        GRPOTrainer(folder, reward, args=config, callbacks=[Clock()],
                    train_dataset=Dataset.from_list(rows)).train()
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
    """Steps of 16 problems and 8 responses; rows responses in a micro-batch."""
    folder = ROOT / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = data.load_problems(str(folder / "train.jsonl"), "--data", rewards.extract_answer,
                                  rewards.parse_error)
    prompts = data.encode_prompts(problems, tokenizer, data.INSTRUCTION, "system", 128)

    tokens = []

    def reward(completion_ids: list[list[int]], answer: list[str], **kwargs: object) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return list(map(float, checker.check(list(zip(texts, answer)))))

    with rewards.Checker(loose=False) as checker:
        seconds = trl_steps(
            str(folder), [{"prompt": tokenizer.decode(prompts[p.id]), "answer": p.answer} for p in problems],
            reward, per_device_train_batch_size=rows, gradient_accumulation_steps=128 // rows,
            max_steps=steps, num_generations=8, max_completion_length=448, temperature=1.0,
            epsilon_high=0.28, learning_rate=3e-5)
    result = {"trl": version("trl"), "steps": steps, "seconds_per_step": round(statistics.mean(seconds), 2),
              "tokens_per_step": round(statistics.mean(tokens)), "rows": rows}
    (ROOT / "docs" / "trl_tiny.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def our_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, prompt: list[int], prefix: list[int],
             length: int) -> tuple[float, int, int]:
    """Seconds of a step that continues `prefix` to `length` tokens; tokens generated; tokens forwarded."""
    start = time.perf_counter()
    model.eval()
    request = rollout.Request(prompt + prefix, length - len(prefix), [(0, row) for row in range(GROUP)])
    (suffixes,) = rollout.generate(model, [request], rollout.Sampling((), model.config.vocab_size), 6.0)
    item = rpo.Item(request.context, [s.ids for s in suffixes],
                    rpo.group_advantages([float(i % 2) for i in range(GROUP)]),
                    [s.logprobs for s in suffixes])
    denominator, forwarded = rpo.update_denominator([item], "token"), 0
    model.train()
    for part in rpo.micro_batches([item], 4096):
        batch = rpo.pack(part)
        logprobs, _ = rpo.shared_logprobs(model, batch)
        loss, _ = rpo.policy_loss(logprobs, batch, denominator, clip_low=0.2, clip_high=0.28,
                                  aggregation="token")
        loss.backward()
        forwarded += batch.input_ids.numel()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start, GROUP * request.budget, forwarded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tiny", type=int, metavar="STEPS", help="of GRPOTrainer on the problems of tiny/")
    parser.add_argument("--rows", type=int, default=16, help="responses in a micro-batch of --tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--cuts", type=int, default=5, help="RPO steps whose mean is taken")
    args = parser.parse_args()
    if args.tiny:
        return trl_tiny(args.tiny, args.rows)
    folder = str(data.find_model(args.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = data.encode_prompt(tokenizer, QUESTION, data.INSTRUCTION, "system")
    model = rpo.load_policy(folder, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    our_step(model, optimizer, prompt, [], 4)  # warm up: Adam's states, thread pools
    result: dict[str, float] = {}
    print("| T | way | seconds | tokens generated | tokens through the update |\n|---|---|---|---|---|")
    for length in args.lengths:
        rng = np.random.default_rng(0)
        path = rng.integers(10, 300, length).tolist()
        cuts = rng.integers(1, length // 10 + 1, args.cuts).tolist()
        rpo_steps = [our_step(model, optimizer, prompt, path[:length - cut], length) for cut in cuts]
        mean = [statistics.mean(column) for column in zip(*rpo_steps)]
        full = our_step(model, optimizer, prompt, [], length)
        trl = trl_step(folder, tokenizer.decode(prompt), length, rows=2 if length <= 512 else 1)
        trl_tokens = GROUP * (len(prompt) + length)
        for way, (seconds, generated, forwarded) in (("RPO", mean), ("full paths", full),
                                                     ("TRL", (trl, GROUP * length, trl_tokens))):
            print(f"| {length} | {way} | {seconds:.1f} | {generated:,.0f} | {forwarded:,.0f} |", flush=True)
        result |= {f"rpo_vs_trl_{length}": trl / mean[0], f"full_vs_trl_{length}": trl / full[0]}
    result |= {"rpo_vs_trl": result[f"rpo_vs_trl_{args.lengths[0]}"],
               "full_vs_trl": result[f"full_vs_trl_{args.lengths[0]}"]}
    print(json.dumps({key: round(value, 2) for key, value in result.items()}))


if __name__ == "__main__":
    main()
