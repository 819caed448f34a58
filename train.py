"""Fine-tune a reasoning model by reinforcement learning from cached reasoning prefixes (RPO, 2601.19404).

    python train.py @presets/tiny.args                       the embedded default, minutes on 2 CPU cores
    python train.py --model Qwen2.5-Math-1.5B --algo dapo    one 80 GB GPU
    python train.py @presets/tiny.args --rollout full        the same loop with full paths: plain DAPO

An argument @FILE is replaced by the options in that file; later options win."""
# What differs from plain GRPO / DAPO, marked where it happens (grep -n "\[RPO-" *.py). --rollout full, where
# prefixes are empty, is plain GRPO / DAPO.
# [RPO-1] the cached path is cut, and only the suffix is sampled           cache.py:cut
# [RPO-2] the prefix is computed once per group, also in the gradient      policy.py:Packed, rollout.py
# [RPO-3] the prefix is never in the loss                                  rpo.py:policy_loss
# [RPO-4] one response of the group replaces the path                      cache.py:choose
# [RPO-5] correct responses shorter than their group's mean earn more      rewards.py:length_rewards
# [RPO-6] the cut is where the policy would leave the path                 cache.py:branch_cuts
# [RPO-7] visits that would repeat the path, or fail again, are skipped    cache.py:fail_probability
# [RPO-8] problems get their first path ahead of their first visit         train.py:first_paths
# [RPO-9] only correct paths are continued, and none of a weak policy      cache.py:GOOD, train.py:cut_paths
# [RPO-10] a path found by whole responses is continued at once             train.py:found
# [RPO-11] a step of few groups and short suffixes counts less             rpo.py:step_weight
from __future__ import annotations

import argparse
import dataclasses
import fcntl
import importlib.util
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
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch.distributed.tensor import distribute_tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, logging

import cache
import data
import rewards
import rollout
import rpo
from answers import Checker
from data import DEFAULT_DATA, INSTRUCTION, Problem
from eval import evaluate, fail
from policy import (Policy, Tree, agreed, device_bytes, device_of, end, gather, join_ranks, load_policy,
                    load_shape, ranks, share, whole_tensors)
from rewards import Group


Paths = dict[str, cache.Entry]  # the experience cache, by problem id
Visit = tuple[Problem, list[int], list[int]]  # a problem, its prompt and the prefix to continue


def option(default, text: str, least: float | tuple[str, ...] = 0):
    """An option; least: the smallest value of a number, or the choices of a text."""
    return field(default=default, metadata={"help": text, "least": least})


@dataclass(frozen=True)
class Config:
    """Every option; defaults for a 1.5B model on one 80 GB GPU. None: set by --algo or --rollout."""
    # model and problems
    model: str = option("Qwen2.5-Math-1.5B", "policy: a folder, a hub id, or a short name")
    data: str = option("", "training problems: .jsonl, .json, or a hub data set owner/name[:file]; empty: "
                           f"train.jsonl in the model folder if there, else {DEFAULT_DATA}")
    eval_data: str = option("", "held-out problems; empty: test.jsonl in the model folder, or part of --data")
    eval_problems: int = option(128, "held-out problems, 0: all; 128 tell 9 points apart in little time")
    instruction: str = option(INSTRUCTION, "what the prompt asks for besides the question; Qwen's wording")
    instruction_role: str = option("system", "chat turn that holds it, as for Qwen", ("system", "user"))
    template_args: str = option("", "JSON for the chat template, such as {\"enable_thinking\": false}")
    problems: int = option(4800, "of --data, drawn by the seed, 0: all; 300 steps of 64 visit each of these "
                                 "four times (the paper's epochs) or more")
    max_prompt: int = option(1024, "tokens; longer prompts, rare in competitions, are dropped", 1)
    max_response: int = option(3072, "tokens; with --max-prompt the 4096 that Qwen2.5-Math can hold", 1)
    # the method
    algo: str = option("dapo", "row of rpo.py:ALGORITHMS; dapo is the paper's best", tuple(rpo.ALGORITHMS))
    rollout: str = option("rpo", "suffixes of cached paths, or full paths to compare with", ("rpo", "full"))
    steps: int = option(300, "rounds of rollout and update; the paper has 292", 1)
    problems_per_step: int = option(64, "groups per step; 512 responses with 8 each, the paper has 576", 1)
    group_size: int = option(8, "suffixes per problem; with 4, tiny ends a point lower", 2)
    max_cut: str = option("300", "L, beyond which cuts are rarer: tokens (300, as in the paper), or a "
                                 "fraction of the shortest response of the last group (0.5)")
    cut_position: str = option("uncertain", "cut where the policy would leave its path, where more than L "
                                            "tokens are left with the chance of L to their number; uniform: "
                                            "among the last L, as in the paper", ("uniform", "uncertain"))
    skip_certain: bool = option(True, "skip a visit as often as the policy would follow its path, or fail "
                                      "again; without, tiny needs 2.5 times the tokens")
    epsilon: float = option(1.0, "chance that the BEST response is cached, not another; 0.5 ends alike")
    prefix_gate: bool = option(True, "continue only correct paths, and none of a weak policy; off, as in the "
                                     "paper, a weak policy gets worse")
    cache_init: str = option("policy", "first paths: sampled, or worked solutions", ("policy", "solutions"))
    cache_init_chunk: int = option(512, "first paths sampled at once, which fills a GPU; 0: all at the start")
    temperature: float = option(1.0, "of sampling and log-probs; 1: the policy itself", 0.01)
    length_reward: float | None = option(None, "alpha of the length-aware reward, 0: off; unset: 0.01 with "
                                               "rpo, 0 with full, the paper's best rows")
    reward_file: str = option("", "file whose reward(problem, texts, lengths, correct) is added, see docs/")
    # the objective; unset: as the row of --algo says
    dynamic_rounds: int | None = option(None, "most rounds of sampling that replace groups all right or all "
                                              "wrong, 1: none; unset: dapo 10, else 1", 1)
    overlong_penalty: float | None = option(None, "largest penalty, growing over the last fifth of "
                                                  "--max-response; unset: dapo 1, else 0")
    kl_coef: float | None = option(None, "weight of the KL penalty to the initial policy, which is then held "
                                         "in memory too; unset: 0, as in later work")
    updates_per_rollout: int = option(1, "optimiser steps, on a share of the groups each; 1 is on-policy", 1)
    # the optimiser
    optimizer: str = option("adamw", "adamw8bit: states of 2 instead of 8 bytes per parameter; needs the "
                                     "package bitsandbytes", ("adamw", "adamw8bit"))
    lr: float = option(1e-6, "learning rate of AdamW; usual from 1.5B to 7B", 1e-12)
    warmup_steps: int = option(10, "steps of linear warm-up, as in DAPO")
    lr_decay_steps: float = option(0.0, "steps until the learning rate is halved, twice as many for a third "
                                        "(inverse time); 0: constant, as is usual")
    weight_decay: float = option(0.1, "of matrices, as in DAPO")
    # the machine
    device: str = option("auto", "auto: cuda if there, else cpu")
    dtype: str = option("auto", "of computation, weights stay float32; auto: bfloat16 on cuda, else float32",
                        ("auto", "float32", "bfloat16"))
    tokens_per_forward: int = option(16384, "tokens of a micro-batch: bounds memory, not the gradient", 1)
    gradient_checkpointing: bool = option(True, "compute layers again in the backward pass, to save memory")
    shard: bool = option(False, "spread weights, gradients and Adam states over the processes (FSDP2), "
                                "for models that do not fit on one card; else slower")
    rollout_memory: float = option(0.0, "GiB for keys and values; 0: most of what is left on a GPU, 1/4 of a "
                                        "CPU's")
    # the run
    eval_every: int = option(50, "steps between evaluations, also at start and end; 0: never")
    save_every: int = option(50, "steps between checkpoints, also at the end; 0: only then")
    keep_checkpoints: int = option(1, "newest checkpoints that stay, 12 bytes per parameter each", 1)
    out: str = option("", "run folder; a run in it is resumed; empty: runs/MODEL-ALGO-ROLLOUT-DATE-TIME")
    resume: str = option("", "run folder to resume, with its options")
    seed: int = option(0, "of everything random")
    dry_run: float | None = option(None, "print what the run needs of a GPU of so many GB, from the model's "
                                         "config alone, and end; without a number, of the device at hand")


