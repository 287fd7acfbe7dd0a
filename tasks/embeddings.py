"""Stages of what lies around the blocks, where it is quantized too: input embedding and output head."""

from __future__ import annotations

from safetensors.torch import load_file, save_file
from torch import Tensor

from lmq.formats.spec import QuantSpec
from lmq.measurement.embeddings import HeadSample, column_weights, fisher_rows, fit_rows, frobenius_row
from lmq.measurement.frobenius import FROBENIUS
from lmq.measurement.grids import load_grids, save_grids
from lmq.measurement.replay import read_gradients, read_hidden_states
from lmq.measurement.sequence_fisher import SEQUENCE_FISHER
from lmq.model.stored_matrices import stored_matrix
from lmq.quantizers import quantizer
from lmq.tables import write_rows
from lmq.text.calibration import read_tokens
from lmq_tasks.inputs import TOKENS_FILE, model_dir, open_model, read_structure
from lmq_tasks.measure import GRIDS_FILE
from lmq_tasks.stage import Job, JsonDict, stage
from lmq_tasks.states import GRADIENTS_FILE, HIDDEN_STATES_FILE

WEIGHTS_FILE = "weights.safetensors"


@stage("embedding-weights", version=1, schema="embedding-weights/1")
def weigh_embeddings(job: Job) -> None:
    """Column weights that grids of embedding and head are fitted to, with gradients of drawn labels where given."""
    sample = HeadSample.of(open_model(job), read_hidden_states(job.input("last", HIDDEN_STATES_FILE)))
    gradient = _row_gradient(job) if job.has("drawn_gradients") else None
    weights = {
        module.id.kind: column_weights(module, sample, gradient, fisher_weighted=gradient is not None)
        for module in read_structure(job).embeddings
    }
    save_file(weights, job.output / WEIGHTS_FILE)


@stage("embedding-grids", version=1, schema=FROBENIUS.schema.label)
def make_embedding_grids(job: Job) -> None:
    """Quantization grids of embedding and head for every configuration of the menu, and their Frobenius errors."""
    structure = read_structure(job)
    menu = [QuantSpec.parse(name) for name in job.config["menu"]]
    fitter = quantizer(**job.config["quantizer"])
    weights = load_file(job.input("weights", WEIGHTS_FILE)) if job.has("weights") else {}
    grids, rows = {}, []
    for module in structure.embeddings:
        matrix = stored_matrix(model_dir(job), structure, module)
        grids[module.id] = fit_rows(matrix, menu, fitter, weights.get(module.id.kind))
        rows += [frobenius_row(module, matrix, spec, grid) for spec, grid in grids[module.id].items()]
    write_rows(job.output / FROBENIUS.file, FROBENIUS.schema, rows)
    save_grids(job.output / GRIDS_FILE, grids)


@stage("embedding-fisher", version=1, schema=SEQUENCE_FISHER.schema.label)
def measure_embedding_fisher(job: Job) -> None:
    """Sequence-wise Fisher cost of embedding and head under every configuration of the menu, as that of any module."""
    structure = read_structure(job)
    menu = [QuantSpec.parse(name) for name in job.config["menu"]]
    grids = load_grids(job.input("grids", GRIDS_FILE))
    parts = {module.part for module in structure.embeddings}
    last = read_hidden_states(job.input("last", HIDDEN_STATES_FILE))
    sample = None if parts == {"embedding"} else HeadSample.of(open_model(job), last)
    token_ids, gradient = read_tokens(job.input("tokens", TOKENS_FILE)), _row_gradient(job)
    rows: list[JsonDict] = []
    for module in structure.embeddings:
        matrix = stored_matrix(model_dir(job), structure, module)
        chosen = {spec: grids[module.id][spec] for spec in menu}
        rows += fisher_rows(module, matrix, chosen, sample=sample, token_ids=token_ids, gradient=gradient)
    write_rows(job.output / SEQUENCE_FISHER.file, SEQUENCE_FISHER.schema, rows)


def _row_gradient(job: Job) -> Tensor:
    """Gradient at the rows that the calibration tokens looked up, from that at the states that enter block 0."""
    tokens = read_tokens(job.input("tokens", TOKENS_FILE))
    gradient = read_gradients(job.input("drawn_gradients", GRADIENTS_FILE))
    return open_model(job).embedding_gradient(tokens, gradient)
