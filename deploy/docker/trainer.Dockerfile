# A site: trains on an NVIDIA GPU where there is one (--gpus all), else on the CPU. PyTorch brings its own CUDA
# libraries; the base adds what the driver's side needs. Build from the repository's root:
#   docker build -f deploy/docker/trainer.Dockerfile -t edgeflame-trainer:0.1.0 .
# Without a GPU take a quarter of the size: --build-arg BASE=debian:12-slim and, for PyTorch's CPU wheels, which the lock
# does not have, --build-arg LOCK= --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# `make pin-images` writes the digest that the tag has today behind it.
ARG BASE=nvidia/cuda:12.8.1-base-ubuntu24.04

FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY edgeflame edgeflame
COPY boards boards
COPY cli cli
COPY fitting fitting
COPY fleet fleet
COPY trainer trainer
COPY aggregator aggregator
COPY export export
COPY edge edge
COPY deploy/locks deploy/locks
COPY deploy/docker/install.sh deploy/docker/install.sh
ARG EXTRAS=cpu,train,metrics,sign,zstd
# Empty: the newest of everything that fits the extras, unchecked.
ARG LOCK=site.txt
ARG PIP_EXTRA_INDEX_URL=
RUN python3 -m venv /opt/edgeflame/venv \
    && deploy/docker/install.sh /opt/edgeflame/venv "${LOCK}" ".[${EXTRAS}]"

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/edgeflame --create-home --shell /usr/sbin/nologin edgeflame
COPY --from=build /opt/edgeflame /opt/edgeflame
COPY deploy/docker/healthcheck.py /opt/edgeflame/healthcheck.py
USER 10001
WORKDIR /var/lib/edgeflame
VOLUME /var/lib/edgeflame
EXPOSE 9465
ENV PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
    CMD ["/opt/edgeflame/venv/bin/python", "-I", "/opt/edgeflame/healthcheck.py", "http://127.0.0.1:9465/metrics"]
ENTRYPOINT ["/opt/edgeflame/venv/bin/python", "-I", "-m", "edgeflame"]
CMD ["train", "--help"]
