#!/usr/bin/env bash
# What other tools make of our exports: SAELens, dictionary_learning, sparsify, delphi's loader, SAEDashboard's classes,
# SAEBench's core and sae-probes, in an environment of their own, since some of them want an older transformer-lens.
#
#     tests/peers/run.sh [FOLDER]          FOLDER (default: a temporary one) takes a small store, runs and exports
#
# PYTHON        of tcsae (default: .venv/bin/python)
# PEERS_VENV    of the others (default: .venv-peers), made if it is not there: some 2 GB, minutes
# TCSAE_PEERS   under CI (CI=true) nothing is run unless this is set
#
# Prints a line a tool, and "N passed, N failed, N skipped"; a tool that is not installed is skipped by its name.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -n "${CI:-}" ] && [ -z "${TCSAE_PEERS:-}" ]; then
    echo "tests/peers/run.sh: skipped under CI; set TCSAE_PEERS=1 to run it"
    exit 0
fi
python=${PYTHON:-.venv/bin/python}
venv=${PEERS_VENV:-.venv-peers}
folder=${1:-$(mktemp -d)}
export HF_HUB_OFFLINE=1 SPARSIFY_DISABLE_TRITON=1 TOKENIZERS_PARALLELISM=false
if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv"
    pip=("$venv/bin/pip" install --quiet -c constraints.txt)
    "${pip[@]}" torch # for CPUs, before anything asks for another
    "${pip[@]}" sae-lens dictionary-learning eai-sparsify sae-probes
    "$venv/bin/pip" uninstall --quiet --yes torchvision || true # comes with nnsight; does not fit a torch for CPUs
    # These pin other versions of what all of them need (delphi: vllm), so they come without, and what is missing after.
    "$venv/bin/pip" install --quiet --no-deps eai-delphi sae-bench sae-dashboard sentence-transformers
    "${pip[@]}" asyncer orjson simple-parsing faiss-cpu blobfile tabulate scikit-learn natsort
fi
"$python" tests/peers/prepare.py "$folder"
"$venv/bin/python" -W ignore tests/peers/look.py "$folder"
