"""Names of the metrics a model can be pruned by; imports nothing, so that `lmq --help` can name them."""

RANKING_METRICS = {
    "avss": "avss",
    "avss-authors": "avss_pooled",
    "avss-relative": "avss_relative",
    "avss-authors-relative": "avss_pooled_relative",
    "block-influence": "block_influence",
    "shapley": "shapley",
    "leave-one-out": "leave_one_out",
}
"""Name of a metric that ranks layers one by one → its column in the table of layers."""

ANGULAR = "angular"
"""The block of neighbouring layers of least angular distance."""

PRUNING_METRICS = (*RANKING_METRICS, ANGULAR)
MEASURED_BY_REMOVAL = ("shapley", "leave-one-out")
