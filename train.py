"""Fine-tune a reasoning model by reinforcement learning from cached reasoning prefixes (RPO, 2601.19404).

    python train.py @presets/tiny.args                       the embedded default, minutes on 2 CPU cores
    python train.py --model Qwen2.5-Math-1.5B --algo dapo    one 80 GB GPU
    python train.py @presets/tiny.args --rollout full        the same loop with full paths: plain DAPO

An argument @FILE is replaced by the options in that file; later options win.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, logging

import cache
import data
import rewards
import rollout
import rpo
from data import DEFAULT_DATA, INSTRUCTION
from eval import evaluate


def option(default, text: str, choices: tuple[str, ...] | None = None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every option; defaults for a 1.5B model on one 80 GB GPU. None: set by the algorithm or the rollout."""

    # model and problems
    model: str = option("Qwen2.5-Math-1.5B", "policy: a folder, a hub id, or a short name")
    data: str = option("", "training problems: .jsonl, .json, or a hub data set owner/name[:file]; empty: "
                           f"train.jsonl in the model folder if there, else {DEFAULT_DATA}")
    eval_data: str = option("", "held-out problems; empty: test.jsonl in the model folder, or part of --data")
    eval_problems: int = option(128, "number of held-out problems; 0: all of --eval-data")
    instruction: str = option(INSTRUCTION, "what the prompt asks for besides the question")
    instruction_role: str = option("system", "turn that holds the instruction", ("system", "user"))
    max_prompt: int = option(1024, "tokens; problems with longer prompts are dropped")
    max_response: int = option(3072, "tokens; with --max-prompt the 4096 that Qwen2.5-Math can hold")
    # the method
    algo: str = option("dapo", "policy-gradient objective", tuple(rpo.ALGORITHMS))
    rollout: str = option("rpo", "rpo: suffixes of cached paths; full: full paths", ("rpo", "full"))
    steps: int = option(300, "rounds of rollout and update")
    problems_per_step: int = option(64, "groups per step (B)")
    group_size: int = option(8, "suffixes per problem (G)")
    max_cut: str = option("300", "longest cut L: tokens (300), or a fraction of the shortest response of the "
                                 "problem's last group (0.5)")
    epsilon: float = option(0.5, "probability that a group's best response is cached, else another one is")
    length_reward: float | None = option(None, "alpha of the length-aware reward, 0: off; unset: 0.01 with "
                                               "rpo, off with full, as in the paper's best rows")
    cache_init_chunk: int = option(512, "problems whose first path is sampled at once, ahead of their first "
                                        "visit; 0: all before the first step")
    temperature: float = option(1.0, "of the sampling and of the log-probs")
    top_p: float = option(1.0, "nucleus; below 1 the ratio is biased")
    top_k: int = option(0, "most likely tokens kept, 0: all; above 0 the ratio is biased")
    # the objective: unset values come from the algorithm's row in rpo.ALGORITHMS
    clip_low: float | None = option(None, "lower clip of the ratio, 1 - clip_low; unset: 0.2")
    clip_high: float | None = option(None, "upper clip, 1 + clip_high; unset: grpo 0.2, dapo 0.28")
    aggregation: str | None = option(None, "mean over all tokens or over responses; unset: grpo response, "
                                           "dapo token", ("token", "response"))
    dynamic_rounds: int | None = option(None, "most sampling rounds to fill a step with groups of mixed "
                                              "accuracy; unset: grpo 1 (no filling), dapo 10")
    kl_coef: float = option(0.0, "weight of the KL penalty to the initial policy; 0: no reference model")
    updates_per_rollout: int = option(1, "optimiser updates per step, each on its share of the groups")
    # the optimiser
    lr: float = option(1e-6, "learning rate of AdamW")
    warmup_steps: int = option(10, "updates of linear warm-up")
    weight_decay: float = option(0.1, "of the matrices")
    grad_clip: float = option(1.0, "largest gradient norm")
    # the machine
    device: str = option("auto", "auto: cuda if there, else cpu")
    dtype: str = option("auto", "of computation; weights stay float32; auto: bfloat16 on cuda, else float32",
                        ("auto", "float32", "bfloat16"))
    tokens_per_forward: int = option(16384, "packed tokens of a micro-batch; the gradient is the same")
    gradient_checkpointing: bool = option(True, "compute layers again in the backward pass: less memory")
    rollout_memory: float = option(0.0, "GiB for keys and values; 0: half of a free GPU, 1/4 of a CPU's")
    # the run
    eval_every: int = option(50, "steps between evaluations, also at start and end; 0: never")
    save_every: int = option(50, "steps between saves of the policy, also at the end; 0: only at the end")
    out: str = option("", "run folder; empty: runs/MODEL-ALGO-ROLLOUT-DATE-TIME")
    seed: int = option(0, "of everything random")


