"""What each client gets of the gateway is what plain Transformers says."""

# All of them are in one file, so that one process starts one swarm for them.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel

from .conftest import KEY, Expected
from .installed import SMOLLM2, asked, run

QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "system", "content": "You answer in one sentence."}, {"role": "user", "content": QUESTION}]
PROMPT = "Once upon a time"
NUM_TOKENS = 24
CITIES = ["Paris", "Lyon"]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": CITIES}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_litellm(url: str, expected: Expected):
    found = asked(
        "ask_litellm.py", url=url, key=KEY, messages=MESSAGES, prompt=PROMPT, num_tokens=NUM_TOKENS, tool=TOOL
    )
    assert found["whole"] == found["stream"] == expected(MESSAGES, NUM_TOKENS)
    assert found["text"] == expected(PROMPT, NUM_TOKENS)
    assert found["num_tokens"] == found["num_streamed_tokens"] > 1
    assert found["finish_reason"] == "stop"
    ((name, arguments),) = found["calls"]
    assert name == "weather"
    assert arguments["city"] in CITIES


def test_langchain(url: str, expected: Expected, whole: PreTrainedModel, tokenizer: Any):
    found = asked(
        "ask_langchain.py", url=url, key=KEY, messages=MESSAGES, prompt=PROMPT, num_tokens=NUM_TOKENS, names=CITIES
    )
    answer = expected(MESSAGES, NUM_TOKENS)
    assert found["whole"] == found["stream"] == answer
    assert found["batch"] == [answer, expected([{"role": "user", "content": PROMPT}], NUM_TOKENS)]
    assert found["num_tokens"] == found["num_streamed_tokens"] > 1
    assert found["finish_reason"] == "stop"
    assert [each["name"] in CITIES for each in found["objects"]] == [True, True]
    hidden_1SD = whole.model(**tokenizer(PROMPT, return_tensors="pt")).last_hidden_state
    assert found["embedding"] == pytest.approx(hidden_1SD[0].mean(dim=0).tolist(), abs=1e-3)


def test_llm(url: str, expected: Expected, tmp_path: Path):
    model = {"model_id": "swarm", "model_name": "smollm2", "api_base": url, "api_key_name": "swarm"}
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump([model | {"supports_schema": True}]))
    (tmp_path / "keys.json").write_text(json.dumps({"swarm": KEY}))

    def llm(*arguments: str) -> str:
        greedy = ("-o", "temperature", "0", "-o", "max_tokens", str(NUM_TOKENS))
        return run("llm", "prompt", "-m", "swarm", *greedy, *arguments, LLM_USER_PATH=str(tmp_path)).removesuffix("\n")

    system, question = MESSAGES
    answer = expected(MESSAGES, NUM_TOKENS)
    assert llm(QUESTION, "--system", system["content"]) == answer  # a stream
    follow_up = {"role": "user", "content": "And of Italy?"}
    conversation = [system, question, {"role": "assistant", "content": answer}, follow_up]
    assert llm("--continue", "--no-stream", follow_up["content"]) == expected(conversation, NUM_TOKENS)
    assert json.loads(llm("A big city.", "--schema", "is_large bool"))["is_large"] in (True, False)


FACTS = [
    ("The capital of France is", ["Paris", "London", "Rome"]),
    ("Two plus two is", ["four", "five", "six"]),
    ("The opposite of hot is", ["cold", "warm", "red"]),
    ("Water is made of hydrogen and", ["oxygen", "iron", "gold"]),
    ("The fourth planet from the sun is", ["Mars", "Earth", "Venus"]),
    ("The author of Hamlet is", ["William Shakespeare", "Charles Dickens", "Jane Austen"]),
    ("A spider has legs, and their number is", ["eight", "six", "four"]),
    ("The chemical symbol of gold is", ["Au", "Ag", "Fe"]),
    ("The square root of 144 is", ["12", "14", "24"]),
    ("The largest ocean is the", ["Pacific", "Atlantic", "Indian"]),
    ("Die Hauptstadt von Österreich ist", ["Wien", "Graz", "Linz"]),
    ("7 * 8 =", ["56", "54", "63"]),
    ("In Python, a list is sorted in place by", ["x.sort()", "sorted(x)", "sort(x)"]),
    ("Whales are", ["mammals", "fish", "birds"]),
    ("The first month without an r is", ["May", "June", "July"]),
    ("The Roman numeral XIV is", ["14", "16", "9"]),
    ("Napoleon was defeated in 1815 at", ["Waterloo", "Austerlitz", "Jena"]),
    ("The currency of Japan is the", ["yen", "won", "yuan"]),
    ("Bees make", ["honey", "milk", "silk"]),
    ("An octagon has this many sides:", ["8", "6", "7"]),
]
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
SAYS = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 6, "do_sample": False},
    "filter_list": [{"name": "first word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}]}],
    "metric_list": [{"metric": "exact_match"}],
}
READS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{choices[0]}}.",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


def test_lm_eval(url: str, tmp_path: Path):
    lines = [json.dumps({"question": question, "choices": choices}) + "\n" for question, choices in FACTS]
    files = {"many": tmp_path / "many.jsonl", "few": tmp_path / "few.jsonl"}
    files["many"].write_text("".join(lines))
    files["few"].write_text("".join(lines[:8]))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {name: str(file) for name, file in files.items()}},
    }
    for name, split, task in (("choices", "many", CHOICES), ("says", "few", SAYS), ("reads", "few", READS)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": split, **source, **task}))
    found = asked(
        "evaluate.py",
        url=url,
        key=KEY,
        model=str(SMOLLM2),
        tasks=str(tmp_path),
        texts=["choices", "says", "reads"],
        chats=["says"],
    )
    for ours, whole in found.values():
        for task, scores in whole["scores"].items():
            assert ours["scores"][task] == pytest.approx(scores, rel=1e-4)
        for task, samples in whole["samples"].items():
            assert flat(ours["samples"][task]) == flat(samples)
    whole_scores = found["completions"][1]["scores"]
    assert 0.2 < whole_scores["choices"]["acc,none"] < 1  # so that wrong numbers would give other scores
    assert 0.2 < whole_scores["says"]["exact_match,first word"] < 1


def flat(samples: Any) -> list[Any]:
    """The texts, numbers (about) and truths of samples, one after another."""
    if isinstance(samples, list):
        return [each for sample in samples for each in flat(sample)]
    return [pytest.approx(samples, abs=1e-3) if isinstance(samples, float) else samples]


def test_guidellm(url: str, expected: Expected, tmp_path: Path):
    backend = {
        "kind": "openai_http",
        "target": url.removesuffix("/v1"),
        "model": "smollm2",
        "api_key": KEY,
        "request_format": "/v1/chat/completions",
        "extras": {"body": {"temperature": 0}},
    }
    report = tmp_path / "report.json"
    run(
        "guidellm",
        "run",
        *("--backend", json.dumps(backend)),
        *("--tokenizer", f"kind=hf_auto,model={SMOLLM2}"),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", "kind=max_requests,count=8"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=12"),
        *("--output", f"kind=json,path={report}"),
        "--disable-console",
        GUIDELLM__MAX_WORKER_PROCESSES="1",
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), requests["errored"], requests["incomplete"]) == (8, [], [])
    for each in requests["successful"]:
        (message,) = json.loads(each["request_args"])["body"]["messages"]
        (part,) = message["content"]
        message = {"role": message["role"], "content": part["text"]}
        assert each["output"] == expected([message], 12, is_endless=True)
        assert each["output_metrics"]["text_tokens"] == 12
