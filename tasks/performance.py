"""Stage that measures memory and speed: figures of the machine that it ran on, which the artifact names.

Nothing is made from its artifact but the report, so that other figures on another machine wake nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lmq.evaluation.performance import measure_performance
from lmq_tasks.opened import materialized, model_dir
from lmq_tasks.stage import Job, stage

PERFORMANCE_FILE = "performance.json"


@stage("performance", version=1, schema="performance/1")
def performance(job: Job) -> None:
    """Memory after opening and while generating, and tokens per second, in a process of its own."""
    found = measure_performance(
        variant_dir(job),
        prompt_tokens=job.config["prompt_tokens"],
        generated_tokens=job.config["generated_tokens"],
        device=job.site.device,
        threads=job.site.threads_per_worker,
    )
    (job.output / PERFORMANCE_FILE).write_text(json.dumps(asdict(found)))


def variant_dir(job: Job) -> Path:
    """Directory of the variant: a checkpoint of lmq, one of another program, or the unquantized model."""
    if job.has("checkpoint"):
        return materialized(job, "checkpoint")
    if "checkpoint" in job.site.places:
        return Path(job.site.places["checkpoint"])
    return model_dir(job)
