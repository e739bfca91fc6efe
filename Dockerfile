# Neither stage has been built or run yet.
#
# demo   the embedded task on a CPU:   docker build -t mmr1-demo . && docker run --rm mmr1-demo
# cuda   the GPU environment:          docker build --target cuda -t mmr1-cuda .
# The last stage is what a plain `docker build .` builds; BuildKit leaves the other one out.

# ---- cuda: not yet built or run, and the pins in requirements-cuda.txt with it ------------------------------
# A devel image, because transformer-engine-torch is compiled against the CUDA toolkit and cuDNN headers.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 AS cuda

RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential ca-certificates git libnuma1 make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# As in the Makefile.
ARG UV_VERSION=0.13.9
ENV CUDA_HOME=/usr/local/cuda HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

RUN useradd --create-home trainer && install -d -o trainer /app
USER trainer
WORKDIR /app

# torch first: transformer-engine-torch is built without isolation and imports it.
COPY --chown=trainer requirements.txt requirements-cuda.txt ./
RUN python3 -m venv .uv && .uv/bin/python -m pip install --quiet uv==${UV_VERSION} \
    && .uv/bin/uv venv --python 3.12 .venv \
    && .uv/bin/uv pip install --python .venv -r requirements.txt setuptools wheel ninja pybind11 \
    && .uv/bin/uv pip install --python .venv --no-build-isolation -r requirements-cuda.txt

COPY --chown=trainer . .
RUN .uv/bin/uv pip install --python .venv --no-deps -e .
ENV PATH=/app/.venv/bin:$PATH
CMD ["bash"]

# ---- demo: two CPU cores -----------------------------------------------------------------------------------
FROM python:3.12-slim AS demo

# A C compiler and make for the set-up; libnuma1 because vLLM's CPU build links to it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libnuma1 make \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home trainer && install -d -o trainer /app
USER trainer
WORKDIR /app

COPY --chown=trainer . .
RUN make setup

CMD ["make", "demo"]