ROLLOUTS = {"rpo": {"length_reward": 0.01}, "full": {"length_reward": 0.0}}
# randomness is a function of (seed, step, purpose, problem), so that nothing depends on what was drawn before
ORDER, CUT, SAMPLE, INIT, UPDATE = range(5)


def parse_config(arguments: Sequence[str]) -> Config:
    """Command line to Config; ends the program with one sentence and code 2 where it is wrong."""
    parser = argparse.ArgumentParser("train.py", description=__doc__, fromfile_prefix_chars="@",
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    kinds = {"str": str, "int": int, "float": float}
    for item in dataclasses.fields(Config):
        kind = item.type.split(" | ")[0]
        how = {"action": argparse.BooleanOptionalAction} if kind == "bool" else \
            {"type": kinds[kind], "choices": item.metadata["choices"]}
        default = "unset" if item.default is None else "empty" if item.default == "" else item.default
        parser.add_argument(flag_of(item.name), default=item.default, **how,
                            help=f"{item.metadata['help']} (default: {default})".replace("%", "%%"))
    config = Config(**vars(parser.parse_args(arguments)))
    try:
        return check_config(config)
    except ValueError as error:
        parser.error(str(error))


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_config(config: Config) -> Config:
    """Fill in what the algorithm and the rollout set. Raises ValueError for impossible values."""
    settings = rpo.ALGORITHMS[config.algo] | ROLLOUTS[config.rollout]
    config = dataclasses.replace(config, **{k: v for k, v in settings.items() if getattr(config, k) is None})
    cache.parse_max_cut(config.max_cut)
    # numbers are at least 0; some at least 1 (a group of one has no advantage: 2), above 0, or at most 1
    least = {"group_size": 2} | dict.fromkeys(("steps", "problems_per_step", "max_prompt", "max_response",
                                               "dynamic_rounds", "updates_per_rollout",
                                               "tokens_per_forward"), 1)
    positive, at_most_1 = ("lr", "temperature", "grad_clip", "top_p"), ("epsilon", "clip_low", "top_p")
    for name, value in vars(config).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = least.get(name, 0), 1 if name in at_most_1 else float("inf")
            if not low <= value <= high or value == float("inf") or value == 0 and name in positive:
                bounds = f"above {low}" if name in positive else f"of at least {low}"
                raise ValueError(f"{flag_of(name)} {value}: give a number {bounds}"
                                 + (" and at most 1" if high == 1 else ""))
    if config.updates_per_rollout > config.problems_per_step:
        raise ValueError(f"--updates-per-rollout {config.updates_per_rollout}: every update needs a problem, "
                         f"and --problems-per-step is {config.problems_per_step}")
    cuda = config.device.startswith("cuda") and torch.cuda.is_available()
    if config.device not in ("auto", "cpu") and not cuda:
        raise ValueError(f"--device {config.device}: there is no such device here; give auto, cpu or cuda")
    return config


# ----------------------------------------------------------------------------------------------- set-up


@dataclass
class Run:
    """What the loop works on."""

    config: Config
    out: Path
    device: torch.device
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    problems: list[data.Problem]
    prompts: dict[str, list[int]]  # by problem id
    held_out: list[data.Problem]
    model: PreTrainedModel
    ref_model: PreTrainedModel | None
    eos: tuple[int, ...]
    memory: float
    checker: rewards.Checker
    entries: dict[str, cache.Entry] = dataclasses.field(default_factory=dict)
    position: int = 0  # problems visited so far
    tokens_generated: int = 0  # cache initialisation included, evaluation not
    tokens_full_path: int = 0  # what full paths would have needed for the same responses
    tokens_per_forward: int = 0  # of the config, until the memory does not hold it

    def __post_init__(self) -> None:
        self.tokens_per_forward = self.config.tokens_per_forward

    def rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, *key))

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sampling(self) -> rollout.Sampling:
        c = self.config
        return rollout.Sampling(self.eos, len(self.tokenizer), c.temperature, c.top_p, c.top_k)


