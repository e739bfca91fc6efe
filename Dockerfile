# No container engine has built either stage yet; examples/container/README.md says what was checked
# without one.
#
# demo   the embedded task on a CPU:   docker build -t mmr1-demo . && docker run --rm mmr1-demo
# cuda   the GPU environment:          docker build --target cuda -t mmr1-cuda .
# The last stage is what a plain `docker build .` builds; BuildKit leaves the other one out.

# ---- cuda: not yet built or run, and the pins in requirements-cuda.txt with it ------------------------------
# A devel image, because transformer-engine-torch and Apex are compiled with its toolkit.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 AS cuda

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential ca-certificates git libnuma1 make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# As in the Makefile.
ARG UV_VERSION=0.13.9
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
# Of the GPUs to compile for (9.0: H100), and how many compilers at a time.
ARG TORCH_CUDA_ARCH_LIST=9.0
ARG MAX_JOBS=4
ENV CUDA_HOME=/usr/local/cuda HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
    NVIDIA=/app/.venv/lib/python3.12/site-packages/nvidia
# The headers and libraries of the wheels that torch brings, before the image's own.
ENV CPATH=${NVIDIA}/cu13/include:${NVIDIA}/cudnn/include:${NVIDIA}/nccl/include \
    LD_LIBRARY_PATH=${NVIDIA}/cu13/lib:${NVIDIA}/cudnn/lib:${NVIDIA}/nccl/lib:/usr/local/cuda/lib64

# By number: Kubernetes' runAsNonRoot can tell of no name that it isn't root's.
RUN useradd --create-home --uid 10001 trainer && install -d -o trainer /app
USER 10001
WORKDIR /app

# torch first: transformer-engine-torch is built from source without isolation and imports it. requirements-te-build.txt
# only pins its build tools here: the compiler wheels there are for machines without a toolkit.
COPY --chown=trainer requirements.txt requirements-te.txt requirements-te-build.txt requirements-cuda.txt ./
RUN python3 -m venv .uv && .uv/bin/python -m pip install --no-cache-dir --quiet "uv==${UV_VERSION}" \
    && .uv/bin/uv venv --python 3.12 .venv \
    && .uv/bin/uv pip install --python .venv -r requirements.txt -c requirements-te-build.txt \
        setuptools wheel ninja pybind11 \
    && .uv/bin/uv pip install --python .venv --no-build-isolation -r requirements-cuda.txt \
    && .uv/bin/uv cache clean

# Apex, for its fused Adam and its gradient accumulation: from NVIDIA's source alone.
RUN git init --quiet apex \
    && git -C apex fetch --quiet --depth 1 https://github.com/NVIDIA/apex "${APEX_COMMIT}" \
    && git -C apex checkout --quiet FETCH_HEAD \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
        .uv/bin/uv pip install --python .venv --no-build-isolation --no-deps ./apex \
    && rm -rf apex

COPY --chown=trainer . .
RUN .uv/bin/uv pip install --python .venv --no-deps -e .
ENV PATH=/app/.venv/bin:$PATH
CMD ["bash"]

# ---- demo: two CPU cores -----------------------------------------------------------------------------------
FROM python:3.12-slim-bookworm AS demo

# A C compiler and make for the set-up; libnuma1 because vLLM's CPU build links to it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libnuma1 make \
    && rm -rf /var/lib/apt/lists/*

# By number: Kubernetes' runAsNonRoot can tell of no name that it isn't root's.
RUN useradd --create-home --uid 10001 trainer && install -d -o trainer /app
USER 10001
WORKDIR /app

COPY --chown=trainer . .
RUN make setup

CMD ["make", "demo"]
