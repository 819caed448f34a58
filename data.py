"""Problems and prompts: read a file or a hub data set, find a model by name, apply the chat template."""
from __future__ import annotations

import codecs
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import answers

say_once = functools.cache(tqdm.write)
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
DEFAULT_DATA = "agentica-org/DeepScaleR-Preview-Dataset:deepscaler.json"  # 40k competition problems, MIT
# who publishes the models whose short names begin like this
ORGANISATIONS = {"Qwen": "Qwen", "DeepSeek": "deepseek-ai", "SmolLM": "HuggingFaceTB"}
QUESTION_KEYS = ("problem", "question", "prompt")
ANSWER_KEYS = ("answer", "final_answer", "ground_truth", "reward_model.ground_truth", "extra_info.answer")
_PROSE = re.compile(r"[A-Za-z]{2,} [A-Za-z]{2,}|.{100}", re.S)  # a solution without it may be a bare answer
_BROKEN = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which no tokenizer takes
# everything a policy needs, safetensors only: pickled weights can run code
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class Problem:
    """One problem with its gold answer."""
    id: str  # hash of question and answer: the same in every file and order, so a cache can be keyed by it
    question: str
    answer: str
    solution: str = ""
    turns: tuple[tuple[str, str], ...] = ()  # (role, content), if the data set brings chat messages


@dataclass(frozen=True)
class PromptStyle:
    """How a problem becomes a prompt."""
    instruction: str = INSTRUCTION
    role: str = "system"  # of the instruction; user: it follows the question
    arguments: tuple[tuple[str, object], ...] = ()  # of the chat template: (("enable_thinking", False),)