@dataclass
class State:
    """What changes during a run: with weights and optimiser, exactly what a checkpoint holds."""
    step: int = 0
    visits: int = 0  # of problems so far, skipped ones included
    pass_rate: float = 0.0  # from bare prompts, as visits show it: a running mean
    again: list[str] = field(default_factory=list)  # problems whose whole responses were partly right
    kinds: dict[str, list[int]] = field(default_factory=dict)  # of visits: [how many, tokens generated]
    paths: Paths = field(default_factory=dict)
    tokens_full_path: int = 0  # what full paths would have needed for the same responses
    skipped_in_a_row: int = 0  # updates whose gradient was not finite
    seconds: float = 0.0
    eval_seconds: float = 0.0
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    metrics: dict = field(default_factory=lambda: {"step": 0})  # of the last step, before its evaluation
    log_bytes: dict = field(default_factory=dict)  # size of the logs without them

    @property
    def tokens_generated(self) -> int:
        """First paths included, evaluation not."""
        return sum(tokens for _, tokens in self.kinds.values())


class Task(NamedTuple):
    """What the policy is trained on."""
    problems: list[Problem]
    held_out: list[Problem]
    prompts: dict[str, list[int]]  # token ids by problem id
    solutions: dict[str, list[int]]  # first paths that need not be sampled, likewise
    tokenizer: PreTrainedTokenizerBase


# randomness is a function of (seed, step, purpose, problem), so that nothing depends on what was drawn before
ORDER, CUT, SAMPLE, INIT, UPDATE = range(5)
LOGS = ("metrics.jsonl", "samples.jsonl")
# options that may differ when a run goes on: the others change the mathematics
FREE = ("steps", "eval_every", "save_every", "keep_checkpoints", "out", "resume", "shard")
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2}  # states of a parameter


