"""A program for the tests: what vLLM makes of models, each in an engine of its own, as JSON.

    python tests/vllm/in_vllm.py JOBS.json OUT.json

JOBS is a list of objects: model (a folder), prompts (lists of token ids), new_tokens, options of vllm.LLM, and lora (a
folder or null). OUT has for each job the greedy ids, those of a second time with the least number of prompt tokens that
were then in the prefix cache, and, of every prompt position but the first, the likeliest tokens with their
log-probabilities (without an adapter); or the reason why vLLM did not start.
"""

import json
import os
import sys
from typing import Any

LIKELIEST = 8


def run(job: dict[str, Any]) -> dict[str, Any]:
    import vllm
    from vllm.lora.request import LoRARequest

    options = {
        "dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 256,
        "max_num_seqs": 32, "max_num_batched_tokens": 512, "block_size": 32, "disable_log_stats": True,
        "distributed_executor_backend": "uni",
    } | job["options"]  # fmt: skip
    try:
        llm = vllm.LLM(job["model"], **options)
    except Exception as error:  # of any kind, from other processes too
        return {"refused": str(error)}
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    # vLLM itself cannot give those of prompts beside an adapter: it multiplies the adapter by the rows of the texts.
    listed = None if job["lora"] else LIKELIEST
    greedy = {"temperature": 0, "max_tokens": job["new_tokens"], "ignore_eos": True, "detokenize": False}
    lora = LoRARequest("adapter", 1, job["lora"]) if job["lora"] else None
    try:
        outputs = llm.generate(prompts, vllm.SamplingParams(**greedy, prompt_logprobs=listed), lora_request=lora)
        again = llm.generate(prompts, vllm.SamplingParams(**greedy), lora_request=lora)
    except Exception as error:  # the jobs behind this one have engines of their own
        return {"failed": repr(error)}
    finally:
        llm.llm_engine.engine_core.shutdown()
    texts, cached = ([list(output.outputs[0].token_ids) for output in each] for each in (outputs, again))
    positions = [
        [{id: entry.logprob for id, entry in position.items()} for position in output.prompt_logprobs[1:]]
        for output in outputs
        if listed
    ]
    found = min(output.num_cached_tokens or 0 for output in again)
    return {"texts": texts, "cached": cached, "found_in_cache": found, "positions": positions}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    jobs, out = sys.argv[1:]
    results = []
    with open(jobs) as file:
        wanted = json.load(file)
    for job in wanted:
        results.append(run(job))
        with open(out, "w") as file:
            json.dump(results, file)
