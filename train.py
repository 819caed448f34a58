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
import fcntl
import functools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
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
    max_cut: str = option("150", "longest cut L: tokens (150), a fraction of the shortest response of the "
                                 "problem's last group (0.5), or adaptive: half of the suffixes succeed")
    cut_tail: float = option(2.0, "L of a step is --max-cut times x or more with chance x ** -tail; 0: never")
    cut_position: str = option("uncertain", "where within L: anywhere alike, or in proportion to the "
                                            "chance of another token there", ("uniform", "uncertain"))
    skip_certain: bool = option(True, "pass over a problem with the policy's chance of repeating its path's "
                                       "last L tokens, not counting those behind a prefix that led nowhere")
    adaptive_low: int = option(8, "smallest L of --max-cut adaptive, tokens")
    adaptive_high: int = option(0, "largest L of --max-cut adaptive, tokens; 0: the whole path")
    adaptive_gain: float = option(1.0, "log L moves by gain * (share of right suffixes - 1/2) a visit")
    max_suffix: str = option("", "longest suffix: tokens (400), a multiple of the cut (1.5); empty: up to "
                                 "--max-response")
    full_every: int = option(0, "every so many visits of a problem sample full paths; 0: never")
    epsilon: float = option(1.0, "probability that a group's best response is cached, else another one is")
    cache_keep_correct: bool = option(True, "never replace a correct cached path by a wrong one")
    cache_init: str = option("policy", "first paths: sampled, or the worked solutions of the data set",
                             ("policy", "solutions"))
    cache_init_chunk: int = option(512, "problems whose first path is sampled at once, ahead of their first "
                                        "visit; 0: all before the first step")
    temperature: float = option(1.0, "of the sampling and of the log-probs")
    top_p: float = option(1.0, "nucleus; below 1 the ratio is biased")
    top_k: int = option(0, "most likely tokens kept, 0: all; above 0 the ratio is biased")
    # the reward: weight * part, summed
    accuracy_weight: float = option(1.0, "of the right answer (1 or 0, or its length-aware value)")
    length_reward: float | None = option(None, "alpha of the length-aware reward, 0: off; unset: 0.01 with "
                                               "rpo, off with full, as in the paper's best rows")
    length_reference: str = option("all", "responses of the group whose mean length is the reference",
                                   ("all", "correct"))
    format_weight: float = option(0.0, "of the thoughts being closed once by </think> on its own line")
    cosine_weight: float = option(0.0, "of a reward that falls with length: right 1 to 0.5, wrong 0 to -0.5")
    overlong_penalty: float | None = option(None, "largest penalty near --max-response; "
                                                  "unset: dapo 1, else 0")
    overlong_buffer: float = option(0.2, "last share of --max-response in which that penalty grows")
    reward_file: str = option("", "Python file with reward(problem, response_text) -> "
                                  "float or dict of floats")
    reward_file_weight: float = option(1.0, "of what it returns")
    # the objective: unset values come from the algorithm's row in rpo.ALGORITHMS
    advantage: str | None = option(None, "of a response in its group", rpo.ADVANTAGES)
    ratio_level: str | None = option(None, "one ratio per token, or per response (gspo)", rpo.RATIO_LEVELS)
    surrogate: str | None = option(None, "clipped objective, or clipped weight of log pi", rpo.SURROGATES)
    clip_low: float | None = option(None, "lower clip of the ratio: 1 - clip_low")
    clip_high: float | None = option(None, "upper clip of the ratio: 1 + clip_high")
    aggregation: str | None = option(None, "what the loss is a mean over", rpo.AGGREGATIONS)
    dynamic_rounds: int | None = option(None, "most sampling rounds to fill a step with groups of mixed "
                                              "accuracy; 1: no filling; unset: dapo 10, else 1")
    kl_coef: float | None = option(None, "weight of the KL penalty to the initial policy; 0: no such model")
    updates_per_rollout: int = option(1, "optimiser updates per step, each on its share of the groups")
    # the optimiser
    lr: float = option(1e-6, "learning rate of AdamW")
    warmup_steps: int = option(10, "steps of linear warm-up")
    lr_decay_steps: float = option(0.0, "steps after which the learning rate is halved, after twice as many "
                                        "it is a third, and so on (inverse time); 0: constant")
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
    save_every: int = option(50, "steps between checkpoints, also at the end; 0: only at the end")
    keep_checkpoints: int = option(1, "the newest so many stay")
    out: str = option("", "run folder, a run in it goes on; empty: runs/MODEL-ALGO-ROLLOUT-DATE-TIME")
    resume: str = option("", "run folder to go on with, with its options")
    resume_override: bool = option(False, "go on although options that change the mathematics differ")
    tensorboard: bool = option(False, "write the metrics for TensorBoard, too (optional package)")
    trust_remote_code: bool = option(False, "run code that the model folder brings")
    seed: int = option(0, "of everything random")


# may differ when a run goes on: the others change the mathematics
FREE = ("steps", "eval_every", "save_every", "keep_checkpoints", "tensorboard", "out", "resume",
        "resume_override")
ROLLOUTS = {"rpo": {"length_reward": 0.01}, "full": {"length_reward": 0.0}}
# randomness is a function of (seed, step, purpose, problem), so that nothing depends on what was drawn before
ORDER, CUT, SAMPLE, INIT, UPDATE, STRETCH = range(6)


