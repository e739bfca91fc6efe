#!/usr/bin/env bash
# Make .venv-te: what requirements.txt pins, and Transformer Engine compiled from source, on any Linux machine. No GPU and
# no CUDA toolkit is needed: the compiler comes as wheels (requirements-te-build.txt).
# Usage: tools/build_te.sh UV    (the path of uv; MAX_JOBS=N compiles N files at a time, about 2 GB each)
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$1
[ -x .venv-te/bin/python ] || "$uv" venv --quiet --python 3.12 .venv-te
"$uv" pip install --python .venv-te -r requirements.txt -r requirements-te-build.txt
nvidia=$PWD/.venv-te/lib/python3.12/site-packages/nvidia
# Compilers look for CUDA's libraries in lib64.
[ -e "$nvidia/cu13/lib64" ] || ln -s lib "$nvidia/cu13/lib64"
export CUDA_HOME=$nvidia/cu13
export CPATH=$nvidia/cu13/include:$nvidia/cudnn/include:$nvidia/nccl/include
export LIBRARY_PATH=$nvidia/cu13/lib:$nvidia/cudnn/lib:$nvidia/nccl/lib
export PATH=$PWD/.venv-te/bin:$PATH NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-1}
echo "compiling transformer-engine-torch: 33 files, 15 to 40 minutes on one core, once; .venv-te keeps it" >&2
"$uv" pip install --python .venv-te --no-build-isolation -r requirements-te.txt -r requirements-te-build.txt
