"""lm-evaluation-harness: scores and samples of tasks, from the gateway's two endpoints and from Transformers."""

import json
import os
import sys

what = json.loads(sys.argv[1])
os.environ |= {"OPENAI_API_KEY": what["key"], "HF_DATASETS_CACHE": f"{what['tasks']}/cache"}  # read at the import

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

tasks = TaskManager(include_path=what["tasks"], include_defaults=False)


def evaluated(model, names, **options):
    """Scores by task and metric, and samples by task, in the order of the documents."""
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=tasks, bootstrap_iters=0, **options)
    return {
        "scores": {
            task: {name: each for name, each in scores.items() if isinstance(each, float)}
            for task, scores in found["results"].items()
        },
        "samples": {
            task: [each["filtered_resps"] for each in sorted(samples, key=lambda each: each["doc_id"])]
            for task, samples in found["samples"].items()
        },
    }


def of_gateway(kind, endpoint, **more):
    served = {"model": "smollm2", "base_url": f"{what['url']}/{endpoint}", "num_concurrent": 4, "max_retries": 1}
    return lm_eval.api.registry.get_model(kind)(**served, **more)


texts, chats = what["texts"], what["chats"]
whole = lm_eval.api.registry.get_model("hf")(pretrained=what["model"], dtype="float32", device="cpu", batch_size=1)
completions = of_gateway("local-completions", "completions", tokenizer=what["model"], batch_size=4)
chat_completions = of_gateway("local-chat-completions", "chat/completions")
print(
    json.dumps(
        {
            "completions": [evaluated(model, texts) for model in (completions, whole)],
            "chat completions": [
                evaluated(model, chats, apply_chat_template=True) for model in (chat_completions, whole)
            ],
        }
    )
)
