# A miner or validator in a container. Never built here: expect to put something right.
#
#   docker build -t hiveminer .
#   docker run --init --network host --shm-size 2g \
#       -v ~/.bittensor/wallets/w/hotkeys:/home/hiveminer/.bittensor/wallets/w/hotkeys:ro \
#       -v hiveminer-state:/home/hiveminer/.hiveminer \
#       hiveminer miner --netuid N --subtensor.network finney --wallet.name w --wallet.hotkey h
#
# The host's network, because the swarm's peer announces the port that it listens on; shared
# memory, because Hivemind's processes hand tensors to each other. Only hotkeys go in: a coldkey
# has no place in a container.

FROM python:3.12-slim

RUN useradd --create-home --uid 1000 hiveminer
WORKDIR /opt/hiveminer
COPY pyproject.toml README.md LICENSE ./
COPY src ./src

# PyTorch's CPU build. For a GPU, build with:
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" .

USER hiveminer
RUN mkdir -p /home/hiveminer/.hiveminer
WORKDIR /home/hiveminer
ENV PYTHONUNBUFFERED=1 HIVEMINER_LOGGING__FORMAT=json
EXPOSE 8091 8009
VOLUME /home/hiveminer/.hiveminer

ENTRYPOINT ["hiveminer"]
CMD ["miner"]