def prepare(config: Config) -> Run:
    """Everything that can go wrong goes wrong here, the cheap things first. Raises ValueError or OSError."""
    now = time.strftime("%Y%m%d-%H%M%S")
    out = Path(config.out or f"runs/{Path(config.model).name}-{config.algo}-{config.rollout}-{now}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: holds another run or other files; give a new folder")
    folder = None if config.data else data.find_model(config.model)  # a wrong file is said before a download
    problems, held_out = split_problems(config, Path(config.model))
    folder = folder or data.find_model(config.model)
    check_disk(out, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = data.encode_prompts(problems + held_out, tokenizer, config.instruction, config.instruction_role,
                                  config.max_prompt)
    problems, held_out = ([p for p in part if p.id in prompts] for part in (problems, held_out))
    if not problems or config.eval_every and not held_out:
        raise ValueError(f"--data, --eval-data: no problem left: {len(problems)} to train on and "
                         f"{len(held_out)} held out; look at what was dropped, and at --max-prompt "
                         f"{config.max_prompt}")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    model = rpo.load_policy(folder, device)
    window = getattr(model.config, "max_position_embeddings", None)
    if window and config.max_prompt + config.max_response > window:
        raise ValueError(f"--max-prompt {config.max_prompt} and --max-response {config.max_response}: "
                         f"together more than the {window} positions of {config.model}; lower one of them")
    memory = config.rollout_memory or rollout.default_memory(device)
    rollout.slots(model.config, config.max_prompt + config.max_response, config.max_response,
                  config.group_size, memory, rpo.is_shared(model))
    ref_model = rpo.load_policy(folder, device, dtype) if config.kl_coef > 0 else None
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.top_p < 1 or config.top_k:
        tqdm.write("note: --top-p and --top-k cut what is sampled, not the log-probs: the ratio is biased")
    eos = data.eos_ids(tokenizer, model.generation_config.eos_token_id)
    return Run(config, out, device, dtype, tokenizer, problems, prompts, held_out, model, ref_model, eos,
               memory, rewards.Checker(loose=False))


def split_problems(config: Config, folder: Path) -> tuple[list[data.Problem], list[data.Problem]]:
    """Training and held-out problems; without an evaluation source some training problems are held out."""
    def load(given: str, flag: str, beside: str, otherwise: str) -> list[data.Problem]:
        source = given or (str(folder / beside) if (folder / beside).exists() else otherwise)
        return data.load_problems(source, flag, rewards.extract_answer, rewards.parse_error) if source else []

    problems = load(config.data, "--data", "train.jsonl", DEFAULT_DATA)
    if config.eval_every == 0:
        return problems, []
    held_out = load(config.eval_data, "--eval-data", "test.jsonl", "")
    if held_out:
        return problems, held_out[:config.eval_problems or None]
    count = min(config.eval_problems, len(problems) // 2)
    order = np.random.default_rng((config.seed, 0, ORDER)).permutation(len(problems))
    return [problems[i] for i in sorted(order[count:])], [problems[i] for i in order[:count]]


def check_disk(out: Path, folder: Path) -> None:
    """A save writes the policy in float32 beside the one before it. Raises ValueError without that room."""
    weights = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            weights += sum(int(np.prod(tensors.get_slice(key).get_shape())) for key in tensors.keys())
    need = 2 * 4 * weights + 2**24  # and the cache, the logs
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < need:
        raise ValueError(f"--out {out}: not enough disk for a checkpoint, {need / 2**20:.0f} MiB are needed "
                         f"and {free / 2**20:.0f} MiB are free; make room or give another folder")


# ---------------------------------------------------------------------------------------------- rollout


def problem_at(run: Run, position: int) -> data.Problem:
    """The problems in a new random order every epoch."""
    epoch, place = divmod(position, len(run.problems))
    return run.problems[run.rng(epoch, ORDER).permutation(len(run.problems))[place]]


def fill_cache(run: Run, visits_left: int) -> None:
    """Sample a first path for the next problems that have none (eq. 1): no filter on correctness."""
    ahead = (problem_at(run, run.position + i) for i in range(min(visits_left, len(run.problems))))
    missing = {p.id: p for p in ahead if p.id not in run.entries}
    todo = list(missing.values())[:run.config.cache_init_chunk or None]
    for start in range(0, len(todo), 512):  # saved at once, part by part
        part = todo[start:start + 512]
        groups = sample_groups(run, [(p, []) for p in part], 1, (0, INIT), "cache initialisation")
        for group in groups:
            path = group.responses[0]
            run.entries[group.problem.id] = cache.Entry(path, group.rewards[0], len(path), 0)
        cache.save(run.entries, run.out / "cache.jsonl")


def sample_groups(run: Run, work: list[tuple[data.Problem, list[int]]], group_size: int, key: tuple[int, int],
                  label: str) -> list[rollout.Group]:
    """Continue each (problem, prefix) `group_size` times and reward the whole responses."""
    c = run.config
    requests = [rollout.Request(run.prompts[p.id] + prefix, c.max_response - len(prefix),
                                [(c.seed, *key, int(p.id, 16), row) for row in range(group_size)])
                for p, prefix in work]
    with run.autocast():
        results = rollout.generate(run.model, requests, run.sampling(), run.memory, label)
    groups = [rollout.Group(p, run.prompts[p.id], prefix, suffixes)
              for (p, prefix), suffixes in zip(work, results)]
    texts = [run.tokenizer.batch_decode(group.responses, skip_special_tokens=True) for group in groups]
    flags = iter(run.checker.check([(t, g.problem.answer) for g, row in zip(groups, texts) for t in row]))
    for group in groups:
        group.accuracy = [float(next(flags)) for _ in group.suffixes]
        lengths = [len(r) for r in group.responses]
        group.rewards = rewards.length_rewards(group.accuracy, lengths, c.length_reward)
        run.tokens_generated += sum(len(s.ids) for s in group.suffixes)
        run.tokens_full_path += sum(map(len, group.responses)) if key[1] == SAMPLE else 0
    return groups


def collect(run: Run, step: int) -> tuple[list[rollout.Group], list[rollout.Group]]:
    """(all groups sampled, groups to train on).

    Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): groups whose accuracy does not differ are replaced by
    further problems, for at most `dynamic_rounds` rounds.
    """
    c = run.config
    sampled: list[rollout.Group] = []
    kept: list[rollout.Group] = []
    for _ in range(c.dynamic_rounds):
        work = []
        for _ in range(c.problems_per_step - len(kept)):
            problem, prefix = problem_at(run, run.position), []
            if c.rollout == "rpo":
                if problem.id not in run.entries:
                    fill_cache(run, (c.steps - step + 1) * c.problems_per_step)
                # position, not only the step: dynamic sampling can meet a problem twice in a step
                rng = run.rng(step, CUT, run.position)
                prefix = cache.cut(run.entries[problem.id], cache.parse_max_cut(c.max_cut), rng)
            work.append((problem, prefix))
            run.position += 1
        groups = sample_groups(run, work, c.group_size, (step, SAMPLE), "rollout")
        sampled += groups
        kept += [g for g in groups if len(set(g.accuracy if c.dynamic_rounds > 1 else g.rewards)) > 1]
        if len(kept) == c.problems_per_step:
            break
    return sampled, kept


def update_cache(run: Run, groups: list[rollout.Group], step: int) -> None:
    """Every visited problem, those without a gradient too."""
    for index, group in enumerate(groups):
        pick = cache.choose(group.rewards, run.config.epsilon, run.rng(step, UPDATE, index))
        responses = group.responses
        shortest = min(map(len, responses))
        run.entries[group.problem.id] = cache.Entry(responses[pick], group.rewards[pick], shortest, step)
    cache.save(run.entries, run.out / "cache.jsonl")


# ----------------------------------------------------------------------------------------------- update


def make_items(groups: list[rollout.Group]) -> list[rpo.Item]:
    return [rpo.Item(g.prompt_ids + g.prefix_ids, [s.ids for s in g.suffixes],
                     rpo.group_advantages(g.rewards), [s.logprobs for s in g.suffixes]) for g in groups]


def update_policy(run: Run, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler,
                  groups: list[rollout.Group]) -> dict[str, float]:
    """`updates_per_rollout` optimiser updates, each on its share of the groups; metrics of them together."""
    c = run.config
    items = make_items(groups)
    shares = [items[i::c.updates_per_rollout] for i in range(min(c.updates_per_rollout, len(items)))]
    run.model.train()  # gradient checkpointing works in train mode only; there is no dropout
    # all before the first update, which is on-policy: there its own forward gives the old log-probs
    shares = [shares[0], *(with_logprobs(run, share, old_logprobs=run.model) for share in shares[1:])]
    if run.ref_model is not None:
        shares = [with_logprobs(run, share, ref_logprobs=run.ref_model) for share in shares]
    sums, gap_max = Counter(), 0.0
    for share in shares:
        stats, gap = smaller_if_out_of_memory(run, accumulate_gradient, run, share)
        sums.update(stats)
        gap_max = max(gap_max, gap)
        sums["norm"] += float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), c.grad_clip))
        optimizer.step()
        optimizer.zero_grad()
        lr = scheduler.get_last_lr()[0]
        scheduler.step()
    run.model.eval()
    tokens = sums["tokens"]
    return {"policy/entropy": sums["entropy"] / tokens, "policy/clip_fraction": sums["clipped"] / tokens,
            "policy/approx_kl": sums["approx_kl"] / tokens, "policy/kl_ref": sums["kl_ref"] / tokens,
            "policy/grad_norm": sums["norm"] / len(shares), "policy/lr": lr,
            "policy/sampling_gap_mean": sums["gap"] / tokens, "policy/sampling_gap_max": gap_max,
            "tokens/trained": tokens, "tokens/forwarded": sums["forwarded"]}


