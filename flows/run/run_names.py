"""What a run is called in the UI, and the tags that find it there."""

from __future__ import annotations

from prefect.runtime import flow_run

from lmq_flows.config.run import RunConfig


def run_title(config: RunConfig) -> str:
    """`quantize smollm2-135m loss-aware 4.25` for one variant, else `sweep demo: 1 model × 5 strategies × 1 budget`."""
    models, strategies, budgets = config.models, config.strategies, config.budgets
    if len(models) == len(strategies) == len(budgets) == 1:
        return f"quantize {models[0].name} {strategies[0].label} {budgets[0]}"
    counted = (
        _counted(len(models), "model", "models"),
        _counted(len(strategies), "strategy", "strategies"),
        _counted(len(budgets), "budget", "budgets"),
    )
    return f"sweep {config.name}: {' × '.join(counted)}"


def run_tags(config: RunConfig) -> list[str]:
    """What finds a run in the UI: its name, models, strategies and budgets."""
    return [
        f"run:{config.name}",
        *(f"model:{model.name}" for model in config.models),
        *(f"strategy:{item.label}" for item in config.strategies),
        *(f"budget:{text}" for text in config.budgets),
    ]


def model_run_name() -> str:
    """Name of the flow run of one model of a run, from its parameters."""
    given = flow_run.parameters["config"]
    config = given if isinstance(given, RunConfig) else RunConfig.model_validate(given)
    return f"{config.models[0].name} of {config.name}"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