def parse_config(arguments: Sequence[str]) -> Config:
    """Command line to Config; ends the program with one sentence and code 2 where it is wrong."""
    parser = argparse.ArgumentParser("train.py", description=__doc__, fromfile_prefix_chars="@",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    kinds = {"str": str, "int": int, "float": float}
    for item in dataclasses.fields(Config):
        kind = item.type.split(" | ")[0]
        how = {"action": argparse.BooleanOptionalAction} if kind == "bool" else \
            {"type": kinds[kind], "choices": item.metadata["choices"]}
        default = "by --algo or --rollout" if item.default is None else item.default or repr(item.default)
        parser.add_argument(flag_of(item.name), **how,
                            help=f"{item.metadata['help']} (default: {default})".replace("%", "%%"))
    parser.add_argument("--print-config", action="store_true",
                        help="print every value and where it comes from, and end")
    given = vars(parser.parse_args(arguments))
    show = given.pop("print_config", False)
    try:
        stored = {}
        if given.get("resume"):
            stored = stored_config(Path(given["resume"]), "--resume") | {"out": given["resume"]}
            stored |= rpo.ALGORITHMS.get(given.get("algo"), {}) | ROLLOUTS.get(given.get("rollout"), {})
        config = check_config(Config(**stored | given))
    except ValueError as error:
        parser.error(str(error))
    if show:
        for name, value in vars(config).items():
            source = "command line" if name in given else "--resume" if name in stored else \
                f"--algo {config.algo}" if name in rpo.ALGORITHMS[config.algo] else \
                f"--rollout {config.rollout}" if name in ROLLOUTS[config.rollout] else "default"
            print(f"{flag_of(name):26s} {value!s:30s} {source}")
        parser.exit()
    return config


def stored_config(out: Path, flag: str) -> dict[str, object]:
    """The options of the run in that folder. Raises ValueError where there is none."""
    try:
        stored = json.loads((out / "config.json").read_text())
        known = {item.name for item in dataclasses.fields(Config)}
        return {name: value for name, value in stored.items() if name in known}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{flag} {out}: holds no run (config.json: {error}); "
                         "give the folder of one") from error


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_config(config: Config) -> Config:
    """Fill in what the algorithm and the rollout set. Raises ValueError for impossible values."""
    settings = rpo.ALGORITHMS[config.algo] | ROLLOUTS[config.rollout]
    config = dataclasses.replace(config, **{k: v for k, v in settings.items() if getattr(config, k) is None})
    cache.parse_max_cut(config.max_cut)
    cache.parse_max_suffix(config.max_suffix)
    # numbers are at least 0; some at least 1 (a group of one has no advantage: 2), above 0, or at most 1
    least = {"group_size": 2} | dict.fromkeys(("steps", "problems_per_step", "max_prompt", "max_response",
                                               "dynamic_rounds", "updates_per_rollout", "tokens_per_forward",
                                               "adaptive_low", "keep_checkpoints"), 1)
    positive = ("lr", "temperature", "grad_clip", "top_p", "overlong_buffer")
    at_most_1 = ("epsilon", "clip_low", "top_p", "overlong_buffer")
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
    if 0 < config.adaptive_high < config.adaptive_low:
        raise ValueError(f"--adaptive-high {config.adaptive_high}: give 0 or at least --adaptive-low "
                         f"{config.adaptive_low}")
    cuda = config.device.startswith("cuda") and torch.cuda.is_available()
    if config.device not in ("auto", "cpu") and not cuda:
        raise ValueError(f"--device {config.device}: there is no such device here; give auto, cpu or cuda")
    return config


# ----------------------------------------------------------------------------------------------- set-up