def accumulate_gradient(run: Run, items: list[rpo.Item]) -> tuple[Counter, float]:
    """Gradient of one update, micro-batch by micro-batch; sums over its tokens, largest sampling gap."""
    c = run.config
    run.model.zero_grad()
    denominator = rpo.update_denominator(items, c.aggregation)
    sums, gap_max = Counter(), 0.0
    for part in rpo.micro_batches(items, run.tokens_per_forward):
        batch = rpo.pack(part, run.device)
        with run.autocast():
            logprobs, entropy = logprobs_of(run, run.model, batch)
            loss, stats = rpo.policy_loss(logprobs, batch, denominator, clip_low=c.clip_low,
                                          clip_high=c.clip_high, aggregation=c.aggregation, kl_coef=c.kl_coef)
        loss.backward()
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        gap = (old - batch.sampled_logprobs)[batch.mask].abs()
        gap_max = max(gap_max, gap.max().item())
        sums.update(stats)
        sums.update(tokens=len(gap), entropy=entropy.sum().item(), gap=gap.sum().item(),
                    forwarded=batch.input_ids.numel())
    return sums, gap_max


@torch.no_grad()
def with_logprobs(run: Run, items: list[rpo.Item], **models: PreTrainedModel) -> list[rpo.Item]:
    """The items, those too long for a micro-batch in pieces, with the log-probs that a model gives them."""
    (name, model), = models.items()

    def pieces() -> list[rpo.Item]:
        done = []
        for part in rpo.micro_batches(items, run.tokens_per_forward):
            batch = rpo.pack(part, run.device)
            with run.autocast():
                logprobs, _ = logprobs_of(run, model, batch)
            rows = iter(logprobs.tolist())
            for item in part:
                own = [next(rows)[:len(suffix)] for suffix in item.suffixes]
                done.append(dataclasses.replace(item, **{name: own}))
        return done
    return smaller_if_out_of_memory(run, pieces)


