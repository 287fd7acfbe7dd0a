"""GPTQ of llm-compressor, asymmetric groups: float16 scale and a zero of the code's bits per group."""

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

from benchmarks.peers.job import Job, Quantized, effective_weights, run


def quantize(job: Job) -> Quantized:
    bits, group_size = job.options["bits"], job.options["group_size"]
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    tokens = job.token_ids()
    text = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": (tokens * 0 + 1).tolist()})
    model = job.load()
    oneshot(
        model=model,
        tokenizer=job.tokenizer(),
        dataset=text,
        recipe=[GPTQModifier(config_groups=groups, ignore=["lm_head"])],
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    return Quantized(effective_weights(model, job.matrices), bits + (16 + bits) / group_size)


if __name__ == "__main__":
    run(quantize)
