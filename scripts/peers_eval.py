#!/usr/bin/env python3
"""Compare `bitnet eval` with the real lm-evaluation-harness, offline, on local data.

    scripts/peers_eval.py --data DIR [--data DIR] [--bitnet target/release/bitnet] [--limit 200] [--model default]

The harness reads the same records, written with the field names of the Hub, through its own task files. Its model is a stand-in
that notes what it is asked and answers what `bitnet eval` noted as the model's answers. For each task, alone, with examples, and
in a conversation:

* requests: every context, continuation, prompt and stop string, and the tokens of contexts and continuations, are equal;
* metrics: every value and standard error that the harness computes of the answers is that of `bitnet eval --json`;
* log-likelihoods: of some questions, they are what `bitnet logits` gives, within 1e-3.

Not compared: `math_verify`, which only the harness has (scripts/peers_math.py compares formulas), and what programs do, which only
`bitnet eval` runs here. Articles of WikiText are cut here as the harness' data set is, which it does not do itself.

Needs lm_eval and tokenizers, for example

    python3 -m venv ~/.cache/bitnet-eval/venv
    ~/.cache/bitnet-eval/venv/bin/pip install 'lm_eval[math]==0.4.13' tokenizers
"""

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import evaluate
import jinja2
import lm_eval
import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

class CodeEval:
    """In the place of the metric `code_eval`, which would be fetched from the Hub and run programs: says what `bitnet eval` found."""

    passed = {}  # by program, up to the tests

    def compute(self, references, predictions, k):
        return {"pass@1": float(self.passed.get(predictions[0][0], 0))}, {}


evaluate.load = lambda name: CodeEval()

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "bitnet-model" / "assets" / "default"
LIKELIHOOD_LIMIT = 1e-3
METRIC_LIMIT = 1e-9  # relative: sums in another order
EXAMPLES = 40  # records of a file of examples

# Task: the harness' file, and the split that is asked.
TASKS = {
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test"),
    "wikitext": ("wikitext/wikitext.yaml", "test"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test"),
    "minerva_math500": ("minerva_math/minerva_math500.yaml", "test"),
    "humaneval_plus": ("humaneval/humaneval_plus.yaml", "test"),
}
# What is run: tasks, and options of both.
RUNS = [
    (list(TASKS), None, False),
    (["arc_easy", "boolq", "winogrande", "piqa", "hellaswag", "lambada_openai", "gsm8k"], 3, False),
    (["arc_challenge", "winogrande", "gsm8k", "minerva_math500"], 2, True),
]


def pages(text):
    """The articles of a file of WikiText: a heading of the first order begins one."""
    page, found = [], []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            found.append("\n".join(page))
            page = []
        page.append(line)
    return [{"page": page} for page in found + ["\n".join(page)] if page.strip()]


def hub_record(task, record):
    """The record with the field names of the Hub, from which the harness makes the same question."""
    if task.startswith("arc") and isinstance(record["choices"], list):
        labels = [chr(ord("A") + i) for i in range(len(record["choices"]))]
        return {"question": record["question"], "choices": {"text": record["choices"], "label": labels},
                "answerKey": labels[record["gold"]]}
    if task == "winogrande" and "context_options" in record:
        options = record["context_options"]
        before = os.path.commonprefix(options)
        return {"sentence": before + "_ " + record["continuation"], "option1": options[0][len(before):],
                "option2": options[1][len(before):], "answer": str(record["gold"] + 1)}
    if task == "boolq":
        label = int(record["answer"]) if "answer" in record else record["label"]
        return {"passage": record["passage"], "question": record["question"], "label": label}
    if task == "piqa" and "query" in record:
        goal = record["query"].removeprefix("Question: ").removesuffix("\n")
        return {"goal": goal, "sol1": record["choices"][0], "sol2": record["choices"][1], "label": record["gold"]}
    if task == "lambada_openai" and "context" in record:
        return {"text": record["context"] + " " + record["continuation"]}
    fields = {"arc_easy": ["question", "choices", "answerKey"], "arc_challenge": ["question", "choices", "answerKey"],
              "winogrande": ["sentence", "option1", "option2", "answer"], "piqa": ["goal", "sol1", "sol2", "label"]}
    return {name: record[name] for name in fields.get(task, record)}


def records(task, folders, parts=("", "_test", "_validation", "_val", "_valid", "_test_norm", "_val_norm")):
    """The records of a task's file, as they are; none if there is no such file."""
    names = {"minerva_math500": ["minerva_math500", "math500"], "wikitext": ["wikitext", "wikitext2"],
             "humaneval_plus": ["humaneval_plus", "humanevalplus", "HumanEvalPlus-OriginFmt"]}.get(task, [task])
    for folder in folders:
        for name in names:
            for part in parts:
                for ending in ["jsonl", "json", "txt", "jsonl.gz"]:
                    path = folder / f"{name}{part}.{ending}"
                    if path.is_file():
                        text = gzip.decompress(path.read_bytes()).decode() if ending == "jsonl.gz" else path.read_text()
                        if ending == "txt":
                            return pages(text)
                        if ending == "json":
                            return json.loads(text)
                        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return []


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder, folders, limit):
    """The tasks that there is data of, and files for both: the first records are asked; examples are those of a file of examples, or the last ones."""
    ours, theirs, configs = folder / "ours", folder / "theirs", folder / "tasks"
    for path in (ours, theirs, configs):
        path.mkdir()
    found = []
    tasks = Path(lm_eval.__file__).parent / "tasks"
    for task, (config, split) in TASKS.items():
        rows = records(task, folders)
        if not rows:
            print(f"{task}: passed over, there is no file in {', '.join(map(str, folders))}")
            continue
        if task == "wikitext":
            limit_here = min(limit, 8)  # articles are long
        else:
            limit_here = limit
        asked, examples = rows[:limit_here], records(task, folders, ["_train"]) or rows[-EXAMPLES:]
        if task == "minerva_math500":  # its examples are in the harness
            from lm_eval.tasks.minerva_math import utils as math_utils

            examples = [{"problem": shot["problem"], "solution": shot["solution"]} for shot in math_utils.list_fewshot_samples()]
        if task not in ("lambada_openai", "wikitext"):
            write(ours / f"{task}_train.jsonl", examples)
        write(ours / f"{task}.jsonl", asked)
        write(theirs / f"{task}.jsonl", [hub_record(task, row) for row in asked])
        write(theirs / f"{task}_train.jsonl", [hub_record(task, row) for row in examples])
        files = {split: str(theirs / f"{task}.jsonl"), "train": str(theirs / f"{task}_train.jsonl")}
        if task == "lambada_openai":  # it has no training split: examples are drawn from what is asked
            del files["train"]
        lines = [f"include: {tasks / config}", f"task: {task}", "dataset_path: json", "dataset_name: null",
                 f"dataset_kwargs: {json.dumps({'data_files': files})}"]
        if split == "validation":
            lines.append("test_split: null")
        (configs / f"{task}.yaml").write_text("\n".join(lines) + "\n")
        found.append(task)
    return found, ours, configs