@dataclass
class Progress:
    """What changes while a run goes on, besides weights, optimiser and cache; part of every checkpoint."""

    step: int = 0
    position: int = 0  # problems visited so far
    tokens_generated: int = 0  # cache initialisation included, evaluation not
    tokens_full_path: int = 0  # what full paths would have needed for the same responses
    tokens_per_forward: int = 0  # of the config, until the memory does not hold it
    memory: float = 0.0  # GiB for keys and values, likewise
    halved: list[str] = dataclasses.field(default_factory=list)  # which of those two
    short_steps: int = 0  # steps that dynamic sampling did not fill
    skipped_in_a_row: int = 0  # updates whose gradient was not finite
    seconds: float = 0.0
    eval_seconds: float = 0.0
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    metrics: dict = dataclasses.field(default_factory=dict)  # of the last step, before its evaluation
    log_bytes: dict = dataclasses.field(default_factory=dict)  # size of the logs without them


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
    checker: rewards.Checker
    reward_file: rewards.RewardFile | None
    solutions: dict[str, list[int]]  # first paths by problem id, where they are not sampled
    progress: Progress
    checkpoint: Path | None  # the one to go on from
    lock: object  # held while this lives
    board: object = None  # TensorBoard's writer
    entries: dict[str, cache.Entry] = dataclasses.field(default_factory=dict)
    stop: bool = False  # after this step: a signal came
    warned: set[str] = dataclasses.field(default_factory=set)

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
    lock, checkpoint = check_folder(out, config), None
    if lock:
        checkpoint = max(out.glob("checkpoint-*[0-9]"), default=None)
    trust = config.trust_remote_code
    folder = None if config.data else data.find_model(config.model, trust)  # a wrong file before a download
    problems, held_out = split_problems(config, Path(config.model))
    folder = folder or data.find_model(config.model, trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    prompts = data.encode_prompts(problems + held_out, tokenizer, config.instruction, config.instruction_role,
                                  config.max_prompt)
    problems, held_out = ([p for p in part if p.id in prompts] for part in (problems, held_out))
    if not problems or config.eval_every and not held_out:
        raise ValueError(f"--data, --eval-data: no problem left: {len(problems)} to train on and "
                         f"{len(held_out)} held out; look at what was dropped, and at --max-prompt "
                         f"{config.max_prompt}")
    reward_file = rewards.RewardFile(config.reward_file) if config.reward_file else None
    if reward_file:
        reward_file(problems[0], problems[0].solution)  # a mistake in it is better found now
    solutions = data.encode_solutions(problems, tokenizer, config.max_response, "--cache-init",
                                      "their first paths are sampled") \
        if config.cache_init == "solutions" and config.rollout == "rpo" else {}
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    model = rpo.load_policy(checkpoint / "policy" if checkpoint else folder, device, trust_remote_code=trust)
    check_disk(out, model.num_parameters(), config.keep_checkpoints)
    window = getattr(model.config, "max_position_embeddings", None)
    if window and config.max_prompt + config.max_response > window:
        raise ValueError(f"--max-prompt {config.max_prompt} and --max-response {config.max_response}: "
                         f"together more than the {window} positions of {config.model}; lower one of them")
    memory = config.rollout_memory or rollout.default_memory(device)
    rollout.slots(model.config, config.max_prompt + config.max_response, config.max_response,
                  config.group_size, memory, rpo.is_shared(model))
    ref_model = rpo.load_policy(folder, device, dtype, trust) if config.kl_coef > 0 else None
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.top_p < 1 or config.top_k:
        tqdm.write("note: --top-p and --top-k cut what is sampled, not the log-probs: the ratio is biased")
    eos = data.eos_ids(tokenizer, model.generation_config.eos_token_id)
    progress = Progress(tokens_per_forward=config.tokens_per_forward, memory=memory)
    run = Run(config, out, device, dtype, tokenizer, problems, prompts, held_out, model, ref_model, eos,
              rewards.Checker(loose=False), reward_file, solutions, progress, checkpoint, lock)
    if checkpoint:
        restore(run)
    return run


def check_folder(out: Path, config: Config) -> object:
    """The lock of a run to go on with, None for a new one. Raises ValueError where neither can be."""
    if not (out / "config.json").exists():
        if config.resume or out.exists() and (
                not out.is_dir() or {f.name for f in out.iterdir()} - {"lock", "tmp"}):
            raise ValueError(f"--out {out}: holds no run to go on with, but other files; give a new folder")
        return None
    lock = lock_folder(out)
    stored = stored_config(out, "--out")
    changed = [flag_of(name) for name, value in vars(config).items()
               if name not in FREE and stored.get(name) != value]
    if changed and not config.resume_override:
        raise ValueError(f"--out {out}: holds another run, which differs in {', '.join(changed)}; give a new "
                         "folder to start anew, or the same values (--resume takes them over), or "
                         "--resume-override to go on with changed ones")
    return lock


def lock_folder(out: Path) -> object:
    """Held until the file is closed, also by the end of the process, however that comes about."""
    file = open(out / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"--out {out}: another process is training in this folder; wait for its end or give "
                         "another folder") from error
    return file


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
    order = epoch_order(config.seed, 0, len(problems))
    return [problems[i] for i in sorted(order[count:])], [problems[i] for i in order[:count]]


def check_disk(out: Path, parameters: int, keep: int) -> None:
    """A checkpoint is policy and Adam's two states in float32. Raises ValueError if those kept do not fit."""
    size = 12 * parameters + 2**22  # and the cache, the logs
    need = (keep + 1) * size  # an old one goes when the new one is whole
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free + sum(
        f.stat().st_size for f in out.glob("checkpoint*/**/*") if f.is_file())
    if free < need:
        raise ValueError(f"--out {out}: not enough disk for checkpoints, {need / 2**20:.0f} MiB are needed "
                         f"and {free / 2**20:.0f} MiB are free; make room or give another folder")
    tqdm.write(f"checkpoints: {size / 2**20:.0f} MiB each, {keep} kept (--keep-checkpoints)")


# ---------------------------------------------------------------------------------------------- rollout


def problem_at(run: Run, position: int) -> data.Problem:
    """The problems in a new random order every epoch."""
    epoch, place = divmod(position, len(run.problems))
    return run.problems[epoch_order(run.config.seed, epoch, len(run.problems))[place]]


@functools.lru_cache(2)  # asked for problem by problem
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, ORDER)).permutation(count)


def fill_cache(run: Run, visits_left: int) -> None:
    """First paths for the next problems that have none (eq. 1): sampled, no filter on correctness. [RPO-8]"""
    c = run.config
    ahead = (problem_at(run, run.progress.position + i) for i in range(min(visits_left, len(run.problems))))
    missing = {p.id: p for p in ahead if p.id not in run.entries}
    todo = list(missing.values())[:c.cache_init_chunk or None]
    given = [p for p in todo if p.id in run.solutions]
    right = run.checker.check([(p.solution, p.answer) for p in given])
    first = [(p, run.solutions[p.id], float(ok), float(ok)) for p, ok in zip(given, right)]
    groups = sample_groups(run, [plan(run, p) for p in todo if p.id not in run.solutions], 1, (0, INIT),
                           "cache initialisation")
    first += [(g.problem, g.responses[0], g.rewards[0], g.accuracy[0]) for g in groups]
    for problem, path, reward, accuracy in first:
        entry = cache.Entry(path, reward, accuracy > 0, len(path), 0)
        run.entries[problem.id] = steered(c, entry, 0.5)  # which sets the limit and does not move it