def train(c: Config, out: Path, task: Task, policy: Policy, ref_policy: Policy | None,
          optimizer: torch.optim.Optimizer, rule: rewards.RewardRule, state: State,
          stop: threading.Event) -> State | None:
    """Suffix rollout and policy-gradient update in turn; the last state, or None if `stop` ended it.
    Changes the policy; writes to the folder `out`. Raises FloatingPointError, RewardFileError, OSError."""
    objective = replace(rpo.ALGORITHMS[c.algo], dynamic_rounds=c.dynamic_rounds, kl_coef=c.kl_coef)
    dynamic, start, warned = objective.dynamic_rounds > 1, time.perf_counter() - state.seconds, frozenset()
    eos = data.eos_ids(task.tokenizer, policy.model.generation_config.eos_token_id)
    how = rollout.Sampling(eos, policy.vocab_size, c.temperature)
    memory = rollout_memory(c, policy, optimizer)
    state = finish_step(c, out, task, policy, eos, rule.checker, memory, state, start)  # of the step before
    bar = tqdm(range(state.step + 1, c.steps + 1), f"{c.algo} {c.rollout}", unit="step", initial=state.step,
               total=c.steps)
    for step in bar:
        clock, sampled, trained, first, seen, again = [time.perf_counter()], [], [], [], set(), state.again
        tokens_read = 0
        before = replace(state, paths=dict(state.paths), skipped_in_a_row=0)
        refused = rule.checker.refused
        for _ in range(objective.dynamic_rounds):  # until the step is full
            count = round_size(c.problems_per_step, len(seen), len(sampled), len(trained))
            visited = range(state.visits, state.visits + count - len(again))
            problems = [p for p in problems_of(task.problems, c.seed, visited, again) if p.id not in seen]
            prefixes = [[] for _ in problems]  # of full paths
            if continues(c, state):
                # 1. paths: problems that have none get one, a chunk of visits ahead
                while any(p.id not in state.paths for p in problems):
                    chunk = problems_ahead(c, task.problems, problems, state.visits, state.paths)
                    given, fresh = first_paths(c, step, chunk, task, policy, how, rule, memory)
                    state.paths |= given | fresh
                    first += fresh.values()
                # 2. cuts: a prefix of each path, None where the visit is skipped
                paths = {p.id: state.paths[p.id] for p in problems}
                prefixes, read = cut_paths(c, step, problems, paths, task.prompts, policy)
                tokens_read += read
                state.tokens_full_path += c.group_size * sum(
                    len(paths[p.id].response_ids) for p, prefix in zip(problems, prefixes) if prefix is None)
            # 3. suffixes: G of each prefix, which is computed once
            visits = [(p, task.prompts[p.id], x) for p, x in zip(problems, prefixes) if x is not None]
            requests = requests_of(visits, c.group_size, c.max_response, (c.seed, step, SAMPLE))
            suffixes = rollout.generate(policy, requests, how, memory, "rollout")
            # 4. rewards of the whole responses
            groups = make_groups(visits, requests, suffixes, task.tokenizer, rule)
            state.visits, seen, again = visited.stop, seen | {p.id for p in problems}, []
            state.tokens_full_path += sum(len(r) for g in groups for r in g.responses)
            sampled += groups
            # dynamic sampling: only groups with right and wrong responses (DAPO, arXiv 2503.14476, eq. 11)
            trained += [g for g in groups if len(set(g.correct if dynamic else g.rewards)) > 1]
            del trained[c.problems_per_step:]
            if len(trained) == c.problems_per_step or len(seen) == len(task.problems):
                break
        clock.append(time.perf_counter())
        # 5. advantages within each group; 6. log-probs; 7. one clipped step on the suffix tokens
        missing = dynamic * (c.problems_per_step - len(trained))
        weight = rpo.step_weight(trained, missing) if c.prefix_gate and continues(c, state) else 1
        advantages = [[weight * a for a in rpo.group_advantages(g.rewards, objective.advantage)]
                      for g in trained]
        lr = set_lr(optimizer, c, step)
        updated, norms = rpo.update(policy, ref_policy, optimizer, trained, advantages, objective,
                                    c.temperature, c.updates_per_rollout, c.tokens_per_forward)
        state.skipped_in_a_row = report_skipped(out, step, trained, norms, state.skipped_in_a_row)
        if state.skipped_in_a_row >= 10:
            save_checkpoint(c, out, task, policy, optimizer, before)
            raise FloatingPointError("ten updates in a row had no finite gradient; the policy is that before")
        clock.append(time.perf_counter())
        # 8. cache: one response of each group may replace the path
        cut = dict(state.paths)
        for i, g in enumerate(sampled if c.rollout == "rpo" else ()):
            path = cut.get(g.problem.id, cache.NO_PATH)
            rng = np.random.default_rng((c.seed, step, UPDATE, i))
            state.paths[g.problem.id] = cache.update(path, g.responses, g.rewards, g.correct, step, rng,
                                                     c.epsilon, c.prefix_gate, whole=not g.prefix)
        skipped = [cut[i] for i in seen - {g.problem.id for g in sampled}]
        state = count_visits(c, state, sampled, skipped, first, cut)
        if continues(c, state) != continues(c, before):
            tqdm.write(f"step {step}: {state.pass_rate:.0%} of the responses from bare prompts are right: "
                       f"steps now {'continue cached paths' if continues(c, state) else 'are of full paths'}")
        state.again = found(c, state, sampled)
        write_samples(out, step, sampled, task.tokenizer)
        state.metrics = {"step": step, "policy/lr": lr, "policy/step_weight": weight, **updated,
                         "tokens/read": tokens_read,
                         "reward/refused": sum(gather({ranks()[0]: rule.checker.refused - refused}).values()),
                         "group/missing": missing,
                         **group_metrics(state, first, sampled, trained, len(seen), cut),
                         **cost_metrics(state, before, clock, policy.device)}
        state.step, state.seconds = step, time.perf_counter() - start
        state.log_bytes = {name: (out / name).stat().st_size for name in LOGS if (out / name).exists()}
        warned, stopping = warn_once(state.metrics, warned), agree(state, stop)
        if sampled:  # else all visits were skipped
            bar.set_postfix_str("reward {reward/mean:.2f} accuracy {reward/accuracy:.2f} suffix {response/"
                                "suffix_length:.0f} {tokens/per_s:.0f} tok/s".format(**state.metrics))
        if c.save_every and step % c.save_every == 0 or step == c.steps or stopping:
            save_checkpoint(c, out, task, policy, optimizer, state)  # before the evaluation, which may fail
        if stopping:
            return None
        state = finish_step(c, out, task, policy, eos, rule.checker, memory, state, start)
    return state


def agree(state: State, stop: threading.Event) -> bool:
    """Has any rank been told to stop? Raises OSError if the ranks do not have the same cache and counters."""
    crc, counters = 0, replace(state, paths={}, metrics={}, log_bytes={}, seconds=0.0, eval_seconds=0.0)
    for key, path in state.paths.items() if ranks()[1] > 1 else ():
        text = repr((key, {**vars(path), "response_ids": 0}))
        crc = zlib.crc32(array("i", path.response_ids), zlib.crc32(text.encode(), crc))
    seen = gather({ranks()[0]: (zlib.crc32(repr(counters).encode(), crc), stop.is_set())}).values()
    if len({crc for crc, _ in seen}) > 1:
        raise OSError(f"step {state.step}: the ranks have not the same cache and counters (a bug or a fault)")
    return any(stopped for _, stopped in seen)


def round_size(full: int, seen: int, sampled: int, trained: int) -> int:
    """Visits of the next round of a step of `full` groups, if they are as those seen so far: as many as the
    missing groups need, and no more than leave `full` of them to sample where others are skipped."""
    return math.ceil((seen + 1) * min((full - trained) / (trained + 1), full / (sampled + 1)))