class Recorder(TemplateLM):
    """Notes what it is asked, and answers what it is given."""

    def __init__(self, tokenizer, config, answers):
        super().__init__()
        self.core, self.config, self.answers = tokenizer, config, answers
        self.asked = []

    tokenizer_name = "local"

    @property
    def eot_token_id(self):
        return self.core.token_to_id(self.config["eos_token"])

    @property
    def prefix_token_id(self):
        return self.core.token_to_id(self.config["bos_token"])

    def tok_encode(self, string, add_special_tokens=None, **_):
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.config["bos_token"])
        return self.core.encode(string, add_special_tokens=add_special_tokens).ids

    def chat_template(self, chat_template=False):
        return self.config["chat_template"] if chat_template else None

    def apply_chat_template(self, history, add_generation_prompt=True):
        env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        tokens = {name: token for name, token in self.config.items() if name.endswith("_token")}
        template = env.from_string(self.config["chat_template"])
        return template.render(messages=history, add_generation_prompt=add_generation_prompt, **tokens)

    def answer(self, request, asked):
        self.asked.append((request.task_name, request.doc_id, request.idx, asked))
        return self.answers[request.task_name][request.doc_id][request.idx]

    def loglikelihood(self, requests, disable_tqdm=False):
        self.requests = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **_):
        return [
            tuple(self.answer(request, {"context": pair[0], "continuation": pair[1], "tokens": [context, continuation]}))
            for request, (pair, context, continuation) in zip(self.requests, requests, strict=True)
        ]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        def asked(text):
            return {"text": text, "tokens": self.tok_encode(text)}
        return [self.answer(request, asked(request.args[0]))[0] for request in requests]

    def generate_until(self, requests, disable_tqdm=False):
        def asked(prompt, options):
            assert not options["do_sample"]
            return {"prompt": prompt, "tokens": self.tok_encode(prompt), "until": options["until"]}
        return [self.answer(request, asked(*request.args)) for request in requests]


def close(ours, theirs):
    if isinstance(theirs, str) or isinstance(ours, str):
        return ours == theirs
    return math.isclose(ours, theirs, rel_tol=METRIC_LIMIT, abs_tol=1e-12)


