"""What a trainer is given in tests, and the same sums made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny import END
from torch import Tensor, nn

from hiveminer.training.trainer import LocalStep, Trainer

LONGEST = 12

# Lengths that differ, an end of its own in the middle of a row and at its end (END is the
# padding as well), a row twice, rows of one token and of none.
ROWS = [
    "5 9 3 4 1",
    "7 1",
    "2 3 4 5 6 7 8 9 10 11 12 1",
    "6",
    "1 1 1",
    "",
    "30 31 2 17 1 4 9",
    "8 20 1",
    "7 1",
]
TOKENS = 5 + 2 + 12 + 1 + 3 + 0 + 7 + 3 + 2


def ids(text: str) -> list[int]:
    return [int(number) for number in text.split()][:LONGEST]


def encode_numbers(texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts of token numbers, padded on the right with the end of a row."""
    rows = [ids(text) for text in texts]
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    return {
        "input_ids": torch.tensor(
            [row + [END] * pad for row, pad in zip(rows, pads, strict=True)], dtype=torch.long
        ),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * pad for row, pad in zip(rows, pads, strict=True)],
            dtype=torch.long,
        ),
    }


class Kept(LocalStep):
    """Plain SGD that writes down what it was given."""

    def __init__(self, model: nn.Module, *, learning_rate: float = 0.1):
        super().__init__(torch.optim.SGD(model.parameters(), lr=learning_rate))
        self.model = model
        self.batch_sizes: list[int] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.refuse: set[int] = set()
        """Numbers of the steps that are thrown away."""

    def step(self, *, batch_size: int) -> bool:
        self.batch_sizes.append(batch_size)
        self.gradients.append(gradients(self.model))
        if len(self.batch_sizes) - 1 in self.refuse:
            return False
        return super().step(batch_size=batch_size)


class Watched(nn.Module):
    """A model that tells what it is fed, and does what a test wants before it answers."""

    def __init__(self, model: nn.Module, before: Callable[[Tensor], None] = lambda _: None):
        super().__init__()
        self.model = model
        self.before = before
        self.seen: list[list[int]] = []
        self.factor = 1.0

    def forward(self, *, input_ids: Tensor) -> Any:
        self.before(input_ids)
        self.seen.extend(row[row != 0].tolist() for row in input_ids)  # 0 is no row's token
        answer = self.model(input_ids=input_ids)
        answer.logits = answer.logits * self.factor
        return answer


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.grad.clone()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6, msg=name)


def by_hand(model: nn.Module, rows: Sequence[list[int]]) -> float:
    """Mean over the tokens predicted, each row alone; gradients are left in the model."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    count = 0
    for row in rows:
        if len(row) < 2:
            continue
        logits = model(input_ids=torch.tensor([row])).logits[0]
        for place in range(len(row) - 1):
            total = total - torch.log_softmax(logits[place], dim=0)[row[place + 1]]
            count += 1
    (total / count).backward()
    return total.item() / count


def trainer(model: nn.Module, **options: Any) -> Trainer:
    options = {"encode": encode_numbers, "optimizer": Kept(model), "max_grad_norm": 0.0} | options
    return Trainer(model, **options)