def smaller_if_out_of_memory(run: Run, work: Callable, *args: object) -> object:
    """work(*args), once more with half the tokens per forward if the device's memory does not hold it."""
    try:
        return work(*args)
    except torch.OutOfMemoryError:
        if run.tokens_per_forward < run.config.tokens_per_forward:
            raise  # that was with the half already
    torch.cuda.empty_cache()  # here, not above: the error holds on to the tensors of the failed try
    run.tokens_per_forward //= 2
    tqdm.write(f"out of memory: --tokens-per-forward {run.config.tokens_per_forward} is halved to "
               f"{run.tokens_per_forward} from here on, the gradient is the same")
    return work(*args)


def logprobs_of(run: Run, model: PreTrainedModel, batch: rpo.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return rpo.shared_logprobs(model, batch, run.config.temperature, len(run.tokenizer))


# -------------------------------------------------------------------------------------------------- log


def rollout_metrics(sampled: list[rollout.Group], kept: list[rollout.Group]) -> dict[str, float]:
    def mean(values: Iterator) -> float:
        return float(np.mean(list(values)))

    return {"reward/mean": mean(r for g in sampled for r in g.rewards),
            "reward/accuracy": mean(a for g in sampled for a in g.accuracy),
            "group/zero_std_fraction": mean(len(set(g.accuracy)) == 1 for g in sampled),
            "group/sampled": len(sampled), "group/trained": len(kept),
            "response/length": mean(len(r) for g in sampled for r in g.responses),
            "response/prefix_length": mean(len(g.prefix_ids) for g in sampled),
            "response/suffix_length": mean(len(s.ids) for g in sampled for s in g.suffixes),
            "response/finished_fraction": mean(s.finished for g in sampled for s in g.suffixes)}


def write_samples(run: Run, groups: list[rollout.Group], step: int, count: int = 2) -> None:
    """A few whole responses with the seam visible: prefix and suffix are fields of their own."""
    with open(run.out / "samples.jsonl", "a") as file:
        for group in groups[:count]:
            suffix = group.suffixes[0].ids
            prompt, prefix, text = run.tokenizer.batch_decode([group.prompt_ids, group.prefix_ids, suffix])
            record = {"step": step, "id": group.problem.id, "prompt": prompt, "prefix": prefix,
                      "suffix": text, "answer": group.problem.answer, "accuracy": group.accuracy[0],
                      "reward": group.rewards[0], "suffix_tokens": len(suffix)}
            file.write(json.dumps(record) + "\n")


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def append_json(path: Path, record: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def save_policy(run: Run) -> None:
    """Policy and tokenizer in hub format, float32; the save before goes only when the new one is whole."""
    new, final, old = (run.out / name for name in ("policy.tmp", "policy", "policy.old"))
    shutil.rmtree(new, ignore_errors=True)
    run.model.save_pretrained(new)
    run.tokenizer.save_pretrained(new)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    shutil.rmtree(old, ignore_errors=True)


def evaluate_policy(run: Run, step: int) -> dict[str, float]:
    with run.autocast():
        prompts = [run.prompts[p.id] for p in run.held_out]
        result = evaluate(run.model, run.tokenizer, run.held_out, prompts, run.checker,
                          run.config.max_response, run.memory, run.eos)
    tqdm.write(f"step {step}: pass@1 {result.accuracy:.3f} on {result.problems} held-out problems (greedy, "
               f"full path; mean response {result.length_mean:.0f} tokens, "
               f"{result.finished_fraction:.0%} finished; {result.seconds:.0f} s)")
    return {"eval/accuracy": result.accuracy, "eval/length": result.length_mean,
            "eval/finished_fraction": result.finished_fraction, "time/eval_s": result.seconds}


# ------------------------------------------------------------------------------------------------- loop


def train(run: Run) -> dict[str, float]:
    """The loop: suffix rollout <-> policy-gradient update. Returns the summary."""
    c = run.config
    matrices = [p for p in run.model.parameters() if p.ndim >= 2]
    others = [p for p in run.model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=c.lr)
    warmup = max(1, c.warmup_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / warmup))
    metrics_file = run.out / "metrics.jsonl"
    start = time.perf_counter()
    eval_seconds, short_steps = 0.0, 0
    accuracy = {}
    if c.eval_every:
        evaluation = evaluate_policy(run, 0)
        accuracy[0], eval_seconds = evaluation["eval/accuracy"], evaluation["time/eval_s"]
        append_json(metrics_file, {"step": 0, **evaluation})
    bar = tqdm(range(1, c.steps + 1), desc=f"{c.algo} {c.rollout}", unit="step")
    for step in bar:
        before, tokens_before = time.perf_counter(), run.tokens_generated
        run.checker.timeouts = run.checker.refused = run.checker.check_ms_max = 0
        sampled, kept = collect(run, step)
        rollout_seconds = time.perf_counter() - before
        metrics = {"step": step, **rollout_metrics(sampled, kept)}
        before = time.perf_counter()
        if kept:
            metrics |= update_policy(run, optimizer, scheduler, kept)
        metrics["time/update_s"] = time.perf_counter() - before
        if c.rollout == "rpo":
            update_cache(run, sampled, step)
            metrics["cache/entries"] = len(run.entries)
            metrics["cache/reward"] = float(np.mean([e.reward for e in run.entries.values()]))
        write_samples(run, sampled, step)
        if c.dynamic_rounds > 1 and len(kept) < c.problems_per_step:
            short_steps += 1
            if short_steps <= 3:
                tqdm.write(f"step {step}: {len(kept)} of {c.problems_per_step} groups have mixed accuracy "
                           f"after {c.dynamic_rounds} rounds (--dynamic-rounds): trained on those"
                           + ("; from now on only counted" if short_steps == 3 else ""))
        step_tokens = run.tokens_generated - tokens_before
        metrics |= {"reward/timeouts": run.checker.timeouts, "reward/refused": run.checker.refused,
                    "reward/check_ms_max": run.checker.check_ms_max,
                    "tokens/generated": run.tokens_generated, "tokens/full_path": run.tokens_full_path,
                    "tokens/per_s": step_tokens / rollout_seconds, "time/rollout_s": rollout_seconds,
                    "memory/peak_gib": peak_memory_gib(run.device)}
        if c.save_every and step % c.save_every == 0 or step == c.steps:
            save_policy(run)  # before the evaluation: a failure there must not lose it
        if c.eval_every and (step % c.eval_every == 0 or step == c.steps):
            metrics |= evaluate_policy(run, step)
            accuracy[step] = metrics["eval/accuracy"]
            eval_seconds += metrics["time/eval_s"]
        metrics["time/total_s"] = time.perf_counter() - start
        append_json(metrics_file, metrics)
        bar.set_postfix_str("reward {reward/mean:.2f} accuracy {reward/accuracy:.2f} suffix "
                            "{response/suffix_length:.0f} {tokens/per_s:.0f} tok/s".format(**metrics))
    seconds = time.perf_counter() - start
    return {"accuracy_before": accuracy.get(0), "accuracy_after": accuracy.get(c.steps), "steps": c.steps,
            "tokens_generated": run.tokens_generated, "tokens_full_path": run.tokens_full_path,
            "seconds": seconds, "seconds_without_evaluation": seconds - eval_seconds,
            "short_steps": short_steps}


def print_summary(summary: dict[str, float], run: Run) -> None:
    ratio = summary["tokens_generated"] / summary["tokens_full_path"]
    if summary["accuracy_after"] is not None:
        print(f"pass@1 on {len(run.held_out)} held-out problems: {summary['accuracy_before']:.3f} -> "
              f"{summary['accuracy_after']:.3f}")
    print(f"tokens generated: {summary['tokens_generated']:,}, cache initialisation included; full paths of "
          f"the measured length: {summary['tokens_full_path']:,} ({1 - ratio:.1%} fewer)")
    print(f"seconds: {summary['seconds']:.0f}, of them training {summary['seconds_without_evaluation']:.0f}")
    print(f"run folder: {run.out} (policy/, metrics.jsonl, samples.jsonl, summary.json)")


def main(arguments: Sequence[str] | None = None) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = parse_config(sys.argv[1:] if arguments is None else arguments)
    try:
        run = prepare(config)
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    tqdm.write(f"{config.model}: {run.model.num_parameters() / 1e6:.1f} M parameters on {run.device}, "
               f"{run.dtype}; {len(run.problems)} problems, {len(run.held_out)} held out; "
               f"run folder {run.out}")
    try:
        with run.checker:
            summary = train(run)
    except torch.OutOfMemoryError as error:
        print(f"train.py: error: out of memory: lower --tokens-per-forward or --rollout-memory ({error})",
              file=sys.stderr)
        return 1
    (run.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_summary(summary, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