def load_problems(source: str, option: str) -> list[Problem]:
    """Problems of a .jsonl or .json file, or of a hub data set `owner/name` or `owner/name:file`, in order.
    What is dropped is counted on the screen. Raises ValueError, with `option` in it, for what cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(f"{option} {source}: this is a folder; give a .jsonl or .json file in it")
    problems: dict[str, Problem] = {}
    no_answer = f"no answer in {', '.join(ANSWER_KEYS)} or solution"
    dropped = {no_answer: 0, "duplicate": 0, "gold answer cannot be checked": 0, "broken characters": 0}
    for path in [path] if path.exists() else _download(source, option):
        for where, record in _records(path, f"{option} {source}"):
            problem = _problem(record, f"{option} {source}: {where}")
            error = problem and answers.parse_error(problem.answer)
            if problem is None:
                dropped[no_answer] += 1
            elif problem.id in problems:
                dropped["duplicate"] += 1
            elif _BROKEN.search("".join([problem.question, problem.solution, *sum(problem.turns, ())])):
                dropped["broken characters"] += 1
            elif error:
                dropped["gold answer cannot be checked"] += 1
                tqdm.write(f"{option} {source}: {where}, id {problem.id}: "
                           f"answer {problem.answer[:60]!r}: {error}")
            else:
                problems[problem.id] = problem
    total = len(problems) + sum(dropped.values())
    for reason, count in dropped.items():
        if count:
            tqdm.write(f"{option} {source}: dropped {count} of {total}: {reason}")
    return list(problems.values())


def _records(path: Path, source: str) -> Iterable[tuple[str, dict]]:
    """(place in the file, record) pairs."""
    if path.suffix not in (".jsonl", ".json"):
        yield from _records_by_datasets(path, source)
        return
    where, lines = "the file", path.suffix == ".jsonl"
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
        for number, line in enumerate(text.split("\n") if lines else (), 1):
            where = f"line {number}"
            if line.strip():
                yield where, json.loads(line, parse_constant=lambda name: None)  # NaN: no answer
        records = [] if lines else json.loads(text, parse_constant=lambda name: None)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: cannot be read as UTF-8 or UTF-16 text ({error})") from error
    except (ValueError, RecursionError) as error:
        hint = "" if lines else "; a file with one record per line must be named .jsonl"
        raise ValueError(f"{source}: {where} is not valid JSON ({error}){hint}") from error
    if not isinstance(records, list):
        raise ValueError(f"{source}: a .json file holds one list of records; if one a line, name it .jsonl")
    yield from ((f"record {number}", record) for number, record in enumerate(records, 1))


def _records_by_datasets(path: Path, source: str) -> Iterable[tuple[str, dict]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source}: only .jsonl and .json are read without the optional package datasets, "
                         "which is not installed: pip install datasets, or convert the file") from error
    kind = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}.get(path.suffix)
    if kind is None:
        raise ValueError(f"{source}: the file name ends in none of .jsonl .json .parquet .csv .arrow")
    for number, record in enumerate(datasets.load_dataset(kind, data_files=str(path), split="train"), 1):
        yield f"record {number}", record


def _problem(record: object, where: str) -> Problem | None:
    """None if the record has no answer anywhere."""
    question, turns = "", ()
    for key in QUESTION_KEYS if isinstance(record, dict) else ():
        if not question and isinstance(record.get(key), list):
            turns = _turns(record[key], f"{where}, field {key}")
            question = turns[-1][1]
        question = question or _text(record, key)
    if re.match(r"\[\s*\{\s*['\"](role|content)['\"]\s*:", question) and not turns:
        raise ValueError(f"{where} has chat messages as text: store them as a list of objects")
    if not question:
        raise ValueError(f"{where} has no question: it needs one of the fields {', '.join(QUESTION_KEYS)}")
    solution = _text(record, "solution")
    answer = next(filter(None, (_text(record, key) for key in ANSWER_KEYS)), "")
    if "####" in answer:  # GSM8K as published keeps the worked solution in the answer field
        solution, answer = solution or answer, answers.extract_answer(answer) or ""
    answer = answer or answers.extract_answer(solution) or ""
    if not answer and not _PROSE.search(solution) and answers.parse_error(solution) is None:
        solution, answer = "", solution  # as in open-r1/DAPO-Math-17k-Processed
    if not answer:
        return None
    asked = json.dumps(turns) if turns else question
    digest = hashlib.sha256(f"{asked}\0{answer}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Problem(digest, question, answer, solution, turns)


def _turns(messages: list, where: str) -> tuple[tuple[str, str], ...]:
    """Chat messages {"role": ..., "content": ...} as (role, content) pairs. Raises ValueError."""
    turns = tuple((m.get("role"), m.get("content")) for m in messages if isinstance(m, dict))
    texts = all(isinstance(x, str) for turn in turns for x in turn)
    if not texts or not turns or len(turns) < len(messages) or turns[-1][0] == "assistant":
        raise ValueError(f"{where} is a list, but not of chat messages with text as role and content that "
                         "end before the response of the assistant")
    return turns


def _text(record: dict, key: str) -> str:
    """A field as text, "" if there is none; a.b is field b of field a, a list several answers."""
    for name in key.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    if isinstance(record, list):
        return ", ".join(str(x).strip() for x in record) if key in ANSWER_KEYS else ""
    return "" if record is None or isinstance(record, dict) else str(record).strip()


def _download(source: str, option: str) -> list[Path]:
    """One file of a hub data set, or all shards of one."""
    repo, _, name = source.partition(":")
    if source.endswith((".jsonl", ".json")) and not name or repo.count("/") != 1:
        raise ValueError(f"{option} {source}: no such file, nor a hub data set owner/name[:file]")
    try:
        names = [name]
        if not name:
            files = [f for f in HfApi().list_repo_files(repo, repo_type="dataset")
                     if f.endswith((".jsonl", ".json", ".parquet"))]
            names = [f for f in files if "train" in f] or files
            if len({re.sub(r"-\d+-of-\d+", "", f) for f in names}) != 1:
                raise ValueError(f"{option} {source}: choose one of its files as {repo}:FILE, there are "
                                 + (", ".join(files[:8]) or "none that can be read"))
        return [Path(hf_hub_download(repo, f, repo_type="dataset")) for f in sorted(names)]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{option} {source}: no such file, and the hub data set could not be downloaded "
                         f"({_reason(error)})") from error


def find_model(name: str, weights: bool = True) -> Path:
    """Folder of a model: a local folder, a hub id (owner/name), or a short name such as Qwen2.5-Math-1.5B.
    Downloads it if need be, or without `weights` its config only. Raises ValueError saying what was tried, or
    what the folder lacks."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        owner = next((o for start, o in ORGANISATIONS.items() if name.startswith(start)), "")
        repo = name if "/" in name else f"{owner}/{name}"
        if not owner and "/" not in name:
            raise ValueError(f"--model {name}: no such folder, and not a short name (those begin with "
                             f"{', '.join(ORGANISATIONS)}); give a folder or a hub id owner/name")
        try:
            folder = Path(snapshot_download(repo, allow_patterns=MODEL_FILES if weights else ["config.json"],
                                            ignore_patterns=["*/*", "consolidated*"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"--model {name}: no such folder, and downloading {repo} from the hub failed "
                             f"({_reason(error)})") from error
    if not (folder / "config.json").exists():
        raise ValueError(f"--model {name}: {folder} has no config.json, so it is not a model folder")
    if weights and not list(folder.glob("*.safetensors")):
        raise ValueError(f"--model {name}: {folder} has no weights (*.safetensors)")
    return folder


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises ValueError if there is none in the folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises various kinds where files are missing
        raise ValueError(f"--model: {folder} has no tokenizer that loads ({_reason(error)})") from error
    if not tokenizer("question")["input_ids"]:  # what it makes of a folder without tokenizer files
        raise ValueError(f"--model: {folder} has no tokenizer files (tokenizer.json or tokenizer.model)")
    return tokenizer


def template_arguments(text: str) -> tuple[tuple[str, object], ...]:
    """--template-args '{"enable_thinking": false}' as pairs. Raises ValueError."""
    try:
        return tuple(json.loads(text or "{}").items())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--template-args {text}: give a JSON object such as "
                         "{\"enable_thinking\": false} " + f"({error})") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, style: PromptStyle) -> list[int]:
    """Token ids of the prompt, up to where the response begins. Raises ValueError if the template refuses it.
    Chat messages of the data set are used as they are, with the instruction only if they have no system turn.
    A tokenizer without a chat template gets a plain one."""
    *before, (role, question) = problem.turns or (("user", problem.question),)
    instruction = "" if any(r == "system" for r, _ in before) else style.instruction
    if style.role == "user":
        question, instruction = f"{question}\n\n{instruction}".strip(), ""
    turns = [("system", instruction)] * bool(instruction) + [*before, (role, question)]
    if not tokenizer.chat_template:
        text = "\n\n".join(content if r == "system" else f"Problem: {content}" for r, content in turns)
        return list(tokenizer(f"{text}\n\nSolution:")["input_ids"])
    return list(_apply(tokenizer, turns, style, add_generation_prompt=True))