# Answers as models write them, judged as solutions of the numbers or formulas behind them.
WRITTEN = {
    "gsm8k": ([
        "He has 1200.\n#### 1200", "#### $1,200 in all", "It is $1,200.00", "It is 1200.", "#### 1,200\n\nAnd 5 more",
        "#### 7\n#### 1200", "-1200", "no number", "", "#### -1200", "1200 apples, 1,200 pears", "12 00", "$1200.", "####1200",
        "so 1.200", "#### 1200.", "#### 1200.0", "one thousand", "1200\n", "= 1200$", "The answer is 1200...", "#### 1200 #### 3",
        "a 5, b 6: 1200,", "٣", "#### ",
    ], ["So 2 * 600 = <<2*600=1200>>1,200.\n#### 1,200", "#### -1200", "#### 5"]),
    "minerva_math500": ([
        f"{before}Final Answer: The final answer is {answer}{after}"
        for before in ("", "We get $x$.\n")
        for answer in ("$4$", "4", "$\\frac12$", "$\\frac{1}{2}$", "$x = 4$", "$\\boxed{4}$", "$4$ cm", "$4.$", "$0.5$", "")
        for after in (". I hope it is correct.", ". I hope it is correct.\n\nMore", "", ". ", "\n")
    ] + ["so \\boxed{4}", "4", "final answer is 4. I hope it is correct."], ["4", "\\frac{1}{2}"]),
}


def judged(configs):
    """What the harness says of WRITTEN: task, answer, target, and the values in the order of our metrics."""
    from lm_eval.tasks.minerva_math import utils as math_utils
    tasks = TaskManager(include_path=str(configs), include_defaults=False).load(["gsm8k"])["tasks"]
    task, rows = next(iter(tasks.values())), []
    for answer in WRITTEN["gsm8k"][0]:
        for target in WRITTEN["gsm8k"][1]:
            values = {}
            for ensemble in task._filters:
                texts = [[answer]]
                for step in ensemble.filters:
                    texts = list(step().apply(texts, [None]))
                values[ensemble.name] = float(task.process_results({"question": "", "answer": target}, texts)["exact_match"])
            rows.append(["gsm8k", answer, target, values["flexible-extract"], values["strict-match"]])
    for answer in WRITTEN["minerva_math500"][0]:
        for target in WRITTEN["minerva_math500"][1]:
            found = math_utils.normalize_final_answer(math_utils.get_unnormalized_answer(answer))
            rows.append(["minerva_math500", answer, target, float(math_utils.is_equiv(found, target))])
    return rows