def problems_of(problems: Sequence[Problem], seed: int, visits: range,
                again: Sequence[str] = ()) -> list[Problem]:
    """Those named in `again`, then those of these visits: all of them in a new random order every epoch.
    None comes twice."""
    n, by_id = len(problems), {p.id: p for p in problems if again}
    order = {epoch: np.random.default_rng((seed, epoch, ORDER)).permutation(n)
             for epoch in {visit // n for visit in visits}}
    due = [by_id[i] for i in again] + [problems[order[visit // n][visit % n]] for visit in visits]
    return list({p.id: p for p in due}.values())


def problems_ahead(c: Config, problems: Sequence[Problem], now: Sequence[Problem], visits: int,
                   paths: Paths) -> list[Problem]:
    """Problems without a path, those visited now and then in the order of their next visits: so many as are
    sampled at once."""
    ahead = [*now, *problems_of(problems, c.seed, range(visits, visits + len(problems)))]
    return [p for p in {p.id: p for p in ahead}.values() if p.id not in paths][:c.cache_init_chunk or None]


def continues(c: Config, state: State) -> bool:
    """Are paths continued in this step? If not, all visits get whole responses."""
    return c.rollout == "rpo" and (state.pass_rate >= cache.GOOD or not c.prefix_gate)


def first_paths(c: Config, step: int, problems: Sequence[Problem], task: Task, policy: Policy,
                how: rollout.Sampling, rule: rewards.RewardRule, memory: float) -> tuple[Paths, Paths]:
    """A path per problem (eq. 1), correct or not: worked solutions, and those that are sampled. [RPO-8]"""
    given = [p for p in problems if p.id in task.solutions]
    mine = share([1] * len(given))
    verdicts = rewards.grade([(given[i], given[i].solution) for i in mine], rule.checker)
    correct = gather(dict(zip(mine, verdicts)))
    paths = {p.id: cache.Entry(task.solutions[p.id], float(correct[i]), correct[i],
                               len(task.solutions[p.id]), step) for i, p in enumerate(given)}
    visits = [(p, task.prompts[p.id], []) for p in problems if p.id not in paths]
    requests = requests_of(visits, 1, c.max_response, (c.seed, step, INIT))
    suffixes = rollout.generate(policy, requests, how, memory, "first paths")
    groups = make_groups(visits, requests, suffixes, task.tokenizer, rule)
    return paths, {g.problem.id: cache.Entry(g.suffixes[0], g.rewards[0], g.correct[0], len(g.suffixes[0]),
                                             step) for g in groups}


def cut_paths(c: Config, step: int, problems: Sequence[Problem], paths: Paths, prompts: dict[str, list[int]],
              policy: Policy) -> tuple[list[list[int] | None], int]:
    """The kept prefix of each problem's path, None where the visit is skipped, [] to start from the prompt;
    and how many tokens of paths the policy has read for it."""
    sound = [paths[p.id].correct or not c.prefix_gate for p in problems]
    informed = c.skip_certain or c.cut_position == "uncertain"
    read = [i for i, ok in enumerate(sound) if ok and informed]
    trees = [Tree(prompts[problems[i].id], [paths[problems[i].id].response_ids]) for i in read]
    scores = rpo.score(policy, trees, c.temperature, c.tokens_per_forward)
    logprobs = {i: np.array(rows[0]) for i, rows in zip(read, scores)}
    chances = cache.uniform_cuts if c.cut_position == "uniform" else cache.branch_cuts
    max_cut, prefixes = cache.parse_max_cut(c.max_cut), []
    for i, problem in enumerate(problems):
        path, rng = paths[problem.id], np.random.default_rng((c.seed, step, CUT, int(problem.id, 16)))
        prefix, skip = [], cache.fail_probability(path, c.group_size)
        if sound[i]:
            known = logprobs.get(i, np.full(len(path.response_ids), -1.0))  # if not: it does not matter
            cuts = chances(known, cache.longest_cut(path, max_cut))
            prefix, skip = cache.cut(path, cuts, rng), 1 - cuts.sum()
        prefixes.append(None if c.skip_certain and rng.random() < skip else prefix)
    return prefixes, sum(len(tree.suffixes[0]) for tree in trees)


def requests_of(visits: Sequence[Visit], rows: int, longest: int,
                key: tuple[int, ...]) -> list[rollout.Request]:
    """For `rows` responses of each visit, of at most `longest` tokens."""
    return [rollout.Request(prompt + prefix, longest - len(prefix),
                            [(*key, int(problem.id, 16), row) for row in range(rows)])
            for problem, prompt, prefix in visits]


def make_groups(visits: Sequence[Visit], requests: Sequence[rollout.Request],
                suffixes: Sequence[Sequence[rollout.Suffix]], tokenizer: PreTrainedTokenizerBase,
                rule: rewards.RewardRule) -> list[Group]:
    """The visits with their suffixes, graded and rewarded as whole responses, each on one rank."""
    groups, mine = {}, share([sum(len(s.ids) for s in row) for row in suffixes])
    with agreed(rewards.RewardFileError):
        texts = {i: tokenizer.batch_decode([visits[i][2] + s.ids for s in suffixes[i]],
                                           skip_special_tokens=True) for i in mine}
        pairs = [(visits[i][0], text) for i in mine for text in texts[i]]
        verdicts = iter(rewards.grade(pairs, rule.checker))
        for i in mine:
            (problem, prompt, prefix), row = visits[i], suffixes[i]
            correct, lengths = [next(verdicts) for _ in row], [len(prefix) + len(s.ids) for s in row]
            paid, parts = rewards.reward(problem, texts[i], lengths, correct, rule)
            groups[i] = Group(problem, prompt, prefix, requests[i].budget, [s.ids for s in row],
                              [s.logprobs for s in row], [s.finished for s in row], correct, paid, parts)
    groups = gather(groups)
    return [groups[i] for i in range(len(visits))]


def set_lr(optimizer: torch.optim.Optimizer, c: Config, step: int) -> float:
    """Learning rate of a step, from 1. It does not depend on --steps, so that a run can be made longer."""
    decay = 1 + step / c.lr_decay_steps if c.lr_decay_steps else 1
    lr = c.lr * min(1.0, step / max(1, c.warmup_steps)) / decay
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    return lr


def report_skipped(out: Path, step: int, groups: list[Group], norms: list[float], in_a_row: int) -> int:
    """Write the groups of each update without a finite gradient to a file; how many there are in a row."""
    for i, norm in enumerate(norms):
        in_a_row = 0 if math.isfinite(norm) else in_a_row + 1
        if in_a_row:
            path = out / f"skipped-{step}-{i + 1}.json"
            if ranks()[0] == 0:
                path.write_text(json.dumps([dataclasses.asdict(group) for group in groups[i::len(norms)]]))
            tqdm.write(f"step {step}: gradient norm {norm}: update skipped, its groups are in {path}")
    return in_a_row


def finish_step(c: Config, out: Path, task: Task, policy: Policy, eos: tuple[int, ...],
                checker: Checker, memory: float, state: State, start: float) -> State:
    """Evaluate if that is due (pass@1) and log the step; the state with its accuracy."""
    metrics = state.metrics
    if c.eval_every and (state.step % c.eval_every == 0 or state.step == c.steps):
        prompts = [task.prompts[p.id] for p in task.held_out]
        result = evaluate(policy, task.tokenizer, task.held_out, prompts, checker, c.max_response, memory,
                          eos, f"step {state.step}")
        metrics, accuracy = metrics | result, result["eval/accuracy"]
        state = replace(state, accuracy_before=state.accuracy_before if state.step else accuracy,
                        accuracy_after=accuracy, eval_seconds=state.eval_seconds + result["time/eval_s"],
                        seconds=time.perf_counter() - start)
    if len(metrics) > 1:  # not of step 0 without an evaluation
        append(out / "metrics.jsonl", metrics | {"time/total_s": time.perf_counter() - start})
    return state


WARNINGS = [  # (metric, is it bad?, what it means)
    ("policy/entropy", lambda x: x < 0.005, "the policy hardly varies any more"),
    ("response/finished_fraction", lambda x: x < 0.1, "nearly all responses run into --max-response"),
    ("group/zero_std_fraction", lambda x: x > 0.98, "almost no group has both right and wrong responses"),
    ("group/paying_fraction", lambda x: x < 0.3, "after most prefixes no response is right"),
    ("group/missing", lambda x: x > 0, "dynamic sampling (--dynamic-rounds) does not fill all steps")]


def group_metrics(state: State, first: list[cache.Entry], sampled: list[Group], trained: list[Group],
                  tried: int, cut: Paths) -> dict[str, float]:
    """A metric is one line here and one in docs/metrics.md; the mean of nothing is left out.
    first: paths sampled in the step. tried: its visits. cut: the cache before it."""
    prefixed, whole = ([g for g in sampled if bool(g.prefix) == x] for x in (True, False))
    means = {
        "reward/mean": [r for g in sampled for r in g.rewards],
        **{f"reward/{name}": [x for g in sampled for x in g.parts[name]]
           for group in sampled[:1] for name in group.parts},
        "reward/accuracy": [ok for g in sampled for ok in g.correct],
        "reward/accuracy_prefix": [ok for g in prefixed for ok in g.correct],  # do prefixes help?
        "reward/accuracy_whole": [ok for g in whole for ok in g.correct],
        "group/zero_std_fraction": [len(set(g.correct)) == 1 for g in sampled],
        "group/paying_fraction": [any(g.correct) for g in prefixed],
        "group/wrong_prefix_fraction": [not cut[g.problem.id].correct for g in prefixed],
        "response/length": [len(r) for g in sampled for r in g.responses],
        "response/cut_length": [len(cut[g.problem.id].response_ids) - len(g.prefix) if g.prefix else 0
                                for g in sampled],
        "response/prefix_length": [len(g.prefix) for g in sampled],
        "response/suffix_length": [len(s) for g in sampled for s in g.suffixes],
        "response/finished_fraction": [x for g in sampled for x in g.finished],
        "cache/reward": [path.reward for path in state.paths.values()],
        "cache/correct": [path.correct for path in state.paths.values()]}
    return {"group/sampled": len(sampled), "group/trained": len(trained), "visits/first_path": len(first),
            "visits/whole": len(whole), "visits/prefix": len(prefixed),
            "visits/skipped": tried - len(sampled), "cache/entries": len(state.paths),
            "cache/pass_rate": state.pass_rate,
            **{name: float(np.mean(values)) for name, values in means.items() if values}}


def found(c: Config, state: State, groups: Sequence[Group]) -> list[str]:
    """Problems whose whole responses were right and wrong: the next step continues their new path. [RPO-10]
    A weak policy has few correct paths, and what follows most of one is right often enough to learn from.
    They are half of a step at most."""
    both = [g.problem.id for g in groups if not g.prefix and len(set(g.correct)) > 1]
    return both[:c.problems_per_step // 2] if c.prefix_gate and continues(c, state) else []


def count_visits(c: Config, state: State, groups: list[Group], skipped: list[cache.Entry],
                 first: list[cache.Entry], cut: Paths) -> State:
    """The state with the visits of a step, the tokens generated for them, and how often they were right.
    skipped: paths of skipped visits. first: paths sampled in the step. cut: the cache before it."""
    new = {"first_path": [len(path.response_ids) for path in first],
           "whole": [sum(map(len, g.suffixes)) for g in groups if not g.prefix],
           "prefix": [sum(map(len, g.suffixes)) for g in groups if g.prefix]}
    old = {kind: state.kinds.get(kind, [0, 0]) for kind in new}
    kinds = {kind: [old[kind][0] + len(new[kind]), old[kind][1] + sum(new[kind])] for kind in new}
    paths = cut if continues(c, state) else {}
    visits = [(path, None, []) for path in skipped] + [
        (paths.get(g.problem.id, cache.NO_PATH), g.prefix, g.correct) for g in groups]
    rates = [cache.visit_rate(*visit, cache.parse_max_cut(c.max_cut)) for visit in visits]
    memory = max(0, min(64, state.visits - len(rates)))  # visits
    rate = (memory * state.pass_rate + sum(rates)) / (memory + len(rates))
    return replace(state, kinds=kinds, pass_rate=rate)


def cost_metrics(state: State, before: State, clock: list[float], device: torch.device) -> dict[str, float]:
    """clock: at the start of the step, after its rollout and after its update."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
    return {"tokens/generated": state.tokens_generated, "tokens/full_path": state.tokens_full_path,
            "tokens/per_s": (state.tokens_generated - before.tokens_generated) / (clock[1] - clock[0]),
            "time/rollout_s": clock[1] - clock[0], "time/update_s": clock[2] - clock[1],
            "memory/peak_gib": peak / 2**30}


def peak_rss() -> int:
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def warn_once(metrics: dict[str, float], warned: frozenset[str]) -> frozenset[str]:
    """Name each metric that has become bad; those warned of so far."""
    for name, bad, meaning in WARNINGS:
        if name in metrics and bad(metrics[name]) and name not in warned:
            warned |= {name}
            tqdm.write(f"warning: step {metrics['step']}: {name} is {metrics[name]:.3g}: {meaning} "
                       "(said once)")
    return warned


def write_samples(out: Path, step: int, groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> None:
    """Two whole responses a step; prompt, prefix and suffix are fields of their own."""
    for group in groups[:2]:
        prompt, prefix, suffix = tokenizer.batch_decode([group.prompt, group.prefix, group.suffixes[0]])
        append(out / "samples.jsonl", {
            "step": step, "id": group.problem.id, "prompt": prompt, "prefix": prefix, "suffix": suffix,
            "answer": group.problem.answer, "accuracy": float(group.correct[0]), "reward": group.rewards[0],
            "suffix_tokens": len(group.suffixes[0])})


def append(path: Path, record: dict) -> None:
    if ranks()[0] == 0:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")


def save_checkpoint(c: Config, out: Path, task: Task, policy: Policy, optimizer: torch.optim.Optimizer,
                    state: State) -> None:
    """A new folder that is renamed when complete; if that fails, the one before stays and a line says so.
    Rank 0 writes it, the others wait."""
    new, final = out / "checkpoint.tmp", out / f"checkpoint-{state.step:06d}"
    weights, adam = policy.weights(), whole_tensors(optimizer.state_dict())
    try:
        if ranks()[0] > 0:
            return
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        policy.model.save_pretrained(new / "policy", state_dict=weights)  # hub format, float32
        task.tokenizer.save_pretrained(new / "policy")
        torch.save(adam, new / "optimizer.pt")
        cache.save(state.paths, new / "cache.jsonl", cache.fingerprint(task.tokenizer.get_vocab()))
        problems = cache.fingerprint(sorted(p.id for p in task.problems))
        record = {"problems": problems} | vars(replace(state, paths={}))
        (new / "state.json").write_text(json.dumps(record))
        for handle in [os.open(path, os.O_RDONLY) for path in (*new.rglob("*"), new)]:
            os.fsync(handle)  # so that the name never outlives the contents
            os.close(handle)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(new, final)
        for name in ("policy", "cache.jsonl"):
            (out / "link.tmp").unlink(missing_ok=True)
            (out / "link.tmp").symlink_to(f"{final.name}/{name}")
            os.replace(out / "link.tmp", out / name)
        for old in sorted(out.glob("checkpoint-*[0-9]"))[:-c.keep_checkpoints]:
            shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk is to torch and safetensors
        shutil.rmtree(new, ignore_errors=True)
        tqdm.write(f"step {state.step}: the checkpoint could not be written ({error}); "
                   "the one before is kept, the run goes on")
    finally:
        gather({})


def load_state(checkpoint: Path, task: Task) -> State:
    """State and cache; weights and optimiser are loaded where they are made. Raises ValueError."""
    record, tokenizer = json.loads((checkpoint / "state.json").read_text()), task.tokenizer
    if record.pop("problems") != cache.fingerprint(sorted(p.id for p in task.problems)):
        raise ValueError(f"--resume {checkpoint.parent}: the problems of --data are not those of the run; "
                         "give the same file, and --eval-every 0 only if it was 0 (else some are held out)")
    paths = cache.load(checkpoint / "cache.jsonl", cache.fingerprint(tokenizer.get_vocab()),
                       {p.id for p in task.problems}, len(tokenizer), tqdm.write)
    known = {item.name for item in dataclasses.fields(State)}  # a run of older code may have more
    return State(**{name: value for name, value in record.items() if name in known} | {"paths": paths})


def write_json(path: Path, value: object) -> None:
    """Completely or not at all."""
    if ranks()[0] == 0:
        (path.parent / "tmp").write_text(json.dumps(value, indent=2) + "\n")
        os.replace(path.parent / "tmp", path)


def stored_config(out: Path, flag: str) -> dict[str, object]:
    """The options of the run in that folder. Raises ValueError if there is none."""
    try:
        stored = json.loads((out / "config.json").read_text())
        return {item.name: stored[item.name] for item in dataclasses.fields(Config) if item.name in stored}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{flag} {out}: holds no run (config.json: {error}); "
                         "give the folder of one") from error


def check_folder(out: Path, config: Config) -> object:
    """The lock of a run to go on with, None for a new one. Raises ValueError if neither can be."""
    if not (out / "config.json").exists():
        if config.resume or out.exists() and (
                not out.is_dir() or {f.name for f in out.iterdir()} - {"lock", "tmp"}):
            raise ValueError(f"--out {out}: holds no run to go on with, but other files; give a new folder")
        return None
    lock, stored = lock_folder(out), stored_config(out, "--out")
    changed = [flag_of(name) for name, value in vars(config).items()
               if name not in FREE and stored.get(name) != value]
    if changed:
        raise ValueError(f"--out {out}: holds another run, which differs in {', '.join(changed)}; give a new "
                         "folder to start anew, or the same values (--resume takes them over)")
    return lock


def lock_folder(out: Path) -> object:
    """Held until the file is closed, also by the end of the process, however that comes about; by rank 0."""
    file = open(out / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_UN if ranks()[0] else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"--out {out}: another process is training in this folder; wait for its end or give "
                         "another folder") from error
    return file


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_config(arguments: Sequence[str]) -> Config:
    """Command line to Config; ends the program with one sentence and code 2 if it is wrong."""
    parser = argparse.ArgumentParser("train.py", description=__doc__, fromfile_prefix_chars="@",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    kinds = {"str": (str, "TEXT"), "int": (int, "N"), "float": (float, "X")}
    for item in dataclasses.fields(Config):
        kind, least = item.type.split(" | ")[0], item.metadata["least"]
        how = {"action": argparse.BooleanOptionalAction} if kind == "bool" else {"choices": least} \
            if isinstance(least, tuple) else {"type": kinds[kind][0], "metavar": kinds[kind][1]}
        how |= {"nargs": "?", "const": 0.0} if item.name == "dry_run" else {}
        default = "" if item.default in (None, "") else f" (default: {item.default})"
        text = (item.metadata["help"] + default).replace("%", "%%")
        parser.add_argument(flag_of(item.name), help=text, **how)
    given = vars(parser.parse_args(arguments))
    try:
        stored = stored_config(Path(given["resume"]), "--resume") | {"out": given["resume"]} \
            if given.get("resume") else {}
        return check_config(Config(**stored | given))
    except ValueError as error:
        parser.error(str(error))


def check_config(c: Config) -> Config:
    """Fill in what the algorithm and the rollout set. Raises ValueError for impossible values."""
    settings = vars(rpo.ALGORITHMS[c.algo]) | {"length_reward": 0.01 if c.rollout == "rpo" else 0.0}
    c = replace(c, **{name: settings[name] for name in vars(c).keys() & settings if vars(c)[name] is None})
    cache.parse_max_cut(c.max_cut)
    for item in dataclasses.fields(Config):
        value, least = vars(c)[item.name], item.metadata["least"]
        if type(value) in (int, float) and not least <= value < math.inf:
            raise ValueError(f"{flag_of(item.name)} {value}: give a number of at least {least}")
    if c.epsilon > 1:
        raise ValueError(f"--epsilon {c.epsilon}: this is a probability; give a number from 0 to 1")
    if c.updates_per_rollout > c.problems_per_step:
        raise ValueError(f"--updates-per-rollout {c.updates_per_rollout}: every update needs a problem, and "
                         f"--problems-per-step is {c.problems_per_step}")
    if c.shard and c.optimizer == "adamw8bit":
        raise ValueError("--optimizer adamw8bit: its states cannot be spread over processes; give adamw, or "
                         "--no-shard")
    if c.optimizer == "adamw8bit" and c.dry_run is None and not importlib.util.find_spec("bitsandbytes"):
        raise ValueError("--optimizer adamw8bit: needs the package bitsandbytes, which is not installed: "
                         "pip install bitsandbytes")
    if c.shard and ranks()[1] == 1:
        raise ValueError("--shard: one process has nothing to spread its weights over; start with torchrun "
                         "--nproc-per-node N, or give --no-shard")
    if c.device not in ("auto", "cpu") and not (c.device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device {c.device}: there is no such device here; give auto, cpu or cuda")
    return c


@agreed(ValueError, OSError)
def prepare(c: Config) -> tuple[object, tuple]:
    """The lock of the run folder, None for a new run, and the arguments of `train` from `out` to `state`.
    What can go wrong goes wrong here, cheap things first, before anything is written: ValueError or OSError.
    """
    now = gather({-ranks()[0]: time.strftime("%Y%m%d-%H%M%S")})[0]
    out = Path(c.out or f"runs/{Path(c.model).name}-{c.algo}-{c.rollout}-{now}")
    lock = check_folder(out, c)
    checkpoint = max(out.glob("checkpoint-*[0-9]"), default=None) if lock else None
    folder = None if c.data else data.find_model(c.model)  # a wrong file before a download
    problems, held_out = split_problems(c, Path(c.model))
    folder = folder or data.find_model(c.model)
    task = make_task(c, problems, held_out, folder)
    own = rewards.RewardFile(c.reward_file) if c.reward_file else None
    if own:
        own(task.problems[0], [task.problems[0].solution], [1], [True])  # find its mistakes before the run
    rule = rewards.RewardRule(Checker(), c.max_response, c.length_reward, c.overlong_penalty, own)
    device, vocab_size = device_of(c.device), len(task.tokenizer)
    dtype = dtype_of(c, device.type)
    shape = load_shape(folder)
    check_fits(c, shape.num_parameters(), device_bytes(device), ranks()[1] if c.shard else 1)
    check_window(c, shape.config)
    check_disk(c, out, shape.num_parameters())
    policy = load_policy(checkpoint / "policy" if checkpoint else folder, vocab_size, device, dtype)
    rollout.use_pages(policy)
    ref_policy = load_policy(folder, vocab_size, device, dtype, weights=dtype) if c.kl_coef > 0 else None
    if c.gradient_checkpointing:
        policy.model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if c.shard:
        policy.shard()
    group = rollout.group_bytes(shape.config, c.max_prompt + c.max_response, c.max_response, c.group_size,
                                policy.dtype)
    rollout.slots(*group, c.group_size, rollout_memory(c, policy))
    state = load_state(checkpoint, task) if checkpoint else State(pass_rate=float(bool(task.solutions)))
    return lock, (out, task, policy, ref_policy, make_optimizer(policy, c, checkpoint), rule, state)


def split_problems(c: Config, folder: Path) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems; without an evaluation source some training problems are held out."""
    def load(given: str, flag: str, beside: str, otherwise: str) -> list[Problem]:
        source = given or (str(folder / beside) if (folder / beside).exists() else otherwise)
        return data.load_problems(source, flag) if source else []

    problems = load(c.data, "--data", "train.jsonl", DEFAULT_DATA)
    if c.eval_every == 0:
        return problems, []
    held_out = load(c.eval_data, "--eval-data", "test.jsonl", "")
    if held_out:
        return problems, held_out[:c.eval_problems or None]
    if not c.eval_problems:
        raise ValueError("--eval-problems 0: these are all of --eval-data, which is not given; give it, or a "
                         "number of problems to hold out of --data")
    count = min(c.eval_problems, len(problems) // 2)
    held_out = {p.id: p for p in problems_of(problems, c.seed, range(count))}
    return [p for p in problems if p.id not in held_out], list(held_out.values())


def make_task(c: Config, problems: list[Problem], held_out: list[Problem], folder: Path) -> Task:
    """The problems with their prompts. Raises ValueError if none is left."""
    tokenizer = data.load_tokenizer(folder)
    style = data.PromptStyle(c.instruction, c.instruction_role, data.template_arguments(c.template_args))
    prompts = data.encode_prompts(problems + held_out, tokenizer, style, c.max_prompt)
    problems, held_out = ([p for p in part if p.id in prompts] for part in (problems, held_out))
    if 0 < c.problems < len(problems):
        tqdm.write(f"{c.problems:,} of {len(problems):,} problems are trained on, drawn by --seed (all: "
                   "--problems 0)")
        problems = problems_of(problems, c.seed, range(c.problems))
    if not problems or c.eval_every and not held_out:
        raise ValueError(f"--data, --eval-data: no problem left: {len(problems)} to train on and "
                         f"{len(held_out)} held out; look at what was dropped, and at --max-prompt "
                         f"{c.max_prompt}")
    solutions = data.encode_solutions(problems, tokenizer, c.max_response, "--cache-init",
                                      "their first paths are sampled") \
        if c.cache_init == "solutions" and c.rollout == "rpo" else {}
    return Task(problems, held_out, prompts, solutions, tokenizer)


def check_disk(c: Config, out: Path, parameters: int) -> None:
    """Raises ValueError where there is no room for the checkpoints."""
    size = 12 * parameters + 2**22  # policy and Adam's states; and the cache, the logs
    need = (c.keep_checkpoints + 1) * size  # an old one goes when the new one is complete
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free + sum(
        f.stat().st_size for f in out.glob("checkpoint*/**/*") if f.is_file())
    if free < need:
        raise ValueError(f"--out {out}: not enough disk for checkpoints, {need / 2**20:.0f} MiB are needed "
                         f"and {free / 2**20:.0f} MiB are free; make room or give another folder")
    tqdm.write(f"checkpoints: {size / 2**20:.0f} MiB each, {c.keep_checkpoints} kept (--keep-checkpoints)")


def check_window(c: Config, config: PreTrainedConfig) -> None:
    """Raises ValueError where the model's window is too small for the longest prompt and response."""
    longest = c.max_prompt + c.max_response
    window = getattr(config, "max_position_embeddings", None) or longest
    if longest > window:
        raise ValueError(f"--max-prompt {c.max_prompt} and --max-response {c.max_response}: together more "
                         f"than the {window} positions of {c.model}; lower one of them")


def rollout_memory(c: Config, policy: Policy, optimizer: torch.optim.Optimizer | None = None) -> float:
    """GiB for keys and values. On a GPU, what optimiser states to come and autocast's bfloat16 copy of the
    weights will take is left free; a sharded policy has its copy already."""
    states = 0 if optimizer and optimizer.state else OPTIMIZER_BYTES[c.optimizer]
    reserved = states / ranks()[1] if policy.copies else states + 2
    return c.rollout_memory or rollout.default_memory(
        policy.device, reserved * policy.model.num_parameters())


def dtype_of(c: Config, device: str) -> torch.dtype:
    half = c.dtype == "bfloat16" or c.dtype == "auto" and device == "cuda"
    return torch.bfloat16 if half else torch.float32


def check_fits(c: Config, parameters: int, total: float, shards: int) -> None:
    """Raises ValueError where weights, gradients and optimiser states alone are too large for the device.
    total: its bytes. shards: how many devices they are spread over."""
    need = {name: (8 + states) * parameters / shards for name, states in OPTIMIZER_BYTES.items()}
    if max(need[c.optimizer], 4 * parameters) > total:  # each device loads the whole model first
        less = f"--optimizer adamw8bit ({need['adamw8bit'] / 1e9:.1f} GB), "
        less *= shards == 1 and c.optimizer != "adamw8bit" and need["adamw8bit"] <= total
        devices = math.ceil(shards * need["adamw"] / total)
        less += f"--shard with {devices} devices or more, or " * (4 * parameters <= total)
        raise ValueError(
            f"--model {c.model}: weights, gradients and optimiser states take {need[c.optimizer] / 1e9:.1f} "
            f"GB, the weights alone while they are loaded {4 * parameters / 1e9:.1f}, this device has "
            f"{total / 1e9:.1f}: give {less}a smaller model; --dry-run prints what a run needs")


def make_optimizer(policy: Policy, c: Config, checkpoint: Path | None) -> torch.optim.Optimizer:
    groups = [{"params": [p for p in policy.parameters() if (p.ndim >= 2) == matrices],
               "weight_decay": c.weight_decay if matrices else 0.0} for matrices in (True, False)]
    if c.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit
        optimizer = AdamW8bit(groups, lr=c.lr)
    else:
        optimizer = torch.optim.AdamW(groups, lr=c.lr, fused=policy.device.type == "cuda" or None)
    if checkpoint:
        states = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=c.shard)
        parameters = [p for group in groups for p in group["params"]]
        for p, adam in [(parameters[i], adam) for i, adam in states["state"].items()] if c.shard else ():
            for name in ("exp_avg", "exp_avg_sq"):
                adam[name] = distribute_tensor(adam[name], p.device_mesh, p.placements, src_data_rank=None)
        optimizer.load_state_dict(states)  # which moves them to their parameters, one by one
    return optimizer


def print_summary(c: Config, out: Path, held_out: int, last: State) -> None:
    training = last.seconds - last.eval_seconds
    write_json(out / "summary.json", {
        "accuracy_before": last.accuracy_before, "accuracy_after": last.accuracy_after, "steps": c.steps,
        "tokens_generated": last.tokens_generated, "tokens_full_path": last.tokens_full_path,
        "seconds": last.seconds, "seconds_without_evaluation": training})
    if None not in (last.accuracy_before, last.accuracy_after):
        print(f"pass@1 on {held_out} held-out problems: {last.accuracy_before:.3f} -> "
              f"{last.accuracy_after:.3f}")
    fewer = 1 - last.tokens_generated / last.tokens_full_path
    print(f"tokens generated: {last.tokens_generated:,}, first paths included; full paths of the measured "
          f"length: {last.tokens_full_path:,} ({fewer:.1%} fewer)")
    print("visits by kind: " + ", ".join(f"{kind} {count:,} ({tokens / count:,.0f} tokens each)"
                                         for kind, (count, tokens) in last.kinds.items() if count))
    print(f"seconds: {last.seconds:.0f}, of them training {training:.0f}")
    print(f"run folder: {out} (policy/, metrics.jsonl, samples.jsonl, summary.json)")


def main(arguments: Sequence[str] | None = None) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    join_ranks()
    config, stop = parse_config(sys.argv[1:] if arguments is None else arguments), threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        tqdm.write("signal: the run ends with a checkpoint after this step; once more: at once, without")
    try:
        if config.dry_run is not None:
            from benchmarks.memory import report
            print(report(config))
            return 0
        lock, (out, task, policy, *others, rule, state) = prepare(config)
        with agreed(ValueError, OSError):
            out.mkdir(parents=True, exist_ok=True)
            lock = lock or lock_folder(out)
            write_json(out / "config.json", vars(config))
            for name in LOGS:  # lines from after the checkpoint come again
                if (out / name).exists():
                    os.truncate(out / name, state.log_bytes.get(name, 0))
    except (ValueError, OSError) as error:
        return fail("train.py", 2, error)
    except torch.OutOfMemoryError as error:
        sys.stderr = sys.__stderr__ if ranks()[0] else sys.stderr  # whichever rank it is
        return fail("train.py", 1, f"out of memory while the model is loaded; is the device in use? {error}")
    tqdm.write(f"{config.model}: {policy.model.num_parameters() / 1e6:.1f} M parameters on {policy.device}, "
               f"{policy.dtype}; {len(task.problems)} problems, {len(task.held_out)} held out; run folder "
               f"{out}" + (f", resumes after step {state.step}" if state.step else ""))
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        last = train(config, out, task, policy, *others, rule, state, stop)
        if last:
            print_summary(config, out, len(task.held_out), last)
            return 0
    except rewards.RewardFileError as error:
        return fail("train.py", 2, error)
    except FloatingPointError as error:
        return fail("train.py", 1, f"{error}; checkpoint: {out}")
    except OSError as error:  # a log that cannot be written
        return fail("train.py", 1, f"{error}; the checkpoint is complete: go on with --resume {out}")
    except torch.OutOfMemoryError as error:
        sys.stderr = sys.__stderr__ if ranks()[0] else sys.stderr  # whichever rank it is
        return fail("train.py", 1, f"out of memory: lower --tokens-per-forward or --rollout-memory ({error})")
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        lock.close()
    print(f"stopped; go on with: python train.py --resume {shlex.quote(str(out))}")
    time.sleep(ranks()[0] > 0)  # torchrun stops the others, rank 0 too, when one has ended like this
    return 130


if __name__ == "__main__":
    end(main())