def _apply(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], style: PromptStyle,
           **how: bool) -> list[int] | str:
    """The chat template; one that refuses a system turn gets it at the start of the first user turn."""
    def render(turns: Sequence[tuple[str, str]]) -> list[int] | str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.apply_chat_template(messages, return_dict=False, **how, **dict(style.arguments))
    try:
        return render(turns)
    except Exception as error:  # a template is a program: it raises its own errors and Python's
        try:
            (_, system), (role, question), *rest = turns if turns[0][0] == "system" else [("", ""), *turns]
            ids = render([(role, f"{system}\n\n{question}".strip()), *rest])
        except Exception:
            raise ValueError(f"--model: its chat template refuses the turns {', '.join(r for r, _ in turns)} "
                             f"({error}); use another model or other data") from error
        say_once(f"note: the chat template refuses a system turn ({error}): it goes into the user turn")
        return ids


def encode_prompts(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, style: PromptStyle,
                   max_prompt: int) -> dict[str, list[int]]:
    """Prompt ids by problem id; those longer than max_prompt tokens are left out and counted."""
    if "strftime_now" in (tokenizer.chat_template or ""):
        tqdm.write("note: the chat template prints today's date: prompts of a run resumed later differ")
    if len({tuple(encode_prompt(tokenizer, Problem("", text, ""), style)) for text in ("1 + 1", "2 + 2")}) < 2:
        raise ValueError("--model: its chat template leaves the question out; use another model")
    prompts = {p.id: encode_prompt(tokenizer, p, style)
               for p in tqdm(problems, "prompts", leave=False, delay=5)}
    short = {key: ids for key, ids in prompts.items() if len(ids) <= max_prompt}
    if len(short) < len(prompts):
        tqdm.write(f"dropped {len(prompts) - len(short)} of {len(prompts)} problems: prompt longer than "
                   f"--max-prompt {max_prompt} tokens")
    return short


def eos_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's, the generation config's, and what ends a chat turn.
    The last one matters for base models, whose own end token is another (Qwen2.5: <|im_end|>, <|endoftext|>).
    """
    others = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    ids = {tokenizer.eos_token_id, *others, *_turn_end(tokenizer)}
    return tuple(sorted(i for i in ids if i is not None))


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[the special token that the chat template puts after a response], or []."""
    if not tokenizer.chat_template:
        return []
    turns = [("user", "question"), ("assistant", "response")]
    text = _apply(tokenizer, turns, PromptStyle(), tokenize=False)
    after = tokenizer(text.rpartition("response")[2], add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in after if i in special][:1]


def encode_solutions(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase,
                     max_response: int, option: str, otherwise: str) -> dict[str, list[int]]:
    """The worked solutions as responses: token ids by problem id, with the token that ends a response.
    Those without a solution, or with one of more than max_response tokens, are left out and counted;
    `otherwise` says what becomes of them. Raises ValueError, with `option` in it, if none is left."""
    end = [i for i in _turn_end(tokenizer) or [tokenizer.eos_token_id] if i is not None]
    if not end:
        raise ValueError(f"{option} solutions: the tokenizer has no end token that a solution could end with")
    paths = {p.id: [*tokenizer(p.solution, add_special_tokens=False)["input_ids"], *end]
             for p in problems if p.solution}
    short = {key: ids for key, ids in paths.items() if len(ids) <= max_response}
    if not short:
        raise ValueError(f"{option} solutions: no problem has a worked solution (field solution) of at most "
                         f"--max-response {max_response} tokens; use {option} policy or other --data")
    if len(short) < len(problems):
        tqdm.write(f"{option} solutions: {len(problems) - len(paths)} of {len(problems)} problems have "
                   f"no worked solution, {len(paths) - len(short)} one longer than --max-response "
                   f"{max_response} tokens: {otherwise}")
    return short
