"""The server that the axon is compared with: Starlette on uvicorn, without one check.

`python -m benchmarks._plain` prints its port, and ends with its standard input. It reads
the body as JSON and answers as an axon does, unsigned. Like the miner it trains the
built-in model in a thread of its own process, with one torch thread, and takes turns as
often, so that what differs is the axon's work and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
import threading

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from hiveminer.config.run import Run
from hiveminer.protocol import IsAlive
from hiveminer.training import model
from hiveminer.training.data import load_rows
from hiveminer.training.trainer import LocalStep, Trainer

BATCH = 4


async def is_alive(request: Request) -> JSONResponse:
    try:
        await request.json()
    except ValueError:
        return JSONResponse({"detail": "the body is not JSON"}, status_code=400)
    return JSONResponse(IsAlive(completion=True).model_dump())


def train() -> None:
    """Until the process ends."""
    run = Run()
    rows = load_rows(run.data)
    network = model.load_model()
    tokenizer = model.load_tokenizer()

    def encode(texts: object) -> dict[str, torch.Tensor]:
        encoded = model.encode(tokenizer, texts, max_length=run.model.sequence_length)  # type: ignore[arg-type]
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    trainer = Trainer(network, encode=encode, optimizer=LocalStep(optimizer))
    while True:
        trainer.train(rows.texts(list(range(1024))), batch_size=BATCH)


def end_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192) if most > 0 else 8192, most))
    sys.setswitchinterval(0.0005)
    torch.set_num_threads(1)
    for job in (end_with_standard_input, train):
        threading.Thread(target=job, daemon=True).start()
    app = Starlette(
        routes=[Route(f"/{name}", is_alive, methods=["POST"]) for name in ("IsAlive", "Train")]
    )
    # By name: only then are small answers sent at once (TCP_NODELAY), as the axon's are.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off", http="h11")
    asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))


if __name__ == "__main__":
    main()