def steered(c: Config, entry: cache.Entry, pass_rate: float) -> cache.Entry:
    return cache.steer(entry, pass_rate, c.adaptive_low, c.adaptive_high, c.adaptive_gain) \
        if c.max_cut == "adaptive" else entry


def plan(run: Run, problem: data.Problem, prefix: Sequence[int] = (), cut: int = 0) -> rollout.Group:
    """A group still without suffixes."""
    c = run.config
    room = c.max_response - len(prefix)
    budget = cache.suffix_budget(cut, cache.parse_max_suffix(c.max_suffix), room) if cut else room
    return rollout.Group(problem, run.prompts[problem.id], list(prefix), [], cut, budget)


def sample_groups(run: Run, planned: list[rollout.Group], group_size: int, key: tuple[int, int],
                  label: str) -> list[rollout.Group]:
    """Continue the prefix of each group `group_size` times and reward the whole responses."""
    requests = [rollout.Request(g.prompt_ids + g.prefix_ids, g.budget,
                                [(run.config.seed, *key, int(g.problem.id, 16), row)
                                 for row in range(group_size)]) for g in planned]

    def generate() -> list[list[rollout.Suffix]]:
        with run.autocast():
            return rollout.generate(run.model, requests, run.sampling(), run.progress.memory, label)
    results = smaller_if_out_of_memory(run, "memory", generate)
    groups = [dataclasses.replace(g, suffixes=suffixes) for g, suffixes in zip(planned, results)]
    texts = [run.tokenizer.batch_decode(group.responses, skip_special_tokens=True) for group in groups]
    flags = iter(run.checker.check([(t, g.problem.answer) for g, row in zip(groups, texts) for t in row]))
    for group, row in zip(groups, texts):
        group.accuracy = [float(next(flags)) for _ in row]
        group.rewards, group.parts = reward(run, group, row)
        run.progress.tokens_generated += sum(len(s.ids) for s in group.suffixes)
        run.progress.tokens_full_path += sum(map(len, group.responses)) if key[1] == SAMPLE else 0
    return groups


def reward(run: Run, group: rollout.Group, texts: list[str]) -> tuple[list[float], dict[str, list[float]]]:
    """Rewards of a group's responses: the weighted sum of its parts; parts besides accuracy, unweighted."""
    c, lengths = run.config, [len(r) for r in group.responses]
    shaped = rewards.length_rewards(group.accuracy, lengths, c.length_reward, c.length_reference)
    total, parts = c.accuracy_weight * np.array(shaped), {}

    def add(name: str, weight: float, values: Callable[[], list[float]]) -> None:
        nonlocal total
        if weight:
            parts[name] = values()
            total = total + weight * np.array(parts[name])

    add("format", c.format_weight, lambda: [rewards.format_reward(t) for t in texts])
    add("cosine", c.cosine_weight, lambda: [rewards.cosine_reward(a > 0, n, c.max_response)
                                            for a, n in zip(group.accuracy, lengths)])
    add("overlong", c.overlong_penalty, lambda: [
        rewards.overlong_reward(n, c.max_response, c.overlong_buffer * c.max_response) for n in lengths])
    own = [run.reward_file(group.problem, t) for t in texts] if run.reward_file else []
    for name in sorted({name for row in own for name in row}):
        add(name, c.reward_file_weight, lambda: [row.get(name, 0.0) for row in own])
    return total.tolist(), parts


def collect(run: Run, step: int) -> tuple[list[rollout.Group], list[rollout.Group]]:
    """(all groups sampled, groups to train on).

    Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): groups whose accuracy does not differ are replaced by
    further problems, for at most `dynamic_rounds` rounds.
    """
    c = run.config
    sampled: list[rollout.Group] = []
    kept: list[rollout.Group] = []
    for _ in range(c.dynamic_rounds):
        planned = next_groups(run, step, c.problems_per_step - len(kept))
        groups = sample_groups(run, planned, c.group_size, (step, SAMPLE), "rollout")
        sampled += groups
        kept += [g for g in groups if len(set(g.accuracy if c.dynamic_rounds > 1 else g.rewards)) > 1]
        if len(kept) == c.problems_per_step:
            break
    return sampled, kept


def next_groups(run: Run, step: int, count: int) -> list[rollout.Group]:
    """The next `count` problems, each with a prefix of its cached path unless full paths are due.

    Those that are skipped are left out, but for the last one where all are.
    """
    c, first = run.config, run.progress.position
    problems = [problem_at(run, position) for position in range(first, first + count)]
    while c.rollout == "rpo" and any(p.id not in run.entries for p in problems):
        fill_cache(run, (c.steps - step + 1) * c.problems_per_step)
    run.progress.position += count
    if c.rollout == "full":
        return [plan(run, problem) for problem in problems]
    stretch, planned = cache.stretch_of(c.cut_tail, run.rng(step, STRETCH)), []
    limits = {p.id: cache.longest_cut(run.entries[p.id], cache.parse_max_cut(c.max_cut), stretch)
              for p in problems}
    informed = c.skip_certain or c.cut_position == "uncertain"
    logprobs = path_logprobs(run, limits) if informed else {}
    for position, problem in enumerate(problems, first):
        # position, not only the step: dynamic sampling can meet a problem twice in a step
        rng, entry = run.rng(step, CUT, position), run.entries[problem.id]
        last = position == first + count - 1 and not planned
        if cache.is_full_visit(entry, c.full_every):
            planned.append(plan(run, problem))
            continue
        weights = cache.turns(entry, logprobs[problem.id]) if informed else np.ones(limits[problem.id])
        if c.skip_certain and cache.is_certain(weights, rng) and not last:
            run.progress.tokens_full_path += c.group_size * len(entry.response_ids)
            run.entries[problem.id] = steered(c, entry, 1.0)  # further back next time
            continue
        prefix = cache.cut(entry, np.ones_like(weights) if c.cut_position == "uniform" else weights, rng)
        planned.append(plan(run, problem, prefix, len(entry.response_ids) - len(prefix)))
    return planned