class Comparison:
    def __init__(self, args, folder):
        self.bitnet, self.model, self.folder = args.bitnet, args.model, folder
        assets = Path(args.model) if args.model != "default" else ASSETS
        self.tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
        self.config = json.loads((assets / "tokenizer_config.json").read_text())
        self.max_len = json.loads((assets / "config.json").read_text())["max_position_embeddings"]
        self.problems, self.frozen, self.judged = [], [], []

    def run(self, *args):
        result = subprocess.run([self.bitnet, *args], capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"bitnet {' '.join(args)}: {result.stderr}")
        return result.stdout

    def check(self, ok, text):
        if not ok:
            self.problems.append(text)
            print(f"  DIFFERS: {text}"[:600])

    def compare(self, ours, configs, number, run):
        tasks, shots, chat = run
        print(f"{', '.join(tasks)}: {'own examples' if shots is None else f'{shots} examples'}{', chat' if chat else ''}")
        args = ["eval", "-q", "-m", self.model, "--data", str(ours), "--tasks", ",".join(tasks)]
        args += ["--num-fewshot", str(shots)] if shots is not None else []
        args += ["--apply-chat-template"] if chat else []
        args += ["--allow-code-execution", "--python", sys.executable] if "humaneval_plus" in tasks else []
        asked_file, kept = self.folder / f"asked{number}.jsonl", self.folder / f"kept{number}.jsonl"
        self.run(*args, "--requests-only", str(asked_file))
        report = json.loads(self.run(*args, "--max-new-tokens", "48", "--bootstrap", "2000", "--kv-cache", "f32",
                                     "--json", "-o", str(kept)))
        answers, prompts = {}, {}
        for line in map(json.loads, asked_file.read_text().splitlines()):
            prompts[line["task"], line["item"]] = line["requests"][0].get("prompt")
        for line in kept.read_text().splitlines()[1:]:
            line = json.loads(line)
            answers.setdefault(line["task"], {})[line["item"]] = line["responses"]
            if "outcome" in line:
                CodeEval.passed[prompts[line["task"], line["item"]] + line["responses"][0]] = line["outcome"] == "passed"
        recorder = Recorder(self.tokenizer, self.config, answers)
        theirs = simple_evaluate(
            model=recorder, tasks=tasks, num_fewshot=shots, bootstrap_iters=2000, log_samples=True,
            apply_chat_template=chat, fewshot_as_multiturn=chat, confirm_run_unsafe_code=True,
            task_manager=TaskManager(include_path=str(configs), include_defaults=False),
        )
        self.requests(asked_file, recorder, theirs)
        self.metrics(report, theirs)
        self.likelihoods(asked_file, answers)

    def requests(self, asked_file, recorder, theirs):
        theirs_asked = {(task, item, index): asked for task, item, index, asked in recorder.asked}
        frozen = sorted(theirs_asked.items(), key=lambda x: x[0])
        self.frozen.append([[task, item, asked] for (task, item, _), asked in frozen if task != "minerva_math500"])
        count = 0
        for line in map(json.loads, asked_file.read_text().splitlines()):
            for index, request in enumerate(line["requests"]):
                if "until" in line:
                    request["until"] = line["until"]
                key = (line["task"], line["item"], index)
                self.check(request == theirs_asked.pop(key, None), f"request {key}: {request}")
                count += 1
            if line["task"] == "minerva_math500":
                doc = theirs["samples"]["minerva_math500"][line["item"]]["doc"]
                self.check(line["target"] == doc["answer"], f"target {line['target']} of {doc['answer']}")
        self.check(not theirs_asked, f"{len(theirs_asked)} requests that only the harness makes")
        print(f"  {count} requests equal, tokens included" if not self.problems else "  requests differ")

    def metrics(self, report, theirs):
        count = 0
        for task, result in theirs["results"].items():
            for key, value in result.items():
                if "," not in key or key.startswith("math_verify"):
                    continue
                ours = report["results"][task].get(key)
                self.check(ours is not None and close(ours, value), f"{task} {key}: {ours}, harness {value}")
                count += 1
            self.check(report["n-shot"][task] == theirs["n-shot"][task], f"{task}: n-shot")
            version = str(theirs["versions"][task]).removesuffix(".0")
            self.check(report["versions"][task] == version, f"{task}: version {version}")
        print(f"  {count} values and standard errors compared")

    def likelihoods(self, asked_file, answers):
        worst, count = 0, 0
        lines = [json.loads(line) for line in asked_file.read_text().splitlines()]
        for line in [line for line in lines if line["item"] < 4 and "until" not in line]:
            for request, (ours, greedy) in zip(line["requests"], answers[line["task"]][line["item"]], strict=True):
                if "text" in request:
                    prefix = self.tokenizer.token_to_id(self.config["bos_token"])
                    windows = get_rolling_token_windows(request["tokens"], prefix, self.max_len, 1)
                    pairs = [make_disjoint_window(window) for window in windows]
                else:
                    pairs = [request["tokens"]]
                scores = [self.score(*pair) for pair in pairs]
                worst = max(worst, abs(sum(score for score, _ in scores) - ours))
                self.check(all(best for _, best in scores) == greedy, f"{line['task']} {line['item']}: greedy")
                count += 1
        self.check(worst <= LIKELIHOOD_LIMIT, f"log-likelihoods differ by {worst}")
        print(f"  {count} log-likelihoods as of `bitnet logits`, at most {worst:.1e} apart")

    def score(self, context, continuation):
        tokens = (context + continuation)[-(self.max_len + 1):]
        file = self.folder / "logits.safetensors"
        self.run("logits", "-q", "-m", self.model, "--tokens", ",".join(map(str, tokens[:-1])), "-o", str(file))
        data = file.read_bytes()
        header = int.from_bytes(data[:8], "little")
        shape = json.loads(data[8:8 + header])["logits"]["shape"]
        logits = np.frombuffer(data[8 + header:], "<f4").reshape(shape)[-len(continuation):].astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        rows = np.arange(len(continuation))
        return logprobs[rows, continuation].sum(), bool((logits.argmax(axis=1) == continuation).all())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, help="folders of data files")
    parser.add_argument("--bitnet", default=str(ROOT / "target/release/bitnet"))
    parser.add_argument("--model", default="default", help="`default`, or a folder")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--freeze", type=Path, metavar="FILE", help="write what the harness asks, and beside it what it says of answers, for the tests")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        found, ours, configs = prepare(folder, args.data, args.limit)
        comparison = Comparison(args, folder)
        for number, (tasks, shots, chat) in enumerate(RUNS):
            tasks = [task for task in tasks if task in found]
            comparison.compare(ours, configs, number, (tasks, shots, chat))
        comparison.judged = judged(configs) if args.freeze else []
    if args.freeze:
        write(args.freeze, comparison.frozen)
        write(args.freeze.with_name("judged.jsonl"), comparison.judged)
        for path in (args.freeze, args.freeze.with_name("judged.jsonl")):
            subprocess.run(["gzip", "-9nf", path], check=True)
    if comparison.problems:
        sys.exit(f"{len(comparison.problems)} differences")
    print("all equal")


if __name__ == "__main__":
    main()
