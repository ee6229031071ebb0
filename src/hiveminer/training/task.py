"""A run's model, tokenizer, data and run id, loaded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from hiveminer.config.run import Run, RunId
from hiveminer.errors import OperatorError
from hiveminer.training import model as models
from hiveminer.training.data import Rows, load_rows
from hiveminer.training.model_checks import check_fit


@dataclass(frozen=True)
class Task:
    """What everybody who trains together shares.

    model: a causal language model on the CPU. dataset: rows of text by number. beyond: about the
    share of the text beyond the sequence length.
    """

    run: Run
    run_id: RunId
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dataset: Rows
    beyond: float

    def encode(self, examples: models.Examples) -> BatchEncoding:
        """`input_ids` and `attention_mask`, each [rows, longest row], truncated to the run's
        sequence length."""
        length = self.run.model.sequence_length
        return models.encode(self.tokenizer, examples, max_length=length)

    def difference(self, *, version: str, run_id: str, data_hash: str) -> str | None:
        """Why a neuron with these cannot train with us; None if it can."""
        if not self.run.accepts_version(version):
            return (
                f"version {version or 'unknown'} is older than {self.run.oldest_version}, "
                "the oldest of this run"
            )
        difference = self.run_id.difference(run_id)
        if difference is None and data_hash != self.dataset.hash:
            return f"data hash differs: {data_hash} there, {self.dataset.hash} here"
        return difference


def load_model(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load and check a run's model and tokenizer. Raises OperatorError."""
    model = models.load_model(run.model.name, revision=run.model.revision)
    expected = run.model.hash
    if expected and (actual := models.weights_hash(model)) != expected:
        raise OperatorError(
            f"model {run.model.name}: the hash of its weights is {actual}, the run wants "
            f"{expected}; get the run's own model, or another run.toml"
        )
    tokenizer = models.load_tokenizer(run.model.name, revision=run.model.revision)
    check_fit(model, tokenizer, run.model.sequence_length)
    return model, tokenizer


def load_task(run: Run, *, threads: int | None = None) -> Task:
    """Load and check a run's model, tokenizer and data. Raises OperatorError.

    threads: CPU threads of PyTorch from now on; None leaves them unchanged.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    dataset = load_rows(run.data)
    model, tokenizer = load_model(run)
    beyond = models.share_beyond(tokenizer, dataset, max_length=run.model.sequence_length)
    run_id = RunId.of(run, schema_hash=models.schema_hash(model), data_hash=dataset.hash)
    return Task(run, run_id, model, tokenizer, dataset, beyond)