def path_logprobs(run: Run, limits: dict[str, int]) -> dict[str, list[float]]:
    """Of so many last tokens of cached paths, under the policy as it is: one forward, nothing is sampled."""
    items = {}
    for name, limit in limits.items():
        path = run.prompts[name] + run.entries[name].response_ids
        items[name] = rpo.Item(path[:-limit], [path[-limit:]], [0.0], [[0.0] * limit])
    scored = with_logprobs(run, list(items.values()), old_logprobs=run.model)
    by_path = {(tuple(item.context), tuple(item.suffixes[0])): item.old_logprobs[0] for item in scored}
    return {name: by_path[tuple(item.context), tuple(item.suffixes[0])] for name, item in items.items()}


def update_cache(run: Run, groups: list[rollout.Group], step: int) -> None:
    """Every visited problem, those without a gradient too."""
    c = run.config
    for index, group in enumerate(groups):
        entry = run.entries[group.problem.id]
        if group.cut:  # a full path says nothing about the cut
            entry = steered(c, entry, float(np.mean(group.accuracy)))
        run.entries[group.problem.id] = cache.update(
            entry, group.responses, group.rewards, group.accuracy, len(group.prefix_ids), step,
            run.rng(step, UPDATE, index), c.epsilon, c.cache_keep_correct)


# ----------------------------------------------------------------------------------------------- update


OBJECTIVE = ("clip_low", "clip_high", "aggregation", "ratio_level", "surrogate", "kl_coef")


def make_items(groups: list[rollout.Group], advantage: str) -> list[rpo.Item]:
    return [rpo.Item(g.prompt_ids + g.prefix_ids, [s.ids for s in g.suffixes],
                     rpo.group_advantages(g.rewards, advantage), [s.logprobs for s in g.suffixes],
                     budget=g.budget) for g in groups]


def update_policy(run: Run, optimizer: torch.optim.Optimizer,
                  groups: list[rollout.Group]) -> dict[str, float]:
    """`updates_per_rollout` optimiser updates, each on its share of the groups; metrics of them together."""
    c = run.config
    items = make_items(groups, c.advantage)
    shares = [items[i::c.updates_per_rollout] for i in range(min(c.updates_per_rollout, len(items)))]
    run.model.train()  # gradient checkpointing works in train mode only; there is no dropout
    # all before the first update, which is on-policy: there its own forward gives the old log-probs
    shares = [shares[0], *(with_logprobs(run, share, old_logprobs=run.model) for share in shares[1:])]
    if run.ref_model is not None:
        shares = [with_logprobs(run, share, ref_logprobs=run.ref_model) for share in shares]
    sums, gap_max, skipped = Counter(), 0.0, 0
    for share in shares:
        stats, gap = smaller_if_out_of_memory(run, "tokens_per_forward", accumulate_gradient, run, share)
        norm = float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), c.grad_clip))
        if math.isfinite(norm):
            sums.update(stats, norm=norm)
            gap_max = max(gap_max, gap)
            optimizer.step()
            run.progress.skipped_in_a_row = 0
        else:
            skipped += 1
            skip_update(run, share, norm)
        optimizer.zero_grad()
    run.model.eval()
    metrics: dict[str, float] = {"policy/skipped_updates": skipped}
    if tokens := sums["tokens"]:
        means = ("entropy", "clip_fraction", "approx_kl", "kl_ref", "sampling_gap_mean")
        metrics |= {f"policy/{name}": sums[name] / tokens for name in means} | {
            "policy/grad_norm": sums["norm"] / (len(shares) - skipped), "policy/sampling_gap_max": gap_max,
            "tokens/trained": tokens, "tokens/forwarded": sums["forwarded"]}
    return metrics


class Diverged(RuntimeError):
    """Ten updates in a row had no finite gradient."""


def skip_update(run: Run, items: list[rpo.Item], norm: float) -> None:
    """Count an update without a finite gradient and leave its batch for inspection. Raises Diverged."""
    run.progress.skipped_in_a_row += 1
    path = run.out / f"skipped-{run.progress.step + 1}.json"
    path.write_text(json.dumps([dataclasses.asdict(item) for item in items]))
    tqdm.write(f"step {run.progress.step + 1}: gradient norm {norm}: update skipped, its batch is in {path}")
    if run.progress.skipped_in_a_row == 10:
        raise Diverged("ten updates in a row had no finite gradient; the policy is still the one before them")


