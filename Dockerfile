# The page and the API on one port: docs/docker.md. Torch's wheel brings the CUDA libraries, so the
# base is plain Debian: a CUDA base would hold them twice. scripts/try-dockerfile runs each RUN
# without Docker.
FROM debian:bookworm-20250520-slim AS python
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev \
        python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

FROM python AS packages
WORKDIR /build
RUN python3 -m venv /opt/venv
COPY requirements.txt .
# Smaller, for machines without a GPU: --build-arg PIP_EXTRA_INDEX_URL=(PyTorch's index of CPU builds)
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip pip install -r requirements.txt

FROM packages AS nano
COPY minigpt4 minigpt4
COPY weights weights
RUN --mount=type=cache,target=/root/.cache/pip python -m minigpt4 download nano

FROM python
# Downloads and compiled kernels go into the volume; nano's weights lie beside the code. The kernels
# are compiled at the first start, for the processor of that machine: hence gcc; and python3-dev, for
# what Triton compiles on a machine with a GPU.
RUN useradd --create-home --uid 1000 app && install -d -o app -g app /data
COPY --from=packages /opt/venv /opt/venv
COPY --from=nano /build/weights /app/weights
WORKDIR /app
COPY . .
USER 1000:1000
# Docker gives a container 10 s to stop; with --stop-timeout 35, set MINIGPT4_SHUTDOWN_SECONDS=25.
ENV MINIGPT4_HOST=0.0.0.0 MINIGPT4_PORT=7860 MINIGPT4_SHUTDOWN_SECONDS=8 \
    MINIGPT4_WEIGHTS=/data/weights HF_HOME=/data/huggingface XDG_CACHE_HOME=/data/cache \
    TRITON_CACHE_DIR=/data/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /data
EXPOSE 7860
STOPSIGNAL SIGTERM
# The first start of a large model downloads up to 30 GB.
HEALTHCHECK --interval=30s --timeout=15s --start-period=60m --start-interval=5s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"MINIGPT4_PORT\"]}/readyz', timeout=12)"]
CMD ["python", "app.py"]
