"""Makes everything else in this folder from a seed: problems, tokenizer, warm-started policy.

    python tiny/make.py            # a few minutes on two CPU cores

The policy is an ordinary hub-format Qwen2 model, small enough to be kept in the repository. The problems
are chains of additions with every step written out, so a response is long (200-400 tokens) and every line
needs the same skill. The demonstrations of the supervised warm start forget the carry into the hundreds more
often than not, wherever it comes up, and the policy imitates that: reinforcement learning has work to do.
"""
from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

def make_problem(rng: random.Random, slip: float = 0.0) -> dict[str, str]:
    """One problem with its worked solution. Every line asks for the same, wherever it stands.

    slip: probability of forgetting the carry into the hundreds (497+5=402) and going on from there. Counting
    down makes the end plain to see: counting up, a small model adds without error long before it stops at the
    right line. Two numbers in turn: with one the last digits repeat, and a model that copies need not add.
    """
    count = rng.randint(18, 26)
    addends = rng.sample(range(2, 6), 2)
    start = value = rng.randint(100, 999 - 5 * count)  # all values keep three digits
    lines = []
    for left in range(count, 0, -1):
        addend = addends[(count - left) % 2]
        total = value + addend
        if total // 100 > value // 100 and rng.random() < slip:
            total -= 100
        lines.append(f"{left}:{value}+{addend}={total}")
        value = total
    lines.append(f"\\boxed{{{value}}}")  # as far from the sum as a line is from the one before: copied alike
    # the first line begins as the question ends: what is copied from far away is learnt late
    question = f"Count down to 1, adding {addends[0]} and {addends[1]} in turn, from {count}:{start}"
    return {"problem": question, "answer": str(value), "solution": "\n".join(lines)}


def make_problems(rng: random.Random, n: int, taken: set[str], slip: float = 0.0) -> list[dict[str, str]]:
    """n problems whose questions are not in `taken`; adds their questions to it."""
    problems: list[dict[str, str]] = []
    while len(problems) < n:
        problem = make_problem(rng, slip)
        if problem["problem"] not in taken:
            taken.add(problem["problem"])
            problems.append(problem)
    return problems


def make_tokenizer(problems: list[dict[str, str]], vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE in which every digit is a token and the words of this problem family are one token each.

    Split as Qwen2 splits: AutoTokenizer does that in every Qwen2 folder, whatever its tokenizer.json says.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, START, END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    corpus = [f"system\n{SYSTEM}\nuser\n{p['problem']}\nassistant\n{p['solution']}" for p in problems]
    bpe.train_from_iterator(corpus, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], unk_token=None,
        eos_token=END, pad_token=PAD, additional_special_tokens=[START], chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def encode(tokenizer: Qwen2Tokenizer, problem: dict[str, str]) -> tuple[list[int], list[int]]:
    """Prompt ids as train.py builds them, and the ids of the worked solution with its end token."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem["problem"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    response = tokenizer(problem["solution"], add_special_tokens=False)["input_ids"]
    return prompt, response + [tokenizer.eos_token_id]


def collate(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded input ids and labels, both (B, T); labels are -100 outside the response."""
    width = max(len(p) + len(r) for p, r in pairs)
    ids = torch.full((len(pairs), width), pad_id)
    labels = torch.full((len(pairs), width), -100)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt):end] = torch.tensor(response)
    return ids, labels


@torch.no_grad()
def right_and_logp(model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor):
    """Whether each response token is the most likely one, and its log-prob: (B, T-1); True and 0 elsewhere.

    Greedy decoding follows the worked solution to its end exactly when every token of a row is the most
    likely one, so one forward gives greedy pass@1 without generating.
    """
    right, logps = [], []
    for x, y in zip(ids.split(64), labels.split(64)):
        logits = model(input_ids=x).logits[:, :-1]
        y, inside = y[:, 1:].clamp(min=0), y[:, 1:] >= 0
        logp = logits.log_softmax(-1)
        right.append((logp.argmax(-1) == y) | ~inside)
        logps.append(logp.gather(-1, y[..., None])[..., 0] * inside)
    return torch.cat(right), torch.cat(logps)


def warm_start(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, rng: random.Random, taken: set[str],
               slip: float, short_steps: int, steps: int, batch: int, lr: float) -> None:
    """Supervised steps on fresh demonstrations with slips, none of a problem in `taken`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup, began = 30, time.time()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / warmup, 1 - (step - 1) / steps)
        # The first steps see only the first lines. They cost a third, and the first line, the only one to be
        # copied from the question, gets a share of the loss large enough to be learnt with the others.
        n, width = (2 * batch, 70) if step <= short_steps else (batch, None)
        pairs = [encode(tokenizer, p) for p in make_problems(rng, n, set(taken), slip)]
        ids, labels = collate([(p, r[:width]) for p, r in pairs], tokenizer.pad_token_id)
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
        inside = labels[:, 1:] >= 0
        loss = F.cross_entropy(model.lm_head(hidden[inside]), labels[:, 1:][inside])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}  {time.time() - began:.0f} s", flush=True)


def save_problems(path: Path, problems: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(p) + "\n" for p in problems), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=256, help="problems in train.jsonl")
    parser.add_argument("--test", type=int, default=256, help="problems in test.jsonl, none of them in train")
    parser.add_argument("--slip", type=float, default=0.62, help="share of carries forgotten when shown")
    parser.add_argument("--short-steps", type=int, default=200, help="steps on the first lines of solutions")
    parser.add_argument("--steps", type=int, default=600, help="supervised steps in all")
    parser.add_argument("--batch", type=int, default=16, help="problems per supervised step")
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args(arguments)

    began = time.time()
    torch.manual_seed(args.seed)
    rng, taken = random.Random(args.seed), set()
    train, test = make_problems(rng, args.train, taken), make_problems(rng, args.test, taken)
    args.out.mkdir(parents=True, exist_ok=True)
    save_problems(args.out / "train.jsonl", train)
    save_problems(args.out / "test.jsonl", test)

    tokenizer = make_tokenizer(train, vocab_size=384)
    tokenizer.save_pretrained(args.out, save_jinja_files=False)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # a multiple of 64, as large models have it
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    warm_start(model, tokenizer, rng, taken, args.slip, args.short_steps, args.steps, args.batch, args.lr)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([END, PAD])
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(args.out)

    pairs = [encode(tokenizer, p) for p in test]
    lengths = sorted(len(response) for _, response in pairs)
    right, logp = right_and_logp(model, *collate(pairs, tokenizer.pad_token_id))
    megabytes = (args.out / "model.safetensors").stat().st_size / 1e6
    print(f"{model.num_parameters():,} parameters, {megabytes:.1f} MB; {len(tokenizer)} tokens")
    print(f"{len(train)} train and {len(test)} test problems; responses: {lengths[0]}-{lengths[-1]} tokens")
    greedy, sampled = right.all(-1).float().mean().item(), logp.sum(-1).exp().mean().item()
    print(f"pass@1 on the test problems: greedy {greedy:.3f}, sampled at temperature 1 {sampled:.3f}")
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