def accumulate_gradient(run: Run, items: list[rpo.Item]) -> tuple[Counter, float]:
    """Gradient of one update, micro-batch by micro-batch; sums over its tokens, largest sampling gap."""
    c = run.config
    run.model.zero_grad()
    denominator = rpo.update_denominator(items, c.aggregation)
    sums, gap_max = Counter(), 0.0
    for part in rpo.micro_batches(items, run.progress.tokens_per_forward):
        batch, logprobs, entropy = forward(run, run.model, part)
        loss, stats = rpo.policy_loss(logprobs, batch, denominator, **{k: getattr(c, k) for k in OBJECTIVE})
        loss.backward()
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        gap = (old - batch.sampled_logprobs)[batch.mask].abs()
        gap_max = max(gap_max, gap.max().item())
        sums.update(stats)
        sums.update(tokens=len(gap), entropy=entropy.sum().item(), sampling_gap_mean=gap.sum().item(),
                    forwarded=batch.input_ids.numel())
    return sums, gap_max


@torch.no_grad()
def with_logprobs(run: Run, items: list[rpo.Item], **models: PreTrainedModel) -> list[rpo.Item]:
    """The items, those too long for a micro-batch in pieces, with the log-probs that a model gives them."""
    (name, model), = models.items()

    def pieces() -> list[rpo.Item]:
        done = []
        for part in rpo.micro_batches(items, run.progress.tokens_per_forward):
            rows = iter(forward(run, model, part)[1].tolist())
            for item in part:
                own = [next(rows)[:len(suffix)] for suffix in item.suffixes]
                done.append(dataclasses.replace(item, **{name: own}))
        return done
    return smaller_if_out_of_memory(run, "tokens_per_forward", pieces)


def smaller_if_out_of_memory(run: Run, size: str, work: Callable, *args: object) -> object:
    """work(*args), once more with half of that size (a field of Progress) if device memory is too small."""
    try:
        return work(*args)
    except torch.OutOfMemoryError:
        if size in run.progress.halved:
            raise
    torch.cuda.empty_cache()  # here, not above: the error holds on to the tensors of the failed try
    run.progress.halved.append(size)
    before = getattr(run.progress, size)
    setattr(run.progress, size, before // 2 if isinstance(before, int) else before / 2)
    flag = {"memory": "--rollout-memory"}.get(size, flag_of(size))
    tqdm.write(f"out of memory: {flag} {before:.6g} is halved to {getattr(run.progress, size):.6g} from "
               "here on; results are the same")
    return work(*args)


def forward(run: Run, model: PreTrainedModel,
            items: list[rpo.Item]) -> tuple[rpo.Batch, torch.Tensor, torch.Tensor]:
    batch = rpo.pack(items, run.device)
    with run.autocast():
        return batch, *rpo.shared_logprobs(model, batch, run.config.temperature, len(run.tokenizer))


# -------------------------------------------------------------------------------------------------- log


def rollout_metrics(sampled: list[rollout.Group], kept: list[rollout.Group]) -> dict[str, float]:
    def mean(values: Iterator) -> float:
        return float(np.mean(list(values)))

    return {"reward/mean": mean(r for g in sampled for r in g.rewards),
            "reward/accuracy": mean(a for g in sampled for a in g.accuracy),
            **{f"reward/{name}": mean(x for g in sampled for x in g.parts.get(name, []))
               for name in sorted({name for g in sampled for name in g.parts})},
            "group/zero_std_fraction": mean(len(set(g.accuracy)) == 1 for g in sampled),
            "group/sampled": len(sampled), "group/trained": len(kept),
            "response/length": mean(len(r) for g in sampled for r in g.responses),
            "response/cut_length": mean(g.cut for g in sampled),
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


def log_metrics(run: Run, metrics: dict[str, float]) -> None:
    with open(run.out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    for name, value in metrics.items() if run.board else ():
        run.board.add_scalar(name, value, metrics["step"])


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    (path.parent / "tmp").write_text(json.dumps(value, indent=2) + "\n")
    os.replace(path.parent / "tmp", path)


def find_board() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard: the optional package is not installed: "
                         "pip install tensorboard") from error


# ------------------------------------------------------------------------------------------ checkpoints

LOGS = ("metrics.jsonl", "samples.jsonl")


def save_checkpoint(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """A new folder that gets its name when whole; if that fails, the one before stays and it is said."""
    new, final = run.out / "checkpoint.tmp", run.out / f"checkpoint-{run.progress.step:06d}"
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        run.model.save_pretrained(new / "policy")  # hub format, float32
        run.tokenizer.save_pretrained(new / "policy")
        torch.save(optimizer.state_dict(), new / "optimizer.pt")
        cache.save(run.entries, new / "cache.jsonl", cache.fingerprint(run.tokenizer.get_vocab()))
        state = {"progress": dataclasses.asdict(run.progress),
                 "problems": cache.fingerprint(sorted(run.prompts)), "config": dataclasses.asdict(run.config),
                 "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
        (new / "state.json").write_text(json.dumps(state))
        for file in [*new.rglob("*"), new]:
            sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(new, final)
        sync(run.out)
        for name in ("policy", "cache.jsonl"):
            link = run.out / "link.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(f"{final.name}/{name}")
            os.replace(link, run.out / name)
        for old in sorted(run.out.glob("checkpoint-*[0-9]"))[:-run.config.keep_checkpoints]:
            shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk is to torch and safetensors
        shutil.rmtree(new, ignore_errors=True)
        tqdm.write(f"step {run.progress.step}: the checkpoint could not be written ({one_line(error)}); "
                   "the one before is kept, the run goes on")


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def restore(run: Run) -> None:
    """Progress, cache and logs as they were; weights and optimiser are loaded where they are made."""
    state = json.loads((run.checkpoint / "state.json").read_text())
    if state["problems"] != cache.fingerprint(sorted(run.prompts)):
        raise ValueError(f"--resume {run.out}: the problems of --data or --eval-data are not those of "
                         "the run")
    halved = state["progress"]["halved"]
    new = {} if halved else {"tokens_per_forward": run.progress.tokens_per_forward,
                             "memory": run.progress.memory}
    run.progress = Progress(**state["progress"] | new)
    path = run.checkpoint / "cache.jsonl"
    run.entries = cache.load(path, cache.fingerprint(run.tokenizer.get_vocab()), {p.id for p in run.problems},
                             len(run.tokenizer), tqdm.write)


def evaluate_policy(run: Run, step: int) -> dict[str, float]:
    with run.autocast():
        prompts = [run.prompts[p.id] for p in run.held_out]
        start = time.perf_counter()
        result = evaluate(run.model, run.tokenizer, run.held_out, prompts, run.checker,
                          run.config.max_response, run.progress.memory, run.eos)
    result["time/eval_s"] = time.perf_counter() - start
    tqdm.write(f"step {step}: pass@1 {result['eval/accuracy']:.3f} on {len(run.held_out)} held-out problems "
               f"(greedy, full path; mean response {result['eval/length']:.0f} tokens, "
               f"{result['eval/finished_fraction']:.0%} finished; {result['time/eval_s']:.0f} s)")
    return result


# ------------------------------------------------------------------------------------------------- loop


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    c = run.config
    matrices = [p for p in run.model.parameters() if p.ndim >= 2]
    others = [p for p in run.model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=c.lr)
    if run.checkpoint:
        states = torch.load(run.checkpoint / "optimizer.pt", map_location=run.device, weights_only=True)
        optimizer.load_state_dict(states)
    return optimizer


def lr_of(c: Config, step: int) -> float:
    """Learning rate of a step, from 1; not of the number of steps, so that a run can be made longer."""
    rate = c.lr * min(1.0, step / max(1, c.warmup_steps))
    return rate / (1 + step / c.lr_decay_steps) if c.lr_decay_steps else rate


def train(run: Run) -> dict[str, float] | None:
    """The loop: suffix rollout <-> policy-gradient update. Returns the summary, None if a signal ended it."""
    c, progress = run.config, run.progress
    optimizer = make_optimizer(run)
    for name in LOGS:  # lines from after the checkpoint come again
        if (run.out / name).exists():
            os.truncate(run.out / name, progress.log_bytes.get(name, 0))
    start = time.perf_counter() - progress.seconds
    if progress.step:
        finish_step(run, start)
    elif c.eval_every:
        evaluation = evaluate_policy(run, 0)
        progress.accuracy_before = evaluation["eval/accuracy"]
        log_metrics(run, {"step": 0, **evaluation})
    bar = tqdm(range(progress.step + 1, c.steps + 1), desc=f"{c.algo} {c.rollout}", unit="step",
               initial=progress.step, total=c.steps)
    for step in bar:
        before = dataclasses.replace(progress, skipped_in_a_row=0)
        try:
            progress.metrics = train_step(run, step, optimizer)
        except Diverged:
            run.progress = before
            save_checkpoint(run, optimizer)
            raise
        progress.step, progress.seconds = step, time.perf_counter() - start
        progress.log_bytes = {name: os.path.getsize(run.out / name) for name in LOGS
                              if (run.out / name).exists()}
        bar.set_postfix_str(
            "reward {reward/mean:.2f} accuracy {reward/accuracy:.2f} suffix {response/suffix_length:.0f} "
            "{tokens/per_s:.0f} tok/s".format(**progress.metrics))
        if c.save_every and step % c.save_every == 0 or step == c.steps or run.stop:
            save_checkpoint(run, optimizer)  # before the evaluation: its failure must not lose it
        if run.stop:
            return None
        finish_step(run, start)
    seconds = time.perf_counter() - start
    counted = ("accuracy_before", "accuracy_after", "tokens_generated", "tokens_full_path", "short_steps")
    return {name: getattr(progress, name) for name in counted} | {
        "steps": c.steps, "seconds": seconds, "seconds_without_evaluation": seconds - progress.eval_seconds}


def train_step(run: Run, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Rollout, update, cache update; the metrics of the step."""
    c, progress = run.config, run.progress
    before, tokens_before = time.perf_counter(), progress.tokens_generated
    run.checker.timeouts = run.checker.refused = run.checker.check_ms_max = 0
    sampled, kept = collect(run, step)
    rollout_seconds = time.perf_counter() - before
    metrics = {"step": step, **rollout_metrics(sampled, kept)}
    before = time.perf_counter()
    for parameters in optimizer.param_groups:
        parameters["lr"] = metrics["policy/lr"] = lr_of(c, step)
    if kept:
        metrics |= update_policy(run, optimizer, kept)
    metrics["time/update_s"] = time.perf_counter() - before
    if c.rollout == "rpo":
        update_cache(run, sampled, step)
        metrics["cache/entries"] = len(run.entries)
        for name in ("reward", "correct", "limit")[:3 if c.max_cut == "adaptive" else 2]:
            metrics[f"cache/{name}"] = float(np.mean([getattr(e, name) for e in run.entries.values()]))
    write_samples(run, sampled, step)
    if c.dynamic_rounds > 1 and len(kept) < c.problems_per_step:
        progress.short_steps += 1
        if progress.short_steps <= 3:
            tqdm.write(f"step {step}: {len(kept)} of {c.problems_per_step} groups have mixed accuracy "
                       f"after {c.dynamic_rounds} rounds (--dynamic-rounds): trained on those"
                       + ("; from now on only counted" if progress.short_steps == 3 else ""))
    warn_of_collapse(run, metrics)
    return metrics | {
        "reward/timeouts": run.checker.timeouts, "reward/refused": run.checker.refused,
        "reward/check_ms_max": run.checker.check_ms_max, "tokens/generated": progress.tokens_generated,
        "tokens/full_path": progress.tokens_full_path,
        "tokens/per_s": (progress.tokens_generated - tokens_before) / rollout_seconds,
        "time/rollout_s": rollout_seconds, "memory/peak_gib": peak_memory_gib(run.device)}


def finish_step(run: Run, start: float) -> None:
    """Evaluate if that is due, and log the step."""
    c, progress, step = run.config, run.progress, run.progress.step
    metrics = dict(progress.metrics)
    if c.eval_every and (step % c.eval_every == 0 or step == c.steps):
        metrics |= evaluate_policy(run, step)
        progress.accuracy_after = metrics["eval/accuracy"]
        progress.eval_seconds += metrics["time/eval_s"]
    log_metrics(run, metrics | {"time/total_s": time.perf_counter() - start})


# beyond these the policy has probably collapsed: (metric, is it bad?, what it means)
COLLAPSE = [("policy/entropy", lambda x: x < 0.005, "the policy hardly varies any more"),
            ("response/finished_fraction", lambda x: x < 0.1, "nearly all responses run into --max-response"),
            ("group/zero_std_fraction", lambda x: x > 0.98, "hardly a group has right and wrong responses")]


def warn_of_collapse(run: Run, metrics: dict[str, float]) -> None:
    for name, bad, meaning in COLLAPSE:
        if name in metrics and bad(metrics[name]) and name not in run.warned:
            run.warned.add(name)
            tqdm.write(f"warning: step {metrics['step']}: {name} is {metrics[name]:.3g}: {meaning} "
                       "(said once)")


def print_summary(summary: dict[str, float], run: Run) -> None:
    ratio = summary["tokens_generated"] / summary["tokens_full_path"]
    if None not in (summary["accuracy_before"], summary["accuracy_after"]):
        print(f"pass@1 on {len(run.held_out)} held-out problems: {summary['accuracy_before']:.3f} -> "
              f"{summary['accuracy_after']:.3f}")
    print(f"tokens generated: {summary['tokens_generated']:,}, cache initialisation included; full paths of "
          f"the measured length: {summary['tokens_full_path']:,} ({1 - ratio:.1%} fewer)")
    print(f"seconds: {summary['seconds']:.0f}, of them training {summary['seconds_without_evaluation']:.0f}")
    print(f"run folder: {run.out} (policy/, metrics.jsonl, samples.jsonl, summary.json)")


def stop_on_signals(run: Run) -> dict[int, object]:
    """The first SIGINT or SIGTERM ends the run after its step, with a checkpoint; the second one at once.

    Returns the handlers before; none outside the main thread, where signals cannot be handled.
    """
    def handle(number: int, frame: object) -> None:
        if run.stop:
            raise KeyboardInterrupt
        run.stop = True
        tqdm.write("signal: the run ends with a checkpoint after this step; once more: at once, without")

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}


def fail(code: int, message: str) -> int:
    print(f"train.py: error: {message}", file=sys.stderr)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = parse_config(sys.argv[1:] if arguments is None else arguments)
    try:
        board = find_board() if config.tensorboard else None
        run = prepare(config)
        run.out.mkdir(parents=True, exist_ok=True)
        run.lock = run.lock or lock_folder(run.out)
        write_json(run.out / "config.json", dataclasses.asdict(config))
        run.board = board and board(str(run.out / "tensorboard"))
    except (ValueError, OSError) as error:
        return fail(2, one_line(error))
    tqdm.write(f"{config.model}: {run.model.num_parameters() / 1e6:.1f} M parameters on {run.device}, "
               f"{run.dtype}; {len(run.problems)} problems, {len(run.held_out)} held out; "
               f"run folder {run.out}"
               + (f", goes on after step {run.progress.step}" if run.checkpoint else ""))
    handlers = stop_on_signals(run)
    try:
        with run.checker:
            summary = train(run)
            if summary:
                write_json(run.out / "summary.json", summary)
    except rewards.RewardFileError as error:
        return fail(2, one_line(error))
    except Diverged as error:
        return fail(1, f"{error}; checkpoint: {run.out}")
    except OSError as error:  # a log that cannot be written
        return fail(1, f"{one_line(error)}; the checkpoint is whole: go on with --resume {run.out}")
    except torch.OutOfMemoryError as error:
        return fail(1, f"out of memory: lower --tokens-per-forward or --rollout-memory ({one_line(error)})")
    except KeyboardInterrupt:
        summary = None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        run.lock.close()
    if summary is None:
        print(f"stopped after step {run.progress.step}; go on with: "
              f"python train.py --resume {shlex.quote(str(run.out))}")
        return 130
    print_summary(summary, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
